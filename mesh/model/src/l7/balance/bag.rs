//! Weighted hosts: drawn, compared two at a time, or taken in turn.
use crate::lb::{below, redraw};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Longest turn that is written out; beyond it weights are rounded to fit.
const MAX_CYCLE: u64 = 4096;

/// Hosts with weights.
#[derive(Clone, Debug, Default)]
pub struct Bag {
    hosts: Vec<u32>,
    weights: Vec<u32>,
    /// Weight up to and including each host; empty when all weigh the same.
    ends: Vec<u64>,
    /// Order of turns when weights differ.
    cycle: Vec<u32>,
}

impl Bag {
    /// A bag of `(host, weight)`; weights are not 0. `turns`: it will be asked for turns.
    pub fn new(hosts: impl Iterator<Item = (u32, u32)>, turns: bool) -> Self {
        let (hosts, weights): (Vec<u32>, Vec<u32>) = hosts.unzip();
        let first = weights.first().copied().unwrap_or(1);
        if weights.iter().all(|w| *w == first) {
            return Self { hosts, weights, ends: Vec::new(), cycle: Vec::new() };
        }
        let mut end = 0_u64;
        let ends = weights.iter().map(|w| {
            end += u64::from(*w);
            end
        });
        let ends = ends.collect();
        let cycle = if turns { cycle(&hosts, &weights) } else { Vec::new() };
        Self { hosts, weights, ends, cycle }
    }

    fn draw_at(&self, draw: u64) -> Option<usize> {
        if self.ends.is_empty() {
            return (!self.hosts.is_empty()).then(|| below(draw, self.hosts.len() as u64) as usize);
        }
        let at = below(draw, self.ends.last().copied()?);
        Some(self.ends.partition_point(|end| *end <= at))
    }

    fn host(&self, at: usize) -> Option<usize> {
        self.hosts.get(at).map(|h| *h as usize)
    }

    /// A host, by weight.
    pub fn draw(&self, draw: u64) -> Option<usize> {
        self.host(self.draw_at(draw)?)
    }

    /// The less loaded of two drawn hosts, the first when they are alike. With different weights it is the load per unit
    /// of weight that counts: idle hosts are then drawn by weight, as Envoy's weighted least request does in the long run.
    pub fn least(&self, draw: u64, load: impl Fn(usize) -> u64) -> Option<usize> {
        let (a, b) = (self.draw_at(redraw(draw, 1))?, self.draw_at(redraw(draw, 2))?);
        let (first, second) = (self.host(a)?, self.host(b)?);
        if a == b {
            return Some(first);
        }
        let weight = |at: usize| u128::from(self.weights.get(at).copied().unwrap_or(1));
        let (of_first, of_second) = (u128::from(load(first)) * weight(b), u128::from(load(second)) * weight(a));
        Some(if of_second < of_first { second } else { first })
    }

    /// All hosts, each once, from a drawn one on.
    pub fn from(&self, draw: u64) -> impl Iterator<Item = usize> {
        let at = below(draw, self.hosts.len() as u64) as usize;
        let (before, after) = self.hosts.split_at_checked(at).unwrap_or_default();
        after.iter().chain(before).map(|host| *host as usize)
    }

    /// The host whose turn it is.
    pub fn turn(&self, turn: u64) -> Option<usize> {
        let order = if self.cycle.is_empty() { &self.hosts } else { &self.cycle };
        let at = turn.checked_rem(order.len() as u64)?;
        order.get(at as usize).map(|h| *h as usize)
    }
}

/// One full round in which each host comes as often as it weighs, evenly spread (earliest deadline first).
fn cycle(hosts: &[u32], weights: &[u32]) -> Vec<u32> {
    let divisor = weights.iter().fold(0, |d, w| gcd(d, *w)).max(1);
    let total: u64 = weights.iter().map(|w| u64::from(w / divisor)).sum();
    let longest = MAX_CYCLE.max(hosts.len() as u64);
    let scaled = weights.iter().map(|w| {
        let w = u64::from(w / divisor);
        if total <= longest { w } else { (w * longest / total).max(1) }
    });
    let scaled: Vec<u64> = scaled.collect();
    let length: u64 = scaled.iter().sum();
    // Deadline of the n-th turn of a host of weight w: n / w; kept as a fraction of a common unit.
    const UNIT: u64 = 1 << 32;
    let mut queue: BinaryHeap<Reverse<(u64, usize, u64)>> =
        scaled.iter().enumerate().map(|(at, w)| Reverse((UNIT / (2 * w.max(&1)), at, 1))).collect();
    let mut out = Vec::with_capacity(length as usize);
    for _ in 0..length {
        let Some(Reverse((_, at, turn))) = queue.pop() else { break };
        if let Some(host) = hosts.get(at) {
            out.push(*host);
        }
        let weight = scaled.get(at).copied().unwrap_or(1).max(1);
        if turn < weight {
            queue.push(Reverse(((2 * turn + 1) * UNIT / (2 * weight), at, turn + 1)));
        }
    }
    out
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}
