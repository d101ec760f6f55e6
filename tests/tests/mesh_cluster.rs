//! Ring 4: a cluster of two nodes, real from the API server to runc. The image as `cargo xtask image` makes it, the chart as it is, pods
//! that the kubelet starts: captured before their first packet, refused and served as policies say, from the other node, through a
//! waypoint and from outside through a gateway; upgraded under load, uninstalled.
//! Skipped where Kubernetes (`tests/kubernetes/install.sh DIRECTORY node`), containerd and what it needs are not installed.
use std::fs;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{find_program, workspace_dir};
use mesh_tests::confine::{self, Confinement};
use mesh_tests::kube_api::documents;
use mesh_tests::real_kubernetes::{self, ADMIN, KubeServer};
use mesh_tests::real_node::{self, IMAGE, Node};
use mesh_tests::skip::{self, find_peer};
use mesh_tests::suite::{self, Test, test};
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::{chart, netns, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Pods come and go in seconds; a busy machine takes its time.
const PATIENCE: Duration = Duration::from_mins(3);
const ROOT: &str = "istio-system";
const AGENTS: &str = "labelSelector=app%3Dztunnel";
/// Where clients are, and the API server.
const NEAR: &str = "node-a";
/// Where servers are.
const FAR: &str = "node-b";
const VALUES: &str = "
trustDomain: zamaz.cluster.local
logFormat: text
agent: { terminationDeadline: 5s, terminationGracePeriodSeconds: 15, cni: { enabled: true } }
waypoint: { terminationDrainDuration: 5s, terminationGracePeriodSeconds: 15 }
namespaces: [ { name: shop }, { name: zamaz, waypoint: wp } ]
gateways:
- { name: wp, namespace: zamaz, serviceAccount: wp, replicas: 1 }
- { name: door, namespace: shop, serviceAccount: door, replicas: 1, loadBalancer: true, listeners: [ { name: http, port: 80, protocol: HTTP } ] }
";
/// Calls until it is told to stop, a new connection each time, and says how that went.
const LOAD: &str = "n=0 bad=0; until [ -e /flags/end ]; do curl -sSf -m 10 -o /page http://server/ && grep -q hello /page || bad=$((bad+1)); \
                    n=$((n+1)); [ $n -lt 20 ] || touch /ready; done; echo made $n bad $bad";

const TESTS: &[Test<Cluster>] = &[
    test("agents_waypoint_and_gateway_get_ready", agents_waypoint_and_gateway_get_ready),
    test("each_has_the_rights_that_are_named_and_no_others", each_has_the_rights_that_are_named_and_no_others),
    test("a_pod_is_captured_before_its_first_packet", a_pod_is_captured_before_its_first_packet),
    test("a_waypoint_judges_requests", a_waypoint_judges_requests),
    test("a_gateway_lets_the_outside_in", a_gateway_lets_the_outside_in),
    test("an_upgrade_under_load_loses_nothing", an_upgrade_under_load_loses_nothing),
    test("no_pod_starts_without_an_agent", no_pod_starts_without_an_agent),
    test("what_was_uninstalled_is_gone", what_was_uninstalled_is_gone),
];

/// Dropped in this order.
struct Cluster {
    nodes: Vec<Node>,
    api: KubeServer,
    chart: Vec<Value>,
    topology: Topology,
    dir: TempDir,
}

fn main() -> ExitCode {
    let why = skip::netns_unavailable().or_else(real_kubernetes::missing).or_else(real_node::missing);
    suite::run("mesh_cluster", why, set_up, TESTS)
}

fn set_up() -> anyhow::Result<Cluster> {
    let topology = Plan::default().node(NEAR, "zone-1").node(FAR, "zone-2").host("outside").build()?;
    let dir = netns::scratch("cluster")?;
    let mut api = KubeServer::start(topology.node(NEAR), dir.path(), &[])?;
    api.control()?;
    api.kubeconfig(ADMIN)?;
    real_node::images(dir.path())?;
    let nodes =
        [NEAR, FAR].map(|name| Node::start(&topology, name, dir.path())).into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    nodes.iter().try_for_each(Node::wait)?;
    let peers = find_peer("kube-apiserver").map_err(anyhow::Error::msg)?;
    let folder = workspace_dir().join("manifests/chart");
    for crds in [peers.with_file_name("gateway-api"), peers.with_file_name("istio-api"), folder.join("crds")] {
        for file in fs::read_dir(&crds).with_context(|| crds.display().to_string())? {
            for object in documents(&fs::read_to_string(file?.path())?)? {
                api.apply(&object, false)?;
            }
        }
    }
    let chart = documents(&chart::render_with(&folder, VALUES, ROOT)?)?;
    let cluster = Cluster { nodes, api, chart, topology, dir };
    cluster.install()?;
    Ok(cluster)
}

fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })
}

/// A pod that runs a script of busybox's shell on a node.
fn pod(node: &str, namespace: &str, name: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": namespace, "labels": { "app": name } },
        "spec": {
            "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "nodeSelector": { "kubernetes.io/hostname": node },
            "containers": [{ "name": "main", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/sh", "-c", script] }],
        },
    })
}

impl Cluster {
    /// As the manual says: the authority's Secrets, then the chart, its namespaces first.
    fn install(&self) -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let mut first = Command::new(find_program("waypoint")?);
        first.current_dir(folder.path()).args([
            "proxy",
            "--mesh-dir",
            ".",
            "--ca-dir",
            "ca",
            "--trust-domain",
            "zamaz.cluster.local",
        ]);
        let _ends_for_want_of_a_gateway = first.output()?;
        let file = |name: &str| fs::read_to_string(folder.path().join("ca").join(name)).with_context(|| name.to_owned());
        let data = json!({ "ca.pem": file("ca.pem")?, "root-cert.pem": file("root-cert.pem")? });
        self.api.apply(&namespace(ROOT), false)?;
        for object in &self.chart {
            self.api.apply(object, false)?;
            if object["kind"] == "Namespace" {
                self.secret(object["metadata"]["name"].as_str().unwrap_or_default(), &data)?;
            }
        }
        self.secret(ROOT, &data)
    }

    fn secret(&self, namespace: &str, data: &Value) -> anyhow::Result<()> {
        let metadata = json!({ "name": "culvert-ca", "namespace": namespace });
        self.api
            .apply(&json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data }), false)
            .map(drop)
    }

    fn find(&self, kind: &str, name: &str) -> anyhow::Result<&Value> {
        let is_it = |object: &&Value| object["kind"] == kind && object["metadata"]["name"] == name;
        self.chart.iter().find(is_it).with_context(|| format!("no {kind} {name}"))
    }

    fn agent(&self) -> anyhow::Result<&Value> {
        self.find("DaemonSet", "culvert-agent")
    }

    /// One agent on each node, and no more.
    fn agents_are(&self, count: usize) -> anyhow::Result<()> {
        let so_many = || self.api.pods(ROOT, AGENTS).is_ok_and(|agents| agents.len() == count).then_some(());
        wait::until(&format!("there are {count} agents"), PATIENCE, so_many)
    }

    fn kubelets_say(&self) -> String {
        self.nodes.iter().map(|node| format!("{}: {}", node.name, node.log("kubelet"))).collect::<Vec<_>>().join("\n---\n")
    }

    /// Waits for something of an object, and tells how it is if that does not come.
    fn wait(&self, object: &Value, what: &str, holds: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
        let found = wait::until(what, PATIENCE, || self.api.get(object).is_ok_and(|now| holds(&now)).then_some(()));
        found.with_context(|| {
            let now = self.api.get(object).unwrap_or_default();
            format!("{what}: {}\nkubelets: {}\nagents: {}", now["status"], self.kubelets_say(), self.agents_say())
        })
    }

    fn agents_say(&self) -> String {
        let agents = self.api.pods(ROOT, AGENTS).unwrap_or_default();
        let told = agents.iter().filter_map(|agent| {
            let log = self.api.output(ROOT, agent["metadata"]["name"].as_str()?).unwrap_or_default();
            Some(format!("{}\n{}", agent["status"]["phase"], log.lines().rev().take(15).collect::<Vec<_>>().join("\n")))
        });
        told.collect::<Vec<_>>().join("\n---\n")
    }

    /// A server behind a Service, which the kubelet finds ready by its probe.
    fn serve(&self, namespace: &str) -> anyhow::Result<()> {
        let mut server = pod(FAR, namespace, "server", "echo hello > /index.html; exec httpd -f -p 8080 -h /");
        server["spec"]["containers"][0]["readinessProbe"] =
            json!({ "httpGet": { "path": "/", "port": 8080 }, "periodSeconds": 1 });
        self.api.apply(&server, false)?;
        let spec = json!({ "selector": { "app": "server" }, "ports": [{ "port": 80, "targetPort": 8080 }] });
        let metadata = json!({ "name": "server", "namespace": namespace });
        self.api.apply(&json!({ "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec }), false)?;
        self.wait(&server, "the server is ready", is_ready)
    }

    /// Runs a script in a pod of its own: whether it succeeded, and what it wrote.
    fn run(&self, namespace: &str, name: &str, script: &str) -> anyhow::Result<(bool, String)> {
        let object = pod(NEAR, namespace, name, script);
        self.api.apply(&object, false)?;
        self.ended(&object)
    }

    fn ended(&self, object: &Value) -> anyhow::Result<(bool, String)> {
        let phase = |now: &Value| now["status"]["phase"].as_str().unwrap_or_default().to_owned();
        self.wait(object, "a pod ends", |now| ["Succeeded", "Failed"].contains(&phase(now).as_str()))?;
        let (name, namespace) = (object["metadata"]["name"].as_str(), object["metadata"]["namespace"].as_str());
        let said = self.api.output(namespace.unwrap_or_default(), name.unwrap_or_default())?;
        let well = phase(&self.api.get(object)?) == "Succeeded";
        self.api.delete(object)?;
        wait::until("a pod is gone", PATIENCE, || self.api.get(object).is_err().then_some(()))?;
        Ok((well, said))
    }

    fn strict(&self, mode: &str) -> anyhow::Result<()> {
        let metadata = json!({ "name": "default", "namespace": ROOT });
        let policy = json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata, "spec": { "mtls": { "mode": mode } },
        });
        self.api.apply(&policy, false).map(drop)
    }

    /// `kubectl rollout restart`, to its end.
    fn restart(&self, object: &Value) -> anyhow::Result<()> {
        let mut object = object.clone();
        object["spec"]["template"]["metadata"]["annotations"]["restarted"] = json!("once");
        self.api.apply(&object, false)?;
        self.wait(&object, "the rollout ends", |now| {
            let status = &now["status"];
            let (updated, available, all) = match &object["kind"] {
                kind if kind == "DaemonSet" => ("updatedNumberScheduled", "numberAvailable", "desiredNumberScheduled"),
                _ => ("updatedReplicas", "availableReplicas", "replicas"),
            };
            let done = status[updated] == status[all] && status[available] == status[all];
            status["observedGeneration"] == now["metadata"]["generation"] && done
        })
    }

    /// A request from beyond the cluster, by the port that kube-proxy opens for the gateway on its node: status and body.
    fn call_from_outside(&self, host: &str, path: &str) -> anyhow::Result<(u16, String)> {
        let service = self.api.get(self.find("Service", "door")?)?;
        let port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no port")?;
        let door = self.door()?;
        let node = door["status"]["hostIP"].as_str().context("no address")?;
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--noproxy", "*", "-m", "10", "-w", "\n%{http_code}", "-H", &format!("host: {host}")]);
        let out = self.topology.host("outside").netns.output(curl.arg(format!("http://{node}:{port}{path}")))?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout)?;
        let (body, status) = text.rsplit_once('\n').context("no status")?;
        Ok((status.parse()?, body.to_owned()))
    }

    fn door(&self) -> anyhow::Result<Value> {
        let pods = self.api.pods("shop", "labelSelector=gateway.networking.k8s.io%2Fgateway-name%3Ddoor")?;
        pods.into_iter().find(is_ready).context("the gateway is not ready")
    }
}

fn is_ready(pod: &Value) -> bool {
    pod["status"]["conditions"].as_array().into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

fn agents_waypoint_and_gateway_get_ready(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.wait(cluster.agent()?, "the agents are ready", |now| now["status"]["numberReady"] == 2)?;
    for name in ["wp", "door"] {
        cluster.wait(cluster.find("Deployment", name)?, name, |now| now["status"]["readyReplicas"] == 1)?;
    }
    Ok(())
}

/// As containerd gives them, and on a root filesystem that is read-only.
fn each_has_the_rights_that_are_named_and_no_others(cluster: &mut Cluster) -> anyhow::Result<()> {
    for (object, program, count) in [(cluster.agent()?, "ztunnel", 2), (cluster.find("Deployment", "wp")?, "waypoint", 2)] {
        let pod = &object["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        ensure!(container["securityContext"]["readOnlyRootFilesystem"] == true, "{program}");
        let rights = Confinement::of_container(container, pod, &[]);
        let processes: Vec<_> = cluster.nodes.iter().flat_map(|node| node.processes(program)).collect();
        ensure!(processes.len() == count, "{program}: {processes:?}");
        for process in processes {
            rights.check(&process).with_context(|| program.to_owned())?;
            confine::check_read_only(&process, &["", "etc", "usr/local/bin", "var/lib/culvert"])
                .with_context(|| program.to_owned())?;
            let status = fs::read_to_string(process.join("status"))?;
            ensure!(status.lines().any(|line| line == "Seccomp:\t2"), "{program} is not filtered: {status}");
        }
    }
    Ok(())
}

fn a_pod_is_captured_before_its_first_packet(cluster: &mut Cluster) -> anyhow::Result<()> {
    let call = "curl -sSf -m 10 http://server.shop.svc.cluster.local/";
    let by_address = |api: &KubeServer| -> anyhow::Result<String> {
        let now = api.get(&pod(FAR, "shop", "server", ""))?;
        Ok(format!("curl -sSf -m 10 http://{}:8080/", now["status"]["podIP"].as_str().context("no address")?))
    };
    cluster.serve("shop")?;
    // Outside of the mesh, while plaintext is welcome: it is not the network that refuses it afterwards.
    let plain = by_address(&cluster.api)?;
    let (well, said) = cluster.run("default", "stranger", &plain)?;
    ensure!(well && said.contains("hello"), "{said}");
    cluster.strict("STRICT")?;
    wait::until("a stranger is refused", PATIENCE, || {
        cluster.run("default", "stranger", &plain).is_ok_and(|(well, _)| !well).then_some(())
    })?;
    // The first thing that this pod does.
    let (well, said) = cluster.run("shop", "client", call)?;
    ensure!(well && said.contains("hello"), "{said}\n{}", cluster.agents_say());
    // The kubelet's probe goes on.
    cluster.wait(&pod(FAR, "shop", "server", ""), "the server is ready under STRICT", is_ready)
}

fn a_waypoint_judges_requests(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.serve("zamaz")?;
    let rule = json!({ "to": [{ "operation": { "paths": ["/etc/*"] } }] });
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": "files", "namespace": "zamaz" },
        "spec": { "targetRefs": [{ "kind": "Service", "group": "", "name": "server" }], "action": "DENY", "rules": [rule] },
    });
    cluster.api.apply(&policy, false)?;
    let script = "curl -sSf -m 10 http://server/ && curl -sS -m 10 -o /page -w %{http_code} http://server/etc/hosts";
    let (well, said) = cluster.run("zamaz", "client", script)?;
    ensure!(well && said.contains("hello") && said.contains("403"), "{said}\n{}", cluster.agents_say());
    Ok(())
}

/// By the route to a pod of the other node or its own, in a tunnel: it takes no plaintext.
fn a_gateway_lets_the_outside_in(cluster: &mut Cluster) -> anyhow::Result<()> {
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": { "name": "server", "namespace": "shop" },
        "spec": {
            "parentRefs": [{ "name": "door" }], "hostnames": ["shop.example"],
            "rules": [{ "backendRefs": [{ "name": "server", "port": 80 }] }],
        },
    });
    let rule = json!({ "to": [{ "operation": { "paths": ["/etc/*"] } }] });
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": "door", "namespace": "shop" },
        "spec": {
            "targetRefs": [{ "kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "door" }],
            "action": "DENY", "rules": [rule],
        },
    });
    for object in [&route, &policy] {
        cluster.api.apply(object, false)?;
    }
    let open =
        || cluster.call_from_outside("shop.example", "/").is_ok_and(|(status, body)| status == 200 && body.contains("hello"));
    let told = || format!("{:?}\n{}", cluster.call_from_outside("shop.example", "/"), cluster.agents_say());
    wait::until("a call from outside is answered", PATIENCE, || open().then_some(())).with_context(told)?;
    let refused = || cluster.call_from_outside("shop.example", "/etc/hosts").is_ok_and(|(status, _)| status == 403);
    wait::until("a policy refuses what it names", PATIENCE, || refused().then_some(())).with_context(told)?;
    let (status, _) = cluster.call_from_outside("other.example", "/")?;
    ensure!(status == 404, "a host without a route: {status}");
    // What the gateway tells of it has the client's own address.
    let door = cluster.door()?;
    let said = cluster.api.output("shop", door["metadata"]["name"].as_str().unwrap_or_default())?;
    let client = cluster.topology.host("outside").v4.to_string();
    let is_told = |line: &str| line.contains("GET /etc/hosts") && line.contains(" 403 ") && line.contains(&client);
    ensure!(said.lines().any(is_told), "{said}");
    Ok(())
}

fn an_upgrade_under_load_loses_nothing(cluster: &mut Cluster) -> anyhow::Result<()> {
    let flags = cluster.dir.path().join("flags");
    fs::create_dir(&flags)?;
    let mut clients = Vec::new();
    // From the other node, and from the server's own.
    for (node, namespace) in [(NEAR, "shop"), (FAR, "zamaz")] {
        let mut client = pod(node, namespace, "load", LOAD);
        let spec = &mut client["spec"];
        spec["volumes"] = json!([{ "name": "flags", "hostPath": { "path": flags } }]);
        spec["containers"][0]["volumeMounts"] = json!([{ "name": "flags", "mountPath": "/flags" }]);
        spec["containers"][0]["readinessProbe"] = json!({ "exec": { "command": ["/bin/cat", "/ready"] }, "periodSeconds": 1 });
        cluster.api.apply(&client, false)?;
        cluster.wait(&client, "calls are made", is_ready)?;
        clients.push(client);
    }
    cluster.restart(cluster.agent()?)?;
    // Those before are gone.
    cluster.agents_are(2)?;
    cluster.restart(cluster.find("Deployment", "wp")?)?;
    for client in &clients {
        ensure!(is_ready(&cluster.api.get(client)?), "it does not call any more");
    }
    fs::write(flags.join("end"), "")?;
    for client in &clients {
        let (well, said) = cluster.ended(client)?;
        ensure!(well && said.contains("made ") && said.contains(" bad 0"), "{}: {said}", client["metadata"]["namespace"]);
    }
    Ok(())
}

fn no_pod_starts_without_an_agent(cluster: &mut Cluster) -> anyhow::Result<()> {
    let mut none = cluster.agent()?.clone();
    none["spec"]["template"]["spec"]["nodeSelector"]["there-is"] = json!("none");
    cluster.api.apply(&none, false)?;
    cluster.agents_are(0)?;
    let late = pod(NEAR, "shop", "late", "curl -sSf -m 10 http://server/");
    cluster.api.apply(&late, false)?;
    let refused = || cluster.kubelets_say().contains("no mesh agent answers").then_some(());
    wait::until("the kubelet tries in vain", PATIENCE, refused).with_context(|| cluster.kubelets_say())?;
    let now = cluster.api.get(&late)?;
    ensure!(now["status"]["phase"] == "Pending", "{}", now["status"]);
    cluster.api.apply(cluster.agent()?, false)?;
    let (well, said) = cluster.ended(&late)?;
    ensure!(well && said.contains("hello"), "{said}");
    Ok(())
}

fn what_was_uninstalled_is_gone(cluster: &mut Cluster) -> anyhow::Result<()> {
    for object in cluster.chart.iter().filter(|object| object["kind"] != "Namespace") {
        cluster.api.delete(object)?;
    }
    cluster.agents_are(0)?;
    for node in &cluster.nodes {
        ensure!(
            !node.path("opt/cni/bin/culvert-cni").exists() && !node.path("etc/cni/net.d/00-culvert.conflist").exists(),
            "the agent left the plugin, without which no pod starts: {}",
            node.log("kubelet")
        );
        let mut cleanup = node.command(&find_program("ztunnel")?);
        let out = cleanup.args(["cleanup", "--node", &node.name]).output()?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let pins = fs::read_dir(node.path(&format!("sys/fs/bpf/culvert/{}", node.name))).map_or(0, Iterator::count);
        ensure!(pins == 0, "{pins} pins are left on {}", node.name);
    }
    // Pods start, and those from before are as any other: in plaintext, by their addresses.
    let server = cluster.api.get(&pod(FAR, "shop", "server", ""))?;
    let call = format!("curl -sSf -m 10 http://{}:8080/", server["status"]["podIP"].as_str().context("no address")?);
    let (well, said) = cluster.run("shop", "afterwards", &call)?;
    ensure!(well && said.contains("hello"), "{said}");
    Ok(())
}
