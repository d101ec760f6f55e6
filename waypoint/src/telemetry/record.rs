//! The facts of one request or connection, filled in by the phases as they learn them.
use super::grpc::grpc_of_http;
use super::{Flags, Messages, Received};
use crate::upstream::{Cluster, Host};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use mesh_model::authz_l7::{DeniedBy, MatchedId};
use mesh_model::l7::HttpRoute;
use mesh_model::policy::PolicyKey;
use mesh_model::telemetry::Telemetry;
use mesh_model::telemetry::context::Context;
use mesh_model::telemetry::tracing::Tracing;
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// `x-envoy-original-path`: the path before a rewrite.
pub(crate) const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

/// What policies said that are only to be told. Put into words where it is told.
#[derive(Debug, Default)]
pub struct Noted {
    /// How the dry-run policies alone would have refused it.
    pub dry_run: Option<DeniedBy>,
    /// The AUDIT policy that matched.
    pub audit: Option<PolicyKey>,
    /// What Istio tells of dry runs in spans, by the names of its tags.
    pub dry_run_tags: Vec<(&'static str, Said)>,
}
/// What is told of dry runs.
#[derive(Debug)]
pub enum Said {
    /// Which rule matched.
    Matched(MatchedId),
    /// `allowed` or `denied`.
    Answer(&'static str),
}
impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Matched(id) => id.fmt(f),
            Self::Answer(answer) => f.write_str(answer),
        }
    }
}

/// What a span is called.
#[derive(Clone, Debug)]
pub struct Operation {
    /// The name.
    pub name: Arc<str>,
    /// The same as the value of a header, if it can be one.
    pub header: Option<HeaderValue>,
}
impl From<String> for Operation {
    fn from(name: String) -> Self {
        Self { header: HeaderValue::from_str(&name).ok(), name: name.into() }
    }
}

/// A call made for a request that is told of: a span under the request's.
#[derive(Debug)]
pub struct Call {
    /// The span.
    pub trace: Context,
    /// What it is called.
    pub name: String,
    /// The destination, by Istio's name.
    pub cluster: String,
    /// When it began.
    pub start: SystemTime,
    /// Until its answer was there, or given up.
    pub took: Duration,
    /// What it was answered with: the tag and its value.
    pub status: Option<(&'static str, String)>,
    /// There was no answer that could be used.
    pub failed: bool,
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
    /// Path and query as they went upstream, where a rewrite changed them.
    pub rewritten: Option<Box<str>>,
    /// Headers as they went upstream, once it is answered.
    pub headers: HeaderMap,
    /// Headers of the answer, where something is told of them.
    pub response_headers: Option<HeaderMap>,
    /// Trailers of the answer, where something is told of them.
    pub trailers: Option<HeaderMap>,
    /// What is to be told, by the mesh that decided the request; `None` when nobody says.
    pub told: Option<Arc<Telemetry>>,
    /// Its span, where requests are traced.
    pub trace: Option<Context>,
    /// What its span is called.
    pub operation: Option<Operation>,
    /// Calls made for it, where its span is told of.
    pub calls: Vec<Call>,
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
    /// `grpc-status`, from headers or trailers; see [`Self::grpc_status`].
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
    /// When it began, in seconds since 1970.
    pub fn begun(&self) -> u64 {
        self.start_time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
    }
    /// A request of this moment of which nothing else is known.
    pub fn new(grpc: bool) -> Self {
        Self {
            started: Instant::now(),
            start_time: SystemTime::now(),
            method: Method::GET,
            path: "".into(),
            protocol: Version::HTTP_11,
            authority: "".into(),
            rewritten: None,
            headers: HeaderMap::new(),
            response_headers: None,
            trailers: None,
            told: None,
            trace: None,
            operation: None,
            calls: Vec::new(),
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
    /// How it is traced, if it is.
    pub fn tracing(&self) -> Option<&Tracing> {
        self.told.as_ref()?.tracing.as_ref()
    }
    /// Whether its span is told of.
    fn sampled(&self) -> bool {
        self.trace.is_some_and(|trace| trace.sampled)
    }
    /// Takes over what is told of the two heads; there may be no answer.
    pub fn heads(&mut self, request: HeaderMap, path: &str, query: Option<&str>, response: Option<&HeaderMap>) {
        if request.contains_key(ORIGINAL_PATH) {
            self.rewritten = Some(query.map_or_else(|| path.into(), |query| format!("{path}?{query}").into()));
        }
        self.headers = request;
        if self.told.as_ref().is_some_and(|t| t.reads_response_headers(self.sampled())) {
            self.response_headers = response.cloned();
        }
    }
    /// Takes over what is told of the trailers.
    pub fn trailers(&mut self, trailers: &HeaderMap) {
        if self.told.as_ref().is_some_and(|t| t.reads_trailers(self.sampled())) {
            self.trailers = Some(trailers.clone());
        }
    }
    /// The status of a gRPC call: its own, or the one its HTTP status stands for (Envoy).
    pub fn grpc_status(&self) -> Option<u16> {
        let answered = self.grpc && self.status != 0;
        self.grpc_status.filter(|_| self.grpc).or_else(|| answered.then(|| grpc_of_http(self.status)))
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
    /// What is to be told; `None` when nobody says.
    pub told: Option<Arc<Telemetry>>,
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
            told: None,
        }
    }
}
