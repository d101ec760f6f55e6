use super::*;
use crate::gateway::ServiceKey;
use crate::l7::route::{Backend, ClusterKey};
use crate::l7::text::Pattern;
use crate::origin::Origin;

const PLAIN: &str = "00000050-0000-4000-8000-000000000000"; // 0x50 = 80 of 10 000

fn tracing(sampling: u64) -> Tracing {
    let collector = Collector {
        host: "otel".into(),
        namespace: None,
        port: 4317,
        over: Otlp::Grpc,
        timeout: Duration::from_secs(10),
        headers: Box::default(),
        resource: Box::default(),
    };
    Tracing {
        collector: Arc::new(collector),
        sampling,
        by_request_id: true,
        propagates: true,
        istio_tags: true,
        tags: Box::default(),
        longest_path: Tracing::LONGEST_PATH,
    }
}
/// Whether it is told of, and its id afterwards.
fn decide(rules: &Tracing, id: &str, beside: &[(&'static str, &'static str)]) -> (bool, String) {
    let mut headers = HeaderMap::new();
    headers.insert(REQUEST_ID, id.parse().expect("a value"));
    for (name, value) in beside {
        headers.insert(*name, HeaderValue::from_static(value));
    }
    let context = rules.begin(&mut headers, None, (1, 2), 3);
    (context.sampled, headers[REQUEST_ID].to_str().expect("text").to_owned())
}

#[test]
fn the_id_of_the_request_decides_and_remembers() {
    let parent =
        |flags: &str| ("traceparent", format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}").leak() as &str);
    let marked = |mark: &str| PLAIN.replacen("-4", &format!("-{mark}"), 1);
    for (id, beside, sampled, after) in [
        // 80 is below 81, not below 80.
        (PLAIN.to_owned(), vec![], (true, false), ("9", "4")),
        // Decided before, by whoever marked it.
        (marked("9"), vec![], (true, true), ("9", "9")),
        (marked("a"), vec![], (true, true), ("a", "a")),
        (marked("b"), vec![], (true, true), ("b", "b")),
        // Somebody wants it.
        (PLAIN.to_owned(), vec![("x-client-trace-id", "x")], (true, true), ("b", "b")),
        (PLAIN.to_owned(), vec![("x-envoy-force-trace", "1")], (true, true), ("a", "a")),
        // The span it is under decided; the mark says what would have been.
        (PLAIN.to_owned(), vec![parent("00")], (false, false), ("9", "4")),
        (PLAIN.to_owned(), vec![parent("01")], (true, true), ("9", "4")),
    ] {
        let seen = [81, 80].map(|sampling| decide(&tracing(sampling), &id, &beside));
        assert_eq!(seen, [(sampled.0, marked(after.0)), (sampled.1, marked(after.1))], "{id} {beside:?}");
    }
}

#[test]
fn odd_ids_are_not_told_of() {
    let all = tracing(Tracing::SHARE);
    assert_eq!(decide(&all, "nonsense-id", &[]), (false, "nonsense-id".into()));
    assert_eq!(decide(&all, "abc", &[]), (false, "abc".into()));
    assert_eq!(decide(&all, "00000000-not-a-uuid", &[]), (true, "00000000-not-a-uuid".into()), "no place for a mark");
    assert!(!all.begin(&mut HeaderMap::new(), None, (1, 2), 3).sampled, "no id at all");
}

#[test]
fn chance_decides_where_ids_may_not() {
    let rules = Tracing { by_request_id: false, ..tracing(100) };
    let mut headers = HeaderMap::new();
    headers.insert(REQUEST_ID, PLAIN.parse().expect("a value"));
    let told = (0..100_000u64).filter(|n| rules.begin(&mut headers, None, (1, 2), crate::lb::redraw(7, *n)).sampled).count();
    assert!((900..1100).contains(&told), "{told} of 100000 at 1 %");
    assert_eq!(headers[REQUEST_ID], PLAIN);
}

#[test]
fn spans_are_named_after_where_they_go() {
    let service = ServiceKey::new("shop", "web.shop.svc.cluster.local");
    let plain = HttpRoute::plain(&service, 80);
    let by = |path: PathMatch| HttpMatch { path: Some(path), ..HttpMatch::default() };
    let host = "web.shop.svc.cluster.local:80";
    assert_eq!(operation(&plain, None, 80), format!("{host}/*"));
    for (path, name) in [
        (PathMatch::Exact("/a".into()), "/a"),
        (PathMatch::TextPrefix("/api/".into()), "/api/*"),
        (PathMatch::SegmentPrefix("/api".into()), "/*"),
        (PathMatch::Regex(Pattern::parse("/x.*").expect("a pattern")), "/x.*"),
    ] {
        assert_eq!(operation(&plain, Some(&by(path)), 80), format!("{host}{name}"));
    }
    let mut split = plain;
    split.origin = Some(Arc::new(Origin { place: "f".into(), line: 1, object: "VirtualService shop/canary".into() }));
    let HttpAction::Forward(forward) = &mut split.action else { panic!("a forward") };
    forward.backends.push(Backend::to(BackendRef::Service(ClusterKey { service, port: 80, subset: None })));
    assert_eq!(operation(&split, None, 8080), "canary:8080/*");
}
