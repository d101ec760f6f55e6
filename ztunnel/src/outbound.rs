//! Outbound: a pod's own connections, from the capture to the end of the relay. Read [`serve_conn`] first.
//!
//! Owns the order of the phases. Every decision is `mesh-model`'s, every effect somebody else's; what is refused is told
//! and the application sees a reset. Upstream: the capture listener on 15001. Downstream: `dial`, the relay, `report`.
use crate::accept::Accepted;
use crate::carry;
use crate::conns::{Carried, Direction, Facts};
use crate::dial::{self, Reached};
use crate::dns;
use crate::pod::Pod;
use crate::record::Record;
use crate::report;
use crate::spans::Tracing;
use mesh_hbone::{ConnectRequest, headers};
use mesh_model::conn::OutboundConn;
use mesh_model::plan::{Dial, OutboundPlan, plan_outbound};
use mesh_model::wanted::{self, Wanted};
use mesh_model::workload::Workload;
use mesh_model::{ClientAddr, HboneAuthority, NetworkAddr, OrigDst, Reason, Refusal};
use mesh_runtime::sockets::reset_on_close;
use mesh_sources::demand::Fetched;
use parking_lot::Mutex;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Endpoints tried for one connection before giving up. Only failures that say another one may help are tried again.
const ATTEMPTS: usize = 3;
/// Draws of one attempt, where gateways just failed.
const DRAWS: usize = 8;
/// Parts of the mesh that one plan may lack, one after the other: a service, its waypoint, that one's gateway.
const LACKING: usize = 5;
/// How long istiod may take to say what a destination is.
const ON_DEMAND: Duration = Duration::from_secs(5);

/// Serves one captured connection: capture → plan → dial → relay → report.
pub async fn serve_conn(pod: Arc<Pod>, accepted: Accepted) {
    // capture: what did the application want?
    let dst = accepted.original_dst;
    if dst.port() == dns::CAPTURED && pod.captures_dns() {
        // Boxed, so that every other connection does not carry its state.
        return Box::pin(dns::serve_tcp(&pod, accepted.tcp)).await;
    }
    let mut record = Record::new(Direction::Outbound, accepted.peer, dst);
    record.trace = pod.shared.tracing.as_ref().and_then(Tracing::draw);

    // In the table from here on: whoever drains or ends the pod counts a connection that is still being dialled.
    let live = pod.conns.admit(Facts {
        direction: Direction::Outbound,
        src: accepted.peer,
        original_dst: dst,
        actual_dst: Mutex::new((dst, Carried::Tcp)),
        identity: None,
    });

    // plan and dial, again with another endpoint when the failure allows it. Boxed: its states (TLS, names, two tunnels) are
    // large and gone once the relay runs, which may be for days.
    let reached = tokio::select! {
        biased;
        () = live.cut.wait() => Err(live.cut.why().cloned().unwrap_or_else(|| Refusal::new(Reason::Internal, "cut"))),
        reached = Box::pin(plan_and_dial(&pod, accepted.peer, dst, &mut record)) => reached,
    };
    let reached = match reached {
        Ok(reached) => reached,
        Err(why) => {
            report::refused(&pod.shared, &record, &why);
            // The application learns at once, and cannot mistake a refusal for an empty answer.
            let _ = reset_on_close(&accepted.tcp);
            return;
        }
    };
    *live.facts.actual_dst.lock() = (record.dst, reached.carried);

    // relay, as long as nobody cuts it
    if let Reached::Beyond { peer, baggage, .. } = &reached.path {
        let said = |baggage: &http::HeaderValue| headers::Baggage::parse(baggage.as_bytes()).workload(peer);
        record.destination = baggage.as_ref().map(|baggage| Arc::new(said(baggage)));
        record.destination_id = Some(peer.clone());
    }
    let handles = pod.shared.metrics.open(&record);
    let why = match reached.path {
        Reached::Tcp(upstream) => {
            carry::both(accepted.tcp, upstream, pod.shared.settings.half_closed_timeout, &handles, &live.cut).await
        }
        Reached::Tunnel(stream) | Reached::Beyond { stream, .. } => {
            carry::both(accepted.tcp, stream, pod.shared.settings.half_closed_timeout, &handles, &live.cut).await
        }
    };

    // report
    drop(live);
    report::ended(&pod.shared, &record, &handles, why.as_ref());
}

struct Path {
    path: Reached,
    carried: Carried,
}

/// Plans by one snapshot per attempt (I1) and dials the outcome.
async fn plan_and_dial(pod: &Arc<Pod>, client: SocketAddr, dst: SocketAddr, record: &mut Record) -> Result<Path, Refusal> {
    if client.ip() == dst.ip() || dst.ip().is_loopback() {
        pod.refuse_own(dst)?;
    }
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let (plan, source, draw) = plan_around_failures(pod, client, dst, record).await?;
        record.service.clone_from(&plan.service);
        record.destination.clone_from(&plan.workload);
        record.around.clone_from(&plan.around);
        let again = may_try_another(&plan);
        if let Dial::Name { host, .. } = &plan.dial {
            pod.shared.metrics.resolves(&source, &pod.identity, host);
        }
        let dial = dial::resolve_name(pod, plan.dial, client.ip(), draw).await?;
        describe(record, pod, &dial);
        let request = |authority: &HboneAuthority| connect_request(pod, &source, authority, client, record);
        match dial::reach(pod, &dial, source_ip(&source, client), request).await {
            Ok(path) => return Ok(Path { path, carried: carried(&dial) }),
            // Not what the reason says in general but what this answer says: a peer that answered 401 means it, and a caller
            // refused by one endpoint must not be moved to the next.
            Err(error) if again && error.retry => {
                pod.shared.gateways.note(&dial, &error);
                last = Some(Refusal::from(&error));
            }
            Err(error) => return Err(Refusal::from(&error)),
        }
    }
    Err(last.unwrap_or_else(|| Refusal::new(Reason::Internal, "no attempt was made")))
}

/// A plan and its draw: another one where a gateway of another network was drawn that just failed. Where all have, one of them.
async fn plan_around_failures(
    pod: &Arc<Pod>,
    client: SocketAddr,
    dst: SocketAddr,
    record: &mut Record,
) -> Result<(OutboundPlan, Arc<Workload>, u64), Refusal> {
    let mut draws = 0;
    loop {
        let draw = rand::random();
        let (plan, source) = plan(pod, client, dst, draw, record).await?;
        draws += 1;
        if draws == DRAWS || !pod.shared.gateways.has(&plan.dial) {
            return Ok((plan, source, draw));
        }
    }
}

/// Plans by one snapshot (I1). Where the mesh is told on demand, what the plan lacks is asked for first: a destination nobody has
/// spoken of may belong to the mesh, and must not be reached around it (I2).
async fn plan(
    pod: &Arc<Pod>,
    client: SocketAddr,
    dst: SocketAddr,
    draw: u64,
    record: &mut Record,
) -> Result<(OutboundPlan, Arc<Workload>), Refusal> {
    for _ in 0..LACKING {
        let (outcome, source, lacking) = {
            let snap = pod.shared.mesh.load();
            let source = Arc::clone(pod.workload(&snap)?);
            record.source = Some(Arc::clone(&source));
            let conn = OutboundConn { source: &source, client: ClientAddr::from(client), dst: OrigDst::from(dst), draw };
            let outcome = plan_outbound(&snap, &conn);
            let lacking = pod.shared.mesh.demand().and_then(|demand| {
                demand.touch(&Wanted::Address(NetworkAddr { network: snap.view().network.clone(), ip: conn.dst.ip() }));
                if let Ok(OutboundPlan { service: Some(service), .. }) = &outcome {
                    demand.touch(&Wanted::Service(service.key.clone()));
                }
                wanted::of_outbound(&snap, &conn, &outcome)
            });
            (outcome, source, lacking)
        };
        let Some(lacking) = lacking else { return outcome.map(|plan| (plan, source)) };
        match pod.shared.mesh.fetch(&lacking, ON_DEMAND).await {
            Fetched::Found => {}
            Fetched::Absent => return outcome.map(|plan| (plan, source)),
            Fetched::Unanswered => {
                let detail = format!("istiod did not say what {lacking} is (XDS_ON_DEMAND)");
                return Err(Refusal::new(Reason::UnknownWorkload, detail));
            }
        }
    }
    Err(Refusal::new(Reason::UnknownWorkload, format!("{dst}: what istiod tells of it refers to ever more")))
}

/// Another endpoint can only be drawn where the connection was addressed to a service.
fn may_try_another(plan: &OutboundPlan) -> bool {
    plan.service.is_some() && !matches!(plan.dial, Dial::Passthrough(_))
}

/// Which address the tunnel is opened from: part of the pool's key, so that a pod with several addresses keeps each.
fn source_ip(source: &Workload, client: SocketAddr) -> std::net::IpAddr {
    let ip = client.ip();
    if source.ips.contains(&ip) { ip } else { source.ips.first().copied().unwrap_or(ip) }
}

fn carried(dial: &Dial) -> Carried {
    match dial {
        Dial::Passthrough(_) | Dial::Plain(_) | Dial::Name { .. } => Carried::Tcp,
        Dial::Hbone(_) => Carried::Hbone,
        Dial::DoubleHbone { .. } => Carried::DoubleHbone,
    }
}

/// Puts into the record where the connection goes and who is expected there.
fn describe(record: &mut Record, pod: &Pod, dial: &Dial) {
    let hop = match dial {
        Dial::Passthrough(to) | Dial::Plain(to) => {
            record.dst = to.0;
            record.hbone = None;
            record.source_id = None;
            record.destination_id = None;
            return;
        }
        Dial::Hbone(hop) | Dial::DoubleHbone { outer: hop, .. } => hop,
        Dial::Name { .. } => return,
    };
    record.dst = hop.dial.0;
    record.hbone = Some(hop.authority.to_string().into());
    record.source_id = Some(pod.identity.clone());
    record.destination_id = hop.expect.first().cloned();
}

fn connect_request(
    pod: &Pod,
    source: &Arc<Workload>,
    authority: &HboneAuthority,
    client: SocketAddr,
    record: &Record,
) -> ConnectRequest {
    let mut request = ConnectRequest::to(authority.clone());
    request.baggage = pod.baggage(source);
    request.forwarded = headers::forwarded(client, record.service.as_ref().map(|s| &*s.key.hostname));
    request.traceparent = record.trace.as_ref().map_or_else(headers::random_traceparent, |trace| trace.header());
    if matches!(authority, HboneAuthority::Name { .. })
        && let Ok(network) = http::HeaderValue::from_str(pod.shared.mesh.load().view().network.as_str())
    {
        request.extra.push((headers::FORWARDED_NETWORK, network));
    }
    request
}
