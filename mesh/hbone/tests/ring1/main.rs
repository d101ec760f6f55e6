//! The crate over in-memory and loopback transports: no TLS, no agent, no sleeps.
mod common;
mod limits;
mod pool;
mod relay;
mod windows;
