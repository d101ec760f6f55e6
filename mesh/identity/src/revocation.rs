//! Certificates that were taken back: the authorities' lists (CRL, RFC 5280 §5).
//!
//! Every certificate of a chain is looked up. One that no list speaks of, or only one that is out of date, is not known to be
//! good: [`Unknown`] says what then. Upstream: [`crate::crl_file`], [`crate::spire`]. Downstream: [`crate::bundle`], [`crate::verify`],
//! and whoever asks servers outside the mesh for their certificates.

use std::str::FromStr;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptions, RevocationOptionsBuilder, UnknownStatusPolicy,
};
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use crate::clock::date;

/// What is done with a certificate of which no list in force speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unknown {
    /// It is refused.
    #[default]
    Deny,
    /// It is believed, as istio/ztunnel does; lists count beyond their date.
    Allow,
}

impl FromStr for Unknown {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "deny" => Ok(Self::Deny),
            "allow" => Ok(Self::Allow),
            _ => Err(format!("{text:?} is neither `deny` nor `allow`")),
        }
    }
}

/// A list, and the dates from which on it says what was taken back (`thisUpdate`) and proves nothing any more (`nextUpdate`).
#[derive(Clone, Debug)]
struct Dated {
    list: Arc<CertRevocationList<'static>>,
    from: SystemTime,
    until: SystemTime,
}

/// The lists in force; of one authority the newest counts.
#[derive(Debug)]
pub struct Revocation {
    /// Newest first: the verifier goes by the first it finds.
    lists: Vec<Dated>,
    unknown: Unknown,
}

impl Revocation {
    /// Reads lists: PEM with any number of them, or the DER of one.
    ///
    /// # Errors
    /// Says which of them cannot be read; then none counts.
    pub fn read(bytes: &[u8], unknown: Unknown) -> Result<Self, String> {
        let mut lists = Vec::new();
        for der in CertificateRevocationListDer::pem_slice_iter(bytes) {
            lists.push(der.map_err(|error| format!("list {}: {error}", lists.len() + 1))?);
        }
        if lists.is_empty() {
            lists.push(CertificateRevocationListDer::from(bytes));
        }
        Ok(Self { lists: dated(&lists)?, unknown })
    }

    /// Reads lists, each in DER.
    ///
    /// # Errors
    /// Says which of them cannot be read; then none counts.
    pub(crate) fn of<'a>(ders: impl Iterator<Item = &'a [u8]>, unknown: Unknown) -> Result<Self, String> {
        let lists = ders.map(CertificateRevocationListDer::from).collect::<Vec<_>>();
        Ok(Self { lists: dated(&lists)?, unknown })
    }

    /// These and those of another teller.
    pub(crate) fn and(&self, others: &Self) -> Self {
        Self { lists: newest_first(self.lists.iter().chain(&others.lists).cloned().collect()), unknown: self.unknown }
    }

    /// No list at all.
    pub(crate) fn none(unknown: Unknown) -> Self {
        Self { lists: Vec::new(), unknown }
    }

    /// These without those that are out of date at `now`; `None`: none is, or they count beyond their date.
    pub(crate) fn aged(&self, now: SystemTime) -> Option<Self> {
        let in_force = |dated: &&Dated| now < dated.until;
        if self.unknown == Unknown::Allow || self.lists.iter().all(|dated| in_force(&dated)) {
            return None;
        }
        Some(Self { lists: self.lists.iter().filter(in_force).cloned().collect(), unknown: self.unknown })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lists.len()
    }

    /// The lists as the verifier wants them.
    pub(crate) fn lists(&self) -> Vec<&CertRevocationList<'static>> {
        self.lists.iter().map(|dated| &*dated.list).collect()
    }

    /// Verifies the chain of a server outside the mesh, with whatever names: to `anchors`, and none of it taken back.
    ///
    /// # Errors
    /// As the verifier says.
    pub fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        anchors: &[TrustAnchor<'_>],
        algorithms: &WebPkiSupportedAlgorithms,
        now: UnixTime,
    ) -> Result<(), webpki::Error> {
        let lists = self.lists();
        let options = self.options(&lists)?;
        let leaf = EndEntityCert::try_from(leaf)?;
        leaf.verify_for_usage(algorithms.all, anchors, intermediates, now, KeyUsage::server_auth(), options, None).map(drop)
    }

    /// How `lists` are applied; `None`: not at all.
    pub(crate) fn options<'a>(
        &self,
        lists: &'a [&'a CertRevocationList<'a>],
    ) -> Result<Option<RevocationOptions<'a>>, webpki::Error> {
        let Ok(builder) = RevocationOptionsBuilder::new(lists) else {
            return match self.unknown {
                Unknown::Deny => Err(webpki::Error::UnknownRevocationStatus),
                Unknown::Allow => Ok(None),
            };
        };
        let (status, expiration) = match self.unknown {
            Unknown::Deny => (UnknownStatusPolicy::Deny, ExpirationPolicy::Enforce),
            Unknown::Allow => (UnknownStatusPolicy::Allow, ExpirationPolicy::Ignore),
        };
        let builder = builder.with_depth(RevocationCheckDepth::Chain).with_status_policy(status);
        Ok(Some(builder.with_expiration_policy(expiration).build()))
    }
}

fn dated(ders: &[CertificateRevocationListDer<'_>]) -> Result<Vec<Dated>, String> {
    let read = |(at, der): (usize, &CertificateRevocationListDer<'_>)| {
        let list = OwnedCertRevocationList::from_der(der).map_err(|error| format!("list {}: {error}", at + 1))?;
        let (from, until) = dates(der).map_err(|why| format!("list {}: {why}", at + 1))?;
        Ok(Dated { list: Arc::new(list.into()), from, until })
    };
    ders.iter().enumerate().map(read).collect::<Result<_, _>>().map(newest_first)
}
fn newest_first(mut lists: Vec<Dated>) -> Vec<Dated> {
    lists.sort_by_key(|dated| std::cmp::Reverse(dated.from));
    lists
}

/// Since when and until when a list counts. The verifier knows, and does not tell.
fn dates(der: &[u8]) -> Result<(SystemTime, SystemTime), String> {
    let (_, list) = CertificateRevocationList::from_der(der).map_err(|error| error.to_string())?;
    let until = list.next_update().ok_or_else(|| "no nextUpdate".to_owned())?;
    Ok((date(list.last_update().timestamp()), date(until.timestamp())))
}

/// Whether this is about revocation.
pub(crate) fn concerns(error: &webpki::Error) -> bool {
    use webpki::Error as E;
    matches!(
        error,
        E::CertRevoked
            | E::UnknownRevocationStatus
            | E::CrlExpired { .. }
            | E::InvalidCrlSignatureForPublicKey
            | E::IssuerNotCrlSigner
            | E::UnsupportedCrlSignatureAlgorithmContext(_)
            | E::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_)
    )
}
