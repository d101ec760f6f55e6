//! PeerAuthentication → DENY policies on plaintext (waypoint §1.8).
//!
//! A PeerAuthentication that is not understood means STRICT wherever it may apply: the most it could have asked for.

use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch};

use super::authorization::{OBJECT_META, selector};
use super::intern::Labels;
use super::object::{Mode, PeerAuthentication, Reader};
use super::read::{self, Bad, Read};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// Name, in the root namespace, of the policy that refuses all plaintext.
pub const STATIC_STRICT: &str = "istio_converted_static_strict";

pub(super) fn read(r: &mut Reader<'_>, node: &Node<'_>) -> PeerAuthentication {
    let selected = match read::map(node, "spec") {
        Ok(Some(spec)) => selector(spec, r.pool),
        Ok(None) => Ok(Labels::default()),
        Err(bad) => Err(bad),
    };
    let meta = node.get("metadata").unwrap_or(node);
    let created = meta.get("creationTimestamp").and_then(Node::text).unwrap_or_default();
    let created = r.pool.text(created);
    let outcome = selected.and_then(|s| Ok((s.clone(), content(node, !s.is_empty())?)));
    match outcome {
        Ok((selector, (mode, ports))) => PeerAuthentication { selector, mode, ports, created, forced: false },
        Err(mut bad) => {
            bad.message.push_str("; until it is corrected, its scope is STRICT");
            r.report(node, &bad, Severity::Error);
            let selector = match read::map(node, "spec") {
                Ok(Some(spec)) => selector(spec, r.pool).unwrap_or_default(),
                _ => Labels::default(),
            };
            PeerAuthentication { selector, mode: Mode::Strict, ports: Vec::new(), created, forced: true }
        }
    }
}

type Content = (Mode, Vec<(u16, Mode)>);
fn content<'p>(node: &'p Node<'p>, selects: bool) -> Read<'p, Content> {
    read::only(node, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    if let Some(meta) = node.get("metadata") {
        read::only(meta, OBJECT_META)?;
    }
    let Some(spec) = read::map(node, "spec")? else { return Ok((Mode::Unset, Vec::new())) };
    read::only(spec, &["selector", "mtls", "portLevelMtls"])?;
    let mode = match read::map(spec, "mtls")? {
        None => Mode::Unset,
        Some(m) => mode(m)?,
    };
    let mut ports = Vec::new();
    if let Some(levels) = read::map(spec, "portLevelMtls")? {
        for e in read::entries(levels)? {
            let port = e.key.parse::<u16>().ok().filter(|p| *p != 0);
            let Some(port) = port else {
                return Err(Bad::value(&e.node, format!("`{}` is not a port", e.key), "write the workload's port, 1 to 65535"));
            };
            ports.push((port, self::mode(&e.node)?));
        }
        if !selects && !ports.is_empty() {
            return Err(Bad::value(levels, "`portLevelMtls` needs a selector", "add `selector.matchLabels`"));
        }
    }
    ports.sort_unstable_by_key(|(p, _)| *p);
    Ok((mode, ports))
}
fn mode<'p>(m: &'p Node<'p>) -> Read<'p, Mode> {
    read::only(m, &["mode"])?;
    match m.get("mode") {
        None => Ok(Mode::Unset),
        Some(n) => match read::scalar(n)? {
            "UNSET" => Ok(Mode::Unset),
            "DISABLE" | "PERMISSIVE" => Ok(Mode::Permissive),
            "STRICT" => Ok(Mode::Strict),
            t => Err(Bad::value(n, format!("`{t}` is not an mTLS mode"), "write STRICT, PERMISSIVE, DISABLE or UNSET")),
        },
    }
}

fn plaintext() -> Clause {
    let mut m = Match::default();
    m.principals.set_none(vec![TextMatch::Presence]);
    Clause { matches: vec![m] }
}
fn deny(key: PolicyKey, rules: Vec<Rule>, origin: Option<Arc<Origin>>) -> Arc<Policy> {
    let body = PolicyBody::Rules { action: Action::Deny, dry_run: false, rules };
    Arc::new(Policy { key, scope: Scope::Selector, body, origin })
}
/// The policy that refuses all plaintext; bound by name to every STRICT workload.
pub(super) fn static_strict(root_namespace: &str) -> Arc<Policy> {
    deny(PolicyKey::new(root_namespace, STATIC_STRICT), vec![Rule { clauses: vec![plaintext()] }], None)
}

/// What one selected workload gets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Plaintext everywhere.
    Nothing,
    /// The static policy.
    Strict,
    /// The PeerAuthentication's own policy: plaintext refused everywhere but on these ports.
    StrictExcept(Vec<u16>),
    /// The PeerAuthentication's own policy: plaintext refused on these ports only.
    StrictOn(Vec<u16>),
}
/// The effect of a PeerAuthentication on the workloads it selects, given the mode they would otherwise inherit.
pub(super) fn effect(pa: &PeerAuthentication, inherited: Mode) -> Effect {
    let mode = if pa.mode == Mode::Unset { inherited } else { pa.mode };
    let ports = |want: bool| -> Vec<u16> {
        pa.ports.iter().filter(|(_, m)| *m != Mode::Unset && (*m == Mode::Strict) == want).map(|(p, _)| *p).collect()
    };
    if mode == Mode::Strict {
        let open = ports(false);
        if open.is_empty() { Effect::Strict } else { Effect::StrictExcept(open) }
    } else {
        let closed = ports(true);
        if closed.is_empty() { Effect::Nothing } else { Effect::StrictOn(closed) }
    }
}
/// With the name of a PeerAuthentication, that of the policy made from it. No object has `_` in its name.
const CONVERTED: &str = "converted_peer_authentication_";

/// Key of the policy made from a PeerAuthentication with port modes.
pub(super) fn converted_key(namespace: &Arc<str>, name: &str) -> PolicyKey {
    PolicyKey { namespace: Arc::clone(namespace), name: format!("{CONVERTED}{name}").into() }
}
/// The most that a policy of this key can refuse, where the key says so: those made from PeerAuthentications deny plaintext, on
/// some ports or on all.
pub(crate) fn at_most(key: &PolicyKey) -> Option<PolicyBody> {
    let known = *key.name == *STATIC_STRICT || key.name.starts_with(CONVERTED);
    known.then(|| PolicyBody::Rules { action: Action::Deny, dry_run: false, rules: vec![Rule { clauses: vec![plaintext()] }] })
}
/// That policy, when `effect` needs one.
pub(super) fn converted(key: PolicyKey, effect: &Effect, origin: &Arc<Origin>) -> Option<Arc<Policy>> {
    let rules = match effect {
        Effect::Nothing | Effect::Strict => return None,
        Effect::StrictExcept(ports) => {
            let mut clauses = vec![plaintext()];
            for p in ports {
                let mut m = Match::default();
                m.destination_ports.set_none(vec![*p]);
                clauses.push(Clause { matches: vec![m] });
            }
            vec![Rule { clauses }]
        }
        // One rule per port; both constraints stand in one match, as both must hold.
        Effect::StrictOn(ports) => ports
            .iter()
            .map(|p| {
                let mut m = Match::default();
                m.principals.set_none(vec![TextMatch::Presence]);
                m.destination_ports.set_any(vec![*p]);
                Rule { clauses: vec![Clause { matches: vec![m] }] }
            })
            .collect(),
    };
    Some(deny(key, rules, Some(Arc::clone(origin))))
}
