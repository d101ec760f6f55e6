//! The route's time limit.
use serde_json::json;

use crate::case::{Scenario, case, get, grpc, request, scenario};
use crate::istiod::{all as catch_all, prefix, retry};

pub fn all() -> Vec<Scenario> {
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let http = [
        format!("- match: [{{ uri: {{ prefix: /short }} }}]\n  timeout: 200ms\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /zero }} }}]\n  timeout: 0s\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /tries }} }}]\n  timeout: 600ms\n  retries: {{ attempts: 5, retryOn: 5xx, perTryTimeout: 350ms }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /fail }} }}]\n  timeout: 300ms\n  retries: {{ attempts: 2, retryOn: 5xx }}\n{to}"),
        format!("-{}", &to[1..]),
    ]
    .concat();
    let mut tries = retry(5, "5xx");
    tries["per_try_timeout"] = "0.35s".into();
    vec![
        scenario("timeout")
            .virtual_service(&http)
            .route(prefix("/short").to("").action(json!({"timeout": "0.2s"})))
            .route(prefix("/zero").to(""))
            .route(prefix("/tries").to("").action(json!({"timeout": "0.6s", "retry_policy": tries})))
            .route(prefix("/fail").to("").action(json!({"timeout": "0.3s", "retry_policy": retry(2, "5xx")})))
            .route(catch_all().to(""))
            .case(case("in time", get("/short").script("delay=20 200")))
            .case(case("too slow", get("/short").script("delay=900 200")).takes(195, 700))
            .case(case("too slow, POST", request("POST", "/short").body(b"x").script("delay=900 200")))
            .case(case("too slow, HEAD", request("HEAD", "/short").script("delay=900 200")))
            .case(case("too slow by HTTP/2", get("/short").script("delay=900 200").h2()))
            .case(case("zero is none", get("/zero").script("delay=400 200")))
            .case(case("none by default", get("/plain").script("delay=400 200")))
            .case(case("in the middle of the body", get("/short").script("size=50 drip=40")))
            .case(case("over all tries", get("/tries").script("delay=900 200")))
            .case(case("a try in time after slow ones", get("/tries").script("delay=900 200|200")))
            .case(case("attempt count beside the limit", get("/fail").script("delay=100 503|200")))
            .case(case("limit of the client", get("/plain").header("x-envoy-upstream-rq-timeout-ms", "100").script("delay=400 200"))),
        scenario("timeout-grpc")
            .port("grpc")
            .virtual_service("- match: [{ uri: { prefix: /short } }]\n  timeout: 200ms\n  route: [{ destination: { host: $HOST } }]\n- route: [{ destination: { host: $HOST } }]\n")
            .route(prefix("/short").to("").action(json!({"timeout": "0.2s"})))
            .route(catch_all().to(""))
            .case(case("too slow", grpc("/short/m").script("delay=900 gdata=0")))
            .case(case("deadline of the call", grpc("/s/m").header("grpc-timeout", "150m").script("delay=900 gdata=0")))
            .case(case("deadline of the call within the limit", grpc("/short/m").header("grpc-timeout", "100m").script("gdata=0")))
            .case(case("deadline of the call beyond the limit", grpc("/short/m").header("grpc-timeout", "5S").script("gdata=0"))),
    ]
}
