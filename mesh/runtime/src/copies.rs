//! Large memory copies on AMD processors under glibc: choosing the fast way.
//!
//! glibc 2.33 to 2.39 copies more than about 2 KiB with `rep movsb` wherever the processor says it is fast. On AMD's Zen 3 and
//! Zen 4 it is not when source and destination are aligned differently: measured 3 GB/s against 45 GB/s for the vector loop,
//! with the 16 KiB copies that TLS makes. For a node agent that was a fifth of the CPU of a bulk transfer. The library reads
//! the threshold once, before `main`, so the only safe way to set it is to start again with it in the environment.
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

const TUNABLES: &str = "GLIBC_TUNABLES";
const THRESHOLD: &str = "glibc.cpu.x86_rep_movsb_threshold";
/// Larger than any copy: never `rep movsb`.
const NEVER: &str = "glibc.cpu.x86_rep_movsb_threshold=0x10000000";

/// Replaces this process by itself with slow copies turned off, where that helps and is not decided already. Call it first
/// thing in `main`: nothing survives but arguments, environment and process id. Returns when there is nothing to do, or when
/// the process could not be replaced (it then only copies slower).
pub fn restart_with_fast_copies() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let Some(tunables) = wanted(cfg!(all(target_arch = "x86_64", target_env = "gnu")), &cpu, std::env::var_os(TUNABLES)) else {
        return;
    };
    let Ok(program) = std::env::current_exe() else { return };
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| program.clone().into_os_string());
    // Only returns when it failed.
    let _error = Command::new(program).arg0(name).args(arguments).env(TUNABLES, tunables).exec();
}

/// The value for `GLIBC_TUNABLES`, or `None` when it is to stay as it is.
fn wanted(glibc_on_x86: bool, cpu: &str, set: Option<OsString>) -> Option<OsString> {
    let amd = cpu.lines().any(|line| line.starts_with("vendor_id") && line.ends_with("AuthenticAMD"));
    if !glibc_on_x86 || !amd {
        return None;
    }
    match set {
        None => Some(NEVER.into()),
        Some(mine) if mine.is_empty() => Some(NEVER.into()),
        // An operator's own choice stays; and it is how the second start knows that it is the second.
        Some(mine) if mine.to_string_lossy().contains(THRESHOLD) => None,
        Some(mut mine) => {
            mine.push(OsStr::new(":"));
            mine.push(NEVER);
            Some(mine)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str = "processor\t: 0\nvendor_id\t: AuthenticAMD\n";

    #[test]
    fn only_amd_under_glibc_starts_again_and_only_once() {
        assert_eq!(wanted(true, AMD, None), Some(NEVER.into()));
        assert_eq!(wanted(true, AMD, wanted(true, AMD, None)), None);
        assert_eq!(wanted(false, AMD, None), None);
        assert_eq!(wanted(true, "vendor_id\t: GenuineIntel\n", None), None);
        assert_eq!(wanted(true, "", None), None);
    }

    #[test]
    fn what_an_operator_set_is_kept() {
        let mine = "glibc.malloc.arena_max=2";
        assert_eq!(wanted(true, AMD, Some(mine.into())), Some(format!("{mine}:{NEVER}").into()));
        assert_eq!(wanted(true, AMD, Some(format!("{THRESHOLD}=4096").into())), None);
    }
}
