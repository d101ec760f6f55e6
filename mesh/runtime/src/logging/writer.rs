//! The thread that writes lines out, and the bounded buffer before it.
//!
//! Producers copy a finished line into a shared buffer under a short lock; the thread swaps the buffer out and writes it
//! in one call. It is woken for the first line and then waits a few milliseconds for company, so a busy node pays a handful
//! of wake-ups, not one per connection. When the reader of our output stalls, the buffer fills and further lines are
//! dropped and counted.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tracing::Level;

use super::line::{Format, Line};

/// Most lines waiting to be written.
pub const MAX_LINES: usize = 10_000;
/// Most bytes waiting to be written.
const MAX_BYTES: usize = 16 * 1024 * 1024;
/// Lines that are worth a write of their own.
const BATCH: usize = 64;
/// How long a line waits for company.
const LINGER: Duration = Duration::from_millis(5);
/// A buffer that grew beyond this in a burst is given back.
const KEEP: usize = 256 * 1024;

/// The log's entrance. Cheap to clone. The thread ends, having written everything, when the last clone is gone.
#[derive(Clone, Debug)]
pub struct LogWriter {
    entrance: Arc<Entrance>,
}

#[derive(Debug)]
struct Entrance {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// To the thread: there is a line, a batch, a flush, or the end.
    work: Condvar,
    /// To those who flush: everything up to some line is written.
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    lines: usize,
    /// Submissions taken in and written out since the start.
    taken: u64,
    done: u64,
    flush: bool,
    ended: bool,
}

impl LogWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// The operating system refuses a thread.
    pub fn start(out: Box<dyn Write + Send>, format: Format) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            work: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
        });
        std::thread::Builder::new().name("log".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || run(&shared, out, format)
        })?;
        Ok(Self { entrance: Arc::new(Entrance { shared }) })
    }

    /// Takes a finished line, newline included. Never waits for the output; a line that does not fit is dropped.
    pub fn submit(&self, line: &[u8]) {
        let shared = &*self.entrance.shared;
        let mut waiting = shared.waiting.lock();
        if waiting.lines >= MAX_LINES || waiting.bytes.len().saturating_add(line.len()) > MAX_BYTES {
            drop(waiting);
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.bytes.extend_from_slice(line);
        waiting.lines += 1;
        waiting.taken += 1;
        let wake = waiting.lines == 1 || waiting.lines == BATCH;
        drop(waiting);
        if wake {
            shared.work.notify_one();
        }
    }

    /// [`Self::submit`] of a [`Line`].
    pub fn send(&self, line: Line) {
        line.finish_to(|bytes| self.submit(bytes));
    }

    /// Lines dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.entrance.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until what was submitted before is written. `false` when that takes longer than `limit`.
    pub fn flush(&self, limit: Duration) -> bool {
        let shared = &*self.entrance.shared;
        let deadline = Instant::now() + limit;
        let mut waiting = shared.waiting.lock();
        let target = waiting.taken;
        while waiting.done < target {
            waiting.flush = true;
            shared.work.notify_one();
            if shared.written.wait_until(&mut waiting, deadline).timed_out() {
                return waiting.done >= target;
            }
        }
        true
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        self.shared.waiting.lock().ended = true;
        self.shared.work.notify_one();
    }
}

fn run(shared: &Shared, mut out: Box<dyn Write + Send>, format: Format) {
    let mut bytes = Vec::new();
    let mut reported = 0;
    loop {
        let mut waiting = shared.waiting.lock();
        while waiting.lines == 0 && !waiting.ended {
            shared.work.wait(&mut waiting);
        }
        if waiting.lines == 0 {
            return;
        }
        let linger = Instant::now() + LINGER;
        while waiting.lines < BATCH && !waiting.flush && !waiting.ended {
            if shared.work.wait_until(&mut waiting, linger).timed_out() {
                break;
            }
        }
        std::mem::swap(&mut bytes, &mut waiting.bytes);
        let lines = std::mem::take(&mut waiting.lines);
        waiting.flush = false;
        let taken = waiting.taken;
        drop(waiting);

        // An output that is gone (closed pipe) must not end the process; the loss is at least counted.
        if out.write_all(&bytes).is_err() {
            shared.dropped.fetch_add(lines as u64, Ordering::Relaxed);
        }
        let dropped = shared.dropped.load(Ordering::Relaxed);
        if dropped > reported {
            let mut line =
                Line::new(format, Level::WARN, "logging", "log lines were lost because the output was blocked or failed");
            line.num("dropped", dropped - reported).num("total", dropped);
            let _ = out.write_all(line.finish().as_bytes());
            reported = dropped;
        }
        let _ = out.flush();
        bytes.clear();
        if bytes.capacity() > KEEP {
            bytes = Vec::new();
        }
        shared.waiting.lock().done = taken;
        shared.written.notify_all();
    }
}
