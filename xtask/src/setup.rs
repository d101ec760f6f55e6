//! What the suites, the demo and the optional builds need from the machine, and how it gets there.
//!
//! Owns the list of Debian packages. Refuses to install anything silently: what and why is printed first. On a machine
//! without apt or without root it reports what is missing, and the callers count what they cannot run as skipped.

use crate::shell::{self, Root};
use anyhow::{Result, bail};
use std::path::Path;
use std::process::Command;

/// One thing that must be on the machine.
pub struct Need {
    probe: Probe,
    package: &'static str,
    why: &'static str,
}

enum Probe {
    Program(&'static str),
    /// Python modules, imported by `python3`.
    Python(&'static str),
    /// A file whose name starts like this in a folder below `/usr/lib` (one level of folders, then the given one).
    Library(&'static str),
}

impl Probe {
    fn present(&self) -> bool {
        match self {
            Self::Program(name) => shell::find_program(name).is_some(),
            Self::Python(modules) => shell::succeeds(Command::new("python3").args(["-c", &format!("import {modules}")])),
            Self::Library(prefix) => library_exists(Path::new("/usr/lib"), prefix),
        }
    }
}

/// Looks for `lib/*/PREFIX*` and `lib/*/lib/PREFIX*`: where Debian keeps versioned LLVM libraries.
fn library_exists(lib: &Path, prefix: &str) -> bool {
    let has = |folder: &Path| {
        std::fs::read_dir(folder)
            .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with(prefix)))
    };
    std::fs::read_dir(lib)
        .is_ok_and(|entries| entries.flatten().any(|entry| has(&entry.path()) || has(&entry.path().join("lib"))))
}

/// What ring 3 and the demo run beside the agent.
pub const NETWORK: &[Need] = &[
    Need { probe: Probe::Program("ip"), package: "iproute2", why: "network namespaces and veth pairs" },
    Need { probe: Probe::Program("nft"), package: "nftables", why: "redirection by the rules of others" },
    Need { probe: Probe::Program("curl"), package: "curl", why: "an HTTP client that is not ours" },
    Need { probe: Probe::Program("tcpdump"), package: "tcpdump", why: "what is on the wire" },
    Need { probe: Probe::Program("python3"), package: "python3", why: "applications that are not ours" },
    Need { probe: Probe::Python("venv, ensurepip"), package: "python3-venv", why: "environments for those applications" },
];

/// What of the image is not ours, and what puts it together.
pub const IMAGE: &[Need] = &[
    Need { probe: Probe::Program("nft"), package: "nftables", why: "part of the image" },
    Need {
        probe: Probe::Program("update-ca-certificates"),
        package: "ca-certificates",
        why: "roots of trust, part of the image",
    },
    Need { probe: Probe::Program("strip"), package: "binutils", why: "leaves debug information out" },
];

/// What a node of a cluster runs that is not Kubernetes' own.
pub const NODE: &[Need] = &[
    Need { probe: Probe::Program("containerd"), package: "containerd", why: "runs pods" },
    Need { probe: Probe::Program("runc"), package: "runc", why: "runs their containers" },
    Need { probe: Probe::Library("host-local"), package: "containernetworking-plugins", why: "the network of pods" },
    Need { probe: Probe::Program("busybox"), package: "busybox-static", why: "an image for pods" },
];

/// Who else reads our metrics.
pub const METRICS: &[Need] =
    &[Need { probe: Probe::Program("promtool"), package: "prometheus", why: "Prometheus's own check of the metrics" }];

/// What building BoringSSL takes (feature `tls-boring`).
pub const BORING: &[Need] = &[
    Need { probe: Probe::Program("cmake"), package: "cmake", why: "builds BoringSSL" },
    Need { probe: Probe::Program("g++"), package: "g++", why: "builds BoringSSL" },
    Need { probe: Probe::Program("clang"), package: "clang", why: "headers for the bindings of BoringSSL" },
    Need { probe: Probe::Library("libclang.so"), package: "libclang-dev", why: "generates the bindings of BoringSSL" },
];

/// What building aws-lc's module for FIPS 140 takes (feature `tls-fips`).
pub const FIPS: &[Need] = &[
    Need { probe: Probe::Program("cmake"), package: "cmake", why: "builds aws-lc's module for FIPS 140" },
    Need { probe: Probe::Program("go"), package: "golang-go", why: "builds aws-lc's module for FIPS 140" },
    Need { probe: Probe::Program("perl"), package: "perl", why: "builds aws-lc's module for FIPS 140" },
];

/// Fails, naming the packages, if something of `needs` is missing; installs nothing.
pub fn check(needs: &[Need]) -> Result<()> {
    let missing: Vec<&str> = needs.iter().filter(|need| !need.probe.present()).map(|need| need.package).collect();
    if !missing.is_empty() {
        bail!("missing on this machine: {}", missing.join(", "));
    }
    Ok(())
}

/// Installs what of `needs` is missing. Fails, naming the packages, if that is not possible.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !need.probe.present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    let root = shell::find_root();
    if shell::find_program("apt-get").is_none() || root == Root::No {
        bail!("missing on this machine: {} (cannot install: needs Debian's apt-get and root)", packages.join(", "));
    }
    for need in &missing {
        eprintln!("installing {} ({})", need.package, need.why);
    }
    if apt(root, &install_args(&packages)).is_err() {
        // A fresh machine has no package lists yet, or old ones. Mirrors fail now and then.
        let updated = (0..3).any(|_| apt(root, &["update", "-qq"]).is_ok());
        if !updated {
            bail!("apt-get update failed three times; missing: {}", packages.join(", "));
        }
        apt(root, &install_args(&packages))?;
    }
    match missing.iter().find(|need| !need.probe.present()) {
        Some(need) => bail!("{} is installed but what it should bring is not found ({})", need.package, need.why),
        None => Ok(()),
    }
}

fn install_args<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["install", "-y", "-qq", "--no-install-recommends"];
    args.extend(packages);
    args
}

fn apt(root: Root, args: &[&str]) -> Result<()> {
    let mut command = shell::as_root(root, Path::new("apt-get"));
    shell::run(command.args(args).env("DEBIAN_FRONTEND", "noninteractive").stdout(std::io::stderr()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_where_debian_puts_them() {
        let lib = std::env::temp_dir().join(format!("xtask-setup-{}", std::process::id()));
        std::fs::create_dir_all(lib.join("llvm-99/lib")).unwrap();
        assert!(!library_exists(&lib, "libclang.so"));
        std::fs::write(lib.join("llvm-99/lib/libclang.so.1"), "").unwrap();
        assert!(library_exists(&lib, "libclang.so"));
        std::fs::remove_dir_all(&lib).unwrap();
    }
}
