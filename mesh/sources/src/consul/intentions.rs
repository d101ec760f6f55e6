//! Consul's intentions as AuthorizationPolicies that deny: they take away, and never widen what other policies say.
//!
//! Owns the order of intentions (exact names before wildcards, the destination's before the source's) and the default of
//! Consul. An intention with permissions of layer 7 is refused, and its source with it: what it would let through in part must
//! not pass as a whole. Pure. Upstream: `/v1/connect/intentions`. Downstream: [`super::catalog`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::Origin;
use serde_json::{Value, json};

use super::instance::text;
use crate::diagnostics::{Problem, Severity};

/// Namespace and service account.
pub(super) type Account = (Arc<str>, Arc<str>);

/// All intentions.
#[derive(Debug)]
pub(super) struct Intentions {
    /// By destination and source; `*` is any.
    rules: BTreeMap<(String, String), bool>,
    /// What there is no intention for.
    allowed: bool,
    problems: Vec<Problem>,
}

impl Default for Intentions {
    /// None: everything is allowed.
    fn default() -> Self {
        Self { rules: BTreeMap::new(), allowed: true, problems: Vec::new() }
    }
}

impl Intentions {
    /// Reads `{"Intentions": [...], "Allowed": bool}`: the answer, and Consul's default.
    pub fn read(answer: &Value) -> Result<Self, String> {
        let list = &answer["Intentions"];
        let none = Vec::new();
        let list = if list.is_null() { &none } else { list.as_array().ok_or("the list of intentions is no list")? };
        let mut out = Self { allowed: answer["Allowed"].as_bool().unwrap_or(false), ..Self::default() };
        for intention in list {
            out.take(intention);
        }
        Ok(out)
    }

    fn take(&mut self, intention: &Value) {
        let (source, destination) = (text(intention, "SourceName").to_owned(), text(intention, "DestinationName").to_owned());
        let elsewhere = ["SourceNS", "DestinationNS", "SourcePartition", "DestinationPartition"]
            .into_iter()
            .any(|key| !matches!(text(intention, key), "" | "default"));
        let peer = !text(intention, "SourcePeer").is_empty() || !text(intention, "SourceSamenessGroup").is_empty();
        let is_service = matches!(text(intention, "SourceType"), "" | "consul");
        if elsewhere || peer || !is_service {
            let message = "its source or destination is in another namespace, partition or peer, which reach nothing here";
            self.complain(&source, &destination, "Sources", message, "");
            return;
        }
        let permissions = intention["Permissions"].as_array().is_some_and(|all| !all.is_empty());
        let (action, jwt) = (text(intention, "Action"), !intention["JWT"].is_null());
        let allowed = match (action, permissions || jwt) {
            ("allow", false) => true,
            ("deny", false) => false,
            (_, true) => {
                let message = "permissions of layer 7 are not understood, so its source is denied";
                let fix = "allow or deny the source, and write an AuthorizationPolicy for the rest";
                self.complain(&source, &destination, "Permissions", message, fix);
                false
            }
            _ => {
                self.complain(&source, &destination, "Action", "neither allow nor deny, so its source is denied", "");
                false
            }
        };
        self.rules.insert((destination, source), allowed);
    }
    fn complain(&mut self, source: &str, destination: &str, field: &str, message: &str, fix: &str) {
        self.problems.push(Problem {
            severity: Severity::Error,
            origin: Origin {
                place: "consul intentions".into(),
                line: 0,
                object: format!("intention {source} to {destination}").into(),
            },
            field: field.into(),
            message: message.into(),
            fix: fix.into(),
            code: Some("consul"),
        });
    }
    /// What is wrong with them.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter()
    }
    /// Whether they let everything pass.
    pub fn is_open(&self) -> bool {
        self.allowed && self.rules.values().all(|allowed| *allowed)
    }

    /// The rule of the policy that denies what may not come to a service; `None` where everything may. `accounts`: of a source.
    /// `through`: who brings what was judged already.
    pub fn rule(
        &self,
        destination: &str,
        domain: &str,
        accounts: impl Fn(&str) -> BTreeSet<Account>,
        through: BTreeSet<Account>,
    ) -> Option<Value> {
        let find = |destination: &str, source: &str| self.rules.get(&(destination.to_owned(), source.to_owned())).copied();
        let exact = find(destination, "*");
        let others = exact.or_else(|| find("*", "*")).unwrap_or(self.allowed);
        let mut named: BTreeMap<&str, bool> = BTreeMap::new();
        // Of two the more exact: the destination's, which comes second.
        for wanted in ["*", destination] {
            let of_it = self.rules.iter().filter(|((d, s), _)| d == wanted && s != "*");
            named.extend(of_it.filter(|_| wanted != "*" || exact.is_none()).map(|((_, s), allowed)| (s.as_str(), *allowed)));
        }
        let of = |wanted: bool| -> BTreeSet<Account> {
            named.iter().filter(|(_, allowed)| **allowed == wanted).flat_map(|(source, _)| accounts(source)).collect()
        };
        let denied = of(false);
        let principals = |all: &BTreeSet<Account>| -> Vec<String> {
            all.iter().map(|(namespace, account)| format!("{domain}/ns/{namespace}/sa/{account}")).collect()
        };
        if others {
            return (!denied.is_empty()).then(|| json!({ "from": [{ "source": { "principals": principals(&denied) } }] }));
        }
        // Who shares an account with somebody who is denied is denied too.
        let mut allowed: BTreeSet<Account> = of(true).difference(&denied).cloned().collect();
        allowed.extend(through);
        if allowed.is_empty() {
            return Some(json!({}));
        }
        Some(json!({ "from": [{ "source": { "notPrincipals": principals(&allowed) } }] }))
    }
}
