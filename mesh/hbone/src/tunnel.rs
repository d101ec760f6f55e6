//! What both ends of a tunnel share: counted I/O, stream slots, keepalive, growth of windows.
//!
//! Owns the state that a tunnel's driver, its streams and the pool look at together. It refuses locks: everything is an
//! atomic that in practice only one thread touches. Upstream: `client`, `server`. Downstream: `stream`, `pool`.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_runtime::memory::Reservation;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::settings::Settings;

/// Set in [`Shared::state`] when no more streams may be opened; the rest of the word counts open streams.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// State of one tunnel.
#[derive(Debug)]
pub(crate) struct Shared {
    state: AtomicUsize,
    limit: AtomicUsize,
    bytes_in: AtomicU64,
    send_blocked: AtomicBool,
    /// Ended by its owner, not by the peer or an accident.
    aborted: AtomicBool,
    /// Number of the running bandwidth probe; streams restart their count when it changes.
    probe: AtomicU32,
    /// Most bytes one stream's reader consumed during the running probe.
    peak: AtomicU64,
    /// A stream's reader stopped while more than its base window is outstanding.
    stalled: AtomicBool,
    base_window: u32,
}

impl Shared {
    pub(crate) fn new(limit: usize, base_window: u32) -> Arc<Self> {
        Arc::new(Self {
            state: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
            bytes_in: AtomicU64::new(0),
            send_blocked: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            probe: AtomicU32::new(0),
            peak: AtomicU64::new(0),
            stalled: AtomicBool::new(false),
            base_window,
        })
    }

    /// A slot for one more stream, unless the tunnel is closed or full.
    pub(crate) fn try_slot(self: &Arc<Self>) -> Option<StreamSlot> {
        let limit = self.limit.load(Relaxed);
        self.state.fetch_update(Relaxed, Relaxed, |state| (state < limit).then_some(state + 1)).is_ok().then(|| self.slot())
    }

    /// A slot whatever the limit: h2 has already counted the stream (server side).
    pub(crate) fn take_slot(self: &Arc<Self>) -> StreamSlot {
        self.state.fetch_add(1, Relaxed);
        self.slot()
    }

    fn slot(self: &Arc<Self>) -> StreamSlot {
        StreamSlot { shared: Arc::clone(self), probe: self.probe.load(Relaxed), consumed: 0 }
    }

    /// Streams open now.
    pub(crate) fn streams(&self) -> usize {
        self.state.load(Relaxed) & !CLOSED
    }

    /// Streams that may be open at once.
    pub(crate) fn limit(&self) -> usize {
        self.limit.load(Relaxed)
    }

    pub(crate) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Relaxed);
    }

    /// No more slots from now on.
    pub(crate) fn close(&self) {
        self.state.fetch_or(CLOSED, Relaxed);
    }

    /// No more slots, on the owner's word.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, Relaxed);
        self.close();
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.aborted.load(Relaxed)
    }

    /// Closes the tunnel for new streams if it has none; `false` when one was opened in between.
    pub(crate) fn close_if_unused(&self) -> bool {
        self.state.compare_exchange(0, CLOSED, Relaxed, Relaxed).is_ok()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.load(Relaxed) & CLOSED != 0
    }

    /// Whether anything arrived at all.
    pub(crate) fn has_heard(&self) -> bool {
        self.bytes_in.load(Relaxed) > 0
    }

    /// Whether the last write to the connection found its socket full.
    pub(crate) fn is_send_blocked(&self) -> bool {
        self.send_blocked.load(Relaxed)
    }
}

/// One stream's place in its tunnel; given back on drop.
#[derive(Debug)]
pub(crate) struct StreamSlot {
    shared: Arc<Shared>,
    probe: u32,
    consumed: u64,
}

impl StreamSlot {
    /// `bytes` were consumed by the stream's reader.
    pub(crate) fn released(&mut self, bytes: usize) {
        let probe = self.shared.probe.load(Relaxed);
        if probe != self.probe {
            self.probe = probe;
            self.consumed = 0;
        }
        self.consumed += bytes as u64;
        if self.consumed > self.shared.peak.load(Relaxed) {
            self.shared.peak.store(self.consumed, Relaxed);
        }
    }

    pub(crate) fn base_window(&self) -> usize {
        self.shared.base_window as usize
    }

    pub(crate) fn stalled(&self) {
        self.shared.stalled.store(true, Relaxed);
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.shared.state.fetch_sub(1, Relaxed);
    }
}

/// The tunnel's transport, counting what arrives (keepalive, bandwidth) and noticing a full socket (pool).
#[derive(Debug)]
pub(crate) struct CountedIo<IO> {
    io: IO,
    shared: Arc<Shared>,
}

impl<IO> CountedIo<IO> {
    pub(crate) fn new(io: IO, shared: Arc<Shared>) -> Self {
        Self { io, shared }
    }

    fn note(&self, blocked: bool) {
        if self.shared.send_blocked.load(Relaxed) != blocked {
            self.shared.send_blocked.store(blocked, Relaxed);
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for CountedIo<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        let read = buf.filled().len() - before;
        if read > 0 {
            // Only this task writes the counter.
            self.shared.bytes_in.store(self.shared.bytes_in.load(Relaxed).wrapping_add(read as u64), Relaxed);
        }
        result
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for CountedIo<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buf);
        self.note(result.is_pending());
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_flush(cx);
        self.note(result.is_pending());
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.note(result.is_pending());
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// The knobs of an h2 connection that both its sides have.
pub(crate) trait Knobs {
    fn set_stream_window(&mut self, window: u32) -> bool;
    fn set_connection_window(&mut self, window: u32);
}

impl<T: AsyncRead + AsyncWrite + Unpin, B: bytes::Buf> Knobs for h2::client::Connection<T, B> {
    fn set_stream_window(&mut self, window: u32) -> bool {
        self.set_initial_window_size(window).is_ok()
    }
    fn set_connection_window(&mut self, window: u32) {
        self.set_target_window_size(window);
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin, B: bytes::Buf> Knobs for h2::server::Connection<T, B> {
    fn set_stream_window(&mut self, window: u32) -> bool {
        self.set_initial_window_size(window).is_ok()
    }
    fn set_connection_window(&mut self, window: u32) {
        self.set_target_window_size(window);
    }
}

/// What [`Upkeep::poll`] found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// The peer does not answer.
    Dead,
    /// The interval passed; the owner may look at its own slow clocks.
    Tick,
}

/// Keepalive and window growth of one tunnel.
///
/// Keepalive is data aware: a ping goes out only after an interval in which nothing at all arrived, and any byte answers it.
///
/// Growth. h2 has no way to widen one stream: credit can only be returned for bytes that came. What it has is the initial
/// window, which moves all streams of the connection at once. So a tunnel's window doubles when, within one measured round
/// trip, some stream's *reader consumed* at least two thirds of a window, and the last doubling made the tunnel faster.
/// It falls back to the base when a reader stops with more than the base outstanding. What such a reader already
/// received stays in memory until it reads or ends; that surplus was reserved from the budget.
#[derive(Debug)]
pub(crate) struct Upkeep {
    shared: Arc<Shared>,
    pings: Option<h2::PingPong>,
    clock: Pin<Box<Sleep>>,
    interval: Duration,
    timeout: Duration,
    seen_bytes: u64,
    /// When the unanswered keepalive ping was sent.
    asked: Option<Instant>,
    /// h2's one slot for pings holds a keepalive ping (or its unread answer).
    slot_taken: bool,
    growth: Growth,
}

#[derive(Debug)]
struct Growth {
    window: u32,
    /// The largest window since the tunnel last had no stream: what a stream that is open may hold unread.
    widest: u32,
    base: u32,
    max: u32,
    connection: u32,
    /// Streams the reservation was computed for.
    streams: usize,
    reserved: Option<Reservation>,
    probe_started: Option<Instant>,
    probed_bytes: u64,
    /// Best rate seen, bytes per second, and the window it was seen with.
    best_rate: f64,
    best_window: u32,
    /// After a stall growth rests until the next tick.
    resting: bool,
}

impl Upkeep {
    pub(crate) fn new(shared: Arc<Shared>, pings: Option<h2::PingPong>, settings: &Settings) -> Self {
        Self {
            shared,
            pings,
            clock: Box::pin(tokio::time::sleep(settings.ping_interval)),
            interval: settings.ping_interval,
            timeout: settings.ping_timeout,
            seen_bytes: 0,
            asked: None,
            slot_taken: false,
            growth: Growth::new(settings),
        }
    }

    /// Called after every poll of the connection. `Pending` is the normal answer.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, knobs: &mut impl Knobs, settings: &Settings) -> Poll<Health> {
        self.poll_growth(cx, knobs, settings);
        if self.clock.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let now = Instant::now();
        self.clock.as_mut().reset(now + self.interval);
        // Register the timer for the next tick.
        let _ = self.clock.as_mut().poll(cx);
        let bytes = self.shared.bytes_in.load(Relaxed);
        if bytes != self.seen_bytes {
            self.seen_bytes = bytes;
            self.asked = None;
        } else if let Some(asked) = self.asked {
            if now.duration_since(asked) >= self.timeout {
                return Poll::Ready(Health::Dead);
            }
        } else {
            self.asked = Some(now);
            if let Some(pings) = &mut self.pings {
                // Refused only while a probe's ping is unanswered, which serves as well.
                self.slot_taken |= pings.send_ping(h2::Ping::opaque()).is_ok();
            }
        }
        if self.shared.stalled.swap(false, Relaxed) {
            self.growth.shrink(knobs);
            self.growth.resting = true;
        } else {
            self.growth.resting = false;
        }
        Poll::Ready(Health::Tick)
    }

    fn poll_growth(&mut self, cx: &mut Context<'_>, knobs: &mut impl Knobs, settings: &Settings) {
        let growth = &mut self.growth;
        let streams = self.shared.streams();
        if streams != growth.streams {
            growth.streams = streams;
            growth.follow_streams(streams, knobs, settings);
        }
        let Some(pings) = &mut self.pings else { return };
        if self.slot_taken {
            // An answer nobody reads would keep every later ping from being sent.
            self.slot_taken = pings.poll_pong(cx).is_pending();
        }
        if growth.max == growth.base {
            return;
        }
        let bytes = self.shared.bytes_in.load(Relaxed);
        match growth.probe_started {
            // A probe costs a round trip of two small frames: only worth it when half a window came since the last one.
            None if bytes.wrapping_sub(growth.probed_bytes) >= u64::from(growth.window / 2) && !growth.resting => {
                if growth.window < growth.max && !self.slot_taken && pings.send_ping(h2::Ping::opaque()).is_ok() {
                    growth.probe_started = Some(Instant::now());
                    self.shared.probe.store(self.shared.probe.load(Relaxed).wrapping_add(1), Relaxed);
                    self.shared.peak.store(0, Relaxed);
                    // Registers for the pong.
                    let _ = pings.poll_pong(cx);
                }
                growth.probed_bytes = bytes;
            }
            None => {}
            Some(started) => match pings.poll_pong(cx) {
                Poll::Pending => {}
                Poll::Ready(Err(_)) => growth.probe_started = None,
                Poll::Ready(Ok(_)) => {
                    growth.probe_started = None;
                    let round_trip = started.elapsed().as_secs_f64().max(1e-6);
                    let rate = bytes.wrapping_sub(growth.probed_bytes) as f64 / round_trip;
                    growth.probed_bytes = bytes;
                    let consumed = self.shared.peak.load(Relaxed);
                    if self.shared.stalled.swap(false, Relaxed) {
                        growth.shrink(knobs);
                        growth.resting = true;
                    } else {
                        growth.consider(consumed, rate, streams, knobs, settings);
                    }
                }
            },
        }
    }
}

impl Growth {
    fn new(settings: &Settings) -> Self {
        Self {
            window: settings.stream_window,
            widest: settings.stream_window,
            base: settings.stream_window,
            max: settings.max_stream_window,
            connection: settings.connection_window,
            streams: 0,
            reserved: None,
            probe_started: None,
            probed_bytes: 0,
            best_rate: 0.0,
            best_window: 0,
            resting: false,
        }
    }

    /// Doubles the window when it is what limits a keeping-up reader and the last doubling helped.
    fn consider(&mut self, consumed: u64, rate: f64, streams: usize, knobs: &mut impl Knobs, settings: &Settings) {
        if consumed < u64::from(self.window / 3 * 2) {
            return;
        }
        // A tenth faster than anything seen with a smaller window, or the wider window only makes queues longer.
        if self.window > self.best_window && rate < self.best_rate * 1.1 {
            return;
        }
        if rate > self.best_rate || self.window > self.best_window {
            self.best_rate = self.best_rate.max(rate);
            self.best_window = self.window;
        }
        let window = self.window.saturating_mul(2).min(self.max);
        if window == self.window || !self.reserve(window, streams, settings) {
            return;
        }
        if knobs.set_stream_window(window) {
            self.window = window;
            self.widest = self.widest.max(window);
            self.follow_streams(streams, knobs, settings);
        }
    }

    /// Takes the surplus of `streams` windows of `window` out of the budget.
    fn reserve(&mut self, window: u32, streams: usize, settings: &Settings) -> bool {
        let Some(budget) = &settings.budget else { return true };
        let surplus = (window - self.base) as usize * streams.max(1);
        match &mut self.reserved {
            Some(held) if held.bytes() >= surplus => {
                held.shrink_to(surplus);
                true
            }
            Some(held) => {
                let more = surplus - held.bytes();
                held.try_grow(more)
            }
            None => {
                self.reserved = budget.try_reserve(surplus);
                self.reserved.is_some()
            }
        }
    }

    /// The number of streams changed: the connection window must cover them and a grown window must stay paid for.
    fn follow_streams(&mut self, streams: usize, knobs: &mut impl Knobs, settings: &Settings) {
        if self.window > self.base && !self.reserve(self.window, streams, settings) {
            self.shrink(knobs);
        }
        if streams == 0 {
            self.widest = self.window;
        }
        let target = settings.connection_target(streams, self.widest);
        // Never lowered: the peer may already hold the credit.
        if target > self.connection {
            self.connection = target;
            knobs.set_connection_window(target);
        }
    }

    fn shrink(&mut self, knobs: &mut impl Knobs) {
        if self.window > self.base && knobs.set_stream_window(self.base) {
            self.window = self.base;
            self.reserved = None;
            self.best_rate = 0.0;
            self.best_window = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Told {
        stream: u32,
        connection: u32,
    }
    impl Knobs for Told {
        fn set_stream_window(&mut self, window: u32) -> bool {
            self.stream = window;
            true
        }
        fn set_connection_window(&mut self, window: u32) {
            self.connection = window;
        }
    }

    #[test]
    fn streams_that_stalled_with_a_grown_window_leave_room_for_the_others() {
        let settings = Settings::default();
        let (mut growth, mut told) = (Growth::new(&settings), Told::default());
        growth.follow_streams(1, &mut told, &settings);
        for doubling in 1..=4 {
            growth.consider(u64::MAX, f64::from(doubling) * 1e9, 1, &mut told, &settings);
        }
        assert_eq!(told.stream, settings.max_stream_window);
        growth.shrink(&mut told);
        assert_eq!(told.stream, settings.stream_window);
        // Each of them may hold as much as the window was when it stalled.
        growth.follow_streams(20, &mut told, &settings);
        assert!(told.connection >= 20 * settings.max_stream_window + settings.stream_window, "{}", told.connection);
        // Nobody of them is left.
        let before = told.connection;
        growth.follow_streams(0, &mut told, &settings);
        growth.follow_streams(30, &mut told, &settings);
        assert_eq!(told.connection, before, "30 small windows fit in what there is");
    }
}
