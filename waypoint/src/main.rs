//! Entry point of the waypoint and gateway: parse, build, run until told to end.
#![forbid(unsafe_code)]
use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A predictable allocator that returns memory after peaks.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Culvert's layer 7 proxy.
#[derive(Parser)]
#[command(name = "waypoint", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the proxy.
    Proxy(Box<waypoint::Settings>),
    /// Print the version as JSON.
    Version,
}

fn main() -> ExitCode {
    mesh_runtime::copies::restart_with_fast_copies();
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("waypoint: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Proxy(settings) => waypoint::app::run(*settings),
        Command::Version => {
            println!("{}", waypoint::app::version());
            Ok(())
        }
    }
}
