//! Questions to a Consul agent, one after another on a connection that is kept.
//!
//! Owns the connection, the token of every request, the index of answers and what an answer other than 200 means. Upstream:
//! [`super::watch`]. Downstream: the agent's HTTP API.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, HOST, USER_AGENT};
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use mesh_runtime::control_plane::chain;
use rustls_pki_types::ServerName;
use serde_json::Value;

use super::Access;
use crate::dial::{self, AGENT, Server};

/// Limit for an answer beyond what it may be waited for, and for each piece of it.
const ANSWER: Duration = Duration::from_secs(30);
/// Largest answer.
const LARGEST: usize = 256 << 20;
const INDEX: &str = "x-consul-index";
const FILTERED: &str = "x-consul-results-filtered-by-acls";

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// This process may not read that; anything else may pass.
    pub refused: bool,
    /// In the words of Consul or of the client.
    pub message: String,
}
impl Failure {
    pub fn other(message: impl Into<String>) -> Self {
        Self { refused: false, message: message.into() }
    }
    pub fn refused(message: impl Into<String>) -> Self {
        Self { refused: true, message: message.into() }
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    /// As of when it is; at least 1.
    pub index: u64,
    /// `Null` where there is no such thing (404).
    pub body: Value,
    /// Something was left out of it that our token may not read.
    pub filtered: bool,
}

/// A client with a connection of its own.
#[derive(Debug)]
pub(super) struct Client {
    server: Arc<Server>,
    tls: Option<ServerName<'static>>,
    open: Option<SendRequest<Empty<Bytes>>>,
}

impl Client {
    /// A client of an agent, which is not asked yet.
    pub fn new(access: &Access) -> Result<Self, String> {
        let server = access.server()?;
        Ok(Self { tls: server.tls_name()?, server: Arc::new(server), open: None })
    }
    /// Another one, with another connection.
    pub fn another(&self) -> Self {
        Self { server: Arc::clone(&self.server), tls: self.tls.clone(), open: None }
    }
    /// Whether we say who we are.
    pub fn has_token(&self) -> bool {
        self.server.token.is_some()
    }

    /// Asks; `wait`: how long the agent may hold the answer back.
    pub async fn get(&mut self, path: &str, wait: Duration) -> Result<Answer, Failure> {
        // The agent adds up to a sixteenth of its own.
        let limit = wait + wait / 16 + ANSWER;
        let asked = tokio::time::timeout(limit, self.exchange(path)).await;
        let response = asked.map_err(|_| Failure::other("Consul does not answer"))?.map_err(Failure::other)?;
        let (head, body) = response.into_parts();
        let body = dial::whole(body, LARGEST, ANSWER).await.map_err(Failure::other)?;
        let text = |key: &str| head.headers.get(key).and_then(|value| value.to_str().ok());
        let body = match head.status {
            StatusCode::OK => serde_json::from_slice(&body).map_err(|e| Failure::other(format!("an answer is not JSON: {e}")))?,
            StatusCode::NOT_FOUND if text(INDEX).is_some() => Value::Null,
            status => {
                let said = String::from_utf8_lossy(body.get(..body.len().min(300)).unwrap_or_default()).trim().to_owned();
                let message = format!("Consul answers {status}: {said}");
                let refused = matches!(status, StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED);
                return Err(Failure { refused, message });
            }
        };
        let index = text(INDEX).and_then(|value| value.parse::<u64>().ok());
        // 0 would not wait the next time.
        Ok(Answer { index: index.unwrap_or(0).max(1), body, filtered: text(FILTERED) == Some("true") })
    }

    async fn exchange(&mut self, path: &str) -> Result<Response<Incoming>, String> {
        // Taken out: a question that is given up leaves a connection of which nobody knows what comes next.
        let mut kept = self.open.take();
        if let Some(open) = &mut kept
            && open.ready().await.is_err()
        {
            kept = None;
        }
        let mut open = if let Some(open) = kept {
            open
        } else {
            let (stream, _) = self.server.dial(self.tls.as_ref(), &[b"http/1.1"]).await?;
            let (open, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| chain(&e))?;
            tokio::spawn(connection);
            open
        };
        let request = Request::builder()
            .uri(format!("{}{path}", self.server.prefix))
            .header(HOST, self.server.authority())
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, AGENT);
        let request = match self.server.bearer()? {
            Some(token) => request.header(AUTHORIZATION, token),
            None => request,
        };
        let request = request.body(Empty::new()).map_err(|e| e.to_string())?;
        let response = open.send_request(request).await.map_err(|e| chain(&e))?;
        self.open = Some(open);
        Ok(response)
    }
}
