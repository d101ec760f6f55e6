//! Copies of requests: which of them a request gets, and what they are called (spec/waypoint §3.1).
use crate::l7::route::{Backend, Forward, Mirror};
use crate::lb::redraw;

const DRAW_MIRROR: u64 = 100;
const DRAW_ENDPOINT: u64 = 50;

/// The mirrors that get a copy of this request, those of the route before those of its backend, each with a draw of its own.
pub fn copies<'f>(forward: &'f Forward, backend: Option<&'f Backend>, draw: u64) -> impl Iterator<Item = (&'f Mirror, u64)> {
    let of_backend = backend.map_or(&[][..], |b| &b.mirrors[..]);
    let all = (DRAW_MIRROR..).zip(forward.mirrors.iter().chain(of_backend));
    all.filter(move |(n, mirror)| mirror.fraction.hit(redraw(draw, *n)))
        .map(move |(n, mirror)| (mirror, redraw(draw, n + DRAW_ENDPOINT)))
}

/// The authority of a copy: `-shadow` after the host, before a port.
pub fn shadow(authority: &str) -> String {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => format!("{host}-shadow:{port}"),
        _ => format!("{authority}-shadow"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::route::{BackendRef, Fraction};
    use std::collections::BTreeMap;

    fn to(name: &str, percent: f64) -> Mirror {
        Mirror { to: BackendRef::Invalid { status: 503, why: name.into() }, fraction: Fraction::percent(percent) }
    }
    fn named(mirror: &Mirror) -> &str {
        match &mirror.to {
            BackendRef::Invalid { why, .. } => why,
            BackendRef::Service(_) => "",
        }
    }

    #[test]
    fn shares_are_drawn_for_each() {
        let target = || BackendRef::Invalid { status: 503, why: "".into() };
        let mut forward = Forward::to(target());
        forward.mirrors = vec![to("all", 100.0), to("none", 0.0), to("half", 50.0)];
        let backend = Backend { mirrors: vec![to("own", 100.0), to("quarter", 25.0)], ..Backend::to(target()) };
        let n = 20_000_u64;
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for draw in 0..n {
            let got: Vec<_> = copies(&forward, Some(&backend), redraw(draw, 7)).collect();
            let names: Vec<&str> = got.iter().map(|(mirror, _)| named(mirror)).collect();
            for name in ["half", "quarter"].into_iter().filter(|name| names.contains(name)) {
                *counts.entry(name.to_owned()).or_default() += 1;
            }
            *counts.entry("both".to_owned()).or_default() += u64::from(names.contains(&"half") && names.contains(&"quarter"));
            assert_eq!(
                names.iter().filter(|name| !["half", "quarter"].contains(name)).copied().collect::<Vec<_>>(),
                ["all", "own"]
            );
            assert!(got.windows(2).all(|two| two[0].1 != two[1].1), "each chooses its endpoint for itself");
        }
        // Five standard deviations to either side.
        for (name, mean, bound) in [("half", n / 2, 354), ("quarter", n / 4, 306), ("both", n / 8, 234)] {
            assert!(counts[name].abs_diff(mean) < bound, "{name}: {} of {n}", counts[name]);
        }
        let of_route: Vec<&str> = copies(&forward, None, u64::MAX).map(|(mirror, _)| named(mirror)).collect();
        assert!(of_route.contains(&"all") && !of_route.contains(&"own"), "{of_route:?}");
    }
    #[test]
    fn the_suffix_goes_before_the_port() {
        for (authority, want) in [
            ("127.0.0.1:29910", "127.0.0.1-shadow:29910"),
            ("a.b", "a.b-shadow"),
            ("[::1]:80", "[::1]-shadow:80"),
            ("[::1]", "[::1]-shadow"),
            ("a.b:", "a.b:-shadow"),
            ("a.b:http", "a.b:http-shadow"),
            ("", "-shadow"),
        ] {
            assert_eq!(shadow(authority), want, "{authority}");
        }
    }
}
