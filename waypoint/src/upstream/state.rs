//! What traffic changes about a cluster: counts against limits, health, the queue for connections.
use super::build::{self, Listed};
use super::cluster::{Asked, Cluster, Placement};
use super::error::{Failure, UpstreamError};
use super::host::{Host, HostState, Target};
use super::pool::Shelf;
use super::transport::Reach;
use arc_swap::ArcSwap;
use mesh_model::l7::breaker::{Lately, count_up};
use mesh_model::l7::destination::{OutlierPolicy, TrafficPolicy};
use mesh_model::l7::outlier::{self, Cause};
use mesh_model::workload::WorkloadUid;
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::Instant;

/// The state of one cluster.
#[derive(Debug)]
pub(super) struct State {
    pub name: Arc<str>,
    pub reach: Arc<Reach>,
    /// Of the newest version: what connections are made and counted by, whichever version the request for one goes by.
    pub policy: ArcSwap<TrafficPolicy>,
    /// Connections, those being made included.
    pub connections: AtomicU32,
    /// Requests that wait for a connection, those for which one is being made among them.
    pub pending: AtomicU32,
    /// Requests that have a connection.
    pub requests: AtomicU32,
    /// Requests admitted and not over, wherever they are.
    pub admitted: AtomicU32,
    /// Requests admitted lately, where a retry budget goes by those.
    lately: Lately,
    /// Retries under way.
    pub retries: AtomicU32,
    pub counters: Counters,
    /// A session was asked for: endpoints are found by their names in sessions.
    pub sessions: AtomicBool,
    /// Picks so far, for round robin.
    turn: AtomicU64,
    /// Shelves with requests that wait for a connection to be allowed.
    starving: Mutex<VecDeque<Weak<Shelf>>>,
    /// Endpoints by workload and address.
    hosts: Mutex<Hosts>,
    /// Endpoints made for original destinations.
    passed: Mutex<HashMap<Asked, Arc<Host>>>,
    /// The newest version. Also the lock under which endpoints are ejected; never held while a table is made.
    live: Mutex<Live>,
    /// Held by who makes a version, or its endpoints: one after another.
    pub making: Mutex<()>,
    started: Instant,
    ticking: AtomicBool,
}

#[derive(Debug, Default)]
struct Live {
    cluster: Weak<Cluster>,
    /// How often an endpoint was ejected or came back.
    turns: u64,
}

type Hosts = HashMap<(WorkloadUid, SocketAddr), (Target, Arc<HostState>)>;

/// Events since the cluster was made.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub requests: AtomicU64,
    pub connections: AtomicU64,
    pub connect_failures: AtomicU64,
    pub connection_overflows: AtomicU64,
    pub pending_overflows: AtomicU64,
    pub request_overflows: AtomicU64,
    pub retries: AtomicU64,
    pub retry_overflows: AtomicU64,
    pub ejections: AtomicU64,
    pub ejection_overflows: AtomicU64,
}

pub(super) fn note(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

impl State {
    pub fn new(name: Arc<str>, reach: Arc<Reach>) -> Arc<Self> {
        Arc::new(Self {
            name,
            reach,
            policy: ArcSwap::default(),
            connections: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            admitted: AtomicU32::new(0),
            lately: Lately::default(),
            retries: AtomicU32::new(0),
            counters: Counters::default(),
            sessions: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            starving: Mutex::default(),
            hosts: Mutex::default(),
            passed: Mutex::default(),
            live: Mutex::default(),
            making: Mutex::default(),
            started: Instant::now(),
            ticking: AtomicBool::new(false),
        })
    }

    pub fn next_turn(&self) -> u64 {
        self.turn.fetch_add(1, Relaxed)
    }

    /// The state of an endpoint: what it was if it is reached as before, else new.
    pub fn host(&self, uid: &WorkloadUid, target: &Target) -> Arc<HostState> {
        let hosts = self.hosts.lock();
        match hosts.get(&(Arc::clone(uid), target.addr)) {
            Some((before, state)) if before == target && !state.is_gone() => Arc::clone(state),
            _ => HostState::new(self.reach.threads()),
        }
    }

    /// Makes a freshly built version the one that counts: endpoints it does not have leave.
    pub fn install(self: &Arc<Self>, mut cluster: Cluster, listed: Vec<Listed>) -> Arc<Cluster> {
        let former = self.policy.swap(Arc::clone(&cluster.policy));
        let making = self.making.lock();
        let turns = self.live.lock().turns;
        let (hosts, places) = build::hosts(self, &listed);
        cluster.wildcard = hosts.iter().find(|h| h.target.name.as_deref().is_some_and(build::is_wildcard)).cloned();
        if listed.iter().any(|endpoint| endpoint.named.is_some()) {
            cluster.listed = listed.into();
        }
        let cluster = Arc::new(cluster);
        self.populate(&cluster, hosts, places);
        if self.go_live(&cluster, turns) {
            cluster.plan_anew();
        }
        drop(making);
        let stays = self.hosts.lock();
        if !cluster.policy.has_connections_of(&former) {
            stays.values().for_each(|(_, state)| state.renew());
            self.passed.lock().values().for_each(|host| host.state.renew());
        }
        drop(stays);
        // More may be allowed than before.
        while self.connections.load(Relaxed) < cluster.policy.pool.max_connections && !self.starving.lock().is_empty() {
            self.feed();
        }
        cluster
    }

    /// Makes a version with endpoints the newest. Whether health is not what it was at this count of turns, when its table was begun.
    fn go_live(&self, cluster: &Arc<Cluster>, turns: u64) -> bool {
        let mut live = self.live.lock();
        live.cluster = Arc::downgrade(cluster);
        if cluster.policy.outlier.is_none() {
            for host in cluster.hosts().iter() {
                host.state.ejection.lock().pardon();
                live.turns += u64::from(host.state.ejected.swap(false, Relaxed));
            }
        }
        live.turns != turns
    }

    /// Makes these the endpoints of a version: those of the one before that are not among them leave.
    fn populate(&self, cluster: &Cluster, hosts: Vec<Arc<Host>>, places: Vec<Placement>) {
        let key = |h: &Arc<Host>| (Arc::clone(h.known.uid()), h.target.addr);
        let now = hosts.iter().map(|h| (key(h), (h.target.clone(), Arc::clone(&h.state)))).collect();
        cluster.adopt(hosts, places);
        let mut stays = self.hosts.lock();
        let before = std::mem::replace(&mut *stays, now);
        for (key, (_, state)) in &before {
            if !stays.get(key).is_some_and(|(_, s)| Arc::ptr_eq(s, state)) {
                state.leave();
            }
        }
    }

    /// The addresses of a name among the endpoints changed.
    pub fn readdress(&self) {
        let _making = self.making.lock();
        let live = self.live.lock().cluster.upgrade();
        if let Some(cluster) = live.filter(|cluster| !cluster.listed.is_empty()) {
            let (hosts, places) = build::hosts(self, &cluster.listed);
            self.populate(&cluster, hosts, places);
        }
    }

    /// The cluster is gone from the mesh.
    pub fn leave(&self) {
        for (_, state) in std::mem::take(&mut *self.hosts.lock()).into_values() {
            state.leave();
        }
        for host in std::mem::take(&mut *self.passed.lock()).into_values() {
            host.state.leave();
        }
    }

    /// Whether anything is under way.
    pub fn is_used(&self) -> bool {
        self.connections.load(Relaxed) > 0 || self.admitted.load(Relaxed) > 0
    }

    /// The endpoint made for what a client asked for.
    pub fn passed(&self, to: Asked, make: impl FnOnce() -> Arc<Host>) -> Arc<Host> {
        /// Beyond it those nobody uses are forgotten, with their idle connections.
        const MOST: usize = 1024;
        let mut passed = self.passed.lock();
        if let Some(host) = passed.get(&to) {
            return Arc::clone(host);
        }
        if passed.len() >= MOST {
            passed.retain(|_, host| Arc::strong_count(host) > 1 || host.active() > 0);
        }
        let host = make();
        passed.insert(to, Arc::clone(&host));
        host
    }

    /// A connection within `maxConnections`, or beyond it when `forced` (a pool always gets its first).
    pub fn permit(self: &Arc<Self>, host: &Arc<HostState>, forced: bool) -> Option<ConnectionGuard> {
        if !count_up(&self.connections, self.policy.load().pool.max_connections) {
            if !forced {
                return None;
            }
            self.connections.fetch_add(1, Relaxed);
        }
        note(&self.counters.connections);
        host.connections.fetch_add(1, Relaxed);
        Some(ConnectionGuard { state: Arc::clone(self), host: Arc::clone(host), flight: None })
    }

    /// A place among the requests that wait.
    pub fn wait(self: &Arc<Self>, limit: u32) -> Result<Pending, UpstreamError> {
        if count_up(&self.pending, limit) {
            return Ok(Pending(Arc::new(Place { state: Arc::clone(self), held: AtomicBool::new(true) })));
        }
        note(&self.counters.pending_overflows);
        Err(overflow())
    }

    /// To be told when a connection is allowed again.
    pub fn starve(&self, shelf: &Arc<Shelf>) {
        self.starving.lock().push_back(Arc::downgrade(shelf));
    }

    /// Gives a request its place on a connection.
    pub fn attach(self: &Arc<Self>, host: &Arc<HostState>, limit: u32) -> Result<InFlight, UpstreamError> {
        if !count_up(&self.requests, limit) {
            note(&self.counters.request_overflows);
            return Err(overflow());
        }
        host.active.fetch_add(1, Relaxed);
        note(&host.requests);
        Ok(InFlight { state: Arc::clone(self), host: Arc::clone(host) })
    }

    pub fn admit(self: &Arc<Self>, policy: &TrafficPolicy) -> Result<RequestGuard, UpstreamError> {
        if self.requests.load(Relaxed) >= policy.pool.max_requests {
            note(&self.counters.request_overflows);
            return Err(overflow());
        }
        if let Some(interval) = policy.retry_budget.and_then(|budget| budget.interval) {
            self.lately.note(self.now(), interval);
        }
        note(&self.counters.requests);
        self.admitted.fetch_add(1, Relaxed);
        Ok(RequestGuard { state: Arc::clone(self), stream: Mutex::new(None) })
    }

    pub fn admit_retry(self: &Arc<Self>, policy: &TrafficPolicy) -> Option<RetryGuard> {
        let interval = policy.retry_budget.and_then(|budget| budget.interval);
        let lately = interval.map_or(0, |interval| self.lately.count(self.now(), interval));
        if !count_up(&self.retries, policy.most_retries(self.admitted.load(Relaxed).max(lately))) {
            note(&self.counters.retry_overflows);
            return None;
        }
        note(&self.counters.retries);
        Some(RetryGuard(Arc::clone(self)))
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// A count of `host` is full: ejects it if the policy allows one more.
    pub fn eject(self: &Arc<Self>, host: &Arc<HostState>, policy: &OutlierPolicy, cause: Cause) {
        // Without a runtime nobody could end the ejection.
        if tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let mut live = self.live.lock();
        host.monitor.reset(cause);
        // A newer version may have no such policy, and nothing that would end an ejection.
        let Some(cluster) = live.cluster.upgrade().filter(|cluster| cluster.policy.outlier.is_some()) else { return };
        if host.ejected.load(Relaxed) || host.is_gone() {
            return;
        }
        let hosts = cluster.hosts();
        let active = hosts.iter().filter(|h| h.is_ejected()).count();
        if !outlier::may_eject(policy, active, hosts.len()) {
            note(&self.counters.ejection_overflows);
            return;
        }
        host.ejection.lock().eject(policy, self.now());
        host.ejected.store(true, Relaxed);
        live.turns += 1;
        note(&self.counters.ejections);
        if !self.ticking.swap(true, Relaxed) {
            tokio::spawn(watch(Arc::downgrade(self), policy.interval));
        }
        drop(live);
        cluster.replan();
    }

    /// One look at the ejected endpoints; when to look again, if at all.
    fn tick(self: &Arc<Self>) -> Option<Duration> {
        let mut live = self.live.lock();
        let found = live.cluster.upgrade().and_then(|cluster| Some((cluster.policy.outlier.clone()?, cluster)));
        let Some((policy, cluster)) = found else {
            self.ticking.store(false, Relaxed);
            return None;
        };
        let (mut changed, mut settled) = (false, true);
        for host in cluster.hosts().iter() {
            let mut ejection = host.state.ejection.lock();
            if ejection.tick(&policy, self.now()) {
                host.state.monitor.reset_all();
                host.state.ejected.store(false, Relaxed);
                live.turns += 1;
                changed = true;
            }
            settled &= ejection.is_settled();
        }
        if settled {
            // Under the lock that ejecting takes: the next ejection starts a watch of its own.
            self.ticking.store(false, Relaxed);
        }
        drop(live);
        if changed {
            cluster.replan();
        }
        (!settled).then_some(policy.interval)
    }

    /// A connection is allowed again: whoever waits longest may make one.
    fn feed(self: &Arc<Self>) {
        loop {
            let next = self.starving.lock().pop_front();
            match next {
                None => return,
                Some(shelf) => {
                    if shelf.upgrade().is_some_and(|shelf| shelf.fed()) {
                        return;
                    }
                }
            }
        }
    }
}

/// Ends ejections whose time is over, for as long as there is anything to end or to forgive.
async fn watch(state: Weak<State>, mut interval: Duration) {
    loop {
        tokio::time::sleep(interval.max(Duration::from_millis(1))).await;
        match state.upgrade().and_then(|state| state.tick()) {
            Some(next) => interval = next,
            None => return,
        }
    }
}

pub(super) fn overflow() -> UpstreamError {
    UpstreamError::new(Failure::Overflow, "")
}

/// One connection of a cluster, counted against `maxConnections`; to be held as long as the connection.
#[derive(Debug)]
#[must_use = "the connection counts only while the guard is held"]
pub struct ConnectionGuard {
    state: Arc<State>,
    host: Arc<HostState>,
    /// The one request or raw connection on it, when it is not pooled.
    flight: Option<InFlight>,
}
impl ConnectionGuard {
    pub(super) fn with(mut self, flight: InFlight) -> Self {
        self.flight = Some(flight);
        self
    }
}
impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.flight = None;
        self.host.connections.fetch_sub(1, Relaxed);
        self.state.connections.fetch_sub(1, Relaxed);
        self.state.feed();
    }
}

/// A request that waits, until it is dropped at the latest.
#[derive(Debug)]
pub(super) struct Pending(Arc<Place>);
impl Pending {
    pub fn place(&self) -> Arc<Place> {
        Arc::clone(&self.0)
    }
}
impl Drop for Pending {
    fn drop(&mut self) {
        self.0.free();
    }
}
/// Its place, for who ends the waiting: freed at once, and not when the request comes to know.
#[derive(Debug)]
pub(super) struct Place {
    state: Arc<State>,
    held: AtomicBool,
}
impl Place {
    pub fn free(&self) {
        if self.held.swap(false, Relaxed) {
            self.state.pending.fetch_sub(1, Relaxed);
        }
    }
}

/// A request on a connection: counted against `http2MaxRequests` and as its endpoint's load.
#[derive(Debug)]
pub(super) struct InFlight {
    state: Arc<State>,
    host: Arc<HostState>,
}
impl Drop for InFlight {
    fn drop(&mut self) {
        self.host.active.fetch_sub(1, Relaxed);
        self.state.requests.fetch_sub(1, Relaxed);
    }
}

/// A request, from admission until the last byte of its response. Held by the exchange; handed to [`super::send`], which
/// leaves in it what must live as long as a response on a shared connection.
#[derive(Debug)]
#[must_use = "the request counts only while the guard is held"]
pub struct RequestGuard {
    state: Arc<State>,
    stream: Mutex<Option<super::pool::StreamHold>>,
}
impl RequestGuard {
    pub(super) fn keep(&self, stream: super::pool::StreamHold) {
        let before = self.stream.lock().replace(stream);
        // Its end may wake others: not under the lock.
        drop(before);
    }
}
impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.state.admitted.fetch_sub(1, Relaxed);
    }
}

/// A retry under way.
#[derive(Debug)]
#[must_use = "the retry counts only while the guard is held"]
pub struct RetryGuard(Arc<State>);
impl Drop for RetryGuard {
    fn drop(&mut self) {
        self.0.retries.fetch_sub(1, Relaxed);
    }
}
