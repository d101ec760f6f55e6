//! The bytes under a connection to an endpoint: a tunnel to its node agent or plain TCP, then the PROXY protocol header, then
//! TLS, within the destination's connect timeout.
//!
//! Owns the tunnels (one pool per data thread, shared by all clusters), name look-ups and TLS configurations. Refuses to
//! reach an HBONE endpoint in plain, or any peer but the one the mesh names.
use super::Deps;
use super::cluster::Cluster;
use super::error::{Failure, UpstreamError};
use super::host::{Host, Lead};
use super::names::Names;
use super::pool::ShelfKey;
use super::proxy_protocol;
use super::state::ConnectionGuard;
use super::tls::TlsCache;
use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use mesh_hbone::headers::{self, Baggage};
use mesh_hbone::{ConnectRequest, Dialer, HboneError, HboneIo, HboneStream, Pool, PoolKey, Tunnel};
use mesh_identity::live::{Held, LivePeers};
use mesh_identity::tls::ClientStream;
use mesh_identity::{SvidHandle, TrustBundles};
use mesh_model::l7::destination::{PoolLimits, TcpKeepalive};
use mesh_model::plan::HBONE_PORT;
use mesh_model::telemetry::context::TraceParent;
use mesh_model::workload::Workload;
use mesh_model::{HboneAuthority, Reason, SpiffeId};
use mesh_runtime::metrics::Histogram;
use mesh_runtime::resolve::{self, Resolver};
use mesh_runtime::sockets::{ConnectOptions, Keepalive, StreamOptions, connect};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

/// Tells a gateway or agent what kind of proxy opened the stream (spec/waypoint §1.9).
const ISTIO_SOURCE: HeaderName = HeaderName::from_static("x-istio-source");
/// The service's waypoint was passed, or is not to be.
const WAYPOINT: &str = "waypoint";
/// It was not.
const GATEWAY: &str = "gateway";

/// Reaches endpoints.
#[derive(Debug)]
pub(super) struct Reach {
    identity: SpiffeId,
    dialer: AgentDialer,
    pools: Box<[Pool<AgentDialer>]>,
    peers: Arc<LivePeers>,
    pub resolver: Resolver,
    /// Names whose addresses are endpoints.
    pub names: Names,
    tls: TlsCache,
    /// `baggage` that describes us, sent with every CONNECT.
    baggage: ArcSwapOption<HeaderValue>,
}
impl Reach {
    pub fn new(deps: Deps) -> Self {
        let peers = Arc::default();
        let dialer = AgentDialer {
            svid: deps.svid,
            peers: Arc::clone(&peers),
            connect_timeout: deps.connect_timeout,
            handshake_timeout: deps.handshake_timeout,
            connects: deps.connects,
        };
        let pools = (0..deps.threads.max(1)).map(|_| Pool::new(dialer.clone(), Arc::clone(&deps.hbone))).collect();
        Self {
            identity: deps.identity,
            dialer,
            pools,
            peers,
            resolver: Resolver::default(),
            names: Names::default(),
            tls: TlsCache::default(),
            baggage: ArcSwapOption::empty(),
        }
    }
    /// As a client of which namespace we ask.
    pub fn namespace(&self) -> &str {
        self.identity.namespace()
    }
    pub fn threads(&self) -> usize {
        self.pools.len()
    }
    /// Where it is noted how long TCP connects take.
    pub fn connects(&self) -> &Arc<Histogram> {
        &self.dialer.connects
    }
    /// We are this workload, as the newest version of the mesh has it.
    pub fn describe(&self, me: Option<&Arc<Workload>>) {
        self.baggage.store(me.and_then(|me| Baggage::of(me).encode()).map(Arc::new));
    }
    /// Ends the tunnels to peers that `bundles` no longer trusts; how many.
    pub fn rejudge(&self, bundles: &TrustBundles) -> usize {
        self.peers.rejudge(bundles)
    }
    pub fn tunnels(&self) -> Vec<mesh_hbone::pool::PoolStats> {
        self.pools.iter().map(Pool::stats).collect()
    }
}

/// Dials node agents.
#[derive(Clone, Debug)]
struct AgentDialer {
    svid: SvidHandle,
    peers: Arc<LivePeers>,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    connects: Arc<Histogram>,
}
impl Dialer for AgentDialer {
    type Io = Held<ClientStream<TcpStream>>;

    async fn dial(&self, key: &PoolKey) -> Result<Self::Io, HboneError> {
        let options = ConnectOptions { timeout: self.connect_timeout, ..ConnectOptions::default() };
        let tcp = self.connects.time(connect(key.dial(), &options)).await.map_err(|e| {
            let reason = if e.kind() == io::ErrorKind::TimedOut { Reason::ConnectTimeout } else { Reason::ConnectFailed };
            HboneError::new(reason, connect_detail(&e))
        })?;
        Ok(self.secure(tcp, key.expect()).await?.0)
    }
}
impl AgentDialer {
    async fn secure<IO>(&self, io: IO, expect: &[SpiffeId]) -> Result<(Held<ClientStream<IO>>, SpiffeId), HboneError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        Ok(self.peers.connect(&self.svid, io, expect, self.handshake_timeout).await?)
    }
}

/// The tunnels a connection is in: one to an endpoint's agent; two, the inner one first, to another network; or none.
#[derive(Clone, Debug, Default)]
pub(super) struct Tunnels([Option<Tunnel>; 2]);
impl Tunnels {
    /// Whether a peer said that it will go (GOAWAY): what is in its tunnel ends well, and nothing is begun there that the peer's
    /// deadline would cut.
    pub fn are_leaving(&self) -> bool {
        self.0.iter().flatten().any(|tunnel| !tunnel.is_open())
    }
}

/// What a connection is for: decides what its endpoint's agent is told of the client.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// Requests of many clients: no client is named, it would be the wrong one from the second request on.
    Pooled,
    /// One request of one client, which may be upgraded.
    Single(Option<SocketAddr>),
    /// A raw connection of one client.
    Stream(Option<SocketAddr>),
}

/// A raw byte stream to an endpoint, with the guard of its place among the destination's connections.
#[derive(Debug)]
pub enum Stream {
    /// Through a tunnel; for the relay.
    Hbone(HboneStream, ConnectionGuard),
    /// Plain TCP; for the relay.
    Tcp(TcpStream, ConnectionGuard),
    /// TLS that we originate.
    Tls(Box<TlsIo>, ConnectionGuard),
}
impl Stream {
    /// The stream as [`AsyncRead`] and [`AsyncWrite`].
    pub fn into_io(self) -> Io {
        match self {
            Self::Hbone(stream, guard) => Io::new(Raw::Bare(Bare::Hbone(stream.into_io())), guard),
            Self::Tcp(stream, guard) => Io::new(Raw::Bare(Bare::Tcp(stream)), guard),
            Self::Tls(stream, guard) => Io::new(Raw::Tls(stream), guard),
        }
    }
}

/// TLS to an endpoint, through a tunnel or not.
pub type TlsIo = TlsStream<Bare>;

/// A byte stream without TLS of its own.
#[derive(Debug)]
pub enum Bare {
    /// Through a tunnel.
    Hbone(HboneIo),
    /// TCP.
    Tcp(TcpStream),
}
#[derive(Debug)]
enum Raw {
    Bare(Bare),
    Tls(Box<TlsIo>),
}
/// A connection's bytes; counts as a connection until it is dropped.
#[derive(Debug)]
pub struct Io {
    /// With a limit that is set anew for each read.
    raw: Take<Raw>,
    _guard: ConnectionGuard,
}
impl Io {
    fn new(raw: Raw, guard: ConnectionGuard) -> Self {
        Self { raw: raw.take(0), _guard: guard }
    }
}
/// Most bytes of one read. hyper doubles its buffers as long as reads fill them, and a response whose client does not read
/// keeps several of them: with this they stay at 16 KiB.
const READ: u64 = (16 << 10) - 1;

/// A connection for HTTP, with the tunnel it is in. `trace`: the span for which it is made, if that is told of.
pub(super) async fn dial(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    key: &ShelfKey<'_>,
    purpose: Purpose,
    trace: Option<TraceParent>,
    guard: ConnectionGuard,
) -> Result<(Io, Tunnels), UpstreamError> {
    let (stream, tunnel) = open(cluster, host, key, purpose, trace, guard).await?;
    Ok((stream.into_io(), tunnel))
}

/// The same, raw.
pub(super) async fn open(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    key: &ShelfKey<'_>,
    purpose: Purpose,
    trace: Option<TraceParent>,
    guard: ConnectionGuard,
) -> Result<(Stream, Tunnels), UpstreamError> {
    let pool = &cluster.state.policy.load_full().pool;
    match timeout(pool.connect_timeout, layers(cluster, host, key, purpose, trace, guard, pool)).await {
        Ok(result) => result,
        Err(_) => Err(UpstreamError::new(Failure::ConnectTimeout, "connection timeout")),
    }
}

async fn layers(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    key: &ShelfKey<'_>,
    purpose: Purpose,
    trace: Option<TraceParent>,
    guard: ConnectionGuard,
    pool: &PoolLimits,
) -> Result<(Stream, Tunnels), UpstreamError> {
    let reach = &cluster.state.reach;
    let client = match purpose {
        Purpose::Pooled => key.client,
        Purpose::Single(client) | Purpose::Stream(client) => client,
    };
    let to = resolve(reach, host, client).await?;
    // Before anything is dialled: a TLS policy that cannot be kept costs no connection.
    let tls = match key.tls {
        None => None,
        Some(tls) => {
            let alpn = if matches!(purpose, Purpose::Stream(_)) { None } else { Some(key.http2) };
            Some(reach.tls.client(tls, alpn, key.sni).await?)
        }
    };
    let header = key.proxy.map(|version| proxy_protocol::header(version, client, to));
    if host.target.hbone {
        let (mut stream, tunnels) = tunnel(reach, cluster, host, to, client, trace).await?;
        if let Some(header) = header {
            write(&mut stream, header).await?;
        }
        let stream = match tls {
            None => Stream::Hbone(stream, guard),
            Some((config, name)) => handshake(config, name, Bare::Hbone(stream.into_io()), guard).await?,
        };
        return Ok((stream, tunnels));
    }
    let mut stream = tcp(to, pool.keepalive, pool.connect_timeout, reach.connects()).await?;
    if let Some(header) = header {
        stream.write_all(&header).await.map_err(|e| UpstreamError::new(Failure::Connect, connect_detail(&e)))?;
    }
    let stream = match tls {
        None => Stream::Tcp(stream, guard),
        Some((config, name)) => handshake(config, name, Bare::Tcp(stream), guard).await?,
    };
    Ok((stream, Tunnels::default()))
}

/// Where the endpoint is now.
async fn resolve(reach: &Reach, host: &Host, client: Option<SocketAddr>) -> Result<SocketAddr, UpstreamError> {
    let Some(name) = &host.target.name else { return Ok(host.target.addr) };
    // A name without addresses is a destination without endpoints, as in Envoy.
    let none = |why: String| UpstreamError::new(Failure::NoHealthy, why);
    let ips = reach.resolver.lookup(name).await.map_err(none)?;
    let family = client.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |c| c.ip());
    let ip = resolve::choose(&ips, family, rand::random()).ok_or_else(|| none(format!("{name}: no addresses")))?;
    *host.state.resolved.lock() = Some(ip);
    Ok(SocketAddr::new(ip, host.target.addr.port()))
}

/// A stream through the endpoint's node agent.
async fn tunnel(
    reach: &Reach,
    cluster: &Cluster,
    host: &Host,
    to: SocketAddr,
    client: Option<SocketAddr>,
    trace: Option<TraceParent>,
) -> Result<(HboneStream, Tunnels), UpstreamError> {
    let thread = mesh_runtime::threads::current().unwrap_or_default();
    let pool = reach.pools.get(thread).or(reach.pools.first());
    let pool = pool.ok_or_else(|| UpstreamError::new(Failure::Connect, "not on a data thread"))?;
    let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED) };
    let lead = host.target.lead.as_deref();
    let (dial, authority, source) = match lead {
        None => (SocketAddr::new(to.ip(), HBONE_PORT), HboneAuthority::Addr(to), WAYPOINT),
        Some(Lead::Waypoint(authority)) => (to, authority.clone(), GATEWAY),
        Some(Lead::Network(beyond)) => (to, beyond.authority.clone(), if beyond.by_waypoint { GATEWAY } else { WAYPOINT }),
    };
    // All clients share the waypoint's tunnels: they are its own, with its own address.
    let key = PoolKey::new(reach.identity.clone(), Arc::clone(&host.target.expect), any, dial);
    let request = || {
        let mut request = ConnectRequest::to(authority.clone());
        request.baggage = reach.baggage.load().as_deref().cloned();
        request.forwarded =
            client.and_then(|client| headers::forwarded(client, cluster.service.as_ref().map(|s| &*s.key.hostname)));
        request.traceparent = trace.map_or_else(headers::random_traceparent, TraceParent::encode);
        request.extra.push((ISTIO_SOURCE, HeaderValue::from_static(source)));
        request
    };
    let Some(Lead::Network(beyond)) = lead else {
        let ((stream, _), tunnel) = pool.open_on(&key, &request()).await.map_err(|e| failed(&e))?;
        return Ok((stream, Tunnels([Some(tunnel), None])));
    };
    let request = || {
        let mut request = request();
        request.extra.extend(beyond.from.clone().map(|network| (headers::FORWARDED_NETWORK, network)));
        request
    };
    let secure = |io| reach.dialer.secure(io, &beyond.expect);
    let nested = pool.open_within(&key, &request(), secure, &request()).await.map_err(|e| failed(&e))?;
    Ok((nested.stream, Tunnels(nested.tunnels.map(Some))))
}

fn failed(e: &HboneError) -> UpstreamError {
    let failure = match e.reason {
        Reason::ConnectTimeout | Reason::HandshakeTimeout => Failure::ConnectTimeout,
        _ => Failure::Connect,
    };
    UpstreamError::new(failure, if e.detail.is_empty() { e.reason.as_str().to_owned() } else { e.to_string() })
}

async fn write(stream: &mut HboneStream, bytes: Vec<u8>) -> Result<(), UpstreamError> {
    let failed = |e: mesh_hbone::StreamError| UpstreamError::new(Failure::Connect, e.to_string());
    let mut rest = Bytes::from(bytes);
    while !rest.is_empty() {
        let room = poll_fn(|cx| stream.poll_capacity(cx, rest.len())).await.map_err(failed)?;
        let part = rest.split_to(room.min(rest.len()));
        stream.send(part, false).map_err(failed)?;
    }
    stream.give_back();
    Ok(())
}

async fn tcp(
    to: SocketAddr,
    keepalive: Option<TcpKeepalive>,
    limit: Duration,
    connects: &Histogram,
) -> Result<TcpStream, UpstreamError> {
    let mut stream = StreamOptions::default();
    if let Some(k) = keepalive {
        stream.keepalive = Some(Keepalive { time: k.time, interval: k.interval, retries: k.probes });
    }
    let options = ConnectOptions { stream, timeout: limit, ..ConnectOptions::default() };
    connects.time(connect(to, &options)).await.map_err(|e| {
        if e.kind() == io::ErrorKind::TimedOut && e.raw_os_error().is_none() {
            UpstreamError::new(Failure::ConnectTimeout, "connection timeout")
        } else {
            UpstreamError::new(Failure::Connect, connect_detail(&e))
        }
    })
}

/// Envoy's words for a TCP connect that failed.
fn connect_detail(e: &io::Error) -> String {
    let text = e.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    format!("delayed connect error: {text}")
}

async fn handshake(
    config: Arc<rustls::ClientConfig>,
    name: rustls_pki_types::ServerName<'static>,
    io: Bare,
    guard: ConnectionGuard,
) -> Result<Stream, UpstreamError> {
    let connector = tokio_rustls::TlsConnector::from(config);
    let stream =
        connector.connect(name, io).await.map_err(|e| UpstreamError::new(Failure::Connect, format!("TLS error: {e}")))?;
    Ok(Stream::Tls(Box::new(stream), guard))
}

macro_rules! either {
    ($self:ident, $enum:ident { $($name:ident),+ }, $io:ident => $do:expr) => {
        match $self.get_mut() { $( $enum::$name($io) => $do, )+ }
    };
}
impl AsyncRead for Bare {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, Bare { Hbone, Tcp }, io => Pin::new(io).poll_read(cx, buf))
    }
}
impl AsyncWrite for Bare {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, Bare { Hbone, Tcp }, io => Pin::new(io).poll_write(cx, buf))
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, Bare { Hbone, Tcp }, io => Pin::new(io).poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, Bare { Hbone, Tcp }, io => Pin::new(io).poll_shutdown(cx))
    }
    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        either!(self, Bare { Hbone, Tcp }, io => Pin::new(io).poll_write_vectored(cx, bufs))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
}
impl AsyncRead for Raw {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, Raw { Bare, Tls }, io => Pin::new(io).poll_read(cx, buf))
    }
}
impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.raw.set_limit(READ);
        Pin::new(&mut self.raw).poll_read(cx, buf)
    }
}
impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut().raw.get_mut() {
            Raw::Bare(io) => Pin::new(io).poll_write(cx, buf),
            Raw::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().raw.get_mut() {
            Raw::Bare(io) => Pin::new(io).poll_flush(cx),
            Raw::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut().raw.get_mut() {
            Raw::Bare(io) => Pin::new(io).poll_shutdown(cx),
            Raw::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match self.get_mut().raw.get_mut() {
            Raw::Bare(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Raw::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
}
