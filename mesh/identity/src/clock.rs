//! Wall-clock time as a parameter: certificates are judged by it, and a test must be able to move it.
//!
//! Downstream: everything in this crate that compares a date. Timers (sleeps, deadlines) use tokio's clock instead.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;

/// Where "now" comes from.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The current date.
    fn now(&self) -> SystemTime;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A date that moves with tokio's clock, so that pausing and advancing that clock ages certificates too.
#[derive(Clone, Copy, Debug)]
pub struct TokioClock {
    date: SystemTime,
    at: tokio::time::Instant,
}

impl TokioClock {
    /// A clock that shows `date` now.
    pub fn starting_at(date: SystemTime) -> Self {
        Self { date, at: tokio::time::Instant::now() }
    }
}

impl Clock for TokioClock {
    fn now(&self) -> SystemTime {
        self.date + self.at.elapsed()
    }
}

/// Our clock as rustls wants it.
#[derive(Debug)]
pub(crate) struct RustlsTime(pub(crate) Arc<dyn Clock>);

impl TimeProvider for RustlsTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix(self.0.now()))
    }
}

/// A date as the verifier wants it; before 1970 counts as 1970, when no certificate is valid.
pub(crate) fn unix(date: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(date.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A date from a certificate (seconds since 1970, may be negative).
pub(crate) fn date(seconds: i64) -> SystemTime {
    // Dates before 1970 are as invalid as 1970 itself.
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
