//! AuthorizationPolicies with `targetRefs`: what they say, what they bind, and what is wrong with them.

use mesh_model::SpiffeId;
use mesh_model::authz_l7::{HttpFacts, InScope, L7Facts, L7Verdict, PolicyScope};
use mesh_model::l7::authorizer::{BodyLimit, Protocol};
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::l7::policy::{L7Action, L7Body, L7Policies, L7Policy, PolicyTarget};
use mesh_model::policy::TextMatch;
use mesh_model::{Change, Snapshot};

use super::*;

fn translator() -> Translator {
    Translator::new(view(), &Settings { layer7: true, ..Settings::default() })
}
/// Everything a waypoint knows, and what there is to tell.
fn waypoint_mesh(text: &str) -> (State, Vec<Problem>) {
    let mut t = translator();
    let (objects, mut problems) = objects(&mut t, text);
    for o in objects {
        t.upsert(o);
    }
    let mut state = State::default();
    state.apply(t.flush());
    problems.extend(t.problems().cloned());
    (state, problems)
}
/// A service `a/s` with a waypoint, and a ServiceEntry.
fn base() -> String {
    gateway("a", "wp", "", "Same", true)
        + &service("a", "s", ", labels: {istio.io/use-waypoint: wp}", "{clusterIP: 10.1.0.1, ports: [{port: 80}]}")
        + &service("a", "bare", "", "{clusterIP: 10.1.0.2, ports: [{port: 80}]}")
        + "---\n{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: e, namespace: a, labels: {istio.io/use-waypoint: wp}}, spec: {hosts: [x.com, y.com], resolution: DNS, ports: [{number: 80, name: http}]}}\n"
}
const TO_S: &str = "targetRefs: [{kind: Service, name: s}]";
const SERVICE: &str = "service a/s.a.svc.cluster.local";

fn only<'s>(state: &'s State, target: &str) -> &'s L7Policy {
    let all: Vec<_> = state.l7.get(target).unwrap_or_else(|| panic!("nothing binds {target}: {:?}", state.l7)).iter().collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}
/// The problems of policies, as `severity field: message; fix`.
fn about_policies(problems: &[Problem]) -> Vec<String> {
    let of = |p: &&Problem| p.origin.object.starts_with("AuthorizationPolicy");
    problems
        .iter()
        .filter(of)
        .map(|p| format!("{} {}:{} {}; {}", p.severity.as_str(), p.origin.line, p.field, p.message, p.fix))
        .collect()
}
/// What a policy with these rules answers.
fn judge(rules: &str, action: &str, ask: impl FnOnce(&mut Ask)) -> bool {
    let (state, problems) = waypoint_mesh(&(base() + &ap("a", "x", &format!("{{{TO_S}, action: {action}, rules: {rules}}}"))));
    assert_eq!(about_policies(&problems), [""; 0]);
    let policies: &Arc<L7Policies> = &state.l7[SERVICE];
    let key = ServiceKey::new("a", "s.a.svc.cluster.local");
    let snap = Snapshot::empty(view()).apply(&[Change::L7Policies(PolicyTarget::Service(key.clone()), Arc::clone(policies))]);
    let mut a = Ask::default();
    ask(&mut a);
    let peer: Option<SpiffeId> = a.peer.map(|p| p.parse().unwrap());
    let mut headers = http::HeaderMap::new();
    for (name, value) in a.headers {
        headers.append(name, value.parse().unwrap());
    }
    let facts = L7Facts {
        peer: peer.as_ref(),
        client: "10.0.0.1:9".parse().unwrap(),
        remote: "192.0.2.1".parse().unwrap(),
        destination: "10.1.0.1:80".parse().unwrap(),
        sni: Some("s.a"),
        http: Some(HttpFacts { method: a.method, authority: a.authority, path: a.path, headers: &headers, token: None }),
    };
    let scope = PolicyScope { service: Some(&key), namespace: Some("a"), gateway: None, waypoint: true };
    matches!(InScope::of(&snap, &scope).judge(&snap, &facts).verdict, L7Verdict::Allow(_))
}
struct Ask {
    peer: Option<&'static str>,
    method: &'static str,
    authority: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, &'static str)>,
}
impl Default for Ask {
    fn default() -> Self {
        Self {
            peer: Some("spiffe://cluster.local/ns/a/sa/web"),
            method: "GET",
            authority: "s.a:80",
            path: "/v1/x",
            headers: vec![("x-role", "admin")],
        }
    }
}

#[test]
fn every_field_means_what_it_says() {
    // Each holds for the default request; its `not` form then does not.
    let sources = [
        ("principals", "cluster.local/ns/a/sa/web"),
        ("principals", "spiffe://cluster.local/ns/a/*"),
        ("namespaces", "a"),
        ("serviceAccounts", "web"),
        ("serviceAccounts", "a/web"),
        ("trustDomains", "cluster.local"),
        ("ipBlocks", "10.0.0.0/8"),
        ("remoteIpBlocks", "192.0.2.1"),
    ];
    let operations = [
        ("hosts", "S.A"),
        ("ports", "80"),
        ("methods", "GET"),
        ("methods", "G*"),
        ("paths", "/v1/x"),
        ("paths", "/v1/*"),
        ("paths", "'*/x'"),
        ("paths", "'/v1/{*}'"),
        ("paths", "'/{**}'"),
    ];
    for (list, inner, fields) in [("from", "source", &sources[..]), ("to", "operation", &operations[..])] {
        for (field, value) in fields {
            let mut not = format!("not{}", field[..1].to_uppercase());
            not.push_str(&field[1..]);
            let rule = |field: &str| format!("[{{{list}: [{{{inner}: {{{field}: [{value}]}}}}]}}]");
            assert!(judge(&rule(field), "ALLOW", |_| {}), "{field} {value}");
            assert!(!judge(&rule(field), "DENY", |_| {}), "{field} {value}");
            assert!(!judge(&rule(&not), "ALLOW", |_| {}), "{not} {value}");
            assert!(judge(&rule(&not), "DENY", |_| {}), "{not} {value}");
        }
    }
    let conditions = [
        ("source.ip", "10.0.0.1"),
        ("source.namespace", "a"),
        ("source.principal", "cluster.local/ns/a/sa/web"),
        ("source.serviceAccount", "a/web"),
        ("source.trustDomain", "cluster.local"),
        ("remote.ip", "192.0.2.0/24"),
        ("destination.ip", "10.1.0.1"),
        ("destination.port", "80"),
        ("connection.sni", "'*.a'"),
        ("'request.headers[X-Role]'", "admin"),
        ("'request.headers[:method]'", "GET"),
        ("'request.headers[host]'", "s.a"),
    ];
    for (key, value) in conditions {
        let rule = |values: &str| format!("[{{when: [{{key: {key}, {values}: [{value}]}}]}}]");
        assert!(judge(&rule("values"), "ALLOW", |_| {}), "{key}");
        assert!(!judge(&rule("notValues"), "ALLOW", |_| {}), "{key}");
    }
    // Without a token nothing about it holds, and every negation does.
    for key in [
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
        "'request.auth.claims[iss]'",
        "'request.auth.claims[realm_access][roles]'",
    ] {
        let rule = |values: &str| format!("[{{when: [{{key: {key}, {values}: [a/b]}}]}}]");
        assert!(!judge(&rule("values"), "ALLOW", |_| {}), "{key}");
        assert!(judge(&rule("notValues"), "ALLOW", |_| {}), "{key}");
    }
    let token = "[{from: [{source: {notRequestPrincipals: ['*']}}]}]";
    assert!(!judge(token, "DENY", |_| {}), "no token, and one is required");
    // AND over from, to and when; OR within.
    let three = "[{from: [{source: {namespaces: [x]}}, {source: {namespaces: [a]}}], to: [{operation: {methods: [PUT, GET]}}], when: [{key: 'request.headers[x-role]', values: [admin]}]}]";
    assert!(judge(three, "ALLOW", |_| {}));
    assert!(!judge(three, "ALLOW", |a| a.peer = Some("spiffe://cluster.local/ns/b/sa/web")));
    assert!(!judge(three, "ALLOW", |a| a.method = "POST"));
    assert!(!judge(three, "ALLOW", |a| a.headers.clear()));
    assert!(!judge(three, "ALLOW", |a| a.peer = None));
    assert!(judge("[{}]", "ALLOW", |_| {}) && !judge("[]", "ALLOW", |_| {}));
}

#[test]
fn targets_become_what_they_name() {
    let group = "group: gateway.networking.k8s.io";
    for (ns, targets, want) in [
        ("a", "targetRefs: [{kind: Service, name: s}]".to_owned(), vec![SERVICE]),
        ("a", "targetRef: {kind: Service, group: core, name: s, namespace: a}".into(), vec![SERVICE]),
        (
            "a",
            "targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: e}]".into(),
            vec!["service a/x.com", "service a/y.com"],
        ),
        ("a", format!("targetRefs: [{{kind: Gateway, {group}, name: wp}}]"), vec!["gateway a/wp"]),
        ("istio-system", format!("targetRefs: [{{kind: GatewayClass, {group}, name: istio-waypoint}}]"), vec!["all waypoints"]),
        (
            "a",
            format!("targetRefs: [{{kind: Service, name: s}}, {{kind: Gateway, {group}, name: wp}}]"),
            vec!["gateway a/wp", SERVICE],
        ),
    ] {
        let (state, problems) = waypoint_mesh(&(base() + &ap(ns, "x", &format!("{{{targets}, rules: [{{}}]}}"))));
        assert_eq!(state.l7.keys().map(String::as_str).collect::<Vec<_>>(), want, "{targets}");
        assert!(state.policies.is_empty(), "the agent's policies are other ones");
        assert_eq!(about_policies(&problems), [""; 0], "{targets}");
        assert_eq!(only(&state, want[0]).key, PolicyKey::new(ns, "x"));
        // The node agent leaves it alone.
        let (agent, problems) = mesh(&(base() + &ap(ns, "x", &format!("{{{targets}, rules: [{{}}]}}"))));
        assert!(agent.l7.is_empty() && agent.policies.is_empty() && about_policies(&problems).is_empty());
    }
    // Selectors, and whole namespaces, are the agent's.
    for spec in ["{selector: {matchLabels: {app: web}}, rules: [{to: [{operation: {methods: [GET]}}]}]}", "{rules: [{}]}"] {
        let (state, _) = waypoint_mesh(&(base() + &ap("a", "x", spec)));
        assert!(state.l7.is_empty() && state.policies.len() == 1, "{spec}");
    }
}

#[test]
fn what_can_never_apply_is_told_with_line_field_and_fix() {
    let group = "group: gateway.networking.k8s.io";
    for (ns, target, field, message, fix) in [
        (
            "a",
            "{kind: Service, name: nope}".to_owned(),
            "spec.targetRefs[0]",
            "the service a/nope does not exist",
            "create the service",
        ),
        ("b", "{kind: Service, name: s}".into(), "spec.targetRefs[0]", "the service b/s does not exist", "correct the name"),
        (
            "a",
            "{kind: Service, name: bare}".into(),
            "spec.targetRefs[0]",
            "no waypoint stands in front of the service a/bare",
            "istio.io/use-waypoint",
        ),
        (
            "a",
            "{kind: ServiceEntry, group: networking.istio.io, name: s}".into(),
            "spec.targetRefs[0]",
            "the ServiceEntry a/s does not exist",
            "create the ServiceEntry",
        ),
        (
            "a",
            format!("{{kind: Gateway, {group}, name: nope}}"),
            "spec.targetRefs[0]",
            "the Gateway a/nope does not exist",
            "create the Gateway",
        ),
        (
            "a",
            format!("{{kind: GatewayClass, {group}, name: istio-waypoint}}"),
            "spec.targetRefs[0]",
            "only a policy of the root namespace istio-system",
            "root namespace",
        ),
        (
            "istio-system",
            format!("{{kind: GatewayClass, {group}, name: other}}"),
            "spec.targetRefs[0]",
            "not bound to GatewayClass other",
            "istio-waypoint",
        ),
        (
            "a",
            "{kind: Pool, group: x.y, name: p}".into(),
            "spec.targetRefs[0]",
            "targets of kind Pool are not known",
            "name a Service",
        ),
    ] {
        let text = base() + &ap(ns, "x", &format!("\n  targetRefs:\n  - {target}\n  rules: [{{}}]"));
        let (_, problems) = waypoint_mesh(&text);
        let told = about_policies(&problems);
        assert_eq!(told.len(), 1, "{target}: {told:?}");
        let line = text.lines().rev().position(|l| l.contains(&target)).map(|n| ap_line(&text, n));
        assert!(told[0].starts_with(&format!("error {}:{field} ", line.unwrap())), "{told:?}");
        assert!(told[0].contains(message) && told[0].contains("can never apply") && told[0].contains(fix), "{told:?}");
    }
}
/// The line within its document of the line that is `from_end` lines before the end of `text`.
fn ap_line(text: &str, from_end: usize) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.len() - 1 - from_end;
    // Documents of one text are numbered through.
    at + 1
}

#[test]
fn a_binding_follows_services_entries_and_gateways() {
    let mut t = translator();
    let mut state = State::default();
    let mut problems = |t: &mut Translator, text: &str| -> (Vec<String>, Vec<String>) {
        let (all, _) = objects(t, text);
        for o in all {
            t.upsert(o);
        }
        state.apply(t.flush());
        let told: Vec<Problem> = t.problems().cloned().collect();
        (state.l7.keys().cloned().collect(), about_policies(&told))
    };
    let entry = "targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: e}, {kind: Service, name: s}]";
    let (bound, told) = problems(&mut t, &ap("a", "x", &format!("{{{entry}, rules: [{{}}]}}")));
    assert_eq!((bound, told.len()), (vec![SERVICE.to_owned()], 2));
    let (bound, told) = problems(&mut t, &base());
    assert_eq!(bound, ["service a/s.a.svc.cluster.local", "service a/x.com", "service a/y.com"]);
    assert_eq!(told, [""; 0]);
    // The service loses its waypoint, and gets it back from its namespace.
    let bare = service("a", "s", "", "{clusterIP: 10.1.0.1, ports: [{port: 80}]}");
    assert_eq!(problems(&mut t, &bare).1.len(), 1);
    assert_eq!(problems(&mut t, &ns("a", "istio.io/use-waypoint: wp")).1.len(), 0);
    assert_eq!(problems(&mut t, &ns("a", "")).1.len(), 1);
    // The entry says other hosts.
    let moved = base().replace("x.com, y.com", "z.com");
    let (bound, told) = problems(&mut t, &moved);
    assert_eq!((bound, told.len()), (vec!["service a/s.a.svc.cluster.local".to_owned(), "service a/z.com".into()], 0));
    // The policy goes.
    t.remove(&ObjectId { kind: Kind::AuthorizationPolicy, namespace: "a".into(), name: "x".into() });
    assert_eq!(problems(&mut t, ""), (vec![], vec![]));
}

#[test]
fn only_the_touched_target_changes() {
    let mut t = translator();
    let put = |t: &mut Translator, text: &str| {
        for o in objects(t, text).0 {
            t.upsert(o);
        }
        t.flush()
    };
    let deny = |name: &str, rules: &str| ap("a", name, &format!("{{{TO_S}, action: DENY, rules: {rules}}}"));
    put(&mut t, &(base() + &deny("x", "[{}]") + &deny("y", "[]")));
    // The same in another line is another origin.
    assert_eq!(put(&mut t, &deny("x", "[{}]")).len(), 1);
    assert_eq!(put(&mut t, &deny("x", "[{}]")).len(), 0);
    let changes = put(&mut t, &deny("x", "[]"));
    assert!(
        matches!(&changes[..], [Change::L7Policies(PolicyTarget::Service(_), all)] if all.iter().count() == 2),
        "{changes:?}"
    );
    assert_eq!(put(&mut t, &gateway("a", "other", "", "Same", true)).len(), 0);
    let moved = ap("a", "x", "{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: wp}], action: DENY}");
    let changes = put(&mut t, &moved);
    assert_eq!(changes.len(), 2, "{changes:?}");
    let wp = GatewayKey::new("a", "wp");
    assert!(changes.iter().any(|c| matches!(c, Change::L7Policies(PolicyTarget::Gateway(g), _) if *g == wp)));
}

#[test]
fn mistakes_close_what_the_policy_binds() {
    let rule = |list: &str, inner: &str, fields: &str| format!("[{{{list}: [{{{inner}: {fields}}}]}}]");
    let from = |fields: &str| rule("from", "source", fields);
    let to = |fields: &str| rule("to", "operation", fields);
    let when = |fields: &str| format!("[{{when: [{fields}]}}]");
    for (rules, field, message) in [
        ("[null]".to_owned(), "spec.rules[0]", "an empty rule"),
        ("[{from: []}]".into(), "spec.rules[0].from", "written but empty"),
        ("[{to: [{}]}]".into(), "spec.rules[0].to[0]", "an element of `to` has `operation`"),
        ("[{to: [{op: {}}]}]".into(), "spec.rules[0].to[0].op", "unknown field"),
        ("[{when: []}]".into(), "spec.rules[0].when", "written but empty"),
        (from("{}"), "spec.rules[0].from[0].source", "`source` is empty"),
        (from("{principal: [x]}"), "spec.rules[0].from[0].source.principal", "did you mean `principals`"),
        (from("{principals: []}"), "spec.rules[0].from[0].source.principals", "the list is empty"),
        (from("{principals: ['a*b']}"), "spec.rules[0].from[0].source.principals[0]", "only stand at one end"),
        (from("{ipBlocks: [nope]}"), "spec.rules[0].from[0].source.ipBlocks[0]", "neither an IP address"),
        (from("{remoteIpBlocks: [10.0.0.0/33]}"), "spec.rules[0].from[0].source.remoteIpBlocks[0]", "neither an IP address"),
        (from("{serviceAccounts: ['*']}"), "spec.rules[0].from[0].source.serviceAccounts[0]", "not a service account"),
        (from("{requestPrincipals: [joe]}"), "spec.rules[0].from[0].source.requestPrincipals[0]", "no request principal"),
        (to("{methods: GET}"), "spec.rules[0].to[0].operation.methods", "expected a list"),
        (to("{methods: ['']}"), "spec.rules[0].to[0].operation.methods[0]", "empty text"),
        (to("{methodes: [GET]}"), "spec.rules[0].to[0].operation.methodes", "did you mean `methods`"),
        (to("{ports: [0]}"), "spec.rules[0].to[0].operation.ports[0]", "is not a port"),
        (to("{notPorts: [http]}"), "spec.rules[0].to[0].operation.notPorts[0]", "is not a port"),
        (to("{paths: [admin]}"), "spec.rules[0].to[0].operation.paths[0]", "a path begins with `/`"),
        (to("{paths: ['/a?b=1']}"), "spec.rules[0].to[0].operation.paths[0]", "without their query"),
        (to("{paths: ['/a*b']}"), "spec.rules[0].to[0].operation.paths[0]", "a `*` may only stand at one end"),
        (to("{paths: ['/{id}/x']}"), "spec.rules[0].to[0].operation.paths[0]", "a segment is text"),
        (to("{paths: ['/{*}/*']}"), "spec.rules[0].to[0].operation.paths[0]", "cannot be mixed"),
        (to("{notPaths: ['/{**}/{*}']}"), "spec.rules[0].to[0].operation.notPaths[0]", "nothing variable may follow"),
        (to("{hosts: ['a*b']}"), "spec.rules[0].to[0].operation.hosts[0]", "only stand at one end"),
        (when("{values: [x]}"), "spec.rules[0].when[0].key", "a condition has a key"),
        (when("{key: source.ip}"), "spec.rules[0].when[0].values", "has `values` or `notValues`"),
        (when("{key: source.ip, values: []}"), "spec.rules[0].when[0].values", "the list is empty"),
        (when("{key: source.ips, values: [1.1.1.1]}"), "spec.rules[0].when[0].key", "unknown condition `source.ips`"),
        (when("{key: request.path, values: [/]}"), "spec.rules[0].when[0].key", "unknown condition `request.path`"),
        (when("{key: experimental.envoy.filters.x, values: [y]}"), "spec.rules[0].when[0].key", "unknown condition"),
        (when("{key: request.headers, values: [y]}"), "spec.rules[0].when[0].key", "names no header"),
        (when("{key: 'request.headers[a][b]', values: [y]}"), "spec.rules[0].when[0].key", "names no header"),
        (when("{key: 'request.headers[a b]', values: [y]}"), "spec.rules[0].when[0].key", "names no header"),
        (when("{key: 'request.headers[:path]', values: [y]}"), "spec.rules[0].when[0].key", "names no header"),
        (when("{key: 'request.headersX', values: [y]}"), "spec.rules[0].when[0].key", "names no header"),
        (when("{key: 'request.auth.claims', values: [y]}"), "spec.rules[0].when[0].key", "names no claim"),
        (when("{key: 'request.auth.claims[a', values: [y]}"), "spec.rules[0].when[0].key", "names no claim"),
        (when("{key: 'request.auth.claims[]', values: [y]}"), "spec.rules[0].when[0].key", "names no claim"),
        (when("{key: 'request.auth.claims[a]b', values: [y]}"), "spec.rules[0].when[0].key", "names no claim"),
    ] {
        for action in ["ALLOW", "DENY", "AUDIT"] {
            let text = base() + &ap("a", "x", &format!("{{{TO_S}, action: {action}, rules: {rules}}}"));
            let (state, problems) = waypoint_mesh(&text);
            let L7Body::Unusable { why } = &only(&state, SERVICE).body else { panic!("{rules} is usable") };
            assert!(why.contains(message) || field.ends_with("key") || field.ends_with("values"), "{why}");
            let told = about_policies(&problems);
            assert!(told.len() == 1 && told[0].starts_with("error") && told[0].contains("is denied"), "{told:?}");
            assert!(told[0].contains(&format!(":{field} ")) && told[0].contains(message), "{told:?} {field} {message}");
            // A dry run is told, and binds nobody.
            let dry = text.replace("{name: x, namespace: a}", "{name: x, namespace: a, annotations: {istio.io/dry-run: 'true'}}");
            let (state, problems) = waypoint_mesh(&dry);
            assert!(state.l7.is_empty() && about_policies(&problems)[0].contains("dry run"));
        }
    }
    let provider = format!("{{{TO_S}, provider: {{name: x}}, rules: [{{}}]}}");
    let (state, problems) = waypoint_mesh(&(base() + &ap("a", "x", &provider)));
    assert!(matches!(only(&state, SERVICE).body, L7Body::Unusable { .. }));
    assert!(about_policies(&problems)[0].contains("`provider` only goes with"));
}

#[test]
fn custom_policies_refuse_what_they_match_and_say_so() {
    let spec =
        format!("{{{TO_S}, action: CUSTOM, provider: {{name: opa}}, rules: [{{to: [{{operation: {{paths: [/admin]}}}}]}}]}}");
    let (state, problems) = waypoint_mesh(&(base() + &ap("a", "x", &spec)));
    let L7Body::Rules { action, .. } = &only(&state, SERVICE).body else { panic!("unusable") };
    assert_eq!(*action, L7Action::Custom { provider: "opa".into() });
    let told = about_policies(&problems);
    assert!(
        told.len() == 1 && told[0].contains("`opa` is not in MeshConfig") && told[0].contains("spec.provider.name"),
        "{told:?}"
    );
    let config = |provider: &str| {
        format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    extensionProviders:\n    - {provider}\n"
        )
    };
    let text = base() + &ap("a", "x", &spec);
    let with = |provider: &str| {
        let (state, problems) = waypoint_mesh(&(text.clone() + &config(provider)));
        (state.authorizers, problems.iter().map(|p| format!("{} {}", p.field, p.message)).collect::<Vec<_>>())
    };
    let (all, told) = with(
        "{name: opa, envoyExtAuthzHttp: {service: b/opa.example, port: 8000, timeout: 2s, failOpen: true, statusOnError: '503', pathPrefix: /check/, includeRequestHeadersInCheck: [Cookie, 'x-*'], includeAdditionalHeadersInCheck: {X-From: mesh}, includeRequestBodyInCheck: {maxRequestBytes: 10, allowPartialMessage: true}, headersToUpstreamOnAllow: [x-user], headersToDownstreamOnDeny: [x-why]}}",
    );
    assert_eq!(told, [""; 0]);
    let opa = all["opa"].as_ref().unwrap();
    assert_eq!((opa.namespace.as_deref(), &*opa.host, opa.port), (Some("b"), "opa.example", 8000));
    assert_eq!((opa.timeout.as_secs(), opa.fail_open, opa.status_on_error), (2, true, 503));
    assert_eq!(opa.body, Some(BodyLimit { most: 10, partial: true, as_bytes: false }));
    let Protocol::Http(check) = &opa.speaks else { panic!("{opa:?}") };
    assert_eq!(&*check.path_prefix, "/check");
    assert_eq!(check.asked_with, [TextMatch::Exact("cookie".into()), TextMatch::Prefix("x-".into())]);
    assert_eq!(check.always, [("x-from".parse().unwrap(), "mesh".parse().unwrap())]);
    assert_eq!(check.to_refused.as_ref().map(Vec::len), Some(1));
    let plain = with("{name: opa, envoyExtAuthzHttp: {service: opa.example, port: 8000}}").0;
    let opa = plain["opa"].as_ref().unwrap();
    assert_eq!((opa.timeout.as_secs(), opa.fail_open, opa.status_on_error), (600, false, 403));
    assert_eq!((opa.body, opa.clear_route_cache), (None, false));
    let Protocol::Http(check) = &opa.speaks else { panic!("{opa:?}") };
    assert_eq!(check.to_refused, None);
    let (all, told) = with(
        "{name: opa, envoyExtAuthzGrpc: {service: opa.example, port: 9000, timeout: 1s, clearRouteCache: true, includeRequestBodyInCheck: {maxRequestBytes: 9, packAsBytes: true}}}",
    );
    assert_eq!(told, [""; 0]);
    let opa = all["opa"].as_ref().unwrap();
    assert_eq!((&opa.speaks, opa.port, opa.clear_route_cache, opa.judges_bytes()), (&Protocol::Grpc, 9000, true, true));
    assert_eq!(opa.body, Some(BodyLimit { most: 9, partial: false, as_bytes: true }));
    for (provider, message) in [
        ("{name: opa, envoyExtAuthzHttp: {service: x}}", "port"),
        ("{name: opa, envoyExtAuthzHttp: {port: 1}}", "has a service"),
        ("{name: opa, envoyExtAuthzHttp: {service: x, port: 1, failOpne: true}}", "unknown field `failOpne`"),
        ("{name: opa, envoyExtAuthzHttp: {service: x, port: 1, statusOnError: '99'}}", "not an HTTP status"),
        ("{name: opa, envoyExtAuthzHttp: {service: x, port: 1, headersToUpstreamOnAllow: ['a*b']}}", "at one end"),
        ("{name: opa, envoyExtAuthzHttp: {service: x, port: 1, includeRequestBodyInCheck: {}}}", "has a limit"),
        ("{name: opa, envoyExtAuthzGrpc: {service: x, port: 1, pathPrefix: /a}}", "unknown field `pathPrefix`"),
        ("{name: opa, envoyExtAuthzGrpc: {service: x}}", "port"),
        ("{name: opa, envoyExtAuthzGrpc: {service: x, port: 1}, envoyExtAuthzHttp: {service: x, port: 1}}", "one thing"),
    ] {
        let (all, told) = with(provider);
        assert!(all["opa"].is_err(), "{provider}");
        assert!(told.len() == 2 && told.iter().any(|t| t.contains(message)), "{provider}: {told:?}");
        assert!(told.iter().any(|t| t.contains("`opa` cannot be asked")), "{told:?}");
    }
    for (action, warned) in [("DENY", true), ("AUDIT", true), ("ALLOW", false)] {
        let (_, problems) = waypoint_mesh(&(base() + &ap("a", "x", &format!("{{{TO_S}, action: {action}}}"))));
        assert_eq!(about_policies(&problems).iter().any(|p| p.contains("does nothing")), warned, "{action}");
    }
}

#[test]
fn an_unreadable_policy_closes_its_targets_or_where_they_may_be() {
    for (ns, spec, target) in [
        ("a", "{targetRefs: [{name: x}]}", "namespace a"),
        ("a", "{targetRefs: oops}", "namespace a"),
        ("a", "{targetRefs: [{kind: Service, name: s, namespace: b}]}", "namespace a"),
        ("a", "{targetRefs: [{kind: Service, name: s}], action: DENNY}", SERVICE),
        ("a", "{targetRefs: [{kind: Service, name: s}], rulez: []}", SERVICE),
        ("a", "{targetRefs: [{kind: Service, name: s}], rules: [{form: []}]}", SERVICE),
        ("a", "{selector: {matchLabels: {a: b}}, targetRefs: [{kind: Service, name: s}]}", "namespace a"),
        ("a", "{targetRefs: [{kind: Service, name: s}], rules: oops}", SERVICE),
        ("a", "{targetRefs: [{kind: Service, name: s}, {kind: Service}]}", "namespace a"),
        ("a", "{targetRefz: [{kind: Service, name: s}], action: DENY, rules: [{}]}", "namespace a"),
        ("a", "{selector: }", "namespace a"),
        ("a", "oops", "namespace a"),
        ("istio-system", "{targetRefs: [{name: x}]}", "everything"),
    ] {
        let (state, problems) = waypoint_mesh(&(base() + &ap(ns, "x", spec)));
        assert_eq!(state.l7.keys().collect::<Vec<_>>(), [target], "{spec}");
        assert!(matches!(only(&state, target).body, L7Body::Unusable { .. }), "{spec}");
        assert_eq!(about_policies(&problems).len(), 1, "{spec}");
    }
    // A mistake in what is the agent's alone is the agent's alone.
    for spec in ["{rules: [{x: 1}]}", "{selector: {matchLabels: {a: b}}, rules: [{x: 1}]}"] {
        assert!(waypoint_mesh(&(base() + &ap("a", "x", spec))).0.l7.is_empty(), "{spec}");
    }
    // Security documents of which not even kind or name can be read.
    for (text, target) in [
        (ap("a", "x", "{}").replace("security.istio.io/v1", "security.istio.io/v9"), "namespace a"),
        (ap("a", "x", "{}").replace("{name: x, namespace: a}", "{name: x, namespace: 'A b'}"), "everything"),
    ] {
        let (state, _) = waypoint_mesh(&(base() + &text));
        let bound: Vec<&String> = state.l7.keys().collect();
        if target == "everything" {
            assert_eq!(bound.len(), 1, "{bound:?}");
        } else {
            assert_eq!(bound, [target]);
        }
    }
}
