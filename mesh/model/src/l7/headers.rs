//! Header edits of routes and destinations, with names and values parsed when they are read.
use http::header::{HeaderMap, HeaderName, HeaderValue};
use std::sync::Arc;

/// What to do to one direction's headers: first remove, then set, then add (Envoy's order within one level).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// Names to remove.
    pub remove: Vec<HeaderName>,
    /// Replace whatever was there.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Append to what is there.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// `Host` or `:authority` in `set`: rewrites the authority (requests only).
    pub authority: Option<Arc<str>>,
}
impl HeaderEdits {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty() && self.authority.is_none()
    }
    /// Applies the edits. The authority is the caller's business: it is not a header here.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
    }
}

/// Edits of both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BothEdits {
    /// Of the request towards the upstream.
    pub request: HeaderEdits,
    /// Of the response towards the client.
    pub response: HeaderEdits,
}
impl BothEdits {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.request.is_empty() && self.response.is_empty()
    }
}
