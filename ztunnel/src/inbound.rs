//! Inbound over HBONE: from the first byte on 15008 to the end of each stream's relay. Read [`serve_conn`] and then
//! `serve_stream`.
//!
//! Owns the order of the phases. Upstream: the pod's listener on 15008. Downstream: TLS, the HTTP/2 server, `deliver`, the
//! relay, `report`.
use crate::accept::Accepted;
use crate::carry;
use crate::conns::{Admitted, Carried, Direction, Facts};
use crate::deliver;
use crate::pod::Pod;
use crate::proxy_protocol;
use crate::record::Record;
use crate::report;
use mesh_hbone::{Incoming, headers};
use mesh_identity::{Peer, live};
use mesh_model::authz::{Verdict, authorize};
use mesh_model::conn::InboundConn;
use mesh_model::inbound::{InboundPlan, plan_inbound};
use mesh_model::source::find_source;
use mesh_model::wanted;
use mesh_model::workload::{ApplicationTunnel, Workload};
use mesh_model::{HboneAuthority, Reason, Refusal, Snapshot, SpiffeId};
use parking_lot::Mutex;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long istiod may take to say what is asked for.
const ON_DEMAND: Duration = Duration::from_secs(5);

/// Serves one connection to 15008: first byte → gate → TLS → HTTP/2, then each CONNECT as a task of its own.
pub async fn serve_conn(pod: Arc<Pod>, accepted: Accepted) {
    let (peer, local) = (accepted.peer, accepted.original_dst);
    // From here to the tunnel's end: who was let in before a drain is not cut by a process that ends sooner.
    let _held = pod.drain.guard();
    let (gate, limit) = (&pod.shared.gate, pod.shared.settings.handshake_timeout);
    let handshake = mesh_identity::arrival::accept(&pod.svid, gate, limit, accepted.tcp, peer.ip());
    let (tls, proof) = match Box::pin(handshake).await {
        Ok(Some(done)) => done,
        // Nothing was ever said: a probe or a scan. Nobody is denied anything.
        Ok(None) => return,
        Err(why) => {
            let mut record = Record::new(Direction::Inbound, peer, local);
            record.destination = pod.workload(&pod.shared.mesh.load()).ok().cloned();
            if why.reason == Reason::Overloaded {
                // Whoever floods us with handshakes does not get to flood the log as well.
                report::counted(&pod.shared, &record, &why);
            } else {
                report::refused(&pod.shared, &record, &why);
            }
            return;
        }
    };
    let proof = Arc::new(proof);
    let (id, cut) = pod.tunnels.admit(Arc::clone(&proof));
    // The bundles may have changed while the client took its time with the handshake.
    let trusted = proof.is_trusted(&pod.shared.svids.tls().trusted());
    if !trusted {
        pod.tunnels.remove(id);
        let mut record = Record::new(Direction::Inbound, peer, local);
        record.destination = pod.workload(&pod.shared.mesh.load()).ok().cloned();
        record.source_id = Some(proof.id.clone());
        return report::refused(&pod.shared, &record, &live::no_longer_trusted());
    }
    let handler = {
        let pod = Arc::clone(&pod);
        move |incoming: Incoming| serve_stream(Arc::clone(&pod), Arc::clone(&proof), peer, local, incoming)
    };
    let serve = mesh_hbone::serve(tls, Arc::clone(&pod.shared.hbone), handler, pod.drain.clone());
    tokio::select! {
        served = serve => if let Err(error) = served {
            pod.shared.metrics.refused(Direction::Inbound, error.reason);
            tracing::debug!(%error, %peer, "tunnel ended");
        },
        // Dropping the server ends the tunnel at once; its streams end with it.
        () = cut.notified() => {
            pod.shared.metrics.cut.inc();
            pod.shared.metrics.refused(Direction::Inbound, Reason::Revoked);
            tracing::warn!(%peer, "tunnel closed: the peer's certificate is no longer trusted");
        }
    }
    pod.tunnels.remove(id);
}

/// Serves one CONNECT: plan → enter → authorize → deliver → 200 → relay → report.
async fn serve_stream(pod: Arc<Pod>, proof: Arc<Peer>, client: SocketAddr, local: SocketAddr, mut incoming: Incoming) {
    let mut record = Record::new(Direction::Inbound, client, local);
    record.hbone = Some(incoming.authority().into());
    record.trace = pod.shared.tracing.as_ref().and_then(|tracing| tracing.under(incoming.traceparent()));
    record.source_id = Some(proof.id.clone());
    record.destination_id = Some(pod.identity.clone());
    let beyond = incoming.client_beyond(&pod.shared.mesh.load(), client.ip(), &proof.id);

    let authority: Box<str> = incoming.authority().into();
    let admitted = tokio::select! {
        // Boxed: gone once the relay runs, which may be for days.
        admitted = Box::pin(admit(&pod, &proof, client, local, &authority, &mut record)) => admitted,
        // Nobody waits for an answer any more; what was dialled so far is dropped.
        gone = incoming.cancelled() => {
            report::refused(&pod.shared, &record, &Refusal::new(Reason::Reset, format!("by the client before an answer: {gone}")));
            return;
        }
        () = pod.drain.expired() => Err(Refusal::new(Reason::Draining, "")),
    };
    record.source = record.source.or(beyond);
    let (live, upstream, workload) = match admitted {
        Ok(done) => done,
        Err(why) => {
            report::refused(&pod.shared, &record, &why);
            incoming.refuse(&why);
            return;
        }
    };
    // A change between the verdict and now has already thrown the switch (I5).
    if let Some(why) = live.cut.why() {
        report::refused(&pod.shared, &record, why);
        incoming.refuse(why);
        return;
    }
    let baggage = pod.shared.settings.response_baggage.then(|| pod.baggage(&workload)).flatten();
    let stream = match incoming.accept(baggage.map(|b| (headers::BAGGAGE, b))) {
        Ok(stream) => stream,
        Err(error) => {
            report::refused(&pod.shared, &record, &Refusal::from(&error));
            return;
        }
    };
    let handles = pod.shared.metrics.open(&record);
    let why = carry::both(stream, upstream, pod.shared.settings.half_closed_timeout, &handles, &live.cut).await;
    drop(live);
    report::ended(&pod.shared, &record, &handles, why.as_ref());
}

/// Plan, entry, verdict and delivery of one CONNECT.
async fn admit(
    pod: &Arc<Pod>,
    proof: &Peer,
    client: SocketAddr,
    local: SocketAddr,
    authority: &str,
    record: &mut Record,
) -> Result<(Admitted, TcpStream, Arc<Workload>), Refusal> {
    let authority = HboneAuthority::parse(authority)
        .ok_or_else(|| Refusal::new(Reason::BadRequest, format!("authority {authority:?} is neither ip:port nor host:port")))?;
    ask_for(pod, local, &authority).await;
    let (plan, workload, live) = {
        let snap = pod.shared.mesh.load();
        let workload = Arc::clone(pod.workload(&snap)?);
        record.destination = Some(Arc::clone(&workload));
        record.source = find_source(&snap, client.ip(), Some(&proof.id)).cloned();
        let plan = plan_inbound(&snap, &workload, local, &authority)?;
        record.service.clone_from(&plan.service);
        let live = pod.conns.admit(Facts {
            direction: Direction::Inbound,
            src: client,
            original_dst: local,
            actual_dst: Mutex::new((plan.dst, Carried::Hbone)),
            identity: Some(proof.id.clone()),
        });
        // Judged by what is current *after* the entry: a version published since `snap` may already have passed over the
        // table without seeing this connection (I5).
        let now = pod.shared.mesh.load();
        judge(pod, &now, pod.workload(&now)?, client, plan.dst, Some(&proof.id))?;
        (plan, workload, live)
    };
    let upstream = connect(pod, &plan, client, &proof.id).await?;
    Ok((live, upstream, workload))
}

/// Where the mesh is told on demand: what it takes to know what is asked for. What does not come in time is refused as unknown.
async fn ask_for(pod: &Pod, local: SocketAddr, authority: &HboneAuthority) {
    let mesh = &pod.shared.mesh;
    let lacking = mesh.demand().and_then(|_| {
        let snap = mesh.load();
        wanted::of_inbound(&snap, pod.workload(&snap).ok()?, local, authority)
    });
    if let Some(lacking) = lacking {
        mesh.fetch(&lacking, ON_DEMAND).await;
    }
}

/// Connects to the application, plainly or through its application tunnel.
async fn connect(pod: &Pod, plan: &InboundPlan, client: SocketAddr, id: &SpiffeId) -> Result<TcpStream, Refusal> {
    if let Some(metrics) = pod.metrics {
        return deliver::local(pod, deliver::only_metrics(plan.dst, metrics)?).await;
    }
    let Some(ApplicationTunnel::Proxy(port)) = plan.tunnel else {
        return deliver::deliver(pod, client, plan.dst).await;
    };
    let loopback = match plan.dst.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let to = SocketAddr::new(loopback, port.unwrap_or(plan.dst.port()));
    let mut tcp = deliver::local(pod, to).await?;
    proxy_protocol::write_header(&mut tcp, client, plan.asked, id)
        .await
        .map_err(|e| Refusal::new(Reason::ConnectFailed, format!("{to}: PROXY header: {e}")))?;
    Ok(tcp)
}

/// The verdict as a result; dry-run policies that matched are logged.
pub fn judge(
    pod: &Pod,
    snap: &Snapshot,
    workload: &Workload,
    client: SocketAddr,
    dst: SocketAddr,
    identity: Option<&SpiffeId>,
) -> Result<(), Refusal> {
    let decision = authorize(snap, workload, &InboundConn { client: client.into(), dst, identity });
    for policy in &decision.dry_run {
        tracing::info!(target: "ztunnel::rbac", %policy, %client, %dst, "dry-run policy matched");
    }
    match decision.verdict {
        Verdict::Allow(policy) => {
            match policy {
                Some(policy) if pod.shared.settings.log_allowed => {
                    tracing::info!(target: "ztunnel::rbac", %policy, %client, %dst, "allowed");
                }
                Some(policy) => tracing::debug!(target: "ztunnel::rbac", %policy, %client, %dst, "allowed"),
                None => {}
            }
            Ok(())
        }
        Verdict::Deny(why) => Err(why),
    }
}
