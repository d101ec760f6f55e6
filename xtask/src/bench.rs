//! `cargo xtask bench`: the two kinds of measurement, built as what ships.

use crate::metadata::Metadata;
use crate::setup;
use crate::shell::{self, Root};
use anyhow::{Result, bail};

/// `bench l4 …` or `bench micro …`.
pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((kind, rest)) if kind == "l4" => run_l4(rest),
        Some((kind, rest)) if kind == "micro" => {
            shell::run(shell::cargo().args(["bench", "--workspace", "--locked", "--bench", "*", "--"]).args(rest))
        }
        _ => bail!("`bench l4` (agents, CPU per unit) or `bench micro` (criterion)"),
    }
}

fn run_l4(args: &[String]) -> Result<()> {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        return shell::run(shell::cargo().args([
            "run",
            "--quiet",
            "--locked",
            "-p",
            "mesh-tests",
            "--bin",
            "bench_l4",
            "--",
            "--help",
        ]));
    }
    setup::ensure(setup::NETWORK)?;
    // `dist` has the settings istio/ztunnel is released with; another profile would measure the compiler.
    let programs = ["-p", "ztunnel", "-p", "mesh-tests", "--bin", "ztunnel", "--bin", "bench_l4", "--bin", "loadgen"];
    shell::run(shell::cargo().args(["build", "--locked", "--profile", "dist"]).args(programs))?;
    let root = shell::find_root();
    if root == Root::No {
        bail!("the bench makes network namespaces: run it as root, or let `sudo` work without a password");
    }
    let target = Metadata::load()?.target;
    let mut command = shell::as_root(root, &target.join("dist/bench_l4"));
    shell::run(command.arg("--out").arg(target.join("bench")).args(args).current_dir(shell::root()))
}
