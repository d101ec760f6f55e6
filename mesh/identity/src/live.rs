//! Peers that are connected now, and the switch that ends each of their connections: a root that is withdrawn, or a certificate
//! that is taken back, takes with it what was accepted by it.

use crate::tls::{self, ClientStream};
use crate::{Peer, SvidHandle, TlsContext, TrustBundles};
use mesh_model::{Reason, Refusal, SpiffeId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, futures::OwnedNotified};
use tokio::time::Instant;

/// The proof a peer gave, and the switch of its connection.
type Live = (Arc<Peer>, Arc<Notify>);

/// See the module.
#[derive(Debug, Default)]
pub struct LivePeers {
    live: Mutex<HashMap<u64, Live>>,
    next: AtomicU64,
}
impl LivePeers {
    /// Enters a peer; it stays until it is removed. The switch is notified when it is to go.
    pub fn admit(&self, peer: Arc<Peer>) -> (u64, Arc<Notify>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let cut = Arc::new(Notify::new());
        self.live.lock().insert(id, (peer, Arc::clone(&cut)));
        (id, cut)
    }
    /// Takes a peer out.
    pub fn remove(&self, id: u64) {
        self.live.lock().remove(&id);
    }
    /// Throws the switch of the peers that `bundles` no longer trusts. Returns how many. Costs a chain verification each.
    pub fn rejudge(&self, bundles: &TrustBundles) -> usize {
        let all: Vec<_> = self.live.lock().values().cloned().collect();
        let lost = all.iter().filter(|(peer, _)| !peer.still_trusted(bundles));
        // A permit is stored when nobody waits yet.
        lost.map(|(_, cut)| cut.notify_one()).count()
    }
    /// Who they are.
    pub fn list(&self) -> Vec<Arc<Peer>> {
        self.live.lock().values().map(|(peer, _)| Arc::clone(peer)).collect()
    }
    /// `io`, a stream to `peer`, which ends when the peer is no longer trusted, and is one of the peers until it is dropped.
    ///
    /// # Errors
    /// What we trust changed during the handshake, and the peer is no longer of it.
    pub fn hold<IO>(self: &Arc<Self>, io: IO, peer: Peer, tls: &TlsContext) -> Result<Held<IO>, Refusal> {
        let peer = Arc::new(peer);
        let (id, cut) = self.admit(Arc::clone(&peer));
        let held = Held { io, cut: Some(Box::pin(cut.notified_owned())), id, peers: Arc::clone(self) };
        // Whoever judges by later bundles finds the peer in the list.
        if peer.is_trusted(&tls.trusted()) { Ok(held) } else { Err(no_longer_trusted()) }
    }
    /// TLS over `io`, proving `svid`: a stream to a peer that proved one of `expect` within `limit` (I4), held as
    /// [`LivePeers::hold`] says, and who the peer is.
    ///
    /// # Errors
    /// We have no certificate, or the peer did not prove it.
    pub async fn connect<IO>(
        self: &Arc<Self>,
        svid: &SvidHandle,
        io: IO,
        expect: &[SpiffeId],
        limit: Duration,
    ) -> Result<(Held<ClientStream<IO>>, SpiffeId), Refusal>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let own = svid.fetch().await.map_err(Refusal::from)?;
        let (stream, peer) = tls::connect(&own, io, expect, Instant::now() + limit).await.map_err(Refusal::from)?;
        let id = peer.id.clone();
        Ok((self.hold(stream, peer, svid.cache().tls())?, id))
    }
}

/// Why a peer is turned away who was believed when its handshake began: roots or revocation lists changed meanwhile.
pub fn no_longer_trusted() -> Refusal {
    Refusal::new(Reason::Revoked, NO_LONGER)
}

/// What a stream says whose peer has lost our trust.
const NO_LONGER: &str = "the peer's certificate is no longer trusted";

/// See [`LivePeers::hold`].
#[derive(Debug)]
pub struct Held<IO> {
    io: IO,
    /// `None` once the switch was thrown.
    cut: Option<Pin<Box<OwnedNotified>>>,
    id: u64,
    peers: Arc<LivePeers>,
}
impl<IO> Held<IO> {
    /// Whether the switch was thrown; if not, the task is woken when it is.
    fn is_cut(&mut self, cx: &mut Context<'_>) -> bool {
        if self.cut.as_mut().is_none_or(|cut| cut.as_mut().poll(cx).is_ready()) {
            self.cut = None;
        }
        self.cut.is_none()
    }
}
impl<IO> Drop for Held<IO> {
    fn drop(&mut self) {
        self.peers.remove(self.id);
    }
}
impl<IO: AsyncRead + Unpin> AsyncRead for Held<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Asked on every read, some 20 ns: a peer must not keep its connection by never letting us wait.
        if self.is_cut(cx) {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, NO_LONGER)));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}
impl<IO: AsyncWrite + Unpin> AsyncWrite for Held<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
