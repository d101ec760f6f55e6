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

const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: istio-system, labels: { topology.istio.io/network: net-1 } }
---
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient, istio.io/use-waypoint: wp } }
---
apiVersion: v1
kind: Node
metadata:
  name: node-1
  labels: { topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z1, topology.istio.io/subzone: s1 }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp, namespace: t, labels: { istio.io/waypoint-for: all } }
spec:
  gatewayClassName: istio-waypoint
  listeners: [{ name: mesh, port: 15008, protocol: HBONE }]
status: { addresses: [{ type: Hostname, value: wp.t.svc.cluster.local }] }
---
apiVersion: v1
kind: Pod
metadata: { name: web-1, namespace: t, labels: { app: web, version: v2 } }
spec: { nodeName: node-1, serviceAccountName: web, containers: [{ name: c, ports: [{ name: http, containerPort: 8080 }] }] }
status: { phase: Running, podIP: 10.1.0.1, podIPs: [{ ip: 10.1.0.1 }, { ip: "fd00::1" }], conditions: [{ type: Ready, status: "True" }] }
---
apiVersion: v1
kind: Pod
metadata: { name: job-1, namespace: t, labels: { app: web }, ownerReferences: [{ kind: Job, name: job, controller: true }] }
spec: { nodeName: node-2, containers: [] }
status: { phase: Running, podIP: 10.1.0.2, podIPs: [{ ip: 10.1.0.2 }], conditions: [{ type: Ready, status: "False" }] }
---
apiVersion: v1
kind: Pod
metadata: { name: host, namespace: plain }
spec: { nodeName: node-1, hostNetwork: true, containers: [] }
status: { phase: Running, podIP: 10.9.0.1, podIPs: [{ ip: 10.9.0.1 }], conditions: [{ type: Ready, status: "True" }] }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t, annotations: { networking.istio.io/traffic-distribution: PreferClose } }
spec:
  selector: { app: web }
  clusterIP: 10.96.0.20
  clusterIPs: ["10.96.0.20", "fd00:96::20"]
  ipFamilies: [IPv4, IPv6]
  publishNotReadyAddresses: true
  ports:
  - { name: http, port: 80, targetPort: http }
  - { name: grpc, port: 90, targetPort: 9090, appProtocol: grpc }
---
apiVersion: v1
kind: Service
metadata: { name: local, namespace: t, labels: { istio.io/use-waypoint: none } }
spec: { selector: { app: web }, clusterIP: 10.96.0.21, internalTrafficPolicy: Local, ports: [{ name: tcp, port: 81, targetPort: 8081 }] }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: outside, namespace: t }
spec:
  hosts: [outside.example.com]
  addresses: ["240.0.0.0/24", "240.1.0.1"]
  location: MESH_EXTERNAL
  resolution: STATIC
  subjectAltNames: ["spiffe://cluster.local/ns/t/sa/out"]
  ports: [{ number: 443, name: tls, protocol: TLS }]
  endpoints: [{ address: 192.0.2.7, locality: r2/z2/s2, weight: 3 }]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: through, namespace: t }
spec: { hosts: [through.example.com], resolution: NONE, ports: [{ number: 80, name: http, protocol: HTTP }] }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: web, namespace: t }
spec: { selector: { matchLabels: { app: web } }, mtls: { mode: STRICT }, portLevelMtls: { "8080": { mode: PERMISSIVE } } }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: allow, namespace: t }
spec:
  selector: { matchLabels: { app: web } }
  action: ALLOW
  rules:
  - from: [{ source: { principals: ["cluster.local/ns/t/sa/client", "*/sa/x", "cluster.local/*", "*"], notNamespaces: [bad] } }]
    to: [{ operation: { ports: ["8080", "9090"], notPorts: ["1"] } }]
    when: [{ key: source.ip, values: ["10.0.0.0/8", "fd00::/8"], notValues: ["10.2.3.4"] }]
  - from: [{ source: { serviceAccounts: ["t/web"] } }]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: deny-all, namespace: plain }
spec: {}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: dry, namespace: istio-system, annotations: { istio.io/dry-run: "true" } }
spec: { action: DENY, rules: [{ from: [{ source: { ipBlocks: ["192.0.2.0/24"] } }] }] }
"#;
