//! The metric families of a waypoint, under Istio's names, and their handles.
use super::labels::{self, HTTP_LABELS, MESSAGE_LABELS, TCP_LABELS};
use super::{Flags, Record};
use mesh_model::Reason;
use mesh_model::metric_labels::Ends;
use mesh_model::telemetry::{Metric, MetricRules};
use mesh_runtime::metrics::{Counter, Family, Histogram, MetricError, Registry, Series};
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
    pub dry_run: Family<Counter>,
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
            // Istio's name but for the port it has in it, and its labels.
            dry_run: count(
                "envoy_http_inbound_rbac",
                "Requests by what the dry-run policies of an action said of them",
                &["authz_dry_run_action", "authz_dry_run_result"],
            )?,
            refused: ByReason::new(
                registry,
                "culvert_refused_total",
                "Tunnels, connections and requests refused here or not carried, by reason",
            )?,
        })
    }
    /// What a request counts in. `tags`: values of the rules' tags.
    pub fn request(&self, ends: Ends<'_>, record: &Record, rules: &MetricRules, tags: &[Box<str>]) -> RequestHandles {
        let (status, flags) = (record.status.to_string(), record.flags.to_string());
        let grpc_status = record.grpc_status().map(|s| s.to_string()).unwrap_or_default();
        let protocol = if record.grpc { "grpc" } else { "http" };
        let values = labels::http(ends, protocol, &status, &grpc_status, &flags);
        let wanted = Wanted { rules, tags };
        let messages = |metric, family| record.grpc.then(|| wanted.get(metric, family, &MESSAGE_LABELS, ends.values())).flatten();
        RequestHandles {
            requests: wanted.get(Metric::RequestCount, &self.requests, &HTTP_LABELS, values),
            duration: wanted.get(Metric::RequestDuration, &self.duration, &HTTP_LABELS, values),
            request_bytes: wanted.get(Metric::RequestSize, &self.request_bytes, &HTTP_LABELS, values),
            response_bytes: wanted.get(Metric::ResponseSize, &self.response_bytes, &HTTP_LABELS, values),
            request_messages: messages(Metric::GrpcRequestMessages, &self.request_messages),
            response_messages: messages(Metric::GrpcResponseMessages, &self.response_messages),
        }
    }
    /// What a connection counts in.
    pub fn connection(&self, ends: Ends<'_>, flags: Flags, rules: &MetricRules, tags: &[Box<str>]) -> ConnectionHandles {
        let flags = flags.to_string();
        let values = labels::tcp(ends, &flags);
        let get = |metric, family| Wanted { rules, tags }.get(metric, family, &TCP_LABELS, values);
        ConnectionHandles {
            opened: get(Metric::TcpOpenedConnections, &self.opened),
            closed: get(Metric::TcpClosedConnections, &self.closed),
            received: get(Metric::TcpReceivedBytes, &self.received),
            sent: get(Metric::TcpSentBytes, &self.sent),
        }
    }
}

/// Series as the mesh wants them.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    rules: &'a MetricRules,
    tags: &'a [Box<str>],
}
impl Wanted<'_> {
    fn get<S: Series, const N: usize>(
        self,
        metric: Metric,
        family: &Family<S>,
        names: &[&str; N],
        values: [&str; N],
    ) -> Option<Arc<S>> {
        let rules = self.rules.of(metric);
        if rules.disabled {
            return None;
        }
        if rules.tags.is_empty() {
            return Some(family.get(&values));
        }
        let (values, beside) = labels::adjust(names, values, rules, self.tags);
        Some(family.get_tagged(&values, &beside))
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

/// What one request counts in; `None` where it does not.
#[derive(Debug)]
pub(super) struct RequestHandles {
    pub requests: Option<Arc<Counter>>,
    pub duration: Option<Arc<Histogram>>,
    pub request_bytes: Option<Arc<Histogram>>,
    pub response_bytes: Option<Arc<Histogram>>,
    pub request_messages: Option<Arc<Counter>>,
    pub response_messages: Option<Arc<Counter>>,
}
/// What one connection carried as bytes counts in; `None` where it does not.
#[derive(Debug)]
pub(super) struct ConnectionHandles {
    pub opened: Option<Arc<Counter>>,
    pub closed: Option<Arc<Counter>>,
    pub received: Option<Arc<Counter>>,
    pub sent: Option<Arc<Counter>>,
}
/// Counts where something counts.
pub(super) fn add(counter: Option<&Arc<Counter>>, n: u64) {
    if let Some(counter) = counter {
        counter.add(n);
    }
}
/// Observes where something observes.
pub(super) fn observe(histogram: Option<&Arc<Histogram>>, value: f64) {
    if let Some(histogram) = histogram {
        histogram.observe(value);
    }
}
