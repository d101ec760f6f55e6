use super::*;
use bytes::Bytes;
use mesh_proto::istio::workload::{GatewayAddress, NamespacedHostname, NetworkAddress, WeightedWaypoint};
use std::net::IpAddr;

fn bytes(ip: &str) -> Bytes {
    match ip.parse::<IpAddr>().unwrap() {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}
fn least_workload() -> wire::Workload {
    wire::Workload { uid: "c//Pod/ns/a".into(), name: "a".into(), namespace: "ns".into(), ..wire::Workload::default() }
}
fn least_service() -> wire::Service {
    wire::Service { namespace: "ns".into(), hostname: "Web.ns.svc".into(), name: "web".into(), ..wire::Service::default() }
}
fn by_host(host: &str) -> GatewayAddress {
    let hostname = NamespacedHostname { namespace: "ns".into(), hostname: host.into() };
    GatewayAddress { destination: Some(gateway_address::Destination::Hostname(hostname)), hbone_mtls_port: 0 }
}
fn to_workload(m: wire::Workload) -> Result<Workload, Bad> {
    workload(&m, &mut Interner::default())
}
fn to_service(m: wire::Service) -> Result<Service, Bad> {
    service(&m, &mut Interner::default())
}

#[test]
fn what_a_workload_leaves_out_has_istios_defaults() {
    let w = to_workload(least_workload()).unwrap();
    assert_eq!((&*w.service_account, w.trust_domain.as_str(), &*w.canonical_revision), ("default", "cluster.local", "latest"));
    assert_eq!((&*w.workload_name, &*w.canonical_name, w.capacity), ("a", "a", 1));
    // `deployment` is the zero of the wire.
    assert_eq!((&*w.workload_type, w.protocol, w.health), ("deployment", Protocol::Tcp, Health::Healthy));
}

type Spoil = fn(&mut wire::Workload);

#[test]
fn a_workload_that_cannot_be_meant_is_refused_whole() {
    let bad: [(Spoil, &str); 11] = [
        (|w| w.uid.clear(), "uid"),
        (|w| w.namespace.clear(), "namespace"),
        (|w| w.addresses = vec![Bytes::from_static(&[1, 2, 3])], "3 bytes"),
        (|w| w.trust_domain = "no domain".into(), "trust_domain"),
        (|w| w.tunnel_protocol = 9, "tunnel_protocol 9"),
        (|w| w.network_mode = 9, "network_mode 9"),
        (|w| w.status = 9, "status 9"),
        (|w| w.authorization_policies = vec!["nameless".into()], "nameless"),
        (
            |w| {
                w.services = [(
                    "ns/web".to_owned(),
                    wire::PortList { ports: vec![wire::Port { service_port: 70_000, target_port: 1, app_protocol: 0 }] },
                )]
                .into();
            },
            "70000",
        ),
        (|w| w.network_gateway = Some(GatewayAddress::default()), "network_gateway"),
        (|w| w.application_tunnel = Some(wire::ApplicationTunnel { protocol: 9, port: 0 }), "application_tunnel"),
    ];
    for (spoil, word) in bad {
        let mut m = least_workload();
        spoil(&mut m);
        let why = to_workload(m).expect_err(word);
        assert!(why.contains(word), "{why}");
    }
}

#[test]
fn a_waypoint_that_cannot_be_used_closes_and_does_not_open() {
    let w = to_workload(wire::Workload { waypoint: Some(GatewayAddress::default()), ..least_workload() }).unwrap();
    assert!(w.waypoint.is_none() && w.waypoint_error.is_some());
    for waypoints in [
        wire::Service { waypoint: Some(GatewayAddress::default()), ..least_service() },
        wire::Service { waypoint: Some(GatewayAddress { hbone_mtls_port: 70_000, ..by_host("wp") }), ..least_service() },
        wire::Service {
            weighted_waypoints: vec![WeightedWaypoint { destination: Some(by_host("wp")), weight: 0 }],
            ..least_service()
        },
        wire::Service { weighted_waypoints: vec![WeightedWaypoint { destination: None, weight: 1 }], ..least_service() },
    ] {
        let s = to_service(waypoints).unwrap();
        assert!(s.waypoints.is_empty() && s.waypoint_error.is_some(), "{s:?}");
    }
    let weighted = wire::Service {
        waypoint: Some(by_host("old")),
        weighted_waypoints: vec![
            WeightedWaypoint { destination: Some(by_host("One")), weight: 90 },
            WeightedWaypoint { destination: Some(by_host("two")), weight: 10 },
        ],
        ingress_use_waypoint: true,
        ..least_service()
    };
    let s = to_service(weighted).unwrap();
    assert!(s.is_fronted() && !to_service(least_service()).unwrap().ingress_use_waypoint);
    let shares: Vec<(String, u16, u32)> = s
        .waypoints
        .iter()
        .map(|w| match &w.waypoint.destination {
            GatewayDestination::Service(key) => (key.to_string(), w.waypoint.hbone_port, w.weight),
            GatewayDestination::Address(..) => panic!("{w:?}"),
        })
        .collect();
    assert_eq!(shares, [("ns/one".into(), 15008, 90), ("ns/two".into(), 15008, 10)]);
}

#[test]
fn a_service_has_addresses_and_ranges_of_addresses() {
    let at = |ip: &str, length| NetworkAddress { network: "n".into(), address: bytes(ip), length };
    let m = wire::Service {
        addresses: vec![at("10.0.0.1", None), at("10.9.1.1", Some(16)), at("::ffff:10.0.0.2", None), at("fd00::1", Some(64))],
        subject_alt_names: vec!["spiffe://td/ns/x/sa/y".into(), "outside.example.com".into()],
        visibility: 7,
        ..least_service()
    };
    let s = to_service(m).unwrap();
    assert_eq!(s.key.to_string(), "ns/web.ns.svc");
    assert_eq!(s.vips.iter().map(ToString::to_string).collect::<Vec<_>>(), ["n/10.0.0.1", "n/10.0.0.2"]);
    assert_eq!(s.cidr_vips.iter().map(|(_, net)| net.to_string()).collect::<Vec<_>>(), ["10.9.0.0/16", "fd00::/64"]);
    // A name of the outside proves nothing in a tunnel.
    assert_eq!(s.sans.len(), 1);
    assert_eq!(s.visibility, Visibility::Namespace, "a word of a later Istio hides rather than shows");
    assert!(to_service(wire::Service { addresses: vec![at("10.0.0.1", Some(33))], ..least_service() }).is_err());
    assert!(to_service(wire::Service { ip_families: 9, ..least_service() }).is_err());
    let lb = wire::LoadBalancing { routing_preference: vec![0], ..wire::LoadBalancing::default() };
    assert!(to_service(wire::Service { load_balancing: Some(lb), ..least_service() }).is_err());
}

fn text(match_type: Option<MatchType>) -> security::StringMatch {
    security::StringMatch { match_type }
}
fn of_match(m: security::Match) -> security::Authorization {
    let rules = security::Rules { matches: vec![m] };
    security::Authorization {
        name: "p".into(),
        namespace: "ns".into(),
        groups: vec![security::Group { rules: vec![rules] }],
        ..security::Authorization::default()
    }
}

/// istio/ztunnel leaves a malformed value out, and the field may then constrain nothing.
#[test]
fn a_policy_with_a_malformed_value_denies_instead_of_widening() {
    let named = PolicyKey::new("ns", "p");
    let range = |address: Bytes, length| vec![security::Address { address, length }];
    let malformed = [
        of_match(security::Match { source_ips: range(bytes("10.0.0.1"), 33), ..security::Match::default() }),
        of_match(security::Match { source_ips: range(Bytes::from_static(&[1]), 8), ..security::Match::default() }),
        of_match(security::Match { namespaces: vec![text(None)], ..security::Match::default() }),
        of_match(security::Match { principals: vec![text(Some(MatchType::Exact(String::new())))], ..security::Match::default() }),
        of_match(security::Match { destination_ports: vec![65_616], ..security::Match::default() }),
        of_match(security::Match {
            service_accounts: vec![security::ServiceAccountMatch::default()],
            ..security::Match::default()
        }),
        of_match(security::Match { extensions: vec![wire::Extension::default()], ..security::Match::default() }),
        security::Authorization { action: 2, ..of_match(security::Match::default()) },
        security::Authorization { scope: 3, ..of_match(security::Match::default()) },
        security::Authorization { extensions: vec![wire::Extension::default()], ..of_match(security::Match::default()) },
    ];
    for m in malformed {
        let (policy, bad) = policy(m.clone(), &named);
        assert!(matches!(policy.body, PolicyBody::Unusable { .. }) && bad.is_some(), "{m:?}");
        assert_eq!(policy.key, named);
    }
    let (unknown_scope, _) = policy(security::Authorization { scope: 3, ..of_match(security::Match::default()) }, &named);
    assert_eq!(unknown_scope.scope, Scope::Namespace);
}

#[test]
fn the_empty_cases_of_a_policy_keep_their_meaning() {
    let named = PolicyKey::new("ns", "p");
    let rules = |groups| {
        let m = security::Authorization { groups, ..of_match(security::Match::default()) };
        match policy(m, &named).0.body {
            PolicyBody::Rules { rules, .. } => rules,
            PolicyBody::Unusable { why } => panic!("{why}"),
        }
    };
    // Never matches; matches; matches; a match without a field never does.
    assert_eq!(rules(vec![]), []);
    assert_eq!(rules(vec![security::Group::default()]), [Rule::default()]);
    let one_clause = vec![security::Group { rules: vec![security::Rules::default()] }];
    assert_eq!(rules(one_clause), [Rule { clauses: vec![Clause::default()] }]);
    let empty_match = vec![security::Group { rules: vec![security::Rules { matches: vec![security::Match::default()] }] }];
    assert!(rules(empty_match)[0].clauses[0].matches[0].is_empty());
}
