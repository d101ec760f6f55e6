//! `/config_dump`: what this agent knows and does, in the shape `istioctl ztunnel-config` reads (node-agent §1.14).
//!
//! Built on request from one snapshot; never on the path of a connection. Our own additions (`problems`, `refusals`,
//! `pools`, `redirect`) stand beside Istio's keys, which keep their meaning.
use crate::conns::Direction;
use crate::pod::Shared;
use crate::pods::{Counts, PodState, PodTable};
use ebpf_loader::Tally;
use mesh_hbone::Pool;
use mesh_model::Snapshot;
use mesh_model::authz::SourceVerdict;
use mesh_model::policy::{Action, Match, Policy, PolicyBody, Scope, TextMatch, Values};
use mesh_model::service::{HealthPolicy, IpFamilies, LbMode, LbScope, Service, Visibility};
use mesh_model::workload::{ApplicationTunnel, GatewayDestination, GatewayRef, Health, NetworkMode, Protocol, Workload};
use mesh_sources::Diagnostics;
use serde_json::{Map, Value, json};

/// The whole dump.
pub fn config_dump(shared: &Shared, pods: &PodTable, diagnostics: &Diagnostics) -> Value {
    let snap = shared.mesh.load_full();
    json!({
        "workloads": snap.workloads().map(|w| workload(w)).collect::<Vec<_>>(),
        "services": snap.services().map(|s| service(&snap, s)).collect::<Vec<_>>(),
        "policies": snap.policies().map(|p| policy(p)).collect::<Vec<_>>(),
        "certificates": shared.svids.dump(),
        "workloadState": pod_states(pods),
        "version": version(),
        "config": config(shared),
        "meshVersion": snap.version(),
        "problems": diagnostics.to_json(),
    })
}

/// Name and build of this binary.
pub fn version() -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "gitRevision": option_env!("CULVERT_GIT_REVISION").unwrap_or("unknown"),
        "buildProfile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "product": "culvert",
    })
}

fn config(shared: &Shared) -> Value {
    let s = &shared.settings;
    json!({
        "localNode": s.node,
        "clusterId": s.cluster_id,
        "clusterDomain": s.cluster_domain,
        "network": s.network,
        "trustDomain": s.trust_domain,
        "trustDomainAliases": s.trust_domain_aliases,
        "rootNamespace": s.root_namespace,
        "meshDir": s.mesh_dir,
        "kubernetes": s.kubernetes,
        "localXdsPath": s.local_xds_path,
        "adminAddr": s.admin_addr,
        "statsAddr": s.stats_addr,
        "readinessAddr": s.readiness_addr,
        "numWorkerThreads": shared.threads.workers().len(),
        "selfTerminationDeadline": format!("{:?}", s.deadline()),
        "poolMaxStreamsPerConn": s.pool_max_streams,
        "poolUnusedReleaseTimeout": format!("{:?}", s.pool_unused_release),
        "windowSize": s.stream_window,
        "connectionWindowSize": s.connection_window,
        "frameSize": s.frame_size,
        "windowBudget": s.window_budget,
        "windowBudgetUsed": shared.budget.used(),
    })
}

/// What a pod's redirection counted, and the sources they drop; inside those, others that they do not.
fn redirect(traffic: &Counts, sources: &[SourceVerdict]) -> Value {
    let counted = traffic.read();
    let of = |number: fn(&Tally) -> u64| {
        counted.iter().map(|(event, tally)| ((*event).to_owned(), number(tally).into())).collect::<Map<_, _>>()
    };
    let nets = |denied| sources.iter().filter(|s| s.denied == denied).map(|s| s.net.to_string()).collect::<Vec<_>>();
    json!({
        "packets": of(|tally| tally.packets),
        "bytes": of(|tally| tally.bytes),
        "deniedSources": nets(true),
        "exceptedSources": nets(false),
    })
}

fn pod_states(pods: &PodTable) -> Value {
    let mut out = Map::new();
    for (uid, state) in pods.list() {
        let entry = match state {
            PodState::Pending { error } => json!({ "state": "Pending", "error": error }),
            PodState::Up { pod, traffic, denied } => {
                let mut inbound = Vec::new();
                let mut outbound = Vec::new();
                for live in pod.conns.list() {
                    let f = &live.facts;
                    let (actual_dst, carried) = *f.actual_dst.lock();
                    let row = json!({
                        "src": f.src.to_string(),
                        "originalDst": f.original_dst.to_string(),
                        "actualDst": actual_dst.to_string(),
                        "protocol": carried.as_str(),
                        "identity": f.identity.as_ref().map(ToString::to_string),
                    });
                    match f.direction {
                        Direction::Inbound => inbound.push(row),
                        Direction::Outbound => outbound.push(row),
                    }
                }
                let tunnels: Vec<Value> = pod
                    .pools
                    .iter()
                    .flat_map(Pool::keys)
                    .map(|k| {
                        json!({
                            "dial": k.key.dial().to_string(),
                            "expect": k.key.expect().iter().map(ToString::to_string).collect::<Vec<_>>(),
                            "streams": k.tunnels,
                            "dialing": k.dialing,
                        })
                    })
                    .collect();
                let accepted: Vec<String> = pod.tunnels.list().iter().map(|p| p.id.to_string()).collect();
                json!({
                    "state": "Up",
                    "connections": { "inbound": inbound, "outbound": outbound },
                    "tunnels": { "outbound": tunnels, "inbound": accepted },
                    "redirect": traffic.map(|traffic| redirect(&traffic, &denied)),
                    "info": {
                        "name": pod.name,
                        "namespace": pod.identity.namespace(),
                        "serviceAccount": pod.identity.service_account(),
                        "trustDomain": pod.identity.trust_domain(),
                        "identity": pod.identity.to_string(),
                    },
                })
            }
        };
        out.insert(uid.to_string(), entry);
    }
    Value::Object(out)
}

fn workload(w: &Workload) -> Value {
    json!({
        "uid": w.uid,
        "name": w.name,
        "namespace": w.namespace,
        "serviceAccount": w.service_account,
        "trustDomain": w.trust_domain.as_str(),
        "workloadIps": w.ips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "hostname": w.hostname.as_deref().unwrap_or_default(),
        "network": w.network.as_str(),
        "protocol": match w.protocol { Protocol::Tcp => "TCP", Protocol::Hbone => "HBONE" },
        "networkMode": match w.network_mode { NetworkMode::Standard => "Standard", NetworkMode::HostNetwork => "HostNetwork" },
        "nativeTunnel": w.native_tunnel,
        "node": w.node,
        "clusterId": w.cluster,
        "locality": { "region": w.locality.region, "zone": w.locality.zone, "subzone": w.locality.subzone },
        "workloadName": w.workload_name,
        "workloadType": w.workload_type,
        "canonicalName": w.canonical_name,
        "canonicalRevision": w.canonical_revision,
        "status": match w.health { Health::Healthy => "Healthy", Health::Unhealthy => "Unhealthy" },
        "capacity": w.capacity,
        "authorizationPolicies": w.policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "waypoint": w.waypoint.as_deref().map(gateway),
        "waypointError": w.waypoint_error,
        "networkGateway": w.network_gateway.as_deref().map(gateway),
        "applicationTunnel": w.application_tunnel.map(|ApplicationTunnel::Proxy(port)| json!({ "protocol": "PROXY", "port": port })),
        "services": w.services.iter()
            .map(|(k, ports)| (k.to_string(), ports_map(ports.iter().copied())))
            .collect::<Map<_, _>>(),
        "origin": w.origin.as_ref().map(ToString::to_string),
    })
}

fn ports_map(ports: impl Iterator<Item = (u16, u16)>) -> Value {
    Value::Object(ports.map(|(p, t)| (p.to_string(), json!(t))).collect())
}

fn gateway(g: &GatewayRef) -> Value {
    let destination = match &g.destination {
        GatewayDestination::Service(key) => key.to_string(),
        GatewayDestination::Address(network, ip) => format!("{}/{ip}", network.as_str()),
    };
    json!({ "destination": destination, "hboneMtlsPort": g.hbone_port })
}

fn service(snap: &Snapshot, s: &Service) -> Value {
    let endpoints: Map<String, Value> = snap
        .endpoints(&s.key)
        .map(|w| {
            let ports = w.services.get(&s.key).map(|p| ports_map(p.iter().copied()));
            (w.uid.to_string(), json!({ "workloadUid": w.uid, "service": s.key.to_string(), "port": ports }))
        })
        .collect();
    json!({
        "name": s.name,
        "namespace": s.key.namespace,
        "hostname": s.key.hostname,
        "vips": s.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "cidrVips": s.cidr_vips.iter().map(|(n, net)| format!("{}/{net}", n.as_str())).collect::<Vec<_>>(),
        "ports": ports_map(s.ports.iter().map(|p| (p.port, p.target))),
        "endpoints": endpoints,
        "subjectAltNames": s.sans.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "waypoint": s.waypoints.first().map(|w| gateway(&w.waypoint)),
        "weightedWaypoints": s.waypoints.iter()
            .map(|w| json!({ "destination": gateway(&w.waypoint), "weight": w.weight }))
            .collect::<Vec<_>>(),
        "waypointError": s.waypoint_error,
        "ingressUseWaypoint": s.ingress_use_waypoint,
        "loadBalancer": {
            "routingPreferences": s.lb.scopes.iter().map(|s| scope_name(*s)).collect::<Vec<_>>(),
            "mode": match s.lb.mode {
                LbMode::Any => "Any", LbMode::Strict => "Strict", LbMode::Failover => "Failover", LbMode::Passthrough => "Passthrough",
            },
            "healthPolicy": match s.lb.health { HealthPolicy::OnlyHealthy => "OnlyHealthy", HealthPolicy::AllowAll => "AllowAll" },
        },
        "ipFamilies": match s.ip_families {
            IpFamilies::Automatic => Value::Null, IpFamilies::V4 => json!("IPv4"), IpFamilies::V6 => json!("IPv6"), IpFamilies::Dual => json!("Dual"),
        },
        "canonical": s.canonical,
        "visibility": match s.visibility { Visibility::Public => "Public", Visibility::Namespace => "Namespace" },
        "origin": s.origin.as_ref().map(ToString::to_string),
    })
}

fn scope_name(s: LbScope) -> &'static str {
    match s {
        LbScope::Region => "Region",
        LbScope::Zone => "Zone",
        LbScope::Subzone => "Subzone",
        LbScope::Node => "Node",
        LbScope::Cluster => "Cluster",
        LbScope::Network => "Network",
    }
}

fn policy(p: &Policy) -> Value {
    let scope = match p.scope {
        Scope::Global => "Global",
        Scope::Namespace => "Namespace",
        Scope::Selector => "WorkloadSelector",
    };
    let mut out = json!({
        "name": p.key.name,
        "namespace": p.key.namespace,
        "scope": scope,
        "origin": p.origin.as_ref().map(ToString::to_string),
    });
    match &p.body {
        PolicyBody::Unusable { why } => {
            out["action"] = json!("Deny");
            out["unusable"] = json!(why);
        }
        PolicyBody::Rules { action, dry_run, rules } => {
            out["action"] = json!(match action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            });
            out["dryRun"] = json!(dry_run);
            out["rules"] = rules
                .iter()
                .map(|r| r.clauses.iter().map(|c| c.matches.iter().map(a_match).collect::<Vec<_>>()).collect::<Vec<_>>())
                .collect::<Vec<_>>()
                .into();
        }
    }
    out
}

fn a_match(m: &Match) -> Value {
    fn put<T>(out: &mut Map<String, Value>, any: &str, none: &str, v: &Values<T>, f: impl Fn(&T) -> Value) {
        for (key, values) in [(any, v.any()), (none, v.none())] {
            if !values.is_empty() {
                out.insert(key.into(), values.iter().map(&f).collect());
            }
        }
    }
    let text = |t: &TextMatch| match t {
        TextMatch::Exact(s) => json!({ "Exact": s }),
        TextMatch::Prefix(s) => json!({ "Prefix": s }),
        TextMatch::Suffix(s) => json!({ "Suffix": s }),
        TextMatch::Presence => json!({ "Presence": {} }),
    };
    let mut out = Map::new();
    put(&mut out, "namespaces", "notNamespaces", &m.namespaces, text);
    put(
        &mut out,
        "serviceAccounts",
        "notServiceAccounts",
        &m.service_accounts,
        |(ns, sa)| json!({ "namespace": ns, "serviceAccount": sa }),
    );
    put(&mut out, "principals", "notPrincipals", &m.principals, text);
    put(&mut out, "trustDomains", "notTrustDomains", &m.trust_domains, text);
    put(&mut out, "sourceIps", "notSourceIps", &m.source_ips, |n| json!(n.to_string()));
    put(&mut out, "destinationIps", "notDestinationIps", &m.destination_ips, |n| json!(n.to_string()));
    put(&mut out, "destinationPorts", "notDestinationPorts", &m.destination_ports, |p| json!(p));
    Value::Object(out)
}
