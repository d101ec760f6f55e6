//! What describes the mesh to this process, and who issues its certificate; read once at start.
use crate::settings::Settings;
use anyhow::{Context, Result, bail};
use mesh_identity::crypto::TlsSettings;
use mesh_identity::spire::{self, Api};
use mesh_identity::{Authority, IdentitySource, SourceSettings};
use mesh_model::snapshot::Viewpoint;
use mesh_runtime::control_plane::{self, ControlPlane, Roots};
use mesh_runtime::metrics::Registry;
use mesh_sources::istiod::node::{self, Role};
use mesh_sources::istiod::{self, MissingPolicy};
use mesh_sources::{Origin, consul, kubernetes};
use std::path::Path;
use std::sync::Arc;

/// Where Istio's proxies find the Workload API.
const ISTIO_SOCKET: &str = "/var/run/secrets/workload-spiffe-uds/socket";

/// Set, and not to nothing.
fn some(value: Option<&String>) -> Option<&str> {
    value.map(String::as_str).filter(|value| !value.is_empty())
}

/// What describes the mesh.
pub(crate) fn origin(s: &Settings, registry: &Registry) -> Result<Origin> {
    let said = s.mesh_dir.is_some() || s.kubernetes || some(s.control.xds_address.as_ref()).is_some();
    if s.consul.consul.is_some() && said {
        bail!("--consul excludes --mesh-dir, --kubernetes and XDS_ADDRESS: one of them describes the mesh");
    }
    if s.consul.consul.is_some() || (!said && s.consul.is_there()) {
        let metrics = consul::Metrics::default();
        metrics.expose(registry)?;
        return Ok(Origin::Consul(Box::new(s.consul.scope(metrics).map_err(anyhow::Error::msg)?)));
    }
    if let Some(dir) = &s.mesh_dir {
        return Ok(Origin::Folder(dir.clone()));
    }
    let istiod = some(s.control.xds_address.as_ref()).map(|address| under_istiod(s, address, registry)).transpose()?;
    if !s.kubernetes && istiod.is_none() {
        bail!("nothing describes the mesh: set --mesh-dir (CULVERT_MESH_DIR), --kubernetes, --consul or XDS_ADDRESS");
    }
    let watches = kubernetes::Watches::default();
    watches.expose(registry)?;
    let access = kubernetes::Access { kubeconfig: s.kubeconfig.clone() };
    let reach = kubernetes::Reach::Waypoint { namespace: s.namespace.clone() };
    let objects = Box::new(kubernetes::Scope { access, reach, retry: kubernetes::Retry::default(), watches });
    Ok(match istiod {
        Some(istiod) => Origin::IstiodAndKubernetes(Box::new(istiod), objects),
        None => Origin::Kubernetes(objects),
    })
}

fn under_istiod(s: &Settings, address: &str, registry: &Registry) -> Result<istiod::Settings> {
    let c = &s.control;
    Ok(istiod::Settings {
        control_plane: reach(s, address, &c.xds_root_ca, c.alt_xds_hostname.as_ref(), "XDS_HEADER_")?,
        node: node::of_environment(Role::Waypoint, &s.node, &s.cluster_id, mesh_runtime::settings::variables()),
        // Policies of layer 4 bind the endpoints' agents; here they only explain.
        missing_policy: MissingPolicy::Deny,
        demand: None,
        metrics: istiod::Metrics::new(registry)?,
    })
}

/// Who issues our certificate.
pub(crate) fn authority(s: &Settings, view: &Viewpoint) -> Result<Arc<dyn IdentitySource>> {
    let c = &s.control;
    let istio = || Path::new(ISTIO_SOCKET).exists().then(|| format!("unix://{ISTIO_SOCKET}"));
    let socket = s.spiffe_socket.clone().or_else(istio).filter(|socket| !socket.is_empty());
    // Who tells a part of the mesh issues the certificate, unless somebody else is named.
    let address = some(c.ca_address.as_ref().or(c.xds_address.as_ref()));
    let (authority, which) = match (&s.certificate_dir, socket, address) {
        (Some(dir), ..) => (Authority::Mounted(dir.clone()), format!("the certificate in {}", dir.display())),
        (None, Some(socket), _) => {
            let agent = spire::reach(&socket, &s.compliance.into()).context("SPIFFE_ENDPOINT_SOCKET")?;
            (Authority::Spire(Api::Workload, agent), format!("certificates from SPIRE at {socket}"))
        }
        (None, None, Some(address)) => {
            let control_plane = reach(s, address, &c.ca_root_ca, c.alt_ca_hostname.as_ref(), "CA_HEADER_")?;
            (Authority::Istio(control_plane), format!("certificates from {address}"))
        }
        (None, None, None) => (Authority::Development(s.ca_dir.clone()), format!("development CA in {}", s.ca_dir.display())),
    };
    authority.open(SourceSettings::of(view, s.secret_ttl).with_unknown(s.crl_unknown)).context(which)
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
    let crypto = TlsSettings::from(s.compliance).crypto()?;
    ControlPlane::new(settings, crypto).with_context(|| format!("control plane {address}"))
}
