//! Labels of objects, shared.
use std::sync::Arc;

/// A sorted set of labels, or of the labels a selector asks for; equal sets may share memory (the pool is the source's).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);
impl Default for Labels {
    fn default() -> Self {
        Self(Arc::from([]))
    }
}
impl Labels {
    /// From pairs; the last of equal keys counts.
    pub fn of(mut pairs: Vec<(Arc<str>, Arc<str>)>) -> Self {
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                std::mem::swap(later, kept);
            }
            same
        });
        Self(pairs.into())
    }
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
    /// Whether nobody else holds this set: a pool of shared sets may forget it.
    pub fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}
