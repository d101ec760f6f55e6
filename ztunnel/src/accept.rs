//! Accept loops: one task per listener of a pod.
//!
//! Owns what is known of a connection that was accepted; the data threads place it, once and for all. Refuses nothing itself. Upstream: the listeners `pods` bound. Downstream: the three directions.
use crate::pod::Pod;
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::sockets::{BoundListener, RawAccepted};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;

/// A connection on the data thread that will serve it.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub tcp: TcpStream,
    /// Its peer.
    pub peer: SocketAddr,
    /// What the peer wanted to reach, before redirection.
    pub original_dst: SocketAddr,
}

/// Accepts until `stop` drains. `serve` runs on the chosen data thread.
pub async fn run<F, Fut>(pod: Arc<Pod>, listener: BoundListener, stop: DrainWatch, serve: F) -> io::Result<()>
where
    F: Fn(Arc<Pod>, Accepted) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let task = |raw, peer, live| {
        let pod = Arc::clone(&pod);
        async move {
            if let Some(accepted) = register(raw, peer) {
                pod.known().await;
                serve(pod, accepted).await;
            }
            drop(live);
        }
    };
    pod.shared.threads.accept(listener, stop.draining(), task).await
}

/// Registers the connection with this thread. A connection that already died is nobody's business.
fn register(raw: RawAccepted, peer: SocketAddr) -> Option<Accepted> {
    let original_dst = raw.original_dst().ok()?;
    Some(Accepted { tcp: raw.into_tcp().ok()?, peer, original_dst })
}
