//! Priorities and shares by place: Istio's `localityLbSetting` as istiod turns it into endpoint priorities and weights
//! (spec/waypoint §3.3).
use crate::l7::destination::LocalityPolicy;
use crate::labels::Labels;
use crate::workload::{Locality, Workload};

/// Where we are, for failover.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Our locality.
    pub locality: &'a Locality,
    /// Our labels, for `failoverPriority`.
    pub labels: &'a Labels,
    /// Our network.
    pub network: &'a str,
    /// Our cluster.
    pub cluster: &'a str,
    /// Our node.
    pub node: &'a str,
}

/// Shares of localities that apply to clients in `from`: patterns and percent. `None`: no rule names our locality.
pub fn distribution<'a>(policy: &'a LocalityPolicy, from: &Locality) -> Option<&'a [(std::sync::Arc<str>, u32)]> {
    policy.distribute.iter().find(|(rule, _)| matches(from, rule)).map(|(_, to)| &**to)
}

/// Which of the shares a locality belongs to: the first that matches; none: it gets no traffic.
pub fn share_of(shares: &[(std::sync::Arc<str>, u32)], locality: &Locality) -> Option<u32> {
    shares.iter().position(|(rule, _)| matches(locality, rule)).map(|at| at as u32)
}

/// Whether a locality is meant by `region/zone/subzone`, where `*` and absent parts match all.
pub fn matches(locality: &Locality, rule: &str) -> bool {
    let mut parts = rule.splitn(3, '/');
    let region = parts.next().unwrap_or_default();
    let mut rest = |have: &str| parts.next().is_none_or(|want| want.is_empty() || want == "*" || want == have);
    (region == "*" || region == &*locality.region) && rest(&locality.zone) && rest(&locality.subzone)
}

/// Priority of an endpoint: by `failoverPriority` where there is one, else by how much of our locality it shares.
pub fn failover_priority(policy: &LocalityPolicy, from: &Place<'_>, to: &Workload) -> u32 {
    if !policy.priority.is_empty() {
        let same = |(label, value): &(std::sync::Arc<str>, Option<std::sync::Arc<str>>)| {
            let own = value.as_deref().unwrap_or_else(|| own_label(from, label));
            own == label_of(to, label)
        };
        return (policy.priority.len() - policy.priority.iter().take_while(|l| same(l)).count()) as u32;
    }
    // Who does not know where he is has no neighbours.
    if from.locality.region.is_empty() {
        return 0;
    }
    let (own, its) = (from.locality, &to.locality);
    if own.region != its.region {
        return match policy.failover.iter().find(|(region, _)| *region == own.region) {
            Some((_, second)) if *second != its.region => 4,
            _ => 3,
        };
    }
    match (own.zone == its.zone, own.subzone == its.subzone) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    }
}

/// The labels that stand for a place whether or not the object carries them.
fn place_label<'a>(label: &str, l: &'a Locality, network: &'a str, cluster: &'a str, node: &'a str) -> Option<&'a str> {
    Some(match label {
        "topology.kubernetes.io/region" => &l.region,
        "topology.kubernetes.io/zone" => &l.zone,
        "topology.istio.io/subzone" => &l.subzone,
        "topology.istio.io/network" => network,
        "topology.istio.io/cluster" => cluster,
        "kubernetes.io/hostname" => node,
        _ => return None,
    })
}
fn own_label<'a>(from: &Place<'a>, label: &str) -> &'a str {
    let place = place_label(label, from.locality, from.network, from.cluster, from.node);
    place.or_else(|| from.labels.get(label).map(|v| &**v)).unwrap_or_default()
}
fn label_of<'a>(w: &'a Workload, label: &str) -> &'a str {
    let place = place_label(label, &w.locality, w.network.as_str(), &w.cluster, &w.node);
    place.or_else(|| w.labels.get(label).map(|v| &**v)).unwrap_or_default()
}
