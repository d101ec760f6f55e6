//! What a decision needs of the mesh and does not find in it. It matters where the mesh is told on demand only.
//!
//! Owns the names of such parts, and which of them an outcome lacks. Refuses nothing: who asks, and how long is waited, is the
//! shell's. Upstream: plans. Downstream: the source that can ask.
use crate::addr::{HboneAuthority, NetworkAddr};
use crate::conn::OutboundConn;
use crate::gateway::{GatewayDestination, GatewayRef, ServiceKey};
use crate::plan::{Dial, OutboundPlan};
use crate::reason::{Reason, Refusal};
use crate::snapshot::Snapshot;
use crate::workload::{Workload, WorkloadUid};
use std::fmt;
use std::net::SocketAddr;

/// A part of the mesh that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wanted {
    /// Whatever has this address: a service with its endpoints, or a workload.
    Address(NetworkAddr),
    /// A service with its endpoints.
    Service(ServiceKey),
    /// A workload.
    Workload(WorkloadUid),
}

impl fmt::Display for Wanted {
    /// istiod's name for it: `network/ip`, `namespace/host`, the workload's id.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(at) => at.fmt(f),
            Self::Service(key) => key.fmt(f),
            Self::Workload(uid) => uid.fmt(f),
        }
    }
}

impl From<&GatewayRef> for Wanted {
    fn from(gateway: &GatewayRef) -> Self {
        match &gateway.destination {
            GatewayDestination::Service(key) => Self::Service(key.clone()),
            GatewayDestination::Address(network, ip) => {
                Self::Address(NetworkAddr { network: network.clone(), ip: ip.to_canonical() })
            }
        }
    }
}

impl Wanted {
    /// Whether it is there, for whomever.
    pub fn is_in(&self, snap: &Snapshot) -> bool {
        match self {
            Self::Address(at) => snap.has_address(at),
            Self::Service(key) => snap.find_service(key).is_some(),
            Self::Workload(uid) => snap.find_workload(uid).is_some(),
        }
    }
}

/// The first thing that the plan of an outbound connection lacks: its destination, where it would leave the mesh for want of one;
/// the waypoint or gateway it was refused for.
pub fn of_outbound(snap: &Snapshot, conn: &OutboundConn<'_>, outcome: &Result<OutboundPlan, Refusal>) -> Option<Wanted> {
    let (network, ip) = (&snap.view().network, conn.dst.ip());
    match outcome {
        Ok(OutboundPlan { dial: Dial::Passthrough(_), service: None, .. }) if !ip.is_loopback() => {
            let destination = Wanted::Address(NetworkAddr { network: network.clone(), ip });
            Some(destination).filter(|wanted| !wanted.is_in(snap))
        }
        Err(refusal) if matches!(refusal.reason, Reason::NoWaypoint | Reason::NoGateway) => {
            let service = snap.find_service_by_vip(network, ip, &conn.source.namespace);
            let waypoints = service.into_iter().flat_map(|s| s.waypoints.iter().map(|w| &w.waypoint));
            let waypoint = snap.find_workload_by_ip(network, ip).and_then(|w| w.waypoint.as_deref());
            let of_waypoints = waypoints.clone().filter_map(|w| match &w.destination {
                GatewayDestination::Service(key) => Some(key),
                GatewayDestination::Address(..) => None,
            });
            let behind = service.map(|s| &s.key).into_iter().chain(of_waypoints).flat_map(|key| gateways(snap, key));
            waypoints.chain(waypoint).chain(behind).map(Wanted::from).find(|wanted| !wanted.is_in(snap))
        }
        Ok(_) | Err(_) => None,
    }
}

/// The gateways in front of a service's endpoints on other networks.
fn gateways<'a>(snap: &'a Snapshot, key: &'a ServiceKey) -> impl Iterator<Item = &'a GatewayRef> {
    snap.endpoints(key).filter_map(|w| w.network_gateway.as_deref())
}

/// What it takes to know what an accepted CONNECT means: the service that was named, or that has the address.
pub fn of_inbound(snap: &Snapshot, workload: &Workload, local: SocketAddr, authority: &HboneAuthority) -> Option<Wanted> {
    let wanted = match authority {
        // Whose pod this is says which namespace is meant.
        HboneAuthority::Name { host, .. } => Wanted::Service(workload.services.keys().find(|key| key.hostname == *host)?.clone()),
        HboneAuthority::Addr(at) => {
            let ip = at.ip().to_canonical();
            if ip == local.ip().to_canonical() {
                return None;
            }
            Wanted::Address(NetworkAddr { network: snap.view().network.clone(), ip })
        }
    };
    Some(wanted).filter(|wanted| !wanted.is_in(snap))
}

#[cfg(test)]
mod tests;
