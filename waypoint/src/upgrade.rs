//! Connections that stopped being HTTP.
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

/// Carries an upgraded connection (WebSocket and the like) until one side ends it.
pub(crate) async fn carry(client: OnUpgrade, upstream: OnUpgrade) {
    let (Ok(client), Ok(upstream)) = tokio::join!(client, upstream) else { return };
    let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut upstream).await {
        tracing::debug!(%error, "upgraded connection broke");
    }
}
