//! One process-wide budget of bytes for buffers whose size a peer can influence (HTTP/2 windows, relay buffers).
//!
//! Owns the counter, nothing else: it allocates nothing and never waits. A caller that is refused keeps what it has (a
//! smaller window), so running out of budget makes connections slower, never dead.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A shared limit in bytes. Cheap to clone; all clones count against the same limit.
#[derive(Clone, Debug)]
pub struct Budget {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    /// A budget of `limit` bytes, nothing reserved yet.
    pub fn new(limit: usize) -> Self {
        Self { inner: Arc::new(Inner { limit, used: AtomicUsize::new(0) }) }
    }

    /// Takes `bytes` out of the budget, or `None` when they do not fit. Never blocks.
    pub fn try_reserve(&self, bytes: usize) -> Option<Reservation> {
        self.take(bytes).then(|| Reservation { inner: Arc::clone(&self.inner), bytes })
    }

    /// The limit in bytes.
    pub fn limit(&self) -> usize {
        self.inner.limit
    }

    /// Bytes reserved now.
    pub fn used(&self) -> usize {
        self.inner.used.load(Ordering::Relaxed)
    }

    /// Bytes that could still be reserved.
    pub fn available(&self) -> usize {
        self.inner.limit.saturating_sub(self.used())
    }

    fn take(&self, bytes: usize) -> bool {
        self.inner.take(bytes)
    }
}

impl Inner {
    fn take(&self, bytes: usize) -> bool {
        // Relaxed: the counter guards no other memory.
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| used.checked_add(bytes).filter(|sum| *sum <= self.limit))
            .is_ok()
    }
}

/// Bytes taken from a [`Budget`]; dropping it gives them back.
#[derive(Debug)]
#[must_use = "dropping a reservation returns the bytes at once"]
pub struct Reservation {
    inner: Arc<Inner>,
    bytes: usize,
}

impl Reservation {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes `more` bytes on top; `false` leaves the reservation as it is.
    pub fn try_grow(&mut self, more: usize) -> bool {
        let granted = self.inner.take(more);
        if granted {
            self.bytes += more;
        }
        granted
    }

    /// Gives back everything above `bytes`.
    pub fn shrink_to(&mut self, bytes: usize) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.inner.used.fetch_sub(surplus, Ordering::Relaxed);
        self.bytes -= surplus;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.inner.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reservation_counts_until_it_is_dropped() {
        let budget = Budget::new(100);
        let a = budget.try_reserve(60).unwrap();
        assert!(budget.try_reserve(41).is_none());
        let mut b = budget.try_reserve(30).unwrap();
        assert_eq!(budget.available(), 10);
        assert!(!b.try_grow(11));
        assert!(b.try_grow(10));
        assert_eq!(b.bytes(), 40);
        drop(a);
        b.shrink_to(5);
        assert_eq!(budget.used(), 5);
        b.shrink_to(50);
        assert_eq!(b.bytes(), 5);
        drop(b);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn an_absurd_request_is_refused_not_wrapped() {
        let budget = Budget::new(usize::MAX);
        let _held = budget.try_reserve(1).unwrap();
        assert!(budget.try_reserve(usize::MAX).is_none());
    }

    #[test]
    fn threads_never_overdraw_it() {
        let budget = Budget::new(1000);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        if let Some(held) = budget.try_reserve(300) {
                            assert!(budget.used() <= 1000);
                            drop(held);
                        }
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
    }
}
