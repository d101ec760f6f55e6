//! Enrolment by the CNI agent: what its pods can do, and what becomes of them whatever it says.
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_binary};
use mesh_tests::cni::{self, CniAgent, CniPod, Connection, add_request, field};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::CannotRun;
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::{http, netns, wait};
use serde_json::Value;
use tempfile::TempDir;

const PORT: u16 = 8080;
const VIP: ([u8; 4], u16) = ([10, 96, 0, 20], 80);
const VIP6: ([u16; 8], u16) = ([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20], 80);

const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t }
spec:
  selector: { app: web }
  clusterIP: 10.96.0.20
  clusterIPs: ["10.96.0.20", "fd00:96::20"]
  ipFamilies: [IPv4, IPv6]
  ports:
  - { name: tcp, port: 80, targetPort: 8080, protocol: TCP }
"#;

/// One node's agent and the CNI agent's connection to it.
struct Node {
    agent: Agent,
    cni: CniAgent,
    connection: Connection,
}

/// Dropped in this order.
pub(crate) struct Zds {
    a: Node,
    b: Node,
    _servers: Vec<Server>,
    topology: Topology,
    dir: MeshDir,
    sockets: TempDir,
    _ca: TempDir,
    _logs: TempDir,
}

fn named(name: &str) -> CniPod<'_> {
    CniPod { uid: name, name, namespace: "t", service_account: name }
}

pub(crate) fn set_up() -> anyhow::Result<Zds> {
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-1")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "near", "near", &[])
        .pod("node-a", "t", "late", "late", &[])
        .pod("node-a", "t", "busy", "busy", &[])
        .pod("node-b", "t", "web", "web", &[])
        .host("outside")
        .build()?;
    let (dir, ca, logs, sockets) = (MeshDir::empty()?, netns::scratch("ca")?, netns::scratch("logs")?, netns::scratch("cni")?);
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    for pod in topology.plan().pods.iter().filter(|pod| pod.name != "late") {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let mut servers = vec![Server::start(topology.host("outside"), PORT)?];
    for name in ["client", "near", "web"] {
        servers.push(Server::start(topology.pod(name), PORT)?);
    }
    for pod in &topology.plan().pods {
        cni::redirect(&topology.pod(&pod.name).netns).with_context(|| format!("rules of {}", pod.name))?;
    }
    let start = |name: &str| -> anyhow::Result<Node> {
        let socket = sockets.path().join(name);
        let cni = CniAgent::listen(&socket)?;
        let agent = AgentSpec::new(name, dir.path(), ca.path(), logs.path())
            .env("TRUST_DOMAIN", "test.local")
            .env("INPOD_UDS", &socket.to_string_lossy())
            .env("CONNECTION_TERMINATION_DEADLINE", "3s")
            .start(topology.node(name))?;
        let connection = cni.accept().with_context(|| format!("log of {name}:\n{}", agent.log_tail(20)))?;
        Ok(Node { agent, cni, connection })
    };
    let (a, b) = (start("node-a")?, start("node-b")?);
    let zds = Zds { a, b, _servers: servers, topology, dir, sockets, _ca: ca, _logs: logs };
    ensure!(ready(&zds.a.agent).is_err(), "ready before a pod was named");
    zds.name_all("node-a", &["client", "near"])?;
    zds.name_all("node-b", &["web"])?;
    for node in [&zds.a, &zds.b] {
        node.agent.wait_ready(Duration::from_secs(40))?;
    }
    Ok(zds)
}

/// Whether the readiness page says so, now.
fn ready(agent: &Agent) -> anyhow::Result<()> {
    let answer = http::get(&agent.place().netns, ([127, 0, 0, 1], 15021).into(), "/healthz/ready")?;
    ensure!(answer.status == 200, "{}", answer.body.trim());
    Ok(())
}

impl Zds {
    pub(crate) fn node_netns(&self) -> &netns::Netns {
        &self.topology.node("node-a").netns
    }
    fn node(&self, name: &str) -> &Node {
        if name == "node-a" { &self.a } else { &self.b }
    }
    fn add(&self, node: &str, pod: &str) -> anyhow::Result<String> {
        self.node(node).connection.add(&named(pod), &self.topology.pod(pod).netns)
    }
    /// Adds these pods and says that they are all.
    fn name_all(&self, node: &str, pods: &[&str]) -> anyhow::Result<()> {
        for pod in pods {
            let error = self.add(node, pod)?;
            ensure!(error.is_empty(), "{pod} is not served: {error}");
        }
        let error = self.node(node).connection.snapshot_sent()?;
        ensure!(error.is_empty(), "the list is refused: {error}");
        Ok(())
    }
    /// The agent's next connection.
    fn reconnect(&mut self) -> anyhow::Result<()> {
        self.a.connection.close();
        self.a.connection = self.a.cni.accept()?;
        Ok(())
    }
    fn call(&self, from: &str, to: SocketAddr) -> anyhow::Result<(Client, SocketAddr)> {
        let (mut client, who) = Client::who(self.topology.pod(from), to).with_context(|| format!("{from} to {to}"))?;
        client.ping("still there?")?;
        Ok((client, who.peer))
    }
    fn web(&self) -> SocketAddr {
        self.topology.pod("web").at(PORT)
    }
    fn calls_web(&self, from: &str) -> anyhow::Result<Client> {
        Ok(self.call(from, self.web())?.0)
    }
}

pub(crate) fn pods_of_the_cni_agent_call_each_other(zds: &mut Zds) -> anyhow::Result<()> {
    let id = |account: &str| format!("spiffe://test.local/ns/t/sa/{account}");
    let (client, web, near) = (zds.topology.pod("client"), zds.topology.pod("web"), zds.topology.pod("near"));
    for to in [zds.web(), web.at6(PORT), VIP.into(), VIP6.into(), near.at(PORT), near.at6(PORT)] {
        let mark = zds.a.agent.mark();
        let (open, source) = zds.call("client", to)?;
        ensure!(source.ip() == client.v4 || source.ip() == client.v6, "{to} sees {source}");
        drop(open);
        zds.a.agent.wait_access(&format!("the call to {to}"), mark, |record: &Value| {
            record["direction"] == "outbound" && record["src.identity"] == id("client") && record["dst.identity"].is_string()
        })?;
    }
    // Outside the mesh, and a pod's own service and address.
    zds.call("client", zds.topology.host("outside").at(PORT))?;
    zds.call("web", VIP.into())?;
    zds.call("web", zds.web())?;
    let closed = Client::open(client, web.at(9), "who").and_then(|mut client| client.line());
    ensure!(closed.as_ref().is_err_and(|e| !matches!(e.kind(), std::io::ErrorKind::WouldBlock)), "a closed port: {closed:?}");
    Ok(())
}

pub(crate) fn the_source_stays_and_plaintext_is_judged(zds: &mut Zds) -> anyhow::Result<()> {
    let (outside, web) = (zds.topology.host("outside"), zds.topology.pod("web"));
    for to in [web.at(PORT), web.at6(PORT)] {
        let mark = zds.b.agent.mark();
        let answer = Client::open(outside, to, "who").and_then(|mut client| client.line());
        ensure!(answer.is_err(), "plaintext under STRICT was answered: {answer:?}");
        zds.b.agent.wait_access("the refusal", mark, |record: &Value| {
            record["error"].as_str().is_some_and(|error| error.starts_with("plaintext_refused"))
        })?;
    }
    let loose = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: { name: loose, namespace: t }\n\
                 spec: { selector: { matchLabels: { app: web } }, mtls: { mode: PERMISSIVE } }\n";
    let _for_now = zds.dir.put_for_now("loose.yaml", loose)?;
    for (to, source) in [(web.at(PORT), outside.at(0)), (web.at6(PORT), outside.at6(0))] {
        let who = wait::until("plaintext to be allowed", wait::PATIENCE, || Client::who(outside, to).ok())?.1;
        ensure!(who.peer.ip() == source.ip() && who.local == to, "{to} is seen from {} as {}", who.peer, who.local);
    }
    Ok(())
}

pub(crate) fn a_repeated_pod_changes_nothing(zds: &mut Zds) -> anyhow::Result<()> {
    let mut held = zds.calls_web("client")?;
    let mark = zds.a.agent.mark();
    ensure!(zds.add("node-a", "client")?.is_empty(), "refused");
    held.ping("as before")?;
    ensure!(!zds.a.agent.log_since(mark).contains("pod is served"), "the pod was started again");
    Ok(())
}

pub(crate) fn an_unknown_pod_can_be_removed(zds: &mut Zds) -> anyhow::Result<()> {
    ensure!(zds.a.connection.remove("nobody")?.is_empty(), "refused");
    zds.calls_web("client").map(drop)
}

pub(crate) fn a_pod_may_come_before_the_mesh_knows_it(zds: &mut Zds) -> anyhow::Result<()> {
    ensure!(zds.add("node-a", "late")?.is_empty(), "refused");
    let (late, web) = (zds.topology.pod("late"), zds.web());
    std::thread::scope(|scope| {
        let call = scope.spawn(move || Client::who(late, web).map(drop));
        std::thread::sleep(Duration::from_millis(500));
        ensure!(!call.is_finished(), "the call did not wait for the mesh to know the pod");
        zds.dir.put("pod-late.yaml", &zds.topology.pod_yaml("late", &[]))?;
        call.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the caller panicked")))
    })
}

pub(crate) fn a_removed_pod_is_ended(zds: &mut Zds) -> anyhow::Result<()> {
    let mut held = zds.calls_web("late")?;
    ensure!(zds.a.connection.remove("late")?.is_empty(), "refused");
    held.wait_cut()?;
    // Each listener is closed by the thread that accepts, which may be a moment later than the cut.
    let late = zds.topology.pod("late");
    let nobody = || late.netns.connect(zds.web(), Duration::from_secs(2)).is_err();
    wait::until_true("nothing listens in the pod any more", nobody)?;
    ready(&zds.a.agent)
}

pub(crate) fn a_pod_that_cannot_be_served_is_tried_again(zds: &mut Zds) -> anyhow::Result<()> {
    let taken = zds.topology.pod("busy").listen(15008)?;
    let error = zds.add("node-a", "busy")?;
    ensure!(error.contains("in use"), "the answer is {error:?}");
    ensure!(ready(&zds.a.agent).is_err(), "ready without one of its pods");
    // The connection goes on.
    ensure!(zds.a.connection.remove("nobody")?.is_empty(), "refused");
    drop(taken);
    zds.a.agent.wait_ready(Duration::from_secs(40))?;
    zds.calls_web("busy")?;
    ensure!(zds.a.connection.remove("busy")?.is_empty(), "refused");
    Ok(())
}

pub(crate) fn what_breaks_the_protocol_is_answered_and_survived(zds: &mut Zds) -> anyhow::Result<()> {
    let netns = std::fs::File::open(zds.topology.pod("client").netns.path())?;
    let no_namespace = std::fs::File::open("/dev/null")?;
    let (fd, other) = (netns.as_raw_fd(), no_namespace.as_raw_fd());
    // Not the protocol's fault, only the pod's: the connection goes on.
    let error = zds.a.connection.ask(&add_request(&named("odd")), &[other])?;
    ensure!(error.contains("namespace"), "a descriptor that is no namespace: {error:?}");
    let second = CniPod { uid: "second", ..named("client") };
    let error = zds.a.connection.ask(&add_request(&second), &[fd])?;
    ensure!(error.contains("is served in this network namespace"), "two pods in one namespace: {error:?}");
    ensure!(zds.a.connection.remove("second")?.is_empty(), "refused");

    let mut held = zds.calls_web("client")?;
    let add = add_request(&named("client"));
    let nameless = field(1, &field(1, b"client"));
    let cases: [(&str, Vec<u8>, &[i32]); 10] = [
        ("no namespace", add.clone(), &[]),
        ("two namespaces", add.clone(), &[fd, fd]),
        ("five descriptors", add.clone(), &[fd, fd, fd, fd, fd]),
        ("no names", nameless, &[fd]),
        ("a namespace with a removal", field(2, &field(2, b"client")), &[fd]),
        ("a second end of the list", field(3, &[]), &[]),
        ("a pod kept after the end of the list", field(5, &field(1, b"client")), &[]),
        ("a kind nobody knows", field(9, b"?"), &[]),
        ("garbage", vec![0xff; 40], &[]),
        ("a request that is too long", field(1, &field(1, &[b'x'; 9000])), &[fd]),
    ];
    for (what, request, fds) in cases {
        let error = zds.a.connection.ask(&request, fds).context(what)?;
        ensure!(!error.is_empty(), "{what} was accepted");
        ensure!(zds.a.connection.is_closed().context(what)?, "{what}: the connection goes on");
        wait::until_true("the agent to say it is not ready", || ready(&zds.a.agent).is_err())?;
        zds.reconnect().context(what)?;
        zds.name_all("node-a", &["client", "near"]).context(what)?;
        zds.a.agent.wait_ready(Duration::from_secs(40)).context(what)?;
    }
    held.ping("through all of it")?;
    Ok(())
}

pub(crate) fn a_restarted_cni_agent_finds_its_pods_served(zds: &mut Zds) -> anyhow::Result<()> {
    let (mut kept, mut dropped) = (zds.calls_web("client")?, zds.calls_web("near")?);
    let path = zds.sockets.path().join("node-a");
    // First one that wants another version: it closes on the greeting, twice.
    zds.a.cni = CniAgent::listen(&path)?;
    zds.reconnect()?;
    zds.reconnect()?;
    kept.ping("while the CNI agent is away")?;
    zds.calls_web("client")?;
    ensure!(ready(&zds.a.agent).is_err(), "ready without the CNI agent");
    // Then one that knows its pod but has lost the namespace.
    zds.reconnect()?;
    ensure!(zds.a.connection.keep("client")?.is_empty(), "refused");
    ensure!(zds.a.connection.keep("nobody")?.is_empty(), "refused");
    dropped.ping("not before the list is complete")?;
    ensure!(zds.a.connection.snapshot_sent()?.is_empty(), "refused");
    dropped.wait_cut()?;
    kept.ping("kept")?;
    zds.a.agent.wait_ready(Duration::from_secs(40))?;
    ensure!(zds.add("node-a", "near")?.is_empty(), "refused");
    zds.calls_web("near").map(drop)
}

pub(crate) fn the_next_agent_takes_over(zds: &mut Zds) -> anyhow::Result<()> {
    let mut held = zds.calls_web("client")?;
    let next = zds.a.agent.spec().clone().env("CULVERT_ADMIN_ADDR", "127.0.0.1:15100").start(zds.topology.node("node-a"))?;
    let _to_the_old_one = std::mem::replace(&mut zds.a.connection, zds.a.cni.accept()?);
    zds.name_all("node-a", &["client", "near"])?;
    next.wait_ready(Duration::from_secs(40))?;
    wait::until_true("the old agent to let go", || zds.a.agent.whole_log().contains("another agent took over"))?;
    held.ping("carried by the old agent")?;
    for _ in 0..20 {
        zds.calls_web("client")?;
    }
    let old = std::mem::replace(&mut zds.a.agent, next);
    ensure!(old.terminate(Duration::from_secs(30))?.success(), "the old agent failed");
    held.wait_cut()?;
    zds.calls_web("client").map(drop)
}
