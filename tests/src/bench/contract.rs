//! Node agents started as istio/ztunnel is: everything by its environment, the mesh from a file in its local format, certificates
//! from istiod's API, pods from the CNI agent, with whose rules they are redirected. Whatever keeps that contract can be measured.
//!
//! Owns: the control plane's namespace and the two links to it, the file, the CNI agent's side. Upstream: [`super::field`].
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, ensure};

use super::parts::{Proxy, Settings, join, pinned};
use crate::cni::{self, CniAgent, CniPod, Connection};
use crate::istiod::Istiod;
use crate::netns::Netns;

const CONTROL_PORT: u16 = 15012;
const CONTROL_NAME: &str = "istiod.bench";

/// What agents are served by; ends with its value.
pub(super) struct ControlPlane {
    _istiod: Istiod,
    netns: Netns,
    connections: Vec<(CniAgent, Connection)>,
    files: tempfile::TempDir,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane").field("netns", &self.netns).finish_non_exhaustive()
    }
}

/// A pod an agent serves.
pub(super) struct Pod<'a> {
    pub name: &'a str,
    pub netns: &'a Netns,
}

impl ControlPlane {
    /// In a namespace of this name. `mesh` is the file agents read.
    pub fn start(name: &str, mesh: &str) -> anyhow::Result<Self> {
        let netns = Netns::create(name)?;
        let files = crate::netns::scratch("contract")?;
        let istiod = Istiod::start(netns.listen((Ipv4Addr::UNSPECIFIED, CONTROL_PORT).into())?, &[CONTROL_NAME])?;
        std::fs::write(files.path().join("root.pem"), istiod.root())?;
        std::fs::write(files.path().join("token"), "of a node")?;
        std::fs::write(files.path().join("mesh.yaml"), mesh)?;
        Ok(Self { _istiod: istiod, netns, connections: Vec::new(), files })
    }

    /// Starts the agent of `node` and hands it its pod.
    pub fn agent(
        &mut self,
        binary: &Path,
        node: (&str, Netns),
        pod: &Pod<'_>,
        log: &str,
        settings: &Settings,
    ) -> anyhow::Result<Proxy> {
        let (node, place) = node;
        let number = u8::try_from(self.connections.len())?;
        let (here, there) = (Ipv4Addr::new(10, 79, number, 1), Ipv4Addr::new(10, 79, number, 2));
        join((&self.netns, here, &format!("n{number}")), (&place, there, "eth0"))?;
        let file = |name: &str| self.files.path().join(name);
        let socket = file(&format!("{node}.sock"));
        let cni = CniAgent::listen(&socket)?;
        let mut command = pinned(settings.cpus.map(|(proxies, _load)| proxies), binary);
        command.arg("proxy");
        command.env("NODE_NAME", node).env("CLUSTER_ID", "Kubernetes").env("INPOD_UDS", &socket);
        command.env("LOCAL_XDS_PATH", file("mesh.yaml")).env("XDS_ADDRESS", "");
        command.env("CA_ADDRESS", format!("https://{here}:{CONTROL_PORT}")).env("ALT_CA_HOSTNAME", CONTROL_NAME);
        command.env("CA_ROOT_CA", file("root.pem")).env("AUTH_TOKEN", file("token"));
        command.env("ZTUNNEL_WORKER_THREADS", settings.workers.to_string()).env("RUST_LOG", "info");
        let agent = Proxy::start(place, command, &format!("{log}-{node}"), (15021, "/healthz/ready"), settings)?;
        let connection = cni.accept().with_context(|| format!("log of {node}: {}", agent.log().display()))?;
        cni::redirect(pod.netns)?;
        let named = CniPod { uid: pod.name, name: pod.name, namespace: "bench", service_account: pod.name };
        for error in [connection.add(&named, pod.netns)?, connection.snapshot_sent()?] {
            ensure!(error.is_empty(), "{node} does not serve its pod: {error}");
        }
        self.connections.push((cni, connection));
        Ok(agent)
    }
}
