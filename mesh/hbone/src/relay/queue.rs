//! Bytes read and not yet written, without owning memory when empty.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

/// Most bytes a queue takes in.
pub(super) const MAX: usize = 256 << 10;
/// Most pieces a queue takes in, which is also the most one vectored write carries.
pub(super) const PIECES: usize = 64;
/// Pieces below this are merged when they wait anyway: a frame's bookkeeping is larger than they are.
const SMALL: usize = 2 << 10;
/// Size of a merge buffer.
const MERGE: usize = 16 << 10;

/// A queue of chunks.
#[derive(Debug, Default)]
pub struct Queue {
    chunks: VecDeque<Bytes>,
    /// Small pieces merged; logically the last chunk.
    tail: BytesMut,
    len: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn is_full(&self) -> bool {
        self.chunks.len() >= PIECES - 1
    }

    pub(super) fn push(&mut self, chunk: Bytes) {
        self.len += chunk.len();
        if chunk.len() < SMALL && !self.chunks.is_empty() {
            if self.tail.capacity() - self.tail.len() < chunk.len() {
                self.seal();
                self.tail.reserve(MERGE);
            }
            self.tail.extend_from_slice(&chunk);
            return;
        }
        self.seal();
        self.chunks.push_back(chunk);
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }

    /// Takes at most `max` bytes off the front, as one piece.
    pub(super) fn pop(&mut self, max: usize) -> Bytes {
        if self.chunks.is_empty() {
            self.seal();
        }
        let Some(front) = self.chunks.front_mut() else { return Bytes::new() };
        let piece = if front.len() > max { front.split_to(max) } else { self.chunks.pop_front().unwrap_or_default() };
        self.len -= piece.len();
        piece
    }

    /// The pieces, for one vectored write; returns how many of `slices` were filled.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; PIECES]) -> usize {
        let tail = (!self.tail.is_empty()).then_some(&self.tail[..]);
        let pieces = self.chunks.iter().map(|chunk| &chunk[..]).chain(tail);
        slices.iter_mut().zip(pieces).map(|(slot, piece)| *slot = IoSlice::new(piece)).count()
    }

    /// `bytes` of the front were written.
    pub(super) fn advance(&mut self, mut bytes: usize) {
        self.len = self.len.saturating_sub(bytes);
        while bytes > 0 {
            let Some(front) = self.chunks.front_mut() else {
                self.tail.advance(bytes.min(self.tail.len()));
                return;
            };
            if front.len() > bytes {
                front.advance(bytes);
                return;
            }
            bytes -= front.len();
            self.chunks.pop_front();
        }
    }

    /// Gives back all memory; called when the source goes quiet.
    pub(super) fn shrink(&mut self) {
        if self.len == 0 && (self.chunks.capacity() > 0 || self.tail.capacity() > 0) {
            *self = Self::default();
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
