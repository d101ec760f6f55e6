//! Many at once, on several data threads, while the mesh changes: nothing is lost, nothing hangs, nothing stays counted.
use super::*;
use http_body::Frame;
use http_body_util::StreamBody;
use mesh_runtime::threads::DataThreads;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Counts back to nothing once all is over.
async fn quiet(world: &World) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let c = world.upstreams.clusters()[0].counts;
        if (c.pending, c.requests, c.retries) == (0, 0, 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{:?}", world.upstreams.clusters()[0].counts);
}

async fn crowd(
    threads: &DataThreads,
    cluster: &Arc<Cluster>,
    each: usize,
    patience: Duration,
) -> (usize, usize, Vec<UpstreamError>) {
    let mut all = Vec::new();
    for worker in threads.workers() {
        for n in 0..each {
            let cluster = Arc::clone(cluster);
            all.push(worker.spawn(async move { tokio::time::timeout(patience, fetch(&cluster, n % 3 == 0)).await }));
        }
    }
    let (mut ok, mut late, mut failed) = (0, 0, Vec::new());
    for one in all {
        match one.await.unwrap() {
            Ok(Ok(_)) => ok += 1,
            Ok(Err(error)) => failed.push(error),
            Err(_) => late += 1,
        }
    }
    (ok, late, failed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_share_limits_and_all_are_served() {
    let server = Server::open().await;
    let mut world = World::with_threads(3);
    let threads = DataThreads::start(3).unwrap();
    for n in 0..4 {
        world.endpoint(&format!("e{n}"), server.addr);
    }
    let pool =
        PoolLimits { max_connections: 5, max_concurrent_streams: 3, max_requests_per_connection: 7, ..PoolLimits::default() };
    world.policy(TrafficPolicy { pool, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    for _ in 0..5 {
        let (ok, late, failed) = crowd(&threads, &cluster, 200, PATIENCE).await;
        assert_eq!((ok, late, failed), (600, 0, Vec::new()));
    }
    quiet(&world).await;
    // Five, and a first one for each kind, endpoint and thread.
    assert!(world.upstreams.clusters()[0].counts.connections <= 5 + 2 * 4 * 3);
    threads.stop(PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn impatient_clients_leave_nothing_behind() {
    let server = Server::gated().await;
    let mut world = World::with_threads(2);
    let threads = DataThreads::start(2).unwrap();
    world.endpoint("a", server.addr);
    let pool = PoolLimits { max_connections: 2, max_concurrent_streams: 5, ..PoolLimits::default() };
    world.policy(TrafficPolicy { pool, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    for round in 0..10 {
        server.gate.add_permits(20);
        let (_, _, failed) = crowd(&threads, &cluster, 50, Duration::from_millis(5 + 5 * round)).await;
        assert_eq!(failed, Vec::new());
    }
    quiet(&world).await;
    server.gate.add_permits(1 << 20);
    let (ok, ..) = crowd(&threads, &cluster, 50, PATIENCE).await;
    assert_eq!(ok, 100);
    threads.stop(PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_come_and_go_under_load() {
    let servers = [Server::open().await, Server::open().await, Server::open().await];
    let mut world = World::with_threads(2);
    let threads = DataThreads::start(2).unwrap();
    world.endpoint("a0", servers[0].addr);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let done = Arc::<AtomicUsize>::default();
    let now = Arc::new(ArcSwap::from_pointee(world.snap.clone()));
    let load: Vec<_> = threads
        .workers()
        .iter()
        .flat_map(|worker| (0..8).map(move |n| (worker, n)))
        .map(|(worker, n)| {
            let (stop, now, upstreams) = (Arc::clone(&stop), Arc::clone(&now), Arc::clone(&world.upstreams));
            let done = Arc::clone(&done);
            worker.spawn(async move {
                while !stop.load(SeqCst) {
                    let cluster = upstreams.renew(&now.load(), &cluster_key(), Role::Waypoint)?;
                    fetch(&cluster, n % 2 == 0).await?;
                    done.fetch_add(1, SeqCst);
                }
                Ok::<(), UpstreamError>(())
            })
        })
        .collect();
    let (begun, mut round) = (Instant::now(), 0);
    // As many changes, and requests among them.
    while round < 60 || (done.load(SeqCst) <= 500 && begun.elapsed() < PATIENCE) {
        let (new, old) = (round + 1, round);
        world.endpoint(&format!("a{new}"), servers[new % 3].addr);
        world.remove(&format!("a{old}"));
        now.store(Arc::new(world.snap.clone()));
        world.upstreams.collect(&world.snap);
        tokio::time::sleep(Duration::from_millis(5)).await;
        round += 1;
    }
    stop.store(true, SeqCst);
    for one in load {
        one.await.unwrap().unwrap();
    }
    let done = done.load(SeqCst);
    assert!(done > 500, "{done}");
    quiet(&world).await;
    // Only what serves the last endpoint is left: two kinds on two threads.
    for server in &servers {
        server.until(|s| s.live() <= 16).await;
    }
    assert_eq!(world.upstreams.clusters()[0].hosts.len(), 1);
    threads.stop(PATIENCE).await;
}

/// Sixteen megabytes, counted as they are taken.
struct Large(Arc<AtomicUsize>);
impl futures_util::Stream for Large {
    type Item = Result<Frame<Bytes>, Infallible>;
    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.0.fetch_add(16 << 10, SeqCst) >= 16 << 20 {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[7; 16 << 10])))))
    }
}

#[tokio::test]
async fn a_reader_that_stops_costs_a_window() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut world = World::new();
    world.endpoint("a", listener.local_addr().unwrap());
    let taken = Arc::<AtomicUsize>::default();
    let t = Arc::clone(&taken);
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let t = Arc::clone(&t);
            tokio::spawn(async move {
                let service = hyper::service::service_fn(move |_: Request<Incoming>| {
                    let t = Arc::clone(&t);
                    async move { Ok::<_, Infallible>(Response::new(StreamBody::new(Large(t)))) }
                });
                // What is sent is what the other side's window allows: little is kept here.
                let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                builder.http2().max_send_buf_size(16 << 10);
                let _ = builder.serve_connection(TokioIo::new(tcp), service).await;
            });
        }
    });
    let cluster = world.cluster();
    let guard = cluster.admit().unwrap();
    let how = SendOptions { http2: true, guard: Some(&guard), ..SendOptions::default() };
    let mut response = send(&cluster, &pick(&cluster), get(), how).await.unwrap();
    let first = response.body_mut().frame().await.unwrap().unwrap().into_data().unwrap();
    let begun = Instant::now();
    while taken.load(SeqCst) < 64 << 10 && begun.elapsed() < PATIENCE {
        settle().await;
    }
    for _ in 0..10 {
        settle().await;
    }
    let held = taken.load(SeqCst);
    assert!((64 << 10..=(64 + 64) << 10).contains(&held), "{held} bytes were taken from the server");
    // Others on the same connection are not held up, and the rest comes when it is asked for.
    let rest = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(first.len() + rest.len(), 16 << 20);
    drop(guard);
    quiet(&world).await;
}

#[tokio::test]
async fn an_upload_reaches_the_endpoint_as_fast_as_it_reads() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut world = World::new();
    world.endpoint("a", listener.local_addr().unwrap());
    let (go, going) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        going.await.unwrap();
        let mut all = Vec::new();
        while !all.ends_with(b"0\r\n\r\n") {
            tcp.read_buf(&mut all).await.unwrap();
        }
        tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        tcp.read_u8().await.unwrap_err();
    });
    let taken = Arc::<AtomicUsize>::default();
    let large = StreamBody::new(Large(Arc::clone(&taken)));
    let body = Body::Boxed(large.map_err(|never| match never {}).boxed_unsync());
    let request = Request::post("http://web.shop/").body(body).unwrap();
    let cluster = world.cluster();
    let task = tokio::spawn(async move {
        let host = pick(&cluster);
        send(&cluster, &host, request, SendOptions::default()).await.map(|r| r.status())
    });
    for _ in 0..20 {
        settle().await;
    }
    let held = taken.load(SeqCst);
    assert!(held < 12 << 20, "{held}: the kernel's buffers and ours, not all of it");
    go.send(()).unwrap();
    assert_eq!(task.await.unwrap().unwrap(), StatusCode::OK);
}
