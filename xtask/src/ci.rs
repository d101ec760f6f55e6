//! `cargo xtask ci`: everything a change must pass, in the order in which failures are cheapest to learn.
//!
//! A failing step does not stop the later ones: one run tells everything. Each step counts as one check in the last line,
//! beside the tests.

use crate::libtest::Tally;
use crate::shell::{self, Laps};
use crate::{deny, ebpf, proto, suite, tidy};
use anyhow::{Result, bail};
use std::io::Write as _;

/// `cargo xtask ci`.
pub fn run(args: &[String]) -> Result<()> {
    let options = suite::Options::parse(args)?;
    let mut laps = Laps::default();
    let mut failed: Vec<&str> = Vec::new();
    let mut tally = Tally::default();
    let steps: [(&str, &dyn Fn() -> Result<()>); 6] = [
        ("fmt", &|| shell::run(shell::cargo().args(["fmt", "--all", "--check"]))),
        ("tidy", &|| tidy::run(&[])),
        ("deny", &|| deny::run(&[])),
        ("ebpf", &|| ebpf::run(&["--check".to_owned()])),
        ("proto", &|| proto::run(&["--check".to_owned()])),
        ("clippy", &|| {
            shell::run(shell::cargo().args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
        }),
    ];
    for (name, step) in steps {
        println!("=== {name}");
        match laps.time(name, step) {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                println!("{name}: FAILED: {error:#}");
                tally.failed += 1;
                failed.push(name);
            }
        }
    }
    println!("=== test");
    match suite::run_all(&options, &mut laps) {
        Ok(tests) => {
            if tests.failed > 0 {
                failed.push("test");
            }
            tally += tests;
        }
        Err(error) => {
            println!("test: FAILED: {error:#}");
            tally.failed += 1;
            failed.push("test");
        }
    }
    println!();
    laps.print();
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    tally.print();
    let _ = std::io::stdout().flush();
    if !failed.is_empty() {
        bail!(shell::Told);
    }
    Ok(())
}
