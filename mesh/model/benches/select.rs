//! Choosing a route among 10 000, in the shapes large tables have; what one costs to make, and the decisions of layer 7 that
//! every request passes.
#![allow(clippy::expect_used, reason = "a measurement may stop at the first surprise")]
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use mesh_model::gateway::ServiceKey;
use mesh_model::l7::hash::xxh64;
use mesh_model::l7::path::{PathNormalization, normalize};
use mesh_model::l7::route::{HttpMatch, HttpRoute, HttpRule, PathMatch};
use mesh_model::l7::select::{Selected, select};
use mesh_model::l7::text::{Pattern, StringMatch};
use mesh_model::l7::{RequestFacts, RouteTable};
use std::hint::black_box;
use std::sync::Arc;

const RULES: usize = 10_000;

fn path(p: PathMatch) -> HttpMatch {
    HttpMatch { path: Some(p), ..HttpMatch::default() }
}
fn table(rule: impl Fn(usize) -> HttpMatch) -> RouteTable {
    let route = Arc::new(HttpRoute::plain(&ServiceKey::new("ns", "a.ns.svc.cluster.local"), 80));
    let http = (0..RULES).map(|i| HttpRule { matches: rule(i).into(), route: Arc::clone(&route) }).collect();
    RouteTable { http, ..RouteTable::default() }.indexed()
}
/// A request that reaches the `i`-th rule of every table here.
struct Request {
    path: String,
    authority: String,
    headers: HeaderMap,
}
impl Request {
    fn new(i: usize) -> Self {
        let mut headers = HeaderMap::new();
        for name in ["accept", "user-agent", "x-request-id", "x-forwarded-for", "x-forwarded-proto"] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static("something"));
        }
        headers.insert("x-tenant", HeaderValue::try_from(format!("t{i}")).expect("a value"));
        Self { path: format!("/api/v1/r{i}/items/7"), authority: format!("h{i}.example.com"), headers }
    }
    fn facts(&self) -> RequestFacts<'_> {
        RequestFacts {
            method: &http::Method::GET,
            scheme: "http",
            authority: &self.authority,
            path: &self.path,
            query: None,
            headers: &self.headers,
            port: 80,
            claims: None,
        }
    }
}

fn select_10k(c: &mut Criterion) {
    let requests: Vec<Request> = (0..RULES).step_by(7).map(Request::new).collect();
    let mut one = |name: &str, table: &RouteTable| {
        assert!(requests.iter().all(|r| matches!(select(table, &r.facts()), Selected::Rule(..))), "{name}");
        let mut at = 0;
        c.bench_function(&format!("select_10k/{name}"), |b| {
            b.iter(|| {
                at = (at + 1) % requests.len();
                let facts = requests.get(at).map(Request::facts);
                black_box(facts.map(|f| matches!(select(table, black_box(&f)), Selected::Rule(..))))
            });
        });
    };
    one("exact", &table(|i| path(PathMatch::Exact(format!("/api/v1/r{i}/items/7").into()))));
    one("text_prefix", &table(|i| path(PathMatch::TextPrefix(format!("/api/v1/r{i}/").into()))));
    one("segments", &table(|i| path(PathMatch::SegmentPrefix(format!("/api/v1/r{i}").into()))));
    let authority = |i| Some(StringMatch::Exact(format!("h{i}.example.com").into()));
    one("authority", &table(|i| HttpMatch { authority: authority(i), ..path(PathMatch::TextPrefix("/".into())) }));
    let tenant = |i| vec![(HeaderName::from_static("x-tenant"), StringMatch::Exact(format!("t{i}").into()))];
    one("header", &table(|i| HttpMatch { headers: tenant(i), ..path(PathMatch::TextPrefix("/api".into())) }));
    // What the index has no hold on: as many rules as a table of patterns may have.
    let route = Arc::new(HttpRoute::plain(&ServiceKey::new("ns", "a.ns.svc.cluster.local"), 80));
    let pattern = |i| {
        let source = if i == 99 { "/api/.*".to_owned() } else { format!("/other{i}/.*") };
        HttpRule {
            matches: path(PathMatch::Regex(Pattern::parse(&source).expect("a pattern"))).into(),
            route: Arc::clone(&route),
        }
    };
    one("100_patterns", &RouteTable { http: (0..100).map(pattern).collect(), ..RouteTable::default() }.indexed());
}

fn index_10k(c: &mut Criterion) {
    let t = table(|i| path(PathMatch::SegmentPrefix(format!("/api/v1/r{i}").into())));
    c.bench_function("index_10k/segments", |b| {
        b.iter_batched(|| t.clone(), RouteTable::indexed, BatchSize::PerIteration);
    });
}

fn each_request(c: &mut Criterion) {
    for (name, p) in [("plain", "/api/v1/users/17/orders"), ("escaped", "/api/v1/%75sers/../users/17/%6frders")] {
        c.bench_function(&format!("normalize/{name}"), |b| {
            b.iter(|| black_box(normalize(PathNormalization::Base, black_box(p))));
        });
    }
    c.bench_function("xxh64/16", |b| b.iter(|| black_box(xxh64(black_box(b"0123456789abcdef"), 0))));
}

criterion_group!(benches, select_10k, index_10k, each_request);
criterion_main!(benches);
