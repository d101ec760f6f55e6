//! Ring 4: agents and a waypoint built with aws-lc's module for FIPS 140 (feature `tls-fips`), under Istio's
//! `COMPLIANCE_POLICY=fips-140-2`. Skipped where `cargo xtask e2e` did not build them.
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_program, target_dir};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::web::Web;
use mesh_tests::{hbone, http, netns, skip};
use rustls::NamedGroup;
use rustls::crypto::aws_lc_rs::{ALL_KX_GROUPS, default_provider};
use tempfile::TempDir;

const PORT: u16 = 8080;
const WEB: ([u8; 4], u16) = ([10, 96, 0, 20], 80);
const POLICY: &str = "fips-140-2";
const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp, namespace: t }
spec:
  gatewayClassName: culvert-waypoint
  addresses: [ { type: Hostname, value: wp.t.svc.cluster.local } ]
  listeners: [ { name: mesh, port: 15008, protocol: HBONE } ]
---
apiVersion: v1
kind: Service
metadata: { name: wp, namespace: t }
spec: { selector: { app: wp }, clusterIP: 10.96.0.9, ports: [ { name: mesh, port: 15008 } ] }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec: { selector: { app: web }, clusterIP: 10.96.0.20, ports: [ { name: http, port: 80, targetPort: 8081 } ] }
";

const TESTS: &[Test<Mesh>] = &[
    test("without_the_module_the_policy_is_refused", without_the_module_the_policy_is_refused),
    test("all_is_carried_by_what_is_approved", all_is_carried_by_what_is_approved),
    test("nobody_gets_in_by_anything_else", nobody_gets_in_by_anything_else),
    test("it_speaks_with_agents_of_the_usual_build", it_speaks_with_agents_of_the_usual_build),
    test("without_the_policy_it_is_as_any_other", without_the_policy_it_is_as_any_other),
];

/// Where the programs with the module are.
fn build() -> Result<PathBuf, String> {
    let folder = std::env::var_os("CULVERT_FIPS").map_or_else(|| target_dir().join("fips/debug"), PathBuf::from);
    let is_there = ["ztunnel", "waypoint"].iter().all(|program| folder.join(program).is_file());
    is_there.then_some(folder).ok_or_else(|| "no program is built with the module for FIPS 140 (`cargo xtask e2e` does)".into())
}

fn main() -> ExitCode {
    suite::run("e2e_fips", build().err().or_else(skip::netns_unavailable), set_up, TESTS)
}

/// Dropped in this order.
struct Mesh {
    a: Option<Agent>,
    b: Agent,
    usual: Agent,
    waypoint: Agent,
    _servers: Vec<Server>,
    _web: Web,
    topology: Topology,
    dir: MeshDir,
    ca: TempDir,
    logs: TempDir,
}

fn set_up() -> anyhow::Result<Mesh> {
    for program in ["ztunnel", "waypoint"] {
        find_program(program).map_err(|error| CannotRun(format!("{error:#}")))?;
    }
    let build = build().map_err(CannotRun)?;
    let proxy = ["gateway.networking.k8s.io/gateway-name=wp", "networking.istio.io/tunnel=http", "istio.io/dataplane-mode=none"];
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-1")
        .node("node-c", "zone-1")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-b", "t", "web", "web", &[])
        .pod("node-b", "t", "wp", "wp", &proxy)
        .pod("node-c", "t", "usual", "usual", &[])
        .host("outside")
        .build()?;
    let (dir, ca, logs) = (MeshDir::empty()?, netns::scratch("ca")?, netns::scratch("logs")?);
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    for pod in &topology.plan().pods {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let servers: Vec<Server> = ["client", "web", "usual"]
        .into_iter()
        .map(|pod| Server::start(topology.pod(pod), PORT))
        .collect::<anyhow::Result<_>>()?;
    let web = Web::start(topology.pod("web"), 8081)?;
    let agent = |node: &str| AgentSpec::new(node, dir.path(), ca.path(), logs.path());
    let under = |spec: AgentSpec| spec.built_in(&build).env("COMPLIANCE_POLICY", POLICY);
    let a = under(agent("node-a")).start(topology.node("node-a"))?;
    a.wait_ready(Duration::from_secs(30))?;
    let b = under(agent("node-b")).start(topology.node("node-b"))?;
    let usual = agent("node-c").start(topology.node("node-c"))?;
    let waypoint = AgentSpec::waypoint(("t", "wp"), "wp", "wp", dir.path(), ca.path(), logs.path());
    let waypoint = under(waypoint).start(topology.pod("wp"))?;
    for proxy in [&b, &usual, &waypoint] {
        proxy.wait_ready(Duration::from_secs(30))?;
    }
    Ok(Mesh { a: Some(a), b, usual, waypoint, _servers: servers, _web: web, topology, dir, ca, logs })
}

impl Mesh {
    fn call(&self, from: &str, to: &str) -> anyhow::Result<()> {
        let (mut client, who) = Client::who(self.topology.pod(from), self.topology.pod(to).at(PORT))?;
        client.ping("there?")?;
        ensure!(who.name == to, "{who:?}");
        Ok(())
    }
    /// A handshake with who serves a pod, by one way to exchange keys and no other.
    fn shake(&self, pod: &str, group: NamedGroup) -> anyhow::Result<()> {
        let credentials = TestCa::of_dir(self.ca.path())?.issue("spiffe://cluster.local/ns/t/sa/other")?;
        let mut provider = default_provider();
        provider.kx_groups = ALL_KX_GROUPS.iter().copied().filter(|one| one.name() == group).collect();
        let tls = hbone::client_tls_by(&credentials, provider)?;
        let to = self.topology.pod(pod).at(15008);
        let mut tcp = self.topology.host("outside").netns.connect(to, Duration::from_secs(5))?;
        tcp.set_read_timeout(Some(Duration::from_secs(20)))?;
        let name = rustls::pki_types::ServerName::IpAddress(to.ip().into());
        let mut tls = rustls::ClientConnection::new(Arc::clone(tls.config()), name)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp)?;
        }
        Ok(())
    }
}

/// Both programs as they are usually built.
fn without_the_module_the_policy_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let logs = netns::scratch("refused")?;
    let agent = AgentSpec::new("node-c", mesh.dir.path(), mesh.ca.path(), logs.path());
    let waypoint = AgentSpec::waypoint(("t", "wp"), "wp", "wp", mesh.dir.path(), mesh.ca.path(), logs.path());
    for spec in [agent, waypoint] {
        let program = spec.program;
        let refused = spec.env("COMPLIANCE_POLICY", POLICY).start(mesh.topology.host("outside"))?;
        let status = refused.wait_end(Duration::from_secs(20))?;
        ensure!(!status.success(), "{program} started");
        ensure!(refused.whole_log().contains("--features tls-fips"), "{program} does not say why:\n{}", refused.log_tail(10));
    }
    Ok(())
}

fn all_is_carried_by_what_is_approved(mesh: &mut Mesh) -> anyhow::Result<()> {
    for proxy in [mesh.a.as_ref().context("it runs")?, &mesh.b, &mesh.waypoint] {
        ensure!(proxy.whole_log().contains("its module for FIPS 140"), "{}:\n{}", proxy.node(), proxy.log_tail(20));
    }
    let mark = mesh.b.mark();
    mesh.call("client", "web")?;
    mesh.b.wait_access("the call", mark, |record| {
        record["direction"] == "inbound" && record["src.identity"] == "spiffe://cluster.local/ns/t/sa/client"
    })?;
    let mark = mesh.waypoint.mark();
    let answer = http::get(&mesh.topology.pod("client").netns, WEB.into(), "/through")?;
    ensure!(answer.status == 200, "{answer:?}");
    mesh_tests::wait::until_true("the waypoint tells of it", || mesh.waypoint.log_since(mark).contains("/through"))
}

fn nobody_gets_in_by_anything_else(mesh: &mut Mesh) -> anyhow::Result<()> {
    for pod in ["web", "wp"] {
        for approved in [NamedGroup::secp256r1, NamedGroup::X25519MLKEM768] {
            mesh.shake(pod, approved).with_context(|| format!("{pod}, {approved:?}"))?;
        }
        for other in [NamedGroup::X25519, NamedGroup::secp384r1] {
            ensure!(mesh.shake(pod, other).is_err(), "{pod} takes {other:?}");
        }
    }
    mesh.shake("usual", NamedGroup::X25519).context("the usual build without the policy")
}

fn it_speaks_with_agents_of_the_usual_build(mesh: &mut Mesh) -> anyhow::Result<()> {
    ensure!(!mesh.usual.whole_log().contains("FIPS"), "{}", mesh.usual.log_tail(20));
    mesh.call("usual", "web")?;
    mesh.call("client", "usual")
}

fn without_the_policy_it_is_as_any_other(mesh: &mut Mesh) -> anyhow::Result<()> {
    let old = mesh.a.take().context("it runs")?;
    old.terminate(Duration::from_secs(20))?;
    let spec = AgentSpec::new("node-a", mesh.dir.path(), mesh.ca.path(), mesh.logs.path()).built_in(&build().map_err(CannotRun)?);
    let agent = spec.start(mesh.topology.node("node-a"))?;
    agent.wait_ready(Duration::from_secs(30))?;
    mesh.a = Some(agent);
    mesh.call("client", "web")?;
    mesh.call("usual", "client")?;
    mesh.shake("client", NamedGroup::X25519)
}
