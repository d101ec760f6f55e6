//! The source over a control plane, and the objects the tests tell.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_model::policy::PolicyKey;
use mesh_model::service::ServiceKey;
use mesh_proto::istio::security::{self, Authorization, Group};
use mesh_proto::istio::workload::{NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload};
use mesh_runtime::control_plane::{ControlPlane, Roots, Settings, Token};
use mesh_runtime::metrics::Registry;
use mesh_sources::demand::Demand;
use mesh_sources::istiod::{self, MissingPolicy};
use mesh_sources::{Diagnostics, Mesh, Origin, Viewpoint};
use mesh_tests::istiod::Istiod;
use tempfile::TempDir;

pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// The source, started.
pub(crate) struct Fixture {
    pub(crate) istiod: Istiod,
    pub(crate) mesh: Mesh,
    pub(crate) diagnostics: Diagnostics,
    pub(crate) registry: Registry,
    pub(crate) files: TempDir,
}

/// What a test wants otherwise.
#[derive(Default)]
pub(crate) struct Wish {
    pub(crate) missing: MissingPolicy,
    pub(crate) foreign_roots: bool,
    pub(crate) demand: Option<Demand>,
}

impl Fixture {
    pub(crate) fn over(istiod: Istiod) -> Self {
        Self::with(istiod, Wish::default())
    }
    pub(crate) fn with(istiod: Istiod, wish: Wish) -> Self {
        let files = tempfile::tempdir().unwrap();
        let foreign = Istiod::local().unwrap();
        std::fs::write(files.path().join("root.pem"), if wish.foreign_roots { foreign.root() } else { istiod.root() }).unwrap();
        std::fs::write(files.path().join("token"), "first\n").unwrap();
        let (registry, view) = (Registry::new(), view());
        let settings = istiod::Settings {
            control_plane: control_plane(&istiod, &files),
            node: istiod::node::of_environment(
                istiod::node::Role::Ztunnel,
                "node-1",
                "c1",
                [("POD_NAME".to_owned(), "zt".to_owned())],
            ),
            missing_policy: wish.missing,
            demand: wish.demand,
            metrics: istiod::Metrics::new(&registry).unwrap(),
        };
        let (mesh, diagnostics) = mesh_sources::start(Origin::Istiod(Box::new(settings)), view);
        Self { istiod, mesh, diagnostics, registry, files }
    }
    /// Waits until the mesh is there and the control plane has heard what the source thinks of the first response of each type,
    /// so that what a test counts from here on is of its own changes.
    pub(crate) async fn synced(self) -> Self {
        tokio::time::timeout(PATIENCE, self.mesh.synced()).await.expect("the source comes into sync");
        let heard = || {
            let seen = self.istiod.seen();
            seen.acks + seen.nacks.len() >= 2
        };
        until("the first responses to be answered", heard).await;
        self
    }
    pub(crate) fn metric(&self, line: &str) -> bool {
        self.registry.encode().lines().any(|found| found == line)
    }
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }
    pub(crate) fn has_workload(&self, uid: &str) -> bool {
        self.mesh.load().find_workload(uid).is_some()
    }
    pub(crate) fn has_service(&self, host: &str) -> bool {
        self.mesh.load().find_service(&ServiceKey::new("ns", host)).is_some()
    }
    pub(crate) fn has_policy(&self, name: &str) -> bool {
        self.mesh.load().find_policy(&PolicyKey::new("ns", name)).is_some()
    }
}

pub(crate) fn view() -> Viewpoint {
    Viewpoint { node: "node-1".into(), ..Viewpoint::default() }
}

pub(crate) fn control_plane(istiod: &Istiod, files: &TempDir) -> ControlPlane {
    let settings = Settings {
        address: format!("https://localhost:{}", istiod.addr().unwrap().port()),
        roots: Roots::File(files.path().join("root.pem")),
        alt_hostname: None,
        token: Token::File(files.path().join("token")),
        headers: vec![("clusterid".into(), "c1".into())],
    };
    ControlPlane::new(settings, Arc::new(rustls::crypto::aws_lc_rs::default_provider())).unwrap()
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn workload(name: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/ns/{name}"),
        name: name.into(),
        namespace: "ns".into(),
        addresses: vec![Bytes::copy_from_slice(&[10, 0, 0, name.bytes().fold(1, |a, b| a ^ b)])],
        tunnel_protocol: TunnelProtocol::Hbone as i32,
        node: "node-1".into(),
        services: [(
            "ns/web.ns.svc.cluster.local".to_owned(),
            PortList { ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }] },
        )]
        .into(),
        ..Workload::default()
    }
}
pub(crate) fn service(host: &str) -> Service {
    Service {
        name: host.split('.').next().unwrap_or_default().into(),
        namespace: "ns".into(),
        hostname: host.into(),
        addresses: vec![NetworkAddress { network: String::new(), address: Bytes::from_static(&[10, 96, 0, 1]), length: None }],
        ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        ..Service::default()
    }
}
/// Matches everything.
pub(crate) fn policy(name: &str, scope: security::Scope, action: security::Action) -> Authorization {
    Authorization {
        name: name.into(),
        namespace: "ns".into(),
        scope: scope as i32,
        action: action as i32,
        groups: vec![Group::default()],
        ..Authorization::default()
    }
}
