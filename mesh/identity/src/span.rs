//! Durations in settings, written as people write them: `500ms`, `5s`, `1h30m`, `2d`. Refuses bare numbers and zero units.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serializer};

/// Parses `1h30m`-like text.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is not a duration: expected for example 500ms, 5s, 1h30m");
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(bad());
    }
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        let part = Duration::from_millis(number.checked_mul(milliseconds).ok_or_else(bad)?);
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = tail;
    }
    Ok(total)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map_err(serde::de::Error::custom)
}

pub(crate) fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    if span.subsec_millis() == 0 {
        serializer.collect_str(&format_args!("{}s", span.as_secs()))
    } else {
        serializer.collect_str(&format_args!("{}ms", span.as_millis()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("1h30m"), Ok(Duration::from_mins(90)));
        assert_eq!(parse(" 2d "), Ok(Duration::from_hours(48)));
        for bad in ["", "5", "s", "-1s", "5 s", "1y", "99999999999999999999s", "18446744073709551615d", "é"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
