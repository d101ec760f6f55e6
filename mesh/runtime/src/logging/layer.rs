//! `tracing` events and spans as lines.

use std::fmt::{Debug, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::directives::HOUSE;
use super::line::{Format, JsonText, Line, Visible, push_json, push_quoted};
use super::writer::LogWriter;

pub(super) struct LineLayer {
    writer: LogWriter,
    format: Format,
    own_crate: &'static str,
}

/// The fields of a span, formatted when they were recorded.
struct SpanFields(String);

impl LineLayer {
    pub(super) fn new(writer: LogWriter, format: Format, own_crate: &'static str) -> Self {
        Self { writer, format, own_crate }
    }

    /// The target as shown: without the binary's own name and without the prefix of the house's crates.
    fn scope<'t>(&self, target: &'t str) -> &'t str {
        if let Some(rest) = target.strip_prefix(self.own_crate) {
            if let Some(module) = rest.strip_prefix("::") {
                return module;
            }
            return target;
        }
        target.strip_prefix(HOUSE).unwrap_or(target)
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LineLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::new(self.format);
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(SpanFields(fields.text));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        let Some(SpanFields(text)) = extensions.get_mut::<SpanFields>() else { return };
        let mut fields = Fields::new(self.format);
        fields.text = std::mem::take(text);
        values.record(&mut fields);
        *text = fields.text;
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let metadata = event.metadata();
        let mut fields = Fields::new(self.format);
        event.record(&mut fields);
        let mut line = Line::begin(self.format, *metadata.level());
        line.scope(self.scope(metadata.target()));
        let spans = || context.event_scope(event).into_iter().flat_map(tracing_subscriber::registry::Scope::from_root);
        match self.format {
            Format::Plain => {
                for span in spans() {
                    if let Some(SpanFields(fields)) = span.extensions().get::<SpanFields>() {
                        line.span(span.name(), fields);
                    }
                }
                line.message(&fields.message);
                line.fields(&fields.text);
            }
            Format::Json => {
                line.message(&fields.message);
                line.fields(&fields.text);
                for span in spans() {
                    if let Some(SpanFields(fields)) = span.extensions().get::<SpanFields>() {
                        line.verbatim(span.name(), format_args!("{{{fields}}}"));
                    }
                }
            }
        }
        self.writer.send(line);
    }
}

/// Collects fields in the shape of a format; the message apart and unescaped.
struct Fields {
    format: Format,
    text: String,
    message: String,
}

impl Fields {
    fn new(format: Format) -> Self {
        Self { format, text: String::new(), message: String::new() }
    }

    fn key(&mut self, field: &Field) {
        // `r#type` is `type` to everybody else.
        let key = field.name().trim_start_matches("r#");
        match self.format {
            Format::Plain => {
                if !self.text.is_empty() {
                    self.text.push(' ');
                }
                self.text.push_str(key);
                self.text.push('=');
            }
            Format::Json => {
                if !self.text.is_empty() {
                    self.text.push(',');
                }
                push_json(&mut self.text, key);
                self.text.push(':');
            }
        }
    }

    fn bare(&mut self, field: &Field, value: impl std::fmt::Display) {
        self.key(field);
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{value}");
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
            return;
        }
        self.key(field);
        match self.format {
            Format::Plain => push_quoted(&mut self.text, value),
            Format::Json => push_json(&mut self.text, value),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.bare(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, value);
    }

    fn record_u128(&mut self, field: &Field, value: u128) {
        self.record_debug(field, &value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.record_debug(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no infinities.
        if self.format == Format::Json && !value.is_finite() {
            self.record_debug(field, &value);
        } else {
            self.bare(field, value);
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_debug(field, &tracing::field::display(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
            return;
        }
        self.key(field);
        match self.format {
            Format::Plain => {
                let _ = write!(Visible(&mut self.text), "{value:?}");
            }
            Format::Json => {
                self.text.push('"');
                let _ = write!(JsonText(&mut self.text), "{value:?}");
                self.text.push('"');
            }
        }
    }
}
