//! Connections are kept, shared, ended and replaced as they should.
use super::*;

#[tokio::test]
async fn http1_connections_are_used_again() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    let cluster = world.cluster();
    assert_eq!(cluster.name(), "outbound|80||web.shop.svc.cluster.local");
    for _ in 0..5 {
        let (status, body) = fetch(&cluster, false).await.unwrap();
        assert_eq!((status, &body[..]), (StatusCode::OK, &b"/hello web.shop HTTP/1.1"[..]));
        settle().await;
    }
    assert_eq!((server.connections(), server.requests()), (1, 5));
}

#[tokio::test]
async fn http2_streams_share_a_connection_up_to_the_limit() {
    let server = Server::gated().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    let pool = PoolLimits { max_concurrent_streams: 4, ..PoolLimits::default() };
    world.policy(TrafficPolicy { pool, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    let all: Vec<_> = (0..6)
        .map(|_| {
            let cluster = Arc::clone(&cluster);
            tokio::spawn(async move { fetch(&cluster, true).await })
        })
        .collect();
    server.until(|s| s.requests() == 6).await;
    assert_eq!(server.connections(), 2, "4 + 2");
    assert_eq!(pick(&cluster).active(), 6);
    server.gate.add_permits(6);
    for one in all {
        let (_, body) = one.await.unwrap().unwrap();
        assert_eq!(&body[..], b"/hello web.shop HTTP/2.0");
    }
    assert_eq!(pick(&cluster).active(), 0);
    server.gate.add_permits(1);
    fetch(&cluster, true).await.unwrap();
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn a_connection_the_server_closed_costs_no_request() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    let cluster = world.cluster();
    for round in 1..=20 {
        fetch(&cluster, round % 2 == 0).await.unwrap();
        server.cut();
        // Sometimes the close is noticed, sometimes it is not yet.
        if round % 3 == 0 {
            settle().await;
        }
    }
    assert_eq!(server.requests(), 20);
}

#[tokio::test]
async fn requests_per_connection_and_idle_time_end_connections() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    let pool = PoolLimits {
        max_requests_per_connection: 2,
        http_idle_timeout: Some(Duration::from_millis(700)),
        ..PoolLimits::default()
    };
    world.policy(TrafficPolicy { pool, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    for _ in 0..5 {
        fetch(&cluster, false).await.unwrap();
        settle().await;
    }
    assert_eq!(server.connections(), 3, "2 + 2 + 1");
    server.until(|s| s.live() == 0).await;
    settle().await;
    assert_eq!(world.upstreams.clusters()[0].counts.connections, 0);
    for _ in 0..5 {
        fetch(&cluster, true).await.unwrap();
    }
    assert_eq!(server.connections(), 6);
    server.until(|s| s.live() == 0).await;
}

#[tokio::test]
async fn an_old_connection_gets_no_more_requests() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    let pool = PoolLimits { max_connection_duration: Some(Duration::from_millis(60)), ..PoolLimits::default() };
    world.policy(TrafficPolicy { pool, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    for http2 in [false, true] {
        fetch(&cluster, http2).await.unwrap();
        server.until(|s| s.live() == 0).await;
    }
}

#[tokio::test]
async fn an_endpoint_that_leaves_finishes_its_requests() {
    let (old, new) = (Server::gated().await, Server::open().await);
    let mut world = World::new();
    world.endpoint("a", old.addr);
    let cluster = world.cluster();
    let under_way = [false, true].map(|http2| {
        let cluster = Arc::clone(&cluster);
        tokio::spawn(async move { fetch(&cluster, http2).await })
    });
    old.until(|s| s.requests() == 2).await;
    world.endpoint("b", new.addr);
    world.remove("a");
    world.upstreams.collect(&world.snap);
    let now = world.cluster();
    assert_eq!(now.hosts().len(), 1);
    fetch(&now, false).await.unwrap();
    assert_eq!(new.requests(), 1);
    old.gate.add_permits(2);
    for one in under_way {
        one.await.unwrap().unwrap();
    }
    old.until(|s| s.live() == 0).await;
}

#[tokio::test]
async fn state_survives_changes_of_anything_else() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    let first = world.cluster();
    fetch(&first, false).await.unwrap();
    settle().await;
    // Another endpoint, another policy, another service: the first endpoint and its connection stay.
    world.endpoint("b", Server::open().await.addr);
    world.policy(TrafficPolicy::default());
    let second = world.cluster();
    assert!(!Arc::ptr_eq(&first, &second));
    world.apply(vec![Change::Service(Arc::new(Service::new("other", "shop", "other.shop")))]);
    assert!(Arc::ptr_eq(&second, &world.cluster()), "nothing of it changed");
    world.remove("b");
    let third = world.cluster();
    assert!(pick(&first).is_same(&pick(&third)));
    fetch(&third, false).await.unwrap();
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn connections_of_a_former_policy_take_no_more_requests() {
    let server = Server::gated().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    for (round, http2) in [false, true].into_iter().enumerate() {
        world.policy(TrafficPolicy::default());
        let cluster = world.cluster();
        server.gate.add_permits(1);
        fetch(&cluster, http2).await.unwrap();
        settle().await;
        let busy = tokio::spawn(async move { fetch(&cluster, http2).await });
        let so_far = 2 + round * 4;
        server.until(|s| s.requests() == so_far).await;
        let pool = PoolLimits { max_requests_per_connection: 1, ..PoolLimits::default() };
        world.policy(TrafficPolicy { pool, ..TrafficPolicy::default() });
        world.upstreams.collect(&world.snap);
        let cluster = world.cluster();
        // What is under way ends well, and its connection with it.
        server.gate.add_permits(3);
        busy.await.unwrap().unwrap();
        server.until(|s| s.live() == 0).await;
        for _ in 0..2 {
            fetch(&cluster, http2).await.unwrap();
            settle().await;
        }
        assert_eq!(server.connections(), 3 * (round + 1), "one, and one for each of two");
    }
}

#[tokio::test]
async fn an_endpoint_that_answers_no_pings_loses_its_connection() {
    use mesh_model::l7::destination::Http2Keepalive;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut world = World::new();
    world.endpoint("a", listener.local_addr().unwrap());
    let keepalive = Http2Keepalive { interval: Duration::from_millis(50), timeout: Duration::from_millis(100) };
    let pool = PoolLimits { http2_keepalive: Some(keepalive), ..PoolLimits::default() };
    world.policy(TrafficPolicy { pool, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    let asking = {
        let cluster = Arc::clone(&cluster);
        tokio::spawn(async move { fetch(&cluster, true).await })
    };
    // Takes everything and says nothing.
    let (_mute, _) = listener.accept().await.unwrap();
    let begun = tokio::time::Instant::now();
    assert_eq!(asking.await.unwrap().unwrap_err(), UpstreamError::new(Failure::Reset, "connection termination"));
    assert!(begun.elapsed() < Duration::from_secs(2));
    settle().await;
    assert_eq!(world.upstreams.clusters()[0].counts.connections, 0);
}

#[tokio::test]
async fn an_upgrade_gets_a_connection_of_its_own() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut world = World::new();
    world.endpoint("a", listener.local_addr().unwrap());
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tcp.read_u8().await.unwrap());
        }
        tcp.write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: echo\r\nconnection: upgrade\r\n\r\n").await.unwrap();
        let (mut r, mut w) = tcp.split();
        tokio::io::copy(&mut r, &mut w).await.unwrap();
    });
    let cluster = world.cluster();
    let request = Request::get("/").header("host", "x").header("upgrade", "echo").header("connection", "upgrade");
    let how = SendOptions { upgrade: true, ..SendOptions::default() };
    let response = send(&cluster, &pick(&cluster), request.body(Body::Empty).unwrap(), how).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut io = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        io.write_all(b"ping").await.unwrap();
        let mut back = [0; 4];
        io.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"ping");
    }
    let counts = world.upstreams.clusters()[0].counts;
    assert_eq!((counts.connections, counts.requests), (1, 1), "it counts while it lives");
    drop(io);
    settle().await;
    let counts = world.upstreams.clusters()[0].counts;
    assert_eq!((counts.connections, counts.requests), (0, 0));
}

#[tokio::test]
async fn failures_are_told_apart() {
    let mut world = World::new();
    // Nobody listens.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    world.endpoint("a", free);
    let error = fetch(&world.cluster(), false).await.unwrap_err();
    assert_eq!(error, UpstreamError::new(Failure::Connect, "delayed connect error: Connection refused"));
    let error = connect(&world.cluster(), &pick(&world.cluster()), None, None).await.unwrap_err();
    assert_eq!(error.failure, Failure::Connect);
    // Takes the request and closes; answers nonsense.
    for (answer, failure) in [("", Failure::Reset), ("nonsense\r\n\r\n", Failure::Protocol)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        world.endpoint("a", listener.local_addr().unwrap());
        tokio::spawn(async move {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let (mut tcp, _) = listener.accept().await.unwrap();
            tcp.read_u8().await.unwrap();
            tcp.write_all(answer.as_bytes()).await.unwrap();
            let mut rest = [0; 1024];
            let _ = tcp.read(&mut rest).await;
        });
        assert_eq!(fetch(&world.cluster(), false).await.unwrap_err().failure, failure, "{answer:?}");
    }
    // Accepts and says nothing, to TLS.
    let unknown = ClusterKey { port: 81, ..cluster_key() };
    assert_eq!(world.upstreams.renew(&world.snap, &unknown, Role::Waypoint).unwrap_err().failure, Failure::NoCluster);
    world.remove("a");
    assert_eq!(pick_with(&world.cluster(), 1).unwrap_err().failure, Failure::NoHealthy);
}

#[tokio::test]
async fn a_cancelled_request_frees_its_place() {
    let server = Server::gated().await;
    let mut world = World::new();
    world.endpoint("a", server.addr);
    let cluster = world.cluster();
    for http2 in [false, true] {
        let before = server.requests();
        let task = {
            let cluster = Arc::clone(&cluster);
            tokio::spawn(async move { fetch(&cluster, http2).await })
        };
        server.until(|s| s.requests() == before + 1).await;
        task.abort();
        settle().await;
        let counts = world.upstreams.clusters()[0].counts;
        assert_eq!((counts.requests, pick(&cluster).active()), (0, 0));
    }
}
