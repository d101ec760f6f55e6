//! The pods of one node, and which of them the mesh enrols, for the agent that serves them.
//!
//! Owns a watch of that node's pods and of Namespaces, and the mark on a pod that says it is served
//! (`ambient.istio.io/redirection=enabled`, by which istiod and every other agent know to use a tunnel). Whether a pod is
//! enrolled is decided by the translator's rule; a mark that is there already decides nothing. Upstream: the API server.
//! Downstream: the agent's supervisor of pods.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use mesh_model::Change;
use mesh_model::making::{Container, Making, Owner};
use mesh_model::snapshot::Viewpoint;
use mesh_model::workload::{Protocol, Workload, WorkloadUid};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch as channel};
use tokio::task::JoinSet;

use super::client::{Client, Why};
use super::cluster::Cluster;
use super::watch::{self, Told, What};
use super::{Access, Retry, kinds};
use crate::SourceError;
use crate::diagnostics::Severity;
use crate::translate::{Kind, Settings};

const MARK: &str = "ambient.istio.io/redirection";
/// How long after a failure a mark is tried again.
const AGAIN: Duration = Duration::from_secs(2);

/// A pod of the node.
#[derive(Clone, Debug)]
pub struct NodePod {
    /// The Pod's own uid.
    pub uid: Arc<str>,
    /// The uid its cgroups are named by.
    pub cgroup: Arc<str>,
    /// As a workload: its protocol says whether it is enrolled.
    pub workload: Arc<Workload>,
    /// Whether it is marked as served.
    pub marked: bool,
    /// Its owners and containers.
    pub making: Arc<Making>,
}

/// All pods of the node that are not finished; those that are about to start have no address yet.
pub type NodePods = Arc<[NodePod]>;

/// Uids of the pods that are served; `None` before all have been tried once.
pub type Served = Option<Arc<HashSet<Arc<str>>>>;

/// Follows the pods of the view's node, told from the first whole list on, and keeps their marks as `served` says until its
/// sender is dropped. Runs on the current runtime.
///
/// # Errors
/// There is no way to the API server.
pub fn follow(
    access: &Access,
    view: Viewpoint,
    served: channel::Receiver<Served>,
) -> Result<channel::Receiver<Option<NodePods>>, SourceError> {
    let client = Client::new(access).map_err(SourceError::Access)?;
    let (pods, told) = channel::channel(None);
    tokio::spawn(watch_pods(client.clone(), view, pods));
    tokio::spawn(keep_marks(client, told.clone(), served));
    Ok(told)
}

/// Asks the API server itself about one pod of the node: what a watch tells may be a moment old.
#[derive(Clone, Debug)]
pub struct Lookup {
    client: Client,
    view: Viewpoint,
}

impl Lookup {
    /// Asks about pods of the view's node.
    ///
    /// # Errors
    /// There is no way to the API server.
    pub fn new(access: &Access, view: Viewpoint) -> Result<Self, SourceError> {
        Ok(Self { client: Client::new(access).map_err(SourceError::Access)?, view })
    }

    /// The pod, by what it and its namespace are now: lists without a `resourceVersion` are of the latest, and need no other right
    /// than the watches. `None`: no such pod is to run on the node.
    ///
    /// # Errors
    /// What the server answers instead, or why it does not.
    pub async fn pod(&self, namespace: &str, name: &str) -> Result<Option<NodePod>, String> {
        let mut watches = kinds::of_node(&self.view.node);
        for watch in &mut watches {
            let only = if watch.kind == Kind::Namespace { namespace } else { name };
            let fields = watch.fields.take().into_iter().chain([format!("metadata.name={only}")]);
            watch.fields = Some(fields.collect::<Vec<_>>().join(","));
            if watch.kind == Kind::Pod {
                watch.namespace = Some(namespace.to_owned());
            }
        }
        let mut cluster =
            Cluster::new(self.view.clone(), &Settings { unaddressed: true, ..Settings::default() }, watches.clone());
        let mut own: HashMap<Name, Own> = HashMap::new();
        for (number, watch) in watches.iter().enumerate() {
            let Some(version) = watch.versions.first() else { continue };
            let mut page = self.client.get(&watch.path(version, "limit=1")).await.map_err(|failure| failure.message)?;
            let items = match page["items"].take() {
                Value::Array(items) => items,
                _ => Vec::new(),
            };
            let mut tell = |what| cluster.take(Told { watch: number, what });
            tell(What::Restarted);
            for object in items {
                let mut what = What::Listed(Box::new(object), version);
                if watch.kind == Kind::Pod {
                    note(&mut own, &mut what);
                }
                tell(what);
            }
            tell(What::Complete);
        }
        Ok(cluster.flush().into_iter().find_map(|change| match change {
            Change::Workload(workload) => node_pod(&own, &workload),
            _ => None,
        }))
    }
}

/// Namespace and name of a pod.
type Name = (Arc<str>, Arc<str>);

/// What of a pod is not in its workload.
#[derive(Debug)]
struct Own {
    uid: Arc<str>,
    cgroup: Arc<str>,
    marked: bool,
    making: Arc<Making>,
}

async fn watch_pods(client: Client, view: Viewpoint, pods: channel::Sender<Option<NodePods>>) {
    let watches = kinds::of_node(&view.node);
    let (told, mut events) = mpsc::channel::<Told>(super::QUEUE);
    let mut tasks = JoinSet::new();
    for (number, watch) in watches.iter().enumerate() {
        tasks.spawn(watch::follow(client.clone(), watch.clone(), number, told.clone(), Retry::default()));
    }
    let kinds: Vec<Kind> = watches.iter().map(|w| w.kind).collect();
    let mut cluster = Cluster::new(view, &Settings { unaddressed: true, ..Settings::default() }, watches);
    let mut own: HashMap<Name, Own> = HashMap::new();
    let mut workloads: BTreeMap<WorkloadUid, Arc<Workload>> = BTreeMap::new();
    while let Some(mut event) = events.recv().await {
        loop {
            if kinds.get(event.watch) == Some(&Kind::Pod) {
                note(&mut own, &mut event.what);
            }
            cluster.take(event);
            match events.try_recv() {
                Ok(next) => event = next,
                Err(_) => break,
            }
        }
        if cluster.has_new_failures() {
            for problem in cluster.problems().iter().filter(|p| p.severity == Severity::Error) {
                tracing::error!(code = problem.code, "enrolment: {problem}");
            }
        }
        // Without the labels of namespaces, pods that an agent before this one closed would look as if nobody enrolled them.
        if !cluster.is_whole() {
            continue;
        }
        for change in cluster.flush() {
            match change {
                Change::Workload(workload) => drop(workloads.insert(Arc::clone(&workload.uid), workload)),
                Change::WorkloadGone(uid) => drop(workloads.remove(&uid)),
                _ => {}
            }
        }
        // Also those that a list did not name any more.
        let names: HashSet<Name> = workloads.values().map(|w| (Arc::clone(&w.namespace), Arc::clone(&w.name))).collect();
        own.retain(|name, _| names.contains(name));
        let known: NodePods = workloads.values().filter_map(|workload| node_pod(&own, workload)).collect();
        if pods.send(Some(known)).is_err() {
            return;
        }
    }
}

fn node_pod(own: &HashMap<Name, Own>, workload: &Arc<Workload>) -> Option<NodePod> {
    let own = own.get(&(Arc::clone(&workload.namespace), Arc::clone(&workload.name)))?;
    let (uid, cgroup, making) = (Arc::clone(&own.uid), Arc::clone(&own.cgroup), Arc::clone(&own.making));
    Some(NodePod { uid, cgroup, workload: Arc::clone(workload), marked: own.marked, making })
}

/// Takes what is not the translator's out of an event: it would call a pod enrolled because it is marked.
fn note(own: &mut HashMap<Name, Own>, what: &mut What) {
    let (object, gone) = match what {
        What::Listed(object, _) | What::Changed(object, _) => (object, false),
        What::Gone(object) => (object, true),
        _ => return,
    };
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default().into();
    let (name, uid): (Name, Arc<str>) = ((text("namespace"), text("name")), text("uid"));
    if gone {
        own.remove(&name);
        return;
    }
    let annotations = object["metadata"]["annotations"].as_object_mut();
    let marked = annotations.and_then(|all| all.remove(MARK)).is_some_and(|value| value == "enabled");
    let cgroup = static_uid(object).map_or_else(|| Arc::clone(&uid), Arc::from);
    let making = Arc::new(making(object));
    own.insert(name, Own { uid, cgroup, marked, making });
}

/// Whose a pod is, and the containers of which the kubelet told.
fn making(pod: &Value) -> Making {
    let all = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |of: &Value, key: &str| of[key].as_str().unwrap_or_default().into();
    let containers = |key: &str| {
        let of = |one: &Value| Container { name: text(one, "name"), image: text(one, "image"), image_id: text(one, "imageID") };
        all(&pod["status"][key]).iter().map(of).collect()
    };
    let owner = |one: &Value| Owner { kind: text(one, "kind"), name: text(one, "name"), uid: text(one, "uid") };
    Making {
        owners: all(&pod["metadata"]["ownerReferences"]).iter().map(owner).collect(),
        containers: containers("containerStatuses"),
        init_containers: containers("initContainerStatuses"),
    }
}

/// Of a static pod the API has an image with a uid of its own; the kubelet knows the pod by a hash of its manifest, 32 hexadecimal
/// digits. Nothing else is believed: a pod could name another one, whose traffic would then have its identity.
fn static_uid(object: &Value) -> Option<&str> {
    let annotation = |key: &str| object["metadata"]["annotations"][key].as_str();
    let hash = annotation("kubernetes.io/config.hash")?;
    let is_image = annotation("kubernetes.io/config.mirror") == Some(hash);
    (is_image && hash.len() == 32 && hash.bytes().all(|b| b.is_ascii_hexdigit())).then_some(hash)
}

/// Marks the pods that are served, and takes the mark from those that are not and need not be.
async fn keep_marks(client: Client, mut pods: channel::Receiver<Option<NodePods>>, mut served: channel::Receiver<Served>) {
    loop {
        let (now, keys) = (pods.borrow_and_update().clone(), served.borrow_and_update().clone());
        let mut failed = false;
        if let (Some(pods), Some(keys)) = (now, keys) {
            for pod in pods.iter() {
                let is_served = keys.contains(&pod.uid);
                // A pod that should be served and cannot be right now keeps its mark: it is closed, not direct.
                if is_served == pod.marked || (!is_served && pod.workload.protocol == Protocol::Hbone) {
                    continue;
                }
                failed |= !mark(&client, pod, is_served).await;
            }
        }
        tokio::select! {
            changed = pods.changed() => if changed.is_err() { return },
            changed = served.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if failed => {}
        }
    }
}

/// Sets or removes the mark; `false` when that has to be tried again.
async fn mark(client: &Client, pod: &NodePod, enabled: bool) -> bool {
    let Workload { namespace, name, .. } = &*pod.workload;
    let value = if enabled { json!("enabled") } else { Value::Null };
    // With its uid, so that a pod that came under the same name is not meant. The status is the lesser right.
    let patch = json!({ "metadata": { "uid": pod.uid, "annotations": { MARK: value } } });
    match client.merge(&format!("/api/v1/namespaces/{namespace}/pods/{name}/status"), &patch).await {
        Ok(_) => {
            tracing::info!(pod = %format!("{namespace}/{name}"), enabled, "the pod's mark says whether it is served");
            true
        }
        Err(failure) if failure.why == Why::Missing => true,
        Err(failure) => {
            tracing::warn!(pod = %format!("{namespace}/{name}"), error = failure.message, "the pod cannot be marked, trying again");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(hash: &str, mirror: &str) -> Option<String> {
        let annotations = json!({ "kubernetes.io/config.hash": hash, "kubernetes.io/config.mirror": mirror });
        static_uid(&json!({ "metadata": { "annotations": annotations } })).map(str::to_owned)
    }

    #[test]
    fn a_pod_tells_its_owners_and_containers() {
        let pod = json!({
            "metadata": { "ownerReferences": [{ "kind": "ReplicaSet", "name": "web-1", "uid": "r-1", "controller": true }] },
            "status": {
                "containerStatuses": [{ "name": "app", "image": "reg/web:1", "imageID": "reg/web@sha256:ab" }],
                "initContainerStatuses": [{ "name": "init", "image": "reg/init:1" }],
            },
        });
        let of = making(&pod);
        let owner = Owner { kind: "ReplicaSet".into(), name: "web-1".into(), uid: "r-1".into() };
        let container =
            |name: &str, image: &str, id: &str| Container { name: name.into(), image: image.into(), image_id: id.into() };
        assert_eq!(of.owners, [owner]);
        assert_eq!(of.containers, [container("app", "reg/web:1", "reg/web@sha256:ab")]);
        assert_eq!(of.init_containers, [container("init", "reg/init:1", "")]);
        assert_eq!(making(&json!({ "metadata": {} })), Making::default());
    }

    #[test]
    fn a_static_pod_is_known_by_its_hash_and_nobody_by_anothers_uid() {
        let hash = "9d0b1f4c2a6e8d7c5b3a190817263544";
        assert_eq!(of(hash, hash).as_deref(), Some(hash));
        assert_eq!(of(hash, ""), None, "no image of a static pod");
        let other = "0a1b2c3d-1111-2222-3333-444455556666";
        assert_eq!(of(other, other), None, "the uid of a pod of the API");
        assert_eq!(static_uid(&json!({ "metadata": { "uid": "u" } })), None);
    }
}
