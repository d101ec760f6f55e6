//! How an attempt at an upstream fails, in the words retries, access logs and answers need.
pub use mesh_model::l7::failure::Failure;
use std::borrow::Cow;
use std::fmt;

/// A failed attempt: the kind and the particulars for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamError {
    /// Kind.
    pub failure: Failure,
    /// Envoy's "transport failure reason" or the like; may be empty.
    pub detail: Cow<'static, str>,
}
impl UpstreamError {
    /// A failure with particulars.
    pub fn new(failure: Failure, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { failure, detail: detail.into() }
    }
}
impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.failure)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}
impl std::error::Error for UpstreamError {}
