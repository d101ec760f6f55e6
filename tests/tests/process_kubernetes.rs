//! The Kubernetes API as a source, against a server that misbehaves on request: what a folder of the same objects gives,
//! changes, pages, dropped watches, forgotten versions, missing rights and missing CRDs, a server that does not answer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a suite")]

use std::path::PathBuf;
use std::time::Duration;

use mesh_model::Snapshot;
use mesh_model::policy::PolicyBody;
use mesh_model::workload::Protocol;
use mesh_runtime::metrics::Registry;
use mesh_sources::kubernetes::{Access, DaemonSet, Reach, Retry, Scope, Watches};
use mesh_sources::{Diagnostics, Mesh, Origin, Severity, Viewpoint, translate};
use mesh_tests::kube_api::{KubeApi, documents};
use mesh_tests::wait;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A source that follows a server.
struct Followed {
    mesh: Mesh,
    diagnostics: Diagnostics,
    registry: Registry,
    _runtime: tokio::runtime::Runtime,
    _dir: TempDir,
}

fn follow(api: &KubeApi, reach: Reach) -> Followed {
    let dir = tempfile::tempdir().unwrap();
    let access = Access { kubeconfig: Some(api.kubeconfig(dir.path()).unwrap()) };
    let retry = Retry { least: Duration::from_millis(20), most: Duration::from_millis(200), missing: Duration::from_millis(200) };
    let (registry, watches) = (Registry::new(), Watches::default());
    watches.expose(&registry).unwrap();
    let settings = translate::Settings { layer7: reach != Reach::Agent, ..translate::Settings::default() };
    let origin = Origin::Kubernetes(Box::new(Scope { access, reach, retry, watches }));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mesh, diagnostics) = runtime.block_on(async { mesh_sources::start_with(origin, view(), &settings) });
    Followed { mesh, diagnostics, registry, _runtime: runtime, _dir: dir }
}

fn view() -> Viewpoint {
    Viewpoint { node: "node-a".into(), ..Viewpoint::default() }
}

impl Followed {
    fn synced(self) -> Self {
        wait::until_true("the first mesh", || self.mesh.is_synced()).unwrap();
        self
    }
    #[track_caller]
    fn wait(&self, what: &str, holds: impl Fn(&Snapshot) -> bool) {
        let held = wait::until_true(what, || holds(&self.mesh.load_full()));
        held.unwrap_or_else(|e| panic!("{e:#}: {:#?}", self.diagnostics.list()));
    }
    #[track_caller]
    fn wait_problem(&self, code: &str, resource: &str) {
        wait::until_true(&format!("{code} about {resource}"), || self.has_problem(code, resource)).unwrap();
    }
    /// Metrics are set beside the mesh, not with it.
    #[track_caller]
    fn wait_metric(&self, line: &str, value: &str) {
        let held = wait::until_true(&format!("{line} {value}"), || self.metric(line).as_deref() == Some(value));
        held.unwrap_or_else(|e| panic!("{e:#}: it is {:?}", self.metric(line)));
    }
    fn has_problem(&self, code: &str, object: &str) -> bool {
        self.diagnostics.list().iter().any(|p| p.code == Some(code) && p.origin.object.contains(object))
    }
    fn metric(&self, line: &str) -> Option<String> {
        let text = self.registry.encode();
        text.lines().find_map(|l| l.strip_prefix(line)).map(|rest| rest.trim().to_owned())
    }
}

fn namespace(name: &str, mode: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": { "istio.io/dataplane-mode": mode } } })
}
fn pod(name: &str, ip: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop", "labels": labels, "managedFields": [{ "manager": "kubelet" }] },
        "spec": { "nodeName": "node-a", "serviceAccountName": "shop" },
        "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }], "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}
fn allow(principal: &str) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": "allow", "namespace": "shop" },
        "spec": { "rules": [{ "from": [{ "source": { "principals": [principal] } }] }] },
    })
}
fn has(snap: &Snapshot, pod: &str) -> bool {
    snap.workloads().any(|w| *w.name == *pod)
}
/// The one policy `shop/allow`, as text.
fn policy(snap: &Snapshot) -> String {
    snap.policies().find(|p| *p.key.name == *"allow").map(|p| format!("{:?}", p.body)).unwrap_or_default()
}
/// Whether everything is denied because something is not known.
fn is_closed(snap: &Snapshot) -> bool {
    snap.policies().any(|p| matches!(p.body, PolicyBody::Unusable { .. }) && p.key.name.starts_with("unreadable:kubernetes"))
}

#[test]
fn the_same_objects_give_the_same_mesh_as_a_folder() {
    let folder: PathBuf = mesh_tests::agent::workspace_dir().join("manifests/examples/zamaz");
    for reach in [Reach::Agent, Reach::Waypoint { namespace: "zamaz".into() }] {
        let api = KubeApi::start().unwrap();
        for file in std::fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|e| e == "yaml") {
                api.apply_yaml(&std::fs::read_to_string(path).unwrap()).unwrap();
            }
        }
        let layer7 = reach != Reach::Agent;
        let cluster = follow(&api, reach).synced();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let settings = translate::Settings { layer7, ..translate::Settings::default() };
        let (mesh, _) = runtime.block_on(async { mesh_sources::start_with(Origin::Folder(folder.clone()), view(), &settings) });
        wait::until_true("the folder", || mesh.is_synced()).unwrap();
        let (expected, found) = (without_places(&mesh.load_full()), without_places(&cluster.mesh.load_full()));
        assert!(expected.iter().any(|line| line.contains("zamaz-api-service")), "{expected:#?}");
        for (left, right) in expected.iter().zip(&found) {
            assert_eq!(left, right, "layer 7: {layer7}");
        }
        assert_eq!(expected.len(), found.len());
    }
}

/// The tables, without where each object was written.
fn without_places(snap: &Snapshot) -> Vec<String> {
    let dump = snap.canonical_dump();
    let mut out = String::new();
    let mut rest = dump.as_str();
    while let Some(at) = rest.find("Origin {") {
        let (before, origin) = rest.split_at(at);
        out.push_str(before);
        rest = &origin[origin.find('}').unwrap() + 1..];
    }
    out.push_str(rest);
    // The API server sorts the keys of what it stores; nothing in the tables means something by that order.
    let sorted = |line: &str| {
        let mut parts: Vec<&str> = line.split([',', '[', ']', '{', '}']).map(str::trim).collect();
        parts.sort_unstable();
        parts.join(" ")
    };
    out.lines().map(sorted).collect()
}

#[test]
fn changes_are_followed_and_what_they_touch_only() {
    let api = KubeApi::start().unwrap();
    api.apply(namespace("shop", "ambient"));
    api.apply(pod("web", "10.0.0.1", json!({})));
    let cluster = follow(&api, Reach::Agent).synced();
    cluster.wait("the pod is enrolled", |s| s.workloads().any(|w| w.protocol == Protocol::Hbone));
    api.apply(pod("api", "10.0.0.2", json!({ "app": "api" })));
    cluster.wait("a new pod", |s| has(s, "api"));
    api.apply(namespace("shop", "none"));
    cluster.wait("the namespace left the mesh", |s| s.workloads().all(|w| w.protocol == Protocol::Tcp));
    assert!(api.delete("pods", "shop", "web"));
    cluster.wait("the pod is gone", |s| !has(s, "web"));
    cluster.wait_metric("culvert_kubernetes_objects{resource=\"pods\"}", "1");
    cluster.wait_metric("culvert_kubernetes_watch_up{resource=\"pods\"}", "1");
    assert_eq!(api.lists("pods"), 1, "nothing was listed twice");
}

#[test]
fn a_large_list_comes_in_pages() {
    let api = KubeApi::start().unwrap();
    api.apply(namespace("shop", "ambient"));
    for n in 0..1201 {
        api.apply(pod(&format!("p{n}"), &format!("10.1.{}.{}", n / 250, n % 250 + 1), json!({})));
    }
    let cluster = follow(&api, Reach::Agent).synced();
    assert_eq!(cluster.mesh.load_full().workloads().count(), 1201);
    assert_eq!(api.lists("pods"), 3);
}

#[test]
fn a_dropped_watch_goes_on_where_it_was() {
    let api = KubeApi::start().unwrap();
    api.apply(pod("web", "10.0.0.1", json!({})));
    let cluster = follow(&api, Reach::Agent).synced();
    wait::until_true("a watch", || api.watches("pods") == 1).unwrap();
    for round in 2..5 {
        api.drop_watches();
        api.apply(pod(&format!("p{round}"), &format!("10.0.0.{round}"), json!({})));
        cluster.wait("what came meanwhile", |s| has(s, &format!("p{round}")));
    }
    assert_eq!(api.lists("pods"), 1, "the place was kept");
    assert!(has(&cluster.mesh.load_full(), "web"));
}

#[test]
fn a_forgotten_place_means_a_new_list_and_what_is_not_in_it_is_gone() {
    let api = KubeApi::start().unwrap();
    api.apply(pod("web", "10.0.0.1", json!({})));
    api.apply(pod("old", "10.0.0.2", json!({})));
    let cluster = follow(&api, Reach::Agent).synced();
    wait::until_true("a watch", || api.watches("pods") == 1).unwrap();
    api.forget(|quiet| {
        quiet.delete("pods", "shop", "old");
        quiet.apply(pod("new", "10.0.0.3", json!({})));
    });
    cluster.wait("what nobody told", |s| has(s, "new") && !has(s, "old") && has(s, "web"));
    assert!(api.lists("pods") >= 2);
    cluster.wait_metric("culvert_kubernetes_watch_failures_total{resource=\"pods\",reason=\"expired\"}", "1");
}

#[test]
fn a_missing_right_stops_that_kind_only_and_heals() {
    let api = KubeApi::start().unwrap();
    api.apply(pod("web", "10.0.0.1", json!({})));
    api.apply(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": { "name": "db", "namespace": "shop" },
        "spec": { "hosts": ["db.example"], "ports": [{ "number": 5432, "name": "tcp", "protocol": "TCP" }], "resolution": "DNS" },
    }));
    api.refuse("serviceentries", 403);
    let cluster = follow(&api, Reach::Agent).synced();
    cluster.wait_problem("forbidden", "serviceentries.networking.istio.io");
    assert!(has(&cluster.mesh.load_full(), "web"));
    assert!(!is_closed(&cluster.mesh.load_full()), "nothing it could say would refuse anything");
    // But it could say that an address which nobody knows has a waypoint.
    let unread = || cluster.mesh.load().unread().map(ToString::to_string);
    assert!(unread().is_some_and(|why| why.contains("serviceentries may not be read")), "{:?}", unread());
    cluster.wait_metric("culvert_kubernetes_watch_up{resource=\"serviceentries\"}", "0");
    api.apply(pod("api", "10.0.0.2", json!({})));
    cluster.wait("the others go on", |s| has(s, "api"));
    // A server that does not answer gives no right.
    api.refuse("serviceentries", 500);
    cluster.wait_problem("not-followed", "serviceentries.networking.istio.io");
    api.apply(pod("more", "10.0.0.3", json!({})));
    cluster.wait("the others go on", |s| has(s, "more"));
    assert!(unread().is_some_and(|why| why.contains("serviceentries may not be read")), "{:?}", unread());
    api.refuse("serviceentries", 0);
    cluster.wait("the right is there", |s| s.find_service_by_host("db.example", "shop").is_some() && s.unread().is_none());
    wait::until_true("no complaint is left", || !cluster.has_problem("forbidden", "serviceentries")).unwrap();
}

#[test]
fn policies_that_may_not_be_read_deny_until_they_are() {
    for resource in ["authorizationpolicies", "peerauthentications", "namespaces"] {
        let api = KubeApi::start().unwrap();
        api.apply(pod("web", "10.0.0.1", json!({})));
        api.refuse(resource, 403);
        let cluster = follow(&api, Reach::Agent).synced();
        assert!(is_closed(&cluster.mesh.load_full()), "{resource}");
        api.refuse(resource, 0);
        cluster.wait("they are read", |s| !is_closed(s));
    }
}

#[test]
fn what_was_known_stays_when_the_right_is_taken_away() {
    let api = KubeApi::start().unwrap();
    api.apply(pod("web", "10.0.0.1", json!({})));
    api.apply(allow("cluster.local/ns/shop/sa/one"));
    let cluster = follow(&api, Reach::Agent).synced();
    api.refuse("authorizationpolicies", 403);
    cluster.wait_problem("forbidden", "authorizationpolicies");
    assert!(api.delete("authorizationpolicies", "shop", "allow"));
    api.apply(pod("api", "10.0.0.2", json!({})));
    cluster.wait("the others go on", |s| has(s, "api"));
    assert!(policy(&cluster.mesh.load_full()).contains("sa/one"), "the policy is in force still");
    api.refuse("authorizationpolicies", 0);
    cluster.wait("its end is seen", |s| policy(s).is_empty());
}

#[test]
fn a_missing_crd_is_waited_for_and_its_end_takes_nothing_away() {
    let api = KubeApi::start().unwrap();
    api.serve_resource("authorizationpolicies", false);
    api.apply(pod("web", "10.0.0.1", json!({})));
    api.apply(allow("cluster.local/ns/shop/sa/one"));
    let cluster = follow(&api, Reach::Agent).synced();
    assert!(policy(&cluster.mesh.load_full()).is_empty());
    assert!(!is_closed(&cluster.mesh.load_full()), "without the CRD there are no policies");
    let told = || {
        let notes = cluster.diagnostics.list();
        notes.iter().find(|p| &*p.origin.object == "authorizationpolicies.security.istio.io").cloned()
    };
    let told = wait::until("it to be told", wait::PATIENCE, told).unwrap();
    assert_eq!((told.severity, told.code), (Severity::Note, Some("not-served")));
    api.serve_resource("authorizationpolicies", true);
    cluster.wait("the CRD is installed", |s| policy(s).contains("sa/one"));
    api.serve_resource("authorizationpolicies", false);
    wait::until_true("its end is told", || {
        cluster.diagnostics.list().iter().any(|p| p.severity == Severity::Error && p.code == Some("not-served"))
    })
    .unwrap();
    assert!(policy(&cluster.mesh.load_full()).contains("sa/one"), "a CRD that went takes no policy with it");
}

#[test]
fn an_object_that_cannot_be_read_keeps_what_it_said() {
    let api = KubeApi::start().unwrap();
    api.apply(pod("web", "10.0.0.1", json!({})));
    api.apply(allow("cluster.local/ns/shop/sa/one"));
    let cluster = follow(&api, Reach::Agent).synced();
    let mut broken = pod("web", "10.0.0.1", json!({}));
    broken["status"]["podIPs"] = json!([{ "ip": "not an address" }]);
    api.apply(broken);
    wait::until_true("it is told", || cluster.has_problem("bad-value", "Pod shop/web")).unwrap();
    assert!(has(&cluster.mesh.load_full(), "web"));
    // A policy instead closes what it binds.
    let mut wrong = allow("cluster.local/ns/shop/sa/one");
    wrong["spec"]["rulez"] = json!([]);
    api.apply(wrong);
    cluster.wait("a policy that is not understood denies", |s| policy(s).contains("Unusable"));
    api.apply(pod("web", "10.0.0.9", json!({})));
    cluster.wait("it is corrected", |s| s.workloads().any(|w| w.ips == ["10.0.0.9".parse::<std::net::IpAddr>().unwrap()]));
    wait::until_true("the complaint to go", || !cluster.has_problem("bad-value", "Pod shop/web")).unwrap();
}

#[test]
fn a_silent_server_makes_nobody_ready_and_takes_nothing_away() {
    let api = KubeApi::start().unwrap();
    api.apply(pod("web", "10.0.0.1", json!({})));
    api.silence(true);
    let cluster = follow(&api, Reach::Agent);
    cluster.wait_problem("not-followed", "pods");
    assert!(!cluster.mesh.is_synced());
    api.silence(false);
    let cluster = cluster.synced();
    assert!(has(&cluster.mesh.load_full(), "web"));
    api.silence(true);
    cluster.wait_problem("not-followed", "pods");
    assert!(has(&cluster.mesh.load_full(), "web"));
    api.silence(false);
    api.apply(pod("api", "10.0.0.2", json!({})));
    cluster.wait("it goes on", |s| has(s, "api"));
}

#[test]
fn a_waypoint_reads_secrets_of_its_own_namespace_only() {
    let api = KubeApi::start().unwrap();
    let secret = |namespace: &str| json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "tls", "namespace": namespace }, "data": {} });
    api.apply(secret("shop"));
    api.apply(secret("bank"));
    for name in ["istio", "other"] {
        api.apply(json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "namespace": "istio-system" }, "data": {},
        }));
    }
    let cluster = follow(&api, Reach::Waypoint { namespace: "shop".into() }).synced();
    cluster.wait_metric("culvert_kubernetes_objects{resource=\"secrets in shop\"}", "1");
    cluster.wait_metric("culvert_kubernetes_objects{resource=\"configmaps in istio-system\"}", "1");
    let agent = follow(&api, Reach::Agent).synced();
    assert!(!agent.registry.encode().contains("secrets"), "an agent reads no Secrets");
    assert!(!agent.registry.encode().contains("virtualservices"));
}

#[test]
fn what_the_harness_reads_is_what_kubectl_would() {
    assert_eq!(documents("# nothing\n---\na: 1\n---\nb: {c: 2}\n").unwrap(), [json!({ "a": 1 }), json!({ "b": { "c": 2 } })]);
}

#[test]
fn a_daemon_set_is_uninstalled_when_it_is_gone_or_its_rights_and_then_its_account_are() {
    let api = KubeApi::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let access = Access { kubeconfig: Some(api.kubeconfig(dir.path()).unwrap()) };
    let ours = DaemonSet::new(&access, "mesh", "agent").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ask = |millis| runtime.block_on(async { ours.is_uninstalled(Duration::from_millis(millis)).await });
    assert_eq!(ask(5000), Ok(true), "there is none");
    let metadata = json!({ "name": "agent", "namespace": "mesh" });
    let object = json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata });
    api.apply(object.clone());
    assert_eq!(ask(5000), Ok(false), "there is one");
    // What says nothing is asked about again.
    for nothing in [403, 500, 401] {
        api.refuse("daemonsets", nothing);
        assert!(ask(1500).unwrap_err().contains("daemonsets"), "{nothing}");
    }
    // A token goes with its pod too, so that is no answer, unless the rights went before.
    api.refuse("daemonsets", 403);
    let uninstalled = runtime.block_on(async {
        let then_the_account = async {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            api.refuse("daemonsets", 401);
        };
        tokio::join!(ours.is_uninstalled(Duration::from_secs(10)), then_the_account).0
    });
    assert_eq!(uninstalled, Ok(true), "the rights are gone, then the account");
    api.refuse("daemonsets", 0);
    assert_eq!(ask(5000), Ok(false));
    let mut going = object;
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    api.apply(going);
    assert_eq!(ask(5000), Ok(true), "it is being deleted");
    // Who watched it needs no right to ask when it is gone.
    let other = json!({ "name": "other", "namespace": "mesh" });
    api.apply(json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": other }));
    let ours = DaemonSet::new(&access, "mesh", "other").unwrap();
    let gone_with_its_account = async {
        while api.watches("daemonsets") == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(ours.is_uninstalled(Duration::from_secs(5)).await, Ok(false));
        assert!(api.delete("daemonsets", "mesh", "other"));
        // Less than a rest between two questions.
        tokio::time::sleep(Duration::from_millis(500)).await;
        api.refuse("daemonsets", 401);
        ours.is_uninstalled(Duration::from_secs(5)).await
    };
    let uninstalled = runtime.block_on(async {
        tokio::select! {
            () = ours.follow() => Err("it stopped watching".to_owned()),
            uninstalled = gone_with_its_account => uninstalled,
        }
    });
    assert_eq!(uninstalled, Ok(true), "it and its account went together");
    api.silence(true);
    assert!(ask(300).is_err(), "no server");
}
