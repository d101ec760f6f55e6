//! Handles of series that were used lately, one set per data thread, so that telling about a request costs a look into a
//! small table and a few atomic additions instead of hashing two dozen label values for each family.
//!
//! Bounded: a client cannot make it grow. What was not used for a while is let go, so that series of what is gone expire.
use super::Flags;
use super::metrics::RequestHandles;
use foldhash::fast::FixedState;
use hashbrown::{HashMap, HashTable};
use mesh_model::SpiffeId;
use mesh_model::metric_labels::Ends;
use mesh_model::policy::PolicyKey;
use mesh_model::service::Service;
use mesh_model::telemetry::Telemetry;
use mesh_model::workload::Workload;
use mesh_runtime::metrics::Counter;
use std::hash::{BuildHasher as _, Hash, Hasher as _};
use std::sync::Arc;

/// Most entries of one thread, at about 200 bytes each.
pub(super) const MOST: usize = 4096;

/// What the labels of a request are made of. Workloads and services count by their address: an entry holds on to them, so
/// that an address means one thing as long as the entry is there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key<'a> {
    pub ends: Ends<'a>,
    pub answer: AnswerKey,
    /// By what the mesh changes the metrics, where it does: what is told.
    pub told: Option<&'a Arc<Telemetry>>,
    /// Values of its tags.
    pub tags: &'a [Box<str>],
}
/// How it was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AnswerKey {
    pub status: u16,
    pub flags: Flags,
    pub grpc: bool,
    pub grpc_status: Option<u16>,
    /// The destination was reached through a tunnel, and so proved an identity: its workload's.
    pub hbone: bool,
}

#[derive(Debug)]
struct Entry {
    reporter: &'static str,
    source: Option<Arc<Workload>>,
    source_id: Option<SpiffeId>,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    answer: AnswerKey,
    told: Option<Arc<Telemetry>>,
    tags: Box<[Box<str>]>,
    hash: u64,
    handles: RequestHandles,
    /// Round of tidying in which it was last used.
    used: u32,
}

fn at<T>(shared: Option<&Arc<T>>) -> usize {
    shared.map_or(0, |s| Arc::as_ptr(s).addr())
}

impl Key<'_> {
    fn hash(&self) -> u64 {
        let Ends { source, source_id, destination, service, .. } = self.ends;
        let mut hasher = FixedState::default().build_hasher();
        (at(source), at(destination), at(service), self.answer, at(self.told), self.tags).hash(&mut hasher);
        // Those of one workload have one identity, but for rare exceptions, which equality tells apart.
        if source.is_none() {
            source_id.map(SpiffeId::as_str).hash(&mut hasher);
        }
        hasher.finish()
    }
}
impl Entry {
    fn is(&self, key: &Key<'_>) -> bool {
        let ends = &key.ends;
        at(self.source.as_ref()) == at(ends.source)
            && at(self.destination.as_ref()) == at(ends.destination)
            && at(self.service.as_ref()) == at(ends.service)
            && self.answer == key.answer
            && self.reporter == ends.reporter
            && at(self.told.as_ref()) == at(key.told)
            && *self.tags == *key.tags
            && self.source_id.as_ref() == ends.source_id
    }
}

/// What is counted of policies that enforce nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum PolicyCount {
    /// The policy, and what it would have done.
    Shadow(Option<PolicyKey>, &'static str),
    /// An action, and what its dry runs together say.
    DryRun(&'static str, &'static str),
}

/// The table of one thread.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// Whose handles these are; in tests there is more than one in a process.
    owner: u64,
    round: u32,
    table: HashTable<Entry>,
    /// As many as there are policies, and let go of at once.
    policies: HashMap<PolicyCount, Arc<Counter>, FixedState>,
}
impl Cache {
    fn belong_to(&mut self, owner: u64) {
        if self.owner != owner {
            self.table.clear();
            self.policies.clear();
            self.owner = owner;
        }
    }
    /// The counter for a key, looked up by `find` when it is not here.
    pub fn policy(&mut self, owner: u64, key: PolicyCount, find: impl FnOnce(&PolicyCount) -> Arc<Counter>) -> &Counter {
        self.belong_to(owner);
        self.policies.entry(key).or_insert_with_key(find)
    }
    /// The handles for a key, looked up by `find` when they are not here. `owner` tells one set of metrics from another.
    pub fn get(&mut self, owner: u64, key: &Key<'_>, find: impl FnOnce() -> RequestHandles) -> &RequestHandles {
        self.belong_to(owner);
        let hash = key.hash();
        if self.table.len() >= MOST && self.table.find(hash, |e| e.is(key)).is_none() {
            self.shrink();
        }
        let round = self.round;
        let entry = self
            .table
            .entry(hash, |e| e.is(key), |e| e.hash)
            .or_insert_with(|| Entry {
                reporter: key.ends.reporter,
                source: key.ends.source.cloned(),
                source_id: key.ends.source_id.cloned(),
                destination: key.ends.destination.cloned(),
                service: key.ends.service.cloned(),
                answer: key.answer,
                told: key.told.cloned(),
                tags: key.tags.into(),
                hash,
                handles: find(),
                used: round,
            })
            .into_mut();
        entry.used = round;
        &entry.handles
    }
    /// Makes room: whatever was not used since the last tidying, and if that is too little, all of it. Looking everything up
    /// again now and then is cheaper than keeping order on every request.
    fn shrink(&mut self) {
        let round = self.round;
        self.table.retain(|e| e.used == round);
        if self.table.len() > MOST / 2 {
            self.table.clear();
        }
        self.round = round.wrapping_add(1);
    }
    /// Lets go of what was not used since the last call.
    pub fn tidy(&mut self) {
        self.policies.clear();
        let round = self.round;
        self.table.retain(|e| e.used == round);
        self.table.shrink_to(2 * self.table.len(), |e| e.hash);
        self.round = round.wrapping_add(1);
    }
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.table.len()
    }
}
