//! The facts of one request or connection, filled in by the phases as they learn them.
use super::{Flags, Messages, Received};
use crate::upstream::{Cluster, Host};
use http::{HeaderValue, Method, Version};
use mesh_model::l7::HttpRoute;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// What policies said that are only to be told.
#[derive(Debug, Default)]
pub struct Noted {
    /// How the dry-run policies alone would have refused it, in the words of `details`.
    pub dry_run: Option<Box<str>>,
    /// The AUDIT policy that matched.
    pub audit: Option<Box<str>>,
}

/// One request.
#[derive(Debug)]
pub struct Record {
    /// When its head was in.
    pub started: Instant,
    /// The same on the wall.
    pub start_time: SystemTime,
    /// Method.
    pub method: Method,
    /// Path and query as the client wrote them.
    pub path: Box<str>,
    /// Protocol of the client.
    pub protocol: Version,
    /// Authority as the client wrote it.
    pub authority: Box<str>,
    /// `user-agent`.
    pub user_agent: Option<HeaderValue>,
    /// `x-request-id`, ours if the client had none.
    pub request_id: Option<HeaderValue>,
    /// `x-forwarded-for` as it goes upstream.
    pub forwarded_for: Option<HeaderValue>,
    /// It is gRPC.
    pub grpc: bool,
    /// The route.
    pub route: Option<Arc<HttpRoute>>,
    /// The cluster.
    pub cluster: Option<Arc<Cluster>>,
    /// The endpoint of the last attempt.
    pub host: Option<Arc<Host>>,
    /// Status answered; 0 when nothing was.
    pub status: u16,
    /// `grpc-status`, from headers or trailers.
    pub grpc_status: Option<u16>,
    /// Response flags.
    pub flags: Flags,
    /// `%RESPONSE_CODE_DETAILS%`.
    pub details: Cow<'static, str>,
    /// `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    pub transport_failure: Cow<'static, str>,
    /// Our own word for a refusal, if it was one.
    pub reason: Option<mesh_model::Reason>,
    /// What policies said that enforce nothing.
    pub noted: Noted,
    /// Attempts made at an upstream.
    pub attempts: u32,
    /// From the attempt that answered to its response head (`x-envoy-upstream-service-time`).
    pub upstream_time: Option<Duration>,
    /// Bytes and gRPC messages of the request's body.
    pub received: Arc<Received>,
    /// Bytes of the response's body.
    pub sent: u64,
    /// gRPC messages of the response.
    pub sent_messages: Messages,
}
impl Record {
    /// A request of this moment of which nothing else is known.
    pub fn new(grpc: bool) -> Self {
        Self {
            started: Instant::now(),
            start_time: SystemTime::now(),
            method: Method::GET,
            path: "".into(),
            protocol: Version::HTTP_11,
            authority: "".into(),
            user_agent: None,
            request_id: None,
            forwarded_for: None,
            grpc,
            route: None,
            cluster: None,
            host: None,
            status: 0,
            grpc_status: None,
            flags: Flags::default(),
            details: "".into(),
            transport_failure: "".into(),
            reason: None,
            noted: Noted::default(),
            attempts: 0,
            upstream_time: None,
            received: Arc::new(Received::new(grpc)),
            sent: 0,
            sent_messages: Messages::default(),
        }
    }
    /// A piece of the response's body went to the client.
    pub fn sent(&mut self, data: &[u8]) {
        self.sent += data.len() as u64;
        if self.grpc {
            self.sent_messages.feed(data);
        }
    }
}

/// One connection that was carried as bytes.
#[derive(Debug)]
pub struct TcpRecord {
    /// When it began.
    pub started: Instant,
    /// The same on the wall.
    pub start_time: SystemTime,
    /// Name of the route, if one matched.
    pub route: Option<Arc<str>>,
    /// The cluster.
    pub cluster: Option<Arc<Cluster>>,
    /// The endpoint.
    pub host: Option<Arc<Host>>,
    /// Response flags.
    pub flags: Flags,
    /// `%CONNECTION_TERMINATION_DETAILS%`.
    pub details: Cow<'static, str>,
    /// Our own word for a refusal, if it was one.
    pub reason: Option<mesh_model::Reason>,
    /// What policies said that enforce nothing.
    pub noted: Noted,
}
impl TcpRecord {
    /// Begun now, nothing known yet.
    pub fn begin() -> Self {
        Self {
            started: Instant::now(),
            start_time: SystemTime::now(),
            route: None,
            cluster: None,
            host: None,
            flags: Flags::default(),
            details: "".into(),
            reason: None,
            noted: Noted::default(),
        }
    }
}
