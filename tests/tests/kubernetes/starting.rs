//! Pods that start: the CNI plugin, called as a container runtime calls it, lets them go on when the agent has captured them.
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{find_binary, find_program};
use mesh_tests::capture::Capture;
use mesh_tests::program::Client;
use mesh_tests::wait;
use serde_json::{Value, json};

use super::{Cluster, PORT};

/// What a network provider's installer leaves.
pub(crate) const PROVIDER: (&str, &str) = (
    "10-provider.conflist",
    r#"{ "cniVersion": "1.0.0", "name": "pods", "plugins": [{ "type": "provider", "mtu": 1500 }, { "type": "portmap" }] }"#,
);
const OURS: &str = "00-culvert.conflist";
/// The pod that starts, and one that never does.
const STARTING: (&str, &str) = ("starting", "0a000000-0000-0000-0000-000000000010");
const STRANGER: (&str, &str) = ("stranger", "0a000000-0000-0000-0000-000000000011");

impl Cluster {
    fn chained(&self) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&std::fs::read_to_string(self.cni_dir.join(OURS))?)?)
    }
    /// Calls the plugin as it is installed, with its part of the configuration that is installed, changed by `edit`.
    fn call_plugin(
        &self,
        command: &str,
        namespace: &str,
        pod: (&str, &str),
        edit: impl FnOnce(&mut Value),
    ) -> anyhow::Result<Output> {
        let list = self.chained()?;
        let mut config = list["plugins"].as_array().and_then(|all| all.last()).context("no plugins")?.clone();
        config["cniVersion"] = list["cniVersion"].clone();
        config["name"] = list["name"].clone();
        config["prevResult"] = previous();
        edit(&mut config);
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={};K8S_POD_UID={}", pod.0, pod.1);
        let mut plugin = Command::new(self.cni_dir.join("culvert-cni"))
            .env_clear()
            .envs([("CNI_COMMAND", command), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0"), ("CNI_PATH", "/opt/cni/bin")])
            .env("CNI_NETNS", self.pod(STARTING.0).netns.path())
            .env("CNI_ARGS", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        plugin.stdin.take().context("a pipe")?.write_all(config.to_string().as_bytes())?;
        Ok(plugin.wait_with_output()?)
    }
    fn make_known(&self, pod: (&str, &str), running: bool) {
        self.apply(pod.0, pod.1, json!({}), json!({}));
        if !running {
            let mut object = self.api.get("pods", "shop", pod.0).unwrap_or_default();
            object["status"] = json!({ "phase": "Pending" });
            self.api.apply(object);
        }
    }
}

/// What the plugins before ours gave.
fn previous() -> Value {
    json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0" }], "ips": [{ "address": "10.244.0.9/24" }], "dns": {} })
}
fn is_let_go(out: &Output) -> anyhow::Result<()> {
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
    ensure!(serde_json::from_slice::<Value>(&out.stdout)? == previous(), "what others gave is handed on");
    Ok(())
}
fn is_refused(out: &Output, code: u64) -> anyhow::Result<()> {
    let error: Value = serde_json::from_slice(&out.stdout).with_context(|| format!("{out:?}"))?;
    ensure!(!out.status.success() && error["code"] == code && error["cniVersion"] == "1.0.0", "{error}");
    ensure!(error["msg"].is_string() && error["details"].is_string(), "{error}");
    Ok(())
}

pub(crate) fn the_plugin_is_chained_and_stays(cluster: &mut Cluster) -> anyhow::Result<()> {
    let types = || -> Option<Vec<String>> {
        let all = cluster.chained().ok()?["plugins"].as_array()?.clone();
        Some(all.iter().filter_map(|plugin| plugin["type"].as_str().map(str::to_owned)).collect())
    };
    let are = |expected: &[&str]| wait::until_true(&format!("{expected:?}"), || types().is_some_and(|found| found == expected));
    are(&["provider", "portmap", "culvert-cni"])?;
    let (ours, plugin) = (cluster.cni_dir.join(OURS), cluster.cni_dir.join("culvert-cni"));
    let inode = std::fs::metadata(&ours)?.ino();
    std::thread::sleep(Duration::from_millis(1200));
    ensure!(std::fs::metadata(&ours)?.ino() == inode, "it was written again for nothing");
    // Somebody removes both; then the provider's installer comes again.
    std::fs::remove_file(&ours)?;
    std::fs::remove_file(&plugin)?;
    are(&["provider", "portmap", "culvert-cni"])?;
    wait::until_true("the program is back", || {
        std::fs::read(&plugin).ok() == find_program("culvert-cni").ok().and_then(|p| std::fs::read(p).ok())
    })?;
    let provider = cluster.cni_dir.join(PROVIDER.0);
    std::fs::write(&provider, PROVIDER.1.replace("portmap", "bandwidth"))?;
    are(&["provider", "bandwidth", "culvert-cni"])?;
    std::fs::write(&provider, PROVIDER.1)?;
    are(&["provider", "portmap", "culvert-cni"])?;
    ensure!(std::fs::read_to_string(&provider)? == PROVIDER.1, "the provider's own file is left as it is");
    Ok(())
}

/// The runtime is quicker than the API server, and the pod's first process is quicker than what the kubelet tells of its address.
pub(crate) fn a_pod_is_captured_before_it_starts(cluster: &mut Cluster) -> anyhow::Result<()> {
    let (starting, server) = (cluster.pod(STARTING.0), cluster.pod("server"));
    let out = std::thread::scope(|scope| {
        let call = scope.spawn(|| cluster.call_plugin("ADD", "shop", STARTING, |_| {}));
        std::thread::sleep(Duration::from_millis(300));
        ensure!(!call.is_finished(), "the plugin did not wait for the pod to be known");
        cluster.make_known(STARTING, false);
        call.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the caller panicked")))
    })?;
    is_let_go(&out).with_context(|| cluster.agent().map(|a| a.log_tail(20)).unwrap_or_default())?;
    let agent = cluster.agent()?;
    let (mark, capture) = (agent.mark(), Capture::start(&server.netns, "eth0")?);
    std::thread::scope(|scope| {
        let first_call = scope.spawn(|| Client::who(starting, server.at(PORT)).map(drop));
        std::thread::sleep(Duration::from_millis(300));
        cluster.make_known(STARTING, true);
        first_call.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the caller panicked")))
    })?;
    let seen = capture.finish();
    let of_pod = |segment: &&mesh_tests::capture::Segment| segment.src.ip() == starting.v4;
    let ports: Vec<u16> = seen.segments.iter().filter(of_pod).map(|segment| segment.dst.port()).collect();
    ensure!(ports.iter().all(|port| *port != PORT), "the first call went around the agent: {ports:?}");
    agent.wait_access("the first call", mark, |record| {
        let text = record.to_string();
        text.contains("/sa/starting") && text.contains("/sa/server") && text.contains("inbound")
    })?;
    is_marked_and_checked(cluster)
}

fn is_marked_and_checked(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.wait_marked(STARTING.0, true)?;
    let check = cluster.call_plugin("CHECK", "shop", STARTING, |_| {})?;
    ensure!(check.status.success() && check.stdout.is_empty(), "{check:?}");
    // Its first process is there: that is how it is known from now on, in the same place.
    cluster.process(300, STARTING.0, STARTING.1)?;
    let mark = cluster.agent()?.mark();
    cluster.apply("opted-out", super::UIDS[2].1, json!({ "istio.io/dataplane-mode": "none", "some": "change" }), json!({}));
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!cluster.agent()?.log_since(mark).contains("pod is"), "{}", cluster.agent()?.log_since(mark));
    Ok(())
}

pub(crate) fn pods_outside_the_mesh_start_at_once(cluster: &mut Cluster) -> anyhow::Result<()> {
    let began = Instant::now();
    is_let_go(&cluster.call_plugin("ADD", "shop", super::UIDS[2], |_| {})?)?;
    is_let_go(&cluster.call_plugin("ADD", "kube-system", STRANGER, |_| {})?)?;
    ensure!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    Ok(())
}

/// The label is there when the runtime calls, and the agent's watch has not told of it: the pod does not start as if there were none.
pub(crate) fn a_label_as_young_as_the_pod_counts(cluster: &mut Cluster) -> anyhow::Result<()> {
    let namespace =
        |labels: Value| json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop", "labels": labels } });
    let ambient = json!({ "istio.io/dataplane-mode": "ambient" });
    cluster.api.apply(namespace(json!({})));
    cluster.wait_marked(STARTING.0, false)?;
    cluster.api.hold("namespaces", true);
    cluster.api.apply(namespace(ambient));
    let out = std::thread::scope(|scope| {
        let call = scope.spawn(|| cluster.call_plugin("ADD", "shop", STARTING, |_| {}));
        std::thread::sleep(Duration::from_millis(500));
        let early = call.is_finished();
        cluster.api.hold("namespaces", false);
        let out = call.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the caller panicked")))?;
        ensure!(!early, "the pod was let start: {out:?}");
        anyhow::Ok(out)
    })?;
    is_let_go(&out).with_context(|| cluster.agent().map(|a| a.log_tail(20)).unwrap_or_default())?;
    let check = cluster.call_plugin("CHECK", "shop", STARTING, |_| {})?;
    ensure!(check.status.success(), "{check:?}");
    // A server that does not say whether the pod is enrolled has nobody start; the kubelet tries again.
    cluster.api.refuse("namespaces", 500);
    let out = cluster.call_plugin("ADD", "shop", super::UIDS[2], |_| {});
    cluster.api.refuse("namespaces", 0);
    is_refused(&out?, 11)
}

pub(crate) fn a_pod_nobody_told_of_does_not_start(cluster: &mut Cluster) -> anyhow::Result<()> {
    // Its name is known, of the pod before it.
    let again = (STARTING.0, STRANGER.1);
    is_refused(&cluster.call_plugin("ADD", "shop", again, |_| {})?, 11)
}

/// What the agents are of.
pub(crate) fn daemon_set() -> Value {
    json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "culvert-agent", "namespace": "istio-system" } })
}

pub(crate) fn an_agent_that_is_uninstalled_takes_the_plugin_along(cluster: &mut Cluster) -> anyhow::Result<()> {
    let files = [OURS, "culvert-cni"].map(|name| cluster.cni_dir.join(name));
    let there = || files.each_ref().map(|file| file.exists());
    let ended = |cluster: &mut Cluster, meanwhile: &dyn Fn(&Cluster) -> anyhow::Result<()>| -> anyhow::Result<()> {
        let agent = cluster.agent.take().context("no agent runs")?;
        agent.signal(nix::sys::signal::Signal::SIGTERM)?;
        meanwhile(cluster)?;
        agent.wait_end(Duration::from_secs(15)).map(drop)
    };
    let next = |cluster: &mut Cluster| {
        cluster.start_agent()?;
        wait::until_true("the plugin is put on the node", || there() == [true, true])
    };
    ended(cluster, &|_| Ok(()))?;
    ensure!(there() == [true, true], "the next agent finds it as it was");
    next(cluster)?;
    // As `helm uninstall` goes: the right to ask is taken away, then the account.
    cluster.api.refuse("daemonsets", 403);
    ended(cluster, &|cluster| {
        std::thread::sleep(Duration::from_millis(2500));
        ensure!(there() == [true, true], "a right that is missing says nothing");
        cluster.api.refuse("daemonsets", 401);
        Ok(())
    })?;
    ensure!(there() == [false, false], "uninstalled: {:?}", there());
    cluster.api.refuse("daemonsets", 0);
    next(cluster)?;
    let mut going = daemon_set();
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    cluster.api.apply(going);
    ended(cluster, &|_| Ok(()))?;
    ensure!(there() == [false, false], "being deleted: {:?}", there());
    cluster.api.apply(daemon_set());
    next(cluster)
}

pub(crate) fn without_an_agent_pods_do_not_start(cluster: &mut Cluster) -> anyhow::Result<()> {
    let agent = cluster.agent.take().context("no agent runs")?;
    agent.signal(nix::sys::signal::Signal::SIGKILL)?;
    agent.wait_end(Duration::from_secs(10))?;
    is_refused(&cluster.call_plugin("ADD", "shop", STRANGER, |_| {})?, 11)?;
    is_let_go(&cluster.call_plugin("ADD", "shop", STRANGER, |config| config["unreachable"] = json!("allow"))?)?;
    is_let_go(&cluster.call_plugin("ADD", "kube-system", STRANGER, |_| {})?)?;
    for command in ["DEL", "GC", "STATUS"] {
        let out = cluster.call_plugin(command, "shop", STRANGER, |_| {})?;
        ensure!(out.status.success() && out.stdout.is_empty(), "{command}: {out:?}");
    }
    let out = cluster.call_plugin("VERSION", "shop", STRANGER, |_| {})?;
    ensure!(String::from_utf8_lossy(&out.stdout).contains("supportedVersions"), "{out:?}");
    Ok(())
}

pub(crate) fn cleaning_up_removes_the_plugin_and_nothing_else(cluster: &mut Cluster) -> anyhow::Result<()> {
    let dir = &cluster.cni_dir;
    let mut command = Command::new(find_binary()?);
    command.args(["cleanup", "--node", "node-a", "--proc-dir"]).arg(&cluster.proc_dir);
    command.arg("--cni-conf-dir").arg(dir).arg("--cni-bin-dir").arg(dir);
    command.env("CULVERT_BPF_DIR", cluster.topology.node("node-a").netns.pins());
    let out = cluster.topology.node("node-a").netns.output(&mut command)?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let mut left: Vec<_> = std::fs::read_dir(dir)?.flatten().map(|entry| entry.file_name()).collect();
    left.sort();
    ensure!(left == [PROVIDER.0], "{left:?}");
    ensure!(std::fs::read_to_string(dir.join(PROVIDER.0))? == PROVIDER.1);
    Ok(())
}
