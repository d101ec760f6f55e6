use super::*;
use crate::change::Change;
use crate::fixture::*;

/// The waypoint `wp` at 10.0.0.2, behind the service `wp`.
fn me() -> Workload {
    backs(pod("default", "wp-0", "10.0.0.2"), &key("default", "wp"), &[])
}
fn web(bound: bool) -> Service {
    let mut s = service("default", "web", "10.96.0.1", &[(80, 8080)]);
    if bound {
        s.waypoints = vec![weighted(by_service(key("default", "wp")), 100)];
    }
    s
}
fn check(others: Vec<Change>, authority: &str) -> Result<String, Reason> {
    let own: [Change; 2] = [me().into(), service("default", "wp", "10.96.0.9", &[(15008, 15008)]).into()];
    let snap = mesh(own.into_iter().chain(others).collect());
    let authority = HboneAuthority::parse(authority).expect("authority");
    plan_tunnel(&snap, &me(), "default", &authority)
        .map(|target| match target {
            Target::Service { service, port } => format!("service {} {port}", service.name),
            Target::Workload { known, port } => format!("workload {} {port}", known.workload().name),
        })
        .map_err(|r| r.reason)
}

#[test]
fn services_that_name_this_waypoint() {
    let bound = || vec![web(true).into()];
    assert_eq!(check(bound(), "10.96.0.1:80"), Ok("service web 80".into()));
    assert_eq!(check(bound(), "web.default.svc.cluster.local:80"), Ok("service web 80".into()));
    assert_eq!(check(bound(), "10.96.0.1:81"), Err(Reason::NoSuchPort));
    assert_eq!(check(bound(), "10.96.0.1:0"), Err(Reason::BadRequest));
}
#[test]
fn everything_else_is_refused() {
    assert_eq!(check(vec![web(false).into()], "10.96.0.1:80"), Err(Reason::NotBound));
    assert_eq!(check(vec![web(false).into()], "web.default.svc.cluster.local:80"), Err(Reason::NotBound));
    assert_eq!(check(vec![], "10.96.0.7:80"), Err(Reason::NotBound));
    assert_eq!(check(vec![], "nobody.default.svc.cluster.local:80"), Err(Reason::NotBound));
    assert_eq!(check(vec![pod("default", "web-0", "10.0.0.3").into()], "10.0.0.3:8080"), Err(Reason::NotBound));
    assert_eq!(check(vec![], "10.96.0.9:15008"), Err(Reason::NotBound), "its own service is not bound to it");
}
#[test]
fn never_itself_nor_an_agent() {
    assert_eq!(check(vec![], "10.0.0.2:15008"), Err(Reason::Recursion));
    let mut w = pod("default", "web-0", "10.0.0.3");
    w.waypoint = Some(Box::new(by_service(key("default", "wp"))));
    assert_eq!(check(vec![w.clone().into()], "10.0.0.3:8080"), Ok("workload web-0 8080".into()));
    assert_eq!(check(vec![w.into()], "10.0.0.3:15008"), Err(Reason::Recursion));
}
