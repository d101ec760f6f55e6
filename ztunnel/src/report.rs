//! Telling about connections: one access log line, a span, and the counters, called explicitly at the end of a connection.
//!
//! Downstream: the access log writer, `spans` and `metrics`. Never called from a destructor.
use crate::metrics::TcpHandles;
use crate::pod::Shared;
use crate::record::{Ending, Record, Value, fields};
use mesh_model::{Reason, Refusal};
use tracing::Level;

/// A connection was refused before it was established: counted by reason and flag, logged as an error.
pub fn refused(shared: &Shared, record: &Record, why: &Refusal) {
    shared.metrics.failed(record, why.reason);
    tell(shared, record, 0, 0, &Ending::Failed(why));
}

/// A connection was turned away before anything was known of it: counted, and logged at debug level only.
pub fn counted(shared: &Shared, record: &Record, why: &Refusal) {
    shared.metrics.failed(record, why.reason);
    tracing::debug!(src = %record.src, error = %why, "turned away");
}

/// An established connection ended: `why` when it was cut or broke.
pub fn ended(shared: &Shared, record: &Record, handles: &TcpHandles, why: Option<&Refusal>) {
    let (to_server, to_client) = handles.bytes();
    let (sent, received) = match record.direction {
        crate::conns::Direction::Outbound => (to_server, to_client),
        crate::conns::Direction::Inbound => (to_client, to_server),
    };
    if let Some(why) = why {
        shared.metrics.refused(record.direction, why.reason);
    }
    tell(shared, record, sent, received, &why.map_or(Ending::Complete, Ending::Failed));
}

fn tell(shared: &Shared, record: &Record, sent: u64, received: u64, end: &Ending<'_>) {
    if let (Some(tracing), Some(trace)) = (&shared.tracing, &record.trace) {
        tracing.tell(record, trace, (sent, received), end);
    }
    line(shared, record, sent, received, end);
}

fn line(shared: &Shared, record: &Record, sent: u64, received: u64, end: &Ending<'_>) {
    let level = match end {
        // A reset is one end's own way to hang up.
        Ending::Complete | Ending::Failed(Refusal { reason: Reason::Reset, .. }) => Level::INFO,
        Ending::Failed(_) => Level::ERROR,
    };
    let wanted = &shared.settings.access_log;
    if !shared.access.enabled(level) || (level == Level::INFO && !wanted.draws()) {
        return;
    }
    let mut out = shared.access.line(level, "connection complete");
    fields(record, sent, received, end, |key, value| {
        if !wanted.has(key) {
            return;
        }
        match value {
            Value::Text(s) => out.str(key, s),
            Value::Bare(s) => out.raw(key, s),
            Value::Addr(a) => out.raw(key, a),
            Value::Number(n) => out.num(key, n),
        };
    });
    shared.access.send(out);
}
