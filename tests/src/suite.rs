//! The runner of ring 3: the tests of a file share one topology, so they run one after another in one process, and the
//! topology is taken down at the end whatever happened. Understands the arguments `cargo test` users know (a name filter,
//! `--exact`, `--skip`, `--list`, `--ignored`, `--include-ignored`).
//!
//! Owns: order, outcome lines, the exit status. Refuses: to count a test that could not run as passed.
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use crate::skip;

/// One test over a shared context.
#[derive(Debug)]
pub struct Test<C> {
    /// Name.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&mut C) -> anyhow::Result<()>,
    /// Only with `--ignored` or `--include-ignored`: long, or asking much of the machine.
    pub extended: bool,
}

/// A test written in the table of a suite.
pub const fn test<C>(name: &'static str, run: fn(&mut C) -> anyhow::Result<()>) -> Test<C> {
    Test { name, run, extended: false }
}

/// A test that runs only when asked for.
pub const fn extended<C>(name: &'static str, run: fn(&mut C) -> anyhow::Result<()>) -> Test<C> {
    Test { name, run, extended: true }
}

/// Returned (as an error) by a test which finds that it cannot run here.
#[derive(Debug)]
pub struct CannotRun(pub String);
impl fmt::Display for CannotRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for CannotRun {}

/// How one test of a batch went.
pub type Verdict = anyhow::Result<()>;

/// Runs tests that are data: `work` gets the indices of the chosen ones, does them together in whatever order is quickest,
/// and gives a verdict for each, in the order of the indices, with the seconds it took.
pub fn run_batch(suite: &str, names: &[String], work: impl FnOnce(&[usize]) -> anyhow::Result<Vec<(Verdict, f64)>>) -> ExitCode {
    let arguments = Arguments::from_command_line();
    let chosen: Vec<usize> = (0..names.len()).filter(|&at| arguments.wants(&names[at], false)).collect();
    if arguments.list {
        for &at in &chosen {
            println!("{}: test", names[at]);
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests ({suite})", chosen.len());
    let start = Instant::now();
    let verdicts = match if chosen.is_empty() { Ok(Vec::new()) } else { work(&chosen) } {
        Ok(verdicts) => verdicts,
        Err(error) if error.is::<CannotRun>() => {
            for &at in &chosen {
                skip::skipped(&format!("{suite}::{}", names[at]), &format!("{error:#}"));
            }
            println!("\ntest result: ok. 0 passed; 0 failed; {} skipped", chosen.len());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            println!("{suite} failed: {error:#}\n\ntest result: FAILED. 0 passed; {} failed; 0 skipped", chosen.len());
            return ExitCode::FAILURE;
        }
    };
    let mut failed = Vec::new();
    for (&at, (verdict, took)) in chosen.iter().zip(&verdicts) {
        match verdict {
            Ok(()) => println!("test {} ... ok ({took:.2}s)", names[at]),
            Err(error) => {
                println!("test {} ... FAILED ({took:.2}s)\n    {}", names[at], format!("{error:#}").replace('\n', "\n    "));
                failed.push(names[at].as_str());
            }
        }
    }
    // A verdict that is missing is no pass.
    let missing = chosen.len().saturating_sub(verdicts.len());
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; 0 skipped; finished in {:.2}s",
        if failed.is_empty() && missing == 0 { "ok" } else { "FAILED" },
        verdicts.len() - failed.len(),
        failed.len() + missing,
        start.elapsed().as_secs_f64()
    );
    if failed.is_empty() && missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[derive(Debug, Default)]
struct Arguments {
    filters: Vec<String>,
    skips: Vec<String>,
    exact: bool,
    list: bool,
    ignored: bool,
    all: bool,
}

impl Arguments {
    fn from_command_line() -> Self {
        let mut it = std::env::args().skip(1);
        let mut this = Self::default();
        while let Some(argument) = it.next() {
            match argument.as_str() {
                "--exact" => this.exact = true,
                "--list" => this.list = true,
                "--ignored" => this.ignored = true,
                "--include-ignored" => this.all = true,
                "--skip" => this.skips.extend(it.next()),
                "--format" | "--test-threads" | "--color" | "-Z" => {
                    it.next();
                }
                other if other.starts_with('-') => {}
                filter => this.filters.push(filter.to_owned()),
            }
        }
        this
    }

    fn wants(&self, name: &str, extended: bool) -> bool {
        let hit = |pattern: &String| if self.exact { name == pattern } else { name.contains(pattern.as_str()) };
        let by_name = self.filters.is_empty() || self.filters.iter().any(hit);
        let by_kind = self.all || extended == self.ignored;
        by_name && by_kind && !self.skips.iter().any(hit)
    }
}

/// Runs the tests of a suite. `cannot_run` tells why none of them can run here; `set_up` makes the shared context.
pub fn run<C>(
    suite: &str,
    cannot_run: Option<String>,
    set_up: impl FnOnce() -> anyhow::Result<C>,
    tests: &[Test<C>],
) -> ExitCode {
    let arguments = Arguments::from_command_line();
    let chosen: Vec<&Test<C>> = tests.iter().filter(|test| arguments.wants(test.name, test.extended)).collect();
    if arguments.list {
        for test in chosen {
            println!("{}: test", test.name);
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests ({suite})", chosen.len());
    if let Some(why) = cannot_run {
        for test in &chosen {
            skip::skipped(&format!("{suite}::{}", test.name), &why);
        }
        println!("\ntest result: ok. 0 passed; 0 failed; {} skipped", chosen.len());
        return ExitCode::SUCCESS;
    }
    if chosen.is_empty() {
        println!("\ntest result: ok. 0 passed; 0 failed; 0 skipped");
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    let mut context = match catch_unwind(AssertUnwindSafe(set_up)) {
        Ok(Ok(context)) => context,
        Ok(Err(error)) if error.is::<CannotRun>() => {
            for test in &chosen {
                skip::skipped(&format!("{suite}::{}", test.name), &format!("{error:#}"));
            }
            println!("\ntest result: ok. 0 passed; 0 failed; {} skipped", chosen.len());
            return ExitCode::SUCCESS;
        }
        Ok(Err(error)) => {
            println!("setting up {suite} failed: {error:#}\n\ntest result: FAILED. 0 passed; {} failed; 0 skipped", chosen.len());
            return ExitCode::FAILURE;
        }
        Err(_panic) => {
            println!("setting up {suite} panicked\n\ntest result: FAILED. 0 passed; {} failed; 0 skipped", chosen.len());
            return ExitCode::FAILURE;
        }
    };
    println!("set up in {:.2}s", start.elapsed().as_secs_f64());
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    for test in &chosen {
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (test.run)(&mut context)));
        let took = begun.elapsed().as_secs_f64();
        match outcome {
            Ok(Ok(())) => {
                passed += 1;
                println!("test {} ... ok ({took:.2}s)", test.name);
            }
            Ok(Err(error)) if error.is::<CannotRun>() => {
                skipped += 1;
                skip::skipped(&format!("{suite}::{}", test.name), &format!("{error:#}"));
            }
            Ok(Err(error)) => {
                println!("test {} ... FAILED ({took:.2}s)\n    {}", test.name, format!("{error:#}").replace('\n', "\n    "));
                failed.push(test.name);
            }
            Err(_panic_was_printed) => {
                println!("test {} ... FAILED ({took:.2}s), it panicked", test.name);
                failed.push(test.name);
            }
        }
    }
    drop(context);
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    println!(
        "\ntest result: {}. {passed} passed; {} failed; {skipped} skipped; finished in {:.2}s",
        if failed.is_empty() { "ok" } else { "FAILED" },
        failed.len(),
        start.elapsed().as_secs_f64()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
