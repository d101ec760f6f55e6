//! The kinds of end a relay knows: a TCP socket, a CONNECT stream, and any other byte stream.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

mod bytewise;
pub use bytewise::Bytewise;

use super::queue::{PIECES, Queue};
use crate::stream::{HboneStream, ResetCode, StreamError};

/// What a source gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Bytes were queued.
    Data,
    /// End of stream.
    End,
}

/// How an end failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Reset or lost.
    Reset,
    /// It takes no more bytes, and that is no error (RST_STREAM NO_ERROR after a complete answer, RFC 9113 §8.1).
    NotListening,
}

/// One end of a relay. The crate's own ends implement it; the methods are the relay's business.
pub trait Endpoint: Unpin {
    /// Whether [`Self::poll_readable`] can tell that there is something to read without reading it.
    const PEEKS: bool;
    /// Ready when a read may succeed.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// Reads about `room` bytes into `queue`. `bulk` is this direction's memory of how full the last reads were.
    fn poll_fill(&mut self, cx: &mut Context<'_>, room: usize, bulk: &mut bool, queue: &mut Queue) -> Poll<Result<Fill, Fault>>;
    /// `bytes` read from this end have left for the other.
    fn consumed(&mut self, bytes: usize);
    /// How much may be written.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Fault>>;
    /// The room is not needed after all.
    fn give_back(&mut self);
    /// Writes from `queue`; `end` says that nothing will follow what is queued.
    fn poll_push(&mut self, cx: &mut Context<'_>, queue: &mut Queue, end: bool) -> Poll<Result<usize, Fault>>;
    /// Ends the direction towards this end.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>>;
    /// Resets this end. `other_failed`: because the other end did.
    fn reset(&mut self, other_failed: bool);
    /// Registers for a reset of this end.
    fn poll_fault(&mut self, cx: &mut Context<'_>) -> Poll<Fault>;
    /// Asks for a reset that no event would tell.
    fn check(&mut self) -> Option<Fault>;
    /// What was read from this end is not being taken.
    fn stalled(&mut self);
}

/// The shared first buffer: what interactive traffic fits into.
const PROBE: usize = 16 << 10;
/// What bulk reads go into, and so the DATA frames bulk traffic makes. 256 KiB measured no faster over loopback, and every
/// frame is held whole by the receiving codec.
const BULK: usize = 64 << 10;

thread_local! {
    // One per data thread: reads are synchronous, so a buffer is needed only for the duration of a call.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; PROBE].into_boxed_slice());
}

impl Endpoint for TcpStream {
    const PEEKS: bool = true;

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // An error shows again at the read.
        self.poll_read_ready(cx).map(|_| ())
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, room: usize, bulk: &mut bool, queue: &mut Queue) -> Poll<Result<Fill, Fault>> {
        if !*bulk {
            return SCRATCH.with_borrow_mut(|scratch| {
                let size = room.min(scratch.len());
                let mut buf = ReadBuf::new(scratch.get_mut(..size).unwrap_or_default());
                ready!(Pin::new(&mut *self).poll_read(cx, &mut buf)).map_err(|error| fault(&error))?;
                let data = buf.filled();
                if data.is_empty() {
                    return Poll::Ready(Ok(Fill::End));
                }
                *bulk = data.len() == PROBE;
                queue.push(Bytes::copy_from_slice(data));
                Poll::Ready(Ok(Fill::Data))
            });
        }
        let mut buf = BytesMut::with_capacity(room.min(BULK));
        let mut end = false;
        while buf.len() < buf.capacity() {
            // `read_buf` keeps no state between polls.
            match pin!(self.read_buf(&mut buf)).poll(cx) {
                Poll::Ready(Ok(0)) => {
                    end = true;
                    break;
                }
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) if buf.is_empty() => return Poll::Ready(Err(fault(&error))),
                // The error shows again at the next read.
                Poll::Ready(Err(_)) => break,
                Poll::Pending => break,
            }
        }
        if buf.is_empty() {
            return if end { Poll::Ready(Ok(Fill::End)) } else { Poll::Pending };
        }
        if buf.len() < PROBE {
            // A mostly empty large buffer must not live as long as its few bytes.
            *bulk = false;
            queue.push(Bytes::copy_from_slice(&buf));
        } else {
            queue.push(buf.freeze());
        }
        Poll::Ready(Ok(Fill::Data))
    }

    fn consumed(&mut self, _: usize) {}

    fn poll_room(&mut self, _: &mut Context<'_>) -> Poll<Result<usize, Fault>> {
        Poll::Ready(Ok(super::queue::MAX))
    }

    fn give_back(&mut self) {}

    fn poll_push(&mut self, cx: &mut Context<'_>, queue: &mut Queue, _: bool) -> Poll<Result<usize, Fault>> {
        let mut slices = [IoSlice::new(&[]); PIECES];
        let used = queue.slices(&mut slices);
        let slices = slices.get(..used).unwrap_or_default();
        let written = match slices {
            [one] => ready!(Pin::new(&mut *self).poll_write(cx, one)),
            many => ready!(Pin::new(&mut *self).poll_write_vectored(cx, many)),
        };
        match written {
            Ok(0) => Poll::Ready(Err(Fault::Reset)),
            Ok(bytes) => {
                queue.advance(bytes);
                Poll::Ready(Ok(bytes))
            }
            Err(error) => Poll::Ready(Err(fault(&error))),
        }
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Pin::new(self).poll_shutdown(cx).map_err(|error| fault(&error))
    }

    fn reset(&mut self, _: bool) {
        // Close then sends RST instead of FIN: the application must not take a broken connection for a finished one.
        // Fails only on a socket that is already dead.
        let _ = self.set_zero_linger();
    }

    fn poll_fault(&mut self, _: &mut Context<'_>) -> Poll<Fault> {
        // Reading or writing tells; while neither is tried `check` does.
        Poll::Pending
    }

    fn check(&mut self) -> Option<Fault> {
        matches!(self.take_error(), Ok(Some(_)) | Err(_)).then_some(Fault::Reset)
    }

    fn stalled(&mut self) {}
}

/// Every socket error means that the connection is gone.
fn fault(_: &io::Error) -> Fault {
    Fault::Reset
}

impl Endpoint for HboneStream {
    const PEEKS: bool = false;

    fn poll_readable(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, _: usize, _: &mut bool, queue: &mut Queue) -> Poll<Result<Fill, Fault>> {
        Poll::Ready(match ready!(self.poll_recv(cx)) {
            Some(Ok(data)) => {
                queue.push(data);
                Ok(Fill::Data)
            }
            Some(Err(_)) => Err(Fault::Reset),
            None => Ok(Fill::End),
        })
    }

    fn consumed(&mut self, bytes: usize) {
        self.release(bytes);
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, Fault>> {
        self.poll_capacity(cx, BULK).map_err(|error| stream_fault(&error))
    }

    fn give_back(&mut self) {
        Self::give_back(self);
    }

    fn poll_push(&mut self, cx: &mut Context<'_>, queue: &mut Queue, end: bool) -> Poll<Result<usize, Fault>> {
        let want = queue.len().min(super::queue::MAX);
        let room = ready!(self.poll_capacity(cx, want)).map_err(|error| stream_fault(&error))?;
        let mut pushed = 0;
        while pushed < room && !queue.is_empty() {
            let piece = queue.pop(room - pushed);
            pushed += piece.len();
            self.send(piece, end && queue.is_empty()).map_err(|error| stream_fault(&error))?;
        }
        Poll::Ready(Ok(pushed))
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(self.finish().map_err(|error| stream_fault(&error)))
    }

    fn reset(&mut self, other_failed: bool) {
        Self::reset(self, if other_failed { ResetCode::ConnectError } else { ResetCode::Cancel });
    }

    fn poll_fault(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        self.poll_reset(cx).map(|error| stream_fault(&error))
    }

    fn check(&mut self) -> Option<Fault> {
        None
    }

    fn stalled(&mut self) {
        self.note_stalled();
    }
}

fn stream_fault(error: &StreamError) -> Fault {
    match error {
        StreamError::Reset(h2::Reason::NO_ERROR) => Fault::NotListening,
        _ => Fault::Reset,
    }
}
