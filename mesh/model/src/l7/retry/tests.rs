use super::*;

#[test]
fn every_second_attempt_leaves_what_was_tried() {
    // By how many priorities have healthy endpoints.
    for (healthy, tried, out) in [
        (3, &[][..], &[][..]),
        (3, &[0], &[]),
        (3, &[0, 0], &[0, 0]),
        (3, &[0, 0, 1], &[0, 0]),
        (3, &[0, 0, 1, 1], &[0, 0, 1, 1]),
        (3, &[0, 0, 1, 1, 2], &[0, 0, 1, 1]),
        // None is left: from the beginning.
        (3, &[0, 0, 1, 1, 2, 2], &[]),
        (3, &[0, 0, 1, 1, 2, 2, 0], &[]),
        (3, &[0, 0, 1, 1, 2, 2, 0, 0], &[0, 0]),
        (2, &[0, 1], &[]),
        (2, &[0, 1, 0], &[]),
        (2, &[0, 1, 0, 0], &[0, 0]),
        // One priority is never left.
        (1, &[0, 0], &[]),
        (1, &[0, 0, 0, 0], &[]),
    ] {
        let some_left = |left: &[u32]| (0..healthy).any(|priority| !left.contains(&priority));
        assert_eq!(left_out(tried, some_left), out, "{tried:?} of {healthy}");
    }
}
use crate::lb::redraw;

fn policy(on: RetryOn, statuses: &[u16]) -> RetryPolicy {
    RetryPolicy { on, statuses: statuses.to_vec(), ..RetryPolicy::istio_default() }
}
fn status(status: u16) -> Outcome {
    Outcome::Answered { status, grpc_status: None, rate_limited: false }
}
fn grpc(grpc_status: u32) -> Outcome {
    Outcome::Answered { status: 200, grpc_status: Some(grpc_status), rate_limited: false }
}
const FAILURES: [Failure; 13] = [
    Failure::Connect,
    Failure::ConnectTimeout,
    Failure::Refused,
    Failure::Reset,
    Failure::ResetBeforeRequest,
    Failure::Timeout,
    Failure::Protocol,
    Failure::RemoteReset,
    Failure::Overflow,
    Failure::NoCluster,
    Failure::NoHealthy,
    Failure::ClientGone,
    Failure::ClientProtocol,
];

/// Each condition with the statuses, gRPC statuses and failures it covers; everything else it does not.
#[test]
fn conditions() {
    use Failure::*;
    let all: &[_] = &[Connect, ConnectTimeout, Refused, Reset, RemoteReset, ResetBeforeRequest, Timeout, Protocol];
    type Row = (RetryOn, &'static [u16], &'static [u32], &'static [Failure]);
    let rows: [Row; 16] = [
        (RetryOn::default(), &[], &[], &[]),
        (RetryOn::FIVE_XX, &[500, 502, 503, 504, 599], &[], all),
        (RetryOn::GATEWAY_ERROR, &[502, 503, 504], &[], all),
        (RetryOn::RESET, &[], &[], all),
        (RetryOn::CONNECT_FAILURE, &[], &[], &[Connect, ConnectTimeout]),
        (RetryOn::REFUSED_STREAM, &[], &[], &[Refused]),
        (RetryOn::RESET_BEFORE_REQUEST, &[], &[], &[Connect, ConnectTimeout, ResetBeforeRequest]),
        (RetryOn::RETRIABLE_4XX, &[409], &[], &[]),
        // The statuses listed below.
        (RetryOn::STATUS_CODES, &[418, 503], &[], &[]),
        (RetryOn::CANCELLED, &[], &[1], &[]),
        (RetryOn::DEADLINE_EXCEEDED, &[], &[4], &[]),
        (RetryOn::RESOURCE_EXHAUSTED, &[], &[8], &[]),
        (RetryOn::INTERNAL, &[], &[13], &[]),
        (RetryOn::UNAVAILABLE, &[], &[14], &[]),
        (RetryOn::ENVOY_RATELIMITED, &[], &[], &[]),
        (RetryOn::HTTP3, &[], &[], &[]),
    ];
    for (on, statuses, grpcs, failures) in rows {
        let p = policy(on, &[418, 503]);
        for s in [200, 204, 301, 400, 404, 408, 409, 418, 425, 429, 499, 500, 502, 503, 504, 599, 600] {
            assert_eq!(worth_retry(&p, &status(s)), statuses.contains(&s), "{on:?} {s}");
        }
        for g in 0..20 {
            assert_eq!(worth_retry(&p, &grpc(g)), grpcs.contains(&g), "{on:?} grpc {g}");
        }
        for f in FAILURES {
            assert_eq!(worth_retry(&p, &Outcome::Failed(f)), failures.contains(&f), "{on:?} {f:?}");
        }
    }
}
#[test]
fn the_default_of_istio() {
    let p = RetryPolicy::istio_default();
    // 503 is not in it (spec/waypoint §9), nor is the limit of an attempt (§10).
    for (outcome, want) in [
        (status(503), false),
        (status(500), false),
        (grpc(14), true),
        (grpc(1), true),
        (grpc(4), false),
        (Outcome::Failed(Failure::Connect), true),
        (Outcome::Failed(Failure::ConnectTimeout), true),
        (Outcome::Failed(Failure::Refused), true),
        (Outcome::Failed(Failure::Reset), false),
        (Outcome::Failed(Failure::ResetBeforeRequest), false),
        (Outcome::Failed(Failure::Timeout), false),
        (Outcome::Failed(Failure::Protocol), false),
        (Outcome::Failed(Failure::Overflow), false),
    ] {
        assert_eq!(worth_retry(&p, &outcome), want, "{outcome:?}");
    }
}
#[test]
fn rate_limited_answers_are_a_condition_of_their_own() {
    let limited = |status| Outcome::Answered { status, grpc_status: Some(14), rate_limited: true };
    let all = policy(RetryOn(!RetryOn::ENVOY_RATELIMITED.0), &[429]);
    for s in [429, 503] {
        assert!(!worth_retry(&all, &limited(s)));
        assert!(worth_retry(&policy(RetryOn::ENVOY_RATELIMITED, &[]), &limited(s)));
    }
}
#[test]
fn backoffs_double_and_stop_growing() {
    let p = RetryPolicy::istio_default();
    let ms = Duration::from_millis;
    for (attempt, bound) in
        [(1, 25), (2, 50), (3, 100), (4, 200), (5, 250), (6, 250), (32, 250), (33, 250), (u32::MAX, 250), (0, 25)]
    {
        assert_eq!(backoff(&p, attempt, 0), Duration::ZERO);
        let largest = backoff(&p, attempt, u64::MAX);
        assert!(largest < ms(bound) && largest + Duration::from_micros(1) > ms(bound), "{attempt}: {largest:?}");
        let mean = (0..4_000).map(|i| backoff(&p, attempt, redraw(i, 3))).sum::<Duration>() / 4_000;
        // Uniform: the mean is half the bound, here within five standard deviations.
        assert!(mean.abs_diff(ms(bound) / 2) < ms(bound) * 23 / 1_000, "{attempt}: {mean:?}");
    }
    // A base above the largest interval is not cut down.
    let odd = RetryPolicy { base_backoff: ms(300), max_backoff: ms(100), ..p };
    assert!(backoff(&odd, 9, u64::MAX) > ms(299));
    let long = RetryPolicy { base_backoff: Duration::MAX, max_backoff: Duration::MAX, ..odd };
    assert!(backoff(&long, 9, 1 << 63) > Duration::from_hours(1_000));
    assert_eq!(backoff(&RetryPolicy { base_backoff: Duration::ZERO, max_backoff: Duration::ZERO, ..long }, 1, 7), Duration::ZERO);
}
#[test]
fn retry_on_texts() {
    let default = RetryPolicy::istio_default().on;
    for (text, on, statuses) in [
        ("", RetryOn::default(), vec![]),
        ("connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes", default, vec![]),
        (" 5xx , gateway-error ,", RetryOn::FIVE_XX.with(RetryOn::GATEWAY_ERROR), vec![]),
        ("503", RetryOn::STATUS_CODES, vec![503]),
        ("reset,503,409,503", RetryOn::RESET.with(RetryOn::STATUS_CODES), vec![503, 409]),
        ("reset-before-request", RetryOn::RESET_BEFORE_REQUEST, vec![]),
        ("retriable-4xx", RetryOn::RETRIABLE_4XX, vec![]),
        ("deadline-exceeded,internal", RetryOn::DEADLINE_EXCEEDED.with(RetryOn::INTERNAL), vec![]),
        ("resource-exhausted", RetryOn::RESOURCE_EXHAUSTED, vec![]),
        ("envoy-ratelimited,http3-post-connect-failure", RetryOn::ENVOY_RATELIMITED.with(RetryOn::HTTP3), vec![]),
        ("retriable-headers", RetryOn::default(), vec![]),
    ] {
        assert_eq!(parse_retry_on(text), Ok((on, statuses)), "{text}");
    }
    for text in ["5xxx", "99", "600", "-1", "70000", "5xx;reset", "Reset"] {
        let why = parse_retry_on(text).expect_err(text);
        assert!(why.contains(text), "{why}");
    }
}
