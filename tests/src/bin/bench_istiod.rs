//! The agent under a control plane of a large cluster: how long until it knows the mesh, with how much memory, and what it costs
//! to follow endpoints that come and go. The control plane is the one of the tests; its own time is in the first figure.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::ensure;
use bytes::Bytes;
use mesh_proto::istio::workload::{
    Address, Locality, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus, address,
};
use mesh_proto::{ADDRESS_TYPE, Message};
use mesh_tests::agent::{Agent, AgentSpec};
use mesh_tests::bench::benchmark::{Benchmark, judge};
use mesh_tests::bench::flags::Flags;
use mesh_tests::bench::process::{self, Pressure};
use mesh_tests::bench::versus::{Fact, Versus};
use mesh_tests::cni::CniAgent;
use mesh_tests::istiod::Istiod;
use mesh_tests::topology::Plan;
use mesh_tests::{netns, wait};

const HELP: &str = "\
bench_istiod [flags]
  --addresses N   workloads and services, default 100000; one in a hundred is a service
  --rate N        endpoint changes a second, default 1000
  --seconds N     for how long, default 20
  --out DIR       where the agent's log goes; default: a folder that is removed
Fails where a limit is MISSED; there is none for more addresses or a higher rate than the default.";

/// The port of the control plane.
const CONTROL: u16 = 15012;
/// The size the limits are for, and those: addresses and changes a second; seconds, MiB, percent of one core.
const SIZE: (usize, usize) = (100_000, 1000);
const PUSH_MUST: f64 = 5.0;
const MEMORY_MUST: f64 = 300.0;
const CHURN_MUST: f64 = 25.0;

fn main() -> ExitCode {
    Benchmark { name: "bench_istiod", help: HELP, switches: &[], read: Run::from_flags, go: bench }.main()
}

/// What is measured.
struct Run {
    addresses: usize,
    rate: usize,
    seconds: usize,
    out: Option<PathBuf>,
}
impl Run {
    fn from_flags(mut flags: Flags) -> anyhow::Result<Self> {
        let mut number = |name, default| anyhow::Ok(flags.optional(name)?.unwrap_or(default));
        let (addresses, rate, seconds) = (number("addresses", SIZE.0)?, number("rate", SIZE.1)?, number("seconds", 20)?);
        let out = flags.optional("out")?;
        flags.end()?;
        Ok(Self { addresses, rate, seconds, out })
    }
}

fn bench(run: Run) -> anyhow::Result<()> {
    let Run { addresses, rate, seconds, out } = run;
    let files = netns::scratch("bench-istiod")?;
    let topology = Plan::default().node("node-a", "zone-1").host("control").build()?;
    let control = topology.host("control");
    let istiod = Istiod::start(control.listen(CONTROL)?, &["istiod.test"])?;
    istiod.replace(mesh(addresses));
    std::fs::write(files.path().join("root.pem"), istiod.root())?;
    let cni = CniAgent::listen(&files.path().join("cni.sock"))?;

    let log = out.as_deref().unwrap_or(files.path());
    std::fs::create_dir_all(log)?;
    let file = |name: &str| files.path().join(name).to_string_lossy().into_owned();
    let spec = AgentSpec::without_folder("node-a", log)
        .env("XDS_ADDRESS", &format!("https://{}:{CONTROL}", control.v4))
        .env("ALT_XDS_HOSTNAME", "istiod.test")
        .env("ALT_CA_HOSTNAME", "istiod.test")
        .env("XDS_ROOT_CA", &file("root.pem"))
        .env("CA_ROOT_CA", &file("root.pem"))
        .env("INPOD_UDS", &file("cni.sock"));
    let pressure = Pressure::start();
    let begun = Instant::now();
    let agent = spec.start(topology.node("node-a"))?;
    // The agent connects to the CNI agent once it knows the mesh.
    let connection = cni.accept()?;
    let synced = begun.elapsed();
    ensure!(connection.snapshot_sent()?.is_empty(), "the list is refused");
    agent.wait_ready(Duration::from_secs(30))?;
    let (cpu, peak) = (process::cpu_seconds(agent.pid())?, process::peak_rss_kib(agent.pid())?);
    std::thread::sleep(Duration::from_secs(3));
    let rest = process::rss_kib(agent.pid())?;
    println!("{}; somebody waited for a CPU {:.0} % of the time", process::processor(), pressure.percent().unwrap_or_default());
    println!("initial push of {addresses}: {:.2} s from the start of the process, {cpu:.2} s of CPU", synced.as_secs_f64());
    println!("memory: {} MiB at most, {} MiB at rest", peak >> 10, rest >> 10);
    let percent = churn(&istiod, &agent, addresses, rate, seconds)?;
    let nacks = istiod.seen().nacks;
    ensure!(nacks.is_empty(), "refused: {nacks:?}");
    let most = process::peak_rss_kib(agent.pid())? as f64 / 1024.0;
    let fact = |what: &str, value, unit, must| {
        let must = (addresses <= SIZE.0 && rate <= SIZE.1).then_some(must);
        Fact { peer: "culvert", what: what.to_owned(), value, unit, must }
    };
    let facts = vec![
        fact("initial push", synced.as_secs_f64(), "s", PUSH_MUST),
        fact("memory at most", most, "MiB", MEMORY_MUST),
        fact("endpoint changes", percent, "% of one core", CHURN_MUST),
    ];
    let verdicts = Versus { facts, ..Versus::default() }.told();
    println!("{verdicts}");
    judge(&verdicts)
}

/// Endpoints become unhealthy and healthy again, in bursts of ten milliseconds. Gives what that took of one core, in percent.
fn churn(istiod: &Istiod, agent: &Agent, addresses: usize, rate: usize, seconds: usize) -> anyhow::Result<f64> {
    const BURST: Duration = Duration::from_millis(10);
    let pressure = Pressure::start();
    let (before, begun) = (process::cpu_seconds(agent.pid())?, Instant::now());
    let workloads = addresses - addresses / 100;
    let mut changes = 0;
    while begun.elapsed() < Duration::from_secs(seconds as u64) {
        let due = (begun.elapsed().as_secs_f64() * rate as f64) as usize;
        for at in changes..due {
            let mut changed = workload(at * 7919 % workloads, addresses);
            changed.status =
                if (at / workloads).is_multiple_of(2) { WorkloadStatus::Unhealthy } else { WorkloadStatus::Healthy } as i32;
            istiod.workload(changed);
        }
        changes = due;
        std::thread::sleep(BURST);
    }
    let lasted = begun.elapsed().as_secs_f64();
    let cpu = process::cpu_seconds(agent.pid())? - before;
    // Nothing is left to be told.
    let mut last = workload(0, addresses);
    last.canonical_revision = "the-last-change".into();
    std::thread::sleep(BURST * 10);
    let (acks, late) = (istiod.seen().acks, Instant::now());
    istiod.workload(last);
    wait::until_true("the last change to be acknowledged", || istiod.seen().acks > acks)?;
    println!(
        "{:.0} endpoint changes a second for {lasted:.0} s: {:.1} % of one core, {} MiB at most; the last one acknowledged within {:.2} s; \
         somebody waited for a CPU {:.0} % of the time",
        changes as f64 / lasted,
        100.0 * cpu / lasted,
        process::peak_rss_kib(agent.pid())? >> 10,
        late.elapsed().as_secs_f64(),
        pressure.percent().unwrap_or_default(),
    );
    // Fewer changes than asked for cost less than they would.
    ensure!(changes as f64 >= 0.95 * rate as f64 * lasted, "only {changes} changes were made in {lasted:.1} s");
    Ok(100.0 * cpu / lasted)
}

/// Names and addresses as those of a cluster: ten pods a deployment, 100 nodes, ten services to a namespace.
fn workload(at: usize, addresses: usize) -> Workload {
    let service = at % (addresses / 100);
    let (namespace, name) = (format!("team-{}", service / 10), format!("app-{service}-7d4b9c6f5-{at:05x}"));
    let ports = PortList { ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }] };
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}"),
        name,
        service_account: format!("app-{service}"),
        addresses: vec![Bytes::copy_from_slice(&[10, 128 | (at >> 16) as u8, (at >> 8) as u8, at as u8])],
        tunnel_protocol: TunnelProtocol::Hbone as i32,
        node: format!("node-{}", at % 100),
        cluster_id: "Kubernetes".into(),
        workload_name: format!("app-{service}"),
        canonical_name: format!("app-{service}"),
        canonical_revision: "v1".into(),
        locality: Some(Locality { region: "r1".into(), zone: format!("z{}", at % 3), subzone: String::new() }),
        services: [(format!("{namespace}/{}", host(service)), ports)].into(),
        namespace,
        ..Workload::default()
    }
}

fn host(service: usize) -> String {
    format!("app-{service}.team-{}.svc.cluster.local", service / 10)
}

fn service(at: usize) -> Service {
    Service {
        name: format!("app-{at}"),
        namespace: format!("team-{}", at / 10),
        hostname: host(at),
        addresses: vec![NetworkAddress {
            network: String::new(),
            address: Bytes::copy_from_slice(&[10, 96, (at >> 8) as u8, at as u8]),
            length: None,
        }],
        ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        canonical: true,
        ..Service::default()
    }
}

fn mesh(addresses: usize) -> Vec<(&'static str, String, Vec<u8>)> {
    let encode = |of: address::Type| Address { r#type: Some(of) }.encode_to_vec();
    let services = (0..addresses / 100).map(service).map(|service| {
        let name = format!("{}/{}", service.namespace, service.hostname);
        (ADDRESS_TYPE, name, encode(address::Type::Service(service)))
    });
    let workloads = (0..addresses - addresses / 100).map(|at| workload(at, addresses)).map(|workload| {
        let name = workload.uid.clone();
        (ADDRESS_TYPE, name, encode(address::Type::Workload(workload)))
    });
    services.chain(workloads).collect()
}
