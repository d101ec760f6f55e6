//! External authorizers: whom CUSTOM policies ask, and how (Istio's `envoyExtAuthzHttp` and `envoyExtAuthzGrpc`, spec/waypoint
//! §3.4).
//!
//! One that could not be understood is a value with its reason: who would have to ask it refuses. Upstream: `mesh-sources`.
//! Downstream: the waypoint's `custom` phase.
use crate::policy::TextMatch;
use http::header::{HeaderName, HeaderValue};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// All authorizers by the name policies ask for them, with why one cannot be asked.
pub type Authorizers = BTreeMap<Arc<str>, Result<Arc<Authorizer>, Arc<str>>>;

/// An authorizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorizer {
    /// Namespace of the service, when it is written; else the policy's own is preferred.
    pub namespace: Option<Arc<str>>,
    /// Host name of the service.
    pub host: Arc<str>,
    /// Its port.
    pub port: u16,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Without an answer requests pass.
    pub fail_open: bool,
    /// Without an answer: this status.
    pub status_on_error: u16,
    /// How much of the body it is asked with.
    pub body: Option<BodyLimit>,
    /// Routes are chosen by the headers as it leaves them, else by those the client sent.
    pub clear_route_cache: bool,
    /// What it speaks.
    pub speaks: Protocol,
}
impl Authorizer {
    /// Whether it can be asked about a connection that is not HTTP.
    pub fn judges_bytes(&self) -> bool {
        matches!(self.speaks, Protocol::Grpc)
    }
}
/// What an authorizer speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The request, to itself: 200 lets it on, what is not of the 5xx refuses it, anything else is no answer.
    Http(HttpCheck),
    /// `envoy.service.auth.v3.Authorization/Check`.
    Grpc,
}
/// What an authorizer that speaks HTTP sees of a request, and what of its answer counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpCheck {
    /// Put before the path of the request.
    pub path_prefix: Arc<str>,
    /// Headers of the request it is asked with, besides `authorization`, by name in lower case.
    pub asked_with: Vec<TextMatch>,
    /// Headers it is always asked with, in place of the request's.
    pub always: Vec<(HeaderName, HeaderValue)>,
    /// Headers of its answer that go to the endpoint when it agrees.
    pub to_upstream: Vec<TextMatch>,
    /// Headers of its answer that go to the client when it agrees.
    pub to_client: Vec<TextMatch>,
    /// Headers of its answer that go to the client when it refuses; `None`: all.
    pub to_refused: Option<Vec<TextMatch>>,
}
/// A part of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimit {
    /// Bytes at most.
    pub most: usize,
    /// A larger one is cut; else it is refused with 413.
    pub partial: bool,
    /// gRPC: as bytes, not as text.
    pub as_bytes: bool,
}

/// Whether any of the patterns names a header.
pub fn names(patterns: &[TextMatch], header: &HeaderName) -> bool {
    patterns.iter().any(|p| p.matches(Some(header.as_str())))
}
