//! RequestAuthentications: what they say, what they bind, and what is wrong with them.

use std::time::Duration;

use mesh_model::l7::request_auth::{AuthBody, Jwks, KeySource, RequestAuth, TokenPlace, TokenRule};

use super::*;

const TO_S: &str = "targetRefs: [{kind: Service, name: s}]";
const SERVICE: &str = "service a/s.a.svc.cluster.local";
const KEYS: &str = r#"'{"keys":[{"kty":"oct","k":"AAAA"}]}'"#;

fn ra(ns: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: {name}, namespace: {ns}}}\nspec: {spec}\n"
    )
}
/// What a waypoint knows of a mesh with a service `a/s`, and what there is to tell about RequestAuthentications.
fn told(text: &str) -> (State, Vec<String>) {
    let base = gateway("a", "wp", "", "Same", true)
        + &service("a", "s", ", labels: {istio.io/use-waypoint: wp}", "{clusterIP: 10.1.0.1, ports: [{port: 80}]}");
    let mut t = Translator::new(view(), &Settings { layer7: true, ..Settings::default() });
    let (objects, mut problems) = objects(&mut t, &(base + text));
    for o in objects {
        t.upsert(o);
    }
    let mut state = State::default();
    state.apply(t.flush());
    problems.extend(t.problems().cloned());
    let of = |p: &&Problem| p.origin.object.starts_with("RequestAuthentication");
    let told = problems.iter().filter(of).map(|p| format!("{} {}: {}; {}", p.severity.as_str(), p.field, p.message, p.fix));
    (state, told.collect())
}
fn only<'s>(state: &'s State, target: &str) -> &'s RequestAuth {
    let all: Vec<_> =
        state.auths.get(target).unwrap_or_else(|| panic!("nothing binds {target}: {:?}", state.auths)).iter().collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]
}
fn rules(auth: &RequestAuth) -> &[Arc<TokenRule>] {
    match &auth.body {
        AuthBody::Rules(rules) => rules,
        AuthBody::Unusable { why } => panic!("{why}"),
    }
}

#[test]
fn every_field_is_read() {
    let spec = format!(
        "{{{TO_S}, jwtRules: [{{issuer: 'https://i', audiences: [a, b], jwks: {KEYS}, fromHeaders: [{{name: X-Token, prefix: 'Tok '}}], \
         fromParams: [t], fromCookies: [c], outputPayloadToHeader: X-Payload, \
         outputClaimToHeaders: [{{header: X-Role, claim: realm.role}}], forwardOriginalToken: true, spaceDelimitedClaims: [groups]}}, \
         {{issuer: me, jwksUri: 'http://k.a:8080/jwks', timeout: 2s}}, {{issuer: 'https://i'}}]}}"
    );
    let (state, problems) = told(&ra("a", "x", &spec));
    assert_eq!(problems, [""; 0]);
    let [first, second, third] = rules(only(&state, SERVICE)) else { panic!() };
    let header = |name| http::HeaderName::from_static(name);
    assert_eq!((&*first.issuer, first.audiences.len(), first.forward), ("https://i", 2, true));
    assert_eq!(first.keys, KeySource::Inline(Jwks::new(KEYS.trim_matches('\''))));
    assert_eq!(
        *first.places,
        [TokenPlace::Header(header("x-token"), "Tok ".into()), TokenPlace::Param("t".into()), TokenPlace::Cookie("c".into())]
    );
    assert_eq!(first.payload_to, Some(header("x-payload")));
    assert_eq!(*first.claims_to, [(header("x-role"), ["realm".into(), "role".into()].into())]);
    assert_eq!(first.space_delimited.iter().map(|c| &**c).collect::<Vec<_>>(), ["scope", "permission", "groups"]);
    assert_eq!(second.keys, KeySource::Remote { uri: "http://k.a:8080/jwks".into(), timeout: Duration::from_secs(2) });
    assert_eq!((&second.places, second.forward, second.payload_to.is_none()), (&TokenPlace::usual(), false, true));
    assert_eq!(third.keys, KeySource::Discovered { issuer: "https://i".into(), timeout: Duration::from_secs(5) });
}

#[test]
fn it_binds_what_it_names_or_the_gateways() {
    let rule = format!("jwtRules: [{{issuer: i, jwks: {KEYS}}}]");
    let group = "group: gateway.networking.k8s.io";
    for (ns, spec, want) in [
        ("a", TO_S.to_owned(), Some(SERVICE)),
        ("a", format!("targetRefs: [{{kind: Gateway, {group}, name: wp}}]"), Some("gateway a/wp")),
        ("istio-system", format!("targetRefs: [{{kind: GatewayClass, {group}, name: istio-waypoint}}]"), Some("all waypoints")),
        ("a", "selector: {}".to_owned(), Some("the gateways of namespace a")),
        ("istio-system", "targetRefs: []".to_owned(), Some("all gateways")),
    ] {
        let (state, problems) = told(&ra(ns, "x", &format!("{{{spec}, {rule}}}")));
        assert_eq!(problems, [""; 0], "{spec}");
        assert_eq!(state.auths.keys().map(String::as_str).collect::<Vec<_>>(), want.into_iter().collect::<Vec<_>>(), "{spec}");
    }
    for (spec, message) in [
        ("selector: {matchLabels: {app: web}}", "can never apply"),
        ("targetRefs: [{kind: Service, name: nope}]", "the service a/nope does not exist"),
    ] {
        let (_, problems) = told(&ra("a", "x", &format!("{{{spec}, {rule}}}")));
        assert!(matches!(&problems[..], [p] if p.starts_with("error ") && p.contains(message)), "{problems:?}");
    }
}

#[test]
fn a_selector_binds_gateways_and_refuses_where_pods_would_have_to_judge() {
    let label = "gateway.networking.k8s.io/gateway-name";
    let service = service(
        "a",
        "s",
        ", labels: {istio.io/use-waypoint: wp}",
        "{clusterIP: 10.1.0.1, selector: {app: web}, ports: [{port: 80}]}",
    );
    let pods = pod("a", "web-1", "10.0.0.1", "app: web, on: 'y'")
        + &pod("a", "gw-1", "10.0.0.2", &format!("{label}: gw, app: edge, on: 'y'"))
        + &pod("a", "wp-1", "10.0.0.3", &format!("{label}: wp, app: way"))
        + &pod("b", "other-1", "10.0.0.4", "app: other");
    let edge = gateway("a", "gw", "", "Same", true).replace("istio-waypoint", "istio");
    let bound = |ns: &str, labels: &str| {
        let rule = format!("selector: {{matchLabels: {{{labels}}}}}, jwtRules: [{{issuer: i, jwks: {KEYS}}}]");
        let (state, problems) = told(&(service.clone() + &pods + &edge + &ra(ns, "x", &format!("{{{rule}}}"))));
        let all = state.auths.keys().map(|target| {
            let refuses = matches!(only(&state, target).body, AuthBody::Unusable { .. });
            format!("{target}{}", if refuses { " refuses" } else { "" })
        });
        (all.collect::<Vec<_>>().join(", "), problems.join("\n"))
    };
    for (ns, labels, want, message) in [
        ("a", "app: edge", "gateway a/gw", ""),
        ("istio-system", "app: edge", "gateway a/gw", ""),
        ("b", "app: edge", "", "can never apply"),
        ("a", "app: web", "service a/s.a.svc.cluster.local refuses", "through a waypoint is refused"),
        ("istio-system", "app: web", "service a/s.a.svc.cluster.local refuses", "through a waypoint is refused"),
        ("a", "on: 'y'", "gateway a/gw, service a/s.a.svc.cluster.local refuses", "through a waypoint is refused"),
        // Waypoints are not selected, and nothing is in front of this one.
        ("a", "app: way", "", "can never apply"),
        ("b", "app: other", "", "can never apply"),
    ] {
        let (all, problems) = bound(ns, labels);
        assert_eq!(all, want, "{ns} {labels}: {problems}");
        assert_eq!(problems.is_empty(), message.is_empty(), "{ns} {labels}: {problems}");
        assert!(problems.contains(message) && (message.is_empty() || problems.starts_with("error spec.selector")), "{problems}");
    }
}

#[test]
fn what_a_selector_selects_follows_the_pods() {
    let service = service(
        "a",
        "s",
        ", labels: {istio.io/use-waypoint: wp}",
        "{clusterIP: 10.1.0.1, selector: {app: web}, ports: [{port: 80}]}",
    );
    let rule = format!("{{selector: {{matchLabels: {{app: web}}}}, jwtRules: [{{issuer: i, jwks: {KEYS}}}]}}");
    let mut t = Translator::new(view(), &Settings { layer7: true, ..Settings::default() });
    let mut state = State::default();
    let (all, _) = objects(&mut t, &(gateway("a", "wp", "", "Same", true) + &service + &ra("a", "x", &rule)));
    for object in all {
        t.upsert(object);
    }
    state.apply(t.flush());
    assert!(state.auths.is_empty(), "{:?}", state.auths);
    let (pods, _) = objects(&mut t, &pod("a", "web-1", "10.0.0.1", "app: web"));
    let id = pods[0].id.clone();
    for pod in pods {
        t.upsert(pod);
    }
    state.apply(t.flush());
    assert!(matches!(only(&state, SERVICE).body, AuthBody::Unusable { .. }));
    t.remove(&id);
    state.apply(t.flush());
    assert!(state.auths.is_empty(), "{:?}", state.auths);
}

#[test]
fn what_cannot_be_read_refuses_what_it_binds() {
    let good = format!("issuer: i, jwks: {KEYS}");
    for (rule, field, message) in [
        ("{jwks: '{}'}".to_owned(), "issuer", "has an issuer"),
        ("{issuer: ''}".into(), "issuer", "an empty text"),
        ("{issuer: i}".into(), "issuer", "cannot be discovered"),
        ("{issuer: i, jwksUri: 'ftp://x/y'}".into(), "jwksUri", "no URL of http or https"),
        ("{issuer: i, jwksUri: 'https://u:p@x/y'}".into(), "jwksUri", "no URL"),
        (format!("{{{good}, jwksUri: 'https://x/y'}}"), "jwks", "cannot both be written"),
        ("{issuer: i, jwks: 'nonsense'}".into(), "jwks", "no list `keys`"),
        ("{issuer: i, jwks: '{\"keys\":[]}'}".into(), "jwks", "`keys` is empty"),
        ("{issuer: i, jwks: '{\"keys\":[{\"k\":\"x\"}]}'}".into(), "jwks", "no `kty`"),
        (format!("{{{good}, audience: [a]}}"), "audience", "did you mean `audiences`?"),
        (format!("{{{good}, audiences: ['']}}"), "audiences[0]", "an empty text"),
        (format!("{{{good}, timeout: soon}}"), "timeout", "is not a duration"),
        (format!("{{{good}, timeout: 0s}}"), "timeout", "no time at all"),
        (format!("{{{good}, forwardOriginalToken: maybe}}"), "forwardOriginalToken", "expected `true` or `false`"),
        (format!("{{{good}, fromHeaders: [{{prefix: x}}]}}"), "fromHeaders[0].name", "has a name"),
        (format!("{{{good}, fromHeaders: [{{name: 'a b'}}]}}"), "fromHeaders[0].name", "not a header name"),
        (format!("{{{good}, outputPayloadToHeader: Authorization}}"), "outputPayloadToHeader", "cannot be made from a token"),
        (format!("{{{good}, outputClaimToHeaders: [{{header: x}}]}}"), "outputClaimToHeaders[0].claim", "has a claim"),
        (
            format!("{{{good}, outputClaimToHeaders: [{{header: x, claim: a..b}}]}}"),
            "outputClaimToHeaders[0].claim",
            "a claim is",
        ),
    ] {
        let (state, problems) = told(&ra("a", "x", &format!("{{{TO_S}, jwtRules: [{rule}]}}")));
        let want = format!("error spec.jwtRules[0].{field}: ");
        assert!(matches!(&problems[..], [p] if p.starts_with(&want) && p.contains(message)), "{rule}: {problems:?}");
        assert!(problems[0].contains("everything it is bound to is refused"), "{problems:?}");
        assert!(matches!(&only(&state, SERVICE).body, AuthBody::Unusable { why } if why.contains(message)), "{rule}");
    }
    // Where not even the targets are known, all they may have been.
    for (ns, targets, bound) in [
        ("a", "targetRef: {kind: Service}", "namespace a"),
        ("a", "targetRefs: [{kind: Service, name: s}], selector: {matchLabels: {a: b}}", "namespace a"),
        ("a", "targetsRefs: [{kind: Service, name: s}]", "namespace a"),
        ("istio-system", "targetRefs: 7", "everything"),
    ] {
        let (state, problems) = told(&ra(ns, "x", &format!("{{{targets}, jwtRules: [{{{good}}}]}}")));
        assert!(matches!(&problems[..], [p] if p.starts_with("error ")), "{targets}: {problems:?}");
        assert!(matches!(&only(&state, bound).body, AuthBody::Unusable { .. }), "{targets}");
    }
    // Without a readable name it closes like any security object.
    let (state, _) = told(&ra("a", "_", &format!("{{{TO_S}}}")));
    assert!(state.l7.contains_key("namespace a"), "{:?}", state.l7);
    let (_, problems) = told(&ra("a", "x", &format!("{{{TO_S}, jwtRules: []}}")));
    assert!(matches!(&problems[..], [p] if p.starts_with("warning ") && p.contains("no token is looked at")), "{problems:?}");
}

#[test]
fn a_removed_one_binds_nothing() {
    let mut t = Translator::new(view(), &Settings { layer7: true, ..Settings::default() });
    let mut state = State::default();
    let (all, _) = objects(&mut t, &ra("a", "x", &format!("{{jwtRules: [{{issuer: i, jwks: {KEYS}}}]}}")));
    for object in all {
        t.upsert(object);
    }
    state.apply(t.flush());
    assert_eq!(state.auths.len(), 1);
    t.remove(&ObjectId { kind: Kind::RequestAuthentication, namespace: "a".into(), name: "x".into() });
    state.apply(t.flush());
    assert!(state.auths.is_empty());
}
