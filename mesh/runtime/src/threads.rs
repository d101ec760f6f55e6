//! The data threads: one single-threaded tokio runtime per OS thread, so that a connection, its tunnel and its relay live
//! and wake on one thread.
//!
//! Owns the threads, the count of live connections on each and the choice between them. It refuses work stealing: in a
//! proxy the wake-up of another core costs more than the imbalance it cures (spec: 17–19 % of a node agent's CPU on small
//! messages). Balance is made once, when a connection is accepted. Upstream: the process's `main`. Downstream: everyone
//! who spawns a connection.

mod metrics;

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle, LocalOptions};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::sockets::{BoundListener, RawAccepted};

thread_local! {
    static INDEX: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Index of the data thread this code runs on; `None` on the control thread and on any other.
pub fn current() -> Option<usize> {
    INDEX.get()
}

/// A difference in live connections up to this is not worth a hand-over to another thread.
const CLEARLY_FEWER: usize = 4;

/// Most blocking helper threads (file reads, name look-ups) of one data thread. They exist only while they have work.
const MOST_BLOCKING: usize = 8;

/// The running data threads. Dropping it stops them without waiting.
#[derive(Debug)]
pub struct DataThreads {
    workers: Box<[Worker]>,
    stop: watch::Sender<bool>,
    running: Mutex<Vec<Running>>,
}

#[derive(Debug)]
struct Running {
    thread: std::thread::JoinHandle<()>,
    ended: oneshot::Receiver<()>,
}

/// One data thread, seen from anywhere.
#[derive(Clone, Debug)]
pub struct Worker {
    index: usize,
    handle: Handle,
    live: Arc<Live>,
}

/// On its own cache line: every accept of every thread reads all of them.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Live(AtomicUsize);

impl DataThreads {
    /// Starts `count` threads (at least one) named `data-0`, `data-1`, …
    ///
    /// # Errors
    /// The operating system refuses a thread, an epoll instance or an eventfd.
    pub fn start(count: usize) -> io::Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let mut workers = Vec::with_capacity(count.max(1));
        let mut running = Vec::with_capacity(count.max(1));
        for index in 0..count.max(1) {
            // The runtime may not leave the thread it is built on, so only its handle comes back.
            let (started, handle) = std::sync::mpsc::sync_channel(1);
            let (ended_tx, ended) = oneshot::channel();
            let stopped = stopped.clone();
            let thread = std::thread::Builder::new().name(format!("data-{index}")).spawn(move || {
                run(index, stopped, &started);
                let _ = ended_tx.send(());
            })?;
            let handle = handle.recv().map_err(io::Error::other)??;
            workers.push(Worker { index, handle, live: Arc::default() });
            running.push(Running { thread, ended });
        }
        Ok(Self { workers: workers.into(), stop, running: Mutex::new(running) })
    }

    /// All data threads, by index.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Where a new connection should live: on `local` (the thread that accepted it) unless another thread has clearly
    /// fewer live connections, by more than 4 and by more than a quarter. With no `local`, the thread with the fewest.
    ///
    /// The caller takes [`Worker::admit`] at once, so that the next pick sees this one.
    pub fn pick(&self, local: Option<usize>) -> &Worker {
        let least = self.workers.iter().min_by_key(|worker| worker.live());
        let home = local.and_then(|index| self.workers.get(index));
        match (home, least) {
            (Some(home), Some(least)) if !clearly_fewer(least.live(), home.live()) => home,
            (_, Some(least)) => least,
            (Some(home), None) => home,
            (None, None) => unreachable!("start makes at least one worker"),
        }
    }

    /// Accepts connections until `stop` resolves and runs `serve` for each on the thread [`Self::pick`] chooses, where it
    /// counts for as long as `serve` keeps the guard.
    ///
    /// # Errors
    /// The listener cannot be used; a connection that failed before it was accepted is no error.
    pub async fn accept<S, F>(&self, listener: BoundListener, stop: impl Future, serve: S) -> io::Result<()>
    where
        S: Fn(RawAccepted, SocketAddr, LiveGuard) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = listener.into_listener()?;
        let mut stop = pin!(stop);
        loop {
            let (raw, peer) = tokio::select! {
                biased;
                accepted = listener.accept() => accepted?,
                // Accepting first empties the queue of a listener about to close: those clients are already connected.
                _ = &mut stop => return Ok(()),
            };
            let here = current();
            let worker = self.pick(here);
            let task = serve(raw, peer, worker.admit());
            if here == Some(worker.index) {
                tokio::spawn(task);
            } else {
                worker.spawn(task);
            }
        }
    }

    /// Ends all threads: their remaining tasks are dropped, each on its own thread. Call it after the drain.
    ///
    /// Returns `false` when a thread did not end in time (a task that does not yield); that thread is left behind.
    pub async fn stop(&self, limit: Duration) -> bool {
        self.stop.send_replace(true);
        let running = std::mem::take(&mut *self.running.lock());
        let deadline = tokio::time::Instant::now() + limit;
        let mut clean = true;
        for Running { thread, ended } in running {
            match tokio::time::timeout_at(deadline, ended).await {
                // The thread has dropped its runtime and is returning: this join does not block.
                Ok(_) => clean &= thread.join().is_ok(),
                Err(_) => clean = false,
            }
        }
        clean
    }
}

impl Drop for DataThreads {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// The rule of [`DataThreads::pick`].
fn clearly_fewer(candidate: usize, home: usize) -> bool {
    let difference = home.saturating_sub(candidate);
    difference > CLEARLY_FEWER && difference.saturating_mul(4) > home
}

fn run(index: usize, mut stopped: watch::Receiver<bool>, started: &std::sync::mpsc::SyncSender<io::Result<Handle>>) {
    INDEX.set(Some(index));
    let runtime = match Builder::new_current_thread()
        .enable_all()
        // Name of the blocking threads of this runtime (file reads, name look-ups), not of the data thread.
        .thread_name(format!("data-{index}-io"))
        .max_blocking_threads(MOST_BLOCKING)
        .build_local(LocalOptions::default())
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    if started.send(Ok(runtime.handle().clone())).is_err() {
        return;
    }
    // Either outcome ends the thread: told to stop, or the owner is gone.
    runtime.block_on(async move {
        let _ = stopped.wait_for(|stop| *stop).await;
    });
    // A blocking job that hangs must not keep the process alive.
    runtime.shutdown_timeout(Duration::from_millis(100));
}

impl Worker {
    /// Position in [`DataThreads::workers`], the number in the thread's name.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The runtime of this thread.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs `future` on this thread, from any thread.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.handle.spawn(future)
    }

    /// Builds a future on this thread and runs it there; the future itself need not be [`Send`]. Code that already runs
    /// on a data thread calls [`tokio::task::spawn_local`] directly.
    pub fn spawn_local<B, F>(&self, build: B)
    where
        B: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        self.handle.spawn(async move {
            drop(tokio::task::spawn_local(build()));
        });
    }

    /// Live connections counted by [`Self::admit`].
    pub fn live(&self) -> usize {
        self.live.0.load(Ordering::Relaxed)
    }

    /// Counts one connection on this thread until the guard is dropped.
    pub fn admit(&self) -> LiveGuard {
        self.live.0.fetch_add(1, Ordering::Relaxed);
        LiveGuard { live: Arc::clone(&self.live) }
    }
}

/// One live connection of a [`Worker`].
#[derive(Debug)]
#[must_use = "the connection counts only while the guard is held"]
pub struct LiveGuard {
    live: Arc<Live>,
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        self.live.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A worker count that is neither `N` nor `N%`.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("worker threads {0:?}: expected a number, a percentage such as \"50%\", or 0 for all cores")]
pub struct BadWorkerCount(String);

/// How many data threads to start: `setting` is `N`, `N%` of the cores, or `0` for all; without one, a quarter of the
/// cores but at least 2 (the reference node agent's rule for `ZTUNNEL_WORKER_THREADS`).
pub fn worker_count(setting: Option<&str>, cores: usize) -> Result<usize, BadWorkerCount> {
    let cores = cores.max(1);
    let share = |percent: usize| cores.saturating_mul(percent).div_ceil(100);
    let Some(text) = setting.map(str::trim).filter(|text| !text.is_empty()) else {
        return Ok(share(25).max(2));
    };
    let bad = || BadWorkerCount(text.to_owned());
    if let Some(percent) = text.strip_suffix('%') {
        let percent: usize = percent.trim().parse().map_err(|_| bad())?;
        return Ok(share(percent).clamp(1, MOST_WORKERS));
    }
    match text.parse::<usize>().map_err(|_| bad())? {
        0 => Ok(cores),
        count => Ok(count.min(MOST_WORKERS)),
    }
}

/// More threads than any node has cores: a typing error must not exhaust the process table.
const MOST_WORKERS: usize = 1024;

/// The control thread's runtime: everything that is not a connection (sources, identity, admin, reconcilers) runs on the
/// thread of `main`, which calls `block_on` with it.
pub fn control_runtime() -> io::Result<tokio::runtime::Runtime> {
    Builder::new_current_thread().enable_all().thread_name("control-io").max_blocking_threads(MOST_BLOCKING).build()
}

/// Cores this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

#[cfg(test)]
mod tests;
