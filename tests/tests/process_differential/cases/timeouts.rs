//! The route's time limit.
use serde_json::json;

use crate::case::{Scenario, case, get, grpc, request, scenario};
use crate::istiod::{all as catch_all, prefix, retry};

pub fn all() -> Vec<Scenario> {
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let http = [
        format!("- match: [{{ uri: {{ prefix: /short }} }}]\n  timeout: 700ms\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /zero }} }}]\n  timeout: 0s\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /tries }} }}]\n  timeout: 1800ms\n  retries: {{ attempts: 5, retryOn: 5xx, perTryTimeout: 1100ms }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /fail }} }}]\n  timeout: 900ms\n  retries: {{ attempts: 2, retryOn: 5xx }}\n{to}"),
        format!("-{}", &to[1..]),
    ]
    .concat();
    let mut tries = retry(5, "5xx");
    tries["per_try_timeout"] = "1.1s".into();
    vec![
        scenario("timeout")
            .virtual_service(&http)
            .route(prefix("/short").to("").action(json!({"timeout": "0.7s"})))
            .route(prefix("/zero").to(""))
            .route(prefix("/tries").to("").action(json!({"timeout": "1.8s", "retry_policy": tries})))
            .route(prefix("/fail").to("").action(json!({"timeout": "0.9s", "retry_policy": retry(2, "5xx")})))
            .route(catch_all().to(""))
            .case(case("in time", get("/short").script("delay=20 200")))
            .case(case("too slow", get("/short").script("delay=4000 200")).takes(695, 3800))
            .case(case("too slow, POST", request("POST", "/short").body(b"x").script("delay=4000 200")))
            .case(case("too slow, HEAD", request("HEAD", "/short").script("delay=4000 200")))
            .case(case("too slow by HTTP/2", get("/short").script("delay=4000 200").h2()))
            .case(case("zero is none", get("/zero").script("delay=400 200")))
            .case(case("none by default", get("/plain").script("delay=400 200")))
            .case(case("in the middle of the body", get("/short").script("size=50 drip=80")))
            .case(case("over all tries", get("/tries").script("delay=4000 200")))
            .case(case("a try in time after slow ones", get("/tries").script("delay=4000 200|200")))
            .case(case("attempt count beside the limit", get("/fail").script("delay=100 503|200")))
            .case(case("limit of the client", get("/plain").header("x-envoy-upstream-rq-timeout-ms", "100").script("delay=400 200"))),
        scenario("timeout-grpc")
            .port("grpc")
            .virtual_service("- match: [{ uri: { prefix: /short } }]\n  timeout: 700ms\n  route: [{ destination: { host: $HOST } }]\n- route: [{ destination: { host: $HOST } }]\n")
            .route(prefix("/short").to("").action(json!({"timeout": "0.7s"})))
            .route(catch_all().to(""))
            .case(case("too slow", grpc("/short/m").script("delay=4000 gdata=0")))
            .case(case("deadline of the call", grpc("/s/m").header("grpc-timeout", "150m").script("delay=900 gdata=0")))
            .case(case("deadline of the call within the limit", grpc("/short/m").header("grpc-timeout", "100m").script("gdata=0")))
            .case(case("deadline of the call beyond the limit", grpc("/short/m").header("grpc-timeout", "5S").script("gdata=0"))),
    ]
}
