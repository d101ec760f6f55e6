//! The upstream attempts: limits, endpoint, send, and whether to try again.
use crate::body::Body;
use crate::facts::Scope;
use crate::phase::Exchange;
use crate::phase::admit::upgrade_of;
use crate::phase::replay::Replay;
use crate::phase::{expose, grpc_status, http_of_grpc, respond, trace};
use crate::telemetry::Flag;
use crate::upgrade::Switched;
use crate::upstream::{self, Cluster, Failure, Host, Observed, PickContext, RequestGuard, SendOptions, UpstreamError};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use mesh_model::hosts::host_of;
use mesh_model::l7::HttpRoute;
use mesh_model::l7::hash::{HashOutcome, request_hash};
use mesh_model::l7::retry::{self, Outcome};
use mesh_model::l7::route::{BackendRef, Dialect, Forward, HttpAction};
use mesh_model::lb::redraw;
use mesh_model::waypoint::Target;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

const DRAW_ATTEMPT: u64 = 20;
const DRAW_BACKOFF: u64 = 60;
/// `x-envoy-expected-rq-timeout-ms`.
pub(super) const EXPECTED_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
/// `grpc-timeout`.
const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// `x-envoy-attempt-count`.
const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// Sends the request to an endpoint of the chosen backend, again where that is worth it, and gives the answer.
pub(crate) async fn run(ex: &mut Exchange<'_>) -> Response<Body> {
    let Some(route) = ex.route.clone() else { return internal(ex, "no route") };
    let HttpAction::Forward(forward) = &route.action else { return internal(ex, "not a forward") };
    let cluster = match cluster(ex, &route) {
        Ok(cluster) => cluster,
        Err(answer) => return *answer,
    };
    ex.record.cluster = Some(Arc::clone(&cluster));
    let hash;
    (hash, ex.sticky) = sticky(ex, &cluster);
    let guard = match cluster.admit() {
        Ok(guard) => guard,
        Err(error) => return failed(ex, &error, false, route.dialect),
    };
    let (answer, deadline) = attempts(ex, forward, route.dialect, &cluster, hash, &guard).await;
    match &mut ex.switched {
        Some(switched) => {
            switched.guard = Some(guard);
            answer
        }
        None => expose::hold(answer, guard, deadline),
    }
}

/// The cluster of the chosen backend, or the answer when there is none.
fn cluster(ex: &mut Exchange<'_>, route: &HttpRoute) -> Result<Arc<Cluster>, Box<Response<Body>>> {
    if let Scope::Mesh(Target::Workload { known, port }) = &ex.conn.scope {
        return Ok(ex.conn.shared.upstreams.workload(&ex.snap, known, *port));
    }
    let key = match ex.backend().map(|b| &b.to) {
        Some(BackendRef::Service(key)) => key,
        Some(BackendRef::Invalid { status, why }) => {
            let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let details: Cow<'static, str> = if status == StatusCode::SERVICE_UNAVAILABLE {
                ex.record.flags.set(Flag::NoClusterFound);
                "cluster_not_found".into()
            } else {
                format!("invalid_backend: {why}").into()
            };
            return Err(Box::new(respond::local(ex, status, "", details)));
        }
        None => return Err(Box::new(internal(ex, "no backend"))),
    };
    ex.conn.shared.upstreams.cluster(&ex.snap, key).map_err(|error| Box::new(failed(ex, &error, false, route.dialect)))
}

/// The hash of a consistent-hash destination, and the cookie to set when it asks for one that is not there.
fn sticky(ex: &Exchange<'_>, cluster: &Cluster) -> (Option<u64>, Option<HeaderValue>) {
    let mesh_model::l7::destination::Balance::Hash { key, .. } = &cluster.policy().balance else { return (None, None) };
    let facts = ex.facts();
    match request_hash(key, &facts, ex.conn.client.ip(), ex.draw) {
        HashOutcome::Hash(hash) => (Some(hash), None),
        HashOutcome::Cookie { hash, set_cookie } => (Some(hash), HeaderValue::try_from(set_cookie).ok()),
        HashOutcome::Nothing => (None, None),
    }
}

/// Attempts until one is final: its answer, and until when its body may take.
async fn attempts(
    ex: &mut Exchange<'_>,
    forward: &Forward,
    dialect: Dialect,
    cluster: &Arc<Cluster>,
    hash: Option<u64>,
    guard: &RequestGuard,
) -> (Response<Body>, Option<Instant>) {
    let snap = Arc::clone(&ex.snap);
    let policy = forward.retries(&snap.defaults().retry);
    let upgrade = upgrade_of(&ex.parts.headers).is_some();
    let client_upgrade = ex.parts.extensions.remove::<OnUpgrade>().filter(|_| upgrade);
    let repeatable = policy.attempts > 0 && !upgrade;
    // Time counts from when the whole request was there (Envoy): a slow upload is the client's time, not the endpoint's.
    let (begun, whole) = (Instant::now(), time_limit(ex, forward.timeout));
    let deadline = |ex: &Exchange<'_>| Some(ex.body_ended(begun)? + whole?);
    let http2 = speaks_http2(ex, cluster);
    let mut tried: Vec<Arc<Host>> = Vec::new();
    // Held while a retry is under way: the budget counts it.
    let mut retrying = None;
    loop {
        let attempt = ex.record.attempts + 1;
        let draw = redraw(ex.draw, DRAW_ATTEMPT + u64::from(attempt));
        let none: &[Arc<Host>] = &[];
        // Consistent hashing means the same endpoint however often it is asked.
        let wanted = |wanted: bool| if wanted && hash.is_none() { &tried[..] } else { none };
        let (tried_now, before) = (wanted(policy.other_hosts), wanted(policy.other_localities));
        let name = Some(host_of(&ex.authority));
        let pick = PickContext { draw, hash, tried: tried_now, before, dst: ex.conn.asked(), name };
        let host = match cluster.pick(&pick) {
            Ok(host) => host,
            Err(error) => return (failed(ex, &error, attempt > 1, dialect), None),
        };
        ex.record.attempts = attempt;
        ex.record.host = Some(Arc::clone(&host));
        let Some(reader) = ex.read_body() else { return (internal(ex, "the body was already sent"), None) };
        let Ok(mut request) = outgoing(ex, reader, &ex.authority, attempt, http2) else {
            return (respond::local(ex, StatusCode::BAD_REQUEST, "", "invalid_authority"), None);
        };
        let started = Instant::now();
        let limit = Limit { whole, per_try: policy.per_try, started };
        if let Some((end, _)) = limit.end(ex.body_ended(begun).unwrap_or(started)) {
            tell_limit(ex, request.headers_mut(), end.saturating_duration_since(started));
        }
        let options =
            SendOptions { http2, upgrade, client: Some(ex.conn.client), trace: trace::of_connection(ex), guard: Some(guard) };
        let sent = upstream::send(cluster, &host, request, options);
        let mut is_per_try = false;
        let result = tokio::select! {
            biased;
            result = sent => result,
            of_try = limit.passed(ex.replay.as_ref(), begun) => {
                is_per_try = of_try;
                Err(UpstreamError::new(Failure::Timeout, ""))
            }
        };
        drop(retrying.take());
        cluster.report(&host, observed(ex.grpc, &result));
        let worth = policy.attempts > 0 && retry::worth_retry(policy, &outcome_of(&result));
        let again = worth
            && repeatable
            && attempt <= policy.attempts
            // The whole time is up: nothing is left to try in.
            && (is_per_try || !matches!(&result, Err(e) if e.failure == Failure::Timeout))
            && ex.body_is_whole();
        let wait = || retry::backoff(policy, attempt, redraw(ex.draw, DRAW_BACKOFF + u64::from(attempt)));
        if let Some(wait) = again.then(wait).filter(|wait| deadline(ex).is_none_or(|d| Instant::now() + *wait < d)) {
            match cluster.admit_retry() {
                // The body of an attempt that answered early went on; from here on it does not.
                Some(guard) if ex.take_body_back() => {
                    retrying = Some(guard);
                    tried.push(host);
                    drop(result);
                    sleep(wait).await;
                    continue;
                }
                Some(_) => {}
                None => ex.record.flags.set(Flag::UpstreamOverflow),
            }
        } else if worth && attempt > policy.attempts {
            ex.record.flags.set(Flag::UpstreamRetryLimitExceeded);
        }
        return match result {
            Ok(response) => {
                // Counted from the end of the request, which an upgrade does not have.
                ex.record.upstream_time = (!upgrade).then(|| started.elapsed());
                let deadline = deadline(ex);
                (arrived(ex, response, client_upgrade), deadline)
            }
            Err(error) if error.failure == Failure::Timeout && is_per_try => {
                ex.record.flags.set(Flag::UpstreamRequestTimeout);
                (respond::local(ex, StatusCode::GATEWAY_TIMEOUT, "upstream request timeout", "upstream_per_try_timeout"), None)
            }
            Err(error) => (failed(ex, &error, attempt > 1, dialect), None),
        };
    }
}

/// How long one attempt may take.
#[derive(Clone, Copy)]
struct Limit {
    /// Of all attempts, from the end of the request on.
    whole: Option<Duration>,
    /// Of each, from its own beginning or the end of the request on, whichever is later.
    per_try: Option<Duration>,
    started: Instant,
}
impl Limit {
    /// When that is, and whether it is the attempt's own limit, for a request that ended then.
    fn end(self, ended: Instant) -> Option<(Instant, bool)> {
        match (self.whole.map(|t| ended + t), self.per_try.map(|t| ended.max(self.started) + t)) {
            (whole, Some(own)) if whole.is_none_or(|whole| own < whole) => Some((own, true)),
            (whole, _) => whole.map(|whole| (whole, false)),
        }
    }
    /// Resolves when it has passed: whether it was the attempt's own. `begun`: when a request without a body ended.
    async fn passed(self, body: Option<&Replay>, begun: Instant) -> bool {
        if self.whole.is_none() && self.per_try.is_none() {
            return std::future::pending().await;
        }
        let ended = match body {
            Some(body) => body.ended().await,
            None => begun,
        };
        match self.end(ended) {
            Some((at, own)) => {
                sleep_until(at).await;
                own
            }
            None => std::future::pending().await,
        }
    }
}

/// What counts for the endpoint's health: of a gRPC call that failed at once, what its status stands for.
pub(super) fn observed(grpc: bool, result: &Result<Response<Incoming>, UpstreamError>) -> Observed {
    match result {
        Ok(response) => {
            let status = if grpc { grpc_status(response.headers()) } else { None };
            Observed::Status(status.map_or(response.status().as_u16(), http_of_grpc))
        }
        Err(error) => Observed::Failed(error.failure),
    }
}

/// How long the exchange may take: the route's limit; a gRPC call may ask for less, or for any time where there is none.
fn time_limit(ex: &Exchange<'_>, route: Option<Duration>) -> Option<Duration> {
    let asked = ex.grpc.then(|| ex.parts.headers.get(GRPC_TIMEOUT).and_then(grpc_timeout)).flatten();
    match (asked, route) {
        (Some(asked), Some(route)) => Some(asked.min(route)),
        (asked, route) => asked.or(route),
    }
}

/// Tells the endpoint how long it has.
fn tell_limit(ex: &Exchange<'_>, headers: &mut HeaderMap, limit: Duration) {
    // Whole milliseconds, at least one: 0 would mean no limit.
    let ms = u64::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(u64::MAX).max(1);
    headers.insert(EXPECTED_TIMEOUT, HeaderValue::from(ms));
    if ex.grpc
        && let Some(value) = grpc_timeout_value(ms)
    {
        headers.insert(GRPC_TIMEOUT, value);
    }
}

/// `grpc-timeout`: up to eight digits and a unit (gRPC over HTTP/2), rounded up to milliseconds. What is none is no limit.
fn grpc_timeout(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let ms = match unit {
        b'H' => number * 3_600_000,
        b'M' => number * 60_000,
        b'S' => number * 1000,
        b'm' => number,
        b'u' => number.div_ceil(1000),
        b'n' => number.div_ceil(1_000_000),
        _ => return None,
    };
    (ms > 0).then(|| Duration::from_millis(ms))
}

/// The same, in the finest of the units that holds it in eight digits.
fn grpc_timeout_value(ms: u64) -> Option<HeaderValue> {
    const MOST: u64 = 99_999_999;
    let text = match ms {
        0..=MOST => format!("{ms}m"),
        _ if ms / 1000 <= MOST => format!("{}S", ms / 1000),
        _ => format!("{}M", (ms / 60_000).min(MOST)),
    };
    HeaderValue::try_from(text).ok()
}

/// Whether HTTP/2 is spoken to the endpoint: declared by the service's port, asked for by policy, or as the client did.
pub(super) fn speaks_http2(ex: &Exchange<'_>, cluster: &Cluster) -> bool {
    use mesh_model::service::AppProtocol;
    let pool = &cluster.policy().pool;
    let client_did = ex.parts.version == Version::HTTP_2;
    if pool.use_client_protocol {
        return client_did;
    }
    if pool.h2_upgrade {
        return true;
    }
    match cluster.app_protocol() {
        AppProtocol::Http2 | AppProtocol::Grpc => true,
        AppProtocol::Http11 => false,
        // Not declared: what the client chose was chosen for the endpoint (Istio's protocol detection).
        AppProtocol::Unknown | AppProtocol::Tls | AppProtocol::Tcp => client_did,
    }
}

/// The request of one attempt.
pub(super) fn outgoing(ex: &Exchange<'_>, body: Body, authority: &str, attempt: u32, http2: bool) -> Result<Request<Body>, ()> {
    let mut request = Request::new(body);
    *request.method_mut() = ex.parts.method.clone();
    *request.headers_mut() = ex.parts.headers.clone();
    let target = match ex.parts.uri.query() {
        Some(query) => PathAndQuery::try_from(format!("{}?{query}", ex.path)),
        None => PathAndQuery::try_from(ex.path.as_str()),
    };
    let target = target.map_err(|_| ())?;
    let mut uri = http::uri::Parts::default();
    uri.path_and_query = Some(target);
    if http2 {
        uri.scheme = Some(if ex.scheme == "https" { Scheme::HTTPS } else { Scheme::HTTP });
        uri.authority = Some(Authority::try_from(authority).map_err(|_| ())?);
        *request.version_mut() = Version::HTTP_2;
        request.headers_mut().remove(header::HOST);
    } else if !authority.is_empty() {
        request.headers_mut().insert(header::HOST, HeaderValue::try_from(authority).map_err(|_| ())?);
    }
    *request.uri_mut() = Uri::from_parts(uri).map_err(|_| ())?;
    // RFC 9110 §8.6: a method that usually has a body says so when it has none.
    let bodiless = [Method::GET, Method::HEAD, Method::DELETE, Method::TRACE, Method::CONNECT];
    if !http2 && request.body().is_end_stream() && !bodiless.contains(request.method()) {
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    request.headers_mut().insert(ATTEMPT_COUNT, HeaderValue::from(attempt));
    Ok(request)
}

/// What retry rules see of an attempt.
fn outcome_of(result: &Result<Response<Incoming>, UpstreamError>) -> Outcome {
    match result {
        Ok(response) => Outcome::Answered {
            status: response.status().as_u16(),
            grpc_status: grpc_status(response.headers()),
            rate_limited: response.headers().contains_key("x-envoy-ratelimited"),
        },
        Err(error) => Outcome::Failed(match error.failure {
            Failure::Connect => retry::FailureKind::Connect,
            Failure::ConnectTimeout => retry::FailureKind::ConnectTimeout,
            Failure::Refused => retry::FailureKind::Refused,
            Failure::Reset | Failure::RemoteReset => retry::FailureKind::Reset,
            Failure::ResetBeforeRequest => retry::FailureKind::ResetBeforeRequest,
            Failure::Protocol => retry::FailureKind::Protocol,
            Failure::Timeout => retry::FailureKind::Timeout,
            Failure::Overflow | Failure::NoCluster | Failure::NoHealthy | Failure::ClientGone | Failure::ClientProtocol => {
                retry::FailureKind::Overflow
            }
        }),
    }
}

/// The upstream answered.
fn arrived(ex: &mut Exchange<'_>, response: Response<Incoming>, client: Option<OnUpgrade>) -> Response<Body> {
    let (parts, body) = response.into_parts();
    ex.record.details = "via_upstream".into();
    if ex.grpc {
        ex.record.grpc_status = grpc_status(&parts.headers);
    }
    let mut answer = Response::from_parts(parts, Body::Incoming(body));
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let upstream = answer.extensions_mut().remove::<OnUpgrade>();
        if let (Some(client), Some(endpoint)) = (client, upstream) {
            ex.switched = Some(Switched { client, endpoint, guard: None });
        }
        *answer.body_mut() = Body::Empty;
    }
    respond::from_upstream(ex, &mut answer);
    // What this hop speaks to the client is the server's business.
    *answer.version_mut() = Version::HTTP_11;
    answer
}

fn internal(ex: &mut Exchange<'_>, details: &'static str) -> Response<Body> {
    ex.record.reason = Some(mesh_model::Reason::Internal);
    respond::local(ex, StatusCode::INTERNAL_SERVER_ERROR, "", details)
}

/// The answer to a failed last attempt (spec/waypoint §10).
pub(super) fn failed(ex: &mut Exchange<'_>, error: &UpstreamError, retried: bool, dialect: Dialect) -> Response<Body> {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    if matches!(error.failure, Failure::Connect | Failure::ConnectTimeout) {
        ex.record.transport_failure.clone_from(&error.detail);
    }
    let (flag, status, reset) = match error.failure {
        Failure::NoCluster => {
            ex.record.flags.set(Flag::NoClusterFound);
            let status = if dialect == Dialect::GatewayApi { StatusCode::INTERNAL_SERVER_ERROR } else { unavailable };
            return respond::local(ex, status, "", "cluster_not_found");
        }
        Failure::NoHealthy => {
            ex.record.flags.set(Flag::NoHealthyUpstream);
            ex.record.reason = Some(mesh_model::Reason::NoHealthyEndpoint);
            return respond::local(ex, unavailable, "no healthy upstream", "no_healthy_upstream");
        }
        Failure::Timeout => {
            ex.record.flags.set(Flag::UpstreamRequestTimeout);
            return respond::local(ex, StatusCode::GATEWAY_TIMEOUT, "upstream request timeout", "response_timeout");
        }
        Failure::ClientGone => {
            let (flag, details) = expose::client_gone(ex.parts.version);
            ex.record.flags.set(flag);
            return respond::local(ex, unavailable, "", details);
        }
        Failure::ClientProtocol => {
            ex.record.flags.set(Flag::DownstreamProtocolError);
            return respond::closing(ex, StatusCode::BAD_REQUEST, "Bad Request", "http1.codec_error");
        }
        Failure::Overflow => (Flag::UpstreamOverflow, unavailable, Reset::Overflow),
        Failure::Connect => (Flag::UpstreamConnectionFailure, unavailable, Reset::Connect),
        Failure::ConnectTimeout => (Flag::UpstreamConnectionFailure, unavailable, Reset::ConnectTimeout),
        Failure::Refused => (Flag::UpstreamRemoteReset, unavailable, Reset::Refused),
        Failure::Reset | Failure::ResetBeforeRequest => (Flag::UpstreamConnectionTermination, unavailable, Reset::Terminated),
        Failure::RemoteReset => (Flag::UpstreamRemoteReset, unavailable, Reset::Remote),
        Failure::Protocol => (Flag::UpstreamProtocolError, StatusCode::BAD_GATEWAY, Reset::Protocol),
    };
    ex.record.flags.set(flag);
    let mut details = format!("upstream_reset_before_response_started{{{}", reset.word());
    // Only a failed connect has more to tell than its kind; what there is for the others is in the transport failure.
    if error.failure == Failure::Connect && !error.detail.is_empty() {
        details.push('|');
        details.extend(error.detail.chars().map(|c| if c.is_whitespace() { '_' } else { c }));
    }
    details.push('}');
    let mut answer = respond::local(ex, status, reset.text(retried), details);
    if matches!(reset, Reset::Overflow) {
        answer.headers_mut().insert("x-envoy-overloaded", HeaderValue::from_static("true"));
    }
    answer
}

/// Envoy's reset reasons.
#[derive(Clone, Copy)]
enum Reset {
    Overflow,
    Connect,
    ConnectTimeout,
    Refused,
    Remote,
    Terminated,
    Protocol,
}
impl Reset {
    fn word(self) -> &'static str {
        match self {
            Self::Overflow => "overflow",
            Self::Connect => "remote_connection_failure",
            Self::ConnectTimeout => "connection_timeout",
            Self::Refused => "remote_refused_stream_reset",
            Self::Remote => "remote_reset",
            Self::Terminated => "connection_termination",
            Self::Protocol => "protocol_error",
        }
    }
    fn text(self, retried: bool) -> &'static str {
        macro_rules! text {
            ($reason:literal) => {
                if retried {
                    concat!(
                        "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: ",
                        $reason
                    )
                } else {
                    concat!("upstream connect error or disconnect/reset before headers. reset reason: ", $reason)
                }
            };
        }
        match self {
            Self::Overflow => text!("overflow"),
            Self::Connect => text!("remote connection failure"),
            Self::ConnectTimeout => text!("connection timeout"),
            Self::Refused => text!("remote refused stream reset"),
            Self::Remote => text!("remote reset"),
            Self::Terminated => text!("connection termination"),
            Self::Protocol => text!("protocol error"),
        }
    }
}
