//! The redirection in real network namespaces: needs root, makes and removes its own namespaces.
#![allow(clippy::expect_used, reason = "a test's helpers fail the test")]
mod agent;
mod bare;
mod capture;
mod lifecycle;
mod net;
mod odd;
mod sock;
mod throughput;

/// Says why a test did not run and returns from it.
macro_rules! require_root {
    ($name:expr) => {
        // SAFETY: takes no arguments and cannot fail.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("SKIPPED: {}: needs root", $name);
            return;
        }
        match ebpf_loader::probe() {
            Ok(()) => {}
            // A kernel that should be able to and is not is a failure of ours, not a reason to skip.
            Err(why @ ebpf_loader::Unsupported::Trial(_)) => panic!("{why}"),
            Err(why) => {
                eprintln!("SKIPPED: {}: {why}", $name);
                return;
            }
        }
    };
}
pub(crate) use require_root;
