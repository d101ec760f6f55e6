//! What is known of one connection as it reached us, whoever asks.
use crate::upstream::Role;
use mesh_model::SpiffeId;
use mesh_model::l7::HttpRoute;
use mesh_model::service::Service;
use mesh_model::telemetry::context::TraceParent;
use mesh_model::waypoint::Target;
use mesh_model::workload::Workload;
use std::net::SocketAddr;
use std::sync::Arc;

/// Where requests of a connection are to go before any route is looked at.
#[derive(Clone, Debug)]
pub enum Scope {
    /// Through a tunnel to what was addressed.
    Mesh(Target),
    /// Through a tunnel from another network, to be carried on as it is.
    Network {
        /// The service that was asked for.
        service: Arc<Service>,
        /// Its port.
        port: u16,
    },
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

/// The facts of one connection.
#[derive(Clone, Debug)]
pub struct Facts {
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
    /// The span of the connection, if whoever opened it tells of it (`traceparent` of a CONNECT).
    pub trace: Option<TraceParent>,
    /// SNI, when it spoke TLS to us or through us.
    pub sni: Option<Arc<str>>,
    /// The route of what was addressed, for when none was written.
    pub plain: Option<Arc<HttpRoute>>,
}
impl Facts {
    /// As what we carry it on.
    pub fn role(&self) -> Role {
        match self.scope {
            Scope::Mesh(_) | Scope::Network { .. } => Role::Waypoint,
            Scope::Gateway { .. } => Role::Gateway,
        }
    }
    /// `https` when TLS was terminated here, else `http`.
    pub fn scheme(&self) -> &'static str {
        match self.scope {
            Scope::Gateway { secure: true, .. } => "https",
            _ => "http",
        }
    }
    /// The address the client asked for, where it asked for one: not of a gateway's listener, which is our own, and not by name.
    pub fn asked(&self) -> Option<SocketAddr> {
        matches!(self.scope, Scope::Mesh(_)).then_some(self.local).filter(|asked| !asked.ip().is_unspecified())
    }
    /// The service the client addressed, inside the mesh.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match &self.scope {
            Scope::Mesh(target) => target.service(),
            Scope::Network { service, .. } => Some(service),
            Scope::Gateway { .. } => None,
        }
    }
    /// Port the client addressed.
    pub fn port(&self) -> u16 {
        match &self.scope {
            Scope::Mesh(target) => target.port(),
            Scope::Network { port, .. } | Scope::Gateway { port, .. } => *port,
        }
    }
}
