//! The agent's metrics under Istio's names (node-agent §1.12), and the handles of one connection.
//!
//! Labels are looked up once per connection; a byte or an event afterwards is one atomic add. Series of workloads that
//! are gone expire by sweeping. Upstream: the three directions. Downstream: the scrape on 15020.
use crate::conns::Direction;
use crate::record::{LABELS, Record, labels};
use mesh_model::metric_labels::{Ends, NAMES, UNKNOWN};
use mesh_model::workload::Workload;
use mesh_model::{Reason, SpiffeId};
use mesh_runtime::metrics::{Counter, Family, Gauge, Histogram, MetricError, Registry, connect_times};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Metrics of the agent. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    opened: Family<Counter>,
    closed: Family<Counter>,
    sent: Family<Counter>,
    received: Family<Counter>,
    failed: Family<Counter>,
    refused: Family<Counter>,
    crl_rejections: [Arc<Counter>; 2],
    on_demand_dns: Family<Counter>,
    bypassed: Family<Counter>,
    of_node: Arc<Counter>,
    set_up: Family<Histogram>,
    /// TCP connects to peers.
    pub connect_to_peers: Arc<Histogram>,
    /// TCP connects to applications in their pods.
    pub connect_to_applications: Arc<Histogram>,
    sockets_open: [Arc<Gauge>; 2],
    dns_requests: Family<Counter>,
    dns_upstream_requests: Family<Counter>,
    dns_upstream_failures: Family<Counter>,
    dns_upstream_duration: Family<Histogram>,
    /// Certificates about to be or already issued, connections cut by policy, and other plain counts.
    pub cut: Arc<Counter>,
    /// Proxies of local pods.
    pub active_pods: Arc<Gauge>,
    /// Pods that should be served and are not yet.
    pub pending_pods: Arc<Gauge>,
    /// Pods ever started.
    pub pods_started: Arc<Counter>,
    /// Pods ever stopped.
    pub pods_stopped: Arc<Counter>,
    /// Time from learning that a pod is to be served until it was captured.
    pub pod_start: Arc<Histogram>,
    /// Objects refused by the configuration source, now.
    pub config_problems: Arc<Gauge>,
    /// Version of the snapshot in use.
    pub config_version: Arc<Gauge>,
}

impl Metrics {
    /// Registers all of them.
    pub fn new(registry: &Registry) -> Result<Self, MetricError> {
        let tcp = |name, help| registry.family(Family::<Counter>::new(name, help, &LABELS));
        let gauge = |name, help| -> Result<Arc<Gauge>, MetricError> {
            Ok(registry.family(Family::<Gauge>::new(name, help, &[]))?.pin(&[]))
        };
        let counter = |name, help| -> Result<Arc<Counter>, MetricError> {
            Ok(registry.family(Family::<Counter>::new(name, help, &[]))?.pin(&[]))
        };
        let dns = |name, help| registry.family(Family::<Counter>::new(name, help, &DNS_LABELS));
        let connects = registry.family(connect_times())?;
        let sockets = registry.family(Family::<Gauge>::new(
            "istio_tcp_sockets_open",
            "Connections of applications that are open now",
            &["reporter"],
        ))?;
        let refused = registry.family(Family::<Counter>::new(
            "culvert_connections_refused_total",
            "Connections refused, cut or failed, by reason",
            &["reporter", "reason"],
        ))?;
        let by_side = |name, help| -> Result<[Arc<Counter>; 2], MetricError> {
            let family = registry.family(Family::<Counter>::new(name, help, &["reporter"]))?;
            Ok([Direction::Outbound, Direction::Inbound].map(|side| family.pin(&[side.reporter()])))
        };
        // Only shown: there is no way to count one.
        by_side(
            "istio_crl_untracked_connections_total",
            "Connections that are carried and that revocation lists cannot reach (unstable): none, what cannot be judged is refused",
        )?;
        Ok(Self {
            opened: tcp("istio_tcp_connections_opened_total", "Connections opened")?,
            closed: tcp("istio_tcp_connections_closed_total", "Connections closed")?,
            sent: tcp("istio_tcp_sent_bytes_total", "Bytes sent to the client, as responses")?,
            received: tcp("istio_tcp_received_bytes_total", "Bytes received from the client, as requests")?,
            failed: tcp("istio_tcp_connections_failed_total", "Connections that failed or were refused (unstable)")?,
            refused,
            crl_rejections: by_side(
                "istio_crl_policy_rejections_total",
                "Connections refused because a certificate is on a revocation list, or none in force speaks of it (unstable)",
            )?,
            on_demand_dns: registry.family(Family::new(
                "istio_on_demand_dns_total",
                "Connections whose destination is known by a host name alone, which was resolved for them (unstable)",
                &ON_DEMAND_LABELS,
            ))?,
            bypassed: registry.family(Family::<Counter>::new(
                "culvert_waypoint_bypassed_total",
                "Connections that went around their declared waypoint because it is missing",
                &["destination_service", "destination_workload_namespace", "destination_workload"],
            ))?,
            of_node: counter(
                "culvert_node_connections_total",
                "Connections that policies refuse, let through because processes of the node opened them (health probes)",
            )?,
            set_up: registry.family(Family::with_buckets(
                "culvert_connection_setup_seconds",
                "Time from accepting a connection to having reached its destination",
                &["reporter"],
                &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
            ))?,
            connect_to_peers: connects.pin(&[Direction::Outbound.reporter()]),
            connect_to_applications: connects.pin(&[Direction::Inbound.reporter()]),
            sockets_open: [sockets.pin(&["source"]), sockets.pin(&["destination"])],
            dns_requests: dns("istio_dns_requests_total", "Questions of pods")?,
            dns_upstream_requests: dns("istio_dns_upstream_requests_total", "Questions passed on to a pod's name servers")?,
            dns_upstream_failures: dns("istio_dns_upstream_failures_total", "Questions that none of them answered")?,
            dns_upstream_duration: registry.family(Family::with_buckets(
                "istio_dns_upstream_request_duration_seconds",
                "Time until a pod's name servers answered",
                &DNS_LABELS,
                &[0.0005, 0.001, 0.01, 0.1, 1.0, 5.0],
            ))?,
            cut: counter("culvert_connections_cut_total", "Live connections cut because a change no longer allows them")?,
            active_pods: gauge("workload_manager_active_proxy_count", "Pods served now")?,
            pending_pods: gauge("workload_manager_pending_proxy_count", "Pods that should be served and are not yet")?,
            pods_started: counter("workload_manager_proxies_started_total", "Pods ever started")?,
            pods_stopped: counter("workload_manager_proxies_stopped_total", "Pods ever stopped")?,
            pod_start: registry
                .family(Family::with_buckets(
                    "culvert_pod_start_seconds",
                    "Time from learning that a pod is to be served until it was captured, in seconds",
                    &[],
                    &[0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0, 10.0, 20.0],
                ))?
                .pin(&[]),
            config_problems: gauge("culvert_config_problems", "Configuration objects refused, now")?,
            config_version: gauge("culvert_config_version", "Version of the mesh snapshot in use")?,
        })
    }

    /// A connection was established: counts it and returns the handles it keeps.
    pub fn open(&self, record: &Record) -> TcpHandles {
        let values = labels(record, "-");
        self.opened.get(&values).inc();
        if record.of_node {
            self.of_node.inc();
        }
        if record.around.is_some() {
            let service = record.service.as_ref().map_or(UNKNOWN, |s| &*s.key.hostname);
            let (ns, name) = record.destination.as_ref().map_or((UNKNOWN, UNKNOWN), |w| (&*w.namespace, &*w.workload_name));
            self.bypassed.get(&[service, ns, name]).inc();
        }
        self.set_up.get(&[record.direction.reporter()]).observe_duration(record.started.elapsed());
        let sockets = Arc::clone(match record.direction {
            Direction::Outbound => &self.sockets_open[0],
            Direction::Inbound => &self.sockets_open[1],
        });
        sockets.inc();
        TcpHandles {
            closed: self.closed.get(&values),
            sent: self.sent.get(&values),
            received: self.received.get(&values),
            sockets,
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
        }
    }

    /// The counts of questions like this one.
    pub fn dns(&self, kind: &str, transport: &str, client: Option<&Workload>) -> DnsMetrics {
        let (service, revision) =
            client.map_or(("unknown", "unknown"), |client| (&*client.canonical_name, &*client.canonical_revision));
        let labels = [kind, transport, service, revision];
        DnsMetrics {
            requests: self.dns_requests.get(&labels),
            upstream_requests: self.dns_upstream_requests.get(&labels),
            upstream_failures: self.dns_upstream_failures.get(&labels),
            upstream_duration: self.dns_upstream_duration.get(&labels),
        }
    }

    /// A connection was refused before it was established.
    pub fn failed(&self, record: &Record, reason: Reason) {
        self.failed.get(&labels(record, reason.response_flag())).inc();
        self.refused(record.direction, reason);
    }

    /// The name `host` is resolved for a connection of `source`, which proves `id`.
    pub fn resolves(&self, source: &Arc<Workload>, id: &SpiffeId, host: &str) {
        let ends = Ends {
            reporter: Direction::Outbound.reporter(),
            source: Some(source),
            source_id: Some(id),
            destination: None,
            destination_id: None,
            service: None,
        };
        let [_, workload, service, revision, namespace, principal, app, version, cluster, ..] = ends.values();
        self.on_demand_dns.get(&[workload, service, revision, namespace, principal, app, version, cluster, host]).inc();
    }

    /// Counts a refusal by reason only (also for peers of whom nothing is known).
    pub fn refused(&self, direction: Direction, reason: Reason) {
        if reason == Reason::CertRevoked {
            let [outbound, inbound] = &self.crl_rejections;
            let side = match direction {
                Direction::Outbound => outbound,
                Direction::Inbound => inbound,
            };
            side.inc();
        }
        self.refused.get(&[direction.reporter(), reason.as_str()]).inc();
    }
}

/// Labels of what is counted of DNS (node-agent §1.12).
const DNS_LABELS: [&str; 4] = ["request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"];

/// Labels of names that are resolved for connections (node-agent §1.12): those of every connection's source, and the name.
const ON_DEMAND_LABELS: [&str; 9] = {
    let [_, workload, service, revision, namespace, principal, app, version, cluster, ..] = NAMES;
    [workload, service, revision, namespace, principal, app, version, cluster, "hostname"]
};

/// What is counted of one question.
#[derive(Debug)]
pub struct DnsMetrics {
    /// It was asked.
    pub requests: Arc<Counter>,
    /// It was passed on.
    pub upstream_requests: Arc<Counter>,
    /// Nobody answered.
    pub upstream_failures: Arc<Counter>,
    /// How long that took.
    pub upstream_duration: Arc<Histogram>,
}

/// Handles of one established connection. Dropping them counts the close.
#[derive(Debug)]
pub struct TcpHandles {
    closed: Arc<Counter>,
    sent: Arc<Counter>,
    received: Arc<Counter>,
    sockets: Arc<Gauge>,
    to_server: AtomicU64,
    to_client: AtomicU64,
}
impl TcpHandles {
    /// Bytes from the client towards the server (Istio's `received`).
    pub fn to_server(&self, n: u64) {
        self.received.add(n);
        self.to_server.fetch_add(n, Ordering::Relaxed);
    }
    /// Bytes from the server towards the client (Istio's `sent`).
    pub fn to_client(&self, n: u64) {
        self.sent.add(n);
        self.to_client.fetch_add(n, Ordering::Relaxed);
    }
    /// Bytes so far: towards the server, towards the client.
    pub fn bytes(&self) -> (u64, u64) {
        (self.to_server.load(Ordering::Relaxed), self.to_client.load(Ordering::Relaxed))
    }
}
impl Drop for TcpHandles {
    fn drop(&mut self) {
        // A gauge must come down on every way out of a connection, also a cancelled one; nothing is logged here.
        self.closed.inc();
        self.sockets.dec();
    }
}
