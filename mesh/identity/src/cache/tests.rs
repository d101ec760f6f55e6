use std::sync::atomic::Ordering;
use std::time::SystemTime;

use mesh_model::Reason;
use tokio::sync::Notify;
use tokio::time::{Instant, advance, sleep};

use super::*;
use crate::clock::{Clock, TokioClock};
use crate::crypto::TlsSettings;
use crate::testing::{Act, Scripted, id};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn broken() -> IdentityError {
    IdentityError::Unavailable("broken on purpose".into())
}

fn start(script: impl IntoIterator<Item = Act>) -> (SvidCache, Arc<Scripted>) {
    let clock: Arc<dyn Clock> = Arc::new(TokioClock::starting_at(SystemTime::now()));
    start_with(clock, script)
}

fn start_with(clock: Arc<dyn Clock>, script: impl IntoIterator<Item = Act>) -> (SvidCache, Arc<Scripted>) {
    let source = Scripted::new(Arc::clone(&clock), script);
    let tls = TlsContext::new(&TlsSettings::default(), &*source, clock).unwrap();
    (SvidCache::start(source.clone(), tls, &CacheSettings::default(), &Handle::current()), source)
}

fn numbered(n: usize) -> SpiffeId {
    id(&format!("spiffe://cluster.local/ns/shop/sa/web-{n}"))
}

fn minutes(n: u64) -> Duration {
    Duration::from_secs(n * 60)
}

/// Waits until the source was asked `n` times.
async fn asked(source: &Scripted, n: usize) {
    for _ in 0..100_000 {
        if source.count() >= n {
            return settle().await;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("asked {} times only", source.count());
}

/// Lets everything that is ready run: with paused time, a sleep only ends when nothing else can move.
async fn settle() {
    sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn fetching_waits_and_finding_does_not() {
    let (cache, source) = start([]);
    assert!(cache.find(&id(WEB)).is_none());
    let fetched = cache.fetch(&id(WEB)).await.unwrap();
    assert_eq!(fetched.id, id(WEB));
    assert!(Arc::ptr_eq(&cache.find(&id(WEB)).unwrap(), &fetched));
    assert!(Arc::ptr_eq(&cache.fetch(&id(WEB)).await.unwrap(), &fetched));
    assert_eq!(source.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_handle_is_warmed_up_and_follows_renewals() {
    let (cache, source) = start([]);
    let handle = cache.handle(&id(WEB));
    assert!(handle.load().is_none());
    settle().await;
    let first = handle.load().unwrap();
    // Two fifths of an hour less a tenth have not passed yet, two fifths plus a tenth have.
    sleep(minutes(21)).await;
    assert_eq!(handle.load().unwrap().serial, first.serial);
    sleep(minutes(6)).await;
    let second = handle.load().unwrap();
    assert_ne!(second.serial, first.serial);
    assert_eq!(source.count(), 2);
    sleep(minutes(24 * 60)).await;
    assert!((50..=75).contains(&source.count()), "{}", source.count());
    assert!(handle.load().unwrap().not_before > second.not_before);
}

#[tokio::test(start_paused = true)]
async fn many_waiters_are_one_request() {
    let gate = Arc::new(Notify::new());
    let (cache, source) = start([Act::Gate(gate.clone())]);
    let waiters: Vec<_> = (0..100)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.fetch(&id(WEB)).await })
        })
        .collect();
    settle().await;
    gate.notify_one();
    let mut serials = Vec::new();
    for waiter in waiters {
        serials.push(waiter.await.unwrap().unwrap().serial.clone());
    }
    serials.dedup();
    assert_eq!((serials.len(), source.count()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_valid_certificate_is_kept_when_renewal_fails() {
    let (cache, source) = start([Act::Issue, Act::Fail(broken()), Act::Panic, Act::Hang]);
    let handle = cache.handle(&id(WEB));
    settle().await;
    let first = handle.load().unwrap();
    for n in 2..=4 {
        asked(&source, n).await;
        assert_eq!(handle.load().unwrap().serial, first.serial);
        assert_eq!(cache.dump()[0].state, "Available");
    }
    // The request that hangs is given up, and the next one succeeds.
    sleep(minutes(1)).await;
    assert_ne!(handle.load().unwrap().serial, first.serial);
    assert_eq!(source.count(), 5);
}

#[tokio::test(start_paused = true)]
async fn an_authority_may_be_away_for_half_of_a_life() {
    for begins in 18..=30 {
        let (cache, source) = start([]);
        let handle = cache.handle(&id(WEB));
        settle().await;
        sleep(minutes(begins)).await;
        source.script.lock().extend(vec![Act::Fail(broken()); 1000]);
        for _ in 0..30 {
            sleep(minutes(1)).await;
            assert!(handle.load().is_some(), "away from minute {begins} on");
        }
        source.script.lock().clear();
        for _ in 0..60 {
            sleep(minutes(1)).await;
            assert!(handle.load().is_some(), "back since minute {}", begins + 30);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_authority_dates_back_is_not_renewed_for_that() {
    let clock: Arc<dyn Clock> = Arc::new(TokioClock::starting_at(SystemTime::now()));
    let source = Scripted::new(Arc::clone(&clock), []);
    let tls = TlsContext::new(&TlsSettings::default(), &*source, Arc::clone(&clock)).unwrap();
    let ca = crate::testing::TestCa::new("dates back");
    let mut params = crate::testing::leaf_params(&[WEB]);
    // As Istio's does, and of a minute's life.
    params.not_before = (clock.now() - minutes(2)).into();
    params.not_after = (clock.now() + minutes(1)).into();
    let svid = Svid::new(&id(WEB), ca.sign(&params), &tls).unwrap();
    let rest = rotate::until_renewal(&svid, clock.now(), 0.0);
    assert!((20..=25).contains(&rest.as_secs()), "{rest:?}");
}

#[tokio::test(start_paused = true)]
async fn an_expired_certificate_is_not_handed_out() {
    let (cache, source) = start(std::iter::once(Act::Issue).chain(vec![Act::Fail(broken()); 100]));
    let handle = cache.handle(&id(WEB));
    settle().await;
    sleep(minutes(59)).await;
    assert!(handle.load().is_some());
    sleep(minutes(2)).await;
    assert!(handle.load().is_none() && cache.find(&id(WEB)).is_none());
    let dump = cache.dump().remove(0);
    assert!(dump.state.starts_with("Unavailable: ") && dump.state.contains("broken on purpose"), "{}", dump.state);
    assert!(dump.cert_chain.is_empty());
    // Recovery is found without anyone asking, within the longest rest.
    source.script.lock().clear();
    sleep(minutes(4)).await;
    assert!(handle.load().is_some());
}

#[tokio::test(start_paused = true)]
async fn retries_back_off_and_end_with_success() {
    let (cache, source) = start(vec![Act::Fail(broken()); 12]);
    let begin = Instant::now();
    cache.prefetch(&id(WEB));
    let mut at = Vec::new();
    for n in 1..=13 {
        asked(&source, n).await;
        at.push(begin.elapsed().as_secs_f64());
    }
    let rests: Vec<f64> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (n, rest) in rests.iter().enumerate() {
        let planned = (0.5 * 2f64.powi(n as i32)).min(150.0);
        assert!((planned * 0.8 - 0.2..=planned * 1.2 + 0.2).contains(rest), "{n}: {rest}");
    }
    assert!(cache.find(&id(WEB)).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_failure_reaches_all_who_wait_and_the_next_ones_at_once() {
    let gate = Arc::new(Notify::new());
    let (cache, source) = start([Act::Fail(broken()), Act::Fail(broken()), Act::Gate(gate)]);
    let error = cache.fetch(&id(WEB)).await.unwrap_err();
    assert_eq!((error.clone(), error.reason()), (broken(), Reason::NoCertificate));
    let begin = Instant::now();
    assert_eq!(cache.fetch(&id(WEB)).await.unwrap_err(), broken());
    assert!(begin.elapsed() < Duration::from_millis(10));
    assert_eq!(source.count(), 1);
    assert!(cache.dump()[0].state.starts_with("Unavailable"));
}

#[tokio::test(start_paused = true)]
async fn waiting_connections_bring_a_long_rest_to_an_end() {
    let (cache, source) = start(vec![Act::Fail(broken()); 9]);
    cache.prefetch(&id(WEB));
    // The ninth failure is followed by more than a minute of rest.
    asked(&source, 9).await;
    assert!(cache.fetch(&id(WEB)).await.is_err());
    sleep(Duration::from_secs(6)).await;
    assert!(cache.fetch(&id(WEB)).await.is_ok());
    assert_eq!(source.count(), 10);
}

#[tokio::test(start_paused = true)]
async fn patience_is_bounded() {
    let (cache, source) = start([Act::Hang]);
    let begin = Instant::now();
    let error = cache.fetch(&id(WEB)).await.unwrap_err();
    assert!(matches!(error, IdentityError::Timeout { .. }), "{error}");
    assert_eq!(error.reason(), Reason::NoCertificate);
    assert_eq!(begin.elapsed().as_secs(), 5);
    assert_eq!(cache.dump()[0].state, "Initializing");
    // The request itself is given up after ten seconds and repeated.
    sleep(Duration::from_secs(7)).await;
    assert!(cache.find(&id(WEB)).is_some());
    assert_eq!(source.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn eight_at_once_and_the_urgent_first() {
    let gate = Arc::new(Notify::new());
    let (cache, source) = start(vec![Act::Gate(gate.clone()); 40]);
    for n in 0..20 {
        cache.prefetch(&numbered(n));
    }
    settle().await;
    assert_eq!((source.count(), source.running.load(Ordering::SeqCst)), (8, 8));
    // One that waits in the queue and one that is new become urgent.
    let urgent = [15, 30].map(|n| {
        let cache = cache.clone();
        tokio::spawn(async move { cache.fetch(&numbered(n)).await })
    });
    settle().await;
    assert_eq!(source.count(), 8);
    for _ in 0..2 {
        gate.notify_one();
        settle().await;
    }
    let mut next: Vec<_> = source.asked.lock()[8..].to_vec();
    next.sort();
    assert_eq!(next, [numbered(15), numbered(30)]);
    for _ in 0..40 {
        gate.notify_one();
        settle().await;
    }
    for fetch in urgent {
        fetch.await.unwrap().unwrap();
    }
    assert_eq!(source.count(), 21);
    assert_eq!(source.most_running.load(Ordering::SeqCst), 8);
}

#[tokio::test(start_paused = true)]
async fn forgetting_ends_renewals_and_empties_handles() {
    let (cache, source) = start([]);
    let handle = cache.handle(&id(WEB));
    settle().await;
    let kept = handle.load().unwrap();
    cache.forget(&id(WEB));
    assert!(handle.load().is_none() && cache.dump().is_empty());
    assert!(matches!(handle.fetch().await, Err(IdentityError::Refused { .. })));
    sleep(minutes(120)).await;
    assert_eq!(source.count(), 1);
    assert_eq!(kept.id, id(WEB));
    // The same service account comes back.
    let again = cache.handle(&id(WEB));
    settle().await;
    assert!(again.load().is_some() && handle.load().is_none());
}

#[tokio::test(start_paused = true)]
async fn forgetting_during_a_request_discards_its_result() {
    let gate = Arc::new(Notify::new());
    let (cache, source) = start([Act::Gate(gate.clone())]);
    let handle = cache.handle(&id(WEB));
    settle().await;
    cache.forget(&id(WEB));
    let again = cache.handle(&id(WEB));
    gate.notify_one();
    settle().await;
    assert!(handle.load().is_none());
    assert!(again.load().is_some());
    assert_eq!(source.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_renews_by_itself_is_asked_when_it_says_so() {
    let clock: Arc<dyn Clock> = Arc::new(TokioClock::starting_at(SystemTime::now()));
    let gate = Arc::new(Notify::new());
    let source = Scripted::new(Arc::clone(&clock), [Act::Issue, Act::Issue, Act::Gate(gate.clone())]);
    let (tell, renewals) = mpsc::unbounded_channel();
    *source.renewals.lock() = Some(renewals);
    let tls = TlsContext::new(&TlsSettings::default(), &*source, clock).unwrap();
    let cache = SvidCache::start(source.clone(), tls, &CacheSettings::default(), &Handle::current());
    let first = cache.fetch(&id(WEB)).await.unwrap();
    sleep(minutes(55)).await;
    assert_eq!(source.count(), 1, "not by age");
    tell.send(id(WEB)).unwrap();
    settle().await;
    let second = cache.find(&id(WEB)).unwrap();
    assert_ne!(second.serial, first.serial);
    // Told once more while it is asked: the answer under way may be the one before.
    tell.send(id(WEB)).unwrap();
    settle().await;
    tell.send(id(WEB)).unwrap();
    settle().await;
    gate.notify_one();
    settle().await;
    assert_eq!(source.count(), 4);
    // Nobody has heard of it; and at its end, nothing said, it is asked after all.
    tell.send(numbered(1)).unwrap();
    sleep(minutes(59)).await;
    assert_eq!(source.count(), 4);
    sleep(minutes(2)).await;
    assert!(source.count() >= 5 && cache.find(&id(WEB)).is_some());
}

/// A wall clock that can be set.
#[derive(Debug)]
struct Settable(TokioClock, Mutex<Duration>);
impl Clock for Settable {
    fn now(&self) -> SystemTime {
        self.0.now() + *self.1.lock()
    }
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_slept_renews_soon_after() {
    let clock = Arc::new(Settable(TokioClock::starting_at(SystemTime::now()), Mutex::default()));
    let (cache, source) = start_with(clock.clone(), []);
    let handle = cache.handle(&id(WEB));
    settle().await;
    // 50 minutes of wall time that timers did not see.
    *clock.1.lock() = minutes(50);
    sleep(Duration::from_secs(40)).await;
    assert_eq!(source.count(), 2);
    assert!(handle.load().unwrap().not_before > clock.now() - minutes(2));
}

#[tokio::test(start_paused = true)]
async fn after_sleeping_past_expiry_a_fetch_gets_a_new_one() {
    let clock = Arc::new(Settable(TokioClock::starting_at(SystemTime::now()), Mutex::default()));
    let (cache, _source) = start_with(clock.clone(), []);
    let old = cache.fetch(&id(WEB)).await.unwrap();
    *clock.1.lock() = minutes(90);
    assert!(cache.find(&id(WEB)).is_none());
    assert_ne!(cache.fetch(&id(WEB)).await.unwrap().serial, old.serial);
}

#[tokio::test(start_paused = true)]
async fn the_dump_is_what_istioctl_reads() {
    let (cache, _source) = start([]);
    cache.prefetch(&id(WEB));
    assert_eq!(cache.dump()[0].state, "Initializing");
    let svid = cache.fetch(&id(WEB)).await.unwrap();
    let json = serde_json::to_value(cache.dump()).unwrap();
    assert_eq!(json[0]["identity"], WEB);
    assert_eq!(json[0]["state"], "Available");
    assert_eq!(json[0]["certChain"].as_array().unwrap().len(), 1);
    assert_eq!(json[0]["rootCerts"].as_array().unwrap().len(), 1);
    assert_eq!(json[0]["certChain"][0]["serialNumber"], svid.serial);
    // "-----BEGIN CERT" in base64.
    assert!(json[0]["certChain"][0]["pem"].as_str().unwrap().starts_with("LS0tLS1CRUdJTiBDRVJU"));
    for field in ["validFrom", "expirationTime"] {
        assert!(json[0]["certChain"][0][field].as_str().unwrap().ends_with('Z'));
    }
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_last_user() {
    let (cache, source) = start([]);
    cache.fetch(&id(WEB)).await.unwrap();
    drop(cache);
    advance(minutes(120)).await;
    settle().await;
    assert_eq!(source.count(), 1);
    // The task held the other reference.
    assert_eq!(Arc::strong_count(&source), 1);
}
