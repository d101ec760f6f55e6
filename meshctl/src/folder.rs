//! A folder of objects as a mesh: read once, by the readers the proxies use.
//!
//! Upstream: `mesh-sources`. Downstream: `why`, `analyze`.
use anyhow::{Context, Result, bail};
use clap::Args;
use mesh_model::snapshot::{MissingWaypoint, Viewpoint};
use mesh_model::{Network, Snapshot, TrustDomain};
use mesh_sources::Problem;
use mesh_sources::files::Folder;
use mesh_sources::translate::Settings;
use std::path::Path;

/// From where the mesh is looked at: what the proxies are started with. Names of the variables are theirs.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "The mesh (as the proxies are started)")]
pub struct View {
    /// Trust domain.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Other names of the same trust domain, separated by commas.
    #[arg(long, env = "CULVERT_TRUST_DOMAIN_ALIASES", value_delimiter = ',')]
    pub trust_domain_aliases: Vec<String>,
    /// DNS domain of Kubernetes services.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Cluster.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Istio's root namespace.
    #[arg(long, env = "CULVERT_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// Network.
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// What agents do with traffic whose declared waypoint is missing: `refuse`, or `direct` around it.
    #[arg(long, env = "CULVERT_ON_MISSING_WAYPOINT", default_value = "refuse")]
    pub on_missing_waypoint: MissingWaypoint,
}
impl View {
    /// As a viewpoint of nobody's node.
    pub fn viewpoint(&self) -> Result<Viewpoint> {
        let domain = |d: &String| TrustDomain::parse(d).with_context(|| format!("trust domain {d:?}"));
        Ok(Viewpoint {
            network: Network::from(self.network.as_str()),
            cluster: self.cluster_id.as_str().into(),
            cluster_domain: self.cluster_domain.as_str().into(),
            root_namespace: self.root_namespace.as_str().into(),
            trust_domain: domain(&self.trust_domain)?,
            trust_domain_aliases: self.trust_domain_aliases.iter().map(domain).collect::<Result<_>>()?,
            missing_waypoint: self.on_missing_waypoint,
            ..Viewpoint::default()
        })
    }
}

/// A folder that has been read.
pub struct Loaded {
    /// The mesh it describes.
    pub mesh: Snapshot,
    /// What its readers complain about.
    pub problems: Vec<Problem>,
}

/// Reads a folder.
pub fn load(root: &Path, view: Viewpoint) -> Result<Loaded> {
    let settings = Settings { layer7: true, ..Settings::default() };
    let mut folder = Folder::new(root, view.clone(), &settings);
    let Some(changes) = folder.reload() else {
        let why: Vec<String> = folder.problems().iter().map(|p| p.message.to_string()).collect();
        bail!("{}: {}", root.display(), why.join("; "));
    };
    Ok(Loaded { mesh: Snapshot::empty(view).apply(&changes), problems: folder.problems().to_vec() })
}
