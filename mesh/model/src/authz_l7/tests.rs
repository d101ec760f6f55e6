use super::*;
use crate::change::Change;
use crate::fixture::*;
use crate::l7::policy::{L7Policy, PathPattern};
use std::sync::Arc;

fn target() -> L7Target {
    L7Target::Service { namespace: "shop".into(), name: "web".into() }
}
fn policy(name: &str, action: L7Action, rules: Vec<L7Rule>) -> Change {
    let body = L7Body::Rules { action, dry_run: false, rules };
    Change::L7Policy(Arc::new(L7Policy { key: PolicyKey::new("shop", name), targets: vec![target()], body, origin: None }))
}
fn methods(of: &[&str]) -> Values<TextMatch> {
    Values::new(of.iter().map(|m| text(m)).collect(), Vec::new())
}
fn paths(of: &[&str]) -> Values<PathPattern> {
    Values::new(of.iter().map(|p| PathPattern::parse(p).expect("a path")).collect(), Vec::new())
}
fn from(principal: &str) -> Vec<L7Source> {
    vec![L7Source { peer: from_principals(&[principal]), ..L7Source::default() }]
}
/// `account: METHOD path`, or `account: tcp`.
fn check(policies: Vec<Change>, call: &str) -> Result<(), String> {
    let (account, rest) = call.split_once(": ").expect("a call");
    let identity = id("cluster.local", "shop", account);
    let headers: HeaderMap = [("x-team".parse().expect("name"), "blue".parse().expect("value"))].into_iter().collect();
    let (authority, rest) = rest.split_once(" at ").map_or(("Web.shop:80", rest), |(rest, at)| (at, rest));
    let http = rest.split_once(' ').map(|(method, path)| HttpFacts { method, authority, path, headers: &headers });
    let (client, destination) = (sock("10.0.0.1:4000"), sock("10.96.0.1:80"));
    let facts = L7Facts { identity: Some(&identity), client, destination, sni: None, http };
    match authorize(&mesh(policies), [target()].iter(), &facts) {
        L7Verdict::Allow => Ok(()),
        L7Verdict::Deny { why, by } => Err(match by {
            Some((key, rule)) => format!("{} {} {rule}", why.reason, key.name),
            None => why.reason.to_string(),
        }),
    }
}
fn denied(by: &str) -> Result<(), String> {
    Err(by.into())
}

#[test]
fn order_and_emptiness() {
    let all = || L7Rule::default();
    assert_eq!(check(vec![], "a: GET /"), Ok(()), "no policy");
    assert_eq!(check(vec![policy("p", L7Action::Allow, vec![])], "a: GET /"), denied("not_allowed"));
    assert_eq!(check(vec![policy("p", L7Action::Deny, vec![])], "a: GET /"), Ok(()));
    assert_eq!(check(vec![policy("p", L7Action::Allow, vec![all()])], "a: GET /"), Ok(()));
    let both = || vec![policy("a", L7Action::Allow, vec![all()]), policy("d", L7Action::Deny, vec![all()])];
    assert_eq!(check(both(), "a: GET /"), denied("policy_denied d 0"), "DENY wins");
    assert_eq!(check(vec![policy("c", L7Action::Custom, vec![all()])], "a: GET /"), denied("policy_denied c 0"));
    assert_eq!(check(vec![policy("u", L7Action::Audit, vec![all()])], "a: GET /"), Ok(()));
    let body = L7Body::Unusable { why: "spec.rules: nonsense".into() };
    let broken = L7Policy { key: PolicyKey::new("shop", "b"), targets: vec![target()], body, origin: None };
    assert_eq!(check(vec![Change::L7Policy(Arc::new(broken))], "a: GET /"), denied("policy_unusable"));
}

#[test]
fn sources_and_operations_are_both_needed() {
    let rule = || L7Rule {
        from: from("cluster.local/ns/shop/sa/front"),
        to: vec![L7Operation { methods: methods(&["GET", "POST"]), paths: paths(&["/api/*"]), ..L7Operation::default() }],
        when: Vec::new(),
    };
    let allow = || vec![policy("p", L7Action::Allow, vec![rule()])];
    assert_eq!(check(allow(), "front: GET /api/x"), Ok(()));
    for call in ["other: GET /api/x", "front: DELETE /api/x", "front: GET /apix", "front: GET /internal"] {
        assert_eq!(check(allow(), call), denied("not_allowed"), "{call}");
    }
    assert_eq!(check(allow(), "front: tcp"), denied("not_allowed"), "HTTP attributes on TCP: the rule allows nothing");
    let deny = || vec![policy("p", L7Action::Deny, vec![rule()])];
    assert_eq!(check(deny(), "front: tcp"), denied("policy_denied p 0"), "and denies as if they matched");
    assert_eq!(check(deny(), "other: tcp"), Ok(()));
}

#[test]
fn without_a_token_nobody_is_a_request_principal() {
    let principal = |any: &[&str], none: &[&str]| {
        let of = |l: &[&str]| l.iter().map(|t| text(t)).collect();
        let request_principals = Values::new(of(any), of(none));
        L7Rule { from: vec![L7Source { request_principals, ..L7Source::default() }], ..L7Rule::default() }
    };
    assert_eq!(check(vec![policy("p", L7Action::Allow, vec![principal(&["*"], &[])])], "a: GET /"), denied("not_allowed"));
    assert_eq!(check(vec![policy("p", L7Action::Deny, vec![principal(&[], &["*"])])], "a: GET /"), denied("policy_denied p 0"));
}

#[test]
fn hosts_headers_and_ports() {
    let to = |o: L7Operation| vec![policy("p", L7Action::Allow, vec![L7Rule { to: vec![o], ..L7Rule::default() }])];
    let hosts = |h: &str| L7Operation { hosts: methods(&[h]), ..L7Operation::default() };
    for (host, ok) in
        [("web.shop", true), ("WEB.SHOP:80", true), ("web.*", true), ("*.shop", true), ("web.shop:81", false), ("shop", false)]
    {
        assert_eq!(check(to(hosts(host)), "a: GET /").is_ok(), ok, "{host}");
    }
    let not = L7Operation { hosts: Values::new(Vec::new(), vec![text("admin.shop")]), ..L7Operation::default() };
    for (authority, ok) in [("web.shop", true), ("admin.shop", false), ("ADMIN.shop.", false), ("admin.shop.:80", false)] {
        assert_eq!(check(to(not.clone()), &format!("a: GET / at {authority}")).is_ok(), ok, "{authority}");
    }
    let port = |p| L7Operation { ports: Values::new(vec![p], Vec::new()), ..L7Operation::default() };
    assert!(check(to(port(80)), "a: GET /").is_ok() && check(to(port(81)), "a: GET /").is_err());
    assert!(check(to(port(80)), "a: tcp").is_ok(), "a port is known of TCP too");
    let header = |any: &[&str], none: &[&str]| {
        let of = |l: &[&str]| l.iter().map(|t| text(t)).collect();
        let when = vec![L7Condition::Header("x-team".parse().expect("name"), Values::new(of(any), of(none)))];
        vec![policy("p", L7Action::Allow, vec![L7Rule { when, ..L7Rule::default() }])]
    };
    assert!(check(header(&["bl*"], &[]), "a: GET /").is_ok() && check(header(&["red"], &[]), "a: GET /").is_err());
    assert!(check(header(&[], &["red"]), "a: GET /").is_ok() && check(header(&[], &["blue"]), "a: GET /").is_err());
}

#[test]
fn templates_match_whole_segments() {
    for (pattern, path, hit) in [
        ("/a/{*}/c", "/a/b/c", true),
        ("/a/{*}/c", "/a//c", false),
        ("/a/{*}/c", "/a/b/b/c", false),
        ("/a/{**}", "/a", true),
        ("/a/{**}", "/a/b/c", true),
        ("/a/{**}", "/ab", false),
        ("/a/{**}/z", "/a/z", true),
        ("/a/{**}/z", "/a/b/c/z", true),
        ("/a/{**}/z", "/a/b/c", false),
        ("/{*}/{**}", "/a", true),
        ("/x/{*}.json", "/x/1.json", false),
    ] {
        match PathPattern::parse(pattern) {
            Some(p) => assert_eq!(p.matches(path), hit, "{pattern} {path}"),
            None => assert!(!hit, "{pattern} is no template"),
        }
    }
    for bad in ["/a/{**}/b/{**}", "a/{*}", "/a/{x}", "/a/*/{*}"] {
        assert_eq!(PathPattern::parse(bad), None, "{bad}");
    }
}

#[test]
fn a_policy_binds_its_targets_and_goes_with_them() {
    let other = L7Target::Service { namespace: "shop".into(), name: "other".into() };
    let snap = mesh(vec![policy("p", L7Action::Allow, vec![])]);
    assert_eq!(snap.l7_policies_of(&target()).count(), 1);
    assert_eq!(snap.l7_policies_of(&other).count(), 0);
    let snap = snap.apply(&[Change::L7PolicyGone(PolicyKey::new("shop", "p"))]);
    assert_eq!(snap.l7_policies_of(&target()).count(), 0);
}
