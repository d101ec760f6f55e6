//! The relay of each kind of pair, with the connection's counters and its switch.
//!
//! The client's end always comes first, so that bytes and resets mean the same for every direction.
use crate::conns::Cut;
use crate::metrics::TcpHandles;
use mesh_hbone::HboneStream;
use mesh_hbone::relay::endpoint::Endpoint;
use mesh_hbone::relay::{Counters, End, How, RelayEnd, Timeouts, relay};
use mesh_model::{Reason, Refusal};
use tokio::net::TcpStream;

impl Counters for TcpHandles {
    fn sent(&self, bytes: u64) {
        self.to_server(bytes);
    }
    fn received(&self, bytes: u64) {
        self.to_client(bytes);
    }
}

/// Client and server both on plain TCP.
pub async fn tcp(client: TcpStream, server: TcpStream, handles: &TcpHandles, cut: &Cut) -> Option<Refusal> {
    both(client, server, handles, cut).await
}

/// The client on TCP, the server behind a tunnel.
pub async fn to_tunnel(client: TcpStream, server: HboneStream, handles: &TcpHandles, cut: &Cut) -> Option<Refusal> {
    both(client, server, handles, cut).await
}

/// The client behind a tunnel, the server on TCP.
pub async fn from_tunnel(client: HboneStream, server: TcpStream, handles: &TcpHandles, cut: &Cut) -> Option<Refusal> {
    both(client, server, handles, cut).await
}

/// `None` when both directions ended by themselves.
async fn both<A: Endpoint, B: Endpoint>(client: A, server: B, handles: &TcpHandles, cut: &Cut) -> Option<Refusal> {
    let end: RelayEnd = relay(client, server, handles, cut.wait(), Timeouts::default()).await;
    match end.how {
        How::Closed => None,
        How::Reset(End::First) => Some(Refusal::new(Reason::Reset, "by the client")),
        How::Reset(End::Second) => Some(Refusal::new(Reason::Reset, "by the server")),
        How::Cancelled => {
            Some(cut.why().cloned().unwrap_or_else(|| Refusal::new(Reason::Internal, "cancelled without a reason")))
        }
        How::Idle => Some(Refusal::new(Reason::Internal, "idle")),
    }
}
