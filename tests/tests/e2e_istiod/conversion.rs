//! The same YAML through our translator and through istiod.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use mesh_model::authz::{Verdict, authorize};
use mesh_model::conn::InboundConn;
use mesh_model::id::SpiffeId;
use mesh_model::policy::PolicyKey;
use mesh_model::snapshot::Snapshot;
use mesh_runtime::control_plane::{ControlPlane, Roots, Settings, Token};
use mesh_runtime::metrics::Registry;
use mesh_sources::istiod::{self, MissingPolicy};
use mesh_sources::{Diagnostics, Mesh, Origin, Viewpoint};
use mesh_tests::agent::workspace_dir;
use mesh_tests::real_istiod::IstiodFed;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::compare::{Found, differences, objects};
use crate::differences::DIFFERENCES;
use crate::peers;

/// How long one side may be behind the other.
const SETTLES: Duration = Duration::from_secs(20);

/// A folder, and both readings of it.
struct Both {
    folder: TempDir,
    /// What both sources run on.
    _runtime: Runtime,
    fed: IstiodFed,
    ours: Mesh,
    told: Mesh,
    refused: Diagnostics,
    registry: Registry,
}

/// Where the agent stands, as its environment would say: the name istiod gives its own cluster. The network is for the label of the
/// root namespace to say.
fn view() -> Viewpoint {
    Viewpoint { node: "node-1".into(), cluster: "Kubernetes".into(), ..Viewpoint::default() }
}

impl Both {
    fn of(files: &[(String, String)]) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text)?;
        }
        let log = tempfile::NamedTempFile::new()?.into_temp_path().keep()?;
        let fed = IstiodFed::start(folder.path(), "127.0.0.1:0", None, log)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let registry = Registry::new();
        let (ours, told, refused) = runtime.block_on(async {
            let (ours, _) = mesh_sources::start(Origin::Folder(folder.path().to_path_buf()), view());
            let settings = istiod::Settings {
                control_plane: control_plane(fed.addr)?,
                node: istiod::node::of_environment(
                    istiod::node::Role::Ztunnel,
                    "node-1",
                    "Kubernetes",
                    [("POD_NAME".to_owned(), "ztunnel".to_owned())],
                ),
                missing_policy: MissingPolicy::Deny,
                demand: None,
                metrics: istiod::Metrics::new(&registry)?,
            };
            let (told, refused) = mesh_sources::start(Origin::Istiod(Box::new(settings)), view());
            let both = async { tokio::join!(ours.synced(), told.synced()) };
            tokio::time::timeout(SETTLES, both).await.context("both sides are read")?;
            anyhow::Ok((ours, told, refused))
        })?;
        Ok(Self { folder, _runtime: runtime, fed, ours, told, refused, registry })
    }

    /// Waits until `check` is content with how they differ, and stays so: neither side says that it is done.
    fn settle(&self, check: impl Fn(&[Found]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut before = Err(anyhow::anyhow!("never looked at"));
        let begun = Instant::now();
        loop {
            let now = check(&differences(&objects(&self.ours.load_full()), &objects(&self.told.load_full())));
            if now.is_ok() && before.is_ok() || begun.elapsed() > SETTLES {
                return now;
            }
            before = now;
            std::thread::sleep(Duration::from_millis(250));
        }
    }

    /// Refused nothing: what istiod says is all understood.
    fn nothing_refused(&self) -> anyhow::Result<()> {
        let refused: Vec<String> = self.refused.list().iter().map(|p| format!("{}: {}", p.origin.object, p.message)).collect();
        ensure!(refused.is_empty(), "refused (NACK): {refused:#?}");
        let metrics = self.registry.encode();
        let nacks = metrics.lines().filter(|line| line.starts_with("culvert_xds_refused_total{") && !line.ends_with(" 0"));
        ensure!(nacks.count() == 0, "refusals are counted");
        Ok(())
    }

    /// Writes a file of the folder anew, for both.
    fn rewrite(&mut self, name: &str, text: &str) -> anyhow::Result<()> {
        let before = self.ours.load().version();
        let next = self.folder.path().join("next");
        std::fs::write(&next, text)?;
        std::fs::rename(next, self.folder.path().join(name))?;
        self.fed.read_again()?;
        self.until("the folder to be read again", |both| both.ours.load().version() > before)
    }

    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        for _ in 0..SETTLES.as_millis() / 10 {
            if holds(self) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("waited in vain for {what}; istiod's log:\n{}", self.fed.log())
    }
}

pub fn control_plane(addr: SocketAddr) -> anyhow::Result<ControlPlane> {
    let settings = Settings {
        address: format!("http://{addr}"),
        roots: Roots::System,
        alt_hostname: None,
        token: Token::IfThere(PathBuf::from("/nonexistent")),
        headers: Vec::new(),
    };
    Ok(ControlPlane::new(settings, Arc::new(rustls::crypto::aws_lc_rs::default_provider()))?)
}

/// Every difference is listed, and every listed one is there.
fn check(mesh: &str, found: &[Found]) -> anyhow::Result<()> {
    let mut strange: Vec<&Found> = found.iter().collect();
    for known in DIFFERENCES.iter().filter(|known| known.meshes.contains(&mesh)) {
        ensure!(found.iter().any(known.is_it), "{mesh}: nothing shows any more: {}", known.reason);
        strange.retain(|found| !(known.is_it)(found));
    }
    ensure!(strange.is_empty(), "{mesh}: differs where nobody said so: {strange:#?}");
    Ok(())
}

fn mesh_of(name: &str) -> anyhow::Result<String> {
    let path = workspace_dir().join("tests/tests/e2e_istiod/meshes").join(format!("{name}.yaml"));
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// A mesh of ours is one and the same.
pub fn same(name: &str) -> anyhow::Result<()> {
    same_as(name, mesh_of(name)?)
}

/// All that PeerAuthentications can say.
pub fn peers() -> anyhow::Result<()> {
    for mode in [None, Some("UNSET"), Some("PERMISSIVE"), Some("STRICT")] {
        same_as(&format!("mesh-{}", peers::name(mode, &[])), peers::mesh(mode))?;
    }
    Ok(())
}

fn same_as(name: &str, yaml: String) -> anyhow::Result<()> {
    let both = Both::of(&[("mesh.yaml".into(), yaml)])?;
    both.settle(|found| check(name, found))?;
    both.nothing_refused()?;
    let told = both.told.load_full();
    ensure!(told.workloads().count() + told.services().count() > 2, "istiod told next to nothing");
    Ok(())
}

/// The example mesh.
pub fn example() -> anyhow::Result<()> {
    let both = Both::of(&files(&workspace_dir().join("manifests/examples/zamaz"))?)?;
    both.settle(|found| check("zamaz", found))?;
    both.nothing_refused()
}

fn files(folder: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ext| ext == "yaml") {
            all.push((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), std::fs::read_to_string(&path)?));
        }
    }
    Ok(all)
}

/// Changes, one after another, lead to the same mesh on both sides: objects that change, go, and come again.
pub fn changes() -> anyhow::Result<()> {
    let mesh = mesh_of("every-field")?;
    let mut both = Both::of(&[("mesh.yaml".into(), mesh.clone())])?;
    let without = |kind: &str| -> String {
        mesh.split("---\n").filter(|document| !document.contains(&format!("kind: {kind}\n"))).collect::<Vec<_>>().join("---\n")
    };
    let steps = [
        ("labels and a selector", mesh.replace("app: web, version: v2", "app: other, version: v3")),
        (
            "a mode",
            mesh.replace(
                "mtls: { mode: STRICT } }\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication",
                "mtls: { mode: PERMISSIVE } }\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication",
            ),
        ),
        ("no policies", without("AuthorizationPolicy")),
        ("no waypoint", without("Gateway").replace(", istio.io/use-waypoint: wp", "")),
        ("no services", without("Service")),
        ("no pods", without("Pod")),
        ("all again", mesh.clone()),
    ];
    for (what, text) in steps {
        ensure!(what == "all again" || text != mesh, "{what} changes nothing");
        both.rewrite("mesh.yaml", &text)?;
        let known = |found: &Found| DIFFERENCES.iter().any(|d| d.meshes.contains(&"every-field") && (d.is_it)(found));
        both.settle(|found| {
            let strange: Vec<&Found> = found.iter().filter(|found| !known(found)).collect();
            ensure!(strange.is_empty(), "after {what}: {strange:#?}");
            Ok(())
        })?;
    }
    both.nothing_refused()
}

fn allows(snapshot: &Snapshot, uid: &str, port: u16, identity: Option<&SpiffeId>) -> anyhow::Result<bool> {
    let workload = snapshot.find_workload(uid).with_context(|| format!("{uid} is not there"))?;
    let at = SocketAddr::from(([10, 1, 0, 99], port));
    let conn = InboundConn { client: at.into(), dst: at, identity };
    Ok(matches!(authorize(snapshot, workload, &conn).verdict, Verdict::Allow(_)))
}

/// istiod names conversions of PeerAuthentications that it does not make; CUSTOM and AUDIT policies it does not even name.
pub fn never_sent() -> anyhow::Result<()> {
    let both = Both::of(&[("mesh.yaml".into(), NEVER_SENT.to_owned())])?;
    let named = PolicyKey::new("t", "converted_peer_authentication_odd");
    // The agent gives a missing policy a second.
    both.until("the stand-in of what never came", |both| both.told.load().find_policy(&named).is_some())?;
    let metrics = both.registry.encode();
    ensure!(metrics.lines().any(|line| line == "culvert_xds_missing_policies 1"), "istiod sends it now: {metrics}");
    let told = both.told.load_full();
    let caller: SpiffeId = "spiffe://cluster.local/ns/t/sa/client".parse()?;
    for (uid, plaintext) in [("Kubernetes//Pod/t/odd", false), ("Kubernetes//Pod/t/custom", true)] {
        ensure!(allows(&told, uid, 8080, Some(&caller))?, "{uid} refuses callers of the mesh");
        ensure!(allows(&told, uid, 8080, None)? == plaintext, "{uid}, plaintext");
    }
    let custom = told.find_workload("Kubernetes//Pod/t/custom").context("it is there")?;
    ensure!(custom.policies.is_empty(), "istiod names {:?}", custom.policies);
    both.nothing_refused()
}

const NEVER_SENT: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Pod
metadata: { name: odd, namespace: t, labels: { app: odd } }
spec: { nodeName: node-1, containers: [] }
status: { phase: Running, podIP: 10.1.0.1, podIPs: [{ ip: 10.1.0.1 }], conditions: [{ type: Ready, status: "True" }] }
---
apiVersion: v1
kind: Pod
metadata: { name: custom, namespace: t, labels: { app: custom } }
spec: { nodeName: node-1, containers: [] }
status: { phase: Running, podIP: 10.1.0.2, podIPs: [{ ip: 10.1.0.2 }], conditions: [{ type: Ready, status: "True" }] }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: odd, namespace: t }
spec: { selector: { matchLabels: { app: odd } }, mtls: { mode: PERMISSIVE }, portLevelMtls: { "8080": { mode: STRICT } } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: custom, namespace: t }
spec: { selector: { matchLabels: { app: custom } }, mtls: { mode: PERMISSIVE } }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: asks, namespace: t }
spec: { selector: { matchLabels: { app: custom } }, action: CUSTOM, provider: { name: who }, rules: [{}] }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: audit, namespace: t }
spec: { selector: { matchLabels: { app: custom } }, action: AUDIT, rules: [{}] }
"#;
