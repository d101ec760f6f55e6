//! `cargo xtask demo`: two nodes and seven pods as network namespaces, two real agents, a waypoint and an ingress gateway on the
//! zamaz mesh, real programs in the pods, and a guided tour of what layers 4 and 7 give. Every line with a tick was checked a moment before; the exit status is not
//! zero when one of them was false.
#![forbid(unsafe_code)]

mod operations;

use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{self, Agent, AgentSpec};
use mesh_tests::capture::Capture;
use mesh_tests::issuer::{KeyServer, Manner, SigningKey, now};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::meshctl::why_of_process;
use mesh_tests::otlp::{Collector, Span};
use mesh_tests::program::Program;
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{netns, skip, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const HELP: &str = "\
usage: demo [--keep | --clean]
  --keep   leave the mesh running at the end and say what to try
  --clean  remove meshes left running by --keep";

const API: &str = "zamaz-api-service.zamaz.svc.cluster.local";
const API_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 12);
const AUTH_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 13);
const REDIS_VIP: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 11);
/// Pods that serve HTTP.
const SERVERS: [&str; 4] = ["zamaz-frontend", "zamaz-api-stable", "zamaz-api-canary", "zamaz-auth"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut keep = false;
    for argument in &arguments {
        match argument.as_str() {
            "--keep" => keep = true,
            "--clean" => {
                println!("removed {} mesh(es)", netns::forget_kept());
                return ExitCode::SUCCESS;
            }
            _ => {
                eprintln!("{HELP}");
                return ExitCode::from(2);
            }
        }
    }
    if let Some(why) = skip::netns_unavailable() {
        eprintln!(
            "The demo makes network namespaces and loads eBPF programs into them, which the kernel allows only to root.\n\
             It cannot run here: {why}.\nTry `cargo xtask demo`, which asks sudo."
        );
        return ExitCode::from(2);
    }
    let begun = Instant::now();
    let mut tour = Tour { page: Page::new(), step: 0, failed: 0, checked: 0 };
    let outcome = run(&mut tour, keep);
    if let Err(error) = &outcome {
        say(&tour.page.red(&format!("\nThe demo stopped: {error:#}")));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let verdict = match (&outcome, tour.failed) {
        (Ok(()), 0) => tour.page.green(&format!("All {} checks hold.", tour.checked)),
        (Ok(()), failed) => tour.page.red(&format!("{failed} of {} checks FAILED.", tour.checked)),
        (Err(_), _) => tour.page.red("Not finished."),
    };
    say(&format!("\n{verdict} ({seconds:.1} s{})", if keep { "" } else { ", everything is cleaned up" }));
    if outcome.is_ok() && tour.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Output: colours only where a person looks at a terminal.
struct Page {
    colour: bool,
}

impl Page {
    fn new() -> Self {
        Self { colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
    fn green(&self, text: &str) -> String {
        self.paint("32", text)
    }
    fn red(&self, text: &str) -> String {
        self.paint("31;1", text)
    }
    fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }
    fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }
}

fn say(text: &str) {
    println!("{text}");
    let _closed_pipe = std::io::stdout().flush();
}

struct Tour {
    page: Page,
    step: usize,
    failed: usize,
    checked: usize,
}

/// Chapters of the tour, for "n of m".
const STEPS: usize = 20;

impl Tour {
    fn step(&mut self, title: &str) {
        self.step += 1;
        let head = format!("[{}/{STEPS}] {title}", self.step);
        say(&format!("\n{}", self.page.bold(&head)));
    }
    /// A claim with its proof.
    fn check(&mut self, holds: bool, claim: &str) {
        self.checked += 1;
        if holds {
            say(&format!("  {} {claim}", self.page.green("✓")));
        } else {
            self.failed += 1;
            say(&format!("  {} {claim}", self.page.red("✗ NOT TRUE:")));
        }
    }
    /// What a check is about: shown, and true because it was just read.
    fn show(&self, label: &str, text: &str) {
        say(&format!("    {} {text}", self.page.dim(&format!("{label:<13}"))));
    }
}

/// What runs. Fields are dropped in this order: programs and agents before the network they live in.
struct Mesh {
    programs: Vec<Program>,
    issuers: [Issuer; 2],
    collector: Collector,
    agents: Vec<Agent>,
    topology: Topology,
    dir: MeshDir,
    files: TempDir,
}

fn run(tour: &mut Tour, keep: bool) -> anyhow::Result<()> {
    say(&tour.page.bold("Culvert: the zamaz mesh, layers 4 and 7, without sidecars and without a control plane"));
    say("Running as root: network namespaces stand in for nodes and pods, and eBPF redirects the pods' traffic.");
    let redis = find_redis()?;

    tour.step("Two nodes, five applications, a waypoint, a gateway, and one host outside the mesh");
    let mut mesh = start(tour, redis.as_ref())?;
    tour.step("An allowed call: API → authentication service");
    allowed(tour, &mesh)?;
    tour.step("A denied call: reports → API, around the waypoint");
    denied(tour, &mesh)?;
    tour.step("A call from outside the mesh, in plaintext");
    outside(tour, &mesh)?;
    tour.step("What is on the wire between the nodes");
    wire(tour, &mesh)?;
    tour.step("Redis, outside the mesh");
    match &redis {
        Some(_) => external_redis(tour, &mesh)?,
        None => skip::skipped("demo: Redis", "redis is neither installed nor installable here"),
    }
    tour.step("A policy changes while a connection is open");
    policy_change(tour, &mesh)?;
    tour.step("Layer 7: the frontend calls the API through the waypoint");
    through_waypoint(tour, &mesh)?;
    tour.step("Layer 7: who may do what, by method and path");
    by_method_and_path(tour, &mesh)?;
    tour.step("Layer 7: roles, by tokens of two issuers whose keys rotate");
    roles(tour, &mesh)?;
    tour.step("Layer 7: a canary, by header and by weight; and a retry");
    canary(tour, &mesh)?;
    tour.step("Layer 7: a breaker opens and heals");
    breaker(tour, &mesh)?;
    tour.step("From outside, through the ingress gateway");
    ingress(tour, &mesh)?;
    tour.step("At the door: limits, headers, CORS, compression");
    at_the_door(tour, &mesh)?;
    tour.step("The open tunnels");
    tunnels(tour, &mesh)?;
    tour.step("The metrics");
    metrics(tour, &mesh)?;
    tour.step("The traces: 1 % of the requests, and 10 %");
    traces(tour, &mesh)?;
    tour.step("A running pod is enrolled by its label");
    operations::enrolled_live(tour, &mut mesh)?;
    tour.step("An agent is killed under load");
    operations::killed(tour, &mut mesh)?;
    tour.step("An agent is upgraded under load");
    operations::upgraded(tour, &mut mesh)?;

    if keep && tour.failed == 0 {
        leave_running(tour, mesh)?;
    }
    Ok(())
}

/// A Redis server program: its path and the name it must be called by.
struct Redis {
    program: PathBuf,
    name: &'static str,
}

/// Finds Redis or installs it, saying so. Debian's `redis-tools` holds the same program as `redis-server` (it acts by the
/// name it is called) without starting a service on this machine.
fn find_redis() -> anyhow::Result<Option<Redis>> {
    let find = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).chain([PathBuf::from("/usr/bin")]).map(|dir| dir.join(name)).find(|file| file.is_file())
    };
    let look = || -> Option<Redis> {
        find("redis-cli")?;
        let program = find("redis-server").or_else(|| find("redis-check-rdb"))?;
        Some(Redis { program, name: "redis-server" })
    };
    if let Some(found) = look() {
        return Ok(Some(found));
    }
    if skip::command_missing("apt-get").is_some() {
        return Ok(None);
    }
    say("Redis is not installed: installing Debian's redis-tools (apt-get; no service is started) ...");
    let install = || {
        Command::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends", "redis-tools"])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output()
    };
    if !install()?.status.success() {
        let _best_effort = Command::new("apt-get").args(["update", "-qq"]).stdin(Stdio::null()).output()?;
        let out = install()?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            say(&format!("  not installable here: {}", said.lines().last().unwrap_or_default()));
        }
    }
    Ok(look())
}

fn start(tour: &mut Tour, redis: Option<&Redis>) -> anyhow::Result<Mesh> {
    let binary = agent::find_binary()?;
    let zamaz = agent::workspace_dir().join("manifests/examples/zamaz");
    let topology = Plan::from_manifests(&zamaz)?.host("data").build()?;
    for node in &topology.plan().nodes {
        let pods: Vec<&str> =
            topology.plan().pods.iter().filter(|pod| pod.node == node.name).map(|pod| pod.name.as_str()).collect();
        tour.show(&node.name, &format!("{} ({}): {}", node.v4, node.zone, pods.join(", ")));
    }
    let data = topology.host("data").clone();
    tour.show("outside", &format!("{}: Redis, and a client that is not in the mesh", data.v4));

    let prefix = format!("/run/netns/{}", topology.prefix());
    // The breaker of the example looks every 30 s and ejects for 30 s; nobody wants to watch that.
    let dir = MeshDir::copy_of(&zamaz, |text| {
        text.replace("/run/netns/", &prefix)
            .replace("interval: 30s", "interval: 500ms")
            .replace("baseEjectionTime: 30s", "baseEjectionTime: 2s")
    })?;
    let files = netns::scratch("demo")?;
    let auth = topology.pod("zamaz-auth");
    let issuers = [
        Issuer::start("https://auth.zamaz.cluster.local", auth, 8090)?,
        Issuer::start("https://dev-auth.zamaz.cluster.local", auth, 8091)?,
    ];
    let collector = Collector::start(&data, 4317)?;
    let mut mesh = Mesh { programs: Vec::new(), issuers, collector, agents: Vec::new(), topology, dir, files };

    for name in SERVERS {
        let place = mesh.topology.pod(name).clone();
        let server = http_server(&place, mesh.files.path())?;
        mesh.programs.push(server);
    }
    if let Some(redis) = redis {
        let mut command = Command::new(&redis.program);
        command.arg0(redis.name).args([
            "--port",
            "6379",
            "--bind",
            "0.0.0.0",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        command.arg("--dir").arg(mesh.files.path());
        let mut server = Program::start(&data, &mut command, Some(mesh.files.path().join("redis.log")))?;
        server.wait_listening(&data, 6379)?;
        mesh.programs.push(server);
    }
    let begun = Instant::now();
    for name in ["node-a", "node-b"] {
        let agent = mesh.agent(name)?;
        mesh.agents.push(agent);
    }
    for (pod, account, gateway) in
        [("zamaz-waypoint", "zamaz-waypoint-sa", "zamaz-waypoint"), ("zamaz-ingress", "zamaz-ingress-sa", "zamaz-gateway")]
    {
        let ca = mesh.files.path().join("ca");
        let spec = AgentSpec::waypoint(("zamaz", pod), account, gateway, mesh.dir.path(), &ca, mesh.files.path())
            .env("TRUST_DOMAIN", "zamaz.cluster.local")
            .env("CULVERT_TRUST_DOMAIN_ALIASES", "cluster.local");
        mesh.agents.push(spec.start(mesh.topology.pod(pod))?);
    }
    for agent in &mesh.agents {
        agent.wait_ready(Duration::from_secs(20))?;
    }
    let ready = begun.elapsed();
    tour.show("agent", &format!("{} proxy --mesh-dir … --node node-a | node-b", binary.display()));
    let mut all = true;
    let mut problems = 0;
    for agent in &mesh.agents[2..] {
        problems += complaints(&agent.config_dump()?);
    }
    for (agent, expected) in mesh.agents.iter().zip([3, 2]) {
        let dump = agent.config_dump()?;
        let up = dump["workloadState"].as_object().map_or(0, |pods| pods.values().filter(|pod| pod["state"] == "Up").count());
        all &= up == expected;
        problems += complaints(&dump);
    }
    tour.check(
        all,
        &format!(
            "agents, waypoint and gateway are ready after {:.1} s: all five applications captured, each with its own certificate",
            ready.as_secs_f64()
        ),
    );
    tour.check(problems == 0, "every object of manifests/examples/zamaz was understood");
    Ok(mesh)
}

/// A small program in a pod that says who it is; it fails while the file `fail-NAME` is there, and the first time each
/// `/api/flaky/…` is asked for.
const SERVER: &str = r#"
import http.server, os, socket, sys
name, fail, seen = sys.argv[1], sys.argv[2], set()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def answer(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        bad = os.path.exists(fail) or (self.path.startswith("/api/flaky/") and self.path not in seen)
        seen.add(self.path)
        user = self.headers.get("x-user-id")
        hello = "hello from %s, client %s" % (name, self.headers.get("x-forwarded-for", "-")) + (", user " + user if user else "")
        body = b"out of order\n" if bad else (hello + "\n").encode()
        if self.path.startswith("/static/"):
            body *= 200
        self.send_response(503 if bad else 200)
        self.send_header("content-type", "application/javascript" if self.path.startswith("/static/") else "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
Server(("::", 8080), Handler).serve_forever()
"#;

fn http_server(place: &Arc<Place>, files: &Path) -> anyhow::Result<Program> {
    let script = files.join("server.py");
    fs::write(&script, SERVER)?;
    let mut command = Command::new("python3");
    command.arg("-u").arg(&script).arg(&place.name).arg(fail_file(files, &place.name));
    let mut server = Program::start(place, &mut command, Some(server_log(files, &place.name)))?;
    server.wait_listening(place, 8080)?;
    Ok(server)
}

fn fail_file(files: &Path, name: &str) -> PathBuf {
    files.join(format!("fail-{name}"))
}

fn server_log(files: &Path, name: &str) -> PathBuf {
    files.join(format!("www-{name}.log"))
}

/// What was refused or doubted; notes (an agent has no use for routes) are neither.
fn complaints(dump: &Value) -> usize {
    dump["problems"].as_array().into_iter().flatten().filter(|problem| problem["severity"] != "note").count()
}

impl Mesh {
    fn a(&self) -> anyhow::Result<&Agent> {
        self.agents.first().context("the agent of node-a runs")
    }
    fn b(&self) -> anyhow::Result<&Agent> {
        self.agents.get(1).context("the agent of node-b runs")
    }
    fn waypoint(&self) -> anyhow::Result<&Agent> {
        self.agents.get(2).context("the waypoint runs")
    }

    /// Starts an agent on a node.
    fn agent(&self, node: &str) -> anyhow::Result<Agent> {
        AgentSpec::new(node, self.dir.path(), &self.files.path().join("ca"), self.files.path())
            .env("TRUST_DOMAIN", "zamaz.cluster.local")
            .env("CULVERT_TRUST_DOMAIN_ALIASES", "cluster.local")
            .start(self.topology.node(node))
    }
    /// Puts a running agent in the place of one that ended.
    fn replace(&mut self, node: &str, agent: Agent) -> anyhow::Result<()> {
        let place = self.agents.iter_mut().find(|a| a.node() == node).context("an agent of that node")?;
        *place = agent;
        Ok(())
    }
}

/// Real `curl` in a pod or host. The API's name is resolved by curl itself, as there is no DNS in this topology.
fn curl(from: &Place, url: &str, more: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "10", "--noproxy", "*", "--resolve", &format!("{API}:80:{API_VIP}")]).args(more).arg(url);
    from.netns.output(&mut command).context("run curl")
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
fn text(record: &Value, key: &str) -> String {
    record[key].as_str().unwrap_or_default().to_owned()
}

fn spiffe(account: &str) -> String {
    format!("spiffe://zamaz.cluster.local/ns/zamaz/sa/{account}")
}

fn allowed(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let (api, auth) = (mesh.topology.pod("zamaz-api-canary"), mesh.topology.pod("zamaz-auth"));
    let (mark_a, mark_b) = (mesh.a()?.mark(), mesh.b()?.mark());
    let url = format!("http://{AUTH_VIP}/token");
    tour.show("api $", &format!("curl {url}"));
    let output = curl(api, &url, &[])?;
    ensure!(output.status.success(), "curl failed: {}", complaint(&output));
    tour.show("answer", &out(&output));
    tour.check(
        out(&output).contains("hello from zamaz-auth"),
        "a call to the service's address reached its endpoint on the other node",
    );
    let (source, destination) = (spiffe("zamaz-api-sa"), spiffe("zamaz-auth-sa"));
    let both = |direction: &'static str| {
        let (source, destination) = (source.clone(), destination.clone());
        move |record: &Value| {
            record["direction"] == direction
                && record["src.identity"] == source
                && record["dst.identity"] == destination
                && record["error"].is_null()
        }
    };
    let sent = mesh.a()?.wait_access("the call", mark_a, both("outbound"));
    let taken = mesh.b()?.wait_access("the call", mark_b, both("inbound"));
    for (name, record) in [("node-a log", &sent), ("node-b log", &taken)] {
        if let Ok(record) = record {
            tour.show(
                name,
                &format!(
                    "{} {} → {}, {} bytes out, {} in, {}",
                    text(record, "direction"),
                    text(record, "src.identity"),
                    text(record, "dst.identity"),
                    record["bytes_sent"],
                    record["bytes_recv"],
                    text(record, "duration")
                ),
            );
        }
    }
    tour.check(sent.is_ok() && taken.is_ok(), "both agents name both SPIFFE identities, proven by mutual TLS");
    let log = server_log(mesh.files.path(), &auth.name);
    let original = wait::until("the server's own log", wait::PATIENCE, || {
        fs::read_to_string(&log).ok()?.lines().any(|line| line.contains(&api.v4.to_string())).then_some(())
    });
    tour.check(original.is_ok(), &format!("the server saw the client's own address, {}", api.v4));
    Ok(())
}

/// Runs curl, which must fail without an answer, and finds the reason in an agent's log.
fn refusal(tour: &mut Tour, from: &Place, url: &str, agent: &Agent, reason: &str) -> anyhow::Result<Value> {
    let mark = agent.mark();
    tour.show(&format!("{} $", from.name.trim_start_matches("zamaz-")), &format!("curl {url}"));
    let output = curl(from, url, &["-w", "%{http_code}"])?;
    tour.show("curl says", &complaint(&output));
    tour.check(!output.status.success() && out(&output) == "000", "no byte of an answer came back");
    let record = agent.wait_access(reason, mark, |record| text(record, "error").starts_with(reason));
    if let Ok(record) = &record {
        tour.show(&format!("{} log", agent.node()), &text(record, "error"));
    }
    tour.check(record.is_ok(), &format!("the agent of the destination tells why: {reason}"));
    record
}

/// What `meshctl why` says about a refused call, asked of a running process.
fn explained(tour: &mut Tour, process: &Agent, args: &[&str], reason: &str) -> anyhow::Result<()> {
    let why = why_of_process(process, args)?;
    tour.show("meshctl", &format!("why {} --admin {}", args.join(" "), process.node()));
    tour.show("says", &format!("{reason}: {}", text(&why.report, "detail")));
    tour.check(!why.allowed && why.reason() == Some(reason), "meshctl why foretells it by the same rules, and names the policy");
    Ok(())
}

fn denied(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let reports = mesh.topology.pod("zamaz-reports");
    let url = format!("http://{}:8080/", mesh.topology.pod("zamaz-api-stable").v4);
    let record = refusal(tour, reports, &url, mesh.b()?, "not_allowed")?;
    tour.check(
        record["src.identity"] == spiffe("zamaz-reports-sa"),
        &format!("it is refused for who it is ({}), not for its address", text(&record, "src.identity")),
    );
    let asked = ["--from", "zamaz/zamaz-reports-sa", "--to", "zamaz/zamaz-api-stable:8080"];
    explained(tour, mesh.b()?, &asked, "not_allowed")
}

fn outside(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let data = mesh.topology.host("data");
    let url = format!("http://{}:8080/", mesh.topology.pod("zamaz-api-stable").v4);
    let record = refusal(tour, data, &url, mesh.b()?, "plaintext_refused")?;
    tour.check(record["src.identity"].is_null(), "STRICT: without a certificate there is no identity, and no way in");
    Ok(())
}

fn wire(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let marker = format!("zamaz-secret-{:08x}", std::process::id().wrapping_mul(2_654_435_761));
    let api = mesh.topology.pod("zamaz-api-canary");
    let capture = Capture::start(&mesh.topology.node("node-a").netns, "eth0")?;
    let url = format!("http://{}:8080/", mesh.topology.pod("zamaz-auth").v4);
    let header = format!("x-secret: {marker}");
    for _ in 0..5 {
        let output = curl(api, &url, &["-H", &header])?;
        ensure!(output.status.success(), "curl failed: {}", complaint(&output));
    }
    // The control of the experiment: the same text to a place outside the mesh, which this capture must be able to read.
    let data = mesh.topology.host("data");
    let control = data.netns.listen((Ipv4Addr::UNSPECIFIED, 7000).into())?;
    let mut stream = api.netns.connect(data.at(7000), Duration::from_secs(5))?;
    stream.write_all(marker.as_bytes())?;
    drop(stream);
    let (mut accepted, _) = control.accept()?;
    accepted.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut received = String::new();
    accepted.read_to_string(&mut received)?;
    ensure!(received == marker, "the control text did not arrive");

    let captured = capture.finish();
    let (segments, tls) = captured.tls_on_port(15008);
    tour.show("captured", &format!("{} frames, {} bytes on node-a's uplink (AF_PACKET)", captured.frames, captured.bytes));
    tour.show("marker", &format!("{marker}, sent 5 times as an HTTP header"));
    tour.check(
        segments > 0 && tls.encrypted > 0 && tls.stray == 0,
        &format!(
            "{segments} packets to and from port 15008 hold {} TLS records ({} encrypted) and nothing else",
            tls.records, tls.encrypted
        ),
    );
    tour.check(!captured.contains_on_port(15008, marker.as_bytes()), "the marker is not readable there");
    tour.check(
        captured.contains_on_port(7000, marker.as_bytes()),
        "the control: sent to a host outside the mesh, the same marker is readable in the same capture",
    );
    let direct = captured.segments.iter().filter(|segment| segment.src.port() == 8080 || segment.dst.port() == 8080).count();
    tour.check(direct == 0, "no packet went to or from port 8080 itself");
    Ok(())
}

fn external_redis(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let (api, data) = (mesh.topology.pod("zamaz-api-stable"), mesh.topology.host("data"));
    let cli = |to: Ipv4Addr, words: &[&str]| -> anyhow::Result<String> {
        let mut command = Command::new("timeout");
        command.args(["10", "redis-cli", "-h", &to.to_string()]).args(words);
        let output = api.netns.output(&mut command).context("run redis-cli")?;
        ensure!(output.status.success(), "redis-cli failed: {}{}", complaint(&output), out(&output));
        Ok(out(&output))
    };
    let mark = mesh.b()?.mark();
    tour.show("api $", &format!("redis-cli -h {} SET greeting hello", data.v4));
    let set = cli(data.v4, &["SET", "greeting", "hello"])?;
    tour.check(set == "OK", &format!("by its own address: {set}"));
    tour.show("api $", &format!("redis-cli -h {REDIS_VIP} GET greeting"));
    let got = cli(REDIS_VIP, &["GET", "greeting"])?;
    tour.check(got == "hello", &format!("by the address of its ServiceEntry: {got}"));
    let record = mesh.b()?.wait_access("the call to Redis", mark, |record| {
        record["direction"] == "outbound"
            && text(record, "dst.addr").starts_with(&data.at(6379).to_string())
            && record["error"].is_null()
    });
    if let Ok(record) = &record {
        tour.show(
            "node-b log",
            &format!("{} → {}, {}", text(record, "src.workload"), text(record, "dst.addr"), text(record, "duration")),
        );
    }
    tour.check(
        record.is_ok_and(|record| record["dst.identity"].is_null()),
        "passed through as it is: no tunnel, because nobody there speaks HBONE",
    );
    Ok(())
}

const SUSPEND: &str = r#"apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: suspend-api
  namespace: zamaz
spec:
  selector:
    matchLabels: { app: zamaz-auth }
  action: DENY
  rules:
  - from:
    - source:
        principals: ["zamaz.cluster.local/ns/zamaz/sa/zamaz-api-sa"]
"#;

fn policy_change(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let (api, auth) = (mesh.topology.pod("zamaz-api-canary"), mesh.topology.pod("zamaz-auth"));
    let mut live = open(api, auth.at(8080))?;
    let waiting = mesh.b()?.wait_config("the open connection", |dump| tunnels_of(dump, "inbound", "zamaz-auth") > 0);
    tour.check(waiting.is_ok(), "a connection from the API to the authentication service is open");
    let guard = mesh.dir.put_for_now("90-suspend.yaml", SUSPEND)?;
    let begun = Instant::now();
    tour.show("folder", "+ 90-suspend.yaml: DENY the API");
    let mut byte = [0];
    let cut = match live.read(&mut byte) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    };
    tour.check(cut, &format!("the open connection was cut {} ms after the file appeared", begun.elapsed().as_millis()));
    let url = format!("http://{}:8080/", auth.v4);
    let output = curl(api, &url, &[])?;
    tour.check(!output.status.success(), "a new one is refused");
    drop(guard);
    tour.show("folder", "- 90-suspend.yaml");
    let again =
        wait::until("calls to work again", wait::PATIENCE, || curl(api, &url, &[]).ok().filter(|output| output.status.success()));
    tour.check(again.is_ok(), "and when the file is gone, calls work again");
    Ok(())
}

/// A connection on which a request was begun and not finished, so that it stays.
fn open(from: &Place, to: SocketAddr) -> anyhow::Result<std::net::TcpStream> {
    let mut stream = from.netns.connect(to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.1\r\n")?;
    Ok(stream)
}

fn pods(dump: &Value) -> impl Iterator<Item = &Value> {
    dump["workloadState"].as_object().into_iter().flatten().map(|(_, pod)| pod)
}
fn tunnels_of(dump: &Value, direction: &str, pod: &str) -> usize {
    pods(dump)
        .filter(|one| one["info"]["name"] == pod)
        .map(|one| one["connections"][direction].as_array().map_or(0, Vec::len))
        .sum()
}

fn tunnels(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let (api, auth) = (mesh.topology.pod("zamaz-api-canary"), mesh.topology.pod("zamaz-auth"));
    let held: Vec<std::net::TcpStream> = (0..3).map(|_| open(api, auth.at(8080))).collect::<anyhow::Result<_>>()?;
    tour.show("node-a $", "curl localhost:15000/config_dump");
    let seen =
        mesh.a()?.wait_config("the open connections", |dump| tunnels_of(dump, "outbound", "zamaz-api-canary") >= held.len());
    let dump = mesh.a()?.config_dump()?;
    for pod in pods(&dump) {
        for direction in ["inbound", "outbound"] {
            for connection in pod["connections"][direction].as_array().into_iter().flatten() {
                tour.show(
                    &text(&pod["info"], "name").replace("zamaz-", ""),
                    &format!(
                        "{direction} {} → {} over {}",
                        text(connection, "src"),
                        text(connection, "originalDst"),
                        text(connection, "protocol")
                    ),
                );
            }
        }
    }
    let hbone = pods(&dump)
        .flat_map(|pod| pod["connections"]["outbound"].as_array().into_iter().flatten())
        .filter(|connection| connection["protocol"] == "HBONE")
        .count();
    tour.check(seen.is_ok() && hbone >= held.len(), &format!("{hbone} open connections are listed, all in HBONE tunnels"));
    Ok(())
}

fn metrics(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    tour.show("node-a $", "curl localhost:15020/metrics");
    let api = spiffe("zamaz-api-sa");
    let labels = [
        ("reporter", "source"),
        ("source_workload", "zamaz-api-canary"),
        ("source_principal", api.as_str()),
        ("connection_security_policy", "mutual_tls"),
    ];
    let page = mesh.a()?.metrics()?;
    for name in [
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_sent_bytes_total",
        "istio_tcp_received_bytes_total",
    ] {
        let value = page.sum(name, &labels);
        tour.check(
            value > 0.0,
            &format!("{name}{{source_workload=\"zamaz-api-canary\", connection_security_policy=\"mutual_tls\"}} = {value}"),
        );
    }
    let page = mesh.b()?.metrics()?;
    let refused = page.sum("istio_tcp_connections_failed_total", &[("reporter", "destination"), ("response_flags", "DENY")]);
    tour.check(refused >= 2.0, &format!("istio_tcp_connections_failed_total{{response_flags=\"DENY\"}} = {refused} on node-b"));
    tour.show("waypoint $", "curl localhost:15020/metrics");
    let page = mesh.waypoint()?.metrics()?;
    for (code, what) in [("200", "answered"), ("403", "refused by policy"), ("503", "failed")] {
        let labels = [("reporter", "waypoint"), ("source_workload", "zamaz-frontend"), ("response_code", code)];
        let labels = if code == "403" { [labels[0], ("source_workload", "zamaz-reports"), labels[2]] } else { labels };
        let value = page.sum("istio_requests_total", &labels);
        tour.check(
            value > 0.0,
            &format!("istio_requests_total{{source_workload=\"{}\", response_code=\"{code}\"}} = {value} ({what})", labels[1].1),
        );
    }
    Ok(())
}

/// A request of the frontend whose caller's span is `parent`, and the span the collector has of it.
fn followed(mesh: &Mesh, parent: u64, more: &[&str]) -> anyhow::Result<Span> {
    let context = format!("traceparent: 00-0af7651916cd43dd8448eb211c80319c-{parent:016x}-01");
    let (status, body) = call(mesh.topology.pod("zamaz-frontend"), "/api/followed", &[&["-H", &context], more].concat())?;
    ensure!(status == "200", "{status} {body}");
    let parent = format!("{parent:016x}");
    wait::until("the span", wait::PATIENCE, || mesh.collector.spans().into_iter().find(|span| span.parent == parent))
}

fn traces(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let [_, dev] = &mesh.issuers;
    let token = format!("authorization: Bearer {}", dev.token(&dev.key, "dan", "user", now() + 3600)?);
    tour.show("frontend $", "curl -H 'traceparent: 00-0af7…319c-…0001-01' -H 'x-tenant-id: blue' …/api/followed");
    let span = followed(mesh, 1, &["-H", "x-tenant-id: blue", "-H", &token])?;
    tour.show(
        "collector",
        &format!("{} of {}, trace {}, parent {}", span.name, span.resource["service.name"], span.trace, span.parent),
    );
    let tags =
        ["user_id", "tenant_id", "endpoint_type", "environment", "content_type", "istio.source_workload", "http.status_code"];
    for key in tags {
        tour.show("tag", &format!("{key}: {}", span.tag(key)));
    }
    let values = tags.map(|key| span.tag(key));
    tour.check(
        span.name == "zamaz-api-service:80/*"
            && values == ["dan", "blue", "user", "production", "text/plain", "zamaz-frontend", "200"],
        "the waypoint's span is under the caller's, named after the API's routes, with the tags of 90-telemetry.yaml",
    );
    let frontend = mesh.topology.pod("zamaz-frontend");
    // Bounds at more than four deviations of a fair draw.
    for (n, share, calls, bounds) in [(2, "1.0", 2000, 4..=45), (3, "10.0", 1000, 60..=145)] {
        if share != "1.0" {
            let file = "90-telemetry.yaml";
            let text = fs::read_to_string(mesh.dir.path().join(file))?;
            let before = mesh.waypoint()?.config_dump()?["version"].as_u64();
            mesh.dir.put(file, &text.replace("randomSamplingPercentage: 1.0", &format!("randomSamplingPercentage: {share}")))?;
            mesh.waypoint()?.wait_config("the new share", |dump| dump["version"].as_u64() > before)?;
            tour.show("folder", &format!("{file}: randomSamplingPercentage: {share}"));
        }
        let path = format!("/api/share/{n}");
        let more = ["--max-time", "60", "-o", "/dev/null"];
        let output = curl(frontend, &format!("http://{API}{path}?n=[1-{calls}]"), &more)?;
        ensure!(output.status.success(), "curl failed: {}", complaint(&output));
        // What was queued before it has arrived with it.
        followed(mesh, n, &["-H", &token])?;
        let told = mesh.collector.spans().iter().filter(|span| span.tag("http.url").contains(&path)).count();
        tour.check(bounds.contains(&told), &format!("of {calls} requests the collector has {told} spans, at {share} %"));
    }
    let page = mesh.waypoint()?.metrics()?;
    let of = |outcome| page.sum("culvert_trace_spans_total", &[("outcome", outcome)]);
    tour.check(
        of("sent") > 0.0 && of("failed") + of("queue_full") + of("rejected") == 0.0,
        &format!("culvert_trace_spans_total{{outcome=\"sent\"}} = {}, none was lost", of("sent")),
    );
    Ok(())
}

/// A call to the API by its name; gives status and body.
fn call(from: &Place, path: &str, more: &[&str]) -> anyhow::Result<(String, String)> {
    let output = curl(from, &format!("http://{API}{path}"), &[&["-w", "\n%{http_code}"], more].concat())?;
    ensure!(output.status.success(), "curl failed: {}", complaint(&output));
    let text = out(&output);
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", &text));
    Ok((status.to_owned(), body.trim().to_owned()))
}

fn through_waypoint(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let frontend = mesh.topology.pod("zamaz-frontend");
    let log = mesh.waypoint()?.mark();
    tour.show("frontend $", &format!("curl http://{API}/api/orders"));
    let (status, body) = call(frontend, "/api/orders", &[])?;
    tour.show("answer", &format!("{status} {body}"));
    tour.check(status == "200" && body.contains("hello from zamaz-api"), "the API answers, through the waypoint");
    tour.check(body.ends_with(&frontend.v4.to_string()), &format!("and learns the client's address, {}", frontend.v4));
    let line = wait::until("the waypoint's log", wait::PATIENCE, || {
        mesh.waypoint().ok()?.log_since(log).lines().find(|line| line.contains("/api/orders")).map(str::to_owned)
    });
    if let Ok(line) = &line {
        tour.show("waypoint log", &line.chars().take(220).collect::<String>());
    }
    tour.check(line.is_ok(), "one line of access log for the request");
    Ok(())
}

fn by_method_and_path(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let (frontend, reports) = (mesh.topology.pod("zamaz-frontend"), mesh.topology.pod("zamaz-reports"));
    for (from, path, more, expect) in [
        (frontend, "/api/orders", &["-X", "DELETE"][..], "200"),
        (frontend, "/api/orders", &["-X", "PATCH"][..], "403"),
        (frontend, "/internal", &[][..], "403"),
        (frontend, "/api/../internal", &["--path-as-is"][..], "403"),
        (reports, "/api/orders", &[][..], "403"),
    ] {
        let (status, body) = call(from, path, more)?;
        let who = from.name.trim_start_matches("zamaz-");
        let method = more.get(1).filter(|_| more[0] == "-X").unwrap_or(&"GET");
        let said = if status == "200" { String::new() } else { format!(": {body}") };
        tour.check(
            status == expect && (expect == "200" || body == "RBAC: access denied"),
            &format!("{who}: {method} {path} → {status}{said}"),
        );
    }
    let asked =
        ["--from", "zamaz/zamaz-frontend-sa", "--to", "zamaz-api-service:80", "--method", "PATCH", "--path", "/api/orders"];
    explained(tour, mesh.waypoint()?, &asked, "not_allowed")
}

/// Somebody whose tokens the API believes. Its key is made when the demo starts.
struct Issuer {
    name: &'static str,
    key: SigningKey,
    server: KeyServer,
}
impl Issuer {
    fn start(name: &'static str, place: &Arc<Place>, port: u16) -> anyhow::Result<Self> {
        let key = SigningKey::make("2026-11")?;
        let server = KeyServer::start(place, port, None)?;
        server.publish(&[&key]);
        Ok(Self { name, key, server })
    }
    fn token(&self, key: &SigningKey, user: &str, role: &str, expires: u64) -> anyhow::Result<String> {
        let claims = json!({ "iss": self.name, "sub": user, "aud": "zamaz-api", "roles": [role], "exp": expires });
        key.token(&claims)
    }
}

fn roles(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let [auth, dev] = &mesh.issuers;
    let frontend = mesh.topology.pod("zamaz-frontend");
    let soon = now() + 3600;
    let ann = auth.token(&auth.key, "ann", "admin", soon)?;
    let admin = "/api/admin/users";
    let denied = "RBAC: access denied";
    for (who, token, path, expect, says) in [
        ("nobody", None, admin, "403", denied),
        ("ben, user", Some(auth.token(&auth.key, "ben", "user", soon)?), admin, "403", denied),
        ("ben, user", Some(auth.token(&auth.key, "ben", "user", soon)?), "/api/orders", "200", "user ben"),
        ("ann, admin", Some(ann.clone()), admin, "200", "user ann"),
        ("dan, admin of the development issuer", Some(dev.token(&dev.key, "dan", "admin", soon)?), admin, "403", denied),
        ("dan, the same", Some(dev.token(&dev.key, "dan", "admin", soon)?), "/api/orders", "200", "user dan"),
        ("ann, expired", Some(auth.token(&auth.key, "ann", "admin", now() - 120)?), admin, "401", "Jwt is expired"),
        (
            "eve, signed by the wrong issuer",
            Some(auth.token(&dev.key, "eve", "admin", soon)?),
            admin,
            "401",
            "Jwt verification fails",
        ),
        ("ann's token, one letter of it changed", Some(changed(&ann)), admin, "401", "Jwt verification fails"),
        (
            "a word that is no token",
            Some("nonsense".to_owned()),
            admin,
            "401",
            "Jwt is not in the form of Header.Payload.Signature",
        ),
    ] {
        // Whoever calls says that she is root; nobody believes it.
        let bearer = format!("authorization: Bearer {}", token.as_deref().unwrap_or_default());
        let mut more = vec!["-H", "x-user-id: root"];
        if token.is_some() {
            more.extend(["-H", &bearer]);
        }
        let (status, body) = call(frontend, path, &more)?;
        tour.check(
            status == expect && body.contains(says) && !body.contains("root"),
            &format!("{who}: GET {path} → {status}: {body}"),
        );
    }
    let next = SigningKey::make("2026-12")?;
    auth.server.publish(&[&next]);
    tour.show("issuer", "publishes another key, the old one is gone");
    let by_next = format!("authorization: Bearer {}", auth.token(&next, "ann", "admin", soon)?);
    // Not under /api/admin, where ten calls a minute are let through.
    let orders = "/api/orders";
    let begun = Instant::now();
    let known = wait::until("the new key", Duration::from_secs(12), || {
        call(frontend, orders, &["-H", &by_next]).ok().filter(|(status, _)| status == "200")
    });
    tour.check(
        known.is_ok(),
        &format!(
            "a token by the new key is believed after {:.1} s: its unknown key id made the waypoint ask",
            begun.elapsed().as_secs_f64()
        ),
    );
    let (status, body) = call(frontend, orders, &["-H", &format!("authorization: Bearer {ann}")])?;
    tour.check(status == "401", &format!("a token by the old key → {status}: {body}"));
    mesh.issuers.iter().for_each(|issuer| issuer.server.behave(Manner::Status(500)));
    let (status, _) = call(frontend, orders, &["-H", &by_next])?;
    tour.check(status == "200", "while the issuer answers 500, the keys it gave last stay in use");
    Ok(())
}
/// The same token with another signature.
fn changed(token: &str) -> String {
    let mut parts: Vec<String> = token.split('.').map(str::to_owned).collect();
    if let Some(signature) = parts.last_mut() {
        let other = if signature.starts_with('A') { "B" } else { "A" };
        signature.replace_range(..1, other);
    }
    parts.join(".")
}

fn canary(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    const CALLS: usize = 1000;
    let frontend = mesh.topology.pod("zamaz-frontend");
    let mut all = true;
    for _ in 0..10 {
        all &= call(frontend, "/api/x", &["-H", "canary: true"])?.1.contains("zamaz-api-canary");
    }
    tour.check(all, "with the header `canary: true`, ten of ten calls reach the canary");
    tour.show("frontend $", &format!("curl http://{API}/api/[1-{CALLS}]"));
    let output = curl(frontend, &format!("http://{API}/api/[1-{CALLS}]"), &["--max-time", "60"])?;
    let text = out(&output);
    let (canary, total) = (text.matches("zamaz-api-canary").count(), text.matches("hello from").count());
    tour.check(
        total == CALLS && (20..=85).contains(&canary),
        &format!("without it, {canary} of {total} calls reach the canary (its weight is 5 %)"),
    );
    let key = format!("/api/flaky/{}", std::process::id());
    let (status, _) = call(frontend, &key, &[])?;
    tour.check(
        status == "200",
        &format!("{key} fails the first time it is asked for; the caller sees {status}: it was tried again"),
    );
    Ok(())
}

fn breaker(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let frontend = mesh.topology.pod("zamaz-frontend");
    let fail = fail_file(mesh.files.path(), "zamaz-api-canary");
    fs::write(&fail, "")?;
    tour.show("canary", "answers 503 from now on");
    let mut answers = Vec::new();
    for _ in 0..12 {
        answers.push(call(frontend, "/api/x", &["-H", "canary: true"])?);
    }
    let own = answers.iter().filter(|(_, body)| body == "out of order").count();
    let open = answers.iter().filter(|(status, body)| status == "503" && body == "no healthy upstream").count();
    tour.check(
        own == 5 && open == 7,
        &format!(
            "five failures in a row open the breaker: {own} answers of the canary's own, then {open} × `503 no healthy upstream`"
        ),
    );
    fs::remove_file(&fail)?;
    let begun = Instant::now();
    let healed = wait::until("the canary to come back", Duration::from_secs(10), || {
        call(frontend, "/api/x", &["-H", "canary: true"]).ok().filter(|(status, _)| status == "200")
    });
    tour.check(healed.is_ok(), &format!("it is let in again {:.1} s after it recovered", begun.elapsed().as_secs_f64()));
    Ok(())
}

fn ingress(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let data = mesh.topology.host("data");
    let gateway = mesh.topology.pod("zamaz-ingress").v4;
    tour.show("outside $", &format!("curl -H 'host: shop.zamaz.example' http://{gateway}/"));
    let output = curl(data, &format!("http://{gateway}/"), &["-H", "host: shop.zamaz.example"])?;
    tour.show("answer", &out(&output));
    tour.check(
        out(&output).contains("hello from zamaz-frontend"),
        "the frontend answers a caller without an identity, through the gateway",
    );
    let gateway_pod = gateway.to_string();
    // The connection is kept for the next request, so it is among the open ones.
    let record = mesh.a()?.wait_config("the gateway's connection", |dump| {
        pods(dump)
            .flat_map(|pod| pod["connections"]["inbound"].as_array().into_iter().flatten())
            .any(|c| c["protocol"] == "HBONE" && text(c, "src").starts_with(&gateway_pod))
    });
    tour.check(
        record.is_ok(),
        "inside the mesh it is the gateway's own call, in its own tunnel, which the frontend's policy names",
    );
    let output = curl(data, &format!("http://{gateway}/"), &["-H", "host: other.example", "-w", "%{http_code}"])?;
    tour.check(out(&output) == "404", "a host nobody wrote a route for is answered 404");
    Ok(())
}

/// The head of an answer, as lines.
fn head(from: &Place, url: &str, more: &[&str]) -> anyhow::Result<Vec<String>> {
    let output = curl(from, url, &[&["-o", "/dev/null", "-D", "-", "-H", "host: shop.zamaz.example"], more].concat())?;
    ensure!(output.status.success(), "curl failed: {}", complaint(&output));
    Ok(out(&output).lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}
fn header<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    head.iter().filter_map(|line| line.split_once(": ")).find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// The TrafficPolicy of the gateway. Everything is asked over IPv4 but the flood, which has the client's IPv6 address and
/// so a bucket of its own.
fn at_the_door(tour: &mut Tour, mesh: &Mesh) -> anyhow::Result<()> {
    let data = mesh.topology.host("data");
    let gateway = mesh.topology.pod("zamaz-ingress");
    let url = |path: &str| format!("http://{}{path}", gateway.v4);
    let answer = head(data, &url("/"), &[])?;
    let wanted = [
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("strict-transport-security", "max-age=31536000"),
        ("x-xss-protection", "1; mode=block"),
    ];
    for (name, _) in wanted {
        tour.show("answer", &format!("{name}: {}", header(&answer, name).unwrap_or("-")));
    }
    tour.check(
        wanted.iter().all(|(name, value)| header(&answer, name) == Some(value)),
        "every answer has the four security headers",
    );

    let origin = "origin: https://zamaz.example";
    let preflight = ["-X", "OPTIONS", "-H", "access-control-request-method: PUT"];
    let answer = head(data, &url("/"), &[&preflight[..], &["-H", origin]].concat())?;
    let allowed = header(&answer, "access-control-allow-origin").unwrap_or_default();
    tour.show("preflight", &format!("{}: origin {allowed}, credentials", answer.first().map_or("", String::as_str)));
    tour.check(
        allowed == "https://zamaz.example" && header(&answer, "access-control-allow-credentials") == Some("true"),
        "a page of the shop may call with credentials: the preflight is answered at the gateway",
    );
    let answer = head(data, &url("/"), &["-H", "origin: https://elsewhere.example"])?;
    tour.check(header(&answer, "access-control-allow-origin").is_none(), "a page of somebody else may not");

    let size = |accept: &str| -> anyhow::Result<(usize, String)> {
        let more =
            ["-H", accept, "-H", "host: shop.zamaz.example", "-o", "/dev/null", "-w", "%{size_download}", "-D", "/dev/stderr"];
        let output = curl(data, &url("/static/app.js"), &more)?;
        Ok((out(&output).parse().unwrap_or(0), complaint(&output).to_ascii_lowercase()))
    };
    let (plain, answer) = size("accept-encoding: identity")?;
    let cached = answer.contains("cache-control: public, max-age=31536000, immutable");
    for coding in ["gzip", "br", "zstd"] {
        let (packed, answer) = size(&format!("accept-encoding: {coding}"))?;
        tour.check(
            packed > 0 && packed * 10 < plain && answer.contains(&format!("content-encoding: {coding}")),
            &format!("a static file of {plain} bytes is {packed} bytes as {coding}"),
        );
    }
    tour.check(cached, "and may be kept for a year");
    flood(tour, data, gateway)
}

fn flood(tour: &mut Tour, data: &Place, gateway: &Place) -> anyhow::Result<()> {
    const CALLS: usize = 140;
    let begun = Instant::now();
    let resolve = format!("shop.zamaz.example:80:[{}]", gateway.v6);
    let more = ["--max-time", "60", "-w", "\\n%{http_code} %header{x-ratelimit-remaining}\\n", "--resolve", &resolve];
    let output = curl(data, &format!("http://shop.zamaz.example/?n=[1-{CALLS}]"), &more)?;
    let seconds = begun.elapsed().as_secs_f64();
    let said = out(&output);
    let status = |line: &&str| line.starts_with("200 ") || line.starts_with("429 ");
    let answers: Vec<&str> = said.lines().filter(status).collect();
    ensure!(answers.len() == CALLS, "curl: {}", complaint(&output));
    for n in [1, 2, 100, 101] {
        let (status, left) = answers[n - 1].split_once(' ').unwrap_or_default();
        tour.show(&format!("request {n}"), &format!("{status}, x-ratelimit-remaining: {left}"));
    }
    let through = answers.iter().filter(|a| a.starts_with("200")).count();
    // The bucket fills while it is emptied: 100 a minute.
    let most = 100 + (seconds * 100.0 / 60.0) as usize;
    let first = answers.iter().position(|a| a.starts_with("429")).map_or(0, |at| at + 1);
    tour.check(
        first > 100 && (100..=most).contains(&through) && through < CALLS,
        &format!("of {CALLS} requests in {seconds:.1} s {through} are answered, and number {first} is the first to be refused"),
    );
    let refusals = said.matches("local_rate_limited\n429 ").count();
    tour.check(refusals == CALLS - through, "with status 429 and the words `local_rate_limited`, as Envoy says it");
    Ok(())
}

fn leave_running(tour: &Tour, mesh: Mesh) -> anyhow::Result<()> {
    let Mesh { programs, issuers: _, collector: _, agents, topology, dir, files } = mesh;
    let (dir, files) = (dir.keep(), files.keep());
    netns::keep_this_run(&[dir.clone(), files.clone()])?;
    let at = |name: &str| format!("ip netns exec {}{name}", topology.prefix());
    say(&format!("\n{}", tour.page.bold("Left running (--keep). Things to try, as root:")));
    for (what, command) in [
        ("call the API", format!("{} curl --resolve {API}:80:{API_VIP} http://{API}/api/x", at("zamaz-frontend"))),
        (
            "from outside",
            format!("{} curl -H 'host: shop.zamaz.example' http://{}/", at("data"), topology.pod("zamaz-ingress").v4),
        ),
        ("be refused", format!("{} curl http://{}:8080/", at("zamaz-reports"), topology.pod("zamaz-api-stable").v4)),
        ("see the state", format!("{} curl -s localhost:15000/config_dump", at("node-a"))),
        ("see the metrics", format!("{} curl -s localhost:15020/metrics", at("node-b"))),
        ("follow a log", format!("tail -f {}", files.join("node-b.log").display())),
        ("change the mesh", format!("$EDITOR {}", dir.join("50-authorization.yaml").display())),
        ("remove it all", "cargo xtask demo --clean".to_owned()),
    ] {
        say(&format!("  {what:<16} {command}"));
    }
    programs.into_iter().for_each(Program::leave_running);
    agents.into_iter().for_each(Agent::leave_running);
    topology.leave_in_place();
    Ok(())
}
