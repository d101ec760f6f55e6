//! Flow control: what a window bounds, when it grows and what it costs.
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use mesh_hbone::{HboneStream, Settings, Tunnel};
use mesh_runtime::memory::Budget;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::common;

/// Carries bytes one way, `delay` late, without limiting the rate.
async fn late(mut from: ReadHalf<DuplexStream>, mut to: WriteHalf<DuplexStream>, delay: Duration) {
    let (tx, mut rx) = mpsc::unbounded_channel::<(Instant, Bytes)>();
    let reader = async move {
        let mut buf = vec![0; 64 << 10];
        while let Ok(n) = from.read(&mut buf).await {
            if n == 0 || tx.send((Instant::now() + delay, Bytes::copy_from_slice(&buf[..n]))).is_err() {
                break;
            }
        }
    };
    let writer = async move {
        while let Some((due, data)) = rx.recv().await {
            sleep_until(due).await;
            if to.write_all(&data).await.is_err() {
                break;
            }
        }
    };
    tokio::join!(reader, writer);
}

async fn distant(settings: &Settings, delay: Duration) -> (Tunnel, common::Server) {
    let (near, near_wire) = tokio::io::duplex(1 << 20);
    let (far_wire, far) = tokio::io::duplex(1 << 20);
    let (near_read, near_write) = tokio::io::split(near_wire);
    let (far_read, far_write) = tokio::io::split(far_wire);
    tokio::spawn(late(near_read, far_write, delay));
    tokio::spawn(late(far_read, near_write, delay));
    let server = common::server(far, settings);
    let client = Tunnel::handshake(near, Arc::new(settings.clone()), || {}).await.unwrap();
    (client, server)
}

/// Sends whatever there is room for; returns what was sent when there is none.
async fn send_until_full(stream: &mut HboneStream) -> usize {
    let mut sent = 0;
    loop {
        let room = poll_fn(|cx| {
            Poll::Ready(match stream.poll_capacity(cx, 64 << 10) {
                Poll::Ready(room) => room.unwrap(),
                Poll::Pending => 0,
            })
        })
        .await;
        if room == 0 {
            return sent;
        }
        stream.send(Bytes::from(vec![0; room]), false).unwrap();
        sent += room;
        // Lets the driver write.
        tokio::task::yield_now().await;
    }
}

/// Bytes the sender gets rid of per round trip while the far reader takes everything at once.
async fn stream_bytes(near: &mut HboneStream, far: &mut HboneStream, total: usize) -> (usize, Duration) {
    let started = Instant::now();
    let mut most_unread = 0;
    let sender = async {
        let mut left = total;
        while left > 0 {
            let room = poll_fn(|cx| near.poll_capacity(cx, left.min(64 << 10))).await.unwrap();
            near.send(Bytes::from(vec![0; room]), false).unwrap();
            left -= room;
        }
    };
    let receiver = async {
        let mut got = 0;
        while got < total {
            let n = common::recv(far).await.unwrap().unwrap().len();
            most_unread = most_unread.max(far.unreleased());
            far.release(n);
            got += n;
        }
    };
    tokio::join!(sender, receiver);
    (most_unread, started.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_stream_nobody_reads_takes_one_window_and_no_more() {
    let (tunnel, mut server) = common::tunnel(&Settings::default()).await;
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    let mut sent = 0;
    for _ in 0..50 {
        sent += send_until_full(&mut near).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(sent, 256 << 10);
    assert_eq!(far.unreleased(), 256 << 10);
    // Received is not consumed: reading without releasing gives no new room.
    while far.unreleased() > 0 && poll_fn(|cx| Poll::Ready(far.poll_recv(cx).is_ready())).await {}
    assert_eq!(send_until_full(&mut near).await, 0);
    far.release(256 << 10);
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(send_until_full(&mut near).await > 0);
}

#[tokio::test(start_paused = true)]
async fn the_window_grows_for_a_reader_that_keeps_up_and_only_from_the_budget() {
    let budget = Budget::new(64 << 20);
    let settings = Settings { budget: Some(budget.clone()), ..Settings::default() };
    let (tunnel, mut server) = distant(&settings, Duration::from_millis(20)).await;
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    // 256 KiB per 40 ms would take 10 s.
    let (_, took) = stream_bytes(&mut near, &mut far, 64 << 20).await;
    assert!(took < Duration::from_secs(3), "64 MiB took {took:?} of virtual time");
    assert_eq!(budget.used(), (4 << 20) - (256 << 10), "what the window grew by is reserved");
    drop((near, far, tunnel));
    drop(server);
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(budget.used(), 0);

    let poor = Settings { budget: Some(Budget::new(300 << 10)), ..Settings::default() };
    let (tunnel, mut server) = distant(&poor, Duration::from_millis(20)).await;
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    let (_, took) = stream_bytes(&mut near, &mut far, 16 << 20).await;
    assert!(took > Duration::from_secs(1), "without budget the window stays: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_gets_no_growth() {
    let budget = Budget::new(64 << 20);
    let settings = Settings { budget: Some(budget.clone()), ..Settings::default() };
    let (tunnel, mut server) = distant(&settings, Duration::from_millis(5)).await;
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    let sender = tokio::spawn(async move {
        for _ in 0..64 {
            common::send(&mut near, Bytes::from(vec![0; 64 << 10])).await;
        }
        near
    });
    let mut got = 0;
    while got < 4 << 20 {
        let n = common::recv(&mut far).await.unwrap().unwrap().len();
        // 64 KiB per 20 ms: half a window per measured round trip.
        tokio::time::sleep(Duration::from_millis(20)).await;
        far.release(n);
        got += n;
    }
    assert_eq!(budget.used(), 0);
    sender.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn stalled_streams_do_not_starve_the_others() {
    // More stalled windows than the connection window holds.
    let settings = Settings { connection_window: 1 << 20, ..Settings::default() };
    let (tunnel, mut server) = common::tunnel(&settings).await;
    let mut stalled = Vec::new();
    for _ in 0..16 {
        let (mut near, far) = common::open(&tunnel, &mut server).await;
        for _ in 0..20 {
            send_until_full(&mut near).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        stalled.push((near, far));
    }
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    stream_bytes(&mut near, &mut far, 1 << 20).await;
    assert!(stalled.iter_mut().all(|(_, far)| far.unreleased() == 256 << 10));
}

#[tokio::test]
async fn a_reader_that_stops_after_growth_gives_the_growth_back() {
    // Real time and a real socket: a relay notices that its sink is full, its tunnel shrinks at the next tick.
    let budget = Budget::new(64 << 20);
    let settings = Settings { budget: Some(budget.clone()), ping_interval: Duration::from_millis(500), ..Settings::default() };
    let (tunnel, mut server) = distant(&settings, Duration::from_millis(10)).await;
    let (mut near, mut far) = common::open(&tunnel, &mut server).await;
    stream_bytes(&mut near, &mut far, 32 << 20).await;
    assert!(budget.used() > 0, "the window grew");
    let (mut near2, far2) = common::open(&tunnel, &mut server).await;
    let (sink, _never_read) = common::tcp(Some(16 << 10)).await;
    let relay = mesh_hbone::relay(far2, sink, (), std::future::pending(), mesh_hbone::relay::Timeouts::default());
    tokio::spawn(relay);
    let sender = tokio::spawn(async move {
        for _ in 0..128 {
            common::send(&mut near2, Bytes::from(vec![0; 64 << 10])).await;
        }
    });
    let started = Instant::now();
    while budget.used() > 0 {
        assert!(started.elapsed() < Duration::from_secs(15), "{} bytes still reserved", budget.used());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!sender.is_finished());
}
