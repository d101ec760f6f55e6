//! Routes, compiled: which request goes where and what happens to it on the way.
//!
//! A [`RouteTable`] belongs to one service (mesh traffic through its waypoint) or to one listener host of a gateway. Its
//! HTTP rules are in the order in which they are tried: VirtualServices as written, HTTPRoutes sorted by specificity when
//! translated. A rule has one match; objects with several produce several rules that share their [`HttpRoute`].
use crate::gateway::ServiceKey;
use crate::l7::headers::BothEdits;
use crate::l7::rules::Rules;
use crate::l7::session::Session;
use crate::l7::text::{Pattern, StringMatch};
use crate::origin::Origin;
use http::header::{HeaderMap, HeaderName};
use ipnet::IpNet;
use std::hash::Hasher;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// The routes of one service or gateway host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteTable {
    /// HTTP rules, first match wins. Not empty and none matching: 404. Empty: the service itself ([`HttpRoute::plain`]).
    pub http: Rules,
    /// TLS rules (by SNI), first match wins; then `tcp`.
    pub tls: Vec<TlsRule>,
    /// TCP rules, first match wins. Empty, or none matching: the service itself.
    pub tcp: Vec<TcpRule>,
    /// The objects it was made from.
    pub origins: Vec<Arc<Origin>>,
    /// Set when an object for this host could not be understood: every request is answered 500 with this text, because
    /// what the object would have restricted is not known.
    pub broken: Option<Arc<str>>,
}
impl RouteTable {
    /// This table with its HTTP rules indexed: the last step of making one. Changing `http` afterwards asks for it again.
    /// (Publishing indexes what was not.)
    #[must_use]
    pub fn indexed(self) -> Self {
        Self { http: self.http.indexed(), ..self }
    }
    /// Whether it is indexed, or too small to need it.
    pub fn is_indexed(&self) -> bool {
        self.http.is_indexed()
    }
}

/// One HTTP rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRule {
    /// When it applies; all parts must hold. Shared with the object it was read from and with other tables.
    pub matches: Arc<HttpMatch>,
    /// What happens then.
    pub route: Arc<HttpRoute>,
}
/// Conditions on a request; absent ones hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpMatch {
    /// Path, without the query.
    pub path: Option<PathMatch>,
    /// Case of the path does not count (`ignoreUriCase`; not for patterns).
    pub ignore_case: bool,
    /// Method.
    pub method: Option<StringMatch>,
    /// Scheme.
    pub scheme: Option<StringMatch>,
    /// Host, as the client wrote it (VirtualService: with its port if it has one).
    pub authority: Option<StringMatch>,
    /// Headers that must match: any of the values of the name.
    pub headers: Vec<(HeaderName, StringMatch)>,
    /// Headers that must not match; a missing header counts as the empty text unless the match is `Present`.
    pub without_headers: Vec<(HeaderName, StringMatch)>,
    /// Query parameters that must match; the first of a name counts.
    pub query: Vec<(Arc<str>, StringMatch)>,
    /// Claims of the verified token: path into the claims, and the match (`@request.auth.claims.x`).
    pub claims: Vec<(Vec<Arc<str>>, StringMatch)>,
    /// Claims that must not match (`withoutHeaders` of `@request.auth.claims.x`); a missing claim or token does not.
    pub without_claims: Vec<(Vec<Arc<str>>, StringMatch)>,
    /// Port of the service the client addressed.
    pub port: Option<u16>,
    /// gRPC service and method (GRPCRoute), each matched on its path segment.
    pub grpc: Option<GrpcMatch>,
}
/// How a path is matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    /// This very path.
    Exact(Arc<str>),
    /// VirtualService: a prefix of the text, `/a` matches `/ab`.
    TextPrefix(Arc<str>),
    /// Gateway API: whole segments, `/a` matches `/a` and `/a/b` but not `/ab`. Without trailing `/`; `/` is everything.
    SegmentPrefix(Arc<str>),
    /// The whole path.
    Regex(Pattern),
}
/// gRPC: `/<service>/<method>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrpcMatch {
    /// Service.
    pub service: Option<StringMatch>,
    /// Method.
    pub method: Option<StringMatch>,
}

/// What happens to a request that matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRoute {
    /// Name for logs (`%ROUTE_NAME%`) and spans.
    pub name: Arc<str>,
    /// Where it was written.
    pub origin: Option<Arc<Origin>>,
    /// The action.
    pub action: HttpAction,
    /// Header edits of the route (the backend's own come first on requests, as in Envoy: most specific first).
    pub headers: BothEdits,
    /// CORS.
    pub cors: Option<Arc<Cors>>,
    /// Faults.
    pub fault: Option<Fault>,
    /// From which kind of object: decides the answers where Istio's differ (unknown backend 503 or 500).
    pub dialect: Dialect,
}
impl HttpRoute {
    /// What a port of a service means without routes of its own: the service itself, without a time limit, with Istio's
    /// default retries.
    pub fn plain(service: &ServiceKey, port: u16) -> Self {
        let to = ClusterKey { service: service.clone(), port, subset: None };
        Self {
            name: "default".into(),
            origin: None,
            action: HttpAction::Forward(Forward::to(BackendRef::Service(to))),
            headers: BothEdits::default(),
            cors: None,
            fault: None,
            dialect: Dialect::Istio,
        }
    }
}
/// Which API an object belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Dialect {
    /// Istio networking.
    #[default]
    Istio,
    /// Gateway API.
    GatewayApi,
}
/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpAction {
    /// To one of these.
    Forward(Forward),
    /// Answered with a redirect.
    Redirect(Redirect),
    /// Answered here.
    Respond(DirectResponse),
}
/// Forwarding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Backends; never empty (a route without backends is [`HttpAction::Respond`] with 500).
    pub backends: Vec<Backend>,
    /// Sum of the weights; 0: answered 500.
    pub total_weight: u64,
    /// Path and authority rewrite.
    pub rewrite: Option<Rewrite>,
    /// From the first byte of the request to the last of the response; `None`: no limit.
    pub timeout: Option<Duration>,
    /// Retries; `None`: as the mesh's configuration says ([`Self::retries`]).
    pub retry: Option<Arc<RetryPolicy>>,
    /// Copies.
    pub mirrors: Vec<Mirror>,
    /// Requests of a session stay with its backend and endpoint.
    pub session: Option<Arc<Session>>,
}
impl Forward {
    /// To one backend, without a time limit, with the mesh's retries.
    pub fn to(backend: BackendRef) -> Self {
        Self {
            backends: vec![Backend::to(backend)],
            total_weight: 1,
            rewrite: None,
            timeout: None,
            retry: None,
            mirrors: Vec::new(),
            session: None,
        }
    }
    /// How it is tried again, in a mesh with this default.
    pub fn retries<'a>(&'a self, of_mesh: &'a RetryPolicy) -> &'a RetryPolicy {
        self.retry.as_deref().unwrap_or(of_mesh)
    }
}
/// One backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Which.
    pub to: BackendRef,
    /// Share among the backends of the route.
    pub weight: u32,
    /// Header edits of this backend alone.
    pub headers: BothEdits,
    /// Rewrite of this backend alone (Gateway API backend filters).
    pub rewrite: Option<Rewrite>,
    /// Redirect or answer of this backend alone is not supported; translation refuses it.
    pub mirrors: Vec<Mirror>,
}
impl Backend {
    /// A backend of weight 1 that changes nothing.
    pub fn to(to: BackendRef) -> Self {
        Self { to, weight: 1, headers: BothEdits::default(), rewrite: None, mirrors: Vec::new() }
    }
}
/// Reference to what is behind a backend.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BackendRef {
    /// A port of a service, perhaps a subset of it.
    Service(ClusterKey),
    /// It cannot be used: unknown, not permitted, or of an unknown kind. Its share is answered with `status`.
    Invalid {
        /// 500 (Gateway API) or 503 (Istio).
        status: u16,
        /// Why.
        why: Arc<str>,
    },
}
/// What endpoints, pool and health state belong to: Envoy's cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterKey {
    /// Service.
    pub service: ServiceKey,
    /// Its port.
    pub port: u16,
    /// Subset of the DestinationRule.
    pub subset: Option<Arc<str>>,
}
impl std::fmt::Display for ClusterKey {
    /// Istio's name for an outbound cluster: `outbound|<port>|<subset>|<host>`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "outbound|{}|{}|{}", self.port, self.subset.as_deref().unwrap_or_default(), self.service.hostname)
    }
}

/// Rewrite of path and authority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// Path.
    pub path: Option<PathRewrite>,
    /// Authority.
    pub authority: Option<Arc<str>>,
}
/// Rewrite of a path; the query stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathRewrite {
    /// The whole path.
    Full(Arc<str>),
    /// VirtualService: the matched text prefix (the whole path when the match was exact or a pattern).
    TextPrefix(Arc<str>),
    /// Gateway API `ReplacePrefixMatch`: the matched segments.
    SegmentPrefix(Arc<str>),
    /// `uriRegexRewrite`: every match of the pattern becomes the replacement (`\1` are groups, as in RE2).
    Regex {
        /// Pattern, searched.
        pattern: Pattern,
        /// Replacement in the `regex` crate's form (`${1}`).
        replacement: Arc<str>,
    },
}
/// A redirect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// New scheme.
    pub scheme: Option<Arc<str>>,
    /// New host (and port, if written).
    pub authority: Option<Arc<str>>,
    /// New port.
    pub port: RedirectPort,
    /// New path.
    pub path: Option<PathRewrite>,
    /// Whether the query is dropped (never by Istio or the Gateway API).
    pub strip_query: bool,
}
/// Port of a redirect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RedirectPort {
    /// Not said: kept unless scheme or host change (Envoy's rule).
    #[default]
    Unset,
    /// This one; 80 and 443 are left out for their schemes.
    Number(u16),
    /// `derivePort: FROM_PROTOCOL_DEFAULT`.
    ProtocolDefault,
    /// `derivePort: FROM_REQUEST_PORT`.
    FromRequest,
}
/// An answer made here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectResponse {
    /// Status.
    pub status: u16,
    /// Body, at most 1 MiB.
    pub body: Arc<[u8]>,
}
/// A copy of the request to somewhere else; its answer is ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Where.
    pub to: BackendRef,
    /// Share of the requests.
    pub fraction: Fraction,
}
/// A share with Envoy's finest denominator: `per_million` of 1 000 000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fraction {
    /// 0 ..= 1 000 000.
    pub per_million: u32,
}
impl Fraction {
    /// Everything.
    pub const ALL: Self = Self { per_million: 1_000_000 };
    /// A percentage, clamped to 0 ..= 100.
    pub fn percent(p: f64) -> Self {
        // In range after the clamp; a NaN becomes 0.
        Self { per_million: (p.clamp(0.0, 100.0) * 10_000.0).round() as u32 }
    }
    /// Whether a uniform draw falls into the share.
    pub fn hit(self, draw: u64) -> bool {
        crate::lb::below(draw, 1_000_000) < u64::from(self.per_million)
    }
}
/// Injected faults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Delay of a share.
    pub delay: Option<(Fraction, Duration)>,
    /// Abort of a share.
    pub abort: Option<(Fraction, Abort)>,
}
/// How a fault answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// HTTP status.
    Http(u16),
    /// gRPC status.
    Grpc(u16),
}
/// CORS policy of a route.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Cors {
    /// Origins.
    pub origins: Vec<StringMatch>,
    /// `Access-Control-Allow-Methods`, joined with `,`; empty: not sent.
    pub methods: Arc<str>,
    /// `Access-Control-Allow-Headers`.
    pub headers: Arc<str>,
    /// `Access-Control-Expose-Headers`.
    pub expose: Arc<str>,
    /// `Access-Control-Max-Age` in seconds.
    pub max_age: Option<u64>,
    /// `Access-Control-Allow-Credentials: true`.
    pub credentials: bool,
    /// A preflight of an origin that does not match goes on to the upstream (Istio's FORWARD, the default).
    pub forward_unmatched: bool,
}

/// When and how often a request is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Retries after the first attempt; 0: none.
    pub attempts: u32,
    /// What is worth a retry.
    pub on: RetryOn,
    /// Statuses that are worth one, beside `on`.
    pub statuses: Vec<u16>,
    /// Limit of one attempt; `None`: the route's timeout.
    pub per_try: Option<Duration>,
    /// First back-off interval; the n-th is drawn from 0 ..< base·2ⁿ⁻¹, at most `max_backoff`.
    pub base_backoff: Duration,
    /// Largest back-off interval (Envoy: ten times the base).
    pub max_backoff: Duration,
    /// Prefer hosts that were not tried (previous_hosts, up to 5 draws).
    pub other_hosts: bool,
    /// Keep away from the priorities of localities that were tried ([`crate::l7::retry::left_out`]).
    pub other_localities: bool,
}
impl RetryPolicy {
    /// Istio's default: 2 attempts on `connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes` with
    /// no statuses listed, 25 ms base (spec/waypoint §3.1).
    pub fn istio_default() -> Self {
        Self {
            attempts: 2,
            on: RetryOn::CONNECT_FAILURE
                .with(RetryOn::REFUSED_STREAM)
                .with(RetryOn::UNAVAILABLE)
                .with(RetryOn::CANCELLED)
                .with(RetryOn::STATUS_CODES),
            statuses: Vec::new(),
            per_try: None,
            base_backoff: Duration::from_millis(25),
            max_backoff: Duration::from_millis(250),
            other_hosts: true,
            other_localities: false,
        }
    }
    /// No retries.
    pub fn none() -> Self {
        Self { attempts: 0, ..Self::istio_default() }
    }
}
/// Conditions of a retry, as Envoy names them in `retryOn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct RetryOn(pub u32);
impl RetryOn {
    /// `5xx`.
    pub const FIVE_XX: Self = Self(1);
    /// `gateway-error`: 502, 503, 504.
    pub const GATEWAY_ERROR: Self = Self(1 << 1);
    /// `connect-failure`.
    pub const CONNECT_FAILURE: Self = Self(1 << 2);
    /// `refused-stream`.
    pub const REFUSED_STREAM: Self = Self(1 << 3);
    /// `reset`.
    pub const RESET: Self = Self(1 << 4);
    /// `reset-before-request`.
    pub const RESET_BEFORE_REQUEST: Self = Self(1 << 5);
    /// `retriable-4xx`: 409.
    pub const RETRIABLE_4XX: Self = Self(1 << 6);
    /// `retriable-status-codes`.
    pub const STATUS_CODES: Self = Self(1 << 7);
    /// gRPC `cancelled`.
    pub const CANCELLED: Self = Self(1 << 8);
    /// gRPC `deadline-exceeded`.
    pub const DEADLINE_EXCEEDED: Self = Self(1 << 9);
    /// gRPC `internal`.
    pub const INTERNAL: Self = Self(1 << 10);
    /// gRPC `resource-exhausted`.
    pub const RESOURCE_EXHAUSTED: Self = Self(1 << 11);
    /// gRPC `unavailable`.
    pub const UNAVAILABLE: Self = Self(1 << 12);
    /// `envoy-ratelimited`.
    pub const ENVOY_RATELIMITED: Self = Self(1 << 13);
    /// `http3-post-connect-failure`: never happens here, accepted for what it is.
    pub const HTTP3: Self = Self(1 << 14);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// Whether all of `other` is in.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A TCP rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpRule {
    /// Port of the service.
    pub port: Option<u16>,
    /// Destination addresses; empty: all.
    pub destinations: Vec<IpNet>,
    /// Where to.
    pub route: Arc<TcpRoute>,
}
/// A TLS rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsRule {
    /// SNI names: exact or `*.suffix`; never empty.
    pub sni: Vec<Arc<str>>,
    /// Port of the service.
    pub port: Option<u16>,
    /// Where to.
    pub route: Arc<TcpRoute>,
}
/// Weighted backends of a TCP or TLS rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpRoute {
    /// Name for logs.
    pub name: Arc<str>,
    /// Backends.
    pub backends: Vec<Backend>,
    /// Sum of the weights.
    pub total_weight: u64,
}

impl TcpRoute {
    /// What a port of a service means without routes of its own: the service itself.
    pub fn plain(service: &ServiceKey, port: u16) -> Self {
        let to = ClusterKey { service: service.clone(), port, subset: None };
        Self { name: "default".into(), backends: vec![Backend::to(BackendRef::Service(to))], total_weight: 1 }
    }
}

/// Verified claims of a request, as routing asks for them.
pub trait Claims {
    /// Whether the claim at `path` matches: its text, or any element of its list.
    fn matches(&self, path: &[Arc<str>], what: &StringMatch) -> bool;
    /// Feeds the claim at `path`, or that there is none, and whose word it is.
    fn hash_claim(&self, path: &[Arc<str>], hasher: &mut dyn Hasher);
}

/// What a request is matched by.
#[derive(Clone, Copy)]
pub struct RequestFacts<'a> {
    /// Method.
    pub method: &'a http::Method,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `:authority` or `Host`.
    pub authority: &'a str,
    /// Normalised path, without query.
    pub path: &'a str,
    /// Query without `?`.
    pub query: Option<&'a str>,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// Port of the service (or of the gateway's listener).
    pub port: u16,
    /// Verified claims, if a token was presented.
    pub claims: Option<&'a dyn Claims>,
}
/// What a TCP connection is matched by.
#[derive(Clone, Copy, Debug)]
pub struct TcpFacts<'a> {
    /// Port of the service.
    pub port: u16,
    /// Address asked for.
    pub destination: Option<IpAddr>,
    /// SNI of the ClientHello, if it is TLS.
    pub sni: Option<&'a str>,
}
