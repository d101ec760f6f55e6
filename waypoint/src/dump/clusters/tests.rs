use super::*;
use crate::telemetry::tests::view;

#[test]
fn the_text_is_envoys() {
    let text = clusters_text(&[view()]);
    let name = "outbound|80||api.shop.svc.cluster.local";
    for line in [
        "default_priority::max_connections::100",
        "default_priority::max_requests::4294967295",
        "added_via_api::true",
        "10.0.1.7:8080::rq_active::2",
        "10.0.1.7:8080::rq_error::3",
        "10.0.1.7:8080::rq_success::7",
        "10.0.1.7:8080::health_flags::healthy",
        "10.0.1.8:8080::health_flags::/failed_outlier_check",
        "10.0.1.7:8080::region::r",
        "10.0.1.7:8080::zone::z",
        "10.0.1.7:8080::priority::0",
    ] {
        assert!(text.lines().any(|l| l == format!("{name}::{line}")), "{line} is not in\n{text}");
    }
    assert!(text.lines().all(|l| l.starts_with(&format!("{name}::"))));
}

#[test]
fn the_json_has_what_istioctl_reads() {
    let value = clusters_json(&[view()]);
    let cluster = &value["cluster_statuses"][0];
    assert_eq!(cluster["name"], "outbound|80||api.shop.svc.cluster.local");
    let [healthy, ejected] = [0, 1].map(|at| &cluster["host_statuses"][at]);
    assert_eq!(healthy["address"]["socket_address"], json!({ "address": "10.0.1.7", "port_value": 8080 }));
    assert_eq!(healthy["health_status"], json!({ "eds_health_status": "HEALTHY" }));
    assert_eq!(ejected["health_status"]["failed_outlier_check"], true);
    assert_eq!(healthy["stats"][0], json!({ "name": "cx_active", "value": "1", "type": "GAUGE" }));
    assert_eq!(cluster["circuit_breakers"]["thresholds"][0]["max_connections"], 100);
}
