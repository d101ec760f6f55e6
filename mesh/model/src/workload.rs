//! Workloads: one running thing with addresses and an identity (a pod, a workload entry, an external endpoint).
use crate::addr::Network;
pub use crate::gateway::{GatewayDestination, GatewayRef};
use crate::gateway::ServiceKey;
use crate::id::{IdError, SpiffeId, TrustDomain};
use crate::policy::PolicyKey;
use crate::origin::Origin;
use std::collections::BTreeMap;
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
    pub services: BTreeMap<ServiceKey, PortMap>,
    /// Names of the selector policies that bind it. A name with no policy behind it denies (Istio: skipped, fail-open).
    pub policies: Vec<PolicyKey>,
    /// Its waypoint for workload-addressed traffic.
    pub waypoint: Option<GatewayRef>,
    /// A waypoint is declared for it but cannot be used: traffic is refused with this text, never sent around it.
    pub waypoint_error: Option<Arc<str>>,
    /// Gateway in front of its network.
    pub network_gateway: Option<GatewayRef>,
    /// Application tunnel.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Network namespace of the pod, when a folder names it (`culvert.dev/netns`).
    pub netns: Option<Arc<str>>,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
/// Service port → endpoint port; sorted, small.
pub type PortMap = Arc<[(u16, u16)]>;

impl Workload {
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
            services: BTreeMap::new(),
            policies: Vec::new(),
            waypoint: None,
            waypoint_error: None,
            network_gateway: None,
            application_tunnel: None,
            netns: None,
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
