//! Ring 4: Kubernetes' own API server. The chart's objects as it takes them, an agent with the rights that the chart gives, what both
//! programs read by those rights, a right and a CRD that come late, a server that restarts. Skipped where it is not installed.
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_runtime::metrics::Registry;
use mesh_sources::kubernetes::{Access, DaemonSet, Reach, Retry, Scope, Watches};
use mesh_sources::{Mesh, Origin, Viewpoint, translate};
use mesh_tests::agent::{Agent, AgentSpec, find_binary, workspace_dir};
use mesh_tests::kube_api::documents;
use mesh_tests::program::{Client, Server};
use mesh_tests::real_kubernetes::{self, KubeServer};
use mesh_tests::skip::{self, find_peer};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::{chart, netns, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const PORT: u16 = 8080;
const PODS: [&str; 2] = ["client", "server"];
const MARK: &str = "ambient.istio.io/redirection";

const TESTS: &[Test<Cluster>] = &[
    test("the_chart_is_taken_and_an_unknown_field_is_not", the_chart_is_taken_and_an_unknown_field_is_not),
    test("a_traffic_policy_is_judged_by_its_schema", a_traffic_policy_is_judged_by_its_schema),
    test("the_agent_enrols_with_the_rights_of_the_chart", the_agent_enrols_with_the_rights_of_the_chart),
    test("the_agent_may_ask_whether_it_is_uninstalled", the_agent_may_ask_whether_it_is_uninstalled),
    test("a_waypoint_reads_everything_with_the_rights_of_the_chart", a_waypoint_reads_everything_with_the_rights_of_the_chart),
    test("a_right_that_is_missing_stops_one_kind", a_right_that_is_missing_stops_one_kind),
    test("a_crd_that_comes_late_is_followed", a_crd_that_comes_late_is_followed),
    test("the_server_may_restart", the_server_may_restart),
];

/// Dropped in this order.
struct Cluster {
    agent: Option<Agent>,
    _server: Server,
    api: KubeServer,
    chart: Vec<Value>,
    proc_dir: PathBuf,
    topology: Topology,
    dir: TempDir,
}

fn main() -> ExitCode {
    suite::run("mesh_kubernetes", skip::netns_unavailable().or_else(real_kubernetes::missing), set_up, TESTS)
}

fn rendered(profile: &str) -> anyhow::Result<Vec<Value>> {
    let folder = workspace_dir().join("manifests/chart");
    documents(&chart::render(&folder, &folder.join(format!("values-{profile}.yaml")), "istio-system")?)
}

fn set_up() -> anyhow::Result<Cluster> {
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let mut plan = Plan::default().node("node-a", "zone-1");
    for name in PODS {
        plan = plan.pod("node-a", "zamaz", name, name, &[]);
    }
    let topology = plan.build()?;
    let dir = netns::scratch("real-kubernetes")?;
    let accounts = [("istio-system", "culvert-agent"), ("zamaz", "zamaz-waypoint-sa"), ("zamaz", "lesser")];
    let api = KubeServer::start(topology.node("node-a"), dir.path(), &accounts)?;
    for name in ["istio-system", "zamaz"] {
        api.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } }), false)?;
    }
    api.apply(&json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-a" } }), false)?;
    let crds = workspace_dir().join("manifests/chart/crds/trafficpolicies.yaml");
    let gateway = find_peer("kube-apiserver").map_err(anyhow::Error::msg)?.with_file_name("gateway-api");
    let mut files: Vec<PathBuf> =
        fs::read_dir(&gateway).context("the CRDs of the Gateway API")?.flatten().map(|e| e.path()).collect();
    files.push(crds);
    for file in files {
        for object in documents(&fs::read_to_string(file)?)? {
            api.apply(&object, false)?;
        }
    }
    let chart = rendered("production")?;
    // What gives the rights is in force; the rest needs a cluster.
    for object in chart.iter().filter(|o| o["apiVersion"] == "rbac.authorization.k8s.io/v1") {
        api.apply(object, false)?;
    }
    let proc_dir = dir.path().join("proc");
    fs::create_dir_all(proc_dir.join("1/ns"))?;
    symlink("/proc/1/ns/net", proc_dir.join("1/ns/net"))?;
    let server = Server::start(topology.pod("server"), PORT)?;
    let cluster = Cluster { agent: None, _server: server, api, chart, proc_dir, topology, dir };
    for (at, name) in PODS.into_iter().enumerate() {
        cluster.make_pod(name, 100 + at)?;
    }
    Ok(cluster)
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": "zamaz" },
        "spec": { "nodeName": "node-a", "serviceAccountName": name, "containers": [{ "name": "main", "image": "none" }] },
    })
}

impl Cluster {
    /// The pod, its status as a kubelet tells it, and its process as `/proc` would show it.
    fn make_pod(&self, name: &str, pid: usize) -> anyhow::Result<()> {
        let place = self.topology.pod(name);
        let made = self.api.apply(&pod(name), false)?;
        let status = json!({
            "phase": "Running", "podIP": place.v4.to_string(),
            "podIPs": [{ "ip": place.v4.to_string() }, { "ip": place.v6.to_string() }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        });
        self.api.status(&made, &status)?;
        let dir = self.proc_dir.join(pid.to_string());
        fs::create_dir_all(dir.join("ns"))?;
        let slice = made["metadata"]["uid"].as_str().context("no uid")?.replace('-', "_");
        fs::write(
            dir.join("cgroup"),
            format!("0::/kubepods.slice/kubepods-besteffort-pod{slice}.slice/cri-containerd-1.scope\n"),
        )?;
        fs::write(dir.join("stat"), format!("{pid} (pause) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0 0"))?;
        symlink(place.netns.path(), dir.join("ns/net"))?;
        Ok(())
    }
    fn label_namespace(&self, mode: &str) -> anyhow::Result<()> {
        let metadata = json!({ "name": "zamaz", "labels": { "istio.io/dataplane-mode": mode } });
        self.api.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }), false).map(drop)
    }
    fn wait_marked(&self, name: &str, marked: bool) -> anyhow::Result<()> {
        let is = || self.api.get(&pod(name)).is_ok_and(|pod| (pod["metadata"]["annotations"][MARK] == "enabled") == marked);
        wait::until_true(&format!("{name} is marked: {marked}"), is)
            .with_context(|| self.agent.as_ref().map(|agent| agent.log_tail(20)).unwrap_or_default())
    }
    /// A source in this process, as an account.
    fn follow(&self, account: &str, reach: Reach) -> anyhow::Result<Followed> {
        let access = Access { kubeconfig: Some(self.api.kubeconfig(account)?) };
        let retry =
            Retry { least: Duration::from_millis(50), most: Duration::from_millis(500), missing: Duration::from_millis(500) };
        let (registry, watches) = (Registry::new(), Watches::default());
        watches.expose(&registry)?;
        let settings = translate::Settings { layer7: reach != Reach::Agent, ..translate::Settings::default() };
        let origin = Origin::Kubernetes(Box::new(Scope { access, reach, retry, watches }));
        let view = Viewpoint { node: "node-a".into(), ..Viewpoint::default() };
        // Threads are where the one that makes them is.
        self.topology.node("node-a").netns.enter(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
            let (mesh, _) = runtime.block_on(async { mesh_sources::start_with(origin, view, &settings) });
            Ok(Followed { mesh, registry, _runtime: runtime })
        })
    }
}

/// A source that follows the server.
struct Followed {
    mesh: Mesh,
    registry: Registry,
    _runtime: tokio::runtime::Runtime,
}

impl Followed {
    /// Resources that are followed, or not.
    fn watches(&self, up: bool) -> Vec<String> {
        let text = self.registry.encode();
        let all =
            text.lines().filter_map(|line| line.strip_prefix("culvert_kubernetes_watch_up{resource=\"")?.split_once("\"} "));
        let wanted = if up { "1" } else { "0" };
        all.filter(|(_, value)| *value == wanted).map(|(resource, _)| resource.to_owned()).collect()
    }
    fn wait_up(&self, resource: &str) -> anyhow::Result<()> {
        wait::until_true(&format!("{resource} is followed"), || self.watches(true).iter().any(|r| r == resource))
    }
    fn has_pod(&self, name: &str) -> bool {
        self.mesh.load_full().workloads().any(|w| *w.name == *name)
    }
}

fn the_chart_is_taken_and_an_unknown_field_is_not(cluster: &mut Cluster) -> anyhow::Result<()> {
    for profile in ["development", "production"] {
        for object in rendered(profile)? {
            cluster.api.apply(&object, true)?;
        }
    }
    // With the other authorities. (What is in the namespace `shop` needs one.)
    cluster.api.apply(&json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } }), false)?;
    for values in [chart::ISTIO_CA, chart::SPIRE] {
        for object in documents(&chart::render_with(&workspace_dir().join("manifests/chart"), values, "istio-system")?)? {
            cluster.api.apply(&object, true).with_context(|| values.to_owned())?;
        }
    }
    for (kind, at) in [("DaemonSet", "/spec/template/spec/containers/0"), ("Deployment", "/spec"), ("Gateway", "/spec")] {
        let mut object = cluster.chart.iter().find(|o| o["kind"] == kind).context("no such object")?.clone();
        *object
            .pointer_mut(at)
            .and_then(|v| v.as_object_mut())
            .context("no such field")?
            .entry("nonsense")
            .or_insert(Value::Null) = json!(1);
        let error = cluster.api.apply(&object, true).err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(error.contains("nonsense"), "{kind}: {error}");
    }
    Ok(())
}

/// The schema takes everything the proxies read, and nothing else; with what they would refuse, the server does first.
fn a_traffic_policy_is_judged_by_its_schema(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.api.apply(&chart::whole_policy(), true)?;
    let example = fs::read_to_string(workspace_dir().join("manifests/examples/zamaz/80-traffic.yaml"))?;
    for policy in documents(&example)?.iter().filter(|object| object["kind"] == "TrafficPolicy") {
        cluster.api.apply(policy, true)?;
    }
    let nothing = json!({});
    for (at, value, says) in [
        ("/spec/nonsense", &nothing, "nonsense"),
        ("/spec/rateLimits/0/nonsense", &nothing, "nonsense"),
        ("/spec/rateLimits/0/key/2/path/nonsense", &nothing, "path"),
        ("/spec/cors/allowOrigins/0/nonsense", &nothing, "nonsense"),
        ("/spec/targetRefs", &json!([]), "targetRefs"),
        ("/spec/rateLimits/0/tokenBucket/fillInterval", &json!("soon"), "fillInterval"),
        ("/spec/rateLimits/0/key/0/sourceIP/ipv4Prefix", &json!(33), "ipv4Prefix"),
        ("/spec/rateLimits/0/key/0/header", &json!("two-in-one"), "key"),
        ("/spec/rateLimits/0/response/status", &json!(200), "status"),
        ("/spec/rateLimits/0/name", &json!(""), "name"),
        ("/spec/compression/codings/0", &json!("deflate"), "codings"),
        ("/spec/buffer/maxRequestBytes", &json!(0), "maxRequestBytes"),
    ] {
        let mut policy = chart::whole_policy();
        let (parent, key) = at.rsplit_once('/').context("no path")?;
        let parent = policy.pointer_mut(parent).context("no such field")?;
        match parent {
            Value::Array(all) => all[key.parse::<usize>()?] = value.clone(),
            object => object[key] = value.clone(),
        }
        let error = cluster.api.apply(&policy, true).err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(error.contains(says), "{at}: {error}");
    }
    Ok(())
}

fn the_agent_enrols_with_the_rights_of_the_chart(cluster: &mut Cluster) -> anyhow::Result<()> {
    let spec = AgentSpec::without_folder("node-a", cluster.dir.path())
        .env("KUBECONFIG", &cluster.api.kubeconfig("culvert-agent")?.to_string_lossy())
        .env("CULVERT_CA_DIR", &cluster.dir.path().join("ca").to_string_lossy())
        .env("CULVERT_PROC_DIR", &cluster.proc_dir.to_string_lossy())
        .env("CULVERT_KUBERNETES", "true");
    let agent = spec.start(cluster.topology.node("node-a"))?;
    agent.wait_ready(Duration::from_secs(30))?;
    cluster.agent = Some(agent);
    cluster.label_namespace("ambient")?;
    for name in PODS {
        cluster.wait_marked(name, true)?;
    }
    let agent = cluster.agent.as_ref().context("no agent")?;
    let mark = agent.mark();
    let to: SocketAddr = cluster.topology.pod("server").at(PORT);
    let (client, who) = Client::who(cluster.topology.pod("client"), to)?;
    ensure!(who.peer.ip() == cluster.topology.pod("client").v4, "the server saw {}", who.peer);
    // What has ended is told.
    drop(client);
    agent.wait_access("both identities", mark, |record| {
        let text = record.to_string();
        text.contains("ns/zamaz/sa/client") && text.contains("ns/zamaz/sa/server") && text.contains("inbound")
    })?;
    ensure!(!agent.whole_log().contains("forbidden"), "a right is missing: {}", agent.log_tail(20));
    cluster.label_namespace("none")?;
    for name in PODS {
        cluster.wait_marked(name, false)?;
    }
    Ok(())
}

fn the_agent_may_ask_whether_it_is_uninstalled(cluster: &mut Cluster) -> anyhow::Result<()> {
    let object = cluster.chart.iter().find(|o| o["kind"] == "DaemonSet").context("no DaemonSet")?;
    let ask = |account: &str| -> anyhow::Result<Result<bool, String>> {
        let access = Access { kubeconfig: Some(cluster.api.kubeconfig(account)?) };
        let ours = DaemonSet::new(&access, "istio-system", "culvert-agent")?;
        cluster.topology.node("node-a").netns.enter(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(async { ours.is_uninstalled(Duration::from_secs(3)).await }))
        })
    };
    ensure!(ask("culvert-agent")? == Ok(true), "there is none yet");
    cluster.api.apply(object, false)?;
    ensure!(ask("culvert-agent")? == Ok(false), "there is one");
    let refused = ask("lesser")?;
    ensure!(refused.as_ref().is_err_and(|why| why.contains("forbidden")), "{refused:?}");
    let unknown = ask("an account that was deleted")?;
    ensure!(unknown.is_err(), "a token that is not known says nothing by itself: {unknown:?}");
    cluster.api.delete(object)?;
    ensure!(ask("culvert-agent")? == Ok(true), "it is gone");
    Ok(())
}

fn a_waypoint_reads_everything_with_the_rights_of_the_chart(cluster: &mut Cluster) -> anyhow::Result<()> {
    let waypoint = cluster.follow("zamaz-waypoint-sa", Reach::Waypoint { namespace: "zamaz".into() })?;
    wait::until_true("the mesh", || waypoint.mesh.is_synced())?;
    for resource in ["pods", "gateways", "httproutes", "trafficpolicies", "secrets in zamaz", "configmaps in istio-system"] {
        waypoint.wait_up(resource)?;
    }
    // Istio's CRDs are not there, nor the experimental one of the Gateway API; nothing else is missing.
    let istio = ["serviceentries", "workloadentries", "authorizationpolicies", "peerauthentications", "virtualservices"];
    let more = ["destinationrules", "envoyfilters", "requestauthentications", "telemetries", "xbackendtrafficpolicies"];
    let absent = [istio, more].concat();
    // On a busy machine some are followed later than those above.
    let missing = || waypoint.watches(false);
    wait::until_true("nothing else is missing", || missing().iter().all(|resource| absent.contains(&resource.as_str())))
        .with_context(|| format!("{:?}", missing()))?;
    ensure!(waypoint.has_pod("server"));
    Ok(())
}

fn a_right_that_is_missing_stops_one_kind(cluster: &mut Cluster) -> anyhow::Result<()> {
    let role = cluster.chart.iter().find(|o| o["kind"] == "ClusterRole" && o["metadata"]["name"] == "culvert-agent");
    let mut role = role.context("no role")?.clone();
    role["metadata"]["name"] = json!("lesser");
    let whole = role.clone();
    role["rules"][0]["resources"] = json!(["namespaces", "nodes", "pods"]);
    cluster.api.apply(&role, false)?;
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": { "name": "lesser" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "lesser" },
        "subjects": [{ "kind": "ServiceAccount", "name": "lesser", "namespace": "zamaz" }],
    });
    cluster.api.apply(&binding, false)?;
    let agent = cluster.follow("lesser", Reach::Agent)?;
    wait::until_true("the mesh", || agent.mesh.is_synced() && agent.has_pod("server"))?;
    ensure!(agent.watches(false).iter().any(|r| r == "services"), "{:?}", agent.watches(false));
    ensure!(agent.watches(true).iter().any(|r| r == "endpointslices"), "{:?}", agent.watches(true));
    cluster.api.apply(&whole, false)?;
    agent.wait_up("services")
}

fn a_crd_that_comes_late_is_followed(cluster: &mut Cluster) -> anyhow::Result<()> {
    let agent = cluster.follow("culvert-agent", Reach::Agent)?;
    wait::until_true("the mesh", || agent.mesh.is_synced())?;
    ensure!(agent.watches(false).iter().any(|r| r == "serviceentries"), "{:?}", agent.watches(false));
    let schema = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    let crd = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": { "name": "serviceentries.networking.istio.io" },
        "spec": {
            "group": "networking.istio.io", "scope": "Namespaced",
            "names": { "kind": "ServiceEntry", "listKind": "ServiceEntryList", "plural": "serviceentries", "singular": "serviceentry" },
            "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema } }],
        },
    });
    cluster.api.apply(&crd, false)?;
    let entry = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": { "name": "db", "namespace": "zamaz" },
        "spec": { "hosts": ["db.example"], "ports": [{ "number": 5432, "name": "tcp", "protocol": "TCP" }], "resolution": "DNS" },
    });
    cluster.api.apply(&entry, false)?;
    wait::until_true("it is read", || agent.mesh.load_full().find_service_by_host("db.example", "zamaz").is_some())
}

fn the_server_may_restart(cluster: &mut Cluster) -> anyhow::Result<()> {
    let agent = cluster.follow("culvert-agent", Reach::Agent)?;
    wait::until_true("the mesh", || agent.mesh.is_synced() && agent.has_pod("server"))?;
    cluster.api.stop();
    wait::until_true("that it is away is told", || agent.watches(false).iter().any(|r| r == "pods"))?;
    ensure!(agent.has_pod("server"), "what was known stays");
    cluster.api.resume()?;
    agent.wait_up("pods")?;
    cluster.api.apply(&pod("late"), false)?;
    cluster
        .api
        .status(&pod("late"), &json!({ "phase": "Running", "podIP": "10.244.9.9", "podIPs": [{ "ip": "10.244.9.9" }] }))?;
    wait::until_true("a new pod is told", || agent.has_pod("late"))
}
