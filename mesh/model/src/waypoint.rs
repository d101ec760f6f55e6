//! What a tunnel to a waypoint asks for, and whether this waypoint is the one for it (waypoint §2.1, §9).
//!
//! Refuses everything that is not bound to this very waypoint, so that it is no open relay into the mesh and two waypoints
//! cannot pass a connection back and forth. Upstream: `snapshot`.
use crate::addr::HboneAuthority;
use crate::inbound::{AGENT_PORTS, is_instance};
use crate::known::Known;
use crate::reason::{Reason, Refusal};
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::Workload;
use std::net::SocketAddr;
use std::sync::Arc;

/// What a tunnel is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A port of a service whose waypoint this is.
    Service {
        /// The service.
        service: Arc<Service>,
        /// Its port.
        port: u16,
    },
    /// A workload, addressed by itself, whose waypoint this is.
    Workload {
        /// The workload.
        known: Arc<Known>,
        /// Its own port.
        port: u16,
    },
}
impl Target {
    /// Port the client asked for.
    pub fn port(&self) -> u16 {
        match self {
            Self::Service { port, .. } | Self::Workload { port, .. } => *port,
        }
    }
    /// The service, if one was addressed.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Service { service, .. } => Some(service),
            Self::Workload { .. } => None,
        }
    }
}

/// Decides what a CONNECT to `authority`, taken by the waypoint `me` from a client of `client_namespace`, is for.
///
/// Where a service and a workload claim one address the service is meant, as in `plan_outbound`, which sent it here.
/// Refusals: `NotBound` (404) when this waypoint is not the one of what is asked for, `NoSuchPort`, `Recursion`.
pub fn plan_tunnel(
    snap: &Snapshot,
    me: &Workload,
    client_namespace: &str,
    authority: &HboneAuthority,
) -> Result<Target, Refusal> {
    let port = authority.port();
    if port == 0 {
        return Err(Refusal::new(Reason::BadRequest, "port 0"));
    }
    match authority {
        HboneAuthority::Addr(addr) => {
            let ip = addr.ip().to_canonical();
            let network = &snap.view().network;
            if me.ips.iter().any(|own| own.to_canonical() == ip) {
                return Err(Refusal::new(Reason::Recursion, format!("{addr} is this waypoint itself")));
            }
            if let Some(service) = snap.find_service_by_vip(network, ip, client_namespace) {
                return of_service(snap, me, service, port);
            }
            match snap.find_known_by_ip(network, ip) {
                Some(known) => of_workload(snap, me, known, *addr),
                None => Err(Refusal::new(Reason::NotBound, format!("{addr} is no service or workload of the mesh"))),
            }
        }
        HboneAuthority::Name { host, port } => match snap.find_service_by_host(host, client_namespace) {
            Some(service) => of_service(snap, me, service, *port),
            None => Err(Refusal::new(Reason::NotBound, format!("no service is named {host}"))),
        },
    }
}
fn of_service(snap: &Snapshot, me: &Workload, service: &Arc<Service>, port: u16) -> Result<Target, Refusal> {
    if !service.waypoints.iter().any(|w| is_instance(snap, me, &w.waypoint)) {
        return Err(Refusal::new(Reason::NotBound, format!("service {} is not bound to this waypoint", service.key)));
    }
    if service.port(port).is_none() {
        return Err(Refusal::new(Reason::NoSuchPort, format!("{} port {port}", service.key)));
    }
    Ok(Target::Service { service: Arc::clone(service), port })
}
fn of_workload(snap: &Snapshot, me: &Workload, known: &Arc<Known>, addr: SocketAddr) -> Result<Target, Refusal> {
    let w = known.workload();
    if !w.waypoint.as_deref().is_some_and(|at| is_instance(snap, me, at)) {
        return Err(Refusal::new(Reason::NotBound, format!("workload {} is not bound to this waypoint", w.uid)));
    }
    if AGENT_PORTS.contains(&addr.port()) {
        return Err(Refusal::new(Reason::Recursion, format!("port {} of {} is its agent's own", addr.port(), w.uid)));
    }
    Ok(Target::Workload { known: Arc::clone(known), port: addr.port() })
}

#[cfg(test)]
mod tests;
