//! A request's body that can be read more than once: by the next attempt, or by a mirror beside the attempt.
//!
//! Only the reader of the attempt under way takes frames from the client. They are kept until a limit is passed; from then on
//! nothing can be repeated, and copies get what they are not further behind with than that limit: a copy never makes the
//! request itself wait, and never takes anything away from it. Counts what came from the client.
use crate::body::{Body, BodyError};
use crate::telemetry::Received;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
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
    /// The newest frames.
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    /// Frames before those.
    forgotten: usize,
    /// Bytes read from the source.
    bytes: usize,
    limit: usize,
    end: Option<End>,
    /// When the last of it came, or it broke off.
    ended_at: Option<Instant>,
    ended: Arc<Notify>,
    /// The attempt that may read, counted from 1; later than that of any reader while there is none.
    attempt: u32,
    /// Its reader is there.
    is_read: bool,
    /// There may be another attempt.
    is_open: bool,
    copies: usize,
    /// Those of copies.
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

impl Replay {
    /// `limit`: bytes kept at most. `received` counts what arrives.
    pub(crate) fn new(source: Body, limit: usize, received: Arc<Received>) -> Self {
        let hint = source.size_hint();
        Self(Arc::new(Mutex::new(State {
            source,
            hint,
            kept: VecDeque::new(),
            kept_bytes: 0,
            forgotten: 0,
            bytes: 0,
            limit,
            end: None,
            ended_at: None,
            ended: Arc::default(),
            attempt: 0,
            is_read: false,
            is_open: true,
            copies: 0,
            waiting: Vec::new(),
            received,
        })))
    }
    /// Whether [`Self::reader`] would give one.
    pub(crate) fn is_whole(&self) -> bool {
        self.0.lock().is_whole()
    }
    /// Takes the body back from the attempt that had it, which reads nothing more: whether it is whole. (If not, the attempt
    /// keeps it: its answer may still be the one that counts.)
    pub(crate) fn take_back(&self) -> bool {
        let mut state = self.0.lock();
        let is_whole = state.is_whole();
        if is_whole {
            state.next_attempt();
        }
        is_whole
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
    /// The body from its beginning for the next attempt, if that can still be had. An attempt before it reads nothing more.
    pub(crate) fn reader(&self) -> Option<Body> {
        let mut state = self.0.lock();
        if !state.is_whole() {
            return None;
        }
        state.next_attempt();
        state.is_read = true;
        Some(self.body(&state, Some(state.attempt)))
    }
    /// A copy of the body from its beginning, if that can still be had. It comes as fast as attempts read, and ends with an
    /// error where it falls too far behind them, or they end before the body does.
    pub(crate) fn copy(&self) -> Option<Body> {
        let mut state = self.0.lock();
        if !state.is_whole() {
            return None;
        }
        state.copies += 1;
        Some(self.body(&state, None))
    }
    fn body(&self, state: &State, attempt: Option<u32>) -> Body {
        Body::Boxed(Reader { state: Arc::clone(&self.0), attempt, at: 0, hint: state.hint }.boxed_unsync())
    }
}
impl Drop for Replay {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.is_open = false;
        State::close_if_unread(state);
    }
}

struct Reader {
    state: Arc<Mutex<State>>,
    /// None: a copy.
    attempt: Option<u32>,
    at: usize,
    hint: SizeHint,
}
impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        match self.attempt {
            None => {
                state.copies -= 1;
                state.forget();
            }
            Some(attempt) if attempt == state.attempt => {
                state.is_read = false;
                State::close_if_unread(state);
            }
            Some(_) => {}
        }
    }
}

impl HttpBody for Reader {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let state = Arc::clone(&self.state);
        let mut state = state.lock();
        let gone = |why| Poll::Ready(Some(Err(BodyError::Gone(why))));
        if self.attempt.is_some_and(|attempt| attempt != state.attempt) {
            return gone("another attempt reads the body");
        }
        let Some(number) = self.at.checked_sub(state.forgotten) else {
            return gone("the body is larger than what is kept to repeat it");
        };
        if let Some(kept) = state.kept.get(number).cloned() {
            self.at += 1;
            return Poll::Ready(Some(Ok(match kept {
                Kept::Data(data) => Frame::data(data),
                Kept::Trailers(trailers) => Frame::trailers(*trailers),
            })));
        }
        match state.end {
            Some(End::Whole) => return Poll::Ready(None),
            Some(End::Broken) => return gone("the body broke off"),
            None => {}
        }
        if self.attempt.is_none() {
            if !state.waiting.iter().any(|w| w.will_wake(cx.waker())) {
                state.waiting.push(cx.waker().clone());
            }
            return Poll::Pending;
        }
        let frame = std::task::ready!(Pin::new(&mut state.source).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                state.keep(frame);
                self.at += 1;
            }
            None => state.has_ended(End::Whole),
            Some(Err(_)) => state.has_ended(End::Broken),
        }
        state.wake_copies();
        Poll::Ready(frame)
    }
    fn size_hint(&self) -> SizeHint {
        if self.at == 0 { self.hint } else { SizeHint::default() }
    }
}
impl State {
    /// Nothing from the beginning on is lost.
    fn is_whole(&self) -> bool {
        self.forgotten == 0 && !matches!(self.end, Some(End::Broken))
    }
    fn next_attempt(&mut self) {
        self.attempt = self.attempt.saturating_add(1);
        self.is_read = false;
    }
    fn keep(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.received.add(data);
            self.bytes = self.bytes.saturating_add(data.len());
        }
        // Whoever sends it on does not ask what comes after the length that was announced.
        if self.hint.exact() == Some(self.bytes as u64) {
            self.last_came();
        }
        if self.copies == 0 && (self.forgotten > 0 || self.bytes > self.limit) {
            self.forgotten += 1;
            return self.forget();
        }
        let kept = match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) if data.len() <= SMALL => Kept::Data(Bytes::copy_from_slice(data)),
            (Some(data), _) => Kept::Data(data.clone()),
            (None, Some(trailers)) => Kept::Trailers(Box::new(trailers.clone())),
            (None, None) => Kept::Data(Bytes::new()),
        };
        self.kept_bytes += kept.len();
        self.kept.push_back(kept);
        self.forget();
    }
    /// Forgets what is beyond the limit, and all of it where it can be repeated no more and nobody takes copies.
    fn forget(&mut self) {
        // A body in tiny pieces costs more than its bytes.
        let is_too_much = |s: &Self| s.kept_bytes > s.limit || s.kept.len().saturating_mul(PIECE) > s.limit.max(LEAST);
        while is_too_much(self) || (self.forgotten > 0 && self.copies == 0) {
            let Some(oldest) = self.kept.pop_front() else { break };
            self.kept_bytes -= oldest.len();
            self.forgotten += 1;
        }
        if self.kept.is_empty() {
            self.kept = VecDeque::new();
        }
    }
    fn has_ended(&mut self, how: End) {
        self.end = Some(how);
        self.last_came();
    }
    fn last_came(&mut self) {
        if self.ended_at.is_none() {
            self.ended_at = Some(Instant::now());
            self.ended.notify_waiters();
        }
    }
    /// Ends what nobody will read on: copies are not kept waiting, nor is the client's body kept.
    fn close_if_unread(mut state: MutexGuard<'_, Self>) {
        if state.is_open || state.is_read || state.end.is_some() {
            return;
        }
        // Of a body of announced length nobody asks for the end.
        let how = if state.ended_at.is_some() { End::Whole } else { End::Broken };
        state.has_ended(how);
        state.wake_copies();
        let source = std::mem::take(&mut state.source);
        drop(state);
        drop(source);
    }
    fn wake_copies(&mut self) {
        for waker in self.waiting.drain(..) {
            waker.wake();
        }
    }
}
impl Kept {
    fn len(&self) -> usize {
        match self {
            Self::Data(data) => data.len(),
            Self::Trailers(_) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt as _, StreamExt as _};

    fn body(parts: &'static [&'static str]) -> Body {
        let frames = parts.iter().map(|p| Ok::<_, BodyError>(Frame::data(Bytes::from_static(p.as_bytes()))));
        Body::Boxed(http_body_util::StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync())
    }
    fn collect(body: Body) -> Result<Bytes, BodyError> {
        body.collect().now_or_never().expect("everything is there").map(http_body_util::Collected::to_bytes)
    }

    /// What there is now; an error has no words.
    fn next(body: &mut Body) -> Option<Result<String, ()>> {
        let frame = body.frame().now_or_never()?.expect("not the end");
        Some(frame.map(|f| String::from_utf8_lossy(&f.into_data().expect("data")).into_owned()).map_err(drop))
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
        let mut copy = replay.copy().expect("before the limit");
        let mut attempt = replay.reader().expect("first");
        assert_eq!(next(&mut copy), None, "it waits for the attempt");
        assert_eq!(next(&mut attempt), Some(Ok("abcd".into())));
        assert_eq!(next(&mut copy), Some(Ok("abcd".into())));
        // A copy that keeps up is a copy of all of it, however large; it takes nothing away from the attempt.
        for part in ["efgh", "i"] {
            assert_eq!(next(&mut attempt), Some(Ok(part.into())));
            assert_eq!(next(&mut copy), Some(Ok(part.into())));
        }
        assert!(replay.reader().is_none() && replay.copy().is_none() && !replay.take_back());
        assert_eq!(collect(attempt).expect("whole"), "");
        assert_eq!(collect(copy).expect("whole"), "");
    }
    #[test]
    fn a_copy_left_behind_ends() {
        let replay = Replay::new(body(&["abcd", "efgh", "i"]), 6, Arc::default());
        let copy = replay.copy().expect("before the limit");
        assert_eq!(collect(replay.reader().expect("first")).expect("whole"), "abcdefghi");
        assert!(collect(copy).is_err(), "a reader left behind is told");
        assert!(replay.0.lock().kept.is_empty(), "nobody takes copies any more");
    }
    #[test]
    fn an_attempt_whose_body_was_taken_back_reads_no_more() {
        let replay = Replay::new(body(&["abcd", "efgh"]), 6, Arc::default());
        let mut first = replay.reader().expect("first");
        assert_eq!(next(&mut first), Some(Ok("abcd".into())));
        assert!(replay.take_back());
        assert!(collect(first).is_err());
        assert_eq!(collect(replay.reader().expect("again")).expect("whole"), "abcdefgh");
    }
    #[tokio::test]
    async fn whoever_goes_away_leaves_the_others_awake() {
        let (client, mut source) = tokio::sync::mpsc::channel(1);
        let frames = futures_util::stream::poll_fn(move |cx| source.poll_recv(cx));
        let frames = frames.map(|part| Ok(Frame::data(Bytes::from_static(part))));
        let source = Body::Boxed(http_body_util::StreamBody::new(frames).boxed_unsync());
        let replay = Replay::new(source, 60, Arc::default());
        let (mut copy, mut other) = (replay.copy().expect("copy"), replay.copy().expect("copy"));
        let attempt = tokio::spawn(replay.reader().expect("attempt").collect());
        let waits = tokio::spawn(async move { next(&mut other).is_none().then_some(other.collect().await) });
        tokio::task::yield_now().await;
        // The last that asked goes away.
        assert_eq!(next(&mut copy), None);
        drop(copy);
        client.send(b"ab").await.expect("read on");
        client.send(b"cd").await.expect("read on");
        drop(client);
        assert_eq!(attempt.await.expect("runs").expect("whole").to_bytes(), "abcd");
        assert_eq!(waits.await.expect("runs").expect("waited").expect("whole").to_bytes(), "abcd");
    }
    #[test]
    fn copies_end_with_the_attempts() {
        let replay = Replay::new(body(&["abcd", "efgh"]), 60, Arc::default());
        let mut copy = replay.copy().expect("copy");
        let mut attempt = replay.reader().expect("attempt");
        assert_eq!(next(&mut attempt), Some(Ok("abcd".into())));
        drop(replay);
        assert_eq!(next(&mut copy), Some(Ok("abcd".into())));
        assert_eq!(next(&mut copy), None, "the attempt may go on");
        drop(attempt);
        assert!(collect(copy).is_err(), "what came is not all");
    }
    #[test]
    fn a_body_of_announced_length_is_whole_without_its_end() {
        let replay = Replay::new(Body::Full(Some(Bytes::from_static(b"abcd"))), 60, Arc::default());
        let copy = replay.copy().expect("copy");
        let mut attempt = replay.reader().expect("attempt");
        assert_eq!(next(&mut attempt), Some(Ok("abcd".into())));
        drop((attempt, replay));
        assert_eq!(collect(copy).expect("whole"), "abcd");
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
        let (b, a) = (replay.copy().expect("b"), replay.reader().expect("a"));
        assert_eq!(collect(a).expect("whole"), "abcd");
        assert_eq!(collect(b).expect("whole"), "abcd");
    }
}
