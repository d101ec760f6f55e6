//! Copies: the endpoint sees both.
use serde_json::{Value, json};

use crate::case::{Scenario, case, get, request, scenario};
use crate::istiod::{all as catch_all, cluster_name, prefix};

fn copy(version: &str, share: f64) -> Value {
    json!({"cluster": cluster_name("mirror", version), "trace_sampled": false,
        "runtime_fraction": {"default_value": {"numerator": (share * 10_000.0) as u64, "denominator": "MILLION"}}})
}

pub fn all() -> Vec<Scenario> {
    let to = "  route: [{ destination: { host: $HOST, subset: v1 } }]\n";
    let http = [
        format!("- match: [{{ uri: {{ prefix: /one }} }}]\n  mirror: {{ host: $HOST, subset: v2 }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /never }} }}]\n  mirror: {{ host: $HOST, subset: v2 }}\n  mirrorPercentage: {{ value: 0 }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /two }} }}]\n  mirrors: [{{ destination: {{ host: $HOST, subset: v2 }} }}, {{ destination: {{ host: $HOST, subset: v3 }}, percentage: {{ value: 100 }} }}]\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /rewritten }} }}]\n  rewrite: {{ uri: /new }}\n  headers: {{ request: {{ set: {{ x-a: b }} }} }}\n  mirror: {{ host: $HOST, subset: v2 }}\n{to}"),
        format!("-{}", &to[1..]),
    ]
    .concat();
    let set = json!({"header": {"key": "x-a", "value": "b"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"});
    vec![
        scenario("mirror")
            .pods(&[("v1", 1), ("v2", 1), ("v3", 1)])
            .virtual_service(&http)
            .destination_rule("")
            .route(prefix("/one").to("v1").action(json!({"request_mirror_policies": [copy("v2", 100.0)]})))
            .route(prefix("/never").to("v1"))
            .route(prefix("/two").to("v1").action(json!({"request_mirror_policies": [copy("v2", 100.0), copy("v3", 100.0)]})))
            .route(
                prefix("/rewritten")
                    .to("v1")
                    .with(json!({"request_headers_to_add": [set]}))
                    .action(json!({"prefix_rewrite": "/new", "request_mirror_policies": [copy("v2", 100.0)]})),
            )
            .route(catch_all().to("v1"))
            .case(case("one copy", get("/one?q=1")).arrivals(2))
            .case(case("body is copied", request("POST", "/one").body(b"payload")).arrivals(2))
            .case(case("chunked body is copied", request("POST", "/one").chunks(b"payload")).arrivals(2))
            .case(case("large body is copied", request("POST", "/one").body(&vec![b'z'; 40_000])).arrivals(2))
            .case(case("host with a port", get("/one").host("my.example:8080")).arrivals(2))
            .case(case("copy fails", get("/one").header("x-do-v2", "503")).arrivals(2))
            .case(case("copy is slow", get("/one").header("x-do-v2", "delay=5000 200")).arrivals(2).takes(0, 4500))
            .case(case("original fails", get("/one").header("x-do-v1", "500")).arrivals(2))
            .case(case("zero percent", get("/never")).arrivals(1))
            .case(case("two copies", get("/two")).arrivals(3))
            .case(case("copy of a rewritten request", get("/rewritten/x")).arrivals(2))
            .case(case("forwarded-for of the client in the copy", get("/one").header("x-forwarded-for", "9.9.9.9")).arrivals(2))
            .case(case("by HTTP/2", request("POST", "/one").body(b"x").h2()).arrivals(2)),
    ]
}
