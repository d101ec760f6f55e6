//! The transport under a tunnel: TCP from inside the pod's namespace, TLS as the pod.
//!
//! Owns the mapping of connect failures to reasons. Upstream: the pools, `dial`, `deliver`. Downstream: `mesh-runtime` sockets,
//! `mesh-identity` TLS.
use crate::metrics::Metrics;
use crate::settings::Settings;
use mesh_hbone::{Dialer, HboneError, PoolKey};
use mesh_identity::SvidHandle;
use mesh_identity::live::{Held, LivePeers};
use mesh_identity::tls::ClientStream;
use mesh_model::{Reason, Refusal, SpiffeId};
use mesh_runtime::metrics::Histogram;
use mesh_runtime::sockets::{ConnectOptions, NetnsFd, StreamOptions, connect};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// SO_MARK of the agent's sockets in a pod's namespace (I12).
pub const MARK: u32 = ebpf_loader::MARK_AGENT;

/// That of those which only talk to the pod's application. The rules of Istio's CNI agent know one mark only.
pub fn local_mark(settings: &Settings) -> u32 {
    if settings.zds.is_some() { MARK } else { ebpf_loader::MARK_LOCAL }
}

/// Dials for one pod.
#[derive(Clone, Debug)]
pub struct PodDialer {
    netns: Option<Arc<NetnsFd>>,
    svid: SvidHandle,
    peers: Arc<LivePeers>,
    stream: StreamOptions,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    connects: Arc<Histogram>,
}

impl PodDialer {
    /// A dialer that connects from `netns`, proves `svid` and enters whom it reaches in `peers`.
    pub fn new(
        settings: &Settings,
        metrics: &Metrics,
        netns: Option<Arc<NetnsFd>>,
        svid: SvidHandle,
        peers: Arc<LivePeers>,
    ) -> Self {
        let Settings { connect_timeout, handshake_timeout, ref tcp, .. } = *settings;
        let (stream, connects) = (tcp.stream_options(), Arc::clone(&metrics.connect_to_peers));
        Self { netns, svid, peers, stream, connect_timeout, handshake_timeout, connects }
    }

    /// A plain connection from the pod to `to`.
    pub async fn tcp(&self, to: SocketAddr) -> Result<TcpStream, Refusal> {
        let options = ConnectOptions {
            netns: self.netns.clone(),
            mark: self.netns.is_some().then_some(MARK),
            source: None,
            stream: self.stream,
            timeout: self.connect_timeout,
            ..ConnectOptions::default()
        };
        self.connects.time(connect(to, &options)).await.map_err(|e| connect_refusal(to, &e))
    }

    /// A TLS stream over `io` whose peer proved one of `expect` (I4); it ends when that proof counts no longer.
    pub async fn tls<IO>(&self, io: IO, expect: &[SpiffeId]) -> Result<(Held<ClientStream<IO>>, SpiffeId), HboneError>
    where
        IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        Ok(self.peers.connect(&self.svid, io, expect, self.handshake_timeout).await?)
    }
}

impl Dialer for PodDialer {
    type Io = Held<ClientStream<TcpStream>>;

    async fn dial(&self, key: &PoolKey) -> Result<Self::Io, HboneError> {
        let tcp = self.tcp(key.dial()).await.map_err(HboneError::from)?;
        self.tls(tcp, key.expect()).await.map(|(stream, _)| stream)
    }
}

/// The refusal for a failed TCP connect.
pub fn connect_refusal(to: SocketAddr, e: &io::Error) -> Refusal {
    let reason = match e.kind() {
        io::ErrorKind::TimedOut => Reason::ConnectTimeout,
        _ if matches!(
            e.raw_os_error(),
            Some(libc_codes::EMFILE | libc_codes::ENFILE | libc_codes::ENOBUFS | libc_codes::ENOMEM)
        ) =>
        {
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
