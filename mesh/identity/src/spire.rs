//! SPIRE as a source: certificates that its agent hands out and renews by itself, over a Unix socket of this node.
//!
//! Two ways to ask, one state. As a *delegate* ([`Api::Delegated`]) the node agent subscribes to the certificates of each
//! pod by what SPIRE's Kubernetes attestor would find of the pod (`k8s:ns`, `k8s:sa`, `k8s:pod-uid`, `k8s:pod-label`, …): SPIRE gives those of the
//! entries whose selectors are all among them. Pods of one identity share it ([`known`]). Not by the number of a process: the one
//! that the agent knows of a pod is its sandbox's, of which that attestor knows no container. By the *Workload API* ([`Api::Workload`]) a process gets its own. What comes is kept as it comes, so that [`crate::cache`] is answered from here at once and told of
//! every renewal. Believed are the roots of the same streams, each for its own trust domain.
//! A stream that ends is opened again; what was last good serves until it expires. Refuses: a certificate with another identity
//! than asked for. Upstream: SPIRE's agent, through [`mesh_runtime::control_plane`].

mod known;
mod stream;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use mesh_model::making::{Container, Making, Owner};
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
use crate::look::looks;
use crate::revocation::Revocation;
use crate::source::{BoxFuture, Facts, IdentitySource, IssuedSvid, SourceSettings};
use crate::verify::leaf_of;
use known::{Heard, Kept, Known, Said};
use stream::{Agent, Listener};

const SVIDS: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs";
const BUNDLES: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles";
const WORKLOAD: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// Whom we speak for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// For the pods of this node, by what is known of them. On the agent's admin socket.
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
    state: Mutex<State>,
    bundles: watch::Sender<Arc<TrustBundles>>,
    renewed: mpsc::UnboundedSender<SpiffeId>,
}

#[derive(Default)]
struct State {
    /// What was said last, by identity.
    known: HashMap<SpiffeId, Known>,
    /// The pods of this node that a delegate was told of.
    pods: HashMap<SpiffeId, BTreeMap<Arc<str>, Facts>>,
    /// Lists of what was taken back, as they were sent last, and those of them that can be read.
    crl: (Vec<Vec<u8>>, Option<Arc<Revocation>>),
}

/// In the place of a pod's key: ourselves, or an identity of which no pod is known.
const NOBODY: &str = "";

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
        let shared = Arc::new(Shared { settings, clock, state: Mutex::default(), bundles, renewed });
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
        if api == Api::Workload {
            control.spawn(age(Arc::downgrade(&shared)));
        }
        Ok(Self { api, shared, agent, control, renewals: Mutex::new(Some(renewals)), _roots: roots })
    }

    /// What is said of an identity; a delegate subscribes to it first.
    fn listen(&self, id: &SpiffeId) -> watch::Receiver<Said> {
        let State { known, pods, .. } = &mut *self.shared.state.lock();
        let entry = known.entry(id.clone()).or_default();
        if entry.is_empty() {
            for (key, facts) in pods.get(id).into_iter().flatten() {
                entry.put(key, self.ask(id, key, Some(facts)));
            }
        }
        if entry.is_empty() {
            let heard = if self.api == Api::Delegated { self.ask(id, &NOBODY.into(), None) } else { Heard::default() };
            entry.put(&NOBODY.into(), heard);
        }
        entry.said().subscribe()
    }

    /// Subscribes to what SPIRE has for a pod, or for any with this account.
    fn ask(&self, id: &SpiffeId, key: &Arc<str>, facts: Option<&Facts>) -> Heard {
        let selectors = selectors(id, facts);
        let names = selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>().join(", ");
        let (for_news, for_errors) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let (whose, whose_error) = ((id.clone(), Arc::clone(key)), (id.clone(), Arc::clone(key)));
        Heard::by(self.agent.listen(
            &self.control,
            SVIDS,
            SubscribeToX509sviDsRequest { selectors },
            move |news| for_news.delegated(&whose.0, &whose.1, &names, news),
            move |error| for_errors.fail(&whose_error.0, &whose_error.1, error),
        ))
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

/// Looks after the dates of lists while there is somebody who has them.
async fn age(shared: Weak<Shared>) {
    let mut tick = looks();
    loop {
        tick.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        shared.age();
    }
}

impl Drop for Spire {
    fn drop(&mut self) {
        // The listeners in there hold what they are in.
        self.shared.state.lock().known.clear();
    }
}

impl Shared {
    /// The certificate of one pod, which was asked for by `selectors`.
    fn delegated(&self, id: &SpiffeId, pod: &str, selectors: &str, news: SubscribeToX509sviDsResponse) -> Result<(), String> {
        let mut others = Vec::new();
        for found in news.x509_svids {
            let svid = found.x509_svid.unwrap_or_default();
            let name = svid.id.map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default();
            if name == id.as_str() {
                let chain = svid.cert_chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
                return self.issue(id, pod, chain, found.x509_svid_key.to_vec());
            }
            others.push(name);
        }
        let why = match others.as_slice() {
            [] => format!("SPIRE has no entry for {selectors}"),
            others => format!("SPIRE's entries for this pod are {}", others.join(", ")),
        };
        self.fail(id, pod, IdentityError::Unregistered { id: id.to_string(), why });
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
        // Whatever becomes of the roots.
        self.revoke(&news.crl);
        let believed = self.believe(federated.chain(own));
        let names: Vec<&str> = news.svids.iter().map(|svid| svid.spiffe_id.as_str()).collect();
        let missing: Vec<SpiffeId> = {
            let state = self.state.lock();
            state.known.keys().filter(|id| !names.contains(&id.as_str())).cloned().collect()
        };
        for id in missing {
            let why = format!("SPIRE gives this process {}", names.join(", "));
            self.fail(&id, NOBODY, IdentityError::Unregistered { id: id.to_string(), why });
        }
        for svid in &news.svids {
            // Identities of another shape mean nothing in the mesh.
            let Ok(id) = svid.spiffe_id.parse::<SpiffeId>() else { continue };
            self.state.lock().known.entry(id.clone()).or_insert_with(|| Known::of(&NOBODY.into()));
            self.issue(&id, NOBODY, certificates(&svid.x509_svid)?, svid.x509_svid_key.to_vec())?;
        }
        believed
    }

    fn issue(&self, id: &SpiffeId, pod: &str, chain: Vec<CertificateDer<'static>>, key: Vec<u8>) -> Result<(), String> {
        let leaf = leaf_of(chain.first().ok_or("a certificate without content")?).map_err(|e| e.to_string())?;
        if leaf.id != *id {
            return Err(format!("a certificate for {} instead of {id}", leaf.id));
        }
        let kept = Arc::new(Kept { chain, key, not_after: leaf.not_after });
        self.hear(id, |known, now| known.hear(pod, Said::Issued(kept), now));
        Ok(())
    }

    /// A certificate that is still good stays.
    fn fail(&self, id: &SpiffeId, pod: &str, error: IdentityError) {
        self.hear(id, |known, now| known.hear(pod, Said::Failed(error), now));
    }

    fn fail_all(&self, error: &IdentityError) {
        let ids: Vec<SpiffeId> = self.state.lock().known.keys().cloned().collect();
        for id in ids {
            self.fail(&id, NOBODY, error.clone());
        }
    }

    /// Changes what is known of an identity, if anything is; `change` answers whether there is a newer certificate.
    fn hear(&self, id: &SpiffeId, change: impl FnOnce(&mut Known, SystemTime) -> bool) {
        let mut state = self.state.lock();
        if let Some(known) = state.known.get_mut(id)
            && change(known, self.clock.now())
        {
            // Nobody listens only when the process ends.
            let _ = self.renewed.send(id.clone());
        }
    }

    /// The lists of what was taken back. Where they cannot be read those before stay in force; without any before them no list is, and
    /// certificates mean what they do of which no list speaks.
    fn revoke(&self, crl: &[impl AsRef<[u8]>]) {
        let (sent, lists) = &mut self.state.lock().crl;
        if sent.iter().map(Vec::as_slice).eq(crl.iter().map(AsRef::as_ref)) {
            return;
        }
        *sent = crl.iter().map(|der| der.as_ref().to_vec()).collect();
        match Revocation::of(sent.iter().map(Vec::as_slice), self.settings.unknown) {
            Ok(_) if crl.is_empty() => {
                tracing::info!("SPIRE sends no certificate revocation lists any more");
                *lists = None;
            }
            Ok(read) => {
                tracing::info!(lists = read.count(), "certificate revocation lists of SPIRE read");
                *lists = Some(Arc::new(read));
            }
            Err(why) => {
                let unknown = self.settings.unknown;
                tracing::error!(
                    why,
                    ?unknown,
                    "certificate revocation lists of SPIRE cannot be read: those before stay in force"
                );
                lists.get_or_insert_with(|| Arc::new(Revocation::none(unknown)));
            }
        }
        self.look_up(lists.clone());
    }

    /// Leaves out lists that went out of date, so that what was accepted by them is judged again.
    fn age(&self) {
        let (_, lists) = &mut self.state.lock().crl;
        let Some(left) = lists.as_ref().and_then(|lists| lists.aged(self.clock.now())) else { return };
        tracing::error!(
            left = left.count(),
            "certificate revocation lists of SPIRE are out of date: certificates that need them are refused"
        );
        let left = Arc::new(left);
        *lists = Some(Arc::clone(&left));
        self.look_up(Some(left));
    }

    /// Has certificates looked up in these from now on.
    fn look_up(&self, lists: Option<Arc<Revocation>>) {
        self.bundles.send_modify(|current| *current = Arc::new(TrustBundles::clone(current).with_lists(lists)));
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
                *current = Arc::new(next.with_lists(current.lists()));
            }
            changed
        });
        Ok(())
    }
}

/// What SPIRE's Kubernetes attestor would find of a pod, as far as it is known here. It looks at a process and finds one container; an
/// agent serves the pod, so all containers are named.
fn selectors(id: &SpiffeId, facts: Option<&Facts>) -> Vec<Selector> {
    let mut values = vec![format!("ns:{}", id.namespace()), format!("sa:{}", id.service_account())];
    if let Some(Facts { uid, name, node, labels, making }) = facts {
        values.extend(uid.iter().map(|uid| format!("pod-uid:{uid}")));
        values.push(format!("pod-name:{name}"));
        values.push(format!("node-name:{node}"));
        values.extend(labels.iter().map(|(key, value)| format!("pod-label:{key}:{value}")));
        values.extend(making.iter().flat_map(|making| made_of(making)));
    }
    values.into_iter().map(|value| Selector { r#type: "k8s".to_owned(), value }).collect()
}

/// The same of its owners and containers. An image is two: as the pod names it, and with its digest.
fn made_of(making: &Making) -> Vec<String> {
    let Making { owners, containers, init_containers } = making;
    let mut values = Vec::new();
    for Owner { kind, name, uid } in owners {
        values.extend([format!("pod-owner:{kind}:{name}"), format!("pod-owner-uid:{kind}:{uid}")]);
    }
    values.push(format!("pod-image-count:{}", containers.len()));
    values.push(format!("pod-init-image-count:{}", init_containers.len()));
    for (key, of_kind) in [("pod-image", containers), ("pod-init-image", init_containers)] {
        for Container { name, image, image_id } in of_kind {
            values.push(format!("container-name:{name}"));
            for image in [image, image_id].into_iter().filter(|image| !image.is_empty()) {
                values.extend([format!("{key}:{image}"), format!("container-image:{image}")]);
            }
        }
    }
    values.sort();
    values.dedup();
    values
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

    fn introduce(&self, id: &SpiffeId, key: &Arc<str>, facts: &Facts) {
        if self.api != Api::Delegated {
            return;
        }
        let State { known, pods, .. } = &mut *self.shared.state.lock();
        let pods = pods.entry(id.clone()).or_default();
        if pods.get(key) == Some(facts) {
            return;
        }
        pods.insert(Arc::clone(key), facts.clone());
        if let Some(known) = known.get_mut(id) {
            known.put(key, self.ask(id, key, Some(facts)));
            // Asked for before any pod of it was known.
            known.remove(NOBODY);
        }
    }

    fn dismiss(&self, id: &SpiffeId, key: &str) {
        let left = {
            let pods = &mut self.shared.state.lock().pods;
            let Some(of_id) = pods.get_mut(id) else { return };
            of_id.remove(key);
            let last = of_id.is_empty();
            if last {
                pods.remove(id);
            }
            !last
        };
        // What the last pod had goes with the identity ([`Self::forget`]), or is the next pod's.
        if left {
            self.shared.hear(id, |known, now| {
                known.remove(key);
                known.settle(now)
            });
        }
    }

    fn forget(&self, id: &SpiffeId) {
        if self.api == Api::Delegated {
            self.shared.state.lock().known.remove(id);
        }
    }
}

#[cfg(test)]
mod tests;
