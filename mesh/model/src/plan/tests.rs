use super::*;
use crate::addr::Network;
use crate::change::Change;
use crate::fixture::*;
use crate::service::{HealthPolicy, LbScope, Visibility};
use crate::snapshot::Viewpoint;
use crate::workload::{ApplicationTunnel, Health, NetworkMode};

/// Plans from the pod `client` (10.0.0.1) and gives the dial, or the reason.
fn plan(objects: Vec<Change>, dst: &str) -> Result<Dial, Reason> {
    let client = pod("default", "client", "10.0.0.1");
    let snap = mesh(objects.into_iter().chain([client.clone().into()]).collect());
    plan_outbound(&snap, &outbound(&client, dst)).map(|p| p.dial).map_err(|r| r.reason)
}
fn hop(dial: &str, authority: &str, expect: &[SpiffeId], role: HopRole) -> Hop {
    Hop { dial: sock(dial).into(), authority: HboneAuthority::parse(authority).expect("authority"), expect: expect.into(), role }
}
fn sa(name: &str) -> SpiffeId {
    id("cluster.local", "default", name)
}
fn web() -> Vec<Change> {
    vec![
        service("default", "web", "10.96.0.1", &[(80, 8080), (90, 0)]).into(),
        backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[(80, 8080)]).into(),
    ]
}
fn waypoint() -> Vec<Change> {
    vec![
        service("default", "wp", "10.96.0.9", &[(15008, 15008)]).into(),
        backs(pod("default", "wp-0", "10.0.0.9"), &key("default", "wp"), &[(15008, 15008)]).into(),
    ]
}

#[test]
fn unknown_destinations_pass_through() {
    assert_eq!(plan(web(), "1.2.3.4:443"), Ok(Dial::Passthrough(sock("1.2.3.4:443").into())));
    // IPv4-mapped addresses are the IPv4 address.
    assert_eq!(plan(web(), "[::ffff:1.2.3.4]:443"), Ok(Dial::Passthrough(sock("1.2.3.4:443").into())));
}

#[test]
fn service_address_goes_to_an_endpoint_over_hbone() {
    let expected = Dial::Hbone(hop("10.0.0.2:15008", "10.0.0.2:8080", &[sa("web-0")], HopRole::Endpoint));
    assert_eq!(plan(web(), "10.96.0.1:80"), Ok(expected.clone()));
    // The order of arrival does not matter.
    let mut reversed = web();
    reversed.reverse();
    assert_eq!(plan(reversed, "10.96.0.1:80"), Ok(expected));
}

#[test]
fn workload_address_keeps_the_port_and_plain_endpoints_are_plain() {
    let expected = Dial::Hbone(hop("10.0.0.2:15008", "10.0.0.2:80", &[sa("web-0")], HopRole::Endpoint));
    assert_eq!(plan(web(), "10.0.0.2:80"), Ok(expected));
    let mut w = pod("default", "db", "10.0.0.3");
    w.protocol = Protocol::Tcp;
    assert_eq!(plan(vec![w.into()], "10.0.0.3:5432"), Ok(Dial::Plain(sock("10.0.0.3:5432").into())));
}

#[test]
fn own_address_and_own_service_work() {
    let own = Dial::Hbone(hop("10.0.0.1:15008", "10.0.0.1:80", &[sa("client")], HopRole::Endpoint));
    assert_eq!(plan(vec![], "10.0.0.1:80"), Ok(own));
    let client = backs(pod("default", "client", "10.0.0.1"), &key("default", "me"), &[(80, 8080)]);
    let snap = mesh(vec![service("default", "me", "10.96.0.5", &[(80, 0)]).into(), client.clone().into()]);
    let plan = plan_outbound(&snap, &outbound(&client, "10.96.0.5:80")).expect("plan");
    assert_eq!(plan.dial, Dial::Hbone(hop("10.0.0.1:15008", "10.0.0.1:8080", &[sa("client")], HopRole::Endpoint)));
    assert_eq!(plan.service.map(|s| s.key.clone()), Some(key("default", "me")));
}

#[test]
fn agent_ports_on_own_addresses_are_recursion() {
    for port in AGENT_PORTS {
        for ip in ["127.0.0.1", "[::1]", "0.0.0.0", "10.0.0.1", "[::ffff:127.0.0.1]"] {
            assert_eq!(plan(web(), &format!("{ip}:{port}")), Err(Reason::Recursion), "{ip}:{port}");
        }
    }
    assert!(plan(web(), "10.0.0.2:15008").is_ok());
}

#[test]
fn ports() {
    // Not declared by the service.
    assert_eq!(plan(web(), "10.96.0.1:81"), Err(Reason::NoSuchPort));
    // Declared by name, and no endpoint has it.
    assert_eq!(plan(web(), "10.96.0.1:90"), Err(Reason::NoHealthyEndpoint));
    // The endpoint's own map wins over the service's target; an application tunnel falls back to the service port.
    let mut objects = web();
    objects.push(backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[(80, 9999)]).into());
    assert!(matches!(plan(objects, "10.96.0.1:80"), Ok(Dial::Hbone(h)) if h.authority.port() == 9999));
    let mut w = backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[]);
    w.application_tunnel = Some(ApplicationTunnel::Proxy(None));
    let objects = web().into_iter().chain([w.into()]).collect();
    assert!(matches!(plan(objects, "10.96.0.1:90"), Ok(Dial::Hbone(h)) if h.authority.port() == 90));
}

#[test]
fn a_known_service_without_endpoints_never_passes_through() {
    let s = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    assert_eq!(plan(vec![s.clone().into()], "10.96.0.1:80"), Err(Reason::NoHealthyEndpoint));
    let mut sick = backs(pod("default", "web-0", "10.0.0.2"), &s.key, &[]);
    sick.health = Health::Unhealthy;
    assert_eq!(plan(vec![s.clone().into(), sick.clone().into()], "10.96.0.1:80"), Err(Reason::NoHealthyEndpoint));
    let mut all = s;
    all.lb.health = HealthPolicy::AllowAll;
    assert!(plan(vec![all.into(), sick.into()], "10.96.0.1:80").is_ok());
}

#[test]
fn an_endpoint_without_an_identity_is_never_dialled_over_hbone() {
    let mut w = backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[]);
    w.service_account = "not a name".into();
    let objects = || vec![web().swap_remove(0), w.clone().into()];
    assert_eq!(plan(objects(), "10.96.0.1:80"), Err(Reason::NoHealthyEndpoint));
    assert_eq!(plan(objects(), "10.0.0.2:80"), Err(Reason::NoHealthyEndpoint));
}

#[test]
fn service_sans_are_accepted_beside_the_endpoints_own() {
    let mut s = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    s.sans = vec![sa("other")];
    let objects = web().into_iter().chain([s.into()]).collect();
    assert!(matches!(plan(objects, "10.96.0.1:80"), Ok(Dial::Hbone(h)) if *h.expect == [sa("web-0"), sa("other")]));
}

fn with_service_waypoint(waypoints: Vec<crate::service::WeightedWaypoint>, error: Option<&str>) -> Vec<Change> {
    let mut s = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    s.waypoints = waypoints;
    s.waypoint_error = error.map(Into::into);
    web().into_iter().chain([s.into()]).collect()
}

#[test]
fn service_waypoint_gets_the_original_address() {
    let objects = with_service_waypoint(vec![weighted(by_service(key("default", "wp")), 100)], None);
    let expected = Dial::Hbone(hop("10.0.0.9:15008", "10.96.0.1:80", &[sa("wp-0")], HopRole::Waypoint));
    assert_eq!(plan(objects.into_iter().chain(waypoint()).collect(), "10.96.0.1:80"), Ok(expected.clone()));
    // By address: of the service, of the workload.
    for addr in ["10.96.0.9", "10.0.0.9"] {
        let objects = with_service_waypoint(vec![weighted(by_addr("", addr), 100)], None);
        assert_eq!(plan(objects.into_iter().chain(waypoint()).collect(), "10.96.0.1:80"), Ok(expected.clone()));
    }
}

#[test]
fn a_declared_waypoint_is_never_bypassed() {
    let by_name = || vec![weighted(by_service(key("default", "wp")), 100)];
    // Unknown by name, unknown by address, known without endpoints, declared broken.
    assert_eq!(plan(with_service_waypoint(by_name(), None), "10.96.0.1:80"), Err(Reason::NoWaypoint));
    let by_ip = vec![weighted(by_addr("", "10.0.0.99"), 100)];
    assert_eq!(plan(with_service_waypoint(by_ip, None), "10.96.0.1:80"), Err(Reason::NoWaypoint));
    // Weights that draw none of them.
    let weightless = vec![weighted(by_service(key("default", "wp")), 0)];
    let objects = with_service_waypoint(weightless, None).into_iter().chain(waypoint()).collect();
    assert_eq!(plan(objects, "10.96.0.1:80"), Err(Reason::NoWaypoint));
    let mut objects = with_service_waypoint(by_name(), None);
    objects.push(waypoint().swap_remove(0));
    assert_eq!(plan(objects, "10.96.0.1:80"), Err(Reason::NoWaypoint));
    assert_eq!(plan(with_service_waypoint(vec![], Some("broken")), "10.96.0.1:80"), Err(Reason::NoWaypoint));
    // The same for a workload's own.
    for (gateway, error) in [(Some(by_service(key("default", "wp"))), None), (None, Some("broken".into()))] {
        let mut w = pod("default", "web-0", "10.0.0.2");
        (w.waypoint, w.waypoint_error) = (gateway.map(Box::new), error);
        assert_eq!(plan(vec![w.into()], "10.0.0.2:80"), Err(Reason::NoWaypoint));
    }
}

/// By setting only, and only where the waypoint is missing: not where it is there without an instance.
#[test]
fn a_missing_waypoint_is_gone_around_by_setting_only() {
    let client = pod("default", "client", "10.0.0.1");
    let plan = |mut objects: Vec<Change>, dst: &str| {
        objects.push(client.clone().into());
        let view = Viewpoint { missing_waypoint: MissingWaypoint::Direct, ..view() };
        plan_outbound(&Snapshot::empty(view).apply(&objects), &outbound(&client, dst))
            .map(|p| (p.dial, p.around.map(|a| a.to_string())))
            .map_err(|r| r.reason)
    };
    let told = Some("broken".to_owned());
    let to_port = |port| Dial::Hbone(hop("10.0.0.2:15008", &format!("10.0.0.2:{port}"), &[sa("web-0")], HopRole::Endpoint));
    assert_eq!(plan(with_service_waypoint(vec![], Some("broken")), "10.96.0.1:80"), Ok((to_port(8080), told.clone())));
    let mut w = pod("default", "web-0", "10.0.0.2");
    w.waypoint_error = Some("broken".into());
    assert_eq!(plan(vec![w.into()], "10.0.0.2:80"), Ok((to_port(80), told.clone())));
    // A service whose clients choose their endpoints, known and unknown ones.
    let mut s = service("default", "chosen", "10.0.0.2", &[(80, 80)]);
    (s.lb.mode, s.waypoint_error) = (LbMode::Passthrough, Some("broken".into()));
    let chosen = vec![s.clone().into(), pod("default", "web-0", "10.0.0.2").into()];
    assert_eq!(plan(chosen, "10.0.0.2:80"), Ok((to_port(80), told.clone())));
    assert_eq!(plan(vec![s.into()], "10.0.0.2:80"), Ok((Dial::Passthrough(sock("10.0.0.2:80").into()), told)));
    // Nothing is said where nothing is declared, and what is there holds.
    assert_eq!(plan(web(), "10.96.0.1:80"), Ok((to_port(8080), None)));
    let named = || vec![weighted(by_service(key("default", "wp")), 100)];
    let mut empty = with_service_waypoint(named(), None);
    empty.push(waypoint().swap_remove(0));
    assert_eq!(plan(empty, "10.96.0.1:80"), Err(Reason::NoWaypoint));
    let weightless = vec![weighted(by_service(key("default", "wp")), 0)];
    let objects = with_service_waypoint(weightless, None).into_iter().chain(waypoint()).collect();
    assert_eq!(plan(objects, "10.96.0.1:80"), Err(Reason::NoWaypoint));
}

#[test]
fn where_service_and_workload_share_an_address_the_service_waypoint_holds() {
    let mut s = service("default", "web", "10.0.0.2", &[(80, 8080)]);
    s.waypoints = vec![weighted(by_service(key("default", "wp")), 100)];
    let objects = web().into_iter().chain(waypoint()).chain([s.into()]).collect();
    assert!(matches!(plan(objects, "10.0.0.2:80"), Ok(Dial::Hbone(h)) if h.role == HopRole::Waypoint));
}

#[test]
fn workload_waypoint_is_for_workload_traffic_only() {
    let mut w = backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[]);
    w.waypoint = Some(Box::new(by_service(key("default", "wp"))));
    let objects = || web().into_iter().chain(waypoint()).chain([w.clone().into()]).collect::<Vec<_>>();
    let expected = Dial::Hbone(hop("10.0.0.9:15008", "10.0.0.2:80", &[sa("wp-0")], HopRole::Waypoint));
    assert_eq!(plan(objects(), "10.0.0.2:80"), Ok(expected));
    assert!(matches!(plan(objects(), "10.96.0.1:80"), Ok(Dial::Hbone(h)) if h.role == HopRole::Endpoint));
}

#[test]
fn the_waypoint_itself_goes_direct() {
    let wp = backs(pod("default", "wp-0", "10.0.0.9"), &key("default", "wp"), &[(15008, 15008)]);
    let mut w = backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[]);
    w.waypoint = Some(Box::new(by_service(key("default", "wp"))));
    let objects = with_service_waypoint(vec![weighted(by_service(key("default", "wp")), 100)], None);
    let snap = mesh(objects.into_iter().chain(waypoint()).chain([w.into()]).collect());
    for dst in ["10.0.0.2:80", "10.96.0.1:80"] {
        let plan = plan_outbound(&snap, &outbound(&wp, dst)).expect("plan");
        assert!(matches!(plan.dial, Dial::Hbone(h) if h.role == HopRole::Endpoint), "{dst}");
    }
    // A pod of the same service account that is no instance is not the waypoint.
    let mut fake = pod("default", "fake", "10.0.0.10");
    fake.service_account = "wp-0".into();
    let plan = plan_outbound(&snap, &outbound(&fake, "10.0.0.2:80")).expect("plan");
    assert!(matches!(plan.dial, Dial::Hbone(h) if h.role == HopRole::Waypoint));
}

#[test]
fn weighted_waypoints_share_by_weight() {
    let canary: Vec<Change> = vec![
        service("default", "wp2", "10.96.0.10", &[(15008, 15008)]).into(),
        backs(pod("default", "wp2-0", "10.0.0.10"), &key("default", "wp2"), &[]).into(),
    ];
    let both = vec![weighted(by_service(key("default", "wp")), 90), weighted(by_service(key("default", "wp2")), 10)];
    let client = pod("default", "client", "10.0.0.1");
    let objects = with_service_waypoint(both, None).into_iter().chain(waypoint()).chain(canary);
    let snap = mesh(objects.chain([client.clone().into()]).collect());
    let mut to_canary = 0;
    for i in 0..2000_u64 {
        let conn = OutboundConn { draw: redraw(i, 99), ..outbound(&client, "10.96.0.1:80") };
        let Ok(OutboundPlan { dial: Dial::Hbone(h), .. }) = plan_outbound(&snap, &conn) else { panic!("no hop") };
        to_canary += u32::from(h.dial.ip() == ip("10.0.0.10"));
    }
    assert!((140..260).contains(&to_canary), "{to_canary} of 2000 at weight 10");
}

/// The service `far` has its endpoint behind a gateway on network `n2`.
fn remote(gateway: bool, known_gateway: bool, sans: Vec<SpiffeId>) -> Vec<Change> {
    let mut s = service("default", "far", "10.96.0.7", &[(80, 8080)]);
    s.sans = sans;
    let mut w = backs(pod("default", "far-0", "10.0.0.7"), &s.key, &[]);
    w.ips.clear();
    w.network = "n2".into();
    w.network_gateway = gateway.then(|| Box::new(by_addr("n2", "172.16.0.1")));
    let mut gw = pod("istio-system", "gw", "172.16.0.1");
    gw.network = "n2".into();
    let mut objects: Vec<Change> = vec![s.into(), w.into()];
    if known_gateway {
        objects.push(gw.into());
    }
    objects
}

#[test]
fn other_networks_are_reached_through_their_gateway() {
    let name = "far.default.svc.cluster.local:80";
    let gw = id("cluster.local", "istio-system", "gw");
    let expected = Dial::DoubleHbone {
        outer: hop("172.16.0.1:15008", name, &[gw], HopRole::Gateway),
        inner: hop("172.16.0.1:15008", name, &[sa("far-0")], HopRole::Endpoint),
    };
    assert_eq!(plan(remote(true, true, vec![sa("far-0")]), "10.96.0.7:80"), Ok(expected));
    assert_eq!(plan(remote(true, false, vec![sa("far-0")]), "10.96.0.7:80"), Err(Reason::NoGateway));
    assert_eq!(plan(remote(false, true, vec![sa("far-0")]), "10.96.0.7:80"), Err(Reason::NoGateway));
    // Nothing to verify the far end by: refused, not accepted on trust.
    assert_eq!(plan(remote(true, true, vec![]), "10.96.0.7:80"), Err(Reason::NoGateway));
}

#[test]
fn endpoints_beyond_a_gateway_that_are_known_are_whom_to_expect() {
    let mut objects = remote(true, true, vec![]);
    for (name, network, address) in [("far-1", "n2", "10.9.0.1"), ("far-2", "n2", "10.9.0.2"), ("far-3", "n3", "10.9.0.3")] {
        let mut w = backs(pod("default", name, address), &key("default", "far"), &[]);
        w.network = network.into();
        w.network_gateway = (network == "n2").then(|| Box::new(by_addr("n2", "172.16.0.1")));
        objects.push(w.into());
    }
    let Ok(Dial::DoubleHbone { inner, .. }) = plan(objects, "10.96.0.7:80") else { panic!("no gateway") };
    // Not who stands for others without an address, and nobody of another network.
    assert_eq!(*inner.expect, [sa("far-1"), sa("far-2")]);
}

#[test]
fn an_endpoint_without_gateway_is_not_chosen_while_there_is_another() {
    let mut objects = remote(false, false, vec![sa("far-0")]);
    objects.push(backs(pod("default", "near-0", "10.0.0.8"), &key("default", "far"), &[]).into());
    assert!(matches!(plan(objects, "10.96.0.7:80"), Ok(Dial::Hbone(h)) if h.dial.ip() == ip("10.0.0.8")));
}

#[test]
fn pass_through_services_keep_the_original_destination() {
    let mut s = Service::new("ext", "default", "*.example.com");
    s.cidr_vips = vec![(Network::default(), "1.2.0.0/16".parse().expect("net"))];
    s.lb.mode = LbMode::Passthrough;
    assert_eq!(plan(vec![s.clone().into()], "1.2.3.4:5"), Ok(Dial::Passthrough(sock("1.2.3.4:5").into())));
    let inside = pod("default", "in", "1.2.3.5");
    let expected = Dial::Hbone(hop("1.2.3.5:15008", "1.2.3.5:5", &[sa("in")], HopRole::Endpoint));
    assert_eq!(plan(vec![s.into(), inside.into()], "1.2.3.5:5"), Ok(expected));
}

#[test]
fn endpoints_by_name_are_resolved_by_the_shell() {
    let mut w = backs(pod("default", "ext", "10.0.0.3"), &key("default", "web"), &[]);
    w.ips.clear();
    w.hostname = Some("db.example.com".into());
    w.protocol = Protocol::Tcp;
    let objects = |w: &Workload| vec![web().swap_remove(0), w.clone().into()];
    let named = |then| Dial::Name { host: "db.example.com".into(), port: 8080, then };
    assert_eq!(plan(objects(&w), "10.96.0.1:80"), Ok(named(NamedDial::Plain)));
    w.protocol = Protocol::Hbone;
    let hbone = NamedDial::Hbone { hbone_port: HBONE_PORT, authority: None, expect: [sa("ext")].into(), role: HopRole::Endpoint };
    assert_eq!(plan(objects(&w), "10.96.0.1:80"), Ok(named(hbone)));
}

#[test]
fn families() {
    let mut dual = backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[]);
    dual.ips.push(ip("fd00::2"));
    let mut s = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    s.vips.push(crate::addr::NetworkAddr { network: Network::default(), ip: ip("fd00:96::1") });
    let dials = |s: &Service, dst: &str| match plan(vec![s.clone().into(), dual.clone().into()], dst) {
        Ok(Dial::Hbone(h)) => h.dial.ip(),
        other => panic!("{other:?}"),
    };
    assert_eq!(dials(&s, "10.96.0.1:80"), ip("10.0.0.2"));
    assert_eq!(dials(&s, "[fd00:96::1]:80"), ip("fd00::2"));
    s.ip_families = IpFamilies::V6;
    assert_eq!(dials(&s, "10.96.0.1:80"), ip("fd00::2"));
    let only_v4 = backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[]);
    assert_eq!(plan(vec![s.into(), only_v4.into()], "10.96.0.1:80"), Err(Reason::NoHealthyEndpoint));
}

#[test]
fn host_network_workloads_are_not_found_by_address() {
    let mut w = pod("default", "host", "10.0.0.4");
    w.network_mode = NetworkMode::HostNetwork;
    assert_eq!(plan(vec![w.into()], "10.0.0.4:80"), Ok(Dial::Passthrough(sock("10.0.0.4:80").into())));
}

#[test]
fn private_services_are_not_seen_from_other_namespaces() {
    let mut s = service("other", "web", "10.96.0.1", &[(80, 8080)]);
    s.visibility = Visibility::Namespace;
    assert_eq!(plan(vec![s.into()], "10.96.0.1:80"), Ok(Dial::Passthrough(sock("10.96.0.1:80").into())));
}

#[test]
fn strict_node_locality() {
    let mut s = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    (s.lb.scopes, s.lb.mode) = (vec![LbScope::Node], LbMode::Strict);
    let mut far = backs(pod("default", "far", "10.0.0.3"), &s.key, &[]);
    far.node = "n2".into();
    let near = backs(pod("default", "near", "10.0.0.4"), &s.key, &[]);
    assert_eq!(plan(vec![s.clone().into(), far.clone().into()], "10.96.0.1:80"), Err(Reason::NoHealthyEndpoint));
    let both = vec![s.into(), far.into(), near.into()];
    assert!(matches!(plan(both, "10.96.0.1:80"), Ok(Dial::Hbone(h)) if h.dial.ip() == ip("10.0.0.4")));
}

#[test]
fn no_hop_expects_nobody() {
    let mut w = pod("default", "wp-0", "10.0.0.9");
    w.service_account = "".into();
    let w = backs(w, &key("default", "wp"), &[]);
    let objects = with_service_waypoint(vec![weighted(by_addr("", "10.0.0.9"), 1)], None);
    assert_eq!(plan(objects.into_iter().chain([w.into()]).collect(), "10.96.0.1:80"), Err(Reason::NoWaypoint));
}

#[test]
fn what_nobody_knows_is_refused_while_something_may_not_be_read() {
    let unread = |why: Option<&str>| Change::Unread(why.map(Into::into));
    let web = || pod("default", "web", "10.0.0.2").into();
    assert_eq!(plan(vec![unread(Some("services may not be read"))], "192.0.2.1:80"), Err(Reason::UnknownWorkload));
    assert!(plan(vec![unread(Some("services may not be read")), web()], "10.0.0.2:80").is_ok());
    let passed = plan(vec![unread(Some("services may not be read")), unread(None)], "192.0.2.1:80");
    assert_eq!(passed, Ok(Dial::Passthrough(sock("192.0.2.1:80").into())));
}
