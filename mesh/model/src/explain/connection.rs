//! What each policy of layer 4 says about a connection, and which condition kept it from matching.
//!
//! Upstream: `snapshot`, [`crate::authz`], whose scope and verdicts these are. Downstream: [`crate::explain`].
use super::conditions::{Shown, closest, nearly, of_match};
use super::report::{Effect, Place, PolicyTold};
use crate::authz::{Explained, Facts, Outcome, explain};
use crate::conn::InboundConn;
use crate::policy::{Action, Clause, PolicyBody, Rule};
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// Every policy in scope of `workload`: those that matter first.
pub(super) fn policies(snap: &Snapshot, workload: &Workload, conn: &InboundConn<'_>) -> Vec<PolicyTold> {
    let facts = Facts::of(snap.view(), conn);
    let shown = shown(conn);
    let mut told: Vec<PolicyTold> = explain(snap, workload, conn).iter().map(|e| policy(snap, e, &facts, &shown)).collect();
    told.sort_by(|a, b| (a.effect, &a.policy).cmp(&(b.effect, &b.policy)));
    told
}

/// What rules may ask of a connection, as text.
pub(super) fn shown(conn: &InboundConn<'_>) -> Shown {
    let peer = |f: &dyn Fn(&crate::id::SpiffeId) -> String| conn.identity.map_or_else(|| "none (plaintext)".into(), f);
    Shown {
        principal: peer(&|id| id.principal().to_owned()),
        account: peer(&|id| format!("{}/{}", id.namespace(), id.service_account())),
        namespace: peer(&|id| id.namespace().to_owned()),
        trust_domain: peer(&|id| id.trust_domain().to_owned()),
        source: conn.client.ip().to_string(),
        destination: conn.dst.ip().to_canonical().to_string(),
        port: conn.dst.port().to_string(),
    }
}

fn policy(snap: &Snapshot, e: &Explained, facts: &Facts<'_>, shown: &Shown) -> PolicyTold {
    let action = |a: Action| match a {
        Action::Allow => "ALLOW",
        Action::Deny => "DENY",
    };
    let mut told = PolicyTold {
        policy: e.policy.to_string(),
        action: String::new(),
        dry_run: false,
        effect: Effect::Missing,
        rule: None,
        failed: Vec::new(),
        place: e.origin.as_deref().map(Place::of),
    };
    match &e.outcome {
        Outcome::Matches { action: a, dry_run, rule } => {
            (told.action, told.dry_run) = (action(*a).into(), *dry_run);
            (told.effect, told.rule) = (Effect::Matched, Some(*rule));
        }
        Outcome::NoMatch { action: a, dry_run } => {
            (told.action, told.dry_run) = (action(*a).into(), *dry_run);
            let rules = match snap.find_policy(&e.policy).map(|p| &p.body) {
                Some(PolicyBody::Rules { rules, .. }) => rules.as_slice(),
                _ => &[],
            };
            (told.effect, told.rule, told.failed) = nearest(rules, facts, shown);
        }
        Outcome::Unusable { why } => (told.effect, told.failed) = (Effect::Unusable, vec![why.to_string()]),
        Outcome::Unknown => told.failed.push("the workload names it and it is not there".into()),
    }
    told
}

/// Of rules that do not match, the one that comes closest.
fn nearest(rules: &[Rule], facts: &Facts<'_>, shown: &Shown) -> (Effect, Option<usize>, Vec<String>) {
    let able = rules.iter().enumerate().filter(|(_, r)| !never(r));
    let all = able.map(|(at, r)| (at, r, r.clauses.iter().flat_map(|c| failed(c, facts, shown)).collect::<Vec<_>>()));
    match all.min_by_key(|(.., failed)| failed.len()) {
        Some((at, rule, failed)) => (nearly(conditions(rule, shown), failed.len()), Some(at), failed),
        None => (Effect::Never, None, vec![NO_RULES.into()]),
    }
}
/// A policy without rules, or with none that a connection could match.
const NO_RULES: &str = "it has no rule that could match; as an ALLOW policy it makes every call need another one";
/// Conditions of a rule: the most its alternatives have.
fn conditions(rule: &Rule, shown: &Shown) -> usize {
    rule.clauses.iter().map(|c| c.matches.iter().map(|m| of_match(m, shown).len()).max().unwrap_or(0)).sum()
}
/// A clause of alternatives none of which says anything is false whatever the connection.
fn never(rule: &Rule) -> bool {
    rule.clauses.iter().any(|c| !c.matches.is_empty() && c.matches.iter().all(crate::policy::Match::is_empty))
}
/// What fails in a clause: nothing when it holds, else the parts of the alternative that comes closest.
fn failed(clause: &Clause, facts: &Facts<'_>, shown: &Shown) -> Vec<String> {
    if facts.clause(clause) {
        return Vec::new();
    }
    let of = |m| of_match(m, shown).into_iter().filter(|(one, _)| !facts.fields(one)).map(|(_, words)| words).collect();
    closest(clause.matches.iter().map(of)).map(|(_, failed)| failed).unwrap_or_default()
}
