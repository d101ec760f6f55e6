//! The client end of a tunnel: handshake, driver, CONNECT.
//!
//! Owns one h2 client connection and the task that drives it. It refuses to dial (the pool's [`crate::pool::Dialer`] does)
//! and to know who the peer is. Upstream: `pool`, or the agent directly for the inner tunnel of double HBONE.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::uri::{Authority, Parts as UriParts};
use http::{HeaderMap, Method, Request, Uri, Version};
use mesh_model::{HboneAuthority, Reason};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use crate::error::HboneError;
use crate::headers;
use crate::settings::Settings;
use crate::stream::HboneStream;
use crate::tunnel::{CountedIo, Health, Shared, StreamSlot, Upkeep};

/// What a CONNECT says. Values are ready header values, so that the agent can compute them once per workload.
#[derive(Clone, Debug)]
pub struct ConnectRequest {
    /// Where the stream shall lead.
    pub authority: HboneAuthority,
    /// `baggage` of the source workload ([`headers::Baggage::encode`]).
    pub baggage: Option<HeaderValue>,
    /// `forwarded` ([`headers::forwarded`]).
    pub forwarded: Option<HeaderValue>,
    /// `traceparent` ([`headers::TraceParent`]).
    pub traceparent: Option<HeaderValue>,
    /// Anything else, e.g. `x-forwarded-network`.
    pub extra: Vec<(HeaderName, HeaderValue)>,
}

impl ConnectRequest {
    /// A request with the authority only.
    pub fn to(authority: HboneAuthority) -> Self {
        Self { authority, baggage: None, forwarded: None, traceparent: None, extra: Vec::new() }
    }

    fn build(&self) -> Result<Request<()>, HboneError> {
        let authority = Authority::from_maybe_shared(Bytes::from(self.authority.to_string()))
            .map_err(|error| HboneError::new(Reason::BadRequest, format!("authority {}: {error}", self.authority)))?;
        let mut parts = UriParts::default();
        parts.authority = Some(authority);
        let uri = Uri::from_parts(parts)
            .map_err(|error| HboneError::new(Reason::BadRequest, format!("authority {}: {error}", self.authority)))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = uri;
        let out = request.headers_mut();
        out.reserve(3 + self.extra.len());
        if let Some(value) = &self.baggage {
            out.insert(headers::BAGGAGE, value.clone());
        }
        // These two differ on every connection: kept out of the HPACK table, where they would push out the baggage.
        if let Some(value) = &self.forwarded {
            let mut value = value.clone();
            value.set_sensitive(true);
            out.insert(http::header::FORWARDED, value);
        }
        if let Some(value) = &self.traceparent {
            let mut value = value.clone();
            value.set_sensitive(true);
            out.insert(headers::TRACEPARENT, value);
        }
        for (name, value) in &self.extra {
            out.append(name.clone(), value.clone());
        }
        Ok(request)
    }
}

/// The 200 that opened a stream.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// Its header fields; `baggage` describes the destination workload ([`headers::Baggage::parse`]).
    pub headers: HeaderMap,
}

impl ResponseHead {
    /// The destination's `baggage`, when it sent one.
    pub fn baggage(&self) -> Option<&HeaderValue> {
        self.headers.get(headers::BAGGAGE)
    }
}

/// A live client tunnel. Clones share it; it closes by itself when every clone and every stream is gone.
#[derive(Clone)]
pub struct Tunnel {
    requests: h2::client::SendRequest<Bytes>,
    shared: Arc<Shared>,
    settings: Arc<Settings>,
    abort: AbortHandle,
}

impl Tunnel {
    /// HTTP/2 handshake over an authenticated stream, within [`Settings::handshake_timeout`]. Spawns the driver on the
    /// current runtime. `on_close` runs once, on the driver's task, when the tunnel has ended.
    pub async fn handshake<IO>(
        io: IO,
        settings: Arc<Settings>,
        on_close: impl FnOnce() + Send + 'static,
    ) -> Result<Self, HboneError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let shared = Shared::new(settings.client_max_streams, settings.stream_window);
        let io = CountedIo::new(io, Arc::clone(&shared));
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_frame_size(settings.frame_size)
            .max_header_list_size(settings.client_header_list)
            .max_send_buffer_size(settings.send_buffer)
            .data_frame_budget(settings.small_frame_budget)
            .initial_max_send_streams(settings.client_max_streams)
            .max_concurrent_streams(0)
            .max_concurrent_reset_streams(settings.remembered_resets)
            .max_local_error_reset_streams(Some(settings.max_error_resets))
            .enable_push(false);
        let (requests, mut connection) = timeout(settings.handshake_timeout, builder.handshake(io))
            .await
            .map_err(|_| HboneError::new(Reason::HandshakeTimeout, "HTTP/2 handshake timed out"))?
            .map_err(|error| HboneError::from_connection(&error))?;
        let upkeep = Upkeep::new(Arc::clone(&shared), connection.ping_pong(), &settings);
        let driver = Driver {
            connection,
            upkeep,
            on_close: OnClose { shared: Arc::clone(&shared), then: Some(on_close) },
            settings: Arc::clone(&settings),
            unused_since: Some(Instant::now()),
            heard: false,
        };
        let abort = tokio::spawn(driver).abort_handle();
        Ok(Self { requests, shared, settings, abort })
    }

    /// Opens a stream: CONNECT, and the wait for its answer within [`Settings::connect_timeout`]. Fails with
    /// `Overloaded`/`unprocessed` when the tunnel is full or closed.
    pub async fn open(&self, request: &ConnectRequest) -> Result<(HboneStream, ResponseHead), HboneError> {
        let Some(slot) = self.reserve() else {
            return Err(HboneError { unprocessed: true, ..HboneError::new(Reason::Overloaded, "tunnel is full or closing") });
        };
        self.open_in(slot, request).await
    }

    /// A place for one stream, or `None` when full, closed or past GOAWAY.
    pub(crate) fn reserve(&self) -> Option<Slot> {
        self.is_open().then(|| self.shared.try_slot().map(Slot)).flatten()
    }

    pub(crate) async fn open_in(&self, slot: Slot, request: &ConnectRequest) -> Result<(HboneStream, ResponseHead), HboneError> {
        let request = request.build()?;
        let mut requests = self.requests.clone();
        poll_fn(|cx| requests.poll_ready(cx)).await.map_err(|error| dead(&error))?;
        let (response, send) = requests.send_request(request, false).map_err(|error| dead(&error))?;
        let response = match timeout(self.settings.connect_timeout, response).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(HboneError::from_open(&error)),
            // Dropping `send` resets the stream.
            Err(_) => return Err(HboneError::new(Reason::HandshakeTimeout, "CONNECT was not answered in time")),
        };
        let (head, recv) = response.into_parts();
        if head.status != http::StatusCode::OK {
            let said = head.headers.get(headers::CULVERT_REASON).and_then(|value| value.to_str().ok());
            let said = said.map(crate::error::clean);
            return Err(HboneError::refused(head.status.as_u16(), said.as_deref()));
        }
        Ok((HboneStream::new(send, recv, slot.0), ResponseHead { headers: head.headers }))
    }

    /// Whether streams may still be opened: alive, no GOAWAY, not being closed. Says nothing about room.
    pub fn is_open(&self) -> bool {
        if self.shared.is_closed() {
            return false;
        }
        // A fresh handle is ready unless the connection failed or was told to go away.
        let mut cx = Context::from_waker(std::task::Waker::noop());
        !matches!(self.requests.clone().poll_ready(&mut cx), Poll::Ready(Err(_)))
    }

    /// Streams open now.
    pub fn streams(&self) -> usize {
        self.shared.streams()
    }

    /// Streams this tunnel may carry at once: our limit or the peer's, whichever is lower.
    pub fn max_streams(&self) -> usize {
        self.shared.limit()
    }

    /// Whether the tunnel's socket was full at the last write.
    pub fn is_busy(&self) -> bool {
        self.shared.is_send_blocked()
    }

    /// No new streams; closes when the last one ends.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Ends the tunnel now; its streams see [`crate::StreamError::Tunnel`].
    pub fn abort(&self) {
        self.end_handle().abort();
    }

    /// Whether [`Self::abort`] was called.
    pub(crate) fn is_aborted(&self) -> bool {
        self.shared.is_aborted()
    }

    /// Ends the tunnel without keeping it open.
    pub(crate) fn end_handle(&self) -> EndHandle {
        EndHandle { shared: Arc::clone(&self.shared), abort: self.abort.clone() }
    }
}

/// Can end a tunnel, and does not count as one of its users.
#[derive(Debug)]
pub(crate) struct EndHandle {
    shared: Arc<Shared>,
    abort: AbortHandle,
}

impl EndHandle {
    /// See [`Tunnel::abort`].
    pub(crate) fn abort(&self) {
        self.shared.abort();
        self.abort.abort();
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.abort.is_finished()
    }
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel")
            .field("streams", &self.streams())
            .field("max_streams", &self.max_streams())
            .field("closed", &self.shared.is_closed())
            .finish_non_exhaustive()
    }
}

/// A reserved place for a stream.
#[derive(Debug)]
pub(crate) struct Slot(StreamSlot);

/// The connection was already unusable: certainly nothing was processed.
fn dead(error: &h2::Error) -> HboneError {
    HboneError { unprocessed: true, ..HboneError::from_open(error) }
}

/// Marks the tunnel closed and tells its owner, once; also when the driver is aborted.
struct OnClose<F: FnOnce()> {
    shared: Arc<Shared>,
    then: Option<F>,
}

impl<F: FnOnce()> OnClose<F> {
    fn fire(&mut self) {
        self.shared.close();
        if let Some(then) = self.then.take() {
            then();
        }
    }
}

impl<F: FnOnce()> Drop for OnClose<F> {
    fn drop(&mut self) {
        self.fire();
    }
}

/// Drives the connection until it ends.
struct Driver<IO, F>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    F: FnOnce(),
{
    connection: h2::client::Connection<CountedIo<IO>, Bytes>,
    upkeep: Upkeep,
    on_close: OnClose<F>,
    settings: Arc<Settings>,
    unused_since: Option<Instant>,
    /// The peer's SETTINGS were looked at.
    heard: bool,
}

// Nothing in it is self-referential; `F` and `IO` are moved, never pinned.
impl<IO: AsyncRead + AsyncWrite + Unpin, F: FnOnce()> Unpin for Driver<IO, F> {}

impl<IO, F> Future for Driver<IO, F>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    F: FnOnce(),
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        // Bounded: each further round needs a timer tick.
        for _ in 0..4 {
            if let Poll::Ready(result) = Pin::new(&mut this.connection).poll(cx) {
                if let Err(error) = result {
                    tracing::debug!(%error, "tunnel ended");
                }
                return Poll::Ready(());
            }
            if !this.heard && this.on_close.shared.has_heard() {
                this.heard = true;
                this.follow_peer_limit();
            }
            match this.upkeep.poll(cx, &mut this.connection, &this.settings) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Health::Dead) => {
                    tracing::debug!("tunnel ended: the peer does not answer pings");
                    return Poll::Ready(());
                }
                Poll::Ready(Health::Tick) => this.tick(),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<IO, F> Driver<IO, F>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    F: FnOnce(),
{
    fn follow_peer_limit(&self) {
        let limit = self.connection.max_concurrent_send_streams().min(self.settings.client_max_streams);
        self.on_close.shared.set_limit(limit);
    }

    /// Slow checks.
    fn tick(&mut self) {
        self.follow_peer_limit();
        if self.on_close.shared.streams() > 0 {
            self.unused_since = None;
            return;
        }
        let now = Instant::now();
        let since = *self.unused_since.get_or_insert(now);
        // A peer that lets us open nothing is not worth a connection. Until this tick the tunnel keeps the pool from dialing
        // that peer again.
        let useless = self.on_close.shared.limit() == 0;
        if (useless || now.duration_since(since) >= self.settings.unused_release) && self.on_close.shared.close_if_unused() {
            // The owner drops its handle, the last one, upon which h2 says GOAWAY and ends the connection.
            self.on_close.fire();
        }
    }
}
