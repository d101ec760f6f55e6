//! Circuit breakers: what is under way towards a destination, counted against its limits (Envoy's thresholds). There is no
//! state of "open": a place is free or it is not.
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Counts one up if that stays within `limit`; `u32::MAX` is none. Whoever was counted counts down by itself, once.
pub fn count_up(count: &AtomicU32, limit: u32) -> bool {
    if limit == u32::MAX {
        count.fetch_add(1, Relaxed);
        return true;
    }
    count.fetch_update(Relaxed, Relaxed, |n| (n < limit).then_some(n + 1)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_or_it_is_not() {
        for (before, limit, fits) in [
            (0, 0, false),
            (0, 1, true),
            (1, 1, false),
            (4, 5, true),
            (5, 5, false),
            // A limit that was lowered: those of before stay, nobody is added.
            (9, 5, false),
            // One who may always (a pool's first connection) is counted beyond the limit.
            (u32::MAX - 1, u32::MAX - 1, false),
            (1_000_000, u32::MAX, true),
        ] {
            let count = AtomicU32::new(before);
            assert_eq!(count_up(&count, limit), fits, "{before} of {limit}");
            assert_eq!(count.load(Relaxed), before + u32::from(fits), "{before} of {limit}");
        }
    }
    #[test]
    fn threads_that_ask_together_get_exactly_the_places() {
        let count = AtomicU32::new(0);
        let got: u32 = std::thread::scope(|scope| {
            let all: Vec<_> =
                (0..4).map(|_| scope.spawn(|| (0..1000).map(|_| u32::from(count_up(&count, 1500))).sum::<u32>())).collect();
            all.into_iter().map(|one| one.join().expect("no panic")).sum()
        });
        assert_eq!((got, count.load(Relaxed)), (1500, 1500));
    }
}
