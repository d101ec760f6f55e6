use super::*;
use crate::addr::Network;
use crate::change::Change;
use crate::fixture::*;
use crate::id::TrustDomain;
use crate::snapshot::Viewpoint;
use proptest::prelude::*;

/// The destination of all cases: `default/web`, 10.0.0.2:8080.
fn web(policies: &[(&str, &str)]) -> Workload {
    let mut w = pod("default", "web", "10.0.0.2");
    w.policies = policies.iter().map(|(ns, name)| PolicyKey::new(ns, name)).collect();
    w
}
/// Decides for a peer (`None`: plaintext) from 10.0.0.1, checks the index against the oracle, gives the short answer:
/// `allow`, `allow ns/name`, or the reason with the policy.
fn check(policies: Vec<Policy>, bound: &[(&str, &str)], peer: Option<&str>) -> String {
    check_in(view(), policies, bound, peer)
}
fn check_in(view: Viewpoint, policies: Vec<Policy>, bound: &[(&str, &str)], peer: Option<&str>) -> String {
    let objects: Vec<Change> = policies.into_iter().map(Into::into).chain([web(bound).into()]).collect();
    let snap = Snapshot::empty(view).apply(&objects);
    let peer: Option<SpiffeId> = peer.map(|p| p.parse().expect("spiffe id"));
    let conn = inbound("10.0.0.1:999", "10.0.0.2:8080", peer.as_ref());
    let known = snap.find_workload("c//Pod/default/web").expect("known");
    let decision = authorize(&snap, known, &conn);
    agrees_with_oracle(&snap, known, &conn, &decision);
    // The same for a workload the index does not know, and by a stale object of the one it knows.
    let without = snap.apply(&[Change::WorkloadGone("c//Pod/default/web".into())]);
    agrees_with_oracle(&without, &web(bound), &conn, &authorize(&without, &web(bound), &conn));
    assert_eq!(authorize(&snap, &web(&[]), &conn), decision);
    short(&decision.verdict)
}
fn short(v: &Verdict) -> String {
    match v {
        Verdict::Allow(None) => "allow".into(),
        Verdict::Allow(Some(k)) => format!("allow {k}"),
        Verdict::Deny(r) if r.detail.is_empty() => r.reason.to_string(),
        Verdict::Deny(r) => format!("{} {}", r.reason, r.detail),
    }
}
/// What [`explain`] says must be what [`authorize`] decided.
fn agrees_with_oracle(snap: &Snapshot, w: &Workload, conn: &InboundConn<'_>, got: &Decision) {
    let all = explain(snap, w, conn);
    let first = |f: &dyn Fn(&Outcome) -> bool| all.iter().find(|e| f(&e.outcome)).map(|e| e.policy.clone());
    let enforced = |of: Action| move |o: &Outcome| matches!(o, Outcome::Matches { action, dry_run: false, .. } if *action == of);
    let any_allow = all.iter().any(|e| {
        matches!(
            e.outcome,
            Outcome::Matches { action: Action::Allow, dry_run: false, .. }
                | Outcome::NoMatch { action: Action::Allow, dry_run: false }
        )
    });
    let dry: Vec<PolicyKey> =
        all.iter().filter(|e| matches!(e.outcome, Outcome::Matches { dry_run: true, .. })).map(|e| e.policy.clone()).collect();
    assert_eq!(got.dry_run, dry);
    if let Some(key) = first(&|o| matches!(o, Outcome::Unusable { .. })) {
        assert!(short(&got.verdict).starts_with(&format!("policy_unusable {key}")), "{got:?} {all:?}");
    } else if let Some(key) = first(&|o| *o == Outcome::Unknown) {
        assert_eq!(short(&got.verdict), format!("policy_unknown {key}"));
    } else if let Some(key) = first(&enforced(Action::Deny)) {
        let Verdict::Deny(r) = &got.verdict else { panic!("{got:?} but {all:?}") };
        assert!(matches!(r.reason, Reason::PolicyDenied | Reason::PlaintextRefused) && *r.detail == key.to_string());
    } else if !any_allow {
        assert_eq!(got.verdict, Verdict::Allow(None));
    } else if first(&enforced(Action::Allow)).is_some() {
        // Any matching ALLOW policy may be named.
        let Verdict::Allow(Some(key)) = &got.verdict else { panic!("{got:?} but {all:?}") };
        assert!(all.iter().any(|e| e.policy == *key && enforced(Action::Allow)(&e.outcome)), "{got:?} {all:?}");
    } else {
        assert_eq!(short(&got.verdict), "not_allowed");
    }
}

const A: Option<&str> = Some("spiffe://cluster.local/ns/default/sa/a");
fn ns_policy(name: &str, action: Action, rules: Vec<Rule>) -> Policy {
    policy("default", name, Scope::Namespace, action, rules)
}
fn one(m: Match) -> Vec<Rule> {
    vec![rule(m)]
}
fn principals(of: &[&str]) -> Vec<Rule> {
    one(from_principals(of))
}

#[test]
fn no_policy_allows() {
    assert_eq!(check(vec![], &[], A), "allow");
    assert_eq!(check(vec![], &[], None), "allow");
}

#[test]
fn every_empty_case() {
    let clause = |matches| Rule { clauses: vec![Clause { matches }] };
    // (rules, whether they match)
    let table: [(Vec<Rule>, bool); 6] = [
        (vec![], false),
        (vec![Rule::default()], true),
        (vec![clause(vec![])], true),
        (vec![clause(vec![Match::default()])], false),
        (vec![clause(vec![Match::default(), from_principals(&["*"])])], true),
        (vec![Rule { clauses: vec![Clause::default(), Clause { matches: vec![Match::default()] }] }], false),
    ];
    for (rules, matches) in table {
        for scope in [Scope::Global, Scope::Namespace, Scope::Selector] {
            let bound: &[(&str, &str)] = if scope == Scope::Selector { &[("default", "p")] } else { &[] };
            let case = format!("{scope:?} {rules:?}");
            let allow = check(vec![policy("default", "p", scope, Action::Allow, rules.clone())], bound, A);
            assert_eq!(allow, if matches { "allow default/p" } else { "not_allowed" }, "{case}");
            let deny = check(vec![policy("default", "p", scope, Action::Deny, rules.clone())], bound, A);
            assert_eq!(deny, if matches { "policy_denied default/p" } else { "allow" }, "{case}");
        }
    }
}

#[test]
fn scopes_bind_only_their_workloads() {
    let deny_all = |ns, scope| vec![policy(ns, "p", scope, Action::Deny, vec![Rule::default()])];
    assert_eq!(check(deny_all("other", Scope::Namespace), &[], A), "allow");
    assert_eq!(check(deny_all("default", Scope::Selector), &[], A), "allow");
    assert_eq!(check(deny_all("istio-system", Scope::Global), &[], A), "policy_denied istio-system/p");
    assert_eq!(check(deny_all("istio-system", Scope::Selector), &[("istio-system", "p")], A), "policy_denied istio-system/p");
    // A policy named by the workload binds it whatever its scope says.
    assert_eq!(check(deny_all("other", Scope::Namespace), &[("other", "p")], A), "policy_denied other/p");
}

#[test]
fn order_deny_then_allow() {
    let both =
        || vec![ns_policy("yes", Action::Allow, vec![Rule::default()]), ns_policy("no", Action::Deny, principals(&["*/sa/a"]))];
    assert_eq!(check(both(), &[], A), "policy_denied default/no");
    assert_eq!(check(both(), &[], Some("spiffe://cluster.local/ns/default/sa/b")), "allow default/yes");
    let mut dry = ns_policy("dry", Action::Allow, vec![]);
    let PolicyBody::Rules { dry_run, .. } = &mut dry.body else { unreachable!() };
    *dry_run = true;
    assert_eq!(check(vec![dry], &[], A), "allow");
}

#[test]
fn unknown_and_unusable_deny() {
    let unusable = |scope| Policy {
        key: PolicyKey::new("default", "bad"),
        scope,
        body: PolicyBody::Unusable { why: "port 99999".into() },
        origin: None,
    };
    assert_eq!(check(vec![], &[("default", "gone")], A), "policy_unknown default/gone");
    assert_eq!(check(vec![unusable(Scope::Namespace)], &[], A), "policy_unusable default/bad: port 99999");
    assert_eq!(check(vec![unusable(Scope::Global)], &[], None), "policy_unusable default/bad: port 99999");
    assert_eq!(check(vec![unusable(Scope::Selector)], &[("default", "bad")], A), "policy_unusable default/bad: port 99999");
    assert_eq!(check(vec![unusable(Scope::Selector)], &[], A), "allow");
    let allow = ns_policy("yes", Action::Allow, vec![Rule::default()]);
    assert_eq!(check(vec![allow, unusable(Scope::Namespace)], &[], A), "policy_unusable default/bad: port 99999");
}

#[test]
fn plaintext_has_no_identity_at_all() {
    let matches = |m: Match| check(vec![ns_policy("p", Action::Allow, one(m))], &[], None) == "allow default/p";
    let mut m = Match::default();
    m.namespaces.set_any(vec![TextMatch::Prefix("".into()), TextMatch::Exact("".into()), TextMatch::Presence]);
    assert!(!matches(m));
    for t in [text("*"), TextMatch::Prefix("".into()), TextMatch::Suffix("".into())] {
        let mut m = Match::default();
        m.principals.set_any(vec![t.clone()]);
        assert!(!matches(m));
        let mut m = Match::default();
        m.trust_domains.set_any(vec![t]);
        assert!(!matches(m));
    }
    let mut m = Match::default();
    m.principals.set_none(vec![text("*")]);
    assert!(matches(m));
}

#[test]
fn strict_mode_is_named_as_such() {
    let mut m = Match::default();
    m.principals.set_none(vec![text("*")]);
    let converted = |ns: &str, name: &str| vec![policy(ns, name, Scope::Selector, Action::Deny, one(m.clone()))];
    for (ns, name) in [("istio-system", "istio_converted_static_strict"), ("default", "converted_peer_authentication_x")] {
        assert_eq!(check(converted(ns, name), &[(ns, name)], None), format!("plaintext_refused {ns}/{name}"));
        assert_eq!(check(converted(ns, name), &[(ns, name)], A), "allow");
    }
    assert_eq!(check(converted("default", "mine"), &[("default", "mine")], None), "policy_denied default/mine");
    let fake = "istio_converted_static_strict";
    assert_eq!(check(converted("default", fake), &[("default", fake)], None), format!("policy_denied default/{fake}"));
}

#[test]
fn every_kind() {
    let net = |s: &str| s.parse().expect("net");
    let build = |f: &dyn Fn(&mut Match)| {
        let mut m = Match::default();
        f(&mut m);
        m
    };
    let table: Vec<(Match, bool)> = vec![
        (build(&|m| m.namespaces.set_any(vec![text("default")])), true),
        (build(&|m| m.namespaces.set_any(vec![text("def*")])), true),
        (build(&|m| m.namespaces.set_any(vec![text("x"), text("*ult")])), true),
        (build(&|m| m.namespaces.set_any(vec![text("x")])), false),
        (build(&|m| m.namespaces.set_none(vec![text("default")])), false),
        (build(&|m| m.service_accounts.set_any(vec![("default".into(), "a".into())])), true),
        (build(&|m| m.service_accounts.set_any(vec![("other".into(), "a".into())])), false),
        (build(&|m| m.service_accounts.set_none(vec![("default".into(), "a".into())])), false),
        (from_principals(&["cluster.local/ns/default/sa/a"]), true),
        (from_principals(&["spiffe://cluster.local/ns/default/sa/a"]), true),
        (from_principals(&["cluster.local/ns/default/*"]), true),
        (from_principals(&["cluster.local/ns/def*"]), true),
        (from_principals(&["clust*"]), true),
        (from_principals(&["*/ns/default/sa/a"]), true),
        (from_principals(&["*local/ns/default/sa/a"]), true),
        (from_principals(&["*fault/sa/a"]), true),
        (from_principals(&["*"]), true),
        (from_principals(&["cluster.local/ns/default/sa/ab", "nonsense"]), false),
        (from_principals(&["cluster.local/ns/other/*", "*/ns/x/sa/a"]), false),
        (build(&|m| m.trust_domains.set_any(vec![text("cluster.local")])), true),
        (build(&|m| m.trust_domains.set_any(vec![text("other.org")])), false),
        (build(&|m| m.trust_domains.set_none(vec![text("cluster.*")])), false),
        (build(&|m| m.source_ips.set_any(vec![net("10.0.0.1/32")])), true),
        (build(&|m| m.source_ips.set_any(vec![net("10.0.0.0/8")])), true),
        (build(&|m| m.source_ips.set_any(vec![net("10.0.0.2/32")])), false),
        (build(&|m| m.source_ips.set_none(vec![net("10.0.0.0/24")])), false),
        (build(&|m| m.destination_ips.set_any(vec![net("10.0.0.2/32")])), true),
        (build(&|m| m.destination_ips.set_any(vec![net("fd00::/8")])), false),
        (build(&|m| m.destination_ports.set_any(vec![80, 8080])), true),
        (build(&|m| m.destination_ports.set_any(vec![15008])), false),
        (build(&|m| m.destination_ports.set_none(vec![8080])), false),
        // AND over kinds.
        (
            build(&|m| {
                m.namespaces.set_any(vec![text("default")]);
                m.destination_ports.set_any(vec![1]);
            }),
            false,
        ),
    ];
    for (m, expected) in table {
        let got = check(vec![ns_policy("p", Action::Allow, one(m.clone()))], &[], A);
        assert_eq!(got == "allow default/p", expected, "{m:?} gave {got}");
    }
}

#[test]
fn aliases_are_names_of_one_trust_domain() {
    let td = |s: &str| TrustDomain::parse(s).expect("td");
    let view = Viewpoint { trust_domain: td("zamaz.org"), trust_domain_aliases: vec![td("cluster.local")], ..view() };
    let allowed = |rules: Vec<Rule>, peer: &str| {
        check_in(view.clone(), vec![ns_policy("p", Action::Allow, rules)], &[], Some(peer)) == "allow default/p"
    };
    let (own, alias, foreign) =
        ("spiffe://zamaz.org/ns/default/sa/a", "spiffe://cluster.local/ns/default/sa/a", "spiffe://evil.org/ns/default/sa/a");
    for written in ["zamaz.org", "cluster.local"] {
        for pattern in ["ns/default/sa/a", "ns/default/*"] {
            let rules = || principals(&[&format!("{written}/{pattern}")]);
            assert!(allowed(rules(), own) && allowed(rules(), alias) && !allowed(rules(), foreign));
        }
        let mut m = Match::default();
        m.trust_domains.set_any(vec![text(written)]);
        assert!(allowed(one(m.clone()), own) && allowed(one(m.clone()), alias) && !allowed(one(m), foreign));
    }
    // `cluster.local` is no alias unless listed.
    let unlisted = Viewpoint { trust_domain: td("zamaz.org"), ..self::view() };
    let rules = principals(&["cluster.local/ns/default/sa/a"]);
    assert_eq!(check_in(unlisted, vec![ns_policy("p", Action::Allow, rules)], &[], Some(own)), "not_allowed");
}

#[test]
fn many_selector_policies_are_found_by_the_index() {
    let names: Vec<String> = (0..40).map(|i| format!("p{i:02}")).collect();
    let bound: Vec<(&str, &str)> = names.iter().map(|n| ("default", n.as_str())).collect();
    let mut policies: Vec<Policy> = names
        .iter()
        .map(|n| policy("default", n, Scope::Selector, Action::Allow, principals(&[&format!("cluster.local/ns/x/sa/{n}")])))
        .collect();
    // Of the same peer, but bound to somebody else.
    policies.push(policy("default", "q", Scope::Selector, Action::Deny, principals(&["cluster.local/ns/x/sa/p07"])));
    // Bound through the name list, filed under another namespace's policies.
    policies.push(policy("other", "far", Scope::Namespace, Action::Deny, principals(&["cluster.local/ns/x/sa/p09"])));
    let bound: Vec<(&str, &str)> = bound.into_iter().chain([("other", "far")]).collect();
    let peer = |n: &str| format!("spiffe://cluster.local/ns/x/sa/{n}");
    assert_eq!(check(policies.clone(), &bound, Some(&peer("p07"))), "allow default/p07");
    assert_eq!(check(policies.clone(), &bound, Some(&peer("p09"))), "policy_denied other/far");
    assert_eq!(check(policies, &bound, Some(&peer("zz"))), "not_allowed");
}

#[test]
fn explain_names_object_and_rule() {
    let mut p = ns_policy("p", Action::Deny, vec![rule(from_principals(&["x"])), Rule::default()]);
    let origin = Arc::new(Origin { place: "a.yaml".into(), line: 3, object: "AuthorizationPolicy default/p".into() });
    p.origin = Some(Arc::clone(&origin));
    let w = web(&[("default", "gone")]);
    let snap = mesh(vec![p.into(), w.clone().into()]);
    let got = explain(&snap, &w, &inbound("10.0.0.1:1", "10.0.0.2:80", None));
    let expected = [
        Explained { policy: PolicyKey::new("default", "gone"), origin: None, outcome: Outcome::Unknown },
        Explained {
            policy: PolicyKey::new("default", "p"),
            origin: Some(origin),
            outcome: Outcome::Matches { action: Action::Deny, dry_run: false, rule: 1 },
        },
    ];
    assert_eq!(got, expected);
}

fn any_text() -> impl Strategy<Value = TextMatch> {
    prop::sample::select(vec!["a", "b", "ns1", "ns*", "*1", "*", "td1", "td*"]).prop_map(text)
}
fn any_principal() -> impl Strategy<Value = TextMatch> {
    prop::sample::select(vec![
        "td1/ns/ns1/sa/a",
        "td2/ns/ns1/sa/a",
        "td3/ns/ns2/sa/b",
        "td1/ns/ns1/*",
        "td1/ns/n*",
        "*/ns/ns1/sa/a",
        "*1/sa/a",
        "*/sa/b",
        "*",
        "odd",
        "spiffe://td1/ns/ns2/sa/b",
    ])
    .prop_map(text)
}
fn any_values<T: std::fmt::Debug + Clone>(of: impl Strategy<Value = T> + Clone) -> impl Strategy<Value = Values<T>> {
    let list = prop::collection::vec(of, 1..3);
    prop_oneof![
        5 => Just(Values::default()),
        3 => list.clone().prop_map(|any| Values::new(any, vec![])),
        1 => list.clone().prop_map(|none| Values::new(vec![], none)),
        1 => (list.clone(), list).prop_map(|(any, none)| Values::new(any, none)),
    ]
}
fn any_match() -> impl Strategy<Value = Match> {
    let account = prop::sample::select(vec![("ns1", "a"), ("ns2", "b")]).prop_map(|(n, s)| (n.into(), s.into()));
    let net = prop::sample::select(vec!["10.0.0.1/32", "10.0.0.0/24", "10.0.0.2/32"]).prop_map(|n| n.parse().expect("net"));
    (
        any_values(any_text().boxed()),
        any_values(account.boxed()),
        any_values(any_principal().boxed()),
        any_values(any_text().boxed()),
        any_values(net.boxed()),
        any_values(prop::sample::select(vec![80_u16, 8080])),
    )
        .prop_map(|(namespaces, service_accounts, principals, trust_domains, source_ips, destination_ports)| Match {
            namespaces,
            service_accounts,
            principals,
            trust_domains,
            source_ips,
            destination_ips: Values::default(),
            destination_ports,
        })
}
pub(crate) fn any_policy() -> impl Strategy<Value = Policy> {
    let clause = prop::collection::vec(any_match(), 0..3).prop_map(|matches| Clause { matches });
    let rule = prop::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let rules = prop::collection::vec(rule, 0..3);
    let action = prop::sample::select(vec![Action::Allow, Action::Deny]);
    let body = prop_oneof![
        30 => (action, prop::bool::weighted(0.2), rules)
            .prop_map(|(action, dry_run, rules)| PolicyBody::Rules { action, dry_run, rules }),
        1 => Just(PolicyBody::Unusable { why: "why".into() }),
    ];
    let scope = prop::sample::select(vec![Scope::Global, Scope::Namespace, Scope::Selector, Scope::Selector]);
    (0..2_u8, 0..12_u8, scope, body).prop_map(|(ns, name, scope, body)| Policy {
        key: PolicyKey::new(if ns == 0 { "ns1" } else { "ns2" }, &format!("p{name}")),
        scope,
        body,
        origin: None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]
    /// Through the index, bound or not, the verdict is the one of evaluating everything.
    #[test]
    fn index_equals_evaluating_everything(
        policies in prop::collection::vec(any_policy(), 0..24),
        names in prop::collection::vec((0..2_u8, 0..12_u8), 0..14),
        only_known in any::<bool>(),
    ) {
        let td = |s: &str| TrustDomain::parse(s).expect("td");
        let view = Viewpoint { trust_domain: td("td1"), trust_domain_aliases: vec![td("td2")], ..view() };
        let before = Snapshot::empty(view).apply(&policies.iter().cloned().map(Change::from).collect::<Vec<_>>());
        let mut w = pod("ns1", "web", "10.0.0.2");
        w.policies = names.iter().map(|(ns, n)| PolicyKey::new(if *ns == 0 { "ns1" } else { "ns2" }, &format!("p{n}"))).collect();
        if only_known {
            w.policies = w.policies.iter().filter(|k| before.find_policy(k).is_some()).cloned().collect();
        }
        let snap = before.apply(&[w.clone().into()]);
        let known = snap.find_workload(&w.uid).expect("known");
        let peers = [None, Some(id("td1", "ns1", "a")), Some(id("td2", "ns1", "a")), Some(id("td3", "ns2", "b")), Some(id("td1", "ns2", "c"))];
        for peer in &peers {
            for (client, dst) in [("10.0.0.1:5", "10.0.0.2:80"), ("10.9.0.1:5", "10.0.0.2:8080")] {
                let conn = inbound(client, dst, peer.as_ref());
                agrees_with_oracle(&snap, known, &conn, &authorize(&snap, known, &conn));
                agrees_with_oracle(&before, &w, &conn, &authorize(&before, &w, &conn));
            }
        }
        prop_assert_eq!(snap.view().network.clone(), Network::default());
    }
}
