//! A waypoint whose standard output is a pipe nobody reads: requests are answered all the same, lines are lost and counted, and
//! told of once somebody reads again.
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Metrics, find_program};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::hbone::{self, Tunnel};
use mesh_tests::http1::Reader;
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::{http, skip, wait};
use tokio::io::AsyncWriteExt as _;

/// More lines than a pipe and the 16 MiB before it hold, each of them as long as a header may be.
const REQUESTS: usize = 800;
const LONG: usize = 32 * 1024;
/// No single answer may take longer, on a machine as busy as it may be.
const PATIENCE: Duration = Duration::from_secs(5);

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

#[test]
fn a_full_pipe_loses_lines_and_no_request_waits_for_it() -> anyhow::Result<()> {
    let binary = match find_program("waypoint") {
        Ok(binary) => binary,
        Err(why) => {
            skip::skipped("process_log::a_full_pipe_loses_lines_and_no_request_waits_for_it", &format!("{why:#}"));
            return Ok(());
        }
    };
    let mesh = MeshDir::empty()?;
    mesh.put("mesh.yaml", MESH)?;
    let ca = tempfile::tempdir()?;
    let [hbone_at, admin, stats, envoy_stats, readiness] = free_ports()?;
    let mut waypoint = Running(
        Command::new(binary)
            .args(["proxy", "--namespace", "d", "--pod", "waypoint", "--service-account", "waypoint", "--gateway", "waypoint"])
            .arg("--mesh-dir")
            .arg(mesh.path())
            .arg("--ca-dir")
            .arg(ca.path())
            .args(["--hbone-addr", &hbone_at.to_string(), "--admin-addr", &admin.to_string()])
            .args(["--stats-addr", &stats.to_string(), "--envoy-stats-addr", &envoy_stats.to_string()])
            .args(["--readiness-addr", &readiness.to_string(), "--listen-ip", "127.0.0.1", "--worker-threads", "1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?,
    );
    let mut pipe = waypoint.0.stdout.take().context("the pipe")?;
    wait::until("the waypoint's readiness", Duration::from_secs(20), || {
        http::get_here(readiness, "/healthz/ready").is_ok_and(|answer| answer.status == 200).then_some(())
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tls = hbone::client_tls(&TestCa::of_dir(ca.path())?.issue("spiffe://cluster.local/ns/d/sa/client")?)?;
    let (mut reader, slowest) = runtime.block_on(async {
        let tunnel = Tunnel::connect(hbone_at, &tls).await?;
        let mut reader = Reader::new(tunnel.open("127.30.1.1:80").await?);
        let agent = "a".repeat(LONG);
        let mut slowest = Duration::ZERO;
        for _ in 0..REQUESTS {
            let start = Instant::now();
            ask(&mut reader, &agent).await?;
            slowest = slowest.max(start.elapsed());
        }
        anyhow::Ok((reader, slowest))
    })?;
    ensure!(slowest < PATIENCE, "a request took {slowest:?}");
    let lost = || -> anyhow::Result<u64> {
        let page = http::get_here(stats, "/stats/prometheus")?;
        Ok(Metrics::parse(&page.body).sum("culvert_log_lines_dropped_total", &[]) as u64)
    };
    let then = lost()?;
    ensure!((1..REQUESTS as u64).contains(&then), "{then} of {REQUESTS} lines are said to be lost");
    ensure!(http::get_here(readiness, "/healthz/ready")?.status == 200, "it is no longer ready");

    // Somebody reads again.
    let reading = thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).map(|_| text)
    });
    runtime.block_on(async {
        let end = Instant::now() + Duration::from_secs(10);
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
    thread::sleep(Duration::from_millis(300));
    drop(waypoint);
    let text = reading.join().map_err(|_| anyhow::anyhow!("the reader"))??;
    let whole = text.lines().filter(|line| line.contains(&"a".repeat(LONG))).count();
    ensure!(whole as u64 + then >= REQUESTS as u64, "{whole} lines came and {then} are said to be lost of {REQUESTS}");
    ensure!(text.contains("log lines were lost"), "nobody said that lines were lost");
    ensure!(text.contains("after all"), "what came later was not written");
    Ok(())
}

async fn ask(reader: &mut Reader<hbone::Stream>, agent: &str) -> anyhow::Result<()> {
    let request = format!("GET / HTTP/1.1\r\nhost: s.d.svc.cluster.local\r\nuser-agent: {agent}\r\n\r\n");
    reader.stream().write_all(request.as_bytes()).await?;
    let answer = tokio::time::timeout(Duration::from_secs(20), reader.answer("GET")).await.context("no answer at all")??;
    ensure!(answer.status == 200 && answer.body == b"here", "{answer:?}");
    Ok(())
}
