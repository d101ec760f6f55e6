//! Copying a connection both ways until it ends.
//!
//! Owns the rules by which one end's fate becomes the other's: end of stream becomes end of stream, reset becomes reset
//! (never a clean end), a full sink stops the source. It refuses to interpret a byte. Upstream: the proxies' shells.
//! Downstream: [`endpoint`], one implementation per kind of end.
//!
//! One relay is one task and holds no buffer while nothing moves: it waits for readiness and only then reads, first through
//! a small buffer shared by the data thread, and into a large one of its own once the source fills the small one.
//! What a stalled reader costs: its stream's receive window (256 KiB unless the tunnel's window was grown for readers that
//! kept up) on the receiving side, and [`crate::Settings::send_buffer`] plus the kernel's socket buffers on the sending side.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

pub mod endpoint;
mod queue;

use endpoint::{Endpoint, Fault, Fill};
use queue::Queue;

/// Where a relay's bytes are counted. Called at most once per direction each time the relay runs.
pub trait Counters {
    /// `bytes` went from the first end to the second.
    fn sent(&self, bytes: u64);
    /// `bytes` went from the second end to the first.
    fn received(&self, bytes: u64);
}

impl Counters for () {
    fn sent(&self, _: u64) {}
    fn received(&self, _: u64) {}
}

impl<C: Counters + ?Sized> Counters for Arc<C> {
    fn sent(&self, bytes: u64) {
        (**self).sent(bytes);
    }
    fn received(&self, bytes: u64) {
        (**self).received(bytes);
    }
}

impl<C: Counters + ?Sized> Counters for &C {
    fn sent(&self, bytes: u64) {
        (**self).sent(bytes);
    }
    fn received(&self, bytes: u64) {
        (**self).received(bytes);
    }
}

/// Plain shared counters.
#[derive(Debug, Default)]
pub struct RelayStats {
    sent: AtomicU64,
    received: AtomicU64,
}

impl RelayStats {
    /// Bytes from the first end to the second so far.
    pub fn total_sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }
    /// Bytes from the second end to the first so far.
    pub fn total_received(&self) -> u64 {
        self.received.load(Relaxed)
    }
}

impl Counters for RelayStats {
    fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }
    fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }
}

/// One of the two ends, in argument order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The first argument of [`relay`].
    First,
    /// The second.
    Second,
}

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Both directions ended by end of stream.
    Closed,
    /// This end was reset by whoever is behind it; the other end was reset in turn.
    Reset(End),
    /// The caller's `cancel` resolved; both ends were reset.
    Cancelled,
    /// Nothing moved for [`Timeouts::idle`] or [`Timeouts::half_closed`]; both ends were reset.
    Idle,
}

/// What a relay did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayEnd {
    /// Bytes from the first end to the second.
    pub sent: u64,
    /// Bytes from the second end to the first.
    pub received: u64,
    /// How it ended.
    pub how: How,
}

/// When a silent relay is given up. Checked lazily: it may take up to a quarter longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// Nothing moved either way. `None`: never.
    pub idle: Option<Duration>,
    /// Nothing moved for this long and one direction has ended, which counts as movement: the other end may have forgotten
    /// the connection. With both limits set the shorter one applies then. `None`: never; an end that the kernel knows to be
    /// dead is noticed all the same.
    pub half_closed: Option<Duration>,
}

/// Relays between `first` and `second` until both directions ended, one was reset, or `cancel` resolved. Consumes both
/// ends; dropping the future resets them.
pub fn relay<A, B, C, X>(first: A, second: B, counters: C, cancel: X, timeouts: Timeouts) -> impl Future<Output = RelayEnd>
where
    A: Endpoint,
    B: Endpoint,
    C: Counters,
    X: Future<Output = ()>,
{
    // Built outside the async block, which would otherwise hold the ends twice.
    let mut relay = Relay::new(first, second, counters, timeouts);
    async move {
        let mut cancel = pin!(cancel);
        poll_fn(|cx| {
            if cancel.as_mut().poll(cx).is_ready() {
                return Poll::Ready(relay.end(How::Cancelled));
            }
            relay.poll(cx)
        })
        .await
    }
}

/// [`relay`] between two TCP connections: plain passthrough.
pub fn relay_tcp<C: Counters, X: Future<Output = ()>>(
    first: TcpStream,
    second: TcpStream,
    counters: C,
    cancel: X,
    timeouts: Timeouts,
) -> impl Future<Output = RelayEnd> {
    relay(first, second, counters, cancel, timeouts)
}

/// A source is not read while its sink takes nothing, nor after its end of stream, and could not tell of a reset or of a
/// keepalive that failed: it is asked this often. While both directions are open and free somebody reads both ends, so an
/// idle connection costs no timer.
const FAULT_CHECK: Duration = Duration::from_secs(5);

/// Rounds of read and write one direction may take before other tasks get a turn.
const MAX_ROUNDS: usize = 16;

/// One direction.
#[derive(Debug, Default)]
struct Flow {
    queue: Queue,
    /// Bytes delivered, and how many of them were counted already.
    bytes: u64,
    counted: u64,
    /// The source fills small buffers: read into large ones.
    bulk: bool,
    /// The sink takes nothing.
    blocked: bool,
    /// The source ended; the queue may still hold its last bytes.
    ended: bool,
    /// The end was passed on.
    done: bool,
}

struct Relay<A: Endpoint, B: Endpoint, C> {
    first: A,
    second: B,
    out: Flow,
    back: Flow,
    counters: C,
    timeouts: Timeouts,
    clock: Option<Box<Clock>>,
    ended: bool,
}

/// Exists only while a flow is blocked, one direction is over, or a timeout is set.
struct Clock {
    sleep: Pin<Box<Sleep>>,
    period: Duration,
    /// [`Relay::progress`] at the last tick that saw any, and that tick.
    progress: u64,
    since: Instant,
}

impl<A: Endpoint, B: Endpoint, C> Drop for Relay<A, B, C> {
    fn drop(&mut self) {
        if !self.ended {
            self.first.reset(false);
            self.second.reset(false);
        }
    }
}

impl<A: Endpoint, B: Endpoint, C: Counters> Relay<A, B, C> {
    fn new(first: A, second: B, counters: C, timeouts: Timeouts) -> Self {
        Self { first, second, out: Flow::default(), back: Flow::default(), counters, timeouts, clock: None, ended: false }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<RelayEnd> {
        let how = self.run(cx);
        self.count();
        match how {
            Some(how) => Poll::Ready(self.end(how)),
            None => self.poll_clock(cx).map(|how| self.end(how)),
        }
    }

    fn run(&mut self, cx: &mut Context<'_>) -> Option<How> {
        let out = pump(&mut self.first, &mut self.second, &mut self.out, cx);
        if let Some(how) = Self::verdict(out, End::First, End::Second) {
            return Some(how);
        }
        let back = pump(&mut self.second, &mut self.first, &mut self.back, cx);
        if let Some(how) = Self::verdict(back, End::Second, End::First) {
            return Some(how);
        }
        if self.out.done && self.back.done {
            return Some(How::Closed);
        }
        // A reset must be noticed also when neither direction happens to wait for this end.
        for (fault, end) in [(self.first.poll_fault(cx), End::First), (self.second.poll_fault(cx), End::Second)] {
            match fault {
                Poll::Ready(Fault::Reset) => return Some(How::Reset(end)),
                Poll::Ready(Fault::NotListening) => {
                    let flow = if end == End::First { &mut self.back } else { &mut self.out };
                    flow.abandon();
                    if self.out.done && self.back.done {
                        return Some(How::Closed);
                    }
                }
                Poll::Pending => {}
            }
        }
        None
    }

    fn verdict(result: Result<(), (Fault, bool)>, source: End, sink: End) -> Option<How> {
        match result {
            Ok(()) | Err((Fault::NotListening, _)) => None,
            Err((Fault::Reset, true)) => Some(How::Reset(sink)),
            Err((Fault::Reset, false)) => Some(How::Reset(source)),
        }
    }

    fn count(&mut self) {
        let sent = self.out.bytes - self.out.counted;
        if sent > 0 {
            self.out.counted = self.out.bytes;
            self.counters.sent(sent);
        }
        let received = self.back.bytes - self.back.counted;
        if received > 0 {
            self.back.counted = self.back.bytes;
            self.counters.received(received);
        }
    }

    fn end(&mut self, how: How) -> RelayEnd {
        self.ended = true;
        match how {
            How::Closed => {}
            How::Reset(by) => {
                self.first.reset(by == End::Second);
                self.second.reset(by == End::First);
            }
            How::Cancelled | How::Idle => {
                self.first.reset(false);
                self.second.reset(false);
            }
        }
        RelayEnd { sent: self.out.bytes, received: self.back.bytes, how }
    }

    fn is_half_closed(&self) -> bool {
        self.out.done || self.back.done
    }

    /// What silence is measured by: bytes, and ends of stream, so that the limit on half-closed silence starts with them.
    fn progress(&self) -> u64 {
        let ends = u64::from(self.out.done) + u64::from(self.back.done);
        self.out.bytes.wrapping_add(self.back.bytes).wrapping_add(ends)
    }

    /// The limit on silence that applies now.
    fn limit(&self) -> Option<Duration> {
        if self.is_half_closed() {
            match (self.timeouts.half_closed, self.timeouts.idle) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            }
        } else {
            self.timeouts.idle
        }
    }

    fn poll_clock(&mut self, cx: &mut Context<'_>) -> Poll<How> {
        let limit = self.limit();
        // Somebody is not being read, see `FAULT_CHECK`.
        let unwatched = self.out.blocked || self.back.blocked || self.is_half_closed();
        if limit.is_none() && !unwatched {
            // Kept until it fires: in bulk traffic sinks are full every other moment, and timers are not free to make.
            if self.clock.as_mut().is_some_and(|clock| clock.sleep.as_mut().poll(cx).is_ready()) {
                self.clock = None;
            }
            return Poll::Pending;
        }
        let quarter = limit.map(|limit| (limit / 4).max(Duration::from_millis(50)));
        let period = match (quarter, unwatched) {
            (Some(quarter), true) => quarter.min(FAULT_CHECK),
            (Some(quarter), false) => quarter,
            (None, _) => FAULT_CHECK,
        };
        let progress = self.progress();
        let clock = self.clock.get_or_insert_with(|| {
            let now = Instant::now();
            Box::new(Clock { sleep: Box::pin(tokio::time::sleep(period)), period, progress, since: now })
        });
        if period < clock.period {
            clock.sleep.as_mut().reset(Instant::now() + period);
        }
        clock.period = period;
        // Bounded: after a reset into the future the second poll is pending.
        for _ in 0..2 {
            if clock.sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            clock.sleep.as_mut().reset(now + period);
            if progress != clock.progress {
                clock.progress = progress;
                clock.since = now;
            } else if limit.is_some_and(|limit| now.duration_since(clock.since) >= limit) {
                return Poll::Ready(How::Idle);
            }
            if self.out.blocked {
                self.first.stalled();
            }
            if self.back.blocked {
                self.second.stalled();
            }
            if self.first.check().is_some() {
                return Poll::Ready(How::Reset(End::First));
            }
            if self.second.check().is_some() {
                return Poll::Ready(How::Reset(End::Second));
            }
        }
        Poll::Pending
    }
}

impl Flow {
    /// The sink wants no more and that is not an error: what is queued is dropped, the direction is over.
    fn abandon(&mut self) {
        self.queue.clear();
        self.blocked = false;
        self.ended = true;
        self.done = true;
    }
}

/// Moves what can be moved from `source` to `sink`. `Ok` means it waits (a waker is registered) or is done; an error says
/// whether it was the sink's.
fn pump<S: Endpoint, K: Endpoint>(
    source: &mut S,
    sink: &mut K,
    flow: &mut Flow,
    cx: &mut Context<'_>,
) -> Result<(), (Fault, bool)> {
    if flow.done {
        return Ok(());
    }
    flow.blocked = false;
    for _ in 0..MAX_ROUNDS {
        // 1. What was read goes first.
        while !flow.queue.is_empty() {
            match sink.poll_push(cx, &mut flow.queue, flow.ended) {
                Poll::Ready(Ok(bytes)) => {
                    source.consumed(bytes);
                    flow.bytes += bytes as u64;
                }
                Poll::Ready(Err(Fault::NotListening)) => {
                    flow.abandon();
                    return Ok(());
                }
                Poll::Ready(Err(fault)) => return Err((fault, true)),
                Poll::Pending => {
                    flow.blocked = true;
                    if S::PEEKS || flow.ended {
                        return Ok(());
                    }
                    // Taken in up to the bound, so that small frames do not pile up in the tunnel.
                    return fill(source, flow, cx, queue::MAX).map_err(|fault| (fault, false));
                }
            }
        }
        if flow.ended {
            return match sink.poll_finish(cx) {
                Poll::Ready(Ok(()) | Err(Fault::NotListening)) => {
                    flow.abandon();
                    Ok(())
                }
                Poll::Ready(Err(fault)) => Err((fault, true)),
                Poll::Pending => Ok(()),
            };
        }
        // 2. Room is asked for only when there is something to read: credit held by idle streams starves the others.
        let mut room = queue::MAX;
        if S::PEEKS {
            if source.poll_readable(cx).is_pending() {
                flow.queue.shrink();
                return Ok(());
            }
            match sink.poll_room(cx) {
                Poll::Ready(Ok(bytes)) => room = bytes,
                Poll::Ready(Err(Fault::NotListening)) => {
                    flow.abandon();
                    return Ok(());
                }
                Poll::Ready(Err(fault)) => return Err((fault, true)),
                Poll::Pending => {
                    flow.blocked = true;
                    return Ok(());
                }
            }
        }
        fill(source, flow, cx, room).map_err(|fault| (fault, false))?;
        if flow.queue.is_empty() && !flow.ended {
            if S::PEEKS {
                sink.give_back();
            }
            flow.queue.shrink();
            return Ok(());
        }
    }
    cx.waker().wake_by_ref();
    Ok(())
}

/// Reads until the source has nothing more, the queue holds `room` bytes, or the source ended.
fn fill<S: Endpoint>(source: &mut S, flow: &mut Flow, cx: &mut Context<'_>, room: usize) -> Result<(), Fault> {
    while flow.queue.len() < room && !flow.queue.is_full() {
        match source.poll_fill(cx, room - flow.queue.len(), &mut flow.bulk, &mut flow.queue) {
            Poll::Ready(Ok(Fill::Data)) => {}
            Poll::Ready(Ok(Fill::End)) => {
                flow.ended = true;
                break;
            }
            Poll::Ready(Err(fault)) => return Err(fault),
            Poll::Pending => break,
        }
    }
    Ok(())
}
