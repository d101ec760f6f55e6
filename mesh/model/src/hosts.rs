//! Which routes a host has on a gateway: the most specific listener hostname first, then the most specific route hostname
//! (Gateway API).
use crate::addr::without_port;
use crate::l7::gateway::{GatewayKey, Listener, ListenerProtocol};
use crate::l7::route::RouteTable;
use crate::l7::select::host_matches;
use crate::snapshot::Snapshot;
use std::borrow::Cow;
use std::cmp::Reverse;
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
/// The order of a listener's hosts ([`Listener::hosts`]): exact names, then wildcards, then `*`; of each the longer first.
pub fn order(host: &str) -> (u8, Reverse<usize>, &str) {
    let class = if host == "*" { 2 } else { u8::from(host.starts_with('*')) };
    (class, Reverse(host.len()), host)
}
/// The routes of a listener for a host: its own, or those of the longest wildcard above it. A look-up per label, however many
/// hosts there are.
fn hosts<'s>(listener: &'s Listener, host: &str) -> Option<&'s Arc<RouteTable>> {
    let lower = if host.bytes().any(|b| b.is_ascii_uppercase()) { Cow::Owned(host.to_ascii_lowercase()) } else { host.into() };
    let own = find(&listener.hosts, (0, Reverse(lower.len()), &lower), "");
    let wildcard = |(at, _): (usize, char)| {
        let suffix = lower.get(at..).filter(|_| at > 0)?;
        find(&listener.hosts, (1, Reverse(suffix.len() + 1), suffix), "*")
    };
    let above = || lower.char_indices().filter(|(_, c)| *c == '.').find_map(wildcard);
    own.or_else(above).or_else(|| listener.hosts.last().filter(|(host, _)| **host == *"*").map(|(_, table)| table))
}
/// The table whose host is `star` and the text of `wanted`, which has its place in the order.
fn find<'s>(
    hosts: &'s [(Arc<str>, Arc<RouteTable>)],
    wanted: (u8, Reverse<usize>, &str),
    star: &str,
) -> Option<&'s Arc<RouteTable>> {
    let found = hosts.binary_search_by(|(host, _)| {
        let (class, len, host) = order(host);
        (class, len, host.strip_prefix(star).unwrap_or(host)).cmp(&wanted)
    });
    found.ok().and_then(|at| hosts.get(at)).map(|(_, table)| table)
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
    use crate::fixture::view;
    use crate::l7::gateway::GatewayRoutes;

    /// A gateway of these listeners: name, port, protocol, host, and the hosts of its routes.
    type Row = (&'static str, u16, ListenerProtocol, Option<&'static str>, &'static [&'static str]);
    fn gateway(rows: &[Row]) -> Snapshot {
        let table = |listener: &str, host: &str| {
            // Told apart by what they are broken by.
            Arc::new(RouteTable { broken: Some(format!("{listener} {host}").into()), ..RouteTable::default() })
        };
        let listeners = rows.iter().map(|(name, port, protocol, hostname, hosts)| Listener {
            name: (*name).into(),
            port: *port,
            protocol: *protocol,
            hostname: hostname.map(Into::into),
            tls: None,
            clients: None,
            hosts: sorted(hosts).map(|host| (host.into(), table(name, host))).collect(),
            broken: name.starts_with("broken").then(|| "a reason".into()),
        });
        let key = GatewayKey::new("a", "gw");
        let routes = GatewayRoutes { key, listeners: listeners.collect(), origin: None };
        Snapshot::empty(view()).apply(&[crate::change::Change::Gateway(Arc::new(routes))])
    }
    fn sorted<'h>(hosts: &[&'h str]) -> impl Iterator<Item = &'h str> {
        let mut hosts = hosts.to_vec();
        hosts.sort_by_key(|host| order(host));
        hosts.into_iter()
    }
    fn told(table: Option<&Arc<RouteTable>>) -> Option<&str> {
        table.and_then(|t| t.broken.as_deref())
    }

    #[test]
    fn the_listener_first_then_the_route() {
        use ListenerProtocol::{Http, Https};
        let snap = gateway(&[
            ("all", 80, Http, None, &["*", "*.b.com", "x.b.com"]),
            ("sub", 80, Http, Some("*.b.com"), &["*.b.com"]),
            ("one", 80, Http, Some("y.b.com"), &["y.b.com"]),
            ("empty", 80, Http, Some("*.e.com"), &[]),
            ("broken", 80, Http, Some("z.b.com"), &["z.b.com"]),
            ("other-port", 81, Http, None, &["x.b.com"]),
            ("tls", 443, Https, Some("*.b.com"), &["x.b.com"]),
            ("tls-all", 443, Https, None, &["*"]),
        ]);
        let key = GatewayKey::new("a", "gw");
        for (port, listener, secure, authority, want) in [
            (80, None, false, "a.com", Some("all *")),
            (80, None, false, "a.com:80", Some("all *")),
            // The listener's host decides, even where another listener has a route that fits better.
            (80, None, false, "x.b.com", Some("sub *.b.com")),
            (80, None, false, "X.B.com:8080", Some("sub *.b.com")),
            (80, None, false, "y.b.com", Some("one y.b.com")),
            (80, None, false, "b.com", Some("all *")),
            // A listener without a route for the host has nothing: the next best is another's business.
            (80, None, false, "x.e.com", None),
            // One that cannot be used is not there.
            (80, None, false, "z.b.com", Some("sub *.b.com")),
            (81, None, false, "x.b.com", Some("other-port x.b.com")),
            (81, None, false, "y.b.com", None),
            (82, None, false, "x.b.com", None),
            (443, Some("tls"), true, "x.b.com", Some("tls x.b.com")),
            (443, Some("tls-all"), true, "a.com", Some("tls-all *")),
            // What TLS was ended for another listener may not ask for this one's hosts.
            (443, Some("tls-all"), true, "x.b.com", None),
            (443, Some("tls"), true, "a.com", None),
            // Plain requests have nothing on an HTTPS port, nor the other way round.
            (443, None, false, "x.b.com", None),
            (80, None, true, "x.b.com", None),
            (80, None, false, "", Some("all *")),
        ] {
            let found = match table(&key, &snap, port, listener, secure, authority) {
                Routes::Table(table) => told(Some(table)),
                Routes::NoHost => None,
                Routes::Plain => Some("plain"),
            };
            assert_eq!(found, want, "{port} {listener:?} {secure} {authority}");
        }
        assert!(matches!(table(&GatewayKey::new("a", "none"), &snap, 80, None, false, "a.com"), Routes::NoHost));
    }
    /// As asking every pattern how well it fits.
    #[test]
    fn a_host_is_found_as_by_asking_all() {
        let labels = ["a", "b", "c"];
        let names = |n: usize| labels.iter().cycle().skip(n % 3).take(1 + n % 4).copied().collect::<Vec<_>>().join(".");
        let all: Vec<String> = (0..24).flat_map(|n| [names(n), format!("*.{}", names(n / 2))]).chain(["*".into()]).collect();
        for step in 1..all.len() {
            let mut patterns: Vec<&str> = all.iter().step_by(step).map(String::as_str).collect();
            patterns.sort_unstable();
            patterns.dedup();
            let snap = gateway(&[("l", 80, ListenerProtocol::Http, None, &[])]);
            let mut listener = snap.find_gateway(&GatewayKey::new("a", "gw")).unwrap().listeners[0].clone();
            listener.hosts = sorted(&patterns).map(|host| (host.into(), Arc::default())).collect();
            for host in all.iter().map(|h| h.replace('*', "X")).chain([String::new(), ".a".into(), "A.B".into(), "..b".into()]) {
                let asked = listener.hosts.iter().filter_map(|(pattern, t)| Some((fits(pattern, &host)?, t)));
                let want = asked.max_by_key(|(fit, _)| *fit).map(|(_, t)| Arc::as_ptr(t));
                assert_eq!(hosts(&listener, &host).map(Arc::as_ptr), want, "{host} of {patterns:?}");
            }
        }
    }
    #[test]
    fn bytes_go_by_the_name_in_tls() {
        use ListenerProtocol::{Http, Tcp, Tls};
        let snap = gateway(&[
            ("pass", 8443, Tls, Some("*.p.com"), &["a.p.com", "*.p.com"]),
            ("rest", 8443, Tls, None, &["q.com"]),
            ("bytes", 9000, Tcp, None, &["*"]),
            ("http", 80, Http, None, &["*"]),
        ]);
        let key = GatewayKey::new("a", "gw");
        for (port, listener, sni, want) in [
            (8443, None, Some("a.p.com"), Some("pass a.p.com")),
            (8443, None, Some("b.p.com"), Some("pass *.p.com")),
            (8443, None, Some("q.com"), Some("rest q.com")),
            (8443, None, Some("r.com"), None),
            (8443, None, None, None),
            (8443, Some("pass"), Some("q.com"), None),
            (9000, None, None, Some("bytes *")),
            (9000, None, Some("a.p.com"), Some("bytes *")),
            (80, None, None, None),
        ] {
            let found = tcp_table(&key, &snap, port, listener, sni);
            assert_eq!(told(found.as_ref()), want, "{port} {listener:?} {sni:?}");
        }
    }
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
