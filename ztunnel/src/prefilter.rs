//! What the kernel drops before anybody looks at it: connections from sources that policy denies outright.
//!
//! A projection of one version of the mesh, made from scratch; pods that the same policies bind share it. It refuses to drop what
//! the agent would let through: the node's own addresses are asked about, for the sake of its probes. Upstream: `pods`.
//! Downstream: the pod's map, through `ebpf-loader`.
use crate::node::Node;
use ebpf_loader::{MAX_SOURCES, Source};
use mesh_model::Snapshot;
use mesh_model::authz::{SourceVerdict, denied_sources};
use mesh_model::policy::PolicyKey;
use mesh_model::workload::Workload;
use std::collections::HashMap;
use std::net::IpAddr;
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
