//! A request's body that can be read more than once: by the next attempt, or by a mirror beside the attempt.
//!
//! Frames are kept until a limit is passed; from then on only the reader in front goes on and nothing can be repeated.
//! Counts what came from the client.
use crate::body::{Body, BodyError};
use crate::telemetry::Received;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;
use tokio::time::Instant;

/// The body.
pub(crate) struct Replay(Arc<Mutex<State>>);

struct State {
    source: Body,
    hint: SizeHint,
    kept: Vec<Kept>,
    bytes: usize,
    limit: usize,
    /// Frames read from the source.
    read: usize,
    /// Frames are no longer kept.
    passed: bool,
    end: Option<End>,
    /// When the last of it came, or it broke off.
    ended_at: Option<Instant>,
    ended: Arc<Notify>,
    waiting: Vec<Waker>,
    received: Arc<Received>,
}
#[derive(Clone)]
enum Kept {
    Data(Bytes),
    Trailers(Box<HeaderMap>),
}
/// What keeping a frame costs beside its bytes, about.
const PIECE: usize = 96;
/// Pieces up to this length are copied: they may be slices of something much larger.
const SMALL: usize = 1024;
/// Pieces may cost this much, however small the limit is: a body in one piece is always one within its limit.
const LEAST: usize = 4096;
#[derive(Clone, Copy)]
enum End {
    Whole,
    Broken,
}

impl State {
    /// Nothing from the beginning on is lost.
    fn is_whole(&self) -> bool {
        !self.passed && !matches!(self.end, Some(End::Broken))
    }
}

impl Replay {
    /// `limit`: bytes kept at most. `received` counts what arrives.
    pub(crate) fn new(source: Body, limit: usize, received: Arc<Received>) -> Self {
        let hint = source.size_hint();
        Self(Arc::new(Mutex::new(State {
            source,
            hint,
            kept: Vec::new(),
            bytes: 0,
            limit,
            read: 0,
            passed: false,
            end: None,
            ended_at: None,
            ended: Arc::default(),
            waiting: Vec::new(),
            received,
        })))
    }
    /// Whether [`Self::reader`] would give one.
    pub(crate) fn is_whole(&self) -> bool {
        self.0.lock().is_whole()
    }
    /// When the last of it came, if it has.
    pub(crate) fn ended_at(&self) -> Option<Instant> {
        self.0.lock().ended_at
    }
    /// The same, waiting for it. Cancel safe.
    pub(crate) async fn ended(&self) -> Instant {
        loop {
            let news = {
                let state = self.0.lock();
                match state.ended_at {
                    Some(at) => return at,
                    // Made under the lock: what happens from now on is heard.
                    None => Arc::clone(&state.ended).notified_owned(),
                }
            };
            news.await;
        }
    }
    /// The body from its beginning, if that can still be had.
    pub(crate) fn reader(&self) -> Option<Body> {
        let hint = {
            let state = self.0.lock();
            state.is_whole().then_some(state.hint)?
        };
        Some(Body::Boxed(Reader { state: Arc::clone(&self.0), at: 0, hint }.boxed_unsync()))
    }
}

struct Reader {
    state: Arc<Mutex<State>>,
    at: usize,
    hint: SizeHint,
}

impl HttpBody for Reader {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let state = Arc::clone(&self.state);
        let mut state = state.lock();
        if self.at < state.read {
            // Behind the front: what was kept, or nothing any more.
            let Some(kept) = state.kept.get(self.at).cloned() else {
                return Poll::Ready(Some(Err(BodyError::Gone("the body is larger than what is kept to repeat it"))));
            };
            self.at += 1;
            return Poll::Ready(Some(Ok(match kept {
                Kept::Data(data) => Frame::data(data),
                Kept::Trailers(trailers) => Frame::trailers(*trailers),
            })));
        }
        match state.end {
            Some(End::Whole) => return Poll::Ready(None),
            Some(End::Broken) => return Poll::Ready(Some(Err(BodyError::Gone("the client's body broke off")))),
            None => {}
        }
        let polled = Pin::new(&mut state.source).poll_frame(cx);
        let frame = match polled {
            Poll::Pending => {
                // The source remembers only the last waker; the others are woken when something comes.
                if !state.waiting.iter().any(|w| w.will_wake(cx.waker())) {
                    state.waiting.push(cx.waker().clone());
                }
                return Poll::Pending;
            }
            Poll::Ready(None) => {
                state.end = Some(End::Whole);
                state.has_ended();
                state.wake_others();
                return Poll::Ready(None);
            }
            Poll::Ready(Some(Err(error))) => {
                state.end = Some(End::Broken);
                state.has_ended();
                state.wake_others();
                return Poll::Ready(Some(Err(error)));
            }
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        state.keep(&frame);
        self.at += 1;
        state.wake_others();
        Poll::Ready(Some(Ok(frame)))
    }
    fn size_hint(&self) -> SizeHint {
        if self.at == 0 { self.hint } else { SizeHint::default() }
    }
}
impl State {
    fn keep(&mut self, frame: &Frame<Bytes>) {
        self.read += 1;
        if let Some(data) = frame.data_ref() {
            self.received.add(data);
            self.bytes = self.bytes.saturating_add(data.len());
        }
        // Whoever sends it on does not ask what comes after the length that was announced.
        if self.hint.exact() == Some(self.bytes as u64) {
            self.has_ended();
        }
        if self.passed {
            return;
        }
        // A body in tiny pieces costs more than its bytes.
        if self.bytes > self.limit || self.read.saturating_mul(PIECE) > self.limit.max(LEAST) {
            self.passed = true;
            self.kept = Vec::new();
            return;
        }
        match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) if data.len() <= SMALL => self.kept.push(Kept::Data(Bytes::copy_from_slice(data))),
            (Some(data), _) => self.kept.push(Kept::Data(data.clone())),
            (None, Some(trailers)) => self.kept.push(Kept::Trailers(Box::new(trailers.clone()))),
            (None, None) => self.kept.push(Kept::Data(Bytes::new())),
        }
    }
    fn has_ended(&mut self) {
        if self.ended_at.is_none() {
            self.ended_at = Some(Instant::now());
            self.ended.notify_waiters();
        }
    }
    fn wake_others(&mut self) {
        for waker in self.waiting.drain(..) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    fn body(parts: &'static [&'static str]) -> Body {
        let frames = parts.iter().map(|p| Ok::<_, BodyError>(Frame::data(Bytes::from_static(p.as_bytes()))));
        Body::Boxed(http_body_util::StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync())
    }
    fn collect(body: Body) -> Result<Bytes, BodyError> {
        body.collect().now_or_never().expect("everything is there").map(http_body_util::Collected::to_bytes)
    }

    #[test]
    fn a_small_body_can_be_read_again() {
        let received = Arc::new(Received::new(false));
        let replay = Replay::new(body(&["ab", "cd"]), 10, Arc::clone(&received));
        assert_eq!(collect(replay.reader().expect("first")).expect("whole"), "abcd");
        assert_eq!(collect(replay.reader().expect("again")).expect("whole"), "abcd");
        assert_eq!(received.bytes(), 4, "counted once");
    }
    #[test]
    fn a_large_body_passes_once() {
        let replay = Replay::new(body(&["abcd", "efgh", "i"]), 6, Arc::default());
        let mirror = replay.reader().expect("before the limit");
        assert_eq!(collect(replay.reader().expect("first")).expect("whole"), "abcdefghi");
        assert!(replay.reader().is_none());
        assert!(collect(mirror).is_err(), "a reader left behind is told");
    }
    #[test]
    fn a_body_in_tiny_pieces_is_not_kept_for_long() {
        static PIECES: [&str; 1000] = ["x"; 1000];
        let pieces: &[&str] = &PIECES;
        let replay = Replay::new(body(pieces), 64 << 10, Arc::default());
        assert_eq!(collect(replay.reader().expect("first")).expect("whole").len(), 1000);
        assert!(replay.reader().is_none() && replay.0.lock().kept.is_empty());
        let few = Replay::new(body(&pieces[..600]), 64 << 10, Arc::default());
        assert_eq!(collect(few.reader().expect("first")).expect("whole").len(), 600);
        assert_eq!(collect(few.reader().expect("again")).expect("whole").len(), 600);
    }
    #[test]
    fn two_readers_share_one_source() {
        let replay = Replay::new(body(&["ab", "cd"]), 10, Arc::default());
        let (a, b) = (replay.reader().expect("a"), replay.reader().expect("b"));
        assert_eq!(collect(a).expect("whole"), "abcd");
        assert_eq!(collect(b).expect("whole"), "abcd");
    }
}
