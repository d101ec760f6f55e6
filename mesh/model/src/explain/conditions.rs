//! Which conditions of a rule do not hold, found by asking the rule engine about each condition by itself.
//!
//! Owns taking rules apart and naming their parts. Refuses to judge: whether a part holds is said by the very function that
//! judges the whole ([`crate::authz`], [`crate::authz_l7`], [`crate::l7::select`]). Downstream: the other modules here.
use super::report::Effect;
use crate::policy::{Match, TextMatch, Values};
use std::fmt::Display;

/// Values shown of a list.
const SHOWN: usize = 6;

/// What a connection shows, as text.
pub(super) struct Shown {
    pub(super) principal: String,
    pub(super) account: String,
    pub(super) namespace: String,
    pub(super) trust_domain: String,
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) port: String,
}

/// The positive and the negative half of some values, those that are there.
pub(super) fn halves<T: Clone>(values: &Values<T>) -> Vec<Values<T>> {
    let any = Values::new(values.any().to_vec(), Vec::new());
    let none = Values::new(Vec::new(), values.none().to_vec());
    [any, none].into_iter().filter(|v| !v.is_empty()).collect()
}

/// One half of a kind in words: what it is and what was wanted.
pub(super) fn told<T, D: Display>(name: &str, actual: &str, half: &Values<T>, show: impl Fn(&T) -> D) -> String {
    if half.any().is_empty() {
        format!("{name} is {actual}, which is excluded ({})", list(half.none(), show))
    } else {
        format!("{name} is {actual}, wanted {}", list(half.any(), show))
    }
}
fn list<T, D: Display>(values: &[T], show: impl Fn(&T) -> D) -> String {
    let mut out: Vec<String> = values.iter().take(SHOWN).map(|v| show(v).to_string()).collect();
    if let Some(more) = values.len().checked_sub(SHOWN).filter(|n| *n > 0) {
        out.push(format!("{more} more"));
    }
    out.join(" or ")
}

/// As policies write it.
pub(super) fn text(m: &TextMatch) -> String {
    match m {
        TextMatch::Exact(x) => x.to_string(),
        TextMatch::Prefix(x) => format!("{x}*"),
        TextMatch::Suffix(x) => format!("*{x}"),
        TextMatch::Presence => "*".into(),
    }
}

/// The parts of a match, each a match of its own with its words.
pub(super) fn of_match(m: &Match, shown: &Shown) -> Vec<(Match, String)> {
    let mut out = Vec::new();
    macro_rules! kind {
        ($field:ident, $name:literal, $actual:ident, $show:expr) => {
            for half in halves(&m.$field) {
                let words = told($name, &shown.$actual, &half, $show);
                out.push((Match { $field: half, ..Match::default() }, words));
            }
        };
    }
    kind!(principals, "the source principal", principal, text);
    kind!(service_accounts, "the source service account", account, |(ns, sa)| format!("{ns}/{sa}"));
    kind!(namespaces, "the source namespace", namespace, text);
    kind!(trust_domains, "the source trust domain", trust_domain, text);
    kind!(source_ips, "the source address", source, ToString::to_string);
    kind!(destination_ips, "the destination address", destination, ToString::to_string);
    kind!(destination_ports, "the destination port", port, ToString::to_string);
    out
}

/// Of several alternatives the one of which least failed, with its number; `None` when there are none.
pub(super) fn closest(alternatives: impl Iterator<Item = Vec<String>>) -> Option<(usize, Vec<String>)> {
    alternatives.enumerate().min_by_key(|(_, failed)| failed.len())
}

/// What a rule of so many conditions is, of which so many failed.
pub(super) fn nearly(conditions: usize, failed: usize) -> Effect {
    if failed == 1 && conditions > 1 { Effect::NearlyMatched } else { Effect::NotMatched }
}
