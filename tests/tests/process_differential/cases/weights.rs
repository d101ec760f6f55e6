//! Shares of versions.
use serde_json::json;

use crate::case::{Scenario, case, get, scenario};
use crate::istiod::{all as catch_all, on, prefix};

pub fn all() -> Vec<Scenario> {
    let dest = |version: &str, weight: u32| format!("{{ destination: {{ host: $HOST, subset: {version} }}, weight: {weight} }}");
    let rule = |path: &str, list: &[(&str, u32)]| {
        let list: Vec<String> = list.iter().map(|&(version, weight)| dest(version, weight)).collect();
        format!("- match: [{{ uri: {{ prefix: {path} }} }}]\n  route: [{}]\n", list.join(", "))
    };
    let http = [
        "- match: [{ headers: { x-canary: { exact: 'true' } } }]\n  route: [{ destination: { host: $HOST, subset: v2 } }]\n"
            .to_owned(),
        rule("/canary", &[("v1", 95), ("v2", 5)]),
        rule("/even", &[("v1", 50), ("v2", 50)]),
        rule("/three", &[("v1", 1), ("v2", 1), ("v3", 2)]),
        rule("/none", &[("v1", 100), ("v2", 0)]),
        rule("/small", &[("v1", 1), ("v2", 3)]),
        "- match: [{ uri: { prefix: /alone } }]\n  route: [{ destination: { host: $HOST, subset: v3 }, weight: 7 }]\n".to_owned(),
        "- route: [{ destination: { host: $HOST, subset: v1 } }]\n".to_owned(),
    ]
    .concat();
    vec![
        scenario("weights")
            .pods(&[("v1", 1), ("v2", 1), ("v3", 1)])
            .virtual_service(&http)
            .destination_rule("")
            .route(on(json!({"prefix": "/", "headers": [{"name": "x-canary", "string_match": {"exact": "true"}}]})).to("v2"))
            .route(prefix("/canary").weighted(&[("v1", 95), ("v2", 5)]))
            .route(prefix("/even").weighted(&[("v1", 50), ("v2", 50)]))
            .route(prefix("/three").weighted(&[("v1", 1), ("v2", 1), ("v3", 2)]))
            .route(prefix("/none").to("v1"))
            .route(prefix("/small").weighted(&[("v1", 1), ("v2", 3)]))
            .route(prefix("/alone").to("v3"))
            .route(catch_all().to("v1"))
            // Tolerances are above four standard deviations.
            .case(case("95 to 5", get("/canary")).times(600).share("v2", 5.0, 4.0))
            .case(case("even", get("/even")).times(400).share("v1", 50.0, 11.0))
            .case(case("one of three", get("/three")).times(400).share("v3", 50.0, 11.0))
            .case(case("not of a hundred", get("/small")).times(400).share("v2", 75.0, 9.5))
            .case(case("zero gets nothing", get("/none")).times(30).share("v1", 100.0, 0.0))
            .case(case("alone", get("/alone")))
            .case(case("by header", get("/canary").header("x-canary", "true")))
            .case(case("default", get("/other"))),
    ]
}
