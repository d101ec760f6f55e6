//! Outbound: what to do with a captured connection (node-agent §1.4). Pure; the shell dials what comes out.
use crate::addr::{DialAddr, HboneAuthority};
use crate::conn::OutboundConn;
use crate::id::SpiffeId;
use crate::reason::Refusal;
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::Workload;
use std::sync::Arc;

/// What to do with an outbound connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboundPlan {
    /// How to reach it.
    pub dial: Dial,
    /// The chosen workload, for labels and logs.
    pub workload: Option<Arc<Workload>>,
    /// The service it was addressed by, for labels and logs.
    pub service: Option<Arc<Service>>,
}
/// Effects as data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dial {
    /// Outside the mesh: the original destination, untouched.
    Passthrough(DialAddr),
    /// A known endpoint without HBONE.
    Plain(DialAddr),
    /// One tunnel.
    Hbone(Hop),
    /// A tunnel through a network gateway, and a second one inside it.
    DoubleHbone {
        /// To the gateway; pooled.
        outer: Hop,
        /// Inside it; one per connection. `dial` of the inner hop is meaningless and equals the outer one.
        inner: Hop,
    },
    /// An address must be resolved first; dial `then` with the answer put in.
    Name {
        /// Host name to resolve.
        host: Arc<str>,
        /// Port of the endpoint itself.
        port: u16,
        /// Protocol to use with the resolved address.
        then: NamedDial,
    },
}
/// What follows the resolution of a [`Dial::Name`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedDial {
    /// Plain TCP to `ip:port`.
    Plain,
    /// HBONE to `ip:hbone_port` with authority `ip:port` (endpoint) or the given authority (gateways and waypoints).
    Hbone {
        /// HBONE port.
        hbone_port: u16,
        /// Authority; `None` means the resolved `ip:port`.
        authority: Option<HboneAuthority>,
        /// Accepted identities.
        expect: Arc<[SpiffeId]>,
        /// Role of the hop.
        role: HopRole,
    },
}
/// One HBONE hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Where to connect.
    pub dial: DialAddr,
    /// `:authority` of the CONNECT.
    pub authority: HboneAuthority,
    /// The peer must prove one of these; never empty.
    pub expect: Arc<[SpiffeId]>,
    /// What the peer is.
    pub role: HopRole,
}
/// What the far end of a hop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HopRole {
    /// The destination's own agent.
    Endpoint,
    /// A waypoint.
    Waypoint,
    /// A network gateway.
    Gateway,
}

/// Decides an outbound connection by one version of the mesh.
pub fn plan_outbound(_snap: &Snapshot, _conn: &OutboundConn<'_>) -> Result<OutboundPlan, Refusal> {
    todo!()
}
