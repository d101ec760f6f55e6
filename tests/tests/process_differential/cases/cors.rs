//! CORS.
use serde_json::{Value, json};

use crate::case::{Req, Scenario, case, get, request, scenario};
use crate::istiod::{all as catch_all, prefix};

fn preflight(path: &str, origin: &str) -> Req {
    request("OPTIONS", path).header("origin", origin).header("access-control-request-method", "PUT")
}

pub fn all() -> Vec<Scenario> {
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let rule =
        |path: &str, policy: &str| format!("- match: [{{ uri: {{ prefix: {path} }} }}]\n  corsPolicy: {{ {policy} }}\n{to}");
    let full =
        "allowMethods: [GET, PUT], allowHeaders: [x-a, x-b], exposeHeaders: [x-e, x-f], maxAge: 24h, allowCredentials: true";
    let http = [
        rule("/full", &format!("allowOrigins: [{{ exact: 'https://a.example' }}, {{ prefix: 'https://p.' }}, {{ regex: 'https://r[0-9]+\\.example' }}], {full}")),
        rule("/ignore", &format!("allowOrigins: [{{ exact: 'https://a.example' }}], unmatchedPreflights: IGNORE, {full}")),
        rule("/any", "allowOrigins: [{ exact: '*' }], allowMethods: [GET]"),
        rule("/bare", "allowOrigins: [{ exact: 'https://a.example' }]"),
        format!("-{}", &to[1..]),
    ]
    .concat();
    let mut everything = json!({
        "allow_methods": "GET,PUT", "allow_headers": "x-a,x-b", "expose_headers": "x-e,x-f", "max_age": "86400",
        "allow_credentials": true, "forward_not_matching_preflights": true,
    });
    let with = |base: &mut Value, patch: Value| {
        let mut out = base.clone();
        crate::istiod::merge(&mut out, patch);
        out
    };
    let exact = json!([{"exact": "https://a.example"}]);
    vec![
        scenario("cors")
            .virtual_service(&http)
            .route(prefix("/full").to("").cors(with(&mut everything, json!({"allow_origin_string_match":
                [{"exact": "https://a.example"}, {"prefix": "https://p."}, {"safe_regex": {"regex": "https://r[0-9]+\\.example"}}]}))))
            .route(prefix("/ignore").to("").cors(with(&mut everything, json!({"allow_origin_string_match": exact,
                "forward_not_matching_preflights": false}))))
            .route(prefix("/any").to("").cors(json!({"allow_origin_string_match": [{"exact": "*"}], "allow_methods": "GET",
                "forward_not_matching_preflights": true})))
            .route(prefix("/bare").to("").cors(json!({"allow_origin_string_match": exact, "forward_not_matching_preflights": true})))
            .route(catch_all().to(""))
            .case(case("preflight", preflight("/full", "https://a.example")))
            .case(case("preflight, asking for headers", preflight("/full", "https://a.example").header("access-control-request-headers", "x-z")))
            .case(case("preflight, prefix", preflight("/full", "https://p.anything")))
            .case(case("preflight, regex", preflight("/full", "https://r12.example")))
            .case(case("preflight, regex is anchored", preflight("/full", "https://r12.example.evil")))
            .case(case("preflight of a stranger is forwarded", preflight("/full", "https://evil.example")))
            .case(case("preflight of a stranger is answered", preflight("/ignore", "https://evil.example")))
            .case(case("preflight, origin in capitals", preflight("/full", "HTTPS://A.EXAMPLE")))
            .case(case("preflight, any origin", preflight("/any", "https://whoever.example")))
            .case(case("preflight, nothing else allowed", preflight("/bare", "https://a.example")))
            .case(case("preflight by HTTP/2", preflight("/full", "https://a.example").h2()))
            .case(case("OPTIONS without a method asked for", request("OPTIONS", "/full").header("origin", "https://a.example")))
            .case(case("OPTIONS without an origin", request("OPTIONS", "/full").header("access-control-request-method", "PUT")))
            .case(case("simple", get("/full").header("origin", "https://a.example")))
            .case(case("simple, POST", request("POST", "/full").header("origin", "https://a.example").body(b"x")))
            .case(case("simple of a stranger", get("/full").header("origin", "https://evil.example")))
            .case(case("simple, any origin", get("/any").header("origin", "https://whoever.example")))
            .case(case("simple, nothing else allowed", get("/bare").header("origin", "https://a.example")))
            .case(case("no origin", get("/full")))
            .case(case("headers of the endpoint", get("/full").header("origin", "https://a.example")
                .script("h:access-control-allow-origin=* h:access-control-expose-headers=x-own 200")))
            .case(case("headers of the endpoint to a stranger", get("/full").header("origin", "https://evil.example")
                .script("h:access-control-allow-origin=* 200")))
            .case(case("an error of the endpoint", get("/full").header("origin", "https://a.example").script("500")))
            .case(case("our own error", get("/full").header("origin", "https://a.example").script("close")))
            .case(case("another route", get("/plain").header("origin", "https://a.example"))),
    ]
}
