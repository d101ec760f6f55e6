//! The crate over in-memory and loopback transports: no TLS, no agent, no sleeps.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;
mod limits;
mod pool;
mod relay;
mod windows;
