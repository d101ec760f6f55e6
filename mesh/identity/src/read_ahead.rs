//! Large reads under TLS.
//!
//! rustls asks its transport for 4 KiB at a time, which is five system calls for one full record. Between the two, this reads
//! up to 64 KiB at once and hands it on in the pieces rustls wants. It holds memory only while it holds bytes: an idle
//! connection has no buffer. Upstream: [`crate::tls`]. Downstream: the TCP stream.
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes read at once: four full records.
const READ: usize = 64 << 10;

thread_local! {
    // One per thread: a connection whose buffer ran empty leaves it to the next one that reads.
    static SPARE: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// A stream whose reads are large, whatever is asked for. Writes pass through.
#[derive(Debug)]
pub struct ReadAhead<IO> {
    io: IO,
    held: Option<Held>,
}

/// Bytes read and not yet handed on: `at..end` of `buf`.
#[derive(Debug)]
struct Held {
    buf: Box<[u8]>,
    at: usize,
    end: usize,
}

impl<IO> ReadAhead<IO> {
    /// Reads ahead on `io`.
    pub fn new(io: IO) -> Self {
        Self { io, held: None }
    }

    /// The stream below. What was read ahead is not in it any more.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }
}

impl Held {
    /// Hands over what fits into `out`; `true` when nothing is left.
    fn hand(&mut self, out: &mut ReadBuf<'_>) -> bool {
        let left = self.buf.get(self.at..self.end).unwrap_or_default();
        let part = left.get(..left.len().min(out.remaining())).unwrap_or(left);
        out.put_slice(part);
        self.at += part.len();
        self.at >= self.end
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadAhead<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(held) = &mut self.held {
            if held.hand(out) {
                SPARE.set(self.held.take().map(|held| held.buf));
            }
            return Poll::Ready(Ok(()));
        }
        // A reader with room for a large read needs no help.
        if out.remaining() >= READ {
            return Pin::new(&mut self.io).poll_read(cx, out);
        }
        let mut buf = SPARE.take().unwrap_or_else(|| vec![0; READ].into_boxed_slice());
        let mut into = ReadBuf::new(&mut buf);
        let read = match Pin::new(&mut self.io).poll_read(cx, &mut into) {
            Poll::Ready(Ok(())) => into.filled().len(),
            other => {
                SPARE.set(Some(buf));
                return other;
            }
        };
        let mut held = Held { buf, at: 0, end: read };
        if held.hand(out) {
            SPARE.set(Some(held.buf));
        } else {
            self.held = Some(held);
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadAhead<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    /// Counts reads and gives what it has.
    struct Source {
        data: Vec<u8>,
        reads: usize,
    }
    impl AsyncRead for Source {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.reads += 1;
            let n = self.data.len().min(out.remaining());
            let rest = self.data.split_off(n);
            out.put_slice(&self.data);
            self.data = rest;
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn small_reads_become_large_ones_and_nothing_is_lost() {
        let data: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        let mut ahead = ReadAhead::new(Source { data: data.clone(), reads: 0 });
        let mut out = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let n = ahead.read(&mut piece).await.unwrap();
            if n == 0 {
                break;
            }
            out.extend_from_slice(&piece[..n]);
        }
        assert_eq!(out, data);
        assert_eq!(ahead.get_ref().reads, 200_000usize.div_ceil(READ) + 1, "and one for the end");
        assert!(ahead.held.is_none(), "no buffer is kept once it is empty");
    }
}
