//! Answers made here, and what every answer gets on its way back.
use crate::body::Body;
use crate::phase::{Exchange, Flow};
use crate::telemetry::grpc_of_http;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode, Version};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use mesh_model::l7::HttpMatch;
use mesh_model::l7::head::strip_hop_by_hop;
use mesh_model::l7::rewrite::redirect_location;
use mesh_model::l7::route::HttpAction;
use std::borrow::Cow;
use std::sync::Arc;
use tokio::io::AsyncWriteExt as _;

/// What Envoy calls itself in Istio; clients and tests look for it.
const SERVER: HeaderValue = HeaderValue::from_static("istio-envoy");
/// `x-culvert-reason`: our own word for a refusal.
const REASON: HeaderName = HeaderName::from_static("x-culvert-reason");

/// An answer made here (Envoy's local reply): plain text, or for gRPC a trailers-only response with the status that the
/// HTTP status maps to. Once a route is chosen its header edits are for these answers too.
pub(crate) fn local(
    ex: &mut Exchange<'_>,
    status: StatusCode,
    text: &'static str,
    details: impl Into<Cow<'static, str>>,
) -> Response<Body> {
    if ex.grpc {
        return grpc(ex, grpc_of_http(status.as_u16()), text, details);
    }
    ex.record.details = details.into();
    let mut answer = Response::new(Body::full(Bytes::from_static(text.as_bytes())));
    *answer.status_mut() = status;
    if !text.is_empty() {
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    edit(ex, answer.headers_mut());
    answer
}

/// As [`local`], and the connection ends with it: what the client sends next cannot be trusted to be what it meant.
pub(crate) fn closing(ex: &mut Exchange<'_>, status: StatusCode, text: &'static str, details: &'static str) -> Response<Body> {
    let mut answer = local(ex, status, text, details);
    // HTTP/2 ends streams, not connections.
    if ex.parts.version != Version::HTTP_2 {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        if let Some(upgrade) = ex.parts.extensions.remove::<OnUpgrade>() {
            // hyper hands over a connection on which something else was wished for, instead of ending it.
            tokio::spawn(async move {
                if let Ok(io) = upgrade.await {
                    let _gone_already = TokioIo::new(io).shutdown().await;
                }
            });
        }
    }
    answer
}

/// An answer made here for who speaks gRPC: all headers.
pub(crate) fn grpc(ex: &mut Exchange<'_>, status: u16, message: &str, details: impl Into<Cow<'static, str>>) -> Response<Body> {
    ex.record.details = details.into();
    let mut answer = trailers_only(ex, status, message);
    edit(ex, answer.headers_mut());
    answer
}

fn trailers_only(ex: &mut Exchange<'_>, status: u16, message: &str) -> Response<Body> {
    ex.record.grpc_status = Some(status);
    let mut answer = Response::new(Body::Empty);
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(status));
    if !message.is_empty()
        && let Ok(message) = HeaderValue::try_from(message)
    {
        headers.insert("grpc-message", message);
    }
    answer
}

/// The header edits of the chosen backend, then those of the route (Envoy: most specific first).
fn edit(ex: &Exchange<'_>, headers: &mut HeaderMap) {
    if let Some(backend) = ex.backend() {
        backend.headers.response.apply(headers);
    }
    if let Some(route) = &ex.route {
        route.headers.response.apply(headers);
    }
}

/// Redirects and direct responses of the route.
pub(crate) fn direct(ex: &mut Exchange<'_>) -> Flow {
    let Some(route) = ex.route.clone() else { return Flow::Continue };
    let mut answer = match &route.action {
        HttpAction::Forward(_) => return Flow::Continue,
        HttpAction::Redirect(redirect) => {
            let none = HttpMatch::default();
            let facts = ex.facts();
            let location = redirect_location(redirect, ex.matched().unwrap_or(&none), &facts);
            let mut answer = Response::new(Body::Empty);
            *answer.status_mut() = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::MOVED_PERMANENTLY);
            match HeaderValue::try_from(location) {
                Ok(location) => {
                    answer.headers_mut().insert(header::LOCATION, location);
                }
                Err(_) => *answer.status_mut() = StatusCode::BAD_REQUEST,
            }
            answer
        }
        HttpAction::Respond(respond) => {
            let mut answer = Response::new(Body::full(Bytes::from_owner(Arc::clone(&respond.body))));
            *answer.status_mut() = StatusCode::from_u16(respond.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            if !respond.body.is_empty() {
                answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            answer
        }
    };
    ex.record.details = "direct_response".into();
    if ex.grpc {
        answer = as_grpc(ex, &route.action, answer);
    }
    route.headers.response.apply(answer.headers_mut());
    Flow::Answer(answer)
}

/// A redirect or direct response for who speaks gRPC: its status in gRPC's terms, its text as the message.
fn as_grpc(ex: &mut Exchange<'_>, action: &HttpAction, plain: Response<Body>) -> Response<Body> {
    let text = match action {
        HttpAction::Respond(respond) => std::str::from_utf8(&respond.body).unwrap_or_default(),
        _ => "",
    };
    let mut answer = trailers_only(ex, grpc_of_http(plain.status().as_u16()), text);
    if let Some(location) = plain.headers().get(header::LOCATION) {
        answer.headers_mut().insert(header::LOCATION, location.clone());
    }
    answer
}

/// What the upstream answered, made ours: connection headers removed, header edits of backend and route.
pub(crate) fn from_upstream(ex: &mut Exchange<'_>, answer: &mut Response<Body>) {
    let upgrade =
        (answer.status() == StatusCode::SWITCHING_PROTOCOLS).then(|| answer.headers().get(header::UPGRADE).cloned()).flatten();
    strip_hop_by_hop(answer.headers_mut(), upgrade.as_ref());
    if let Some(cookie) = ex.sticky.take() {
        answer.headers_mut().append(header::SET_COOKIE, cookie);
    }
    if let Some((name, value)) = ex.session.take() {
        if name == header::SET_COOKIE {
            answer.headers_mut().append(name, value);
        } else {
            answer.headers_mut().insert(name, value);
        }
    }
    edit(ex, answer.headers_mut());
    if let Some(time) = ex.record.upstream_time {
        answer.headers_mut().insert("x-envoy-upstream-service-time", HeaderValue::from(time.as_millis() as u64));
    }
}

/// What every answer gets.
pub(crate) fn finish(ex: &mut Exchange<'_>, mut answer: Response<Body>) -> Response<Body> {
    if let Some(cors) = ex.cors_headers.take() {
        for (name, value) in &cors {
            answer.headers_mut().insert(name.clone(), value.clone());
        }
    }
    for edit in std::mem::take(&mut ex.granted) {
        edit.apply(answer.headers_mut());
    }
    if let Some(reason) = ex.record.reason {
        answer.headers_mut().insert(REASON, HeaderValue::from_static(reason.as_str()));
    }
    if ex.connects && answer.status().is_success() {
        // To who asked for another protocol it would say that it is spoken from now on.
        answer = Response::new(Body::Empty);
        *answer.status_mut() = StatusCode::BAD_GATEWAY;
        ex.record.details = "websocket_handshake_unsuccessful".into();
    }
    answer.headers_mut().insert(header::SERVER, SERVER);
    ex.record.status = answer.status().as_u16();
    if ex.connects && answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        // The same in HTTP/2 (RFC 8441 §5).
        *answer.status_mut() = StatusCode::OK;
        for name in [header::CONNECTION, header::UPGRADE, header::SEC_WEBSOCKET_ACCEPT] {
            answer.headers_mut().remove(name);
        }
    }
    answer
}
