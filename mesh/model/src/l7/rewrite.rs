//! New paths and locations.
//!
//! Owns: what a rewrite makes of a path and where a redirect points (Envoy's rules, with the Gateway API's for whole
//! segments). Refuses: headers (`x-envoy-original-path` is the phase's business). Queries are kept, never looked into.
use crate::l7::route::{HttpMatch, PathMatch, PathRewrite, Redirect, RedirectPort, RequestFacts};

/// The path a rewrite makes of `path` (both without query). `None`: what matched is not there to be replaced, the path stays.
///
/// What comes out always begins with `/`: a rewrite written without one (`uri: v2`) does not get to make a request line that
/// is no path.
pub fn path(rewrite: &PathRewrite, matched: &HttpMatch, path: &str) -> Option<String> {
    let mut new = match rewrite {
        PathRewrite::Full(x) => x.to_string(),
        PathRewrite::TextPrefix(x) => {
            let rest = path.get(matched_text(matched, path)?..)?;
            [x, rest].concat()
        }
        PathRewrite::SegmentPrefix(x) => {
            let rest = path.get(matched_segments(matched, path)?..)?;
            // `/x/` and `/x` are one replacement; the slash between it and the rest is the rest's.
            [x.strip_suffix('/').unwrap_or(x), rest].concat()
        }
        PathRewrite::Regex { pattern, replacement } => pattern.regex().replace_all(path, &**replacement).into_owned(),
    };
    if !new.starts_with('/') {
        new.insert(0, '/');
    }
    Some(new)
}

/// How many bytes of the path a text prefix rewrite replaces: the matched prefix, or all of it when the match was not by
/// prefix. A rule that says nothing about the path matches by the prefix `/` (so Istio translates it).
fn matched_text(matched: &HttpMatch, path: &str) -> Option<usize> {
    match &matched.path {
        Some(PathMatch::TextPrefix(p) | PathMatch::SegmentPrefix(p)) => begins(path, p, matched.ignore_case),
        Some(PathMatch::Exact(_) | PathMatch::Regex(_)) => Some(path.len()),
        None => begins(path, "/", false),
    }
}
/// How many bytes of the path the matched segments are, without the slash that follows them.
fn matched_segments(matched: &HttpMatch, path: &str) -> Option<usize> {
    match &matched.path {
        Some(PathMatch::TextPrefix(p) | PathMatch::SegmentPrefix(p)) => {
            begins(path, p.strip_suffix('/').unwrap_or(p), matched.ignore_case)
        }
        Some(PathMatch::Exact(_) | PathMatch::Regex(_)) => Some(path.len()),
        None => Some(0),
    }
}
/// The length of the prefix, if the path begins with it: another rewrite may have changed it since it matched.
fn begins(path: &str, prefix: &str, ignore_case: bool) -> Option<usize> {
    let head = path.get(..prefix.len())?;
    (head == prefix || ignore_case && head.eq_ignore_ascii_case(prefix)).then_some(prefix.len())
}

/// `Location` of a redirect.
///
/// Host and port are those of the request unless they are named; see [`RedirectPort`] for the port. The port 80 of `http`
/// and 443 of `https` are left out when they are named. The query is kept, unless the new path brings its own.
pub fn redirect_location(redirect: &Redirect, matched: &HttpMatch, req: &RequestFacts<'_>) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or(req.scheme);
    let (own_host, own_port) = split_port(req.authority);
    let (host, host_port) = match redirect.authority.as_deref() {
        Some(authority) => split_port(authority),
        // Another scheme: the default port of the old one would be a wrong port of the new one.
        None if scheme != req.scheme && own_port.is_some() && own_port == default_port(req.scheme) => (own_host, None),
        None => (own_host, own_port),
    };
    let named = |port: u16| Some(port).filter(|p| Some(*p) != default_port(scheme).and_then(|d| d.parse().ok()));
    let port = match redirect.port {
        RedirectPort::Unset => host_port.map(str::to_owned),
        RedirectPort::Number(port) => named(port).map(|p| p.to_string()),
        RedirectPort::ProtocolDefault => None,
        RedirectPort::FromRequest => named(req.port).map(|p| p.to_string()),
    };
    let rewritten = redirect.path.as_ref().and_then(|rewrite| path(rewrite, matched, req.path));
    let new_path = rewritten.as_deref().unwrap_or(req.path);
    let query = req.query.filter(|_| !redirect.strip_query && !new_path.contains('?'));

    let mut out = String::with_capacity(scheme.len() + host.len() + new_path.len() + query.map_or(0, str::len) + 12);
    out.push_str(scheme);
    out.push_str("://");
    out.push_str(host);
    if let Some(port) = port {
        out.push(':');
        out.push_str(&port);
    }
    out.push_str(new_path);
    if let Some(query) = query {
        out.push('?');
        out.push_str(query);
    }
    out
}

/// Host and port of an authority; the host keeps the brackets of an IPv6 address.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    }
}
fn default_port(scheme: &str) -> Option<&'static str> {
    match scheme {
        "http" => Some("80"),
        "https" => Some("443"),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
