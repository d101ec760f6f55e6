//! HTTP towards the client: what is refused, what is repaired, what passes.
use serde_json::json;

use crate::case::{Scenario, case, get, raw, request, scenario};
use crate::istiod::all as catch_all;

pub fn all() -> Vec<Scenario> {
    let line = |line: &str| raw(&format!("{line}\r\nhost: $HOST\r\nx-request-id: $ID\r\n\r\n"));
    let with = |headers: &str| raw(&format!("GET / HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\n{headers}\r\n"));
    let post = |rest: &str| raw(&format!("POST / HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\n{rest}"));
    let fields = |count: usize| (0..count).fold(get("/"), |request, n| request.header(&format!("x-{n}"), "v"));
    let answer = |count: usize| (0..count).map(|n| format!("h:x-{n}=v ")).collect::<String>() + "200";
    vec![
        scenario("protocol")
            .case(case("HTTP 1.0", line("GET / HTTP/1.0")).silent())
            .case(case("HTTP 1.0 without host", raw("GET / HTTP/1.0\r\nx-request-id: $ID\r\n\r\n")).silent())
            .case(case("no host", raw("GET / HTTP/1.1\r\nx-request-id: $ID\r\n\r\n")).silent())
            .case(case("empty host", raw("GET / HTTP/1.1\r\nhost:\r\nx-request-id: $ID\r\n\r\n")).silent())
            .case(case("two hosts", raw("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\nx-request-id: $ID\r\n\r\n")).silent())
            .case(case("host with an underscore", get("/").host("a_b.example")))
            .case(case("host with a user", get("/").host("u@a.example")).silent())
            .case(case("host that is an IPv6 address", get("/").host("[::1]:80")))
            .case(case("host with a path", get("/").host("a/b")).silent())
            .case(case("no target", line("GET  HTTP/1.1")).silent())
            .case(case("relative target", line("GET foo HTTP/1.1")).silent())
            .case(case("asterisk", line("OPTIONS * HTTP/1.1")).silent())
            .case(case("lower case method", line("get / HTTP/1.1")).silent())
            .case(case("unknown method", line("BREW / HTTP/1.1")).silent())
            .case(case("CONNECT", line("CONNECT a:80 HTTP/1.1")).silent())
            .case(case("TRACE", line("TRACE / HTTP/1.1")))
            .case(case("HTTP 2.0 in text", line("GET / HTTP/2.0")).silent())
            .case(case("not HTTP at all", raw("hello there\r\n\r\n")).silent())
            .case(case("space before the colon", with("x-a : b\r\n")).silent())
            .case(case("header name with a space", with("x a: b\r\n")).silent())
            .case(case("header without a colon", with("nonsense\r\n")).silent())
            .case(case("folded header", with("x-a: b\r\n c\r\n")).silent())
            .case(case("control byte in a value", with("x-a: b\u{1}c\r\n")).silent())
            .case(case("lines ended by LF", raw("GET / HTTP/1.1\nhost: $HOST\nx-request-id: $ID\n\n")).silent())
            .case(case("header with an underscore", get("/").header("x_a", "b")))
            .case(case("length and chunks", post("content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")).silent())
            .case(case("two lengths that differ", post("content-length: 5\r\ncontent-length: 6\r\n\r\nhello")).silent())
            .case(case("two lengths that agree", post("content-length: 5\r\ncontent-length: 5\r\n\r\nhello")).silent())
            .case(case("length that is no number", post("content-length: five\r\n\r\nhello")).silent())
            .case(case("length with a sign", post("content-length: +5\r\n\r\nhello")).silent())
            .case(case("negative length", post("content-length: -1\r\n\r\n")).silent())
            .case(case("unknown transfer encoding", post("transfer-encoding: gzip\r\n\r\n")).silent())
            .case(case("chunked is not last", post("transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n")).silent())
            .case(case("chunked with a capital", post("transfer-encoding: Chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")).silent())
            .case(case("chunk size that is none", post("transfer-encoding: chunked\r\n\r\nzz\r\n")).silent().arrives_or_not())
            .case(case("chunk extensions", post("transfer-encoding: chunked\r\n\r\n2;a=b\r\nhi\r\n0\r\n\r\n")).silent())
            .case(
                case("trailers of a request", post("transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-t: 1\r\n\r\n")).silent(),
            )
            .case(case("head of 70 KiB", get("/").header("x-big", &"b".repeat(70 << 10))).silent())
            .case(case("101 header fields", fields(101)).silent())
            .case(case("90 header fields", fields(90)))
            .case(case("90 header fields by HTTP/2", fields(90).h2()))
            .case(case("95 header fields by HTTP/2", fields(95).h2()))
            .case(case("96 header fields by HTTP/2", fields(96).h2()).silent())
            .case(case("97 header fields by HTTP/2", fields(97).h2()).silent())
            .case(case("300 header fields by HTTP/2", fields(300).h2()).silent())
            .case(case("answer of 90 header fields", get("/").script(&answer(90))))
            .case(case("answer of 120 header fields", get("/").script(&answer(120))))
            .case(case("target of 20 KiB", get(&format!("/{}", "p".repeat(20 << 10)))))
            .case(case("expect 100-continue", request("POST", "/").header("expect", "100-continue").body(b"hi")))
            .case(case("expect something else", get("/").header("expect", "miracles")).silent())
            .case(case("connection close", get("/").header("connection", "close")))
            .case(case("two requests on one connection", get("/1")).then(get("/2")).one_connection())
            .case(
                case("three bodies on one connection", request("POST", "/1").body(b"a"))
                    .then(request("POST", "/2").chunks(b"b"))
                    .then(get("/3"))
                    .one_connection(),
            )
            .case(case("WebSocket", get("/ws").script("upgrade").websocket("hello over there")))
            .case(case("WebSocket that is refused", get("/ws").script("403 body=no").websocket("x")))
            .case(case("HTTP/2", get("/h2?a=b").h2()))
            .case(case("HTTP/2 POST", request("POST", "/h2").body(b"body").h2()))
            .case(case("HTTP/2 HEAD", request("HEAD", "/h2").h2()))
            .case(case("HTTP/2 error", get("/h2").script("503").h2()))
            .case(case("HTTP/2 large answer", get("/h2").script("size=600000").h2()))
            .case(case("HTTP/2 own method", request("PURGE", "/").h2()))
            .case(case("HTTP/2 without an endpoint's length", get("/").script("noframe body=hello").h2()))
            .case(case("client goes away", get("/").script("delay=2500 200").give_up(150)).silent())
            .case(case("client goes away by HTTP/2", get("/").script("delay=2500 200").h2().give_up(150)).silent())
            .case(case("client goes away in the middle of the answer", get("/").script("size=40 drip=100").give_up(300)).silent())
            .case(case("client goes away in the middle of the answer by HTTP/2", get("/").script("size=40 drip=100").h2().give_up(300)).silent())
            .case(case("client goes away after its body", request("POST", "/").body(b"x").script("delay=2500 200").give_up(150)).silent()),
        // The limits the waypoint is started with here. Envoy goes on serving a connection for `drain_timeout` after it was idle.
        scenario("protocol-connect")
            .manager(json!({"http2_protocol_options": {"allow_connect": true}}))
            .case(case("WebSocket by HTTP/2, refused", get("/ws").script("403 body=no").connects("websocket")))
            .case(case("WebSocket by HTTP/2, an endpoint that is none", get("/ws").script("200 body=hello").connects("websocket")))
            .case(case("another protocol by HTTP/2", get("/ws").script("upgrade").connects("other")))
            .case(case("HTTP/2 as usual", get("/h2").h2())),
        scenario("protocol-fields")
            .port("http2")
            .case(case("answer of 90 header fields by HTTP/2", get("/").script(&answer(90))))
            .case(case("answer of 120 header fields by HTTP/2", get("/").script(&answer(120)))),
        scenario("protocol-time")
            .manager(json!({"common_http_protocol_options": {"idle_timeout": "3s"}, "drain_timeout": "0.1s", "request_headers_timeout": "1s"}))
            .case(case("quiet for longer than a head may take", get("/1")).then(get("/2").pause(1500)).one_connection())
            .case(case("busy for longer than it may be idle", get("/").script("delay=3400 200")))
            .case(case("idle for too long", get("/1")).then(get("/2").pause(3800)).one_connection().silent())
            .case(case("a head that takes too long", raw("GET / HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\n")).silent()),
        scenario("pinned-version")
            .virtual_service("- route: [{ destination: { host: $HOST, port: { number: 80 } } }]\n")
            .route(catch_all().to("").action(json!({})))
            .case(case("destination with a port", get("/"))),
    ]
}
