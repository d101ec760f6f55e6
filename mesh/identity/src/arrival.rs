//! The way in, from an accepted socket to a peer that has proved who it is. Nothing is held for whoever does not speak, and
//! no more handshakes run at once than the gate lets in.

use crate::cache::SvidHandle;
use crate::tls::{self, Peer, ServerStream};
use mesh_model::{Reason, Refusal};
use mesh_runtime::gate::Gate;
use std::net::IpAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Makes a server's connection of an accepted socket: waits for the first byte without holding anything, then for a place
/// at the `gate`, then does TLS. `limit` is the time for the first byte, and again for the rest. `None`: the peer never
/// spoke, as a probe or a scan does.
///
/// # Errors
/// Why the peer is refused: no certificate of our own yet, no place, or what TLS said.
pub async fn accept(
    svid: &SvidHandle,
    gate: &Gate,
    limit: Duration,
    tcp: TcpStream,
    peer: IpAddr,
) -> Result<Option<(ServerStream<TcpStream>, Peer)>, Refusal> {
    match tokio::time::timeout(limit, tcp.peek(&mut [0])).await {
        Err(_) | Ok(Err(_) | Ok(0)) => return Ok(None),
        Ok(Ok(_)) => {}
    }
    let svid = svid.fetch().await.map_err(Refusal::from)?;
    let deadline = Instant::now() + limit;
    let place = tokio::time::timeout_at(deadline, gate.enter(peer))
        .await
        .ok()
        .flatten()
        .ok_or_else(|| Refusal::new(Reason::Overloaded, "too many handshakes in progress"))?;
    tokio::select! {
        done = tls::accept(&svid, tcp, deadline) => Ok(Some(done.map_err(Refusal::from)?)),
        () = place.lost() => Err(Refusal::new(Reason::Overloaded, "too many handshakes in progress, this one gave way")),
    }
}
