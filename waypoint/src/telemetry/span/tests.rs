use super::*;
use crate::telemetry::Told;
use crate::telemetry::tests::World;
use http::{HeaderName, HeaderValue};
use mesh_model::telemetry::context::Incoming;
use mesh_model::telemetry::format::Template;
use mesh_model::telemetry::tracing::{Collector, Otlp};
use mesh_proto::opentelemetry::proto::trace::v1::status::StatusCode;
use mesh_spans::tags::any_value;
use std::collections::BTreeMap;
use std::time::Duration;

fn tracing(tags: Vec<(&str, Tag)>) -> Tracing {
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
        sampling: 100,
        by_request_id: true,
        propagates: true,
        istio_tags: true,
        tags: tags.into_iter().map(|(name, tag)| (name.into(), tag)).collect(),
        longest_path: 3,
    }
}
fn process() -> Process {
    let text = |t: &str| t.to_owned();
    Process {
        node_id: text("waypoint~10.0.0.9~wp-0.shop~shop.svc.cluster.local"),
        namespace: text("shop"),
        service_account: text("waypoint"),
        cluster: text("c1"),
        mesh: text("cluster.local"),
    }
}
fn format(text: &str) -> Tag {
    Tag::Format(Template::parse(text, &|_| None).expect(text))
}
fn span(world: &World, facts: &crate::facts::Facts, record: &Record, tracing: &Tracing) -> (Span, BTreeMap<String, String>) {
    let own = "spiffe://cluster.local/ns/shop/sa/waypoint".parse().expect("an id");
    let line = Line { facts, told: Told::Request(record), took: Duration::from_millis(12), own: &own };
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
    let trace = Context::under(Incoming::read(&headers), (1, 0xabc), true);
    let me = world.snap.find_workload("c1//Pod/shop/api-v2-0");
    let made = of(&line, record, (tracing, &trace), me.map(|w| &**w), &process());
    let keys = made.attributes.len();
    let tags: BTreeMap<_, _> = made
        .attributes
        .iter()
        .map(|a| match a.value.as_ref().and_then(|v| v.value.as_ref()) {
            Some(any_value::Value::StringValue(text)) => (a.key.clone(), text.clone()),
            other => panic!("{}: {other:?}", a.key),
        })
        .collect();
    assert_eq!(tags.len(), keys, "each key once");
    (made, tags)
}

#[tokio::test]
async fn a_request_is_told_in_the_words_of_envoy_and_istio() {
    let world = World::new();
    let mut record = world.answered("api");
    record.operation = Some("api.shop.svc.cluster.local:80/*".to_owned().into());
    record.headers.insert("tracestate", HeaderValue::from_static("a=1"));
    let (span, tags) = span(&world, &world.facts(), &record, &tracing(Vec::new()));
    assert_eq!(*span.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    assert_eq!(*span.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
    assert_eq!((&*span.span_id, &*span.trace_state), (&0xabc_u64.to_be_bytes()[..], "a=1"));
    assert_eq!((&*span.name, span.kind(), span.status), ("api.shop.svc.cluster.local:80/*", SpanKind::Server, None));
    assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 12_000_000);
    assert_eq!(span.start_time_unix_nano, 1_709_210_096_007_000_000);
    let want = [
        ("component", "proxy"),
        ("downstream_cluster", "-"),
        ("guid:x-request-id", "0a1b"),
        ("http.method", "POST"),
        ("http.protocol", "HTTP/2"),
        ("http.status_code", "200"),
        ("http.url", "http://api.shop:80/a?"),
        ("istio.canonical_revision", "v1"),
        ("istio.canonical_service", "api-v2"),
        ("istio.cluster_id", "c1"),
        ("istio.destination_app", "api"),
        ("istio.destination_app_version", "v1"),
        ("istio.destination_canonical_revision", "v1"),
        ("istio.destination_canonical_service", "api"),
        ("istio.destination_cluster_id", "c1"),
        ("istio.destination_instance_name", "api-0"),
        ("istio.destination_namespace", "shop"),
        ("istio.destination_workload", "api-v1"),
        ("istio.mesh_id", "cluster.local"),
        ("istio.namespace", "shop"),
        ("istio.source_app", "front"),
        ("istio.source_app_version", "v1"),
        ("istio.source_canonical_revision", "v1"),
        ("istio.source_canonical_service", "front"),
        ("istio.source_cluster_id", "c1"),
        ("istio.source_instance_name", "front-0"),
        ("istio.source_namespace", "shop"),
        ("istio.source_workload", "front-v1"),
        ("node_id", "waypoint~10.0.0.9~wp-0.shop~shop.svc.cluster.local"),
        ("peer.address", "10.0.0.5"),
        ("request_size", "0"),
        ("response_flags", "-"),
        ("response_size", "321"),
        ("upstream_cluster", "inbound-vip|80|http|api.shop.svc.cluster.local"),
        ("upstream_cluster.name", "inbound-vip|80|http|api.shop.svc.cluster.local"),
        ("user_agent", "curl/8.1"),
    ];
    let mut found = tags;
    found.retain(|key, _| !key.ends_with("workload_type"));
    assert_eq!(found.iter().map(|(k, v)| (&**k, &**v)).collect::<Vec<_>>(), want);
}

#[tokio::test]
async fn tags_of_the_mesh_are_added_and_those_without_a_value_left_out() {
    let world = World::new();
    let record = world.answered("api");
    let header = |name: &'static str, default: Option<&str>| Tag::Header(HeaderName::from_static(name), default.map(Into::into));
    let rules = tracing(vec![
        ("env", Tag::Literal("prod".into())),
        ("agent", header("user-agent", None)),
        ("user", header("x-user", Some("nobody"))),
        ("tenant", header("x-tenant", None)),
        ("verb", format("%CEL(request.method)%/%RESPONSE_CODE%")),
        ("fails", format("%CEL(request.headers['x-none'])%")),
        ("fails_too", format("%CEL(1 / 0)%")),
        ("empty", Tag::Literal("".into())),
        ("component", Tag::Literal("mine".into())),
    ]);
    let (_, tags) = span(&world, &world.facts(), &record, &rules);
    let found: Vec<Option<&str>> = ["env", "agent", "user", "tenant", "verb", "fails", "fails_too", "empty", "component"]
        .map(|name| tags.get(name).map(String::as_str))
        .into();
    let want = [Some("prod"), Some("curl/8.1"), Some("nobody"), None, Some("POST/200"), None, None, None, Some("mine")];
    assert_eq!(found, want);
}

#[tokio::test]
async fn what_clients_send_is_cut() {
    let world = World::new();
    let mut record = world.answered("api");
    let long = "é".repeat(3000);
    record.headers.insert("user-agent", HeaderValue::from_bytes("x".repeat(5000).as_bytes()).expect("a value"));
    record.path = format!("/{long}").into();
    let rules = Tracing { longest_path: 2, ..tracing(vec![("long", Tag::Literal(long.as_str().into()))]) };
    let (_, tags) = span(&world, &world.facts(), &record, &rules);
    assert_eq!((tags["user_agent"].len(), tags["long"].len(), &*tags["http.url"]), (1024, 1024, "http://api.shop:80/"));
}

#[tokio::test]
async fn failures_and_gateways_are_told_apart() {
    let world = World::new();
    let mut record = world.answered("api");
    record.status = 503;
    let rules = Tracing { istio_tags: false, ..tracing(Vec::new()) };
    let (made, tags) = span(&world, &world.outside(), &record, &rules);
    assert_eq!((&*made.name, made.kind()), ("egress api.shop:80", SpanKind::Client));
    assert_eq!(made.status.map(|s| s.code()), Some(StatusCode::Error));
    assert_eq!(tags["error"], "true");
    assert!(tags.keys().all(|key| !key.starts_with("istio.")), "{tags:?}");
    record.status = 200;
    record.grpc = true;
    record.grpc_status = Some(14);
    let (made, tags) = span(&world, &world.facts(), &record, &rules);
    assert_eq!((&*made.name, made.status.map(|s| s.code())), ("ingress", Some(StatusCode::Error)));
    assert_eq!((&*tags["grpc.status_code"], &*tags["grpc.path"], &*tags["grpc.authority"]), ("14", "/a?", "api.shop:80"));
    record.grpc_status = Some(5);
    assert_eq!(span(&world, &world.facts(), &record, &rules).0.status, None, "not found is an answer");
}
