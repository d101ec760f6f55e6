//! `cargo xtask bench`: the kinds of measurement, built as what ships.

use crate::metadata::Metadata;
use crate::setup;
use crate::shell::{self, Root};
use anyhow::{Result, bail};

/// `bench l4 …`, `bench l7 …`, `bench istiod …` or `bench micro …`.
pub fn run(args: &[String]) -> Result<()> {
    match args.split_first() {
        Some((kind, rest)) if kind == "l4" => against(&["ztunnel"], "bench_l4", rest),
        Some((kind, rest)) if kind == "l7" => against(&["ztunnel", "waypoint"], "bench_l7", rest),
        Some((kind, rest)) if kind == "istiod" => against(&["ztunnel"], "bench_istiod", rest),
        Some((kind, rest)) if kind == "micro" => {
            shell::run(shell::cargo().args(["bench", "--workspace", "--locked", "--bench", "*", "--"]).args(rest))
        }
        _ => bail!(
            "`bench l4` (agents, CPU per unit), `bench l7` (the waypoint against Envoy), `bench istiod` (a large cluster's control \
             plane) or `bench micro` (criterion)"
        ),
    }
}

/// Builds these programs of ours as they ship and runs a bench of theirs.
fn against(programs: &[&str], bench: &str, args: &[String]) -> Result<()> {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        return shell::run(shell::cargo().args([
            "run",
            "--quiet",
            "--locked",
            "-p",
            "mesh-tests",
            "--bin",
            bench,
            "--",
            "--help",
        ]));
    }
    setup::ensure(setup::NETWORK)?;
    // `dist` has the settings istio/ztunnel is released with; another profile would measure the compiler.
    let mut build = shell::cargo();
    build.args(["build", "--locked", "--profile", "dist", "-p", "mesh-tests", "--bin", bench, "--bin", "loadgen"]);
    for program in programs {
        build.args(["-p", program, "--bin", program]);
    }
    shell::run(&mut build)?;
    let root = shell::find_root();
    if root == Root::No {
        bail!("the bench makes network namespaces: run it as root, or let `sudo` work without a password");
    }
    let target = Metadata::load()?.target;
    let mut command = shell::as_root(root, &target.join("dist").join(bench));
    for program in programs {
        // Not whichever build is the newest.
        command.env(format!("CULVERT_{}", program.to_uppercase()), target.join("dist").join(program));
    }
    shell::run(command.arg("--out").arg(target.join("bench")).args(args).current_dir(shell::root()))
}
