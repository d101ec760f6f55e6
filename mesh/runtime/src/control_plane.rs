//! The way to a control plane: a gRPC channel over TLS, or over a Unix socket to an agent of this node.
//!
//! Kubernetes replaces files in place: the roots are read at every connection and the token for every request, so that a
//! rotation of either needs no restart. Owns addresses, roots, tokens, keepalive. Refuses: a server whose certificate
//! names neither the host of the address nor the alternative one; plaintext, unless the address says `http`. What is
//! said over the channel is the caller's. Downstream: the istiod source, the Istio CA client, the SPIRE clients.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::{Channel, Endpoint};

/// Limit for a connection, TLS included (node-agent §1.8).
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// HTTP/2 pings over TCP, also without a request under way.
const PING: Duration = Duration::from_secs(30);
/// How long a ping may stay unanswered.
const PING_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of one stream and of a connection on their way to us: a first push is large.
const WINDOWS: (u32, u32) = (4 << 20, 8 << 20);

/// Whom to believe that it is the control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// A PEM file, read at every connection.
    File(PathBuf),
    /// What the machine trusts.
    System,
    /// The certificates themselves.
    Pem(String),
}

impl FromStr for Roots {
    type Err = std::convert::Infallible;
    /// As in `XDS_ROOT_CA`: `SYSTEM`, PEM text, else a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "SYSTEM" => Self::System,
            pem if pem.contains("-----BEGIN") => Self::Pem(pem.to_owned()),
            path => Self::File(path.into()),
        })
    }
}

/// How we prove who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// Not at all.
    None,
    /// By the content of a file, read for every request; a file that is not there fails the request.
    File(PathBuf),
    /// By the content of a file where there is one.
    IfThere(PathBuf),
    /// By this text.
    Literal(String),
}

impl FromStr for Token {
    type Err = std::convert::Infallible;
    /// As in `AUTH_TOKEN`: a path, else the token itself.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_path = text.starts_with(['/', '.']) || Path::new(text).exists();
        Ok(if is_path { Self::File(text.into()) } else { Self::Literal(text.to_owned()) })
    }
}

impl fmt::Debug for Token {
    /// Without the text itself.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::File(path) | Self::IfThere(path) => write!(f, "{}", path.display()),
            Self::Literal(_) => f.write_str("(literal)"),
        }
    }
}

/// Why there is no control plane.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A setting that can never work.
    #[error("{0}")]
    Setting(String),
    /// The roots cannot be used now.
    #[error("roots of the control plane: {0}")]
    Roots(String),
    /// The token cannot be read now.
    #[error("token for the control plane: {0}")]
    Token(String),
    /// No connection.
    #[error("{address}: {why}")]
    Unreachable {
        /// Who was dialled.
        address: String,
        /// What happened.
        why: String,
    },
}

/// Where and how a control plane is reached.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `https://host:port`, `http://host:port` (plaintext) or `unix:/path`.
    pub address: String,
    /// Whom to believe.
    pub roots: Roots,
    /// A second name its certificate may have.
    pub alt_hostname: Option<String>,
    /// How we prove who asks.
    pub token: Token,
    /// Sent with every request.
    pub headers: Vec<(String, String)>,
}

/// Where Kubernetes puts the token for istiod.
const ISTIO_TOKEN: &str = "./var/run/secrets/tokens/istio-token";

impl Settings {
    /// istiod, as its proxies reach it (node-agent §1.16): with the pod's token unless another is given, the name of the cluster,
    /// and the variables of `environment` that begin with `prefix` as headers.
    pub fn of_istiod(
        address: &str,
        roots: &Roots,
        alt_hostname: Option<&String>,
        token: Option<&Token>,
        cluster: &str,
        (prefix, environment): (&str, impl IntoIterator<Item = (String, String)>),
    ) -> Self {
        let named = |(key, value): (String, String)| Some((key.strip_prefix(prefix)?.to_owned(), value));
        let mut headers: Vec<(String, String)> = environment.into_iter().filter_map(named).collect();
        if !cluster.is_empty() {
            headers.push(("clusterid".to_owned(), cluster.to_owned()));
        }
        Self {
            address: address.to_owned(),
            roots: roots.clone(),
            alt_hostname: alt_hostname.cloned(),
            token: token.cloned().unwrap_or_else(|| Token::IfThere(PathBuf::from(ISTIO_TOKEN))),
            headers,
        }
    }
}

/// A control plane, as its settings describe it; nothing is connected. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: String,
    to: Address,
    roots: Roots,
    alt: Option<ServerName<'static>>,
    token: Token,
    headers: Vec<(AsciiMetadataKey, AsciiMetadataValue)>,
    crypto: Arc<CryptoProvider>,
}

#[derive(Clone, Debug)]
enum Address {
    Unix(PathBuf),
    Tcp { host: String, port: u16, tls: Option<ServerName<'static>>, origin: Uri },
}

impl ControlPlane {
    /// Checks the settings; `crypto` carries the handshakes.
    pub fn new(settings: Settings, crypto: Arc<CryptoProvider>) -> Result<Self, ControlError> {
        let name = |host: &str| {
            let bare = host.trim_start_matches('[').trim_end_matches(']');
            ServerName::try_from(bare.to_owned()).map_err(|e| ControlError::Setting(format!("{host:?} is not a host: {e}")))
        };
        let header = |(key, value): &(String, String)| {
            let bad = || ControlError::Setting(format!("{key:?} cannot be a header of a request"));
            let key = AsciiMetadataKey::from_bytes(key.to_ascii_lowercase().as_bytes()).map_err(|_| bad())?;
            Ok((key, AsciiMetadataValue::try_from(value.as_str()).map_err(|_| bad())?))
        };
        let to = Address::parse(&settings.address, name)?;
        let alt = settings.alt_hostname.as_deref().filter(|alt| !alt.is_empty()).map(name).transpose()?;
        let headers = settings.headers.iter().map(header).collect::<Result<_, ControlError>>()?;
        let Settings { address, roots, token, .. } = settings;
        Ok(Self { inner: Arc::new(Inner { address, to, roots, alt, token, headers, crypto }) })
    }

    /// The address, for logs.
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    /// A new connection.
    pub async fn connect(&self) -> Result<Channel, ControlError> {
        let endpoint = self.endpoint()?;
        let connecting = endpoint.connect_with_connector(self.connector());
        connecting.await.map_err(|e| self.unreachable(&chain(&e)))
    }

    /// A channel that connects when it is used, and again when its connection was lost.
    pub fn connect_lazily(&self) -> Result<Channel, ControlError> {
        Ok(self.endpoint()?.connect_with_connector_lazy(self.connector()))
    }

    /// A request with the token of now and the headers of the settings.
    pub fn request<T>(&self, message: T) -> Result<tonic::Request<T>, ControlError> {
        let mut request = tonic::Request::new(message);
        let metadata = request.metadata_mut();
        for (key, value) in &self.inner.headers {
            metadata.insert(key.clone(), value.clone());
        }
        if let Some(token) = self.token()? {
            let mut value = AsciiMetadataValue::try_from(format!("Bearer {token}"))
                .map_err(|_| ControlError::Token("it has characters a header cannot have".into()))?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        Ok(request)
    }

    fn token(&self) -> Result<Option<String>, ControlError> {
        let read = |path: &PathBuf| match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(e) => Err((e.kind(), ControlError::Token(format!("{}: {e}", path.display())))),
        };
        match &self.inner.token {
            Token::None => Ok(None),
            Token::Literal(text) => Ok(Some(text.clone())),
            Token::File(path) => read(path).map_err(|(_, e)| e),
            Token::IfThere(path) => read(path).or_else(|(kind, e)| match kind {
                std::io::ErrorKind::NotFound => Ok(None),
                _ => Err(e),
            }),
        }
    }

    fn endpoint(&self) -> Result<Endpoint, ControlError> {
        // The scheme is `http` for tonic whatever it is: TLS is our connector's business.
        let (at, origin) = match &self.inner.to {
            Address::Unix(_) => ("http://localhost".to_owned(), None),
            Address::Tcp { host, port, origin, .. } => (format!("http://{host}:{port}"), Some(origin.clone())),
        };
        let bad = |e: tonic::transport::Error| ControlError::Setting(format!("{}: {}", self.inner.address, chain(&e)));
        let endpoint = Endpoint::from_shared(at)
            .map_err(bad)?
            .user_agent(concat!("culvert/", env!("CARGO_PKG_VERSION")))
            .map_err(bad)?
            .connect_timeout(CONNECT_LIMIT)
            .initial_stream_window_size(WINDOWS.0)
            .initial_connection_window_size(WINDOWS.1);
        let Some(origin) = origin else {
            // The kernel tells when the other side of a socket is gone; and servers of gRPC hang up on who pings as often as this.
            return Ok(endpoint);
        };
        let endpoint = endpoint.http2_keep_alive_interval(PING).keep_alive_timeout(PING_LIMIT).keep_alive_while_idle(true);
        Ok(endpoint.origin(origin))
    }

    fn connector(
        &self,
    ) -> impl tower::Service<Uri, Response = TokioIo<BoxedStream>, Error = ControlError, Future: Send> + Send + 'static {
        let this = self.clone();
        tower::service_fn(move |_| {
            let this = this.clone();
            async move { this.dial().await.map(TokioIo::new) }
        })
    }

    async fn dial(&self) -> Result<BoxedStream, ControlError> {
        let (host, port, tls) = match &self.inner.to {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(|e| self.unreachable(&e.to_string()))?;
                return Ok(Box::new(stream));
            }
            Address::Tcp { host, port, tls, .. } => (host.trim_start_matches('[').trim_end_matches(']'), *port, tls),
        };
        let late = |_| self.unreachable("no connection in time");
        let connecting = TcpStream::connect((host, port));
        let tcp = timeout(CONNECT_LIMIT, connecting).await.map_err(late)?.map_err(|e| self.unreachable(&e.to_string()))?;
        let keepalive =
            TcpKeepalive::new().with_time(Duration::from_mins(5)).with_interval(Duration::from_secs(75)).with_retries(9);
        // Without these it is only slower to notice a dead peer; the pings do too.
        let _ = tcp.set_nodelay(true).and_then(|()| SockRef::from(&tcp).set_tcp_keepalive(&keepalive));
        let Some(name) = tls else { return Ok(Box::new(tcp)) };
        let config = Arc::new(self.tls()?);
        let handshake = TlsConnector::from(config).connect(name.clone(), tcp);
        let stream = timeout(CONNECT_LIMIT, handshake).await.map_err(late)?;
        Ok(Box::new(stream.map_err(|e| self.unreachable(&e.to_string()))?))
    }

    /// Built for every connection: the roots may have changed.
    fn tls(&self) -> Result<ClientConfig, ControlError> {
        let crypto = &self.inner.crypto;
        let bad = |e: &dyn fmt::Display| ControlError::Roots(e.to_string());
        let roots = Arc::new(self.inner.roots.load()?);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(crypto)).build().map_err(|e| bad(&e))?;
        let verifier = Arc::new(EitherName { verifier, alt: self.inner.alt.clone() });
        let mut config = ClientConfig::builder_with_provider(Arc::clone(crypto))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| bad(&e))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    fn unreachable(&self, why: &str) -> ControlError {
        ControlError::Unreachable { address: self.inner.address.clone(), why: why.to_owned() }
    }
}

/// What a connection is made of.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
type BoxedStream = Box<dyn Stream>;

impl Address {
    fn parse(text: &str, name: impl Fn(&str) -> Result<ServerName<'static>, ControlError>) -> Result<Self, ControlError> {
        if let Some(path) = text.strip_prefix("unix:") {
            // `unix:/path` and `unix:///path` are the same socket (SPIFFE Workload Endpoint §4).
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(ControlError::Setting(format!("{text}: the path of a socket is absolute")));
            }
            return Ok(Self::Unix(path.into()));
        }
        let bad =
            |why: &str| ControlError::Setting(format!("{text}: {why}; write for example https://istiod.istio-system.svc:15012"));
        // Istio writes addresses of istiod without a scheme, and means TLS.
        let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
        let uri: Uri = whole.parse().map_err(|_| bad("it is not an address"))?;
        let (scheme, host) = (uri.scheme_str().unwrap_or_default(), uri.host().ok_or_else(|| bad("it names no host"))?);
        let (tls, default) = match scheme {
            "https" => (Some(name(host)?), 443),
            "http" => (None, 80),
            _ => return Err(bad("the scheme is neither https nor http nor unix")),
        };
        let origin = uri.clone();
        Ok(Self::Tcp { host: host.to_owned(), port: uri.port_u16().unwrap_or(default), tls, origin })
    }
}

impl Roots {
    /// Reads them, now.
    ///
    /// # Errors
    /// They cannot be read, or there are none.
    pub fn load(&self) -> Result<RootCertStore, ControlError> {
        let mut store = RootCertStore::empty();
        let (from, pem) = match self {
            Self::System => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                ("the machine's roots".to_owned(), Vec::new())
            }
            Self::Pem(text) => ("the PEM of the settings".to_owned(), text.clone().into_bytes()),
            Self::File(path) => {
                let from = path.display().to_string();
                let text = std::fs::read(path).map_err(|e| ControlError::Roots(format!("{from}: {e}")))?;
                (from, text)
            }
        };
        for root in CertificateDer::pem_slice_iter(&pem) {
            let root = root.map_err(|e| ControlError::Roots(format!("{from}: {e}")))?;
            store.add(root).map_err(|e| ControlError::Roots(format!("{from}: {e}")))?;
        }
        if store.is_empty() { Err(ControlError::Roots(format!("{from}: no certificate in it"))) } else { Ok(store) }
    }
}

/// The usual rules, for the name dialled or the alternative one.
#[derive(Debug)]
struct EitherName {
    verifier: Arc<WebPkiServerVerifier>,
    alt: Option<ServerName<'static>>,
}

impl ServerCertVerifier for EitherName {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let judge = |name: &ServerName<'_>| self.verifier.verify_server_cert(leaf, intermediates, name, ocsp, now);
        match (judge(name), &self.alt) {
            (
                Err(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
                )),
                Some(alt),
            ) => judge(alt),
            (judged, _) => judged,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// An error with its causes: those of gRPC say what happened in the last of them only.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
