//! The one seam to certificate authorities: the built-in development CA, istiod's, SPIRE's agent, mounted files.
//!
//! A source only issues and publishes. Caching, rotation, retries, priorities and time limits are [`crate::cache`]'s.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::labels::Labels;
use mesh_model::making::Making;
use mesh_model::snapshot::Viewpoint;
use mesh_model::{SpiffeId, TrustDomain};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::{mpsc, watch};

use crate::bundle::TrustBundles;
use crate::error::IdentityError;
use crate::revocation::Unknown;

/// A boxed future, so that sources can be trait objects.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a process tells its authority, whichever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSettings {
    /// Our trust domain.
    pub trust_domain: TrustDomain,
    /// Other names of it.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Lifetime of certificates to ask for; the authority may give less.
    pub lifetime: Duration,
    /// What a certificate means of which no list of what was taken back speaks, where the authority sends such lists.
    pub unknown: Unknown,
}

impl SourceSettings {
    /// For a process that sees the mesh from there.
    pub fn of(view: &Viewpoint, lifetime: Duration) -> Self {
        let (trust_domain, trust_domain_aliases) = (view.trust_domain.clone(), view.trust_domain_aliases.clone());
        Self { trust_domain, trust_domain_aliases, lifetime, unknown: Unknown::Deny }
    }
    /// Where certificates of which no list speaks mean this.
    #[must_use]
    pub fn with_unknown(self, unknown: Unknown) -> Self {
        Self { unknown, ..self }
    }
}

/// What an authority hands out: nothing here is checked yet.
#[derive(Debug)]
pub struct IssuedSvid {
    /// The leaf first, then intermediates; roots are not sent.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's private key.
    pub key: PrivateKeyDer<'static>,
}

/// What is known of one workload of this node besides its identity: by this an authority finds what it registered for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The Pod's own uid, where somebody tells it.
    pub uid: Option<Arc<str>>,
    /// The Pod's name.
    pub name: Arc<str>,
    /// The node's name.
    pub node: Arc<str>,
    /// The Pod's labels; none where nobody tells them.
    pub labels: Labels,
    /// Its owners and containers, where somebody tells them.
    pub making: Option<Arc<Making>>,
}

/// Something that issues identities.
pub trait IdentitySource: Send + Sync {
    /// Issues a certificate for `id`. May hang or be cancelled at any await; the caller bounds its time.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>>;
    /// The roots to believe, now and whenever they change.
    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>>;
    /// Of a source that renews by itself: the identities that have a newer certificate than the one last issued. Taken once, by
    /// the cache, which then renews nothing by the age of certificates.
    fn renewals(&self) -> Option<mpsc::UnboundedReceiver<SpiffeId>> {
        None
    }
    /// This workload of this node, called `key`, has the identity `id`. Told before its certificate is wanted, and again when other
    /// things are known of it.
    fn introduce(&self, _id: &SpiffeId, _key: &Arc<str>, _facts: &Facts) {}
    /// That workload has left this node, or has another identity now.
    fn dismiss(&self, _id: &SpiffeId, _key: &str) {}
    /// The last workload of `id` has left this node.
    fn forget(&self, _id: &SpiffeId) {}
}

/// A source whose bundles are added to by somebody else.
pub(crate) struct WithBundles {
    pub(crate) source: Arc<dyn IdentitySource>,
    pub(crate) bundles: watch::Receiver<Arc<TrustBundles>>,
}

impl IdentitySource for WithBundles {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>> {
        self.source.issue(id)
    }
    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.bundles.clone()
    }
    fn renewals(&self) -> Option<mpsc::UnboundedReceiver<SpiffeId>> {
        self.source.renewals()
    }
    fn introduce(&self, id: &SpiffeId, key: &Arc<str>, facts: &Facts) {
        self.source.introduce(id, key, facts);
    }
    fn dismiss(&self, id: &SpiffeId, key: &str) {
        self.source.dismiss(id, key);
    }
    fn forget(&self, id: &SpiffeId) {
        self.source.forget(id);
    }
}
