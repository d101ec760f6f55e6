//! The one task that gets and renews certificates: an actor, so that order of events is all there is to reason about.
//!
//! Per identity: `Queued` (waiting for one of the places at the authority) → `Asking` → `Resting` until renewal or retry.
//! Renewal after two fifths of what was left of the certificate's life when it came, ±10 %; retries after 0.5 s, doubling to 150 s,
//! ±20 % (node-agent §1.8), and sooner as its end comes near. So an authority may be away for half of a certificate's life at any
//! time; with istio/ztunnel's renewal at half of the life it may not. A source that renews by itself is asked when it says so. A waiting connection brings a retry forward to 5 s after the
//! failure.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use mesh_model::SpiffeId;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};

use super::{CacheSettings, Entry, Priority};
use crate::error::IdentityError;
use crate::source::IdentitySource;
use crate::svid::{Svid, TlsContext};

/// Where the answer for one waiting connection goes.
pub(super) type Reply = oneshot::Sender<Result<Arc<Svid>, IdentityError>>;

/// What the rest of the process asks of the task.
pub(super) enum Order {
    /// Get a certificate unless there is one.
    Want { entry: Arc<Entry>, priority: Priority, reply: Option<Reply> },
    /// Drop an identity.
    Forget(Arc<Entry>),
}

const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(150);
/// Demand of connections may bring a retry forward to this long after the failure, no further: a broken authority must not
/// be asked at the rate of the traffic.
const DEMAND_RETRY: Duration = Duration::from_secs(5);
/// The part of a certificate's life after which it is renewed.
const RENEWAL: f64 = 0.4;
/// No renewal sooner than this after a success, whatever dates the certificate shows.
const LEAST_REST: Duration = Duration::from_secs(1);
/// How often the wall clock is compared with the monotonic one, which stands still while a machine sleeps.
const CLOCK_CHECK: Duration = Duration::from_secs(30);
/// A difference up to this is drift, not a jump.
const CLOCK_SLACK: Duration = Duration::from_secs(5);

pub(super) struct Rotation {
    source: Arc<dyn IdentitySource>,
    /// What the source renewed by itself, if it does that.
    renewals: Option<mpsc::UnboundedReceiver<SpiffeId>>,
    tls: TlsContext,
    issue_timeout: Duration,
    concurrency: usize,
    slots: HashMap<SpiffeId, Slot>,
    /// By priority. May hold stale names: a slot is only taken from the queue its phase names.
    queues: [VecDeque<SpiffeId>; 3],
    /// When rests end. May hold stale ones: a slot only wakes at the instant its phase names.
    timers: BinaryHeap<Reverse<(Instant, SpiffeId)>>,
    asking: JoinSet<Result<Svid, IdentityError>>,
    asked: HashMap<task::Id, Arc<Entry>>,
    clocks: (Instant, SystemTime),
}

struct Slot {
    entry: Arc<Entry>,
    phase: Phase,
    /// Failures in a row.
    failures: u32,
    failed_at: Option<Instant>,
    waiting: Vec<Reply>,
    /// The source told of a newer certificate while it was asked.
    again: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queued(Priority),
    Asking,
    Resting { until: Instant },
}

impl Rotation {
    pub(super) fn new(source: Arc<dyn IdentitySource>, tls: TlsContext, settings: &CacheSettings) -> Self {
        let clocks = (Instant::now(), tls.clock().now());
        Self {
            renewals: source.renewals(),
            source,
            tls,
            issue_timeout: settings.issue_timeout,
            concurrency: settings.concurrency.max(1),
            slots: HashMap::new(),
            queues: Default::default(),
            timers: BinaryHeap::new(),
            asking: JoinSet::new(),
            asked: HashMap::new(),
            clocks,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Order>) {
        loop {
            let check = self.clocks.0 + CLOCK_CHECK;
            let wake = self.timers.peek().map_or(check, |Reverse((until, _))| check.min(*until));
            tokio::select! {
                order = inbox.recv() => match order {
                    Some(Order::Want { entry, priority, reply }) => self.want(entry, priority, reply),
                    Some(Order::Forget(entry)) => self.forget(&entry),
                    None => return,
                },
                Some(ended) = self.asking.join_next_with_id() => self.ended(ended),
                Some(id) = renewed(&mut self.renewals) => self.renew(&id),
                () = sleep_until(wake) => {}
            }
            self.check_clocks();
            self.wake();
            self.ask();
        }
    }

    fn want(&mut self, entry: Arc<Entry>, priority: Priority, reply: Option<Reply>) {
        if entry.forgotten.load(Ordering::Acquire) {
            let why = "the workload has left this node".to_owned();
            answer(reply, Err(IdentityError::Refused { id: entry.id.to_string(), why }));
            return;
        }
        if let Some(svid) = entry.load(&self.tls) {
            answer(reply, Ok(svid));
            return;
        }
        let id = entry.id.clone();
        let now = Instant::now();
        let mut queue = None;
        let slot = self.slots.entry(id.clone()).or_insert_with(|| Slot::new(Arc::clone(&entry), now));
        if !Arc::ptr_eq(&slot.entry, &entry) {
            // Forgotten and wanted again before the order to forget arrived.
            *slot = Slot::new(entry, now);
        }
        match slot.phase {
            Phase::Resting { .. } if slot.may_ask(now) => queue = Some(priority),
            Phase::Resting { until } => {
                let failure = slot.entry.failure.lock().clone();
                answer(reply, Err(failure.unwrap_or_else(|| IdentityError::Unavailable("no reason recorded".into()))));
                let sooner = slot.failed_at.map_or(now, |at| at + DEMAND_RETRY);
                if priority == Priority::RealTime && sooner < until {
                    slot.phase = Phase::Resting { until: sooner };
                    self.timers.push(Reverse((sooner, id)));
                }
                return;
            }
            Phase::Queued(queued) if priority < queued => queue = Some(priority),
            Phase::Queued(_) | Phase::Asking => {}
        }
        slot.waiting.extend(reply);
        // Those whose patience ended leave their senders behind.
        if slot.waiting.len().is_power_of_two() {
            slot.waiting.retain(|reply| !reply.is_closed());
        }
        if let Some(priority) = queue {
            slot.phase = Phase::Queued(priority);
            self.enqueue(priority, id);
        }
    }

    /// The source has a newer certificate: it is asked for now, whatever the age of the one in use.
    fn renew(&mut self, id: &SpiffeId) {
        let Some(slot) = self.slots.get_mut(id) else { return };
        match slot.phase {
            Phase::Resting { .. } => {
                slot.phase = Phase::Queued(Priority::Warmup);
                self.enqueue(Priority::Warmup, id.clone());
            }
            // The answer on its way may be the one before.
            Phase::Asking => slot.again = true,
            Phase::Queued(_) => {}
        }
    }

    fn forget(&mut self, entry: &Arc<Entry>) {
        // Timers, queue places and requests under way find no slot, or another entry in it, and do nothing.
        if self.slots.get(&entry.id).is_some_and(|slot| Arc::ptr_eq(&slot.entry, entry)) {
            self.slots.remove(&entry.id);
            self.source.forget(&entry.id);
        }
    }

    fn enqueue(&mut self, priority: Priority, id: SpiffeId) {
        let [real_time, warmup, background] = &mut self.queues;
        match priority {
            Priority::RealTime => real_time.push_back(id),
            Priority::Warmup => warmup.push_back(id),
            Priority::Background => background.push_back(id),
        }
    }

    /// Ends the rests that are over.
    fn wake(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((until, _))) = self.timers.peek() {
            if *until > now {
                return;
            }
            let Some(Reverse((until, id))) = self.timers.pop() else { return };
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            if slot.phase != (Phase::Resting { until }) {
                continue;
            }
            let priority = if slot.entry.load(&self.tls).is_some() { Priority::Background } else { Priority::Warmup };
            slot.phase = Phase::Queued(priority);
            self.enqueue(priority, id);
        }
    }

    /// Fills the places at the authority.
    fn ask(&mut self) {
        const ORDER: [Priority; 3] = [Priority::RealTime, Priority::Warmup, Priority::Background];
        while self.asking.len() < self.concurrency {
            let next = self.queues.iter_mut().zip(ORDER).find_map(|(queue, priority)| Some((queue.pop_front()?, priority)));
            let Some((id, priority)) = next else { return };
            let Some(slot) = self.slots.get_mut(&id) else { continue };
            if slot.phase != Phase::Queued(priority) {
                continue;
            }
            slot.phase = Phase::Asking;
            slot.again = false;
            let (source, tls, limit) = (Arc::clone(&self.source), self.tls.clone(), self.issue_timeout);
            let task = self.asking.spawn(async move {
                match timeout(limit, source.issue(&id)).await {
                    Ok(issued) => Svid::new(&id, issued?, &tls),
                    Err(_) => Err(IdentityError::Timeout { id: id.to_string(), after: limit }),
                }
            });
            self.asked.insert(task.id(), Arc::clone(&slot.entry));
        }
    }

    fn ended(&mut self, ended: Result<(task::Id, Result<Svid, IdentityError>), JoinError>) {
        let (task, outcome) = match ended {
            Ok((task, outcome)) => (task, outcome),
            Err(error) => (error.id(), Err(IdentityError::Unavailable(format!("the source failed: {error}")))),
        };
        let Some(entry) = self.asked.remove(&task) else { return };
        let Some(slot) = self.slots.get_mut(&entry.id).filter(|slot| Arc::ptr_eq(&slot.entry, &entry)) else { return };
        let now = Instant::now();
        let rest = match outcome {
            Ok(svid) => {
                let rest = usable_for(&svid, self.tls.clock().now(), self.renewals.is_some());
                tracing::debug!(id = %svid.id, serial = svid.serial, renewal = ?rest, "certificate issued");
                slot.succeed(Arc::new(svid));
                rest
            }
            Err(error) => {
                let valid = slot.entry.load(&self.tls);
                tracing::warn!(id = %entry.id, %error, still_valid = valid.is_some(), "no new certificate");
                let rest = slot.fail(error, now);
                match valid {
                    // Half of what is left, so that an authority that comes back late is still asked before the end.
                    Some(svid) => {
                        let left = svid.not_after.duration_since(self.tls.clock().now()).unwrap_or_default();
                        rest.min((left / 2).max(FIRST_RETRY))
                    }
                    None => rest,
                }
            }
        };
        let until = if slot.again { now } else { now + rest };
        slot.phase = Phase::Resting { until };
        self.timers.push(Reverse((until, entry.id.clone())));
    }

    /// After a jump of the wall clock (sleep, or set by hand) the rests of good certificates are computed anew.
    fn check_clocks(&mut self) {
        let (now, date) = (Instant::now(), self.tls.clock().now());
        let (then, date_then) = self.clocks;
        if now.duration_since(then) < CLOCK_CHECK {
            return;
        }
        self.clocks = (now, date);
        let expected = date_then + now.duration_since(then);
        let jump = date.duration_since(expected).unwrap_or_else(|behind| behind.duration());
        if jump <= CLOCK_SLACK {
            return;
        }
        tracing::info!(?jump, "the wall clock jumped: checking all certificates");
        for (id, slot) in &mut self.slots {
            if let (Phase::Resting { .. }, 0, Some(svid)) = (slot.phase, slot.failures, slot.entry.current.load_full()) {
                let until = now + usable_for(&svid, date, self.renewals.is_some());
                slot.phase = Phase::Resting { until };
                self.timers.push(Reverse((until, id.clone())));
            }
        }
    }
}

impl Slot {
    /// A new slot rests until now: whoever creates it asks at once.
    fn new(entry: Arc<Entry>, now: Instant) -> Self {
        Self { entry, phase: Phase::Resting { until: now }, failures: 0, failed_at: None, waiting: Vec::new(), again: false }
    }

    /// Whether a request may be made although the rest is not over: never failed, or failed long enough ago.
    fn may_ask(&self, now: Instant) -> bool {
        self.failed_at.is_none_or(|at| now >= at + DEMAND_RETRY)
    }

    fn succeed(&mut self, svid: Arc<Svid>) {
        self.failures = 0;
        self.failed_at = None;
        *self.entry.failure.lock() = None;
        self.entry.current.store(Some(Arc::clone(&svid)));
        if self.entry.forgotten.load(Ordering::Acquire) {
            // `forget` ran between: it must win.
            self.entry.current.store(None);
        }
        for reply in self.waiting.drain(..) {
            answer(Some(reply), Ok(Arc::clone(&svid)));
        }
    }

    /// Records a failure and returns how long to rest.
    fn fail(&mut self, error: IdentityError, now: Instant) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.failed_at = Some(now);
        for reply in self.waiting.drain(..) {
            answer(Some(reply), Err(error.clone()));
        }
        *self.entry.failure.lock() = Some(error);
        retry_after(self.failures).mul_f64(rand::random_range(0.8..=1.2))
    }
}

/// Whoever asked may have gone; that is fine.
fn answer(reply: Option<Reply>, outcome: Result<Arc<Svid>, IdentityError>) {
    if let Some(reply) = reply {
        let _ = reply.send(outcome);
    }
}

/// How long to rest after the n-th failure in a row, before jitter.
fn retry_after(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    FIRST_RETRY.saturating_mul(1 << doublings).min(LAST_RETRY)
}

/// The next identity the source renewed; never, for a source that does not.
async fn renewed(renewals: &mut Option<mpsc::UnboundedReceiver<SpiffeId>>) -> Option<SpiffeId> {
    match renewals {
        Some(renewals) => renewals.recv().await,
        None => std::future::pending().await,
    }
}

/// How long a new certificate is used before the source is asked again: to its end, where the source tells of renewals by itself.
fn usable_for(svid: &Svid, now: SystemTime, source_tells: bool) -> Duration {
    if source_tells {
        return svid.not_after.duration_since(now).unwrap_or_default().max(LEAST_REST);
    }
    until_renewal(svid, now, rand::random_range(-0.1..=0.1))
}

/// How long a new certificate is used before it is renewed, moved by `jitter` (a part of that). Authorities date certificates back
/// (Istio's by two minutes), which says nothing about how long they last.
pub(super) fn until_renewal(svid: &Svid, now: SystemTime, jitter: f64) -> Duration {
    let begin = svid.not_before.max(svid.received);
    let life = svid.not_after.duration_since(begin).unwrap_or_default();
    let renew_at = begin + life.mul_f64(RENEWAL * (1.0 + jitter));
    renew_at.duration_since(now).unwrap_or_default().max(LEAST_REST)
}
