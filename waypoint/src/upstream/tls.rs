//! TLS towards endpoints: one rustls configuration per policy, made once.
//!
//! Refuses to connect to whom it cannot verify: no name to check, roots or revocation lists that are missing or unreadable, a
//! client certificate that is not there. Only `insecureSkipVerify` turns verification off, and then nothing but the name and the chain.
use super::error::{Failure, UpstreamError};
use mesh_identity::revocation::{Revocation, Unknown};
use mesh_model::l7::destination::{ClientCertificate, RevocationLists, Roots, UpstreamTls};
use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a configuration made from files is used before they are read again.
const FILES_TTL: Duration = Duration::from_mins(1);
/// Configurations kept; beyond it all are made anew.
const CAPACITY: usize = 1024;

/// Configurations by policy and ALPN (`None`: none offered, else whether HTTP/2 is).
#[derive(Debug, Default)]
pub(super) struct TlsCache {
    made: Mutex<HashMap<Key, Made>>,
}
type Key = (Arc<UpstreamTls>, Option<bool>);
#[derive(Clone, Debug)]
struct Made {
    at: Instant,
    config: Arc<ClientConfig>,
}

impl TlsCache {
    /// Configuration and server name for a connection. `requested`: the host of the request, where the policy has no SNI.
    /// Files are read on a thread for that.
    pub async fn client(
        &self,
        tls: &Arc<UpstreamTls>,
        http2: Option<bool>,
        requested: Option<&str>,
    ) -> Result<(Arc<ClientConfig>, ServerName<'static>), UpstreamError> {
        let refuse = |why: String| UpstreamError::new(Failure::Connect, format!("TLS error: {why}"));
        let named = tls.sni.as_deref().or(requested);
        let verified_by_name = !tls.skip_verify && tls.sans.is_empty();
        let name = match named.map(|name| ServerName::try_from(name.to_owned())) {
            Some(Ok(name)) => name,
            Some(Err(_)) => return Err(refuse(format!("{:?} is no server name", named.unwrap_or_default()))),
            None if verified_by_name => return Err(refuse("no server name to verify".to_owned())),
            // Not sent and not compared; rustls wants one.
            None => ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into()),
        };
        let key = (Arc::clone(tls), http2);
        let from_files = matches!(tls.roots, Roots::File(_))
            || matches!(tls.crl, Some(RevocationLists::File(_)))
            || matches!(tls.client, Some(ClientCertificate::Files { .. }));
        if let Some(made) = self.made.lock().get(&key)
            && !(from_files && made.at.elapsed() >= FILES_TTL)
        {
            return Ok((Arc::clone(&made.config), name));
        }
        let policy = Arc::clone(tls);
        let config = tokio::task::spawn_blocking(move || configure(&policy, http2))
            .await
            .map_err(|e| refuse(e.to_string()))?
            .map_err(refuse)?;
        let config = Arc::new(config);
        let mut made = self.made.lock();
        if made.len() >= CAPACITY {
            made.clear();
        }
        made.insert(key, Made { at: Instant::now(), config: Arc::clone(&config) });
        Ok((config, name))
    }
}

/// Builds a configuration; reads files.
fn configure(tls: &UpstreamTls, http2: Option<bool>) -> Result<ClientConfig, String> {
    let crypto = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = verifier(tls, &crypto)?;
    let builder = ClientConfig::builder_with_provider(crypto)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match &tls.client {
        None => builder.with_no_client_auth(),
        Some(client) => {
            let (chain, key) = match client {
                ClientCertificate::Missing(why) => return Err(format!("client certificate: {why}")),
                ClientCertificate::Files { chain, key } => (read(chain)?, read(key)?),
                ClientCertificate::Pem(pair) => (pair.chain.as_bytes().to_vec(), pair.key.as_bytes().to_vec()),
            };
            let chain = certificates(&chain).map_err(|e| format!("client certificate: {e}"))?;
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| format!("client key: {e}"))?;
            builder.with_client_auth_cert(chain, key).map_err(|e| format!("client certificate: {e}"))?
        }
    };
    config.alpn_protocols = match http2 {
        _ if !tls.alpn.is_empty() => tls.alpn.iter().map(|p| p.as_bytes().to_vec()).collect(),
        Some(true) => vec![b"h2".to_vec()],
        Some(false) => vec![b"http/1.1".to_vec()],
        None => Vec::new(),
    };
    if tls.crl.is_some() {
        // A session that is resumed is not verified anew.
        config.resumption = Resumption::disabled();
    }
    Ok(config)
}

fn verifier(tls: &UpstreamTls, crypto: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, String> {
    let algorithms = crypto.signature_verification_algorithms;
    if tls.skip_verify {
        return Ok(Arc::new(Verifier { algorithms, accepted: Accepted::Anyone }));
    }
    let mut roots = RootCertStore::empty();
    let pem = match &tls.roots {
        Roots::Missing(why) => return Err(format!("roots: {why}")),
        Roots::System => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            None
        }
        Roots::File(path) => Some(read(path)?),
        Roots::Pem(text) => Some(text.as_bytes().to_vec()),
    };
    if let Some(pem) = pem {
        for root in certificates(&pem).map_err(|e| format!("roots: {e}"))? {
            roots.add(root).map_err(|e| format!("roots: {e}"))?;
        }
    }
    if roots.is_empty() {
        return Err("roots: there are none".to_owned());
    }
    let roots = Arc::new(roots);
    let lists = match &tls.crl {
        None => None,
        Some(RevocationLists::File(path)) => Some(read(path)?),
        Some(RevocationLists::Pem(text)) => Some(text.as_bytes().to_vec()),
    };
    // Envoy: who issued a certificate and has no list, or none that is in date, vouches for nobody.
    let lists = lists.map(|lists| Revocation::read(&lists, Unknown::Deny)).transpose();
    let lists = lists.map_err(|e| format!("revocation lists: {e}"))?;
    if tls.sans.is_empty() && lists.is_none() {
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(crypto)).build();
        return Ok(verifier.map_err(|e| e.to_string())?);
    }
    Ok(Arc::new(Verifier { algorithms, accepted: Accepted::Trusted { roots, lists, names: tls.sans.clone() } }))
}

fn read(path: &str) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|e| format!("{path}: {e}"))
}
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if all.is_empty() => Err("no certificate in it".to_owned()),
        all => all.map_err(|e| e.to_string()),
    }
}

/// In rustls' words, by which the server is told.
fn taken_back(error: webpki::Error) -> CertificateError {
    match error {
        webpki::Error::CertRevoked => CertificateError::Revoked,
        webpki::Error::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus,
        error => CertificateError::Other(OtherError(Arc::new(error))),
    }
}

/// Who is accepted where more is asked than that one name is of a trusted chain.
#[derive(Debug)]
struct Verifier {
    algorithms: WebPkiSupportedAlgorithms,
    accepted: Accepted,
}
#[derive(Debug)]
enum Accepted {
    /// A trusted chain that is on none of the lists, whose leaf has one of the names (DNS, address or URI), if there are any, or
    /// else the one of the server.
    Trusted { roots: Arc<RootCertStore>, lists: Option<Revocation>, names: Vec<Arc<str>> },
    /// `insecureSkipVerify`: whoever holds the key of the certificate shown.
    Anyone,
}
impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let (roots, lists, names) = match &self.accepted {
            Accepted::Anyone => return Ok(ServerCertVerified::assertion()),
            Accepted::Trusted { roots, lists, names } => (roots, lists, names),
        };
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, self.algorithms.all)?;
        if let Some(lists) = lists {
            lists.verify_server(leaf, intermediates, &roots.roots, &self.algorithms, now).map_err(taken_back)?;
        }
        if names.is_empty() {
            return verify_server_name(&parsed, server).map(|()| ServerCertVerified::assertion());
        }
        let has = |name: &str| {
            if name.contains("://") {
                return webpki::EndEntityCert::try_from(leaf).is_ok_and(|cert| cert.valid_uri_names().any(|uri| uri == name));
            }
            ServerName::try_from(name).is_ok_and(|name| verify_server_name(&parsed, &name).is_ok())
        };
        if names.iter().any(|name| has(name)) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::NotValidForName.into())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
