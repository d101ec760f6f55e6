//! Inbound: what an accepted CONNECT asks for and where it is delivered (node-agent §1.5 "Inbound status codes").
//!
//! Refuses a CONNECT for somebody else, so that a peer cannot use a pod's agent as an open relay. Upstream: `snapshot`.
use crate::addr::HboneAuthority;
use crate::lb;
use crate::reason::{Reason, Refusal};
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::{ApplicationTunnel, GatewayDestination, GatewayRef, Workload};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Ports of the agent itself inside a pod: outbound capture, plaintext inbound, HBONE. Never a destination.
pub const AGENT_PORTS: [u16; 3] = [15001, 15006, 15008];

/// A CONNECT that is ours to deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundPlan {
    /// The application's address inside the pod (with the application tunnel's port, if it has one); what `authorize`
    /// sees as destination.
    pub dst: SocketAddr,
    /// The address that was asked for, for an application tunnel to be told; of a service asked for by name the service's own, IPv4
    /// first, or the pod's where it has none.
    pub asked: SocketAddr,
    /// Deliver through an application tunnel instead of plainly.
    pub tunnel: Option<ApplicationTunnel>,
    /// The service the CONNECT was addressed by, when by name or VIP.
    pub service: Option<Arc<Service>>,
}
/// Decides what a CONNECT to `authority`, accepted on `local` of the pod `workload`, is delivered to.
/// Refusals: `BadRequest` (400: the authority is not this pod's), `NoSuchPort`/`NoHealthyEndpoint`/`Recursion` (503).
pub fn plan_inbound(
    snap: &Snapshot,
    workload: &Workload,
    local: SocketAddr,
    authority: &HboneAuthority,
) -> Result<InboundPlan, Refusal> {
    let pod_ip = local.ip().to_canonical();
    let (port, asked, service) = match authority {
        HboneAuthority::Addr(a) => {
            let ip = a.ip().to_canonical();
            let mut service = None;
            if ip != pod_ip {
                service = snap.find_service_by_vip(&snap.view().network, ip, &workload.namespace);
                if workload.application_tunnel.is_none() && !is_waypoint_of(snap, workload, service, *a) {
                    return Err(Refusal::new(Reason::BadRequest, format!("ip mismatch: {ip} != {pod_ip}")));
                }
            }
            (a.port(), *a, service)
        }
        HboneAuthority::Name { host, port } => {
            let service = snap
                .find_service_by_host(host, &workload.namespace)
                .ok_or_else(|| Refusal::new(Reason::NoHealthyEndpoint, format!("no service is named {host}")))?;
            let ports = workload.services.get(&service.key).map_or(&[][..], |p| p);
            let target = lb::target_port(workload, ports, service, *port)
                .ok_or_else(|| Refusal::new(Reason::NoSuchPort, format!("{} has no port {port}", service.key)))?;
            let vips = || service.vips.iter().filter(|vip| vip.network == snap.view().network).map(|vip| vip.ip);
            let vip = vips().find(IpAddr::is_ipv4).or_else(|| vips().next());
            (target, SocketAddr::new(vip.unwrap_or(pod_ip), if vip.is_some() { *port } else { target }), Some(service))
        }
    };
    let port = match workload.application_tunnel {
        Some(ApplicationTunnel::Proxy(Some(tunnel_port))) => tunnel_port,
        Some(ApplicationTunnel::Proxy(None)) | None => port,
    };
    if AGENT_PORTS.contains(&port) {
        return Err(Refusal::new(Reason::Recursion, format!("port {port} of {pod_ip} is the agent's own")));
    }
    if port == 0 {
        return Err(Refusal::new(Reason::BadRequest, "port 0"));
    }
    let (dst, tunnel) = (SocketAddr::new(pod_ip, port), workload.application_tunnel);
    Ok(InboundPlan { dst, asked, tunnel, service: service.cloned() })
}

/// Whether `workload` is a waypoint of what `authority` addresses: a service (its VIP) or a workload (its IP).
fn is_waypoint_of(snap: &Snapshot, workload: &Workload, service: Option<&Arc<Service>>, authority: SocketAddr) -> bool {
    if let Some(s) = service
        && s.waypoints.iter().any(|w| is_instance(snap, workload, &w.waypoint))
    {
        return true;
    }
    let ip = authority.ip().to_canonical();
    snap.find_workload_by_ip(&snap.view().network, ip)
        .and_then(|w| w.waypoint.as_deref())
        .is_some_and(|w| is_instance(snap, workload, w))
}
/// Whether `workload` is one of the instances a waypoint or gateway reference means: an endpoint of the named service,
/// or (by address) the workload or an endpoint of the service behind that address.
pub fn is_instance(snap: &Snapshot, workload: &Workload, gateway: &GatewayRef) -> bool {
    let backs = |key| snap.endpoint_set(key).is_some_and(|set| set.contains(&workload.uid));
    match &gateway.destination {
        GatewayDestination::Service(key) => backs(key),
        GatewayDestination::Address(network, ip) => {
            let by_vip = snap.find_service_by_vip(network, *ip, &workload.namespace);
            let by_ip = snap.find_workload_by_ip(network, *ip);
            by_vip.is_some_and(|s| backs(&s.key)) || by_ip.is_some_and(|w| w.uid == workload.uid)
        }
    }
}

#[cfg(test)]
mod tests;
