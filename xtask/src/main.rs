//! The repository's own commands: `cargo xtask help`.
//!
//! Owns everything a developer or CI runs that is more than one cargo invocation. Refuses to depend on any crate of the
//! workspace: it must build in seconds and must still run when they do not compile.
#![forbid(unsafe_code)]

mod bench;
mod ci;
mod demo;
mod deny;
mod e2e;
mod ebpf;
mod image;
mod libtest;
mod licence;
mod metadata;
mod proto;
mod setup;
mod shell;
mod suite;
mod tidy;

use std::process::ExitCode;

const HELP: &str = "\
cargo xtask COMMAND

  demo            build the agent and run the guided tour of a two-node mesh (needs root: network namespaces, eBPF)
  test [FILTER]   install what the suites need, build, run every ring; ends with `N passed, N failed, N skipped`
                    --ring N       only that ring (0 pure, 1 memory, 2 process, 3 network namespaces)
                    --no-setup     install nothing; what cannot run is counted as skipped
                    --no-variants  leave out the suites of optional build features (tls-boring)
  e2e [FILTER]    ring 4: build real peers (SPIRE, Kubernetes' API server, istiod, Consul) with the scripts of `tests/`, and our programs with
                  feature tls-fips, needs Go, and run their suites in the long form;
                  without it they run, shorter, only where the peers are installed (`CULVERT_PEERS` or `target/peers`)
                    --no-setup     build and install nothing
                    --soak         load on certificates of a minute lasts ten minutes, not two (`e2e --soak under_load`: nothing else)
  ci              everything a change must pass: fmt, tidy, deny, ebpf --check, proto --check, clippy, then test
  tidy            walls between crates and modules, module heads, unsafe, words that must not be committed
  deny            licences, banned and duplicated crates, sources, as deny.toml says
  ebpf [--check]  build the kernel programs with the pinned toolchain, or check the committed object against its sources
  proto [--check] make the protobuf modules from `proto/defs`, or check the committed ones
  image           build the programs as they ship and make the container image of them, an OCI archive (`docker load`, `ctr image import`,
                  `skopeo`), with no engine and no base image (needs Debian)
                    --programs DIR  take these programs, build nothing
                    --output FILE   `image.tar` in the build folder if not given
                    --tag NAME:TAG  its name
                    --root DIR      lays what is in it into this empty folder instead (the Containerfile does)
  bench l4        two agents against the direct path: CPU per unit, rates, latencies, memory, targets
                    --peer PATH    another agent with the same contract, in the same run
                    --quick        a look, not a measurement; `bench l4 --help` for the rest
  bench l7        the waypoint and Envoy before the same server: CPU per request, rates, latencies, memory, scale
  bench istiod    the agent under the control plane of a large cluster: time and memory of the first push, CPU of changes
  bench micro     the criterion benches
  help            this page";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", &[][..]),
    };
    let result = match command {
        "help" | "-h" | "--help" => {
            println!("{HELP}");
            Ok(())
        }
        "test" => suite::run(rest),
        "e2e" => e2e::run(rest),
        "ci" => ci::run(rest),
        "tidy" => tidy::run(rest),
        "deny" => deny::run(rest),
        "ebpf" => ebpf::run(rest),
        "proto" => proto::run(rest),
        "demo" => demo::run(rest),
        "image" => image::run(rest),
        "bench" => bench::run(rest),
        other => Err(anyhow::anyhow!("no such command: {other} (see `cargo xtask help`)")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.is::<shell::Told>() {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
