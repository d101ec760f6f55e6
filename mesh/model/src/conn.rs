//! The facts of a captured connection, as the shell hands them to a decision.
use crate::addr::{ClientAddr, OrigDst};
use crate::id::SpiffeId;
use crate::workload::Workload;
use std::net::SocketAddr;

/// An outbound connection of a local pod.
#[derive(Clone, Copy, Debug)]
pub struct OutboundConn<'a> {
    /// The local pod it comes from (known from the namespace it was captured in, never from its address).
    pub source: &'a Workload,
    /// Its socket address.
    pub client: ClientAddr,
    /// What the application asked for.
    pub dst: OrigDst,
    /// A uniform random draw; decisions that choose (endpoints, weights) use only this, so tests can fix it.
    pub draw: u64,
}
/// An inbound connection to a local pod, after its destination is known.
#[derive(Clone, Copy, Debug)]
pub struct InboundConn<'a> {
    /// TCP peer address; over HBONE the spoof-preserved source.
    pub client: ClientAddr,
    /// The application's real address and port (not 15008).
    pub dst: SocketAddr,
    /// Verified identity of the peer; `None` for plaintext.
    pub identity: Option<&'a SpiffeId>,
}
