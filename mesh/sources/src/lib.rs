//! Where mesh knowledge comes from: a folder of YAML, the Kubernetes API, Consul or istiod; every source ends in changes for
//! one publisher.
//!
//! The flow is `source → translate → ChangeSink → publisher → Mesh`. A source owns what it reads and what was last good
//! of it; the translator owns the join of objects; the publisher is the only writer of the mesh. What a source refuses
//! is in [`Diagnostics`]. Another source is another [`Source`] and nothing else.
#![forbid(unsafe_code)]

pub mod consul;
pub mod demand;
pub mod diagnostics;
mod dial;
pub mod files;
pub mod istiod;
pub mod kubernetes;
pub mod local_xds;
pub mod publisher;
pub mod translate;
pub mod yaml;

use std::future::Future;
use std::path::PathBuf;

pub use diagnostics::{Diagnostics, Problem, Severity};
pub use mesh_model::snapshot::Viewpoint;
pub use publisher::{ChangeSink, Mesh, Publisher};

/// Something that knows about the mesh and tells its changes.
pub trait Source: Send + 'static {
    /// Name for logs.
    fn name(&self) -> &'static str;
    /// Tells changes until the sink closes. The first send means "this is all I knew at start"; it is sent even when
    /// it is empty, and not before the source has something it can stand for.
    fn run(self, sink: ChangeSink) -> impl Future<Output = Result<(), SourceError>> + Send;
}

/// Why a source ended.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No thread could be started.
    #[error("no thread: {0}")]
    Thread(#[from] std::io::Error),
    /// Nothing to reach the API server with.
    #[error("no access to the Kubernetes API: {0}")]
    Access(String),
    /// Nothing to reach Consul with.
    #[error("no access to Consul: {0}")]
    Consul(String),
    /// Its thread died; the mesh stays as it was.
    #[error("the source's thread died (a defect); the mesh stays as it last was")]
    Died,
}

/// Which source describes the mesh.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A folder of Kubernetes, Istio and Gateway API objects.
    Folder(PathBuf),
    /// A file in ztunnel's local format (`LOCAL_XDS_PATH`).
    LocalXds(PathBuf),
    /// The same format as text (`LOCAL_XDS`).
    LocalXdsText(String),
    /// The objects of a cluster, by its API.
    Kubernetes(Box<kubernetes::Scope>),
    /// Consul's catalog, and objects in its key-value store.
    Consul(Box<consul::Scope>),
    /// istiod, over delta ADS.
    Istiod(Box<istiod::Settings>),
    /// Services, workloads and policies of layer 4 from istiod, everything else from the objects of a cluster.
    IstiodAndKubernetes(Box<istiod::Settings>, Box<kubernetes::Scope>),
}

/// Starts the source and the publisher on the current tokio runtime, which must be the control runtime. Nothing has
/// been read when this returns: wait for [`Mesh::synced`].
pub fn start(origin: Origin, view: Viewpoint) -> (Mesh, Diagnostics) {
    start_with(origin, view, &translate::Settings::default())
}

/// [`start`] with settings of the translation.
pub fn start_with(origin: Origin, view: Viewpoint, settings: &translate::Settings) -> (Mesh, Diagnostics) {
    let diagnostics = Diagnostics::new();
    let (mesh, publisher, sinks) = publisher::channel(view.clone(), 1);
    let mesh = match &origin {
        Origin::Istiod(settings) => mesh.on_demand(settings.demand.clone()),
        _ => mesh,
    };
    for sink in sinks {
        let diagnostics = diagnostics.clone();
        match &origin {
            Origin::Folder(root) => spawn(
                files::FolderSource { root: root.clone(), view: view.clone(), settings: settings.clone(), diagnostics },
                sink,
            ),
            Origin::LocalXds(path) => spawn(
                local_xds::LocalXdsSource { from: local_xds::From::File(path.clone()), view: view.clone(), diagnostics },
                sink,
            ),
            Origin::Istiod(settings) => {
                spawn(istiod::IstiodSource { settings: (**settings).clone(), view: view.clone(), diagnostics }, sink);
            }
            Origin::LocalXdsText(text) => spawn(
                local_xds::LocalXdsSource { from: local_xds::From::Text(text.clone()), view: view.clone(), diagnostics },
                sink,
            ),
            Origin::Kubernetes(scope) => spawn(
                kubernetes::KubernetesSource {
                    scope: (**scope).clone(),
                    view: view.clone(),
                    settings: settings.clone(),
                    diagnostics,
                    told: None,
                },
                sink,
            ),
            Origin::Consul(scope) => spawn(
                consul::ConsulSource { scope: (**scope).clone(), view: view.clone(), settings: settings.clone(), diagnostics },
                sink,
            ),
            Origin::IstiodAndKubernetes(istiod, scope) => {
                let (to_join, told) = publisher::relay();
                let of_istiod = diagnostics.of_source("istiod");
                let istiod = istiod::IstiodSource { settings: (**istiod).clone(), view: view.clone(), diagnostics: of_istiod };
                spawn(istiod, to_join);
                let objects = kubernetes::KubernetesSource {
                    scope: (**scope).clone(),
                    view: view.clone(),
                    settings: translate::Settings { told: true, ..settings.clone() },
                    diagnostics: diagnostics.of_source("kubernetes"),
                    told: Some(told),
                };
                spawn(objects, sink);
            }
        }
    }
    tokio::spawn(publisher.run());
    (mesh, diagnostics)
}

fn spawn(source: impl Source, sink: ChangeSink) {
    let name = source.name();
    tokio::spawn(async move {
        if let Err(error) = source.run(sink).await {
            tracing::error!(source = name, %error, "a source ended");
        }
    });
}
