//! Certificates of a gateway's listeners: from Secrets as they come with the mesh, or from files that are renewed in place.
//!
//! Owns the TLS configurations, built on the control thread. Refuses a key that does not fit its certificate: the listener
//! then answers nobody rather than with the wrong certificate; and to keep a configuration that asks clients for other
//! certificates than it should. Upstream: `listen::gateway`.
use arc_swap::ArcSwap;
use mesh_model::l7::destination::KeyPair;
use mesh_model::l7::gateway::{ClientCertificates, Listener, ListenerTls};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ResolvesServerCertUsingSni, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use std::collections::HashMap;
use std::sync::Arc;

/// TLS configurations by listener.
#[derive(Default)]
pub struct Certificates {
    ready: ArcSwap<HashMap<Arc<str>, Ready>>,
}
#[derive(Clone)]
struct Ready {
    /// What it was made from.
    pairs: Arc<[KeyPair]>,
    clients: Option<Arc<ClientCertificates>>,
    config: Arc<ServerConfig>,
}

impl Certificates {
    /// The configuration of a listener.
    pub fn find(&self, listener: &str) -> Option<Arc<ServerConfig>> {
        self.ready.load().get(listener).map(|r| Arc::clone(&r.config))
    }
    /// Builds what changed. A file that cannot be read, or a pair that does not fit, keeps what was there before, as long as it
    /// asks the same of clients.
    pub fn load(&self, listeners: &[Listener]) {
        let old = self.ready.load_full();
        let kept = |l: &Listener| {
            let before = old.get(&l.name).filter(|before| before.clients == l.clients)?;
            Some((Arc::clone(&l.name), before.clone()))
        };
        let mut new = HashMap::new();
        for l in listeners {
            let pairs: Arc<[KeyPair]> = match &l.tls {
                None | Some(ListenerTls::Passthrough) => continue,
                Some(ListenerTls::Terminate(pairs)) => pairs.as_slice().into(),
                Some(ListenerTls::Files { chain, key }) => match (read(chain), read(key)) {
                    (Ok(chain), Ok(key)) => [KeyPair { chain, key }].into(),
                    (Err(error), _) | (_, Err(error)) => {
                        tracing::error!(listener = %l.name, error, "certificate file");
                        new.extend(kept(l));
                        continue;
                    }
                },
            };
            if let Some(same) = kept(l).filter(|(_, before)| before.pairs == pairs) {
                new.extend([same]);
                continue;
            }
            match config(&pairs, l.clients.as_deref()) {
                Ok(config) => {
                    tracing::info!(listener = %l.name, "certificate loaded");
                    new.insert(Arc::clone(&l.name), Ready { pairs, clients: l.clients.clone(), config: Arc::new(config) });
                }
                Err(error) => {
                    tracing::error!(listener = %l.name, error, "certificate cannot be used");
                    new.extend(kept(l));
                }
            }
        }
        self.ready.store(Arc::new(new));
    }
}

fn read(path: &str) -> Result<Arc<str>, String> {
    std::fs::read_to_string(path).map(Into::into).map_err(|e| format!("{path}: {e}"))
}

/// A server configuration that offers HTTP/2 and HTTP/1.1, TLS 1.2 and 1.3.
fn config(pairs: &[KeyPair], clients: Option<&ClientCertificates>) -> Result<ServerConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = match clients {
        None => builder.with_no_client_auth(),
        Some(clients) => builder.with_client_cert_verifier(verifier(clients, &provider)?),
    };
    let keys = pairs.iter().map(|pair| certified(pair, &provider)).collect::<Result<Vec<_>, _>>()?;
    let resolver = Chosen::new(keys)?;
    let mut config = builder.with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    if clients.is_some() {
        // A session that is resumed is not verified anew.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(config)
}

/// Believes certificates of clients that come from these authorities.
fn verifier(clients: &ClientCertificates, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(clients.roots.as_bytes()) {
        let root = root.map_err(|e| format!("authority of clients: {e}"))?;
        roots.add(root).map_err(|e| format!("authority of clients: {e}"))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    if let Some(crl) = &clients.crl {
        let lists = CertificateRevocationListDer::pem_slice_iter(crl.as_bytes()).collect::<Result<Vec<_>, _>>();
        builder = builder.with_crls(lists.map_err(|e| format!("revocation list: {e}"))?).enforce_revocation_expiration();
    }
    if !clients.required {
        builder = builder.allow_unauthenticated();
    }
    builder.build().map_err(|e| format!("authorities of clients: {e}"))
}

fn certified(pair: &KeyPair, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(pair.chain.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| format!("certificate: {e}"))?;
    if chain.is_empty() {
        return Err("no certificate in the chain".into());
    }
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).map_err(|e| format!("private key: {e}"))?;
    let key = CertifiedKey::from_der(chain, key, provider).map_err(|e| format!("certificate and key: {e}"))?;
    Ok(Arc::new(key))
}

/// Of several certificates the first whose names fit the one asked for, else the first.
#[derive(Debug)]
struct Chosen {
    first: Arc<CertifiedKey>,
    all: Vec<Arc<CertifiedKey>>,
}
impl Chosen {
    fn new(all: Vec<Arc<CertifiedKey>>) -> Result<Self, String> {
        Ok(Self { first: Arc::clone(all.first().ok_or("no certificate")?), all })
    }
}
impl rustls::server::ResolvesServerCert for Chosen {
    fn resolve(&self, hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if self.all.len() == 1 {
            return Some(Arc::clone(&self.first));
        }
        let name = hello.server_name().unwrap_or_default().to_owned();
        let fits = |key: &&Arc<CertifiedKey>| ResolvesServerCertUsingSni::new().add(&name, CertifiedKey::clone(key)).is_ok();
        Some(Arc::clone(self.all.iter().find(fits).unwrap_or(&self.first)))
    }
}

#[cfg(test)]
mod tests;
