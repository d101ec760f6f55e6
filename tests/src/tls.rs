//! A TLS server for pods that tells what it was shown (the name asked for, the protocol agreed on, the client's certificate),
//! and the other end of TLS.
//!
//! Owns: a listener, its threads, a certificate of its own making. Refuses: more than one request per connection.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use serde_json::json;

use crate::revocation;
use crate::topology::Place;

/// Number of every certificate.
const SERIAL: u64 = 1;

/// A self-made certificate and its key, PEM.
#[derive(Clone, Debug)]
pub struct OwnCert {
    /// Certificate; its own authority.
    pub cert: String,
    /// Key.
    pub key: String,
}

impl OwnCert {
    /// For these names.
    pub fn of(names: &[&str]) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
        params.serial_number = Some(SERIAL.into());
        Ok(Self { cert: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
    }
    /// A list of what it took back: itself, or a certificate that nobody has.
    pub fn list(&self, itself: bool) -> anyhow::Result<String> {
        let issuer = Issuer::new(CertificateParams::default(), KeyPair::from_pem(&self.key)?);
        Ok(revocation::list([if itself { SERIAL } else { SERIAL + 1 }], &issuer)?.pem()?)
    }
}

/// TLS from a place to whoever proves to be `name` by this very certificate. Reads and writes end after 20 s at the latest.
pub fn connect(
    place: &Place,
    to: SocketAddr,
    name: &str,
    own: &OwnCert,
) -> anyhow::Result<StreamOwned<ClientConnection, TcpStream>> {
    const LIMIT: Duration = Duration::from_secs(20);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(own.cert.as_bytes())?)?;
    let crypto = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(crypto).with_safe_default_protocol_versions()?;
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    let stream = place.netns.connect(to, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let tls = ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned())?)?;
    Ok(StreamOwned::new(tls, stream))
}

/// The server.
#[derive(Debug)]
pub struct TlsWeb {
    stop: Arc<AtomicBool>,
    place: Arc<Place>,
    port: u16,
}

impl TlsWeb {
    /// Listens in a pod; with `clients` only who shows a certificate of that authority is served.
    pub fn start(place: &Arc<Place>, port: u16, own: &OwnCert, clients: Option<&OwnCert>) -> anyhow::Result<Self> {
        let listener = place.listen(port)?;
        let crypto = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&crypto)).with_safe_default_protocol_versions()?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_slice(authority.cert.as_bytes())?)?;
                let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), crypto).build()?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = vec![CertificateDer::from_pem_slice(own.cert.as_bytes())?];
        let mut config = builder.with_single_cert(chain, PrivateKeyDer::from_pem_slice(own.key.as_bytes())?)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let stop = Arc::new(AtomicBool::new(false));
        let (config, ending, name) = (Arc::new(config), Arc::clone(&stop), place.name.clone());
        thread::spawn(move || accept(&listener, &config, &ending, &name));
        Ok(Self { stop, place: Arc::clone(place), port })
    }
}

impl Drop for TlsWeb {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _wakes_the_accept_loop = self.place.netns.connect(self.place.at(self.port), Duration::from_millis(200));
    }
}

fn accept(listener: &TcpListener, config: &Arc<ServerConfig>, stop: &AtomicBool, name: &str) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let (config, name) = (Arc::clone(config), name.to_owned());
        thread::spawn(move || {
            let _refused_is_fine = serve(stream, config, &name);
        });
    }
}

fn serve(stream: TcpStream, config: Arc<ServerConfig>, name: &str) -> anyhow::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut tls = StreamOwned::new(ServerConnection::new(config)?, stream);
    let mut head = Vec::new();
    let mut piece = [0; 4096];
    while !head.ends_with(b"\r\n\r\n") {
        let n = tls.read(&mut piece)?;
        anyhow::ensure!(n > 0, "ended inside the head");
        head.extend_from_slice(&piece[..n]);
    }
    let body = json!({
        "name": name,
        "sni": tls.conn.server_name(),
        "alpn": tls.conn.alpn_protocol().map(String::from_utf8_lossy),
        "client": tls.conn.peer_certificates().is_some_and(|chain| !chain.is_empty()),
        "head": String::from_utf8_lossy(&head),
    })
    .to_string();
    write!(tls, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    tls.conn.send_close_notify();
    tls.flush()?;
    Ok(())
}
