//! Entry point of the node agent: parse, build, run until told to end.
#![forbid(unsafe_code)]
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// A predictable allocator that returns memory after peaks; the system's keeps it (arenas per thread).
#[global_allocator]
static ALLOCATOR: mesh_runtime::profile::heap::Sampled<mimalloc::MiMalloc> =
    mesh_runtime::profile::heap::Sampled(mimalloc::MiMalloc);

/// Culvert's node agent.
#[derive(Parser)]
#[command(name = "ztunnel", version, about, disable_help_subcommand = false)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent (the default).
    Proxy(Box<ztunnel::Settings>),
    /// Print what this kernel and these rights allow, and how pods would be redirected. Fails if they could not be.
    Check(OfNode),
    /// Remove the redirection of every pod of this node, after the agent was uninstalled: their traffic is direct from then on.
    Cleanup(Cleanup),
    /// Print the version as JSON.
    Version,
}

#[derive(Args)]
struct Cleanup {
    #[command(flatten)]
    of: OfNode,
    /// Remove the CNI plugin too: from this folder of network configurations...
    #[arg(long, env = "CULVERT_CNI_CONF_DIR", value_name = "DIR", requires = "cni_bin_dir")]
    cni_conf_dir: Option<PathBuf>,
    /// ...and this one of plugins.
    #[arg(long, env = "CULVERT_CNI_BIN_DIR", value_name = "DIR")]
    cni_bin_dir: Option<PathBuf>,
}

#[derive(Args)]
struct OfNode {
    /// Name of the node, as the agent was given it.
    #[arg(long = "node", env = "NODE_NAME", default_value = "")]
    node: String,
    /// The machine's `/proc`, where pods' processes are looked for.
    #[arg(long, env = "CULVERT_PROC_DIR", default_value = "/proc", value_name = "DIR")]
    proc_dir: PathBuf,
    #[command(flatten)]
    pins: ztunnel::settings::Pins,
}

fn main() -> ExitCode {
    mesh_runtime::copies::restart_with_fast_copies();
    let command = Cli::parse().command.unwrap_or_else(|| {
        // `ztunnel` alone means `ztunnel proxy` with settings from the environment, as Istio's chart starts it.
        Command::Proxy(Box::new(DefaultProxy::parse_from(["ztunnel"]).settings))
    });
    match run(command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ztunnel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Parser)]
struct DefaultProxy {
    #[command(flatten)]
    settings: ztunnel::Settings,
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Proxy(settings) => ztunnel::app::run(*settings)?,
        Command::Check(OfNode { node, proc_dir, pins }) => {
            let report = ztunnel::check::Report::of_this_machine(&node, &proc_dir, &pins);
            println!("{report}");
            if report.redirection().is_none() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Cleanup(Cleanup { of: OfNode { node, proc_dir, pins }, cni_conf_dir, cni_bin_dir }) => {
            // First what would keep pods from starting.
            if let (Some(configurations), Some(plugins)) = (cni_conf_dir, cni_bin_dir)
                && ztunnel::cni::files::remove(&configurations, &plugins)?
            {
                println!("the CNI plugin is removed");
            }
            let pins = pins.of_node(&node);
            // First what does not need a BPF filesystem.
            ztunnel::app::remove_rules(&pins, &proc_dir);
            let removed = if pins.exists() { ebpf_loader::PinRoot::open(&pins)?.sweep([])? } else { 0 };
            println!("{removed} redirections removed");
        }
        Command::Version => {
            println!("{}", ztunnel::app::version());
        }
    }
    Ok(ExitCode::SUCCESS)
}
