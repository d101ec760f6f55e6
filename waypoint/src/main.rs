//! Entry point of the waypoint and gateway: parse, build, run until told to end.
#![forbid(unsafe_code)]
use anyhow::Result;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;
use waypoint::{Settings, stock};

/// A predictable allocator that returns memory after peaks.
#[global_allocator]
static ALLOCATOR: mesh_runtime::profile::heap::Sampled<mimalloc::MiMalloc> =
    mesh_runtime::profile::heap::Sampled(mimalloc::MiMalloc);

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
    Proxy(Box<Settings>),
    /// Print the version as JSON.
    Version,
}

fn main() -> ExitCode {
    mesh_runtime::copies::restart_with_fast_copies();
    match arguments().and_then(|(arguments, notes)| run(Cli::parse_from(arguments).command, notes)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("waypoint: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Our command line, also where this process was started with that of Istio's proxies; and what of that has no effect.
fn arguments() -> Result<(Vec<OsString>, Vec<String>)> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let (Some("proxy"), Some(rest)) = (arguments.get(1).and_then(|first| first.to_str()), arguments.get(2..)) else {
        return Ok((arguments, Vec::new()));
    };
    let rest: Vec<String> = rest.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let environment = mesh_runtime::settings::variables().collect();
    let labels = std::fs::read_to_string(stock::LABELS).ok();
    let Some(stock::Translated { flags, notes }) = stock::translate(&rest, &environment, labels.as_deref())? else {
        return Ok((arguments, Vec::new()));
    };
    arguments.truncate(2);
    arguments.extend(flags.into_iter().map(OsString::from));
    Ok((arguments, notes))
}

fn run(command: Command, notes: Vec<String>) -> Result<()> {
    match command {
        Command::Proxy(settings) => waypoint::app::run(Settings { notes, ..*settings }),
        Command::Version => {
            println!("{}", waypoint::app::version());
            Ok(())
        }
    }
}
