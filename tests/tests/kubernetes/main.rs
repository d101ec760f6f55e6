//! Ring 3: a node's agent that is told of its pods by the Kubernetes API. Pods are network namespaces; their processes are
//! entries of a `/proc` made for them. Who is enrolled and who is not, the mark on the pod, leaving, a pod made again under
//! its name, a new agent, and pods that start, held back by the CNI plugin (`starting`).
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

mod starting;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec};
use mesh_tests::kube_api::KubeApi;
use mesh_tests::netns::scratch;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{self, Test, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{skip, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const PORT: u16 = 8080;
const MARK: &str = "ambient.istio.io/redirection";
const UIDS: [(&str, &str); 5] = [
    ("client", "0a000000-0000-0000-0000-000000000001"),
    ("server", "0a000000-0000-0000-0000-000000000002"),
    ("opted-out", "0a000000-0000-0000-0000-000000000003"),
    ("with-sidecar", "0a000000-0000-0000-0000-000000000004"),
    ("again", "0a000000-0000-0000-0000-000000000005"),
];

/// Of a static pod the kubelet knows this, not the uid that the API gave to its image.
const STATIC: (&str, &str) = ("server", "9d0b1f4c2a6e8d7c5b3a190817263544");

struct Cluster {
    agent: Option<Agent>,
    spec: AgentSpec,
    api: KubeApi,
    proc_dir: PathBuf,
    /// The container runtime's configurations and plugins.
    cni_dir: PathBuf,
    _server: Server,
    topology: Topology,
    _dir: TempDir,
}

const TESTS: &[Test<Cluster>] = &[
    test("nobody_is_enrolled_without_a_label", nobody_is_enrolled_without_a_label),
    test("a_label_enrols_live_pods_and_they_are_marked", a_label_enrols_live_pods_and_they_are_marked),
    test("opt_outs_are_respected", opt_outs_are_respected),
    test("a_new_agent_finds_marked_pods_and_serves_them", a_new_agent_finds_marked_pods_and_serves_them),
    test("a_pod_made_again_under_its_name_is_another_pod", a_pod_made_again_under_its_name_is_another_pod),
    test("around_services_that_may_not_be_read_nobody_goes", around_services_that_may_not_be_read_nobody_goes),
    test("the_plugin_is_chained_and_stays", starting::the_plugin_is_chained_and_stays),
    test("a_pod_is_captured_before_it_starts", starting::a_pod_is_captured_before_it_starts),
    test("pods_outside_the_mesh_start_at_once", starting::pods_outside_the_mesh_start_at_once),
    test("a_label_as_young_as_the_pod_counts", starting::a_label_as_young_as_the_pod_counts),
    test("a_pod_nobody_told_of_does_not_start", starting::a_pod_nobody_told_of_does_not_start),
    test("a_label_taken_away_makes_the_pod_direct_and_unmarked", a_label_taken_away_makes_the_pod_direct_and_unmarked),
    test("an_agent_that_is_uninstalled_takes_the_plugin_along", starting::an_agent_that_is_uninstalled_takes_the_plugin_along),
    test("without_an_agent_pods_do_not_start", starting::without_an_agent_pods_do_not_start),
    test("cleaning_up_removes_the_plugin_and_nothing_else", starting::cleaning_up_removes_the_plugin_and_nothing_else),
];

fn main() -> ExitCode {
    suite::run("kubernetes", skip::netns_unavailable(), set_up, TESTS)
}

fn set_up() -> anyhow::Result<Cluster> {
    let mut plan = Plan::default().node("node-a", "zone-1");
    for (name, _) in UIDS {
        plan = plan.pod("node-a", "shop", name, name, &[]);
    }
    plan = plan.pod("node-a", "shop", "starting", "starting", &[]);
    let topology = plan.build()?;
    let dir = scratch("kubernetes")?;
    let cni_dir = dir.path().join("cni");
    fs::create_dir(&cni_dir)?;
    fs::write(cni_dir.join(starting::PROVIDER.0), starting::PROVIDER.1)?;
    let node = topology.node("node-a");
    let api = KubeApi::serve(node.netns.listen(SocketAddr::from(([127, 0, 0, 1], 6443)))?)?;
    let proc_dir = dir.path().join("proc");
    fs::create_dir_all(proc_dir.join("1/ns"))?;
    symlink("/proc/1/ns/net", proc_dir.join("1/ns/net"))?;
    api.apply(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } }));
    api.apply(json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-a" } }));
    api.apply(starting::daemon_set());
    let mut spec = AgentSpec::new("node-a", &PathBuf::new(), &PathBuf::new(), dir.path())
        .env("KUBECONFIG", &api.kubeconfig(dir.path())?.to_string_lossy())
        .env("CULVERT_CA_DIR", &dir.path().join("ca").to_string_lossy())
        .env("CULVERT_PROC_DIR", &proc_dir.to_string_lossy())
        .env("CULVERT_CNI_DAEMON_SET", "istio-system/culvert-agent")
        .env("CULVERT_CNI_CONF_DIR", &cni_dir.to_string_lossy())
        .env("CULVERT_CNI_BIN_DIR", &cni_dir.to_string_lossy());
    spec.folders = None;
    spec.flags.push("--kubernetes".into());
    let server = Server::start(topology.pod("server"), PORT)?;
    let mut cluster = Cluster { agent: None, spec, api, proc_dir, cni_dir, _server: server, topology, _dir: dir };
    for (at, (name, uid)) in UIDS.into_iter().enumerate() {
        let (cgroup, annotations) = match STATIC {
            (pod, hash) if pod == name => {
                (hash, json!({ "kubernetes.io/config.hash": hash, "kubernetes.io/config.mirror": hash }))
            }
            _ => (uid, json!({})),
        };
        cluster.process(100 + at, name, cgroup)?;
        cluster.apply(name, uid, json!({}), annotations);
    }
    cluster.start_agent()?;
    Ok(cluster)
}

impl Cluster {
    fn start_agent(&mut self) -> anyhow::Result<()> {
        let agent = self.spec.clone().start(self.topology.node("node-a"))?;
        agent.wait_ready(Duration::from_secs(40))?;
        self.agent = Some(agent);
        Ok(())
    }
    fn agent(&self) -> anyhow::Result<&Agent> {
        self.agent.as_ref().context("no agent runs")
    }
    fn pod(&self, name: &str) -> &Arc<Place> {
        self.topology.pod(name)
    }

    /// A process of a pod, as `/proc` would show it.
    fn process(&self, pid: usize, pod: &str, uid: &str) -> anyhow::Result<()> {
        let dir = self.proc_dir.join(pid.to_string());
        fs::create_dir_all(dir.join("ns"))?;
        let slice = uid.replace('-', "_");
        fs::write(
            dir.join("cgroup"),
            format!("0::/kubepods.slice/kubepods-besteffort-pod{slice}.slice/cri-containerd-1.scope\n"),
        )?;
        fs::write(dir.join("stat"), format!("{pid} (pause) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {pid} 0 0"))?;
        symlink(self.pod(pod).netns.path(), dir.join("ns/net"))?;
        Ok(())
    }

    fn apply(&self, name: &str, uid: &str, labels: Value, annotations: Value) {
        let (place, mut object) = (self.pod(name), json!({ "apiVersion": "v1", "kind": "Pod" }));
        object["metadata"] =
            json!({ "name": name, "namespace": "shop", "uid": uid, "labels": labels, "annotations": annotations });
        object["spec"] = json!({ "nodeName": "node-a", "serviceAccountName": name });
        object["status"] = json!({
            "phase": "Running", "podIP": place.v4.to_string(),
            "podIPs": [{ "ip": place.v4.to_string() }, { "ip": place.v6.to_string() }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        });
        self.api.apply(object);
    }
    /// Changes labels and keeps the annotations, as `kubectl label` does.
    fn label(&self, name: &str, labels: Value) -> anyhow::Result<()> {
        let mut object = self.api.get("pods", "shop", name).context("no such pod")?;
        object["metadata"]["labels"] = labels;
        self.api.apply(object);
        Ok(())
    }
    fn is_marked(&self, name: &str) -> bool {
        self.api.get("pods", "shop", name).is_some_and(|pod| pod["metadata"]["annotations"][MARK] == "enabled")
    }
    fn wait_marked(&self, name: &str, marked: bool) -> anyhow::Result<()> {
        wait::until_true(&format!("{name} is marked: {marked}"), || self.is_marked(name) == marked)
            .with_context(|| self.agent.as_ref().map(|a| a.log_tail(20)).unwrap_or_default())
    }
    /// A call from `client` to `server`; the line of the agent's log about it, if one comes.
    fn call(&self) -> anyhow::Result<()> {
        let (_client, who) = Client::who(self.pod("client"), self.pod("server").at(PORT))?;
        ensure!(who.peer.ip() == self.pod("client").v4, "the server saw {}", who.peer);
        Ok(())
    }
}

fn nobody_is_enrolled_without_a_label(cluster: &mut Cluster) -> anyhow::Result<()> {
    let mark = cluster.agent()?.mark();
    cluster.call()?;
    ensure!(cluster.agent()?.access_since(mark).is_empty(), "the call went through the agent");
    ensure!(UIDS.iter().all(|(name, _)| !cluster.is_marked(name)));
    Ok(())
}

fn a_label_enrols_live_pods_and_they_are_marked(cluster: &mut Cluster) -> anyhow::Result<()> {
    for name in ["client", "server"] {
        cluster.label(name, json!({ "istio.io/dataplane-mode": "ambient" }))?;
        cluster.wait_marked(name, true)?;
    }
    let agent = cluster.agent()?;
    let mark = agent.mark();
    cluster.call()?;
    agent.wait_access("both identities", mark, |record| {
        let text = record.to_string();
        text.contains("/sa/client") && text.contains("/sa/server") && text.contains("inbound")
    })?;
    Ok(())
}

fn opt_outs_are_respected(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.apply("opted-out", UIDS[2].1, json!({ "istio.io/dataplane-mode": "none" }), json!({}));
    cluster.apply("with-sidecar", UIDS[3].1, json!({}), json!({ "sidecar.istio.io/status": "{}" }));
    let ambient = json!({ "name": "shop", "labels": { "istio.io/dataplane-mode": "ambient" } });
    cluster.api.apply(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": ambient }));
    cluster.wait_marked("again", true)?;
    ensure!(!cluster.is_marked("opted-out") && !cluster.is_marked("with-sidecar"));
    // Somebody else's mark is no reason to serve it, and goes.
    cluster.apply("opted-out", UIDS[2].1, json!({ "istio.io/dataplane-mode": "none" }), json!({ MARK: "enabled" }));
    cluster.wait_marked("opted-out", false)
}

fn a_new_agent_finds_marked_pods_and_serves_them(cluster: &mut Cluster) -> anyhow::Result<()> {
    let old = cluster.agent.take().context("no agent runs")?;
    old.terminate(Duration::from_secs(20))?;
    ensure!(cluster.is_marked("client"), "pods of an agent that ended are closed, so they stay marked");
    drop(old);
    // Without the labels of namespaces nobody would look enrolled; pods must not be opened for that.
    cluster.api.refuse("namespaces", 403);
    let agent = cluster.spec.clone().start(cluster.topology.node("node-a"))?;
    wait::until_true("it says why it waits", || agent.whole_log().contains("namespaces is forbidden"))?;
    ensure!(cluster.call().is_err(), "the pods were opened");
    ensure!(cluster.is_marked("client") && cluster.is_marked("server"));
    cluster.api.refuse("namespaces", 0);
    agent.wait_ready(Duration::from_secs(40))?;
    cluster.agent = Some(agent);
    let agent = cluster.agent()?;
    let mark = agent.mark();
    // What policies mean is read by another watch, which comes back in its own time; until then everything is denied.
    wait::until_true("calls are let through", || cluster.call().is_ok())?;
    agent.wait_access("the call", mark, |record| record.to_string().contains("/sa/server"))?;
    Ok(())
}

fn a_pod_made_again_under_its_name_is_another_pod(cluster: &mut Cluster) -> anyhow::Result<()> {
    ensure!(cluster.api.delete("pods", "shop", "again"));
    fs::remove_dir_all(cluster.proc_dir.join("104"))?;
    let uid = "0a000000-0000-0000-0000-0000000000ff";
    // There before its process is: it is served as soon as that is found.
    cluster.apply("again", uid, json!({}), json!({}));
    let agent = cluster.agent()?;
    wait::until_true("it waits for a process", || agent.config_dump().is_ok_and(|dump| dump.to_string().contains("not known")))?;
    cluster.process(204, "again", uid)?;
    cluster.wait_marked("again", true)
}

/// Their labels name waypoints: an address that nobody knows may be one of theirs.
fn around_services_that_may_not_be_read_nobody_goes(cluster: &mut Cluster) -> anyhow::Result<()> {
    let node = Arc::clone(cluster.topology.node("node-a"));
    let _server = Server::start(&node, PORT)?;
    let outside = |cluster: &Cluster| Client::who(cluster.pod("client"), node.at(PORT)).map(drop);
    outside(cluster).context("before")?;
    cluster.agent.take().context("no agent runs")?.terminate(Duration::from_secs(20))?;
    cluster.api.refuse("services", 403);
    cluster.start_agent()?;
    let agent = cluster.agent()?;
    let mark = agent.mark();
    wait::until_true("the mesh goes on", || cluster.call().is_ok())?;
    ensure!(outside(cluster).is_err(), "who is not known was reached in plaintext");
    agent.wait_access("the reason", mark, |r| {
        r["reason"] == "unknown_workload" && r["error"].as_str().is_some_and(|e| e.contains("services may not be read"))
    })?;
    let problems = agent.config_dump()?["problems"].to_string();
    ensure!(problems.contains("calls to addresses that nobody knows are refused"), "{problems}");
    cluster.api.refuse("services", 0);
    wait::until_true("the outside again", || outside(cluster).is_ok())
}

fn a_label_taken_away_makes_the_pod_direct_and_unmarked(cluster: &mut Cluster) -> anyhow::Result<()> {
    for name in ["client", "server"] {
        cluster.label(name, json!({ "istio.io/dataplane-mode": "none" }))?;
    }
    for name in ["client", "server"] {
        cluster.wait_marked(name, false)?;
    }
    let agent = cluster.agent()?;
    wait::until("a direct call", wait::PATIENCE, || {
        let mark = agent.mark();
        cluster.call().ok().filter(|()| agent.access_since(mark).is_empty())
    })
}
