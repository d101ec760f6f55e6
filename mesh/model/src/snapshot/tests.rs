use super::*;
use crate::authz::authorize;
use crate::authz::tests::any_policy;
use crate::authz_l7::tests::{any_l7_policy, any_target};
use crate::authz_l7::{InScope, PolicyScope};
use crate::fixture::*;
use crate::l7::destination::{Balance, Subset, TrafficPolicy};
use crate::l7::gateway::{Listener, ListenerProtocol};
use crate::l7::policy::L7Policies;
use crate::l7::request_auth::{AuthBody, RequestAuth, RequestAuths};
use crate::l7::route::{HttpMatch, HttpRoute, HttpRule, PathMatch};
use crate::l7::select::select;
use crate::l7::treatment::Treatment;
use crate::labels::Labels;
use crate::plan::plan_outbound;
use crate::service::{HealthPolicy, IpFamilies, LbMode, LbScope};
use crate::workload::{Health, Locality};
use proptest::prelude::*;

#[test]
fn ip_conflicts_are_ranked() {
    let mut entry = pod("default", "e", "10.0.0.1");
    entry.uid = "c/networking.istio.io/WorkloadEntry/default/e".into();
    let mut tcp_entry = entry.clone();
    tcp_entry.uid = "c/networking.istio.io/WorkloadEntry/default/t".into();
    tcp_entry.protocol = Protocol::Tcp;
    let mut tcp_pod = pod("default", "tcp", "10.0.0.1");
    tcp_pod.protocol = Protocol::Tcp;
    let (a, b) = (pod("default", "a", "10.0.0.1"), pod("default", "b", "10.0.0.1"));
    let best_first = [a, b, tcp_pod, entry, tcp_entry];
    let mut snap = mesh(best_first.iter().rev().cloned().map(Change::from).collect());
    for w in &best_first {
        let found = snap.find_workload_by_ip(&Network::default(), ip("::ffff:10.0.0.1")).expect("found");
        assert_eq!(found.uid, w.uid);
        snap = snap.apply(&[Change::WorkloadGone(w.uid.clone())]);
    }
    assert!(snap.find_workload_by_ip(&Network::default(), ip("10.0.0.1")).is_none());
}

#[test]
fn service_choice_own_namespace_then_canonical_then_first() {
    let s = |ns: &str| {
        let mut s = Service::new("web", ns, "web.example.com");
        s.vips = vec![NetworkAddr { network: Network::default(), ip: ip("10.96.0.1") }];
        s
    };
    let mut canonical = s("c");
    canonical.canonical = true;
    let mut private = s("a");
    private.visibility = Visibility::Namespace;
    let snap = mesh(vec![s("d").into(), canonical.into(), s("b").into(), private.into()]);
    let seen = |from: &str| {
        let by_vip = snap.find_service_by_vip(&Network::default(), ip("10.96.0.1"), from).map(|s| s.key.clone());
        assert_eq!(by_vip, snap.find_service_by_host("web.example.com", from).map(|s| s.key.clone()));
        by_vip.expect("found").namespace
    };
    assert_eq!((&*seen("a"), &*seen("d"), &*seen("x")), ("a", "d", "c"));
    let without = snap.apply(&[Change::ServiceGone(ServiceKey::new("c", "web.example.com"))]);
    let first = without.find_service_by_host("web.example.com", "x").expect("found");
    assert_eq!(&*first.key.namespace, "b");
    let view = Viewpoint { preferred_namespace: "d".into(), ..view() };
    let preferring = Snapshot::empty(view).apply(&[s("d").into(), s("b").into()]);
    let told = |from: &str| preferring.find_service_by_host("web.example.com", from).map(|s| s.key.namespace.clone());
    assert_eq!((told("x"), told("b")), (Some("d".into()), Some("b".into())));
}

#[test]
fn ranges_own_namespace_then_longest_then_canonical() {
    let s = |ns: &str, net: &str| {
        let mut s = Service::new("r", ns, &format!("{}.example.com", net.replace(['/', ':'], "-")));
        s.cidr_vips = vec![(Network::default(), net.parse().expect("net"))];
        s
    };
    let mut exact = Service::new("x", "a", "exact.example.com");
    exact.vips = vec![NetworkAddr { network: Network::default(), ip: ip("10.1.1.9") }];
    let snap = mesh(vec![
        s("a", "10.0.0.0/8").into(),
        s("b", "10.1.0.0/16").into(),
        s("c", "10.1.1.0/24").into(),
        s("a", "fd00::/8").into(),
        exact.into(),
    ]);
    let seen = |addr: &str, from: &str| {
        snap.find_service_by_vip(&Network::default(), ip(addr), from).map(|s| s.key.hostname.to_string())
    };
    let name = |s: &str| Some(format!("{s}.example.com"));
    assert_eq!(seen("10.1.1.1", "x"), name("10.1.1.0-24"));
    assert_eq!(seen("10.1.2.1", "x"), name("10.1.0.0-16"));
    assert_eq!(seen("10.1.1.1", "a"), name("10.0.0.0-8"));
    assert_eq!(seen("10.1.1.9", "x"), name("exact"));
    assert_eq!(seen("fd00::1", "x"), name("fd00---8"));
    assert_eq!(seen("11.0.0.1", "x"), None);
    assert!(snap.find_service_by_vip(&"other".into(), ip("10.1.1.1"), "x").is_none());
}

#[test]
fn old_versions_stay_as_they_were() {
    let first = mesh(vec![pod("default", "a", "10.0.0.1").into()]);
    let second = first.apply(&[Change::WorkloadGone("c//Pod/default/a".into()), pod("default", "b", "10.0.0.2").into()]);
    assert!(first.find_workload("c//Pod/default/a").is_some() && first.find_workload("c//Pod/default/b").is_none());
    assert!(second.find_workload("c//Pod/default/a").is_none() && second.find_workload("c//Pod/default/b").is_some());
    assert_eq!((first.version(), second.version()), (1, 2));
}

#[test]
fn local_workloads_are_those_of_our_node() {
    let mut far = pod("default", "far", "10.0.0.2");
    far.node = "n2".into();
    let snap = mesh(vec![pod("default", "near", "10.0.0.1").into(), far.clone().into()]);
    assert_eq!(snap.local_workloads().map(|w| &*w.name).collect::<Vec<_>>(), ["near"]);
    far.node = "n1".into();
    assert_eq!(snap.apply(&[far.into()]).local_workloads().count(), 2);
}

const SERVICES: [(&str, &str); 4] = [("ns1", "a"), ("ns2", "a"), ("ns1", "b"), ("ns2", "c")];
const IPS: [&str; 6] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.9.0.1", "fd00::1", "fd00::2"];

fn any_workload() -> impl Strategy<Value = Workload> {
    let some_ips = prop::sample::subsequence(IPS.to_vec(), 0..=3);
    let flags = prop::array::uniform8(prop::bool::weighted(0.3));
    let services = prop::collection::vec((0..SERVICES.len(), 0..3_u8), 0..3);
    let policies = prop::collection::vec((0..2_u8, 0..12_u8), 0..12);
    (0..10_u8, some_ips, flags, services, policies, 1..4_u32).prop_map(|(n, ips, flags, services, policies, capacity)| {
        let [tcp, host, remote, other_node, sick, named, gateway, waypoint] = flags;
        let ns = if n % 2 == 0 { "ns1" } else { "ns2" };
        let mut w = pod(ns, &format!("w{n}"), "10.0.0.1");
        w.service_account = if n % 3 == 0 { "a" } else { "b" }.into();
        w.ips = ips.into_iter().map(ip).collect();
        if n > 7 {
            w.uid = format!("c/networking.istio.io/WorkloadEntry/{ns}/w{n}").into();
        }
        if tcp {
            w.protocol = Protocol::Tcp;
        }
        if host {
            w.network_mode = NetworkMode::HostNetwork;
        }
        if remote {
            w.network = "n2".into();
        }
        if other_node {
            w.node = "n2".into();
        }
        if sick {
            w.health = Health::Unhealthy;
        }
        w.hostname = named.then(|| "ext.example.com".into());
        w.network_gateway = gateway.then(|| Box::new(by_addr("n2", "10.0.0.3")));
        w.waypoint = waypoint.then(|| Box::new(by_service(key("ns1", "b"))));
        w.locality = Locality { region: if n < 5 { "r1" } else { "r2" }.into(), ..Locality::default() };
        w.capacity = capacity;
        for (s, ports) in services {
            let ports: &[(u16, u16)] = [&[(80, 8080)][..], &[(90, 9090)], &[]].into_iter().nth(usize::from(ports)).unwrap();
            w = backs(w, &key(SERVICES[s].0, SERVICES[s].1), ports);
        }
        w.policies =
            policies.into_iter().map(|(ns, p)| PolicyKey::new(if ns == 0 { "ns1" } else { "ns2" }, &format!("p{p}"))).collect();
        w
    })
}
fn any_service() -> impl Strategy<Value = Service> {
    let flags = prop::array::uniform6(prop::bool::weighted(0.3));
    (
        0..SERVICES.len(),
        0..4_u8,
        flags,
        0..3_u8,
        prop::sample::select(vec![LbMode::Any, LbMode::Strict, LbMode::Failover, LbMode::Passthrough]),
    )
        .prop_map(|(n, vip, flags, waypoint, mode)| {
            let [canonical, private, all, v4, sans, range] = flags;
            let (ns, name) = SERVICES[n];
            let mut s = service(ns, name, &format!("10.96.0.{vip}"), &[(80, 8080), (90, 0)]);
            s.vips.push(s.vips[0].clone());
            if n < 2 {
                s.key.hostname = "shared.example.com".into();
            }
            s.canonical = canonical;
            if private {
                s.visibility = Visibility::Namespace;
            }
            if all {
                s.lb.health = HealthPolicy::AllowAll;
            }
            if v4 {
                s.ip_families = IpFamilies::V4;
            }
            if sans {
                s.sans = vec![id("cluster.local", "ns1", "extra")];
            }
            if range {
                let bits = [8, 16, 24, 32][usize::from(vip)];
                s.cidr_vips = vec![(Network::default(), IpNet::new(ip("10.97.0.1"), bits).unwrap())];
            }
            s.lb.mode = mode;
            s.lb.scopes = vec![LbScope::Network, LbScope::Region, LbScope::Node];
            if waypoint == 1 {
                s.waypoints = vec![weighted(by_service(key("ns1", "b")), 3), weighted(by_addr("", "10.0.0.2"), 1)];
            }
            s
        })
}
/// Tables small and large (those that are indexed), indexed by their maker or not, sometimes unusable.
fn any_table() -> impl Strategy<Value = RouteTable> {
    let path = (0..12_u8, 0..3_u8).prop_map(|(n, how)| match how {
        0 => PathMatch::Exact(format!("/{n}").into()),
        1 => PathMatch::TextPrefix(format!("/{n}").into()),
        _ => PathMatch::SegmentPrefix(format!("/{n}").into()),
    });
    (prop::collection::vec(path, 0..14), prop::bool::weighted(0.1), prop::bool::ANY).prop_map(|(paths, broken, indexed)| {
        let route = Arc::new(HttpRoute::plain(&key("ns1", "a"), 80));
        let rule =
            |path| HttpRule { matches: HttpMatch { path: Some(path), ..HttpMatch::default() }.into(), route: Arc::clone(&route) };
        let broken = broken.then(|| "why".into());
        let table = RouteTable { http: paths.into_iter().map(rule).collect(), broken, ..RouteTable::default() };
        if indexed { table.indexed() } else { table }
    })
}
fn any_destination() -> impl Strategy<Value = Destination> {
    (0..SERVICES.len(), prop::collection::vec((0..3_u8, any::<bool>()), 0..3)).prop_map(|(n, subsets)| {
        let (ns, name) = SERVICES[n];
        let policy = |random: bool| {
            let balance = if random { Balance::Random } else { Balance::RoundRobin };
            Arc::new(TrafficPolicy { balance, ..TrafficPolicy::default() })
        };
        let subset = |(n, random): (u8, bool)| {
            let labels = Labels::of(vec![("v".into(), n.to_string().into())]);
            (Arc::from(format!("v{n}")), Subset { labels, policy: policy(random), ports: BTreeMap::new() })
        };
        Destination {
            key: key(ns, name),
            policy: policy(n % 2 == 0),
            ports: BTreeMap::from([(80, policy(true))]),
            subsets: subsets.into_iter().map(subset).collect(),
            origins: Vec::new(),
            broken: None,
        }
    })
}
fn any_gateway() -> impl Strategy<Value = GatewayRoutes> {
    (0..2_u8, prop::collection::vec(any_table(), 0..3)).prop_map(|(n, tables)| GatewayRoutes {
        key: GatewayKey::new("ns1", &format!("g{n}")),
        listeners: vec![Listener {
            name: "l".into(),
            port: 80,
            protocol: ListenerProtocol::Http,
            hostname: None,
            tls: None,
            clients: None,
            hosts: tables.into_iter().enumerate().map(|(i, t)| (Arc::from(format!("h{i}")), Arc::new(t))).collect(),
            broken: None,
        }],
        origin: None,
    })
}
fn request_auths(key: PolicyKey) -> RequestAuths {
    RequestAuths::new(vec![Arc::new(RequestAuth { key, body: AuthBody::Unusable { why: "x".into() }, origin: None })])
}
fn any_change() -> impl Strategy<Value = Change> {
    let service = || (0..SERVICES.len()).prop_map(|n| key(SERVICES[n].0, SERVICES[n].1));
    prop_oneof![
        3 => (service(), any_table()).prop_map(|(key, t)| Change::Routes(key, Arc::new(t))),
        1 => service().prop_map(Change::RoutesGone),
        2 => any_destination().prop_map(|d| Change::Destination(Arc::new(d))),
        1 => service().prop_map(Change::DestinationGone),
        2 => any_gateway().prop_map(|g| Change::Gateway(Arc::new(g))),
        1 => any_gateway().prop_map(|g| Change::GatewayGone(g.key)),
        6 => any_workload().prop_map(Change::from),
        2 => any_workload().prop_map(|w| Change::WorkloadGone(w.uid)),
        4 => any_service().prop_map(Change::from),
        1 => any_service().prop_map(|s| Change::ServiceGone(s.key)),
        4 => any_policy().prop_map(Change::from),
        2 => any_policy().prop_map(|p| Change::PolicyGone(p.key)),
        2 => (any_target(), prop::collection::vec(any_l7_policy(), 0..3))
            .prop_map(|(target, policies)| Change::L7Policies(target, Arc::new(L7Policies::new(policies)))),
        1 => any_target().prop_map(Change::L7PoliciesGone),
        1 => (any_target(), any_policy()).prop_map(|(target, p)| Change::RequestAuths(target, Arc::new(request_auths(p.key)))),
        1 => any_target().prop_map(Change::RequestAuthsGone),
        2 => (any_target(), 0..3_u64).prop_map(|(target, n)| {
            Change::Treatment(target, Arc::new(Treatment { max_request_bytes: Some(n), ..Treatment::default() }))
        }),
        1 => any_target().prop_map(Change::TreatmentGone),
        1 => prop::sample::select(vec!["r1", "r2"])
            .prop_map(|r| Change::OwnLocality(Locality { region: r.into(), ..Locality::default() })),
        1 => prop::sample::select(vec!["", "n1"]).prop_map(|n| Change::OwnNetwork(n.into())),
        1 => prop::option::of(Just(Arc::from("services"))).prop_map(Change::Unread),
    ]
}
/// The last word on every object, in key order.
fn final_set(changes: &[Change]) -> Vec<Change> {
    let mut last: BTreeMap<String, Option<Change>> = BTreeMap::new();
    for c in changes {
        let (key, keep) = match c {
            Change::Workload(w) => (format!("w{}", w.uid), true),
            Change::WorkloadGone(uid) => (format!("w{uid}"), false),
            Change::Service(s) => (format!("s{}", s.key), true),
            Change::ServiceGone(key) => (format!("s{key}"), false),
            Change::Policy(p) => (format!("p{}", p.key), true),
            Change::PolicyGone(key) => (format!("p{key}"), false),
            Change::Routes(key, _) => (format!("r{key}"), true),
            Change::RoutesGone(key) => (format!("r{key}"), false),
            Change::Destination(d) => (format!("d{}", d.key), true),
            Change::DestinationGone(key) => (format!("d{key}"), false),
            Change::Gateway(g) => (format!("g{}", g.key), true),
            Change::GatewayGone(key) => (format!("g{key}"), false),
            Change::L7Policies(target, _) => (format!("l7{target}"), true),
            Change::L7PoliciesGone(target) => (format!("l7{target}"), false),
            Change::RequestAuths(target, _) => (format!("ra{target}"), true),
            Change::RequestAuthsGone(target) => (format!("ra{target}"), false),
            Change::Telemetry(_) => ("telemetry".into(), true),
            Change::Treatment(target, _) => (format!("t{target}"), true),
            Change::TreatmentGone(target) => (format!("t{target}"), false),
            Change::Authorizers(_) => ("authorizers".into(), true),
            Change::Defaults(_) => ("defaults".into(), true),
            Change::OwnLocality(_) => ("locality".into(), true),
            Change::OwnNetwork(_) => ("network".into(), true),
            Change::Unread(_) => ("unread".into(), true),
        };
        last.insert(key, keep.then(|| c.clone()));
    }
    last.into_values().flatten().collect()
}
/// Every public question with its answer.
fn answers(snap: &Snapshot) -> Vec<String> {
    let mut out = Vec::new();
    let networks = [Network::default(), Network::from("n2")];
    let addrs = || {
        IPS.iter().copied().chain(["10.96.0.0", "10.96.0.1", "10.96.0.2", "10.96.0.3", "10.97.0.1", "10.97.9.9", "10.200.0.1"])
    };
    for network in &networks {
        for addr in addrs() {
            out.push(format!("{:?}", snap.find_workload_by_ip(network, ip(addr)).map(|w| &w.uid)));
            for ns in ["ns1", "ns2", "ns3"] {
                out.push(format!("{:?}", snap.find_service_by_vip(network, ip(addr), ns)));
            }
        }
    }
    for host in ["shared.example.com", "b.ns1.svc.cluster.local", "c.ns2.svc.cluster.local"] {
        for ns in ["ns1", "ns2", "ns3"] {
            out.push(format!("{:?}", snap.find_service_by_host(host, ns)));
        }
    }
    let requests: Vec<Req> = ["/", "/1", "/1/x", "/11", "/7", "/x"].into_iter().map(Req::get).collect();
    let mut route = |table: &RouteTable| {
        out.extend(requests.iter().map(|r| format!("{:?}", select(table, &r.facts()))));
    };
    for (ns, name) in SERVICES {
        snap.find_routes(&key(ns, name)).into_iter().for_each(|t| route(t));
    }
    for n in 0..2 {
        let gateway = snap.find_gateway(&GatewayKey::new("ns1", &format!("g{n}")));
        gateway.into_iter().flat_map(|g| &g.listeners).flat_map(|l| &l.hosts).for_each(|(_, t)| route(t));
    }
    for (ns, name) in SERVICES {
        let destination = snap.find_destination(&key(ns, name));
        for (subset, port) in [(None, 80), (None, 90), (Some("v0"), 80), (Some("v1"), 90), (Some("v9"), 80)] {
            out.push(format!("{:?}", destination.and_then(|d| d.policy(subset, port))));
        }
    }
    let mut sources: Vec<_> = snap.local_workloads().cloned().collect();
    sources.sort_by(|a, b| a.uid.cmp(&b.uid));
    let peer = id("cluster.local", "ns1", "a");
    for w in &sources {
        for addr in addrs() {
            for (port, draw) in [(80, 3), (80, u64::MAX / 2), (90, u64::MAX - 7)] {
                let client = std::net::SocketAddr::new(ip("10.44.0.1"), 1);
                let dst = std::net::SocketAddr::new(ip(addr), port);
                let conn = crate::conn::OutboundConn { source: w, client: client.into(), dst: dst.into(), draw };
                out.push(format!("{:?}", plan_outbound(snap, &conn)));
            }
        }
        for service in [key("ns1", "b"), key("ns2", "c")] {
            let scope =
                PolicyScope { service: Some(&service), namespace: Some(&service.namespace), gateway: None, waypoint: true };
            let facts = crate::authz_l7::tests::tcp_facts(&peer);
            out.push(format!("{:?}", InScope::of(snap, &scope).judge(snap, &facts)));
        }
        for peer in [None, Some(&peer)] {
            // Which of several matching ALLOW policies is named may depend on nothing but the set.
            out.push(format!("{:?}", authorize(snap, w, &inbound("10.0.0.1:1", "10.0.0.2:80", peer))));
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    /// Applying any sequence of changes ≡ rebuilding from the final set; and no version ever changes afterwards.
    #[test]
    fn apply_equals_rebuild(changes in prop::collection::vec(any_change(), 0..60), cut in 0..60_usize, batch in 1..9_usize) {
        let mut snap = Snapshot::empty(view());
        let mut kept = None;
        for (i, part) in changes.chunks(batch).enumerate() {
            snap = snap.apply(part);
            if i == cut / batch {
                kept = Some((snap.clone(), snap.canonical_dump()));
            }
        }
        let rebuilt = Snapshot::empty(view()).apply(&final_set(&changes));
        // Whoever made them, published tables are indexed.
        prop_assert!(snap.routes().all(|(_, t)| t.is_indexed()) && snap.gateways().all(|g| g.is_indexed()));
        prop_assert_eq!(snap.canonical_dump(), rebuilt.canonical_dump());
        prop_assert_eq!(answers(&snap), answers(&rebuilt));
        if let Some((old, dump)) = kept {
            prop_assert_eq!(old.canonical_dump(), dump);
        }
    }
}
