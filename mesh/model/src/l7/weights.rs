//! Shares of backends.
//!
//! The total decides, not the list: a route whose `total_weight` is 0 has no backend (the Gateway API's "500 for the
//! share", here all of it). Which weights count is a question of the dialect and answered once, when the route is made
//! ([`total`]); after that both dialects draw alike.
use crate::l7::route::{Backend, Dialect};
use crate::lb::below;

/// The total of a route's backends.
///
/// Istio: the weight of a single destination is ignored (usually not written, which reads as 0), so it counts at least 1; of
/// several, those with 0 get nothing. Gateway API: an unwritten weight is 1 (the translator puts it in) and 0 means
/// nothing, even for the only backend.
pub fn total(dialect: Dialect, backends: &[Backend]) -> u64 {
    match (dialect, backends) {
        (Dialect::Istio, [only]) => u64::from(only.weight.max(1)),
        _ => backends.iter().map(|b| u64::from(b.weight)).sum(),
    }
}

/// The backend that a uniform draw falls on. `None`: nothing has a share.
///
/// The only backend of a route with a total is it, whatever its own weight says.
pub fn choose(backends: &[Backend], total_weight: u64, draw: u64) -> Option<&Backend> {
    if total_weight == 0 {
        return None;
    }
    if let [only] = backends {
        return Some(only);
    }
    let mut at = below(draw, total_weight);
    for backend in backends {
        match at.checked_sub(u64::from(backend.weight)) {
            None => return Some(backend),
            Some(left) => at = left,
        }
    }
    // The total was larger than the sum: no share is given to nobody.
    backends.iter().rev().find(|b| b.weight > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::route::BackendRef;
    use crate::lb::redraw;

    fn backends(weights: &[u32]) -> Vec<Backend> {
        let backend = |(at, weight): (usize, &u32)| Backend {
            weight: *weight,
            ..Backend::to(BackendRef::Invalid { status: at as u16, why: "".into() })
        };
        weights.iter().enumerate().map(backend).collect()
    }
    fn chosen(b: Option<&Backend>) -> Option<u16> {
        b.map(|b| match b.to {
            BackendRef::Invalid { status, .. } => status,
            BackendRef::Service(_) => u16::MAX,
        })
    }

    #[test]
    fn a_single_backend_by_dialect() {
        for (dialect, weight, is) in [
            (Dialect::Istio, 0, Some(0)),
            (Dialect::Istio, 7, Some(0)),
            (Dialect::GatewayApi, 0, None),
            (Dialect::GatewayApi, 1, Some(0)),
        ] {
            let b = backends(&[weight]);
            assert_eq!(chosen(choose(&b, total(dialect, &b), u64::MAX)), is, "{dialect:?} {weight}");
        }
    }
    #[test]
    fn nothing_has_a_share() {
        let b = backends(&[0, 0]);
        assert_eq!(chosen(choose(&b, total(Dialect::Istio, &b), 1)), None);
        assert_eq!(chosen(choose(&[], 0, 1)), None);
        assert_eq!(chosen(choose(&[], 5, 1)), None);
        // A total that is too large does not lose requests, nor does it give weight to a 0.
        assert_eq!(chosen(choose(&backends(&[1, 2, 0]), 100, u64::MAX)), Some(1));
    }
    #[test]
    fn ends_of_the_range() {
        let b = backends(&[0, 1, 0, 3, 0]);
        let at = |draw| chosen(choose(&b, 4, draw));
        assert_eq!((at(0), at(u64::MAX / 4), at(u64::MAX / 4 + 1), at(u64::MAX)), (Some(1), Some(1), Some(3), Some(3)));
    }
    #[test]
    fn huge_weights_do_not_overflow() {
        let b = backends(&[u32::MAX, u32::MAX, u32::MAX]);
        assert_eq!(chosen(choose(&b, total(Dialect::GatewayApi, &b), u64::MAX)), Some(2));
    }
    /// 95 : 5 over 100 000 draws: within five standard deviations (√(n·p·q) ≈ 69).
    #[test]
    fn shares_are_hit() {
        let b = backends(&[95, 5]);
        let n = 100_000_u64;
        let second = (0..n).filter(|i| chosen(choose(&b, 100, redraw(*i, 11))) == Some(1)).count();
        assert!((4_655..=5_345).contains(&second), "{second} of {n}");
    }
}
