//! Load: 100 000 workloads in 2 000 services and 10 000 policies of 10 rules; prints seconds and resident memory.
#[path = "common/mesh.rs"]
mod mesh;

use mesh::{Shared, policy, view};
use mesh_model::policy::{Action, Scope};
use mesh_model::{Change, Snapshot};
use std::sync::Arc;
use std::time::Instant;

/// Resident memory in MiB (Linux; 0 elsewhere).
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

/// Seconds this thread has been on a CPU (Linux): what counts on a machine that is shared.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

fn main() {
    let before = resident();
    let shared = Shared::new(2_000);
    let start = Instant::now();
    let services: Vec<Change> = (0..2_000).map(|i| Change::Service(Arc::new(shared.service(i)))).collect();
    let workloads: Vec<Change> = (0..100_000).map(|i| Change::Workload(Arc::new(shared.workload(i)))).collect();
    let (built, without_policies) = (start.elapsed(), resident());
    let policies: Vec<Change> = (0..10_000)
        .map(|i| Change::Policy(Arc::new(policy(i, &format!("team-{}", i % 100), Scope::Namespace, Action::Allow))))
        .collect();
    let objects = resident();
    let start = Instant::now();
    let mut snap = Snapshot::empty(view()).apply(&services);
    for part in workloads.chunks(1000) {
        snap = snap.apply(part);
    }
    println!("tables of the workloads: {:.2?}, {:.2} s of CPU in all", start.elapsed(), cpu());
    for part in policies.chunks(1000) {
        snap = snap.apply(part);
    }
    println!(
        "load 100k workloads, 2k services, 10k policies x 10 rules: objects {built:.2?}, tables {:.2?}; resident MiB: \
         {before:.0} at start, {without_policies:.0} with workloads and services, {objects:.0} with policies, {:.0} with tables (version {}); {:.2} s of CPU in all",
        start.elapsed(),
        resident(),
        snap.version(),
        cpu()
    );
    let start = Instant::now();
    drop(snap);
    println!("drop of the last version's tables: {:.2?}", start.elapsed());
    drop((services, workloads, policies));
}
