//! Counts gRPC messages in a body without holding any of it.
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Flag and length before each message.
const HEAD: u8 = 5;

/// Messages of one direction: each begins with a flag and its length in four bytes (gRPC over HTTP/2, "Length-Prefixed-
/// Message"). A message counts once its head is whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Messages {
    count: u64,
    /// Bytes of the current message that are still to come.
    left: u64,
    /// Bytes of the current head that have come.
    head: u8,
    length: u32,
}
impl Messages {
    /// The next bytes of the body.
    pub fn feed(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.left > 0 {
                let skipped = usize::try_from(self.left).map_or(data.len(), |left| left.min(data.len()));
                self.left -= skipped as u64;
                data = data.get(skipped..).unwrap_or_default();
                continue;
            }
            let Some((byte, rest)) = data.split_first() else { return };
            data = rest;
            // The flag, shifted out by the four bytes that follow it.
            self.length = self.length << 8 | u32::from(*byte);
            self.head += 1;
            if self.head == HEAD {
                self.head = 0;
                self.left = u64::from(self.length);
                self.length = 0;
                self.count += 1;
            }
        }
    }
    /// Messages so far.
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// What came of a request's body, counted by whoever reads it and read by whoever tells.
#[derive(Debug, Default)]
pub struct Received {
    bytes: AtomicU64,
    messages: Option<Mutex<Messages>>,
}
impl Received {
    /// Nothing yet. `grpc`: messages are counted too.
    pub fn new(grpc: bool) -> Self {
        Self { bytes: AtomicU64::new(0), messages: grpc.then(Mutex::default) }
    }
    /// The next bytes.
    pub fn add(&self, data: &[u8]) {
        self.bytes.fetch_add(data.len() as u64, Relaxed);
        if let Some(messages) = &self.messages {
            messages.lock().feed(data);
        }
    }
    /// Bytes that are no part of a body (an upgraded connection's).
    pub fn add_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
    }
    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
    /// gRPC messages so far.
    pub fn messages(&self) -> u64 {
        self.messages.as_ref().map_or(0, |m| m.lock().count())
    }
}

/// The gRPC status an HTTP status stands for (gRPC's http-grpc-status-mapping; 429 as Envoy has it).
pub(crate) fn grpc_of_http(status: u16) -> u16 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        // One of 3 bytes, an empty one, one of 256 bytes.
        let mut body = vec![0, 0, 0, 0, 3, 1, 2, 3, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        body.extend([7; 256]);
        for piece in [1, 2, 3, 5, 7, 100, body.len()] {
            let mut messages = Messages::default();
            body.chunks(piece).for_each(|c| messages.feed(c));
            assert_eq!(messages, Messages { count: 3, ..Messages::default() }, "in pieces of {piece}");
        }
    }
    #[test]
    fn a_head_that_breaks_off_is_no_message() {
        let received = Received::new(true);
        received.add(&[0, 0, 0, 0]);
        assert_eq!((received.bytes(), received.messages()), (4, 0));
        received.add(&[0]);
        assert_eq!((received.bytes(), received.messages()), (5, 1));
    }
    #[test]
    fn the_longest_message_does_not_overflow() {
        let mut messages = Messages::default();
        messages.feed(&[1, 0xff, 0xff, 0xff, 0xff, 0]);
        assert_eq!((messages.count(), messages.left), (1, u64::from(u32::MAX) - 1));
    }
}
