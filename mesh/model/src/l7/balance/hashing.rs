//! Consistent hashing as Envoy does it: points and permutations from xxHash64 of `ip:port`, so that both proxies send a
//! request of one hash to the same endpoint.
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

const P1: u64 = 0x9e37_79b1_85eb_ca87;
const P2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const P3: u64 = 0x1656_67b1_9e37_79f9;
const P4: u64 = 0x85eb_ca77_c2b2_ae63;
const P5: u64 = 0x27d4_eb2f_1656_67c5;

fn round(acc: u64, lane: u64) -> u64 {
    acc.wrapping_add(lane.wrapping_mul(P2)).rotate_left(31).wrapping_mul(P1)
}
fn read8(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// xxHash64 (the specification at github.com/Cyan4973/xxHash).
pub fn xxh64(bytes: &[u8], seed: u64) -> u64 {
    let (stripes, mut rest) = bytes.as_chunks::<32>();
    let mut hash = if stripes.is_empty() {
        seed.wrapping_add(P5)
    } else {
        let mut acc = [seed.wrapping_add(P1).wrapping_add(P2), seed.wrapping_add(P2), seed, seed.wrapping_sub(P1)];
        for stripe in stripes {
            for (acc, lane) in acc.iter_mut().zip(stripe.chunks_exact(8)) {
                *acc = round(*acc, read8(lane));
            }
        }
        let [a, b, c, d] = acc;
        let mut hash =
            a.rotate_left(1).wrapping_add(b.rotate_left(7)).wrapping_add(c.rotate_left(12)).wrapping_add(d.rotate_left(18));
        for acc in acc {
            hash = (hash ^ round(0, acc)).wrapping_mul(P1).wrapping_add(P4);
        }
        hash
    };
    hash = hash.wrapping_add(bytes.len() as u64);
    while let Some((lane, after)) = rest.split_first_chunk::<8>() {
        hash = (hash ^ round(0, read8(lane))).rotate_left(27).wrapping_mul(P1).wrapping_add(P4);
        rest = after;
    }
    if let Some((lane, after)) = rest.split_first_chunk::<4>() {
        hash = (hash ^ read8(lane).wrapping_mul(P1)).rotate_left(23).wrapping_mul(P2).wrapping_add(P3);
        rest = after;
    }
    for byte in rest {
        hash = (hash ^ u64::from(*byte).wrapping_mul(P5)).rotate_left(11).wrapping_mul(P1);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(P2);
    hash = (hash ^ (hash >> 29)).wrapping_mul(P3);
    hash ^ (hash >> 32)
}
