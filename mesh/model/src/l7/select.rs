//! Which rule a request or connection is for.
//!
//! Owns: the meaning of every condition of a [`HttpMatch`] (spec/waypoint §3.1, §3.2) and "first match wins". Refuses: order
//! (translators put the rules into the order of their API) and weights ([`crate::l7::weights`]).
use crate::l7::route::{GrpcMatch, HttpMatch, HttpRule, PathMatch, RequestFacts, RouteTable, TcpFacts, TcpRoute, TlsRule};
use crate::l7::text::StringMatch;
use http::header::{COOKIE, HeaderMap, HeaderName, HeaderValue};
use std::borrow::Cow;
use std::sync::Arc;

/// What a table says about a request.
#[derive(Clone, Copy, Debug)]
pub enum Selected<'t> {
    /// This rule.
    Rule(&'t HttpRule),
    /// The table has no HTTP rules: the service itself is meant ([`crate::l7::HttpRoute::plain`]).
    Default,
    /// There are rules and none matches: 404.
    NotFound,
    /// The table could not be understood: 500 with this text.
    Broken(&'t Arc<str>),
}

/// The rule for a request: the first that matches, found by the table's index.
pub fn select<'t>(table: &'t RouteTable, req: &RequestFacts<'_>) -> Selected<'t> {
    if let Some(why) = &table.broken {
        return Selected::Broken(why);
    }
    if table.http.is_empty() {
        return Selected::Default;
    }
    table.http.find(req).map_or(Selected::NotFound, Selected::Rule)
}

/// Whether all conditions hold. Cheap ones are asked first, patterns where they stand.
pub fn matches(m: &HttpMatch, req: &RequestFacts<'_>) -> bool {
    m.port.is_none_or(|p| p == req.port)
        && m.method.as_ref().is_none_or(|x| x.matches(req.method.as_str()))
        && m.path.as_ref().is_none_or(|p| path_matches(p, m.ignore_case, req.path))
        && m.scheme.as_ref().is_none_or(|x| x.matches(req.scheme))
        && m.authority.as_ref().is_none_or(|x| x.matches(req.authority))
        && m.grpc.as_ref().is_none_or(|g| grpc_matches(g, req.path))
        && m.headers.iter().all(|(name, x)| header_matches(x, name, req.headers))
        && !m.without_headers.iter().any(|(name, x)| forbidden(x, name, req.headers))
        && m.query.iter().all(|(name, x)| query_value(req.query, name).is_some_and(|v| x.matches(v)))
        && m.claims.iter().all(|(path, x)| req.claims.is_some_and(|c| c.matches(path, x)))
        && !m.without_claims.iter().any(|(path, x)| req.claims.is_some_and(|c| c.matches(path, x)))
}

/// Whether any value of a header matches: each line of the same name is one value (Envoy 1.40 does not join them). Only the
/// lines of `cookie` are also one text, since HTTP/2 may cut it in pieces (RFC 9113 §8.2.3).
fn header_matches(x: &StringMatch, name: &HeaderName, headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(name).iter();
    let Some(first) = values.next() else { return false };
    if x.matches(&text(first)) {
        return true;
    }
    // Almost always there is no second.
    let mut rest = values.peekable();
    if rest.peek().is_none() {
        return false;
    }
    *name == COOKIE && x.matches(&joined(headers, name, "; ")) || rest.any(|value| x.matches(&text(value)))
}
/// Whether what must not be there is there: a header that is missing says the empty text (Istio sets
/// `treat_missing_header_as_empty`), unless only its presence is asked for.
fn forbidden(x: &StringMatch, name: &HeaderName, headers: &HeaderMap) -> bool {
    header_matches(x, name, headers) || *x != StringMatch::Present && !headers.contains_key(name) && x.matches("")
}
/// A value as text. Bytes that are no UTF-8 are replaced, so that a prefix in front of them is still seen.
pub(crate) fn text(value: &HeaderValue) -> Cow<'_, str> {
    String::from_utf8_lossy(value.as_bytes())
}
/// All values of a header in one text.
pub(crate) fn joined(headers: &HeaderMap, name: &HeaderName, separator: &str) -> String {
    let mut out = String::new();
    for (at, value) in headers.get_all(name).iter().enumerate() {
        if at > 0 {
            out.push_str(separator);
        }
        out.push_str(&text(value));
    }
    out
}

fn path_matches(p: &PathMatch, ignore_case: bool, path: &str) -> bool {
    let same = |a: &str, b: &str| if ignore_case { a.eq_ignore_ascii_case(b) } else { a == b };
    let starts = |prefix: &str| path.get(..prefix.len()).is_some_and(|head| same(head, prefix));
    match p {
        PathMatch::Exact(x) => same(path, x),
        PathMatch::TextPrefix(x) => starts(x),
        PathMatch::SegmentPrefix(x) => {
            // Written without a trailing slash; one that is there all the same means nothing, as the API has it.
            let x = x.strip_suffix('/').unwrap_or(x);
            starts(x) && matches!(path.as_bytes().get(x.len()), None | Some(b'/'))
        }
        PathMatch::Regex(pattern) => pattern.is_match(path),
    }
}

/// gRPC's path is `/<service>/<method>`; anything else is no gRPC call and matches only where nothing is asked.
fn grpc_matches(g: &GrpcMatch, path: &str) -> bool {
    if g.service.is_none() && g.method.is_none() {
        return true;
    }
    let Some((service, method)) = path.strip_prefix('/').and_then(|p| p.split_once('/')) else { return false };
    g.service.as_ref().is_none_or(|x| x.matches(service)) && g.method.as_ref().is_none_or(|x| x.matches(method))
}

/// The first value of a query parameter, as written (Envoy matches routes on the encoded text); without `=` it is empty.
pub(crate) fn query_value<'q>(query: Option<&'q str>, name: &str) -> Option<&'q str> {
    query?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

/// The route of a TCP or TLS connection: TLS rules by SNI first, then TCP rules. `None`: the service itself.
pub fn select_tcp<'t>(table: &'t RouteTable, conn: &TcpFacts<'_>) -> Option<&'t Arc<TcpRoute>> {
    let at_port = |port: Option<u16>| port.is_none_or(|p| p == conn.port);
    let by_name = |sni: &str| table.tls.iter().find(|r| at_port(r.port) && serves(r, sni)).map(|r| &r.route);
    let by_address = || {
        let within = |nets: &[ipnet::IpNet]| {
            nets.is_empty() || conn.destination.is_some_and(|ip| nets.iter().any(|net| net.contains(&ip.to_canonical())))
        };
        table.tcp.iter().find(|r| at_port(r.port) && within(&r.destinations)).map(|r| &r.route)
    };
    conn.sni.and_then(by_name).or_else(by_address)
}
fn serves(rule: &TlsRule, sni: &str) -> bool {
    rule.sni.iter().any(|pattern| host_matches(pattern, sni))
}
/// Whether a host name is an exact or wildcard pattern's: `*` is every name, `*.a.b` every name below `a.b` at any depth
/// (Envoy's server names, the Gateway API's host names) but not `a.b`. Case does not count (RFC 4343).
pub fn host_matches(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        None => pattern.eq_ignore_ascii_case(host),
        Some(suffix) => host
            .len()
            .checked_sub(suffix.len())
            .is_some_and(|at| at > 0 && host.get(at..).is_some_and(|tail| tail.eq_ignore_ascii_case(suffix))),
    }
}

#[cfg(test)]
mod tests;
