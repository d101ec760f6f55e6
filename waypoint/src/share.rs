//! What the answers on one HTTP/2 connection hold together of bytes that its client does not take.
//!
//! hyper and h2 bound each stream by itself, which says nothing of a client that opens a thousand and reads none. Here every piece
//! of an answer is counted from when the connection takes it until it is written or given up, and a stream that still holds
//! something gets more only while the whole connection holds less than [`TOGETHER`]. A stream that holds nothing always gets its
//! next piece: so they may be read in any order, and none waits for another one. Upstream: `http`. Downstream: the body of the
//! exchange.
use crate::body::{Body, BodyError};
use bytes::{Buf, Bytes};
use futures_util::task::AtomicWaker;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

/// Bytes from which on each stream of a connection holds one piece (of at most 16 KiB where it is read from an endpoint) and no more.
/// Five streams at full speed stay below it.
pub(crate) const TOGETHER: usize = 256 << 10;

/// What a connection holds, in bytes.
pub(crate) type Total = Arc<AtomicUsize>;

/// The part of one stream.
#[derive(Debug)]
struct Share {
    total: Total,
    own: AtomicUsize,
    /// Woken when it holds nothing any more.
    stream: AtomicWaker,
}
impl Share {
    fn take(&self, bytes: usize) {
        self.total.fetch_add(bytes, Relaxed);
        self.own.fetch_add(bytes, Relaxed);
    }
    fn give_back(&self, bytes: usize) {
        self.total.fetch_sub(bytes, Relaxed);
        if self.own.fetch_sub(bytes, Relaxed) == bytes {
            self.stream.wake();
        }
    }
    fn has_room(&self) -> bool {
        self.own.load(Relaxed) == 0 || self.total.load(Relaxed) < TOGETHER
    }
    fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        if self.has_room() {
            return Poll::Ready(());
        }
        self.stream.register(cx.waker());
        // Between the look and the registration the last of it may have left.
        if self.has_room() { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// Bytes of an answer on their way out, counted for as long as they are here.
#[derive(Debug)]
pub(crate) struct Piece {
    bytes: Bytes,
    /// None where it is all of its answer.
    share: Option<Arc<Share>>,
}
impl Piece {
    fn left(&self, bytes: usize) {
        if let Some(share) = self.share.as_ref().filter(|_| bytes > 0) {
            share.give_back(bytes);
        }
    }
}
impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }
    fn chunk(&self) -> &[u8] {
        &self.bytes
    }
    fn chunks_vectored<'a>(&'a self, to: &mut [IoSlice<'a>]) -> usize {
        self.bytes.chunks_vectored(to)
    }
    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        self.left(count);
    }
}
impl Drop for Piece {
    fn drop(&mut self) {
        self.left(self.bytes.len());
    }
}

/// An answer on a connection whose answers are counted.
#[derive(Debug)]
pub(crate) struct Counted {
    inner: Body,
    total: Total,
    /// Made when its first piece is not all of it.
    share: Option<Arc<Share>>,
}
impl Counted {
    /// Of a connection that holds `total`.
    pub fn new(inner: Body, total: &Total) -> Self {
        Self { inner, total: Arc::clone(total), share: None }
    }
    fn piece(&mut self, bytes: Bytes) -> Piece {
        if bytes.is_empty() || self.share.is_none() && self.inner.is_end_stream() {
            return Piece { bytes, share: None };
        }
        let new = || Arc::new(Share { total: Arc::clone(&self.total), own: AtomicUsize::new(0), stream: AtomicWaker::new() });
        let share = self.share.get_or_insert_with(new);
        share.take(bytes.len());
        Piece { bytes, share: Some(Arc::clone(share)) }
    }
}
impl HttpBody for Counted {
    type Data = Piece;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece>, BodyError>>> {
        if let Some(share) = &self.share {
            ready!(share.poll_room(cx));
        }
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(|bytes| self.piece(bytes)))))
    }
    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests;
