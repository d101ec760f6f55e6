//! HBONE spoken by the harness itself: a client as a node agent is one, and the end a node agent is. Straight on `h2` and
//! `tokio-rustls`, so that a mistake in the product's own tunnel code is not made on both sides.
//!
//! Refuses: pooling, identity checks (whoever answers is taken; who may answer is for other suites to test).
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, ready};

use anyhow::{Context, ensure};
use bytes::{Buf, Bytes};
use h2::{RecvStream, SendStream, client, server};
use http::{Method, Request, Response, StatusCode, Version};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::dev_ca::Credentials;

const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 4 << 20;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// TLS 1.3 with ALPN `h2` and this client certificate.
pub fn client_tls(credentials: &Credentials) -> anyhow::Result<TlsConnector> {
    client_tls_by(credentials, rustls::crypto::aws_lc_rs::default_provider())
}

/// The same, by these algorithms.
pub fn client_tls_by(credentials: &Credentials, algorithms: CryptoProvider) -> anyhow::Result<TlsConnector> {
    let (cert, key) = credentials.der()?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(algorithms))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider())))
        .with_client_auth_cert(vec![cert], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// TLS 1.3 with ALPN `h2`, this certificate, and a client certificate of the same root demanded.
pub fn server_tls(credentials: &Credentials) -> anyhow::Result<TlsAcceptor> {
    use rustls::pki_types::pem::PemObject as _;
    let (cert, key) = credentials.der()?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(credentials.root.as_bytes())?)?;
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![cert], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);
impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signature, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// One connection of tunnels. Clones share it.
#[derive(Clone)]
pub struct Tunnel(client::SendRequest<Bytes>);

impl Tunnel {
    /// Connects, proves who we are, and speaks HTTP/2.
    pub async fn connect(to: SocketAddr, tls: &TlsConnector) -> anyhow::Result<Self> {
        let tcp = TcpStream::connect(to).await.with_context(|| format!("connect to {to}"))?;
        tcp.set_nodelay(true)?;
        let tls = tls.connect(ServerName::IpAddress(to.ip().into()), tcp).await.context("TLS")?;
        let (requests, connection) = client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .enable_push(false)
            .handshake(tls)
            .await
            .context("HTTP/2")?;
        tokio::spawn(async move {
            // Streams on it see how it ended.
            let _ended = connection.await;
        });
        Ok(Self(requests))
    }

    /// CONNECT; anything but 200 is an error.
    pub async fn open(&self, authority: &str) -> anyhow::Result<Stream> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = authority.parse()?;
        let mut requests = self.0.clone().ready().await?;
        let (response, send) = requests.send_request(request, false)?;
        let response = response.await.with_context(|| format!("CONNECT {authority}"))?;
        ensure!(response.status() == StatusCode::OK, "CONNECT {authority} is answered {}", response.status());
        Ok(Stream { send, recv: response.into_body(), left: Bytes::new() })
    }
}

/// Accepts tunnels on one TCP connection, each CONNECT answered 200 and handed to `serve`.
pub async fn accept<F>(tcp: TcpStream, tls: &TlsAcceptor, serve: F) -> anyhow::Result<()>
where
    F: Fn(Stream),
{
    tcp.set_nodelay(true)?;
    let tls = tls.accept(tcp).await.context("TLS")?;
    let mut connection = server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(10_000)
        .handshake(tls)
        .await
        .context("HTTP/2")?;
    while let Some(next) = connection.accept().await {
        let (request, mut respond) = next?;
        if request.method() != Method::CONNECT {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
            continue;
        }
        let send = respond.send_response(Response::new(()), false)?;
        serve(Stream { send, recv: request.into_body(), left: Bytes::new() });
    }
    Ok(())
}

/// The bytes of one CONNECT.
pub struct Stream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    left: Bytes,
}

fn broken(error: h2::Error) -> io::Error {
    match error.reason() {
        Some(reason) if !error.is_io() => io::Error::new(io::ErrorKind::ConnectionReset, format!("stream reset: {reason}")),
        _ => error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.left.is_empty() {
            match ready!(self.recv.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                Some(Ok(data)) => {
                    self.recv.flow_control().release_capacity(data.len()).map_err(broken)?;
                    self.left = data;
                }
            }
        }
        let n = self.left.len().min(out.remaining());
        out.put_slice(&self.left[..n]);
        self.left.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.send.reserve_capacity(bytes.len());
        let room = match self.send.capacity() {
            0 => match ready!(self.send.poll_capacity(cx)) {
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Some(room) => room.map_err(broken)?,
            },
            room => room,
        };
        let n = room.min(bytes.len());
        self.send.send_data(Bytes::copy_from_slice(&bytes[..n]), false).map_err(broken)?;
        Poll::Ready(Ok(n))
    }
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(broken))
    }
}
