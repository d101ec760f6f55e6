//! What a peer that does not read costs the proxy: a client that leaves a large answer lying, an endpoint that leaves a large
//! upload lying, over each version of HTTP, plain and through tunnels.
//!
//! Counted in the kernel, socket by socket, as bytes the process read and did not write on: exact, and apart from the kernel's own
//! buffers and from what other proxies on the way hold.
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http::{Request, Response};
use mesh_tests::topology::Place;
use mesh_tests::wait;
use tokio::runtime::{Builder, Runtime};

use crate::mesh::{Mesh, RUDE, RUDE_PORT};

/// What one of them may cost.
const MOST: i64 = 256 << 10;
/// Peers at a time.
const PEERS: usize = 4;
/// More than all buffers on the way hold.
const LARGE: u64 = 1 << 30;
const PIECE: usize = 16 << 10;
/// Of the plain way: host name, and port of the endpoint outside the mesh.
const PLAIN: &str = "stalled.example";
const PLAIN_PORT: u16 = 7079;

const OUTSIDE: &str = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: stalled, namespace: t }
spec:
  hosts: [ stalled.example ]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [ { number: 80, name: http, protocol: HTTP, targetPort: 7079 } ]
  endpoints: [ { address: ADDRESS } ]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: stalled, namespace: t }
spec:
  parentRefs: [ { name: gw } ]
  hostnames: [ stalled.example ]
  rules:
  - backendRefs: [ { group: networking.istio.io, kind: Hostname, name: stalled.example, port: 80 } ]
";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Http1,
    Http2,
}
use Version::{Http1, Http2};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stalled {
    /// A client with a large answer.
    Reader,
    /// An endpoint with a large upload.
    Endpoint,
}

/// Where it happens: the proxy, what clients connect to and from where, and the host they ask for.
struct Way<'a> {
    proxy: &'a Place,
    client: Arc<Place>,
    to: SocketAddr,
    host: &'static str,
    endpoint: (Arc<Place>, u16),
    /// Service a DestinationRule is for.
    destination: &'static str,
}

pub(crate) fn a_peer_that_does_not_read_costs_little(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh: &Mesh = mesh;
    let outside = Arc::clone(mesh.topology.host("outside"));
    let _entry = mesh.objects("stalled", &OUTSIDE.replace("ADDRESS", &outside.v4.to_string()))?;
    let tunnels = Way {
        proxy: mesh.pod("wp"),
        client: Arc::clone(mesh.pod("client")),
        to: SocketAddr::new(RUDE.parse()?, 80),
        host: RUDE,
        endpoint: (Arc::clone(mesh.pod("web1")), RUDE_PORT),
        destination: "rude.t.svc.cluster.local",
    };
    let plain = Way {
        proxy: mesh.pod("gw"),
        client: Arc::clone(&outside),
        to: mesh.pod("gw").at(80),
        host: PLAIN,
        endpoint: (outside, PLAIN_PORT),
        destination: PLAIN,
    };
    let mut seen = Vec::new();
    for (name, way) in [("tunnels", &tunnels), ("plain", &plain)] {
        for upstream in [Http1, Http2] {
            let endpoint = Endpoint::start(&way.endpoint.0, way.endpoint.1, upstream)?;
            let policy = if upstream == Http2 { "UPGRADE" } else { "DO_NOT_UPGRADE" };
            let rule = format!(
                "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: stalled, namespace: t }}\nspec:\n  host: {}\n  trafficPolicy: {{ connectionPool: {{ http: {{ h2UpgradePolicy: {policy} }} }} }}\n",
                way.destination
            );
            let _rule = mesh.objects("stalled-version", &rule)?;
            for downstream in [Http1, Http2] {
                for what in [Stalled::Reader, Stalled::Endpoint] {
                    let held = cost(way, &endpoint, downstream, what)
                        .with_context(|| format!("{name} {downstream:?} {upstream:?} {what:?}"))?;
                    seen.push((format!("{name}, client {downstream:?}, endpoint {upstream:?}, stalled {what:?}"), held));
                }
            }
        }
    }
    let lines: Vec<String> = seen.iter().map(|(what, held)| format!("{what}: {} KiB\n", held >> 10)).collect();
    let table = lines.concat();
    eprint!("{table}");
    // Each really was stalled with something held: nothing at all would mean that nothing was measured.
    ensure!(seen.iter().all(|(_, held)| (1..=MOST).contains(held)), "{table}");
    Ok(())
}

/// What one stalled peer costs the proxy, in bytes.
fn cost(way: &Way<'_>, endpoint: &Endpoint, version: Version, what: Stalled) -> anyhow::Result<i64> {
    // Tunnels and their handshakes come before.
    drop(Client::start(way, version, "/small", None)?);
    let before = sockets(way.proxy)?;
    let arrived = endpoint.arrived();
    let upload = (what == Stalled::Endpoint).then_some(LARGE);
    let path = if upload.is_some() { "/up" } else { "/down" };
    let clients = (0..PEERS).map(|_| Client::start(way, version, path, upload)).collect::<Result<Vec<_>, _>>()?;
    wait::until_true("all requests at the endpoint", || endpoint.arrived() >= arrived + PEERS)?;
    let held = settled(way.proxy, &before)?;
    drop(clients);
    Ok(held / PEERS as i64)
}

/// Bytes read and not written on, once no more come.
fn settled(proxy: &Place, before: &Sockets) -> anyhow::Result<i64> {
    let (mut last, mut same) = (None, 0);
    for _ in 0..150 {
        thread::sleep(Duration::from_millis(100));
        let now = sockets(proxy)?;
        let of = |which: fn(&Moved) -> i64| -> i64 {
            now.iter().map(|(key, moved)| which(moved) - before.get(key).map_or(0, which)).sum()
        };
        let (read, written) = (of(|m| m.read), of(|m| m.written));
        same = if last == Some((read, written)) { same + 1 } else { 0 };
        last = Some((read, written));
        if same == 8 && read > 0 {
            return Ok(read - written);
        }
    }
    anyhow::bail!("it never came to rest: {last:?}")
}

/// What a process took from one socket, and gave to it.
struct Moved {
    read: i64,
    written: i64,
}
type Sockets = BTreeMap<(String, String), Moved>;

/// The connections of a pod to other machines, as the kernel counts them.
fn sockets(place: &Place) -> anyhow::Result<Sockets> {
    let output = place.netns.output(Command::new("ss").args(["-tinHO", "state", "established"])).context("run ss")?;
    ensure!(output.status.success(), "ss: {}", String::from_utf8_lossy(&output.stderr));
    let mut all = Sockets::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[unread, unacknowledged, local, peer, ..] = &words[..] else { anyhow::bail!("a line of ss: {line}") };
        if local.contains("127.0.0.1") {
            continue;
        }
        let count = |name: &str| words.iter().find_map(|word| word.strip_prefix(name)).map_or(Ok(0), str::parse::<i64>);
        let read = count("bytes_received:")? - unread.parse::<i64>()?;
        let written = count("bytes_acked:")? + unacknowledged.parse::<i64>()?;
        all.insert((local.to_owned(), peer.to_owned()), Moved { read, written });
    }
    Ok(all)
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

/// `/down` answers without end, `/up` reads nothing of its request's body, anything else is answered with nothing.
struct Endpoint {
    arrived: Arc<AtomicUsize>,
    /// Its tasks end with it.
    _runtime: Runtime,
}
impl Endpoint {
    fn start(place: &Arc<Place>, port: u16, version: Version) -> anyhow::Result<Self> {
        let listener = place.listen(port)?;
        listener.set_nonblocking(true)?;
        let (arrived, runtime) = (Arc::<AtomicUsize>::default(), runtime()?);
        let count = Arc::clone(&arrived);
        runtime.spawn(async move {
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
            while let Ok((stream, _)) = listener.accept().await {
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    let _client_went = match version {
                        Http1 => serve_http1(stream, &count).await,
                        Http2 => serve_http2(stream, &count).await,
                    };
                });
            }
        });
        Ok(Self { arrived, _runtime: runtime })
    }
    fn arrived(&self) -> usize {
        self.arrived.load(Ordering::Relaxed)
    }
}

async fn serve_http1(mut stream: tokio::net::TcpStream, arrived: &AtomicUsize) -> anyhow::Result<()> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head);
        if head.contains(" /small ") {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
            continue;
        }
        arrived.fetch_add(1, Ordering::Relaxed);
        if head.contains(" /down ") {
            stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {LARGE}\r\n\r\n").as_bytes()).await?;
            loop {
                stream.write_all(&[b'x'; PIECE]).await?;
            }
        }
        std::future::pending::<()>().await;
    }
}

async fn serve_http2(stream: tokio::net::TcpStream, arrived: &Arc<AtomicUsize>) -> anyhow::Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        let arrived = Arc::clone(arrived);
        tokio::spawn(async move {
            match request.uri().path() {
                "/small" => drop(respond.send_response(Response::new(()), true)),
                "/down" => {
                    arrived.fetch_add(1, Ordering::Relaxed);
                    if let Ok(send) = respond.send_response(Response::new(()), false) {
                        pour(send, LARGE).await;
                    }
                }
                _ => {
                    arrived.fetch_add(1, Ordering::Relaxed);
                    let _unread = request;
                    std::future::pending::<()>().await;
                }
            }
        });
    }
    Ok(())
}

/// Sends as the window allows, until the other side resets the stream.
async fn pour(mut send: h2::SendStream<Bytes>, mut rest: u64) {
    while rest > 0 {
        send.reserve_capacity(PIECE);
        let Some(Ok(room)) = std::future::poll_fn(|cx| send.poll_capacity(cx)).await else { return };
        let size = room.min(PIECE);
        rest = rest.saturating_sub(size as u64);
        if send.send_data(Bytes::from(vec![b'x'; size]), false).is_err() {
            return;
        }
    }
}

/// A connection with one request. Reads the head of its answer where there is one at once, and no more.
enum Client {
    Http1(TcpStream),
    Http2(#[expect(dead_code, reason = "its tasks end with it")] Runtime),
}
impl Client {
    fn start(way: &Way<'_>, version: Version, path: &str, upload: Option<u64>) -> anyhow::Result<Self> {
        let stream = way.client.netns.connect(way.to, Duration::from_secs(10))?;
        let method = if upload.is_some() { "POST" } else { "GET" };
        match version {
            Http1 => Self::http1(stream, &format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", way.host), path, upload),
            Http2 => {
                Self::http2(stream, Request::builder().method(method).uri(format!("http://{}{path}", way.host)).body(())?, upload)
            }
        }
    }

    fn http1(mut stream: TcpStream, head: &str, path: &str, upload: Option<u64>) -> anyhow::Result<Self> {
        let length = upload.map(|length| format!("content-length: {length}\r\n")).unwrap_or_default();
        stream.write_all(format!("{head}{length}\r\n").as_bytes())?;
        if path == "/small" {
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            ensure!(stream.read(&mut [0; 1024])? > 0, "no answer");
        }
        if let Some(mut rest) = upload {
            let mut stream = stream.try_clone()?;
            // Ends when the connection does.
            thread::spawn(move || {
                while rest > 0 && stream.write_all(&[b'x'; PIECE]).is_ok() {
                    rest = rest.saturating_sub(PIECE as u64);
                }
            });
        }
        Ok(Self::Http1(stream))
    }

    fn http2(stream: TcpStream, request: Request<()>, upload: Option<u64>) -> anyhow::Result<Self> {
        let (runtime, small) = (runtime()?, request.uri().path() == "/small");
        stream.set_nonblocking(true)?;
        runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let (requests, connection) = h2::client::handshake(stream).await?;
            tokio::spawn(connection);
            let mut requests = requests.ready().await?;
            let (answer, send) = requests.send_request(request, upload.is_none())?;
            if small {
                ensure!(answer.await?.status() == 200, "no answer");
                return Ok(());
            }
            tokio::spawn(async move {
                if let Some(length) = upload {
                    pour(send, length).await;
                }
                let _unread = answer.await;
                let _open = requests;
                std::future::pending::<()>().await;
            });
            Ok(())
        })?;
        Ok(Self::Http2(runtime))
    }
}
impl Drop for Client {
    fn drop(&mut self) {
        if let Self::Http1(stream) = self {
            let _gone_already = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
