//! ztunnel's local format (`LOCAL_XDS_PATH`, `LOCAL_XDS`; node-agent §1.10): workloads, services and policies as the
//! agent sees them, without Kubernetes objects. For benchmarks and for users who have such a file.
//!
//! Strict: unknown fields are refused. A refused workload or service is left out; a refused policy denies in its
//! namespace; of two policies of one name that differ neither counts, and they deny. A service whose waypoint cannot be
//! used stays, and refuses: without it, its address would be reached directly. A file that does not parse keeps what it said before, or at start keeps the process from being ready.
//! Upstream: the operator. Downstream: [`crate::publisher`].

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use mesh_model::addr::{Network, NetworkAddr};
use mesh_model::id::TrustDomain;
use mesh_model::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch, Values};
use mesh_model::service::{
    HealthPolicy, IpFamilies, LbMode, LbScope, LoadBalancing, Service, ServiceKey, ServicePort, Visibility, WeightedWaypoint,
};
use mesh_model::snapshot::Viewpoint;
use mesh_model::workload::{
    ApplicationTunnel, GatewayDestination, GatewayRef, Health, Locality, NetworkMode, Protocol, Workload,
};
use mesh_model::{Change, Origin};

use crate::diagnostics::{Diagnostics, Problem, Severity};
use crate::files::{Outcome, read_text};
use crate::publisher::ChangeSink;
use crate::translate::read::{self, Bad, Read};
use crate::yaml::{self, Node, Value};
use crate::{Source, SourceError};

/// Where the text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum From {
    /// A file, re-read when it changes.
    File(PathBuf),
    /// The text itself.
    Text(String),
}
/// The format as a source.
#[derive(Debug)]
pub struct LocalXdsSource {
    /// Where the text comes from.
    pub from: From,
    /// Our own network, for values that leave theirs out.
    pub view: Viewpoint,
    /// Where problems go.
    pub diagnostics: Diagnostics,
}

/// What the text says.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Workloads by uid.
    pub workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    /// Services by key.
    pub services: BTreeMap<ServiceKey, Arc<Service>>,
    /// Policies by key.
    pub policies: BTreeMap<PolicyKey, Arc<Policy>>,
    /// What was refused.
    pub problems: Vec<Problem>,
}
impl Parsed {
    /// The changes from `old` to this.
    pub fn changes_since(&self, old: &Parsed) -> Vec<Change> {
        fn diff<K: Ord + Clone, T: PartialEq>(
            old: &BTreeMap<K, Arc<T>>,
            new: &BTreeMap<K, Arc<T>>,
            put: impl Fn(Arc<T>) -> Change,
            gone: impl Fn(K) -> Change,
            out: &mut Vec<Change>,
        ) {
            out.extend(old.keys().filter(|k| !new.contains_key(*k)).cloned().map(gone));
            out.extend(new.iter().filter(|(k, v)| old.get(*k) != Some(*v)).map(|(_, v)| put(Arc::clone(v))));
        }
        let mut out = Vec::new();
        diff(&old.policies, &self.policies, Change::Policy, Change::PolicyGone, &mut out);
        diff(&old.services, &self.services, Change::Service, Change::ServiceGone, &mut out);
        diff(&old.workloads, &self.workloads, Change::Workload, Change::WorkloadGone, &mut out);
        out
    }
}

impl Source for LocalXdsSource {
    fn name(&self) -> &'static str {
        "local-xds"
    }
    async fn run(self, sink: ChangeSink) -> Result<(), SourceError> {
        let Self { from, view, diagnostics } = self;
        crate::files::on_thread("mesh-local-xds", sink, move |sink| {
            let mut current = Parsed::default();
            let (mut seen, probe) = (None, sink.closed_probe());
            let mut reload = |sink: &mut ChangeSink| -> Option<Outcome> {
                let (place, text) = match &from {
                    From::Text(t) => (Arc::from("LOCAL_XDS"), Ok(t.clone())),
                    From::File(path) => (Arc::from(path.display().to_string()), read_text(path)),
                };
                let text = match text {
                    Ok(t) => t,
                    Err(e) => {
                        // So that the complaint goes when the same text is back.
                        seen = None;
                        diagnostics.replace(vec![problem(&place, 0, "file", &format!("it cannot be read: {e}"))]);
                        return Some(Outcome::Unreadable);
                    }
                };
                let mut h = DefaultHasher::new();
                text.hash(&mut h);
                let hash = h.finish();
                if seen == Some(hash) {
                    return Some(Outcome::Read);
                }
                seen = Some(hash);
                match parse(&text, &place, &view) {
                    Ok(new) => {
                        diagnostics.replace(new.problems.clone());
                        let changes = new.changes_since(&current);
                        current = new;
                        sink.send_blocking(changes).is_ok().then_some(Outcome::Read)
                    }
                    Err(p) => {
                        diagnostics.replace(vec![*p]);
                        Some(Outcome::Read)
                    }
                }
            };
            match &from {
                From::Text(_) => {
                    reload(sink);
                }
                From::File(path) => {
                    crate::files::follow(path, probe, |_| reload(sink));
                }
            }
        })
        .await
    }
}

fn problem(place: &Arc<str>, line: u32, object: &str, message: &str) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: Origin { place: Arc::clone(place), line, object: object.into() },
        field: "".into(),
        message: message.into(),
        fix: "".into(),
        code: Some("local-xds"),
    }
}

/// Reads a text in this format. An error is about the text as a whole.
pub fn parse(text: &str, place: &Arc<str>, view: &Viewpoint) -> Result<Parsed, Box<Problem>> {
    let docs = yaml::documents(text);
    let mut out = Parsed::default();
    let doc = match docs.as_slice() {
        [] => return Ok(out),
        [one] => *one,
        [_, second, ..] => return Err(Box::new(problem(place, second.line, "file", "expected one document"))),
    };
    let root = yaml::parse_whole(doc).map_err(|e| Box::new(problem(place, e.line, "file", &e.message)))?;
    let fail = |bad: Bad<'_>| Box::new(bad.problem(&root, place, &Arc::from("file"), Severity::Error));
    read::only(&root, &["workloads", "policies", "services"]).map_err(fail)?;
    let section = |key: &str| read::list(&root, key).map_err(fail);
    for node in section("services")? {
        let object = name_of("service", node);
        match service(node, &origin(place, node, &object)) {
            Ok((s, bad)) => {
                out.problems.extend(bad.map(|bad| bad.problem(&root, place, &object, Severity::Error)));
                insert(&mut out.services, s.key.clone(), s, node, place, &object, &mut out.problems);
            }
            Err(bad) => out.problems.push(bad.problem(&root, place, &object, Severity::Error)),
        }
    }
    for node in section("workloads")? {
        let object = name_of("workload", node);
        match workload(node, &origin(place, node, &object), view) {
            Ok(w) => insert(&mut out.workloads, Arc::clone(&w.uid), w, node, place, &object, &mut out.problems),
            Err(bad) => out.problems.push(bad.problem(&root, place, &object, Severity::Error)),
        }
    }
    for (i, node) in section("policies")?.iter().enumerate() {
        let object = name_of("policy", node);
        let p = policy(node, &origin(place, node, &object)).unwrap_or_else(|bad| {
            let p = bad.problem(&root, place, &object, Severity::Error);
            let why = p.to_string().into();
            out.problems.push(p);
            let text = |key| node.get(key).and_then(Node::text);
            // Whatever its scope was meant to be, its namespace is the part of the mesh it speaks about.
            let namespace = text("namespace").filter(|n| !n.is_empty());
            let global = namespace.is_none() || text("scope") == Some("Global");
            let name = text("name").filter(|n| !n.is_empty()).map_or_else(|| format!("policies[{i}]"), str::to_owned);
            Policy {
                key: PolicyKey::new(namespace.unwrap_or(&view.root_namespace), &name),
                scope: if global { Scope::Global } else { Scope::Namespace },
                body: PolicyBody::Unusable { why },
                origin: Some(origin(place, node, &object)),
            }
        });
        match out.policies.entry(p.key.clone()) {
            Entry::Vacant(free) => drop(free.insert(Arc::new(p))),
            Entry::Occupied(mut first) => {
                let places = [first.get(), &p].map(|p: &Policy| p.origin.clone()).into_iter().flatten();
                let places: Vec<Arc<Origin>> = places.collect();
                if let Some(closed) = disagree(first.get(), &p, &places) {
                    let why =
                        "it is written several times with different content; none of them counts, it denies until one is left";
                    out.problems.extend(places.iter().map(|at| problem(place, at.line, &object, why)));
                    first.insert(Arc::new(closed));
                } else {
                    out.problems.push(problem(place, node.line, &object, TWICE));
                }
            }
        }
    }
    Ok(out)
}

const TWICE: &str = "it is written twice; the first counts";

/// What stands for two policies of one name that do not say the same; nothing when they do, or when neither enforces.
fn disagree(a: &Policy, b: &Policy, places: &[Arc<Origin>]) -> Option<Policy> {
    let dry = |p: &Policy| matches!(p.body, PolicyBody::Rules { dry_run: true, .. });
    if (a.scope == b.scope && a.body == b.body) || (dry(a) && dry(b)) {
        return None;
    }
    // The wider one; a workload that names the policy is bound by it whatever its scope.
    let scope = [Scope::Global, Scope::Namespace].into_iter().find(|s| a.scope == *s || b.scope == *s).unwrap_or(Scope::Selector);
    let lines: Vec<String> = places.iter().map(|at| at.line.to_string()).collect();
    let why = format!("it is written several times with different content (lines {})", lines.join(", ")).into();
    Some(Policy { key: a.key.clone(), scope, body: PolicyBody::Unusable { why }, origin: a.origin.clone() })
}

fn insert<K: Ord, T>(
    map: &mut BTreeMap<K, Arc<T>>,
    key: K,
    value: T,
    node: &Node<'_>,
    place: &Arc<str>,
    object: &str,
    problems: &mut Vec<Problem>,
) {
    if let Entry::Vacant(free) = map.entry(key) {
        free.insert(Arc::new(value));
    } else {
        problems.push(problem(place, node.line, object, TWICE));
    }
}
fn name_of(what: &str, node: &Node<'_>) -> Arc<str> {
    let text = |key| node.get(key).and_then(Node::text).unwrap_or_default();
    format!("{what} {}/{}", text("namespace"), text("name")).into()
}
fn origin(place: &Arc<str>, node: &Node<'_>, object: &Arc<str>) -> Arc<Origin> {
    Arc::new(Origin { place: Arc::clone(place), line: node.line, object: Arc::clone(object) })
}

fn need<'p>(node: &'p Node<'p>, key: &'static str) -> Read<'p, &'p str> {
    match read::text(node, key)? {
        Some(t) if !t.is_empty() => Ok(t),
        _ => Err(Bad::missing(node, key, format!("`{key}` is needed"))),
    }
}
fn choice<'p, T: Copy>(node: &'p Node<'p>, key: &str, choices: &[(&str, T)]) -> Read<'p, Option<T>> {
    let Some(n) = node.get(key) else { return Ok(None) };
    let t = read::scalar(n)?;
    if let Some((_, v)) = choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(t)) {
        return Ok(Some(*v));
    }
    let known: Vec<&str> = choices.iter().map(|(n, _)| *n).collect();
    Err(Bad::value(n, format!("`{t}` is not one of {}", known.join(", ")), "write one of them"))
}
fn parsed<'p, T: FromStr>(node: &'p Node<'p>, what: &str) -> Read<'p, T>
where
    T::Err: std::fmt::Display,
{
    let t = read::scalar(node)?;
    t.parse().map_err(|e| Bad::value(node, format!("`{t}` is not {what}: {e}"), ""))
}
fn port_map<'p>(node: &'p Node<'p>, zero: bool) -> Read<'p, Vec<(u16, u16)>> {
    let mut out = Vec::new();
    for e in read::entries(node)? {
        let Some(port) = e.key.parse::<u16>().ok().filter(|p| *p != 0) else {
            return Err(Bad::value(&e.node, format!("`{}` is not a port", e.key), "write `service port: target port`"));
        };
        let target = if zero && e.node.text() == Some("0") { 0 } else { read::port(&e.node)? };
        out.push((port, target));
    }
    out.sort_unstable();
    Ok(out)
}
/// `network/ip`.
fn network_addr<'p>(node: &'p Node<'p>) -> Read<'p, NetworkAddr> {
    let t = read::scalar(node)?;
    t.split_once('/')
        .and_then(|(n, ip)| Some(NetworkAddr { network: n.into(), ip: ip.parse::<std::net::IpAddr>().ok()?.to_canonical() }))
        .ok_or_else(|| Bad::value(node, format!("`{t}` is not `network/ip`"), "write for example `/10.0.0.1` (default network)"))
}
fn gateway<'p>(node: &'p Node<'p>) -> Read<'p, GatewayRef> {
    read::only(node, &["destination", "hboneMtlsPort"])?;
    let Some(d) = node.get("destination") else { return Err(Bad::missing(node, "destination", "a gateway has a destination")) };
    let t = read::scalar(d)?;
    // An address part means `network/ip`, anything else `namespace/hostname`.
    let destination = match t.split_once('/') {
        Some((network, ip)) if ip.parse::<std::net::IpAddr>().is_ok() => {
            let a = network_addr(d)?;
            let _ = (network, ip);
            GatewayDestination::Address(a.network, a.ip)
        }
        Some((ns, host)) if !ns.is_empty() && !host.is_empty() => {
            GatewayDestination::Service(ServiceKey::new(ns, &host.to_ascii_lowercase()))
        }
        _ => return Err(Bad::value(d, format!("`{t}` is neither `namespace/hostname` nor `network/ip`"), "")),
    };
    let hbone_port = node.get("hboneMtlsPort").map_or(Ok(15008), read::port)?;
    Ok(GatewayRef { destination, hbone_port })
}

const WORKLOAD: &[&str] = &[
    "uid",
    "name",
    "namespace",
    "serviceAccount",
    "trustDomain",
    "workloadIps",
    "protocol",
    "networkMode",
    "node",
    "network",
    "clusterId",
    "status",
    "capacity",
    "hostname",
    "workloadName",
    "workloadType",
    "canonicalName",
    "canonicalRevision",
    "nativeTunnel",
    "locality",
    "waypoint",
    "networkGateway",
    "applicationTunnel",
    "authorizationPolicies",
    "services",
    "netns",
];
fn workload<'p>(node: &'p Node<'p>, origin: &Arc<Origin>, view: &Viewpoint) -> Read<'p, Workload> {
    read::only(node, WORKLOAD)?;
    let mut w = Workload::new(need(node, "uid")?, read::text_or_empty(node, "name")?, need(node, "namespace")?);
    let text = |key: &str| -> Read<'p, Option<Arc<str>>> { Ok(read::text(node, key)?.map(Arc::from)) };
    let some = |key: &str| -> Read<'p, Option<Arc<str>>> { Ok(text(key)?.filter(|t| !t.is_empty())) };
    if let Some(sa) = some("serviceAccount")? {
        w.service_account = sa;
    }
    if let Some(n) = node.get("trustDomain").filter(|n| n.text() != Some("")) {
        let t = read::scalar(n)?;
        w.trust_domain =
            TrustDomain::parse(t).map_err(|e| Bad::value(n, e.to_string(), "write a trust domain such as `cluster.local`"))?;
    } else {
        w.trust_domain = view.trust_domain.clone();
    }
    for ip in read::list(node, "workloadIps")? {
        w.ips.push(read::ip(ip)?);
    }
    w.hostname = some("hostname")?;
    if let Some(n) = text("network")? {
        w.network = Network(n);
    }
    w.protocol = choice(node, "protocol", &[("TCP", Protocol::Tcp), ("HBONE", Protocol::Hbone)])?.unwrap_or_default();
    w.network_mode =
        choice(node, "networkMode", &[("Standard", NetworkMode::Standard), ("HostNetwork", NetworkMode::HostNetwork)])?
            .unwrap_or_default();
    w.health = choice(node, "status", &[("Healthy", Health::Healthy), ("Unhealthy", Health::Unhealthy)])?.unwrap_or_default();
    w.native_tunnel = read::flag(node, "nativeTunnel")?;
    w.node = text("node")?.unwrap_or_default();
    w.cluster = text("clusterId")?.unwrap_or_default();
    if let Some(t) = some("workloadName")? {
        w.workload_name = t;
    }
    if let Some(t) = some("workloadType")? {
        w.workload_type = t.to_ascii_lowercase().into();
    }
    w.canonical_name = some("canonicalName")?.unwrap_or_else(|| Arc::clone(&w.workload_name));
    if let Some(t) = some("canonicalRevision")? {
        w.canonical_revision = t;
    }
    w.capacity = read::number::<u32>(node, "capacity")?.unwrap_or(1).max(1);
    if let Some(l) = read::map(node, "locality")? {
        read::only(l, &["region", "zone", "subzone"])?;
        let part = |key: &str| -> Read<'p, Arc<str>> { Ok(read::text_or_empty(l, key)?.into()) };
        w.locality = Locality { region: part("region")?, zone: part("zone")?, subzone: part("subzone")? };
    }
    w.waypoint = read::map(node, "waypoint")?.map(gateway).transpose()?.map(Box::new);
    w.network_gateway = read::map(node, "networkGateway")?.map(gateway).transpose()?.map(Box::new);
    if let Some(t) = read::map(node, "applicationTunnel")? {
        read::only(t, &["protocol", "port"])?;
        let proxy = choice(t, "protocol", &[("NONE", false), ("PROXY", true)])?.unwrap_or(false);
        let port = t.get("port").filter(|n| n.text() != Some("0")).map(read::port).transpose()?;
        w.application_tunnel = proxy.then_some(ApplicationTunnel::Proxy(port));
    }
    let mut policies = Vec::new();
    for p in read::list(node, "authorizationPolicies")? {
        let t = read::scalar(p)?;
        let Some((ns, name)) = t.split_once('/') else {
            return Err(Bad::value(p, format!("`{t}` is not `namespace/name`"), ""));
        };
        policies.push(PolicyKey::new(ns, name));
    }
    w.policies = policies.into();
    if let Some(services) = read::map(node, "services")? {
        let mut backed: Vec<(ServiceKey, mesh_model::workload::PortMap)> = Vec::new();
        for e in read::entries(services)? {
            let Some((ns, host)) = e.key.split_once('/') else {
                return Err(Bad::value(&e.node, format!("`{}` is not `namespace/hostname`", e.key), ""));
            };
            backed.push((ServiceKey::new(ns, &host.to_ascii_lowercase()), port_map(&e.node, false)?.into()));
        }
        w.services = backed.into_iter().collect();
    }
    w.netns = some("netns")?;
    w.origin = Some(Arc::clone(origin));
    Ok(w)
}

/// A service, and what is wrong with its waypoints if it has to refuse for that.
fn service<'p>(node: &'p Node<'p>, origin: &Arc<Origin>) -> Read<'p, (Service, Option<Bad<'p>>)> {
    read::only(
        node,
        &[
            "name",
            "namespace",
            "hostname",
            "vips",
            "cidrVips",
            "ports",
            "endpoints",
            "subjectAltNames",
            "canonical",
            "visibility",
            "ipFamilies",
            "loadBalancer",
            "waypoint",
            "weightedWaypoints",
            "ingressUseWaypoint",
        ],
    )?;
    let host = need(node, "hostname")?.to_ascii_lowercase();
    let mut s = Service::new(read::text_or_empty(node, "name")?, need(node, "namespace")?, &host);
    for v in read::list(node, "vips")? {
        s.vips.push(network_addr(v)?);
    }
    for v in read::list(node, "cidrVips")? {
        read::only(v, &["network", "cidr"])?;
        let Some(cidr) = v.get("cidr") else { return Err(Bad::missing(v, "cidr", "a range is needed")) };
        s.cidr_vips.push((read::text_or_empty(v, "network")?.into(), read::net(cidr)?));
    }
    if let Some(ports) = read::map(node, "ports")? {
        s.ports = port_map(ports, true)?
            .into_iter()
            .map(|(port, target)| ServicePort { port, target, protocol: mesh_model::service::AppProtocol::Unknown })
            .collect();
    }
    for san in read::list(node, "subjectAltNames")? {
        s.sans.push(parsed(san, "a SPIFFE id")?);
    }
    s.canonical = read::flag(node, "canonical")?;
    s.ingress_use_waypoint = read::flag(node, "ingressUseWaypoint")?;
    s.visibility =
        choice(node, "visibility", &[("Public", Visibility::Public), ("Namespace", Visibility::Namespace)])?.unwrap_or_default();
    s.ip_families =
        choice(node, "ipFamilies", &[("Dual", IpFamilies::Dual), ("IPv4", IpFamilies::V4), ("IPv6", IpFamilies::V6)])?
            .unwrap_or_default();
    if let Some(lb) = read::map(node, "loadBalancer")? {
        read::only(lb, &["routingPreferences", "mode", "healthPolicy"])?;
        let mut scopes = Vec::new();
        for n in read::list(lb, "routingPreferences")? {
            scopes.push(match read::scalar(n)?.to_ascii_lowercase().as_str() {
                "region" => LbScope::Region,
                "zone" => LbScope::Zone,
                "subzone" => LbScope::Subzone,
                "node" => LbScope::Node,
                "cluster" => LbScope::Cluster,
                "network" => LbScope::Network,
                t => {
                    return Err(Bad::value(
                        n,
                        format!("`{t}` is not a scope"),
                        "write Network, Region, Zone, Subzone, Node or Cluster",
                    ));
                }
            });
        }
        s.lb = LoadBalancing {
            scopes,
            mode: choice(
                lb,
                "mode",
                &[
                    ("Standard", LbMode::Any),
                    ("Strict", LbMode::Strict),
                    ("Failover", LbMode::Failover),
                    ("Passthrough", LbMode::Passthrough),
                ],
            )?
            .unwrap_or_default(),
            health: choice(
                lb,
                "healthPolicy",
                &[("OnlyHealthy", HealthPolicy::OnlyHealthy), ("AllowAll", HealthPolicy::AllowAll)],
            )?
            .unwrap_or_default(),
        };
    }
    let bad = match waypoints(node) {
        Ok(list) => {
            s.waypoints = list;
            None
        }
        Err(mut bad) => {
            s.waypoint_error = Some(bad.message.as_str().into());
            bad.message.push_str("; traffic to the service is refused");
            Some(bad)
        }
    };
    s.origin = Some(Arc::clone(origin));
    Ok((s, bad))
}
fn waypoints<'p>(node: &'p Node<'p>) -> Read<'p, Vec<WeightedWaypoint>> {
    let weighted = read::list(node, "weightedWaypoints")?;
    if weighted.is_empty() {
        let one = read::map(node, "waypoint")?.map(gateway).transpose()?;
        return Ok(one.map(|waypoint| WeightedWaypoint { waypoint, weight: 100 }).into_iter().collect());
    }
    let mut out = Vec::new();
    for w in weighted {
        read::only(w, &["destination", "weight"])?;
        let Some(d) = read::map(w, "destination")? else {
            return Err(Bad::missing(w, "destination", "a waypoint is needed"));
        };
        let Some(weight) = read::number(w, "weight")? else {
            return Err(Bad::missing(w, "weight", "each of several waypoints has a weight"));
        };
        out.push(WeightedWaypoint { waypoint: gateway(d)?, weight });
    }
    if out.iter().all(|w| w.weight == 0) {
        let at = node.get("weightedWaypoints").unwrap_or(node);
        return Err(Bad::value(at, "the weights of its waypoints sum to zero", "give one of them a weight"));
    }
    Ok(out)
}

fn policy<'p>(node: &'p Node<'p>, origin: &Arc<Origin>) -> Read<'p, Policy> {
    read::only(node, &["name", "namespace", "scope", "action", "dryRun", "rules"])?;
    let scope = choice(
        node,
        "scope",
        &[("Global", Scope::Global), ("Namespace", Scope::Namespace), ("WorkloadSelector", Scope::Selector)],
    )?
    .ok_or_else(|| Bad::missing(node, "scope", "a policy has a scope: Global, Namespace or WorkloadSelector"))?;
    let action = choice(node, "action", &[("Allow", Action::Allow), ("Deny", Action::Deny)])?
        .ok_or_else(|| Bad::missing(node, "action", "a policy has an action: Allow or Deny"))?;
    let mut rules = Vec::new();
    for rule in read::list(node, "rules")? {
        let mut clauses = Vec::new();
        for clause in nested(rule)? {
            let mut matches = Vec::new();
            for m in nested(clause)? {
                matches.push(one_match(m)?);
            }
            clauses.push(Clause { matches });
        }
        rules.push(Rule { clauses });
    }
    Ok(Policy {
        key: PolicyKey::new(need(node, "namespace")?, need(node, "name")?),
        scope,
        body: PolicyBody::Rules { action, dry_run: read::flag(node, "dryRun")?, rules },
        origin: Some(Arc::clone(origin)),
    })
}
fn nested<'p>(node: &'p Node<'p>) -> Read<'p, &'p [Node<'p>]> {
    match &node.value {
        Value::Seq(items) => Ok(items),
        _ => Err(Bad::value(
            node,
            format!("expected a list, found {}", node.describe()),
            "rules are lists of lists of lists of matches",
        )),
    }
}
fn one_match<'p>(node: &'p Node<'p>) -> Read<'p, Match> {
    read::only(
        node,
        &[
            "namespaces",
            "notNamespaces",
            "serviceAccounts",
            "notServiceAccounts",
            "principals",
            "notPrincipals",
            "trustDomains",
            "notTrustDomains",
            "sourceIps",
            "notSourceIps",
            "destinationIps",
            "notDestinationIps",
            "destinationPorts",
            "notDestinationPorts",
        ],
    )?;
    fn both<'p, T>(node: &'p Node<'p>, any: &str, none: &str, f: impl Fn(&'p Node<'p>) -> Read<'p, T>) -> Read<'p, Values<T>> {
        let all = |key: &str| read::list(node, key)?.iter().map(&f).collect::<Read<'p, Vec<T>>>();
        Ok(Values::new(all(any)?, all(none)?))
    }
    Ok(Match {
        namespaces: both(node, "namespaces", "notNamespaces", text_match)?,
        service_accounts: both(node, "serviceAccounts", "notServiceAccounts", account)?,
        principals: both(node, "principals", "notPrincipals", text_match)?,
        trust_domains: both(node, "trustDomains", "notTrustDomains", text_match)?,
        source_ips: both(node, "sourceIps", "notSourceIps", read::net)?,
        destination_ips: both(node, "destinationIps", "notDestinationIps", read::net)?,
        destination_ports: both(node, "destinationPorts", "notDestinationPorts", read::port)?,
    })
}
fn account<'p>(node: &'p Node<'p>) -> Read<'p, (Arc<str>, Arc<str>)> {
    if let Value::Map(_) = node.value {
        read::only(node, &["namespace", "serviceAccount"])?;
        return Ok((need(node, "namespace")?.into(), need(node, "serviceAccount")?.into()));
    }
    let t = read::scalar(node)?;
    match t.split_once('/') {
        Some((ns, sa)) if !ns.is_empty() && !sa.is_empty() => Ok((ns.into(), sa.into())),
        _ => Err(Bad::value(node, format!("`{t}` is not `namespace/name`"), "")),
    }
}
/// `!Prefix x` as serde_yaml writes enums, or `{Prefix: x}`.
fn text_match<'p>(node: &'p Node<'p>) -> Read<'p, TextMatch> {
    const FIX: &str = "write `!Exact x`, `!Prefix x`, `!Suffix x` or `Presence`";
    let (kind, value) = match (&node.tag, &node.value) {
        (Some(tag), Value::Scalar { text, .. }) => (&**tag, &**text),
        (Some(tag), Value::Null) => (&**tag, ""),
        (None, Value::Scalar { text, .. }) => (&**text, ""),
        (None, Value::Map(entries)) => match entries.as_slice() {
            [e] => (&*e.key, e.node.text().unwrap_or_default()),
            _ => return Err(Bad::value(node, "expected one kind of match", FIX)),
        },
        _ => return Err(Bad::value(node, "not a text match", FIX)),
    };
    match kind {
        "Presence" => Ok(TextMatch::Presence),
        "Exact" | "Prefix" | "Suffix" if value.is_empty() => Err(Bad::value(node, "an empty text constrains nothing", FIX)),
        "Exact" => Ok(TextMatch::Exact(value.into())),
        "Prefix" => Ok(TextMatch::Prefix(value.into())),
        "Suffix" => Ok(TextMatch::Suffix(value.into())),
        _ => Err(Bad::value(node, format!("`{kind}` is not a kind of text match"), FIX)),
    }
}

#[cfg(test)]
mod tests;
