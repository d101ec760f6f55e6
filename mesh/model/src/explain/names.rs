//! Who and what a question means: a workload by namespace and service account, a destination by the names clients use.
//!
//! Upstream: `snapshot`. Downstream: [`crate::explain`].
use crate::id::SpiffeId;
use crate::known::Known;
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::{NetworkMode, Protocol, Workload};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswerable {
    /// The source is written in no form that is known.
    #[error("`{0}` names no source; write namespace/service-account, namespace/service-account/pod, or an IP address")]
    Source(String),
    /// No workload has that service account (or name).
    #[error("no workload {0}{1}")]
    NoWorkload(String, String),
    /// The destination is written in no form that is known.
    #[error("`{0}` names no destination; write service:port, service.namespace:port, namespace/name:port, or ip:port")]
    Target(String),
    /// No service or workload has that name.
    #[error("no service or workload is called {0}{1}")]
    NoService(String, String),
    /// It has no address that a client could connect to.
    #[error("{0} has no address and no endpoint with one: clients cannot connect to it")]
    NoAddress(String),
    /// The request is none.
    #[error("{0}")]
    Request(String),
}

/// Port of the client's end; no rule can ask for it.
const CLIENT_PORT: u16 = 40_000;

/// Who calls.
pub(super) struct Source {
    pub(super) workload: Option<Arc<Workload>>,
    /// What it proves; `None` for plaintext.
    pub(super) identity: Option<SpiffeId>,
    pub(super) address: SocketAddr,
    pub(super) notes: Vec<String>,
}
impl Source {
    pub(super) fn name(&self) -> String {
        match &self.workload {
            Some(w) => super::name_of(w),
            None => self.address.ip().to_string(),
        }
    }
    pub(super) fn namespace(&self) -> &str {
        self.workload.as_ref().map_or("", |w| &w.namespace)
    }
}

/// The source a text means.
pub(super) fn find_source(snap: &Snapshot, text: &str) -> Result<Source, Unanswerable> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        let ip = ip.to_canonical();
        return Ok(match snap.find_known_by_ip(&snap.view().network, ip) {
            Some(known) => of_workload(known.workload(), Some(ip)),
            None => Source { workload: None, identity: None, address: SocketAddr::new(ip, CLIENT_PORT), notes: Vec::new() },
        });
    }
    let mut parts = text.split('/');
    let (Some(ns), Some(account), pod, None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(Unanswerable::Source(text.into()));
    };
    if ns.is_empty() || account.is_empty() || pod == Some("") {
        return Err(Unanswerable::Source(text.into()));
    }
    let of = |w: &&Arc<Workload>| *w.namespace == *ns && *w.service_account == *account && pod.is_none_or(|p| *w.name == *p);
    let mut found: Vec<&Arc<Workload>> = snap.workloads().filter(of).collect();
    // Those in the mesh first: of them the question is.
    found.sort_by_key(|w| (w.protocol != Protocol::Hbone, Arc::clone(&w.uid)));
    let Some(first) = found.first() else {
        let here = snap.workloads().filter(|w| *w.namespace == *ns).map(|w| format!("{ns}/{}/{}", w.service_account, w.name));
        return Err(Unanswerable::NoWorkload(text.into(), known("workloads", here)));
    };
    let mut source = of_workload(first, None);
    if found.len() > 1 {
        source.notes.push(format!("{} workloads have this service account; {} calls", found.len(), super::name_of(first)));
    }
    Ok(source)
}
fn of_workload(w: &Arc<Workload>, ip: Option<IpAddr>) -> Source {
    let ip = ip.or_else(|| w.ips.first().map(IpAddr::to_canonical)).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let mut notes = Vec::new();
    if w.network_mode == NetworkMode::HostNetwork {
        notes.push("the client is on the host's network: it has no address of its own".into());
    }
    Source {
        identity: (w.protocol == Protocol::Hbone).then(|| w.identity().ok()).flatten(),
        workload: Some(Arc::clone(w)),
        address: SocketAddr::new(ip, CLIENT_PORT),
        notes,
    }
}

/// What is called.
pub(super) struct Target {
    pub(super) service: Option<Arc<Service>>,
    /// The workload of the address, when it is a workload's own.
    pub(super) workload: Option<Arc<Known>>,
    /// By the service's virtual address: an endpoint is chosen on the way.
    pub(super) by_vip: bool,
    pub(super) address: SocketAddr,
    /// `host:port` for people.
    pub(super) name: String,
    /// The host as it was written, which a client sends.
    pub(super) host: String,
    pub(super) notes: Vec<String>,
}

/// The destination a text means to that source.
pub(super) fn find_target(snap: &Snapshot, source: &Source, text: &str) -> Result<Target, Unanswerable> {
    let none = || Unanswerable::Target(text.into());
    let (host, port) = text.rsplit_once(':').ok_or_else(none)?;
    let port: u16 = port.parse().ok().filter(|p| *p != 0).ok_or_else(none)?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(by_address(snap, source, ip.to_canonical(), port, host));
    }
    if host.is_empty() || host.contains(':') {
        return Err(none());
    }
    let namespaced = host.split_once('/');
    let service = match namespaced {
        Some((ns, name)) => by_name(snap, &format!("{name}.{ns}"), ns).or_else(|| in_namespace(snap, ns, name)),
        None => by_name(snap, host, source.namespace()),
    };
    if let Some(service) = service {
        return by_service(snap, source, &service, port, namespaced.map_or(host, |(_, name)| name));
    }
    let (ns, name) = namespaced.unwrap_or((source.namespace(), host));
    if let Some(w) = snap.workloads().find(|w| *w.namespace == *ns && *w.name == *name)
        && let Some(ip) = w.ips.first()
    {
        return Ok(by_address(snap, source, ip.to_canonical(), port, name));
    }
    let all = snap.services().filter(|s| ns.is_empty() || *s.key.namespace == *ns).map(|s| s.key.to_string());
    Err(Unanswerable::NoService(host.into(), known("services", all)))
}
/// As a resolver of the client's pod searches: the name itself, in its namespace, in the cluster.
fn by_name(snap: &Snapshot, host: &str, namespace: &str) -> Option<Arc<Service>> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let domain = &snap.view().cluster_domain;
    let searched =
        [host.clone(), format!("{host}.{namespace}.svc.{domain}"), format!("{host}.svc.{domain}"), format!("{host}.{domain}")];
    searched.iter().find_map(|name| snap.find_service_by_host(name, namespace)).cloned()
}
/// The service of an object's name, for hosts that are not derived from it (ServiceEntry).
fn in_namespace(snap: &Snapshot, namespace: &str, name: &str) -> Option<Arc<Service>> {
    snap.services().find(|s| *s.key.namespace == *namespace && (*s.name == *name || *s.key.hostname == *name)).cloned()
}

fn by_service(snap: &Snapshot, source: &Source, service: &Arc<Service>, port: u16, host: &str) -> Result<Target, Unanswerable> {
    let v4 = source.address.is_ipv4();
    let vips = || service.vips.iter().filter(|v| v.network == snap.view().network).map(|v| v.ip);
    let name = format!("{}:{port}", service.key.hostname);
    let make = |ip: IpAddr, port: u16, workload: Option<Arc<Known>>, notes| Target {
        service: Some(Arc::clone(service)),
        by_vip: workload.is_none(),
        workload,
        address: SocketAddr::new(ip, port),
        name: name.clone(),
        host: host.to_owned(),
        notes,
    };
    if let Some(ip) = vips().find(|ip| ip.is_ipv4() == v4).or_else(|| vips().next()) {
        return Ok(make(ip, port, None, Vec::new()));
    }
    // Headless: clients resolve the name to the endpoints themselves.
    let mut endpoints = snap.endpoint_set(&service.key).into_iter().flat_map(|set| set.open_on(port));
    let first = endpoints.find_map(|(_, e)| Some((e.workload().ips.first()?.to_canonical(), e)));
    let Some((ip, endpoint)) = first else { return Err(Unanswerable::NoAddress(name)) };
    let port = endpoint.target_port(service, port).unwrap_or(port);
    let note = format!(
        "the service has no virtual address: the client connects to an endpoint itself, here {}",
        super::name_of(endpoint.workload())
    );
    Ok(make(ip, port, Some(Arc::clone(endpoint.known())), vec![note]))
}
fn by_address(snap: &Snapshot, source: &Source, ip: IpAddr, port: u16, host: &str) -> Target {
    let network = &snap.view().network;
    let service = snap.find_service_by_vip(network, ip, source.namespace()).cloned();
    let workload = snap.find_known_by_ip(network, ip).cloned();
    let name = match (&service, &workload) {
        (Some(s), _) => s.key.hostname.to_string(),
        (None, Some(w)) => super::name_of(w.workload()),
        (None, None) => ip.to_string(),
    };
    Target {
        by_vip: service.is_some(),
        service,
        workload,
        address: SocketAddr::new(ip, port),
        name: format!("{name}:{port}"),
        host: host.to_owned(),
        notes: Vec::new(),
    }
}

/// What there is instead, a few of it.
fn known(what: &str, all: impl Iterator<Item = String>) -> String {
    let mut all: Vec<String> = all.collect();
    all.sort();
    all.dedup();
    let more = all.len().saturating_sub(8);
    all.truncate(8);
    match (all.is_empty(), more) {
        (true, _) => format!("; there are no {what} there"),
        (false, 0) => format!("; there are: {}", all.join(", ")),
        (false, more) => format!("; there are: {} and {more} more", all.join(", ")),
    }
}
