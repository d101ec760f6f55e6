//! Text matches of layer 7, compiled once.
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// A regular expression in RE2's dialect, matched against the *whole* text (as Istio and the Gateway API have it). Two are
/// equal when they were written alike.
#[derive(Clone)]
pub struct Pattern {
    source: Arc<str>,
    compiled: Arc<regex::Regex>,
}
impl Pattern {
    /// Largest compiled program, in bytes: a pattern that needs more is refused when it is read, not when it is used.
    pub const SIZE_LIMIT: usize = 256 << 10;

    /// Compiles `source`, anchored at both ends. Linear in the text whatever the pattern (no backtracking).
    pub fn parse(source: &str) -> Result<Self, PatternError> {
        let compiled = regex::RegexBuilder::new(&format!("^(?:{source})$"))
            .size_limit(Self::SIZE_LIMIT)
            .dfa_size_limit(Self::SIZE_LIMIT)
            .build()
            .map_err(|e| PatternError(e.to_string()))?;
        Ok(Self { source: source.into(), compiled: Arc::new(compiled) })
    }
    /// Compiles `source` to be searched anywhere in the text and replaced (`uriRegexRewrite`).
    pub fn parse_search(source: &str) -> Result<Self, PatternError> {
        let compiled = regex::RegexBuilder::new(source)
            .size_limit(Self::SIZE_LIMIT)
            .dfa_size_limit(Self::SIZE_LIMIT)
            .build()
            .map_err(|e| PatternError(e.to_string()))?;
        Ok(Self { source: source.into(), compiled: Arc::new(compiled) })
    }
    /// As written.
    pub fn source(&self) -> &str {
        &self.source
    }
    /// Whether it matches.
    pub fn is_match(&self, text: &str) -> bool {
        self.compiled.is_match(text)
    }
    /// The compiled form.
    pub fn regex(&self) -> &regex::Regex {
        &self.compiled
    }
}
impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.source)
    }
}
impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        // The anchoring is part of the compiled text.
        self.compiled.as_str() == other.compiled.as_str()
    }
}
impl Eq for Pattern {}
impl Hash for Pattern {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
    }
}

/// A pattern that does not compile, or would be too large.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a regular expression (RE2): {0}")]
pub struct PatternError(pub String);

/// Istio's StringMatch, and what the Gateway API needs of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// This very text.
    Exact(Arc<str>),
    /// Starts with it.
    Prefix(Arc<str>),
    /// Ends with it.
    Suffix(Arc<str>),
    /// Matches as a whole.
    Regex(Pattern),
    /// Is there at all, whatever it says (empty StringMatch, or the pattern `*`).
    Present,
}
impl StringMatch {
    /// Whether a value that is there matches.
    pub fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(x) => **x == *value,
            Self::Prefix(x) => value.starts_with(&**x),
            Self::Suffix(x) => value.ends_with(&**x),
            Self::Regex(p) => p.is_match(value),
            Self::Present => true,
        }
    }
}
