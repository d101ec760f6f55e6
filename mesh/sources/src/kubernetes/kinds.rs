//! Which resources are watched for whom.
//!
//! Owns the table of kinds with the versions they are served in, and the scope of each process: an agent reads what decides
//! about connections of the whole cluster, a waypoint also routes and what requests meet, and Secrets and ConfigMaps of its
//! own namespace only. The rights a process needs are the same table (`manifests/`). Downstream: [`super::watch`].

use crate::dial::escaped;
use crate::translate::{Kind, MESH_CONFIG};

const ISTIO: &[&str] = &["v1", "v1beta1", "v1alpha3"];
const GATEWAY: &str = "gateway.networking.k8s.io";

/// A kind: its group, the versions that are understood with the best first, and its name in paths.
type Row = (Kind, &'static str, &'static [&'static str], &'static str);

/// What everybody needs.
const LAYER4: &[Row] = &[
    (Kind::Namespace, "", &["v1"], "namespaces"),
    (Kind::Node, "", &["v1"], "nodes"),
    (Kind::Pod, "", &["v1"], "pods"),
    (Kind::Service, "", &["v1"], "services"),
    (Kind::EndpointSlice, "discovery.k8s.io", &["v1"], "endpointslices"),
    (Kind::ServiceEntry, "networking.istio.io", ISTIO, "serviceentries"),
    (Kind::WorkloadEntry, "networking.istio.io", ISTIO, "workloadentries"),
    (Kind::AuthorizationPolicy, "security.istio.io", &["v1", "v1beta1"], "authorizationpolicies"),
    (Kind::PeerAuthentication, "security.istio.io", &["v1", "v1beta1"], "peerauthentications"),
    (Kind::Gateway, GATEWAY, &["v1", "v1beta1"], "gateways"),
    (Kind::GatewayClass, GATEWAY, &["v1", "v1beta1"], "gatewayclasses"),
];
/// What a waypoint or gateway needs beside it.
const LAYER7: &[Row] = &[
    (Kind::VirtualService, "networking.istio.io", ISTIO, "virtualservices"),
    (Kind::DestinationRule, "networking.istio.io", ISTIO, "destinationrules"),
    (Kind::EnvoyFilter, "networking.istio.io", &["v1alpha3"], "envoyfilters"),
    (Kind::RequestAuthentication, "security.istio.io", &["v1", "v1beta1"], "requestauthentications"),
    (Kind::Telemetry, "telemetry.istio.io", &["v1", "v1alpha1"], "telemetries"),
    (Kind::HttpRoute, GATEWAY, &["v1", "v1beta1"], "httproutes"),
    (Kind::GrpcRoute, GATEWAY, &["v1", "v1alpha2"], "grpcroutes"),
    (Kind::TcpRoute, GATEWAY, &["v1", "v1alpha2"], "tcproutes"),
    (Kind::TlsRoute, GATEWAY, &["v1", "v1alpha3", "v1alpha2"], "tlsroutes"),
    (Kind::BackendTlsPolicy, GATEWAY, &["v1", "v1alpha3"], "backendtlspolicies"),
    (Kind::BackendTrafficPolicy, "gateway.networking.x-k8s.io", &["v1alpha1"], "xbackendtrafficpolicies"),
    (Kind::ReferenceGrant, GATEWAY, &["v1", "v1beta1"], "referencegrants"),
    (Kind::TrafficPolicy, "culvert.dev", &["v1alpha1"], "trafficpolicies"),
];
const SECRETS: Row = (Kind::Secret, "", &["v1"], "secrets");
const CONFIG_MAPS: Row = (Kind::ConfigMap, "", &["v1"], "configmaps");

/// For whom a cluster is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// A node's agent.
    Agent,
    /// A waypoint or gateway.
    Waypoint {
        /// Its own namespace: the only one whose Secrets and ConfigMaps it reads, but for MeshConfig.
        namespace: String,
    },
}

/// One list and watch.
#[derive(Clone, Debug)]
pub struct Watch {
    /// What it brings.
    pub kind: Kind,
    /// API group.
    pub group: &'static str,
    /// Versions, best first.
    pub versions: &'static [&'static str],
    /// Resource.
    pub plural: &'static str,
    /// The one namespace; all when absent.
    pub namespace: Option<String>,
    /// Field selector; everything when absent.
    pub fields: Option<String>,
}
impl Watch {
    fn everywhere(&(kind, group, versions, plural): &Row) -> Self {
        Self { kind, group, versions, plural, namespace: None, fields: None }
    }
    fn within(row: &Row, namespace: &str) -> Self {
        Self { namespace: Some(namespace.to_owned()), ..Self::everywhere(row) }
    }

    /// `apiVersion` of its objects in one version.
    pub fn api_version(&self, version: &str) -> String {
        if self.group.is_empty() { version.to_owned() } else { format!("{}/{version}", self.group) }
    }
    /// Path and query of a request about it in one version.
    pub fn path(&self, version: &str, query: &str) -> String {
        let root = if self.group.is_empty() { "api" } else { "apis" };
        let within = self.namespace.as_ref().map(|ns| format!("namespaces/{ns}/")).unwrap_or_default();
        let only = self.fields.as_ref().map(|fields| format!("&fieldSelector={}", escaped(fields))).unwrap_or_default();
        format!("/{root}/{}/{within}{}?{query}{only}", self.api_version(version), self.plural)
    }
    /// For messages and metrics: `pods`, `secrets in shop`.
    pub fn label(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{} in {namespace}", self.plural),
            None => self.plural.to_owned(),
        }
    }
    /// Whether not knowing any of it may let something through that would have been refused: policies, and the labels of
    /// namespaces, which say what goes through a waypoint.
    pub fn closes(&self) -> bool {
        self.kind.is_security() || self.kind == Kind::Namespace
    }
    /// Whether an address that nobody knows may be of one of its objects.
    pub fn has_addresses(&self) -> bool {
        ADDRESSED.contains(&self.kind)
    }
}

/// Kinds whose objects have addresses of the mesh and say, by labels, through which waypoint these are reached.
const ADDRESSED: [Kind; 4] = [Kind::Service, Kind::ServiceEntry, Kind::Pod, Kind::WorkloadEntry];

/// What a control plane tells by other means, so that nobody looks at it where one does.
const TOLD: [Kind; 3] = [Kind::Node, Kind::EndpointSlice, Kind::PeerAuthentication];

/// All watches of a process; `told`: beside a control plane.
pub fn watches(reach: &Reach, root_namespace: &str, told: bool) -> Vec<Watch> {
    let needed = LAYER4.iter().filter(|(kind, ..)| !told || !TOLD.contains(kind));
    let mut all: Vec<Watch> = needed.map(Watch::everywhere).collect();
    if let Reach::Waypoint { namespace } = reach {
        all.extend(LAYER7.iter().map(Watch::everywhere));
        all.push(Watch::within(&SECRETS, namespace));
        all.push(Watch::within(&CONFIG_MAPS, namespace));
        if namespace != root_namespace {
            all.push(Watch {
                fields: Some(format!("metadata.name={MESH_CONFIG}")),
                ..Watch::within(&CONFIG_MAPS, root_namespace)
            });
        }
    }
    all
}

/// What tells which pods of a node are enrolled.
pub fn of_node(node: &str) -> Vec<Watch> {
    let rows = LAYER4.iter().filter(|row| matches!(row.0, Kind::Namespace | Kind::Pod));
    rows.map(|row| {
        let fields = (row.0 == Kind::Pod).then(|| format!("spec.nodeName={node}"));
        Watch { fields, ..Watch::everywhere(row) }
    })
    .collect()
}
