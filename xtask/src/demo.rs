//! `cargo xtask demo`: from a clone to a running two-node mesh.

use crate::metadata::Metadata;
use crate::setup;
use crate::shell::{self, Root};
use anyhow::{Result, bail};

/// Builds the programs and the guided tour and runs it as root.
pub fn run(args: &[String]) -> Result<()> {
    setup::ensure(setup::NETWORK)?;
    // The development profile: built in a third of the time, and the same target folder as the tests.
    shell::run(shell::cargo().args([
        "build",
        "--locked",
        "-p",
        "ztunnel",
        "-p",
        "waypoint",
        "-p",
        "meshctl",
        "-p",
        "mesh-tests",
        "--bin",
        "ztunnel",
        "--bin",
        "waypoint",
        "--bin",
        "meshctl",
        "--bin",
        "demo",
    ]))?;
    let root = shell::find_root();
    match root {
        Root::Already => {}
        Root::Sudo => {
            eprintln!("running the demo with sudo: it makes network namespaces, enters them and loads eBPF programs in them");
        }
        Root::No => bail!(
            "the demo makes network namespaces and loads eBPF programs: run it as root, or let `sudo` work without a password"
        ),
    }
    let programs = Metadata::load()?.target.join("debug");
    let mut demo = shell::as_root(root, &programs.join("demo"));
    for (variable, program) in [("CULVERT_ZTUNNEL", "ztunnel"), ("CULVERT_WAYPOINT", "waypoint"), ("CULVERT_MESHCTL", "meshctl")]
    {
        if std::env::var_os(variable).is_none() {
            demo.env(variable, programs.join(program));
        }
    }
    shell::run(demo.args(args).current_dir(shell::root()))
}
