//! What a connection costs: full mutual handshakes, both ends in one process over an in-memory pipe, one thread.
//!
//! `cargo bench -p mesh-identity` (add `--features tls-boring` for both crypto libraries). Prints the best and the median of
//! several rounds, in CPU time, as other work disturbs a mean of wall time.
#![allow(clippy::unwrap_used, reason = "a benchmark stops at the first thing it did not expect")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::{KeyExchange, Provider, TlsSettings};
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_identity::{IdentitySource, Svid, TlsContext, tls, verify};
use mesh_model::{SpiffeId, TrustDomain};
use tokio::io::duplex;

const ROUNDS: usize = 15;

fn main() {
    // `cargo test --benches` runs this too: then one round of one is enough.
    let quick = !std::env::args().any(|argument| argument == "--bench");
    let (rounds, each) = if quick { (1, 1) } else { (ROUNDS, 200) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(rounds, each));
}

async fn run(rounds: usize, each: u32) {
    let directory = tempfile::tempdir().unwrap();
    let settings = LocalCaSettings { directory: directory.path().join("ca"), ..LocalCaSettings::default() };
    let ca = LocalCa::open(&settings, Arc::new(SystemClock)).unwrap();
    let web: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap();
    let providers = [
        Provider::AwsLc,
        #[cfg(feature = "tls-boring")]
        Provider::Boring,
    ];
    for provider in providers {
        for key_exchange in [KeyExchange::Classical, KeyExchange::PreferHybrid] {
            let tls = TlsContext::new(&TlsSettings { provider, key_exchange, fips: false }, &ca, Arc::new(SystemClock)).unwrap();
            let svid = Svid::new(&web, ca.issue(&web).await.unwrap(), &tls).unwrap();
            let expect = [web.clone()];
            for news in [false, true] {
                let mut times = Vec::new();
                for _ in 0..rounds {
                    let begin = spent();
                    for _ in 0..each {
                        if news {
                            // New bundles: nothing proven before counts any more, as if the peers had never met.
                            ca.federate(TrustDomain::parse("other.example").unwrap(), Vec::new()).unwrap();
                        }
                        let (a, b) = duplex(64 * 1024);
                        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
                        let both = tokio::join!(tls::connect(&svid, a, &expect, deadline), tls::accept(&svid, b, deadline));
                        black_box((both.0.unwrap(), both.1.unwrap()));
                    }
                    times.push(spent().saturating_sub(begin) / each);
                }
                let met = if news { "first" } else { "further" };
                report(&format!("{} {key_exchange:?}: {met} mutual handshake of two peers, both ends", provider.as_str()), times);
            }
        }
    }

    let tls = TlsContext::new(&TlsSettings::default(), &ca, Arc::new(SystemClock)).unwrap();
    let svid = Svid::new(&web, ca.issue(&web).await.unwrap(), &tls).unwrap();
    let leaf = svid.chain[0].clone();
    let bundles = Arc::clone(&ca.bundle().borrow());
    let algorithms = TlsSettings::default().crypto().unwrap().signature_verification_algorithms;
    let now = rustls_pki_types::UnixTime::since_unix_epoch(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap());
    measure("read a leaf certificate", rounds, each, || {
        black_box(verify::leaf_of(&leaf).unwrap());
    });
    measure("verify a chain", rounds, each, || {
        black_box(verify::verify_chain(&leaf, &[], verify::PeerRole::Client, &bundles, &algorithms, now).unwrap());
    });
    let mut times = Vec::new();
    for _ in 0..rounds {
        let begin = spent();
        for _ in 0..each {
            black_box(Svid::new(&web, ca.issue(&web).await.unwrap(), &tls).unwrap());
        }
        times.push(spent().saturating_sub(begin) / each);
    }
    report("issue a certificate and build its TLS configurations", times);
}

/// CPU time of this thread (`/proc/thread-self/schedstat`, nanoseconds): wall time means nothing on a busy machine. Brought up
/// to date by the scheduler's tick only, so a round must last tens of milliseconds.
fn spent() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

fn measure(what: &str, rounds: usize, each: u32, mut act: impl FnMut()) {
    let each = each * 20;
    let times = (0..rounds)
        .map(|_| {
            let begin = spent();
            (0..each).for_each(|_| act());
            spent().saturating_sub(begin) / each
        })
        .collect();
    report(what, times);
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let (best, median) = (times[0], times[times.len() / 2]);
    println!(
        "{what}: best {:.1} µs, median {:.1} µs ({:.0}/s)",
        best.as_secs_f64() * 1e6,
        median.as_secs_f64() * 1e6,
        1.0 / median.as_secs_f64()
    );
}
