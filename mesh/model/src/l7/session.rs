//! Sessions that stay with an endpoint (Gateway API `sessionPersistence`, GEP-1619), as Envoy's stateful session filter has
//! them: an answer names the endpoint it came from in a cookie or a header, and a request that brings the name back goes to
//! that endpoint while it is there and healthy; else it is balanced, and the answer names another.
//!
//! Envoy writes the endpoint's address, base64. Here the name is a hash, found again among the endpoints of the cluster and
//! nowhere else: it tells no address, and none can be chosen by it that is not an endpoint. It is the same in every process
//! and after a restart, so that replicas of a waypoint understand each other's; it is no secret and proves nothing.
use crate::l7::cookie;
use crate::l7::hash::xxh64;
use crate::l7::route::{Backend, BackendRef, ClusterKey};
use http::header::{HeaderMap, HeaderName, HeaderValue, SET_COOKIE};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// How sessions are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// What carries the name.
    pub carrier: Carrier,
    /// `absoluteTimeout`: no session is older, whatever a client keeps. `None`: as old as the client keeps it.
    pub lifetime: Option<Duration>,
}
/// What carries the name of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A cookie.
    Cookie {
        /// Its name.
        name: Arc<str>,
        /// Its path.
        path: Arc<str>,
        /// `lifetimeType: Permanent`: the client keeps it for the lifetime of the session, not until it is closed.
        permanent: bool,
    },
    /// A header, of answers and of the requests that bring it back.
    Header(HeaderName),
}

/// The name of an endpoint, as a client has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// [`backend`] of where it is.
    pub backend: u32,
    /// [`endpoint`].
    pub endpoint: u64,
    /// When the session ends, in seconds since 1970.
    pub expires: Option<u64>,
}

impl Session {
    /// The name a request brings, unless its session is over at `now` (seconds since 1970).
    pub fn asked(&self, headers: &HeaderMap, now: u64) -> Option<Ticket> {
        let text = match &self.carrier {
            Carrier::Cookie { name, .. } => cookie::find(headers, name)?,
            Carrier::Header(name) => headers.get(name)?.to_str().ok()?,
        };
        let ticket = parse(text)?;
        match (ticket.expires, self.lifetime) {
            // A later end than any that is given out now is of the client's making, or of a longer lifetime before.
            (Some(end), Some(lifetime)) if now < end && end <= now.saturating_add(seconds(lifetime)) => Some(ticket),
            (_, None) => Some(ticket),
            _ => None,
        }
    }

    /// The header of an answer that names the endpoint of a cluster, in a session that begins now; `None` when it cannot be
    /// written.
    pub fn tell(&self, cluster: &ClusterKey, endpoint: u64, now: u64) -> Option<(HeaderName, HeaderValue)> {
        let mut text = format!("{:08x}-{endpoint:016x}", backend(cluster));
        if let Some(lifetime) = self.lifetime {
            // Writing to a String does not fail.
            let _ = write!(text, "-{:x}", now.saturating_add(seconds(lifetime)));
        }
        match &self.carrier {
            Carrier::Header(name) => Some((name.clone(), HeaderValue::try_from(text).ok()?)),
            Carrier::Cookie { name, path, permanent } => {
                let kept = self.lifetime.filter(|_| *permanent).map_or(Duration::ZERO, |l| Duration::from_secs(seconds(l)));
                let cookie = cookie::set(name, &text, kept, Some(path), "");
                Some((SET_COOKIE, HeaderValue::try_from(cookie).ok()?))
            }
        }
    }
}

/// A lifetime in whole seconds, one at least.
fn seconds(lifetime: Duration) -> u64 {
    lifetime.as_secs().max(1)
}

fn parse(text: &str) -> Option<Ticket> {
    let hex = |part: &str| {
        let digits = (1..=16).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
        digits.then(|| u64::from_str_radix(part, 16).ok()).flatten()
    };
    let mut parts = text.split('-');
    let backend = u32::try_from(hex(parts.next()?)?).ok()?;
    let endpoint = hex(parts.next()?)?;
    let expires = match parts.next() {
        Some(end) => Some(hex(end)?),
        None => None,
    };
    parts.next().is_none().then_some(Ticket { backend, endpoint, expires })
}

/// What a cluster is called in a ticket.
pub fn backend(key: &ClusterKey) -> u32 {
    let port = xxh64(&key.port.to_be_bytes(), 0);
    let subset = xxh64(key.subset.as_deref().unwrap_or_default().as_bytes(), port);
    let namespace = xxh64(key.service.namespace.as_bytes(), subset);
    // Half of it is enough to tell the backends of a rule apart.
    xxh64(key.service.hostname.as_bytes(), namespace) as u32
}

/// What an endpoint is called in a ticket: a workload at an address.
pub fn endpoint(workload: &str, addr: SocketAddr) -> u64 {
    let port = xxh64(&addr.port().to_be_bytes(), 0);
    let ip = match addr.ip() {
        IpAddr::V4(ip) => xxh64(&ip.octets(), port),
        IpAddr::V6(ip) => xxh64(&ip.octets(), port),
    };
    xxh64(workload.as_bytes(), ip)
}

/// The backend of a rule that a session stays with, if the rule still has it.
pub fn kept(ticket: Ticket, backends: &[Backend]) -> Option<usize> {
    let named = |b: &Backend| matches!(&b.to, BackendRef::Service(key) if backend(key) == ticket.backend);
    backends.iter().position(named)
}

#[cfg(test)]
mod tests;
