//! Half close, reset, backpressure, accounting: application TCP, relay, tunnel, relay, application TCP.
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use mesh_hbone::relay::{Counters, End, How, RelayEnd, RelayStats, Timeouts};
use mesh_hbone::{Settings, Tunnel, relay, relay_tcp};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::common::{self, BUDGET, Server};

struct Path {
    app: TcpStream,
    service: TcpStream,
    near: JoinHandle<RelayEnd>,
    far: JoinHandle<RelayEnd>,
    stats: Arc<RelayStats>,
    cancel: oneshot::Sender<()>,
    tunnel: Tunnel,
    server: Server,
}

async fn path(settings: &Settings, buffers: Option<u32>, timeouts: Timeouts) -> Path {
    let (tunnel, mut server) = common::tunnel(settings).await;
    let (near_stream, far_stream) = common::open(&tunnel, &mut server).await;
    let (app, near_tcp) = common::tcp(buffers).await;
    let (far_tcp, service) = common::tcp(buffers).await;
    let stats = Arc::new(RelayStats::default());
    let (cancel, cancelled) = oneshot::channel::<()>();
    let cancelled = async move {
        if cancelled.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let near = tokio::spawn(relay(near_tcp, near_stream, Arc::clone(&stats), cancelled, timeouts));
    let far = tokio::spawn(relay(far_stream, far_tcp, (), std::future::pending(), timeouts));
    Path { app, service, near, far, stats, cancel, tunnel, server }
}

async fn plain() -> Path {
    path(&Settings::default(), None, Timeouts::default()).await
}

async fn read_all(socket: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    timeout(BUDGET, socket.read_to_end(&mut out)).await.unwrap().map(|_| out)
}

async fn end(task: JoinHandle<RelayEnd>) -> RelayEnd {
    timeout(BUDGET, task).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_half_close_passes_and_the_other_direction_lives_on() {
    let mut path = plain().await;
    path.app.write_all(b"question").await.unwrap();
    path.app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.service).await.unwrap(), b"question");
    path.service.write_all(b"a long answer").await.unwrap();
    path.service.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.app).await.unwrap(), b"a long answer");
    assert_eq!(end(path.near).await, RelayEnd { sent: 8, received: 13, how: How::Closed });
    assert_eq!(end(path.far).await, RelayEnd { sent: 8, received: 13, how: How::Closed });
    assert_eq!((path.stats.total_sent(), path.stats.total_received()), (8, 13));
    assert_eq!(path.tunnel.streams(), 0);
}

#[tokio::test]
async fn the_service_may_close_first() {
    let mut path = plain().await;
    path.service.write_all(b"banner").await.unwrap();
    path.service.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.app).await.unwrap(), b"banner");
    path.app.write_all(b"late").await.unwrap();
    path.app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.service).await.unwrap(), b"late");
    assert_eq!(end(path.near).await.how, How::Closed);
    assert_eq!(end(path.far).await.how, How::Closed);
}

#[tokio::test]
async fn a_reset_by_the_client_reaches_the_service_as_a_reset() {
    let mut path = plain().await;
    path.app.write_all(b"x").await.unwrap();
    path.service.read_u8().await.unwrap();
    path.app.set_zero_linger().unwrap();
    drop(path.app);
    let error = read_all(&mut path.service).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(end(path.near).await.how, How::Reset(End::First));
    assert_eq!(end(path.far).await.how, How::Reset(End::First));
}

#[tokio::test]
async fn a_reset_by_the_service_reaches_the_client_as_a_reset() {
    let mut path = plain().await;
    path.app.write_all(b"x").await.unwrap();
    path.service.read_u8().await.unwrap();
    path.service.set_zero_linger().unwrap();
    drop(path.service);
    let error = read_all(&mut path.app).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(end(path.near).await.how, How::Reset(End::Second));
    assert_eq!(end(path.far).await.how, How::Reset(End::Second));
}

#[tokio::test]
async fn a_reset_passes_after_a_half_close() {
    let mut path = plain().await;
    path.app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.service).await.unwrap(), b"");
    path.service.set_zero_linger().unwrap();
    drop(path.service);
    assert_eq!(read_all(&mut path.app).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_lost_tunnel_resets_both_applications() {
    let mut path = plain().await;
    path.app.write_all(b"x").await.unwrap();
    path.service.read_u8().await.unwrap();
    path.tunnel.abort();
    assert_eq!(read_all(&mut path.app).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(read_all(&mut path.service).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(end(path.near).await.how, How::Reset(End::Second));
}

#[tokio::test]
async fn cancelling_or_dropping_a_relay_resets_both_ends() {
    let mut path = plain().await;
    path.cancel.send(()).unwrap();
    assert_eq!(end(path.near).await.how, How::Cancelled);
    assert_eq!(read_all(&mut path.app).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(read_all(&mut path.service).await.unwrap_err().kind(), ErrorKind::ConnectionReset);

    let mut path = plain().await;
    path.near.abort();
    assert_eq!(read_all(&mut path.app).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(read_all(&mut path.service).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn bytes_arrive_whole_and_in_order_in_every_size() {
    let path = plain().await;
    let (mut app_read, mut app_write) = path.app.into_split();
    let (mut service_read, mut service_write) = path.service.into_split();
    let sizes = [1usize, 63, 1500, 2047, 2048, 16_383, 16_384, 16_385, 65_536, 300_000, 5_000_000, 7, 7];
    let data: Vec<u8> = (0..sizes.iter().sum::<usize>()).map(|i| (i * 31 % 251) as u8).collect();
    let expect = data.clone();
    let writer = tokio::spawn(async move {
        let mut rest = &data[..];
        for size in sizes {
            app_write.write_all(&rest[..size]).await.unwrap();
            rest = &rest[size..];
            tokio::task::yield_now().await;
        }
    });
    let echo = tokio::spawn(async move { tokio::io::copy(&mut service_read, &mut service_write).await.unwrap() });
    let mut back = Vec::new();
    timeout(BUDGET, app_read.read_to_end(&mut back)).await.unwrap().unwrap();
    assert!(back == expect, "{} bytes came back of {}", back.len(), expect.len());
    writer.await.unwrap();
    assert_eq!(echo.await.unwrap(), expect.len() as u64);
    assert_eq!(end(path.near).await.how, How::Closed);
}

/// Writes until the kernel takes no more for a while; virtual time only moves when nothing else can.
async fn fill(socket: &mut TcpStream) -> usize {
    let chunk = vec![7u8; 64 << 10];
    let mut total = 0;
    for _ in 0..10_000 {
        match timeout(Duration::from_millis(300), socket.write(&chunk)).await {
            Ok(written) => total += written.unwrap(),
            Err(_) => return total,
        }
    }
    panic!("{total} bytes were accepted and no end in sight");
}

#[tokio::test]
async fn a_reader_that_does_not_read_stops_its_sender_within_the_bound() {
    let settings = Settings::default();
    let mut path = path(&settings, Some(16 << 10), Timeouts::default()).await;
    let accepted = fill(&mut path.app).await;
    // Four kernel buffers of 16 KiB (the kernel doubles what it is asked for), one window, one relay's queue and
    // one send buffer of ours.
    let kernel = 4 * 2 * (16 << 10) + (64 << 10);
    let ours = settings.stream_window as usize + settings.send_buffer + (256 << 10);
    assert!(accepted <= kernel + ours, "{accepted} bytes accepted, {} allowed", kernel + ours);
    assert!(accepted >= settings.stream_window as usize, "{accepted} bytes: the window was not used");
    // And it all still arrives.
    path.app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.service).await.unwrap().len(), accepted);
}

#[tokio::test]
async fn a_stalled_stream_of_tiny_frames_does_not_kill_the_tunnel() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let (mut near, far) = common::open(&tunnel, &mut server).await;
    let (far_tcp, service) = common::tcp(Some(16 << 10)).await;
    tokio::spawn(relay(far, far_tcp, (), std::future::pending(), Timeouts::default()));
    // 3-byte frames: h2 charges 253 bytes of its own for each one that lies unread.
    for _ in 0..60_000 {
        common::send(&mut near, bytes::Bytes::from_static(b"abc")).await;
    }
    let (mut other, mut other_far) = common::open(&tunnel, &mut server).await;
    common::send(&mut other, bytes::Bytes::from_static(b"alive")).await;
    assert_eq!(common::recv(&mut other_far).await.unwrap().unwrap(), "alive");
    drop(service);
}

#[tokio::test]
async fn a_reset_is_noticed_while_the_sender_is_stopped() {
    let mut path = path(&Settings::default(), Some(16 << 10), Timeouts::default()).await;
    fill(&mut path.app).await;
    path.app.set_zero_linger().unwrap();
    drop(path.app);
    // The service never reads; the near relay finds out by asking its socket.
    assert_eq!(end(path.near).await.how, How::Reset(End::First));
    assert_eq!(end(path.far).await.how, How::Reset(End::First));
    drop((path.service, path.server));
}

#[tokio::test]
async fn a_reset_is_noticed_after_a_half_close_though_nobody_writes() {
    let mut path = plain().await;
    path.app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.service).await.unwrap(), b"");
    // The end of stream was read: nobody reads that socket any more, and the service stays silent.
    path.app.set_zero_linger().unwrap();
    drop(path.app);
    assert_eq!(end(path.near).await.how, How::Reset(End::First));
    assert_eq!(end(path.far).await.how, How::Reset(End::First));
    assert!(path.service.take_error().unwrap().is_some(), "and the service's socket was reset in turn");
}

#[tokio::test]
async fn a_reset_after_a_half_close_is_noticed_between_two_sockets_too() {
    let (mut app, near) = common::tcp(None).await;
    let (far, mut service) = common::tcp(None).await;
    let task = tokio::spawn(relay_tcp(near, far, (), std::future::pending(), Timeouts::default()));
    service.shutdown().await.unwrap();
    assert_eq!(read_all(&mut app).await.unwrap(), b"");
    service.set_zero_linger().unwrap();
    drop(service);
    assert_eq!(end(task).await.how, How::Reset(End::Second));
}

#[tokio::test]
async fn a_half_closed_connection_that_lives_is_left_alone() {
    let mut path = plain().await;
    path.app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.service).await.unwrap(), b"");
    // Longer than the period in which dead ends are looked for.
    assert!(timeout(Duration::from_secs(6), &mut path.near).await.is_err());
    path.service.write_all(b"late").await.unwrap();
    path.service.shutdown().await.unwrap();
    assert_eq!(read_all(&mut path.app).await.unwrap(), b"late");
    assert_eq!(end(path.near).await.how, How::Closed);
}

#[tokio::test]
async fn half_closed_silence_counts_from_the_half_close() {
    // Silent for longer than `half_closed` before: the half close alone must not end it.
    let timeouts = Timeouts { idle: Some(Duration::from_secs(8)), half_closed: Some(Duration::from_secs(2)) };
    let mut path = path(&Settings::default(), None, timeouts).await;
    assert!(timeout(Duration::from_millis(2500), &mut path.near).await.is_err());
    path.app.shutdown().await.unwrap();
    assert!(timeout(Duration::from_secs(1), &mut path.near).await.is_err(), "given up too early");
    assert_eq!(end(path.near).await.how, How::Idle);
}

#[tokio::test]
async fn silence_ends_a_relay_only_when_asked_to() {
    let idle = Timeouts { idle: Some(Duration::from_millis(400)), half_closed: None };
    let mut path = path(&Settings::default(), None, idle).await;
    assert_eq!(end(path.near).await.how, How::Idle);
    assert_eq!(read_all(&mut path.app).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let half = Timeouts { idle: None, half_closed: Some(Duration::from_millis(400)) };
    let mut path = self::path(&Settings::default(), None, half).await;
    path.app.write_all(b"x").await.unwrap();
    path.service.read_u8().await.unwrap();
    assert!(timeout(Duration::from_secs(1), &mut path.near).await.is_err(), "open both ways: no limit applies");
    path.app.shutdown().await.unwrap();
    assert_eq!(end(path.near).await.how, How::Idle);
}

#[tokio::test]
async fn plain_tcp_follows_the_same_rules() {
    let (mut app, near) = common::tcp(None).await;
    let (far, mut service) = common::tcp(None).await;
    let task = tokio::spawn(relay_tcp(near, far, (), std::future::pending(), Timeouts::default()));
    app.write_all(b"ping").await.unwrap();
    app.shutdown().await.unwrap();
    assert_eq!(read_all(&mut service).await.unwrap(), b"ping");
    service.write_all(b"pong").await.unwrap();
    service.set_zero_linger().unwrap();
    let mut four = [0; 4];
    app.read_exact(&mut four).await.unwrap();
    drop(service);
    assert_eq!(read_all(&mut app).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(end(task).await, RelayEnd { sent: 4, received: 4, how: How::Reset(End::Second) });
}

#[tokio::test]
async fn two_streams_can_be_joined() {
    // A waypoint that passes TCP on: stream to stream, no socket between.
    let (first, mut first_server) = common::tunnel(&Settings::default()).await;
    let (second, mut second_server) = common::tunnel(&Settings::default()).await;
    let (mut near, middle_a) = common::open(&first, &mut first_server).await;
    let (middle_b, mut far) = common::open(&second, &mut second_server).await;
    let task = tokio::spawn(relay(middle_a, middle_b, (), std::future::pending(), Timeouts::default()));
    let data = bytes::Bytes::from(vec![9; 1 << 20]);
    let total = data.len();
    let ((), got) = tokio::join!(
        async {
            common::send(&mut near, data).await;
            near.finish().unwrap();
        },
        async {
            let mut got = 0;
            while let Some(chunk) = common::recv(&mut far).await {
                let chunk = chunk.unwrap().len();
                got += chunk;
                far.release(chunk);
            }
            got
        }
    );
    assert_eq!(got, total);
    far.finish().unwrap();
    assert!(common::recv(&mut near).await.is_none());
    assert_eq!(end(task).await, RelayEnd { sent: total as u64, received: 0, how: How::Closed });
}

#[tokio::test]
async fn a_relay_is_small() {
    struct Count;
    impl Counters for Count {
        fn sent(&self, _: u64) {}
        fn received(&self, _: u64) {}
    }
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let (stream, _far) = common::open(&tunnel, &mut server).await;
    let (tcp, _app) = common::tcp(None).await;
    let future = relay(tcp, stream, Arc::new(Count), std::future::pending::<()>(), Timeouts::default());
    let size = size_of_val(&future);
    assert!(size <= 448, "the relay's future has {size} bytes");
    let (a, b) = (common::tcp(None).await.0, common::tcp(None).await.0);
    let size = size_of_val(&relay_tcp(a, b, (), std::future::pending(), Timeouts::default()));
    assert!(size <= 640, "the passthrough relay's future has {size} bytes");
}
