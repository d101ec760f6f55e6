//! Gateways: listeners of a Gateway API `Gateway` that face the outside (ingress) and the routes attached to them.
use crate::l7::destination::KeyPair;
use crate::l7::route::RouteTable;
use crate::origin::Origin;
use std::fmt;
use std::sync::Arc;

/// `namespace/name` of a Gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GatewayKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}
impl GatewayKey {
    /// A key from its parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}
impl fmt::Display for GatewayKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Everything one Gateway listens for, with the routes attached to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayRoutes {
    /// Which.
    pub key: GatewayKey,
    /// Listeners, in the order of the object.
    pub listeners: Vec<Listener>,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
impl GatewayRoutes {
    /// This gateway with the tables of all its hosts indexed; those that are stay shared.
    #[must_use]
    pub fn indexed(mut self) -> Self {
        for (_, table) in self.listeners.iter_mut().flat_map(|l| &mut l.hosts) {
            if !table.is_indexed() {
                *table = Arc::new(RouteTable::clone(table).indexed());
            }
        }
        self
    }
    /// Whether all tables are indexed.
    pub fn is_indexed(&self) -> bool {
        self.listeners.iter().flat_map(|l| &l.hosts).all(|(_, table)| table.is_indexed())
    }
}
/// One listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// `name` of the listener (a section name).
    pub name: Arc<str>,
    /// Port.
    pub port: u16,
    /// What is spoken.
    pub protocol: ListenerProtocol,
    /// Host name it is for: exact, `*.suffix`, or `None` for all.
    pub hostname: Option<Arc<str>>,
    /// TLS, for HTTPS and TLS listeners.
    pub tls: Option<ListenerTls>,
    /// Certificates of clients, where they are asked for.
    pub clients: Option<Arc<ClientCertificates>>,
    /// Routes by host name of the route in lower case: exact, `*.suffix`, or `*`; in the order of [`crate::hosts::order`].
    pub hosts: Vec<(Arc<str>, Arc<RouteTable>)>,
    /// Cannot be used (missing certificate, protocol unknown, port taken by another protocol): not listened on.
    pub broken: Option<Arc<str>>,
}
/// Protocol of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenerProtocol {
    /// Plain HTTP.
    Http,
    /// HTTP over TLS terminated here.
    Https,
    /// TLS: passed through by SNI, or terminated and carried as TCP.
    Tls,
    /// TCP.
    Tcp,
}
/// Whose certificates clients of a listener have (mutual TLS). A client with any other is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificates {
    /// PEM of the authorities that issue them.
    pub roots: Arc<str>,
    /// PEM of their revocation lists; where there are any, each certificate of a chain must be on none of them, and each issuer
    /// must have one that is in date (Envoy: `crl`).
    pub crl: Option<Arc<str>>,
    /// A client without a certificate is refused too; else it is served without one (Istio: `OPTIONAL_MUTUAL`).
    pub required: bool,
}
/// TLS of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenerTls {
    /// `mode: Passthrough`.
    Passthrough,
    /// `mode: Terminate` with these certificates (Secrets of type `kubernetes.io/tls`).
    Terminate(Vec<KeyPair>),
    /// Terminated with certificates from files (`culvert.dev/tls-certificate`, `culvert.dev/tls-key` in `tls.options`),
    /// watched for renewal.
    Files {
        /// PEM chain.
        chain: Arc<str>,
        /// PEM key.
        key: Arc<str>,
    },
}
