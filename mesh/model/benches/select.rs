//! Choosing a route among 10 000, in the shapes large tables have; what one costs to make, and the decisions of layer 7 that
//! every request passes.
#![allow(clippy::expect_used, reason = "a measurement may stop at the first surprise")]
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use mesh_model::gateway::ServiceKey;
use mesh_model::l7::hash::xxh64;
use mesh_model::l7::path::{PathNormalization, normalize};
use mesh_model::l7::request_auth::{Jwks, KeySource};
use mesh_model::l7::route::{HttpMatch, HttpRoute, HttpRule, PathMatch};
use mesh_model::l7::select::{Selected, select};
use mesh_model::l7::text::{Pattern, StringMatch};
use mesh_model::l7::{RequestFacts, RouteTable};
use mesh_model::telemetry::tracing::{Collector, Otlp, Tracing, operation};
use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

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

/// Requests are traced, and none is told of.
fn unsampled() -> Tracing {
    let collector = Collector {
        host: "otel".into(),
        namespace: None,
        port: 4317,
        over: Otlp::Grpc,
        timeout: Duration::from_secs(1),
        headers: Box::default(),
        resource: Box::default(),
    };
    Tracing {
        collector: Arc::new(collector),
        sampling: 0,
        by_request_id: true,
        propagates: true,
        istio_tags: true,
        tags: Box::default(),
        longest_path: 256,
    }
}

fn each_request(c: &mut Criterion) {
    for (name, p) in [("plain", "/api/v1/users/17/orders"), ("escaped", "/api/v1/%75sers/../users/17/%6frders")] {
        c.bench_function(&format!("normalize/{name}"), |b| {
            b.iter(|| black_box(normalize(PathNormalization::Base, black_box(p))));
        });
    }
    // What tracing costs a request that is not told of: its decision, its name, what the endpoint hears.
    let tracing = unsampled();
    let route = HttpRoute::plain(&ServiceKey::new("shop", "api.shop.svc.cluster.local"), 80);
    let matches = path(PathMatch::TextPrefix("/api/v1".into()));
    let mut headers = HeaderMap::new();
    headers.insert("x-request-id", HeaderValue::from_static("9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d"));
    c.bench_function("trace/not_sampled", |b| {
        b.iter(|| {
            let trace = tracing.begin(black_box(&mut headers), None, (7, 9), 3);
            let name = operation(black_box(&route), Some(&matches), 80);
            trace.inject(&mut headers);
            headers.remove("traceparent");
            black_box((trace.sampled, name))
        });
    });
    // Keys written in a policy, of 8 KiB, found in the table of all keys.
    let keys = |n: usize| KeySource::Inline(Jwks::new(&format!("{n}{}", "k".repeat(8 << 10))));
    let table: HashMap<KeySource, usize, foldhash::fast::RandomState> = (0..16).map(|n| (keys(n), n)).collect();
    let wanted = table.keys().next().cloned();
    c.bench_function("keys/inline_8k", |b| b.iter(|| black_box(wanted.as_ref().and_then(|w| table.get(black_box(w))))));
    c.bench_function("xxh64/16", |b| b.iter(|| black_box(xxh64(black_box(b"0123456789abcdef"), 0))));
}

criterion_group!(benches, select_10k, index_10k, each_request);
criterion_main!(benches);
