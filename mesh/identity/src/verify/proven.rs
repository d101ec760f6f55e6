//! Chains that were proven already. Half of the signature checks of a handshake repeat what the last handshake with the same
//! peer proved: that its certificate leads to our roots. That is a function of the bytes, the bundles, the usage and the date,
//! so a positive answer is kept for exactly those bytes, that version of the bundles, that usage, and the dates on all the
//! certificates. The proof that the peer holds the key is made anew in every handshake.
//!
//! Refuses to keep failures (a stranger must not be able to fill it) and more than [`MOST`] chains per usage.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::{Leaf, PeerRole, leaf_of, parse};
use crate::bundle::TrustBundles;
use crate::clock::{date, unix};

/// Most chains kept per usage; a node agent talks to fewer identities than this within an hour, or it pays again.
pub(super) const MOST: usize = 4096;

/// A chain that was proven, and what its leaf says.
#[derive(Debug)]
pub(crate) struct Proven {
    pub(crate) leaf: Leaf,
    /// Shared by all connections with this peer.
    pub(crate) chain: Arc<[CertificateDer<'static>]>,
    /// When every certificate of the chain is valid.
    from: UnixTime,
    until: UnixTime,
}

#[derive(Debug, Default)]
pub(super) struct ProvenChains(RwLock<Kept>);

#[derive(Debug, Default)]
struct Kept {
    /// What everything here was proven against. Holding it keeps its address from being reused by a later version.
    bundles: Option<Arc<TrustBundles>>,
    clients: HashMap<Box<[u8]>, Arc<Proven>>,
    servers: HashMap<Box<[u8]>, Arc<Proven>>,
}

impl Kept {
    fn of(&self, role: PeerRole) -> &HashMap<Box<[u8]>, Arc<Proven>> {
        match role {
            PeerRole::Client => &self.clients,
            PeerRole::Server => &self.servers,
        }
    }
}

impl ProvenChains {
    /// The earlier proof for exactly this chain, if it holds under `bundles` at `now`.
    pub(super) fn find(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        bundles: &Arc<TrustBundles>,
        now: UnixTime,
    ) -> Option<Arc<Proven>> {
        let kept = self.0.read();
        if !kept.bundles.as_ref().is_some_and(|proven_by| Arc::ptr_eq(proven_by, bundles)) {
            return None;
        }
        let proven = kept.of(role).get(leaf.as_ref())?;
        let (_, rest) = proven.chain.split_first()?;
        (proven.from <= now && now < proven.until && rest == intermediates).then(|| Arc::clone(proven))
    }

    /// Keeps a chain that [`super::verify_chain`] has just accepted.
    pub(super) fn keep(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        bundles: &Arc<TrustBundles>,
    ) {
        let Ok(read) = leaf_of(leaf) else { return };
        let (mut from, mut until) = (unix(read.not_before), unix(read.not_after));
        for certificate in intermediates {
            let Ok(certificate) = parse(certificate) else { return };
            from = from.max(unix(date(certificate.validity().not_before.timestamp())));
            until = until.min(unix(date(certificate.validity().not_after.timestamp())));
        }
        let chain = std::iter::once(leaf).chain(intermediates).map(|certificate| certificate.clone().into_owned()).collect();
        let proven = Arc::new(Proven { leaf: read, chain, from, until });

        let mut kept = self.0.write();
        if !kept.bundles.as_ref().is_some_and(|proven_by| Arc::ptr_eq(proven_by, bundles)) {
            *kept = Kept { bundles: Some(Arc::clone(bundles)), ..Kept::default() };
        }
        let chains = match role {
            PeerRole::Client => &mut kept.clients,
            PeerRole::Server => &mut kept.servers,
        };
        if chains.len() >= MOST {
            // Mostly renewed certificates nobody shows any more. Finding out which costs more than proving the others again.
            chains.clear();
        }
        chains.insert(leaf.as_ref().into(), proven);
    }

    #[cfg(test)]
    pub(super) fn len(&self, role: PeerRole) -> usize {
        self.0.read().of(role).len()
    }
}
