//! Where a Kubernetes pod's network namespace is: that of the oldest process in the pod's cgroups.
//!
//! The kubelet names the cgroup of a pod by the pod's uid, and its oldest process is the sandbox's, which nobody in the pod
//! can replace. Owns what was found, and notices when the sandbox was made again. Refuses the namespace of the machine
//! itself. Where the container runtime said it first (`cni`), its word counts until a process is there. Upstream: `/proc` of the
//! machine. Downstream: [`crate::pods`].
use mesh_runtime::sockets::NetnsFd;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A namespace and the process it was found by.
#[derive(Clone, Debug)]
struct Found {
    netns: Arc<NetnsFd>,
    /// `None` while only the container runtime says so.
    process: Option<Process>,
}
/// A process: numbers are used again, but not with the same start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    /// In clock ticks since the machine started.
    started: u64,
    pid: u32,
}

/// The namespaces of pods.
#[derive(Debug)]
pub struct Places {
    proc_dir: PathBuf,
    found: HashMap<Arc<str>, Found>,
}

impl Places {
    /// Nothing found yet. `proc_dir`: the machine's `/proc`.
    pub fn new(proc_dir: PathBuf) -> Self {
        Self { proc_dir, found: HashMap::new() }
    }

    /// Looks for the namespaces of these pods, where they are not known or their process is gone, and forgets all others.
    /// Reads files of every process of the machine when anything is to be found.
    pub fn look(&mut self, pods: &HashSet<Arc<str>>) {
        self.found.retain(|uid, _| pods.contains(uid));
        let missing: HashSet<&str> = pods.iter().filter(|uid| !self.is_current(uid)).map(|uid| &**uid).collect();
        if missing.is_empty() {
            return;
        }
        let own = NetnsFd::open(self.proc_dir.join("1/ns/net")).ok().map(|machine| machine.id());
        for (uid, processes) in processes_of(&self.proc_dir, &missing) {
            let told = self.found.get(&uid).filter(|found| found.process.is_none()).map(|found| found.netns.id());
            let open = |process: Process| {
                let netns = NetnsFd::open(self.proc_dir.join(process.pid.to_string()).join("ns/net")).ok()?;
                // What was opened belongs to that process only if it is still the one that was looked at.
                let same = start_of(&self.proc_dir, process.pid) == Some(process.started);
                // A sandbox that is made again has another namespace than what is left of the one before.
                let is_it = Some(netns.id()) != own && told.is_none_or(|told| told == netns.id());
                (same && is_it).then(|| Found { netns: Arc::new(netns), process: Some(process) })
            };
            // A sandbox whose last process is gone is kept as it was, until it is made again or the pod goes.
            if let Some(found) = processes.into_iter().find_map(open) {
                self.found.insert(uid, found);
            }
        }
    }

    /// Takes the container runtime's word for the namespace of a pod whose first process is yet to come.
    pub fn tell(&mut self, uid: &Arc<str>, netns: NetnsFd) {
        self.found.insert(Arc::clone(uid), Found { netns: Arc::new(netns), process: None });
    }

    /// The namespace of a pod, if it was found.
    pub fn get(&self, uid: &str) -> Option<&Arc<NetnsFd>> {
        self.found.get(uid).map(|found| &found.netns)
    }

    fn is_current(&self, uid: &str) -> bool {
        let process = self.found.get(uid).and_then(|found| found.process);
        process.is_some_and(|process| start_of(&self.proc_dir, process.pid) == Some(process.started))
    }
}

/// The processes of these pods, each pod's oldest first.
fn processes_of(proc_dir: &Path, pods: &HashSet<&str>) -> HashMap<Arc<str>, Vec<Process>> {
    let mut all: HashMap<Arc<str>, Vec<Process>> = HashMap::new();
    let first = fs::read_to_string(proc_dir.join("1/cgroup")).unwrap_or_default();
    let root = first.lines().filter_map(path_of).map(steps_up).max().unwrap_or_default();
    for entry in fs::read_dir(proc_dir).into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that ends meanwhile is none.
        let Ok(cgroups) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
        let Some(uid) = pod_of(&cgroups, root).filter(|uid| pods.contains(uid.as_str())) else { continue };
        if let Some(started) = start_of(proc_dir, pid) {
            all.entry(uid.into()).or_default().push(Process { started, pid });
        }
    }
    for processes in all.values_mut() {
        processes.sort_unstable();
    }
    all
}

/// The uid of the pod whose cgroup a process is in: `…/kubepods-burstable-podUID.slice/…`, with `_` for `-` (systemd), or
/// `…/kubepods/burstable/podUID/…` (cgroupfs). A mirror pod's uid is 32 hexadecimal digits without dashes.
///
/// In a cgroup namespace of its own, which a container has with the second version of cgroups, a reader is shown where others are from
/// where it is itself: `/../../podUID/…`. So many steps up as there are to the machine's `root` it would leave the kubelet's cgroups.
fn pod_of(cgroups: &str, root: usize) -> Option<String> {
    let of_part = |part: &str| {
        let part = part.strip_suffix(".slice").unwrap_or(part);
        let uid = part.rsplit_once("-pod").map_or_else(|| part.strip_prefix("pod"), |(_, uid)| Some(uid))?;
        let uid = uid.replace('_', "-");
        let is_uid = matches!(uid.len(), 32 | 36) && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        is_uid.then_some(uid)
    };
    let of_kubelet = |path: &&str| path.contains("kubepods") || (1..root).contains(&steps_up(path));
    cgroups.lines().filter_map(path_of).filter(of_kubelet).find_map(|path| path.split(['/', ':']).find_map(of_part))
}

/// Of `hierarchy:controllers:path`; the path may hold colons.
fn path_of(line: &str) -> Option<&str> {
    line.splitn(3, ':').nth(2)
}

/// How far above the reader's own cgroup a path begins.
fn steps_up(path: &str) -> usize {
    path.split('/').skip(1).take_while(|part| *part == "..").count()
}

/// When a process started: field 22 of `stat`, whose second field may hold anything but ends with the last `)`.
fn start_of(proc_dir: &Path, pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(proc_dir.join(pid.to_string()).join("stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests;
