//! Kubernetes, Istio and Gateway API objects, reduced to the fields the agent uses.
//!
//! Owns the reading of one object from its tree. Core objects may carry any other field (`kubectl get -o yaml` shows
//! many); security objects may not: what we do not understand there, we refuse. Reading never looks at other objects,
//! so it may run anywhere; everything that joins objects is in [`super`].

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::policy::Policy;
use mesh_model::service::{AppProtocol, IpFamilies};
use mesh_model::workload::Locality;

use super::destination_rule::{self, DestinationRule};
use super::gateway_api::{self, EdgeListener, GatewayApiObject};
use super::intern::{Interner, Labels};
use super::pem::{self, PemEntries};
use super::read::{self, Bad, Read};
use super::targets::{TargetedAuth, TargetedPolicy};
use super::telemetry::{self, MeshConfig, Telemetry};
use super::traffic_policy::{self, TrafficPolicy};
use super::virtual_service::{self, VirtualService};
use super::{authorization, envoy_filter, istio, kube, peer, request_auth};
use crate::diagnostics::{Problem, Severity};
use crate::yaml::{Node, Value};

/// Kinds the agent uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// core/v1 Namespace.
    Namespace,
    /// core/v1 Node.
    Node,
    /// Gateway API GatewayClass.
    GatewayClass,
    /// Gateway API Gateway.
    Gateway,
    /// core/v1 Service.
    Service,
    /// networking.istio.io ServiceEntry.
    ServiceEntry,
    /// security.istio.io PeerAuthentication.
    PeerAuthentication,
    /// security.istio.io AuthorizationPolicy.
    AuthorizationPolicy,
    /// discovery.k8s.io EndpointSlice.
    EndpointSlice,
    /// networking.istio.io WorkloadEntry.
    WorkloadEntry,
    /// core/v1 Pod.
    Pod,
    /// networking.istio.io VirtualService (layer 7 only, as all below).
    VirtualService,
    /// networking.istio.io DestinationRule.
    DestinationRule,
    /// Gateway API HTTPRoute.
    HttpRoute,
    /// Gateway API GRPCRoute.
    GrpcRoute,
    /// Gateway API TCPRoute.
    TcpRoute,
    /// Gateway API TLSRoute.
    TlsRoute,
    /// Gateway API BackendTLSPolicy.
    BackendTlsPolicy,
    /// Gateway API XBackendTrafficPolicy.
    BackendTrafficPolicy,
    /// Gateway API ReferenceGrant.
    ReferenceGrant,
    /// culvert.dev TrafficPolicy.
    TrafficPolicy,
    /// networking.istio.io EnvoyFilter, as far as a TrafficPolicy could say the same.
    EnvoyFilter,
    /// core/v1 Secret.
    Secret,
    /// core/v1 ConfigMap.
    ConfigMap,
    /// security.istio.io RequestAuthentication.
    RequestAuthentication,
    /// telemetry.istio.io Telemetry.
    Telemetry,
    /// A security document that could not be read at all.
    Unreadable,
}
impl Kind {
    /// Name as in `kind:`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::GatewayClass => "GatewayClass",
            Self::Gateway => "Gateway",
            Self::Service => "Service",
            Self::ServiceEntry => "ServiceEntry",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::EndpointSlice => "EndpointSlice",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::Pod => "Pod",
            Self::VirtualService => "VirtualService",
            Self::DestinationRule => "DestinationRule",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::TcpRoute => "TCPRoute",
            Self::TlsRoute => "TLSRoute",
            Self::BackendTlsPolicy => "BackendTLSPolicy",
            Self::BackendTrafficPolicy => "XBackendTrafficPolicy",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::EnvoyFilter => "EnvoyFilter",
            Self::Secret => "Secret",
            Self::ConfigMap => "ConfigMap",
            Self::RequestAuthentication => "RequestAuthentication",
            Self::Telemetry => "Telemetry",
            Self::Unreadable => "Unreadable",
        }
    }
    fn cluster_scoped(self) -> bool {
        matches!(self, Self::Namespace | Self::Node | Self::GatewayClass)
    }
    /// Whether losing the object may let something through that it would have refused.
    pub fn is_security(self) -> bool {
        matches!(self, Self::AuthorizationPolicy | Self::PeerAuthentication | Self::RequestAuthentication | Self::Unreadable)
    }
}

/// Identity of an object; the namespace is empty for cluster-scoped kinds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId {
    /// Kind.
    pub kind: Kind,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}
impl std::fmt::Display for ObjectId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&object_name(self.kind.as_str(), &self.namespace, &self.name))
    }
}
/// `Kind namespace/name`.
fn object_name(kind: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") }
}

/// One object as read.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Identity.
    pub id: ObjectId,
    /// Where it was written.
    pub origin: Arc<Origin>,
    /// Content.
    pub body: Body,
}
impl Object {
    /// Whether it only stands for an object that could not be read, and closes what that was about.
    pub fn is_stand_in(&self) -> bool {
        match &self.body {
            Body::VirtualService(v) => v.broken.is_some(),
            Body::DestinationRule(d) => d.broken.is_some(),
            Body::GatewayApi(g) => g.is_stand_in(),
            Body::Traffic(t) => t.treatment.broken.is_some(),
            _ => false,
        }
    }
}
/// Content of an [`Object`].
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each variant carries the struct of its own name")]
pub enum Body {
    Namespace(Namespace),
    Node(Locality),
    GatewayClass(GatewayClass),
    Gateway(Box<Gateway>),
    Service(Box<KubeService>),
    ServiceEntry(Box<ServiceEntry>),
    PeerAuthentication(PeerAuthentication),
    AuthorizationPolicy(AuthorizationPolicy),
    EndpointSlice(EndpointSlice),
    WorkloadEntry(Box<WorkloadEntry>),
    Pod(Pod),
    VirtualService(Box<VirtualService>),
    DestinationRule(Box<DestinationRule>),
    /// Routes, BackendTLSPolicies, XBackendTrafficPolicies and ReferenceGrants.
    GatewayApi(Box<GatewayApiObject>),
    /// A TrafficPolicy or EnvoyFilter.
    Traffic(Box<TrafficPolicy>),
    /// PEM entries of a Secret or ConfigMap.
    Pem(PemEntries),
    RequestAuthentication(Arc<TargetedAuth>),
    Telemetry(Box<Telemetry>),
    /// What the ConfigMap of MeshConfig says.
    MeshConfig(Box<MeshConfig>),
    /// A policy that denies in place of a document that could not be read.
    Unreadable(Arc<Policy>),
}

/// A Namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Labels.
    pub labels: Labels,
    /// `networking.istio.io/traffic-distribution`.
    pub distribution: Option<Arc<str>>,
    /// `istio.io/use-waypoint-canary-weight`.
    pub canary_weight: Option<Arc<str>>,
}
/// A Pod that has an address and is not finished; others are read as absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Labels.
    pub labels: Labels,
    /// Addresses.
    pub ips: Box<[IpAddr]>,
    /// Service account, empty if unset.
    pub service_account: Arc<str>,
    /// Node.
    pub node: Arc<str>,
    /// Owner's name.
    pub workload_name: Arc<str>,
    /// `culvert.dev/netns`.
    pub netns: Option<Arc<str>>,
    /// Named TCP container ports; containers first, then native sidecars.
    pub ports: Arc<[(Arc<str>, u16)]>,
    /// `metadata.uid` as a number.
    pub uid: Option<[u8; 16]>,
    /// It will run nothing any more: not a workload.
    pub finished: bool,
    /// Ready and not being deleted.
    pub ready: bool,
    /// Host network.
    pub host_network: bool,
    /// Annotation `ambient.istio.io/redirection=enabled`.
    pub redirected: bool,
    /// Annotation `sidecar.istio.io/status` present.
    pub sidecar: bool,
}
/// Where a service port leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// This port of the endpoint.
    Number(u16),
    /// The endpoint's port of this name.
    Name(Arc<str>),
}
/// One TCP port of a Service or ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name, may be empty.
    pub name: Arc<str>,
    /// Port.
    pub port: u16,
    /// Target.
    pub target: Target,
    /// Whether `targetPort` was written.
    pub explicit_target: bool,
    /// Declared protocol.
    pub app: AppProtocol,
}
/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeService {
    /// Labels.
    pub labels: Labels,
    /// Selector; empty for none.
    pub selector: Labels,
    /// TCP ports.
    pub ports: Vec<Port>,
    /// Cluster addresses; none when headless.
    pub vips: Vec<IpAddr>,
    /// `type: ExternalName`: not a service of the mesh.
    pub external_name: bool,
    /// `internalTrafficPolicy: Local`.
    pub local_only: bool,
    /// `spec.trafficDistribution`.
    pub spec_distribution: Option<Arc<str>>,
    /// Annotation `networking.istio.io/traffic-distribution`.
    pub distribution: Option<Arc<str>>,
    /// `publishNotReadyAddresses`.
    pub not_ready: bool,
    /// Families.
    pub families: IpFamilies,
    /// `istio.io/use-waypoint-canary-weight`.
    pub canary_weight: Option<Arc<str>>,
}
/// An EndpointSlice of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct EndpointSlice {
    /// `kubernetes.io/service-name`, empty when not labelled.
    pub service: Arc<str>,
    /// Named TCP ports.
    pub ports: Arc<[(Arc<str>, u16)]>,
    /// Pods it points at, with their uid when given.
    pub pods: Vec<(Arc<str>, Option<[u8; 16]>)>,
    /// Other endpoints: addresses and readiness.
    pub others: Vec<(IpAddr, bool)>,
}
/// How a ServiceEntry's hosts become addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Resolution {
    /// Original destination.
    #[default]
    None,
    /// Given addresses.
    Static,
    /// By name, each address an endpoint.
    Dns,
    /// By name, all addresses one endpoint.
    DnsRoundRobin,
    /// By name, wildcard hosts too.
    DynamicDns,
}
/// An endpoint: a WorkloadEntry's spec, or one inline in a ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// Labels (a WorkloadEntry's: metadata and spec merged).
    pub labels: Labels,
    /// Address, if it is one.
    pub ip: Option<IpAddr>,
    /// Host name otherwise; may be empty.
    pub hostname: Arc<str>,
    /// Port by name.
    pub ports: Vec<(Arc<str>, u16)>,
    /// Network, if it overrides ours.
    pub network: Option<Arc<str>>,
    /// Locality.
    pub locality: Locality,
    /// Weight; 0 unset.
    pub weight: u32,
    /// Service account, may be empty.
    pub service_account: Arc<str>,
    /// Annotation `ambient.istio.io/redirection=enabled`.
    pub redirected: bool,
    /// Condition `Healthy`, where the annotation `proxy.istio.io/health-checks-enabled` says that it counts.
    pub healthy: bool,
    /// `culvert.dev/node`: whose agent carries its traffic.
    pub node: Option<Arc<str>>,
    /// `culvert.dev/netns`: where it is on that node.
    pub netns: Option<Arc<str>>,
}
/// A ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Labels.
    pub labels: Labels,
    /// Hosts, lower case.
    pub hosts: Vec<Arc<str>>,
    /// Addresses and ranges.
    pub addresses: Vec<ipnet::IpNet>,
    /// Assigned by the control plane: host (empty: any) and address.
    pub auto: Vec<(Arc<str>, IpAddr)>,
    /// Ports.
    pub ports: Vec<Port>,
    /// Resolution.
    pub resolution: Resolution,
    /// Inline endpoints.
    pub endpoints: Vec<WorkloadEntry>,
    /// `workloadSelector.labels`; `None` when not written.
    pub selector: Option<Labels>,
    /// SPIFFE ids among `subjectAltNames`.
    pub sans: Vec<mesh_model::SpiffeId>,
    /// Age.
    pub created: Arc<str>,
    /// Annotation `networking.istio.io/traffic-distribution`.
    pub distribution: Option<Arc<str>>,
    /// `istio.io/use-waypoint-canary-weight`.
    pub canary_weight: Option<Arc<str>>,
    /// Annotation `ambient.istio.io/redirection=enabled`.
    pub redirected: bool,
}
/// Traffic a waypoint serves (`istio.io/waypoint-for`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaypointFor {
    /// Services.
    Service,
    /// Workloads.
    Workload,
    /// Both.
    All,
    /// Neither.
    None,
}
/// `ambient.istio.io/waypoint-inbound-binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InboundBinding {
    /// `PROXY` rather than `NONE`.
    pub proxy: bool,
    /// Port.
    pub port: Option<u16>,
}
/// A GatewayClass.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct GatewayClass {
    /// Default traffic of its gateways.
    pub waypoint_for: Option<WaypointFor>,
    /// Default binding of its gateways.
    pub binding: Option<InboundBinding>,
}
/// Whom a listener lets attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedRoutes {
    /// Every namespace.
    All,
    /// Its own namespace.
    Same,
    /// Namespaces with matching labels.
    Selector(LabelSelector),
    /// Nobody: `None`, or a value not understood.
    Nobody,
}
/// A LabelSelector; an empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    /// `matchLabels`.
    pub labels: Labels,
    /// `matchExpressions`.
    pub expressions: Vec<Expression>,
}
/// One `matchExpressions` element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    /// Label.
    pub key: Arc<str>,
    /// Operator.
    pub op: ExpressionOp,
    /// Values.
    pub values: Vec<Arc<str>>,
}
/// Operator of an [`Expression`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpressionOp {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}
/// One listener of a Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Port.
    pub port: u16,
    /// Protocol as written.
    pub protocol: Arc<str>,
    /// Who may attach.
    pub allowed: AllowedRoutes,
}
/// The first usable `status.addresses` of a Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayAddress {
    /// By name.
    Hostname(Arc<str>),
    /// By address.
    Ip(IpAddr),
}
/// What a Gateway of the class `istio-remote` says: another network, and who ends the tunnels to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteNetwork {
    /// Label `topology.istio.io/network`.
    pub network: Arc<str>,
    /// Port of its HBONE listener.
    pub port: u16,
    /// Annotation `gateway.istio.io/service-account`, or the name Istio gives by itself.
    pub service_account: Arc<str>,
    /// Its addresses; without any it is known by name.
    pub ips: Vec<IpAddr>,
}
/// A Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Class.
    pub class: Arc<str>,
    /// Own traffic label.
    pub waypoint_for: Option<WaypointFor>,
    /// Own binding.
    pub binding: Option<InboundBinding>,
    /// Where it answers; `None` while not ready.
    pub address: Option<GatewayAddress>,
    /// Listeners.
    pub listeners: Vec<Listener>,
    /// Those that face the outside; read where layer 7 is.
    pub edge: Vec<EdgeListener>,
    /// The network it leads to, where it stands for the gateway of another one.
    pub leads_to: Option<RemoteNetwork>,
}
/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// The policy as the agent enforces it; `None` when it is not for the agent.
    pub policy: Option<Arc<Policy>>,
    /// Labels it selects, when its scope is `Selector`.
    pub selector: Labels,
    /// The policy as a waypoint or gateway enforces it; `None` when it is not for one, or nobody asks.
    pub layer7: Option<Arc<TargetedPolicy>>,
}
/// mTLS mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// Inherited.
    #[default]
    Unset,
    /// Plaintext accepted (`DISABLE` means the same inbound).
    Permissive,
    /// Plaintext refused.
    Strict,
}
/// A PeerAuthentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Labels it selects; empty for its whole namespace (or the mesh).
    pub selector: Labels,
    /// Mode.
    pub mode: Mode,
    /// Mode by workload port, sorted.
    pub ports: Vec<(u16, Mode)>,
    /// Age.
    pub created: Arc<str>,
    /// Not understood: STRICT wherever it may apply, over every other PeerAuthentication.
    pub forced: bool,
}

/// Reads objects: shared text, and complaints.
#[derive(Debug)]
pub struct Reader<'a> {
    /// Shared text.
    pub pool: &'a mut Interner,
    /// Complaints of the objects read.
    pub problems: Vec<Problem>,
    /// File or source.
    pub place: Arc<str>,
    /// Istio's root namespace.
    pub root_namespace: Arc<str>,
    /// Objects that were refused although it is clear which they are: what they said before may stay in force.
    pub refused: Vec<ObjectId>,
    pub(crate) object: Arc<str>,
    /// DNS domain of Kubernetes services, for short host names.
    pub(super) cluster_domain: Arc<str>,
    /// Whether the kinds of layer 7 are read.
    pub(super) layer7: bool,
}

/// Group of the objects of our own.
const OURS: &str = "culvert.dev";

/// Kinds that say what waypoints and gateways do with requests. Read only where there is one to listen.
fn layer7_kind(kind: &str) -> Option<(Kind, &'static str)> {
    const ISTIO: &str = "networking.istio.io";
    const GATEWAY_API: &str = "gateway.networking.k8s.io";
    Some(match kind {
        "VirtualService" => (Kind::VirtualService, ISTIO),
        "DestinationRule" => (Kind::DestinationRule, ISTIO),
        "HTTPRoute" => (Kind::HttpRoute, GATEWAY_API),
        "GRPCRoute" => (Kind::GrpcRoute, GATEWAY_API),
        "TCPRoute" => (Kind::TcpRoute, GATEWAY_API),
        "TLSRoute" => (Kind::TlsRoute, GATEWAY_API),
        "BackendTLSPolicy" => (Kind::BackendTlsPolicy, GATEWAY_API),
        "XBackendTrafficPolicy" => (Kind::BackendTrafficPolicy, "gateway.networking.x-k8s.io"),
        "ReferenceGrant" => (Kind::ReferenceGrant, GATEWAY_API),
        "Telemetry" => (Kind::Telemetry, "telemetry.istio.io"),
        "TrafficPolicy" => (Kind::TrafficPolicy, OURS),
        "EnvoyFilter" => (Kind::EnvoyFilter, ISTIO),
        "Secret" => (Kind::Secret, ""),
        "ConfigMap" => (Kind::ConfigMap, ""),
        "RequestAuthentication" => (Kind::RequestAuthentication, "security.istio.io"),
        _ => return None,
    })
}

/// Istio and Gateway API kinds that are for waypoints or the control plane.
const NOT_FOR_AGENT: &[&str] = &[
    "VirtualService",
    "DestinationRule",
    "Sidecar",
    "EnvoyFilter",
    "TrafficPolicy",
    "WasmPlugin",
    "Telemetry",
    "RequestAuthentication",
    "ProxyConfig",
    "WorkloadGroup",
    "TrafficExtension",
    "HTTPRoute",
    "GRPCRoute",
    "TCPRoute",
    "TLSRoute",
    "UDPRoute",
    "ReferenceGrant",
    "BackendTLSPolicy",
    "XBackendTrafficPolicy",
    "ListenerSet",
    "XListenerSet",
    "InferencePool",
];
/// Kubernetes kinds a folder may well contain and that say nothing about the mesh.
const NOT_FOR_MESH: &[&str] = &[
    "ServiceAccount",
    "Deployment",
    "ReplicaSet",
    "StatefulSet",
    "DaemonSet",
    "Job",
    "CronJob",
    "ConfigMap",
    "Secret",
    "Ingress",
    "IngressClass",
    "NetworkPolicy",
    "Role",
    "RoleBinding",
    "ClusterRole",
    "ClusterRoleBinding",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "StorageClass",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "CustomResourceDefinition",
    "MutatingWebhookConfiguration",
    "ValidatingWebhookConfiguration",
    "Event",
    "Endpoints",
    "LimitRange",
    "ResourceQuota",
    "Lease",
    "PriorityClass",
    "ReplicationController",
    "ControllerRevision",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "RuntimeClass",
    "CSIDriver",
    "CSINode",
];

impl<'a> Reader<'a> {
    /// A reader for one file or source.
    pub(super) fn new(
        pool: &'a mut Interner,
        place: Arc<str>,
        root_namespace: Arc<str>,
        cluster_domain: Arc<str>,
        layer7: bool,
    ) -> Self {
        Self { pool, problems: Vec::new(), place, root_namespace, refused: Vec::new(), object: "".into(), cluster_domain, layer7 }
    }

    /// Whether the root of a document is a `List` whose items the YAML loader hands out one by one.
    pub fn is_list(root: &Node<'_>) -> bool {
        root.get("kind").and_then(Node::text).is_some_and(|k| k.ends_with("List"))
            && matches!(root.value, Value::Map(ref e) if e.iter().any(|e| e.key == "items"))
    }

    /// Reads one object. `None`: not used by the agent, or refused (then a problem says so).
    pub fn object<'p>(&mut self, node: &'p Node<'p>) -> Option<Object> {
        let kind_text = node.get("kind").and_then(Node::text).unwrap_or_default();
        let api = node.get("apiVersion").and_then(Node::text).unwrap_or_default();
        let meta_name = node.get("metadata").and_then(|m| m.get("name")).and_then(Node::text).unwrap_or_default();
        let meta_ns = node.get("metadata").and_then(|m| m.get("namespace")).and_then(Node::text).unwrap_or_default();
        self.object = object_name(if kind_text.is_empty() { "object" } else { kind_text }, meta_ns, meta_name).into();
        let group = api.split_once('/').map_or("", |(g, _)| g);
        let kind = match self.kind(node, kind_text, group) {
            Ok(Some(kind)) => kind,
            Ok(None) => return None,
            Err(bad) => {
                self.report(node, &bad, Severity::Error);
                // A typing error in the kind of a security object must not switch it off.
                return looks_like_security(kind_text, group).then(|| self.unreadable(node.line, meta_ns, &bad.message));
            }
        };
        let (namespace, name) = match metadata(node, kind) {
            Ok((ns, name)) => (self.pool.text(ns), self.pool.text(name)),
            Err(bad) => {
                self.report(node, &bad, Severity::Error);
                return kind.is_security().then(|| self.unreadable(node.line, meta_ns, &bad.message));
            }
        };
        let id = ObjectId { kind, namespace, name };
        let origin = Arc::new(Origin { place: Arc::clone(&self.place), line: node.line, object: id.to_string().into() });
        self.object = Arc::clone(&origin.object);
        let body = match kind {
            Kind::AuthorizationPolicy => Ok(Body::AuthorizationPolicy(authorization::read(self, node, &id, &origin))),
            Kind::PeerAuthentication => Ok(Body::PeerAuthentication(peer::read(self, node))),
            Kind::Namespace => kube::namespace(self, node).map(Body::Namespace),
            Kind::Node => kube::node(self, node).map(Body::Node),
            Kind::Pod => kube::pod(self, node).map(Body::Pod),
            Kind::Service => kube::service(self, node).map(|s| Body::Service(Box::new(s))),
            Kind::EndpointSlice => kube::endpoint_slice(self, node).map(Body::EndpointSlice),
            Kind::ServiceEntry => istio::service_entry(self, node).map(|s| Body::ServiceEntry(Box::new(s))),
            Kind::WorkloadEntry => istio::workload_entry_object(self, node).map(|w| Body::WorkloadEntry(Box::new(w))),
            Kind::Gateway => istio::gateway(self, node).map(|g| Body::Gateway(Box::new(g))),
            Kind::GatewayClass => istio::gateway_class(self, node).map(Body::GatewayClass),
            Kind::VirtualService => virtual_service::read(self, node, &id).map(|v| Body::VirtualService(Box::new(v))),
            Kind::DestinationRule => destination_rule::read(self, node, &id).map(|d| Body::DestinationRule(Box::new(d))),
            Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TcpRoute
            | Kind::TlsRoute
            | Kind::BackendTlsPolicy
            | Kind::BackendTrafficPolicy
            | Kind::ReferenceGrant => match gateway_api::read(self, node, &id, &origin) {
                Ok(Some(object)) => Ok(Body::GatewayApi(Box::new(object))),
                Ok(None) => return None,
                Err(bad) => Err(bad),
            },
            Kind::TrafficPolicy => Ok(Body::Traffic(Box::new(traffic_policy::read(self, node, &id)))),
            Kind::EnvoyFilter => envoy_filter::read(self, node, &id).map(|t| Body::Traffic(Box::new(t))),
            Kind::Secret => pem::secret(node).map(Body::Pem),
            Kind::ConfigMap if *id.namespace == *self.root_namespace && &*id.name == telemetry::MESH_CONFIG => {
                telemetry::read_mesh_config(self, node).map(|m| Body::MeshConfig(Box::new(m)))
            }
            Kind::ConfigMap => pem::config_map(node).map(Body::Pem),
            Kind::RequestAuthentication => Ok(Body::RequestAuthentication(request_auth::read(self, node, &id, &origin))),
            Kind::Telemetry => telemetry::read(self, node, &id).map(|t| Body::Telemetry(Box::new(t))),
            Kind::Unreadable => return None,
        };
        match body {
            Ok(body) => Some(Object { id, origin, body }),
            Err(bad) => {
                self.refused.push(id);
                self.report(node, &bad, Severity::Error);
                None
            }
        }
    }

    /// The stand-in for a security document that cannot be read: it denies in its namespace, or everywhere when even
    /// that is not known.
    pub fn unreadable(&mut self, line: u32, namespace: &str, why: &str) -> Object {
        use mesh_model::policy::{PolicyBody, PolicyKey, Scope};
        let global = namespace.is_empty() || namespace == &*self.root_namespace;
        let ns = if namespace.is_empty() { Arc::clone(&self.root_namespace) } else { self.pool.text(namespace) };
        let name: Arc<str> = format!("unreadable:{}:{line}", self.place).into();
        let origin = Arc::new(Origin { place: Arc::clone(&self.place), line, object: Arc::clone(&self.object) });
        let why = format!(
            "a security object of this {} could not be read ({}:{line}): {why}",
            if global { "mesh" } else { "namespace" },
            self.place
        );
        let policy = Policy {
            key: PolicyKey { namespace: Arc::clone(&ns), name: Arc::clone(&name) },
            scope: if global { Scope::Global } else { Scope::Namespace },
            body: PolicyBody::Unusable { why: why.into() },
            origin: Some(Arc::clone(&origin)),
        };
        Object { id: ObjectId { kind: Kind::Unreadable, namespace: ns, name }, origin, body: Body::Unreadable(Arc::new(policy)) }
    }

    fn kind<'p>(&mut self, node: &'p Node<'p>, kind: &str, group: &str) -> Read<'p, Option<Kind>> {
        read::entries(node)?;
        if kind.is_empty() {
            return Err(Bad::missing(node, "kind", "every document is a Kubernetes object with `apiVersion` and `kind`"));
        }
        let (found, want) = match kind {
            "Namespace" => (Kind::Namespace, ""),
            "Node" => (Kind::Node, ""),
            "Pod" => (Kind::Pod, ""),
            "Service" => (Kind::Service, ""),
            "EndpointSlice" => (Kind::EndpointSlice, "discovery.k8s.io"),
            "ServiceEntry" => (Kind::ServiceEntry, "networking.istio.io"),
            "WorkloadEntry" => (Kind::WorkloadEntry, "networking.istio.io"),
            "AuthorizationPolicy" => (Kind::AuthorizationPolicy, "security.istio.io"),
            "PeerAuthentication" => (Kind::PeerAuthentication, "security.istio.io"),
            "Gateway" if group == "networking.istio.io" => {
                self.note(node, "an Istio Gateway is for ingress gateways; the node agent does not use it");
                return Ok(None);
            }
            "Gateway" => (Kind::Gateway, "gateway.networking.k8s.io"),
            "GatewayClass" => (Kind::GatewayClass, "gateway.networking.k8s.io"),
            k => match layer7_kind(k).filter(|_| self.layer7) {
                Some(found) => found,
                None if NOT_FOR_AGENT.contains(&k) => {
                    self.note(
                        node,
                        if self.layer7 {
                            "accepted; this proxy does not use it"
                        } else {
                            "accepted; it is for waypoints, the node agent does not use it"
                        },
                    );
                    return Ok(None);
                }
                None if NOT_FOR_MESH.contains(&k) => return Ok(None),
                None => {
                    let at = node.get("kind").unwrap_or(node);
                    return Err(Bad {
                        at,
                        missing: None,
                        message: format!("unknown kind `{k}`"),
                        fix: "correct the kind, or move the file out of the folder",
                        code: "unknown-kind",
                    });
                }
            },
        };
        let version_ok = node.get("apiVersion").and_then(Node::text).is_some_and(|api| {
            let (g, v) = api.split_once('/').unwrap_or(("", api));
            g == want && if want == OURS { v == "v1alpha1" } else { version_known(v) }
        });
        if !version_ok {
            let at = node.get("apiVersion").unwrap_or(node);
            let message = if want.is_empty() {
                format!("the apiVersion of a {kind} is `v1`")
            } else if want == OURS {
                format!("the apiVersion of a {kind} is `{want}/v1alpha1`")
            } else {
                format!("the apiVersion of a {kind} is `{want}/v1`")
            };
            return Err(Bad {
                at,
                missing: node.get("apiVersion").is_none().then_some("apiVersion"),
                message,
                fix: "correct the apiVersion",
                code: "bad-version",
            });
        }
        Ok(Some(found))
    }

    /// Files a complaint about `bad`, somewhere below `root`.
    pub(crate) fn report(&mut self, root: &Node<'_>, bad: &Bad<'_>, severity: Severity) {
        self.problems.push(bad.problem(root, &self.place, &self.object, severity));
    }
    pub(super) fn note(&mut self, node: &Node<'_>, message: &str) {
        self.problems.push(Problem {
            severity: Severity::Note,
            origin: Origin { place: Arc::clone(&self.place), line: node.line, object: Arc::clone(&self.object) },
            field: "".into(),
            message: message.into(),
            fix: "".into(),
            code: Some("not-for-agent"),
        });
    }
}

/// Versions of the API groups read here; what comes after them may mean other things by the same fields.
fn version_known(v: &str) -> bool {
    matches!(v, "v1" | "v1beta1" | "v1alpha3" | "v1alpha2" | "v1alpha1")
}

fn looks_like_security(kind: &str, group: &str) -> bool {
    group.eq_ignore_ascii_case("security.istio.io")
        || kind.eq_ignore_ascii_case("AuthorizationPolicy")
        || kind.eq_ignore_ascii_case("PeerAuthentication")
        || kind.eq_ignore_ascii_case("RequestAuthentication")
}

/// Namespace and name, checked as the API server would: both end up in identities and keys.
fn metadata<'p>(node: &'p Node<'p>, kind: Kind) -> Read<'p, (&'p str, &'p str)> {
    let Some(meta) = read::map(node, "metadata")? else {
        return Err(Bad::missing(node, "metadata", "every object has `metadata.name`"));
    };
    let name = match meta.get("name") {
        None => return Err(Bad::missing(meta, "name", "every object has a name")),
        Some(n) => dns_name(n)?,
    };
    let namespace = match meta.get("namespace") {
        _ if kind.cluster_scoped() => "",
        // What `kubectl apply` would do with its default context.
        None => "default",
        Some(n) => dns_name(n)?,
    };
    Ok((namespace, name))
}
fn dns_name<'p>(n: &'p Node<'p>) -> Read<'p, &'p str> {
    let t = read::scalar(n)?;
    let ok = !t.is_empty()
        && t.len() <= 253
        && t.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
        && t.starts_with(|c: char| c.is_ascii_alphanumeric());
    if ok {
        Ok(t)
    } else {
        Err(Bad::value(n, format!("`{t}` is not a Kubernetes name"), "use lower-case letters, digits, `-` and `.`"))
    }
}
