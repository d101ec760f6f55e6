//! Whom we believe: for each trust domain, the roots that may vouch for it.
//!
//! A root of one trust domain never vouches for another one: the bundle is chosen by the trust domain in the peer's
//! certificate, and a domain without a bundle is refused. Upstream: an [`crate::source::IdentitySource`]. Downstream:
//! [`crate::verify`].

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use mesh_model::TrustDomain;
use rustls_pki_types::{CertificateDer, TrustAnchor};

use crate::error::IdentityError;
use crate::revocation::Revocation;

/// The roots of one trust domain.
#[derive(Clone, Debug, Default)]
pub struct TrustBundle {
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
}

impl TrustBundle {
    fn new(domain: &TrustDomain, roots: Vec<CertificateDer<'static>>) -> Result<Self, IdentityError> {
        let anchors = roots
            .iter()
            .map(|root| webpki::anchor_from_trusted_cert(root).map(|anchor| anchor.to_owned()))
            .collect::<Result<_, _>>()
            .map_err(|error| IdentityError::Unusable { id: format!("the roots of {domain}"), why: error.to_string() })?;
        Ok(Self { roots, anchors })
    }

    /// The roots as certificates, for dumps.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The roots as the verifier wants them.
    pub(crate) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

/// All trust domains we accept. One immutable value per version, published by the source.
#[derive(Clone, Debug)]
pub struct TrustBundles {
    ours: TrustDomain,
    own: TrustBundle,
    aliases: BTreeSet<TrustDomain>,
    foreign: HashMap<Box<str>, TrustBundle>,
    revocation: Option<Arc<Revocation>>,
}

impl TrustBundles {
    /// Our own trust domain and its roots. No roots at all is allowed and refuses every peer.
    pub fn new(ours: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Result<Self, IdentityError> {
        let own = TrustBundle::new(&ours, roots)?;
        Ok(Self { ours, own, aliases: BTreeSet::new(), foreign: HashMap::new(), revocation: None })
    }

    /// Accepts `alias` as another name of our domain, vouched for by our roots (MeshConfig `trustDomainAliases`).
    #[must_use]
    pub fn with_alias(mut self, alias: TrustDomain) -> Self {
        self.aliases.insert(alias);
        self
    }

    /// Accepts a foreign domain, vouched for by `roots` only. Wins over an alias of the same name.
    pub fn with_domain(mut self, domain: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Result<Self, IdentityError> {
        let bundle = TrustBundle::new(&domain, roots)?;
        if domain == self.ours {
            self.own = bundle;
        } else {
            self.foreign.insert(domain.as_str().into(), bundle);
        }
        Ok(self)
    }

    /// Looks certificates up in these lists of what was taken back, those of every domain.
    #[must_use]
    pub fn with_revocation(mut self, lists: Arc<Revocation>) -> Self {
        self.revocation = Some(lists);
        self
    }

    /// The lists of what was taken back; `None`: nobody asked to look.
    pub(crate) fn revocation(&self) -> Option<&Revocation> {
        self.revocation.as_deref()
    }

    /// Our trust domain.
    pub fn ours(&self) -> &TrustDomain {
        &self.ours
    }

    /// Other names of our trust domain.
    pub fn aliases(&self) -> impl Iterator<Item = &TrustDomain> {
        self.aliases.iter()
    }

    /// Whether both believe the same.
    pub(crate) fn has_roots_of(&self, other: &Self) -> bool {
        let same = |domain: &str, bundle: &TrustBundle| other.find(domain).is_some_and(|there| there.roots == bundle.roots);
        self.foreign.len() == other.foreign.len() && self.all().all(|(domain, bundle)| same(domain, bundle))
    }

    /// The same, with these lists and no others.
    #[must_use]
    pub(crate) fn with_lists(self, lists: Option<Arc<Revocation>>) -> Self {
        Self { revocation: lists, ..self }
    }

    /// The lists of what was taken back, to be handed on.
    pub(crate) fn lists(&self) -> Option<Arc<Revocation>> {
        self.revocation.clone()
    }

    /// Every trust domain with its roots, ours first; aliases have ours.
    pub fn all(&self) -> impl Iterator<Item = (&str, &TrustBundle)> {
        let foreign = self.foreign.iter().map(|(name, bundle)| (&**name, bundle));
        std::iter::once((self.ours.as_str(), &self.own)).chain(foreign)
    }

    /// The bundle that may vouch for `domain`; `None` means: refuse it.
    pub fn find(&self, domain: &str) -> Option<&TrustBundle> {
        if domain == self.ours.as_str() {
            return Some(&self.own);
        }
        if let Some(bundle) = self.foreign.get(domain) {
            return Some(bundle);
        }
        self.aliases.iter().any(|alias| alias.as_str() == domain).then_some(&self.own)
    }
}
