//! What fields are made of: namespaces joined by veth pairs, proxies as child processes, load clients and what they hold.
//!
//! Refuses: to leave anything running; every value ends what it started.
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::process;
use crate::netns::{self, Netns};
use crate::{http, wait};

/// How proxies run; the same for every peer.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Worker threads of every proxy.
    pub workers: u32,
    /// CPU of the proxies and CPU of the load; none on a machine with one.
    pub cpus: Option<(u32, u32)>,
    /// Folder for the logs of proxies.
    pub logs: PathBuf,
    /// The load generator.
    pub loadgen: PathBuf,
}

/// A child that does not outlive its value.
#[derive(Debug)]
pub(super) struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A proxy under measurement.
#[derive(Debug)]
pub(super) struct Proxy {
    child: Running,
    pub netns: Netns,
    log: PathBuf,
    /// Port and path that answer 200 when it is ready.
    ready: (u16, &'static str),
}

impl Proxy {
    /// Starts `command` in a namespace, which ends with it. `name` is that of its log.
    pub fn start(
        netns: Netns,
        mut command: Command,
        name: &str,
        ready: (u16, &'static str),
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&settings.logs)?;
        let log = settings.logs.join(format!("{name}.log"));
        let mut file = File::options().create(true).append(true).open(&log)?;
        writeln!(file, "--- {}", netns.name())?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = netns.spawn(&mut command).with_context(|| format!("start {name}"))?;
        Ok(Self { child: Running(child), netns, log, ready })
    }

    /// One of our programs in folder mode, pinned where proxies run.
    pub fn ours(binary: &Path, mesh: &Path, authority: &Path, settings: &Settings) -> Command {
        let mut command = pinned(settings.cpus.map(|(proxies, _load)| proxies), binary);
        let workers = settings.workers.to_string();
        command.arg("proxy").arg("--mesh-dir").arg(mesh).arg("--ca-dir").arg(authority);
        command.env("ZTUNNEL_WORKER_THREADS", &workers).env("CULVERT_WORKER_THREADS", &workers);
        command.env("RUST_LOG", "info").env("LOG_FORMAT", "plain");
        command
    }

    /// Our node agent, with these flags beside its usual ones.
    pub fn agent(
        binary: &Path,
        (node, more): (&str, &[String]),
        netns: Netns,
        (mesh, authority): (&Path, &Path),
        peer: &str,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        let mut command = Self::ours(binary, mesh, authority, settings);
        command.args(["--node", node]).args(more);
        Self::start(netns, command, &format!("{peer}-{node}"), (15021, "/healthz/ready"), settings)
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    /// CPU seconds so far.
    pub fn cpu(&self) -> anyhow::Result<f64> {
        process::cpu_seconds(self.child.0.id())
    }

    /// Resident KiB.
    pub fn rss_kib(&self) -> anyhow::Result<u64> {
        process::rss_kib(self.child.0.id())
    }

    /// An error, with the end of its log, if it is not running any more.
    pub fn check(&mut self) -> anyhow::Result<()> {
        if let Ok(Some(status)) = self.child.0.try_wait() {
            bail!("a proxy ended with {status}; its log:\n{}", tail(&self.log));
        }
        Ok(())
    }

    pub fn wait_ready(&mut self) -> anyhow::Result<()> {
        let mut last = String::from("no answer");
        let (port, path) = self.ready;
        let ready = wait::until("a proxy's readiness", Duration::from_mins(1), || {
            if let Ok(Some(status)) = self.child.0.try_wait() {
                return Some(Err(anyhow::anyhow!("it ended with {status}")));
            }
            match http::get(&self.netns, (Ipv4Addr::LOCALHOST, port).into(), path) {
                Ok(answer) if answer.status == 200 => Some(Ok(())),
                Ok(answer) => {
                    last = answer.body;
                    None
                }
                Err(error) => {
                    last = format!("{error:#}");
                    None
                }
            }
        });
        let log = self.log.clone();
        ready.and_then(|inner| inner).with_context(|| format!("{last}; log {}:\n{}", log.display(), tail(&log)))
    }
}

/// Connections that stay until the value ends.
#[derive(Debug)]
pub struct Held {
    child: Running,
    stdin: Option<ChildStdin>,
    /// What opening them took.
    pub opened: Value,
}

impl Held {
    /// Starts a mode of the load generator that opens `conns` connections and holds them.
    pub(super) fn open(client: &Netns, settings: &Settings, args: &[&str], to: SocketAddr, conns: u64) -> anyhow::Result<Self> {
        let mut command = load_command(settings);
        command.args(args).args(["--conns", &conns.to_string(), "--to", &to.to_string()]);
        let mut child = client.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("a pipe")?);
        let child = Running(child);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let opened: Value = serde_json::from_str(&line).with_context(|| format!("loadgen said {line:?}"))?;
        ensure!(opened["count"] == conns && opened["errors"] == 0, "not all of {conns} connections opened: {opened}");
        Ok(Self { child, stdin, opened })
    }

    /// Ends them; an error if one of them was not alive any more.
    pub fn end(mut self) -> anyhow::Result<()> {
        drop(self.stdin.take());
        let status =
            wait::until("the end of held connections", Duration::from_mins(2), || self.child.0.try_wait().ok().flatten())?;
        ensure!(status.success(), "some held connections were dead at the end");
        Ok(())
    }
}

/// Runs a load client in `client` and gives its line.
pub(super) fn load(client: &Netns, settings: &Settings, args: &[&str], to: SocketAddr) -> anyhow::Result<Value> {
    let mut command = load_command(settings);
    command.args(args).arg("--to").arg(to.to_string());
    let out = client.output(command.stderr(Stdio::inherit()))?;
    let line = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    ensure!(!line.is_empty(), "loadgen {} ended with {} and said nothing", args.join(" "), out.status);
    serde_json::from_str(&line).with_context(|| format!("loadgen said {line:?}"))
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// `command` on one CPU, if there are two.
pub(super) fn pinned(cpu: Option<u32>, program: &Path) -> Command {
    match cpu {
        Some(cpu) => {
            let mut command = Command::new("taskset");
            command.args(["-c", &cpu.to_string()]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

pub(super) fn load_command(settings: &Settings) -> Command {
    pinned(settings.cpus.map(|(_proxies, load)| load), &settings.loadgen)
}

/// Joins two namespaces by a veth pair.
pub(super) fn join(one: (&Netns, Ipv4Addr, &str), other: (&Netns, Ipv4Addr, &str)) -> anyhow::Result<()> {
    let pair = format!("link add {} type veth peer name {} netns {}", one.2, other.2, other.0.name());
    netns::ip_batch(one.0, &[pair])?;
    for (ns, address, device) in [one, other] {
        netns::ip_batch(ns, &[format!("addr add {address}/24 dev {device}"), format!("link set {device} up")])?;
    }
    Ok(())
}

/// Starts a mode of the load generator that serves, and waits until it does.
pub(super) fn start_listening(ns: &Netns, command: &mut Command) -> anyhow::Result<Running> {
    let mut child = Running(ns.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped())).context("start the load generator")?);
    let stdout = child.0.stdout.take().context("a pipe")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(line.starts_with("ready"), "the load generator said {line:?}");
    Ok(child)
}

/// A pod of the namespace `bench` as the API server holds it; `metadata` and `spec` are further lines of those.
pub(super) fn pod_yaml(name: &str, ip: Ipv4Addr, labels: &str, annotations: &str, node: &str) -> String {
    let annotations = if annotations.is_empty() { String::new() } else { format!("  annotations:\n    {annotations}\n") };
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: bench\n  uid: {name}-uid\n  labels: {{ {labels} }}\n\
         {annotations}spec:\n  nodeName: {node}\n  serviceAccountName: {}\n  containers:\n  - name: main\n    image: none\nstatus:\n  \
         phase: Running\n  podIP: {ip}\n  podIPs:\n  - ip: {ip}\n  conditions:\n  - type: Ready\n    status: \"True\"\n",
        name.split('.').next().unwrap_or(name),
    )
}
