//! Which endpoint of a destination gets the next request. Pure: health, load, draws and turns are passed in.
//!
//! A [`Plan`] is made when endpoints, their health or the policy change; a pick only looks things up in it. Facts are
//! Envoy's (load balancer sources, spec/waypoint §3.3): priorities with an overprovisioning factor of 1.4, panic, two
//! choices, ring and Maglev hashing over xxHash64 of `ip:port`. Refuses to know what an endpoint is: hosts are positions
//! in the slice the plan was made from. Upstream: the waypoint's clusters. [`locality`] gives priorities and shares.
use crate::l7::destination::{Balance, HashAlgorithm, Warmup};
use crate::lb::{below, redraw};
use std::time::Duration;

mod bag;
mod hashing;
pub mod locality;

pub use bag::Bag;
pub use hashing::{Maglev, Ring};

/// Draws a pick may take to get away from hosts that were tried before (Istio's `host_selection_retry_max_attempts`).
pub const MAX_REDRAWS: u64 = 5;
/// Envoy's overprovisioning factor, percent.
const OVERPROVISION: u64 = 140;

/// A host as balancing sees it.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Weight; 0 counts as 1.
    pub weight: u32,
    /// Priority, 0 is preferred; made dense by the plan.
    pub priority: u32,
    /// Position in the shares of localities; ignored when there are none.
    pub share: u32,
    /// Not ejected.
    pub healthy: bool,
    /// What consistent hashing places it by: `ip:port`.
    pub key: &'a str,
}

/// Everything a pick needs, worked out beforehand.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    priorities: Vec<Priority>,
    kind: Kind,
}
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Least,
    Turn,
    Random,
    Hash,
}
#[derive(Clone, Debug)]
struct Priority {
    /// As its hosts have it.
    level: u32,
    /// Percent of its hosts that are healthy, times 1.4 and 100 at most.
    health: u64,
    /// Percent of the traffic that goes to this priority or one before it.
    end: u64,
    groups: Vec<Group>,
    /// Effective share up to and including each group.
    ends: Vec<u64>,
}
#[derive(Clone, Debug)]
struct Group {
    bag: Bag,
    table: Table,
}
#[derive(Clone, Debug)]
enum Table {
    None,
    Ring(Ring),
    Maglev(Maglev),
}

/// What one pick is decided by.
#[derive(Clone, Copy, Debug)]
pub struct Chance {
    /// A uniform draw.
    pub draw: u64,
    /// Hash of the request, for consistent hashing; without one a host is drawn.
    pub hash: Option<u64>,
    /// How many picks came before, for round robin.
    pub turn: u64,
}

impl Plan {
    /// The plan for these hosts. `shares` are the weights of localities (`distribute`); empty: localities do not matter.
    /// Below `panic_percent` of healthy hosts health is ignored; 0: never.
    pub fn new(balance: &Balance, hosts: &[Entry<'_>], shares: &[u32], panic_percent: u32) -> Self {
        let kind = match balance {
            Balance::LeastRequest => Kind::Least,
            Balance::RoundRobin => Kind::Turn,
            Balance::Random | Balance::Passthrough => Kind::Random,
            Balance::Hash { .. } => Kind::Hash,
        };
        let mut levels: Vec<u32> = hosts.iter().map(|h| h.priority).collect();
        levels.sort_unstable();
        levels.dedup();
        let counts: Vec<(u64, u64)> = levels
            .iter()
            .map(|level| {
                let of_level = || hosts.iter().filter(|h| h.priority == *level);
                (of_level().filter(|h| h.healthy).count() as u64, of_level().count() as u64)
            })
            .collect();
        let loads = loads(&counts, panic_percent);
        let mut end = 0;
        let mut priorities = Vec::with_capacity(levels.len());
        for ((level, load), (healthy, all)) in levels.iter().zip(loads).zip(counts) {
            end += load.percent;
            let health = availability(healthy, all);
            // One without traffic may be asked for by retries, which consistent hashing does not draw again.
            if load.percent == 0 && (health == 0 || kind == Kind::Hash) {
                continue;
            }
            let of_level = |share: Option<u32>| {
                let chosen =
                    move |h: &Entry<'_>| h.priority == *level && share.is_none_or(|s| s == h.share) && (load.panic || h.healthy);
                hosts.iter().enumerate().filter(move |(_, h)| chosen(h))
            };
            let mut groups = Vec::new();
            let mut ends = Vec::new();
            let mut total = 0_u64;
            if shares.is_empty() {
                groups.push(Group::new(balance, of_level(None)));
                total = 1;
                ends.push(total);
            }
            for (share, weight) in shares.iter().enumerate() {
                let share = share as u32;
                let all = hosts.iter().filter(|h| h.priority == *level && h.share == share).count() as u64;
                let usable = of_level(Some(share)).count() as u64;
                if usable == 0 || *weight == 0 {
                    continue;
                }
                // A locality keeps its share until more than a third of its hosts are gone (the factor 1.4).
                let available = (OVERPROVISION * usable / all.max(1)).min(100);
                total += u64::from(*weight) * available;
                groups.push(Group::new(balance, of_level(Some(share))));
                ends.push(total);
            }
            priorities.push(Priority { level: *level, health, end, groups, ends });
        }
        Self { priorities, kind }
    }

    /// The host for one request, among all that are usable.
    pub fn pick(&self, chance: Chance, load: impl Fn(usize) -> u64) -> Option<usize> {
        self.group(chance, &[])?.pick(self.kind, chance, load)
    }

    /// Whether a priority with healthy hosts is left without these.
    pub fn is_some_left(&self, left_out: &[u32]) -> bool {
        self.priorities.iter().any(|p| p.health > 0 && !left_out.contains(&p.level))
    }

    /// The priority and locality one request falls to. Without priorities that are left out their traffic falls to the others
    /// by their health (Envoy's `previous_priorities`); where none of those has a healthy host nothing is left out.
    fn group(&self, chance: Chance, left_out: &[u32]) -> Option<&Group> {
        // By hash also the priority and the locality are the same for the same request.
        let draw = match (self.kind, chance.hash) {
            (Kind::Hash, Some(hash)) => redraw(hash, 1),
            _ => redraw(chance.draw, 1),
        };
        let at = below(draw, 100);
        let priority = if left_out.is_empty() || !self.is_some_left(left_out) {
            self.priorities.iter().find(|p| at < p.end).or(self.priorities.last())?
        } else {
            self.among_others(at, left_out)?
        };
        let at = below(redraw(draw, 2), priority.ends.last().copied()?);
        priority.groups.get(priority.ends.partition_point(|end| *end <= at))
    }

    fn among_others(&self, at: u64, left_out: &[u32]) -> Option<&Priority> {
        let others = || self.priorities.iter().filter(|p| p.health > 0 && !left_out.contains(&p.level));
        let total = others().map(|p| p.health).sum::<u64>().min(100);
        let mut end = 0;
        let found = others().find(|p| {
            end += (p.health * 100).checked_div(total).unwrap_or(0);
            at < end
        });
        // What rounding leaves goes to the first.
        found.or_else(|| others().next())
    }

    /// As [`Self::pick`], drawn again up to [`MAX_REDRAWS`] times while `avoid` says so; then any other of the last draw's
    /// locality (Envoy would take whatever came, and among few hosts fail a retry that need not fail); then whatever came. A
    /// host that warms up is avoided for the share of the draws it does not get yet: `avoid` gets an independent draw for
    /// that. `left_out`: priorities that get nothing while others have healthy hosts. Consistent hashing is not drawn again: the same request belongs to the same host.
    pub fn pick_avoiding(
        &self,
        chance: Chance,
        load: impl Fn(usize) -> u64,
        next_turn: impl Fn() -> u64,
        avoid: impl Fn(usize, u64) -> bool,
        left_out: &[u32],
    ) -> Option<usize> {
        let mut group = self.group(chance, left_out)?;
        let mut picked = group.pick(self.kind, chance, &load)?;
        if self.kind == Kind::Hash && chance.hash.is_some() {
            return Some(picked);
        }
        for round in 1..=MAX_REDRAWS {
            if !avoid(picked, redraw(chance.draw, 100 + round)) {
                return Some(picked);
            }
            let turn = if self.kind == Kind::Turn { next_turn() } else { 0 };
            let again = Chance { draw: redraw(chance.draw, 10 + round), turn, ..chance };
            group = self.group(again, left_out)?;
            picked = group.pick(self.kind, again, &load)?;
        }
        let last = redraw(chance.draw, 100);
        if !avoid(picked, last) {
            return Some(picked);
        }
        group.bag.from(last).find(|host| !avoid(*host, redraw(last, *host as u64))).or(Some(picked))
    }

    /// Whether picks go in turn and so need [`Chance::turn`].
    pub fn takes_turns(&self) -> bool {
        self.kind == Kind::Turn
    }
}

impl Group {
    fn pick(&self, kind: Kind, chance: Chance, load: impl Fn(usize) -> u64) -> Option<usize> {
        let own = redraw(chance.draw, 3);
        match (kind, chance.hash) {
            (Kind::Least, _) => self.bag.least(own, load),
            (Kind::Turn, _) => self.bag.turn(chance.turn),
            (Kind::Random, _) | (Kind::Hash, None) => self.bag.draw(own),
            (Kind::Hash, Some(hash)) => match &self.table {
                Table::Ring(ring) => ring.find(hash),
                Table::Maglev(maglev) => maglev.find(hash),
                Table::None => self.bag.draw(own),
            },
        }
    }

    fn new<'a>(balance: &Balance, hosts: impl Iterator<Item = (usize, &'a Entry<'a>)> + Clone) -> Self {
        let weighted = || hosts.clone().map(|(at, h)| (at as u32, h.weight.max(1)));
        let placed = || hosts.clone().map(|(at, h)| (at as u32, h.key, h.weight.max(1)));
        let table = match balance {
            Balance::Hash { algorithm: HashAlgorithm::Ring(size), .. } => Table::Ring(Ring::new(placed(), *size)),
            Balance::Hash { algorithm: HashAlgorithm::Maglev(size), .. } => Table::Maglev(Maglev::new(placed(), *size)),
            _ => Table::None,
        };
        Self { bag: Bag::new(weighted(), matches!(balance, Balance::RoundRobin)), table }
    }
}

/// What a priority gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Percent of the traffic.
    pub percent: u64,
    /// Unhealthy hosts are used too.
    pub panic: bool,
}
/// What a priority can bear of all traffic, percent.
fn availability(healthy: u64, all: u64) -> u64 {
    (OVERPROVISION * healthy).checked_div(all).map_or(0, |h| h.min(100))
}
/// Loads of priorities by their (healthy, all) hosts: each takes as much as its healthy hosts times 1.4 can bear, the rest
/// goes to the next; sums to 100. As Envoy's `recalculatePerPriorityState` and panic rules.
pub fn loads(counts: &[(u64, u64)], panic_percent: u32) -> Vec<Load> {
    let health: Vec<u64> = counts.iter().map(|(healthy, all)| availability(*healthy, *all)).collect();
    let total = health.iter().sum::<u64>().min(100);
    let mut out: Vec<Load> = Vec::with_capacity(counts.len());
    if total == 0 {
        let panic = panic_percent > 0;
        let all: u64 = counts.iter().map(|(_, n)| n).sum();
        for (at, (_, n)) in counts.iter().enumerate() {
            // In panic everywhere the hosts share alike; without panic nothing can be chosen, and that is said by the first.
            let percent = if panic { (100 * n).checked_div(all).unwrap_or(0) } else { u64::from(at == 0) * 100 };
            out.push(Load { percent, panic });
        }
    } else {
        let mut rest = 100;
        for ((healthy, all), health) in counts.iter().zip(&health) {
            let percent = (health * 100).checked_div(total).unwrap_or(0).min(rest);
            rest -= percent;
            let share = (100 * healthy).checked_div(*all).unwrap_or(0);
            out.push(Load { percent, panic: total < 100 && share < u64::from(panic_percent) });
        }
    }
    // What rounding left goes to the first that takes any.
    let rest = 100_u64.saturating_sub(out.iter().map(|l| l.percent).sum());
    if let Some(first) = out.iter_mut().find(|l| l.percent > 0) {
        first.percent += rest;
    }
    out
}

/// Share of its weight, 0 to 1, that a host of this age gets.
pub fn warmup_factor(warmup: &Warmup, age: Duration) -> f64 {
    if age >= warmup.duration {
        return 1.0;
    }
    let time = age.max(Duration::from_millis(1)).as_secs_f64() / warmup.duration.as_secs_f64();
    let aggression = f64::from(warmup.aggression_milli.max(1)) / 1000.0;
    time.powf(1.0 / aggression).max(f64::from(warmup.minimum_percent.min(100)) / 100.0).min(1.0)
}
/// Whether a draw falls outside the share `factor`: the host is then avoided.
pub fn is_held_back(factor: f64, draw: u64) -> bool {
    factor < 1.0 && (draw as f64 / u64::MAX as f64) >= factor
}

#[cfg(test)]
mod tests;
