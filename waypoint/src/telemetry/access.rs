//! The access log: lines about requests and connections, in the formats and for what the mesh says.
//!
//! Formats and filters are compiled at publish (`mesh_model::telemetry`). Writing a line walks the format and puts each field
//! where it belongs in one buffer that the thread keeps. Upstream: `telemetry`. Downstream: the log's writer thread.

mod attributes;
mod field;
mod line;
mod write;

pub use line::{Line, Told};

use mesh_model::telemetry::AccessLog as Wanted;
use mesh_model::telemetry::format::{Format, Json, Object, Of, Part, Template};
use mesh_runtime::logging::{self, AccessLog};
use std::cell::Cell;
use write::Shape;

/// A buffer that grew beyond this is not kept.
const SPARE_MOST: usize = 16 * 1024;

thread_local! {
    static SPARE: Cell<String> = const { Cell::new(String::new()) };
}

/// Where lines go, and how they look where nobody says.
#[derive(Debug)]
pub(super) struct Access {
    log: AccessLog,
    default: Format,
}
impl Access {
    pub fn new(log: AccessLog) -> Self {
        let default = match log.format() {
            logging::Format::Plain => Format::istio_text(),
            logging::Format::Json => Format::istio_json(),
        };
        Self { log, default }
    }
    /// Tells what is wanted of a request or connection. Never waits.
    pub fn tell(&self, line: &Line<'_>) {
        if !self.log.enabled(tracing::Level::INFO) {
            return;
        }
        match line.wanted() {
            None => self.send(&self.default, line),
            Some(logs) => {
                for Wanted { format, filter } in logs {
                    if filter.as_ref().is_none_or(|f| f.holds(line)) {
                        self.send(format.as_ref().unwrap_or(&self.default), line);
                    }
                }
            }
        }
    }
    fn send(&self, format: &Format, line: &Line<'_>) {
        let mut out = SPARE.take();
        out.clear();
        write(format, line, &mut out);
        self.log.send_bytes(out.as_bytes());
        if out.capacity() <= SPARE_MOST {
            SPARE.set(out);
        }
    }
}

/// What a template says of a line, as bare text: what is not there is empty.
pub(super) fn text(parts: &Template, line: &Line<'_>) -> String {
    let mut out = String::new();
    template(parts, line, Shape::Raw, &mut out);
    out
}
/// What an operator stands for in a line, as bare text: what is not there is empty.
pub(super) fn operator(of: &Of, line: &Line<'_>) -> String {
    let mut out = String::new();
    field::value(of, line).write_bare(Shape::Raw, None, &mut out);
    out
}

/// Appends a line, newline included.
pub fn write(format: &Format, line: &Line<'_>, out: &mut String) {
    match format {
        Format::Text(parts) => template(parts, line, Shape::Text, out),
        Format::Json(entries) => object(entries, line, out),
    }
    out.push('\n');
}

/// Appends the value of a template as text.
fn template(Template(parts): &Template, line: &Line<'_>, shape: Shape, out: &mut String) {
    for part in parts {
        match part {
            Part::Text(text) => write::escape(shape, out, text),
            Part::Field(field) => field::value(&field.of, line).write_bare(shape, field.most, out),
        }
    }
}

fn object(Object { entries }: &Object, line: &Line<'_>, out: &mut String) {
    out.push('{');
    let mut first = true;
    for (key, value) in entries {
        let start = |out: &mut String, first: &mut bool| {
            if !std::mem::take(first) {
                out.push(',');
            }
            logging::push_json(out, key);
            out.push(':');
        };
        match value {
            Json::Field { field, optional } => {
                let value = field::value(&field.of, line);
                if *optional && value.is_absent() {
                    continue;
                }
                start(out, &mut first);
                value.write_json(field.most, out);
            }
            Json::Text(parts) => {
                start(out, &mut first);
                out.push('"');
                template(parts, line, Shape::Json, out);
                out.push('"');
            }
            Json::Verbatim(text) => {
                start(out, &mut first);
                out.push_str(text);
            }
            Json::Object(inner) => {
                start(out, &mut first);
                object(inner, line, out);
            }
        }
    }
    out.push('}');
}

#[cfg(test)]
mod tests;
