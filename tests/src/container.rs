//! A program as the kubelet starts a container: a root filesystem of its own, read-only but for what is mounted from its pod's
//! volumes, at the paths that the pod names; its user, group and rights; its own environment and no other.
//!
//! Owns the mount namespace it makes for the program. What is not a container's here: it sees the machine's `/proc`. Upstream:
//! [`crate::agent`]. Downstream: `mount(2)`, `chroot(2)`, [`crate::confine`].
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot};

use crate::confine::{Confinement, PROGRAMS};

/// Where programs are looked for in it.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where its root is put together, in a mount namespace that nobody else sees.
const ROOT: &str = "/mnt";
/// What of the machine stands in for the image: libraries, and the program that gives rights up.
const IMAGE: [&str; 7] = ["usr", "bin", "sbin", "lib", "lib64", "etc/ssl", "etc/nsswitch.conf"];
/// What every container has of the kernel.
const KERNEL: [&str; 3] = ["proc", "sys", "dev"];

/// A container.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its capabilities, user and group.
    pub rights: Confinement,
    /// What is mounted.
    pub mounts: Vec<Mount>,
    /// Lines of `/etc/hosts`, which the kubelet writes.
    pub hosts: String,
}

/// A volume of the pod.
#[derive(Clone, Debug)]
pub struct Mount {
    /// The folder that stands for it.
    pub from: PathBuf,
    /// `mountPath`.
    pub at: &'static str,
    /// Secrets, ConfigMaps and tokens are; `emptyDir` and `hostPath` are not, unless the pod says so.
    pub read_only: bool,
}

impl Container {
    /// Gives this thread, and what it starts, the root filesystem. `program`: shown, with those beside it, where images have them.
    ///
    /// # Errors
    /// Not root, or a volume is missing.
    pub fn enter(&self, program: &Path) -> io::Result<()> {
        const NOTHING: Option<&Path> = None;
        let bind = |from: &Path, at: &Path| {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(from), at, NOTHING, flags, NOTHING).map_err(io::Error::from)
        };
        let read_only = |at: &Path| {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(NOTHING, at, NOTHING, flags, NOTHING).map_err(io::Error::from)
        };
        let root = Path::new(ROOT);
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)?;
        mount(Some("tmpfs"), root, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
        for folder in ["etc", "run", "var/lib", "tmp"] {
            fs::create_dir_all(root.join(folder))?;
        }
        symlink("../run", root.join("var/run"))?;
        fs::write(root.join("etc/hosts"), &self.hosts)?;
        for name in IMAGE.iter().chain(&KERNEL) {
            let (from, at) = (Path::new("/").join(name), root.join(name));
            let Ok(meta) = fs::symlink_metadata(&from) else { continue };
            if meta.is_symlink() {
                symlink(fs::read_link(&from)?, &at)?;
                continue;
            }
            if meta.is_dir() {
                fs::create_dir(&at)?;
            } else {
                fs::write(&at, "")?;
            }
            bind(&from, &at)?;
            if !KERNEL.contains(name) {
                read_only(&at)?;
            }
        }
        let programs = root.join(PROGRAMS.trim_start_matches('/'));
        bind(program.parent().unwrap_or(program), &programs)?;
        read_only(&programs)?;
        for volume in &self.mounts {
            let at = root.join(volume.at.trim_start_matches('/'));
            fs::create_dir_all(&at)?;
            bind(&volume.from, &at)?;
            if volume.read_only {
                read_only(&at)?;
            }
        }
        read_only(root)?;
        chroot(root)?;
        chdir("/")?;
        Ok(())
    }
}
