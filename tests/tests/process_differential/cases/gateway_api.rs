//! HTTPRoute: its own order, its own prefixes, its own answer where there is no backend.
use serde_json::{Value, json};

use crate::case::{Scenario, case, get, request, scenario};
use crate::istiod::{Route, cluster_name, on, retry};

fn set(key: &str, value: &str) -> Value {
    json!({"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"})
}

/// A route that says in a response header which rule it was.
fn named(name: &str, matching: Value) -> Route {
    on(matching).to("").with(json!({"response_headers_to_add": [set("x-rule", name)]}))
}
fn rule(name: &str, matches: &str) -> String {
    format!(
        "- matches: {matches}\n  filters: [{{ type: ResponseHeaderModifier, responseHeaderModifier: {{ set: [{{ name: x-rule, value: {name} }}] }} }}]\n  backendRefs: [{{ name: $NAME, port: 80 }}]\n"
    )
}

pub fn all() -> Vec<Scenario> {
    vec![order(), filters(), backends(), redirects(), sessions()]
}

fn order() -> Scenario {
    scenario("gw-order")
        .http_route(
            &[
                rule("root", "[{ path: { type: PathPrefix, value: / } }]"),
                rule("short", "[{ path: { type: PathPrefix, value: /a } }]"),
                rule("long", "[{ path: { type: PathPrefix, value: /a/b } }]"),
                rule("exact", "[{ path: { type: Exact, value: /a/b } }]"),
                rule("regex", "[{ path: { type: RegularExpression, value: '/r[0-9]+' } }]"),
                rule("header", "[{ path: { type: PathPrefix, value: /a/b }, headers: [{ name: x-k, value: '1' }] }]"),
                rule("method", "[{ path: { type: PathPrefix, value: /a/b }, method: PUT }]"),
                rule("query", "[{ path: { type: PathPrefix, value: /a/b }, queryParams: [{ name: q, value: '1' }] }]"),
                rule("trailing", "[{ path: { type: PathPrefix, value: /t/ } }]"),
            ]
            .concat(),
        )
        .route(named("exact", json!({"path": "/a/b"})))
        .route(named(
            "method",
            json!({"path_separated_prefix": "/a/b", "headers": [{"name": ":method", "string_match": {"exact": "PUT"}}]}),
        ))
        .route(named(
            "header",
            json!({"path_separated_prefix": "/a/b", "headers": [{"name": "x-k", "string_match": {"exact": "1"}}]}),
        ))
        .route(named(
            "query",
            json!({"path_separated_prefix": "/a/b", "query_parameters": [{"name": "q", "string_match": {"exact": "1"}}]}),
        ))
        .route(named("long", json!({"path_separated_prefix": "/a/b"})))
        .route(named("short", json!({"path_separated_prefix": "/a"})))
        .route(named("trailing", json!({"path_separated_prefix": "/t"})))
        .route(named("root", json!({"prefix": "/"})))
        .route(named("regex", json!({"safe_regex": {"regex": "/r[0-9]+"}})))
        .gets(&[
            ("exact before prefix", "/a/b"),
            ("longer prefix before shorter", "/a/b/c"),
            ("shorter prefix", "/a/c"),
            ("prefix is of segments", "/ab"),
            ("prefix with a slash at its end", "/t"),
            ("prefix with a slash at its end, below", "/t/x"),
            ("regex comes after the root prefix", "/r12"),
            ("root", "/z"),
            ("query", "/a/b/c?q=1"),
        ])
        .case(case("header before none", get("/a/b/c").header("x-k", "1")))
        .case(case("method before header", request("PUT", "/a/b/c").header("x-k", "1")))
}

/// What the cookie is called and lasts; its value is each proxy's own.
fn sessions() -> Scenario {
    let state = json!({"name": "envoy.http.stateful_session.cookie", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.http.stateful_session.cookie.v3.CookieBasedSessionState",
        "cookie": {"name": "s", "path": "/shop", "ttl": "60s"}}});
    scenario("gw-session")
        .pods(&[("v1", 3)])
        .http_route(
            "\
- matches: [{ path: { type: PathPrefix, value: /shop } }]
  sessionPersistence: { sessionName: s, absoluteTimeout: 60s, cookieConfig: { lifetimeType: Permanent } }
  backendRefs: [{ name: $NAME, port: 80 }]
",
        )
        .last_filter(
            "envoy.filters.http.stateful_session",
            "stateful_session.v3.StatefulSession",
            json!({"session_state": state}),
        )
        .route(on(json!({"path_separated_prefix": "/shop"})).to(""))
        .case(case("a session begins", get("/shop")))
        .case(case("beside the endpoint's cookies", get("/shop/x").script("h:set-cookie=a=1 h:set-cookie=b=2 200")))
        .case(case("whatever the endpoint answers", get("/shop/x").script("404")))
        .case(case("a cookie that names no endpoint", get("/shop/x").header("cookie", "x=1; s=\"bm9uZQ==\"")))
        .case(case("an empty cookie", get("/shop/x").header("cookie", "s=")))
}

fn filters() -> Scenario {
    let http = "\
- matches: [{ path: { type: PathPrefix, value: /req } }]
  filters: [{ type: RequestHeaderModifier, requestHeaderModifier: { set: [{ name: x-set, value: new }], add: [{ name: x-add, value: more }], remove: [x-gone] } }]
  backendRefs: [{ name: $NAME, port: 80 }]
- matches: [{ path: { type: PathPrefix, value: /prefix } }]
  filters: [{ type: URLRewrite, urlRewrite: { path: { type: ReplacePrefixMatch, replacePrefixMatch: /new } } }]
  backendRefs: [{ name: $NAME, port: 80 }]
- matches: [{ path: { type: PathPrefix, value: /strip } }]
  filters: [{ type: URLRewrite, urlRewrite: { path: { type: ReplacePrefixMatch, replacePrefixMatch: / } } }]
  backendRefs: [{ name: $NAME, port: 80 }]
- matches: [{ path: { type: PathPrefix, value: /full } }]
  filters: [{ type: URLRewrite, urlRewrite: { hostname: h.example, path: { type: ReplaceFullPath, replaceFullPath: /whole } } }]
  backendRefs: [{ name: $NAME, port: 80 }]
- matches: [{ path: { type: PathPrefix, value: /slow } }]
  timeouts: { request: 200ms }
  backendRefs: [{ name: $NAME, port: 80 }]
- matches: [{ path: { type: PathPrefix, value: /retry } }]
  retry: { codes: [503], attempts: 1 }
  backendRefs: [{ name: $NAME, port: 80 }]
- matches: [{ path: { type: PathPrefix, value: /mirror } }]
  filters: [{ type: RequestMirror, requestMirror: { backendRef: { name: $NAME, port: 80 } } }]
  backendRefs: [{ name: $NAME, port: 80 }]
";
    let separated = |path: &str| on(json!({"path_separated_prefix": path})).to("");
    let mut retries = retry(1, "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes");
    retries["retriable_status_codes"] = json!([503]);
    scenario("gw-filters")
        .http_route(http)
        .route(separated("/req").with(json!({"request_headers_to_add": [set("x-set", "new"),
            {"header": {"key": "x-add", "value": "more"}, "append_action": "APPEND_IF_EXISTS_OR_ADD"}], "request_headers_to_remove": ["x-gone"]})))
        .route(separated("/prefix").action(json!({"prefix_rewrite": "/new"})))
        .route(separated("/strip").action(json!({"regex_rewrite": {"pattern": {"regex": "^/strip(/?)(.*)"}, "substitution": "/\\2"}})))
        .route(separated("/full").action(json!({"host_rewrite_literal": "h.example", "regex_rewrite": {"pattern": {"regex": "/.*"}, "substitution": "/whole"}})))
        .route(separated("/slow").action(json!({"timeout": "0.2s"})))
        .route(separated("/retry").action(json!({"retry_policy": retries})))
        .route(separated("/mirror").action(json!({"request_mirror_policies": [{"cluster": cluster_name("gw-filters", ""), "trace_sampled": false,
            "runtime_fraction": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}}]})))
        .case(case("request headers", get("/req").header("x-set", "old").header("x-add", "one").header("x-gone", "1")))
        .case(case("timeout", get("/slow").script("delay=900 200")))
        .case(case("retry by code", get("/retry").script("503|200")))
        .case(case("retry by another code", get("/retry").script("502|200")))
        .case(case("mirror", get("/mirror")).arrivals(2))
        .gets(&[
            ("prefix replaced", "/prefix/x?q=1"),
            ("prefix replaced alone", "/prefix"),
            ("prefix replaced with a slash", "/prefix/"),
            ("prefix stripped", "/strip/x/y?z"),
            ("prefix stripped alone", "/strip"),
            ("whole path and host", "/full/x?q"),
            ("no rule", "/nothing"),
        ])
}

fn backends() -> Scenario {
    let http = "\
- matches: [{ path: { type: PathPrefix, value: /none } }]
- matches: [{ path: { type: PathPrefix, value: /missing } }]
  backendRefs: [{ name: nowhere, port: 80 }]
- matches: [{ path: { type: PathPrefix, value: /zero } }]
  backendRefs: [{ name: $NAME, port: 80, weight: 0 }]
- matches: [{ path: { type: PathPrefix, value: /half } }]
  backendRefs: [{ name: $NAME, port: 80, weight: 1 }, { name: nowhere, port: 80, weight: 1 }]
";
    let broken = |path: &str| on(json!({"path_separated_prefix": path})).respond(500, "");
    scenario("gw-backends")
        .http_route(http)
        .route(broken("/none"))
        .route(broken("/missing"))
        .route(broken("/zero"))
        .route(on(json!({"path_separated_prefix": "/half"})).to("").action(json!({"cluster": null, "cluster_not_found_response_code": "INTERNAL_SERVER_ERROR",
            "weighted_clusters": {"clusters": [{"name": cluster_name("gw-backends", ""), "weight": 1}, {"name": "outbound|80||nowhere", "weight": 1}]}})))
        .gets(&[("no backends", "/none"), ("backend that is not there", "/missing"), ("weights that sum to zero", "/zero")])
        .case(case("half of the backends are there", get("/half")).times(300).share("v1", 50.0, 12.0))
}

fn redirects() -> Scenario {
    let rule = |path: &str, redirect: &str| {
        format!(
            "- matches: [{{ path: {{ type: PathPrefix, value: {path} }} }}]\n  filters: [{{ type: RequestRedirect, requestRedirect: {{ {redirect} }} }}]\n"
        )
    };
    let http = [
        rule("/host", "hostname: n.example"),
        rule("/https", "scheme: https, statusCode: 301"),
        rule("/port", "port: 8443"),
        rule("/full", "path: { type: ReplaceFullPath, replaceFullPath: /to }"),
        rule("/pre", "path: { type: ReplacePrefixMatch, replacePrefixMatch: /new }"),
    ]
    .concat();
    let to = |path: &str, patch: Value| {
        let mut action = json!({"response_code": "FOUND"});
        crate::istiod::merge(&mut action, patch);
        on(json!({"path_separated_prefix": path})).redirect(action)
    };
    scenario("gw-redirect")
        .http_route(&http)
        .route(to("/host", json!({"host_redirect": "n.example"})))
        .route(to("/https", json!({"scheme_redirect": "https", "response_code": "MOVED_PERMANENTLY"})))
        .route(to("/port", json!({"port_redirect": 8443})))
        .route(to("/full", json!({"path_redirect": "/to"})))
        .route(to("/pre", json!({"prefix_rewrite": "/new"})))
        .gets(&[
            ("host", "/host/x?q=1"),
            ("scheme", "/https/x"),
            ("port", "/port/x"),
            ("whole path", "/full/x?q=1"),
            ("prefix", "/pre/x/y?q=1"),
            ("prefix alone", "/pre"),
        ])
}
