//! Bodies as they pass through: what the client sends, what the upstream answers, what is made here.
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use std::error::Error as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The other side of the connection it is read from failed.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// It was given up here (time limit, buffer limit, shutdown).
    #[error("{0}")]
    Gone(&'static str),
}
impl BodyError {
    /// The bytes are not what HTTP/1 wants there (a chunk size that is no number), as against a connection that broke.
    pub fn is_malformed(&self) -> bool {
        let Self::Http(error) = self else { return false };
        let io = error.source().and_then(|cause| cause.downcast_ref::<std::io::Error>());
        io.is_some_and(|io| matches!(io.kind(), std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData))
    }
    /// The sender ended before the end it had announced.
    pub fn is_cut_short(&self) -> bool {
        let Self::Http(error) = self else { return false };
        let io = error.source().and_then(|cause| cause.downcast_ref::<std::io::Error>());
        error.is_incomplete_message() || io.is_some_and(|io| io.kind() == std::io::ErrorKind::UnexpectedEof)
    }
}

/// A body of either direction. The common cases hold no allocation of their own.
#[derive(Debug, Default)]
pub enum Body {
    /// Nothing.
    #[default]
    Empty,
    /// Bytes made here.
    Full(Option<Bytes>),
    /// Straight from the other connection; backpressure is the connection's.
    Incoming(Incoming),
    /// Anything else (replayed, followed to its end).
    Boxed(UnsyncBoxBody<Bytes, BodyError>),
}
impl Body {
    /// Bytes made here; nothing when there are none.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        if bytes.is_empty() { Self::Empty } else { Self::Full(Some(bytes)) }
    }
}
impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Incoming(body) => Poll::Ready(ready!(Pin::new(body).poll_frame(cx)).map(|f| f.map_err(BodyError::from))),
            Self::Boxed(body) => Pin::new(body).poll_frame(cx),
        }
    }
    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_none(),
            Self::Incoming(body) => body.is_end_stream(),
            Self::Boxed(body) => body.is_end_stream(),
        }
    }
    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Incoming(body) => body.size_hint(),
            Self::Boxed(body) => body.size_hint(),
        }
    }
}
