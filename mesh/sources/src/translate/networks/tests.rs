use mesh_model::Network;
use mesh_model::workload::GatewayDestination;

use super::super::tests::{mesh, ns, objects, view};
use super::super::{Settings, Translator};
use super::*;

pub fn remote(namespace: &str, name: &str, network: &str, address: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata: {{name: {name}, namespace: {namespace}, labels: {{topology.istio.io/network: {network}}}}}\n\
         spec: {{gatewayClassName: istio-remote, addresses: [{{value: {address}}}], \
         listeners: [{{name: mesh, port: 15108, protocol: HBONE}}]}}\n"
    )
}
fn entry(name: &str, network: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: a}}\n\
         spec: {{address: 10.5.0.1, serviceAccount: vm{network}}}\n"
    )
}
fn through(network: &str, ip: &str) -> GatewayRef {
    let destination = GatewayDestination::Address(Network::from(network), ip.parse().unwrap());
    GatewayRef { destination, hbone_port: 15108 }
}

fn any_of(network: &str) -> GatewayRef {
    let key = ServiceKey::new("", &format!("NetworkGateway/{network}"));
    GatewayRef { destination: GatewayDestination::Service(key), hbone_port: 15008 }
}

#[test]
fn a_remote_gateway_is_who_leads_to_its_network() {
    let external = "---\n{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: se, namespace: a}, spec: {hosts: [far.x], resolution: STATIC, endpoints: [{address: 192.0.2.1, network: n2}, {address: 192.0.2.2}]}}\n";
    let text = ns("a", "")
        + &remote("a", "a-first", "n2", "172.16.0.1")
        + &remote("a", "named", "n3", "172.16.0.3")
            .replace("labels:", "annotations: {gateway.istio.io/service-account: east}, labels:")
        + &entry("here", "")
        + &entry("vm2", ", network: n2")
        + &entry("vm3", ", network: n3")
        + &entry("nowhere", ", network: n4")
        + external;
    let (m, problems) = mesh(&text);
    assert_eq!(problems, []);
    assert_eq!(m.w("/vm2").network_gateway.as_deref(), Some(&through("n2", "172.16.0.1")));
    assert_eq!(m.w("/vm3").network_gateway.as_deref(), Some(&through("n3", "172.16.0.3")));
    assert_eq!((&m.w("/here").network_gateway, &m.w("/nowhere").network_gateway), (&None, &None));
    assert_eq!(m.w("/192.0.2.1").network_gateway.as_deref(), Some(&through("n2", "172.16.0.1")));
    assert_eq!(m.w("/192.0.2.2").network_gateway, None);

    let who = m.w("NetworkGateway/n2/172.16.0.1/15108");
    assert_eq!((who.network.as_str(), &*who.namespace, &*who.service_account), ("n2", "a", "a-first-istio-remote"));
    assert_eq!(who.ips, ["172.16.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(&*m.w("NetworkGateway/n3/172.16.0.3/15108").service_account, "east");
}

#[test]
fn gateways_of_other_classes_and_without_a_tunnel_lead_nowhere() {
    for (what, with) in
        [("istio-remote", "istio-east-west"), ("HBONE", "TLS"), ("topology.istio.io/network", "x"), ("addresses", "x")]
    {
        let (m, _) =
            mesh(&(ns("a", "") + &remote("a", "g", "n2", "172.16.0.1").replace(what, with) + &entry("vm", ", network: n2")));
        assert_eq!(m.w("/vm").network_gateway, None, "{what}");
        assert!(m.workloads.keys().all(|uid| !uid.starts_with("NetworkGateway")), "{what}");
    }
}

#[test]
fn what_is_behind_a_gateway_follows_it() {
    let mut t = Translator::new(view(), &Settings::default());
    let mut state = super::super::tests::State::default();
    let mut step = |text: &str, gone: bool| {
        for object in objects(&mut t, text).0 {
            if gone { t.remove(&object.id) } else { t.upsert(object) }
        }
        let changes = t.flush();
        let count = changes.len();
        state.apply(changes);
        (state.w("/vm").network_gateway.as_deref().cloned(), count)
    };
    let all = ns("a", "") + &entry("vm", ", network: n2") + &entry("other", ", network: n3");
    assert_eq!(step(&all, false).0, None);
    // The gateway and who is behind it, nobody else.
    assert_eq!(step(&remote("a", "g", "n2", "172.16.0.1"), false), (Some(through("n2", "172.16.0.1")), 2));
    assert_eq!(step(&remote("a", "g", "n2", "172.16.0.2"), false), (Some(through("n2", "172.16.0.2")), 3));
    // Two are a service: it, both of them, and who is behind. A third is nobody's business but its own.
    assert_eq!(step(&remote("a", "h", "n2", "172.16.0.1"), false), (Some(any_of("n2")), 4));
    assert_eq!(step(&remote("a", "i", "n2", "172.16.0.3"), false), (Some(any_of("n2")), 1));
    assert_eq!(step(&remote("a", "i", "n2", "172.16.0.3"), true), (Some(any_of("n2")), 1));
    assert_eq!(step(&remote("a", "g", "n2", "172.16.0.2"), true), (Some(through("n2", "172.16.0.1")), 4));
    assert_eq!(step(&remote("a", "h", "n2", "172.16.0.1"), true), (None, 2));
}

#[test]
fn every_address_of_every_gateway_of_a_network_is_a_way_in() {
    let both = "172.16.0.1}, {value: 172.16.0.2}, {type: Hostname, value: lb.example.com";
    let text = ns("a", "")
        + &remote("a", "two", "n2", both)
        + &remote("a", "more", "n2", "172.16.0.3").replace("port: 15108", "port: 15208")
        + &entry("vm", ", network: n2");
    let (m, problems) = mesh(&text);
    assert_eq!(problems, []);
    assert_eq!(m.w("/vm").network_gateway.as_deref(), Some(&any_of("n2")));
    let key = ServiceKey::new("", "NetworkGateway/n2");
    let ways: Vec<(String, u16)> = m
        .workloads
        .values()
        .filter_map(|w| Some((w.uid.to_string(), w.services.get(&key)?.iter().map(|(_, to)| *to).sum())))
        .collect();
    let want = [("1/15108", 15108), ("2/15108", 15108), ("3/15208", 15208)];
    assert_eq!(ways, want.map(|(at, port)| (format!("NetworkGateway/n2/172.16.0.{at}"), port)));
    // Connections draw among them, and none is seen as a service of anybody's.
    let mut snap = mesh_model::Snapshot::empty(view());
    let changes = m.services.values().cloned().map(Change::Service).chain(m.workloads.values().cloned().map(Change::Workload));
    snap = snap.apply(&changes.collect::<Vec<_>>());
    let set = snap.endpoint_set(&key).expect("endpoints");
    let drawn: BTreeSet<&str> = (0..64).filter_map(|n| Some(&*set.pick(Some(15008), n << 58)?.workload().uid)).collect();
    assert_eq!(drawn.len(), 3);
    assert!(snap.find_service_by_host("networkgateway/n2", "a").is_none());
    assert!(snap.find_service_by_host("NetworkGateway/n2", "a").is_none());
}
