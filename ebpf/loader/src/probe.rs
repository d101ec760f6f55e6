//! Says whether this machine can redirect at all, by trying it where it hurts nobody.
use std::{fs, os::fd::AsFd};

use aya::util::KernelVersion;

use crate::{
    attach,
    error::{RedirectError, Unsupported},
    netns,
};

/// What [`crate::Redirect::attach`] needs; `CAP_SYS_ADMIN` includes what `CAP_BPF` allows and is needed for `setns`.
const CAPABILITIES: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)];

/// Tries everything an attachment does in a namespace made for it, and says what is missing.
///
/// Takes as long as enrolling a pod; call it once at start.
pub fn probe() -> Result<(), Unsupported> {
    if KernelVersion::current().is_ok_and(|running| running < KernelVersion::new(6, 6, 0)) {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        return Err(Unsupported::Kernel { release: release.trim().to_owned() });
    }
    if let Some(effective) = effective_capabilities() {
        for (name, bit) in CAPABILITIES {
            if effective & (1 << bit) == 0 {
                return Err(Unsupported::Capability(name));
            }
        }
    }
    netns::within_scratch(|| {
        let netns = fs::File::open("/proc/thread-self/ns/net").map_err(RedirectError::Namespace)?;
        attach::rehearse(netns.as_fd())
    })?;
    Ok(())
}

/// The effective set; `None` where `/proc` does not say, and the trial decides.
fn effective_capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}
