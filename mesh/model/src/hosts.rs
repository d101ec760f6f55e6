//! Which routes a host has on a gateway: the most specific listener hostname first, then the most specific route hostname
//! (Gateway API).
use crate::addr::without_port;
use crate::l7::gateway::{GatewayKey, Listener, ListenerProtocol};
use crate::l7::route::RouteTable;
use crate::l7::select::host_matches;
use crate::snapshot::Snapshot;
use std::sync::Arc;

/// The routes a request falls under.
pub enum Routes<'s> {
    /// This table.
    Table(&'s Arc<RouteTable>),
    /// None were written: what was addressed is what is meant.
    Plain,
    /// A gateway has nothing for this host.
    NoHost,
}

/// How well `pattern` (exact, `*.suffix`, `*`) fits `host`: longer is better, exact best; `None` when not at all.
pub fn fits(pattern: &str, host: &str) -> Option<usize> {
    if pattern == "*" {
        return Some(0);
    }
    host_matches(pattern, host).then(|| pattern.strip_prefix('*').map_or(usize::MAX, str::len))
}

/// The host of an authority, without its port.
pub fn host_of(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    without_port(authority).unwrap_or(authority)
}

/// Of a gateway's listeners on `port` that `accept` takes the one that fits `host` best.
pub fn best<'s>(
    gateway: &GatewayKey,
    snap: &'s Snapshot,
    port: u16,
    host: &str,
    accept: impl Fn(&Listener) -> bool,
) -> Option<&'s Listener> {
    let gateway = snap.find_gateway(gateway)?;
    let of_port = gateway.listeners.iter().filter(|l| l.port == port && l.broken.is_none() && accept(l));
    of_port
        .filter_map(|l| Some((fits(l.hostname.as_deref().unwrap_or("*"), host)?, l)))
        .max_by_key(|(fit, _)| *fit)
        .map(|(_, l)| l)
}
/// The routes of a listener for a host.
fn hosts<'s>(listener: &'s Listener, host: &str) -> Option<&'s Arc<RouteTable>> {
    let fitting = listener.hosts.iter().filter_map(|(pattern, table)| Some((fits(pattern, host)?, table)));
    fitting.max_by_key(|(fit, _)| *fit).map(|(_, table)| table)
}

/// The HTTP routes of a request to a gateway. `listener`: what TLS chose; a request for a host of another listener gets no
/// routes (it would go around that listener's certificate).
pub fn table<'s>(
    gateway: &GatewayKey,
    snap: &'s Snapshot,
    port: u16,
    listener: Option<&str>,
    secure: bool,
    authority: &str,
) -> Routes<'s> {
    let host = host_of(authority);
    let protocol = if secure { ListenerProtocol::Https } else { ListenerProtocol::Http };
    let found = best(gateway, snap, port, host, |l| l.protocol == protocol);
    let found = found.filter(|l| listener.is_none_or(|name| *l.name == *name));
    found.and_then(|l| hosts(l, host)).map_or(Routes::NoHost, Routes::Table)
}

/// The TCP or TLS routes of a connection to a gateway.
pub fn tcp_table(
    gateway: &GatewayKey,
    snap: &Snapshot,
    port: u16,
    listener: Option<&str>,
    sni: Option<&str>,
) -> Option<Arc<RouteTable>> {
    let host = sni.unwrap_or_default();
    let bytes = |l: &Listener| matches!(l.protocol, ListenerProtocol::Tls | ListenerProtocol::Tcp);
    let found = best(gateway, snap, port, host, |l| bytes(l) && listener.is_none_or(|name| *l.name == *name))?;
    hosts(found, host).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_fit_by_specificity() {
        assert_eq!(fits("*", "a.b"), Some(0));
        assert_eq!(fits("*.b", "a.b"), Some(2));
        assert_eq!(fits("*.b", "x.a.B"), Some(2));
        assert_eq!(fits("*.b", "b"), None);
        assert_eq!(fits("*.b", ".b"), None, "a wildcard is at least one character");
        assert_eq!(fits("A.b", "a.B"), Some(usize::MAX));
        assert_eq!(fits("a.b", "a.c"), None);
    }
    #[test]
    fn ports_are_not_part_of_a_host() {
        for (authority, host) in
            [("a.b:80", "a.b"), ("a.b", "a.b"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("a:b", "a:b"), ("", "")]
        {
            assert_eq!(host_of(authority), host);
        }
    }
}
