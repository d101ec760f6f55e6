//! The upstream side: clusters, their endpoints' health and load, connection pools, limits.
//!
//! Owns everything traffic changes about a destination. State lives as long as its cluster is in the mesh and survives
//! changes of anything else. Upstream: `exchange` and `tcp`. Downstream: `mesh-hbone` tunnels, plain TCP, TLS.

pub mod error;

pub use error::{Failure, UpstreamError};
