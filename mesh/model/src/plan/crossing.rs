//! A gateway between networks (Istio's east-west gateway): what a tunnel from another network asks for, and whose port its bytes
//! go to. It ends the outer of two tunnels; the inner one is between the client and whom it leads to, and is not opened here.
//!
//! Refuses what is not meant for other networks, so that the gateway is no way into the mesh, and what is behind yet another
//! network, so that two gateways cannot pass a connection back and forth. A service's waypoint is never gone around: where
//! upstream believes the header `x-istio-source`, only the proven identity of that waypoint says here that it was passed already
//! (in the client's network; Istio's namespaces are the same everywhere).
use super::{DRAW_ENDPOINT, DRAW_WAYPOINT_ENDPOINT, GatewayName, HBONE_PORT, HopRole, choose_ip, draw_waypoint, resolve};
use crate::addr::HboneAuthority;
use crate::conn::OutboundConn;
use crate::id::SpiffeId;
use crate::lb::redraw;
use crate::reason::{Reason, Refusal};
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::{Protocol, Workload};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// Where the bytes of a tunnel from another network go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// What was asked for.
    pub service: Arc<Service>,
    /// Its port.
    pub port: u16,
    /// Who ends the inner tunnel.
    pub to: Arc<Workload>,
    /// Where that one listens for tunnels.
    pub dial: SocketAddr,
    /// What it is: the endpoint or its waypoint.
    pub role: HopRole,
}

/// Decides what a CONNECT to `authority`, taken by the gateway `me` from `client`, leads to.
/// Refusals: `NotBound`, `NoSuchPort`, `NoHealthyEndpoint`, `NoWaypoint`.
pub fn plan_crossing(
    snap: &Snapshot,
    me: &Workload,
    client: &SpiffeId,
    authority: &HboneAuthority,
    draw: u64,
) -> Result<Crossing, Refusal> {
    let HboneAuthority::Name { host, port } = authority else {
        return Err(Refusal::new(Reason::NotBound, format!("{authority}: other networks ask for services by name")));
    };
    let service = snap
        .find_service_by_host(host, client.namespace())
        .ok_or_else(|| Refusal::new(Reason::NotBound, format!("no service is named {host}")))?;
    if !service.global {
        let why = format!("service {} is not for other networks (label istio.io/global: \"true\")", service.key);
        return Err(Refusal::new(Reason::NotBound, why));
    }
    if service.port(*port).is_none() {
        return Err(Refusal::new(Reason::NoSuchPort, format!("{} port {port}", service.key)));
    }
    let found =
        |to: &Arc<Workload>, dial, role| Crossing { service: Arc::clone(service), port: *port, to: Arc::clone(to), dial, role };
    // Nobody asked for an address: whichever the endpoint has.
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let conn = OutboundConn { source: me, client: SocketAddr::new(any, 0).into(), dst: SocketAddr::new(any, *port).into(), draw };
    let no_waypoint = |why: String| Refusal::new(Reason::NoWaypoint, format!("{}: {why}", service.key));
    if let Some(why) = &service.waypoint_error {
        return Err(no_waypoint(why.to_string()));
    }
    if !service.waypoints.is_empty() {
        let waypoint =
            draw_waypoint(service, draw).ok_or_else(|| no_waypoint("the weights of its waypoints sum to zero".into()))?;
        let at = resolve(snap, &conn, waypoint, DRAW_WAYPOINT_ENDPOINT)
            .map_err(|u| no_waypoint(format!("{} {}", u.as_str(), GatewayName(waypoint))))?;
        if !at.expect.contains(client) {
            let w = at.known.workload();
            let ip = choose_ip(w, service.ip_families, any).filter(|_| w.network == me.network);
            let ip = ip.ok_or_else(|| no_waypoint(format!("no address on this network of {}", GatewayName(waypoint))))?;
            return Ok(found(w, SocketAddr::new(ip, at.port), HopRole::Waypoint));
        }
    }
    let none = |why: &str| Refusal::new(Reason::NoHealthyEndpoint, format!("{} port {port}{why}", service.key));
    let set = snap.endpoint_set(&service.key).ok_or_else(|| none(""))?;
    let endpoint = set.pick_here(*port, redraw(draw, DRAW_ENDPOINT)).ok_or_else(|| none(" on this network"))?;
    let w = endpoint.workload();
    if w.protocol != Protocol::Hbone {
        return Err(none(&format!(": {} takes no tunnels", w.uid)));
    }
    let ip = choose_ip(w, service.ip_families, any).ok_or_else(|| none(&format!(": {} has no address", w.uid)))?;
    Ok(found(w, SocketAddr::new(ip, HBONE_PORT), HopRole::Endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Change;
    use crate::fixture::*;
    use crate::service::ServiceKey;
    use crate::workload::Health;

    const WEB: &str = "web.default.svc.cluster.local:80";

    fn web(change: impl FnOnce(&mut Service)) -> Change {
        let mut web = service("default", "web", "10.96.0.1", &[(80, 8080)]);
        web.global = true;
        change(&mut web);
        web.into()
    }
    fn endpoint(name: &str, ip: &str, change: impl FnOnce(&mut Workload)) -> Change {
        let mut w = backs(pod("default", name, ip), &key("default", "web"), &[(80, 8080)]);
        change(&mut w);
        w.into()
    }
    /// Whom a tunnel of `client` leads to, or why not.
    fn cross(objects: Vec<Change>, client: &str, authority: &str) -> Result<(SocketAddr, HopRole), Reason> {
        let me = pod("istio-system", "eastwest", "10.0.0.50");
        let snap = mesh(objects.into_iter().chain([me.clone().into()]).collect());
        let authority = HboneAuthority::parse(authority).expect("an authority");
        let plan = |draw| plan_crossing(&snap, &me, &id("cluster.local", "default", client), &authority, draw);
        let first = plan(0).map(|c| (c.dial, c.role)).map_err(|r| r.reason);
        for draw in 1..50 {
            assert_eq!(plan(draw << 40).map(|c| (c.dial, c.role)).map_err(|r| r.reason), first, "{draw}");
        }
        first
    }
    fn at(dial: &str, role: HopRole) -> (SocketAddr, HopRole) {
        (sock(dial), role)
    }

    #[test]
    fn a_service_for_other_networks_is_reached_by_name() {
        let mesh = || vec![web(|_| {}), endpoint("web-0", "10.0.0.2", |_| {})];
        assert_eq!(cross(mesh(), "client", WEB), Ok(at("10.0.0.2:15008", HopRole::Endpoint)));
        for (authority, why) in [
            ("10.96.0.1:80", Reason::NotBound),
            ("10.0.0.2:8080", Reason::NotBound),
            ("db.default.svc.cluster.local:80", Reason::NotBound),
            ("web.default.svc.cluster.local:81", Reason::NoSuchPort),
        ] {
            assert_eq!(cross(mesh(), "client", authority), Err(why), "{authority}");
        }
        let closed = vec![web(|s| s.global = false), endpoint("web-0", "10.0.0.2", |_| {})];
        assert_eq!(cross(closed, "client", WEB), Err(Reason::NotBound));
    }

    #[test]
    fn only_healthy_endpoints_of_this_network_that_take_tunnels_count() {
        let away = |w: &mut Workload| (w.network, w.network_gateway) = ("n2".into(), Some(Box::new(by_addr("n2", "1.1.1.1"))));
        let mesh = vec![
            web(|_| {}),
            endpoint("web-0", "10.0.0.2", |_| {}),
            endpoint("web-1", "10.0.0.3", away),
            endpoint("web-2", "10.0.0.4", |w| w.health = Health::Unhealthy),
        ];
        assert_eq!(cross(mesh, "client", WEB), Ok(at("10.0.0.2:15008", HopRole::Endpoint)));
        for change in [away, |w: &mut Workload| w.protocol = Protocol::Tcp, |w: &mut Workload| w.health = Health::Unhealthy] {
            let mesh = vec![web(|_| {}), endpoint("web-0", "10.0.0.2", change)];
            assert_eq!(cross(mesh, "client", WEB), Err(Reason::NoHealthyEndpoint));
        }
        assert_eq!(cross(vec![web(|_| {})], "client", WEB), Err(Reason::NoHealthyEndpoint));
    }

    #[test]
    fn its_waypoint_is_gone_around_by_nobody_but_the_waypoint() {
        let wp = || ServiceKey::new("default", "wp.default.svc.cluster.local");
        let bound = |s: &mut Service| s.waypoints = vec![weighted(by_service(wp()), 100)];
        let mesh = |wp_ip: &str, change: &dyn Fn(&mut Workload)| {
            let mut instance = backs(pod("default", "wp-0", wp_ip), &wp(), &[(15008, 15008)]);
            change(&mut instance);
            vec![
                web(bound),
                endpoint("web-0", "10.0.0.2", |_| {}),
                service("default", "wp", "10.96.0.9", &[(15008, 15008)]).into(),
                instance.into(),
            ]
        };
        assert_eq!(cross(mesh("10.0.0.9", &|_| {}), "client", WEB), Ok(at("10.0.0.9:15008", HopRole::Waypoint)));
        // The waypoint of the other network has the same name and account.
        assert_eq!(cross(mesh("10.0.0.9", &|_| {}), "wp-0", WEB), Ok(at("10.0.0.2:15008", HopRole::Endpoint)));
        assert_eq!(cross(mesh("10.0.0.9", &|w| w.network = "n2".into()), "client", WEB), Err(Reason::NoWaypoint));
        assert_eq!(cross(mesh("10.0.0.9", &|w| w.health = Health::Unhealthy), "client", WEB), Err(Reason::NoWaypoint));
        let unusable = vec![web(|s| s.waypoint_error = Some("no Gateway".into())), endpoint("web-0", "10.0.0.2", |_| {})];
        assert_eq!(cross(unusable, "client", WEB), Err(Reason::NoWaypoint));
    }
}
