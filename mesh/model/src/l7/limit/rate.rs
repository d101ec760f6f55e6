//! The arithmetic of a token bucket that refills continuously (Envoy's since 1.33; measured on 1.40, spec/waypoint §10).
//!
//! A bucket is one number: the moment at which it will be full again. It then says for itself, whatever its rate, when
//! nothing is lost by forgetting it.
use std::time::Duration;

/// A moment, in sixteenths of a nanosecond since a moment of the caller's that lies [`EPOCH`] ticks after zero: 27 years fit.
pub type Ticks = u64;
/// What a clock of ticks begins with, so that even the slowest bucket ([`Rate::new`]) can have begun before it.
pub const EPOCH: Ticks = 1 << 62;
/// Of one nanosecond. Finer than that, so that rounding costs a rate of 10 million a second less than 0.1 %.
const TICKS: u64 = 16;
/// Of one second.
pub(super) const SECOND: Ticks = TICKS * 1_000_000_000;

/// The moment `since` after the beginning of a clock.
pub fn moment(since: Duration) -> Ticks {
    EPOCH.saturating_add(ticks(since))
}
fn ticks(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).saturating_mul(TICKS)
}

/// How much a bucket holds and how fast it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rate {
    most: u32,
    /// Time that fills one token, rounded up: never more than asked for.
    cost: u64,
    /// Time that fills it all.
    capacity: u64,
}
/// Why a rate is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// Nothing, or nothing ever again.
    #[error("tokens and interval are at least 1")]
    Zero,
    /// Rounding would take more than 1 % away.
    #[error("more than 10 million tokens a second cannot be counted")]
    TooFast,
    /// The clock ends before.
    #[error("the bucket would take more than 9 years to fill")]
    TooSlow,
}
/// What came of asking a bucket for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// There was one.
    pub allowed: bool,
    /// Whole tokens left.
    pub remaining: u32,
    /// Seconds until there is a token, rounded up; 0 while there is one.
    pub reset: u32,
}

impl Rate {
    /// A bucket of `most` tokens that gains `per_fill` every `interval`, a little at a time.
    pub fn new(most: u32, per_fill: u32, interval: Duration) -> Result<Self, RateError> {
        if most == 0 || per_fill == 0 || interval.is_zero() {
            return Err(RateError::Zero);
        }
        let interval = interval.as_nanos().checked_mul(u128::from(TICKS)).ok_or(RateError::TooSlow)?;
        let cost = interval.div_ceil(u128::from(per_fill));
        if cost < 100 * u128::from(TICKS) {
            return Err(RateError::TooFast);
        }
        let capacity = cost.checked_mul(u128::from(most)).filter(|c| *c < u128::from(EPOCH)).ok_or(RateError::TooSlow)?;
        // Both are below EPOCH now.
        Ok(Self { most, cost: cost as u64, capacity: capacity as u64 })
    }
    /// Tokens of a full bucket.
    pub fn most(self) -> u32 {
        self.most
    }
    /// Asks the bucket that will be full at `full_at` for a token at `now`, which may be a little older than what other
    /// threads saw. A bucket that nobody has asked yet is one that was full at 0.
    pub fn take(self, full_at: &mut Ticks, now: Ticks) -> Taken {
        let missing = full_at.saturating_sub(now);
        let have = self.capacity.saturating_sub(missing);
        let Some(left) = have.checked_sub(self.cost) else {
            let wait = missing.saturating_add(self.cost).saturating_sub(self.capacity);
            return Taken { allowed: false, remaining: 0, reset: seconds(wait) };
        };
        *full_at = (*full_at).max(now).saturating_add(self.cost);
        let remaining = u32::try_from(left / self.cost).unwrap_or(u32::MAX);
        let reset = if remaining > 0 { 0 } else { seconds(self.cost - left) };
        Taken { allowed: true, remaining, reset }
    }
}
fn seconds(ticks: u64) -> u32 {
    u32::try_from(ticks.div_ceil(SECOND)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn rate(most: u32, per_fill: u32, interval: Duration) -> Rate {
        Rate::new(most, per_fill, interval).expect("a rate")
    }
    /// Whether tokens were had at these seconds.
    fn taken(rate: Rate, at: &[f64]) -> Vec<(bool, u32, u32)> {
        let mut bucket = 0;
        at.iter()
            .map(|s| rate.take(&mut bucket, moment(Duration::from_secs_f64(*s))))
            .map(|t| (t.allowed, t.remaining, t.reset))
            .collect()
    }

    #[test]
    fn as_measured_on_envoy() {
        // 2 per minute: the second leaves none, and the next comes after 30 s.
        let two = rate(2, 2, Duration::from_mins(1));
        assert_eq!(taken(two, &[0.0, 0.1, 0.2]), [(true, 1, 0), (true, 0, 30), (false, 0, 30)]);
        let three = rate(3, 3, Duration::from_mins(1));
        assert_eq!(taken(three, &[0.0, 0.0, 0.0, 0.5])[3], (false, 0, 20));
    }
    #[test]
    fn a_bucket_fills_continuously_and_never_beyond_its_size() {
        let two = rate(2, 2, Duration::from_mins(1));
        let got: Vec<bool> = taken(two, &[0.0, 0.0, 29.9, 30.0, 30.1, 1000.0, 1000.0, 1000.0]).iter().map(|t| t.0).collect();
        assert_eq!(got, [true, true, false, true, false, true, true, false]);
    }
    #[test]
    fn burst_and_rate_are_their_own() {
        // Holds 10, gains 1 a second.
        let r = rate(10, 1, SECOND);
        let mut bucket = 0;
        let mut at = |s: u64| (0..20).filter(|_| r.take(&mut bucket, moment(SECOND * s as u32)).allowed).count();
        assert_eq!([at(0), at(1), at(4), at(100)], [10, 1, 3, 10]);
    }
    #[test]
    fn a_clock_seen_late_gives_nothing_away() {
        let r = rate(2, 2, Duration::from_mins(1));
        let mut bucket = 0;
        let got = [1, 0, 1, 1].map(|s| r.take(&mut bucket, moment(SECOND * s)).allowed);
        assert_eq!(got, [true, false, true, false]);
    }
    #[test]
    fn over_any_time_at_most_the_bucket_and_at_least_99_percent() {
        for (most, per_fill, interval) in [(100, 100, 60_000), (2, 3, 1), (7, 1000, 333), (50, 9_999_999, 1000)] {
            let r = rate(most, per_fill, Duration::from_millis(interval));
            let mut bucket = 0;
            let (mut allowed, mut asked) = (0_u64, 0_u64);
            let step = Duration::from_millis(interval) / per_fill / 3;
            let mut now = Duration::ZERO;
            while asked < 300_000 {
                allowed += u64::from(r.take(&mut bucket, moment(now)).allowed);
                asked += 1;
                now += step;
            }
            let ideal = f64::from(most) + now.as_secs_f64() / (interval as f64 / 1000.0) * f64::from(per_fill);
            assert!(allowed as f64 <= ideal, "{allowed} of {ideal}: {r:?}");
            assert!(allowed as f64 >= ideal * 0.99, "{allowed} of {ideal}: {r:?}");
        }
    }
    #[test]
    fn what_cannot_be_counted_is_refused() {
        assert_eq!(Rate::new(0, 1, SECOND), Err(RateError::Zero));
        assert_eq!(Rate::new(1, 0, SECOND), Err(RateError::Zero));
        assert_eq!(Rate::new(1, 1, Duration::ZERO), Err(RateError::Zero));
        assert_eq!(Rate::new(1, u32::MAX, SECOND), Err(RateError::TooFast));
        assert_eq!(Rate::new(u32::MAX, 1, SECOND), Err(RateError::TooSlow));
        assert_eq!(Rate::new(1, 1, Duration::MAX), Err(RateError::TooSlow));
        assert!(Rate::new(1, 10_000_000, SECOND).is_ok());
    }
}
