//! `sessionPersistence` of routes and of XBackendTrafficPolicies.

use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderName};
use mesh_model::l7::hash::xxh64;
use mesh_model::l7::route::PathMatch;
use mesh_model::l7::session::{Carrier, Session};

use super::super::destination_rule::cookie_text;
use super::super::object::Reader;
use super::super::read::{self, Bad, Read};
use super::route;
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// A session as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    carrier: AskedCarrier,
    lifetime: Option<Duration>,
}
#[derive(Clone, Debug, PartialEq, Eq)]
enum AskedCarrier {
    Cookie { name: Option<Arc<str>>, path: Arc<str>, permanent: bool },
    Header(Option<HeaderName>),
}
impl Asked {
    /// What it means. Without a name of its own it gets one made of `of`, which tells it apart from others of the host.
    pub(super) fn session(self, of: &str) -> Arc<Session> {
        let own = || format!("culvert-session-{:08x}", xxh64(of.as_bytes(), 0) as u32);
        let carrier = match self.carrier {
            AskedCarrier::Cookie { name, path, permanent } => {
                Carrier::Cookie { name: name.unwrap_or_else(|| own().into()), path, permanent }
            }
            AskedCarrier::Header(name) => {
                // Letters, digits and dashes are a header's name.
                let made =
                    || HeaderName::try_from(format!("x-{}", own())).unwrap_or(HeaderName::from_static("x-culvert-session"));
                Carrier::Header(name.unwrap_or_else(made))
            }
        };
        Arc::new(Session { carrier, lifetime: self.lifetime })
    }
}

/// Headers that say something else already.
const TAKEN: &[HeaderName] = &[
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::COOKIE,
    header::HOST,
    header::LOCATION,
    header::SET_COOKIE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Reads `sessionPersistence` of `owner`, a part of `root`. `path`: of the cookie.
pub(super) fn read<'p>(r: &mut Reader<'_>, root: &'p Node<'p>, owner: &'p Node<'p>, path: &str) -> Read<'p, Option<Asked>> {
    let Some(s) = read::map(owner, "sessionPersistence")? else { return Ok(None) };
    read::only(s, &["sessionName", "absoluteTimeout", "idleTimeout", "type", "cookieConfig"])?;
    let by_header = match s.get("type").map(read::scalar).transpose()? {
        None | Some("Cookie") => false,
        Some("Header") => true,
        Some(t) => {
            let at = s.get("type").unwrap_or(s);
            return Err(Bad::value(at, format!("`{t}` is not a type of session"), "write Cookie or Header"));
        }
    };
    let lifetime = s.get("absoluteTimeout").map(|n| Ok((n, route::duration(n)?))).transpose()?;
    if let Some((n, Duration::ZERO)) = lifetime {
        return Err(Bad::value(n, "a session that ends at once", "write for example `1h`, or leave it out"));
    }
    if let Some(at) = s.get("idleTimeout") {
        let message = "sessions do not end for being idle; this field has no effect".into();
        let bad = Bad { at, missing: None, message, fix: "use absoluteTimeout", code: "unsupported-field" };
        r.report(root, &bad, Severity::Error);
    }
    let permanent = match read::map(s, "cookieConfig")? {
        None => false,
        Some(at) if by_header => {
            return Err(Bad::value(at, "a session by header has no cookie", "remove it, or write `type: Cookie`"));
        }
        Some(c) => {
            read::only(c, &["lifetimeType"])?;
            match c.get("lifetimeType").map(read::scalar).transpose()? {
                None | Some("Session") => false,
                Some("Permanent") if lifetime.is_some() => true,
                Some("Permanent") => {
                    let message = "a permanent cookie needs the time it is kept for";
                    return Err(Bad::missing(s, "absoluteTimeout", message));
                }
                Some(t) => {
                    let at = c.get("lifetimeType").unwrap_or(c);
                    return Err(Bad::value(at, format!("`{t}` is not a lifetime of cookies"), "write Session or Permanent"));
                }
            }
        }
    };
    let name = s.get("sessionName").map(|n| Ok((n, read::scalar(n)?))).transpose()?.filter(|(_, t)| !t.is_empty());
    let carrier = if by_header {
        AskedCarrier::Header(name.map(|(n, t)| header_name(n, t)).transpose()?)
    } else {
        let name = match name {
            None => None,
            Some((_, t)) if t.len() <= MAX_NAME && cookie_text(t) && !t.contains('=') => Some(r.pool.text(t)),
            Some((n, t)) => return Err(Bad::value(n, format!("`{t}` is not a cookie name"), "use letters, digits, `-` and `_`")),
        };
        AskedCarrier::Cookie { name, path: r.pool.text(path), permanent }
    };
    Ok(Some(Asked { carrier, lifetime: lifetime.map(|(_, d)| d) }))
}

/// The API server's limit.
const MAX_NAME: usize = 128;

fn header_name<'p>(n: &'p Node<'p>, text: &str) -> Read<'p, HeaderName> {
    let name = HeaderName::from_bytes(text.as_bytes()).ok().filter(|name| text.len() <= MAX_NAME && !TAKEN.contains(name));
    name.ok_or_else(|| Bad::value(n, format!("`{text}` is not a header for sessions"), "write a name such as `x-session`"))
}

/// The path all requests of a rule with these matches have in common, for its cookie (GEP-1619): of patterns nothing is known.
pub(super) fn common_path<'m>(paths: impl Iterator<Item = Option<&'m PathMatch>>) -> String {
    let mut common: Option<Vec<&str>> = None;
    for path in paths {
        let path: Vec<&str> = match path {
            Some(PathMatch::Exact(p) | PathMatch::SegmentPrefix(p)) => p.split('/').skip(1).collect(),
            _ => Vec::new(),
        };
        common = Some(match common {
            None => path,
            Some(before) => before.into_iter().zip(path).take_while(|(a, b)| a == b).map(|(a, _)| a).collect(),
        });
    }
    let common = common.unwrap_or_default().join("/");
    // What a cookie cannot say is left to the rule.
    if cookie_text(&common) { format!("/{common}") } else { "/".into() }
}
