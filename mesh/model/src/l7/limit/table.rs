//! The buckets of all limits, or one shard of them: who has how much left.
//!
//! **A bucket is only forgotten once it is full**, when forgetting it changes nothing: no flood of new keys resets anybody's
//! bucket. When every place is taken by buckets that are not full, newcomers of a limit share one overflow bucket of the same
//! rate until places come free: stricter for them, nothing given away. Keys are 64-bit hashes: two that collide would share a
//! bucket. Not locked: the waypoint has one lock per shard.
use super::rate::{Rate, SECOND, Taken, Ticks};
use hashbrown::HashTable;

/// How long after a sweep the next may be made. A flood then costs one sweep in this time, not one per key.
const PAUSE: Ticks = SECOND;

/// The table.
#[derive(Debug, Default)]
pub struct Table {
    buckets: HashTable<Bucket>,
    /// Buckets held at most.
    most: usize,
    swept: Ticks,
}
#[derive(Clone, Copy, Debug)]
struct Bucket {
    key: u64,
    full_at: Ticks,
}

impl Table {
    /// Holds `most` buckets and, beyond, those that are always given a place.
    pub fn new(most: usize) -> Self {
        Self { buckets: HashTable::new(), most, swept: 0 }
    }
    /// Asks the bucket of `key` for a token; `None` when there is no place for one more bucket.
    pub fn take(&mut self, rate: Rate, key: u64, now: Ticks) -> Option<Taken> {
        if let Some(bucket) = self.buckets.find_mut(key, |b| b.key == key) {
            return Some(rate.take(&mut bucket.full_at, now));
        }
        if self.buckets.len() >= self.buckets.capacity().min(self.most) {
            self.sweep_if_due(now);
        }
        (self.buckets.len() < self.most).then(|| self.take_always(rate, key, now))
    }
    /// The same for a bucket that is always given a place: one of a few.
    pub fn take_always(&mut self, rate: Rate, key: u64, now: Ticks) -> Taken {
        let entry = self.buckets.entry(key, |b| b.key == key, |b| b.key);
        rate.take(&mut entry.or_insert(Bucket { key, full_at: 0 }).into_mut().full_at, now)
    }
    /// Forgets the buckets that are full, and gives their memory back when most of them were.
    pub fn sweep(&mut self, now: Ticks) {
        self.swept = now;
        self.buckets.retain(|b| b.full_at > now);
        if self.buckets.capacity() / 8 > self.buckets.len() {
            self.buckets.shrink_to(self.buckets.len() * 2, |b| b.key);
        }
    }
    fn sweep_if_due(&mut self, now: Ticks) {
        if now.saturating_sub(self.swept) >= PAUSE {
            self.sweep(now);
        }
    }
    /// Buckets held.
    pub fn len(&self) -> usize {
        self.buckets.len()
    }
    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }
    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.buckets.allocation_size()
    }
}

#[cfg(test)]
mod tests {
    use super::super::rate::moment;
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> Ticks {
        moment(Duration::from_secs(seconds))
    }
    fn ten() -> Rate {
        Rate::new(10, 10, Duration::from_mins(1)).expect("a rate")
    }
    /// Spreads small numbers as hashes are spread.
    fn hash(n: u64) -> u64 {
        n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
    }
    const OVERFLOW: u64 = 0x1234_5678_9abc_def0;

    fn allowed(table: &mut Table, key: u64, times: u32, now: Ticks) -> u32 {
        let take = |table: &mut Table| {
            let own = table.take(ten(), hash(key), now);
            own.unwrap_or_else(|| table.take_always(ten(), OVERFLOW, now))
        };
        (0..times).map(|_| u32::from(take(table).allowed)).sum()
    }

    #[test]
    fn each_key_has_its_own_bucket() {
        let mut table = Table::new(100);
        assert_eq!(allowed(&mut table, 1, 20, at(0)), 10);
        assert_eq!(allowed(&mut table, 2, 20, at(0)), 10);
        assert_eq!(allowed(&mut table, 1, 20, at(6)), 1);
    }
    #[test]
    fn a_flood_resets_nobody() {
        let mut table = Table::new(100);
        assert_eq!(allowed(&mut table, 1, 20, at(0)), 10);
        // A thousand others, over many sweeps, none of them full.
        for n in 0..1000 {
            allowed(&mut table, 1000 + n, 1, at(n / 200));
        }
        assert_eq!(allowed(&mut table, 1, 20, at(5)), 0, "forgotten before it was full");
        assert!(table.len() <= 101, "{}", table.len());
    }
    #[test]
    fn newcomers_without_a_place_share_one_bucket() {
        let mut table = Table::new(100);
        for n in 0..100 {
            assert_eq!(allowed(&mut table, n, 1, at(0)), 1);
        }
        let through: u32 = (200..300).map(|n| allowed(&mut table, n, 1, at(0))).sum();
        assert_eq!(through, 10, "a hundred newcomers have the bucket of one");
        assert_eq!(allowed(&mut table, 7, 20, at(0)), 9, "who has a place keeps what is left");
        // Full buckets make room: 6 s fill the one token that was taken.
        assert_eq!(allowed(&mut table, 500, 20, at(7)), 10);
    }
    #[test]
    fn full_buckets_are_forgotten_and_their_memory_given_back() {
        let mut table = Table::new(1 << 20);
        for n in 0..100_000 {
            allowed(&mut table, n, 1, at(0));
        }
        let then = table.bytes();
        table.sweep(at(5));
        assert_eq!(table.len(), 100_000, "not full yet");
        table.sweep(at(6));
        assert!(table.is_empty());
        assert!(table.bytes() < then / 8, "{} of {then}", table.bytes());
    }
    #[test]
    fn a_million_keys_fit() {
        let mut table = Table::new(1 << 20);
        for n in 0..1_000_000 {
            assert_eq!(allowed(&mut table, n, 1, at(0)), 1, "key {n}");
        }
        assert_eq!(table.len(), 1_000_000);
        assert!(table.bytes() <= 64 << 20, "{} MiB", table.bytes() >> 20);
    }
}
