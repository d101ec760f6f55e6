//! Any byte stream as an end of a relay: TLS over TCP, for what a proxy terminates or originates itself.
use super::{Endpoint, Fault, Fill, PIECES, PROBE, Queue, fault};
use bytes::{Bytes, BytesMut};
use std::io::IoSlice;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

/// A byte stream that buffers what is written (TLS records): flushed whenever the relay runs.
#[derive(Debug)]
pub struct Bytewise<S> {
    stream: S,
    unflushed: bool,
}
impl<S> Bytewise<S> {
    /// Takes the stream.
    pub fn new(stream: S) -> Self {
        Self { stream, unflushed: false }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Endpoint for Bytewise<S> {
    const PEEKS: bool = false;

    fn poll_readable(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, room: usize, _: &mut bool, queue: &mut Queue) -> Poll<Result<Fill, Fault>> {
        let mut buf = BytesMut::with_capacity(room.clamp(1, PROBE));
        // `read_buf` keeps no state between polls.
        let read = ready!(pin!(self.stream.read_buf(&mut buf)).poll(cx)).map_err(|error| fault(&error))?;
        if read == 0 {
            return Poll::Ready(Ok(Fill::End));
        }
        // A mostly empty buffer must not live as long as its few bytes.
        queue.push(if buf.len() < PROBE / 2 { Bytes::copy_from_slice(&buf) } else { buf.freeze() });
        Poll::Ready(Ok(Fill::Data))
    }

    fn consumed(&mut self, _: usize) {}

    fn poll_room(&mut self, _: &mut Context<'_>) -> Poll<Result<usize, Fault>> {
        Poll::Ready(Ok(super::super::queue::MAX))
    }

    fn give_back(&mut self) {}

    fn poll_push(&mut self, cx: &mut Context<'_>, queue: &mut Queue, _: bool) -> Poll<Result<usize, Fault>> {
        let mut slices = [IoSlice::new(&[]); PIECES];
        let used = queue.slices(&mut slices);
        let slices = slices.get(..used).unwrap_or_default();
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices)).map_err(|error| fault(&error))?;
        if written == 0 {
            return Poll::Ready(Err(Fault::Reset));
        }
        self.unflushed = true;
        queue.advance(written);
        Poll::Ready(Ok(written))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Pin::new(&mut self.stream).poll_shutdown(cx).map_err(|error| fault(&error))
    }

    fn reset(&mut self, _: bool) {
        // Dropping without `close_notify`: the peer's TLS takes it for the truncation it is.
        self.unflushed = false;
    }

    fn poll_fault(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        // The relay asks after every turn: the place to push out what TLS still holds.
        if self.unflushed {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => return Poll::Ready(fault(&error)),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    fn check(&mut self) -> Option<Fault> {
        None
    }

    fn stalled(&mut self) {}
}
