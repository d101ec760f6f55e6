//! Sets both sides up, runs all chosen cases, reads both logs, judges.
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::StreamExt as _;
use mesh_tests::agent::{Metrics, find_program};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::envoy::{self, Envoy};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::suite::{self, CannotRun, Verdict};
use mesh_tests::{http, wait};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpSocket;

use crate::backend::Backend;
use crate::case::{Paths, Scenario};
use crate::compare::{self, Logged, Observed};
use crate::differences::{DIFFERENCES, EVERYWHERE};
use crate::istiod;
use crate::sides::{Side, Tunnels};

/// Cases that must have been compared where nobody chose among them.
const LEAST: usize = 120;
/// Scenarios under way at once.
const AT_ONCE: usize = 6;

/// Runs the suite.
pub fn suite(scenarios: &[Scenario]) -> ExitCode {
    let names: BTreeSet<&str> = scenarios.iter().map(|scenario| scenario.name).collect();
    assert_eq!(names.len(), scenarios.len(), "two scenarios have one name");
    // Which case a test is; after them one test per known difference.
    let cases: Vec<(usize, usize)> =
        scenarios.iter().enumerate().flat_map(|(s, one)| (0..one.cases.len()).map(move |c| (s, c))).collect();
    let names: Vec<String> =
        cases.iter().map(|&(s, c)| format!("{}::{}", scenarios[s].name, scenarios[s].cases[c].name)).collect();
    for one in DIFFERENCES {
        for case in one.cases {
            assert!(names.iter().any(|name| name == case), "a difference is listed for {case:?}, which is no case");
        }
    }
    let listed = EVERYWHERE.iter().map(|one| format!("listed_difference::{}", one.name));
    let tests: Vec<String> = names.iter().cloned().chain(listed).map(|name| name.replace(' ', "_")).collect();
    suite::run_batch("process_differential", &tests, |chosen| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(run(scenarios, &cases, &names, chosen))
    })
}

async fn run(
    scenarios: &[Scenario],
    cases: &[(usize, usize)],
    names: &[String],
    chosen: &[usize],
) -> anyhow::Result<Vec<(Verdict, f64)>> {
    let start = Instant::now();
    let field = Arc::new(Field::set_up(scenarios).await?);
    println!("set up in {:.2}s", start.elapsed().as_secs_f64());
    let mut results: HashMap<usize, Ran> = HashMap::new();
    // The cases of a scenario share health and pools, so they run in order; scenarios do not know of each other.
    let by_scenario = scenarios.iter().enumerate().map(|(s, scenario)| {
        let field = Arc::clone(&field);
        let wanted: Vec<usize> = chosen.iter().copied().filter(|&test| cases.get(test).is_some_and(|case| case.0 == s)).collect();
        async move {
            let mut out = Vec::new();
            for test in wanted {
                out.push((test, field.case(test, s, scenario, cases[test].1).await));
            }
            out
        }
    });
    let mut running = futures_util::stream::iter(by_scenario).buffer_unordered(AT_ONCE);
    while let Some(done) = running.next().await {
        results.extend(done);
    }
    field.add_logs(&mut results).await;
    let mut met = vec![0; EVERYWHERE.len()];
    let mut out = Vec::new();
    for &test in chosen {
        let Some(ran) = results.get(&test) else { continue };
        let (s, c) = cases[test];
        let case = &scenarios[s].cases[c];
        let ours = compare::aspects(case, &ran.ours, ran.took_ours);
        let theirs = compare::aspects(case, &ran.theirs, ran.took_theirs);
        let mut verdict = compare::judge(case, &names[test], &ours, &theirs, &mut met);
        if verdict.is_err()
            && let Some(why) = ran.ours.iter().find_map(|one| one.answer.as_ref().err())
        {
            verdict = verdict.with_context(|| format!("Culvert gave no answer: {why}"));
        }
        if std::env::var_os("CULVERT_DIFFERENTIAL_SHOW").is_some() {
            println!("{}\n  ours  {ours:#?}\n  Envoy {theirs:#?}", names[test]);
        }
        out.push((verdict, ran.took_ours.max(ran.took_theirs) as f64 / 1000.0));
    }
    let chosen_cases: Vec<&str> = chosen.iter().filter_map(|&test| names.get(test)).map(String::as_str).collect();
    let both = results.values().filter(|ran| !ran.ours.is_empty() && !ran.theirs.is_empty()).count();
    println!("{both} of {} cases ran on both sides; listed differences from Envoy {}:", chosen_cases.len(), envoy::VERSION);
    if chosen.len() == names.len() + EVERYWHERE.len() && both < LEAST {
        bail!("only {both} cases were compared, {LEAST} are the least");
    }
    for one in DIFFERENCES {
        let here: Vec<&str> = one.cases.iter().copied().filter(|name| chosen_cases.contains(name)).collect();
        if !here.is_empty() {
            println!("  {}: {}", one.reason, here.join(", "));
        }
    }
    for &test in chosen {
        let Some(at) = test.checked_sub(cases.len()) else { continue };
        println!("  everywhere: {}: {} ({} times)", EVERYWHERE[at].name, EVERYWHERE[at].reason, met[at]);
        let verdict = if met[at] > 0 { Ok(()) } else { Err(anyhow::anyhow!("listed as a difference, but no case showed it")) };
        out.push((verdict, 0.0));
    }
    Ok(out)
}

/// A case on both sides.
struct Ran {
    ours: Vec<Observed>,
    theirs: Vec<Observed>,
    took_ours: u64,
    took_theirs: u64,
}

/// Both sides and what is behind them.
struct Field {
    /// By how they normalise paths.
    waypoints: BTreeMap<Paths, Waypoint>,
    envoy_side: Side,
    backend: Arc<Backend>,
    envoy_log: PathBuf,
    _full: Vec<std::net::TcpStream>,
    _hang: tokio::net::TcpListener,
    _envoy: Envoy,
    /// Labels of metrics that are compared.
    tags: BTreeSet<String>,
    _files: TempDir,
}

/// A waypoint and its mesh.
struct Waypoint {
    side: Side,
    log: PathBuf,
    stats: SocketAddr,
    _process: Running,
    _mesh: MeshDir,
}

struct Running(Child);
impl Drop for Running {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn vip(scenario: usize) -> IpAddr {
    Ipv4Addr::new(127, 30, scenario as u8, 1).into()
}
fn pod_ip(scenario: usize, pod: usize) -> IpAddr {
    Ipv4Addr::new(127, 20, scenario as u8, pod as u8 + 1).into()
}

/// Ports that nobody has at this moment, all different.
fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    let held: Vec<std::net::TcpListener> = (0..N).map(|_| std::net::TcpListener::bind("0.0.0.0:0")).collect::<Result<_, _>>()?;
    let ports: Vec<u16> = held.iter().map(|one| one.local_addr().map(|at| at.port())).collect::<Result<_, _>>()?;
    ports.try_into().map_err(|_| anyhow::anyhow!("ports"))
}

impl Waypoint {
    fn start(binary: &Path, mesh: MeshDir, paths: Paths, ca: &Path, files: &Path) -> anyhow::Result<Self> {
        let [hbone_port, admin, stats, envoy_stats, readiness] = free_ports()?;
        let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mode = match paths {
            Paths::None => "none",
            Paths::Base => "base",
            Paths::Merge => "merge-slashes",
            Paths::DecodeAndMerge => "decode-and-merge-slashes",
        };
        let log = files.join(format!("waypoint-{mode}.log"));
        let mut child = start_waypoint(binary, mesh.path(), ca, &log, mode, [hbone_port, admin, stats, envoy_stats, readiness])?;
        let mut last = String::new();
        wait::until("the waypoint's readiness", Duration::from_secs(40), || {
            if let Ok(Some(status)) = child.0.try_wait() {
                return Some(Err(anyhow::anyhow!("the waypoint ended with {status}")));
            }
            match http::get_here(local(readiness), "/healthz/ready") {
                Ok(answer) if answer.status == 200 => return Some(Ok(())),
                Ok(answer) => last = answer.body,
                Err(error) => last = format!("{error:#}"),
            }
            None
        })
        .and_then(|ready| ready)
        .with_context(|| format!("{last}\n{}", std::fs::read_to_string(&log).unwrap_or_default()))?;
        if let Some(rejected) = http::get_here(local(admin), "/config_dump").ok().and_then(|dump| problems(&dump.body)) {
            println!("the waypoint says of the objects: {rejected}");
        }
        let tunnels = Tunnels::new(local(hbone_port), TestCa::of_dir(ca)?);
        Ok(Self { side: Side::Culvert(Arc::new(tunnels)), log, stats: local(stats), _process: child, _mesh: mesh })
    }
}

impl Field {
    async fn set_up(scenarios: &[Scenario]) -> anyhow::Result<Self> {
        let waypoint = find_program("waypoint").map_err(|error| CannotRun(format!("{error:#}")))?;
        let envoy_binary = envoy::install()?;
        let [port, closed, envoy_port, envoy_admin] = free_ports()?;
        let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let backend = Backend::start(port).await?;
        // Takes no connection: its queue has room for one, and that is in it.
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from(([0, 0, 0, 0], 0)))?;
        let hang = socket.listen(0)?;
        let hang_port = hang.local_addr()?.port();
        let full = (0..2)
            .filter_map(|_| std::net::TcpStream::connect_timeout(&local(hang_port), Duration::from_millis(50)).ok())
            .collect();

        let files = tempfile::Builder::new().prefix("culvert-differential-").tempdir()?;
        let envoy_log = files.path().join("envoy-access.log");
        let mut meshes: BTreeMap<Paths, MeshDir> = BTreeMap::new();
        let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
        for (s, scenario) in scenarios.iter().enumerate() {
            let port_of = |version: &str| match version {
                "dead" => closed,
                "hang" => hang_port,
                _ => port,
            };
            let mut yaml = service_yaml(s, scenario);
            let mut endpoints: Vec<(&str, SocketAddr)> = Vec::new();
            for (version, count) in &scenario.pods {
                for _ in 0..*count {
                    let ip = pod_ip(s, endpoints.len());
                    backend.pod(ip, version);
                    yaml += &pod_yaml(
                        &format!("{}-{}", scenario.name, endpoints.len()),
                        scenario.name,
                        version,
                        ip,
                        port_of(version),
                    );
                    endpoints.push((version, (ip, port_of(version)).into()));
                }
            }
            let mesh = match meshes.entry(scenario.paths) {
                Entry::Occupied(mesh) => mesh.into_mut(),
                Entry::Vacant(place) => {
                    let mesh = place.insert(MeshDir::empty()?);
                    mesh.put("00-mesh.yaml", MESH)?;
                    mesh.put("01-telemetry.yaml", &mesh_config(scenarios))?;
                    mesh
                }
            };
            mesh.put(&format!("{}.yaml", scenario.name), &format!("{yaml}{}{}", scenario.objects, telemetry_yaml(scenario)))?;
            let http2 = scenario.port_name.starts_with("grpc") || scenario.port_name.starts_with("http2");
            let versions: BTreeSet<&str> = endpoints.iter().map(|(version, _)| *version).chain([""]).collect();
            for version in versions {
                let members: Vec<SocketAddr> =
                    endpoints.iter().filter(|(v, _)| version.is_empty() || *v == version).map(|(_, at)| *at).collect();
                clusters.push(istiod::cluster(&istiod::cluster_name(scenario.name, version), &members, http2, &scenario.cluster));
            }
            listeners.push(istiod::listener(scenario, (vip(s), envoy_port).into(), &envoy_log));
        }
        let config = istiod::bootstrap(listeners, clusters, local(envoy_admin));
        let envoy = Envoy::start(Command::new(envoy_binary), &config, local(envoy_admin), files.path())?;

        let own = scenarios.iter().flat_map(|scenario| scenario.tags.iter().map(|(name, _)| *name));
        let tags =
            ["response_code", "response_flags", "grpc_response_status"].into_iter().chain(own).map(str::to_owned).collect();
        let ca = files.path().join("ca");
        let mut waypoints = BTreeMap::new();
        for (paths, mesh) in meshes {
            waypoints.insert(paths, Waypoint::start(&waypoint, mesh, paths, &ca, files.path())?);
        }
        Ok(Self {
            waypoints,
            envoy_side: Side::Envoy(envoy_port),
            backend,
            envoy_log,
            _full: full,
            _hang: hang,
            _envoy: envoy,
            tags,
            _files: files,
        })
    }

    async fn case(&self, test: usize, s: usize, scenario: &Scenario, c: usize) -> Ran {
        let case = &scenario.cases[c];
        let host = scenario.host();
        let at = (test, SocketAddr::from((vip(s), 80)), host.as_str());
        let timed = |side: Side| async move {
            let start = Instant::now();
            let all = side.run(case, at, &self.backend).await;
            (all, start.elapsed().as_millis() as u64)
        };
        let ours = self.waypoints[&scenario.paths].side.clone();
        let ((ours, took_ours), (theirs, took_theirs)) = tokio::join!(timed(ours), timed(self.envoy_side.clone()));
        Ran { ours, theirs, took_ours, took_theirs }
    }

    /// Adds the labels of metrics that tell requests apart.
    fn add_tags(&self, logs: &mut HashMap<String, Logged>) {
        for waypoint in self.waypoints.values() {
            let Ok(page) = http::get_here(waypoint.stats, "/stats/prometheus") else { continue };
            for series in Metrics::parse(&page.body).0 {
                let id = series.labels.get("request_id").filter(|_| series.name == "istio_requests_total");
                if let Some(logged) = id.and_then(|id| logs.get_mut(id)) {
                    logged.tags = series.labels.into_iter().filter(|(name, _)| self.tags.contains(name)).collect();
                }
            }
        }
    }

    /// Waits for the log lines of all requests that had a name, as long as more come, and adds them.
    async fn add_logs(&self, results: &mut HashMap<usize, Ran>) {
        let (mut least, mut last) = (usize::MAX, Instant::now());
        loop {
            let mut ours = HashMap::new();
            self.waypoints.values().for_each(|waypoint| read_log(&waypoint.log, &mut ours));
            self.add_tags(&mut ours);
            let mut theirs = HashMap::new();
            read_log(&self.envoy_log, &mut theirs);
            let mut missing = 0;
            for ran in results.values_mut() {
                for (all, log) in [(&mut ran.ours, &ours), (&mut ran.theirs, &theirs)] {
                    for one in all {
                        one.logged = log.get(&one.id).filter(|logged| logged.whole).cloned();
                        missing += usize::from(one.logged.is_none() && !one.anonymous);
                    }
                }
            }
            if missing < least {
                (least, last) = (missing, Instant::now());
            }
            if missing == 0 || last.elapsed() > Duration::from_secs(6) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What MeshConfig says: the line every request has, and the formats scenarios want beside it.
fn mesh_config(scenarios: &[Scenario]) -> String {
    let logs = scenarios.iter().flat_map(|scenario| {
        scenario.lines.iter().enumerate().map(|(n, (format, _))| {
            let format = match istiod::line_format(n, format) {
                Value::String(text) => json!({"text": text + "\n"}),
                labels => json!({"labels": labels}),
            };
            json!({"name": provider(scenario, n), "envoyFileAccessLog": {"path": "/dev/stdout", "logFormat": format}})
        })
    });
    let providers: Vec<Value> = scenarios.iter().flat_map(|scenario| scenario.providers.iter().cloned()).chain(logs).collect();
    let mesh = json!({"accessLogFile": "/dev/stdout", "accessLogEncoding": "JSON", "extensionProviders": providers}).to_string();
    let metadata = json!({"name": "istio", "namespace": "istio-system"});
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"mesh": mesh}}).to_string()
}
fn provider(scenario: &Scenario, number: usize) -> String {
    format!("line-{}-{number}", scenario.name)
}

/// The Telemetry object of a scenario, if it wants one.
fn telemetry_yaml(scenario: &Scenario) -> String {
    if scenario.lines.is_empty() && scenario.tags.is_empty() {
        return String::new();
    }
    let mut logs: Vec<Value> = Vec::new();
    for (n, (_, when)) in scenario.lines.iter().enumerate() {
        let mut entry = json!({"providers": [{"name": provider(scenario, n)}]});
        if let Some(expression) = when {
            entry["filter"] = json!({"expression": expression});
        }
        logs.push(entry);
    }
    logs.push(json!({"providers": [{"name": "envoy"}]}));
    let mut tags = json!({"request_id": {"value": "request.headers['x-request-id']"}});
    for (name, expression) in &scenario.tags {
        tags[name] = json!({"value": expression});
    }
    let overrides = json!([{"match": {"metric": "REQUEST_COUNT"}, "tagOverrides": tags}]);
    let object = json!({
        "apiVersion": "telemetry.istio.io/v1", "kind": "Telemetry", "metadata": {"name": scenario.name, "namespace": "d"},
        "spec": {
            "targetRefs": [{"group": "", "kind": "Service", "name": scenario.name}],
            "accessLogging": logs,
            "metrics": if scenario.tags.is_empty() { json!([]) } else { json!([{"overrides": overrides}]) },
        },
    });
    format!("---\n{object}\n")
}

/// What a log says, by request.
fn read_log(path: &Path, out: &mut HashMap<String, Logged>) {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let word = |record: &Value, key: &str| record[key].as_str().unwrap_or("-").to_owned();
    for line in text.lines() {
        if let Some((number, rest)) = line.strip_prefix("LINE ").and_then(|rest| rest.split_once(' ')) {
            let (id, rest) = rest.split_once(' ').unwrap_or((rest, ""));
            let logged = out.entry(id.to_owned()).or_default();
            logged.lines.insert(number.to_owned(), rest.replace(id, "ID"));
            continue;
        }
        let Ok(record) = serde_json::from_str::<Value>(line) else { continue };
        if let (Some(number), Some(id)) = (record["line"].as_str(), record["line_of"].as_str()) {
            let logged = out.entry(id.to_owned()).or_default();
            logged.lines.insert(number.to_owned(), record.to_string().replace(id, "ID"));
            continue;
        }
        let Some(id) = record["request_id"].as_str().filter(|_| record.get("response_flags").is_some()) else { continue };
        let logged = out.entry(id.to_owned()).or_default();
        logged.flags = word(&record, "response_flags");
        logged.details = word(&record, "response_code_details");
        logged.whole = true;
        for (name, value) in record["tags"].as_object().into_iter().flatten() {
            let value = match value {
                Value::Null if name == "grpc_response_status" => continue,
                // What a metric has instead.
                Value::Null => "unknown".into(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            logged.tags.insert(name.clone(), value);
        }
    }
}

/// What the configuration page says of objects it could not use.
fn problems(dump: &str) -> Option<String> {
    let dump: Value = serde_json::from_str(dump).ok()?;
    let list = dump.get("diagnostics")?;
    (list.as_array().is_some_and(|list| !list.is_empty())).then(|| serde_json::to_string_pretty(list).unwrap_or_default())
}

fn start_waypoint(
    binary: &Path,
    mesh: &Path,
    ca: &Path,
    log: &Path,
    mode: &str,
    [hbone, admin, stats, envoy_stats, readiness]: [u16; 5],
) -> anyhow::Result<Running> {
    if !binary.is_file() {
        bail!("no waypoint at {}", binary.display());
    }
    let out = File::create(log)?;
    let at = |port: u16| format!("127.0.0.1:{port}");
    let child = Command::new(binary)
        .args(["proxy", "--namespace", "d", "--pod", "waypoint", "--service-account", "waypoint", "--gateway", "waypoint"])
        .arg("--mesh-dir")
        .arg(mesh)
        .arg("--ca-dir")
        .arg(ca)
        .args(["--hbone-addr", &at(hbone), "--admin-addr", &at(admin), "--stats-addr", &at(stats)])
        .args(["--envoy-stats-addr", &at(envoy_stats), "--path-normalization", mode])
        .args(["--readiness-addr", &at(readiness), "--listen-ip", "127.0.0.1", "--worker-threads", "1"])
        .env("LOG_FORMAT", "json")
        // Short, for the cases of `protocol` that wait for them.
        .env("CULVERT_HTTP_IDLE_TIMEOUT", "3s")
        .env("CULVERT_REQUEST_HEADERS_TIMEOUT", "1s")
        .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()))
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()
        .context("start the waypoint")?;
    Ok(Running(child))
}

const MESH: &str = "
apiVersion: v1
kind: Namespace
metadata: { name: d, labels: { istio.io/use-waypoint: waypoint } }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: waypoint, namespace: d, labels: { istio.io/waypoint-for: service } }
spec:
  gatewayClassName: istio-waypoint
  listeners: [{ name: mesh, port: 15008, protocol: HBONE }]
status: { addresses: [{ type: IPAddress, value: 127.0.10.1 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: waypoint, namespace: d, uid: u-waypoint, labels: { gateway.networking.k8s.io/gateway-name: waypoint } }
spec: { serviceAccountName: waypoint, nodeName: n, containers: [{ name: c, image: none }] }
status: { phase: Running, podIP: 127.0.10.1, podIPs: [{ ip: 127.0.10.1 }], conditions: [{ type: Ready, status: 'True' }] }
---
apiVersion: v1
kind: Pod
metadata: { name: client, namespace: d, uid: u-client, labels: { app: client } }
spec: { serviceAccountName: client, nodeName: n, containers: [{ name: c, image: none }] }
status: { phase: Running, podIP: 127.0.0.1, podIPs: [{ ip: 127.0.0.1 }], conditions: [{ type: Ready, status: 'True' }] }
";

fn service_yaml(s: usize, scenario: &Scenario) -> String {
    let (name, port_name, ip) = (scenario.name, scenario.port_name, vip(s));
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: d }}\nspec:\n  clusterIP: {ip}\n  clusterIPs: [{ip}]\n  \
         selector: {{ app: {name} }}\n  ports: [{{ name: {port_name}, port: 80, targetPort: web }}]\n"
    )
}

fn pod_yaml(pod: &str, app: &str, version: &str, ip: IpAddr, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {pod}, namespace: d, uid: u-{pod}, labels: {{ app: {app}, version: {version} }} }}\n\
         spec:\n  serviceAccountName: {app}\n  nodeName: n\n  containers: [{{ name: c, image: none, ports: [{{ name: web, containerPort: {port} }}] }}]\n\
         status: {{ phase: Running, podIP: {ip}, podIPs: [{{ ip: {ip} }}], conditions: [{{ type: Ready, status: 'True' }}] }}\n"
    )
}
