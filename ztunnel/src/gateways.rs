//! Gateways of other networks that just failed: not to be drawn again at once, where there is another.
//!
//! Owns which, for [`MEMORY`]. Costs a connection to another network one atomic load while none has failed, and every other
//! connection nothing. Upstream and downstream: `outbound`.
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_hbone::HboneError;
use mesh_model::HboneAuthority;
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
    at: Mutex<HashMap<Failure, Instant>>,
}

/// A gateway, and what it has not; `None`: it does not serve at all.
type Failure = (SocketAddr, Option<HboneAuthority>);

impl Default for FailedGateways {
    /// None has failed.
    fn default() -> Self {
        Self { began: Instant::now(), until: AtomicU64::new(0), at: Mutex::default() }
    }
}

impl FailedGateways {
    /// Takes down that what was dialled failed, where that was a gateway and not what is behind it.
    pub fn note(&self, dial: &Dial, error: &HboneError) {
        if let Dial::DoubleHbone { outer, .. } = dial
            && error.retry
            && !error.behind
        {
            // One that answers, serves: only what was asked for it has not.
            let lacks = error.status.map(|_| outer.authority.clone());
            self.failed((outer.dial.0, lacks), Instant::now());
        }
    }

    /// Whether it would be dialled a gateway that just failed, or lacked what it would be asked for.
    pub fn has(&self, dial: &Dial) -> bool {
        match dial {
            Dial::DoubleHbone { outer, .. } => self.has_failed((outer.dial.0, Some(&outer.authority)), Instant::now()),
            _ => false,
        }
    }

    fn failed(&self, failure: Failure, now: Instant) {
        let mut at = self.at.lock();
        at.retain(|_, failed| now.duration_since(*failed) < MEMORY);
        at.insert(failure, now);
        self.until.store((now.duration_since(self.began) + MEMORY).as_millis() as u64, Ordering::Relaxed);
    }

    fn has_failed(&self, (gateway, wanted): (SocketAddr, Option<&HboneAuthority>), now: Instant) -> bool {
        if now.duration_since(self.began).as_millis() as u64 >= self.until.load(Ordering::Relaxed) {
            return false;
        }
        let at = self.at.lock();
        let just = |failure: &Failure| at.get(failure).is_some_and(|failed| now.duration_since(*failed) < MEMORY);
        just(&(gateway, None)) || wanted.is_some_and(|wanted| just(&(gateway, Some(wanted.clone()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::plan::{Hop, HopRole};
    use mesh_model::{DialAddr, Reason};

    #[test]
    fn a_failure_counts_for_a_while_and_for_one_gateway() {
        let gateways = FailedGateways::default();
        let [a, b] = [1, 2].map(|last| SocketAddr::from(([10, 0, 0, last], 15008)));
        let now = Instant::now();
        assert!(!gateways.has_failed((a, None), now));
        gateways.failed((a, None), now);
        assert!(gateways.has_failed((a, None), now) && !gateways.has_failed((b, None), now));
        gateways.failed((b, None), now + MEMORY / 2);
        assert!(gateways.has_failed((a, None), now + MEMORY.mul_f64(0.99)));
        assert!(!gateways.has_failed((a, None), now + MEMORY) && gateways.has_failed((b, None), now + MEMORY));
        assert!(!gateways.has_failed((b, None), now + MEMORY * 2));
        gateways.failed((b, None), now + MEMORY * 2);
        assert_eq!(gateways.at.lock().len(), 1, "what does not count any more is not kept");
    }

    #[test]
    fn a_gateway_is_blamed_for_what_it_did_itself_and_for_what_it_lacks() {
        let hop = |authority: &str, role| Hop {
            dial: DialAddr::from(SocketAddr::from(([10, 0, 0, 1], 15008))),
            authority: HboneAuthority::parse(authority).unwrap(),
            expect: [].into(),
            role,
        };
        let [to_web, to_other] = ["web.t.svc:80", "other.t.svc:80"]
            .map(|name| Dial::DoubleHbone { outer: hop(name, HopRole::Gateway), inner: hop(name, HopRole::Endpoint) });
        // What went wrong, and what the gateway is put aside for: connections to the same service, and to others.
        let hung_up = HboneError::new(Reason::ConnectFailed, "");
        let lacks_it = HboneError::refused(503, None);
        let behind = |error: &HboneError| HboneError { behind: true, ..error.clone() };
        for (error, aside) in [
            (hung_up.clone(), (true, true)),
            (lacks_it.clone(), (true, false)),
            (HboneError::refused(401, None), (false, false)),
            (behind(&hung_up), (false, false)),
            (behind(&lacks_it), (false, false)),
        ] {
            let gateways = FailedGateways::default();
            gateways.note(&to_web, &error);
            assert_eq!((gateways.has(&to_web), gateways.has(&to_other)), aside, "{error:?}");
        }
    }
}
