//! The benchmark of the waypoint: ours and Envoy in the same place, before the same server, asked by the same client, interleaved
//! in the same run; in plain HTTP and in the shape of Istio's waypoint, HBONE on both sides.
//!
//! How it measures: as `bench_l4`: CPU time per request first, wall time second; proxies share CPU 1, load and server CPU 0;
//! fresh namespaces for every peer, shape and round, the order reversed each round. What counts is the ratio of the rounds.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use mesh_tests::bench::benchmark::{Benchmark, judge};
use mesh_tests::bench::flags::Flags;
use mesh_tests::bench::parts::Settings;
use mesh_tests::bench::process::{self, Pressure};
use mesh_tests::bench::report::Sample;
use mesh_tests::bench::row::{self, HOST, Peer, Program, Row, Shape, Size};
use mesh_tests::bench::versus::{Fact, IDLE_MUST, LARGE_MUST, Versus};
use mesh_tests::{envoy, netns};
use serde_json::json;

mod live;
mod scale;

use live::Among;

const HELP: &str = "\
bench_l7 [flags]
  --quick          smaller runs, two rounds: a look, not a measurement
  --rounds N       default 6
  --only A,B       only these: cases (http1 http16 http64 rate2000 hbone1 hbone16 hbone64 hrate1000; with RBAC, an RS256
                   token and a JSON log line for each request: filters16 hfilters16; the same with tokens nobody
                   remembers: tokens16 htokens16), `memory`, `live` (a route change among 10 000 rules of a Gateway), `live-service` (of a
                   service), `live-services` (among 10 000 services), `streams`, `connections`, `slow`, `flat` (a
                   million requests under churn)
  --workers N      worker threads of every proxy, default 1
  --waypoint PATH  our waypoint; default: the `waypoint` beside this program
  --agent PATH     our agent, at both ends of the HBONE shape; default: the `ztunnel` beside this program
  --alone          without Envoy
  --out DIR        where the JSON file and the logs go; default: the folder of this program";

/// How long a fresh proxy gets to give back what only starting took.
const REST: Duration = Duration::from_secs(4);
/// How long proxies get to finish the books of a run before their CPU time is read.
const SETTLE: Duration = Duration::from_millis(100);
/// The size the targets speak of.
const LARGE: Size = Size { routes: 10_000, services: 0, endpoints: 10_000, tokens: 0, tunnel_streams: 0 };
/// More tokens than a waypoint remembers (2 MiB a data thread).
const MANY_TOKENS: usize = 8000;

fn main() -> ExitCode {
    let go = |run: Run| {
        process::raise_open_files();
        netns::sweep_leftovers();
        run.go()
    };
    Benchmark { name: "bench_l7", help: HELP, switches: &["quick", "alone"], read: Run::from_flags, go }.main()
}

/// What is put through a proxy.
struct Case {
    name: &'static str,
    shape: Shape,
    /// Tokens, and with any policies and a log of requests.
    tokens: usize,
    load: Vec<String>,
}

fn cases(quick: bool) -> Vec<Case> {
    let seconds = if quick { 3 } else { 8 };
    let make =
        |name, shape, tokens, load: String| Case { name, shape, tokens, load: load.split(' ').map(str::to_owned).collect() };
    let case = |name, shape, load| make(name, shape, 0, load);
    let ping = |conns: u32| format!("ping --conns {conns} --secs {seconds} --host {HOST}");
    let rate = |rps: u32| format!("rate --conns 16 --rps {rps} --secs {seconds} --host {HOST}");
    vec![
        case("http1", Shape::Plain, ping(1)),
        case("http16", Shape::Plain, ping(16)),
        case("http64", Shape::Plain, ping(64)),
        case("rate2000", Shape::Plain, rate(2000)),
        case("hbone1", Shape::Hbone, ping(1)),
        case("hbone16", Shape::Hbone, ping(16)),
        case("hbone64", Shape::Hbone, ping(64)),
        case("hrate1000", Shape::Hbone, rate(1000)),
        make("filters16", Shape::Plain, 1, ping(16)),
        make("hfilters16", Shape::Hbone, 1, ping(16)),
        make("tokens16", Shape::Plain, MANY_TOKENS, ping(16)),
        make("htokens16", Shape::Hbone, MANY_TOKENS, ping(16)),
    ]
}

/// What is measured beside the cases.
const FACTS: [&str; 8] = ["memory", "live", "live-service", "live-services", "streams", "connections", "slow", "flat"];

struct Run {
    peers: Vec<Peer>,
    cases: Vec<Case>,
    facts: Vec<&'static str>,
    rounds: usize,
    quick: bool,
    agent: PathBuf,
    settings: Settings,
    out: PathBuf,
}

impl Run {
    fn from_flags(mut flags: Flags) -> anyhow::Result<Self> {
        let own = std::env::current_exe()?;
        let beside = |name: &str| own.with_file_name(name);
        let quick = flags.switch("quick");
        let waypoint: PathBuf = flags.optional("waypoint")?.unwrap_or_else(|| beside("waypoint"));
        let agent: PathBuf = flags.optional("agent")?.unwrap_or_else(|| beside("ztunnel"));
        for binary in [&waypoint, &agent] {
            ensure!(binary.is_file(), "no program at {}", binary.display());
        }
        let mut peers = vec![Peer { name: "culvert", program: Program::Waypoint(waypoint) }];
        if !flags.switch("alone") {
            peers.push(Peer { name: "envoy", program: Program::Envoy(envoy::install()?) });
        }
        let (mut cases, mut facts) = (cases(quick), FACTS.to_vec());
        if let Some(only) = flags.optional::<String>("only")? {
            let names: Vec<&str> = only.split(',').collect();
            let known = |name: &&str| FACTS.contains(name) || cases.iter().any(|case| case.name == *name);
            ensure!(names.iter().all(known), "--only {only}: unknown case");
            cases.retain(|case| names.contains(&case.name));
            facts.retain(|fact| names.contains(fact));
        }
        let out: PathBuf = flags.optional("out")?.unwrap_or_else(|| own.parent().unwrap_or(Path::new(".")).to_owned());
        let processors = std::thread::available_parallelism()?.get();
        let run = Self {
            peers,
            cases,
            facts,
            rounds: flags.optional("rounds")?.unwrap_or(if quick { 2 } else { 6 }),
            quick,
            agent,
            settings: Settings {
                workers: flags.optional("workers")?.unwrap_or(1),
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

    fn row(&self, peer: &Peer, shape: Shape, size: Size) -> anyhow::Result<Row> {
        Row::build(peer, shape, size, &self.agent, &self.settings).with_context(|| peer.name)
    }

    fn go(&self) -> anyhow::Result<()> {
        let _there_were_none = std::fs::remove_dir_all(&self.settings.logs);
        let mut versus = Versus::default();
        for round in 0..self.rounds {
            for (tokens, shape) in [0, 1, MANY_TOKENS].into_iter().flat_map(|n| [(n, Shape::Plain), (n, Shape::Hbone)]) {
                let mut order: Vec<&Peer> = self.peers.iter().collect();
                if round % 2 == 1 {
                    order.reverse();
                }
                for peer in order {
                    if let Err(error) = self.round(peer, (shape, tokens), round, &mut versus) {
                        versus.problems.push(format!("{} round {}: {error:#}", peer.name, round + 1));
                    }
                }
            }
        }
        for fact in &self.facts {
            let measured = match *fact {
                "memory" => self.memory(&mut versus),
                "live" => live::measure(self, Among::Gateway, &mut versus),
                "live-service" => live::measure(self, Among::Service, &mut versus),
                "live-services" => live::measure(self, Among::Services, &mut versus),
                "streams" => scale::streams(self, &mut versus),
                "connections" => scale::connections(self, &mut versus),
                "slow" => scale::slow(self, &mut versus),
                _ => scale::flat(self, &mut versus),
            };
            if let Err(error) = measured {
                versus.problems.push(format!("{fact}: {error:#}"));
            }
        }
        self.tell(&versus)
    }

    fn round(&self, peer: &Peer, (shape, tokens): (Shape, usize), round: usize, versus: &mut Versus) -> anyhow::Result<()> {
        let cases: Vec<&Case> = self.cases.iter().filter(|case| case.shape == shape && case.tokens == tokens).collect();
        if cases.is_empty() {
            return Ok(());
        }
        eprintln!("round {} of {}: {} {shape:?}", round + 1, self.rounds, peer.name);
        let mut row = self.row(peer, shape, Size { tokens, ..Size::default() })?;
        for case in cases {
            let load: Vec<&str> = case.load.iter().map(String::as_str).collect();
            let before = row.cpu()?;
            let pressure = Pressure::start();
            let line = row.run(&load).context(case.name)?;
            let pressure = pressure.percent();
            std::thread::sleep(SETTLE);
            row.check().context(case.name)?;
            let after = row.cpu()?;
            if line["errors"] != 0 || line["mismatches"] != 0 {
                versus.problems.push(format!("{} round {} {}: {line}", peer.name, round + 1, case.name));
            }
            let units = line["count"].as_f64().unwrap_or_default() / 1e5;
            ensure!(units > 0.0, "{}: nothing was answered", case.name);
            let cpu: Vec<f64> = before.iter().zip(&after).map(|(before, after)| (after - before) / units).collect();
            let rate = line["rate"].as_f64().unwrap_or_default();
            eprintln!(
                "  {}: {rate:.0}/s, p99 {:.0} us, CPU {cpu:.2?} s/100k",
                case.name,
                line["p99_us"].as_f64().unwrap_or_default()
            );
            versus.samples.push(Sample { peer: peer.name.into(), case: case.name, round, cpu, rate, pressure, line });
        }
        Ok(())
    }

    /// Resident memory of proxies that did nothing but start: with the smallest mesh, and with 10 000 routes and endpoints.
    fn memory(&self, versus: &mut Versus) -> anyhow::Result<()> {
        for peer in &self.peers {
            for (size, what, must) in
                [(Size::default(), "idle RSS", IDLE_MUST), (LARGE, "RSS, 10 k routes and endpoints", LARGE_MUST)]
            {
                let row = self.row(peer, Shape::Plain, size)?;
                std::thread::sleep(REST);
                let value = row.rss_kib()? as f64 / 1024.0;
                let must = matches!(peer.program, Program::Waypoint(_)).then_some(must);
                versus.facts.push(Fact { peer: peer.name, what: what.into(), value, unit: "MiB", must });
                if size.routes > 0 {
                    let path = row::path(size.routes - 1);
                    let line = row.run(&["ping", "--conns", "16", "--secs", "3", "--host", HOST, "--path", &path])?;
                    let value = line["rate"].as_f64().unwrap_or_default();
                    let what = "rate on the last of 10 k routes".into();
                    versus.facts.push(Fact { peer: peer.name, what, value, unit: "/s", must: None });
                }
            }
        }
        Ok(())
    }

    /// Ours.
    fn waypoint(&self) -> anyhow::Result<&Peer> {
        self.peers.first().context("a peer")
    }

    fn tell(&self, versus: &Versus) -> anyhow::Result<()> {
        let names: Vec<&str> = self.cases.iter().map(|case| case.name).collect();
        let peers: Vec<&str> = self.peers.iter().map(|peer| peer.name).collect();
        println!("{}", versus.table(&names, &peers));
        let verdicts = format!("{}\n{}", versus.ratios(&names, "culvert", "envoy"), versus.told());
        println!("{verdicts}");
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let about = json!({
            "unix_time": seconds,
            "rounds": self.rounds,
            "workers": self.settings.workers,
            "pinned": self.settings.cpus,
            "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "processor": process::processor(),
            "envoy": envoy::VERSION,
        });
        std::fs::create_dir_all(&self.out)?;
        let file = self.out.join(format!("l7-{seconds}.json"));
        std::fs::write(&file, serde_json::to_string_pretty(&versus.json(about))?)?;
        println!("{}", file.display());
        ensure!(versus.problems.is_empty(), "{} problems", versus.problems.len());
        judge(&verdicts)
    }
}
