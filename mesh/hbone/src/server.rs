//! The server end of a tunnel: accepts CONNECT streams and hands each to a handler on its own task.
//!
//! Owns one h2 server connection for its whole life: handshake, keepalive, limits, drain. It refuses what is not a CONNECT
//! (400) without asking anyone, and knows nothing of policy. Upstream: the agent's inbound listener, after TLS. Downstream:
//! the handler it is given.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::task::Poll;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use mesh_model::source::is_passed_on;
use mesh_model::workload::Workload;
use mesh_model::{Reason, Refusal, Snapshot, SpiffeId};
use mesh_runtime::drain::{DrainMode, DrainWatch};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::error::{HboneError, clean};
use crate::headers;
use crate::settings::Settings;
use crate::stream::{HboneStream, StreamError};
use crate::tunnel::{CountedIo, Health, Shared, StreamSlot, Upkeep};

/// A CONNECT that waits for an answer. Dropping it unanswered resets the stream.
pub struct Incoming {
    authority: Box<str>,
    headers: HeaderMap,
    recv: h2::RecvStream,
    respond: h2::server::SendResponse<Bytes>,
    slot: StreamSlot,
    answered: Answered,
}

impl Incoming {
    /// `:authority`, as the client wrote it; parse with [`mesh_model::HboneAuthority::parse`].
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// All header fields.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The client's `baggage`; [`headers::Baggage::parse`] reads it. Telemetry only: the client may claim anything.
    pub fn baggage(&self) -> Option<&HeaderValue> {
        self.headers.get(headers::BAGGAGE)
    }

    /// The client as its own agent tells of it, where `snap` has it that this came from another network through a gateway of ours:
    /// the address is the gateway's then. For labels; `id` is what was proven.
    pub fn client_beyond(&self, snap: &Snapshot, client: IpAddr, id: &SpiffeId) -> Option<Arc<Workload>> {
        let network = self.forwarded_network()?;
        is_passed_on(snap, client, network).then(|| self.said_of(id)).flatten()
    }

    /// What the client says of itself, believed as little as [`Incoming::baggage`].
    pub fn said_of(&self, id: &SpiffeId) -> Option<Arc<Workload>> {
        Some(Arc::new(headers::Baggage::parse(self.baggage()?.as_bytes()).workload(id)))
    }

    /// The client's `forwarded`.
    pub fn forwarded(&self) -> Option<headers::Forwarded<'_>> {
        self.headers.get(http::header::FORWARDED).map(|value| headers::Forwarded::parse(value.as_bytes()))
    }

    /// The client's `traceparent`, if valid.
    pub fn traceparent(&self) -> Option<headers::TraceParent> {
        self.headers.get(headers::TRACEPARENT).and_then(|value| headers::TraceParent::parse(value.as_bytes()))
    }

    /// `x-forwarded-network`.
    pub fn forwarded_network(&self) -> Option<&str> {
        self.headers.get(headers::FORWARDED_NETWORK).and_then(|value| value.to_str().ok())
    }

    /// Resolves when the client gave up; to be raced with the dial to the application. Cancel safe.
    pub async fn cancelled(&mut self) -> StreamError {
        poll_fn(|cx| self.respond.poll_reset(cx))
            .await
            .map_or_else(|error| StreamError::Tunnel(error.to_string()), StreamError::Reset)
    }

    /// Answers 200 with `headers` (the destination's `baggage`) and opens the stream.
    pub fn accept(mut self, headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>) -> Result<HboneStream, HboneError> {
        let mut response = Response::new(());
        response.headers_mut().extend(headers);
        let send = self.respond.send_response(response, false).map_err(|error| HboneError::from_open(&error))?;
        self.answered.yes = true;
        Ok(HboneStream::new(send, self.recv, self.slot))
    }

    /// Answers with the status of the refusal's reason and says why in `x-culvert-reason`. A reason that has no status of
    /// its own (it ends connections, not requests) is answered 503.
    pub fn refuse(mut self, refusal: &Refusal) {
        let status = refusal.reason.connect_status();
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        let mut text = String::from(refusal.reason.as_str());
        if !refusal.detail.is_empty() {
            // Writing to a String does not fail.
            let _ = write!(text, ": {}", clean(&refusal.detail));
        }
        if let Ok(value) = HeaderValue::try_from(text) {
            response.headers_mut().insert(headers::CULVERT_REASON, value);
        }
        // Fails only when the client is already gone.
        self.answered.yes = self.respond.send_response(response, true).is_ok();
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("authority", &self.authority).finish_non_exhaustive()
    }
}

/// Counts streams that ended before an answer (rapid reset, CVE-2023-44487).
#[derive(Debug)]
struct Answered {
    early: Arc<Abuse>,
    yes: bool,
}

#[derive(Debug, Default)]
struct Abuse {
    /// Unanswered ends in this keepalive interval.
    early: AtomicU32,
    /// Handlers running.
    handlers: AtomicUsize,
}

impl Drop for Answered {
    fn drop(&mut self) {
        if !self.yes {
            self.early.early.fetch_add(1, Relaxed);
        }
    }
}

struct HandlerGuard(Arc<Abuse>);

impl Drop for HandlerGuard {
    fn drop(&mut self) {
        self.0.handlers.fetch_sub(1, Relaxed);
    }
}

/// How a tunnel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The client closed it or went away.
    PeerClosed,
    /// It was drained: GOAWAY, and all streams ended in time.
    Drained,
    /// The drain's deadline came, or it was immediate; streams were cut.
    Cut,
    /// The client stopped answering pings.
    Unresponsive,
    /// The client abused resets; GOAWAY ENHANCE_YOUR_CALM.
    Abusive,
}

/// Serves one authenticated connection until it ends; to be spawned on a data thread. `handler` is called for every CONNECT
/// and its future runs as a task of its own on the same thread. Dropping the future of `serve` ends the tunnel at once
/// (revocation): its streams see [`StreamError::Tunnel`].
pub async fn serve<IO, H, F>(io: IO, settings: Arc<Settings>, handler: H, drain: DrainWatch) -> Result<Served, HboneError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let shared = Shared::new(settings.server_max_streams as usize, settings.stream_window);
    let io = CountedIo::new(io, Arc::clone(&shared));
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.frame_size)
        .max_header_list_size(settings.server_header_list)
        .max_send_buffer_size(settings.send_buffer)
        .data_frame_budget(settings.small_frame_budget)
        .max_concurrent_streams(settings.server_max_streams)
        .max_pending_accept_reset_streams(settings.max_pending_resets)
        .max_concurrent_reset_streams(settings.remembered_resets)
        .max_local_error_reset_streams(Some(settings.max_error_resets));
    let handshake = timeout(settings.handshake_timeout, builder.handshake(io));
    let mut connection = tokio::select! {
        biased;
        done = handshake => done
            .map_err(|_| HboneError::new(Reason::HandshakeTimeout, "HTTP/2 handshake timed out"))?
            .map_err(|error| HboneError::from_connection(&error))?,
        () = drain.expired() => return Ok(Served::Cut),
    };
    let mut upkeep = Upkeep::new(Arc::clone(&shared), connection.ping_pong(), &settings);
    let abuse = Arc::new(Abuse::default());
    let mut draining = pin!(drain.draining());
    let mut expired = pin!(drain.expired());
    let mut is_draining = false;
    loop {
        let event = poll_fn(|cx| {
            if let Poll::Ready(accepted) = connection.poll_accept(cx) {
                return Poll::Ready(Event::Accepted(accepted));
            }
            if let Poll::Ready(health) = upkeep.poll(cx, &mut connection, &settings) {
                return Poll::Ready(Event::Health(health));
            }
            if is_draining {
                expired.as_mut().poll(cx).map(|()| Event::Expired)
            } else {
                draining.as_mut().poll(cx).map(|state| Event::Draining(state.mode))
            }
        })
        .await;
        match event {
            Event::Accepted(None) if is_draining => return Ok(Served::Drained),
            Event::Accepted(None) => return Ok(Served::PeerClosed),
            Event::Accepted(Some(Err(error))) => {
                return if error.is_io() { Ok(Served::PeerClosed) } else { Err(HboneError::from_connection(&error)) };
            }
            Event::Accepted(Some(Ok((request, respond)))) => {
                if let Some(incoming) = admit(request, respond, &shared, &abuse, &settings) {
                    let guard = HandlerGuard(Arc::clone(&abuse));
                    abuse.handlers.fetch_add(1, Relaxed);
                    let work = handler(incoming);
                    // Not an async block: that would hold the handler's future twice.
                    tokio::spawn(work.map(move |()| drop(guard)));
                }
            }
            Event::Health(Health::Dead) => return Ok(Served::Unresponsive),
            Event::Health(Health::Tick) => {
                if abuse.early.swap(0, Relaxed) > settings.max_early_resets {
                    connection.abrupt_shutdown(h2::Reason::ENHANCE_YOUR_CALM);
                    // Bounded by the peer's socket or the timeout: the GOAWAY is a courtesy.
                    let _ = timeout(settings.ping_interval, poll_fn(|cx| connection.poll_closed(cx))).await;
                    return Ok(Served::Abusive);
                }
            }
            Event::Draining(DrainMode::Graceful { .. }) => {
                is_draining = true;
                shared.close();
                connection.graceful_shutdown();
            }
            Event::Draining(DrainMode::Immediate) | Event::Expired => return Ok(Served::Cut),
        }
    }
}

/// A request and the handle to answer it.
type Accepted = (Request<h2::RecvStream>, h2::server::SendResponse<Bytes>);

#[expect(clippy::large_enum_variant, reason = "passed by value within one function, never stored")]
enum Event {
    Accepted(Option<Result<Accepted, h2::Error>>),
    Health(Health),
    Draining(DrainMode),
    Expired,
}

/// Checks what needs no knowledge of the mesh; `None` when the request was answered here.
fn admit(
    request: Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    shared: &Arc<Shared>,
    abuse: &Arc<Abuse>,
    settings: &Settings,
) -> Option<Incoming> {
    let (parts, recv) = request.into_parts();
    if abuse.handlers.load(Relaxed) >= settings.server_max_streams as usize {
        // Streams that were reset still run their handlers: h2 no longer counts them, we do.
        respond.send_reset(h2::Reason::REFUSED_STREAM);
        return None;
    }
    let incoming = Incoming {
        authority: parts.uri.authority().map_or("", http::uri::Authority::as_str).into(),
        headers: parts.headers,
        recv,
        respond,
        slot: shared.take_slot(),
        answered: Answered { early: Arc::clone(abuse), yes: false },
    };
    let problem: Option<Cow<'static, str>> = if parts.method != Method::CONNECT {
        Some(format!("method {} is not CONNECT", clean(parts.method.as_str())).into())
    } else if incoming.authority.is_empty() {
        Some("no authority".into())
    } else {
        None
    };
    match problem {
        Some(detail) => {
            incoming.refuse(&Refusal::new(Reason::BadRequest, detail));
            None
        }
        None => Some(incoming),
    }
}
