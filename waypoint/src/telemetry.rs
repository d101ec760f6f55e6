//! What is told about requests and connections: metrics under Istio's names, the access log.
//!
//! Everything here runs after a request's last byte, off its path. Labels are looked up once per (client, endpoint, answer)
//! and data thread; a line is formatted into a buffer of the thread and handed to the log's own. Upstream: `phase::expose`,
//! `tcp`. Downstream: the scrape on 15020, the log's writer thread.

mod access;
mod flags;
mod labels;
mod record;

pub use flags::{Flag, Flags};
pub use record::{Record, TcpRecord};

use crate::facts::Facts;
use labels::{HTTP_LABELS, TCP_LABELS};
use mesh_hbone::relay::Counters;
use mesh_model::metric_labels::Ends;
use mesh_model::service::Service;
use mesh_model::workload::Workload;
use mesh_model::{Refusal, SpiffeId};
use mesh_runtime::logging::{AccessLog, Format};
use mesh_runtime::metrics::{Counter, Family, Histogram, MetricError, Registry};
use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Envoy's histogram buckets, in milliseconds and in bytes.
const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];
/// Handles one data thread remembers; beyond it all are looked up anew.
const REMEMBERED: usize = 4096;

/// The entrance. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Telemetry {
    requests: Family<Counter>,
    durations: Family<Histogram>,
    request_bytes: Family<Histogram>,
    response_bytes: Family<Histogram>,
    opened: Family<Counter>,
    closed: Family<Counter>,
    sent: Family<Counter>,
    received: Family<Counter>,
    refused: Family<Counter>,
    access: Option<AccessLog>,
}

/// What decides the labels of a request. The `Arc`s are compared by address and kept alive by being here.
#[derive(Clone)]
struct Key {
    source: Option<Arc<Workload>>,
    identity: Option<SpiffeId>,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    status: u16,
    grpc_status: Option<u16>,
    flags: u32,
    grpc: bool,
}
fn address<T>(of: Option<&Arc<T>>) -> usize {
    of.map_or(0, |a| Arc::as_ptr(a) as usize)
}
impl Key {
    fn parts(&self) -> (usize, usize, usize, u16, Option<u16>, u32, bool) {
        let (source, destination) = (address(self.source.as_ref()), address(self.destination.as_ref()));
        (source, destination, address(self.service.as_ref()), self.status, self.grpc_status, self.flags, self.grpc)
    }
}
impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts() && self.identity == other.identity
    }
}
impl Eq for Key {}
impl std::hash::Hash for Key {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}
struct Handles {
    requests: Arc<Counter>,
    durations: Arc<Histogram>,
    request_bytes: Arc<Histogram>,
    response_bytes: Arc<Histogram>,
}

thread_local! {
    static HANDLES: RefCell<HashMap<Key, Handles, foldhash::fast::RandomState>> = RefCell::default();
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Telemetry {
    /// Registers all metrics. `access`: where request lines go, if anywhere.
    pub fn new(registry: &Registry, access: Option<AccessLog>) -> Result<Self, MetricError> {
        let http = |name, help| registry.family(Family::with_buckets(name, help, &HTTP_LABELS, &BUCKETS));
        let tcp = |name, help| registry.family(Family::<Counter>::new(name, help, &TCP_LABELS));
        Ok(Self {
            requests: registry.family(Family::new("istio_requests_total", "Requests answered or given up", &HTTP_LABELS))?,
            durations: http("istio_request_duration_milliseconds", "From the request's head to the last byte of the answer")?,
            request_bytes: http("istio_request_bytes", "Bytes of request bodies")?,
            response_bytes: http("istio_response_bytes", "Bytes of response bodies")?,
            opened: tcp("istio_tcp_connections_opened_total", "Connections opened")?,
            closed: tcp("istio_tcp_connections_closed_total", "Connections closed")?,
            sent: tcp("istio_tcp_sent_bytes_total", "Bytes sent to the client, as responses")?,
            received: tcp("istio_tcp_received_bytes_total", "Bytes received from the client, as requests")?,
            refused: registry.family(Family::new(
                "culvert_refused_total",
                "Tunnels, connections and requests refused here, by reason",
                &["reporter", "reason"],
            ))?,
            access,
        })
    }

    /// A request was answered to its last byte, or given up.
    pub fn request_done(&self, conn: &Facts, record: &Record) {
        let elapsed = record.started.elapsed();
        let received = record.received.load(Ordering::Relaxed);
        let key = Key {
            source: conn.source.clone(),
            identity: conn.identity.clone(),
            destination: record.host.as_ref().map(|h| Arc::clone(h.workload())),
            service: record.cluster.as_ref().and_then(|c| c.service()).or(conn.service()).cloned(),
            status: record.status,
            grpc_status: record.grpc_status,
            flags: record.flags.bits(),
            grpc: record.grpc,
        };
        HANDLES.with_borrow_mut(|known| {
            if known.len() >= REMEMBERED {
                known.clear();
            }
            let handles = known.entry(key).or_insert_with_key(|key| self.look_up(key, record));
            handles.requests.inc();
            handles.durations.observe(elapsed.as_secs_f64() * 1000.0);
            handles.request_bytes.observe(received as f64);
            handles.response_bytes.observe(record.sent as f64);
        });
        if let Some(reason) = record.reason {
            self.refused.get(&["waypoint", reason.as_str()]).inc();
        }
        let Some(access) = self.access.as_ref().filter(|a| a.enabled(tracing::Level::INFO)) else { return };
        LINE.with_borrow_mut(|line| {
            line.clear();
            access::Line { conn, record, elapsed, received }.write(line, access.format() == Format::Json);
            access.send_bytes(line);
        });
    }

    fn look_up(&self, key: &Key, record: &Record) -> Handles {
        let ends = Ends {
            reporter: "waypoint",
            source: key.source.as_ref(),
            source_id: key.identity.as_ref(),
            destination: key.destination.as_ref(),
            destination_id: record.host.as_ref().and_then(|h| h.identity()),
            service: key.service.as_ref(),
        };
        let (flags, status) = (record.flags.to_string(), record.status.to_string());
        let grpc_status = record.grpc_status.filter(|_| record.grpc).map(|s| s.to_string()).unwrap_or_default();
        let protocol = if record.grpc { "grpc" } else { "http" };
        let values = labels::http(ends, protocol, &status, &grpc_status, &flags);
        Handles {
            requests: self.requests.get(&values),
            durations: self.durations.get(&values),
            request_bytes: self.request_bytes.get(&values),
            response_bytes: self.response_bytes.get(&values),
        }
    }

    /// A tunnel or a CONNECT in it was refused.
    pub fn tunnel_refused(&self, client: SocketAddr, identity: Option<&SpiffeId>, why: &Refusal) {
        self.refused.get(&["waypoint", why.reason.as_str()]).inc();
        tracing::warn!(%client, identity = identity.map_or("", SpiffeId::as_str), %why, "refused");
    }

    /// A connection carried as bytes reached its endpoint.
    pub fn tcp_opened(&self, conn: &Facts, record: &TcpRecord) -> TcpHandles {
        let flags = record.flags.to_string();
        let values = labels::tcp(ends_of(conn, record), &flags);
        self.opened.get(&values).inc();
        TcpHandles {
            closed: self.closed.get(&values),
            sent: self.sent.get(&values),
            received: self.received.get(&values),
            to_server: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
        }
    }
    /// A connection carried as bytes found no endpoint.
    pub fn tcp_failed(&self, conn: &Facts, record: &TcpRecord) {
        let flags = record.flags.to_string();
        let values = labels::tcp(ends_of(conn, record), &flags);
        self.opened.get(&values).inc();
        self.closed.get(&values).inc();
        if let Some(reason) = record.reason {
            self.refused.get(&["waypoint", reason.as_str()]).inc();
        }
        self.tcp_line(conn, record, (0, 0));
    }
    /// A connection carried as bytes ended.
    pub fn tcp_done(&self, conn: &Facts, record: &TcpRecord, handles: &TcpHandles) {
        handles.closed.inc();
        let bytes = (handles.to_server.load(Ordering::Relaxed), handles.to_client.load(Ordering::Relaxed));
        self.tcp_line(conn, record, bytes);
    }
    fn tcp_line(&self, conn: &Facts, record: &TcpRecord, bytes: (u64, u64)) {
        let Some(access) = self.access.as_ref().filter(|a| a.enabled(tracing::Level::INFO)) else { return };
        LINE.with_borrow_mut(|line| {
            line.clear();
            access::TcpLine { conn, record, bytes }.write(line, access.format() == Format::Json);
            access.send_bytes(line);
        });
    }
}

fn ends_of<'a>(conn: &'a Facts, record: &'a TcpRecord) -> Ends<'a> {
    Ends {
        reporter: "waypoint",
        source: conn.source.as_ref(),
        source_id: conn.identity.as_ref(),
        destination: record.host.as_ref().map(|h| h.workload()),
        destination_id: record.host.as_ref().and_then(|h| h.identity()),
        service: record.cluster.as_ref().and_then(|c| c.service()).or(conn.service()),
    }
}

/// Counters of one connection carried as bytes.
#[derive(Debug)]
pub struct TcpHandles {
    closed: Arc<Counter>,
    sent: Arc<Counter>,
    received: Arc<Counter>,
    to_server: AtomicU64,
    to_client: AtomicU64,
}
impl Counters for TcpHandles {
    fn sent(&self, bytes: u64) {
        self.received.add(bytes);
        self.to_server.fetch_add(bytes, Ordering::Relaxed);
    }
    fn received(&self, bytes: u64) {
        self.sent.add(bytes);
        self.to_client.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
