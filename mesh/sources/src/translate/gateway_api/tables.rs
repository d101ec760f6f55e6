//! The tables of a Gateway's hosts, and of a service with many routes, kept from one version to the next.
//!
//! Owns which route stands where, and in which order their rules are tried: by rank, then the older route, then as written. A
//! route that changed is taken out and put in; a table of many rules shares with the version before all that stayed. Upstream:
//! [`super::attach`]. Downstream: [`super::gateway`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::l7::route::{HttpRule, RouteTable, TcpRule, TlsRule};
use mesh_model::l7::rules::Rules;

use super::route::{Rank, RouteKind};
use super::{HashMap, HostOrder, HttpEntry, RouteId};

/// Tables up to this size are made anew.
const SMALL: usize = 256;
/// Routes on one service up to which none is kept.
const FEW: usize = 16;

/// The order of routes: older first, those without a date last; then by name.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Age {
    pub(super) undated: bool,
    pub(super) created: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) kind: RouteKind,
}

/// What a route says to one host.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) http: Arc<[HttpEntry]>,
    pub(super) tls: Vec<TlsRule>,
    pub(super) tcp: Vec<TcpRule>,
    pub(super) origin: Arc<Origin>,
    pub(super) broken: Option<Arc<str>>,
}
/// Where a route attaches: the number of the listener, and the host.
pub(super) type Spot = (usize, HostOrder);

/// The order of rules.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    rank: Rank,
    age: Arc<Age>,
    number: usize,
}

/// The tables of one Gateway.
#[derive(Debug, Default)]
pub(in super::super) struct Tables {
    hosts: BTreeMap<Spot, Host>,
    placed: HashMap<RouteId, (Arc<Age>, Vec<Spot>)>,
}
impl Tables {
    /// The routes that stand somewhere.
    pub(in super::super) fn routes(&self) -> impl Iterator<Item = &RouteId> {
        self.placed.keys()
    }
    /// Whether no route stands anywhere.
    pub(in super::super) fn is_empty(&self) -> bool {
        self.placed.is_empty()
    }
    /// Takes a route out.
    pub(super) fn remove(&mut self, id: &RouteId) {
        let Some((age, spots)) = self.placed.remove(id) else { return };
        for spot in spots {
            self.set(spot, &age, None);
        }
    }
    /// Puts a route where it belongs now, instead of where it stood.
    pub(super) fn put(&mut self, id: &RouteId, age: Age, parts: BTreeMap<Spot, Part>) {
        if self.placed.get(id).is_some_and(|(old, _)| **old != age) {
            self.remove(id);
        }
        let (age, old) = self.placed.remove(id).unwrap_or_else(|| (Arc::new(age), Vec::new()));
        for spot in old.into_iter().filter(|spot| !parts.contains_key(spot)) {
            self.set(spot, &age, None);
        }
        let spots: Vec<Spot> = parts.keys().cloned().collect();
        for (spot, part) in parts {
            self.set(spot, &age, Some(part));
        }
        if !spots.is_empty() {
            self.placed.insert(id.clone(), (age, spots));
        }
    }
    fn set(&mut self, spot: Spot, age: &Arc<Age>, part: Option<Part>) {
        let host = self.hosts.entry(spot.clone()).or_default();
        host.set(age, part);
        if host.parts.is_empty() {
            self.hosts.remove(&spot);
        }
    }
    /// Whether so many routes stand here that looking at all of them again costs more than keeping what they say.
    pub(in super::super) fn are_many(&self) -> bool {
        self.placed.len() > FEW
    }
    /// The table of the only host there is; `None` when no route stands there.
    pub(super) fn only(&mut self) -> Option<Arc<RouteTable>> {
        self.hosts.values_mut().next().map(Host::table)
    }
    /// The hosts of each of so many listeners, most specific first, with their tables.
    pub(super) fn of_listeners(&mut self, listeners: usize) -> Vec<Vec<(Arc<str>, Arc<RouteTable>)>> {
        let mut out = vec![Vec::new(); listeners];
        for ((listener, (_, _, host)), tables) in &mut self.hosts {
            if let Some(hosts) = out.get_mut(*listener) {
                hosts.push((Arc::clone(host), tables.table()));
            }
        }
        out
    }
}

/// The table of one host.
#[derive(Debug, Default)]
struct Host {
    parts: BTreeMap<Arc<Age>, Part>,
    /// Rules made into a list once, with the places they stand in.
    base: Rules,
    places: Vec<Place>,
    /// What is different by now.
    without: BTreeSet<u32>,
    added: BTreeMap<Place, HttpRule>,
    /// The table that says so; `None` when it has to be made.
    table: Option<Arc<RouteTable>>,
}
impl Host {
    fn set(&mut self, age: &Arc<Age>, part: Option<Part>) {
        if self.parts.get(age) == part.as_ref() {
            return;
        }
        self.table = None;
        let place = |number: usize, rank: &Rank| Place { rank: *rank, age: Arc::clone(age), number };
        for (number, (rank, ..)) in self.parts.remove(age).iter().flat_map(|old| old.http.iter().enumerate()) {
            let place = place(number, rank);
            if self.added.remove(&place).is_none() {
                self.without.extend(self.number(&place));
            }
        }
        let Some(part) = part else { return };
        for (number, (rank, matches, route)) in part.http.iter().enumerate() {
            let place = place(number, rank);
            let rule = HttpRule { matches: Arc::clone(matches), route: Arc::clone(route) };
            match self.number(&place) {
                Some(number) if self.base.base(number) == Some(&rule) => drop(self.without.remove(&number)),
                _ => drop(self.added.insert(place, rule)),
            }
        }
        self.parts.insert(Arc::clone(age), part);
    }
    /// The number in the base of the rule that stood there.
    fn number(&self, place: &Place) -> Option<u32> {
        self.places.binary_search(place).ok().map(|at| at as u32)
    }
    fn table(&mut self) -> Arc<RouteTable> {
        if let Some(table) = &self.table {
            return Arc::clone(table);
        }
        // A patch costs what it holds with every version, a new base what there is once in a while.
        let patch = self.without.len() + self.added.len();
        if self.places.len() <= SMALL || patch > self.places.len().isqrt() * 8 {
            self.fold();
        }
        let before = |place: &Place| self.places.partition_point(|p| p < place) as u32;
        let added = self.added.iter().map(|(place, rule)| (before(place), rule.clone()));
        let http = self.base.patched(self.without.iter().copied(), added);
        let parts = || self.parts.values();
        let table = Arc::new(RouteTable {
            http,
            tls: parts().flat_map(|p| &p.tls).cloned().collect(),
            tcp: parts().flat_map(|p| &p.tcp).cloned().collect(),
            origins: parts().map(|p| Arc::clone(&p.origin)).collect(),
            broken: parts().find_map(|p| p.broken.clone()),
        });
        self.table = Some(Arc::clone(&table));
        table
    }
    /// Makes a base of everything.
    fn fold(&mut self) {
        let (places, without, added) =
            (std::mem::take(&mut self.places), std::mem::take(&mut self.without), std::mem::take(&mut self.added));
        let kept = (0..).zip(places).filter(|(number, _)| !without.contains(number));
        let kept = kept.filter_map(|(number, place)| Some((place, self.base.base(number)?.clone())));
        let mut all: Vec<(Place, HttpRule)> = kept.chain(added).collect();
        // Two sorted runs, which this sort merges.
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        let rules: Vec<HttpRule>;
        (self.places, rules) = all.into_iter().unzip();
        self.base = Rules::from(rules).indexed();
    }
}
