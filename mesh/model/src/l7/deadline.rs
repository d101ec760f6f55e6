//! How long a request may take: what its route says, and what a call of gRPC asks for (Envoy's router; gRPC over HTTP/2).
use http::HeaderValue;
use std::ops::Add;
use std::time::Duration;

/// How long the whole exchange may take: the route's limit; a gRPC call may ask for less, or for any time where there is none.
pub fn limit(route: Option<Duration>, asked: Option<Duration>) -> Option<Duration> {
    match (asked, route) {
        (Some(asked), Some(route)) => Some(asked.min(route)),
        (asked, route) => asked.or(route),
    }
}

/// Limits of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of all attempts, from the end of the request on.
    pub whole: Option<Duration>,
    /// Of each, from its own beginning or the end of the request on, whichever is later.
    pub per_try: Option<Duration>,
}
impl Limits {
    /// When an attempt that `started` then is over, and whether by its own limit, for a request that `ended` then. Moments are of
    /// any clock.
    pub fn end<I: Copy + Ord + Add<Duration, Output = I>>(self, started: I, ended: I) -> Option<(I, bool)> {
        match (self.whole.map(|t| ended + t), self.per_try.map(|t| ended.max(started) + t)) {
            (whole, Some(own)) if whole.is_none_or(|whole| own < whole) => Some((own, true)),
            (whole, _) => whole.map(|whole| (whole, false)),
        }
    }
}

/// Milliseconds as the endpoint is told them: whole ones, at least one, because 0 would mean no limit.
pub fn milliseconds(limit: Duration) -> u64 {
    u64::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(u64::MAX).max(1)
}

/// `grpc-timeout`: up to eight digits and a unit (gRPC over HTTP/2), rounded up to milliseconds. What is none is no limit.
pub fn grpc_timeout(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let ms = match unit {
        b'H' => number * 3_600_000,
        b'M' => number * 60_000,
        b'S' => number * 1000,
        b'm' => number,
        b'u' => number.div_ceil(1000),
        b'n' => number.div_ceil(1_000_000),
        _ => return None,
    };
    (ms > 0).then(|| Duration::from_millis(ms))
}

/// The same of so many milliseconds, in the finest of the units that holds it in eight digits.
pub fn grpc_timeout_value(ms: u64) -> Option<HeaderValue> {
    const MOST: u64 = 99_999_999;
    let text = match ms {
        0..=MOST => format!("{ms}m"),
        _ if ms / 1000 <= MOST => format!("{}S", ms / 1000),
        _ => format!("{}M", (ms / 60_000).min(MOST)),
    };
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_call_may_ask_for_less_and_where_nothing_is_said_for_anything() {
        for (route, asked, want) in [
            (None, None, None),
            (Some(100), None, Some(100)),
            (None, Some(100), Some(100)),
            (Some(100), Some(50), Some(50)),
            (Some(100), Some(500), Some(100)),
        ] {
            assert_eq!(limit(route.map(ms), asked.map(ms)), want.map(ms), "{route:?} {asked:?}");
        }
    }
    #[test]
    fn the_earlier_limit_ends_an_attempt() {
        // Whole and own limit, when the attempt began and the request ended, and what ends it when.
        for (whole, per_try, started, ended, want) in [
            (None, None, 0, 0, None),
            (Some(100), None, 0, 0, Some((100, false))),
            (None, Some(30), 0, 0, Some((30, true))),
            (Some(100), Some(30), 0, 0, Some((30, true))),
            // The third attempt has what is left of the whole.
            (Some(100), Some(30), 80, 0, Some((100, false))),
            // Both at once: nothing is left to try in.
            (Some(100), Some(30), 70, 0, Some((100, false))),
            // A slow upload is the client's time, of every attempt.
            (Some(100), Some(30), 0, 500, Some((530, true))),
            (Some(100), None, 0, 500, Some((600, false))),
            (Some(20), Some(30), 0, 500, Some((520, false))),
        ] {
            let limits = Limits { whole: whole.map(ms), per_try: per_try.map(ms) };
            let got = limits.end(ms(started), ms(ended));
            assert_eq!(got, want.map(|(at, own)| (ms(at), own)), "{limits:?} {started} {ended}");
        }
    }
    #[test]
    fn deadlines_of_calls() {
        for (text, want) in [
            ("1H", Some(3_600_000)),
            ("2M", Some(120_000)),
            ("5S", Some(5000)),
            ("150m", Some(150)),
            ("1u", Some(1)),
            ("1001u", Some(2)),
            ("1n", Some(1)),
            ("99999999n", Some(100)),
            ("99999999H", Some(359_999_996_400_000)),
            ("0S", None),
            ("", None),
            ("S", None),
            ("5", None),
            ("5s", None),
            ("5 S", None),
            ("-5S", None),
            ("1.5S", None),
            ("123456789m", None),
        ] {
            assert_eq!(grpc_timeout(&HeaderValue::from_static(text)), want.map(ms), "{text:?}");
        }
    }
    #[test]
    fn what_the_endpoint_is_told() {
        for (limit, told, text) in [
            (Duration::ZERO, 1, "1m"),
            (Duration::from_nanos(1), 1, "1m"),
            (Duration::from_micros(1500), 2, "2m"),
            (ms(1000), 1000, "1000m"),
            (ms(99_999_999), 99_999_999, "99999999m"),
            (ms(100_000_000), 100_000_000, "100000S"),
            (ms(99_999_999_000), 99_999_999_000, "99999999S"),
            (ms(100_000_000_000), 100_000_000_000, "1666666M"),
            (Duration::MAX, u64::MAX, "99999999M"),
        ] {
            assert_eq!(milliseconds(limit), told, "{limit:?}");
            assert_eq!(grpc_timeout_value(told).expect(text), text, "{limit:?}");
        }
    }
}
