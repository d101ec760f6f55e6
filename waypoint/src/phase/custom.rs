//! CUSTOM policies: whom they name is asked before anything else is judged (Istio's ext_authz, by HTTP and by gRPC).
//!
//! Owns who is asked, and what comes of it. Nobody who knows the name, no answer, or one that cannot be understood: refused,
//! unless the authorizer is said to fail open. Upstream: `exchange`, `tcp`. Downstream: `authorize`, which knows whom policies
//! name; `http` and `grpc`, which know the two protocols; `upstream`.
mod grpc;
mod http;

use crate::body::{Body, BodyError};
use crate::conn::Conn;
use crate::phase::authorize::{self, Asking};
use crate::phase::{Exchange, Flow, buffer, grpc_status, respond, route, trace};
use crate::telemetry::{Call, Flag, grpc_of_http};
use crate::upstream::{self, Failure, Observed, PickContext, SendOptions, UpstreamError};
use ::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use ::http::response::Parts;
use ::http::{Request, Response, StatusCode};
use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt as _, Limited};
use mesh_model::in_force::InForce;
use mesh_model::l7::authorizer::{Authorizer, BodyLimit, Protocol};
use mesh_model::l7::route::ClusterKey;
use mesh_model::lb::redraw;
use mesh_model::service::AppProtocol;
use mesh_model::{Reason, Refusal, Snapshot};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

const DRAW_AUTHORIZER: u64 = 40;
/// The largest answer that is read.
const ANSWER: usize = 64 << 10;
/// What speaks of one connection or one body, and is never handed on.
const OF_THE_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What an authorizer said.
#[derive(Debug, PartialEq)]
enum Verdict {
    Agrees(Grant),
    /// With what the client is to be answered.
    Refuses(Refused),
}
/// What an authorizer wants done with a request that it lets pass.
#[derive(Debug, Default, PartialEq)]
struct Grant {
    /// To the headers of the request.
    request: Vec<Edit>,
    /// To the headers of what the client is answered.
    response: Vec<Edit>,
    /// To the query, by name: a new value, or none.
    query: Vec<(String, Option<String>)>,
}
/// The answer in an authorizer's words.
#[derive(Debug, PartialEq)]
struct Refused {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}
/// One change to one header.
#[derive(Debug, PartialEq)]
pub(crate) struct Edit {
    name: HeaderName,
    what: Change,
}
#[derive(Debug, PartialEq)]
enum Change {
    Remove,
    /// In place of all values there are.
    Set(HeaderValue),
    Append(HeaderValue),
    SetIfAbsent(HeaderValue),
    SetIfPresent(HeaderValue),
}
impl Edit {
    /// Does it, unless the header speaks of the connection.
    pub(crate) fn apply(self, headers: &mut HeaderMap) {
        let name = self.name;
        if OF_THE_HOP.contains(&name) {
            return;
        }
        match self.what {
            Change::Remove => drop(headers.remove(name)),
            Change::Append(value) => drop(headers.append(name, value)),
            Change::SetIfAbsent(_) if headers.contains_key(&name) => {}
            Change::SetIfPresent(_) if !headers.contains_key(&name) => {}
            Change::Set(value) | Change::SetIfAbsent(value) | Change::SetIfPresent(value) => {
                headers.insert(name, value);
            }
        }
    }
}

/// Asks every authorizer that a policy names for this request; the first that does not agree answers.
pub(crate) async fn check(ex: &mut Exchange<'_>) -> Flow {
    for asking in authorize::custom_of_request(ex) {
        let snap = Arc::clone(&ex.snap);
        let flow = match find(&snap, &asking) {
            Ok(authorizer) => Box::pin(ask(ex, &snap, authorizer, &asking)).await,
            Err(why) => {
                // Nobody can be asked: refused as by the policy itself.
                tracing::debug!(client = %ex.conn.client, %why, "request refused");
                ex.record.reason = Some(why.reason);
                Flow::Answer(respond::local(ex, StatusCode::FORBIDDEN, authorize::TEXT, asking.details.clone()))
            }
        };
        if matches!(flow, Flow::Answer(_)) {
            return flow;
        }
        ex.asked.push(asking.provider);
    }
    Flow::Continue
}

/// The same of a connection that is not HTTP: whoever agreed, by name, or why it may not pass and Envoy's words for it.
pub(crate) async fn check_bytes(
    conn: &Conn,
    snap: &Arc<Snapshot>,
    rules: &InForce,
    draw: u64,
) -> Result<Vec<Arc<str>>, (Refusal, String)> {
    let mut asked = Vec::new();
    for asking in authorize::custom(snap, rules, conn, None) {
        let authorizer = match find(snap, &asking) {
            Ok(authorizer) if authorizer.judges_bytes() => authorizer,
            Ok(_) => {
                let why = Refusal::new(Reason::NoAuthorizer, format!("{} is asked by HTTP, of requests only", asking.provider));
                return Err((why, asking.details));
            }
            Err(why) => return Err((why, asking.details)),
        };
        let question = grpc::question_of_bytes(conn, authorizer);
        let answer = in_time(conn, snap, authorizer, &asking, question, redraw(draw, DRAW_AUTHORIZER)).await;
        match answer.and_then(|answer| grpc::verdict(&answer)) {
            Ok(Verdict::Agrees(_)) => {}
            Ok(Verdict::Refuses(_)) => {
                return Err((Refusal::new(Reason::AuthorizerDenied, told(&asking)), "ext_authz_denied".into()));
            }
            Err(why) => {
                warn(authorizer, &asking, &why);
                if !authorizer.fail_open {
                    let why = Refusal::new(Reason::NoAuthorizer, format!("{}: {why}", told(&asking)));
                    return Err((why, "ext_authz_error".into()));
                }
            }
        }
        asked.push(asking.provider);
    }
    Ok(asked)
}

/// The authorizer a policy names.
fn find<'s>(snap: &'s Snapshot, asking: &Asking) -> Result<&'s Arc<Authorizer>, Refusal> {
    let why = match snap.find_authorizer(&asking.provider) {
        Some(Ok(authorizer)) => return Ok(authorizer),
        Some(Err(why)) => why,
        None => "MeshConfig has no extensionProvider of this name",
    };
    Err(Refusal::new(Reason::NoAuthorizer, format!("{}: {why}", told(asking))))
}
fn told(asking: &Asking) -> String {
    format!("{} asks {}", asking.policy, asking.provider)
}
fn warn(authorizer: &Authorizer, asking: &Asking, why: &str) {
    let open = authorizer.fail_open;
    tracing::warn!(policy = %asking.policy, provider = %asking.provider, why, open, "no answer from an external authorizer");
}

async fn ask(ex: &mut Exchange<'_>, snap: &Arc<Snapshot>, authorizer: &Authorizer, asking: &Asking) -> Flow {
    let shown = match authorizer.body {
        Some(limit) if !ex.body.is_end_stream() => match show(&mut ex.body, limit).await {
            Ok(shown) if shown.cut && !limit.partial => return buffer::too_large(ex, &shown.bytes),
            Ok(shown) => Some(shown),
            // Not the authorizer's fault, so that it cannot fail open.
            Err(error) => return buffer::broken(ex, &error),
        },
        _ => None,
    };
    let question = match &authorizer.speaks {
        Protocol::Http(check) => http::question(ex, check, authorizer.timeout, shown),
        Protocol::Grpc => grpc::question(ex, authorizer, shown),
    };
    let span = trace::of_call(ex);
    let question = question.map(|question| trace::forward_call(ex, question, span));
    let start = SystemTime::now();
    let began = Instant::now();
    let answer = in_time(ex.conn, snap, authorizer, asking, question, redraw(ex.draw, DRAW_AUTHORIZER)).await;
    if let Some(span) = span.filter(|span| span.sampled) {
        ex.record.calls.push(call(authorizer, &answer, (span, start, began.elapsed())));
    }
    let verdict = answer.and_then(|answer| match &authorizer.speaks {
        Protocol::Http(check) => http::verdict(check, answer),
        Protocol::Grpc => grpc::verdict(&answer),
    });
    let agreed = match verdict {
        Ok(Verdict::Agrees(grant)) => grant_to(ex, authorizer, grant),
        Ok(Verdict::Refuses(refused)) => {
            ex.record.reason = Some(Reason::AuthorizerDenied);
            ex.record.flags.set(Flag::UnauthorizedExternal);
            tracing::debug!(client = %ex.conn.client, policy = %asking.policy, provider = %asking.provider, "authorizer refused");
            return Flow::Answer(answer_of(ex, refused));
        }
        Err(why) => Err(why),
    };
    match agreed {
        Ok(()) => Flow::Continue,
        Err(why) => {
            warn(authorizer, asking, &why);
            if authorizer.fail_open {
                return Flow::Continue;
            }
            ex.record.reason = Some(Reason::NoAuthorizer);
            ex.record.flags.set(Flag::UnauthorizedExternal);
            let status = StatusCode::from_u16(authorizer.status_on_error).unwrap_or(StatusCode::FORBIDDEN);
            Flow::Answer(respond::local(ex, status, "", "ext_authz_error"))
        }
    }
}
/// What is told of having asked, in the words of Envoy's own clients.
fn call(
    authorizer: &Authorizer,
    answer: &Result<Answer, String>,
    (trace, start, took): (trace::Span, SystemTime, Duration),
) -> Call {
    let cluster = format!("outbound|{}||{}", authorizer.port, authorizer.host);
    let grpc = matches!(authorizer.speaks, Protocol::Grpc);
    let name = if grpc {
        "async envoy.service.auth.v3.Authorization.Check egress".to_owned()
    } else {
        format!("async {cluster} egress")
    };
    let status = answer.as_ref().ok().map(|answer| {
        let of_grpc = || grpc_status::<u16>(&answer.trailers).or_else(|| grpc_status(&answer.head.headers));
        match of_grpc().filter(|_| grpc) {
            Some(status) => ("grpc.status_code", status.to_string()),
            None => ("http.status_code", answer.head.status.as_u16().to_string()),
        }
    });
    let failed = answer.as_ref().map_or(true, |answer| answer.head.status.is_server_error());
    Call { trace, name, cluster, start, took, status, failed }
}
/// The answer, if it comes in time.
async fn in_time(
    conn: &Conn,
    snap: &Arc<Snapshot>,
    authorizer: &Authorizer,
    asking: &Asking,
    question: Result<Request<Body>, ::http::Error>,
    draw: u64,
) -> Result<Answer, String> {
    let question = question.map_err(|e| e.to_string())?;
    let sent = send(conn, snap, authorizer, asking, question, draw);
    let answer = tokio::time::timeout(authorizer.timeout, sent).await.map_err(|_| "no answer in time")?;
    answer.map_err(|e| e.to_string())
}

/// What an authorizer adds to the request and to what the client is answered. All of it or nothing.
fn grant_to(ex: &mut Exchange<'_>, authorizer: &Authorizer, grant: Grant) -> Result<(), String> {
    if !authorizer.clear_route_cache && ex.routed.is_none() && !(grant.request.is_empty() && grant.query.is_empty()) {
        // As in Envoy: the route of a request is that of its own headers, unless it is said to be chosen again.
        ex.routed = Some(route::choose(ex));
    }
    if !grant.query.is_empty() {
        let query = http::with_parameters(ex.parts.uri.query().unwrap_or_default(), &grant.query);
        ex.set_query(&query).map_err(|_| "the query it wants is none")?;
    }
    for edit in grant.request {
        edit.apply(&mut ex.parts.headers);
    }
    ex.granted.extend(grant.response);
    Ok(())
}

/// The authorizer's own answer.
fn answer_of(ex: &mut Exchange<'_>, refused: Refused) -> Response<Body> {
    let mut out = match std::str::from_utf8(&refused.body) {
        // What it said becomes the message.
        Ok(text) if ex.grpc => respond::grpc(ex, grpc_of_http(refused.status.as_u16()), text, "ext_authz_denied"),
        _ => respond::local(ex, refused.status, "", "ext_authz_denied"),
    };
    for name in refused.headers.keys().filter(|name| !OF_THE_HOP.contains(name)) {
        if ex.grpc && *name == header::CONTENT_TYPE {
            continue;
        }
        for value in refused.headers.get_all(name) {
            out.headers_mut().append(name.clone(), value.clone());
        }
    }
    if !ex.grpc {
        *out.body_mut() = Body::full(refused.body);
    }
    out
}

/// The answer to a question.
struct Answer {
    head: Parts,
    body: Bytes,
    trailers: HeaderMap,
}
/// Asks, as any other destination is asked: by its own policy, limits and connections. The answer is read whole.
async fn send(
    conn: &Conn,
    snap: &Arc<Snapshot>,
    authorizer: &Authorizer,
    asking: &Asking,
    question: Request<Body>,
    draw: u64,
) -> Result<Answer, UpstreamError> {
    let near = authorizer.namespace.as_deref().unwrap_or(&asking.policy.namespace);
    let service = snap.find_service_by_host(&authorizer.host, near);
    let service = service.filter(|s| authorizer.namespace.as_ref().is_none_or(|ns| s.key.namespace == *ns));
    let service = service.ok_or_else(|| UpstreamError::new(Failure::NoCluster, format!("no service {}", authorizer.host)))?;
    let key = ClusterKey { service: service.key.clone(), port: authorizer.port, subset: None };
    let cluster = conn.shared.upstreams.cluster(snap, &key, conn.role()).await?;
    let guard = cluster.admit()?;
    let host = cluster.pick(&PickContext { draw, hash: None, session: None, tried: &[], before: &[], dst: None, name: None })?;
    let http2 = authorizer.judges_bytes() || matches!(cluster.app_protocol(), AppProtocol::Http2 | AppProtocol::Grpc);
    let sent =
        upstream::send(&cluster, &host, question, SendOptions { http2, guard: Some(&guard), ..SendOptions::default() }).await;
    cluster.report(
        &host,
        match &sent {
            Ok(answer) => Observed::Status(answer.status().as_u16()),
            Err(error) => Observed::Failed(error.failure),
        },
    );
    let (head, body) = sent?.into_parts();
    let body = Limited::new(body, ANSWER).collect().await;
    let body = body.map_err(|error| UpstreamError::new(Failure::Protocol, error.to_string()))?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    Ok(Answer { head, body: body.to_bytes(), trailers })
}

/// What is shown of a body.
struct Shown {
    bytes: Bytes,
    /// Bytes that have arrived.
    seen: usize,
    /// There is more.
    cut: bool,
    limit: BodyLimit,
}
/// The beginning of a body, which stays to be read again.
async fn show(body: &mut Body, limit: BodyLimit) -> Result<Shown, BodyError> {
    let mut seen = BytesMut::new();
    let mut trailers = None;
    while seen.len() <= limit.most {
        match body.frame().await {
            None => break,
            Some(frame) => match frame?.into_data() {
                Ok(data) => seen.extend_from_slice(&data),
                Err(frame) => trailers = Some(frame),
            },
        }
    }
    let seen = seen.freeze();
    let bytes = seen.slice(..seen.len().min(limit.most));
    let (arrived, cut) = (seen.len(), seen.len() > limit.most);
    let rest = std::mem::take(body);
    let begun = Begun { first: Some(seen).filter(|s| !s.is_empty()).map(Frame::data), then: trailers, rest };
    if begun.first.is_some() || begun.then.is_some() {
        *body = Body::Boxed(begun.boxed_unsync());
    }
    Ok(Shown { seen: arrived, bytes, cut, limit })
}
/// A body of which the beginning was read.
struct Begun {
    first: Option<Frame<Bytes>>,
    then: Option<Frame<Bytes>>,
    rest: Body,
}
impl HttpBody for Begun {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(frame) = self.first.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        match self.then.take() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }
    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.then.is_none() && self.rest.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
