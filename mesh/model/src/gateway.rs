//! References between objects: to a service by its key, to a waypoint or network gateway in front of one.
use crate::addr::Network;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

/// `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Fully qualified, lower-case host name; may start with `*.`.
    pub hostname: Arc<str>,
}
impl ServiceKey {
    /// A key from its parts.
    pub fn new(namespace: &str, hostname: &str) -> Self {
        Self { namespace: namespace.into(), hostname: hostname.into() }
    }
}
impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// Where a waypoint or network gateway listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayRef {
    /// By service name or by address.
    pub destination: GatewayDestination,
    /// Port of its HBONE listener (15008 by default).
    pub hbone_port: u16,
}
/// The destination of a [`GatewayRef`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// `namespace/hostname`.
    Service(ServiceKey),
    /// `network/ip`.
    Address(Network, IpAddr),
}
