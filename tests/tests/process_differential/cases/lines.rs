//! Lines of the access log and labels of metrics. Istio's filter that makes Envoy count `istio_requests_total` is not part of
//! the Envoy that can be had: its labels are compared with the fields of Envoy's log that they are made of, and labels of one's
//! own with the same expression in that log.
use serde_json::{Value, json};

use super::policies::{Rules, any, path, with_policy};
use crate::case::{Req, Scenario, case, get, grpc, raw, request, scenario};
use crate::istiod::{self, all as catch_all, on, prefix};

/// Routes of every kind, and a policy that refuses `/no`.
fn served(scenario: Scenario) -> Scenario {
    let deny: Rules = vec![("to: [{ operation: { paths: [/no] } }]", path("/no"), any())];
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let http = format!(
        "- name: moved\n  match: [{{ uri: {{ exact: /moved }} }}]\n  redirect: {{ uri: /there }}\n\
         - name: direct\n  match: [{{ uri: {{ exact: /direct }} }}]\n  directResponse: {{ status: 418, body: {{ string: here }} }}\n\
         - name: rewritten\n  match: [{{ uri: {{ prefix: /old }} }}]\n  rewrite: {{ uri: /new }}\n{to}\
         - name: aborted\n  match: [{{ uri: {{ exact: /abort }} }}]\n  fault: {{ abort: {{ percentage: {{ value: 100 }}, httpStatus: 555 }} }}\n{to}\
         - name: again\n  match: [{{ uri: {{ prefix: /again }} }}]\n  retries: {{ attempts: 2, retryOn: 5xx }}\n{to}\
         - name: impatient\n  match: [{{ uri: {{ exact: /slow }} }}]\n  timeout: 60ms\n{to}\
         - name: usual\n{to}"
    );
    let named = |name: &str| json!({"name": name});
    with_policy(scenario, "p", "DENY", deny)
        .virtual_service(&http)
        .route(on(json!({"path": "/moved"})).redirect(json!({"path_redirect": "/there"})).with(named("moved")))
        .route(on(json!({"path": "/direct"})).respond(418, "here").with(named("direct")))
        .route(prefix("/old").to("").action(json!({"prefix_rewrite": "/new"})).with(named("rewritten")))
        .route(
            on(json!({"path": "/abort"}))
                .to("")
                .fault(json!({"abort": {"http_status": 555, "percentage": {"numerator": 100}}}))
                .with(named("aborted")),
        )
        .route(prefix("/again").to("").action(json!({"retry_policy": istiod::retry(2, "5xx")})).with(named("again")))
        .route(on(json!({"path": "/slow"})).to("").action(json!({"timeout": "0.06s"})).with(named("impatient")))
        .route(catch_all().to("").with(named("usual")))
}
/// One request of every fate.
fn fates(scenario: Scenario) -> Scenario {
    scenario
        .gets(&[
            ("served", "/a/b?c=d"),
            ("refused by a policy", "/no"),
            ("redirected", "/moved?x=1"),
            ("answered directly", "/direct"),
            ("rewritten", "/old/a?b=c"),
            ("aborted", "/abort"),
        ])
        .case(case("POST", request("POST", "/p").body(b"0123456789").script("201 body=made")))
        .case(case("in chunks", request("PUT", "/p").chunks(b"0123456789").script("chunked size=100")))
        .case(case("HEAD", request("HEAD", "/h")))
        .case(case("by HTTP/2", get("/2").h2()))
        .case(case("a gRPC call", grpc("/s/m").script("gdata=0")))
        .case(case("a gRPC call that fails", grpc("/s/m").script("grpc=5")))
        .case(case("an error of the endpoint", get("/").script("503")))
        .case(case("an endpoint that hangs up", get("/").script("close")))
        .case(case("tried again", get("/again").script("500|200")))
        .case(case("tried in vain", get("/again").script("500")))
        .case(case("too slow", get("/slow").script("delay=300 200")).arrives_or_not())
        .case(case("an answer that is cut", get("/").script("size=10 len=20 last")))
}
/// With headers of every kind.
fn dressed(request: Req) -> Req {
    request
        .header("x-one", "1")
        .header("x-two", "a")
        .header("x-two", "b")
        .header("x-quoted", "say \"hi\" \\ back")
        .header("x-long", "abcdefghijklmnopqrstuvwxyz")
        .header("x-empty", "")
        .header("user-agent", "suite/1.0")
        .header("referer", "http://from.example/")
        .script("h:x-out=o h:x-more=1 h:x-more=2 h:content-type=text/plain 200")
}

/// Istio's own formats, but for what no two runs have in common.
fn usual() -> Vec<Scenario> {
    let text = "\"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% \
                %CONNECTION_TERMINATION_DETAILS% \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% \
                \"%REQ(USER-AGENT)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %REQUESTED_SERVER_NAME% %ROUTE_NAME%";
    let keys = [
        ("route_name", "%ROUTE_NAME%"),
        ("method", "%REQ(:METHOD)%"),
        ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
        ("path_now", "%REQ(:PATH)%"),
        ("protocol", "%PROTOCOL%"),
        ("response_code", "%RESPONSE_CODE%"),
        ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
        ("bytes_received", "%BYTES_RECEIVED%"),
        ("bytes_sent", "%BYTES_SENT%"),
        ("user_agent", "%REQ(USER-AGENT)%"),
        ("authority", "%REQ(:AUTHORITY)%"),
        ("upstream_host", "%UPSTREAM_HOST%"),
        ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
        ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
        ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
        ("attempts", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"),
        ("grpc", "%GRPC_STATUS%"),
        ("grpc_number", "%GRPC_STATUS_NUMBER%"),
        ("scheme", "%REQ(:SCHEME)%"),
    ];
    let object: serde_json::Map<String, Value> = keys.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
    let lines = |scenario: Scenario| scenario.line(text.into(), None).line(object.clone().into(), None);
    let http2 = |scenario: Scenario| Scenario { port_name: "grpc", ..scenario };
    vec![
        fates(served(lines(scenario("lines")))),
        lines(scenario("lines-dead").pods(&[("dead", 1)])).gets(&[("nobody listens", "/")]),
        lines(scenario("lines-empty").pods(&[])).gets(&[("no endpoint", "/")]),
        http2(lines(scenario("lines-grpc")))
            .case(case("a call", grpc("/s/m").script("gdata=0")))
            .case(case("a call that fails at its end", grpc("/s/m").script("gdata=9")))
            .case(case("a call that fails at once", grpc("/s/m").script("grpc=5"))),
    ]
}

/// Operators with arguments.
fn operators() -> Vec<Scenario> {
    let text = "%REQ(X-ONE)% %REQ(x-two)% %REQ(X-ABSENT)% %REQ(X-ABSENT?X-ONE)% %REQ(X-ONE?X-TWO)% %REQ(X-LONG):5% [%REQ(X-QUOTED)%] \
                [%REQ(X-EMPTY)%] %RESP(X-OUT)% %RESP(X-MORE)% %RESP(X-ABSENT?X-OUT)% %RESP(:STATUS)% %TRAILER(GRPC-STATUS)% \
                %REQ_WITHOUT_QUERY(:PATH)% %START_TIME(%Y)% 100%% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS(NUMBER)% %UPSTREAM_REMOTE_PORT%";
    let object = json!({
        "text": "text", "number": "%RESPONSE_CODE%", "joined": "%RESPONSE_CODE% %PROTOCOL%", "absent": "%REQ(X-ABSENT)%",
        "absent_joined": "a %REQ(X-ABSENT)%", "quoted": "%REQ(X-QUOTED)%", "empty": "%REQ(X-EMPTY)%", "literal": 7, "truth": true,
        "nested": {"one": "%REQ(X-ONE)%", "deeper": {"sent": "%BYTES_SENT%"}}, "cut": "%REQ(X-LONG):3%",
        "number_of_header": "%REQ(X-ONE)%",
    });
    vec![
        Scenario { port_name: "grpc", ..scenario("line-operators-grpc").line(text.into(), None) }
            .case(case("a call with trailers", grpc("/s/m").script("gdata=7"))),
        served(scenario("line-operators").line(text.into(), None).line(object, None))
            .case(case("headers of every kind", dressed(get("/a?b=c"))))
            .case(case("by HTTP/2", dressed(get("/a?b=c")).h2()))
            .case(case("none of them", get("/")))
            .case(case("a call", grpc("/s/m")))
            .case(case("refused", dressed(get("/no?a"))))
            .case(case(
                "bytes of no known text",
                raw("GET / HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\nx-one: t\tab\r\nx-quoted: \u{e4}\u{1f600}\r\n\r\n"),
            )),
    ]
}

/// Expressions: in fields, in filters, as labels of metrics.
fn expressions() -> Vec<Scenario> {
    let field = |expression: &str| format!("%CEL({expression})%");
    let object = json!({
        "method": field("request.method"), "path": field("request.path"), "url_path": field("request.url_path"),
        "host": field("request.host"), "scheme": field("request.scheme"), "query": field("request.query"),
        "protocol": field("request.protocol"), "one": field("request.headers['x-one']"), "absent": field("request.headers['x-absent']"),
        "agent": field("request.useragent"), "referer": field("request.referer"), "size": field("request.size"),
        "code": field("response.code"), "details": field("response.code_details"), "flags": field("response.flags"),
        "out": field("response.headers['x-out']"), "response_size": field("response.size"),
        "server_name": field("connection.requested_server_name"), "upstream": field("upstream.port > 0"),
        "compared": field("response.code >= 400"),
        "chosen": field("response.code >= 500 ? 'bad' : 'good'"), "has": field("has(request.headers.foo)"),
        "starts": field("request.path.startsWith('/a')"), "matches": field("request.path.matches('^/[a-z]+$')"),
    });
    let filtered = |name: &'static str, expression: &'static str| {
        served(scenario(name).line("%RESPONSE_CODE%".into(), Some(expression)))
            .gets(&[("served", "/a"), ("refused", "/no"), ("answered directly", "/direct")])
            .case(case("an error of the endpoint", get("/").script("503")))
            .case(case("POST", request("POST", "/").body(b"x")))
    };
    vec![
        served(scenario("line-expressions").line(object, None))
            .case(case("headers of every kind", dressed(get("/a?b=c"))))
            .case(case("POST by HTTP/2", dressed(request("POST", "/a").body(b"0123")).h2()))
            .case(case("refused", dressed(get("/no"))))
            .case(case("an endpoint that hangs up", get("/").script("close")))
            .case(case("rewritten", get("/old/x?y")))
            .case(case("a call", grpc("/s/m").script("grpc=5"))),
        served(
            scenario("line-special")
                .line(field("response.grpc_status").into(), None)
                .line(field("request.method + ' ' + request.host").into(), None),
        )
        .gets(&[("no call", "/"), ("no call, refused", "/no")])
        .case(case("a call", grpc("/s/m").script("grpc=5")))
        .case(case("a call without a status", grpc("/s/m")))
        .case(case("a call, refused", grpc("/no"))),
        filtered("line-errors", "response.code >= 400"),
        filtered("line-posts", "request.method == 'POST' || request.url_path == '/a'"),
        filtered("line-flags", "response.flags != 0"),
        filtered("line-broken", "request.headers['x-absent'] == 'a'"),
        fates(served(
            scenario("tags")
                .tag("path", "request.url_path")
                .tag("method", "request.method")
                .tag("host", "request.host")
                .tag("one", "request.headers['x-one']")
                .tag("class", "response.code >= 400 ? 'bad' : 'good'")
                .tag("details", "response.code_details"),
        ))
        .case(case("with a header", dressed(get("/a")))),
    ]
}

pub fn all() -> Vec<Scenario> {
    [usual(), operators(), expressions()].concat()
}
