//! Connections through other proxies: what those are asked, in either version of HTTP, and what follows of their answers.
use super::*;
use mesh_model::l7::destination::ForwardTunnel;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// A service whose endpoint is the proxy at `addr`, which is asked for `db.example:5432`.
fn world(addr: SocketAddr, post: bool, http2: bool) -> World {
    let mut world = World::new();
    world.endpoint("a", addr);
    let pool = PoolLimits { h2_upgrade: http2, connect_timeout: Duration::from_millis(500), ..PoolLimits::default() };
    let tunnel = Some(ForwardTunnel { target: "db.example:5432".into(), post });
    world.policy(TrafficPolicy { pool, tunnel, ..TrafficPolicy::default() });
    world
}
async fn open(world: &World) -> Result<Box<Forwarded>, UpstreamError> {
    let cluster = world.cluster();
    match connect(&cluster, &pick(&cluster), None, None).await? {
        Carrier::Forwarded(forwarded) => Ok(forwarded),
        Carrier::Straight(stream) => panic!("straight: {stream:?}"),
    }
}
/// The target greets, and then says after what it is told, to the end.
async fn target(io: impl AsyncRead + AsyncWrite) {
    let (mut r, mut w) = tokio::io::split(io);
    w.write_all(b"hello ").await.unwrap();
    w.flush().await.unwrap();
    tokio::io::copy(&mut r, &mut w).await.unwrap();
    w.write_all(b" bye").await.unwrap();
    w.shutdown().await.unwrap();
}
/// What a client of the target says and hears.
async fn talk(mut io: Box<Forwarded>) {
    tokio::time::timeout(PATIENCE, async {
        // Looking first takes nothing away.
        io.readable().await;
        let mut head = [0; 6];
        io.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"hello ");
        let much = "x".repeat(1 << 20);
        let (mut r, mut w) = tokio::io::split(io);
        let said = much.clone();
        let saying = tokio::spawn(async move {
            w.write_all(said.as_bytes()).await.unwrap();
            w.shutdown().await.unwrap();
            w
        });
        let mut back = String::new();
        r.read_to_string(&mut back).await.unwrap();
        assert!(back == much + " bye", "{} bytes", back.len());
        saying.await.unwrap();
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_proxy_of_http1_is_asked_by_connect_and_by_post() {
    for post in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let world = world(listener.local_addr().unwrap(), post, false);
        let proxy = tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(move |mut request: Request<Incoming>| async move {
                let head = (request.method().clone(), request.uri().to_string(), request.headers()["host"].clone());
                let want = if post { ("POST", "/") } else { ("CONNECT", "db.example:5432") };
                assert_eq!((head.0.as_str(), &*head.1, head.2.as_bytes()), (want.0, want.1, &b"db.example:5432"[..]));
                assert_eq!(request.headers().len(), if post { 2 } else { 1 }, "{:?}", request.headers());
                if !post {
                    tokio::spawn(async move { target(TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap())).await });
                    return Ok::<_, Infallible>(Response::new(Body::Empty));
                }
                let (ours, theirs) = tokio::io::duplex(1 << 16);
                let (mut down, mut up) = tokio::io::split(ours);
                tokio::spawn(target(theirs));
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    while let Some(frame) = body.frame().await {
                        up.write_all(&frame.unwrap().into_data().unwrap()).await.unwrap();
                    }
                    up.shutdown().await.unwrap();
                });
                let (tell, told) = tokio::sync::mpsc::channel(1);
                tokio::spawn(async move {
                    let mut piece = [0; 4096];
                    while let Ok(some @ 1..) = down.read(&mut piece).await {
                        let _ = tell.send(Bytes::copy_from_slice(&piece[..some])).await;
                    }
                });
                let frames = futures_util::stream::unfold(told, |mut told| async {
                    Some((Ok::<_, crate::body::BodyError>(http_body::Frame::data(told.recv().await?)), told))
                });
                let body = http_body_util::StreamBody::new(frames);
                Ok(Response::new(Body::Boxed(http_body_util::combinators::UnsyncBoxBody::new(body))))
            });
            let serve = hyper::server::conn::http1::Builder::new().half_close(true).serve_connection(TokioIo::new(tcp), service);
            serve.with_upgrades().await.unwrap();
        });
        talk(open(&world).await.unwrap()).await;
        proxy.await.unwrap();
        settle().await;
        assert_eq!(world.upstreams.clusters()[0].counts.connections, 0, "post: {post}");
    }
}

#[tokio::test]
async fn a_proxy_of_http2_is_asked_by_connect_and_by_post() {
    for post in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let world = world(listener.local_addr().unwrap(), post, true);
        let proxy = tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(tcp).await.unwrap();
            let (request, mut answer) = connection.accept().await.unwrap().unwrap();
            let driving = tokio::spawn(async move { while connection.accept().await.is_some() {} });
            let want = if post { ("POST", "http://db.example:5432/") } else { ("CONNECT", "db.example:5432") };
            assert_eq!((request.method().as_str(), &*request.uri().to_string()), want);
            assert!(request.headers().is_empty(), "{:?}", request.headers());
            let mut down = answer.send_response(Response::new(()), false).unwrap();
            let mut up = request.into_body();
            down.send_data("hello ".into(), false).unwrap();
            while let Some(data) = up.data().await {
                let data = data.unwrap();
                up.flow_control().release_capacity(data.len()).unwrap();
                down.send_data(data, false).unwrap();
            }
            down.send_data(" bye".into(), true).unwrap();
            driving.await.unwrap();
        });
        talk(open(&world).await.unwrap()).await;
        proxy.await.unwrap();
        settle().await;
        assert_eq!(world.upstreams.clusters()[0].counts.connections, 0, "post: {post}");
    }
}

#[tokio::test]
async fn a_proxy_that_does_not_connect_is_a_failure() {
    for (said, failure, detail) in [
        ("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n", Failure::Connect, "the proxy answered 403"),
        ("HTTP/1.1 302 Found\r\nlocation: http://x/\r\ncontent-length: 0\r\n\r\n", Failure::Connect, "the proxy answered 302"),
        ("SSH-2.0-OpenSSH\r\n\r\n", Failure::Connect, "the proxy: "),
        ("", Failure::ConnectTimeout, "no answer of the proxy"),
    ] {
        for post in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let world = world(listener.local_addr().unwrap(), post, false);
            let proxy = tokio::spawn(async move {
                let (mut tcp, _) = listener.accept().await.unwrap();
                tcp.write_all(said.as_bytes()).await.unwrap();
                // To the end: it is given up.
                let _ = tcp.read_to_end(&mut Vec::new()).await;
            });
            let error = open(&world).await.unwrap_err();
            assert_eq!(error.failure, failure, "{said:?}: {error}");
            assert!(error.detail.contains(detail), "{said:?}: {error}");
            tokio::time::timeout(PATIENCE, proxy).await.expect("the connection is ended").unwrap();
            settle().await;
            assert_eq!(world.upstreams.clusters()[0].counts.connections, 0, "{said:?}");
        }
    }
}

#[tokio::test]
async fn an_upload_that_is_given_up_is_not_taken_for_a_whole_one() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let world = world(listener.local_addr().unwrap(), true, false);
    let proxy = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let mut all = Vec::new();
        let _ = tcp.read_to_end(&mut all).await;
        String::from_utf8(all).unwrap()
    });
    let mut io = open(&world).await.unwrap();
    io.write_all(b"half").await.unwrap();
    settle().await;
    drop(io);
    let seen = tokio::time::timeout(PATIENCE, proxy).await.expect("the connection is ended").unwrap();
    assert!(seen.ends_with("\r\n\r\n4\r\nhalf\r\n"), "{seen:?}");
}

/// A proxy that takes nothing more keeps no connection, and is told no end that would look like that of the whole.
#[tokio::test]
async fn what_a_proxy_does_not_take_keeps_no_connection() {
    for post in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let world = world(listener.local_addr().unwrap(), post, true);
        let proxy = tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(tcp).await.unwrap();
            let (request, mut answer) = connection.accept().await.unwrap().unwrap();
            let driving = tokio::spawn(async move { while let Some(Ok(_)) = connection.accept().await {} });
            let _down = answer.send_response(Response::new(()), false).unwrap();
            let mut up = request.into_body();
            // Nothing is released, so the stream's window is used up.
            let end = loop {
                match up.data().await {
                    Some(Ok(_)) => {}
                    other => break other,
                }
            };
            assert!(end.is_some_and(|end| end.is_err()), "post: {post}: an end");
            driving.await.unwrap();
        });
        let mut io = open(&world).await.unwrap();
        let much = async {
            for _ in 0..256 {
                // A piece of whatever size is taken at once.
                io.write_all(&[0; 16 << 10]).await.unwrap();
            }
        };
        let blocked = tokio::time::timeout(Duration::from_millis(200), much).await;
        assert!(blocked.is_err(), "post: {post}: {blocked:?}");
        drop(io);
        tokio::time::timeout(PATIENCE, proxy).await.expect("the connection is ended").unwrap();
        settle().await;
        assert_eq!(world.upstreams.clusters()[0].counts.connections, 0, "post: {post}");
    }
}

/// Requests go to the proxy as to any endpoint.
#[tokio::test]
async fn requests_are_not_forwarded_so() {
    let server = Server::open().await;
    let world = world(server.addr, false, false);
    assert_eq!(fetch(&world.cluster(), false).await.unwrap().1, "/hello web.shop HTTP/1.1");
}
