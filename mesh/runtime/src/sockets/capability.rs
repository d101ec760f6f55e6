//! Does this process have the rights its mode needs? Asked once at start, so that a missing line in a pod's
//! securityContext is one clear sentence instead of a failed connection later.

use std::io;

/// A Linux capability the proxies may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// CAP_NET_ADMIN: SO_MARK, IP_TRANSPARENT.
    NetAdmin,
    /// CAP_SYS_ADMIN: entering a pod's network namespace, BPF.
    SysAdmin,
    /// CAP_SYS_PTRACE: finding namespaces and files of processes in pods.
    SysPtrace,
}

impl Capability {
    /// Bit in the kernel's capability sets (linux/capability.h).
    fn bit(self) -> u32 {
        match self {
            Self::NetAdmin => 12,
            Self::SysPtrace => 19,
            Self::SysAdmin => 21,
        }
    }

    /// Name as written in a securityContext, without `CAP_`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NetAdmin => "NET_ADMIN",
            Self::SysAdmin => "SYS_ADMIN",
            Self::SysPtrace => "SYS_PTRACE",
        }
    }
}

/// What [`check_capabilities`] found missing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("missing capabilities: {}; add them to securityContext.capabilities.add", names(.0))]
pub struct MissingCapabilities(pub Vec<Capability>);

fn names(missing: &[Capability]) -> String {
    let names: Vec<&str> = missing.iter().map(|capability| capability.name()).collect();
    names.join(", ")
}

/// Those of `needed` that are not in the effective set of the calling thread.
pub fn missing_capabilities(needed: &[Capability]) -> io::Result<Vec<Capability>> {
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let effective = effective(&status)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no CapEff line in /proc/thread-self/status"))?;
    Ok(needed.iter().copied().filter(|capability| effective & (1 << capability.bit()) == 0).collect())
}

/// Fails with the names of what is missing. An unreadable /proc counts as everything missing.
pub fn check_capabilities(needed: &[Capability]) -> Result<(), MissingCapabilities> {
    match missing_capabilities(needed) {
        Ok(missing) if missing.is_empty() => Ok(()),
        Ok(missing) => Err(MissingCapabilities(missing)),
        Err(_) => Err(MissingCapabilities(needed.to_vec())),
    }
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read_from_proc() {
        assert_eq!(effective("Name:\tx\nCapEff:\t0000000000003000\nCapBnd:\tff\n"), Some(0x3000));
        assert_eq!(effective("CapEff:\tnonsense\n"), None);
        assert_eq!(effective(""), None);
        assert!(missing_capabilities(&[]).unwrap().is_empty());
    }

    #[test]
    fn the_error_names_what_is_missing() {
        let error = MissingCapabilities(vec![Capability::NetAdmin, Capability::SysAdmin]);
        assert_eq!(error.to_string(), "missing capabilities: NET_ADMIN, SYS_ADMIN; add them to securityContext.capabilities.add");
    }
}
