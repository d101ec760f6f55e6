//! Shared text: one copy of each name, label and label set, so that 100 000 pods stay small.

use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashSet;
use mesh_model::policy::PolicyKey;
use mesh_model::service::ServiceKey;
use mesh_model::workload::{PortMap, ServicePorts};

pub use mesh_model::labels::Labels;

type NamedPorts = Arc<[(Arc<str>, u16)]>;

/// The pool of shared text.
#[derive(Debug, Default)]
pub struct Interner {
    texts: HashSet<Arc<str>, RandomState>,
    labels: HashSet<Labels, RandomState>,
    ports: HashSet<Arc<[(u16, u16)]>, RandomState>,
    services: HashSet<ServicePorts, RandomState>,
    policies: HashSet<Arc<[PolicyKey]>, RandomState>,
    pub(super) named: HashSet<NamedPorts, RandomState>,
    prune_at: usize,
}
impl Interner {
    /// The shared copy of `s`.
    pub fn text(&mut self, s: &str) -> Arc<str> {
        Arc::clone(self.texts.get_or_insert_with(s, |s| Arc::from(s)))
    }
    /// The shared copy of a label set; the last of equal keys wins (keys are unique in a parsed mapping).
    pub fn labels(&mut self, pairs: Vec<(Arc<str>, Arc<str>)>) -> Labels {
        let new = Labels::of(pairs);
        if let Some(have) = self.labels.get(&new) {
            return have.clone();
        }
        self.labels.insert(new.clone());
        new
    }
    /// The shared copy of a port map.
    pub fn ports(&mut self, mut pairs: Vec<(u16, u16)>) -> Arc<[(u16, u16)]> {
        pairs.sort_unstable();
        pairs.dedup();
        if let Some(have) = self.ports.get(pairs.as_slice()) {
            return Arc::clone(have);
        }
        let new: Arc<[(u16, u16)]> = pairs.into();
        self.ports.insert(Arc::clone(&new));
        new
    }
    /// The shared copy of the services a workload backs.
    pub fn services(&mut self, pairs: Vec<(ServiceKey, PortMap)>) -> ServicePorts {
        let new: ServicePorts = pairs.into_iter().collect();
        self.services.get_or_insert_with(&new, Clone::clone).clone()
    }
    /// The shared copy of the policies that bind a workload, in this order.
    pub fn policies(&mut self, keys: Vec<PolicyKey>) -> Arc<[PolicyKey]> {
        if let Some(have) = self.policies.get(keys.as_slice()) {
            return Arc::clone(have);
        }
        let new: Arc<[PolicyKey]> = keys.into();
        self.policies.insert(Arc::clone(&new));
        new
    }
    /// Drops what nobody else holds, once the pool has doubled since the last time.
    pub fn prune(&mut self) {
        if self.texts.len() < self.prune_at.max(10_000) {
            return;
        }
        self.services.retain(|s| !s.is_unshared());
        self.policies.retain(|p| Arc::strong_count(p) > 1);
        self.labels.retain(|l| !l.is_unshared());
        self.named.retain(|p| Arc::strong_count(p) > 1);
        self.ports.retain(|p| Arc::strong_count(p) > 1);
        self.texts.retain(|t| Arc::strong_count(t) > 1);
        self.prune_at = self.texts.len() * 2;
    }
}
