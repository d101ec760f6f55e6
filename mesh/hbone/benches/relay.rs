//! What the crate costs: application TCP → relay → tunnel (h2 over loopback TCP, no TLS) → relay → application TCP.
//!
//! Each end of the tunnel is one thread with one single-threaded runtime, as a data thread is; the applications run on other
//! threads with blocking sockets. Reported is the CPU time of the two tunnel threads, per gigabyte or per 100 000 operations.
//!
//! `cargo bench -p mesh-hbone [-- up down ping connect plain idle]`
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, reason = "a program for developers")]

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream as StdStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mesh_hbone::relay::Timeouts;
use mesh_hbone::{ConnectRequest, Dialer, HboneError, Incoming, Pool, PoolKey, Settings, headers, relay, relay_tcp, serve};
use mesh_model::{HboneAuthority, Reason, Refusal, SpiffeId};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use tokio::net::{TcpListener, TcpStream};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A thread with a runtime whose CPU time can be read.
struct Agent {
    address: SocketAddr,
    cpu: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Agent {
    fn start<F, Fut>(main: F) -> Self
    where
        F: FnOnce(TcpListener) -> Fut + Send + 'static,
        Fut: Future<Output = ()>,
    {
        let (tx, rx) = mpsc::channel();
        let (cpu, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (cpu_out, stopped) = (Arc::clone(&cpu), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                tx.send(listener.local_addr().unwrap()).unwrap();
                let clock = async {
                    while !stopped.load(Relaxed) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
                        let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
                        cpu_out.store(us as u64, Relaxed);
                    }
                };
                tokio::select! { () = main(listener) => {}, () = clock => {} }
            });
        });
        Self { address: rx.recv().unwrap(), cpu, stop, thread }
    }
    fn cpu(&self) -> f64 {
        thread::sleep(Duration::from_millis(50));
        self.cpu.load(Relaxed) as f64 / 1e6
    }
    fn stop(self) {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap();
    }
}

struct Dial(SocketAddr);

impl Dialer for Dial {
    type Io = TcpStream;
    async fn dial(&self, _: &PoolKey) -> Result<TcpStream, HboneError> {
        let stream =
            TcpStream::connect(self.0).await.map_err(|error| HboneError::new(Reason::ConnectFailed, error.to_string()))?;
        stream.set_nodelay(true).unwrap();
        Ok(stream)
    }
}

/// The destination's agent: CONNECT to the service.
fn inbound(service: SocketAddr, settings: Arc<Settings>) -> Agent {
    Agent::start(move |listener| async move {
        let (_drain, watch) = mesh_runtime::drain::channel();
        loop {
            let (io, _) = listener.accept().await.unwrap();
            io.set_nodelay(true).unwrap();
            let handler = move |incoming: Incoming| async move {
                match TcpStream::connect(service).await {
                    Ok(tcp) => {
                        tcp.set_nodelay(true).unwrap();
                        if let Ok(stream) = incoming.accept([]) {
                            relay(stream, tcp, (), std::future::pending(), Timeouts::default()).await;
                        }
                    }
                    Err(error) => incoming.refuse(&Refusal::new(Reason::ConnectFailed, error.to_string())),
                }
            };
            tokio::spawn(serve(io, Arc::clone(&settings), handler, watch.clone()));
        }
    })
}

/// The source's agent.
fn outbound(peer: SocketAddr, settings: Arc<Settings>) -> Agent {
    Agent::start(move |listener| async move {
        let pool = Pool::new(Dial(peer), settings);
        let id: SpiffeId = "spiffe://cluster.local/ns/default/sa/bench".parse().unwrap();
        let key = PoolKey::new(id.clone(), [id].into(), [127, 0, 0, 1].into(), peer);
        let baggage = headers::Baggage {
            cluster: "Kubernetes".into(),
            namespace: "default".into(),
            workload: "bench".into(),
            service: "bench".into(),
            version: "v1".into(),
            ..headers::Baggage::default()
        }
        .encode();
        loop {
            let (tcp, client) = listener.accept().await.unwrap();
            tcp.set_nodelay(true).unwrap();
            let (pool, key, baggage) = (pool.clone(), key.clone(), baggage.clone());
            tokio::spawn(async move {
                let request = ConnectRequest {
                    authority: HboneAuthority::Addr(peer),
                    baggage,
                    forwarded: headers::forwarded(client, None),
                    traceparent: headers::random_traceparent(),
                    extra: Vec::new(),
                };
                let (stream, _) = Box::pin(pool.open(&key, &request)).await.unwrap();
                relay(tcp, stream, (), std::future::pending(), Timeouts::default()).await;
            });
        }
    })
}

fn passthrough(service: SocketAddr) -> Agent {
    Agent::start(move |listener| async move {
        loop {
            let (near, _) = listener.accept().await.unwrap();
            near.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                let far = TcpStream::connect(service).await.unwrap();
                far.set_nodelay(true).unwrap();
                relay_tcp(near, far, (), std::future::pending(), Timeouts::default()).await;
            });
        }
    })
}

/// This program in another process, so that the applications' memory is not counted. Returns when it said a line.
fn child(args: &[&str]) -> Child {
    let mut process = std::process::Command::new(std::env::current_exe().unwrap())
        .args(args)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut said).unwrap();
    Child { process, said }
}

struct Child {
    process: std::process::Child,
    said: String,
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The roles of [`child`]; `false` when this is the main process.
fn play() -> bool {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["service"] => println!("{}", service()),
        ["hold", target, count] => {
            let target: SocketAddr = target.parse().unwrap();
            let held: Vec<StdStream> = (0..count.parse().unwrap())
                .map(|_| {
                    let mut socket = connect(target, b'e');
                    socket.write_all(&[1]).unwrap();
                    socket.read_exact(&mut [0]).unwrap();
                    socket
                })
                .collect();
            println!("{}", held.len());
            let _ = std::io::stdin().read(&mut [0]);
        }
        _ => return false,
    }
    let _ = std::io::stdin().read(&mut [0]);
    true
}

/// First byte of a connection says what the service does: `e` echo, `s` sink, `g` give.
fn service() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            thread::Builder::new().stack_size(64 << 10).spawn(move || serve_one(socket.unwrap())).unwrap();
        }
    });
    address
}

fn serve_one(mut socket: StdStream) {
    socket.set_nodelay(true).unwrap();
    let mut mode = [0];
    if socket.read_exact(&mut mode).is_err() {
        return;
    }
    let mut buf = vec![0; if mode[0] == b'e' { 4096 } else { 256 << 10 }];
    match mode[0] {
        b'g' => while socket.write(&buf).is_ok() {},
        mode => {
            while let Ok(n) = socket.read(&mut buf) {
                if n == 0 || (mode == b'e' && socket.write_all(&buf[..n]).is_err()) {
                    break;
                }
            }
        }
    }
}

fn connect(address: SocketAddr, mode: u8) -> StdStream {
    let mut socket = StdStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.write_all(&[mode]).unwrap();
    socket
}

fn bulk(address: SocketAddr, up: bool, streams: usize, gigabytes: f64) {
    let each = (gigabytes * 1e9) as usize / streams;
    thread::scope(|scope| {
        for _ in 0..streams {
            scope.spawn(move || {
                let mut socket = connect(address, if up { b's' } else { b'g' });
                let mut buf = vec![0; 256 << 10];
                let mut left = each;
                while left > 0 {
                    let part = left.min(buf.len());
                    left -= if up { socket.write(&buf[..part]).unwrap() } else { socket.read(&mut buf[..part]).unwrap() };
                }
                if up {
                    socket.shutdown(Shutdown::Write).unwrap();
                    let _ = socket.read(&mut buf);
                }
            });
        }
    });
}

fn ping(address: SocketAddr, connections: usize, total: usize) {
    thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(move || {
                let mut socket = connect(address, b'e');
                let mut buf = [7; 64];
                for _ in 0..total / connections {
                    socket.write_all(&buf).unwrap();
                    socket.read_exact(&mut buf).unwrap();
                }
            });
        }
    });
}

fn churn(address: SocketAddr, connections: usize, total: usize) {
    thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(move || {
                for _ in 0..total / connections {
                    let mut socket = connect(address, b'e');
                    let mut buf = [7; 64];
                    socket.write_all(&buf).unwrap();
                    socket.read_exact(&mut buf).unwrap();
                }
            });
        }
    });
}

fn rss() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

fn measure(name: &str, unit: &str, units: f64, agents: &[&Agent], work: impl FnOnce()) {
    let before: Vec<f64> = agents.iter().map(|agent| agent.cpu()).collect();
    let started = Instant::now();
    work();
    let wall = started.elapsed().as_secs_f64();
    let each: Vec<f64> = agents.iter().zip(before).map(|(agent, before)| (agent.cpu() - before) / units).collect();
    let parts: Vec<String> = each.iter().map(|cpu| format!("{cpu:.2}")).collect();
    let both: f64 = each.iter().sum();
    println!("{name:<22} {:>9.2} {unit}/s   CPU s/{unit}: {both:.2} ({})", units / wall, parts.join(" + "));
}

fn main() {
    if play() {
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let want = |name: &str| wanted.is_empty() || wanted.iter().any(|arg| arg == name);
    let settings = Arc::new(Settings::default());
    let echo = child(&["service"]);
    let service: SocketAddr = echo.said.trim().parse().unwrap();
    let far = inbound(service, Arc::clone(&settings));
    let near = outbound(far.address, settings);
    let agents = [&near, &far];
    let target = near.address;
    bulk(target, true, 1, 0.1);
    if want("up") {
        measure("upload 1", "GB", 4.0, &agents, || bulk(target, true, 1, 4.0));
        measure("upload 8", "GB", 4.0, &agents, || bulk(target, true, 8, 4.0));
    }
    if want("down") {
        measure("download 1", "GB", 4.0, &agents, || bulk(target, false, 1, 4.0));
    }
    if want("ping") {
        measure("ping 1", "100k", 0.3, &agents, || ping(target, 1, 30_000));
        measure("ping 16", "100k", 2.0, &agents, || ping(target, 16, 200_000));
        measure("ping 64", "100k", 2.0, &agents, || ping(target, 64, 200_000));
    }
    if want("connect") {
        measure("connect+ping+close 16", "100k", 0.08, &agents, || churn(target, 16, 8_000));
    }
    if want("plain") {
        let agent = passthrough(service);
        let target = agent.address;
        measure("plain TCP upload 1", "GB", 4.0, &[&agent], || bulk(target, true, 1, 4.0));
        measure("plain TCP ping 16", "100k", 2.0, &[&agent], || ping(target, 16, 200_000));
        agent.stop();
    }
    if want("idle") {
        let before = rss();
        let count = 5000;
        let child = child(&["hold", &target.to_string(), &count.to_string()]);
        let grown = rss() - before;
        println!("{count} idle connections: {:.2} KiB RSS per connection and side", grown as f64 / 2048.0 / f64::from(count));
        drop(child);
    }
    near.stop();
    far.stop();
}
