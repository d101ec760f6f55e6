//! The metric families of a waypoint, under Istio's names, and their handles.
use super::Record;
use super::labels::{self, HTTP_LABELS, MESSAGE_LABELS, TCP_LABELS};
use mesh_model::Reason;
use mesh_model::metric_labels::Ends;
use mesh_runtime::metrics::{Counter, Family, Histogram, MetricError, Registry};
use std::sync::{Arc, OnceLock};

/// Bucket bounds of Istio's distributions, whatever their unit (Envoy's defaults): milliseconds of duration, bytes of sizes.
pub(super) const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

#[derive(Debug)]
pub(super) struct Metrics {
    pub requests: Family<Counter>,
    pub duration: Family<Histogram>,
    pub request_bytes: Family<Histogram>,
    pub response_bytes: Family<Histogram>,
    pub request_messages: Family<Counter>,
    pub response_messages: Family<Counter>,
    pub opened: Family<Counter>,
    pub closed: Family<Counter>,
    pub sent: Family<Counter>,
    pub received: Family<Counter>,
    pub refused: ByReason,
    pub shadow: Family<Counter>,
}
impl Metrics {
    pub fn new(registry: &Registry) -> Result<Self, MetricError> {
        let count = |name, help, labels| registry.family(Family::<Counter>::new(name, help, labels));
        let spread = |name, help| registry.family(Family::with_buckets(name, help, &HTTP_LABELS, &BUCKETS));
        Ok(Self {
            requests: count("istio_requests_total", "Requests answered or given up", &HTTP_LABELS)?,
            duration: spread("istio_request_duration_milliseconds", "Time from a request's head to its answer's last byte")?,
            request_bytes: spread("istio_request_bytes", "Sizes of request bodies")?,
            response_bytes: spread("istio_response_bytes", "Sizes of response bodies")?,
            request_messages: count("istio_request_messages_total", "gRPC messages from clients", &MESSAGE_LABELS)?,
            response_messages: count("istio_response_messages_total", "gRPC messages to clients", &MESSAGE_LABELS)?,
            opened: count("istio_tcp_connections_opened_total", "Connections opened", &TCP_LABELS)?,
            closed: count("istio_tcp_connections_closed_total", "Connections closed", &TCP_LABELS)?,
            sent: count("istio_tcp_sent_bytes_total", "Bytes sent to the client, as responses", &TCP_LABELS)?,
            received: count("istio_tcp_received_bytes_total", "Bytes received from the client, as requests", &TCP_LABELS)?,
            shadow: count(
                "culvert_policy_shadow_total",
                "Requests and connections by what policies that enforce nothing (dry runs, AUDIT) said of them",
                &["policy", "result"],
            )?,
            refused: ByReason::new(
                registry,
                "culvert_refused_total",
                "Tunnels, connections and requests refused here or not carried, by reason",
            )?,
        })
    }
    /// What a request counts in.
    pub fn request(&self, ends: Ends<'_>, record: &Record) -> RequestHandles {
        let (status, flags) = (record.status.to_string(), record.flags.to_string());
        let grpc_status = record.grpc_status.filter(|_| record.grpc).map(|s| s.to_string()).unwrap_or_default();
        let protocol = if record.grpc { "grpc" } else { "http" };
        let values = labels::http(ends, protocol, &status, &grpc_status, &flags);
        let messages = record.grpc.then(|| {
            let values = ends.values();
            (self.request_messages.get(&values), self.response_messages.get(&values))
        });
        RequestHandles {
            requests: self.requests.get(&values),
            duration: self.duration.get(&values),
            request_bytes: self.request_bytes.get(&values),
            response_bytes: self.response_bytes.get(&values),
            messages,
        }
    }
}

/// A counter per reason, looked up once each.
#[derive(Debug)]
pub(super) struct ByReason {
    family: Family<Counter>,
    handles: Box<[OnceLock<Arc<Counter>>]>,
}
impl ByReason {
    fn new(registry: &Registry, name: &'static str, help: &'static str) -> Result<Self, MetricError> {
        let family = registry.family(Family::new(name, help, &["reporter", "reason"]))?;
        Ok(Self { family, handles: Reason::ALL.iter().map(|_| OnceLock::new()).collect() })
    }
    pub fn inc(&self, reason: Reason) {
        let make = || self.family.pin(&["waypoint", reason.as_str()]);
        // `ALL` lists the reasons in the order of their discriminants.
        match self.handles.get(reason as usize) {
            Some(handle) => handle.get_or_init(make).inc(),
            None => make().inc(),
        }
    }
}

/// What one request counts in.
#[derive(Debug)]
pub(super) struct RequestHandles {
    pub requests: Arc<Counter>,
    pub duration: Arc<Histogram>,
    pub request_bytes: Arc<Histogram>,
    pub response_bytes: Arc<Histogram>,
    /// Of gRPC: requests, responses.
    pub messages: Option<(Arc<Counter>, Arc<Counter>)>,
}
