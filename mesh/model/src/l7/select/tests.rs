use super::*;
use crate::fixture::{Req, ip, key};
use crate::l7::route::{Claims, HttpRoute, TcpRule};
use crate::l7::text::Pattern;
use http::Method;
use proptest::prelude::*;
use std::collections::HashMap;
use std::time::Instant;

fn exact(x: &str) -> StringMatch {
    StringMatch::Exact(x.into())
}
fn prefix(x: &str) -> StringMatch {
    StringMatch::Prefix(x.into())
}
fn suffix(x: &str) -> StringMatch {
    StringMatch::Suffix(x.into())
}
fn regex(x: &str) -> StringMatch {
    StringMatch::Regex(Pattern::parse(x).expect("a pattern"))
}
fn at(path: PathMatch) -> HttpMatch {
    HttpMatch { path: Some(path), ..HttpMatch::default() }
}
fn name(n: &'static str) -> HeaderName {
    HeaderName::from_static(n)
}
fn rules(all: Vec<HttpMatch>) -> Vec<HttpRule> {
    let route = Arc::new(HttpRoute::plain(&key("ns", "a"), 80));
    all.into_iter().map(|matches| HttpRule { matches: matches.into(), route: Arc::clone(&route) }).collect()
}
fn table(all: Vec<HttpMatch>) -> RouteTable {
    RouteTable { http: rules(all).into(), ..RouteTable::default() }.indexed()
}
fn number(table: &RouteTable, req: &RequestFacts<'_>) -> Option<usize> {
    match select(table, req) {
        Selected::Rule(rule) => table.http.iter().position(|r| std::ptr::eq(r, rule)),
        _ => None,
    }
}

#[test]
fn paths() {
    let text = |p: &str| at(PathMatch::TextPrefix(p.into()));
    let segments = |p: &str| at(PathMatch::SegmentPrefix(p.into()));
    let exactly = |p: &str| at(PathMatch::Exact(p.into()));
    let pattern = |p: &str| at(PathMatch::Regex(Pattern::parse(p).expect("a pattern")));
    let any_case = |m: HttpMatch| HttpMatch { ignore_case: true, ..m };
    for (m, yes, no) in [
        (HttpMatch::default(), vec!["/", "/a"], vec![]),
        // VirtualService: a prefix of the text.
        (text("/a"), vec!["/a", "/ab", "/a/b"], vec!["/", "/b/a", "/A"]),
        (text("/"), vec!["/", "/x"], vec![]),
        (text("/a/"), vec!["/a/", "/a/b"], vec!["/a", "/ab"]),
        // Gateway API: whole segments.
        (segments("/a"), vec!["/a", "/a/", "/a/b"], vec!["/ab", "/", "/A"]),
        (segments("/a/"), vec!["/a", "/a/", "/a/b"], vec!["/ab", "/"]),
        (segments("/"), vec!["/", "/a", "/a/b"], vec![]),
        (exactly("/a"), vec!["/a"], vec!["/a/", "/A", "/ab"]),
        // The whole path, as RE2's full match.
        (pattern("/n.l"), vec!["/nxl"], vec!["/nxla", "/a/nxl"]),
        (pattern("/a|/b"), vec!["/a", "/b"], vec!["/ab", "/a/b"]),
        (any_case(text("/CASE")), vec!["/case", "/CasEs"], vec!["/cas"]),
        (any_case(exactly("/CASE")), vec!["/case"], vec!["/cases"]),
        (any_case(segments("/CASE")), vec!["/case", "/cAse/x"], vec!["/cases"]),
        // `ignoreUriCase` does not apply to patterns.
        (any_case(pattern("/X")), vec!["/X"], vec!["/x"]),
    ] {
        for (paths, want) in [(yes, true), (no, false)] {
            for path in paths {
                assert_eq!(matches(&m, &Req::get(path).facts()), want, "{m:?} {path}");
            }
        }
    }
}

/// Measured on Envoy 1.40 with `string_match`, `invert_match`, `treat_missing_header_as_empty`.
#[test]
fn headers() {
    let with = |x: StringMatch| HttpMatch { headers: vec![(name("x-m"), x)], ..HttpMatch::default() };
    let without = |x: StringMatch| HttpMatch { without_headers: vec![(name("x-m"), x)], ..HttpMatch::default() };
    let two = || Req::get("/").header("x-m", "a").header("x-m", "b");
    let one = || Req::get("/").header("x-m", "a,b");
    let none = || Req::get("/");
    let empty = || Req::get("/").header("x-m", "");
    for (m, on_two, on_one, on_none, on_empty) in [
        (with(exact("a,b")), false, true, false, false),
        (with(exact("a")), true, false, false, false),
        (with(exact("b")), true, false, false, false),
        (with(prefix("a")), true, true, false, false),
        (with(suffix("b")), true, true, false, false),
        (with(regex("a.b")), false, true, false, false),
        (with(regex(".*")), true, true, false, true),
        (with(exact("")), false, false, false, true),
        (with(StringMatch::Present), true, true, false, true),
        (without(exact("a")), false, true, true, true),
        (without(exact("a,b")), true, false, true, true),
        (without(exact("c")), true, true, true, true),
        // A missing header says the empty text.
        (without(exact("")), true, true, false, false),
        (without(regex(".*")), false, false, false, false),
        (without(prefix("")), false, false, false, false),
        // Presence is presence.
        (without(StringMatch::Present), false, false, true, false),
    ] {
        let all = [(two(), on_two), (one(), on_one), (none(), on_none), (empty(), on_empty)];
        for (req, want) in all {
            assert_eq!(matches(&m, &req.facts()), want, "{m:?} {:?}", req.headers);
        }
    }
    // Bytes that are no text do not hide what stands before them, and do not match what they are not.
    let opaque = Req::get("/").header("x-m", b"foo\xff");
    assert!(matches(&with(prefix("foo")), &opaque.facts()));
    assert!(!matches(&with(exact("foo")), &opaque.facts()));
    assert!(!matches(&without(prefix("foo")), &opaque.facts()));
    // Cookies cut in pieces are one text.
    let cookies = Req::get("/").header("cookie", "a=1").header("cookie", "b=2");
    for (x, want) in
        [(exact("a=1; b=2"), true), (exact("b=2"), true), (regex(r"^(.*?;)?\s*(b=2)(;.*)?$"), true), (exact("c"), false)]
    {
        let m = HttpMatch { headers: vec![(name("cookie"), x)], ..HttpMatch::default() };
        assert_eq!(matches(&m, &cookies.facts()), want, "{m:?}");
    }
    // All must hold, and none of the others.
    let both = HttpMatch {
        headers: vec![(name("x-a"), exact("1")), (name("x-b"), exact("2"))],
        without_headers: vec![(name("x-c"), StringMatch::Present), (name("x-d"), exact("4"))],
        ..HttpMatch::default()
    };
    let ab = || Req::get("/").header("x-a", "1").header("x-b", "2");
    assert!(matches(&both, &ab().facts()));
    assert!(!matches(&both, &Req::get("/").header("x-a", "1").facts()));
    assert!(!matches(&both, &ab().header("x-c", "").facts()));
    assert!(!matches(&both, &ab().header("x-d", "4").facts()));
    assert!(matches(&both, &ab().header("x-d", "5").facts()));
}

/// Measured on Envoy 1.40.
#[test]
fn query_parameters() {
    let m = |x: StringMatch| HttpMatch { query: vec![("k".into(), x)], ..HttpMatch::default() };
    for (target, on_text, on_escape, on_empty, on_present) in [
        ("/q?k=a%20b", false, true, false, true),
        ("/q?k=a+b", false, false, false, true),
        ("/q?k=", false, false, true, true),
        ("/q?k", false, false, true, true),
        // The first counts.
        ("/q?k=1&k=a%20b", false, false, false, true),
        ("/q?j&k=a%20b", false, true, false, true),
        // Names are not decoded either.
        ("/q?%6b=1", false, false, false, false),
        ("/q?k==", false, false, false, true),
        ("/q?", false, false, false, false),
        ("/q", false, false, false, false),
    ] {
        let req = Req::get(target);
        let on = |x| matches(&m(x), &req.facts());
        assert_eq!(
            (on(exact("a b")), on(exact("a%20b")), on(exact("")), on(StringMatch::Present)),
            (on_text, on_escape, on_empty, on_present),
            "{target}"
        );
    }
    assert!(matches(&m(regex("[0-9]+")), &Req::get("/?k=12").facts()));
    assert!(matches(&m(prefix("v")), &Req::get("/?k=v2").facts()));
    assert!(!matches(&m(regex("[0-9]+")), &Req::get("/?k=12a").facts()));
}

#[test]
fn method_scheme_authority_port() {
    let d = HttpMatch::default;
    let post = || Req::get("/").method(Method::POST);
    let patch = || Req::get("/").method(Method::from_bytes(b"post").expect("a method"));
    for (m, req, want) in [
        (HttpMatch { method: Some(exact("POST")), ..d() }, post(), true),
        (HttpMatch { method: Some(exact("POST")), ..d() }, Req::get("/"), false),
        // Methods are case-sensitive.
        (HttpMatch { method: Some(exact("POST")), ..d() }, patch(), false),
        (HttpMatch { method: Some(regex("P.*")), ..d() }, post(), true),
        (HttpMatch { scheme: Some(exact("https")), ..d() }, post(), false),
        (HttpMatch { scheme: Some(exact("http")), ..d() }, post(), true),
        // As the client wrote it, port and case and all.
        (HttpMatch { authority: Some(exact("a.com")), ..d() }, post().host("a.com"), true),
        (HttpMatch { authority: Some(exact("a.com")), ..d() }, post().host("A.com"), false),
        (HttpMatch { authority: Some(exact("a.com")), ..d() }, post().host("a.com:80"), false),
        (HttpMatch { authority: Some(prefix("a.com")), ..d() }, post().host("a.com:80"), true),
        (HttpMatch { port: Some(80), ..d() }, post(), true),
        (HttpMatch { port: Some(81), ..d() }, post(), false),
    ] {
        assert_eq!(matches(&m, &req.facts()), want, "{m:?}");
    }
}

#[test]
fn grpc() {
    let m = |service: Option<StringMatch>, method: Option<StringMatch>| HttpMatch {
        grpc: Some(GrpcMatch { service, method }),
        ..HttpMatch::default()
    };
    for (m, path, want) in [
        (m(Some(exact("a.B")), Some(exact("Get"))), "/a.B/Get", true),
        (m(Some(exact("a.B")), Some(exact("Get"))), "/a.B/Put", false),
        (m(Some(exact("a.B")), None), "/a.B/Put", true),
        (m(Some(exact("a.B")), None), "/a.BC/Put", false),
        (m(None, Some(exact("Get"))), "/x.Y/Get", true),
        (m(None, Some(exact("Get"))), "/x.Y/GetAll", false),
        (m(Some(regex("a\\..*")), Some(regex("G.*"))), "/a.Q/Go", true),
        (m(Some(regex("a\\..*")), None), "/b.Q/Go", false),
        (m(None, None), "/anything", true),
        (m(Some(exact("a.B")), None), "/a.B", false),
    ] {
        assert_eq!(matches(&m, &Req::get(path).facts()), want, "{m:?} {path}");
    }
}

struct Sub(&'static str);
impl Claims for Sub {
    fn matches(&self, path: &[Arc<str>], what: &StringMatch) -> bool {
        path == [Arc::from("sub")] && what.matches(self.0)
    }
    fn hash_claim(&self, _: &[Arc<str>], _: &mut dyn std::hash::Hasher) {}
}
#[test]
fn claims() {
    let of = |what| vec![(vec![Arc::<str>::from("sub")], what)];
    let with = HttpMatch { claims: of(exact("me")), ..HttpMatch::default() };
    let without = HttpMatch { without_claims: of(exact("me")), ..HttpMatch::default() };
    let req = Req::get("/");
    let (me, you) = (Sub("me"), Sub("you"));
    for (claims, on_with, on_without) in
        [(None, false, true), (Some(&me as &dyn Claims), true, false), (Some(&you as &dyn Claims), false, true)]
    {
        let facts = RequestFacts { claims, ..req.facts() };
        assert_eq!((matches(&with, &facts), matches(&without, &facts)), (on_with, on_without));
    }
}

#[test]
fn tables() {
    let req = Req::get("/a/b");
    assert!(matches!(select(&RouteTable::default(), &req.facts()), Selected::Default));
    let none = table(vec![at(PathMatch::Exact("/x".into()))]);
    assert!(matches!(select(&none, &req.facts()), Selected::NotFound));
    // The first declared wins, however specific the others.
    let order = table(vec![at(PathMatch::TextPrefix("/a".into())), at(PathMatch::Exact("/a/b".into()))]);
    assert_eq!(number(&order, &req.facts()), Some(0));
    // What cannot be understood is refused whatever its rules say, also without rules.
    for http in [rules(vec![HttpMatch::default()]), vec![]] {
        let broken = RouteTable { http: http.into(), broken: Some("why".into()), ..RouteTable::default() }.indexed();
        assert!(matches!(select(&broken, &req.facts()), Selected::Broken(why) if **why == *"why"));
    }
    // TCP rules alone leave HTTP to the service.
    let tcp = RouteTable { tcp: vec![tcp_rule("t", None, &[])], ..RouteTable::default() };
    assert!(matches!(select(&tcp, &req.facts()), Selected::Default));
}

#[test]
fn a_table_changed_after_indexing_is_still_right() {
    let mut t = table((0..20).map(|i| at(PathMatch::Exact(format!("/{i}").into()))).collect());
    assert!(t.is_indexed());
    t.http.extend(rules(vec![at(PathMatch::TextPrefix("/2".into())), at(PathMatch::TextPrefix("/x".into()))]));
    assert!(!t.is_indexed());
    for (path, want) in [("/7", 7), ("/21", 20), ("/xy", 21)] {
        assert_eq!(number(&t, &Req::get(path).facts()), Some(want));
        assert_eq!(number(&t.clone().indexed(), &Req::get(path).facts()), Some(want));
    }
    assert_eq!(t.clone().indexed(), t, "tables compare by what they say");
}

fn tcp_route(name: &str) -> Arc<TcpRoute> {
    Arc::new(TcpRoute { name: name.into(), ..TcpRoute::plain(&key("ns", "a"), 80) })
}
fn tcp_rule(name: &str, port: Option<u16>, nets: &[&str]) -> TcpRule {
    let destinations = nets.iter().map(|n| n.parse().expect("a net")).collect();
    TcpRule { port, destinations, route: tcp_route(name) }
}
fn tls_rule(name: &str, port: Option<u16>, sni: &[&str]) -> TlsRule {
    TlsRule { sni: sni.iter().map(|s| Arc::from(*s)).collect(), port, route: tcp_route(name) }
}
#[test]
fn tcp_and_tls() {
    let t = RouteTable {
        tls: vec![
            tls_rule("exact", None, &["a.com", "b.com"]),
            tls_rule("wild", Some(443), &["*.a.com"]),
            tls_rule("late", None, &["a.com"]),
        ],
        tcp: vec![
            tcp_rule("port", Some(81), &[]),
            tcp_rule("net", None, &["10.0.0.0/8", "fd00::/8"]),
            tcp_rule("p82", Some(82), &[]),
        ],
        ..RouteTable::default()
    };
    for (sni, port, destination, want) in [
        (Some("a.com"), 443, None, Some("exact")),
        (Some("A.COM"), 443, None, Some("exact")),
        (Some("b.com"), 1, None, Some("exact")),
        (Some("x.a.com"), 443, None, Some("wild")),
        (Some("x.y.a.com"), 443, None, Some("wild")),
        (Some("x.a.com"), 444, None, None),
        (Some("xa.com"), 443, None, None),
        // A name that no TLS rule has goes by the TCP rules.
        (Some("c.com"), 81, None, Some("port")),
        (None, 81, None, Some("port")),
        (None, 80, Some("10.1.1.1"), Some("net")),
        (None, 80, Some("::ffff:10.1.1.1"), Some("net")),
        (None, 80, Some("fd00::1"), Some("net")),
        (None, 80, Some("11.1.1.1"), None),
        (None, 80, None, None),
        (None, 82, Some("11.1.1.1"), Some("p82")),
    ] {
        let conn = TcpFacts { port, destination: destination.map(ip), sni };
        assert_eq!(select_tcp(&t, &conn).map(|r| &*r.name), want, "{conn:?}");
    }
}
#[test]
fn host_patterns() {
    for (pattern, host, want) in [
        ("a.com", "a.com", true),
        ("a.com", "A.com", true),
        ("a.com", "b.a.com", false),
        ("*.a.com", "b.a.com", true),
        ("*.a.com", "c.B.A.com", true),
        ("*.a.com", "a.com", false),
        ("*.a.com", ".a.com", false),
        ("*", "x", true),
        ("*", "", false),
        ("*.com", "ä.com", true),
        ("*.a", "äa", false),
    ] {
        assert_eq!(host_matches(pattern, host), want, "{pattern} {host}");
    }
}

/// Paths that share prefixes, differ in case and in trailing slashes.
const PATHS: [&str; 14] =
    ["/", "/a", "/A", "/a/", "/a/b", "/a/b/c", "/ab", "/aB", "/abc", "/b", "/a/bc", "/B/a", "/s.T/M", "/s.T/N"];
fn some_text(all: &'static [&'static str]) -> impl Strategy<Value = StringMatch> {
    (prop::sample::select(all), 0..5_u8).prop_map(|(x, how)| match how {
        0..=2 => exact(x),
        3 => prefix(x),
        _ => StringMatch::Present,
    })
}
fn any_match() -> impl Strategy<Value = HttpMatch> {
    let path = (prop::sample::select(&PATHS[..]), 0..6_u8).prop_map(|(p, how)| match how {
        0 | 1 => Some(PathMatch::Exact(p.into())),
        2 => Some(PathMatch::TextPrefix(p.into())),
        3 => Some(PathMatch::SegmentPrefix(p.into())),
        4 => Some(PathMatch::Regex(Pattern::parse(&format!("{p}.*")).expect("a pattern"))),
        _ => None,
    });
    let header = (prop::sample::select(vec!["x-a", "x-b", "cookie"]), some_text(&["1", "2", "1; 2"]));
    let grpc = (prop::option::of(some_text(&["s.T", "s"])), prop::option::of(some_text(&["M", "N"])));
    (
        path,
        prop::bool::weighted(0.2),
        prop::option::weighted(0.3, some_text(&["h.com", "i.com"])),
        prop::collection::vec(header, 0..3),
        prop::option::weighted(0.2, grpc),
        prop::option::weighted(0.2, prop::sample::select(vec![80_u16, 81])),
        prop::option::weighted(0.2, some_text(&["GET", "POST"])),
    )
        .prop_map(|(path, ignore_case, authority, headers, grpc, port, method)| HttpMatch {
            path,
            ignore_case,
            authority,
            headers: headers.into_iter().map(|(n, x)| (name(n), x)).collect(),
            grpc: grpc.map(|(service, method)| GrpcMatch { service, method }),
            port,
            method,
            ..HttpMatch::default()
        })
}
fn any_request() -> impl Strategy<Value = Req> {
    let header = (prop::sample::select(vec!["x-a", "x-b", "cookie"]), prop::sample::select(vec!["1", "2", "3"]));
    (
        prop::sample::select(&PATHS[..]),
        prop::sample::select(vec!["", "/", "x", "/z"]),
        prop::sample::select(vec!["h.com", "i.com", "j.com"]),
        prop::collection::vec(header, 0..4),
        prop::bool::ANY,
    )
        .prop_map(|(path, more, host, headers, post)| {
            let req = Req::get(&format!("{path}{more}")).host(host);
            let req = if post { req.method(Method::POST) } else { req };
            headers.into_iter().fold(req, |req, (n, v)| req.header(n, v))
        })
}
proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]
    /// The index answers as the linear scan does, for every table and request.
    #[test]
    fn index_equals_scan(all in prop::collection::vec(any_match(), 9..80), reqs in prop::collection::vec(any_request(), 1..20)) {
        let t = table(all);
        for req in &reqs {
            let scan = t.http.iter().position(|r| matches(&r.matches, &req.facts()));
            prop_assert_eq!(number(&t, &req.facts()), scan, "{:?}", req);
        }
    }
    /// A patched table is the table that was made anew from the same rules, whatever the patch.
    #[test]
    fn patched_equals_made_anew(
        all in prop::collection::vec((any_match(), prop::bool::weighted(0.2)), 0..60),
        mut more in prop::collection::vec((0..70_u32, any_match()), 0..30),
        reqs in prop::collection::vec(any_request(), 1..20),
    ) {
        more.sort_by_key(|(before, _)| *before);
        let end = all.len() as u32;
        let added: Vec<(u32, HttpRule)> =
            more.into_iter().map(|(before, m)| (before.min(end), rules(vec![m]).remove(0))).collect();
        let base = table(all.iter().map(|(m, _)| m.clone()).collect());
        let gone = (0..).zip(&all).filter(|(_, (_, gone))| *gone).map(|(number, _)| number);
        let t = RouteTable { http: base.http.patched(gone, added.iter().cloned()), ..RouteTable::default() };
        let mut list = Vec::new();
        for number in 0..=end {
            list.extend(added.iter().filter(|(before, _)| *before == number).map(|(_, r)| r.clone()));
            list.extend(base.http.base(number).filter(|_| !all[number as usize].1).cloned());
        }
        prop_assert_eq!((t.http.len(), t.http.made_after(&base.http)), (list.len(), added.len()));
        let anew = RouteTable { http: list.into(), ..RouteTable::default() };
        prop_assert_eq!(&t, &anew);
        for req in &reqs {
            prop_assert_eq!(number(&t, &req.facts()), number(&anew, &req.facts()), "{:?}", req);
        }
    }
}

/// The shapes large tables have are looked up, not walked. (The bench `select` has the numbers; this only catches a scan,
/// which takes a thousand times as long.)
#[test]
fn large_tables_are_not_scanned() {
    type Shape = (&'static str, fn(usize) -> HttpMatch, fn(usize) -> Req);
    let shapes: [Shape; 6] = [
        ("exact", |i| at(PathMatch::Exact(format!("/r{i}").into())), |i| Req::get(&format!("/r{i}"))),
        ("text", |i| at(PathMatch::TextPrefix(format!("/r{i}/").into())), |i| Req::get(&format!("/r{i}/x"))),
        ("segments", |i| at(PathMatch::SegmentPrefix(format!("/r{i}").into())), |i| Req::get(&format!("/r{i}/x"))),
        (
            "authority",
            |i| HttpMatch { authority: Some(exact(&format!("h{i}"))), ..at(PathMatch::TextPrefix("/".into())) },
            |i| Req::get("/").host(&format!("h{i}")),
        ),
        (
            "header",
            |i| HttpMatch { headers: vec![(name("x-t"), exact(&format!("t{i}")))], ..at(PathMatch::TextPrefix("/api".into())) },
            |i| Req::get("/api").header("x-t", format!("t{i}")),
        ),
        (
            "grpc",
            |i| HttpMatch {
                grpc: Some(GrpcMatch { service: Some(exact(&format!("s{i}"))), method: None }),
                ..HttpMatch::default()
            },
            |i| Req::get(&format!("/s{i}/M")),
        ),
    ];
    for (shape, rule, req) in shapes {
        let t = table((0..10_000).map(rule).collect());
        let reqs: Vec<(usize, Req)> = (0..10_000).step_by(97).map(|i| (i, req(i))).collect();
        let time = |lookup: &dyn Fn(&RequestFacts<'_>) -> Option<usize>| {
            let started = Instant::now();
            for (i, req) in &reqs {
                assert_eq!(lookup(&req.facts()), Some(*i), "{shape}");
            }
            started.elapsed()
        };
        // Where a rule is in the list tells its number.
        let at: HashMap<*const HttpRule, usize> = t.http.iter().enumerate().map(|(n, r)| (std::ptr::from_ref(r), n)).collect();
        // The quickest of several: it is so short that one pause of a busy machine would be most of it.
        let find = |facts: &RequestFacts<'_>| t.http.find(facts).map(|rule| at[&std::ptr::from_ref(rule)]);
        let indexed = (0..5).map(|_| time(&find)).min().unwrap();
        let scanned = time(&|facts| t.http.iter().position(|r| matches(&r.matches, facts)));
        // A scan of ten thousand would be as slow as the scan; the rest is room for a busy machine and an unoptimised build.
        assert!(indexed * 4 < scanned, "{shape}: {indexed:?} against {scanned:?} for a scan");
    }
}
