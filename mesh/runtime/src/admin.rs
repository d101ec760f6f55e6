//! The small HTTP/1.1 server behind ports 15000 (admin), 15020 (metrics) and 15021 (readiness).
//!
//! Owns parsing, limits and the answers 404, 405, 408 and 413; the routes belong to whoever adds them. It refuses bodies above
//! 64 KiB, slow heads and bodies (10 s), more than 64 connections, and clients that do not read (30 s). Anything
//! that is not HTTP gets 400 and a close. It is not meant for the mesh's traffic.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::sockets::{BoundListener, ListenerOptions, StreamOptions};

/// Largest request body in bytes.
pub const MAX_BODY: usize = 64 * 1024;
/// Most connections of one server at a time; further ones wait in the kernel's queue.
pub const MAX_CONNECTIONS: usize = 64;
/// Time for a request head, and again for its body; also how long an idle connection is kept.
pub const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may leave the answer unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for answers under way once the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// An answer; build it with [`text`], [`json`] or by hand.
pub type Response = http::Response<Bytes>;
/// The future of an answer.
pub type ResponseFuture = Pin<Box<dyn Future<Output = Response> + Send>>;
type Handler = Arc<dyn Fn(Request) -> ResponseFuture + Send + Sync>;

/// A request whose body has been read.
#[derive(Clone, Debug)]
pub struct Request {
    /// Method; a HEAD request arrives at its GET route with this still HEAD.
    pub method: Method,
    /// Path without the query.
    pub path: String,
    /// Decoded query. A key without `=` has an empty value; of a repeated key the last wins.
    pub query: BTreeMap<String, String>,
    /// Headers.
    pub headers: HeaderMap,
    /// Body, at most [`MAX_BODY`].
    pub body: Bytes,
}

/// A set of routes. Clones share nothing but the handlers.
#[derive(Clone)]
pub struct HttpServer {
    name: &'static str,
    routes: BTreeMap<String, Vec<(Method, Handler)>>,
}

impl std::fmt::Debug for HttpServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpServer").field("name", &self.name).field("routes", &self.routes.keys()).finish()
    }
}

impl HttpServer {
    /// A server without routes; `name` is for logs.
    pub fn new(name: &'static str) -> Self {
        Self { name, routes: BTreeMap::new() }
    }

    /// Adds a route with a handler that answers at once. The path is matched exactly; GET also answers HEAD. A second
    /// route for the same method and path replaces the first.
    #[must_use]
    pub fn route<H>(self, method: Method, path: &str, handler: H) -> Self
    where
        H: Fn(Request) -> Response + Send + Sync + 'static,
    {
        self.route_async(method, path, move |request| std::future::ready(handler(request)))
    }

    /// Adds a route with a handler that may wait.
    #[must_use]
    pub fn route_async<H, F>(mut self, method: Method, path: &str, handler: H) -> Self
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = Response> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |request| Box::pin(handler(request)));
        let methods = self.routes.entry(path.to_owned()).or_default();
        methods.retain(|(known, _)| *known != method);
        methods.push((method, handler));
        self
    }

    /// Adds a route whose handler takes a while (a dump of a large mesh): it runs on a blocking thread, so that this one
    /// goes on with its work.
    #[must_use]
    pub fn route_blocking<H>(self, method: Method, path: &str, handler: H) -> Self
    where
        H: Fn(Request) -> Response + Send + Sync + 'static,
    {
        let handler = Arc::new(handler);
        self.route_async(method, path, move |request| {
            let handler = Arc::clone(&handler);
            let made = tokio::task::spawn_blocking(move || handler(request));
            async move { made.await.unwrap_or_else(|e| text(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n"))) }
        })
    }

    /// Adds a POST route that answers a question in JSON with JSON, on a blocking thread: 400 when the question cannot be
    /// read, 422 with the text when it has no answer.
    #[must_use]
    pub fn route_question<Q, A, E, H>(self, path: &str, answer: H) -> Self
    where
        Q: serde::de::DeserializeOwned,
        A: serde::Serialize,
        E: std::fmt::Display,
        H: Fn(Q) -> Result<A, E> + Send + Sync + 'static,
    {
        self.route_blocking(Method::POST, path, move |request| match serde_json::from_slice(&request.body) {
            Err(error) => text(StatusCode::BAD_REQUEST, format!("not the JSON that is expected: {error}\n")),
            Ok(question) => match answer(question) {
                Ok(answer) => json(&answer),
                Err(error) => text(StatusCode::UNPROCESSABLE_ENTITY, format!("{error}\n")),
            },
        })
    }

    /// The paths that have a route, sorted: for an index page.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.routes.keys().map(String::as_str)
    }

    /// Binds `addr` in the calling thread's network namespace.
    pub fn bind(&self, addr: SocketAddr) -> io::Result<BoundServer> {
        let stream = StreamOptions { user_timeout: Some(WRITE_TIMEOUT), ..StreamOptions::default() };
        let listener = ListenerOptions { stream, ..ListenerOptions::new(addr) }.bind()?;
        Ok(BoundServer { server: Arc::new(self.clone()), listener })
    }

    /// Serves one connection that was accepted elsewhere (an in-memory pipe, a tunnel).
    pub async fn serve_stream<I>(&self, stream: I)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (_never, stop) = watch::channel(false);
        serve_connection(Arc::new(self.clone()), stream, stop).await;
    }

    /// Answers a request, without a network.
    pub async fn answer(&self, request: Request) -> Response {
        let Some(methods) = self.routes.get(&request.path) else {
            return text(StatusCode::NOT_FOUND, "not found\n");
        };
        let wanted = if request.method == Method::HEAD { &Method::GET } else { &request.method };
        let handler = methods.iter().find(|(method, _)| method == wanted || *method == request.method);
        match handler {
            Some((_, handler)) => {
                let future = handler(request);
                future.await
            }
            None => not_allowed(methods),
        }
    }
}

fn not_allowed(methods: &[(Method, Handler)]) -> Response {
    let allowed: Vec<&str> = methods.iter().map(|(method, _)| method.as_str()).collect();
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("method not allowed, use {}\n", allowed.join(" or ")));
    if let Ok(value) = HeaderValue::from_str(&allowed.join(", ")) {
        response.headers_mut().insert(ALLOW, value);
    }
    response
}

/// A server that has its port but does not answer yet.
#[derive(Debug)]
pub struct BoundServer {
    server: Arc<HttpServer>,
    listener: BoundListener,
}

impl BoundServer {
    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `stop` resolves, then finishes the answers under way (at most 5 s).
    ///
    /// # Errors
    /// The listening socket breaks.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> io::Result<()> {
        let listener = self.listener.into_listener()?;
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let (stopping, stopped) = watch::channel(false);
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        let result = loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stop => break Ok(()),
                accepted = accept(&listener, &slots) => accepted,
            };
            let (accepted, slot) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => break Err(error),
            };
            while connections.try_join_next().is_some() {}
            let Ok(stream) = accepted.into_tcp() else { continue };
            let server = Arc::clone(&self.server);
            let stopped = stopped.clone();
            connections.spawn(async move {
                serve_connection(server, stream, stopped).await;
                drop(slot);
            });
        };
        drop(listener);
        stopping.send_replace(true);
        let finish = async { while connections.join_next().await.is_some() {} };
        // What is left after the limit is aborted by dropping the set.
        let _ = tokio::time::timeout(STOP_TIMEOUT, finish).await;
        result
    }
}

async fn accept(
    listener: &crate::sockets::Listener,
    slots: &Arc<Semaphore>,
) -> io::Result<(crate::sockets::RawAccepted, tokio::sync::OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (accepted, _) = listener.accept().await?;
    Ok((accepted, slot))
}

async fn serve_connection<I>(server: Arc<HttpServer>, stream: I, mut stop: watch::Receiver<bool>)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let name = server.name;
    let service = service_fn(move |request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, std::convert::Infallible>(serve_request(&server, request).await.map(Full::new)) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_TIMEOUT)
        .max_buf_size(MAX_BODY)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(server = name, %error, "http connection ended");
    }
}

/// Resolves when told to stop, or when nobody can tell any more.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // The guard that `wait_for` returns must not live across an await of the caller.
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn serve_request(server: &HttpServer, request: http::Request<Incoming>) -> Response {
    let (parts, body) = request.into_parts();
    let body = match tokio::time::timeout(READ_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "request body too slow\n"),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return text(StatusCode::PAYLOAD_TOO_LARGE, "request body above 64 KiB\n");
        }
        Ok(Err(_)) => return text(StatusCode::BAD_REQUEST, "unreadable request body\n"),
        Ok(Ok(body)) => body.to_bytes(),
    };
    let request = Request {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parse_query(parts.uri.query().unwrap_or_default()),
        headers: parts.headers,
        body,
    };
    server.answer(request).await
}

/// Decodes `a=1&b&c=x%20y`.
pub fn parse_query(query: &str) -> BTreeMap<String, String> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key), decode(value))
        })
        .collect()
}

/// Percent-decoding as of HTML forms; what is not a valid escape stays as it is, what is not UTF-8 becomes U+FFFD.
fn decode(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, tail) {
            (b'+', _) => out.push(b' '),
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    out.push(high << 4 | low);
                    rest = after;
                }
                _ => out.push(b'%'),
            },
            (byte, _) => out.push(*byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    // A hexadecimal digit is below 16.
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// A plain-text answer.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response {
    respond(status, "text/plain; charset=utf-8", body.into())
}

/// An indented JSON answer; 500 when `value` cannot be serialised.
pub fn json<T: serde::Serialize + ?Sized>(value: &T) -> Response {
    match serde_json::to_vec_pretty(value) {
        Ok(mut body) => {
            body.push(b'\n');
            respond(StatusCode::OK, "application/json", body.into())
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot serialise: {error}\n")),
    }
}

/// An answer with a content type.
pub fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests;
