//! A waypoint's mesh: half of it told by a control plane, half of it the objects of a cluster.
use std::path::Path;
use std::time::Duration;

use mesh_model::service::ServiceKey;
use mesh_model::snapshot::Snapshot;
use mesh_proto::ADDRESS_TYPE;
use mesh_runtime::metrics::Registry;
use mesh_sources::istiod::{self, MissingPolicy, node::Role};
use mesh_sources::kubernetes::{Access, Reach, Retry, Scope, Watches};
use mesh_sources::{Diagnostics, Mesh, Origin, translate};
use mesh_tests::istiod::Istiod;
use mesh_tests::kube_api::KubeApi;
use serde_json::json;
use tempfile::TempDir;

use crate::fixture::{control_plane, service, until, view, workload};
use crate::{encode, same};

/// A source over both.
struct Joined {
    mesh: Mesh,
    diagnostics: Diagnostics,
    _files: TempDir,
}

fn settings() -> translate::Settings {
    translate::Settings { layer7: true, ..translate::Settings::default() }
}

fn over(istiod: &Istiod, api: &KubeApi, namespace: &str) -> Joined {
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("root.pem"), istiod.root()).unwrap();
    std::fs::write(files.path().join("token"), "of a waypoint").unwrap();
    let registry = Registry::new();
    let env = [("POD_NAME", "wp-1"), ("POD_NAMESPACE", namespace), ("SERVICE_ACCOUNT", "wp")];
    let telling = istiod::Settings {
        control_plane: control_plane(istiod, &files),
        node: istiod::node::of_environment(Role::Waypoint, "node-1", "c1", env.map(|(k, v)| (k.to_owned(), v.to_owned()))),
        missing_policy: MissingPolicy::Deny,
        demand: None,
        metrics: istiod::Metrics::new(&registry).unwrap(),
    };
    let scope = Scope {
        access: Access { kubeconfig: Some(api.kubeconfig(files.path()).unwrap()) },
        reach: Reach::Waypoint { namespace: namespace.to_owned() },
        retry: Retry { least: Duration::from_millis(20), most: Duration::from_millis(200), missing: Duration::from_millis(200) },
        watches: Watches::default(),
    };
    let origin = Origin::IstiodAndKubernetes(Box::new(telling), Box::new(scope));
    let (mesh, diagnostics) = mesh_sources::start_with(origin, view(), &settings());
    Joined { mesh, diagnostics, _files: files }
}

impl Joined {
    fn has_routes(&self, host: &str) -> bool {
        self.mesh.load().routes().any(|(key, _)| *key == ServiceKey::new("ns", host))
    }
    fn knows(&self, uid: &str) -> bool {
        self.mesh.load().find_workload(uid).is_some()
    }
}

fn route(host: &str) -> serde_json::Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": { "name": host, "namespace": "ns" },
        "spec": { "hosts": [host], "http": [{ "timeout": "3s", "route": [{ "destination": { "host": host } }] }] },
    })
}

/// Everything but workloads, services and policies of layer 4, which [`same`] compares by their fields.
fn layer7(snapshot: &Snapshot) -> Vec<String> {
    let bare = |what: String| {
        let mut out = String::new();
        let mut rest = what.as_str();
        while let Some((before, origin)) = rest.split_once("Origin {") {
            out.push_str(before);
            rest = origin.split_once('}').unwrap().1;
        }
        out + rest
    };
    let routes = snapshot.routes().map(|(key, table)| format!("{key} {table:?}"));
    let destinations = snapshot.destinations().map(|d| format!("{d:?}"));
    let policies = snapshot.l7_policies().map(|(target, all)| format!("{target:?} {all:?}"));
    let auths = snapshot.request_auths().map(|(target, all)| format!("{target:?} {all:?}"));
    let gateways = snapshot.gateways().map(|g| format!("{g:?}"));
    let mut all: Vec<String> = routes.chain(destinations).chain(policies).chain(auths).chain(gateways).map(bare).collect();
    all.sort();
    all
}

/// The example mesh from a folder alone, and the same mesh from istiod and the API server together.
#[tokio::test]
async fn both_halves_together_are_the_mesh_of_the_folder() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/examples/zamaz");
    let (direct, _) = mesh_sources::start_with(Origin::Folder(folder.clone()), view(), &settings());
    direct.synced().await;
    let direct = direct.load_full();
    let (istiod, api) = (Istiod::local().unwrap(), KubeApi::start().unwrap());
    istiod.replace(encode::resources(&direct));
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            api.apply_yaml(&std::fs::read_to_string(path).unwrap()).unwrap();
        }
    }
    let joined = over(&istiod, &api, "zamaz");
    joined.mesh.synced().await;
    let told = joined.mesh.load_full();
    assert_eq!(same::workloads(&direct), same::workloads(&told));
    assert_eq!(same::services(&direct), same::services(&told));
    assert_eq!(same::policies(&direct), same::policies(&told));
    for w in direct.workloads() {
        assert_eq!(w.labels, told.find_workload(&w.uid).unwrap().labels, "subsets are chosen by them");
    }
    let (a, b) = (layer7(&direct), layer7(&told));
    assert!(a.len() > 5, "{a:#?}");
    for (left, right) in a.iter().zip(&b) {
        assert_eq!(left, right);
    }
    assert_eq!(a.len(), b.len());
    let seen = istiod.seen();
    assert!(seen.nacks.is_empty(), "{:?}", seen.nacks);
    assert_eq!(seen.nodes.first().map(String::as_str), Some("waypoint~1.1.1.1~wp-1.zamaz~zamaz.svc.cluster.local"));
    assert_eq!((api.lists("endpointslices"), api.lists("nodes")), (0, 0), "istiod tells what they would");
}

/// Ready means that both have told; afterwards what one of them last told stays while it is away.
#[tokio::test]
async fn neither_half_counts_without_the_other_and_both_outlive_their_teller() {
    let (istiod, api) = (Istiod::local().unwrap(), KubeApi::start().unwrap());
    istiod.workload(workload("a"));
    istiod.service(service("web.ns.svc.cluster.local"));
    api.apply(route("web.ns.svc.cluster.local"));
    istiod.withhold(ADDRESS_TYPE, true);
    let joined = over(&istiod, &api, "ns");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!joined.mesh.is_synced(), "objects alone are no mesh");
    assert_eq!(joined.mesh.load().routes().count(), 0);
    istiod.withhold(ADDRESS_TYPE, false);
    until("both", || joined.mesh.is_synced() && joined.has_routes("web.ns.svc.cluster.local")).await;

    let (istiod2, api2) = (Istiod::local().unwrap(), KubeApi::start().unwrap());
    istiod2.workload(workload("a"));
    api2.silence(true);
    let silent = over(&istiod2, &api2, "ns");
    until("istiod to be heard", || istiod2.seen().acks >= 2).await;
    assert!(!silent.mesh.is_synced() && !silent.knows("c1//Pod/ns/a"), "istiod alone is no mesh");
    until("why to be told", || silent.diagnostics.list().iter().any(|p| p.code == Some("not-followed"))).await;
    api2.silence(false);
    until("both", || silent.mesh.is_synced() && silent.knows("c1//Pod/ns/a")).await;

    istiod.away(true);
    api.apply(route("late.ns.svc.cluster.local"));
    api.delete("virtualservices", "ns", "web.ns.svc.cluster.local");
    until("objects without istiod", || !joined.has_routes("web.ns.svc.cluster.local")).await;
    assert!(joined.knows("c1//Pod/ns/a"), "what istiod told stays");
    istiod.service(service("late.ns.svc.cluster.local"));
    istiod.remove(ADDRESS_TYPE, "c1//Pod/ns/a");
    istiod.away(false);
    until("istiod to be back", || joined.has_routes("late.ns.svc.cluster.local") && !joined.knows("c1//Pod/ns/a")).await;
    api.silence(true);
    istiod.workload(workload("b"));
    until("istiod without the API server", || joined.knows("c1//Pod/ns/b")).await;
    assert!(joined.has_routes("late.ns.svc.cluster.local"), "what the objects said stays");
}

/// What each refuses is listed beside what the other refuses.
#[tokio::test]
async fn problems_of_both_are_listed() {
    let (istiod, api) = (Istiod::local().unwrap(), KubeApi::start().unwrap());
    istiod.put(ADDRESS_TYPE, "c1//Pod/ns/broken", vec![0xff, 0xff]);
    let mut wrong = route("web.ns.svc.cluster.local");
    wrong["spec"]["htttp"] = json!([]);
    api.apply(wrong);
    let joined = over(&istiod, &api, "ns");
    joined.mesh.synced().await;
    let has = |what: &str| joined.diagnostics.list().iter().any(|p| p.origin.object.contains(what));
    until("both complaints", || has("Address c1//Pod/ns/broken") && has("VirtualService ns/web")).await;
    api.delete("virtualservices", "ns", "web.ns.svc.cluster.local");
    until("one of them to go", || !has("VirtualService ns/web")).await;
    assert!(has("Address c1//Pod/ns/broken"));
}
