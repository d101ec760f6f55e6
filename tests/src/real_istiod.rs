//! A real istiod, and istioctl: programs of `tests/istiod`, which are Istio's own conversion and discovery server over a folder of
//! YAML, its reader of agents' dumps, and istioctl as it is.
//!
//! Refuses: to build it; `cargo xtask e2e` does, and where it is not, that is a reason to skip.
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use serde_json::Value;

use crate::netns::Netns;
use crate::skip;
use crate::suite::CannotRun;

/// What its program is called.
pub const PROGRAM: &str = "istiod-fed";
/// How long it may take to start or to take a change in.
const LIMIT: Duration = Duration::from_mins(1);

/// It, running. Ends when dropped.
#[derive(Debug)]
pub struct IstiodFed {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// Where it serves delta ADS, in plaintext.
    pub addr: SocketAddr,
    log: PathBuf,
}

impl IstiodFed {
    /// Serves what `folder` holds at `listen`, in a network namespace or in ours, and waits until it does.
    pub fn start(folder: &Path, listen: &str, netns: Option<&Netns>, log: PathBuf) -> anyhow::Result<Self> {
        let mut command = Command::new(skip::find_peer(PROGRAM).map_err(CannotRun)?);
        let dry_run = "AMBIENT_ENABLE_DRY_RUN_AUTHORIZATION_POLICY";
        command.args([folder.as_os_str(), OsStr::new(listen)]).envs([("PILOT_ENABLE_AMBIENT", "true"), (dry_run, "true")]);
        // It serves in plaintext, so that nobody can prove to be one who may ask for the state of others.
        command.env("ENABLE_DEBUG_ENDPOINT_AUTH", "false");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(std::fs::File::create(&log)?);
        let mut child = match netns {
            Some(netns) => netns.spawn(&mut command),
            None => command.spawn(),
        }
        .context("start istiod-fed")?;
        let input = child.stdin.take().context("its input")?;
        let output = BufReader::new(child.stdout.take().context("its output")?);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut this = Self { child, input, lines, addr: SocketAddr::from(([0; 4], 0)), log };
        this.addr = this.wait_line("serving ")?.parse()?;
        Ok(this)
    }

    /// Has it look at the folder again, and waits until it has taken in what changed.
    pub fn read_again(&mut self) -> anyhow::Result<()> {
        self.input.write_all(b"\n")?;
        self.wait_line("read").map(drop)
    }

    /// The rest of the next line that starts with `what`; its log has lines of its own on the same output.
    fn wait_line(&self, what: &str) -> anyhow::Result<String> {
        loop {
            let line = self.lines.recv_timeout(LIMIT);
            let line = line.with_context(|| format!("istiod-fed does not say {what:?}; its log:\n{}", self.log()))?;
            if let Some(rest) = line.strip_prefix(what) {
                return Ok(rest.to_owned());
            }
        }
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for IstiodFed {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A cluster that is not there: some commands of `istioctl` want to know of one before they read a file or ask istiod.
const NO_CLUSTER: &str = "\
apiVersion: v1
kind: Config
current-context: none
contexts: [ { name: none, context: { cluster: none, user: none } } ]
clusters: [ { name: none, cluster: { server: 'http://127.0.0.1:1' } } ]
users: [ { name: none, user: {} } ]
";

/// What the whole of `istioctl` prints when it is asked for what needs no cluster.
pub fn istioctl(args: &[&str]) -> anyhow::Result<String> {
    let home = tempfile::tempdir()?;
    let config = home.path().join("config");
    std::fs::write(&config, NO_CLUSTER)?;
    let mut command = Command::new(skip::find_peer("istioctl").map_err(CannotRun)?);
    let output = command.args(args).env("KUBECONFIG", &config).env("HOME", home.path()).output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "istioctl {args:?} fails: {told}");
    Ok(String::from_utf8(output.stdout)?)
}

/// What `istioctl ztunnel-config` printed of a dump.
#[derive(Debug)]
pub struct Istioctl {
    /// `all`: the tables.
    pub summary: String,
    lists: Vec<Value>,
}

impl Istioctl {
    /// What the program prints, in its order.
    const LISTS: [&'static str; 5] = ["workloads", "services", "policies", "connections", "certificates"];

    /// Has it read a dump.
    pub fn read(dump: &Value) -> anyhow::Result<Self> {
        let mut command = Command::new(skip::find_peer("istioctl-ztunnel").map_err(CannotRun)?);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("its input")?.write_all(dump.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "istioctl cannot read it: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout)?;
        // The tables have no line that begins so.
        let (summary, rest) = text.split_once("\n[").context("tables, then lists")?;
        let lists = serde_json::Deserializer::from_str(&format!("[{rest}")).into_iter().collect::<Result<Vec<Value>, _>>()?;
        ensure!(lists.len() == Self::LISTS.len(), "{} lists", lists.len());
        Ok(Self { summary: summary.to_owned(), lists })
    }

    /// A list, as it understood it.
    pub fn list(&self, name: &str) -> anyhow::Result<&Value> {
        Self::LISTS.iter().zip(&self.lists).find_map(|(known, list)| (*known == name).then_some(list)).context("a list")
    }

    /// Whether a table has a row with these columns next to each other.
    pub fn has_row(&self, columns: &[&str]) -> bool {
        let is = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.windows(columns.len()).any(|some| some == columns)
        };
        self.summary.lines().any(is)
    }
}
