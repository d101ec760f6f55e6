//! Ring 3: two nodes, real agents, real eBPF, real sockets. What layer 4 promises, seen from the pods, the logs, the metrics
//! and the admin pages; nothing here knows the product's insides.
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_binary, is_clean};
use mesh_tests::capture::Capture;
use mesh_tests::dev_ca::{Credentials, TestCa};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::program::{Client, Cut, End, Server, Sum, pattern};
use mesh_tests::suite::{self, CannotRun, Test, extended, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{netns, skip, wait};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

const PORT: u16 = 8080;
const WEB_VIP: ([u8; 4], u16) = ([10, 96, 0, 20], 80);
const WEB_VIP6: ([u16; 8], u16) = ([0xfd00, 0x96, 0, 0, 0, 0, 0, 0x20], 80);

const TESTS: &[Test<Mesh>] = &[
    test("an_allowed_call_shows_both_identities_in_both_logs", an_allowed_call_shows_both_identities_in_both_logs),
    test(
        "a_source_outside_the_allow_list_is_refused_with_its_reason",
        a_source_outside_the_allow_list_is_refused_with_its_reason,
    ),
    test("a_deny_policy_wins_over_an_allow_policy", a_deny_policy_wins_over_an_allow_policy),
    test("strict_refuses_plaintext_from_outside", strict_refuses_plaintext_from_outside),
    test("permissive_takes_plaintext_and_mutual_tls", permissive_takes_plaintext_and_mutual_tls),
    test("the_server_sees_the_original_source", the_server_sees_the_original_source),
    test("a_pod_calls_its_own_service", a_pod_calls_its_own_service),
    test("pods_of_one_node_talk_with_mutual_tls", pods_of_one_node_talk_with_mutual_tls),
    test("a_service_address_spreads_over_its_endpoints", a_service_address_spreads_over_its_endpoints),
    test("a_service_port_that_does_not_exist_is_refused", a_service_port_that_does_not_exist_is_refused),
    test("a_service_without_endpoints_is_refused", a_service_without_endpoints_is_refused),
    test("outside_addresses_are_passed_through", outside_addresses_are_passed_through),
    test("the_wire_carries_only_tls", the_wire_carries_only_tls),
    test("large_transfers_arrive_whole_both_ways", large_transfers_arrive_whole_both_ways),
    test("half_close_works_end_to_end", half_close_works_end_to_end),
    test("server_first_protocols_work", server_first_protocols_work),
    test("a_client_port_is_usable_again_at_once", a_client_port_is_usable_again_at_once),
    test("the_agents_port_numbers_elsewhere_are_ordinary_ports", the_agents_port_numbers_elsewhere_are_ordinary_ports),
    test("resets_are_passed_on_in_both_directions", resets_are_passed_on_in_both_directions),
    test("nothing_listening_is_refused_quickly", nothing_listening_is_refused_quickly),
    test("a_namespace_policy_cuts_a_live_connection", a_namespace_policy_cuts_a_live_connection),
    test("a_new_selector_policy_cuts_a_live_connection", a_new_selector_policy_cuts_a_live_connection),
    test("a_removed_workload_is_cut", a_removed_workload_is_cut),
    test("a_bad_object_is_rejected_alone", a_bad_object_is_rejected_alone),
    test("an_unusable_policy_denies_its_target", an_unusable_policy_denies_its_target),
    test("garbage_on_the_agents_ports_does_no_harm", garbage_on_the_agents_ports_does_no_harm),
    test("a_certificate_of_another_trust_domain_is_refused", a_certificate_of_another_trust_domain_is_refused),
    test("a_certificate_of_an_unknown_authority_is_refused", a_certificate_of_an_unknown_authority_is_refused),
    test("metrics_carry_istio_labels", metrics_carry_istio_labels),
    test("config_dump_has_the_shape_istioctl_reads", config_dump_has_the_shape_istioctl_reads),
    test("live_connections_are_listed", live_connections_are_listed),
    test("a_thousand_silent_connections_stop_nobody", a_thousand_silent_connections_stop_nobody),
    extended("ten_thousand_silent_connections_stop_nobody", ten_thousand_silent_connections_stop_nobody),
    extended("half_made_handshakes_from_many_addresses_stop_nobody", half_made_handshakes_from_many_addresses_stop_nobody),
    test("a_peer_that_stops_after_tls_is_ended", a_peer_that_stops_after_tls_is_ended),
    test("hundreds_of_connections_at_once", hundreds_of_connections_at_once),
    test("connections_leave_nothing_open", connections_leave_nothing_open),
    test("a_reader_that_stops_holds_up_nobody", a_reader_that_stops_holds_up_nobody),
    test("sigterm_ends_idle_connections_at_the_deadline", sigterm_ends_idle_connections_at_the_deadline),
    test("sigterm_drains_what_is_in_flight", sigterm_drains_what_is_in_flight),
    test("sigterm_drains_the_sources_agent_too", sigterm_drains_the_sources_agent_too),
    test("an_agent_is_not_ready_before_it_has_its_mesh", an_agent_is_not_ready_before_it_has_its_mesh),
    test("a_killed_agent_is_replaced_by_a_new_one", a_killed_agent_is_replaced_by_a_new_one),
    test(
        "the_plain_log_is_istios_line_and_quitquitquit_ends_the_agent",
        the_plain_log_is_istios_line_and_quitquitquit_ends_the_agent,
    ),
    extended("a_killed_agent_fails_closed", a_killed_agent_fails_closed),
    test("nothing_is_left_behind", nothing_is_left_behind),
];

fn main() -> ExitCode {
    suite::run("mesh_l4", skip::netns_unavailable(), set_up, TESTS)
}

/// The mesh all tests share. Fields are dropped in this order: agents before the topology they live in.
struct Mesh {
    agent_a: Option<Agent>,
    agent_b: Option<Agent>,
    servers: BTreeMap<&'static str, Server>,
    topology: Option<Topology>,
    dir: MeshDir,
    ca: TempDir,
    logs: TempDir,
}

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
kind: PeerAuthentication
metadata: { name: loose, namespace: t }
spec: { selector: { matchLabels: { app: loose } }, mtls: { mode: PERMISSIVE } }
";

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t }
spec:
  selector: { tier: web }
  clusterIP: 10.96.0.20
  clusterIPs: ["10.96.0.20", "fd00:96::20"]
  ipFamilies: [IPv4, IPv6]
  ports:
  - { name: tcp, port: 80, targetPort: 8080, protocol: TCP }
"#;

/// `client` by the trust domain's alias, `near` and `web` by its name; `other` not at all.
const WEB_ALLOW: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: web-allow, namespace: t }
spec:
  selector: { matchLabels: { tier: web } }
  action: ALLOW
  rules:
  - from:
    - source:
        principals: ["cluster.local/ns/t/sa/client", "test.local/ns/t/sa/near", "test.local/ns/t/sa/web"]
"#;

fn id(account: &str) -> String {
    format!("spiffe://test.local/ns/t/sa/{account}")
}

fn set_up() -> anyhow::Result<Mesh> {
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-2")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "other", "other", &[])
        .pod("node-a", "t", "near", "near", &[])
        .pod("node-b", "t", "web1", "web", &["tier=web"])
        .pod("node-b", "t", "web2", "web", &["tier=web"])
        .pod("node-b", "t", "victim", "victim", &[])
        .pod("node-b", "t", "loose", "loose", &[])
        .host("outside")
        .host("visitor")
        .build()?;
    let dir = MeshDir::empty()?;
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    dir.put("02-service.yaml", SERVICE)?;
    dir.put("03-web-allow.yaml", WEB_ALLOW)?;
    for pod in &topology.plan().pods {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let mut servers = BTreeMap::new();
    for name in ["client", "near", "web1", "web2", "victim", "loose"] {
        servers.insert(name, Server::start(topology.pod(name), PORT)?);
    }
    servers.insert("outside", Server::start(topology.host("outside"), PORT)?);
    let logs = match std::env::var_os("CULVERT_TEST_LOGS") {
        // For looking at a failure: the directory stays.
        Some(kept) => {
            let dir = TempDir::new_in(kept)?;
            println!("agent logs: {}", dir.path().display());
            let path = dir.keep();
            TempDir::new_in(path)?
        }
        None => netns::scratch("logs")?,
    };
    let mut mesh = Mesh { agent_a: None, agent_b: None, servers, topology: Some(topology), dir, ca: netns::scratch("ca")?, logs };
    mesh.agent_a = Some(mesh.start("node-a")?);
    mesh.agent_b = Some(mesh.start("node-b")?);
    mesh.a().wait_ready(Duration::from_secs(20))?;
    mesh.b().wait_ready(Duration::from_secs(20))?;
    Ok(mesh)
}

impl Mesh {
    #[expect(clippy::expect_used, reason = "only the last test takes it away")]
    fn topology(&self) -> &Topology {
        self.topology.as_ref().expect("the topology is there until the last test")
    }
    #[expect(clippy::expect_used, reason = "a test that stops an agent starts it again")]
    fn a(&self) -> &Agent {
        self.agent_a.as_ref().expect("agent a runs")
    }
    #[expect(clippy::expect_used, reason = "a test that stops an agent starts it again")]
    fn b(&self) -> &Agent {
        self.agent_b.as_ref().expect("agent b runs")
    }
    fn pod(&self, name: &str) -> &Arc<Place> {
        self.topology().pod(name)
    }
    fn outside(&self) -> &Arc<Place> {
        self.topology().host("outside")
    }
    fn spec(&self, node: &str) -> AgentSpec {
        AgentSpec::new(node, self.dir.path(), self.ca.path(), self.logs.path())
            .env("TRUST_DOMAIN", "test.local")
            .env("CULVERT_TRUST_DOMAIN_ALIASES", "cluster.local")
            .env("CONNECTION_TERMINATION_DEADLINE", "3s")
            .env("CULVERT_HANDSHAKE_TIMEOUT", "5s")
    }
    fn start(&self, node: &str) -> anyhow::Result<Agent> {
        self.spec(node).start(self.topology().node(node))
    }
    /// A call that must work; returns who answered.
    fn call(&self, from: &str, to: SocketAddr) -> anyhow::Result<String> {
        let (mut client, who) = Client::who(self.pod(from), to)?;
        client.ping("still there?")?;
        Ok(who.name)
    }
    /// Puts a policy for the time of the guard and waits until both agents know it.
    fn policy(&self, name: &str, yaml: &str) -> anyhow::Result<PolicyForNow<'_>> {
        self.dir.put(&format!("policy-{name}.yaml"), yaml)?;
        let guard = PolicyForNow { mesh: self, name: name.to_owned() };
        for agent in [self.a(), self.b()] {
            agent.wait_config(&format!("policy {name}"), |dump| has_policy(dump, name))?;
        }
        Ok(guard)
    }
}

/// Takes its policy away and waits until the agents have forgotten it, so that the next test starts clean.
struct PolicyForNow<'a> {
    mesh: &'a Mesh,
    name: String,
}
impl Drop for PolicyForNow<'_> {
    fn drop(&mut self) {
        self.mesh.dir.remove(&format!("policy-{}.yaml", self.name));
        for agent in [self.mesh.a(), self.mesh.b()] {
            if let Err(error) = agent.wait_config(&format!("policy {} to go", self.name), |dump| !has_policy(dump, &self.name)) {
                eprintln!("{error:#}");
            }
        }
    }
}

fn entries<'a>(dump: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    dump[list].as_array().into_iter().flatten()
}
fn has_policy(dump: &Value, name: &str) -> bool {
    entries(dump, "policies").any(|policy| policy["name"] == name && policy["namespace"] == "t")
}

/// The call must not get an answer, and must be told so promptly (reset or closed, not a timeout).
fn refused(from: &Place, to: SocketAddr) -> anyhow::Result<()> {
    let begun = Instant::now();
    match Client::open(from, to, "who").and_then(|mut client| client.line()) {
        Ok(answer) => bail!("{} → {to} was answered: {answer}", from.name),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
            bail!("{} → {to} was left hanging for {:?} instead of being refused", from.name, begun.elapsed())
        }
        Err(_reset_or_closed) => Ok(()),
    }
}

fn text<'a>(record: &'a Value, key: &str) -> &'a str {
    record[key].as_str().unwrap_or_default()
}
fn starts(record: &Value, key: &str, prefix: &str) -> bool {
    text(record, key).starts_with(prefix)
}

fn an_allowed_call_shows_both_identities_in_both_logs(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (mark_a, mark_b) = (mesh.a().mark(), mesh.b().mark());
    let web1 = mesh.pod("web1");
    ensure!(mesh.call("client", web1.at(PORT))? == "web1");
    let ours = |direction: &'static str| {
        move |record: &Value| {
            record["direction"] == direction
                && record["src.identity"] == id("client")
                && record["dst.identity"] == id("web")
                && record["error"].is_null()
        }
    };
    let out = mesh.a().wait_access("outbound", mark_a, ours("outbound"))?;
    let inbound = mesh.b().wait_access("inbound", mark_b, ours("inbound"))?;
    for record in [&out, &inbound] {
        ensure!(record["src.workload"] == "client" && record["src.namespace"] == "t", "{record}");
        ensure!(record["dst.workload"] == "web1" && record["dst.namespace"] == "t", "{record}");
        ensure!(starts(record, "dst.addr", &web1.at(15008).to_string()), "{record}");
        ensure!(starts(record, "dst.hbone_addr", &web1.at(PORT).to_string()), "{record}");
        ensure!(starts(record, "src.addr", &format!("{}:", mesh.pod("client").v4)), "{record}");
        ensure!(record["bytes_sent"].as_u64() > Some(0) && record["bytes_recv"].as_u64() > Some(0), "{record}");
        ensure!(text(record, "duration").ends_with("ms"), "{record}");
        ensure!(record["level"] == "info" && record["message"] == "connection complete", "{record}");
    }
    // Bytes are told from each agent's own side: what the client sent is what the outbound agent sent.
    ensure!(out["bytes_sent"] == 17 && inbound["bytes_recv"] == 17, "{out}\n{inbound}");
    Ok(())
}

fn a_source_outside_the_allow_list_is_refused_with_its_reason(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (mark_a, mark_b) = (mesh.a().mark(), mesh.b().mark());
    let failed = |agent: &Agent| -> anyhow::Result<f64> {
        Ok(agent.metrics()?.sum("istio_tcp_connections_failed_total", &[("reporter", "destination"), ("response_flags", "DENY")]))
    };
    let before = failed(mesh.b())?;
    refused(mesh.pod("other"), mesh.pod("web1").at(PORT))?;
    let record = mesh.b().wait_access("the refusal", mark_b, |record| {
        record["direction"] == "inbound" && record["src.identity"] == id("other") && starts(record, "error", "not_allowed")
    })?;
    ensure!(text(&record, "error").contains('('), "the refusal carries a hint: {record}");
    mesh.a().wait_access("the refusal, seen by the source", mark_a, |record| {
        record["direction"] == "outbound" && record["src.workload"] == "other" && !text(record, "error").is_empty()
    })?;
    wait::until_true("the DENY counter", || failed(mesh.b()).is_ok_and(|now| now > before))
}

fn a_deny_policy_wins_over_an_allow_policy(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    ensure!(mesh.call("near", web1)? == "web1", "near is allowed before");
    let policy = mesh.policy(
        "deny-near",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: deny-near, namespace: t }
spec:
  selector: { matchLabels: { tier: web } }
  action: DENY
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/near"] } }]
"#,
    )?;
    let mark = mesh.b().mark();
    refused(mesh.pod("near"), web1)?;
    mesh.b().wait_access("the refusal naming the policy", mark, |record| {
        starts(record, "error", "policy_denied") && text(record, "error").contains("t/deny-near")
    })?;
    ensure!(mesh.call("client", web1)? == "web1", "others stay allowed");
    drop(policy);
    ensure!(mesh.call("near", web1)? == "web1", "near is allowed again");
    Ok(())
}

fn strict_refuses_plaintext_from_outside(mesh: &mut Mesh) -> anyhow::Result<()> {
    for at in [mesh.pod("victim").at(PORT), mesh.pod("victim").at6(PORT)] {
        let mark = mesh.b().mark();
        refused(mesh.outside(), at)?;
        let record = mesh.b().wait_access("the refusal", mark, |record| starts(record, "error", "plaintext_refused"))?;
        ensure!(record["direction"] == "inbound" && record["src.identity"].is_null(), "{record}");
    }
    Ok(())
}

fn permissive_takes_plaintext_and_mutual_tls(mesh: &mut Mesh) -> anyhow::Result<()> {
    let loose = mesh.pod("loose");
    for (at, source) in [(loose.at(PORT), IpAddr::from(mesh.outside().v4)), (loose.at6(PORT), mesh.outside().v6.into())] {
        let (mut client, who) = Client::who(mesh.outside(), at)?;
        client.ping("plain")?;
        ensure!(who.name == "loose" && who.peer.ip() == source && who.local == at, "{who:?}");
    }
    let mark = mesh.b().mark();
    ensure!(mesh.call("client", loose.at(PORT))? == "loose");
    mesh.b().wait_access("mutual TLS to a permissive pod", mark, |record| record["src.identity"] == id("client"))?;
    Ok(())
}

fn the_server_sees_the_original_source(mesh: &mut Mesh) -> anyhow::Result<()> {
    let client = mesh.pod("client");
    for (to, source) in [
        (mesh.pod("web1").at(PORT), IpAddr::from(client.v4)),
        (mesh.pod("web1").at6(PORT), client.v6.into()),
        (mesh.pod("near").at(PORT), client.v4.into()),
        (mesh.pod("near").at6(PORT), client.v6.into()),
    ] {
        let (_open, who) = Client::who(client, to)?;
        ensure!(who.peer.ip() == source, "{to} sees {} instead of {source}", who.peer);
        ensure!(who.local == to, "{to} is reached as {}", who.local);
    }
    Ok(())
}

fn a_pod_calls_its_own_service(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mut seen = BTreeMap::new();
    for _ in 0..64 {
        *seen.entry(mesh.call("web1", WEB_VIP.into())?).or_insert(0) += 1;
        if seen.contains_key("web1") && seen.contains_key("web2") {
            break;
        }
    }
    ensure!(seen.contains_key("web1"), "web1 never answered itself in 64 calls: {seen:?}");
    // And by its own address.
    ensure!(mesh.call("web1", mesh.pod("web1").at(PORT))? == "web1");
    Ok(())
}

fn pods_of_one_node_talk_with_mutual_tls(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.a().mark();
    ensure!(mesh.call("client", mesh.pod("near").at(PORT))? == "near");
    for direction in ["outbound", "inbound"] {
        mesh.a().wait_access(direction, mark, |record| {
            record["direction"] == direction && record["src.identity"] == id("client") && record["dst.identity"] == id("near")
        })?;
    }
    Ok(())
}

fn a_service_address_spreads_over_its_endpoints(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.a().mark();
    for vip in [SocketAddr::from(WEB_VIP), WEB_VIP6.into()] {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..40 {
            *seen.entry(mesh.call("client", vip)?).or_default() += 1;
        }
        // Evenly weighted random choice: fewer than 5 of 40 has a probability below one in ten million.
        ensure!(seen.len() == 2 && seen.values().all(|count| *count >= 5), "{vip}: {seen:?}");
    }
    mesh.a().wait_access("the service's name", mark, |record| record["dst.service"] == "web.t.svc.cluster.local")?;
    Ok(())
}

fn a_service_port_that_does_not_exist_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.a().mark();
    refused(mesh.pod("client"), (WEB_VIP.0, 81).into())?;
    mesh.a().wait_access("the refusal", mark, |record| starts(record, "error", "no_such_port"))?;
    Ok(())
}

fn a_service_without_endpoints_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _guard = mesh.dir.put_for_now(
        "60-empty.yaml",
        r"
apiVersion: v1
kind: Service
metadata: { name: empty, namespace: t }
spec: { selector: { tier: nothing-has-this }, clusterIP: 10.96.0.40, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
",
    )?;
    mesh.a().wait_config("service empty", |dump| entries(dump, "services").any(|service| service["name"] == "empty"))?;
    let mark = mesh.a().mark();
    refused(mesh.pod("client"), SocketAddr::from(([10, 96, 0, 40], 80)))?;
    mesh.a().wait_access("the refusal", mark, |record| starts(record, "error", "no_healthy_endpoint"))?;
    Ok(())
}

fn outside_addresses_are_passed_through(mesh: &mut Mesh) -> anyhow::Result<()> {
    let client = mesh.pod("client");
    for (to, source) in [(mesh.outside().at(PORT), IpAddr::from(client.v4)), (mesh.outside().at6(PORT), client.v6.into())] {
        let mark = mesh.a().mark();
        let (mut open, who) = Client::who(client, to)?;
        open.ping("through")?;
        ensure!(who.name == "outside" && who.peer.ip() == source, "{who:?}");
        drop(open);
        let record = mesh.a().wait_access("the passed connection", mark, |record| starts(record, "dst.addr", &to.to_string()))?;
        ensure!(record["dst.identity"].is_null() && record["direction"] == "outbound" && record["error"].is_null(), "{record}");
    }
    Ok(())
}

fn the_wire_carries_only_tls(mesh: &mut Mesh) -> anyhow::Result<()> {
    const MARKER: &[u8] = b"culvert-plain-marker-7b1f";
    let marker = std::str::from_utf8(MARKER)?;
    let capture = Capture::start(&mesh.topology().node("node-a").netns, "eth0")?;
    let (mut client, _) = Client::who(mesh.pod("client"), mesh.pod("web1").at(PORT))?;
    for _ in 0..20 {
        client.ping(marker)?;
    }
    let (mut through, _) = Client::who(mesh.pod("client"), mesh.outside().at(PORT))?;
    through.ping(marker)?;
    drop((client, through));
    let captured = capture.finish();
    let (segments, tls) = captured.tls_on_port(15008);
    ensure!(segments > 20 && tls.encrypted > 20 && tls.stray == 0, "{segments} segments to 15008, read as {tls:?}");
    ensure!(!captured.contains_on_port(15008, MARKER), "the marker is readable on 15008");
    ensure!(captured.contains_on_port(PORT, MARKER), "the control: passed-through text is readable");
    ensure!(
        !captured
            .segments
            .iter()
            .any(|segment| segment.dst == mesh.pod("web1").at(PORT) || segment.src == mesh.pod("web1").at(PORT)),
        "something went to the pod outside the tunnel"
    );
    Ok(())
}

fn large_transfers_arrive_whole_both_ways(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 32 << 20;
    let data = pattern(SIZE);
    let expected = Sum::of(&data);
    for to in [mesh.pod("web1").at(PORT), mesh.pod("web2").at6(PORT), mesh.pod("near").at(PORT), mesh.outside().at(PORT)] {
        let mut client = Client::open(mesh.pod("client"), to, &format!("source {SIZE}"))?;
        ensure!(client.rest()? == expected, "down from {to}");
        drop(client);
        let mut client = Client::open(mesh.pod("client"), to, "sink")?;
        client.stream().write_all(&data)?;
        client.finish()?;
        ensure!(client.line()? == format!("{} {}", expected.bytes, expected.sum), "up to {to}");
    }
    Ok(())
}

fn half_close_works_end_to_end(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The client's half: the server answers only after it has seen the end of the client's data.
    let mut client = Client::open(mesh.pod("client"), mesh.pod("web1").at(PORT), "sink")?;
    client.stream().write_all(b"abc")?;
    client.finish()?;
    let sum = Sum::of(b"abc");
    ensure!(client.line()? == format!("{} {}", sum.bytes, sum.sum));
    ensure!(client.rest()?.bytes == 0, "then the server's end arrives as an end, not as a reset");
    // The server's half: it has closed its side and still reads ours.
    let server = &mesh.servers["web1"];
    let mut client = Client::open(mesh.pod("client"), mesh.pod("web1").at(PORT), "source 1000")?;
    ensure!(client.rest()?.bytes == 1000);
    client.stream().write_all(b"the other half is still open")?;
    client.finish()?;
    ensure!(server.wait_end("source 1000")? == End::Fin);
    Ok(())
}

fn server_first_protocols_work(mesh: &mut Mesh) -> anyhow::Result<()> {
    for (place, at) in [(mesh.pod("web1"), mesh.pod("web1").at(8081)), (mesh.outside(), mesh.outside().at6(8081))] {
        let listener = place.netns.listen((std::net::Ipv6Addr::UNSPECIFIED, 8081).into())?;
        let server = std::thread::spawn(move || -> std::io::Result<()> { listener.accept()?.0.write_all(b"220 ready\r\n") });
        let mut stream = mesh.pod("client").netns.connect(at, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut greeting = String::new();
        stream.read_to_string(&mut greeting).context("the server speaks first")?;
        ensure!(greeting == "220 ready\r\n", "{greeting:?}");
        server.join().map_err(|_panic| anyhow::anyhow!("the server panicked"))??;
    }
    Ok(())
}

fn a_client_port_is_usable_again_at_once(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The server closes first, so that TIME_WAIT is on the side of whoever stands for the server: the agent. Its sockets
    // must not swallow the client's next connection from the same port.
    let cases = [
        (mesh.pod("client"), mesh.pod("web1").at(PORT)),
        (mesh.pod("client"), mesh.pod("near").at6(PORT)),
        (mesh.pod("client"), mesh.outside().at(PORT)),
        (mesh.outside(), mesh.pod("loose").at(PORT)),
        (mesh.outside(), mesh.pod("loose").at6(PORT)),
    ];
    for (number, (from, to)) in cases.into_iter().enumerate() {
        for round in 0..3 {
            let port = 45_100 + number as u16;
            let mut stream = from
                .netns
                .enter(|| -> std::io::Result<TcpStream> {
                    let domain = socket2::Domain::for_address(to);
                    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
                    socket.set_reuse_address(true)?;
                    let own =
                        if to.is_ipv4() { SocketAddr::from(([0, 0, 0, 0], port)) } else { SocketAddr::from(([0_u16; 8], port)) };
                    socket.bind(&own.into())?;
                    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
                    Ok(socket.into())
                })
                .with_context(|| format!("connection {round} from {} port {port} to {to}", from.name))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            // Anything but a command is answered with `?` and closed by the server.
            stream.write_all(b"close first\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).with_context(|| format!("answer {round} to {} from {to}", from.name))?;
            ensure!(answer == "?\n", "{answer:?}");
        }
    }
    Ok(())
}

fn the_agents_port_numbers_elsewhere_are_ordinary_ports(mesh: &mut Mesh) -> anyhow::Result<()> {
    for port in [15001, 15006, 15008] {
        let _server = Server::start(mesh.outside(), port)?;
        let (_open, who) = Client::who(mesh.pod("client"), mesh.outside().at(port))?;
        ensure!(who.name == "outside");
    }
    Ok(())
}

fn resets_are_passed_on_in_both_directions(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let mut client = Client::open(mesh.pod("client"), web1, "reset")?;
    ensure!(client.wait_cut()? == Cut::Reset, "the server's reset reaches the client as a reset");

    let mut client = Client::open(mesh.pod("client"), web1, "drip 7")?;
    client.stream().write_all(b"x")?;
    let mut byte = [0];
    client.stream().read_exact(&mut byte)?;
    client.reset()?;
    ensure!(mesh.servers["web1"].wait_end("drip 7")? == End::Reset, "the client's reset reaches the server as a reset");
    Ok(())
}

fn nothing_listening_is_refused_quickly(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.b().mark();
    let begun = Instant::now();
    refused(mesh.pod("client"), mesh.pod("web1").at(9))?;
    ensure!(begun.elapsed() < Duration::from_secs(5), "it took {:?}", begun.elapsed());
    mesh.b().wait_access("the failed delivery", mark, |record| starts(record, "error", "connect_failed"))?;
    Ok(())
}

const DENY_CLIENT: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: deny-client, namespace: t }
spec:
  action: DENY
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/client"] } }]
    to: [{ operation: { ports: ["8080"] } }]
"#;

fn a_namespace_policy_cuts_a_live_connection(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), web1)?;
    let (mut unaffected, _) = Client::who(mesh.pod("near"), web1)?;
    live.ping("before")?;
    let mark = mesh.b().mark();
    let policy = mesh.policy("deny-client", DENY_CLIENT)?;
    live.wait_cut()?;
    let record =
        mesh.b().wait_access("the cut", mark, |record| record["src.identity"] == id("client") && !record["error"].is_null())?;
    ensure!(text(&record, "error").contains("revoked") || text(&record, "error").contains("policy_denied"), "{record}");
    unaffected.ping("the neighbour's connection lives on")?;
    drop(policy);
    ensure!(mesh.call("client", web1)? == "web1", "allowed again");
    Ok(())
}

fn a_new_selector_policy_cuts_a_live_connection(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The victim has no policy of its own until now; upstream misses exactly this case.
    let victim = mesh.pod("victim").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), victim)?;
    live.ping("before")?;
    let policy = mesh.policy(
        "victim-only-near",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: victim-only-near, namespace: t }
spec:
  selector: { matchLabels: { app: victim } }
  action: ALLOW
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/near"] } }]
"#,
    )?;
    live.wait_cut()?;
    refused(mesh.pod("client"), victim)?;
    ensure!(mesh.call("near", victim)? == "victim");
    drop(policy);
    ensure!(mesh.call("client", victim)? == "victim", "allowed again");
    Ok(())
}

fn a_removed_workload_is_cut(mesh: &mut Mesh) -> anyhow::Result<()> {
    let victim = mesh.pod("victim").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), victim)?;
    live.ping("before")?;
    mesh.dir.remove("pod-victim.yaml");
    let cut = live.wait_cut();
    mesh.dir.put("pod-victim.yaml", &mesh.topology().pod_yaml("victim", &[]))?;
    cut?;
    wait::until_true("the pod to be served again", || mesh.call("client", victim).is_ok())?;
    mesh.b().wait_ready(Duration::from_secs(10))
}

fn problems(dump: &Value) -> Vec<String> {
    entries(dump, "problems").map(ToString::to_string).collect()
}

fn a_bad_object_is_rejected_alone(mesh: &mut Mesh) -> anyhow::Result<()> {
    ensure!(problems(&mesh.a().config_dump()?).is_empty(), "no problems before: {:?}", problems(&mesh.a().config_dump()?));
    // One file, a bad object between two good ones.
    let guard = mesh.dir.put_for_now(
        "50-mixed.yaml",
        r"
apiVersion: v1
kind: Service
metadata: { name: good-one, namespace: t }
spec: { selector: { tier: web }, clusterIP: 10.96.0.31, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
---
apiVersion: v1
kind: Service
metadata: { name: bad, namespace: t }
spec: { selector: { tier: web }, clusterIP: 10.96.0.32, ports: [{ name: tcp, port: 99999, targetPort: 8080 }] }
---
apiVersion: v1
kind: Service
metadata: { name: good-two, namespace: t }
spec: { selector: { tier: web }, clusterIP: 10.96.0.33, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
",
    )?;
    mesh.a().wait_config("the rejected object", |dump| problems(dump).iter().any(|problem| problem.contains("50-mixed.yaml")))?;
    let dump = mesh.a().config_dump()?;
    let listed = problems(&dump);
    ensure!(listed.len() == 1 && listed[0].contains("bad") && listed[0].contains("port"), "{listed:?}");
    let problem = entries(&dump, "problems").next().context("one problem")?;
    ensure!(problem["line"].as_u64() > Some(5), "it names the line: {problem}");
    for last in [31, 33] {
        mesh.call("client", SocketAddr::from(([10, 96, 0, last], 80)))?;
    }
    drop(guard);
    mesh.a().wait_config("no problems", |dump| problems(dump).is_empty())?;

    // A file that is no YAML at all in place of a good one: what it held before keeps running.
    mesh.dir.put("02-service.yaml", "kind: Service\nspec: [unclosed\n  : :\n")?;
    let seen = mesh
        .a()
        .wait_config("the unreadable file", |dump| problems(dump).iter().any(|problem| problem.contains("02-service.yaml")));
    let call = mesh.call("client", WEB_VIP.into());
    mesh.dir.put("02-service.yaml", SERVICE)?;
    seen?;
    call.context("the old state runs on")?;
    mesh.a().wait_config("no problems", |dump| problems(dump).is_empty())
}

fn an_unusable_policy_denies_its_target(mesh: &mut Mesh) -> anyhow::Result<()> {
    let victim = mesh.pod("victim").at(PORT);
    ensure!(mesh.call("client", victim)? == "victim");
    let mark = mesh.b().mark();
    let guard = mesh.dir.put_for_now(
        "policy-unusable.yaml",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: unusable, namespace: t }
spec:
  selector: { matchLabels: { app: victim } }
  action: ALLOW
  rules:
  - from: [{ source: { ipBlocks: ["10.244.0.0/99"] } }]
"#,
    )?;
    mesh.b().wait_config("the rejected policy", |dump| {
        problems(dump).iter().any(|problem| problem.contains("policy-unusable.yaml"))
    })?;
    wait::until_true("the target to be denied", || refused(mesh.pod("client"), victim).is_ok())?;
    // The first refusal may have been a connection cut in the very moment of the change; the next is judged from its start.
    refused(mesh.pod("client"), victim)?;
    mesh.b().wait_access("the refusal", mark, |record| starts(record, "error", "policy_unusable"))?;
    ensure!(mesh.call("client", mesh.pod("web1").at(PORT))? == "web1", "other workloads are not touched");
    drop(guard);
    wait::until_true("the target to be served again", || mesh.call("client", victim).is_ok())
}

fn garbage_on_the_agents_ports_does_no_harm(mesh: &mut Mesh) -> anyhow::Result<()> {
    let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let web1 = mesh.pod("web1");
    for port in [15001, 15006, 15008] {
        for bytes in
            [noise.as_slice(), b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\xff\xff"]
        {
            for (from, to) in [
                (mesh.outside(), web1.at(port)),
                (mesh.outside(), web1.at6(port)),
                (web1, web1.at(port)),
                (web1, SocketAddr::from(([127, 0, 0, 1], port))),
                (mesh.pod("client"), web1.at(port)),
            ] {
                // Refusing the connection is as good as cutting it after the first bytes; only an answer that makes no
                // sense (or a dead agent, below) would be wrong.
                let Ok(mut stream) = from.netns.connect(to, Duration::from_secs(2)) else { continue };
                stream.set_read_timeout(Some(Duration::from_millis(300)))?;
                let _refused_is_fine = stream.write_all(bytes);
                let mut answer = [0; 64];
                let _cut_is_fine = stream.read(&mut answer);
            }
        }
    }
    for agent in [mesh.a(), mesh.b()] {
        ensure!(agent.ended().is_none(), "agent of {} ended:\n{}", agent.node(), agent.log_tail(20));
        ensure!(!agent.whole_log().contains("panicked"), "agent of {} panicked", agent.node());
    }
    ensure!(mesh.call("client", web1.at(PORT))? == "web1");
    Ok(())
}

/// A TLS handshake with the inbound port as a peer with these credentials; true when it (and a first read) went through.
fn tls_accepted(from: &Place, to: SocketAddr, credentials: &Credentials) -> anyhow::Result<bool> {
    let (mut tls, mut stream) = tls_to(from, to, credentials)?;
    // In TLS 1.3 the client is done before the server has looked at the client's certificate: only reading tells.
    let mut session = rustls::Stream::new(&mut tls, &mut stream);
    if session.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").is_err() {
        return Ok(false);
    }
    let mut byte = [0; 9];
    Ok(session.read_exact(&mut byte).is_ok())
}

fn tls_to(from: &Place, to: SocketAddr, credentials: &Credentials) -> anyhow::Result<(rustls::ClientConnection, TcpStream)> {
    let (cert, key) = credentials.der()?;
    let mut config = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_client_auth_cert(vec![cert], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    let name = rustls::pki_types::ServerName::IpAddress(to.ip().into());
    let tls = rustls::ClientConnection::new(Arc::new(config), name)?;
    let stream = from.netns.connect(to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok((tls, stream))
}

/// This client examines the agent's judgement, not the agent's certificate.
#[derive(Debug)]
struct AnyServer;
impl rustls::client::danger::ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![
            rustls::SignatureScheme::ECDSA_NISTP256_SHA256,
            rustls::SignatureScheme::ECDSA_NISTP384_SHA384,
            rustls::SignatureScheme::ED25519,
        ]
    }
}

fn a_certificate_of_another_trust_domain_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let ca = TestCa::of_dir(mesh.ca.path())?;
    let to = mesh.pod("web1").at(15008);
    for good in ["spiffe://test.local/ns/t/sa/client", "spiffe://cluster.local/ns/t/sa/client"] {
        ensure!(tls_accepted(mesh.outside(), to, &ca.issue(good)?)?, "the control: {good} is taken");
    }
    let mark = mesh.b().mark();
    // Signed by the right authority, but for somebody else's trust domain.
    ensure!(!tls_accepted(mesh.outside(), to, &ca.issue("spiffe://evil.example/ns/t/sa/client")?)?, "it was taken");
    wait::until_true("the refusal in the log", || mesh.b().log_since(mark).contains("trust_domain"))
}

fn a_certificate_of_an_unknown_authority_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.b().mark();
    let forged = TestCa::unknown()?.issue("spiffe://test.local/ns/t/sa/client")?;
    ensure!(!tls_accepted(mesh.outside(), mesh.pod("web1").at(15008), &forged)?, "it was taken");
    wait::until_true("the refusal in the log", || mesh.b().log_since(mark).contains("tls_failure"))
}

fn metrics_carry_istio_labels(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.call("client", WEB_VIP.into())?;
    let expected = [
        ("source_workload", "client"),
        ("source_workload_namespace", "t"),
        ("source_principal", "spiffe://test.local/ns/t/sa/client"),
        ("source_app", "client"),
        ("source_canonical_service", "client"),
        ("destination_workload_namespace", "t"),
        ("destination_principal", "spiffe://test.local/ns/t/sa/web"),
        ("destination_service", "web.t.svc.cluster.local"),
        ("destination_service_name", "web"),
        ("destination_service_namespace", "t"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let with = |reporter: &'static str| {
        let mut all = expected.to_vec();
        all.push(("reporter", reporter));
        all
    };
    for name in [
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_sent_bytes_total",
        "istio_tcp_received_bytes_total",
    ] {
        wait::until(&format!("{name} of the source"), wait::PATIENCE, || {
            (mesh.a().metrics().ok()?.sum(name, &with("source")) > 0.0).then_some(())
        })
        .with_context(|| similar(mesh.a(), name))?;
    }
    // At the destination the tunnel carries the pod's address: the service is the one the source chose.
    let at_destination: Vec<_> =
        with("destination").into_iter().filter(|(key, _)| !key.starts_with("destination_service")).collect();
    wait::until("the destination's counter", wait::PATIENCE, || {
        (mesh.b().metrics().ok()?.sum("istio_tcp_connections_opened_total", &at_destination) > 0.0).then_some(())
    })
    .with_context(|| similar(mesh.b(), "istio_tcp_connections_opened_total"))?;
    // Every series carries every label of the family: dashboards group by them.
    let metrics = mesh.a().metrics()?;
    let family: Vec<_> = metrics.0.iter().filter(|series| series.name == "istio_tcp_connections_opened_total").collect();
    for series in family {
        for label in
            ["source_cluster", "destination_cluster", "source_version", "destination_version", "destination_canonical_revision"]
        {
            ensure!(series.labels.contains_key(label), "{label} is missing in {series:?}");
        }
    }
    Ok(())
}

fn similar(agent: &Agent, name: &str) -> String {
    let page = agent.metrics().unwrap_or_default();
    let lines: Vec<String> =
        page.0.iter().filter(|series| series.name == name).map(|series| format!("{:?}", series.labels)).collect();
    format!("series of {name} on {}:\n{}", agent.node(), lines.join("\n"))
}

fn config_dump_has_the_shape_istioctl_reads(mesh: &mut Mesh) -> anyhow::Result<()> {
    let dump = mesh.b().config_dump()?;
    for list in ["workloads", "services", "policies", "certificates", "problems"] {
        ensure!(dump[list].is_array(), "`{list}` is not a list");
    }
    for object in ["workloadState", "version", "config"] {
        ensure!(dump[object].is_object(), "`{object}` is not an object");
    }
    let workload = entries(&dump, "workloads").find(|workload| workload["name"] == "web1").context("workload web1")?;
    ensure!(workload["namespace"] == "t" && workload["serviceAccount"] == "web" && workload["node"] == "node-b", "{workload}");
    ensure!(workload["protocol"] == "HBONE", "{workload}");
    ensure!(
        workload["workloadIps"].as_array().is_some_and(|ips| ips.contains(&mesh.pod("web1").v4.to_string().into())),
        "{workload}"
    );
    let service = entries(&dump, "services").find(|service| service["name"] == "web").context("service web")?;
    ensure!(service["hostname"] == "web.t.svc.cluster.local" && service["namespace"] == "t", "{service}");
    ensure!(has_policy(&dump, "web-allow"), "policies: {}", dump["policies"]);
    let certificate = entries(&dump, "certificates").find(|one| one["identity"] == id("web")).context("certificate of web")?;
    ensure!(certificate["state"] == "Available", "{certificate}");
    let chain = certificate["certChain"].as_array().context("certChain")?;
    for field in ["pem", "serialNumber", "validFrom", "expirationTime"] {
        ensure!(chain.first().is_some_and(|one| one[field].is_string()), "certChain[0].{field}: {certificate}");
    }
    // Only the pods of this node are served, each by name.
    let state = dump["workloadState"].as_object().context("workloadState")?;
    let mut served: Vec<&str> = state.values().map(|one| text(&one["info"], "name")).collect();
    served.sort_unstable();
    ensure!(served == ["loose", "victim", "web1", "web2"], "{served:?}");
    ensure!(state.values().all(|one| one["state"] == "Up" && one["info"]["namespace"] == "t"), "{}", dump["workloadState"]);
    ensure!(!dump.to_string().contains("PRIVATE KEY"), "a private key is in the dump");
    Ok(())
}

fn live_connections_are_listed(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (open, _) = Client::who(mesh.pod("client"), web1)?;
    let listed = |agent: &Agent, pod: &str, direction: &str| {
        let (pod, direction) = (pod.to_owned(), direction.to_owned());
        agent.wait_config(&format!("the connection in {direction} of {pod}"), move |dump| {
            dump["workloadState"].as_object().into_iter().flatten().any(|(_, one)| {
                one["info"]["name"] == pod.as_str()
                    && one["connections"][&direction].as_array().into_iter().flatten().any(|connection| {
                        [&connection["originalDst"], &connection["actualDst"]]
                            .iter()
                            .any(|addr| addr.as_str() == Some(web1.to_string().as_str()))
                            && (connection["protocol"] == "HBONE")
                    })
            })
        })
    };
    listed(mesh.a(), "client", "outbound")?;
    listed(mesh.b(), "web1", "inbound")?;
    drop(open);
    mesh.a().wait_config("the closed connection to go", |dump| {
        dump["workloadState"].as_object().into_iter().flatten().all(|(_, one)| {
            one["connections"]["outbound"]
                .as_array()
                .into_iter()
                .flatten()
                .all(|connection| connection["originalDst"] != web1.to_string())
        })
    })
}

fn a_thousand_silent_connections_stop_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    silent_connections(mesh, 1000)
}
fn ten_thousand_silent_connections_stop_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    silent_connections(mesh, 10_000)
}

/// Half of them say nothing, half stop in the middle of a TLS hello. Meanwhile others must be served, and afterwards
/// descriptors and memory must come back.
fn silent_connections(mesh: &Mesh, count: usize) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    if soft < (count + 500) as u64 {
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
        if hard < (count + 500) as u64 {
            bail!(CannotRun(format!("{count} connections need more than the {hard} open files allowed here")));
        }
    }
    mesh.call("client", web1)?;
    let (fds, rss) = (mesh.b().open_fds()?, mesh.b().rss_kib()?);
    let to = mesh.pod("web1").at(15008);
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let silent: Vec<TcpStream> = mesh.outside().netns.enter(|| -> anyhow::Result<Vec<TcpStream>> {
        let mut open = Vec::with_capacity(count);
        for number in 0..count {
            // The agent may stop accepting at its limit; then it must still serve, which is what is asked below.
            let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_secs(2)) else { break };
            if number % 2 == 0 {
                let _refused_is_fine = stream.write_all(&hello);
            }
            open.push(stream);
        }
        Ok(open)
    })?;
    ensure!(silent.len() >= count.min(1000) / 2, "only {} silent connections were possible", silent.len());
    for _ in 0..20 {
        let begun = Instant::now();
        ensure!(mesh.call("client", web1)? == "web1");
        ensure!(mesh.call("client", WEB_VIP.into())?.starts_with("web"));
        ensure!(begun.elapsed() < Duration::from_secs(2), "two calls took {:?} beside the silent ones", begun.elapsed());
    }
    // A new peer, which has no tunnel yet, must get through too.
    let ca = TestCa::of_dir(mesh.ca.path())?;
    let visitor = mesh.topology().host("visitor");
    ensure!(tls_accepted(visitor, to, &ca.issue("spiffe://test.local/ns/t/sa/client")?)?, "a new tunnel cannot be made");
    let made = silent.len();
    let peak = mesh.b().rss_kib()?;
    // They are not kept for ever: the agent itself ends them (its handshake timeout is 5 s here).
    wait::until("the agent to end silent connections", Duration::from_secs(20), || {
        mesh.b().open_fds().ok().filter(|now| *now <= fds + 8)
    })
    .with_context(|| format!("{fds} before, {:?} now, {made} were made", mesh.b().open_fds()))?;
    drop(silent);
    wait::until("descriptors to come back", Duration::from_secs(20), || mesh.b().open_fds().ok().filter(|now| *now <= fds + 8))
        .with_context(|| format!("{fds} before, {:?} now, {made} were made", mesh.b().open_fds()))?;
    // Allocators keep some of what they once had: what matters is that it is bounded and mostly given back.
    let allowed = rss + (8 * 1024).max(peak.saturating_sub(rss) / 2);
    wait::until("memory to come back", Duration::from_secs(30), || mesh.b().rss_kib().ok().filter(|now| *now <= allowed))
        .with_context(|| format!("{rss} KiB before, {peak} at the peak, {:?} now", mesh.b().rss_kib()))?;
    println!(
        "    {made} silent connections; fds {fds} → {}, RSS {rss} → {peak} → {} KiB",
        mesh.b().open_fds()?,
        mesh.b().rss_kib()?
    );
    Ok(())
}

/// One IPv6 host has as many addresses as it likes: shares counted by address alone do not hold it. Not true yet, and so not
/// among the tests that run by default: the newcomer waits until the handshake timeout frees a place.
fn half_made_handshakes_from_many_addresses_stop_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    let to = mesh.pod("web1").at6(15008);
    let sources: Vec<std::net::Ipv6Addr> =
        (0..40).map(|n| std::net::Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0xbad, n)).collect();
    let addresses: Vec<String> = sources.iter().map(|source| format!("addr add {source}/64 dev eth0 nodad")).collect();
    netns::ip_batch(&mesh.outside().netns, &addresses)?;
    let fds = mesh.b().open_fds()?;
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let held: Vec<TcpStream> = mesh.outside().netns.enter(|| -> anyhow::Result<Vec<TcpStream>> {
        let mut open = Vec::new();
        for source in &sources {
            for _ in 0..30 {
                let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
                socket.bind(&SocketAddr::from((*source, 0)).into())?;
                if socket.connect_timeout(&to.into(), Duration::from_secs(2)).is_err() {
                    continue;
                }
                let mut stream = TcpStream::from(socket);
                let _refused_is_fine = stream.write_all(&hello);
                open.push(stream);
            }
        }
        Ok(open)
    })?;
    ensure!(held.len() > 600, "only {} half-made handshakes were possible", held.len());
    let good = TestCa::of_dir(mesh.ca.path())?.issue("spiffe://test.local/ns/t/sa/client")?;
    let begun = Instant::now();
    let accepted = tls_accepted(mesh.topology().host("visitor"), mesh.pod("web1").at(15008), &good)?;
    let took = begun.elapsed();
    drop(held);
    wait::until("descriptors to come back", Duration::from_secs(20), || mesh.b().open_fds().ok().filter(|now| *now <= fds + 8))?;
    ensure!(accepted && took < Duration::from_secs(2), "a new tunnel beside them: accepted {accepted} after {took:?}");
    Ok(())
}

fn a_peer_that_stops_after_tls_is_ended(mesh: &mut Mesh) -> anyhow::Result<()> {
    let good = TestCa::of_dir(mesh.ca.path())?.issue("spiffe://test.local/ns/t/sa/client")?;
    let (mut tls, mut stream) = tls_to(mesh.outside(), mesh.pod("web1").at(15008), &good)?;
    tls.complete_io(&mut stream)?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    // No HTTP/2 preface follows. What the agent says first (session tickets, its settings) is read until it gives up.
    let begun = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) => ensure!(begun.elapsed() < Duration::from_secs(15), "it goes on talking"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => bail!("after {:?} it was still open: {error}", begun.elapsed()),
        }
    }
    Ok(())
}

fn hundreds_of_connections_at_once(mesh: &mut Mesh) -> anyhow::Result<()> {
    // More than one tunnel takes (100 streams), to two endpoints, so that tunnels are added while others are in use.
    let client = mesh.pod("client");
    let mut open = client.netns.enter(|| {
        std::thread::scope(|scope| {
            let batches: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| -> anyhow::Result<Vec<Client>> {
                        (0..50).map(|_| Ok(Client::who(client, WEB_VIP.into())?.0)).collect()
                    })
                })
                .collect();
            batches.into_iter().map(|batch| batch.join().expect("a batch does not panic")).collect::<anyhow::Result<Vec<_>>>()
        })
    })?;
    for (number, one) in open.iter_mut().flatten().enumerate() {
        one.ping(&format!("connection {number}"))?;
    }
    ensure!(open.iter().flatten().count() == 400);
    Ok(())
}

fn connections_leave_nothing_open(mesh: &mut Mesh) -> anyhow::Result<()> {
    let settle = |agent: &Agent, at_most: usize| {
        wait::until("descriptors to come back", wait::PATIENCE, || agent.open_fds().ok().filter(|now| *now <= at_most))
            .with_context(|| format!("{} has {:?}, wanted at most {at_most}", agent.node(), agent.open_fds()))
    };
    mesh.call("client", WEB_VIP.into())?;
    let before = [mesh.a().open_fds()?, mesh.b().open_fds()?];
    for _ in 0..150 {
        mesh.call("client", WEB_VIP.into())?;
        mesh.call("client", mesh.outside().at(PORT))?;
        refused(mesh.pod("other"), mesh.pod("web1").at(PORT))?;
        refused(mesh.outside(), mesh.pod("web1").at(PORT))?;
    }
    settle(mesh.a(), before[0] + 4)?;
    settle(mesh.b(), before[1] + 4)?;
    Ok(())
}

fn a_reader_that_stops_holds_up_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 256 << 20;
    let web1 = mesh.pod("web1").at(PORT);
    let before = [mesh.a().rss_kib()?, mesh.b().rss_kib()?];
    let mut stuck = Vec::new();
    for _ in 0..8 {
        let mut client = Client::open(mesh.pod("client"), web1, &format!("source {SIZE}"))?;
        let mut first = [0; 100];
        client.stream().read_exact(&mut first)?;
        stuck.push(client);
    }
    // On the same tunnel, others go on.
    let begun = Instant::now();
    for _ in 0..20 {
        ensure!(mesh.call("client", web1)? == "web1");
    }
    ensure!(begun.elapsed() < Duration::from_secs(4), "20 calls took {:?}", begun.elapsed());
    let mut moved = Client::open(mesh.pod("client"), web1, "source 8000000")?;
    ensure!(moved.rest()?.bytes == 8_000_000, "a transfer on the same tunnel ends");
    for (agent, before) in [mesh.a(), mesh.b()].into_iter().zip(before) {
        let grown = agent.rss_kib()?.saturating_sub(before);
        ensure!(grown < 96 * 1024, "{} grew by {grown} KiB for 8 readers that do not read", agent.node());
    }
    Ok(())
}

fn restart_b(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.agent_b = None;
    let again = mesh.start("node-b")?;
    again.wait_ready(Duration::from_secs(20))?;
    mesh.agent_b = Some(again);
    let web1 = mesh.pod("web1").at(PORT);
    wait::until_true("calls through the new agent", || mesh.call("client", web1).is_ok())
}

fn sigterm_ends_idle_connections_at_the_deadline(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (mut idle, _) = Client::who(mesh.pod("client"), mesh.pod("web1").at(PORT))?;
    idle.ping("open")?;
    let begun = Instant::now();
    let status = mesh.b().terminate(Duration::from_secs(10))?;
    let took = begun.elapsed();
    ensure!(is_clean(status), "the agent ended with {status}:\n{}", mesh.b().log_tail(20));
    ensure!(took > Duration::from_millis(2500) && took < Duration::from_secs(6), "it took {took:?} with a deadline of 3 s");
    idle.wait_cut().context("the idle connection is ended")?;
    restart_b(mesh)
}

fn sigterm_drains_what_is_in_flight(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 16 << 20;
    let web1 = mesh.pod("web1").at(PORT);
    // The transfer is under way: the first bytes are here, most are not.
    let mut client = Client::open(mesh.pod("client"), web1, &format!("source {SIZE}"))?;
    let mut first = [0; 1000];
    client.stream().read_exact(&mut first)?;
    mesh.b().signal(Signal::SIGTERM)?;
    // New connections stop once the agent is draining; only then the rest is fetched.
    wait::until_true("the agent to drain", || {
        let page = mesh_tests::http::get(&mesh.topology().node("node-b").netns, ([127, 0, 0, 1], 15021).into(), "/healthz/ready");
        !page.is_ok_and(|answer| answer.status == 200)
    })?;
    let rest = client.rest().context("the transfer that was in flight")?;
    drop(client);
    ensure!(rest.bytes as usize + first.len() == SIZE, "{} of {SIZE} bytes arrived", rest.bytes as usize + first.len());
    let status = mesh.b().wait_end(Duration::from_secs(15))?;
    ensure!(is_clean(status), "the agent ended with {status}:\n{}", mesh.b().log_tail(20));
    restart_b(mesh)
}

fn sigterm_drains_the_sources_agent_too(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 16 << 20;
    let web1 = mesh.pod("web1").at(PORT);
    let mut tunnel = Client::open(mesh.pod("client"), web1, &format!("source {SIZE}"))?;
    let mut through = Client::open(mesh.pod("client"), mesh.outside().at(PORT), &format!("source {SIZE}"))?;
    let mut first = [0; 1000];
    tunnel.stream().read_exact(&mut first)?;
    through.stream().read_exact(&mut first)?;
    mesh.a().signal(Signal::SIGTERM)?;
    wait::until_true("the agent to drain", || {
        let page = mesh_tests::http::get(&mesh.topology().node("node-a").netns, ([127, 0, 0, 1], 15021).into(), "/healthz/ready");
        !page.is_ok_and(|answer| answer.status == 200)
    })?;
    for (name, client) in [("tunnel", &mut tunnel), ("passthrough", &mut through)] {
        let rest = client.rest().with_context(|| format!("the transfer in flight, {name}"))?;
        ensure!(
            rest.bytes as usize + first.len() == SIZE,
            "{name}: {} of {SIZE} bytes arrived",
            rest.bytes as usize + first.len()
        );
    }
    drop((tunnel, through));
    let status = mesh.a().wait_end(Duration::from_secs(15))?;
    ensure!(is_clean(status), "the agent ended with {status}:\n{}", mesh.a().log_tail(20));
    mesh.agent_a = None;
    let again = mesh.start("node-a")?;
    again.wait_ready(Duration::from_secs(20))?;
    mesh.agent_a = Some(again);
    wait::until_true("calls through the new agent", || mesh.call("client", web1).is_ok())
}

fn an_agent_is_not_ready_before_it_has_its_mesh(mesh: &mut Mesh) -> anyhow::Result<()> {
    // A third agent, of a node without pods, whose folder does not exist yet.
    let place = mesh.topology().host("visitor");
    let folder = mesh.logs.path().join("later");
    let agent =
        AgentSpec::new("node-x", &folder, mesh.ca.path(), mesh.logs.path()).env("TRUST_DOMAIN", "test.local").start(place)?;
    let asked = || mesh_tests::http::get(&place.netns, ([127, 0, 0, 1], 15021).into(), "/healthz/ready");
    let answer = wait::until("an answer about readiness", wait::PATIENCE, || match agent.ended() {
        Some(status) => Some(Err(anyhow::anyhow!("it ended: {status}\n{}", agent.log_tail(5)))),
        None => asked().ok().map(Ok),
    })??;
    ensure!(answer.status == 500 && answer.body.starts_with("not ready, pending: "), "{answer:?}");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("base.yaml"), OBJECTS)?;
    agent.wait_ready(Duration::from_secs(10))?;
    ensure!(asked()?.body == "ready\n", "{:?}", asked());
    let status = agent.terminate(Duration::from_secs(5))?;
    ensure!(is_clean(status), "{status}");
    Ok(())
}

/// Kills agent b; what the application saw from outside while nobody was in charge; and starts it again.
fn kill_and_replace(mesh: &mut Mesh, while_dead: impl FnOnce(&Mesh) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), web1)?;
    mesh.b().signal(Signal::SIGKILL)?;
    mesh.b().wait_end(Duration::from_secs(5))?;
    live.wait_cut().context("a live connection notices")?;
    let seen = while_dead(mesh);
    restart_b(mesh)?;
    refused(mesh.outside(), web1).context("STRICT holds again")?;
    seen
}

fn a_killed_agent_is_replaced_by_a_new_one(mesh: &mut Mesh) -> anyhow::Result<()> {
    kill_and_replace(mesh, |_| Ok(()))
}

/// Not true yet, and so not among the tests that run by default: the redirection is not pinned, so that it ends with its
/// agent (`ebpf-loader`, Limits).
fn a_killed_agent_fails_closed(mesh: &mut Mesh) -> anyhow::Result<()> {
    kill_and_replace(mesh, |mesh| {
        let accepted = mesh.servers["web1"].accepted();
        let answered = Client::open(mesh.outside(), mesh.pod("web1").at(PORT), "who").and_then(|mut client| {
            client.stream().set_read_timeout(Some(Duration::from_secs(2)))?;
            client.line()
        });
        ensure!(
            answered.is_err() && mesh.servers["web1"].accepted() == accepted,
            "while the agent was dead, plaintext reached the STRICT pod: {answered:?}"
        );
        Ok(())
    })
}

fn the_plain_log_is_istios_line_and_quitquitquit_ends_the_agent(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.b().signal(Signal::SIGKILL)?;
    mesh.b().wait_end(Duration::from_secs(5))?;
    let plain = mesh.spec("node-b").env("LOG_FORMAT", "plain").start(mesh.topology().node("node-b"))?;
    plain.wait_ready(Duration::from_secs(20))?;
    mesh.agent_b = Some(plain);
    let web1 = mesh.pod("web1");
    wait::until_true("calls through the new agent", || mesh.call("client", web1.at(PORT)).is_ok())?;
    let expected = format!(
        "src.workload=\"client\" src.namespace=\"t\" src.identity=\"{}\" src.cluster=\"Kubernetes\" dst.addr={} dst.hbone_addr={} \
         dst.workload=\"web1\" dst.namespace=\"t\" dst.identity=\"{}\" dst.cluster=\"Kubernetes\" direction=\"inbound\" bytes_sent=",
        id("client"),
        web1.at(15008),
        web1.at(PORT),
        id("web"),
    );
    let line = wait::until("the plain access log line", wait::PATIENCE, || {
        mesh.b().whole_log().lines().find(|line| line.contains(&expected)).map(str::to_owned)
    })
    .with_context(|| format!("expected {expected}\nlog:\n{}", mesh.b().log_tail(5)))?;
    let columns: Vec<&str> = line.split('\t').collect();
    ensure!(columns.len() == 5 && columns[1..4] == ["info", "access", "connection complete"], "{line:?}");
    ensure!(columns[4].starts_with("src.addr=10.244.1.11:") && columns[4].contains(" duration=\""), "{line:?}");

    ensure!(mesh.b().admin_post("/logging?level=debug")?.status == 200, "/logging takes a level");
    ensure!(mesh.b().admin("/quitquitquit")?.status != 200, "a GET must not end the agent");
    ensure!(mesh.b().admin_post("/quitquitquit")?.status == 200);
    let status = mesh.b().wait_end(Duration::from_secs(10))?;
    ensure!(is_clean(status), "the agent ended with {status}");
    restart_b(mesh)
}

fn nothing_is_left_behind(mesh: &mut Mesh) -> anyhow::Result<()> {
    let paths: Vec<_> = mesh.topology().plan().pods.iter().map(|pod| mesh.pod(&pod.name).netns.path()).collect();
    for agent in [mesh.agent_a.take(), mesh.agent_b.take()].into_iter().flatten() {
        ensure!(!agent.whole_log().contains("panicked"), "agent of {} panicked", agent.node());
        agent.signal(Signal::SIGKILL)?;
        agent.wait_end(Duration::from_secs(5))?;
    }
    mesh.servers.clear();
    mesh.topology = None;
    for path in paths {
        ensure!(!path.exists(), "{} is still there", path.display());
    }
    Ok(())
}
