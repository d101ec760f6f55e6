//! The Prometheus text format 0.0.4: names, escapes, numbers.

use std::fmt::Write;
use std::time::Duration;

/// Something that writes its own lines.
pub(super) trait Expose: Send + Sync {
    fn expose(&self, out: &mut String);
    fn sweep(&self, older_than: Duration) -> usize;
}

/// `# HELP` and `# TYPE`.
pub(super) fn head(out: &mut String, name: &str, help: &str, kind: &str) {
    out.push_str("# HELP ");
    out.push_str(name);
    out.push(' ');
    for c in help.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    // Writing to a String cannot fail.
    let _ = write!(out, "\n# TYPE {name} {kind}\n");
}

/// One `name="value"`. An empty value is the same as no label (Prometheus data model) and is left out by the caller.
pub(super) fn label(out: &mut String, name: &str, value: &str) {
    out.push_str(name);
    out.push_str("=\"");
    if value.bytes().any(|byte| matches!(byte, b'\\' | b'"' | b'\n')) {
        for c in value.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
    } else {
        out.push_str(value);
    }
    out.push('"');
}

/// A float as Prometheus reads it.
pub(super) fn float(out: &mut String, value: f64) {
    if value == f64::INFINITY {
        out.push_str("+Inf");
    } else {
        let _ = write!(out, "{value}");
    }
}

/// A complete metric without labels.
pub(super) fn single(out: &mut String, name: &str, help: &str, kind: &str, value: f64) {
    head(out, name, help, kind);
    out.push_str(name);
    out.push(' ');
    float(out, value);
    out.push('\n');
}

/// The first name that Prometheus would not take.
pub(super) fn bad_name<'n>(name: &'n str, labels: &[&'n str]) -> Option<&'n str> {
    let start = |c: char| c.is_ascii_alphabetic() || c == '_';
    let ok = |text: &str, colon: bool| {
        let also = |c: char| colon && c == ':';
        text.starts_with(|c| start(c) || also(c)) && text.chars().all(|c| start(c) || also(c) || c.is_ascii_digit())
    };
    if !ok(name, true) {
        return Some(name);
    }
    labels.iter().copied().find(|label| !ok(label, false) || label.starts_with("__"))
}
