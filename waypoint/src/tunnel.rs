//! One CONNECT from a node agent: what it asks for, what is spoken in it, who serves it.
//!
//! Owns the order: plan → 200 → protocol → HTTP or bytes. Upstream: `listen`. Downstream: `http`, `tcp`.
use crate::conn::{Conn, Shared};
use crate::detect::Spoken;
use crate::facts::{Facts, Scope};
use crate::http::{self, Version};
use crate::opening::first_bytes;
use crate::tcp;
use mesh_hbone::{HboneStream, Incoming};
use mesh_identity::Peer;
use mesh_model::l7::HttpRoute;
use mesh_model::service::{AppProtocol, ServiceKey};
use mesh_model::source::find_source;
use mesh_model::waypoint::{Target, plan_tunnel};
use mesh_model::{HboneAuthority, Reason, Refusal};
use mesh_runtime::drain::DrainWatch;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Serves one CONNECT, on the data thread that has least to do: the streams of one tunnel spread over all cores.
pub async fn serve_stream(shared: Arc<Shared>, proof: Arc<Peer>, client: SocketAddr, incoming: Incoming, drain: DrainWatch) {
    let (conn, protocol) = match plan(&shared, &proof, client, &incoming, drain) {
        Ok(planned) => planned,
        Err(why) => {
            shared.telemetry.tunnel_refused(client, Some(&proof.id), &why);
            incoming.refuse(&why);
            return;
        }
    };
    let here = mesh_runtime::threads::current();
    let worker = shared.threads.pick(here);
    let live = worker.admit();
    let stream = match incoming.accept([]) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%client, %error, "client went before the answer");
            return;
        }
    };
    let work = async move {
        serve(conn, stream, protocol).await;
        drop(live);
    };
    if here == Some(worker.index()) {
        work.await;
    } else {
        worker.spawn(work);
    }
}

/// What the CONNECT is for, and the declared protocol of it.
fn plan(
    shared: &Arc<Shared>,
    proof: &Peer,
    client: SocketAddr,
    incoming: &Incoming,
    drain: DrainWatch,
) -> Result<(Conn, AppProtocol), Refusal> {
    let authority = asked(incoming.authority())?;
    let snap = shared.mesh.load();
    let me = shared.me(&snap)?;
    let target = plan_tunnel(&snap, me, proof.id.namespace(), &authority)?;
    let source = find_source(&snap, client.ip(), Some(&proof.id)).cloned();
    let source = source.or_else(|| incoming.client_beyond(&snap, client.ip(), &proof.id));
    let (plain, protocol) = match &target {
        Target::Service { service, port } => {
            let protocol = service.port(*port).map_or(AppProtocol::Unknown, |p| p.protocol);
            (HttpRoute::plain(&service.key, *port), protocol)
        }
        Target::Workload { known, port } => {
            // A key of its own: nothing is written about a workload, and `attempt` takes the workload itself.
            let key =
                ServiceKey { namespace: Arc::clone(&known.workload().namespace), hostname: Arc::clone(&known.workload().uid) };
            (HttpRoute::plain(&key, *port), AppProtocol::Unknown)
        }
    };
    let local = match &authority {
        HboneAuthority::Addr(addr) => *addr,
        HboneAuthority::Name { port, .. } => SocketAddr::from(([0, 0, 0, 0], *port)),
    };
    let facts = Facts {
        scope: Scope::Mesh(target),
        client,
        local,
        identity: Some(proof.id.clone()),
        source,
        trace: incoming.traceparent().filter(|span| span.is_sampled()),
        sni: None,
        plain: Some(Arc::new(plain)),
    };
    Ok((Conn::new(Arc::clone(shared), facts, drain), protocol))
}

/// What the authority of a CONNECT says.
pub(crate) fn asked(authority: &str) -> Result<HboneAuthority, Refusal> {
    HboneAuthority::parse(authority)
        .ok_or_else(|| Refusal::new(Reason::BadRequest, format!("authority {authority:?} is neither ip:port nor host:port")))
}

/// Serves the stream by what is declared, and where nothing is, by what is spoken. What is rare or large is boxed: every stream
/// holds for its whole life as much as the largest of what it might become.
async fn serve(mut conn: Conn, mut stream: HboneStream, protocol: AppProtocol) {
    match protocol {
        AppProtocol::Tcp => return Box::pin(tcp::serve(conn, stream, false)).await,
        AppProtocol::Http2 | AppProtocol::Grpc | AppProtocol::Http11 => {
            // Declared HTTP: the version is the client's to choose, as long as a connection may be idle.
            let idle = conn.shared.settings.http_idle_timeout;
            let deadline = (!idle.is_zero()).then(|| Instant::now() + idle);
            let version = match first_bytes(&mut stream, deadline).await {
                Spoken::Http2 => Version::Http2,
                // hyper answers what is not HTTP with 400, as Envoy does; who said nothing is ended as idle.
                _ => Version::Http1,
            };
            return http::serve(Arc::new(conn), stream.into_io(), version).await;
        }
        AppProtocol::Tls => {
            // A hello is due at once; a client that does not send one has nothing to be routed by.
            let deadline = Instant::now() + TLS_HELLO;
            if let Spoken::Tls(sni) = first_bytes(&mut stream, Some(deadline)).await {
                conn.facts.sni = sni;
            }
            return Box::pin(tcp::serve(conn, stream, false)).await;
        }
        AppProtocol::Unknown => {}
    }
    let deadline = Instant::now() + conn.shared.settings.sniff_timeout;
    match first_bytes(&mut stream, Some(deadline)).await {
        Spoken::Http1 => http::serve(Arc::new(conn), stream.into_io(), Version::Http1).await,
        Spoken::Http2 => http::serve(Arc::new(conn), stream.into_io(), Version::Http2).await,
        Spoken::Tls(sni) => {
            conn.facts.sni = sni;
            Box::pin(tcp::serve(conn, stream, false)).await;
        }
        Spoken::Other => Box::pin(tcp::serve(conn, stream, false)).await,
        // Nobody has spoken yet. The server may be the one who does: connect, and see who is first.
        Spoken::Unclear => Box::pin(tcp::serve(conn, stream, true)).await,
    }
}

/// How long a client of a declared TLS port may take to say hello.
const TLS_HELLO: Duration = Duration::from_secs(5);
