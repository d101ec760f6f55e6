//! One log line from one list of fields, plain or JSON.
//!
//! Plain: `time<TAB>level<TAB>scope<TAB>message<TAB>k=v k="text"`. Texts come from peers, so control characters are always
//! escaped: nobody but this process can begin a line.

use std::cell::{Cell, RefCell};
use std::fmt::{self, Display, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use tracing::Level;

/// Shape of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Tab-separated text.
    #[default]
    Plain,
    /// One JSON object per line.
    Json,
}

/// A line being built. Fields appear in the order they are added; a `None` field does not appear.
#[derive(Debug)]
pub struct Line {
    format: Format,
    text: String,
    fields: usize,
}

thread_local! {
    /// The buffer of the last finished line of this thread, so that a line costs no allocation.
    static SPARE: Cell<String> = const { Cell::new(String::new()) };
    /// The current second, formatted.
    static SECOND: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
}

/// A buffer that grew beyond this is not kept.
const SPARE_MOST: usize = 16 * 1024;

impl Line {
    /// A line of this moment.
    pub fn new(format: Format, level: Level, scope: &str, message: &str) -> Self {
        let mut line = Self::begin(format, level);
        line.scope(scope);
        line.message(message);
        line
    }

    pub(super) fn begin(format: Format, level: Level) -> Self {
        let mut text = SPARE.take();
        text.clear();
        let level = name(level);
        match format {
            Format::Plain => {
                push_time(&mut text);
                text.push('\t');
                text.push_str(level);
                text.push('\t');
            }
            Format::Json => {
                text.push_str("{\"level\":\"");
                text.push_str(level);
                text.push_str("\",\"time\":\"");
                push_time(&mut text);
                text.push_str("\",\"scope\":");
            }
        }
        Self { format, text, fields: 0 }
    }

    pub(super) fn scope(&mut self, scope: &str) {
        match self.format {
            Format::Plain => self.text.push_str(scope),
            Format::Json => push_json(&mut self.text, scope),
        }
    }

    /// Already escaped text of the spans, plain format only.
    pub(super) fn span(&mut self, name: &str, fields: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.text, ":{name}{{{fields}}}");
    }

    pub(super) fn message(&mut self, message: &str) {
        match self.format {
            Format::Plain => {
                self.text.push('\t');
                push_visible(&mut self.text, message);
            }
            Format::Json => {
                self.text.push_str(",\"message\":");
                push_json(&mut self.text, message);
            }
        }
    }

    /// A text; quoted in the plain format.
    pub fn str(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key);
        match self.format {
            Format::Plain => push_quoted(&mut self.text, value),
            Format::Json => push_json(&mut self.text, value),
        }
        self
    }

    /// A text, if there is one.
    pub fn opt_str(&mut self, key: &str, value: Option<&str>) -> &mut Self {
        if let Some(value) = value {
            self.str(key, value);
        }
        self
    }

    /// A value that shows itself, such as an address: not quoted in the plain format, a text in JSON.
    pub fn raw(&mut self, key: &str, value: impl Display) -> &mut Self {
        self.key(key);
        match self.format {
            Format::Plain => {
                let _ = write!(Visible(&mut self.text), "{value}");
            }
            Format::Json => {
                self.text.push('"');
                let _ = write!(JsonText(&mut self.text), "{value}");
                self.text.push('"');
            }
        }
        self
    }

    /// A value that shows itself, if there is one.
    pub fn opt_raw(&mut self, key: &str, value: Option<impl Display>) -> &mut Self {
        if let Some(value) = value {
            self.raw(key, value);
        }
        self
    }

    /// A value that shows itself as quoted text, such as an identity, without building the text first.
    pub fn quoted(&mut self, key: &str, value: impl Display) -> &mut Self {
        self.key(key);
        self.text.push('"');
        let _ = match self.format {
            Format::Plain => write!(Escaped(&mut self.text), "{value}"),
            Format::Json => write!(JsonText(&mut self.text), "{value}"),
        };
        self.text.push('"');
        self
    }

    /// A number or another value that JSON writes bare.
    pub fn num(&mut self, key: &str, value: u64) -> &mut Self {
        self.key(key);
        let _ = write!(self.text, "{value}");
        self
    }

    /// Text that is already in the shape of a value of this format.
    pub(super) fn verbatim(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.text, "{value}");
    }

    /// Fields that are already in the shape of this format: `k=v k=v`, or `"k":v,"k":v`.
    pub(super) fn fields(&mut self, fields: &str) {
        if fields.is_empty() {
            return;
        }
        match (self.format, self.fields) {
            (Format::Plain, 0) => self.text.push('\t'),
            (Format::Plain, _) => self.text.push(' '),
            (Format::Json, _) => self.text.push(','),
        }
        self.text.push_str(fields);
        self.fields += 1;
    }

    fn key(&mut self, key: &str) {
        push_key(self.format, &mut self.text, key, self.fields == 0);
        self.fields += 1;
    }

    /// The finished line with its newline.
    pub fn finish(mut self) -> String {
        self.end();
        std::mem::take(&mut self.text)
    }

    /// Shows the finished line, newline included, to `out` and keeps the buffer for this thread's next line.
    pub fn finish_to(mut self, out: impl FnOnce(&[u8])) {
        self.end();
        out(self.text.as_bytes());
        if self.text.capacity() <= SPARE_MOST {
            SPARE.set(self.text);
        }
    }

    fn end(&mut self) {
        if self.format == Format::Json {
            self.text.push('}');
        }
        self.text.push('\n');
    }
}

fn push_key(format: Format, text: &mut String, key: &str, first: bool) {
    match format {
        Format::Plain => {
            text.push(if first { '\t' } else { ' ' });
            text.push_str(key);
            text.push('=');
        }
        Format::Json => {
            text.push(',');
            push_json(text, key);
            text.push(':');
        }
    }
}

pub(super) fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// This moment, in UTC with microseconds.
fn push_time(out: &mut String) {
    // A clock before 1970 shows as 1970.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    push_second(out, now.as_secs());
    // Writing to a String cannot fail.
    let _ = write!(out, ".{:06}Z", now.subsec_micros());
}

/// A second since 1970 in UTC, as RFC 3339 without fraction and zone. The date is formatted once per second and thread.
pub fn push_second(out: &mut String, since_1970: u64) {
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != since_1970 {
            *second = since_1970;
            text.clear();
            let at = i64::try_from(*second)
                .ok()
                .and_then(|second| OffsetDateTime::from_unix_timestamp(second).ok())
                .unwrap_or(OffsetDateTime::UNIX_EPOCH);
            let _ = write!(
                text,
                "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
                at.year(),
                u8::from(at.month()),
                at.day(),
                at.hour(),
                at.minute(),
                at.second()
            );
        }
        out.push_str(text);
    });
}

/// Control characters escaped, the rest as it is.
fn push_visible(out: &mut String, text: &str) {
    let _ = Visible(out).write_str(text);
}

/// Writes text with control characters escaped: what a peer sends cannot begin a line of its own.
#[derive(Debug)]
pub struct Visible<'a>(pub &'a mut String);

impl fmt::Write for Visible<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if all_bytes(text, |byte| (b' '..0x7f).contains(&byte)) || !text.chars().any(char::is_control) {
            self.0.push_str(text);
            return Ok(());
        }
        for c in text.chars() {
            if c.is_control() { self.0.extend(c.escape_debug()) } else { self.0.push(c) }
        }
        Ok(())
    }
}

/// Whether all bytes are so. Without an early way out, so that many are looked at in one step.
fn all_bytes(text: &str, is: impl Fn(u8) -> bool) -> bool {
    text.bytes().fold(true, |all, byte| all & is(byte))
}

/// Text in quotes: quotes, backslashes and control characters escaped.
pub(super) fn push_quoted(out: &mut String, text: &str) {
    out.push('"');
    let _ = Escaped(out).write_str(text);
    out.push('"');
}

struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if all_bytes(text, |byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\') {
            self.0.push_str(text);
            return Ok(());
        }
        for c in text.chars() {
            // An apostrophe needs no escape between double quotes.
            if c == '\'' { self.0.push(c) } else { self.0.extend(c.escape_debug()) }
        }
        Ok(())
    }
}

/// A JSON string, with its quotes.
pub fn push_json(out: &mut String, text: &str) {
    out.push('"');
    let _ = JsonText(out).write_str(text);
    out.push('"');
}

/// Writes text as it stands between the quotes of a JSON string.
#[derive(Debug)]
pub struct JsonText<'a>(pub &'a mut String);

impl fmt::Write for JsonText<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if all_bytes(text, |byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
            self.0.push_str(text);
            return Ok(());
        }
        for c in text.chars() {
            match c {
                '"' => self.0.push_str("\\\""),
                '\\' => self.0.push_str("\\\\"),
                '\n' => self.0.push_str("\\n"),
                '\r' => self.0.push_str("\\r"),
                '\t' => self.0.push_str("\\t"),
                c if c < ' ' => write!(self.0, "\\u{:04x}", u32::from(c))?,
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}
