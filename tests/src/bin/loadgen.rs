//! The load generator: a server and clients that check every byte. Each client prints one JSON line.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use mesh_tests::bench::client::{self, Direction};
use mesh_tests::bench::flags::Flags;
use mesh_tests::bench::outcome::Outcome;
use mesh_tests::bench::{process, relay, server};
use nix::sys::prctl;

const HELP: &str = "\
loadgen server --port P
loadgen relay  --port P --to ADDR                  plain TCP, no encryption
loadgen stream --to ADDR --streams N --bytes B --dir up|down
loadgen ping   --to ADDR --conns N --secs S [--size 64]
loadgen rate   --to ADDR --conns N --rps R --secs S [--size 64]
loadgen churn  --to ADDR --conc N --count N [--size 64]
loadgen idle   --to ADDR --conns N [--size 64]     holds until its standard input ends, then checks that all are alive";

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
    let mut flags = Flags::parse(args, &[])?;
    process::raise_open_files();
    // Sleeping threads wake within a microsecond of their time instead of fifty.
    let _best_effort = prctl::set_timerslack(1000);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match mode.as_str() {
        "server" => {
            let port = flags.required("port")?;
            flags.end()?;
            runtime.block_on(server::serve((Ipv6Addr::UNSPECIFIED, port).into()))
        }
        "relay" => {
            let (port, to) = (flags.required("port")?, flags.required("to")?);
            flags.end()?;
            runtime.block_on(relay::relay((Ipv6Addr::UNSPECIFIED, port).into(), to))
        }
        "stream" | "ping" | "rate" | "churn" | "idle" => runtime.block_on(run(&mode, flags)),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        other => bail!("no such mode: {other}\n{HELP}"),
    }
}

async fn run(mode: &str, mut flags: Flags) -> anyhow::Result<()> {
    let to: SocketAddr = flags.required("to")?;
    let size: usize = flags.optional("size")?.unwrap_or(64);
    let (outcome, seconds) = match mode {
        "stream" => {
            let (streams, bytes) = (flags.required("streams")?, flags.required("bytes")?);
            let direction: Direction = flags.required("dir")?;
            flags.end()?;
            client::stream(to, streams, bytes, direction).await
        }
        "ping" => {
            let (conns, secs) = (flags.required("conns")?, flags.required("secs")?);
            flags.end()?;
            client::ping(to, conns, Duration::from_secs_f64(secs), size).await
        }
        "rate" => {
            let (conns, rps, secs) = (flags.required("conns")?, flags.required("rps")?, flags.required("secs")?);
            flags.end()?;
            client::rate(to, conns, rps, Duration::from_secs_f64(secs), size)
        }
        "churn" => {
            let (conc, count) = (flags.required("conc")?, flags.required("count")?);
            flags.end()?;
            client::churn(to, conc, count, size).await
        }
        _ => {
            let conns = flags.required("conns")?;
            flags.end()?;
            return hold(to, conns, size).await;
        }
    };
    finish(mode, outcome, seconds)
}

async fn hold(to: SocketAddr, conns: u64, size: usize) -> anyhow::Result<()> {
    let (mut idle, outcome, seconds) = client::idle(to, conns, size).await;
    let failed = outcome.errors > 0;
    println!("{}", outcome.line("idle", seconds));
    std::io::stdout().flush()?;
    let mut ignored = Vec::new();
    // Nothing else is to happen meanwhile: this thread may as well wait here.
    std::io::stdin().read_to_end(&mut ignored).context("standard input")?;
    let alive = idle.alive().await;
    if failed || alive.count != conns {
        bail!("{} of {conns} alive at the end; first error: {}", alive.count, alive.first_error.as_deref().unwrap_or("none"));
    }
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
