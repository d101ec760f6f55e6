//! The closed vocabulary of refusals: logs, metrics, admin answers and tests all use these words.
use std::borrow::Cow;
use std::fmt;

/// Whose side a refusal is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The application that opened the connection.
    Client,
    /// The other end: endpoint, waypoint, remote agent.
    Peer,
    /// This process.
    Us,
    /// Configuration or the control plane.
    Control,
}

macro_rules! reasons {
    ($( $(#[$doc:meta])* $name:ident { $text:literal, $side:ident, flag $flag:literal, status $status:literal, retry $retry:literal, $hint:literal } )*) => {
        /// Why a connection was refused or cut.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $( $(#[$doc])* $name, )* }
        impl Reason {
            /// Every reason, for tests and documentation.
            pub const ALL: &'static [Reason] = &[ $( Reason::$name, )* ];
            /// Stable snake_case word.
            pub fn as_str(self) -> &'static str { match self { $( Self::$name => $text, )* } }
            /// Whose side it is on.
            pub fn side(self) -> Side { match self { $( Self::$name => Side::$side, )* } }
            /// Istio's `response_flags` label value (node-agent §1.12).
            pub fn response_flag(self) -> &'static str { match self { $( Self::$name => $flag, )* } }
            /// Status answered to an HBONE CONNECT (node-agent §1.5); 0 where no answer can be given.
            pub fn connect_status(self) -> u16 { match self { $( Self::$name => $status, )* } }
            /// Whether trying another endpoint or tunnel may help.
            pub fn may_retry(self) -> bool { match self { $( Self::$name => $retry, )* } }
            /// What an operator should look at.
            pub fn hint(self) -> &'static str { match self { $( Self::$name => $hint, )* } }
        }
    };
}
reasons! {
    /// A DENY policy matched.
    PolicyDenied { "policy_denied", Client, flag "DENY", status 401, retry false, "a DENY policy matches this source; see `policy` for its name" }
    /// ALLOW policies bind the destination and none matched.
    NotAllowed { "not_allowed", Client, flag "DENY", status 401, retry false, "no ALLOW policy names this source, port and address" }
    /// Plaintext where STRICT mTLS is required.
    PlaintextRefused { "plaintext_refused", Client, flag "DENY", status 401, retry false, "PeerAuthentication is STRICT: enrol the client in the mesh" }
    /// The workload names a policy this agent does not have.
    PolicyUnknown { "policy_unknown", Control, flag "DENY", status 401, retry false, "the workload refers to a policy that has not arrived or was removed" }
    /// A policy in scope could not be understood.
    PolicyUnusable { "policy_unusable", Control, flag "DENY", status 401, retry false, "fix the rejected policy; `problems` in /config_dump shows file, line and field" }
    /// A CUSTOM policy matched and its external authorizer cannot be asked, or does not answer.
    NoAuthorizer { "no_authorizer", Control, flag "UAEX", status 401, retry false, "a CUSTOM policy matches and its provider gives no answer; look at MeshConfig's extensionProviders and at the service they name" }
    /// The external authorizer of a CUSTOM policy refused.
    AuthorizerDenied { "authorizer_denied", Client, flag "UAEX", status 401, retry false, "the external authorizer of a CUSTOM policy refused" }
    /// The request's token was refused.
    TokenRefused { "token_refused", Client, flag "-", status 401, retry false, "the token is not one a RequestAuthentication accepts; the answer's body says what is wrong with it" }
    /// Cut because policy, workload or certificate no longer allows it.
    Revoked { "revoked", Client, flag "DENY", status 401, retry false, "a configuration change no longer allows this connection" }
    /// The peer's certificate is of a trust domain we do not accept.
    TrustDomain { "trust_domain", Peer, flag "TLS_FAILURE", status 0, retry false, "the peer's trust domain is not ours nor an alias" }
    /// The peer's certificate was taken back, or whether it was cannot be told.
    CertRevoked { "cert_revoked", Peer, flag "CERT_REVOKED", status 0, retry true, "the peer's certificate is on a revocation list (CRL_PATH), or no list in force speaks of it" }
    /// TLS failed in any other way.
    TlsFailure { "tls_failure", Peer, flag "TLS_FAILURE", status 0, retry true, "certificate or handshake problem; see the error text" }
    /// The peer proved another identity than the plan expects.
    IdentityMismatch { "identity_mismatch", Peer, flag "TLS_FAILURE", status 0, retry true, "something else answers at that address; stale endpoint or impersonation" }
    /// We have no certificate for the source or destination workload.
    NoCertificate { "no_certificate", Us, flag "IDENTITY_ERROR", status 503, retry false, "the certificate authority did not issue in time" }
    /// TLS, HTTP/2 or CONNECT did not finish in time.
    HandshakeTimeout { "handshake_timeout", Peer, flag "H2_HANDSHAKE_FAILURE", status 0, retry true, "the peer accepted TCP but did not finish the handshake" }
    /// The HTTP/2 handshake failed.
    H2Failure { "h2_failure", Peer, flag "H2_HANDSHAKE_FAILURE", status 0, retry true, "the peer does not speak HTTP/2 as HBONE needs it" }
    /// TCP connect failed.
    ConnectFailed { "connect_failed", Peer, flag "CONNECT", status 503, retry true, "nothing listens there, or it reset the connection" }
    /// TCP connect timed out.
    ConnectTimeout { "connect_timeout", Peer, flag "CONNECT", status 503, retry true, "no answer; a NetworkPolicy may block port 15008" }
    /// The peer answered CONNECT with another status than 200.
    PeerRefused { "peer_refused", Peer, flag "CONNECT", status 503, retry true, "the destination's agent refused; its log has the reason" }
    /// The service exists but has no usable endpoint.
    NoHealthyEndpoint { "no_healthy_endpoint", Control, flag "CONNECT", status 503, retry false, "no endpoint is ready, has an address and that port" }
    /// The service does not have that port.
    NoSuchPort { "no_such_port", Client, flag "CONNECT", status 503, retry false, "the service does not declare this port" }
    /// A waypoint is declared and cannot be used.
    NoWaypoint { "no_waypoint", Control, flag "CONNECT", status 503, retry false, "the declared waypoint is missing or not ready; nothing was let around it" }
    /// The destination is on another network without a gateway.
    NoGateway { "no_gateway", Control, flag "CONNECT", status 503, retry false, "no network gateway is known for the destination's network" }
    /// The source or destination workload is not known.
    UnknownWorkload { "unknown_workload", Control, flag "CONNECT", status 503, retry false, "this agent has no workload for that address" }
    /// A host name in the plan did not resolve.
    DnsFailure { "dns_failure", Us, flag "CONNECT", status 503, retry true, "the endpoint's host name did not resolve" }
    /// The connection would come back to the agent itself.
    Recursion { "recursion", Client, flag "CONNECT", status 503, retry false, "the destination is one of the agent's own ports" }
    /// The CONNECT is not one we accept (method, authority, address).
    BadRequest { "bad_request", Client, flag "CONNECT", status 400, retry false, "not a CONNECT, or its authority is not this pod's" }
    /// The waypoint or gateway that was asked is not the one for what was asked.
    NotBound { "not_bound", Client, flag "NR", status 404, retry false, "the service or workload does not name this waypoint (istio.io/use-waypoint), or the client's view is stale" }
    /// The routes of a host could not be understood.
    RouteUnusable { "route_unusable", Control, flag "NR", status 503, retry false, "fix the rejected VirtualService or HTTPRoute; `problems` in /config_dump shows file, line and field" }
    /// A rate limit of a TrafficPolicy was used up.
    RateLimited { "rate_limited", Client, flag "RL", status 429, retry false, "the caller asks more often than the limit named in the details allows; x-ratelimit-reset says when to ask again" }
    /// The body is larger than a TrafficPolicy allows.
    BodyTooLarge { "body_too_large", Client, flag "-", status 413, retry false, "the request's body is larger than `buffer.maxRequestBytes` of a TrafficPolicy of its service or gateway" }
    /// A limit of this process was reached.
    Overloaded { "overloaded", Us, flag "CONNECT", status 503, retry true, "handshake, stream, memory or file-descriptor limit reached" }
    /// The process is draining.
    Draining { "draining", Us, flag "CONNECT", status 503, retry true, "the agent is shutting down" }
    /// One side reset the connection.
    Reset { "reset", Peer, flag "-", status 0, retry false, "one end reset; the reset was passed on" }
    /// Anything that is our own fault.
    Internal { "internal", Us, flag "CONNECT", status 503, retry false, "a defect; please report it with the log line" }
}
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A decision not to carry a connection: the reason and what it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The word.
    pub reason: Reason,
    /// The particulars: policy name, service, address.
    pub detail: Cow<'static, str>,
}
impl Refusal {
    /// A refusal with particulars.
    pub fn new(reason: Reason, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, detail: detail.into() }
    }
    /// Without the hint: `reason: detail`.
    pub fn brief(&self) -> String {
        if self.detail.is_empty() { self.reason.to_string() } else { format!("{}: {}", self.reason, self.detail) }
    }
}
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.detail.is_empty() {
            write!(f, "{} ({})", self.reason, self.reason.hint())
        } else {
            write!(f, "{}: {} ({})", self.reason, self.detail, self.reason.hint())
        }
    }
}
impl std::error::Error for Refusal {}
