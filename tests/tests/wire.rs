//! Foreign peers: HBONE is a protocol, so another implementation of HTTP/2 and of TLS (Python's `h2` package over OpenSSL)
//! must understand ours in both directions, to the status code and the header.
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_binary, target_dir};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::program::{Client, Program, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::{netns, skip, wait};
use serde_json::{Value, json};
use tempfile::TempDir;

const PORT: u16 = 8080;

const TESTS: &[Test<Wire>] = &[
    test("our_inbound_accepts_a_foreign_connect_and_carries_data", our_inbound_accepts_a_foreign_connect_and_carries_data),
    test("our_inbound_speaks_tls13_h2_with_the_workloads_identity", our_inbound_speaks_tls13_h2_with_the_workloads_identity),
    test("our_inbound_answers_400_to_what_is_not_for_this_pod", our_inbound_answers_400_to_what_is_not_for_this_pod),
    test("our_inbound_answers_401_to_a_source_that_is_not_allowed", our_inbound_answers_401_to_a_source_that_is_not_allowed),
    test("our_inbound_answers_503_when_nothing_listens", our_inbound_answers_503_when_nothing_listens),
    test("one_foreign_tunnel_carries_many_streams_after_refusals", one_foreign_tunnel_carries_many_streams_after_refusals),
    test("our_outbound_sends_what_a_foreign_server_expects", our_outbound_sends_what_a_foreign_server_expects),
    test("our_outbound_carries_data_through_a_foreign_server", our_outbound_carries_data_through_a_foreign_server),
    test("our_outbound_reports_a_foreign_refusal", our_outbound_reports_a_foreign_refusal),
    test(
        "our_outbound_refuses_a_foreign_server_with_another_identity",
        our_outbound_refuses_a_foreign_server_with_another_identity,
    ),
];

fn main() -> ExitCode {
    suite::run("wire", skip::netns_unavailable(), set_up, TESTS)
}

struct Wire {
    agent: Agent,
    _servers: Vec<Server>,
    foreign_server: Program,
    record: PathBuf,
    topology: Topology,
    python: PathBuf,
    ca: TempDir,
    files: TempDir,
    _dir: MeshDir,
}

const OBJECTS: &str = r#"
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
metadata: { name: only-foreign, namespace: t }
spec:
  selector: { matchLabels: { app: app } }
  action: ALLOW
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/foreign"] } }]
"#;

fn set_up() -> anyhow::Result<Wire> {
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let python = python_with_h2()?;
    // The agent serves node-a alone; the foreign peer stands in for the agent of node-c.
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-c", "zone-2")
        .pod("node-a", "t", "app", "app", &[])
        .pod("node-a", "t", "caller", "caller", &[])
        .pod("node-c", "t", "foreign", "foreign", &[])
        .pod("node-c", "t", "impostor", "impostor", &[])
        .build()?;
    let dir = MeshDir::empty()?;
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    for pod in &topology.plan().pods {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let servers = vec![Server::start(topology.pod("app"), PORT)?];
    let (ca, files) = (netns::scratch("ca")?, netns::scratch("files")?);
    let agent = AgentSpec::new("node-a", dir.path(), ca.path(), files.path())
        .env("TRUST_DOMAIN", "test.local")
        .start(topology.node("node-a"))?;
    agent.wait_ready(Duration::from_secs(40))?;
    let record = files.path().join("record");
    let foreign_server = start_foreign_server(&python, topology.pod("foreign"), ca.path(), files.path(), &record)?;
    Ok(Wire { agent, _servers: servers, foreign_server, record, topology, python, ca, files, _dir: dir })
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire").join(name)
}

/// A Python with the `h2` package: a virtual environment below the build directory, made once.
fn python_with_h2() -> anyhow::Result<PathBuf> {
    let home = target_dir().join("test-python");
    let python = home.join("bin/python");
    let works =
        |python: &Path| Command::new(python).args(["-c", "import h2, ssl"]).output().is_ok_and(|out| out.status.success());
    if works(&python) {
        return Ok(python);
    }
    if let Some(why) = skip::command_missing("python3") {
        return Err(CannotRun(why).into());
    }
    let attempt = |command: &mut Command| -> Result<(), CannotRun> {
        let out = command.output().map_err(|error| CannotRun(error.to_string()))?;
        let said = String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or_default().to_owned();
        if out.status.success() { Ok(()) } else { Err(CannotRun(format!("no Python with the h2 package: {said}"))) }
    };
    attempt(Command::new("python3").args(["-m", "venv"]).arg(&home))?;
    attempt(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "15", "h2==4.*"]))?;
    if works(&python) { Ok(python) } else { Err(CannotRun("the h2 package does not import".into()).into()) }
}

fn start_foreign_server(python: &Path, place: &Arc<Place>, ca: &Path, files: &Path, record: &Path) -> anyhow::Result<Program> {
    let [cert, key, root] =
        TestCa::of_dir(ca)?.issue("spiffe://test.local/ns/t/sa/foreign")?.write(files, &format!("{}-server", place.name))?;
    let mut command = Command::new(python);
    command.arg(script("h2_server.py")).args([&cert, &key, &root]).arg(record);
    let mut server = Program::start(place, &mut command, Some(files.join(format!("{}-server.log", place.name))))?;
    server.wait_listening(place, 15008)?;
    Ok(server)
}

impl Wire {
    /// Runs the foreign client in the foreign pod as service account `account`.
    fn foreign_client(&self, account: &str, requests: &Value) -> anyhow::Result<Value> {
        self.foreign_client_to(account, self.topology.pod("app").at(15008), requests)
    }

    fn foreign_client_to(&self, account: &str, to: std::net::SocketAddr, requests: &Value) -> anyhow::Result<Value> {
        let spiffe = format!("spiffe://test.local/ns/t/sa/{account}");
        let [cert, key, root] = TestCa::of_dir(self.ca.path())?.issue(&spiffe)?.write(self.files.path(), account)?;
        let job = json!({ "to": [to.ip().to_string(), to.port()], "cert": cert, "key": key, "root": root, "requests": requests });
        let mut command = Command::new("timeout");
        command.arg("20").arg(&self.python).arg(script("h2_client.py")).arg(job.to_string());
        let out = self.topology.pod("foreign").netns.output(&mut command)?;
        let (said, complained) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        ensure!(
            out.status.success(),
            "the foreign client failed ({}): {complained}\nagent:\n{}",
            out.status,
            self.agent.log_tail(10)
        );
        serde_json::from_str(&said).with_context(|| format!("the foreign client said {said:?}"))
    }

    fn app(&self, port: u16) -> String {
        self.topology.pod("app").at(port).to_string()
    }

    /// CONNECTs the foreign server has recorded.
    fn recorded(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.record).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

fn our_inbound_accepts_a_foreign_connect_and_carries_data(wire: &mut Wire) -> anyhow::Result<()> {
    let app = wire.topology.pod("app");
    let mark = wire.agent.mark();
    for (to, authority) in [(app.at(15008), app.at(PORT)), (app.at6(15008), app.at6(PORT))] {
        // 3 MB both ways through the foreign side's 64 KiB windows.
        let request = json!([{ "authority": authority.to_string(), "first": "echo\n", "send": "0123456789abcdef".repeat(64), "repeat": 3000 }]);
        let said = wire.foreign_client_to("foreign", to, &request)?;
        let answer = &said["answers"][0];
        ensure!(answer["status"] == 200 && answer["matches"] == true && answer["received"] == 1024 * 3000, "{said}");
        ensure!(answer["reset"].is_null(), "the stream ends in order: {said}");
        let baggage = answer["headers"]["baggage"].as_str().unwrap_or_default();
        for item in ["k8s.namespace.name=t", "service.name=app"] {
            ensure!(baggage.contains(item), "the answer's baggage lacks {item}: {said}");
        }
    }
    let record = wire.agent.wait_access("the foreign connection", mark, |record| {
        record["direction"] == "inbound" && record["src.identity"] == "spiffe://test.local/ns/t/sa/foreign"
    })?;
    ensure!(record["error"].is_null() && record["dst.workload"] == "app" && record["src.workload"] == "foreign", "{record}");
    Ok(())
}

fn our_inbound_speaks_tls13_h2_with_the_workloads_identity(wire: &mut Wire) -> anyhow::Result<()> {
    let said = wire.foreign_client("foreign", &json!([]))?;
    ensure!(said["tls"]["version"] == "TLSv1.3" && said["tls"]["alpn"] == "h2", "{said}");
    ensure!(said["tls"]["names"] == json!(["spiffe://test.local/ns/t/sa/app"]), "{said}");
    Ok(())
}

fn our_inbound_answers_400_to_what_is_not_for_this_pod(wire: &mut Wire) -> anyhow::Result<()> {
    let said = wire.foreign_client(
        "foreign",
        &json!([
            { "method": "GET", "authority": wire.app(PORT) },
            { "authority": "no port here" },
            { "authority": "10.250.0.9:8080" },
            { "authority": wire.topology.pod("caller").at(PORT).to_string() },
        ]),
    )?;
    for answer in said["answers"].as_array().context("answers")? {
        // A malformed request may also be answered on the HTTP/2 level, with a stream error (RFC 9113 §8.1.1).
        let refused = answer["status"] == 400 || (answer["status"].is_null() && answer["reset"].is_number());
        ensure!(refused, "{answer} in {said}");
    }
    ensure!(
        said["answers"][0]["status"] == 400 && said["answers"][2]["status"] == 400 && said["answers"][3]["status"] == 400,
        "{said}"
    );
    ensure!(
        said["answers"][2]["headers"]["x-culvert-reason"].as_str().is_some_and(|why| why.starts_with("bad_request")),
        "{said}"
    );
    Ok(())
}

fn our_inbound_answers_401_to_a_source_that_is_not_allowed(wire: &mut Wire) -> anyhow::Result<()> {
    let said = wire.foreign_client("somebody-else", &json!([{ "authority": wire.app(PORT) }]))?;
    let answer = &said["answers"][0];
    ensure!(answer["status"] == 401, "{said}");
    ensure!(answer["headers"]["x-culvert-reason"].as_str().is_some_and(|why| why.starts_with("not_allowed")), "{said}");
    Ok(())
}

fn our_inbound_answers_503_when_nothing_listens(wire: &mut Wire) -> anyhow::Result<()> {
    // Nothing on port 9; and the agent's own ports are never delivered to.
    let ports = [9, 15001, 15006, 15008];
    let requests: Vec<Value> = ports.iter().map(|port| json!({ "authority": wire.app(*port) })).collect();
    let said = wire.foreign_client("foreign", &json!(requests))?;
    let answers = said["answers"].as_array().context("answers")?;
    ensure!(answers.len() == ports.len() && answers.iter().all(|answer| answer["status"] == 503), "{said}");
    Ok(())
}

fn one_foreign_tunnel_carries_many_streams_after_refusals(wire: &mut Wire) -> anyhow::Result<()> {
    let mut requests = vec![json!({ "authority": "10.250.0.9:1" }), json!({ "authority": wire.app(9) })];
    requests.extend((0..30).map(|_| json!({ "authority": wire.app(PORT), "first": "echo\n", "send": "hello" })));
    let said = wire.foreign_client("foreign", &json!(requests))?;
    let good = said["answers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|answer| answer["status"] == 200 && answer["received"] == 5)
        .count();
    ensure!(good == 30, "{good} of 30 streams worked: {said}");
    Ok(())
}

fn our_outbound_sends_what_a_foreign_server_expects(wire: &mut Wire) -> anyhow::Result<()> {
    let (caller, foreign) = (wire.topology.pod("caller"), wire.topology.pod("foreign"));
    for (to, source) in [(foreign.at(PORT), std::net::IpAddr::from(caller.v4)), (foreign.at6(PORT), caller.v6.into())] {
        let before = wire.recorded().len();
        let mut client = Client::open(caller, to, "hello")?;
        ensure!(client.line()? == "hello", "the foreign server echoes");
        let record = wait::until("the foreign server's record", wait::PATIENCE, || {
            wire.recorded().into_iter().skip(before).find(|one| one["headers"].is_object())
        })?;
        let header = |name: &str| record["headers"][name].as_str().unwrap_or_default().to_owned();
        ensure!(record["tls"] == "TLSv1.3" && record["alpn"] == "h2" && record["sni"].is_null(), "{record}");
        ensure!(record["names"] == json!(["spiffe://test.local/ns/t/sa/caller"]), "the source's own identity: {record}");
        ensure!(header(":method") == "CONNECT" && header(":authority") == to.to_string(), "{record}");
        ensure!(
            record["headers"].get(":path").is_none() && record["headers"].get(":scheme").is_none(),
            "plain CONNECT: {record}"
        );
        let baggage = header("baggage");
        for item in ["k8s.namespace.name=t", "service.name=caller", "cloud.availability_zone=zone-1"] {
            ensure!(baggage.contains(item), "baggage lacks {item}: {record}");
        }
        ensure!(header("forwarded").contains(&source.to_string()), "forwarded names {source}: {record}");
        let trace = header("traceparent");
        let parts: Vec<usize> = trace.split('-').map(str::len).collect();
        ensure!(parts == [2, 32, 16, 2], "traceparent {trace:?}");
    }
    Ok(())
}

fn our_outbound_carries_data_through_a_foreign_server(wire: &mut Wire) -> anyhow::Result<()> {
    use std::io::{Read as _, Write as _};
    let data = mesh_tests::program::pattern(2 << 20);
    let mut client = Client::open(wire.topology.pod("caller"), wire.topology.pod("foreign").at(PORT), "start")?;
    ensure!(client.line()? == "start");
    let mut writer = client.stream().try_clone()?;
    let sent = data.clone();
    let thread = std::thread::spawn(move || -> std::io::Result<()> {
        writer.write_all(&sent)?;
        writer.shutdown(std::net::Shutdown::Write)
    });
    let mut back = Vec::new();
    client.stream().read_to_end(&mut back)?;
    thread.join().map_err(|_panic| anyhow::anyhow!("the writer panicked"))??;
    ensure!(back == data, "{} of {} bytes came back, or other ones", back.len(), data.len());
    Ok(())
}

fn our_outbound_reports_a_foreign_refusal(wire: &mut Wire) -> anyhow::Result<()> {
    let (caller, foreign) = (wire.topology.pod("caller"), wire.topology.pod("foreign"));
    for port in [8401, 8503, 8999] {
        let mark = wire.agent.mark();
        let answer = Client::open(caller, foreign.at(port), "hello").and_then(|mut client| client.line());
        ensure!(answer.is_err(), "port {port} was answered: {answer:?}");
        let record = wire.agent.wait_access("the refusal", mark, |record| {
            record["direction"] == "outbound" && record["error"].as_str().is_some_and(|why| !why.is_empty())
        })?;
        let why = record["error"].as_str().unwrap_or_default().to_owned();
        // REFUSED_STREAM is HTTP/2's own word for "no room, try elsewhere" (RFC 9113 §8.7).
        let word = if port == 8999 { "overloaded" } else { "peer_refused" };
        ensure!(why.starts_with(word), "{port}: {why}");
        ensure!(port == 8999 || why.contains(if port == 8401 { "401" } else { "503" }), "it names the status: {why}");
    }
    ensure!(wire.foreign_server.ended().is_none(), "the foreign server ended");
    Ok(())
}

fn our_outbound_refuses_a_foreign_server_with_another_identity(wire: &mut Wire) -> anyhow::Result<()> {
    // At the address of `impostor` something answers that holds the certificate of `foreign`.
    let impostor = wire.topology.pod("impostor");
    let record = wire.files.path().join("impostor-record");
    let _server = start_foreign_server(&wire.python, impostor, wire.ca.path(), wire.files.path(), &record)?;
    let mark = wire.agent.mark();
    let answer = Client::open(wire.topology.pod("caller"), impostor.at(PORT), "hello").and_then(|mut client| client.line());
    ensure!(answer.is_err(), "it was answered: {answer:?}");
    wire.agent.wait_access("the refusal", mark, |record| {
        record["error"].as_str().is_some_and(|why| why.starts_with("identity_mismatch"))
    })?;
    let text = std::fs::read_to_string(&record).unwrap_or_default();
    ensure!(!text.contains("CONNECT"), "a CONNECT was sent to it: {text}");
    Ok(())
}
