use super::*;
use crate::change::Change;
use crate::fixture::{from_principals, id, ip, key, sock, text};
use crate::id::TrustDomain;
use crate::l7::path::{PathNormalization, normalize};
use crate::l7::policy::{PathPattern, PolicyTarget, TemplateError};
use crate::l7::text::StringMatch;
use crate::policy::{Match, PolicyKey};
use crate::snapshot::Viewpoint;
use hashbrown::Equivalent;
use ipnet::IpNet;
use proptest::prelude::*;
use std::sync::Arc;

// --- what is asked -------------------------------------------------------------------------------------------------------

#[derive(Clone, Debug)]
struct Asked {
    peer: Option<SpiffeId>,
    client: &'static str,
    remote: &'static str,
    port: u16,
    sni: Option<&'static str>,
    tcp: bool,
    method: &'static str,
    authority: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    token: Option<Jwt>,
}
impl Default for Asked {
    fn default() -> Self {
        Self {
            peer: Some(id("cluster.local", "shop", "web")),
            client: "10.0.0.1:999",
            remote: "10.0.0.1",
            port: 80,
            sni: None,
            tcp: false,
            method: "GET",
            authority: "api.shop",
            path: "/",
            headers: Vec::new(),
            token: None,
        }
    }
}
#[derive(Clone, Debug)]
struct Jwt {
    iss: &'static str,
    sub: &'static str,
    claims: Vec<(Vec<&'static str>, Vec<&'static str>)>,
}
impl Claims for Jwt {
    fn matches(&self, path: &[Arc<str>], what: &StringMatch) -> bool {
        let path: Vec<&str> = path.iter().map(|p| &**p).collect();
        self.claims.iter().any(|(at, values)| *at == path && values.iter().any(|v| what.matches(v)))
    }
    fn hash_claim(&self, _: &[Arc<str>], _: &mut dyn std::hash::Hasher) {}
}
impl Token for Jwt {
    fn issuer(&self) -> &str {
        self.iss
    }
    fn subject(&self) -> &str {
        self.sub
    }
}
impl Asked {
    fn header_map(&self) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in &self.headers {
            map.append(HeaderName::from_static(name), value.parse().expect("a header value"));
        }
        map
    }
    fn with<T>(&self, f: impl FnOnce(&L7Facts<'_>) -> T) -> T {
        let headers = self.header_map();
        let http = HttpFacts {
            method: self.method,
            authority: self.authority,
            path: self.path,
            headers: &headers,
            token: self.token.as_ref().map(|t| t as &dyn Token),
        };
        f(&L7Facts {
            peer: self.peer.as_ref(),
            client: sock(self.client),
            remote: ip(self.remote),
            destination: SocketAddr::new(ip("10.96.0.1"), self.port),
            sni: self.sni,
            http: (!self.tcp).then_some(http),
        })
    }
}
pub(crate) fn tcp_facts(peer: &SpiffeId) -> L7Facts<'_> {
    L7Facts {
        peer: Some(peer),
        client: sock("10.0.0.1:999"),
        remote: ip("10.0.0.1"),
        destination: sock("10.96.0.1:80"),
        sni: None,
        http: None,
    }
}

// --- policies ------------------------------------------------------------------------------------------------------------

fn policy(name: &str, action: L7Action, rules: Vec<L7Rule>) -> Arc<L7Policy> {
    let body = L7Body::Rules { action, dry_run: false, rules };
    Arc::new(L7Policy { key: PolicyKey::new("shop", name), body, origin: None })
}
fn texts(of: &[&str]) -> Vec<TextMatch> {
    of.iter().map(|t| text(t)).collect()
}
fn any_of(of: &[&str]) -> Values<TextMatch> {
    Values::new(texts(of), vec![])
}
fn none_of(of: &[&str]) -> Values<TextMatch> {
    Values::new(vec![], texts(of))
}
fn paths(any: &[&str], none: &[&str]) -> Values<PathPattern> {
    let parse = |list: &[&str]| list.iter().map(|p| PathPattern::parse(p).expect("a path")).collect();
    Values::new(parse(any), parse(none))
}
fn from(m: Match) -> L7Source {
    L7Source { peer: m, ..L7Source::default() }
}
fn to(o: Operation) -> Vec<L7Rule> {
    vec![L7Rule::new(vec![], vec![o], vec![])]
}
fn when(c: Condition) -> Vec<L7Rule> {
    vec![L7Rule::new(vec![], vec![], vec![c])]
}
fn everything() -> Vec<L7Rule> {
    vec![L7Rule::default()]
}
fn snapshot(view: Viewpoint, bound: Vec<(PolicyTarget, Vec<Arc<L7Policy>>)>) -> Snapshot {
    let changes: Vec<Change> = bound.into_iter().map(|(t, p)| Change::L7Policies(t, Arc::new(L7Policies::new(p)))).collect();
    Snapshot::empty(view).apply(&changes)
}
fn api() -> ServiceKey {
    key("shop", "api")
}
fn waypoint() -> GatewayKey {
    GatewayKey::new("shop", "waypoint")
}
/// `allow`, `allow name`, or the reason with the details.
fn short(v: &L7Verdict<'_>) -> String {
    match v {
        L7Verdict::Allow(None) => "allow".into(),
        L7Verdict::Allow(Some(p)) => format!("allow {}", p.key.name),
        L7Verdict::Deny(d) => {
            let details = d.details();
            let what = details.strip_prefix("rbac_access_denied_matched_policy").expect("the details' name");
            format!("{} {what}", d.reason)
        }
    }
}
fn judge_in(snap: &Snapshot, asked: &Asked) -> String {
    let (service, gateway) = (api(), waypoint());
    let scope = PolicyScope { service: Some(&service), namespace: Some("shop"), gateway: Some(&gateway), waypoint: true };
    asked.with(|facts| {
        let in_scope = InScope::of(snap, &scope);
        let asks = in_scope.custom(snap, facts).next();
        let asks = asks.map(|m| L7Verdict::Deny(Denial { reason: Reason::NoAuthorizer, matched: Some(m) }));
        short(&asks.unwrap_or_else(|| in_scope.judge(snap, facts).verdict))
    })
}
fn judge(policies: &[Arc<L7Policy>], asked: &Asked) -> String {
    judge_in(&snapshot(Viewpoint::default(), vec![(PolicyTarget::Service(api()), policies.to_vec())]), asked)
}
/// Whether a rule matches, asked by an ALLOW and by a DENY policy, which must agree.
fn matches(rules: &[L7Rule], asked: &Asked) -> bool {
    let allow = judge(&[policy("p", L7Action::Allow, rules.to_vec())], asked) == "allow p";
    let deny = judge(&[policy("p", L7Action::Deny, rules.to_vec())], asked) != "allow";
    assert_eq!(allow, deny, "{rules:?} {asked:?}");
    allow
}

// --- tables --------------------------------------------------------------------------------------------------------------

#[test]
fn order_and_empty_cases() {
    use L7Action::{Allow, Audit, Deny};
    let custom = || L7Action::Custom { provider: "x".into() };
    let asked = Asked::default();
    let not_get = || to(Operation { methods: none_of(&["GET"]), ..Operation::default() });
    let rule_two = || vec![not_get().remove(0), L7Rule::default()];
    let table: Vec<(Vec<Arc<L7Policy>>, &str)> = vec![
        (vec![], "allow"),
        (vec![policy("a", Allow, vec![])], "not_allowed [none]"),
        (vec![policy("a", Allow, everything())], "allow a"),
        (vec![policy("a", Allow, not_get())], "not_allowed [none]"),
        (vec![policy("a", Allow, not_get()), policy("b", Allow, everything())], "allow b"),
        (vec![policy("d", Deny, vec![])], "allow"),
        (vec![policy("d", Deny, not_get())], "allow"),
        (vec![policy("d", Deny, everything())], "policy_denied [ns[shop]-policy[d]-rule[0]]"),
        (vec![policy("d", Deny, rule_two())], "policy_denied [ns[shop]-policy[d]-rule[1]]"),
        (vec![policy("a", Allow, everything()), policy("d", Deny, everything())], "policy_denied [ns[shop]-policy[d]-rule[0]]"),
        (vec![policy("d", Deny, not_get()), policy("a", Allow, vec![])], "not_allowed [none]"),
        (vec![policy("x", Audit, everything())], "allow"),
        (vec![policy("x", Audit, everything()), policy("a", Allow, vec![])], "not_allowed [none]"),
        (vec![policy("c", custom(), everything())], "no_authorizer [ns[shop]-policy[c]-rule[0]]"),
        (vec![policy("c", custom(), not_get())], "allow"),
        (
            vec![policy("a", Deny, everything()), policy("c", custom(), everything())],
            "no_authorizer [ns[shop]-policy[c]-rule[0]]",
        ),
    ];
    for (policies, verdict) in table {
        assert_eq!(judge(&policies, &asked), verdict, "{policies:?}");
    }
}

#[test]
fn what_cannot_be_used_refuses_whatever_else_is_said() {
    let broken = Arc::new(L7Policy {
        key: PolicyKey::new("shop", "z"),
        body: L7Body::Unusable { why: "spec.rules[0]: nonsense".into() },
        origin: None,
    });
    let policies = [broken, policy("a", L7Action::Allow, everything())];
    assert_eq!(judge(&policies, &Asked::default()), "policy_unusable [ns[shop]-policy[z]]");
    for target in [
        PolicyTarget::Service(api()),
        PolicyTarget::Gateway(waypoint()),
        PolicyTarget::Waypoints,
        PolicyTarget::Namespace("shop".into()),
        PolicyTarget::Mesh,
    ] {
        let snap = snapshot(Viewpoint::default(), vec![(target, policies.to_vec())]);
        let service = api();
        let scope = PolicyScope { service: Some(&service), namespace: Some("shop"), gateway: None, waypoint: true };
        Asked::default().with(|facts| {
            let gateway = waypoint();
            let scope = PolicyScope { gateway: Some(&gateway), ..scope };
            let in_scope = InScope::of(&snap, &scope);
            let judgement = in_scope.judge(&snap, facts);
            let L7Verdict::Deny(denial) = judgement.verdict else { panic!("let through") };
            let refusal = denial.refusal();
            assert_eq!((refusal.reason, &*refusal.detail), (Reason::PolicyUnusable, "shop/z: spec.rules[0]: nonsense"));
        });
    }
}

#[test]
fn a_policy_binds_its_target_and_nothing_else() {
    let other = || key("shop", "other");
    let deny = vec![policy("d", L7Action::Deny, everything())];
    let targets = [
        (PolicyTarget::Service(api()), "service"),
        (PolicyTarget::Service(other()), ""),
        (PolicyTarget::Service(key("bank", "api")), ""),
        (PolicyTarget::Gateway(waypoint()), "gateway"),
        (PolicyTarget::Gateway(GatewayKey::new("shop", "ingress")), ""),
        (PolicyTarget::Gateway(GatewayKey::new("bank", "waypoint")), ""),
        (PolicyTarget::Waypoints, "waypoint"),
        (PolicyTarget::Namespace("shop".into()), "service gateway workload"),
        (PolicyTarget::Namespace("bank".into()), ""),
        (PolicyTarget::Mesh, "service gateway waypoint workload"),
    ];
    let (service, gateway) = (api(), waypoint());
    let nothing = PolicyScope { service: None, namespace: None, gateway: None, waypoint: false };
    let scopes = [
        ("service", PolicyScope { service: Some(&service), namespace: Some("shop"), ..nothing }),
        ("workload", PolicyScope { namespace: Some("shop"), ..nothing }),
        ("gateway", PolicyScope { gateway: Some(&gateway), ..nothing }),
        ("waypoint", PolicyScope { waypoint: true, ..nothing }),
    ];
    for (target, binds) in targets {
        let snap = snapshot(Viewpoint::default(), vec![(target.clone(), deny.clone())]);
        for (name, scope) in &scopes {
            let verdict = Asked::default().with(|f| short(&InScope::of(&snap, scope).judge(&snap, f).verdict));
            assert_eq!(verdict != "allow", binds.split(' ').any(|b| b == *name), "{target} {name}");
        }
    }
}

#[test]
fn targets_add_up() {
    let one = |p| vec![p];
    let snap = snapshot(
        Viewpoint::default(),
        vec![
            (PolicyTarget::Service(api()), one(policy("s", L7Action::Allow, everything()))),
            (
                PolicyTarget::Waypoints,
                one(policy("w", L7Action::Deny, to(Operation { paths: paths(&["/admin*"], &[]), ..Operation::default() }))),
            ),
        ],
    );
    assert_eq!(judge_in(&snap, &Asked::default()), "allow s");
    assert_eq!(judge_in(&snap, &Asked { path: "/admin/x", ..Asked::default() }), "policy_denied [ns[shop]-policy[w]-rule[0]]");
}

#[test]
fn operations() {
    let asked = |method, authority, path| Asked { method, authority, path, ..Asked::default() };
    let method =
        |any: &[&str], none: &[&str]| Operation { methods: Values::new(texts(any), texts(none)), ..Operation::default() };
    let host = |any: &[&str], none: &[&str]| Operation { hosts: Values::new(texts(any), texts(none)), ..Operation::default() };
    let path = |any: &[&str], none: &[&str]| Operation { paths: paths(any, none), ..Operation::default() };
    let port = |any: &[u16], none: &[u16]| Operation { ports: Values::new(any.to_vec(), none.to_vec()), ..Operation::default() };
    let get = asked("GET", "Api.Shop:8080", "/v1/orders/7");
    for (operation, holds) in [
        (method(&["GET"], &[]), true),
        (method(&["get"], &[]), false),
        (method(&["POST", "G*"], &[]), true),
        (method(&[], &["GET"]), false),
        (method(&["*"], &["POST"]), true),
        (host(&["api.shop"], &[]), true),
        (host(&["API.SHOP:8080"], &[]), true),
        (host(&["api.shop:80"], &[]), false),
        (host(&["*.shop"], &[]), true),
        (host(&["*.SHOP:8080"], &[]), true),
        (host(&["api.*"], &[]), true),
        (host(&["*"], &[]), true),
        (host(&["shop"], &[]), false),
        (host(&[], &["api.shop"]), false),
        (host(&["*.shop"], &["api.shop:9"]), true),
        (path(&["/v1/orders/7"], &[]), true),
        (path(&["/v1/*"], &[]), true),
        (path(&["*/7"], &[]), true),
        (path(&["*"], &["/v2/*"]), true),
        (path(&[], &["/v1/orders/{*}"]), false),
        (path(&["/V1/*"], &[]), false),
        (port(&[80], &[]), true),
        (port(&[8080], &[]), false),
        (port(&[], &[80]), false),
        (Operation { methods: any_of(&["GET"]), ..path(&["/v2*"], &[]) }, false),
        (Operation { methods: any_of(&["GET"]), ..path(&["/v1*"], &[]) }, true),
        (Operation::default(), true),
    ] {
        assert_eq!(matches(&to(operation.clone()), &get), holds, "{operation:?}");
    }
    // Operations are alternatives.
    let rule = L7Rule::new(vec![], vec![method(&["POST"], &[]), path(&["/v1*"], &[])], vec![]);
    assert!(matches(&[rule], &get));
}

#[test]
fn one_host_has_many_spellings() {
    let named = to(Operation { hosts: any_of(&["admin.shop"]), ..Operation::default() });
    for authority in ["admin.shop", "ADMIN.shop", "admin.shop:80", "admin.shop.", "admin.shop.:80", "admin.shop:"] {
        assert!(matches(&named, &Asked { authority, ..Asked::default() }), "{authority}");
    }
    for authority in
        ["", "xadmin.shop", "admin.shop.evil", "admin.shop@evil", "admin.shop:80:80", "admin.shop..", "shop", "[::1]:80"]
    {
        assert!(!matches(&named, &Asked { authority, ..Asked::default() }), "{authority}");
    }
    let v6 = to(Operation { hosts: any_of(&["[::1]"]), ..Operation::default() });
    assert!(matches(&v6, &Asked { authority: "[::1]:80", ..Asked::default() }));
    assert!(matches(&v6, &Asked { authority: "[::1]", ..Asked::default() }));
}

#[test]
fn templates() {
    for (template, hits, misses) in [
        ("/foo/{*}", &["/foo/bar", "/foo/b.c"][..], &["/foo/", "/foo", "/foo/bar/", "/foo/bar/baz", "/foo//", "/x/bar"][..]),
        ("/{*}", &["/a"], &["/", "/a/", "/a/b"]),
        ("/{**}", &["/", "/a", "/a/b", "//"], &[]),
        ("/foo/{**}", &["/foo/", "/foo/a", "/foo/a/b/"], &["/foo", "/fooa", "/x/foo/a"]),
        ("/foo/{**}/", &["/foo/bar/", "/foo/a/b.txt/", "/foo//"], &["/foo/bar", "/foo/", "/foo"]),
        ("/foo/{**}/bar", &["/foo/a/bar", "/foo/a/b/bar", "/foo//bar"], &["/foo/bar", "/foo/a/bar/", "/foo/abar"]),
        ("/foo/{*}/bar/{**}", &["/foo/buzz/bar/", "/foo/buzz/bar/baz/x"], &["/foo/buzz/bar", "/foo//bar/x", "/foo/a/b/bar/x"]),
        ("/{*}/x/{*}/", &["/a/x/b/"], &["/a/x/b", "/a/x//", "/a/y/b/", "/a/x/b/c"]),
    ] {
        let pattern = PathPattern::parse(template).expect("a template");
        for path in hits {
            assert!(pattern.matches(path), "{template} {path}");
        }
        for path in misses {
            assert!(!pattern.matches(path), "{template} {path}");
        }
        assert!(!pattern.matches("") && !pattern.matches("foo/bar"));
    }
    for (text, error) in [
        ("", TemplateError::Empty),
        ("/a*b", TemplateError::Star),
        ("*a*", TemplateError::Star),
        ("foo/{*}", TemplateError::NotAbsolute),
        ("/*/baz/{*}", TemplateError::Mixed),
        ("/foo/{*}*", TemplateError::Mixed),
        ("/foo/{*}.txt", TemplateError::Segment),
        ("/foo/{***}", TemplateError::Mixed),
        ("/foo/{id}", TemplateError::Segment),
        ("/foo/{", TemplateError::Segment),
        ("/{**}/foo/{*}", TemplateError::AfterRest),
        ("/{**}/{**}", TemplateError::AfterRest),
        ("/{**}/{x}", TemplateError::Segment),
    ] {
        assert_eq!(PathPattern::parse(text), Err(error), "{text}");
    }
}

#[test]
fn path_tricks_end_where_the_path_is() {
    let admin = || to(Operation { paths: paths(&["/admin", "/admin/*"], &[]), ..Operation::default() });
    let hit = |mode, raw: &str| {
        let path = normalize(mode, raw).expect("a path").into_owned();
        // The facts borrow for the life of the test.
        matches(&admin(), &Asked { path: Box::leak(path.into_boxed_str()), ..Asked::default() })
    };
    use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes};
    for (raw, base, merge, decode) in [
        ("/admin", true, true, true),
        ("/admin/x", true, true, true),
        ("/./admin", true, true, true),
        ("/x/../admin", true, true, true),
        ("/x/%2e%2e/admin", true, true, true),
        ("/x/%2E./admin/y", true, true, true),
        ("\\admin", true, true, true),
        ("/x\\..\\admin", true, true, true),
        ("/%61dmin", true, true, true),
        ("//admin", false, true, true),
        ("/admin//x", true, true, true),
        ("/%2fadmin", false, false, true),
        ("/x%2f..%2fadmin", false, false, true),
        ("/x%5c..%5cadmin", false, false, true),
        // Parameters of a dot segment do not save it from being one.
        ("/x/..;/admin", true, true, true),
        ("/Admin", false, false, false),
        ("/admin;x", false, false, false),
    ] {
        if raw.starts_with('/') {
            assert_eq!((hit(Base, raw), hit(MergeSlashes, raw), hit(DecodeAndMergeSlashes, raw)), (base, merge, decode), "{raw}");
        } else {
            assert!(normalize(Base, raw).is_err(), "{raw}");
        }
    }
}

#[test]
fn sources() {
    let aliased = Viewpoint {
        trust_domain_aliases: vec![TrustDomain::parse("old.example").expect("a trust domain")],
        ..Viewpoint::default()
    };
    let namespaces = |any: &[&str]| Match { namespaces: any_of(any), ..Match::default() };
    let accounts =
        |ns: &str, sa: &str| Match { service_accounts: Values::new(vec![(ns.into(), sa.into())], vec![]), ..Match::default() };
    let blocks = |any: &str| Match { source_ips: Values::new(vec![any.parse().expect("a range")], vec![]), ..Match::default() };
    let not_principals = |none: &[&str]| Match { principals: none_of(none), ..Match::default() };
    let domains = |any: &[&str]| Match { trust_domains: any_of(any), ..Match::default() };
    let web = Some(id("cluster.local", "shop", "web"));
    let old = Some(id("old.example", "shop", "web"));
    let foreign = Some(id("other.example", "shop", "web"));
    for (m, hits, misses) in [
        (from_principals(&["cluster.local/ns/shop/sa/web"]), vec![&web, &old], vec![&foreign, &None]),
        (from_principals(&["spiffe://cluster.local/ns/shop/sa/web"]), vec![&web, &old], vec![&foreign, &None]),
        (from_principals(&["*/sa/web"]), vec![&web, &old, &foreign], vec![&None]),
        (from_principals(&["*"]), vec![&web, &old, &foreign], vec![&None]),
        (not_principals(&["*"]), vec![&None], vec![&web, &foreign]),
        (not_principals(&["old.example/*"]), vec![&foreign, &None], vec![&web, &old]),
        (namespaces(&["shop"]), vec![&web, &foreign], vec![&None]),
        (namespaces(&["ban*"]), vec![], vec![&web, &None]),
        (accounts("shop", "web"), vec![&web, &foreign], vec![&None]),
        (accounts("bank", "web"), vec![], vec![&web]),
        (domains(&["cluster.local"]), vec![&web, &old], vec![&foreign, &None]),
        (blocks("10.0.0.0/24"), vec![&web, &None], vec![]),
        (blocks("10.1.0.0/24"), vec![], vec![&web, &None]),
    ] {
        let rules = vec![L7Rule::new(vec![from(m.clone())], vec![], vec![])];
        let snap = snapshot(aliased.clone(), vec![(PolicyTarget::Service(api()), vec![policy("p", L7Action::Allow, rules)])]);
        let hit = |peer: &Option<SpiffeId>| judge_in(&snap, &Asked { peer: peer.clone(), ..Asked::default() }) == "allow p";
        assert!(hits.into_iter().all(hit), "{m:?}");
        assert!(!misses.into_iter().any(hit), "{m:?}");
    }
    let remote =
        |any: &str| L7Source { remote_ips: Values::new(vec![any.parse().expect("a range")], vec![]), ..L7Source::default() };
    let far = Asked { remote: "192.0.2.7", ..Asked::default() };
    assert!(matches(&[L7Rule::new(vec![remote("192.0.2.0/24")], vec![], vec![])], &far));
    assert!(!matches(&[L7Rule::new(vec![remote("10.0.0.0/24")], vec![], vec![])], &far));
    assert!(matches(&[L7Rule::new(vec![remote("10.0.0.0/24"), from(namespaces(&["shop"]))], vec![], vec![])], &far));
}

#[test]
fn request_principals_need_a_token() {
    let source = |values| vec![L7Rule::new(vec![L7Source { request_principals: values, ..L7Source::default() }], vec![], vec![])];
    let token = |iss, sub| Asked { token: Some(Jwt { iss, sub, claims: vec![] }), ..Asked::default() };
    let (joe, none) = (token("https://x", "joe"), Asked::default());
    let nested = token("https://x/tenant", "joe");
    let forged = token("https://x", "tenant/joe");
    for (values, of_joe, of_nested, of_forged, of_none) in [
        (any_of(&["*"]), true, true, true, false),
        (none_of(&["*"]), false, false, false, true),
        (any_of(&["https://x/joe"]), true, false, false, false),
        (none_of(&["https://x/joe"]), false, true, true, true),
        (any_of(&["https://x/tenant/joe"]), false, true, false, false),
        (any_of(&["https://x/tenant/*"]), false, true, false, false),
        (any_of(&["https://x/*"]), true, true, true, false),
        (any_of(&["https://*"]), true, true, true, false),
        (any_of(&["*/joe"]), true, true, false, false),
        (any_of(&["*oe"]), true, true, true, false),
        (any_of(&["*x/joe"]), true, false, false, false),
    ] {
        for rules in [source(values.clone()), when(Condition::RequestPrincipal(values.clone()))] {
            let got = [&joe, &nested, &forged, &none].map(|asked| matches(&rules, asked));
            assert_eq!(got, [of_joe, of_nested, of_forged, of_none], "{values:?}");
        }
    }
    assert!(!matches(&source(any_of(&["*"])), &token("", "joe")) && !matches(&source(any_of(&["*"])), &token("x", "")));
}

#[test]
fn claims() {
    let claims = vec![(vec!["aud"], vec!["a", "b"]), (vec!["azp"], vec!["cli"]), (vec!["realm", "roles"], vec!["admin", "user"])];
    let asked = Asked { token: Some(Jwt { iss: "x", sub: "y", claims }), ..Asked::default() };
    let claim = |path: &[&str], any: &[StringMatch], none: &[StringMatch]| {
        when(Condition::Claim(path.iter().map(|p| Arc::from(*p)).collect(), Values::new(any.to_vec(), none.to_vec())))
    };
    let exact = |t: &str| StringMatch::Exact(t.into());
    for (rules, with, without) in [
        (claim(&["aud"], &[exact("b")], &[]), true, false),
        (claim(&["aud"], &[exact("c")], &[]), false, false),
        (claim(&["azp"], &[StringMatch::Prefix("c".into())], &[]), true, false),
        (claim(&["realm", "roles"], &[exact("admin")], &[]), true, false),
        (claim(&["realm"], &[exact("admin")], &[]), false, false),
        (claim(&["realm", "roles"], &[], &[exact("admin")]), false, true),
        (claim(&["realm", "roles"], &[], &[exact("root")]), true, true),
        (claim(&["nope"], &[StringMatch::Present], &[]), false, false),
    ] {
        assert_eq!((matches(&rules, &asked), matches(&rules, &Asked::default())), (with, without), "{rules:?}");
    }
}

#[test]
fn conditions() {
    let header = |name: &str, values| when(Condition::Header(HeaderKey::parse(name).expect("a header"), values));
    let asked = Asked {
        headers: vec![("x-role", "admin"), ("x-empty", "")],
        sni: Some("api.shop"),
        authority: "api.shop:80",
        ..Asked::default()
    };
    let peer = |m| when(Condition::Peer(m));
    let net = |t: &str| Values::new(vec![t.parse().expect("a range")], vec![]);
    for (rules, holds) in [
        (header("x-role", any_of(&["admin"])), true),
        (header("X-Role", any_of(&["adm*"])), true),
        (header("x-role", any_of(&["*"])), true),
        (header("x-empty", any_of(&["*"])), true),
        (header("x-none", any_of(&["*"])), false),
        (header("x-none", none_of(&["*"])), true),
        (header("x-role", none_of(&["admin"])), false),
        (header("x-none", none_of(&["admin"])), true),
        (header("host", any_of(&["api.shop"])), true),
        (header(":authority", any_of(&["API.shop:80"])), true),
        (header("Host", none_of(&["api.shop"])), false),
        (header(":method", any_of(&["GET"])), true),
        (peer(Match { source_ips: net("10.0.0.1/32"), ..Match::default() }), true),
        (peer(Match { destination_ips: net("10.96.0.1/32"), ..Match::default() }), true),
        (peer(Match { destination_ports: Values::new(vec![80], vec![]), ..Match::default() }), true),
        (peer(Match { destination_ports: Values::new(vec![], vec![80]), ..Match::default() }), false),
        (when(Condition::RemoteIp(net("10.0.0.0/8"))), true),
        (when(Condition::RemoteIp(net("11.0.0.0/8"))), false),
        (when(Condition::Sni(any_of(&["api.shop"]))), true),
        (when(Condition::Sni(none_of(&["*.shop"]))), false),
    ] {
        assert_eq!(matches(&rules, &asked), holds, "{rules:?}");
    }
    assert!(!matches(&when(Condition::Sni(any_of(&["*"]))), &Asked::default()));
    assert_eq!(HeaderKey::parse(":path"), None);
    assert_eq!(HeaderKey::parse("a b"), None);
    // All conditions must hold.
    let one = |c: &[L7Rule]| c[0].when[0].clone();
    let (yes, no) = (header("x-role", any_of(&["admin"])), header("x-none", any_of(&["*"])));
    assert!(!matches(&[L7Rule::new(vec![], vec![], vec![one(&yes), one(&no)])], &asked));
}

#[test]
fn several_values_of_a_header_are_one_text_and_hide_none() {
    let asked = Asked { headers: vec![("x-role", "user"), ("x-role", "admin")], ..Asked::default() };
    let key = || HeaderKey::parse("x-role").expect("a header");
    let verdicts = |values: Values<TextMatch>| {
        let rules = when(Condition::Header(key(), values));
        let allow = judge(&[policy("p", L7Action::Allow, rules.clone())], &asked) == "allow p";
        let deny = judge(&[policy("p", L7Action::Deny, rules)], &asked) != "allow";
        (allow, deny)
    };
    // (an ALLOW policy matches, a DENY policy matches)
    assert_eq!(verdicts(any_of(&["admin"])), (false, true));
    assert_eq!(verdicts(any_of(&["user,admin"])), (true, true), "Envoy's reading");
    assert_eq!(verdicts(any_of(&["user*"])), (true, true), "Envoy's reading");
    assert_eq!(verdicts(any_of(&["user"])), (false, true));
    assert_eq!(verdicts(none_of(&["admin"])), (false, true));
    assert_eq!(verdicts(none_of(&["root"])), (true, true));
    assert_eq!(verdicts(any_of(&["*"])), (true, true));
    assert_eq!(verdicts(any_of(&["root"])), (false, false));
    // Cookies are joined as cookies are.
    let cookies = Asked { headers: vec![("cookie", "a=1"), ("cookie", "b=2")], ..Asked::default() };
    let cookie = when(Condition::Header(HeaderKey::parse("cookie").expect("a header"), any_of(&["a=1; b=2"])));
    assert!(matches(&cookie, &cookies));
}

#[test]
fn a_connection_shows_no_request() {
    let tcp = Asked { tcp: true, ..Asked::default() };
    let http_only = || to(Operation { methods: any_of(&["POST"]), ..Operation::default() });
    let mixed =
        |port| to(Operation { methods: any_of(&["POST"]), ports: Values::new(vec![port], vec![]), ..Operation::default() });
    let by_token = || {
        let source = L7Source { request_principals: any_of(&["*"]), ..from(from_principals(&["cluster.local/ns/shop/*"])) };
        vec![L7Rule::new(vec![source], vec![], vec![])]
    };
    let by_header = || when(Condition::Header(HeaderKey::parse("x").expect("a header"), any_of(&["y"])));
    let peer = |name: &str| vec![L7Rule::new(vec![from(from_principals(&[name]))], vec![], vec![])];
    for (rules, allowed, denied) in [
        (http_only(), false, true),
        (mixed(80), false, true),
        (mixed(81), false, false),
        (by_token(), false, true),
        (by_header(), false, true),
        (peer("*/sa/web"), true, true),
        (peer("*/sa/db"), false, false),
        (when(Condition::RemoteIp(Values::new(vec!["10.0.0.0/8".parse().expect("a range")], vec![]))), true, true),
        (everything(), true, true),
    ] {
        let allow = judge(&[policy("p", L7Action::Allow, rules.clone())], &tcp);
        assert_eq!(allow, if allowed { "allow p" } else { "not_allowed [none]" }, "{rules:?}");
        let deny = judge(&[policy("p", L7Action::Deny, rules.clone())], &tcp);
        assert_eq!(deny != "allow", denied, "{rules:?}");
        let custom = judge(&[policy("p", L7Action::Custom { provider: "".into() }, rules.clone())], &tcp);
        assert_eq!(custom != "allow", denied, "{rules:?}");
    }
    // A rule dropped for a connection keeps its place in the numbers of the others.
    let rules = vec![L7Rule::default(), http_only().remove(0)];
    assert_eq!(judge(&[policy("p", L7Action::Allow, rules)], &tcp), "allow p");
}

#[test]
fn dry_runs_and_audits_are_told_and_change_nothing() {
    let dry = |name: &str, action, rules| {
        Arc::new(L7Policy {
            key: PolicyKey::new("shop", name),
            body: L7Body::Rules { action, dry_run: true, rules },
            origin: None,
        })
    };
    let table = [
        (vec![], None),
        (vec![dry("a", L7Action::Deny, everything())], Some("policy_denied [ns[shop]-policy[a]-rule[0]]")),
        (vec![dry("a", L7Action::Deny, vec![])], Some("allow")),
        (vec![dry("a", L7Action::Allow, vec![])], Some("not_allowed [none]")),
        (vec![dry("a", L7Action::Allow, vec![]), dry("b", L7Action::Allow, everything())], Some("allow b")),
        (vec![dry("a", L7Action::Custom { provider: "x".into() }, everything())], Some("allow")),
    ];
    for (mut policies, shadow) in table {
        policies.push(policy("x", L7Action::Audit, everything()));
        assert_eq!(judge(&policies, &Asked::default()), "allow");
        let snap = snapshot(Viewpoint::default(), vec![(PolicyTarget::Service(api()), policies)]);
        let service = api();
        let scope = PolicyScope { service: Some(&service), namespace: Some("shop"), gateway: None, waypoint: true };
        Asked::default().with(|facts| {
            let in_scope = InScope::of(&snap, &scope);
            let judgement = in_scope.judge(&snap, facts);
            assert_eq!(judgement.shadow.map(|s| short(&s.verdict)).as_deref(), shadow);
            assert_eq!(judgement.audited.map(|p| &*p.key.name), Some("x"));
        });
    }
    // Of each action by itself.
    let both = vec![dry("a", L7Action::Deny, everything()), dry("b", L7Action::Allow, vec![])];
    let snap = snapshot(Viewpoint::default(), vec![(PolicyTarget::Mesh, both)]);
    let scope = PolicyScope { service: None, namespace: None, gateway: None, waypoint: true };
    Asked::default().with(|facts| {
        let in_scope = InScope::of(&snap, &scope);
        let shadow = in_scope.judge(&snap, facts).shadow.expect("dry runs");
        assert_eq!(shadow.deny.first.map(|m| m.id().to_string()).as_deref(), Some("ns[shop]-policy[a]-rule[0]"));
        assert!(shadow.deny.any && shadow.allow.any && shadow.allow.first.is_none());
    });
    // An AUDIT policy that does not match says nothing.
    let silent = vec![policy("x", L7Action::Audit, vec![])];
    let snap = snapshot(Viewpoint::default(), vec![(PolicyTarget::Mesh, silent)]);
    let scope = PolicyScope { service: None, namespace: None, gateway: None, waypoint: true };
    Asked::default().with(|facts| assert!(InScope::of(&snap, &scope).judge(&snap, facts).audited.is_none()));
}

#[test]
fn the_remote_address_is_behind_the_trusted_proxies() {
    let peer = ip("10.0.0.9");
    for (headers, trusted, remote) in [
        (&["1.1.1.1, 2.2.2.2"][..], 0, "10.0.0.9"),
        (&["1.1.1.1, 2.2.2.2"], 1, "2.2.2.2"),
        (&["1.1.1.1, 2.2.2.2"], 2, "1.1.1.1"),
        (&["1.1.1.1, 2.2.2.2"], 3, "10.0.0.9"),
        (&["1.1.1.1", "2.2.2.2,3.3.3.3"], 3, "1.1.1.1"),
        (&["1.1.1.1, nonsense"], 1, "10.0.0.9"),
        (&["1.1.1.1:80"], 1, "1.1.1.1"),
        (&["[2001:db8::1]:80"], 1, "2001:db8::1"),
        (&["[2001:db8::1]"], 1, "2001:db8::1"),
        (&["::ffff:1.2.3.4"], 1, "1.2.3.4"),
        (&[], 1, "10.0.0.9"),
    ] {
        let mut map = HeaderMap::new();
        for value in headers {
            map.append("x-forwarded-for", value.parse().expect("a value"));
        }
        assert_eq!(remote_address(&map, peer, trusted), ip(remote), "{headers:?} {trusted}");
    }
}

#[test]
fn borrowed_targets_find_owned_ones() {
    use std::hash::BuildHasher;
    let hasher = foldhash::fast::FixedState::default();
    let (service, gateway) = (api(), waypoint());
    for (owned, borrowed) in [
        (PolicyTarget::Service(service.clone()), TargetRef::Service(&service)),
        (PolicyTarget::Gateway(gateway.clone()), TargetRef::Gateway(&gateway)),
        (PolicyTarget::Waypoints, TargetRef::Waypoints),
        (PolicyTarget::Namespace("shop".into()), TargetRef::Namespace("shop")),
        (PolicyTarget::Mesh, TargetRef::Mesh),
    ] {
        assert_eq!(hasher.hash_one(&owned), hasher.hash_one(borrowed), "{owned}");
        assert!(borrowed.equivalent(&owned));
    }
}

// --- compiled against naive ----------------------------------------------------------------------------------------------

/// A policy as written: texts, nothing prepared.
#[derive(Clone, Debug)]
struct Written {
    name: u8,
    action: u8,
    dry_run: bool,
    broken: bool,
    targets: Vec<u8>,
    rules: Vec<WrittenRule>,
}
/// Lists of `(field, negative, values)`.
type Fields = Vec<(u8, bool, Vec<&'static str>)>;
#[derive(Clone, Debug)]
struct WrittenRule {
    from: Vec<Fields>,
    to: Vec<Fields>,
    when: Fields,
}
const PRINCIPALS: [&str; 5] =
    ["cluster.local/ns/shop/sa/web", "*/sa/db", "cluster.local/ns/shop/*", "*", "old.example/ns/shop/sa/web"];
const NAMESPACES: [&str; 3] = ["shop", "b*", "*"];
const BLOCKS: [&str; 3] = ["10.0.0.0/24", "10.0.0.2/32", "192.0.2.0/24"];
const JWTS: [&str; 4] = ["*", "iss/joe", "iss/*", "*/ann"];
const METHODS: [&str; 3] = ["GET", "P*", "*"];
const HOSTS: [&str; 4] = ["api.shop", "*.SHOP", "api.shop:80", "other"];
const PATHS: [&str; 6] = ["/", "/a*", "*/c", "/a/{*}", "/{**}/c", "*"];
const PORTS: [&str; 2] = ["80", "81"];
const HEADERS: [&str; 3] = ["1", "2*", "*"];

fn fields(of: &'static [(u8, &'static [&'static str])]) -> impl Strategy<Value = Fields> {
    let one = prop::sample::select(of)
        .prop_flat_map(|(field, pool)| (Just(field), any::<bool>(), prop::collection::vec(prop::sample::select(pool), 1..3)));
    // A field is written once, as in a mapping.
    prop::collection::vec(one, 1..3).prop_map(|mut all| {
        all.sort_by_key(|(f, n, _)| (*f, *n));
        all.dedup_by_key(|(f, n, _)| (*f, *n));
        all
    })
}
fn written() -> impl Strategy<Value = Written> {
    const FROM: &[(u8, &[&str])] = &[(0, &PRINCIPALS), (1, &NAMESPACES), (2, &BLOCKS), (3, &BLOCKS), (4, &JWTS)];
    const TO: &[(u8, &[&str])] = &[(0, &METHODS), (1, &HOSTS), (2, &PATHS), (3, &PORTS)];
    const WHEN: &[(u8, &[&str])] = &[(0, &PRINCIPALS), (1, &BLOCKS), (2, &HEADERS), (3, &HOSTS), (4, &JWTS), (5, &PORTS)];
    let rule = (
        prop::collection::vec(fields(FROM), 0..3),
        prop::collection::vec(fields(TO), 0..3),
        prop_oneof![Just(Vec::new()), fields(WHEN)],
    );
    let rule = rule.prop_map(|(from, to, when)| WrittenRule { from, to, when });
    (
        0..4_u8,
        0..6_u8,
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.05),
        prop::collection::vec(0..4_u8, 1..3),
        prop::collection::vec(rule, 0..3),
    )
        .prop_map(|(name, action, dry_run, broken, targets, rules)| Written {
            name,
            action,
            dry_run,
            broken,
            targets,
            rules,
        })
}
fn target(n: u8) -> PolicyTarget {
    match n {
        0 => PolicyTarget::Service(api()),
        1 => PolicyTarget::Gateway(waypoint()),
        2 => PolicyTarget::Waypoints,
        _ => PolicyTarget::Service(key("shop", "other")),
    }
}
fn compile(w: &Written) -> Arc<L7Policy> {
    fn set<T: Clone>(values: &mut Values<T>, negative: bool, all: Vec<T>) {
        if negative { values.set_none(all) } else { values.set_any(all) }
    }
    let nets = |v: &[&str]| v.iter().map(|n| n.parse().expect("a range")).collect::<Vec<IpNet>>();
    let ports = |v: &[&str]| v.iter().map(|n| n.parse().expect("a port")).collect::<Vec<u16>>();
    let source = |fields: &Fields| {
        let mut s = L7Source::default();
        for (field, negative, v) in fields {
            match field {
                0 => set(&mut s.peer.principals, *negative, texts(v)),
                1 => set(&mut s.peer.namespaces, *negative, texts(v)),
                2 => set(&mut s.peer.source_ips, *negative, nets(v)),
                3 => set(&mut s.remote_ips, *negative, nets(v)),
                _ => set(&mut s.request_principals, *negative, texts(v)),
            }
        }
        s
    };
    let operation = |fields: &Fields| {
        let mut o = Operation::default();
        for (field, negative, v) in fields {
            match field {
                0 => set(&mut o.methods, *negative, texts(v)),
                1 => set(&mut o.hosts, *negative, texts(v)),
                2 => set(&mut o.paths, *negative, v.iter().map(|p| PathPattern::parse(p).expect("a path")).collect()),
                _ => set(&mut o.ports, *negative, ports(v)),
            }
        }
        o
    };
    let condition = |(field, negative, v): &(u8, bool, Vec<&str>)| {
        let text = || if *negative { none_of(v) } else { any_of(v) };
        match field {
            0 => Condition::Peer(Match { principals: text(), ..Match::default() }),
            1 => Condition::RemoteIp(if *negative { Values::new(vec![], nets(v)) } else { Values::new(nets(v), vec![]) }),
            2 => Condition::Header(HeaderKey::parse("x-h").expect("a header"), text()),
            3 => Condition::Sni(text()),
            4 => Condition::RequestPrincipal(text()),
            _ => {
                let both = if *negative { Values::new(vec![], ports(v)) } else { Values::new(ports(v), vec![]) };
                Condition::Peer(Match { destination_ports: both, ..Match::default() })
            }
        }
    };
    let rule = |r: &WrittenRule| {
        L7Rule::new(
            r.from.iter().map(source).collect(),
            r.to.iter().map(operation).collect(),
            r.when.iter().map(condition).collect(),
        )
    };
    let body = if w.broken {
        L7Body::Unusable { why: "x".into() }
    } else {
        L7Body::Rules { action: action_of(w), dry_run: w.dry_run, rules: w.rules.iter().map(rule).collect() }
    };
    Arc::new(L7Policy { key: PolicyKey::new("shop", &format!("p{}", w.name)), body, origin: None })
}
fn action_of(w: &Written) -> L7Action {
    match w.action {
        0..3 => L7Action::Allow,
        3 | 4 => L7Action::Deny,
        _ => L7Action::Custom { provider: "x".into() },
    }
}
/// One text by one pattern, by its definition.
fn glob(pattern: &str, value: &str, ignore_case: bool) -> bool {
    let source = if pattern.contains('{') {
        regex::escape(pattern).replace(r"\{\*\*\}", ".*").replace(r"\{\*\}", "[^/]+")
    } else if pattern == "*" {
        ".+".into()
    } else {
        regex::escape(pattern).replace(r"\*", ".*")
    };
    let flags = if ignore_case { "(?is)" } else { "(?s)" };
    regex::Regex::new(&format!("{flags}^(?:{source})$")).expect("a pattern").is_match(value)
}
/// The verdict, rule by rule, field by field, value by value.
fn naive(all: &[Written], asked: &Asked) -> String {
    let mut bound: Vec<(u8, &Written)> =
        all.iter().flat_map(|w| w.targets.iter().filter(|t| **t < 3).map(move |t| (*t, w))).collect();
    bound.sort_by_key(|(t, w)| (*t, w.name));
    let value = |field: &str, v: &str| -> Option<bool> {
        let http = !asked.tcp;
        let nets = |at: &str| v.parse::<IpNet>().expect("a range").contains(&ip(at));
        let names = || -> Vec<String> {
            let Some(peer) = &asked.peer else { return vec![] };
            let path = format!("/ns/{}/sa/{}", peer.namespace(), peer.service_account());
            let own = ["cluster.local", "old.example"];
            let mut tds = vec![peer.trust_domain()];
            if own.contains(&peer.trust_domain()) {
                tds.extend(own);
            }
            tds.into_iter().map(|td| format!("{td}{path}")).collect()
        };
        Some(match field {
            "principals" => names().iter().any(|n| glob(v, n, false)),
            "namespaces" => asked.peer.as_ref().is_some_and(|p| glob(v, p.namespace(), false)),
            "ip" => nets(asked.client.rsplit_once(':').expect("a port").0),
            "remote" => nets(asked.remote),
            "port" => v == asked.port.to_string(),
            "sni" => asked.sni.is_some_and(|s| glob(v, s, false)),
            _ if !http => return None,
            "jwt" => asked.token.as_ref().is_some_and(|t| glob(v, &format!("{}/{}", t.iss, t.sub), false)),
            "method" => glob(v, asked.method, false),
            "host" => glob(v, asked.authority, true) || glob(v, asked.authority.split(':').next().expect("a host"), true),
            "path" => glob(v, asked.path, false),
            _ => asked.headers.iter().any(|(n, x)| *n == "x-h" && glob(v, x, false)),
        })
    };
    let holds = |names: &[&str], fields: &Fields| {
        fields.iter().all(|(field, negative, values)| {
            let name = names[usize::from(*field)];
            let each: Vec<Option<bool>> = values.iter().map(|v| value(name, v)).collect();
            each.iter().all(Option::is_none) || (each.contains(&Some(true)) != *negative)
        })
    };
    let from = ["principals", "namespaces", "ip", "remote", "jwt"];
    let to = ["method", "host", "path", "port"];
    let when = ["principals", "remote", "header", "sni", "jwt", "port"];
    let needs_http = |r: &WrittenRule| {
        let any = |names: &[&str], fields: &Fields| {
            fields.iter().any(|(f, ..)| matches!(names[usize::from(*f)], "jwt" | "method" | "host" | "path" | "header"))
        };
        r.from.iter().any(|f| any(&from, f)) || r.to.iter().any(|f| any(&to, f)) || any(&when, &r.when)
    };
    let first = |w: &Written| {
        w.rules.iter().position(|r| {
            let dropped = asked.tcp && action_of(w) == L7Action::Allow && needs_http(r);
            !dropped
                && (r.from.is_empty() || r.from.iter().any(|f| holds(&from, f)))
                && (r.to.is_empty() || r.to.iter().any(|f| holds(&to, f)))
                && holds(&when, &r.when)
        })
    };
    if let Some((_, w)) = bound.iter().find(|(_, w)| w.broken) {
        return format!("policy_unusable [ns[shop]-policy[p{}]]", w.name);
    }
    let enforced = || bound.iter().map(|(_, w)| *w).filter(|w| !w.dry_run);
    for (word, custom) in [("no_authorizer", true), ("policy_denied", false)] {
        let of = |w: &&Written| if custom { w.action == 5 } else { matches!(w.action, 3 | 4) };
        if let Some((w, rule)) = enforced().filter(of).find_map(|w| first(w).map(|r| (w, r))) {
            return format!("{word} [ns[shop]-policy[p{}]-rule[{rule}]]", w.name);
        }
    }
    let allows = || enforced().filter(|w| w.action < 3);
    match allows().find(|w| first(w).is_some()) {
        Some(w) => format!("allow p{}", w.name),
        None if allows().next().is_some() => "not_allowed [none]".into(),
        None => "allow".into(),
    }
}
fn asked() -> impl Strategy<Value = Asked> {
    let peers = vec![
        None,
        Some(id("cluster.local", "shop", "web")),
        Some(id("old.example", "shop", "web")),
        Some(id("cluster.local", "bank", "db")),
        Some(id("other.example", "shop", "db")),
    ];
    let tokens = vec![None, Some(("iss", "joe")), Some(("iss", "ann")), Some(("other", "joe"))];
    (
        (prop::sample::select(peers), prop::sample::select(vec!["10.0.0.1:9", "10.0.0.2:9", "10.1.0.1:9"])),
        (prop::sample::select(vec!["10.0.0.2", "192.0.2.1"]), prop::sample::select(vec![80, 81])),
        (prop::sample::select(vec![None, Some("api.shop"), Some("other")]), prop::bool::weighted(0.3)),
        (
            prop::sample::select(vec!["GET", "POST"]),
            prop::sample::select(vec!["api.shop", "API.shop:80", "api.shop:81", "other"]),
        ),
        prop::sample::select(vec!["/", "/a", "/a/b", "/a/b/c", "/x"]),
        (prop::sample::select(vec![None, Some("1"), Some("22"), Some("3")]), prop::sample::select(tokens)),
    )
        .prop_map(|((peer, client), (remote, port), (sni, tcp), (method, authority), path, (header, token))| Asked {
            peer,
            client,
            remote,
            port,
            sni,
            tcp,
            method,
            authority,
            path,
            headers: header.map(|h| ("x-h", h)).into_iter().collect(),
            token: token.map(|(iss, sub)| Jwt { iss, sub, claims: vec![] }),
        })
}
proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]
    /// Grouped, compiled and cut short ≡ every policy by its definition.
    #[test]
    fn compiled_equals_naive(all in prop::collection::vec(written(), 0..5), asked in prop::collection::vec(asked(), 1..6)) {
        // Names are unique in a namespace.
        let mut all = all;
        all.sort_by_key(|w| w.name);
        all.dedup_by_key(|w| w.name);
        for w in &mut all {
            w.targets.sort_unstable();
            w.targets.dedup();
        }
        let view = Viewpoint {
            trust_domain_aliases: vec![TrustDomain::parse("old.example").expect("a trust domain")],
            ..Viewpoint::default()
        };
        let bound = (0..4).map(|t| (target(t), all.iter().filter(|w| w.targets.contains(&t)).map(compile).collect()));
        let snap = snapshot(view, bound.collect());
        for asked in asked {
            prop_assert_eq!(judge_in(&snap, &asked), naive(&all, &asked), "{:?}", asked);
        }
    }
}

pub(crate) fn any_target() -> impl Strategy<Value = PolicyTarget> {
    prop::sample::select(vec![
        PolicyTarget::Service(key("ns1", "b")),
        PolicyTarget::Service(key("ns2", "c")),
        PolicyTarget::Gateway(GatewayKey::new("ns1", "w")),
        PolicyTarget::Waypoints,
        PolicyTarget::Namespace("ns1".into()),
        PolicyTarget::Mesh,
    ])
}
pub(crate) fn any_l7_policy() -> impl Strategy<Value = Arc<L7Policy>> {
    written().prop_map(|w| compile(&w))
}
