//! Network namespaces: making one, running code and programs in it, and removing it whatever happens.
//!
//! Owns: the names (`cv<pid>-…`, unique per run), the way in (a short-lived thread that enters the namespace; sockets
//! opened there stay there), the interrupt handler and the sweep of what a killed run left behind.
//! Refuses: touching any namespace that does not carry a name of ours, and any process that does not live in one.
//! Upstream: [`crate::topology`]. Downstream: the `ip` command, `setns(2)`, `/proc`.
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where iproute2 keeps its named namespaces.
const NETNS_DIR: &str = "/run/netns";

/// Where the agents of runs keep their pins, by the name of the namespace the agent is in.
const PINS_DIR: &str = "/sys/fs/bpf/culvert-tests";
/// Where they wait for their successors, by the same name.
pub const RUN_DIR: &str = "/run/culvert-tests";

/// The prefix of everything this process makes: `cv<pid>-`.
pub fn own_prefix() -> String {
    format!("cv{}-", std::process::id())
}

/// One named network namespace. Dropping it ends the processes in it and removes it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// Makes the namespace `name` (which must start with [`own_prefix`]) and brings its loopback up.
    pub fn create(name: &str) -> anyhow::Result<Self> {
        ensure!(name.starts_with(&own_prefix()), "`{name}` does not carry this run's prefix");
        install_interrupt_handler();
        ip(&["netns", "add", name])?;
        let path = Path::new(NETNS_DIR).join(name);
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let ns = Self { name: name.to_owned(), file };
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        // Addresses must be usable at once: no duplicate address detection; the agent answers with other hosts'
        // addresses, so the reverse-path filter is off; pods and nodes route.
        ns.sysctl(&[
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv6/conf/all/accept_ra", "0"),
            ("ipv6/conf/default/accept_ra", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ])?;
        ns.choose_congestion_control()?;
        Ok(ns)
    }

    /// The kernel's default congestion control. A machine may prefer another for itself (BBR paces with timers, which on a veth
    /// is a third of the CPU of a bulk transfer), and a new namespace would inherit that. Such a machine may also keep cubic to
    /// itself; reno is free to all, and where nothing is lost it costs the same.
    fn choose_congestion_control(&self) -> anyhow::Result<()> {
        const KEY: &str = "ipv4/tcp_congestion_control";
        self.sysctl(&[(KEY, "cubic")]).or_else(|_| self.sysctl(&[(KEY, "reno")]))
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path, as an agent takes it.
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.name)
    }

    /// Sets kernel parameters below `/proc/sys/net`.
    pub fn sysctl(&self, values: &[(&str, &str)]) -> anyhow::Result<()> {
        self.enter(|| {
            for (key, value) in values {
                let path = Path::new("/proc/sys/net").join(key);
                fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
            }
            Ok(())
        })
    }

    /// Runs `work` on a thread which is inside the namespace. A socket made there belongs to the namespace for ever and may
    /// be used from any thread.
    ///
    /// # Panics
    /// When the namespace cannot be entered, or when `work` panics: a harness without its namespace has nothing to say.
    #[expect(clippy::expect_used, reason = "a test that cannot enter its own namespace must stop there")]
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).expect("enter a network namespace of our own");
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A TCP connection from inside the namespace.
    pub fn connect(&self, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        self.enter(|| TcpStream::connect_timeout(&to, limit))
    }

    /// A TCP listener inside the namespace, once a server that just went has let go of the port.
    pub fn listen(&self, on: SocketAddr) -> io::Result<TcpListener> {
        let begun = Instant::now();
        loop {
            match self.enter(|| TcpListener::bind(on)) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < crate::wait::PATIENCE => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    /// Starts a program inside the namespace. (Not through `ip netns exec`, which would also give it another `/sys` and so
    /// hide pinned eBPF objects.) An agent's pins are kept where they go with the namespace.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.spawn_after(|| Ok(()), command)
    }

    /// The same, once the thread that starts it has done something to itself.
    pub fn spawn_after(&self, prepare: impl FnOnce() -> io::Result<()> + Send, command: &mut Command) -> io::Result<Child> {
        command.env("CULVERT_BPF_DIR", self.pins()).env("CULVERT_RUN_DIR", self.run_dir());
        self.spawn_as_it_is(prepare, command)
    }

    /// The same, with nothing added to its environment.
    pub fn spawn_as_it_is(&self, prepare: impl FnOnce() -> io::Result<()> + Send, command: &mut Command) -> io::Result<Child> {
        self.enter(|| {
            prepare()?;
            command.spawn()
        })
    }

    /// Where an agent started in this namespace waits for its successor.
    fn run_dir(&self) -> PathBuf {
        Path::new(RUN_DIR).join(&self.name)
    }

    /// Where an agent started in this namespace keeps its pins.
    pub fn pins(&self) -> PathBuf {
        Path::new(PINS_DIR).join(&self.name)
    }

    /// Runs a program inside the namespace to its end and takes what it wrote.
    pub fn output(&self, command: &mut Command) -> io::Result<std::process::Output> {
        self.enter(|| command.stdin(Stdio::null()).output())
    }

    /// Device and inode: which namespace a process is in is told by these.
    fn key(&self) -> io::Result<(u64, u64)> {
        self.file.metadata().map(|meta| (meta.dev(), meta.ino()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Ok(key) = self.key() {
            end_processes_in(&BTreeSet::from([key]));
        }
        let _gone_already = ip(&["netns", "del", &self.name]);
        let _gone_already = remove_pins(&self.pins());
        let _gone_already = fs::remove_dir_all(self.run_dir());
    }
}

/// Removes a directory of a BPF filesystem with everything below it. (`remove_dir_all` cannot: such a filesystem does not
/// say which of its entries are directories.)
fn remove_pins(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if fs::metadata(&path)?.is_dir() {
            remove_pins(&path)?;
        } else {
            fs::remove_file(path)?;
        }
    }
    fs::remove_dir(dir)
}

/// Runs `ip` with these arguments; its own words on failure.
pub fn ip(args: &[&str]) -> anyhow::Result<String> {
    let out = Command::new("ip").args(args).stdin(Stdio::null()).output().context("run `ip`")?;
    if !out.status.success() {
        bail!("`ip {}` failed: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs many `ip` commands inside one namespace in one process.
pub fn ip_batch(ns: &Netns, lines: &[String]) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut child = Command::new("ip")
        .args(["-n", ns.name(), "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("run `ip -batch`")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(lines.join("\n").as_bytes())?;
        stdin.write_all(b"\n")?;
    }
    let out = child.wait_with_output()?;
    ensure!(
        out.status.success(),
        "`ip -batch` in {} failed: {}\n{}",
        ns.name(),
        String::from_utf8_lossy(&out.stderr).trim(),
        lines.join("\n")
    );
    Ok(())
}

/// Ends every process (but this one) whose network namespace is one of these, and waits a moment until they are gone.
fn end_processes_in(keys: &BTreeSet<(u64, u64)>) {
    for _round in 0..100 {
        let mut any = false;
        let Ok(entries) = fs::read_dir("/proc") else { return };
        for entry in entries.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            if u32::try_from(pid) == Ok(std::process::id()) {
                continue;
            }
            let Ok(meta) = fs::metadata(entry.path().join("ns/net")) else { continue };
            if keys.contains(&(meta.dev(), meta.ino())) {
                any = true;
                let _gone_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        if !any {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Names of what is in `dir` now.
fn present(dir: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Removes every namespace whose name starts with `prefix`, and the processes inside.
pub fn sweep_prefix(prefix: &str) {
    for name in present(PINS_DIR).into_iter().filter(|name| name.starts_with(prefix)) {
        let _gone_already = remove_pins(&Path::new(PINS_DIR).join(&name));
        let _gone_already = fs::remove_dir_all(Path::new(RUN_DIR).join(name));
    }
    let names: Vec<String> = present(NETNS_DIR).into_iter().filter(|name| name.starts_with(prefix)).collect();
    let keys: BTreeSet<(u64, u64)> = names
        .iter()
        .filter_map(|name| fs::metadata(Path::new(NETNS_DIR).join(name)).ok())
        .map(|meta| (meta.dev(), meta.ino()))
        .collect();
    if !keys.is_empty() {
        end_processes_in(&keys);
    }
    for name in names {
        let _gone_already = ip(&["netns", "del", &name]);
    }
}

/// Removes what runs that are no longer alive have left: namespaces `cv<pid>-…` and directories `culvert-<pid>-…` whose process
/// is gone. Returns how many runs.
pub fn sweep_leftovers() -> usize {
    let abandoned = |name: &str, start: &str| -> Option<String> {
        let pid = name.strip_prefix(start)?.split_once('-')?.0;
        let number: u32 = pid.parse().ok()?;
        let alive = Path::new("/proc").join(number.to_string()).exists();
        (!alive && !kept(&format!("cv{pid}-"))).then(|| pid.to_owned())
    };
    let dead: BTreeSet<String> =
        present(NETNS_DIR).iter().chain(&present(PINS_DIR)).filter_map(|name| abandoned(name, "cv")).collect();
    for pid in &dead {
        sweep_prefix(&format!("cv{pid}-"));
    }
    if let Ok(entries) = fs::read_dir(std::env::temp_dir()) {
        for entry in entries.flatten() {
            if abandoned(&entry.file_name().to_string_lossy(), "culvert-").is_some() {
                let _gone_already = fs::remove_dir_all(entry.path());
            }
        }
    }
    dead.len()
}

/// A temporary directory of this run: gone with its value, on an interrupt, or in the next run's sweep.
pub fn scratch(what: &str) -> io::Result<tempfile::TempDir> {
    let dir = tempfile::Builder::new().prefix(&format!("culvert-{}-{what}-", std::process::id())).tempdir()?;
    remove_on_interrupt(dir.path());
    Ok(dir)
}

/// Runs that were asked to stay (`--keep`) leave a note, so that the next run's sweep lets them be.
fn keep_note(prefix: &str) -> PathBuf {
    Path::new("/run").join(format!("culvert-keep-{}", prefix.trim_end_matches('-')))
}
fn kept(prefix: &str) -> bool {
    keep_note(prefix).exists()
}
/// Marks this run as one to be kept after its process ends, with the directories that belong to it. [`forget_kept`] removes
/// all of it.
pub fn keep_this_run(dirs: &[PathBuf]) -> io::Result<()> {
    let lines: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    fs::write(keep_note(&own_prefix()), lines.join("\n"))
}
/// Removes every kept run (and dead ones), with its directories. Returns how many runs were removed.
pub fn forget_kept() -> usize {
    if let Ok(entries) = fs::read_dir("/run") {
        for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("culvert-keep-cv")) {
            for dir in fs::read_to_string(entry.path()).unwrap_or_default().lines().map(Path::new) {
                // Only what this harness makes: a temporary directory of its own naming.
                if dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with("culvert-")) {
                    let _gone_already = fs::remove_dir_all(dir);
                }
            }
            let _gone_already = fs::remove_file(entry.path());
        }
    }
    sweep_leftovers()
}

/// Directories to remove when the run is interrupted (on a normal end, their owners remove them).
static DIRS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Registers a directory which the interrupt handler removes too ([`scratch`] does this by itself).
pub fn remove_on_interrupt(dir: &Path) {
    if let Ok(mut dirs) = DIRS.lock() {
        dirs.push(dir.to_owned());
    }
}

/// Removes all that this process has made. Called by the interrupt handler; harmless at any time.
pub fn clean_up_this_run() {
    sweep_prefix(&own_prefix());
    if let Ok(dirs) = DIRS.lock() {
        for dir in dirs.iter() {
            let _gone_already = fs::remove_dir_all(dir);
        }
    }
}

/// Ctrl-C and SIGTERM take the topology down before the process ends.
fn install_interrupt_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let spawned = std::thread::Builder::new().name("interrupt".into()).spawn(|| {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            let signal = runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
                    return 0;
                };
                tokio::select! { _ = int.recv() => 2, _ = term.recv() => 15 }
            });
            if signal != 0 {
                eprintln!("\ninterrupted: taking the topology down");
                clean_up_this_run();
                std::process::exit(128 + signal);
            }
        });
        if let Err(error) = spawned {
            eprintln!("no interrupt handler ({error}): Ctrl-C would leave namespaces for the next run to sweep");
        }
    });
}

/// Whether every pod below `pins`, the folder of one agent's redirections, has its lasting places: it is captured before.
///
/// # Errors
/// The folder cannot be read.
pub fn are_settled(pins: &Path) -> io::Result<bool> {
    let is_settled = |pod: io::Result<std::fs::DirEntry>| {
        let mut entries = std::fs::read_dir(pod?.path())?;
        Ok::<_, io::Error>(entries.any(|entry| entry.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("object-"))))
    };
    Ok(std::fs::read_dir(pins)?.all(|pod| is_settled(pod).unwrap_or(false)))
}
