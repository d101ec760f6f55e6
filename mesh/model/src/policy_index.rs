//! Policies by scope and by the identities their rules name, so that a connection is judged by the few rules that could
//! match its peer and not by all of them.
//!
//! A rule is an AND of clauses: when one clause can only be true for certain service accounts, namespaces, source hosts
//! or ports, the rule is filed under those (its *anchors*) and is not even looked at for any other connection. A rule
//! without such a clause is *general* and judged for every connection. Anchors are hashes: a collision costs one useless
//! evaluation, never a verdict, because every candidate is evaluated in full. Owns no evaluation: that is `authz`.
//! Upstream: `snapshot`.
use crate::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch};
use crate::shard::{Keep, Shards};
use crate::workload::{Workload, WorkloadUid};
use foldhash::quality::RandomState;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::Arc;

/// The hash a rule is filed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Anchor(u64);

/// The anchors of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Anchors {
    all: [Anchor; 4],
    len: usize,
}
impl Anchors {
    /// As a slice.
    pub fn as_slice(&self) -> &[Anchor] {
        self.all.get(..self.len).unwrap_or(&self.all)
    }
}

/// A rule of a policy.
#[derive(Clone, Debug)]
pub struct RuleRef {
    policy: Arc<Policy>,
    rule: usize,
}
impl RuleRef {
    /// The policy.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }
    /// The rule itself.
    pub fn rule(&self) -> Option<&Rule> {
        match &self.policy.body {
            PolicyBody::Rules { rules, .. } => rules.get(self.rule),
            PolicyBody::Unusable { .. } => None,
        }
    }
    fn order(&self) -> (&PolicyKey, usize) {
        (&self.policy.key, self.rule)
    }
}

/// Rules of one kind (deny, allow, dry run): anchored and general.
#[derive(Clone, Debug, Default)]
pub struct RuleTable {
    anchored: Shards<Anchor, Arc<Vec<RuleRef>>>,
    general: Arc<Vec<RuleRef>>,
}
impl RuleTable {
    /// Rules that could match a peer with these anchors; a rule may come twice.
    pub fn candidates<'a>(&'a self, anchors: &'a [Anchor]) -> impl Iterator<Item = &'a RuleRef> {
        anchors.iter().filter_map(|a| self.anchored.get(a)).flat_map(|v| v.iter()).chain(self.general.iter())
    }
    /// Rules filed under these anchors only.
    pub fn anchored<'a>(&'a self, anchors: &'a [Anchor]) -> impl Iterator<Item = &'a RuleRef> {
        anchors.iter().filter_map(|a| self.anchored.get(a)).flat_map(|v| v.iter())
    }
    /// All of them; one may come more than once.
    pub fn rules(&self) -> impl Iterator<Item = &RuleRef> {
        self.anchored.values().flat_map(|v| v.iter()).chain(self.general.iter())
    }
    /// Whether it holds no rule.
    pub fn is_empty(&self) -> bool {
        self.anchored.is_empty() && self.general.is_empty()
    }
    fn put(&mut self, r: &RuleRef, filing: &Filing) {
        fn add(list: &mut Arc<Vec<RuleRef>>, r: &RuleRef) {
            let list = Arc::make_mut(list);
            let at = list.partition_point(|o| o.order() < r.order());
            if list.len() == list.capacity() {
                // Most lists hold one rule: no room for three more.
                list.reserve_exact(list.len() / 2 + 1);
            }
            list.insert(at, r.clone());
        }
        match filing {
            Filing::Never => {}
            Filing::General => add(&mut self.general, r),
            Filing::Under(anchors) => {
                for a in anchors {
                    self.anchored.edit(a, |list| {
                        add(list, r);
                        Keep::Yes
                    });
                }
            }
        }
    }
    fn take(&mut self, key: &PolicyKey, rule: usize, filing: &Filing) {
        fn sub(list: &mut Arc<Vec<RuleRef>>, at: (&PolicyKey, usize)) -> Keep {
            if let Ok(i) = list.binary_search_by(|o| o.order().cmp(&at)) {
                Arc::make_mut(list).remove(i);
            }
            if list.is_empty() { Keep::No } else { Keep::Yes }
        }
        match filing {
            Filing::Never => {}
            Filing::General => {
                sub(&mut self.general, (key, rule));
            }
            Filing::Under(anchors) => {
                for a in anchors {
                    self.anchored.edit(a, |list| sub(list, (key, rule)));
                }
            }
        }
    }
    fn dump(&self, what: &str, lines: &mut Vec<String>) {
        let mut all: BTreeMap<(&PolicyKey, usize), usize> = BTreeMap::new();
        for r in self.anchored.values().flat_map(|v| v.iter()) {
            *all.entry(r.order()).or_default() += 1;
        }
        lines.extend(all.iter().map(|((k, r), n)| format!("{what} anchored {k} rule {r} under {n}")));
        lines.extend(self.general.iter().map(|r| format!("{what} general {} rule {}", r.policy.key, r.rule)));
    }
}

/// All policies of one scope.
#[derive(Clone, Debug, Default)]
pub struct Bucket {
    /// Enforced DENY rules.
    pub deny: RuleTable,
    /// Enforced ALLOW rules.
    pub allow: RuleTable,
    /// Rules of dry-run policies.
    pub dry_run: RuleTable,
    /// Enforced ALLOW policies, also those without rules.
    pub allows: usize,
    /// Policies that could not be understood.
    unusable: Arc<BTreeMap<PolicyKey, Arc<Policy>>>,
    policies: usize,
}
impl Bucket {
    /// The first policy that could not be understood, by key.
    pub fn unusable(&self) -> Option<&Arc<Policy>> {
        self.unusable.values().next()
    }
    fn table(&mut self, action: Action, dry_run: bool) -> &mut RuleTable {
        match (dry_run, action) {
            (true, _) => &mut self.dry_run,
            (false, Action::Allow) => &mut self.allow,
            (false, Action::Deny) => &mut self.deny,
        }
    }
    fn put(&mut self, p: &Arc<Policy>, keyed: &RandomState) {
        self.policies += 1;
        match &p.body {
            PolicyBody::Unusable { .. } => {
                Arc::make_mut(&mut self.unusable).insert(p.key.clone(), Arc::clone(p));
            }
            PolicyBody::Rules { action, dry_run, rules } => {
                self.allows += usize::from(*action == Action::Allow && !dry_run);
                let table = self.table(*action, *dry_run);
                for (i, rule) in rules.iter().enumerate() {
                    table.put(&RuleRef { policy: Arc::clone(p), rule: i }, &file(rule, keyed));
                }
            }
        }
    }
    fn take(&mut self, p: &Policy, keyed: &RandomState) {
        self.policies -= 1;
        match &p.body {
            PolicyBody::Unusable { .. } => {
                Arc::make_mut(&mut self.unusable).remove(&p.key);
            }
            PolicyBody::Rules { action, dry_run, rules } => {
                self.allows -= usize::from(*action == Action::Allow && !dry_run);
                let table = self.table(*action, *dry_run);
                for (i, rule) in rules.iter().enumerate() {
                    table.take(&p.key, i, &file(rule, keyed));
                }
            }
        }
    }
    fn dump(&self, what: &str, lines: &mut Vec<String>) {
        lines.push(format!("{what} policies {} allows {}", self.policies, self.allows));
        lines.extend(self.unusable.keys().map(|k| format!("{what} unusable {k}")));
        self.deny.dump(&format!("{what} deny"), lines);
        self.allow.dump(&format!("{what} allow"), lines);
        self.dry_run.dump(&format!("{what} dry_run"), lines);
    }
}

/// The selector policies bound to one local workload, resolved.
#[derive(Clone, Debug)]
pub struct Bound {
    workload: Arc<Workload>,
    /// Those that exist, sorted by key.
    resolved: Vec<Arc<Policy>>,
    /// Names without a policy behind them.
    missing: BTreeSet<PolicyKey>,
    unusable: usize,
    allows: usize,
    dry_runs: usize,
    /// Rules the mesh-wide table of selector policies does not have under an anchor.
    deny: Vec<RuleRef>,
    allow: Vec<RuleRef>,
    dry_run: Vec<RuleRef>,
}
impl Bound {
    /// Those that exist, sorted by key.
    pub fn resolved(&self) -> &[Arc<Policy>] {
        &self.resolved
    }
    /// The first name without a policy behind it, by key.
    pub fn missing(&self) -> Option<&PolicyKey> {
        self.missing.first()
    }
    /// The first policy that could not be understood, by key.
    pub fn unusable(&self) -> Option<&Arc<Policy>> {
        if self.unusable == 0 {
            return None;
        }
        self.resolved.iter().find(|p| matches!(p.body, PolicyBody::Unusable { .. }))
    }
    /// Enforced ALLOW policies.
    pub fn allows(&self) -> usize {
        self.allows
    }
    /// Dry-run policies.
    pub fn dry_runs(&self) -> usize {
        self.dry_runs
    }
    /// General rules of its enforced DENY policies.
    pub fn general_deny(&self) -> &[RuleRef] {
        &self.deny
    }
    /// General rules of its enforced ALLOW policies.
    pub fn general_allow(&self) -> &[RuleRef] {
        &self.allow
    }
    /// General rules of its dry-run policies.
    pub fn general_dry_run(&self) -> &[RuleRef] {
        &self.dry_run
    }
    /// Whether a policy is bound.
    pub fn binds(&self, key: &PolicyKey) -> bool {
        self.resolved.binary_search_by(|p| p.key.cmp(key)).is_ok()
    }
    fn new(workload: &Arc<Workload>) -> Self {
        Self {
            workload: Arc::clone(workload),
            resolved: Vec::new(),
            missing: workload.policies.iter().cloned().collect(),
            unusable: 0,
            allows: 0,
            dry_runs: 0,
            deny: Vec::new(),
            allow: Vec::new(),
            dry_run: Vec::new(),
        }
    }
    fn put(&mut self, p: &Arc<Policy>, keyed: &RandomState) {
        self.missing.remove(&p.key);
        let at = self.resolved.partition_point(|o| o.key < p.key);
        self.resolved.insert(at, Arc::clone(p));
        match &p.body {
            PolicyBody::Unusable { .. } => self.unusable += 1,
            PolicyBody::Rules { action, dry_run, rules } => {
                let list = match (dry_run, action) {
                    (true, _) => {
                        self.dry_runs += 1;
                        &mut self.dry_run
                    }
                    (false, Action::Allow) => {
                        self.allows += 1;
                        &mut self.allow
                    }
                    (false, Action::Deny) => &mut self.deny,
                };
                for (i, rule) in rules.iter().enumerate() {
                    // A policy of another scope is not filed among the selector policies: all its rules go here.
                    if p.scope != Scope::Selector || matches!(file(rule, keyed), Filing::General) {
                        let r = RuleRef { policy: Arc::clone(p), rule: i };
                        let at = list.partition_point(|o| o.order() < r.order());
                        list.insert(at, r);
                    }
                }
            }
        }
    }
    fn take(&mut self, p: &Policy) {
        self.missing.insert(p.key.clone());
        self.resolved.retain(|o| o.key != p.key);
        match &p.body {
            PolicyBody::Unusable { .. } => self.unusable -= 1,
            PolicyBody::Rules { dry_run: true, .. } => self.dry_runs -= 1,
            PolicyBody::Rules { action: Action::Allow, .. } => self.allows -= 1,
            PolicyBody::Rules { .. } => {}
        }
        for list in [&mut self.deny, &mut self.allow, &mut self.dry_run] {
            list.retain(|r| r.policy.key != p.key);
        }
    }
}

/// All policies.
#[derive(Clone, Debug, Default)]
pub struct PolicyIndex {
    all: Shards<PolicyKey, Arc<Policy>>,
    global: Bucket,
    by_namespace: Shards<Arc<str>, Arc<Bucket>>,
    /// Selector policies of the whole mesh; candidates are filtered by what a workload is bound to.
    selector: Bucket,
    bound: Shards<WorkloadUid, Arc<Bound>>,
    /// Local workloads by the policies they name.
    named_by: Shards<PolicyKey, Arc<BTreeSet<WorkloadUid>>>,
    keyed: RandomState,
}
impl PolicyIndex {
    /// Policy by key.
    pub fn find(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.all.get(key)
    }
    /// All policies, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.all.values()
    }
    /// Policies for every workload.
    pub fn global(&self) -> &Bucket {
        &self.global
    }
    /// Policies for the workloads of a namespace.
    pub fn namespace(&self, namespace: &str) -> Option<&Arc<Bucket>> {
        self.by_namespace.get(namespace)
    }
    /// Selector policies of the whole mesh.
    pub fn selector(&self) -> &Bucket {
        &self.selector
    }
    /// What a local workload is bound to; `None` when this very object is not an indexed one (not local, or of another
    /// version), whose names must then be looked up one by one.
    pub fn bound(&self, workload: &Workload) -> Option<&Bound> {
        let b = self.bound.get(&*workload.uid)?;
        std::ptr::eq(&raw const *b.workload, workload).then_some(b)
    }
    /// The anchors of a connection: its source address, destination port, and (namespace, service account) of its peer.
    pub fn anchors(&self, source: IpAddr, port: u16, peer: Option<(&str, &str)>) -> Anchors {
        let k = &self.keyed;
        let (source, port) = (source_anchor(k, source), port_anchor(k, port));
        match peer {
            None => Anchors { all: [source, port, source, port], len: 2 },
            Some((namespace, account)) => {
                Anchors { all: [source, port, namespace_anchor(k, namespace), account_anchor(k, namespace, account)], len: 4 }
            }
        }
    }

    /// A policy appeared or changed.
    pub(crate) fn put(&mut self, p: &Arc<Policy>) {
        if self.all.get(&p.key).is_some_and(|old| old == p) {
            return;
        }
        self.take(&p.key);
        self.all.insert(p.key.clone(), Arc::clone(p));
        match p.scope {
            Scope::Global => self.global.put(p, &self.keyed),
            Scope::Namespace => self.by_namespace.edit(&p.key.namespace, |b| {
                Arc::make_mut(b).put(p, &self.keyed);
                Keep::Yes
            }),
            Scope::Selector => self.selector.put(p, &self.keyed),
        }
        for uid in self.named_by.get(&p.key).map(|n| n.iter().cloned().collect::<Vec<_>>()).unwrap_or_default() {
            if let Some(b) = self.bound.get_mut(&*uid) {
                Arc::make_mut(b).put(p, &self.keyed);
            }
        }
    }
    /// A policy went.
    pub(crate) fn take(&mut self, key: &PolicyKey) {
        let Some(old) = self.all.remove(key) else { return };
        match old.scope {
            Scope::Global => self.global.take(&old, &self.keyed),
            Scope::Namespace => self.by_namespace.edit(&key.namespace, |b| {
                let b = Arc::make_mut(b);
                b.take(&old, &self.keyed);
                if b.policies == 0 { Keep::No } else { Keep::Yes }
            }),
            Scope::Selector => self.selector.take(&old, &self.keyed),
        }
        for uid in self.named_by.get(key).map(|n| n.iter().cloned().collect::<Vec<_>>()).unwrap_or_default() {
            if let Some(b) = self.bound.get_mut(&*uid) {
                Arc::make_mut(b).take(&old);
            }
        }
    }
    /// A local workload appeared.
    pub(crate) fn bind(&mut self, w: &Arc<Workload>) {
        let mut bound = Bound::new(w);
        for key in w.policies.iter() {
            if let Some(p) = self.all.get(key)
                && !bound.binds(key)
            {
                bound.put(p, &self.keyed);
            }
            self.named_by.edit(key, |n| {
                Arc::make_mut(n).insert(Arc::clone(&w.uid));
                Keep::Yes
            });
        }
        self.bound.insert(Arc::clone(&w.uid), Arc::new(bound));
    }
    /// A local workload went.
    pub(crate) fn unbind(&mut self, w: &Workload) {
        self.bound.remove(&*w.uid);
        for key in w.policies.iter() {
            self.named_by.edit(key, |n| {
                let n = Arc::make_mut(n);
                n.remove(&w.uid);
                if n.is_empty() { Keep::No } else { Keep::Yes }
            });
        }
    }
    /// Content as lines that do not depend on history.
    pub(crate) fn dump(&self, lines: &mut Vec<String>) {
        lines.extend(self.all.iter().map(|(k, p)| format!("policy {k} {p:?}")));
        self.global.dump("global", lines);
        self.selector.dump("selector", lines);
        for (ns, b) in &self.by_namespace {
            b.dump(&format!("namespace {ns}"), lines);
        }
        for (uid, b) in &self.bound {
            lines.push(format!("bound {uid} {b:?}"));
        }
        lines.extend(self.named_by.iter().map(|(k, n)| format!("named {k} by {n:?}")));
    }
}

/// Where a rule is filed.
#[derive(Debug)]
enum Filing {
    /// It cannot match any peer at all.
    Never,
    /// It must be judged for everyone.
    General,
    /// Only peers with one of these anchors can match it.
    Under(Vec<Anchor>),
}

/// What kind of thing an anchor names, the most selective first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Account,
    Source,
    Namespace,
    Port,
}

fn account_anchor(keyed: &RandomState, namespace: &str, service_account: &str) -> Anchor {
    Anchor(keyed.hash_one((Kind::Account, namespace, service_account)))
}
fn namespace_anchor(keyed: &RandomState, namespace: &str) -> Anchor {
    Anchor(keyed.hash_one((Kind::Namespace, namespace)))
}
fn source_anchor(keyed: &RandomState, ip: IpAddr) -> Anchor {
    Anchor(keyed.hash_one((Kind::Source, ip)))
}
fn port_anchor(keyed: &RandomState, port: u16) -> Anchor {
    Anchor(keyed.hash_one((Kind::Port, port)))
}

/// Anchors outside of which something is false, with the least selective kind among them. No anchors: always false.
#[derive(Debug)]
struct Named {
    kind: Kind,
    anchors: Vec<Anchor>,
}
impl Named {
    fn of(kind: Kind, anchors: impl Iterator<Item = Anchor>) -> Self {
        Self { kind, anchors: anchors.collect() }
    }
    fn cost(&self) -> (Kind, usize) {
        (self.kind, self.anchors.len())
    }
}

/// Chooses the clause that names the fewest connections.
fn file(rule: &Rule, keyed: &RandomState) -> Filing {
    let found: Vec<Named> = rule.clauses.iter().filter_map(|c| clause_anchors(c, keyed)).collect();
    if found.iter().any(|b| b.anchors.is_empty()) {
        return Filing::Never;
    }
    found.into_iter().min_by_key(Named::cost).map_or(Filing::General, |b| Filing::Under(b.anchors))
}
/// `None`: the clause is not bounded by anchors.
fn clause_anchors(clause: &Clause, keyed: &RandomState) -> Option<Named> {
    if clause.matches.is_empty() {
        return None;
    }
    let mut all = Named { kind: Kind::Account, anchors: Vec::new() };
    // A match without fields never matches, so it names nothing.
    for m in clause.matches.iter().filter(|m| !m.is_empty()) {
        let of_match = match_anchors(m, keyed)?;
        all.kind = all.kind.max(of_match.kind);
        all.anchors.extend(of_match.anchors);
    }
    all.anchors.sort_unstable();
    all.anchors.dedup();
    Some(all)
}
/// The most selective of the fields that bound a match.
fn match_anchors(m: &Match, keyed: &RandomState) -> Option<Named> {
    let accounts = m.service_accounts.any();
    let by_account =
        (!accounts.is_empty()).then(|| Named::of(Kind::Account, accounts.iter().map(|(ns, sa)| account_anchor(keyed, ns, sa))));
    let ports = m.destination_ports.any();
    let by_port = (!ports.is_empty()).then(|| Named::of(Kind::Port, ports.iter().map(|p| port_anchor(keyed, *p))));
    let options = [by_account, principal_anchors(m, keyed), source_anchors(m, keyed), namespace_anchors(m, keyed), by_port];
    options.into_iter().flatten().min_by_key(Named::cost)
}
fn namespace_anchors(m: &Match, keyed: &RandomState) -> Option<Named> {
    let anchor = |t: &TextMatch| match t {
        TextMatch::Exact(ns) => Some(namespace_anchor(keyed, ns)),
        _ => None,
    };
    let anchors: Vec<Anchor> = m.namespaces.any().iter().map(anchor).collect::<Option<_>>()?;
    (!anchors.is_empty()).then_some(Named { kind: Kind::Namespace, anchors })
}
fn source_anchors(m: &Match, keyed: &RandomState) -> Option<Named> {
    let anchor = |net: &IpNet| (net.prefix_len() == net.max_prefix_len()).then(|| source_anchor(keyed, net.addr()));
    let anchors: Vec<Anchor> = m.source_ips.any().iter().map(anchor).collect::<Option<_>>()?;
    (!anchors.is_empty()).then_some(Named { kind: Kind::Source, anchors })
}
/// Principals bound a match when each of them fixes at least the namespace of `td/ns/<ns>/sa/<sa>`, the shape of every
/// verified identity.
fn principal_anchors(m: &Match, keyed: &RandomState) -> Option<Named> {
    let mut all = Named { kind: Kind::Account, anchors: Vec::new() };
    for t in m.principals.any() {
        match t {
            TextMatch::Exact(p) => {
                let mut it = p.strip_prefix("spiffe://").unwrap_or(p).split('/');
                let parts = (it.next(), it.next(), it.next(), it.next(), it.next(), it.next());
                // Any other shape can never match and names nothing.
                if let (Some(_), Some("ns"), Some(ns), Some("sa"), Some(sa), None) = parts {
                    all.anchors.push(account_anchor(keyed, ns, sa));
                }
            }
            TextMatch::Prefix(p) => {
                let mut it = p.strip_prefix("spiffe://").unwrap_or(p).split('/');
                // `td/ns/<ns>/…`: the slash after it makes the namespace complete.
                let (Some(_), Some("ns"), Some(ns), Some(_)) = (it.next(), it.next(), it.next(), it.next()) else {
                    return None;
                };
                all.kind = all.kind.max(Kind::Namespace);
                all.anchors.push(namespace_anchor(keyed, ns));
            }
            TextMatch::Suffix(p) => {
                let mut it = p.rsplit('/');
                // `…/<ns>/sa/<sa>`: the slash before it makes the namespace complete.
                let (Some(sa), Some("sa"), Some(ns), Some(_)) = (it.next(), it.next(), it.next(), it.next()) else {
                    return None;
                };
                all.anchors.push(account_anchor(keyed, ns, sa));
            }
            TextMatch::Presence => return None,
        }
    }
    (!m.principals.any().is_empty()).then_some(all)
}
