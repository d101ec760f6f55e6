//! The redirection in real network namespaces: needs root, makes and removes its own namespaces.
mod agent;
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
        if let Err(why) = ebpf_loader::probe() {
            eprintln!("SKIPPED: {}: {why}", $name);
            return;
        }
    };
}
pub(crate) use require_root;
