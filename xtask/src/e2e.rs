//! `cargo xtask e2e`: ring 4, the suites against real peers, in their long form.
//!
//! Owns the list of peers that no package of Debian's brings: scripts below `tests/` build them from the Go module proxy, which
//! takes many minutes, so that `test` and `ci` run these suites only where that was done. Says what ran and what was skipped.

use crate::libtest::Tally;
use crate::metadata::Metadata;
use crate::shell::{self, Laps};
use crate::{setup, suite};
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

struct Peer {
    name: &'static str,
    /// Called with the folder for its programs.
    script: &'static str,
    /// What follows the folder.
    more: &'static [&'static str],
    programs: &'static [&'static str],
    /// The test target that needs it.
    suite: &'static str,
}

const PEERS: &[Peer] = &[
    Peer {
        name: "SPIRE",
        script: "tests/spire/install.sh",
        more: &[],
        programs: &["spire-server", "spire-agent"],
        suite: "mesh_spire",
    },
    Peer {
        name: "Kubernetes",
        script: "tests/kubernetes/install.sh",
        more: &[],
        programs: &["etcd", "kube-apiserver"],
        suite: "mesh_kubernetes",
    },
    Peer {
        name: "a node",
        script: "tests/kubernetes/install.sh",
        more: &["node"],
        programs: &["kubelet", "kube-proxy", "kube-controller-manager", "kube-scheduler"],
        suite: "mesh_cluster",
    },
    Peer {
        name: "istiod",
        script: "tests/istiod/install.sh",
        more: &[],
        programs: &["istiod-fed", "istioctl-ztunnel", "istioctl"],
        suite: "e2e_istiod",
    },
    Peer { name: "Consul", script: "tests/consul/install.sh", more: &[], programs: &["consul"], suite: "e2e_consul" },
];

/// Need no peer: the control plane of the tests with certificates of a minute, under load, and our own programs as they are not
/// usually built.
const ALONE: [(&str, &str); 2] = [("load", "mesh_istiod"), ("FIPS 140", "e2e_fips")];

/// `cargo xtask e2e`. With `--soak` what is under load is for ten minutes, not two.
pub fn run(args: &[String]) -> Result<()> {
    let metadata = Metadata::load()?;
    let folder = std::env::var_os("CULVERT_PEERS").map_or_else(|| metadata.target.join("peers"), PathBuf::from);
    let (soak, rest): (Vec<String>, Vec<String>) = args.iter().cloned().partition(|arg| arg == "--soak");
    let mut options = suite::Options::parse(&rest)?;
    options.peers = Some(folder.clone());
    if !soak.is_empty() {
        options.soak = 10;
    }
    let mut laps = Laps::default();
    if options.setup {
        for needs in [setup::NETWORK, setup::IMAGE, setup::NODE] {
            if let Err(error) = setup::ensure(needs) {
                eprintln!("note: {error:#}; what needs it will be skipped");
            }
        }
        for peer in PEERS {
            if let Err(error) = laps.time(peer.name, || install(peer, &folder)) {
                eprintln!("note: {} is not there: {error:#}; {} is skipped", peer.name, peer.suite);
            }
        }
    }
    let mut total = Tally::default();
    let mut told = Vec::new();
    if options.setup {
        let tally = laps.time("variant tls-fips", || suite::run_fips(&metadata, &options));
        told.push(format!("FIPS 140 (unit tests): {tally}"));
        total += tally;
    }
    let names = PEERS.iter().map(|peer| (peer.name, peer.suite)).chain(ALONE);
    let suites: Vec<&str> = names.clone().map(|(_, suite)| suite).collect();
    for ((name, suite), tally) in names.zip(suite::run_targets(&metadata, &suites, &options, &mut laps)?) {
        told.push(format!("{name} ({suite}): {tally}"));
        total += tally;
    }
    println!();
    laps.print();
    for line in told {
        println!("{line}");
    }
    println!("{total}");
    if total.failed > 0 {
        bail!(shell::Told);
    }
    Ok(())
}

/// Builds a peer unless its programs are there.
fn install(peer: &Peer, folder: &Path) -> Result<()> {
    if peer.programs.iter().all(|program| folder.join(program).is_file()) {
        return Ok(());
    }
    let go = shell::find_program("go").context("Go is not installed")?;
    eprintln!("building {} with {} (many minutes, once)", peer.name, go.display());
    shell::run(Command::new(shell::root().join(peer.script)).arg(folder).args(peer.more))
}
