//! HTTP towards the client: one connection, its requests each an [`crate::exchange`].
//!
//! Owns the protocol limits of the client side and its drain. Upstream: `tunnel`, `listen::gateway`. Downstream: `exchange`.
use crate::body::Body;
use crate::conn::Conn;
use crate::detect::Spoken;
use crate::exchange;
use crate::opening::first_bytes;
use crate::phase::admit;
use crate::share::{Counted, Total};
use ::http::{HeaderMap, Method, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_hbone::{ConnectRequest, HboneError, Settings, Tunnel};
use mesh_model::{HboneAuthority, Reason};
use parking_lot::Mutex;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// Largest head of an HTTP/1 request, and header list of an HTTP/2 one (Envoy's default 60 KiB, answered 431).
const HEAD: usize = 60 << 10;
/// Most header fields (Envoy's default): more are answered 431 in HTTP/1, and end the stream in HTTP/2, as in Envoy.
const FIELDS: usize = 100;
/// Receive window of one HTTP/2 stream: what of a request may lie here that nobody reads. With what is on its way to the endpoint
/// ([`crate::upstream`]: as much again as [`SEND_BUFFER`], and a tunnel's buffers on both sides) less than the 256 KiB that a
/// peer which does not read may cost.
const WINDOW: u32 = 128 << 10;
/// Receive window of one HTTP/2 connection.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Streams of one HTTP/2 connection.
const STREAMS: u32 = 1000;
/// When to look again where nothing is limited.
const FAR: Duration = Duration::from_hours(24);
/// Send buffer of one HTTP/2 stream: what of an answer may wait for its client, but for the last piece of it.
const SEND_BUFFER: usize = 48 << 10;

/// Serves one connection to its end: client gone, drained, or the protocol broken.
pub async fn serve<IO>(conn: Arc<Conn>, io: IO, version: Version)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match version {
        Version::Http1 => {
            let answering = Arc::clone(&conn);
            let service = service_fn(move |request: Request<Incoming>| {
                let conn = Arc::clone(&answering);
                async move { Ok::<_, Infallible>(exchange::run(&conn, request).await) }
            });
            let io = TokioIo::new(Watched { io, conn: Arc::clone(&conn) });
            let serving = pin!(http1_server().serve_connection(io, service).with_upgrades());
            drive(&conn, serving, hyper::server::conn::http1::UpgradeableConnection::graceful_shutdown).await;
        }
        Version::Http2 => {
            let (answering, held) = (Arc::clone(&conn), Total::default());
            let service = service_fn(move |request: Request<Incoming>| {
                let (conn, held) = (Arc::clone(&answering), Arc::clone(&held));
                async move {
                    // Those of HTTP/1 are counted by their parser.
                    if fields(&request) > FIELDS {
                        exchange::reset(&conn, request, "http2.too_many_headers");
                        return Err(TooManyFields);
                    }
                    Ok(exchange::run(&conn, request).await.map(|body| Counted::new(body, &held)))
                }
            });
            let serving = pin!(http2_server().serve_connection(TokioIo::new(io), service));
            drive(&conn, serving, hyper::server::conn::http2::Connection::graceful_shutdown).await;
        }
    }
}

/// The stream ends with an INTERNAL_ERROR.
#[derive(Debug, thiserror::Error)]
#[error("the head of a request has more than {FIELDS} fields")]
struct TooManyFields;

/// The fields of a head of HTTP/2, its pseudo-headers among them, as Envoy counts them.
fn fields(request: &Request<Incoming>) -> usize {
    let uri = request.uri();
    let pseudo = [uri.scheme().is_some(), uri.authority().is_some(), uri.path_and_query().is_some()];
    let protocol = request.extensions().get::<Protocol>().is_some();
    // One for the method.
    1 + pseudo.into_iter().filter(|there| *there).count() + usize::from(protocol) + request.headers().len()
}

fn http1_server() -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    // Its own limit for a head would count the time in which nobody asks anything.
    builder.max_buf_size(HEAD).max_header_size(HEAD).max_headers(FIELDS).half_close(false).header_read_timeout(None);
    builder
}
pub(crate) fn http2_server() -> hyper::server::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEAD as u32)
        .max_send_buf_size(SEND_BUFFER)
        // WebSockets (RFC 8441), as istiod allows them.
        .enable_connect_protocol()
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

/// Until the connection ends: by itself, after a graceful shutdown (drained, or idle for too long), or at the deadline of
/// the drain.
async fn drive<C>(conn: &Conn, mut serving: Pin<&mut C>, shut_down: fn(Pin<&mut C>))
where
    C: Future<Output = hyper::Result<()>>,
{
    tokio::select! {
        done = in_time(conn, serving.as_mut()) => match done {
            Ok(done) => return ended(conn, done),
            Err(Overdue::Head) => return tracing::debug!(client = %conn.client, "the head of a request took too long"),
            Err(Overdue::Idle) => shut_down(serving.as_mut()),
        },
        _ = conn.drain.draining() => shut_down(serving.as_mut()),
    }
    tokio::select! {
        done = serving => ended(conn, done),
        () = conn.drain.expired() => {}
    }
}

/// Which limit of time has passed.
enum Overdue {
    /// For the whole connection to be idle (Envoy: `idle_timeout` of the connection manager).
    Idle,
    /// For a head of HTTP/1 that has begun.
    Head,
}

/// The connection to its end, or to the limit it exceeds. One timer, set anew only when it rings or would ring too late.
async fn in_time<C: Future>(conn: &Conn, mut serving: Pin<&mut C>) -> Result<C::Output, Overdue> {
    let (idle, head) = (conn.shared.settings.http_idle_timeout, conn.shared.settings.headers_timeout);
    let far = || Instant::now() + [idle, head].into_iter().filter(|t| !t.is_zero()).max().unwrap_or(FAR);
    let mut timer = pin!(sleep_until(conn.activity.due(idle, head).unwrap_or_else(far)));
    poll_fn(|cx| {
        if let Poll::Ready(done) = serving.as_mut().poll(cx) {
            return Poll::Ready(Ok(done));
        }
        if let Some(due) = conn.activity.due(idle, head).filter(|due| *due < timer.deadline()) {
            timer.as_mut().reset(due);
        }
        while timer.as_mut().poll(cx).is_ready() {
            match conn.activity.due(idle, head) {
                Some(due) if due <= Instant::now() => {
                    return Poll::Ready(Err(if conn.activity.is_reading_head() { Overdue::Head } else { Overdue::Idle }));
                }
                due => timer.as_mut().reset(due.unwrap_or_else(far)),
            }
        }
        Poll::Pending
    })
    .await
}

/// A client's connection that tells of the bytes it brings.
struct Watched<IO> {
    io: IO,
    conn: Arc<Conn>,
}
impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.conn.activity.bytes_arrived();
        }
        polled
    }
}
impl<IO: AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// A request as the phases after `admit` see it, with its whole body.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Method.
    pub method: Method,
    /// Authority.
    pub authority: String,
    /// Path, normalised.
    pub path: String,
    /// Query.
    pub query: Option<String>,
    /// What is left of the headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Vec<u8>,
}

/// The requests in what a client sends through a tunnel, by the data path's own tunnel, first look, servers and first phase: for
/// fuzz checks. Bytes that are not HTTP, and requests that are refused or broken off, are none.
///
/// # Errors
/// The tunnel itself failed, or what serves its stream did.
pub async fn hear(bytes: &[u8]) -> Result<Vec<Heard>, HboneError> {
    let (tell, told) = oneshot::channel();
    let tell = Mutex::new(Some(tell));
    let (client, server) = tokio::io::duplex(HEAD);
    let settings = Arc::new(Settings::default());
    let (_drain, watch) = mesh_runtime::drain::channel();
    let serve_one = move |incoming| {
        let tell = tell.lock().take();
        async move {
            let heard = listen(incoming).await;
            // Once: there is one CONNECT. Nobody waits for it any more when the time of all is up.
            let _ = tell.map(|tell| tell.send(heard));
        }
    };
    let serving = mesh_hbone::serve(server, Arc::clone(&settings), serve_one, watch);
    let calling = async {
        let tunnel = Tunnel::handshake(client, settings, || {}).await?;
        let to = HboneAuthority::Addr(SocketAddr::from(([10, 0, 0, 1], 80)));
        let (stream, _) = tunnel.open(&ConnectRequest::to(to)).await?;
        let (mut answers, mut saying) = tokio::io::split(stream.into_io());
        let said = async {
            // The server may have had enough.
            let _ = saying.write_all(bytes).await;
            // Who hangs up gets no answer: not before all that was sent is served. On one thread it is after some turns of all.
            for _ in 0..200 {
                tokio::task::yield_now().await;
            }
            let _ = saying.shutdown().await;
        };
        let mut nowhere = tokio::io::sink();
        let _ = tokio::join!(said, tokio::io::copy(&mut answers, &mut nowhere));
        let heard = told.await.map_err(|_| HboneError::new(Reason::Internal, "what serves the stream broke off"));
        tunnel.abort();
        heard
    };
    let (served, heard) = tokio::join!(serving, calling);
    served.and(heard)
}

/// Serves one CONNECT: each request is heard, and answered with nothing.
async fn listen(incoming: mesh_hbone::Incoming) -> Vec<Heard> {
    let Ok(mut stream) = incoming.accept([]) else { return Vec::new() };
    let version = match first_bytes(&mut stream, None).await {
        Spoken::Http1 => Version::Http1,
        Spoken::Http2 => Version::Http2,
        Spoken::Unclear | Spoken::Tls(_) | Spoken::Other => return Vec::new(),
    };
    let heard = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&heard);
    let one = async move |request: Request<Incoming>, all: Arc<Mutex<Vec<Heard>>>| {
        let (parts, body) = request.into_parts();
        let admitted = admit::admitted(parts);
        if let (Some((authority, path, parts)), Ok(body)) = (admitted, body.collect().await) {
            let query = parts.uri.query().map(str::to_owned);
            let body = body.to_bytes().into();
            all.lock().push(Heard { method: parts.method, authority, path, query, headers: parts.headers, body });
        }
        Ok::<_, Infallible>(Response::new(Body::Empty))
    };
    let service = service_fn(move |request| one(request, Arc::clone(&all)));
    let io = TokioIo::new(stream.into_io());
    // What breaks a connection is the client's matter.
    let _ = match version {
        Version::Http1 => http1_server().serve_connection(io, service).await,
        Version::Http2 => http2_server().serve_connection(io, service).await,
    };
    let mut heard = heard.lock();
    std::mem::take(&mut *heard)
}

fn ended(conn: &Conn, done: hyper::Result<()>) {
    if let Err(error) = done {
        tracing::debug!(client = %conn.client, %error, "HTTP connection ended");
    }
}
