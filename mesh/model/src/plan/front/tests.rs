use super::*;
use crate::addr::NetworkAddr;
use crate::change::Change;
use crate::fixture::*;
use crate::service::ServiceKey;
use crate::workload::{Health, Protocol, Workload};

fn wp() -> ServiceKey {
    key("default", "wp")
}
fn web(change: impl FnOnce(&mut Service)) -> Service {
    let mut web = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    web.ingress_use_waypoint = true;
    web.waypoints = vec![weighted(by_service(wp()), 100)];
    change(&mut web);
    web
}
fn waypoint(name: &str) -> Change {
    service("default", name, "", &[(15008, 15008)]).into()
}
fn instance_of(waypoint: &str, name: &str, ip: &str, change: impl FnOnce(&mut Workload)) -> Change {
    let mut w = backs(pod("default", name, ip), &key("default", waypoint), &[(15008, 15008)]);
    change(&mut w);
    w.into()
}
fn service(ns: &str, name: &str, vip: &str, ports: &[(u16, u16)]) -> Service {
    let mut s = crate::fixture::service(ns, name, if vip.is_empty() { "10.96.0.99" } else { vip }, ports);
    s.vips.retain(|_| !vip.is_empty());
    s
}
/// What is asked for, and whom with which share.
type Told = (String, Vec<(String, u32)>);
/// The way of a gateway in `namespace`: what is asked for, and each instance with its share; or why not.
fn way_of(namespace: &str, web: &Service, others: Vec<Change>) -> Option<Result<Told, Refusal>> {
    let endpoint = backs(pod("default", "web-0", "10.0.0.2"), &web.key, &[(80, 8080)]);
    let snap = mesh(others.into_iter().chain([web.clone().into(), endpoint.into()]).collect());
    let way = way_by_waypoint(&snap, web, 80, ip("0.0.0.0"), namespace);
    let told = |i: &Instance| {
        let beyond = i.beyond.as_ref().map(|ids| format!(" then {}", ids[0])).unwrap_or_default();
        (format!("{} {} {}{beyond}", i.known.workload().name, i.at.dial, i.at.expect[0]), i.weight)
    };
    way.map(|way| way.map(|front| (front.authority.to_string(), front.instances.iter().map(told).collect())))
}
fn way(web: &Service, others: Vec<Change>) -> Option<Result<Told, Refusal>> {
    way_of("default", web, others)
}
fn one(name: &str, ip: &str) -> (String, u32) {
    (format!("{name} {ip}:15008 spiffe://cluster.local/ns/default/sa/{name}"), 1)
}

#[test]
fn only_who_asks_for_it_is_reached_by_the_waypoint() {
    let there = || vec![waypoint("wp"), instance_of("wp", "wp-0", "10.0.0.9", |_| {})];
    assert_eq!(way(&web(|_| {}), there()), Some(Ok(("10.96.0.1:80".into(), vec![one("wp-0", "10.0.0.9")]))));
    assert_eq!(way(&web(|s| s.ingress_use_waypoint = false), there()), None);
    assert_eq!(way(&web(|s| s.waypoints.clear()), there()), None, "without a waypoint the label says nothing");
}

#[test]
fn what_is_asked_for_means_the_service() {
    let there = |more: Vec<Change>| {
        let wp = vec![waypoint("wp"), instance_of("wp", "wp-0", "10.0.0.9", |_| {})];
        wp.into_iter().chain(more).collect::<Vec<_>>()
    };
    let asked = |namespace, web: &Service, more| way_of(namespace, web, there(more)).unwrap().map(|(authority, _)| authority);
    let vip = |network: &str, at: &str| NetworkAddr { network: network.into(), ip: ip(at) };
    let name = "web.default.svc.cluster.local:80".to_owned();
    for (vips, want) in [
        (vec![vip("", "fd00::1"), vip("", "10.96.0.1")], "10.96.0.1:80".to_owned()),
        (vec![vip("n2", "10.99.0.1"), vip("", "fd00::1")], "[fd00::1]:80".into()),
        (vec![vip("n2", "10.99.0.1")], name.clone()),
        (vec![], name.clone()),
    ] {
        assert_eq!(asked("edge", &web(|s| s.vips = vips), vec![]), Ok(want));
    }
    // Another namespace has a service of that address, or of that name: there it is the one that is meant.
    let mut other = Service::new("web", "edge", "web.default.svc.cluster.local");
    other.vips = vec![vip("", "10.96.0.1")];
    assert_eq!(asked("edge", &web(|s| s.vips.push(vip("", "10.96.0.2"))), vec![other.clone().into()]), Ok("10.96.0.2:80".into()));
    let none = asked("edge", &web(|_| {}), vec![other.clone().into()]).unwrap_err();
    assert_eq!(none.reason, Reason::NoWaypoint);
    assert!(none.detail.contains("neither its addresses nor its name"), "{none}");
    assert_eq!(asked("default", &web(|_| {}), vec![other.into()]), Ok("10.96.0.1:80".into()));
}

#[test]
fn a_waypoint_that_cannot_be_used_is_gone_around_by_nobody() {
    let sick = |w: &mut Workload| w.health = Health::Unhealthy;
    let nobody = |w: &mut Workload| w.service_account = "not a name".into();
    for (web, others, why) in [
        (web(|s| (s.waypoints, s.waypoint_error) = (vec![], Some("it does not exist".into()))), vec![], "it does not exist"),
        (web(|_| {}), vec![], "no healthy endpoint of"),
        (web(|_| {}), vec![waypoint("wp")], "no healthy endpoint of"),
        (web(|_| {}), vec![waypoint("wp"), instance_of("wp", "wp-0", "10.0.0.9", sick)], "no healthy endpoint of"),
        (web(|_| {}), vec![waypoint("wp"), instance_of("wp", "wp-0", "10.0.0.9", nobody)], "no healthy endpoint of"),
        (web(|s| s.waypoints[0].weight = 0), vec![waypoint("wp")], "the weights of its waypoints sum to zero"),
    ] {
        let refusal = way(&web, others).unwrap().unwrap_err();
        assert_eq!(refusal.reason, Reason::NoWaypoint, "{refusal}");
        assert!(refusal.detail.contains(why), "{refusal}");
    }
}

#[test]
fn instances_share_as_their_waypoints_are_weighed() {
    let both = web(|s| s.waypoints = vec![weighted(by_service(wp()), 80), weighted(by_service(key("default", "canary")), 20)]);
    let primary = || {
        let large = instance_of("wp", "wp-1", "10.0.0.10", |w| w.capacity = 3);
        vec![waypoint("wp"), instance_of("wp", "wp-0", "10.0.0.9", |_| {}), large]
    };
    let canary = || vec![waypoint("canary"), instance_of("canary", "canary-0", "10.0.0.11", |_| {})];
    let weights = |web: &Service, others| -> Vec<u32> {
        way(web, others).unwrap().unwrap().1.into_iter().map(|(_, weight)| weight).collect()
    };
    assert_eq!(weights(&web(|_| {}), primary()), [1, 3]);
    assert_eq!(weights(&both, primary().into_iter().chain(canary()).collect()), [200_000, 600_000, 200_000]);
    // One that is not there leaves all to the other, which is a waypoint of the service too.
    assert_eq!(weights(&both, primary()), [1, 3]);
    assert_eq!(weights(&both, canary()), [1]);
    // By address.
    let by_ip = web(|s| s.waypoints = vec![weighted(by_addr("", "10.0.0.9"), 100)]);
    assert_eq!(way(&by_ip, primary()).unwrap().unwrap().1, [one("wp-0", "10.0.0.9")]);
}

#[test]
fn a_waypoint_on_another_network_is_behind_its_gateway() {
    let gateway = |w: &mut Workload| w.network = "n2".into();
    let far = |w: &mut Workload| {
        (w.network, w.network_gateway) = ("n2".into(), Some(Box::new(by_addr("n2", "172.16.0.1"))));
        w.protocol = Protocol::Hbone;
    };
    let mut at = Service::new("wp", "default", "wp.default.svc.cluster.local");
    at.ports = web(|_| {}).ports;
    at.sans = vec![id("cluster.local", "default", "wp")];
    let others = |at: &Service, gateway_ip: &str| {
        let mut east = pod("default", "east", gateway_ip);
        gateway(&mut east);
        let behind = |name, ip| instance_of("wp", name, ip, far);
        vec![at.clone().into(), behind("wp-0", "10.9.0.1"), behind("wp-1", "10.9.0.2"), east.into()]
    };
    let told = way(&web(|_| {}), others(&at, "172.16.0.1")).unwrap().unwrap();
    let through = "wp-0 172.16.0.1:15008 spiffe://cluster.local/ns/default/sa/east then spiffe://cluster.local/ns/default/sa/wp";
    assert_eq!(told, ("10.96.0.1:80".into(), vec![(through.into(), 2)]));
    // Nothing says who may end the inner tunnel; or the gateway is not there.
    at.sans.clear();
    assert_eq!(way(&web(|_| {}), others(&at, "172.16.0.1")).unwrap().unwrap_err().reason, Reason::NoGateway);
    at.sans = vec![id("cluster.local", "default", "wp")];
    assert_eq!(way(&web(|_| {}), others(&at, "172.16.0.2")).unwrap().unwrap_err().reason, Reason::NoGateway);
}
