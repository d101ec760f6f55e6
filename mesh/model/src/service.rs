//! Services: names and virtual addresses in front of workloads.
use crate::addr::{Network, NetworkAddr};
use crate::gateway::GatewayRef;
pub use crate::gateway::ServiceKey;
use crate::id::SpiffeId;
use crate::origin::Origin;
use ipnet::IpNet;
use std::net::IpAddr;
use std::sync::Arc;

/// What a service port carries, when declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AppProtocol {
    /// Not declared.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// TLS, passed through.
    Tls,
    /// Opaque TCP.
    Tcp,
}
/// One port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Port clients connect to.
    pub port: u16,
    /// Default port at the endpoint; 0: named, only the endpoint knows.
    pub target: u16,
    /// Declared protocol.
    pub protocol: AppProtocol,
}
/// Who may see the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Visibility {
    /// Everyone.
    #[default]
    Public,
    /// Only clients of its own namespace. Sources map unknown values here, not to `Public` (Istio fails open).
    Namespace,
}
/// Address families of the service's clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum IpFamilies {
    /// No restriction.
    #[default]
    Automatic,
    /// IPv4 endpoints only.
    V4,
    /// IPv6 endpoints only.
    V6,
    /// Both.
    Dual,
}
impl IpFamilies {
    /// Those of a workload with these addresses; nothing is known of one without.
    pub fn of(ips: &[IpAddr]) -> Self {
        match (ips.iter().any(IpAddr::is_ipv4), ips.iter().any(IpAddr::is_ipv6)) {
            (true, false) => Self::V4,
            (false, true) => Self::V6,
            (true, true) => Self::Dual,
            (false, false) => Self::Automatic,
        }
    }
}
/// Scope of one locality preference, widest meaning given by the client's own value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LbScope {
    /// Same region.
    Region,
    /// Same zone.
    Zone,
    /// Same subzone.
    Subzone,
    /// Same node.
    Node,
    /// Same cluster.
    Cluster,
    /// Same network.
    Network,
}
/// How preferences are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum LbMode {
    /// All endpoints alike.
    #[default]
    Any,
    /// Only endpoints that match every scope.
    Strict,
    /// The endpoints that match the longest prefix of scopes.
    Failover,
    /// Original destination, no endpoint choice.
    Passthrough,
}
/// Which endpoints count as usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum HealthPolicy {
    /// Healthy ones.
    #[default]
    OnlyHealthy,
    /// All (`publishNotReadyAddresses`).
    AllowAll,
}
/// Load balancing of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct LoadBalancing {
    /// Ordered scopes.
    pub scopes: Vec<LbScope>,
    /// Mode.
    pub mode: LbMode,
    /// Health.
    pub health: HealthPolicy,
}
/// One service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `namespace/hostname`.
    pub key: ServiceKey,
    /// Short name (`metadata.name`).
    pub name: Arc<str>,
    /// Virtual addresses.
    pub vips: Vec<NetworkAddr>,
    /// Virtual address ranges (ServiceEntry CIDRs).
    pub cidr_vips: Vec<(Network, IpNet)>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Accepted identities of its endpoints beside the endpoint's own (`subjectAltNames`).
    pub sans: Vec<SpiffeId>,
    /// Its waypoints with weights (per-connection draw); one with weight 100 in the plain case, empty for none.
    pub waypoints: Vec<WeightedWaypoint>,
    /// A waypoint is declared but cannot be used: traffic is refused with this text, never sent around it.
    pub waypoint_error: Option<Arc<str>>,
    /// Gateways go through its waypoint too (`istio.io/ingress-use-waypoint`); without a waypoint it means nothing.
    pub ingress_use_waypoint: bool,
    /// Load balancing.
    pub lb: LoadBalancing,
    /// Families.
    pub ip_families: IpFamilies,
    /// The addresses of an endpoint that has a name only are one endpoint (`DNS_ROUND_ROBIN`, Envoy's LOGICAL_DNS), not one each.
    pub logical_dns: bool,
    /// Other networks may ask our gateway for it (Istio's scope GLOBAL).
    pub global: bool,
    /// Preferred among services of one hostname (Kubernetes services, oldest ServiceEntry).
    pub canonical: bool,
    /// Who sees it.
    pub visibility: Visibility,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
/// A waypoint and its share of connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub waypoint: GatewayRef,
    /// Its weight; 0 draws nothing.
    pub weight: u32,
}
impl Service {
    /// A public service without ports; sources and tests fill in the rest.
    pub fn new(name: &str, namespace: &str, hostname: &str) -> Self {
        Self {
            key: ServiceKey::new(namespace, hostname),
            name: name.into(),
            vips: Vec::new(),
            cidr_vips: Vec::new(),
            ports: Vec::new(),
            sans: Vec::new(),
            waypoints: Vec::new(),
            waypoint_error: None,
            ingress_use_waypoint: false,
            lb: LoadBalancing::default(),
            ip_families: IpFamilies::default(),
            logical_dns: false,
            global: false,
            canonical: false,
            visibility: Visibility::default(),
            origin: None,
        }
    }
    /// Whether gateways go through its waypoint: it has one, or should have.
    pub fn is_fronted(&self) -> bool {
        self.ingress_use_waypoint && (self.waypoint_error.is_some() || !self.waypoints.is_empty())
    }
    /// The declared port, if the service has it.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == port)
    }
}
