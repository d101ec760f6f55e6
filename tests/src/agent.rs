//! Runs the real agent binary in a node's network namespace, by its public contract only: flags and environment in, HTTP
//! pages and log lines out, signals to end it.
//!
//! Owns: finding the binary, its log file, bounded waiting for readiness, and its end. Refuses: to leave it running.
//! Upstream: suites, demo, benches. Downstream: `ztunnel proxy`.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::confine::Confinement;
use crate::container::{self, Container};
use crate::http::{self, Answer};
use crate::topology::Place;
use crate::wait;

/// The agent binary: `CULVERT_ZTUNNEL`, else the newer of `target/debug/ztunnel` and `target/release/ztunnel`.
pub fn find_binary() -> anyhow::Result<PathBuf> {
    find_program("ztunnel")
}

/// A program of ours: `CULVERT_<NAME>`, else the newer of the debug and the release build.
pub fn find_program(name: &str) -> anyhow::Result<PathBuf> {
    let variable = format!("CULVERT_{}", name.to_uppercase());
    if let Some(path) = std::env::var_os(&variable) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{variable} names {}, which is not a file", path.display());
        return Ok(path);
    }
    let target = target_dir();
    ["debug", "release"]
        .into_iter()
        .map(|profile| target.join(profile).join(name))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
        .with_context(|| format!("no {name} binary in {}: run `cargo build -p {name}`", target.display()))
}

/// The build directory: `CARGO_TARGET_DIR` or `target` of the workspace.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_dir().join("target"), PathBuf::from)
}

/// The root of the workspace this harness was built in.
pub fn workspace_dir() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// How to start an agent.
#[derive(Clone, Debug)]
pub struct AgentSpec {
    /// Program: `ztunnel` or `waypoint`.
    pub program: &'static str,
    /// The folder of another build of it.
    pub build: Option<PathBuf>,
    /// Name of the Kubernetes node it serves; of a waypoint, its pod.
    pub node: String,
    /// Flags beside those every program takes.
    pub flags: Vec<String>,
    /// Folder of YAML and development CA folder, shared by the agents of one mesh; nothing where a control plane is both.
    pub folders: Option<[PathBuf; 2]>,
    /// More environment, over the harness's own settings.
    pub env: BTreeMap<String, String>,
    /// Where the log goes.
    pub log: PathBuf,
    /// What it may, if not everything.
    pub confinement: Option<Confinement>,
    /// The container it is in, with nothing in its environment but what is said here.
    pub container: Option<Container>,
    /// Whether `bpf(2)` is refused to it.
    pub no_bpf: bool,
}

/// Makes a program of which `bpf(2)` is refused (`EPERM`, by seccomp): its number, the program, its arguments.
const NO_BPF: &str = "
import ctypes, os, struct, sys
jump, answer = (0x15, 0, 1, int(sys.argv[1])), [(6, 0, 0, 0x50001), (6, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *one) for one in [(0x20, 0, 0, 0), jump, *answer]))
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('code', ctypes.c_void_p)]
program = Program(4, ctypes.cast(code, ctypes.c_void_p))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit('seccomp is refused')
os.execv(sys.argv[2], sys.argv[2:])
";

impl AgentSpec {
    /// The usual settings: JSON log, two data threads, a log file `<node>.log` in `dir`.
    pub fn new(node: &str, mesh_dir: &Path, ca_dir: &Path, log_dir: &Path) -> Self {
        let env = [
            ("LOG_FORMAT", "json"),
            ("RUST_LOG", "info"),
            ("ZTUNNEL_WORKER_THREADS", "2"),
            ("CULVERT_ADMIN_ADDR", "127.0.0.1:15000"),
        ];
        Self {
            program: "ztunnel",
            build: None,
            node: node.into(),
            flags: vec!["--node".into(), node.into()],
            folders: Some([mesh_dir.into(), ca_dir.into()]),
            env: env.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            log: log_dir.join(format!("{node}.log")),
            confinement: None,
            container: None,
            no_bpf: false,
        }
    }

    /// An agent that has everything from a control plane, which its environment names.
    pub fn without_folder(node: &str, log_dir: &Path) -> Self {
        Self { folders: None, ..Self::new(node, Path::new(""), Path::new(""), log_dir) }
    }

    /// A waypoint or gateway: the pod `pod` of `namespace`, with that service account, serving the Gateway `gateway`.
    pub fn waypoint(
        (namespace, pod): (&str, &str),
        account: &str,
        gateway: &str,
        mesh_dir: &Path,
        ca_dir: &Path,
        log_dir: &Path,
    ) -> Self {
        let flags = ["--namespace", namespace, "--pod", pod, "--service-account", account, "--gateway", gateway];
        let mut spec = Self::new(pod, mesh_dir, ca_dir, log_dir);
        spec.program = "waypoint";
        spec.flags = flags.into_iter().map(Into::into).collect();
        spec.env("CULVERT_WORKER_THREADS", "2")
    }

    /// Puts it into a container.
    #[must_use]
    pub fn contained(mut self, by: Container) -> Self {
        self.container = Some(by);
        self
    }

    /// Has the kernel refuse it `bpf(2)`, as other kernels and other rights do.
    #[must_use]
    pub fn without_bpf(mut self) -> Self {
        self.no_bpf = true;
        self
    }

    /// Sets one environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.insert(key.into(), value.into());
        self
    }

    /// Takes the program from another build.
    #[must_use]
    pub fn built_in(mut self, folder: &Path) -> Self {
        self.build = Some(folder.into());
        self
    }

    /// Gives it no other rights than these.
    #[must_use]
    pub fn confined(mut self, to: Confinement) -> Self {
        self.confinement = Some(to);
        self
    }

    /// Starts it in the namespace of `place`. The log is appended to, so that a restart keeps the first part.
    pub fn start(self, place: &Arc<Place>) -> anyhow::Result<Agent> {
        let binary = match &self.build {
            Some(folder) => folder.join(self.program),
            None => find_program(self.program)?,
        };
        let log = File::options().create(true).append(true).open(&self.log)?;
        let rights = self.container.as_ref().map(|container| &container.rights).or(self.confinement.as_ref());
        let mut command = rights.map_or_else(|| Command::new(&binary), |to| to.command(&binary));
        if self.no_bpf {
            let number = if cfg!(target_arch = "aarch64") { "280" } else { "321" };
            command = Command::new("python3");
            command.args(["-c", NO_BPF, number]).arg(&binary);
        }
        command.arg("proxy");
        if self.container.is_some() {
            command.env_clear().env("PATH", container::PATH);
        }
        if let Some([mesh, ca]) = &self.folders {
            command.arg("--mesh-dir").arg(mesh).arg("--ca-dir").arg(ca);
        }
        command.args(&self.flags).envs(&self.env).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let enter = || {
            match (&self.container, &self.confinement) {
                (Some(container), _) => container.enter(&binary)?,
                (None, Some(to)) => to.enter(&binary)?,
                (None, None) => {}
            }
            // Numbers of processes are its own, as in a container: what is outside has none there.
            Ok(unshare(CloneFlags::CLONE_NEWPID)?)
        };
        let child = match self.container {
            Some(_) => place.netns.spawn_as_it_is(enter, &mut command),
            None => place.netns.spawn_after(enter, &mut command),
        };
        let child = child.with_context(|| format!("start {}", binary.display()))?;
        Ok(Agent { child: Mutex::new(child), place: place.clone(), spec: self })
    }
}

/// A running agent. Dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    child: Mutex<Child>,
    place: Arc<Place>,
    spec: AgentSpec,
}

/// A position in an agent's log: "from here on".
#[derive(Clone, Copy, Debug, Default)]
pub struct Mark(u64);

impl Agent {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.lock().id()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Node name.
    pub fn node(&self) -> &str {
        &self.spec.node
    }

    /// Where it runs.
    pub fn place(&self) -> &Arc<Place> {
        &self.place
    }

    /// How it was started.
    pub fn spec(&self) -> &AgentSpec {
        &self.spec
    }

    /// Its exit status, when it has ended.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.lock().try_wait().ok().flatten()
    }

    /// Waits until the readiness page says 200; the error tells what it said last, or that the agent ended.
    pub fn wait_ready(&self, limit: Duration) -> anyhow::Result<()> {
        let mut last = String::from("no answer yet");
        let ready = wait::until("the agent's readiness", limit, || {
            if let Some(status) = self.ended() {
                return Some(Err(status));
            }
            match http::get(&self.place.netns, (Ipv4Addr::LOCALHOST, 15021).into(), "/healthz/ready") {
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
        match ready {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => {
                bail!("agent of {} ended ({status}) before it was ready; its log:\n{}", self.node(), self.log_tail(30))
            }
            Err(error) => bail!("{error} ({}): {}\nits log:\n{}", self.node(), last.trim(), self.log_tail(30)),
        }
    }

    /// GET from the admin address.
    pub fn admin(&self, path: &str) -> anyhow::Result<Answer> {
        http::get(&self.place.netns, (Ipv4Addr::LOCALHOST, 15000).into(), path)
    }

    /// POST to the admin address.
    pub fn admin_post(&self, path: &str) -> anyhow::Result<Answer> {
        http::request(&self.place.netns, (Ipv4Addr::LOCALHOST, 15000).into(), "POST", path)
    }

    /// The whole configuration page.
    pub fn config_dump(&self) -> anyhow::Result<Value> {
        let answer = self.admin("/config_dump")?;
        ensure!(answer.status == 200, "/config_dump answers {}", answer.status);
        serde_json::from_str(&answer.body).context("parse /config_dump")
    }

    /// Waits until the configuration page satisfies `condition`.
    pub fn wait_config(&self, what: &str, condition: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
        wait::until(&format!("{what} on {}", self.node()), wait::PATIENCE, || self.config_dump().ok().filter(&condition))
            .map(|_dump| ())
    }

    /// The metrics page, parsed.
    pub fn metrics(&self) -> anyhow::Result<Metrics> {
        let answer = http::get(&self.place.netns, (Ipv6Addr::LOCALHOST, 15020).into(), "/metrics")?;
        ensure!(answer.status == 200, "/metrics answers {}", answer.status);
        Ok(Metrics::parse(&answer.body))
    }

    /// The address where peers in the pod network could reach its metrics.
    pub fn stats_addr(&self) -> SocketAddr {
        (self.place.v4, 15020).into()
    }

    /// Where its log is.
    pub fn log_path(&self) -> &Path {
        &self.spec.log
    }

    /// "From here on", for [`Agent::log_since`] and friends.
    pub fn mark(&self) -> Mark {
        Mark(fs::metadata(&self.spec.log).map(|meta| meta.len()).unwrap_or_default())
    }

    /// Log text since a mark.
    pub fn log_since(&self, mark: Mark) -> String {
        let bytes = fs::read(&self.spec.log).unwrap_or_default();
        let from = usize::try_from(mark.0).unwrap_or(usize::MAX).min(bytes.len());
        String::from_utf8_lossy(&bytes[from..]).into_owned()
    }

    /// All of it.
    pub fn whole_log(&self) -> String {
        self.log_since(Mark::default())
    }

    /// The last lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = self.whole_log();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Access-log records since a mark (needs the JSON format, which [`AgentSpec::new`] sets).
    pub fn access_since(&self, mark: Mark) -> Vec<Value> {
        self.log_since(mark)
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|record| record["scope"] == "access")
            .collect()
    }

    /// Waits for an access-log record since `mark` for which `is_it` holds.
    pub fn wait_access(&self, what: &str, mark: Mark, is_it: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
        wait::until(&format!("access log of {}: {what}", self.node()), wait::PATIENCE, || {
            self.access_since(mark).into_iter().find(|record| is_it(record))
        })
        .with_context(|| format!("log since then:\n{}", self.log_since(mark)))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.pid())?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("signal {signal} to agent {pid}"))
    }

    /// Waits for its end, at most `limit`.
    pub fn wait_end(&self, limit: Duration) -> anyhow::Result<ExitStatus> {
        wait::until(&format!("the end of the agent of {}", self.node()), limit, || self.ended())
    }

    /// SIGTERM, then waits for the end.
    pub fn terminate(&self, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_end(limit)
    }

    /// Number of open file descriptors.
    pub fn open_fds(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// Resident memory in KiB.
    pub fn rss_kib(&self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).context("VmRSS is a number")
    }

    /// Lets it run after this value is gone (`demo --keep`).
    pub fn leave_running(self) {
        std::mem::forget(self);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let mut child = self.lock();
        if matches!(child.try_wait(), Ok(None)) {
            let _gone_already = child.kill();
        }
        let _reaped = child.wait();
    }
}

/// Whether a status means "ended by itself with 0".
pub fn is_clean(status: ExitStatus) -> bool {
    status.code() == Some(0) && status.signal().is_none()
}

/// One series of a metrics page.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Metric name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// A parsed metrics page.
#[derive(Clone, Debug, Default)]
pub struct Metrics(pub Vec<Series>);

impl Metrics {
    /// Parses the Prometheus text format; lines it does not understand are left out.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(parse_series).collect())
    }

    /// Sum of the series of this name that carry all these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.0
            .iter()
            .filter(|series| series.name == name)
            .filter(|series| labels.iter().all(|(key, value)| series.labels.get(*key).map(String::as_str) == Some(value)))
            .map(|series| series.value)
            .sum()
    }
}

fn parse_series(line: &str) -> Option<Series> {
    let (head, value) = match line.find('{') {
        Some(_) => line.split_at(line.rfind('}')? + 1),
        None => line.split_at(line.find(' ')?),
    };
    let value = value.split_whitespace().next()?.parse().ok()?;
    let Some((name, rest)) = head.split_once('{') else {
        return Some(Series { name: head.to_owned(), labels: BTreeMap::new(), value });
    };
    let mut labels = BTreeMap::new();
    let mut rest = rest.strip_suffix('}')?;
    while let Some((key, after)) = rest.split_once("=\"") {
        let mut text = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (_, '\\') => match chars.next()?.1 {
                    'n' => text.push('\n'),
                    other => text.push(other),
                },
                (at, '"') => break at,
                (_, other) => text.push(other),
            }
        };
        labels.insert(key.trim_start_matches(',').to_owned(), text);
        rest = &after[end + 1..];
    }
    Some(Series { name: name.to_owned(), labels, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_page_is_read_with_escapes_and_commas() {
        let page = "# TYPE x counter\nx_total{a=\"1,2\",b=\"say \\\"hi\\\"\"} 3\nx_total{a=\"1,2\",b=\"\"} 4 1700000000\ny 5\n";
        let metrics = Metrics::parse(page);
        assert_eq!(metrics.0.len(), 3);
        assert_eq!(metrics.sum("x_total", &[("a", "1,2")]) as i64, 7);
        assert_eq!(metrics.sum("x_total", &[("b", "say \"hi\"")]) as i64, 3);
        assert_eq!(metrics.sum("y", &[]) as i64, 5);
    }
}
