//! The relay of each kind of pair, with the connection's counters and its switch.
//!
//! The client's end always comes first, so that bytes and resets mean the same for every direction.
use crate::conns::Cut;
use crate::metrics::TcpHandles;
use futures_util::FutureExt as _;
use mesh_hbone::relay::endpoint::Endpoint;
use mesh_hbone::relay::{Counters, End, How, RelayEnd, Timeouts, relay};
use mesh_model::{Reason, Refusal};
use std::time::Duration;

impl Counters for TcpHandles {
    fn sent(&self, bytes: u64) {
        self.to_server(bytes);
    }
    fn received(&self, bytes: u64) {
        self.to_client(bytes);
    }
}

/// Relays between the client's end and the server's end; either may be TCP or a stream of a tunnel. `None` when both
/// directions ended by themselves.
///
/// Not an `async fn`, which would hold both ends twice for as long as the relay runs.
pub fn both<'a, A: Endpoint + 'a, B: Endpoint + 'a>(
    client: A,
    server: B,
    half_closed: Duration,
    handles: &'a TcpHandles,
    cut: &'a Cut,
) -> impl Future<Output = Option<Refusal>> + 'a {
    let timeouts = Timeouts { idle: None, half_closed: (!half_closed.is_zero()).then_some(half_closed) };
    relay(client, server, handles, cut.wait(), timeouts).map(|end| why(&end, cut))
}

fn why(end: &RelayEnd, cut: &Cut) -> Option<Refusal> {
    match end.how {
        How::Closed => None,
        How::Reset(End::First) => Some(Refusal::new(Reason::Reset, "by the client")),
        How::Reset(End::Second) => Some(Refusal::new(Reason::Reset, "by the server")),
        How::Cancelled => {
            Some(cut.why().cloned().unwrap_or_else(|| Refusal::new(Reason::Internal, "cancelled without a reason")))
        }
        How::Idle => Some(Refusal::new(Reason::Reset, "half-closed and silent for too long")),
    }
}
