//! One certificate, checked, with the two TLS configurations made from it.
//!
//! Building a configuration parses the key and allocates dozens of objects; it is done once per certificate, never per
//! connection. Refuses a certificate that is not what was asked for. Upstream: [`crate::source`] through [`crate::cache`].
//! Downstream: [`crate::tls`].

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::SpiffeId;
use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, ResolvesServerCertUsingSni, WantsServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ConfigBuilder, ServerConfig};
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;

use crate::bundle::TrustBundles;
use crate::clock::{Clock, RustlsTime};
use crate::crypto::TlsSettings;
use crate::error::IdentityError;
use crate::handshakes::Handshakes;
use crate::source::{IdentitySource, IssuedSvid};
use crate::verify::{Leaf, PeerVerifier, leaf_of};

/// The only protocol we offer: HBONE is HTTP/2.
const ALPN_H2: &[u8] = b"h2";

/// What all certificates of a process share: crypto, clock, and the verifier with its live view of the bundles.
#[derive(Clone, Debug)]
pub struct TlsContext {
    crypto: Arc<CryptoProvider>,
    clock: Arc<dyn Clock>,
    bundles: watch::Receiver<Arc<TrustBundles>>,
    verifier: Arc<PeerVerifier>,
    handshakes: Handshakes,
}

impl TlsContext {
    /// Prepares TLS for the identities of `source`.
    pub fn new(settings: &TlsSettings, source: &dyn IdentitySource, clock: Arc<dyn Clock>) -> Result<Self, IdentityError> {
        let crypto = settings.crypto()?;
        let bundles = source.bundle();
        let verifier = Arc::new(PeerVerifier::new(bundles.clone(), crypto.signature_verification_algorithms));
        let this = Self { crypto, clock, bundles, verifier, handshakes: Handshakes::default() };
        if settings.fips {
            this.prove_fips()?;
            tracing::info!(library = settings.provider.as_str(), "cryptography is by its module for FIPS 140, as approved");
        }
        Ok(this)
    }

    /// That what is made here for any certificate is as FIPS 140 asks, protocol and all: said at start, not in the first handshake.
    fn prove_fips(&self) -> Result<(), IdentityError> {
        let bad = |error: rustls::Error| IdentityError::Crypto(error.to_string());
        let client = self.clients().map_err(bad)?.with_no_client_auth();
        let server = self.servers().map_err(bad)?.with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
        match (client.fips(), server.fips()) {
            (true, true) => Ok(()),
            sides => Err(IdentityError::Crypto(format!("not as FIPS 140 asks: (client, server) are {sides:?}"))),
        }
    }

    /// What connects, but for its certificate.
    fn clients(&self) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, rustls::Error> {
        let builder = ClientConfig::builder_with_details(Arc::clone(&self.crypto), self.time());
        Ok(builder.with_protocol_versions(&[&TLS13])?.dangerous().with_custom_certificate_verifier(self.verifier.clone()))
    }

    /// What accepts, but for its certificate.
    fn servers(&self) -> Result<ConfigBuilder<ServerConfig, WantsServerCert>, rustls::Error> {
        let builder = ServerConfig::builder_with_details(Arc::clone(&self.crypto), self.time());
        Ok(builder.with_protocol_versions(&[&TLS13])?.with_client_cert_verifier(self.verifier.clone()))
    }

    fn time(&self) -> Arc<RustlsTime> {
        Arc::new(RustlsTime(Arc::clone(&self.clock)))
    }

    /// The clock certificates are judged by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// How long handshakes take.
    pub(crate) fn handshakes(&self) -> &Handshakes {
        &self.handshakes
    }

    /// The newest trust bundles.
    pub fn trusted(&self) -> Arc<TrustBundles> {
        Arc::clone(&self.bundles.borrow())
    }

    /// The newest trust bundles, and news of changes (for re-judging live connections with [`crate::Peer::still_trusted`]).
    pub fn bundles(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.bundles.clone()
    }
}

/// A workload's certificate, ready for handshakes.
pub struct Svid {
    /// Who it proves us to be.
    pub id: SpiffeId,
    /// The leaf first, then intermediates.
    pub chain: Arc<[CertificateDer<'static>]>,
    /// When it came.
    pub received: SystemTime,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Serial number, decimal.
    pub serial: String,
    /// For connecting. Does not know whom a connection expects: use [`crate::tls::connect`], which checks it.
    pub client: Arc<ClientConfig>,
    /// For accepting; demands a client certificate.
    pub server: Arc<ServerConfig>,
    pub(crate) verifier: Arc<PeerVerifier>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) handshakes: Handshakes,
}

impl Svid {
    /// Checks what an authority handed out for `id` and builds the TLS configurations.
    ///
    /// # Errors
    /// [`IdentityError::Unusable`]: another identity, an expired or unreadable certificate, or a key that is not its key.
    pub fn new(id: &SpiffeId, issued: IssuedSvid, tls: &TlsContext) -> Result<Self, IdentityError> {
        let unusable = |why: String| IdentityError::Unusable { id: id.to_string(), why };
        let first = issued.chain.first().ok_or_else(|| unusable("the chain is empty".into()))?;
        let leaf = leaf_of(first).map_err(|error| unusable(error.to_string()))?;
        if leaf.id != *id {
            return Err(unusable(format!("it is for {}", leaf.id)));
        }
        if leaf.not_after <= tls.clock.now() {
            return Err(unusable("it has expired already".into()));
        }
        Self::assemble(leaf, issued, tls).map_err(|error| unusable(error.to_string()))
    }

    /// Builds the configurations without judging the certificate (tests present bad ones with it).
    pub(crate) fn assemble(leaf: Leaf, issued: IssuedSvid, tls: &TlsContext) -> Result<Self, rustls::Error> {
        let chain: Arc<[CertificateDer<'static>]> = issued.chain.clone().into();
        let certified = CertifiedKey::from_der(issued.chain, issued.key, &tls.crypto)?;
        let certified = Arc::new(SingleCertAndKey::from(certified));

        let mut client = tls.clients()?.with_client_cert_resolver(certified.clone());
        client.alpn_protocols = vec![ALPN_H2.to_vec()];
        // Istio sends none: the name would leak the destination and nobody reads it.
        client.enable_sni = false;
        // A resumed session would skip the certificates, and with them revocation and the identity check. Tunnels are
        // long-lived, so there is little to win.
        client.resumption = Resumption::disabled();

        let mut server = tls.servers()?.with_cert_resolver(certified);
        server.alpn_protocols = vec![ALPN_H2.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        Ok(Self {
            id: leaf.id,
            chain,
            received: tls.clock.now(),
            not_before: leaf.not_before,
            not_after: leaf.not_after,
            serial: leaf.serial,
            client: Arc::new(client),
            server: Arc::new(server),
            verifier: Arc::clone(&tls.verifier),
            clock: Arc::clone(&tls.clock),
            handshakes: tls.handshakes.clone(),
        })
    }

    /// Whether peers would still accept it.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        now < self.not_after
    }
}

impl fmt::Debug for Svid {
    /// Without keys and configurations.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}
