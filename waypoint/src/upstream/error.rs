//! How an attempt at an upstream fails, in the words retries, access logs and answers need.
pub use mesh_model::l7::failure::Failure;
use mesh_model::{Reason, Refusal};
use std::borrow::Cow;
use std::fmt;

/// A failed attempt: the kind and the particulars for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamError {
    /// Kind.
    pub failure: Failure,
    /// Envoy's "transport failure reason" or the like; may be empty.
    pub detail: Cow<'static, str>,
    /// Set where the mesh says why: another word than the failure's own.
    pub reason: Option<Reason>,
}
impl UpstreamError {
    /// A failure with particulars.
    pub fn new(failure: Failure, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { failure, detail: detail.into(), reason: None }
    }
    /// There is a destination, and no way to it.
    pub fn refused(why: &Refusal) -> Self {
        Self { failure: Failure::NoHealthy, detail: why.brief().into(), reason: Some(why.reason) }
    }
}
impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.failure)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}
impl std::error::Error for UpstreamError {}
