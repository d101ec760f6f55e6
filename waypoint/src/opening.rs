//! The first bytes of a stream, looked at without being taken.
use crate::detect::{self, Detector, Spoken};
use bytes::{Bytes, BytesMut};
use mesh_hbone::HboneStream;
use std::future::poll_fn;
use tokio::time::{Instant, timeout_at};

/// Looks at the first bytes, which stay to be read again. `None`: waits as long as the connection lasts.
pub(crate) async fn first_bytes(stream: &mut HboneStream, deadline: Option<Instant>) -> Spoken {
    let (mut seen, mut detector) = (BytesMut::new(), Detector::default());
    let spoken = loop {
        let next = poll_fn(|cx| stream.poll_recv(cx));
        let next = match deadline {
            None => next.await,
            Some(deadline) => match timeout_at(deadline, next).await {
                Ok(next) => next,
                Err(_) => break Spoken::Unclear,
            },
        };
        match next {
            Some(Ok(data)) => {
                seen.extend_from_slice(&data);
                match detector.judge(&seen) {
                    Spoken::Unclear if seen.len() < detect::LIMIT => {}
                    Spoken::Unclear => break Spoken::Other,
                    spoken => break spoken,
                }
            }
            // The end or the error is met again by whoever reads next.
            Some(Err(_)) | None => break if seen.is_empty() { Spoken::Unclear } else { Spoken::Other },
        }
    };
    if !seen.is_empty() {
        stream.unread(Bytes::from(seen));
    }
    spoken
}
