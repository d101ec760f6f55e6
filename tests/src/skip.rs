//! The one way to say that a test cannot run here. Owns the `SKIPPED:` line, which `cargo xtask test` counts; a ring
//! that cannot run on a machine is reported as skipped, never as passed (DESIGN §8).

use std::path::PathBuf;

/// Prints the line the aggregator counts.
pub fn skipped(name: &str, why: &str) {
    eprintln!("SKIPPED: {name}: {why}");
}

/// Why network-namespace tests cannot run on this machine, if they cannot.
pub fn netns_unavailable() -> Option<String> {
    if !nix::unistd::Uid::effective().is_root() {
        return Some("network namespaces and eBPF need root (CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_BPF)".into());
    }
    if !std::process::Command::new("ip").arg("-V").output().is_ok_and(|out| out.status.success()) {
        return Some("the `ip` command (iproute2) is missing".into());
    }
    let probe = format!("{}probe", crate::netns::own_prefix());
    match crate::netns::Netns::create(&probe) {
        Ok(_made_and_dropped) => None,
        Err(error) => Some(format!("cannot create a network namespace: {error:#}")),
    }
}

/// Why a command cannot be run, if it cannot: it is not installed.
pub fn command_missing(program: &str) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    (!found).then(|| format!("`{program}` is not installed"))
}

/// A program of others that a script of `tests/` builds: in `CULVERT_PEERS`, in `peers` of the build directory, or on the path.
/// The error says that it is not installed.
pub fn find_peer(program: &str) -> Result<PathBuf, String> {
    let built = crate::agent::target_dir().join("peers");
    let peers = std::env::var_os("CULVERT_PEERS").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    peers
        .into_iter()
        .chain([built])
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("`{program}` is not installed (`cargo xtask e2e` builds it)"))
}

/// For how many minutes what lasts is tried with certificates of one: `CULVERT_SOAK`, which `cargo xtask e2e` sets; without it such tests
/// have a short form. Two at least, so that something is renewed.
pub fn soak_minutes() -> Option<u32> {
    let minutes = std::env::var("CULVERT_SOAK").ok()?;
    Some(minutes.parse().unwrap_or(2).max(2))
}
