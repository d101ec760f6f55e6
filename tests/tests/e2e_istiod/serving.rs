//! Agents that have the mesh from a real istiod and nothing else: what they carry, what they refuse, how they follow changes and
//! carry on while it is away.
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_binary};
use mesh_tests::cni::{self, CniAgent, CniPod, Connection};
use mesh_tests::program::{Client, Server};
use mesh_tests::real_istiod::{Istioctl, IstiodFed};
use mesh_tests::suite::CannotRun;
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::{netns, skip, wait};
use tempfile::TempDir;

const PORT: u16 = 8080;
/// istiod's port for plaintext.
const CONTROL: u16 = 15010;
const VIP: ([u8; 4], u16) = ([10, 96, 0, 20], 80);

/// One node's agent and the CNI agent's connection to it.
struct Node {
    agent: Agent,
    _cni: CniAgent,
    _connection: Connection,
}

/// Dropped in this order.
struct World {
    nodes: Vec<Node>,
    istiod: Option<IstiodFed>,
    _servers: Vec<Server>,
    topology: Topology,
    files: TempDir,
}

/// What the cluster holds; `allowed` may call `web`.
fn mesh(topology: &Topology, allowed: &str) -> String {
    let mut yaml = MESH.replace("ALLOWED", allowed);
    for (name, node) in [("client", "node-a"), ("other", "node-a"), ("web", "node-b")] {
        let ip = topology.pod(name).v4;
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, namespace: t, labels: {{ app: {name} }} }}\n\
             spec: {{ nodeName: {node}, serviceAccountName: {name}, containers: [] }}\n\
             status: {{ phase: Running, podIP: {ip}, podIPs: [{{ ip: {ip} }}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n"
        );
    }
    yaml
}

const MESH: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t }
spec: { selector: { app: web }, clusterIP: 10.96.0.20, clusterIPs: [10.96.0.20], ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: web, namespace: t }
spec: { selector: { matchLabels: { app: web } }, rules: [{ from: [{ source: { principals: [cluster.local/ns/t/sa/ALLOWED] } }] }] }
";

impl World {
    fn set_up(on_demand: bool) -> anyhow::Result<Self> {
        if let Some(why) = skip::netns_unavailable().or_else(|| skip::command_missing("nft")) {
            return Err(CannotRun(why).into());
        }
        find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
        let topology = Plan::default()
            .node("node-a", "zone-1")
            .node("node-b", "zone-1")
            .pod("node-a", "t", "client", "client", &[])
            .pod("node-a", "t", "other", "other", &[])
            .pod("node-b", "t", "web", "web", &[])
            .host("control")
            .host("outside")
            .build()?;
        let files = netns::scratch("e2e-istiod")?;
        std::fs::create_dir(files.path().join("mesh"))?;
        let servers = vec![Server::start(topology.pod("web"), PORT)?];
        for pod in &topology.plan().pods {
            cni::redirect(&topology.pod(&pod.name).netns).with_context(|| format!("rules of {}", pod.name))?;
        }
        let mut world = Self { nodes: Vec::new(), istiod: None, _servers: servers, topology, files };
        world.write("client")?;
        world.start_istiod()?;
        for (node, pods) in [("node-a", &["client", "other"][..]), ("node-b", &["web"])] {
            let node = world.start_agent(node, pods, on_demand)?;
            world.nodes.push(node);
        }
        Ok(world)
    }

    fn write(&self, allowed: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.files.path().join("mesh/mesh.yaml"), mesh(&self.topology, allowed))?)
    }

    fn start_istiod(&mut self) -> anyhow::Result<()> {
        let control = self.topology.host("control");
        let (folder, log) = (self.files.path().join("mesh"), self.files.path().join("istiod.log"));
        self.istiod = Some(IstiodFed::start(&folder, &format!("0.0.0.0:{CONTROL}"), Some(&control.netns), log)?);
        Ok(())
    }

    fn start_agent(&self, node: &str, pods: &[&str], on_demand: bool) -> anyhow::Result<Node> {
        let file = |name: &str| self.files.path().join(name).to_string_lossy().into_owned();
        let cni = CniAgent::listen(&self.files.path().join(format!("{node}.sock")))?;
        let agent = AgentSpec::without_folder(node, self.files.path())
            .env("XDS_ADDRESS", &format!("http://{}:{CONTROL}", self.topology.host("control").v4))
            .env("XDS_ON_DEMAND", if on_demand { "true" } else { "false" })
            .env("CA_ADDRESS", "")
            .env("CULVERT_CA_DIR", &file("ca"))
            .env("INPOD_UDS", &file(&format!("{node}.sock")))
            .start(self.topology.node(node))?;
        let connection = cni.accept().with_context(|| format!("log of {node}:\n{}", agent.log_tail(20)))?;
        for pod in pods {
            let named = CniPod { uid: pod, name: pod, namespace: "t", service_account: pod };
            let error = connection.add(&named, &self.topology.pod(pod).netns)?;
            ensure!(error.is_empty(), "{pod} is not served: {error}");
        }
        ensure!(connection.snapshot_sent()?.is_empty(), "the list is refused");
        agent.wait_ready(Duration::from_secs(30))?;
        Ok(Node { agent, _cni: cni, _connection: connection })
    }

    fn call(&self, pod: &str, to: impl Into<SocketAddr>) -> anyhow::Result<String> {
        let (mut client, who) = Client::who(self.topology.pod(pod), to.into())?;
        client.ping("there?")?;
        client.finish()?;
        Ok(who.name)
    }

    fn web(&self) -> SocketAddr {
        self.topology.pod("web").at(PORT)
    }

    /// What `istioctl ztunnel-config all` shows of them, while `client` is connected to `web`.
    fn read_by_istioctl(&self) -> anyhow::Result<()> {
        let web = self.topology.pod("web").v4.to_string();
        for node in &self.nodes {
            let read = Istioctl::read(&node.agent.config_dump()?)?;
            let (pod, way) = if node.agent.node() == "node-a" { ("client", "Outbound") } else { ("web", "Inbound") };
            let (id, connected) = (format!("spiffe://cluster.local/ns/t/sa/{pod}"), format!("{pod}.t"));
            for row in [
                &["t", "web", &web, "node-b", "None", "HBONE"][..],
                &["t", "web", "10.96.0.20", "None", "1/1"],
                &["t", "web", "Allow", "WorkloadSelector"],
                &[&id, "Leaf", "Available", "true"],
                &[&id, "Root", "Available", "true"],
                &[&connected, way],
            ] {
                ensure!(read.has_row(row), "{row:?} is not in\n{}", read.summary);
            }
        }
        Ok(())
    }

    /// The gauge says so at both agents.
    fn wait_connected(&self, value: i64) -> anyhow::Result<()> {
        wait::until_true("the metric to tell", || {
            let says =
                |node: &Node| node.agent.metrics().is_ok_and(|page| page.sum("culvert_xds_connected", &[]) as i64 == value);
            self.nodes.iter().all(says)
        })
    }
}

/// The whole of it: one world, one after the other.
pub fn agents(on_demand: bool) -> anyhow::Result<()> {
    let mut world = World::set_up(on_demand)?;
    for to in [world.web(), VIP.into()] {
        ensure!(world.call("client", to)? == "web", "{to}");
        ensure!(world.call("other", to).is_err(), "other is not in the ALLOW policy");
    }
    ensure!(Client::who(world.topology.host("outside"), world.web()).is_err(), "plaintext gets in under STRICT");

    // A policy that changes ends what it no longer allows.
    let (mut live, _) = Client::who(world.topology.pod("client"), world.web())?;
    live.ping("before")?;
    if !on_demand {
        // Else the agent of `web` need not know of its service.
        world.read_by_istioctl()?;
    }
    world.write("other")?;
    world.istiod.as_mut().context("it runs")?.read_again()?;
    live.wait_cut()?;
    ensure!(world.call("client", world.web()).is_err(), "refused from now on");
    wait::until_true("the other one to be allowed", || world.call("other", VIP).is_ok())?;

    // Without it all goes on; another one, which knows nothing of the stream before, is believed at once.
    world.istiod = None;
    world.wait_connected(0)?;
    ensure!(world.call("other", world.web())? == "web" && world.call("client", world.web()).is_err());
    world.write("client")?;
    world.start_istiod()?;
    world.wait_connected(1)?;
    wait::until_true("what changed meanwhile", || world.call("client", VIP).is_ok() && world.call("other", VIP).is_err())?;

    for node in &world.nodes {
        let (page, dump) = (node.agent.metrics()?, node.agent.config_dump()?);
        ensure!(page.sum("culvert_xds_refused_total", &[]) as i64 == 0, "refused: {}", dump["problems"]);
        ensure!(dump["problems"].as_array().is_none_or(Vec::is_empty), "{}", dump["problems"]);
        ensure!(!node.agent.whole_log().contains("panicked"), "an agent panicked");
    }
    Ok(())
}
