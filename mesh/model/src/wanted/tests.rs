use super::*;
use crate::change::Change;
use crate::fixture::*;
use crate::names;
use crate::plan::plan_outbound;

/// What a call of the pod `client` to `dst` lacks.
fn lacks(objects: Vec<Change>, dst: &str) -> Option<String> {
    let client = pod("default", "client", "10.0.0.1");
    let snap = mesh(objects.into_iter().chain([client.clone().into()]).collect());
    let conn = outbound(&client, dst);
    of_outbound(&snap, &conn, &plan_outbound(&snap, &conn)).map(|wanted| wanted.to_string())
}

#[test]
fn a_destination_nobody_spoke_of_is_wanted() {
    assert_eq!(lacks(Vec::new(), "10.96.0.1:80").as_deref(), Some("/10.96.0.1"));
    assert_eq!(lacks(Vec::new(), "[2001:db8::1]:80").as_deref(), Some("/2001:db8::1"));
    assert_eq!(lacks(Vec::new(), "127.0.0.1:80"), None, "the pod's own");
    assert_eq!(lacks(vec![pod("default", "web", "10.0.0.2").into()], "10.0.0.2:80"), None);
    let service = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    assert_eq!(lacks(vec![service.clone().into()], "10.96.0.1:80"), None, "it came, and has no endpoints");
    let hidden =
        crate::service::Service { visibility: crate::service::Visibility::Namespace, key: key("other", "web"), ..service };
    assert_eq!(lacks(vec![hidden.into()], "10.96.0.1:80"), None, "it came, and is not for this pod");
}

#[test]
fn the_waypoint_and_the_gateway_of_a_destination_are_wanted() {
    let mut web = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    web.waypoints = vec![weighted(by_service(key("default", "wp")), 1)];
    let mut behind = pod("default", "db", "10.0.0.3");
    behind.waypoint = Some(Box::new(by_addr("", "10.96.0.9")));
    assert_eq!(lacks(vec![web.clone().into()], "10.96.0.1:80").as_deref(), Some("default/wp.default.svc.cluster.local"));
    assert_eq!(lacks(vec![behind.into()], "10.0.0.3:80").as_deref(), Some("/10.96.0.9"));
    let wp = service("default", "wp", "10.96.0.9", &[(15008, 15008)]);
    assert_eq!(lacks(vec![web.clone().into(), wp.clone().into()], "10.96.0.1:80"), None, "without an endpoint it refuses");
    // An instance in another network is behind a gateway.
    let mut remote = backs(pod("default", "wp-0", "10.0.0.9"), &wp.key, &[(15008, 15008)]);
    remote.network = "there".into();
    remote.network_gateway = Some(Box::new(by_addr("there", "192.0.2.9")));
    assert_eq!(lacks(vec![web.into(), wp.into(), remote.into()], "10.96.0.1:80").as_deref(), Some("there/192.0.2.9"));
}

#[test]
fn what_a_connect_means_is_wanted() {
    let web = key("default", "web");
    let server = backs(pod("default", "web-0", "10.0.0.2"), &web, &[(80, 8080)]);
    let lacks = |objects: Vec<Change>, authority: &str| {
        let snap = mesh(objects.into_iter().chain([server.clone().into()]).collect());
        let authority = HboneAuthority::parse(authority).expect("authority");
        of_inbound(&snap, &server, sock("10.0.0.2:15008"), &authority).map(|wanted| wanted.to_string())
    };
    assert_eq!(lacks(Vec::new(), "10.0.0.2:8080"), None);
    assert_eq!(lacks(Vec::new(), "10.96.0.1:80").as_deref(), Some("/10.96.0.1"));
    let name = "web.default.svc.cluster.local:80";
    assert_eq!(lacks(Vec::new(), name).as_deref(), Some("default/web.default.svc.cluster.local"));
    assert_eq!(lacks(Vec::new(), "stranger.example.com:80"), None, "nobody knows whose that is");
    let told = || vec![service("default", "web", "10.96.0.1", &[(80, 8080)]).into()];
    assert_eq!((lacks(told(), name), lacks(told(), "10.96.0.1:80")), (None, None));
}

#[test]
fn a_name_may_mean_these_services() {
    let client = pod("shop", "client", "10.0.0.1");
    let search: Vec<Box<str>> = ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"].map(Into::into).into();
    let unknown = |objects: Vec<Change>, name: &str| -> Vec<String> {
        names::unknown(&mesh(objects), &client, &search, name).iter().map(ToString::to_string).collect()
    };
    let web = "pay/web.pay.svc.cluster.local";
    assert_eq!(unknown(Vec::new(), "web.pay.svc.cluster.local"), [web]);
    assert!(unknown(Vec::new(), "web.pay").contains(&web.to_owned()));
    assert!(unknown(Vec::new(), "web.pay.svc.shop.svc.cluster.local").contains(&web.to_owned()), "a search domain behind it");
    assert!(unknown(Vec::new(), "web").contains(&"shop/web.shop.svc.cluster.local".to_owned()));
    assert_eq!(unknown(Vec::new(), "api.example.com"), ["shop/*.com", "shop/*.example.com", "shop/api.example.com"]);
    assert_eq!(unknown(vec![service("pay", "web", "10.96.0.1", &[(80, 80)]).into()], "web.pay.svc.cluster.local"), [""; 0]);
}
