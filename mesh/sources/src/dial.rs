//! The way to a server that answers in JSON over HTTP: the Kubernetes API, a Consul agent.
//!
//! Owns addresses, what proves us and the server to each other, the connection, and the pieces of an answer. Roots, keys and
//! tokens are read whenever they are needed: whoever issues them replaces their files in place. Refuses a server whose
//! certificate does not name it. Downstream: [`crate::kubernetes`], [`crate::consul`].

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Uri};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use mesh_runtime::control_plane::chain;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Limit for a connection, and again for TLS.
const CONNECT: Duration = Duration::from_secs(10);
/// What programs of ours call themselves.
pub(crate) const AGENT: &str = concat!("culvert/", env!("CARGO_PKG_VERSION"));

/// A text that is there, or that a file has whenever it is needed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Text {
    Here(String),
    File(PathBuf),
}
impl Text {
    pub fn read(&self) -> Result<String, String> {
        match self {
            Self::Here(text) => Ok(text.clone()),
            Self::File(path) => std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display())),
        }
    }
}
impl fmt::Debug for Text {
    /// Without the text: it may be a token or a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(_) => f.write_str("Here"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

/// A server and our identity there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    pub host: String,
    pub port: u16,
    /// Before every path, without a slash at its end.
    pub prefix: String,
    pub tls: bool,
    /// Other name in its certificate.
    pub name: Option<String>,
    /// PEM.
    pub roots: Option<Text>,
    pub token: Option<Text>,
    /// Certificate chain and key, PEM.
    pub certificate: Option<(Text, Text)>,
}

/// A connection, as far as it got.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Server {
    /// The server of a URL, which proves nothing yet.
    pub fn at(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|e| format!("server {url}: {e}"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("server {url}: neither http nor https")),
        };
        Ok(Self {
            host: uri.host().ok_or("the server has no host")?.trim_matches(['[', ']']).to_owned(),
            port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            tls,
            name: None,
            roots: None,
            token: None,
            certificate: None,
        })
    }
    /// Host and port, as in a URL.
    pub fn authority(&self) -> String {
        match self.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(ip)) => format!("[{ip}]:{}", self.port),
            _ => format!("{}:{}", self.host, self.port),
        }
    }
    /// The name its certificate must have; none without TLS.
    pub fn tls_name(&self) -> Result<Option<ServerName<'static>>, String> {
        let name = self.name.as_ref().unwrap_or(&self.host);
        let named = || ServerName::try_from(name.clone()).map_err(|_| format!("{name} is no name of a server"));
        self.tls.then(named).transpose()
    }
    /// What proves us in a request.
    pub fn bearer(&self) -> Result<Option<HeaderValue>, String> {
        let Some(token) = &self.token else { return Ok(None) };
        let text = token.read().map_err(|e| format!("our token: {e}"))?;
        let mut value = HeaderValue::try_from(format!("Bearer {}", text.trim())).map_err(|_| "our token is no token")?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    /// A connection, and whether it speaks HTTP/2. `alpn`: what we speak over TLS, best first.
    pub async fn dial(&self, tls: Option<&ServerName<'static>>, alpn: &[&[u8]]) -> Result<(Box<dyn Stream>, bool), String> {
        let authority = self.authority();
        let late = |_| format!("{authority}: no connection in {CONNECT:?}");
        let connecting = TcpStream::connect((self.host.as_str(), self.port));
        let tcp = tokio::time::timeout(CONNECT, connecting).await.map_err(late)?.map_err(|e| format!("{authority}: {e}"))?;
        let _ = tcp.set_nodelay(true);
        let Some(name) = tls else { return Ok((Box::new(tcp), false)) };
        let connector = TlsConnector::from(Arc::new(self.tls_config(alpn)?));
        let handshake = tokio::time::timeout(CONNECT, connector.connect(name.clone(), tcp)).await;
        let stream = handshake.map_err(late)?.map_err(|e| format!("{authority}: {e}"))?;
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok((Box::new(stream), is_h2))
    }

    /// Made for every connection: files of roots and keys are replaced in place.
    fn tls_config(&self, alpn: &[&[u8]]) -> Result<ClientConfig, String> {
        let mut roots = RootCertStore::empty();
        let text = self.roots.as_ref().ok_or_else(|| format!("no roots say whom to believe that it is {}", self.authority()))?;
        let bad = |e: &dyn fmt::Display| format!("roots of the server: {e}");
        let pem = text.read().map_err(|e| bad(&e))?;
        for root in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            roots.add(root.map_err(|e| bad(&e))?).map_err(|e| bad(&e))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_root_certificates(roots);
        let mut config = match &self.certificate {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let bad = |e: &dyn fmt::Display| format!("our client certificate: {e}");
                let (chain, key) = (chain.read().map_err(|e| bad(&e))?, key.read().map_err(|e| bad(&e))?);
                let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain.as_bytes()).collect();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| bad(&e))?;
                builder.with_client_auth_cert(chain.map_err(|e| bad(&e))?, key).map_err(|e| bad(&e))?
            }
        };
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }
}

/// The whole body of an answer. `limit`: for each piece of it.
pub(crate) async fn whole(mut body: Incoming, largest: usize, limit: Duration) -> Result<Bytes, String> {
    let mut whole = BytesMut::new();
    while let Some(frame) = next_frame(&mut body, limit).await? {
        if whole.len() + frame.len() > largest {
            return Err(format!("an answer is larger than {largest} bytes"));
        }
        whole.extend_from_slice(&frame);
    }
    Ok(whole.freeze())
}

/// The next piece of a body.
pub(crate) async fn next_frame(body: &mut Incoming, limit: Duration) -> Result<Option<Bytes>, String> {
    loop {
        let frame = tokio::time::timeout(limit, body.frame()).await;
        let frame = frame.map_err(|_| format!("nothing came for {limit:?}"))?;
        match frame.transpose().map_err(|e| chain(&e))? {
            None => return Ok(None),
            Some(frame) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// As it may stand in a path or query.
pub(crate) fn escaped(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(b));
        } else {
            let _ = write!(out, "%{b:02X}");
        }
    }
    out
}

/// Between half and all of a pause: processes that lost one server do not come back at one time.
pub(crate) fn spread(pause: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let drawn = (RandomState::new().hash_one(0) % 1000) as u32;
    pause / 2 + pause / 2 * drawn / 1000
}
