//! Requests to an API server: HTTP/2 on one connection where it offers that, HTTP/1.1 on one each otherwise.
//!
//! Owns the connection, TLS, the token of every request, and the framing of lists and watches. Refuses a server whose
//! certificate does not name it, and answers larger than any real one. Upstream: [`super::watch`], [`super::nodes`].
//! Downstream: the API server.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_runtime::control_plane::chain;
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::sync::Mutex;

use super::access::Access;
use crate::dial::{self, AGENT, Server, next_frame};

/// Limit for the head of an answer, and for each piece of a list.
const ANSWER: Duration = Duration::from_mins(1);
/// HTTP/2 pings, and how long one may stay unanswered: a server that is gone must not look like one with nothing to say.
const PING: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(10));
/// Bytes of one answer and of one connection on their way to us: a first list is large.
const WINDOWS: (u32, u32) = (2 << 20, 8 << 20);
/// Largest page of a list. Objects are 1.5 MiB at most each, and usually a thousandth of that.
const LARGEST_LIST: usize = 256 << 20;
/// Largest event of a watch.
const LARGEST_EVENT: usize = 16 << 20;

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Sort.
    pub why: Why,
    /// In the words of the server or of the client.
    pub message: String,
}
/// Sort of a [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// 401: the server does not know who this is, or does not any more.
    Unauthorized,
    /// 403: this process may not do that.
    Forbidden,
    /// 404: no CRD, or none of the versions that are understood; of one object, that it is gone.
    Missing,
    /// 410: the server has forgotten where the watch was.
    Expired,
    /// Anything else: no connection, a server in trouble.
    Other,
}
impl Why {
    /// The word in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::Missing => "missing",
            Self::Expired => "expired",
            Self::Other => "failed",
        }
    }
    fn of(code: u64) -> Self {
        match code {
            401 => Self::Unauthorized,
            403 => Self::Forbidden,
            404 => Self::Missing,
            410 => Self::Expired,
            _ => Self::Other,
        }
    }
}
impl Failure {
    fn other(message: impl Into<String>) -> Self {
        Self { why: Why::Other, message: message.into() }
    }
    /// What a `Status` object says.
    pub fn of_status(status: &Value, code: u64) -> Self {
        let code = status["code"].as_u64().unwrap_or(code);
        let message = match status["message"].as_str() {
            Some(message) if !message.is_empty() => message.to_owned(),
            _ => format!("the API server answers {code}"),
        };
        Self { why: Why::of(code), message }
    }
}

type H2 = http2::SendRequest<Full<Bytes>>;

#[derive(Debug)]
struct Inner {
    server: Server,
    tls: Option<ServerName<'static>>,
    shared: Mutex<Option<H2>>,
}

/// A client. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client(Arc<Inner>);

impl Client {
    /// A client for that server, which is not asked yet.
    pub fn new(access: &Access) -> Result<Self, String> {
        let server = access.server()?;
        let tls = server.tls_name()?;
        Ok(Self(Arc::new(Inner { server, tls, shared: Mutex::new(None) })))
    }

    /// One page of a list, or one object.
    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        read(self.send(path, None).await?).await
    }

    /// Changes an object by a JSON merge patch.
    pub async fn merge(&self, path: &str, patch: &Value) -> Result<Value, Failure> {
        read(self.send(path, Some(patch.to_string().into())).await?).await
    }

    /// The events of a watch. `silence`: how long nothing may come before the watch counts as lost.
    pub async fn watch(&self, path: &str, silence: Duration) -> Result<Events, Failure> {
        let response = self.send(path, None).await?;
        Ok(Events { body: response.into_body(), rest: BytesMut::new(), scanned: 0, silence })
    }

    /// One request; an answer other than 2xx is a failure.
    async fn send(&self, path: &str, patch: Option<Bytes>) -> Result<Response<Incoming>, Failure> {
        let answer = tokio::time::timeout(ANSWER, self.exchange(path, patch)).await;
        let response = answer.map_err(|_| Failure::other("the API server does not answer"))?.map_err(Failure::other)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let code = response.status();
        let body = tokio::time::timeout(ANSWER, http_body_util::Limited::new(response.into_body(), 1 << 20).collect()).await;
        let status = body.ok().and_then(Result::ok).and_then(|b| serde_json::from_slice(&b.to_bytes()).ok());
        Err(match status {
            Some(status) => Failure::of_status(&status, u64::from(code.as_u16())),
            None => Failure { why: Why::of(u64::from(code.as_u16())), message: format!("the API server answers {code}") },
        })
    }

    async fn exchange(&self, path: &str, patch: Option<Bytes>) -> Result<Response<Incoming>, String> {
        let mut shared = self.0.shared.lock().await;
        if let Some(mut h2) = shared.clone().filter(|h2| !h2.is_closed()) {
            drop(shared);
            let request = self.request(path, patch, true)?;
            return h2.send_request(request).await.map_err(|e| chain(&e));
        }
        let Inner { server, tls, .. } = &*self.0;
        let (stream, is_h2) = server.dial(tls.as_ref(), &[b"h2", b"http/1.1"]).await?;
        let request = self.request(path, patch, is_h2)?;
        let io = TokioIo::new(stream);
        if is_h2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .initial_stream_window_size(WINDOWS.0)
                .initial_connection_window_size(WINDOWS.1)
                .keep_alive_interval(PING.0)
                .keep_alive_timeout(PING.1);
            let (mut h2, connection) = builder.handshake(io).await.map_err(|e| chain(&e))?;
            tokio::spawn(connection);
            *shared = Some(h2.clone());
            drop(shared);
            return h2.send_request(request).await.map_err(|e| chain(&e));
        }
        drop(shared);
        let (mut http1, connection) = http1::handshake(io).await.map_err(|e| chain(&e))?;
        tokio::spawn(connection);
        http1.send_request(request).await.map_err(|e| chain(&e))
    }

    fn request(&self, path: &str, patch: Option<Bytes>, is_h2: bool) -> Result<Request<Full<Bytes>>, String> {
        let Server { prefix, .. } = &self.0.server;
        let authority = self.0.server.authority();
        // HTTP/2 makes its pseudo-headers of a whole URL; in HTTP/1.1 that would be a request to a proxy.
        let request = if is_h2 {
            Request::builder().uri(format!("https://{authority}{prefix}{path}"))
        } else {
            Request::builder().uri(format!("{prefix}{path}")).header(HOST, authority)
        };
        let mut request = request.header(ACCEPT, "application/json").header(USER_AGENT, AGENT);
        if let Some(token) = self.0.server.bearer()? {
            request = request.header(AUTHORIZATION, token);
        }
        if patch.is_some() {
            request = request.method(Method::PATCH).header(CONTENT_TYPE, "application/merge-patch+json");
        }
        request.body(Full::new(patch.unwrap_or_default())).map_err(|e| e.to_string())
    }
}

async fn read(response: Response<Incoming>) -> Result<Value, Failure> {
    let whole = dial::whole(response.into_body(), LARGEST_LIST, ANSWER).await.map_err(Failure::other)?;
    serde_json::from_slice(&whole).map_err(|e| Failure::other(format!("an answer is not JSON: {e}")))
}

/// The events of a watch, a line of JSON each.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    rest: BytesMut,
    /// How much of `rest` is known to have no end of a line.
    scanned: usize,
    silence: Duration,
}
impl Events {
    /// The next event; `None` at the end of the watch.
    pub async fn next(&mut self) -> Result<Option<Value>, Failure> {
        loop {
            let fresh = self.rest.get(self.scanned..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|b| *b == b'\n') {
                let line = self.rest.split_to(self.scanned + at + 1);
                self.scanned = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).map(Some).map_err(|e| Failure::other(format!("an event is not JSON: {e}")));
            }
            self.scanned = self.rest.len();
            if self.scanned > LARGEST_EVENT {
                return Err(Failure::other(format!("an event is larger than {LARGEST_EVENT} bytes")));
            }
            match next_frame(&mut self.body, self.silence).await.map_err(Failure::other)? {
                Some(frame) => self.rest.extend_from_slice(&frame),
                // What is left is half an event: the next watch brings the whole.
                None => return Ok(None),
            }
        }
    }
}
