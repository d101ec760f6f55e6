//! Durations as people write them: `5m`, `100ms`, `1h30m`.

use std::fmt::Write;
use std::time::Duration;

/// A text that is not a duration.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a duration such as \"5m\", \"100ms\" or \"1h30m\"")]
pub struct BadDuration(String);

const NANOS: [(&str, u128); 8] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("µs", 1_000),
    ("ns", 1),
];

/// Longest whole-number part accepted, in digits; keeps the arithmetic far from overflow.
const MOST_DIGITS: usize = 18;

/// Reads a sum of numbers with units (d, h, m, s, ms, us, ns). A bare number is seconds. Fractions such as `1.5s` work;
/// negative durations do not.
pub fn parse_duration(text: &str) -> Result<Duration, BadDuration> {
    let bad = || BadDuration(text.to_owned());
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(bad());
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() || whole.len() > MOST_DIGITS || fraction.len() > MOST_DIGITS {
            return Err(bad());
        }
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at_checked(end).ok_or_else(bad)?;
        let unit = match unit.trim() {
            // Only as the whole text: "1h30" would be a guess.
            "" if rest.len() == text.trim().len() && after.is_empty() => "s",
            unit => unit,
        };
        let (_, nanos) = NANOS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
        let whole: u128 = whole.parse().map_err(|_| bad())?;
        let mut part = whole.checked_mul(*nanos).ok_or_else(bad)?;
        if !fraction.is_empty() {
            let digits: u128 = fraction.parse().map_err(|_| bad())?;
            part += digits * nanos / 10u128.pow(fraction.len() as u32);
        }
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = after.trim_start();
    }
    let seconds = u64::try_from(total / 1_000_000_000).map_err(|_| bad())?;
    // The remainder is below a billion.
    Ok(Duration::new(seconds, (total % 1_000_000_000) as u32))
}

fn digits(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or((text, ""))
}

/// Writes a duration so that [`parse_duration`] reads back the same value: `1h30m`, `100ms`, `0s`.
pub fn format_duration(duration: Duration) -> String {
    let mut rest = duration.as_nanos();
    if rest == 0 {
        return "0s".to_owned();
    }
    let mut out = String::new();
    for (unit, nanos) in NANOS {
        // Days are left to hours: "24h" is what people write. Ascii only.
        if matches!(unit, "d" | "µs") {
            continue;
        }
        let count = rest / nanos;
        if count > 0 {
            // Writing to a String cannot fail.
            let _ = write!(out, "{count}{unit}");
            rest %= nanos;
        }
    }
    out
}

/// For `#[serde(with = "mesh_runtime::settings::duration")]`: a text, or a number of seconds.
pub mod duration {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a duration such as \"5m\", or a number of seconds")]
    enum Written {
        Text(String),
        Seconds(u64),
    }

    /// Writes the text form.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_duration(*duration))
    }

    /// Reads either form.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Text(text) => parse_duration(&text).map_err(D::Error::custom),
            Written::Seconds(seconds) => Ok(Duration::from_secs(seconds)),
        }
    }
}

/// For `#[serde(with = "mesh_runtime::settings::optional_duration", default)]`: as [`duration`], or null.
pub mod optional_duration {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    struct Wrapped(#[serde(with = "super::duration")] Duration);

    /// Writes the text form or null.
    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => serializer.serialize_some(&format_duration(*duration)),
            None => serializer.serialize_none(),
        }
    }

    /// Reads either form or null.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Wrapped>::deserialize(deserializer)?.map(|Wrapped(duration)| duration))
    }
}
