//! Samples of what is allocated: [`Sampled`] around the program's allocator takes one about every 512 KiB while it is told to, and
//! forgets it when the memory is freed.
//!
//! Owns the samples. What was allocated before it is activated is not seen. Upstream: [`super::routes`], and each program's `main`,
//! which chooses its allocator.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use parking_lot::Mutex;

use super::DEPTH;
use super::cpu::walk_stack;

/// Bytes between two samples, on average: what jemalloc and Go take.
pub(super) const RATE: usize = 512 << 10;
/// Most samples that are kept: 50 GB of small pieces. More are not taken.
const MOST: usize = 100_000;
const MARKS: usize = 1 << 16;

static ACTIVE: AtomicBool = AtomicBool::new(false);
/// The program's allocator is a [`Sampled`] one.
static THERE: AtomicBool = AtomicBool::new(false);
static SAMPLES: Mutex<BTreeMap<usize, Sample>> = Mutex::new(BTreeMap::new());
/// How many samples have an address of this hash: an address that has none is freed without looking further.
static SAMPLED: [AtomicU16; MARKS] = [const { AtomicU16::new(0) }; MARKS];

thread_local! {
    /// Bytes until the next sample, and the state of what draws that.
    static LEFT: Cell<(isize, u64)> = const { Cell::new((0, 0)) };
    /// This thread is in here: what it allocates is ours.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// An allocator that can be asked what is allocated. As `#[global_allocator]` only.
#[derive(Debug)]
pub struct Sampled<A>(pub A);

// SAFETY: every call goes to the inner allocator as it came, and its answer back; the address is only looked at as a number.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Sampled<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's promise.
        let at = unsafe { self.0.alloc(layout) };
        allocated(at, layout.size());
        at
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: by the caller's promise.
        let at = unsafe { self.0.alloc_zeroed(layout) };
        allocated(at, layout.size());
        at
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        freed(at);
        // SAFETY: by the caller's promise.
        let at = unsafe { self.0.realloc(at, layout, size) };
        allocated(at, size);
        at
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // Before another thread can have the address.
        freed(at);
        // SAFETY: by the caller's promise.
        unsafe { self.0.dealloc(at, layout) }
    }
}

#[inline]
fn allocated(at: *mut u8, size: usize) {
    if ACTIVE.load(Ordering::Relaxed) {
        count(at as usize, size);
    }
}
#[inline]
fn freed(at: *mut u8) {
    if ACTIVE.load(Ordering::Relaxed) {
        forget(at as usize);
    }
}

/// An allocation that was sampled and not freed.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// Bytes that were asked for.
    pub size: usize,
    /// Who asked, innermost first.
    pub stack: Box<[usize]>,
}
impl Sample {
    /// Objects and bytes it stands for: one of `size` bytes is sampled with the probability 1 − e^(−size/rate).
    pub fn stands_for(&self) -> [u64; 2] {
        let objects = 1.0 / -(-(self.size as f64) / RATE as f64).exp_m1();
        [objects.round() as u64, (objects * self.size as f64).round() as u64]
    }
}

/// Not inlined: what called it is what is told.
#[cold]
#[inline(never)]
fn count(at: usize, size: usize) {
    THERE.store(true, Ordering::Relaxed);
    // A thread that ends has none of this any more; what it allocates then is not seen.
    let Ok((left, state)) = LEFT.try_with(Cell::get) else { return };
    let size_here = isize::try_from(size).unwrap_or(isize::MAX);
    let (left, state) = if state == 0 { draw(LEFT.with(|left| std::ptr::from_ref(left) as u64) | 1) } else { (left, state) };
    let rest = left.saturating_sub(size_here);
    if rest > 0 {
        return LEFT.set((rest, state));
    }
    LEFT.set(draw(state));
    if at != 0 && !INSIDE.replace(true) {
        sample(at, size);
        INSIDE.set(false);
    }
}

/// An exponentially distributed distance, and the next state (xorshift64).
fn draw(mut state: u64) -> (isize, u64) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    let share = ((state >> 11) + 1) as f64 / (1u64 << 53) as f64;
    ((-share.ln() * RATE as f64) as isize + 1, state)
}

fn sample(at: usize, size: usize) {
    let (mut frames, mut depth) = ([0; DEPTH], 0);
    walk_stack(count as *const () as usize, 0, |frame| {
        let Some(slot) = frames.get_mut(depth) else { return false };
        *slot = frame;
        depth += 1;
        true
    });
    let stack = frames.get(..depth).unwrap_or_default().into();
    let mut samples = SAMPLES.lock();
    if samples.len() < MOST && samples.insert(at, Sample { size, stack }).is_none() {
        mark(at).fetch_add(1, Ordering::Relaxed);
    }
}

#[cold]
#[inline(never)]
fn forget(at: usize) {
    if mark(at).load(Ordering::Relaxed) == 0 || INSIDE.try_with(|inside| inside.replace(true)).unwrap_or(true) {
        return;
    }
    let gone = SAMPLES.lock().remove(&at);
    if gone.is_some() {
        mark(at).fetch_sub(1, Ordering::Relaxed);
    }
    drop(gone);
    INSIDE.set(false);
}

fn mark(at: usize) -> &'static AtomicU16 {
    // Fibonacci hashing: the upper 16 bits, less than `MARKS`.
    let hash = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
    #[allow(clippy::indexing_slicing, reason = "16 bits are less than MARKS")]
    &SAMPLED[hash as usize]
}

/// Begins to take samples. `false`: the program has another allocator.
pub fn activate() -> bool {
    if !ACTIVE.load(Ordering::Relaxed) {
        clear();
        ACTIVE.store(true, Ordering::Relaxed);
        drop(std::hint::black_box(Box::new(0u8)));
        if !THERE.load(Ordering::Relaxed) {
            deactivate();
        }
    }
    ACTIVE.load(Ordering::Relaxed)
}

/// Takes no more samples, and forgets those there are.
pub fn deactivate() {
    ACTIVE.store(false, Ordering::Relaxed);
    clear();
}

fn clear() {
    let inside = INSIDE.replace(true);
    let mut samples = SAMPLES.lock();
    for (at, _) in std::mem::take(&mut *samples) {
        mark(at).fetch_sub(1, Ordering::Relaxed);
    }
    drop(samples);
    INSIDE.set(inside);
}

/// What is allocated since it was activated, as far as it was sampled.
pub(super) fn live() -> Option<Vec<Sample>> {
    if !ACTIVE.load(Ordering::Relaxed) {
        return None;
    }
    let inside = INSIDE.replace(true);
    let samples = SAMPLES.lock().values().cloned().collect();
    INSIDE.set(inside);
    Some(samples)
}
