use super::*;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use mesh_model::l7::limit::{Counts, KeyPart, Point, Rate, Which};
use std::thread;
use std::time::Duration;

fn limit(most: u32, per_fill: u32, interval: Duration, key: KeyPart) -> Limit {
    let rate = Rate::new(most, per_fill, interval).expect("a rate");
    let counts = Counts { policy: "TrafficPolicy t/p".into(), name: "n".into(), which: Which::default(), key: vec![key], rate };
    Limit::new(counts, Point::BeforeAuthentication, true, http::StatusCode::TOO_MANY_REQUESTS, Vec::new())
}
fn by_address() -> KeyPart {
    KeyPart::SourceIp { v4: 32, v6: 128 }
}
fn by_header() -> KeyPart {
    KeyPart::Header(HeaderName::from_static("x-key"))
}
fn with_facts<T>(headers: &HeaderMap, ask: impl FnOnce(&RequestFacts<'_>) -> T) -> T {
    ask(&RequestFacts {
        method: &http::Method::GET,
        scheme: "http",
        authority: "h",
        path: "/",
        query: None,
        headers,
        port: 80,
        claims: None,
    })
}
/// How many of `times` requests of `client` are let through.
fn allowed(limits: &Limits, limit: &Limit, client: IpAddr, times: u32) -> u32 {
    with_facts(&HeaderMap::new(), |facts| (0..times).map(|_| u32::from(limits.take(limit, facts, client).allowed)).sum())
}
fn client(n: u32) -> IpAddr {
    IpAddr::V4(n.into())
}

#[test]
fn threads_that_ask_together_get_exactly_the_bucket() {
    let limits = Limits::default();
    // Nothing comes back while this runs.
    let limit = limit(10_000, 1, Duration::from_hours(1), by_address());
    let through: u32 = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| (1..=4).map(|c| allowed(&limits, &limit, client(c), 10_000)).sum::<u32>())).collect();
        threads.into_iter().map(|t| t.join().expect("a thread")).sum()
    });
    assert_eq!(through, 4 * 10_000);
}
#[test]
fn over_time_threads_get_the_rate_and_no_more() {
    let limits = Limits::default();
    // Takes five seconds to fill: a machine that is busy for less loses nothing.
    let limit = limit(10_000, 2000, Duration::from_secs(1), by_address());
    let started = Instant::now();
    let run = Duration::from_millis(500);
    let mut through: u32 = thread::scope(|scope| {
        let ask = || {
            let mut sum = 0;
            while started.elapsed() < run {
                sum += allowed(&limits, &limit, client(1), 100);
            }
            sum
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().expect("a thread")).sum()
    });
    let ideal = |time: Duration| 10_000.0 + time.as_secs_f64() * 2000.0;
    let least = ideal(started.elapsed()) * 0.99;
    // What came back since the last of them asked.
    through += allowed(&limits, &limit, client(1), 20_000);
    let most = ideal(started.elapsed());
    assert!((least..=most).contains(&f64::from(through)), "{through}, not {least} to {most}");
}
#[test]
fn a_million_clients_fit_and_none_is_reset_by_them() {
    let limits = Limits::default();
    let limit = limit(2, 1, Duration::from_hours(1), by_address());
    for n in 0..1_000_000 {
        assert_eq!(allowed(&limits, &limit, client(n), 1), 1, "client {n}");
    }
    let keys: usize = limits.shards.iter().map(|s| s.lock().len()).sum();
    let bytes: usize = limits.shards.iter().map(|s| s.lock().bytes()).sum();
    assert_eq!(keys, 1_000_000, "two clients share a bucket, or one was forgotten");
    assert!(bytes <= 64 << 20, "{} MiB", bytes >> 20);
    // As many again: more than there are places.
    for n in 1_000_000..2_000_000 {
        allowed(&limits, &limit, client(n), 1);
    }
    let bytes: usize = limits.shards.iter().map(|s| s.lock().bytes()).sum();
    assert!(bytes <= 64 << 20, "{} MiB", bytes >> 20);
    for n in (0..1_000_000).step_by(1000) {
        assert_eq!(allowed(&limits, &limit, client(n), 3), 1, "client {n} had one left");
    }
    // Whoever comes now shares one bucket, which is used up.
    assert_eq!((4_000_000..4_001_000).map(|n| allowed(&limits, &limit, client(n), 1)).sum::<u32>(), 0);
}
#[test]
fn what_is_full_is_swept() {
    let limits = Limits::default();
    let quick = limit(1, 1_000_000, Duration::from_secs(1), by_header());
    for n in 0..10_000 {
        let headers = HeaderMap::from_iter([(HeaderName::from_static("x-key"), HeaderValue::from(n))]);
        assert!(with_facts(&headers, |facts| limits.take(&quick, facts, client(1)).allowed));
    }
    thread::sleep(Duration::from_millis(1));
    limits.sweep();
    assert_eq!(limits.shards.iter().map(|s| s.lock().len()).sum::<usize>(), 0);
}
