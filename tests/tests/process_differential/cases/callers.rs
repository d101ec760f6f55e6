//! AuthorizationPolicies by who sends a request: the identity a tunnel proves. Envoy's waypoint has it in the filter state that
//! istiod's rules ask (`io.istio.peer_principal`); here a filter in front puts it there from the header that says so.
use serde_json::{Value, json};

use super::policies::{Rules, and, any, or, path, with_policy};
use crate::case::{AS, CLIENT, Req, Scenario, case, get, grpc, scenario};

const ADMIN: &str = "spiffe://cluster.local/ns/d/sa/admin";
/// Of another namespace.
const FOREIGN: &str = "spiffe://cluster.local/ns/e/sa/admin";
/// Names that begin or end as others do.
const LONGER: &str = "spiffe://cluster.local/ns/d/sa/admin2";
/// See [`LONGER`].
const NEIGHBOUR: &str = "spiffe://cluster.local/ns/dd/sa/client";
/// See [`LONGER`].
const SUPER: &str = "spiffe://cluster.local/ns/d/sa/super-admin";

const KEY: &str = "io.istio.peer_principal";

fn peer(text: Value) -> Value {
    json!({"filter_state": {"key": KEY, "string_match": text}})
}
/// `a`, `a*`, `*a` and `*` without the scheme, as istiod writes them for this key.
fn principal(pattern: &str) -> Value {
    peer(match (pattern, pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        ("*", ..) => json!({"safe_regex": {"regex": ".+"}}),
        (_, Some(suffix), _) => json!({"suffix": suffix}),
        (_, _, Some(prefix)) => json!({"prefix": format!("spiffe://{prefix}")}),
        _ => json!({"exact": format!("spiffe://{pattern}")}),
    })
}
fn namespace(pattern: &str) -> Value {
    peer(json!({"safe_regex": {"regex": format!(".*/ns/{}/.*", pattern.replace('*', ".*"))}}))
}
fn unless(principal: &Value) -> Value {
    json!({"not_id": principal})
}
fn one_of(all: &[Value]) -> Value {
    json!({"or_ids": {"ids": all}})
}
fn all_of(all: &[Value]) -> Value {
    json!({"and_ids": {"ids": all}})
}

/// Envoy learns who is there.
fn known(name: &'static str) -> Scenario {
    let text = format!("%REQ({AS})%");
    let set = json!({
        "on_request_headers": [{
            "object_key": KEY, "factory_key": "envoy.string", "skip_if_empty": true,
            "format_string": {"text_format_source": {"inline_string": text}},
        }],
    });
    scenario(name).filter("envoy.filters.http.set_filter_state", "set_filter_state.v3.Config", set)
}
/// A request by each.
fn by_each(mut scenario: Scenario, what: &'static [(&'static str, &'static str)], target: &str) -> Scenario {
    for (name, whom) in what {
        scenario = scenario.case(case(name, by(whom, target)));
    }
    scenario
}
fn by(whom: &str, target: &str) -> Req {
    get(target).by(whom)
}

fn allowing() -> Scenario {
    let from = |yaml: &'static str, target: &str, who: Value| (yaml, path(target), who);
    let rules: Rules = vec![
        from(
            "{ to: [{ operation: { paths: [/exact] } }], from: [{ source: { principals: [cluster.local/ns/d/sa/admin] } }] }",
            "/exact",
            principal("cluster.local/ns/d/sa/admin"),
        ),
        from(
            "{ to: [{ operation: { paths: [/prefix] } }], from: [{ source: { principals: ['cluster.local/ns/d/*'] } }] }",
            "/prefix",
            principal("cluster.local/ns/d/*"),
        ),
        from(
            "{ to: [{ operation: { paths: [/suffix] } }], from: [{ source: { principals: ['*/sa/admin'] } }] }",
            "/suffix",
            principal("*/sa/admin"),
        ),
        from("{ to: [{ operation: { paths: [/any] } }], from: [{ source: { principals: ['*'] } }] }", "/any", principal("*")),
        from(
            "{ to: [{ operation: { paths: [/two] } }], from: [{ source: { principals: [cluster.local/ns/d/sa/admin, \
             cluster.local/ns/e/sa/admin] } }] }",
            "/two",
            one_of(&[principal("cluster.local/ns/d/sa/admin"), principal("cluster.local/ns/e/sa/admin")]),
        ),
        from(
            "{ to: [{ operation: { paths: [/not] } }], from: [{ source: { notPrincipals: [cluster.local/ns/d/sa/admin] } }] }",
            "/not",
            unless(&principal("cluster.local/ns/d/sa/admin")),
        ),
        from(
            "{ to: [{ operation: { paths: [/but] } }], from: [{ source: { principals: ['cluster.local/ns/d/*'], notPrincipals: \
             ['*/sa/admin'] } }] }",
            "/but",
            all_of(&[principal("cluster.local/ns/d/*"), unless(&principal("*/sa/admin"))]),
        ),
        from("{ to: [{ operation: { paths: [/ns] } }], from: [{ source: { namespaces: [d] } }] }", "/ns", namespace("d")),
        from(
            "{ to: [{ operation: { paths: [/ns-pre] } }], from: [{ source: { namespaces: ['d*'] } }] }",
            "/ns-pre",
            namespace("d*"),
        ),
        from(
            "{ to: [{ operation: { paths: [/not-ns] } }], from: [{ source: { notNamespaces: [d] } }] }",
            "/not-ns",
            unless(&namespace("d")),
        ),
        from(
            "{ to: [{ operation: { paths: [/when] } }], when: [{ key: source.principal, values: [cluster.local/ns/d/sa/admin] }] }",
            "/when",
            principal("cluster.local/ns/d/sa/admin"),
        ),
        from(
            "{ to: [{ operation: { paths: [/when-ns] } }], when: [{ key: source.namespace, notValues: [e] }] }",
            "/when-ns",
            unless(&namespace("e")),
        ),
    ];
    let mut scenario = with_policy(known("caller-allow"), "allow", "ALLOW", rules);
    for (target, callers) in [
        (
            "/exact",
            &[("exact", ADMIN), ("another account", CLIENT), ("another namespace", FOREIGN), ("a longer name", LONGER)][..],
        ),
        ("/prefix", &[("by prefix", SUPER), ("prefix of another namespace", NEIGHBOUR), ("prefix, elsewhere", FOREIGN)]),
        ("/suffix", &[("by suffix", FOREIGN), ("suffix of a longer name", LONGER), ("suffix behind more", SUPER)]),
        ("/any", &[("anybody", NEIGHBOUR)]),
        ("/two", &[("the first of two", ADMIN), ("the second of two", FOREIGN), ("neither of two", LONGER)]),
        ("/not", &[("not this one", ADMIN), ("any but this one", LONGER)]),
        ("/but", &[("with an exception", CLIENT), ("the exception", ADMIN), ("outside, with an exception", NEIGHBOUR)]),
        ("/ns", &[("of the namespace", SUPER), ("of a longer namespace", NEIGHBOUR), ("of another namespace", FOREIGN)]),
        ("/ns-pre", &[("namespace by prefix", NEIGHBOUR), ("not by prefix", FOREIGN)]),
        ("/not-ns", &[("not of the namespace", ADMIN), ("outside the namespace", FOREIGN)]),
        ("/when", &[("by condition", ADMIN), ("condition not met", SUPER)]),
        ("/when-ns", &[("namespace by condition", NEIGHBOUR), ("namespace excepted by condition", FOREIGN)]),
        ("/nothing", &[("a path without a rule", ADMIN)]),
    ] {
        scenario = by_each(scenario, callers, target);
    }
    scenario.case(case("a gRPC call of somebody else", grpc("/exact").by(LONGER)))
}

/// DENY counts before ALLOW, and of several rules each.
fn denying() -> Scenario {
    let deny: Rules = vec![
        (
            "from: [{ source: { principals: ['*/sa/super-admin'] } }, { source: { namespaces: [e] } }]",
            any(),
            one_of(&[principal("*/sa/super-admin"), namespace("e")]),
        ),
        (
            "{ to: [{ operation: { paths: ['/own/*'] } }], from: [{ source: { notPrincipals: [cluster.local/ns/d/sa/admin] } }] }",
            path("/own/*"),
            unless(&principal("cluster.local/ns/d/sa/admin")),
        ),
    ];
    let allow: Rules = vec![(
        "{ to: [{ operation: { paths: ['/own/*', /all] } }], from: [{ source: { namespaces: [d, e] } }] }",
        and(&[or(&[path("/own/*"), path("/all")])]),
        one_of(&[namespace("d"), namespace("e")]),
    )];
    let scenario = with_policy(with_policy(known("caller-deny"), "no", "DENY", deny), "yes", "ALLOW", allow);
    let scenario = by_each(
        scenario,
        &[("allowed", CLIENT), ("denied by account", SUPER), ("denied by namespace", FOREIGN), ("not allowed", NEIGHBOUR)],
        "/all",
    );
    by_each(scenario, &[("the owner", ADMIN), ("not the owner", CLIENT), ("neither owner nor allowed", NEIGHBOUR)], "/own/x")
}

/// Addresses from which requests come, and whether what `x-forwarded-for` says of them is believed.
fn addresses() -> Scenario {
    let told = json!({"remote_ip": {"address_prefix": "203.0.113.0", "prefix_len": 24}});
    let rules: Rules = vec![("from: [{ source: { remoteIpBlocks: [203.0.113.0/24] } }]", any(), told)];
    with_policy(scenario("caller-remote-ip"), "deny", "DENY", rules)
        .case(case("nothing told", get("/")))
        .case(case("another told", get("/").header("x-forwarded-for", "198.51.100.7")))
        .case(case("not the last told", get("/").header("x-forwarded-for", "203.0.113.7, 198.51.100.7")))
        .case(case("the last told", get("/").header("x-forwarded-for", "203.0.113.7")))
}

pub fn all() -> Vec<Scenario> {
    vec![allowing(), denying(), addresses()]
}
