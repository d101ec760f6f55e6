//! istiod's messages → model: every field of the current protos (node-agent §1.4, spec/waypoint §1.1).
//!
//! Total over any message. What cannot be meant is refused as a whole and named; where a refusal would open something, the
//! object stays and refuses traffic instead: a service or workload whose waypoint cannot be used, a policy that cannot be read
//! (istio/ztunnel drops a malformed matcher and so widens its policy).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use mesh_model::addr::{Network, NetworkAddr};
use mesh_model::gateway::{GatewayDestination, GatewayRef};
use mesh_model::id::TrustDomain;
use mesh_model::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch, Values};
use mesh_model::service::{
    AppProtocol, HealthPolicy, IpFamilies, LbMode, LbScope, LoadBalancing, Service, ServiceKey, ServicePort, Visibility,
    WeightedWaypoint,
};
use mesh_model::workload::{ApplicationTunnel, Health, Locality, NetworkMode, PortMap, Protocol, Workload};
use mesh_proto::istio::security::{self, string_match::MatchType};
use mesh_proto::istio::workload::{self as wire, application_tunnel, gateway_address, load_balancing};

use crate::translate::Interner;

/// Why a message is refused.
pub(super) type Bad = String;

/// Port of HBONE where the message leaves it out.
const HBONE_PORT: u16 = 15008;

/// An enum value of a later Istio.
fn unknown(what: &str, value: i32) -> Bad {
    format!("{what} {value} is not known here")
}

pub(super) fn workload(m: &wire::Workload, texts: &mut Interner) -> Result<Workload, Bad> {
    if m.uid.is_empty() || m.namespace.is_empty() {
        return Err("a workload has a uid and a namespace".into());
    }
    let mut w = Workload::new(&m.uid, &m.name, "");
    w.namespace = texts.text(&m.namespace);
    if !m.service_account.is_empty() {
        w.service_account = texts.text(&m.service_account);
    }
    if !m.trust_domain.is_empty() {
        w.trust_domain = TrustDomain::parse(&m.trust_domain).map_err(|e| format!("trust_domain: {e}"))?;
    }
    w.ips = m.addresses.iter().map(|bytes| ip(bytes)).collect::<Result<_, _>>()?;
    w.hostname = (!m.hostname.is_empty()).then(|| m.hostname.as_str().into());
    w.network = Network(texts.text(&m.network));
    w.protocol = match wire::TunnelProtocol::try_from(m.tunnel_protocol) {
        Ok(wire::TunnelProtocol::Hbone) => Protocol::Hbone,
        // A sidecar's mutual TLS is no tunnel: its pod is reached as it is.
        Ok(wire::TunnelProtocol::None | wire::TunnelProtocol::LegacyIstioMtls) => Protocol::Tcp,
        Err(_) => return Err(unknown("tunnel_protocol", m.tunnel_protocol)),
    };
    w.network_mode = match wire::NetworkMode::try_from(m.network_mode) {
        Ok(wire::NetworkMode::Standard) => NetworkMode::Standard,
        Ok(wire::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
        Err(_) => return Err(unknown("network_mode", m.network_mode)),
    };
    w.health = match wire::WorkloadStatus::try_from(m.status) {
        Ok(wire::WorkloadStatus::Healthy) => Health::Healthy,
        Ok(wire::WorkloadStatus::Unhealthy) => Health::Unhealthy,
        Err(_) => return Err(unknown("status", m.status)),
    };
    w.workload_type = texts.text(match wire::WorkloadType::try_from(m.workload_type) {
        Ok(wire::WorkloadType::Deployment) => "deployment",
        Ok(wire::WorkloadType::Cronjob) => "cronjob",
        Ok(wire::WorkloadType::Job) => "job",
        // Only a label of metrics: not worth losing a workload.
        Ok(wire::WorkloadType::Pod) | Err(_) => "pod",
    });
    w.native_tunnel = m.native_tunnel;
    w.node = texts.text(&m.node);
    w.cluster = texts.text(&m.cluster_id);
    if !m.workload_name.is_empty() {
        w.workload_name = texts.text(&m.workload_name);
    }
    w.canonical_name = if m.canonical_name.is_empty() { Arc::clone(&w.workload_name) } else { texts.text(&m.canonical_name) };
    if !m.canonical_revision.is_empty() {
        w.canonical_revision = texts.text(&m.canonical_revision);
    }
    w.capacity = m.capacity.unwrap_or(1).max(1);
    if let Some(l) = &m.locality {
        w.locality = Locality { region: texts.text(&l.region), zone: texts.text(&l.zone), subzone: texts.text(&l.subzone) };
    }
    w.policies = texts_of_policies(&m.authorization_policies, texts)?;
    w.services = m
        .services
        .iter()
        .map(|(key, ports)| backed(key, ports, texts))
        .collect::<Result<Vec<_>, _>>()
        .map(|pairs| texts.services(pairs))?;
    match m.waypoint.as_ref().map(|at| gateway(at, texts)).transpose() {
        Ok(waypoint) => w.waypoint = waypoint.map(Box::new),
        Err(why) => w.waypoint_error = Some(format!("waypoint: {why}").into()),
    }
    let behind = m.network_gateway.as_ref().map(|at| gateway(at, texts)).transpose();
    w.network_gateway = behind.map_err(|why| format!("network_gateway: {why}"))?.map(Box::new);
    w.application_tunnel = m.application_tunnel.map_or(Ok(None), application_tunnel)?;
    Ok(w)
}

/// What stands in for a workload that cannot be used: calls to each of its addresses that can be read are refused. Without it they
/// would be no calls of the mesh, and go past its waypoint in plaintext. It backs nothing, is on no node, and has no account: so
/// nobody can prove to be it, and its own pod finds no workload to be judged as.
pub(super) fn closed_workload(m: &wire::Workload, named: &str, why: &str, texts: &mut Interner) -> Workload {
    let mut w = Workload::new(if m.uid.is_empty() { named } else { &m.uid }, &m.name, "");
    w.namespace = texts.text(&m.namespace);
    w.service_account = texts.text("");
    w.ips = m.addresses.iter().filter_map(|bytes| ip(bytes).ok()).collect();
    w.network = Network(texts.text(&m.network));
    w.protocol = Protocol::Hbone;
    // What shares its node's addresses is not reached by them.
    if m.network_mode == wire::NetworkMode::HostNetwork as i32 {
        w.network_mode = NetworkMode::HostNetwork;
    }
    w.cluster = texts.text(&m.cluster_id);
    w.waypoint_error = Some(why.into());
    w
}

/// What is in a workload or service and has no meaning here, in words.
pub(super) fn passed_over(m: &wire::address::Type) -> Vec<String> {
    let (kind, extensions) = match m {
        wire::address::Type::Workload(w) => ("workload", &w.extensions),
        wire::address::Type::Service(s) => ("service", &s.extensions),
    };
    let extension = |extension: &wire::Extension| {
        let of_type = extension.config.as_ref().map_or("without content", |config| &config.type_url);
        format!("extension {:?} of a {kind}, {of_type}", extension.name)
    };
    let mut all: Vec<String> = extensions.iter().map(extension).collect();
    if let wire::address::Type::Service(s) = m
        && wire::service::Visibility::try_from(s.visibility).is_err()
    {
        all.push(format!("visibility {} of a service, which is seen in its own namespace only", s.visibility));
    }
    all
}

fn texts_of_policies(names: &[String], texts: &mut Interner) -> Result<Arc<[PolicyKey]>, Bad> {
    let mut keys = Vec::with_capacity(names.len());
    for name in names {
        keys.push(policy_key(name).ok_or_else(|| format!("authorization_policies: {name:?} is not namespace/name"))?);
    }
    Ok(texts.policies(keys))
}

/// `namespace/name`.
pub(super) fn policy_key(name: &str) -> Option<PolicyKey> {
    let (namespace, name) = name.split_once('/').filter(|(ns, name)| !ns.is_empty() && !name.is_empty())?;
    Some(PolicyKey::new(namespace, name))
}

fn backed(key: &str, ports: &wire::PortList, texts: &mut Interner) -> Result<(ServiceKey, PortMap), Bad> {
    let (namespace, host) = key.split_once('/').ok_or_else(|| format!("services: {key:?} is not namespace/hostname"))?;
    let key = ServiceKey { namespace: texts.text(namespace), hostname: texts.text(&host.to_ascii_lowercase()) };
    let mut pairs = Vec::with_capacity(ports.ports.len());
    // istiod leaves the target out of one of two ports that share a number (UDP and TCP) and name their targets: there is none.
    for p in ports.ports.iter().filter(|p| p.target_port != 0) {
        pairs.push((port(p.service_port)?, port(p.target_port)?));
    }
    Ok((key, texts.ports(pairs)))
}

fn application_tunnel(t: wire::ApplicationTunnel) -> Result<Option<ApplicationTunnel>, Bad> {
    match application_tunnel::Protocol::try_from(t.protocol) {
        Ok(application_tunnel::Protocol::None) => Ok(None),
        Ok(application_tunnel::Protocol::Proxy) if t.port == 0 => Ok(Some(ApplicationTunnel::Proxy(None))),
        Ok(application_tunnel::Protocol::Proxy) => Ok(Some(ApplicationTunnel::Proxy(Some(port(t.port)?)))),
        Err(_) => Err(unknown("application_tunnel.protocol", t.protocol)),
    }
}

/// A service of this name, nothing else.
fn named(m: &wire::Service, texts: &mut Interner) -> Result<Service, Bad> {
    if m.namespace.is_empty() || m.hostname.is_empty() {
        return Err("a service has a namespace and a hostname".into());
    }
    let mut s = Service::new(&m.name, "", "");
    s.key = ServiceKey { namespace: texts.text(&m.namespace), hostname: texts.text(&m.hostname.to_ascii_lowercase()) };
    Ok(s)
}
fn add_address(s: &mut Service, at: &wire::NetworkAddress, texts: &mut Interner) -> Result<(), Bad> {
    let (network, ip) = (Network(texts.text(&at.network)), ip(&at.address)?);
    match at.length {
        None => s.vips.push(NetworkAddr { network, ip }),
        Some(length) => s.cidr_vips.push((network, net(ip, length)?)),
    }
    Ok(())
}

/// What stands in for a service that cannot be used: at each of its addresses that can be read calls are refused. Without it they
/// would be no calls of the mesh, and go past its waypoint.
pub(super) fn closed(m: &wire::Service, why: &str, texts: &mut Interner) -> Option<Service> {
    let mut s = named(m, texts).ok()?;
    for at in &m.addresses {
        let _unreadable = add_address(&mut s, at, texts);
    }
    s.waypoint_error = Some(why.into());
    Some(s)
}

pub(super) fn service(m: &wire::Service, texts: &mut Interner) -> Result<Service, Bad> {
    let mut s = named(m, texts)?;
    for at in &m.addresses {
        add_address(&mut s, at, texts)?;
    }
    for p in &m.ports {
        let target = if p.target_port == 0 { 0 } else { port(p.target_port)? };
        s.ports.push(ServicePort { port: port(p.service_port)?, target, protocol: app_protocol(p.app_protocol) });
    }
    // A ServiceEntry may name hosts here, for TLS to the outside; behind a tunnel they prove nothing.
    s.sans = m.subject_alt_names.iter().filter_map(|san| san.parse().ok()).collect();
    match waypoints(m, texts) {
        Ok(waypoints) => s.waypoints = waypoints,
        Err(why) => s.waypoint_error = Some(format!("waypoint: {why}").into()),
    }
    s.ingress_use_waypoint = m.ingress_use_waypoint;
    s.lb = m.load_balancing.as_ref().map_or_else(|| Ok(LoadBalancing::default()), load_balancing)?;
    s.ip_families = match wire::IpFamilies::try_from(m.ip_families) {
        Ok(wire::IpFamilies::Automatic) => IpFamilies::Automatic,
        Ok(wire::IpFamilies::Ipv4Only) => IpFamilies::V4,
        Ok(wire::IpFamilies::Ipv6Only) => IpFamilies::V6,
        Ok(wire::IpFamilies::Dual) => IpFamilies::Dual,
        Err(_) => return Err(unknown("ip_families", m.ip_families)),
    };
    s.canonical = m.canonical;
    s.visibility = match wire::service::Visibility::try_from(m.visibility) {
        Ok(wire::service::Visibility::Public) => Visibility::Public,
        // Of a later Istio's words none can mean more than "everyone".
        Ok(wire::service::Visibility::Namespace) | Err(_) => Visibility::Namespace,
    };
    Ok(s)
}

fn app_protocol(value: i32) -> AppProtocol {
    match wire::AppProtocol::try_from(value) {
        Ok(wire::AppProtocol::Http11) => AppProtocol::Http11,
        Ok(wire::AppProtocol::Http2) => AppProtocol::Http2,
        Ok(wire::AppProtocol::Grpc) => AppProtocol::Grpc,
        Ok(wire::AppProtocol::Tcp) => AppProtocol::Tcp,
        Ok(wire::AppProtocol::Tls) => AppProtocol::Tls,
        Ok(wire::AppProtocol::Unknown) | Err(_) => AppProtocol::Unknown,
    }
}

fn waypoints(m: &wire::Service, texts: &mut Interner) -> Result<Vec<WeightedWaypoint>, Bad> {
    if m.weighted_waypoints.is_empty() {
        let one = m.waypoint.as_ref().map(|at| gateway(at, texts)).transpose()?;
        return Ok(one.map(|waypoint| WeightedWaypoint { waypoint, weight: 100 }).into_iter().collect());
    }
    let mut out = Vec::with_capacity(m.weighted_waypoints.len());
    for w in &m.weighted_waypoints {
        let at = w.destination.as_ref().ok_or("a weighted waypoint has no destination")?;
        out.push(WeightedWaypoint { waypoint: gateway(at, texts)?, weight: w.weight });
    }
    if out.iter().all(|w| w.weight == 0) {
        return Err("the weights sum to zero".into());
    }
    Ok(out)
}

fn load_balancing(lb: &wire::LoadBalancing) -> Result<LoadBalancing, Bad> {
    let scope = |value: &i32| match load_balancing::Scope::try_from(*value) {
        Ok(load_balancing::Scope::Region) => Ok(LbScope::Region),
        Ok(load_balancing::Scope::Zone) => Ok(LbScope::Zone),
        Ok(load_balancing::Scope::Subzone) => Ok(LbScope::Subzone),
        Ok(load_balancing::Scope::Node) => Ok(LbScope::Node),
        Ok(load_balancing::Scope::Cluster) => Ok(LbScope::Cluster),
        Ok(load_balancing::Scope::Network) => Ok(LbScope::Network),
        Ok(load_balancing::Scope::UnspecifiedScope) | Err(_) => Err(unknown("routing_preference", *value)),
    };
    Ok(LoadBalancing {
        scopes: lb.routing_preference.iter().map(scope).collect::<Result<_, _>>()?,
        mode: match load_balancing::Mode::try_from(lb.mode) {
            Ok(load_balancing::Mode::UnspecifiedMode) => LbMode::Any,
            Ok(load_balancing::Mode::Strict) => LbMode::Strict,
            Ok(load_balancing::Mode::Failover) => LbMode::Failover,
            Ok(load_balancing::Mode::Passthrough) => LbMode::Passthrough,
            Err(_) => return Err(unknown("mode", lb.mode)),
        },
        health: match load_balancing::HealthPolicy::try_from(lb.health_policy) {
            Ok(load_balancing::HealthPolicy::OnlyHealthy) => HealthPolicy::OnlyHealthy,
            Ok(load_balancing::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
            Err(_) => return Err(unknown("health_policy", lb.health_policy)),
        },
    })
}

/// A policy; of one that cannot be read, what stands in for it and denies, and why.
pub(super) fn policy(m: security::Authorization, named: &PolicyKey) -> (Policy, Option<Bad>) {
    let key = match (m.namespace.as_str(), m.name.as_str()) {
        ("", _) | (_, "") => named.clone(),
        (namespace, name) => PolicyKey::new(namespace, name),
    };
    let (scope, known) = match security::Scope::try_from(m.scope) {
        Ok(security::Scope::Global) => (Scope::Global, Ok(())),
        Ok(security::Scope::Namespace) => (Scope::Namespace, Ok(())),
        Ok(security::Scope::WorkloadSelector) => (Scope::Selector, Ok(())),
        Err(_) => (Scope::Namespace, Err(unknown("scope", m.scope))),
    };
    match known.and_then(|()| rules(&m)) {
        Ok(body) => (Policy { key, scope, body, origin: None }, None),
        Err(why) => (unusable(key, scope, &why), Some(why)),
    }
}

/// What stands in for a policy that cannot be read.
pub(super) fn unusable(key: PolicyKey, scope: Scope, why: &str) -> Policy {
    Policy { key, scope, body: PolicyBody::Unusable { why: why.into() }, origin: None }
}

fn rules(m: &security::Authorization) -> Result<PolicyBody, Bad> {
    let action = match security::Action::try_from(m.action) {
        Ok(security::Action::Allow) => Action::Allow,
        Ok(security::Action::Deny) => Action::Deny,
        Err(_) => return Err(unknown("action", m.action)),
    };
    if !m.extensions.is_empty() {
        return Err("it has an extension, which may mean more than its rules say".into());
    }
    let clause = |rule: &security::Rules| Ok(Clause { matches: rule.matches.iter().map(one_match).collect::<Result<_, Bad>>()? });
    let rule = |group: &security::Group| Ok(Rule { clauses: group.rules.iter().map(clause).collect::<Result<_, Bad>>()? });
    let rules = m.groups.iter().map(rule).collect::<Result<_, Bad>>()?;
    Ok(PolicyBody::Rules { action, dry_run: m.dry_run, rules })
}

fn one_match(m: &security::Match) -> Result<Match, Bad> {
    fn both<T, W>(any: &[W], none: &[W], f: impl Fn(&W) -> Result<T, Bad>) -> Result<Values<T>, Bad> {
        let all = |list: &[W]| list.iter().map(&f).collect::<Result<Vec<T>, Bad>>();
        Ok(Values::new(all(any)?, all(none)?))
    }
    if !m.extensions.is_empty() {
        return Err("a match has an extension, which may narrow it".into());
    }
    let account = |a: &security::ServiceAccountMatch| match (a.namespace.as_str(), a.service_account.as_str()) {
        ("", _) | (_, "") => Err("a service account without namespace or name".to_owned()),
        (namespace, name) => Ok((namespace.into(), name.into())),
    };
    let range = |a: &security::Address| net(ip(&a.address)?, a.length);
    let port = |p: &u32| port(*p);
    Ok(Match {
        namespaces: both(&m.namespaces, &m.not_namespaces, text_match)?,
        service_accounts: both(&m.service_accounts, &m.not_service_accounts, account)?,
        principals: both(&m.principals, &m.not_principals, text_match)?,
        trust_domains: Values::default(),
        source_ips: both(&m.source_ips, &m.not_source_ips, range)?,
        destination_ips: both(&m.destination_ips, &m.not_destination_ips, range)?,
        destination_ports: both(&m.destination_ports, &m.not_destination_ports, port)?,
    })
}

fn text_match(m: &security::StringMatch) -> Result<TextMatch, Bad> {
    match &m.match_type {
        Some(MatchType::Exact(t)) if !t.is_empty() => Ok(TextMatch::Exact(t.as_str().into())),
        Some(MatchType::Prefix(t)) if !t.is_empty() => Ok(TextMatch::Prefix(t.as_str().into())),
        Some(MatchType::Suffix(t)) if !t.is_empty() => Ok(TextMatch::Suffix(t.as_str().into())),
        Some(MatchType::Presence(())) => Ok(TextMatch::Presence),
        Some(_) | None => Err("a text match without text".into()),
    }
}

fn gateway(m: &wire::GatewayAddress, texts: &mut Interner) -> Result<GatewayRef, Bad> {
    let destination = match &m.destination {
        Some(gateway_address::Destination::Hostname(at)) if !at.namespace.is_empty() && !at.hostname.is_empty() => {
            let (namespace, host) = (texts.text(&at.namespace), texts.text(&at.hostname.to_ascii_lowercase()));
            GatewayDestination::Service(ServiceKey { namespace, hostname: host })
        }
        Some(gateway_address::Destination::Address(at)) if at.length.is_none() => {
            GatewayDestination::Address(Network(texts.text(&at.network)), ip(&at.address)?)
        }
        Some(_) | None => return Err("it names no destination".into()),
    };
    let hbone_port = if m.hbone_mtls_port == 0 { HBONE_PORT } else { port(m.hbone_mtls_port)? };
    Ok(GatewayRef { destination, hbone_port })
}

fn ip(bytes: &[u8]) -> Result<IpAddr, Bad> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| format!("an address of {} bytes", bytes.len()))?;
    Ok(IpAddr::from(Ipv6Addr::from(v6)).to_canonical())
}

fn net(ip: IpAddr, length: u32) -> Result<IpNet, Bad> {
    let bad = || format!("{ip}/{length} is not a range of addresses");
    let length = u8::try_from(length).map_err(|_| bad())?;
    Ok(IpNet::new(ip, length).map_err(|_| bad())?.trunc())
}

fn port(value: u32) -> Result<u16, Bad> {
    u16::try_from(value).ok().filter(|port| *port != 0).ok_or_else(|| format!("{value} is not a port"))
}

#[cfg(test)]
mod tests;
