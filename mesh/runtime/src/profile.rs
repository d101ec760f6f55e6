//! Profiles of the running process for `go tool pprof`, on the admin server: where its CPU time goes, and who holds its memory.
//!
//! Owns the three routes, their limits, and the names of addresses. Off by default: then there is no timer and no handler, and an
//! allocation costs one more load of a flag. One CPU profile at a time. Upstream: `process::admin_routes`. Downstream: [`cpu`],
//! [`heap`], and `message`, the format.

pub mod cpu;
pub mod heap;
mod message;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::header::{CONTENT_DISPOSITION, HeaderValue};
use http::{Method, StatusCode};

use crate::admin::{HttpServer, Request, Response, respond, text};
use message::{Kind, Profile};

/// Longest stack that is kept; callers beyond are left out.
const DEPTH: usize = 64;
/// How often the samples are taken from where the signal handler leaves them.
const COLLECT: Duration = Duration::from_millis(100);

/// Adds `GET /debug/pprof/profile?seconds=1..300&frequency=1..1000` (10 s at 1000 Hz of CPU time by themselves), `GET
/// /debug/pprof/heap` and `/debug/pprof/heap/profiling?activate=true|false`, by istio/ztunnel's names.
#[must_use]
pub fn routes(server: HttpServer) -> HttpServer {
    server
        .route_async(Method::GET, "/debug/pprof/profile", of_cpu)
        .route_blocking(Method::GET, "/debug/pprof/heap", |_| of_heap())
        .route(Method::GET, "/debug/pprof/heap/profiling", switch_heap)
        .route(Method::POST, "/debug/pprof/heap/profiling", switch_heap)
}

async fn of_cpu(request: Request) -> Response {
    let (seconds, frequency) = match (number(&request, "seconds", 10, 300), number(&request, "frequency", 1000, 1000)) {
        (Ok(seconds), Ok(frequency)) => (seconds, frequency),
        (Err(why), _) | (_, Err(why)) => return text(StatusCode::BAD_REQUEST, why),
    };
    let mut sampling = match cpu::Sampling::start(frequency) {
        Ok(Some(sampling)) => sampling,
        Ok(None) => return text(StatusCode::CONFLICT, "another CPU profile is being taken\n"),
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, format!("no CPU profile: {error}\n")),
    };
    let begin = SystemTime::now();
    // Nobody waits for it any more: this is dropped, and the sampling ends.
    for _ in 0..u64::from(seconds) * 1000 / COLLECT.as_millis() as u64 {
        tokio::time::sleep(COLLECT).await;
        sampling.collect();
    }
    let period = sampling.period();
    let stacks = sampling.finish();
    let encode = move || {
        let nanos = |samples: u64| samples.saturating_mul(period.as_nanos() as u64);
        let samples = stacks.into_iter().map(|(stack, samples)| (stack, [samples, nanos(samples)]));
        let cpu = Kind { name: "cpu", unit: "nanoseconds" };
        let mut profile = Profile::new([Kind { name: "samples", unit: "count" }, cpu], cpu, period.as_nanos() as u64);
        profile.lasted(begin, begin.elapsed().unwrap_or_default());
        profile.add(samples);
        profile.encode()
    };
    match tokio::task::spawn_blocking(encode).await {
        Ok(profile) => zipped(&profile, "attachment; filename=\"profile.pb.gz\""),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn of_heap() -> Response {
    let Some(live) = heap::live() else {
        let hint = "the heap is not profiled: first ask for /debug/pprof/heap/profiling?activate=true, then for what is allocated since\n";
        return text(StatusCode::CONFLICT, hint);
    };
    let mut stacks: BTreeMap<Box<[usize]>, [u64; 2]> = BTreeMap::new();
    for sample in live {
        let [objects, bytes] = sample.stands_for();
        let sum = stacks.entry(sample.stack).or_default();
        *sum = [sum[0] + objects, sum[1] + bytes];
    }
    let space = Kind { name: "space", unit: "bytes" };
    let kinds = [Kind { name: "inuse_objects", unit: "count" }, Kind { name: "inuse_space", unit: "bytes" }];
    let mut profile = Profile::new(kinds, space, heap::RATE as u64);
    profile.lasted(SystemTime::now(), Duration::ZERO);
    profile.add(stacks);
    zipped(&profile.encode(), "attachment; filename=\"heap.pb.gz\"")
}

fn switch_heap(request: Request) -> Response {
    match request.query.get("activate").map(String::as_str) {
        Some("true") if heap::activate() => text(StatusCode::OK, "heap profiling is active\n"),
        Some("true") => text(StatusCode::NOT_IMPLEMENTED, "this program's allocator takes no samples\n"),
        Some("false") => {
            heap::deactivate();
            text(StatusCode::OK, "heap profiling is not active\n")
        }
        _ => text(StatusCode::BAD_REQUEST, "activate: true or false\n"),
    }
}

fn number(request: &Request, name: &str, by_itself: u32, most: u32) -> Result<u32, String> {
    let Some(text) = request.query.get(name) else { return Ok(by_itself) };
    text.parse().ok().filter(|n| (1..=most).contains(n)).ok_or_else(|| format!("{name}: a number from 1 to {most}\n"))
}

/// As Go's own handlers answer.
fn zipped(profile: &[u8], name: &'static str) -> Response {
    let mut zip = GzEncoder::new(Vec::new(), Compression::fast());
    match zip.write_all(profile).and_then(|()| zip.finish()) {
        Ok(body) => {
            let mut response = respond(StatusCode::OK, "application/octet-stream", Bytes::from(body));
            response.headers_mut().insert(CONTENT_DISPOSITION, HeaderValue::from_static(name));
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

#[cfg(test)]
mod tests;
