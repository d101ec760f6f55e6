//! Where peers are compared: two pods joined by one veth pair, an agent for each, and nothing else. (A plain relay stands
//! between two veth pairs instead.)
//!
//! Owns: the wiring, the mesh folder (two pods, a service, one ALLOW policy), starting agents by their contract, and the
//! proof that traffic really takes the tunnel. A field is used for one peer and one round, so that no peer pays for the
//! TIME_WAIT sockets of another. Refuses: nodes and bridges in between; every hop would be charged to the agents alike.
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use serde_json::Value;
use tempfile::TempDir;

use super::contract::{ControlPlane, Pod};
use super::parts::{self, Held, Proxy, Running, Settings, join, load_command, pinned, pod_yaml, start_listening};
use super::process;
use crate::mesh_dir::MeshDir;
use crate::netns::{self, Netns};
use crate::{http, wait};

/// Where the load server listens.
pub const PORT: u16 = 8080;
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The relay towards the client; towards the server; and the server behind it.
const RELAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
const RELAY_BACK: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 3);
const BEHIND: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

/// What carries the traffic.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name in tables.
    pub name: String,
    /// Who does the work.
    pub carrier: Carrier,
}

/// Who does the work.
#[derive(Clone, Debug)]
pub enum Carrier {
    /// Nobody: the bare veth pair.
    Direct,
    /// One plain relay.
    Relay,
    /// Two agents of ours, started from this binary: a folder of YAML, and eBPF.
    Agents(PathBuf),
    /// Two agents started from this binary by istio/ztunnel's contract.
    Contract(PathBuf),
}

impl Peer {
    /// The agent's binary.
    pub fn agent(&self) -> Option<&Path> {
        match &self.carrier {
            Carrier::Agents(binary) | Carrier::Contract(binary) => Some(binary),
            Carrier::Direct | Carrier::Relay => None,
        }
    }
}

static BUILT: AtomicUsize = AtomicUsize::new(0);

/// Two pods and, but for the direct path, two agents. Dropping it ends everything in it.
#[derive(Debug)]
pub struct Field {
    settings: Settings,
    agents: Vec<Proxy>,
    _control: Option<ControlPlane>,
    relay: Option<(Running, Netns)>,
    _server: Running,
    client: Netns,
    _server_netns: Netns,
    _mesh: MeshDir,
    _authority: TempDir,
}

impl Field {
    /// Builds a field for `peer` and waits until traffic flows, through the tunnel if there is one.
    pub fn build(peer: &Peer, settings: &Settings) -> anyhow::Result<Self> {
        let prefix = format!("{}b{}-", netns::own_prefix(), BUILT.fetch_add(1, Ordering::Relaxed));
        let client = Netns::create(&format!("{prefix}client"))?;
        let server = Netns::create(&format!("{prefix}server"))?;
        let mesh = MeshDir::empty()?;
        mesh.put("mesh.yaml", &mesh_yaml(&client, &server))?;
        let authority = tempfile::Builder::new().prefix("culvert-bench-ca-").tempdir()?;
        netns::remove_on_interrupt(authority.path());

        let mut relay = None;
        let mut agents = Vec::new();
        if let Carrier::Relay = peer.carrier {
            let middle = Netns::create(&format!("{prefix}relay"))?;
            join((&client, CLIENT, "eth0"), (&middle, RELAY, "eth0"))?;
            join((&server, BEHIND, "eth0"), (&middle, RELAY_BACK, "eth1"))?;
            let mut command = pinned(settings.cpus.map(|(agents, _load)| agents), &settings.loadgen);
            command.args(["relay", "--port", &PORT.to_string(), "--to", &format!("{BEHIND}:{PORT}")]);
            relay = Some((start_listening(&middle, &mut command)?, middle));
        } else {
            join((&client, CLIENT, "eth0"), (&server, SERVER, "eth0"))?;
            netns::ip_batch(&client, &[format!("route add default via {SERVER}")])?;
            netns::ip_batch(&server, &[format!("route add default via {CLIENT}")])?;
        }
        if let Carrier::Agents(binary) = &peer.carrier {
            for node in ["node-client", "node-server"] {
                let netns = Netns::create(&format!("{prefix}{node}"))?;
                agents.push(Proxy::agent(binary, (node, &[]), netns, (mesh.path(), authority.path()), &peer.name, settings)?);
            }
        }
        let mut control = None;
        if let Carrier::Contract(binary) = &peer.carrier {
            let plane = control.insert(ControlPlane::start(&format!("{prefix}control"), &local_mesh())?);
            for (name, pod) in [("client", &client), ("server", &server)] {
                let node = format!("node-{name}");
                let netns = Netns::create(&format!("{prefix}{node}"))?;
                agents.push(plane.agent(binary, (&node, netns), &Pod { name, netns: pod }, &peer.name, settings)?);
            }
        }
        for agent in &mut agents {
            agent.wait_ready()?;
        }
        let mut command = load_command(settings);
        let load_server = start_listening(&server, command.args(["server", "--port", &PORT.to_string()]))?;
        let field = Self {
            settings: settings.clone(),
            agents,
            _control: control,
            relay,
            _server: load_server,
            client,
            _server_netns: server,
            _mesh: mesh,
            _authority: authority,
        };
        field.warm_up()?;
        Ok(field)
    }

    /// The address clients use.
    fn target(&self) -> SocketAddr {
        (if self.relay.is_some() { RELAY } else { SERVER }, PORT).into()
    }

    /// A few connections, then the proof that they went through both agents and were encrypted.
    fn warm_up(&self) -> anyhow::Result<()> {
        let churn = ["churn", "--conc", "1", "--count", "5"];
        self.load(&churn, self.target()).context("through the pod address")?;
        if self.agents.is_empty() {
            return Ok(());
        }
        self.load(&churn, (SERVICE, PORT).into()).context("through the service address")?;
        for agent in &self.agents {
            let tunnelled = |page: String| {
                page.lines().any(|line| {
                    line.starts_with("istio_tcp_connections_opened_total") && line.contains("mutual_tls") && !line.ends_with(" 0")
                })
            };
            wait::until_true(&format!("{} to have carried connections over mTLS", agent.log().display()), || {
                http::get(&agent.netns, (Ipv4Addr::LOCALHOST, 15020).into(), "/metrics").is_ok_and(|page| tunnelled(page.body))
            })?;
        }
        Ok(())
    }

    /// Runs a load client against the server and gives its line.
    pub fn run(&self, args: &[&str]) -> anyhow::Result<Value> {
        self.load(args, self.target())
    }

    fn load(&self, args: &[&str], to: SocketAddr) -> anyhow::Result<Value> {
        parts::load(&self.client, &self.settings, args, to)
    }

    /// Opens idle connections, which last as long as the value.
    pub fn hold(&self, conns: u64) -> anyhow::Result<Held> {
        Held::open(&self.client, &self.settings, &["idle"], self.target(), conns)
    }

    /// CPU seconds each carrier has used so far: the client's agent, the server's; or the relay.
    pub fn cpu(&self) -> anyhow::Result<Vec<f64>> {
        let relay = self.relay.as_ref().map(|(child, _netns)| process::cpu_seconds(child.0.id()));
        self.agents.iter().map(Proxy::cpu).chain(relay).collect()
    }

    /// Resident KiB of each agent.
    pub fn rss_kib(&self) -> anyhow::Result<Vec<u64>> {
        self.agents.iter().map(Proxy::rss_kib).collect()
    }

    /// An error, with the end of its log, if an agent is not running any more.
    pub fn check_agents(&mut self) -> anyhow::Result<()> {
        self.agents.iter_mut().try_for_each(Proxy::check)
    }
}

fn mesh_yaml(client: &Netns, server: &Netns) -> String {
    let pod = |name: &str, node: &str, ip: Ipv4Addr, ns: &Netns| {
        let annotation = format!("culvert.dev/netns: {}", ns.path().display());
        pod_yaml(name, ip, &format!("app: {name}"), &annotation, node)
    };
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: bench\n  labels:\n    istio.io/dataplane-mode: ambient\n\
         {}{}\
         ---\napiVersion: v1\nkind: Service\nmetadata:\n  name: server\n  namespace: bench\nspec:\n  clusterIP: {SERVICE}\n  clusterIPs:\n  \
         - {SERVICE}\n  selector:\n    app: server\n  ports:\n  - name: tcp\n    port: {PORT}\n    targetPort: {PORT}\n\
         ---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: allow-client\n  namespace: bench\nspec:\n  \
         selector:\n    matchLabels:\n      app: server\n  action: ALLOW\n  rules:\n  - from:\n    - source:\n        principals:\n        \
         - cluster.local/ns/bench/sa/client\n    to:\n    - operation:\n        ports: [\"{PORT}\"]\n",
        pod("client", "node-client", CLIENT, client),
        pod("server", "node-server", SERVER, server),
    )
}

/// The same mesh in istio/ztunnel's own format.
fn local_mesh() -> String {
    let pod = |name: &str, ip: Ipv4Addr, more: &str| {
        format!(
            "- uid: Kubernetes//Pod/bench/{name}\n  name: {name}\n  namespace: bench\n  serviceAccount: {name}\n  trustDomain: cluster.local\n  \
             workloadIps: [\"{ip}\"]\n  protocol: HBONE\n  node: node-{name}\n  clusterId: Kubernetes\n{more}"
        )
    };
    let service = format!("  services: {{\"bench/server.bench.svc.cluster.local\": {{{PORT}: {PORT}}}}}\n");
    format!(
        "workloads:\n{}{}policies:\n- name: allow-client\n  namespace: bench\n  scope: WorkloadSelector\n  action: Allow\n  \
         rules: [[[{{principals: [!Exact \"cluster.local/ns/bench/sa/client\"]}}], [{{destinationPorts: [{PORT}]}}]]]\n\
         services:\n- name: server\n  namespace: bench\n  hostname: server.bench.svc.cluster.local\n  vips: [\"/{SERVICE}\"]\n  ports: {{{PORT}: {PORT}}}\n",
        pod("client", CLIENT, "  services: {}\n"),
        pod("server", SERVER, &format!("  authorizationPolicies: [bench/allow-client]\n{service}")),
    )
}
