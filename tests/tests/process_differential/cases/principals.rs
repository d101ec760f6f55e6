//! AuthorizationPolicies by what a verified token says.
use serde_json::{Value, json};

use super::policies::{Rules, and, any, not, or, path, text, with_policy};
use super::tokens::{ISSUER, OTHER, bearing, jwks, local, other_token, token};
use crate::case::{Case, Scenario, case, get, grpc, scenario};
use crate::token::{KEYS, rsa_jwk};

/// A claim as istiod asks for it: where the filter of tokens put it.
fn at(claim: &[&str], value: &Value) -> Value {
    let path: Vec<Value> = std::iter::once(&"payload").chain(claim).map(|key| json!({"key": key})).collect();
    json!({"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": path, "value": value}})
}
fn string(pattern: &str) -> Value {
    if pattern == "*" { json!({"safe_regex": {"regex": ".+"}}) } else { text(pattern) }
}
/// A claim that is, or whose list has, one of these.
fn claim(claim: &[&str], patterns: &[&str]) -> Value {
    let one = |pattern: &&str| {
        let string = json!({"string_match": string(pattern)});
        at(claim, &json!({"or_match": {"value_matchers": [{"list_match": {"one_of": string}}, string]}}))
    };
    json!({"or_ids": {"ids": patterns.iter().map(one).collect::<Vec<_>>()}})
}
/// `issuer/subject`
fn principal(issuer: &str, subject: &str) -> Value {
    let part = |name: &str, pattern: &str| at(&[name], &json!({"string_match": string(pattern)}));
    json!({"and_ids": {"ids": [part("iss", issuer), part("sub", subject)]}})
}
fn unless(principal: &Value) -> Value {
    json!({"not_id": principal})
}
fn ids(all: &[Value]) -> Value {
    json!({"or_ids": {"ids": all}})
}

/// Both issuers are believed.
fn trusting(name: &'static str) -> Scenario {
    let other = json!({"keys": [rsa_jwk("two", &KEYS.other)]});
    let rules = format!("  - {{ issuer: '{ISSUER}', jwks: '{}' }}\n  - {{ issuer: '{OTHER}', jwks: '{other}' }}\n", jwks());
    scenario(name).tokens(
        &rules,
        &[json!({"issuer": ISSUER, "local_jwks": local(&jwks())}), json!({"issuer": OTHER, "local_jwks": local(&other)})],
    )
}

fn allowing() -> Scenario {
    let rules: Rules = vec![
        (
            "{ to: [{ operation: { paths: [/ann] } }], from: [{ source: { requestPrincipals: ['https://issuer.example/ann'] } }] }",
            path("/ann"),
            principal(ISSUER, "ann"),
        ),
        (
            "{ to: [{ operation: { paths: [/issuer] } }], from: [{ source: { requestPrincipals: ['https://issuer.example/*'] } }] }",
            path("/issuer"),
            principal(ISSUER, "*"),
        ),
        (
            "{ to: [{ operation: { paths: [/anybody] } }], from: [{ source: { requestPrincipals: ['*'] } }] }",
            path("/anybody"),
            principal("*", "*"),
        ),
        (
            "{ to: [{ operation: { paths: [/two] } }], from: [{ source: { requestPrincipals: ['https://issuer.example/ann', \
             'accounts@other.example/bob'] } }] }",
            path("/two"),
            ids(&[principal(ISSUER, "ann"), principal(OTHER, "bob")]),
        ),
        (
            "{ to: [{ operation: { paths: [/but-ann] } }], from: [{ source: { requestPrincipals: ['*'], notRequestPrincipals: \
             ['https://issuer.example/ann'] } }] }",
            path("/but-ann"),
            json!({"and_ids": {"ids": [principal("*", "*"), unless(&principal(ISSUER, "ann"))]}}),
        ),
        (
            "{ to: [{ operation: { paths: [/group] } }], when: [{ key: 'request.auth.claims[groups]', values: [admin, 'ops-*'] }] }",
            path("/group"),
            claim(&["groups"], &["admin", "ops-*"]),
        ),
        (
            "{ to: [{ operation: { paths: [/not-group] } }], when: [{ key: 'request.auth.claims[groups]', notValues: [guest] }] }",
            path("/not-group"),
            unless(&claim(&["groups"], &["guest"])),
        ),
        (
            "{ to: [{ operation: { paths: [/nested] } }], when: [{ key: 'request.auth.claims[realm][access][roles]', values: [r] }] }",
            path("/nested"),
            claim(&["realm", "access", "roles"], &["r"]),
        ),
        (
            "{ to: [{ operation: { paths: [/scope] } }], when: [{ key: 'request.auth.claims[scope]', values: ['orders:read'] }] }",
            path("/scope"),
            claim(&["scope"], &["orders:read"]),
        ),
        (
            "{ to: [{ operation: { paths: [/audience] } }], when: [{ key: request.auth.audiences, values: [shop] }] }",
            path("/audience"),
            claim(&["aud"], &["shop"]),
        ),
        (
            "{ to: [{ operation: { paths: [/presenter] } }], when: [{ key: request.auth.presenter, values: ['app-*'] }] }",
            path("/presenter"),
            claim(&["azp"], &["app-*"]),
        ),
        (
            "{ to: [{ operation: { paths: [/principal] } }], when: [{ key: request.auth.principal, values: ['https://issuer.example/ann'] }] }",
            path("/principal"),
            principal(ISSUER, "ann"),
        ),
        (
            "{ to: [{ operation: { paths: [/any-claim] } }], when: [{ key: 'request.auth.claims[email]', values: ['*'] }] }",
            path("/any-claim"),
            claim(&["email"], &["*"]),
        ),
        ("to: [{ operation: { paths: [/open] } }]", path("/open"), any()),
    ];
    let with = |name: &'static str, target: &str, claims: Value| -> Case { case(name, bearing(get(target), &token(claims))) };
    with_policy(trusting("principals"), "p", "ALLOW", rules)
        .gets(&[
            ("nobody", "/ann"),
            ("nobody, where anybody may", "/anybody"),
            ("nobody, where all may", "/open"),
            ("nobody, with a claim that may not be", "/not-group"),
        ])
        .case(with("who is named", "/ann", json!({})))
        .case(with("who is not named", "/ann", json!({"sub": "eve"})))
        .case(with("no subject", "/ann", json!({"sub": null})))
        .case(with("a subject with a slash", "/ann", json!({"sub": "x/ann"})))
        .case(case("the subject at another issuer", bearing(get("/ann"), &other_token())))
        .case(with("anybody of an issuer", "/issuer", json!({"sub": "eve"})))
        .case(case("somebody of another issuer", bearing(get("/issuer"), &other_token())))
        .case(case("anybody", bearing(get("/anybody"), &other_token())))
        .case(with("anybody, without a subject", "/anybody", json!({"sub": null})))
        .case(case("one of two", bearing(get("/two"), &other_token())))
        .case(with("the exception", "/but-ann", json!({})))
        .case(with("not the exception", "/but-ann", json!({"sub": "eve"})))
        .case(with("a claim in a list", "/group", json!({"groups": ["x", "admin"]})))
        .case(with("a claim by prefix", "/group", json!({"groups": ["ops-7"]})))
        .case(with("a claim that is text", "/group", json!({"groups": "admin"})))
        .case(with("a claim with spaces", "/group", json!({"groups": "x admin"})))
        .case(with("a claim that is a number", "/group", json!({"groups": 7})))
        .case(with("an empty list", "/group", json!({"groups": []})))
        .case(with("no such claim", "/group", json!({})))
        .case(with("a claim that may not be", "/not-group", json!({"groups": ["guest", "admin"]})))
        .case(with("any other claim", "/not-group", json!({"groups": ["admin"]})))
        .case(with("a nested claim", "/nested", json!({"realm": {"access": {"roles": ["q", "r"]}}})))
        .case(with("a nested claim that ends early", "/nested", json!({"realm": {"access": "r"}})))
        .case(with("a name with brackets is no nested claim", "/nested", json!({"realm.access.roles": "r"})))
        .case(with("a scope", "/scope", json!({"scope": "orders:write orders:read"})))
        .case(with("another scope", "/scope", json!({"scope": "orders:readall"})))
        .case(with("an audience", "/audience", json!({})))
        .case(with("one of several audiences", "/audience", json!({"aud": ["bank", "shop"]})))
        .case(with("another audience", "/audience", json!({"aud": "bank"})))
        .case(with("a presenter", "/presenter", json!({"azp": "app-1"})))
        .case(with("another presenter", "/presenter", json!({"azp": "web"})))
        .case(with("the principal as a condition", "/principal", json!({})))
        .case(with("any value of a claim", "/any-claim", json!({"email": "a@b"})))
        .case(with("an empty value of a claim", "/any-claim", json!({"email": ""})))
}

/// A token is asked for by refusing those without one.
fn required() -> Scenario {
    let rules: Rules = vec![(
        "{ from: [{ source: { notRequestPrincipals: ['*'] } }], to: [{ operation: { notPaths: [/healthz] } }] }",
        and(&[not(&or(&[path("/healthz")]))]),
        unless(&principal("*", "*")),
    )];
    with_policy(trusting("principals-required"), "p", "DENY", rules)
        .gets(&[("required and absent", "/"), ("not required here", "/healthz")])
        .case(case("required and there", bearing(get("/"), &token(json!({})))))
        .case(case("required and expired", bearing(get("/"), &token(json!({"exp": 1})))))
        .case(case("not required here, but expired", bearing(get("/healthz"), &token(json!({"exp": 1})))))
        .case(case("required and absent, gRPC", grpc("/s/m")))
}

pub fn all() -> Vec<Scenario> {
    vec![allowing(), required()]
}
