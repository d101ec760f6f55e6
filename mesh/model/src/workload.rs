//! Workloads: one running thing with addresses and an identity (a pod, a workload entry, an external endpoint).
use crate::addr::Network;
use crate::gateway::ServiceKey;
pub use crate::gateway::{GatewayDestination, GatewayRef};
use crate::id::{IdError, SpiffeId, TrustDomain};
use crate::labels::Labels;
use crate::origin::Origin;
use crate::policy::PolicyKey;
use std::net::IpAddr;
use std::sync::Arc;

/// Istio's unique id of a workload, e.g. `cluster1//Pod/default/web-0` (spec/waypoint §1.1).
pub type WorkloadUid = Arc<str>;

/// How a workload is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Protocol {
    /// Plain TCP to the workload's own port.
    #[default]
    Tcp,
    /// CONNECT over mTLS to port 15008.
    Hbone,
}
/// Whether the workload can be found by its IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum NetworkMode {
    /// Its IPs are its own.
    #[default]
    Standard,
    /// Its IPs are the node's: never indexed by IP.
    HostNetwork,
}
/// Readiness as the control plane sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Health {
    /// May receive service traffic.
    #[default]
    Healthy,
    /// Only receives service traffic when the service publishes unready addresses.
    Unhealthy,
}
/// Region, zone and subzone; empty means unknown.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone.
    pub zone: Arc<str>,
    /// Subzone.
    pub subzone: Arc<str>,
}
/// How the agent hands connections to a workload that wants to know more (sandwiched waypoints).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApplicationTunnel {
    /// PROXY protocol v2 to this port (`None`: the original port), with the source identity in TLV 0xD0.
    Proxy(Option<u16>),
}

/// One workload. Everything is shared text so that 100 000 of them stay small.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique id.
    pub uid: WorkloadUid,
    /// Name, usually the pod's.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Service account; sources default an empty one to `default`.
    pub service_account: Arc<str>,
    /// Trust domain of its certificates.
    pub trust_domain: TrustDomain,
    /// Its addresses; may be empty when `hostname` is set.
    pub ips: Vec<IpAddr>,
    /// DNS name to resolve when it has no address.
    pub hostname: Option<Arc<str>>,
    /// Network its addresses are on.
    pub network: Network,
    /// TCP or HBONE.
    pub protocol: Protocol,
    /// Standard or host network.
    pub network_mode: NetworkMode,
    /// Speaks HBONE itself (a sidecar or waypoint); the agent does not capture for it.
    pub native_tunnel: bool,
    /// Node it runs on.
    pub node: Arc<str>,
    /// Cluster it runs in.
    pub cluster: Arc<str>,
    /// Where it runs.
    pub locality: Locality,
    /// Owner's name without hash suffixes (`source_workload` in metrics).
    pub workload_name: Arc<str>,
    /// `deployment`, `pod`, `job`, `cronjob`: the key used in baggage.
    pub workload_type: Arc<str>,
    /// Canonical service name and revision.
    pub canonical_name: Arc<str>,
    /// Canonical revision, `latest` by default.
    pub canonical_revision: Arc<str>,
    /// Health.
    pub health: Health,
    /// Weight among endpoints; 0 in the wire format means 1 and sources convert it.
    pub capacity: u32,
    /// Services it backs: service → (service port → its own port).
    pub services: ServicePorts,
    /// Names of the selector policies that bind it. A name with no policy behind it denies (Istio: skipped, fail-open).
    /// Shared by the workloads of a deployment.
    pub policies: Arc<[PolicyKey]>,
    /// Its waypoint for workload-addressed traffic.
    pub waypoint: Option<Box<GatewayRef>>,
    /// A waypoint is declared for it but cannot be used: traffic is refused with this text, never sent around it.
    pub waypoint_error: Option<Arc<str>>,
    /// Gateway in front of its network.
    pub network_gateway: Option<Box<GatewayRef>>,
    /// Application tunnel.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Network namespace of the pod, when a folder names it (`culvert.dev/netns`).
    pub netns: Option<Arc<str>>,
    /// Labels, which subsets of a DestinationRule select by.
    pub labels: Labels,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
/// Service port → endpoint port; sorted, small.
pub type PortMap = Arc<[(u16, u16)]>;

/// The services a workload backs and on which ports, sorted by service. Cheap to clone: the workloads of a deployment
/// share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct ServicePorts(Arc<[(ServiceKey, PortMap)]>);
impl ServicePorts {
    /// The ports for one service, if it is backed.
    pub fn get(&self, service: &ServiceKey) -> Option<&PortMap> {
        let at = self.0.binary_search_by(|(k, _)| k.cmp(service)).ok()?;
        self.0.get(at).map(|(_, ports)| ports)
    }
    /// Whether the service is backed.
    pub fn contains(&self, service: &ServiceKey) -> bool {
        self.get(service).is_some()
    }
    /// Adds a service or replaces its ports. Copies the set; many at once are better collected.
    pub fn insert(&mut self, service: ServiceKey, ports: PortMap) {
        *self = self.0.iter().cloned().chain([(service, ports)]).collect();
    }
    /// Services with their ports, sorted by service.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&ServiceKey, &PortMap)> {
        self.0.iter().map(|(k, p)| (k, p))
    }
    /// The services, sorted.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &ServiceKey> {
        self.0.iter().map(|(k, _)| k)
    }
    /// The ports, in the order of their services.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &PortMap> {
        self.0.iter().map(|(_, p)| p)
    }
    /// Number of services.
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// Whether it backs none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// Whether nobody else holds this set: a pool of shared sets may forget it.
    pub fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}
/// Of several pairs for one service the last counts.
impl FromIterator<(ServiceKey, PortMap)> for ServicePorts {
    fn from_iter<I: IntoIterator<Item = (ServiceKey, PortMap)>>(pairs: I) -> Self {
        let mut pairs: Vec<(ServiceKey, PortMap)> = pairs.into_iter().collect();
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                kept.1 = Arc::clone(&later.1);
            }
            same
        });
        Self(if pairs.is_empty() { Arc::default() } else { pairs.into() })
    }
}

/// Label of a pod that is an instance of a Gateway.
pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Port of HBONE where nobody says another.
const HBONE: u16 = 15008;

impl Workload {
    /// Whether it is a pod of a Gateway, by its label or, where labels are not told, by a service with the port of HBONE.
    pub fn is_gateway(&self) -> bool {
        let takes_tunnels = |ports: &PortMap| ports.iter().any(|(port, _)| *port == HBONE);
        self.labels.get(GATEWAY_NAME).is_some() || self.services.values().any(takes_tunnels)
    }
    /// A healthy plain workload with defaults everywhere else; sources and tests fill in the rest.
    pub fn new(uid: &str, name: &str, namespace: &str) -> Self {
        Self {
            uid: uid.into(),
            name: name.into(),
            namespace: namespace.into(),
            service_account: "default".into(),
            trust_domain: TrustDomain::default(),
            ips: Vec::new(),
            hostname: None,
            network: Network::default(),
            protocol: Protocol::Tcp,
            network_mode: NetworkMode::Standard,
            native_tunnel: false,
            node: "".into(),
            cluster: "".into(),
            locality: Locality::default(),
            workload_name: name.into(),
            workload_type: "pod".into(),
            canonical_name: name.into(),
            canonical_revision: "latest".into(),
            health: Health::Healthy,
            capacity: 1,
            services: ServicePorts::default(),
            policies: Arc::default(),
            waypoint: None,
            waypoint_error: None,
            network_gateway: None,
            application_tunnel: None,
            netns: None,
            labels: Labels::default(),
            origin: None,
        }
    }
    /// Its SPIFFE id.
    pub fn identity(&self) -> Result<SpiffeId, IdError> {
        SpiffeId::new(&self.trust_domain, &self.namespace, &self.service_account)
    }
    /// The endpoint port behind a service port, if it backs that service there.
    pub fn target_port(&self, service: &ServiceKey, service_port: u16) -> Option<u16> {
        self.services.get(service)?.iter().find(|(s, _)| *s == service_port).map(|(_, t)| *t)
    }
}
