//! The Prometheus text format 0.0.4: names, escapes, numbers.

use std::fmt::{Display, Write};
use std::time::Duration;

/// Something that writes its own lines.
pub(super) trait Expose: Send + Sync {
    fn expose(&self, out: &mut String);
    fn sweep(&self, older_than: Duration) -> usize;
    /// Times a series was asked for and not made.
    fn lost(&self) -> u64 {
        0
    }
}

/// Metrics that are computed when somebody asks: gauges of tables that exist anyway. Given to the function behind
/// [`super::Registry::on_scrape`].
#[derive(Debug)]
pub struct Scrape<'o> {
    out: &'o mut String,
}
impl<'o> Scrape<'o> {
    pub(super) fn new(out: &'o mut String) -> Self {
        Self { out }
    }
    /// Begins a family: `name` as exposed, `kind` is `counter` or `gauge`. Its samples follow, before the next family.
    pub fn family<'s>(&'s mut self, name: &'s str, help: &str, kind: &str) -> Samples<'s> {
        head(self.out, name, help, kind);
        Samples { out: self.out, name }
    }
}
/// The samples of one family.
#[derive(Debug)]
pub struct Samples<'s> {
    out: &'s mut String,
    name: &'s str,
}
impl Samples<'_> {
    /// One sample. A label with an empty value is not exposed. No two samples of a family may have the same labels.
    pub fn put(&mut self, labels: &[(&str, &str)], value: u64) -> &mut Self {
        self.sample(labels, value)
    }
    /// As [`Self::put`], of a time, in seconds.
    pub fn put_seconds(&mut self, labels: &[(&str, &str)], time: Duration) -> &mut Self {
        self.sample(labels, time.as_secs_f64())
    }
    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) -> &mut Self {
        self.out.push_str(self.name);
        let mut open = false;
        for (name, value) in labels.iter().filter(|(_, value)| !value.is_empty()) {
            self.out.push(if open { ',' } else { '{' });
            open = true;
            label(self.out, name, value);
        }
        if open {
            self.out.push('}');
        }
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, " {value}");
        self
    }
}

/// What a function writes at each scrape.
pub(super) struct Computed<F>(pub(super) F);
impl<F: Fn(&mut Scrape<'_>) + Send + Sync> Expose for Computed<F> {
    fn expose(&self, out: &mut String) {
        (self.0)(&mut Scrape::new(out));
    }
    fn sweep(&self, _: Duration) -> usize {
        0
    }
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
