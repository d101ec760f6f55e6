//! Where keys come from: written in the policy, or fetched, kept and renewed.
//!
//! One [`Slot`] per source, shared by all threads; a request only reads it. Fetches run apart, one at a time per source:
//! every so often (Istio's 20 minutes), sooner after a failure, and when a token names a key that is not there,
//! at most once in [`GAP`], so that nobody can make us a nuisance to an issuer. What was fetched stays in use while fetching
//! fails. Upstream: `phase::authenticate`, the control task. Downstream: `upstream::fetch`.
use crate::upstream::Fetcher;
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use mesh_model::l7::request_auth::KeySource;
use mesh_tokens::KeySet;
use parking_lot::Mutex;
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};

/// Shortest time between two fetches of one source.
const GAP: Duration = Duration::from_secs(5);
/// The same while there are no keys yet: an issuer may start after us.
const FIRST_GAP: Duration = Duration::from_secs(1);
/// Longest time between two tries while they fail.
const LONGEST_RETRY: Duration = Duration::from_mins(1);
/// Largest document that is read.
const LARGEST: usize = 256 << 10;

/// All sources of this process.
#[derive(Debug)]
pub struct Sources {
    slots: ArcSwap<HashMap<KeySource, Arc<Slot>, foldhash::fast::RandomState>>,
    writing: Mutex<()>,
    fetcher: Arc<Fetcher>,
    /// Time between two fetches of the same keys.
    refresh: Duration,
    /// Where they are kept.
    control: Handle,
}
/// The keys of one source.
#[derive(Debug)]
pub struct Slot {
    source: KeySource,
    keys: ArcSwapOption<KeySet>,
    /// Told when a fetch ended: what went wrong with it.
    ended: watch::Sender<Option<Arc<str>>>,
    wanted: Notify,
    pace: Mutex<Pace>,
    task: Mutex<Option<AbortHandle>>,
}
#[derive(Clone, Copy, Debug)]
enum Pace {
    Fetching,
    Rests { since: Instant },
}

impl Sources {
    /// None yet. `refresh`: time between two fetches of the same keys; `control`: where they are kept.
    pub fn new(fetcher: Arc<Fetcher>, refresh: Duration, control: Handle) -> Self {
        Self { slots: ArcSwap::default(), writing: Mutex::default(), fetcher, refresh, control }
    }
    /// The keys of a source. One that is new is read, or begun to be fetched, now.
    pub(crate) fn slot(&self, source: &KeySource) -> Arc<Slot> {
        if let Some(slot) = self.slots.load().get(source) {
            return Arc::clone(slot);
        }
        let _writing = self.writing.lock();
        let mut next = HashMap::clone(&self.slots.load());
        let slot = Arc::clone(next.entry(source.clone()).or_insert_with(|| self.begin(source)));
        self.slots.store(Arc::new(next));
        slot
    }
    fn begin(&self, source: &KeySource) -> Arc<Slot> {
        let slot = Arc::new(Slot {
            source: source.clone(),
            keys: ArcSwapOption::empty(),
            ended: watch::Sender::default(),
            wanted: Notify::new(),
            pace: Mutex::new(Pace::Fetching),
            task: Mutex::default(),
        });
        if let KeySource::Inline(text) = source {
            let error = slot.take(text.text().as_bytes()).err();
            slot.end(error);
        } else {
            let keeping = keep(Arc::clone(&slot), Arc::clone(&self.fetcher), self.refresh);
            *slot.task.lock() = Some(self.control.spawn(keeping).abort_handle());
        }
        slot
    }
    /// Begins what is `needed` here and forgets what nobody mentions any more. On the control thread, after a publish.
    pub fn collect<'a>(&self, needed: impl Iterator<Item = &'a KeySource>, mentioned: &HashSet<&KeySource>) {
        needed.for_each(|source| drop(self.slot(source)));
        let _writing = self.writing.lock();
        let mut kept = HashMap::default();
        for (source, slot) in self.slots.load().iter() {
            match mentioned.get(source) {
                // Under the very source this version names: requests find it without comparing texts.
                Some(source) => drop(kept.insert(KeySource::clone(source), Arc::clone(slot))),
                None => slot.task.lock().take().into_iter().for_each(|task| task.abort()),
            }
        }
        self.slots.store(Arc::new(kept));
    }
    /// For the admin page: source, number of keys, what went wrong with the last fetch.
    pub fn view(&self) -> Vec<(String, usize, Option<Arc<str>>)> {
        let slots = self.slots.load();
        let all = slots.values().map(|s| (name(&s.source), s.keys.load().as_ref().map_or(0, |k| k.len()), s.error()));
        let mut all: Vec<_> = all.collect();
        all.sort();
        all
    }
}
/// A source, for logs.
fn name(source: &KeySource) -> String {
    match source {
        KeySource::Inline(_) => "inline".to_owned(),
        KeySource::Remote { uri, .. } => uri.to_string(),
        KeySource::Discovered { issuer, .. } => format!("metadata of {issuer}"),
    }
}

impl Slot {
    /// The keys in use; none before the first fetch succeeded.
    pub(crate) fn keys(&self) -> Option<Arc<KeySet>> {
        self.keys.load_full()
    }
    /// Whether these are the keys in use. Costs no reference count.
    pub(crate) fn is_current(&self, keys: &Arc<KeySet>) -> bool {
        self.keys.load().as_ref().is_some_and(|current| Arc::ptr_eq(current, keys))
    }
    fn error(&self) -> Option<Arc<str>> {
        self.ended.borrow().clone()
    }
    fn gap(&self) -> Duration {
        if self.keys.load().is_some() { GAP } else { FIRST_GAP }
    }
    /// Waits for a fetch: the one under way, or one asked for now. Where there are keys and the last fetch was a moment ago,
    /// nothing is waited for. Whether one ended.
    pub(crate) async fn renewed(&self) -> bool {
        let limit = match &self.source {
            KeySource::Inline(_) => return false,
            KeySource::Remote { timeout, .. } => *timeout,
            KeySource::Discovered { timeout, .. } => *timeout * 2,
        };
        let mut ended = {
            let pace = self.pace.lock();
            if let Pace::Rests { since } = *pace {
                if self.keys.load().is_some() && since.elapsed() < GAP {
                    return false;
                }
                self.wanted.notify_one();
            }
            self.ended.subscribe()
        };
        timeout(limit, ended.changed()).await.is_ok_and(|changed| changed.is_ok())
    }
    fn take(&self, text: &[u8]) -> Result<(), String> {
        self.keys.store(Some(Arc::new(KeySet::parse(text)?)));
        Ok(())
    }
    fn end(&self, error: Option<String>) {
        *self.pace.lock() = Pace::Rests { since: Instant::now() };
        if let Some(error) = &error {
            let kept = self.keys.load().is_some();
            tracing::warn!(source = name(&self.source), %error, kept, "the keys of an issuer cannot be read");
        }
        self.ended.send_replace(error.map(Into::into));
    }
}

/// Fetches again and again, until it is aborted.
async fn keep(slot: Arc<Slot>, fetcher: Arc<Fetcher>, refresh: Duration) {
    let mut text: Option<Bytes> = None;
    let mut failures = 0u32;
    loop {
        let outcome = match document(&slot.source, &fetcher).await {
            // Keys that did not change stay the very ones: what they verified stays verified.
            Ok(same) if text.as_ref() == Some(&same) => Ok(()),
            Ok(new) => slot.take(&new).map(|()| text = Some(new)),
            Err(error) => Err(error),
        };
        failures = if outcome.is_ok() { 0 } else { failures.saturating_add(1) };
        slot.end(outcome.err());
        let now = Instant::now();
        let pause =
            if failures == 0 { refresh } else { GAP.saturating_mul(1 << failures.min(8)).min(LONGEST_RETRY).min(refresh) };
        tokio::select! {
            () = sleep_until(now + pause) => {}
            () = slot.wanted.notified() => sleep_until(now + slot.gap()).await,
        }
        *slot.pace.lock() = Pace::Fetching;
    }
}

#[derive(Deserialize)]
struct Metadata {
    jwks_uri: String,
}
/// Where an issuer's metadata is (OpenID Connect Discovery §4).
const METADATA: &str = "/.well-known/openid-configuration";

fn is_secure(uri: &str) -> bool {
    uri.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"))
}

/// The JWKS of a source.
async fn document(source: &KeySource, fetcher: &Arc<Fetcher>) -> Result<Bytes, String> {
    match source {
        KeySource::Inline(text) => Ok(Bytes::copy_from_slice(text.text().as_bytes())),
        KeySource::Remote { uri, timeout } => fetcher.get(uri, *timeout, LARGEST).await,
        KeySource::Discovered { issuer, timeout } => {
            let metadata = format!("{}{METADATA}", issuer.trim_end_matches('/'));
            let metadata = fetcher.get(&metadata, *timeout, LARGEST).await?;
            let Metadata { jwks_uri } = serde_json::from_slice(&metadata).map_err(|e| format!("the issuer's metadata: {e}"))?;
            if is_secure(issuer) && !is_secure(&jwks_uri) {
                return Err(format!("the issuer's metadata names keys without TLS: {jwks_uri:?}"));
            }
            fetcher.get(&jwks_uri, *timeout, LARGEST).await
        }
    }
}
