//! SPIRE as a source: certificates that its agent hands out and renews by itself, over a Unix socket of this node.
//!
//! Two ways to ask, one state. As a *delegate* ([`Api::Delegated`]) the node agent subscribes to the certificate of each
//! workload by what SPIRE's Kubernetes attestor would find (`k8s:ns`, `k8s:sa`); by the *Workload API* ([`Api::Workload`]) a
//! process gets its own. What comes is kept as it comes, so that [`crate::cache`] is answered from here at once and told of
//! every renewal. Believed are the roots of the same streams, each for its own trust domain.
//! A stream that ends is opened again; what was last good serves until it expires. Refuses: a certificate with another identity
//! than asked for. Upstream: SPIRE's agent, through [`mesh_runtime::control_plane`].

mod stream;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::{SpiffeId, TrustDomain};
use mesh_proto::spiffe::delegated::{
    Selector, SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509sviDsRequest,
    SubscribeToX509sviDsResponse,
};
use mesh_proto::spiffe::workload::{X509svidRequest, X509svidResponse};
use mesh_runtime::control_plane::{ControlError, ControlPlane, Roots, Settings, Token};
use parking_lot::Mutex;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::TrustBundles;
use crate::clock::Clock;
use crate::crypto::TlsSettings;
use crate::error::IdentityError;
use crate::source::{BoxFuture, IdentitySource, IssuedSvid, SourceSettings};
use crate::verify::leaf_of;
use stream::{Agent, Listener};

const SVIDS: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs";
const BUNDLES: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles";
const WORKLOAD: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// Whom we speak for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// For the pods of this node, by their namespaces and service accounts. On the agent's admin socket.
    Delegated,
    /// For ourselves. On the agent's public socket.
    Workload,
}

/// The way to an agent's socket: `unix:/path` or `unix:///path` (SPIFFE Workload Endpoint §4).
pub fn reach(socket: &str, tls: &TlsSettings) -> Result<ControlPlane, ControlError> {
    if !socket.starts_with("unix:") {
        return Err(ControlError::Setting(format!("{socket:?}: SPIRE's agent is reached over a socket, unix:///path")));
    }
    let crypto = tls.crypto().map_err(|e| ControlError::Setting(e.to_string()))?;
    let settings = Settings {
        address: socket.to_owned(),
        roots: Roots::System,
        alt_hostname: None,
        token: Token::None,
        // SPIFFE Workload Endpoint §6: proof that the call is meant, and no browser's.
        headers: vec![("workload.spiffe.io".to_owned(), "true".to_owned())],
    };
    ControlPlane::new(settings, crypto)
}

/// SPIRE's agent.
pub struct Spire {
    api: Api,
    shared: Arc<Shared>,
    agent: Agent,
    control: Handle,
    renewals: Mutex<Option<mpsc::UnboundedReceiver<SpiffeId>>>,
    _roots: Listener,
}

struct Shared {
    settings: SourceSettings,
    clock: Arc<dyn Clock>,
    /// What was said last, by identity.
    known: Mutex<HashMap<SpiffeId, Known>>,
    bundles: watch::Sender<Arc<TrustBundles>>,
    renewed: mpsc::UnboundedSender<SpiffeId>,
}

/// One identity; its own stream, where it has one, ends with it.
#[derive(Default)]
struct Known {
    said: watch::Sender<Said>,
    _listener: Option<Listener>,
}

#[derive(Clone, Default)]
enum Said {
    #[default]
    Nothing,
    /// Why there is none.
    Failed(IdentityError),
    Issued(Arc<Kept>),
}

#[derive(PartialEq, Eq)]
struct Kept {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
    not_after: SystemTime,
}

impl Spire {
    /// Starts to listen on `control`; until the roots came nobody is believed.
    pub fn start(
        api: Api,
        control_plane: ControlPlane,
        settings: SourceSettings,
        clock: Arc<dyn Clock>,
        control: Handle,
    ) -> Result<Self, IdentityError> {
        let agent = Agent::new(control_plane).map_err(|e| IdentityError::Unavailable(e.to_string()))?;
        let nobody = TrustBundles::new(settings.trust_domain.clone(), Vec::new())?;
        let (renewed, renewals) = mpsc::unbounded_channel();
        let bundles = watch::Sender::new(Arc::new(nobody));
        let shared = Arc::new(Shared { settings, clock, known: Mutex::default(), bundles, renewed });
        let (for_news, for_errors) = (Arc::clone(&shared), Arc::clone(&shared));
        let roots = match api {
            Api::Delegated => agent.listen(
                &control,
                BUNDLES,
                SubscribeToX509BundlesRequest {},
                move |news| for_news.roots(&news),
                // Whoever waits, waits for a certificate.
                |_| {},
            ),
            Api::Workload => agent.listen(
                &control,
                WORKLOAD,
                X509svidRequest {},
                move |news| for_news.own(&news),
                move |error| for_errors.fail_all(&error),
            ),
        };
        Ok(Self { api, shared, agent, control, renewals: Mutex::new(Some(renewals)), _roots: roots })
    }

    /// What is said of an identity; a delegate subscribes to it first.
    fn listen(&self, id: &SpiffeId) -> watch::Receiver<Said> {
        let mut known = self.shared.known.lock();
        let entry = known.entry(id.clone()).or_insert_with(|| Known {
            said: watch::Sender::default(),
            _listener: (self.api == Api::Delegated).then(|| self.subscribe(id)),
        });
        entry.said.subscribe()
    }

    fn subscribe(&self, id: &SpiffeId) -> Listener {
        let selector = |value: String| Selector { r#type: "k8s".to_owned(), value };
        let selectors = vec![selector(format!("ns:{}", id.namespace())), selector(format!("sa:{}", id.service_account()))];
        let (for_news, for_errors) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let (whose, whose_error) = (id.clone(), id.clone());
        self.agent.listen(
            &self.control,
            SVIDS,
            SubscribeToX509sviDsRequest { selectors },
            move |news| for_news.delegated(&whose, news),
            move |error| for_errors.fail(&whose_error, error),
        )
    }

    async fn wait(&self, id: &SpiffeId) -> Result<IssuedSvid, IdentityError> {
        let mut said = self.listen(id);
        loop {
            match said.borrow_and_update().clone() {
                Said::Issued(kept) if kept.not_after > self.shared.clock.now() => {
                    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(kept.key.clone()));
                    return Ok(IssuedSvid { chain: kept.chain.clone(), key });
                }
                Said::Failed(error) => return Err(error),
                Said::Issued(_) | Said::Nothing => {}
            }
            if said.changed().await.is_err() {
                return Err(IdentityError::Unavailable("SPIRE is not listened to any more".into()));
            }
        }
    }
}

impl Drop for Spire {
    fn drop(&mut self) {
        // The listeners in there hold what they are in.
        self.shared.known.lock().clear();
    }
}

impl Shared {
    /// The certificate of one pod.
    fn delegated(&self, id: &SpiffeId, news: SubscribeToX509sviDsResponse) -> Result<(), String> {
        let mut others = Vec::new();
        for found in news.x509_svids {
            let svid = found.x509_svid.unwrap_or_default();
            let name = svid.id.map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default();
            if name == id.as_str() {
                let chain = svid.cert_chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
                return self.issue(id, chain, found.x509_svid_key.to_vec());
            }
            others.push(name);
        }
        let why = match others.as_slice() {
            [] => format!("SPIRE has no entry for k8s:ns:{}, k8s:sa:{}", id.namespace(), id.service_account()),
            others => format!("SPIRE's entries for this pod are {}", others.join(", ")),
        };
        self.fail(id, IdentityError::Unregistered { id: id.to_string(), why });
        Ok(())
    }

    /// The roots of all trust domains SPIRE's agent follows.
    fn roots(&self, news: &SubscribeToX509BundlesResponse) -> Result<(), String> {
        self.believe(news.ca_certificates.iter().map(|(domain, roots)| (domain.as_str(), roots.as_ref())))
    }

    /// Our own certificates, and whom to believe.
    fn own(&self, news: &X509svidResponse) -> Result<(), String> {
        let own = news.svids.iter().map(|svid| {
            let domain = svid.spiffe_id.trim_start_matches("spiffe://").split('/').next().unwrap_or_default();
            (domain, svid.bundle.as_ref())
        });
        let federated = news.federated_bundles.iter().map(|(domain, roots)| (domain.as_str(), roots.as_ref()));
        let believed = self.believe(federated.chain(own));
        let names: Vec<&str> = news.svids.iter().map(|svid| svid.spiffe_id.as_str()).collect();
        let missing: Vec<SpiffeId> = self.known.lock().keys().filter(|id| !names.contains(&id.as_str())).cloned().collect();
        for id in missing {
            let why = format!("SPIRE gives this process {}", names.join(", "));
            self.fail(&id, IdentityError::Unregistered { id: id.to_string(), why });
        }
        for svid in &news.svids {
            // Identities of another shape mean nothing in the mesh.
            let Ok(id) = svid.spiffe_id.parse::<SpiffeId>() else { continue };
            self.known.lock().entry(id.clone()).or_default();
            self.issue(&id, certificates(&svid.x509_svid)?, svid.x509_svid_key.to_vec())?;
        }
        believed
    }

    fn issue(&self, id: &SpiffeId, chain: Vec<CertificateDer<'static>>, key: Vec<u8>) -> Result<(), String> {
        let leaf = leaf_of(chain.first().ok_or("a certificate without content")?).map_err(|e| e.to_string())?;
        if leaf.id != *id {
            return Err(format!("a certificate for {} instead of {id}", leaf.id));
        }
        let kept = Arc::new(Kept { chain, key, not_after: leaf.not_after });
        let known = self.known.lock();
        let Some(entry) = known.get(id) else { return Ok(()) };
        let news = match entry.said.send_replace(Said::Issued(Arc::clone(&kept))) {
            // SPIRE repeats itself when anything else of the stream changed.
            Said::Issued(before) => before != kept,
            Said::Failed(_) => true,
            // Whoever asked first waits for it, unless he has lost patience.
            Said::Nothing => entry.said.receiver_count() == 0,
        };
        if news {
            // Nobody listens only when the process ends.
            let _ = self.renewed.send(id.clone());
        }
        Ok(())
    }

    /// A certificate that is still good stays.
    fn fail(&self, id: &SpiffeId, error: IdentityError) {
        if let Some(entry) = self.known.lock().get(id) {
            let now = self.clock.now();
            entry.said.send_if_modified(|said| {
                let good = matches!(said, Said::Issued(kept) if kept.not_after > now);
                if !good {
                    *said = Said::Failed(error);
                }
                !good
            });
        }
    }

    fn fail_all(&self, error: &IdentityError) {
        let ids: Vec<SpiffeId> = self.known.lock().keys().cloned().collect();
        for id in ids {
            self.fail(&id, error.clone());
        }
    }

    /// Each trust domain's roots vouch for that domain. One that cannot be read is believed no more; ours is kept as it was.
    fn believe<'a>(&self, roots: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<(), String> {
        let ours = &self.settings.trust_domain;
        let mut next = TrustBundles::new(ours.clone(), Vec::new()).map_err(|e| e.to_string())?;
        for alias in &self.settings.trust_domain_aliases {
            next = next.with_alias(alias.clone());
        }
        let mut told = Vec::new();
        for (name, der) in roots {
            let read = TrustDomain::parse(name.trim_start_matches("spiffe://")).map_err(|e| e.to_string()).and_then(|domain| {
                let added = next.clone().with_domain(domain.clone(), certificates(der)?).map_err(|e| e.to_string())?;
                Ok((domain, added))
            });
            match read {
                Ok((domain, added)) => {
                    next = added;
                    told.push(domain);
                }
                Err(why) if name.trim_start_matches("spiffe://") == ours.as_str() => return Err(format!("our roots: {why}")),
                Err(why) => tracing::error!(trust_domain = name, why, "no peer of it is believed: its roots cannot be used"),
            }
        }
        if !told.contains(ours) {
            let told: Vec<&str> = told.iter().map(TrustDomain::as_str).collect();
            return Err(format!("no roots of our trust domain {ours}, but of {}", told.join(", ")));
        }
        self.bundles.send_if_modified(|current| {
            let changed = !current.has_roots_of(&next);
            if changed {
                let domains: Vec<&str> = told.iter().map(TrustDomain::as_str).collect();
                tracing::info!(domains = domains.join(", "), "trust bundles changed");
                *current = Arc::new(next);
            }
            changed
        });
        Ok(())
    }
}

/// Certificates in DER, one after the other.
fn certificates(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut all = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).map_err(|e| format!("a certificate that cannot be read: {e}"))?;
        let (one, _) = der.split_at(der.len().saturating_sub(rest.len()));
        all.push(CertificateDer::from(one.to_vec()));
        der = rest;
    }
    Ok(all)
}

impl fmt::Debug for Spire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spire").field("api", &self.api).field("agent", &self.agent).finish_non_exhaustive()
    }
}

impl IdentitySource for Spire {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>> {
        Box::pin(self.wait(id))
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.shared.bundles.subscribe()
    }

    fn renewals(&self) -> Option<mpsc::UnboundedReceiver<SpiffeId>> {
        self.renewals.lock().take()
    }

    fn forget(&self, id: &SpiffeId) {
        if self.api == Api::Delegated {
            self.shared.known.lock().remove(id);
        }
    }
}

#[cfg(test)]
mod tests;
