//! Streams of SPIRE's agent: opened, read, and opened again when they end, until nobody wants them. Owns the channel and the
//! rests between attempts; what is said is [`super`]'s.

use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use mesh_proto::Message;
use mesh_runtime::control_plane::{ControlError, ControlPlane, chain};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::sleep;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::error::IdentityError;

/// Rest after a stream ended: doubled up to the second, while nothing is heard.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(15));

/// The agent at the other end of a socket. All streams share one connection.
#[derive(Clone)]
pub(super) struct Agent {
    control_plane: ControlPlane,
    channel: Channel,
}

/// A stream that is kept open as long as this lives.
#[derive(Debug)]
pub(super) struct Listener(AbortHandle);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Agent {
    /// Nothing is connected yet.
    pub(super) fn new(control_plane: ControlPlane) -> Result<Self, ControlError> {
        Ok(Self { channel: control_plane.connect_lazily()?, control_plane })
    }

    /// Hands the messages of a stream to `take`, whose error means that a message was left out, and to `fail` why there is none.
    pub(super) fn listen<Q, M>(
        &self,
        control: &Handle,
        path: &'static str,
        request: Q,
        take: impl Fn(M) -> Result<(), String> + Send + Sync + 'static,
        fail: impl Fn(IdentityError) + Send + Sync + 'static,
    ) -> Listener
    where
        Q: Message + Clone + Send + Sync + 'static,
        M: Message + Default + Send + Sync + 'static,
    {
        let agent = self.clone();
        let following = async move {
            let mut rest = BACKOFF.0;
            loop {
                match agent.read(path, request.clone(), &take).await {
                    Ok(()) => rest = BACKOFF.0,
                    Err(why) => {
                        let address = agent.control_plane.address();
                        tracing::warn!(address, path, why, again_in = ?rest, "SPIRE is not heard");
                        fail(IdentityError::Unavailable(format!("SPIRE at {address}: {why}")));
                    }
                }
                sleep(rest.mul_f64(rand::random_range(0.8..=1.2))).await;
                rest = (rest * 2).min(BACKOFF.1);
            }
        };
        Listener(control.spawn(following).abort_handle())
    }

    /// One stream to its end. An error is one before its first message: afterwards it was a good one.
    async fn read<Q, M>(&self, path: &'static str, request: Q, take: &impl Fn(M) -> Result<(), String>) -> Result<(), String>
    where
        Q: Message + Send + Sync + 'static,
        M: Message + Default + Send + Sync + 'static,
    {
        let failed = |status: Status| match status.source() {
            Some(cause) => format!("{:?}: {}", status.code(), chain(cause)),
            None => format!("{:?}: {}", status.code(), status.message()),
        };
        let request = self.control_plane.request(request).map_err(|e| e.to_string())?;
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|e| chain(&e))?;
        let path = http::uri::PathAndQuery::from_static(path);
        let opened: Result<Response<Streaming<M>>, Status> = grpc.server_streaming(request, path, ProstCodec::default()).await;
        let (mut messages, mut heard) = (opened.map_err(failed)?.into_inner(), false);
        loop {
            let message = match messages.message().await {
                Ok(Some(message)) => message,
                Ok(None) | Err(_) if heard => return Ok(()),
                Ok(None) => return Err("it ended the stream".into()),
                Err(status) => return Err(failed(status)),
            };
            heard = true;
            if let Err(why) = take(message) {
                tracing::error!(why, "what SPIRE says cannot be used; what was good before stays");
            }
        }
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Agent").field(&self.control_plane.address()).finish()
    }
}
