//! Connections carried as bytes. What is in them is HTTP, which neither side looks at: so answers tell who was reached.
use serde_json::{Value, json};

use crate::case::{Req, Scenario, case, scenario};

/// Without the id by which the log would be found: there is no line of requests.
fn get() -> Req {
    Req { anonymous: true, ..crate::case::get("/") }
}

fn limits(patch: Value) -> Value {
    let most = u32::MAX;
    let mut one = json!({"max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": most});
    crate::istiod::merge(&mut one, patch);
    json!({"circuit_breakers": {"thresholds": [one]}})
}

/// An endpoint that is dead, met in turn with one that is not, and ejected after three failures.
fn eject(name: &'static str, rule: &str, patch: Value) -> Scenario {
    let mut one =
        json!({"enforcing_success_rate": 0, "interval": "10s", "base_ejection_time": "30s", "max_ejection_percent": 50});
    crate::istiod::merge(&mut one, patch);
    scenario(name)
        .pods(&[("good", 1), ("dead", 1)])
        .bytes("", &[("", 1)])
        .destination_rule(&format!(
            "loadBalancer: {{ simple: ROUND_ROBIN }}\noutlierDetection: {{ {rule}, maxEjectionPercent: 50 }}"
        ))
        .cluster(json!({
            "outlier_detection": one, "common_lb_config": {"healthy_panic_threshold": {"value": 0}}, "lb_policy": "ROUND_ROBIN",
        }))
        .case(case("three fail", Req { pause: 60, ..get() }).times(20).tally())
}

pub fn all() -> Vec<Scenario> {
    let split = json!({
        "consecutive_5xx": 1, "enforcing_consecutive_5xx": 100, "split_external_local_origin_errors": true,
        "enforcing_local_origin_success_rate": 0, "consecutive_local_origin_failure": 3,
        "enforcing_consecutive_local_origin_failure": 100,
    });
    vec![
        scenario("bytes-plain").bytes("", &[("", 1)]).case(case("nothing is added", get())),
        scenario("bytes-subset")
            .pods(&[("v1", 1), ("v2", 1)])
            .bytes("- route: [{ destination: { host: $HOST, subset: v2 } }]", &[("v2", 1)])
            .destination_rule("")
            .case(case("to one only", get()).times(8).tally()),
        scenario("bytes-weights")
            .pods(&[("v1", 1), ("v2", 1)])
            .bytes(
                "- route: [{ destination: { host: $HOST, subset: v1 }, weight: 75 }, { destination: { host: $HOST, subset: v2 }, weight: 25 }]",
                &[("v1", 75), ("v2", 25)],
            )
            .destination_rule("")
            .case(case("by weight", get()).times(200).share("v2", 25.0, 12.0)),
        scenario("bytes-refused").pods(&[("dead", 1)]).bytes("", &[("", 1)]).case(case("no answer", get()).silent()),
        scenario("bytes-late")
            .pods(&[("hang", 1)])
            .bytes("", &[("", 1)])
            .destination_rule("connectionPool: { tcp: { connectTimeout: 500ms } }")
            .cluster(json!({"connect_timeout": "0.5s"}))
            .case(case("given up in time", get()).silent().takes(400, 1500)),
        scenario("bytes-connections")
            .bytes("", &[("", 1)])
            .destination_rule("connectionPool: { tcp: { maxConnections: 2 } }")
            .cluster(limits(json!({"max_connections": 2})))
            .case(case("two at a time", get().script("delay=800 200")).times(5).at_once().tally()),
        scenario("bytes-requests")
            .bytes("", &[("", 1)])
            .destination_rule("connectionPool: { http: { http2MaxRequests: 1 } }")
            .cluster(limits(json!({"max_requests": 1})))
            .case(case("are none", get().script("delay=300 200")).times(3).at_once().tally()),
        eject("bytes-eject", "consecutive5xxErrors: 3", json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100})),
        eject(
            "bytes-eject-split",
            "consecutive5xxErrors: 1, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 3",
            split,
        ),
    ]
}
