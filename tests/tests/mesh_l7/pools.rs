//! Connections to endpoints: what changes while they are open.
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_tests::grpc::Grpc;
use mesh_tests::rude::Rude;
use mesh_tests::wait;

use crate::destinations::policy;
use crate::mesh::{Mesh, RUDE, RUDE_PORT};

/// A changed `connectionPool` counts for all connections and for who waits, and fails nobody.
pub(crate) fn a_changed_limit_counts_at_once(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh: &Mesh = mesh;
    let url = format!("http://{RUDE}/");
    let told = |pool: &str| mesh.objects("limits", &policy("rude", &format!("    connectionPool: {pool}\n")));
    let (slow, wait) = (format!("{url}slow"), Duration::from_secs(2));
    let server = Rude::start(mesh.pod("web1"), RUDE_PORT, move |head, stream| {
        if head.contains("/slow") {
            std::thread::sleep(wait);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    })?;
    {
        ensure!(mesh.call(&[&url])?.status == 200);
        let _policy = told("{ http: { maxRequestsPerConnection: 1 } }")?;
        for _ in 0..2 {
            ensure!(mesh.call(&[&url])?.status == 200);
        }
        ensure!(server.seen().len() == 3, "the one of before is not used again: {}", server.text());
    }
    let before = server.seen().len();
    let _few = told("{ tcp: { maxConnections: 1 } }")?;
    // One connection each thread of the waypoint may have in any case; the others wait.
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let calls = [(); 8].map(|()| scope.spawn(|| mesh.call(&[&slow]).map(|got| got.status)));
        wait::until_true("requests under way", || server.seen().len() > before)?;
        std::thread::sleep(Duration::from_millis(300));
        let open = server.seen().len() - before;
        ensure!(open <= 2, "{open} connections");
        let _many =
            mesh.instead("objects-limits.yaml", &policy("rude", "    connectionPool: { tcp: { maxConnections: 100 } }\n"))?;
        calls.into_iter().try_for_each(|call| {
            let status = call.join().map_err(|_panic| anyhow::anyhow!("a call panicked"))??;
            ensure!(status == 200, "{status}");
            Ok(())
        })
    })?;
    // At most two at a time it would have been four times the wait.
    ensure!(begun.elapsed() < wait * 3, "{:?}", begun.elapsed());
    Ok(())
}

/// `http2KeepAlive`: an endpoint that takes everything and answers nothing any more.
pub(crate) fn a_connection_that_answers_no_pings_is_replaced(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{RUDE}/svc/0");
    let stuck = Arc::new(AtomicBool::new(false));
    let sticks = Arc::clone(&stuck);
    // All connections of this server share a thread: while one answer blocks it, no PING is answered.
    let server = Grpc::answering(mesh.pod("web1"), RUDE_PORT, move |_, body| {
        while sticks.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        body
    })?;
    let _policy = mesh.objects(
        "pings",
        &policy(
            "rude",
            "    connectionPool: { http: { h2UpgradePolicy: UPGRADE, http2KeepAlive: { interval: 300ms, timeout: 700ms } } }\n",
        ),
    )?;
    ensure!(mesh.call(&[&url])?.status == 200);
    // Silent for longer than both, it lives: it answers.
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(mesh.call(&[&url])?.status == 200);
    ensure!(server.connections() <= 2, "one connection a data thread: {}", server.connections());
    let before = server.connections();
    stuck.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    let got = mesh.call(&[&url])?;
    ensure!(got.status == 503 && got.body.contains("connection termination"), "{got:?}");
    ensure!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    // Until those of all threads are given up.
    std::thread::sleep(Duration::from_millis(1500));
    stuck.store(false, Ordering::Relaxed);
    ensure!(mesh.call(&[&url])?.status == 200);
    ensure!(server.connections() > before, "over a new one");
    Ok(())
}
