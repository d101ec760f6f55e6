//! Ring 3: a node full of pods: what enrolling one costs, what the agent is with all of them, how soon the next agent has them again.
//!
//! `CULVERT_SCALE_PODS` says how many pods, if not as many as a full node has (250). Limits of time hold where nobody else wants the processors;
//! what was seen is printed.
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_binary};
use mesh_tests::bench::process::Pressure;
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::program::{Client, Server};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Plan, PodSpec, Topology};
use mesh_tests::{netns, skip, wait};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const PORT: u16 = 8080;
/// Milliseconds of a processor that enrolling a pod may take: 50 of what ships, of which a debug build is not.
const WORK: f64 = if cfg!(debug_assertions) { 100.0 } else { 50.0 };
/// Seconds from the agent's learning of a pod to its capture, 99 of 100 times, for a pod that comes alone; likewise.
const WITHIN: f64 = if cfg!(debug_assertions) { 0.5 } else { 0.05 };
/// Of the machine's time, in percent, that somebody waited for a processor.
const BUSY: f64 = 20.0;

const TESTS: &[Test<Scale>] = &[
    test("each_pod_is_enrolled_in_time", each_pod_is_enrolled_in_time),
    test("the_agent_is_small_and_idle", the_agent_is_small_and_idle),
    test("the_next_agent_has_every_pod_soon", the_next_agent_has_every_pod_soon),
    test("a_whole_node_is_enrolled_at_once", a_whole_node_is_enrolled_at_once),
];

const OBJECTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
";

fn main() -> ExitCode {
    suite::run("scale", skip::netns_unavailable().or_else(|| skip::command_missing("nft")), set_up, TESTS)
}

/// Dropped in this order.
struct Scale {
    agent: Option<Agent>,
    _servers: Vec<Server>,
    topology: Topology,
    dir: MeshDir,
    ca: TempDir,
    logs: TempDir,
    pods: usize,
}

fn set_up() -> anyhow::Result<Scale> {
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let pods: usize = std::env::var("CULVERT_SCALE_PODS").map_or(Ok(250), |text| text.parse()).context("CULVERT_SCALE_PODS")?;
    ensure!((2..=250).contains(&pods), "CULVERT_SCALE_PODS: 2 to 250");
    let mut plan = Plan::default().node("node-a", "zone-1").host("outside");
    for n in 0..pods {
        let host = u8::try_from(n + 2)?;
        plan.pods.push(PodSpec {
            name: format!("p{n}"),
            namespace: "t".into(),
            node: "node-a".into(),
            service_account: format!("sa{}", n % 20),
            labels: [("app".to_owned(), format!("p{n}"))].into(),
            v4: Ipv4Addr::new(10, 244, 1, host),
            v6: std::net::Ipv6Addr::new(0xfd00, 0x244, 1, 0, 0, 0, 0, host.into()),
        });
    }
    let topology = plan.build()?;
    let (dir, ca, logs) = (MeshDir::empty()?, netns::scratch("ca")?, netns::scratch("logs")?);
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    let servers = vec![Server::start(topology.host("outside"), PORT)?, Server::start(topology.pod("p0"), PORT)?];
    let mut scale = Scale { agent: None, _servers: servers, topology, dir, ca, logs, pods };
    scale.agent = Some(scale.start()?);
    scale.agent()?.wait_ready(Duration::from_secs(40))?;
    Ok(scale)
}

impl Scale {
    fn start(&self) -> anyhow::Result<Agent> {
        AgentSpec::new("node-a", self.dir.path(), self.ca.path(), self.logs.path())
            .env("TRUST_DOMAIN", "test.local")
            .start(self.topology.node("node-a"))
    }
    fn agent(&self) -> anyhow::Result<&Agent> {
        self.agent.as_ref().context("no agent runs")
    }
    fn active(&self) -> anyhow::Result<f64> {
        Ok(self.agent()?.metrics()?.sum("workload_manager_active_proxy_count", &[]))
    }
    fn starts(&self) -> anyhow::Result<Starts> {
        const STEPS: [&str; 14] =
            ["0.01", "0.02", "0.03", "0.04", "0.05", "0.06", "0.075", "0.1", "0.2", "0.5", "1", "5", "10", "20"];
        let page = self.agent()?.metrics()?;
        let of = |suffix: &str, labels: &[(&str, &str)]| page.sum(&format!("culvert_pod_start_seconds{suffix}"), labels);
        let within = STEPS.iter().map(|le| Ok((le.parse()?, of("_bucket", &[("le", le)]))));
        Ok(Starts { count: of("_count", &[]), sum: of("_sum", &[]), within: within.collect::<anyhow::Result<_>>()? })
    }
    /// The first and the last pod are served: to the outside, and to each other by their identities.
    fn calls_work(&self) -> anyhow::Result<()> {
        let last = self.topology.pod(&format!("p{}", self.pods - 1));
        Client::who(last, self.topology.host("outside").at(PORT)).context("outside")?;
        let mark = self.agent()?.mark();
        Client::who(last, self.topology.pod("p0").at(PORT)).context("the first pod")?;
        self.agent()?
            .wait_access("the call", mark, |record| record["direction"] == "inbound" && record["src.identity"].is_string())?;
        Ok(())
    }
}

/// What is counted of starts: from learning of a pod to its capture, the wait for others included.
struct Starts {
    count: f64,
    sum: f64,
    /// Those within so many seconds.
    within: Vec<(f64, f64)>,
}

impl Starts {
    fn since(self, before: &Self) -> Self {
        let within = self.within.iter().zip(&before.within).map(|((le, now), (_, then))| (*le, now - then)).collect();
        Self { count: self.count - before.count, sum: self.sum - before.sum, within }
    }
    fn share(&self, seconds: f64) -> f64 {
        self.within.iter().find(|(le, _)| *le >= seconds).map_or(1.0, |(_, count)| count / self.count)
    }
    /// Seconds in which this share of them was done, as the next step of the histogram says.
    fn within(&self, share: f64) -> f64 {
        self.within.iter().find(|(_, count)| count / self.count >= share).map_or(f64::INFINITY, |(le, _)| *le)
    }
}

/// Seconds of CPU that a process used; that its children used, which ended.
fn cpu(pid: u32) -> anyhow::Result<(f64, f64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<f64> =
        stat.rsplit_once(')').context("a name")?.1.split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect();
    let seconds = |at: usize| fields.get(at..at + 2).map_or(0.0, |ticks| ticks.iter().sum::<f64>() / 100.0);
    Ok((seconds(11), seconds(13)))
}

/// A line of `/proc/PID/status`, in MiB.
fn memory(pid: u32, line: &str) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|found| found.strip_prefix(line)).context("the line")?;
    Ok(kib.split_whitespace().nth(1).context("a number")?.parse::<f64>()? / 1024.0)
}

/// Whether nobody else wants the processors, seen while the agent has nothing to do.
fn quiet() -> bool {
    let pressure = Pressure::start();
    std::thread::sleep(Duration::from_millis(500));
    pressure.percent().is_some_and(|percent| percent <= BUSY)
}

/// An error where it took longer than `limit` although it was quiet, before and after.
fn in_time(what: &str, took: f64, limit: f64, before: bool) -> anyhow::Result<()> {
    ensure!(took <= limit || !before || !quiet(), "{what} took {took:.3} s, {limit} s are allowed");
    Ok(())
}

fn each_pod_is_enrolled_in_time(scale: &mut Scale) -> anyhow::Result<()> {
    let (pid, quiet) = (scale.agent()?.pid(), quiet());
    let before = cpu(pid)?;
    for n in 0..scale.pods {
        let name = format!("p{n}");
        let mark = scale.agent()?.mark();
        scale.dir.put(&format!("pod-{name}.yaml"), &scale.topology.pod_yaml(&name, &[]))?;
        // By the log: what else could be asked takes the agent's time.
        wait::until("the pod to be served", Duration::from_secs(30), || {
            scale.agent().is_ok_and(|agent| agent.log_since(mark).contains("pod is served")).then_some(())
        })?;
    }
    let after = cpu(pid)?;
    let starts = scale.starts()?;
    let count = starts.count;
    ensure!(count as usize == scale.pods, "{count} starts of {} pods", scale.pods);
    let (p99, each) = (starts.within(0.99), |seconds: f64| seconds / count * 1e3);
    println!(
        "MEASURED: enrolment of {count} pods, one after another: mean {:.1} ms, p99 within {} s, {:.1} % within 50 ms; CPU of the agent \
         {:.1} ms each, of nft {:.1} ms; quiet: {quiet}",
        each(starts.sum),
        p99,
        starts.share(0.05) * 100.0,
        each(after.0 - before.0),
        each(after.1 - before.1),
    );
    let work = each(after.0 - before.0 + after.1 - before.1);
    ensure!(work <= WORK, "enrolling one took {work:.1} ms of a processor, {WORK} are allowed");
    in_time("enrolment at p99", p99, WITHIN, quiet)?;
    scale.calls_work()
}

fn a_whole_node_is_enrolled_at_once(scale: &mut Scale) -> anyhow::Result<()> {
    let files: Vec<_> = (0..scale.pods).map(|n| (format!("pod-p{n}.yaml"), format!("p{n}"))).collect();
    for (file, _) in &files {
        scale.dir.remove(file);
    }
    let all = |wanted: usize| {
        wait::until("as many pods to be served", Duration::from_mins(2), || {
            scale.active().is_ok_and(|active| active as usize == wanted).then_some(())
        })
    };
    all(0)?;
    // Taking a redirection away has the kernel wait as often as making it.
    let pins = scale.topology.node("node-a").netns.pins().join("node-a");
    wait::until("nothing to be left of them", Duration::from_mins(2), || {
        std::fs::read_dir(&pins).is_ok_and(|mut left| left.next().is_none()).then_some(())
    })?;
    let before = scale.starts()?;
    let (quiet, began) = (quiet(), Instant::now());
    files.iter().try_for_each(|(file, pod)| scale.dir.put(file, &scale.topology.pod_yaml(pod, &[])))?;
    all(scale.pods)?;
    let took = began.elapsed().as_secs_f64();
    let starts = scale.starts()?.since(&before);
    println!(
        "MEASURED: {} pods at once: all are captured after {took:.2} s; each, with its wait for the others: half within {} s, p99 within {} s",
        scale.pods,
        starts.within(0.5),
        starts.within(0.99),
    );
    in_time("enrolling all", took, scale.pods as f64 * WITHIN, quiet)?;
    scale.calls_work()
}

fn the_agent_is_small_and_idle(scale: &mut Scale) -> anyhow::Result<()> {
    const WATCHED: Duration = Duration::from_secs(6);
    let pid = scale.agent()?.pid();
    // Pods are captured before they have their lasting places.
    let pins = scale.topology.node("node-a").netns.pins().join("node-a");
    wait::until("every pod to have its places", Duration::from_mins(2), || {
        netns::are_settled(&pins).is_ok_and(|settled| settled).then_some(())
    })?;
    let (all, own) = (memory(pid, "VmRSS")?, memory(pid, "RssAnon")?);
    let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let busy = |watched: Duration| -> anyhow::Result<f64> {
        let before = cpu(pid)?.0;
        std::thread::sleep(watched);
        Ok((cpu(pid)?.0 - before) / watched.as_secs_f64() * 100.0)
    };
    // What enrolling leaves to be done (a look at each pod's interfaces, certificates) takes its time on a busy machine.
    wait::until("the agent to have nothing to do", Duration::from_mins(1), || {
        busy(Duration::from_secs(1)).is_ok_and(|busy| busy <= 2.0).then_some(())
    })?;
    let idle = busy(WATCHED)?;
    println!(
        "MEASURED: {} pods: {all:.1} MiB, {own:.1} of them not of files; {files} open files; idle {idle:.2} % of a processor",
        scale.pods
    );
    // The pages of a debug build's file are several times those of what ships.
    ensure!(own <= 60.0, "{own} MiB");
    ensure!(idle <= 2.0, "{idle} % of a processor while nothing happens");
    ensure!(files < 25 * scale.pods + 200, "{files} open files");
    Ok(())
}

fn the_next_agent_has_every_pod_soon(scale: &mut Scale) -> anyhow::Result<()> {
    scale.agent()?.signal(Signal::SIGKILL)?;
    scale.agent()?.wait_end(Duration::from_secs(30))?;
    let (quiet, began) = (quiet(), Instant::now());
    scale.agent = Some(scale.start()?);
    scale.agent()?.wait_ready(Duration::from_mins(1))?;
    let took = began.elapsed().as_secs_f64();
    let (own, children) = cpu(scale.agent()?.pid())?;
    println!(
        "MEASURED: restart with {} pods: ready after {took:.2} s; CPU of the agent {own:.2} s, of nft {children:.2} s",
        scale.pods
    );
    let active = scale.active()?;
    ensure!(active as usize == scale.pods, "ready with {active} pods");
    in_time("the restart", took, 3.0, quiet)?;
    scale.calls_work()
}
