//! The one way to say that a test cannot run here. Owns the `SKIPPED:` line, which `cargo xtask test` counts; a ring
//! that cannot run on a machine is reported as skipped, never as passed (DESIGN §8).

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
