//! Header edits of a route and of a destination.
use serde_json::{Value, json};

use crate::case::{Scenario, case, get, request, scenario};
use crate::istiod::{all as catch_all, prefix};

fn set(key: &str, value: &str) -> Value {
    json!({"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"})
}
fn add(key: &str, value: &str) -> Value {
    json!({"header": {"key": key, "value": value}, "append_action": "APPEND_IF_EXISTS_OR_ADD"})
}
fn edited() -> Value {
    json!({"response_headers_to_add": [set("x-set", "new")]})
}

pub fn all() -> Vec<Scenario> {
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let http = [
        format!("- match: [{{ uri: {{ prefix: /req }} }}]\n  headers: {{ request: {{ set: {{ x-set: new }}, add: {{ x-add: more }}, remove: [x-gone, x-never] }} }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /resp }} }}]\n  headers: {{ response: {{ set: {{ x-set: new, server: mine }}, add: {{ x-add: more }}, remove: [x-gone] }} }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /fault }} }}]\n  headers: {{ response: {{ set: {{ x-set: new }} }} }}\n  fault: {{ abort: {{ httpStatus: 418, percentage: {{ value: 100 }} }} }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /slow }} }}]\n  headers: {{ response: {{ set: {{ x-set: new }} }} }}\n  timeout: 100ms\n{to}"),
        "- match: [{ uri: { prefix: /nowhere } }]\n  headers: { response: { set: { x-set: new } } }\n  route: [{ destination: { host: nowhere.d.svc.cluster.local } }]\n".into(),
        format!("- match: [{{ uri: {{ prefix: /cors }} }}]\n  headers: {{ response: {{ set: {{ x-set: new }} }} }}\n  corsPolicy: {{ allowOrigins: [{{ exact: 'http://a' }}], allowMethods: [GET] }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /hostset }} }}]\n  headers: {{ request: {{ set: {{ Host: h.example }} }} }}\n{to}"),
        "- match: [{ uri: { prefix: /dest } }]\n  headers: { request: { add: { x-order: route }, set: { x-who: route } }, response: { add: { x-order: route } } }\n  \
         route: [{ destination: { host: $HOST, subset: v1 }, weight: 100, headers: { request: { add: { x-order: dest }, set: { x-who: dest } }, response: { add: { x-order: dest } } } }, { destination: { host: $HOST, subset: v1 }, weight: 100, headers: { request: { add: { x-order: dest }, set: { x-who: dest } }, response: { add: { x-order: dest } } } }]\n"
            .into(),
        "- match: [{ uri: { prefix: /single } }]\n  headers: { request: { add: { x-order: route }, set: { x-who: route } }, response: { add: { x-order: route } } }\n  \
         route: [{ destination: { host: $HOST, subset: v1 }, headers: { request: { add: { x-order: dest }, set: { x-who: dest } }, response: { add: { x-order: dest } } } }]\n"
            .into(),
        format!("-{}", &to[1..]),
    ]
    .concat();
    vec![
        scenario("headers")
            .virtual_service(&http)
            .destination_rule("")
            .route(prefix("/req").to("").with(json!({"request_headers_to_add": [set("x-set", "new"), add("x-add", "more")],
                "request_headers_to_remove": ["x-gone", "x-never"]})))
            .route(prefix("/resp").to("").with(json!({"response_headers_to_add": [set("x-set", "new"), set("server", "mine"), add("x-add", "more")],
                "response_headers_to_remove": ["x-gone"]})))
            .route(prefix("/fault").to("").with(edited()).fault(json!({"abort": {"http_status": 418, "percentage": {"numerator": 100}}})))
            .route(prefix("/slow").to("").with(edited()).action(json!({"timeout": "0.1s"})))
            .route(prefix("/nowhere").to("").with(edited()).action(json!({"cluster": "outbound|80||nowhere.d.svc.cluster.local"})))
            .route(prefix("/cors").to("").with(edited()).cors(json!({"allow_origin_string_match": [{"exact": "http://a"}], "allow_methods": "GET",
                "filter_enabled": {"default_value": {"numerator": 100}}})))
            .route(prefix("/hostset").to("").action(json!({"host_rewrite_literal": "h.example"})))
            .route(prefix("/dest").weighted(&[("v1", 100), ("v1", 100)]).with(json!({
                "request_headers_to_add": [add("x-order", "route"), set("x-who", "route")],
                "response_headers_to_add": [add("x-order", "route")]}))
                .each_cluster(json!({"request_headers_to_add": [add("x-order", "dest"), set("x-who", "dest")],
                    "response_headers_to_add": [add("x-order", "dest")]})))
            .route(prefix("/single").to("v1").with(json!({
                "request_headers_to_add": [add("x-order", "route"), set("x-who", "route"), add("x-order", "dest"), set("x-who", "dest")],
                "response_headers_to_add": [add("x-order", "route"), add("x-order", "dest")]})))
            .route(catch_all().to(""))
            .case(case("request", get("/req").header("x-set", "old").header("x-add", "one").header("x-gone", "1").header("x-stays", "1")))
            .case(case("request, none there", get("/req")))
            .case(case("request, value twice", get("/req").header("x-set", "a").header("x-set", "b").header("x-gone", "1").header("x-gone", "2")))
            .case(case("response", get("/resp").script("h:x-set=old h:x-add=one h:x-gone=1 h:x-stays=1 200")))
            .case(case("response, none there", get("/resp")))
            .case(case("host set is an authority rewrite", get("/hostset")))
            .case(case("destination before route", get("/dest").header("x-order", "client").script("h:x-order=server 200")))
            .case(case("route before the only destination", get("/single").header("x-order", "client").script("h:x-order=server 200")))
            .case(case("response, our own error", get("/resp").script("close")))
            .case(case("response, a fault", get("/fault")))
            .case(case("response, too slow", get("/slow").script("delay=900 200")))
            .case(case("response, no cluster", get("/nowhere")))
            .case(case("response, preflight", request("OPTIONS", "/cors").header("origin", "http://a").header("access-control-request-method", "GET")))
            .case(case("untouched", get("/plain").header("X-MiXed", "Keep Case").header("x-empty", "").script("h:X-Answer=MiXed 200")))
            .case(case("repeated headers stay apart", get("/plain").header("x-r", "1").header("x-r", "2").script("h:set-cookie=a=1 h:set-cookie=b=2 200")))
            .case(case("spaces around values", get("/plain").header("x-s", "  padded  ")))
            .case(case("bytes above ASCII", get("/plain").header("x-utf", "grün")))
            .case(case("server and date of the endpoint", get("/plain").script("h:server=mine h:date=yesterday 200")))
            .case(case("via and forwarded of others", get("/plain").header("via", "1.1 x").header("forwarded", "for=1.2.3.4")))
            .case(case("forwarded-for of the client", get("/plain").header("x-forwarded-for", "9.9.9.9")))
            .case(case("forwarded-proto of the client", get("/plain").header("x-forwarded-proto", "https")))
            .case(case("forwarded-host of the client", get("/plain").header("x-forwarded-host", "f.example")))
            .case(case("client certificate of the client is removed", get("/plain").header("x-forwarded-client-cert", "By=me")))
            .case(case("request id is made", get("/plain").anonymous()))
            .case(case("connection names a header", get("/plain").header("connection", "x-private, close").header("x-private", "1")))
            .case(case("connection cannot name the host", get("/plain").header("connection", "host, x-forwarded-for")))
            .case(case("hop by hop headers", get("/plain").header("keep-alive", "timeout=5").header("proxy-connection", "keep-alive").header("te", "gzip")))
            .case(case("te trailers", get("/plain").header("te", "trailers")))
            .case(case("hop by hop headers of the endpoint", get("/plain").script("h:keep-alive=timeout=5 h:proxy-connection=x 200")))
            .case(case("upgrade nobody knows", get("/plain").header("connection", "upgrade").header("upgrade", "h3")))
            .case(case("authorization and cookie pass", get("/plain").header("authorization", "Bearer x").header("cookie", "a=b")))
            .case(case("cookies by HTTP/2 are joined", get("/plain").header("cookie", "a=b").header("cookie", "c=d").h2()))
            .case(case("user agent", get("/plain").header("user-agent", "tester/1"))),
        scenario("sticky")
            .pods(&[("v1", 3)])
            .destination_rule("loadBalancer: { consistentHash: { httpCookie: { name: s, path: /p, ttl: 60s } } }")
            .virtual_service("- retries: { attempts: 0 }\n  route: [{ destination: { host: $HOST } }]\n")
            .route(catch_all().to("").action(json!({"retry_policy": null,
                "hash_policy": [{"cookie": {"name": "s", "path": "/p", "ttl": "60s"}}]})))
            .cluster(json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 1024}}))
            .case(case("a cookie beside the endpoint's", get("/").script("h:set-cookie=a=1 h:set-cookie=b=2 200")))
            .case(case("who has it gets none", get("/").header("cookie", "x=1; s=\"0123456789abcdef\"")))
            .case(case("none beside our own error", get("/").script("close"))),
        scenario("headers-empty")
            .pods(&[])
            .virtual_service("- headers: { response: { set: { x-set: new } } }\n  route: [{ destination: { host: $HOST } }]\n")
            .route(catch_all().to("").with(edited()))
            .case(case("response, no endpoint", get("/"))),
    ]
}
