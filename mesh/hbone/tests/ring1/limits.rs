//! Peers that are late, wrong or hostile; keepalive; drain.
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request};
use mesh_hbone::server::Served;
use mesh_hbone::{ConnectRequest, Settings, StreamError, Tunnel, headers};
use mesh_model::{Reason, Refusal};
use mesh_runtime::drain::DrainMode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use crate::common::{self, BUDGET};

#[tokio::test(start_paused = true)]
async fn a_request_and_its_answer_carry_their_headers() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let context = headers::TraceParent { trace: 0xa, parent: 0xb, flags: 0 };
    let request = ConnectRequest {
        baggage: Some(HeaderValue::from_static("service.name=a")),
        forwarded: headers::forwarded("10.0.0.9:1234".parse().unwrap(), Some("b.default.svc.cluster.local")),
        traceparent: context.encode(),
        extra: vec![(headers::FORWARDED_NETWORK, HeaderValue::from_static("net1"))],
        ..common::request()
    };
    let serve = async {
        let incoming = server.incoming.recv().await.unwrap();
        assert_eq!(incoming.authority(), "10.0.0.1:80");
        assert_eq!(incoming.baggage().unwrap(), "service.name=a");
        let forwarded = incoming.forwarded().unwrap();
        assert_eq!(forwarded.client, Some("10.0.0.9:1234".parse().unwrap()));
        assert_eq!(forwarded.host, Some("b.default.svc.cluster.local"));
        assert_eq!(incoming.traceparent(), Some(context));
        assert_eq!(incoming.forwarded_network(), Some("net1"));
        incoming.accept([(headers::BAGGAGE, HeaderValue::from_static("service.name=b"))]).unwrap()
    };
    let (opened, _far) = tokio::join!(tunnel.open(&request), serve);
    let (_near, head) = opened.unwrap();
    assert_eq!(head.baggage().unwrap(), "service.name=b");
}

#[tokio::test(start_paused = true)]
async fn refusals_say_why_and_whether_to_retry() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    for (refusal, status, retry) in [
        (Refusal::new(Reason::PolicyDenied, "default/deny\nall"), 401, false),
        (Refusal::new(Reason::BadRequest, ""), 400, false),
        (Refusal::new(Reason::ConnectFailed, "connection refused"), 503, true),
        (Refusal::new(Reason::TlsFailure, "has no status"), 503, true),
    ] {
        let request = common::request();
        let (opened, ()) = tokio::join!(tunnel.open(&request), async {
            server.incoming.recv().await.unwrap().refuse(&refusal);
        });
        let error = opened.unwrap_err();
        assert_eq!((error.reason, error.status, error.retry), (Reason::PeerRefused, Some(status), retry));
        assert!(error.detail.contains(refusal.reason.as_str()), "{}", error.detail);
        assert!(!error.detail.contains('\n'), "{}", error.detail);
        assert!(!error.unprocessed);
    }
    assert_eq!(tunnel.streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_connect_times_out_and_is_reset() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let started = Instant::now();
    let error = tunnel.open(&common::request()).await.unwrap_err();
    assert_eq!(error.reason, Reason::HandshakeTimeout);
    assert_eq!(started.elapsed().as_secs(), 10);
    let mut incoming = server.incoming.recv().await.unwrap();
    assert_eq!(incoming.cancelled().await, StreamError::Reset(h2::Reason::CANCEL));
    assert_eq!(tunnel.streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_does_not_hold_a_handshake() {
    let (_silent, far) = tokio::io::duplex(1 << 16);
    let server = common::server(far, &Settings::default());
    let error = server.served.await.unwrap().unwrap_err();
    assert_eq!(error.reason, Reason::HandshakeTimeout);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stops_answering_is_dropped_within_thirty_seconds_and_one_that_answers_is_not() {
    let settings = Settings { unused_release: Duration::from_hours(10), ..Settings::default() };
    let fixed = Settings { max_stream_window: settings.stream_window, ..settings.clone() };
    for settings in [&settings, &fixed] {
        let (tunnel, _server) = common::tunnel(settings).await;
        tokio::time::sleep(Duration::from_hours(1)).await;
        assert!(tunnel.is_open(), "pings are answered");
    }

    // A client whose peer reads and never writes: only the preface of SETTINGS came.
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let tunnel = Tunnel::handshake(near, Arc::new(settings.clone()), || {}).await.unwrap();
    far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let sink = tokio::spawn(async move { tokio::io::copy(&mut far, &mut tokio::io::sink()).await });
    let started = Instant::now();
    sink.await.unwrap().unwrap();
    let elapsed = started.elapsed();
    assert!((30..=42).contains(&elapsed.as_secs()), "{elapsed:?}");
    assert!(!tunnel.is_open());

    // A server whose client does the same.
    let (mut near, far) = tokio::io::duplex(1 << 16);
    let server = common::server(far, &settings);
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    near.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    assert_eq!(server.served.await.unwrap(), Ok(Served::Unresponsive));
}

#[tokio::test(start_paused = true)]
async fn an_unused_tunnel_closes_politely() {
    let (near, far) = tokio::io::duplex(1 << 16);
    let server = common::server(far, &Settings::default());
    let (tx, rx) = tokio::sync::oneshot::channel();
    let tunnel = Tunnel::handshake(near, Arc::new(Settings::default()), move || {
        let _ = tx.send(());
    })
    .await
    .unwrap();
    let started = Instant::now();
    rx.await.unwrap();
    assert!((300..=320).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    assert!(!tunnel.is_open());
    drop(tunnel);
    assert_eq!(server.served.await.unwrap(), Ok(Served::PeerClosed));
}

#[tokio::test(start_paused = true)]
async fn garbage_instead_of_http2_ends_the_connection_only() {
    for garbage in [
        &b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..],
        &[0xff; 400],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x01\x01\x04\x00\x00\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let (mut near, far) = tokio::io::duplex(1 << 16);
        let server = common::server(far, &Settings::default());
        near.write_all(garbage).await.unwrap();
        let served = timeout(BUDGET, server.served).await.unwrap().unwrap();
        assert!(served.as_ref().is_err_and(|error| error.reason == Reason::H2Failure), "{served:?}");
        // And as a server's answer.
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let tunnel = Tunnel::handshake(near, Arc::new(Settings::default()), || {}).await.unwrap();
        far.write_all(garbage).await.unwrap();
        let error = tunnel.open(&common::request()).await.unwrap_err();
        assert!(matches!(error.reason, Reason::H2Failure), "{error:?}");
    }
}

/// A client that is not ours.
async fn raw_client(settings: &Settings) -> (h2::client::SendRequest<Bytes>, common::Server) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let server = common::server(far, settings);
    let (requests, connection) = h2::client::handshake(near).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    (requests, server)
}

#[tokio::test(start_paused = true)]
async fn other_methods_get_a_400_and_oversized_headers_harm_nobody_else() {
    let (requests, mut server) = raw_client(&Settings::default()).await;
    let mut requests = requests.ready().await.unwrap();
    let get = Request::get("https://10.0.0.1/").body(()).unwrap();
    let (response, _) = requests.send_request(get, true).unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 400);
    assert_eq!(response.headers()["x-culvert-reason"], "bad_request: method GET is not CONNECT");

    let mut requests = requests.ready().await.unwrap();
    let mut huge = Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).unwrap();
    for i in 0..30 {
        let name = http::HeaderName::try_from(format!("x-{i}")).unwrap();
        huge.headers_mut().insert(name, HeaderValue::try_from("a".repeat(3000)).unwrap());
    }
    let (response, _) = requests.send_request(huge, false).unwrap();
    match response.await {
        Ok(response) => assert_eq!(response.status(), 431),
        Err(error) => assert!(error.is_reset(), "{error}"),
    }
    let mut requests = requests.ready().await.unwrap();
    let good = Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).unwrap();
    let (response, _send) = requests.send_request(good, false).unwrap();
    let _far = server.incoming.recv().await.unwrap().accept([]).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn rapid_reset_closes_the_connection_and_runs_a_bounded_number_of_handlers() {
    let settings = Settings { max_early_resets: 50, ..Settings::default() };
    let (mut requests, mut server) = raw_client(&settings).await;
    let mut opened = 0;
    for _ in 0..100_000 {
        let Ok(ready) = requests.ready().await else { break };
        requests = ready;
        let connect = Request::builder().method("CONNECT").uri("10.0.0.1:80").body(()).unwrap();
        let Ok((response, mut send)) = requests.send_request(connect, false) else { break };
        // Some reach the handler before they are reset.
        if opened % 3 == 0 {
            tokio::task::yield_now().await;
        }
        send.send_reset(h2::Reason::CANCEL);
        drop(response);
        opened += 1;
        if opened % 64 == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        while server.incoming.try_recv().is_ok() {}
        if server.served.is_finished() {
            break;
        }
    }
    let served = timeout(BUDGET, server.served).await.unwrap().unwrap();
    assert!(matches!(served, Ok(Served::Abusive) | Err(_)), "{served:?} after {opened}");
    assert!(opened < 50_000, "{opened} streams got through");
}

#[tokio::test(start_paused = true)]
async fn a_graceful_drain_refuses_new_streams_and_waits_for_old_ones() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    server.drain.start(DrainMode::Graceful { deadline: Duration::from_secs(30) });
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(!tunnel.is_open(), "GOAWAY was understood");
    assert!(tunnel.open(&common::request()).await.unwrap_err().unprocessed);
    common::send(&mut near, Bytes::from_static(b"still here")).await;
    assert_eq!(common::recv(&mut far).await.unwrap().unwrap(), "still here");
    near.finish().unwrap();
    far.finish().unwrap();
    assert!(common::recv(&mut near).await.is_none());
    assert!(common::recv(&mut far).await.is_none());
    drop((near, far));
    assert_eq!(timeout(Duration::from_secs(5), server.served).await.unwrap().unwrap(), Ok(Served::Drained));
}

#[tokio::test(start_paused = true)]
async fn a_drains_deadline_and_an_immediate_drain_cut() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let (mut near, _far) = common::open(&tunnel, &mut server).await;
    let started = Instant::now();
    server.drain.start(DrainMode::Graceful { deadline: Duration::from_secs(5) });
    assert_eq!((&mut server.served).await.unwrap(), Ok(Served::Cut));
    assert_eq!(started.elapsed().as_secs(), 5);
    assert!(matches!(common::recv(&mut near).await, Some(Err(_))), "cut, not ended");

    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let (mut near, _far) = common::open(&tunnel, &mut server).await;
    server.drain.start(DrainMode::Immediate);
    assert_eq!((&mut server.served).await.unwrap(), Ok(Served::Cut));
    assert!(matches!(common::recv(&mut near).await, Some(Err(_))));
}

#[tokio::test(start_paused = true)]
async fn a_reset_is_not_an_end() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    near.reset(mesh_hbone::stream::ResetCode::ConnectError);
    assert_eq!(common::recv(&mut far).await, Some(Err(StreamError::Reset(h2::Reason::CONNECT_ERROR))));
    let (near, mut far) = common::open(&tunnel, &mut server).await;
    drop(near);
    assert_eq!(common::recv(&mut far).await, Some(Err(StreamError::Reset(h2::Reason::CANCEL))));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_runs_inside_a_stream() {
    // Double HBONE, without its TLS.
    let settings = Settings::default();
    let (outer, mut outer_server) = common::tunnel(&settings).await;
    let (near, far) = common::open(&outer, &mut outer_server).await;
    let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
    let (_drain, watch) = mesh_runtime::drain::channel();
    let handler = move |incoming: mesh_hbone::Incoming| {
        let tx = tx.clone();
        async move { drop(tx.send(incoming)) }
    };
    tokio::spawn(mesh_hbone::serve(far.into_io(), Arc::new(settings.clone()), handler, watch));
    let inner = Tunnel::handshake(near.into_io(), Arc::new(settings), || {}).await.unwrap();
    let request = common::request();
    let (opened, accepted) = tokio::join!(inner.open(&request), async { rx.recv().await.unwrap().accept([]).unwrap() });
    let (mut near, mut far) = (opened.unwrap().0.into_io(), accepted.into_io());
    let data = vec![5; 3 << 20];
    let ((), back) = tokio::join!(
        async {
            near.write_all(&data).await.unwrap();
            near.shutdown().await.unwrap();
        },
        async {
            let mut back = Vec::new();
            far.read_to_end(&mut back).await.unwrap();
            back
        }
    );
    assert!(back == data);
}

#[tokio::test]
async fn futures_are_small() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let request = common::request();
    let size = size_of_val(&tunnel.open(&request));
    assert!(size <= 512, "open: {size}");
    let (near, _far) = common::open(&tunnel, &mut server).await;
    let size = size_of_val(&near);
    assert!(size <= 128, "HboneStream: {size}");
    assert!(size_of::<mesh_hbone::Incoming>() <= 256, "Incoming: {}", size_of::<mesh_hbone::Incoming>());
}
