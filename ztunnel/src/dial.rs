//! Dialling: TCP from inside the pod's namespace, TLS as the pod, and the hops of a plan.
//!
//! Owns the transport under a tunnel and the mapping of its failures to reasons. Upstream: `outbound`, the pools.
//! Downstream: `mesh-runtime` sockets, `mesh-identity` TLS.
use crate::pod::{Pod, Shared, stream_options};
use crate::resolve;
use mesh_hbone::{ConnectRequest, Dialer, HboneError, HboneStream, PoolKey, Tunnel};
use mesh_identity::SvidHandle;
use mesh_model::plan::{Dial, Hop, NamedDial};
use mesh_model::{DialAddr, HboneAuthority, Reason, Refusal, SpiffeId};
use mesh_runtime::sockets::{ConnectOptions, NetnsFd, connect};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;

/// SO_MARK of every agent socket in a pod's namespace (I12).
pub const MARK: u32 = ebpf_loader::MARK_AGENT;

/// Dials for one pod.
#[derive(Clone, Debug)]
pub struct PodDialer {
    netns: Option<Arc<NetnsFd>>,
    svid: SvidHandle,
    connect_timeout: Duration,
    handshake_timeout: Duration,
}

impl PodDialer {
    /// A dialer that connects from `netns` and proves `svid`.
    pub fn new(shared: &Shared, netns: Option<Arc<NetnsFd>>, svid: SvidHandle) -> Self {
        Self {
            netns,
            svid,
            connect_timeout: shared.settings.connect_timeout,
            handshake_timeout: shared.settings.handshake_timeout,
        }
    }

    /// A plain connection from the pod to `to`.
    pub async fn tcp(&self, to: SocketAddr) -> Result<TcpStream, Refusal> {
        let options = ConnectOptions {
            netns: self.netns.clone(),
            mark: self.netns.is_some().then_some(MARK),
            source: None,
            stream: stream_options(),
            timeout: self.connect_timeout,
            ..ConnectOptions::default()
        };
        connect(to, &options).await.map_err(|e| connect_refusal(to, &e))
    }

    /// A TLS stream to `to` whose peer proved one of `expect` (I4).
    pub async fn tls<IO>(&self, io: IO, expect: &[SpiffeId]) -> Result<(TlsStream<IO>, SpiffeId), Refusal>
    where
        IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        let svid = self.svid.fetch().await.map_err(Refusal::from)?;
        let deadline = Instant::now() + self.handshake_timeout;
        let (stream, peer) = mesh_identity::tls::connect(&svid, io, expect, deadline).await.map_err(Refusal::from)?;
        Ok((stream, peer.id))
    }
}

impl Dialer for PodDialer {
    type Io = TlsStream<TcpStream>;

    async fn dial(&self, key: &PoolKey) -> Result<Self::Io, HboneError> {
        let tcp = self.tcp(key.dial()).await.map_err(HboneError::from)?;
        self.tls(tcp, key.expect()).await.map(|(stream, _)| stream).map_err(HboneError::from)
    }
}

/// The refusal for a failed TCP connect.
pub fn connect_refusal(to: SocketAddr, e: &io::Error) -> Refusal {
    let reason = match e.kind() {
        io::ErrorKind::TimedOut => Reason::ConnectTimeout,
        _ if matches!(e.raw_os_error(), Some(libc_codes::EMFILE | libc_codes::ENFILE | libc_codes::ENOBUFS | libc_codes::ENOMEM)) => {
            Reason::Overloaded
        }
        _ => Reason::ConnectFailed,
    };
    Refusal::new(reason, format!("{to}: {e}"))
}

/// The few error numbers `connect_refusal` tells apart (Linux).
mod libc_codes {
    pub const ENFILE: i32 = 23;
    pub const EMFILE: i32 = 24;
    pub const ENOMEM: i32 = 12;
    pub const ENOBUFS: i32 = 105;
}

/// An opened path to the destination.
pub enum Reached {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A stream of a tunnel to the one the plan names.
    Tunnel(HboneStream),
    /// A stream through a gateway: who answered behind it is only known now.
    Beyond {
        /// The stream.
        stream: HboneStream,
        /// Identity of the inner peer.
        peer: SpiffeId,
        /// How it describes itself.
        baggage: Option<http::HeaderValue>,
    },
}

/// Turns a plan whose address must be resolved into one that can be dialled.
pub async fn resolve_name(pod: &Pod, dial: Dial, client: IpAddr, draw: u64) -> Result<Dial, Refusal> {
    let Dial::Name { host, port, then } = dial else { return Ok(dial) };
    let ips = pod.shared.resolver.lookup(&host).await.map_err(|e| Refusal::new(Reason::DnsFailure, e))?;
    let ip = resolve::choose(&ips, client, draw)
        .ok_or_else(|| Refusal::new(Reason::DnsFailure, format!("{host}: no addresses")))?;
    Ok(match then {
        NamedDial::Plain => Dial::Plain(DialAddr::from(SocketAddr::new(ip, port))),
        NamedDial::Hbone { hbone_port, authority, expect, role } => Dial::Hbone(Hop {
            dial: DialAddr::from(SocketAddr::new(ip, hbone_port)),
            authority: authority.unwrap_or(HboneAuthority::Addr(SocketAddr::new(ip, port))),
            expect,
            role,
        }),
    })
}

/// Carries out a plan. `request` makes the CONNECT for an authority.
pub async fn reach(
    pod: &Pod,
    dial: &Dial,
    client: IpAddr,
    request: impl Fn(&HboneAuthority) -> ConnectRequest,
) -> Result<Reached, Refusal> {
    let dialer = PodDialer::new(&pod.shared, pod.netns.clone(), pod.svid.clone());
    match dial {
        Dial::Passthrough(to) | Dial::Plain(to) => Ok(Reached::Tcp(dialer.tcp(to.0).await?)),
        Dial::Hbone(hop) => {
            let (stream, _) = open(pod, hop, client, &request(&hop.authority)).await?;
            Ok(Reached::Tunnel(stream))
        }
        Dial::DoubleHbone { outer, inner } => {
            // The inner tunnel is made for this connection alone: pooled, all connections would stick to one remote
            // workload behind the gateway (node-agent §1.4 G).
            let (stream, _) = open(pod, outer, client, &request(&outer.authority)).await?;
            let (tls, peer) = dialer.tls(stream.into_io(), &inner.expect).await?;
            let tunnel = Tunnel::handshake(tls, Arc::clone(&pod.shared.hbone), || {}).await.map_err(|e| Refusal::from(&e))?;
            let (stream, head) = tunnel.open(&request(&inner.authority)).await.map_err(|e| Refusal::from(&e))?;
            Ok(Reached::Beyond { stream, peer, baggage: head.baggage().cloned() })
        }
        Dial::Name { host, .. } => Err(Refusal::new(Reason::Internal, format!("{host} was not resolved before dialling"))),
    }
}

async fn open(
    pod: &Pod,
    hop: &Hop,
    client: IpAddr,
    request: &ConnectRequest,
) -> Result<(HboneStream, mesh_hbone::ResponseHead), Refusal> {
    let pool = pod.pool().ok_or_else(|| Refusal::new(Reason::Internal, "not on a data thread"))?;
    let key = PoolKey::new(pod.identity.clone(), Arc::clone(&hop.expect), client, hop.dial.0);
    pool.open(&key, request).await.map_err(|e| Refusal::from(&e))
}
