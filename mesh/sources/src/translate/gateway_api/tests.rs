//! Tables of Gateway API objects and what becomes of them.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_model::Change;
use mesh_model::l7::destination::{Destination, RetryBudget};
use mesh_model::l7::gateway::ListenerProtocol;
use mesh_model::l7::route::{
    Forward, Fraction, HttpAction, HttpMatch, HttpRoute, HttpRule, PathMatch, PathRewrite, Redirect, RedirectPort, RetryOn,
    RetryPolicy, Rewrite,
};
use mesh_model::l7::session::{Carrier, Session};
use mesh_model::l7::text::StringMatch;
use mesh_model::snapshot::Viewpoint;
use proptest::prelude::*;

use super::super::object::Object;
use super::super::{Settings, fuzz_yaml};
use super::*;
use crate::diagnostics::Problem;

// ---- what a mesh is ----

#[derive(Debug, Default, PartialEq)]
struct State {
    routes: BTreeMap<String, Arc<RouteTable>>,
    gateways: BTreeMap<String, Arc<GatewayRoutes>>,
    destinations: BTreeMap<String, Arc<Destination>>,
}
impl State {
    fn apply(&mut self, changes: Vec<Change>) {
        for c in changes {
            match c {
                Change::Routes(k, t) => drop(self.routes.insert(k.to_string(), t)),
                Change::RoutesGone(k) => drop(self.routes.remove(&k.to_string())),
                Change::Gateway(g) => drop(self.gateways.insert(g.key.to_string(), g)),
                Change::GatewayGone(k) => drop(self.gateways.remove(&k.to_string())),
                Change::Destination(d) => drop(self.destinations.insert(d.key.to_string(), d)),
                Change::DestinationGone(k) => drop(self.destinations.remove(&k.to_string())),
                _ => {}
            }
        }
    }
    fn table(&self, key: &str) -> &RouteTable {
        self.routes.get(key).unwrap_or_else(|| panic!("no routes of {key} in {:?}", self.routes.keys()))
    }
    fn gateway(&self, key: &str) -> &GatewayRoutes {
        self.gateways.get(key).unwrap_or_else(|| panic!("no gateway {key} in {:?}", self.gateways.keys()))
    }
}
fn translator() -> Translator {
    Translator::new(Viewpoint::default(), &Settings { layer7: true, ..Settings::default() })
}
fn objects(t: &mut Translator, text: &str) -> (Vec<Object>, Vec<Problem>) {
    let (mut objects, mut problems) = (Vec::new(), Vec::new());
    for doc in crate::yaml::documents(text) {
        let root = crate::yaml::parse_whole(doc).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let mut r = t.reader("t.yaml".into());
        objects.extend(r.object(&root));
        problems.append(&mut r.problems);
    }
    (objects, problems)
}
fn mesh(text: &str) -> (State, Vec<Problem>) {
    let mut t = translator();
    let (objects, mut problems) = objects(&mut t, text);
    for o in objects {
        t.upsert(o);
    }
    let mut state = State::default();
    state.apply(t.flush());
    problems.extend(t.problems().cloned());
    problems.sort();
    problems.dedup();
    (state, problems)
}
/// A mesh nobody complains about.
fn good(text: &str) -> State {
    let (state, problems) = mesh(text);
    assert_eq!(problems, [], "{text}");
    state
}
fn brief(problems: &[Problem]) -> Vec<(&'static str, &str, &'static str)> {
    problems.iter().map(|p| (p.severity.as_str(), &*p.field, p.code.unwrap_or_default())).collect()
}

// ---- objects ----

fn object(kind: &str, api: &str, ns: &str, name: &str, meta: &str, rest: &str) -> String {
    format!("---\n{{apiVersion: {api}, kind: {kind}, metadata: {{name: {name}, namespace: {ns}{meta}}}, {rest}}}\n")
}
const API: &str = "gateway.networking.k8s.io/v1";
fn route(kind: &str, ns: &str, name: &str, spec: &str) -> String {
    object(kind, API, ns, name, "", &format!("spec: {{{spec}}}"))
}
/// Services `s` (ports 80 named http, 81), `t` and `u` (port 80) of a namespace.
fn services(ns: &str) -> String {
    let one =
        |name: &str, ports: &str| object("Service", "v1", ns, name, "", &format!("spec: {{clusterIP: None, ports: [{ports}]}}"));
    one("s", "{name: http, port: 80}, {name: other, port: 81}") + &one("t", "{port: 80}") + &one("u", "{port: 80}")
}
const TO_S: &str = "parentRefs: [{group: '', kind: Service, name: s}]";
/// Services and an HTTPRoute of one rule on `s`.
fn with_rule(rule: &str) -> String {
    services("a") + &route("HTTPRoute", "a", "r", &format!("{TO_S}, rules: [{{{rule}}}]"))
}
const S: &str = "a/s.a.svc.cluster.local";

fn only_rule(rule: &str) -> HttpRule {
    let state = good(&with_rule(rule));
    let rules: Vec<&HttpRule> = state.table(S).http.iter().collect();
    let [rule] = rules[..] else { panic!("{:?}", state.table(S)) };
    rule.clone()
}
fn only_match(m: &str) -> HttpMatch {
    only_rule(&format!("matches: [{{{m}}}], backendRefs: [{{name: t, port: 80}}]")).matches.as_ref().clone()
}
fn forward(rule: &str) -> (HttpRoute, Forward) {
    let route = HttpRoute::clone(&only_rule(rule).route);
    match &route.action {
        HttpAction::Forward(f) => (route.clone(), f.clone()),
        other => panic!("{other:?}"),
    }
}
fn to(ns: &str, name: &str, port: u16) -> BackendRef {
    let service = ServiceKey::new(ns, &format!("{name}.{ns}.svc.cluster.local"));
    BackendRef::Service(ClusterKey { service, port, subset: None })
}
fn responds_500(route: &HttpRoute) -> bool {
    matches!(&route.action, HttpAction::Respond(r) if r.status == 500 && r.body.is_empty())
}

// ---- HTTPRoute: fields ----

#[test]
fn matches_are_compiled() {
    let path = |m: &str| only_match(m).path.unwrap();
    let prefix = |t: &str| PathMatch::SegmentPrefix(t.into());
    for (text, want) in [
        ("", prefix("/")),
        ("path: {}", prefix("/")),
        ("path: {value: /a}", prefix("/a")),
        ("path: {value: /a/}", prefix("/a")),
        ("path: {value: /}", prefix("/")),
        ("path: {type: PathPrefix, value: /a/b}", prefix("/a/b")),
        ("path: {type: Exact, value: /a/}", PathMatch::Exact("/a/".into())),
        ("path: {type: Exact}", PathMatch::Exact("/".into())),
    ] {
        assert_eq!(path(text), want, "{text}");
    }
    let PathMatch::Regex(p) = path("path: {type: RegularExpression, value: '/v[0-9]+'}") else { panic!() };
    assert!(p.is_match("/v12") && !p.is_match("/v12/x"));

    let m = only_match("method: POST");
    assert_eq!(m.method, Some(StringMatch::Exact("POST".into())));
    let m = only_match(
        "headers: [{name: X-A, value: b}, {name: x-a, value: ignored}, {type: RegularExpression, name: y, value: 'c.*'}]",
    );
    assert_eq!(m.headers.len(), 2);
    assert_eq!((m.headers[0].0.as_str(), &m.headers[0].1), ("x-a", &StringMatch::Exact("b".into())));
    assert!(m.headers[1].1.matches("cde") && !m.headers[1].1.matches("ab"));
    let m = only_match("queryParams: [{name: q, value: v}, {name: Q, value: w}, {name: q, value: x}]");
    assert_eq!(m.query, [("q".into(), StringMatch::Exact("v".into())), ("Q".into(), StringMatch::Exact("w".into()))]);
    assert_eq!((m.port, m.authority), (None, None), "host names do not count in the mesh");
}

#[test]
fn several_matches_share_one_route_and_none_is_everything() {
    let state = good(&with_rule("matches: [{path: {value: /a}}, {path: {value: /b}}], backendRefs: [{name: t, port: 80}]"));
    let rules: Vec<&HttpRule> = state.table(S).http.iter().collect();
    let [a, b] = rules[..] else { panic!() };
    assert!(Arc::ptr_eq(&a.route, &b.route));
    assert_eq!(a.route.name.as_ref(), "a.r.0");
    assert_eq!(a.route.origin.as_ref().unwrap().object.as_ref(), "HTTPRoute a/r");
    let state = good(&(services("a") + &route("HTTPRoute", "a", "r", TO_S)));
    let rules: Vec<&HttpRule> = state.table(S).http.iter().collect();
    let [rule] = rules[..] else { panic!() };
    assert_eq!(rule.matches.path, Some(PathMatch::SegmentPrefix("/".into())));
    assert!(responds_500(&rule.route), "the default rule has no backends");
    assert_eq!(only_rule("name: mine, backendRefs: [{name: t, port: 80}]").route.name.as_ref(), "mine");
}

#[test]
fn weights() {
    let (_, f) = forward("backendRefs: [{name: t, port: 80}, {name: s, port: 81, weight: 3}, {name: u, port: 80, weight: 0}]");
    let got: Vec<_> = f.backends.iter().map(|b| (b.to.clone(), b.weight)).collect();
    assert_eq!((got.as_slice(), f.total_weight), ([(to("a", "t", 80), 1), (to("a", "s", 81), 3)].as_slice(), 4));
    for nothing in ["", "backendRefs: []", "backendRefs: [{name: t, port: 80, weight: 0}]"] {
        assert!(responds_500(&only_rule(nothing).route), "{nothing}");
    }
}

/// In a mesh without configuration.
fn retries(forward: &Forward) -> RetryPolicy {
    forward.retries(&RetryPolicy::istio_default()).clone()
}
#[test]
fn timeouts_and_retries() {
    let ms = Duration::from_millis;
    let default = RetryOnDefault::istio();
    for (text, timeout, per_try, attempts, statuses) in [
        ("", None, None, 2, &[][..]),
        ("timeouts: {request: 10s}", Some(ms(10_000)), None, 2, &[]),
        ("timeouts: {request: 1m30s, backendRequest: 500ms}", Some(ms(500)), None, 2, &[]),
        ("timeouts: {request: 0s, backendRequest: 1h}", Some(ms(3_600_000)), None, 2, &[]),
        ("timeouts: {request: 0s}", None, None, 2, &[]),
        ("retry: {}", None, None, 2, &[]),
        (
            "retry: {attempts: 5, codes: [500, 503, 503]}, timeouts: {request: 2s, backendRequest: 1s}",
            Some(ms(2000)),
            Some(ms(1000)),
            5,
            &[500, 503],
        ),
        ("retry: {attempts: 0}", None, None, 0, &[]),
    ] {
        let (_, f) = forward(&format!("{text}{}backendRefs: [{{name: t, port: 80}}]", if text.is_empty() { "" } else { ", " }));
        assert_eq!(
            (f.timeout, retries(&f).per_try, retries(&f).attempts, retries(&f).statuses.as_slice()),
            (timeout, per_try, attempts, statuses),
            "{text}"
        );
        let named = text.contains("retry");
        assert_eq!(retries(&f).on.has(RetryOn::STATUS_CODES), !named || !statuses.is_empty(), "{text}");
        assert!(retries(&f).on.has(default.0), "{text}");
    }
    let (_, f) = forward("retry: {backoff: 100ms}, backendRefs: [{name: t, port: 80}]");
    assert_eq!((retries(&f).base_backoff, retries(&f).max_backoff), (ms(100), ms(1000)));
}
/// What is retried in any case.
struct RetryOnDefault(RetryOn);
impl RetryOnDefault {
    fn istio() -> Self {
        Self(RetryOn::CONNECT_FAILURE.with(RetryOn::REFUSED_STREAM).with(RetryOn::UNAVAILABLE).with(RetryOn::CANCELLED))
    }
}

#[test]
fn header_filters_of_rules_and_backends() {
    let (route, f) = forward(
        "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: '1'}, {name: x-a, value: '2'}, {name: Host, value: h.com}], \
         add: [{name: x-b, value: b}], remove: [X-C]}}, {type: ResponseHeaderModifier, responseHeaderModifier: {remove: [server]}}], \
         backendRefs: [{name: t, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-to, value: t}]}}, \
         {type: URLRewrite, urlRewrite: {hostname: T.com}}, {type: RequestMirror, requestMirror: {backendRef: {name: u, port: 80}}}]}]",
    );
    let e = &route.headers.request;
    assert_eq!((e.set.len(), e.set[0].1.to_str().unwrap(), e.authority.as_deref()), (1, "1", Some("h.com")));
    assert_eq!((e.add[0].0.as_str(), e.remove[0].as_str()), ("x-b", "x-c"));
    assert_eq!(route.headers.response.remove[0].as_str(), "server");
    let b = &f.backends[0];
    assert_eq!(b.headers.request.add[0].0.as_str(), "x-to");
    assert_eq!(b.rewrite, Some(Rewrite { path: None, authority: Some("t.com".into()) }));
    assert_eq!(b.mirrors[0].to, to("a", "u", 80));
}

#[test]
fn rewrites_and_redirects() {
    let rewrite = |text: &str| {
        let rule = format!(
            "matches: [{{path: {{value: /p}}}}], filters: [{{type: URLRewrite, urlRewrite: {{{text}}}}}], backendRefs: [{{name: t, port: 80}}]"
        );
        forward(&rule).1.rewrite.unwrap()
    };
    let path = |p| Rewrite { path: Some(p), authority: None };
    for (text, want) in [
        ("path: {type: ReplaceFullPath, replaceFullPath: /x/}", path(PathRewrite::Full("/x/".into()))),
        ("path: {type: ReplaceFullPath, replaceFullPath: ''}", path(PathRewrite::Full("/".into()))),
        ("path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}", path(PathRewrite::SegmentPrefix("/x".into()))),
        ("path: {type: ReplacePrefixMatch, replacePrefixMatch: /x/}", path(PathRewrite::SegmentPrefix("/x".into()))),
        ("path: {type: ReplacePrefixMatch, replacePrefixMatch: /}", path(PathRewrite::SegmentPrefix("".into()))),
        ("hostname: New.Example.com", Rewrite { path: None, authority: Some("new.example.com".into()) }),
    ] {
        assert_eq!(rewrite(text), want, "{text}");
    }
    let base =
        Redirect { status: 302, scheme: None, authority: None, port: RedirectPort::FromRequest, path: None, strip_query: false };
    for (text, want) in [
        ("{}", base.clone()),
        ("{scheme: https}", Redirect { scheme: Some("https".into()), port: RedirectPort::ProtocolDefault, ..base.clone() }),
        (
            "{scheme: https, port: 8443, statusCode: 301}",
            Redirect { status: 301, scheme: Some("https".into()), port: RedirectPort::Number(8443), ..base.clone() },
        ),
        ("{hostname: b.com, statusCode: 308}", Redirect { status: 308, authority: Some("b.com".into()), ..base.clone() }),
        (
            "{path: {type: ReplacePrefixMatch, replacePrefixMatch: /q}}",
            Redirect { path: Some(PathRewrite::SegmentPrefix("/q".into())), ..base.clone() },
        ),
    ] {
        let rule = only_rule(&format!(
            "matches: [{{path: {{value: /p}}}}], filters: [{{type: RequestRedirect, requestRedirect: {text}}}]"
        ));
        assert_eq!(rule.route.action, HttpAction::Redirect(want), "{text}");
    }
}

#[test]
fn mirrors_and_cors() {
    let mirror = |share: &str| {
        let rule = format!(
            "filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: u, port: 80}}{share}}}}}], backendRefs: [{{name: t, port: 80}}]"
        );
        forward(&rule).1.mirrors
    };
    for (share, want) in [
        ("", 1_000_000),
        (", percent: 5", 50_000),
        (", fraction: {numerator: 1, denominator: 3}", 333_333),
        (", fraction: {numerator: 7}", 70_000),
    ] {
        assert_eq!(
            mirror(share),
            [mesh_model::l7::route::Mirror { to: to("a", "u", 80), fraction: Fraction { per_million: want } }],
            "{share}"
        );
    }
    assert_eq!(mirror(", percent: 0"), []);

    let (route, _) = forward(
        "filters: [{type: CORS, cors: {allowOrigins: ['https://a.com', 'https://*.b.com', 'http://*'], allowMethods: [GET, POST], allowHeaders: [x-a, x-b], exposeHeaders: ['*'], allowCredentials: true, maxAge: 60}}], backendRefs: [{name: t, port: 80}]",
    );
    let cors = route.cors.unwrap();
    let allowed = |o: &str| cors.origins.iter().any(|m| m.matches(o));
    for (origin, want) in [
        ("https://a.com", true),
        ("http://a.com", true),
        ("https://x.b.com", true),
        ("https://x.y.b.com", true),
        ("https://b.com", false),
        ("https://xb.com", false),
        ("https://x.b.com.evil.com", false),
        ("https://x.b.com:8443", false),
        ("http://anything:1", true),
        ("https://evil.com", false),
    ] {
        assert_eq!(allowed(origin), want, "{origin}");
    }
    assert_eq!(
        (&*cors.methods, &*cors.headers, &*cors.expose, cors.max_age, cors.credentials),
        ("GET,POST", "x-a,x-b", "*", Some(60), true)
    );
    let (route, _) = forward("filters: [{type: CORS, cors: {allowOrigins: ['*']}}], backendRefs: [{name: t, port: 80}]");
    let cors = route.cors.unwrap();
    assert_eq!(
        (cors.max_age, cors.forward_unmatched, cors.origins.as_slice()),
        (Some(5), true, [StringMatch::Present].as_slice())
    );
}

#[test]
fn filters_that_are_not_available_answer_500() {
    for filter in [
        "{type: ExtensionRef, extensionRef: {group: x, kind: Y, name: z}}",
        "{type: ExternalAuth, externalAuth: {protocol: GRPC}}",
    ] {
        let (state, problems) = mesh(&with_rule(&format!("filters: [{filter}], backendRefs: [{{name: t, port: 80}}]")));
        assert_eq!(brief(&problems), [("error", "spec.rules[0].filters[0]", "unsupported-filter")], "{filter}");
        assert!(responds_500(&state.table(S).http.get(0).unwrap().route));
        assert_eq!(state.table(S).broken, None);
        // A redirect beside it does not make it harmless.
        let (state, _) = mesh(&with_rule(&format!("filters: [{filter}, {{type: RequestRedirect, requestRedirect: {{}}}}]")));
        assert!(responds_500(&state.table(S).http.get(0).unwrap().route));
        // Of a backend: its share.
        let (state, problems) =
            mesh(&with_rule(&format!("backendRefs: [{{name: t, port: 80}}, {{name: u, port: 80, filters: [{filter}]}}]")));
        assert_eq!(brief(&problems), [("error", "spec.rules[0].backendRefs[1].filters[0]", "unsupported-filter")]);
        let HttpAction::Forward(f) = &state.table(S).http.get(0).unwrap().route.action else { panic!() };
        assert_eq!(f.backends[0].to, to("a", "t", 80));
        assert!(matches!(f.backends[1].to, BackendRef::Invalid { status: 500, .. }), "{f:?}");
    }
}

// ---- sessions ----

/// The session of a rule with these matches.
fn session(matches: &str, fields: &str) -> (Session, Vec<Problem>) {
    let rule = format!("matches: [{matches}], sessionPersistence: {{{fields}}}, backendRefs: [{{name: t, port: 80}}]");
    let (state, problems) = mesh(&with_rule(&rule));
    let HttpAction::Forward(f) = &state.table(S).http.get(0).unwrap().route.action else { panic!("{problems:?}") };
    (Session::clone(f.session.as_ref().unwrap()), problems)
}

#[test]
fn sessions_of_routes() {
    let cookie = |name: &str, path: &str, permanent| Carrier::Cookie { name: name.into(), path: path.into(), permanent };
    let header = |name: &str| Carrier::Header(name.parse().unwrap());
    for (matches, fields, carrier, lifetime) in [
        ("", "sessionName: x", cookie("x", "/", false), None),
        ("path: {value: /a/b}", "sessionName: x, type: Cookie", cookie("x", "/a/b", false), None),
        ("path: {value: /a/b/}", "sessionName: x, cookieConfig: {}", cookie("x", "/a/b", false), None),
        ("path: {type: Exact, value: /a/b}}, {path: {value: /a/c}", "sessionName: x", cookie("x", "/a", false), None),
        ("path: {value: /ab}}, {path: {value: /ac}", "sessionName: x", cookie("x", "/", false), None),
        ("path: {type: RegularExpression, value: '/a/b.*'}", "sessionName: x", cookie("x", "/", false), None),
        ("", "sessionName: x, cookieConfig: {lifetimeType: Session}, absoluteTimeout: 1h", cookie("x", "/", false), Some(3600)),
        ("", "sessionName: x, cookieConfig: {lifetimeType: Permanent}, absoluteTimeout: 1m", cookie("x", "/", true), Some(60)),
        ("", "sessionName: X-S, type: Header", header("x-s"), None),
        ("", "sessionName: X-S, type: Header, absoluteTimeout: 1m30s", header("x-s"), Some(90)),
    ] {
        let (found, problems) = session(&format!("{{{matches}}}"), fields);
        assert_eq!(found, Session { carrier, lifetime: lifetime.map(Duration::from_secs) }, "{fields}");
        assert_eq!(brief(&problems), [], "{fields}");
    }
    // Names are made where none is written, and told apart.
    let Carrier::Cookie { name, .. } = session("", "").0.carrier else { panic!() };
    assert!(name.starts_with("culvert-session-") && name.len() == 24, "{name}");
    let Carrier::Header(name) = session("", "type: Header").0.carrier else { panic!() };
    assert!(name.as_str().starts_with("x-culvert-session-"), "{name}");
    let (_, problems) = session("", "idleTimeout: 10s");
    assert_eq!(brief(&problems), [("error", "spec.rules[0].sessionPersistence.idleTimeout", "unsupported-field")]);
}

const TRAFFIC: &str = "gateway.networking.x-k8s.io/v1alpha1";
fn traffic_policy(name: &str, meta: &str, spec: &str) -> String {
    object("XBackendTrafficPolicy", TRAFFIC, "a", name, meta, &format!("spec: {{{spec}}}"))
}

#[test]
fn backend_traffic_policies() {
    let rule = |spec: &str| {
        let spec = format!("spec: {{host: s, trafficPolicy: {{{spec}}}}}");
        object("DestinationRule", "networking.istio.io/v1", "a", "d", "", &spec)
    };
    let lasting = |interval, percent_hundredths, min_concurrency| {
        Some(RetryBudget { interval: Some(Duration::from_secs(interval)), percent_hundredths, min_concurrency })
    };
    let budget = |percent_hundredths, min_concurrency| lasting(10, percent_hundredths, min_concurrency);
    let of = |text: &str| {
        let (state, problems) = mesh(&(services("a") + text));
        let d = state.destinations.get(S).map(|d| (d.policy.retry_budget, d.policy.session.clone(), d.origins.len()));
        let problems: Vec<String> = problems.iter().map(|p| p.code.unwrap_or_default().to_string()).collect();
        (d.unwrap_or_default(), problems)
    };
    for (constraint, want, told) in [
        ("", budget(2000, 10), vec![]),
        ("budget: {percent: 5}", budget(500, 10), vec![]),
        ("minRetryRate: {count: 0}", budget(2000, 0), vec![]),
        ("budget: {percent: 100, interval: 5s}, minRetryRate: {count: 3}", lasting(5, 10_000, 3), vec![]),
        ("minRetryRate: {count: 3, interval: 1s}", budget(2000, 3), vec!["no-effect"]),
    ] {
        let (found, problems) = of(&traffic_policy("p", "", &format!("{ON_S}, retryConstraint: {{{constraint}}}")));
        assert_eq!((found, problems), ((want, None, 1), told.iter().map(ToString::to_string).collect()), "{constraint}");
    }
    // A DestinationRule's own budget counts, for ports too; its other words do not matter.
    let p = traffic_policy("p", "", &format!("{ON_S}, retryConstraint: {{}}, sessionPersistence: {{sessionName: x}}"));
    let ((found, session, origins), _) = of(&(p.clone() + &rule("retryBudget: {percent: 1}")));
    let own = RetryBudget { interval: None, percent_hundredths: 100, min_concurrency: 3 };
    assert_eq!((found, origins, session.is_some()), (Some(own), 2, true));
    let ((found, ..), _) = of(&(p.clone() + &rule("loadBalancer: {simple: RANDOM}")));
    assert_eq!(found, budget(2000, 10));
    // The oldest counts for what it says, the others for the rest.
    let older = traffic_policy(
        "q",
        ", creationTimestamp: 2026-01-01T00:00:00Z",
        &format!("{ON_S}, sessionPersistence: {{sessionName: y}}"),
    );
    let ((found, session, origins), problems) = of(&(p + &older));
    let Some(Carrier::Cookie { name, path, .. }) = session.map(|s| s.carrier.clone()) else { panic!() };
    assert_eq!((found, &*name, &*path, origins, problems), (budget(2000, 10), "y", "/", 2, vec!["conflict".to_owned()]));
}

#[test]
fn mistakes_in_backend_traffic_policies() {
    let only = "targetRefs: [{group: '', kind: Service, name: s}]";
    for (spec, code) in [
        ("retryConstraint: {}".to_owned(), "missing-field"),
        (format!("{only}, retryConstraint: {{budget: {{percent: 101}}}}"), "bad-value"),
        (format!("{only}, retryConstraint: {{minRetryRate: {{count: -1}}}}"), "bad-value"),
        (format!("{only}, retryConstraint: {{budget: {{percent: 1, interval: x}}}}"), "bad-value"),
        (format!("{only}, sessionPersistence: {{type: x}}"), "bad-value"),
        (format!("{only}, other: 1"), "unknown-field"),
        ("targetRefs: [{group: '', kind: Service, name: none}]".to_owned(), "target"),
        ("targetRefs: [{group: x, kind: Other, name: s}]".to_owned(), "unsupported-target"),
    ] {
        let (state, problems) = mesh(&(services("a") + &traffic_policy("p", "", &spec)));
        assert_eq!(problems.iter().map(|p| p.code.unwrap_or_default().to_string()).collect::<Vec<_>>(), [code], "{spec}");
        assert!(!state.destinations.contains_key(S), "{spec}");
    }
}

#[test]
fn mistakes_in_sessions() {
    for fields in [
        "type: Query",
        "cookieConfig: {lifetimeType: Permanent}",
        "cookieConfig: {lifetimeType: Ever}",
        "type: Header, cookieConfig: {lifetimeType: Session}",
        "type: Header, sessionName: 'a b'",
        "type: Header, sessionName: Content-Length",
        "sessionName: 'a=b'",
        "sessionName: 'a;b'",
        "absoluteTimeout: 0s",
        "absoluteTimeout: 10",
        "other: 1",
    ] {
        let (state, problems) =
            mesh(&with_rule(&format!("sessionPersistence: {{{fields}}}, backendRefs: [{{name: t, port: 80}}]")));
        assert!(state.table(S).broken.is_some(), "{fields}");
        assert!(problems.iter().any(|p| p.field.starts_with("spec.rules[0].sessionPersistence")), "{fields}: {problems:?}");
    }
}

// ---- HTTPRoute: mistakes ----

#[test]
fn mistakes_in_a_route_close_its_service() {
    let filter = |f: &str| format!("filters: [{f}], backendRefs: [{{name: t, port: 80}}]");
    let header = |t: &str| filter(&format!("{{type: RequestHeaderModifier, requestHeaderModifier: {t}}}"));
    let f0 = "spec.rules[0].filters[0]";
    let table: Vec<(String, String, &str)> = vec![
        ("matchez: []".into(), "spec.rules[0].matchez".into(), "unknown field"),
        ("matches: {}".into(), "spec.rules[0].matches".into(), "expected a list"),
        ("matches: [{paths: x}]".into(), "spec.rules[0].matches[0].paths".into(), "did you mean `path`"),
        ("matches: [{path: {type: Glob, value: /}}]".into(), "spec.rules[0].matches[0].path.type".into(), "`Glob`"),
        ("matches: [{path: {value: a}}]".into(), "spec.rules[0].matches[0].path.value".into(), "not a path"),
        ("matches: [{path: {value: /a//b}}]".into(), "spec.rules[0].matches[0].path.value".into(), "not a path"),
        ("matches: [{path: {value: /a/../b}}]".into(), "spec.rules[0].matches[0].path.value".into(), "not a path"),
        ("matches: [{path: {value: /a%2Fb}}]".into(), "spec.rules[0].matches[0].path.value".into(), "not a path"),
        ("matches: [{path: {type: RegularExpression, value: '('}}]".into(), "spec.rules[0].matches[0].path.value".into(), "RE2"),
        ("matches: [{path: {type: RegularExpression}}]".into(), "spec.rules[0].matches[0].path.value".into(), "needed"),
        ("matches: [{method: get}]".into(), "spec.rules[0].matches[0].method".into(), "`get`"),
        ("matches: [{headers: [{value: x}]}]".into(), "spec.rules[0].matches[0].headers[0].name".into(), "has a name"),
        (
            "matches: [{headers: [{name: 'a b', value: x}]}]".into(),
            "spec.rules[0].matches[0].headers[0].name".into(),
            "not a header name",
        ),
        ("matches: [{headers: [{name: a}]}]".into(), "spec.rules[0].matches[0].headers[0].value".into(), "has a value"),
        (
            "matches: [{headers: [{name: a, type: Prefix, value: x}]}]".into(),
            "spec.rules[0].matches[0].headers[0].type".into(),
            "`Prefix`",
        ),
        (
            "matches: [{queryParams: [{name: '', value: x}]}]".into(),
            "spec.rules[0].matches[0].queryParams[0].name".into(),
            "has a name",
        ),
        (
            "matches: [{queryParams: [{name: a, type: RegularExpression, value: '['}]}]".into(),
            "spec.rules[0].matches[0].queryParams[0].value".into(),
            "RE2",
        ),
        (filter("{}"), format!("{f0}.type"), "has a type"),
        (filter("{type: Magic}"), format!("{f0}.type"), "`Magic`"),
        (filter("{type: URLRewrite}"), f0.into(), "needs `urlRewrite`"),
        (filter("{type: URLRewrite, cors: {}}"), format!("{f0}.cors"), "does not belong"),
        (
            filter("{type: URLRewrite, urlRewrite: {}}, {type: URLRewrite, urlRewrite: {}}"),
            "spec.rules[0].filters[1].type".into(),
            "twice",
        ),
        (
            filter("{type: URLRewrite, urlRewrite: {}}, {type: RequestRedirect, requestRedirect: {}}"),
            "spec.rules[0].filters".into(),
            "exclude",
        ),
        (filter("{type: RequestRedirect, requestRedirect: {}}"), "spec.rules[0].backendRefs".into(), "no backends"),
        (filter("{type: RequestRedirect, requestRedirect: {scheme: ftp}}"), format!("{f0}.requestRedirect.scheme"), "`ftp`"),
        (
            filter("{type: RequestRedirect, requestRedirect: {statusCode: 304}}"),
            format!("{f0}.requestRedirect.statusCode"),
            "`304`",
        ),
        (filter("{type: RequestRedirect, requestRedirect: {port: 0}}"), format!("{f0}.requestRedirect.port"), "not a port"),
        (filter("{type: URLRewrite, urlRewrite: {hostname: '*.a'}}"), format!("{f0}.urlRewrite.hostname"), "host name"),
        (filter("{type: URLRewrite, urlRewrite: {path: {}}}"), format!("{f0}.urlRewrite.path.type"), "has a type"),
        (filter("{type: URLRewrite, urlRewrite: {path: {type: X}}}"), format!("{f0}.urlRewrite.path.type"), "`X`"),
        (
            filter("{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath}}}"),
            format!("{f0}.urlRewrite.path"),
            "replaceFullPath",
        ),
        (
            filter("{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replacePrefixMatch: /}}}"),
            format!("{f0}.urlRewrite.path.replacePrefixMatch"),
            "does not belong",
        ),
        (
            filter("{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: '/a?b'}}}"),
            format!("{f0}.urlRewrite.path.replaceFullPath"),
            "not a path",
        ),
        (
            "matches: [{path: {type: Exact, value: /a}}], ".to_owned()
                + &filter("{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}"),
            format!("{f0}.urlRewrite.path.type"),
            "PathPrefix",
        ),
        (header("{sets: []}"), format!("{f0}.requestHeaderModifier.sets"), "did you mean `set`"),
        (header("{set: [{name: 'a b', value: x}]}"), format!("{f0}.requestHeaderModifier.set[0].name"), "not a header name"),
        (header("{add: [{name: host, value: x}]}"), format!("{f0}.requestHeaderModifier.add[0].name"), "only be set"),
        (header("{set: [{name: a, value: \"b\\nc\"}]}"), format!("{f0}.requestHeaderModifier.set[0].value"), "control"),
        (header("{remove: [host]}"), format!("{f0}.requestHeaderModifier.remove[0]"), "without host"),
        (filter("{type: RequestMirror, requestMirror: {}}"), format!("{f0}.requestMirror.backendRef"), "has a backendRef"),
        (
            filter("{type: RequestMirror, requestMirror: {backendRef: {name: t}}}"),
            format!("{f0}.requestMirror.backendRef.port"),
            "names its port",
        ),
        (
            filter("{type: RequestMirror, requestMirror: {backendRef: {name: t, port: 80}, percent: 101}}"),
            format!("{f0}.requestMirror.percent"),
            "0 to 100",
        ),
        (
            filter(
                "{type: RequestMirror, requestMirror: {backendRef: {name: t, port: 80}, percent: 1, fraction: {numerator: 1}}}",
            ),
            format!("{f0}.requestMirror.percent"),
            "exclude",
        ),
        (
            filter(
                "{type: RequestMirror, requestMirror: {backendRef: {name: t, port: 80}, fraction: {numerator: 3, denominator: 2}}}",
            ),
            format!("{f0}.requestMirror.fraction"),
            "0 to 1",
        ),
        (filter("{type: CORS, cors: {allowOrigins: [a.com]}}"), format!("{f0}.cors.allowOrigins[0]"), "not an origin"),
        (filter("{type: CORS, cors: {allowOrigins: ['https://a*.com']}}"), format!("{f0}.cors.allowOrigins[0]"), "not an origin"),
        (filter("{type: CORS, cors: {allowMethods: ['G T']}}"), format!("{f0}.cors.allowMethods[0]"), "not a name"),
        ("backendRefs: [{port: 80}]".into(), "spec.rules[0].backendRefs[0].name".into(), "names its backend"),
        ("backendRefs: [{name: t}]".into(), "spec.rules[0].backendRefs[0].port".into(), "names its port"),
        ("backendRefs: [{name: t, port: 80, weight: -1}]".into(), "spec.rules[0].backendRefs[0].weight".into(), "whole number"),
        ("backendRefs: [{name: t, port: 80, weight: 1000001}]".into(), "spec.rules[0].backendRefs[0].weight".into(), "too large"),
        ("backendRefs: [{name: t, port: 80, subset: v1}]".into(), "spec.rules[0].backendRefs[0].subset".into(), "unknown field"),
        (
            "backendRefs: [{group: networking.istio.io, kind: Hostname, name: a.b, namespace: c, port: 80}]".into(),
            "spec.rules[0].backendRefs[0].namespace".into(),
            "no namespace",
        ),
        ("timeouts: {total: 1s}".into(), "spec.rules[0].timeouts.total".into(), "unknown field"),
        ("timeouts: {request: 1}".into(), "spec.rules[0].timeouts.request".into(), "not a duration"),
        ("timeouts: {request: 1.5s}".into(), "spec.rules[0].timeouts.request".into(), "not a duration"),
        ("timeouts: {request: 123456s}".into(), "spec.rules[0].timeouts.request".into(), "not a duration"),
        ("timeouts: {request: 1s, backendRequest: 2s}".into(), "spec.rules[0].timeouts.backendRequest".into(), "longer"),
        ("retry: {codes: [200]}".into(), "spec.rules[0].retry.codes[0]".into(), "400 to 599"),
        ("retry: {attempts: many}".into(), "spec.rules[0].retry.attempts".into(), "whole number"),
        ("retry: {backoff: 0s}".into(), "spec.rules[0].retry.backoff".into(), "nothing"),
    ];
    for (rule, field, message) in table {
        let (state, problems) = mesh(&with_rule(&rule));
        let [p] = problems.as_slice() else { panic!("{rule}: {problems:?}") };
        assert_eq!((&*p.field, p.severity), (field.as_str(), Severity::Error), "{rule}: {p}");
        assert!(p.message.contains(message), "{rule}: {p}");
        assert!(p.origin.line > 0 && &*p.origin.object == "HTTPRoute a/r", "{rule}: {p}");
        let t = state.table(S);
        assert!(t.http.is_empty() && t.broken.as_ref().is_some_and(|b| b.contains(message)), "{rule}: {t:?}");
    }
}

#[test]
fn mistakes_above_the_rules() {
    for (spec, field, closed) in [
        ("parentRefs: [{group: '', kind: Service, name: s}], hostnamez: []".to_owned(), "spec.hostnamez", true),
        ("parentRefs: [{group: '', kind: Service, name: s}], hostnames: ['a b']".to_owned(), "spec.hostnames[0]", true),
        (
            "parentRefs: [{group: '', kind: Service, name: s}], useDefaultGateways: All".to_owned(),
            "spec.useDefaultGateways",
            true,
        ),
        ("parentRefs: [{group: '', kind: Service, name: s}, {kind: Gateway}]".to_owned(), "spec.parentRefs[1].name", true),
        ("parentRefs: [{group: '', kind: Service, name: s}, {name: g, gate: x}]".to_owned(), "spec.parentRefs[1].gate", true),
        ("parentRefs: [{kind: Service}]".to_owned(), "spec.parentRefs[0].name", false),
        ("rules: []".to_owned(), "spec.parentRefs", false),
    ] {
        let (state, problems) = mesh(&(services("a") + &route("HTTPRoute", "a", "r", &spec)));
        let [p] = problems.as_slice() else { panic!("{spec}: {problems:?}") };
        assert_eq!(&*p.field, field, "{spec}");
        assert_eq!(state.routes.get(S).is_some_and(|t| t.broken.is_some()), closed, "{spec}");
    }
    let text = services("a") + &object("HTTPRoute", API, "a", "r", "", &format!("spec: {{{TO_S}}}, spek: {{}}"));
    assert_eq!(brief(&mesh(&text).1), [("error", "spek", "unknown-field")]);
    // What a cluster adds is no mistake.
    let text = services("a")
        + &object(
            "HTTPRoute",
            API,
            "a",
            "r",
            ", uid: x, generation: 2, managedFields: [{a: b}]",
            &format!("spec: {{{TO_S}}}, status: {{parents: [{{conditions: []}}], whatever: 1}}"),
        );
    good(&text);
}

#[test]
fn a_broken_route_does_not_replace_a_good_one() {
    let mut t = translator();
    let mut state = State::default();
    let mut put = |t: &mut Translator, text: &str| {
        for o in objects(t, text).0 {
            t.upsert(o);
        }
        state.apply(t.flush());
        let table = Arc::clone(&state.routes[S]);
        (table.broken.is_some(), table.http.len())
    };
    assert_eq!(put(&mut t, &with_rule("backendRefs: [{name: t, port: 80}]")), (false, 1));
    assert_eq!(put(&mut t, &with_rule("x: 1")), (false, 1));
    let id = objects(&mut t, &route("HTTPRoute", "a", "r", TO_S)).0.remove(0).id;
    t.remove(&id);
    assert_eq!(put(&mut t, &with_rule("x: 1")), (true, 0));
    assert_eq!(put(&mut t, &with_rule("backendRefs: [{name: t, port: 80}]")), (false, 1));
}

// ---- order ----

/// A match and the facts that order it, told apart from the code under test.
#[derive(Clone, Debug)]
struct Spec {
    path: usize,
    method: bool,
    headers: usize,
    query: usize,
    route: usize,
}
const PATHS: &[(&str, u8, usize)] = &[
    ("{type: Exact, value: /a}", 0, 2),
    ("{type: Exact, value: /a/b}", 0, 4),
    ("{type: PathPrefix, value: /}", 1, 1),
    ("{type: PathPrefix, value: /a}", 1, 2),
    ("{type: PathPrefix, value: /a/b/}", 1, 4),
    ("{type: RegularExpression, value: '/[a-z]+'}", 2, 7),
    ("{type: RegularExpression, value: '/.*'}", 2, 3),
];
/// Three routes: name, date. The second is the oldest; the third has no date, which is younger than any.
const ROUTES: &[(&str, &str)] = &[("b", "2024-02-02T00:00:00Z"), ("c", "2023-01-01T00:00:00Z"), ("a", "")];

fn spec() -> impl Strategy<Value = Spec> {
    (0..PATHS.len(), any::<bool>(), 0usize..3, 0usize..3, 0..ROUTES.len())
        .prop_map(|(path, method, headers, query, route)| Spec { path, method, headers, query, route })
}
fn text_of(s: &Spec, n: usize) -> String {
    let list = |k: usize| (0..k).map(|i| format!("{{name: n{i}, value: v}}")).collect::<Vec<_>>().join(", ");
    let method = if s.method { ", method: GET" } else { "" };
    format!(
        "{{name: rule{n}, matches: [{{path: {}{method}, headers: [{}], queryParams: [{}]}}], backendRefs: [{{name: t, port: 80}}]}}",
        PATHS[s.path].0,
        list(s.headers),
        list(s.query)
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn rules_are_in_the_order_of_the_gateway_api(specs in prop::collection::vec(spec(), 1..12), backwards in any::<bool>()) {
        let mut docs = vec![services("a")];
        for (r, (name, created)) in ROUTES.iter().enumerate() {
            let rules: Vec<String> = specs.iter().enumerate().filter(|(_, s)| s.route == r).map(|(n, s)| text_of(s, n)).collect();
            if !rules.is_empty() {
                let meta = if created.is_empty() { String::new() } else { format!(", creationTimestamp: '{created}'") };
                docs.push(object("HTTPRoute", API, "a", name, &meta, &format!("spec: {{{TO_S}, rules: [{}]}}", rules.join(", "))));
            }
        }
        if backwards {
            docs.reverse();
        }
        let state = good(&docs.concat());
        let got: Vec<String> = state.table(S).http.iter().map(|r| r.route.name.to_string()).collect();
        let mut want: Vec<usize> = (0..specs.len()).collect();
        want.sort_by(|&x, &y| {
            let (a, b) = (&specs[x], &specs[y]);
            let ((_, ka, la), (_, kb, lb)) = (PATHS[a.path], PATHS[b.path]);
            let age = |s: &Spec| ["2023", "2024", "none"].iter().position(|d| ROUTES[s.route].1.starts_with(d)).unwrap_or(2);
            ka.cmp(&kb)
                .then(lb.cmp(&la))
                .then(b.method.cmp(&a.method))
                .then(b.headers.cmp(&a.headers))
                .then(b.query.cmp(&a.query))
                .then(age(a).cmp(&age(b)))
                .then(x.cmp(&y))
        });
        prop_assert_eq!(got, want.into_iter().map(|n| format!("rule{n}")).collect::<Vec<_>>());
    }
}

#[test]
fn routes_without_dates_are_in_the_order_of_their_names_across_kinds() {
    let rule = "rules: [{backendRefs: [{name: t, port: 80}]}]";
    let text = services("a")
        + &route("HTTPRoute", "a", "z", &format!("{TO_S}, {rule}"))
        + &route("HTTPRoute", "a", "b", &format!("{TO_S}, {rule}"))
        + &route(
            "GRPCRoute",
            "a",
            "a",
            &format!(
                "{TO_S}, rules: [{{matches: [{{method: {{service: x.Y, method: Z}}}}], backendRefs: [{{name: t, port: 80}}]}}, {{backendRefs: [{{name: u, port: 80}}]}}]"
            ),
        );
    let state = good(&text);
    let names: Vec<&str> = state.table(S).http.iter().map(|r| &*r.route.name).collect();
    assert_eq!(names, ["a.a.0", "a.b.0", "a.z.0", "a.a.1"], "a gRPC rule for everything comes last");
    let origins: Vec<&str> = state.table(S).origins.iter().map(|o| &*o.object).collect();
    assert_eq!(origins, ["GRPCRoute a/a", "HTTPRoute a/b", "HTTPRoute a/z"]);
}

// ---- GRPCRoute, TCPRoute, TLSRoute ----

#[test]
fn grpc_matches() {
    let grpc = |m: &str| {
        let spec = format!("{TO_S}, rules: [{{matches: [{m}], backendRefs: [{{name: t, port: 80}}]}}]");
        good(&(services("a") + &route("GRPCRoute", "a", "r", &spec))).table(S).http.get(0).unwrap().matches.as_ref().clone()
    };
    let g = grpc("{method: {service: a.B, method: C}, headers: [{name: X, value: y}]}");
    let exact = |t: &str| Some(StringMatch::Exact(t.into()));
    let m = g.grpc.unwrap();
    assert_eq!((m.service, m.method, g.headers.len(), g.path), (exact("a.B"), exact("C"), 1, None));
    assert_eq!(grpc("{method: {service: a.B}}").grpc.unwrap().method, None);
    let m = grpc("{method: {type: RegularExpression, method: 'Get.*'}}").grpc.unwrap();
    assert!(m.service.is_none() && m.method.unwrap().matches("GetX"));
    assert_eq!(grpc("{}"), HttpMatch::default());
    for (rule, field) in [
        ("matches: [{method: {}}]", "spec.rules[0].matches[0].method.service"),
        ("matches: [{method: {type: Prefix, service: x}}]", "spec.rules[0].matches[0].method.type"),
        ("matches: [{path: {value: /}}]", "spec.rules[0].matches[0].path"),
        ("retry: {}", "spec.rules[0].retry"),
    ] {
        let (state, problems) = mesh(&(services("a") + &route("GRPCRoute", "a", "r", &format!("{TO_S}, rules: [{{{rule}}}]"))));
        assert_eq!(brief(&problems).iter().map(|p| p.1).collect::<Vec<_>>(), [field], "{rule}");
        assert!(state.table(S).broken.is_some());
    }
    // Filters that only HTTPRoutes have.
    let spec = format!(
        "{TO_S}, rules: [{{filters: [{{type: URLRewrite, urlRewrite: {{hostname: x}}}}], backendRefs: [{{name: t, port: 80}}]}}]"
    );
    let (state, problems) = mesh(&(services("a") + &route("GRPCRoute", "a", "r", &spec)));
    assert_eq!(brief(&problems), [("error", "spec.rules[0].filters[0]", "unsupported-filter")]);
    assert!(responds_500(&state.table(S).http.get(0).unwrap().route));
}

#[test]
fn tcp_and_tls_in_the_mesh() {
    let backends = "backendRefs: [{name: t, port: 80, weight: 3}, {name: u, port: 80}]";
    let text = services("a")
        + &route(
            "TCPRoute",
            "a",
            "r",
            &format!("parentRefs: [{{group: '', kind: Service, name: s, port: 81}}], rules: [{{{backends}}}]"),
        )
        + &route("TLSRoute", "a", "q", &format!("{TO_S}, hostnames: ['*.x.com', a.x.com], rules: [{{{backends}}}]"))
        + &route("TLSRoute", "a", "p", &format!("{TO_S}, rules: [{{backendRefs: [{{name: gone, port: 80}}]}}]"));
    let (state, problems) = mesh(&text);
    assert_eq!(brief(&problems), [("error", "spec.rules[0].backendRefs", "backend-not-found")]);
    let table = state.table(S);
    let [tcp] = table.tcp.as_slice() else { panic!("{table:?}") };
    assert_eq!((tcp.port, tcp.route.total_weight, tcp.route.backends[0].to.clone()), (Some(81), 4, to("a", "t", 80)));
    let sni: Vec<&str> = table.tls.iter().map(|r| &*r.sni[0]).collect();
    assert_eq!(sni, ["s.a.svc.cluster.local", "a.x.com", "*.x.com"], "exact names before wildcards");
    assert!(matches!(table.tls[0].route.backends[0].to, BackendRef::Invalid { .. }));
    let none = services("a") + &route("TCPRoute", "a", "r", &format!("{TO_S}, rules: [{{}}]"));
    assert_eq!(good(&none).table(S).tcp[0].route.total_weight, 0, "refused, not the service itself");
    for (kind, rule) in [("TCPRoute", "rules: []"), ("TCPRoute", "hostnames: [a.b]"), ("TLSRoute", "rules: [{filters: []}]")] {
        let (state, problems) = mesh(&(services("a") + &route(kind, "a", "r", &format!("{TO_S}, {rule}"))));
        assert_eq!((problems.len(), state.table(S).broken.is_some()), (1, true), "{kind} {rule}");
    }
}

// ---- references ----

fn grant(ns: &str, from: &str, to: &str) -> String {
    object("ReferenceGrant", "gateway.networking.k8s.io/v1beta1", ns, "g", "", &format!("spec: {{from: [{from}], to: [{to}]}}"))
}

#[test]
fn references_that_cannot_be_used_answer_500_for_their_share() {
    let from = "{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}";
    let other = "{name: t, namespace: b, port: 80}";
    for (backend, more, code) in [
        ("{name: t, port: 80}", String::new(), ""),
        ("{name: gone, port: 80}", String::new(), "backend-not-found"),
        ("{name: t, port: 8080}", String::new(), "backend-not-found"),
        ("{name: ext, port: 80}", String::new(), "backend-not-found"),
        ("{group: x.io, kind: Bucket, name: t}", String::new(), "invalid-kind"),
        ("{kind: Pod, name: t, port: 80}", String::new(), "invalid-kind"),
        (other, String::new(), "ref-not-permitted"),
        ("{name: t, namespace: a, port: 80}", String::new(), ""),
        (other, grant("b", from, "{group: '', kind: Service}"), ""),
        (other, grant("b", from, "{kind: Service, name: t}"), ""),
        (other, grant("b", from, "{kind: Service, name: u}"), "ref-not-permitted"),
        (other, grant("b", from, "{kind: Secret}"), "ref-not-permitted"),
        (other, grant("a", from, "{kind: Service}"), "ref-not-permitted"),
        (other, grant("b", &from.replace("HTTPRoute", "GRPCRoute"), "{kind: Service}"), "ref-not-permitted"),
        (other, grant("b", &from.replace("namespace: a", "namespace: c"), "{kind: Service}"), "ref-not-permitted"),
        (other, grant("b", &from.replace("gateway.networking.k8s.io", "x.io"), "{kind: Service}"), "ref-not-permitted"),
        ("{name: gone, namespace: b, port: 80}", grant("b", from, "{kind: Service}"), "backend-not-found"),
        ("{group: networking.istio.io, kind: Hostname, name: X.com, port: 443}", String::new(), ""),
        ("{group: networking.istio.io, kind: Hostname, name: y.com, port: 443}", String::new(), "backend-not-found"),
        ("{group: networking.istio.io, kind: ServiceEntry, name: x, port: 443}", String::new(), "invalid-kind"),
    ] {
        let text = services("b")
            + &object("Service", "v1", "a", "ext", "", "spec: {type: ExternalName, externalName: x.y, ports: [{port: 80}]}")
            + &object(
                "ServiceEntry",
                "networking.istio.io/v1",
                "c",
                "x",
                "",
                "spec: {hosts: [x.com], resolution: DNS, ports: [{number: 443, name: tls}]}",
            )
            + &with_rule(&format!("backendRefs: [{backend}, {{name: u, port: 80}}]"))
            + &more;
        let (state, problems) = mesh(&text);
        let codes: Vec<&str> = problems.iter().filter_map(|p| p.code).collect();
        assert_eq!(codes.join(","), code, "{backend} {more}: {problems:?}");
        let HttpAction::Forward(f) = &state.table(S).http.get(0).unwrap().route.action else { panic!() };
        let invalid = matches!(f.backends[0].to, BackendRef::Invalid { status: 500, .. });
        assert_eq!((invalid, f.total_weight), (!code.is_empty(), 2), "{backend}: {f:?}");
        assert_eq!(f.backends[1].to, to("a", "u", 80), "the other share is not touched");
        if backend.contains("X.com") {
            let BackendRef::Service(key) = &f.backends[0].to else { panic!() };
            assert_eq!(key.service, ServiceKey::new("c", "x.com"));
        }
    }
    let (state, problems) = mesh(&with_rule(
        "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: gone, port: 80}}}, {type: RequestMirror, requestMirror: {backendRef: {name: u, port: 80}}}], backendRefs: [{name: t, port: 80}]",
    ));
    assert_eq!(brief(&problems), [("error", "spec.rules[0].filters", "backend-not-found")]);
    let HttpAction::Forward(f) = &state.table(S).http.get(0).unwrap().route.action else { panic!() };
    assert_eq!(f.mirrors.iter().map(|m| m.to.clone()).collect::<Vec<_>>(), [to("a", "u", 80)]);
}

#[test]
fn mistakes_in_grants_grant_nothing() {
    for (spec, field) in [
        ("{from: [{kind: HTTPRoute}]}", "spec.from[0].namespace"),
        ("{from: [{namespace: a}]}", "spec.from[0].kind"),
        ("{to: [{}]}", "spec.to[0].kind"),
        ("{too: []}", "spec.too"),
        ("{to: [{kind: Service, names: [x]}]}", "spec.to[0].names"),
    ] {
        let text = object("ReferenceGrant", "gateway.networking.k8s.io/v1beta1", "b", "g", "", &format!("spec: {spec}"));
        let mut t = translator();
        let (all, problems) = objects(&mut t, &text);
        assert_eq!((all.len(), brief(&problems)[0].1), (0, field), "{spec}");
    }
}

// ---- parents in the mesh ----

#[test]
fn parents_scope_rules() {
    let rules = "rules: [{backendRefs: [{name: t, port: 80}]}]";
    let ports = |parents: &str| {
        let (state, problems) =
            mesh(&(services("a") + &services("b") + &route("HTTPRoute", "a", "r", &format!("parentRefs: [{parents}], {rules}"))));
        let ports = state
            .routes
            .get(S)
            .map(|t| t.http.iter().filter(|r| r.route.origin.is_some()).map(|r| r.matches.port).collect::<Vec<_>>());
        (ports, problems.iter().map(|p| (p.severity.as_str(), p.code.unwrap_or(""))).collect::<Vec<_>>())
    };
    let s = |more: &str| format!("{{group: '', kind: Service, name: s{more}}}");
    assert_eq!(ports(&s("")), (Some(vec![None]), vec![]));
    assert_eq!(ports(&s(", namespace: a")), (Some(vec![None]), vec![]));
    assert_eq!(ports(&s(", port: 81")), (Some(vec![Some(81)]), vec![]));
    assert_eq!(ports(&s(", sectionName: other")), (Some(vec![Some(81)]), vec![]));
    assert_eq!(ports(&s(", sectionName: other, port: 81")), (Some(vec![Some(81)]), vec![]));
    assert_eq!(ports(&(s(", port: 80") + ", " + &s(", port: 81"))), (Some(vec![Some(80), Some(81)]), vec![]));
    for wrong in [", port: 82", ", sectionName: nope", ", sectionName: http, port: 81"] {
        assert_eq!(ports(&s(wrong)), (Some(vec![]), vec![("warning", "parent")]), "{wrong}");
    }
    assert_eq!(ports("{group: '', kind: Service, name: gone}"), (None, vec![("warning", "parent")]));
    assert_eq!(
        ports("{group: '', kind: Service, name: s, namespace: b}"),
        (None, vec![("error", "parent")]),
        "no consumer routes"
    );
    assert_eq!(ports("{group: x.io, kind: Thing, name: s}"), (None, vec![("warning", "parent")]));
    assert_eq!(ports("{name: gone}"), (None, vec![("warning", "parent")]), "an absent kind is a Gateway");
    // A port no route speaks of stays as it was.
    let state = good(&(services("a") + &route("HTTPRoute", "a", "r", &format!("parentRefs: [{}], {rules}", s(", port: 80")))));
    let last = state.table(S).http.iter().last().unwrap();
    assert_eq!((last.matches.port, last.route.origin.is_none()), (Some(81), true));
}

#[test]
fn service_entries_are_parents_by_name() {
    let se = |name: &str, hosts: &str| {
        object(
            "ServiceEntry",
            "networking.istio.io/v1",
            "a",
            name,
            "",
            &format!("spec: {{hosts: [{hosts}], resolution: DNS, ports: [{{number: 80, name: http}}]}}"),
        )
    };
    let r = |name: &str| {
        route(
            "HTTPRoute",
            "a",
            "r",
            &format!(
                "parentRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: {name}}}], hostnames: [ignored.com], rules: [{{backendRefs: [{{name: t, port: 80}}]}}]"
            ),
        )
    };
    let state = good(&(services("a") + &se("e", "x.com, y.com") + &se("f", "z.com") + &r("e")));
    assert_eq!(state.routes.keys().collect::<Vec<_>>(), ["a/x.com", "a/y.com"]);
    assert_eq!(mesh(&(services("a") + &se("f", "z.com") + &r("e"))).0.routes.len(), 0);

    // Everything in any order.
    let mut t = translator();
    let mut state = State::default();
    for (text, want) in [
        (r("e"), &[][..]),
        (services("a"), &[]),
        (se("e", "x.com"), &["a/x.com"]),
        (se("e", "y.com, x.com"), &["a/x.com", "a/y.com"]),
        (se("e", "y.com"), &["a/y.com"]),
        (r("f"), &[]),
        (se("f", "w.com"), &["a/w.com"]),
    ] {
        for o in objects(&mut t, &text).0 {
            t.upsert(o);
        }
        state.apply(t.flush());
        assert_eq!(state.routes.keys().collect::<Vec<_>>(), want, "{text}");
    }
}

// ---- Gateways ----

fn gateway_with(listeners: &str) -> String {
    object("Gateway", API, "a", "gw", "", &format!("spec: {{gatewayClassName: culvert, listeners: [{listeners}]}}"))
}
const CERT: &str = "-----BEGIN CERTIFICATE-----\\nMII\\n-----END CERTIFICATE-----\\n";
const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\\nMII\\n-----END PRIVATE KEY-----\\n";
fn tls_secret(ns: &str, name: &str) -> String {
    object(
        "Secret",
        "v1",
        ns,
        name,
        "",
        &format!("type: kubernetes.io/tls, stringData: {{tls.crt: \"{CERT}\", tls.key: \"{PRIVATE}\"}}"),
    )
}
fn to_gateway(kind: &str, ns: &str, name: &str, parent: &str, hostnames: &str) -> String {
    let hosts = if hostnames.is_empty() { String::new() } else { format!(", hostnames: [{hostnames}]") };
    let backend = if ns == "a" { "t" } else { "s" };
    route(
        kind,
        ns,
        name,
        &format!(
            "parentRefs: [{{name: gw, namespace: a{parent}}}]{hosts}, rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]"
        ),
    )
}
fn hosts_of(g: &GatewayRoutes, listener: &str) -> Vec<String> {
    let l = g.listeners.iter().find(|l| &*l.name == listener).unwrap();
    l.hosts.iter().map(|(h, _)| h.to_string()).collect()
}

#[test]
fn listeners_of_every_protocol() {
    let text = services("a")
        + &tls_secret("a", "c1")
        + &gateway_with(
            "{name: http, port: 80, protocol: HTTP}, {name: https, port: 443, protocol: HTTPS, hostname: '*.X.com', tls: {certificateRefs: [{name: c1}]}}, \
             {name: pass, port: 443, protocol: TLS, hostname: p.com, tls: {mode: Passthrough}}, {name: term, port: 8443, protocol: TLS, tls: {mode: Terminate, options: {culvert.dev/tls-certificate: /etc/c, culvert.dev/tls-key: /etc/k}}}, \
             {name: tcp, port: 9000, protocol: TCP}, {name: mesh, port: 15008, protocol: HBONE}",
        )
        + &to_gateway("HTTPRoute", "a", "h", "", "")
        + &to_gateway("TLSRoute", "a", "l", "", "p.com")
        + &to_gateway("TCPRoute", "a", "c", "", "").replace("hostnames", "x");
    let state = good(&text);
    let g = state.gateway("a/gw");
    let got: Vec<_> =
        g.listeners.iter().map(|l| (&*l.name, l.port, l.protocol, l.hostname.as_deref(), l.broken.as_deref())).collect();
    assert_eq!(
        got,
        [
            ("http", 80, ListenerProtocol::Http, None, None),
            ("https", 443, ListenerProtocol::Https, Some("*.x.com"), None),
            ("pass", 443, ListenerProtocol::Tls, Some("p.com"), None),
            ("term", 8443, ListenerProtocol::Tls, None, None),
            ("tcp", 9000, ListenerProtocol::Tcp, None, None),
        ]
    );
    let Some(ListenerTls::Terminate(pairs)) = &g.listeners[1].tls else { panic!("{g:?}") };
    assert!(pairs[0].chain.starts_with("-----BEGIN CERTIFICATE-----\n") && pairs[0].key.contains("PRIVATE KEY"));
    assert!(!format!("{g:?}").contains("PRIVATE KEY"), "keys are not printed");
    assert_eq!(g.listeners[2].tls, Some(ListenerTls::Passthrough));
    assert_eq!(g.listeners[3].tls, Some(ListenerTls::Files { chain: "/etc/c".into(), key: "/etc/k".into() }));
    assert_eq!(hosts_of(g, "http"), ["*"]);
    assert_eq!(hosts_of(g, "https"), ["*.x.com"], "a route without host names has the listener's");
    assert_eq!(hosts_of(g, "pass"), ["p.com"]);
    assert_eq!(&*g.listeners[2].hosts[0].1.tls[0].sni[0], "p.com");
    assert_eq!(g.listeners[2].hosts[0].1.tls[0].route.backends[0].to, to("a", "t", 80));
    assert_eq!(hosts_of(g, "term"), ["p.com", "*"], "TLS routes and TCP routes");
    assert_eq!((g.listeners[4].hosts[0].1.tcp.len(), g.listeners[4].hosts[0].1.tcp[0].port), (1, None));
    assert_eq!(g.origin.as_ref().unwrap().object.as_ref(), "Gateway a/gw");
}

#[test]
fn waypoints_are_not_gateways_of_this_kind() {
    let waypoint = |protocol: &str| gateway_with(&format!("{{name: mesh, port: 15008, protocol: {protocol}}}"));
    for protocol in ["HBONE", "istio.io/PROXY"] {
        assert!(good(&waypoint(protocol)).gateways.is_empty());
        let (state, problems) = mesh(&(services("a") + &waypoint(protocol) + &to_gateway("HTTPRoute", "a", "h", "", "")));
        assert_eq!((state.gateways.len(), brief(&problems)), (0, vec![("warning", "spec.parentRefs[0]", "parent")]));
        assert!(problems[0].message.contains("waypoint"));
    }
    // Without layer 7 nothing of it is read.
    let mut t = Translator::new(Viewpoint::default(), &Settings::default());
    let (all, _) = objects(&mut t, &(gateway_with("{name: h, port: 80, protocol: HTTP, oops: 1}") + &tls_secret("a", "c")));
    assert_eq!(all.len(), 1);
    for o in all {
        t.upsert(o);
    }
    assert!(t.flush().iter().all(|c| !matches!(c, Change::Gateway(_))));
}

#[test]
fn mistakes_in_listeners_close_the_listener_alone() {
    let c1 = "certificateRefs: [{name: c1}]";
    for (listener, field, message) in [
        ("{name: x, port: 80, protocol: UDP}".to_owned(), "protocol", "`UDP`"),
        ("{name: x, port: 80}".into(), "protocol", "has a protocol"),
        ("{port: 80, protocol: HTTP}".into(), "name", "has a name"),
        ("{name: x, port: 80, protocol: HTTP, hostnames: a}".into(), "hostnames", "did you mean `hostname`"),
        ("{name: x, port: 80, protocol: HTTP, hostname: 'a b'}".into(), "hostname", "not a host name"),
        ("{name: x, port: 80, protocol: TCP, hostname: a.b}".into(), "hostname", "no host name"),
        (format!("{{name: x, port: 80, protocol: HTTP, tls: {{{c1}}}}}"), "tls", "has no `tls`"),
        ("{name: x, port: 80, protocol: HTTPS}".into(), "tls", "how it is terminated"),
        ("{name: x, port: 80, protocol: HTTPS, tls: {}}".into(), "tls.certificateRefs", "certificate is needed"),
        ("{name: x, port: 80, protocol: HTTPS, tls: {mode: Passthrough}}".into(), "tls.mode", "HTTPS is terminated"),
        (format!("{{name: x, port: 80, protocol: HTTPS, tls: {{mode: Mutual, {c1}}}}}"), "tls.mode", "`Mutual`"),
        (
            format!("{{name: x, port: 80, protocol: HTTPS, tls: {{{c1}, frontendValidation: {{caCertificateRefs: []}}}}}}"),
            "tls.frontendValidation.caCertificateRefs",
            "certificates of clients",
        ),
        (
            format!(
                "{{name: x, port: 80, protocol: HTTPS, tls: {{{c1}, options: {{gateway.istio.io/tls-terminate-mode: ISTIO_MUTUAL}}}}}}"
            ),
            "tls.options[\"gateway.istio.io/tls-terminate-mode\"]",
            "`ISTIO_MUTUAL` is not available",
        ),
        (
            "{name: x, port: 80, protocol: TLS, tls: {mode: Passthrough, options: {gateway.istio.io/tls-terminate-mode: MUTUAL}}}".into(),
            "tls.options[\"gateway.istio.io/tls-terminate-mode\"]",
            "passed through",
        ),
        (
            "{name: x, port: 80, protocol: HTTPS, tls: {options: {culvert.dev/tls-certificate: /c, culvert.dev/tls-key: /k, gateway.istio.io/tls-terminate-mode: MUTUAL}}}".into(),
            "tls.options[\"gateway.istio.io/tls-terminate-mode\"]",
            "is to be named",
        ),
        (
            format!("{{name: x, port: 80, protocol: HTTPS, tls: {{{c1}, frontendValidation: {{mode: AllowInsecureFallback, caCertificateRefs: [{{kind: ConfigMap, name: ca}}]}}}}}}"),
            "tls.frontendValidation.mode",
            "`AllowInsecureFallback` is not available",
        ),
        (
            format!("{{name: x, port: 80, protocol: HTTPS, tls: {{{c1}, options: {{gateway.istio.io/tls-terminate-mode: MUTUAL}}, frontendValidation: {{caCertificateRefs: [{{kind: ConfigMap, name: ca}}]}}}}}}"),
            "tls.options[\"gateway.istio.io/tls-terminate-mode\"]",
            "said twice",
        ),
        (
            format!("{{name: x, port: 80, protocol: HTTPS, tls: {{{c1}, options: {{ciphers: x}}}}}}"),
            "tls.options.ciphers",
            "not known",
        ),
        ("{name: x, port: 80, protocol: HTTPS, tls: {options: {culvert.dev/tls-key: /k}}}".into(), "tls.options", "together"),
        (
            format!(
                "{{name: x, port: 80, protocol: HTTPS, tls: {{{c1}, options: {{culvert.dev/tls-certificate: /c, culvert.dev/tls-key: /k}}}}}}"
            ),
            "tls.certificateRefs[0]",
            "exclude",
        ),
        (
            "{name: x, port: 80, protocol: HTTPS, tls: {certificateRefs: [{kind: ConfigMap, name: c}]}}".into(),
            "tls.certificateRefs[0]",
            "ConfigMap",
        ),
        (
            "{name: x, port: 80, protocol: HTTPS, tls: {certificateRefs: [{}]}}".into(),
            "tls.certificateRefs[0].name",
            "has a name",
        ),
        (
            "{name: x, port: 80, protocol: HTTP, allowedRoutes: {namespace: {}}}".into(),
            "allowedRoutes.namespace",
            "unknown field",
        ),
        (
            "{name: x, port: 80, protocol: HTTP, allowedRoutes: {kinds: [{group: x}]}}".into(),
            "allowedRoutes.kinds[0].kind",
            "is named",
        ),
    ] {
        let (state, problems) =
            mesh(&(tls_secret("a", "c1") + &gateway_with(&format!("{{name: ok, port: 81, protocol: HTTP}}, {listener}"))));
        let [p] = problems.as_slice() else { panic!("{listener}: {problems:?}") };
        assert_eq!(&*p.field, format!("spec.listeners[1].{field}"), "{listener}");
        assert!(p.message.contains(message), "{listener}: {p}");
        let g = state.gateway("a/gw");
        assert_eq!(g.listeners[0].broken, None, "{listener}");
        assert!(g.listeners[1].broken.as_ref().is_some_and(|b| b.contains(message)), "{listener}: {g:?}");
    }
    for (spec, broken, field) in [
        ("frontendTLS: {}", true, "spec.frontendTLS"),
        ("tls: {frontend: {default: {validation: {}}}}", true, "spec.tls.frontend.default.validation.caCertificateRefs"),
        ("tls: {frontend: {perPort: [{tls: {}}]}}", true, "spec.tls.frontend.perPort[0].port"),
        ("tls: {frontend: {default: {mode: x}}}", true, "spec.tls.frontend.default.mode"),
        ("defaultScope: All", true, "spec.defaultScope"),
        ("tls: {backend: {clientCertificateRef: {name: x}}}", false, "spec.tls.backend"),
        ("allowedListeners: {namespaces: {from: All}}", false, "spec.allowedListeners"),
    ] {
        let text = object(
            "Gateway",
            API,
            "a",
            "gw",
            "",
            &format!("spec: {{listeners: [{{name: h, port: 80, protocol: HTTP}}], {spec}}}"),
        );
        let (state, problems) = mesh(&text);
        assert_eq!(brief(&problems)[0].1, field, "{spec}");
        assert_eq!(state.gateway("a/gw").listeners[0].broken.is_some(), broken, "{spec}");
    }
}

#[test]
fn certificates_of_clients_are_asked_for() {
    let ca = |kind: &str, ns: &str, name: &str, data: &str| object(kind, "v1", ns, name, "", data);
    let pem = "'-----BEGIN CERTIFICATE----- A'";
    let with_ca = |name: &str, more: &str| ca("Secret", "a", name, &format!("stringData: {{ca.crt: {pem}{more}}}"));
    let mode = |mode: &str| {
        gateway_with(&format!(
            "{{name: x, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{{name: c}}], options: {{gateway.istio.io/tls-terminate-mode: {mode}}}}}}}"
        ))
    };
    let named = |r: &str| {
        gateway_with(&format!(
            "{{name: x, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{{name: c}}], frontendValidation: {{caCertificateRefs: [{r}]}}}}}}"
        ))
    };
    let grants = grant("b", "{group: gateway.networking.k8s.io, kind: Gateway, namespace: a}", "{kind: ConfigMap}");
    let map = |ns: &str| ca("ConfigMap", ns, "m", &format!("data: {{ca.crt: {pem}}}"));
    let elsewhere = named("{kind: ConfigMap, namespace: b, name: m}");
    // What is asked for: `None` nothing, else whether it is required; or why it is not listened on.
    for (what, text, want) in [
        ("simple", mode("SIMPLE"), Ok(None)),
        ("no authority", mode("MUTUAL"), Err("neither Secret a/c nor a/c-cacert")),
        ("beside", mode("MUTUAL") + &with_ca("c-cacert", ""), Ok(Some(true))),
        ("optional", mode("OPTIONAL_MUTUAL") + &with_ca("c-cacert", ""), Ok(Some(false))),
        ("no certificate", mode("MUTUAL") + &ca("Secret", "a", "c-cacert", "stringData: {ca.crt: x}"), Err("neither Secret")),
        ("a map", named("{kind: ConfigMap, name: m}") + &map("a"), Ok(Some(true))),
        ("no map", named("{kind: ConfigMap, name: m}"), Err("ConfigMap a/m does not exist")),
        ("a Secret", named("{kind: Secret, name: s}") + &with_ca("s", ""), Ok(Some(true))),
        ("something", named("{group: x, kind: Y, name: s}"), Err("cannot come from a x/Y")),
        ("elsewhere", elsewhere.clone() + &map("b"), Err("RefNotPermitted")),
        ("permitted", elsewhere + &map("b") + &grants, Ok(Some(true))),
        ("one of two", named("{kind: ConfigMap, name: m}, {kind: ConfigMap, name: n}") + &map("a"), Err("ConfigMap a/n")),
    ] {
        let (state, problems) = mesh(&(text + &tls_secret("a", "c")));
        let l = &state.gateway("a/gw").listeners[0];
        match want {
            Ok(required) => {
                assert_eq!((l.clients.as_ref().map(|c| c.required), l.broken.as_ref()), (required, None), "{what}: {problems:?}");
                assert!(problems.is_empty(), "{what}: {problems:?}");
            }
            Err(why) => {
                assert!(l.broken.as_ref().is_some_and(|b| b.contains(why)) && l.tls.is_none(), "{what}: {l:?}");
                let [p] = problems.as_slice() else { panic!("{what}: {problems:?}") };
                assert!(p.message.contains("443 is not listened on"), "{what}: {p}");
            }
        }
    }
    // All of what is named counts, and revocation lists with it.
    let crl = ", ca.crl: '-----BEGIN X509 CRL----- L'";
    let state = good(
        &(named("{kind: Secret, name: s}, {kind: ConfigMap, name: m}") + &with_ca("s", crl) + &map("a") + &tls_secret("a", "c")),
    );
    let clients = state.gateway("a/gw").listeners[0].clients.clone().unwrap();
    assert_eq!(clients.roots.matches("BEGIN CERTIFICATE").count(), 2);
    assert!(clients.crl.as_ref().is_some_and(|crl| crl.contains("X509 CRL")));
}

/// `spec.tls.frontend` is for HTTPS listeners, by port or for all.
#[test]
fn a_gateway_asks_for_certificates_of_clients_by_port() {
    let listener = |name: &str, port: u16, protocol: &str, more: &str| {
        format!("{{name: {name}, port: {port}, protocol: {protocol}, tls: {{certificateRefs: [{{name: c}}]{more}}}}}")
    };
    let gateway = |listeners: &str, frontend: &str| {
        let spec = format!("spec: {{listeners: [{listeners}], tls: {{frontend: {frontend}}}}}");
        let map = |name: &str| {
            object("ConfigMap", "v1", "a", name, "", &format!("data: {{ca.crt: '-----BEGIN CERTIFICATE----- {name}'}}"))
        };
        mesh(&(object("Gateway", API, "a", "gw", "", &spec) + &map("one") + &map("two") + &tls_secret("a", "c")))
    };
    let of =
        |name: &str| format!("{{validation: {{mode: AllowValidOnly, caCertificateRefs: [{{kind: ConfigMap, name: {name}}}]}}}}");
    let all = [
        listener("a", 443, "HTTPS", ""),
        listener("b", 444, "HTTPS", ""),
        listener("c", 445, "HTTPS", ""),
        listener("d", 446, "TLS", ""),
    ]
    .join(", ");
    let frontend = format!("{{default: {}, perPort: [{{port: 444, tls: {}}}, {{port: 445, tls: {{}}}}]}}", of("one"), of("two"));
    let (state, problems) = gateway(&all, &frontend);
    assert!(problems.is_empty(), "{problems:?}");
    let got: Vec<_> =
        state.gateway("a/gw").listeners.iter().map(|l| l.clients.as_ref().map(|c| c.roots.trim().to_owned())).collect();
    let want = |name: &str| Some(format!("-----BEGIN CERTIFICATE----- {name}"));
    assert_eq!(got, [want("one"), want("two"), None, None]);
    // Said twice is said by nobody.
    let own = listener("a", 443, "HTTPS", ", frontendValidation: {caCertificateRefs: [{kind: ConfigMap, name: one}]}");
    let (state, problems) = gateway(&own, &format!("{{default: {}}}", of("two")));
    assert_eq!(brief(&problems)[0].1, "spec.tls.frontend");
    assert!(state.gateway("a/gw").listeners[0].broken.as_ref().is_some_and(|b| b.contains("says itself")));
}

#[test]
fn listeners_that_want_one_port() {
    let broken = |listeners: &str| {
        let (state, problems) = mesh(&(tls_secret("a", "c1") + &gateway_with(listeners)));
        let got: Vec<bool> = state.gateway("a/gw").listeners.iter().map(|l| l.broken.is_some()).collect();
        assert_eq!(problems.iter().filter(|p| p.code == Some("listener-conflict")).count(), got.iter().filter(|b| **b).count());
        got
    };
    let tls = "tls: {certificateRefs: [{name: c1}]}";
    assert_eq!(
        broken("{name: a, port: 80, protocol: HTTP}, {name: b, port: 80, protocol: HTTP, hostname: x.com}"),
        [false, false]
    );
    assert_eq!(broken("{name: a, port: 80, protocol: HTTP}, {name: b, port: 80, protocol: HTTP}"), [false, true]);
    assert_eq!(
        broken(
            "{name: a, port: 80, protocol: HTTP}, {name: b, port: 80, protocol: TCP}, {name: c, port: 80, protocol: HTTP, hostname: y}"
        ),
        [false, true, false]
    );
    assert_eq!(
        broken(&format!("{{name: a, port: 80, protocol: HTTPS, {tls}}}, {{name: b, port: 80, protocol: HTTP, hostname: x}}")),
        [false, true]
    );
    assert_eq!(
        broken(&format!(
            "{{name: a, port: 80, protocol: HTTPS, {tls}}}, {{name: b, port: 80, protocol: TLS, hostname: x, tls: {{mode: Passthrough}}}}"
        )),
        [false, false]
    );
    assert_eq!(
        broken("{name: a, port: 80, protocol: TCP}, {name: b, port: 80, protocol: TCP}, {name: a, port: 81, protocol: TCP}"),
        [false, true, true]
    );
}

#[test]
fn certificates_come_from_secrets() {
    let listener = |r: &str| gateway_with(&format!("{{name: x, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{r}]}}}}"));
    let secret = |data: &str| object("Secret", "v1", "a", "c", "", data);
    let from = "{group: gateway.networking.k8s.io, kind: Gateway, namespace: a}";
    for (what, text, broken) in [
        ("missing", listener("{name: c}"), "does not exist"),
        ("there", listener("{name: c}") + &tls_secret("a", "c"), ""),
        ("elsewhere", listener("{name: c}") + &tls_secret("b", "c"), "does not exist"),
        ("not permitted", listener("{name: c, namespace: b}") + &tls_secret("b", "c"), "RefNotPermitted"),
        ("permitted", listener("{name: c, namespace: b}") + &tls_secret("b", "c") + &grant("b", from, "{kind: Secret}"), ""),
        (
            "permitted by name",
            listener("{name: c, namespace: b}") + &tls_secret("b", "c") + &grant("b", from, "{kind: Secret, name: c}"),
            "",
        ),
        (
            "permitted to another",
            listener("{name: c, namespace: b}") + &tls_secret("b", "c") + &grant("b", from, "{kind: Secret, name: d}"),
            "RefNotPermitted",
        ),
        (
            "a route may, a gateway may not",
            listener("{name: c, namespace: b}")
                + &tls_secret("b", "c")
                + &grant("b", &from.replace("Gateway", "HTTPRoute"), "{kind: Secret}"),
            "RefNotPermitted",
        ),
        ("no key", listener("{name: c}") + &secret(&format!("stringData: {{tls.crt: \"{CERT}\"}}")), "no private key"),
        (
            "no certificate",
            listener("{name: c}") + &secret(&format!("stringData: {{tls.crt: x, tls.key: \"{PRIVATE}\"}}")),
            "no certificate",
        ),
        (
            "base64",
            listener("{name: c}")
                + &secret("data: {tls.crt: LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0t, tls.key: LS0tLS1CRUdJTiBQUklWQVRFIEtFWS0tLS0t}"),
            "",
        ),
        ("one of two", listener("{name: c}, {name: d}") + &tls_secret("a", "c"), "a/d does not exist"),
        ("two", listener("{name: c}, {name: d}") + &tls_secret("a", "c") + &tls_secret("a", "d"), ""),
    ] {
        let (state, problems) = mesh(&text);
        let l = &state.gateway("a/gw").listeners[0];
        assert_eq!(l.broken.is_some(), !broken.is_empty(), "{what}: {l:?}");
        assert!(l.broken.as_deref().unwrap_or_default().contains(broken), "{what}: {l:?}");
        assert_eq!(problems.len(), usize::from(!broken.is_empty()), "{what}: {problems:?}");
        assert_eq!(l.tls.is_some(), broken.is_empty());
    }
}

#[test]
fn routes_attach_to_the_listeners_they_may() {
    let listeners = "{name: open, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}, {name: own, port: 81, protocol: HTTP}, \
                     {name: some, port: 82, protocol: HTTP, allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: x}}}}}, \
                     {name: grpc, port: 83, protocol: HTTP, allowedRoutes: {namespaces: {from: All}, kinds: [{kind: GRPCRoute}]}}, \
                     {name: host, port: 84, protocol: HTTP, hostname: '*.x.com', allowedRoutes: {namespaces: {from: All}}}";
    let base = services("a")
        + &services("b")
        + &gateway_with(listeners)
        + "---\n{apiVersion: v1, kind: Namespace, metadata: {name: b, labels: {team: x}}}\n";
    for (ns, kind, parent, hostnames, want, message) in [
        ("a", "HTTPRoute", "", "", "open own host", ""),
        ("b", "HTTPRoute", "", "", "open some host", ""),
        ("a", "GRPCRoute", "", "", "open own grpc host", ""),
        ("a", "HTTPRoute", ", sectionName: own", "", "own", ""),
        ("a", "HTTPRoute", ", port: 80", "", "open", ""),
        ("a", "HTTPRoute", ", port: 80, sectionName: own", "", "", "NoMatchingParent"),
        ("a", "HTTPRoute", ", port: 99", "", "", "NoMatchingParent"),
        ("a", "HTTPRoute", ", sectionName: nope", "", "", "NoMatchingParent"),
        ("b", "HTTPRoute", ", sectionName: own", "", "", "NotAllowedByListeners"),
        ("a", "HTTPRoute", ", sectionName: some", "", "", "NotAllowedByListeners"),
        ("a", "HTTPRoute", ", sectionName: grpc", "", "", "NotAllowedByListeners"),
        ("a", "TCPRoute", "", "", "", "NotAllowedByListeners"),
        ("a", "HTTPRoute", ", sectionName: host", "a.y.com", "", "NoMatchingListenerHostname"),
        ("a", "HTTPRoute", ", sectionName: host", "x.com", "", "NoMatchingListenerHostname"),
        ("a", "HTTPRoute", ", sectionName: host", "a.y.com, a.x.com", "host", ""),
    ] {
        let (state, problems) = mesh(&(base.clone() + &to_gateway(kind, ns, "r", parent, hostnames)));
        let on: Vec<&str> = state.gateway("a/gw").listeners.iter().filter(|l| !l.hosts.is_empty()).map(|l| &*l.name).collect();
        assert_eq!(on.join(" "), want, "{ns} {kind} {parent} {hostnames}: {problems:?}");
        assert_eq!(problems.len(), usize::from(!message.is_empty()), "{problems:?}");
        assert!(problems.iter().all(|p| p.message.contains(message)), "{problems:?}");
    }
}

#[test]
fn hosts_are_intersections_most_specific_first() {
    for (listener, route, want) in [
        ("", "", "*"),
        ("", "a.com, '*.b.com', x.b.com, '*.y.b.com'", "x.b.com a.com *.y.b.com *.b.com"),
        ("a.com", "", "a.com"),
        ("a.com", "a.com, b.com", "a.com"),
        ("a.b.com", "'*.b.com'", "a.b.com"),
        ("'*.b.com'", "'*.com'", "*.b.com"),
        ("'*.b.com'", "'*.a.b.com', c.b.com", "c.b.com *.a.b.com"),
        ("'*.b.com'", "A.B.com", "a.b.com"),
    ] {
        let hostname = if listener.is_empty() { String::new() } else { format!(", hostname: {listener}") };
        let text = services("a")
            + &gateway_with(&format!("{{name: l, port: 80, protocol: HTTP{hostname}}}"))
            + &to_gateway("HTTPRoute", "a", "r", "", route);
        let state = good(&text);
        assert_eq!(hosts_of(state.gateway("a/gw"), "l").join(" "), want, "{listener} {route}");
    }
}

#[test]
fn tables_of_hosts_are_sorted_and_closed_alone() {
    let rules = |m: &str| format!("rules: [{{matches: [{m}], backendRefs: [{{name: t, port: 80}}]}}]");
    let on = |name: &str, hosts: &str, rules: &str| {
        route(
            "HTTPRoute",
            "a",
            name,
            &format!("parentRefs: [{{name: gw}}, {{name: gw, sectionName: l}}], hostnames: [{hosts}], {rules}"),
        )
    };
    let text = services("a")
        + &gateway_with("{name: l, port: 80, protocol: HTTP}")
        + &on("r1", "x.com, y.com", &rules("{path: {value: /a}}"))
        + &on("r2", "x.com", &rules("{path: {type: Exact, value: /a}}"))
        + &on("r3", "z.com", "rules: [{oops: 1}]");
    let (state, problems) = mesh(&text);
    assert_eq!(brief(&problems), [("error", "spec.rules[0].oops", "unknown-field")]);
    let l = &state.gateway("a/gw").listeners[0];
    let table = |h: &str| &l.hosts.iter().find(|(host, _)| **host == *h).unwrap().1;
    let names = |h: &str| table(h).http.iter().map(|r| r.route.name.to_string()).collect::<Vec<_>>();
    assert_eq!((names("x.com"), names("y.com")), (vec!["a.r2.0".to_owned(), "a.r1.0".to_owned()], vec!["a.r1.0".to_owned()]));
    assert_eq!(table("x.com").origins.len(), 2, "two parentRefs to one listener attach once");
    assert!(Arc::ptr_eq(&table("x.com").http.get(1).unwrap().route, &table("y.com").http.get(0).unwrap().route));
    assert_eq!((table("x.com").broken.is_some(), table("z.com").broken.is_some()), (false, true));
}

/// A Gateway with `count` routes of four rules each on `x.com`, and one on `y.com`.
struct Many {
    t: Translator,
    objects: BTreeMap<String, String>,
    state: State,
}
impl Many {
    fn new(count: usize) -> Self {
        let mut many = Self { t: translator(), objects: BTreeMap::new(), state: State::default() };
        let gateway =
            services("a") + &gateway_with("{name: l, port: 80, protocol: HTTP}") + &many_route("other", "y.com", "", "0");
        many.objects.insert("gateway".into(), gateway);
        for n in 0..count {
            many.objects.insert(format!("r{n}"), many_route(&format!("r{n}"), "x.com", "", "0"));
        }
        // Each a file of its own, which does not move when others change.
        let all: Vec<Object> = many.objects.values().flat_map(|text| objects(&mut many.t, text).0).collect();
        for o in all {
            many.t.upsert(o);
        }
        many.state.apply(many.t.flush());
        many
    }
    fn put(&mut self, name: &str, text: String) {
        self.take(&text);
        self.objects.insert(name.into(), text);
    }
    fn remove(&mut self, name: &str) {
        self.objects.remove(name);
        self.t.remove(&ObjectId { kind: Kind::HttpRoute, namespace: "a".into(), name: name.into() });
        self.state.apply(self.t.flush());
    }
    fn take(&mut self, text: &str) {
        for o in objects(&mut self.t, text).0 {
            self.t.upsert(o);
        }
        self.state.apply(self.t.flush());
    }
    fn table(&self, host: &str) -> Arc<RouteTable> {
        let listener = &self.state.gateway("a/gw").listeners[0];
        Arc::clone(&listener.hosts.iter().find(|(h, _)| **h == *host).unwrap().1)
    }
    /// The state is that of the same objects read at once.
    #[track_caller]
    fn is_as_new(&self) {
        let text: String = self.objects.values().map(String::as_str).collect();
        let new = good(&text);
        assert_eq!(lines(self.state.gateway("a/gw")), lines(new.gateway("a/gw")));
    }
}
/// All of a Gateway but the lines its objects stand in.
fn lines(gateway: &GatewayRoutes) -> Vec<String> {
    let hosts = gateway.listeners.iter().flat_map(|l| l.hosts.iter().map(move |host| (l, host)));
    let rules = hosts.flat_map(|(l, (host, table))| {
        let rule = move |r: &HttpRule| {
            let HttpAction::Forward(forward) = &r.route.action else { panic!("{r:?}") };
            let set = r.route.headers.request.set.iter().chain(&forward.backends[0].headers.request.set).next();
            format!("{} {} {host} {} {:?} {set:?}", l.name, l.port, r.route.name, r.matches.path)
        };
        table.http.iter().map(rule)
    });
    rules.collect()
}
/// Four rules that set a header to `value`: one exact path, three prefixes of which one is everybody's.
fn many_route(name: &str, host: &str, created: &str, value: &str) -> String {
    let created = if created.is_empty() { String::new() } else { format!(", creationTimestamp: '{created}'") };
    let set =
        format!("filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: x-v, value: '{value}'}}]}}}}]");
    let rule = |path: &str| format!("{{matches: [{{path: {path}}}], {set}, backendRefs: [{{name: t, port: 80}}]}}");
    let paths = [
        format!("{{type: Exact, value: /{name}}}"),
        format!("{{value: /{name}/a}}"),
        format!("{{value: /{name}/a/b}}"),
        "{value: /all}".into(),
    ];
    let rules = paths.map(|path| rule(&path)).join(", ");
    let spec = format!("parentRefs: [{{name: gw}}], hostnames: [{host}], rules: [{rules}]");
    object("HTTPRoute", API, "a", name, &created, &format!("spec: {{{spec}}}"))
}

/// What a version costs follows from what changed: counted in rules that are put into a list and indexed.
#[test]
fn a_changed_route_makes_its_own_rules_again_and_no_others() {
    let mut many = Many::new(200);
    let before = (many.table("x.com"), many.table("y.com"));
    assert_eq!(before.0.http.len(), 800);
    for (n, value) in [(7, "1"), (7, "2"), (199, "1"), (7, "3")] {
        many.put(&format!("r{n}"), many_route(&format!("r{n}"), "x.com", "", value));
        assert!(Arc::ptr_eq(&many.table("y.com"), &before.1), "a host nothing was said about");
    }
    // Of the two routes that are not as they were when all was read.
    let now = many.table("x.com");
    assert_eq!((now.http.len(), now.http.made_after(&before.0.http)), (800, 8));
    many.is_as_new();
    // As it was: nothing is different any more.
    many.put("r7", many_route("r7", "x.com", "", "0"));
    many.put("r199", many_route("r199", "x.com", "", "0"));
    assert_eq!(many.table("x.com").http.made_after(&before.0.http), 0);
    many.is_as_new();
    // However many change one after the other, all together is done seldom.
    let (mut made, mut last) = (0, many.table("x.com"));
    for n in 0..200 {
        many.put(&format!("r{n}"), many_route(&format!("r{n}"), "x.com", "", "1"));
        let now = many.table("x.com");
        made += now.http.made_after(&last.http);
        last = now;
    }
    many.is_as_new();
    assert!(made < 200 * 800 / 4, "{made} rules made in 200 versions of 800 rules");
}

/// The same of a service: its routes are on it as on a Gateway's host.
#[test]
fn a_changed_route_of_a_service_makes_its_own_rules_again() {
    const T: &str = "a/t.a.svc.cluster.local";
    let on = |n: usize, value: &str| {
        let route = many_route(&format!("r{n:03}"), "", "", value);
        route.replace("{name: gw}", "{kind: Service, group: '', name: t}").replace("hostnames: [], ", "")
    };
    let id = |kind: Kind, name: String| ObjectId { kind, namespace: "a".into(), name: name.into() };
    let rules = |state: &State| -> Vec<String> {
        state.table(T).http.iter().map(|r| format!("{} {:?} {:?}", r.route.name, r.matches, r.route.headers)).collect()
    };
    let mut texts: BTreeMap<usize, String> = (0..100).map(|n| (n, on(n, "0"))).collect();
    let (mut t, mut state) = (translator(), State::default());
    let put = |t: &mut Translator, state: &mut State, text: &str| {
        objects(t, text).0.into_iter().for_each(|o| t.upsert(o));
        state.apply(t.flush());
    };
    let take = |t: &mut Translator, state: &mut State, id: &ObjectId| {
        t.remove(id);
        state.apply(t.flush());
    };
    let as_new = |state: &State, texts: &BTreeMap<usize, String>| {
        let new = good(&(services("a") + &texts.values().map(String::as_str).collect::<String>()));
        assert_eq!(rules(state), rules(&new));
    };
    put(&mut t, &mut state, &(services("a") + &texts.values().map(String::as_str).collect::<String>()));
    let before = Arc::clone(&state.routes[T]);
    for (n, value) in [(7, "1"), (99, "1"), (7, "2"), (100, "0")] {
        texts.insert(n, on(n, value));
        put(&mut t, &mut state, &texts[&n]);
        as_new(&state, &texts);
    }
    // Two that are not as they were, and one that came.
    let now = &state.table(T).http;
    assert_eq!((before.http.len(), now.len(), now.made_after(&before.http)), (400, 404, 12));
    take(&mut t, &mut state, &id(Kind::HttpRoute, "r100".into()));
    texts.remove(&100);
    as_new(&state, &texts);
    // With the service all of it goes, and with it it comes back.
    take(&mut t, &mut state, &id(Kind::Service, "t".into()));
    assert!(!state.routes.contains_key(T));
    put(&mut t, &mut state, &services("a"));
    as_new(&state, &texts);
    // A VirtualService comes before them.
    let first = "---
{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: a},                  spec: {hosts: [t], http: [{match: [{uri: {exact: /v}}], route: [{destination: {host: t}}]}]}}
";
    put(&mut t, &mut state, first);
    assert_eq!(state.table(T).http.len(), 401);
    texts.insert(7, on(7, "3"));
    put(&mut t, &mut state, &texts[&7]);
    take(&mut t, &mut state, &id(Kind::VirtualService, "v".into()));
    as_new(&state, &texts);
    // Down to a few, which are looked at together.
    for n in 3..100 {
        take(&mut t, &mut state, &id(Kind::HttpRoute, format!("r{n:03}")));
        texts.remove(&n);
    }
    as_new(&state, &texts);
    assert_eq!((state.table(T).http.len(), t.problems().count()), (12, 0));
}

#[test]
fn routes_of_a_large_table_come_go_and_move() {
    let mut many = Many::new(100);
    let (names, hosts, dates) =
        (["r3", "r70", "new", "r99"], ["x.com", "y.com", "'*.x.com'"], ["", "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"]);
    for step in 0..60_usize {
        let name = names[step % names.len()];
        if step % 5 == 4 {
            many.remove(name);
        } else {
            many.put(name, many_route(name, hosts[step / 3 % hosts.len()], dates[step / 7 % dates.len()], &step.to_string()));
        }
        if step % 10 == 9 {
            many.is_as_new();
        }
    }
    // Then the Gateway itself: everything attaches anew, and stays where it says the same.
    let before = many.table("x.com");
    let listeners = gateway_with("{name: l, port: 81, protocol: HTTP}");
    many.put("gateway", services("a") + &listeners + &many_route("other", "y.com", "", "0"));
    assert!(Arc::ptr_eq(&many.table("x.com"), &before));
    many.is_as_new();
}

// ---- BackendTLSPolicy ----

fn tls_policy(name: &str, created: &str, spec: &str) -> String {
    let meta = if created.is_empty() { String::new() } else { format!(", creationTimestamp: '{created}'") };
    object("BackendTLSPolicy", API, "a", name, &meta, &format!("spec: {{{spec}}}"))
}
/// What policies say of `s`, without DestinationRules.
fn tls_of(text: &str) -> (Vec<(Option<u16>, UpstreamTls)>, Vec<Problem>) {
    let mut t = translator();
    let (all, mut problems) = objects(&mut t, text);
    for o in all {
        t.upsert(o);
    }
    t.flush();
    problems.extend(t.problems().cloned());
    problems.sort();
    problems.dedup();
    let layer7 = t.layer7.take().unwrap();
    let service = Arc::clone(&t.services_out[&ServiceKey::new("a", "s.a.svc.cluster.local")]);
    let mut join = layer7.join(&t);
    let found = backend_tls(&mut join, &service).into_iter().map(|b| (b.port, UpstreamTls::clone(&b.tls))).collect();
    (found, problems)
}
const ON_S: &str = "targetRefs: [{group: '', kind: Service, name: s}]";

#[test]
fn backend_tls_policies() {
    let ca = object("ConfigMap", "v1", "a", "ca", "", &format!("data: {{ca.crt: \"{CERT}\", other: x}}"));
    let ca2 = object("ConfigMap", "v1", "a", "ca2", "", &format!("data: {{ca.crt: \"{}\"}}", CERT.replace("MII", "MIJ")));
    let system = "wellKnownCACertificates: System, hostname: S.example.com";
    let (found, problems) = tls_of(&(services("a") + &tls_policy("p", "", &format!("{ON_S}, validation: {{{system}}}"))));
    assert_eq!(problems, []);
    let want = UpstreamTls {
        sni: Some("s.example.com".into()),
        sans: vec![],
        roots: Roots::System,
        crl: None,
        client: None,
        skip_verify: false,
        alpn: vec![],
    };
    assert_eq!(found, [(None, want.clone())]);
    let sans = "subjectAltNames: [{type: Hostname, hostname: x.com}, {type: URI, uri: 'spiffe://a/b'}]";
    let (found, _) = tls_of(&(services("a") + &tls_policy("p", "", &format!("{ON_S}, validation: {{{system}, {sans}}}"))));
    assert_eq!(found[0].1.sans, ["x.com".into(), "spiffe://a/b".into()]);

    let refs = |list: &str| {
        services("a")
            + &ca
            + &ca2
            + &tls_policy("p", "", &format!("{ON_S}, validation: {{hostname: h.com, caCertificateRefs: [{list}]}}"))
    };
    let cm = |n: &str| format!("{{group: '', kind: ConfigMap, name: {n}}}");
    for (list, want, bad) in [
        (cm("ca"), "pem 1", 0),
        (cm("ca") + ", " + &cm("ca2"), "pem 2", 0),
        (cm("gone"), "missing", 1),
        (cm("ca") + ", " + &cm("gone"), "missing", 1),
        ("{group: '', kind: Secret, name: ca}".into(), "missing", 1),
        ("{group: x.io, kind: Bundle, name: ca}".into(), "missing", 1),
    ] {
        let (found, problems) = tls_of(&refs(&list));
        let roots = match &found[0].1.roots {
            Roots::Pem(p) => format!("pem {}", p.matches("BEGIN").count()),
            Roots::Missing(_) => "missing".into(),
            other => format!("{other:?}"),
        };
        assert_eq!((roots.as_str(), problems.len()), (want, bad), "{list}: {problems:?}");
    }
}

#[test]
fn a_backend_tls_policy_is_part_of_the_destination() {
    let policy = format!("{ON_S}, validation: {{wellKnownCACertificates: System, hostname: h.com}}");
    let mut t = translator();
    let mut state = State::default();
    let (all, _) = objects(&mut t, &(services("a") + &tls_policy("p", "", &policy)));
    let id = all.last().unwrap().id.clone();
    for o in all {
        t.upsert(o);
    }
    state.apply(t.flush());
    let d = &state.destinations[S];
    let tls = d.policy(None, 80).and_then(|p| p.tls.as_ref()).unwrap();
    assert_eq!((tls.sni.as_deref(), &tls.roots), (Some("h.com"), &Roots::System));
    assert_eq!(d.origins.iter().map(|o| &*o.object).collect::<Vec<_>>(), ["BackendTLSPolicy a/p"]);
    t.remove(&id);
    state.apply(t.flush());
    assert_eq!(state.destinations.len(), 0);
}

#[test]
fn backend_tls_policies_that_speak_of_the_same() {
    let v = |h: &str| format!("validation: {{wellKnownCACertificates: System, hostname: {h}}}");
    let port = |name: &str| format!("targetRefs: [{{group: '', kind: Service, name: s, sectionName: {name}}}]");
    let text = services("a")
        + &tls_policy("b", "2024-01-01T00:00:00Z", &format!("{ON_S}, {}", v("young")))
        + &tls_policy("c", "2023-01-01T00:00:00Z", &format!("{ON_S}, {}", v("old")))
        + &tls_policy("a", "", &format!("{ON_S}, {}", v("undated")))
        + &tls_policy("d", "", &format!("{}, {}", port("other"), v("port")))
        + &tls_policy("e", "", &format!("{}, {}", port("nope"), v("nowhere")))
        + &tls_policy(
            "f",
            "",
            &format!("targetRefs: [{{group: '', kind: Service, name: gone}}, {{group: x, kind: Y, name: z}}], {}", v("gone")),
        );
    let (found, problems) = tls_of(&text);
    let got: Vec<_> = found.iter().map(|(p, t)| (*p, t.sni.as_deref().unwrap())).collect();
    assert_eq!(got, [(Some(81), "port"), (None, "old")]);
    let codes: Vec<_> = problems.iter().map(|p| (p.code.unwrap(), &*p.origin.object)).collect();
    assert_eq!(codes.iter().filter(|(c, _)| *c == "conflict").count(), 2, "{problems:?}");
    for want in
        [("target", "BackendTLSPolicy a/e"), ("target", "BackendTLSPolicy a/f"), ("unsupported-target", "BackendTLSPolicy a/f")]
    {
        assert!(codes.contains(&want), "{want:?} in {codes:?}");
    }
}

#[test]
fn mistakes_in_backend_tls_policies_trust_nobody() {
    let sys = "wellKnownCACertificates: System, hostname: h.com";
    for (spec, field) in [
        (ON_S.to_owned(), "spec.validation"),
        (format!("{ON_S}, validation: {{hostname: h.com}}"), "spec.validation.caCertificateRefs"),
        (format!("{ON_S}, validation: {{wellKnownCACertificates: System}}"), "spec.validation.hostname"),
        (format!("{ON_S}, validation: {{wellKnownCACertificates: All, hostname: h}}"), "spec.validation.wellKnownCACertificates"),
        (
            format!("{ON_S}, validation: {{{sys}, caCertificateRefs: [{{kind: ConfigMap, name: x}}]}}"),
            "spec.validation.wellKnownCACertificates",
        ),
        (format!("{ON_S}, validation: {{{sys}, host: x}}"), "spec.validation.host"),
        (format!("{ON_S}, validation: {{{sys}, subjectAltNames: [{{type: IP}}]}}"), "spec.validation.subjectAltNames[0].type"),
        (
            format!("{ON_S}, validation: {{{sys}, subjectAltNames: [{{type: URI, hostname: x}}]}}"),
            "spec.validation.subjectAltNames[0].hostname",
        ),
        (
            format!("{ON_S}, validation: {{{sys}, subjectAltNames: [{{type: URI, uri: x}}]}}"),
            "spec.validation.subjectAltNames[0].uri",
        ),
        (format!("{ON_S}, validation: {{{sys}}}, options: {{min-version: '1.3'}}"), "spec.options.min-version"),
        (format!("{ON_S}, validation: {{{sys}}}, mode: x"), "spec.mode"),
    ] {
        let (found, problems) = tls_of(&(services("a") + &tls_policy("p", "", &spec)));
        assert_eq!(brief(&problems).iter().map(|p| p.1).collect::<Vec<_>>(), [field], "{spec}");
        assert!(matches!(&found[0].1.roots, Roots::Missing(why) if why.contains("could not be understood")), "{spec}: {found:?}");
    }
    for spec in ["validation: {}".to_owned(), "targetRefs: [{kind: Service}]".into()] {
        let (found, problems) = tls_of(&(services("a") + &tls_policy("p", "", &spec)));
        assert_eq!((found.len(), problems.len()), (0, 1), "{spec}: {problems:?}");
    }
}

// ---- incremental = rebuild ----

/// Objects that touch each other, in several versions each. None stands in for another: those depend on what was before.
fn universe() -> Vec<Vec<String>> {
    let service = |ns: &str, name: &str, ports: &str| {
        object("Service", "v1", ns, name, "", &format!("spec: {{clusterIP: None, ports: [{ports}]}}"))
    };
    let mut all = Vec::new();
    for ns in ["a", "b"] {
        for name in ["s", "t"] {
            all.push(vec![
                service(ns, name, "{name: http, port: 80}"),
                service(ns, name, "{name: http, port: 80}, {name: x, port: 81}"),
                object("Service", "v1", ns, name, "", "spec: {type: ExternalName, externalName: x.y}"),
            ]);
        }
        all.push(vec![
            format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {ns}}}}}\n"),
            format!("---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: {ns}, labels: {{team: x}}}}}}\n"),
        ]);
        all.push(vec![
            object(
                "ServiceEntry",
                "networking.istio.io/v1",
                ns,
                "e",
                "",
                "spec: {hosts: [x.com, y.com], resolution: DNS, ports: [{number: 80, name: http}]}",
            ),
            object(
                "ServiceEntry",
                "networking.istio.io/v1",
                ns,
                "e",
                ", creationTimestamp: '2020'",
                "spec: {hosts: [y.com, s.a.svc.cluster.local], resolution: DNS, ports: [{number: 80, name: http}]}",
            ),
        ]);
        let from = |kind: &str| format!("{{group: gateway.networking.k8s.io, kind: {kind}, namespace: a}}");
        all.push(vec![
            grant(ns, &from("HTTPRoute"), "{kind: Service}"),
            grant(ns, &(from("HTTPRoute") + ", " + &from("Gateway")), "{kind: Service, name: t}, {kind: Secret}"),
        ]);
        all.push(vec![tls_secret(ns, "c"), object("Secret", "v1", ns, "c", "", "stringData: {tls.crt: nothing}")]);
        all.push(vec![
            object("ConfigMap", "v1", ns, "ca", "", &format!("data: {{ca.crt: \"{CERT}\"}}")),
            object("ConfigMap", "v1", ns, "ca", "", "data: {}"),
        ]);
        for (i, name) in ["r1", "r2"].iter().enumerate() {
            let r = |kind: &str, spec: &str| {
                object(kind, API, ns, name, &format!(", creationTimestamp: '202{i}'"), &format!("spec: {{{spec}}}"))
            };
            all.push(vec![
                r("HTTPRoute", &format!("{TO_S}, rules: [{{backendRefs: [{{name: t, port: 80}}]}}]")),
                r("HTTPRoute", "parentRefs: [{group: '', kind: Service, name: s, port: 80}, {name: gw, namespace: a}], hostnames: [x.com], rules: [{backendRefs: [{name: t, namespace: b, port: 80}, {name: s, port: 81}]}]"),
                r("HTTPRoute", "parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: e}], rules: [{backendRefs: [{group: networking.istio.io, kind: Hostname, name: y.com, port: 80}]}]"),
                r("HTTPRoute", "parentRefs: [{name: gw, namespace: a, sectionName: tls}, {name: gw, namespace: b}], rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: t, port: 80}}}], backendRefs: [{name: s, port: 80}]}]"),
            ]);
        }
        all.push(vec![
            route(
                "TLSRoute",
                ns,
                "l",
                "parentRefs: [{name: gw, namespace: a}], hostnames: [x.com], rules: [{backendRefs: [{name: s, port: 80}]}]",
            ),
            route("TLSRoute", ns, "l", &format!("{TO_S}, rules: [{{backendRefs: [{{name: t, port: 80}}]}}]")),
        ]);
        all.push(vec![
            route("GRPCRoute", ns, "g", &format!("{TO_S}, rules: [{{backendRefs: [{{name: t, port: 80}}]}}]")),
            route("GRPCRoute", ns, "g", "parentRefs: [{name: gw, namespace: a}], rules: [{matches: [{method: {service: x}}], backendRefs: [{name: t, port: 80}]}]"),
        ]);
        let gw = |listeners: &str| {
            object("Gateway", API, ns, "gw", "", &format!("spec: {{gatewayClassName: c, listeners: [{listeners}]}}"))
        };
        all.push(vec![
            gw("{name: http, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}, {name: pass, port: 444, protocol: TLS, tls: {mode: Passthrough}}"),
            gw("{name: http, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: x}}}}}, {name: tls, port: 443, protocol: HTTPS, hostname: '*.com', tls: {certificateRefs: [{name: c, namespace: b}]}}"),
            gw("{name: mesh, port: 15008, protocol: HBONE}"),
            gw("{name: http, port: 80, protocol: HTTP, nope: 1}, {name: tls, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: c}]}}"),
        ]);
        all.push(vec![
            object("BackendTLSPolicy", API, ns, "p", "", &format!("spec: {{{ON_S}, validation: {{hostname: h.com, caCertificateRefs: [{{kind: ConfigMap, name: ca}}]}}}}")),
            object("BackendTLSPolicy", API, ns, "p", "", "spec: {targetRefs: [{kind: Service, name: s, sectionName: x}, {kind: Service, name: t}], validation: {hostname: h.com, wellKnownCACertificates: System}}"),
        ]);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn incremental_equals_rebuild(steps in prop::collection::vec((0usize..1000, 0usize..6, any::<bool>()), 1..80)) {
        let universe = universe();
        let mut held: BTreeMap<usize, usize> = BTreeMap::new();
        let mut t = translator();
        let mut state = State::default();
        for (which, how, flush) in steps {
            let which = which % universe.len();
            let versions = &universe[which];
            if how < versions.len() {
                held.insert(which, how);
                let o = objects(&mut t, &versions[how]).0.remove(0);
                t.upsert(o);
            } else {
                held.remove(&which);
                let id = objects(&mut t, &versions[0]).0.remove(0).id;
                t.remove(&id);
            }
            if flush {
                state.apply(t.flush());
            }
        }
        state.apply(t.flush());
        prop_assert_eq!(t.flush().len(), 0, "a second flush has nothing to say");
        let mut fresh = translator();
        for (which, how) in held.iter().rev() {
            let o = objects(&mut fresh, &universe[*which][*how]).0.remove(0);
            fresh.upsert(o);
        }
        let mut want = State::default();
        want.apply(fresh.flush());
        prop_assert_eq!(&state, &want);
        let problems = |t: &Translator| { let mut v: Vec<_> = t.problems().cloned().collect(); v.sort(); v.dedup(); v };
        prop_assert_eq!(problems(&t), problems(&fresh));
    }

    #[test]
    fn no_cut_object_panics(which in 0usize..1000, cut in 0usize..2000, insert in any::<u8>()) {
        let universe = universe();
        let versions = &universe[which % universe.len()];
        let mut text = versions[which % versions.len()].clone().into_bytes();
        let cut = cut % text.len();
        text[cut] = insert;
        fuzz_yaml(&text);
        text.truncate(cut);
        fuzz_yaml(&text);
    }
}

#[test]
fn a_change_touches_what_it_concerns_alone() {
    let mut t = translator();
    let mut text = services("a") + &gateway_with("{name: l, port: 80, protocol: HTTP}");
    for i in 0..50 {
        text += &object("Service", "v1", "a", &format!("x{i}"), "", "spec: {clusterIP: None, ports: [{port: 80}]}");
        text += &route(
            "HTTPRoute",
            "a",
            &format!("r{i}"),
            &format!("parentRefs: [{{group: '', kind: Service, name: x{i}}}], rules: [{{backendRefs: [{{name: t, port: 80}}]}}]"),
        );
    }
    for o in objects(&mut t, &text).0 {
        t.upsert(o);
    }
    t.flush();
    let mut change = |text: &str| {
        for o in objects(&mut t, text).0 {
            t.upsert(o);
        }
        t.flush().len()
    };
    let r7 = |w: u32| {
        route(
            "HTTPRoute",
            "a",
            "r7",
            &format!(
                "parentRefs: [{{group: '', kind: Service, name: x7}}], rules: [{{backendRefs: [{{name: t, port: 80, weight: {w}}}]}}]"
            ),
        )
    };
    assert_eq!(change(&r7(2)), 1);
    assert_eq!(change(&r7(2)), 0);
    assert_eq!(change(&to_gateway("HTTPRoute", "a", "g", "", "")), 1);
    assert_eq!(change(&tls_secret("a", "unused")), 0);
    let port = |p: u16| object("Service", "v1", "a", "t", "", &format!("spec: {{clusterIP: None, ports: [{{port: {p}}}]}}"));
    assert_eq!(change(&port(81)), 52, "the service, the tables and the gateway that send to it");
    assert_eq!(change(&port(80)), 52);
}

/// Not a benchmark (debug builds vary), but a wall against rebuilding what did not change: ten thousand routes on one
/// Gateway, then one more.
#[test]
#[ignore = "prints times; run by hand with --release"]
fn ten_thousand_routes() {
    let mut t = translator();
    let mut text = services("a") + &gateway_with("{name: l, port: 80, protocol: HTTP}");
    for i in 0..10_000 {
        text += &to_gateway("HTTPRoute", "a", &format!("g{i}"), "", &format!("h{i}.com"));
        text += &route(
            "HTTPRoute",
            "a",
            &format!("s{i}"),
            &format!("{TO_S}, rules: [{{matches: [{{path: {{value: /p{i}}}}}], backendRefs: [{{name: t, port: 80}}]}}]"),
        );
    }
    for o in objects(&mut t, &text).0 {
        t.upsert(o);
    }
    let first = std::time::Instant::now();
    t.flush();
    let first = first.elapsed();
    for one in [
        to_gateway("HTTPRoute", "a", "g5", "", "other.com"),
        route("HTTPRoute", "a", "s5", &format!("{TO_S}, rules: [{{backendRefs: [{{name: u, port: 80}}]}}]")),
    ] {
        for o in objects(&mut t, &one).0 {
            t.upsert(o);
        }
        let again = std::time::Instant::now();
        let changes = t.flush();
        println!("first {first:?}, one change {:?}, {} changes", again.elapsed(), changes.len());
    }
}
