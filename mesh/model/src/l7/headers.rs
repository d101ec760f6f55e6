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

#[cfg(test)]
mod tests {
    use super::*;

    /// `name: value` pairs, one a line.
    fn pairs(text: &str) -> Vec<(HeaderName, HeaderValue)> {
        let pair = |line: &str| {
            let (name, value) = line.split_once(": ").expect("name: value");
            (name.parse().expect("a name"), value.parse().expect("a value"))
        };
        text.split(", ").filter(|t| !t.is_empty()).map(pair).collect()
    }
    fn edits(remove: &[&'static str], set: &str, add: &str) -> HeaderEdits {
        let remove = remove.iter().map(|n| HeaderName::from_static(n)).collect();
        HeaderEdits { remove, set: pairs(set), add: pairs(add), authority: None }
    }

    #[test]
    fn remove_then_set_then_add() {
        for (before, edits, after) in [
            ("a: 1", edits(&[], "", ""), "a: 1"),
            // Every value of a name goes, whatever its case; what is not there is no matter.
            ("a: 1, a: 2, b: 3", edits(&["a", "x"], "", ""), "b: 3"),
            // Set replaces all values, and makes what was not there; the last of several counts.
            ("a: 1, a: 2", edits(&[], "a: 9, b: 8", ""), "a: 9, b: 8"),
            ("a: 1", edits(&[], "a: 8, a: 9", ""), "a: 9"),
            // Add keeps what is there, in order.
            ("a: 1", edits(&[], "", "a: 2, a: 3, b: 4"), "a: 1, a: 2, a: 3, b: 4"),
            // One name in all three: what was there is gone, set is first, add follows.
            ("a: 1, b: 2", edits(&["a"], "a: set", "a: add"), "b: 2, a: set, a: add"),
            ("a: 1", edits(&["a"], "", "a: add"), "a: add"),
            ("", edits(&["a"], "a: set", ""), "a: set"),
        ] {
            let mut headers: HeaderMap = pairs(before).into_iter().collect();
            edits.apply(&mut headers);
            let want: HeaderMap = pairs(after).into_iter().collect();
            assert_eq!(headers, want, "{before:?} {edits:?}");
        }
    }
    #[test]
    fn nothing_to_do() {
        assert!(BothEdits::default().is_empty());
        let authority = HeaderEdits { authority: Some("a.b".into()), ..HeaderEdits::default() };
        for some in [authority, edits(&["a"], "", ""), edits(&[], "a: 1", ""), edits(&[], "", "a: 1")] {
            assert!(!some.is_empty(), "{some:?}");
            assert!(!BothEdits { request: some.clone(), ..BothEdits::default() }.is_empty());
            assert!(!BothEdits { response: some, ..BothEdits::default() }.is_empty());
        }
        // The authority is no header.
        let mut headers = HeaderMap::new();
        HeaderEdits { authority: Some("a.b".into()), ..HeaderEdits::default() }.apply(&mut headers);
        assert!(headers.is_empty());
    }
}
