//! Last phase: follows the response's body to its end and tells what happened, once.
use crate::body::{Body, BodyError};
use crate::conn::Conn;
use crate::phase::authorize::{self, Kept, Living};
use crate::phase::{Exchange, grpc_status};
use crate::telemetry::{Flag, Record};
use crate::upgrade::{self, Switched};
use crate::upstream::RequestGuard;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Response, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use mesh_hbone::relay::{End, How};
use mesh_model::Reason;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use tokio::time::{Instant, Sleep};

/// Keeps what must live as long as the response: its place among the destination's requests, and the route's time limit.
pub(crate) fn hold(answer: Response<Body>, guard: RequestGuard, deadline: Option<Instant>) -> Response<Body> {
    // What is made here is whole already.
    if matches!(answer.body(), Body::Full(_)) || answer.body().is_end_stream() {
        return answer;
    }
    let sleep = deadline.map(|d| Box::pin(tokio::time::sleep_until(d)));
    answer.map(|inner| Body::Boxed(Held { inner, _guard: guard, sleep }.boxed_unsync()))
}

struct Held {
    inner: Body,
    _guard: RequestGuard,
    sleep: Option<Pin<Box<Sleep>>>,
}
impl HttpBody for Held {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if polled.is_pending()
            && let Some(sleep) = &mut self.sleep
            && sleep.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(BodyError::Gone("the route's timeout passed during the response"))));
        }
        polled
    }
    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Tells about the exchange when the last byte of the answer has been taken, or when it is given up.
pub(crate) fn tell(ex: Exchange<'_>, answer: Response<Body>) -> Response<Body> {
    let bodiless = ex.parts.method == Method::HEAD;
    let Exchange { conn, parts, path, mut record, switched, upgrade, .. } = ex;
    record.heads(parts.headers, &path, parts.uri.query(), Some(answer.headers()));
    let mut told = Told { conn: Arc::clone(conn), record: Some(record) };
    if let Some(switched) = switched {
        tokio::spawn(carried(told, switched, upgrade));
        return answer;
    }
    // Nothing of a body goes to who asked for the head only, so nobody would follow it to its end.
    if bodiless || answer.body().is_end_stream() {
        told.tell(None);
        return if bodiless { headless(answer) } else { answer };
    }
    answer.map(|inner| Body::Boxed(Followed { inner, told, broken: None }.boxed_unsync()))
}

/// Carries what is no longer HTTP until it ends, is no longer allowed, or the drain is over; then tells.
async fn carried(mut told: Told, switched: Switched, kept: Option<Box<Kept>>) {
    let conn = Arc::clone(&told.conn);
    let living = kept.as_deref().map_or(Living::Bytes(&[]), Living::Upgraded);
    let revoked = OnceLock::new();
    let cut = async {
        tokio::select! {
            // Set once: this future ends here.
            details = authorize::revoked(&conn, living) => drop(revoked.set(details)),
            () = conn.drain.expired() => {}
        }
    };
    let half_closed = Some(conn.shared.settings.half_closed_timeout).filter(|t| !t.is_zero());
    let end = upgrade::carry(switched, half_closed, cut).await;
    if let Some(record) = &mut told.record {
        record.received.add_bytes(end.sent);
        record.sent += end.received;
        if let Some(details) = revoked.into_inner() {
            record.reason = Some(Reason::Revoked);
            record.details = details.into();
        }
    }
    told.tell(match end.how {
        How::Closed | How::Cancelled => None,
        How::Reset(End::First) => Some((Flag::DownstreamConnectionTermination, "downstream_remote_disconnect")),
        How::Reset(End::Second) => Some((Flag::UpstreamConnectionTermination, "upstream_remote_disconnect")),
        How::Idle => Some((Flag::StreamIdleTimeout, "idle_timeout")),
    });
}

/// The answer to HEAD: the length a body would have, and none.
fn headless(mut answer: Response<Body>) -> Response<Body> {
    let length = answer.body().size_hint().exact();
    let framed =
        answer.headers().contains_key(header::CONTENT_LENGTH) || answer.headers().contains_key(header::TRANSFER_ENCODING);
    // What came from an upstream says its own length, or has none to say.
    if let (Body::Full(_), Some(length), false) = (answer.body(), length, framed) {
        answer.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    answer.map(|_| Body::Empty)
}

/// An exchange whose answer is not made yet. hyper drops the work on it when the client goes, and has no other way to say so.
pub(crate) struct Unanswered<'c>(Option<Exchange<'c>>);
impl<'c> Unanswered<'c> {
    /// Of an exchange that begins.
    pub(crate) fn new(ex: Exchange<'c>) -> Self {
        ex.conn.activity.begins();
        Self(Some(ex))
    }
    /// The exchange; `None` once it was taken.
    pub(crate) fn get(&mut self) -> Option<&mut Exchange<'c>> {
        self.0.as_mut()
    }
    /// The exchange, which now has an answer.
    pub(crate) fn take(mut self) -> Option<Exchange<'c>> {
        self.0.take()
    }
}
impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let Some(ex) = self.0.take() else { return };
        let conn = ex.conn;
        let (flag, details) = client_gone(ex.parts.version);
        tell_unanswered(ex, flag, details);
        conn.activity.ends();
    }
}

/// Tells about an exchange that gets no answer.
pub(crate) fn tell_unanswered(ex: Exchange<'_>, flag: Flag, details: &'static str) {
    let Exchange { conn, parts, path, mut record, .. } = ex;
    record.flags.set(flag);
    record.details = details.into();
    record.heads(parts.headers, &path, parts.uri.query(), None);
    conn.shared.telemetry.request_done(&conn.facts, &record);
}

/// Flag and details of a client that went: in HTTP/2 it resets the one stream.
pub(crate) fn client_gone(version: Version) -> (Flag, &'static str) {
    if version == Version::HTTP_2 {
        (Flag::DownstreamRemoteReset, "http2.remote_reset")
    } else {
        (Flag::DownstreamConnectionTermination, "downstream_remote_disconnect")
    }
}

/// The record, told once.
struct Told {
    conn: Arc<Conn>,
    record: Option<Record>,
}
impl Told {
    fn tell(&mut self, end: Option<(Flag, &'static str)>) {
        if let Some(mut record) = self.record.take() {
            if let Some((flag, details)) = end {
                record.flags.set(flag);
                record.details = details.into();
            }
            self.conn.shared.telemetry.request_done(&self.conn.facts, &record);
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.conn.activity.ends();
    }
}

struct Followed {
    inner: Body,
    told: Told,
    /// How it broke off, not yet passed on.
    broken: Option<BodyError>,
}
impl HttpBody for Followed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Some(Err(error)));
        }
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Pending => {}
            Poll::Ready(None) => self.told.tell(None),
            Poll::Ready(Some(Err(error))) => {
                self.told.tell(Some(match error {
                    BodyError::Gone(_) => (Flag::UpstreamRequestTimeout, "response_timeout"),
                    // It promised more than it sent, or sent what is no chunk.
                    BodyError::Http(_) if error.is_cut_short() || error.is_malformed() => {
                        (Flag::UpstreamProtocolError, "upstream_reset_after_response_started{protocol_error}")
                    }
                    BodyError::Http(_) => {
                        (Flag::UpstreamConnectionTermination, "upstream_reset_after_response_started{connection_termination}")
                    }
                }));
                // What came before the break leaves first: the server writes when it finds nothing more to take.
                if let Poll::Ready(Some(Err(error))) = polled {
                    self.broken = Some(error);
                    cx.waker().wake_by_ref();
                }
                return Poll::Pending;
            }
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(record) = &mut self.told.record {
                    if let Some(data) = frame.data_ref() {
                        record.sent(data);
                    }
                    if let Some(trailers) = frame.trailers_ref() {
                        if record.grpc {
                            record.grpc_status = grpc_status(trailers).or(record.grpc_status);
                        }
                        record.trailers(trailers);
                    }
                }
                // The server may stop asking once it knows that nothing follows.
                if self.inner.is_end_stream() {
                    self.told.tell(None);
                }
            }
        }
        polled
    }
    fn is_end_stream(&self) -> bool {
        self.broken.is_none() && self.inner.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
impl Drop for Followed {
    fn drop(&mut self) {
        // hyper has no other way to say that the client went before the answer was whole; told already in every other case.
        let version = self.told.record.as_ref().map(|record| record.protocol);
        self.told.tell(version.map(client_gone));
    }
}
