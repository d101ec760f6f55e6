//! The same requests at Culvert's waypoint and at Envoy configured as istiod would configure it: status, headers, body, what
//! the endpoint saw, response flags and details must be the same, or the difference is listed with its reason in
//! `differences.rs`, and then it must be there.
//!
//! Requests reach the waypoint as in production (HBONE over mTLS with a workload's certificate), Envoy by plain TCP: the tunnel
//! is not what is compared. All cases share one waypoint, one Envoy and one scripted endpoint.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a suite")]
#![allow(clippy::format_push_string, clippy::format_collect, reason = "what is sent reads as it is sent; nobody waits for it")]

mod backend;
mod case;
mod cases;
mod compare;
mod differences;
mod istiod;
mod run;
mod sides;
mod token;

use std::process::ExitCode;

fn main() -> ExitCode {
    run::suite(&cases::all())
}
