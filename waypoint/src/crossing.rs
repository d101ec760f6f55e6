//! Tunnels between networks: this process as Istio's east-west gateway (`--east-west`).
//!
//! Owns the order: plan → policies of the Gateway → connect → 200 → relay → tell. What is carried is a tunnel inside the tunnel,
//! between the client and whom it leads to; nothing of it can be seen here, and that one judges it by its own policies.
//! Upstream: `listen`. Downstream: `mesh_model::plan::plan_crossing`, the relay.
use crate::conn::{Conn, Shared};
use crate::facts::{Facts, Scope};
use crate::phase::authorize;
use crate::phase::custom;
use crate::tcp;
use crate::telemetry::TcpRecord;
use crate::tunnel;
use mesh_hbone::Incoming;
use mesh_identity::Peer;
use mesh_model::authz_l7::L7Verdict;
use mesh_model::plan::{Crossing, plan_crossing};
use mesh_model::{Reason, Refusal, Snapshot};
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::sockets::{ConnectOptions, Keepalive, StreamOptions, connect};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;

/// Serves one CONNECT of another network.
pub async fn serve_stream(shared: Arc<Shared>, proof: Arc<Peer>, client: SocketAddr, incoming: Incoming, drain: DrainWatch) {
    let mut record = TcpRecord::begin();
    // I1
    let snap = shared.mesh.load_full();
    let opened = match plan(&shared, &snap, &proof, client, &incoming, drain) {
        Ok((conn, crossing)) => {
            Box::pin(open(&conn, &snap, &crossing, &mut record)).await.map(|(server, asked)| (conn, server, asked))
        }
        Err(why) => Err(why),
    };
    drop(snap);
    let (conn, server, asked) = match opened {
        Ok(opened) => opened,
        Err(why) => {
            shared.telemetry.tunnel_refused(client, Some(&proof.id), &why);
            incoming.refuse(&why);
            return;
        }
    };
    let stream = match incoming.accept([]) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%client, %error, "client went before the answer");
            return;
        }
    };
    let handles = shared.telemetry.tcp_opened(&conn.facts, &record);
    tcp::between(&conn, (stream, server), &asked, &handles, &mut record).await;
    shared.telemetry.tcp_done(&conn.facts, &record, &handles);
}

fn plan(
    shared: &Arc<Shared>,
    snap: &Snapshot,
    proof: &Peer,
    client: SocketAddr,
    incoming: &Incoming,
    drain: DrainWatch,
) -> Result<(Conn, Crossing), Refusal> {
    let crossing = plan_crossing(snap, shared.me(snap)?, &proof.id, &tunnel::asked(incoming.authority())?, rand::random())?;
    let facts = Facts {
        scope: Scope::Network { service: Arc::clone(&crossing.service), port: crossing.port },
        client,
        local: crossing.dial,
        identity: Some(proof.id.clone()),
        // Its address is another network's, so this is its own agent's word, and of nobody of this one.
        source: incoming
            .forwarded_network()
            .filter(|of| *of != snap.view().network.as_str())
            .and_then(|_| incoming.said_of(&proof.id)),
        trace: None,
        sni: None,
        plain: None,
    };
    Ok((Conn::new(Arc::clone(shared), facts, drain), crossing))
}

/// The connection to whom it leads, and the external authorizers that were asked before.
async fn open(
    conn: &Conn,
    snap: &Arc<Snapshot>,
    crossing: &Crossing,
    record: &mut TcpRecord,
) -> Result<(TcpStream, Vec<Arc<str>>), Refusal> {
    let rules = conn.in_force(snap);
    record.told.clone_from(&rules.told);
    let asked = custom::check_bytes(conn, snap, &rules, rand::random()).await.map_err(|(why, _details)| why)?;
    let judgement = authorize::judge(snap, &rules, conn, None);
    record.noted = authorize::note(conn, &judgement);
    if let L7Verdict::Deny(denial) = judgement.verdict {
        return Err(denial.refusal());
    }
    let options = ConnectOptions {
        timeout: conn.shared.settings.connect_timeout,
        stream: StreamOptions { keepalive: Some(Keepalive::default()), nodelay: true, user_timeout: None },
        ..ConnectOptions::default()
    };
    let failed = |error| Refusal::new(Reason::ConnectFailed, format!("{} of {}: {error}", crossing.dial, crossing.to.uid));
    let server = conn.shared.upstreams.connects().time(connect(crossing.dial, &options)).await.map_err(failed)?;
    Ok((server, asked))
}
