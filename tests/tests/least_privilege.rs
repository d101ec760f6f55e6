//! Ring 3: agents and a waypoint with the rights that the chart names and no others, on a read-only root filesystem: what they
//! carry, what they cannot do, and that none of the rights is named in vain.
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_identity::clock::SystemClock;
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_tests::agent::{Agent, AgentSpec, find_program, workspace_dir};
use mesh_tests::confine::{self, Confinement};
use mesh_tests::kube_api::{KubeApi, documents};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::name_server::{A, ask};
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::web::Web;
use mesh_tests::{chart, http, netns, skip, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const PORT: u16 = 8080;
const HTTP: u16 = 8081;
const WEB: ([u8; 4], u16) = ([10, 96, 0, 20], 80);
const OBJECTS: &str = r"
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
    test("each_has_the_rights_that_are_named_and_no_others", each_has_the_rights_that_are_named_and_no_others),
    test("nothing_but_volumes_can_be_written", nothing_but_volumes_can_be_written),
    test("calls_are_carried", calls_are_carried),
    test("names_are_answered", names_are_answered),
    test("a_pod_is_enrolled_and_left_alone_again", a_pod_is_enrolled_and_left_alone_again),
    test("the_next_agent_takes_over", the_next_agent_takes_over),
    test("no_right_is_named_in_vain", no_right_is_named_in_vain),
    test("the_cni_plugin_is_put_on_the_node_by_the_same_rights", the_cni_plugin_is_put_on_the_node_by_the_same_rights),
];

/// Dropped in this order.
struct Mesh {
    proxies: BTreeMap<&'static str, Agent>,
    _servers: Vec<Server>,
    _web: Web,
    topology: Topology,
    dir: MeshDir,
    /// The development CA's folder.
    ca: PathBuf,
    rights: [Confinement; 2],
    _dirs: [TempDir; 2],
}

fn main() -> ExitCode {
    let missing = ["nft", "setpriv"].into_iter().find_map(skip::command_missing);
    suite::run("least_privilege", skip::netns_unavailable().or(missing), set_up, TESTS)
}

/// What the chart gives: to an agent, to a waypoint.
fn named() -> anyhow::Result<[Confinement; 2]> {
    let folder = workspace_dir().join("manifests/chart");
    let objects = documents(&chart::render(&folder, &folder.join("values-development.yaml"), "culvert-system")?)?;
    let of = |kind: &str, volumes: &[&Path]| {
        let object = objects.iter().find(|o| o["kind"] == kind).with_context(|| format!("the chart has no {kind}"))?;
        let pod = &object["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        ensure!(container["securityContext"]["readOnlyRootFilesystem"] == true, "{kind}");
        anyhow::Ok(Confinement::of_container(container, pod, volumes))
    };
    Ok([of("DaemonSet", &[Path::new("/sys/fs/bpf"), Path::new(netns::RUN_DIR)])?, of("Deployment", &[])?])
}

/// The folder of the development CA as a Secret is mounted: root's, readable for the pod's group.
fn secret(dir: &Path, group: u32) -> anyhow::Result<PathBuf> {
    let ca = dir.join("ca");
    let settings = LocalCaSettings {
        directory: ca.clone(),
        trust_domain: "test.local".into(),
        trust_domain_aliases: Vec::new(),
        lifetime: Duration::from_hours(1),
    };
    LocalCa::open(&settings, Arc::new(SystemClock))?;
    for (file, mode) in [("ca.pem", 0o440), ("root-cert.pem", 0o440), ("", 0o755)] {
        let path = ca.join(file);
        chown(&path, Some(0), Some(group))?;
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
    }
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    Ok(ca)
}

fn set_up() -> anyhow::Result<Mesh> {
    for program in ["ztunnel", "waypoint"] {
        find_program(program).map_err(|error| CannotRun(format!("{error:#}")))?;
    }
    let proxy = ["gateway.networking.k8s.io/gateway-name=wp", "networking.istio.io/tunnel=http", "istio.io/dataplane-mode=none"];
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-1")
        .node("node-c", "zone-1")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "late", "late", &["istio.io/dataplane-mode=none"])
        .pod("node-b", "t", "web", "web", &[])
        .pod("node-b", "t", "wp", "wp", &proxy)
        .pod("node-c", "k", "starting", "starting", &[])
        .host("outside")
        .build()?;
    let (dir, ca, logs) = (MeshDir::empty()?, netns::scratch("ca")?, netns::scratch("logs")?);
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    // The others' are told by an API server.
    for pod in topology.plan().pods.iter().filter(|pod| pod.namespace == "t") {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let rights = named()?;
    let folder = secret(ca.path(), rights[1].user)?;
    let mut servers = Vec::new();
    for pod in ["client", "late", "web"] {
        servers.push(Server::start(topology.pod(pod), PORT)?);
    }
    let web = Web::start(topology.pod("web"), HTTP)?;
    let mut proxies = BTreeMap::new();
    for node in ["node-a", "node-b"] {
        let spec = AgentSpec::new(node, dir.path(), &folder, logs.path()).confined(rights[0].clone());
        proxies.insert(node, spec.env("TRUST_DOMAIN", "test.local").start(topology.node(node))?);
    }
    let spec = AgentSpec::waypoint(("t", "wp"), "wp", "wp", dir.path(), &folder, logs.path()).confined(rights[1].clone());
    proxies.insert("wp", spec.env("TRUST_DOMAIN", "test.local").start(topology.pod("wp"))?);
    for proxy in proxies.values() {
        proxy.wait_ready(Duration::from_secs(30))?;
    }
    Ok(Mesh { proxies, _servers: servers, _web: web, topology, dir, ca: folder, rights, _dirs: [ca, logs] })
}

impl Mesh {
    fn rights(&self, name: &str) -> &Confinement {
        &self.rights[usize::from(name == "wp")]
    }
    /// Pod to pod, both families.
    fn call(&self, from: &str, to: &str) -> anyhow::Result<()> {
        let (from, to) = (self.topology.pod(from), self.topology.pod(to));
        for (at, source) in [(to.at(PORT), from.at(0).ip()), (to.at6(PORT), from.at6(0).ip())] {
            let (mut client, who) = Client::who(from, at)?;
            client.ping("still there?")?;
            ensure!(who.peer.ip() == source, "{at} saw {}", who.peer);
        }
        Ok(())
    }
}

fn each_has_the_rights_that_are_named_and_no_others(mesh: &mut Mesh) -> anyhow::Result<()> {
    for (name, proxy) in &mesh.proxies {
        mesh.rights(name).check(&process(proxy)).with_context(|| (*name).to_owned())?;
    }
    ensure!(mesh.rights("wp").user != 0 && mesh.rights("wp").capabilities.is_empty(), "a waypoint needs no right");
    Ok(())
}

fn process(proxy: &Agent) -> PathBuf {
    PathBuf::from(format!("/proc/{}", proxy.pid()))
}

fn nothing_but_volumes_can_be_written(mesh: &mut Mesh) -> anyhow::Result<()> {
    for (name, proxy) in &mesh.proxies {
        let folders = ["", "etc", "usr/local/bin", "var/lib", "tmp"];
        confine::check_read_only(&process(proxy), &folders).with_context(|| (*name).to_owned())?;
    }
    Ok(())
}

fn calls_are_carried(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.proxies["node-b"].mark();
    mesh.call("client", "web")?;
    mesh.proxies["node-b"].wait_access("the call", mark, |r: &Value| {
        r["direction"] == "inbound" && r["src.identity"] == "spiffe://test.local/ns/t/sa/client"
    })?;
    let mark = mesh.proxies["wp"].mark();
    let answer = http::get(&mesh.topology.pod("client").netns, WEB.into(), "/through")?;
    ensure!(answer.status == 200, "{answer:?}");
    let told = || mesh.proxies["wp"].log_since(mark).contains("/through");
    mesh_tests::wait::until_true("the waypoint tells of it", told)
}

fn names_are_answered(mesh: &mut Mesh) -> anyhow::Result<()> {
    let server = mesh.topology.host("outside").at(53);
    let answer = ask(mesh.topology.pod("client"), server, "web.t.svc.cluster.local", A)?;
    ensure!(answer.addresses() == ["10.96.0.20"], "{answer:?}");
    Ok(())
}

fn a_pod_is_enrolled_and_left_alone_again(mesh: &mut Mesh) -> anyhow::Result<()> {
    let pods = |count: usize| {
        let agent = &mesh.proxies["node-a"];
        let up = || agent.metrics().is_ok_and(|m| m.sum("workload_manager_active_proxy_count", &[]) as usize == count);
        mesh_tests::wait::until_true(&format!("{count} pods are served"), up).with_context(|| agent.log_tail(20))
    };
    let yaml = mesh.topology.pod_yaml("late", &[]);
    mesh.dir.put("pod-late.yaml", &yaml.replace("istio.io/dataplane-mode: \"none\"", "istio.io/dataplane-mode: ambient"))?;
    pods(2)?;
    mesh.call("late", "web")?;
    mesh.call("client", "late")?;
    mesh.dir.put("pod-late.yaml", &yaml)?;
    pods(1)
}

fn the_next_agent_takes_over(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (mut carried, _) = Client::who(mesh.topology.pod("client"), mesh.topology.pod("web").at(PORT))?;
    let old = mesh.proxies.remove("node-a").context("no agent")?;
    let next = old.spec().clone().start(mesh.topology.node("node-a"))?;
    next.wait_ready(Duration::from_secs(30))?;
    mesh_tests::wait::until_true("it took over", || next.whole_log().contains("took over from the agent before this one"))?;
    mesh.call("client", "web")?;
    carried.ping("on the old one")?;
    drop(carried);
    old.terminate(Duration::from_secs(20))?;
    mesh.call("client", "web")?;
    mesh.proxies.insert("node-a", next);
    Ok(())
}

/// `ztunnel check` tries what the agent does; without any one of the rights something cannot be done.
fn no_right_is_named_in_vain(mesh: &mut Mesh) -> anyhow::Result<()> {
    let program = find_program("ztunnel")?;
    let missing = |rights: Option<&Confinement>| -> anyhow::Result<Vec<String>> {
        let mut command = rights.map_or_else(|| Command::new(&program), |rights| rights.command(&program));
        command.args(["check", "--node", "nobody"]).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let enter = || rights.map_or(Ok(()), |rights| rights.enter(&program));
        let out = mesh.topology.host("outside").netns.spawn_after(enter, &mut command)?.wait_with_output()?;
        let text = String::from_utf8(out.stdout)?;
        ensure!(text.contains("pods are redirected by"), "{text}{}", String::from_utf8_lossy(&out.stderr));
        Ok(text.lines().filter(|line| line.starts_with("NO ")).map(str::to_owned).collect())
    };
    let without_limits = missing(None)?;
    let rights = &mesh.rights[0];
    let named = missing(Some(rights))?;
    ensure!(named == without_limits, "with the named rights: {named:#?}, with all: {without_limits:#?}");
    for capability in &rights.capabilities {
        let mut fewer = rights.clone();
        fewer.capabilities.retain(|other| other != capability);
        let found = missing(Some(&fewer))?;
        ensure!(found != named, "nothing is missing without {capability}");
    }
    Ok(())
}

/// The agent of a cluster that holds pods back: two folders of the node may be written beside the rest, and no right is added.
fn the_cni_plugin_is_put_on_the_node_by_the_same_rights(mesh: &mut Mesh) -> anyhow::Result<()> {
    const OURS: &str = "00-culvert.conflist";
    let (node, host) = (mesh.topology.node("node-c"), netns::scratch("host")?);
    let (configurations, plugins) = (host.path().join("net.d"), host.path().join("bin"));
    for folder in [&configurations, &plugins] {
        fs::create_dir(folder)?;
    }
    fs::write(
        configurations.join("10-provider.conflist"),
        r#"{ "cniVersion": "1.0.0", "name": "pods", "plugins": [{ "type": "provider" }] }"#,
    )?;
    let rights = with_cni(&configurations, &plugins)?;
    ensure!(rights.capabilities == mesh.rights[0].capabilities, "{:?}", rights.capabilities);
    let api = KubeApi::serve(node.netns.listen(SocketAddr::from(([127, 0, 0, 1], 6443)))?)?;
    let labels = json!({ "istio.io/dataplane-mode": "ambient" });
    api.apply(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "k", "labels": labels } }));
    api.apply(json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-c" } }));
    api.apply(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "starting", "namespace": "k", "uid": "u1" },
        "spec": { "nodeName": "node-c", "serviceAccountName": "starting" }, "status": { "phase": "Pending" },
    }));
    let mut spec = AgentSpec::new("node-c", &PathBuf::new(), &PathBuf::new(), host.path())
        .env("KUBECONFIG", &api.kubeconfig(host.path())?.to_string_lossy())
        .env("CULVERT_CA_DIR", &mesh.ca.to_string_lossy())
        .env("TRUST_DOMAIN", "test.local")
        .env("CULVERT_CNI_CONF_DIR", &configurations.to_string_lossy())
        .env("CULVERT_CNI_BIN_DIR", &plugins.to_string_lossy());
    spec.folders = None;
    spec.flags.push("--kubernetes".into());
    let agent = spec.confined(rights).start(node)?;
    agent.wait_ready(Duration::from_secs(30))?;
    let chained = || configurations.join(OURS).exists() && plugins.join("culvert-cni").exists();
    wait::until_true("the plugin is chained", chained).with_context(|| agent.log_tail(20))?;
    let out = add(&configurations.join(OURS), &plugins.join("culvert-cni"), &mesh.topology.pod("starting").netns.path())?;
    ensure!(out.status.success(), "{}{}", String::from_utf8_lossy(&out.stdout), agent.log_tail(20));
    // Root without CAP_DAC_OVERRIDE writes where root is the owner, and says so where it is not.
    let mark = agent.mark();
    chown(&configurations, Some(1000), Some(1000))?;
    fs::remove_file(configurations.join(OURS))?;
    wait::until_true("it is told", || agent.log_since(mark).contains("the CNI plugin is not as it should be"))?;
    chown(&configurations, Some(0), Some(0))?;
    wait::until_true("the plugin is chained again", chained)?;
    agent.terminate(Duration::from_secs(20))?;
    Ok(())
}

/// What the chart gives an agent that holds pods back; nothing but these volumes may be written.
fn with_cni(configurations: &Path, plugins: &Path) -> anyhow::Result<Confinement> {
    let folder = workspace_dir().join("manifests/chart");
    let objects = documents(&chart::render_with(&folder, "agent: { cni: { enabled: true } }", "culvert-system")?)?;
    let pod =
        objects.iter().find(|o| o["kind"] == "DaemonSet").map(|o| &o["spec"]["template"]["spec"]).context("no DaemonSet")?;
    let container = &pod["containers"][0];
    let mounts = container["volumeMounts"].as_array().into_iter().flatten();
    let writable: Vec<_> = mounts.filter(|m| m["readOnly"] != true).filter_map(|m| m["mountPath"].as_str()).collect();
    ensure!(writable == ["/sys/fs/bpf", "/run/culvert", "/host/cni/net.d", "/host/cni/bin"], "{writable:?}");
    let volumes = [Path::new("/sys/fs/bpf"), Path::new(netns::RUN_DIR), configurations, plugins];
    Ok(Confinement::of_container(container, pod, &volumes))
}

/// Calls the plugin as a container runtime does for a pod that starts.
fn add(configuration: &Path, plugin: &Path, netns: &Path) -> anyhow::Result<std::process::Output> {
    let list: Value = serde_json::from_str(&fs::read_to_string(configuration)?)?;
    let mut config = list["plugins"].as_array().and_then(|all| all.last()).context("no plugins")?.clone();
    config["cniVersion"] = list["cniVersion"].clone();
    config["prevResult"] = json!({ "cniVersion": "1.0.0", "interfaces": [], "ips": [], "dns": {} });
    let mut call = Command::new(plugin)
        .env_clear()
        .envs([("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")])
        .envs([("CNI_ARGS", "K8S_POD_NAMESPACE=k;K8S_POD_NAME=starting;K8S_POD_UID=u1")])
        .env("CNI_NETNS", netns)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    call.stdin.take().context("a pipe")?.write_all(config.to_string().as_bytes())?;
    Ok(call.wait_with_output()?)
}
