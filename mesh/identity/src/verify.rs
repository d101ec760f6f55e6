//! Who a peer is, proved by its certificate: chain to the roots of *its* trust domain, and exactly one SPIFFE id in it.
//!
//! Refuses: no or several URI names, an id that is not Istio-shaped, a CA as leaf, an unknown trust domain, TLS below 1.3.
//! DNS names and the subject are ignored. The check against the *expected* identity is not here but in [`crate::tls`],
//! because one verifier serves every connection. Upstream: [`crate::bundle`]. Downstream: [`crate::svid`], [`crate::tls`].

mod proven;

use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::id::IdError;
use mesh_model::{Reason, SpiffeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::sync::watch;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::{TrustBundle, TrustBundles};
use crate::clock::date;
use crate::revocation::{self, Revocation};
pub(crate) use proven::Proven;
use proven::ProvenChains;

/// Why a certificate proves nothing to us.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum VerifyError {
    /// Not DER, trailing bytes, or a broken extension.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// No URI among the subject alternative names.
    #[error("the certificate has no URI name, so no SPIFFE id")]
    NoUri,
    /// SPIFFE X.509-SVID §2: exactly one URI.
    #[error("the certificate has {0} URI names; exactly one is allowed")]
    SeveralUris(usize),
    /// The URI is not a SPIFFE id of the Istio shape.
    #[error("the URI name {uri:?} is not a SPIFFE id: {error}")]
    BadId {
        /// What stands there (shortened).
        uri: String,
        /// Why it is refused.
        error: IdError,
    },
    /// SPIFFE X.509-SVID §4, §5.2: a leaf neither is a CA nor may sign certificates or revocation lists.
    #[error("{0} is the certificate of an authority, not of a workload")]
    Authority(SpiffeId),
    /// Key usage is present and lacks digitalSignature (SPIFFE X.509-SVID §4.3).
    #[error("the key usage in the certificate of {0} does not allow handshakes")]
    KeyUsage(SpiffeId),
    /// No bundle for the peer's trust domain.
    #[error("{id} is of trust domain {}, which is neither {ours} nor an alias nor federated", id.trust_domain())]
    TrustDomain {
        /// Who it claims to be.
        id: SpiffeId,
        /// Our trust domain.
        ours: mesh_model::TrustDomain,
    },
    /// The chain does not lead to a root of the peer's trust domain, or not for this usage, or not at this time, or one of its
    /// certificates was taken back.
    #[error("the certificate of {id} is not valid: {error}")]
    Chain {
        /// Who it claims to be.
        id: SpiffeId,
        /// What webpki says.
        error: webpki::Error,
    },
}

impl VerifyError {
    /// The word for logs, metrics and answers.
    pub fn reason(&self) -> Reason {
        match self {
            Self::TrustDomain { .. } => Reason::TrustDomain,
            Self::Chain { error, .. } if revocation::concerns(error) => Reason::CertRevoked,
            _ => Reason::TlsFailure,
        }
    }
}

impl From<VerifyError> for rustls::Error {
    /// Dates and unknown issuers become rustls' own words, so that the peer gets the precise alert; the rest travels as it is
    /// and is found again by [`crate::tls`].
    fn from(error: VerifyError) -> Self {
        let certificate = match &error {
            VerifyError::Chain { error: webpki::Error::CertExpired { time, not_after }, .. } => {
                CertificateError::ExpiredContext { time: *time, not_after: *not_after }
            }
            VerifyError::Chain { error: webpki::Error::CertNotValidYet { time, not_before }, .. } => {
                CertificateError::NotValidYetContext { time: *time, not_before: *not_before }
            }
            VerifyError::Chain { error: webpki::Error::UnknownIssuer, .. } => CertificateError::UnknownIssuer,
            VerifyError::Chain { error: webpki::Error::CertRevoked, .. } => CertificateError::Revoked,
            VerifyError::Unreadable(_) => CertificateError::BadEncoding,
            _ => CertificateError::Other(OtherError(Arc::new(error))),
        };
        rustls::Error::InvalidCertificate(certificate)
    }
}

/// What we read from a leaf certificate. Claims only: nothing is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Its only URI name.
    pub id: SpiffeId,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Serial number, decimal (the form of the configuration dump, node-agent §1.14).
    pub serial: String,
}

/// Reads a leaf certificate; total over any bytes.
pub fn leaf_of(der: &[u8]) -> Result<Leaf, VerifyError> {
    let certificate = parse(der)?;
    let id = id_of(&certificate)?;
    let validity = certificate.validity();
    Ok(Leaf {
        id,
        not_before: date(validity.not_before.timestamp()),
        not_after: date(validity.not_after.timestamp()),
        serial: certificate.tbs_certificate.serial.to_string(),
    })
}

/// The SPIFFE id a certificate claims; total over any bytes.
pub fn spiffe_id_of(der: &[u8]) -> Result<SpiffeId, VerifyError> {
    id_of(&parse(der)?)
}

pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, VerifyError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => Err(VerifyError::Unreadable(format!("{} bytes follow it", rest.len()))),
        Err(error) => Err(VerifyError::Unreadable(error.to_string())),
    }
}

fn id_of(certificate: &X509Certificate<'_>) -> Result<SpiffeId, VerifyError> {
    let unreadable = |error: x509_parser::error::X509Error| VerifyError::Unreadable(error.to_string());
    let names = certificate.subject_alternative_name().map_err(unreadable)?.ok_or(VerifyError::NoUri)?;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let uri = uris.next().ok_or(VerifyError::NoUri)?;
    match uris.count() {
        0 => {}
        more => return Err(VerifyError::SeveralUris(more + 1)),
    }
    let id: SpiffeId = uri.parse().map_err(|error| VerifyError::BadId { uri: uri.chars().take(128).collect(), error })?;
    if is_authority(certificate).map_err(unreadable)? {
        return Err(VerifyError::Authority(id));
    }
    if certificate.key_usage().map_err(unreadable)?.is_some_and(|usage| !usage.value.digital_signature()) {
        return Err(VerifyError::KeyUsage(id));
    }
    Ok(id)
}

/// Whether it is one that may sign others, which a leaf is not (SPIFFE X.509-SVID §4, §5.2).
pub(crate) fn is_authority(certificate: &X509Certificate<'_>) -> Result<bool, x509_parser::error::X509Error> {
    let signs = certificate.key_usage()?.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign());
    Ok(signs || certificate.basic_constraints()?.is_some_and(|constraints| constraints.value.ca))
}

/// What the peer's certificate is used for: the peer's side, not ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRole {
    /// The peer connected to us.
    Client,
    /// We connected to the peer.
    Server,
}

/// Verifies a leaf with the intermediates that came along at `now`, and returns who it proves.
pub fn verify_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    role: PeerRole,
    bundles: &TrustBundles,
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
) -> Result<SpiffeId, VerifyError> {
    let id = spiffe_id_of(leaf)?;
    let Some(bundle) = bundles.find(id.trust_domain()) else {
        return Err(VerifyError::TrustDomain { id, ours: bundles.ours().clone() });
    };
    let usage = match role {
        PeerRole::Client => KeyUsage::client_auth(),
        PeerRole::Server => KeyUsage::server_auth(),
    };
    match leads_to(bundle, bundles.revocation(), leaf, intermediates, usage, algorithms, now) {
        Ok(()) => Ok(id),
        Err(error) => Err(VerifyError::Chain { id, error }),
    }
}

/// Whether a chain leads to one of these roots, for this usage and at this time, and none of it was taken back.
pub(crate) fn leads_to(
    bundle: &TrustBundle,
    revocation: Option<&Revocation>,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    usage: KeyUsage,
    algorithms: &WebPkiSupportedAlgorithms,
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let lists = revocation.map(Revocation::lists).unwrap_or_default();
    let lists = revocation.map_or(Ok(None), |revocation| revocation.options(&lists))?;
    let leaf = EndEntityCert::try_from(leaf)?;
    leaf.verify_for_usage(algorithms.all, bundle.anchors(), intermediates, now, usage, lists, None).map(drop)
}

/// Verifies peers on both sides, always against the newest bundles: a rotation of roots needs no new TLS configuration.
#[derive(Debug)]
pub(crate) struct PeerVerifier {
    bundles: watch::Receiver<Arc<TrustBundles>>,
    algorithms: WebPkiSupportedAlgorithms,
    proven: ProvenChains,
}

impl PeerVerifier {
    pub(crate) fn new(bundles: watch::Receiver<Arc<TrustBundles>>, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { bundles, algorithms, proven: ProvenChains::default() }
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        // Clone first: the watch's lock must not be held while signatures are checked.
        let bundles = Arc::clone(&self.bundles.borrow());
        if self.proven.find(leaf, intermediates, role, &bundles, now).is_none() {
            verify_chain(leaf, intermediates, role, &bundles, &self.algorithms, now)?;
            self.proven.keep(leaf, intermediates, role, &bundles);
        }
        Ok(())
    }

    /// What a handshake has just proven about this chain, and by which bundles. `None` when it is not kept (any more): read it
    /// again then.
    pub(crate) fn find_proven(
        &self,
        chain: &[CertificateDer<'_>],
        role: PeerRole,
        now: UnixTime,
    ) -> Option<(Arc<Proven>, Arc<TrustBundles>)> {
        let (leaf, intermediates) = chain.split_first()?;
        let bundles = Arc::clone(&self.bundles.borrow());
        Some((self.proven.find(leaf, intermediates, role, &bundles, now)?, bundles))
    }

    pub(crate) fn algorithms(&self) -> WebPkiSupportedAlgorithms {
        self.algorithms
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        // Names mean nothing in the mesh; `tls::connect` compares identities.
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, PeerRole::Server, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A workload has one certificate, so a hint would only make the handshake larger.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, PeerRole::Client, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

pub(crate) fn tls12() -> rustls::Error {
    rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered)
}

#[cfg(test)]
mod tests;
