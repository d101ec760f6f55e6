//! Which selectors select an object, without asking each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::intern::Labels;

type HashMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
type Pair = (Arc<str>, Arc<str>);
type Owners = BTreeSet<Arc<str>>;

/// Selectors by owner name. Each is filed under one of its pairs; an object is only asked about selectors filed
/// under a pair it has. Empty selectors are not filed: callers treat them apart.
#[derive(Debug, Default)]
pub struct SelectorIndex {
    by_pair: HashMap<Arc<str>, HashMap<Arc<str>, Owners>>,
    selectors: BTreeMap<Arc<str>, (Labels, Pair)>,
}
impl SelectorIndex {
    /// Files or replaces a selector.
    pub fn insert(&mut self, owner: &Arc<str>, selector: &Labels) {
        self.remove(owner);
        // The least used pair, so that `tier=backend` on every service does not make the index useless.
        let size = |(k, v): &Pair| self.by_pair.get(k).and_then(|m| m.get(v)).map_or(0, BTreeSet::len);
        let Some(pair) = selector.iter().min_by_key(|p| size(p)).cloned() else { return };
        self.by_pair.entry(Arc::clone(&pair.0)).or_default().entry(Arc::clone(&pair.1)).or_default().insert(Arc::clone(owner));
        self.selectors.insert(Arc::clone(owner), (selector.clone(), pair));
    }
    /// Forgets a selector.
    pub fn remove(&mut self, owner: &str) {
        let Some((_, (k, v))) = self.selectors.remove(owner) else { return };
        if let Some(values) = self.by_pair.get_mut(&k) {
            if let Some(owners) = values.get_mut(&v) {
                owners.remove(owner);
                if owners.is_empty() {
                    values.remove(&v);
                }
            }
            if values.is_empty() {
                self.by_pair.remove(&k);
            }
        }
    }
    /// Owners of the selectors that select `labels`, sorted.
    pub fn selecting(&self, labels: &Labels) -> Vec<&Arc<str>> {
        let mut out = Vec::new();
        if self.selectors.is_empty() {
            return out;
        }
        for (k, v) in labels.iter() {
            for owner in self.by_pair.get(k).and_then(|m| m.get(v)).into_iter().flatten() {
                if self.selectors.get(owner).is_some_and(|(s, _)| s.select(labels)) {
                    out.push(owner);
                }
            }
        }
        out.sort();
        out
    }
}
