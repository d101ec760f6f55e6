//! What the kernel drops before anybody looks at it: connections from sources that policy denies outright.
//!
//! A projection of one version of the mesh, made from scratch; pods that the same policies bind share it. It refuses to drop what
//! the agent would let through: the node's own addresses are asked about, for the sake of its probes. Upstream: `pods`.
//! Downstream: the pod's map, through `ebpf-loader`, or the sets of its rules, through `nft`.
use crate::node::Node;
use ebpf_loader::{MAX_SOURCES, Source};
use mesh_model::Snapshot;
use mesh_model::authz::{SourceVerdict, denied_sources};
use mesh_model::policy::PolicyKey;
use mesh_model::workload::Workload;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// What binds a workload: its namespace, and the policies it names.
type Scope = (Arc<str>, Arc<[PolicyKey]>);

/// The verdicts of one version.
#[derive(Debug)]
pub struct Prefilter<'a> {
    snap: &'a Snapshot,
    node: &'a Node,
    addresses: Option<Vec<IpAddr>>,
    known: HashMap<Scope, Arc<[SourceVerdict]>>,
}

impl<'a> Prefilter<'a> {
    /// Of this version, on this node.
    pub fn new(snap: &'a Snapshot, node: &'a Node) -> Self {
        Self { snap, node, addresses: None, known: HashMap::new() }
    }

    /// What is denied to a workload.
    pub fn of(&mut self, workload: &Workload) -> Arc<[SourceVerdict]> {
        let key = (Arc::clone(&workload.namespace), Arc::clone(&workload.policies));
        if let Some(known) = self.known.get(&key) {
            return Arc::clone(known);
        }
        // One place is left for what the loader adds.
        let mut verdicts = denied_sources(self.snap, workload, MAX_SOURCES as usize / 2);
        if !verdicts.is_empty() {
            let node = self.node;
            let addresses = self.addresses.get_or_insert_with(|| node.addresses());
            if addresses.len() > MAX_SOURCES as usize / 4 {
                verdicts.clear();
            }
            let asked: Vec<_> = addresses.iter().filter(|a| is_denied(&verdicts, **a)).map(|a| (*a).into()).collect();
            verdicts.extend(asked.into_iter().map(|net| SourceVerdict { net, denied: false }));
        }
        let verdicts: Arc<[_]> = verdicts.into();
        self.known.insert(key, Arc::clone(&verdicts));
        verdicts
    }
}

/// By the longest prefix, which comes last.
fn is_denied(verdicts: &[SourceVerdict], address: IpAddr) -> bool {
    verdicts.iter().rev().find(|v| v.net.contains(&address)).is_some_and(|v| v.denied)
}

/// As the loader takes them.
pub fn sources(verdicts: &[SourceVerdict]) -> Vec<Source> {
    let source = |v: &SourceVerdict| Source { address: v.net.addr(), prefix_len: v.net.prefix_len(), denied: v.denied };
    verdicts.iter().map(source).collect()
}

/// As disjoint ranges, first to last address, of what is denied: in order, those of IPv4 before those of IPv6.
pub fn ranges(verdicts: &[SourceVerdict]) -> Vec<(IpAddr, IpAddr)> {
    let of = |v4| {
        let mut nets: Vec<_> = verdicts.iter().filter(|v| v.net.addr().is_ipv4() == v4).collect();
        nets.sort_by_key(|v| (v.net.network(), v.net.prefix_len()));
        let mut found = Ranges::default();
        for verdict in nets {
            found.close_before(Some(number(verdict.net.network())));
            found.open.push((number(verdict.net.broadcast()), verdict.denied));
        }
        found.close_before(None);
        let address = move |bits: u128| if v4 { Ipv4Addr::from(bits as u32).into() } else { IpAddr::from(Ipv6Addr::from(bits)) };
        found.denied.into_iter().map(move |(first, last)| (address(first), address(last)))
    };
    of(true).chain(of(false)).collect()
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

/// A walk over prefixes in the order of their first addresses, those that hold others before them.
#[derive(Default)]
struct Ranges {
    /// Prefixes the walk is in, the shortest first: their last address, and what is said of them.
    open: Vec<(u128, bool)>,
    /// The first address that nothing is known of yet; `None` behind the last there is.
    next: Option<u128>,
    denied: Vec<(u128, u128)>,
}

impl Ranges {
    /// Goes on to `until`, or to the end of all that is open.
    fn close_before(&mut self, until: Option<u128>) {
        while let Some((last, denied)) = self.open.pop_if(|(last, _)| until.is_none_or(|until| *last < until)) {
            self.tell(last, denied);
            self.next = last.checked_add(1);
        }
        if let Some(until) = until {
            if let (Some((_, denied)), Some(before)) = (self.open.last().copied(), until.checked_sub(1)) {
                self.tell(before, denied);
            }
            self.next = Some(until);
        }
    }
    /// What is said of the addresses from `next` to `last`.
    fn tell(&mut self, last: u128, denied: bool) {
        let Some(first) = self.next.filter(|first| denied && *first <= last) else { return };
        match self.denied.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
            _ => self.denied.push((first, last)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_say_what_the_longest_prefix_says() {
        let verdict = |(net, denied): (&str, bool)| SourceVerdict { net: net.parse().unwrap(), denied };
        let mut verdicts: Vec<_> = [
            ("0.0.0.0/1", true),
            ("10.0.0.0/8", false),
            ("10.1.0.0/16", true),
            ("10.1.255.0/24", false),
            ("10.2.0.0/16", true),
            ("255.255.255.255/32", true),
            ("2001:db8::/32", true),
            ("2001:db8::/64", false),
            ("ffff::/16", true),
        ]
        .map(verdict)
        .into();
        verdicts.sort_by_key(|v| (v.net.prefix_len(), v.net));
        let found: Vec<_> = ranges(&verdicts).iter().map(|(first, last)| format!("{first}-{last}")).collect();
        assert_eq!(
            found,
            [
                "0.0.0.0-9.255.255.255",
                "10.1.0.0-10.1.254.255",
                "10.2.0.0-10.2.255.255",
                "11.0.0.0-127.255.255.255",
                "255.255.255.255-255.255.255.255",
                "2001:db8:0:1::-2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
                "ffff::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            ]
        );
        for address in ["9.9.9.9", "10.3.0.0", "10.1.254.255", "10.1.255.0", "128.0.0.0", "2001:db8::1", "2001:db8:0:1::", "::1"]
        {
            let address: IpAddr = address.parse().unwrap();
            let within = ranges(&verdicts)
                .iter()
                .any(|(first, last)| first.is_ipv4() == address.is_ipv4() && (*first..=*last).contains(&address));
            assert_eq!(within, is_denied(&verdicts, address), "{address}");
        }
        assert!(ranges(&[]).is_empty());
    }
}
