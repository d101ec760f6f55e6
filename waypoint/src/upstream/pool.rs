//! Connections to one endpoint from one data thread.
//!
//! A [`Shelf`] holds the connections of one kind (protocol, TLS, PROXY protocol). HTTP/1 connections carry one request at a
//! time and the last one used is used next; HTTP/2 connections are shared. Who finds none makes one if the cluster's limit
//! allows, or if the shelf has none at all (as Envoy's pools do), and otherwise waits, first come first served: for a
//! connection that is given back, or for leave to make one.
//!
//! Nobody watches a connection but its own task: it gives the connection back once hyper is ready for another request, ends
//! it when it was idle for too long, and takes it off the shelf when it ends. Locks: a shelf's is held for a few
//! instructions and taken by other threads only to close or to feed; no [`ConnectionGuard`] is dropped under it.
use super::cluster::Cluster;
use super::error::{Failure, UpstreamError};
use super::host::{Host, HostState};
use super::state::{ConnectionGuard, InFlight, Pending, Place};
use super::transport::{self, Tunnels};
use crate::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh_model::l7::destination::{Http2Keepalive, PoolLimits, ProxyVersion, UpstreamTls};
use mesh_model::telemetry::context::TraceParent;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::task::Poll;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

/// What makes two requests share connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct ShelfKey<'a> {
    /// HTTP/2 is spoken.
    pub http2: bool,
    /// The client, where the connection names it (PROXY protocol).
    pub client: Option<SocketAddr>,
    /// Server name, where it follows the request.
    pub sni: Option<&'a str>,
    /// TLS.
    pub tls: Option<&'a Arc<UpstreamTls>>,
    /// PROXY protocol.
    pub proxy: Option<ProxyVersion>,
}

/// The connections of one kind.
#[derive(Debug)]
pub(super) struct Shelf {
    http2: bool,
    client: Option<SocketAddr>,
    sni: Option<Arc<str>>,
    tls: Option<Arc<UpstreamTls>>,
    proxy: Option<ProxyVersion>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// HTTP/1 connections without a request, the last used at the end.
    idle: Vec<Idle>,
    /// HTTP/2 connections that take streams.
    shared: Vec<Arc<SharedConn>>,
    /// Connections and dials.
    open: u32,
    dialing: u32,
    waiting: VecDeque<Waiter>,
    /// It is in the cluster's queue for leave to connect.
    listed: bool,
    /// The endpoint is gone: nothing is kept.
    closed: bool,
}
#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<Body>,
    conn: Arc<OwnConn>,
    since: Instant,
}
#[derive(Debug)]
struct Waiter {
    tell: oneshot::Sender<Told>,
    /// Its place among those that wait.
    place: Arc<Place>,
    cluster: Arc<Cluster>,
    host: Arc<Host>,
    trace: Option<TraceParent>,
}
type Told = Result<Given, UpstreamError>;
impl Waiter {
    /// Ends its waiting; what it was to be told comes back if it does not wait any more.
    fn end(self, told: Told) -> Result<(), Told> {
        self.place.free();
        self.tell.send(told)
    }
}
/// What a waiter gets.
#[derive(Debug)]
enum Given {
    Lease(Lease),
    /// Leave to make a connection.
    Permit(ConnectionGuard),
}

/// A place for one request.
#[derive(Debug)]
pub(super) enum Lease {
    Own(OwnLease),
    Shared(StreamSlot),
}

/// An HTTP/1 connection.
#[derive(Debug)]
pub(super) struct OwnConn {
    shelf: Weak<Shelf>,
    /// While a request is on it: its sender, kept until hyper is ready again.
    busy: Mutex<Option<(http1::SendRequest<Body>, InFlight)>>,
    served: AtomicU32,
    /// Requests it may carry; 0: any number.
    most: u32,
    /// Too old for another request.
    retired: AtomicBool,
    /// What it is in.
    tunnels: Tunnels,
}

/// An HTTP/1 connection that is ours for one request; given back when it is not used.
#[derive(Debug)]
pub(super) struct OwnLease(Option<(http1::SendRequest<Body>, Arc<OwnConn>)>);

/// An HTTP/2 connection.
#[derive(Debug)]
pub(super) struct SharedConn {
    sender: http2::SendRequest<Body>,
    shelf: Weak<Shelf>,
    streams: AtomicU32,
    served: AtomicU32,
    most: u32,
    /// Streams at a time, by our policy.
    limit: u32,
    /// The same by the peer's SETTINGS; its task keeps it.
    peer_limit: Arc<AtomicU32>,
    /// When the last stream ended.
    idle_since: Mutex<Instant>,
    /// What it is in.
    tunnels: Tunnels,
}

/// A stream's place on a shared connection.
#[derive(Debug)]
pub(super) struct StreamSlot(Option<Arc<SharedConn>>);

/// A stream under way.
#[derive(Debug)]
pub(super) struct StreamHold {
    // In this order: the load is taken off before the place is given to another.
    _flight: InFlight,
    _slot: StreamSlot,
}

type Sent = Result<Response<Incoming>, TrySendError<Request<Body>>>;

/// Largest buffer of an HTTP/1 connection, and so its largest response head.
const H1_BUFFER: usize = 64 << 10;
/// What of one HTTP/2 response may lie here that its client does not read: what HTTP/2 gives a stream that nobody says more of
/// (RFC 9113 §6.9.2), and in what is left of the 256 KiB that such a client may cost.
const H2_STREAM_WINDOW: u32 = 64 << 10;
/// Enough for all streams a connection may have: one that is not read never holds up the others. What a client may leave unread is
/// bounded where its answers leave.
const H2_CONNECTION_WINDOW: u32 = 1 << 30;
/// What one HTTP/2 stream may have queued towards the endpoint, but for the last piece of it.
const H2_SEND_BUFFER: usize = 48 << 10;
/// Largest response head over HTTP/2.
const H2_HEADER_LIST: u32 = 64 << 10;

impl Shelf {
    pub fn new(host: &Arc<HostState>, key: &ShelfKey<'_>) -> Arc<Self> {
        Arc::new(Self {
            http2: key.http2,
            client: key.client,
            sni: key.sni.map(Arc::from),
            tls: key.tls.cloned(),
            proxy: key.proxy,
            inner: Mutex::new(Inner { closed: host.is_gone(), ..Inner::default() }),
        })
    }

    pub fn suits(&self, key: &ShelfKey<'_>) -> bool {
        let same_tls = match (&self.tls, key.tls) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
            (None, None) => true,
            _ => false,
        };
        self.http2 == key.http2
            && self.client == key.client
            && self.sni.as_deref() == key.sni
            && self.proxy == key.proxy
            && same_tls
    }

    /// Whether nothing is on it and nobody waits.
    pub fn is_bare(&self) -> bool {
        let inner = self.inner.lock();
        inner.open == 0 && inner.waiting.is_empty()
    }

    /// The endpoint is gone: idle connections are closed, busy ones when their requests end.
    pub fn clear(&self) {
        let (idle, shared) = {
            let mut inner = self.inner.lock();
            inner.closed = true;
            (std::mem::take(&mut inner.idle), std::mem::take(&mut inner.shared))
        };
        drop((idle, shared));
    }

    fn key(&self) -> ShelfKey<'_> {
        ShelfKey { http2: self.http2, client: self.client, sni: self.sni.as_deref(), tls: self.tls.as_ref(), proxy: self.proxy }
    }

    /// A connection with room, if there is one.
    fn take(inner: &mut Inner) -> Option<Lease> {
        while let Some(Idle { sender, conn, .. }) = inner.idle.pop() {
            // A connection the peer closed is noticed by its task; this is for the moment before it ran.
            if sender.is_ready() && !conn.retired.load(Relaxed) && !conn.tunnels.are_leaving() {
                return Some(Lease::Own(OwnLease(Some((sender, conn)))));
            }
        }
        inner.shared.retain(|conn| !conn.sender.is_closed() && !conn.is_spent() && !conn.tunnels.are_leaving());
        inner.shared.iter().find_map(StreamSlot::of).map(Lease::Shared)
    }

    /// Whether a dial under way will serve one more.
    fn is_covered(&self, inner: &Inner) -> bool {
        if self.http2 { inner.dialing > 0 } else { inner.dialing as usize > inner.waiting.len() }
    }

    /// Starts a dial on this thread. `trace`: the span of the request that it is made for, if that is told of.
    fn start(
        self: &Arc<Self>,
        inner: &mut Inner,
        cluster: &Arc<Cluster>,
        host: &Arc<Host>,
        trace: Option<TraceParent>,
        permit: ConnectionGuard,
    ) {
        inner.open += 1;
        inner.dialing += 1;
        let mut dial = Dial { shelf: Arc::clone(self), over: false };
        let (cluster, host) = (Arc::clone(cluster), Arc::clone(host));
        tokio::spawn(async move {
            let made = make(&dial.shelf, &cluster, &host, trace, permit).await;
            if made.is_err() {
                super::state::note(&cluster.state.counters.connect_failures);
            }
            dial.over = true;
            dial.shelf.dialed(made);
        });
    }

    /// Starts dials for those who wait and are not covered, as far as allowed.
    fn dial_more(self: &Arc<Self>, inner: &mut Inner) {
        loop {
            let wanting = if self.http2 { inner.dialing == 0 } else { inner.waiting.len() > inner.dialing as usize };
            let Some(front) = inner.waiting.front().filter(|_| wanting) else { return };
            let (cluster, host, trace) = (Arc::clone(&front.cluster), Arc::clone(&front.host), front.trace);
            let Some(permit) = self.permit(inner, &cluster, &host) else { return };
            self.start(inner, &cluster, &host, trace, permit);
        }
    }

    /// Leave to connect, or a place in the queue for it.
    fn permit(self: &Arc<Self>, inner: &mut Inner, cluster: &Arc<Cluster>, host: &Arc<Host>) -> Option<ConnectionGuard> {
        let ask = |forced| cluster.state.permit(&host.state, forced);
        if let Some(permit) = ask(inner.open == 0) {
            return Some(permit);
        }
        if !inner.listed {
            inner.listed = true;
            cluster.state.starve(self);
            // One may have become free before we were in the queue.
            return ask(false);
        }
        None
    }

    /// A connection became allowed: gives the leave to who waits here, on whatever thread that is. Whether anybody does.
    pub fn fed(self: &Arc<Self>) -> bool {
        let mut inner = self.inner.lock();
        inner.listed = false;
        let mut permit = None;
        while let Some(waiter) = inner.waiting.pop_front() {
            if waiter.tell.is_closed() {
                continue;
            }
            let Some(leave) = permit.take().or_else(|| self.permit(&mut inner, &waiter.cluster, &waiter.host)) else {
                // Somebody was faster; we are in the queue again.
                inner.waiting.push_front(waiter);
                return true;
            };
            let Waiter { tell, cluster, .. } = waiter;
            // It goes on waiting, for the connection.
            if let Err(Ok(Given::Permit(unused))) = tell.send(Ok(Given::Permit(leave))) {
                permit = Some(unused);
                continue;
            }
            if !inner.waiting.is_empty() && !inner.listed {
                inner.listed = true;
                cluster.state.starve(self);
            }
            return true;
        }
        // An unused leave feeds the next when it is dropped, which may be us.
        drop(inner);
        drop(permit);
        false
    }

    /// A dial is over.
    fn dialed(self: &Arc<Self>, made: Result<Made, UpstreamError>) {
        let mut inner = self.inner.lock();
        inner.dialing = inner.dialing.saturating_sub(1);
        match made {
            Ok(Made::Own(sender, conn)) => {
                drop(Self::offer(inner, sender, conn));
                return;
            }
            Ok(Made::Shared(conn)) => {
                if inner.closed && inner.waiting.is_empty() {
                    drop(inner);
                    drop(conn);
                    return;
                }
                inner.shared.push(conn);
                Self::share(&mut inner);
                if inner.closed {
                    let shared = std::mem::take(&mut inner.shared);
                    drop(inner);
                    drop(shared);
                    return;
                }
            }
            Err(error) => {
                inner.open = inner.open.saturating_sub(1);
                // An endpoint without any connection fails all who wait for it; with one, the others wait for that.
                let all = inner.waiting.len();
                let failing = if inner.open == 0 { all } else { all.min(1) };
                for waiter in inner.waiting.drain(..failing) {
                    let _ = waiter.end(Err(error.clone()));
                }
            }
        }
        self.dial_more(&mut inner);
    }

    /// Gives streams of shared connections to those who wait.
    fn share(inner: &mut Inner) {
        while !inner.waiting.is_empty() {
            inner.shared.retain(|conn| !conn.sender.is_closed() && !conn.is_spent());
            let Some(mut slot) = inner.shared.iter().find_map(StreamSlot::of) else { return };
            while let Some(waiter) = inner.waiting.pop_front() {
                match waiter.end(Ok(Given::Lease(Lease::Shared(slot)))) {
                    Ok(()) => {
                        slot = StreamSlot(None);
                        break;
                    }
                    Err(Ok(Given::Lease(Lease::Shared(unused)))) => slot = unused,
                    Err(_) => return,
                }
            }
            // Nobody wanted it after all; its own drop would take the lock we hold.
            if let Some(conn) = slot.0.take() {
                conn.streams.fetch_sub(1, Relaxed);
            }
        }
    }

    /// A connection that is free: to who waits, else onto the shelf. What must be dropped without the lock comes back.
    fn offer(
        mut inner: parking_lot::MutexGuard<'_, Inner>,
        mut sender: http1::SendRequest<Body>,
        mut conn: Arc<OwnConn>,
    ) -> Option<(http1::SendRequest<Body>, Arc<OwnConn>)> {
        while let Some(waiter) = inner.waiting.pop_front() {
            match waiter.end(Ok(Given::Lease(Lease::Own(OwnLease(Some((sender, conn))))))) {
                Ok(()) => return None,
                Err(Ok(Given::Lease(Lease::Own(mut unused)))) => (sender, conn) = unused.0.take()?,
                Err(_) => return None,
            }
        }
        if inner.closed {
            return Some((sender, conn));
        }
        inner.idle.push(Idle { sender, conn, since: Instant::now() });
        None
    }

    /// An HTTP/1 connection ended.
    fn ended(self: &Arc<Self>, conn: &Arc<OwnConn>) {
        let mut inner = self.inner.lock();
        inner.open = inner.open.saturating_sub(1);
        inner.idle.retain(|idle| !Arc::ptr_eq(&idle.conn, conn));
        self.dial_more(&mut inner);
    }

    /// An HTTP/2 connection ended.
    fn shared_ended(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        inner.open = inner.open.saturating_sub(1);
        let over: Vec<_> = inner.shared.extract_if(.., |conn| conn.sender.is_closed()).collect();
        self.dial_more(&mut inner);
        drop(inner);
        drop(over);
    }

    /// Takes a connection off the shelf if it is idle since `before` or earlier; else since when it is.
    fn expire(&self, conn: &Arc<OwnConn>, before: Instant) -> Expiry {
        let mut inner = self.inner.lock();
        let Some(at) = inner.idle.iter().position(|idle| Arc::ptr_eq(&idle.conn, conn)) else { return Expiry::Busy };
        match inner.idle.get(at) {
            Some(idle) if idle.since > before => Expiry::Since(idle.since),
            _ => Expiry::Taken(inner.idle.swap_remove(at)),
        }
    }
}

#[derive(Debug)]
enum Expiry {
    Busy,
    Since(Instant),
    #[expect(dead_code, reason = "held only to be dropped without the lock")]
    Taken(Idle),
}

/// Tells the shelf that a dial is over, also when its task was dropped.
struct Dial {
    shelf: Arc<Shelf>,
    over: bool,
}
impl Drop for Dial {
    fn drop(&mut self) {
        if !self.over {
            self.over = true;
            let mut inner = self.shelf.inner.lock();
            inner.dialing = inner.dialing.saturating_sub(1);
            inner.open = inner.open.saturating_sub(1);
            for waiter in inner.waiting.drain(..) {
                let _ = waiter.end(Err(UpstreamError::new(Failure::Connect, "given up")));
            }
        }
    }
}

/// A place for one request to `host`; `trace`: its span, if that is told of.
pub(super) async fn acquire(
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    key: &ShelfKey<'_>,
    trace: Option<TraceParent>,
) -> Result<Lease, UpstreamError> {
    let shelf = host.state.shelf(key);
    let (mut told, pending): (_, Pending) = {
        let mut inner = shelf.inner.lock();
        if let Some(lease) = Shelf::take(&mut inner) {
            return Ok(lease);
        }
        inner.waiting.retain(|waiter| !waiter.tell.is_closed());
        // Before a connection is asked for, as at Envoy: who waits for one that is being made for it waits too.
        let pending = cluster.state.wait(cluster.policy.pool.max_pending)?;
        if !shelf.is_covered(&inner)
            && let Some(permit) = shelf.permit(&mut inner, cluster, host)
        {
            shelf.start(&mut inner, cluster, host, trace, permit);
        }
        let (tell, told) = oneshot::channel();
        let (place, cluster, host) = (pending.place(), Arc::clone(cluster), Arc::clone(host));
        inner.waiting.push_back(Waiter { tell, place, cluster, host, trace });
        (told, pending)
    };
    loop {
        match told.await {
            Ok(Ok(Given::Lease(lease))) => return Ok(lease),
            Ok(Ok(Given::Permit(permit))) => {
                let (tell, again) = oneshot::channel();
                told = again;
                let mut inner = shelf.inner.lock();
                shelf.start(&mut inner, cluster, host, trace, permit);
                let (place, cluster, host) = (pending.place(), Arc::clone(cluster), Arc::clone(host));
                inner.waiting.push_front(Waiter { tell, place, cluster, host, trace });
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(UpstreamError::new(Failure::Connect, "given up")),
        }
    }
}

enum Made {
    Own(http1::SendRequest<Body>, Arc<OwnConn>),
    Shared(Arc<SharedConn>),
}

/// A connection: transport, handshake, and the task that lives with it.
async fn make(
    shelf: &Arc<Shelf>,
    cluster: &Arc<Cluster>,
    host: &Arc<Host>,
    trace: Option<TraceParent>,
    permit: ConnectionGuard,
) -> Result<Made, UpstreamError> {
    let policy = cluster.state.policy.load_full();
    let limits = &policy.pool;
    let (io, tunnels) = transport::dial(cluster, host, &shelf.key(), transport::Purpose::Pooled, trace, permit).await?;
    let io = TokioIo::new(io);
    if shelf.http2 {
        let (mut sender, conn) =
            http2_builder(limits).handshake(io).await.map_err(|e| UpstreamError::new(Failure::Connect, e.to_string()))?;
        let shared = Arc::new(SharedConn {
            sender: sender.clone(),
            shelf: Arc::downgrade(shelf),
            streams: AtomicU32::new(0),
            served: AtomicU32::new(0),
            most: limits.max_requests_per_connection,
            limit: limits.max_concurrent_streams.max(1),
            peer_limit: Arc::new(AtomicU32::new(streams_allowed(&conn))),
            idle_since: Mutex::new(Instant::now()),
            tunnels,
        });
        tokio::spawn(drive_shared(
            Arc::clone(&shared.peer_limit),
            conn,
            Arc::downgrade(&shared),
            Arc::downgrade(shelf),
            Clock::new(limits),
        ));
        sender.ready().await.map_err(|e| UpstreamError::new(Failure::Connect, e.to_string()))?;
        return Ok(Made::Shared(shared));
    }
    let (mut sender, conn) = builder().handshake(io).await.map_err(|e| UpstreamError::new(Failure::Connect, e.to_string()))?;
    let own = Arc::new(OwnConn {
        shelf: Arc::downgrade(shelf),
        busy: Mutex::new(None),
        served: AtomicU32::new(0),
        most: limits.max_requests_per_connection,
        retired: AtomicBool::new(false),
        tunnels,
    });
    tokio::spawn(drive_own(conn, Arc::clone(&own), Clock::new(limits)));
    // From here on the connection's own task counts it: an error now must not be counted as a failed dial.
    let _ = sender.ready().await;
    Ok(Made::Own(sender, own))
}

/// How HTTP/2 connections are made, pooled or not.
pub(super) fn http2_builder(limits: &PoolLimits) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .initial_stream_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_header_list_size(H2_HEADER_LIST);
    if let Some(Http2Keepalive { interval, timeout }) = limits.http2_keepalive {
        // Idle connections are asked too, as Envoy does.
        builder.timer(TokioTimer::new()).keep_alive_interval(interval).keep_alive_timeout(timeout).keep_alive_while_idle(true);
    }
    builder
}

/// How HTTP/1 connections are made, pooled or not.
pub(super) fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.max_buf_size(H1_BUFFER);
    builder
}

/// When a connection must be looked at: once per limit, not per request.
struct Clock {
    sleep: Option<Pin<Box<Sleep>>>,
    idle: Option<std::time::Duration>,
    end: Option<Instant>,
}
impl Clock {
    fn new(limits: &PoolLimits) -> Self {
        let now = Instant::now();
        let end = limits.max_connection_duration.and_then(|d| now.checked_add(d));
        let idle = limits.http_idle_timeout.filter(|d| !d.is_zero());
        let first = [end, idle.and_then(|d| now.checked_add(d))].into_iter().flatten().min();
        Self { sleep: first.map(|at| Box::pin(tokio::time::sleep_until(at))), idle, end }
    }
    /// Whether it is time to look.
    fn poll(&mut self, cx: &mut std::task::Context<'_>) -> bool {
        self.sleep.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready())
    }
    fn is_over(&self, now: Instant) -> bool {
        self.end.is_some_and(|end| end <= now)
    }
    /// Looks again when something that is idle since then is idle for too long, or the connection is too old.
    fn again(&mut self, idle_since: Instant, now: Instant) {
        let idle = self.idle.and_then(|d| idle_since.checked_add(d)).map(|at| at.max(now + std::time::Duration::from_millis(1)));
        let next = [self.end.filter(|end| *end > now), idle].into_iter().flatten().min();
        match (next, &mut self.sleep) {
            (Some(at), Some(sleep)) => sleep.as_mut().reset(at),
            _ => self.sleep = None,
        }
    }
}

/// Lives with an HTTP/1 connection.
async fn drive_own(mut connection: http1::Connection<TokioIo<transport::Io>, Body>, own: Arc<OwnConn>, mut clock: Clock) {
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection to an endpoint ended");
                }
                return Poll::Ready(());
            }
            own.settle();
            if !clock.poll(cx) {
                return Poll::Pending;
            }
            let now = Instant::now();
            let over = clock.is_over(now);
            if over {
                own.retired.store(true, Relaxed);
            }
            let Some(shelf) = own.shelf.upgrade() else { return Poll::Pending };
            let before = if over { Some(now) } else { clock.idle.and_then(|d| now.checked_sub(d)) };
            let expiry = before.map_or(Expiry::Busy, |before| shelf.expire(&own, before));
            match expiry {
                Expiry::Busy => clock.again(now, now),
                Expiry::Since(since) => clock.again(since, now),
                // Dropping its sender ends the connection, which the next turn sees.
                Expiry::Taken(_) => clock.sleep = None,
            }
        }
    })
    .await;
    // The limit's guard is in there: given back before others are told.
    drop(connection);
    drop(own.busy.lock().take());
    if let Some(shelf) = own.shelf.upgrade() {
        shelf.ended(&own);
    }
}

type Http2Connection = http2::Connection<TokioIo<transport::Io>, Body, TokioExecutor>;
/// Streams the peer allows; none is no usable answer before its SETTINGS came.
fn streams_allowed(connection: &Http2Connection) -> u32 {
    u32::try_from(connection.current_max_send_streams()).unwrap_or(u32::MAX)
}

/// Lives with an HTTP/2 connection.
async fn drive_shared(
    peer_limit: Arc<AtomicU32>,
    mut connection: Http2Connection,
    shared: Weak<SharedConn>,
    shelf: Weak<Shelf>,
    mut clock: Clock,
) {
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection to an endpoint ended");
                }
                return Poll::Ready(());
            }
            let allowed = streams_allowed(&connection);
            if peer_limit.load(Relaxed) != allowed {
                peer_limit.store(allowed, Relaxed);
                if let Some(shelf) = shelf.upgrade() {
                    Shelf::share(&mut shelf.inner.lock());
                }
            }
            if !clock.poll(cx) {
                return Poll::Pending;
            }
            let now = Instant::now();
            let (Some(shared), Some(shelf)) = (shared.upgrade(), shelf.upgrade()) else {
                clock.sleep = None;
                continue;
            };
            let since = if shared.streams.load(Relaxed) > 0 { now } else { *shared.idle_since.lock() };
            if clock.is_over(now) || clock.idle.is_some_and(|d| now.duration_since(since) >= d) {
                // Off the shelf: it ends with its last stream.
                let mut inner = shelf.inner.lock();
                let off: Vec<_> = inner.shared.extract_if(.., |conn| Arc::ptr_eq(conn, &shared)).collect();
                drop(inner);
                drop(off);
                clock.sleep = None;
            } else {
                clock.again(since, now);
            }
        }
    })
    .await;
    drop(connection);
    if let Some(shelf) = shelf.upgrade() {
        shelf.shared_ended();
    }
}

impl OwnConn {
    /// Gives the connection back if its request is over and hyper takes another.
    fn settle(self: &Arc<Self>) {
        let mut busy = self.busy.lock();
        if !busy.as_ref().is_some_and(|(sender, _)| sender.is_ready()) {
            return;
        }
        let Some((sender, flight)) = busy.take() else { return };
        drop(busy);
        drop(flight);
        self.give_back(sender);
    }
    fn give_back(self: &Arc<Self>, sender: http1::SendRequest<Body>) {
        let spent = self.most > 0 && self.served.load(Relaxed) >= self.most;
        if spent || self.retired.load(Relaxed) || sender.is_closed() {
            return;
        }
        if let Some(shelf) = self.shelf.upgrade() {
            let inner = shelf.inner.lock();
            drop(Shelf::offer(inner, sender, Arc::clone(self)));
        }
    }
}

impl OwnLease {
    /// Whether it carried a request before.
    pub fn is_used(&self) -> bool {
        self.0.as_ref().is_some_and(|(_, conn)| conn.served.load(Relaxed) > 0)
    }
    /// Sends a request and gives the head of its response. The connection goes back by itself when the response is over.
    pub async fn send(mut self, request: Request<Body>, flight: InFlight) -> Sent {
        let Some((mut sender, conn)) = self.0.take() else {
            // A lease is used once.
            return std::future::pending().await;
        };
        conn.served.fetch_add(1, Relaxed);
        let response = sender.try_send_request(request);
        *conn.busy.lock() = Some((sender, flight));
        let response = response.await;
        // Its task usually did that already.
        conn.settle();
        response
    }
}
impl Drop for OwnLease {
    fn drop(&mut self) {
        if let Some((sender, conn)) = self.0.take() {
            conn.give_back(sender);
        }
    }
}

impl SharedConn {
    /// Whether it carried as many requests as it may.
    fn is_spent(&self) -> bool {
        self.most > 0 && self.served.load(Relaxed) >= self.most
    }
}
impl StreamSlot {
    /// A place on `conn`, if it has one.
    fn of(conn: &Arc<SharedConn>) -> Option<Self> {
        let limit = conn.limit.min(conn.peer_limit.load(Relaxed));
        conn.streams.fetch_update(Relaxed, Relaxed, |n| (n < limit).then_some(n + 1)).ok()?;
        conn.served.fetch_add(1, Relaxed);
        Some(Self(Some(Arc::clone(conn))))
    }
    /// Whether the connection carried a stream before this one.
    pub fn is_used(&self) -> bool {
        self.0.as_ref().is_some_and(|conn| conn.served.load(Relaxed) > 1)
    }
    /// Sends a request; the hold is to live as long as the response.
    pub async fn send(self, request: Request<Body>, flight: InFlight) -> (Sent, StreamHold) {
        let Some(mut sender) = self.0.as_ref().map(|conn| conn.sender.clone()) else {
            // A slot in use has its connection.
            return std::future::pending().await;
        };
        let hold = StreamHold { _flight: flight, _slot: self };
        (sender.try_send_request(request).await, hold)
    }
}
impl Drop for StreamSlot {
    fn drop(&mut self) {
        let Some(conn) = self.0.take() else { return };
        if conn.streams.fetch_sub(1, Relaxed) == 1 {
            *conn.idle_since.lock() = Instant::now();
        }
        let Some(shelf) = conn.shelf.upgrade() else { return };
        let mut inner = shelf.inner.lock();
        if !inner.waiting.is_empty() {
            Shelf::share(&mut inner);
        }
    }
}
