//! Live tunnels of node agents: who proved what, and the switch that ends each.
use mesh_identity::{Peer, TrustBundles};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;

/// A live tunnel.
#[derive(Clone, Debug)]
struct Tunnel {
    proof: Arc<Peer>,
    peer: SocketAddr,
    cut: Arc<Notify>,
}

/// Accepted tunnels and the proof their peers gave, so that a withdrawn root ends them.
#[derive(Debug, Default)]
pub struct Tunnels {
    live: Mutex<HashMap<u64, Tunnel>>,
    next: AtomicU64,
}
impl Tunnels {
    /// Enters a tunnel; it stays until it is removed.
    pub fn admit(&self, proof: Arc<Peer>, peer: SocketAddr) -> (u64, Arc<Notify>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let cut = Arc::new(Notify::new());
        self.live.lock().insert(id, Tunnel { proof, peer, cut: Arc::clone(&cut) });
        (id, cut)
    }
    /// Takes a tunnel out.
    pub fn remove(&self, id: u64) {
        self.live.lock().remove(&id);
    }
    /// Ends the tunnels whose peers `bundles` no longer trusts. Returns how many. Costs a chain verification each.
    pub fn rejudge(&self, bundles: &TrustBundles) -> usize {
        let all: Vec<Tunnel> = self.live.lock().values().cloned().collect();
        let lost = all.into_iter().filter(|t| !t.proof.still_trusted(bundles));
        // A permit is stored when nobody waits yet.
        lost.map(|t| t.cut.notify_one()).count()
    }
    /// Who is connected: address and identity.
    pub fn list(&self) -> Vec<(SocketAddr, Arc<Peer>)> {
        self.live.lock().values().map(|t| (t.peer, Arc::clone(&t.proof))).collect()
    }
}
