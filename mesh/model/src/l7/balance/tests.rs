use super::*;
use crate::l7::destination::{HashKey, LocalityPolicy};
use crate::labels::Labels;
use crate::workload::{Locality, Workload};
use std::collections::HashMap;

const KEYS: [&str; 8] =
    ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80", "10.0.0.6:80", "10.0.0.7:80", "10.0.0.8:80"];

fn host(n: usize) -> Entry<'static> {
    Entry { weight: 1, priority: 0, share: 0, healthy: true, key: KEYS[n] }
}
fn hosts(n: usize) -> Vec<Entry<'static>> {
    (0..n).map(host).collect()
}
fn hash(algorithm: HashAlgorithm) -> Balance {
    Balance::Hash { algorithm, key: HashKey::SourceIp }
}
fn draws(n: u64) -> impl Iterator<Item = u64> {
    (0..n).map(|i| redraw(0x5eed, i))
}
fn at(draw: u64) -> Chance {
    Chance { draw, hash: None, turn: 0 }
}
/// Shares of the picks, in per mille.
fn shares(plan: &Plan, picks: impl Iterator<Item = Chance>, load: impl Fn(usize) -> u64) -> HashMap<usize, i64> {
    let (mut out, mut all) = (HashMap::<usize, i64>::new(), 0_i64);
    for chance in picks {
        *out.entry(plan.pick(chance, &load).unwrap()).or_default() += 1;
        all += 1;
    }
    for n in out.values_mut() {
        *n = (*n * 1000 + all / 2) / all;
    }
    out
}
fn near(shares: &HashMap<usize, i64>, want: &[i64]) {
    for (at, want) in want.iter().enumerate() {
        let have = shares.get(&at).copied().unwrap_or(0);
        assert!((have - want).abs() <= 15, "host {at}: {have} per mille, not {want}: {shares:?}");
    }
}

#[test]
fn draws_follow_the_weights() {
    let mut four = hosts(4);
    for balance in [Balance::Random, Balance::LeastRequest] {
        for h in &mut four {
            h.weight = 1;
        }
        near(&shares(&Plan::new(&balance, &four, &[], 0), draws(20_000).map(at), |_| 0), &[250; 4]);
        four[3].weight = 5;
        near(&shares(&Plan::new(&balance, &four, &[], 0), draws(20_000).map(at), |_| 0), &[125, 125, 125, 625]);
    }
}

#[test]
fn the_less_loaded_of_two_gets_the_request() {
    let plan = Plan::new(&Balance::LeastRequest, &hosts(2), &[], 0);
    // The loaded one is chosen only when both draws are of it.
    near(&shares(&plan, draws(20_000).map(at), |h| if h == 0 { 10 } else { 3 }), &[250, 750]);
    // Per unit of weight the second is the less loaded one.
    let mut two = hosts(2);
    two[1].weight = 3;
    let plan = Plan::new(&Balance::LeastRequest, &two, &[], 0);
    near(&shares(&plan, draws(20_000).map(at), |h| [1, 2][h]), &[63, 937]);
}

#[test]
fn turns_are_exact() {
    let order = |hosts: &[Entry<'_>], n: u64| -> Vec<usize> {
        let plan = Plan::new(&Balance::RoundRobin, hosts, &[], 0);
        assert!(plan.takes_turns());
        (0..n).map(|turn| plan.pick(Chance { draw: redraw(9, turn), hash: None, turn }, |_| 0).unwrap()).collect()
    };
    assert_eq!(order(&hosts(3), 7), [0, 1, 2, 0, 1, 2, 0]);
    let mut three = hosts(3);
    three[0].weight = 5;
    let seen = order(&three, 7);
    assert_eq!([0, 1, 2].map(|h| seen.iter().filter(|s| **s == h).count()), [5, 1, 1]);
    // Spread, not five in a row.
    assert!(!seen.windows(4).any(|w| w.iter().all(|h| *h == 0)), "{seen:?}");
    // Weights too large to write out keep their proportion.
    three[0].weight = 4_000_000;
    three[1].weight = 2_000_000;
    three[2].weight = 1_999_999;
    let seen = order(&three, 8000);
    assert!((seen.iter().filter(|h| **h == 0).count() as i64 - 4000).abs() <= 10);
}

#[test]
fn a_ring_keeps_requests_where_they_were_when_a_host_leaves() {
    for algorithm in [HashAlgorithm::Ring(1024), HashAlgorithm::Maglev(65_537)] {
        let balance = hash(algorithm);
        let before = Plan::new(&balance, &hosts(8), &[], 0);
        let after = Plan::new(&balance, &hosts(7), &[], 0);
        let by = |plan: &Plan, h: u64| plan.pick(Chance { draw: 1, hash: Some(h), turn: 0 }, |_| 0).unwrap();
        let (mut moved, mut own) = (0, 0);
        for h in draws(20_000) {
            let (was, is) = (by(&before, h), by(&after, h));
            own += i32::from(was == 7);
            moved += i32::from(was != 7 && was != is);
        }
        assert!((1_500..4_500).contains(&own), "{algorithm:?}: {own} of 20000 were the eighth host's");
        // A ring keeps its size, as Envoy's does: 128 points each become 147, and the new ones take an eighth of the rest.
        let most = if matches!(algorithm, HashAlgorithm::Ring(_)) { 2_600 } else { 1_000 };
        assert!(moved <= most, "{algorithm:?}: {moved} requests of other hosts moved");
        // And one that is ejected is as good as gone.
        let mut ejected = hosts(8);
        ejected[7].healthy = false;
        let ejected = Plan::new(&balance, &ejected, &[], 0);
        for h in draws(1000) {
            assert_eq!(by(&ejected, h), by(&after, h));
        }
    }
}

#[test]
fn tables_have_the_sizes_and_shares_envoy_gives_them() {
    let placed = |n: usize, first: u32| (0..n).map(move |i| (i as u32, KEYS[i], if i == 0 { first } else { 1 }));
    // 3 hosts: 1024 / 3 rounded up, times 3.
    assert_eq!(Ring::new(placed(3, 1), 1024).len(), 1026);
    // Lightest 1/5: 205 points, scale 1025.
    assert_eq!(Ring::new(placed(4, 2), 1024).len(), 1025);
    assert!(Ring::new(placed(0, 1), 1024).is_empty());
    assert_eq!(Ring::new(placed(0, 1), 1024).find(7), None);
    assert_eq!(Maglev::new(placed(0, 1), 65_537).find(7), None);
    let maglev = Maglev::new(placed(4, 1), 65_537);
    let mut counts = [0_i64; 4];
    for slot in 0..65_537 {
        counts[maglev.find(slot).unwrap()] += 1;
    }
    assert!(counts.iter().all(|n| (n - 16_384).abs() <= 2), "{counts:?}");
    let maglev = Maglev::new(placed(2, 3), 65_537);
    let first = (0..65_537).filter(|slot| maglev.find(*slot) == Some(0)).count() as i64;
    assert!((first - 49_152).abs() <= 3, "{first}");
    // A table size that is no prime still has a host everywhere.
    let odd = Maglev::new(placed(3, 1), 64);
    assert!((0..64).all(|slot| odd.find(slot).is_some()));
}

#[test]
fn a_request_without_hash_is_drawn() {
    let plan = Plan::new(&hash(HashAlgorithm::Ring(1024)), &hosts(4), &[], 0);
    near(&shares(&plan, draws(20_000).map(at), |_| 0), &[250; 4]);
}

#[test]
fn priorities_spill_over_as_envoy_says() {
    let load = |counts: &[(u64, u64)], panic| loads(counts, panic).iter().map(|l| (l.percent, l.panic)).collect::<Vec<_>>();
    type Case = (&'static [(u64, u64)], u32, &'static [(u64, bool)]);
    let table: &[Case] = &[
        (&[(10, 10), (10, 10)], 0, &[(100, false), (0, false)]),
        // 72 % healthy is still enough at 1.4.
        (&[(72, 100), (100, 100)], 50, &[(100, false), (0, false)]),
        (&[(50, 100), (100, 100)], 50, &[(70, false), (30, false)]),
        (&[(25, 100), (25, 100)], 0, &[(50, false), (50, false)]),
        // Together below 100: scaled up, and those below the threshold panic.
        (&[(25, 100), (25, 100)], 50, &[(50, true), (50, true)]),
        (&[(20, 100), (40, 100)], 30, &[(34, true), (66, false)]),
        (&[(0, 10), (10, 10)], 50, &[(0, false), (100, false)]),
        // Nothing healthy: all share by number, or nobody.
        (&[(0, 30), (0, 10)], 50, &[(75, true), (25, true)]),
        (&[(0, 30), (0, 10)], 0, &[(100, false), (0, false)]),
        (&[], 50, &[]),
    ];
    for (counts, panic, want) in table {
        assert_eq!(load(counts, *panic), want.to_vec(), "{counts:?} at {panic}");
    }
}

#[test]
fn picks_follow_priorities_health_and_panic() {
    let mut four = hosts(4);
    four[2].priority = 3;
    four[3].priority = 3;
    let plan = |hosts: &[Entry<'_>], panic| Plan::new(&Balance::Random, hosts, &[], panic);
    near(&shares(&plan(&four, 0), draws(10_000).map(at), |_| 0), &[500, 500, 0, 0]);
    four[1].healthy = false;
    near(&shares(&plan(&four, 0), draws(10_000).map(at), |_| 0), &[700, 0, 150, 150]);
    for h in &mut four {
        h.healthy = false;
    }
    assert_eq!(plan(&four, 0).pick(at(1), |_| 0), None, "no panic: nobody");
    near(&shares(&plan(&four, 50), draws(10_000).map(at), |_| 0), &[250; 4]);
    assert_eq!(plan(&[], 50).pick(at(1), |_| 0), None);
}

#[test]
fn what_is_left_out_gets_nothing_while_others_are_healthy() {
    // Priorities 0, 3 and 5, of 2, 4 and 2 hosts.
    let mut eight = hosts(8);
    for (h, priority) in eight.iter_mut().zip([0, 0, 3, 3, 3, 3, 5, 5]) {
        h.priority = priority;
    }
    let plan = |hosts: &[Entry<'_>], panic| Plan::new(&Balance::Random, hosts, &[], panic);
    let of = |plan: &Plan, left_out: &[u32]| {
        let mut counts = [0; 3];
        for draw in draws(10_000) {
            match plan.pick_avoiding(at(draw), |_| 0, || 0, |_, _| false, left_out) {
                Some(0 | 1) => counts[0] += 1,
                Some(2..=5) => counts[1] += 1,
                Some(_) => counts[2] += 1,
                None => {}
            }
        }
        counts.map(|n| (n + 50) / 100)
    };
    for (down, left_out, want) in [
        (&[][..], &[][..], [100, 0, 0]),
        (&[], &[0], [0, 100, 0]),
        (&[], &[0, 3], [0, 0, 100]),
        (&[], &[3], [100, 0, 0]),
        // One of four is left: it bears 35 %, and the rest is the next one's.
        (&[2, 3, 4], &[0], [0, 35, 65]),
        // Nobody there.
        (&[2, 3, 4, 5], &[0], [0, 0, 100]),
        (&[2, 3, 4, 5, 6, 7], &[0], [100, 0, 0]),
        // What none of the others bears is scaled up.
        (&[2, 3, 4, 6, 7], &[0], [0, 100, 0]),
        // All left out, or one nobody has: as if nothing were said.
        (&[], &[0, 3, 5], [100, 0, 0]),
        (&[], &[7], [100, 0, 0]),
    ] {
        let mut hosts = eight.clone();
        for h in down {
            let at: usize = *h;
            hosts[at].healthy = false;
        }
        let got = of(&plan(&hosts, 0), left_out);
        assert!(
            got.iter().zip(want).all(|(got, want): (&i32, i32)| (got - want).abs() <= 2),
            "{down:?} {left_out:?}: {got:?}, {want:?}"
        );
        assert_eq!(plan(&hosts, 0).is_some_left(left_out), left_out.len() < 3 && down.len() < 6, "{down:?} {left_out:?}");
    }
    // In a panic everywhere there is nothing to keep away from.
    for h in &mut eight {
        h.healthy = false;
    }
    assert_eq!(of(&plan(&eight, 50), &[0]), of(&plan(&eight, 50), &[]));
}

#[test]
fn localities_get_their_shares_while_they_can_bear_them() {
    let mut four = hosts(4);
    for (h, share) in four.iter_mut().zip([0, 0, 0, 1]) {
        h.share = share;
    }
    let plan = |hosts: &[Entry<'_>]| Plan::new(&Balance::LeastRequest, hosts, &[80, 20], 0);
    near(&shares(&plan(&four), draws(20_000).map(at), |_| 0), &[267, 267, 267, 200]);
    // One of three is left: it bears 46 % of 80.
    four[0].healthy = false;
    four[1].healthy = false;
    near(&shares(&plan(&four), draws(20_000).map(at), |_| 0), &[0, 0, 648, 352]);
    four[3].healthy = false;
    near(&shares(&plan(&four), draws(20_000).map(at), |_| 0), &[0, 0, 1000, 0]);
}

#[test]
fn tried_hosts_are_avoided_if_there_are_others() {
    let plan = Plan::new(&Balance::Random, &hosts(2), &[], 0);
    let picks = |avoid: &dyn Fn(usize, u64) -> bool| {
        draws(2_000).filter(|d| plan.pick_avoiding(at(*d), |_| 0, || 0, avoid, &[]) == Some(0)).count()
    };
    assert_eq!(picks(&|h, _| h == 0), 0, "also when all draws miss the other one");
    assert!((900..1100).contains(&picks(&|_, _| true)), "with nobody left any will do");
    // In turn the next turn is taken.
    let turns = std::cell::Cell::new(0);
    let plan = Plan::new(&Balance::RoundRobin, &hosts(3), &[], 0);
    let next = || {
        turns.set(turns.get() + 1);
        turns.get()
    };
    assert_eq!(plan.pick_avoiding(at(1), |_| 0, next, |h, _| h == 0, &[]), Some(1));
    // The same request stays with the same host.
    let plan = Plan::new(&hash(HashAlgorithm::Ring(1024)), &hosts(4), &[], 0);
    let chance = Chance { draw: 5, hash: Some(42), turn: 0 };
    assert_eq!(plan.pick_avoiding(chance, |_| 0, || 0, |_, _| true, &[]), plan.pick(chance, |_| 0));
}

#[test]
fn warming_hosts_get_their_share() {
    let w = |minimum_percent, aggression_milli| Warmup { duration: Duration::from_secs(100), minimum_percent, aggression_milli };
    let table =
        [(w(10, 1000), 0, 0.1), (w(10, 1000), 50, 0.5), (w(10, 1000), 100, 1.0), (w(10, 2000), 25, 0.5), (w(30, 500), 50, 0.3)];
    for (warmup, age, want) in table {
        let have = warmup_factor(&warmup, Duration::from_secs(age));
        assert!((have - want).abs() < 1e-9, "{warmup:?} at {age}: {have}");
    }
    // Host 0 at a fifth of its weight: 0.2 of 1.2.
    let plan = Plan::new(&Balance::LeastRequest, &hosts(2), &[], 0);
    let avoid = |h: usize, draw: u64| h == 0 && is_held_back(0.2, draw);
    let first = draws(20_000).filter(|d| plan.pick_avoiding(at(*d), |_| 0, || 0, avoid, &[]) == Some(0)).count();
    assert!((3_000..3_900).contains(&first), "{first} of 20000");
}

fn place(text: &str) -> Locality {
    let mut parts = text.split('/').map(Into::into);
    let mut next = || parts.next().unwrap_or_else(|| "".into());
    Locality { region: next(), zone: next(), subzone: next() }
}
fn there(text: &str, labels: &[(&str, &str)]) -> Workload {
    let mut w = Workload::new("u", "n", "ns");
    w.locality = place(text);
    w.labels = Labels::of(labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect());
    w
}

#[test]
fn localities_match_by_parts() {
    let table = [
        ("r/z/s", "r/z/s", true),
        ("r/z/s", "r/z", true),
        ("r/z/s", "r/z/*", true),
        ("r/z/s", "r/*", true),
        ("r/z/s", "*", true),
        ("r/z/s", "r/z/t", false),
        ("r/z/s", "r2/*", false),
        ("r/z2", "r/z", false),
        ("", "r", false),
    ];
    for (locality, rule, want) in table {
        assert_eq!(locality::matches(&place(locality), rule), want, "{locality} by {rule}");
    }
    let policy = LocalityPolicy {
        distribute: vec![
            ("r1/*".into(), vec![("r1/z1/*".into(), 80), ("r2".into(), 20)]),
            ("r2/*".into(), vec![("r2".into(), 100)]),
        ],
        ..LocalityPolicy::default()
    };
    let to = locality::distribution(&policy, &place("r1/z9")).unwrap();
    assert_eq!(locality::share_of(to, &place("r1/z1/s")), Some(0));
    assert_eq!(locality::share_of(to, &place("r2/z")), Some(1));
    assert_eq!(locality::share_of(to, &place("r1/z2")), None);
    assert!(locality::distribution(&policy, &place("r3")).is_none());
}

#[test]
fn failover_goes_by_distance_or_labels() {
    let (here, labels) = (place("r1/z1/s1"), Labels::of(vec![("tier".into(), "gold".into())]));
    let own = locality::Place { locality: &here, labels: &labels, network: "n1", cluster: "c1", node: "" };
    let by_distance = LocalityPolicy { failover: vec![("r1".into(), "r2".into())], ..LocalityPolicy::default() };
    for (to, want) in [("r1/z1/s1", 0), ("r1/z1/s2", 1), ("r1/z2/s1", 2), ("r2/z1/s1", 3), ("r3", 4)] {
        assert_eq!(locality::failover_priority(&by_distance, &own, &there(to, &[])), want, "{to}");
    }
    assert_eq!(locality::failover_priority(&LocalityPolicy::default(), &own, &there("r3", &[])), 3);
    let nowhere = Locality::default();
    let lost = locality::Place { locality: &nowhere, ..own };
    assert_eq!(locality::failover_priority(&by_distance, &lost, &there("r3", &[])), 0);
    let by_labels = LocalityPolicy {
        priority: vec![
            ("topology.kubernetes.io/region".into(), None),
            ("tier".into(), None),
            ("version".into(), Some("v2".into())),
        ],
        ..LocalityPolicy::default()
    };
    for (to, labels, want) in [
        ("r1", &[("tier", "gold"), ("version", "v2")][..], 0),
        ("r1", &[("tier", "gold"), ("version", "v1")], 1),
        ("r1", &[("version", "v2")], 2),
        ("r2", &[("tier", "gold"), ("version", "v2")], 3),
    ] {
        assert_eq!(locality::failover_priority(&by_labels, &own, &there(to, labels)), want, "{to} {labels:?}");
    }
}
