//! One request as a span of OpenTelemetry: Envoy's tags, Istio's, and those the mesh asks for. Made for requests that are told
//! of only. Pure.
use super::access::{self, Line};
use super::{Call, Record};
use crate::facts::Scope;
use bytes::Bytes;
use http::HeaderMap;
use mesh_model::telemetry::context::Context;
use mesh_model::telemetry::format::Of;
use mesh_model::telemetry::tracing::{Tag, Tracing};
use mesh_model::workload::Workload;
use mesh_proto::opentelemetry::proto::common::v1::{AnyValue, KeyValue, any_value};
use mesh_proto::opentelemetry::proto::trace::v1::span::SpanKind;
use mesh_proto::opentelemetry::proto::trace::v1::status::StatusCode;
use mesh_proto::opentelemetry::proto::trace::v1::{Span, Status};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Longest value of a tag: spans wait in memory, and clients choose whether there are any and what they say.
const LONGEST: usize = 1024;

/// What spans say of the process itself.
#[derive(Clone, Debug, Default)]
pub struct Process {
    /// Istio's name for the proxy: `waypoint~<address>~<pod>.<namespace>~<namespace>.svc.<domain>`.
    pub node_id: String,
    /// Namespace.
    pub namespace: String,
    /// Service account, by which it is known while the mesh does not know its workload.
    pub service_account: String,
    /// Cluster.
    pub cluster: String,
    /// Mesh: Istio's default, the trust domain.
    pub mesh: String,
}

/// The span of a request. `own`: the workload this process is.
pub(super) fn of(
    line: &Line<'_>,
    record: &Record,
    (tracing, trace): (&Tracing, &Context),
    own: Option<&Workload>,
    process: &Process,
) -> Span {
    let start = record.start_time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mesh = matches!(line.facts.scope, Scope::Mesh(_));
    let failed = failed(record);
    let mut tags = Tags(Vec::with_capacity(48));
    tags.process(own, process, tracing.istio_tags);
    tags.request(line, record, tracing.longest_path);
    tags.answer(line, record, failed);
    if mesh {
        tags.peer("istio.source_", line.facts.source.as_deref());
        tags.peer("istio.destination_", record.host.as_ref().map(|h| &**h.workload()));
    }
    for (key, value) in &record.noted.dry_run_tags {
        tags.put(key, value.to_string());
    }
    tags.custom(line, record, &tracing.tags);
    Span {
        trace_state: cut(header(&record.headers, "tracestate").unwrap_or_default().to_owned(), LONGEST),
        name: match &record.operation {
            Some(operation) => operation.name.to_string(),
            // Refused before it had a route: Envoy's words for both directions.
            None if mesh => "ingress".to_owned(),
            None => cut(format!("egress {}", record.authority), LONGEST),
        },
        // A gateway leads into the mesh for clients that have no proxy (Istio: traffic direction OUTBOUND).
        kind: if mesh { SpanKind::Server } else { SpanKind::Client }.into(),
        start_time_unix_nano: nanos(start),
        end_time_unix_nano: nanos(start + line.took),
        attributes: tags.0,
        ..bare(trace, failed)
    }
}
/// The span of a call made for a request, as Envoy's clients of its own make it.
pub(super) fn of_call(call: &Call) -> Span {
    let start = call.start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut tags = Tags(Vec::with_capacity(5));
    tags.put("component", "proxy");
    tags.put("upstream_cluster", call.cluster.as_str());
    tags.put("upstream_cluster.name", call.cluster.as_str());
    if let Some((key, value)) = &call.status {
        tags.put(key, value.as_str());
    }
    if call.failed {
        tags.put("error", "true");
    }
    Span {
        name: call.name.clone(),
        kind: SpanKind::Client.into(),
        start_time_unix_nano: nanos(start),
        end_time_unix_nano: nanos(start + call.took),
        attributes: tags.0,
        ..bare(&call.trace, call.failed)
    }
}
/// A span of which nothing is told yet.
fn bare(trace: &Context, failed: bool) -> Span {
    Span {
        trace_id: Bytes::copy_from_slice(&trace.trace.to_be_bytes()),
        span_id: Bytes::copy_from_slice(&trace.span.to_be_bytes()),
        parent_span_id: trace.parent.map(|p| Bytes::copy_from_slice(&p.to_be_bytes())).unwrap_or_default(),
        status: failed.then(|| Status { message: String::new(), code: StatusCode::Error.into() }),
        flags: 1,
        ..Span::default()
    }
}

/// Envoy: no answer, a server error, or gRPC's words for one.
fn failed(record: &Record) -> bool {
    let grpc = record.grpc_status();
    record.status == 0 || record.status >= 500 || matches!(grpc, Some(2 | 4 | 12..=15))
}
fn nanos(since_1970: Duration) -> u64 {
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}
fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// At most so many bytes of a text, whole characters.
fn cut(mut text: String, most: usize) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// A tag.
pub(super) fn tag(key: &str, value: impl Into<String>) -> KeyValue {
    let value = any_value::Value::StringValue(value.into());
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}

struct Tags(Vec<KeyValue>);
impl Tags {
    fn put(&mut self, key: &str, value: impl Into<String>) {
        self.0.push(tag(key, cut(value.into(), LONGEST)));
    }
    fn put_some(&mut self, key: &str, value: &str) {
        if !value.is_empty() {
            self.put(key, value);
        }
    }

    fn process(&mut self, own: Option<&Workload>, process: &Process, istio: bool) {
        self.put("component", "proxy");
        self.put("node_id", process.node_id.as_str());
        self.put_some("zone", own.map_or("", |w| &w.locality.zone));
        if istio {
            self.put("istio.canonical_service", own.map_or("unknown", |w| &w.canonical_name));
            self.put("istio.canonical_revision", own.map_or("latest", |w| &w.canonical_revision));
            self.put("istio.namespace", process.namespace.as_str());
            self.put("istio.cluster_id", process.cluster.as_str());
            self.put("istio.mesh_id", process.mesh.as_str());
        }
    }

    fn request(&mut self, line: &Line<'_>, record: &Record, longest_path: usize) {
        let headers = &record.headers;
        let scheme = header(headers, "x-forwarded-proto").unwrap_or(line.facts.scheme());
        let path = cut(record.path.to_string(), longest_path);
        self.put("http.url", format!("{scheme}://{}{path}", record.authority));
        self.put("http.method", record.method.as_str());
        self.put("http.protocol", access::operator(&Of::Protocol, line));
        self.put("downstream_cluster", "-");
        self.put("user_agent", header(headers, "user-agent").unwrap_or("-"));
        self.put("peer.address", line.facts.client.ip().to_canonical().to_string());
        self.put_some("guid:x-request-id", header(headers, "x-request-id").unwrap_or_default());
        self.put_some("guid:x-client-trace-id", header(headers, "x-client-trace-id").unwrap_or_default());
        if record.grpc {
            self.put("grpc.path", path);
            self.put("grpc.authority", &*record.authority);
            self.put_some("grpc.content_type", header(headers, "content-type").unwrap_or_default());
            self.put_some("grpc.timeout", header(headers, "grpc-timeout").unwrap_or_default());
        }
    }

    fn answer(&mut self, line: &Line<'_>, record: &Record, failed: bool) {
        self.put("request_size", access::operator(&Of::BytesReceived, line));
        self.put("response_size", access::operator(&Of::BytesSent, line));
        self.put("http.status_code", record.status.to_string());
        self.put("response_flags", access::operator(&Of::ResponseFlags, line));
        let cluster = access::operator(&Of::UpstreamCluster, line);
        self.put_some("upstream_cluster", &cluster);
        self.put_some("upstream_cluster.name", &cluster);
        if let Some(status) = record.grpc_status() {
            self.put("grpc.status_code", status.to_string());
        }
        if failed {
            self.put("error", "true");
        }
    }

    /// What is known of a workload, in Istio's words.
    fn peer(&mut self, before: &str, workload: Option<&Workload>) {
        let Some(w) = workload else { return };
        for (name, value) in [
            ("workload", &w.workload_name),
            ("namespace", &w.namespace),
            ("cluster_id", &w.cluster),
            ("canonical_service", &w.canonical_name),
            ("canonical_revision", &w.canonical_revision),
            ("app", &w.canonical_name),
            ("app_version", &w.canonical_revision),
            ("workload_type", &w.workload_type),
            ("instance_name", &w.name),
        ] {
            self.put_some(&format!("{before}{name}"), value);
        }
    }

    /// Those of the mesh. One of a name that is there already takes its place.
    fn custom(&mut self, line: &Line<'_>, record: &Record, tags: &[(Arc<str>, Tag)]) {
        for (name, of) in tags {
            let value = match of {
                Tag::Literal(text) => text.to_string(),
                Tag::Header(name, default) => {
                    let sent = record.headers.get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
                    sent.or(default.as_deref().map(str::to_owned)).unwrap_or_default()
                }
                Tag::Format(template) => access::text(template, line),
            };
            if value.is_empty() {
                continue;
            }
            self.0.retain(|tag| *tag.key != **name);
            self.put(name, value);
        }
    }
}

#[cfg(test)]
mod tests;
