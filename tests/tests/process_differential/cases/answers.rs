//! What is done with answers: headers, CORS of a policy, compression.
use serde_json::{Value, json};

use super::policies::{Rules, any, path, with_policy};
use crate::case::{At, Req, Scenario, case, get, grpc, request, scenario};
use crate::istiod::{Route, all as catch_all, on, prefix};

fn added(key: &str, value: &str, action: &str) -> Value {
    json!({"append": {"header": {"key": key, "value": value}, "append_action": action}})
}
/// The headers of the reference mesh, one that is added, one that goes.
fn mutations() -> Value {
    json!({"mutations": {"response_mutations": [
        added("x-frame-options", "DENY", "OVERWRITE_IF_EXISTS_OR_ADD"),
        added("strict-transport-security", "max-age=31536000; includeSubDomains", "OVERWRITE_IF_EXISTS_OR_ADD"),
        added("x-added", "once more", "APPEND_IF_EXISTS_OR_ADD"),
        {"remove": "x-powered-by"},
    ]}})
}
const MUTATION: [&str; 2] = ["envoy.filters.http.header_mutation", "header_mutation.v3.HeaderMutation"];

/// Whoever made the answer, it has them.
fn dressed(scenario: Scenario) -> Scenario {
    let deny: Rules = vec![("to: [{ operation: { paths: [/no] } }]", path("/no"), any())];
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let http = format!(
        "- match: [{{ uri: {{ exact: /moved }} }}]\n  redirect: {{ uri: /there }}\n\
         - match: [{{ uri: {{ exact: /direct }} }}]\n  directResponse: {{ status: 418, body: {{ string: here }} }}\n\
         - match: [{{ uri: {{ prefix: /route }} }}]\n  headers: {{ response: {{ set: {{ x-frame-options: ROUTE, x-route: 'yes' }}, add: {{ x-added: route }} }} }}\n{to}-{}",
        &to[1..]
    );
    let add = |key: &str, value: &str, action: &str| json!({"header": {"key": key, "value": value}, "append_action": action});
    with_policy(scenario, "p", "DENY", deny)
        .virtual_service(&http)
        .route(on(json!({"path": "/moved"})).redirect(json!({"path_redirect": "/there"})))
        .route(on(json!({"path": "/direct"})).respond(418, "here"))
        .route(prefix("/route").to("").with(json!({"response_headers_to_add": [
            add("x-frame-options", "ROUTE", "OVERWRITE_IF_EXISTS_OR_ADD"),
            add("x-route", "yes", "OVERWRITE_IF_EXISTS_OR_ADD"),
            add("x-added", "route", "APPEND_IF_EXISTS_OR_ADD"),
        ]})))
        .route(catch_all().to(""))
        .gets(&[
            ("of the endpoint", "/"),
            ("of a redirect", "/moved"),
            ("of a direct response", "/direct"),
            ("of a refusal", "/no"),
            ("after the route's own", "/route"),
        ])
        .case(case(
            "over the endpoint's own",
            get("/").script("h:x-frame-options=SAMEORIGIN h:x-added=here h:x-powered-by=php 200"),
        ))
        .case(case(
            "over two of the endpoint's own",
            get("/").script("h:x-frame-options=A h:x-frame-options=B h:x-powered-by=a h:x-powered-by=b 200"),
        ))
        .case(case("of an error of the endpoint", get("/").script("500")))
        .case(case("of our own error", get("/").script("close")))
        .case(case("of an answer without a body", get("/").script("204")))
        .case(case("of what did not change", get("/").script("304")))
        .case(case("of HEAD", request("HEAD", "/")))
        .case(case("by HTTP/2", get("/").h2()))
        .case(case("of a gRPC call that is refused", grpc("/no")))
}

fn headers() -> Vec<Scenario> {
    let [name, kind] = MUTATION;
    let lua = "function envoy_on_response(h)\n  h:headers():add(\"x-added\", \"by lua\")\n  h:headers():replace(\"server\", \"mine\")\n  \
               h:headers():remove(\"x-powered-by\")\nend\n";
    vec![
        dressed(scenario("dress").envoy_filter(At::First, name, kind, mutations())),
        dressed(
            scenario("dress-own")
                .traffic_policy(
                    "  responseHeaders:\n    set: { x-frame-options: DENY, strict-transport-security: 'max-age=31536000; includeSubDomains' }\n    \
                     add: { x-added: once more }\n    remove: [x-powered-by]\n",
                )
                .filter(name, kind, mutations()),
        ),
        scenario("dress-lua")
            .envoy_filter(At::First, "envoy.filters.http.lua", "lua.v3.Lua", json!({"default_source_code": {"inline_string": lua}}))
            .gets(&[("of the endpoint", "/")])
            .case(case("over the endpoint's own", get("/").script("h:x-added=here h:x-powered-by=php 200")))
            .case(case("of our own error", get("/").script("close"))),
        scenario("dress-cache")
            .traffic_policy("  cacheControl: [{ paths: ['/static/*'], value: 'public, max-age=60' }]\n")
            .route(prefix("/static/").to("").with(json!({"response_headers_to_add": [
                {"header": {"key": "cache-control", "value": "public, max-age=60"}, "append_action": "ADD_IF_ABSENT"},
            ]})))
            .route(catch_all().to(""))
            .gets(&[("another path", "/"), ("a path that is kept", "/static/a"), ("a path with a query", "/static/a?x=1")])
            .case(case("one that speaks for itself", get("/static/a").script("h:cache-control=no-store 200"))),
    ]
}

/// CORS that no route speaks of.
fn cors() -> Vec<Scenario> {
    let preflight =
        |origin: &str| request("OPTIONS", "/").header("origin", origin).header("access-control-request-method", "PUT");
    let simple = |origin: &str| get("/").header("origin", origin);
    let asked = |scenario: Scenario, good: &str| {
        scenario
            .case(case("preflight", preflight(good)))
            .case(case("preflight of a stranger", preflight("https://evil.test")))
            .case(case("preflight with an origin that only begins so", preflight(&format!("{good}.evil.test"))))
            .case(case("preflight of nowhere", preflight("null")))
            .case(case("simple", simple(good)))
            .case(case("simple of a stranger", simple("https://evil.test")))
            .case(case("none", get("/")))
    };
    let policy = |patch: Value| {
        let mut policy = json!({"allow_methods": "GET,PUT", "allow_headers": "x-a", "forward_not_matching_preflights": true});
        crate::istiod::merge(&mut policy, patch);
        policy
    };
    let own = |yaml: &str| format!("  cors:\n    allowMethods: [GET, PUT]\n    allowHeaders: [x-a]\n    {yaml}\n");
    let with = |name: &'static str, yaml: &str, route: Value| {
        scenario(name).traffic_policy(&own(yaml)).route(catch_all().to("").cors(policy(route)))
    };
    let exact = json!([{"exact": "https://a.example"}]);
    let gateway = |name: &'static str, cors: &str| {
        scenario(name).http_route(&format!(
            "- filters: [{{ type: CORS, cors: {{ {cors} }} }}]\n  backendRefs: [{{ name: $NAME, port: 80 }}]\n"
        ))
    };
    // istiod names routes of the Gateway API's default retry as any other.
    let to = |policy: Value| -> Route { catch_all().to("").cors(policy) };
    vec![
        asked(
            with("cors-own", "allowOrigins: [{ exact: 'https://a.example' }]", json!({"allow_origin_string_match": exact})),
            "https://a.example",
        ),
        asked(
            with(
                "cors-own-credentials",
                "allowOrigins: [{ exact: 'https://a.example' }]\n    allowCredentials: true\n    maxAge: 10m\n    exposeHeaders: [x-e]",
                json!({"allow_origin_string_match": exact, "allow_credentials": true, "max_age": "600", "expose_headers": "x-e"}),
            ),
            "https://a.example",
        ),
        asked(
            with(
                "cors-own-any",
                "allowOrigins: [{ exact: '*' }]\n    allowCredentials: true",
                json!({"allow_origin_string_match": [{"exact": "*"}], "allow_credentials": true}),
            ),
            "https://whoever.example",
        ),
        asked(
            with(
                "cors-own-regex",
                "allowOrigins: [{ regex: 'https://[a-z]+\\.example' }, { prefix: 'http://localhost:' }]",
                json!({"allow_origin_string_match": [{"safe_regex": {"regex": "https://[a-z]+\\.example"}}, {"prefix": "http://localhost:"}]}),
            ),
            "https://sub.example",
        )
        .case(case("preflight by prefix", preflight("http://localhost:3000"))),
        asked(
            scenario("cors-patch")
                .object(&vhost_patch(&json!({"typed_per_filter_config": {"envoy.filters.http.cors": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
                    "allow_origin_string_match": [{"suffix": ".example"}], "allow_methods": "GET,PUT", "allow_headers": "x-a",
                    "allow_credentials": false, "forward_not_matching_preflights": false,
                }}})))
                .route(to(policy(json!({
                    "allow_origin_string_match": [{"suffix": ".example"}], "allow_credentials": false, "forward_not_matching_preflights": false,
                })))),
            "https://a.example",
        ),
        asked(
            gateway("cors-route", "allowOrigins: ['https://a.example'], allowMethods: [GET, PUT], allowHeaders: [x-a], allowCredentials: true, maxAge: 60")
                .route(to(policy(json!({"allow_origin_string_match": exact, "allow_credentials": true, "max_age": "60"})))),
            "https://a.example",
        ),
    ]
}
/// An EnvoyFilter that merges into the virtual host of the service.
pub fn vhost_patch(value: &Value) -> String {
    let patch = json!([{"applyTo": "VIRTUAL_HOST", "match": {"context": "SIDECAR_INBOUND"}, "patch": {"operation": "MERGE", "value": value}}]);
    format!(
        "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{ name: $NAME-patch, namespace: d }}\nspec:\n  \
         targetRefs: [{{ group: '', kind: Service, name: $NAME }}]\n  configPatches: {patch}\n"
    )
}

const COMPRESSOR: [&str; 2] = ["envoy.filters.http.compressor", "compressor.v3.Compressor"];
fn compressor(library: &str, kind: &str, direction: Value) -> Value {
    json!({
        "response_direction_config": direction,
        "compressor_library": {
            "name": library,
            "typed_config": {"@type": format!("type.googleapis.com/envoy.extensions.compression.{library}.compressor.v3.{kind}")},
        },
    })
}
fn page(accept: &str) -> Req {
    get("/").header("accept-encoding", accept).script("h:content-type=text/html size=200")
}
fn script(accept: &str, script: &str) -> Req {
    get("/").header("accept-encoding", accept).script(script)
}

fn compression() -> Vec<Scenario> {
    let [name, kind] = COMPRESSOR;
    let gzip = |direction: Value| compressor("gzip", "Gzip", direction);
    vec![
        scenario("compress")
            .envoy_filter(At::First, name, kind, gzip(json!({"common_config": {"min_content_length": 100}})))
            .case(case("a page", page("gzip")))
            .case(case("a page by HTTP/2", page("gzip").h2()))
            .case(case("nothing accepted", get("/").script("h:content-type=text/html size=200")))
            .case(case("another coding", page("br")))
            .case(case("any coding", page("*")))
            .case(case("any coding, but not this", page("gzip;q=0, *")))
            .case(case("weight nothing", page("gzip;q=0")))
            .case(case("some weight", page("br;q=1.0, gzip;q=0.5")))
            .case(case("rather as it is", page("identity, gzip;q=0.5")))
            .case(case("as it is alone", page("identity")))
            .case(case("in capitals", page("GZIP")))
            .case(case("the old name", page("x-gzip")))
            .case(case("two headers", page("br").header("accept-encoding", "gzip")))
            .case(case("as long as it must be", script("gzip", "h:content-type=text/html size=100")))
            .case(case("too short", script("gzip", "h:content-type=text/html size=99")))
            .case(case("of no length", script("gzip", "h:content-type=text/html size=10 chunked")))
            .case(case("a type with parameters", script("gzip", "h:content-type=text/html;charset=utf-8 size=200")))
            .case(case("a type in capitals", script("gzip", "h:content-type=Text/HTML size=200")))
            .case(case("an image", script("gzip", "h:content-type=image/png size=200")))
            .case(case("no type", script("gzip", "size=200")))
            .case(case("compressed already", script("gzip", "h:content-type=text/html h:content-encoding=br size=200")))
            .case(case("not to be changed", script("gzip", "h:content-type=text/html h:cache-control=no-transform size=200")))
            .case(case("a strong tag", script("gzip", "h:content-type=text/html h:etag=\"a\" size=200")))
            .case(case("a weak tag", script("gzip", "h:content-type=text/html h:etag=W/\"a\" size=200")))
            .case(case("varies by something", script("gzip", "h:content-type=text/html h:vary=origin size=200")))
            .case(case("varies by it", script("gzip", "h:content-type=text/html h:vary=Accept-Encoding size=200")))
            .case(case("varies by everything", script("gzip", "h:content-type=text/html h:vary=* size=200")))
            .case(case("ranges", script("gzip", "h:content-type=text/html h:accept-ranges=bytes size=200")))
            .case(case("a part", script("gzip", "206 h:content-type=text/html h:content-range=bytes_0-199/400 size=200")))
            .case(case("an error", script("gzip", "500 h:content-type=text/html size=200")))
            .case(case(
                "HEAD",
                request("HEAD", "/").header("accept-encoding", "gzip").script("h:content-type=text/html size=200"),
            ))
            .case(case("nothing there", script("gzip", "204 h:content-type=text/html")))
            .case(case("events", script("gzip", "h:content-type=text/event-stream size=200")))
            .case(case("cut off", script("gzip", "h:content-type=text/html size=1000 len=2000 last")))
            .case(case("our own answer", script("gzip", "close"))),
        scenario("compress-careful")
            .envoy_filter(
                At::First,
                name,
                kind,
                gzip(json!({
                    "common_config": {"content_type": ["application/json"]}, "disable_on_etag_header": true,
                    "remove_accept_encoding_header": true,
                })),
            )
            .case(case("a listed type", script("gzip", "h:content-type=application/json size=200")))
            .case(case("a type that is not listed", script("gzip", "h:content-type=text/html size=200")))
            .case(case("a strong tag", script("gzip", "h:content-type=application/json h:etag=\"a\" size=200")))
            .case(case("a weak tag", script("gzip", "h:content-type=application/json h:etag=W/\"a\" size=200"))),
        scenario("compress-brotli")
            .envoy_filter(At::First, name, kind, compressor("brotli", "Brotli", json!({})))
            .case(case("a page", page("gzip, br")))
            .case(case("not accepted", page("gzip"))),
        scenario("compress-zstd")
            .envoy_filter(At::First, name, kind, compressor("zstd", "Zstd", json!({})))
            .case(case("a page", page("gzip, zstd"))),
        scenario("compress-own")
            .traffic_policy("  compression: { codings: [br, gzip], minBytes: 100 }\n")
            .filter("brotli", kind, compressor("brotli", "Brotli", json!({"common_config": {"min_content_length": 100}})))
            .filter("gzip", kind, gzip(json!({"common_config": {"min_content_length": 100}})))
            .case(case("both", page("gzip, br")))
            .case(case("both, the other way round", page("br, gzip")))
            .case(case("the second", page("gzip")))
            .case(case("the second by weight", page("gzip, br;q=0.5")))
            .case(case("neither", page("zstd"))),
    ]
}

pub fn all() -> Vec<Scenario> {
    [headers(), cors(), compression()].concat()
}
