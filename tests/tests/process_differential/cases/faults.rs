//! Injected faults.
use serde_json::{Value, json};

use crate::case::{Scenario, case, get, grpc, request, scenario};
use crate::istiod::{all as catch_all, prefix};

fn percent(share: f64) -> Value {
    json!({"numerator": (share * 10_000.0) as u64, "denominator": "MILLION"})
}
fn abort(status: u16, share: f64) -> Value {
    json!({"http_status": status, "percentage": percent(share)})
}
fn delay(time: &str, share: f64) -> Value {
    json!({"fixed_delay": time, "percentage": percent(share)})
}

pub fn all() -> Vec<Scenario> {
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let rule = |path: &str, fault: &str| format!("- match: [{{ uri: {{ prefix: {path} }} }}]\n  fault: {{ {fault} }}\n{to}");
    let http = [
        rule("/abort", "abort: { httpStatus: 418, percentage: { value: 100 } }"),
        rule("/never", "abort: { httpStatus: 418, percentage: { value: 0 } }"),
        rule("/half", "abort: { httpStatus: 503, percentage: { value: 50 } }"),
        rule("/rare", "abort: { httpStatus: 503, percentage: { value: 5 } }"),
        rule("/delay", "delay: { fixedDelay: 200ms, percentage: { value: 100 } }"),
        rule(
            "/both",
            "delay: { fixedDelay: 100ms, percentage: { value: 100 } }, abort: { httpStatus: 500, percentage: { value: 100 } }",
        ),
        rule("/grpc", "abort: { grpcStatus: UNAVAILABLE, percentage: { value: 100 } }"),
        format!("-{}", &to[1..]),
    ]
    .concat();
    vec![
        scenario("fault")
            .virtual_service(&http)
            .route(prefix("/abort").to("").fault(json!({"abort": abort(418, 100.0)})))
            .route(prefix("/never").to("").fault(json!({"abort": abort(418, 0.0)})))
            .route(prefix("/half").to("").fault(json!({"abort": abort(503, 50.0)})))
            .route(prefix("/rare").to("").fault(json!({"abort": abort(503, 5.0)})))
            .route(prefix("/delay").to("").fault(json!({"delay": delay("0.2s", 100.0)})))
            .route(prefix("/both").to("").fault(json!({"delay": delay("0.1s", 100.0), "abort": abort(500, 100.0)})))
            .route(prefix("/grpc").to("").fault(json!({"abort": {"grpc_status": 14, "percentage": percent(100.0)}})))
            .route(catch_all().to(""))
            .case(case("abort", get("/abort")))
            .case(case("abort of POST", request("POST", "/abort").body(b"x")))
            .case(case("abort of HEAD", request("HEAD", "/abort")))
            .case(case("abort by HTTP/2", get("/abort").h2()))
            .case(case("abort of a gRPC call", grpc("/abort")))
            .case(case("abort with a gRPC status", grpc("/grpc")))
            .case(case("abort with a gRPC status of a plain request", get("/grpc")))
            .case(case("zero percent", get("/never")))
            .case(case("half of them", get("/half")).times(300).share("v1", 50.0, 12.0))
            .case(case("few of them", get("/rare")).times(300).share("v1", 95.0, 5.0))
            .case(case("delay", get("/delay")).takes(195, 5000))
            .case(case("delay, then abort", get("/both")).takes(95, 5000))
            .case(case("no fault on another route", get("/plain"))),
    ]
}
