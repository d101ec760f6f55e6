//! A fixed rate that several callers keep together: calls are due by the clock, however long the ones before them take.
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;

/// See the module. Callers that fell behind make up for it, so the rate is that of the whole time.
#[derive(Debug)]
pub struct Pace {
    begun: Instant,
    /// Calls a second.
    rate: u32,
    /// Calls handed out.
    next: AtomicU64,
    /// The furthest that one began after it was due, ms.
    behind: AtomicU64,
}

impl Pace {
    /// So many calls a second, from now on.
    pub fn new(rate: u32) -> Self {
        Self { begun: Instant::now(), rate, next: AtomicU64::new(0), behind: AtomicU64::new(0) }
    }

    /// Waits until the next call is due, which is then the caller's.
    pub fn wait(&self) {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        let due = Duration::from_secs_f64(at as f64 / f64::from(self.rate));
        let now = self.begun.elapsed();
        match due.checked_sub(now) {
            Some(rest) => thread::sleep(rest),
            None => {
                self.behind.fetch_max(now.saturating_sub(due).as_millis() as u64, Ordering::Relaxed);
            }
        }
    }

    /// What was offered until now, where `calls` were made. Loud where that is less than 95 % of the rate, and an error where it `must`
    /// be: what follows from less load than was meant says little.
    pub fn judge(&self, calls: usize, must: bool) -> anyhow::Result<String> {
        let (lasted, Self { rate, .. }) = (self.begun.elapsed().as_secs_f64(), self);
        let offered = calls as f64 / lasted;
        let behind = self.behind.load(Ordering::Relaxed);
        let told = format!("{calls} calls in {lasted:.0} s, {offered:.0}/s of {rate}/s, at most {behind} ms behind");
        if offered >= 0.95 * f64::from(*rate) {
            return Ok(told);
        }
        ensure!(!must, "THE RATE WAS NOT MET, which says nothing of what was tested: {told}");
        Ok(format!("THE RATE WAS NOT MET: {told}"))
    }
}
