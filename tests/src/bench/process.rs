//! What a run costs: CPU time and memory of a process, pressure on the machine. Reads `/proc` only.
use std::fs;
use std::time::Instant;

use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{SysconfVar, sysconf};

/// Lets this process and its children open as many files as the system allows them.
pub fn raise_open_files() {
    const WANTED: u64 = 65_536;
    if let Ok((_soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && (hard >= WANTED || setrlimit(Resource::RLIMIT_NOFILE, WANTED, WANTED).is_err())
    {
        let _best_effort = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// User and system time a process has used, in seconds.
pub fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    let ticks = cpu_ticks(&stat).with_context(|| format!("/proc/{pid}/stat"))?;
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    Ok(ticks as f64 / per_second as f64)
}

/// `utime` + `stime`. The command name, in parentheses, may itself hold blanks and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let utime: u64 = fields.nth(11)?.parse().ok()?;
    let stime: u64 = fields.next()?.parse().ok()?;
    Some(utime + stime)
}

/// Resident memory of a process, in KiB.
pub fn rss_kib(pid: u32) -> anyhow::Result<u64> {
    status_kib(pid, "VmRSS:")
}

/// The most it ever was.
pub fn peak_rss_kib(pid: u32) -> anyhow::Result<u64> {
    status_kib(pid, "VmHWM:")
}

fn status_kib(pid: u32, field: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} is gone"))?;
    let number = status.lines().find_map(|line| line.strip_prefix(field)?.split_whitespace().next()?.parse().ok());
    number.with_context(|| format!("no {field} in the status of {pid}"))
}

/// How much of the time somebody waited for a CPU.
#[derive(Debug)]
pub struct Pressure {
    start: Instant,
    waited_us: Option<u64>,
}

impl Pressure {
    /// Starts to count.
    pub fn start() -> Self {
        Self { start: Instant::now(), waited_us: read_pressure() }
    }

    /// Percent since then; none where the kernel does not tell.
    pub fn percent(&self) -> Option<f64> {
        let waited = read_pressure()?.saturating_sub(self.waited_us?);
        Some(waited as f64 / 1e4 / self.start.elapsed().as_secs_f64())
    }
}

fn read_pressure() -> Option<u64> {
    total_of(&fs::read_to_string("/proc/pressure/cpu").ok()?)
}

fn total_of(pressure: &str) -> Option<u64> {
    pressure.lines().find(|line| line.starts_with("some"))?.split_once("total=")?.1.trim().parse().ok()
}

/// How many processors of which kind this machine has.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':')).map(|(_, name)| name.trim().to_owned());
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    format!("{count} × {}", name.unwrap_or_else(|| "unknown".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_past_any_name() {
        let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 700 30 0 0 20";
        assert_eq!(cpu_ticks(stat), Some(730));
        assert_eq!(cpu_ticks("42 (a) S 1"), None);
    }

    #[test]
    fn this_process_can_be_read() {
        let own = std::process::id();
        assert!(cpu_seconds(own).unwrap() >= 0.0);
        assert!(rss_kib(own).unwrap() > 100);
    }

    #[test]
    fn pressure_line() {
        assert_eq!(total_of("some avg10=0.00 avg60=0.00 avg300=0.00 total=123\nfull avg10=0 total=5\n"), Some(123));
    }
}
