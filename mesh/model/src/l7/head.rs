//! The head of a request: whether it is one we carry, and what of it is not for the endpoint to hear (Envoy's connection
//! manager; RFC 9110 and 9112, where they leave two ways to read one message the answer is a refusal).
//!
//! Owns: authority, hop-by-hop headers, upgrades, headers only we may set, forwarded-for. Refuses: the path
//! ([`crate::l7::path`]), the request id, which is drawn. Upstream: the waypoint's phase `admit`.
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode, Uri, Version};
use std::fmt::Write as _;
use std::net::IpAddr;

/// `x-forwarded-for`.
pub const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// `x-forwarded-proto`.
pub const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `x-forwarded-client-cert`.
pub const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// Headers only we may set: a client that sends them could make us believe things (Envoy: internal headers).
const INTERNAL: [&str; 12] = [
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-internal",
    "x-envoy-max-retries",
    "x-envoy-original-dst-host",
    // What the log says the path was, by Istio's default format.
    "x-envoy-original-host",
    "x-envoy-original-path",
    "x-envoy-retry-on",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-retry-grpc-on",
];

/// The authority: the request's own in HTTP/2, `Host` in HTTP/1; empty where there is none.
pub fn authority(uri: &Uri, headers: &HeaderMap) -> String {
    match uri.authority() {
        Some(authority) => authority.as_str().to_owned(),
        None => headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default().to_owned(),
    }
}

/// What the client used to get here, if it says so: in HTTP/2 itself, in HTTP/1 a proxy before us may.
pub fn scheme(parts: &Parts) -> Option<&'static str> {
    let known = |text: &str| match text {
        _ if text.eq_ignore_ascii_case("https") => Some("https"),
        _ if text.eq_ignore_ascii_case("http") => Some("http"),
        _ => None,
    };
    let forwarded = || known(parts.headers.get(FORWARDED_PROTO)?.to_str().ok()?);
    let own = if parts.version == Version::HTTP_2 { parts.uri.scheme_str().and_then(known) } else { None };
    own.or_else(forwarded)
}

/// Whether this `content-type` is gRPC's: `application/grpc`, alone or with `+proto` or parameters, not `application/grpc-web`.
pub fn is_grpc(content_type: &[u8]) -> bool {
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// Why a head is not carried, and the answer, with which the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Status.
    pub status: StatusCode,
    /// Body.
    pub text: &'static str,
    /// What is wrong, for Envoy's response flags.
    pub fault: Option<Fault>,
    /// Envoy's response code details.
    pub details: &'static str,
}
/// What an [`Unfit`] head is, in Envoy's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `NR`: a method nobody has a route for.
    NoRoute,
    /// `DPE`: it breaks the protocol.
    Protocol,
}
impl Unfit {
    /// What Envoy's parser, or ours in its place, answers.
    fn broken(details: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST, text: "Bad Request", fault: Some(Fault::Protocol), details }
    }
}

/// Whether the head is one we carry.
///
/// # Errors
/// What is wrong with it, and the answer.
pub fn fit(parts: &Parts, authority: &str) -> Result<(), Unfit> {
    let Parts { method, uri, version, headers, .. } = parts;
    if *method == Method::CONNECT {
        let (status, fault) = (StatusCode::NOT_FOUND, Some(Fault::NoRoute));
        return Err(Unfit { status, text: "", fault, details: "route_not_found" });
    }
    if method.as_str().bytes().any(|b| b.is_ascii_lowercase()) {
        // Methods are told apart by case (RFC 9110 §9.1), but not by every endpoint: a `get` would pass where GET is denied.
        return Err(Unfit::broken("http1.invalid_method"));
    }
    if uri.scheme().is_none() && uri.authority().is_some() {
        // `GET foo`: not a path, and not what only CONNECT may name.
        return Err(Unfit::broken("http1.invalid_target"));
    }
    if authority.is_empty() && *version != Version::HTTP_10 {
        return Err(Unfit { text: "", fault: None, ..Unfit::broken("missing_host_header") });
    }
    if headers.get_all(header::HOST).iter().nth(1).is_some() {
        return Err(Unfit { text: "", ..Unfit::broken("http1.duplicate_host") });
    }
    // No `@`: nobody's host has a user; whoever compares hosts would be fooled by one.
    if !authority.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:[]%".contains(&b)) {
        return Err(Unfit::broken("http.invalid_authority"));
    }
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if codings.next().is_some_and(|c| !c.as_bytes().eq_ignore_ascii_case(b"chunked")) || codings.next().is_some() {
        // One coding is known here, applied once: any other would be lost with the field (RFC 9112 §6.1).
        let unknown = Unfit::broken("http1.invalid_transfer_encoding");
        return Err(Unfit { status: StatusCode::NOT_IMPLEMENTED, text: "Not Implemented", ..unknown });
    }
    // Who names these wants the endpoint not to see them: a way around those who rely on them.
    let protected = ["host", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
    let named = |name: &str| protected.iter().any(|one| name.trim().eq_ignore_ascii_case(one));
    if headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok()).any(|list| list.split(',').any(named)) {
        return Err(Unfit::broken("http1.connection_header_rejected"));
    }
    if asks_upgrade(headers) && upgrade_of(headers).is_none() && !headers.get(header::UPGRADE).is_some_and(is_h2c) {
        return Err(Unfit { status: StatusCode::FORBIDDEN, text: "", fault: None, details: "upgrade_failed" });
    }
    Ok(())
}

/// Removes what is not the client's to say, or not for the endpoint to hear.
pub fn clean(parts: &mut Parts, authority: &str) {
    if parts.uri.authority().is_some()
        && let Some(host) = parts.headers.get_mut(header::HOST)
        && let Ok(authority) = HeaderValue::try_from(authority)
    {
        // The target's own authority is the host, for rules that look at the field too (RFC 9112 §3.2.2, RFC 9113 §8.3.1).
        *host = authority;
    }
    let upgrade = upgrade_of(&parts.headers);
    let headers = &mut parts.headers;
    strip_hop_by_hop(headers, upgrade.as_ref());
    if parts.version == Version::HTTP_2 {
        join_cookies(headers);
    }
    for name in INTERNAL {
        headers.remove(name);
    }
    headers.remove(CLIENT_CERT);
}

/// HTTP/2 may split a cookie for compression; HTTP/1 has one field of it (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(whole) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(header::COOKIE, whole);
    }
}

/// The protocol of an HTTP/1 upgrade we carry, if one is asked for: WebSocket, as Istio configures Envoy.
pub fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let upgrade = headers.get(header::UPGRADE).filter(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"))?;
    asks_upgrade(headers).then(|| upgrade.clone())
}
/// Whether an `upgrade` wishes for HTTP/2. To it nobody has to upgrade: the wish is dropped, the request served.
pub fn is_h2c(value: &HeaderValue) -> bool {
    value.to_str().is_ok_and(|list| list.split(',').any(|t| t.trim().eq_ignore_ascii_case("h2c")))
}
fn asks_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE)
        && headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok()).any(has_token("upgrade"))
}
fn has_token(token: &str) -> impl Fn(&str) -> bool {
    move |list| list.split(',').any(|t| t.trim().eq_ignore_ascii_case(token))
}

/// Removes what speaks of this connection alone (RFC 9110 §7.6.1); an upgrade that goes on is put back.
pub fn strip_hop_by_hop(headers: &mut HeaderMap, upgrade: Option<&HeaderValue>) {
    // An upgrade keeps the word as it was written: it is part of the handshake.
    let word = headers.get(header::CONNECTION).filter(|v| v.as_bytes().eq_ignore_ascii_case(b"upgrade")).cloned();
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|v| v.to_str().ok())
            .flat_map(|v| v.split(','))
            .filter_map(|name| HeaderName::try_from(name.trim()).ok())
            // What everybody relies on is not for the client to have removed.
            .filter(|name| {
                !matches!(name.as_str(), "host" | "content-length" | "authorization") && !name.as_str().starts_with("x-forwarded")
            })
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
    if headers.remove(header::TRANSFER_ENCODING).is_some() {
        // What was chunked has no other length, whatever else was said (RFC 9112 §6.3).
        headers.remove(header::CONTENT_LENGTH);
    }
    if !headers.get(header::TE).is_some_and(|v| v.to_str().is_ok_and(has_token("trailers"))) {
        headers.remove(header::TE);
    }
    match upgrade {
        Some(protocol) => {
            headers.insert(header::CONNECTION, word.unwrap_or_else(|| HeaderValue::from_static("upgrade")));
            headers.insert(header::UPGRADE, protocol.clone());
        }
        None => {
            headers.remove(header::UPGRADE);
        }
    }
}

/// Adds the client's address to what it says of those before it (Envoy: `append_x_forwarded_for`).
pub fn append_client(headers: &mut HeaderMap, client: IpAddr) {
    let mut value = String::with_capacity(48);
    for old in headers.get_all(FORWARDED_FOR) {
        if let Ok(old) = old.to_str() {
            value.push_str(old);
            value.push(',');
        }
    }
    // Writing to a String does not fail.
    let _ = write!(value, "{}", client.to_canonical());
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(FORWARDED_FOR, value);
    }
}

/// Whether the address is of a private network, which Envoy trusts more.
pub fn is_internal(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_private() || ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_loopback(),
    }
}

#[cfg(test)]
mod tests;
