//! What a new tunnel costs: TCP, mutual TLS, HTTP/2, one CONNECT and one round trip, both ends in this process on one thread.
//! The target of the house is 700 µs (istio/ztunnel's own bench of the same shape: 748 µs).
//!
//! `cargo bench -p ztunnel --bench connect [-- COUNT]`. Prints CPU time (what is left on a busy machine) and wall time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench that cannot set itself up has nothing to say")]
use mesh_hbone::{ConnectRequest, Incoming, Tunnel};
use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::TlsSettings;
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_identity::{IdentitySource, Svid, TlsContext};
use mesh_model::{HboneAuthority, SpiffeId, TrustDomain};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn cpu() -> Duration {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
    let of = |t: nix::sys::time::TimeVal| Duration::from_micros(t.tv_sec() as u64 * 1_000_000 + t.tv_usec() as u64);
    of(usage.user_time()) + of(usage.system_time())
}

fn main() {
    let count: u32 = std::env::args().filter_map(|a| a.parse().ok()).next_back().unwrap_or(2000);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(SystemClock);
        let settings = LocalCaSettings { directory: dir.path().join("ca"), ..LocalCaSettings::default() };
        let ca = LocalCa::open(&settings, clock.clone()).unwrap();
        let tls = TlsContext::new(&TlsSettings::default(), &ca, clock).unwrap();
        let id = |account| SpiffeId::new(&TrustDomain::default(), "bench", account).unwrap();
        let (client_id, server_id) = (id("client"), id("server"));
        let client = Svid::new(&client_id, ca.issue(&client_id).await.unwrap(), &tls).unwrap();
        let server = Arc::new(Svid::new(&server_id, ca.issue(&server_id).await.unwrap(), &tls).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (_keep, watch) = mesh_runtime::drain::channel();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (server, watch) = (Arc::clone(&server), watch.clone());
                tokio::spawn(async move {
                    let late = tokio::time::Instant::now() + Duration::from_secs(10);
                    tcp.set_nodelay(true).unwrap();
                    let (tls, _) = mesh_identity::tls::accept(&server, tcp, late).await.unwrap();
                    let echo = |incoming: Incoming| async move {
                        let (mut r, mut w) = tokio::io::split(incoming.accept([]).unwrap().into_io());
                        let _ = tokio::io::copy(&mut r, &mut w).await;
                    };
                    let _ = mesh_hbone::serve(tls, Arc::default(), echo, watch).await;
                });
            }
        });
        let expect = [server_id];
        let once = async || {
            let late = tokio::time::Instant::now() + Duration::from_secs(10);
            let tcp = TcpStream::connect(at).await.unwrap();
            tcp.set_nodelay(true).unwrap();
            let (tls, _) = mesh_identity::tls::connect(&client, tcp, &expect, late).await.unwrap();
            let tunnel = Tunnel::handshake(tls, Arc::default(), || {}).await.unwrap();
            let request = ConnectRequest::to(HboneAuthority::Addr(at));
            let mut io = tunnel.open(&request).await.unwrap().0.into_io();
            io.write_all(&[7; 64]).await.unwrap();
            io.read_exact(&mut [0; 64]).await.unwrap();
        };
        for _ in 0..count / 10 {
            once().await;
        }
        let (started, before) = (Instant::now(), cpu());
        for _ in 0..count {
            once().await;
        }
        let (wall, used) = (started.elapsed() / count, cpu().saturating_sub(before) / count);
        println!("new tunnel, CONNECT and round trip, both ends: {used:?} CPU, {wall:?} wall ({count} times)");
    });
}
