//! Injected faults: which of them a request gets (Envoy's fault filter).
use crate::l7::route::{Abort, Fault};
use crate::lb::redraw;
use std::time::Duration;

/// What to do to a request: first wait, then answer. Neither: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultDecision {
    /// Wait that long (flag `DI`).
    pub delay: Option<Duration>,
    /// Then answer like this instead of forwarding (flag `FI`, body `fault filter abort`).
    pub abort: Option<Abort>,
}

/// Draws delay and abort independently of each other: 50 % and 50 % make a quarter of the requests slow and broken.
pub fn decide(fault: &Fault, draw: u64) -> FaultDecision {
    FaultDecision {
        delay: fault.delay.and_then(|(share, delay)| share.hit(redraw(draw, 1)).then_some(delay)),
        abort: fault.abort.and_then(|(share, abort)| share.hit(redraw(draw, 2)).then_some(abort)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::route::Fraction;

    const WAIT: Duration = Duration::from_millis(5);

    #[test]
    fn all_none_and_both() {
        let none = Fraction { per_million: 0 };
        for (delay, abort) in [(None, None), (Some(Fraction::ALL), None), (None, Some(Fraction::ALL)), (Some(none), Some(none))] {
            let fault = Fault { delay: delay.map(|f| (f, WAIT)), abort: abort.map(|f| (f, Abort::Http(418))) };
            for draw in [0, 1, u64::MAX / 2, u64::MAX] {
                let hit = |f: Option<Fraction>| f == Some(Fraction::ALL);
                let want = FaultDecision { delay: hit(delay).then_some(WAIT), abort: hit(abort).then_some(Abort::Http(418)) };
                assert_eq!(decide(&fault, draw), want);
            }
        }
    }
    /// Shares are hit, and one draw does not decide both. Bounds: five standard deviations.
    #[test]
    fn shares_are_independent() {
        let fault =
            Fault { delay: Some((Fraction::percent(50.0), WAIT)), abort: Some((Fraction::percent(0.5), Abort::Grpc(14))) };
        let n = 200_000_u64;
        let (mut delayed, mut aborted, mut both) = (0_u64, 0_u64, 0_u64);
        for draw in (0..n).map(|i| redraw(i, 12)) {
            let d = decide(&fault, draw);
            delayed += u64::from(d.delay.is_some());
            aborted += u64::from(d.abort.is_some());
            both += u64::from(d.delay.is_some() && d.abort.is_some());
        }
        assert!((98_880..=101_120).contains(&delayed), "{delayed}");
        assert!((840..=1_160).contains(&aborted), "{aborted}");
        assert!((388..=612).contains(&both), "{both}");
    }
    #[test]
    fn percentages_are_clamped_and_fine() {
        for (percent, per_million) in [(-1.0, 0), (0.0, 0), (0.0001, 1), (12.5, 125_000), (100.0, 1_000_000), (250.0, 1_000_000)]
        {
            assert_eq!(Fraction::percent(percent), Fraction { per_million });
        }
        assert_eq!(Fraction::percent(f64::NAN), Fraction { per_million: 0 });
    }
}
