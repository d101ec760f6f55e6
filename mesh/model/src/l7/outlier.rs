//! Ejection of endpoints that keep failing: Envoy's outlier detection by consecutive errors. Pure: time is passed in, as the
//! time since any fixed moment.
//!
//! Two halves. [`Monitor`] counts on the request path and takes no lock; [`Ejection`] is what follows once a count is full,
//! and is the owner's to guard. Upstream: the waypoint's clusters. Facts: Envoy's outlier detection, spec/waypoint §3.3.
use crate::l7::destination::OutlierPolicy;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// What came of a request, as far as the endpoint is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It answered.
    Status(u16),
    /// It answered a gRPC call, with a status that stands for this one.
    Grpc(u16),
    /// A connection of bytes to it was made.
    Connected,
    /// No connection was made.
    Unconnected,
    /// One broke before the answer.
    Broken,
    /// No answer in time.
    Timeout,
}
/// Which count was full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// `consecutive5xxErrors`.
    Consecutive5xx,
    /// `consecutiveGatewayErrors`.
    ConsecutiveGateway,
    /// `consecutiveLocalOriginFailures`.
    ConsecutiveLocal,
}

/// The counts of one endpoint, shared by all threads.
#[derive(Debug, Default)]
pub struct Monitor {
    five_xx: AtomicU32,
    gateway: AtomicU32,
    local: AtomicU32,
}
impl Monitor {
    /// Counts what was seen. A cause is given exactly when a count reaches its limit, not again above it; the owner then
    /// ejects or not, and calls [`Self::reset`] for that cause. An answer below 500 resets the counts.
    pub fn note(&self, policy: &OutlierPolicy, seen: Seen) -> Option<Cause> {
        let status = match seen {
            Seen::Status(status) => {
                self.answered(policy);
                judged(policy, status)
            }
            // Envoy's `error_matcher` is asked of HTTP's own statuses only.
            Seen::Grpc(status) => {
                self.answered(policy);
                status
            }
            Seen::Connected | Seen::Unconnected | Seen::Broken | Seen::Timeout if policy.split_external_local => {
                // A connection that is there ends a row of failures, whatever comes of it then.
                if seen != Seen::Unconnected {
                    clear(&self.local);
                }
                let is_full = seen != Seen::Connected && full(&self.local, policy.consecutive_local);
                return is_full.then_some(Cause::ConsecutiveLocal);
            }
            Seen::Connected => 200,
            // Not told apart, our own failures count as the answers we give for them.
            Seen::Unconnected | Seen::Broken => 503,
            Seen::Timeout => 504,
        };
        if status < 500 {
            clear(&self.five_xx);
            clear(&self.gateway);
            return None;
        }
        let mut cause = None;
        if matches!(status, 502..=504) {
            if full(&self.gateway, policy.consecutive_gateway) {
                cause = Some(Cause::ConsecutiveGateway);
            }
        } else {
            clear(&self.gateway);
        }
        if full(&self.five_xx, policy.consecutive_5xx) {
            cause = cause.or(Some(Cause::Consecutive5xx));
        }
        cause
    }
    /// An answer takes a connection, which ends a row of failures of our own making.
    fn answered(&self, policy: &OutlierPolicy) {
        if policy.split_external_local {
            clear(&self.local);
        }
    }
    /// Starts the count of one cause anew.
    pub fn reset(&self, cause: Cause) {
        clear(match cause {
            Cause::Consecutive5xx => &self.five_xx,
            Cause::ConsecutiveGateway => &self.gateway,
            Cause::ConsecutiveLocal => &self.local,
        });
    }
    /// Starts all counts anew.
    pub fn reset_all(&self) {
        clear(&self.five_xx);
        clear(&self.gateway);
        clear(&self.local);
    }
}
/// What a status counts as: where statuses are named they alone are errors, whatever 5xx is not among them, and those below 500 are
/// as bad as that.
fn judged(policy: &OutlierPolicy, status: u16) -> u16 {
    if policy.error_statuses.is_empty() {
        status
    } else if policy.error_statuses.contains(&status) {
        status.max(500)
    } else {
        200
    }
}
/// Written only when it changes something: successes are the common case, and the counter is shared.
fn clear(count: &AtomicU32) {
    if count.load(Relaxed) != 0 {
        count.store(0, Relaxed);
    }
}
fn full(count: &AtomicU32, limit: u32) -> bool {
    count.fetch_add(1, Relaxed).wrapping_add(1) == limit && limit != 0
}

/// Whether one more of `hosts` may be ejected when `active` are: the share stays within the policy, but one always may.
pub fn may_eject(policy: &OutlierPolicy, active: usize, hosts: usize) -> bool {
    active == 0 || (active + 1) * 100 <= policy.max_ejection_percent.min(100) as usize * hosts
}

/// The history of one endpoint's ejections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ejection {
    /// When it was ejected, if it is.
    since: Option<Duration>,
    /// How many base times the next ejection lasts.
    times: u32,
    /// Ejections so far.
    total: u64,
}
impl Ejection {
    /// Whether it is ejected.
    pub fn is_active(&self) -> bool {
        self.since.is_some()
    }
    /// Ejections so far.
    pub fn total(&self) -> u64 {
        self.total
    }
    /// Ejects at `now`.
    pub fn eject(&mut self, policy: &OutlierPolicy, now: Duration) {
        self.since = Some(now);
        self.total += 1;
        if policy.base_ejection.saturating_mul(self.times) < policy.max_ejection.saturating_add(policy.base_ejection) {
            self.times += 1;
        }
    }
    /// How long the running ejection lasts.
    pub fn lasts(&self, policy: &OutlierPolicy) -> Duration {
        policy.base_ejection.saturating_mul(self.times).min(policy.max_ejection.max(policy.base_ejection))
    }
    /// The look every interval: ends an ejection whose time is over (`true`), and lets an endpoint that is in use grow back
    /// towards short ejections.
    pub fn tick(&mut self, policy: &OutlierPolicy, now: Duration) -> bool {
        let ended = self.since.is_some_and(|since| now.saturating_sub(since) >= self.lasts(policy));
        if ended {
            self.since = None;
        }
        if self.since.is_none() {
            self.times = self.times.saturating_sub(1);
        }
        ended
    }
    /// Ends the ejection whatever its time (the policy is gone).
    pub fn pardon(&mut self) {
        self.since = None;
        self.times = 0;
    }
    /// Whether ticks still change something.
    pub fn is_settled(&self) -> bool {
        self.since.is_none() && self.times == 0
    }
}

#[cfg(test)]
mod tests;
