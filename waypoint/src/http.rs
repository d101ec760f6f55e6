//! HTTP towards the client: one connection, its requests each an [`crate::exchange`].
//!
//! Owns the protocol limits of the client side and its drain. Upstream: `tunnel`, `listen::gateway`. Downstream: `exchange`.
use crate::body::Body;
use crate::conn::Conn;
use crate::exchange;
use ::http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

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
/// Most header fields (Envoy's default).
const FIELDS: usize = 100;
/// Receive window of one HTTP/2 stream: what a request that nobody reads may cost.
const WINDOW: u32 = 256 << 10;
/// Receive window of one HTTP/2 connection.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Streams of one HTTP/2 connection.
const STREAMS: u32 = 1000;
/// Send buffer of one HTTP/2 stream.
const SEND_BUFFER: usize = 256 << 10;

/// Serves one connection to its end: client gone, drained, or the protocol broken.
pub async fn serve<IO>(conn: Arc<Conn>, io: IO, version: Version)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(io);
    let settings = &conn.shared.settings;
    let headers_timeout = Some(settings.headers_timeout).filter(|t| !t.is_zero());
    let service = {
        let conn = Arc::clone(&conn);
        service_fn(move |request: Request<Incoming>| {
            let conn = Arc::clone(&conn);
            async move { Ok::<Response<Body>, Infallible>(exchange::run(&conn, request).await) }
        })
    };
    match version {
        Version::Http1 => {
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).max_buf_size(HEAD).max_header_size(HEAD).max_headers(FIELDS).half_close(false);
            builder.header_read_timeout(headers_timeout);
            let serving = pin!(builder.serve_connection(io, service).with_upgrades());
            drive(&conn, serving, hyper::server::conn::http1::UpgradeableConnection::graceful_shutdown).await;
        }
        Version::Http2 => {
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .initial_stream_window_size(WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_concurrent_streams(STREAMS)
                .max_header_list_size(HEAD as u32)
                .max_send_buf_size(SEND_BUFFER)
                .keep_alive_interval(Some(Duration::from_secs(30)))
                .keep_alive_timeout(Duration::from_secs(20));
            let serving = pin!(builder.serve_connection(io, service));
            drive(&conn, serving, hyper::server::conn::http2::Connection::graceful_shutdown).await;
        }
    }
}

/// Until the connection ends: by itself, after a graceful shutdown, or at the deadline of the drain.
async fn drive<C>(conn: &Conn, mut serving: Pin<&mut C>, shut_down: fn(Pin<&mut C>))
where
    C: Future<Output = hyper::Result<()>>,
{
    tokio::select! {
        done = serving.as_mut() => return ended(conn, done),
        _ = conn.drain.draining() => shut_down(serving.as_mut()),
    }
    tokio::select! {
        done = serving => ended(conn, done),
        () = conn.drain.expired() => {}
    }
}

fn ended(conn: &Conn, done: hyper::Result<()>) {
    if let Err(error) = done {
        tracing::debug!(client = %conn.client, %error, "HTTP connection ended");
    }
}
