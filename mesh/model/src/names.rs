//! Names: which of a pod's DNS questions the mesh answers, and with which addresses (node-agent §1.11).
//!
//! Owns the order in which a name is looked for. Refuses nothing: what the mesh does not know is somebody else's to answer.
//! Upstream: snapshots. Downstream: the agent's DNS proxy.
use crate::service::{IpFamilies, Service, ServiceKey};
use crate::snapshot::Snapshot;
use crate::workload::Workload;
use std::net::IpAddr;
use std::sync::Arc;

/// Most addresses told of one headless service.
const MOST_ADDRESSES: usize = 256;

/// A name the mesh knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// What it stands for.
    pub service: &'a Arc<Service>,
    /// The name it was found under, where a search domain had to be taken off first: the answer is an alias of it.
    pub alias_of: Option<&'a str>,
}

/// Looks for `name` (lower case, without the final dot) as `client` sees it. In this order: the very name; the name behind each of
/// the suffixes of Kubernetes (`web`, `web.shop` and `web.shop.svc` mean a service); the name without one of the `search` domains
/// the client's resolver puts behind what applications ask for; then wildcard hosts (`*.example.com`), the longest first.
///
/// `None`: the mesh has no addresses for it, name servers do. So it is with a service without a virtual address that is not a
/// Kubernetes service, such as an external host that is resolved by name.
pub fn find_name<'a>(snap: &'a Snapshot, client: &Workload, search: &[Box<str>], name: &'a str) -> Option<Found<'a>> {
    find(snap, client, search, name).filter(|found| {
        let service = found.service;
        !service.vips.is_empty() || is_kubernetes(snap, &service.key.hostname)
    })
}

fn find<'a>(snap: &'a Snapshot, client: &Workload, search: &[Box<str>], name: &'a str) -> Option<Found<'a>> {
    let by_host = |host: &str| snap.find_service_by_host(host, &client.namespace);
    if let Some(service) = by_host(name).or_else(|| by_short_name(snap, client, name)) {
        return Some(Found { service, alias_of: None });
    }
    let stripped =
        || search.iter().filter_map(|domain| name.strip_suffix(&**domain)?.strip_suffix('.')).filter(|s| !s.is_empty());
    let exact = stripped().find_map(|short| Some(Found { service: by_host(short)?, alias_of: Some(short) }));
    exact.or_else(|| Some(Found { service: by_wildcard(snap, client, name)?, alias_of: None })).or_else(|| {
        stripped().find_map(|short| Some(Found { service: by_wildcard(snap, client, short)?, alias_of: Some(short) }))
    })
}

/// Services that `name` may stand for and that are not known: what to ask for where the mesh is told on demand. A host of no
/// Kubernetes service, and a wildcard it is under, are looked for in the client's namespace and in the preferred one.
pub fn unknown(snap: &Snapshot, client: &Workload, search: &[Box<str>], name: &str) -> Vec<ServiceKey> {
    let view = snap.view();
    let mut keys = Vec::new();
    let stripped = search.iter().filter_map(|domain| name.strip_suffix(&**domain)?.strip_suffix('.'));
    let kubernetes = |service: &str, namespace: &str| {
        ServiceKey::new(namespace, &format!("{service}.{namespace}.svc.{}", view.cluster_domain))
    };
    for name in std::iter::once(name).chain(stripped.filter(|short| !short.is_empty())) {
        let full = name.strip_suffix(&*view.cluster_domain).and_then(|rest| rest.strip_suffix(".svc."));
        let short = full.or_else(|| name.strip_suffix(".svc")).unwrap_or(name);
        let mut labels = short.split('.');
        match (labels.next(), labels.next(), labels.next()) {
            (Some(service), Some(namespace), None) => {
                keys.push(kubernetes(service, namespace));
                if short != name {
                    // It can be nothing else.
                    break;
                }
            }
            (Some(service), None, _) if short == name => keys.push(kubernetes(service, &client.namespace)),
            _ => {}
        }
        if short == name {
            let parents = name.match_indices('.').filter_map(|(dot, _)| name.get(dot..)).map(|parent| format!("*{parent}"));
            for host in std::iter::once(name.to_owned()).chain(parents) {
                keys.extend([&client.namespace, &view.preferred_namespace].map(|namespace| ServiceKey::new(namespace, &host)));
            }
        }
    }
    keys.retain(|key| !key.namespace.is_empty() && snap.find_service(key).is_none());
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// The addresses of one family of a service that was found, rotated by `draw`: its virtual addresses on the client's network, or
/// its endpoints if it has none at all.
pub fn addresses_of(snap: &Snapshot, client: &Workload, service: &Service, v6: bool, draw: u64) -> Vec<IpAddr> {
    let wanted = |ip: &IpAddr| ip.is_ipv6() == v6;
    let allowed = match service.ip_families {
        IpFamilies::V4 => !v6,
        IpFamilies::V6 => v6,
        IpFamilies::Automatic | IpFamilies::Dual => true,
    };
    if !allowed {
        return Vec::new();
    }
    let mut found: Vec<IpAddr> = if service.vips.is_empty() {
        snap.endpoints(&service.key)
            .filter(|w| w.network == client.network)
            .filter_map(|w| w.ips.iter().copied().find(wanted))
            .take(MOST_ADDRESSES)
            .collect()
    } else {
        service.vips.iter().filter(|vip| vip.network == client.network).map(|vip| vip.ip).filter(wanted).collect()
    };
    found.sort_unstable();
    found.dedup();
    if let Some(turn) = (draw as usize).checked_rem(found.len()) {
        found.rotate_left(turn);
    }
    found
}

/// `*.svc.<domain>`.
fn is_kubernetes(snap: &Snapshot, host: &str) -> bool {
    host.strip_suffix(&*snap.view().cluster_domain).is_some_and(|rest| rest.ends_with(".svc."))
}

fn by_short_name<'a>(snap: &'a Snapshot, client: &Workload, name: &str) -> Option<&'a Arc<Service>> {
    let domain = &snap.view().cluster_domain;
    match name.split('.').count() {
        1 => snap.find_service_by_host(&format!("{name}.{}.svc.{domain}", client.namespace), &client.namespace),
        2 => snap.find_service_by_host(&format!("{name}.svc.{domain}"), &client.namespace),
        3 if name.rsplit('.').next() == Some("svc") => snap.find_service_by_host(&format!("{name}.{domain}"), &client.namespace),
        _ => None,
    }
}

fn by_wildcard<'a>(snap: &'a Snapshot, client: &Workload, name: &str) -> Option<&'a Arc<Service>> {
    let mut rest = name;
    while let Some((_, parent)) = rest.split_once('.') {
        if let Some(service) = snap.find_service_by_host(&format!("*.{parent}"), &client.namespace) {
            return Some(service);
        }
        rest = parent;
    }
    None
}

#[cfg(test)]
mod tests;
