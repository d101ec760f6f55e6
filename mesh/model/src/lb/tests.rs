use super::*;
use crate::fixture::*;
use crate::workload::Locality;

fn locality(region: &str, zone: &str) -> Locality {
    Locality { region: region.into(), zone: zone.into(), subzone: "".into() }
}
fn here() -> Viewpoint {
    Viewpoint { locality: locality("r1", "z1"), ..view() }
}
fn set(service: &Service, workloads: Vec<Workload>) -> EndpointSet {
    let members = workloads.into_iter().map(|w| {
        let ports = w.services.get(&service.key).cloned().unwrap_or_default();
        (Arc::new(Known::new(Arc::new(w))), ports)
    });
    EndpointSet::build(Some(service), &here(), members.collect())
}
fn at(name: &str, addr: &str, l: Locality) -> Workload {
    let mut w = pod("default", name, addr);
    w.locality = l;
    w
}
fn web(scopes: &[LbScope], mode: LbMode) -> Service {
    let mut s = service("default", "web", "10.96.0.1", &[(80, 8080), (90, 0)]);
    (s.lb.scopes, s.lb.mode) = (scopes.to_vec(), mode);
    s
}
/// The names picked over many draws, sorted.
fn picked(set: &EndpointSet, port: u16) -> Vec<String> {
    let mut names: Vec<String> =
        (0..500).filter_map(|i| set.pick(Some(port), redraw(i, 1))).map(|e| e.workload().name.to_string()).collect();
    names.sort();
    names.dedup();
    names
}
fn three() -> Vec<Workload> {
    vec![
        at("same", "10.0.0.1", locality("r1", "z1")),
        at("region", "10.0.0.2", locality("r1", "z2")),
        at("far", "10.0.0.3", locality("r2", "z9")),
    ]
}

#[test]
fn locality_modes() {
    use LbScope::{Region, Zone};
    assert_eq!(picked(&set(&web(&[Region, Zone], LbMode::Any), three()), 80), ["far", "region", "same"]);
    assert_eq!(picked(&set(&web(&[Region, Zone], LbMode::Failover), three()), 80), ["same"]);
    assert_eq!(picked(&set(&web(&[Region, Zone], LbMode::Strict), three()), 80), ["same"]);
    let without_same = three().split_off(1);
    assert_eq!(picked(&set(&web(&[Region, Zone], LbMode::Failover), without_same.clone()), 80), ["region"]);
    assert!(picked(&set(&web(&[Region, Zone], LbMode::Strict), without_same), 80).is_empty());
    assert_eq!(picked(&set(&web(&[Region], LbMode::Strict), three()), 80), ["region", "same"]);
}

#[test]
fn the_network_is_preferred_not_required() {
    let mut far = at("far", "10.0.0.9", locality("r1", "z1"));
    far.network = "n2".into();
    far.network_gateway = Some(Box::new(by_addr("n2", "1.1.1.1")));
    let scopes = [LbScope::Network, LbScope::Region];
    for mode in [LbMode::Strict, LbMode::Failover] {
        let near = at("near", "10.0.0.1", locality("r1", "z1"));
        assert_eq!(picked(&set(&web(&scopes, mode), vec![near, far.clone()]), 80), ["near"]);
        assert_eq!(picked(&set(&web(&scopes, mode), vec![far.clone()]), 80), ["far"]);
    }
}

#[test]
fn ranks_count_only_endpoints_that_have_the_port() {
    let s = web(&[LbScope::Region], LbMode::Failover);
    let far = backs(at("far", "10.0.0.3", locality("r2", "z9")), &s.key, &[(90, 9090)]);
    let near = at("near", "10.0.0.1", locality("r1", "z1"));
    let set = set(&s, vec![near, far]);
    assert_eq!(picked(&set, 80), ["near"]);
    assert_eq!(picked(&set, 90), ["far"]);
    assert!(set.pick(Some(91), 0).is_none());
}

#[test]
fn capacity_is_the_weight_and_every_endpoint_is_reachable() {
    let s = web(&[], LbMode::Any);
    let many: Vec<Workload> = (0..1000)
        .map(|i| {
            let mut w = pod("default", &format!("w{i:04}"), &format!("10.1.{}.{}", i / 250, i % 250 + 1));
            w.capacity = if i == 500 { 1000 } else { 1 };
            w
        })
        .collect();
    let set = set(&s, many);
    let mut hits = std::collections::HashMap::<String, u32>::new();
    for i in 0..20_000 {
        let e = set.pick(Some(80), redraw(i, 3)).expect("endpoint");
        *hits.entry(e.workload().name.to_string()).or_default() += 1;
    }
    let heavy = hits["w0500"];
    assert!((9_500..10_500).contains(&heavy), "{heavy} of 20000 for half of the weight");
    assert!(hits.len() > 990, "{} endpoints were ever picked", hits.len());
    assert!(set.pick(None, 0).is_some() && set.pick(None, u64::MAX).is_some());
}

#[test]
fn sets_do_not_depend_on_history() {
    let s = web(&[], LbMode::Any);
    let w = |i: u32| pod("default", &format!("w{i:04}"), &format!("10.1.{}.{}", i / 250, i % 250 + 1));
    let mut grown = EndpointSet::default();
    for i in (0..600).rev() {
        grown.insert(Some(&s), &here(), Arc::new(Known::new(Arc::new(w(i)))), PortMap::default());
    }
    let old = grown.clone();
    for i in (0..600).filter(|i| i % 3 != 0) {
        assert!(grown.remove(&w(i).uid));
        assert!(!grown.remove(&w(i).uid));
    }
    let built = set(&s, (0..600).filter(|i| i % 3 == 0).map(w).collect());
    assert!((0..2000).map(|i| redraw(i, 5)).all(|d| grown.pick(Some(80), d) == built.pick(Some(80), d)));
    assert_eq!((grown.usable().count(), old.usable().count()), (200, 600));
}

#[test]
fn unusable_endpoints_are_members_but_never_chosen() {
    let s = web(&[], LbMode::Any);
    let mut sick = pod("default", "sick", "10.0.0.1");
    sick.health = Health::Unhealthy;
    let mut nowhere = pod("default", "nowhere", "10.0.0.2");
    nowhere.ips.clear();
    let set = set(&s, vec![sick, nowhere]);
    assert!(set.pick(None, 0).is_none() && set.usable().next().is_none());
    assert!(set.contains("c//Pod/default/sick") && set.all().count() == 2);
}

#[test]
fn draws() {
    assert_eq!((below(u64::MAX, 10), below(0, 10), below(5, 0)), (9, 0, 0));
    assert_ne!(redraw(1, 1), redraw(1, 2));
}

#[test]
fn grading_anew_equals_building_anew() {
    use LbScope::{Network, Node, Region, Zone};
    let key = web(&[], LbMode::Any).key;
    let workloads: Vec<Workload> = (0_u32..240)
        .map(|i| {
            let (region, zone) = [("r1", "z1"), ("r1", "z2"), ("r2", "z9")][i as usize % 3];
            let mut w = at(&format!("w{i:03}"), &format!("10.1.0.{i}"), locality(region, zone));
            if i % 5 == 0 {
                w.health = Health::Unhealthy;
            }
            if i % 7 == 0 {
                (w.network, w.network_gateway) = ("n2".into(), (i % 2 == 0).then(|| Box::new(by_addr("n2", "1.1.1.1"))));
            }
            if i % 11 == 0 {
                w.ips = vec!["fd00::1".parse().expect("ip")];
            }
            if i % 13 == 0 { backs(w, &key, &[(90, 9090), (91, 0)]) } else { w }
        })
        .collect();
    let mut services = vec![None];
    for mode in [LbMode::Any, LbMode::Failover, LbMode::Strict] {
        for scopes in [&[][..], &[Network, Region, Zone], &[Node]] {
            let mut s = web(scopes, mode);
            s.ip_families = IpFamilies::V4;
            services.push(Some(s.clone()));
            (s.ip_families, s.lb.health) = (IpFamilies::Dual, HealthPolicy::AllowAll);
            s.ports.truncate(1);
            services.push(Some(s));
        }
    }
    let seen =
        |set: &EndpointSet| -> Vec<(u8, String)> { set.ranked().map(|(rank, e)| (rank, e.workload().uid.to_string())).collect() };
    let mut graded = set(&web(&[], LbMode::Any), workloads);
    for service in services {
        graded.grade(service.as_ref());
        let built = EndpointSet::build(service.as_ref(), &here(), graded.members());
        assert_eq!(seen(&graded), seen(&built), "{service:?}");
        for (port, draw) in (0..600).map(|i| ([Some(80), Some(90), None][i % 3], redraw(i as u64, 7))) {
            assert_eq!(graded.pick(port, draw), built.pick(port, draw), "{service:?}");
        }
    }
}

#[test]
fn an_answer_of_dns_is_an_endpoint_for_each_address_that_can_be_used() {
    use IpFamilies::{Automatic, Dual, V4, V6};
    let ips = |text: &str| text.split_whitespace().map(|ip| ip.parse().expect("an address")).collect::<Vec<IpAddr>>();
    for (answer, own, service, want) in [
        ("", Dual, Automatic, ""),
        ("192.0.2.1", Automatic, Automatic, "192.0.2.1"),
        ("192.0.2.1 192.0.2.2 192.0.2.1", V4, Automatic, "192.0.2.1 192.0.2.2"),
        ("192.0.2.1 ::ffff:192.0.2.1", V4, Automatic, "192.0.2.1"),
        ("192.0.2.1 2001:db8::1", Dual, Automatic, "192.0.2.1 2001:db8::1"),
        ("192.0.2.1 2001:db8::1", Automatic, Dual, "192.0.2.1 2001:db8::1"),
        ("192.0.2.1 2001:db8::1", V4, Dual, "192.0.2.1"),
        ("192.0.2.1 2001:db8::1", V6, Dual, "2001:db8::1"),
        ("192.0.2.1 2001:db8::1", Dual, V6, "2001:db8::1"),
        ("192.0.2.1 2001:db8::1", V4, V6, ""),
        ("2001:db8::1", V4, Automatic, ""),
    ] {
        assert_eq!(addresses_of_name(&ips(answer), own, service), ips(want), "{answer} {own:?} {service:?}");
    }
    for (own, families) in [("", Automatic), ("10.0.0.1", V4), ("fd00::1", V6), ("10.0.0.1 fd00::1", Dual)] {
        assert_eq!(IpFamilies::of(&ips(own)), families, "{own}");
    }
}
