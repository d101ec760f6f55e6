//! Entry point of the node agent: parse, build, run until told to end.
#![forbid(unsafe_code)]
use anyhow::Result;
use clap::{Parser, Subcommand};
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
    /// Print the version as JSON.
    Version,
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
        Command::Version => {
            println!("{}", ztunnel::app::version());
            Ok(())
        }
    }
}
