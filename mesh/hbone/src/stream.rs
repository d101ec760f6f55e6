//! One CONNECT stream: poll based, `Bytes` in and out, flow control in the caller's hand.
//!
//! Owns the two halves of an h2 stream and the slot it occupies in its tunnel. It refuses to give receive credit by itself:
//! [`HboneStream::release`] is called when the bytes have left for the other side, which is what makes backpressure reach
//! the sender. End of stream and reset are never confused: the first is `None`, the second an error.
//! Upstream: `client` and `server`. Downstream: `relay`, or [`HboneIo`] for TLS inside a stream.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tunnel::StreamSlot;

/// Why a stream ended other than by end of stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// RST_STREAM with this HTTP/2 error code, sent by the peer.
    #[error("stream reset by peer ({0:?})")]
    Reset(h2::Reason),
    /// The whole tunnel ended: GOAWAY with an error, I/O error, keepalive timeout, revocation.
    #[error("tunnel lost: {0}")]
    Tunnel(String),
    /// The stream was used after its end; a defect of the caller.
    #[error("stream already ended")]
    Ended,
}

impl StreamError {
    fn from_h2(error: &h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Tunnel(error.to_string()),
        }
    }
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        let kind = match error {
            StreamError::Reset(_) => io::ErrorKind::ConnectionReset,
            StreamError::Tunnel(_) => io::ErrorKind::ConnectionAborted,
            StreamError::Ended => io::ErrorKind::BrokenPipe,
        };
        Self::new(kind, error)
    }
}

/// Codes a stream is reset with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetCode {
    /// We no longer want it: cancelled, revoked, idle.
    Cancel,
    /// The TCP connection behind it failed (RFC 9113 §8.5).
    ConnectError,
}

impl ResetCode {
    fn reason(self) -> h2::Reason {
        match self {
            Self::Cancel => h2::Reason::CANCEL,
            Self::ConnectError => h2::Reason::CONNECT_ERROR,
        }
    }
}

/// An open CONNECT stream. Dropping it before both directions ended resets it (CANCEL).
pub struct HboneStream {
    send: h2::SendStream<Bytes>,
    recv: h2::RecvStream,
    slot: StreamSlot,
    send_ended: bool,
    recv_ended: bool,
    /// Given back by [`Self::unread`], to be received again. Boxed: few streams ever have any.
    unread: Option<Box<Bytes>>,
}

impl HboneStream {
    pub(crate) fn new(send: h2::SendStream<Bytes>, recv: h2::RecvStream, slot: StreamSlot) -> Self {
        Self { send, recv, slot, send_ended: false, recv_ended: false, unread: None }
    }

    /// The next bytes from the peer; `None` is end of stream. The bytes count against the receive window until
    /// [`Self::release`] is called for them.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, StreamError>>> {
        if let Some(unread) = self.unread.take() {
            return Poll::Ready(Some(Ok(*unread)));
        }
        loop {
            if self.recv_ended {
                return Poll::Ready(None);
            }
            return match ready!(self.recv.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => continue,
                Some(Ok(data)) => Poll::Ready(Some(Ok(data))),
                Some(Err(error)) => Poll::Ready(Some(Err(StreamError::from_h2(&error)))),
                None => {
                    self.recv_ended = true;
                    Poll::Ready(None)
                }
            };
        }
    }

    /// Gives bytes back that were received and not [`Self::release`]d, so that whoever reads next gets them again: what
    /// protocol detection looked at.
    pub fn unread(&mut self, bytes: Bytes) {
        self.unread = (!bytes.is_empty()).then(|| Box::new(bytes));
    }

    /// Whether end of stream is already known, so that the last bytes can be passed on together with it.
    pub fn recv_is_at_end(&self) -> bool {
        self.unread.is_none() && (self.recv_ended || self.recv.is_end_stream())
    }

    /// Gives back receive window for `bytes` that were consumed.
    pub fn release(&mut self, bytes: usize) {
        // Fails only for more than was received, which the caller's accounting excludes; then nothing is released.
        let _ = self.recv.flow_control().release_capacity(bytes);
        self.slot.released(bytes);
    }

    /// Bytes received that were not released yet, those still queued inside the tunnel included.
    pub fn unreleased(&mut self) -> usize {
        self.recv.flow_control().used_capacity()
    }

    /// Tells the tunnel that this stream's reader has stopped reading while a grown window is outstanding.
    pub(crate) fn note_stalled(&mut self) {
        if self.unreleased() > self.slot.base_window() {
            self.slot.stalled();
        }
    }

    /// Waits until something may be sent and says how much, asking for up to `want` bytes of window. Credit that is not
    /// used must be given back with [`Self::give_back`], or it is missing for the other streams of the tunnel.
    pub fn poll_capacity(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Result<usize, StreamError>> {
        if self.send_ended {
            return Poll::Ready(Err(StreamError::Ended));
        }
        self.send.reserve_capacity(want);
        loop {
            let room = self.send.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room.min(want)));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(StreamError::from_h2(&error))),
                None => return self.poll_send_closed(cx),
            }
        }
    }

    /// Returns reserved but unused send window to the tunnel.
    pub fn give_back(&mut self) {
        self.send.reserve_capacity(0);
    }

    /// Queues `data` (at most what [`Self::poll_capacity`] granted), with end of stream when `end`.
    pub fn send(&mut self, data: Bytes, end: bool) -> Result<(), StreamError> {
        if self.send_ended {
            return Err(StreamError::Ended);
        }
        self.send_ended = end;
        self.send.send_data(data, end).map_err(|error| StreamError::from_h2(&error))
    }

    /// Ends our direction (END_STREAM). Nothing to do when it already ended.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        if self.send_ended { Ok(()) } else { self.send(Bytes::new(), true) }
    }

    /// Sends RST_STREAM; both directions are over.
    pub fn reset(&mut self, code: ResetCode) {
        self.send_ended = true;
        self.send.send_reset(code.reason());
    }

    /// Resolves when the peer resets the stream or the tunnel is lost.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        self.send.poll_reset(cx).map(|result| match result {
            Ok(reason) => StreamError::Reset(reason),
            Err(error) => StreamError::from_h2(&error),
        })
    }

    /// The stream id, for logs.
    pub fn id(&self) -> u32 {
        self.send.stream_id().as_u32()
    }

    /// As `AsyncRead + AsyncWrite`.
    pub fn into_io(self) -> HboneIo {
        HboneIo { stream: self, unread: Bytes::new() }
    }

    /// h2 closed the sending half: by reset, or because the tunnel went.
    fn poll_send_closed(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, StreamError>> {
        match self.poll_reset(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => Poll::Ready(Err(StreamError::Ended)),
        }
    }
}

impl fmt::Debug for HboneStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HboneStream")
            .field("id", &self.id())
            .field("send_ended", &self.send_ended)
            .field("recv_ended", &self.recv_ended)
            .finish_non_exhaustive()
    }
}

/// A stream as byte stream, for TLS inside it (double HBONE).
///
/// Receive window is given back when the bytes are handed to the reader; what a reader asks for it is assumed to keep.
#[derive(Debug)]
pub struct HboneIo {
    stream: HboneStream,
    unread: Bytes,
}

/// Most one `poll_write` copies into the tunnel.
const IO_WRITE_CHUNK: usize = 64 << 10;

impl AsyncRead for HboneIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut filled = 0;
        while buf.remaining() > 0 {
            if self.unread.is_empty() {
                match self.stream.poll_recv(cx) {
                    Poll::Ready(Some(Ok(data))) => self.unread = data,
                    Poll::Ready(Some(Err(error))) if filled == 0 => return Poll::Ready(Err(error.into())),
                    Poll::Pending if filled == 0 => return Poll::Pending,
                    // End, error and emptiness are all seen again by the next read.
                    _ => break,
                }
            }
            let n = self.unread.len().min(buf.remaining());
            if let Some(part) = self.unread.get(..n) {
                buf.put_slice(part);
            }
            self.unread.advance(n);
            filled += n;
        }
        if filled > 0 {
            self.stream.release(filled);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.stream.poll_capacity(cx, buf.len().min(IO_WRITE_CHUNK)))?;
        let part = buf.get(..room.min(buf.len())).unwrap_or_default();
        self.stream.send(Bytes::copy_from_slice(part), false)?;
        self.stream.give_back();
        Poll::Ready(Ok(part.len()))
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.stream.poll_capacity(cx, total.min(IO_WRITE_CHUNK)))?;
        let mut chunk = Vec::with_capacity(room.min(total));
        for buf in bufs {
            let part = buf.len().min(room - chunk.len());
            chunk.extend_from_slice(buf.get(..part).unwrap_or_default());
            if chunk.len() == room {
                break;
            }
        }
        let written = chunk.len();
        self.stream.send(chunk.into(), false)?;
        self.stream.give_back();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The tunnel's driver writes what is queued; there is nothing to push from here.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.finish().map_err(Into::into))
    }
}
