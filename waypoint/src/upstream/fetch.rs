//! What the process itself asks others: one document by GET, or a connection to speak over. Through the mesh where the host is
//! a service of it, else to the outside.
//!
//! Refuses what is larger or slower than allowed, redirects, anything but 200, and over `https` whoever the system's roots do
//! not vouch for. For what the process wants to know or tell (an issuer's keys, spans), never for a client's request. Upstream:
//! `token::source`, `mesh-spans`.
use super::pool::ShelfKey;
use super::send::alone;
use super::tls::TlsCache;
use super::transport::{self, Purpose, Stream};
use super::{PickContext, Role, Upstreams};
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use mesh_model::Snapshot;
use mesh_model::l7::destination::{Roots, UpstreamTls};
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::l7::route::ClusterKey;
use mesh_model::telemetry::tracing::{Collector, Otlp};
use mesh_runtime::resolve::{self, Resolver};
use mesh_runtime::sockets::{ConnectOptions, connect};
use mesh_runtime::threads::Worker;
use mesh_sources::Mesh;
use mesh_spans::{Connecting, Duplex, Way};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Fetches documents and makes connections.
#[derive(Debug)]
pub struct Fetcher {
    mesh: Mesh,
    upstreams: Arc<Upstreams>,
    /// Tunnels of the mesh live on data threads, so fetches run on one.
    worker: Worker,
    /// The Gateway this process serves: its namespace's view of the mesh decides what a host name means.
    gateway: GatewayKey,
    resolver: Resolver,
    tls: TlsCache,
    /// The system's roots, the host of the URI.
    public: Arc<UpstreamTls>,
}

/// Whom to connect to.
#[derive(Clone, Copy, Debug)]
struct Target<'a> {
    /// Host name, or address.
    host: &'a Arc<str>,
    /// Whose view of the mesh decides what the host means; `None`: our own namespace's.
    namespace: Option<&'a str>,
    /// Port.
    port: u16,
    /// TLS by us, where the mesh does not bring its own.
    secure: bool,
    /// What is spoken in TLS.
    http2: bool,
}
/// Where a document is.
struct Place {
    uri: Uri,
    host: Arc<str>,
    port: u16,
    secure: bool,
}

impl Fetcher {
    /// Fetches on `worker`, for the process that serves `gateway`.
    pub fn new(mesh: Mesh, upstreams: Arc<Upstreams>, worker: Worker, gateway: GatewayKey) -> Self {
        let public = UpstreamTls {
            sni: None,
            sans: Vec::new(),
            roots: Roots::System,
            crl: None,
            client: None,
            skip_verify: false,
            alpn: Vec::new(),
        };
        Self {
            mesh,
            upstreams,
            worker,
            gateway,
            resolver: Resolver::default(),
            tls: TlsCache::default(),
            public: Arc::new(public),
        }
    }
    /// The document at `uri` (`http` or `https`), of at most `largest` bytes, within `limit`.
    ///
    /// # Errors
    /// In words, for logs.
    pub async fn get(self: &Arc<Self>, uri: &str, limit: Duration, largest: usize) -> Result<Bytes, String> {
        let place = Place::of(uri)?;
        let this = Arc::clone(self);
        let fetching = self.worker.spawn(async move { tokio::time::timeout(limit, this.fetch(&place, largest)).await });
        match fetching.await {
            Ok(Ok(outcome)) => outcome.map_err(|e| format!("{uri}: {e}")),
            Ok(Err(_)) => Err(format!("{uri}: no answer in {limit:?}")),
            Err(stopped) => Err(format!("{uri}: {stopped}")),
        }
    }

    async fn fetch(&self, place: &Place, largest: usize) -> Result<Bytes, String> {
        let target = Target { host: &place.host, namespace: None, port: place.port, secure: place.secure, http2: false };
        ask(self.connect(&target).await?, place, largest).await
    }

    /// A connection; to be called on the data thread of `worker`.
    ///
    /// # Errors
    /// In words, for logs.
    async fn connect(&self, to: &Target<'_>) -> Result<Box<dyn Duplex>, String> {
        let snap = self.mesh.load_full();
        if let Some(stream) = self.through_the_mesh(&snap, to).await? {
            return Ok(Box::new(stream.into_io()));
        }
        let ips = self.resolver.lookup(to.host).await?;
        let ip = resolve::choose(&ips, IpAddr::V4(Ipv4Addr::UNSPECIFIED), rand::random()).ok_or("no addresses")?;
        let tcp = connect(SocketAddr::new(ip, to.port), &ConnectOptions::default()).await.map_err(|e| e.to_string())?;
        if !to.secure {
            return Ok(Box::new(tcp));
        }
        let (config, name) =
            self.tls.client(&self.public, Some(to.http2), Some(to.host)).await.map_err(|e| e.detail.into_owned())?;
        let tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await.map_err(|e| format!("TLS: {e}"))?;
        Ok(Box::new(tls))
    }

    /// Who lets in clients from outside is a gateway in what it asks for itself, too.
    fn role(&self, snap: &Snapshot) -> Role {
        let listens = snap.find_gateway(&self.gateway).is_some_and(|gateway| !gateway.listeners.is_empty());
        if listens { Role::Gateway } else { Role::Waypoint }
    }

    /// A stream to an endpoint of the service that the host names; `None` when it names none.
    async fn through_the_mesh(&self, snap: &Arc<Snapshot>, to: &Target<'_>) -> Result<Option<Stream>, String> {
        let namespace = to.namespace.unwrap_or(&self.gateway.namespace);
        let Some(service) = snap.find_service_by_host(to.host, namespace) else { return Ok(None) };
        let key = ClusterKey { service: service.key.clone(), port: to.port, subset: None };
        let failed = |e: super::UpstreamError| format!("service {}: {e}", service.key);
        let cluster = self.upstreams.cluster(snap, &key, self.role(snap)).await.map_err(failed)?;
        let pick = PickContext {
            draw: rand::random(),
            hash: None,
            session: None,
            tried: &[],
            before: &[],
            dst: None,
            name: Some(to.host),
        };
        let host = cluster.pick(&pick).map_err(failed)?;
        let policy = cluster.policy();
        let shelf = ShelfKey {
            http2: to.http2,
            client: None,
            sni: Some(to.host),
            tls: policy.tls.as_ref().or(to.secure.then_some(&self.public)),
            proxy: policy.proxy_protocol,
        };
        let (permit, _waiting) = alone(&cluster, &host, cluster.policy.pool.max_requests).map_err(failed)?;
        let (stream, _) = transport::open(&cluster, &host, &shelf, Purpose::Single(None), None, permit).await.map_err(failed)?;
        Ok(Some(stream))
    }
}
/// A collector is a service of the mesh as any other, or outside.
impl Way for Fetcher {
    fn worker(&self) -> &Worker {
        &self.worker
    }
    fn connect<'a>(&'a self, to: &'a Collector) -> Connecting<'a> {
        Box::pin(async move {
            let (namespace, http2) = (to.namespace.as_deref(), to.over == Otlp::Grpc);
            self.connect(&Target { host: &to.host, namespace, port: to.port, secure: false, http2 }).await
        })
    }
}
impl Place {
    fn of(text: &str) -> Result<Self, String> {
        let bad = |why: &str| format!("{text:?} is no URL that can be fetched: {why}");
        let uri: Uri = text.parse().map_err(|_| bad("malformed"))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("http or https is needed")),
        };
        if uri.authority().is_some_and(|a| a.as_str().contains('@')) {
            return Err(bad("credentials in it"));
        }
        let host = uri.host().ok_or_else(|| bad("no host"))?.trim_start_matches('[').trim_end_matches(']').into();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        Ok(Self { uri, host, port, secure })
    }
}

async fn ask(io: Box<dyn Duplex>, place: &Place, largest: usize) -> Result<Bytes, String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(|e| e.to_string())?;
    let driving = tokio::spawn(connection);
    let path = place.uri.path_and_query().map_or("/", |p| p.as_str());
    let request = Request::get(path)
        .header(header::HOST, place.uri.authority().map_or(&*place.host, |a| a.as_str()))
        .header(header::ACCEPT, "application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| e.to_string())?;
    let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
    if answer.status() != StatusCode::OK {
        return Err(format!("answered {}", answer.status()));
    }
    let body = Limited::new(answer.into_body(), largest).collect().await;
    driving.abort();
    body.map(http_body_util::Collected::to_bytes).map_err(|e| format!("{e} (at most {largest} bytes are read)"))
}
