//! The upstream side: clusters, their endpoints' health and load, connection pools, limits.
//!
//! Owns everything traffic changes about a destination. State lives as long as its cluster is in the mesh and survives
//! changes of anything else; what is derived from the mesh ([`Cluster`]) is made anew when its own part of the mesh changed,
//! and a request keeps the one it started with. Upstream: `exchange` and `tcp`. Downstream: `mesh-hbone` tunnels, plain TCP,
//! TLS.
//!
//! Threads: a connection lives on the data thread that made it, in that thread's pool; limits, health and load are counted
//! for the whole process, in atomics.

mod build;
mod cluster;
pub mod error;
mod fetch;
mod forward;
mod host;
mod names;
mod pool;
mod proxy_protocol;
mod send;
mod state;
mod tls;
mod transport;
mod view;

pub use cluster::{Cluster, Observed, PickContext};
pub use error::{Failure, UpstreamError};
pub use fetch::Fetcher;
pub use forward::Forwarded;
pub use host::Host;
pub use send::{Carrier, SendOptions, connect, send};
pub use state::{ConnectionGuard, RequestGuard, RetryGuard};
pub use transport::Stream;
pub use view::{ClusterView, Counts, HostView, Limits};

use crate::me::Me;
use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_identity::{SvidHandle, TrustBundles};
use mesh_model::known::Known;
use mesh_model::l7::destination::Balance;
use mesh_model::l7::route::ClusterKey;
use mesh_model::l7::{Destination, TrafficPolicy};
use mesh_model::plan;
use mesh_model::service::Service;
use mesh_model::shard::Shards;
use mesh_model::snapshot::Backing;
use mesh_model::workload::WorkloadUid;
use mesh_model::{Snapshot, SpiffeId};
use mesh_runtime::metrics::Histogram;
use parking_lot::Mutex;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What the upstream side needs from the process.
#[derive(Debug)]
pub struct Deps {
    /// Our certificate.
    pub svid: SvidHandle,
    /// Our identity.
    pub identity: SpiffeId,
    /// Tunnel settings.
    pub hbone: Arc<mesh_hbone::Settings>,
    /// Limit of the TCP connect of a tunnel; other connections follow their destination's policy.
    pub connect_timeout: Duration,
    /// Limit of the handshake of a tunnel.
    pub handshake_timeout: Duration,
    /// How long TCP connects take.
    pub connects: Arc<Histogram>,
    /// Number of data threads.
    pub threads: usize,
    /// Which workload of the mesh we are: where we are, with which labels.
    pub me: Me,
}

/// As what the process sends something on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// As a waypoint, which is gone around by nobody itself: straight to endpoints.
    Waypoint,
    /// As a gateway, from outside the mesh: through the waypoints of the services that want that of gateways.
    Gateway,
}

/// Every destination of the process.
#[derive(Debug)]
pub struct Upstreams {
    reach: Arc<transport::Reach>,
    me: Me,
    /// The policy of destinations about which nothing is to be said: workloads, and waypoints, which keep what is said themselves.
    plain: Arc<TrafficPolicy>,
    clusters: Registry<ClusterKey>,
    /// The same services as far as they are reached through their waypoints.
    fronted: Registry<ClusterKey>,
    workloads: Registry<(WorkloadUid, u16)>,
}

/// Clusters by key. Read without a lock; written when a cluster is first used or forgotten, at the cost of one entry: a client
/// names as many as it likes.
#[derive(Debug)]
struct Registry<K> {
    entries: ArcSwap<Shards<K, Arc<Entry>>>,
    /// At how many entries those that nobody uses are forgotten next. Where more than the limit are in use, at twice as many as
    /// were at the last look: what is in use cannot be forgotten and is bounded by the connections it serves, and each look
    /// walks over all of them, so looking at every newcomer would cost as much again for each. What is kept unused is thus
    /// never more than was in use at once.
    full: Mutex<usize>,
}
impl<K> Default for Registry<K> {
    fn default() -> Self {
        Self { entries: ArcSwap::default(), full: Mutex::default() }
    }
}

/// One cluster through the versions of the mesh.
#[derive(Debug)]
struct Entry {
    state: Arc<state::State>,
    current: ArcSwapOption<Cluster>,
    /// The newest version of the mesh that `current` is known to be right for.
    seen: AtomicU64,
    building: Mutex<()>,
    /// Held by the request that has the first version made off the data threads; the others wait.
    first: tokio::sync::Mutex<()>,
    /// The next version is being made off the data threads, because a request found the last one too old.
    renewing: AtomicBool,
}

/// Clusters of single workloads that are kept while nobody uses them.
const IDLE_WORKLOADS: usize = 4096;

impl<K: Hash + Eq + Clone> Registry<K> {
    fn get(&self, key: &K) -> Option<Arc<Entry>> {
        self.entries.load().get(key).map(Arc::clone)
    }
    fn get_or_insert(&self, key: &K, make: impl FnOnce() -> Arc<state::State>, most: usize) -> Arc<Entry> {
        let mut full = self.full.lock();
        if let Some(entry) = self.get(key) {
            return entry;
        }
        let entry = Arc::new(Entry {
            state: make(),
            current: ArcSwapOption::empty(),
            seen: AtomicU64::new(0),
            building: Mutex::default(),
            first: tokio::sync::Mutex::default(),
            renewing: AtomicBool::new(false),
        });
        let mut next = Shards::clone(&self.entries.load());
        if next.len() >= most.max(*full) {
            let unused: Vec<K> = next.iter().filter(|(_, entry)| !entry.is_used()).map(|(key, _)| key.clone()).collect();
            for key in &unused {
                next.remove(key);
            }
            // With all of them in use, not looked at again with each that comes.
            *full = next.len() * 2;
        }
        next.insert(key.clone(), Arc::clone(&entry));
        self.entries.store(Arc::new(next));
        entry
    }
    fn retain(&self, keep: impl Fn(&K) -> bool) {
        let _writing = self.full.lock();
        let now = self.entries.load();
        let mut next = Shards::clone(&now);
        for (key, entry) in now.iter().filter(|(key, _)| !keep(key)) {
            entry.state.leave();
            next.remove(key);
        }
        if next.len() < now.len() {
            self.entries.store(Arc::new(next));
        }
    }
}
impl Entry {
    /// The cluster for a version of the mesh, if it is known without looking.
    fn fresh(&self, snap: &Snapshot) -> Option<Arc<Cluster>> {
        (self.seen.load(Relaxed) >= snap.version()).then(|| self.current.load_full()).flatten()
    }
    /// The cluster for a version of the mesh: the current one when `fits`, else one that is built now. While another thread
    /// builds, the previous one serves.
    fn follow(
        &self,
        snap: &Snapshot,
        fits: impl Fn(&Cluster) -> bool,
        build: impl FnOnce(&Arc<state::State>) -> (Cluster, Vec<build::Listed>),
    ) -> Arc<Cluster> {
        let _building = match self.building.try_lock() {
            Some(guard) => guard,
            None => match self.current.load_full() {
                Some(previous) => return previous,
                None => self.building.lock(),
            },
        };
        if let Some(current) = self.fresh(snap) {
            return current;
        }
        let cluster = match self.current.load_full() {
            Some(current) if fits(&current) => current,
            _ => {
                let (cluster, listed) = build(&self.state);
                let built = self.state.install(cluster, listed);
                self.current.store(Some(Arc::clone(&built)));
                built
            }
        };
        self.seen.store(snap.version(), Relaxed);
        cluster
    }
    fn is_used(&self) -> bool {
        self.state.is_used()
    }
}

/// Whether a service is reached through its waypoint.
fn is_fronted(snap: &Snapshot, key: &ClusterKey, role: Role) -> bool {
    role == Role::Gateway && snap.find_service(&key.service).is_some_and(|service| service.is_fronted())
}

/// A cluster there is to be, by one version of the mesh.
struct Wanted<'s> {
    key: &'s ClusterKey,
    backing: &'s Arc<Backing>,
    service: &'s Arc<Service>,
    destination: Option<&'s Arc<Destination>>,
}
impl<'s> Wanted<'s> {
    fn of(snap: &'s Snapshot, key: &'s ClusterKey) -> Result<Self, UpstreamError> {
        let unknown = || UpstreamError::new(Failure::NoCluster, "");
        let backing = snap.find_backing(&key.service).ok_or_else(unknown)?;
        let service = backing.service().ok_or_else(unknown)?;
        service.port(key.port).ok_or_else(unknown)?;
        let destination = snap.find_destination(&key.service);
        if let Some(why) = destination.and_then(|d| d.broken.as_ref()) {
            return Err(UpstreamError::new(Failure::NoCluster, format!("destination_unusable: {why}")));
        }
        // A subset nobody declared is no cluster to Envoy either.
        if let Some(subset) = key.subset.as_deref()
            && !destination.is_some_and(|d| d.subsets.contains_key(subset))
        {
            return Err(unknown());
        }
        Ok(Self { key, backing, service, destination })
    }
    /// Whether a table must be made for it.
    fn is_hashed(&self) -> bool {
        let policy = self.destination.and_then(|d| d.policy(self.key.subset.as_deref(), self.key.port));
        policy.is_some_and(|policy| matches!(policy.balance, Balance::Hash { .. }))
    }
}

impl Upstreams {
    /// No destination yet.
    pub fn new(deps: Deps) -> Arc<Self> {
        let me = deps.me.clone();
        Arc::new(Self {
            reach: Arc::new(transport::Reach::new(deps)),
            me,
            plain: Arc::default(),
            clusters: Registry::default(),
            fronted: Registry::default(),
            workloads: Registry::default(),
        })
    }

    /// Where it is noted how long TCP connects take.
    pub(crate) fn connects(&self) -> &Arc<Histogram> {
        self.reach.connects()
    }

    /// The cluster for a request. Cheap when it was asked for in this version before. A table for hashing is never made on a
    /// data thread: requests go by the last one until the next is made; the first of all wait for theirs.
    ///
    /// # Errors
    /// As [`Self::renew`].
    pub async fn cluster(
        self: &Arc<Self>,
        snap: &Arc<Snapshot>,
        key: &ClusterKey,
        role: Role,
    ) -> Result<Arc<Cluster>, UpstreamError> {
        if is_fronted(snap, key, role) {
            return self.by_waypoint(snap, key);
        }
        let entry = self.clusters.get(key);
        if let Some(cluster) = entry.as_ref().and_then(|entry| entry.fresh(snap)) {
            return Ok(cluster);
        }
        if !Wanted::of(snap, key)?.is_hashed() {
            return self.straight(snap, key);
        }
        let entry = entry.unwrap_or_else(|| self.entry(key, &self.clusters));
        if let Some(last) = entry.current.load_full() {
            // That is [`Self::collect`]'s to do, which may have been here before there was anything to bring up to date.
            if !entry.renewing.swap(true, Relaxed) {
                let (own, snap, key) = (Arc::clone(self), Arc::clone(snap), key.clone());
                tokio::task::spawn_blocking(move || {
                    // Unusable by now: who asks is told.
                    let _ = own.straight(&snap, &key);
                    entry.renewing.store(false, Relaxed);
                });
            }
            return Ok(last);
        }
        let _first = entry.first.lock().await;
        if let Some(made) = entry.current.load_full() {
            return Ok(made);
        }
        let (own, snap, key) = (Arc::clone(self), Arc::clone(snap), key.clone());
        let made = tokio::task::spawn_blocking(move || own.straight(&snap, &key)).await;
        made.unwrap_or_else(|stopped| Err(UpstreamError::new(Failure::NoCluster, stopped.to_string())))
    }
    fn entry(&self, key: &ClusterKey, registry: &Registry<ClusterKey>) -> Arc<Entry> {
        let make = || state::State::new(key.to_string().into(), Arc::clone(&self.reach));
        registry.get_or_insert(key, make, usize::MAX)
    }
    /// The cluster as this version of the mesh has it, made here if it was not before. Health, pools, limits and balancing
    /// survive changes of anything else; endpoints that stay keep their state.
    ///
    /// # Errors
    /// `NoCluster`: the service or its port is unknown, or what is said about reaching it is unusable. `NoHealthy` with the reason,
    /// where its waypoint is the only way and cannot be used.
    pub fn renew(&self, snap: &Snapshot, key: &ClusterKey, role: Role) -> Result<Arc<Cluster>, UpstreamError> {
        if is_fronted(snap, key, role) { self.by_waypoint(snap, key) } else { self.straight(snap, key) }
    }
    /// The cluster of its endpoints.
    fn straight(&self, snap: &Snapshot, key: &ClusterKey) -> Result<Arc<Cluster>, UpstreamError> {
        let entry = self.clusters.get(key);
        if let Some(cluster) = entry.as_ref().and_then(|entry| entry.fresh(snap)) {
            return Ok(cluster);
        }
        let Wanted { key, backing, service, destination } = Wanted::of(snap, key)?;
        let entry = entry.unwrap_or_else(|| self.entry(key, &self.clusters));
        let own = build::Own::of(self.me.find(snap), snap.view());
        let ways = plan::ways_beyond(snap, service, backing.endpoints(), key.port, own.family());
        let plain = Arc::clone(&snap.defaults().traffic);
        let (backing, destination) = (Arc::clone(backing), destination.cloned());
        let basis = build::Basis { backing, destination, plain, own, ways, front: None };
        let fits = |c: &Cluster| c.was_built_from(&basis);
        Ok(entry.follow(snap, fits, |state| build::service(state, key, service, basis.clone())))
    }
    /// The cluster of its waypoint's instances. The DestinationRule is the waypoint's to keep; one that cannot be used, or lacks the
    /// subset, is refused here already.
    fn by_waypoint(&self, snap: &Snapshot, key: &ClusterKey) -> Result<Arc<Cluster>, UpstreamError> {
        let entry = self.fronted.get(key);
        if let Some(cluster) = entry.as_ref().and_then(|entry| entry.fresh(snap)) {
            return Ok(cluster);
        }
        let Wanted { key, backing, service, .. } = Wanted::of(snap, key)?;
        let own = build::Own::of(self.me.find(snap), snap.view());
        let way = plan::way_by_waypoint(snap, service, key.port, own.family(), self.reach.namespace());
        let front = way.transpose().map_err(|why| UpstreamError::refused(&why))?.map(Arc::new);
        let (backing, plain) = (Arc::clone(backing), Arc::clone(&self.plain));
        let basis = build::Basis { backing, destination: None, plain, own, ways: Vec::new(), front };
        let entry = entry.unwrap_or_else(|| self.entry(key, &self.fronted));
        let fits = |c: &Cluster| c.was_built_from(&basis);
        Ok(entry.follow(snap, fits, |state| build::service(state, key, service, basis.clone())))
    }

    /// A workload addressed by itself (waypoint-for workload).
    pub fn workload(&self, snap: &Snapshot, known: &Arc<Known>, port: u16) -> Arc<Cluster> {
        let key = (Arc::clone(known.uid()), port);
        let entry = self.workloads.get(&key);
        if let Some(cluster) = entry.as_ref().and_then(|entry| entry.fresh(snap)) {
            return cluster;
        }
        let w = known.workload();
        let make = || state::State::new(format!("encap|{port}||{}.{}", w.name, w.namespace).into(), Arc::clone(&self.reach));
        let entry = entry.unwrap_or_else(|| self.workloads.get_or_insert(&key, make, IDLE_WORKLOADS));
        entry.follow(snap, |c| c.is_of_workload(known), |state| build::workload(state, known, port, &self.plain))
    }

    /// Brings every cluster to this version and forgets those gone from the mesh. Called after a publish, from the control
    /// thread, so that no request pays for building a table.
    pub fn collect(&self, snap: &Snapshot) {
        self.reach.describe(self.me.find(snap));
        let known = |key: &ClusterKey| {
            let service = snap.find_service(&key.service).is_some_and(|s| s.port(key.port).is_some());
            let subset = key.subset.as_deref();
            service && subset.is_none_or(|s| snap.find_destination(&key.service).is_some_and(|d| d.subsets.contains_key(s)))
        };
        self.clusters.retain(known);
        self.fronted.retain(|key| known(key) && is_fronted(snap, key, Role::Gateway));
        self.workloads.retain(|(uid, _)| snap.find_known(uid).is_some());
        for (key, _) in self.clusters.entries.load().iter() {
            // A destination that became unusable is refused when it is asked for.
            let _ = self.straight(snap, key);
        }
        for (key, _) in self.fronted.entries.load().iter() {
            let _ = self.by_waypoint(snap, key);
        }
        for ((uid, port), _) in self.workloads.entries.load().iter() {
            if let Some(known) = snap.find_known(uid) {
                self.workload(snap, known, *port);
            }
        }
    }

    /// Every cluster, for the admin endpoint.
    pub fn clusters(&self) -> Vec<ClusterView> {
        let (clusters, fronted) = (self.clusters.entries.load(), self.fronted.entries.load());
        let workloads = self.workloads.entries.load();
        // One of a name: a service may have been reached without its waypoint before.
        let straight = clusters.iter().filter(|(key, _)| fronted.get(*key).is_none()).map(|(_, entry)| entry);
        let entries = straight.chain(fronted.values()).chain(workloads.values());
        let mut all: Vec<ClusterView> = entries.filter_map(|e| e.current.load_full()).map(|c| view::of(&c)).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Ends the tunnels to peers that `bundles` no longer trusts; how many.
    pub fn rejudge(&self, bundles: &TrustBundles) -> usize {
        self.reach.rejudge(bundles)
    }

    /// Tunnels of every data thread, for the admin endpoint.
    pub fn tunnels(&self) -> Vec<mesh_hbone::pool::PoolStats> {
        self.reach.tunnels()
    }
}

#[cfg(test)]
mod tests;
