//! How an attempt at an upstream fails, in the words retries, access logs and answers need.
use std::borrow::Cow;
use std::fmt;

/// What kind of failure; decides retry, response flag and answer (spec/waypoint §10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The cluster is not known. 503, empty body; `NC`, `cluster_not_found`.
    NoCluster,
    /// It has no usable endpoint. 503 `no healthy upstream`; `UH`, `no_healthy_upstream`.
    NoHealthy,
    /// A limit of the destination is reached. 503 with `x-envoy-overloaded: true`; `UO`, `overflow`.
    Overflow,
    /// No connection: TCP, TLS, or the tunnel to the endpoint. 503; `UF`.
    Connect,
    /// No connection in time. 503; `UF`, `connection timeout`.
    ConnectTimeout,
    /// The endpoint refused the stream before it looked at it (REFUSED_STREAM, GOAWAY). 503; `UR`.
    Refused,
    /// The connection ended before a response came. 503; `UC`.
    Reset,
    /// The endpoint reset the stream, not the connection. 503; `UR`, `remote reset`.
    RemoteReset,
    /// As `Reset`, and nothing of the request had been sent.
    ResetBeforeRequest,
    /// The endpoint speaks no HTTP we understand. 502; `UPE`, `protocol_error`.
    Protocol,
    /// The attempt took too long. 504; `UT`.
    Timeout,
    /// The client went while we waited. 503, which nobody reads; `DC`.
    ClientGone,
    /// What the client sends as a body is none. 400; `DPE`, `http1.codec_error`.
    ClientProtocol,
}

/// A failed attempt: the kind and the particulars for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamError {
    /// Kind.
    pub failure: Failure,
    /// Envoy's "transport failure reason" or the like; may be empty.
    pub detail: Cow<'static, str>,
}
impl UpstreamError {
    /// A failure with particulars.
    pub fn new(failure: Failure, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { failure, detail: detail.into() }
    }
}
impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.failure)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}
impl std::error::Error for UpstreamError {}
