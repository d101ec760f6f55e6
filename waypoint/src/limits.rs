//! The buckets of all rate limits of this process, shared by its data threads.
//!
//! Owns the locks, the clock and the secret of the keys' hash; the rest is `mesh_model::l7::limit`. Nothing here belongs to a
//! version of the mesh: a bucket lives on through every change that is not of its own limit. Upstream: `phase::limit`.
use mesh_model::l7::RequestFacts;
use mesh_model::l7::limit::rate::moment;
use mesh_model::l7::limit::table::Table;
use mesh_model::l7::limit::{Limit, Taken};
use parking_lot::Mutex;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::net::IpAddr;
use std::time::Instant;

/// Locks. Far more than data threads, so that two rarely meet.
const SHARDS: usize = 64;
/// Buckets per shard: what a table of 32 768 places holds before it grows. In all 1.8 million, in 34 MiB.
const MOST: usize = 28_672;

/// See the module.
pub struct Limits {
    /// SipHash with a key of this process: nobody outside can choose two keys that share a bucket.
    seed: RandomState,
    started: Instant,
    shards: Box<[Mutex<Table>]>,
}
impl Default for Limits {
    fn default() -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::new(Table::new(MOST))).collect();
        Self { seed: RandomState::new(), started: Instant::now(), shards }
    }
}
impl Limits {
    /// Asks the bucket of this request for a token. Newcomers for whom there is no place share one.
    pub(crate) fn take(&self, limit: &Limit, facts: &RequestFacts<'_>, client: IpAddr) -> Taken {
        let mut hasher = self.seed.build_hasher();
        limit.hash_key(facts, client, &mut hasher);
        let rate = limit.counts.rate;
        // The clock is read under the lock: of one bucket, time only goes forward.
        let own = self.shard(hasher.finish(), |table, key| table.take(rate, key, moment(self.started.elapsed())));
        own.unwrap_or_else(|| {
            let mut hasher = self.seed.build_hasher();
            limit.hash_overflow(&mut hasher);
            self.shard(hasher.finish(), |table, key| table.take_always(rate, key, moment(self.started.elapsed())))
        })
    }
    fn shard<T>(&self, key: u64, ask: impl FnOnce(&mut Table, u64) -> T) -> T {
        // Bits in the middle: a table uses those at both ends.
        let at = (key >> 32) as usize % self.shards.len();
        // Proof: a remainder by the length is an index.
        #[expect(clippy::indexing_slicing, reason = "see above")]
        ask(&mut self.shards[at].lock(), key)
    }
    /// Forgets the buckets that are full, and gives memory back after a flood.
    pub(crate) fn sweep(&self) {
        let now = moment(self.started.elapsed());
        for shard in &self.shards {
            shard.lock().sweep(now);
        }
    }
}

#[cfg(test)]
mod tests;
