//! A node of a cluster as it is: a real containerd with runc and CNI plugins, a real kubelet and kube-proxy, in the network namespace of
//! a node, with mounts, processes and cgroups of their own, so that the machine notices nothing.
//!
//! Owns the first process of the node (`tests/kubernetes/node.sh`), with which everything on it ends, its files and cgroups.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;
use tempfile::TempDir;

use crate::agent::{find_program, workspace_dir};
use crate::skip::{command_missing, find_peer};
use crate::topology::Topology;
use crate::{netns, wait};

/// An image with a shell, a web server and curl, which is the pause image, too.
pub const IMAGE: &str = "culvert.test/busybox:1";
/// Where the pods of all nodes are, by the plan of a topology.
const PODS: &str = "10.244.0.0/16";

/// Why there can be none, if so.
pub fn missing() -> Option<String> {
    let peers = ["kubelet", "kube-proxy", "kube-controller-manager", "kube-scheduler"];
    let tools = ["containerd", "runc", "ctr", "unshare", "nsenter", "busybox", "curl", "nft"];
    let plugins = !Path::new("/usr/lib/cni/bridge").exists();
    let missing = peers.into_iter().find_map(|peer| find_peer(peer).err());
    let missing = missing.or_else(|| tools.into_iter().find_map(command_missing));
    missing.or_else(|| plugins.then(|| "the CNI plugins (`containernetworking-plugins`) are not installed".to_owned()))
}

/// Makes what nodes import before they start anything: ours, and what pods run, below `cluster`.
///
/// # Errors
/// They cannot be made, with what was said.
pub fn images(cluster: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(cluster.join("images"))?;
    busybox(cluster)?;
    culvert(cluster)
}

/// A node that runs.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    first: Child,
    dir: TempDir,
}

impl Node {
    /// Starts one of a topology. In `cluster` are the administrator's `admin.kubeconfig` and the [`images`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(topology: &Topology, name: &str, cluster: &Path) -> anyhow::Result<Self> {
        let spec = topology.plan().nodes.iter().find(|node| node.name == name).context("a node of the plan")?;
        let dir = netns::scratch(name)?;
        let kubelet = find_peer("kubelet").map_err(anyhow::Error::msg)?;
        let mut command = Command::new(workspace_dir().join("tests/kubernetes/node.sh"));
        command.arg(dir.path()).arg(cluster).arg(kubelet.parent().context("a program without a folder")?);
        command.args([name, &spec.v4.to_string(), &format!("{}/24", spec.pods_v4), PODS]);
        let log = fs::File::create(dir.path().join("node.log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let first = topology.node(name).netns.spawn(&mut command).context("start a node")?;
        Ok(Self { name: name.to_owned(), first, dir })
    }

    /// Waits until everything on it is started.
    ///
    /// # Errors
    /// Something does not start, with what it said.
    pub fn wait(&self) -> anyhow::Result<()> {
        let up = || self.dir.path().join("up").exists().then_some(());
        wait::until("the node", Duration::from_mins(2), up).with_context(|| self.log("node"))
    }

    /// The last lines of a program's log.
    pub fn log(&self, program: &str) -> String {
        let text = fs::read_to_string(self.dir.path().join(format!("{program}.log"))).unwrap_or_default();
        text.lines().rev().take(15).collect::<Vec<_>>().join("\n")
    }

    /// A program as the node's own processes run it.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        // The first process of the namespace of processes is a child of this one.
        command.args(["--mount", "--net", "--cgroup", "--target", &self.first.id().to_string()]);
        command.arg(format!("--pid=/proc/{}/ns/pid_for_children", self.first.id())).arg(program);
        command
    }

    /// A file of the node, as its own processes see it.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root/{path}", self.first.id()))
    }

    /// Where `/proc` of the node shows its processes of a program (by the kernel's name for it, of 15 bytes).
    pub fn processes(&self, program: &str) -> Vec<PathBuf> {
        let all = fs::read_dir(self.path("proc")).into_iter().flatten().flatten().map(|entry| entry.path());
        let is_it = |at: &PathBuf| fs::read_to_string(at.join("comm")).is_ok_and(|name| name.trim_end() == program);
        all.filter(is_it).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _gone = self.first.kill();
        let _gone = self.first.wait();
        let Some(name) = self.dir.path().file_name().and_then(|name| name.to_str()) else { return };
        for root in ["/sys/fs/cgroup".to_owned()].into_iter().chain(hierarchies()) {
            let group = Path::new(&root).join(name);
            // Its processes are ending: a group that still has one stays until the next look.
            let _late = wait::until_true("the cgroups of a node are empty", || {
                let _ended =
                    Command::new("find").arg(&group).args(["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"]).output();
                !group.exists()
            });
        }
    }
}

fn hierarchies() -> Vec<String> {
    let entries = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    entries.map(|entry| entry.path().to_string_lossy().into_owned()).collect()
}

/// Ours, with the programs as they were built, by the name that the chart gives it.
fn culvert(dir: &Path) -> anyhow::Result<()> {
    let programs = find_program("ztunnel")?;
    let mut command = Command::new(find_program("xtask")?);
    command.args(["image", "--programs"]).arg(programs.parent().context("a program without a folder")?);
    command.arg("--output").arg(dir.join("images/culvert.tar"));
    let out = command.output()?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// An image of busybox and curl, in Docker's format. (Debian's busybox is static, and ends where it asks for a name.)
fn busybox(dir: &Path) -> anyhow::Result<()> {
    let (root, parts) = (dir.join("busybox"), dir.join("busybox-parts"));
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir_all(&parts)?;
    let of_debian = |name: &str| -> anyhow::Result<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
        found.with_context(|| format!("no {name}"))
    };
    fs::copy(of_debian("busybox")?, root.join("bin/busybox"))?;
    for name in ["sh", "sleep", "httpd", "cat", "touch", "grep"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    let curl = of_debian("curl")?;
    fs::copy(&curl, root.join("bin/curl"))?;
    let linked = String::from_utf8(Command::new("ldd").arg(&curl).output()?.stdout)?;
    for library in linked.split_whitespace().filter_map(|word| word.strip_prefix('/')) {
        let place = root.join(library);
        fs::create_dir_all(place.parent().context("a library without a folder")?)?;
        fs::copy(Path::new("/").join(library), place)?;
    }
    let tar = |folder: &Path, file: &Path| -> anyhow::Result<()> {
        let status = Command::new("tar").arg("-cf").arg(file).arg("-C").arg(folder).arg(".").status()?;
        ensure!(status.success(), "tar: {status}");
        Ok(())
    };
    let layer = parts.join("layer.tar");
    tar(&root, &layer)?;
    let digest = String::from_utf8(Command::new("sha256sum").arg(&layer).output()?.stdout)?;
    let digest = digest.split_whitespace().next().context("sha256sum said nothing")?;
    let configuration = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": { "Entrypoint": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(parts.join("config.json"), configuration.to_string())?;
    let index = json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
    fs::write(parts.join("manifest.json"), index.to_string())?;
    tar(&parts, &dir.join("images/busybox.tar"))
}
