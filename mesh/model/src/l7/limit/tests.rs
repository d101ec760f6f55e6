use super::*;
use crate::fixture::Req;
use std::collections::hash_map::DefaultHasher;
use std::time::Duration;

fn limit(key: Vec<KeyPart>, which: Which) -> Limit {
    let rate = Rate::new(10, 10, Duration::from_mins(1)).expect("a rate");
    let counts = Counts { policy: "TrafficPolicy t/p".into(), name: "n".into(), which, key, rate };
    Limit::new(counts, Point::BeforeAuthentication, true, http::StatusCode::TOO_MANY_REQUESTS, Vec::new())
}

fn hash(limit: &Limit, req: &Req, client: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    limit.hash_key(&req.facts(), client.parse().expect("an address"), &mut hasher);
    hasher.finish()
}

#[test]
fn keys_tell_apart_what_they_name_and_nothing_else() {
    let name = HeaderName::from_static("x-tenant");
    let with = |values: &[&str]| values.iter().fold(Req::get("/a?x=1"), |r, v| r.header("x-tenant", v));
    let by_ip = limit(vec![KeyPart::SourceIp { v4: 32, v6: 64 }], Which::default());
    let by_header = limit(vec![KeyPart::Header(name)], Which::default());
    let by_path = limit(vec![KeyPart::Path], Which::default());
    let by_host = limit(vec![KeyPart::Authority], Which::default());
    let host = |host: &str| Req::get("/").host(host);
    let (a, b) = ("10.0.0.1", "10.0.0.2");
    for (limit, (left, from), (right, to), same) in [
        (&by_ip, (with(&[]), a), (with(&["t"]), a), true),
        (&by_ip, (with(&[]), a), (with(&[]), b), false),
        (&by_ip, (with(&[]), a), (with(&[]), "::ffff:10.0.0.1"), true),
        (&by_ip, (with(&[]), "2001:db8::1"), (with(&[]), "2001:db8::ffff:0:1"), true),
        (&by_ip, (with(&[]), "2001:db8::1"), (with(&[]), "2001:db8:0:1::1"), false),
        (&by_header, (with(&["t"]), a), (with(&["t"]), b), true),
        (&by_header, (with(&["t"]), a), (with(&["u"]), a), false),
        (&by_header, (with(&["t"]), a), (with(&[]), a), false),
        (&by_header, (with(&[]), a), (with(&[]), b), true),
        (&by_header, (with(&["t", "u"]), a), (with(&["tu"]), a), false),
        (&by_header, (with(&["t", "u"]), a), (with(&["t"]), a), false),
        (&by_path, (Req::get("/a?x"), a), (Req::get("/a?y"), a), true),
        (&by_path, (Req::get("/a"), a), (Req::get("/b"), a), false),
        (&by_host, (host("a.example"), a), (host("A.Example.:80"), a), true),
        (&by_host, (host("a.example"), a), (host("b.example"), a), false),
        (&by_host, (host("[2001:db8::1]:80"), a), (host("[2001:db8::1]"), a), true),
    ] {
        assert_eq!(hash(limit, &left, from) == hash(limit, &right, to), same, "{left:?} {right:?}");
    }
}
struct Claimed(&'static str, &'static str);
impl crate::l7::route::Claims for Claimed {
    fn matches(&self, _: &[Arc<str>], _: &crate::l7::StringMatch) -> bool {
        false
    }
    fn hash_claim(&self, path: &[Arc<str>], mut hasher: &mut dyn Hasher) {
        (self.0, path.first().filter(|p| &***p == "sub").map(|_| self.1)).hash(&mut hasher);
    }
}
#[test]
fn claims_tell_users_apart_and_those_without_a_token() {
    let of = |path: &str, claims: Option<&Claimed>| {
        let limit = limit(vec![KeyPart::Claim(Box::new([path.into()]))], Which::default());
        let req = Req::get("/");
        let mut hasher = DefaultHasher::new();
        let facts = RequestFacts { claims: claims.map(|c| c as _), ..req.facts() };
        limit.hash_key(&facts, "10.0.0.1".parse().expect("an address"), &mut hasher);
        hasher.finish()
    };
    let (me, you, other) = (Claimed("a", "me"), Claimed("a", "you"), Claimed("b", "me"));
    assert_eq!(of("sub", Some(&me)), of("sub", Some(&me)));
    assert_ne!(of("sub", Some(&me)), of("sub", Some(&you)));
    assert_ne!(of("sub", Some(&me)), of("sub", Some(&other)), "of another issuer");
    assert_ne!(of("sub", Some(&me)), of("sub", None));
    assert_eq!(of("tenant", Some(&me)), of("tenant", Some(&you)), "who lacks it shares a bucket");
}
#[test]
fn a_bucket_belongs_to_what_its_limit_counts() {
    let per_ip = || limit(vec![KeyPart::SourceIp { v4: 32, v6: 64 }], Which::default());
    let same = Limit { tells: None, status: http::StatusCode::SERVICE_UNAVAILABLE, ..per_ip() };
    assert_eq!(hash(&per_ip(), &Req::get("/"), "::1"), hash(&same, &Req::get("/"), "::1"), "survives what does not concern it");
    let mut counts = per_ip().counts;
    counts.rate = Rate::new(11, 10, Duration::from_mins(1)).expect("a rate");
    let other = Limit::new(counts, Point::BeforeAuthentication, true, http::StatusCode::TOO_MANY_REQUESTS, Vec::new());
    assert_ne!(hash(&per_ip(), &Req::get("/"), "::1"), hash(&other, &Req::get("/"), "::1"));
}
#[test]
fn masks() {
    for (ip, v4, v6, expect) in [
        ("10.1.2.3", 32, 0, "10.1.2.3"),
        ("10.1.2.3", 24, 0, "10.1.2.0"),
        ("10.1.2.3", 0, 0, "0.0.0.0"),
        ("2001:db8:1:2:3::4", 0, 64, "2001:db8:1:2::"),
        ("2001:db8:1:2:3::4", 0, 128, "2001:db8:1:2:3::4"),
        ("2001:db8:1:2:3::4", 0, 0, "::"),
    ] {
        assert_eq!(masked(ip.parse().expect("an address"), v4, v6).to_string(), expect, "{ip}/{v4}/{v6}");
    }
}
#[test]
fn which_requests_count() {
    let which = Which {
        methods: vec![Method::POST, Method::PUT],
        paths: vec![PathPattern::parse("/admin/*").expect("a path")],
        headers: vec![(HeaderName::from_static("x-plan"), "free".into())],
    };
    let limit = limit(Vec::new(), which);
    let req = |method: Method, path: &str, plan: &str| Req::get(path).method(method).header("x-plan", plan);
    for (req, counted) in [
        (req(Method::POST, "/admin/x", "free"), true),
        (req(Method::GET, "/admin/x", "free"), false),
        (req(Method::PUT, "/user/x", "free"), false),
        (req(Method::PUT, "/admin/x", "gold"), false),
        (req(Method::PUT, "/admin/x", "gold").header("x-plan", "free"), true),
    ] {
        assert_eq!(limit.concerns(&req.facts()), counted, "{req:?}");
    }
}
