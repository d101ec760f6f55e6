//! An authorizer that speaks `envoy.service.auth.v3` (Istio's `envoyExtAuthzGrpc`): asked with what is known of the request,
//! or of a connection that is not HTTP.
//!
//! Unlike at Envoy's waypoint both identities are told: they are known here, also behind a tunnel.
use super::{Answer, Change, Edit, Grant, Refused, Shown, Verdict};
use crate::body::Body;
use crate::conn::Conn;
use crate::phase::authorize::destination;
use crate::phase::{Exchange, grpc_status};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, StatusCode, Version};
use mesh_model::SpiffeId;
use mesh_model::l7::authorizer::Authorizer;
use mesh_proto::Message as _;
use mesh_proto::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use mesh_proto::envoy::config::core::v3::socket_address::PortSpecifier;
use mesh_proto::envoy::config::core::v3::{Address, HeaderValueOption, SocketAddress, address};
use mesh_proto::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request as About};
use mesh_proto::envoy::service::auth::v3::check_response::HttpResponse;
use mesh_proto::envoy::service::auth::v3::{AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse};
use mesh_proto::well_known::Timestamp;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::SystemTime;

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// The question about a request.
pub(super) fn question(ex: &Exchange<'_>, authorizer: &Authorizer, shown: Option<Shown>) -> Result<Request<Body>, http::Error> {
    let request = About { time: Some(timestamp(ex.record.start_time)), http: Some(http_of(ex, shown)) };
    call(ex.conn, authorizer, Some(request))
}
/// The question about a connection that is not HTTP.
pub(super) fn question_of_bytes(conn: &Conn, authorizer: &Authorizer) -> Result<Request<Body>, http::Error> {
    call(conn, authorizer, None)
}
/// What the answer says.
pub(super) fn verdict(answer: &Answer) -> Result<Verdict, String> {
    said(read(answer)?)
}

fn http_of(ex: &Exchange<'_>, shown: Option<Shown>) -> HttpRequest {
    let target = ex.parts.uri.query().map_or_else(|| ex.path.clone(), |query| format!("{}?{query}", ex.path));
    let method = ex.parts.method.as_str();
    let mut headers = joined(&ex.parts.headers);
    headers.remove(header::HOST.as_str());
    for (name, value) in [(":authority", &*ex.authority), (":method", method), (":path", &target), (":scheme", ex.scheme)] {
        headers.insert(name.into(), value.into());
    }
    let mut out = HttpRequest {
        id: headers.get("x-request-id").cloned().unwrap_or_default(),
        method: method.into(),
        path: target,
        host: ex.authority.clone(),
        scheme: ex.scheme.into(),
        // As in Envoy what has arrived, whatever length the request says.
        size: shown.as_ref().map_or(0, |shown| shown.seen as i64),
        protocol: protocol(ex.parts.version).into(),
        ..HttpRequest::default()
    };
    headers.remove(super::http::PARTIAL.as_str());
    if let Some(shown) = shown {
        headers.insert(super::http::PARTIAL.to_string(), shown.cut.to_string());
        if shown.limit.as_bytes {
            out.raw_body = shown.bytes;
        } else {
            out.body = String::from_utf8_lossy(&shown.bytes).into_owned();
        }
    }
    out.headers = headers;
    out
}
/// Several values of one name stand behind one another; what is no text is made some.
fn joined(headers: &HeaderMap) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        let all: &mut String = out.entry(name.as_str().to_owned()).or_default();
        if !all.is_empty() {
            all.push(',');
        }
        all.push_str(&value);
    }
    out
}
fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}
fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs().cast_signed(), nanos: since.subsec_nanos().cast_signed() }
}
fn peer(address: SocketAddr, identity: Option<&SpiffeId>) -> Peer {
    let ip = address.ip().to_canonical().to_string();
    let socket = SocketAddress { address: ip, port_specifier: Some(PortSpecifier::PortValue(address.port().into())) };
    Peer {
        address: Some(Address { address: Some(address::Address::SocketAddress(socket)) }),
        principal: identity.map(ToString::to_string).unwrap_or_default(),
    }
}

fn call(conn: &Conn, authorizer: &Authorizer, request: Option<About>) -> Result<Request<Body>, http::Error> {
    let attributes = AttributeContext {
        source: Some(peer(conn.client, conn.identity.as_ref())),
        destination: Some(peer(destination(conn), Some(&conn.shared.identity))),
        request,
    };
    let question = CheckRequest { attributes: Some(attributes) };
    let length = question.encoded_len();
    let mut body = BytesMut::with_capacity(5 + length);
    body.put_u8(0);
    body.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // The buffer grows as needed.
    let _never = question.encode(&mut body);
    Request::post(CHECK)
        .header(header::HOST, format!("{}:{}", authorizer.host, authorizer.port))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        // At most eight digits.
        .header("grpc-timeout", format!("{}m", authorizer.timeout.as_millis().min(99_999_999)))
        .body(Body::full(body.freeze()))
}
/// The message of the answer to a call that went well.
fn read(answer: &Answer) -> Result<CheckResponse, String> {
    if answer.head.status != StatusCode::OK {
        return Err(format!("it answered {}", answer.head.status.as_u16()));
    }
    match grpc_status::<u16>(&answer.trailers).or_else(|| grpc_status(&answer.head.headers)) {
        Some(0) => {}
        Some(status) => return Err(format!("gRPC status {status}")),
        None => return Err("no gRPC status".into()),
    }
    let body = &answer.body;
    let message = match body.split_at_checked(5) {
        // Nobody offered to read a compressed one.
        Some(([0, length @ ..], message)) if length.iter().fold(0, |n, b| n << 8 | usize::from(*b)) == message.len() => message,
        _ => return Err("not one plain gRPC message".into()),
    };
    CheckResponse::decode(message).map_err(|e| e.to_string())
}

fn said(answer: CheckResponse) -> Result<Verdict, String> {
    let agrees = answer.status.is_none_or(|status| status.code == 0);
    match answer.http_response {
        Some(HttpResponse::OkResponse(ok)) if agrees => grant(ok).map(Verdict::Agrees),
        _ if agrees => Ok(Verdict::Agrees(Grant::default())),
        Some(HttpResponse::DeniedResponse(denied)) => refused(denied).map(Verdict::Refuses),
        _ => refused(DeniedHttpResponse::default()).map(Verdict::Refuses),
    }
}
fn grant(ok: OkHttpResponse) -> Result<Grant, String> {
    // Where nothing is said, headers of the request are set and headers of the answer appended (Envoy's defaults).
    let mut request = edits(ok.headers, false)?;
    for name in ok.headers_to_remove {
        let name = HeaderName::try_from(&*name).map_err(|_| format!("{name:?} is no header that can be removed"))?;
        request.push(Edit { name, what: Change::Remove });
    }
    let set = ok.query_parameters_to_set.into_iter().map(|p| (p.key, Some(p.value)));
    let query = ok.query_parameters_to_remove.into_iter().map(|name| (name, None)).chain(set).collect();
    Ok(Grant { request, response: edits(ok.response_headers_to_add, true)?, query })
}
fn refused(denied: DeniedHttpResponse) -> Result<Refused, String> {
    let status = denied.status.map_or(0, |s| s.code);
    // 0 is what is not said; what is no status, or would let the client think it went well, is none to refuse with.
    let status = u16::try_from(status).ok().and_then(|s| StatusCode::from_u16(s).ok());
    let status = status.filter(|s| s.as_u16() >= 200).unwrap_or(StatusCode::FORBIDDEN);
    let mut headers = HeaderMap::new();
    if !denied.body.is_empty() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    for edit in edits(denied.headers, false)? {
        edit.apply(&mut headers);
    }
    Ok(Refused { status, headers, body: Bytes::from(denied.body) })
}
fn edits(options: Vec<HeaderValueOption>, append: bool) -> Result<Vec<Edit>, String> {
    options.into_iter().map(|option| edit(option, append)).collect()
}
fn edit(option: HeaderValueOption, append: bool) -> Result<Edit, String> {
    let action = option.append_action();
    let header = option.header.unwrap_or_default();
    let name = HeaderName::try_from(&*header.key).map_err(|_| format!("{:?} is no header that can be set", header.key))?;
    let value = if header.raw_value.is_empty() { header.value.into_bytes() } else { header.raw_value.to_vec() };
    let value = HeaderValue::try_from(value).map_err(|_| format!("the value of {name} is none"))?;
    let what = match (option.append, action) {
        (Some(true), _) => Change::Append(value),
        (Some(false), _) | (None, HeaderAppendAction::OverwriteIfExistsOrAdd) => Change::Set(value),
        (None, HeaderAppendAction::AppendIfExistsOrAdd) if append => Change::Append(value),
        (None, HeaderAppendAction::AppendIfExistsOrAdd) => Change::Set(value),
        (None, HeaderAppendAction::AddIfAbsent) => Change::SetIfAbsent(value),
        (None, HeaderAppendAction::OverwriteIfExists) => Change::SetIfPresent(value),
    };
    Ok(Edit { name, what })
}

#[cfg(test)]
mod tests;
