//! Outbound: what to do with a captured connection (node-agent §1.4). Pure; the shell dials what comes out.
mod beyond;
mod crossing;
mod front;

use crate::addr::{DialAddr, HboneAuthority};
use crate::conn::OutboundConn;
use crate::id::SpiffeId;
use crate::inbound::{AGENT_PORTS, is_instance};
use crate::known::Known;
use crate::lb::{Endpoint, below, family_allowed, redraw};
use crate::reason::{Reason, Refusal};
use crate::service::{IpFamilies, LbMode, Service};
use crate::snapshot::{MissingWaypoint, Snapshot};
use crate::workload::{GatewayDestination, GatewayRef, Protocol, Workload};
use beyond::{expected_beyond, through_gateway};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub use beyond::{Beyond, Entrance, ways_beyond};
pub use crossing::{Crossing, plan_crossing};
pub use front::{Front, Instance as FrontInstance, way_by_waypoint};

/// What to do with an outbound connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboundPlan {
    /// How to reach it.
    pub dial: Dial,
    /// The chosen workload, for labels and logs.
    pub workload: Option<Arc<Workload>>,
    /// The service it was addressed by, for labels and logs.
    pub service: Option<Arc<Service>>,
    /// Why the declared waypoint cannot be used, when this goes around it ([`MissingWaypoint::Direct`]).
    pub around: Option<Arc<str>>,
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

/// Port every HBONE endpoint listens on.
pub const HBONE_PORT: u16 = 15008;

/// Decisions of one connection that draw independently.
const DRAW_ENDPOINT: u64 = 1;
const DRAW_WAYPOINT: u64 = 2;
const DRAW_WAYPOINT_ENDPOINT: u64 = 3;
const DRAW_GATEWAY_ENDPOINT: u64 = 4;

/// Decides an outbound connection by one version of the mesh.
///
/// Where a service and a workload claim one address the service is meant, for its waypoint too: upstream looks for the
/// waypoint workload-first and for the endpoint service-first, which lets such an address go around both waypoints.
pub fn plan_outbound(snap: &Snapshot, conn: &OutboundConn<'_>) -> Result<OutboundPlan, Refusal> {
    let (ip, port) = (conn.dst.ip(), conn.dst.port());
    // Also by the pod's own addresses: the agent's sockets inside the pod are exempt from capture, so such a connection
    // would be accepted and planned again without end.
    let own = ip.is_loopback() || ip.is_unspecified() || ip == conn.client.ip() || conn.source.ips.contains(&ip);
    if own && AGENT_PORTS.contains(&port) {
        return Err(Refusal::new(Reason::Recursion, conn.dst.to_string()));
    }
    let network = &snap.view().network;
    if let Some(service) = snap.find_service_by_vip(network, ip, &conn.source.namespace) {
        return plan_service(snap, conn, service);
    }
    if let Some(known) = snap.find_known_by_ip(network, ip) {
        return plan_workload(snap, conn, known, None);
    }
    // What may be read of the mesh does not have it, and the rest may: its waypoint must not be gone around.
    if let Some(why) = snap.unread() {
        return Err(Refusal::new(Reason::UnknownWorkload, format!("{}: {why}", conn.dst)));
    }
    Ok(passthrough(conn, None))
}

fn passthrough(conn: &OutboundConn<'_>, service: Option<&Arc<Service>>) -> OutboundPlan {
    OutboundPlan { dial: Dial::Passthrough(conn.dst.0.into()), workload: None, service: service.cloned(), around: None }
}

/// A declared waypoint that cannot be used closes its destination, unless this process was told to go around it.
fn around(snap: &Snapshot, error: Option<&Arc<str>>, destination: &dyn fmt::Display) -> Result<Option<Arc<str>>, Refusal> {
    match (error, snap.view().missing_waypoint) {
        (Some(why), MissingWaypoint::Refuse) => Err(Refusal::new(Reason::NoWaypoint, format!("{destination}: {why}"))),
        (why, _) => Ok(why.cloned()),
    }
}

/// A connection to a virtual address.
fn plan_service(snap: &Snapshot, conn: &OutboundConn<'_>, service: &Arc<Service>) -> Result<OutboundPlan, Refusal> {
    let port = conn.dst.port();
    let around = around(snap, service.waypoint_error.as_ref(), &service.key)?;
    let waypoint = draw_waypoint(service, conn.draw);
    if waypoint.is_none() && !service.waypoints.is_empty() {
        // Declared, and drawn never: a mistake in the weights must not lead around the waypoint.
        return Err(Refusal::new(Reason::NoWaypoint, format!("{}: the weights of its waypoints sum to zero", service.key)));
    }
    if let Some(waypoint) = waypoint
        && !service.waypoints.iter().any(|w| is_instance(snap, conn.source, &w.waypoint))
    {
        return through_waypoint(snap, conn, waypoint, Some(service));
    }
    if service.lb.mode == LbMode::Passthrough {
        // The application chose the endpoint itself; if we know it, it is reached as the workload it is.
        return match snap.find_known_by_ip(&snap.view().network, conn.dst.ip()) {
            Some(known) => {
                let plan = plan_workload(snap, conn, known, Some(service))?;
                Ok(OutboundPlan { around: around.or(plan.around), ..plan })
            }
            None => Ok(OutboundPlan { around, ..passthrough(conn, Some(service)) }),
        };
    }
    if service.port(port).is_none() {
        return Err(Refusal::new(Reason::NoSuchPort, format!("{} port {port}", service.key)));
    }
    let none = || Refusal::new(Reason::NoHealthyEndpoint, format!("{} port {port}", service.key));
    let set = snap.endpoint_set(&service.key).ok_or_else(none)?;
    let endpoint = set.pick(Some(port), redraw(conn.draw, DRAW_ENDPOINT)).ok_or_else(none)?;
    let w = endpoint.workload();
    let dial = if w.network == conn.source.network {
        let target = endpoint.target_port(service, port).ok_or_else(none)?;
        direct(w, &endpoint.expect(service), conn, service.ip_families, target).ok_or_else(none)?
    } else {
        through_gateway(snap, conn, w, service, &expected_beyond(service, set, &w.network))?
    };
    Ok(OutboundPlan { dial, workload: Some(Arc::clone(w)), service: Some(Arc::clone(service)), around })
}

/// A connection to a workload's own address; `service` labels it when the address was also a pass-through service's.
fn plan_workload(
    snap: &Snapshot,
    conn: &OutboundConn<'_>,
    known: &Arc<Known>,
    service: Option<&Arc<Service>>,
) -> Result<OutboundPlan, Refusal> {
    let w = known.workload();
    if w.network != conn.source.network {
        let detail = format!("{} is on network {:?} and was not addressed by a service", w.uid, w.network.as_str());
        return Err(Refusal::new(Reason::NoGateway, detail));
    }
    let around = around(snap, w.waypoint_error.as_ref(), &w.uid)?;
    if let Some(waypoint) = &w.waypoint
        && !is_instance(snap, conn.source, waypoint)
    {
        return through_waypoint(snap, conn, waypoint, None);
    }
    let dial = direct(w, known.expect(), conn, IpFamilies::Automatic, conn.dst.port())
        .ok_or_else(|| Refusal::new(Reason::NoHealthyEndpoint, format!("{} has no identity to expect", w.uid)))?;
    Ok(OutboundPlan { dial, workload: Some(Arc::clone(w)), service: service.cloned(), around })
}

/// The waypoint of this connection, by weight; `None` when the service has none that takes connections.
fn draw_waypoint(service: &Service, draw: u64) -> Option<&GatewayRef> {
    let total = service.waypoints.iter().map(|w| u64::from(w.weight)).sum();
    let mut at = below(redraw(draw, DRAW_WAYPOINT), total);
    service.waypoints.iter().find_map(|w| {
        let weight = u64::from(w.weight);
        if at < weight {
            return Some(&w.waypoint);
        }
        at -= weight;
        None
    })
}

/// To a waypoint, which is told the original destination. `service` is the one addressed, if one was.
fn through_waypoint(
    snap: &Snapshot,
    conn: &OutboundConn<'_>,
    waypoint: &GatewayRef,
    service: Option<&Arc<Service>>,
) -> Result<OutboundPlan, Refusal> {
    let refuse = |what: &str| Refusal::new(Reason::NoWaypoint, format!("{what} {}", GatewayName(waypoint)));
    let at = resolve(snap, conn, waypoint, DRAW_WAYPOINT_ENDPOINT).map_err(|u| refuse(u.as_str()))?;
    let w = at.known.workload();
    let plan = |dial| OutboundPlan { dial, workload: Some(Arc::clone(w)), service: service.cloned(), around: None };
    if w.network != conn.source.network {
        let Some(service) = service else {
            return Err(Refusal::new(Reason::NoGateway, format!("waypoint {} is on another network", w.uid)));
        };
        let sans = at.service.map_or(&[][..], |s| &s.sans);
        return Ok(plan(through_gateway(snap, conn, w, service, sans)?));
    }
    if at.expect.is_empty() {
        return Err(refuse("no identity to expect of waypoint"));
    }
    let authority = HboneAuthority::Addr(SocketAddr::new(conn.dst.ip(), conn.dst.port()));
    let families = at.service.map_or(IpFamilies::Automatic, |s| s.ip_families);
    let dial = match choose_ip(w, families, conn.dst.ip()) {
        Some(ip) => {
            Dial::Hbone(Hop { dial: SocketAddr::new(ip, at.port).into(), authority, expect: at.expect, role: HopRole::Waypoint })
        }
        None => Dial::Name {
            host: w.hostname.clone().ok_or_else(|| refuse("no address of waypoint"))?,
            port: conn.dst.port(),
            then: NamedDial::Hbone {
                hbone_port: at.port,
                authority: Some(authority),
                expect: at.expect,
                role: HopRole::Waypoint,
            },
        },
    };
    Ok(plan(dial))
}

/// One instance of a waypoint or gateway.
struct Instance<'a> {
    known: &'a Arc<Known>,
    service: Option<&'a Arc<Service>>,
    /// Port of its HBONE listener.
    port: u16,
    expect: Arc<[SpiffeId]>,
}
impl<'a> Instance<'a> {
    /// A workload that is the gateway by itself.
    fn alone(known: &'a Arc<Known>, port: u16) -> Self {
        Self { known, service: None, port, expect: Arc::clone(known.expect()) }
    }
}
/// Why a reference has no instance.
enum Unresolved {
    Unknown,
    NoEndpoint,
}
impl Unresolved {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::NoEndpoint => "no healthy endpoint of",
        }
    }
}
struct GatewayName<'a>(&'a GatewayRef);
impl fmt::Display for GatewayName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.destination {
            GatewayDestination::Service(key) => write!(f, "{key}:{}", self.0.hbone_port),
            GatewayDestination::Address(n, ip) => write!(f, "{}/{ip}:{}", n.as_str(), self.0.hbone_port),
        }
    }
}
/// An instance of a waypoint or gateway: by service, or by address (a service's first, then a workload's).
fn resolve<'a>(
    snap: &'a Snapshot,
    conn: &OutboundConn<'_>,
    gateway: &GatewayRef,
    decision: u64,
) -> Result<Instance<'a>, Unresolved> {
    let service = match &gateway.destination {
        GatewayDestination::Service(key) => Some(snap.find_service(key).ok_or(Unresolved::Unknown)?),
        GatewayDestination::Address(network, ip) => snap.find_service_by_vip(network, *ip, &conn.source.namespace),
    };
    if let Some(service) = service {
        let set = snap.endpoint_set(&service.key).ok_or(Unresolved::NoEndpoint)?;
        // A waypoint service that does not list its HBONE port is still reached there.
        let port = service.port(gateway.hbone_port).map(|p| p.port);
        let endpoint = set.pick(port, redraw(conn.draw, decision)).ok_or(Unresolved::NoEndpoint)?;
        return Ok(instance(service, endpoint, gateway.hbone_port));
    }
    let GatewayDestination::Address(network, ip) = &gateway.destination else { return Err(Unresolved::Unknown) };
    let known = snap.find_known_by_ip(network, *ip).ok_or(Unresolved::Unknown)?;
    Ok(Instance::alone(known, gateway.hbone_port))
}
/// An endpoint of a gateway's service.
fn instance<'a>(service: &'a Arc<Service>, endpoint: &'a Endpoint, hbone_port: u16) -> Instance<'a> {
    let port = endpoint.target_port(service, hbone_port).unwrap_or(hbone_port);
    Instance { known: endpoint.known(), service: Some(service), port, expect: endpoint.expect(service) }
}

/// Straight to an endpoint. `None` when it has neither an address nor a name, or HBONE without an identity to expect.
fn direct(w: &Workload, expect: &Arc<[SpiffeId]>, conn: &OutboundConn<'_>, families: IpFamilies, port: u16) -> Option<Dial> {
    if w.protocol == Protocol::Hbone && expect.is_empty() {
        return None;
    }
    let expect = Arc::clone(expect);
    match (choose_ip(w, families, conn.dst.ip()), w.protocol) {
        (Some(ip), Protocol::Tcp) => Some(Dial::Plain(SocketAddr::new(ip, port).into())),
        (Some(ip), Protocol::Hbone) => Some(Dial::Hbone(Hop {
            dial: SocketAddr::new(ip, HBONE_PORT).into(),
            authority: HboneAuthority::Addr(SocketAddr::new(ip, port)),
            expect,
            role: HopRole::Endpoint,
        })),
        (None, protocol) => {
            let then = match protocol {
                Protocol::Tcp => NamedDial::Plain,
                Protocol::Hbone => NamedDial::Hbone { hbone_port: HBONE_PORT, authority: None, expect, role: HopRole::Endpoint },
            };
            Some(Dial::Name { host: w.hostname.clone()?, port, then })
        }
    }
}
/// The address asked for if it is the workload's own; else one of the family asked for; else any the service allows.
fn choose_ip(w: &Workload, families: IpFamilies, asked: IpAddr) -> Option<IpAddr> {
    let own = || w.ips.iter().map(IpAddr::to_canonical);
    let allowed = || own().filter(|ip| family_allowed(families, *ip));
    own().find(|ip| *ip == asked).or_else(|| allowed().find(|ip| ip.is_ipv4() == asked.is_ipv4())).or_else(|| allowed().next())
}

#[cfg(test)]
mod tests;
