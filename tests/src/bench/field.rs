//! Where peers are compared: two pods joined by one veth pair, an agent for each, and nothing else. (A plain relay stands
//! between two veth pairs instead.)
//!
//! Owns: the wiring, the mesh folder (two pods, a service, one ALLOW policy), starting agents by their contract, and the
//! proof that traffic really takes the tunnel. A field is used for one peer and one round, so that no peer pays for the
//! TIME_WAIT sockets of another. Refuses: nodes and bridges in between; every hop would be charged to the agents alike.
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

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
    /// Two agents, started from this binary.
    Agents(PathBuf),
}

impl Peer {
    /// The agent's binary.
    pub fn agent(&self) -> Option<&Path> {
        match &self.carrier {
            Carrier::Agents(binary) => Some(binary),
            Carrier::Direct | Carrier::Relay => None,
        }
    }
}

/// How agents run; the same for every peer.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `ZTUNNEL_WORKER_THREADS`.
    pub workers: u32,
    /// CPU of the agents and CPU of the load; none on a machine with one.
    pub cpus: Option<(u32, u32)>,
    /// Folder for the logs of agents.
    pub logs: PathBuf,
    /// The load generator.
    pub loadgen: PathBuf,
}

static BUILT: AtomicUsize = AtomicUsize::new(0);

/// Two pods and, but for the direct path, two agents. Dropping it ends everything in it.
#[derive(Debug)]
pub struct Field {
    settings: Settings,
    agents: Vec<Agent>,
    relay: Option<(Running, Netns)>,
    _server: Running,
    client: Netns,
    _server_netns: Netns,
    _mesh: MeshDir,
    _authority: TempDir,
}

/// A child that does not outlive its value.
#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

#[derive(Debug)]
struct Agent {
    child: Running,
    netns: Netns,
    log: PathBuf,
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
                agents.push(start_agent(binary, node, netns, mesh.path(), authority.path(), peer, settings)?);
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
            wait::until_true(&format!("{} to have carried connections over mTLS", agent.log.display()), || {
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
        let mut command = load_command(&self.settings);
        command.args(args).arg("--to").arg(to.to_string());
        let out = self.client.output(command.stderr(Stdio::inherit()))?;
        let line = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        ensure!(!line.is_empty(), "loadgen {} ended with {} and said nothing", args.join(" "), out.status);
        serde_json::from_str(&line).with_context(|| format!("loadgen said {line:?}"))
    }

    /// Opens idle connections, which last as long as the value.
    pub fn hold(&self, conns: u64) -> anyhow::Result<Held> {
        let mut command = load_command(&self.settings);
        command.args(["idle", "--conns", &conns.to_string(), "--to", &self.target().to_string()]);
        let mut child = self.client.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("a pipe")?);
        let child = Running(child);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let opened: Value = serde_json::from_str(&line).with_context(|| format!("loadgen said {line:?}"))?;
        ensure!(opened["count"] == conns && opened["errors"] == 0, "not all of {conns} connections opened: {opened}");
        Ok(Held { child, stdin, opened })
    }

    /// CPU seconds each carrier has used so far: the client's agent, the server's; or the relay.
    pub fn cpu(&self) -> anyhow::Result<Vec<f64>> {
        let relay = self.relay.as_ref().map(|(child, _netns)| child);
        let children = self.agents.iter().map(|agent| &agent.child).chain(relay);
        children.map(|child| process::cpu_seconds(child.0.id())).collect()
    }

    /// Resident KiB of each agent.
    pub fn rss_kib(&self) -> anyhow::Result<Vec<u64>> {
        self.agents.iter().map(|agent| process::rss_kib(agent.child.0.id())).collect()
    }

    /// An error, with the end of its log, if an agent is not running any more.
    pub fn check_agents(&mut self) -> anyhow::Result<()> {
        for agent in &mut self.agents {
            if let Ok(Some(status)) = agent.child.0.try_wait() {
                bail!("an agent ended with {status}; its log:\n{}", tail(&agent.log));
            }
        }
        Ok(())
    }
}

/// Idle connections.
#[derive(Debug)]
pub struct Held {
    child: Running,
    stdin: Option<ChildStdin>,
    /// What opening them took.
    pub opened: Value,
}

impl Held {
    /// Ends them; an error if one of them was not alive any more.
    pub fn end(mut self) -> anyhow::Result<()> {
        drop(self.stdin.take());
        let status =
            wait::until("the end of idle connections", Duration::from_mins(1), || self.child.0.try_wait().ok().flatten())?;
        ensure!(status.success(), "some idle connections were dead at the end");
        Ok(())
    }
}

impl Agent {
    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let mut last = String::from("no answer");
        let ready = wait::until("an agent's readiness", Duration::from_secs(30), || {
            if let Ok(Some(status)) = self.child.0.try_wait() {
                return Some(Err(anyhow::anyhow!("it ended with {status}")));
            }
            match http::get(&self.netns, (Ipv4Addr::LOCALHOST, 15021).into(), "/healthz/ready") {
                Ok(answer) if answer.status == 200 => Some(Ok(())),
                Ok(answer) => {
                    last = answer.body;
                    None
                }
                Err(error) => {
                    last = format!("{error:#}");
                    None
                }
            }
        });
        let log = self.log.clone();
        ready.and_then(|inner| inner).with_context(|| format!("{last}; log {}:\n{}", log.display(), tail(&log)))
    }
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// `command` on one CPU, if there are two.
fn pinned(cpu: Option<u32>, program: &Path) -> Command {
    match cpu {
        Some(cpu) => {
            let mut command = Command::new("taskset");
            command.args(["-c", &cpu.to_string()]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

fn load_command(settings: &Settings) -> Command {
    pinned(settings.cpus.map(|(_agents, load)| load), &settings.loadgen)
}

/// Joins two namespaces by a veth pair.
fn join(one: (&Netns, Ipv4Addr, &str), other: (&Netns, Ipv4Addr, &str)) -> anyhow::Result<()> {
    let pair = format!("link add {} type veth peer name {} netns {}", one.2, other.2, other.0.name());
    netns::ip_batch(one.0, &[pair])?;
    for (ns, address, device) in [one, other] {
        netns::ip_batch(ns, &[format!("addr add {address}/24 dev {device}"), format!("link set {device} up")])?;
    }
    Ok(())
}

/// Starts a mode of the load generator that serves, and waits until it does.
fn start_listening(ns: &Netns, command: &mut Command) -> anyhow::Result<Running> {
    let mut child = Running(ns.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped())).context("start the load generator")?);
    let stdout = child.0.stdout.take().context("a pipe")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(line.starts_with("ready"), "the load generator said {line:?}");
    Ok(child)
}

fn start_agent(
    binary: &Path,
    node: &str,
    netns: Netns,
    mesh: &Path,
    authority: &Path,
    peer: &Peer,
    settings: &Settings,
) -> anyhow::Result<Agent> {
    std::fs::create_dir_all(&settings.logs)?;
    let log = settings.logs.join(format!("{}-{node}.log", peer.name));
    let mut file = File::options().create(true).append(true).open(&log)?;
    writeln!(file, "--- {}", netns.name())?;
    let mut command = pinned(settings.cpus.map(|(agents, _load)| agents), binary);
    command
        .arg("proxy")
        .args(["--node", node, "--mesh-dir"])
        .arg(mesh)
        .arg("--ca-dir")
        .arg(authority)
        .env("ZTUNNEL_WORKER_THREADS", settings.workers.to_string())
        .env("RUST_LOG", "info")
        .env("LOG_FORMAT", "plain")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file);
    let child = netns.spawn(&mut command).with_context(|| format!("start {}", binary.display()))?;
    Ok(Agent { child: Running(child), netns, log })
}

fn mesh_yaml(client: &Netns, server: &Netns) -> String {
    let pod = |name: &str, node: &str, ip: Ipv4Addr, ns: &Netns| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: bench\n  uid: {name}-uid\n  labels:\n    app: {name}\n  \
             annotations:\n    culvert.dev/netns: {}\nspec:\n  nodeName: {node}\n  serviceAccountName: {name}\n  containers:\n  - name: main\n    \
             image: none\n    ports:\n    - containerPort: {PORT}\nstatus:\n  phase: Running\n  podIP: {ip}\n  podIPs:\n  - ip: {ip}\n  \
             conditions:\n  - type: Ready\n    status: \"True\"\n",
            ns.path().display()
        )
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
