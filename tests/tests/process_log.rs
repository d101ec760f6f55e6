//! A waypoint whose standard output is a pipe nobody reads, or whose collector of spans takes none: requests are answered all the
//! same, and what is lost is counted.
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Metrics, find_program};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::hbone::{self, Tunnel};
use mesh_tests::http1::Reader;
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::{http, skip, wait};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;

/// More lines than a pipe and the 16 MiB before it hold, each of them as long as a header may be.
const REQUESTS: usize = 800;
const LONG: usize = 32 * 1024;
/// No single answer may take longer, on a machine as busy as it may be.
const PATIENCE: Duration = Duration::from_secs(15);

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
metadata: { name: waypoint, namespace: d, uid: u, labels: { gateway.networking.k8s.io/gateway-name: waypoint } }
spec: { serviceAccountName: waypoint, nodeName: n, containers: [{ name: c, image: none }] }
status: { phase: Running, podIP: 127.0.10.1, podIPs: [{ ip: 127.0.10.1 }], conditions: [{ type: Ready, status: 'True' }] }
---
apiVersion: v1
kind: Service
metadata: { name: s, namespace: d }
spec: { clusterIP: 127.30.1.1, clusterIPs: [127.30.1.1], ports: [{ name: http, port: 80 }] }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: s, namespace: d }
spec: { hosts: [s.d.svc.cluster.local], http: [{ directResponse: { status: 200, body: { string: here } } }] }
";

struct Running(Child);
impl Drop for Running {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn free_ports<const N: usize>() -> anyhow::Result<[SocketAddr; N]> {
    let held: Vec<TcpListener> = (0..N).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
    let all: Vec<SocketAddr> = held.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
    all.try_into().map_err(|_| anyhow::anyhow!("ports"))
}

/// A waypoint of this mesh, ready, and where it is reached.
struct Started {
    waypoint: Running,
    hbone: SocketAddr,
    stats: SocketAddr,
    readiness: SocketAddr,
    ca: TempDir,
    _mesh: MeshDir,
}
impl Started {
    fn start(binary: &Path, mesh: MeshDir, arguments: &[&str], out: Stdio) -> anyhow::Result<Self> {
        let ca = tempfile::tempdir()?;
        let [hbone, admin, stats, envoy_stats, readiness] = free_ports()?;
        let waypoint = Running(
            Command::new(binary)
                .args([
                    "proxy",
                    "--namespace",
                    "d",
                    "--pod",
                    "waypoint",
                    "--service-account",
                    "waypoint",
                    "--gateway",
                    "waypoint",
                ])
                .arg("--mesh-dir")
                .arg(mesh.path())
                .arg("--ca-dir")
                .arg(ca.path())
                .args(["--hbone-addr", &hbone.to_string(), "--admin-addr", &admin.to_string()])
                .args(["--stats-addr", &stats.to_string(), "--envoy-stats-addr", &envoy_stats.to_string()])
                .args(["--readiness-addr", &readiness.to_string(), "--listen-ip", "127.0.0.1", "--worker-threads", "1"])
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(out)
                .stderr(Stdio::inherit())
                .spawn()?,
        );
        wait::until("the waypoint's readiness", Duration::from_secs(40), || {
            http::get_here(readiness, "/healthz/ready").is_ok_and(|answer| answer.status == 200).then_some(())
        })?;
        Ok(Self { waypoint, hbone, stats, readiness, ca, _mesh: mesh })
    }
    /// A client's stream to the service.
    async fn open(&self) -> anyhow::Result<Reader<hbone::Stream>> {
        let tls = hbone::client_tls(&TestCa::of_dir(self.ca.path())?.issue("spiffe://cluster.local/ns/d/sa/client")?)?;
        let tunnel = Tunnel::connect(self.hbone, &tls).await?;
        Ok(Reader::new(tunnel.open("127.30.1.1:80").await?))
    }
    fn count(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<u64> {
        let page = http::get_here(self.stats, "/stats/prometheus")?;
        Ok(Metrics::parse(&page.body).sum(name, labels) as u64)
    }
    fn is_ready(&self) -> anyhow::Result<()> {
        ensure!(http::get_here(self.readiness, "/healthz/ready")?.status == 200, "it is no longer ready");
        Ok(())
    }
}
/// The slowest of so many requests in a row, none of which may be slow.
async fn ask_often(reader: &mut Reader<hbone::Stream>, count: usize, agent: &str) -> anyhow::Result<()> {
    let mut slowest = Duration::ZERO;
    for _ in 0..count {
        let start = Instant::now();
        ask(reader, agent).await?;
        slowest = slowest.max(start.elapsed());
    }
    ensure!(slowest < PATIENCE, "a request took {slowest:?}");
    Ok(())
}
fn program(test: &str) -> Option<PathBuf> {
    match find_program("waypoint") {
        Ok(binary) => Some(binary),
        Err(why) => {
            skip::skipped(&format!("process_log::{test}"), &format!("{why:#}"));
            None
        }
    }
}

/// A collector that takes connections and never reads. `@` is its port.
const TRACED: &str = "
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: collector, namespace: d, labels: { istio.io/use-waypoint: none } }
spec:
  hosts: [collector.d.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{ number: 4317, name: grpc, protocol: GRPC, targetPort: @ }]
  endpoints: [{ address: 127.0.0.1 }]
---
apiVersion: v1
kind: ConfigMap
metadata: { name: istio, namespace: istio-system }
data:
  mesh: |
    defaultProviders: { tracing: [ otel ] }
    extensionProviders:
    - { name: otel, opentelemetry: { service: collector.d.example, port: 4317, grpc: { timeout: 60s } } }
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: { name: all, namespace: istio-system }
spec: { tracing: [{ randomSamplingPercentage: 100 }] }
";
/// More than the exporter holds: a queue of 2048, a batch of 256 under way.
const SPANS: usize = 2600;

#[test]
fn a_collector_that_reads_nothing_loses_spans_and_no_request_waits_for_it() -> anyhow::Result<()> {
    let Some(binary) = program("a_collector_that_reads_nothing_loses_spans_and_no_request_waits_for_it") else { return Ok(()) };
    // The kernel takes its connections; nobody accepts them.
    let collector = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mesh = MeshDir::empty()?;
    mesh.put("mesh.yaml", &format!("{MESH}{}", TRACED.replace('@', &collector.local_addr()?.port().to_string())))?;
    let started = Started::start(&binary, mesh, &["--access-log=false"], Stdio::null())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut reader = started.open().await?;
        ask_often(&mut reader, SPANS, "traced").await?;
        let lost = started.count("culvert_trace_spans_total", &[("outcome", "queue_full")])?;
        // Each one is queued, under way, or lost.
        ensure!((1..=SPANS as u64 - 2048).contains(&lost), "{lost} of {SPANS} spans are said to be lost");
        let sent = started.count("culvert_trace_spans_total", &[("outcome", "sent")])?;
        ensure!(sent == 0, "{sent} spans are said to be sent");
        ask_often(&mut reader, 50, "and after that").await
    })?;
    started.is_ready()
}

#[test]
fn a_full_pipe_loses_lines_and_no_request_waits_for_it() -> anyhow::Result<()> {
    let Some(binary) = program("a_full_pipe_loses_lines_and_no_request_waits_for_it") else { return Ok(()) };
    let mesh = MeshDir::empty()?;
    mesh.put("mesh.yaml", MESH)?;
    let mut started = Started::start(&binary, mesh, &[], Stdio::piped())?;
    let mut pipe = started.waypoint.0.stdout.take().context("the pipe")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut reader = runtime.block_on(async {
        let mut reader = started.open().await?;
        ask_often(&mut reader, REQUESTS, &"a".repeat(LONG)).await?;
        anyhow::Ok(reader)
    })?;
    let lost = || started.count("culvert_log_lines_dropped_total", &[]);
    let then = lost()?;
    ensure!((1..REQUESTS as u64).contains(&then), "{then} of {REQUESTS} lines are said to be lost");
    started.is_ready()?;

    // Somebody reads again.
    let so_far = Arc::new(Mutex::new(Vec::new()));
    let read = Arc::clone(&so_far);
    let reading = thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        loop {
            match pipe.read(&mut piece)? {
                0 => return std::io::Result::Ok(()),
                n => read.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&piece[..n]),
            }
        }
    });
    let text = || String::from_utf8_lossy(&so_far.lock().unwrap_or_else(PoisonError::into_inner)).into_owned();
    runtime.block_on(async {
        let end = Instant::now() + wait::PATIENCE;
        // Until one is taken: the buffer empties as fast as it is read.
        loop {
            let before = lost()?;
            ask(&mut reader, "after all").await?;
            if lost()? == before {
                return anyhow::Ok(());
            }
            ensure!(Instant::now() < end, "lines are still lost");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })?;
    wait::until_true("what came later, and that lines were lost", || {
        let text = text();
        text.contains("after all") && text.contains("log lines were lost")
    })?;
    drop(started);
    reading.join().map_err(|_| anyhow::anyhow!("the reader"))??;
    let text = text();
    let whole = text.lines().filter(|line| line.contains(&"a".repeat(LONG))).count();
    ensure!(whole as u64 + then >= REQUESTS as u64, "{whole} lines came and {then} are said to be lost of {REQUESTS}");
    Ok(())
}

async fn ask(reader: &mut Reader<hbone::Stream>, agent: &str) -> anyhow::Result<()> {
    let request = format!("GET / HTTP/1.1\r\nhost: s.d.svc.cluster.local\r\nuser-agent: {agent}\r\n\r\n");
    reader.stream().write_all(request.as_bytes()).await?;
    let answer = tokio::time::timeout(Duration::from_secs(40), reader.answer("GET")).await.context("no answer at all")??;
    ensure!(answer.status == 200 && answer.body == b"here", "{answer:?}");
    Ok(())
}
