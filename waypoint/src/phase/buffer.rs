//! Request bodies of bounded size: taken in whole before anything goes upstream, or answered 413 (Envoy's buffer filter).
//!
//! A call that answers while it is still being asked (gRPC streaming) waits for ever behind a buffer, here as in Envoy.
use crate::body::{Body, BodyError};
use crate::phase::{Exchange, Flow, attempt, respond};
use crate::upstream::{Failure, UpstreamError};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use mesh_model::Reason;
use mesh_model::l7::route::Dialect;

/// What is set aside for a body before it comes; it may be announced and never sent.
const AHEAD: u64 = 64 << 10;

/// Takes the body in, if a policy says how large it may be.
pub(crate) async fn fill(ex: &mut Exchange<'_>) -> Flow {
    let Some(most) = ex.treatments.max_request_bytes() else { return Flow::Continue };
    let announced = ex.parts.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > most) {
        return too_large(ex, &[]);
    }
    let body = match std::mem::take(&mut ex.body) {
        Body::Empty => return Flow::Continue,
        body => body,
    };
    match read(body, most, announced.unwrap_or(0).min(AHEAD)).await {
        Ok((data, None)) => ex.body = Body::full(data),
        Ok((data, Some(trailers))) => {
            let whole = Full::new(data).with_trailers(std::future::ready(Some(Ok(trailers))));
            ex.body = Body::Boxed(whole.map_err(|never| match never {}).boxed_unsync());
        }
        Err(Unread::TooLarge(received)) => return too_large(ex, &received),
        Err(Unread::Broken(error)) => {
            return broken(ex, &error);
        }
    }
    Flow::Continue
}

enum Unread {
    /// What came until then.
    TooLarge(BytesMut),
    Broken(BodyError),
}
impl From<BodyError> for Unread {
    fn from(error: BodyError) -> Self {
        Self::Broken(error)
    }
}
/// Copied together: a body that comes in tiny pieces costs what its bytes cost.
async fn read(mut body: Body, most: u64, ahead: u64) -> Result<(Bytes, Option<HeaderMap>), Unread> {
    let mut whole = BytesMut::with_capacity(ahead as usize);
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => {
                whole.extend_from_slice(&data);
                if whole.len() as u64 > most {
                    return Err(Unread::TooLarge(whole));
                }
            }
            Err(frame) => return Ok((whole.freeze(), frame.into_trailers().ok())),
        }
    }
    Ok((whole.freeze(), None))
}
/// The client broke off in the middle of its body.
pub(crate) fn broken(ex: &mut Exchange<'_>, error: &BodyError) -> Flow {
    let failure = if error.is_malformed() { Failure::ClientProtocol } else { Failure::ClientGone };
    Flow::Answer(attempt::failed(ex, &UpstreamError::new(failure, ""), false, Dialect::Istio))
}
/// The body is larger than it may be.
pub(crate) fn too_large(ex: &mut Exchange<'_>, received: &[u8]) -> Flow {
    ex.record.received.add(received);
    ex.record.reason = Some(Reason::BodyTooLarge);
    Flow::Answer(respond::closing(ex, StatusCode::PAYLOAD_TOO_LARGE, "Payload Too Large", "request_payload_too_large"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream::iter;
    use http::HeaderValue;
    use http_body::Frame;
    use http_body_util::StreamBody;

    fn body(parts: &'static [&'static str], end: Option<Result<Frame<Bytes>, BodyError>>) -> Body {
        let frames = parts.iter().map(|part| Ok(Frame::data(Bytes::from_static(part.as_bytes()))));
        Body::Boxed(StreamBody::new(iter(frames.chain(end))).boxed_unsync())
    }

    #[tokio::test]
    async fn a_body_is_taken_in_up_to_its_largest_size() {
        for (parts, most, ahead, want) in [
            (&[][..], 0, 0, Ok("")),
            (&["a"], 0, 0, Err("a")),
            (&["ab", "cd"], 4, 0, Ok("abcd")),
            (&["ab", "cd"], 4, 64, Ok("abcd")),
            (&["ab", "cde"], 4, 4, Err("abcde")),
            // What comes after it is too large is not read.
            (&["abcde", "f"], 4, 0, Err("abcde")),
            (&["", "a", ""], 1, 0, Ok("a")),
        ] {
            match (read(body(parts, None), most, ahead).await, want) {
                (Ok((got, None)), Ok(want)) => assert_eq!(got, want, "{parts:?} {most}"),
                (Err(Unread::TooLarge(got)), Err(want)) => assert_eq!(got, want, "{parts:?} {most}"),
                _ => panic!("{parts:?} of at most {most}: not {want:?}"),
            }
        }
    }
    #[tokio::test]
    async fn trailers_are_kept_and_a_broken_body_is_no_large_one() {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", HeaderValue::from_static("1"));
        let Ok((got, Some(kept))) = read(body(&["ab"], Some(Ok(Frame::trailers(trailers.clone())))), 2, 0).await else {
            panic!("whole, with its trailers");
        };
        assert_eq!((&*got, kept), (&b"ab"[..], trailers));
        let broken = read(body(&["ab"], Some(Err(BodyError::Gone("gone")))), 2, 0).await;
        assert!(matches!(broken, Err(Unread::Broken(BodyError::Gone("gone")))));
    }
}
