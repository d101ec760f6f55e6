//! Inbound plaintext: connections to a pod that did not come through a tunnel.
//!
//! The same policies judge them, with no identity; STRICT is one of those policies. What they refuse passes all the same if the
//! node itself opened it (`node`). Upstream: the capture listener on
//! 15006. Downstream: `deliver`, the relay, `report`.
use crate::accept::Accepted;
use crate::carry;
use crate::conns::{Carried, Direction, Facts, Live};
use crate::deliver::deliver;
use crate::inbound::judge;
use crate::pod::Pod;
use crate::record::Record;
use crate::report;
use crate::spans::Tracing;
use mesh_model::Refusal;
use mesh_model::source::find_source;
use mesh_runtime::sockets::reset_on_close;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::net::TcpStream;

/// Serves one plaintext connection: capture → authorize → deliver → relay → report.
pub async fn serve_conn(pod: Arc<Pod>, accepted: Accepted) {
    let dst = accepted.original_dst;
    let mut record = Record::new(Direction::Inbound, accepted.peer, dst);
    record.trace = pod.shared.tracing.as_ref().and_then(Tracing::draw);
    let live = pod.conns.admit(Facts {
        direction: Direction::Inbound,
        src: accepted.peer,
        original_dst: dst,
        actual_dst: Mutex::new((dst, Carried::Tcp)),
        identity: None,
    });
    let upstream = match Box::pin(admit(&pod, &accepted, &live, &mut record)).await {
        Ok(upstream) => upstream,
        Err(why) => {
            report::refused(&pod.shared, &record, &why);
            let _ = reset_on_close(&accepted.tcp);
            return;
        }
    };
    let handles = pod.shared.metrics.open(&record);
    let why = carry::both(accepted.tcp, upstream, pod.shared.settings.half_closed_timeout, &handles, &live.cut).await;
    drop(live);
    report::ended(&pod.shared, &record, &handles, why.as_ref());
}

/// Authorizes and connects to the application.
async fn admit(pod: &Arc<Pod>, accepted: &Accepted, live: &Live, record: &mut Record) -> Result<TcpStream, Refusal> {
    let dst = accepted.original_dst;
    pod.refuse_own(dst)?;
    {
        let snap = pod.shared.mesh.load();
        let workload = pod.workload(&snap)?;
        record.destination = Some(Arc::clone(workload));
        record.source = find_source(&snap, accepted.peer.ip(), None).cloned();
        if let Err(why) = judge(pod, &snap, workload, accepted.peer, dst, None) {
            if !pod.shared.node.opened(accepted.peer, dst) {
                return Err(why);
            }
            live.of_node.store(true, Ordering::Relaxed);
            record.of_node = true;
        }
    }
    deliver(pod, accepted.peer, dst).await
}
