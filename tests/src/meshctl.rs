//! Asks `meshctl why` about a call, of a folder or of a running agent or waypoint, by its public contract: arguments in, JSON
//! and exit code out.
//!
//! Upstream: suites and the demo. Downstream: the `meshctl` binary.
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::agent::{Agent, find_program};

/// The answer.
#[derive(Debug)]
pub struct Why {
    /// The exit code said that the call is let through.
    pub allowed: bool,
    /// The whole report.
    pub report: Value,
}
impl Why {
    /// The word of the refusal.
    pub fn reason(&self) -> Option<&str> {
        self.report["reason"].as_str()
    }
}

/// By the objects of a folder, as a mesh of the trust domain `test.local` with the alias `cluster.local`.
pub fn why_of_folder(dir: &Path, args: &[&str]) -> anyhow::Result<Why> {
    let mut command = command(args)?;
    command.arg("--mesh-dir").arg(dir);
    answer(command.output().context("run meshctl")?)
}
/// By what a process knows, asked where it runs: its admin address is on loopback.
pub fn why_of_process(process: &Agent, args: &[&str]) -> anyhow::Result<Why> {
    let mut command = command(args)?;
    command.args(["--admin", "127.0.0.1:15000"]);
    answer(process.place().netns.output(&mut command).context("run meshctl")?)
}

fn command(args: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(find_program("meshctl")?);
    command.args(["why", "-o", "json"]).args(args).env_remove("CULVERT_MESH_DIR");
    command.env("TRUST_DOMAIN", "test.local").env("CULVERT_TRUST_DOMAIN_ALIASES", "cluster.local");
    Ok(command)
}
fn answer(output: std::process::Output) -> anyhow::Result<Why> {
    let code = output.status.code();
    ensure!(matches!(code, Some(0 | 1)), "meshctl ends with {code:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    let report = serde_json::from_slice(&output.stdout).context("parse meshctl's answer")?;
    Ok(Why { allowed: code == Some(0), report })
}
