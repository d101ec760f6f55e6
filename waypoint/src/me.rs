//! Which workload of the mesh this process is. Upstream: `app`. Downstream: whoever needs its place, labels or bindings.
use mesh_model::Snapshot;
use mesh_model::workload::{Workload, WorkloadUid};
use std::net::IpAddr;
use std::sync::Arc;

/// How a process knows itself among the workloads of the mesh.
#[derive(Clone, Debug, Default)]
pub struct Me {
    /// Its pod, as workloads are known; `None` when it does not know its own name.
    pub uid: Option<WorkloadUid>,
    /// Its address, when its name does not say.
    pub ip: Option<IpAddr>,
}
impl Me {
    /// The workload, as `snap` knows it.
    pub fn find<'s>(&self, snap: &'s Snapshot) -> Option<&'s Arc<Workload>> {
        let by_address = || snap.find_workload_by_ip(&snap.view().network, self.ip?.to_canonical());
        self.uid.as_ref().and_then(|uid| snap.find_workload(uid)).or_else(by_address)
    }
}
