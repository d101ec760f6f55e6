//! What all connections share, and what is known of one.
use crate::facts::{Facts, Scope};
use crate::settings::Settings;
use crate::telemetry::Telemetry;
use crate::upstream::Upstreams;
use mesh_identity::SvidHandle;
use mesh_identity::live::LivePeers;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::l7::policy::L7Target;
use mesh_model::waypoint::Target;
use mesh_model::workload::Workload;
use mesh_model::{Reason, Refusal, Snapshot, SpiffeId};
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::gate::Gate;
use mesh_runtime::threads::DataThreads;
use mesh_sources::Mesh;
use std::ops::Deref;
use std::sync::Arc;

/// What the whole process shares.
pub struct Shared {
    /// Settings.
    pub settings: Settings,
    /// The mesh.
    pub mesh: Mesh,
    /// Data threads.
    pub threads: DataThreads,
    /// Our certificate, rotated in place.
    pub svid: SvidHandle,
    /// Our identity.
    pub identity: SpiffeId,
    /// This process's pod, as workloads are known; `None` when it does not know its own name.
    pub pod: Option<Box<str>>,
    /// The Gateway this process serves.
    pub gateway: GatewayKey,
    /// Trust bundles, to see that a peer's root was withdrawn.
    pub tls: mesh_identity::TlsContext,
    /// Handshakes in progress.
    pub gate: Gate,
    /// Tunnel settings, of both sides.
    pub hbone: Arc<mesh_hbone::Settings>,
    /// Clusters, pools, health.
    pub upstreams: Arc<Upstreams>,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// Live tunnels, for revocation.
    pub tunnels: LivePeers,
}
impl Shared {
    /// The workload this process is, as `snap` knows it.
    pub fn me<'s>(&self, snap: &'s Snapshot) -> Result<&'s Arc<Workload>, Refusal> {
        let by_name = self.pod.as_ref().map(|uid| snap.find_workload(uid));
        let by_address = || {
            let ip = self.settings.instance_ip?;
            snap.find_workload_by_ip(&snap.view().network, ip.to_canonical())
        };
        by_name.flatten().or_else(by_address).ok_or_else(|| {
            let name = format!("{}/{}", self.settings.namespace, self.settings.pod);
            Refusal::new(Reason::UnknownWorkload, format!("this waypoint ({name}) is no workload of the mesh yet"))
        })
    }
}

/// One connection: its facts, and what it needs of the process.
pub struct Conn {
    /// What all share.
    pub shared: Arc<Shared>,
    /// What is known of it.
    pub facts: Facts,
    /// Ends with the process or the listener.
    pub drain: DrainWatch,
    /// What policies may be bound to that concerns it: the same for every request.
    pub targets: Box<[L7Target]>,
}
impl Conn {
    /// A connection of which this is known.
    pub fn new(shared: Arc<Shared>, facts: Facts, drain: DrainWatch) -> Self {
        let mut targets = vec![L7Target::Gateway(shared.gateway.clone())];
        if let Scope::Mesh(target) = &facts.scope {
            targets.push(L7Target::Waypoints);
            if let Target::Service { service, .. } = target {
                targets.push(L7Target::of_service(&service.key, &service.name));
            }
        }
        Self { shared, facts, drain, targets: targets.into() }
    }
}
impl Deref for Conn {
    type Target = Facts;
    fn deref(&self) -> &Facts {
        &self.facts
    }
}
