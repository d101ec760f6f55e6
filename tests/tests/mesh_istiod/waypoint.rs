//! A waypoint started with the arguments, environment, files and user istiod's template gives it: half of its mesh from the
//! control plane, the other half from the API server, its certificate from istiod.
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use mesh_proto::ADDRESS_TYPE;
use mesh_proto::istio::workload::{
    AppProtocol, GatewayAddress, NamespacedHostname, NetworkAddress, Port, PortList, Service, Workload, gateway_address,
};
use mesh_tests::agent::{Agent, AgentSpec};
use mesh_tests::confine::{Confinement, check_read_only};
use mesh_tests::container::{Container, Mount};
use mesh_tests::http::{self, Answer};
use mesh_tests::istiod::Istiod;
use mesh_tests::kube_api::KubeApi;
use mesh_tests::topology::Topology;
use mesh_tests::wait;
use mesh_tests::web::Web;

use crate::{CONTROL, PORT, World, stock, workload};

/// Service behind the waypoint, and the waypoint.
const API: ([u8; 4], u16) = ([10, 96, 0, 31], 80);
const WAYPOINT_VIP: [u8; 4] = [10, 96, 0, 30];
const HBONE: u16 = 15008;
/// Istio's user.
const USER: u32 = 1337;
pub(crate) const TOKEN: &str = "of the waypoint";
const WHO: &str = "spiffe://cluster.local/ns/t/sa/wp";

/// What only objects say. Subsets are chosen by labels of pods, which istiod does not tell.
const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: { name: t }
---
apiVersion: v1
kind: Service
metadata: { name: api, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec: { clusterIP: 10.96.0.31, selector: { app: api }, ports: [ { name: http, port: 80, targetPort: 8080 } ] }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp, namespace: t }
spec: { gatewayClassName: istio-waypoint, listeners: [ { name: mesh, port: 15008, protocol: HBONE } ] }
status: { addresses: [ { type: Hostname, value: wp.t.svc.cluster.local } ] }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: api, namespace: t }
spec:
  hosts: [ api ]
  http:
  - match: [ { uri: { prefix: /v2 } } ]
    route: [ { destination: { host: api, subset: v2 } } ]
  - route: [ { destination: { host: api, subset: v1 } } ]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: api, namespace: t }
spec:
  host: api
  subsets: [ { name: v1, labels: { version: v1 } }, { name: v2, labels: { version: v2 } } ]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-posts, namespace: t }
spec:
  targetRefs: [ { group: '', kind: Service, name: api } ]
  action: DENY
  rules: [ { to: [ { operation: { methods: [ POST ] } } ] } ]
";

/// The waypoint and what it needs. Dropped in this order.
pub(crate) struct Side {
    waypoint: Option<Agent>,
    _web: Vec<Web>,
    api: KubeApi,
}

fn ports(service_port: u32, target_port: u32) -> Port {
    Port { service_port, target_port, app_protocol: AppProtocol::Http11 as i32 }
}

fn service(name: &str, vip: [u8; 4], port: Port) -> Service {
    Service {
        name: name.into(),
        namespace: "t".into(),
        hostname: format!("{name}.t.svc.cluster.local"),
        addresses: vec![NetworkAddress { network: String::new(), address: Bytes::copy_from_slice(&vip), length: None }],
        ports: vec![port],
        canonical: true,
        ..Service::default()
    }
}

fn backend(topology: &Topology, pod: &str) -> Workload {
    let list = PortList { ports: vec![ports(80, PORT.into())] };
    Workload { services: [("t/api.t.svc.cluster.local".to_owned(), list)].into(), ..workload(topology.pod(pod), "node-b") }
}

/// What istiod tells of the waypoint and what is behind it.
pub(crate) fn tell(istiod: &Istiod, topology: &Topology) {
    let at = NamespacedHostname { namespace: "t".into(), hostname: "wp.t.svc.cluster.local".into() };
    let waypoint =
        GatewayAddress { destination: Some(gateway_address::Destination::Hostname(at)), hbone_mtls_port: HBONE.into() };
    istiod.service(service("wp", WAYPOINT_VIP, ports(HBONE.into(), HBONE.into())));
    istiod.service(Service { waypoint: Some(waypoint), ..service("api", API.0, ports(80, PORT.into())) });
    let list = PortList { ports: vec![ports(HBONE.into(), HBONE.into())] };
    istiod.workload(Workload {
        services: [("t/wp.t.svc.cluster.local".to_owned(), list)].into(),
        native_tunnel: true,
        ..workload(topology.pod("wp"), "node-a")
    });
    for pod in ["v1", "v2"] {
        istiod.workload(backend(topology, pod));
    }
}

impl Side {
    pub(crate) fn agent(&self) -> Option<&Agent> {
        self.waypoint.as_ref()
    }
    pub(crate) fn start(world: &World) -> anyhow::Result<Self> {
        let control = world.topology.host("control");
        let api = KubeApi::serve(control.netns.listen(control.at(6443))?)?;
        api.apply_yaml(OBJECTS)?;
        for pod in ["wp", "v1", "v2"] {
            api.apply_yaml(&world.topology.pod_yaml(pod, &[]))?;
        }
        let web = ["v1", "v2"].map(|pod| Web::start(world.topology.pod(pod), PORT));
        let web = web.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        fill(world)?;
        let waypoint = deployed(world, &api)?;
        waypoint.wait_ready(Duration::from_secs(40))?;
        Ok(Self { waypoint: Some(waypoint), _web: web, api })
    }
}

/// The volumes of the pod.
pub(crate) fn root(world: &World) -> PathBuf {
    world.files.path().join("waypoint")
}

/// What Kubernetes puts into the volumes of a pod of a waypoint.
fn fill(world: &World) -> anyhow::Result<()> {
    let root = root(world);
    let put = |name: &str, text: &str| -> anyhow::Result<()> {
        let path = root.join(name);
        fs::create_dir_all(path.parent().context("a directory")?)?;
        fs::write(path, text).with_context(|| name.to_owned())
    };
    put("istiod-ca-cert/root-cert.pem", world.istiod.root())?;
    put("istio-token/istio-token", TOKEN)?;
    put("crl/crl.pem", &world.istiod.revoked(&[])?)?;
    put("istio-podinfo/labels", "app=\"x\"\ngateway.networking.k8s.io/gateway-name=\"wp\"\n")?;
    for empty in ["istiod-ca-cert/crl", "workload-socket", "istio-data", "istio-envoy", "api"] {
        fs::create_dir_all(root.join(empty))?;
    }
    Ok(())
}

/// The volumes of the template, the list of what was taken back, and where the API server is.
fn container(world: &World) -> Container {
    let volume = |name: &str, at, read_only| Mount { from: root(world).join(name), at, read_only };
    Container {
        rights: Confinement { capabilities: Vec::new(), user: USER, group: USER, volumes: Vec::new() },
        mounts: vec![
            volume("workload-socket", "/var/run/secrets/workload-spiffe-uds", false),
            volume("istiod-ca-cert", "/var/run/secrets/istio", true),
            volume("crl", "/var/run/secrets/istio/crl", true),
            volume("istio-data", "/var/lib/istio/data", false),
            volume("istio-envoy", "/etc/istio/proxy", false),
            volume("istio-token", "/var/run/secrets/tokens", true),
            volume("istio-podinfo", "/etc/istio/pod", true),
            volume("api", "/var/run/secrets/api", true),
        ],
        hosts: stock::hosts(world),
    }
}

/// The container of istiod's template (files/waypoint.yaml), as the kubelet would start it; but there is no API server at the place a
/// pod would find it.
fn deployed(world: &World, api: &KubeApi) -> anyhow::Result<Agent> {
    let arguments = [
        "waypoint",
        "--domain",
        "t.svc.cluster.local",
        "--serviceCluster",
        "wp.t",
        "--proxyLogLevel",
        "warning",
        "--proxyComponentLogLevel",
        "misc:error",
        "--log_output_level",
        "default:info",
        "--log_as_json",
    ];
    let (istiod, ip) = (format!("{}:{CONTROL}", stock::ISTIOD), world.topology.pod("wp").v4.to_string());
    let proxy_config = format!(r#"{{"discoveryAddress":"{istiod}","terminationDrainDuration":"3s","concurrency":2}}"#);
    api.kubeconfig(&root(world).join("api"))?;
    let env = [
        ("ISTIO_META_SERVICE_ACCOUNT", "wp"),
        ("ISTIO_META_NODE_NAME", "node-a"),
        ("PILOT_CERT_PROVIDER", "istiod"),
        ("CA_ADDR", istiod.as_str()),
        ("POD_NAME", "wp"),
        ("POD_NAMESPACE", "t"),
        ("INSTANCE_IP", &ip),
        ("SERVICE_ACCOUNT", "wp"),
        ("HOST_IP", "192.168.0.1"),
        ("ISTIO_CPU_LIMIT", "2"),
        ("PROXY_CONFIG", proxy_config.as_str()),
        ("GOMEMLIMIT", "1073741824"),
        ("GOMAXPROCS", "2"),
        ("ISTIO_META_CLUSTER_ID", "c1"),
        ("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
        ("ISTIO_META_WORKLOAD_NAME", "wp"),
        ("ISTIO_META_OWNER", "kubernetes://apis/apps/v1/namespaces/t/deployments/wp"),
        ("ISTIO_META_MESH_ID", "cluster.local"),
        ("CRL_PATH", "/var/run/secrets/istio/crl/crl.pem"),
        ("KUBECONFIG", "/var/run/secrets/api/kubeconfig"),
    ];
    let env: BTreeMap<String, String> = env.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let spec = AgentSpec {
        program: "waypoint",
        flags: arguments.map(ToOwned::to_owned).to_vec(),
        env,
        ..AgentSpec::without_folder("wp", world.files.path())
    };
    spec.contained(container(world)).start(world.topology.pod("wp"))
}

impl World {
    fn ask(&self, method: &str, path: &str) -> anyhow::Result<Answer> {
        http::request(&self.topology.pod("client").netns, API.into(), method, path)
    }
    /// Who answers a GET.
    fn who(&self, path: &str) -> anyhow::Result<String> {
        let answer = self.ask("GET", path)?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
        let echo: serde_json::Value = serde_json::from_str(&answer.body)?;
        Ok(echo["name"].as_str().unwrap_or_default().to_owned())
    }
    fn side(&self) -> anyhow::Result<&Side> {
        self.side.as_ref().context("the waypoint runs")
    }
    fn waypoint(&self) -> anyhow::Result<&Agent> {
        self.side()?.waypoint.as_ref().context("the waypoint runs")
    }
    fn restart_waypoint(&mut self) -> anyhow::Result<()> {
        let mut side = self.side.take().context("the waypoint runs")?;
        side.waypoint = None;
        side.waypoint = Some(deployed(self, &side.api)?);
        self.side = Some(side);
        Ok(())
    }
}

/// Routes, subsets and policies are the objects'; endpoints, services and who everybody is are istiod's.
pub(crate) fn a_waypoint_of_istiods_template_serves(world: &mut World) -> anyhow::Result<()> {
    ensure!(world.who("/")? == "v1" && world.who("/v2")? == "v2", "subsets by labels of pods");
    let denied = world.ask("POST", "/")?;
    ensure!((denied.status, denied.body.as_str()) == (403, "RBAC: access denied"), "{} {}", denied.status, denied.body);
    let seen = world.istiod.seen();
    ensure!(
        seen.nodes.iter().any(|id| id.starts_with("waypoint~") && id.ends_with("~wp.t~t.svc.cluster.local")),
        "{:?}",
        seen.nodes
    );
    ensure!(seen.nacks.is_empty(), "{:?}", seen.nacks);
    let asked = seen.ca_headers.iter().zip(&seen.identities).filter(|((token, _), _)| *token == format!("Bearer {TOKEN}"));
    let asked: Vec<&String> = asked.map(|(_, identity)| identity).collect();
    ensure!(!asked.is_empty() && asked.iter().all(|identity| *identity == WHO), "a waypoint is nobody but itself: {asked:?}");
    let waypoint = world.waypoint()?;
    let dump = waypoint.config_dump()?;
    ensure!(dump["identity"] == WHO && dump["workload"]["uid"] == "c1//Pod/t/wp", "{}", dump["workload"]);
    ensure!(dump["config"]["numWorkerThreads"] == 2, "{}", dump["config"]);
    container(world).rights.check(&stock::process(waypoint))?;
    check_read_only(&stock::process(waypoint), &["", "etc", "run", "usr/local/bin", "var/lib", "etc/istio/pod"])?;
    let log = waypoint.whole_log();
    ensure!(log.contains("--proxyComponentLogLevel: names components of Envoy"), "what has no effect is told:\n{log}");
    ensure!(log.lines().all(|line| line.starts_with('{')), "--log_as_json:\n{log}");
    Ok(())
}

/// What `istioctl proxy-config` looks for, section by section.
pub(crate) fn istioctl_finds_what_it_reads(world: &mut World) -> anyhow::Result<()> {
    ensure!(world.who("/")? == "v1");
    let page = world.waypoint()?.admin("/config_dump?include_eds")?;
    let dump: serde_json::Value = serde_json::from_str(&page.body)?;
    let section = |name: &str| {
        let all = dump["configs"].as_array().into_iter().flatten();
        let wanted = format!("type.googleapis.com/envoy.admin.v3.{name}ConfigDump");
        all.into_iter().find(|section| section["@type"] == wanted.as_str()).cloned().with_context(|| format!("no {name}"))
    };
    let names = |list: &serde_json::Value, path: &str| -> Vec<String> {
        let all = list.as_array().into_iter().flatten();
        all.filter_map(|one| one.pointer(path)?.as_str().map(ToOwned::to_owned)).collect()
    };
    let clusters = names(&section("Clusters")?["dynamic_active_clusters"], "/cluster/name");
    for subset in ["", "v1", "v2"] {
        let name = format!("outbound|80|{subset}|api.t.svc.cluster.local");
        ensure!(clusters.contains(&name), "{clusters:?}");
    }
    let listeners = names(&section("Listeners")?["dynamic_listeners"], "/name");
    ensure!(listeners == ["connect_terminate", "main_internal"], "{listeners:?}");
    let routes = section("Routes")?;
    let routes = &routes["dynamic_route_configs"][0]["route_config"];
    ensure!(routes["name"] == "inbound-vip|80|http|api.t.svc.cluster.local", "{routes}");
    let first = &routes["virtual_hosts"][0]["routes"][0];
    ensure!(
        first["match"]["prefix"] == "/v2" && first["route"]["cluster"] == "outbound|80|v2|api.t.svc.cluster.local",
        "{first}"
    );
    let config = &first["metadata"]["filter_metadata"]["istio"]["config"];
    ensure!(config == "/apis/networking.istio.io/v1/namespaces/t/virtual-service/api", "{config}");
    ensure!(names(&section("Secrets")?["dynamic_active_secrets"], "/name") == ["default", "ROOTCA"], "{}", section("Secrets")?);
    let at = format!("{}", world.topology.pod("v1").v4);
    ensure!(section("Endpoints")?.to_string().contains(&at), "{}", section("Endpoints")?);
    section("Bootstrap")?;
    ensure!(!page.body.contains("PRIVATE KEY"), "never a key");
    Ok(())
}

/// An endpoint goes when istiod says so, whatever the API server says; a route when the API server says so.
pub(crate) fn each_half_follows_its_teller(world: &mut World) -> anyhow::Result<()> {
    world.istiod.remove(ADDRESS_TYPE, "c1//Pod/t/v2");
    wait::until_true("v2 to be gone", || world.ask("GET", "/v2").is_ok_and(|answer| answer.status == 503))?;
    ensure!(world.who("/")? == "v1");
    world.istiod.workload(backend(&world.topology, "v2"));
    wait::until_true("v2 to be back", || world.who("/v2").is_ok_and(|who| who == "v2"))?;
    let api = &world.side()?.api;
    let swapped = OBJECTS.replace("subset: v1 } } ]", "subset: v2 } } ]");
    api.apply_yaml(&swapped)?;
    wait::until_true("the new route", || world.who("/").is_ok_and(|who| who == "v2"))?;
    api.apply_yaml(OBJECTS)?;
    wait::until_true("the old route", || world.who("/").is_ok_and(|who| who == "v1"))
}

/// The last word of either stays while it is away, and a start waits for both.
pub(crate) fn a_waypoint_outlives_its_control_plane_and_starts_with_it_only(world: &mut World) -> anyhow::Result<()> {
    world.istiod.away(true);
    world.side()?.api.silence(true);
    for _ in 0..20 {
        ensure!(world.who("/")? == "v1" && world.who("/v2")? == "v2");
    }
    ensure!(world.ask("POST", "/")?.status == 403, "its policies hold");
    world.waypoint()?.wait_ready(Duration::from_secs(40)).context("ready with its last state")?;
    world.side()?.api.silence(false);
    world.restart_waypoint()?;
    wait::until_true("an attempt", || world.waypoint().is_ok_and(|w| w.whole_log().contains("the control plane is not heard")))?;
    ensure!(world.waypoint()?.wait_ready(Duration::from_millis(500)).is_err(), "ready without istiod");
    world.istiod.away(false);
    world.waypoint()?.wait_ready(Duration::from_secs(40))?;
    wait::until_true("calls through it", || world.who("/").is_ok())
}

/// Certificates of seconds change under load; requests under way meanwhile are not cut.
pub(crate) fn certificates_of_a_waypoint_change_under_load(world: &mut World) -> anyhow::Result<()> {
    world.istiod.lifetime(Duration::from_secs(5));
    world.restart_waypoint()?;
    world.waypoint()?.wait_ready(Duration::from_secs(40))?;
    wait::until_true("calls through it", || world.who("/").is_ok())?;
    let before = world.istiod.seen().identities.len();
    let stop = AtomicBool::new(false);
    let world = &*world;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let caller = scope.spawn(|| -> anyhow::Result<u32> {
            let mut calls = 0;
            while !stop.load(Ordering::Relaxed) {
                world.who("/").with_context(|| format!("after {calls} calls"))?;
                calls += 1;
            }
            Ok(calls)
        });
        // Each is under way when the certificate is renewed, which is every two seconds.
        let slow = [(); 4].map(|()| world.ask("GET", "/slow/3000"));
        stop.store(true, Ordering::Relaxed);
        let calls = caller.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the caller panicked")))?;
        ensure!(calls > 20, "only {calls} calls");
        for answer in slow {
            ensure!(answer?.status == 200, "a long request was cut");
        }
        Ok(())
    })?;
    let seen = world.istiod.seen();
    let renewed = seen.identities.iter().skip(before).filter(|identity| *identity == WHO).count();
    ensure!(renewed >= 2, "renewed {renewed} times");
    ensure!(!world.waypoint()?.whole_log().contains("panicked"));
    world.istiod.lifetime(Duration::from_hours(1));
    Ok(())
}
