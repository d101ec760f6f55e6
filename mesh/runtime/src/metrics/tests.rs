use std::collections::BTreeMap;
use std::io::Read;
use std::time::{Duration, Instant};

use http::HeaderMap;

use super::*;

const MINUTE: Duration = Duration::from_mins(1);

fn request(accept_encoding: Option<&'static str>) -> Request {
    let mut headers = HeaderMap::new();
    if let Some(value) = accept_encoding {
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static(value));
    }
    Request { method: Method::GET, path: "/metrics".into(), query: BTreeMap::new(), headers, body: Bytes::new() }
}

#[test]
fn a_family_exposes_its_series() {
    let registry = Registry::new();
    let family: Family<Counter> =
        registry.family(Family::new("istio_tcp_sent_bytes_total", "Bytes\nsent", &["a", "b", "c"])).unwrap();
    let handle = family.get(&["one", "say \"hi\"\\\n"]);
    handle.add(40);
    family.get(&["one", "say \"hi\"\\\n", ""]).add(2);
    assert_eq!(handle.get(), 42);
    assert_eq!(family.len(), 1);
    assert_eq!(
        registry.encode(),
        "# HELP istio_tcp_sent_bytes_total Bytes\\nsent\n# TYPE istio_tcp_sent_bytes_total counter\n\
         istio_tcp_sent_bytes_total{a=\"one\",b=\"say \\\"hi\\\"\\\\\\n\"} 42\n"
    );
}

#[test]
fn label_values_that_only_join_alike_are_different_series() {
    let family: Family<Gauge> = Family::new("x", "x", &["a", "b"]);
    family.get(&["ab", "c"]).inc();
    family.get(&["a", "bc"]).dec();
    assert_eq!(family.len(), 2);
    assert_eq!(family.get(&["ab", "c"]).get(), 1);
    assert_eq!(family.get(&["a", "bc", "surplus"]).get(), -1);
}

#[test]
fn label_values_are_bounded() {
    let family: Family<Counter> = Family::new("x", "x", &["a"]);
    let long = "é".repeat(10_000);
    family.get(&[&long]).inc();
    family.get(&[&format!("{long}tail")]).inc();
    assert_eq!(family.len(), 1);
    let mut out = String::new();
    family.exposed().expose(&mut out);
    assert!(out.len() < 2000);
}

#[test]
fn series_expire_when_nobody_holds_or_asks() {
    let family: Family<Counter> = Family::new("x", "x", &["pod"]);
    let held = family.get(&["held"]);
    family.pin(&["pinned"]).inc();
    drop(family.get(&["gone"]));
    let now = Instant::now();
    assert_eq!(family.sweep_at(now + MINUTE, MINUTE * 2), 0);
    assert_eq!(family.sweep_at(now + MINUTE * 3, MINUTE * 2), 1);
    assert_eq!(family.len(), 2);
    drop(held);
    // It was seen in use at minute 3, so its time runs from there.
    assert_eq!(family.sweep_at(now + MINUTE * 4, MINUTE * 2), 0);
    assert_eq!(family.sweep_at(now + MINUTE * 6, MINUTE * 2), 1);
    assert_eq!(family.sweep_at(now + MINUTE * 600, MINUTE), 0);
    assert_eq!(family.get(&["pinned"]).get(), 1);
}

#[test]
fn series_of_a_removed_workload_go_at_once() {
    let family: Family<Counter> = Family::new("x", "x", &["pod", "peer"]);
    let held = family.get(&["a", "b"]);
    family.get(&["c", "b"]).inc();
    assert_eq!(family.expire(|values| values == ["a", "b"]), 1);
    held.inc();
    assert_eq!(family.len(), 1);
    assert_eq!(family.get(&["a", "b"]).get(), 0, "a new series begins at zero");
}

#[test]
fn a_sweep_gives_memory_back_and_keeps_what_is_left() {
    let family: Family<Counter> = Family::new("x", "x", &["n"]);
    let keep: Vec<_> = (0..10).map(|n| family.get(&[&format!("keep{n}")])).collect();
    for n in 0..5000 {
        family.get(&[&n.to_string()]).inc();
    }
    let dropped = family.sweep_at(Instant::now() + MINUTE, MINUTE / 2);
    assert_eq!(dropped, 5000);
    for (n, handle) in keep.iter().enumerate() {
        handle.inc();
        assert_eq!(family.get(&[&format!("keep{n}")]).get(), 1);
    }
    assert_eq!(family.len(), 10);
}

#[test]
fn histograms_are_cumulative() {
    let registry = Registry::new();
    let family = registry.family(Family::with_buckets("d_seconds", "d", &["q"], &[0.001, 0.5, 1.0])).unwrap();
    let histogram = family.get(&["A"]);
    for value in [0.0005, 0.5, 0.6, 7.0, f64::NAN] {
        histogram.observe(value);
    }
    histogram.observe_duration(Duration::from_millis(1));
    assert_eq!(histogram.count(), 5);
    assert_eq!(
        registry.encode(),
        "# HELP d_seconds d\n# TYPE d_seconds histogram\n\
         d_seconds_bucket{q=\"A\",le=\"0.001\"} 2\nd_seconds_bucket{q=\"A\",le=\"0.5\"} 3\n\
         d_seconds_bucket{q=\"A\",le=\"1\"} 4\nd_seconds_bucket{q=\"A\",le=\"+Inf\"} 5\n\
         d_seconds_sum{q=\"A\"} 8.1015\nd_seconds_count{q=\"A\"} 5\n"
    );
    let bare = Family::with_buckets("b", "b", &[], &[]);
    bare.get(&[]).observe(1.0);
    let mut out = String::new();
    bare.exposed().expose(&mut out);
    assert!(out.ends_with("b_bucket{le=\"+Inf\"} 1\nb_sum 1\nb_count 1\n"), "{out}");
}

#[test]
fn names_are_checked_and_unique_across_both_kinds() {
    let registry = Registry::new();
    let plain = registry.register(prometheus::IntCounter::new("plain_total", "p").unwrap()).unwrap();
    plain.inc_by(3);
    assert!(registry.encode().contains("\nplain_total 3\n"));
    assert!(matches!(registry.family(Family::<Counter>::new("plain_total", "p", &[])), Err(MetricError::Duplicate(_))));
    registry.family(Family::<Gauge>::new("g", "g", &[])).unwrap();
    let twin = prometheus::IntGauge::new("g", "g").unwrap();
    assert!(matches!(registry.register(twin), Err(MetricError::Duplicate(_))));
    for (name, labels) in [("1x", &["a"] as &[_]), ("", &[]), ("a-b", &[]), ("ok", &["le:x"]), ("ok", &["__r"])] {
        let bad = registry.family(Family::<Counter>::new(name, "x", labels));
        assert!(matches!(bad, Err(MetricError::BadName(_))), "{name} {labels:?}");
    }
}

#[test]
fn the_process_and_its_build_are_metrics() {
    let registry = Registry::new();
    registry.process().unwrap();
    registry.build_info("ztunnel", "1.2.3").unwrap();
    assert!(registry.process().is_err());
    let text = registry.encode();
    for name in process::NAMES {
        let prefix = format!("{name} ");
        let value = text.lines().find_map(|line| line.strip_prefix(prefix.as_str())).expect(name);
        assert!(value.parse::<f64>().unwrap() > 0.0, "{name}");
    }
    assert!(text.contains("\nistio_build{component=\"ztunnel\",tag=\"1.2.3\"} 1\n"), "{text}");
}

#[test]
fn scrapes_are_compressed_only_for_those_who_ask() {
    let registry = Registry::new();
    registry.build_info("ztunnel", "1").unwrap();
    let plain = registry.answer(&request(None));
    assert!(plain.headers().get(CONTENT_ENCODING).is_none());
    let packed = registry.answer(&request(Some("deflate, gzip;q=0.5")));
    assert_eq!(packed.headers()[CONTENT_ENCODING], "gzip");
    let mut text = String::new();
    flate2::read::GzDecoder::new(&packed.body()[..]).read_to_string(&mut text).unwrap();
    assert_eq!(text.as_bytes(), &plain.body()[..]);
    for refused in ["gzip;q=0", "br", "gzip; q=0.0"] {
        assert!(registry.answer(&request(Some(refused))).headers().get(CONTENT_ENCODING).is_none(), "{refused}");
    }
}

#[test]
fn handles_count_from_many_threads() {
    let family: Family<Counter> = Family::new("x", "x", &["n"]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..1000 {
                    family.get(&[&(n % 10).to_string()]).inc();
                }
            });
        }
    });
    assert_eq!((0..10).map(|n| family.get(&[&n.to_string()]).get()).sum::<u64>(), 4000);
}

#[test]
fn series_have_labels_of_their_own() {
    let registry = Registry::new();
    let family = registry.family(Family::<Counter>::new("a_total", "A", &["x", "y"])).expect("new");
    family.get_tagged(&["1", ""], &[("z", "a\"b"), ("w", "")]).inc();
    family.get_tagged(&["1", ""], &[("z", "a\"b"), ("w", "")]).inc();
    family.get(&["1", ""]).inc();
    let text = registry.encode();
    assert!(text.contains("a_total{x=\"1\",z=\"a\\\"b\"} 2\n") && text.contains("a_total{x=\"1\"} 1\n"), "{text}");
}

#[test]
fn a_full_family_counts_unseen_and_says_so() {
    let registry = Registry::new();
    let family = registry.family(Family::<Counter>::new("a_total", "A", &["x"])).expect("new");
    for n in 0..100_005 {
        family.get(&[&n.to_string()]).inc();
    }
    assert_eq!(family.len(), 100_000);
    family.get(&["7"]).inc();
    assert_eq!(family.get(&["7"]).get(), 2, "those that are there go on");
    assert!(registry.encode().contains("culvert_metrics_series_lost_total 5\n"));
}

#[test]
fn what_is_computed_at_a_scrape_is_written_in_families() {
    let registry = Registry::new();
    let write = |scrape: &mut Scrape<'_>| {
        scrape.family("a_total", "A", "counter").put(&[("x", "1\"2"), ("y", "")], 3).put(&[], 4);
        scrape.family("b", "B", "gauge");
    };
    registry.on_scrape(&["a_total", "b"], write).expect("new names");
    let text = registry.encode();
    assert_eq!(
        text,
        "# HELP a_total A\n# TYPE a_total counter\na_total{x=\"1\\\"2\"} 3\na_total 4\n# HELP b B\n# TYPE b gauge\n"
    );
    assert!(matches!(registry.on_scrape(&["b"], |_| {}), Err(MetricError::Duplicate(name)) if name == "b"));
    assert!(matches!(registry.on_scrape(&["b c"], |_| {}), Err(MetricError::BadName(_))));
}
