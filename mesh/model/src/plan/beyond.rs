//! Other networks: by which gateways they are entered, and who may be behind them (node-agent §1.4 G). An agent draws one gateway
//! for a connection; a waypoint lists all of them, as endpoints of its own.
use super::{DRAW_GATEWAY_ENDPOINT, Dial, GatewayName, Hop, HopRole, Instance, choose_ip, instance, resolve};
use crate::addr::{DialAddr, HboneAuthority, Network};
use crate::conn::OutboundConn;
use crate::gateway::{GatewayDestination, GatewayRef};
use crate::id::SpiffeId;
use crate::lb::EndpointSet;
use crate::reason::{Reason, Refusal};
use crate::service::{IpFamilies, Service};
use crate::snapshot::Snapshot;
use crate::workload::Workload;
use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// How those endpoints of a service are reached that are on one other network, behind one gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beyond {
    /// The network.
    pub network: Network,
    /// What the endpoints say its gateway is.
    pub gateway: GatewayRef,
    /// The healthy instances of it; or why none can be used (`NoGateway`).
    pub entrances: Result<Vec<Entrance>, Refusal>,
    /// Who may end the inner tunnel.
    pub expect: Arc<[SpiffeId]>,
}
/// One instance of a network gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entrance {
    /// Where it listens for tunnels.
    pub dial: SocketAddr,
    /// Who it must prove to be.
    pub expect: Arc<[SpiffeId]>,
}

/// The ways to the endpoints of `service` on other networks that are open on `port`, one for each network and gateway. Costs nothing
/// where there are none. `own`: the family of addresses that is preferred.
pub fn ways_beyond(snap: &Snapshot, service: &Service, set: &EndpointSet, port: u16, own: IpAddr) -> Vec<Beyond> {
    let mut ways: Vec<Beyond> = Vec::new();
    for endpoint in set.open_beyond(port) {
        let w = endpoint.workload();
        let Some(gateway) = w.network_gateway.as_deref() else { continue };
        if ways.iter().any(|way| way.network == w.network && way.gateway == *gateway) {
            continue;
        }
        let expect: Arc<[SpiffeId]> = expected_beyond(service, set, &w.network).into();
        let entrances =
            if expect.is_empty() { Err(nobody_to_expect(service, &w.network)) } else { entrances(snap, gateway, own) };
        ways.push(Beyond { network: w.network.clone(), gateway: gateway.clone(), entrances, expect });
    }
    ways
}

/// The healthy instances of a network gateway, as far as they can be entered.
pub(super) fn entrances(snap: &Snapshot, gateway: &GatewayRef, own: IpAddr) -> Result<Vec<Entrance>, Refusal> {
    let none = || Refusal::new(Reason::NoGateway, format!("no healthy endpoint of {}", GatewayName(gateway)));
    let mut usable: Result<Vec<Entrance>, Refusal> = Err(none());
    for at in &instances(snap, gateway) {
        match (entrance(Reason::NoGateway, gateway, at, own), &mut usable) {
            (Ok(at), Ok(usable)) => usable.push(at),
            (Ok(at), Err(_)) => usable = Ok(vec![at]),
            (Err(why), Err(first)) => *first = why,
            (Err(_), Ok(_)) => {}
        }
    }
    usable
}

/// The instances of a waypoint or gateway among which an agent would draw.
pub(super) fn instances<'a>(snap: &'a Snapshot, gateway: &GatewayRef) -> Vec<Instance<'a>> {
    let service = match &gateway.destination {
        GatewayDestination::Service(key) => snap.find_service(key),
        GatewayDestination::Address(network, ip) => snap.find_service_by_vip(network, *ip, ""),
    };
    match (service, &gateway.destination) {
        (Some(service), _) => {
            let port = service.port(gateway.hbone_port).map(|p| p.port);
            let set = snap.endpoint_set(&service.key).into_iter();
            set.flat_map(|set| set.best(port)).map(|e| instance(service, e, gateway.hbone_port)).collect()
        }
        (None, GatewayDestination::Address(network, ip)) => {
            let known = snap.find_known_by_ip(network, *ip).into_iter();
            known.map(|known| Instance::alone(known, gateway.hbone_port)).collect()
        }
        (None, GatewayDestination::Service(_)) => Vec::new(),
    }
}

/// Whom the service's endpoints on another network may prove to be: those its `sans` name, else those that are known one by one.
/// Somebody without an address stands for endpoints that are not known, and says nothing of who they are.
pub(super) fn expected_beyond<'s>(service: &'s Service, set: &EndpointSet, network: &Network) -> Cow<'s, [SpiffeId]> {
    if !service.sans.is_empty() {
        return Cow::Borrowed(&service.sans);
    }
    let mut known = Vec::new();
    for endpoint in set.usable().filter(|e| e.workload().network == *network && !e.workload().ips.is_empty()) {
        known.extend(endpoint.known().expect().iter().filter(|id| !known.contains(*id)).cloned().collect::<Vec<_>>());
    }
    known.into()
}

/// Through the gateway in front of `upstream`'s network: an outer tunnel to the gateway and an inner one, both asking
/// for the service by name. What ends the inner one is unknown here, so it must prove one of the service's `sans`.
pub(super) fn through_gateway(
    snap: &Snapshot,
    conn: &OutboundConn<'_>,
    upstream: &Workload,
    service: &Service,
    sans: &[SpiffeId],
) -> Result<Dial, Refusal> {
    let refuse = |what: String| Refusal::new(Reason::NoGateway, what);
    let network = upstream.network.as_str();
    let gateway = upstream
        .network_gateway
        .as_ref()
        .ok_or_else(|| refuse(format!("network {network:?} of {} has no gateway", upstream.uid)))?;
    let at = resolve(snap, conn, gateway, DRAW_GATEWAY_ENDPOINT)
        .map_err(|u| refuse(format!("{} {}", u.as_str(), GatewayName(gateway))))?;
    let Entrance { dial, expect } = entrance(Reason::NoGateway, gateway, &at, conn.dst.ip())?;
    if sans.is_empty() {
        return Err(nobody_to_expect(service, &upstream.network));
    }
    let dial: DialAddr = dial.into();
    let authority = HboneAuthority::Name { host: Arc::clone(&service.key.hostname), port: conn.dst.port() };
    Ok(Dial::DoubleHbone {
        outer: Hop { dial, authority: authority.clone(), expect, role: HopRole::Gateway },
        inner: Hop { dial, authority, expect: sans.into(), role: HopRole::Endpoint },
    })
}

/// How an instance is entered; `reason`: what it is called when it cannot be.
pub(super) fn entrance(reason: Reason, gateway: &GatewayRef, at: &Instance<'_>, asked: IpAddr) -> Result<Entrance, Refusal> {
    let refuse = |what: &str| Refusal::new(reason, format!("{what} {}", GatewayName(gateway)));
    let families = at.service.map_or(IpFamilies::Automatic, |s| s.ip_families);
    let ip = choose_ip(at.known.workload(), families, asked).ok_or_else(|| refuse("no address of"))?;
    if at.expect.is_empty() {
        return Err(refuse("no identity to expect of"));
    }
    Ok(Entrance { dial: SocketAddr::new(ip, at.port), expect: Arc::clone(&at.expect) })
}

pub(super) fn nobody_to_expect(service: &Service, network: &Network) -> Refusal {
    let why = format!("no subjectAltNames to verify {} behind network {:?}", service.key, network.as_str());
    Refusal::new(Reason::NoGateway, why)
}
