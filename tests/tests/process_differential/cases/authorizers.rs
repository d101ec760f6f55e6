//! CUSTOM policies: an authorizer asked over HTTP or gRPC. It is an endpoint of the suite like any other, which plays what `x-do-authz`
//! says; what it was asked counts among the arrivals.
use serde_json::{Value, json};

use super::policies::{Rules, any, path, policy, with_policy};
use crate::case::{Req, Scenario, case, get, grpc, request, scenario};
use crate::istiod::{self, cluster_name};

/// The service that is asked, and one nobody listens at.
const AUTHORIZER: &str = "authorizer";
/// See [`AUTHORIZER`].
const DEAD: &str = "authorizer-dead";

/// One that speaks gRPC.
const GRPC: &str = "authorizer-grpc";

/// What is asked with, always: the script, and by what the suite knows a request.
const SHOWN: [&str; 3] = ["x-do-authz", "x-request-id", "x-shown"];

fn names(list: &[&str]) -> Value {
    let exact: Vec<Value> = list.iter().map(|name| json!({"exact": name, "ignore_case": true})).collect();
    json!({"patterns": exact})
}

impl Scenario {
    /// A CUSTOM policy for `/ask*` with this provider; `filter`: the filter istiod makes of it beside what all have.
    fn asks(mut self, service: &str, provider: Value, filter: Value) -> Self {
        let host = crate::case::host(service);
        let name = format!("ask-{}", self.name);
        let mut own = json!({"service": host, "port": 80, "includeRequestHeadersInCheck": SHOWN});
        istiod::merge(&mut own, provider);
        self.providers.push(json!({"name": name, "envoyExtAuthzHttp": own}));
        let mut config = json!({
            "http_service": {"server_uri": {"uri": format!("http://{host}"), "cluster": cluster_name(service, ""), "timeout": "600s"}},
            "allowed_headers": names(&SHOWN),
        });
        istiod::merge(&mut config, filter);
        self.asking(&name, config)
    }
    /// The same over gRPC.
    fn asks_grpc(mut self, service: &str, provider: Value, filter: Value) -> Self {
        let name = format!("ask-{}", self.name);
        let mut own = json!({"service": crate::case::host(service), "port": 80});
        istiod::merge(&mut own, provider);
        self.providers.push(json!({"name": name, "envoyExtAuthzGrpc": own}));
        let mut config = json!({"grpc_service": {"envoy_grpc": {"cluster_name": cluster_name(service, ""), "authority": crate::case::host(service)}, "timeout": "600s"}});
        istiod::merge(&mut config, filter);
        self.asking(&name, config)
    }
    /// The policy, and what istiod makes of it: a shadow rule that says whether to ask, and the filter that asks.
    fn asking(self, provider: &str, filter: Value) -> Self {
        let rule = format!("istio-ext-authz-ns[d]-policy[{}-ask]-rule[0]", self.name);
        let shadow = json!({
            "shadow_rules": {
                "action": "DENY",
                "policies": {rule: {"permissions": [path("/ask*")], "principals": [any()]}},
            },
            "shadow_rules_stat_prefix": "istio_ext_authz_",
        });
        let mut config = json!({
            "filter_enabled_metadata": {
                "filter": "envoy.filters.http.rbac",
                "path": [{"key": "istio_ext_authz_shadow_effective_policy_id"}],
                "value": {"string_match": {"prefix": "istio-ext-authz"}},
            },
            "transport_api_version": "V3",
        });
        istiod::merge(&mut config, filter);
        let custom = policy(
            "ask",
            &format!("CUSTOM\n  provider: {{ name: {provider} }}"),
            &["to: [{ operation: { paths: ['/ask*'] } }]".into()],
        );
        self.object(&custom).filter("envoy.filters.http.rbac", "rbac.v3.RBAC", shadow).filter(
            "envoy.filters.http.ext_authz",
            "ext_authz.v3.ExtAuthz",
            config,
        )
    }
}

/// With what the authorizer does.
fn told(request: Req, script: &str) -> Req {
    request.header("x-do-authz", script)
}

fn usual() -> Scenario {
    let ask = |script: &str| told(get("/ask?x=1"), script);
    scenario("ask")
        .asks(AUTHORIZER, json!({}), json!({}))
        .gets(&[("not asked", "/free"), ("by dot segments", "/free/../ask")])
        .case(case("agreed", ask("200")))
        .case(case("agreed with a body", ask("200 body=welcome")))
        .case(case("agreed with another status", ask("204")))
        .case(case("agreed, headers that nobody asked for", ask("200 h:x-user=ann h:x-welcome=yes")))
        .case(case("refused", ask("403")))
        .case(case(
            "refused with a body and headers",
            ask("401 body=who? h:www-authenticate=Basic h:x-why=nobody h:content-type=text/html"),
        ))
        .case(case("refused with two headers of a name", ask("403 h:x-why=a h:x-why=b")))
        .case(case("redirected", ask("302 h:location=http://login.example/")))
        .case(case("not found", ask("404")))
        .case(case("too many", ask("429 h:retry-after=5")))
        .case(case("the authorizer fails", ask("500 body=oops")))
        .case(case("the authorizer is overloaded", ask("503")))
        .case(case("the authorizer hangs up", ask("close")))
        .case(case("the authorizer speaks no HTTP", ask("garbage")))
        .case(case("POST", told(request("POST", "/ask").body(b"body"), "200")))
        .case(case("POST, refused", told(request("POST", "/ask").body(b"body"), "403")))
        .case(case("HEAD, refused", told(request("HEAD", "/ask"), "403 body=no")))
        .case(case("by HTTP/2", told(get("/ask").h2(), "200")))
        .case(case("by HTTP/2, refused", told(get("/ask").h2(), "403 body=no")))
        .case(case("a gRPC call, refused", told(grpc("/ask/m"), "403 body=no")))
        .case(case(
            "what is shown",
            told(
                get("/ask")
                    .header("x-shown", "1")
                    .header("x-hidden", "2")
                    .header("authorization", "Basic YTpi")
                    .header("cookie", "a=b"),
                "200",
            ),
        ))
        .case(case("a header that comes twice", told(get("/ask").header("x-shown", "1").header("x-shown", "2"), "200")))
        .case(case("a path that is normalised", told(get("/ask/a/../b//c"), "200")))
        .case(case("two on one connection", told(get("/ask"), "403")).then(told(get("/ask"), "200")).one_connection())
}

fn headers() -> Scenario {
    let provider = json!({
        "pathPrefix": "/check", "includeAdditionalHeadersInCheck": {"x-from": "mesh", "x-shown": "ours"},
        "headersToUpstreamOnAllow": ["x-user", "x-shown"], "headersToDownstreamOnDeny": ["x-why", "set-cookie"],
        "headersToDownstreamOnAllow": ["x-welcome"], "statusOnError": "502",
    });
    let filter = json!({
        "http_service": {
            "path_prefix": "/check",
            "authorization_request": {"headers_to_add": [{"key": "x-from", "value": "mesh"}, {"key": "x-shown", "value": "ours"}]},
            "authorization_response": {
                "allowed_upstream_headers": names(&["x-user", "x-shown"]), "allowed_client_headers": names(&["x-why", "set-cookie"]),
                "allowed_client_headers_on_success": names(&["x-welcome"]),
            },
        },
        "status_on_error": {"code": 502},
    });
    let ask = |script: &str| told(get("/ask?x=1").header("x-shown", "theirs").header("x-user", "spoofed"), script);
    scenario("ask-headers")
        .asks(AUTHORIZER, provider, filter)
        .case(case("agreed", ask("200 h:x-user=ann h:x-other=1 h:x-welcome=yes")))
        .case(case("agreed, a header twice", ask("200 h:x-user=ann h:x-user=bob")))
        .case(case("agreed, nothing told", ask("200")))
        .case(case("agreed, over the endpoint's own", ask("200 h:x-welcome=yes").script("h:x-welcome=mine 200")))
        .case(case("refused", ask("403 body=no h:x-why=because h:x-other=1 h:set-cookie=a=b")))
        .case(case("the authorizer fails", ask("500")))
        .case(case("not asked", told(get("/free").header("x-user", "spoofed"), "403")))
}

fn failing() -> Vec<Scenario> {
    let slow = json!({"http_service": {"server_uri": {"timeout": "0.1s"}}});
    vec![
        scenario("ask-slow")
            .asks(AUTHORIZER, json!({"timeout": "0.1s"}), slow)
            .case(case("no answer in time", told(get("/ask"), "delay=600 200"))),
        scenario("ask-dead").asks(DEAD, json!({}), json!({})).gets(&[("nobody there", "/ask"), ("not asked", "/free")]),
        scenario("ask-dead-status")
            .asks(DEAD, json!({"statusOnError": "503"}), json!({"status_on_error": {"code": 503}}))
            .gets(&[("nobody there", "/ask")])
            .case(case("nobody there, gRPC", grpc("/ask/m"))),
        scenario("ask-open")
            .asks(DEAD, json!({"failOpen": true}), json!({"failure_mode_allow": true}))
            .gets(&[("nobody there", "/ask")]),
        scenario("ask-open-fails")
            .asks(AUTHORIZER, json!({"failOpen": true}), json!({"failure_mode_allow": true}))
            .case(case("the authorizer fails", told(get("/ask"), "500")))
            .case(case("the authorizer refuses", told(get("/ask"), "403"))),
    ]
}

fn bodies() -> Vec<Scenario> {
    let with = |name: &'static str, partial: bool| {
        scenario(name).asks(
            AUTHORIZER,
            json!({"includeRequestBodyInCheck": {"maxRequestBytes": 10, "allowPartialMessage": partial}}),
            json!({"with_request_body": {"max_request_bytes": 10, "allow_partial_message": partial}}),
        )
    };
    let post = |body: &[u8]| told(request("POST", "/ask").body(body), "200");
    vec![
        with("ask-body", true)
            .case(case("no body", told(get("/ask"), "200")))
            .case(case("a small body", post(b"small")))
            .case(case("more than is shown", post(b"more than ten bytes")))
            .case(case("in chunks", told(request("POST", "/ask").chunks(b"small"), "200")))
            .case(case("not asked", request("POST", "/free").body(b"more than ten bytes"))),
        with("ask-body-whole", false)
            .case(case("a small body", post(b"small")))
            .case(case("exactly as much", post(b"0123456789")))
            .case(case("more than is shown", post(b"more than ten bytes"))),
    ]
}

/// Asked before all else is judged.
fn order() -> Scenario {
    let deny: Rules = vec![("to: [{ operation: { paths: ['/ask/no'] } }]", path("/ask/no"), any())];
    let allow: Rules = vec![("to: [{ operation: { paths: ['/ask', '/ask/no'] } }]", either(&["/ask", "/ask/no"]), any())];
    let asking = scenario("ask-first").asks(AUTHORIZER, json!({}), json!({}));
    with_policy(with_policy(asking, "no", "DENY", deny), "yes", "ALLOW", allow)
        .case(case("agreed and allowed", told(get("/ask"), "200")))
        .case(case("refused, though allowed", told(get("/ask"), "403")))
        .case(case("agreed, but denied", told(get("/ask/no"), "200")))
        .case(case("refused and denied", told(get("/ask/no"), "401")))
        .case(case("agreed, but not allowed", told(get("/ask/other"), "200")))
        .case(case(
            "a preflight",
            told(request("OPTIONS", "/ask").header("origin", "http://a").header("access-control-request-method", "PUT"), "403"),
        ))
}
fn either(paths: &[&str]) -> Value {
    super::policies::or(&paths.iter().map(|p| path(p)).collect::<Vec<_>>())
}

fn over_grpc() -> Vec<Scenario> {
    // The script is that of the request in question.
    let ask = |script: &str| get("/ask?x=1").header("x-user", "spoofed").script(script);
    let post = |body: &[u8]| request("POST", "/ask").body(body);
    let shown = |name: &'static str, more: Value| {
        let limit = json!({"maxRequestBytes": 10, "allowPartialMessage": true});
        let theirs = json!({"max_request_bytes": 10, "allow_partial_message": true});
        let (mut ours, mut envoy) = (json!({"includeRequestBodyInCheck": limit}), json!({"with_request_body": theirs}));
        istiod::merge(&mut ours["includeRequestBodyInCheck"], more.clone());
        if let Some(bytes) = more.get("packAsBytes") {
            envoy["with_request_body"]["pack_as_bytes"] = bytes.clone();
        }
        scenario(name).asks_grpc(GRPC, ours, envoy)
    };
    vec![
        scenario(GRPC).port("grpc").pods(&[("authz", 1)]).case(case("the authorizer itself", grpc("/m").script("gdata=0"))),
        scenario("ask-grpc")
            .asks_grpc(GRPC, json!({}), json!({}))
            .gets(&[("not asked", "/free"), ("by dot segments", "/free/../ask")])
            .case(case("agreed", ask("200")))
            .case(case("agreed, with headers", ask("200 h:x-user=ann h:x-new=1")))
            .case(case("refused", ask("403")))
            .case(case("refused, with a body and headers", ask("401 body=who? h:x-why=nobody h:www-authenticate=Basic")))
            .case(case("redirected", ask("302 h:location=http://login.example/")))
            .case(case("the call fails", ask("grpc=14")))
            .case(case("the call is no success", ask("grpc=7")))
            .case(case("the call is reset", ask("reset")))
            .case(case("POST", post(b"body")))
            .case(case("HEAD, refused", request("HEAD", "/ask").script("403 body=no")))
            .case(case("by HTTP/2", get("/ask").h2()))
            .case(case("a gRPC call", grpc("/ask/m").script("200 gdata=0")))
            .case(case("a gRPC call, refused", grpc("/ask/m").script("403 body=no")))
            .case(case("a header that comes twice", get("/ask").header("x-a", "1").header("x-a", "2")))
            .case(case("a path that is normalised", get("/ask/a/../b//c?y=1")))
            .case(case("another host", get("/ask").host("other.example:81"))),
        shown("ask-grpc-body", json!({}))
            .case(case("no body", get("/ask")))
            .case(case("a small body", post(b"small")))
            .case(case("more than is shown", post(b"more than ten bytes"))),
        shown("ask-grpc-bytes", json!({"packAsBytes": true})).case(case("a small body", post(b"small"))),
        scenario("ask-grpc-slow")
            .asks_grpc(GRPC, json!({"timeout": "0.1s"}), json!({"grpc_service": {"timeout": "0.1s"}}))
            .case(case("no answer in time", ask("delay=600 200"))),
        scenario("ask-grpc-dead").asks_grpc(DEAD, json!({}), json!({})).gets(&[("nobody there", "/ask")]),
        scenario("ask-grpc-dead-status")
            .asks_grpc(DEAD, json!({"statusOnError": "503"}), json!({"status_on_error": {"code": 503}}))
            .gets(&[("nobody there", "/ask")]),
        scenario("ask-grpc-open")
            .asks_grpc(GRPC, json!({"failOpen": true}), json!({"failure_mode_allow": true}))
            .case(case("the call fails", ask("grpc=14")))
            .case(case("refused", ask("403"))),
    ]
}

pub fn all() -> Vec<Scenario> {
    let there = vec![
        scenario(AUTHORIZER).pods(&[("authz", 1)]).gets(&[("the authorizer itself", "/")]),
        scenario(DEAD).pods(&[("dead", 1)]),
        usual(),
        headers(),
        order(),
    ];
    [there, failing(), bodies(), over_grpc()].concat()
}
