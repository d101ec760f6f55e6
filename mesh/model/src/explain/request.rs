//! What each policy of layer 7 says about a request, and which condition kept it from matching.
//!
//! Upstream: `snapshot`, [`crate::authz_l7`], whose scope and verdicts these are. Downstream: [`crate::explain`].
use super::conditions::{Shown, closest, halves, nearly, of_match, text, told};
use super::connection::shown;
use super::report::{Effect, Place, PolicyTold};
use crate::authz_l7::{InScope, Judge, L7Facts};
use crate::conn::InboundConn;
use crate::l7::policy::{Condition, HeaderKey, L7Action, L7Body, L7Policy, L7Rule, L7Source, Operation, PathPattern};
use crate::snapshot::Snapshot;
use std::fmt::Display;

/// Every policy in scope: those that matter first.
pub(super) fn policies(snap: &Snapshot, scope: &InScope, facts: &L7Facts<'_>) -> Vec<PolicyTold> {
    let conn = InboundConn { client: facts.client.into(), dst: facts.destination, identity: facts.peer };
    let asked = Asked { judge: Judge::of(snap, facts), facts, shown: shown(&conn) };
    let mut all: Vec<PolicyTold> = scope.policies().map(|p| asked.policy(p)).collect();
    all.sort_by(|a, b| (a.effect, &a.policy).cmp(&(b.effect, &b.policy)));
    // A policy may bind by two of its targets.
    all.dedup();
    all
}

/// A policy that binds what is called, where nobody asks it.
pub(super) fn never(policy: &L7Policy, why: &str) -> PolicyTold {
    PolicyTold { effect: Effect::Never, failed: vec![why.to_owned()], ..plain(policy) }
}

fn plain(policy: &L7Policy) -> PolicyTold {
    let (action, dry_run) = match &policy.body {
        L7Body::Rules { action, dry_run, .. } => (
            match action {
                L7Action::Allow => "ALLOW",
                L7Action::Deny => "DENY",
                L7Action::Audit => "AUDIT",
                L7Action::Custom { .. } => "CUSTOM",
            },
            *dry_run,
        ),
        L7Body::Unusable { .. } => ("", false),
    };
    PolicyTold {
        policy: policy.key.to_string(),
        action: action.into(),
        dry_run,
        effect: Effect::NotMatched,
        rule: None,
        failed: Vec::new(),
        place: policy.origin.as_deref().map(Place::of),
    }
}

struct Asked<'a> {
    judge: Judge<'a>,
    facts: &'a L7Facts<'a>,
    shown: Shown,
}
impl Asked<'_> {
    fn policy(&self, policy: &L7Policy) -> PolicyTold {
        let mut told = plain(policy);
        match &policy.body {
            L7Body::Unusable { why } => (told.effect, told.failed) = (Effect::Unusable, vec![why.to_string()]),
            L7Body::Rules { action, rules, .. } => {
                let allow = *action == L7Action::Allow;
                let first = self.judge.first(rules, allow);
                (told.effect, told.rule, told.failed) =
                    first.map_or_else(|| self.nearest(rules, allow), |rule| (Effect::Matched, Some(rule), Vec::new()));
            }
        }
        told
    }
    /// Of rules that do not match, the one that comes closest.
    fn nearest(&self, rules: &[L7Rule], allow: bool) -> (Effect, Option<usize>, Vec<String>) {
        match closest(rules.iter().map(|r| self.failed(r, allow))) {
            Some((at, failed)) => {
                let conditions = rules.get(at).map_or(0, |r| self.conditions(r));
                (nearly(conditions, failed.len()), Some(at), failed)
            }
            None => {
                (Effect::Never, None, vec!["it has no rules; as an ALLOW policy it makes every call need another one".into()])
            }
        }
    }
    /// Conditions of a rule: the most its alternatives have.
    fn conditions(&self, rule: &L7Rule) -> usize {
        let from = rule.from.iter().map(|s| self.source(s).len()).max().unwrap_or(0);
        let to = rule.to.iter().map(|o| self.operation(o).len()).max().unwrap_or(0);
        from + to + rule.when.len()
    }
    /// What does not hold in a rule, of alternatives in the one that comes closest.
    fn failed(&self, rule: &L7Rule, allow: bool) -> Vec<String> {
        let mut out = Vec::new();
        let holds = |r: L7Rule| self.judge.rule(&r, allow);
        let left = |parts: Vec<(L7Rule, String)>| -> Vec<String> {
            parts.into_iter().filter(|(part, _)| !self.judge.rule(part, allow)).map(|(_, words)| words).collect()
        };
        if !holds(L7Rule::new(rule.from.clone(), Vec::new(), Vec::new())) {
            out.extend(closest(rule.from.iter().map(|s| left(self.source(s)))).map(|(_, failed)| failed).unwrap_or_default());
        }
        if !holds(L7Rule::new(Vec::new(), rule.to.clone(), Vec::new())) {
            out.extend(closest(rule.to.iter().map(|o| left(self.operation(o)))).map(|(_, failed)| failed).unwrap_or_default());
        }
        out.extend(left(rule.when.iter().map(|c| self.condition(c)).collect()));
        out
    }
    fn source(&self, source: &L7Source) -> Vec<(L7Rule, String)> {
        let from = |s: L7Source| L7Rule::new(vec![s], Vec::new(), Vec::new());
        let peer = of_match(&source.peer, &self.shown).into_iter();
        let mut out: Vec<(L7Rule, String)> =
            peer.map(|(m, words)| (from(L7Source { peer: m, ..L7Source::default() }), words)).collect();
        for half in halves(&source.remote_ips) {
            let words = told("the client's address", &self.facts.remote.to_string(), &half, ToString::to_string);
            out.push((from(L7Source { remote_ips: half, ..L7Source::default() }), words));
        }
        for half in halves(&source.request_principals) {
            let words = told("the request principal", &self.principal(), &half, text);
            out.push((from(L7Source { request_principals: half, ..L7Source::default() }), words));
        }
        out
    }
    fn operation(&self, operation: &Operation) -> Vec<(L7Rule, String)> {
        let http =
            |f: fn(&crate::authz_l7::HttpFacts<'_>) -> String| self.facts.http.as_ref().map_or_else(|| NO_REQUEST.into(), f);
        let mut out = Vec::new();
        macro_rules! kind {
            ($field:ident, $name:literal, $actual:expr, $show:expr) => {
                for half in halves(&operation.$field) {
                    let words = told($name, &$actual, &half, $show);
                    let to = vec![Operation { $field: half, ..Operation::default() }];
                    out.push((L7Rule::new(Vec::new(), to, Vec::new()), words));
                }
            };
        }
        kind!(methods, "the method", http(|h| h.method.to_owned()), text);
        kind!(paths, "the path", http(|h| h.path.to_owned()), path);
        kind!(hosts, "the host", http(|h| h.authority.to_owned()), text);
        kind!(ports, "the port", self.facts.destination.port().to_string(), ToString::to_string);
        out
    }
    fn condition(&self, condition: &Condition) -> (L7Rule, String) {
        let (name, actual) = match condition {
            Condition::Peer(m) => {
                let words: Vec<String> = of_match(m, &self.shown).into_iter().map(|(_, words)| words).collect();
                return (L7Rule::new(Vec::new(), Vec::new(), vec![condition.clone()]), words.join(", "));
            }
            Condition::RemoteIp(_) => ("remote.ip".to_owned(), self.facts.remote.to_string()),
            Condition::Sni(_) => ("connection.sni".to_owned(), self.facts.sni.unwrap_or("none").to_owned()),
            Condition::RequestPrincipal(_) => ("request.auth.principal".to_owned(), self.principal()),
            Condition::Header(key, _) => self.header(key),
            Condition::Claim(path, _) => {
                let path = path.join("][");
                let token =
                    if self.facts.http.is_some_and(|h| h.token.is_some()) { "other" } else { "not there: no verified token" };
                (format!("request.auth.claims[{path}]"), token.to_owned())
            }
        };
        let words = match condition {
            Condition::Peer(_) => String::new(),
            Condition::RemoteIp(v) => both(&name, &actual, v, ToString::to_string),
            Condition::Sni(v) | Condition::RequestPrincipal(v) | Condition::Header(_, v) => both(&name, &actual, v, text),
            Condition::Claim(_, v) => both(&name, &actual, v, super::route::string_match),
        };
        (L7Rule::new(Vec::new(), Vec::new(), vec![condition.clone()]), words)
    }
    fn header(&self, key: &HeaderKey) -> (String, String) {
        let Some(http) = self.facts.http else { return (format!("{key:?}"), NO_REQUEST.into()) };
        match key {
            HeaderKey::Authority => ("request.headers[:authority]".into(), http.authority.to_owned()),
            HeaderKey::Method => ("request.headers[:method]".into(), http.method.to_owned()),
            HeaderKey::Name(name) => {
                let values: Vec<_> = http.headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes())).collect();
                let actual = if values.is_empty() { "not there".into() } else { values.join(", ") };
                (format!("request.headers[{name}]"), actual)
            }
        }
    }
    fn principal(&self) -> String {
        match self.facts.http {
            None => NO_REQUEST.into(),
            Some(http) => {
                http.token.map_or_else(|| "none (no verified token)".into(), |t| format!("{}/{}", t.issuer(), t.subject()))
            }
        }
    }
}
/// Where a request would be needed and bytes are carried.
const NO_REQUEST: &str = "not known (bytes, no request)";

fn both<T: Clone, D: Display>(
    name: &str,
    actual: &str,
    values: &crate::policy::Values<T>,
    show: impl Fn(&T) -> D + Copy,
) -> String {
    halves(values).iter().map(|half| told(name, actual, half, show)).collect::<Vec<_>>().join("; ")
}
fn path(p: &PathPattern) -> String {
    match p {
        PathPattern::Text(t) => text(t),
        PathPattern::Template(t) => t.to_string(),
    }
}
