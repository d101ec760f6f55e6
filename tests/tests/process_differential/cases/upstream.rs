//! What the upstream side does: missing, refusing, lying, odd but right.
use serde_json::json;

use crate::case::{Scenario, case, get, grpc, request, scenario};
use crate::istiod::{all as catch_all, prefix};

pub fn all() -> Vec<Scenario> {
    let none = "- retries: { attempts: 0 }\n  route: [{ destination: { host: $HOST } }]\n";
    let off = || catch_all().to("").action(json!({"retry_policy": null}));
    vec![
        scenario("up-empty")
            .pods(&[])
            .case(case("no endpoint", get("/")))
            .case(case("no endpoint, HEAD", request("HEAD", "/")))
            .case(case("no endpoint, POST", request("POST", "/").body(b"x")))
            .case(case("no endpoint by HTTP/2", get("/").h2()))
            .case(case("no endpoint, gRPC call", grpc("/s/m"))),
        scenario("up-refused")
            .pods(&[("dead", 1)])
            .virtual_service(none)
            .route(off())
            .case(case("refused", get("/")))
            .case(case("refused, gRPC call", grpc("/s/m"))),
        scenario("up-hang")
            .pods(&[("hang", 1)])
            .virtual_service(none)
            .destination_rule("connectionPool: { tcp: { connectTimeout: 200ms } }")
            .route(off())
            .cluster(json!({"connect_timeout": "0.2s"}))
            .case(case("connect takes too long", get("/")).takes(190, 5000)),
        scenario("up-unknown")
            .destination_rule("")
            .virtual_service(
                "- match: [{ uri: { prefix: /subset } }]\n  route: [{ destination: { host: $HOST, subset: v9 } }]\n\
                 - match: [{ uri: { prefix: /host } }]\n  route: [{ destination: { host: nowhere.d.svc.cluster.local } }]\n",
            )
            .route(prefix("/subset").to("").action(json!({"cluster": "outbound|80|v9|unknown"})))
            .route(prefix("/host").to("").action(json!({"cluster": "outbound|80||nowhere.d.svc.cluster.local"})))
            .case(case("unknown host", get("/host")))
            .case(case("unknown host, gRPC call", grpc("/host")))
            .case(case("unknown subset", get("/subset"))),
        scenario("up-answers")
            .case(case("echo", get("/a/b?c=d")))
            .case(case("empty body", get("/").script("size=0 200")))
            .case(case("201", request("POST", "/").body(b"x").script("201")))
            .case(case("204", get("/").script("204")))
            .case(case("304", get("/").script("h:etag=x 304")))
            .case(case("404", get("/").script("404 body=no")))
            .case(case("500", get("/").script("500 body=oh")))
            .case(case("unknown status", get("/").script("599 body=odd")))
            .case(case("status below 600", get("/").script("520")))
            .case(case("chunked", get("/").script("chunked body=hello")))
            .case(case("chunked in pieces", get("/").script("chunked size=5 drip=5")))
            .case(case("ended by closing", get("/").script("noframe body=hello")))
            .case(case("connection close", get("/").script("last 200")))
            .case(case("connection close, then another", get("/").script("last 200")).then(get("/")).one_connection())
            .case(case("large", get("/").script("size=2000000")))
            .case(case("large, chunked", get("/").script("size=500000 chunked")))
            .case(case("interim 100", get("/").script("continue 200")))
            .case(case("HEAD", request("HEAD", "/").script("size=123")))
            .case(case("HEAD, chunked", request("HEAD", "/").script("chunked")))
            .case(case("DELETE", request("DELETE", "/x")))
            .case(case("PATCH", request("PATCH", "/x").body(b"p")))
            .case(case("OPTIONS", request("OPTIONS", "/x")))
            .case(case("own method", request("PURGE", "/x")))
            .case(case("GET with a body", get("/").body(b"why not")))
            .case(case("POST without a body", request("POST", "/")))
            .case(case("POST with an empty body", request("POST", "/").header("content-length", "0")))
            .case(case("large POST", request("POST", "/").body(&vec![b'q'; 300_000])))
            .case(case("chunked POST", request("POST", "/").chunks(b"one chunk")))
            .case(case("many response headers", get("/").script(&(0..60).map(|n| format!("h:x-n{n}=v ")).collect::<String>())))
            .case(case("upstream service time of the endpoint", get("/").script("h:x-envoy-upstream-service-time=777 200")))
            .case(case("attempt count in the answer of the endpoint", get("/").script("h:x-envoy-attempt-count=9 200")))
            .case(case("overloaded said by the endpoint", get("/").script("h:x-envoy-overloaded=true 503")))
            .case(case("plain HTTP to a gRPC call", grpc("/s/m").script("404 body=no"))),
        scenario("up-broken")
            .virtual_service(none)
            .route(off())
            .case(case("closed before the answer", get("/").script("close")))
            .case(case("closed before the answer, POST", request("POST", "/").body(b"x").script("close")))
            .case(case("reset before the answer", get("/").script("reset")))
            .case(case("closed before the answer by HTTP/2", get("/").script("close").h2()))
            .case(case("not HTTP", get("/").script("garbage")))
            .case(case("shorter than it says", get("/").script("len=100 body=short")))
            .case(case("longer than it says", get("/").script("len=2 body=longer")))
            .case(case("bad header value", get("/").script("badheader")))
            .case(case("head too large", get("/").script("bighead=70000")))
            .case(case("closed, then a good one", get("/").script("close")).then(get("/")).one_connection()),
    ]
}
