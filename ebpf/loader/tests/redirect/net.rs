//! A pod and a remote host, each a network namespace, joined by a veth pair.
use std::{
    fs::File,
    io,
    mem::ManuallyDrop,
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};

pub const POD4: &str = "10.9.1.2";
pub const POD6: &str = "fd00:9:1::2";
pub const HOST4: &str = "10.9.1.1";
pub const HOST6: &str = "fd00:9:1::1";
/// Addresses of a service behind the host, not on the pod's link.
pub const SERVICE4: &str = "10.99.0.10";
pub const SERVICE6: &str = "fd00:99::10";

/// A named network namespace, deleted when dropped.
pub struct Netns {
    pub name: String,
    file: File,
}

impl Netns {
    fn create(role: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("cv-{role}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        run(&format!("ip netns add {name}"));
        let file = File::open(format!("/run/netns/{name}")).expect("the namespace just made");
        let netns = Self { name, file };
        netns.ip("link set lo up");
        netns
    }

    /// One that another process made and will delete; not to be dropped here.
    pub fn open(name: &str) -> ManuallyDrop<Self> {
        let file = File::open(format!("/run/netns/{name}")).expect("the namespace");
        ManuallyDrop::new(Self { name: name.to_owned(), file })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// `ip -n NAME …`
    pub fn ip(&self, arguments: &str) -> String {
        run(&format!("ip -n {} {arguments}", self.name))
    }

    /// Runs `tc` inside.
    pub fn tc(&self, arguments: &str) -> String {
        run(&format!("tc -n {} {arguments}", self.name))
    }

    /// Runs a program inside, to its end; a middle dot is a space within a word.
    pub fn program(&self, command: &str) -> String {
        let command = command.to_owned();
        self.run(move || run(&command))
    }

    /// Whether a program ends well inside.
    pub fn can(&self, command: &str) -> bool {
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        self.run(move || Command::new(&words[0]).args(&words[1..]).output().is_ok_and(|output| output.status.success()))
    }

    pub fn sysctl(&self, key: &str, value: &str) {
        let (path, value) = (format!("/proc/sys/{key}"), value.to_owned());
        self.run(move || std::fs::write(path, value)).expect("sysctl");
    }

    pub fn read_sysctl(&self, key: &str) -> String {
        let path = format!("/proc/sys/{key}");
        self.run(move || std::fs::read_to_string(path)).expect("sysctl").trim().to_owned()
    }

    /// Runs `work` on a thread of its own inside the namespace.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let file = self.file.try_clone().expect("descriptor");
        thread::spawn(move || {
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).expect("setns");
            work()
        })
    }

    /// The same, waiting for its result.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(work).join() {
            Ok(value) => value,
            Err(payload) => std::panic::resume_unwind(payload),
        }
    }

    pub fn file(&self) -> File {
        self.file.try_clone().expect("descriptor")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

pub struct Topology {
    pub pod: Netns,
    pub host: Netns,
}

impl Topology {
    pub fn new() -> Self {
        let (pod, host) = (Netns::create("pod"), Netns::create("host"));
        pod.ip(&format!("link add eth0 type veth peer name eth0 netns {}", host.name));
        for netns in [&pod, &host] {
            netns.sysctl("net/ipv6/conf/eth0/accept_dad", "0");
        }
        for (netns, v4, v6) in [(&pod, POD4, POD6), (&host, HOST4, HOST6)] {
            netns.ip(&format!("addr add {v4}/24 dev eth0"));
            netns.ip(&format!("-6 addr add {v6}/64 dev eth0 nodad"));
            netns.ip("link set eth0 up");
        }
        host.ip(&format!("addr add {SERVICE4}/32 dev lo"));
        host.ip(&format!("-6 addr add {SERVICE6}/128 dev lo nodad"));
        pod.ip(&format!("route add default via {HOST4}"));
        pod.ip(&format!("-6 route add default via {HOST6}"));
        // A new link takes a moment to resolve neighbours over IPv6; a refusal means that packets flow both ways.
        for address in [HOST4, HOST6] {
            let to = SocketAddr::new(ip(address), 1);
            let answer = pod.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(10)));
            assert!(answer.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused), "{answer:?}");
        }
        Self { pod, host }
    }
}

pub fn ip(address: &str) -> IpAddr {
    address.parse().expect("an address")
}

fn run(command: &str) -> String {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a command");
    let output = Command::new(program).args(words.map(|word| word.replace('·', " "))).output().expect("iproute2 is installed");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether an error is what a dropped packet looks like to a client that gave up.
pub fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
        || matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::ETIMEDOUT))
}

/// Waits, without guessing how long, up to a limit.
pub fn eventually(condition: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::yield_now();
    }
    condition()
}
