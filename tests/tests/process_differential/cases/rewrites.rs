//! Path and authority as the endpoint sees them.
use serde_json::json;

use crate::case::{Scenario, case, get, request, scenario};
use crate::istiod::{all as catch_all, on, prefix};

pub fn all() -> Vec<Scenario> {
    let to = "  route: [{ destination: { host: $HOST } }]\n";
    let http = [
        format!("- match: [{{ uri: {{ prefix: /old }} }}]\n  rewrite: {{ uri: /new }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /slash/ }} }}]\n  rewrite: {{ uri: / }}\n{to}"),
        format!("- match: [{{ uri: {{ exact: /only }} }}]\n  rewrite: {{ uri: /other }}\n{to}"),
        format!("- match: [{{ uri: {{ regex: '/r/.*' }} }}]\n  rewrite: {{ uri: /whole }}\n{to}"),
        format!(
            "- match: [{{ uri: {{ prefix: /service }} }}]\n  rewrite: {{ uriRegexRewrite: {{ match: '^/service/([^/]+)(/.*)$', rewrite: '\\2/instance/\\1' }} }}\n{to}"
        ),
        format!("- match: [{{ uri: {{ prefix: /auth }} }}]\n  rewrite: {{ authority: else.example }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /both }} }}]\n  rewrite: {{ uri: /b, authority: else.example }}\n{to}"),
        format!("- match: [{{ uri: {{ prefix: /CASE }}, ignoreUriCase: true }}]\n  rewrite: {{ uri: /lower }}\n{to}"),
        format!("-\n  rewrite: {{ uri: /rooted }}\n{to}"),
    ]
    .concat();
    vec![
        scenario("rewrite")
            .virtual_service(&http)
            .route(prefix("/old").to("").action(json!({"prefix_rewrite": "/new"})))
            .route(prefix("/slash/").to("").action(json!({"prefix_rewrite": "/"})))
            .route(on(json!({"path": "/only"})).to("").action(json!({"prefix_rewrite": "/other"})))
            .route(on(json!({"safe_regex": {"regex": "/r/.*"}})).to("").action(json!({"prefix_rewrite": "/whole"})))
            .route(prefix("/service").to("").action(json!({"regex_rewrite": {
                "pattern": {"regex": "^/service/([^/]+)(/.*)$"}, "substitution": "\\2/instance/\\1"}})))
            .route(prefix("/auth").to("").action(json!({"host_rewrite_literal": "else.example"})))
            .route(prefix("/both").to("").action(json!({"prefix_rewrite": "/b", "host_rewrite_literal": "else.example"})))
            .route(on(json!({"prefix": "/CASE", "case_sensitive": false})).to("").action(json!({"prefix_rewrite": "/lower"})))
            .route(catch_all().to("").action(json!({"prefix_rewrite": "/rooted"})))
            .gets(&[
                ("prefix", "/old/x"),
                ("prefix with query", "/old/x?q=1&r"),
                ("prefix alone", "/old"),
                ("prefix in the middle of a word", "/older"),
                ("prefix to the root", "/slash/x/y"),
                ("exact", "/only"),
                ("exact with query", "/only?z=1"),
                ("regex replaces the whole path", "/r/a/b?k=v"),
                ("groups", "/service/foo/v1/api?x=1"),
                ("groups that do not match", "/service/foo"),
                ("authority", "/auth/x"),
                ("path and authority", "/both/x"),
                ("prefix without case", "/case/Thing"),
                ("root prefix", "/anything?u=1"),
                ("normalised before", "/x/../old/y"),
                ("encoded bytes stay", "/old/%20%C3%A9"),
            ])
            .case(case("POST keeps its body", request("POST", "/old/p").body(b"payload")))
            .case(case("by HTTP/2", get("/both/x?y").h2())),
    ]
}
