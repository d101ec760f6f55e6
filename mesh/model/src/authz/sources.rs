//! Sources that policy denies outright: what a kernel may drop without asking.
//!
//! A projection of the snapshot for one workload, sure in one direction: what it says is denied, [`super::authorize`] denies for
//! every identity, port and destination. Everything else is left to be asked, and so are refusals of which the operator is to be
//! told the reason: policies that cannot be used, and those that would deny everybody.
use super::{InScope, Selected, enforced, kind};
use crate::policy::{Action, Clause, Match, Policy, PolicyBody, Rule, Values};
use crate::policy_index::RuleRef;
use crate::snapshot::Snapshot;
use crate::workload::Workload;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::BTreeSet;

/// What is known of a prefix; a longer one inside it says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceVerdict {
    /// The prefix.
    pub net: IpNet,
    /// Whether connections from there are denied; `false` only inside one that is.
    pub denied: bool,
}

/// The sources from which no connection to `workload` is let in, shorter prefixes first. More than `most` prefixes are none: all are asked then.
pub fn denied_sources(snap: &Snapshot, workload: &Workload, most: usize) -> Vec<SourceVerdict> {
    let workload = snap.find_workload(&workload.uid).map_or(workload, |w| w);
    let scope = InScope::of(snap, workload);
    if scope.broken().is_some() {
        return Vec::new();
    }
    let of_buckets = [scope.global, scope.namespace].into_iter().flatten().flat_map(|b| b.deny.rules()).filter_map(RuleRef::rule);
    let of_selected: Box<dyn Iterator<Item = &Policy>> = match &scope.selected {
        Selected::Bound(bound, _) => Box::new(bound.resolved().iter().map(|p| &**p)),
        Selected::ByName(list) => Box::new(list.iter().map(|p| &***p)),
    };
    let of_selected = of_selected.filter(|p| enforced(p, Action::Deny)).flat_map(|p| match &p.body {
        PolicyBody::Rules { rules, .. } => rules.as_slice(),
        PolicyBody::Unusable { .. } => &[],
    });
    let rules: Vec<&Rule> = of_buckets.chain(of_selected).filter(|rule| is_about_sources(rule)).collect();
    if rules.is_empty() {
        return Vec::new();
    }
    // All addresses of a prefix that are in none of the longer ones are in the same prefixes: one of them speaks for all.
    let roots = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let named =
        rules.iter().flat_map(|r| &r.clauses).flat_map(|c| &c.matches).flat_map(|m| both(&m.source_ips)).map(IpNet::trunc);
    let mut nets: Vec<IpNet> = named.chain(roots).collect::<BTreeSet<_>>().into_iter().collect();
    if nets.len() > most {
        return Vec::new();
    }
    nets.sort_by_key(|net| (net.prefix_len(), *net));
    let mut verdicts: Vec<SourceVerdict> = Vec::new();
    for net in nets {
        let denied = rules.iter().any(|rule| rule.clauses.iter().all(|clause| holds_for(clause, &net)));
        let around = verdicts.iter().rev().find(|v| v.net.contains(&net)).is_some_and(|v| v.denied);
        if denied != around {
            verdicts.push(SourceVerdict { net, denied });
        }
    }
    verdicts
}

fn both(values: &Values<IpNet>) -> impl Iterator<Item = &IpNet> {
    values.any().iter().chain(values.none())
}

/// Whether it can hold for an address alone, and not for every one.
fn is_about_sources(rule: &Rule) -> bool {
    let decided = |clause: &Clause| clause.matches.is_empty() || clause.matches.iter().any(names_sources_only);
    rule.clauses.iter().all(decided) && rule.clauses.iter().any(|clause| !clause.matches.is_empty())
}

fn names_sources_only(m: &Match) -> bool {
    let nothing_else = m.namespaces.is_empty()
        && m.service_accounts.is_empty()
        && m.principals.is_empty()
        && m.trust_domains.is_empty()
        && m.destination_ips.is_empty()
        && m.destination_ports.is_empty();
    !m.source_ips.is_empty() && nothing_else
}

/// Whether the clause is true whatever else a connection from `net` is like.
fn holds_for(clause: &Clause, net: &IpNet) -> bool {
    let of_sources = |m: &&Match| names_sources_only(m);
    clause.matches.is_empty() || clause.matches.iter().filter(of_sources).any(|m| kind(&m.source_ips, |n| n.contains(net)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authz::{Verdict, authorize};
    use crate::change::Change;
    use crate::fixture::*;
    use crate::id::SpiffeId;
    use crate::policy::{PolicyKey, Scope};
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }
    fn from(any: &[&str], none: &[&str]) -> Match {
        let nets = |of: &[&str]| of.iter().map(|n| net(n)).collect();
        Match { source_ips: Values::new(nets(any), nets(none)), ..Match::default() }
    }
    fn denies(rules: Vec<Rule>) -> Policy {
        policy("default", "p", Scope::Namespace, Action::Deny, rules)
    }
    fn told(policies: Vec<Policy>) -> Vec<String> {
        let web = pod("default", "web", "10.0.0.2");
        let snap = mesh(policies.into_iter().map(Change::from).chain([web.clone().into()]).collect());
        let word = |v: &SourceVerdict| format!("{}{}", if v.denied { "" } else { "!" }, v.net);
        denied_sources(&snap, &web, 100).iter().map(word).collect()
    }

    #[test]
    fn what_is_denied_by_its_address_alone() {
        assert_eq!(told(vec![denies(vec![rule(from(&["10.1.0.0/16", "fd00::/64"], &[]))])]), ["10.1.0.0/16", "fd00::/64"]);
        // With exceptions, and all but some.
        assert_eq!(told(vec![denies(vec![rule(from(&["10.1.0.0/16"], &["10.1.7.0/24"]))])]), ["10.1.0.0/16", "!10.1.7.0/24"]);
        assert_eq!(told(vec![denies(vec![rule(from(&[], &["10.1.0.0/16"]))])]), ["0.0.0.0/0", "::/0", "!10.1.0.0/16"]);
        // An exception of one rule is no exception of another.
        let two = vec![rule(from(&["10.1.0.0/16"], &["10.1.7.0/24"])), rule(from(&["10.1.7.9/32"], &[]))];
        assert_eq!(told(vec![denies(two)]), ["10.1.0.0/16", "!10.1.7.0/24", "10.1.7.9/32"]);
        // What is denied already needs no second entry.
        assert_eq!(told(vec![denies(vec![rule(from(&["10.0.0.0/8", "10.1.0.0/16"], &[]))])]), ["10.0.0.0/8"]);
    }

    #[test]
    fn what_the_agent_is_asked_about() {
        let mut port = from(&["10.1.0.0/16"], &[]);
        port.destination_ports = Values::new(vec![80], vec![]);
        let mut both = rule(from(&["10.1.0.0/16"], &[]));
        both.clauses.push(Clause { matches: vec![from_principals(&["*"])] });
        let allow = policy("default", "a", Scope::Namespace, Action::Allow, one(from(&["10.1.0.0/16"], &[])));
        let unusable = Policy { body: PolicyBody::Unusable { why: "".into() }, ..denies(vec![]) };
        let cases = [
            denies(one(port)),
            denies(vec![both]),
            denies(vec![Rule::default()]),
            denies(one(from_principals(&["*"]))),
            denies(one(Match::default())),
            allow,
            unusable.clone(),
            Policy { key: PolicyKey::new("other", "p"), ..denies(one(from(&["10.1.0.0/16"], &[]))) },
        ];
        for policy in cases {
            assert_eq!(told(vec![policy.clone()]), [""; 0], "{policy:?}");
        }
        // The refusal that says why comes first.
        let named = denies(one(from(&["10.1.0.0/16"], &[])));
        assert_eq!(told(vec![Policy { key: PolicyKey::new("default", "q"), ..named }, unusable]), [""; 0]);
        let many = (0..200).map(|n| format!("10.{n}.0.0/16")).collect::<Vec<_>>();
        assert_eq!(told(vec![denies(one(from(&many.iter().map(|n| &**n).collect::<Vec<_>>(), &[])))]), [""; 0]);
    }

    fn one(m: Match) -> Vec<Rule> {
        vec![rule(m)]
    }

    const NETS: [&str; 8] =
        ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32", "10.2.0.0/16", "fd00::/16", "fd00::1/128"];
    const SOURCES: [&str; 7] =
        ["10.1.1.1:5", "10.1.1.2:5", "10.1.2.1:5", "10.2.0.1:5", "11.0.0.1:5", "[fd00::1]:5", "[fd01::1]:5"];

    fn any_match() -> impl Strategy<Value = Match> {
        let nets = || prop::collection::vec((0..NETS.len()).prop_map(|n| net(NETS[n])), 0..3);
        (nets(), nets(), prop::option::of(Just(80_u16)), any::<bool>()).prop_map(|(any, none, port, named)| {
            let mut m = if named { from_principals(&["cluster.local/ns/default/sa/a"]) } else { Match::default() };
            m.source_ips = Values::new(any, none);
            m.destination_ports = Values::new(port.into_iter().collect(), vec![]);
            m
        })
    }
    fn any_deny() -> impl Strategy<Value = Policy> {
        let clause = prop::collection::vec(any_match(), 0..3).prop_map(|matches| Clause { matches });
        let rules = prop::collection::vec(prop::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses }), 0..3);
        let scope = prop_oneof![Just(Scope::Global), Just(Scope::Namespace), Just(Scope::Selector)];
        (0..4_u8, scope, rules).prop_map(|(n, scope, rules)| policy("default", &format!("p{n}"), scope, Action::Deny, rules))
    }

    proptest! {
        /// What is said to be denied is denied, whoever comes and whatever for.
        #[test]
        fn never_more_than_authorize_denies(policies in prop::collection::vec(any_deny(), 0..6)) {
            let mut web = pod("default", "web", "10.0.0.2");
            web.policies = (0..2).map(|n| PolicyKey::new("default", &format!("p{n}"))).filter(|k| policies.iter().any(|p| p.key == *k)).collect();
            let snap = mesh(policies.into_iter().map(Change::from).chain([web.clone().into()]).collect());
            let told = denied_sources(&snap, &web, 100);
            let peer: SpiffeId = "spiffe://cluster.local/ns/default/sa/a".parse().expect("an id");
            let other: SpiffeId = "spiffe://cluster.local/ns/default/sa/b".parse().expect("an id");
            for source in SOURCES {
                let address = sock(source).ip();
                let denied = told.iter().rev().find(|v| v.net.contains(&address)).is_some_and(|v| v.denied);
                let allowed = [None, Some(&peer), Some(&other)].into_iter().any(|peer| {
                    ["10.0.0.2:80", "10.0.0.2:8080"].into_iter().any(|dst| {
                        matches!(authorize(&snap, &web, &inbound(source, dst, peer)).verdict, Verdict::Allow(_))
                    })
                });
                prop_assert!(!(denied && allowed), "{source}: {told:?}");
            }
        }
    }
}
