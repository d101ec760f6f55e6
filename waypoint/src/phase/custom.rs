//! CUSTOM policies: whom they name is asked before anything else is judged (Istio's ext_authz, by HTTP).
//!
//! Owns the question and what its answer means. Nobody who knows the name, no answer, or one of the 5xx: refused, unless the
//! authorizer is said to fail open. Upstream: `exchange`. Downstream: `authorize`, which knows what is asked; `upstream`.
use crate::body::{Body, BodyError};
use crate::phase::authorize::{self, Asking};
use crate::phase::{Exchange, Flow, respond};
use crate::telemetry::Flag;
use crate::upstream::{self, Failure, Observed, PickContext, SendOptions, UpstreamError};
use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt as _, Limited};
use mesh_model::l7::authorizer::{Authorizer, BodyLimit, names};
use mesh_model::l7::route::ClusterKey;
use mesh_model::lb::redraw;
use mesh_model::service::AppProtocol;
use mesh_model::{Reason, Refusal, Snapshot};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

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

/// Asks every authorizer that a policy names for this request; the first that does not agree answers.
pub(crate) async fn check(ex: &mut Exchange<'_>) -> Flow {
    for asking in authorize::custom(ex) {
        let snap = Arc::clone(&ex.snap);
        let flow = match snap.find_authorizer(&asking.provider) {
            Some(Ok(authorizer)) => ask(ex, &snap, authorizer, &asking).await,
            Some(Err(why)) => unknown(ex, &asking, why),
            None => unknown(ex, &asking, "MeshConfig has no extensionProvider of this name"),
        };
        if matches!(flow, Flow::Answer(_)) {
            return flow;
        }
    }
    Flow::Continue
}

/// Nobody can be asked: refused as by the policy itself.
fn unknown(ex: &mut Exchange<'_>, asking: &Asking, why: &str) -> Flow {
    let why = Refusal::new(Reason::NoAuthorizer, format!("{} asks {}: {why}", asking.policy, asking.provider));
    tracing::debug!(client = %ex.conn.client, %why, "request refused");
    ex.record.reason = Some(why.reason);
    Flow::Answer(respond::local(ex, StatusCode::FORBIDDEN, authorize::TEXT, asking.details.clone()))
}

async fn ask(ex: &mut Exchange<'_>, snap: &Arc<Snapshot>, authorizer: &Authorizer, asking: &Asking) -> Flow {
    let shown = match authorizer.body {
        None => Bytes::new(),
        Some(limit) => match show(&mut ex.body, limit).await {
            Ok(Some(shown)) => shown,
            Ok(None) => {
                let too_large = StatusCode::PAYLOAD_TOO_LARGE;
                return Flow::Answer(respond::local(ex, too_large, "Payload Too Large", "request_payload_too_large"));
            }
            Err(error) => return no_answer(ex, authorizer, asking, &error.to_string()),
        },
    };
    let question = match question(ex, authorizer, shown) {
        Ok(question) => question,
        Err(error) => return no_answer(ex, authorizer, asking, &error.to_string()),
    };
    let draw = redraw(ex.draw, DRAW_AUTHORIZER);
    let sent =
        send(Arc::clone(&ex.conn.shared.upstreams), Arc::clone(snap), authorizer, &asking.policy.namespace, question, draw);
    let answer = match tokio::time::timeout(authorizer.timeout, sent).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return no_answer(ex, authorizer, asking, &error.to_string()),
        Err(_) => return no_answer(ex, authorizer, asking, "no answer in time"),
    };
    match answer.status() {
        StatusCode::OK => {
            agreed(ex, authorizer, answer.headers());
            Flow::Continue
        }
        status if status.is_server_error() => no_answer(ex, authorizer, asking, status.as_str()),
        _ => {
            ex.record.reason = Some(Reason::AuthorizerDenied);
            ex.record.flags.set(Flag::UnauthorizedExternal);
            tracing::debug!(client = %ex.conn.client, policy = %asking.policy, provider = %asking.provider, "authorizer refused");
            Flow::Answer(refused(ex, authorizer, answer))
        }
    }
}

/// The authorizer does not answer, or not with an answer.
fn no_answer(ex: &mut Exchange<'_>, authorizer: &Authorizer, asking: &Asking, why: &str) -> Flow {
    let open = authorizer.fail_open;
    tracing::warn!(policy = %asking.policy, provider = %asking.provider, why, open, "no answer from an external authorizer");
    if open {
        return Flow::Continue;
    }
    ex.record.reason = Some(Reason::NoAuthorizer);
    ex.record.flags.set(Flag::UnauthorizedExternal);
    let status = StatusCode::from_u16(authorizer.status_on_error).unwrap_or(StatusCode::FORBIDDEN);
    Flow::Answer(respond::local(ex, status, "", "ext_authz_error"))
}

/// The request without what the authorizer is not to see.
fn question(ex: &Exchange<'_>, authorizer: &Authorizer, body: Bytes) -> Result<Request<Body>, http::Error> {
    let query = ex.parts.uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    let target = format!("{}{}{query}", authorizer.path_prefix, ex.path);
    let mut question = Request::builder().method(ex.parts.method.clone()).uri(target).body(Body::full(body))?;
    let headers = question.headers_mut();
    for (name, value) in &ex.parts.headers {
        let shown = *name == header::AUTHORIZATION || names(&authorizer.asked_with, name);
        if shown && !OF_THE_HOP.contains(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    for (name, value) in &authorizer.always {
        headers.insert(name.clone(), value.clone());
    }
    headers.insert(header::HOST, HeaderValue::try_from(&ex.authority)?);
    Ok(question)
}

/// Asks, as any other destination is asked: by its own policy, limits and connections. The answer is read whole.
async fn send(
    upstreams: Arc<upstream::Upstreams>,
    snap: Arc<Snapshot>,
    authorizer: &Authorizer,
    namespace: &str,
    question: Request<Body>,
    draw: u64,
) -> Result<Response<Bytes>, UpstreamError> {
    let near = authorizer.namespace.as_deref().unwrap_or(namespace);
    let service = snap.find_service_by_host(&authorizer.host, near);
    let service = service.filter(|s| authorizer.namespace.as_ref().is_none_or(|ns| s.key.namespace == *ns));
    let service = service.ok_or_else(|| UpstreamError::new(Failure::NoCluster, format!("no service {}", authorizer.host)))?;
    let key = ClusterKey { service: service.key.clone(), port: authorizer.port, subset: None };
    let cluster = upstreams.cluster(&snap, &key)?;
    let guard = cluster.admit()?;
    let host = cluster.pick(&PickContext { draw, hash: None, tried: &[], dst: None })?;
    let http2 = matches!(cluster.app_protocol(), AppProtocol::Http2 | AppProtocol::Grpc);
    let sent =
        upstream::send(&cluster, &host, question, SendOptions { http2, upgrade: false, client: None, guard: Some(&guard) }).await;
    cluster.report(
        &host,
        match &sent {
            Ok(answer) => Observed::Status(answer.status().as_u16()),
            Err(error) => Observed::Failed(error.failure),
        },
    );
    let (parts, body) = sent?.into_parts();
    let body = Limited::new(body, ANSWER).collect().await;
    let body = body.map_err(|error| UpstreamError::new(Failure::Protocol, error.to_string()))?;
    Ok(Response::from_parts(parts, body.to_bytes()))
}

/// What the authorizer adds to the request and to what the client is answered.
fn agreed(ex: &mut Exchange<'_>, authorizer: &Authorizer, answer: &HeaderMap) {
    for name in answer.keys().filter(|name| !OF_THE_HOP.contains(name)) {
        if names(&authorizer.to_upstream, name) {
            ex.parts.headers.remove(name);
            for value in answer.get_all(name) {
                ex.parts.headers.append(name.clone(), value.clone());
            }
        }
        if names(&authorizer.to_client, name) {
            for value in answer.get_all(name) {
                ex.granted.get_or_insert_default().append(name.clone(), value.clone());
            }
        }
    }
}

/// The authorizer's own answer, as far as it is for the client.
fn refused(ex: &mut Exchange<'_>, authorizer: &Authorizer, answer: Response<Bytes>) -> Response<Body> {
    let (parts, body) = answer.into_parts();
    let mut out = respond::local(ex, parts.status, "", "ext_authz_denied");
    let always = |name: &HeaderName| *name == header::WWW_AUTHENTICATE || *name == header::LOCATION;
    for (name, value) in &parts.headers {
        let shown = authorizer.to_refused.as_ref().is_none_or(|patterns| names(patterns, name) || always(name));
        if shown && !OF_THE_HOP.contains(name) && !(ex.grpc && *name == header::CONTENT_TYPE) {
            out.headers_mut().append(name.clone(), value.clone());
        }
    }
    if !ex.grpc {
        *out.body_mut() = Body::full(body);
    }
    out
}

/// The beginning of a body, which stays to be read again; `None`: it is larger than what may be shown.
async fn show(body: &mut Body, limit: BodyLimit) -> Result<Option<Bytes>, BodyError> {
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
    let fits = seen.len() <= limit.most;
    let shown = seen.slice(..seen.len().min(limit.most));
    let rest = std::mem::take(body);
    let begun = Begun { first: Some(seen).filter(|s| !s.is_empty()).map(Frame::data), then: trailers, rest };
    if begun.first.is_some() || begun.then.is_some() {
        *body = Body::Boxed(begun.boxed_unsync());
    }
    Ok((fits || limit.partial).then_some(shown))
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
mod tests {
    use super::*;

    async fn shown(sent: &'static str, most: usize, partial: bool) -> (Option<Bytes>, Bytes) {
        let mut body = Body::full(sent);
        let shown = show(&mut body, BodyLimit { most, partial }).await.expect("no error");
        (shown, body.collect().await.expect("the whole").to_bytes())
    }

    #[tokio::test]
    async fn a_body_that_was_shown_is_sent_whole() {
        for (most, partial, want) in
            [(8, false, Some("abcdef")), (6, false, Some("abcdef")), (5, true, Some("abcde")), (5, false, None)]
        {
            let (seen, whole) = shown("abcdef", most, partial).await;
            assert_eq!(seen.as_deref(), want.map(str::as_bytes), "{most} {partial}");
            assert_eq!(whole, "abcdef", "{most} {partial}");
        }
        assert_eq!(shown("", 5, false).await, (Some(Bytes::new()), Bytes::new()));
    }
}
