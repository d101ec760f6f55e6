//! Who is to be served: a pod as whoever enrolled it says.
//!
//! Two may: the mesh itself (a folder names each pod's network namespace) and Istio's CNI agent (`zds`), which sends the
//! namespace before the mesh has heard of the pod. Owns the facts of one enrolment. Upstream: snapshots, [`crate::zds`].
//! Downstream: `pods`, which serves it.
use crate::zds::Named;
use mesh_model::SpiffeId;
use mesh_model::snapshot::Snapshot;
use mesh_model::workload::{NetworkMode, Protocol, Workload, WorkloadUid};
use mesh_runtime::sockets::NetnsFd;
use std::net::IpAddr;
use std::sync::Arc;

/// One pod that is to be served.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// What it is known by: the workload's id, or what the CNI agent calls it (the Pod's own uid).
    pub key: Arc<str>,
    /// Its workload, which the mesh may not know yet.
    pub uid: WorkloadUid,
    /// Its Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its identity, or why it has none.
    pub identity: Result<SpiffeId, String>,
    /// Where it is.
    pub place: Place,
    /// Its first address, where it has no network namespace of its own.
    pub address: Option<IpAddr>,
}

/// Where a pod's network namespace is.
#[derive(Clone, Debug)]
pub enum Place {
    /// At this path, whatever is there now.
    Path(Arc<str>),
    /// This one.
    Netns(Arc<NetnsFd>),
    /// Nobody says.
    Unknown,
}

impl Enrolled {
    /// The pods of this node that the mesh enrols.
    pub fn by_mesh(snap: &Snapshot) -> impl Iterator<Item = Self> {
        snap.local_workloads().filter(|w| is_served(w)).map(|w| Self {
            key: Arc::clone(&w.uid),
            uid: Arc::clone(&w.uid),
            namespace: Arc::clone(&w.namespace),
            name: Arc::clone(&w.name),
            identity: w.identity().map_err(|e| e.to_string()),
            place: w.netns.as_ref().map_or(Place::Unknown, |path| Place::Path(Arc::clone(path))),
            address: w.ips.first().copied(),
        })
    }

    /// A pod that the CNI agent enrols. Its workload is the one of this node with its names, else the one istiod will send:
    /// istiod's ids of pods are made of the same names.
    pub fn by_cni(snap: &Snapshot, key: Arc<str>, pod: Named, netns: NetnsFd) -> Self {
        let known = snap
            .local_workloads()
            .find(|w| *w.name == pod.name && *w.namespace == pod.namespace && *w.service_account == pod.service_account);
        let uid = || format!("{}//Pod/{}/{}", snap.view().cluster, pod.namespace, pod.name).into();
        Self {
            key,
            uid: known.map_or_else(uid, |w| Arc::clone(&w.uid)),
            identity: known
                .map_or_else(|| SpiffeId::new(&snap.view().trust_domain, &pod.namespace, &pod.service_account), |w| w.identity())
                .map_err(|e| e.to_string()),
            namespace: pod.namespace.into(),
            name: pod.name.into(),
            place: Place::Netns(Arc::new(netns)),
            address: None,
        }
    }

    /// Whether the mesh may still have to learn of it.
    pub fn is_early(&self) -> bool {
        matches!(self.place, Place::Netns(_))
    }

    /// `namespace/name`.
    pub fn label(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Whether the agent carries this pod's traffic.
fn is_served(w: &Workload) -> bool {
    w.protocol == Protocol::Hbone && w.network_mode == NetworkMode::Standard && !w.native_tunnel
}
