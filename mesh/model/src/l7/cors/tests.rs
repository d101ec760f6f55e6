use super::*;
use crate::fixture::Req;
use crate::l7::text::{Pattern, StringMatch};

fn policy(origins: Vec<StringMatch>, forward_unmatched: bool) -> Cors {
    Cors {
        origins,
        methods: "GET,POST".into(),
        headers: "x-a,x-b".into(),
        expose: "x-e".into(),
        max_age: Some(600),
        credentials: true,
        forward_unmatched,
    }
}
fn origins() -> Vec<StringMatch> {
    vec![
        StringMatch::Exact("http://a.com".into()),
        StringMatch::Prefix("http://p.".into()),
        StringMatch::Regex(Pattern::parse(r"http://.*\.r\.com").expect("a pattern")),
    ]
}
fn headers(of: &[(&'static str, &str)]) -> HeaderMap {
    of.iter().fold(Req::get("/"), |req, (name, value)| req.header(name, value)).headers
}
const ORIGIN_A: (&str, &str) = ("origin", "http://a.com");
const ORIGIN_B: (&str, &str) = ("origin", "http://b.com");
const PREFLIGHT: (&str, &str) = ("access-control-request-method", "GET");
const ALLOW_ORIGIN: (&str, &str) = ("access-control-allow-origin", "http://a.com");
const CREDENTIALS: (&str, &str) = ("access-control-allow-credentials", "true");
const METHODS: (&str, &str) = ("access-control-allow-methods", "GET,POST");
const HEADERS: (&str, &str) = ("access-control-allow-headers", "x-a,x-b");
const MAX_AGE: (&str, &str) = ("access-control-max-age", "600");
const EXPOSE: (&str, &str) = ("access-control-expose-headers", "x-e");

/// Rows of spec/waypoint §10, measured on Envoy 1.40.
#[test]
fn decisions() {
    let full = CorsDecision::Preflight(headers(&[ALLOW_ORIGIN, CREDENTIALS, METHODS, HEADERS, MAX_AGE, EXPOSE]));
    let anonymous = CorsDecision::Preflight(headers(&[CREDENTIALS, METHODS, HEADERS, MAX_AGE]));
    let simple = CorsDecision::Simple(headers(&[ALLOW_ORIGIN, CREDENTIALS, EXPOSE]));
    let (forward, ignore) = (true, false);
    for (unmatched, method, request, want) in [
        (forward, Method::OPTIONS, vec![ORIGIN_A, PREFLIGHT], &full),
        (ignore, Method::OPTIONS, vec![ORIGIN_A, PREFLIGHT], &full),
        (forward, Method::OPTIONS, vec![ORIGIN_B, PREFLIGHT], &CorsDecision::Forward),
        (ignore, Method::OPTIONS, vec![ORIGIN_B, PREFLIGHT], &anonymous),
        // No preflight without the method it asks for.
        (ignore, Method::OPTIONS, vec![ORIGIN_A], &simple),
        (ignore, Method::OPTIONS, vec![ORIGIN_B], &CorsDecision::SimpleUnmatched),
        (forward, Method::OPTIONS, vec![ORIGIN_A, ("access-control-request-method", "")], &simple),
        (forward, Method::GET, vec![ORIGIN_A, PREFLIGHT], &simple),
        (forward, Method::GET, vec![ORIGIN_A], &simple),
        (ignore, Method::POST, vec![ORIGIN_B], &CorsDecision::SimpleUnmatched),
        // No origin, no CORS.
        (ignore, Method::OPTIONS, vec![PREFLIGHT], &CorsDecision::NotCors),
        (forward, Method::GET, vec![("origin", "")], &CorsDecision::NotCors),
        (forward, Method::GET, vec![], &CorsDecision::NotCors),
        // Origins are compared as they stand, and several are one.
        (forward, Method::GET, vec![("origin", "HTTP://A.com")], &CorsDecision::SimpleUnmatched),
        (forward, Method::GET, vec![("origin", "http://x.r.com.evil")], &CorsDecision::SimpleUnmatched),
        (forward, Method::GET, vec![ORIGIN_A, ORIGIN_B], &CorsDecision::SimpleUnmatched),
        (forward, Method::GET, vec![("origin", ""), ORIGIN_A], &CorsDecision::SimpleUnmatched),
        (forward, Method::OPTIONS, vec![ORIGIN_A, PREFLIGHT, ("access-control-request-private-network", "true")], &full),
    ] {
        assert_eq!(decide(&policy(origins(), unmatched), &method, &headers(&request)), *want, "{unmatched} {method} {request:?}");
    }
}
#[test]
fn kinds_of_origins() {
    let star = |x: StringMatch| policy(vec![x], true);
    let pattern = |p: &str| StringMatch::Regex(Pattern::parse(p).expect("a pattern"));
    for (cors, origin, allowed) in [
        (policy(origins(), true), "http://p.x", true),
        (policy(origins(), true), "http://x.r.com", true),
        // `*` allows everybody, and the origin is still echoed.
        (star(StringMatch::Exact("*".into())), "http://z", true),
        (star(pattern(r"\*")), "http://z", true),
        (star(StringMatch::Present), "http://z", true),
        (star(pattern("null")), "null", true),
        (policy(vec![], true), "http://z", false),
    ] {
        let got = decide(&cors, &Method::GET, &headers(&[("origin", origin)]));
        let echoed = match &got {
            CorsDecision::Simple(h) => h.get("access-control-allow-origin").is_some_and(|v| v == origin),
            _ => false,
        };
        assert_eq!(echoed, allowed, "{:?} {origin}", cors.origins);
    }
}
#[test]
fn what_is_not_written_is_not_sent() {
    let least = Cors { origins: origins(), forward_unmatched: true, ..Cors::default() };
    let only = headers(&[ALLOW_ORIGIN]);
    let got = decide(&least, &Method::OPTIONS, &headers(&[ORIGIN_A, PREFLIGHT]));
    assert_eq!(got, CorsDecision::Preflight(only.clone()));
    assert_eq!(decide(&least, &Method::GET, &headers(&[ORIGIN_A])), CorsDecision::Simple(only));
}
