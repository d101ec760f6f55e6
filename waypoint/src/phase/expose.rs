//! Last phase: follows the response's body to its end and tells what happened, once.
use crate::body::{Body, BodyError};
use crate::conn::Conn;
use crate::phase::{Exchange, grpc_status};
use crate::telemetry::{Flag, Record};
use crate::upstream::RequestGuard;
use bytes::Bytes;
use http::Response;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::{Instant, Sleep};

/// Keeps what must live as long as the response: its place among the destination's requests, and the route's time limit.
pub(crate) fn hold(answer: Response<Body>, guard: RequestGuard, deadline: Option<Instant>) -> Response<Body> {
    if answer.body().is_end_stream() {
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
    let Exchange { conn, record, .. } = ex;
    let mut told = Told { conn: Arc::clone(conn), record: Some(record) };
    if answer.body().is_end_stream() {
        told.tell(None);
        return answer;
    }
    answer.map(|inner| Body::Boxed(Followed { inner, told }.boxed_unsync()))
}

/// The record, told once.
struct Told {
    conn: Arc<Conn>,
    record: Option<Record>,
}
impl Told {
    fn tell(&mut self, flag: Option<Flag>) {
        if let Some(mut record) = self.record.take() {
            if let Some(flag) = flag {
                record.flags.set(flag);
            }
            self.conn.shared.telemetry.request_done(&self.conn.facts, &record);
        }
    }
}

struct Followed {
    inner: Body,
    told: Told,
}
impl HttpBody for Followed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Pending => {}
            Poll::Ready(None) => self.told.tell(None),
            Poll::Ready(Some(Err(error))) => {
                let flag = match error {
                    BodyError::Gone(_) => Flag::UpstreamRequestTimeout,
                    BodyError::Http(_) => Flag::UpstreamConnectionTermination,
                };
                self.told.tell(Some(flag));
            }
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(record) = &mut self.told.record {
                    if let Some(data) = frame.data_ref() {
                        record.sent(data);
                    }
                    if let Some(trailers) = frame.trailers_ref().filter(|_| record.grpc) {
                        let status = grpc_status(trailers);
                        record.grpc_status = status.or(record.grpc_status);
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
        self.inner.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
impl Drop for Followed {
    fn drop(&mut self) {
        // hyper has no other way to say that the client went before the answer was whole; told already in every other case.
        self.told.tell(Some(Flag::DownstreamConnectionTermination));
    }
}
