//! Other trust domains by SPIFFE federation (SPIFFE Federation §5): each tells its roots at a URL, its bundle endpoint.
//!
//! What was fetched travels with the trust bundles ([`over`]), so that whatever follows a change of roots follows theirs too. A bundle
//! counts for its own domain and nothing else. Refuses: a domain that is ours, a document that cannot be read in whole, an endpoint
//! that does not prove who it is. What was last good stays, over restarts too where there is a folder for it.
//! Upstream: the operator, a source, other domains' endpoints. Downstream: whoever asks the source for its bundles.

mod document;
mod endpoint;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::TrustDomain;
use mesh_runtime::control_plane::Roots;
use mesh_runtime::metrics::{MetricError, Registry};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::bundle::TrustBundles;
use crate::crypto::TlsSettings;
use crate::error::IdentityError;
use crate::source::{IdentitySource, WithBundles};
use document::Document;
use endpoint::Endpoint;

/// How soon a bundle is fetched again whose document does not say it (SPIFFE Trust Domain and Bundle §4.1.2 leaves it to us).
const USUALLY: Duration = Duration::from_mins(5);
/// However seldom a document wants to be fetched.
const SELDOM: Duration = Duration::from_hours(24);
/// After a failure it is tried again after this time, then after twice that, and so on up to that.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));

/// A trust domain and its endpoint: `far.example=https://far.example/bundle` is believed to be it by the web's authorities
/// (`https_web`), `far.example=https://far.example:8443/=spiffe://far.example/spire/server` by a certificate with that id
/// (`https_spiffe`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Federated {
    domain: TrustDomain,
    endpoint: Endpoint,
}

impl FromStr for Federated {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (domain, rest) = text.split_once('=').ok_or_else(|| format!("{text:?} is not DOMAIN=URL"))?;
        let domain = TrustDomain::parse(domain).map_err(|error| format!("{text:?}: {error}"))?;
        let (url, id) = match rest.rfind("=spiffe://") {
            Some(at) => (rest.get(..at).unwrap_or_default(), rest.get(at + 1..)),
            None => (rest, None),
        };
        Ok(Self { domain, endpoint: Endpoint::parse(url, id).map_err(|why| format!("{text:?}: {why}"))? })
    }
}

/// Which other domains are believed, and how their endpoints are.
#[derive(Clone, Debug)]
pub struct Federation {
    /// The domains.
    pub domains: Vec<Federated>,
    /// Whom to believe that it is an endpoint that proves itself as the web does.
    pub roots: Roots,
    /// Where what was fetched last is kept.
    pub keep: Option<PathBuf>,
    /// How endpoints are spoken to.
    pub tls: TlsSettings,
}

/// Roots by domain, of those of which something is known.
type Told = BTreeMap<TrustDomain, Document>;

/// How it stands with a domain.
#[derive(Clone, Debug, Default)]
struct Standing {
    is_up: bool,
    fetched: Option<SystemTime>,
}

/// `source`, with the bundles of other domains among its own. Reads what was kept before it returns, and fetches on `control`.
///
/// # Errors
/// A domain is our own or named twice, or the crypto settings make no sense.
pub fn over(
    source: Arc<dyn IdentitySource>,
    federation: Federation,
    control: &Handle,
    registry: &Registry,
) -> Result<Arc<dyn IdentitySource>, IdentityError> {
    let base = source.bundle();
    let crypto = federation.tls.crypto()?;
    let (mut told, mut standing) = (Told::new(), BTreeMap::new());
    for Federated { domain, .. } in &federation.domains {
        let bundles = base.borrow();
        if domain == bundles.ours() || bundles.aliases().any(|alias| alias == domain) {
            return Err(IdentityError::Crypto(format!("federation: {domain} is our own trust domain")));
        }
        if standing.insert(domain.clone(), Standing::default()).is_some() {
            return Err(IdentityError::Crypto(format!("federation: {domain} is named twice")));
        }
        if let Some(kept) = federation.keep.as_deref().and_then(|folder| kept(folder, domain)) {
            told.insert(domain.clone(), kept);
        }
    }
    let standing = Arc::new(Mutex::new(standing));
    expose(registry, &standing).map_err(|error| IdentityError::Crypto(error.to_string()))?;
    let first = merged(&base.borrow(), &told);
    let (told, sender) = (Arc::new(watch::Sender::new(told)), watch::Sender::new(first));
    let bundles = sender.subscribe();
    let news = told.subscribe();
    for Federated { domain, endpoint } in federation.domains {
        let follow = Follow {
            kept: Mutex::new(told.borrow().get(&domain).cloned()),
            domain,
            endpoint,
            roots: federation.roots.clone(),
            keep: federation.keep.clone(),
            crypto: Arc::clone(&crypto),
            bundles: bundles.clone(),
            told: Arc::clone(&told),
            standing: Arc::clone(&standing),
        };
        control.spawn(follow.run());
    }
    control.spawn(merge(base, news, sender));
    Ok(Arc::new(WithBundles { source, bundles }))
}

/// The source's bundles with what other domains told. A domain that both tell is believed by what it told itself.
fn merged(base: &TrustBundles, told: &Told) -> Arc<TrustBundles> {
    let mut all = base.clone();
    for (domain, document) in told {
        // A source may tell its aliases later than its first bundle.
        if domain == base.ours() || base.aliases().any(|alias| alias == domain) {
            tracing::error!(trust_domain = %domain, "its roots count for nothing: it is a name of our own trust domain");
            continue;
        }
        match all.clone().with_domain(domain.clone(), document.roots.clone()) {
            Ok(with) => all = with,
            Err(error) => tracing::error!(trust_domain = %domain, %error, "its roots cannot be used"),
        }
    }
    Arc::new(all)
}

/// Until nobody asks any more, or the source is gone.
async fn merge(
    mut base: watch::Receiver<Arc<TrustBundles>>,
    mut told: watch::Receiver<Told>,
    sender: watch::Sender<Arc<TrustBundles>>,
) {
    loop {
        tokio::select! {
            () = sender.closed() => return,
            changed = base.changed() => if changed.is_err() { return },
            changed = told.changed() => if changed.is_err() { return },
        }
        let now = merged(&base.borrow_and_update(), &told.borrow_and_update());
        sender.send_replace(now);
    }
}

fn expose(registry: &Registry, standing: &Arc<Mutex<BTreeMap<TrustDomain, Standing>>>) -> Result<(), MetricError> {
    const UP: &str = "culvert_federation_up";
    const FETCHED: &str = "culvert_federation_fetched_timestamp_seconds";
    let standing = Arc::clone(standing);
    registry.on_scrape(&[UP, FETCHED], move |out| {
        let all = standing.lock().clone();
        let mut up = out.family(UP, "Whether the bundle of a federated trust domain was fetched at the last attempt", "gauge");
        for (domain, standing) in &all {
            up.put(&[("trust_domain", domain.as_str())], u64::from(standing.is_up));
        }
        let mut fetched = out.family(FETCHED, "When it was fetched last, seconds since 1970; 0: never by this process", "gauge");
        for (domain, standing) in &all {
            let since = standing.fetched.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default();
            fetched.put(&[("trust_domain", domain.as_str())], since.as_secs());
        }
    })
}

/// One domain.
struct Follow {
    domain: TrustDomain,
    endpoint: Endpoint,
    roots: Roots,
    keep: Option<PathBuf>,
    crypto: Arc<rustls::crypto::CryptoProvider>,
    bundles: watch::Receiver<Arc<TrustBundles>>,
    told: Arc<watch::Sender<Told>>,
    /// What is in the folder.
    kept: Mutex<Option<Document>>,
    standing: Arc<Mutex<BTreeMap<TrustDomain, Standing>>>,
}

impl Follow {
    async fn run(self) {
        let (mut failing, mut failures): (Option<String>, u32) = (None, 0);
        loop {
            let rest = match self.fetch().await {
                Ok(document) => {
                    (failing, failures) = (None, 0);
                    let rest = document.refresh.unwrap_or(USUALLY).clamp(RETRY.0, SELDOM);
                    self.take(document).await;
                    rest
                }
                Err(why) => {
                    self.stand(|standing| standing.is_up = false);
                    if failing.as_ref() != Some(&why) {
                        let has = self.told.borrow().contains_key(&self.domain);
                        let meanwhile = if has { "the one before stays" } else { "nobody of it is believed" };
                        tracing::warn!(trust_domain = %self.domain, why, meanwhile, "the bundle of a federated trust domain cannot be had");
                        failing = Some(why);
                    }
                    failures = failures.saturating_add(1);
                    RETRY.0.saturating_mul(1 << (failures - 1).min(10)).min(RETRY.1)
                }
            };
            tokio::select! {
                () = self.told.closed() => return,
                () = tokio::time::sleep(rest.mul_f64(rand::random_range(0.9..=1.0))) => {}
            }
        }
    }

    async fn fetch(&self) -> Result<Document, String> {
        let text = self.endpoint.fetch(&self.crypto, &self.roots, &self.bundles).await?;
        usable(&self.domain, &text)
    }

    async fn take(&self, document: Document) {
        self.stand(|standing| *standing = Standing { is_up: true, fetched: Some(SystemTime::now()) });
        let is_new = self.told.borrow().get(&self.domain).is_none_or(|had| had.roots != document.roots);
        let (count, sequence) = (document.roots.len(), document.sequence);
        if let Some(folder) = &self.keep
            && self.kept.lock().as_ref() != Some(&document)
        {
            let (folder, domain, text) = (folder.clone(), self.domain.clone(), document.text.clone());
            match tokio::task::spawn_blocking(move || keep(&folder, &domain, &text)).await {
                Ok(Ok(())) => *self.kept.lock() = Some(document.clone()),
                Ok(Err(error)) => {
                    tracing::warn!(trust_domain = %self.domain, %error, "the bundle cannot be kept for the next start, trying again with the next");
                }
                Err(_) => {}
            }
        }
        self.told.send_if_modified(|told| told.insert(self.domain.clone(), document).is_none() || is_new);
        if is_new {
            tracing::info!(trust_domain = %self.domain, roots = count, sequence, "trust bundle of a federated domain changed");
        }
    }

    fn stand(&self, change: impl FnOnce(&mut Standing)) {
        if let Some(standing) = self.standing.lock().get_mut(&self.domain) {
            change(standing);
        }
    }
}

/// Reads a bundle. One of which nothing can be verified by is none.
fn usable(domain: &TrustDomain, text: &str) -> Result<Document, String> {
    let document = Document::read(text)?;
    let nobody = TrustBundles::new(domain.clone(), Vec::new()).map_err(|error| error.to_string())?;
    nobody.with_domain(domain.clone(), document.roots.clone()).map_err(|error| error.to_string())?;
    Ok(document)
}

fn place(folder: &Path, domain: &TrustDomain) -> PathBuf {
    folder.join(format!("{domain}.json"))
}

/// What an agent before this one fetched last.
fn kept(folder: &Path, domain: &TrustDomain) -> Option<Document> {
    let path = place(folder, domain);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the bundle that was kept cannot be read");
            return None;
        }
    };
    let read = usable(domain, &text);
    if let Err(why) = &read {
        tracing::warn!(path = %path.display(), why, "the bundle that was kept cannot be read");
    }
    read.ok()
}

fn keep(folder: &Path, domain: &TrustDomain, text: &str) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let path = place(folder, domain);
    let aside = path.with_extension(format!("{:016x}.tmp", rand::random::<u64>()));
    let written = (|| {
        let mut file = File::create(&aside)?;
        file.write_all(text.as_bytes())?;
        // A name that survives a loss of power before its content does would be an empty bundle.
        file.sync_all()?;
        std::fs::rename(&aside, path)?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    written
}

#[cfg(test)]
mod tests;
