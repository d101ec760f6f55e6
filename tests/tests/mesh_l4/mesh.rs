//! The mesh all tests of this suite share: the topology, the objects, the two agents, and what is asked of them.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use mesh_tests::agent::{Agent, AgentSpec, find_binary};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::netns;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::CannotRun;
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::wait;
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PORT: u16 = 8080;
pub(crate) const WEB_VIP: ([u8; 4], u16) = ([10, 96, 0, 20], 80);
pub(crate) const WEB_VIP6: ([u16; 8], u16) = ([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20], 80);

/// The mesh all tests share. Fields are dropped in this order: agents before the topology they live in.
pub(crate) struct Mesh {
    pub(crate) agent_a: Option<Agent>,
    pub(crate) agent_b: Option<Agent>,
    pub(crate) servers: BTreeMap<&'static str, Server>,
    pub(crate) topology: Option<Topology>,
    pub(crate) dir: MeshDir,
    pub(crate) ca: TempDir,
    pub(crate) logs: TempDir,
}

pub(crate) const OBJECTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: loose, namespace: t }
spec: { selector: { matchLabels: { app: loose } }, mtls: { mode: PERMISSIVE } }
";

pub(crate) const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t }
spec:
  selector: { tier: web }
  clusterIP: 10.96.0.20
  clusterIPs: ["10.96.0.20", "fd00:96::20"]
  ipFamilies: [IPv4, IPv6]
  ports:
  - { name: tcp, port: 80, targetPort: 8080, protocol: TCP }
"#;

/// `client` by the trust domain's alias, `near` and `web` by its name; `other` not at all.
pub(crate) const WEB_ALLOW: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: web-allow, namespace: t }
spec:
  selector: { matchLabels: { tier: web } }
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/t/sa/client", "test.local/ns/t/sa/near", "test.local/ns/t/sa/web"]
"#;

pub(crate) fn id(account: &str) -> String {
    format!("spiffe://test.local/ns/t/sa/{account}")
}

pub(crate) fn set_up() -> anyhow::Result<Mesh> {
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-2")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "other", "other", &[])
        .pod("node-a", "t", "near", "near", &[])
        .pod("node-b", "t", "web1", "web", &["tier=web"])
        .pod("node-b", "t", "web2", "web", &["tier=web"])
        .pod("node-b", "t", "victim", "victim", &[])
        .pod("node-b", "t", "loose", "loose", &[])
        .host("outside")
        .host("visitor")
        .build()?;
    let dir = MeshDir::empty()?;
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    dir.put("02-service.yaml", SERVICE)?;
    dir.put("03-web-allow.yaml", WEB_ALLOW)?;
    for pod in &topology.plan().pods {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let mut servers = BTreeMap::new();
    for name in ["client", "near", "web1", "web2", "victim", "loose"] {
        servers.insert(name, Server::start(topology.pod(name), PORT)?);
    }
    servers.insert("outside", Server::start(topology.host("outside"), PORT)?);
    let logs = match std::env::var_os("CULVERT_TEST_LOGS") {
        // For looking at a failure: the directory stays.
        Some(kept) => {
            let dir = TempDir::new_in(kept)?;
            println!("agent logs: {}", dir.path().display());
            let path = dir.keep();
            TempDir::new_in(path)?
        }
        None => netns::scratch("logs")?,
    };
    let mut mesh = Mesh { agent_a: None, agent_b: None, servers, topology: Some(topology), dir, ca: netns::scratch("ca")?, logs };
    mesh.agent_a = Some(mesh.start("node-a")?);
    mesh.agent_b = Some(mesh.start("node-b")?);
    mesh.a().wait_ready(Duration::from_secs(40))?;
    mesh.b().wait_ready(Duration::from_secs(40))?;
    Ok(mesh)
}

impl Mesh {
    #[expect(clippy::expect_used, reason = "only the last test takes it away")]
    pub(crate) fn topology(&self) -> &Topology {
        self.topology.as_ref().expect("the topology is there until the last test")
    }
    #[expect(clippy::expect_used, reason = "a test that stops an agent starts it again")]
    pub(crate) fn a(&self) -> &Agent {
        self.agent_a.as_ref().expect("agent a runs")
    }
    #[expect(clippy::expect_used, reason = "a test that stops an agent starts it again")]
    pub(crate) fn b(&self) -> &Agent {
        self.agent_b.as_ref().expect("agent b runs")
    }
    pub(crate) fn pod(&self, name: &str) -> &Arc<Place> {
        self.topology().pod(name)
    }
    pub(crate) fn outside(&self) -> &Arc<Place> {
        self.topology().host("outside")
    }
    pub(crate) fn spec(&self, node: &str) -> AgentSpec {
        AgentSpec::new(node, self.dir.path(), self.ca.path(), self.logs.path())
            .env("TRUST_DOMAIN", "test.local")
            .env("CULVERT_TRUST_DOMAIN_ALIASES", "cluster.local")
            .env("CONNECTION_TERMINATION_DEADLINE", "3s")
            .env("CULVERT_HANDSHAKE_TIMEOUT", "5s")
            // The machine's own first process is not on these nodes.
            .env("CULVERT_NODE_NETNS", "/proc/self/ns/net")
            // As the DaemonSet of Istio's chart says it.
            .env("POD_NAMESPACE", "istio-system")
            .env("POD_NAME", &format!("ztunnel-{node}"))
            .env("SERVICE_ACCOUNT", "ztunnel")
    }
    pub(crate) fn start(&self, node: &str) -> anyhow::Result<Agent> {
        self.spec(node).start(self.topology().node(node))
    }
    /// Another agent of node a takes its pods over; the one before ends.
    pub(crate) fn upgrade_a(&mut self, next: AgentSpec) -> anyhow::Result<()> {
        let mark = self.a().mark();
        let next = next.start(self.topology().node("node-a"))?;
        wait::until_true("the next agent to take over", || next.log_since(mark).contains("took over from the agent"))?;
        next.wait_ready(Duration::from_secs(40))?;
        self.a().terminate(Duration::from_secs(30))?;
        self.agent_a = Some(next);
        Ok(())
    }
    /// A call that must work; returns who answered.
    pub(crate) fn call(&self, from: &str, to: SocketAddr) -> anyhow::Result<String> {
        let (mut client, who) = Client::who(self.pod(from), to)?;
        client.ping("still there?")?;
        Ok(who.name)
    }
    /// Puts a policy for the time of the guard and waits until both agents know it.
    pub(crate) fn policy(&self, name: &str, yaml: &str) -> anyhow::Result<PolicyForNow<'_>> {
        self.dir.put(&format!("policy-{name}.yaml"), yaml)?;
        let guard = PolicyForNow { mesh: self, name: name.to_owned() };
        for agent in [self.a(), self.b()] {
            agent.wait_config(&format!("policy {name}"), |dump| has_policy(dump, name))?;
        }
        Ok(guard)
    }
}

/// Takes its policy away and waits until the agents have forgotten it, so that the next test starts clean.
pub(crate) struct PolicyForNow<'a> {
    mesh: &'a Mesh,
    name: String,
}
impl Drop for PolicyForNow<'_> {
    fn drop(&mut self) {
        self.mesh.dir.remove(&format!("policy-{}.yaml", self.name));
        for agent in [self.mesh.a(), self.mesh.b()] {
            if let Err(error) = agent.wait_config(&format!("policy {} to go", self.name), |dump| !has_policy(dump, &self.name)) {
                eprintln!("{error:#}");
            }
        }
    }
}

pub(crate) fn entries<'a>(dump: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    dump[list].as_array().into_iter().flatten()
}
pub(crate) fn has_policy(dump: &Value, name: &str) -> bool {
    entries(dump, "policies").any(|policy| policy["name"] == name && policy["namespace"] == "t")
}

/// The call must not get an answer, and must be told so promptly (reset or closed, not a timeout).
pub(crate) fn refused(from: &Place, to: SocketAddr) -> anyhow::Result<()> {
    let begun = Instant::now();
    match Client::open(from, to, "who").and_then(|mut client| client.line()) {
        Ok(answer) => bail!("{} → {to} was answered: {answer}", from.name),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
            bail!("{} → {to} was left hanging for {:?} instead of being refused", from.name, begun.elapsed())
        }
        Err(_reset_or_closed) => Ok(()),
    }
}

pub(crate) fn text<'a>(record: &'a Value, key: &str) -> &'a str {
    record[key].as_str().unwrap_or_default()
}
pub(crate) fn starts(record: &Value, key: &str, prefix: &str) -> bool {
    text(record, key).starts_with(prefix)
}
