//! The certificates of this node's workloads: one per identity, renewed in time, found without waiting.
//!
//! The data path only reads ([`SvidHandle::load`], [`SvidCache::find`]); everything that takes time is done by one task on the
//! control runtime ([`rotate`], the only writer), which workloads reach by messages. Requests for one identity are joined, at
//! most eight are under way, the urgent ones first. A certificate that is still valid stays in use when its renewal fails.
//! Refuses nothing by itself; passes on why the authority did.
//!
//! Upstream: [`crate::source`]. Downstream: the proxies, and the admin page ([`dump`]).

pub mod dump;
mod rotate;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use mesh_model::SpiffeId;
use mesh_runtime::metrics::{MetricError, Registry};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::error::IdentityError;
use crate::source::{Facts, IdentitySource};
use crate::svid::{Svid, TlsContext};
use rotate::{Order, Rotation};

/// Settings of the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct CacheSettings {
    /// How long a connection waits for a certificate.
    #[serde(with = "crate::span")]
    pub fetch_timeout: Duration,
    /// How long one request to the authority may take.
    #[serde(with = "crate::span")]
    pub issue_timeout: Duration,
    /// How many requests to the authority may be under way.
    pub concurrency: usize,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self { fetch_timeout: Duration::from_secs(5), issue_timeout: Duration::from_secs(10), concurrency: 8 }
    }
}

/// How urgent a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A connection waits for it.
    RealTime,
    /// A workload of this node will need it.
    Warmup,
    /// Renewal of one that is still valid.
    Background,
}

/// The cache; clones share it. The rotating task ends when the last clone and the last handle are gone.
#[derive(Clone)]
pub struct SvidCache {
    shared: Arc<Shared>,
}

struct Shared {
    source: Arc<dyn IdentitySource>,
    entries: RwLock<HashMap<SpiffeId, Arc<Entry>>>,
    orders: mpsc::UnboundedSender<Order>,
    tls: TlsContext,
    fetch_timeout: Duration,
}

/// One identity. Written by the rotating task, read by everyone.
pub(crate) struct Entry {
    id: SpiffeId,
    current: ArcSwapOption<Svid>,
    /// Why the newest attempt failed; `None` after a success and before the first end.
    failure: Mutex<Option<IdentityError>>,
    /// Set by `forget`: requests that raced with it must not bring the entry back.
    forgotten: AtomicBool,
}

impl Entry {
    fn load(&self, tls: &TlsContext) -> Option<Arc<Svid>> {
        // An expired certificate would be refused by every peer: having none is the clearer failure.
        self.current.load_full().filter(|svid| svid.is_valid_at(tls.clock().now()))
    }
}

impl SvidCache {
    /// Starts a cache over `source`; its task runs on `control`.
    pub fn start(source: Arc<dyn IdentitySource>, tls: TlsContext, settings: &CacheSettings, control: &Handle) -> Self {
        let (orders, inbox) = mpsc::unbounded_channel();
        control.spawn(Rotation::new(Arc::clone(&source), tls.clone(), settings).run(inbox));
        let shared = Shared { source, entries: RwLock::default(), orders, tls, fetch_timeout: settings.fetch_timeout };
        Self { shared: Arc::new(shared) }
    }

    /// What all certificates here share; has the trust bundles.
    pub fn tls(&self) -> &TlsContext {
        &self.shared.tls
    }

    /// The valid certificate of `id`, if there is one now. Never waits.
    pub fn find(&self, id: &SpiffeId) -> Option<Arc<Svid>> {
        let entry = self.shared.entries.read().get(id).map(Arc::clone)?;
        entry.load(&self.shared.tls)
    }

    /// A handle for a workload of this node to keep; asks for the certificate in the background.
    pub fn handle(&self, id: &SpiffeId) -> SvidHandle {
        let entry = self.entry(id);
        self.want(&entry, Priority::Warmup, None);
        SvidHandle { cache: self.clone(), entry }
    }

    /// The certificate of `id`, waiting for the authority if need be (at most `fetch_timeout`). Everyone who waits for one
    /// identity waits for one request. While a failed identity rests before its next attempt, the last failure is returned
    /// at once.
    pub async fn fetch(&self, id: &SpiffeId) -> Result<Arc<Svid>, IdentityError> {
        self.fetch_entry(&self.entry(id)).await
    }

    /// Asks for the certificate of `id` without waiting, before any connection needs it.
    pub fn prefetch(&self, id: &SpiffeId) {
        self.want(&self.entry(id), Priority::Warmup, None);
    }

    /// Tells the authority of a workload of this node, called `key`, that has the identity `id`: [`IdentitySource::introduce`].
    pub fn introduce(&self, id: &SpiffeId, key: &Arc<str>, facts: &Facts) {
        self.shared.source.introduce(id, key, facts);
    }

    /// Tells it that the workload has left: [`IdentitySource::dismiss`].
    pub fn dismiss(&self, id: &SpiffeId, key: &str) {
        self.shared.source.dismiss(id, key);
    }

    /// Drops `id`, when its last workload has left the node: no more renewals, and handles to it go empty. Connections keep
    /// the certificate they have. Counting the workloads is the caller's business.
    pub fn forget(&self, id: &SpiffeId) {
        if let Some(entry) = self.shared.entries.write().remove(id) {
            entry.forgotten.store(true, Ordering::Release);
            entry.current.store(None);
            self.order(Order::Forget(entry));
        }
    }

    /// Registers `culvert_certificate_expiry_timestamp_seconds{identity}`, read at each scrape: when the certificate of each identity
    /// ends, in seconds since 1970; 0 while there is none. And `culvert_tls_handshake_seconds{direction}`: how long handshakes
    /// with these certificates take.
    ///
    /// # Errors
    /// A name is taken.
    pub fn expose(&self, registry: &Registry) -> Result<(), MetricError> {
        const NAME: &str = "culvert_certificate_expiry_timestamp_seconds";
        self.shared.tls.handshakes().expose(registry)?;
        // The registry must not keep the cache alive.
        let cache = Arc::downgrade(&self.shared);
        registry.on_scrape(&[NAME], move |out| {
            let Some(shared) = cache.upgrade() else { return };
            let entries: Vec<_> = shared.entries.read().values().cloned().collect();
            let mut samples =
                out.family(NAME, "When the certificate of an identity ends, seconds since 1970; 0: there is none", "gauge");
            for entry in entries {
                let ends = entry.current.load().as_ref().map(|svid| svid.not_after);
                let ends = ends.and_then(|ends| ends.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default();
                samples.put(&[("identity", entry.id.as_str())], ends.as_secs());
            }
        })
    }

    async fn fetch_entry(&self, entry: &Arc<Entry>) -> Result<Arc<Svid>, IdentityError> {
        if let Some(svid) = entry.load(&self.shared.tls) {
            return Ok(svid);
        }
        let (reply, answer) = oneshot::channel();
        self.want(entry, Priority::RealTime, Some(reply));
        match tokio::time::timeout(self.shared.fetch_timeout, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(IdentityError::Unavailable("the process is shutting down".into())),
            Err(_) => Err(IdentityError::Timeout { id: entry.id.to_string(), after: self.shared.fetch_timeout }),
        }
    }

    fn entry(&self, id: &SpiffeId) -> Arc<Entry> {
        if let Some(entry) = self.shared.entries.read().get(id) {
            return Arc::clone(entry);
        }
        let mut entries = self.shared.entries.write();
        let entry = entries.entry(id.clone()).or_insert_with(|| {
            Arc::new(Entry {
                id: id.clone(),
                current: ArcSwapOption::empty(),
                failure: Mutex::new(None),
                forgotten: AtomicBool::new(false),
            })
        });
        Arc::clone(entry)
    }

    fn want(&self, entry: &Arc<Entry>, priority: Priority, reply: Option<rotate::Reply>) {
        self.order(Order::Want { entry: Arc::clone(entry), priority, reply });
    }

    fn order(&self, order: Order) {
        // The task is gone only when the control runtime is: whoever waits sees its reply channel close.
        let _ = self.shared.orders.send(order);
    }
}

impl fmt::Debug for SvidCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvidCache").field("identities", &self.shared.entries.read().len()).finish_non_exhaustive()
    }
}

/// One identity of one workload, kept beside its listeners: loading is one atomic read and one look at the clock.
#[derive(Clone)]
pub struct SvidHandle {
    cache: SvidCache,
    entry: Arc<Entry>,
}

impl SvidHandle {
    /// Whose certificate this is.
    pub fn id(&self) -> &SpiffeId {
        &self.entry.id
    }

    /// The valid certificate, if there is one now. Never waits.
    pub fn load(&self) -> Option<Arc<Svid>> {
        self.entry.load(&self.cache.shared.tls)
    }

    /// The cache it is of.
    pub fn cache(&self) -> &SvidCache {
        &self.cache
    }

    /// As [`SvidCache::fetch`]. Fails at once after [`SvidCache::forget`]: a workload that left gets no new certificate.
    pub async fn fetch(&self) -> Result<Arc<Svid>, IdentityError> {
        self.cache.fetch_entry(&self.entry).await
    }
}

impl fmt::Debug for SvidHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SvidHandle").field(&self.entry.id).finish()
    }
}

#[cfg(test)]
mod tests;
