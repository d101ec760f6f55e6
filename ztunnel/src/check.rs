//! `ztunnel check`: what this kernel and the rights of this process allow, said before anything depends on it.
//!
//! Owns the list of what is looked at; each look is what the agent itself does when it starts, tried where it hurts nobody.
//! Upstream: the command line. Downstream: `mesh-runtime` sockets, `ebpf-loader`, `nft`.
use crate::dialer::MARK;
use crate::nft::Table;
use crate::settings::Pins;
use ebpf_loader::PinRoot;
use mesh_runtime::sockets::{Capability, check_capabilities, probe_rights};
use std::fmt;
use std::path::Path;

/// What in-pod mode takes.
const CAPABILITIES: [Capability; 2] = [Capability::NetAdmin, Capability::SysAdmin];

/// What was found.
#[derive(Debug, Default)]
pub struct Report(Vec<Finding>);

#[derive(Debug)]
struct Finding {
    what: &'static str,
    /// What it is for, or why it is not there.
    outcome: Result<String, String>,
}

impl Report {
    /// Looks at everything.
    pub fn of_this_machine(node: &str, proc_dir: &Path, pins: &Pins) -> Self {
        let mut report = Self::default();
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|e| e.to_string());
        report.add("kernel", kernel.map(|release| release.trim().to_owned()));
        report.add("capabilities", said(check_capabilities(&CAPABILITIES), "NET_ADMIN, SYS_ADMIN"));
        report.add("pods", said(probe_rights(MARK), "their namespaces can be entered, packets marked, their addresses used"));
        report.add("ebpf", said(ebpf_loader::probe(), "tc programs attach and take connections"));
        let pins = pins.of_node(node);
        report.add("bpffs", bpffs(&pins));
        report.add(
            "nftables",
            said(Table::of(&pins).probe(), "rules are taken: DNS over UDP, and TCP without eBPF, can be captured"),
        );
        report.add("cgroup", said(cgroup(), "version 2"));
        report.add(
            "processes",
            said(host_processes(proc_dir), "those of pods are seen: their namespaces are found, and their resolv.conf is used"),
        );
        report
    }

    fn add(&mut self, what: &'static str, outcome: Result<String, String>) {
        self.0.push(Finding { what, outcome });
    }

    fn has(&self, what: &str) -> bool {
        self.0.iter().any(|finding| finding.what == what && finding.outcome.is_ok())
    }

    /// How pods would be redirected (`--redirect`), if they can be served at all.
    pub fn redirection(&self) -> Option<&'static str> {
        let served = self.has("capabilities") && self.has("pods");
        ["ebpf", "nftables"].into_iter().find(|how| served && self.has(how))
    }
}

/// One line each, then what follows from them.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Finding { what, outcome } in &self.0 {
            match outcome {
                Ok(found) => writeln!(f, "yes  {what:<13}{found}")?,
                Err(why) => writeln!(f, "NO   {what:<13}{why}")?,
            }
        }
        let redirection = self.redirection();
        let kept = match redirection {
            Some("ebpf") if !self.has("bpffs") => ", which ends with the agent (--on-agent-death=open)",
            _ => "",
        };
        write!(f, "pods are redirected by: {}{kept}", redirection.unwrap_or("nothing; only --zds pods of a CNI agent, if at all"))
    }
}

fn said<E: fmt::Display>(outcome: Result<(), E>, good: &str) -> Result<String, String> {
    outcome.map(|()| good.to_owned()).map_err(|error| error.to_string())
}

/// Whether redirections can be kept there. What had to be made for the look is taken away again.
fn bpffs(dir: &Path) -> Result<String, String> {
    let was_there = dir.exists();
    PinRoot::open(dir).map_err(|error| error.to_string())?;
    if !was_there {
        let _somebody_uses_it = std::fs::remove_dir(dir);
    }
    Ok(format!("redirections are kept in {}", dir.display()))
}

fn cgroup() -> Result<(), String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
    let found = mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2"));
    found.then_some(()).ok_or_else(|| "version 2 is not mounted".to_owned())
}

/// Whether this is the `/proc` of the machine, where the second process is always the kernel's own, and whether others' may be looked at.
fn host_processes(proc_dir: &Path) -> Result<(), String> {
    check_capabilities(&[Capability::SysPtrace]).map_err(|error| error.to_string())?;
    let second = std::fs::read_to_string(proc_dir.join("2/comm")).unwrap_or_default();
    let host = second.trim() == "kthreadd";
    host.then_some(()).ok_or_else(|| "not those of pods (--proc-dir): the node's name servers are asked for them".to_owned())
}
