//! Limits hold for the whole process, and who waits is woken.
use super::*;
use futures_util::future::join_all;

fn limited(pool: PoolLimits) -> TrafficPolicy {
    TrafficPolicy { pool, ..TrafficPolicy::default() }
}
fn count(results: &[Result<(StatusCode, Bytes), UpstreamError>]) -> (usize, usize) {
    let overflow = results.iter().filter(|r| matches!(r, Err(e) if e.failure == Failure::Overflow)).count();
    (results.iter().filter(|r| r.is_ok()).count(), overflow)
}

#[tokio::test]
async fn four_at_once_on_one_connection_and_one_waiting() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    world.policy(limited(PoolLimits { max_connections: 1, max_pending: 1, ..PoolLimits::default() }));
    let cluster = world.cluster();
    // The first time the connection must be made, and who waits for it is the one that may wait; the second time it is there.
    for served in [1, 2] {
        let results = join_all((0..4).map(|_| fetch(&cluster, false))).await;
        assert_eq!(count(&results), (served, 4 - served), "{results:?}");
        settle().await;
    }
    assert_eq!(server.connections(), 1);
    let counts = world.upstreams.clusters()[0].counts;
    assert_eq!((counts.pending_overflows, counts.pending, counts.requests, counts.connections), (5, 0, 0, 1));
}

#[tokio::test]
async fn who_waits_for_a_connection_being_made_waits() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    world.policy(limited(PoolLimits { max_pending: 2, ..PoolLimits::default() }));
    let cluster = world.cluster();
    for (http2, warm) in [(false, 2), (true, 5)] {
        let results = join_all((0..5).map(|_| fetch(&cluster, http2))).await;
        assert_eq!(count(&results), (2, 3), "each needs a connection, or the one that is made: {results:?}");
        settle().await;
        // Those that are there take what they can; a stream of HTTP/2 finds room.
        let results = join_all((0..warm).map(|_| fetch(&cluster, http2))).await;
        assert_eq!(count(&results), (warm, 0), "{results:?}");
        settle().await;
    }
    assert_eq!(world.upstreams.clusters()[0].counts.pending, 0);
}

#[tokio::test]
async fn everyone_who_waits_is_served() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    world.policy(limited(PoolLimits { max_connections: 2, max_pending: 1000, ..PoolLimits::default() }));
    let cluster = world.cluster();
    for http2 in [false, true] {
        let results = join_all((0..200).map(|_| fetch(&cluster, http2))).await;
        assert_eq!(count(&results), (200, 0));
        settle().await;
    }
    // HTTP/2 has connections of its own; both kinds had a right to a first one.
    assert!(server.connections() <= 3, "{}", server.connections());
}

#[tokio::test]
async fn a_raised_limit_counts_for_who_waits() {
    let server = Server::gated().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    for http2 in [false, true] {
        world.policy(limited(PoolLimits { max_connections: 1, max_concurrent_streams: 1, ..PoolLimits::default() }));
        let before = (server.connections(), server.requests());
        let cluster = world.cluster();
        let three: Vec<_> = (0..3)
            .map(|_| {
                let cluster = Arc::clone(&cluster);
                tokio::spawn(async move { fetch(&cluster, http2).await })
            })
            .collect();
        server.until(|s| s.requests() == before.1 + 1).await;
        settle().await;
        assert_eq!(server.connections(), before.0 + 1, "the others wait");
        world.policy(limited(PoolLimits { max_connections: 3, max_concurrent_streams: 1, ..PoolLimits::default() }));
        world.upstreams.collect(&world.snap);
        server.until(|s| s.requests() == before.1 + 3).await;
        server.gate.add_permits(3);
        for one in three {
            one.await.unwrap().unwrap();
        }
        server.until(|s| s.live() == 0).await;
    }
}

#[tokio::test]
async fn requests_under_way_are_limited() {
    let server = Server::gated().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    world.policy(limited(PoolLimits { max_requests: 2, ..PoolLimits::default() }));
    let cluster = world.cluster();
    for http2 in [false, true] {
        let before = server.requests();
        let two: Vec<_> = (0..2)
            .map(|_| {
                let cluster = Arc::clone(&cluster);
                tokio::spawn(async move { fetch(&cluster, http2).await })
            })
            .collect();
        server.until(|s| s.requests() == before + 2).await;
        assert_eq!(fetch(&cluster, http2).await.unwrap_err().failure, Failure::Overflow);
        server.gate.add_permits(2);
        for one in two {
            one.await.unwrap().unwrap();
        }
        settle().await;
        server.gate.add_permits(1);
        fetch(&cluster, http2).await.unwrap();
    }
}

#[tokio::test]
async fn retries_are_limited_by_number_or_budget() {
    use mesh_model::l7::destination::RetryBudget;
    let mut world = World::new();
    world.policy(limited(PoolLimits { max_retries: 1, ..PoolLimits::default() }));
    let cluster = world.cluster();
    let first = cluster.admit_retry().unwrap();
    assert!(cluster.admit_retry().is_none());
    drop(first);
    assert!(cluster.admit_retry().is_some());
    let retry_budget = Some(RetryBudget { interval: None, percent_hundredths: 2000, min_concurrency: 1 });
    world.policy(TrafficPolicy { retry_budget, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    let requests: Vec<_> = (0..10).map(|_| cluster.admit().unwrap()).collect();
    let retries: Vec<_> = (0..3).filter_map(|_| cluster.admit_retry()).collect();
    assert_eq!(retries.len(), 2, "a fifth of ten");
    drop((requests, retries));
    let one = cluster.admit_retry().expect("one is always allowed");
    assert!(cluster.admit_retry().is_none(), "none of those under way is there any more");
    drop(one);
}

#[tokio::test(start_paused = true)]
async fn a_budget_may_go_by_the_requests_of_an_interval() {
    use mesh_model::l7::destination::RetryBudget;
    let mut world = World::new();
    let interval = Some(Duration::from_secs(15));
    let retry_budget = Some(RetryBudget { interval, percent_hundredths: 2000, min_concurrency: 0 });
    world.policy(TrafficPolicy { retry_budget, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    assert!(cluster.admit_retry().is_none());
    for _ in 0..10 {
        drop(cluster.admit().unwrap());
    }
    tokio::time::sleep(Duration::from_secs(14)).await;
    let retries: Vec<_> = (0..3).filter_map(|_| cluster.admit_retry()).collect();
    assert_eq!(retries.len(), 2, "a fifth of the ten that are over");
    drop(retries);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(cluster.admit_retry().is_none(), "they count no more");
}

#[tokio::test]
async fn raw_connections_count_and_overflow_at_once() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    world.policy(limited(PoolLimits { max_connections: 1, ..PoolLimits::default() }));
    let cluster = world.cluster();
    let host = pick(&cluster);
    let first = connect(&cluster, &host, None, None).await.unwrap();
    assert!(matches!(first, Carrier::Straight(Stream::Tcp(..))));
    assert_eq!((host.active(), connect(&cluster, &host, None, None).await.unwrap_err().failure), (1, Failure::Overflow));
    // A pool always gets its first connection.
    fetch(&cluster, false).await.unwrap();
    drop(first);
    assert_eq!(host.active(), 0);
}

/// Whether it is not over when it is looked at once.
async fn is_waiting<T>(mut future: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
    std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}
/// A listener that accepts nobody: the kernel's queue is full, and who connects waits.
async fn full() -> (tokio::net::TcpListener, Vec<tokio::net::TcpStream>) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(100), tokio::net::TcpStream::connect(addr)).await {
        queued.push(stream.unwrap());
    }
    (listener, queued)
}

#[tokio::test]
async fn who_connects_alone_is_pending_until_it_is_connected() {
    let (listener, _queued) = full().await;
    let mut world = World::new();
    world.endpoint("a", listener.local_addr().unwrap());
    world.policy(limited(PoolLimits { max_pending: 1, ..PoolLimits::default() }));
    let cluster = world.cluster();
    let host = pick(&cluster);
    let pending = || world.upstreams.clusters()[0].counts.pending;
    let raw = || connect(&cluster, &host, None, None);
    let upgrade = || send(&cluster, &host, get(), SendOptions { upgrade: true, ..SendOptions::default() });
    {
        let mut first = std::pin::pin!(raw());
        assert!(is_waiting(first.as_mut()).await);
        assert_eq!((pending(), raw().await.unwrap_err().failure), (1, Failure::Overflow));
        assert_eq!(upgrade().await.unwrap_err().failure, Failure::Overflow);
    }
    assert_eq!(pending(), 0, "given up");
    {
        let mut first = std::pin::pin!(upgrade());
        assert!(is_waiting(first.as_mut()).await);
        assert_eq!((pending(), raw().await.unwrap_err().failure), (1, Failure::Overflow));
    }
    // One that is connected waits no more.
    let server = Server::open().await;
    world.endpoint("a", server.addr);
    let cluster = world.cluster();
    let host = pick(&cluster);
    let _held = (connect(&cluster, &host, None, None).await.unwrap(), connect(&cluster, &host, None, None).await.unwrap());
    assert_eq!(world.upstreams.clusters()[0].counts.pending, 0);
}

/// The place of one that waited is free when it is given a connection, not when it comes to know.
#[tokio::test]
async fn who_is_given_a_connection_waits_no_more() {
    let server = Server::gated().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    world.policy(limited(PoolLimits { max_connections: 1, max_pending: 1, ..PoolLimits::default() }));
    let cluster = world.cluster();
    let first = {
        let cluster = Arc::clone(&cluster);
        tokio::spawn(async move { fetch(&cluster, false).await })
    };
    server.until(|s| s.requests() == 1).await;
    let mut second = std::pin::pin!(fetch(&cluster, false));
    assert!(is_waiting(second.as_mut()).await);
    let pending = || world.upstreams.clusters()[0].counts.pending;
    assert_eq!((pending(), fetch(&cluster, false).await.unwrap_err().failure), (1, Failure::Overflow));
    server.gate.add_permits(1);
    first.await.unwrap().unwrap();
    settle().await;
    assert_eq!(pending(), 0, "it was given the connection, and nobody asked it yet");
    server.gate.add_permits(1);
    second.await.unwrap();
}

#[tokio::test]
async fn a_freed_connection_of_another_endpoint_wakes_who_waits() {
    let (a, b) = (Server::gated().await, Server::gated().await);
    let mut world = World::new();
    world.endpoint("a", a.addr);
    world.endpoint("b", b.addr);
    world.policy(limited(PoolLimits { max_connections: 2, max_requests_per_connection: 1, ..PoolLimits::default() }));
    let cluster = world.cluster();
    let host_of = |addr| cluster.hosts().iter().find(|h| h.addr() == addr).cloned().unwrap();
    let run = |host: Arc<Host>| {
        let cluster = Arc::clone(&cluster);
        tokio::spawn(async move {
            send(&cluster, &host, get(), SendOptions::default())
                .await?
                .into_body()
                .collect()
                .await
                .map_err(|_| UpstreamError::new(Failure::Reset, ""))
        })
    };
    let first = run(host_of(a.addr));
    a.until(|s| s.requests() == 1).await;
    let second = run(host_of(b.addr));
    b.until(|s| s.requests() == 1).await;
    let third = run(host_of(a.addr));
    settle().await;
    assert_eq!((a.connections(), world.upstreams.clusters()[0].counts.pending), (1, 1));
    b.gate.add_permits(1);
    second.await.unwrap().unwrap();
    a.until(|s| s.connections() == 2).await;
    a.gate.add_permits(2);
    first.await.unwrap().unwrap();
    third.await.unwrap().unwrap();
}

#[tokio::test]
async fn waiting_for_an_endpoint_that_cannot_be_reached_fails_together() {
    let mut world = World::new();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    world.endpoint("a", free);
    world.policy(limited(PoolLimits { max_connections: 1, max_pending: 100, ..PoolLimits::default() }));
    let cluster = world.cluster();
    for http2 in [false, true] {
        let results = join_all((0..20).map(|_| fetch(&cluster, http2))).await;
        assert!(results.iter().all(|r| matches!(r, Err(e) if e.failure == Failure::Connect)), "{results:?}");
    }
    let counts = world.upstreams.clusters()[0].counts;
    assert_eq!((counts.pending, counts.connections, counts.requests), (0, 0, 0));
}
