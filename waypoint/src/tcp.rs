//! Connections carried as bytes: TCP routes, TLS passed through, protocols in which the server speaks first.
//!
//! Owns the choice of the endpoint for a whole connection. Upstream: `tunnel`, `listen::gateway`.
//! Downstream: `upstream::connect`, the relay.
use crate::conn::Conn;
use crate::detect::Spoken;
use crate::facts::Scope;
use crate::hosts;
use crate::http::{self, Version};
use crate::opening::{Opening, first_bytes};
use crate::phase::authorize;
use crate::telemetry::{Flag, Flags, TcpHandles, TcpRecord};
use crate::upstream::{self, Cluster, Failure, PickContext, Stream, UpstreamError};
use mesh_hbone::HboneStream;
use mesh_hbone::relay::endpoint::{Bytewise, Endpoint};
use mesh_hbone::relay::{Timeouts, relay};
use mesh_model::Snapshot;
use mesh_model::l7::TcpFacts;
use mesh_model::l7::route::{BackendRef, ClusterKey};
use mesh_model::l7::select::select_tcp;
use mesh_model::l7::weights::choose;
use mesh_model::lb::redraw;
use mesh_model::waypoint::Target;
use std::sync::Arc;

const DRAW_BACKEND: u64 = 31;
const DRAW_ENDPOINT: u64 = 32;

/// Carries one connection: route → endpoint → connect → relay → tell.
pub async fn serve(conn: Arc<Conn>, mut stream: HboneStream, opening: Opening) {
    let mut record = TcpRecord::begin();
    let reached = reach(&conn, opening.sni.as_deref(), &mut record).await;
    let mut upstream = match reached {
        Ok(upstream) => upstream,
        Err(error) => return failed(&conn, stream, record, &error),
    };
    if opening.undecided {
        let spoken = tokio::select! {
            spoken = first_bytes(&mut stream, None) => spoken,
            () = spoke(&mut upstream) => Spoken::Other,
        };
        let version = match spoken {
            Spoken::Http1 => Some(Version::Http1),
            Spoken::Http2 => Some(Version::Http2),
            _ => None,
        };
        if let Some(version) = version {
            // The connection made meanwhile was never used; requests choose endpoints of their own.
            drop(upstream);
            return http::serve(conn, stream.into_io(), version).await;
        }
    }
    carried(&conn, stream, upstream, record).await;
}

/// Carries one connection from outside the mesh.
pub(crate) async fn serve_outside<E: Endpoint>(conn: &Conn, client: E) {
    let mut record = TcpRecord::begin();
    match reach(conn, conn.sni.as_deref(), &mut record).await {
        Ok(upstream) => carried(conn, client, upstream, record).await,
        Err(error) => failed(conn, client, record, &error),
    }
}

/// No endpoint was reached: told here, and to the client by a reset.
fn failed(conn: &Conn, mut client: impl Endpoint, mut record: TcpRecord, error: &UpstreamError) {
    note(&mut record, error);
    conn.shared.telemetry.tcp_failed(&conn.facts, &record);
    client.reset(true);
}

/// An endpoint was reached: relay and tell.
async fn carried(conn: &Conn, client: impl Endpoint, upstream: Stream, mut record: TcpRecord) {
    let handles = conn.shared.telemetry.tcp_opened(&conn.facts, &record);
    carry(conn, client, upstream, &handles, &mut record).await;
    conn.shared.telemetry.tcp_done(&conn.facts, &record, &handles);
}

/// Relays between the client and the endpoint.
async fn carry<A>(conn: &Conn, client: A, upstream: Stream, handles: &TcpHandles, record: &mut TcpRecord)
where
    A: Endpoint,
{
    let settings = &conn.shared.settings;
    let of_policy = record.cluster.as_ref().and_then(|c| c.policy().pool.tcp_idle_timeout);
    let timeouts = Timeouts {
        idle: of_policy.or_else(|| Some(settings.tcp_idle_timeout).filter(|t| !t.is_zero())),
        half_closed: Some(settings.half_closed_timeout).filter(|t| !t.is_zero()),
    };
    let expired = ended(conn);
    let end = match upstream {
        Stream::Hbone(server, _counted) => relay(client, server, handles, expired, timeouts).await,
        Stream::Tcp(server, _counted) => relay(client, server, handles, expired, timeouts).await,
        Stream::Tls(server, _counted) => relay(client, Bytewise::new(*server), handles, expired, timeouts).await,
    };
    use mesh_hbone::relay::{End, How};
    record.details = match end.how {
        How::Closed => "",
        How::Reset(End::First) => "downstream_remote_disconnect",
        How::Reset(End::Second) => "upstream_remote_disconnect",
        How::Cancelled if conn.drain.is_draining() => "drained",
        How::Cancelled => "policy_change",
        How::Idle => "idle_timeout",
    }
    .into();
    if matches!(end.how, How::Idle) {
        record.flags.set(Flag::StreamIdleTimeout);
    }
}

/// The policies of what was addressed, as far as they can be judged without a request.
fn judge(conn: &Conn, snap: &Snapshot) -> Result<(), UpstreamError> {
    authorize::judge(snap, conn, None).map_err(|(why, _)| UpstreamError::new(Failure::Denied, why.brief()))
}

/// Resolves when a published version no longer allows the connection, or the process has drained (I6).
async fn ended(conn: &Conn) {
    let mut versions = conn.shared.mesh.watch();
    // What was published between the verdict and now counts too.
    versions.mark_changed();
    let forbidden = async {
        while versions.changed().await.is_ok() {
            versions.mark_unchanged();
            if judge(conn, &conn.shared.mesh.load()).is_err() {
                return;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = forbidden => {}
        () = conn.drain.expired() => {}
    }
}

/// Resolves when the endpoint has said something, or ended. Nothing is consumed.
async fn spoke(upstream: &mut Stream) {
    match upstream {
        Stream::Hbone(stream, _) => {
            if let Some(Ok(data)) = std::future::poll_fn(|cx| stream.poll_recv(cx)).await {
                stream.unread(data);
            }
        }
        // An error shows again at the read.
        Stream::Tcp(tcp, _) => drop(tcp.readable().await),
        // Whether a record holds anything for the client is known only by reading it: the client is heard first.
        Stream::Tls(..) => std::future::pending().await,
    }
}

/// The endpoint of a connection, connected.
async fn reach(conn: &Conn, sni: Option<&str>, record: &mut TcpRecord) -> Result<Stream, UpstreamError> {
    let draw: u64 = rand::random();
    let (cluster, host) = {
        let snap = conn.shared.mesh.load();
        judge(conn, &snap)?;
        let cluster = cluster(conn, &snap, sni, draw, record)?;
        let pick = PickContext { draw: redraw(draw, DRAW_ENDPOINT), hash: None, tried: &[], dst: Some(conn.local) };
        let host = cluster.pick(&pick)?;
        (cluster, host)
    };
    record.cluster = Some(Arc::clone(&cluster));
    record.host = Some(Arc::clone(&host));
    let connected = upstream::connect(&cluster, &host, Some(conn.client)).await;
    if let Err(error) = &connected {
        cluster.report(&host, upstream::Observed::Failed(error.failure));
    }
    connected
}

fn cluster(
    conn: &Conn,
    snap: &Snapshot,
    sni: Option<&str>,
    draw: u64,
    record: &mut TcpRecord,
) -> Result<Arc<Cluster>, UpstreamError> {
    let upstreams = &conn.shared.upstreams;
    let facts = TcpFacts { port: conn.port(), destination: Some(conn.local.ip()), sni };
    let (table, plain) = match &conn.scope {
        Scope::Mesh(Target::Workload { known, port }) => return Ok(upstreams.workload(snap, known, *port)),
        Scope::Mesh(Target::Service { service, port }) => {
            let plain = ClusterKey { service: service.key.clone(), port: *port, subset: None };
            (snap.find_routes(&service.key).cloned(), Some(plain))
        }
        Scope::Gateway { port, listener, .. } => {
            (hosts::tcp_table(&conn.shared.gateway, snap, *port, listener.as_deref(), sni), None)
        }
    };
    let no_route = || UpstreamError::new(Failure::NoCluster, "no route for this connection");
    if let Some(table) = &table {
        if let Some(why) = &table.broken {
            return Err(UpstreamError::new(Failure::NoCluster, format!("route_unusable: {why}")));
        }
        if let Some(route) = select_tcp(table, &facts) {
            record.route = Some(Arc::clone(&route.name));
            let backend = choose(&route.backends, route.total_weight, redraw(draw, DRAW_BACKEND)).ok_or_else(no_route)?;
            return match &backend.to {
                BackendRef::Service(key) => upstreams.cluster(snap, key),
                BackendRef::Invalid { why, .. } => Err(UpstreamError::new(Failure::NoCluster, why.to_string())),
            };
        }
    }
    upstreams.cluster(snap, &plain.ok_or_else(no_route)?)
}

fn note(record: &mut TcpRecord, error: &UpstreamError) {
    record.flags = flags_of(error.failure);
    record.details = error.to_string().into();
    record.reason = Some(match error.failure {
        Failure::Denied => mesh_model::Reason::NotAllowed,
        Failure::NoCluster => mesh_model::Reason::NotBound,
        Failure::NoHealthy => mesh_model::Reason::NoHealthyEndpoint,
        Failure::Overflow => mesh_model::Reason::Overloaded,
        Failure::ConnectTimeout | Failure::Timeout => mesh_model::Reason::ConnectTimeout,
        _ => mesh_model::Reason::ConnectFailed,
    });
}

fn flags_of(failure: Failure) -> Flags {
    let mut flags = Flags::default();
    flags.set(match failure {
        Failure::NoCluster => Flag::NoRouteFound,
        Failure::NoHealthy => Flag::NoHealthyUpstream,
        Failure::Overflow => Flag::UpstreamOverflow,
        Failure::ClientGone => Flag::DownstreamConnectionTermination,
        _ => Flag::UpstreamConnectionFailure,
    });
    flags
}
