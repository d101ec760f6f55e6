//! Inbound: what an accepted CONNECT asks for and where it is delivered (node-agent §1.5 "Inbound status codes").
use crate::addr::HboneAuthority;
use crate::reason::Refusal;
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::{ApplicationTunnel, Workload};
use std::net::SocketAddr;
use std::sync::Arc;

/// A CONNECT that is ours to deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundPlan {
    /// The application's address inside the pod; what `authorize` sees as destination.
    pub dst: SocketAddr,
    /// Deliver through an application tunnel instead of plainly.
    pub tunnel: Option<ApplicationTunnel>,
    /// The service the CONNECT was addressed by, when by name or VIP.
    pub service: Option<Arc<Service>>,
}
/// Decides what a CONNECT to `authority`, accepted on `local` of the pod `workload`, is delivered to.
/// Refusals: `BadRequest` (400: the authority is not this pod's), `NoSuchPort`/`NoHealthyEndpoint`/`Recursion` (503).
pub fn plan_inbound(
    _snap: &Snapshot,
    _workload: &Workload,
    _local: SocketAddr,
    _authority: &HboneAuthority,
) -> Result<InboundPlan, Refusal> {
    todo!()
}
