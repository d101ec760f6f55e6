//! First phase: is it a request we carry, and under which names. Path normalisation, hop-by-hop headers, request id,
//! forwarded-for (Envoy's connection manager).
use crate::body::Body;
use crate::conn::Conn;
use crate::facts::Scope;
use crate::phase::respond;
use crate::phase::{Exchange, Flow};
use crate::telemetry::{Flag, Record};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use http::header::{self, Entry, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::ext::Protocol;
use mesh_model::l7::path::{PathNormalization, normalize};
use mesh_model::l7::treatment::Treatments;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

/// `x-request-id`.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// `x-forwarded-for`.
pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// `x-forwarded-proto`.
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// `x-forwarded-client-cert`.
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
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

/// The exchange of a request that has just arrived.
pub(crate) fn begin(conn: &Arc<Conn>, request: Request<Incoming>) -> Exchange<'_> {
    let (mut parts, body) = request.into_parts();
    let connects = as_upgrade(&mut parts);
    let authority = authority(&parts.uri, &parts.headers);
    let grpc = parts.headers.get(header::CONTENT_TYPE).is_some_and(|v| is_grpc(v.as_bytes()));
    let snap = conn.shared.mesh.load_full();
    let record = Record {
        method: parts.method.clone(),
        path: parts.uri.path_and_query().map_or("/", |p| p.as_str()).into(),
        protocol: parts.version,
        authority: authority.as_str().into(),
        told: conn.told(&snap),
        ..Record::new(grpc)
    };
    Exchange {
        snap,
        conn,
        parts,
        body: if body.is_end_stream() { Body::Empty } else { Body::Incoming(body) },
        replay: None,
        path: String::new(),
        scheme: conn.scheme(),
        authority,
        draw: rand::random(),
        route: None,
        matched: None,
        backend: None,
        token: None,
        cors_headers: None,
        asked: Vec::new(),
        granted: Vec::new(),
        routed: None,
        sticky: None,
        switched: None,
        connects,
        treatments: Treatments::default(),
        limited: None,
        coding: None,
        upgrade: None,
        grpc,
        record,
    }
}

/// An extended CONNECT (RFC 8441) becomes the upgrade it is in HTTP/1, as in Envoy, for all phases and for the endpoint. Whether
/// it was one.
fn as_upgrade(parts: &mut Parts) -> bool {
    let Some(protocol) = parts.extensions.remove::<Protocol>().filter(|_| parts.method == Method::CONNECT) else { return false };
    // Asking for HTTP/2 in HTTP/2 is no upgrade, and would be passed over as one.
    let Some(protocol) = HeaderValue::from_bytes(protocol.as_ref()).ok().filter(|p| !is_h2c(p)) else { return false };
    parts.method = Method::GET;
    parts.headers.insert(header::UPGRADE, protocol);
    parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    // HTTP/2 has no need of a key; servers of HTTP/1 answer nobody without one (RFC 6455 §4.2.1).
    if let Entry::Vacant(key) = parts.headers.entry(header::SEC_WEBSOCKET_KEY)
        && let Ok(value) = HeaderValue::try_from(BASE64_STANDARD.encode(rand::random::<[u8; 16]>()))
    {
        key.insert(value);
    }
    true
}

fn is_grpc(content_type: &[u8]) -> bool {
    // `application/grpc`, alone or with `+proto` or parameters, not `application/grpc-web`.
    content_type.strip_prefix(b"application/grpc").is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The authority: the request's own in HTTP/2, `Host` in HTTP/1.
fn authority(uri: &http::Uri, headers: &HeaderMap) -> String {
    match uri.authority() {
        Some(authority) => authority.as_str().to_owned(),
        None => headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default().to_owned(),
    }
}

/// Refuses what cannot be carried, cleans what can.
pub(crate) fn check(ex: &mut Exchange<'_>) -> Flow {
    if ex.parts.uri.path() == "*" {
        return Flow::Answer(respond::local(ex, StatusCode::NOT_FOUND, "", "absolute_path_rejected"));
    }
    if let Err(Unfit { status, text, flag, details }) = fit(&ex.parts, &ex.authority) {
        if let Some(flag) = flag {
            ex.record.flags.set(flag);
        }
        return Flow::Answer(respond::closing(ex, status, text, details));
    }
    let normalization = ex.conn.shared.settings.path_normalization.unwrap_or_else(|| ex.snap.defaults().path_normalization);
    match normalize(normalization, ex.parts.uri.path()) {
        Ok(path) => ex.path = path.into_owned(),
        Err(_) => return Flow::Answer(respond::closing(ex, StatusCode::BAD_REQUEST, "", "path_normalization_failed")),
    }
    // Nobody stands before us whose word counts (Envoy: `use_remote_address`, no trusted hop).
    let edge = matches!(ex.conn.scope, Scope::Gateway { .. }) && ex.conn.shared.settings.trusted_proxies == 0;
    ex.scheme = if edge { ex.conn.scheme() } else { scheme(ex) };
    clean(&mut ex.parts, &ex.authority);
    let headers = &mut ex.parts.headers;
    if let Some(value) = ex.conn.client_cert() {
        headers.insert(CLIENT_CERT, value.clone());
    }
    if ex.conn.shared.settings.forward_client_address {
        append_client(headers, ex.conn.client.ip());
    }
    if edge || !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static(ex.conn.scheme()));
    }
    if edge && !is_internal(ex.conn.client.ip()) {
        // It decides which requests are traced, and joins the lines of logs: not for strangers to choose.
        headers.remove(REQUEST_ID);
    }
    headers.entry(REQUEST_ID).or_insert_with(request_id);
    Flow::Continue
}

/// Removes what is not the client's to say, or not for the endpoint to hear.
fn clean(parts: &mut Parts, authority: &str) {
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

/// The head of a request as the phases after this one see it: its authority, its normalised path, what is left of its
/// headers. `None` where it is not carried.
pub(crate) fn admitted(mut parts: Parts) -> Option<(String, String, Parts)> {
    let authority = authority(&parts.uri, &parts.headers);
    fit(&parts, &authority).ok()?;
    let path = normalize(PathNormalization::Base, parts.uri.path()).ok()?.into_owned();
    clean(&mut parts, &authority);
    Some((authority, path, parts))
}

/// Why a head is not carried, and the answer, with which the connection ends.
struct Unfit {
    status: StatusCode,
    text: &'static str,
    flag: Option<Flag>,
    details: &'static str,
}
impl Unfit {
    /// What Envoy's parser, or ours in its place, answers.
    fn broken(details: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST, text: "Bad Request", flag: Some(Flag::DownstreamProtocolError), details }
    }
}

/// Whether the head is one we carry.
fn fit(parts: &Parts, authority: &str) -> Result<(), Unfit> {
    let Parts { method, uri, version, headers, .. } = parts;
    if *method == Method::CONNECT {
        let (status, flag) = (StatusCode::NOT_FOUND, Some(Flag::NoRouteFound));
        return Err(Unfit { status, text: "", flag, details: "route_not_found" });
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
        return Err(Unfit { text: "", flag: None, ..Unfit::broken("missing_host_header") });
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
        return Err(Unfit { status: StatusCode::FORBIDDEN, text: "", flag: None, details: "upgrade_failed" });
    }
    Ok(())
}

/// What the client used to get here: in HTTP/2 it says so, in HTTP/1 a proxy before us may.
fn scheme(ex: &Exchange<'_>) -> &'static str {
    let known = |text: &str| match text {
        _ if text.eq_ignore_ascii_case("https") => Some("https"),
        _ if text.eq_ignore_ascii_case("http") => Some("http"),
        _ => None,
    };
    let forwarded = || known(ex.parts.headers.get(FORWARDED_PROTO)?.to_str().ok()?);
    let own = if ex.parts.version == Version::HTTP_2 { ex.parts.uri.scheme_str().and_then(known) } else { None };
    own.or_else(forwarded).unwrap_or_else(|| ex.conn.scheme())
}

/// Addresses of private networks, which Envoy trusts more.
fn is_internal(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_private() || ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_loopback(),
    }
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
pub(crate) fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let upgrade = headers.get(header::UPGRADE).filter(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"))?;
    asks_upgrade(headers).then(|| upgrade.clone())
}
/// To HTTP/2 nobody has to upgrade: the wish is dropped, the request served.
fn is_h2c(value: &HeaderValue) -> bool {
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
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap, upgrade: Option<&HeaderValue>) {
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

fn append_client(headers: &mut HeaderMap, client: IpAddr) {
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

/// A version 4 UUID (RFC 9562), as Envoy makes them.
fn request_id() -> HeaderValue {
    let mut bits = rand::random::<u128>();
    bits = (bits & !(0xf << 76)) | (4 << 76);
    bits = (bits & !(3 << 62)) | (2 << 62);
    let part = |shift: u32| (bits >> shift) & 0xffff;
    let (head, tail) = ((bits >> 96) as u32, bits & 0xffff_ffff_ffff);
    let text = format!("{head:08x}-{:04x}-{:04x}-{:04x}-{tail:012x}", part(80), part(64), part(48));
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_version_4_uuids() {
        let id = request_id();
        let text = id.to_str().expect("ascii");
        assert_eq!(text.len(), 36);
        assert_eq!(text.as_bytes()[14], b'4');
        assert!(matches!(text.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{text}");
        assert_ne!(id, request_id());
    }
    #[test]
    fn connection_headers_go_and_cannot_take_others_along() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-secret, authorization, x-forwarded-for"),
            ("x-secret", "1"),
            ("authorization", "Bearer x"),
            ("x-forwarded-for", "1.1.1.1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        assert!(upgrade_of(&headers).is_none(), "no upgrade token in connection");
        strip_hop_by_hop(&mut headers, None);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "x-forwarded-for"]);
    }
    #[test]
    fn the_client_is_appended_to_what_it_says() {
        let mut headers = HeaderMap::new();
        headers.append(FORWARDED_FOR, HeaderValue::from_static("1.1.1.1"));
        append_client(&mut headers, [10, 0, 0, 7].into());
        assert_eq!(headers[FORWARDED_FOR], "1.1.1.1,10.0.0.7");
    }
    #[test]
    fn grpc_is_told_from_grpc_web() {
        for (text, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            assert_eq!(is_grpc(text.as_bytes()), grpc, "{text}");
        }
    }
}
