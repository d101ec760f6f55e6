//! First phase: is it a request we carry, and under which names (Envoy's connection manager). What a head must be and what
//! is left of it is `mesh_model::l7::head`'s; path and request id are added here.
use crate::body::Body;
use crate::conn::Conn;
use crate::facts::Scope;
use crate::phase::respond;
use crate::phase::{Exchange, Flow};
use crate::telemetry::{Flag, Record};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use http::header::{self, Entry, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, Request, StatusCode};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::ext::Protocol;
use mesh_model::l7::head::{self, CLIENT_CERT, FORWARDED_PROTO, Fault, Unfit, append_client, clean, fit};
use mesh_model::l7::path::{PathNormalization, normalize};
use mesh_model::l7::treatment::Treatments;
use std::sync::Arc;

/// `x-request-id`.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The exchange of a request that has just arrived.
pub(crate) fn begin(conn: &Arc<Conn>, request: Request<Incoming>) -> Exchange<'_> {
    let (mut parts, body) = request.into_parts();
    let connects = as_upgrade(&mut parts);
    let authority = head::authority(&parts.uri, &parts.headers);
    let grpc = parts.headers.get(header::CONTENT_TYPE).is_some_and(|v| head::is_grpc(v.as_bytes()));
    let snap = conn.shared.mesh.load_full();
    let rules = conn.in_force(&snap);
    let record = Record {
        method: parts.method.clone(),
        path: parts.uri.path_and_query().map_or("/", |p| p.as_str()).into(),
        protocol: parts.version,
        authority: authority.as_str().into(),
        told: rules.told.clone(),
        ..Record::new(grpc)
    };
    Exchange {
        snap,
        rules,
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
        session: None,
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
    let Some(protocol) = HeaderValue::from_bytes(protocol.as_ref()).ok().filter(|p| !head::is_h2c(p)) else { return false };
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

/// Refuses what cannot be carried, cleans what can.
pub(crate) fn check(ex: &mut Exchange<'_>) -> Flow {
    if ex.parts.uri.path() == "*" {
        return Flow::Answer(respond::local(ex, StatusCode::NOT_FOUND, "", "absolute_path_rejected"));
    }
    if let Err(Unfit { status, text, fault, details }) = fit(&ex.parts, &ex.authority) {
        match fault {
            Some(Fault::NoRoute) => ex.record.flags.set(Flag::NoRouteFound),
            Some(Fault::Protocol) => ex.record.flags.set(Flag::DownstreamProtocolError),
            None => {}
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
    ex.scheme = Some(&ex.parts).filter(|_| !edge).and_then(head::scheme).unwrap_or_else(|| ex.conn.scheme());
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
    if edge && !head::is_internal(ex.conn.client.ip()) {
        // It decides which requests are traced, and joins the lines of logs: not for strangers to choose.
        headers.remove(REQUEST_ID);
    }
    headers.entry(REQUEST_ID).or_insert_with(request_id);
    Flow::Continue
}

/// The head of a request as the phases after this one see it: its authority, its normalised path, what is left of its
/// headers. `None` where it is not carried.
pub(crate) fn admitted(mut parts: Parts) -> Option<(String, String, Parts)> {
    let authority = head::authority(&parts.uri, &parts.headers);
    fit(&parts, &authority).ok()?;
    let path = normalize(PathNormalization::Base, parts.uri.path()).ok()?.into_owned();
    clean(&mut parts, &authority);
    Some((authority, path, parts))
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
}
