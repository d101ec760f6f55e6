#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
use super::*;
use crate::translate::{Settings, Translator};
use mesh_model::policy::PolicyKey;
use mesh_model::snapshot::{Snapshot, Viewpoint};
use mesh_model::workload::Health;

const OBJECTS: &str = "
apiVersion: v1
kind: Pod
metadata: { name: web, namespace: t, labels: { app: web, version: v1 } }
spec: { nodeName: n }
status: { phase: Running, podIP: 10.0.0.1, podIPs: [ { ip: 10.0.0.1 } ], conditions: [ { type: Ready, status: 'True' } ] }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t }
spec: { selector: { app: web }, clusterIP: 10.96.0.1, ports: [ { name: http, port: 80 } ] }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: t }
spec: { hosts: [ web, far ], http: [ { timeout: 3s, route: [ { destination: { host: web } } ] } ] }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: mine, namespace: t }
spec: {}
";

/// A translator beside a control plane, and what it has handed out.
struct Joined {
    translator: Translator,
    mesh: Snapshot,
}

impl Joined {
    fn new() -> Self {
        let settings = Settings { layer7: true, told: true, ..Settings::default() };
        let view = Viewpoint::default();
        let mut joined = Self { translator: Translator::new(view.clone(), &settings), mesh: Snapshot::empty(view) };
        joined.objects(OBJECTS);
        joined
    }
    fn objects(&mut self, text: &str) {
        for doc in crate::yaml::documents(text) {
            let root = crate::yaml::parse_whole(doc).unwrap();
            let object = self.translator.reader("test".into()).object(&root);
            self.translator.upsert(object.unwrap());
        }
    }
    fn told(&mut self, changes: Vec<Change>) {
        self.translator.adopt(changes);
        self.flush();
    }
    /// How many changes were handed out.
    fn flush(&mut self) -> usize {
        let changes = self.translator.flush();
        self.mesh = self.mesh.apply(&changes);
        changes.len()
    }
    fn version(&self) -> Option<String> {
        self.mesh.find_workload(&pod().uid).map(|w| w.labels.get("version").map_or_else(String::new, ToString::to_string))
    }
}

fn pod() -> Workload {
    let mut w = Workload::new("Kubernetes//Pod/t/web", "web", "");
    w.namespace = "t".into();
    w
}
fn service(name: &str) -> Service {
    let mut s = Service::new(name, "t", "");
    s.key = ServiceKey::new("t", &format!("{name}.t.svc.cluster.local"));
    s.canonical = true;
    s
}

#[test]
fn the_mesh_is_what_the_control_plane_tells_with_the_labels_of_the_objects() {
    let mut joined = Joined::new();
    joined.flush();
    assert_eq!((joined.mesh.workloads().count(), joined.mesh.services().count()), (0, 0), "objects alone are no mesh");
    joined.told(vec![Change::Workload(Arc::new(pod())), Change::Service(Arc::new(service("web")))]);
    assert_eq!(joined.version().as_deref(), Some("v1"));
    assert_eq!(joined.mesh.services().count(), 1);
    assert!(joined.mesh.find_service(&service("web").key).unwrap().vips.is_empty(), "its addresses are the control plane's");
    assert!(joined.mesh.find_policy(&PolicyKey::new("t", "mine")).is_none(), "so are policies of layer 4");
    assert!(joined.mesh.l7_policies().count() > 0 || joined.mesh.routes().count() > 0);
    // Its word about the workload keeps the labels; the object's change brings new ones.
    let sick = Workload { health: Health::Unhealthy, ..pod() };
    joined.told(vec![Change::Workload(Arc::new(sick))]);
    assert_eq!(joined.version().as_deref(), Some("v1"));
    joined.objects(&OBJECTS.replace("version: v1", "version: v2"));
    joined.flush();
    assert_eq!(joined.version().as_deref(), Some("v2"));
    assert_eq!(joined.mesh.find_workload(&pod().uid).unwrap().health, Health::Unhealthy);
    assert_eq!(joined.flush(), 0, "nothing is told twice");
    joined.told(vec![Change::WorkloadGone(pod().uid), Change::ServiceGone(service("web").key)]);
    assert_eq!((joined.version(), joined.mesh.services().count(), joined.mesh.routes().count()), (None, 0, 0));
}

#[test]
fn a_service_only_the_control_plane_knows_has_routes_too() {
    let mut joined = Joined::new();
    joined.told(vec![Change::Service(Arc::new(service("web")))]);
    assert_eq!(joined.mesh.routes().count(), 1);
    joined.told(vec![Change::Service(Arc::new(service("far")))]);
    let hosts: Vec<String> = joined.mesh.routes().map(|(key, _)| key.hostname.to_string()).collect();
    assert_eq!(hosts.len(), 2, "{hosts:?}");
}

#[test]
fn the_order_of_the_two_does_not_matter() {
    let told = || vec![Change::Workload(Arc::new(pod())), Change::Service(Arc::new(service("web")))];
    let mut late = Joined::new();
    late.flush();
    late.told(told());
    let mut early = Joined::new();
    early.told(told());
    let dump = |joined: &Joined| {
        let text = joined.mesh.canonical_dump();
        text.lines().filter(|line| !line.contains("version:")).map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(dump(&late), dump(&early));
}
