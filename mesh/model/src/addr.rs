//! Address newtypes: mixing up who called, what was called and what we dial must not compile.
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

macro_rules! addr_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub SocketAddr);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.fmt(f) }
        }
        impl $name {
            /// The IP address, IPv4-mapped IPv6 already unmapped.
            pub fn ip(self) -> IpAddr { self.0.ip().to_canonical() }
            /// The port.
            pub fn port(self) -> u16 { self.0.port() }
        }
        impl From<SocketAddr> for $name {
            fn from(a: SocketAddr) -> Self { Self(SocketAddr::new(a.ip().to_canonical(), a.port())) }
        }
    };
}
addr_newtype!(/// Who opened the connection, as its TCP peer address.
    ClientAddr);
addr_newtype!(/// What the application asked for, before any plan.
    OrigDst);
addr_newtype!(/// What we connect to.
    DialAddr);

/// A network (cluster topology) name; the empty name is the default network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Network(pub Arc<str>);
impl Network {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl From<&str> for Network {
    fn from(s: &str) -> Self {
        Self(s.into())
    }
}

/// An IP address on a network: the key of workloads and VIPs (`network/ip` in Istio).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddr {
    /// The network.
    pub network: Network,
    /// The address, never IPv4-mapped.
    pub ip: IpAddr,
}
impl fmt::Display for NetworkAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network.0, self.ip)
    }
}

/// The `:authority` of an HBONE CONNECT.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HboneAuthority {
    /// `ip:port`.
    Addr(SocketAddr),
    /// `host:port`: a service by name (double HBONE, multi-network).
    Name {
        /// Lower-case host name, no trailing dot.
        host: Arc<str>,
        /// The service's port.
        port: u16,
    },
}
impl HboneAuthority {
    /// The port, in either form.
    pub fn port(&self) -> u16 {
        match self {
            Self::Addr(a) => a.port(),
            Self::Name { port, .. } => *port,
        }
    }
    /// Parses an authority: an address with port or a host name with port; anything else is `None` (status 400).
    pub fn parse(s: &str) -> Option<Self> {
        if let Ok(a) = s.parse::<SocketAddr>() {
            return Some(Self::Addr(SocketAddr::new(a.ip().to_canonical(), a.port())));
        }
        let (host, port) = s.rsplit_once(':')?;
        let port = port.bytes().all(|b| b.is_ascii_digit()).then(|| port.parse::<u16>().ok())??;
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.is_empty() || host.len() > 253 {
            return None;
        }
        let label_ok =
            |l: &str| !l.is_empty() && l.len() <= 63 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        // A host of digits and dots only is a broken address, not a name.
        if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') || !host.split('.').all(label_ok) {
            return None;
        }
        Some(Self::Name { host: host.to_ascii_lowercase().into(), port })
    }
}
impl fmt::Display for HboneAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(a) => a.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// The host of an authority that has a port; `None` when it has none. Brackets of IPv6 addresses stay.
pub fn without_port(authority: &str) -> Option<&str> {
    let (host, port) = authority.rsplit_once(':')?;
    port.bytes().all(|b| b.is_ascii_digit()).then_some(host)
}
