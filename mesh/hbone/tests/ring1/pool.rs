//! The pool: who shares a tunnel, who dials, what happens when it breaks.
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use mesh_hbone::pool::{MAX_DIALS, MAX_MEAGRE_TUNNELS};
use mesh_hbone::{Dialer, HboneError, HboneIo, HboneStream, Incoming, Pool, PoolKey, Settings, serve};
use mesh_model::{Reason, SpiffeId};
use mesh_runtime::drain::{Drain, DrainMode, channel};
use parking_lot::Mutex;
use tokio::io::DuplexStream;
use tokio::sync::Notify;

use crate::common;

/// What the far end of every dial does.
#[derive(Clone, Copy)]
enum Far {
    Accept,
    /// Nothing listens.
    Fail,
    /// The first tunnel resets each stream with REFUSED_STREAM after its first one; the others accept.
    RefuseSecondStream,
    /// Takes streams and never answers.
    Mute,
    /// Says GOAWAY as the first thing.
    GoAway,
}

/// Runs once, in the dial's own turn, when the transport is there.
type Hook = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

#[derive(Clone)]
struct Net {
    far: Far,
    dials: Arc<AtomicUsize>,
    gate: Arc<Notify>,
    gated: bool,
    drains: Arc<Mutex<Vec<Drain>>>,
    accepted: Arc<Mutex<Vec<HboneStream>>>,
    settings: Settings,
    hook: Hook,
}

impl Net {
    fn new(far: Far) -> Self {
        Self {
            far,
            dials: Arc::default(),
            gate: Arc::new(Notify::new()),
            gated: false,
            drains: Arc::default(),
            accepted: Arc::default(),
            settings: Settings::default(),
            hook: Arc::default(),
        }
    }
    fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }
}

impl Dialer for Net {
    type Io = DuplexStream;
    async fn dial(&self, _: &PoolKey) -> Result<DuplexStream, HboneError> {
        let count = self.dials.fetch_add(1, Ordering::SeqCst);
        if self.gated {
            self.gate.notified().await;
        }
        if matches!(self.far, Far::Fail) {
            return Err(HboneError::new(Reason::ConnectFailed, "connection refused"));
        }
        let hook = self.hook.lock().take();
        if let Some(hook) = hook {
            hook();
        }
        let (near, far) = tokio::io::duplex(1 << 16);
        if matches!(self.far, Far::GoAway) {
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(far).await.unwrap();
                connection.graceful_shutdown();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                }
            });
            return Ok(near);
        }
        if matches!(self.far, Far::RefuseSecondStream) && count == 0 {
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(far).await.unwrap();
                let mut kept = Vec::new();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    if kept.is_empty() {
                        kept.push(respond.send_response(http::Response::new(()), false).unwrap());
                    } else {
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                    }
                }
            });
            return Ok(near);
        }
        let (drain, watch) = channel();
        self.drains.lock().push(drain);
        let accepted = Arc::clone(&self.accepted);
        let mute = matches!(self.far, Far::Mute);
        let handler = move |incoming: Incoming| {
            let accepted = Arc::clone(&accepted);
            async move {
                if mute {
                    std::future::pending::<()>().await;
                }
                accepted.lock().push(incoming.accept([]).unwrap());
            }
        };
        tokio::spawn(serve(far, Arc::new(self.settings.clone()), handler, watch));
        Ok(near)
    }
}

fn key(source: &str, port: u16) -> PoolKey {
    let id = |name: &str| -> SpiffeId { format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap() };
    PoolKey::new(id(source), [id("server")].into(), [10, 0, 0, 1].into(), SocketAddr::from(([10, 0, 0, 2], port)))
}

fn pool(net: &Net) -> Pool<Net> {
    Pool::new(net.clone(), Arc::new(net.settings.clone()))
}

async fn open(pool: &Pool<Net>, key: &PoolKey) -> Result<HboneStream, HboneError> {
    pool.open(key, &common::request()).await.map(|(stream, _)| stream)
}

#[tokio::test(start_paused = true)]
async fn streams_share_a_tunnel_and_identities_do_not() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let mut held = Vec::new();
    for _ in 0..10 {
        held.push(open(&pool, &key("a", 15008)).await.unwrap());
    }
    assert_eq!(net.dials(), 1);
    held.push(open(&pool, &key("b", 15008)).await.unwrap());
    held.push(open(&pool, &key("a", 15009)).await.unwrap());
    assert_eq!(net.dials(), 3);
    let stats = pool.stats();
    assert_eq!((stats.keys, stats.tunnels, stats.streams), (3, 3, 12));
}

#[tokio::test(start_paused = true)]
async fn many_callers_make_one_dial() {
    let net = Net { gated: true, ..Net::new(Far::Accept) };
    let pool = pool(&net);
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { open(&pool, &key("a", 1)).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(net.dials(), 1);
    // The one that came first may give up without taking the others along.
    callers[0].abort();
    net.gate.notify_one();
    let mut held = Vec::new();
    for caller in callers.into_iter().skip(1) {
        held.push(caller.await.unwrap().unwrap());
    }
    assert_eq!((net.dials(), pool.stats().streams), (1, 49));
}

#[tokio::test(start_paused = true)]
async fn waiting_callers_fail_together_and_the_next_one_dials_anew() {
    let net = Net { gated: true, ..Net::new(Far::Fail) };
    let pool = pool(&net);
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { open(&pool, &key("a", 1)).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(1)).await;
    net.gate.notify_one();
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap_err().reason, Reason::ConnectFailed);
    }
    assert_eq!(net.dials(), 1);
    assert_eq!(pool.stats().keys, 0, "a failed key leaves nothing behind");
    net.gate.notify_one();
    assert!(open(&pool, &key("a", 1)).await.is_err());
    assert_eq!(net.dials(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_full_tunnel_gets_a_second_and_finished_streams_come_back() {
    let mut net = Net::new(Far::Accept);
    net.settings.client_max_streams = 4;
    let pool = pool(&net);
    let key = key("a", 1);
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(open(&pool, &key).await.unwrap());
    }
    assert_eq!(net.dials(), 2);
    held.truncate(1);
    net.accepted.lock().clear();
    // Far more than either tunnel ever holds at once.
    for _ in 0..200 {
        let stream = open(&pool, &key).await.unwrap();
        drop(stream);
        tokio::time::sleep(Duration::from_millis(1)).await;
        net.accepted.lock().clear();
    }
    assert_eq!(net.dials(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_peers_lower_limit_counts() {
    let net = Net { settings: Settings { server_max_streams: 3, ..Settings::default() }, ..Net::new(Far::Accept) };
    let pool = Pool::new(net.clone(), Arc::new(Settings::default()));
    let mut held = Vec::new();
    for _ in 0..7 {
        held.push(open(&pool, &key("a", 1)).await.unwrap());
    }
    assert_eq!(net.dials(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_hundred_and_fifty_at_once_need_two_tunnels() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let callers: Vec<_> = (0..150)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { open(&pool, &key("a", 1)).await })
        })
        .collect();
    let mut held = Vec::new();
    for caller in callers {
        held.push(caller.await.unwrap().unwrap());
    }
    assert_eq!((net.dials(), pool.stats().tunnels, pool.stats().streams), (2, 2, 150));
}

#[tokio::test(start_paused = true)]
async fn a_draining_tunnel_is_not_handed_out_and_its_streams_live() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let key = key("a", 1);
    let mut old = open(&pool, &key).await.unwrap();
    net.drains.lock()[0].start(DrainMode::Graceful { deadline: Duration::from_mins(1) });
    tokio::time::sleep(Duration::from_millis(1)).await;
    let _new = open(&pool, &key).await.unwrap();
    assert_eq!(net.dials(), 2);
    common::send(&mut old, Bytes::from_static(b"x")).await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_the_goaway_overtook_is_opened_again() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let key = key("a", 1);
    let _old = open(&pool, &key).await.unwrap();
    // No pause: the CONNECT and the GOAWAY cross.
    net.drains.lock()[0].start(DrainMode::Graceful { deadline: Duration::from_mins(1) });
    let _new = open(&pool, &key).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_refused_stream_is_tried_once_more() {
    let net = Net::new(Far::RefuseSecondStream);
    let pool = pool(&net);
    let key = key("a", 1);
    let _first = open(&pool, &key).await.unwrap();
    // The second attempt meets the same tunnel, which refuses again: one retry, not a loop.
    let error = open(&pool, &key).await.unwrap_err();
    assert_eq!((error.reason, error.unprocessed, error.retry), (Reason::Overloaded, true, true));
}

#[tokio::test(start_paused = true)]
async fn a_dead_tunnel_is_forgotten() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let key = key("a", 1);
    let mut stream = open(&pool, &key).await.unwrap();
    net.drains.lock()[0].start(DrainMode::Immediate);
    assert!(matches!(common::recv(&mut stream).await, Some(Err(_))));
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(pool.stats(), mesh_hbone::pool::PoolStats::default());
    open(&pool, &key).await.unwrap();
    assert_eq!(net.dials(), 2);
}

#[tokio::test(start_paused = true)]
async fn unused_tunnels_are_released_and_keys_pruned() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let stream = open(&pool, &key("a", 1)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert_eq!(pool.stats().tunnels, 1, "in use");
    drop(stream);
    net.accepted.lock().clear();
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert_eq!(pool.stats().tunnels, 1, "not unused for long enough");
    tokio::time::sleep(Duration::from_secs(130)).await;
    assert_eq!(pool.stats(), mesh_hbone::pool::PoolStats::default());
}

#[tokio::test(start_paused = true)]
async fn revocation_closes_matching_tunnels_and_dials_only() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let mut bad = open(&pool, &key("bad", 1)).await.unwrap();
    let mut good = open(&pool, &key("good", 1)).await.unwrap();
    assert_eq!(pool.close_where(|key| key.source().service_account() == "bad"), 1);
    assert!(matches!(common::recv(&mut bad).await, Some(Err(_))));
    common::send(&mut good, Bytes::from_static(b"x")).await;

    let net = Net { gated: true, ..Net::new(Far::Accept) };
    let pool = self::pool(&net);
    let waiting = {
        let pool = pool.clone();
        tokio::spawn(async move { open(&pool, &key("bad", 1)).await })
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    pool.close_where(|_| true);
    assert_eq!(waiting.await.unwrap().unwrap_err().reason, Reason::Revoked);
}

#[tokio::test(start_paused = true)]
async fn a_drained_pool_opens_nothing_and_lets_streams_end() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let mut stream = open(&pool, &key("a", 1)).await.unwrap();
    pool.drain();
    assert_eq!(open(&pool, &key("a", 1)).await.unwrap_err().reason, Reason::Draining);
    common::send(&mut stream, Bytes::from_static(b"x")).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_allows_no_streams_is_dialed_once() {
    let net = Net { settings: Settings { server_max_streams: 0, ..Settings::default() }, ..Net::new(Far::Accept) };
    let pool = Pool::new(net.clone(), Arc::new(Settings::default()));
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { open(&pool, &key("a", 1)).await })
        })
        .collect();
    for caller in callers {
        let error = caller.await.unwrap().unwrap_err();
        assert_eq!((error.reason, error.retry), (Reason::Overloaded, true));
    }
    for _ in 0..50 {
        assert_eq!(open(&pool, &key("a", 1)).await.unwrap_err().reason, Reason::Overloaded);
    }
    assert_eq!(net.dials(), 1);
    // It is not kept for the time other unused tunnels are.
    tokio::time::sleep(2 * Settings::default().ping_interval).await;
    assert_eq!(pool.stats(), mesh_hbone::pool::PoolStats::default());
    // And the peer may have thought better of it.
    assert!(open(&pool, &key("a", 1)).await.is_err());
    assert_eq!(net.dials(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_allows_few_streams_gets_a_bounded_number_of_tunnels() {
    let net = Net { settings: Settings { server_max_streams: 3, ..Settings::default() }, ..Net::new(Far::Accept) };
    let pool = Pool::new(net.clone(), Arc::new(Settings::default()));
    let mut held = Vec::new();
    for _ in 0..3 * MAX_MEAGRE_TUNNELS {
        held.push(open(&pool, &key("a", 1)).await.unwrap());
    }
    for _ in 0..50 {
        assert_eq!(open(&pool, &key("a", 1)).await.unwrap_err().reason, Reason::Overloaded);
    }
    assert_eq!((net.dials(), pool.stats().tunnels), (MAX_MEAGRE_TUNNELS, MAX_MEAGRE_TUNNELS));
    // Others are not concerned, and a stream that ends makes room.
    held.push(open(&pool, &key("b", 1)).await.unwrap());
    held.remove(0);
    net.accepted.lock().remove(0);
    tokio::time::sleep(Duration::from_millis(1)).await;
    open(&pool, &key("a", 1)).await.unwrap();
    assert_eq!(net.dials(), MAX_MEAGRE_TUNNELS + 1);
}

#[tokio::test(start_paused = true)]
async fn a_crowd_at_a_peer_that_allows_one_stream_causes_a_bounded_number_of_dials() {
    let net = Net { settings: Settings { server_max_streams: 1, ..Settings::default() }, ..Net::new(Far::Accept) };
    let pool = Pool::new(net.clone(), Arc::new(Settings::default()));
    let callers: Vec<_> = (0..100)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { open(&pool, &key("a", 1)).await })
        })
        .collect();
    let mut held = Vec::new();
    for caller in callers {
        match caller.await.unwrap() {
            Ok(stream) => held.push(stream),
            Err(error) => assert_eq!(error.reason, Reason::Overloaded, "{error}"),
        }
    }
    assert!(!held.is_empty());
    assert!(net.dials() <= MAX_MEAGRE_TUNNELS, "{} dials", net.dials());
}

#[tokio::test(start_paused = true)]
async fn our_own_limit_makes_as_many_tunnels_as_it_takes() {
    let mut net = Net::new(Far::Accept);
    net.settings.client_max_streams = 1;
    let pool = pool(&net);
    let mut held = Vec::new();
    for _ in 0..2 * MAX_MEAGRE_TUNNELS {
        held.push(open(&pool, &key("a", 1)).await.unwrap());
    }
    assert_eq!(net.dials(), 2 * MAX_MEAGRE_TUNNELS);
}

#[tokio::test(start_paused = true)]
async fn one_open_starts_a_bounded_number_of_dials() {
    let net = Net::new(Far::GoAway);
    let pool = pool(&net);
    assert!(open(&pool, &key("a", 1)).await.unwrap_err().retry);
    assert!(net.dials() <= MAX_DIALS, "{} dials", net.dials());
}

#[tokio::test(start_paused = true)]
async fn draining_gives_up_the_dial_in_flight_and_starts_no_other() {
    let net = Net { gated: true, ..Net::new(Far::Accept) };
    let pool = pool(&net);
    let waiting = {
        let pool = pool.clone();
        tokio::spawn(async move { open(&pool, &key("a", 1)).await })
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(net.dials(), 1);
    pool.drain();
    net.gate.notify_one();
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!((error.reason, error.retry), (Reason::Draining, false));
    assert_eq!(open(&pool, &key("a", 1)).await.unwrap_err().reason, Reason::Draining);
    assert_eq!(open(&pool, &key("b", 1)).await.unwrap_err().reason, Reason::Draining);
    assert_eq!(net.dials(), 1);
    assert!(net.drains.lock().is_empty(), "the dial got through");
    assert_eq!(pool.stats(), mesh_hbone::pool::PoolStats::default());
}

#[tokio::test(start_paused = true)]
async fn what_was_drained_can_still_be_closed() {
    let net = Net::new(Far::Accept);
    let pool = pool(&net);
    let mut one = open(&pool, &key("a", 1)).await.unwrap();
    let mut other = open(&pool, &key("b", 1)).await.unwrap();
    pool.drain();
    assert_eq!(pool.close_where(|key| key.source().service_account() == "a"), 1);
    assert!(matches!(common::recv(&mut one).await, Some(Err(_))));
    common::send(&mut other, Bytes::from_static(b"x")).await;
    assert_eq!(pool.close_where(|_| true), 1);
    assert!(matches!(common::recv(&mut other).await, Some(Err(_))));
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_outran_its_abort_does_not_enter_the_pool() {
    for drain in [false, true] {
        let net = Net::new(Far::Accept);
        let pool = pool(&net);
        // An abort takes effect only when the task waits: here it does not before it has the tunnel.
        let inside = pool.clone();
        *net.hook.lock() = Some(Box::new(move || {
            if drain {
                inside.drain();
            }
            inside.close_where(|_| true);
            // By the time the first is through another dial to the same key is under way.
            assert!(open(&inside, &key("a", 1)).now_or_never().is_none_or(|done| done.is_err()));
        }));
        let error = open(&pool, &key("a", 1)).await.unwrap_err();
        assert_eq!(error.reason, if drain { Reason::Draining } else { Reason::Revoked });
        tokio::time::sleep(Duration::from_millis(1)).await;
        let stats = pool.stats();
        let alive = usize::from(!drain);
        assert_eq!((net.dials(), stats.tunnels, stats.dialing), (1 + alive, alive, 0));
        drop(open(&pool, &key("a", 1)).await);
        assert_eq!(net.dials(), 1 + alive);
    }
}

#[tokio::test(start_paused = true)]
async fn an_open_from_before_a_revocation_does_not_dial_again() {
    let net = Net::new(Far::Mute);
    let pool = pool(&net);
    let waiting = {
        let pool = pool.clone();
        tokio::spawn(async move { open(&pool, &key("a", 1)).await })
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(pool.close_where(|_| true), 1);
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!((error.reason, error.retry), (Reason::Revoked, true));
    assert_eq!(net.dials(), 1);
}

#[test]
fn only_what_another_endpoint_may_do_better_is_worth_a_retry() {
    for (status, retry) in [(400, false), (401, false), (403, false), (404, false), (500, false), (503, true)] {
        let error = HboneError::refused(status, Some("why"));
        assert_eq!((error.retry, error.unprocessed, error.status), (retry, false, Some(status)));
    }
}

/// Of a tunnel within a tunnel: what the gateway answers or breaks is its own, what happens in a stream it opened is not.
#[tokio::test(start_paused = true)]
async fn what_fails_behind_a_gateway_is_told_from_what_the_gateway_does() {
    type Way = fn(Reason) -> std::future::Ready<Result<(DuplexStream, ()), HboneError>>;
    let nobody: Way = |reason| std::future::ready(Err(HboneError::new(reason, "nobody there")));
    let within = async |far: Far, meanwhile: fn(&Pool<Net>)| {
        let (pool, own) = (pool(&Net::new(far)), common::request());
        let secure = |_: HboneIo| {
            meanwhile(&pool);
            async {
                // Whoever ended the tunnel has done it before anybody looks.
                tokio::time::sleep(Duration::from_millis(1)).await;
                nobody(Reason::TlsFailure).await
            }
        };
        pool.open_within(&key("a", 1), &own, secure, &own).await.unwrap_err()
    };
    let error = within(Far::Accept, |_| {}).await;
    assert_eq!((error.reason, error.behind), (Reason::TlsFailure, true), "the endpoint behind it");
    let error = within(Far::Accept, |pool| assert_eq!(pool.close_where(|_| true), 1)).await;
    assert_eq!((error.reason, error.behind), (Reason::TlsFailure, false), "the tunnel to it is gone");
    assert!(!within(Far::Fail, |_| {}).await.behind, "it cannot be dialled");
    assert!(!within(Far::Mute, |_| {}).await.behind, "it does not answer");
}
