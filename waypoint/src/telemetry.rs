//! What is told about requests and connections: metrics under Istio's names, the access log.
//!
//! Everything here runs after a request's last byte, off its path. Label lookups happen once per (client, endpoint, answer)
//! and data thread. Upstream: `phase::expose`, `tcp`. Downstream: the scrape on 15020, the log's writer thread.

pub mod access;
mod cache;
mod flags;
mod grpc;
mod labels;
mod metrics;
mod record;
pub(crate) mod scrape;

pub use flags::{Flag, Flags};
pub use grpc::{Messages, Received};
pub use record::{Noted, Record, TcpRecord};

use crate::facts::{Facts, Scope};
use crate::upstream::{Cluster, Host};
use access::{Format, Line, Told};
use arc_swap::ArcSwapOption;
use cache::{AnswerKey, Cache, Key};
use mesh_hbone::relay::Counters;
use mesh_model::metric_labels::Ends;
use mesh_model::policy::PolicyKey;
use mesh_model::workload::Workload;
use mesh_model::{Refusal, SpiffeId};
use mesh_runtime::logging::AccessLog;
use mesh_runtime::metrics::{Counter, MetricError, Registry};
use metrics::Metrics;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tracing::Level;

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

/// The entrance. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Telemetry {
    inner: Arc<Inner>,
}
#[derive(Debug)]
struct Inner {
    /// Tells the handles of these metrics from those of others in the threads' tables.
    id: u64,
    metrics: Metrics,
    access: Option<(AccessLog, Format)>,
    /// The workload this process is.
    own: ArcSwapOption<Workload>,
    own_identity: SpiffeId,
}
impl Telemetry {
    /// Registers all metrics. `access`: where lines about requests and connections go, if anywhere. `own_identity`: ours.
    pub fn new(registry: &Registry, access: Option<AccessLog>, own_identity: SpiffeId) -> Result<Self, MetricError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let access = access.map(|log| {
            let format = Format::istio(log.format());
            (log, format)
        });
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let inner = Inner { id, metrics: Metrics::new(registry)?, access, own: ArcSwapOption::empty(), own_identity };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Who we are.
    pub fn own_identity(&self) -> &SpiffeId {
        &self.inner.own_identity
    }

    /// The mesh says which workload this process is: what a gateway reports as.
    pub fn set_own(&self, own: Option<&Arc<Workload>>) {
        self.inner.own.store(own.cloned());
    }

    /// Lets go of handles this thread did not use since the last call, so that series nobody counts in can expire. To be
    /// called on each data thread now and then.
    pub fn tidy_thread(&self) {
        CACHE.with_borrow_mut(Cache::tidy);
    }

    /// A request was answered to its last byte, or given up.
    pub fn request_done(&self, facts: &Facts, record: &Record) {
        let took = record.started.elapsed();
        self.count(facts, record, took);
        if let Some(reason) = record.reason {
            self.inner.metrics.refused.inc(reason);
        }
        self.tell(&Line { facts, told: Told::Request(record), took });
    }

    fn count(&self, facts: &Facts, record: &Record, took: Duration) {
        let inner = &*self.inner;
        let own = inner.own.load();
        let ends = self.ends(facts, own.as_ref(), record.host.as_ref(), record.cluster.as_ref());
        let answer = AnswerKey {
            status: record.status,
            flags: record.flags,
            grpc: record.grpc,
            grpc_status: record.grpc_status,
            hbone: record.host.as_ref().is_some_and(|h| h.is_hbone()),
        };
        CACHE.with_borrow_mut(|cache| {
            let handles = cache.get(inner.id, &Key { ends, answer }, || inner.metrics.request(ends, record));
            handles.requests.inc();
            handles.duration.observe(took.as_secs_f64() * 1000.0);
            // Exact below 2^53.
            handles.request_bytes.observe(record.received.bytes() as f64);
            handles.response_bytes.observe(record.sent as f64);
            if let Some((requests, responses)) = &handles.messages {
                requests.add(record.received.messages());
                responses.add(record.sent_messages.count());
            }
        });
    }

    /// Who talked to whom. `own`: the workload this process is.
    fn ends<'a>(
        &'a self,
        facts: &'a Facts,
        own: Option<&'a Arc<Workload>>,
        host: Option<&'a Arc<Host>>,
        cluster: Option<&'a Arc<Cluster>>,
    ) -> Ends<'a> {
        // A gateway at the mesh's edge is the first of the mesh to see a request: it reports as the source, as in Istio. A
        // waypoint stands between a client and an endpoint of the mesh.
        let (reporter, source, source_id) = match facts.scope {
            Scope::Gateway { .. } => ("source", own, Some(&self.inner.own_identity)),
            Scope::Mesh(_) => ("waypoint", facts.source.as_ref(), facts.identity.as_ref()),
        };
        Ends {
            reporter,
            source,
            source_id,
            destination: host.map(|h| h.workload()),
            destination_id: host.and_then(|h| h.identity()),
            // A route may lead to another service than the one addressed; Istio counts the one the request went to.
            service: cluster.and_then(|c| c.service()).or(facts.service()),
        }
    }

    /// A tunnel or a CONNECT in it was refused, or something that lived in one was cut.
    pub fn tunnel_refused(&self, client: SocketAddr, identity: Option<&SpiffeId>, why: &Refusal) {
        self.inner.metrics.refused.inc(why.reason);
        tracing::warn!(%client, identity = identity.map_or("", SpiffeId::as_str), %why, "refused");
    }

    /// A policy that enforces nothing would have: `result` is `allowed`, `denied` or `audited`; no policy is the lack of an
    /// ALLOW that matches, or of anything that denies.
    pub fn shadow(&self, policy: Option<&PolicyKey>, result: &'static str) {
        let policy = policy.map(ToString::to_string).unwrap_or_default();
        self.inner.metrics.shadow.get(&[&policy, result]).inc();
    }

    /// A connection carried as bytes reached its endpoint.
    pub fn tcp_opened(&self, facts: &Facts, record: &TcpRecord) -> TcpHandles {
        let inner = &*self.inner;
        let own = inner.own.load();
        let ends = self.ends(facts, own.as_ref(), record.host.as_ref(), record.cluster.as_ref());
        let flags = record.flags.to_string();
        let values = labels::tcp(ends, &flags);
        let metrics = &inner.metrics;
        metrics.opened.get(&values).inc();
        TcpHandles {
            closed: metrics.closed.get(&values),
            received_total: metrics.received.get(&values),
            sent_total: metrics.sent.get(&values),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }
    /// A connection carried as bytes found no endpoint: opened and closed at once, with the flag that says why (Envoy).
    pub fn tcp_failed(&self, facts: &Facts, record: &TcpRecord) {
        let handles = self.tcp_opened(facts, record);
        if let Some(reason) = record.reason {
            self.inner.metrics.refused.inc(reason);
        }
        self.tcp_done(facts, record, &handles);
    }
    /// A connection carried as bytes ended.
    pub fn tcp_done(&self, facts: &Facts, record: &TcpRecord, handles: &TcpHandles) {
        let (received, sent) = handles.bytes();
        let told = Told::Connection { record, received, sent };
        self.tell(&Line { facts, told, took: record.started.elapsed() });
    }

    fn tell(&self, line: &Line<'_>) {
        if let Some((log, format)) = &self.inner.access
            && log.enabled(Level::INFO)
        {
            format.send(line, log);
        }
    }
}

/// Counters of one connection carried as bytes. Dropping them counts its end.
#[derive(Debug)]
pub struct TcpHandles {
    closed: Arc<Counter>,
    received_total: Arc<Counter>,
    sent_total: Arc<Counter>,
    received: AtomicU64,
    sent: AtomicU64,
}
impl TcpHandles {
    /// Bytes so far: from the client, to the client.
    pub fn bytes(&self) -> (u64, u64) {
        (self.received.load(Ordering::Relaxed), self.sent.load(Ordering::Relaxed))
    }
}
impl Counters for TcpHandles {
    /// The client is the relay's first end: what it sent, we received.
    fn sent(&self, bytes: u64) {
        self.received_total.add(bytes);
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }
    fn received(&self, bytes: u64) {
        self.sent_total.add(bytes);
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }
}
impl Drop for TcpHandles {
    fn drop(&mut self) {
        // Also when the connection's task is dropped at the end of the process; nothing is logged here.
        self.closed.inc();
    }
}

#[cfg(test)]
pub(crate) mod tests;
