//! Outlier detection.
use serde_json::{Value, json};

use crate::case::{Req, Scenario, case, grpc, scenario};

/// One after another: Envoy's worker learns from its main thread that an endpoint was ejected.
fn get(target: &str) -> Req {
    crate::case::get(target).pause(60)
}

fn detect(patch: Value, panic: f64) -> Value {
    let mut one =
        json!({"enforcing_success_rate": 0, "interval": "10s", "base_ejection_time": "30s", "max_ejection_percent": 10});
    crate::istiod::merge(&mut one, patch);
    json!({"outlier_detection": one, "common_lb_config": {"healthy_panic_threshold": {"value": panic}}, "lb_policy": "ROUND_ROBIN"})
}

/// What `outlierDetectionHttpErrorCodes` is to a cluster.
fn errors(statuses: &str) -> Value {
    let matching = json!({"headers": [{"name": ":status", "string_match": {"safe_regex": {"regex": statuses}}}]});
    json!({"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "outlier_detection": {"error_matcher": {"http_response_headers_match": matching}},
    }}})
}

pub fn all() -> Vec<Scenario> {
    let rr = "loadBalancer: { simple: ROUND_ROBIN }\n";
    let five = json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100});
    let gateway = json!({"consecutive_5xx": 0, "enforcing_consecutive_5xx": 0, "consecutive_gateway_failure": 3, "enforcing_consecutive_gateway_failure": 100});
    vec![
        // Round robin gives each its turn, so the bad one is met exactly three times.
        scenario("eject-5xx")
            .pods(&[("good", 1), ("bad", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 50 }}"))
            .cluster(detect(json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50}), 0.0))
            .case(case("ejected after three", get("/").header("x-do-bad", "500")).times(20).tally()),
        scenario("eject-default-percent")
            .pods(&[("good", 1), ("bad", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3 }}"))
            .cluster(detect(five.clone(), 0.0))
            .case(case("one may always be ejected", get("/").header("x-do-bad", "503")).times(20).tally()),
        scenario("eject-percent")
            .pods(&[("bad", 4)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 2, maxEjectionPercent: 50 }}"))
            .cluster(detect(json!({"consecutive_5xx": 2, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50}), 0.0))
            .case(case("no more than half", get("/").script("503")).times(40).tally()),
        scenario("eject-all")
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 100 }}"))
            .cluster(detect(json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 100}), 0.0))
            .case(case("the only one", get("/").script("503")).times(6)),
        scenario("eject-interrupted")
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 100 }}"))
            .cluster(detect(json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 100}), 0.0))
            .case(
                case("a good answer starts the count again", get("/").script("503"))
                    .times(2)
                    .then(get("/"))
                    .then(get("/").script("503"))
                    .times(2)
                    .then(get("/"))
                    .tally(),
            ),
        scenario("eject-gateway")
            .pods(&[("good", 1), ("bad", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 0, consecutiveGatewayErrors: 3, maxEjectionPercent: 50 }}"))
            .cluster(detect({ let mut one = gateway.clone(); one["max_ejection_percent"] = 50.into(); one }, 0.0))
            .case(case("500 does not count", get("/").header("x-do-bad", "500")).times(12).tally())
            .case(case("502 counts", get("/").header("x-do-bad", "502")).times(16).tally()),
        scenario("eject-heal")
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 2, maxEjectionPercent: 100, interval: 100ms, baseEjectionTime: 1s }}"))
            .cluster(detect(
                json!({"consecutive_5xx": 2, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 100, "interval": "0.1s", "base_ejection_time": "1s"}),
                0.0,
            ))
            .case(
                case("comes back after its time", get("/").script("503"))
                    .times(2)
                    .then(get("/"))
                    .then(get("/").pause(2500))
                    .then(get("/")),
            ),
        scenario("eject-local")
            .pods(&[("good", 1), ("dead", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 50 }}"))
            .virtual_service("- retries: { attempts: 0 }\n  route: [{ destination: { host: $HOST } }]\n")
            .route(crate::istiod::all().to("").action(json!({"retry_policy": null})))
            .cluster(detect(json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50}), 0.0))
            .case(case("failed connects count as 5xx", get("/")).times(20).tally()),
        scenario("eject-grpc")
            .port("grpc")
            .pods(&[("good", 1), ("bad", 1)])
            .virtual_service("- retries: { attempts: 0 }\n  route: [{ destination: { host: $HOST } }]\n")
            .route(crate::istiod::all().to("").action(json!({"retry_policy": null})))
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 50 }}"))
            .cluster(detect(json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50}), 0.0))
            .case(case("a status after a message does not count", grpc("/s/m").pause(60).header("x-do-good", "gdata=0").header("x-do-bad", "gdata=14")).times(12).tally())
            .case(case("a status that is no 5xx does not count", grpc("/s/m").pause(60).header("x-do-good", "grpc=0").header("x-do-bad", "grpc=5")).times(12).tally())
            .case(case("a status at once counts", grpc("/s/m").pause(60).header("x-do-good", "grpc=0").header("x-do-bad", "grpc=14")).times(20).tally()),
        scenario("eject-codes")
            .pods(&[("good", 1), ("bad", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 50, outlierDetectionHttpErrorCodes: [404, 503] }}"))
            .cluster(detect(json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50}), 0.0))
            .cluster(errors("404|503"))
            .case(case("a 5xx that is not named is none", get("/").header("x-do-bad", "500")).times(12).tally())
            .case(
                case("it starts the count again", get("/").header("x-do-bad", "404"))
                    .times(4)
                    .then(get("/").header("x-do-bad", "500"))
                    .times(2)
                    .then(get("/").header("x-do-bad", "404"))
                    .times(4)
                    .tally(),
            )
            .case(case("a 4xx that is named counts", get("/").header("x-do-bad", "404")).times(16).tally()),
        scenario("eject-codes-gateway")
            .pods(&[("good", 1), ("bad", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 0, consecutiveGatewayErrors: 3, maxEjectionPercent: 50, outlierDetectionHttpErrorCodes: [404, 503] }}"))
            .cluster(detect({ let mut one = gateway.clone(); one["max_ejection_percent"] = 50.into(); one }, 0.0))
            .cluster(errors("404|503"))
            .case(case("a 4xx that is named is no gateway error", get("/").header("x-do-bad", "404")).times(12).tally())
            .case(case("502 that is not named is none", get("/").header("x-do-bad", "502")).times(12).tally())
            .case(case("503 that is named counts", get("/").header("x-do-bad", "503")).times(16).tally()),
        scenario("eject-codes-grpc")
            .port("grpc")
            .pods(&[("good", 1), ("bad", 1)])
            .virtual_service("- retries: { attempts: 0 }\n  route: [{ destination: { host: $HOST } }]\n")
            .route(crate::istiod::all().to("").action(json!({"retry_policy": null})))
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 50, outlierDetectionHttpErrorCodes: [404] }}"))
            .cluster(detect(json!({"consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50}), 0.0))
            .cluster(errors("404"))
            .case(case("what one stands for is not named", grpc("/s/m").pause(60).header("x-do-good", "grpc=0").header("x-do-bad", "grpc=5")).times(12).tally())
            .case(case("gRPC's own errors count as ever", grpc("/s/m").pause(60).header("x-do-good", "grpc=0").header("x-do-bad", "grpc=14")).times(16).tally()),
        scenario("eject-split")
            .pods(&[("good", 1), ("bad", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 3, maxEjectionPercent: 50, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2 }}"))
            .cluster(detect(
                json!({
                    "consecutive_5xx": 3, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50,
                    "split_external_local_origin_errors": true, "enforcing_local_origin_success_rate": 0,
                    "consecutive_local_origin_failure": 2, "enforcing_consecutive_local_origin_failure": 100,
                }),
                0.0,
            ))
            .case(case("answers have a count of their own", get("/").header("x-do-bad", "500")).times(16).tally()),
        scenario("eject-split-gateway")
            .pods(&[("good", 1), ("bad", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 0, consecutiveGatewayErrors: 3, maxEjectionPercent: 50, splitExternalLocalOriginErrors: true }}"))
            .cluster(detect(
                {
                    let mut one = gateway.clone();
                    crate::istiod::merge(
                        &mut one,
                        json!({"max_ejection_percent": 50, "split_external_local_origin_errors": true, "enforcing_local_origin_success_rate": 0}),
                    );
                    one
                },
                0.0,
            ))
            .case(case("500 does not count", get("/").header("x-do-bad", "500")).times(12).tally())
            .case(case("502 counts", get("/").header("x-do-bad", "502")).times(16).tally()),
        scenario("eject-split-local")
            .pods(&[("good", 1), ("dead", 1)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 1, maxEjectionPercent: 50, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 3 }}"))
            .virtual_service("- retries: { attempts: 0 }\n  route: [{ destination: { host: $HOST } }]\n")
            .route(crate::istiod::all().to("").action(json!({"retry_policy": null})))
            .cluster(detect(
                json!({
                    "consecutive_5xx": 1, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 50,
                    "split_external_local_origin_errors": true, "enforcing_local_origin_success_rate": 0,
                    "consecutive_local_origin_failure": 3, "enforcing_consecutive_local_origin_failure": 100,
                }),
                0.0,
            ))
            .case(case("failed connects count apart", get("/")).times(20).tally()),
        scenario("eject-panic")
            .pods(&[("bad", 2)])
            .destination_rule(&format!("{rr}outlierDetection: {{ consecutive5xxErrors: 2, maxEjectionPercent: 100, minHealthPercent: 60 }}"))
            .cluster(detect(json!({"consecutive_5xx": 2, "enforcing_consecutive_5xx": 100, "max_ejection_percent": 100}), 60.0))
            .case(case("too few healthy ones: all are used", get("/").script("503")).times(12).tally()),
    ]
}
