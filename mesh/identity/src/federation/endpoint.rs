//! Where a bundle is told, and who it must be that tells it.

use std::sync::Arc;

use http::Uri;
use mesh_runtime::control_plane::Roots;
use mesh_runtime::fetch;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::sync::watch;
use webpki::KeyUsage;
use x509_parser::extensions::GeneralName;

use crate::bundle::TrustBundles;
use crate::verify;

/// A bundle endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    host: String,
    port: u16,
    path: String,
    /// The id its certificate must have; without one it must be a server of the web of its name.
    id: Option<Box<str>>,
}

impl Endpoint {
    pub(super) fn parse(url: &str, id: Option<&str>) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|_| "its endpoint is no URL".to_owned())?;
        if uri.scheme_str() != Some("https") {
            return Err("its endpoint is no https:// URL".to_owned());
        }
        let host = uri.host().ok_or("its endpoint has no host")?.trim_matches(['[', ']']).to_owned();
        if id.is_some_and(|id| domain_of(id).is_none()) {
            return Err("the id of its endpoint is no SPIFFE id".to_owned());
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { host, port: uri.port_u16().unwrap_or(443), path, id: id.map(Into::into) })
    }

    /// What it says now.
    pub(super) async fn fetch(
        &self,
        crypto: &Arc<CryptoProvider>,
        roots: &Roots,
        bundles: &watch::Receiver<Arc<TrustBundles>>,
    ) -> Result<String, String> {
        fetch::get(&self.host, self.port, &self.path, self.tls(crypto, roots, bundles)?).await
    }

    fn tls(
        &self,
        crypto: &Arc<CryptoProvider>,
        roots: &Roots,
        bundles: &watch::Receiver<Arc<TrustBundles>>,
    ) -> Result<ClientConfig, String> {
        let verifier: Arc<dyn ServerCertVerifier> = if let Some(id) = &self.id {
            Arc::new(ByItsId { id: id.clone(), bundles: Arc::clone(&bundles.borrow()), crypto: Arc::clone(crypto) })
        } else {
            let roots = Arc::new(roots.load().map_err(|error| error.to_string())?);
            WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(crypto)).build().map_err(|error| error.to_string())?
        };
        let builder = ClientConfig::builder_with_provider(Arc::clone(crypto))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?;
        let mut config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// The trust domain of any SPIFFE id: those of endpoints are not of Istio's shape.
fn domain_of(id: &str) -> Option<&str> {
    let (domain, path) = id.strip_prefix("spiffe://")?.split_once('/')?;
    (!domain.is_empty() && !path.is_empty()).then_some(domain)
}

/// Whoever has a certificate with this id, of its trust domain as it is known now.
#[derive(Debug)]
struct ByItsId {
    id: Box<str>,
    bundles: Arc<TrustBundles>,
    crypto: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ByItsId {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refuse = |why: String| {
            let why = OtherError(Arc::new(std::io::Error::other(why)));
            rustls::Error::InvalidCertificate(CertificateError::Other(why))
        };
        let read = verify::parse(leaf).map_err(|error| refuse(error.to_string()))?;
        let names = read.subject_alternative_name().map_err(|error| refuse(error.to_string()))?;
        let ids: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        if ids != [&*self.id] {
            return Err(refuse(format!("it is {}, not {}", ids.join(", "), self.id)));
        }
        if verify::is_authority(&read).map_err(|error| refuse(error.to_string()))? {
            return Err(refuse(format!("{} is the certificate of an authority", self.id)));
        }
        let domain = domain_of(&self.id).unwrap_or_default();
        let Some(bundle) = self.bundles.find(domain) else {
            return Err(refuse(format!("no roots of {domain} are known yet")));
        };
        let (usage, algorithms) = (KeyUsage::server_auth(), &self.crypto.signature_verification_algorithms);
        verify::leads_to(bundle, self.bundles.revocation(), leaf, intermediates, usage, algorithms, now)
            .map_err(|error| refuse(error.to_string()))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(verify::tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.crypto.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.crypto.signature_verification_algorithms.supported_schemes()
    }
}
