//! Samples of the stacks that use CPU: a timer of the process's CPU time (`ITIMER_PROF`), whose signal is handled by the thread
//! that just ran.
//!
//! Owns the signal `SIGPROF` and the places its handler writes into, which are allocated with the first profile and kept. The
//! handler takes no lock and allocates nothing; what finds no free place is counted as missed. Upstream: [`super::routes`].

use std::collections::HashMap;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::DEPTH;

/// Samples between two collections: 40 000 a second.
const PLACES: usize = 4096;

static PLACES_OF_SAMPLES: OnceLock<Places> = OnceLock::new();
/// A profile is being taken.
static RUNNING: AtomicBool = AtomicBool::new(false);

/// A profile being taken. Ends when dropped.
#[derive(Debug)]
pub struct Sampling {
    period: Duration,
    stacks: HashMap<Box<[usize]>, u64>,
}

impl Sampling {
    /// Starts sampling so many times per second of CPU time. `None`: one is being taken already.
    ///
    /// # Errors
    /// The operating system refuses the signal or the timer.
    pub fn start(frequency: u32) -> io::Result<Option<Self>> {
        let places = PLACES_OF_SAMPLES.get_or_init(Places::new);
        if RUNNING.swap(true, Ordering::AcqRel) {
            return Ok(None);
        }
        let mut this = Self { period: Duration::from_secs(1) / frequency.max(1), stacks: HashMap::new() };
        // What the one before left.
        this.collect();
        this.stacks.clear();
        places.missed.store(0, Ordering::Relaxed);
        let action = SigAction::new(SigHandler::Handler(on_tick), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler only does what a signal handler may: atomics, and walking its own stack.
        unsafe { sigaction(Signal::SIGPROF, &action) }?;
        tick_every(this.period)?;
        Ok(Some(this))
    }

    /// CPU time between two samples.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// Takes in what was sampled since the last time. To be called ten times a second.
    pub fn collect(&mut self) {
        for place in PLACES_OF_SAMPLES.get().into_iter().flat_map(|places| &places.all) {
            let depth = place.depth.load(Ordering::Acquire);
            if depth == FREE || depth == BEING_WRITTEN {
                continue;
            }
            let stack = place.frames.iter().take(depth).map(|frame| frame.load(Ordering::Relaxed)).collect();
            place.depth.store(FREE, Ordering::Release);
            *self.stacks.entry(stack).or_default() += 1;
        }
    }

    /// Ends it: how often each stack was seen.
    pub fn finish(mut self) -> HashMap<Box<[usize]>, u64> {
        self.collect();
        let missed = PLACES_OF_SAMPLES.get().map_or(0, |places| places.missed.load(Ordering::Relaxed));
        if missed > 0 {
            tracing::warn!(missed, "samples of the CPU profile found no place");
        }
        std::mem::take(&mut self.stacks)
    }
}

impl Drop for Sampling {
    fn drop(&mut self) {
        // The handler stays: a signal may be under way, and what it does by default is to end the process.
        if let Err(error) = tick_every(Duration::ZERO) {
            tracing::error!(%error, "the timer of CPU profiles cannot be stopped");
        }
        RUNNING.store(false, Ordering::Release);
    }
}

/// Sets the timer; zero stops it.
fn tick_every(period: Duration) -> io::Result<()> {
    let period = libc::timeval { tv_sec: period.as_secs() as i64, tv_usec: i64::from(period.subsec_micros()) };
    let timer = libc::itimerval { it_interval: period, it_value: period };
    // SAFETY: `timer` is a valid value that outlives the call; the old one is not asked for.
    Errno::result(unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const timer, std::ptr::null_mut()) })?;
    Ok(())
}

const FREE: usize = 0;
const BEING_WRITTEN: usize = usize::MAX;

struct Places {
    all: Box<[Place]>,
    next: AtomicUsize,
    missed: AtomicU64,
}

struct Place {
    /// Frames that are in, [`FREE`] or [`BEING_WRITTEN`].
    depth: AtomicUsize,
    frames: [AtomicUsize; DEPTH],
}

impl Places {
    fn new() -> Self {
        let place = || Place { depth: AtomicUsize::new(FREE), frames: [const { AtomicUsize::new(0) }; DEPTH] };
        let all = std::iter::repeat_with(place).take(PLACES).collect();
        Self { all, next: AtomicUsize::new(0), missed: AtomicU64::new(0) }
    }

    fn sample(&self) {
        let next = self.next.fetch_add(1, Ordering::Relaxed) % PLACES;
        let Some(place) = self.all.get(next) else { return };
        if place.depth.compare_exchange(FREE, BEING_WRITTEN, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut depth = 0;
        // The handler's caller is the way back into the interrupted function.
        walk_stack(on_tick as *const () as usize, 1, |frame| {
            let Some(slot) = place.frames.get(depth) else { return false };
            slot.store(frame, Ordering::Relaxed);
            depth += 1;
            true
        });
        place.depth.store(depth, Ordering::Release);
    }
}

/// Calls `frame` with the return addresses of this thread's stack, innermost first, while it wants more: those of the callers of
/// the function `ours`, less the first `skipped`.
pub(super) fn walk_stack(ours: usize, skipped: usize, mut frame: impl FnMut(usize) -> bool) {
    let mut left = None;
    let step = |at: &backtrace::Frame| match &mut left {
        None => {
            left = (at.symbol_address() as usize == ours).then_some(skipped);
            true
        }
        Some(0) => frame(at.ip() as usize),
        Some(more) => {
            *more -= 1;
            true
        }
    };
    // SAFETY: what must be synchronized is symbolization on Windows; here the unwinder reads the thread's own stack, and finds its
    // tables without a lock (glibc's `_dl_find_object`, as libgcc 12 and later use it).
    unsafe { backtrace::trace_unsynchronized(step) }
}

/// Handles the signal, wherever its thread just is.
#[inline(never)]
extern "C" fn on_tick(_signal: libc::c_int) {
    let errno = Errno::last_raw();
    if RUNNING.load(Ordering::Relaxed)
        && let Some(places) = PLACES_OF_SAMPLES.get()
    {
        places.sample();
    }
    Errno::set_raw(errno);
}
