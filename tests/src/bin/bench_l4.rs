//! The benchmark of the node agent: two agents in network namespaces against the direct path, a plain relay and, with
//! `--peer`, another binary with the same contract, interleaved in the same run.
//!
//! How it measures: CPU time per unit first, wall time second. Agents share CPU 1, load and backend CPU 0. Every peer gets
//! fresh namespaces in every round, the order is reversed each round, and the pressure on the machine stands beside each row.
//! Differences below ten percent of CPU are noise.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use mesh_tests::bench::benchmark::{Benchmark, judge};
use mesh_tests::bench::case::{self, Case};
use mesh_tests::bench::field::{Carrier, Field, Peer};
use mesh_tests::bench::flags::Flags;
use mesh_tests::bench::parts::Settings;
use mesh_tests::bench::process::{self, Pressure};
use mesh_tests::bench::report::{Memory, Report, Sample};
use mesh_tests::netns;
use serde_json::json;

const HELP: &str = "\
bench_l4 [flags]
  --peer PATH     another agent with istio/ztunnel's contract (environment, local file, istiod's CA, CNI agent), measured in the
                  same run; our own beside it by the same contract too (`contract`)
  --quick         smaller runs, two rounds: a look, not a measurement
  --rounds N      default 4
  --only A,B      only these cases (upload download upload8 download8 ping1 ping16 ping64 rate3000 churn16 memory), or
                  `cliff` alone: 24 000 connections of one source, CPU per block of 4000
  --workers N     ZTUNNEL_WORKER_THREADS of every agent, default 2
  --agent PATH    our agent; default: the `ztunnel` beside this program
  --out DIR       where the JSON file and the logs go; default: the folder of this program";

/// How long a fresh agent gets to give back what only starting took, and one with new connections what only opening took.
const REST: Duration = Duration::from_secs(3);
/// How long agents get to finish the books of a run before their CPU time is read.
const SETTLE: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let go = |run: Run| {
        process::raise_open_files();
        netns::sweep_leftovers();
        run.go()
    };
    Benchmark { name: "bench_l4", help: HELP, switches: &["quick"], read: Run::from_flags, go }.main()
}

struct Run {
    peers: Vec<Peer>,
    cases: Vec<Case>,
    memory: bool,
    idle_steps: Vec<u64>,
    rounds: usize,
    settings: Settings,
    out: PathBuf,
}

impl Run {
    fn from_flags(mut flags: Flags) -> anyhow::Result<Self> {
        let own = std::env::current_exe()?;
        let beside = |name: &str| own.with_file_name(name);
        let quick = flags.switch("quick");
        let agent = flags.optional("agent")?.unwrap_or_else(|| beside("ztunnel"));
        let peer = |name: &str, carrier: Carrier| Peer { name: name.into(), carrier };
        let mut peers =
            vec![peer("direct", Carrier::Direct), peer("relay", Carrier::Relay), peer("culvert", Carrier::Agents(agent.clone()))];
        if let Some(path) = flags.optional::<PathBuf>("peer")? {
            peers.push(peer("contract", Carrier::Contract(agent)));
            peers.push(peer("peer", Carrier::Contract(path)));
        }
        for binary in peers.iter().filter_map(Peer::agent) {
            ensure!(binary.is_file(), "no agent at {}", binary.display());
        }
        let mut cases = case::all(quick);
        let mut memory = true;
        let only = flags.optional::<String>("only")?;
        if only.as_deref() == Some("cliff") {
            (cases, memory) = (case::cliff(), false);
        } else if let Some(only) = only {
            let names: Vec<&str> = only.split(',').collect();
            let known = |name: &&str| *name == "memory" || cases.iter().any(|case| case.name == *name);
            ensure!(names.iter().all(known), "--only {only}: unknown case");
            memory = names.contains(&"memory");
            cases.retain(|case| names.contains(&case.name));
        }
        let out: PathBuf = flags.optional("out")?.unwrap_or_else(|| own.parent().unwrap_or(Path::new(".")).to_owned());
        let processors = std::thread::available_parallelism()?.get();
        let run = Self {
            peers,
            cases,
            memory,
            idle_steps: if quick { vec![1000] } else { vec![1000, 10_000] },
            rounds: flags.optional("rounds")?.unwrap_or(if quick { 2 } else { 4 }),
            settings: Settings {
                workers: flags.optional("workers")?.unwrap_or(2),
                cpus: (processors > 1).then_some((1, 0)),
                logs: out.join("logs"),
                loadgen: beside("loadgen"),
            },
            out,
        };
        flags.end()?;
        ensure!(run.settings.loadgen.is_file(), "no load generator at {}", run.settings.loadgen.display());
        Ok(run)
    }

    fn go(&self) -> anyhow::Result<()> {
        let _there_were_none = std::fs::remove_dir_all(&self.settings.logs);
        let mut report = Report::default();
        for round in 0..self.rounds {
            let mut order: Vec<&Peer> = self.peers.iter().collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for peer in order {
                eprintln!("round {} of {}: {}", round + 1, self.rounds, peer.name);
                if let Err(error) = self.round(peer, round, &mut report) {
                    report.problems.push(format!("{} round {}: {error:#}", peer.name, round + 1));
                }
            }
        }
        if self.memory {
            for peer in self.peers.iter().filter(|peer| peer.agent().is_some()) {
                eprintln!("memory: {}", peer.name);
                match self.measure_memory(peer) {
                    Ok(memory) => report.memory.push(memory),
                    Err(error) => report.problems.push(format!("{} memory: {error:#}", peer.name)),
                }
            }
        }
        self.tell(&report)
    }

    fn round(&self, peer: &Peer, round: usize, report: &mut Report) -> anyhow::Result<()> {
        if self.cases.is_empty() {
            return Ok(());
        }
        let mut field = Field::build(peer, &self.settings)?;
        for case in &self.cases {
            let load: Vec<&str> = case.load.iter().map(String::as_str).collect();
            let before = field.cpu()?;
            let pressure = Pressure::start();
            let line = field.run(&load).with_context(|| case.name)?;
            let pressure = pressure.percent();
            std::thread::sleep(SETTLE);
            field.check_agents().with_context(|| case.name)?;
            let after = field.cpu()?;
            let units = case.units(&line);
            if line["errors"] != 0 || line["mismatches"] != 0 {
                report.problems.push(format!("{} round {} {}: {line}", peer.name, round + 1, case.name));
            }
            ensure!(units > 0.0, "{}: nothing was moved", case.name);
            let cpu: Vec<f64> = before.iter().zip(&after).map(|(before, after)| (after - before) / units).collect();
            eprintln!("  {}: {:.2}, CPU {:.2?} {}", case.name, case.rate(&line), cpu, case.unit.cpu());
            let rate = case.rate(&line);
            report.samples.push(Sample { peer: peer.name.clone(), case: case.name, round, cpu, rate, pressure, line });
        }
        Ok(())
    }

    /// In a field of its own: memory of agents that have carried nothing yet.
    fn measure_memory(&self, peer: &Peer) -> anyhow::Result<Memory> {
        let mut field = Field::build(peer, &self.settings)?;
        std::thread::sleep(REST);
        let mut steps = vec![(0, field.rss_kib()?)];
        let mut held = Vec::new();
        let mut open = 0;
        for &wanted in &self.idle_steps {
            held.push(field.hold(wanted - open)?);
            open = wanted;
            std::thread::sleep(REST);
            field.check_agents()?;
            steps.push((open, field.rss_kib()?));
        }
        for group in held {
            group.end()?;
        }
        Ok(Memory { peer: peer.name.clone(), steps })
    }

    fn tell(&self, report: &Report) -> anyhow::Result<()> {
        let peers: Vec<String> = self.peers.iter().map(|peer| peer.name.clone()).collect();
        println!("{}", report.table(&self.cases, &peers));
        if let Some(factor) = report.machine_factor() {
            println!(
                "A plain relay costs {factor:.2} times here what it cost on the machine of the targets: judge \"scaled\" where that is far \
                 from 1. A scaled target still leaves out how fast either machine encrypts.\n"
            );
        }
        for peer in self.peers.iter().filter(|peer| peer.agent().is_some()) {
            println!("{} against the targets\n{}", peer.name, report.targets(&peer.name));
        }
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let about = json!({
            "unix_time": seconds,
            "rounds": self.rounds,
            "workers": self.settings.workers,
            "pinned": self.settings.cpus,
            "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "processor": process::processor(),
            "peers": self.peers.iter().map(|peer| json!({"name": peer.name, "agent": peer.agent()})).collect::<Vec<_>>(),
        });
        std::fs::create_dir_all(&self.out)?;
        let file = self.out.join(format!("l4-{seconds}.json"));
        std::fs::write(&file, serde_json::to_string_pretty(&report.json(about, &peers))?)?;
        println!("{}", file.display());
        for problem in &report.problems {
            println!("PROBLEM: {problem}");
        }
        ensure!(report.problems.is_empty(), "{} problems", report.problems.len());
        // What others miss is not ours.
        judge(&report.verdicts("culvert"))
    }
}
