//! The HTTP rules of a table in the order in which they are tried, with their index.
//!
//! Owns: what versions of a table share. Of a large table a few rules change at a time: those made and indexed once (the base)
//! stay as they are, and a patch says which of them count no more and which others stand between them, so that a version
//! costs what changed. Answers as one list would, for every patch and request (property test). Refuses: order, which is the
//! translator's. Upstream: [`crate::l7::RouteTable`]. Downstream: [`crate::l7::select`].
use crate::l7::index::RouteIndex;
use crate::l7::route::{HttpRule, RequestFacts};
use std::fmt;
use std::sync::Arc;

/// Rules, first match wins.
#[derive(Clone, Default)]
pub struct Rules {
    base: Arc<Indexed>,
    patch: Option<Arc<Patch>>,
}
#[derive(Clone, Default)]
struct Indexed {
    rules: Vec<HttpRule>,
    index: RouteIndex,
}
struct Patch {
    /// Numbers of the base's rules that count no more, ascending.
    without: Box<[u32]>,
    added: Indexed,
    /// For each rule added, the number of the base's rule it stands before; ascending.
    before: Box<[u32]>,
}

impl Indexed {
    fn of(rules: Vec<HttpRule>) -> Self {
        Self { index: RouteIndex::build(&rules), rules }
    }
    fn find(&self, req: &RequestFacts<'_>, counts: impl Fn(u32) -> bool) -> Option<usize> {
        self.index.find(&self.rules, req, counts)
    }
}
impl Patch {
    fn keeps(&self, number: u32) -> bool {
        self.without.binary_search(&number).is_err()
    }
}

impl Rules {
    /// The first rule that matches.
    pub fn find(&self, req: &RequestFacts<'_>) -> Option<&HttpRule> {
        let base = |number: usize| self.base.rules.get(number);
        let Some(patch) = &self.patch else { return self.base.find(req, |_| true).and_then(base) };
        let old = self.base.find(req, |number| patch.keeps(number));
        let new = patch.added.find(req, |_| true);
        let stands_before = |new: usize| patch.before.get(new).map_or(usize::MAX, |at| *at as usize);
        match (old, new) {
            (Some(old), Some(new)) if stands_before(new) > old => base(old),
            (_, Some(new)) => patch.added.rules.get(new),
            (old, None) => old.and_then(base),
        }
    }
    /// All rules in their order.
    pub fn iter(&self) -> impl Iterator<Item = &HttpRule> {
        let patch = self.patch.as_deref();
        let (before, added) = patch.map_or((&[][..], &[][..]), |p| (&p.before[..], &p.added.rules[..]));
        (0..=self.base.rules.len()).flat_map(move |number| {
            let here = before.partition_point(|at| (*at as usize) < number)..before.partition_point(|at| *at as usize <= number);
            let own = self.base.rules.get(number).filter(|_| patch.is_none_or(|p| p.keeps(number as u32)));
            added.get(here).unwrap_or_default().iter().chain(own)
        })
    }
    /// The rule of this number, counted from the first. Not for large tables.
    pub fn get(&self, number: usize) -> Option<&HttpRule> {
        self.iter().nth(number)
    }
    /// How many there are.
    pub fn len(&self) -> usize {
        let (less, more) = self.patch.as_ref().map_or((0, 0), |p| (p.without.len(), p.added.rules.len()));
        self.base.rules.len() - less + more
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Adds a rule at the end.
    pub fn push(&mut self, rule: HttpRule) {
        self.list().push(rule);
    }
    /// The rules as one list of nobody else's.
    fn list(&mut self) -> &mut Vec<HttpRule> {
        if self.patch.is_some() {
            *self = self.iter().cloned().collect();
        }
        &mut Arc::make_mut(&mut self.base).rules
    }
    /// The same, indexed.
    #[must_use]
    pub fn indexed(mut self) -> Self {
        if !self.is_indexed() {
            let base = Arc::make_mut(&mut self.base);
            base.index = RouteIndex::build(&base.rules);
        }
        self
    }
    /// Whether the rules are indexed, or too few to need it.
    pub fn is_indexed(&self) -> bool {
        self.base.index.is_for(&self.base.rules)
    }

    /// Rules like these without the patch they have, but with another: without those of the numbers `without` (ascending), and
    /// with others, each before the rule of a number (ascending; past the last for the end).
    #[must_use]
    pub fn patched(&self, without: impl IntoIterator<Item = u32>, added: impl IntoIterator<Item = (u32, HttpRule)>) -> Self {
        let (before, added): (Vec<u32>, Vec<HttpRule>) = added.into_iter().unzip();
        let without: Box<[u32]> = without.into_iter().collect();
        let patch = (!without.is_empty() || !added.is_empty()).then(|| Patch {
            without,
            added: Indexed::of(added),
            before: before.into(),
        });
        Self { base: Arc::clone(&self.base), patch: patch.map(Arc::new) }
    }
    /// A rule of the base, by its number.
    pub fn base(&self, number: u32) -> Option<&HttpRule> {
        self.base.rules.get(number as usize)
    }
    /// How many of these rules were put into a list and indexed for this version, after `other`.
    pub fn made_after(&self, other: &Self) -> usize {
        let added = |rules: &Self| rules.patch.as_ref().map_or(0, |p| p.added.rules.len());
        if Arc::ptr_eq(&self.base, &other.base) { added(self) } else { self.base.rules.len() + added(self) }
    }
}
impl From<Vec<HttpRule>> for Rules {
    /// Not indexed yet.
    fn from(rules: Vec<HttpRule>) -> Self {
        Self { base: Arc::new(Indexed { rules, index: RouteIndex::default() }), patch: None }
    }
}
impl FromIterator<HttpRule> for Rules {
    fn from_iter<I: IntoIterator<Item = HttpRule>>(rules: I) -> Self {
        Vec::from_iter(rules).into()
    }
}
impl Extend<HttpRule> for Rules {
    fn extend<I: IntoIterator<Item = HttpRule>>(&mut self, rules: I) {
        self.list().extend(rules);
    }
}
impl PartialEq for Rules {
    /// By what they say, however it is put together.
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}
impl Eq for Rules {}
impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
