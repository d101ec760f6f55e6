//! The upstream attempts: limits, endpoint, send, and whether to try again.
use crate::body::Body;
use crate::facts::Scope;
use crate::phase::Exchange;
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
use mesh_model::l7::deadline::{self, Limits};
use mesh_model::l7::failure::Told;
use mesh_model::l7::hash::{HashOutcome, request_hash};
use mesh_model::l7::head::upgrade_of;
use mesh_model::l7::retry::{self, Outcome};
use mesh_model::l7::route::{BackendRef, Dialect, Forward, HttpAction};
use mesh_model::l7::session::{self, Session, Ticket};
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
    let cluster = match cluster(ex, &route).await {
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
    let session = forward.session.clone().or_else(|| cluster.policy().session.clone());
    let kept = session.map(|session| Kept::of(ex, session)).unwrap_or_default();
    let (answer, deadline) = attempts(ex, forward, route.dialect, &cluster, (hash, &kept), &guard).await;
    match &mut ex.switched {
        Some(switched) => {
            switched.guard = Some(guard);
            answer
        }
        None => expose::hold(answer, guard, deadline),
    }
}

/// The cluster of the chosen backend, or the answer when there is none.
async fn cluster(ex: &mut Exchange<'_>, route: &HttpRoute) -> Result<Arc<Cluster>, Box<Response<Body>>> {
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
    let cluster = ex.conn.shared.upstreams.cluster(&ex.snap, key, ex.conn.role()).await;
    cluster.map_err(|error| Box::new(failed(ex, &error, false, route.dialect)))
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

/// What a request's session is kept by, if it has one.
#[derive(Default)]
struct Kept {
    session: Option<Arc<Session>>,
    /// What the client brought.
    ticket: Option<Ticket>,
}
impl Kept {
    fn of(ex: &Exchange<'_>, session: Arc<Session>) -> Self {
        let ticket = session.asked(&ex.parts.headers, ex.record.begun());
        Self { session: Some(session), ticket }
    }
    /// What tells the client the endpoint that answered, unless it knows.
    fn tell(&self, ex: &Exchange<'_>, host: &Host) -> Option<(HeaderName, HeaderValue)> {
        let (session, name) = (self.session.as_ref()?, host.session_name());
        let BackendRef::Service(key) = &ex.backend()?.to else { return None };
        let known = |ticket: Ticket| ticket.endpoint == name && ticket.backend == session::backend(key);
        if self.ticket.is_some_and(known) { None } else { session.tell(key, name, ex.record.begun()) }
    }
}

/// Attempts until one is final: its answer, and until when its body may take.
async fn attempts(
    ex: &mut Exchange<'_>,
    forward: &Forward,
    dialect: Dialect,
    cluster: &Arc<Cluster>,
    (hash, kept): (Option<u64>, &Kept),
    guard: &RequestGuard,
) -> (Response<Body>, Option<Instant>) {
    let snap = Arc::clone(&ex.snap);
    let policy = forward.retries(&snap.defaults().retry);
    let upgrade = upgrade_of(&ex.parts.headers).is_some();
    let client_upgrade = ex.parts.extensions.remove::<OnUpgrade>().filter(|_| upgrade);
    let repeatable = policy.attempts > 0 && !upgrade;
    // Time counts from when the whole request was there (Envoy): a slow upload is the client's time, not the endpoint's.
    let begun = Instant::now();
    let asked = ex.grpc.then(|| ex.parts.headers.get(GRPC_TIMEOUT).and_then(deadline::grpc_timeout)).flatten();
    let whole = deadline::limit(forward.timeout, asked);
    let limits = Limits { whole, per_try: policy.per_try };
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
        // As in Envoy: who was not answered well there is sent elsewhere, and stays.
        let session = kept.ticket.filter(|_| attempt == 1).map(|ticket| ticket.endpoint);
        let pick = PickContext { draw, hash, session, tried: tried_now, before, dst: ex.conn.asked(), name };
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
        if let Some((end, _)) = limits.end(started, ex.body_ended(begun).unwrap_or(started)) {
            tell_limit(ex, request.headers_mut(), end.saturating_duration_since(started));
        }
        let options =
            SendOptions { http2, upgrade, client: Some(ex.conn.client), trace: trace::of_connection(ex), guard: Some(guard) };
        let sent = upstream::send(cluster, &host, request, options);
        let mut is_per_try = false;
        let result = tokio::select! {
            biased;
            result = sent => result,
            of_try = passed(limits, started, ex.replay.as_ref(), begun) => {
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
                ex.session = kept.tell(ex, &host);
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

/// Resolves when a limit of the attempt that `started` then has passed: whether it was its own. `begun`: when a request without
/// a body ended.
async fn passed(limits: Limits, started: Instant, body: Option<&Replay>, begun: Instant) -> bool {
    if limits.whole.is_none() && limits.per_try.is_none() {
        return std::future::pending().await;
    }
    let ended = match body {
        Some(body) => body.ended().await,
        None => begun,
    };
    match limits.end(started, ended) {
        Some((at, own)) => {
            sleep_until(at).await;
            own
        }
        None => std::future::pending().await,
    }
}

/// What counts for the endpoint's health: of a gRPC call that failed at once, what its status stands for.
pub(super) fn observed(grpc: bool, result: &Result<Response<Incoming>, UpstreamError>) -> Observed {
    match result {
        Ok(response) => {
            let status = if grpc { grpc_status(response.headers()) } else { None };
            let http = || Observed::Status(response.status().as_u16());
            status.map_or_else(http, |status| Observed::Grpc(http_of_grpc(status)))
        }
        Err(error) => Observed::Failed(error.failure),
    }
}

/// Tells the endpoint how long it has.
fn tell_limit(ex: &Exchange<'_>, headers: &mut HeaderMap, limit: Duration) {
    let ms = deadline::milliseconds(limit);
    headers.insert(EXPECTED_TIMEOUT, HeaderValue::from(ms));
    if ex.grpc
        && let Some(value) = deadline::grpc_timeout_value(ms)
    {
        headers.insert(GRPC_TIMEOUT, value);
    }
}

/// Whether HTTP/2 is spoken to the endpoint.
pub(super) fn speaks_http2(ex: &Exchange<'_>, cluster: &Cluster) -> bool {
    cluster.policy().pool.speaks_http2(cluster.app_protocol(), ex.parts.version == Version::HTTP_2)
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
        Err(error) => Outcome::Failed(error.failure),
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
    let failure = error.failure;
    if matches!(failure, Failure::Connect | Failure::ConnectTimeout) {
        ex.record.transport_failure.clone_from(&error.detail);
    }
    if failure == Failure::NoHealthy {
        ex.record.reason = error.reason.or(Some(mesh_model::Reason::NoHealthyEndpoint));
    }
    let Told { status, text, mut details } = failure.told(dialect, retried);
    if failure == Failure::ClientGone {
        (_, details) = expose::client_gone(ex.parts.version);
    }
    ex.record.flags.set(flag(failure, ex.parts.version));
    match failure {
        Failure::ClientProtocol => respond::closing(ex, status, text, details),
        // Only a failed connect has more to tell than its kind; what there is for the others is in the transport failure.
        Failure::Connect if !error.detail.is_empty() => {
            let detail: String = error.detail.chars().map(|c| if c.is_whitespace() { '_' } else { c }).collect();
            respond::local(ex, status, text, format!("{}|{detail}}}", details.trim_end_matches('}')))
        }
        // Where the mesh says why there is no way, that is worth more than that there is none.
        Failure::NoHealthy if error.reason.is_some() => respond::local(ex, status, text, error.detail.clone()),
        Failure::Overflow => {
            let mut answer = respond::local(ex, status, text, details);
            answer.headers_mut().insert("x-envoy-overloaded", HeaderValue::from_static("true"));
            answer
        }
        _ => respond::local(ex, status, text, details),
    }
}

/// Envoy's flag for a failure, of a request in this version of HTTP.
fn flag(failure: Failure, version: Version) -> Flag {
    match failure {
        Failure::NoCluster => Flag::NoClusterFound,
        Failure::NoHealthy => Flag::NoHealthyUpstream,
        Failure::Timeout => Flag::UpstreamRequestTimeout,
        Failure::ClientGone => expose::client_gone(version).0,
        Failure::ClientProtocol => Flag::DownstreamProtocolError,
        Failure::Overflow => Flag::UpstreamOverflow,
        Failure::Connect | Failure::ConnectTimeout => Flag::UpstreamConnectionFailure,
        Failure::Refused | Failure::RemoteReset => Flag::UpstreamRemoteReset,
        Failure::Reset | Failure::ResetBeforeRequest => Flag::UpstreamConnectionTermination,
        Failure::Protocol => Flag::UpstreamProtocolError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Flags;

    #[test]
    fn failures_have_envoys_flags() {
        for (failure, one, two) in [
            (Failure::NoCluster, "NC", "NC"),
            (Failure::NoHealthy, "UH", "UH"),
            (Failure::Overflow, "UO", "UO"),
            (Failure::Connect, "UF", "UF"),
            (Failure::ConnectTimeout, "UF", "UF"),
            (Failure::Refused, "UR", "UR"),
            (Failure::RemoteReset, "UR", "UR"),
            (Failure::Reset, "UC", "UC"),
            (Failure::ResetBeforeRequest, "UC", "UC"),
            (Failure::Protocol, "UPE", "UPE"),
            (Failure::Timeout, "UT", "UT"),
            (Failure::ClientGone, "DC", "DR"),
            (Failure::ClientProtocol, "DPE", "DPE"),
        ] {
            for (version, want) in [(Version::HTTP_11, one), (Version::HTTP_2, two)] {
                let mut flags = Flags::default();
                flags.set(flag(failure, version));
                assert_eq!(flags.to_string(), want, "{failure:?} {version:?}");
            }
        }
    }
}
