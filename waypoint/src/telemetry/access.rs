//! The access log: one line per request and per connection, in the words of Envoy's operators.
//!
//! A [`Format`] is compiled once: literal text and fields in turn. Writing a line walks the list and puts each field where it
//! belongs in one buffer that the thread keeps; nothing is allocated. The two formats here are Istio's defaults
//! (spec/waypoint §4.2); others are other lists. Upstream: `telemetry`. Downstream: the log's writer thread.

mod field;
mod write;

pub use field::{Field, Line, Told};

use mesh_runtime::logging::{self, AccessLog};
use std::cell::Cell;
use write::Shape;

/// A buffer that grew beyond this is not kept.
const SPARE_MOST: usize = 16 * 1024;

thread_local! {
    static SPARE: Cell<String> = const { Cell::new(String::new()) };
}

/// A compiled format.
#[derive(Debug)]
pub struct Format {
    shape: Shape,
    pieces: Box<[Piece]>,
    end: Box<str>,
}
/// Text and the field after it.
#[derive(Debug)]
struct Piece {
    before: Box<str>,
    field: Field,
    /// Left out, with the text before it, when the field has no value.
    optional: bool,
}

impl Format {
    /// Fields between literal texts: `before` each, and `end` after the last. A field without a value is `-`.
    pub fn text<'a>(pieces: impl IntoIterator<Item = (&'a str, Field)>, end: &str) -> Self {
        let piece = |(before, field): (&str, Field)| Piece { before: before.into(), field, optional: false };
        Self { shape: Shape::Text, pieces: pieces.into_iter().map(piece).collect(), end: format!("{end}\n").into() }
    }
    /// A JSON object with these keys, in this order. A field without a value is `null`; one of `optional` is left out.
    pub fn json<'a>(
        fields: impl IntoIterator<Item = (&'a str, Field)>,
        optional: impl IntoIterator<Item = (&'a str, Field)>,
    ) -> Self {
        let must = fields.into_iter().map(|(key, field)| (key, field, false));
        let may = optional.into_iter().map(|(key, field)| (key, field, true));
        let piece = |(at, (key, field, optional)): (usize, (&str, Field, bool))| {
            let mut before = String::from(if at == 0 { "{" } else { "," });
            logging::push_json(&mut before, key);
            before.push(':');
            Piece { before: before.into(), field, optional }
        };
        Self { shape: Shape::Json, pieces: must.chain(may).enumerate().map(piece).collect(), end: "}\n".into() }
    }
    /// Istio's default line.
    pub fn istio_text() -> Self {
        Self::text(
            [
                ("[", Field::StartTime),
                ("] \"", Field::Method),
                (" ", Field::Path),
                (" ", Field::Protocol),
                ("\" ", Field::ResponseCode),
                (" ", Field::ResponseFlags),
                (" ", Field::ResponseCodeDetails),
                (" ", Field::ConnectionTerminationDetails),
                (" \"", Field::UpstreamTransportFailureReason),
                ("\" ", Field::BytesReceived),
                (" ", Field::BytesSent),
                (" ", Field::Duration),
                (" ", Field::UpstreamServiceTime),
                (" \"", Field::ForwardedFor),
                ("\" \"", Field::UserAgent),
                ("\" \"", Field::RequestId),
                ("\" \"", Field::Authority),
                ("\" \"", Field::UpstreamHost),
                ("\" ", Field::UpstreamCluster),
                (" ", Field::UpstreamLocalAddress),
                (" ", Field::DownstreamLocalAddress),
                (" ", Field::DownstreamRemoteAddress),
                (" ", Field::RequestedServerName),
                (" ", Field::RouteName),
            ],
            "",
        )
    }
    /// Istio's default keys, and ours where there is something to tell.
    pub fn istio_json() -> Self {
        Self::json(
            [
                ("start_time", Field::StartTime),
                ("route_name", Field::RouteName),
                ("method", Field::Method),
                ("path", Field::Path),
                ("protocol", Field::Protocol),
                ("response_code", Field::ResponseCode),
                ("response_flags", Field::ResponseFlags),
                ("response_code_details", Field::ResponseCodeDetails),
                ("connection_termination_details", Field::ConnectionTerminationDetails),
                ("bytes_received", Field::BytesReceived),
                ("bytes_sent", Field::BytesSent),
                ("duration", Field::Duration),
                ("upstream_service_time", Field::UpstreamServiceTime),
                ("x_forwarded_for", Field::ForwardedFor),
                ("user_agent", Field::UserAgent),
                ("request_id", Field::RequestId),
                ("authority", Field::Authority),
                ("upstream_host", Field::UpstreamHost),
                ("upstream_cluster", Field::UpstreamCluster),
                ("upstream_local_address", Field::UpstreamLocalAddress),
                ("downstream_local_address", Field::DownstreamLocalAddress),
                ("downstream_remote_address", Field::DownstreamRemoteAddress),
                ("requested_server_name", Field::RequestedServerName),
                ("upstream_transport_failure_reason", Field::UpstreamTransportFailureReason),
            ],
            [("reason", Field::Reason), ("dry_run", Field::DryRun), ("audit", Field::Audit)],
        )
    }
    /// Istio's default for lines of the process's own shape.
    pub fn istio(shape: logging::Format) -> Self {
        match shape {
            logging::Format::Plain => Self::istio_text(),
            logging::Format::Json => Self::istio_json(),
        }
    }

    /// Appends the line, newline included.
    pub fn write(&self, line: &Line<'_>, out: &mut String) {
        for piece in &self.pieces {
            let value = piece.field.value(line);
            if piece.optional && matches!(value, write::Value::Absent) {
                continue;
            }
            out.push_str(&piece.before);
            value.write(self.shape, out);
        }
        out.push_str(&self.end);
    }
    /// Hands the line to the log. Never waits.
    pub fn send(&self, line: &Line<'_>, log: &AccessLog) {
        let mut out = SPARE.take();
        out.clear();
        self.write(line, &mut out);
        log.send_bytes(out.as_bytes());
        if out.capacity() <= SPARE_MOST {
            SPARE.set(out);
        }
    }
}

#[cfg(test)]
mod tests;
