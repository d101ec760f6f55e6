//! The load generator: a server and clients that check every byte. Each client prints one JSON line.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use mesh_tests::bench::client::{self, Direction};
use mesh_tests::bench::flags::Flags;
use mesh_tests::bench::outcome::Outcome;
use mesh_tests::bench::server::Spoken;
use mesh_tests::bench::talk::Talk;
use mesh_tests::bench::{process, relay, server};
use nix::sys::prctl;

const HELP: &str = "\
loadgen server --port P [--http]
loadgen relay  --port P --to ADDR                  plain TCP, no encryption
loadgen stream --to ADDR --streams N --bytes B --dir up|down
loadgen ping   --to ADDR --conns N --secs S [--count N] [TALK]
loadgen rate   --to ADDR --conns N --rps R --secs S [TALK]
loadgen churn  --to ADDR --conc N --count N [TALK]
loadgen idle   --to ADDR --conns N [TALK]          holds until its standard input ends, then checks that all are alive
loadgen stall  --to ADDR --conns N --host H --path P   asks, reads nothing of the answer, holds until its standard input ends
TALK: --size 64 (bytes that are echoed) or --host H [--path /] [--tokens FILE] (HTTP requests; a token a line)";

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mode = args.next().unwrap_or_else(|| "help".into());
    let mut flags = Flags::parse(args, &["http"])?;
    process::raise_open_files();
    // Sleeping threads wake within a microsecond of their time instead of fifty.
    let _best_effort = prctl::set_timerslack(1000);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match mode.as_str() {
        "server" => {
            let port = flags.required("port")?;
            let spoken = if flags.switch("http") { Spoken::Http } else { Spoken::Load };
            flags.end()?;
            runtime.block_on(server::serve((Ipv6Addr::UNSPECIFIED, port).into(), spoken))
        }
        "relay" => {
            let (port, to) = (flags.required("port")?, flags.required("to")?);
            flags.end()?;
            runtime.block_on(relay::relay((Ipv6Addr::UNSPECIFIED, port).into(), to))
        }
        "stream" | "ping" | "rate" | "churn" | "idle" | "stall" => runtime.block_on(run(&mode, flags)),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        other => bail!("no such mode: {other}\n{HELP}"),
    }
}

async fn run(mode: &str, mut flags: Flags) -> anyhow::Result<()> {
    let to: SocketAddr = flags.required("to")?;
    let talk = match flags.optional::<String>("host")? {
        Some(host) => {
            let tokens = match flags.optional::<String>("tokens")? {
                Some(file) => std::fs::read_to_string(&file).context(file)?.lines().map(str::to_owned).collect(),
                None => Arc::default(),
            };
            Talk::Http { host, path: flags.optional("path")?.unwrap_or_else(|| "/".into()), tokens }
        }
        None => Talk::Echo { size: flags.optional("size")?.unwrap_or(64) },
    };
    let (outcome, seconds) = match mode {
        "stream" => {
            let (streams, bytes) = (flags.required("streams")?, flags.required("bytes")?);
            let direction: Direction = flags.required("dir")?;
            flags.end()?;
            client::stream(to, streams, bytes, direction).await
        }
        "ping" => {
            let (conns, secs) = (flags.required("conns")?, flags.required("secs")?);
            let most = flags.optional("count")?.unwrap_or(u64::MAX);
            flags.end()?;
            client::ping(to, conns, Duration::from_secs_f64(secs), most, &talk).await
        }
        "rate" => {
            let (conns, rps, secs) = (flags.required("conns")?, flags.required("rps")?, flags.required("secs")?);
            flags.end()?;
            client::rate(to, conns, rps, Duration::from_secs_f64(secs), &talk)
        }
        "churn" => {
            let (conc, count) = (flags.required("conc")?, flags.required("count")?);
            flags.end()?;
            client::churn(to, conc, count, &talk).await
        }
        _ => {
            let conns = flags.required("conns")?;
            flags.end()?;
            return if mode == "stall" { stall(to, conns, talk).await } else { hold(to, conns, &talk).await };
        }
    };
    finish(mode, outcome, seconds)
}

async fn hold(to: SocketAddr, conns: u64, talk: &Talk) -> anyhow::Result<()> {
    let (mut idle, outcome, seconds) = client::idle(to, conns, talk).await;
    let failed = outcome.errors > 0;
    println!("{}", outcome.line("idle", seconds));
    wait_for_the_end()?;
    let alive = idle.alive().await;
    if failed || alive.count != conns {
        bail!("{} of {conns} alive at the end; first error: {}", alive.count, alive.first_error.as_deref().unwrap_or("none"));
    }
    Ok(())
}

/// Until standard input ends. Nothing else is to happen meanwhile: this thread may as well wait here.
fn wait_for_the_end() -> anyhow::Result<()> {
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new()).context("standard input")?;
    Ok(())
}

async fn stall(to: SocketAddr, conns: u64, talk: Talk) -> anyhow::Result<()> {
    let Talk::Http { host, path, .. } = talk else { bail!("stall takes --host and --path") };
    let (_held, outcome, seconds) = client::stall(to, conns, &host, &path).await;
    let failed = outcome.errors > 0;
    println!("{}", outcome.line("stall", seconds));
    wait_for_the_end()?;
    ensure!(!failed, "some answers did not begin");
    Ok(())
}

fn finish(mode: &str, outcome: Outcome, seconds: f64) -> anyhow::Result<()> {
    let (errors, mismatches) = (outcome.errors, outcome.mismatches);
    println!("{}", outcome.line(mode, seconds));
    if errors + mismatches > 0 {
        bail!("{errors} errors, {mismatches} wrong answers");
    }
    Ok(())
}
