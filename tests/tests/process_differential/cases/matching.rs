//! Which route: every kind of match of a VirtualService. Routes answer directly with their own name.
use serde_json::{Value, json};

use crate::case::{Scenario, case, get, raw, request, scenario};
use crate::istiod::{Route, on};

fn names(name: &str, matching: Value) -> Route {
    on(matching).respond(200, name)
}

/// A VirtualService whose rules answer with their name.
fn rules(list: &[(&str, &str)]) -> String {
    list.iter()
        .map(|(name, matches)| format!("- match: {matches}\n  directResponse: {{ status: 200, body: {{ string: {name} }} }}\n"))
        .collect()
}

pub fn all() -> Vec<Scenario> {
    vec![paths(), fields(), queries(), combinations()]
}

fn paths() -> Scenario {
    scenario("match-path")
        .virtual_service(&rules(&[
            ("exact", "[{ uri: { exact: /exact } }]"),
            ("prefix", "[{ uri: { prefix: /pre } }]"),
            ("regex", "[{ uri: { regex: '/re/[0-9]+' } }]"),
            ("nocase", "[{ uri: { exact: /NoCase }, ignoreUriCase: true }]"),
            ("nocasepre", "[{ uri: { prefix: /AnyCase/ }, ignoreUriCase: true }]"),
            ("slashes", "[{ uri: { exact: //two } }]"),
        ]))
        .route(names("exact", json!({"path": "/exact", "case_sensitive": true})))
        .route(names("prefix", json!({"prefix": "/pre", "case_sensitive": true})))
        .route(names("regex", json!({"safe_regex": {"regex": "/re/[0-9]+"}, "case_sensitive": true})))
        .route(names("nocase", json!({"path": "/NoCase", "case_sensitive": false})))
        .route(names("nocasepre", json!({"prefix": "/AnyCase/", "case_sensitive": false})))
        .route(names("slashes", json!({"path": "//two", "case_sensitive": true})))
        .gets(&[
            ("exact path", "/exact"),
            ("exact with query", "/exact?a=b&c"),
            ("exact is not a prefix", "/exact/"),
            ("exact minds case", "/EXACT"),
            ("prefix itself", "/pre"),
            ("prefix is a prefix of characters", "/prefix/x"),
            ("prefix with query", "/pre?x"),
            ("regex whole", "/re/12"),
            ("regex is anchored at the end", "/re/12/x"),
            ("regex does not match letters", "/re/ab"),
            ("regex ignores the query", "/re/12?q=/"),
            ("exact without case", "/nocASE"),
            ("prefix without case", "/anycase/Thing"),
            ("nothing matches", "/nothing"),
            ("dot segment is resolved", "/x/../exact"),
            ("dot segments above the root", "/../../exact"),
            ("single dots", "/./pre/./x"),
            ("encoded letters are decoded", "/%65xact"),
            ("encoded slash stays", "/pre%2Fx"),
            ("encoded dots are resolved", "/x/%2e%2e/exact"),
            ("double slash stays", "//two"),
            ("double slash is not one", "//exact"),
            ("backslash is a slash", "/x\\..\\exact"),
            ("semicolon is part of the path", "/exact;v=1"),
            ("trailing dots", "/pre/.."),
        ])
        .case(case("absolute form", raw("GET http://$HOST/exact HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\n\r\n")))
        .case(case("absolute form without path", raw("GET http://$HOST HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\n\r\n")))
        .case(case("fragment in the target", get("/exact#frag")))
        .case(case("encoded zero", get("/pre%00x")))
        .case(case("by HTTP/2", get("/exact").h2()))
        .case(case("nothing matches by HTTP/2", get("/nothing").h2()))
}

fn fields() -> Scenario {
    let header = |name: &str, matching: Value| {
        let mut header = matching;
        header["name"] = name.into();
        json!({"prefix": "/", "headers": [header]})
    };
    scenario("match-fields")
        .virtual_service(&rules(&[
            ("post", "[{ uri: { prefix: / }, method: { exact: POST } }]"),
            ("exact", "[{ headers: { x-exact: { exact: Yes } } }]"),
            ("prefix", "[{ headers: { x-prefix: { prefix: ab } } }]"),
            ("regex", "[{ headers: { x-regex: { regex: 'a+b' } } }]"),
            ("present", "[{ headers: { x-present: {} } }]"),
            ("star", "[{ headers: { x-star: { regex: '*' } } }]"),
            ("authority", "[{ authority: { exact: other.example } }]"),
            ("authprefix", "[{ authority: { prefix: api. } }]"),
            ("https", "[{ scheme: { exact: https } }]"),
            ("lower", "[{ headers: { X-Upper: { exact: u } } }]"),
            ("without", "[{ uri: { prefix: /without }, withoutHeaders: { x-no: { exact: bad } } }]"),
            ("absent", "[{ uri: { prefix: /absent }, withoutHeaders: { x-no: {} } }]"),
            ("http", "[{ scheme: { exact: http } }]"),
        ]))
        .route(names("post", json!({"prefix": "/", "headers": [{"name": ":method", "string_match": {"exact": "POST"}}]})))
        .route(names("exact", header("x-exact", json!({"string_match": {"exact": "Yes"}}))))
        .route(names("prefix", header("x-prefix", json!({"string_match": {"prefix": "ab"}}))))
        .route(names("regex", header("x-regex", json!({"string_match": {"safe_regex": {"regex": "a+b"}}}))))
        .route(names("present", header("x-present", json!({"present_match": true}))))
        .route(names("star", header("x-star", json!({"present_match": true}))))
        .route(names("authority", header(":authority", json!({"string_match": {"exact": "other.example"}}))))
        .route(names("authprefix", header(":authority", json!({"string_match": {"prefix": "api."}}))))
        .route(names("https", header(":scheme", json!({"string_match": {"exact": "https"}}))))
        .route(names("lower", header("x-upper", json!({"string_match": {"exact": "u"}}))))
        .route(names(
            "without",
            json!({"prefix": "/without", "headers": [{"name": "x-no", "string_match": {"exact": "bad"}, "invert_match": true,
                "treat_missing_header_as_empty": true}]}),
        ))
        .route(names(
            "absent",
            json!({"prefix": "/absent", "headers": [{"name": "x-no", "present_match": true, "invert_match": true}]}),
        ))
        .route(names("http", header(":scheme", json!({"string_match": {"exact": "http"}}))))
        .case(case("method", request("POST", "/a")))
        .case(case("header exact", get("/a").header("x-exact", "Yes")))
        .case(case("header exact minds case", get("/a").header("x-exact", "yes")))
        .case(case("header name in capitals", get("/a").header("X-EXACT", "Yes")))
        .case(case("header prefix", get("/a").header("x-prefix", "abc")))
        .case(case("header regex", get("/a").header("x-regex", "aab")))
        .case(case("header regex is anchored", get("/a").header("x-regex", "aabx")))
        .case(case("header present", get("/a").header("x-present", "anything")))
        .case(case("header present but empty", get("/a").header("x-present", "")))
        .case(case("header star", get("/a").header("x-star", "z")))
        .case(case("header twice is joined", get("/a").header("x-exact", "Yes").header("x-exact", "Yes")))
        .case(case("header twice by prefix", get("/a").header("x-prefix", "ab").header("x-prefix", "zz")))
        .case(case("header in capitals in the rule", get("/a").header("x-upper", "u")))
        .case(case("authority", get("/a").host("other.example")))
        .case(case("authority with port", get("/a").host("other.example:80")))
        .case(case("authority prefix", get("/a").host("api.other.example")))
        .case(case("authority in capitals", get("/a").host("Other.Example")))
        .case(case("without a value, missing", get("/without")))
        .case(case("without a value, present", get("/without").header("x-no", "bad")))
        .case(case("without a value, another", get("/without").header("x-no", "good")))
        .case(case("absent", get("/absent")))
        .case(case("absent but there", get("/absent").header("x-no", "1")))
        .case(case("scheme", get("/z")))
        .case(case("scheme as forwarded", get("/z").header("x-forwarded-proto", "https")))
        .case(case("scheme by HTTP/2", get("/z").h2()))
}

fn queries() -> Scenario {
    let query = |parameter: Value| json!({"prefix": "/", "query_parameters": [parameter]});
    scenario("match-query")
        .virtual_service(&rules(&[
            ("exact", "[{ queryParams: { a: { exact: '1' } } }]"),
            ("regex", "[{ queryParams: { r: { regex: '[0-9]+' } } }]"),
            ("prefix", "[{ queryParams: { p: { prefix: ab } } }]"),
            ("empty", "[{ queryParams: { e: { exact: '' } } }]"),
        ]))
        .route(names("exact", query(json!({"name": "a", "string_match": {"exact": "1"}}))))
        .route(names("regex", query(json!({"name": "r", "string_match": {"safe_regex": {"regex": "[0-9]+"}}}))))
        .route(names("prefix", query(json!({"name": "p", "string_match": {"prefix": "ab"}}))))
        .route(names("empty", query(json!({"name": "e", "present_match": true}))))
        .gets(&[
            ("exact", "/?a=1"),
            ("exact among others", "/?b=2&a=1&c"),
            ("exact another value", "/?a=2"),
            ("regex", "/?r=42"),
            ("regex is anchored", "/?r=42x"),
            ("prefix", "/?p=abc"),
            ("present without a value", "/?e"),
            ("repeated, the first counts", "/?a=2&a=1"),
            ("repeated, the first matches", "/?a=1&a=2"),
            ("encoded value", "/?a=%31"),
            ("encoded name", "/?%61=1"),
            ("plus is not decoded", "/?p=ab+c"),
            ("names mind case", "/?A=1"),
            ("no query", "/"),
            ("question mark twice", "/?x?a=1"),
        ])
}

fn combinations() -> Scenario {
    scenario("match-several")
        .virtual_service(&rules(&[
            ("both", "[{ uri: { prefix: /a }, headers: { x-k: { exact: '1' } }, method: { exact: GET } }]"),
            ("either", "[{ uri: { exact: /one } }, { uri: { exact: /two } }]"),
            ("first", "[{ uri: { prefix: /a } }]"),
            ("later", "[{ uri: { exact: /a/b } }]"),
            ("port", "[{ uri: { prefix: /port }, port: 80 }]"),
            ("otherport", "[{ uri: { prefix: /other }, port: 81 }]"),
            ("labels", "[{ uri: { prefix: /labels }, sourceLabels: { app: nobody } }]"),
        ]))
        .route(names(
            "both",
            json!({"prefix": "/a", "headers": [{"name": "x-k", "string_match": {"exact": "1"}},
                {"name": ":method", "string_match": {"exact": "GET"}}]}),
        ))
        .route(names("either", json!({"path": "/one"})))
        .route(names("either", json!({"path": "/two"})))
        .route(names("first", json!({"prefix": "/a"})))
        .route(names("later", json!({"path": "/a/b"})))
        .route(names("port", json!({"prefix": "/port"})))
        .case(case("all of one match", get("/a").header("x-k", "1")))
        .case(case("all but one of a match", request("PUT", "/a").header("x-k", "1")))
        .gets(&[
            ("first of a list", "/one"),
            ("second of a list", "/two"),
            ("the first rule wins over the more exact one", "/a/b"),
            ("port of the service", "/port"),
            ("another port", "/other"),
            ("source labels are not looked at", "/labels"),
        ])
}
