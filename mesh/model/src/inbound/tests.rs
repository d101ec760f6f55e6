use super::*;
use crate::addr::NetworkAddr;
use crate::change::Change;
use crate::fixture::*;

/// Plans a CONNECT accepted by `w` on 10.0.0.2:15008.
fn check(w: Workload, others: Vec<Change>, authority: &str) -> Result<(String, Option<String>), Reason> {
    let snap = mesh(others.into_iter().chain([w.clone().into()]).collect());
    let authority = HboneAuthority::parse(authority).expect("authority");
    plan_inbound(&snap, &w, sock("10.0.0.2:15008"), &authority)
        .map(|p| (p.dst.to_string(), p.service.map(|s| s.name.to_string())))
        .map_err(|r| r.reason)
}
fn web() -> Workload {
    backs(pod("default", "web-0", "10.0.0.2"), &key("default", "web"), &[(80, 8080)])
}
fn web_service() -> Service {
    service("default", "web", "10.96.0.1", &[(80, 0), (90, 9090), (91, 0), (92, 15001)])
}
#[expect(clippy::unnecessary_wraps, reason = "compared with what `check` gives")]
fn to(dst: &str, service: Option<&str>) -> Result<(String, Option<String>), Reason> {
    Ok((dst.into(), service.map(Into::into)))
}

#[test]
fn own_address() {
    assert_eq!(check(web(), vec![], "10.0.0.2:8080"), to("10.0.0.2:8080", None));
    assert_eq!(check(web(), vec![], "[::ffff:10.0.0.2]:8080"), to("10.0.0.2:8080", None));
}

#[test]
fn somebody_elses_address_is_a_bad_request() {
    assert_eq!(check(web(), vec![], "10.0.0.3:8080"), Err(Reason::BadRequest));
    assert_eq!(check(web(), vec![web_service().into()], "10.96.0.1:80"), Err(Reason::BadRequest));
    assert_eq!(check(web(), vec![], "10.0.0.2:0"), Err(Reason::BadRequest));
}

#[test]
fn by_host_name() {
    let host = "web.default.svc.cluster.local";
    let with = || vec![web_service().into()];
    assert_eq!(check(web(), with(), &format!("{host}:80")), to("10.0.0.2:8080", Some("web")));
    assert_eq!(check(web(), with(), &format!("{host}:90")), to("10.0.0.2:9090", Some("web")));
    assert_eq!(check(web(), with(), &format!("{host}:91")), Err(Reason::NoSuchPort));
    assert_eq!(check(web(), with(), &format!("{host}:99")), Err(Reason::NoSuchPort));
    assert_eq!(check(web(), with(), &format!("{host}:92")), Err(Reason::Recursion));
    assert_eq!(check(web(), vec![], &format!("{host}:80")), Err(Reason::NoHealthyEndpoint));
}

#[test]
fn agent_ports_are_refused() {
    for port in AGENT_PORTS {
        assert_eq!(check(web(), vec![], &format!("10.0.0.2:{port}")), Err(Reason::Recursion));
    }
}

#[test]
fn a_waypoint_accepts_what_it_stands_for() {
    let wp = || backs(pod("default", "wp-0", "10.0.0.2"), &key("default", "wp"), &[]);
    let mut s = web_service();
    s.waypoints = vec![weighted(by_service(key("default", "wp")), 1)];
    assert_eq!(check(wp(), vec![s.into()], "10.96.0.1:80"), to("10.0.0.2:80", Some("web")));
    let mut w = pod("default", "other", "10.0.0.7");
    w.waypoint = Some(Box::new(by_addr("", "10.0.0.2")));
    assert_eq!(check(wp(), vec![w.clone().into()], "10.0.0.7:80"), to("10.0.0.2:80", None));
    w.waypoint = Some(Box::new(by_addr("", "10.0.0.8")));
    assert_eq!(check(wp(), vec![w.into()], "10.0.0.7:80"), Err(Reason::BadRequest));
}

#[test]
fn an_application_tunnel_takes_every_address_on_its_port() {
    let mut w = web();
    w.application_tunnel = Some(ApplicationTunnel::Proxy(Some(15088)));
    assert_eq!(check(w.clone(), vec![], "10.0.0.77:80"), to("10.0.0.2:15088", None));
    w.application_tunnel = Some(ApplicationTunnel::Proxy(None));
    assert_eq!(check(w.clone(), vec![web_service().into()], "10.96.0.1:80"), to("10.0.0.2:80", Some("web")));
    w.application_tunnel = Some(ApplicationTunnel::Proxy(Some(15006)));
    assert_eq!(check(w, vec![], "10.0.0.2:80"), Err(Reason::Recursion));
}

#[test]
fn an_application_tunnel_is_told_the_address_that_was_asked_for() {
    let asked = |vips: &[(&str, &str)], authority: &str| {
        let (mut w, mut s) = (web(), web_service());
        w.application_tunnel = Some(ApplicationTunnel::Proxy(Some(15088)));
        s.vips = vips.iter().map(|(network, ip)| NetworkAddr { network: (*network).into(), ip: ip.parse().unwrap() }).collect();
        let snap = mesh(vec![s.into(), w.clone().into()]);
        let plan = plan_inbound(&snap, &w, sock("10.0.0.2:15008"), &HboneAuthority::parse(authority).unwrap()).unwrap();
        assert_eq!(plan.dst, sock("10.0.0.2:15088"));
        plan.asked.to_string()
    };
    let name = "web.default.svc.cluster.local:90";
    let own = ("", "10.96.0.1");
    assert_eq!(asked(&[own], "10.0.0.77:80"), "10.0.0.77:80");
    assert_eq!(asked(&[own], name), "10.96.0.1:90");
    assert_eq!(asked(&[("", "fd00::1"), own], name), "10.96.0.1:90");
    assert_eq!(asked(&[("elsewhere", "10.97.0.1"), ("", "fd00::1")], name), "[fd00::1]:90");
    assert_eq!(asked(&[], name), "10.0.0.2:9090", "a headless one has none");
}
