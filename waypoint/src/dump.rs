//! What the admin server shows: configuration as this process understood it, destinations with their health, live tunnels.
//!
//! Built on request from one snapshot; never on the path of a request. Shapes that tools read (`/clusters`, `/listeners`,
//! `problems`, `certificates`) are Envoy's and the node agent's.
mod clusters;
mod envoy;
mod layer7;

pub(crate) use clusters::{clusters_json, clusters_text};

use crate::conn::Shared;
use mesh_model::inbound::is_instance;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::service::{AppProtocol, Service};
use mesh_model::workload::Workload;
use mesh_model::{Refusal, Snapshot};
use mesh_sources::Diagnostics;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::Arc;

/// Version of this build.
pub(crate) fn version() -> Value {
    json!({
        "name": "waypoint",
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("CULVERT_GIT_REVISION").unwrap_or("unknown"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "product": "culvert",
    })
}

/// `/config_dump`: what this process knows, what it does with it, and what it refused; and `configs`, the same in Envoy's words,
/// which is all that `istioctl proxy-config` looks at. `endpoints`: in those too.
pub(crate) fn config(shared: &Shared, diagnostics: &Diagnostics, endpoints: bool) -> Value {
    let snap = shared.mesh.load_full();
    let me = shared.me(&snap);
    json!({
        "configs": envoy::configs(shared, &snap, me.as_ref().ok().map(|me| &***me), endpoints),
        "version": snap.version(),
        "build": version(),
        "identity": shared.identity.as_str(),
        "workload": own(me.as_ref()),
        "services": me.as_ref().map(|me| bound(&snap, me)).unwrap_or_default(),
        "counts": { "services": snap.services().count(), "workloads": snap.workloads().count() },
        "routes": snap.routes().map(|(key, table)| layer7::routes(key, table)).collect::<Vec<_>>(),
        "destinations": snap.destinations().map(|d| layer7::destination(d)).collect::<Vec<_>>(),
        "gateways": snap.gateways().map(|g| layer7::gateway(g)).collect::<Vec<_>>(),
        "traffic": snap.treatments().map(|(target, t)| layer7::treatment(target, t)).collect::<Vec<_>>(),
        "policies": snap.l7_policies().map(|(target, all)| layer7::policies(target, all)).collect::<Vec<_>>(),
        "certificates": shared.svid.cache().dump(),
        "jwks": jwks(shared),
        "config": settings(shared),
        "problems": diagnostics.to_json(),
    })
}

fn own(me: Result<&&Arc<Workload>, &Refusal>) -> Value {
    match me {
        Ok(me) => json!({ "uid": me.uid, "name": me.name, "namespace": me.namespace }),
        Err(why) => json!({ "error": why.to_string() }),
    }
}

/// Keys of token issuers, and what went wrong with the last fetch.
fn jwks(shared: &Shared) -> Vec<Value> {
    let all = shared.tokens.view().into_iter();
    all.map(|(source, keys, error)| json!({ "source": source, "keys": keys, "error": error })).collect()
}

/// The services this waypoint serves.
fn bound(snap: &Snapshot, me: &Workload) -> Vec<Value> {
    let mine = |s: &&Arc<Service>| s.waypoints.iter().any(|w| is_instance(snap, me, &w.waypoint));
    let ports = |s: &Service| {
        s.ports
            .iter()
            .map(|p| {
                let protocol = match p.protocol {
                    AppProtocol::Unknown => "unknown",
                    AppProtocol::Http11 => "http",
                    AppProtocol::Http2 => "http2",
                    AppProtocol::Grpc => "grpc",
                    AppProtocol::Tls => "tls",
                    AppProtocol::Tcp => "tcp",
                };
                json!({ "port": p.port, "target": p.target, "protocol": protocol })
            })
            .collect::<Vec<_>>()
    };
    snap.services()
        .filter(mine)
        .map(|s| {
            json!({
                "name": s.name,
                "namespace": s.key.namespace,
                "hostname": s.key.hostname,
                "vips": s.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "ports": ports(s),
                "endpoints": snap.endpoints(&s.key).map(|w| &w.uid).collect::<Vec<_>>(),
                "routed": snap.find_routes(&s.key).is_some(),
            })
        })
        .collect()
}

fn settings(shared: &Shared) -> Value {
    let s = &shared.settings;
    json!({
        "meshDir": s.mesh_dir,
        "kubernetes": s.kubernetes,
        "xdsAddress": s.control.xds_address,
        "caAddress": s.control.ca_address,
        "withoutEffect": s.notes,
        "namespace": s.namespace,
        "pod": s.pod,
        "gateway": s.gateway,
        "clusterId": s.cluster_id,
        "clusterDomain": s.cluster_domain,
        "network": s.network,
        "node": s.node,
        "trustDomain": s.trust_domain,
        "trustDomainAliases": s.trust_domain_aliases,
        "rootNamespace": s.root_namespace,
        "hboneAddr": s.hbone_addr,
        "adminAddr": s.admin_addr,
        "statsAddr": s.stats_addr,
        "envoyStatsAddr": s.envoy_stats_addr,
        "readinessAddr": s.readiness_addr,
        "numWorkerThreads": shared.threads.workers().len(),
        "terminationDrainDuration": format!("{:?}", s.termination_deadline),
        "pathNormalization": format!("{:?}", s.path_normalization.unwrap_or_else(|| shared.mesh.load().defaults().path_normalization)),
        "accessLog": s.access_log,
    })
}

/// `/streams`: who is connected, and what is under way where.
pub(crate) fn streams(shared: &Shared) -> Value {
    let inbound: Vec<Value> = shared.tunnels.list().into_iter().map(|peer| json!(peer.id.as_str())).collect();
    let pools: Vec<Value> = shared
        .upstreams
        .tunnels()
        .iter()
        .map(|p| json!({ "destinations": p.keys, "tunnels": p.tunnels, "dialing": p.dialing, "streams": p.streams }))
        .collect();
    let busy: Vec<Value> = shared
        .upstreams
        .clusters()
        .iter()
        .filter(|c| c.counts.requests > 0 || c.counts.pending > 0 || c.counts.connections > 0)
        .map(|c| {
            json!({
                "cluster": c.name,
                "requests": c.counts.requests,
                "pending": c.counts.pending,
                "retries": c.counts.retries,
                "connections": c.counts.connections,
            })
        })
        .collect();
    json!({ "tunnels": { "inbound": inbound, "outboundByThread": pools }, "clusters": busy })
}

/// Listeners: name and address, the HBONE port first.
fn listeners(shared: &Shared) -> Vec<(String, std::net::SocketAddr, Option<Arc<str>>)> {
    let s = &shared.settings;
    let snap = shared.mesh.load();
    let gateway = snap.find_gateway(&GatewayKey::new(&s.namespace, &s.gateway));
    let own = gateway.into_iter().flat_map(|g| &g.listeners);
    let of_gateway =
        own.map(|l| (format!("{}_{}", l.name, l.port), std::net::SocketAddr::new(s.listen_ip, l.port), l.broken.clone()));
    [("connect_terminate".to_owned(), s.hbone_addr, None)].into_iter().chain(of_gateway).collect()
}
/// `/listeners` as Envoy's: `name::address` each.
pub(crate) fn listeners_text(shared: &Shared) -> String {
    let mut out = String::new();
    for (name, addr, broken) in listeners(shared) {
        // Writing to a String cannot fail.
        let _ = match broken {
            None => writeln!(out, "{name}::{addr}"),
            Some(why) => writeln!(out, "{name}::{addr}::broken::{}", why.replace('\n', " ")),
        };
    }
    out
}
/// `/listeners?format=json`.
pub(crate) fn listeners_json(shared: &Shared) -> Value {
    let all: Vec<Value> = listeners(shared)
        .into_iter()
        .map(|(name, addr, broken)| json!({ "name": name, "local_address": clusters::socket(addr), "error": broken }))
        .collect();
    json!({ "listener_statuses": all })
}
