//! What the mesh knows, and every decision made from it.
//!
//! Pure: no tokio, no TLS, no clock, no I/O. A decision is a function of `(&Snapshot, facts)`; whatever needs the
//! outside world (a DNS answer, a random draw) is either handed in as a fact or handed out as data (`Dial::Name`).
//! Upstream: `mesh-sources` builds [`change::Change`]s. Downstream: the proxies carry out plans and verdicts.
#![forbid(unsafe_code)]

pub mod addr;
pub mod authz;
pub mod authz_l7;
pub mod change;
pub mod conn;
pub mod defaults;
pub mod explain;
pub mod gateway;
pub mod hosts;
pub mod id;
pub mod in_force;
pub mod inbound;
pub mod known;
pub mod l7;
pub mod labels;
pub mod lb;
pub mod making;
pub mod metric_labels;
pub mod names;
pub mod origin;
pub mod plan;
pub mod policy;
pub mod policy_index;
pub mod reason;
pub mod service;
pub mod shard;
pub mod snapshot;
pub mod source;
pub mod telemetry;
pub mod view;
pub mod wanted;
pub mod waypoint;
pub mod workload;

#[cfg(test)]
mod fixture;

pub use addr::{ClientAddr, DialAddr, HboneAuthority, Network, NetworkAddr, OrigDst};
pub use change::{Change, Origin};
pub use id::{SpiffeId, TrustDomain};
pub use reason::{Reason, Refusal, Side};
pub use snapshot::{Snapshot, Version};
