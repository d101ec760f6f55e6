//! Connections that stopped being HTTP.
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

/// Carries an upgraded connection (WebSocket and the like) until one side ends it, or until `cut` says so.
pub(crate) async fn carry(client: OnUpgrade, upstream: OnUpgrade, cut: impl Future<Output = ()>) {
    let (Ok(client), Ok(upstream)) = tokio::join!(client, upstream) else { return };
    let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
    tokio::select! {
        done = tokio::io::copy_bidirectional(&mut client, &mut upstream) => {
            if let Err(error) = done {
                tracing::debug!(%error, "upgraded connection broke");
            }
        }
        () = cut => {}
    }
}
