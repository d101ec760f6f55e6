//! How a Culvert process runs: threads, sockets, drain, readiness, admin, metrics, logs, settings.
//!
//! Nothing here knows what a workload or a policy is: the crate is the ground both proxies stand on and depends on no
//! other crate of the house. Only [`sockets`], [`allocator`] and [`profile`] have `unsafe`.
#![deny(unsafe_code)]

pub mod admin;
#[allow(unsafe_code, reason = "the allocator has no safe interface for giving memory back")]
pub mod allocator;
pub mod control_plane;
pub mod copies;
pub mod drain;
pub mod fetch;
pub mod gate;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod process;
#[allow(unsafe_code, reason = "a signal handler, a timer, the hooks of an allocator")]
pub mod profile;
pub mod readiness;
pub mod resolve;
pub mod settings;
pub mod signals;
#[allow(unsafe_code)]
pub mod sockets;
pub mod threads;
