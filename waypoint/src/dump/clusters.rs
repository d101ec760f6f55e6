//! `/clusters`, as Envoy shows it: lines of `cluster::endpoint::stat::value`, or its JSON, which `istioctl` reads.
use crate::upstream::{ClusterView, HostView};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::net::SocketAddr;

/// The text.
pub(crate) fn clusters_text(all: &[ClusterView]) -> String {
    let mut out = String::new();
    for cluster in all {
        cluster_lines(cluster, &mut out);
    }
    out
}

fn cluster_lines(c: &ClusterView, out: &mut String) {
    let name = &c.name;
    // Writing to a String cannot fail.
    let mut line = |text: std::fmt::Arguments<'_>| {
        let _ = writeln!(out, "{name}::{text}");
    };
    line(format_args!("observability_name::{name}"));
    for (limit, value) in limits(c) {
        line(format_args!("default_priority::{limit}::{value}"));
    }
    line(format_args!("added_via_api::true"));
    for h in &c.hosts {
        let at = h.address;
        for (stat, value, _) in stats(h) {
            line(format_args!("{at}::{stat}::{value}"));
        }
        let [region, zone, sub_zone] = locality(h);
        line(format_args!("{at}::hostname::{}", h.workload));
        line(format_args!("{at}::health_flags::{}", if h.ejected { "/failed_outlier_check" } else { "healthy" }));
        line(format_args!("{at}::weight::{}", h.weight));
        line(format_args!("{at}::region::{region}"));
        line(format_args!("{at}::zone::{zone}"));
        line(format_args!("{at}::sub_zone::{sub_zone}"));
        line(format_args!("{at}::priority::{}", h.priority));
        line(format_args!("{at}::hbone::{}", h.hbone));
        line(format_args!("{at}::ejections::{}", h.ejections));
    }
}

/// The JSON.
pub(crate) fn clusters_json(all: &[ClusterView]) -> Value {
    json!({ "cluster_statuses": all.iter().map(cluster).collect::<Vec<_>>() })
}

fn cluster(c: &ClusterView) -> Value {
    json!({
        "name": c.name,
        "observability_name": c.name,
        "added_via_api": true,
        "host_statuses": c.hosts.iter().map(host).collect::<Vec<_>>(),
        "circuit_breakers": { "thresholds": [{
            "max_connections": c.limits.connections,
            "max_pending_requests": c.limits.pending,
            "max_requests": c.limits.requests,
            "max_retries": c.limits.retries,
        }] },
        // Ours: what is under way and what happened.
        "counts": c.counts,
    })
}

fn host(h: &HostView) -> Value {
    let stats: Vec<Value> =
        stats(h).iter().map(|(name, value, kind)| json!({ "name": name, "value": value.to_string(), "type": kind })).collect();
    let [region, zone, sub_zone] = locality(h);
    let mut health = json!({ "eds_health_status": "HEALTHY" });
    if h.ejected {
        health["failed_outlier_check"] = json!(true);
    }
    json!({
        "address": socket(h.address),
        "hostname": h.workload,
        "stats": stats,
        "health_status": health,
        "weight": h.weight,
        "priority": h.priority,
        "locality": { "region": region, "zone": zone, "sub_zone": sub_zone },
        "hbone": h.hbone,
        "ejections": h.ejections,
    })
}

fn limits(c: &ClusterView) -> [(&'static str, u32); 4] {
    [
        ("max_connections", c.limits.connections),
        ("max_pending_requests", c.limits.pending),
        ("max_requests", c.limits.requests),
        ("max_retries", c.limits.retries),
    ]
}

/// Envoy's statistics of an endpoint, as far as they are counted here.
fn stats(h: &HostView) -> [(&'static str, u64, &'static str); 5] {
    [
        ("cx_active", h.connections.into(), "GAUGE"),
        ("rq_active", h.active_requests.into(), "GAUGE"),
        ("rq_error", h.failures, "COUNTER"),
        ("rq_success", h.requests.saturating_sub(h.failures).saturating_sub(h.active_requests.into()), "COUNTER"),
        ("rq_total", h.requests, "COUNTER"),
    ]
}

fn locality(h: &HostView) -> [&str; 3] {
    let mut parts = h.locality.splitn(3, '/');
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// An address as Envoy writes it in JSON.
pub(super) fn socket(addr: SocketAddr) -> Value {
    json!({ "socket_address": { "address": addr.ip().to_canonical().to_string(), "port_value": addr.port() } })
}

#[cfg(test)]
mod tests;
