//! Connections that stopped being HTTP.
use crate::upstream::RequestGuard;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use mesh_hbone::relay::endpoint::Bytewise;
use mesh_hbone::relay::{End, How, RelayEnd, Timeouts, relay};
use std::time::Duration;

/// A connection that becomes something else (WebSocket) on both sides, once the answer that says so has been sent.
pub(crate) struct Switched {
    /// The client's side.
    pub(crate) client: OnUpgrade,
    /// The endpoint's.
    pub(crate) endpoint: OnUpgrade,
    /// Its place among the destination's requests.
    pub(crate) guard: Option<RequestGuard>,
}

/// Carries it until both sides ended, one broke, or `cut` says so. Sent is what the client sent.
pub(crate) async fn carry(switched: Switched, half_closed: Option<Duration>, cut: impl Future<Output = ()>) -> RelayEnd {
    let Switched { client, endpoint, guard: _held } = switched;
    let (client, endpoint) = match tokio::join!(client, endpoint) {
        (Ok(client), Ok(endpoint)) => (TokioIo::new(client), TokioIo::new(endpoint)),
        (Err(_), _) => return RelayEnd { sent: 0, received: 0, how: How::Reset(End::First) },
        (_, Err(_)) => return RelayEnd { sent: 0, received: 0, how: How::Reset(End::Second) },
    };
    relay(Bytewise::new(client), Bytewise::new(endpoint), (), cut, Timeouts { idle: None, half_closed }).await
}
