//! Live connections of one pod: who they are, and the switch that cuts each.
//!
//! Owns the table and the re-judging of inbound connections on every published version (invariant I6). It refuses to
//! guess: a connection is entered *before* it is judged, so no change can slip between the verdict and the entry.
//! Upstream: `inbound`, `passthrough`, `outbound`. Downstream: the relay (through [`Cut::wait`]), admin.
use mesh_model::authz::{Verdict, authorize};
use mesh_model::conn::InboundConn;
use mesh_model::workload::Workload;
use mesh_model::{Reason, Refusal, Snapshot, SpiffeId};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::Notify;

/// Which way a connection goes, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The pod opened it.
    Outbound,
    /// Somebody opened it to the pod.
    Inbound,
}
impl Direction {
    /// As access logs write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
    /// As the metrics' `reporter` label writes it.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Outbound => "source",
            Self::Inbound => "destination",
        }
    }
}

/// How a connection is carried, as `istioctl ztunnel-config connections` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carried {
    /// Plain TCP.
    Tcp,
    /// One tunnel.
    Hbone,
    /// A tunnel in a tunnel.
    DoubleHbone,
}
impl Carried {
    /// The word in the configuration dump.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Hbone => "HBONE",
            Self::DoubleHbone => "DOUBLEHBONE",
        }
    }
}

/// What is known of one live connection.
#[derive(Debug)]
pub struct Facts {
    /// Direction.
    pub direction: Direction,
    /// Client.
    pub src: SocketAddr,
    /// What the client asked for (outbound), or the address the connection arrived at (inbound).
    pub original_dst: SocketAddr,
    /// What we connected to (outbound, known once dialled) or the application's address (inbound), and how it is carried.
    pub actual_dst: Mutex<(SocketAddr, Carried)>,
    /// Verified identity of the client, for inbound connections over mTLS.
    pub identity: Option<SpiffeId>,
}

/// The switch that ends one connection from outside. The first reason wins.
#[derive(Debug, Default)]
pub struct Cut {
    why: OnceLock<Refusal>,
    notify: Notify,
}
impl Cut {
    /// Ends the connection.
    pub fn cut(&self, why: Refusal) {
        if self.why.set(why).is_ok() {
            self.notify.notify_waiters();
        }
    }
    /// Why it was ended, if it was.
    pub fn why(&self) -> Option<&Refusal> {
        self.why.get()
    }
    /// Resolves when the connection is to end. Cancel safe.
    pub async fn wait(&self) {
        let notified = self.notify.notified();
        tokio::pin!(notified);
        notified.as_mut().enable();
        if self.why.get().is_none() {
            notified.await;
        }
    }
}

/// One entry.
#[derive(Debug)]
pub struct Live {
    /// The facts.
    pub facts: Facts,
    /// The switch.
    pub cut: Cut,
    /// Set when it passes although policies refuse it, because a process of the node opened it: it is not judged again.
    pub of_node: AtomicBool,
}

/// Shards of the table: connections of different data threads rarely meet on one lock.
const SHARDS: usize = 8;

/// The live connections of one pod.
#[derive(Debug, Default)]
pub struct Conns {
    shards: [Mutex<HashMap<u64, Arc<Live>>>; SHARDS],
    next: AtomicU64,
    /// Set when the pod ends: what is entered afterwards is cut at once.
    closed: OnceLock<Refusal>,
}
impl Conns {
    /// Enters a connection; it stays until the guard is dropped.
    pub fn admit(self: &Arc<Self>, facts: Facts) -> Admitted {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let live = Arc::new(Live { facts, cut: Cut::default(), of_node: AtomicBool::default() });
        self.shard(id).lock().insert(id, Arc::clone(&live));
        // After the entry: either `close` sees it in the table or this sees that the table is closed.
        if let Some(why) = self.closed.get() {
            live.cut.cut(why.clone());
        }
        Admitted { id, live, conns: Arc::clone(self) }
    }
    /// Live connections now.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|s| s.lock().len()).sum()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// A copy of the table, in no order.
    pub fn list(&self) -> Vec<Arc<Live>> {
        self.shards.iter().flat_map(|s| s.lock().values().cloned().collect::<Vec<_>>()).collect()
    }
    /// Cuts every connection, and every one that is still to come.
    pub fn close(&self, why: &Refusal) {
        let _ = self.closed.set(why.clone());
        self.cut_all(why);
    }
    /// Cuts every connection.
    pub fn cut_all(&self, why: &Refusal) {
        for live in self.list() {
            live.cut.cut(why.clone());
        }
    }
    /// Judges every inbound connection again by `snap` and cuts those it no longer allows. Returns how many were cut.
    ///
    /// `workload` is the pod; when the mesh no longer knows it, all its connections are cut.
    pub fn rejudge(&self, snap: &Snapshot, workload: Option<&Workload>) -> usize {
        let Some(workload) = workload else {
            let n = self.len();
            self.cut_all(&Refusal::new(Reason::Revoked, "the pod left the mesh"));
            return n;
        };
        let mut cut = 0;
        for live in self.list() {
            let of_node = live.of_node.load(Ordering::Relaxed);
            if live.facts.direction != Direction::Inbound || of_node || live.cut.why().is_some() {
                continue;
            }
            let conn = InboundConn {
                client: live.facts.src.into(),
                dst: live.facts.actual_dst.lock().0,
                identity: live.facts.identity.as_ref(),
            };
            if let Verdict::Deny(now) = authorize(snap, workload, &conn).verdict {
                let detail = format!("connection closed due to policy change: {}", now.brief());
                live.cut.cut(Refusal::new(Reason::Revoked, detail));
                cut += 1;
            }
        }
        cut
    }
    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Live>>> {
        // The remainder is below SHARDS, the array's length.
        #[expect(clippy::indexing_slicing, reason = "index is a remainder of the array's length")]
        &self.shards[(id % SHARDS as u64) as usize]
    }
}

/// A connection in the table; dropping it takes it out.
#[derive(Debug)]
pub struct Admitted {
    id: u64,
    live: Arc<Live>,
    conns: Arc<Conns>,
}
impl std::ops::Deref for Admitted {
    type Target = Live;
    fn deref(&self) -> &Live {
        &self.live
    }
}
impl Drop for Admitted {
    fn drop(&mut self) {
        self.conns.shard(self.id).lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests;
