//! Tables of VirtualServices and the routes they become.

use std::time::Duration;

use mesh_model::l7::route::{
    Abort, BackendRef, Dialect, Forward, Fraction, HttpAction, HttpMatch, HttpRoute, PathMatch, PathRewrite, RedirectPort,
    RetryOn, RetryPolicy, RouteTable,
};
use mesh_model::l7::select::select_tcp;
use mesh_model::l7::text::StringMatch;

use super::super::tests::{State, gateway, mesh, mesh7, ns, service};
use crate::diagnostics::{Problem, Severity};

const REVIEWS: &str = "a/reviews.a.svc.cluster.local";

/// Two namespaces with services of one port and of two.
fn world() -> String {
    service("a", "reviews", "", "{clusterIP: 10.1.0.1, ports: [{port: 80, name: http}]}")
        + &service("a", "ratings", "", "{clusterIP: 10.1.0.2, ports: [{port: 9080, name: http}]}")
        + &service("a", "two", "", "{clusterIP: 10.1.0.3, ports: [{port: 80, name: http}, {port: 8080, name: http-alt}]}")
        + &service("b", "other", "", "{clusterIP: 10.1.0.4, ports: [{port: 80, name: http}, {port: 81, name: tcp}]}")
}
fn vs_at(ns: &str, name: &str, meta: &str, spec: &str) -> String {
    let spec = spec.trim_end().replace('\n', "\n  ");
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: {ns}{meta}}}\nspec:\n  {spec}\n"
    )
}
fn vs(spec: &str) -> String {
    vs_at("a", "v", "", spec)
}
/// One rule of `reviews`, to itself unless it says where to.
fn rule(fields: &str) -> String {
    let to = if ["route:", "redirect:", "directResponse:", "delegate:"].iter().any(|k| fields.contains(k)) {
        ""
    } else {
        ", route: [{destination: {host: reviews}}]"
    };
    vs(&format!("hosts: [reviews]\nhttp:\n- {{name: r{}{fields}{to}}}", if fields.is_empty() { "" } else { ", " }))
}
fn told(problems: &[Problem]) -> Vec<String> {
    problems
        .iter()
        .map(|p| format!("{} {}:{} {}: {}", p.severity.as_str(), p.code.unwrap_or(""), p.origin.line, p.field, p.message))
        .collect()
}
#[track_caller]
fn table(text: &str) -> RouteTable {
    let (state, problems) = mesh7(&(world() + text));
    assert_eq!(told(&problems), [""; 0], "{text}");
    of(&state, REVIEWS)
}
#[track_caller]
fn of(state: &State, key: &str) -> RouteTable {
    let t = state.routes.get(key).unwrap_or_else(|| panic!("no routes of {key} in {:?}", state.routes.keys()));
    (**t).clone()
}
#[track_caller]
fn only(text: &str) -> (HttpMatch, HttpRoute) {
    let t = table(text);
    assert_eq!(t.http.len(), 1, "{t:?}");
    let r = t.http.get(0).unwrap().clone();
    ((*r.matches).clone(), (*r.route).clone())
}
#[track_caller]
fn matches(fields: &str) -> HttpMatch {
    only(&rule(&format!("match: [{fields}]"))).0
}
#[track_caller]
fn route(fields: &str) -> HttpRoute {
    only(&rule(fields)).1
}
#[track_caller]
fn forward(fields: &str) -> Forward {
    match route(fields).action {
        HttpAction::Forward(f) => f,
        a => panic!("{a:?}"),
    }
}
/// Backends as text: `cluster*weight`, or `!status why`.
fn targets(f: &Forward) -> Vec<String> {
    f.backends
        .iter()
        .map(|b| match &b.to {
            BackendRef::Service(c) => format!("{c}*{}", b.weight),
            BackendRef::Invalid { status, why } => format!("!{status} {why}*{}", b.weight),
        })
        .collect()
}
fn header(text: &str) -> http::HeaderName {
    text.parse().unwrap()
}
fn regex(text: &str) -> StringMatch {
    StringMatch::Regex(mesh_model::l7::Pattern::parse(text).unwrap())
}

#[test]
fn matches_are_what_they_say() {
    let exact = |t: &str| StringMatch::Exact(t.into());
    let prefix = |t: &str| StringMatch::Prefix(t.into());
    for (fields, want) in [
        ("{}", HttpMatch::default()),
        ("{uri: {exact: /a}}", HttpMatch { path: Some(PathMatch::Exact("/a".into())), ..HttpMatch::default() }),
        ("{uri: {prefix: /a}}", HttpMatch { path: Some(PathMatch::TextPrefix("/a".into())), ..HttpMatch::default() }),
        ("{uri: {}}", HttpMatch::default()),
        (
            "{uri: {prefix: /a}, ignoreUriCase: true}",
            HttpMatch { path: Some(PathMatch::TextPrefix("/a".into())), ignore_case: true, ..HttpMatch::default() },
        ),
        ("{method: {exact: GET}}", HttpMatch { method: Some(exact("GET")), ..HttpMatch::default() }),
        ("{scheme: {exact: https}}", HttpMatch { scheme: Some(exact("https")), ..HttpMatch::default() }),
        ("{authority: {prefix: api.}}", HttpMatch { authority: Some(prefix("api.")), ..HttpMatch::default() }),
        ("{port: 80}", HttpMatch { port: Some(80), ..HttpMatch::default() }),
        ("{gateways: [mesh, x], port: 80}", HttpMatch { port: Some(80), ..HttpMatch::default() }),
        (
            "{headers: {canary: {exact: 'true'}, X-Any: {}, x-star: {regex: '*'}, x-re: {regex: 'a+'}}}",
            HttpMatch {
                headers: vec![
                    (header("canary"), exact("true")),
                    (header("x-any"), StringMatch::Present),
                    (header("x-star"), StringMatch::Present),
                    (header("x-re"), regex("a+")),
                ],
                ..HttpMatch::default()
            },
        ),
        (
            "{headers: {':method': {exact: PUT}, ':authority': {exact: h}, ':scheme': {}}}",
            HttpMatch { method: Some(exact("PUT")), authority: Some(exact("h")), ..HttpMatch::default() },
        ),
        (
            "{withoutHeaders: {x-a: {exact: b}, x-c: {}}}",
            HttpMatch {
                without_headers: vec![(header("x-a"), exact("b")), (header("x-c"), StringMatch::Present)],
                ..HttpMatch::default()
            },
        ),
        (
            "{queryParams: {v: {exact: '1'}, w: {prefix: x}, y: {}}}",
            HttpMatch {
                query: vec![("v".into(), exact("1")), ("w".into(), prefix("x")), ("y".into(), StringMatch::Present)],
                ..HttpMatch::default()
            },
        ),
        (
            "{headers: {'@request.auth.claims.groups': {exact: admin}, '@request.auth.claims[a.b][c]': {}}, withoutHeaders: {'@request.auth.claims.x': {}}}",
            HttpMatch {
                claims: vec![(vec!["groups".into()], exact("admin")), (vec!["a.b".into(), "c".into()], StringMatch::Present)],
                without_claims: vec![(vec!["x".into()], StringMatch::Present)],
                ..HttpMatch::default()
            },
        ),
    ] {
        let text = rule(&format!("match: [{fields}]"));
        let got = table(&text).http.get(0).unwrap().matches.clone();
        assert_eq!(*got, want, "{fields}");
    }
    assert!(matches!(matches("{uri: {regex: '/v[0-9]'}}").path, Some(PathMatch::Regex(p)) if p.source() == "/v[0-9]"));
}

#[test]
fn matches_of_one_rule_share_their_route_unless_they_are_named() {
    let t = table(&rule("match: [{uri: {exact: /a}}, {uri: {exact: /b}}, {name: m, uri: {exact: /c}}]"));
    let names: Vec<&str> = t.http.iter().map(|r| &*r.route.name).collect();
    assert_eq!(names, ["r", "r", "r.m"]);
    assert!(std::sync::Arc::ptr_eq(&t.http.get(0).unwrap().route, &t.http.get(1).unwrap().route));
}

#[test]
fn actions_and_settings_are_what_they_say() {
    // Timeout, retries.
    let f = forward("");
    assert_eq!((f.timeout, &f.retry), (None, &None));
    assert_eq!(targets(&f), ["outbound|80||reviews.a.svc.cluster.local*1"]);
    assert_eq!(forward("timeout: 1.5s").timeout, Some(Duration::from_millis(1500)));
    assert_eq!(forward("timeout: 0s").timeout, None);
    assert_eq!(forward("retries: {attempts: 0}").retry.unwrap().attempts, 0);
    assert_eq!(forward("retries: {}").retry.unwrap().attempts, 0);
    assert_eq!(forward("retries: {attempts: -1}").retry.unwrap().attempts, 0);
    assert_eq!(*forward("retries: {attempts: 5}").retry.unwrap(), RetryPolicy { attempts: 5, ..RetryPolicy::istio_default() });
    let r = forward(
        "retries: {attempts: 3, perTryTimeout: 2s, retryOn: '5xx, reset,503,502', retryRemoteLocalities: true, retryIgnorePreviousHosts: false, backoff: 100ms}",
    );
    let want = RetryPolicy {
        attempts: 3,
        on: RetryOn::FIVE_XX.with(RetryOn::RESET).with(RetryOn::STATUS_CODES),
        statuses: vec![502, 503],
        per_try: Some(Duration::from_secs(2)),
        base_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(1),
        other_hosts: false,
        other_localities: true,
    };
    assert_eq!(*r.retry.unwrap(), want);

    // Rewrite.
    let rewrite = |fields: &str| forward(&format!("rewrite: {fields}")).rewrite.unwrap();
    assert_eq!(rewrite("{uri: /n}").path, Some(PathRewrite::TextPrefix("/n".into())));
    assert_eq!(rewrite("{authority: 'n.com:8080'}").authority.as_deref(), Some("n.com:8080"));
    let Some(PathRewrite::Regex { pattern, replacement }) =
        rewrite("{uriRegexRewrite: {match: '^/(\\w+)/(\\d+)', rewrite: '/\\2/$/\\1\\\\'}}").path
    else {
        panic!("no regex")
    };
    assert_eq!(pattern.regex().replace_all("/users/17/x", &*replacement), "/17/$/users\\/x");

    // Redirect, direct response.
    let redirect = |fields: &str| match route(&format!("redirect: {fields}")).action {
        HttpAction::Redirect(r) => r,
        a => panic!("{a:?}"),
    };
    let r = redirect("{uri: /n, authority: x.com, scheme: https, port: 8443, redirectCode: 308}");
    assert_eq!((r.status, r.path, r.port), (308, Some(PathRewrite::Full("/n".into())), RedirectPort::Number(8443)));
    assert_eq!((r.authority.as_deref(), r.scheme.as_deref(), r.strip_query), (Some("x.com"), Some("https"), false));
    let r = redirect("{derivePort: FROM_REQUEST_PORT}");
    assert_eq!((r.status, r.port), (301, RedirectPort::FromRequest));
    assert_eq!(
        redirect("{derivePort: FROM_PROTOCOL_DEFAULT, uri: '%PREFIX()%/z'}").path,
        Some(PathRewrite::TextPrefix("/z".into()))
    );
    let respond = |fields: &str| match route(&format!("directResponse: {fields}")).action {
        HttpAction::Respond(r) => (r.status, r.body.to_vec()),
        a => panic!("{a:?}"),
    };
    assert_eq!(respond("{status: 503}"), (503, vec![]));
    assert_eq!(respond("{status: 200, body: {string: ok}}"), (200, b"ok".to_vec()));
    assert_eq!(respond("{status: 200, body: {bytes: Zm9v}}"), (200, b"foo".to_vec()));

    // Faults.
    let f =
        route("fault: {delay: {percentage: {value: 0.1}, fixedDelay: 5s}, abort: {percentage: {value: 100}, httpStatus: 418}}")
            .fault
            .unwrap();
    assert_eq!(f.delay, Some((Fraction { per_million: 1000 }, Duration::from_secs(5))));
    assert_eq!(f.abort, Some((Fraction::ALL, Abort::Http(418))));
    let f = route("fault: {delay: {percent: 10, fixedDelay: 1s}, abort: {percentage: {value: 1}, grpcStatus: UNAVAILABLE}}")
        .fault
        .unwrap();
    assert_eq!(f.delay.unwrap().0, Fraction::percent(10.0));
    assert_eq!(f.abort, Some((Fraction::percent(1.0), Abort::Grpc(14))));

    // Mirrors.
    let f = forward(
        "mirror: {host: ratings}, mirrorPercentage: {value: 12.5}, mirrorPercent: 3, mirrors: [{destination: {host: reviews}}, {destination: {host: ratings}, percentage: {value: 0}}]",
    );
    let mirrors: Vec<(String, u32)> = f
        .mirrors
        .iter()
        .map(|m| match &m.to {
            BackendRef::Service(c) => (c.to_string(), m.fraction.per_million),
            BackendRef::Invalid { .. } => panic!("{m:?}"),
        })
        .collect();
    assert_eq!(
        mirrors,
        [
            ("outbound|9080||ratings.a.svc.cluster.local".to_owned(), 125_000),
            ("outbound|80||reviews.a.svc.cluster.local".to_owned(), 1_000_000)
        ]
    );

    // CORS.
    let c = route(
        "corsPolicy: {allowOrigin: ['*'], allowOrigins: [{exact: 'https://a.com'}, {prefix: 'https://b'}, {regex: 'https://[a-z]+'}], allowMethods: [GET, POST], allowHeaders: [Authorization], exposeHeaders: [x-a, x-b], maxAge: 24h, allowCredentials: true, unmatchedPreflights: IGNORE}",
    )
    .cors
    .unwrap();
    assert_eq!((&*c.methods, &*c.headers, &*c.expose, c.max_age), ("GET,POST", "Authorization", "x-a,x-b", Some(86400)));
    assert_eq!((c.credentials, c.forward_unmatched, c.origins.len()), (true, false, 4));
    assert_eq!((&c.origins[0], &c.origins[1]), (&StringMatch::Present, &StringMatch::Exact("https://a.com".into())));
    assert!(route("corsPolicy: {}").cors.unwrap().forward_unmatched);
}

#[test]
fn headers_are_edited_as_istio_would() {
    let names = |l: &[(http::HeaderName, http::HeaderValue)]| -> Vec<String> {
        l.iter().map(|(n, v)| format!("{n}={}", v.to_str().unwrap())).collect()
    };
    // A single destination's edits come after the route's, and a set takes away an earlier add.
    let r = route(
        "headers: {request: {set: {x-a: '1', Host: h.com}, add: {x-b: '2', x-c: 50%%}, remove: [x-d]}, response: {set: {x-e: '3'}}}, route: [{destination: {host: reviews}, headers: {request: {set: {x-a: '4', x-b: '5'}, add: {x-f: '6'}}, response: {remove: [server]}}}]",
    );
    assert_eq!(names(&r.headers.request.set), ["x-a=1", "x-a=4", "x-b=5"]);
    assert_eq!(names(&r.headers.request.add), ["x-c=50%", "x-f=6"]);
    assert_eq!((r.headers.request.remove, r.headers.response.remove), (vec![header("x-d")], vec![header("server")]));
    assert_eq!(
        (r.headers.request.authority.as_deref(), names(&r.headers.response.set)),
        (Some("h.com"), vec!["x-e=3".to_owned()])
    );
    // Several keep their own.
    let r = route(
        "headers: {request: {set: {x-a: '1'}}}, route: [{destination: {host: reviews}, weight: 1, headers: {request: {set: {':authority': o.com}}}}, {destination: {host: ratings}, weight: 2}]",
    );
    let HttpAction::Forward(f) = &r.action else { panic!() };
    assert_eq!(f.backends[0].headers.request.authority.as_deref(), Some("o.com"));
    assert_eq!(names(&r.headers.request.set), ["x-a=1"]);
    // `rewrite.authority` wins over `Host`.
    let r = route("rewrite: {authority: w.com}, headers: {request: {set: {Host: h.com}}}");
    assert_eq!(r.headers.request.authority, None);
    // What cannot be edited is left out, and told.
    let text =
        rule("headers: {request: {set: {content-length: '1'}, add: {Host: x}, remove: [':path', x-envoy-attempt-count, x-ok]}}");
    let (state, problems) = mesh7(&(world() + &text));
    assert_eq!(problems.iter().map(|p| (p.severity, p.code)).collect::<Vec<_>>(), [(Severity::Warning, Some("header")); 4]);
    let table = of(&state, REVIEWS);
    let edits = &table.http.get(0).unwrap().route.headers.request;
    assert_eq!((edits.set.len(), edits.add.len(), &*edits.remove), (0, 0, &[header("x-ok")][..]));
}

#[test]
fn weights_and_ports_of_destinations() {
    let t = targets(&forward(
        "route: [{destination: {host: reviews}, weight: 95}, {destination: {host: ratings}, weight: 5}, {destination: {host: two}, weight: 0}]",
    ));
    assert_eq!(t, ["outbound|80||reviews.a.svc.cluster.local*95", "outbound|9080||ratings.a.svc.cluster.local*5"]);
    assert_eq!(forward("route: [{destination: {host: reviews}, weight: 7}]").total_weight, 1);
    // The port: its own, the only one of the service, the one addressed.
    assert_eq!(
        targets(&forward("route: [{destination: {host: two, port: {number: 8080}}}]")),
        ["outbound|8080||two.a.svc.cluster.local*1"]
    );
    assert_eq!(targets(&forward("route: [{destination: {host: two}}]")), ["outbound|80||two.a.svc.cluster.local*1"]);
    assert_eq!(
        targets(&forward("route: [{destination: {host: other.b.svc.cluster.local}}]")),
        ["outbound|80||other.b.svc.cluster.local*1"]
    );
    // Of a service with two ports: a rule per port.
    let (state, problems) = mesh7(
        &(world()
            + &vs(
                "hosts: [two]\nhttp:\n- {match: [{uri: {prefix: /a}}, {port: 80}], route: [{destination: {host: two}}]}\n- route: [{destination: {host: other.b.svc.cluster.local}}]",
            )),
    );
    let t = of(&state, "a/two.a.svc.cluster.local");
    let rules: Vec<String> = t
        .http
        .iter()
        .map(|r| match &r.route.action {
            HttpAction::Forward(f) => format!("{:?} {}", r.matches.port, targets(f)[0]),
            a => panic!("{a:?}"),
        })
        .collect();
    assert_eq!(
        rules,
        [
            "Some(80) outbound|80||two.a.svc.cluster.local*1",
            "Some(8080) outbound|8080||two.a.svc.cluster.local*1",
            "Some(80) outbound|80||two.a.svc.cluster.local*1",
            "Some(80) outbound|80||other.b.svc.cluster.local*1",
            "Some(8080) !503 other.b.svc.cluster.local has no port 8080*1",
        ]
    );
    assert_eq!(
        told(&problems),
        [
            "warning no-port:29 spec.http[1].route[0].destination.port: other.b.svc.cluster.local has no port 8080; its share of requests is answered 503"
        ]
    );
    // Rules for one port leave the other alone.
    let (state, _) = mesh7(
        &(world()
            + &vs("hosts: [two]\nhttp:\n- {match: [{port: 80, uri: {prefix: /x}}], route: [{destination: {host: reviews}}]}")),
    );
    let t = of(&state, "a/two.a.svc.cluster.local");
    assert_eq!(t.http.len(), 2);
    assert_eq!((t.http.get(1).unwrap().matches.port, &*t.http.get(1).unwrap().route.name), (Some(8080), "default"));
}

#[test]
fn destinations_that_are_not_there() {
    for (fields, code, message, want) in [
        (
            "route: [{destination: {host: nowhere}}]",
            "no-service",
            "no service of the mesh has the host nowhere.a.svc.cluster.local; its share of requests is answered 503",
            "!503 no service of the mesh has the host nowhere.a.svc.cluster.local*1",
        ),
        (
            "route: [{destination: {host: reviews, port: {number: 99}}}]",
            "no-port",
            "reviews.a.svc.cluster.local has no port 99; its share of requests is answered 503",
            "!503 reviews.a.svc.cluster.local has no port 99*1",
        ),
        (
            "route: [{destination: {host: reviews, subset: v9}}]",
            "no-subset",
            "no DestinationRule for reviews has the subset v9: requests to it are answered 503",
            "outbound|80|v9|reviews.a.svc.cluster.local*1",
        ),
    ] {
        let (state, problems) = mesh7(&(world() + &rule(fields)));
        let t = of(&state, REVIEWS);
        let HttpAction::Forward(f) = &t.http.get(0).unwrap().route.action else { panic!() };
        assert_eq!(targets(f), [want]);
        let [p] = problems.as_slice() else { panic!("{problems:?}") };
        assert_eq!((p.severity, p.code), (Severity::Warning, Some(code)));
        assert_eq!(p.message.replace("reviews.a.svc.cluster.local has the subset", "reviews has the subset"), message);
        assert!(p.field.starts_with("spec.http[0].route[0].destination."), "{p}");
    }
    // A half short name.
    let (_, problems) = mesh7(&(world() + &rule("route: [{destination: {host: other.b}}]")));
    assert_eq!(&*problems[0].fix, "write other.b.svc.cluster.local: only names without dots are completed");
}

/// Each mistake: what is written in the rule, line within the VirtualService's spec, field, part of the message.
#[test]
fn mistakes_are_told_with_line_and_field_and_close_the_host() {
    for (spec, line, field, message) in [
        ("hosts: [reviews]\nhttps: []", 6, "spec.https", "unknown field `https`; did you mean `http`?"),
        ("hosts: [reviews]", 5, "spec.http", "at least one rule"),
        ("hosts: [reviews]\nhttp:\n- {}", 7, "spec.http[0].route", "a rule has a `route`"),
        ("hosts: [reviews]\nhttp:\n- route: []", 7, "spec.http[0].route", "at least one destination"),
        ("hosts: [reviews]\nhttp:\n- rute: []", 7, "spec.http[0].rute", "did you mean `route`?"),
        (
            "hosts: [reviews]\nhttp:\n- redirect: {}\n  route: [{destination: {host: x}}]",
            7,
            "spec.http[0].redirect",
            "`route` and `redirect` cannot both be written",
        ),
        ("hosts: [reviews]\nhttp:\n- redirect: {}\n  rewrite: {uri: /}", 8, "spec.http[0].rewrite", "cannot go with `redirect`"),
        ("hosts: [reviews]\nhttp:\n- match: [{uri: {prefx: /}}]", 7, "spec.http[0].match[0].uri.prefx", "did you mean `prefix`?"),
        ("hosts: [reviews]\nhttp:\n- match: [{uri: {prefix: /, exact: /}}]", 7, "spec.http[0].match[0].uri", "only one of"),
        (
            "hosts: [reviews]\nhttp:\n- match: [{uri: {regex: '('}}]",
            7,
            "spec.http[0].match[0].uri.regex",
            "not a regular expression",
        ),
        ("hosts: [reviews]\nhttp:\n- match: [{uri: /}]", 7, "spec.http[0].match[0].uri", "expected a mapping"),
        (
            "hosts: [reviews]\nhttp:\n- match: [{headers: {'a b': {}}}]",
            7,
            "spec.http[0].match[0].headers[\"a b\"]",
            "not a header name",
        ),
        (
            "hosts: [reviews]\nhttp:\n- match: [{headers: {'@request.auth.claim.x': {}}}]",
            7,
            "spec.http[0].match[0].headers[\"@request.auth.claim.x\"]",
            "not a claim",
        ),
        (
            "hosts: [reviews]\nhttp:\n- match: [{headers: {':path': {}}}]",
            7,
            "spec.http[0].match[0].headers.:path",
            "cannot be matched",
        ),
        (
            "hosts: [reviews]\nhttp:\n- match: [{method: {exact: A}, headers: {':method': {exact: B}}}]",
            7,
            "spec.http[0].match[0].headers.:method",
            "matched twice",
        ),
        ("hosts: [reviews]\nhttp:\n- match: [{port: 0}]", 7, "spec.http[0].match[0].port", "`0` is not a port"),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: '*.x'}}]",
            7,
            "spec.http[0].route[0].destination.host",
            "not a host name",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {}}]",
            7,
            "spec.http[0].route[0].destination.host",
            "the host of a service",
        ),
        ("hosts: [reviews]\nhttp:\n- route: [{}]", 7, "spec.http[0].route[0].destination", "where to"),
        (
            "hosts: [reviews]\nhttp:\n- route:\n  - destination: {host: x}\n  - destination: {host: y}",
            8,
            "spec.http[0].route",
            "no destination has a weight",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}, weight: -1}]",
            7,
            "spec.http[0].route[0].weight",
            "expected a whole number",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}, weight: 4294967295}, {destination: {host: x}, weight: 1}]",
            7,
            "spec.http[0].route[1].weight",
            "sum to more",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  timeout: 5",
            8,
            "spec.http[0].timeout",
            "`5` is not a duration",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  retries: {attempts: 2, retryOn: 'never'}",
            8,
            "spec.http[0].retries.retryOn",
            "`never` is not a reason to retry",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  retries: {attempts: 2, backoff: 1us}",
            8,
            "spec.http[0].retries.backoff",
            "at least 1ms",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  rewrite: {}",
            8,
            "spec.http[0].rewrite",
            "a rewrite has",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  rewrite: {uriRegexRewrite: {match: a, rewrite: '\\1'}}",
            8,
            "spec.http[0].rewrite.uriRegexRewrite.rewrite",
            "not a group of the pattern, which has 0",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  rewrite: {authority: 'a b'}",
            8,
            "spec.http[0].rewrite.authority",
            "not a host",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  headers: {request: {set: {x-a: '%REQ(b)%'}}}",
            8,
            "spec.http[0].headers.request.set.x-a",
            "variables such as",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  fault: {delay: {fixedDelay: 1s, percentage: {value: 101}}}",
            8,
            "spec.http[0].fault.delay.percentage.value",
            "not a percentage",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  fault: {abort: {percentage: {value: 1}, httpStatus: 99}}",
            8,
            "spec.http[0].fault.abort.httpStatus",
            "not an HTTP status",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  fault: {abort: {percentage: {value: 1}, http2Error: X}}",
            8,
            "spec.http[0].fault.abort.http2Error",
            "unknown field",
        ),
        ("hosts: [reviews]\nhttp:\n- redirect: {redirectCode: 300}", 7, "spec.http[0].redirect.redirectCode", "not a status"),
        ("hosts: [reviews]\nhttp:\n- redirect: {uri: x}", 7, "spec.http[0].redirect.uri", "not a path"),
        ("hosts: [reviews]\nhttp:\n- directResponse: {body: {string: x}}", 7, "spec.http[0].directResponse.status", "the status"),
        (
            "hosts: [reviews]\nhttp:\n- directResponse: {status: 200, body: {bytes: '!'}}",
            7,
            "spec.http[0].directResponse.body.bytes",
            "not base64",
        ),
        (
            "hosts: [reviews]\nhttp:\n- route: [{destination: {host: x}}]\n  corsPolicy: {unmatchedPreflights: NO}",
            8,
            "spec.http[0].corsPolicy.unmatchedPreflights",
            "not understood",
        ),
        ("hosts: [reviews]\ntls:\n- route: [{destination: {host: x}}]", 7, "spec.tls[0].match", "matches `sniHosts`"),
        ("hosts: [reviews]\ntcp:\n- match: [{sniHosts: [x]}]", 7, "spec.tcp[0].match[0].sniHosts", "unknown field"),
        ("hosts: [reviews]\ntcp:\n- match: [{port: 80}]", 7, "spec.tcp[0].route", "where to"),
        ("hosts: [reviews, 'a b']\nhttp:\n- directResponse: {status: 200}", 5, "spec.hosts[1]", "not a host name"),
    ] {
        let (state, problems) = mesh7(&(world() + &vs(spec)));
        let [p] = problems.as_slice() else { panic!("{spec}: {problems:?}") };
        // Lines are counted from the object's `apiVersion`, behind the world and a `---`.
        assert_eq!((p.severity, p.origin.line, &*p.field), (Severity::Error, line + 21, field), "{spec}: {p}");
        assert!(p.message.contains(message), "{p}");
        let why = of(&state, REVIEWS).broken.expect(spec);
        assert!(why.starts_with("VirtualService a/v cannot be used: ") && why.contains(message), "{why}");
    }
}

#[test]
fn what_nobody_can_tell_the_hosts_of_is_refused_alone() {
    for spec in ["hosts: reviews\nhttp: []", "hosts: ['a b']\nhttp: []", "hosts: [reviews]\ngateways: [x]\nhosts2: 1"] {
        let (state, problems) = mesh7(&(world() + &vs(spec)));
        assert_eq!((state.routes.len(), problems.len(), problems[0].severity), (0, 1, Severity::Error), "{spec}");
    }
}

#[test]
fn gateways_and_sources() {
    // Not for the mesh.
    let (state, problems) =
        mesh7(&(world() + &vs("hosts: [reviews]\ngateways: [istio-system/gw]\nhttp:\n- directResponse: {status: 200}")));
    assert_eq!((state.routes.len(), problems[0].severity), (0, Severity::Note));
    let (state, problems) =
        mesh7(&(world() + &vs("hosts: [reviews]\ngateways: [mesh, gw]\nhttp:\n- directResponse: {status: 200}")));
    assert_eq!((state.routes.len(), problems.len()), (1, 0));
    // A match of a gateway or a client is dropped whole; a rule without matches left does not become one for everything.
    let (state, problems) = mesh7(
        &(world()
            + &vs(
                "hosts: [reviews]\nhttp:\n- {match: [{gateways: [gw]}], directResponse: {status: 201}}\n- {match: [{sourceLabels: {app: x}}, {sourceNamespace: b}, {uri: {exact: /x}}], directResponse: {status: 202}}\n- {match: [{sourceLabels: {app: x}}], directResponse: {status: 203}}\n- directResponse: {status: 204}",
            )),
    );
    assert_eq!(problems.iter().map(|p| (p.severity, p.code)).collect::<Vec<_>>(), [(Severity::Warning, Some("source-match")); 3]);
    let statuses: Vec<u16> = of(&state, REVIEWS)
        .http
        .iter()
        .map(|r| match &r.route.action {
            HttpAction::Respond(r) => r.status,
            a => panic!("{a:?}"),
        })
        .collect();
    assert_eq!(statuses, [202, 204]);
}

fn answers(t: &RouteTable) -> Vec<(Option<String>, u16)> {
    t.http
        .iter()
        .map(|r| {
            let path = r.matches.path.as_ref().map(|p| match p {
                PathMatch::Exact(t) | PathMatch::TextPrefix(t) => t.to_string(),
                p => format!("{p:?}"),
            });
            match &r.route.action {
                HttpAction::Respond(d) => (path, d.status),
                HttpAction::Forward(f) => match &f.backends[0].to {
                    BackendRef::Invalid { status, .. } => (path, *status),
                    BackendRef::Service(_) => (path, 0),
                },
                HttpAction::Redirect(r) => (path, r.status),
            }
        })
        .collect()
}

#[test]
fn several_virtual_services_of_one_host_count_oldest_first() {
    let one = |name: &str, created: &str, path: &str, status: u16| {
        let meta = if created.is_empty() { String::new() } else { format!(", creationTimestamp: '{created}'") };
        vs_at(
            "a",
            name,
            &meta,
            &format!("hosts: [reviews]\nhttp:\n- {{match: [{{uri: {{exact: {path}}}}}], directResponse: {{status: {status}}}}}"),
        )
    };
    let text = world()
        + &one("z", "2024-01-01T00:00:00Z", "/z", 201)
        + &one("c", "", "/c", 203)
        + &one("b", "", "/b", 202)
        + &one("y", "2023-01-01T00:00:00Z", "/y", 200);
    let (state, problems) = mesh7(&text);
    assert_eq!(problems, []);
    let t = of(&state, REVIEWS);
    let path = |p: &str| Some(p.to_owned());
    assert_eq!(answers(&t), [(path("/y"), 200), (path("/z"), 201), (path("/b"), 202), (path("/c"), 203)]);
    assert_eq!(t.origins.len(), 4);
    // What stands behind a rule for everything is told.
    let all = vs_at(
        "a",
        "a",
        ", creationTimestamp: '2022'",
        "hosts: ['*.a.svc.cluster.local']\nhttp:\n- directResponse: {status: 299}\n- directResponse: {status: 298}",
    );
    let (state, problems) = mesh7(&(text + &all));
    assert_eq!(answers(&of(&state, REVIEWS)), [(None, 299)]);
    assert_eq!(problems.iter().filter(|p| p.code == Some("unreachable")).count(), 5, "{problems:?}");
}

#[test]
fn a_virtual_service_is_of_the_services_namespace_or_its_waypoints() {
    let v = |ns: &str, spec: &str| vs_at(ns, "v", "", spec);
    let text = "hosts: [reviews.a.svc.cluster.local]\nhttp:\n- directResponse: {status: 200}";
    let (state, problems) = mesh7(&(world() + &v("b", text)));
    assert_eq!(state.routes.len(), 0);
    assert_eq!(
        told(&problems),
        [
            "warning no-service:22 spec.hosts: reviews.a.svc.cluster.local is a service of a, and neither it nor its waypoint is in namespace b"
        ]
    );
    let waypoint =
        ns("a", "istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: b") + &gateway("b", "wp", "", "All", true);
    let (state, problems) = mesh7(&(world() + &waypoint + &v("b", text)));
    assert_eq!((state.routes.keys().map(String::as_str).collect::<Vec<_>>(), problems), (vec![REVIEWS], vec![]));
    let (state, _) = mesh7(&(world() + &waypoint + &v("b", "hosts: ['*']\nhttp:\n- directResponse: {status: 200}")));
    assert_eq!(state.routes.len(), 4, "all of a through the waypoint, and other of b itself");
    // A host that is not there.
    let (_, problems) = mesh7(&(world() + &v("a", "hosts: [revews]\nhttp:\n- directResponse: {status: 200}")));
    assert_eq!(
        told(&problems),
        ["warning no-service:22 spec.hosts: no service of the mesh has the host revews.a.svc.cluster.local"]
    );
}

#[test]
fn delegates_are_merged() {
    let root = |rules: &str| vs_at("a", "root", "", &format!("hosts: [reviews]\nhttp:\n{rules}"));
    let leaf = |rules: &str| vs_at("b", "leaf", "", &format!("http:\n{rules}"));
    let (state, problems) = mesh7(
        &(world()
            + &root(
                "- {name: r, match: [{uri: {prefix: /api}, headers: {x: {exact: y}}}], timeout: 5s, headers: {request: {set: {x-r: '1'}}}, delegate: {name: leaf, namespace: b}}\n- directResponse: {status: 299}",
            )
            + &leaf(
                "- {name: one, match: [{uri: {exact: /api/v1}, method: {exact: GET}}], route: [{destination: {host: other, port: {number: 80}}}]}\n- {match: [{uri: {prefix: /else}}], directResponse: {status: 200}}\n- {timeout: 1s, route: [{destination: {host: other, port: {number: 80}}}]}",
            )),
    );
    assert_eq!(problems, []);
    let t = of(&state, REVIEWS);
    assert_eq!(t.http.len(), 3, "{t:?}");
    assert_eq!(t.http.get(0).unwrap().matches.path, Some(PathMatch::Exact("/api/v1".into())));
    assert_eq!(t.http.get(0).unwrap().matches.headers, [(header("x"), StringMatch::Exact("y".into()))]);
    let forwards: Vec<(&str, Option<Duration>, Vec<String>)> = t
        .http
        .iter()
        .filter_map(|r| match &r.route.action {
            HttpAction::Forward(f) => Some((&*r.route.name, f.timeout, targets(f))),
            _ => None,
        })
        .collect();
    let other = vec!["outbound|80||other.b.svc.cluster.local*1".to_owned()];
    assert_eq!(
        forwards,
        [("r-one", Some(Duration::from_secs(5)), other.clone()), ("r", Some(Duration::from_secs(1)), other)],
        "short names are of the delegate's namespace"
    );
    assert!(
        t.http.get(0).unwrap().route.headers.request.set.len() == 1 && t.http.get(0).unwrap().route.dialect == Dialect::Istio
    );
    assert_eq!(t.origins.len(), 2);

    // Delegates that are not there, not one, not exported or broken answer for their share.
    for (leaf, status, message) in [
        (String::new(), 503, "does not exist"),
        (vs_at("b", "leaf", "", "hosts: [other]\nhttp:\n- directResponse: {status: 200}"), 503, "is no delegate"),
        (
            vs_at("b", "leaf", "", "http:\n- directResponse: {status: 200}")
                + "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: 'defaultVirtualServiceExportTo: [.]'}}\n",
            503,
            "not exported",
        ),
        (
            vs_at("b", "leaf", "", "exportTo: ['.']\nhttp:\n- directResponse: {status: 200}"),
            503,
            "is not exported to namespace a",
        ),
        (
            vs_at("b", "leaf", "", "http:\n- directResponse: {status: 1}"),
            500,
            "cannot be used: spec.http[0].directResponse.status",
        ),
    ] {
        let (state, problems) = mesh7(
            &(world()
                + &root(
                    "- {match: [{uri: {prefix: /api}}], delegate: {name: leaf, namespace: b}}\n- directResponse: {status: 299}",
                )
                + &leaf),
        );
        assert_eq!(answers(&of(&state, REVIEWS)), [(Some("/api".to_owned()), status), (None, 299)], "{message}");
        let p = problems.iter().find(|p| p.code == Some("delegate")).expect("told");
        assert!(p.message.contains(message) && &*p.field == "spec.http[0].delegate", "{p}");
    }
    // A delegate cannot delegate, nor have gateways.
    let (_, problems) = mesh7(&(world() + &leaf("- delegate: {name: x}")));
    assert!(problems[0].message.contains("cannot delegate further"));
}

#[test]
fn rules_that_multiply_close_their_host() {
    let many = |n: usize| (0..n).map(|i| format!("{{headers: {{h{i}: {{exact: a}}}}}}")).collect::<Vec<_>>().join(", ");
    let root =
        vs_at("a", "root", "", &format!("hosts: [reviews]\nhttp:\n- {{match: [{}], delegate: {{name: leaf}}}}", many(400)));
    let leaf = vs_at("a", "leaf", "", &format!("http:\n- {{match: [{}], directResponse: {{status: 200}}}}", many(400)));
    let (state, problems) = mesh7(&(world() + &root + &leaf));
    let t = of(&state, REVIEWS);
    assert_eq!(t.http.len(), 0);
    assert_eq!(t.broken.as_deref(), Some("VirtualService a/leaf makes more than 100000 rules for a/reviews.a.svc.cluster.local"));
    assert_eq!(problems.iter().map(|p| (p.severity, p.code)).collect::<Vec<_>>(), [(Severity::Error, Some("too-many-rules"))]);
}

#[test]
fn tcp_and_tls_rules() {
    let (state, problems) = mesh7(
        &(world()
            + &vs(
                "hosts: [reviews]\ntls:\n- {match: [{sniHosts: [a.com, '*.B.com'], port: 443}], route: [{destination: {host: ratings}}]}\n- {match: [{sniHosts: [x.com], sourceLabels: {a: b}}], route: [{destination: {host: ratings}}]}\ntcp:\n- {match: [{destinationSubnets: [10.0.0.0/8], port: 80}], route: [{destination: {host: ratings}, weight: 1}, {destination: {host: reviews}, weight: 3}]}\n- route: [{destination: {host: other.b.svc.cluster.local, port: {number: 81}}}]",
            )),
    );
    assert_eq!(problems.iter().map(|p| p.code).collect::<Vec<_>>(), [Some("source-match")]);
    let t = of(&state, REVIEWS);
    assert_eq!((t.tls.len(), t.tcp.len()), (1, 2));
    assert_eq!(t.tls[0].sni.iter().map(|s| &**s).collect::<Vec<_>>(), ["a.com", "*.b.com"]);
    assert_eq!((t.tcp[0].route.total_weight, &*t.tcp[0].route.name), (4, "a/v"));
    let facts = mesh_model::l7::route::TcpFacts { port: 80, destination: Some("10.1.0.1".parse().unwrap()), sni: None };
    assert_eq!(select_tcp(&t, &facts), Some(&t.tcp[0].route));
}

#[test]
fn the_agent_accepts_and_ignores_it() {
    let text = world()
        + &rule("")
        + &vs("hosts: 17")
        + "---\n{apiVersion: v1, kind: Secret, metadata: {name: s}, data: {tls.key: '!'}}\n";
    let (state, problems) = mesh(&text);
    assert_eq!(state.routes.len(), 0);
    assert_eq!(problems.iter().map(|p| (p.severity, p.code)).collect::<Vec<_>>(), [(Severity::Note, Some("not-for-agent")); 2]);
}
