//! Consistent hashing: which of four endpoints a key leads to.
use serde_json::{Value, json};

use crate::case::{Case, Scenario, case, get, scenario};
use crate::istiod::all as catch_all;

/// Four endpoints, told apart by their versions, and what is hashed.
fn hashed(name: &'static str, rule: &str, policy: Value, table: Value) -> Scenario {
    scenario(name)
        .pods(&[("v1", 1), ("v2", 1), ("v3", 1), ("v4", 1)])
        .destination_rule(&format!("loadBalancer: {{ consistentHash: {{ {rule} }} }}"))
        .route(catch_all().to("").action(json!({"hash_policy": [policy]})))
        .cluster(table)
}

/// One request for each target, and each of them again.
fn twice(name: &'static str, targets: impl IntoIterator<Item = String>) -> Case {
    let targets: Vec<String> = targets.into_iter().collect();
    let mut all = targets.iter().chain(&targets).map(|target| get(target));
    let first = all.next().unwrap_or_else(|| get("/"));
    all.fold(case(name, first), Case::then)
}

pub fn all() -> Vec<Scenario> {
    let ring = || json!({"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 1024}});
    let maglev = || json!({"lb_policy": "MAGLEV", "maglev_lb_config": {"table_size": 65537}});
    let by_header = json!({"header": {"header_name": "x-user"}});
    let by_query = json!({"query_parameter": {"name": "user"}});
    let by_source = json!({"connection_properties": {"source_ip": true}});
    let users = |name: &'static str| {
        let user = |n: usize| get("/").header("x-user", &format!("user-{n}"));
        (1..24).map(|n| user(n % 12)).fold(case(name, user(0)), Case::then)
    };
    let list = get("/").header("x-user", "b").header("x-user", "a");
    vec![
        hashed("hash-header", "httpHeaderName: x-user", by_header.clone(), ring())
            .case(users("a value stays where it is"))
            .case(case("several values", list.clone()).then(get("/").header("x-user", "a").header("x-user", "b")).then(list))
            .case(case("none at all", get("/").header("x-user", "")).times(2)),
        hashed("hash-maglev", "httpHeaderName: x-user, maglev: {}", by_header, maglev()).case(users("a value stays where it is")),
        hashed("hash-query", "httpQueryParameterName: user", by_query, ring())
            .case(twice("a value stays where it is", (0..12).map(|n| format!("/?a=1&user={n}"))))
            .case(twice(
                "odd values",
                ["/?user=a%20b", "/?user=a+b", "/?user=", "/?user=x&user=y", "/?USER=x&user=z"].map(str::to_owned),
            )),
        hashed("hash-source", "useSourceIp: true", by_source, ring()).case(case("one client", get("/")).times(6)),
    ]
}
