//! Retries: Istio's default policy, and written ones.
use serde_json::json;

use crate::case::{Scenario, case, get, grpc, request, scenario};
use crate::istiod::{all as catch_all, default_retry, prefix, retry};

pub fn all() -> Vec<Scenario> {
    vec![defaults(), refused(), written(), hosts(), calls(), streams()]
}

fn defaults() -> Scenario {
    scenario("retry-default")
        .case(case("503 passes", get("/").script("503|200")))
        .case(case("500 passes", get("/").script("500|200")))
        .case(case("closed before the answer is not retried", get("/").script("close|200")))
        .case(case("reset before the answer is not retried", get("/").script("reset|200")))
        .case(case(
            "client asks for retries",
            get("/").header("x-envoy-retry-on", "5xx").header("x-envoy-max-retries", "1").script("503|200"),
        ))
}

fn refused() -> Scenario {
    scenario("retry-refused")
        .pods(&[("dead", 1)])
        .case(case("nobody listens", get("/")))
        .case(case("nobody listens, POST", request("POST", "/").body(b"x")))
}

fn written() -> Scenario {
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let rule =
        |path: &str, retries: &str| format!("- match: [{{ uri: {{ prefix: {path} }} }}]\n  retries: {{ {retries} }}\n{to}");
    let http = [
        rule("/5xx", "attempts: 2, retryOn: 5xx"),
        rule("/gateway", "attempts: 1, retryOn: gateway-error"),
        rule("/codes", "attempts: 2, retryOn: '503,409'"),
        rule("/4xx", "attempts: 1, retryOn: retriable-4xx"),
        rule("/reset", "attempts: 1, retryOn: reset"),
        rule("/never", "attempts: 0"),
        rule("/trydefault", "attempts: 2, perTryTimeout: 700ms"),
        rule("/try", "attempts: 1, retryOn: 5xx, perTryTimeout: 700ms"),
        rule("/limited", "attempts: 1, retryOn: envoy-ratelimited"),
        rule("/backoff", "attempts: 1, retryOn: 5xx, backoff: 300ms"),
    ]
    .concat();
    let on = |path: &str, policy: serde_json::Value| prefix(path).to("").action(json!({"retry_policy": policy}));
    let mut codes = retry(2, "retriable-status-codes");
    codes["retriable_status_codes"] = json!([503, 409]);
    let with = |mut policy: serde_json::Value, patch: serde_json::Value| {
        crate::istiod::merge(&mut policy, patch);
        policy
    };
    scenario("retry-written")
        .virtual_service(&http)
        .route(on("/5xx", retry(2, "5xx")))
        .route(on("/gateway", retry(1, "gateway-error")))
        .route(on("/codes", codes))
        .route(on("/4xx", retry(1, "retriable-4xx")))
        .route(on("/reset", retry(1, "reset")))
        .route(on("/never", json!(null)))
        .route(on("/trydefault", with(default_retry(), json!({"per_try_timeout": "0.7s"}))))
        .route(on("/try", with(retry(1, "5xx"), json!({"per_try_timeout": "0.7s"}))))
        .route(on("/limited", retry(1, "envoy-ratelimited")))
        .route(on("/backoff", with(retry(1, "5xx"), json!({"retry_back_off": {"base_interval": "0.3s"}}))))
        .case(case("5xx, second attempt", get("/5xx").script("500|200")))
        .case(case("5xx, third attempt", get("/5xx").script("503|502|200")))
        .case(case("5xx, used up", get("/5xx").script("503")))
        .case(case("5xx does not mean 404", get("/5xx").script("404|200")))
        .case(case("5xx means a closed connection", get("/5xx").script("close|200")))
        .case(case("5xx means a reset connection", get("/5xx").script("reset|200")))
        .case(case("closed every time", get("/5xx").script("close")))
        .case(case("the body is sent again", request("POST", "/5xx").body(b"payload").script("503|200")))
        .case(case("a chunked body is sent again", request("POST", "/5xx").chunks(b"payload").script("503|200")))
        .case(case("gateway error", get("/gateway").script("504|200")))
        .case(case("500 is no gateway error", get("/gateway").script("500|200")))
        .case(case("gateway error, used up", get("/gateway").script("502")))
        .case(case("listed code", get("/codes").script("409|503|200")))
        .case(case("code that is not listed", get("/codes").script("502|200")))
        .case(case("409 is retriable", get("/4xx").script("409|200")))
        .case(case("400 is not", get("/4xx").script("400|200")))
        .case(case("reset", get("/reset").script("close|200")))
        .case(case("reset does not mean 503", get("/reset").script("503|200")))
        .case(case("never", get("/never").script("503|200")))
        .case(case("never, closed", get("/never").script("close|200")))
        .case(case("slow try is retried under 5xx", get("/try").script("delay=2500 200|200")))
        .case(case("every try is slow", get("/try").script("delay=2500 200")))
        .case(case("slow try is not retried by default", get("/trydefault").script("delay=2500 200|200")))
        .case(case("rate limited", get("/limited").script("h:x-envoy-ratelimited=true 429|200")))
        .case(case("429 alone", get("/limited").script("429|200")))
        .case(case("backoff is kept", get("/backoff").script("503|200")).takes(0, 5000))
        .case(case(
            "attempt count of the client is not believed",
            get("/5xx").header("x-envoy-attempt-count", "7").script("503|200"),
        ))
        .case(case("answer of the last attempt", get("/5xx").script("503 body=first|503 body=second|503 body=third h:x-n=3")))
}

fn hosts() -> Scenario {
    scenario("retry-hosts")
        .pods(&[("good", 1), ("bad", 1)])
        .virtual_service("- retries: { attempts: 1, retryOn: 5xx }\n  route: [{ destination: { host: $HOST } }]\n")
        .route(catch_all().to("").action(json!({"retry_policy": retry(1, "5xx")})))
        // In turn: drawn at random, six draws may all be of the same host.
        .destination_rule("loadBalancer: { simple: ROUND_ROBIN }")
        .cluster(json!({"lb_policy": "ROUND_ROBIN"}))
        .case(case("another host is tried", get("/").header("x-do-bad", "503")).times(30).tally())
}

fn calls() -> Scenario {
    scenario("retry-grpc")
        .port("grpc")
        .case(case("unavailable, then fine", grpc("/s/m").script("grpc=14|gdata=0")))
        .case(case("unavailable every time", grpc("/s/m").script("grpc=14")))
        .case(case("cancelled", grpc("/s/m").script("grpc=1|gdata=0")))
        .case(case("internal is not retried", grpc("/s/m").script("grpc=13|gdata=0")))
        .case(case("unavailable in trailers is not retried", grpc("/s/m").script("gdata=14|gdata=0")))
        .case(case("fine", grpc("/s/m").script("gdata=0")))
        .case(case("HTTP status 503", grpc("/s/m").script("503|gdata=0")))
}

fn streams() -> Scenario {
    scenario("retry-h2")
        .port("http2")
        .case(case("refused stream", get("/").script("refuse|200")))
        .case(case("refused every time", get("/").script("refuse")))
        .case(case("reset stream", get("/").script("reset|200")))
        .case(case("HTTP/1 to HTTP/2", get("/x?y").header("connection", "close")))
        .case(case("POST", request("POST", "/").body(b"hello")))
        .case(case("chunked POST", request("POST", "/").chunks(b"hello")))
        .case(case("HTTP/2 to HTTP/2", request("POST", "/x?y").body(b"hello").h2()))
        .case(case("HEAD", request("HEAD", "/")))
}
