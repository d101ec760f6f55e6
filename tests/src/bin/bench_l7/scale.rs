//! Many of everything: streams of one tunnel, connections of one waypoint, clients that do not read, and a million requests while
//! routes and endpoints come and go.
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::bench::parts::Held;
use mesh_tests::bench::row::{HOST, Row, Shape, Size, route_yaml};
use mesh_tests::bench::versus::{Fact, Versus};

use crate::{REST, Run};

/// KiB a client that does not read may cost.
const SLOW_MUST: f64 = 256.0;
/// MiB the resident memory may grow between the first and the last quarter of a million requests.
const FLAT_MUST: f64 = 2.0;

/// Streams that are open at once in the tunnel of one agent, each with a request before and after. A tunnel for each data thread
/// of the agent, so one where it has one.
pub fn streams(run: &Run, versus: &mut Versus) -> anyhow::Result<()> {
    let count = if run.quick { 1000 } else { 10_000 };
    let size = Size { tunnel_streams: count, ..Size::default() };
    hold_open(run, versus, size, &[count], "streams of one agent's tunnel", |row| {
        let (tunnels, streams) = row.tunnels()?;
        ensure!(
            tunnels <= u64::from(run.settings.workers) && streams >= count,
            "{streams} streams in {tunnels} tunnels of {} data threads",
            run.settings.workers
        );
        Ok(())
    })
}

/// Connections through the waypoint that are open at once, each with a request before and after. Half of them come from either
/// node, so that no process needs more files than a system without `CAP_SYS_RESOURCE` gives (20 000 where this was written).
pub fn connections(run: &Run, versus: &mut Versus) -> anyhow::Result<()> {
    let half = if run.quick { 1000 } else { 12_500 };
    hold_open(run, versus, Size::default(), &[half, half], "connections of two nodes", |_| Ok(()))
}

/// Opens so many from the client's pod, and then so many from the server's; what is open is checked.
fn hold_open(
    run: &Run,
    versus: &mut Versus,
    size: Size,
    counts: &[u64],
    what: &str,
    check: impl FnOnce(&Row) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let peer = run.waypoint()?;
    let row = run.row(peer, Shape::Hbone, size)?;
    std::thread::sleep(REST);
    let before = row.rss_kib()?;
    let (mut held, mut seconds) = (Vec::new(), 0.0);
    for (n, count) in counts.iter().enumerate() {
        let args = ["idle", "--host", HOST];
        let open = if n == 0 { row.hold(&args, *count)? } else { row.hold_from_server(&args, *count)? };
        seconds += open.opened["seconds"].as_f64().unwrap_or_default();
        held.push(open);
    }
    std::thread::sleep(REST);
    check(&row)?;
    let count: u64 = counts.iter().sum();
    let value = (row.rss_kib()? as f64 - before as f64) / count as f64;
    held.into_iter().try_for_each(Held::end)?;
    let what = format!("{count} {what}, opened in {seconds:.1} s, all answer again; each costs");
    versus.facts.push(Fact { peer: peer.name, what, value, unit: "KiB", must: None });
    Ok(())
}

/// Clients that ask for much and read nothing.
pub fn slow(run: &Run, versus: &mut Versus) -> anyhow::Result<()> {
    let count = if run.quick { 50 } else { 200 };
    let peer = run.waypoint()?;
    for (shape, name) in [(Shape::Plain, "plain"), (Shape::Hbone, "HBONE")] {
        let row = run.row(peer, shape, Size::default())?;
        std::thread::sleep(REST);
        let before = row.rss_kib()?;
        let held = row.hold(&["stall", "--host", HOST, "--path", "/bytes/100000000"], count)?;
        std::thread::sleep(REST);
        let value = (row.rss_kib()? as f64 - before as f64) / count as f64;
        held.end()?;
        let what = format!("a client that does not read, {name}, of {count}");
        versus.facts.push(Fact { peer: peer.name, what, value, unit: "KiB", must: Some(SLOW_MUST) });
    }
    Ok(())
}

/// Resident memory while routes and endpoints change with every few requests.
pub fn flat(run: &Run, versus: &mut Versus) -> anyhow::Result<()> {
    let requests: u64 = if run.quick { 100_000 } else { 1_000_000 };
    let peer = run.waypoint()?;
    let row = run.row(peer, Shape::Plain, Size { routes: 100, endpoints: 100, ..Size::default() })?;
    let mut seen = Vec::new();
    let over = AtomicBool::new(false);
    let changes = std::thread::scope(|scope| -> anyhow::Result<u64> {
        let churn = scope.spawn(|| churn(&row, &over));
        for quarter in 1..=4 {
            let count = (requests / 4).to_string();
            let line = row.run(&["ping", "--conns", "16", "--secs", "300", "--count", &count, "--host", HOST]);
            if quarter == 4 || line.is_err() {
                over.store(true, Ordering::Relaxed);
            }
            let line = line?;
            ensure!(line["errors"] == 0 && line["mismatches"] == 0, "a request failed under churn: {line}");
            seen.push(row.rss_kib()? as f64 / 1024.0);
        }
        churn.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let value = seen.last().copied().unwrap_or_default() - seen.first().copied().unwrap_or_default();
    let what = format!("growth from the first to the last quarter of {requests} requests, {changes} changes, RSS {seen:.1?}");
    versus.facts.push(Fact { peer: peer.name, what, value, unit: "MiB", must: Some(FLAT_MUST) });
    Ok(())
}

/// Replaces a route and takes endpoints away and back, until it is over. How often.
fn churn(row: &Row, over: &AtomicBool) -> anyhow::Result<u64> {
    let mut changes = 0;
    while !over.load(Ordering::Relaxed) {
        let rule = format!(
            "  - matches: [ {{ path: {{ value: /churn-{changes} }} }} ]\n    backendRefs: [ {{ name: server, port: 80 }} ]\n"
        );
        row.mesh().put("churn.yaml", &route_yaml(Shape::Plain, "churn", &rule))?;
        row.mesh().put("endpoints.yaml", &row.endpoints_yaml(changes as usize % 8))?;
        changes += 1;
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(changes)
}
