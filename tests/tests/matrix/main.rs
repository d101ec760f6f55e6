//! Ring 3: what redirection promises, the same for each way of redirecting and both address families.
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, Series, find_binary};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::name_server::{A, AAAA, ask, ask_tcp};
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{netns, skip, wait};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

const PORT: u16 = 8080;

/// Every row, for each way of redirecting and each family.
macro_rules! rows {
    ($($name:ident),* $(,)?) => {
        &[$(
            test(concat!("ebpf_v4_", stringify!($name)), |m| $name(&m.ebpf, Family::V4)),
            test(concat!("ebpf_v6_", stringify!($name)), |m| $name(&m.ebpf, Family::V6)),
            test(concat!("nftables_v4_", stringify!($name)), |m| $name(&m.nftables, Family::V4)),
            test(concat!("nftables_v6_", stringify!($name)), |m| $name(&m.nftables, Family::V6)),
        )*
        test("ebpf_a_program_takes_the_agents_ports", |m| a_program_takes_the_agents_ports(&mut m.ebpf)),
        test("nftables_a_program_takes_the_agents_ports", |m| a_program_takes_the_agents_ports(&mut m.nftables)),
        test("ebpf_counts_go_on_after_a_kill", |m| counts_go_on_after_a_kill(&mut m.ebpf)),
        test("nftables_counts_go_on_after_a_kill", |m| counts_go_on_after_a_kill(&mut m.nftables)),
        test("nftables_fail_closed_and_open_on_cleanup", |m| fails_closed_until_cleaned_up(&m.nftables))]
    };
}

const TESTS: &[Test<Matrix>] = rows![
    inbound,
    outbound,
    dns,
    self_call,
    closed_port,
    own_service,
    half_closed_and_bulk,
    udp,
    older_connections,
    denied_source
];

fn main() -> ExitCode {
    let cannot = skip::netns_unavailable().or_else(|| skip::command_missing("nft"));
    suite::run("matrix", cannot, || Ok(Matrix { ebpf: Mesh::start("ebpf")?, nftables: Mesh::start("nftables")? }), TESTS)
}

struct Matrix {
    ebpf: Mesh,
    nftables: Mesh,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn at(self, place: &Place, port: u16) -> SocketAddr {
        match self {
            Self::V4 => place.at(port),
            Self::V6 => place.at6(port),
        }
    }
    fn vip(self) -> SocketAddr {
        match self {
            Self::V4 => ([10, 96, 0, 20], 80).into(),
            Self::V6 => ([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20], 80).into(),
        }
    }
}

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
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: loose, namespace: t }
spec: { selector: { matchLabels: { app: loose } }, mtls: { mode: PERMISSIVE } }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t }
spec:
  selector: { app: web }
  clusterIP: 10.96.0.20
  clusterIPs: ["10.96.0.20", "fd00:96::20"]
  ipFamilies: [IPv4, IPv6]
  ports: [{ name: tcp, port: 80, targetPort: 8080 }]
"#;

/// Dropped in this order.
/// Node a refuses UDP and resets what is older than the enrolment; node b does neither.
struct Mesh {
    a: Agent,
    b: Agent,
    redirect: &'static str,
    /// Connections to outside, by the pod that opened them before it was enrolled.
    older: Mutex<BTreeMap<(&'static str, Family), Client>>,
    _servers: Vec<Server>,
    topology: Topology,
    dir: MeshDir,
    _dirs: (TempDir, TempDir),
}

impl Mesh {
    fn start(redirect: &'static str) -> anyhow::Result<Self> {
        find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
        let topology = Plan::default()
            .node("node-a", "zone-1")
            .node("node-b", "zone-1")
            .pod("node-a", "t", "client", "client", &[])
            .pod("node-b", "t", "web", "web", &[])
            .pod("node-b", "t", "loose", "loose", &[])
            .host("outside")
            .build()?;
        let (dir, ca, logs) = (MeshDir::empty()?, netns::scratch("ca")?, netns::scratch("logs")?);
        dir.put("00-base.yaml", OBJECTS)?;
        dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
        for pod in &topology.plan().pods {
            dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
        }
        let mut servers = vec![Server::start(topology.host("outside"), PORT)?];
        for pod in ["client", "web", "loose"] {
            servers.push(Server::start(topology.pod(pod), PORT)?);
        }
        let mut older = BTreeMap::new();
        for pod in ["client", "loose"] {
            for family in [Family::V4, Family::V6] {
                let (client, _) = Client::who(topology.pod(pod), family.at(topology.host("outside"), PORT))?;
                older.insert((pod, family), client);
            }
        }
        let start = |node: &str| {
            let (udp, connections) = if node == "node-a" { ("refuse", "reset") } else { ("allow", "keep") };
            AgentSpec::new(node, dir.path(), ca.path(), logs.path())
                .env("TRUST_DOMAIN", "test.local")
                .env("CULVERT_REDIRECT", redirect)
                .env("CULVERT_UDP", udp)
                .env("CULVERT_OLDER_CONNECTIONS", connections)
                .start(topology.node(node))
        };
        let (a, b) = (start("node-a")?, start("node-b")?);
        for agent in [&a, &b] {
            agent.wait_ready(Duration::from_secs(40))?;
        }
        Ok(Self { a, b, redirect, older: Mutex::new(older), _servers: servers, topology, dir, _dirs: (ca, logs) })
    }
    fn pod(&self, name: &str) -> &Place {
        self.topology.pod(name)
    }
    fn outside(&self) -> &Place {
        self.topology.host("outside")
    }
    /// What the page of agent b says of the redirection of `loose`.
    fn redirect_of_loose(&self) -> anyhow::Result<Value> {
        let dump = self.b.config_dump()?;
        let states = dump["workloadState"].as_object().context("workloadState")?;
        let loose = states.iter().find(|(uid, _)| uid.ends_with("/loose")).context("loose")?;
        Ok(loose.1["redirect"].clone())
    }
    /// A call that must work: who answered, and whom it saw.
    fn call(&self, from: &str, to: SocketAddr) -> anyhow::Result<(String, SocketAddr)> {
        let (mut client, who) = Client::who(self.pod(from), to).with_context(|| format!("{from} to {to}"))?;
        client.ping("still there?")?;
        Ok((who.name, who.peer))
    }
}

fn inbound(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let (outside, loose) = (mesh.outside(), family.at(mesh.pod("loose"), PORT));
    let (mut client, who) = Client::who(outside, loose)?;
    client.ping("plain")?;
    ensure!(who.peer.ip() == family.at(outside, 0).ip() && who.local == loose, "{who:?}");
    let mark = mesh.b.mark();
    let strict = Client::open(outside, family.at(mesh.pod("web"), PORT), "who").and_then(|mut client| client.line());
    ensure!(strict.is_err(), "plaintext under STRICT was answered: {strict:?}");
    mesh.b.wait_access("the refusal", mark, |r: &Value| {
        r["error"].as_str().is_some_and(|error| error.starts_with("plaintext_refused"))
    })?;
    Ok(())
}

fn outbound(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let source = family.at(mesh.pod("client"), 0).ip();
    for to in [family.at(mesh.pod("web"), PORT), family.vip()] {
        let mark = mesh.b.mark();
        let (name, seen) = mesh.call("client", to)?;
        ensure!(name == "web" && seen.ip() == source, "{to}: {name} sees {seen}");
        mesh.b.wait_access("the call", mark, |r: &Value| {
            r["direction"] == "inbound" && r["src.identity"] == "spiffe://test.local/ns/t/sa/client"
        })?;
    }
    let mark = mesh.a.mark();
    mesh.call("client", family.at(mesh.outside(), PORT))?;
    mesh.a.wait_access("the passage", mark, |r: &Value| r["direction"] == "outbound" && r["dst.identity"].is_null())?;
    Ok(())
}

fn dns(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let server = family.at(mesh.outside(), 53);
    for (kind, address) in [(A, "10.96.0.20"), (AAAA, "fd00:96::20")] {
        let udp = ask(mesh.pod("client"), server, "web.t.svc.cluster.local", kind)?;
        let tcp = ask_tcp(mesh.pod("client"), server, "web.t.svc.cluster.local", kind)?;
        ensure!(udp.addresses() == [address] && tcp.addresses() == [address], "{udp:?} {tcp:?}");
    }
    Ok(())
}

fn self_call(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let (name, seen) = mesh.call("client", family.at(mesh.pod("client"), PORT))?;
    ensure!(name == "client" && seen.ip() == family.at(mesh.pod("client"), 0).ip(), "{name} sees {seen}");
    Ok(())
}

fn own_service(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let (name, _) = mesh.call("web", family.vip())?;
    ensure!(name == "web", "{name} answered");
    Ok(())
}

fn closed_port(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    for (from, to) in [("client", family.at(mesh.pod("web"), 9)), ("client", family.at(mesh.outside(), 9))] {
        let began = Instant::now();
        let answer = Client::open(mesh.pod(from), to, "who").and_then(|mut client| client.line());
        let refused = answer.as_ref().is_err_and(|e| !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
        ensure!(refused && began.elapsed() < Duration::from_secs(10), "{to}: {answer:?} after {:?}", began.elapsed());
    }
    let direct = Client::open(mesh.outside(), family.at(mesh.pod("loose"), 9), "who").and_then(|mut client| client.line());
    ensure!(direct.as_ref().is_err_and(|e| e.kind() != ErrorKind::WouldBlock), "{direct:?}");
    Ok(())
}

fn half_closed_and_bulk(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    for to in [family.at(mesh.pod("web"), PORT), family.at(mesh.outside(), PORT)] {
        let mut client = Client::open(mesh.pod("client"), to, "source 3000000")?;
        client.finish()?;
        let sum = client.rest()?;
        ensure!(sum.bytes == 3_000_000, "{} bytes of 3000000 from {to}", sum.bytes);
    }
    Ok(())
}

/// UDP other than DNS passes by itself, and neither way where it is refused.
fn udp(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let echo = |from: &Place, to: &Place| -> anyhow::Result<bool> {
        let at = family.at(to, 7007);
        let server = to.netns.enter(|| UdpSocket::bind(at))?;
        let client = from.netns.enter(|| UdpSocket::bind(family.at(from, 0)))?;
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        }
        // What is refused on the way out may be told at once.
        if client.send_to(b"ping", at).is_err() {
            return Ok(false);
        }
        let mut buffer = [0; 16];
        let Ok((length, source)) = server.recv_from(&mut buffer) else { return Ok(false) };
        ensure!(&buffer[..length] == b"ping");
        server.send_to(b"pong", source)?;
        Ok(client.recv(&mut buffer).is_ok())
    };
    let (outside, allowed, refused) = (mesh.outside(), mesh.pod("loose"), mesh.pod("client"));
    ensure!(echo(outside, allowed)? && echo(allowed, outside)?, "UDP does not pass");
    ensure!(!echo(outside, refused)?, "UDP came in although it is refused");
    ensure!(!echo(refused, outside)?, "UDP went out although it is refused");
    ensure!(!echo(allowed, refused)?, "UDP of another pod came in");
    Ok(())
}

fn older_connections(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let mut older = mesh.older.lock().map_err(|_| anyhow::anyhow!("another test panicked"))?;
    for (pod, lives) in [("client", false), ("loose", mesh.redirect == "ebpf")] {
        let mut client = older.remove(&(pod, family)).context("it is there")?;
        let answered = client.ping("still there?");
        ensure!(answered.is_ok() == lives, "{pod}: {answered:?}");
    }
    Ok(())
}

/// What is denied for its address alone is dropped in the kernel: in plaintext and in tunnels, told by the agent's pages, until the
/// policy goes. What is excepted and the node's own probes are not meant.
fn denied_source(mesh: &Mesh, family: Family) -> anyhow::Result<()> {
    let (outside, loose) = (mesh.outside(), mesh.pod("loose"));
    Client::who(outside, family.at(loose, PORT))?;
    let client = family.at(mesh.pod("client"), 0).ip();
    let guard = mesh.dir.put_for_now(
        "deny-sources.yaml",
        &format!(
            r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: no-sources, namespace: t }}
spec:
  selector: {{ matchLabels: {{ app: loose }} }}
  action: DENY
  rules:
  - from: [{{ source: {{ ipBlocks: ["192.0.2.0/24", "10.244.0.0/16", "2001:db8:100::/48", "fd00:244::/32"], notIpBlocks: ["{client}"] }} }}]
"#
        ),
    )?;
    let nets = |key: &str| Ok::<_, anyhow::Error>(mesh.redirect_of_loose()?[key].as_array().cloned().unwrap_or_default());
    wait::until_true("the kernel to know", || nets("deniedSources").is_ok_and(|nets| nets.len() == 4))?;
    for to in [family.at(loose, PORT), family.at(loose, 15008)] {
        let dialled = outside.netns.connect(to, Duration::from_millis(400));
        ensure!(dialled.as_ref().is_err_and(|e| e.kind() == ErrorKind::TimedOut), "{to} was reached: {dialled:?}");
    }
    ensure!(mesh.call("client", family.at(loose, PORT))?.0 == "loose");
    Client::who(mesh.topology.node("node-b"), family.at(loose, PORT)).context("a probe of the node")?;
    let excepted = nets("exceptedSources")?;
    ensure!(excepted.iter().filter_map(Value::as_str).any(|net| net.starts_with(&format!("{client}/"))), "{excepted:?}");
    let told = mesh.redirect_of_loose()?["packets"]["denied_source"].as_u64();
    ensure!(told.is_some_and(|packets| packets >= 2), "{told:?} packets are told of");
    let labels = [("namespace", "t"), ("pod", "loose"), ("event", "denied_source")];
    ensure!(mesh.b.metrics()?.sum("culvert_redirect_packets_total", &labels) >= 2.0, "no metric");
    drop(guard);
    wait::until_true("the policy to be gone", || Client::who(outside, family.at(loose, PORT)).is_ok())?;
    wait::until_true("nothing to be denied", || nets("deniedSources").is_ok_and(|nets| nets.is_empty()))
}

/// Packets and bytes of a pod are counted by what became of them, by the kernel: also while no agent runs, and the next one tells
/// them all. They are told no longer when the pod is gone.
fn counts_go_on_after_a_kill(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: f64 = 3_000_000.0;
    let count = |agent: &Agent, pod: &str, event: &str| -> anyhow::Result<(f64, f64)> {
        let (page, labels) = (agent.metrics()?, [("namespace", "t"), ("pod", pod), ("event", event)]);
        Ok((page.sum("culvert_redirect_packets_total", &labels), page.sum("culvert_redirect_bytes_total", &labels)))
    };
    let before = count(&mesh.b, "loose", "outbound_owned")?;
    let source = |from: &Place, to: SocketAddr| -> anyhow::Result<()> {
        let mut client = Client::open(from, to, "source 3000000")?;
        client.finish()?;
        ensure!(client.rest()?.bytes == 3_000_000, "of 3000000 bytes of {to}");
        Ok(())
    };
    // What comes in for `loose`, and what it answers; what `web` calls, and what it is answered.
    source(mesh.outside(), mesh.pod("loose").at(PORT))?;
    source(mesh.pod("web"), mesh.outside().at(PORT))?;
    let after = count(&mesh.b, "loose", "outbound_owned")?;
    ensure!(after.1 >= before.1 + SIZE && after.0 > before.0, "{before:?} {after:?}: an answer of {SIZE} bytes");
    for (pod, event, packets, bytes) in [
        ("loose", "inbound_assigned", 1.0, 40.0),
        ("loose", "agent_egress", 1.0, SIZE),
        ("web", "outbound_captured", 1.0, 40.0),
        ("web", "outbound_owned", 1.0, 40.0),
        ("web", "inbound_known", 1.0, SIZE),
    ] {
        let seen = count(&mesh.b, pod, event)?;
        ensure!(seen.0 >= packets && seen.1 >= bytes, "{event} of {pod}: {seen:?} packets and bytes");
    }
    let told = mesh.redirect_of_loose()?["bytes"]["outbound_owned"].as_u64();
    ensure!(told.is_some_and(|bytes| bytes as f64 >= after.1), "{told:?} bytes on the page");

    let (spec, place) = (mesh.b.spec().clone(), Arc::clone(mesh.b.place()));
    mesh.b.signal(Signal::SIGKILL)?;
    mesh.b.wait_end(Duration::from_secs(5))?;
    for (from, to) in [(mesh.outside(), mesh.pod("loose").at(PORT)), (mesh.pod("loose"), mesh.outside().at(PORT))] {
        ensure!(from.netns.connect(to, Duration::from_millis(400)).is_err(), "{to} was reached without an agent");
    }
    mesh.b = spec.start(&place)?;
    mesh.b.wait_ready(Duration::from_secs(20))?;
    let later = count(&mesh.b, "loose", "outbound_owned")?;
    ensure!(later.0 >= after.0 && later.1 >= after.1, "{after:?} before the kill, {later:?} after it");
    for event in ["inbound_no_listener", "outbound_no_listener"] {
        let dropped = count(&mesh.b, "loose", event)?;
        ensure!(dropped.0 >= 1.0 && dropped.1 >= 40.0, "{event}: {dropped:?}");
    }

    mesh.dir.remove("pod-web.yaml");
    wait::until_true("nothing to be told of a pod that is gone", || {
        mesh.b.metrics().is_ok_and(|page| {
            let of_web = |series: &Series| series.labels.get("pod").is_some_and(|pod| pod == "web");
            !page.0.iter().any(|series| series.name.starts_with("culvert_redirect_") && of_web(series))
        })
    })
}

/// While no agent runs a program of the pod listens at every port of the agent's. It gets nothing, neither then nor afterwards, and the
/// next agent serves the pod all the same.
fn a_program_takes_the_agents_ports(mesh: &mut Mesh) -> anyhow::Result<()> {
    const OURS: [u16; 3] = [15001, 15006, 15008];
    let (spec, place) = (mesh.b.spec().clone(), Arc::clone(mesh.b.place()));
    mesh.b.signal(Signal::SIGKILL)?;
    mesh.b.wait_end(Duration::from_secs(5))?;
    let loose = mesh.topology.pod("loose");
    let (taken, _dns) = loose.netns.enter(|| -> std::io::Result<_> {
        let taken = OURS.map(|port| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)));
        let dns = (UdpSocket::bind("127.0.0.1:15053")?, UdpSocket::bind("[::1]:15053")?, TcpListener::bind("[::]:15053")?);
        Ok((taken.into_iter().collect::<Result<Vec<_>, _>>()?, dns))
    })?;
    for listener in &taken {
        listener.set_nonblocking(true)?;
    }
    let untouched = || {
        let accepted = taken.iter().find_map(|listener| listener.accept().ok());
        accepted.map_or(Ok(()), |(_, from)| Err(anyhow::anyhow!("the program was reached from {from}")))
    };
    let ways = [Family::V4, Family::V6].map(|family| OURS.map(|port| family.at(loose, port)));
    for to in ways.as_flattened() {
        ensure!(mesh.outside().netns.connect(*to, Duration::from_millis(300)).is_err(), "{to} was reached without an agent");
    }
    untouched().context("without an agent")?;

    mesh.b = spec.start(&place)?;
    mesh.b.wait_ready(Duration::from_secs(40))?;
    ensure!(mesh.b.whole_log().contains("programs of the pod have ports of the agent's"), "{}", mesh.b.log_tail(10));
    for family in [Family::V4, Family::V6] {
        let mark = mesh.b.mark();
        ensure!(mesh.call("client", family.at(mesh.pod("loose"), PORT))?.0 == "loose");
        mesh.b.wait_access("the call", mark, |r: &Value| {
            r["direction"] == "inbound" && r["src.identity"] == "spiffe://test.local/ns/t/sa/client"
        })?;
        inbound(mesh, family)?;
        mesh.call("loose", family.at(mesh.outside(), PORT))?;
        mesh.call("loose", family.at(mesh.pod("client"), PORT))?;
        let named = ask(mesh.pod("loose"), family.at(mesh.outside(), 53), "web.t.svc.cluster.local", A)?;
        ensure!(named.addresses() == ["10.96.0.20"], "{named:?}");
    }
    // Where the agent listens now it lets nobody in without a certificate, neither from outside nor from the pod, and does not call
    // itself.
    let listening = loose.netns.output(Command::new("ss").args(["-Hltn"]))?;
    let listening = String::from_utf8_lossy(&listening.stdout).into_owned();
    let ports = listening.lines().filter_map(|line| line.split_whitespace().nth(3)?.rsplit_once(':')?.1.parse::<u16>().ok());
    let ports: BTreeSet<u16> = ports.filter(|port| ![PORT, 15053].contains(port)).collect();
    ensure!(ports.len() >= 6, "{listening}");
    for port in ports {
        for (from, to) in [(mesh.outside(), loose.at(port)), (loose, loose.at(port)), (loose, ([127, 0, 0, 1], port).into())] {
            if from.name == loose.name && OURS.contains(&port) {
                // Its own affair.
                continue;
            }
            let answer = Client::open(from, to, "who").and_then(|mut client| client.line());
            // Who ends tunnels says what it thinks of what is no TLS.
            let is_alert = answer.as_ref().is_ok_and(|line| line.starts_with("\u{15}\u{3}"));
            ensure!(answer.is_err() || is_alert, "{} got an answer of {to}: {answer:?}", from.name);
        }
    }
    untouched()?;
    mesh.call("client", mesh.pod("loose").at(PORT))?;
    Ok(())
}

/// The last one: it ends the mesh of nftables.
fn fails_closed_until_cleaned_up(mesh: &Mesh) -> anyhow::Result<()> {
    mesh.a.terminate(Duration::from_secs(30))?;
    mesh.b.terminate(Duration::from_secs(30))?;
    let dial = |from: &Place, to: SocketAddr| from.netns.connect(to, Duration::from_millis(700));
    let (client, loose, outside) = (mesh.pod("client"), mesh.pod("loose"), mesh.outside());
    for family in [Family::V4, Family::V6] {
        ensure!(dial(client, family.at(outside, PORT)).is_err(), "without an agent a pod got out");
        ensure!(dial(outside, family.at(loose, PORT)).is_err(), "without an agent somebody got in");
    }
    for node in ["node-a", "node-b"] {
        let netns = &mesh.topology.node(node).netns;
        let cleaned = netns.spawn(Command::new(find_binary()?).args(["cleanup", "--node", node]))?.wait()?;
        ensure!(cleaned.success(), "cleanup of {node} failed");
    }
    for family in [Family::V4, Family::V6] {
        wait::until_true("out, after cleanup", || dial(client, family.at(outside, PORT)).is_ok())?;
        wait::until_true("in, after cleanup", || dial(outside, family.at(loose, PORT)).is_ok())?;
    }
    Ok(())
}
