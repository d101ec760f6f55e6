//! Limits of a destination.
use serde_json::{Value, json};

use crate::case::{Scenario, case, get, scenario};
use crate::istiod::{all as catch_all, retry};

fn limits(patch: Value) -> Value {
    let mut one = json!({"max_connections": 4_294_967_295_u32, "max_pending_requests": 4_294_967_295_u32, "max_requests": 4_294_967_295_u32,
        "max_retries": 4_294_967_295_u32, "track_remaining": true});
    crate::istiod::merge(&mut one, patch);
    json!({"circuit_breakers": {"thresholds": [one]}})
}

/// A fifth of the requests may be tried again: of those under way there is one only, of those that came lately there are five.
fn budget(name: &'static str, more: &str, patch: Value) -> Scenario {
    let mut one = json!({"budget_percent": {"value": 20.0}, "min_retry_concurrency": 0});
    crate::istiod::merge(&mut one, patch);
    scenario(name)
        .virtual_service("- retries: { attempts: 2, retryOn: 5xx }\n  route: [{ destination: { host: $HOST } }]\n")
        .destination_rule(&format!("retryBudget: {{ percent: 20, minRetryConcurrency: 0{more} }}"))
        .route(catch_all().to("").action(json!({"retry_policy": retry(2, "5xx")})))
        .cluster(limits(json!({"retry_budget": one})))
        .case(case("one of five fails", get("/")).times(4).then(get("/").script("503|200")))
}

/// Requests at once at an endpoint that takes no connection: as many as may wait do, until it is given up.
fn cold(name: &'static str, port: &'static str, waiting: u32) -> Scenario {
    scenario(name)
        .port(port)
        .pods(&[("hang", 1)])
        .virtual_service("- retries: { attempts: 0 }\n  route: [{ destination: { host: $HOST } }]\n")
        .destination_rule(&format!(
            "connectionPool: {{ tcp: {{ maxConnections: 1, connectTimeout: 800ms }}, http: {{ http1MaxPendingRequests: {waiting} }} }}"
        ))
        .route(catch_all().to("").action(json!({"retry_policy": null})))
        .cluster(limits(json!({"max_connections": 1, "max_pending_requests": waiting})))
        .cluster(json!({"connect_timeout": "0.8s"}))
        .case(case("a connection being made", get("/")).times(5).at_once().tally())
}

pub fn all() -> Vec<Scenario> {
    vec![
        scenario("breaker-pending")
            .destination_rule("connectionPool: { tcp: { maxConnections: 1 }, http: { http1MaxPendingRequests: 1 } }")
            .cluster(limits(json!({"max_connections": 1, "max_pending_requests": 1})))
            // Warm first: who waits for a connection that is still being made is the one that may wait.
            .case(case("one after the other", get("/")).times(4).tally())
            .case(case("one active and one waiting", get("/").script("delay=800 200")).times(4).at_once().tally()),
        cold("breaker-cold", "http", 1),
        cold("breaker-cold-h2", "http2", 2),
        scenario("breaker-requests")
            .destination_rule("connectionPool: { http: { http2MaxRequests: 2 } }")
            .cluster(limits(json!({"max_requests": 2})))
            .case(case("two at a time", get("/").script("delay=800 200")).times(5).at_once().tally())
            .case(case("room again", get("/")).times(3).tally()),
        scenario("breaker-one")
            .destination_rule("connectionPool: { http: { http2MaxRequests: 1 } }")
            .cluster(limits(json!({"max_requests": 1})))
            .case(case("the answer when full", get("/").script("delay=1000 200")).then(get("/").pause(0)).at_once().tally()),
        scenario("breaker-connections")
            .destination_rule("connectionPool: { tcp: { maxConnections: 2 } }")
            .cluster(limits(json!({"max_connections": 2})))
            .case(case("the others wait", get("/").script("delay=100 200")).times(6).at_once().tally().takes(290, 10_000)),
        scenario("breaker-h2")
            .port("http2")
            .destination_rule("connectionPool: { http: { http2MaxRequests: 2 } }")
            .cluster(limits(json!({"max_requests": 2})))
            .case(case("two at a time", get("/").script("delay=800 200")).times(5).at_once().tally()),
        scenario("breaker-retries")
            .virtual_service("- retries: { attempts: 2, retryOn: 5xx }\n  route: [{ destination: { host: $HOST } }]\n")
            .destination_rule("connectionPool: { http: { maxRetries: 1 } }")
            .route(catch_all().to("").action(json!({"retry_policy": retry(2, "5xx")})))
            .cluster(limits(json!({"max_retries": 1})))
            .case(case("one alone retries", get("/").script("503|200"))),
        budget("breaker-budget", "", json!({})),
        budget("breaker-budget-interval", ", budgetInterval: 20s", json!({"budget_interval": "20s"})),
        scenario("breaker-per-connection")
            .destination_rule("connectionPool: { http: { maxRequestsPerConnection: 1 } }")
            .cluster(json!({"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "common_http_protocol_options": {"max_requests_per_connection": 1}}}}))
            .case(case("a connection each", get("/")).then(get("/"))),
    ]
}
