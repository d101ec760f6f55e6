//! Clusters as the admin endpoint shows them.
use super::cluster::Cluster;
use super::host::Host;
use serde::Serialize;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// A cluster.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterView {
    /// Istio's name.
    pub name: String,
    /// Endpoints.
    pub hosts: Vec<HostView>,
    /// Limits.
    pub limits: Limits,
    /// Counts.
    pub counts: Counts,
}
/// An endpoint.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostView {
    /// Address and port; the host name's last address.
    pub address: SocketAddr,
    /// Workload id.
    pub workload: Arc<str>,
    /// Through a tunnel.
    pub hbone: bool,
    /// Weight.
    pub weight: u32,
    /// Priority, 0 first.
    pub priority: u32,
    /// `region/zone/subzone`.
    pub locality: String,
    /// Kept away from by outlier detection.
    pub ejected: bool,
    /// How often it was.
    pub ejections: u64,
    /// Requests under way.
    pub active_requests: u32,
    /// Connections, those being made included.
    pub connections: u32,
    /// Requests so far.
    pub requests: u64,
    /// Attempts that failed or were answered with 5xx.
    pub failures: u64,
}
/// Limits of a cluster, `u32::MAX` for none.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Connections.
    pub connections: u32,
    /// Waiting requests.
    pub pending: u32,
    /// Requests under way.
    pub requests: u32,
    /// Retries under way.
    pub retries: u32,
}
/// What is under way in a cluster, and what happened since it was made.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    /// Connections now.
    pub connections: u32,
    /// Requests that wait now.
    pub pending: u32,
    /// Requests under way now.
    pub requests: u32,
    /// Retries under way now.
    pub retries: u32,
    /// Connections begun.
    pub connections_total: u64,
    /// Connections that could not be made.
    pub connect_failures: u64,
    /// Raw connections refused by the limit.
    pub connection_overflows: u64,
    /// Requests refused because too many wait.
    pub pending_overflows: u64,
    /// Requests refused because too many are under way.
    pub request_overflows: u64,
    /// Requests admitted.
    pub requests_total: u64,
    /// Retries.
    pub retries_total: u64,
    /// Retries refused by limit or budget.
    pub retry_overflows: u64,
    /// Ejections.
    pub ejections: u64,
    /// Ejections the policy did not allow.
    pub ejection_overflows: u64,
}

pub(super) fn of(cluster: &Cluster) -> ClusterView {
    let (state, pool) = (&cluster.state, &cluster.policy.pool);
    let c = &state.counters;
    let members = cluster.members.load();
    ClusterView {
        name: cluster.name().to_owned(),
        hosts: members.hosts.iter().zip(&*members.places).map(|(h, p)| host(h, p.priority)).collect(),
        limits: Limits {
            connections: pool.max_connections,
            pending: pool.max_pending,
            requests: pool.max_requests,
            retries: pool.max_retries,
        },
        counts: Counts {
            connections: state.connections.load(Relaxed),
            pending: state.pending.load(Relaxed),
            requests: state.requests.load(Relaxed),
            retries: state.retries.load(Relaxed),
            connections_total: c.connections.load(Relaxed),
            connect_failures: c.connect_failures.load(Relaxed),
            connection_overflows: c.connection_overflows.load(Relaxed),
            pending_overflows: c.pending_overflows.load(Relaxed),
            request_overflows: c.request_overflows.load(Relaxed),
            requests_total: c.requests.load(Relaxed),
            retries_total: c.retries.load(Relaxed),
            retry_overflows: c.retry_overflows.load(Relaxed),
            ejections: c.ejections.load(Relaxed),
            ejection_overflows: c.ejection_overflows.load(Relaxed),
        },
    }
}
fn host(host: &Host, priority: u32) -> HostView {
    let w = host.workload();
    let l = &w.locality;
    HostView {
        address: host.addr(),
        workload: Arc::clone(&w.uid),
        hbone: host.is_hbone(),
        weight: host.weight,
        priority,
        locality: format!("{}/{}/{}", l.region, l.zone, l.subzone),
        ejected: host.is_ejected(),
        ejections: host.state.ejection.lock().total(),
        active_requests: host.active(),
        connections: host.state.connections.load(Relaxed),
        requests: host.state.requests.load(Relaxed),
        failures: host.state.failures.load(Relaxed),
    }
}
