//! Listeners: the HBONE port node agents come to, and a gateway's own ports.
//!
//! Owns accepting; the data threads place. One accept loop per data thread shares each listening socket's queue. Upstream: `app`.
//! Downstream: `tunnel`, `http`, `tcp`.
use crate::conn::Shared;
use crate::{crossing, tunnel};
use mesh_hbone::Incoming;
use mesh_identity::live;
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::sockets::{BoundListener, RawAccepted};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;

pub mod certificates;
pub mod gateway;

/// Accepts on every data thread until the drain; `serve` runs on the thread with least to do.
pub fn accept_all<F, Fut>(shared: &Arc<Shared>, listener: &BoundListener, drain: &DrainWatch, serve: F) -> io::Result<()>
where
    F: Fn(Arc<Shared>, TcpStream, SocketAddr, DrainWatch) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    for worker in shared.threads.workers() {
        let (listener, shared, drain, serve) = (listener.try_clone()?, Arc::clone(shared), drain.clone(), serve.clone());
        worker.spawn(async move {
            let (on, until) = (Arc::clone(&shared), drain.clone());
            let task = move |raw, peer, live| {
                let (drain, serve, shared) = (drain.clone(), serve.clone(), Arc::clone(&shared));
                async move {
                    // A connection that already died is nobody's business.
                    if let Ok(tcp) = RawAccepted::into_tcp(raw) {
                        let held = drain.guard();
                        serve(shared, tcp, peer, drain).await;
                        drop(held);
                    }
                    drop(live);
                }
            };
            if let Err(error) = on.threads.accept(listener, until.draining(), task).await {
                tracing::error!(%error, "a listener failed");
            }
        });
    }
    Ok(())
}

/// Serves one connection to the HBONE port: first byte → gate → TLS → HTTP/2, then each CONNECT as a task of its own.
pub async fn serve_hbone(shared: Arc<Shared>, tcp: TcpStream, peer: SocketAddr, drain: DrainWatch) {
    let limit = shared.settings.handshake_timeout;
    let handshake = mesh_identity::arrival::accept(&shared.svid, &shared.gate, limit, tcp, peer.ip());
    let (tls, proof) = match Box::pin(handshake).await {
        Ok(Some(done)) => done,
        // Nothing was ever said: a probe or a scan.
        Ok(None) => return,
        Err(why) => {
            shared.telemetry.tunnel_refused(peer, None, &why);
            return;
        }
    };
    let proof = Arc::new(proof);
    let (id, cut) = shared.tunnels.admit(Arc::clone(&proof));
    // The bundles may have changed while the client took its time with the handshake.
    if !proof.is_trusted(&shared.tls.trusted()) {
        shared.tunnels.remove(id);
        return shared.telemetry.tunnel_refused(peer, Some(&proof.id), &live::no_longer_trusted());
    }
    let handler = {
        let (shared, drain) = (Arc::clone(&shared), drain.clone());
        let east_west = shared.settings.east_west;
        move |incoming: Incoming| {
            let (shared, proof, drain) = (Arc::clone(&shared), Arc::clone(&proof), drain.clone());
            async move {
                if east_west {
                    // Apart: most processes never do, and it is the larger of the two.
                    Box::pin(crossing::serve_stream(shared, proof, peer, incoming, drain)).await;
                } else {
                    tunnel::serve_stream(shared, proof, peer, incoming, drain).await;
                }
            }
        }
    };
    tokio::select! {
        served = mesh_hbone::serve(tls, Arc::clone(&shared.hbone), handler, drain) => if let Err(error) = served {
            tracing::debug!(%error, %peer, "tunnel ended");
        },
        () = cut.notified() => tracing::warn!(%peer, "tunnel closed: the peer's certificate is no longer trusted"),
    }
    shared.tunnels.remove(id);
}
