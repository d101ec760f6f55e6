//! A token issuer: keys made at run time, tokens signed with them, and a server that publishes them (JWKS) and misbehaves on
//! request. Over TLS it shows a certificate of its own authority.
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};

use crate::topology::Place;

/// An RSA key tokens are signed with (RS256).
#[derive(Debug)]
pub struct SigningKey {
    id: String,
    pair: RsaKeyPair,
}
impl SigningKey {
    /// A new one.
    pub fn make(id: &str) -> anyhow::Result<Self> {
        Ok(Self { id: id.into(), pair: RsaKeyPair::generate(KeySize::Rsa2048).context("an RSA key")? })
    }
    /// Its public half.
    pub fn jwk(&self) -> Value {
        let public = self.pair.public_key();
        let text = |bytes: &[u8]| BASE64.encode(bytes);
        json!({
            "kty": "RSA", "use": "sig", "kid": self.id,
            "n": text(public.modulus().big_endian_without_leading_zero()),
            "e": text(public.exponent().big_endian_without_leading_zero()),
        })
    }
    /// A token with these claims.
    pub fn token(&self, claims: &Value) -> anyhow::Result<String> {
        self.token_with(&json!({ "alg": "RS256", "typ": "JWT", "kid": self.id }), claims)
    }
    /// A token with this header, whatever it says, signed as RS256.
    pub fn token_with(&self, header: &Value, claims: &Value) -> anyhow::Result<String> {
        let message = format!("{}.{}", BASE64.encode(header.to_string()), BASE64.encode(claims.to_string()));
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature).context("sign")?;
        Ok(format!("{message}.{}", BASE64.encode(signature)))
    }
}
/// A token as HS256 would sign it with `secret`.
pub fn hmac_token(header: &Value, claims: &Value, secret: &[u8]) -> String {
    let message = format!("{}.{}", BASE64.encode(header.to_string()), BASE64.encode(claims.to_string()));
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
    let signature = BASE64.encode(aws_lc_rs::hmac::sign(&key, message.as_bytes()).as_ref());
    format!("{message}.{signature}")
}
/// A JWKS of these keys.
pub fn jwks(keys: &[&SigningKey]) -> String {
    json!({ "keys": keys.iter().map(|k| k.jwk()).collect::<Vec<_>>() }).to_string()
}
/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

/// A name of every server that has a certificate of an [`Authority`].
pub const SERVER: &str = "issuer.example";

/// A certificate authority for servers outside the mesh.
#[derive(Debug)]
pub struct Authority {
    pem: String,
    issuer: rcgen::Issuer<'static, KeyPair>,
}
impl Authority {
    /// A new one.
    pub fn make() -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self { pem: params.self_signed(&key)?.pem(), issuer: rcgen::Issuer::new(params, key) })
    }
    /// Its certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }
    fn server(&self, ip: IpAddr) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::IpAddress(ip), SanType::DnsName(SERVER.try_into()?)];
        let chain = vec![CertificateDer::from(params.signed_by(&key, &self.issuer)?)];
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(Arc::new(builder.with_no_client_auth().with_single_cert(chain, key)?))
    }
}

/// How the server answers.
#[derive(Clone, Debug, Default)]
pub enum Manner {
    /// With the document.
    #[default]
    Well,
    /// With this status.
    Status(u16),
    /// After this time.
    Slowly(Duration),
    /// With as many spaces before the document.
    Padded(usize),
    /// With this instead.
    With(String),
}

#[derive(Debug, Default)]
struct State {
    document: Mutex<String>,
    manner: Mutex<Manner>,
    requests: AtomicUsize,
    stop: AtomicBool,
}
/// Publishes keys at `/jwks`, whatever the path. Ends when dropped.
#[derive(Debug)]
pub struct KeyServer {
    state: Arc<State>,
    place: Arc<Place>,
    port: u16,
}
impl KeyServer {
    /// Listens in a pod or on a host; over TLS with a certificate of `authority` for its address and [`SERVER`].
    pub fn start(place: &Arc<Place>, port: u16, authority: Option<&Authority>) -> anyhow::Result<Self> {
        let tls = authority.map(|a| a.server(place.v4.into())).transpose()?;
        let listener = place.netns.listen((Ipv6Addr::UNSPECIFIED, port).into())?;
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::spawn(move || accept(&listener, &shared, tls.as_ref()));
        Ok(Self { state, place: Arc::clone(place), port })
    }
    /// From now on these keys are published.
    pub fn publish(&self, keys: &[&SigningKey]) {
        *self.state.document.lock().unwrap_or_else(PoisonError::into_inner) = jwks(keys);
    }
    /// From now on it answers like this.
    pub fn behave(&self, manner: Manner) {
        *self.state.manner.lock().unwrap_or_else(PoisonError::into_inner) = manner;
    }
    /// Requests so far.
    pub fn requests(&self) -> usize {
        self.state.requests.load(Ordering::Relaxed)
    }
}
impl Drop for KeyServer {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        // Wakes the accept loop.
        let _gone = self.place.netns.connect(self.place.at(self.port), Duration::from_millis(200));
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>, tls: Option<&Arc<rustls::ServerConfig>>) {
    for stream in listener.incoming() {
        if state.stop.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let (state, tls) = (Arc::clone(state), tls.cloned());
        thread::spawn(move || {
            let _limited = stream.set_read_timeout(Some(Duration::from_secs(20)));
            let _client_went = match tls.map(rustls::ServerConnection::new) {
                None => serve(stream, &state),
                Some(Ok(conn)) => serve(rustls::StreamOwned::new(conn, stream), &state),
                Some(Err(error)) => Err(io::Error::other(error)),
            };
        });
    }
}
/// One request; the connection ends with its answer.
fn serve(stream: impl Read + Write, state: &State) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    state.requests.fetch_add(1, Ordering::Relaxed);
    let manner = state.manner.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut document = state.document.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut status = 200;
    match manner {
        Manner::Well => {}
        Manner::Status(other) => status = other,
        Manner::Slowly(time) => thread::sleep(time),
        Manner::Padded(spaces) => document.insert_str(0, &" ".repeat(spaces)),
        Manner::With(other) => document = other,
    }
    let head = format!("HTTP/1.1 {status} Some\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", document.len());
    let stream = reader.get_mut();
    stream.write_all(head.as_bytes())?;
    stream.write_all(document.as_bytes())?;
    stream.flush()
}
