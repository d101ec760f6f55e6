//! Gateways of other networks that just failed: not to be drawn again at once, where there is another.
//!
//! Owns which, for [`MEMORY`]. Costs a connection to another network one atomic load while none has failed, and every other
//! connection nothing. Upstream and downstream: `outbound`.
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_hbone::HboneError;
use mesh_model::plan::Dial;
use parking_lot::Mutex;

/// How long a failure counts: long enough that few connections meet a dead gateway, short enough that one that is back is used.
const MEMORY: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct FailedGateways {
    began: Instant,
    /// When the last failure stops counting: milliseconds since the beginning.
    until: AtomicU64,
    at: Mutex<HashMap<SocketAddr, Instant>>,
}

impl Default for FailedGateways {
    /// None has failed.
    fn default() -> Self {
        Self { began: Instant::now(), until: AtomicU64::new(0), at: Mutex::default() }
    }
}

impl FailedGateways {
    /// Takes down that what was dialled failed, where that was a gateway and not what it answered.
    pub fn note(&self, dial: &Dial, error: &HboneError) {
        if let Dial::DoubleHbone { outer, .. } = dial
            && error.retry
            && error.status.is_none()
        {
            self.failed(outer.dial.0, Instant::now());
        }
    }

    /// Whether it would be dialled a gateway that just failed.
    pub fn has(&self, dial: &Dial) -> bool {
        match dial {
            Dial::DoubleHbone { outer, .. } => self.has_failed(outer.dial.0, Instant::now()),
            _ => false,
        }
    }

    fn failed(&self, gateway: SocketAddr, now: Instant) {
        let mut at = self.at.lock();
        at.retain(|_, failed| now.duration_since(*failed) < MEMORY);
        at.insert(gateway, now);
        self.until.store((now.duration_since(self.began) + MEMORY).as_millis() as u64, Ordering::Relaxed);
    }

    fn has_failed(&self, gateway: SocketAddr, now: Instant) -> bool {
        let counts = (now.duration_since(self.began).as_millis() as u64) < self.until.load(Ordering::Relaxed);
        counts && self.at.lock().get(&gateway).is_some_and(|failed| now.duration_since(*failed) < MEMORY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_counts_for_a_while_and_for_one_gateway() {
        let gateways = FailedGateways::default();
        let (a, b) = (SocketAddr::from(([10, 0, 0, 1], 15008)), SocketAddr::from(([10, 0, 0, 2], 15008)));
        let now = Instant::now();
        assert!(!gateways.has_failed(a, now));
        gateways.failed(a, now);
        assert!(gateways.has_failed(a, now) && !gateways.has_failed(b, now));
        gateways.failed(b, now + MEMORY / 2);
        assert!(gateways.has_failed(a, now + MEMORY.mul_f64(0.99)));
        assert!(!gateways.has_failed(a, now + MEMORY) && gateways.has_failed(b, now + MEMORY));
        assert!(!gateways.has_failed(b, now + MEMORY * 2));
        gateways.failed(b, now + MEMORY * 2);
        assert_eq!(gateways.at.lock().len(), 1, "what does not count any more is not kept");
    }
}
