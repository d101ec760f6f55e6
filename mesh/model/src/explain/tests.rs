//! Small meshes, asked. The words are looked at where people rely on them; the whole way of calls is looked at in
//! `meshctl/tests` on folders and in the suites of the running mesh.
use super::*;
use crate::change::Change;
use crate::fixture::*;
use crate::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, Values};
use crate::workload::Workload;

fn ask(mesh: &Snapshot, from: &str, to: &str) -> Report {
    let question = Question { from: from.into(), to: to.into(), http: None };
    why(mesh, &question, &Settings::default()).expect("an answer")
}
fn told<'r>(report: &'r Report, policy: &str) -> &'r PolicyTold {
    report.steps.iter().flat_map(|s| &s.policies).find(|p| p.policy == policy).expect("the policy is told")
}
fn principal(name: &str) -> Match {
    Match { principals: Values::new(vec![text(name)], Vec::new()), ..Match::default() }
}
fn port(n: u16) -> Match {
    Match { destination_ports: Values::new(vec![n], Vec::new()), ..Match::default() }
}
fn both(a: Match, b: Match) -> Rule {
    Rule { clauses: [a, b].into_iter().map(|m| Clause { matches: vec![m] }).collect() }
}
/// `ns/web` behind `ns/web:80 → 8080`, `ns/client`, and these policies, bound by name.
fn shop(policies: Vec<Policy>) -> Snapshot {
    let mut web: Workload = backs(pod("ns", "web", "10.0.0.2"), &key("ns", "web"), &[(80, 8080)]);
    web.policies = policies.iter().map(|p| p.key.clone()).collect::<Vec<_>>().into();
    let mut all = vec![
        Change::Workload(Arc::new(pod("ns", "client", "10.0.0.1"))),
        Change::Workload(Arc::new(web)),
        Change::Service(Arc::new(service("ns", "web", "10.96.0.1", &[(80, 8080)]))),
    ];
    all.extend(policies.into_iter().map(|p| Change::Policy(Arc::new(p))));
    mesh(all)
}

#[test]
fn every_effect_has_its_policy() {
    let client = principal("cluster.local/ns/ns/sa/client");
    let named = |name: &str, rules| policy("ns", name, Scope::Selector, Action::Allow, rules);
    let mesh = shop(vec![
        named("matches", vec![both(port(1), client.clone()), both(port(8080), client.clone())]),
        named("near", vec![both(port(80), client.clone())]),
        named("far", vec![both(port(80), principal("cluster.local/ns/ns/sa/other"))]),
        named("no-rules", Vec::new()),
        named("never", vec![rule(Match::default())]),
    ]);
    let report = ask(&mesh, "ns/client", "web:80");
    assert_eq!((report.decision, report.reason.as_deref()), (Decision::Allowed, None), "{report:?}");
    let seen = |name: &str| {
        let p = told(&report, &format!("ns/{name}"));
        (p.effect, p.rule, p.failed.len())
    };
    assert_eq!(seen("matches"), (Effect::Matched, Some(1), 0));
    assert_eq!(seen("near"), (Effect::NearlyMatched, Some(0), 1));
    assert_eq!(seen("far"), (Effect::NotMatched, Some(0), 2));
    assert_eq!((seen("no-rules").0, seen("never").0), (Effect::Never, Effect::Never));
    assert_eq!(told(&report, "ns/near").failed, ["the destination port is 8080, wanted 80"]);
}

#[test]
fn what_closes_is_told_with_its_cause() {
    let unusable = Policy {
        key: PolicyKey::new("ns", "broken"),
        scope: Scope::Selector,
        body: PolicyBody::Unusable { why: "line 7 is wrong".into() },
        origin: None,
    };
    let report = ask(&shop(vec![unusable]), "ns/client", "web:80");
    assert_eq!((report.decision, report.reason.as_deref()), (Decision::Denied, Some("policy_unusable")));
    assert_eq!(
        (told(&report, "ns/broken").effect, &*told(&report, "ns/broken").failed[0]),
        (Effect::Unusable, "line 7 is wrong")
    );

    let mut web = backs(pod("ns", "web", "10.0.0.2"), &key("ns", "web"), &[(80, 8080)]);
    web.policies = vec![PolicyKey::new("ns", "gone")].into();
    let mesh = shop(Vec::new()).apply(&[Change::Workload(Arc::new(web))]);
    let report = ask(&mesh, "ns/client", "web:80");
    assert_eq!((report.reason.as_deref(), told(&report, "ns/gone").effect), (Some("policy_unknown"), Effect::Missing));
}

#[test]
fn endpoints_that_differ_are_told_apart() {
    let mut locked = backs(pod("ns", "locked", "10.0.0.3"), &key("ns", "web"), &[(80, 8080)]);
    locked.policies = vec![PolicyKey::new("ns", "nobody")].into();
    let closed = policy("ns", "nobody", Scope::Selector, Action::Deny, vec![Rule::default()]);
    let mesh = shop(Vec::new()).apply(&[Change::Policy(Arc::new(closed)), Change::Workload(Arc::new(locked))]);
    let report = ask(&mesh, "ns/client", "web:80");
    assert_eq!((report.decision, report.reason.as_deref()), (Decision::Partly, Some("policy_denied")), "{report:?}");
}

#[test]
fn names_are_searched_as_a_resolver_does() {
    let mesh = shop(Vec::new());
    for to in [
        "web:80",
        "web.ns:80",
        "web.ns.svc:80",
        "web.ns.svc.cluster.local:80",
        "WEB.ns.svc.cluster.local.:80",
        "ns/web:80",
        "10.96.0.1:80",
    ] {
        assert_eq!(ask(&mesh, "ns/client", to).call.to, "web.ns.svc.cluster.local:80", "{to}");
    }
    assert_eq!(ask(&mesh, "ns/client", "10.0.0.2:8080").call.to, "ns/web:8080");
    let none = |from: &str, to: &str| {
        why(&mesh, &Question { from: from.into(), to: to.into(), http: None }, &Settings::default()).expect_err("no answer")
    };
    assert!(matches!(none("ns/client/", "web:80"), Unanswerable::Source(_)));
    assert!(matches!(none("ns/a/b/c", "web:80"), Unanswerable::Source(_)));
    assert!(matches!(none("ns/nobody", "web:80"), Unanswerable::NoWorkload(..)));
    assert!(matches!(none("ns/client", "web:0"), Unanswerable::Target(_)));
    assert!(matches!(none("ns/client", "web:http"), Unanswerable::Target(_)));
    assert!(matches!(none("ns/client", "a:b:80"), Unanswerable::Target(_)));
    assert!(matches!(none("ns/client", "nothing:80"), Unanswerable::NoService(..)));
}
