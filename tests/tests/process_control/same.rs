//! The same objects, read from a folder and told by a control plane, are the same mesh, field by field.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_model::labels::Labels;
use mesh_model::policy::{Policy, PolicyBody};
use mesh_model::service::Service;
use mesh_model::snapshot::Snapshot;
use mesh_model::workload::Workload;
use mesh_sources::{Mesh, Origin};
use mesh_tests::istiod::Istiod;

use crate::encode;
use crate::fixture::{Fixture, until, view};

async fn folder(root: PathBuf) -> Mesh {
    let (mesh, _) = mesh_sources::start(Origin::Folder(root), view());
    mesh.synced().await;
    mesh
}

/// What istiod does not tell: where an object was written, labels, and the namespace file of a pod on this machine.
pub(crate) fn workloads(snapshot: &Snapshot) -> BTreeMap<Arc<str>, Workload> {
    let bare = |w: &Arc<Workload>| Workload { origin: None, netns: None, labels: Labels::default(), ..Workload::clone(w) };
    snapshot.workloads().map(|w| (Arc::clone(&w.uid), bare(w))).collect()
}
pub(crate) fn services(snapshot: &Snapshot) -> BTreeMap<String, Service> {
    snapshot.services().map(|s| (s.key.to_string(), Service { origin: None, ..Service::clone(s) })).collect()
}
pub(crate) fn policies(snapshot: &Snapshot) -> BTreeMap<String, Policy> {
    snapshot.policies().map(|p| (p.key.to_string(), Policy { origin: None, ..Policy::clone(p) })).collect()
}

async fn compare(root: PathBuf, least: [usize; 3]) {
    let direct = folder(root).await.load_full();
    for p in direct.policies() {
        assert!(matches!(p.body, PolicyBody::Rules { .. }), "{} cannot be told by istiod", p.key);
    }
    let istiod = Istiod::local().unwrap();
    istiod.replace(encode::resources(&direct));
    let fixture = Fixture::over(istiod).synced().await;
    assert!(fixture.istiod.seen().nacks.is_empty(), "{:?}", fixture.istiod.seen().nacks);
    let told = fixture.mesh.load_full();
    let (a, b) = (workloads(&direct), workloads(&told));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (uid, w) in &a {
        assert_eq!(*w, b[uid]);
    }
    let (a, b) = (services(&direct), services(&told));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (key, s) in &a {
        assert_eq!(*s, b[key]);
    }
    assert_eq!(policies(&direct), policies(&told));
    assert_eq!(direct.view().locality, told.view().locality);
    let counts = [told.workloads().count(), told.services().count(), told.policies().count()];
    assert!(counts.iter().zip(least).all(|(found, least)| *found >= least), "{counts:?}");
}

#[tokio::test]
async fn the_example_mesh_is_the_same_either_way() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/examples/zamaz");
    compare(example, [5, 3, 3]).await;
}

#[tokio::test]
async fn every_field_is_the_same_either_way() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mesh.yaml"), MESH).unwrap();
    compare(dir.path().to_path_buf(), [4, 4, 5]).await;
}

/// A change of the folder, told as the control plane tells it, leads to the same mesh too.
#[tokio::test]
async fn a_change_is_the_same_either_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    std::fs::write(&path, MESH).unwrap();
    let direct = folder(dir.path().to_path_buf()).await;
    let istiod = Istiod::local().unwrap();
    istiod.replace(encode::resources(&direct.load_full()));
    let fixture = Fixture::over(istiod).synced().await;
    let before = direct.load().version();
    std::fs::write(
        &path,
        MESH.replace("version: v2", "version: v3").replace("cluster.local/ns/t/sa/client", "cluster.local/ns/t/sa/web"),
    )
    .unwrap();
    until("the folder to be read again", || direct.load().version() > before).await;
    fixture.istiod.replace(encode::resources(&direct.load_full()));
    until("the control plane's word", || policies(&fixture.mesh.load_full()) == policies(&direct.load_full())).await;
    until("all of it", || workloads(&fixture.mesh.load_full()) == workloads(&direct.load_full())).await;
}

const MESH: &str = include_str!("../e2e_istiod/meshes/every-field.yaml");
