//! Spans on their way to collectors, in OTLP: queued where something ended, sent in batches by one task per collector.
//!
//! Nobody waits for a collector: what a full queue cannot take is lost, and so is a batch the collector did not take; both
//! are counted (`culvert_trace_spans_total`). Tasks live on one data thread, where the mesh's tunnels can be used. Owns also
//! what spans of both programs have in common ([`tags`]). Refuses to know how a collector is reached ([`Way`]) and what a span
//! is of. Upstream: the telemetry of waypoints and of agents. Downstream: the collector.
#![forbid(unsafe_code)]

pub mod tags;
mod wire;

use arc_swap::ArcSwap;
use bytes::Bytes;
use mesh_model::telemetry::tracing::Collector;
use mesh_proto::Message as _;
use mesh_proto::opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest;
use mesh_proto::opentelemetry::proto::common::v1::InstrumentationScope;
use mesh_proto::opentelemetry::proto::resource::v1::Resource;
pub use mesh_proto::opentelemetry::proto::trace::v1::Span;
use mesh_proto::opentelemetry::proto::trace::v1::{ResourceSpans, ScopeSpans};
use mesh_runtime::metrics::{Counter, Family, MetricError, Registry};
use mesh_runtime::threads::Worker;
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tags::tag;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use wire::{Failed, Link};

/// How a process reaches collectors.
pub trait Way: Debug + Send + Sync {
    /// The data thread connections are made and used on.
    fn worker(&self) -> &Worker;
    /// A connection; called on [`Self::worker`]. Its error is in words, for logs.
    fn connect<'a>(&'a self, to: &'a Collector) -> Connecting<'a>;
}
/// A connection in the making.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Duplex>, String>> + Send + 'a>>;
/// A byte stream.
pub trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// Spans that wait for one collector, at about 3 KiB each.
const QUEUE: usize = 2048;
/// Spans of one batch: together less than the 4 MiB gRPC servers take.
const BATCH: usize = 256;
/// How long the first span of a batch waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// Shortest and longest rest after a failure.
const REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The way out for spans.
#[derive(Debug)]
pub struct Spans {
    queues: ArcSwap<HashMap<Arc<Collector>, Arc<Queue>, foldhash::fast::RandomState>>,
    writing: Mutex<()>,
    /// No new queues: the process ends.
    closed: AtomicBool,
    common: Arc<Common>,
}
/// What all tasks need.
#[derive(Debug)]
struct Common {
    way: Arc<dyn Way>,
    /// `service.name`.
    name: ArcSwap<String>,
    outcomes: Family<Counter>,
}
/// The queue of one collector. Without it the task sends what is left, and ends.
#[derive(Debug)]
struct Queue {
    spans: mpsc::Sender<Span>,
    full: Arc<Counter>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Spans {
    /// Registers the metric; nothing is connected yet. `name`: what the process is called (`service.name`).
    pub fn new(registry: &Registry, way: Arc<dyn Way>, name: String) -> Result<Self, MetricError> {
        let help = "Spans by what became of them: sent, rejected by the collector, failed to be sent, queue_full";
        let outcomes = registry.family(Family::new("culvert_trace_spans_total", help, &["collector", "outcome"]))?;
        let common = Arc::new(Common { way, name: ArcSwap::from_pointee(name), outcomes });
        Ok(Self { queues: ArcSwap::default(), writing: Mutex::default(), closed: AtomicBool::new(false), common })
    }
    /// The process is called otherwise from now on.
    pub fn set_name(&self, name: String) {
        self.common.name.store(Arc::new(name));
    }
    /// Queues a span. Never waits.
    pub fn send(&self, collector: &Arc<Collector>, span: Span) {
        if let Some(queue) = self.queues.load().get(collector) {
            return queue.send(span);
        }
        if let Some(queue) = self.begin(collector) {
            queue.send(span);
        }
    }
    fn begin(&self, collector: &Arc<Collector>) -> Option<Arc<Queue>> {
        let _writing = self.writing.lock();
        if self.closed.load(Relaxed) {
            return None;
        }
        let mut next = HashMap::clone(&self.queues.load());
        let new = || Arc::new(Queue::begin(collector, &self.common));
        let queue = Arc::clone(next.entry(Arc::clone(collector)).or_insert_with(new));
        self.queues.store(Arc::new(next));
        Some(queue)
    }
    /// Forgets collectors nobody mentions any more, after their last batch.
    pub fn collect(&self, mentioned: &HashSet<&Arc<Collector>>) {
        let _writing = self.writing.lock();
        let now = self.queues.load();
        if !now.keys().all(|collector| mentioned.contains(collector)) {
            let kept = now.iter().filter(|(collector, _)| mentioned.contains(collector));
            self.queues.store(Arc::new(kept.map(|(collector, queue)| (Arc::clone(collector), Arc::clone(queue))).collect()));
        }
    }
    /// Sends what is queued, for at most so long. Later spans are lost.
    pub async fn close(&self, limit: Duration) {
        let queues = {
            let _writing = self.writing.lock();
            self.closed.store(true, Relaxed);
            self.queues.swap(Arc::default())
        };
        let tasks: Vec<_> = queues.values().filter_map(|queue| queue.task.lock().take()).collect();
        drop(queues);
        let deadline = Instant::now() + limit;
        for task in tasks {
            // What is late, or was aborted with its thread, is lost.
            let _ended = timeout_at(deadline, task).await;
        }
    }
}
impl Queue {
    fn begin(collector: &Arc<Collector>, common: &Arc<Common>) -> Self {
        let (spans, queued) = mpsc::channel(QUEUE);
        let name = format!("{}:{}", collector.host, collector.port);
        let outcome = |outcome| common.outcomes.get(&[&name, outcome]);
        let sending = Sending {
            collector: Arc::clone(collector),
            common: Arc::clone(common),
            link: None,
            sent: outcome("sent"),
            rejected: outcome("rejected"),
            failed: outcome("failed"),
        };
        let task = common.way.worker().spawn(sending.run(queued));
        Self { spans, full: outcome("queue_full"), task: Mutex::new(Some(task)) }
    }
    fn send(&self, span: Span) {
        if self.spans.try_send(span).is_err() {
            self.full.inc();
        }
    }
}

/// The task of one collector.
struct Sending {
    collector: Arc<Collector>,
    common: Arc<Common>,
    link: Option<Link>,
    sent: Arc<Counter>,
    rejected: Arc<Counter>,
    failed: Arc<Counter>,
}
impl Sending {
    async fn run(mut self, mut queued: mpsc::Receiver<Span>) {
        let (shortest, longest) = REST;
        let mut rest = None;
        let mut batch = Vec::new();
        while fill(&mut batch, &mut queued).await {
            let count = batch.len() as u64;
            let message = self.message(std::mem::take(&mut batch));
            match self.deliver(&message).await {
                Ok(rejected) => {
                    let rejected = rejected.min(count);
                    self.sent.add(count - rejected);
                    self.rejected.add(rejected);
                    if rest.take().is_some() {
                        tracing::info!(collector = %self.collector.host, "spans are taken again");
                    }
                }
                Err(error) => {
                    self.failed.add(count);
                    if rest.is_none() {
                        tracing::warn!(collector = %self.collector.host, port = self.collector.port, %error, "spans are lost");
                    }
                    if queued.is_closed() {
                        return;
                    }
                    let pause = rest.map_or(shortest, |last: Duration| (last * 2).min(longest));
                    rest = Some(pause);
                    sleep(pause).await;
                }
            }
        }
    }

    /// A batch as it goes over the wire.
    fn message(&self, spans: Vec<Span>) -> Bytes {
        let version = env!("CARGO_PKG_VERSION");
        let mut attributes = vec![
            tag("service.name", self.common.name.load().as_str()),
            tag("telemetry.sdk.language", "rust"),
            tag("telemetry.sdk.name", "culvert"),
            tag("telemetry.sdk.version", version),
        ];
        for (key, value) in &self.collector.resource {
            attributes.retain(|a| *a.key != **key);
            attributes.push(tag(key, &**value));
        }
        let scope = InstrumentationScope { name: "culvert".to_owned(), version: version.to_owned() };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
        let resource_spans = vec![ResourceSpans { resource: Some(Resource { attributes }), scope_spans }];
        ExportTraceServiceRequest { resource_spans }.encode_to_vec().into()
    }

    /// Hands over a batch; how many of its spans the collector rejected.
    async fn deliver(&mut self, message: &Bytes) -> Result<u64, String> {
        let limit = self.collector.timeout;
        let all = async {
            if let Some(mut used) = self.link.take() {
                match used.send(&self.collector, message).await {
                    // The collector may have closed it since.
                    Err(Failed::Broken(_)) => {}
                    other => {
                        self.link = Some(used);
                        return other.map_err(Failed::into_words);
                    }
                }
            }
            let mut fresh = Link::open(&self.collector, &*self.common.way).await?;
            let outcome = fresh.send(&self.collector, message).await;
            if !matches!(outcome, Err(Failed::Broken(_))) {
                self.link = Some(fresh);
            }
            outcome.map_err(Failed::into_words)
        };
        timeout(limit, all).await.unwrap_or_else(|_| Err(format!("no answer in {limit:?}")))
    }
}

/// Waits for spans and takes as many as come soon after the first. `false`: there will be none.
async fn fill(batch: &mut Vec<Span>, queued: &mut mpsc::Receiver<Span>) -> bool {
    if queued.recv_many(batch, BATCH).await == 0 {
        return false;
    }
    let due = Instant::now() + LINGER;
    while batch.len() < BATCH {
        match timeout_at(due, queued.recv_many(batch, BATCH - batch.len())).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    true
}

#[cfg(test)]
mod tests;
