//! What the whole of `istioctl` says: `proxy-status` of the streams we have with a real istiod, `proxy-config` of what a waypoint
//! tells of itself.
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_runtime::metrics::Registry;
use mesh_sources::istiod::node::{self, Role};
use mesh_sources::istiod::{self, MissingPolicy};
use mesh_sources::{Origin, Viewpoint};
use mesh_tests::agent::{AgentSpec, find_program};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::real_istiod::{IstiodFed, istioctl};
use mesh_tests::suite::CannotRun;
use mesh_tests::topology::Plan;
use mesh_tests::web::Web;
use mesh_tests::{http, netns, skip};

use crate::conversion::control_plane;

/// How long a stream may take to be in step.
const SETTLES: Duration = Duration::from_secs(20);

/// Whether a table has a row with these words one after the other.
fn has_row(table: &str, words: &[&str]) -> bool {
    let is = |line: &str| line.split_whitespace().collect::<Vec<_>>().windows(words.len()).any(|some| some == words);
    table.lines().any(is)
}

/// An agent's stream, and a waypoint's.
pub fn status() -> anyhow::Result<()> {
    skip::find_peer("istioctl").map_err(CannotRun)?;
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("mesh.yaml"), "apiVersion: v1\nkind: Namespace\nmetadata: { name: shop }\n")?;
    let log = tempfile::NamedTempFile::new()?.into_temp_path().keep()?;
    let fed = IstiodFed::start(folder.path(), "127.0.0.1:0", None, log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let streams = [(Role::Ztunnel, "ztunnel-x", "istio-system"), (Role::Waypoint, "waypoint-y", "shop")];
    let mut meshes = Vec::new();
    for (role, pod, namespace) in streams {
        let env = [("POD_NAME", pod), ("POD_NAMESPACE", namespace), ("INSTANCE_IP", "10.0.0.7")];
        let env = env.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let settings = istiod::Settings {
            control_plane: control_plane(fed.addr)?,
            node: node::of_environment(role, "node-1", "Kubernetes", env),
            missing_policy: MissingPolicy::Deny,
            demand: None,
            metrics: istiod::Metrics::new(&Registry::new())?,
        };
        let _in_it = runtime.enter();
        meshes.push(mesh_sources::start(Origin::Istiod(Box::new(settings)), Viewpoint::default()).0);
    }
    let both = async { futures_util::future::join_all(meshes.iter().map(mesh_sources::Mesh::synced)).await };
    runtime.block_on(async { tokio::time::timeout(SETTLES, both).await }).context("both are in step")?;

    let (at, begun) = (fed.addr.to_string(), Instant::now());
    loop {
        let table =
            istioctl(&["proxy-status", "--revision", "default", "--xds-address", &at, "--plaintext", "--verbosity", "1"])?;
        let is_in_step = |(_, pod, namespace): &(Role, &str, &str)| {
            let name = format!("{pod}.{namespace}");
            let row = table.lines().find(|line| line.split_whitespace().next() == Some(&name));
            row.is_some_and(|row| has_row(row, &[&name, "Kubernetes"]) && row.matches("SYNCED (").count() == 2)
        };
        if streams.iter().all(is_in_step) {
            break;
        }
        ensure!(begun.elapsed() < SETTLES, "not both are there and in step:\n{table}\nistiod's log:\n{}", fed.log());
        std::thread::sleep(Duration::from_millis(500));
    }
    let table = istioctl(&["proxy-status", "--revision", "default", "--xds-address", &at, "--plaintext"])?;
    for (_, pod, namespace) in streams {
        ensure!(has_row(&table, &[&format!("{pod}.{namespace}"), "Kubernetes"]), "{table}");
        ensure!(table.lines().any(|line| line.starts_with(pod) && line.contains("2 (")), "two types each: {table}");
    }
    Ok(())
}

const MESH: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Service
metadata: { name: api, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec: { clusterIP: 10.96.0.31, selector: { app: api }, ports: [ { name: http, port: 80, targetPort: 8080 } ] }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: api, namespace: t }
spec:
  hosts: [ api ]
  http:
  - match: [ { uri: { prefix: /v1 } } ]
    route: [ { destination: { host: api, subset: v1 } } ]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: api, namespace: t }
spec: { host: api, subsets: [ { name: v1, labels: { version: v1 } } ] }
";

/// A waypoint with a route to a subset, as each of the commands shows it.
pub fn config() -> anyhow::Result<()> {
    skip::find_peer("istioctl").map_err(CannotRun)?;
    if let Some(why) = skip::netns_unavailable() {
        return Err(CannotRun(why).into());
    }
    for program in ["ztunnel", "waypoint"] {
        find_program(program).map_err(|error| CannotRun(format!("{error:#}")))?;
    }
    let topology = Plan::default()
        .node("node-1", "zone-1")
        .pod("node-1", "t", "wp", "wp", &["gateway.networking.k8s.io/gateway-name=wp", "istio.io/dataplane-mode=none"])
        .pod("node-1", "t", "api", "api", &["app=api", "version=v1"])
        .pod("node-1", "t", "client", "client", &[])
        .build()?;
    let files = netns::scratch("proxy-config")?;
    let dir = MeshDir::empty()?;
    let mut mesh = MESH.to_owned();
    let _ = write!(
        mesh,
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{ name: wp, namespace: t }}\nspec:\n  \
         gatewayClassName: istio-waypoint\n  listeners: [ {{ name: mesh, port: 15008, protocol: HBONE }} ]\n\
         status: {{ addresses: [ {{ type: IPAddress, value: {} }} ] }}\n",
        topology.pod("wp").v4
    );
    dir.put("mesh.yaml", &mesh)?;
    for pod in ["wp", "api", "client"] {
        dir.put(&format!("pod-{pod}.yaml"), &topology.pod_yaml(pod, &[]))?;
    }
    let _web = Web::start(topology.pod("api"), 8080)?;
    let ca = files.path().join("ca");
    let agent = AgentSpec::new("node-1", dir.path(), &ca, files.path()).start(topology.node("node-1"))?;
    let waypoint = AgentSpec::waypoint(("t", "wp"), "wp", "wp", dir.path(), &ca, files.path()).start(topology.pod("wp"))?;
    waypoint.wait_ready(Duration::from_secs(30)).with_context(|| waypoint.log_tail(20))?;
    agent.wait_ready(Duration::from_secs(30)).with_context(|| agent.log_tail(20))?;
    // Endpoints are made when they are first called.
    let answer = http::get(&topology.pod("client").netns, ([10, 96, 0, 31], 80).into(), "/v1/orders")?;
    ensure!(answer.status == 200, "{answer:?}");

    let page = |name: &str, path: &str| -> anyhow::Result<String> {
        let file = files.path().join(name);
        std::fs::write(&file, waypoint.admin(path)?.body)?;
        Ok(Path::new(&file).to_string_lossy().into_owned())
    };
    let dump = page("dump.json", "/config_dump?include_eds")?;
    let clusters = page("clusters.json", "/clusters?format=json")?;
    let host = "api.t.svc.cluster.local";
    let (endpoint, cluster) = (format!("{}:8080", topology.pod("api").v4), format!("outbound|80|v1|{host}"));
    for (command, file, row) in [
        ("cluster", &dump, &[host, "80", "v1", "outbound"][..]),
        ("listener", &dump, &["15008"]),
        ("route", &dump, &["/v1*"]),
        ("endpoint", &clusters, &[&endpoint, "HEALTHY", "OK", &cluster]),
        ("eds", &dump, &[&endpoint]),
        ("secret", &dump, &["default", "Cert", "Chain", "ACTIVE", "true"]),
        ("secret", &dump, &["ROOTCA", "CA", "ACTIVE", "true"]),
        ("bootstrap", &dump, &["\"cluster\":", "\"wp.t\","]),
        ("all", &dump, &["secret/default", "Cert", "Chain", "ACTIVE", "true"]),
        ("all", &dump, &[host, "80", "v1", "outbound"]),
    ] {
        let table = istioctl(&["proxy-config", command, "--file", file])?;
        ensure!(has_row(&table, row), "{command}: {row:?} is not in\n{table}");
    }
    Ok(())
}
