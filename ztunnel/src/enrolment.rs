//! Who is to be served: a pod as whoever enrolled it says.
//!
//! Three may: the mesh itself (a folder names each pod's network namespace), the Kubernetes API (whose pods are found by
//! their cgroups), and Istio's CNI agent (`zds`), which sends the namespace before the mesh has heard of the pod. Owns the
//! facts of one enrolment. Upstream: snapshots, `mesh-sources`, [`crate::zds`]. Downstream: `pods`, which serves it.
mod places;

use crate::zds::Named;
use mesh_identity::Facts;
use mesh_model::SpiffeId;
use mesh_model::snapshot::{Snapshot, Viewpoint};
use mesh_model::workload::{NetworkMode, Protocol, Workload, WorkloadUid};
use mesh_runtime::sockets::NetnsFd;
use mesh_sources::SourceError;
use mesh_sources::kubernetes::{Access, NodePod, NodePods, Served, follow_node};
use parking_lot::Mutex;
use places::Places;
use std::collections::HashSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Once};
use tokio::sync::{mpsc, oneshot, watch};

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
    /// What an authority may find it by.
    pub facts: Facts,
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
            facts: facts(w, None),
            place: w.netns.as_ref().map_or(Place::Unknown, |path| Place::Path(Arc::clone(path))),
            address: w.ips.first().copied(),
        })
    }

    /// A pod that the Kubernetes API enrols.
    fn by_kubernetes(pod: &NodePod, netns: Option<&Arc<NetnsFd>>) -> Self {
        let w = &pod.workload;
        Self {
            key: Arc::clone(&pod.uid),
            uid: Arc::clone(&w.uid),
            namespace: Arc::clone(&w.namespace),
            name: Arc::clone(&w.name),
            identity: w.identity().map_err(|e| e.to_string()),
            facts: Facts { making: Some(Arc::clone(&pod.making)), ..facts(w, Some(&pod.uid)) },
            place: netns.map_or(Place::Unknown, |netns| Place::Netns(Arc::clone(netns))),
            address: w.ips.first().copied(),
        }
    }

    /// A pod that the CNI agent enrols. Its workload is the one of this node with its names, else the one istiod will send:
    /// istiod's ids of pods are made of the same names.
    pub fn by_cni(snap: &Snapshot, key: Arc<str>, pod: Named, netns: NetnsFd) -> Self {
        let known = find_named(snap, &pod.namespace, &pod.name, &pod.service_account);
        let uid = || format!("{}//Pod/{}/{}", snap.view().cluster, pod.namespace, pod.name).into();
        let (name, node) = (Arc::<str>::from(pod.name.as_str()), Arc::clone(&snap.view().node));
        let labels = known.map(|w| w.labels.clone()).unwrap_or_default();
        Self {
            facts: Facts { uid: Some(Arc::clone(&key)), name: Arc::clone(&name), node, labels, making: None },
            key,
            uid: known.map_or_else(uid, |w| Arc::clone(&w.uid)),
            identity: known
                .map_or_else(|| SpiffeId::new(&snap.view().trust_domain, &pod.namespace, &pod.service_account), |w| w.identity())
                .map_err(|e| e.to_string()),
            namespace: pod.namespace.into(),
            name,
            place: Place::Netns(Arc::new(netns)),
            address: None,
        }
    }

    /// The agent itself, in its own network namespace. Nobody enrols it.
    pub fn agent(view: &Viewpoint, namespace: &str, name: &str, account: &str) -> Self {
        let uid: Arc<str> = format!("{}//Pod/{namespace}/{name}", view.cluster).into();
        let facts = Facts { name: name.into(), node: Arc::clone(&view.node), ..Facts::default() };
        Self {
            key: Arc::clone(&uid),
            uid,
            namespace: namespace.into(),
            name: name.into(),
            identity: SpiffeId::new(&view.trust_domain, namespace, account).map_err(|e| e.to_string()),
            facts,
            place: Place::Unknown,
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

/// A pod whose containers are about to start, as the CNI plugin tells of it ([`crate::cni`]).
#[derive(Debug)]
pub struct Arrival {
    /// The Pod's own uid.
    pub uid: Arc<str>,
    /// Where it will be.
    pub netns: NetnsFd,
    /// Whether it is only asked if it is captured there.
    pub check: bool,
    /// How it went.
    pub done: oneshot::Sender<Result<(), String>>,
}

/// The pods that the Kubernetes API enrols on this node.
#[derive(Debug)]
pub struct ByKubernetes {
    pods: watch::Receiver<Option<NodePods>>,
    /// Who is marked; `None` once another agent does that.
    served: Option<watch::Sender<Served>>,
    places: Arc<Mutex<Places>>,
    /// Pods that wait to be captured; `None` where none does.
    arrivals: Option<mpsc::Receiver<Arrival>>,
    /// Enrolled pods without an address, of which nobody says where they are.
    unplaced: HashSet<Arc<str>>,
}

impl ByKubernetes {
    /// Follows the pods of this node from when all are known. `proc_dir`: the machine's `/proc`.
    ///
    /// # Errors
    /// There is no way to the API server.
    pub async fn follow(access: &Access, view: Viewpoint, proc_dir: PathBuf) -> Result<Self, SourceError> {
        let (served, told) = watch::channel(None);
        let mut pods = follow_node(access, view, told)?;
        let ended = pods.wait_for(Option::is_some).await.is_err();
        if ended {
            return Err(SourceError::Died);
        }
        let places = Arc::new(Mutex::new(Places::new(proc_dir)));
        Ok(Self { pods, served: Some(served), places, arrivals: None, unplaced: HashSet::new() })
    }

    /// All pods of this node, as the API server tells of them.
    pub fn pods(&self) -> watch::Receiver<Option<NodePods>> {
        self.pods.clone()
    }

    /// Takes pods that are about to start from here.
    #[must_use]
    pub fn expecting(mut self, arrivals: mpsc::Receiver<Arrival>) -> Self {
        self.arrivals = Some(arrivals);
        self
    }

    /// Resolves when other pods, or the same otherwise, are enrolled, or with one that is about to start.
    pub async fn next(&mut self) -> Option<Arrival> {
        let arrival = async {
            match &mut self.arrivals {
                Some(arrivals) => arrivals.recv().await,
                None => None,
            }
        };
        tokio::select! {
            Some(arrival) = arrival => Some(arrival),
            Ok(()) = self.pods.changed() => None,
            else => std::future::pending().await,
        }
    }

    /// The pod that is about to start in this namespace, if it is enrolled.
    pub async fn place(&mut self, uid: &str, netns: NetnsFd) -> Option<Enrolled> {
        let pods = self.pods.borrow().clone().unwrap_or_default();
        let pod = pods.iter().find(|pod| *pod.uid == *uid)?;
        self.places.lock().tell(&pod.cgroup, netns);
        self.enrolled().await.into_iter().find(|enrolled| *enrolled.key == *uid)
    }

    /// Whether a pod may be somewhere that nobody knows of: an agent before this one may have captured it as it started.
    pub fn has_unplaced(&self) -> bool {
        !self.unplaced.is_empty() && self.arrivals.is_some()
    }

    /// Whether it is enrolled, and not known where.
    pub fn is_unplaced(&self, uid: &str) -> bool {
        self.unplaced.contains(uid)
    }

    /// The pods enrolled now.
    pub async fn enrolled(&mut self) -> Vec<Enrolled> {
        let pods = self.pods.borrow_and_update().clone().unwrap_or_default();
        let enrolled = pods.iter().filter(|pod| is_served(&pod.workload));
        let (wanted, unplaced): (Vec<&NodePod>, Vec<_>) = {
            let places = self.places.lock();
            // One without an address may not start for long: it is not looked for among all processes until then.
            enrolled.partition(|pod| !pod.workload.ips.is_empty() || places.get(&pod.cgroup).is_some())
        };
        self.unplaced = unplaced.into_iter().map(|pod| Arc::clone(&pod.uid)).collect();
        let (cgroups, places) = (wanted.iter().map(|pod| Arc::clone(&pod.cgroup)).collect(), Arc::clone(&self.places));
        // It may have to read something of every process of the machine.
        let looked = tokio::task::spawn_blocking(move || places.lock().look(&cgroups)).await;
        if let Err(error) = looked {
            tracing::error!(%error, "pods' network namespaces cannot be looked for");
        }
        let places = self.places.lock();
        wanted.into_iter().map(|pod| Enrolled::by_kubernetes(pod, places.get(&pod.cgroup))).collect()
    }

    /// Tells which are served, so that they are marked.
    pub fn tell(&self, served: impl Iterator<Item = Arc<str>>) {
        let Some(sender) = &self.served else { return };
        let served: HashSet<Arc<str>> = served.collect();
        sender.send_if_modified(|told| {
            let changed = told.as_deref() != Some(&served);
            *told = Some(Arc::new(served));
            changed
        });
    }

    /// Leaves the marks, and the pods that start, to the next agent.
    pub fn hand_over(&mut self) {
        self.served = None;
        self.arrivals = None;
    }
}

/// The workload of this node with these names, which are all that a CNI agent says of a pod. Its cluster counts only where there are
/// two: one of another cluster may be on a node of the same name, but where none is of ours, `CLUSTER_ID` is what is wrong.
pub fn find_named<'a>(snap: &'a Snapshot, namespace: &str, name: &str, account: &str) -> Option<&'a Arc<Workload>> {
    static TOLD: Once = Once::new();
    let cluster = &snap.view().cluster;
    let named = || {
        let of_names = |w: &&Arc<Workload>| *w.name == *name && *w.namespace == *namespace && *w.service_account == *account;
        snap.local_workloads().filter(of_names)
    };
    if let Some(ours) = named().find(|w| w.cluster == *cluster) {
        return Some(ours);
    }
    let theirs = named().next()?;
    if theirs.cluster.is_empty() {
        return Some(theirs);
    }
    if snap.local_workloads().any(|w| w.cluster == *cluster) {
        return None;
    }
    TOLD.call_once(|| {
        tracing::warn!(
            ours = %cluster, of_istiod = %theirs.cluster, node = %snap.view().node,
            "this agent is said to be of another cluster than all pods of its node: they are served by their names; set CLUSTER_ID to istiod's"
        );
    });
    Some(theirs)
}

/// What is known of a pod of this node; its own uid is not in the mesh.
fn facts(w: &Workload, uid: Option<&Arc<str>>) -> Facts {
    let (name, node, labels) = (Arc::clone(&w.name), Arc::clone(&w.node), w.labels.clone());
    Facts { uid: uid.cloned(), name, node, labels, making: None }
}

/// Whether the agent carries this pod's traffic.
pub fn is_served(w: &Workload) -> bool {
    w.protocol == Protocol::Hbone && w.network_mode == NetworkMode::Standard && !w.native_tunnel
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::Change;
    use mesh_model::labels::Labels;
    use mesh_model::making::{Making, Owner};

    fn local(cluster: &str, name: &str) -> Change {
        let mut w = Workload::new(&format!("{cluster}//Pod/shop/{name}"), name, "shop");
        (w.node, w.cluster, w.service_account) = ("n".into(), cluster.into(), name.into());
        Change::Workload(Arc::new(w))
    }
    fn found(of: &[Change]) -> Option<Arc<str>> {
        let view = Viewpoint { node: "n".into(), cluster: "ours".into(), ..Viewpoint::default() };
        find_named(&Snapshot::empty(view).apply(of), "shop", "web", "web").map(|w| Arc::clone(&w.uid))
    }

    /// An authority may have registered one pod by its uid: whoever enrols it and knows it says so.
    #[test]
    fn what_is_known_of_a_pod_is_said_by_who_enrols_it() {
        let Change::Workload(mut workload) = local("ours", "web") else { unreachable!() };
        let labels = Labels::of(vec![("app".into(), "web".into())]);
        Arc::get_mut(&mut workload).unwrap().labels = labels.clone();
        let with = |uid: Option<&str>| Facts {
            uid: uid.map(Arc::from),
            name: "web".into(),
            node: "n".into(),
            labels: labels.clone(),
            making: None,
        };
        let owner = Owner { kind: "ReplicaSet".into(), name: "web-1".into(), uid: "r-1".into() };
        let making = Arc::new(Making { owners: vec![owner], ..Making::default() });
        let (workload_of_it, making_of_it) = (Arc::clone(&workload), Arc::clone(&making));
        let pod =
            NodePod { uid: "u-1".into(), cgroup: "c".into(), workload: workload_of_it, marked: false, making: making_of_it };
        assert_eq!(Enrolled::by_kubernetes(&pod, None).facts, Facts { making: Some(making), ..with(Some("u-1")) });
        let mut named = (*workload).clone();
        (named.protocol, named.netns) = (Protocol::Hbone, Some("/run/netns/web".into()));
        let view = Viewpoint { node: "n".into(), cluster: "ours".into(), ..Viewpoint::default() };
        let snap = Snapshot::empty(view).apply(&[Change::Workload(Arc::new(named))]);
        assert_eq!(Enrolled::by_mesh(&snap).next().unwrap().facts, with(None));
        let by_cni = |name: &str| {
            let pod = Named { name: name.into(), namespace: "shop".into(), service_account: name.into() };
            Enrolled::by_cni(&snap, "u-2".into(), pod, NetnsFd::current().unwrap()).facts
        };
        assert_eq!(by_cni("web"), with(Some("u-2")));
        let unknown = Facts { uid: Some("u-2".into()), name: "new".into(), node: "n".into(), ..Facts::default() };
        assert_eq!(by_cni("new"), unknown, "the mesh does not know it yet");
    }

    #[test]
    fn a_pod_is_found_by_its_names_whatever_its_cluster_is_called() {
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[local("theirs", "web"), local("ours", "web")]).as_deref(), Some("ours//Pod/shop/web"));
        assert_eq!(found(&[local("theirs", "web"), local("theirs", "api")]).as_deref(), Some("theirs//Pod/shop/web"));
        assert_eq!(
            found(&[local("theirs", "web"), local("ours", "api")]),
            None,
            "ours is still to come, and another node has our name"
        );
        assert_eq!(found(&[local("theirs", "api")]), None);
    }
}
