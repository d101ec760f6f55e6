//! One way to end things: a [`Drain`] owned by whoever decides, [`DrainWatch`]es held by whoever must end.
//!
//! Owns the announcement and the count of what is still alive; it never closes anything itself. Upstream: signals, the
//! admin endpoint, removal of a pod. Downstream: listeners (close at once), tunnels (GOAWAY), connections (end by the
//! deadline). A watcher that outlives the deadline is reported by [`Drain::finished`], not killed: dropping the runtime does that.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainMode {
    /// No new work; existing connections may end by themselves until the deadline.
    Graceful {
        /// Time from the start of the drain after which what is left is dropped.
        deadline: Duration,
    },
    /// Everything ends now and says nothing: the pod's network is already gone.
    Immediate,
}

/// A drain that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draining {
    /// How.
    pub mode: DrainMode,
    /// The instant after which connections are dropped. Already reached for [`DrainMode::Immediate`].
    pub deadline: Instant,
}

/// What [`Drain::finished`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// Every guard was dropped in time.
    Clean,
    /// The deadline came first; this many guards were still held.
    Abandoned(usize),
}

/// A channel for one drain, with no time limit of its own.
pub fn channel() -> (Drain, DrainWatch) {
    let (tx, rx) = watch::channel(None);
    let held = Arc::new(Held { count: AtomicUsize::new(0), empty: Notify::new() });
    (Drain { tx, held: Arc::clone(&held) }, DrainWatch { rx, held })
}

#[derive(Debug)]
struct Held {
    count: AtomicUsize,
    empty: Notify,
}

/// The deciding side. Dropping it without a decision starts an immediate drain: what has no owner must not run on.
#[derive(Debug)]
pub struct Drain {
    tx: watch::Sender<Option<Draining>>,
    held: Arc<Held>,
}

impl Drain {
    /// Announces the drain. A second call can only make it stricter (an earlier deadline), never undo it.
    pub fn start(&self, mode: DrainMode) {
        let now = Instant::now();
        let deadline = match mode {
            DrainMode::Graceful { deadline } => now + deadline,
            DrainMode::Immediate => now,
        };
        self.tx.send_if_modified(|state| {
            let stricter = state.is_none_or(|current| {
                deadline < current.deadline || (mode == DrainMode::Immediate && current.mode != DrainMode::Immediate)
            });
            if stricter {
                *state = Some(Draining { mode, deadline });
            }
            stricter
        });
    }

    /// Whether [`Self::start`] was called.
    pub fn is_draining(&self) -> bool {
        self.tx.borrow().is_some()
    }

    /// One more watcher of this drain.
    pub fn watch(&self) -> DrainWatch {
        DrainWatch { rx: self.tx.subscribe(), held: Arc::clone(&self.held) }
    }

    /// Guards held now.
    pub fn held(&self) -> usize {
        self.held.count.load(Ordering::Acquire)
    }

    /// Waits until the drain has been started and every guard is gone, or its deadline has passed.
    ///
    /// An immediate drain still gives watchers one second to run their destructors.
    pub async fn finished(&self) -> Finished {
        const GRACE: Duration = Duration::from_secs(1);
        let mut rx = self.tx.subscribe();
        loop {
            let started = match rx.wait_for(Option::is_some).await {
                Ok(state) => *state,
                Err(_) => return Finished::Clean, // unreachable while `self.tx` lives
            };
            rx.mark_unchanged();
            let Some(draining) = started else { continue };
            let limit = match draining.mode {
                DrainMode::Graceful { .. } => draining.deadline,
                DrainMode::Immediate => draining.deadline + GRACE,
            };
            tokio::select! {
                biased;
                () = self.emptied() => return Finished::Clean,
                () = tokio::time::sleep_until(limit) => return Finished::Abandoned(self.held()),
                // A stricter drain was announced: wait for its deadline instead.
                _ = rx.changed() => {}
            }
        }
    }

    async fn emptied(&self) {
        loop {
            let notified = self.held.empty.notified();
            tokio::pin!(notified);
            // Registered before the count is read, so that the last drop cannot be missed.
            notified.as_mut().enable();
            if self.held() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// The ending side. Cheap to clone; watching alone does not hold the drain up, a [`DrainGuard`] does.
#[derive(Clone, Debug)]
pub struct DrainWatch {
    rx: watch::Receiver<Option<Draining>>,
    held: Arc<Held>,
}

impl DrainWatch {
    /// Resolves when the drain starts (at once if it already has). Cancel safe.
    pub async fn draining(&self) -> Draining {
        let mut rx = self.rx.clone();
        let state = rx.wait_for(Option::is_some).await.ok().and_then(|state| *state);
        state.unwrap_or_else(abandoned)
    }

    /// Resolves when what is left must be dropped: the deadline of a graceful drain, the start of an immediate one.
    pub async fn expired(&self) {
        let mut rx = self.rx.clone();
        loop {
            let Some(draining) = rx.wait_for(Option::is_some).await.ok().and_then(|state| *state) else { return };
            if draining.mode == DrainMode::Immediate {
                return;
            }
            rx.mark_unchanged();
            tokio::select! {
                () = tokio::time::sleep_until(draining.deadline) => return,
                changed = rx.changed() => if changed.is_err() {
                    // The owner went away after a graceful start (it waited for `finished`): its deadline still holds.
                    tokio::time::sleep_until(draining.deadline).await;
                    return;
                },
            }
        }
    }

    /// The drain in progress, if any. One atomic load and a short read lock.
    pub fn current(&self) -> Option<Draining> {
        match *self.rx.borrow() {
            Some(draining) => Some(draining),
            None => self.rx.has_changed().is_err().then(abandoned),
        }
    }

    /// Whether the drain has started.
    pub fn is_draining(&self) -> bool {
        self.current().is_some()
    }

    /// Counts one live thing; [`Drain::finished`] waits for its drop.
    pub fn guard(&self) -> DrainGuard {
        self.held.count.fetch_add(1, Ordering::Relaxed);
        DrainGuard { held: Arc::clone(&self.held) }
    }
}

/// The owner is gone without a word.
fn abandoned() -> Draining {
    Draining { mode: DrainMode::Immediate, deadline: Instant::now() }
}

/// One live thing that a drain waits for.
#[derive(Debug)]
#[must_use = "the drain waits only while the guard is held"]
pub struct DrainGuard {
    held: Arc<Held>,
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        if self.held.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.held.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests;
