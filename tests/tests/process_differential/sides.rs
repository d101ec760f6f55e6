//! The two sides as a client meets them: where to connect, and one request with its answer.
use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Version};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::hbone::{Tunnel, client_tls};
use mesh_tests::http1::{Answer, End, Reader};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use crate::backend::{Backend, pairs};
use crate::case::{Case, Order, Req, Wire};
use crate::compare::Observed;

/// No request may take longer.
const LIMIT: Duration = Duration::from_secs(30);
/// How long copies may take to arrive.
const ARRIVE: Duration = Duration::from_secs(20);

/// What both connections are.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}
type Connection = Pin<Box<dyn Io>>;

/// One proxy.
#[derive(Clone)]
pub enum Side {
    /// The waypoint: through a tunnel, to the service's own address.
    Culvert(Arc<Tunnels>),
    /// Envoy: a listener per service.
    Envoy(u16),
}

/// Tunnels of several clients; each proves who it is.
pub struct Tunnels {
    waypoint: SocketAddr,
    ca: TestCa,
    open: Mutex<HashMap<String, Tunnel>>,
}
impl Tunnels {
    /// None yet.
    pub fn new(waypoint: SocketAddr, ca: TestCa) -> Self {
        Self { waypoint, ca, open: Mutex::default() }
    }
    async fn of(&self, whom: &str) -> anyhow::Result<Tunnel> {
        let mut open = self.open.lock().await;
        if let Some(tunnel) = open.get(whom) {
            return Ok(tunnel.clone());
        }
        let tunnel = Tunnel::connect(self.waypoint, &client_tls(&self.ca.issue(whom)?)?).await?;
        open.insert(whom.to_owned(), tunnel.clone());
        Ok(tunnel)
    }
}

impl Side {
    async fn connect(&self, vip: SocketAddr, whom: &str) -> anyhow::Result<Connection> {
        match self {
            Self::Culvert(tunnels) => Ok(Box::pin(tunnels.of(whom).await?.open(&vip.to_string()).await?)),
            Self::Envoy(port) => {
                let stream = TcpStream::connect((vip.ip(), *port)).await?;
                stream.set_nodelay(true)?;
                Ok(Box::pin(stream))
            }
        }
    }

    fn letter(&self) -> char {
        match self {
            Self::Culvert(_) => 'c',
            Self::Envoy(_) => 'e',
        }
    }

    /// Sends the requests of a case and gathers what came of them, all but the log.
    pub async fn run(&self, case: &Case, (at, vip, host): (usize, SocketAddr, &str), backend: &Backend) -> Vec<Observed> {
        // A version 4 UUID that says where it is from.
        let id = |n: usize| format!("{:08x}-{:04x}-4000-8000-{:012x}", at, n, u32::from(self.letter()));
        let mut all = match case.order {
            Order::InTurn => {
                let mut all = Vec::new();
                for (n, request) in case.requests.iter().enumerate() {
                    all.push(self.one(vip, host, request, id(n), backend).await);
                }
                all
            }
            Order::AtOnce => {
                join_all(case.requests.iter().enumerate().map(|(n, request)| self.one(vip, host, request, id(n), backend))).await
            }
            Order::OneConnection => self.on_one_connection(vip, host, &case.requests, id).await,
        };
        let mut arrivals = || {
            all.iter_mut()
                .map(|one| {
                    one.seen = backend.seen(&one.id);
                    one.seen.len()
                })
                .sum::<usize>()
        };
        if let Some(wanted) = case.arrivals {
            let _never_came = timeout(ARRIVE, async {
                while arrivals() < wanted {
                    sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
            // One too many would come now.
            sleep(Duration::from_millis(60)).await;
        }
        arrivals();
        all
    }

    async fn one(&self, vip: SocketAddr, host: &str, request: &Req, id: String, backend: &Backend) -> Observed {
        sleep(Duration::from_millis(request.pause)).await;
        let work = async {
            let io = self.connect(vip, request.whom()).await?;
            match request.wire {
                Wire::Http1 => {
                    let mut reader = Reader::new(io);
                    let done = http1(&mut reader, host, request, &id).await;
                    let _gone_already = reader.stream().shutdown().await;
                    done
                }
                Wire::Http2 => http2(io, host, request, &id).await.map(|answer| (answer, None)),
            }
        };
        // Who gives up does so once an endpoint has the request, however long it took to get there.
        let patience = async {
            let Some(after) = request.give_up else { return sleep(LIMIT).await };
            let arrival = async {
                while backend.seen(&id).is_empty() {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            let _never_came = timeout(LIMIT, arrival).await;
            sleep(Duration::from_millis(after)).await;
        };
        let done = tokio::select! {
            done = work => done,
            () = patience => Err(anyhow::anyhow!("no answer in time")),
        };
        observed(done, id, request.anonymous)
    }

    async fn on_one_connection(
        &self,
        vip: SocketAddr,
        host: &str,
        requests: &[Req],
        id: impl Fn(usize) -> String,
    ) -> Vec<Observed> {
        let mut all = Vec::new();
        let mut reader = None;
        for (n, request) in requests.iter().enumerate() {
            sleep(Duration::from_millis(request.pause)).await;
            let work = async {
                if reader.is_none() {
                    ensure!(n == 0, "the connection was closed before");
                    reader = Some(Reader::new(self.connect(vip, request.whom()).await?));
                }
                let reader = reader.as_mut().context("a connection")?;
                http1(reader, host, request, &id(n)).await
            };
            let done = timeout(LIMIT, work).await.unwrap_or_else(|_| bail!("no answer within {LIMIT:?}"));
            all.push(observed(done, id(n), request.anonymous));
        }
        all
    }
}

fn observed(done: anyhow::Result<(Answer, Option<String>)>, id: String, anonymous: bool) -> Observed {
    let (answer, echoed) = match done {
        Ok((answer, echoed)) => (Ok(answer), echoed),
        Err(why) => (Err(format!("{why:#}")), None),
    };
    Observed { answer, echoed, seen: Vec::new(), logged: None, id, anonymous }
}

/// The request as it is on the wire.
fn http1_bytes(host: &str, request: &Req, id: &str) -> Vec<u8> {
    if let Some(raw) = &request.raw {
        return raw.replace("$ID", id).replace("$HOST", host).into_bytes();
    }
    let mut head =
        format!("{} {} HTTP/1.1\r\nhost: {}\r\n", request.method, request.target, request.host.as_deref().unwrap_or(host));
    head += &format!("{}: {id}\r\n", if request.anonymous { "x-case" } else { "x-request-id" });
    for (name, value) in &request.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if request.chunked {
        let mut bytes = format!("{head}transfer-encoding: chunked\r\n\r\n{:x}\r\n", request.body.len()).into_bytes();
        bytes.extend(&request.body);
        bytes.extend(b"\r\n0\r\n\r\n");
        return bytes;
    }
    if !request.body.is_empty() {
        head += &format!("content-length: {}\r\n", request.body.len());
    }
    let mut bytes = format!("{head}\r\n").into_bytes();
    bytes.extend(&request.body);
    bytes
}

async fn http1(reader: &mut Reader<Connection>, host: &str, request: &Req, id: &str) -> anyhow::Result<(Answer, Option<String>)> {
    let bytes = http1_bytes(host, request, id);
    // The answer may come before all was taken.
    let sent = reader.stream().write_all(&bytes).await;
    let answer = reader.answer(request.method).await;
    let answer = match (answer, sent) {
        (Ok(answer), _) => answer,
        (Err(error), Err(sending)) => return Err(error.context(format!("after sending failed: {sending}"))),
        (Err(error), Ok(())) => return Err(error),
    };
    let mut echoed = None;
    if let Some(message) = request.after_upgrade.filter(|_| answer.status == 101) {
        let stream = reader.stream();
        stream.write_all(message.as_bytes()).await?;
        let mut back = vec![0; message.len()];
        stream.read_exact(&mut back).await?;
        echoed = Some(String::from_utf8_lossy(&back).into_owned());
        // Ended in order: said, and waited for the other's end.
        stream.shutdown().await?;
        let _ended = stream.read(&mut [0]).await;
    }
    Ok((answer, echoed))
}

async fn http2(io: Connection, host: &str, request: &Req, id: &str) -> anyhow::Result<Answer> {
    let (requests, connection) = h2::client::Builder::new().handshake::<_, Bytes>(io).await?;
    let driver = tokio::spawn(async move {
        let _ended = connection.await;
    });
    let mut requests = requests.ready().await?;
    let uri = format!("http://{}{}", request.host.as_deref().unwrap_or(host), request.target);
    let mut head = Request::builder().method(request.method).uri(uri).version(Version::HTTP_2);
    head = head.header(if request.anonymous { "x-case" } else { "x-request-id" }, id);
    for (name, value) in &request.headers {
        head = head.header(name, value);
    }
    let mut head = head.body(())?;
    if let Some(protocol) = request.connects {
        // Only who was told that it can be asked may ask.
        while !requests.is_extended_connect_protocol_enabled() {
            sleep(Duration::from_millis(2)).await;
        }
        head.extensions_mut().insert(h2::ext::Protocol::from(protocol));
    }
    let ends = request.body.is_empty() && request.connects.is_none();
    let (response, mut send) = requests.send_request(head, ends)?;
    if !request.body.is_empty() {
        // The window is larger than any body here.
        let _reset_before = send.send_data(Bytes::from(request.body.clone()), true);
    }
    let (parts, mut recv) = response.await?.into_parts();
    let mut answer = Answer {
        version: "HTTP/2".into(),
        status: parts.status.as_u16(),
        headers: pairs(&parts.headers),
        body: Vec::new(),
        trailers: Vec::new(),
        end: End::Kept,
    };
    while let Some(data) = recv.data().await {
        match data {
            Ok(data) => {
                recv.flow_control().release_capacity(data.len())?;
                answer.body.extend(data);
            }
            Err(_reset) => {
                answer.end = End::Broken;
                break;
            }
        }
    }
    if answer.end == End::Kept
        && let Some(trailers) = recv.trailers().await?
    {
        answer.trailers = pairs(&trailers);
    }
    drop(requests);
    driver.abort();
    Ok(answer)
}
