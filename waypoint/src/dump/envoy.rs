//! `configs` of `/config_dump`: this process in the messages of Envoy's admin API (admin.v3.ConfigDump), which `istioctl
//! proxy-config` reads. What has no counterpart in Envoy is left out; the rest of the page says it.
//!
//! Clusters have the names of `/clusters` and of the metrics (`outbound|port|subset|host`); listeners, chains and routes those
//! istiod gives a waypoint's.
use super::clusters::socket;
use crate::conn::Shared;
use crate::upstream::ClusterView;
use mesh_identity::cache::dump::IdentityDump;
use mesh_model::Snapshot;
use mesh_model::inbound::is_instance;
use mesh_model::l7::gateway::{GatewayKey, GatewayRoutes, Listener, ListenerProtocol};
use mesh_model::l7::route::{Backend, BackendRef, ClusterKey, Forward, HttpAction, PathMatch, PathRewrite, Redirect, TcpRoute};
use mesh_model::l7::{HttpMatch, HttpRule, RouteTable, StringMatch};
use mesh_model::origin::Origin;
use mesh_model::service::{AppProtocol, LbMode, Service};
use mesh_model::workload::Workload;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

const TYPES: &str = "type.googleapis.com/envoy.";
const HTTP: (&str, &str) = (
    "envoy.filters.network.http_connection_manager",
    "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
);
const TCP: (&str, &str) = ("envoy.filters.network.tcp_proxy", "extensions.filters.network.tcp_proxy.v3.TcpProxy");

/// The sections. Endpoints only where they are asked for (`?include_eds`), as by Envoy.
pub(super) fn configs(shared: &Shared, snap: &Snapshot, me: Option<&Workload>, endpoints: bool) -> Vec<Value> {
    let chains = chains(snap, me);
    let gateway = snap.find_gateway(&GatewayKey::new(&shared.settings.namespace, &shared.settings.gateway));
    let built = shared.upstreams.clusters();
    let mut all = vec![
        bootstrap(shared),
        clusters(snap, &chains, gateway.map(|g| &**g), &built),
        listeners(shared, snap, &chains, gateway.map(|g| &**g)),
        routes(snap, &chains, gateway.map(|g| &**g)),
        secrets(&shared.svid.cache().dump()),
    ];
    if endpoints {
        all.push(endpoint_section(&built));
    }
    all
}

/// A message with its type.
fn typed(name: &str, mut message: Value) -> Value {
    message["@type"] = json!(format!("{TYPES}{name}"));
    message
}

/// A port of a service this process serves, as one protocol.
struct Chain<'a> {
    service: &'a Service,
    port: u16,
    http: bool,
}

impl Chain<'_> {
    /// `inbound-vip|port|protocol|host`.
    fn name(&self) -> String {
        let protocol = if self.http { "http" } else { "tcp" };
        format!("inbound-vip|{}|{protocol}|{}", self.port, self.service.key.hostname)
    }
    fn cluster(&self, subset: Option<&Arc<str>>) -> String {
        ClusterKey { service: self.service.key.clone(), port: self.port, subset: subset.cloned() }.to_string()
    }
}

/// A port whose protocol nobody declared is both.
fn chains<'a>(snap: &'a Snapshot, me: Option<&Workload>) -> Vec<Chain<'a>> {
    let Some(me) = me else { return Vec::new() };
    let mine = snap.services().filter(|s| s.waypoints.iter().any(|w| is_instance(snap, me, &w.waypoint)));
    mine.flat_map(|service| {
        service.ports.iter().flat_map(move |port| {
            let protocols: &[bool] = match port.protocol {
                AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => &[true],
                AppProtocol::Tls | AppProtocol::Tcp => &[false],
                AppProtocol::Unknown => &[true, false],
            };
            protocols.iter().map(move |http| Chain { service, port: port.port, http: *http })
        })
    })
    .collect()
}

fn bootstrap(shared: &Shared) -> Value {
    let s = &shared.settings;
    let ip = s.instance_ip.map(|ip| ip.to_string()).unwrap_or_default();
    let mut version = env!("CARGO_PKG_VERSION").split('.').map(|n| n.parse::<u32>().unwrap_or_default());
    let mut number = || version.next().unwrap_or_default();
    let node = json!({
        "id": format!("waypoint~{ip}~{}.{ns}~{ns}.svc.{}", s.pod, s.cluster_domain, ns = s.namespace),
        "cluster": format!("{}.{}", s.service_account, s.namespace),
        "metadata": { "NAME": s.pod, "NAMESPACE": s.namespace, "CLUSTER_ID": s.cluster_id, "SERVICE_ACCOUNT": s.service_account },
        "user_agent_name": "culvert",
        "user_agent_build_version": {
            "version": { "major_number": number(), "minor_number": number(), "patch": number() },
            "metadata": { "build.label": "culvert" },
        },
    });
    typed("admin.v3.BootstrapConfigDump", json!({ "bootstrap": { "node": node } }))
}

/// Those of the services served here with their subsets, those routes lead to, and what else was asked for until now.
fn clusters(snap: &Snapshot, chains: &[Chain<'_>], gateway: Option<&GatewayRoutes>, built: &[ClusterView]) -> Value {
    let mut all: BTreeMap<String, Value> = BTreeMap::new();
    for chain in chains {
        let destination = snap.find_destination(&chain.service.key);
        let subsets = destination.into_iter().flat_map(|d| d.subsets.keys()).map(Some);
        let kind = match chain.service.lb.mode {
            LbMode::Passthrough => "ORIGINAL_DST",
            _ if snap.endpoints(&chain.service.key).any(|w| w.ips.is_empty() && w.hostname.is_some()) => {
                if chain.service.logical_dns { "LOGICAL_DNS" } else { "STRICT_DNS" }
            }
            _ => "EDS",
        };
        let metadata = destination.and_then(|d| managed(d.origins.iter(), &["DestinationRule"]));
        for subset in subsets.chain([None]) {
            let name = chain.cluster(subset);
            let cluster = json!({ "name": name, "type": kind, "metadata": metadata });
            all.insert(name, cluster);
        }
    }
    let tables = chains.iter().filter_map(|chain| snap.find_routes(&chain.service.key));
    let of_gateway = gateway.into_iter().flat_map(|g| &g.listeners).flat_map(|l| &l.hosts).map(|(_, table)| table);
    let named = tables.chain(of_gateway).flat_map(|table| targets(table)).chain(built.iter().map(|view| view.name.clone()));
    for name in named {
        all.entry(name).or_insert_with_key(|name| json!({ "name": name, "type": "EDS" }));
    }
    let version = snap.version().to_string();
    let active = |cluster: Value| json!({ "version_info": version, "cluster": typed("config.cluster.v3.Cluster", cluster) });
    let all: Vec<Value> = all.into_values().map(active).collect();
    typed("admin.v3.ClustersConfigDump", json!({ "version_info": version, "dynamic_active_clusters": all }))
}

/// The clusters the rules of a table lead to.
fn targets(table: &RouteTable) -> Vec<String> {
    let http = table.http.iter().filter_map(|rule| match &rule.route.action {
        HttpAction::Forward(forward) => Some(&forward.backends),
        HttpAction::Redirect(_) | HttpAction::Respond(_) => None,
    });
    let bytes = table.tls.iter().map(|rule| &rule.route).chain(table.tcp.iter().map(|rule| &rule.route)).map(|r| &r.backends);
    http.chain(bytes).flatten().filter_map(|backend| cluster_of(&backend.to)).collect()
}

/// Where `istioctl` looks for the object something came from.
fn managed<'a>(mut origins: impl Iterator<Item = &'a Arc<Origin>>, kinds: &[&str]) -> Option<Value> {
    origins.find_map(|origin| {
        let (kind, name) = origin.object.split_once(' ').filter(|(kind, _)| kinds.contains(kind))?;
        let (namespace, name) = name.split_once('/')?;
        let plural = match kind {
            "DestinationRule" => "destination-rule",
            "VirtualService" => "virtual-service",
            _ => "http-route",
        };
        let config = format!("/apis/networking.istio.io/v1/namespaces/{namespace}/{plural}/{name}");
        Some(json!({ "filter_metadata": { "istio": { "config": config } } }))
    })
}

/// A filter of a chain.
fn filter((name, message): (&str, &str), config: Value) -> Value {
    json!({ "name": name, "typed_config": typed(message, config) })
}
fn through_routes(name: &str) -> Value {
    filter(HTTP, json!({ "stat_prefix": name, "rds": { "route_config_name": name } }))
}

fn listeners(shared: &Shared, snap: &Snapshot, chains: &[Chain<'_>], gateway: Option<&GatewayRoutes>) -> Value {
    let version = snap.version().to_string();
    let active = |name: &str, listener: Value| {
        let state = json!({ "version_info": version, "listener": typed("config.listener.v3.Listener", listener) });
        json!({ "name": name, "active_state": state })
    };
    let connect = json!({ "virtual_hosts": [{
        "name": "default", "domains": ["*"],
        "routes": [{ "match": { "connect_matcher": {} }, "route": { "cluster": "main_internal" } }],
    }] });
    let connect = filter(HTTP, json!({ "stat_prefix": "connect_terminate", "route_config": connect }));
    let terminate = json!({
        "name": "connect_terminate",
        "address": socket(shared.settings.hbone_addr),
        "filter_chains": [{ "name": "default", "filters": [connect] }],
    });
    let inside: Vec<Value> = chains.iter().map(chain).collect();
    let main = json!({ "name": "main_internal", "internal_listener": {}, "filter_chains": inside });
    let mut all = vec![active("connect_terminate", terminate), active("main_internal", main)];
    for listener in gateway.into_iter().flat_map(|g| &g.listeners) {
        let name = format!("{}_{}", listener.name, listener.port);
        match &listener.broken {
            None => {
                let address = SocketAddr::new(shared.settings.listen_ip, listener.port);
                let chains = [gateway_chain(listener)];
                let listening = json!({ "name": name, "address": socket(address), "filter_chains": chains });
                all.push(active(&name, listening));
            }
            Some(why) => all.push(json!({ "name": name, "error_state": { "details": why } })),
        }
    }
    typed("admin.v3.ListenersConfigDump", json!({ "version_info": version, "dynamic_listeners": all }))
}

fn chain(chain: &Chain<'_>) -> Value {
    let ranges: Vec<Value> = chain
        .service
        .vips
        .iter()
        .map(|vip| json!({ "address_prefix": vip.ip.to_string(), "prefix_len": if vip.ip.is_ipv4() { 32 } else { 128 } }))
        .collect();
    let name = chain.name();
    let filter = if chain.http {
        through_routes(&name)
    } else {
        filter(TCP, json!({ "stat_prefix": name, "cluster": chain.cluster(None) }))
    };
    json!({ "name": name, "filter_chain_match": { "destination_port": chain.port, "prefix_ranges": ranges }, "filters": [filter] })
}

fn gateway_chain(listener: &Listener) -> Value {
    let name = format!("{}.{}", if is_http(listener) { "http" } else { "tcp" }, listener.port);
    let names: Vec<&Arc<str>> = listener.hostname.iter().filter(|_| listener.tls.is_some()).collect();
    let mut to =
        listener.hosts.iter().flat_map(|(_, table)| table.tcp.iter().map(|r| &r.route).chain(table.tls.iter().map(|r| &r.route)));
    let filter = if is_http(listener) {
        through_routes(&name)
    } else {
        filter(TCP, json!({ "stat_prefix": name, "cluster": to.find_map(tcp_cluster).unwrap_or_default() }))
    };
    json!({ "name": name, "filter_chain_match": { "server_names": names }, "filters": [filter] })
}

fn is_http(listener: &Listener) -> bool {
    matches!(listener.protocol, ListenerProtocol::Http | ListenerProtocol::Https)
}

fn tcp_cluster(route: &Arc<TcpRoute>) -> Option<String> {
    route.backends.iter().find_map(|backend| cluster_of(&backend.to))
}

fn cluster_of(to: &BackendRef) -> Option<String> {
    match to {
        BackendRef::Service(key) => Some(key.to_string()),
        BackendRef::Invalid { .. } => None,
    }
}

fn routes(snap: &Snapshot, chains: &[Chain<'_>], gateway: Option<&GatewayRoutes>) -> Value {
    let version = snap.version().to_string();
    let config = |name: &str, hosts: Vec<Value>| {
        let config = json!({ "name": name, "virtual_hosts": hosts });
        json!({ "version_info": version, "route_config": typed("config.route.v3.RouteConfiguration", config) })
    };
    let mut all: Vec<Value> = Vec::new();
    for chain in chains.iter().filter(|chain| chain.http) {
        let host = match snap.find_routes(&chain.service.key) {
            Some(table) => virtual_host(&format!("inbound|http|{}", chain.port), "*", table, Some(chain.port)),
            None => json!({ "name": format!("inbound|http|{}", chain.port), "domains": ["*"], "routes": [{
                "name": "default", "match": { "prefix": "/" }, "route": { "cluster": chain.cluster(None), "timeout": "0s" },
            }] }),
        };
        all.push(config(&chain.name(), vec![host]));
    }
    let mut of_ports: BTreeMap<u16, Vec<Value>> = BTreeMap::new();
    for listener in gateway.into_iter().flat_map(|g| &g.listeners).filter(|l| is_http(l) && l.broken.is_none()) {
        let hosts =
            listener.hosts.iter().map(|(host, table)| virtual_host(&format!("{host}:{}", listener.port), host, table, None));
        of_ports.entry(listener.port).or_default().extend(hosts);
    }
    all.extend(of_ports.into_iter().map(|(port, hosts)| config(&format!("http.{port}"), hosts)));
    typed("admin.v3.RoutesConfigDump", json!({ "dynamic_route_configs": all }))
}

/// A table, or what of it can match on one port.
fn virtual_host(name: &str, domain: &str, table: &RouteTable, port: Option<u16>) -> Value {
    let here = |rule: &&HttpRule| port.is_none() || rule.matches.port.is_none() || rule.matches.port == port;
    let routes: Vec<Value> = match &table.broken {
        Some(why) => vec![
            json!({ "name": "broken", "match": { "prefix": "/" }, "direct_response": { "status": 500, "body": { "inline_string": why } } }),
        ],
        None => table.http.iter().filter(here).map(route).collect(),
    };
    json!({ "name": name, "domains": [domain], "routes": routes })
}

fn route(rule: &HttpRule) -> Value {
    let mut out = json!({ "name": rule.route.name, "match": matches(&rule.matches) });
    if let Some(metadata) = managed(rule.route.origin.iter(), &["VirtualService", "HTTPRoute", "GRPCRoute"]) {
        out["metadata"] = metadata;
    }
    match &rule.route.action {
        HttpAction::Forward(forward) => match action(forward) {
            Some(action) => out["route"] = action,
            None => out["direct_response"] = json!({ "status": unusable(&forward.backends) }),
        },
        HttpAction::Redirect(to) => out["redirect"] = redirect(to),
        HttpAction::Respond(answer) => out["direct_response"] = json!({ "status": answer.status }),
    }
    out
}

/// What is answered where no backend can be used.
fn unusable(backends: &[Backend]) -> u16 {
    let status = |backend: &Backend| match &backend.to {
        BackendRef::Invalid { status, .. } => Some(*status),
        BackendRef::Service(_) => None,
    };
    backends.iter().find_map(status).unwrap_or(500)
}

fn action(forward: &Forward) -> Option<Value> {
    let usable: Vec<(String, u32)> =
        forward.backends.iter().filter_map(|backend| Some((cluster_of(&backend.to)?, backend.weight))).collect();
    let timeout = seconds(forward.timeout.unwrap_or_default());
    match usable.as_slice() {
        [] => None,
        [(cluster, _)] => Some(json!({ "cluster": cluster, "timeout": timeout })),
        several => {
            let several: Vec<Value> = several.iter().map(|(name, weight)| json!({ "name": name, "weight": weight })).collect();
            Some(json!({ "weighted_clusters": { "clusters": several }, "timeout": timeout }))
        }
    }
}

/// As messages write durations.
fn seconds(duration: Duration) -> String {
    format!("{}.{:09}s", duration.as_secs(), duration.subsec_nanos())
}

fn redirect(to: &Redirect) -> Value {
    let code = match to.status {
        302 => "FOUND",
        303 => "SEE_OTHER",
        307 => "TEMPORARY_REDIRECT",
        308 => "PERMANENT_REDIRECT",
        _ => "MOVED_PERMANENTLY",
    };
    let mut out = json!({ "response_code": code, "host_redirect": to.authority.as_deref().unwrap_or_default() });
    match (&to.scheme, &to.path) {
        (Some(scheme), _) => out["scheme_redirect"] = json!(scheme),
        (None, Some(PathRewrite::Full(path))) => out["path_redirect"] = json!(path),
        (None, Some(PathRewrite::TextPrefix(prefix) | PathRewrite::SegmentPrefix(prefix))) => {
            out["prefix_rewrite"] = json!(prefix);
        }
        (None, Some(PathRewrite::Regex { .. }) | None) => {}
    }
    out
}

fn matches(m: &HttpMatch) -> Value {
    let mut out = match &m.path {
        None => json!({ "prefix": "/" }),
        Some(PathMatch::Exact(path)) => json!({ "path": path }),
        Some(PathMatch::TextPrefix(prefix)) => json!({ "prefix": prefix }),
        Some(PathMatch::SegmentPrefix(prefix)) if **prefix == *"/" => json!({ "prefix": "/" }),
        Some(PathMatch::SegmentPrefix(prefix)) => json!({ "path_separated_prefix": prefix }),
        Some(PathMatch::Regex(pattern)) => json!({ "safe_regex": { "regex": pattern.source() } }),
    };
    let pseudo = [(":method", &m.method), (":scheme", &m.scheme), (":authority", &m.authority)];
    let pseudo = pseudo.into_iter().filter_map(|(name, m)| Some(header(name, m.as_ref()?, false)));
    let with = m.headers.iter().map(|(name, m)| header(name.as_str(), m, false));
    let without = m.without_headers.iter().map(|(name, m)| header(name.as_str(), m, true));
    let headers: Vec<Value> = pseudo.chain(with).chain(without).collect();
    if !headers.is_empty() {
        out["headers"] = json!(headers);
    }
    if m.ignore_case {
        out["case_sensitive"] = json!(false);
    }
    out
}

fn header(name: &str, m: &StringMatch, inverted: bool) -> Value {
    let text = match m {
        StringMatch::Exact(text) => json!({ "exact": text }),
        StringMatch::Prefix(text) => json!({ "prefix": text }),
        StringMatch::Suffix(text) => json!({ "suffix": text }),
        StringMatch::Regex(pattern) => json!({ "safe_regex": { "regex": pattern.source() } }),
        StringMatch::Present => return json!({ "name": name, "present_match": true, "invert_match": inverted }),
    };
    json!({ "name": name, "string_match": text, "invert_match": inverted })
}

/// `default` and `ROOTCA`; never a key.
fn secrets(all: &[IdentityDump]) -> Value {
    let bytes = |pem: &str| json!({ "inline_bytes": pem });
    let mut active = Vec::new();
    let mut add = |name: String, mut secret: Value, updated: &str| {
        secret["name"] = json!(name);
        let secret = typed("extensions.transport_sockets.tls.v3.Secret", secret);
        active.push(json!({ "name": name, "last_updated": updated, "secret": secret }));
    };
    for identity in all {
        if let Some(leaf) = identity.cert_chain.first() {
            add("default".into(), json!({ "tls_certificate": { "certificate_chain": bytes(&leaf.pem) } }), &leaf.valid_from);
        }
        for (number, root) in identity.root_certs.iter().enumerate() {
            // A message has one text, and each of ours is encoded already.
            let name = if number == 0 { "ROOTCA".to_owned() } else { format!("ROOTCA-{}", number + 1) };
            add(name, json!({ "validation_context": { "trusted_ca": bytes(&root.pem) } }), &root.valid_from);
        }
    }
    typed("admin.v3.SecretsConfigDump", json!({ "dynamic_active_secrets": active }))
}

fn endpoint_section(built: &[ClusterView]) -> Value {
    let all: Vec<Value> = built
        .iter()
        .map(|cluster| {
            let endpoints: Vec<Value> = cluster
                .hosts
                .iter()
                .map(|host| {
                    let mut parts = host.locality.splitn(3, '/');
                    let mut part = || parts.next().unwrap_or_default();
                    json!({
                        "locality": { "region": part(), "zone": part(), "sub_zone": part() },
                        "priority": host.priority,
                        "lb_endpoints": [{
                            "endpoint": { "address": socket(host.address), "hostname": host.workload },
                            "health_status": if host.ejected { "UNHEALTHY" } else { "HEALTHY" },
                            "load_balancing_weight": host.weight,
                        }],
                    })
                })
                .collect();
            let load = json!({ "cluster_name": cluster.name, "endpoints": endpoints });
            json!({ "endpoint_config": typed("config.endpoint.v3.ClusterLoadAssignment", load) })
        })
        .collect();
    typed("admin.v3.EndpointsConfigDump", json!({ "dynamic_endpoint_configs": all }))
}

#[cfg(test)]
mod tests;
