//! One request as a span of OpenTelemetry: Envoy's tags, Istio's, and those the mesh asks for. Made for requests that are told
//! of only. Pure.
use super::access::{self, Line};
use super::{Call, Record};
use crate::facts::Scope;
use http::HeaderMap;
use mesh_model::telemetry::context::Context;
use mesh_model::telemetry::format::Of;
use mesh_model::telemetry::tracing::{Tag, Tracing};
use mesh_model::workload::Workload;
use mesh_spans::Span;
use mesh_spans::tags::{LONGEST, Process, SpanKind, Tags, bare, cut};
use std::sync::Arc;

/// The span of a request. `own`: the workload this process is.
pub(super) fn of(
    line: &Line<'_>,
    record: &Record,
    (tracing, trace): (&Tracing, &Context),
    own: Option<&Workload>,
    process: &Process,
) -> Span {
    let mesh = matches!(line.facts.scope, Scope::Mesh(_));
    let failed = failed(record);
    let mut tags = Tags::with_capacity(48);
    of_process(&mut tags, own, process, tracing.istio_tags);
    of_request(&mut tags, line, record, tracing.longest_path);
    of_answer(&mut tags, line, record, failed);
    if mesh {
        tags.workload("istio.source_", line.facts.source.as_deref());
        tags.workload("istio.destination_", record.host.as_ref().map(|h| &**h.workload()));
    }
    for (key, value) in &record.noted.dry_run_tags {
        tags.put(key, value.to_string());
    }
    custom(&mut tags, line, record, &tracing.tags);
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
        attributes: tags.into_attributes(),
        ..bare(trace, record.start_time, line.took, failed.then(String::new))
    }
}
/// The span of a call made for a request, as Envoy's clients of its own make it.
pub(super) fn of_call(call: &Call) -> Span {
    let mut tags = Tags::with_capacity(5);
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
        attributes: tags.into_attributes(),
        ..bare(&call.trace, call.start, call.took, call.failed.then(String::new))
    }
}
/// Envoy: no answer, a server error, or gRPC's words for one.
fn failed(record: &Record) -> bool {
    let grpc = record.grpc_status();
    record.status == 0 || record.status >= 500 || matches!(grpc, Some(2 | 4 | 12..=15))
}
fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn of_process(tags: &mut Tags, own: Option<&Workload>, process: &Process, istio: bool) {
    tags.put("component", "proxy");
    tags.put("node_id", process.node_id.as_str());
    tags.put_some("zone", own.map_or("", |w| &w.locality.zone));
    if istio {
        tags.put("istio.canonical_service", own.map_or("unknown", |w| &w.canonical_name));
        tags.put("istio.canonical_revision", own.map_or("latest", |w| &w.canonical_revision));
        tags.put("istio.namespace", process.namespace.as_str());
        tags.put("istio.cluster_id", process.cluster.as_str());
        tags.put("istio.mesh_id", process.mesh.as_str());
    }
}

fn of_request(tags: &mut Tags, line: &Line<'_>, record: &Record, longest_path: usize) {
    let headers = &record.headers;
    let scheme = header(headers, "x-forwarded-proto").unwrap_or(line.facts.scheme());
    let path = cut(record.path.to_string(), longest_path);
    tags.put("http.url", format!("{scheme}://{}{path}", record.authority));
    tags.put("http.method", record.method.as_str());
    tags.put("http.protocol", access::operator(&Of::Protocol, line));
    tags.put("downstream_cluster", "-");
    tags.put("user_agent", header(headers, "user-agent").unwrap_or("-"));
    tags.put("peer.address", line.facts.client.ip().to_canonical().to_string());
    tags.put_some("guid:x-request-id", header(headers, "x-request-id").unwrap_or_default());
    tags.put_some("guid:x-client-trace-id", header(headers, "x-client-trace-id").unwrap_or_default());
    if record.grpc {
        tags.put("grpc.path", path);
        tags.put("grpc.authority", &*record.authority);
        tags.put_some("grpc.content_type", header(headers, "content-type").unwrap_or_default());
        tags.put_some("grpc.timeout", header(headers, "grpc-timeout").unwrap_or_default());
    }
}

fn of_answer(tags: &mut Tags, line: &Line<'_>, record: &Record, failed: bool) {
    tags.put("request_size", access::operator(&Of::BytesReceived, line));
    tags.put("response_size", access::operator(&Of::BytesSent, line));
    tags.put("http.status_code", record.status.to_string());
    tags.put("response_flags", access::operator(&Of::ResponseFlags, line));
    let cluster = access::operator(&Of::UpstreamCluster, line);
    tags.put_some("upstream_cluster", &cluster);
    tags.put_some("upstream_cluster.name", &cluster);
    if let Some(status) = record.grpc_status() {
        tags.put("grpc.status_code", status.to_string());
    }
    if failed {
        tags.put("error", "true");
    }
}

/// Those of the mesh. One of a name that is there already takes its place.
fn custom(tags: &mut Tags, line: &Line<'_>, record: &Record, custom: &[(Arc<str>, Tag)]) {
    for (name, of) in custom {
        let value = match of {
            Tag::Literal(text) => text.to_string(),
            Tag::Header(name, default) => {
                let sent = record.headers.get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
                sent.or(default.as_deref().map(str::to_owned)).unwrap_or_default()
            }
            Tag::Format(template) => access::text(template, line),
        };
        if !value.is_empty() {
            tags.replace(name, value);
        }
    }
}

#[cfg(test)]
mod tests;
