//! One finding, and the list of them.
use crate::objects::Raw;
use mesh_sources::yaml::Node;
use serde::Serialize;

/// How much a finding matters, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Refused, or certainly not what was meant.
    Error,
    /// Used, but not as its author may believe.
    Warning,
    /// Worth knowing.
    Note,
}
impl Level {
    /// Lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// File.
    pub file: String,
    /// Line, from 1; 0 for the whole file.
    pub line: u32,
    /// `Kind namespace/name`.
    pub object: String,
    /// Istio's code, or a word of ours.
    pub code: String,
    /// Path of the field; empty for the whole object.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do; may be empty.
    pub fix: String,
}

/// Findings as they are made.
#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);
impl Findings {
    /// Adds one.
    pub fn add(&mut self, finding: Finding) {
        self.0.push(finding);
    }
    /// Adds one about a field of an object: `at` is the field's node, `field` its path.
    pub fn on(
        &mut self,
        (level, code): (Level, &str),
        object: &Raw<'_>,
        (at, field): (&Node<'_>, &str),
        message: String,
        fix: &str,
    ) {
        self.0.push(Finding {
            level,
            file: object.file.to_owned(),
            line: at.line,
            object: object.name(),
            code: code.into(),
            field: field.into(),
            message,
            fix: fix.into(),
        });
    }
    /// In order, each once, without those of some codes.
    pub fn sorted(mut self, suppressed: &[String]) -> Vec<Finding> {
        self.0.retain(|f| !suppressed.iter().any(|code| code.eq_ignore_ascii_case(&f.code)));
        self.0.sort();
        self.0.dedup();
        self.0
    }
}
