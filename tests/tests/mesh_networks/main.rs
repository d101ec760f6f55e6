//! Ring 3: two networks and the gateway between them. Pods of one node are told of the other network by a control plane, as Istio
//! does: a service, somebody behind a gateway, no addresses. Those of another node read it in a folder: ServiceEntries with
//! endpoints on the other network, and a Gateway of the class `istio-remote`. What is between is two tunnels, one inside the other;
//! only the gateway and the endpoint know the other network. A waypoint of the folder's network goes the same way.
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use mesh_proto::istio::workload::{
    GatewayAddress, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, gateway_address::Destination,
};
use mesh_tests::agent::{Agent, AgentSpec, find_program};
use mesh_tests::cni::{self, CniAgent, CniPod, Connection};
use mesh_tests::istiod::Istiod;
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{netns, skip, wait};
use serde_json::Value;
use tempfile::TempDir;

const PORT: u16 = 8080;
const HBONE: u16 = 15008;
const CONTROL: u16 = 15012;
/// The other network.
const WEST: &str = "west";
/// Services of the other network, and where the clients' control plane says they are. `closed` is not meant for others there.
const SERVICES: [(&str, [u8; 4]); 2] = [("web", [10, 96, 0, 20]), ("closed", [10, 96, 0, 21])];

const TESTS: &[Test<World>] = &[
    test("another_network_is_reached_through_its_gateway", another_network_is_reached_through_its_gateway),
    test("the_endpoint_judges_who_is_behind_the_gateway", the_endpoint_judges_who_is_behind_the_gateway),
    test("what_is_not_meant_for_others_is_refused", what_is_not_meant_for_others_is_refused),
    test("policies_of_the_gateway_hold_and_cut", policies_of_the_gateway_hold_and_cut),
    test("a_waypoint_chooses_endpoints_of_both_networks", a_waypoint_chooses_endpoints_of_both_networks),
    test("the_waypoint_of_the_other_network_is_not_gone_around", the_waypoint_of_the_other_network_is_not_gone_around),
    test("a_gateway_that_failed_is_not_drawn_again_at_once", a_gateway_that_failed_is_not_drawn_again_at_once),
];

fn main() -> ExitCode {
    let cannot = skip::netns_unavailable().or_else(|| skip::command_missing("nft"));
    suite::run("mesh_networks", cannot, set_up, TESTS)
}

/// What the other network's cluster says.
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
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: who-may, namespace: t }
spec:
  selector: { matchLabels: { app: web } }
  action: ALLOW
  rules:
  - from: [ { source: { principals: [ cluster.local/ns/t/sa/client, cluster.local/ns/t/sa/wp ] } } ]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: eastwest, namespace: t }
spec:
  gatewayClassName: istio-east-west
  listeners:
  - { name: mesh, port: 15008, protocol: HBONE, tls: { mode: Terminate, options: { gateway.istio.io/tls-terminate-mode: ISTIO_MUTUAL } } }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp, namespace: t }
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - { name: mesh, port: 15008, protocol: HBONE }
status:
  addresses:
  - { type: Hostname, value: wp.t.svc.cluster.local }
---
apiVersion: v1
kind: Service
metadata: { name: wp, namespace: t }
spec:
  selector: { app: wp }
  clusterIP: 10.97.0.9
  ports: [ { name: hbone, port: 15008 } ]
---
apiVersion: v1
kind: Service
metadata: { name: closed, namespace: t }
spec:
  selector: { app: web }
  clusterIP: 10.97.0.21
  ports: [ { name: tcp, port: 80, targetPort: 8080 } ]
";

/// The service for everybody; `label` is one more.
fn web_yaml(label: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: web, namespace: t, labels: {{ istio.io/global: \"true\"{label} }} }}\nspec:\n  \
         selector: {{ app: web }}\n  clusterIP: 10.97.0.20\n  ports: [ {{ name: tcp, port: 80, targetPort: 8080 }} ]\n"
    )
}

/// Dropped in this order.
struct World {
    near: [Agent; 2],
    far: Agent,
    gateway: Agent,
    waypoint: Agent,
    near_waypoint: Agent,
    _near_web: Server,
    _cni: (CniAgent, Connection),
    _web: Server,
    _istiod: Istiod,
    dir: MeshDir,
    near_dir: MeshDir,
    topology: Topology,
    _files: TempDir,
}

fn set_up() -> anyhow::Result<World> {
    for program in ["ztunnel", "waypoint"] {
        find_program(program).map_err(|error| CannotRun(format!("{error:#}")))?;
    }
    let plain = "istio.io/dataplane-mode=none";
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-2")
        .node("node-c", "zone-1")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "other", "other", &[])
        .pod("node-c", "t", "client-c", "client", &[])
        .pod("node-c", "t", "other-c", "other", &[])
        .pod("node-c", "t", "web-c", "web", &[])
        .pod("node-c", "t", "wp-c", "wp", &["gateway.networking.k8s.io/gateway-name=wp", plain])
        .pod("node-b", "t", "web", "web", &[])
        .pod("node-b", "t", "gw", "gw", &["gateway.networking.k8s.io/gateway-name=eastwest", plain])
        .pod("node-b", "t", "wp", "wp", &["gateway.networking.k8s.io/gateway-name=wp", plain])
        .host("control")
        .build()?;
    let files = netns::scratch("networks")?;
    let dir = MeshDir::empty()?;
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-web.yaml", &web_yaml(""))?;
    for pod in ["web", "gw", "wp"] {
        dir.put(&format!("pod-{pod}.yaml"), &topology.pod_yaml(pod, &[]))?;
    }
    let web = Server::start(topology.pod("web"), PORT)?;

    // One authority for both: what differs is who knows whom.
    let ca = files.path().join("ca");
    let far = AgentSpec::new("node-b", dir.path(), &ca, files.path()).env("NETWORK", WEST).start(topology.node("node-b"))?;
    far.wait_ready(Duration::from_secs(40))?;
    let proxy = |pod: &str, gateway: &str| {
        AgentSpec::waypoint(("t", pod), pod, gateway, dir.path(), &ca, files.path()).env("NETWORK", WEST)
    };
    let gateway = proxy("gw", "eastwest").env("CULVERT_EAST_WEST", "true").start(topology.pod("gw"))?;
    let waypoint = proxy("wp", "wp").start(topology.pod("wp"))?;
    for agent in [&gateway, &waypoint] {
        agent.wait_ready(Duration::from_secs(40))?;
    }

    let control = topology.host("control");
    let istiod = Istiod::start(control.listen(CONTROL)?, &["istiod.test"])?;
    tell(&istiod, &topology);
    let file = |name: &str| files.path().join(name).to_string_lossy().into_owned();
    std::fs::write(files.path().join("root.pem"), istiod.root())?;
    std::fs::write(files.path().join("token"), "of a node")?;
    for pod in ["client", "other"] {
        cni::redirect(&topology.pod(pod).netns).with_context(|| format!("rules of {pod}"))?;
    }
    let cni = CniAgent::listen(&files.path().join("zds.sock"))?;
    let near = AgentSpec::without_folder("node-a", files.path())
        .env("XDS_ADDRESS", &format!("https://{}:{CONTROL}", control.v4))
        .env("ALT_XDS_HOSTNAME", "istiod.test")
        .env("XDS_ROOT_CA", &file("root.pem"))
        .env("AUTH_TOKEN", &file("token"))
        .env("CA_ADDRESS", "")
        .env("CULVERT_CA_DIR", &ca.to_string_lossy())
        .env("INPOD_UDS", &file("zds.sock"))
        .start(topology.node("node-a"))?;
    let connection = cni.accept()?;
    for pod in ["client", "other"] {
        let named = CniPod { uid: pod, name: pod, namespace: "t", service_account: pod };
        let error = connection.add(&named, &topology.pod(pod).netns)?;
        ensure!(error.is_empty(), "{pod} is not served: {error}");
    }
    ensure!(connection.snapshot_sent()?.is_empty(), "the list is refused");
    near.wait_ready(Duration::from_secs(40)).with_context(|| near.log_tail(20))?;
    let near_dir = MeshDir::empty()?;
    near_dir.put("mesh.yaml", &beyond(&topology))?;
    near_dir.put("gateway.yaml", &remote(&topology, HBONE))?;
    for pod in ["client-c", "other-c", "web-c", "wp-c"] {
        near_dir.put(&format!("pod-{pod}.yaml"), &topology.pod_yaml(pod, &[]))?;
    }
    let near_web = Server::start(topology.pod("web-c"), PORT)?;
    let near_waypoint =
        AgentSpec::waypoint(("t", "wp-c"), "wp", "wp", near_dir.path(), &ca, files.path()).start(topology.pod("wp-c"))?;
    near_waypoint.wait_ready(Duration::from_secs(40)).with_context(|| near_waypoint.log_tail(20))?;
    let by_folder = AgentSpec::new("node-c", near_dir.path(), &ca, files.path()).start(topology.node("node-c"))?;
    by_folder.wait_ready(Duration::from_secs(40)).with_context(|| by_folder.log_tail(20))?;
    Ok(World {
        near: [near, by_folder],
        far,
        gateway,
        waypoint,
        near_waypoint,
        _near_web: near_web,
        _cni: (cni, connection),
        _web: web,
        _istiod: istiod,
        dir,
        near_dir,
        topology,
        _files: files,
    })
}

/// Where a folder says the other network is entered.
fn remote(topology: &Topology, port: u16) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata:\n  name: west\n  namespace: t\n  labels: {{ topology.istio.io/network: {WEST} }}\n  \
         annotations: {{ gateway.istio.io/service-account: gw }}\n\
         spec:\n  gatewayClassName: istio-remote\n  addresses: [ {{ type: IPAddress, value: {} }} ]\n  \
         listeners: [ {{ name: mesh, port: {port}, protocol: HBONE }} ]\n",
        topology.pod("gw").v4
    )
}

/// What else a folder says of the other network.
fn beyond(topology: &Topology) -> String {
    let mut yaml = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: t, labels: {{ istio.io/dataplane-mode: ambient }} }}\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{ name: wp, namespace: t }}\nspec:\n  \
         gatewayClassName: istio-waypoint\n  listeners: [ {{ name: mesh, port: {HBONE}, protocol: HBONE }} ]\n\
         status: {{ addresses: [ {{ type: IPAddress, value: {} }} ] }}\n",
        topology.pod("wp-c").v4
    );
    for (name, [a, b, c, d]) in SERVICES {
        // The waypoint there may end the inner tunnel too, and only the service can say so.
        let sans = if name == "web" {
            "  subjectAltNames: [ spiffe://cluster.local/ns/t/sa/web, spiffe://cluster.local/ns/t/sa/wp ]\n"
        } else {
            ""
        };
        let web = topology.pod("web").v4;
        let _ = write!(
            yaml,
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: {name}, namespace: t }}\n\
             spec:\n  hosts: [ {name}.t.svc.cluster.local ]\n  addresses: [ {a}.{b}.{c}.{d} ]\n  resolution: STATIC\n  \
             ports: [ {{ name: tcp, number: 80, targetPort: {PORT}, protocol: TCP }} ]\n{sans}  \
             endpoints: [ {{ address: {web}, network: {WEST}, serviceAccount: web }} ]\n"
        );
    }
    yaml
}

fn workload(place: &Place, name: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/t/{name}"),
        name: name.into(),
        namespace: "t".into(),
        service_account: place.name.clone(),
        addresses: vec![Bytes::copy_from_slice(&place.v4.octets())],
        tunnel_protocol: TunnelProtocol::Hbone as i32,
        workload_name: name.into(),
        ..Workload::default()
    }
}

/// What the clients' control plane says: they are here, and behind a gateway somebody has the two services.
fn tell(istiod: &Istiod, topology: &Topology) {
    for name in ["client", "other"] {
        istiod.workload(Workload { node: "node-a".into(), ..workload(topology.pod(name), name) });
    }
    let gateway = topology.pod("gw");
    let address = Bytes::copy_from_slice(&gateway.v4.octets());
    istiod.workload(Workload { network: WEST.into(), ..workload(gateway, "eastwest") });
    let port = Port { service_port: 80, target_port: 0, app_protocol: 0 };
    let ports = PortList { ports: vec![Port { target_port: PORT.into(), ..port }] };
    for (name, vip) in SERVICES {
        let here = NetworkAddress { network: String::new(), address: Bytes::copy_from_slice(&vip), length: None };
        istiod.service(Service {
            name: name.into(),
            namespace: "t".into(),
            hostname: format!("{name}.t.svc.cluster.local"),
            addresses: vec![here],
            ports: vec![port],
            subject_alt_names: ["web", "wp"].map(|sa| format!("spiffe://cluster.local/ns/t/sa/{sa}")).into(),
            canonical: true,
            ..Service::default()
        });
    }
    istiod.workload(Workload {
        uid: "c2//SplitHorizonWorkload/west".into(),
        addresses: Vec::new(),
        network: WEST.into(),
        network_gateway: Some(GatewayAddress {
            destination: Some(Destination::Address(NetworkAddress { network: WEST.into(), address, length: None })),
            hbone_mtls_port: HBONE.into(),
        }),
        services: SERVICES.map(|(name, _)| (format!("t/{name}.t.svc.cluster.local"), ports.clone())).into(),
        ..workload(gateway, "split-horizon")
    });
}

impl World {
    /// By the node of the control plane (0), or of the folder (1).
    fn call(&self, side: usize, pod: &str, service: usize) -> anyhow::Result<String> {
        let (mut client, who) = Client::who(self.topology.pod(&named(side, pod)), vip(service))?;
        client.ping("there?")?;
        client.finish()?;
        Ok(who.name)
    }
}

fn named(side: usize, pod: &str) -> String {
    if side == 0 { pod.to_owned() } else { format!("{pod}-c") }
}

fn vip(service: usize) -> SocketAddr {
    (IpAddr::from(SERVICES[service].1), 80).into()
}

fn starts(record: &Value, field: &str, with: &str) -> bool {
    record[field].as_str().is_some_and(|text| text.starts_with(with))
}

fn another_network_is_reached_through_its_gateway(world: &mut World) -> anyhow::Result<()> {
    for side in [0, 1] {
        is_reached(world, side)?;
    }
    // Several at once share the outer tunnel, and each has an inner one of its own.
    let world = &*world;
    std::thread::scope(|scope| {
        let calls = [0, 1, 0, 1, 0, 1, 0, 1].map(|side| scope.spawn(move || world.call(side, "client", 0)));
        calls.into_iter().try_for_each(|call| match call.join() {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(anyhow::anyhow!("a caller panicked")),
        })
    })
}

fn is_reached(world: &World, side: usize) -> anyhow::Result<()> {
    let (near, far) = (world.near[side].mark(), world.far.mark());
    ensure!(world.call(side, "client", 0)? == "web");
    let out = world.near[side].wait_access("the way out", near, |r| r["direction"] == "outbound")?;
    ensure!(out["dst.service"] == "web.t.svc.cluster.local", "{out}");
    ensure!(starts(&out, "dst.hbone_addr", "web.t.svc.cluster.local:80"), "{out}");
    // The client's identity arrives; its address is another network's, so that of the gateway is what is seen.
    let came = world.far.wait_access("the way in", far, |r| r["direction"] == "inbound")?;
    ensure!(came["src.identity"] == "spiffe://cluster.local/ns/t/sa/client", "{came}");
    ensure!(starts(&came, "src.addr", &format!("{}:", world.topology.pod("gw").v4)), "{came}");
    // Its workload is what its agent says of it, which it is believed because it came through the gateway.
    let client = named(side, "client");
    ensure!(came["src.workload"] == client && came["src.namespace"] == "t", "{came}");
    let page = world.far.metrics()?;
    let labels = [("reporter", "destination"), ("source_workload", client.as_str()), ("source_workload_namespace", "t")];
    ensure!(page.sum("istio_tcp_connections_opened_total", &labels) > 0.0, "no series of {client}");
    let labels = [
        ("reporter", "waypoint"),
        ("source_workload", client.as_str()),
        ("source_principal", "spiffe://cluster.local/ns/t/sa/client"),
        ("destination_service_name", "web"),
    ];
    let told = || world.gateway.metrics().is_ok_and(|page| page.sum("istio_tcp_connections_opened_total", &labels) > 0.0);
    wait::until_true("the gateway to tell of it", told)
}

fn the_endpoint_judges_who_is_behind_the_gateway(world: &mut World) -> anyhow::Result<()> {
    for side in [0, 1] {
        let mark = world.far.mark();
        ensure!(world.call(side, "other", 0).is_err(), "who is not allowed came through");
        let record = world.far.wait_access("the refusal", mark, |r| starts(r, "error", "not_allowed"))?;
        ensure!(record["src.identity"] == "spiffe://cluster.local/ns/t/sa/other", "{record}");
    }
    Ok(())
}

fn what_is_not_meant_for_others_is_refused(world: &mut World) -> anyhow::Result<()> {
    for (side, agent) in world.near.iter().enumerate() {
        let (near, gateway) = (agent.mark(), world.gateway.mark());
        ensure!(world.call(side, "client", 1).is_err(), "a service of the other network alone was reached");
        agent.wait_access("the refusal", near, |r| r["error"].as_str().is_some_and(|e| e.contains("not_bound")))?;
        wait::until_true("the gateway's words", || world.gateway.log_since(gateway).contains("is not for other networks"))?;
    }
    Ok(())
}

fn policies_of_the_gateway_hold_and_cut(world: &mut World) -> anyhow::Result<()> {
    let (mut client, _) = Client::who(world.topology.pod("client"), vip(0))?;
    client.ping("before")?;
    let denied = world.dir.put_for_now(
        "50-gateway.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: { name: not-them, namespace: t }\nspec:\n  \
         targetRefs: [ { group: gateway.networking.k8s.io, kind: Gateway, name: eastwest } ]\n  action: DENY\n  rules:\n  \
         - from: [ { source: { principals: [ cluster.local/ns/t/sa/client ] } } ]\n",
    )?;
    client.wait_cut()?;
    let mark = world.near[0].mark();
    ensure!(world.call(0, "client", 0).is_err(), "the gateway's own policy does not hold");
    world.near[0].wait_access("the refusal", mark, |r| r["error"].as_str().is_some_and(|e| e.contains("policy_denied")))?;
    drop(denied);
    wait::until_true("all as before", || world.call(0, "client", 0).is_ok())
}

/// A service with an endpoint on each network, and a waypoint on that of the caller.
fn a_waypoint_chooses_endpoints_of_both_networks(world: &mut World) -> anyhow::Result<()> {
    let world = &*world;
    let (here, there) = (world.topology.pod("web-c").v4, world.topology.pod("web").v4);
    let both = |endpoints: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
             metadata: {{ name: both, namespace: t, labels: {{ istio.io/use-waypoint: wp }} }}\n\
             spec:\n  hosts: [ both.t.svc.cluster.local ]\n  addresses: [ 10.96.0.30 ]\n  resolution: STATIC\n  \
             ports: [ {{ name: tcp, number: 80, targetPort: {PORT}, protocol: TCP }} ]\n  endpoints:\n{endpoints}"
        )
    };
    let near = format!("  - {{ address: {here}, serviceAccount: web, labels: {{ app: web }} }}\n");
    let far = format!("  - {{ address: {there}, network: {WEST}, serviceAccount: web, weight: 3 }}\n");
    let _far_both =
        world.dir.put_for_now("02-both.yaml", &web_yaml("").replace("name: web", "name: both").replace("0.20", "0.30"))?;
    let call = || {
        let (client, who) = Client::who(world.topology.pod("client-c"), SocketAddr::from(([10, 96, 0, 30], 80)))?;
        drop(client);
        anyhow::Ok(who.name)
    };
    let names = |calls: usize| (0..calls).map(|_| call().unwrap_or_else(|_| "none".into())).collect::<BTreeSet<_>>();

    let only_far = world.near_dir.put_for_now("both.yaml", &both(&far))?;
    let mark = world.far.mark();
    wait::until_true("the other network's endpoint", || call().is_ok_and(|name| name == "web"))?;
    let came = world.far.wait_access("the way in", mark, |r| starts(r, "dst.hbone_addr", "both.t.svc.cluster.local:80"))?;
    ensure!(came["src.identity"] == "spiffe://cluster.local/ns/t/sa/wp", "{came}");
    drop(only_far);

    let _both = world.near_dir.put_for_now("both.yaml", &both(&(near + &far)))?;
    let each = BTreeSet::from(["web".to_owned(), "web-c".to_owned()]);
    wait::until_true("both endpoints", || names(12) == each)?;
    // Envoy's shape: the gateway is the endpoint, with what is behind it weighs.
    let text = world.near_waypoint.admin("/clusters")?.body;
    let gateway = format!("::{}:{HBONE}::weight::3", world.topology.pod("gw").v4);
    ensure!(text.contains(&gateway) && text.contains(&format!("::{here}:{PORT}::weight::1")), "{text}");

    // A gateway that nobody answers at: what is drawn to it is refused, with the reason.
    world.near_dir.put("gateway.yaml", &remote(&world.topology, 15999))?;
    let refused = || {
        let page = world.near_waypoint.metrics();
        page.map_or(0.0, |page| page.sum("culvert_refused_total", &[("reason", "connect_failed")]))
    };
    wait::until_true("the refusal", || call().is_err() && refused() > 0.0)?;
    // One that is gone: the endpoint of our own network has all of it.
    world.near_dir.remove("gateway.yaml");
    wait::until_true("all to be at home", || names(12) == BTreeSet::from(["web-c".to_owned()]))?;
    world.near_dir.put("gateway.yaml", &remote(&world.topology, HBONE))?;
    wait::until_true("both endpoints again", || names(12) == each)
}

fn the_waypoint_of_the_other_network_is_not_gone_around(world: &mut World) -> anyhow::Result<()> {
    world.dir.put("01-web.yaml", &web_yaml(", istio.io/use-waypoint: wp"))?;
    let labels = [("reporter", "waypoint"), ("source_principal", "spiffe://cluster.local/ns/t/sa/client")];
    let through = |world: &World| {
        let page = world.waypoint.metrics();
        page.map_or(0.0, |page| page.sum("istio_tcp_connections_opened_total", &labels))
    };
    wait::until_true("the waypoint to take it", || {
        world.call(0, "client", 0).is_ok_and(|name| name == "web") && through(world) > 0.0
    })?;
    for side in [0, 1] {
        let mark = world.far.mark();
        ensure!(world.call(side, "client", 0)? == "web");
        let came = world.far.wait_access("the way in", mark, |r| r["direction"] == "inbound")?;
        ensure!(came["src.identity"] == "spiffe://cluster.local/ns/t/sa/wp", "{came}");
    }
    // Whom the service's own policies name is the waypoint's to judge, and it knows who is asking.
    let denied = world.dir.put_for_now(
        "51-web.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: { name: web-not-them, namespace: t }\nspec:\n  \
         targetRefs: [ { group: \"\", kind: Service, name: web } ]\n  action: DENY\n  rules:\n  \
         - from: [ { source: { principals: [ cluster.local/ns/t/sa/client ] } } ]\n",
    )?;
    wait::until_true("the waypoint to refuse", || world.call(0, "client", 0).is_err())?;
    drop(denied);
    wait::until_true("all as before", || world.call(0, "client", 0).is_ok())?;
    let [by_istiod, by_folder] = &world.near;
    for agent in [by_istiod, by_folder, &world.far, &world.gateway, &world.waypoint, &world.near_waypoint] {
        ensure!(!agent.whole_log().contains("panicked"), "{} panicked", agent.node());
    }
    Ok(())
}

/// Two addresses of a gateway, at one of which everybody is hung up on: it is met once, and not again by those who come next.
fn a_gateway_that_failed_is_not_drawn_again_at_once(world: &mut World) -> anyhow::Result<()> {
    let control = world.topology.host("control");
    let dead = control.listen(HBONE)?;
    let came = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&came);
    std::thread::spawn(move || {
        for caller in dead.incoming() {
            counted.fetch_add(1, Ordering::SeqCst);
            drop(caller);
        }
    });
    let two = remote(&world.topology, HBONE)
        .replace("addresses: [ ", &format!("addresses: [ {{ type: IPAddress, value: {} }}, ", control.v4));
    world.near_dir.put("gateway.yaml", &two)?;
    wait::until_true("the dead one to be met", || {
        world.call(1, "client", 0).is_ok_and(|name| name == "web") && came.load(Ordering::SeqCst) > 0
    })?;
    let (met, begun) = (came.load(Ordering::SeqCst), Instant::now());
    for _ in 0..20 {
        ensure!(world.call(1, "client", 0)? == "web");
    }
    let (again, took) = (came.load(Ordering::SeqCst) - met, begun.elapsed());
    ensure!(again == 0 || took > Duration::from_secs(8), "the dead one was met {again} times again, in {took:?}");
    world.near_dir.put("gateway.yaml", &remote(&world.topology, HBONE))
}
