//! Metrics that exist anyway and are only written down when somebody asks: destinations under Envoy's names, which people's
//! dashboards know, and the state of this process.
use crate::upstream::{ClusterView, Limits};
use mesh_runtime::metrics::Scrape;

/// What is read of one destination.
type Read = fn(&ClusterView) -> u64;

/// A family of destinations: name, help, kind, value.
type OfCluster = (&'static str, &'static str, &'static str, Read);

/// Whether a limit is reached.
fn open(count: u32, limit: u32) -> u64 {
    u64::from(limit != u32::MAX && count >= limit)
}

const CLUSTER: [OfCluster; 22] = [
    ("envoy_cluster_membership_total", "Endpoints", "gauge", |c| c.hosts.len() as u64),
    ("envoy_cluster_membership_healthy", "Endpoints that are not ejected", "gauge", |c| {
        c.hosts.iter().filter(|h| !h.ejected).count() as u64
    }),
    ("envoy_cluster_upstream_cx_active", "Connections now", "gauge", |c| c.counts.connections.into()),
    ("envoy_cluster_upstream_cx_total", "Connections begun", "counter", |c| c.counts.connections_total),
    ("envoy_cluster_upstream_cx_connect_fail", "Connections that could not be made", "counter", |c| c.counts.connect_failures),
    ("envoy_cluster_upstream_cx_overflow", "Connections refused by the limit", "counter", |c| c.counts.connection_overflows),
    ("envoy_cluster_upstream_rq_active", "Requests under way", "gauge", |c| c.counts.requests.into()),
    ("envoy_cluster_upstream_rq_total", "Requests admitted", "counter", |c| c.counts.requests_total),
    ("envoy_cluster_upstream_rq_pending_active", "Requests waiting for a connection", "gauge", |c| c.counts.pending.into()),
    // Envoy counts both limits that turn a request away here.
    ("envoy_cluster_upstream_rq_pending_overflow", "Requests refused by a limit", "counter", |c| {
        c.counts.pending_overflows.saturating_add(c.counts.request_overflows)
    }),
    ("envoy_cluster_upstream_rq_retry", "Retries", "counter", |c| c.counts.retries_total),
    ("envoy_cluster_upstream_rq_retry_overflow", "Retries refused by limit or budget", "counter", |c| c.counts.retry_overflows),
    ("envoy_cluster_outlier_detection_ejections_active", "Endpoints ejected now", "gauge", |c| {
        c.hosts.iter().filter(|h| h.ejected).count() as u64
    }),
    ("envoy_cluster_outlier_detection_ejections_enforced_total", "Ejections", "counter", |c| c.counts.ejections),
    ("envoy_cluster_outlier_detection_ejections_overflow", "Ejections the policy did not allow", "counter", |c| {
        c.counts.ejection_overflows
    }),
    ("envoy_cluster_circuit_breakers_default_cx_open", "1: no further connection is made", "gauge", |c| {
        open(c.counts.connections, c.limits.connections)
    }),
    ("envoy_cluster_circuit_breakers_default_rq_open", "1: no further request is taken", "gauge", |c| {
        open(c.counts.requests, c.limits.requests)
    }),
    ("envoy_cluster_circuit_breakers_default_rq_pending_open", "1: no further request may wait", "gauge", |c| {
        open(c.counts.pending, c.limits.pending)
    }),
    ("envoy_cluster_circuit_breakers_default_rq_retry_open", "1: no further retry is made", "gauge", |c| {
        open(c.counts.retries, c.limits.retries)
    }),
    ("envoy_cluster_circuit_breakers_default_remaining_cx", "Connections that may still be made", "gauge", |c| {
        remaining(c.counts.connections, c.limits.connections)
    }),
    ("envoy_cluster_circuit_breakers_default_remaining_rq", "Requests that may still be taken", "gauge", |c| {
        remaining(c.counts.requests, c.limits.requests)
    }),
    ("envoy_cluster_circuit_breakers_default_remaining_pending", "Requests that may still wait", "gauge", |c| {
        remaining(c.counts.pending, c.limits.pending)
    }),
];

fn remaining(count: u32, limit: u32) -> u64 {
    limit.saturating_sub(count).into()
}

/// Names of what [`clusters`] writes.
pub(crate) fn cluster_names() -> Vec<&'static str> {
    CLUSTER.iter().map(|(name, ..)| *name).collect()
}

/// Writes what is known of destinations, label `cluster_name` as istiod names them.
pub(crate) fn clusters(views: &[ClusterView], out: &mut Scrape<'_>) {
    if views.is_empty() {
        return;
    }
    for (name, help, kind, read) in &CLUSTER {
        let mut samples = out.family(name, help, kind);
        for view in views {
            // What has no limit has nothing that remains.
            if name.contains("remaining") && unlimited(name, &view.limits) {
                continue;
            }
            samples.put(&[("cluster_name", &view.name)], read(view));
        }
    }
}
fn unlimited(name: &str, limits: &Limits) -> bool {
    let limit = match name.rsplit_once('_') {
        Some((_, "cx")) => limits.connections,
        Some((_, "rq")) => limits.requests,
        _ => limits.pending,
    };
    limit == u32::MAX
}

/// State of the process at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    /// Version of the mesh in use.
    pub version: u64,
    /// Objects refused.
    pub problems: usize,
    /// Tunnels of node agents.
    pub tunnels: usize,
    /// Log lines lost.
    pub lost_lines: u64,
}
/// Names of what [`process`] writes.
pub(crate) const PROCESS_NAMES: [&str; 4] =
    ["culvert_config_version", "culvert_config_problems", "culvert_tunnels_active", "culvert_log_lines_dropped_total"];
/// Writes the state of the process.
pub(crate) fn process(now: Process, out: &mut Scrape<'_>) {
    let [version, problems, tunnels, lost] = PROCESS_NAMES;
    out.family(version, "Version of the mesh snapshot in use", "gauge").put(&[], now.version);
    out.family(problems, "Configuration objects refused, now", "gauge").put(&[], now.problems as u64);
    out.family(tunnels, "Tunnels of node agents that are open now", "gauge").put(&[], now.tunnels as u64);
    out.family(lost, "Log lines lost because the output was blocked or failed", "counter").put(&[], now.lost_lines);
}
