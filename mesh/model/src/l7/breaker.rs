//! Circuit breakers: what is under way towards a destination, counted against its limits (Envoy's thresholds). There is no
//! state of "open": a place is free or it is not.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Counts one up if that stays within `limit`; `u32::MAX` is none. Whoever was counted counts down by itself, once.
pub fn count_up(count: &AtomicU32, limit: u32) -> bool {
    if limit == u32::MAX {
        count.fetch_add(1, Relaxed);
        return true;
    }
    count.fetch_update(Relaxed, Relaxed, |n| (n < limit).then_some(n + 1)).is_ok()
}

/// How many came lately, shared by all threads. Time is passed in, as the time since any fixed moment.
///
/// Counted in parts of the interval: what is a fifteenth older than that still counts, nothing older does.
#[derive(Debug, Default)]
pub struct Lately([AtomicU64; PARTS as usize + 1]);
/// Of an interval; one more is begun.
const PARTS: u64 = 15;
impl Lately {
    /// One comes.
    pub fn note(&self, now: Duration, interval: Duration) {
        let part = part_of(now, interval);
        let Some(count) = self.0.get((part % (PARTS + 1)) as usize) else { return };
        let next = |was: u64| {
            let come = if was >> 32 == part { was & u64::from(u32::MAX) } else { 0 };
            Some(part << 32 | (come + 1).min(u64::from(u32::MAX)))
        };
        // It never gives up.
        let _ = count.fetch_update(Relaxed, Relaxed, next);
    }
    /// How many came in the interval before `now`.
    pub fn count(&self, now: Duration, interval: Duration) -> u32 {
        let part = part_of(now, interval);
        let counts = self.0.iter().map(|count| count.load(Relaxed));
        let lately = counts.filter(|count| part.wrapping_sub(count >> 32) <= PARTS).map(|count| count & u64::from(u32::MAX));
        u32::try_from(lately.sum::<u64>()).unwrap_or(u32::MAX)
    }
}
/// The number of the part that time is in, of those that fit half a word.
fn part_of(now: Duration, interval: Duration) -> u64 {
    let part = (interval.as_micros() / u128::from(PARTS)).max(1);
    // In range by the mask.
    ((now.as_micros() / part) & u128::from(u32::MAX)) as u64
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
    fn who_came_lately_is_forgotten_after_the_interval() {
        let (ms, lately) = (Duration::from_millis, Lately::default());
        let interval = ms(1500);
        assert_eq!(lately.count(ms(0), interval), 0);
        for at in [0, 50, 700, 1400] {
            lately.note(ms(at), interval);
        }
        for (at, want) in
            [(1400, 4), (1500, 4), (1599, 4), (1600, 2), (2200, 2), (2299, 2), (2300, 1), (2999, 1), (3000, 0), (900_000, 0)]
        {
            assert_eq!(lately.count(ms(at), interval), want, "at {at}");
        }
        // What is written over was too old by then.
        lately.note(ms(3000), interval);
        lately.note(ms(3001), interval);
        assert_eq!(lately.count(ms(3100), interval), 2);
        // An interval too short to be told apart is as short as it can be.
        lately.note(ms(4000), Duration::ZERO);
        assert_eq!(lately.count(ms(4001), Duration::ZERO), 0);
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
