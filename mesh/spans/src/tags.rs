//! What is said in a span: identifiers, times, tags, in the words of OpenTelemetry and of Istio. Pure.
use bytes::Bytes;
use mesh_model::telemetry::context::Context;
use mesh_model::workload::Workload;
pub use mesh_proto::opentelemetry::proto::common::v1::{AnyValue, KeyValue, any_value};
pub use mesh_proto::opentelemetry::proto::trace::v1::span::SpanKind;
use mesh_proto::opentelemetry::proto::trace::v1::status::StatusCode;
use mesh_proto::opentelemetry::proto::trace::v1::{Span, Status};
use std::time::{Duration, SystemTime};

/// Longest value of a tag, in bytes: spans wait in memory, and clients choose whether there are any and what they say.
pub const LONGEST: usize = 1024;

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
impl Process {
    /// Istio's name of a proxy for spans: its canonical service, or its account, and its namespace. `own`: its workload.
    pub fn service_name(&self, own: Option<&Workload>) -> String {
        let name = own.map(|w| &*w.canonical_name).filter(|n| !n.is_empty()).unwrap_or(&self.service_account);
        format!("{name}.{}", self.namespace)
    }
}

/// A span of which only this is told yet. `failed`: why, if so; the text may be empty.
pub fn bare(trace: &Context, start: SystemTime, took: Duration, failed: Option<String>) -> Span {
    let start = start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Span {
        trace_id: Bytes::copy_from_slice(&trace.trace.to_be_bytes()),
        span_id: Bytes::copy_from_slice(&trace.span.to_be_bytes()),
        parent_span_id: trace.parent.map(|p| Bytes::copy_from_slice(&p.to_be_bytes())).unwrap_or_default(),
        start_time_unix_nano: nanos(start),
        end_time_unix_nano: nanos(start + took),
        status: failed.map(|why| Status { message: cut(why, LONGEST), code: StatusCode::Error.into() }),
        flags: 1,
        ..Span::default()
    }
}
fn nanos(since_1970: Duration) -> u64 {
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

/// At most so many bytes of a text, whole characters.
pub fn cut(mut text: String, most: usize) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// A tag.
pub fn tag(key: &str, value: impl Into<String>) -> KeyValue {
    let value = any_value::Value::StringValue(value.into());
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}

/// Tags in the making.
#[derive(Debug)]
pub struct Tags(Vec<KeyValue>);
impl Tags {
    /// None yet.
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }
    /// One more; a long value is cut ([`LONGEST`]).
    pub fn put(&mut self, key: &str, value: impl Into<String>) {
        self.0.push(tag(key, cut(value.into(), LONGEST)));
    }
    /// One more, unless it says nothing.
    pub fn put_some(&mut self, key: &str, value: &str) {
        if !value.is_empty() {
            self.put(key, value);
        }
    }
    /// Takes the place of the one of this name, if there is one.
    pub fn replace(&mut self, key: &str, value: impl Into<String>) {
        self.0.retain(|tag| *tag.key != *key);
        self.put(key, value);
    }
    /// What is known of a workload, in Istio's words after `before` (`istio.source_`).
    pub fn workload(&mut self, before: &str, workload: Option<&Workload>) {
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
    /// As a span has them.
    pub fn into_attributes(self) -> Vec<KeyValue> {
        self.0
    }
}
