//! Inbound authorization: verdicts by Istio's L4 RBAC truth table (node-agent §1.7), with every fail-open spot closed.
//!
//! Owns the evaluation of rules. Closed on purpose, where upstream is open: a policy named by the workload but unknown
//! denies; a policy that could not be understood denies; `trustDomains` is enforced; a plaintext peer has *no* namespace
//! (upstream gives it the empty one, which an empty prefix matches). Two ways to the same verdict: [`authorize`] through
//! the index, [`explain`] one policy after the other; property tests hold them together. Upstream: `snapshot`.
use crate::change::Origin;
use crate::conn::InboundConn;
use crate::id::SpiffeId;
use crate::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch, Values};
use crate::policy_index::{Anchor, Bucket, RuleRef};
use crate::reason::{Reason, Refusal};
use crate::snapshot::Snapshot;
use crate::view::Viewpoint;
use crate::workload::Workload;
use std::net::IpAddr;
use std::sync::Arc;

mod sources;
pub use sources::{SourceVerdict, denied_sources};

/// The answer. A denial is a verdict, not an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let through; by this policy, or by none when no ALLOW policy binds the workload.
    Allow(Option<PolicyKey>),
    /// Refused.
    Deny(Refusal),
}
/// A verdict with what dry-run policies would have done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The enforced answer.
    pub verdict: Verdict,
    /// Dry-run policies that matched, sorted, to be logged; empty (no allocation) almost always.
    pub dry_run: Vec<PolicyKey>,
}

/// Decides an inbound connection to `workload` by one version of the mesh.
///
/// Order: a policy in scope that is unusable or unknown denies; then a matching DENY policy (the first by key); then,
/// when any ALLOW policy is in scope, one must match. The workload counts as `snap` knows it, so that a live connection
/// judged again with the object it was admitted with meets the policies bound since.
pub fn authorize(snap: &Snapshot, workload: &Workload, conn: &InboundConn<'_>) -> Decision {
    let workload = snap.find_workload(&workload.uid).map_or(workload, |w| w);
    let scope = InScope::of(snap, workload);
    let facts = Facts::of(snap.view(), conn);
    let peer = facts.peer.as_ref().map(|p| (p.namespace, p.account));
    let anchors = snap.policy_index().anchors(facts.source, facts.port, peer);
    let anchors = anchors.as_slice();
    Decision { verdict: verdict(snap, &scope, &facts, anchors), dry_run: dry_run(&scope, &facts, anchors) }
}

fn verdict(snap: &Snapshot, scope: &InScope<'_>, facts: &Facts<'_>, anchors: &[Anchor]) -> Verdict {
    if let Some(refusal) = scope.broken() {
        return Verdict::Deny(refusal);
    }
    let denied_by = [scope.global, scope.namespace]
        .into_iter()
        .flatten()
        .flat_map(|b| b.deny.candidates(anchors))
        .filter(|r| facts.matched_by(r))
        .map(|r| &r.policy().key)
        .chain(scope.selected(Action::Deny, facts, anchors))
        .min();
    if let Some(key) = denied_by {
        return Verdict::Deny(denial(snap.view(), key, facts.peer.is_none()));
    }
    if scope.allows() == 0 {
        return Verdict::Allow(None);
    }
    let allowed_by = [scope.global, scope.namespace]
        .into_iter()
        .flatten()
        .flat_map(|b| b.allow.candidates(anchors))
        .filter(|r| facts.matched_by(r))
        .map(|r| &r.policy().key)
        .chain(scope.selected(Action::Allow, facts, anchors))
        .next();
    match allowed_by {
        Some(key) => Verdict::Allow(Some(key.clone())),
        None => Verdict::Deny(Refusal::new(Reason::NotAllowed, "")),
    }
}
fn dry_run(scope: &InScope<'_>, facts: &Facts<'_>, anchors: &[Anchor]) -> Vec<PolicyKey> {
    let mut out = Vec::new();
    for b in [scope.global, scope.namespace].into_iter().flatten().filter(|b| !b.dry_run.is_empty()) {
        out.extend(b.dry_run.candidates(anchors).filter(|r| facts.matched_by(r)).map(|r| r.policy().key.clone()));
    }
    if let Selected::Bound(bound, mesh) = &scope.selected
        && bound.dry_runs() > 0
    {
        let named = mesh.dry_run.anchored(anchors).filter(|r| bound.binds(&r.policy().key));
        let matching = named.chain(bound.general_dry_run()).filter(|r| facts.matched_by(r));
        out.extend(matching.map(|r| r.policy().key.clone()));
    } else if let Selected::ByName(list) = &scope.selected {
        let dry = list.iter().filter(|p| matches!(p.body, PolicyBody::Rules { dry_run: true, .. }));
        out.extend(dry.filter(|p| facts.matching_rule(p).is_some()).map(|p| p.key.clone()));
    }
    out.sort_unstable();
    out.dedup();
    out
}
/// The refusal of an enforced DENY match. A PeerAuthentication in STRICT mode arrives as a DENY policy of a reserved
/// name (waypoint §1.8); to the operator that is "plaintext refused", not "a policy of yours matched".
fn denial(view: &Viewpoint, key: &PolicyKey, plaintext: bool) -> Refusal {
    let strict = (&*key.name == "istio_converted_static_strict" && key.namespace == view.root_namespace)
        || key.name.starts_with("converted_peer_authentication_");
    let reason = if plaintext && strict { Reason::PlaintextRefused } else { Reason::PolicyDenied };
    Refusal::new(reason, key.to_string())
}

/// The policies that bind one workload.
struct InScope<'a> {
    global: Option<&'a Bucket>,
    namespace: Option<&'a Bucket>,
    selected: Selected<'a>,
    /// The first name without a policy behind it.
    missing: Option<&'a PolicyKey>,
}
enum Selected<'a> {
    /// A local workload of this very version: precomputed; rules of the whole mesh are filtered by it.
    Bound(&'a crate::policy_index::Bound, &'a Bucket),
    /// Any other workload: its names looked up one by one.
    ByName(Vec<&'a Arc<Policy>>),
}
impl<'a> InScope<'a> {
    fn of(snap: &'a Snapshot, workload: &'a Workload) -> Self {
        let index = snap.policy_index();
        let (selected, missing) = if let Some(bound) = index.bound(workload) {
            (Selected::Bound(bound, index.selector()), bound.missing())
        } else {
            let missing = workload.policies.iter().filter(|k| index.find(k).is_none()).min();
            (Selected::ByName(workload.policies.iter().filter_map(|k| index.find(k)).collect()), missing)
        };
        let namespace = index.namespace(&workload.namespace).map(|b| &**b);
        Self { global: Some(index.global()), namespace, selected, missing }
    }
    /// Why the configuration in scope cannot be enforced, if so.
    fn broken(&self) -> Option<Refusal> {
        let of_buckets = [self.global, self.namespace].into_iter().flatten().filter_map(Bucket::unusable);
        let of_selected = match &self.selected {
            Selected::Bound(b, _) => b.unusable(),
            Selected::ByName(l) => {
                l.iter().copied().filter(|p| matches!(p.body, PolicyBody::Unusable { .. })).min_by_key(|p| &p.key)
            }
        };
        if let Some(p) = of_buckets.chain(of_selected).min_by_key(|p| &p.key) {
            let why = match &p.body {
                PolicyBody::Unusable { why } => why,
                PolicyBody::Rules { .. } => "",
            };
            return Some(Refusal::new(Reason::PolicyUnusable, format!("{}: {why}", p.key)));
        }
        self.missing.map(|key| Refusal::new(Reason::PolicyUnknown, key.to_string()))
    }
    /// Enforced ALLOW policies in scope.
    fn allows(&self) -> usize {
        let selected = match &self.selected {
            Selected::Bound(b, _) => b.allows(),
            Selected::ByName(l) => l.iter().filter(|p| enforced(p, Action::Allow)).count(),
        };
        [self.global, self.namespace].into_iter().flatten().map(|b| b.allows).sum::<usize>() + selected
    }
    /// Keys of the enforced selector policies of one action that match, in no order.
    fn selected<'s>(
        &'s self,
        action: Action,
        facts: &'s Facts<'s>,
        anchors: &'s [Anchor],
    ) -> Box<dyn Iterator<Item = &'s PolicyKey> + 's> {
        match &self.selected {
            Selected::ByName(l) => {
                let of_action = l.iter().filter(move |p| enforced(p, action));
                Box::new(of_action.filter(|p| facts.matching_rule(p).is_some()).map(|p| &p.key))
            }
            Selected::Bound(b, _) if b.resolved().len() <= FEW => {
                let of_action = b.resolved().iter().filter(move |p| enforced(p, action));
                Box::new(of_action.filter(|p| facts.matching_rule(p).is_some()).map(|p| &p.key))
            }
            Selected::Bound(b, mesh) => {
                let (table, general) = match action {
                    Action::Deny => (&mesh.deny, b.general_deny()),
                    Action::Allow => (&mesh.allow, b.general_allow()),
                };
                let named = table.anchored(anchors).filter(|r| facts.matched_by(r) && b.binds(&r.policy().key));
                Box::new(named.chain(general.iter().filter(|r| facts.matched_by(r))).map(|r| &r.policy().key))
            }
        }
    }
}
/// Up to so many selector policies are simply evaluated; the mesh-wide index pays off above.
const FEW: usize = 8;

fn enforced(p: &Policy, of: Action) -> bool {
    matches!(&p.body, PolicyBody::Rules { action, dry_run: false, .. } if *action == of)
}

/// What rules are matched against, as far as a connection shows it.
pub(crate) struct Facts<'a> {
    view: &'a Viewpoint,
    peer: Option<Peer<'a>>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
}
/// A verified peer, in the pieces rules ask for.
struct Peer<'a> {
    trust_domain: &'a str,
    /// `/ns/<ns>/sa/<sa>`.
    path: &'a str,
    namespace: &'a str,
    account: &'a str,
    /// Its trust domain is ours: every name of ours is a name of its.
    own: bool,
}
impl<'a> Peer<'a> {
    fn of(view: &Viewpoint, id: &'a SpiffeId) -> Self {
        let trust_domain = id.trust_domain();
        Self {
            trust_domain,
            path: id.principal().strip_prefix(trust_domain).unwrap_or_default(),
            namespace: id.namespace(),
            account: id.service_account(),
            own: view.is_own_trust_domain(trust_domain),
        }
    }
}
impl<'a> Facts<'a> {
    pub(crate) fn of(view: &'a Viewpoint, conn: &InboundConn<'a>) -> Self {
        Self {
            view,
            peer: conn.identity.map(|id| Peer::of(view, id)),
            source: conn.client.ip(),
            destination: conn.dst.ip().to_canonical(),
            port: conn.dst.port(),
        }
    }
    /// Port asked for.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }
    fn matched_by(&self, r: &RuleRef) -> bool {
        r.rule().is_some_and(|rule| self.rule(rule))
    }
    /// The first matching rule; `None` for an unusable policy, which never *matches*.
    fn matching_rule(&self, p: &Policy) -> Option<usize> {
        match &p.body {
            PolicyBody::Rules { rules, .. } => rules.iter().position(|r| self.rule(r)),
            PolicyBody::Unusable { .. } => None,
        }
    }
    fn rule(&self, r: &Rule) -> bool {
        r.clauses.iter().all(|c| self.clause(c))
    }
    pub(crate) fn clause(&self, c: &Clause) -> bool {
        c.matches.is_empty() || c.matches.iter().any(|m| self.matches(m))
    }
    fn matches(&self, m: &Match) -> bool {
        !m.is_empty() && self.fields(m)
    }
    /// Whether every field that is there holds.
    pub(crate) fn fields(&self, m: &Match) -> bool {
        let peer = self.peer.as_ref();
        let namespace = peer.map(|p| p.namespace);
        kind(&m.destination_ports, |p| *p == self.port)
            && kind(&m.principals, |t| peer.is_some_and(|p| self.principal(p, t)))
            && kind(&m.service_accounts, |(ns, sa)| peer.is_some_and(|p| p.namespace == &**ns && p.account == &**sa))
            && kind(&m.namespaces, |t| t.matches(namespace))
            && kind(&m.trust_domains, |t| peer.is_some_and(|p| self.names(p).any(|td| t.matches(Some(td)))))
            && kind(&m.source_ips, |net| net.contains(&self.source))
            && kind(&m.destination_ips, |net| net.contains(&self.destination))
    }
    /// All names of a peer's trust domain: its own, and every one of ours when it is one of ours.
    fn names<'s>(&'s self, peer: &'s Peer<'a>) -> impl Iterator<Item = &'s str> {
        std::iter::once(peer.trust_domain).chain(self.view.own_trust_domains().filter(|_| peer.own))
    }
    fn principal(&self, peer: &Peer<'a>, text: &TextMatch) -> bool {
        self.names(peer).any(|td| joined_matches(text, td, peer.path))
    }
}
/// Whether a text match accepts `head` and `tail` joined, without joining them.
fn joined_matches(text: &TextMatch, head: &str, tail: &str) -> bool {
    match text {
        TextMatch::Exact(x) => bare(x).strip_prefix(head) == Some(tail),
        TextMatch::Prefix(x) => {
            let x = bare(x);
            head.starts_with(x) || x.strip_prefix(head).is_some_and(|rest| tail.starts_with(rest))
        }
        TextMatch::Suffix(x) => tail.ends_with(&**x) || x.strip_suffix(tail).is_some_and(|rest| head.ends_with(rest)),
        TextMatch::Presence => true,
    }
}
/// A principal as policies are meant to write it; one written as a URI would otherwise never match, which in a DENY
/// policy is fail-open.
fn bare(principal: &str) -> &str {
    principal.strip_prefix("spiffe://").unwrap_or(principal)
}
/// One kind of a match: no positive values or any of them, and none of the negative ones.
pub(crate) fn kind<T>(values: &Values<T>, is: impl Fn(&T) -> bool) -> bool {
    (values.any().is_empty() || values.any().iter().any(&is)) && !values.none().iter().any(&is)
}

/// What one policy in scope says about a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explained {
    /// The policy.
    pub policy: PolicyKey,
    /// Where its object came from.
    pub origin: Option<Arc<Origin>>,
    /// What it says.
    pub outcome: Outcome,
}
/// What one policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A rule matches.
    Matches {
        /// ALLOW or DENY.
        action: Action,
        /// Only logged.
        dry_run: bool,
        /// The first matching rule, counted from 0.
        rule: usize,
    },
    /// No rule matches.
    NoMatch {
        /// ALLOW or DENY.
        action: Action,
        /// Only logged.
        dry_run: bool,
    },
    /// It could not be understood and denies.
    Unusable {
        /// What was wrong.
        why: Arc<str>,
    },
    /// The workload names it and it is not there: denies.
    Unknown,
}
/// Every policy in scope of `workload` and what it says, sorted by key. Reads all policies: for tools, and the oracle
/// of the property tests.
pub fn explain(snap: &Snapshot, workload: &Workload, conn: &InboundConn<'_>) -> Vec<Explained> {
    let workload = snap.find_workload(&workload.uid).map_or(workload, |w| w);
    let facts = Facts::of(snap.view(), conn);
    let bound = |p: &Policy| match p.scope {
        Scope::Global => true,
        Scope::Namespace => p.key.namespace == workload.namespace,
        Scope::Selector => false,
    };
    // A workload may also name a policy of another scope: it binds it all the same, once.
    let mut keys: Vec<&PolicyKey> =
        snap.policies().filter(|p| bound(p)).map(|p| &p.key).chain(workload.policies.iter()).collect();
    keys.sort_unstable();
    keys.dedup();
    let outcome = |p: &Arc<Policy>| match &p.body {
        PolicyBody::Unusable { why } => Outcome::Unusable { why: Arc::clone(why) },
        PolicyBody::Rules { action, dry_run, .. } => match facts.matching_rule(p) {
            Some(rule) => Outcome::Matches { action: *action, dry_run: *dry_run, rule },
            None => Outcome::NoMatch { action: *action, dry_run: *dry_run },
        },
    };
    keys.into_iter()
        .map(|key| match snap.find_policy(key) {
            Some(p) => Explained { policy: key.clone(), origin: p.origin.clone(), outcome: outcome(p) },
            None => Explained { policy: key.clone(), origin: None, outcome: Outcome::Unknown },
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests;
