//! One certificate in mounted files, as cert-manager and whoever else fills Secrets of the type `kubernetes.io/tls` keeps them.
//!
//! Owns the last good content of three files (`tls.crt`, `tls.key`, `ca.crt`), which are looked at every second: Kubernetes swaps
//! links where it renews them, so their folder tells nothing. Refuses content that cannot be used, says why, and stays with what it
//! had: a key that is not the certificate's, one that is out of date, another identity than was asked for.
//! Upstream: the operator. Downstream: [`crate::cache`], through [`IdentitySource`]; live connections stay, new ones prove the new one.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use mesh_model::SpiffeId;
use parking_lot::Mutex;
use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use crate::bundle::TrustBundles;
use crate::clock::Clock;
use crate::crypto::TlsSettings;
use crate::error::IdentityError;
use crate::look::{Stamp, looks, stamp};
use crate::source::{BoxFuture, IdentitySource, IssuedSvid, SourceSettings};
use crate::verify::leaf_of;

const CHAIN: &str = "tls.crt";
const KEY: &str = "tls.key";
const ROOTS: &str = "ca.crt";
/// Larger files are not certificates.
const MOST_BYTES: u64 = 1 << 20;

/// A folder with a certificate.
pub struct Mounted {
    shared: Arc<Shared>,
    renewals: Mutex<Option<mpsc::UnboundedReceiver<SpiffeId>>>,
}

struct Shared {
    directory: PathBuf,
    settings: SourceSettings,
    crypto: Arc<CryptoProvider>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    bundles: watch::Sender<Arc<TrustBundles>>,
    renewed: mpsc::UnboundedSender<SpiffeId>,
}

/// What the files say.
struct State {
    /// The last good content, or why there never was any.
    good: Result<Arc<Kept>, String>,
    /// Who was asked for.
    wanted: Option<SpiffeId>,
    stamps: [Stamp; 3],
}

struct Kept {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl Mounted {
    /// Reads the files in `directory` once before it returns, and follows them on `control`.
    ///
    /// # Errors
    /// There is no crypto library. What is wrong with the files is told to whoever asks for the certificate: they may be still to come.
    pub fn start(
        directory: PathBuf,
        settings: SourceSettings,
        clock: Arc<dyn Clock>,
        control: &Handle,
    ) -> Result<Self, IdentityError> {
        let nobody = TrustBundles::new(settings.trust_domain.clone(), Vec::new())?;
        let (renewed, renewals) = mpsc::unbounded_channel();
        let state = State { good: Err("it was not read".into()), wanted: None, stamps: [None; 3] };
        let shared = Arc::new(Shared {
            directory,
            settings,
            crypto: TlsSettings::default().crypto()?,
            clock,
            state: Mutex::new(state),
            bundles: watch::Sender::new(Arc::new(nobody)),
            renewed,
        });
        shared.look(true);
        control.spawn(follow(Arc::downgrade(&shared)));
        Ok(Self { shared, renewals: Mutex::new(Some(renewals)) })
    }
}

async fn follow(shared: Weak<Shared>) {
    let mut tick = looks();
    loop {
        tick.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = tokio::task::spawn_blocking(move || shared.look(false)).await {
            tracing::error!(%error, "mounted certificates are not looked at");
        }
    }
}

impl Shared {
    /// Reads the files where they changed since the last look, or were never looked at.
    fn look(&self, first: bool) {
        let stamps = [CHAIN, KEY, ROOTS].map(|name| stamp(&self.directory.join(name)));
        let (changed, wanted) = {
            let mut state = self.state.lock();
            (std::mem::replace(&mut state.stamps, stamps) != stamps || first, state.wanted.clone())
        };
        if !changed {
            return;
        }
        match self.read(wanted.as_ref()).and_then(|kept| Ok((self.believed(&kept)?, kept))) {
            Ok((bundles, kept)) => {
                let valid_for = kept.not_after.duration_since(self.clock.now()).unwrap_or_default();
                tracing::info!(directory = %self.directory.display(), id = %kept.id, ?valid_for, "certificate read");
                let id = kept.id.clone();
                self.state.lock().good = Ok(Arc::new(kept));
                self.bundles.send_if_modified(|current| {
                    let changed = !current.has_roots_of(&bundles);
                    *current = bundles;
                    changed
                });
                // Nobody listens only when the process ends.
                let _ = self.renewed.send(id);
            }
            Err(why) => {
                let mut state = self.state.lock();
                let kept = state.good.is_ok();
                tracing::error!(directory = %self.directory.display(), why, kept, "the mounted certificate cannot be used");
                if !kept {
                    state.good = Err(why);
                }
            }
        }
    }

    /// What the files say, if it can be used.
    fn read(&self, wanted: Option<&SpiffeId>) -> Result<Kept, String> {
        let file = |name: &str| content(&self.directory.join(name)).map_err(|why| format!("{name}: {why}"));
        let chain = certificates(&file(CHAIN)?).map_err(|why| format!("{CHAIN}: {why}"))?;
        let roots = certificates(&file(ROOTS)?).map_err(|why| format!("{ROOTS}: {why}"))?;
        let key = PrivateKeyDer::from_pem_slice(&file(KEY)?).map_err(|error| format!("{KEY}: {error}"))?;
        let leaf = leaf_of(chain.first().ok_or("no certificate")?).map_err(|error| format!("{CHAIN}: {error}"))?;
        if let Some(wanted) = wanted.filter(|wanted| **wanted != leaf.id) {
            return Err(format!("{CHAIN}: it is for {}, not for {wanted}", leaf.id));
        }
        let now = self.clock.now();
        if leaf.not_after <= now {
            return Err(format!("{CHAIN}: it has expired"));
        }
        if leaf.not_before > now {
            return Err(format!("{CHAIN}: it is not valid yet"));
        }
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &self.crypto)
            .map_err(|error| format!("{KEY}: it is not the key of {CHAIN}: {error}"))?;
        Ok(Kept { id: leaf.id, chain, key, roots, not_after: leaf.not_after })
    }

    fn believed(&self, kept: &Kept) -> Result<Arc<TrustBundles>, String> {
        let SourceSettings { trust_domain, trust_domain_aliases, .. } = &self.settings;
        let mut bundles =
            TrustBundles::new(trust_domain.clone(), kept.roots.clone()).map_err(|error| format!("{ROOTS}: {error}"))?;
        for alias in trust_domain_aliases {
            bundles = bundles.with_alias(alias.clone());
        }
        Ok(Arc::new(bundles))
    }

    fn issue(&self, id: &SpiffeId) -> Result<IssuedSvid, IdentityError> {
        let mut state = self.state.lock();
        state.wanted = Some(id.clone());
        let unusable = |why: String| IdentityError::Unusable { id: id.to_string(), why };
        match &state.good {
            Ok(kept) if kept.id != *id => Err(unusable(format!("{} has one for {}", self.directory.display(), kept.id))),
            Ok(kept) if kept.not_after <= self.clock.now() => {
                Err(unusable(format!("the one in {} has expired and was not renewed", self.directory.display())))
            }
            Ok(kept) => Ok(IssuedSvid { chain: kept.chain.clone(), key: kept.key.clone_key() }),
            Err(why) => Err(unusable(format!("{}: {why}", self.directory.display()))),
        }
    }
}

fn content(path: &Path) -> Result<Vec<u8>, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MOST_BYTES {
        return Err(format!("{length} bytes are no certificate"));
    }
    fs::read(path).map_err(|error| error.to_string())
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    if all.is_empty() { Err("no certificate in it".into()) } else { Ok(all) }
}

impl fmt::Debug for Mounted {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mounted").field("directory", &self.shared.directory).finish_non_exhaustive()
    }
}

impl IdentitySource for Mounted {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>> {
        Box::pin(std::future::ready(self.shared.issue(id)))
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.shared.bundles.subscribe()
    }

    fn renewals(&self) -> Option<mpsc::UnboundedReceiver<SpiffeId>> {
        self.renewals.lock().take()
    }
}

#[cfg(test)]
mod tests;
