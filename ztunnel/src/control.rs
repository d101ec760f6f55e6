//! Which control plane describes the mesh, and which authority issues its certificates: istio/ztunnel's own variables
//! (node-agent §1.16), read once at start.
use crate::settings::{Missing, Settings};
use anyhow::{Context, Result, bail};
use mesh_identity::crypto::TlsSettings;
use mesh_identity::spire::{self, Api};
use mesh_identity::{Authority, IdentityError, IdentitySource, SourceSettings};
use mesh_runtime::control_plane::{self, ControlPlane, Roots};
use mesh_runtime::metrics::Registry;
use mesh_sources::demand::{Demand, Limits};
use mesh_sources::istiod::node::Role;
use mesh_sources::istiod::{self, MissingPolicy};
use mesh_sources::{Origin, Viewpoint, consul, kubernetes};
use std::sync::Arc;

/// istiod's address in its own cluster.
const ISTIOD: &str = "https://istiod.istio-system.svc:15012";

/// Set, and not to nothing.
fn some(value: Option<&String>) -> Option<&str> {
    value.map(String::as_str).filter(|value| !value.is_empty())
}

/// How the API server is reached.
pub fn access(s: &Settings) -> kubernetes::Access {
    kubernetes::Access { kubeconfig: s.kubeconfig.clone() }
}

/// What describes the mesh.
pub fn origin(s: &Settings, registry: &Registry) -> Result<Origin> {
    let text = std::env::var("LOCAL_XDS").ok();
    let xds = some(s.control.xds_address.as_ref());
    let said: Vec<&str> = [
        s.mesh_dir.as_ref().map(|_| "--mesh-dir"),
        s.local_xds_path.as_ref().map(|_| "LOCAL_XDS_PATH"),
        text.as_ref().map(|_| "LOCAL_XDS"),
        s.kubernetes.then_some("--kubernetes"),
        xds.map(|_| "XDS_ADDRESS"),
        s.consul.consul.as_ref().map(|_| "--consul"),
    ]
    .into_iter()
    .flatten()
    .collect();
    if said.len() > 1 {
        bail!("{} exclude each other: one of them describes the mesh", said.join(" and "));
    }
    if s.consul.consul.is_some() || (said.is_empty() && s.consul.is_there()) {
        let metrics = consul::Metrics::default();
        metrics.expose(registry)?;
        return Ok(Origin::Consul(Box::new(s.consul.scope(metrics).map_err(anyhow::Error::msg)?)));
    }
    if s.kubernetes {
        let watches = kubernetes::Watches::default();
        watches.expose(registry)?;
        let scope = kubernetes::Scope {
            access: access(s),
            reach: kubernetes::Reach::Agent,
            retry: kubernetes::Retry::default(),
            watches,
        };
        return Ok(Origin::Kubernetes(Box::new(scope)));
    }
    if let Some(dir) = &s.mesh_dir {
        return Ok(Origin::Folder(dir.clone()));
    }
    if let Some(file) = &s.local_xds_path {
        return Ok(Origin::LocalXds(file.clone()));
    }
    if let Some(text) = text {
        return Ok(Origin::LocalXdsText(text));
    }
    let Some(address) = xds.or(in_kubernetes()) else {
        bail!(
            "nothing describes the mesh: set --mesh-dir (CULVERT_MESH_DIR), --kubernetes, --consul, LOCAL_XDS_PATH, LOCAL_XDS or XDS_ADDRESS"
        )
    };
    let c = &s.control;
    let control_plane = reach(s, address, &c.xds_root_ca, c.alt_xds_hostname.as_ref(), "XDS_HEADER_")?;
    Ok(Origin::Istiod(Box::new(istiod::Settings {
        control_plane,
        node: istiod::node::of_environment(Role::Ztunnel, &s.node, &s.cluster_id, mesh_runtime::settings::variables()),
        missing_policy: match c.missing_policy {
            Missing::Deny => MissingPolicy::Deny,
            Missing::Ignore => MissingPolicy::Ignore,
        },
        demand: c.xds_on_demand.then(|| Demand::new(Limits::default())),
        metrics: istiod::Metrics::new(registry)?,
    })))
}

/// Who issues certificates.
pub fn authority(s: &Settings, view: &Viewpoint, origin: &Origin) -> Result<Arc<dyn IdentitySource>> {
    let c = &s.control;
    // Who describes the mesh issues its certificates, unless somebody else is named.
    let same = match origin {
        Origin::Istiod(istiod) => Some(istiod.control_plane.address()),
        _ => None,
    };
    let address = if c.ca_address.is_some() { some(c.ca_address.as_ref()) } else { same };
    let spire = some(c.spire_admin_socket.as_ref());
    let (authority, which) = match (spire, address) {
        (Some(socket), _) => {
            let agent = spire::reach(socket, &s.compliance.into()).context("CULVERT_SPIRE_ADMIN_SOCKET")?;
            (Authority::Spire(Api::Delegated, agent), format!("certificates from SPIRE at {socket}"))
        }
        (None, Some(address)) => {
            let control_plane = reach(s, address, &c.ca_root_ca, c.alt_ca_hostname.as_ref(), "CA_HEADER_")?;
            (Authority::Istio(control_plane), format!("certificates from {address}"))
        }
        (None, None) => (Authority::Development(s.ca_dir.clone()), format!("development CA in {}", s.ca_dir.display())),
    };
    authority.open(SourceSettings::of(view, s.secret_ttl).with_unknown(s.crl_unknown)).context(which)
}

fn in_kubernetes() -> Option<&'static str> {
    std::env::var_os("KUBERNETES_SERVICE_HOST").map(|_| ISTIOD)
}

fn reach(s: &Settings, address: &str, roots: &Roots, alt: Option<&String>, prefix: &str) -> Result<ControlPlane> {
    let token = s.control.auth_token.as_ref();
    let settings = control_plane::Settings::of_istiod(
        address,
        roots,
        alt,
        token,
        &s.cluster_id,
        (prefix, mesh_runtime::settings::variables()),
    );
    let crypto = TlsSettings::from(s.compliance).crypto().map_err(|e: IdentityError| anyhow::anyhow!("{e}"))?;
    ControlPlane::new(settings, crypto).with_context(|| format!("control plane {address}"))
}
