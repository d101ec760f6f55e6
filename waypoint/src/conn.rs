//! What all connections share, and what is known of one.
use crate::settings::Settings;
use crate::telemetry::Telemetry;
use crate::upstream::Upstreams;
use mesh_identity::SvidHandle;
use mesh_model::l7::{HttpRoute, RouteTable};
use mesh_model::waypoint::Target;
use mesh_model::workload::Workload;
use mesh_model::{Reason, Refusal, Snapshot, SpiffeId};
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::gate::Gate;
use mesh_runtime::threads::DataThreads;
use mesh_sources::Mesh;
use std::net::SocketAddr;
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
    /// Trust bundles, to see that a peer's root was withdrawn.
    pub tls: mesh_identity::TlsContext,
    /// Handshakes in progress.
    pub gate: Gate,
    /// Tunnel settings of the server side.
    pub hbone: Arc<mesh_hbone::Settings>,
    /// Clusters, pools, health.
    pub upstreams: Arc<Upstreams>,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// Live tunnels, for revocation and admin.
    pub tunnels: crate::listen::Tunnels,
}
impl Shared {
    /// The workload this process is, as `snap` knows it.
    pub fn me<'s>(&self, snap: &'s Snapshot) -> Result<&'s Arc<Workload>, Refusal> {
        let by_name = (!self.settings.pod.is_empty()).then(|| {
            snap.find_workload(&format!("{}//Pod/{}/{}", snap.view().cluster, self.settings.namespace, self.settings.pod))
        });
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

/// Where requests of a connection are to go before any route is looked at.
#[derive(Clone, Debug)]
pub enum Scope {
    /// Through a tunnel to what was addressed.
    Mesh(Target),
    /// To a listener of a gateway; the host of each request decides.
    Gateway {
        /// Its port.
        port: u16,
        /// The listener, by name within the gateway, when TLS already chose it by SNI.
        listener: Option<Arc<str>>,
        /// TLS was terminated here.
        secure: bool,
    },
}

/// One connection as it reached us.
pub struct Conn {
    /// What all share.
    pub shared: Arc<Shared>,
    /// What it is for.
    pub scope: Scope,
    /// Address of the client itself.
    pub client: SocketAddr,
    /// Address it asked for.
    pub local: SocketAddr,
    /// Its proven identity; `None` outside the mesh.
    pub identity: Option<SpiffeId>,
    /// Its workload, for labels.
    pub source: Option<Arc<Workload>>,
    /// SNI, when it spoke TLS to us or through us.
    pub sni: Option<Arc<str>>,
    /// The route of what was addressed, for when none was written.
    pub plain: Option<Arc<HttpRoute>>,
    /// Ends with the process or the listener.
    pub drain: DrainWatch,
}
impl Conn {
    /// `https` when TLS was terminated here, else `http`.
    pub fn scheme(&self) -> &'static str {
        match self.scope {
            Scope::Gateway { secure: true, .. } => "https",
            _ => "http",
        }
    }
    /// Port the client addressed.
    pub fn port(&self) -> u16 {
        match &self.scope {
            Scope::Mesh(target) => target.port(),
            Scope::Gateway { port, .. } => *port,
        }
    }
}

/// The routes a request falls under.
pub enum Routes<'s> {
    /// This table.
    Table(&'s Arc<RouteTable>),
    /// None were written: what was addressed is what is meant.
    Plain,
    /// A gateway has nothing for this host.
    NoHost,
}
