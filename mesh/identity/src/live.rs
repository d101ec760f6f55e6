//! Peers that are connected now, and the switch that ends each of their connections: a root that is withdrawn takes with it
//! what was accepted by it.

use crate::{Peer, TrustBundles};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;

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
}
