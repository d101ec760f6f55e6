//! What the benchmark programs have in common: help, flags, a machine that cannot run them, an error at the end.
use std::process::ExitCode;

use crate::bench::flags::Flags;
use crate::skip;

/// An error where a verdict that was printed says that a limit was missed.
pub fn judge(told: &str) -> anyhow::Result<()> {
    let missed = told.matches("MISSED").count();
    anyhow::ensure!(missed == 0, "{missed} limits are MISSED");
    Ok(())
}

/// One benchmark.
#[derive(Debug)]
pub struct Benchmark<R> {
    /// Its name, in what is told of skipping it.
    pub name: &'static str,
    /// What `--help` prints.
    pub help: &'static str,
    /// Flags without a value.
    pub switches: &'static [&'static str],
    /// What the flags ask for.
    pub read: fn(Flags) -> anyhow::Result<R>,
    /// Does it, where there are network namespaces.
    pub go: fn(R) -> anyhow::Result<()>,
}

impl<R> Benchmark<R> {
    /// Runs it with this process's command line.
    pub fn main(&self) -> ExitCode {
        match self.run(std::env::args().skip(1).collect()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        }
    }

    fn run(&self, args: Vec<String>) -> anyhow::Result<()> {
        if args.iter().any(|arg| arg == "--help" || arg == "-h") {
            println!("{}", self.help);
            return Ok(());
        }
        let asked = (self.read)(Flags::parse(args, self.switches)?)?;
        if let Some(why) = skip::netns_unavailable() {
            skip::skipped(self.name, &why);
            return Ok(());
        }
        (self.go)(asked)
    }
}
