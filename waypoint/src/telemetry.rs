//! What is told about requests and connections: metrics under Istio's names, the access log, spans.
//!
//! Everything here runs after a request's last byte, off its path. Label lookups happen once per (client, endpoint, answer)
//! and data thread. Upstream: `phase::expose`, `tcp`. Downstream: the scrape on 15020, the log's writer thread, collectors.

pub mod access;
mod cache;
mod flags;
mod grpc;
mod labels;
mod metrics;
mod record;
pub(crate) mod scrape;
mod span;

pub use flags::{Flag, Flags};
pub(crate) use grpc::grpc_of_http;
pub use grpc::{Messages, Received};
pub(crate) use record::ORIGINAL_PATH;
pub use record::{Call, Noted, Operation, Record, Said, TcpRecord};

use crate::facts::{Facts, Scope};
use crate::upstream::{Cluster, Host};
use access::{Access, Line, Told};
use arc_swap::ArcSwapOption;
use cache::{AnswerKey, Cache, Key, PolicyCount};
use mesh_hbone::relay::Counters;
use mesh_model::metric_labels::Ends;
use mesh_model::policy::PolicyKey;
use mesh_model::telemetry::MetricRules;
use mesh_model::workload::Workload;
use mesh_model::{Refusal, SpiffeId};
use mesh_runtime::logging::AccessLog;
use mesh_runtime::metrics::{MetricError, Registry};
use mesh_spans::Spans;
use mesh_spans::tags::Process;
use metrics::{ConnectionHandles, Metrics, add, observe};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
    access: Option<Access>,
    spans: Option<(Spans, Process)>,
    /// The workload this process is.
    own: ArcSwapOption<Workload>,
    own_identity: SpiffeId,
    /// For where nobody changes the metrics.
    unchanged: MetricRules,
}
impl Telemetry {
    /// Registers all metrics. `access`, `spans`: where lines about requests and connections, and spans of requests, go, if
    /// anywhere; the latter with what they say of this process. `own_identity`: ours.
    pub fn new(
        registry: &Registry,
        access: Option<AccessLog>,
        spans: Option<(Spans, Process)>,
        own_identity: SpiffeId,
    ) -> Result<Self, MetricError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let access = access.map(Access::new);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let inner = Inner {
            id,
            metrics: Metrics::new(registry)?,
            access,
            spans,
            own: ArcSwapOption::empty(),
            own_identity,
            unchanged: MetricRules::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Who we are.
    pub fn own_identity(&self) -> &SpiffeId {
        &self.inner.own_identity
    }

    /// The mesh says which workload this process is: what a gateway reports as.
    pub fn set_own(&self, own: Option<&Arc<Workload>>) {
        self.inner.own.store(own.cloned());
        if let Some((spans, process)) = &self.inner.spans {
            spans.set_name(process.service_name(own.map(|own| &**own)));
        }
    }

    /// Where spans go.
    pub fn spans(&self) -> Option<&Spans> {
        self.inner.spans.as_ref().map(|(spans, _)| spans)
    }

    /// Lets go of handles this thread did not use since the last call, so that series nobody counts in can expire. To be
    /// called on each data thread now and then.
    pub fn tidy_thread(&self) {
        CACHE.with_borrow_mut(Cache::tidy);
    }

    /// A request was answered to its last byte, or given up.
    pub fn request_done(&self, facts: &Facts, record: &Record) {
        let line = Line { facts, told: Told::Request(record), took: record.started.elapsed(), own: self.own_identity() };
        self.count(record, &line);
        if let Some(reason) = record.reason {
            self.inner.metrics.refused.inc(reason);
        }
        self.tell(&line);
        self.trace(&line, record);
    }

    fn trace(&self, line: &Line<'_>, record: &Record) {
        let Some(trace) = record.trace.as_ref().filter(|t| t.sampled) else { return };
        let (Some(tracing), Some((spans, process))) = (record.tracing(), &self.inner.spans) else { return };
        let own = self.inner.own.load();
        spans.send(&tracing.collector, span::of(line, record, (tracing, trace), own.as_deref(), process));
        for call in &record.calls {
            spans.send(&tracing.collector, span::of_call(call));
        }
    }

    fn count(&self, record: &Record, line: &Line<'_>) {
        let inner = &*self.inner;
        let own = inner.own.load();
        let ends = self.ends(line.facts, own.as_ref(), record.host.as_ref(), record.cluster.as_ref());
        let answer = AnswerKey {
            status: record.status,
            flags: record.flags,
            grpc: record.grpc,
            grpc_status: record.grpc_status(),
            hbone: record.host.as_ref().is_some_and(|h| h.is_hbone()),
        };
        let told = record.told.as_ref().filter(|t| !t.metrics.is_empty());
        let rules = told.map_or(&inner.unchanged, |t| &t.metrics);
        let tags = tags(rules, line);
        CACHE.with_borrow_mut(|cache| {
            let key = Key { ends, answer, told, tags: &tags };
            let handles = cache.get(inner.id, &key, || inner.metrics.request(ends, record, rules, &tags));
            add(handles.requests.as_ref(), 1);
            observe(handles.duration.as_ref(), line.took.as_secs_f64() * 1000.0);
            // Exact below 2^53.
            observe(handles.request_bytes.as_ref(), record.received.bytes() as f64);
            observe(handles.response_bytes.as_ref(), record.sent as f64);
            if record.grpc {
                add(handles.request_messages.as_ref(), record.received.messages());
                add(handles.response_messages.as_ref(), record.sent_messages.count());
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
            Scope::Mesh(_) | Scope::Network { .. } => ("waypoint", facts.source.as_ref(), facts.identity.as_ref()),
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
        self.policy_counter(PolicyCount::Shadow(policy.cloned(), result));
    }

    /// What the dry-run policies of an action say of a request, as Istio counts it.
    pub fn dry_run(&self, action: &'static str, result: &'static str) {
        self.policy_counter(PolicyCount::DryRun(action, result));
    }
    fn policy_counter(&self, key: PolicyCount) {
        let metrics = &self.inner.metrics;
        CACHE.with_borrow_mut(|cache| {
            let counter = cache.policy(self.inner.id, key, |key| match key {
                PolicyCount::Shadow(policy, result) => {
                    let policy = policy.as_ref().map(ToString::to_string).unwrap_or_default();
                    metrics.shadow.get(&[&policy, result])
                }
                PolicyCount::DryRun(action, result) => metrics.dry_run.get(&[action, result]),
            });
            counter.inc();
        });
    }

    /// A connection carried as bytes reached its endpoint.
    pub fn tcp_opened(&self, facts: &Facts, record: &TcpRecord) -> TcpHandles {
        let inner = &*self.inner;
        let own = inner.own.load();
        let ends = self.ends(facts, own.as_ref(), record.host.as_ref(), record.cluster.as_ref());
        let rules = record.told.as_ref().map_or(&inner.unchanged, |t| &t.metrics);
        let tags = tags(rules, &self.connection(facts, record, (0, 0)));
        let handles = inner.metrics.connection(ends, record.flags, rules, &tags);
        add(handles.opened.as_ref(), 1);
        TcpHandles { handles, received: AtomicU64::new(0), sent: AtomicU64::new(0) }
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
        self.tell(&self.connection(facts, record, handles.bytes()));
    }

    fn connection<'a>(&'a self, facts: &'a Facts, record: &'a TcpRecord, (received, sent): (u64, u64)) -> Line<'a> {
        let told = Told::Connection { record, received, sent };
        Line { facts, told, took: record.started.elapsed(), own: self.own_identity() }
    }

    fn tell(&self, line: &Line<'_>) {
        if let Some(access) = &self.inner.access {
            access.tell(line);
        }
    }
}

/// Values of the tags the mesh adds. One without a value is empty, and left out.
fn tags(rules: &MetricRules, line: &Line<'_>) -> Vec<Box<str>> {
    rules.tags.iter().map(|tag| tag.text(line).unwrap_or_default().into()).collect()
}

/// Counters of one connection carried as bytes. Dropping them counts its end.
#[derive(Debug)]
pub struct TcpHandles {
    handles: ConnectionHandles,
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
        add(self.handles.received.as_ref(), bytes);
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }
    fn received(&self, bytes: u64) {
        add(self.handles.sent.as_ref(), bytes);
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }
}
impl Drop for TcpHandles {
    fn drop(&mut self) {
        // Also when the connection's task is dropped at the end of the process; nothing is logged here.
        add(self.handles.closed.as_ref(), 1);
    }
}

#[cfg(test)]
pub(crate) mod tests;
