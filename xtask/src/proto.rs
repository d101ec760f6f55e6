//! `cargo xtask proto [--check]`: makes the Rust of `proto/defs`, or checks that what is committed is what it makes.
//!
//! The generator is a feature of the crate it writes, so that neither this program nor a plain build waits for it.
use crate::shell;
use anyhow::{Result, bail};

const USAGE: &str = "\
cargo xtask proto [--check]
  writes the modules of `proto/src` from `proto/defs`
  --check  writes nothing; fails when they differ";

/// Runs the command.
pub fn run(args: &[String]) -> Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        [] | ["--check"] => {}
        ["-h" | "--help"] => {
            println!("{USAGE}");
            return Ok(());
        }
        _ => bail!("unknown argument\n{USAGE}"),
    }
    let generator = ["run", "--quiet", "--locked", "-p", "mesh-proto", "--features", "generate", "--bin", "generate", "--"];
    shell::run(shell::cargo().args(generator).args(args))
}
