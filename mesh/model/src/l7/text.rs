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

#[cfg(test)]
mod tests {
    use super::*;

    fn regex(source: &str) -> StringMatch {
        StringMatch::Regex(Pattern::parse(source).expect("a pattern"))
    }

    #[test]
    fn matches() {
        let (exact, prefix, suffix) =
            (StringMatch::Exact("a.b".into()), StringMatch::Prefix("a.b".into()), StringMatch::Suffix("a.b".into()));
        for (rule, text, want) in [
            (&exact, "a.b", true),
            (&exact, "A.b", false),
            (&exact, "a.bc", false),
            (&exact, "", false),
            (&prefix, "a.b", true),
            (&prefix, "a.bc", true),
            (&prefix, "xa.b", false),
            (&prefix, "a.", false),
            (&suffix, "a.b", true),
            (&suffix, "xa.b", true),
            (&suffix, "a.bc", false),
            (&StringMatch::Prefix("".into()), "", true),
            (&StringMatch::Present, "", true),
            (&StringMatch::Present, "anything", true),
            // The whole text, also where an alternative would match a part of it.
            (&regex("a.b"), "axb", true),
            (&regex("a.b"), "axbc", false),
            (&regex("a|b"), "ab", false),
            (&regex("a|b"), "b", true),
            (&regex("a"), "a\n", false),
            (&regex("(?i)get"), "GET", true),
            (&regex(""), "", true),
            (&regex(""), "a", false),
            (&regex("[0-9]+"), "٣", false),
            (&regex("\\d+"), "42", true),
        ] {
            assert_eq!(rule.matches(text), want, "{rule:?} {text:?}");
        }
    }
    #[test]
    fn patterns_that_are_refused() {
        for source in ["(", "a{2,1}", "\\1", "(?=a)", "(?<!a)b", "*"] {
            assert!(Pattern::parse(source).is_err() && Pattern::parse_search(source).is_err(), "{source}");
        }
        // Not what compiles to more than a small program.
        assert!(Pattern::parse("(a{500}){500}").is_err());
    }
    #[test]
    fn patterns_are_equal_as_written() {
        let (whole, search) = (Pattern::parse("a+").expect("a pattern"), Pattern::parse_search("a+").expect("a pattern"));
        assert_eq!(whole, Pattern::parse("a+").expect("a pattern"));
        assert_ne!(whole, Pattern::parse("aa*").expect("a pattern"));
        assert_ne!(whole, search, "one is anchored, the other is not");
        assert!(search.is_match("xax") && !whole.is_match("xax"));
        assert_eq!((whole.source(), format!("{whole:?}")), ("a+", "/a+/".to_owned()));
    }
}
