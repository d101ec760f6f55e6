//! AuthorizationPolicies: what HTTP says of a request.
use serde_json::{Value, json};

use crate::case::{Req, Scenario, case, get, grpc, raw, request, scenario};
use crate::istiod::{all as catch_all, prefix};

/// A policy for the service, as a user writes it.
pub fn policy(name: &str, action: &str, rules: &[String]) -> String {
    let rules: String = rules.iter().map(|rule| format!("  - {rule}\n")).collect();
    let rules = if rules.is_empty() { "  rules: []\n".into() } else { format!("  rules:\n{rules}") };
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: $NAME-{name}, namespace: d }}\nspec:\n  \
         targetRefs: [{{ group: '', kind: Service, name: $NAME }}]\n  action: {action}\n{rules}"
    )
}

/// The filter istiod makes of all policies of one action: each rule as permissions and principals.
fn rbac(action: &str, rules: &[(String, Value, Value)]) -> Value {
    let policies: serde_json::Map<String, Value> = rules
        .iter()
        .map(|(name, permission, principal)| (name.clone(), json!({"permissions": [permission], "principals": [principal]})))
        .collect();
    json!({"rules": {"action": action, "policies": policies}})
}

impl Scenario {
    fn rbac(self, action: &str, rules: &[(String, Value, Value)]) -> Self {
        self.filter("envoy.filters.http.rbac", "rbac.v3.RBAC", rbac(action, rules))
    }
}

pub fn any() -> Value {
    json!({"any": true})
}
pub fn and(rules: &[Value]) -> Value {
    json!({"and_rules": {"rules": rules}})
}
pub fn or(rules: &[Value]) -> Value {
    json!({"or_rules": {"rules": rules}})
}
pub fn not(rule: &Value) -> Value {
    json!({"not_rule": rule})
}
/// `a`, `a*`, `*a`
pub fn text(pattern: &str) -> Value {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(suffix), _) => json!({"suffix": suffix}),
        (_, Some(prefix)) => json!({"prefix": prefix}),
        _ => json!({"exact": pattern}),
    }
}
pub fn path(pattern: &str) -> Value {
    if pattern.contains('{') {
        let template = pattern.replace("{*}", "*").replace("{**}", "**");
        let kind = "type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig";
        return json!({"uri_template": {"name": "uri-template", "typed_config": {"@type": kind, "path_template": template}}});
    }
    json!({"url_path": {"path": text(pattern)}})
}
fn method(name: &str) -> Value {
    json!({"header": {"name": ":method", "string_match": {"exact": name}}})
}
fn host(pattern: &str) -> Value {
    let mut text = text(pattern);
    text["ignore_case"] = true.into();
    json!({"header": {"name": ":authority", "string_match": text}})
}
fn header(name: &str, pattern: &str) -> Value {
    if pattern == "*" {
        return json!({"header": {"name": name, "present_match": true}});
    }
    json!({"header": {"name": name, "string_match": text(pattern)}})
}
fn role(patterns: &[&str]) -> Value {
    json!({"or_ids": {"ids": patterns.iter().map(|pattern| header("x-role", pattern)).collect::<Vec<_>>()}})
}

/// The rules of a policy: as written, and as permissions and principals.
pub type Rules = Vec<(&'static str, Value, Value)>;

pub fn with_policy(scenario: Scenario, name: &str, action: &str, rules: Rules) -> Scenario {
    let written: Vec<String> = rules.iter().map(|(yaml, ..)| (*yaml).to_owned()).collect();
    let named: Vec<(String, Value, Value)> = rules
        .into_iter()
        .enumerate()
        .map(|(n, (_, permission, principal))| {
            (format!("ns[d]-policy[{}-{name}]-rule[{n}]", scenario.name), permission, principal)
        })
        .collect();
    scenario.object(&policy(name, action, &written)).rbac(action, &named)
}

fn allowing() -> Scenario {
    let op = |yaml: &'static str, all: &[Value]| (yaml, and(all), any());
    let rules = vec![
        op("to: [{ operation: { paths: [/exact, /other] } }]", &[or(&[path("/exact"), path("/other")])]),
        op("to: [{ operation: { paths: ['/pre*'] } }]", &[path("/pre*")]),
        op("to: [{ operation: { paths: ['*.css'] } }]", &[path("*.css")]),
        op(
            "to: [{ operation: { methods: [PUT, PATCH], paths: ['/m/*'] } }]",
            &[or(&[method("PUT"), method("PATCH")]), path("/m/*")],
        ),
        op(
            "to: [{ operation: { paths: ['/not/*'], notPaths: ['/not/secret*'] } }]",
            &[path("/not/*"), not(&path("/not/secret*"))],
        ),
        op("to: [{ operation: { paths: [/nm], notMethods: [DELETE] } }]", &[path("/nm"), not(&method("DELETE"))]),
        op("to: [{ operation: { hosts: [allowed.example], paths: [/h1] } }]", &[host("allowed.example"), path("/h1")]),
        op("to: [{ operation: { hosts: ['*.wild.example'], paths: [/h2] } }]", &[host("*.wild.example"), path("/h2")]),
        op("to: [{ operation: { hosts: ['pre.*'], paths: [/h3] } }]", &[host("pre.*"), path("/h3")]),
        op("to: [{ operation: { notHosts: [bad.example], paths: [/h4] } }]", &[not(&host("bad.example")), path("/h4")]),
        op("to: [{ operation: { paths: ['/t1/{*}/end'] } }]", &[path("/t1/{*}/end")]),
        op("to: [{ operation: { paths: ['/t2/{**}'] } }]", &[path("/t2/{**}")]),
        op("to: [{ operation: { paths: ['/t3/{**}/end'] } }]", &[path("/t3/{**}/end")]),
        (
            "{ to: [{ operation: { paths: [/role] } }], when: [{ key: 'request.headers[x-role]', values: [admin, 'ops-*'] }] }",
            path("/role"),
            role(&["admin", "ops-*"]),
        ),
        (
            "{ to: [{ operation: { paths: [/norole] } }], when: [{ key: 'request.headers[x-role]', notValues: [guest] }] }",
            path("/norole"),
            json!({"not_id": role(&["guest"])}),
        ),
        (
            "{ to: [{ operation: { paths: [/anyrole] } }], when: [{ key: 'request.headers[x-role]', values: ['*'] }] }",
            path("/anyrole"),
            role(&["*"]),
        ),
    ];
    let host = |host: &str, target: &str| get(target).host(host);
    with_policy(scenario("policy-allow"), "p", "ALLOW", rules)
        .gets(&[
            ("exact path", "/exact"),
            ("another exact path", "/other"),
            ("exact path with a query", "/exact?a=b"),
            ("exact path with more", "/exact/"),
            ("exact path in capitals", "/EXACT"),
            ("no rule", "/nothing"),
            ("prefix", "/prefixed/by"),
            ("prefix alone", "/pre"),
            ("prefix by dot segments", "/x/../pre"),
            ("prefix left by dot segments", "/pre/../nothing"),
            ("prefix left by encoded dot segments", "/pre/%2e%2e/nothing"),
            ("prefix with two slashes", "//pre"),
            ("prefix behind a backslash", "/x\\..\\pre"),
            ("suffix", "/style/a.css"),
            ("suffix before a query", "/a.css?x=1"),
            ("suffix in the query", "/a?x=.css"),
            ("not within", "/not/public"),
            ("not the exception", "/not/secrets"),
            ("not the exception by dot segments", "/not/x/../secrets"),
            ("template", "/t1/one/end"),
            ("template, two segments", "/t1/one/two/end"),
            ("template, no segment", "/t1//end"),
            ("template, the end differs", "/t1/one/ending"),
            ("template with a query", "/t1/one/end?x=1"),
            ("template of any depth", "/t2/a/b/c"),
            ("template of any depth, one", "/t2/a"),
            ("template of any depth, none", "/t2/"),
            ("template of any depth, not even a slash", "/t2"),
            ("template in the middle", "/t3/a/b/end"),
            ("template in the middle, none", "/t3/end"),
            ("template in the middle, empty", "/t3//end"),
        ])
        .case(case("method", request("PUT", "/m/x").body(b"x")))
        .case(case("another method", request("PATCH", "/m/x").body(b"x")))
        .case(case("method that is not named", get("/m/x")))
        .case(case("not this method", request("DELETE", "/nm")))
        .case(case("any but this method", get("/nm")))
        .case(case("host", host("allowed.example", "/h1")))
        .case(case("host in capitals", host("Allowed.EXAMPLE", "/h1")))
        .case(case("another host", host("denied.example", "/h1")))
        .case(case("host by suffix", host("a.wild.example", "/h2")))
        .case(case("host by suffix, capitals", host("A.WILD.example", "/h2")))
        .case(case("host without the part before", host("wild.example", "/h2")))
        .case(case("host by prefix", host("pre.anything", "/h3")))
        .case(case("not this host", host("bad.example", "/h4")))
        .case(case("any but this host", host("good.example", "/h4")))
        .case(case("header", get("/role").header("x-role", "admin")))
        .case(case("header by prefix", get("/role").header("x-role", "ops-7")))
        .case(case("another value", get("/role").header("x-role", "guest")))
        .case(case("no header", get("/role")))
        .case(case("header in capitals", get("/role").header("X-Role", "admin")))
        .case(case("not this value", get("/norole").header("x-role", "guest")))
        .case(case("any but this value", get("/norole").header("x-role", "admin")))
        .case(case("no header for any but this value", get("/norole")))
        .case(case("header with any value", get("/anyrole").header("x-role", "x")))
        .case(case("header with an empty value", get("/anyrole").header("x-role", "")))
        .case(case("refused HEAD", request("HEAD", "/nothing")))
        .case(case("refused by HTTP/2", get("/nothing").h2()))
        .case(case("refused gRPC call", grpc("/s/m")))
}

fn denying() -> Scenario {
    let rules: Rules = vec![
        ("to: [{ operation: { paths: ['/deny*'] } }]", path("/deny*"), any()),
        ("to: [{ operation: { methods: [DELETE] } }]", method("DELETE"), any()),
        ("to: [{ operation: { hosts: [bad.example] } }]", host("bad.example"), any()),
        ("when: [{ key: 'request.headers[x-role]', values: [guest] }]", any(), role(&["guest"])),
        ("to: [{ operation: { paths: [/only-get], notMethods: [GET] } }]", and(&[path("/only-get"), not(&method("GET"))]), any()),
    ];
    let line = |target: &str| raw(&format!("GET {target} HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\n\r\n"));
    with_policy(scenario("policy-deny"), "deny", "DENY", rules)
        .gets(&[
            ("nothing matches", "/fine"),
            ("path", "/denied"),
            ("path with a query", "/deny?x=1"),
            ("path by dot segments", "/x/../deny"),
            ("path by encoded letters", "/%64eny"),
            ("path by encoded dots", "/x/%2E%2e/deny"),
            ("path behind a dot segment", "/./deny"),
            ("path behind two slashes", "//deny"),
            ("path behind an encoded slash", "/%2fdeny"),
            ("path with a parameter before it", "/x;/../deny"),
            ("path in capitals", "/DENY"),
            ("only this method is left", "/only-get"),
        ])
        .case(case("whole URI as the target", line("http://x.example/deny")))
        .case(case("method", request("DELETE", "/fine")))
        .case(case("host", get("/fine").host("bad.example")))
        .case(case("host in capitals", get("/fine").host("BAD.example")))
        .case(case("header", get("/fine").header("x-role", "guest")))
        .case(case("header without a value that matches", get("/fine").header("x-role", "admin")))
        .case(case("another method than the one left", request("POST", "/only-get").body(b"")))
        .case(case("refused gRPC call", grpc("/deny/m")))
        .case(case("two rules match", request("DELETE", "/deny")))
}

/// Both: what is allowed may still be denied.
fn together() -> Scenario {
    let deny: Rules = vec![("to: [{ operation: { paths: ['/a/secret*'] } }]", path("/a/secret*"), any())];
    let allow: Rules = vec![(
        "to: [{ operation: { paths: ['/a/*', '/r/*', '/moved'] } }]",
        or(&[path("/a/*"), path("/r/*"), path("/moved")]),
        any(),
    )];
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let http = format!(
        "- match: [{{ uri: {{ prefix: /r/ }} }}]\n  rewrite: {{ uri: /a/secret/ }}\n{to}- match: [{{ uri: {{ exact: /moved }} }}]\n  redirect: {{ uri: /a/secret }}\n\
         - match: [{{ uri: {{ exact: /direct }} }}]\n  directResponse: {{ status: 200 }}\n\
         - match: [{{ uri: {{ prefix: /a/cors }} }}]\n  corsPolicy: {{ allowOrigins: [{{ exact: 'http://a' }}], allowMethods: [GET] }}\n{to}-{}",
        &to[1..]
    );
    let scenario = scenario("policy-both")
        .virtual_service(&http)
        .route(prefix("/r/").to("").action(json!({"prefix_rewrite": "/a/secret/"})))
        .route(crate::istiod::on(json!({"path": "/moved"})).redirect(json!({"path_redirect": "/a/secret"})))
        .route(crate::istiod::on(json!({"path": "/direct"})).respond(200, ""))
        .route(
            prefix("/a/cors").to("").cors(json!({"allow_origin_string_match": [{"exact": "http://a"}], "allow_methods": "GET",
            "filter_enabled": {"default_value": {"numerator": 100}}})),
        )
        .route(catch_all().to(""));
    let preflight =
        |target: &str| request("OPTIONS", target).header("origin", "http://a").header("access-control-request-method", "GET");
    let simple = |target: &str| -> Req { get(target).header("origin", "http://a") };
    with_policy(with_policy(scenario, "no", "DENY", deny), "yes", "ALLOW", allow)
        .gets(&[
            ("allowed", "/a/x"),
            ("allowed, but denied", "/a/secrets"),
            ("neither", "/b"),
            ("judged before the rewrite", "/r/x"),
            ("redirect that is allowed", "/moved"),
            ("direct response that is not allowed", "/direct"),
            ("no route would be left either", "/c/d"),
        ])
        .case(case("preflight that is allowed", preflight("/a/cors")))
        .case(case("preflight that is not allowed", preflight("/b/cors")))
        .case(case("CORS headers of a refusal", simple("/a/secret")))
        .case(case("CORS headers of what is allowed", simple("/a/cors")))
}

pub fn all() -> Vec<Scenario> {
    vec![
        allowing(),
        denying(),
        together(),
        with_policy(scenario("policy-nothing-allowed"), "none", "ALLOW", Vec::new()).gets(&[("nothing is allowed", "/")]),
        with_policy(scenario("policy-nothing-denied"), "none", "DENY", Vec::new()).gets(&[("nothing is denied", "/")]),
        with_policy(scenario("policy-all-allowed"), "any", "ALLOW", vec![("{}", any(), any())]).gets(&[("all is allowed", "/")]),
        with_policy(scenario("policy-all-denied"), "any", "DENY", vec![("{}", any(), any())])
            .gets(&[("all is denied", "/")])
            .case(case("all is denied, POST", request("POST", "/").body(b"x"))),
    ]
}
