//! Entry point of the node agent: parse, build, run until told to end.
#![forbid(unsafe_code)]
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::process::ExitCode;

/// A predictable allocator that returns memory after peaks; the system's keeps it (arenas per thread).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    /// Remove the redirection of every pod of this node, after the agent was uninstalled: their traffic is direct from then on.
    Cleanup(Cleanup),
    /// Print the version as JSON.
    Version,
}

#[derive(Args)]
struct Cleanup {
    /// Name of the node, as the agent was given it.
    #[arg(long = "node", env = "NODE_NAME", default_value = "")]
    node: String,
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
        Ok(()) => ExitCode::SUCCESS,
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

fn run(command: Command) -> Result<()> {
    match command {
        Command::Proxy(settings) => ztunnel::app::run(*settings),
        Command::Cleanup(Cleanup { node, pins }) => {
            let removed = ebpf_loader::PinRoot::open(&pins.of_node(&node))?.sweep([])?;
            println!("{removed} redirections removed");
            Ok(())
        }
        Command::Version => {
            println!("{}", ztunnel::app::version());
            Ok(())
        }
    }
}
