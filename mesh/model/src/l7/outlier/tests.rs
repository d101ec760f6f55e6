use super::*;
use Seen::{Broken, Connected, Grpc, Status, Timeout, Unconnected};

fn policy() -> OutlierPolicy {
    OutlierPolicy { consecutive_5xx: 3, ..OutlierPolicy::default() }
}
fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn counts_fill_and_reset() {
    let split = OutlierPolicy { split_external_local: true, consecutive_local: 2, ..policy() };
    let gateway = OutlierPolicy { consecutive_gateway: 2, ..policy() };
    let only_gateway = OutlierPolicy { consecutive_5xx: 0, ..gateway.clone() };
    let named = OutlierPolicy { error_statuses: vec![404, 503], ..policy() };
    let named_gateway = OutlierPolicy { consecutive_5xx: 0, consecutive_gateway: 2, ..named.clone() };
    let named_split = OutlierPolicy { error_statuses: vec![404], ..split.clone() };
    let table: &[(&str, &OutlierPolicy, &[Seen], Option<Cause>)] = &[
        ("three in a row", &policy(), &[Status(500), Status(503), Status(500)], Some(Cause::Consecutive5xx)),
        ("a success between", &policy(), &[Status(500), Status(500), Status(200), Status(500)], None),
        ("a client's error is a success", &policy(), &[Status(500), Status(500), Status(404), Status(500)], None),
        ("our failures count", &policy(), &[Broken, Timeout, Status(500)], Some(Cause::Consecutive5xx)),
        ("once, not again above", &policy(), &[Status(500); 4], None),
        ("gateway errors first", &gateway, &[Status(503), Status(502)], Some(Cause::ConsecutiveGateway)),
        ("500 breaks the row of gateway errors", &only_gateway, &[Status(503), Status(500), Status(503)], None),
        ("refused and late are gateway errors", &only_gateway, &[Broken, Timeout], Some(Cause::ConsecutiveGateway)),
        ("5xx off", &only_gateway, &[Status(500); 9], None),
        ("split: ours apart", &split, &[Status(500), Status(500), Broken], None),
        ("bytes: connections that fail in a row", &policy(), &[Unconnected; 3], Some(Cause::Consecutive5xx)),
        ("bytes: not those with a good one between", &policy(), &[Unconnected, Unconnected, Connected, Unconnected], None),
        ("split: ours fill their own", &split, &[Unconnected, Unconnected], Some(Cause::ConsecutiveLocal)),
        ("split: an answer is a connection", &split, &[Unconnected, Status(500), Unconnected], None),
        ("split: so is one of bytes", &split, &[Unconnected, Connected, Unconnected], None),
        ("split: so is one that was let down", &split, &[Unconnected, Timeout, Broken], None),
        ("gRPC: as what it stands for", &policy(), &[Grpc(503); 3], Some(Cause::Consecutive5xx)),
        ("gRPC: a client's error is a success", &policy(), &[Grpc(500), Grpc(500), Grpc(404), Grpc(500)], None),
        ("named: whatever their hundred", &named, &[Status(404), Status(503), Status(404)], Some(Cause::Consecutive5xx)),
        ("named: another 5xx is a success", &named, &[Status(404), Status(404), Status(500), Status(404)], None),
        ("named: our failures count still", &named, &[Unconnected, Status(404), Timeout], Some(Cause::Consecutive5xx)),
        ("named: gateway errors are those of them", &named_gateway, &[Status(503), Status(503)], Some(Cause::ConsecutiveGateway)),
        ("named: 502 is not among them", &named_gateway, &[Status(503), Status(502), Status(503)], None),
        ("named: nor is what is below a gateway error", &named_gateway, &[Status(503), Status(404), Status(503)], None),
        ("named: not of gRPC", &named, &[Grpc(503), Grpc(500), Grpc(503)], Some(Cause::Consecutive5xx)),
        ("named: nor what is none of its errors", &named, &[Grpc(404); 3], None),
        ("named and split: an answer is a connection", &named_split, &[Unconnected, Status(404), Unconnected], None),
        ("named and split: their own count", &named_split, &[Status(404); 3], Some(Cause::Consecutive5xx)),
        ("split: which counts itself", &split, &[Timeout, Unconnected], Some(Cause::ConsecutiveLocal)),
    ];
    for (what, policy, seen, want) in table {
        let monitor = Monitor::default();
        let last = seen.iter().map(|s| monitor.note(policy, *s)).last().flatten();
        assert_eq!(last, *want, "{what}");
    }
}

#[test]
fn a_reset_starts_the_row_anew() {
    let (monitor, policy) = (Monitor::default(), policy());
    let fill = || (0..3).filter_map(|_| monitor.note(&policy, Status(500))).collect::<Vec<_>>();
    assert_eq!(fill(), [Cause::Consecutive5xx]);
    assert_eq!(fill(), []);
    monitor.reset(Cause::Consecutive5xx);
    let fill = || (0..3).filter_map(|_| monitor.note(&policy, Status(500))).collect::<Vec<_>>();
    assert_eq!(fill(), [Cause::Consecutive5xx]);
    monitor.reset_all();
    assert_eq!(monitor.note(&policy, Status(500)), None);
}

#[test]
fn threads_that_count_together_fill_a_count_once() {
    let (monitor, policy) = (Monitor::default(), OutlierPolicy { consecutive_5xx: 1000, ..policy() });
    let full: usize = std::thread::scope(|scope| {
        let all: Vec<_> =
            (0..4).map(|_| scope.spawn(|| (0..400).filter(|_| monitor.note(&policy, Status(500)).is_some()).count())).collect();
        all.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(full, 1);
}

#[test]
fn the_share_is_bounded_but_one_always_may_go() {
    let p = |max_ejection_percent| OutlierPolicy { max_ejection_percent, ..policy() };
    let table = [
        (10, 0, 3, true),
        (10, 1, 3, false),
        (0, 0, 3, true),
        (0, 1, 3, false),
        (50, 1, 4, true),
        (50, 2, 4, false),
        (50, 1, 3, false),
        (100, 2, 3, true),
        (250, 3, 3, false),
        (10, 0, 1, true),
        (10, 1, 20, true),
        (10, 2, 20, false),
    ];
    for (percent, active, hosts, want) in table {
        assert_eq!(may_eject(&p(percent), active, hosts), want, "{percent} % of {hosts}, {active} are");
    }
}

#[test]
fn ejections_grow_and_are_forgotten() {
    let p = policy();
    let mut e = Ejection::default();
    assert!(e.is_settled() && !e.is_active());
    e.eject(&p, secs(100));
    assert_eq!((e.lasts(&p), e.total()), (secs(30), 1));
    assert!(!e.tick(&p, secs(120)));
    assert!(!e.tick(&p, secs(129)));
    // At an interval, not before; and in the same look one step is forgiven.
    assert!(e.tick(&p, secs(130)));
    assert!(e.is_settled());
    // Ejected again at once it lasts as long as the first time; while it is out nothing is forgiven.
    e.eject(&p, secs(131));
    assert_eq!(e.lasts(&p), secs(30));
    let mut e = Ejection::default();
    for (n, lasts) in [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300, 300, 300, 300].into_iter().enumerate() {
        e.eject(&p, secs(1000));
        assert_eq!(e.lasts(&p), secs(lasts), "ejection {}", n + 1);
    }
    // The count stops a little above the longest time, and comes down a step every interval.
    assert!(e.tick(&p, secs(1300)));
    for _ in 0..10 {
        assert!(!e.is_settled());
        assert!(!e.tick(&p, secs(1310)));
    }
    assert!(e.is_settled());
    assert_eq!(e.total(), 14);
}

#[test]
fn a_base_above_the_longest_time_counts() {
    let p = OutlierPolicy { base_ejection: secs(600), max_ejection: secs(300), ..policy() };
    let mut e = Ejection::default();
    e.eject(&p, secs(0));
    assert_eq!(e.lasts(&p), secs(600));
    e.pardon();
    assert!(e.is_settled());
    assert!(!e.tick(&p, secs(9999)));
}
