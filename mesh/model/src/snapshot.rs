//! One immutable version of all mesh knowledge, and the builder that makes the next one from changes.
use crate::addr::Network;
use crate::change::Change;
use crate::id::TrustDomain;
use crate::policy::{Policy, PolicyKey};
use crate::service::{Service, ServiceKey};
use crate::workload::{Locality, Workload};
use std::net::IpAddr;
use std::sync::Arc;

/// Version of a snapshot: increases by one with each publish.
pub type Version = u64;

/// From where this process looks at the mesh. Fixed for the life of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Viewpoint {
    /// Our network.
    pub network: Network,
    /// Our cluster.
    pub cluster: Arc<str>,
    /// Our node's name; empty for a waypoint.
    pub node: Arc<str>,
    /// Where the node is.
    pub locality: Locality,
    /// `cluster.local`: the DNS domain of Kubernetes services.
    pub cluster_domain: Arc<str>,
    /// Istio's root namespace.
    pub root_namespace: Arc<str>,
    /// Our trust domain.
    pub trust_domain: TrustDomain,
    /// Other names of our trust domain, accepted from peers and in policies.
    pub trust_domain_aliases: Vec<TrustDomain>,
}
impl Default for Viewpoint {
    fn default() -> Self {
        Self {
            network: Network::default(),
            cluster: "Kubernetes".into(),
            node: "".into(),
            locality: Locality::default(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
        }
    }
}

/// One version of the mesh. Cheap to clone by `Arc`; never changes.
#[derive(Clone, Debug)]
pub struct Snapshot {
    version: Version,
    view: Arc<Viewpoint>,
}
impl Snapshot {
    /// An empty mesh, version 0.
    pub fn empty(view: Viewpoint) -> Self {
        Self { version: 0, view: Arc::new(view) }
    }
    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }
    /// From where it is seen.
    pub fn view(&self) -> &Viewpoint {
        &self.view
    }
    /// The next version: `changes` applied in order. `self` stays as it is; untouched shards are shared.
    /// Applying any sequence of changes equals rebuilding from the final set.
    #[must_use]
    pub fn apply(&self, _changes: &[Change]) -> Snapshot {
        todo!()
    }
    /// Workload by id.
    pub fn find_workload(&self, _uid: &str) -> Option<&Arc<Workload>> {
        todo!()
    }
    /// Workload by address (host-network ones are never found; conflicts ranked as node-agent §1.4).
    pub fn find_workload_by_ip(&self, _network: &Network, _ip: IpAddr) -> Option<&Arc<Workload>> {
        todo!()
    }
    /// Service by key.
    pub fn find_service(&self, _key: &ServiceKey) -> Option<&Arc<Service>> {
        todo!()
    }
    /// Service by VIP (exact, then CIDR) as a client in `client_namespace` sees it.
    pub fn find_service_by_vip(&self, _network: &Network, _ip: IpAddr, _client_namespace: &str) -> Option<&Arc<Service>> {
        todo!()
    }
    /// Service by host name as a client in `client_namespace` sees it.
    pub fn find_service_by_host(&self, _hostname: &str, _client_namespace: &str) -> Option<&Arc<Service>> {
        todo!()
    }
    /// Policy by key.
    pub fn find_policy(&self, _key: &PolicyKey) -> Option<&Arc<Policy>> {
        todo!()
    }
    /// All workloads, in no order (admin and reconcilers, never the data path).
    pub fn workloads(&self) -> Box<dyn Iterator<Item = &Arc<Workload>> + '_> {
        todo!()
    }
    /// All services, in no order.
    pub fn services(&self) -> Box<dyn Iterator<Item = &Arc<Service>> + '_> {
        todo!()
    }
    /// All policies, in no order.
    pub fn policies(&self) -> Box<dyn Iterator<Item = &Arc<Policy>> + '_> {
        todo!()
    }
    /// Workloads on our own node (`view().node`), kept indexed.
    pub fn local_workloads(&self) -> Box<dyn Iterator<Item = &Arc<Workload>> + '_> {
        todo!()
    }
    /// Endpoints of a service (workload uid order not defined), for admin and DNS.
    pub fn endpoints(&self, _service: &ServiceKey) -> Box<dyn Iterator<Item = &Arc<Workload>> + '_> {
        todo!()
    }
}
