//! DestinationRules → how one service is reached: which count, and their policies merged by port and subset.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::l7::destination::{Destination, RetryBudget, Subset, TrafficPolicy};
use mesh_model::l7::session::Session;
use mesh_model::service::Service;

use super::super::gateway_api::{BackendTls, BackendTraffic};
use super::super::http_text::exported;
use super::super::layer7::{Join, Need, patterns};
use super::super::{Name, Slot};
use super::tls::TlsBlock;
use super::{Balancing, Blocks, DestinationRule, MeshTraffic, Policy, Pool, SubsetRule, tls};
use crate::diagnostics::Severity;

/// A service's rules: of one namespace and one host as written, oldest first.
type Rules<'a> = Vec<(&'a Name, &'a Slot<DestinationRule>)>;

fn rules<'a>(join: &Join<'a>, service: &Service) -> Rules<'a> {
    let root = &join.t.view.root_namespace;
    let default = &join.default_exports().destination_rules;
    let spaces = [Some(&service.key.namespace), Some(root).filter(|r| **r != service.key.namespace)];
    for namespace in spaces.into_iter().flatten() {
        for pattern in patterns(&service.key.hostname) {
            let mut found = join.destination_rules_of(namespace, &pattern);
            let seen = |of: &DestinationRule| exported(&of.exports, namespace, default, &service.key.namespace);
            found.retain(|(_, r)| !r.obj.for_workloads && seen(&r.obj));
            if !found.is_empty() {
                found.sort_by_key(|((_, name), r)| (r.obj.created.is_empty(), &r.obj.created, name));
                return found;
            }
        }
    }
    Vec::new()
}

/// Whether a subset of a service is there, or cannot be told because its rule could not be read.
pub(in super::super) fn has_subset(join: &mut Join<'_>, service: &Service, name: &str) -> bool {
    join.need(Need::Destination(service.key.clone()));
    rules(join, service).iter().any(|(_, r)| r.obj.broken.is_some() || r.obj.subsets.contains_key(name))
}

/// Blocks of a service or subset, by port where they differ.
#[derive(Clone, Default)]
struct Merged {
    blocks: Blocks,
    ports: BTreeMap<u16, Blocks>,
}
impl Merged {
    /// `policy` over `self`: block by block; a port's own settings replace the blocks a port may have as a whole. Another proxy is
    /// asked only where `policy` itself says so (as in Istio).
    fn over(&self, policy: Option<&Policy>) -> Self {
        let nothing = Policy::default();
        let policy = policy.unwrap_or(&nothing);
        let laid = |under: &Blocks| {
            let over = policy.blocks.clone();
            Blocks {
                balance: over.balance.or_else(|| under.balance.clone()),
                pool: over.pool.or_else(|| under.pool.clone()),
                outlier: over.outlier.or_else(|| under.outlier.clone()),
                tls: over.tls.or_else(|| under.tls.clone()),
                // The proxy in between is not who the header of those below is for.
                proxy_protocol: over.proxy_protocol.or(under.proxy_protocol.filter(|_| over.tunnel.is_none())),
                retry_budget: over.retry_budget.or(under.retry_budget),
                tunnel: over.tunnel,
            }
        };
        let mut out = Self { blocks: laid(&self.blocks), ports: self.ports.iter().map(|(p, b)| (*p, laid(b))).collect() };
        for (port, own) in &policy.ports {
            let under = out.ports.get(port).unwrap_or(&out.blocks);
            let replaced = Blocks {
                proxy_protocol: under.proxy_protocol,
                retry_budget: under.retry_budget,
                tunnel: under.tunnel.clone(),
                ..own.clone()
            };
            out.ports.insert(*port, replaced);
        }
        out
    }
    /// TLS of a BackendTLSPolicy, where nothing is said about it.
    fn with_tls(mut self, tls: &[BackendTls]) -> Self {
        for t in tls {
            let block = || Some(TlsBlock::Ready(Arc::clone(&t.tls)));
            match t.port {
                Some(port) => {
                    let at = self.ports.entry(port).or_insert_with(|| self.blocks.clone());
                    at.tls = at.tls.take().or_else(block);
                }
                None => {
                    for at in self.ports.values_mut().chain([&mut self.blocks]) {
                        at.tls = at.tls.take().or_else(block);
                    }
                }
            }
        }
        self
    }
    /// The retry budget of an XBackendTrafficPolicy, where nothing is said about it.
    fn with_budget(mut self, budget: Option<RetryBudget>) -> Self {
        for at in self.ports.values_mut().chain([&mut self.blocks]) {
            at.retry_budget = at.retry_budget.or(budget);
        }
        self
    }
    fn done(
        self,
        join: &mut Join<'_>,
        namespace: &str,
        session: Option<&Arc<Session>>,
    ) -> (Arc<TrafficPolicy>, BTreeMap<u16, Arc<TrafficPolicy>>) {
        let policy = Arc::new(done(join, self.blocks, namespace, session));
        let mut ports = BTreeMap::new();
        for (port, blocks) in self.ports {
            let own = done(join, blocks, namespace, session);
            ports.insert(port, if own == *policy { Arc::clone(&policy) } else { Arc::new(own) });
        }
        (policy, ports)
    }
}
/// Where nothing is said, what MeshConfig says.
fn done(join: &mut Join<'_>, blocks: Blocks, namespace: &str, session: Option<&Arc<Session>>) -> TrafficPolicy {
    let nothing = MeshTraffic::default();
    let mesh = join.mesh_traffic().unwrap_or(&nothing);
    let Balancing { balance, locality, warmup } = blocks.balance.unwrap_or_default();
    TrafficPolicy {
        balance,
        locality: locality.unwrap_or_else(|| mesh.locality()),
        warmup,
        pool: Pool::limits(blocks.pool.as_ref(), mesh),
        outlier: blocks.outlier.or_else(|| mesh.outlier.clone()),
        tls: blocks.tls.as_ref().and_then(|t| tls::resolve(join, t, namespace)),
        proxy_protocol: blocks.proxy_protocol,
        retry_budget: blocks.retry_budget,
        tunnel: blocks.tunnel,
        session: session.cloned(),
    }
}

/// What all rules of a service, and the policies of the Gateway API, say together.
pub(in super::super) fn build(
    join: &mut Join<'_>,
    service: &Arc<Service>,
    tls: &[BackendTls],
    traffic: &BackendTraffic,
) -> Option<Destination> {
    let rules = rules(join, service);
    if rules.is_empty() && tls.is_empty() && traffic.origins.is_empty() {
        return None;
    }
    // All rules are of one namespace; a Secret is looked for there.
    let namespace = rules.first().map_or_else(|| Arc::clone(&service.key.namespace), |((ns, _), _)| Arc::clone(ns));
    let mut out = Destination {
        key: service.key.clone(),
        policy: Arc::default(),
        ports: BTreeMap::new(),
        subsets: BTreeMap::new(),
        origins: rules
            .iter()
            .map(|(_, r)| &r.origin)
            .chain(tls.iter().map(|t| &t.origin))
            .chain(&traffic.origins)
            .cloned()
            .collect(),
        broken: rules.iter().find_map(|(_, r)| r.obj.broken.clone()),
    };
    let mut subsets: BTreeMap<&Arc<str>, (&SubsetRule, &Slot<DestinationRule>)> = BTreeMap::new();
    let mut policy: Option<(&Policy, &Slot<DestinationRule>)> = None;
    for (_, slot) in &rules {
        match (&slot.obj.policy, policy) {
            (Some(p), None) => policy = Some((p, slot)),
            (Some(_), Some((_, first))) => {
                let message = format!("the traffic policy of {} is older and counts", first.origin.object);
                join.complain(
                    Severity::Warning,
                    (&slot.origin, 0),
                    "spec.trafficPolicy",
                    message,
                    "merge the two",
                    "several-rules",
                );
            }
            (None, _) => {}
        }
        for (name, subset) in &slot.obj.subsets {
            if let Some((_, first)) = subsets.get(name) {
                let message = format!("the subset {name} of {} is older and counts", first.origin.object);
                join.complain(Severity::Warning, (&slot.origin, 0), "spec.subsets", message, "merge the two", "several-rules");
            } else {
                subsets.insert(name, (subset, slot));
            }
        }
    }
    let top = Merged::default().over(policy.map(|(p, _)| p));
    for (name, (subset, _)) in subsets {
        let merged = top.over(subset.policy.as_ref()).with_tls(tls).with_budget(traffic.budget);
        let (policy, ports) = merged.done(join, &namespace, traffic.session.as_ref());
        out.subsets.insert(Arc::clone(name), Subset { labels: subset.labels.clone(), policy, ports });
    }
    (out.policy, out.ports) = top.with_tls(tls).with_budget(traffic.budget).done(join, &namespace, traffic.session.as_ref());
    Some(out)
}

/// Complains about a host that is no service, or not this rule's to speak of.
pub(in super::super) fn check(join: &mut Join<'_>, name: &Name) {
    let Some(slot) = join.objects.destination_rules.get(name) else { return };
    let host = &slot.obj.host;
    if host.starts_with('*') || slot.obj.for_workloads {
        return;
    }
    join.need(Need::Host(Arc::clone(host)));
    let namespaces: Vec<&str> = join.t.hosts_out.get(host).into_iter().flatten().map(|ns| &**ns).collect();
    if namespaces.contains(&&*name.0) || (!namespaces.is_empty() && name.0 == join.t.view.root_namespace) {
        return;
    }
    let (message, fix) = if namespaces.is_empty() {
        (format!("no service of the mesh has the host {host}"), "correct the host, or add the Service or ServiceEntry")
    } else {
        (
            format!(
                "{host} is a service of {}; a waypoint uses the DestinationRules of that namespace, or of the root namespace",
                namespaces.join(", ")
            ),
            "move the DestinationRule there",
        )
    };
    join.complain(Severity::Warning, (&slot.origin, 0), "spec.host", message, fix, "no-service");
}
