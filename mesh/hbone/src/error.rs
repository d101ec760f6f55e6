//! What can go wrong between a dial and an open stream, in the house's vocabulary.
//!
//! Owns the mapping from h2 errors, timeouts and CONNECT answers to a [`Reason`]. It refuses to carry peer text that was
//! not cleaned: whatever a peer wrote is reduced to visible ASCII of bounded length first.

use std::sync::Arc;

use mesh_model::{Reason, Refusal};

/// Why a tunnel or a stream could not be opened. Cheap to clone: all waiters of one failed dial get the same value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct HboneError {
    /// The word for logs and metrics.
    pub reason: Reason,
    /// Whether another attempt (fresh tunnel, other endpoint) may help. Narrower than [`Reason::may_retry`] for refusals:
    /// a peer that answered 401 or 400 will do so again.
    pub retry: bool,
    /// Status of the CONNECT answer, when the peer gave one.
    pub status: Option<u16>,
    /// The particulars; for refusals the peer's `x-culvert-reason` when it sent one.
    pub detail: Arc<str>,
    /// Set when the stream certainly was not processed by the peer (refused stream, GOAWAY below its id, connection already
    /// dead), so that opening it again elsewhere cannot make anything happen twice.
    pub unprocessed: bool,
    /// Set when it happened behind a gateway, in the tunnel within the one to it (double HBONE), while that one held: the gateway
    /// did its part.
    pub behind: bool,
}

impl HboneError {
    /// An error of `reason`, retryable as the reason says.
    pub fn new(reason: Reason, detail: impl Into<Arc<str>>) -> Self {
        Self { reason, retry: reason.may_retry(), status: None, detail: detail.into(), unprocessed: false, behind: false }
    }

    /// The peer answered CONNECT with `status`.
    pub fn refused(status: u16, detail: Option<&str>) -> Self {
        let detail = match detail {
            Some(text) => format!("status {status}, {text}"),
            None => format!("status {status}"),
        };
        Self {
            reason: Reason::PeerRefused,
            // 503: another endpoint may do. Everything else is an answer, not an accident.
            retry: status == 503,
            status: Some(status),
            detail: detail.into(),
            unprocessed: false,
            behind: false,
        }
    }

    /// From an h2 error while a stream was being opened.
    pub(crate) fn from_open(error: &h2::Error) -> Self {
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        // A GOAWAY reaches a stream only when its id is above the last one the peer promises to process.
        let unprocessed = refused || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR));
        let reason = if refused { Reason::Overloaded } else { Reason::H2Failure };
        Self { unprocessed, retry: true, ..Self::new(reason, clean(&error.to_string())) }
    }

    /// From an h2 error of a whole connection.
    pub(crate) fn from_connection(error: &h2::Error) -> Self {
        Self::new(Reason::H2Failure, clean(&error.to_string()))
    }
}

impl From<Refusal> for HboneError {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.reason, refusal.detail.as_ref())
    }
}

impl From<&HboneError> for Refusal {
    fn from(error: &HboneError) -> Self {
        Self::new(error.reason, error.detail.to_string())
    }
}

/// Longest text taken over from a peer, in bytes.
pub(crate) const MAX_PEER_TEXT: usize = 256;

/// Visible ASCII and spaces only, at most [`MAX_PEER_TEXT`] bytes: safe in a header and in a log line.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).take(MAX_PEER_TEXT).collect()
}
