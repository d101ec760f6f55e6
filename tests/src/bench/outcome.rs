//! What one run of a load client found: counts, times, and whether every byte was the right one.
use serde_json::{Value, json};

/// Latencies in nanoseconds, kept whole until the end.
#[derive(Debug, Default)]
pub struct Latencies(Vec<u32>);

impl Latencies {
    /// Room for this many, so that the run itself does not allocate.
    pub fn with_capacity(samples: usize) -> Self {
        Self(Vec::with_capacity(samples))
    }

    /// Notes one; what is longer than four seconds counts as four seconds.
    pub fn add(&mut self, took: std::time::Duration) {
        self.0.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
    }

    /// Adds those of another connection.
    pub fn merge(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sorts, so that quantiles can be read.
    pub fn sort(&mut self) {
        self.0.sort_unstable();
    }

    /// The quantile `q` (0 to 1) in microseconds, of sorted latencies.
    pub fn quantile_us(&self, q: f64) -> Option<f64> {
        let last = self.0.len().checked_sub(1)?;
        self.0.get((last as f64 * q).round() as usize).map(|&nanos| f64::from(nanos) / 1000.0)
    }
}

/// The sum of one run.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Round trips, connections, or streams that were completed.
    pub count: u64,
    /// Payload bytes moved, one way.
    pub bytes: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Answers that were not what had to come back.
    pub mismatches: u64,
    /// The first failure, in words.
    pub first_error: Option<String>,
    /// Per operation.
    pub latencies: Latencies,
}

impl Outcome {
    /// Notes a failure.
    pub fn fail(&mut self, error: &(impl std::fmt::Display + ?Sized)) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| error.to_string());
    }

    /// Adds that of another connection.
    pub fn merge(&mut self, other: Self) {
        self.count += other.count;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.mismatches += other.mismatches;
        self.first_error = self.first_error.take().or(other.first_error);
        self.latencies.merge(other.latencies);
    }

    /// The one line a client prints.
    pub fn line(mut self, mode: &str, seconds: f64) -> Value {
        self.latencies.sort();
        json!({
            "mode": mode,
            "seconds": seconds,
            "count": self.count,
            "bytes": self.bytes,
            "rate": self.count as f64 / seconds,
            "gbit_s": self.bytes as f64 * 8.0 / seconds / 1e9,
            "p50_us": self.latencies.quantile_us(0.5),
            "p90_us": self.latencies.quantile_us(0.9),
            "p99_us": self.latencies.quantile_us(0.99),
            "max_us": self.latencies.quantile_us(1.0),
            "errors": self.errors,
            "mismatches": self.mismatches,
            "first_error": self.first_error,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn quantiles() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantile_us(0.5), None);
        (1..=101).rev().for_each(|us| latencies.add(Duration::from_micros(us)));
        latencies.sort();
        assert_eq!(latencies.quantile_us(0.0), Some(1.0));
        assert_eq!(latencies.quantile_us(0.5), Some(51.0));
        assert_eq!(latencies.quantile_us(0.99), Some(100.0));
        assert_eq!(latencies.quantile_us(1.0), Some(101.0));
    }

    #[test]
    fn the_first_error_stays() {
        let mut sum = Outcome::default();
        let mut other = Outcome { count: 2, ..Outcome::default() };
        other.fail("one");
        other.fail("two");
        sum.merge(other);
        let line = sum.line("ping", 2.0);
        assert_eq!(
            (line["errors"].as_u64(), line["first_error"].as_str(), line["rate"].as_f64()),
            (Some(2), Some("one"), Some(1.0))
        );
    }
}
