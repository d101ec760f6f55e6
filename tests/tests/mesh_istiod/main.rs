//! Ring 3: two agents that have nothing but a control plane and a CNI agent: mesh, policies and certificates come over the
//! wire, pods over the socket. What they carry, and what they carry on with when the control plane is gone.
mod stock;
mod waypoint;

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use mesh_proto::istio::security::{self, Authorization, Group, Match, Rules, StringMatch, string_match::MatchType};
use mesh_proto::istio::workload::{Extension, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload};
use mesh_proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use mesh_tests::agent::{Agent, AgentSpec, Metrics, find_program};
use mesh_tests::cni::{self, CniAgent, CniPod, Connection};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::hbone::{self, Tunnel};
use mesh_tests::issuer::{Authority, KeyServer, Manner};
use mesh_tests::istiod::{CaManner, Istiod};
use mesh_tests::load::Pace;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{netns, skip, wait};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::json;
use tempfile::TempDir;

const PORT: u16 = 8080;
/// Where pods listen that have a server of HTTP on the other.
const ALSO: u16 = 8081;
const VIP: ([u8; 4], u16) = ([10, 96, 0, 20], 80);
/// The port of istiod.
const CONTROL: u16 = 15012;
/// Pods of node-b.
const ON_B: [&str; 3] = ["web", "v1", "v2"];
/// What Istio makes of STRICT.
const STRICT: &str = "istio_converted_static_strict";

const TESTS: &[Test<World>] = &[
    test("pods_call_each_other_as_who_they_are", pods_call_each_other_as_who_they_are),
    test("policies_of_the_stream_hold", policies_of_the_stream_hold),
    test("a_policy_that_comes_cuts_what_it_no_longer_allows", a_policy_that_comes_cuts_what_it_no_longer_allows),
    test("a_certificate_taken_back_ends_its_tunnels_both_ways", a_certificate_taken_back_ends_its_tunnels_both_ways),
    test("a_certificate_taken_back_during_its_handshake_is_told_of", a_certificate_taken_back_during_its_handshake_is_told_of),
    test("what_a_later_istiod_says_refuses_or_is_told_once", what_a_later_istiod_says_refuses_or_is_told_once),
    test("without_a_control_plane_all_goes_on", without_a_control_plane_all_goes_on),
    test("short_lived_certificates_change_under_load", short_lived_certificates_change_under_load),
    test("on_demand_what_is_called_is_asked_for", on_demand_what_is_called_is_asked_for),
    test("a_wrong_cluster_id_is_told_and_keeps_nobody_out", a_wrong_cluster_id_is_told_and_keeps_nobody_out),
    test("a_federated_domain_is_believed_by_what_it_tells", a_federated_domain_is_believed_by_what_it_tells),
    test("a_restarted_agent_waits_for_the_control_plane", a_restarted_agent_waits_for_the_control_plane),
    test("an_agent_of_istios_chart_serves", stock::an_agent_of_istios_chart_serves),
    test("a_waypoint_of_istiods_template_serves", waypoint::a_waypoint_of_istiods_template_serves),
    test("istioctl_finds_what_it_reads", waypoint::istioctl_finds_what_it_reads),
    test("each_half_follows_its_teller", waypoint::each_half_follows_its_teller),
    test(
        "a_waypoint_outlives_its_control_plane_and_starts_with_it_only",
        waypoint::a_waypoint_outlives_its_control_plane_and_starts_with_it_only,
    ),
    test("certificates_of_a_waypoint_change_under_load", waypoint::certificates_of_a_waypoint_change_under_load),
];

fn main() -> ExitCode {
    let cannot = skip::netns_unavailable().or_else(|| skip::command_missing("nft"));
    suite::run("mesh_istiod", cannot, set_up, TESTS)
}

/// One node's agent and the CNI agent's connection to it.
struct Node {
    agent: Agent,
    _cni: CniAgent,
    _connection: Connection,
}

/// Dropped in this order.
struct World {
    side: Option<waypoint::Side>,
    a: Option<Node>,
    b: Option<Node>,
    _servers: Vec<Server>,
    istiod: Istiod,
    topology: Topology,
    files: TempDir,
}

fn workload(place: &Place, node: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/t/{}", place.name),
        name: place.name.clone(),
        namespace: "t".into(),
        service_account: place.name.clone(),
        addresses: vec![Bytes::copy_from_slice(&place.v4.octets())],
        tunnel_protocol: TunnelProtocol::Hbone as i32,
        node: node.into(),
        workload_name: place.name.clone(),
        authorization_policies: vec![format!("istio-system/{STRICT}")],
        ..Workload::default()
    }
}

fn policy(namespace: &str, name: &str, action: security::Action, one: Match) -> Authorization {
    Authorization {
        name: name.into(),
        namespace: namespace.into(),
        scope: security::Scope::WorkloadSelector as i32,
        action: action as i32,
        groups: vec![Group { rules: vec![Rules { matches: vec![one] }] }],
        ..Authorization::default()
    }
}

fn from(account: &str) -> Match {
    let name = MatchType::Exact(format!("cluster.local/ns/t/sa/{account}"));
    Match { principals: vec![StringMatch { match_type: Some(name) }], ..Match::default() }
}

fn web(topology: &Topology) -> Workload {
    let ports = PortList { ports: vec![Port { service_port: 80, target_port: PORT.into(), app_protocol: 0 }] };
    let mut web = workload(topology.pod("web"), "node-b");
    web.authorization_policies.push("t/web-allow".into());
    web.services = [("t/web.t.svc.cluster.local".to_owned(), ports)].into();
    web
}

/// What istiod tells of this mesh.
fn tell(istiod: &Istiod, topology: &Topology) {
    let strict = Match { not_principals: vec![StringMatch { match_type: Some(MatchType::Presence(())) }], ..Match::default() };
    istiod.policy(&policy("istio-system", STRICT, security::Action::Deny, strict));
    istiod.policy(&policy("t", "web-allow", security::Action::Allow, from("client")));
    istiod.service(Service {
        name: "web".into(),
        namespace: "t".into(),
        hostname: "web.t.svc.cluster.local".into(),
        addresses: vec![NetworkAddress { network: String::new(), address: Bytes::copy_from_slice(&VIP.0), length: None }],
        ports: vec![Port { service_port: 80, target_port: PORT.into(), app_protocol: 0 }],
        canonical: true,
        ..Service::default()
    });
    for name in ["client", "other"] {
        istiod.workload(workload(topology.pod(name), "node-a"));
    }
    istiod.workload(web(topology));
    waypoint::tell(istiod, topology);
}

fn set_up() -> anyhow::Result<World> {
    for program in ["ztunnel", "waypoint"] {
        find_program(program).map_err(|error| CannotRun(format!("{error:#}")))?;
    }
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-1")
        .node("node-c", "zone-1")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "other", "other", &[])
        .pod("node-b", "t", "web", "web", &[])
        .pod("node-b", "t", "v1", "v1", &["app=api", "version=v1"])
        .pod("node-b", "t", "v2", "v2", &["app=api", "version=v2"])
        .pod("node-a", "t", "wp", "wp", &["gateway.networking.k8s.io/gateway-name=wp", "istio.io/dataplane-mode=none"])
        .pod("node-c", "t", "stock", "stock", &[])
        .pod("node-c", "istio-system", "ztunnel-1", "ztunnel", &["app=ztunnel", "istio.io/dataplane-mode=none"])
        .pod("node-c", "istio-system", "ztunnel-2", "ztunnel", &["app=ztunnel", "istio.io/dataplane-mode=none"])
        .host("control")
        .host("outside")
        .build()?;
    let files = netns::scratch("istiod")?;
    let control = topology.host("control");
    let istiod = Istiod::start(control.listen(CONTROL)?, &["istiod.test", stock::ISTIOD])?;
    tell(&istiod, &topology);
    std::fs::write(files.path().join("root.pem"), istiod.root())?;
    std::fs::write(files.path().join("token"), "of a node")?;
    let servers = vec![Server::start(topology.pod("web"), PORT)?];
    for pod in topology.plan().pods.iter().filter(|pod| pod.namespace == "t" && pod.name != "wp") {
        cni::redirect(&topology.pod(&pod.name).netns).with_context(|| format!("rules of {}", pod.name))?;
    }
    std::fs::write(files.path().join("crl.pem"), istiod.revoked(&[])?)?;
    let mut world = World { side: None, a: None, b: None, _servers: servers, istiod, topology, files };
    world.a = Some(world.start("node-a", &["client", "other"])?);
    world.b = Some(world.start("node-b", &ON_B)?);
    world.side = Some(waypoint::Side::start(&world)?);
    Ok(world)
}

impl World {
    fn spec(&self, node: &str) -> AgentSpec {
        let file = |name: &str| self.files.path().join(name).to_string_lossy().into_owned();
        let control = self.topology.host("control").v4;
        AgentSpec::without_folder(node, self.files.path())
            .env("XDS_ADDRESS", &format!("https://{control}:{CONTROL}"))
            .env("ALT_XDS_HOSTNAME", "istiod.test")
            .env("ALT_CA_HOSTNAME", "istiod.test")
            .env("XDS_ROOT_CA", &file("root.pem"))
            .env("CA_ROOT_CA", &file("root.pem"))
            .env("AUTH_TOKEN", &file("token"))
            .env("CRL_PATH", &file("crl.pem"))
            .env("AUTHZ_POLICY_INFO_LOGGING", "true")
            .env("INPOD_UDS", &file(&format!("{node}.sock")))
            .env("CONNECTION_TERMINATION_DEADLINE", "3s")
    }
    fn start(&self, node: &str, pods: &[&str]) -> anyhow::Result<Node> {
        let cni = CniAgent::listen(&self.files.path().join(format!("{node}.sock")))?;
        let agent = self.spec(node).start(self.topology.node(node))?;
        self.enrol(node, agent, cni, pods)
    }
    fn enrol(&self, node: &str, agent: Agent, cni: CniAgent, pods: &[&str]) -> anyhow::Result<Node> {
        let connection = cni.accept().with_context(|| format!("log of {node}:\n{}", agent.log_tail(20)))?;
        for pod in pods {
            let named = CniPod { uid: pod, name: pod, namespace: "t", service_account: pod };
            let error = connection.add(&named, &self.topology.pod(pod).netns)?;
            ensure!(error.is_empty(), "{pod} is not served: {error}");
        }
        ensure!(connection.snapshot_sent()?.is_empty(), "the list is refused");
        agent.wait_ready(Duration::from_secs(40))?;
        Ok(Node { agent, _cni: cni, _connection: connection })
    }
    fn agent(&self, node: &str) -> anyhow::Result<&Agent> {
        let node = if node == "node-a" { &self.a } else { &self.b };
        Ok(&node.as_ref().context("it runs")?.agent)
    }
    fn call(&self, pod: &str, to: SocketAddr) -> anyhow::Result<String> {
        let (mut client, who) = Client::who(self.topology.pod(pod), to)?;
        client.ping("there?")?;
        client.finish()?;
        Ok(who.name)
    }
    fn web(&self) -> SocketAddr {
        self.topology.pod("web").at(PORT)
    }
}

fn pods_call_each_other_as_who_they_are(world: &mut World) -> anyhow::Result<()> {
    let (a, b) = (world.agent("node-a")?, world.agent("node-b")?);
    let (mark_a, mark_b) = (a.mark(), b.mark());
    ensure!(world.call("client", world.web())? == "web" && world.call("client", VIP.into())? == "web");
    for (agent, mark, direction) in [(a, mark_a, "outbound"), (b, mark_b, "inbound")] {
        agent.wait_access(direction, mark, |record| {
            record["direction"] == direction
                && record["src.identity"] == "spiffe://cluster.local/ns/t/sa/client"
                && record["dst.identity"] == "spiffe://cluster.local/ns/t/sa/web"
        })?;
    }
    wait::until_true("the policy that allows it to be told of", || {
        let log = b.log_since(mark_b);
        log.lines().any(|line| line.contains("rbac") && line.contains("allowed") && line.contains("web-allow"))
    })?;
    let seen = world.istiod.seen();
    ensure!(seen.nodes.iter().any(|id| id.starts_with("ztunnel~")), "{:?}", seen.nodes);
    let mut tokens = seen.tokens.iter().chain(seen.ca_headers.iter().map(|(token, _)| token));
    ensure!(tokens.all(|t| t == "Bearer of a node" || *t == format!("Bearer {}", waypoint::TOKEN)));
    ensure!(seen.nacks.is_empty(), "{:?}", seen.nacks);
    let dump = a.config_dump()?;
    let available = dump["certificates"].as_array().into_iter().flatten().filter(|c| c["state"] == "Available").count();
    ensure!(available >= 2, "{}", dump["certificates"]);
    Ok(())
}

fn policies_of_the_stream_hold(world: &mut World) -> anyhow::Result<()> {
    ensure!(world.call("other", world.web()).is_err(), "other is not in the ALLOW policy");
    let outside = world.topology.host("outside");
    ensure!(Client::who(outside, world.web()).is_err(), "plaintext gets in under STRICT");
    ensure!(world.call("client", world.web())? == "web");
    Ok(())
}

fn a_policy_that_comes_cuts_what_it_no_longer_allows(world: &mut World) -> anyhow::Result<()> {
    let (mut live, _) = Client::who(world.topology.pod("client"), world.web())?;
    live.ping("before")?;
    world.istiod.policy(&policy("t", "web-allow", security::Action::Allow, from("other")));
    live.wait_cut()?;
    ensure!(world.call("client", world.web()).is_err(), "refused from now on");
    wait::until_true("the other one to be allowed", || world.call("other", world.web()).is_ok())?;
    // A new policy of the workload: it and its name come apart, and nothing that both allow is cut in between.
    let (mut lives, _) = Client::who(world.topology.pod("other"), world.web())?;
    let mut bound = web(&world.topology);
    bound.authorization_policies.push("t/also".into());
    world.istiod.withhold(AUTHORIZATION_TYPE, true);
    world.istiod.policy(&policy("t", "also", security::Action::Allow, from("client")));
    world.istiod.workload(bound);
    std::thread::sleep(Duration::from_millis(300));
    world.istiod.withhold(AUTHORIZATION_TYPE, false);
    wait::until_true("the second policy to allow", || world.call("client", world.web()).is_ok())?;
    lives.ping("still there")?;
    world.istiod.workload(web(&world.topology));
    world.istiod.remove(AUTHORIZATION_TYPE, "t/also");
    world.istiod.policy(&policy("t", "web-allow", security::Action::Allow, from("client")));
    wait::until_true("all as before", || world.call("client", world.web()).is_ok() && world.call("other", world.web()).is_err())
}

/// Puts the list of what was taken back where agents and waypoint read it.
fn take_back(world: &World, identities: &[&str]) -> anyhow::Result<()> {
    for dir in [world.files.path().to_path_buf(), waypoint::root(world).join("crl")] {
        let next = dir.join("next.pem");
        std::fs::write(&next, world.istiod.revoked(identities)?)?;
        std::fs::rename(next, dir.join("crl.pem"))?;
    }
    Ok(())
}

/// The certificate is looked at when it comes, and the handshake ends later. What changed in between counts all the same, and is told.
fn a_certificate_taken_back_during_its_handshake_is_told_of(world: &mut World) -> anyhow::Result<()> {
    const WHO: &str = "spiffe://cluster.local/ns/t/sa/slow";
    let outside = world.topology.host("outside");
    let waypoint = world.side.as_ref().and_then(waypoint::Side::agent).context("the waypoint runs")?;
    for (judge, to) in [(world.agent("node-b")?, "web"), (waypoint, "wp")] {
        let mut config = rustls::ClientConfig::clone(mesh_tests::hbone::client_tls(&world.istiod.certificate(WHO)?)?.config());
        // So that the last piece of our part is not in one record with the certificate.
        config.max_fragment_size = Some(64);
        let to = world.topology.pod(to).at(15008);
        let mut tcp = outside.netns.connect(to, Duration::from_secs(5))?;
        tcp.set_read_timeout(Some(Duration::from_secs(20)))?;
        let name = rustls::pki_types::ServerName::IpAddress(to.ip().into());
        let mut tls = rustls::ClientConnection::new(Arc::new(config), name)?;
        tls.write_tls(&mut tcp)?;
        while !tls.wants_write() {
            ensure!(tls.read_tls(&mut tcp)? > 0, "{} ended the handshake", judge.node());
            tls.process_new_packets()?;
        }
        let mut rest = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut rest)?;
        }
        let last = rest.split_off(rest.len() - 8);
        tcp.write_all(&rest)?;
        // It says nothing of having looked at the certificate.
        std::thread::sleep(Duration::from_millis(300));
        let (mark, refused) = (judge.mark(), judge.metrics()?);
        let refused = |page: &Metrics| {
            page.sum("culvert_connections_refused_total", &[("reason", "revoked")])
                + page.sum("culvert_refused_total", &[("reason", "revoked")])
                - refused.sum("culvert_connections_refused_total", &[("reason", "revoked")])
                - refused.sum("culvert_refused_total", &[("reason", "revoked")])
        };
        take_back(world, &[WHO])?;
        wait::until_true("the list to be read", || judge.log_since(mark).contains("certificate revocation lists read"))?;
        tcp.write_all(&last)?;
        wait::until_true("the refusal to be told", || {
            judge.log_since(mark).lines().any(|line| line.contains(WHO) && line.contains("revoked: the peer's certificate"))
        })
        .with_context(|| judge.log_tail(10))?;
        wait::until_true("the refusal to be counted", || judge.metrics().is_ok_and(|page| refused(&page) > 0.0))?;
        take_back(world, &[])?;
        wait::until_true("the list to be read again", || {
            judge.log_since(mark).matches("certificate revocation lists read").count() == 2
        })?;
    }
    Ok(())
}

fn a_certificate_taken_back_ends_its_tunnels_both_ways(world: &mut World) -> anyhow::Result<()> {
    let (client, web) = ("spiffe://cluster.local/ns/t/sa/client", "spiffe://cluster.local/ns/t/sa/web");
    // Of others: nothing happens to this one.
    let (mut live, _) = Client::who(world.topology.pod("client"), world.web())?;
    take_back(world, &["spiffe://cluster.local/ns/t/sa/other"])?;
    for node in ["node-a", "node-b"] {
        let read = || world.agent(node).is_ok_and(|a| a.whole_log().matches("certificate revocation lists read").count() >= 2);
        wait::until_true("the list to be read again", read)?;
    }
    live.ping("still there")?;
    // The server's: the client's agent hangs up. The client's: the server's does.
    for (gone, judge, direction) in [(web, "node-a", "outbound"), (client, "node-b", "inbound")] {
        let (mut live, _) = Client::who(world.topology.pod("client"), world.web())?;
        live.ping("before")?;
        let mark = world.agent(judge)?.mark();
        take_back(world, &[gone])?;
        live.wait_cut().with_context(|| format!("{gone} was taken back"))?;
        ensure!(world.call("client", world.web()).is_err(), "{gone} still counts");
        world
            .agent(judge)?
            .wait_access("the refusal", mark, |record| record["direction"] == direction && record["reason"] == "cert_revoked")?;
        let page = world.agent(judge)?.metrics()?;
        let reporter = if direction == "outbound" { "source" } else { "destination" };
        ensure!(page.sum("istio_crl_policy_rejections_total", &[("reporter", reporter)]) > 0.0, "{judge} did not count it");
        for told in ["istio_xds_message_total", "istio_xds_message_bytes_total", "istio_tcp_connections_failed_total"] {
            ensure!(page.sum(told, &[]) > 0.0, "{told} is missing");
        }
        take_back(world, &[])?;
        wait::until_true("calls again", || world.call("client", world.web()).is_ok())?;
    }
    Ok(())
}

/// An address is not of the mesh, then of a workload that cannot be used, then of one that can.
fn what_a_later_istiod_says_refuses_or_is_told_once(world: &mut World) -> anyhow::Result<()> {
    let outside = world.topology.host("outside");
    let _server = Server::start(outside, PORT)?;
    let agent = world.agent("node-a")?;
    let (mark, to) = (agent.mark(), outside.at(PORT));
    ensure!(world.call("client", to)? == "outside");
    let usable = Workload { tunnel_protocol: 0, authorization_policies: Vec::new(), ..workload(outside, "") };
    world.istiod.workload(Workload { network_mode: 7, ..usable.clone() });
    wait::until_true("it to be refused", || world.call("client", to).is_err())?;
    agent.wait_access("the reason", mark, |r| {
        r["reason"] == "no_waypoint" && r["error"].as_str().is_some_and(|e| e.contains("network_mode 7"))
    })?;
    let problems = agent.config_dump()?["problems"].to_string();
    ensure!(problems.contains("network_mode 7") && problems.contains("calls to its addresses are refused"), "{problems}");
    world.istiod.workload(usable.clone());
    wait::until_true("it to be reached", || world.call("client", to).is_ok_and(|name| name == "outside"))?;
    // What was good stays.
    world.istiod.workload(Workload { network_mode: 7, ..usable.clone() });
    wait::until_true("it to be told of", || {
        agent.config_dump().is_ok_and(|dump| dump["problems"].to_string().contains("network_mode"))
    })?;
    ensure!(world.call("client", to)? == "outside");
    world.istiod.remove(ADDRESS_TYPE, &usable.uid);

    let mark = agent.mark();
    let of_type = mesh_proto::well_known::Any { type_url: "type.googleapis.com/istio.later.Thing".into(), value: Vec::new() };
    let strange = |name: &str| Service {
        name: name.into(),
        namespace: "t".into(),
        hostname: format!("{name}.t.svc.cluster.local"),
        visibility: 9,
        extensions: vec![Extension { name: "later.istio.io".into(), config: Some(of_type.clone()) }],
        ..Service::default()
    };
    for name in ["strange", "stranger"] {
        world.istiod.service(strange(name));
        agent.wait_config(name, |dump| dump["services"].as_array().is_some_and(|all| all.iter().any(|s| s["name"] == name)))?;
    }
    for what in ["visibility 9 of a service", "of a service, type.googleapis.com/istio.later.Thing"] {
        let told = || agent.log_since(mark).lines().filter(|line| line.contains(what)).map(str::to_owned).collect::<Vec<_>>();
        wait::until_true("it to be told", || !told().is_empty())?;
        let lines = told();
        ensure!(lines.len() == 1 && lines.iter().all(|line| line.contains("t/strange.t.svc.cluster.local")), "{lines:?}");
    }
    for name in ["strange", "stranger"] {
        world.istiod.remove(ADDRESS_TYPE, &format!("t/{name}.t.svc.cluster.local"));
    }
    world.istiod.forget_nacks();
    Ok(())
}

fn without_a_control_plane_all_goes_on(world: &mut World) -> anyhow::Result<()> {
    world.istiod.away(true);
    let connected = |world: &World, value: i64| {
        wait::until_true("the metric to tell", || {
            world
                .agent("node-a")
                .and_then(Agent::metrics)
                .is_ok_and(|page| page.sum("culvert_xds_connected", &[]) as i64 == value)
        })
    };
    connected(world, 0)?;
    for _ in 0..20 {
        ensure!(world.call("client", world.web())? == "web");
    }
    ensure!(world.call("other", world.web()).is_err(), "its policies hold");
    world.agent("node-b")?.wait_ready(Duration::from_secs(40)).context("an agent with a last good state is ready")?;
    world.istiod.away(false);
    connected(world, 1)
}

/// 200 connections a second go on over several lives of the certificates of both ends, in which the authority is away for half of one.
/// `CULVERT_SOAK` says for how many minutes, with certificates of one.
fn short_lived_certificates_change_under_load(world: &mut World) -> anyhow::Result<()> {
    let soak = skip::soak_minutes();
    let (life, lives) = soak.map_or((Duration::from_secs(6), 3), |minutes| (Duration::from_mins(1), minutes));
    world.istiod.lifetime(life);
    // The ones in use live for an hour; a restarted agent asks for new ones.
    world.b = None;
    world.b = Some(world.start("node-b", &ON_B)?);
    world.a = None;
    world.a = Some(world.start("node-a", &["client", "other"])?);
    let before = world.istiod.seen().identities.len();
    let (stop, pace) = (AtomicBool::new(false), Pace::new(200));
    let world = &*world;
    let counts = std::thread::scope(|scope| {
        let callers = [(); 16].map(|()| {
            scope.spawn(|| -> anyhow::Result<(usize, Duration)> {
                let (mut calls, mut slowest) = (0, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    pace.wait();
                    let begun = Instant::now();
                    world.call("client", world.web()).with_context(|| format!("after {calls} calls"))?;
                    slowest = slowest.max(begun.elapsed());
                    calls += 1;
                }
                Ok((calls, slowest))
            })
        });
        let begun = Instant::now();
        let away = CaManner { refuse: Some((14, "away".into())), ..CaManner::default() };
        for (manner, until) in [(CaManner::default(), life), (away, life * 3 / 2), (CaManner::default(), life * lives)] {
            world.istiod.ca(manner);
            while begun.elapsed() < until && !callers.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        stop.store(true, Ordering::Relaxed);
        callers.map(|caller| caller.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a caller panicked"))))
    });
    world.istiod.ca(CaManner::default());
    let (mut total, mut slowest) = (0, Duration::ZERO);
    for count in counts {
        let (calls, longest) = count?;
        ensure!(calls > 5, "too few calls to tell");
        total += calls;
        slowest = slowest.max(longest);
    }
    let offered = pace.judge(total, soak.is_some())?;
    let asked = world.istiod.seen().identities.len() - before;
    ensure!(asked >= 9, "for three identities over several lives certificates were asked for {asked} times");
    println!("{offered}; the slowest took {slowest:?}; {asked} requests for certificates of {} s", life.as_secs());
    world.istiod.lifetime(Duration::from_hours(1));
    Ok(())
}

/// An agent that knows the pods of its node only, until somebody calls others: by name, by address; and who is none of the mesh.
fn on_demand_what_is_called_is_asked_for(world: &mut World) -> anyhow::Result<()> {
    world.a = None;
    let cni = CniAgent::listen(&world.files.path().join("node-a.sock"))?;
    let agent = world.spec("node-a").env("XDS_ON_DEMAND", "true").start(world.topology.node("node-a"))?;
    world.a = Some(world.enrol("node-a", agent, cni, &["client", "other"])?);
    let knows = |world: &World, name: &str| -> anyhow::Result<bool> {
        let dump = world.agent("node-a")?.config_dump()?;
        Ok(dump["workloads"].as_array().into_iter().flatten().any(|w| w["name"] == name))
    };
    ensure!(knows(world, "client")? && !knows(world, "web")?, "it knows its own pods");
    let before = world.istiod.seen().asked.len();
    let answer = ask(world.topology.pod("client"), "web.t.svc.cluster.local")?;
    ensure!(answer.ends_with(&VIP.0), "the answer is {answer:?}");
    ensure!(knows(world, "web")? && !knows(world, "v1")?, "a service comes with its endpoints, and with nothing else");
    ensure!(world.call("client", VIP.into())? == "web" && world.call("other", world.web()).is_err());
    let outside = world.topology.host("outside");
    let _plain = Server::start(outside, PORT)?;
    ensure!(world.call("client", outside.at(PORT))? == "outside", "what is not of the mesh is reached as it is");
    let mark = world.agent("node-a")?.mark();
    let v1 = world.topology.pod("v1");
    let _server = Server::start(v1, ALSO)?;
    ensure!(world.call("client", v1.at(ALSO))? == "v1");
    world.agent("node-a")?.wait_access("a tunnel", mark, |record| {
        record["direction"] == "outbound" && record["dst.identity"] == "spiffe://cluster.local/ns/t/sa/v1"
    })?;
    let asked = world.istiod.seen().asked.split_off(before);
    for name in ["t/web.t.svc.cluster.local".to_owned(), format!("/{}", outside.v4), format!("/{}", v1.v4)] {
        ensure!(asked.iter().filter(|asked| **asked == name).count() == 1, "{name} once: {asked:?}");
    }
    ensure!(!knows(world, "v2")?, "nobody called it");
    // Nobody answers: a destination that may be of the mesh is not reached around it.
    world.istiod.stall(true);
    let mark = world.agent("node-a")?.mark();
    ensure!(world.call("client", world.topology.pod("v2").at(PORT)).is_err());
    world.agent("node-a")?.wait_access("the refusal", mark, |record| record["reason"] == "unknown_workload")?;
    world.istiod.stall(false);
    world.a = None;
    world.a = Some(world.start("node-a", &["client", "other"])?);
    Ok(())
}

/// A CNI agent says a pod's names only, and istiod may be later than that: the pod is the one of these names, whatever cluster the agent
/// was told it is in.
fn a_wrong_cluster_id_is_told_and_keeps_nobody_out(world: &mut World) -> anyhow::Result<()> {
    let v1 = world.topology.pod("v1");
    let _server = Server::start(v1, ALSO)?;
    world.a = None;
    world.istiod.remove(ADDRESS_TYPE, "c1//Pod/t/other");
    let cni = CniAgent::listen(&world.files.path().join("node-a.sock"))?;
    let agent = world.spec("node-a").env("CLUSTER_ID", "wrong").start(world.topology.node("node-a"))?;
    world.a = Some(world.enrol("node-a", agent, cni, &["client", "other"])?);
    let other = Workload { cluster_id: "c1".into(), ..workload(world.topology.pod("other"), "node-a") };
    world.istiod.workload(other);
    wait::until_true("the pod to be served", || world.call("other", world.topology.pod("v1").at(ALSO)).is_ok())?;
    // Lines leave by a thread of their own: what is answered may be seen before what was said of it.
    let told = || -> Option<String> {
        let log = world.agent("node-a").ok()?.whole_log();
        let mut told = log.lines().filter(|line| line.contains("set CLUSTER_ID to istiod's"));
        told.next().filter(|line| line.contains("wrong") && line.contains("c1") && told.next().is_none()).map(str::to_owned)
    };
    wait::until_true("the one line that tells", || told().is_some())?;
    world.a = None;
    world.istiod.workload(workload(world.topology.pod("other"), "node-a"));
    world.a = Some(world.start("node-a", &["client", "other"])?);
    Ok(())
}

/// A peer of another trust domain gets in once that domain has told its roots at its endpoint, where a policy names it; and still does while
/// the endpoint is away.
fn a_federated_domain_is_believed_by_what_it_tells(world: &mut World) -> anyhow::Result<()> {
    const ENDPOINT: u16 = 8443;
    let peer = TestCa::unknown()?.issue("spiffe://far.example/ns/f/sa/traveller")?;
    let (web, outside) = (Authority::make()?, Arc::clone(world.topology.host("outside")));
    let endpoint = KeyServer::start(&outside, ENDPOINT, Some(&web))?;
    endpoint.behave(Manner::Status(503));
    world.b = None;
    let cni = CniAgent::listen(&world.files.path().join("node-b.sock"))?;
    let federation = format!("far.example=https://{}:{ENDPOINT}/bundle", outside.v4);
    // No list speaks of its certificates.
    let spec = world.spec("node-b").env("CULVERT_CRL_UNKNOWN", "allow");
    let spec = spec.env("CULVERT_FEDERATION", &federation).env("CULVERT_FEDERATION_ROOTS", web.pem());
    let agent = spec.start(world.topology.node("node-b"))?;
    world.b = Some(world.enrol("node-b", agent, cni, &ON_B)?);
    let mut allowed = from("client");
    allowed.principals.push(StringMatch { match_type: Some(MatchType::Exact("far.example/ns/f/sa/traveller".into())) });
    world.istiod.policy(&policy("t", "web-allow", security::Action::Allow, allowed));
    wait::until_true("the others to be served", || world.call("client", world.web()).is_ok())?;
    let travel = || -> anyhow::Result<()> {
        let tls = hbone::client_tls(&peer)?;
        let to = world.topology.pod("web");
        outside.netns.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let tunnel = Tunnel::connect(to.at(15008), &tls).await?;
                tunnel.open(&to.at(PORT).to_string()).await.map(drop)
            })
        })
    };
    let agent = world.agent("node-b")?;
    let is_up = |value: i64| {
        wait::until_true("the metric", || {
            agent
                .metrics()
                .is_ok_and(|page| page.sum("culvert_federation_up", &[("trust_domain", "far.example")]) as i64 == value)
        })
    };
    is_up(0)?;
    ensure!(agent.whole_log().contains("bundle of a federated trust domain cannot be had"), "{}", agent.log_tail(20));
    ensure!(travel().is_err(), "nobody told its roots");
    let root = CertificateDer::from_pem_slice(peer.root.as_bytes())?;
    let key = json!({ "kty": "EC", "use": "x509-svid", "crv": "P-256", "x": "", "y": "", "x5c": [STANDARD.encode(&root)] });
    endpoint.behave(Manner::With(json!({ "keys": [key], "spiffe_sequence": 1, "spiffe_refresh_hint": 1 }).to_string()));
    let mark = agent.mark();
    // Until then it is tried more and more seldom.
    wait::until("the peer to be believed", Duration::from_mins(1), || travel().ok()).with_context(|| agent.log_tail(20))?;
    agent.wait_access("who it was", mark, |r| {
        r["src.identity"] == "spiffe://far.example/ns/f/sa/traveller" && r["dst.hbone_addr"].is_string()
    })?;
    is_up(1)?;
    endpoint.behave(Manner::Status(503));
    is_up(0)?;
    travel().context("what it told last counts")?;
    world.istiod.policy(&policy("t", "web-allow", security::Action::Allow, from("client")));
    wait::until_true("it to be refused where no policy names it", || travel().is_err())?;
    world.b = None;
    world.b = Some(world.start("node-b", &ON_B)?);
    Ok(())
}

/// What the pod's own name server answers to a question for IPv4 addresses (RFC 1035 §4).
fn ask(place: &Place, name: &str) -> anyhow::Result<Vec<u8>> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let socket = place.netns.enter(|| std::net::UdpSocket::bind("127.0.0.1:0"))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.send_to(&query, "127.0.0.1:15053")?;
    let mut answer = vec![0; 512];
    let length = socket.recv(&mut answer).context("no answer of the name server")?;
    answer.truncate(length);
    Ok(answer)
}

fn a_restarted_agent_waits_for_the_control_plane(world: &mut World) -> anyhow::Result<()> {
    world.istiod.away(true);
    world.b = None;
    let cni = CniAgent::listen(&world.files.path().join("node-b.sock"))?;
    let agent = world.spec("node-b").start(world.topology.node("node-b"))?;
    wait::until_true("an attempt", || agent.whole_log().contains("the control plane is not heard"))?;
    ensure!(agent.wait_ready(Duration::from_millis(500)).is_err(), "ready without a mesh");
    world.istiod.away(false);
    world.b = Some(world.enrol("node-b", agent, cni, &ON_B)?);
    wait::until_true("calls through it", || world.call("client", world.web()).is_ok())?;
    for node in [&world.a, &world.b].into_iter().flatten() {
        ensure!(!node.agent.whole_log().contains("panicked"), "an agent panicked");
    }
    Ok(())
}
