//! The one seam to certificate authorities: the built-in development CA today; Istio's CA, SPIRE or files tomorrow.
//!
//! A source only issues and publishes. Caching, rotation, retries, priorities and time limits are [`crate::cache`]'s.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::{SpiffeId, TrustDomain};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use crate::bundle::TrustBundles;
use crate::error::IdentityError;

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
}

/// What an authority hands out: nothing here is checked yet.
#[derive(Debug)]
pub struct IssuedSvid {
    /// The leaf first, then intermediates; roots are not sent.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's private key.
    pub key: PrivateKeyDer<'static>,
}

/// Something that issues identities.
pub trait IdentitySource: Send + Sync {
    /// Issues a certificate for `id`. May hang or be cancelled at any await; the caller bounds its time.
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>>;
    /// The roots to believe, now and whenever they change.
    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>>;
}
