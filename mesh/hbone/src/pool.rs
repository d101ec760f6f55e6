//! Tunnels by destination, for one data thread.
//!
//! Owns which tunnels exist, which of them gets the next stream, and when to dial another. It refuses to hand out a tunnel
//! that is full, dead or going away, to let many waiters dial the same place at once, and to dial on and on for a peer that
//! allows few streams per tunnel or none. Upstream: the agent's outbound
//! shell. Downstream: [`Dialer`] (TCP and TLS, the agent's) and [`Tunnel`].
//!
//! Each data thread has a pool of its own, so that several tunnels per destination arise by themselves and no stream wakes
//! another thread. The mutex is never contended and never held across an await.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};

use mesh_model::{Reason, SpiffeId};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use crate::client::{ConnectRequest, EndHandle, ResponseHead, Slot, Tunnel};
use crate::error::HboneError;
use crate::settings::Settings;
use crate::stream::{HboneIo, HboneStream};

/// What makes two connections share a tunnel. The hash is computed once; clones are two reference counts.
#[derive(Clone)]
pub struct PoolKey {
    source: SpiffeId,
    expect: Arc<[SpiffeId]>,
    source_ip: IpAddr,
    dial: SocketAddr,
    hash: u64,
}

impl PoolKey {
    /// `source`: whose certificate is shown; `expect`: who may answer; `source_ip`: the client pod, in whose network
    /// namespace the dial happens; `dial`: the peer's HBONE address.
    pub fn new(source: SpiffeId, expect: Arc<[SpiffeId]>, source_ip: IpAddr, dial: SocketAddr) -> Self {
        let mut hasher = DefaultHasher::new();
        (&source, &expect, source_ip, dial).hash(&mut hasher);
        Self { source, expect, source_ip, dial, hash: hasher.finish() }
    }

    /// Whose certificate is shown.
    pub fn source(&self) -> &SpiffeId {
        &self.source
    }

    /// Who may answer.
    pub fn expect(&self) -> &Arc<[SpiffeId]> {
        &self.expect
    }

    /// The client pod's address.
    pub fn source_ip(&self) -> IpAddr {
        self.source_ip
    }

    /// The peer's HBONE address.
    pub fn dial(&self) -> SocketAddr {
        self.dial
    }
}

impl PartialEq for PoolKey {
    fn eq(&self, other: &Self) -> bool {
        // All of it: a hash collision must not let one identity use another's tunnel.
        self.hash == other.hash
            && self.dial == other.dial
            && self.source_ip == other.source_ip
            && self.source == other.source
            && (Arc::ptr_eq(&self.expect, &other.expect) || self.expect == other.expect)
    }
}
impl Eq for PoolKey {}
impl Hash for PoolKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}
impl fmt::Debug for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from {} to {}", self.source, self.source_ip, self.dial)
    }
}

/// Passes the precomputed hash through.
#[derive(Default)]
struct Precomputed(u64);

impl Hasher for Precomputed {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        // Not reached by PoolKey; kept correct all the same.
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// Makes the authenticated transport of a tunnel: TCP in the pod's network namespace, then TLS. Timeouts are its own.
pub trait Dialer: Send + Sync + 'static {
    /// The transport.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// Dials `key.dial()` as `key.source()`, expecting one of `key.expect()`.
    fn dial(&self, key: &PoolKey) -> impl Future<Output = Result<Self::Io, HboneError>> + Send;
}

/// A pool. Clones share it.
pub struct Pool<D: Dialer>(Arc<Inner<D>>);

impl<D: Dialer> Clone for Pool<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D: Dialer> fmt::Debug for Pool<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

struct Inner<D> {
    dialer: D,
    settings: Arc<Settings>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    keys: HashMap<PoolKey, Destination, BuildHasherDefault<Precomputed>>,
    next_id: u64,
    closed: bool,
    /// After [`Pool::drain`]: tunnels that live for their streams only.
    draining: Vec<(PoolKey, EndHandle)>,
}

#[derive(Default)]
struct Destination {
    tunnels: Vec<(u64, Tunnel)>,
    dialing: Option<Dialing>,
}

/// How a dial ended; `None` until it is decided. The dial's task owns the sender.
type Outcome = watch::Receiver<Option<Result<Tunnel, HboneError>>>;

/// A dial in progress.
struct Dialing {
    /// The tunnel's id to be. A dial whose id is not the destination's was given up and has no say any more.
    id: u64,
    outcome: Outcome,
    task: tokio::task::AbortHandle,
}

/// Tunnels and streams of a pool, for the admin endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Destinations known.
    pub keys: usize,
    /// Tunnels that are open.
    pub tunnels: usize,
    /// Dials in progress.
    pub dialing: usize,
    /// Streams open.
    pub streams: usize,
}

/// One destination of a pool, for the admin endpoint.
#[derive(Clone, Debug)]
pub struct KeyStats {
    /// The destination.
    pub key: PoolKey,
    /// Streams on each of its tunnels.
    pub tunnels: Vec<usize>,
    /// Whether another is being dialed.
    pub dialing: bool,
}

/// A stream in a tunnel in a tunnel.
#[derive(Debug)]
pub struct Nested<P> {
    /// The stream.
    pub stream: HboneStream,
    /// How it was answered.
    pub head: ResponseHead,
    /// Who answered.
    pub peer: P,
    /// Its tunnel, and the one around that.
    pub tunnels: [Tunnel; 2],
}

/// What [`Inner::find`] decided.
enum Found {
    Slot(Tunnel, Slot),
    /// Wait for a dial; `started` on account of this call.
    Wait {
        outcome: Outcome,
        started: bool,
    },
}

impl<D: Dialer> Pool<D> {
    /// An empty pool; to be used from within one runtime.
    pub fn new(dialer: D, settings: Arc<Settings>) -> Self {
        Self(Arc::new(Inner { dialer, settings, state: Mutex::new(State::default()) }))
    }

    /// Opens a stream to `key`, on a tunnel that has room or on a new one.
    ///
    /// A stream that a reused tunnel certainly did not process (refused, or the tunnel went away under it) is opened once
    /// more. All callers waiting for one dial share its failure. Fails with `Overloaded` when the peer allows no streams, or
    /// so few that [`MAX_DIALS`] or [`MAX_MEAGRE_TUNNELS`] is reached; with `Draining` after [`Self::drain`]; with `Revoked`
    /// when [`Self::close_where`] matched meanwhile.
    pub async fn open(&self, key: &PoolKey, request: &ConnectRequest) -> Result<(HboneStream, ResponseHead), HboneError> {
        self.open_on(key, request).await.map(|(opened, _)| opened)
    }

    /// As [`Self::open`], with the tunnel the stream is in: who keeps a stream for later asks it whether the peer is leaving.
    pub async fn open_on(
        &self,
        key: &PoolKey,
        request: &ConnectRequest,
    ) -> Result<((HboneStream, ResponseHead), Tunnel), HboneError> {
        let mut retried = false;
        let mut dials = 0;
        // Each turn either opens, fails, or waits for a dial; a dial's slots can be taken by others before us.
        for _ in 0..MAX_TURNS {
            let mut outcome = match self.0.find(key, dials < MAX_DIALS)? {
                Found::Slot(tunnel, slot) => match tunnel.open_in(slot, request).await {
                    // Not to be dialed again on account of a caller from before the revocation.
                    Err(_) if tunnel.is_aborted() => return Err(self.0.closed_meanwhile()),
                    Err(error) if error.unprocessed && !retried => {
                        retried = true;
                        continue;
                    }
                    done => return done.map(|opened| (opened, tunnel)),
                },
                Found::Wait { outcome, started } => {
                    dials += usize::from(started);
                    outcome
                }
            };
            let decided = outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
            match decided {
                Some(Ok(tunnel)) if tunnel.is_aborted() => return Err(self.0.closed_meanwhile()),
                Some(Ok(tunnel)) if tunnel.max_streams() == 0 => return Err(no_streams()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                None => return Err(self.0.closed_meanwhile()),
            }
        }
        Err(HboneError::new(Reason::Overloaded, "no tunnel with a free stream"))
    }

    /// A tunnel inside a tunnel (double HBONE): asks the gateway at `key` for a stream by `outer`, makes of it by `secure` (TLS) a
    /// stream to whoever the gateway leads to, and opens in that a tunnel for the one stream that `inner` asks for.
    ///
    /// The inner tunnel is never shared: else all streams would stick to one workload behind the gateway. An error says whether
    /// it happened [behind](HboneError::behind) the gateway.
    pub async fn open_within<IO, P, F>(
        &self,
        key: &PoolKey,
        outer: &ConnectRequest,
        secure: impl FnOnce(HboneIo) -> F,
        inner: &ConnectRequest,
    ) -> Result<Nested<P>, HboneError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        F: Future<Output = Result<(IO, P), HboneError>>,
    {
        let ((stream, _), around) = self.open_on(key, outer).await?;
        let within = async {
            let (io, peer) = secure(stream.into_io()).await?;
            let tunnel = Tunnel::handshake(io, Arc::clone(&self.0.settings), || {}).await?;
            let (stream, head) = tunnel.open(inner).await?;
            Ok((stream, head, peer, tunnel))
        };
        match within.await {
            Ok((stream, head, peer, tunnel)) => Ok(Nested { stream, head, peer, tunnels: [tunnel, around] }),
            Err(error) => Err(HboneError { behind: around.is_open(), ..error }),
        }
    }

    /// Ends at once every tunnel and dial whose key matches (revoked certificate, deleted pod). Their streams see
    /// [`crate::StreamError::Tunnel`]. Returns the number of tunnels.
    pub fn close_where(&self, mut matches: impl FnMut(&PoolKey) -> bool) -> usize {
        let mut gone = Vec::new();
        let draining = {
            let mut state = self.0.state.lock();
            state.keys.retain(|key, destination| {
                let close = matches(key);
                if close {
                    gone.push(std::mem::take(destination));
                }
                !close
            });
            state.draining.retain(|(_, tunnel)| !tunnel.has_ended());
            state.draining.extract_if(.., |(key, _)| matches(key)).collect::<Vec<_>>()
        };
        // Outside the lock: aborting may run a driver's destructor, which calls back.
        for (_, tunnel) in &draining {
            tunnel.abort();
        }
        draining.len() + gone.into_iter().map(Destination::abort).sum::<usize>()
    }

    /// Lets go of every tunnel, gives up dials in progress and starts no more: tunnels end with their last stream, or by
    /// [`Self::close_where`].
    pub fn drain(&self) {
        let keys = {
            let mut state = self.0.state.lock();
            state.closed = true;
            let keys = std::mem::take(&mut state.keys);
            for (key, destination) in &keys {
                let tunnels = destination.tunnels.iter().map(|(_, tunnel)| (key.clone(), tunnel.end_handle()));
                state.draining.extend(tunnels);
            }
            keys
        };
        for destination in keys.into_values() {
            if let Some(dialing) = destination.dialing {
                dialing.task.abort();
            }
            for (_, tunnel) in destination.tunnels {
                tunnel.close();
            }
        }
    }

    /// Counts.
    pub fn stats(&self) -> PoolStats {
        let state = self.0.state.lock();
        state.keys.values().fold(PoolStats { keys: state.keys.len(), ..PoolStats::default() }, |sum, destination| PoolStats {
            keys: sum.keys,
            tunnels: sum.tunnels + destination.tunnels.len(),
            dialing: sum.dialing + usize::from(destination.dialing.is_some()),
            streams: sum.streams + destination.tunnels.iter().map(|(_, tunnel)| tunnel.streams()).sum::<usize>(),
        })
    }

    /// Every destination.
    pub fn keys(&self) -> Vec<KeyStats> {
        let state = self.0.state.lock();
        state
            .keys
            .iter()
            .map(|(key, destination)| KeyStats {
                key: key.clone(),
                tunnels: destination.tunnels.iter().map(|(_, tunnel)| tunnel.streams()).collect(),
                dialing: destination.dialing.is_some(),
            })
            .collect()
    }
}

/// Turns one `open` may take. Each fresh tunnel serves a tunnel's worth of waiters, so this bounds the crowd that may wait
/// for one destination on one thread. Dials are bounded by the next two.
const MAX_TURNS: usize = 1024;

/// Dials one `open` may start.
pub const MAX_DIALS: usize = 3;

/// Tunnels per key and pool whose peer allows less than half of [`Settings::client_max_streams`]. Tunnels that take what we
/// would give them are not limited: there are only as many as our own pod's connections fill.
pub const MAX_MEAGRE_TUNNELS: usize = 16;

/// Every endpoint would be reached by way of this pool: no use in trying another.
fn draining() -> HboneError {
    HboneError { retry: false, ..HboneError::new(Reason::Draining, "the pool is closed") }
}

/// The peer's SETTINGS_MAX_CONCURRENT_STREAMS is 0.
fn no_streams() -> HboneError {
    HboneError::new(Reason::Overloaded, "the peer allows no streams on its tunnels")
}

impl Destination {
    /// Whether a dial may be started for a caller that found no slot. `within_share`: it has not started too many.
    fn may_dial(&self, within_share: bool, settings: &Settings) -> Result<(), HboneError> {
        let tunnels = self.tunnels.iter().map(|(_, tunnel)| tunnel);
        // Remembered by the tunnel itself, which goes at its driver's next tick: another dial would meet the same answer.
        if tunnels.clone().any(|tunnel| tunnel.max_streams() == 0 && tunnel.streams() == 0) {
            return Err(no_streams());
        }
        let meagre = tunnels.filter(|tunnel| tunnel.max_streams() < settings.client_max_streams.div_ceil(2)).count();
        if !within_share || meagre >= MAX_MEAGRE_TUNNELS {
            return Err(HboneError::new(Reason::Overloaded, "no tunnel with a free stream, the peer allows few on each"));
        }
        Ok(())
    }

    fn abort(self) -> usize {
        if let Some(dialing) = &self.dialing {
            dialing.task.abort();
        }
        for (_, tunnel) in &self.tunnels {
            tunnel.abort();
        }
        self.tunnels.len()
    }
}

impl<D: Dialer> Inner<D> {
    fn find(self: &Arc<Self>, key: &PoolKey, may_dial: bool) -> Result<Found, HboneError> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(draining());
        }
        let destination = match state.keys.entry(key.clone()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Destination::default()),
        };
        destination.tunnels.retain(|(_, tunnel)| tunnel.is_open());
        let count = destination.tunnels.len();
        // A dial that ended without a word (its task panicked) must not be waited for for ever.
        let dialing = destination.dialing.as_ref().filter(|dialing| !dialing.task.is_finished());
        let dialing = dialing.map(|dialing| dialing.outcome.clone());
        // The emptiest tunnel whose socket takes more; failing that the emptiest at all.
        let best = destination
            .tunnels
            .iter()
            .map(|(_, tunnel)| tunnel)
            .filter(|tunnel| tunnel.streams() < tunnel.max_streams())
            .min_by_key(|tunnel| (tunnel.is_busy(), tunnel.streams()));
        if let Some((tunnel, slot)) = best.and_then(|tunnel| Some((tunnel.clone(), tunnel.reserve()?))) {
            // Its socket is full and streams wait behind each other: the next ones get a tunnel of their own.
            if tunnel.is_busy() && count < self.settings.max_parallel_tunnels && dialing.is_none() {
                self.start_dial(&mut state, key);
            }
            return Ok(Found::Slot(tunnel, slot));
        }
        if let Some(outcome) = dialing {
            return Ok(Found::Wait { outcome, started: false });
        }
        if let Err(error) = destination.may_dial(may_dial, &self.settings) {
            if count == 0 {
                state.keys.remove(key);
            }
            return Err(error);
        }
        Ok(Found::Wait { outcome: self.start_dial(&mut state, key), started: true })
    }

    /// Why a tunnel or a dial ended by our own doing.
    fn closed_meanwhile(&self) -> HboneError {
        if self.state.lock().closed {
            return draining();
        }
        // Unlike an established connection that is cut, this one was not judged: an attempt from the start is, by the
        // configuration and the certificates of then.
        HboneError { retry: true, ..HboneError::new(Reason::Revoked, "the tunnel was closed while the stream was being opened") }
    }

    /// Dials on a task of its own, so that a waiter that gives up takes nobody else's dial with it.
    fn start_dial(self: &Arc<Self>, state: &mut State, key: &PoolKey) -> Outcome {
        let (decide, outcome) = watch::channel(None);
        let id = state.next_id;
        state.next_id += 1;
        let pool = Arc::clone(self);
        let dialed = key.clone();
        let task = tokio::spawn(async move {
            // Given up: its waiters learn it from the dropped sender.
            if let Some(result) = pool.dial(&dialed, id).await {
                decide.send_replace(Some(result));
            }
        })
        .abort_handle();
        if let Some(destination) = state.keys.get_mut(key) {
            destination.dialing = Some(Dialing { id, outcome: outcome.clone(), task });
        }
        outcome
    }

    /// `None` when the pool was drained or the key closed meanwhile, also if another dial to it is under way by now: an
    /// abort does not stop a task in the middle of a turn.
    async fn dial(self: &Arc<Self>, key: &PoolKey, id: u64) -> Option<Result<Tunnel, HboneError>> {
        let result = self.connect(key, id).await;
        let mut state = self.state.lock();
        let wanted = state.keys.get_mut(key).filter(|found| found.dialing.as_ref().is_some_and(|dialing| dialing.id == id));
        let Some(destination) = wanted else {
            drop(state);
            if let Ok(tunnel) = result {
                tunnel.abort();
            }
            return None;
        };
        destination.dialing = None;
        Some(match result {
            Ok(tunnel) if tunnel.is_open() => {
                destination.tunnels.push((id, tunnel.clone()));
                Ok(tunnel)
            }
            result => {
                let error = result.err().unwrap_or_else(|| {
                    HboneError::new(Reason::H2Failure, "the peer closed the tunnel right after the handshake")
                });
                if destination.tunnels.is_empty() {
                    state.keys.remove(key);
                }
                Err(error)
            }
        })
    }

    async fn connect(self: &Arc<Self>, key: &PoolKey, id: u64) -> Result<Tunnel, HboneError> {
        let io = self.dialer.dial(key).await?;
        let pool: Weak<Self> = Arc::downgrade(self);
        let closed = key.clone();
        Tunnel::handshake(io, Arc::clone(&self.settings), move || {
            if let Some(pool) = pool.upgrade() {
                pool.forget(&closed, id);
            }
        })
        .await
    }

    /// A tunnel ended or was unused for too long.
    fn forget(&self, key: &PoolKey, id: u64) {
        let mut dropped = None;
        let mut state = self.state.lock();
        if let Some(destination) = state.keys.get_mut(key) {
            if let Some(at) = destination.tunnels.iter().position(|(other, _)| *other == id) {
                dropped = Some(destination.tunnels.swap_remove(at));
            }
            if destination.tunnels.is_empty() && destination.dialing.is_none() {
                state.keys.remove(key);
            }
        }
        drop(state);
        drop(dropped);
    }
}
