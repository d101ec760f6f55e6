//! What the kernel counts for this process, read at scrape time.

use std::time::Duration;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::{SysconfVar, sysconf};

use super::exposition::{Expose, single};

pub(super) const NAMES: &[&str] =
    &["process_open_fds", "process_max_fds", "process_resident_memory_bytes", "process_cpu_seconds_total"];

pub(super) struct Process;

impl Expose for Process {
    fn expose(&self, out: &mut String) {
        if let Some(open) = open_fds() {
            single(out, "process_open_fds", "Number of open file descriptors", "gauge", open as f64);
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            single(out, "process_max_fds", "Maximum number of open file descriptors", "gauge", soft as f64);
        }
        if let Some(bytes) = resident_bytes() {
            single(out, "process_resident_memory_bytes", "Resident memory size in bytes", "gauge", bytes as f64);
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
            let help = "Total user and system CPU time spent in seconds";
            single(out, "process_cpu_seconds_total", help, "counter", micros as f64 / 1e6);
        }
    }

    fn sweep(&self, _: Duration) -> usize {
        0
    }
}

fn open_fds() -> Option<usize> {
    // The directory being read is itself one of the entries.
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1))
}

/// Resident memory of this process in bytes.
pub fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}
