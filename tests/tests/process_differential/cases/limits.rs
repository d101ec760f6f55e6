//! Rate limits and largest bodies: TrafficPolicies and EnvoyFilters here, the filters they stand for at Envoy.
use serde_json::{Value, json};

use super::policies::{Rules, any, path, with_policy};
use crate::case::{At, Req, Scenario, case, get, grpc, request, scenario};
use crate::istiod::{all as catch_all, merge, on};

const RATE_LIMIT: [&str; 2] = ["envoy.filters.http.local_ratelimit", "local_ratelimit.v3.LocalRateLimit"];

/// So slow that no token comes back during a case.
fn bucket(tokens: u32) -> Value {
    json!({"max_tokens": tokens, "tokens_per_fill": tokens, "fill_interval": "36000s"})
}
/// As the reference mesh writes it.
fn limit(tokens: u32, patch: Value) -> Value {
    let always = json!({"default_value": {"numerator": 100, "denominator": "HUNDRED"}});
    let mut config = json!({
        "stat_prefix": "limit", "token_bucket": bucket(tokens), "filter_enabled": always, "filter_enforced": always,
        "enable_x_ratelimit_headers": "DRAFT_VERSION_03",
        "response_headers_to_add": [{"header": {"key": "x-local-rate-limit", "value": "true"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
    });
    merge(&mut config, patch);
    config
}
/// Descriptors by what one action makes of a request.
fn by(action: &Value, key: &str, tokens: u32) -> Value {
    json!({
        "rate_limits": [{"actions": [action]}],
        "descriptors": [{"entries": [{"key": key}], "token_bucket": bucket(tokens)}],
        "always_consume_default_token_bucket": false,
    })
}

impl Scenario {
    fn limited(self, at: At, config: Value) -> Self {
        let [name, kind] = RATE_LIMIT;
        self.envoy_filter(at, name, kind, config)
    }
}

/// Each refusal in a scenario of its own: its bucket is empty.
fn empty(name: &'static str, request: &Req) -> Scenario {
    let first = Req { pause: 0, ..get("/").header("x-first", "1") };
    scenario(name)
        .limited(At::First, limit(1, json!({})))
        .case(case("one passes, the next is refused", first).then(request.clone()))
}

fn by_filter() -> Vec<Scenario> {
    let header = |name: &str| json!({"request_headers": {"header_name": name, "descriptor_key": "it"}});
    let of = |client: &str| get("/").header("x-client", client);
    let preflight = || request("OPTIONS", "/").header("origin", "http://a").header("access-control-request-method", "PUT");
    let deny: Rules = vec![("to: [{ operation: { paths: [/no] } }]", path("/no"), any())];
    let denying = |name: &'static str| scenario(name);
    vec![
        scenario("limit")
            .limited(At::First, limit(3, json!({})))
            .case(case("three pass, the others are refused", get("/")).times(5)),
        empty("limit-head", &request("HEAD", "/")),
        empty("limit-post", &request("POST", "/").body(b"x")),
        empty("limit-h2", &get("/").h2()),
        empty("limit-grpc", &grpc("/s/m")),
        empty("limit-preflight", &preflight()),
        empty("limit-path", &get("/a/../b?x=1")),
        scenario("limit-status")
            .limited(
                At::First,
                limit(1, json!({"status": {"code": 503}, "enable_x_ratelimit_headers": "OFF", "response_headers_to_add": null})),
            )
            .case(case("another status and nothing else", get("/")).times(2)),
        scenario("limit-connection")
            .limited(At::First, limit(1, json!({})))
            .case(case("refused on a connection that goes on", get("/")).then(get("/")).then(get("/")).one_connection()),
        scenario("limit-at-once")
            .limited(At::First, limit(10, json!({})))
            .case(case("thirty at once", get("/")).times(30).at_once().tally()),
        scenario("limit-header")
            .limited(At::First, limit(100, by(&header("x-client"), "it", 1)))
            .case(case("each client has a bucket", of("a")).then(of("b")).then(of("a")).then(of("b")))
            .case(case("values that differ in case", of("c")).then(of("C")))
            .case(case("an empty value", of("")).then(of("")))
            .case(case("one with a query, one without", of("q")).then(get("/?x").header("x-client", "q")))
            .case(case("without the header", get("/")).times(2)),
        scenario("limit-two-values")
            .limited(At::First, limit(100, by(&header("x-client"), "it", 1)))
            .case(
                case("a header that comes twice", of("a").header("x-client", "b"))
                    .then(of("a").header("x-client", "b"))
                    .then(of("a,b")),
            ),
        scenario("limit-paths")
            .limited(At::First, limit(100, by(&header(":path"), "it", 1)))
            .case(case("each path has a bucket", get("/a")).then(get("/b")).then(get("/a")))
            .case(case("a path that is normalised", get("/x/../c")).then(get("/c")))
            .case(case("a path with a query", get("/d?x=1")).then(get("/d?x=2"))),
        scenario("limit-hosts")
            .limited(At::First, limit(100, by(&header(":authority"), "it", 1)))
            .case(case("each host has a bucket", get("/").host("a.example")).then(get("/").host("b.example")).then(get("/").host("a.example"))),
        scenario("limit-address")
            .limited(At::First, limit(100, by(&json!({"remote_address": {}}), "remote_address", 2)))
            .case(case("an address", get("/")).times(3)),
        scenario("limit-both")
            .limited(
                At::First,
                limit(
                    4,
                    json!({
                        "rate_limits": [{"actions": [header("x-client")]}],
                        "descriptors": [{"entries": [{"key": "it", "value": "bad"}], "token_bucket": bucket(1)}],
                    }),
                ),
            )
            .case(case("one of its own for a value", of("bad")).then(of("bad")).then(of("good")).then(of("good"))),
        with_policy(denying("limit-before-policy").limited(At::First, limit(2, json!({}))), "p", "DENY", deny.clone())
            .case(case("who is refused counts", get("/no")).then(get("/no")).then(get("/"))),
        with_policy(denying("limit-after-policy"), "p", "DENY", deny)
            .limited(At::Last, limit(1, json!({})))
            .case(case("who is refused does not count", get("/no")).then(get("/no")).then(get("/")).then(get("/"))),
        scenario("limit-after-cors")
            .virtual_service(
                "- corsPolicy: { allowOrigins: [{ exact: 'http://a' }], allowMethods: [PUT] }\n  route: [{ destination: { host: $HOST } }]\n",
            )
            .route(catch_all().to("").cors(json!({
                "allow_origin_string_match": [{"exact": "http://a"}], "allow_methods": "PUT", "forward_not_matching_preflights": true,
            })))
            .limited(At::Last, limit(1, json!({})))
            .case(
                case("a preflight does not count, a refusal has its headers", preflight())
                    .then(get("/").header("origin", "http://a"))
                    .then(get("/").header("origin", "http://a")),
            ),
        scenario("limit-no-endpoint")
            .pods(&[])
            .limited(At::First, limit(2, json!({})))
            .case(case("our own errors tell of the limit", get("/"))),
        scenario("limit-direct")
            .virtual_service("- directResponse: { status: 200, body: { string: here } }\n")
            .route(on(json!({"prefix": "/"})).respond(200, "here"))
            .limited(At::First, limit(1, json!({})))
            .case(case("direct responses count", get("/")).times(2)),
    ]
}

/// The object of ours.
fn by_policy() -> Vec<Scenario> {
    let rule = |more: &str| {
        format!(
            "  rateLimits:\n  - name: l\n    tokenBucket: {{ maxTokens: 1, tokensPerFill: 1, fillInterval: 10h }}\n    \
             response: {{ headers: {{ x-local-rate-limit: 'true' }} }}\n{more}"
        )
    };
    let [name, kind] = RATE_LIMIT;
    vec![
        scenario("limit-own-address")
            .traffic_policy(&rule("    key: [{ sourceIP: {} }]\n"))
            .filter(name, kind, limit(100, by(&json!({"remote_address": {}}), "remote_address", 1)))
            .case(case("by address", get("/")).times(2)),
        scenario("limit-own-header")
            .traffic_policy(&rule("    key: [{ header: x-client }]\n"))
            .last_filter(
                name,
                kind,
                limit(100, by(&json!({"request_headers": {"header_name": "x-client", "descriptor_key": "it"}}), "it", 1)),
            )
            .case(
                case("by header", get("/").header("x-client", "a"))
                    .then(get("/").header("x-client", "b"))
                    .then(get("/").header("x-client", "a")),
            ),
        scenario("limit-own-match")
            .traffic_policy(&rule("    match: { methods: [POST] }\n"))
            .last_filter(
                name,
                kind,
                limit(
                    100,
                    json!({
                        "rate_limits": [{"actions": [{"request_headers": {"header_name": ":method", "descriptor_key": "m"}}]}],
                        "descriptors": [{"entries": [{"key": "m", "value": "POST"}], "token_bucket": bucket(1)}],
                        "always_consume_default_token_bucket": false,
                    }),
                ),
            )
            .case(case("POST alone", request("POST", "/").body(b"x")).then(request("POST", "/").chunks(b"x"))),
    ]
}

fn bodies() -> Vec<Scenario> {
    let sized = |bytes: usize| vec![b'b'; bytes];
    let post = || request("POST", "/");
    let buffer = |scenario: Scenario| {
        scenario.envoy_filter(At::Last, "envoy.filters.http.buffer", "buffer.v3.Buffer", json!({"max_request_bytes": 1000}))
    };
    vec![
        buffer(scenario("buffer"))
            .gets(&[("no body", "/")])
            .case(case("HEAD", request("HEAD", "/")))
            .case(case("a small body", post().body(&sized(10))))
            .case(case("as much as there may be", post().body(&sized(1000))))
            .case(case("one byte more", post().body(&sized(1001))))
            .case(case("far too much", post().body(&sized(100_000))))
            .case(case("small, in chunks", post().chunks(&sized(10))))
            .case(case("too much, in chunks", post().chunks(&sized(1001))))
            .case(case("small by HTTP/2", post().body(&sized(10)).h2()))
            .case(case("too much by HTTP/2", post().body(&sized(1001)).h2()))
            .case(case("a call", grpc("/s/m")))
            .case(case("a connection that goes on", post().body(&sized(10))).then(get("/")).one_connection()),
        buffer(
            scenario("buffer-retry")
                .virtual_service("- retries: { attempts: 2, retryOn: 5xx }\n  route: [{ destination: { host: $HOST } }]\n"),
        )
        .route(catch_all().to("").action(json!({"retry_policy": crate::istiod::retry(2, "5xx")})))
        .case(case("sent again", post().body(&sized(900)).script("503|200"))),
    ]
}

pub fn all() -> Vec<Scenario> {
    [by_filter(), by_policy(), bodies()].concat()
}
