//! Shared text: one copy of each name, label and label set, so that 100 000 pods stay small.

use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashSet;
use mesh_model::policy::PolicyKey;
use mesh_model::service::ServiceKey;
use mesh_model::workload::{PortMap, ServicePorts};

/// A sorted set of labels, or of the labels a selector asks for; equal sets share memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);
impl Default for Labels {
    fn default() -> Self {
        Self(Arc::from([]))
    }
}
impl Labels {
    /// The value of a label.
    pub fn get(&self, key: &str) -> Option<&Arc<str>> {
        self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok().and_then(|i| self.0.get(i)).map(|(_, v)| v)
    }
    /// No labels.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// The pairs, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = &(Arc<str>, Arc<str>)> {
        self.0.iter()
    }
    /// Whether, as a selector, this selects an object with `labels`. The empty selector selects everything; callers
    /// for which it selects nothing (Services) check first.
    pub fn select(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(k, v)| labels.get(k).is_some_and(|have| have == v))
    }
}

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
    pub fn labels(&mut self, mut pairs: Vec<(Arc<str>, Arc<str>)>) -> Labels {
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|b, a| {
            a.0 == b.0 && {
                a.1 = Arc::clone(&b.1);
                true
            }
        });
        if let Some(have) = self.labels.get(&Labels(pairs.as_slice().into())) {
            return have.clone();
        }
        let new = Labels(pairs.into());
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
        self.labels.retain(|l| Arc::strong_count(&l.0) > 1);
        self.named.retain(|p| Arc::strong_count(p) > 1);
        self.ports.retain(|p| Arc::strong_count(p) > 1);
        self.texts.retain(|t| Arc::strong_count(t) > 1);
        self.prune_at = self.texts.len() * 2;
    }
}
