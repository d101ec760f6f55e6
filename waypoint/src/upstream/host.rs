//! One endpoint of a cluster: what the mesh says of it, and what traffic taught.
use super::pool::{Shelf, ShelfKey};
use http::HeaderValue;
use mesh_model::known::Known;
use mesh_model::l7::outlier::{Ejection, Monitor};
use mesh_model::l7::session;
use mesh_model::workload::Workload;
use mesh_model::{HboneAuthority, SpiffeId};
use parking_lot::Mutex;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use tokio::time::Instant;

/// An endpoint as one version of the mesh has it. Its state is shared with the versions before and after.
#[derive(Debug)]
pub struct Host {
    pub(super) known: Arc<Known>,
    pub(super) target: Target,
    pub(super) weight: u32,
    pub(super) state: Arc<HostState>,
}

/// How an endpoint is reached; another target is another endpoint, with pools and health of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Address; unspecified while `name` was not looked up.
    pub addr: SocketAddr,
    /// Name to look up when it has no address.
    pub name: Option<Arc<str>>,
    /// Through a tunnel to its node agent.
    pub hbone: bool,
    /// Who may answer there.
    pub expect: Arc<[SpiffeId]>,
    /// Set where that is no endpoint of the service but who leads to them.
    pub lead: Option<Arc<Lead>>,
}

/// Who is asked for a service, to be led to an endpoint of its choice.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lead {
    /// The service's waypoint, which is asked for this: a gateway's way, where that is wanted.
    Waypoint(HboneAuthority),
    /// The gateway of another network.
    Network(Beyond),
}

/// A service on another network: reached in a tunnel within the one to the gateway.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Beyond {
    /// What both tunnels ask for: the service by name.
    pub authority: HboneAuthority,
    /// Who may end the inner one.
    pub expect: Arc<[SpiffeId]>,
    /// Our own network, which both ends are told.
    pub from: Option<HeaderValue>,
    /// Who ends the inner one is a waypoint of the service, which nobody passed yet.
    pub by_waypoint: bool,
}

/// What traffic changes about an endpoint.
#[derive(Debug)]
pub(super) struct HostState {
    /// Requests and raw connections on their way.
    pub active: AtomicU32,
    pub requests: AtomicU64,
    pub failures: AtomicU64,
    pub connections: AtomicU32,
    pub monitor: Monitor,
    pub ejected: AtomicBool,
    pub ejection: Mutex<Ejection>,
    pub joined: Instant,
    /// No longer in the cluster: connections are not kept for it.
    gone: AtomicBool,
    /// Address its name had last.
    pub resolved: Mutex<Option<IpAddr>>,
    /// Connections by data thread; made at first use, most endpoints of a large mesh are never used.
    shelves: OnceLock<Box<[Shelves]>>,
    threads: usize,
}

type Shelves = Mutex<Vec<Arc<Shelf>>>;

impl HostState {
    pub fn new(threads: usize) -> Arc<Self> {
        Arc::new(Self {
            active: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            connections: AtomicU32::new(0),
            monitor: Monitor::default(),
            ejected: AtomicBool::new(false),
            ejection: Mutex::default(),
            joined: Instant::now(),
            gone: AtomicBool::new(false),
            resolved: Mutex::default(),
            shelves: OnceLock::new(),
            threads: threads.max(1),
        })
    }

    pub fn is_gone(&self) -> bool {
        self.gone.load(Relaxed)
    }

    /// The connections of this thread that suit `key`.
    pub fn shelf(self: &Arc<Self>, key: &ShelfKey<'_>) -> Arc<Shelf> {
        let shelves = self.shelves.get_or_init(|| (0..self.threads).map(|_| Mutex::default()).collect());
        // A thread that is no data thread (tests, the control thread) shares the first one's.
        let thread = mesh_runtime::threads::current().unwrap_or_default();
        let Some(shelves) = shelves.get(thread).or(shelves.first()) else {
            // There is at least one thread.
            return Shelf::new(self, key);
        };
        let mut shelves = shelves.lock();
        if let Some(shelf) = shelves.iter().find(|s| s.suits(key)) {
            return Arc::clone(shelf);
        }
        // Keys with a client's address or a request's host come and go.
        shelves.retain(|s| !s.is_bare());
        let shelf = Shelf::new(self, key);
        shelves.push(Arc::clone(&shelf));
        shelf
    }

    /// It left the cluster: idle connections are closed, requests under way go on.
    pub fn leave(&self) {
        self.gone.store(true, Relaxed);
        self.renew();
    }
    /// What connections it has get no further request: idle ones are closed, the others when theirs are over.
    pub fn renew(&self) {
        for shelves in self.shelves.get().into_iter().flatten() {
            let all = std::mem::take(&mut *shelves.lock());
            for shelf in all {
                shelf.clear();
            }
        }
    }
}

impl Host {
    /// The workload.
    pub fn workload(&self) -> &Arc<Workload> {
        self.known.workload()
    }
    /// Its address and own port; for a name, the address it had last (unspecified before the first look-up).
    pub fn addr(&self) -> SocketAddr {
        match (&self.target.name, *self.state.resolved.lock()) {
            (Some(_), Some(ip)) => SocketAddr::new(ip, self.target.addr.port()),
            _ => self.target.addr,
        }
    }
    /// What it is called in sessions.
    pub(crate) fn session_name(&self) -> u64 {
        session::endpoint(self.known.uid(), self.target.addr)
    }
    /// Who it must prove to be; `None` when it is reached in plain, and behind a gateway where it may be one of several.
    pub fn identity(&self) -> Option<&SpiffeId> {
        match self.target.lead.as_deref() {
            None | Some(Lead::Waypoint(_)) => self.target.hbone.then(|| self.target.expect.first()).flatten(),
            Some(Lead::Network(beyond)) => beyond.expect.first().filter(|_| beyond.expect.len() == 1),
        }
    }
    /// Whether it is reached through a tunnel.
    pub fn is_hbone(&self) -> bool {
        self.target.hbone
    }
    /// Whether outlier detection keeps requests away from it.
    pub fn is_ejected(&self) -> bool {
        self.state.ejected.load(Relaxed)
    }
    /// Requests and raw connections on their way to it.
    pub fn active(&self) -> u32 {
        self.state.active.load(Relaxed)
    }
    /// Whether both are the same endpoint, perhaps of different versions.
    pub fn is_same(&self, other: &Host) -> bool {
        Arc::ptr_eq(&self.state, &other.state)
    }
}
