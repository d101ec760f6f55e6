//! A program as its container runs it: with the capabilities that are named and no others, as the user that is named, on a root
//! filesystem that is read-only but for mounted volumes.
//!
//! Owns the mount namespace it makes for the program. Upstream: [`crate::agent`]. Downstream: `setpriv`, `mount(2)`.
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

/// Where an image has its programs.
pub(crate) const PROGRAMS: &str = "/usr/local/bin";

/// What a program may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// In the words of a container's security context: `NET_ADMIN`.
    pub capabilities: Vec<String>,
    /// User it runs as; 0 is root without any other right.
    pub user: u32,
    /// Its group, and its only one.
    pub group: u32,
    /// What stays writable.
    pub volumes: Vec<PathBuf>,
}

impl Confinement {
    /// What the `securityContext` of a container says; that of its pod says as whom it runs where it does not itself.
    pub fn of_container(container: &Value, pod: &Value, volumes: &[&Path]) -> Self {
        let (own, whole) = (&container["securityContext"], &pod["securityContext"]);
        let added = own["capabilities"]["add"].as_array().into_iter().flatten();
        let number = |key: &str| own[key].as_u64().or_else(|| whole[key].as_u64()).map(|number| number as u32);
        let user = number("runAsUser").unwrap_or(0);
        Self {
            capabilities: added.filter_map(Value::as_str).map(str::to_owned).collect(),
            user,
            group: number("runAsGroup").unwrap_or(user),
            volumes: volumes.iter().map(|path| path.to_path_buf()).collect(),
        }
    }

    /// The program, where [`Self::enter`] shows it, with no other rights, not even by an exec.
    pub fn command(&self, program: &Path) -> Command {
        let mut bounds = "-all".to_owned();
        for capability in &self.capabilities {
            bounds.push_str(",+");
            bounds.push_str(&capability.to_lowercase());
        }
        let mut command = Command::new("setpriv");
        command.args(["--inh-caps=-all".to_owned(), format!("--bounding-set={bounds}")]);
        let (user, group) = (self.user, self.group);
        if (user, group) != (0, 0) {
            command.args([format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".into()]);
        }
        if user != 0 {
            command.arg("--no-new-privs");
        }
        command.arg("--").arg(Path::new(PROGRAMS).join(program.file_name().unwrap_or_default()));
        command
    }

    /// Makes every mount read-only for this thread and what it starts, but the volumes, and shows the program and those beside it
    /// where an image has them: whoever runs it may not have a way to where it was built.
    ///
    /// # Errors
    /// Not root, or a volume is missing.
    pub fn enter(&self, program: &Path) -> io::Result<()> {
        const NOTHING: Option<&Path> = None;
        let change = |from: Option<&Path>, at: &Path, flags| mount(from, at, NOTHING, flags, NOTHING).map_err(io::Error::from);
        unshare(CloneFlags::CLONE_NEWNS)?;
        change(None, Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
        for volume in &self.volumes {
            fs::create_dir_all(volume)?;
            change(Some(volume), volume, MsFlags::MS_BIND)?;
        }
        change(program.parent(), Path::new(PROGRAMS), MsFlags::MS_BIND)?;
        for line in fs::read_to_string("/proc/thread-self/mountinfo")?.lines() {
            let (Some(at), Some((_, source))) = (line.split(' ').nth(4), line.split_once(" - ")) else { continue };
            let at = Path::new(at);
            // Those are views of the kernel's own; a container has its own `/proc`.
            let of_kernel = ["nsfs ", "proc ", "cgroup"].iter().any(|kind| source.starts_with(kind));
            if of_kernel || self.volumes.iter().any(|volume| volume == at) {
                continue;
            }
            match change(None, at, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY) {
                // Below something else, or of a test that ended meanwhile.
                Err(e) if at == Path::new("/") => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// That a process has these rights and no others. `process`: its folder in `/proc`.
    ///
    /// # Errors
    /// What it has instead.
    pub fn check(&self, process: &Path) -> anyhow::Result<()> {
        let status = fs::read_to_string(process.join("status"))?;
        let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim().to_owned();
        let expected = format!("{:016x}", bits(&self.capabilities)?);
        for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
            ensure!(field(set) == expected, "{set} {} instead of {expected}", field(set));
        }
        let none = "0000000000000000";
        ensure!(field("CapInh:") == none && field("CapAmb:") == none, "{status}");
        for (key, own) in [("Uid:", self.user), ("Gid:", self.group)] {
            ensure!(field(key).split_whitespace().all(|id| id == own.to_string()), "it runs as {key} {}", field(key));
        }
        Ok(())
    }
}

/// That nothing can be made in these folders of what a process sees, not even by root: it is the mount that is read-only.
///
/// # Errors
/// Where something could be, or why not instead.
pub fn check_read_only(process: &Path, folders: &[&str]) -> anyhow::Result<()> {
    for folder in folders {
        let made = fs::write(process.join("root").join(folder).join("culvert-was-here"), "");
        ensure!(made.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ReadOnlyFilesystem), "/{folder}: {made:?}");
    }
    Ok(())
}

/// Bits of the kernel's sets (capabilities(7)).
fn bits(capabilities: &[String]) -> anyhow::Result<u64> {
    let bit = |name: &String| match name.as_str() {
        "NET_ADMIN" => Ok(1 << 12),
        "NET_RAW" => Ok(1 << 13),
        "SYS_PTRACE" => Ok(1 << 19),
        "SYS_ADMIN" => Ok(1 << 21),
        other => Err(anyhow::anyhow!("{other} is not expected")),
    };
    capabilities.iter().map(bit).try_fold(0, |all, bit| bit.map(|bit: u64| all | bit))
}
