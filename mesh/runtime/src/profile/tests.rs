use std::alloc::System;
use std::io::Read as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use prost::Message as _;

use super::message::wire;
use super::*;

#[global_allocator]
static ALLOCATOR: heap::Sampled<System> = heap::Sampled(System);

async fn ask(target: &str) -> Response {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let request = Request {
        method: Method::GET,
        path: path.to_owned(),
        query: crate::admin::parse_query(query),
        headers: http::HeaderMap::new(),
        body: Bytes::new(),
    };
    routes(HttpServer::new("test")).answer(request).await
}

fn parse(response: &Response) -> wire::Profile {
    assert_eq!(response.status(), StatusCode::OK, "{:?}", response.body());
    assert_eq!(response.headers()[http::header::CONTENT_TYPE], "application/octet-stream");
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(&response.body()[..]).read_to_end(&mut bytes).unwrap();
    wire::Profile::decode(&bytes[..]).unwrap()
}

impl wire::Profile {
    fn text(&self, at: i64) -> &str {
        &self.string_table[usize::try_from(at).unwrap()]
    }
    fn kinds(&self) -> Vec<(&str, &str)> {
        self.sample_type.iter().map(|kind| (self.text(kind.r#type), self.text(kind.unit))).collect()
    }
    /// The functions of a sample, innermost first.
    fn names(&self, sample: &wire::Sample) -> Vec<&str> {
        let lines = |id: &u64| self.location.iter().find(|l| l.id == *id).unwrap().line.clone();
        let function = |line: wire::Line| self.function.iter().find(|f| f.id == line.function_id).unwrap();
        sample.location_id.iter().flat_map(lines).map(|line| self.text(function(line).name)).collect()
    }
    /// What the second value of samples that were in `function` comes to. Names of private functions are short.
    fn of(&self, function: &str) -> i64 {
        let is = |name: &&str| name.rsplit("::").next() == Some(function);
        self.sample.iter().filter(|sample| self.names(sample).iter().any(is)).map(|sample| sample.value[1]).sum()
    }
    /// The same as a share of all.
    fn share(&self, function: &str) -> f64 {
        let value = |sample: &&wire::Sample| sample.value[1] as f64;
        let all: f64 = self.sample.iter().map(|sample| value(&sample)).sum();
        self.of(function) as f64 / all
    }
}

#[inline(never)]
fn burn(until: &AtomicBool) -> u64 {
    let mut sum = 1u64;
    while !until.load(Ordering::Relaxed) {
        sum = std::hint::black_box(sum.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    sum
}

#[tokio::test]
async fn a_cpu_profile_names_who_burns() {
    static DONE: AtomicBool = AtomicBool::new(false);
    let burner = std::thread::spawn(|| burn(&DONE));
    let begin = Instant::now();
    let (answer, second) = tokio::join!(ask("/debug/pprof/profile?seconds=1&frequency=500"), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        ask("/debug/pprof/profile?seconds=1").await
    });
    assert_eq!(second.status(), StatusCode::CONFLICT, "one at a time");
    assert!(begin.elapsed() >= Duration::from_secs(1));
    DONE.store(true, Ordering::Relaxed);
    burner.join().unwrap();

    let profile = parse(&answer);
    assert_eq!(profile.kinds(), [("samples", "count"), ("cpu", "nanoseconds")]);
    assert_eq!(profile.period, 2_000_000);
    assert!(profile.duration_nanos >= 1_000_000_000 && profile.time_nanos > 0);
    assert!(profile.sample.iter().all(|s| s.value[1] == s.value[0] * 2_000_000));
    assert!(profile.share("burn") > 0.3, "{}", profile.share("burn"));
    // But for a tick that hits the very end of the one before, which a busy machine makes happen.
    let of_itself = profile.share("on_tick") + profile.share("walk_stack");
    assert!(of_itself < 0.02, "the sampling itself is not told: {of_itself}");
    assert!(profile.function.iter().any(|f| profile.text(f.filename).ends_with("profile/tests.rs")), "with its file");

    // Whoever goes away ends it.
    let given_up = tokio::time::timeout(Duration::from_millis(50), ask("/debug/pprof/profile?seconds=300")).await;
    assert!(given_up.is_err());
    assert!(cpu::Sampling::start(1).unwrap().is_some());
}

#[tokio::test]
async fn a_heap_profile_names_who_holds_memory() {
    assert_eq!(ask("/debug/pprof/heap").await.status(), StatusCode::CONFLICT, "off by itself");
    assert_eq!(ask("/debug/pprof/heap/profiling").await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(ask("/debug/pprof/heap/profiling?activate=true").await.status(), StatusCode::OK);
    let held = hold(64 << 20);
    assert_eq!(hold_and_drop(64 << 20), 64 << 20);
    let profile = parse(&ask("/debug/pprof/heap").await);
    assert_eq!(profile.kinds(), [("inuse_objects", "count"), ("inuse_space", "bytes")]);
    // 128 samples are expected: a third off is four deviations.
    let bytes = profile.of("hold");
    assert!((43 << 20..86 << 20).contains(&bytes), "{bytes}");
    assert_eq!(profile.of("hold_and_drop"), 0, "what was freed is not held");
    assert_eq!(profile.of("walk_stack"), 0, "the sampling itself is not told");
    drop(held);
    assert_eq!(ask("/debug/pprof/heap/profiling?activate=false").await.status(), StatusCode::OK);
    assert_eq!(ask("/debug/pprof/heap").await.status(), StatusCode::CONFLICT);
}

#[inline(never)]
fn hold(bytes: usize) -> Vec<Vec<u8>> {
    (0..bytes / 4096).map(|_| vec![1u8; 4096]).collect()
}
#[inline(never)]
fn hold_and_drop(bytes: usize) -> usize {
    (0..bytes / 4096).map(|_| std::hint::black_box(vec![1u8; 4096]).len()).sum()
}

#[test]
fn a_sample_stands_for_as_many_as_it_was_likely() {
    let stands_for = |size| heap::Sample { size, stack: Box::default() }.stands_for();
    assert_eq!(stands_for(1)[0], heap::RATE as u64 + 1);
    assert_eq!(stands_for(heap::RATE * 20), [1, heap::RATE as u64 * 20]);
    let [objects, bytes] = stands_for(heap::RATE);
    // 1 / (1 − 1/e)
    assert_eq!((objects, bytes), (2, 829_411));
}

#[tokio::test]
async fn what_is_out_of_bounds_is_refused() {
    for wrong in ["seconds=0", "seconds=301", "frequency=0", "frequency=1001", "seconds=x", "frequency=-1"] {
        let answer = ask(&format!("/debug/pprof/profile?{wrong}")).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{wrong}");
    }
}
