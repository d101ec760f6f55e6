//! Ring 3: names. A pod with a `resolv.conf` of its own asks as programs do (glibc) and by hand; the agent answers for the mesh and
//! passes on the rest from inside the pod.
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_binary};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::name_server::{A, AAAA, CNAME, NameServer, Reply, TXT, ask, ask_tcp};
use mesh_tests::program::{Program, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{netns, skip, wait};
use tempfile::TempDir;

const TESTS: &[Test<Names>] = &[
    test("glibc_finds_services_under_all_their_names", glibc_finds_services_under_all_their_names),
    test("services_are_answered_over_udp_and_tcp_and_both_families", services_are_answered_over_udp_and_tcp_and_both_families),
    test("headless_services_are_their_endpoints", headless_services_are_their_endpoints),
    test("service_entries_have_their_allocated_addresses", service_entries_have_their_allocated_addresses),
    test("the_pods_own_search_domains_are_taken_off", the_pods_own_search_domains_are_taken_off),
    test("the_rest_is_asked_of_the_pods_name_servers_from_the_pod", the_rest_is_asked_of_the_pods_name_servers_from_the_pod),
    test("long_answers_come_over_tcp", long_answers_come_over_tcp),
    test("garbage_and_silence_stop_nobody", garbage_and_silence_stop_nobody),
    test("questions_are_counted", questions_are_counted),
    test("the_families_of_istios_agent_are_shown", the_families_of_istios_agent_are_shown),
    test("name_servers_that_are_silent_are_a_failure_in_time", name_servers_that_are_silent_are_a_failure_in_time),
    test("after_cleanup_names_are_the_name_servers_again", after_cleanup_names_are_the_name_servers_again),
];

fn main() -> ExitCode {
    let cannot = skip::netns_unavailable().or_else(|| skip::command_missing("nft")).or_else(|| skip::command_missing("python3"));
    suite::run("dns", cannot, set_up, TESTS)
}

const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
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
---
apiVersion: v1
kind: Service
metadata: { name: headless, namespace: t }
spec: { selector: { app: web }, clusterIP: None, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: api, namespace: t }
spec: { hosts: [api.example.test], resolution: DNS, ports: [{ number: 443, name: tls, protocol: TLS }] }
status: { addresses: [{ value: 240.240.0.1, host: api.example.test }] }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: wild, namespace: t }
spec: { hosts: ["*.wild.test"], addresses: [240.240.0.2], ports: [{ number: 443, name: tls, protocol: TLS }] }
"#;

/// Dropped in this order.
struct Names {
    agent: Agent,
    name_server: Option<NameServer>,
    _alive: Program,
    _servers: Vec<Server>,
    topology: Topology,
    conf: TempDir,
    _dir: MeshDir,
    _ca: TempDir,
    _logs: TempDir,
}

fn set_up() -> anyhow::Result<Names> {
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "web", "web", &[])
        .host("names")
        .build()?;
    let (dir, ca, logs, conf) = (MeshDir::empty()?, netns::scratch("ca")?, netns::scratch("logs")?, netns::scratch("conf")?);
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    for pod in &topology.plan().pods {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let names = topology.host("names");
    let text = format!(
        "nameserver {}\nnameserver {}\nsearch t.svc.cluster.local svc.cluster.local cluster.local corp.test\noptions ndots:5 timeout:2\n",
        names.v4, names.v6
    );
    std::fs::write(conf.path().join("resolv.conf"), text)?;
    let client = topology.pod("client");
    let alive = Program::start(client, &mut in_pod(&conf, &["sleep", "600"]), None)?;
    let agent = AgentSpec::new("node-a", dir.path(), ca.path(), logs.path())
        .env("RUST_LOG", "info,dns=debug")
        .start(topology.node("node-a"))?;
    agent.wait_ready(Duration::from_secs(40))?;
    let servers = vec![Server::start(topology.pod("web"), 8080)?];
    let name_server = Some(NameServer::start(names)?);
    Ok(Names { agent, name_server, _alive: alive, _servers: servers, topology, conf, _dir: dir, _ca: ca, _logs: logs })
}

/// A program that sees the pod's own `resolv.conf`.
fn in_pod(conf: &TempDir, command: &[&str]) -> Command {
    let mut unshared = Command::new("unshare");
    let script = format!("mount --bind {}/resolv.conf /etc/resolv.conf && exec \"$@\"", conf.path().display());
    unshared.args(["--mount", "sh", "-c", &script, "sh"]).args(command);
    unshared
}

impl Names {
    fn client(&self) -> &Place {
        self.topology.pod("client")
    }
    fn server(&self) -> SocketAddr {
        self.topology.host("names").at(53)
    }
    fn ask(&self, name: &str, kind: u16) -> anyhow::Result<Reply> {
        ask(self.client(), self.server(), name, kind)
    }
    /// What a program in the pod finds.
    fn getaddrinfo(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let script = "import socket,sys\nfor a in sorted({a[4][0] for a in socket.getaddrinfo(sys.argv[1], 80, \
                      proto=socket.IPPROTO_TCP)}): print(a)";
        let out = self.client().netns.output(&mut in_pod(&self.conf, &["python3", "-c", script, name]))?;
        ensure!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8(out.stdout)?.lines().map(Into::into).collect())
    }
    fn asked(&self) -> Vec<(std::net::IpAddr, String)> {
        self.name_server.as_ref().map(NameServer::asked).unwrap_or_default()
    }
}

fn glibc_finds_services_under_all_their_names(names: &mut Names) -> anyhow::Result<()> {
    for name in ["web", "web.t", "web.t.svc", "web.t.svc.cluster.local", "web.t.svc.cluster.local."] {
        let found = names.getaddrinfo(name)?;
        ensure!(found == ["10.96.0.20", "fd00:96::20"], "{name}: {found:?}");
    }
    // A search domain behind a service's name may be the name of a pod behind it: that is asked, the service itself is not.
    let asked = names.asked();
    ensure!(!asked.iter().any(|(_, name)| name == "web.t.svc.cluster.local"), "the name server was asked: {asked:?}");
    Ok(())
}

fn services_are_answered_over_udp_and_tcp_and_both_families(names: &mut Names) -> anyhow::Result<()> {
    let host = names.topology.host("names");
    for server in [host.at(53), host.at6(53)] {
        for (kind, address) in [(A, "10.96.0.20"), (AAAA, "fd00:96::20")] {
            let udp = ask(names.client(), server, "web.t.svc.cluster.local", kind)?;
            ensure!(udp.addresses() == [address], "{server} over UDP: {udp:?}");
            let tcp = ask_tcp(names.client(), server, "WEB.t.svc.cluster.local", kind)?;
            ensure!(tcp.addresses() == [address], "{server} over TCP: {tcp:?}");
        }
    }
    Ok(())
}

fn headless_services_are_their_endpoints(names: &mut Names) -> anyhow::Result<()> {
    let web = names.topology.pod("web");
    let found = names.getaddrinfo("headless")?;
    ensure!(found == [web.v4.to_string(), web.v6.to_string()], "{found:?}");
    Ok(())
}

fn service_entries_have_their_allocated_addresses(names: &mut Names) -> anyhow::Result<()> {
    for (name, address) in [("api.example.test", "240.240.0.1"), ("a.wild.test", "240.240.0.2"), ("b.a.wild.test", "240.240.0.2")]
    {
        let found = names.getaddrinfo(name)?;
        ensure!(found == [address], "{name}: {found:?}");
    }
    let none = names.ask("api.example.test", AAAA)?;
    ensure!(none.code == 0 && none.answers.is_empty(), "a family it has no address of: {none:?}");
    Ok(())
}

fn the_pods_own_search_domains_are_taken_off(names: &mut Names) -> anyhow::Result<()> {
    for domain in ["t.svc.cluster.local", "corp.test"] {
        let asked = format!("api.example.test.{domain}");
        let reply = names.ask(&asked, A)?;
        let expected = [(asked, CNAME, "api.example.test"), ("api.example.test".into(), A, "240.240.0.1")];
        let expected = expected.map(|(name, kind, data)| (name, kind, data.to_owned()));
        ensure!(reply.answers == expected, "{reply:?}");
    }
    Ok(())
}

fn the_rest_is_asked_of_the_pods_name_servers_from_the_pod(names: &mut Names) -> anyhow::Result<()> {
    let found = names.getaddrinfo("host.outside.test")?;
    ensure!(found == ["2001:db8::7", "203.0.113.7"], "{found:?}");
    let text = names.ask("text.outside.test", TXT)?;
    ensure!(text.answers == [("text.outside.test".into(), TXT, "\u{5}hello".into())], "{text:?}");
    let nobody = names.ask("nobody.outside.test", A)?;
    ensure!(nobody.code == 3, "{nobody:?}");
    // Whichever server the application chose, its pod's is asked.
    let elsewhere = ask(names.client(), ([192, 0, 2, 253], 53).into(), "host.outside.test", A)?;
    ensure!(elsewhere.addresses() == ["203.0.113.7"], "{elsewhere:?}");
    let (client, v4) = (names.client(), names.client().v4);
    let asked = names.asked();
    let ours = asked.iter().all(|(from, _)| *from == v4 || *from == client.v6);
    ensure!(!asked.is_empty() && ours, "asked from elsewhere than the pod: {asked:?}");
    Ok(())
}

fn long_answers_come_over_tcp(names: &mut Names) -> anyhow::Result<()> {
    let cut = names.ask("large.outside.test", A)?;
    ensure!(cut.truncated && cut.answers.is_empty(), "{cut:?}");
    let whole = ask_tcp(names.client(), names.server(), "large.outside.test", A)?;
    ensure!(whole.addresses().len() == 100, "{} addresses", whole.addresses().len());
    let found = names.getaddrinfo("large.outside.test")?;
    ensure!(found.len() == 100, "glibc finds {} addresses", found.len());
    Ok(())
}

fn garbage_and_silence_stop_nobody(names: &mut Names) -> anyhow::Result<()> {
    let socket = names.client().netns.enter(|| UdpSocket::bind(("0.0.0.0", 0)))?;
    let mut noise: u32 = 7;
    for length in 0..600 {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 24) as u8
            })
            .collect();
        for to in [names.server(), ([127, 0, 0, 1], 15053).into()] {
            socket.send_to(&bytes, to)?;
        }
    }
    let silent: Vec<_> = (0..80)
        .map(|_| names.client().netns.connect(names.server(), Duration::from_secs(2)))
        .collect::<Result<_, _>>()
        .context("silent connections")?;
    ensure!(names.ask("web.t.svc.cluster.local", A)?.addresses() == ["10.96.0.20"], "UDP is not answered any more");
    drop(silent);
    wait::until_true("TCP to be answered again", || {
        ask_tcp(names.client(), names.server(), "web.t.svc.cluster.local", A).is_ok_and(|reply| reply.code == 0)
    })?;
    let log = names.agent.whole_log();
    ensure!(
        names.agent.ended().is_none() && !log.contains("panicked"),
        "the agent did not like it:\n{}",
        names.agent.log_tail(10)
    );
    Ok(())
}

fn questions_are_counted(names: &mut Names) -> anyhow::Result<()> {
    let labels = |kind, protocol| {
        [
            ("request_query_type", kind),
            ("request_protocol", protocol),
            ("source_canonical_service", "client"),
            ("source_canonical_revision", "latest"),
        ]
    };
    let metrics = names.agent.metrics()?;
    let count = |name: &str, kind, protocol| metrics.sum(name, &labels(kind, protocol));
    for (kind, protocol) in [("A", "udp"), ("AAAA", "udp"), ("A", "tcp"), ("TXT", "udp")] {
        ensure!(count("istio_dns_requests_total", kind, protocol) > 0.0, "no {kind} over {protocol} is counted");
    }
    let (all, passed) = (count("istio_dns_requests_total", "A", "udp"), count("istio_dns_upstream_requests_total", "A", "udp"));
    ensure!(passed > 0.0 && passed < all, "{passed} of {all} passed on");
    ensure!(count("istio_dns_upstream_request_duration_seconds_count", "A", "udp") > 0.0, "none was timed");
    Ok(())
}

/// Those a control plane has no part in (`mesh_istiod` has the others).
fn the_families_of_istios_agent_are_shown(names: &mut Names) -> anyhow::Result<()> {
    // A host that is known by its name alone: it is looked up for the connection, whether or not that has an answer.
    let client = &names.topology.pod("client").netns;
    let _held = client.connect(([240, 240, 0, 1], 443).into(), Duration::from_secs(5))?;
    let from = [("hostname", "api.example.test"), ("source_workload", "client"), ("source_workload_namespace", "t")];
    wait::until_true("the name to be looked up for a connection", || {
        names.agent.metrics().is_ok_and(|page| page.sum("istio_on_demand_dns_total", &from) > 0.0)
    })?;
    let page = names.agent.metrics()?;
    for family in [
        "istio_build",
        "istio_tcp_sockets_open",
        "istio_crl_policy_rejections_total",
        "istio_crl_untracked_connections_total",
        "istio_on_demand_dns_total",
        "istio_dns_requests_total",
        "istio_dns_upstream_requests_total",
        "istio_dns_upstream_failures_total",
        "istio_dns_upstream_request_duration_seconds_count",
        "workload_manager_active_proxy_count",
        "workload_manager_pending_proxy_count",
        "workload_manager_proxies_started_total",
        "workload_manager_proxies_stopped_total",
        "tokio_num_workers",
        "tokio_global_queue_depth",
        "tokio_num_alive_tasks",
        "tokio_worker_total_busy_duration_seconds_total",
        "tokio_worker_park_count_total",
        "tokio_worker_park_unpark_count_total",
        "process_open_fds",
        "process_max_fds",
    ] {
        ensure!(page.0.iter().any(|series| series.name == family), "{family} is missing");
    }
    for works in ["tokio_num_workers", "tokio_num_alive_tasks", "tokio_worker_total_busy_duration_seconds_total"] {
        ensure!(page.sum(works, &[]) > 0.0, "{works} is 0");
    }
    ensure!(page.sum("tokio_worker_park_count_total", &[("worker", "0")]) > 0.0, "the first thread never waited");
    Ok(())
}

fn name_servers_that_are_silent_are_a_failure_in_time(names: &mut Names) -> anyhow::Result<()> {
    let before = names.agent.metrics()?.sum("istio_dns_upstream_failures_total", &[]);
    let reply = names.ask("elsewhere.example", A)?;
    ensure!(reply.code == 2, "{reply:?}");
    // Two seconds a server, five in all: so counted, and not by a clock that a busy machine shares.
    let attempts = names.asked().iter().filter(|(_, name)| name == "elsewhere.example").count();
    ensure!((2..=3).contains(&attempts), "{attempts} questions to two silent servers");
    let after = names.agent.metrics()?.sum("istio_dns_upstream_failures_total", &[]);
    ensure!(after > before, "{before} failures, then {after}");
    Ok(())
}

fn after_cleanup_names_are_the_name_servers_again(names: &mut Names) -> anyhow::Result<()> {
    names.agent.terminate(Duration::from_secs(30))?;
    ensure!(ask(names.client(), names.server(), "host.outside.test", A).is_err(), "without an agent DNS went around it");
    let node = names.topology.node("node-a");
    let out = node.netns.spawn(Command::new(find_binary()?).args(["cleanup", "--node", "node-a"]))?.wait()?;
    ensure!(out.success(), "cleanup failed");
    let direct = names.ask("host.outside.test", A)?;
    ensure!(direct.addresses() == ["203.0.113.7"], "{direct:?}");
    Ok(())
}
