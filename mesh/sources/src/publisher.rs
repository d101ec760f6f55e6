//! The sole writer of the mesh: changes come in from sources, one immutable version after another goes out.
//!
//! Owns coalescing (a burst of changes becomes one version) and the release of old versions away from the data
//! threads. Refuses nothing: a change that reaches it has been checked by its source. Upstream: [`crate::Source`]s
//! through a [`ChangeSink`]. Downstream: every connection, through [`Mesh`].

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use mesh_model::snapshot::Viewpoint;
use mesh_model::wanted::Wanted;
use mesh_model::{Change, Snapshot, Version};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::demand::{Demand, Fetched, Noted};

/// Time between two versions where changes do not end: what changes meanwhile becomes one.
const PACE: Duration = Duration::from_millis(10);
/// How far ahead of that pace versions may be: after a quiet time so many changes in a row (three) are published at once, each
/// by itself, as of a file that is removed and written anew.
const AHEAD: Duration = Duration::from_millis(20);
/// Changes after which a version is published without waiting for more.
const ENOUGH: usize = 50_000;
/// Changes above which a version is made on a helper thread, so that the control thread keeps answering.
const LARGE: usize = 2_000;

/// The mesh as of now. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Mesh {
    current: Arc<ArcSwap<Snapshot>>,
    version: watch::Receiver<Version>,
    synced: watch::Receiver<bool>,
    demand: Option<Demand>,
}
impl Mesh {
    /// The current version, for the data path: no reference count is touched. Never hold it across an `.await`.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }
    /// The current version, to keep.
    pub fn load_full(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }
    /// Tells of new versions.
    pub fn watch(&self) -> watch::Receiver<Version> {
        self.version.clone()
    }
    /// Whether every source has told all it knew at start, and that is published.
    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }
    /// Resolves when [`Self::is_synced`] is true; never if a source died before.
    pub async fn synced(&self) {
        let mut rx = self.synced.clone();
        if rx.wait_for(|s| *s).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
    /// The same, of which parts are told on demand only.
    #[must_use]
    pub fn on_demand(self, demand: Option<Demand>) -> Self {
        Self { demand, ..self }
    }
    /// What was asked for, where the mesh is told on demand; `None` where all of it is.
    pub fn demand(&self) -> Option<&Demand> {
        self.demand.as_ref()
    }
    /// Asks for a part of the mesh, unless somebody has, and waits until it is there or known not to be, for `limit` at most.
    pub async fn fetch(&self, wanted: &Wanted, limit: Duration) -> Fetched {
        let Some(demand) = &self.demand else { return Fetched::Absent };
        let (mut versions, mut settled) = (self.version.clone(), demand.settled());
        let answered = async {
            loop {
                versions.mark_unchanged();
                settled.mark_unchanged();
                if wanted.is_in(&self.load()) {
                    return Fetched::Found;
                }
                match demand.ask(wanted) {
                    Noted::Wait => {}
                    Noted::Absent => return Fetched::Absent,
                    Noted::Full => return Fetched::Unanswered,
                }
                tokio::select! {
                    Ok(()) = versions.changed() => {}
                    Ok(()) = settled.changed() => {}
                    else => return Fetched::Unanswered,
                }
            }
        };
        tokio::time::timeout(limit, answered).await.unwrap_or(Fetched::Unanswered)
    }
    /// A mesh that never changes, for tests and tools.
    pub fn fixed(snapshot: Snapshot) -> Self {
        let version = snapshot.version();
        Self {
            current: Arc::new(ArcSwap::from_pointee(snapshot)),
            version: watch::channel(version).1,
            synced: watch::channel(true).1,
            demand: None,
        }
    }
}

#[derive(Debug)]
struct Batch {
    changes: Vec<Change>,
    synced: bool,
}

/// Where a source puts its changes.
#[derive(Debug)]
pub struct ChangeSink {
    tx: mpsc::Sender<Batch>,
    told: bool,
}
/// The publisher is gone: the process is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nobody publishes any more")]
pub struct Closed;

impl ChangeSink {
    fn batch(&mut self, changes: Vec<Change>) -> Batch {
        Batch { changes, synced: !std::mem::replace(&mut self.told, true) }
    }
    /// Hands over changes. The first call, even without changes, says that this source is in sync.
    pub async fn send(&mut self, changes: Vec<Change>) -> Result<(), Closed> {
        let batch = self.batch(changes);
        self.tx.send(batch).await.map_err(|_| Closed)
    }
    /// The same from a thread without runtime.
    pub fn send_blocking(&mut self, changes: Vec<Change>) -> Result<(), Closed> {
        let batch = self.batch(changes);
        self.tx.blocking_send(batch).map_err(|_| Closed)
    }
    /// Whether anything was handed over yet.
    pub fn has_told(&self) -> bool {
        self.told
    }
    /// Tells, from anywhere, whether the publisher is gone.
    pub fn closed_probe(&self) -> impl Fn() -> bool + use<> {
        let tx = self.tx.clone();
        move || tx.is_closed()
    }
    /// Whether the publisher is gone.
    pub fn is_closed(&self) -> bool {
        self.tx.is_closed()
    }
}

/// What a source tells another one, which joins it with what it knows itself.
#[derive(Debug)]
pub struct Relay {
    rx: mpsc::Receiver<Batch>,
}
impl Relay {
    /// The next changes; the first are all that was known at start. `None`: nothing more will come.
    pub async fn next(&mut self) -> Option<Vec<Change>> {
        self.rx.recv().await.map(|batch| batch.changes)
    }
}

/// A sink whose changes go to another source.
pub fn relay() -> (ChangeSink, Relay) {
    let (tx, rx) = mpsc::channel(16);
    (ChangeSink { tx, told: false }, Relay { rx })
}

/// The writer. Run it on the control runtime.
#[derive(Debug)]
pub struct Publisher {
    current: Arc<ArcSwap<Snapshot>>,
    version: watch::Sender<Version>,
    synced: watch::Sender<bool>,
    rx: mpsc::Receiver<Batch>,
    /// Sources that have not told their first batch.
    waiting: usize,
    /// The version before: the last reference to it must not fall on a data thread, so it is held until the next.
    previous: Option<Arc<Snapshot>>,
}

/// A mesh, its writer and one sink for each of `sources` sources.
pub fn channel(view: Viewpoint, sources: usize) -> (Mesh, Publisher, Vec<ChangeSink>) {
    let current = Arc::new(ArcSwap::from_pointee(Snapshot::empty(view)));
    let (version, version_rx) = watch::channel(0);
    let (synced, synced_rx) = watch::channel(sources == 0);
    let (tx, rx) = mpsc::channel(16);
    let sinks = (0..sources).map(|_| ChangeSink { tx: tx.clone(), told: false }).collect();
    let mesh = Mesh { current: Arc::clone(&current), version: version_rx, synced: synced_rx, demand: None };
    (mesh, Publisher { current, version, synced, rx, waiting: sources, previous: None }, sinks)
}

impl Publisher {
    /// Publishes until every sink is dropped.
    pub async fn run(mut self) {
        let mut due = Instant::now();
        while let Some(first) = self.rx.recv().await {
            let (mut changes, mut newly_synced) = (first.changes, usize::from(first.synced));
            while changes.len() < ENOUGH {
                match tokio::time::timeout_at(due, self.rx.recv()).await {
                    Ok(Some(more)) => {
                        newly_synced += usize::from(more.synced);
                        changes.extend(more.changes);
                    }
                    Ok(None) | Err(_) => break,
                }
            }
            self.publish(changes, newly_synced).await;
            let now = Instant::now();
            due = due.max(now.checked_sub(AHEAD).unwrap_or(now)) + PACE;
        }
    }

    async fn publish(&mut self, changes: Vec<Change>, newly_synced: usize) {
        if changes.is_empty() && newly_synced == 0 {
            return;
        }
        let started = Instant::now();
        let (count, old) = (changes.len(), self.current.load_full());
        let next = if count > LARGE {
            let base = Arc::clone(&old);
            match tokio::task::spawn_blocking(move || base.apply(&changes)).await {
                Ok(next) => next,
                Err(e) => {
                    tracing::error!(error = %e, changes = count, "a version could not be made; the mesh stays as it was");
                    return;
                }
            }
        } else {
            old.apply(&changes)
        };
        let version = next.version();
        self.previous = Some(self.current.swap(Arc::new(next)));
        drop(old);
        self.waiting = self.waiting.saturating_sub(newly_synced);
        self.version.send_replace(version);
        if self.waiting == 0 {
            self.synced.send_replace(true);
        }
        tracing::debug!(version, changes = count, took = ?started.elapsed(), "published");
    }
}

#[cfg(test)]
mod tests;
