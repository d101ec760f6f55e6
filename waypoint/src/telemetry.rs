//! What is told about requests and connections: metrics under Istio's names, the access log.
//!
//! Everything here runs after a request's last byte, off its path. Label lookups happen once per (client, endpoint, answer)
//! and data thread. Upstream: `phase::expose`, `tcp`. Downstream: the scrape on 15020, the log's writer thread.

mod flags;
mod record;

pub use flags::{Flag, Flags};
pub use record::{Record, TcpRecord};

use crate::facts::Facts;
use mesh_hbone::relay::Counters;
use mesh_model::{Refusal, SpiffeId};
use mesh_runtime::logging::AccessLog;
use mesh_runtime::metrics::{MetricError, Registry};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

/// The entrance. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Telemetry {
    access: Option<AccessLog>,
}
impl Telemetry {
    /// Registers all metrics. `access`: where request lines go, if anywhere.
    pub fn new(_registry: &Registry, access: Option<AccessLog>) -> Result<Self, MetricError> {
        Ok(Self { access })
    }
    /// A request was answered to its last byte, or given up.
    pub fn request_done(&self, conn: &Facts, record: &Record) {
        let Some(access) = &self.access else { return };
        if access.enabled(tracing::Level::INFO) {
            let mut line = access.line(tracing::Level::INFO, "request");
            line.str("method", record.method.as_str());
            line.str("path", &record.path);
            line.num("response_code", u64::from(record.status));
            line.str("response_flags", &record.flags.to_string());
            line.str("response_code_details", &record.details);
            line.raw("client", conn.client);
            access.send(line);
        }
    }
    /// A tunnel or a CONNECT in it was refused.
    pub fn tunnel_refused(&self, client: SocketAddr, identity: Option<&SpiffeId>, why: &Refusal) {
        tracing::warn!(%client, identity = identity.map_or("", SpiffeId::as_str), %why, "refused");
    }
    /// A connection carried as bytes reached its endpoint.
    pub fn tcp_opened(&self, _conn: &Facts, _record: &TcpRecord) -> TcpHandles {
        TcpHandles::default()
    }
    /// A connection carried as bytes found no endpoint.
    pub fn tcp_failed(&self, _conn: &Facts, _record: &TcpRecord) {}
    /// A connection carried as bytes ended.
    pub fn tcp_done(&self, _conn: &Facts, _record: &TcpRecord, _handles: &TcpHandles) {}
}

/// Counters of one connection carried as bytes.
#[derive(Debug, Default)]
pub struct TcpHandles {
    received: AtomicU64,
    sent: AtomicU64,
}
impl Counters for TcpHandles {
    fn sent(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }
    fn received(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }
}
