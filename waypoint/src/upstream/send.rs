//! One attempt at an endpoint: a request on a pooled connection, on one of its own, or a raw byte stream.
use super::cluster::Cluster;
use super::error::{Failure, UpstreamError};
use super::forward::{self, Forwarded};
use super::host::Host;
use super::pool::{self, Lease, ShelfKey};
use super::state::{Pending, RequestGuard, note, overflow};
use super::transport::{self, Purpose, Stream};
use crate::body::{Body, BodyError};
use http::header::{self, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use mesh_model::hosts::host_of;
use mesh_model::telemetry::context::TraceParent;
use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::Arc;

/// How a request is sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendOptions<'a> {
    /// HTTP/2 to the endpoint.
    pub http2: bool,
    /// On a connection of its own over HTTP/1.1, so that the response can be upgraded.
    pub upgrade: bool,
    /// The client, for the PROXY protocol and for the endpoint's node agent.
    pub client: Option<SocketAddr>,
    /// The span for which a new connection is made, if that is told of.
    pub trace: Option<TraceParent>,
    /// The request's guard. Over HTTP/2 it keeps the stream counted until the response is over; without it a stream counts
    /// until its head arrived.
    pub guard: Option<&'a RequestGuard>,
}

/// Idle connections that turn out to be dead before one request gives up. Each is taken off the pool, so this bounds
/// nothing but an endpoint that closes connections as fast as we make them.
const MAX_DEAD: usize = 32;
/// Most header fields of an answer (Envoy's default), which the parser of HTTP/1 keeps to by itself.
const FIELDS: usize = 100;

/// Sends one attempt on a pooled (or new) connection of this data thread. The request's target may be in either form.
///
/// A pooled connection that the endpoint closed costs nothing: a request of which nothing was sent goes out on another.
///
/// # Errors
/// As [`Failure`] says; never `NoCluster`, `NoHealthy` (but for a name without addresses) or `Timeout`.
pub async fn send(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    request: Request<Body>,
    how: SendOptions<'_>,
) -> Result<Response<Incoming>, UpstreamError> {
    let policy = &cluster.policy;
    let http2 = how.http2 && !how.upgrade;
    let sni = server_name(cluster, &request);
    let key = ShelfKey {
        http2,
        client: policy.proxy_protocol.and(how.client),
        sni: sni.as_deref(),
        tls: policy.tls.as_ref(),
        proxy: policy.proxy_protocol,
    };
    let secure = policy.tls.is_some();
    let mut request = if http2 { as_http2(request, secure)? } else { as_http1(request)? };
    if how.upgrade {
        // Boxed: every request would hold the room of a connection being made.
        return Box::pin(send_alone(cluster, host, request, &key, how)).await;
    }
    for _ in 0..MAX_DEAD {
        let lease = pool::acquire(cluster, host, &key, how.trace).await?;
        let flight = cluster.state.attach(&host.state, policy.pool.max_requests)?;
        let (sent, used) = match lease {
            Lease::Own(lease) => {
                let used = lease.is_used();
                (lease.send(request, flight).await, used)
            }
            Lease::Shared(slot) => {
                let used = slot.is_used();
                let (sent, hold) = slot.send(request, flight).await;
                if sent.is_ok()
                    && let Some(guard) = how.guard
                {
                    guard.keep(hold);
                }
                (sent, used)
            }
        };
        match sent {
            // Nobody asked for another protocol: what follows is no answer to anything.
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                return Err(UpstreamError::new(Failure::Protocol, "unexpected 101"));
            }
            // With `:status`. What is dropped here resets its stream, which is what Envoy makes of it.
            Ok(response) if http2 && response.headers().len() >= FIELDS => {
                return Err(UpstreamError::new(Failure::RemoteReset, "remote reset"));
            }
            Ok(response) => return Ok(response),
            Err(mut error) => match error.take_message() {
                Some(unsent) if used => request = unsent,
                Some(_) => return Err(UpstreamError::new(Failure::ResetBeforeRequest, "connection termination")),
                None => return Err(explain(error.error())),
            },
        }
    }
    Err(UpstreamError::new(Failure::ResetBeforeRequest, "connection termination"))
}

/// A request on a connection that is not shared.
async fn send_alone(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    request: Request<Body>,
    key: &ShelfKey<'_>,
    how: SendOptions<'_>,
) -> Result<Response<Incoming>, UpstreamError> {
    let (permit, waiting) = alone(cluster, host, cluster.policy.pool.max_requests)?;
    let (io, _) = transport::dial(cluster, host, key, Purpose::Single(how.client), how.trace, permit).await?;
    drop(waiting);
    let (mut sender, connection) =
        pool::builder().handshake(TokioIo::new(io)).await.map_err(|e| UpstreamError::new(Failure::Connect, e.to_string()))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "connection to an endpoint ended");
        }
    });
    sender.send_request(request).await.map_err(|e| explain(&e))
}

/// A raw byte stream to an endpoint.
#[derive(Debug)]
pub enum Carrier {
    /// Straight.
    Straight(Stream),
    /// Through the endpoint, which is a proxy, and was asked to carry it on.
    Forwarded(Box<Forwarded>),
}

/// A raw byte stream to the endpoint, for TCP routes, TLS passthrough and protocols where the server speaks first. `trace`: the
/// span it is part of, if that is told of.
///
/// # Errors
/// `Overflow`: the destination's connection limit; else as [`Failure`] says of connections.
pub async fn connect(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    client: Option<SocketAddr>,
    trace: Option<TraceParent>,
) -> Result<Carrier, UpstreamError> {
    let policy = &cluster.policy;
    // Bytes are no requests: their limit is none of theirs.
    let (permit, _waiting) = alone(cluster, host, u32::MAX)?;
    let sni = policy.tls.as_ref().filter(|tls| tls.sni.is_none()).and(cluster.service.as_ref()).map(|s| &*s.key.hostname);
    let key = ShelfKey { http2: false, client, sni, tls: policy.tls.as_ref(), proxy: policy.proxy_protocol };
    let Some(tunnel) = &policy.tunnel else {
        let (stream, _) = transport::open(cluster, host, &key, Purpose::Stream(client), trace, permit).await?;
        return Ok(Carrier::Straight(stream));
    };
    let http2 = policy.pool.speaks_http2(cluster.protocol, false);
    let key = ShelfKey { http2, ..key };
    let (stream, _) = transport::open(cluster, host, &key, Purpose::Single(client), trace, permit).await?;
    let forwarded = forward::through(stream, tunnel, (http2, policy.tls.is_some()), &policy.pool).await?;
    Ok(Carrier::Forwarded(Box::new(forwarded)))
}

/// A place for a connection that is not shared, among the connections and among the `requests` under way; and one among those that
/// wait, to be held until it is made (Envoy: whoever has no connection yet is pending, also of TCP).
pub(super) fn alone(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    requests: u32,
) -> Result<(super::ConnectionGuard, Pending), UpstreamError> {
    let permit = cluster.state.permit(&host.state, false).ok_or_else(|| {
        note(&cluster.state.counters.connection_overflows);
        overflow()
    })?;
    let waiting = cluster.state.wait(cluster.policy.pool.max_pending)?;
    let flight = cluster.state.attach(&host.state, requests)?;
    Ok((permit.with(flight), waiting))
}

/// The name TLS is asked for, where the policy leaves it to the request.
fn server_name(cluster: &Cluster, request: &Request<Body>) -> Option<Arc<str>> {
    cluster.policy.tls.as_ref().filter(|tls| tls.sni.is_none())?;
    let of_uri = request.uri().host();
    let of_header = || Some(host_of(request.headers().get(header::HOST)?.to_str().ok()?));
    let name = of_uri.or_else(of_header)?;
    Some(name.trim_start_matches('[').trim_end_matches(']').into())
}

/// Origin form, with a `Host`.
fn as_http1(mut request: Request<Body>) -> Result<Request<Body>, UpstreamError> {
    *request.version_mut() = Version::HTTP_11;
    if let Some(authority) = request.uri().authority() {
        if !request.headers().contains_key(header::HOST) {
            let host = HeaderValue::from_str(authority.as_str()).map_err(|_| bad("authority"))?;
            request.headers_mut().insert(header::HOST, host);
        }
        let path = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
    }
    Ok(request)
}

/// Absolute form, without what HTTP/2 forbids (RFC 9113 §8.2.2).
fn as_http2(mut request: Request<Body>, secure: bool) -> Result<Request<Body>, UpstreamError> {
    const FORBIDDEN: [HeaderName; 5] = [
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ];
    *request.version_mut() = Version::HTTP_2;
    let host = request.headers_mut().remove(header::HOST);
    for name in FORBIDDEN {
        request.headers_mut().remove(name);
    }
    if request.headers().get(header::TE).is_some_and(|te| te != "trailers") {
        request.headers_mut().remove(header::TE);
    }
    if request.uri().authority().is_none() || request.uri().scheme().is_none() {
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        if parts.authority.is_none() {
            let host = host.ok_or_else(|| bad("authority"))?;
            parts.authority = Some(Authority::try_from(host.as_bytes()).map_err(|_| bad("authority"))?);
        }
        parts.scheme.get_or_insert(if secure { Scheme::HTTPS } else { Scheme::HTTP });
        parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from_parts(parts).map_err(|_| bad("target"))?;
    }
    Ok(request)
}

fn bad(what: &str) -> UpstreamError {
    UpstreamError::new(Failure::Protocol, format!("the request has no usable {what}"))
}

/// The failure behind what hyper says.
fn explain(error: &hyper::Error) -> UpstreamError {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(body) = inner.downcast_ref::<BodyError>() {
            let failure = if body.is_malformed() { Failure::ClientProtocol } else { Failure::ClientGone };
            return UpstreamError::new(failure, inner.to_string());
        }
        if let Some(h2) = inner.downcast_ref::<h2::Error>() {
            return explain_h2(h2);
        }
        cause = inner.source();
    }
    if error.is_parse() || error.is_parse_too_large() {
        return UpstreamError::new(Failure::Protocol, error.to_string());
    }
    UpstreamError::new(Failure::Reset, "connection termination")
}
fn explain_h2(error: &h2::Error) -> UpstreamError {
    let reason = error.reason();
    if reason == Some(h2::Reason::REFUSED_STREAM) || (error.is_go_away() && reason == Some(h2::Reason::NO_ERROR)) {
        return UpstreamError::new(Failure::Refused, "remote refused stream reset");
    }
    if error.is_io() || error.is_go_away() {
        return UpstreamError::new(Failure::Reset, "connection termination");
    }
    if error.is_library() {
        return UpstreamError::new(Failure::Protocol, error.to_string());
    }
    UpstreamError::new(Failure::RemoteReset, "remote reset")
}
