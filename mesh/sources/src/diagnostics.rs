//! What is wrong with what we were told, object by object, for operators.
//!
//! Owns the list behind the admin page and `meshctl analyze`. A refused object is refused alone; the list says where
//! it is (file, line, field), what was expected and what to write instead. Upstream: every source. Downstream: admin,
//! logs, metrics (which only count).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_model::Origin;
use parking_lot::Mutex;

/// How much a problem matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The object, or a part of it, is refused.
    Error,
    /// It is used, but not as its author may believe.
    Warning,
    /// Worth knowing; nothing is wrong.
    Note,
}
impl Severity {
    /// Lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// One thing to tell an operator.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// How much it matters.
    pub severity: Severity,
    /// File (or source), line of the field, and `Kind namespace/name`.
    pub origin: Origin,
    /// Path of the field, such as `spec.rules[0].from[0].source.ipBlocks[1]`; empty for the whole object.
    pub field: Box<str>,
    /// What is wrong and what was expected.
    pub message: Box<str>,
    /// What to do; may be empty.
    pub fix: Box<str>,
    /// Stable word for filters and tests.
    pub code: Option<&'static str>,
}
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.origin)?;
        if !self.field.is_empty() {
            write!(f, " {}", self.field)?;
        }
        write!(f, ": {}", self.message)?;
        if !self.fix.is_empty() {
            write!(f, "; {}", self.fix)?;
        }
        Ok(())
    }
}

/// The current problems of all sources. Cheap to clone; readers never wait.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    current: Arc<ArcSwap<Vec<Problem>>>,
    /// What each source last said.
    said: Arc<Mutex<BTreeMap<&'static str, Vec<Problem>>>>,
    source: &'static str,
}
/// Most problems kept; a folder of a hundred thousand wrong pods must not fill the memory with complaints.
pub const MAX_PROBLEMS: usize = 1000;

impl Diagnostics {
    /// No problems.
    pub fn new() -> Self {
        Self::default()
    }
    /// The same list for one of several sources: what it says replaces only what it said before.
    #[must_use]
    pub fn of_source(&self, source: &'static str) -> Self {
        Self { source, ..self.clone() }
    }
    /// The problems of the last reading, worst first, at most [`MAX_PROBLEMS`].
    pub fn list(&self) -> Arc<Vec<Problem>> {
        self.current.load_full()
    }
    /// The same list as `/config_dump` shows it.
    pub fn to_json(&self) -> Vec<serde_json::Value> {
        let json = |p: &Problem| {
            serde_json::json!({
                "severity": p.severity.as_str(),
                "code": p.code,
                "file": p.origin.place,
                "line": p.origin.line,
                "object": p.origin.object,
                "field": p.field,
                "message": p.message,
                "fix": p.fix,
            })
        };
        self.list().iter().map(json).collect()
    }
    /// How many problems there are of each severity: errors, warnings, notes.
    pub fn counts(&self) -> [usize; 3] {
        let list = self.current.load();
        [Severity::Error, Severity::Warning, Severity::Note].map(|s| list.iter().filter(|p| p.severity == s).count())
    }
    /// Replaces the list. New errors and warnings are logged once, when they appear.
    pub fn replace(&self, mut problems: Vec<Problem>) {
        let mut said = self.said.lock();
        // Of the only source, as mostly, nothing is kept twice.
        if !self.source.is_empty() {
            said.insert(self.source, problems);
            problems = said.values().flatten().cloned().collect();
        }
        problems.sort();
        problems.dedup();
        let over = problems.len().saturating_sub(MAX_PROBLEMS);
        problems.truncate(MAX_PROBLEMS);
        let old = self.current.load_full();
        for p in problems.iter().filter(|p| old.binary_search(p).is_err()).take(100) {
            match p.severity {
                Severity::Error => tracing::error!(code = p.code, "{p}"),
                Severity::Warning => tracing::warn!(code = p.code, "{p}"),
                Severity::Note => tracing::debug!(code = p.code, "{p}"),
            }
        }
        if over > 0 {
            tracing::warn!(left_out = over, "more problems than are kept");
        }
        self.current.store(Arc::new(problems));
    }
}
