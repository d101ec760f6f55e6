//! Connections carried as bytes: TCP routes, TLS passed through, protocols in which the server speaks first.
//!
//! Owns the choice of the endpoint for a whole connection. Upstream: `tunnel`, `listen::gateway`.
//! Downstream: `upstream::connect`, the relay.
use crate::conn::Conn;
use crate::detect::Spoken;
use crate::facts::Scope;
use crate::http::{self, Version};
use crate::opening::first_bytes;
use crate::phase::authorize::{self, Living};
use crate::phase::custom;
use crate::telemetry::{Flag, TcpHandles, TcpRecord};
use crate::upstream::{self, Carrier, Cluster, Failure, PickContext, Stream, UpstreamError};
use mesh_hbone::HboneStream;
use mesh_hbone::relay::endpoint::{Bytewise, Endpoint};
use mesh_hbone::relay::{End, How, Timeouts, relay};
use mesh_model::authz_l7::L7Verdict;
use mesh_model::hosts;
use mesh_model::in_force::InForce;
use mesh_model::l7::TcpFacts;
use mesh_model::l7::destination::{Balance, HashKey};
use mesh_model::l7::hash::address_hash;
use mesh_model::l7::route::{BackendRef, ClusterKey};
use mesh_model::l7::select::select_tcp;
use mesh_model::l7::weights::choose;
use mesh_model::lb::redraw;
use mesh_model::waypoint::Target;
use mesh_model::{Reason, Refusal, Snapshot};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::Instant;

const DRAW_BACKEND: u64 = 31;
const DRAW_ENDPOINT: u64 = 32;

/// Carries one connection: policy → route → endpoint → connect → relay → tell.
///
/// `undecided`: the client has not said enough to know what it speaks; whoever speaks first decides.
pub async fn serve(mut conn: Conn, mut stream: HboneStream, undecided: bool) {
    let mut record = TcpRecord::begin();
    let mut reached = Box::pin(reach(&conn, &mut record)).await;
    if undecided {
        let spoken = match &mut reached {
            Ok(Reached { upstream, .. }) => tokio::select! {
                spoken = first_bytes(&mut stream, None) => spoken,
                () = spoke(upstream) => Spoken::Other,
            },
            // Policies refuse these bytes; what the client is slow to say may be requests, or a name, that they allow.
            Err(Unreached::Refused { .. }) => {
                let limit = Instant::now() + conn.shared.settings.handshake_timeout;
                first_bytes(&mut stream, Some(limit)).await
            }
            Err(Unreached::Failed(_)) => Spoken::Other,
        };
        match spoken {
            // A connection made meanwhile was never used; requests choose endpoints of their own.
            Spoken::Http1 => return http::serve(Arc::new(conn), stream.into_io(), Version::Http1).await,
            Spoken::Http2 => return http::serve(Arc::new(conn), stream.into_io(), Version::Http2).await,
            // Policies and routes may ask for the name: from the beginning with it.
            Spoken::Tls(sni @ Some(_)) => {
                conn.facts.sni = sni;
                drop(reached);
                record = TcpRecord::begin();
                reached = Box::pin(reach(&conn, &mut record)).await;
            }
            _ => {}
        }
    }
    match reached {
        Ok(upstream) => carried(&conn, stream, upstream, record).await,
        Err(why) => failed(&conn, stream, record, why),
    }
}

/// Carries one connection from outside the mesh.
pub(crate) async fn serve_outside<E: Endpoint>(conn: &Conn, client: E) {
    let mut record = TcpRecord::begin();
    match Box::pin(reach(conn, &mut record)).await {
        Ok(upstream) => carried(conn, client, upstream, record).await,
        Err(why) => failed(conn, client, record, why),
    }
}

/// An endpoint, connected.
struct Reached {
    upstream: Carrier,
    /// External authorizers that were asked before.
    asked: Vec<Arc<str>>,
}
/// Why no endpoint was reached.
enum Unreached {
    /// By policy, or for want of a route; in the words of the access log.
    Refused { why: Refusal, details: String },
    /// The destination's fault.
    Failed(UpstreamError),
}
impl From<UpstreamError> for Unreached {
    fn from(error: UpstreamError) -> Self {
        Self::Failed(error)
    }
}

/// No endpoint was reached: told here, and to the client by a reset.
fn failed(conn: &Conn, mut client: impl Endpoint, mut record: TcpRecord, why: Unreached) {
    match why {
        Unreached::Refused { why, details } => {
            tracing::debug!(client = %conn.client, %why, "connection refused");
            if matches!(why.reason, Reason::NotBound | Reason::RouteUnusable) {
                record.flags.set(Flag::NoRouteFound);
            }
            record.reason = Some(why.reason);
            record.details = details.into();
        }
        Unreached::Failed(error) => {
            let (flag, reason) = told(error.failure);
            record.flags.set(flag);
            record.reason = Some(error.reason.unwrap_or(reason));
            record.details = error.to_string().into();
        }
    }
    conn.shared.telemetry.tcp_failed(&conn.facts, &record);
    client.reset(true);
}

/// An endpoint was reached: relay and tell.
async fn carried(conn: &Conn, client: impl Endpoint, upstream: Reached, mut record: TcpRecord) {
    let handles = conn.shared.telemetry.tcp_opened(&conn.facts, &record);
    carry(conn, client, upstream, &handles, &mut record).await;
    conn.shared.telemetry.tcp_done(&conn.facts, &record, &handles);
}

/// Relays between the client and the endpoint.
async fn carry<A>(conn: &Conn, client: A, reached: Reached, handles: &TcpHandles, record: &mut TcpRecord)
where
    A: Endpoint,
{
    let Reached { upstream, asked } = reached;
    match upstream {
        Carrier::Straight(Stream::Hbone(server, _counted)) => between(conn, (client, server), &asked, handles, record).await,
        Carrier::Straight(Stream::Tcp(server, _counted)) => between(conn, (client, server), &asked, handles, record).await,
        Carrier::Straight(Stream::Tls(server, _counted)) => {
            between(conn, (client, Bytewise::new(*server)), &asked, handles, record).await;
        }
        Carrier::Forwarded(server) => between(conn, (client, Bytewise::new(*server)), &asked, handles, record).await,
    }
}

/// Relays until either end, a limit of the destination (for its idle time else the process's), a policy or the drain ends it.
/// `asked`: external authorizers that agreed.
pub(crate) async fn between<A: Endpoint, B: Endpoint>(
    conn: &Conn,
    (client, server): (A, B),
    asked: &[Arc<str>],
    handles: &TcpHandles,
    record: &mut TcpRecord,
) {
    let settings = &conn.shared.settings;
    let pool = record.cluster.as_ref().map(|c| &c.policy().pool);
    let longest = pool.and_then(|p| p.max_connection_duration);
    let timeouts = Timeouts {
        idle: pool.and_then(|p| p.tcp_idle_timeout).or_else(|| Some(settings.tcp_idle_timeout).filter(|t| !t.is_zero())),
        half_closed: Some(settings.half_closed_timeout).filter(|t| !t.is_zero()),
    };
    let cut = OnceLock::new();
    let expired = async {
        tokio::select! {
            // Set once: this future ends here.
            details = authorize::revoked(conn, Living::Bytes(asked)) => drop(cut.set(Cut::Revoked(details))),
            () = lasted(longest) => drop(cut.set(Cut::Lasted)),
            () = conn.drain.expired() => {}
        }
    };
    let end = relay(client, server, handles, expired, timeouts).await;
    record.details = match end.how {
        How::Closed => "",
        How::Reset(End::First) => "downstream_remote_disconnect",
        How::Reset(End::Second) => "upstream_remote_disconnect",
        How::Cancelled => "drained",
        How::Idle => "idle_timeout",
    }
    .into();
    match cut.into_inner() {
        Some(Cut::Revoked(details)) => {
            record.reason = Some(Reason::Revoked);
            record.details = details.into();
        }
        Some(Cut::Lasted) => {
            record.flags.set(Flag::DurationTimeout);
            record.details = "duration_timeout".into();
        }
        None => {}
    }
    if matches!(end.how, How::Idle) {
        record.flags.set(Flag::StreamIdleTimeout);
    }
}

/// Why a connection was ended that neither side ended.
enum Cut {
    /// It may be no longer; with what is told of it.
    Revoked(String),
    /// It lasted as long as the destination lets it.
    Lasted,
}
/// Resolves after `longest`; never, where there is no limit.
async fn lasted(longest: Option<Duration>) {
    match longest {
        Some(longest) => tokio::time::sleep(longest).await,
        None => std::future::pending().await,
    }
}

/// Resolves when the endpoint has said something, or ended. Nothing is consumed.
async fn spoke(upstream: &mut Carrier) {
    match upstream {
        Carrier::Straight(Stream::Hbone(stream, _)) => {
            if let Some(Ok(data)) = std::future::poll_fn(|cx| stream.poll_recv(cx)).await {
                stream.unread(data);
            }
        }
        // An error shows again at the read.
        Carrier::Straight(Stream::Tcp(tcp, _)) => drop(tcp.readable().await),
        // Whether a record holds anything for the client is known only by reading it: the client is heard first.
        Carrier::Straight(Stream::Tls(..)) => std::future::pending().await,
        Carrier::Forwarded(forwarded) => forwarded.readable().await,
    }
}

/// The endpoint of a connection, connected.
async fn reach(conn: &Conn, record: &mut TcpRecord) -> Result<Reached, Unreached> {
    let draw: u64 = rand::random();
    let asked;
    let (cluster, host) = {
        let snap = conn.shared.mesh.load_full();
        let rules = conn.in_force(&snap);
        record.told.clone_from(&rules.told);
        // While it is not known what the client speaks they may be asked in vain, and once more when it named a host in TLS.
        asked = custom::check_bytes(conn, &snap, &rules, draw).await.map_err(|(why, details)| {
            if details.starts_with("ext_authz") {
                record.flags.set(Flag::UnauthorizedExternal);
            }
            Unreached::Refused { why, details }
        })?;
        let judgement = authorize::judge(&snap, &rules, conn, None);
        record.noted = authorize::note(conn, &judgement);
        if let L7Verdict::Deny(denial) = judgement.verdict {
            return Err(Unreached::Refused { why: denial.refusal(), details: denial.details() });
        }
        let cluster = cluster(conn, &snap, &rules, draw, record).await?;
        let pick = PickContext {
            draw: redraw(draw, DRAW_ENDPOINT),
            hash: hash_of_address(conn, &cluster),
            session: None,
            tried: &[],
            before: &[],
            dst: conn.asked(),
            name: conn.sni.as_deref(),
        };
        let host = cluster.pick(&pick)?;
        (cluster, host)
    };
    record.cluster = Some(Arc::clone(&cluster));
    record.host = Some(Arc::clone(&host));
    let connected = upstream::connect(&cluster, &host, Some(conn.client), conn.trace).await;
    let came = connected.as_ref().map_or_else(|e| upstream::Observed::Failed(e.failure), |_| upstream::Observed::Connected);
    cluster.report(&host, came);
    Ok(Reached { upstream: connected?, asked })
}

/// The hash of a destination that keeps each client's address at one endpoint; other keys are of requests.
fn hash_of_address(conn: &Conn, cluster: &Cluster) -> Option<u64> {
    let by_address = matches!(cluster.policy().balance, Balance::Hash { key: HashKey::SourceIp, .. });
    by_address.then(|| address_hash(conn.client.ip()))
}

async fn cluster(
    conn: &Conn,
    snap: &Arc<Snapshot>,
    rules: &InForce,
    draw: u64,
    record: &mut TcpRecord,
) -> Result<Arc<Cluster>, Unreached> {
    let sni = conn.sni.as_deref();
    let upstreams = &conn.shared.upstreams;
    let facts = TcpFacts { port: conn.port(), destination: Some(conn.local.ip()), sni };
    let (table, plain) = match &conn.scope {
        Scope::Mesh(Target::Workload { known, port }) => return Ok(upstreams.workload(snap, known, *port)),
        Scope::Mesh(Target::Service { service, port }) => {
            let plain = ClusterKey { service: service.key.clone(), port: *port, subset: None };
            (rules.routes.clone(), Some(plain))
        }
        Scope::Network { .. } => (None, None),
        Scope::Gateway { port, listener, .. } => {
            (hosts::tcp_table(&conn.shared.gateway, snap, *port, listener.as_deref(), sni), None)
        }
    };
    let refused = |why: Refusal| Unreached::Refused { details: why.brief(), why };
    let no_route = || refused(Refusal::new(Reason::NotBound, "no route for this connection"));
    if let Some(table) = &table {
        if let Some(why) = &table.broken {
            return Err(refused(Refusal::new(Reason::RouteUnusable, why.to_string())));
        }
        if let Some(route) = select_tcp(table, &facts) {
            record.route = Some(Arc::clone(&route.name));
            let backend = choose(&route.backends, route.total_weight, redraw(draw, DRAW_BACKEND)).ok_or_else(no_route)?;
            return match &backend.to {
                BackendRef::Service(key) => Ok(upstreams.cluster(snap, key, conn.role()).await?),
                BackendRef::Invalid { why, .. } => Err(UpstreamError::new(Failure::NoCluster, why.to_string()).into()),
            };
        }
    }
    Ok(upstreams.cluster(snap, &plain.ok_or_else(no_route)?, conn.role()).await?)
}

/// Envoy's flag and our reason.
fn told(failure: Failure) -> (Flag, Reason) {
    match failure {
        Failure::NoCluster => (Flag::NoRouteFound, Reason::NotBound),
        Failure::NoHealthy => (Flag::NoHealthyUpstream, Reason::NoHealthyEndpoint),
        Failure::Overflow => (Flag::UpstreamOverflow, Reason::Overloaded),
        Failure::ClientGone => (Flag::DownstreamConnectionTermination, Reason::ConnectFailed),
        Failure::ConnectTimeout | Failure::Timeout => (Flag::UpstreamConnectionFailure, Reason::ConnectTimeout),
        _ => (Flag::UpstreamConnectionFailure, Reason::ConnectFailed),
    }
}
