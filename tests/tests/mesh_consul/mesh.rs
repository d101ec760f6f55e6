//! A mesh described by Consul: an agent and a waypoint that know nothing but its address. Who is enrolled, who is called, routes and
//! policies from keys, intentions, and a Consul that goes; the same against a stand-in and a real one.
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_binary, find_program};
use mesh_tests::consul::Registry;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{CannotRun, Test, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::web::Web;
use mesh_tests::{http, netns, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const PORT: u16 = 9090;
const DB: ([u8; 4], u16) = ([10, 96, 0, 50], 5432);
const API: ([u8; 4], u16) = ([10, 96, 0, 51], 80);
pub const HTTP: u16 = 8500;

/// What Consul has no words for.
const OBJECTS: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp }
spec:
  gatewayClassName: istio-waypoint
  listeners: [ { name: mesh, port: 15008, protocol: HBONE } ]
  addresses: [ { type: Hostname, value: wp.service.consul } ]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: api }
spec:
  hosts: [ api.service.consul ]
  http:
  - match: [ { uri: { prefix: /v2 } } ]
    route: [ { destination: { host: api.service.consul, subset: v2 } } ]
  - route: [ { destination: { host: api.service.consul, subset: v1 } } ]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: api }
spec:
  host: api.service.consul
  subsets: [ { name: v1, labels: { version: v1 } }, { name: v2, labels: { version: v2 } } ]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-posts }
spec:
  targetRefs: [ { group: networking.istio.io, kind: ServiceEntry, name: api.service.consul } ]
  action: DENY
  rules: [ { to: [ { operation: { methods: [ POST ] } } ] } ]
";
const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: strict, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
";

pub const TESTS: &[Test<World>] = &[
    test("instances_are_enrolled_and_called_by_name", instances_are_enrolled_and_called_by_name),
    test("an_instance_that_is_ill_is_not_called", an_instance_that_is_ill_is_not_called),
    test("a_waypoint_routes_and_judges_by_keys", a_waypoint_routes_and_judges_by_keys),
    test("intentions_deny_at_workloads_and_waypoints", intentions_deny_at_workloads_and_waypoints),
    test("the_mesh_outlives_consul", the_mesh_outlives_consul),
];

/// Dropped in this order.
pub struct World {
    agent: Agent,
    waypoint: Agent,
    _web: Vec<Web>,
    _server: Server,
    consul: Box<dyn Registry>,
    topology: Topology,
    dir: TempDir,
}

/// How a Consul is started in the place of a host, with a folder of its own.
pub type Start = fn(&Arc<Place>, &Path) -> anyhow::Result<Box<dyn Registry>>;

pub fn set_up(start: Start) -> anyhow::Result<World> {
    for program in [find_binary(), find_program("waypoint")] {
        program.map_err(|error| CannotRun(format!("{error:#}")))?;
    }
    let mut plan = Plan::default().node("node-a", "zone-1").host("control");
    for name in ["client", "db", "v1", "v2", "wp"] {
        plan = plan.pod("node-a", "default", name, name, &[]);
    }
    let topology = plan.build()?;
    let dir = netns::scratch("consul")?;
    let control = topology.host("control");
    let consul = start(control, dir.path())?;
    Registrar { consul: &*consul, topology: &topology }.all()?;
    consul.put("culvert/mesh", Some(OBJECTS))?;
    consul.put("culvert/strict", Some(STRICT))?;
    let url = format!("http://{}:{HTTP}", control.v4);
    let ca = dir.path().join("ca").to_string_lossy().into_owned();
    let agent = AgentSpec::without_folder("node-a", dir.path()).env("CULVERT_CA_DIR", &ca).env("CONSUL_HTTP_ADDR", &url);
    let agent = agent.start(topology.node("node-a"))?;
    agent.wait_ready(Duration::from_secs(40))?;
    let place = topology.pod("wp");
    let flags = ["--consul", &url, "--namespace", "default", "--service-account", "wp", "--gateway", "wp"];
    let waypoint = AgentSpec {
        program: "waypoint",
        flags: flags.into_iter().map(str::to_owned).collect(),
        ..AgentSpec::without_folder("wp", dir.path())
    };
    let waypoint = waypoint.env("CULVERT_CA_DIR", &ca).env("INSTANCE_IP", &place.v4.to_string()).start(place)?;
    waypoint.wait_ready(Duration::from_secs(40))?;
    let web = ["v1", "v2"].map(|pod| Web::start(topology.pod(pod), 8080)).into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let server = Server::start(topology.pod("db"), PORT)?;
    Ok(World { agent, waypoint, _web: web, _server: server, consul, topology, dir })
}

struct Registrar<'w> {
    consul: &'w dyn Registry,
    topology: &'w Topology,
}

impl Registrar<'_> {
    /// Registers the program of a pod as an instance of a service.
    fn register(&self, service: &str, pod: &str, port: u16, tags: &[&str], meta: &Value, status: &str) -> anyhow::Result<()> {
        let place = self.topology.pod(pod);
        self.consul.register(&json!({
            "Node": "node-a", "Address": self.topology.node("node-a").v4,
            "Service": {
                "ID": pod, "Service": service, "Address": place.v4, "Port": port, "Tags": tags, "Meta": meta,
            },
            "Checks": [{ "Status": status }],
        }))
    }
    fn member(&self, pod: &str, address: Option<([u8; 4], u16)>) -> Value {
        let mut meta = json!({
            "culvert-dataplane-mode": "ambient", "culvert-netns": self.topology.pod(pod).netns.path(),
        });
        if let Some(address) = address {
            let address = SocketAddr::from(address);
            meta["culvert-address"] = json!(address.ip());
            meta["culvert-port"] = json!(address.port().to_string());
        }
        meta
    }
    fn db(&self, status: &str) -> anyhow::Result<()> {
        let meta = self.member("db", Some(DB));
        self.register("db", "db", PORT, &[], &meta, status)
    }
    fn all(&self) -> anyhow::Result<()> {
        let client = self.member("client", None);
        self.register("client", "client", 0, &[], &client, "passing")?;
        self.db("passing")?;
        for pod in ["v1", "v2"] {
            let meta = self.member(pod, Some(API));
            self.register("api", pod, 8080, &["istio.io/use-waypoint=wp", &format!("version={pod}")], &meta, "passing")?;
        }
        let tags = ["networking.istio.io/tunnel=http", "gateway.networking.k8s.io/gateway-name=wp"];
        self.register("wp", "wp", 15008, &tags, &json!({}), "passing")
    }
}

impl World {
    fn registrar(&self) -> Registrar<'_> {
        Registrar { consul: &*self.consul, topology: &self.topology }
    }
    fn call(&self) -> anyhow::Result<SocketAddr> {
        let (_client, who) = Client::who(self.topology.pod("client"), DB.into())?;
        Ok(who.peer)
    }
    fn ask(&self, method: &str, path: &str) -> anyhow::Result<http::Answer> {
        http::request(&self.topology.pod("client").netns, API.into(), method, path)
    }
    fn who(&self, path: &str) -> anyhow::Result<String> {
        let answer = self.ask("GET", path)?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
        let echo: Value = serde_json::from_str(&answer.body)?;
        Ok(echo["name"].as_str().unwrap_or_default().to_owned())
    }
}

fn instances_are_enrolled_and_called_by_name(world: &mut World) -> anyhow::Result<()> {
    let mark = world.agent.mark();
    wait::until_true("a call", || world.call().is_ok()).with_context(|| world.agent.log_tail(20))?;
    ensure!(world.call()?.ip() == world.topology.pod("client").v4, "the client's address");
    world.agent.wait_access("both identities", mark, |record| {
        let text = record.to_string();
        text.contains("ns/default/sa/client") && text.contains("ns/default/sa/db") && text.contains("inbound")
    })?;
    let services = world.agent.config_dump()?["services"].to_string();
    ensure!(services.contains("db.service.consul") && services.contains("api.service.consul"), "{services}");
    Ok(())
}

fn an_instance_that_is_ill_is_not_called(world: &mut World) -> anyhow::Result<()> {
    world.registrar().db("critical")?;
    let mark = world.agent.mark();
    wait::until_true("no call", || world.call().is_err())?;
    world.agent.wait_access("why", mark, |record| record.to_string().contains("no_healthy_endpoint"))?;
    world.registrar().db("passing")?;
    wait::until_true("a call again", || world.call().is_ok())
}

fn a_waypoint_routes_and_judges_by_keys(world: &mut World) -> anyhow::Result<()> {
    wait::until_true("a call through the waypoint", || world.who("/").is_ok())
        .with_context(|| format!("{}\n{}\n{:?}", world.agent.log_tail(12), world.waypoint.log_tail(12), world.who("/")))?;
    ensure!(world.who("/")? == "v1" && world.who("/v2")? == "v2", "subsets by tags");
    let denied = world.ask("POST", "/")?;
    ensure!((denied.status, denied.body.as_str()) == (403, "RBAC: access denied"), "{} {}", denied.status, denied.body);
    world.consul.put("culvert/mesh", Some(&OBJECTS.replace("subset: v1 } } ]", "subset: v2 } } ]")))?;
    wait::until_true("the new route", || world.who("/").is_ok_and(|who| who == "v2"))?;
    world.consul.put("culvert/mesh", Some(OBJECTS))?;
    wait::until_true("the old route", || world.who("/").is_ok_and(|who| who == "v1"))
}

fn intentions_deny_at_workloads_and_waypoints(world: &mut World) -> anyhow::Result<()> {
    let intention = |source: &str, destination: &str, action: &str| json!({ "SourceName": source, "DestinationName": destination, "Action": action, "SourceType": "consul" });
    let mark = world.agent.mark();
    world.consul.intend(vec![intention("*", "db", "deny"), intention("client", "api", "deny")], false)?;
    wait::until_true("db is closed", || world.call().is_err())?;
    world.agent.wait_access("why", mark, |record| record.to_string().contains("intentions.db.consul"))?;
    wait::until_true("api is closed", || world.ask("GET", "/").is_ok_and(|answer| answer.status == 403))?;
    // With a default of denial, who is named passes, and the waypoint is not taken for a stranger.
    world.consul.intend(vec![intention("client", "db", "allow"), intention("client", "api", "allow")], true)?;
    wait::until_true("db is open", || world.call().is_ok())?;
    wait::until_true("api is open", || world.who("/").is_ok())?;
    world.consul.intend(vec![intention("client", "db", "allow")], true)?;
    wait::until_true("api is closed again", || world.ask("GET", "/").is_ok_and(|answer| answer.status == 403))?;
    world.consul.intend(Vec::new(), false)?;
    wait::until_true("all is open", || world.call().is_ok() && world.who("/").is_ok())
}

/// Its last word stays; who starts without it is not ready, and says why.
fn the_mesh_outlives_consul(world: &mut World) -> anyhow::Result<()> {
    world.consul.away(true)?;
    for _ in 0..20 {
        ensure!(world.call().is_ok() && world.who("/v2")? == "v2" && world.ask("POST", "/")?.status == 403);
    }
    let log = || world.agent.whole_log();
    wait::until_true("it is told", || log().contains("cannot be followed"))?;
    world.agent.wait_ready(Duration::from_secs(5)).context("ready with its last state")?;
    let spec = world.waypoint.spec().clone().env("CULVERT_READINESS_ADDR", "127.0.0.1:25021");
    let other = [("CULVERT_HBONE_ADDR", "127.0.0.1:25008"), ("CULVERT_ADMIN_ADDR", "127.0.0.1:25000")];
    let other = [other, [("CULVERT_STATS_ADDR", "127.0.0.1:25020"), ("CULVERT_ENVOY_STATS_ADDR", "127.0.0.1:25090")]].concat();
    let mut spec = other.into_iter().fold(spec, |spec, (key, value)| spec.env(key, value));
    spec.log = world.dir.path().join("second.log");
    let second = spec.start(world.topology.pod("wp"))?;
    wait::until_true("an attempt", || second.whole_log().contains("cannot be followed"))?;
    let ready: SocketAddr = ([127, 0, 0, 1], 25021).into();
    let page = http::get(&world.topology.pod("wp").netns, ready, "/healthz/ready")?;
    ensure!(page.status != 200, "ready without Consul: {}", page.body);
    world.consul.away(false)?;
    let status = || http::get(&world.topology.pod("wp").netns, ready, "/healthz/ready").map_or(0, |page| page.status);
    wait::until("it is ready", Duration::from_mins(1), || (status() == 200).then_some(()))?;
    Ok(())
}
