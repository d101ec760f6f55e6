//! The upstream side against real sockets: a mesh from a few changes, servers on loopback.
use super::*;
use crate::body::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::TlsSettings;
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_identity::{SvidCache, TlsContext};
use mesh_model::Change;
use mesh_model::l7::destination::{Destination, PoolLimits, TrafficPolicy};
use mesh_model::service::{AppProtocol, Service, ServiceKey, ServicePort};
use mesh_model::snapshot::Viewpoint;
use mesh_model::workload::{Protocol, Workload};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Instant;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

mod beyond;
mod forward;
mod fronts;
mod hbone;
mod limits;
mod picks;
mod pools;
mod stress;
mod tls;

/// A mesh with one service, and the upstreams that follow it.
struct World {
    snap: Snapshot,
    upstreams: Arc<Upstreams>,
    svids: SvidCache,
    _ca: tempfile::TempDir,
}

const PORT: u16 = 80;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn key() -> ServiceKey {
    ServiceKey::new("shop", "web.shop.svc.cluster.local")
}
fn cluster_key() -> ClusterKey {
    ClusterKey { service: key(), port: PORT, subset: None }
}
fn own_id() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/waypoint".parse().unwrap()
}

impl World {
    fn new() -> Self {
        Self::with_threads(1)
    }
    fn with_threads(threads: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = LocalCaSettings { directory: dir.path().join("ca"), ..LocalCaSettings::default() };
        let ca = LocalCa::open(&settings, Arc::new(SystemClock)).unwrap();
        let tls = TlsContext::new(&TlsSettings::default(), &ca, Arc::new(SystemClock)).unwrap();
        let svids = SvidCache::start(Arc::new(ca), tls, &CacheSettings::default(), &tokio::runtime::Handle::current());
        let upstreams = Upstreams::new(Deps {
            svid: svids.handle(&own_id()),
            identity: own_id(),
            hbone: Arc::new(mesh_hbone::Settings::default()),
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            connects: mesh_runtime::metrics::connect_times().pin(&["waypoint"]),
            threads,
            me: Me { uid: Some(uid("waypoint")), ip: None },
        });
        let mut service = Service::new("web", "shop", "web.shop.svc.cluster.local");
        service.ports = vec![ServicePort { port: PORT, target: 0, protocol: AppProtocol::Http11 }];
        let mut world = Self { snap: Snapshot::empty(Viewpoint::default()), upstreams, svids, _ca: dir };
        world.apply(vec![Change::Service(Arc::new(service))]);
        world
    }
    fn apply(&mut self, changes: Vec<Change>) {
        self.snap = self.snap.apply(&changes);
    }
    fn endpoint(&mut self, name: &str, at: SocketAddr) {
        self.put(pod(name, at));
    }
    fn put(&mut self, w: Workload) {
        self.apply(vec![Change::Workload(Arc::new(w))]);
    }
    fn remove(&mut self, name: &str) {
        self.apply(vec![Change::WorkloadGone(uid(name))]);
    }
    fn policy(&mut self, policy: TrafficPolicy) {
        let destination = Destination {
            key: key(),
            policy: Arc::new(policy),
            ports: BTreeMap::new(),
            subsets: BTreeMap::new(),
            origins: Vec::new(),
            broken: None,
        };
        self.apply(vec![Change::Destination(Arc::new(destination))]);
    }
    fn cluster(&self) -> Arc<Cluster> {
        self.upstreams.renew(&self.snap, &cluster_key(), Role::Waypoint).unwrap()
    }
}

fn uid(name: &str) -> Arc<str> {
    format!("c//Pod/shop/{name}").into()
}
fn pod(name: &str, at: SocketAddr) -> Workload {
    let mut w = Workload::new(&uid(name), name, "shop");
    w.ips = vec![at.ip()];
    w.service_account = "web".into();
    w.services.insert(key(), [(PORT, at.port())].into());
    w
}
fn pick(cluster: &Cluster) -> Arc<Host> {
    pick_with(cluster, rand::random()).unwrap()
}
fn pick_with(cluster: &Cluster, draw: u64) -> Result<Arc<Host>, UpstreamError> {
    cluster.pick(&PickContext { draw, hash: None, session: None, tried: &[], before: &[], dst: None, name: None })
}
fn get() -> Request<Body> {
    Request::get("http://web.shop/hello").body(Body::Empty).unwrap()
}
async fn fetch(cluster: &Arc<Cluster>, http2: bool) -> Result<(StatusCode, Bytes), UpstreamError> {
    let host = pick(cluster);
    let guard = cluster.admit()?;
    let how = SendOptions { http2, guard: Some(&guard), ..SendOptions::default() };
    let response = send(cluster, &host, get(), how).await?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|e| UpstreamError::new(Failure::Reset, e.to_string()))?;
    Ok((status, body.to_bytes()))
}
/// Lets everything that is ready run. Each pause is a look at the sockets: what matters is their number, not the time.
async fn settle() {
    for _ in 0..8 {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// An HTTP server that counts connections and requests, and answers when it is let.
struct Server {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    live: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
    /// Requests may be answered while it has permits.
    gate: Arc<Semaphore>,
    stop: tokio::task::JoinHandle<()>,
    end: tokio::sync::watch::Sender<bool>,
}
impl Server {
    /// Answers at once.
    async fn open() -> Self {
        Self::open_on([127, 0, 0, 1].into()).await
    }
    /// Answers at once, on this address.
    async fn open_on(ip: std::net::IpAddr) -> Self {
        let server = Self::gated_on(ip).await;
        server.gate.add_permits(1 << 20);
        server
    }
    /// Answers as `gate` allows.
    async fn gated() -> Self {
        Self::gated_on([127, 0, 0, 1].into()).await
    }
    async fn gated_on(ip: std::net::IpAddr) -> Self {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let [connections, live, requests] = std::array::from_fn(|_| Arc::<AtomicUsize>::default());
        let gate = Arc::new(Semaphore::new(0));
        let (end, ended) = tokio::sync::watch::channel(false);
        let (c, l, r, g) = (Arc::clone(&connections), Arc::clone(&live), Arc::clone(&requests), Arc::clone(&gate));
        let stop = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                c.fetch_add(1, SeqCst);
                l.fetch_add(1, SeqCst);
                let (l, r, g, mut ended) = (Arc::clone(&l), Arc::clone(&r), Arc::clone(&g), ended.clone());
                tokio::spawn(async move {
                    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                        let (r, g) = (Arc::clone(&r), Arc::clone(&g));
                        async move { answer(request, &r, &g).await }
                    });
                    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    builder.http1().half_close(true);
                    let serve = builder.serve_connection_with_upgrades(TokioIo::new(tcp), service);
                    tokio::select! {
                        _ = serve => {}
                        _ = ended.wait_for(|end| *end) => {}
                    }
                    l.fetch_sub(1, SeqCst);
                });
            }
        });
        Self { addr, connections, live, requests, gate, stop, end }
    }
    fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
    fn live(&self) -> usize {
        self.live.load(SeqCst)
    }
    fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }
    /// Closes every connection, and goes on accepting.
    fn cut(&self) {
        self.end.send_replace(true);
        self.end.send_replace(false);
    }
    async fn until(&self, what: impl Fn(&Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if what(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("connections {} live {} requests {}", self.connections(), self.live(), self.requests());
    }
}
impl Drop for Server {
    fn drop(&mut self) {
        self.stop.abort();
        self.end.send_replace(true);
    }
}
async fn answer(request: Request<Incoming>, count: &AtomicUsize, gate: &Semaphore) -> Result<Response<Full<Bytes>>, Infallible> {
    count.fetch_add(1, SeqCst);
    gate.acquire().await.unwrap().forget();
    let host = request.headers().get("host").and_then(|h| h.to_str().ok()).or(request.uri().host()).unwrap_or_default();
    let text = format!("{} {host} {:?}", request.uri().path(), request.version());
    Ok(Response::new(Full::new(text.into())))
}

/// A client that names every port of a workload costs what each of them does: nothing is copied or looked through with each.
#[tokio::test]
async fn ports_a_client_names_are_kept_while_they_are_used_and_bounded_otherwise() {
    let mut world = World::new();
    world.endpoint("a", "127.0.0.1:1".parse().unwrap());
    let known = Arc::clone(world.snap.find_known(&uid("a")).unwrap());
    let used = world.upstreams.workload(&world.snap, &known, 7).admit().unwrap();
    let registry = &world.upstreams.workloads;
    let (mut most, mut forgotten) = (0, 0);
    for port in 1000..=u16::MAX {
        let before = registry.entries.load().len();
        world.upstreams.workload(&world.snap, &known, port);
        let now = registry.entries.load().len();
        (most, forgotten) = (most.max(now), forgotten + usize::from(now < before));
    }
    assert_eq!((most, forgotten), (IDLE_WORKLOADS, 15), "all that nobody uses go at once, or each new one would look at all");
    assert!(registry.get(&(uid("a"), 7)).is_some());
    drop(used);
}
