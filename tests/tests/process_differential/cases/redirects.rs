//! Redirects and direct responses.
use serde_json::{Value, json};

use crate::case::{Scenario, case, get, request, scenario};
use crate::istiod::{on, prefix};

fn redirect(path: &str, action: Value) -> crate::istiod::Route {
    let mut base = json!({"response_code": "MOVED_PERMANENTLY"});
    crate::istiod::merge(&mut base, action);
    prefix(path).redirect(base)
}

pub fn all() -> Vec<Scenario> {
    vec![redirects(), responses()]
}

fn redirects() -> Scenario {
    let rule = |path: &str, redirect: &str| format!("- match: [{{ uri: {{ prefix: {path} }} }}]\n  redirect: {{ {redirect} }}\n");
    let http = [
        rule("/uri", "uri: /to"),
        rule("/host", "authority: n.example"),
        rule("/both", "uri: /to, authority: n.example"),
        rule("/https", "scheme: https"),
        rule("/port", "port: 8443"),
        rule("/p80", "port: 80"),
        rule("/sport", "scheme: https, port: 443"),
        rule("/derive", "authority: n.example, derivePort: FROM_REQUEST_PORT"),
        rule("/default", "scheme: https, derivePort: FROM_PROTOCOL_DEFAULT"),
        rule("/c302", "uri: /to, redirectCode: 302"),
        rule("/c303", "uri: /to, redirectCode: 303"),
        rule("/c307", "uri: /to, redirectCode: 307"),
        rule("/c308", "uri: /to, redirectCode: 308"),
        rule("/query", "uri: '/to?own=1'"),
    ]
    .concat();
    let code = |name: &str| json!({"path_redirect": "/to", "response_code": name});
    scenario("redirect")
        .virtual_service(&http)
        .route(redirect("/uri", json!({"path_redirect": "/to"})))
        .route(redirect("/host", json!({"host_redirect": "n.example"})))
        .route(redirect("/both", json!({"path_redirect": "/to", "host_redirect": "n.example"})))
        .route(redirect("/https", json!({"scheme_redirect": "https"})))
        .route(redirect("/port", json!({"port_redirect": 8443})))
        .route(redirect("/p80", json!({})))
        .route(redirect("/sport", json!({"scheme_redirect": "https"})))
        .route(redirect("/derive", json!({"host_redirect": "n.example"})))
        .route(redirect("/default", json!({"scheme_redirect": "https"})))
        .route(redirect("/c302", code("FOUND")))
        .route(redirect("/c303", code("SEE_OTHER")))
        .route(redirect("/c307", code("TEMPORARY_REDIRECT")))
        .route(redirect("/c308", code("PERMANENT_REDIRECT")))
        .route(redirect("/query", json!({"path_redirect": "/to?own=1"})))
        .gets(&[
            ("path", "/uri/x"),
            ("path keeps the query", "/uri/x?a=1"),
            ("path with a query of its own", "/query?a=1"),
            ("authority keeps the path", "/host/x?a=1"),
            ("path and authority", "/both/x"),
            ("scheme", "/https/x?a"),
            ("port", "/port/x"),
            ("default port is left out", "/p80/x"),
            ("default port of the new scheme is left out", "/sport/x"),
            ("port of the request", "/derive/x"),
            ("port of the protocol", "/default/x"),
            ("302", "/c302"),
            ("303", "/c303"),
            ("307", "/c307"),
            ("308", "/c308"),
        ])
        .case(case("host with a port", get("/uri/x").host("my.example:8080")))
        .case(case("scheme drops the old default port", get("/https/x").host("my.example:80")))
        .case(case("scheme keeps another port", get("/https/x").host("my.example:8080")))
        .case(case("authority drops the port", get("/host/x").host("my.example:8080")))
        .case(case("HEAD", request("HEAD", "/uri/x")))
        .case(case("POST with a body", request("POST", "/uri/x").body(b"hello")))
        .case(case("normalised path", get("/x/../https/./y")))
        .case(case("by HTTP/2", get("/https/x").h2()))
}

fn responses() -> Scenario {
    let rule =
        |path: &str, response: &str| format!("- match: [{{ uri: {{ exact: {path} }} }}]\n  directResponse: {{ {response} }}\n");
    let http = [
        rule("/text", "status: 200, body: { string: hello }"),
        rule("/none", "status: 204"),
        rule("/empty", "status: 418"),
        rule("/error", "status: 503, body: { string: 'down for a while' }"),
        rule("/bytes", "status: 200, body: { bytes: aGVsbG8= }"),
        format!(
            "{}  headers: {{ response: {{ set: {{ content-type: application/json, x-a: b }} }} }}\n",
            rule("/json", "status: 200, body: { string: '{}' }")
        ),
    ]
    .concat();
    let exact = |path: &str| on(json!({"path": path}));
    let set =
        |key: &str, value: &str| json!({"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"});
    scenario("respond")
        .virtual_service(&http)
        .route(exact("/text").respond(200, "hello"))
        .route(exact("/none").respond(204, ""))
        .route(exact("/empty").respond(418, ""))
        .route(exact("/error").respond(503, "down for a while"))
        .route(exact("/bytes").with(json!({"direct_response": {"status": 200, "body": {"inline_bytes": "aGVsbG8="}}})))
        .route(
            exact("/json")
                .respond(200, "{}")
                .with(json!({"response_headers_to_add": [set("content-type", "application/json"), set("x-a", "b")]})),
        )
        .gets(&[
            ("text", "/text"),
            ("nothing", "/none"),
            ("a status without a body", "/empty"),
            ("an error with a body", "/error"),
            ("bytes", "/bytes"),
            ("headers set", "/json"),
        ])
        .case(case("HEAD has the length and no body", request("HEAD", "/text")))
        .case(case("POST with a body", request("POST", "/text").body(b"some")))
        .case(case("two on one connection", get("/text")).then(get("/error")).one_connection())
        .case(
            case("POST and then another on one connection", request("POST", "/text").body(b"some"))
                .then(get("/text"))
                .one_connection(),
        )
        .case(case("by HTTP/2", get("/error").h2()))
        .case(case("to a gRPC call", crate::case::grpc("/error")))
}
