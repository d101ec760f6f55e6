//! A real istiod that tells only what it is asked for (`XDS_ON_DEMAND`): what it knows by which names, and that nobody loses what
//! was told when others give theirs up.
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use mesh_model::addr::NetworkAddr;
use mesh_model::service::ServiceKey;
use mesh_model::wanted::Wanted;
use mesh_runtime::metrics::Registry;
use mesh_sources::demand::{Demand, Fetched, Limits};
use mesh_sources::istiod::{self, MissingPolicy, node};
use mesh_sources::{Mesh, Origin, Viewpoint};
use mesh_tests::real_istiod::IstiodFed;
use mesh_tests::wait;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::conversion::control_plane;

/// How long an answer may take, and a change to be told.
const SETTLES: Duration = Duration::from_secs(20);
/// Short, so that a test sees questions come to their end.
const LIMITS: Limits = Limits { most: 100, idle: Duration::from_secs(4), absent: Duration::from_millis(500) };

const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t }
spec: { selector: { app: web }, clusterIP: 10.96.0.20, clusterIPs: [10.96.0.20], ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
---
apiVersion: v1
kind: Service
metadata: { name: other, namespace: t }
spec: { selector: { app: other }, clusterIP: 10.96.0.21, clusterIPs: [10.96.0.21], ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: wild, namespace: t }
spec: { hosts: ["*.wild.example"], addresses: [240.240.9.9], resolution: NONE, ports: [{ number: 443, name: tls, protocol: TLS }] }
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: range, namespace: t }
spec: { hosts: [range.example], addresses: [10.50.0.0/16], resolution: NONE, ports: [{ number: 443, name: tls, protocol: TLS }] }
"#;

/// A client on demand, of node `node-1`.
struct Client {
    folder: TempDir,
    runtime: Runtime,
    fed: Option<IstiodFed>,
    mesh: Mesh,
    demand: Demand,
}

impl Client {
    fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        write(&folder, &[("own", "node-1"), ("web-1", "node-2"), ("other-1", "node-2"), ("lone", "node-2")])?;
        let log = tempfile::NamedTempFile::new()?.into_temp_path().keep()?;
        let fed = IstiodFed::start(folder.path(), "127.0.0.1:0", None, log)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let demand = Demand::new(LIMITS);
        let settings = istiod::Settings {
            control_plane: control_plane(fed.addr)?,
            node: node::of_environment(node::Role::Ztunnel, "node-1", "Kubernetes", []),
            missing_policy: MissingPolicy::Deny,
            demand: Some(demand.clone()),
            metrics: istiod::Metrics::new(&Registry::new())?,
        };
        let view = Viewpoint { node: "node-1".into(), cluster: "Kubernetes".into(), ..Viewpoint::default() };
        let mesh = {
            let _in_it = runtime.enter();
            mesh_sources::start(Origin::Istiod(Box::new(settings)), view).0
        };
        Ok(Self { folder, runtime, fed: Some(fed), mesh, demand })
    }

    fn fetch(&self, wanted: &Wanted) -> Fetched {
        self.runtime.block_on(self.mesh.fetch(wanted, SETTLES))
    }

    fn knows(&self, names: &[&str]) -> bool {
        let snap = self.mesh.load_full();
        let mut known: Vec<String> = snap.workloads().map(|w| w.name.to_string()).collect();
        known.sort_unstable();
        known == names
    }

    fn until_knows(&self, names: &[&str], meanwhile: impl Fn()) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !self.knows(names) {
            if begun.elapsed() > SETTLES {
                let snap = self.mesh.load_full();
                let known: Vec<String> = snap.workloads().map(|w| w.name.to_string()).collect();
                bail!(
                    "it knows {known:?}, not {names:?}; istiod's log:\n{}",
                    self.fed.as_ref().map_or_else(String::new, IstiodFed::log)
                );
            }
            meanwhile();
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn change(&mut self, pods: &[(&str, &str)]) -> anyhow::Result<()> {
        write(&self.folder, pods)?;
        self.fed.as_mut().context("it runs")?.read_again()
    }
}

/// Pods by name and node; what is before the dash is their `app`, what is behind it their address.
fn write(folder: &TempDir, pods: &[(&str, &str)]) -> anyhow::Result<()> {
    let mut yaml = MESH.to_owned();
    for (name, node) in pods {
        let (app, ip) = (name.split('-').next().unwrap_or(name), address(name));
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {name}, namespace: t, labels: {{ app: {app} }} }}\n\
             spec: {{ nodeName: {node}, serviceAccountName: {app}, containers: [] }}\n\
             status: {{ phase: Running, podIP: {ip}, podIPs: [{{ ip: {ip} }}], conditions: [{{ type: Ready, status: \"True\" }}] }}\n"
        );
    }
    Ok(std::fs::write(folder.path().join("mesh.yaml"), yaml)?)
}

fn address(pod: &str) -> &'static str {
    match pod {
        "own" => "10.1.0.1",
        "web-1" => "10.1.0.2",
        "web-2" => "10.1.0.3",
        "other-1" => "10.1.0.4",
        "lone" => "10.1.0.5",
        _ => "10.1.0.9",
    }
}

fn at(ip: &str) -> anyhow::Result<Wanted> {
    Ok(Wanted::Address(NetworkAddr { network: "".into(), ip: ip.parse::<IpAddr>()? }))
}

fn host(name: &str) -> Wanted {
    Wanted::Service(ServiceKey::new("t", name))
}

/// By addresses and names, of what there is and what there is not; then what becomes of it.
pub fn by_names() -> anyhow::Result<()> {
    let mut client = Client::start()?;
    client.until_knows(&["own"], || {})?;

    let web = at("10.96.0.20")?;
    ensure!(client.fetch(&web) == Fetched::Found, "by the address of a service");
    ensure!(client.knows(&["own", "web-1"]), "a service comes with its endpoints, and with nothing else");
    ensure!(client.fetch(&host("other.t.svc.cluster.local")) == Fetched::Found, "by the name of a service");
    ensure!(client.fetch(&at("10.1.0.5")?) == Fetched::Found, "by the address of a pod");
    ensure!(client.fetch(&host("*.wild.example")) == Fetched::Found, "by a wildcard, as it is written");
    ensure!(client.fetch(&at("240.240.9.9")?) == Fetched::Found, "by the wildcard's address");
    for nothing in [host("nobody.t.svc.cluster.local"), host("a.wild.example"), at("10.1.0.99")?, at("10.50.7.7")?] {
        ensure!(client.fetch(&nothing) == Fetched::Absent, "{nothing} is nothing to it");
    }
    ensure!(client.fetch(&host("range.example")) == Fetched::Found, "a range, by its name");
    client.until_knows(&["lone", "other-1", "own", "web-1"], || {})?;

    // That there is nothing is asked again; nothing else goes with the question that is given up.
    let begun = Instant::now();
    while begun.elapsed() < LIMITS.absent * 6 {
        client.demand.touch(&web);
        ensure!(client.knows(&["lone", "other-1", "own", "web-1"]), "what was told is gone with what was given up");
        std::thread::sleep(Duration::from_millis(20));
    }
    client.change(&[("own", "node-1"), ("web-1", "node-2"), ("other-1", "node-2"), ("lone", "node-2"), ("late", "node-2")])?;
    // What is asked before istiod has seen the change itself is asked again.
    let late = at(address("late"))?;
    wait::until_true("a pod that came late", || client.fetch(&late) == Fetched::Found)?;

    // What nobody uses is forgotten, and what is used follows: pods that come to it, and its end.
    let touch = |client: &Client| client.demand.touch(&web);
    client.until_knows(&["own", "web-1"], || touch(&client))?;
    client.change(&[("own", "node-1"), ("web-1", "node-2"), ("web-2", "node-2"), ("other-1", "node-2")])?;
    client.until_knows(&["own", "web-1", "web-2"], || touch(&client))?;
    client.change(&[("own", "node-1"), ("web-2", "node-2"), ("other-1", "node-2")])?;
    client.until_knows(&["own", "web-2"], || touch(&client))?;
    ensure!(client.fetch(&host("other.t.svc.cluster.local")) == Fetched::Found, "what was forgotten is asked for again");

    // Another istiod is asked for what this one was.
    let addr = client.fed.take().context("it runs")?.addr;
    write(&client.folder, &[("own", "node-1"), ("web-1", "node-2")])?;
    let log = tempfile::NamedTempFile::new()?.into_temp_path().keep()?;
    client.fed = Some(IstiodFed::start(client.folder.path(), &addr.to_string(), None, log)?);
    client.until_knows(&["own", "web-1"], || touch(&client))?;
    Ok(())
}
