//! Consistent hashing as Envoy does it: points and permutations from xxHash64 of `ip:port`, so that both proxies send a
//! request of one hash to the same endpoint.
use crate::l7::hash::xxh64;
use std::fmt::Write as _;

/// Largest ring (Envoy's default maximum).
const MAX_RING: u64 = 8 << 20;

/// A ring of points; a host that leaves moves only the requests that were its own.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    points: Vec<(u64, u32)>,
}
impl Ring {
    /// A ring of at least `min_size` points for hosts `(host, key, weight)`, each with points by weight.
    pub fn new<'a>(hosts: impl Iterator<Item = (u32, &'a str, u32)> + Clone, min_size: u32) -> Self {
        let total: f64 = hosts.clone().map(|(_, _, w)| f64::from(w)).sum();
        let Some(lightest) = hosts.clone().map(|(_, _, w)| f64::from(w) / total).reduce(f64::min) else {
            return Self::default();
        };
        // The lightest host gets a whole number of points.
        let scale = ((lightest * f64::from(min_size)).ceil() / lightest).min(MAX_RING as f64);
        let mut points = Vec::with_capacity(scale.ceil() as usize);
        let (mut have, mut target) = (0.0_f64, 0.0_f64);
        let mut text = String::new();
        for (host, key, weight) in hosts {
            text.clear();
            text.push_str(key);
            text.push('_');
            let prefix = text.len();
            target += scale * f64::from(weight) / total;
            let mut n = 0_u64;
            while have < target {
                text.truncate(prefix);
                // Writing to a String does not fail.
                let _ = write!(text, "{n}");
                points.push((xxh64(text.as_bytes(), 0), host));
                n += 1;
                have += 1.0;
            }
        }
        points.sort_unstable();
        Self { points }
    }
    /// The host of the first point at or after the hash, round the ring.
    pub fn find(&self, hash: u64) -> Option<usize> {
        let at = self.points.partition_point(|(point, _)| *point < hash);
        self.points.get(at).or(self.points.first()).map(|(_, host)| *host as usize)
    }
    /// Points.
    pub fn len(&self) -> usize {
        self.points.len()
    }
    /// Whether it has no points.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }
}

/// A Maglev table: even shares, few requests moved when a host leaves.
#[derive(Clone, Debug, Default)]
pub struct Maglev {
    slots: Vec<u32>,
}
impl Maglev {
    /// A table of `size` slots (a prime) for hosts `(host, key, weight)`.
    pub fn new<'a>(hosts: impl Iterator<Item = (u32, &'a str, u32)>, size: u32) -> Self {
        struct Row {
            host: u32,
            offset: u64,
            skip: u64,
            weight: f64,
            target: f64,
            next: u64,
        }
        let size = u64::from(size.max(2));
        let mut hosts: Vec<(u32, &str, u32)> = hosts.collect();
        hosts.sort_by(|a, b| a.1.cmp(b.1));
        let total: f64 = hosts.iter().map(|(_, _, w)| f64::from(*w)).sum();
        let mut heaviest = 0.0_f64;
        let mut rows: Vec<Row> = hosts
            .iter()
            .map(|(host, key, weight)| {
                let weight = f64::from(*weight) / total;
                heaviest = heaviest.max(weight);
                let (offset, skip) = (xxh64(key.as_bytes(), 0) % size, xxh64(key.as_bytes(), 1) % (size - 1) + 1);
                Row { host: *host, offset, skip, weight, target: 0.0, next: 0 }
            })
            .collect();
        if rows.is_empty() {
            return Self::default();
        }
        const FREE: u32 = u32::MAX;
        let mut slots = vec![FREE; size as usize];
        let mut filled = 0;
        let mut round = 1.0_f64;
        'full: loop {
            for row in &mut rows {
                // The heaviest host takes a slot in every round, one of half its weight in every second.
                if round * row.weight < row.target {
                    continue;
                }
                row.target += heaviest;
                // The size is a prime and the table has a free slot: the permutation reaches it.
                for _ in 0..size {
                    let at = (row.offset + row.skip * row.next) % size;
                    row.next += 1;
                    if let Some(slot) = slots.get_mut(at as usize)
                        && *slot == FREE
                    {
                        *slot = row.host;
                        break;
                    }
                }
                filled += 1;
                if filled == size {
                    break 'full;
                }
            }
            round += 1.0;
        }
        // A size that is no prime can leave holes.
        let first = rows.first().map_or(0, |row| row.host);
        for slot in &mut slots {
            if *slot == FREE {
                *slot = first;
            }
        }
        Self { slots }
    }
    /// The host of a hash.
    pub fn find(&self, hash: u64) -> Option<usize> {
        let at = hash.checked_rem(self.slots.len() as u64)?;
        self.slots.get(at as usize).map(|host| *host as usize)
    }
}
