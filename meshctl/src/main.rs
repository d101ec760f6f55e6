//! Entry point of the operator's tool: parse, ask a folder or a running process, print, end with a code a pipeline can use.
//!
//! Exit codes: 0 nothing is wrong (the call is allowed), 1 something is (the call is refused, findings), 2 the question could
//! not be answered (usage, a folder or process that cannot be read, a name that is not there).
#![forbid(unsafe_code)]

mod admin;
mod analyze;
mod folder;
mod objects;
mod output;
mod views;
mod why;

use anyhow::Result;
use clap::{Parser, Subcommand};
use output::Format;
use std::process::ExitCode;

/// Explains a Culvert mesh: why a call is let through or refused, what is wrong with a folder of objects, what a running
/// process knows.
///
/// Exit codes: 0 allowed or nothing found, 1 refused or something found, 2 no answer.
#[derive(Parser)]
#[command(name = "meshctl", version, about)]
struct Cli {
    /// Form of the output.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Explain a hypothetical call: the decision, the route, and what every policy on its way says.
    Why(Box<why::Args>),
    /// Find what is wrong or without effect in a folder of objects.
    Analyze(analyze::Args),
    /// List the workloads a running agent knows.
    Workloads(views::Args),
    /// List the services a running agent knows.
    Services(views::Args),
    /// List the layer 4 policies a running agent knows.
    Policies(views::Args),
    /// List the certificates a running agent holds.
    Certificates(views::Args),
    /// List the tunnels between a running agent's pods and other nodes.
    Tunnels(views::Args),
    /// Print the version of this program, and of a running process with `--admin`.
    Version(views::VersionArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(Verdict::Fine) => ExitCode::SUCCESS,
        Ok(Verdict::Wrong) => ExitCode::from(1),
        Err(error) => {
            eprintln!("meshctl: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// What the answer means to a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Allowed, nothing found.
    Fine,
    /// Refused, something found.
    Wrong,
}

fn run(cli: &Cli) -> Result<Verdict> {
    let show = |view: views::View, args: &views::Args| views::show(view, args, cli.output).map(|()| Verdict::Fine);
    match &cli.command {
        Command::Why(args) => why::run(args, cli.output),
        Command::Analyze(args) => analyze::run(args, cli.output),
        Command::Workloads(args) => show(views::View::Workloads, args),
        Command::Services(args) => show(views::View::Services, args),
        Command::Policies(args) => show(views::View::Policies, args),
        Command::Certificates(args) => show(views::View::Certificates, args),
        Command::Tunnels(args) => show(views::View::Tunnels, args),
        Command::Version(args) => views::version(args, cli.output).map(|()| Verdict::Fine),
    }
}
