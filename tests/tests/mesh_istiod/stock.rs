//! The node agent started as Istio's chart starts Istio's (`manifests/charts/ztunnel`, by its default values): the arguments, environment,
//! files, user and rights of that DaemonSet, and nothing that it does not say.
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec};
use mesh_tests::cni::{CniAgent, CniPod};
use mesh_tests::confine::{Confinement, check_read_only};
use mesh_tests::container::{Container, Mount};
use mesh_tests::program::{Client, Server};
use mesh_tests::wait;

use crate::{ALSO, World, workload};

/// The name by which every pod of Istio's knows istiod.
pub(crate) const ISTIOD: &str = "istiod.istio-system.svc";
const TOKEN: &str = "of the stock agent";

/// What the kubelet writes into `/etc/hosts`, with istiod's name, for which there is no DNS here.
pub(crate) fn hosts(world: &World) -> String {
    format!("127.0.0.1 localhost\n{} {ISTIOD}\n", world.topology.host("control").v4)
}

/// A process as its folder in `/proc`.
pub(crate) fn process(agent: &Agent) -> PathBuf {
    PathBuf::from(format!("/proc/{}", agent.pid()))
}

/// The volumes of the DaemonSet, and what Kubernetes and the node put there.
fn volumes(world: &World) -> anyhow::Result<PathBuf> {
    let root = world.files.path().join("stock");
    for folder in ["istiod-ca-cert", "istio-token", "cni-ztunnel-sock-dir", "tmp"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join("istiod-ca-cert/root-cert.pem"), world.istiod.root())?;
    fs::write(root.join("istio-token/istio-token"), TOKEN)?;
    Ok(root)
}

fn container(world: &World, root: &Path) -> Container {
    let volume = |name: &str, at, read_only| Mount { from: root.join(name), at, read_only };
    let capabilities = ["NET_ADMIN", "SYS_ADMIN", "NET_RAW"].map(str::to_owned).to_vec();
    Container {
        rights: Confinement { capabilities, user: 0, group: 1337, volumes: Vec::new() },
        mounts: vec![
            volume("istiod-ca-cert", "/var/run/secrets/istio", true),
            volume("istio-token", "/var/run/secrets/tokens", true),
            volume("cni-ztunnel-sock-dir", "/var/run/ztunnel", false),
            volume("tmp", "/tmp", false),
        ],
        hosts: hosts(world),
    }
}

/// One pod of the DaemonSet.
fn daemon(world: &World, root: &Path, pod: &str) -> anyhow::Result<Agent> {
    let address = format!("{ISTIOD}:15012");
    let ip = world.topology.pod(pod).v4.to_string();
    let env = [
        ("CA_ADDRESS", address.as_str()),
        ("XDS_ADDRESS", &address),
        ("RUST_LOG", "info"),
        ("RUST_BACKTRACE", "1"),
        ("ISTIO_META_CLUSTER_ID", "c1"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", pod),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "node-c"),
        ("INSTANCE_IP", &ip),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ZTUNNEL_CPU_LIMIT", "2"),
        ("ZTUNNEL_RESOURCE_CPU_REQUEST", "1"),
        // The kubelet's, in every pod.
        ("HOSTNAME", pod),
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
        ("KUBERNETES_SERVICE_PORT", "443"),
    ];
    let env: BTreeMap<String, String> = env.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let spec = AgentSpec { flags: vec!["ztunnel".into()], env, ..AgentSpec::without_folder(pod, world.files.path()) };
    spec.contained(container(world, root)).start(world.topology.pod(pod))
}

/// Enrols, carries in both directions, is replaced by a rolling update (`maxSurge: 1`), and complains of nothing.
pub(crate) fn an_agent_of_istios_chart_serves(world: &mut World) -> anyhow::Result<()> {
    let root = volumes(world)?;
    let _servers = [Server::start(world.topology.pod("client"), ALSO)?, Server::start(world.topology.pod("stock"), ALSO)?];
    world.istiod.workload(workload(world.topology.pod("stock"), "node-c"));
    let knows_it =
        |dump: &serde_json::Value| dump["workloads"].as_array().is_some_and(|all| all.iter().any(|w| w["name"] == "stock"));
    world.agent("node-a")?.wait_config("the pod", knows_it)?;
    let cni = CniAgent::listen(&root.join("cni-ztunnel-sock-dir/ztunnel.sock"))?;
    let enrol = |agent: &Agent| -> anyhow::Result<_> {
        let connection = cni.accept().with_context(|| format!("its log:\n{}", agent.log_tail(20)))?;
        let pod = CniPod { uid: "u-stock", name: "stock", namespace: "t", service_account: "stock" };
        let error = connection.add(&pod, &world.topology.pod("stock").netns)?;
        ensure!(error.is_empty(), "the pod is not served: {error}");
        ensure!(connection.snapshot_sent()?.is_empty(), "the list is refused");
        agent.wait_ready(Duration::from_secs(40))?;
        Ok(connection)
    };
    let both_ways = || -> anyhow::Result<()> {
        ensure!(world.call("stock", world.topology.pod("client").at(ALSO))? == "client");
        ensure!(world.call("client", world.topology.pod("stock").at(ALSO))? == "stock");
        Ok(())
    };
    let first = daemon(world, &root, "ztunnel-1")?;
    let _first_by_cni = enrol(&first)?;
    both_ways().with_context(|| first.log_tail(20))?;
    let log = || first.whole_log();
    wait::until_true("both calls to be told of", || {
        let who = "spiffe://cluster.local/ns/t/sa/stock";
        log().contains(&format!("src.identity=\"{who}\"")) && log().contains(&format!("dst.identity=\"{who}\""))
    })
    .with_context(log)?;
    container(world, &root).rights.check(&process(&first))?;
    check_read_only(&process(&first), &["", "etc", "run", "usr/local/bin", "var/lib", "var/run/secrets/istio"])?;
    let seen = world.istiod.seen();
    let node = format!("ztunnel~{}~ztunnel-1.istio-system~istio-system.svc.cluster.local", world.topology.pod("ztunnel-1").v4);
    ensure!(seen.nodes.contains(&node), "{:?}", seen.nodes);
    let asked: Vec<&String> = seen
        .ca_headers
        .iter()
        .zip(&seen.identities)
        .filter(|((token, cluster), _)| *token == format!("Bearer {TOKEN}") && cluster == "c1")
        .map(|(_, identity)| identity)
        .collect();
    ensure!(asked.iter().any(|identity| *identity == "spiffe://cluster.local/ns/t/sa/stock"), "{:?}", seen.identities);

    let (mut live, _) = Client::who(world.topology.pod("stock"), world.topology.pod("client").at(ALSO))?;
    let second = daemon(world, &root, "ztunnel-2")?;
    let _second_by_cni = enrol(&second)?;
    wait::until_true("it took over", || second.whole_log().contains("took over from the agent before this one"))
        .with_context(|| second.log_tail(20))?;
    both_ways()?;
    live.ping("on the first one")?;
    drop(live);
    first.terminate(Duration::from_secs(20))?;
    both_ways()?;
    for agent in [&first, &second] {
        let log = agent.whole_log();
        let complaints: Vec<&str> = log.lines().filter(|line| line.contains("warn") || line.contains("error")).collect();
        ensure!(complaints.is_empty(), "{}: {complaints:#?}", agent.node());
    }
    Ok(())
}
