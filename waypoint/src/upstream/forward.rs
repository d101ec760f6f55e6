//! Connections of bytes through endpoints that are proxies themselves (`tunnel` of a DestinationRule): one CONNECT or POST each, on
//! a connection of its own, in the version of HTTP that is spoken to the endpoint.
//!
//! Refuses any answer but one of 200 to 299, and one that does not come within the destination's connect timeout. Upstream:
//! [`super::send::connect`]. Downstream: [`super::transport`].
use super::error::{Failure, UpstreamError};
use super::pool::{builder, http2_builder};
use super::transport::Stream;
use crate::body::{Body, BodyError};
use bytes::{Buf as _, Bytes, BytesMut};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Uri, Version, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::TokioIo;
use mesh_model::l7::destination::{ForwardTunnel, PoolLimits};
use mesh_spans::Duplex;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, DuplexStream, ReadBuf, duplex};
use tokio::sync::oneshot;
use tokio::time::Sleep;

/// What of an upload may wait to be sent.
const UPLOAD: usize = 64 << 10;
/// Of which so much is sent at once.
const PIECE: usize = 16 << 10;
/// How long what is left may take to be sent: a proxy that takes nothing must not keep the connection's place for ever.
const LEFT: Duration = Duration::from_secs(10);

/// A connection through another proxy.
pub struct Forwarded {
    io: Box<dyn Duplex>,
    /// What was read of it before anybody wanted it.
    ahead: Bytes,
    /// HTTP/2 ends a connection that nobody may ask for anything more.
    _asker: Option<SendRequest<Body>>,
    /// Tells what is under the connection that nobody wants it any more, whatever it has left to send.
    give_up: Option<oneshot::Sender<()>>,
    /// Whether everything was given to be sent.
    is_shut: bool,
}
impl Drop for Forwarded {
    /// One that is given up in the middle ends with its connection: an end of its stream would look like that of the whole.
    fn drop(&mut self) {
        if let Some(give_up) = self.give_up.take()
            && !self.is_shut
        {
            let _ended_already = give_up.send(());
        }
    }
}

/// What is under the connection: fails once nobody wants that any more. (HTTP/2's own tasks wait for a proxy that takes nothing as long
/// as that does.)
struct Wanted<I> {
    io: I,
    given_up: Option<oneshot::Receiver<()>>,
    /// Until when what is left may be sent.
    left: Option<Pin<Box<Sleep>>>,
    is_over: bool,
}
impl<I> Wanted<I> {
    /// Whether it is still wanted; its task is told when it is not.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(given_up) = &mut self.given_up
            && let Poll::Ready(said) = Pin::new(given_up).poll(cx)
        {
            self.given_up = None;
            self.is_over = said.is_ok();
            self.left = Some(Box::pin(tokio::time::sleep(LEFT)));
        }
        self.is_over |= self.left.as_mut().is_some_and(|left| left.as_mut().poll(cx).is_ready());
        if self.is_over { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }
}
impl<I: AsyncRead + Unpin> AsyncRead for Wanted<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}
impl<I: AsyncWrite + Unpin> AsyncWrite for Wanted<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
impl std::fmt::Debug for Forwarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forwarded").field("ahead", &self.ahead.len()).finish_non_exhaustive()
    }
}
impl Forwarded {
    /// Resolves when there is something to read, or its end. Nothing is lost.
    pub(crate) async fn readable(&mut self) {
        if self.ahead.is_empty() {
            let mut buf = BytesMut::with_capacity(PIECE);
            // An error shows again at the read.
            let _ended = self.io.read_buf(&mut buf).await;
            self.ahead = buf.freeze();
        }
    }
}

/// Has the proxy at the end of `stream` connect to the target. `secure`: there is TLS around it.
pub(super) async fn through(
    stream: Stream,
    tunnel: &ForwardTunnel,
    (http2, secure): (bool, bool),
    limits: &PoolLimits,
) -> Result<Forwarded, UpstreamError> {
    match tokio::time::timeout(limits.connect_timeout, ask(stream, tunnel, (http2, secure), limits)).await {
        Ok(asked) => asked,
        Err(_) => Err(UpstreamError::new(Failure::ConnectTimeout, "connection timeout: no answer of the proxy")),
    }
}

async fn ask(
    stream: Stream,
    tunnel: &ForwardTunnel,
    (http2, secure): (bool, bool),
    limits: &PoolLimits,
) -> Result<Forwarded, UpstreamError> {
    let failed = |e: hyper::Error| UpstreamError::new(Failure::Connect, format!("the proxy: {e}"));
    let (give_up, given_up) = oneshot::channel();
    let io = TokioIo::new(Wanted { io: stream.into_io(), given_up: Some(given_up), left: None, is_over: false });
    let whole = Arc::<AtomicBool>::default();
    let (body, upload) = if tunnel.post {
        let (ours, theirs) = duplex(UPLOAD);
        let upload = Upload { bytes: theirs, spare: BytesMut::new(), whole: Arc::clone(&whole) };
        (Body::Boxed(UnsyncBoxBody::new(upload)), Some(ours))
    } else {
        (Body::Empty, None)
    };
    let request = question(tunnel, (http2, secure), body)?;
    let (answer, asker) = if http2 {
        let (mut sender, connection) = http2_builder(limits).handshake(io).await.map_err(failed)?;
        tokio::spawn(connection);
        (sender.send_request(request).await, Some(sender))
    } else {
        let (mut sender, connection) = builder().handshake(io).await.map_err(failed)?;
        tokio::spawn(connection.with_upgrades());
        (sender.send_request(request).await, None)
    };
    let answer = answer.map_err(failed)?;
    if !answer.status().is_success() {
        return Err(UpstreamError::new(Failure::Connect, format!("the proxy answered {}", answer.status().as_u16())));
    }
    let io: Box<dyn Duplex> = match upload {
        None => Box::new(TokioIo::new(hyper::upgrade::on(answer).await.map_err(failed)?)),
        Some(upload) => Box::new(Posted { upload, whole, download: answer.into_body(), left: Bytes::new() }),
    };
    Ok(Forwarded { io, ahead: Bytes::new(), _asker: asker, give_up: Some(give_up), is_shut: false })
}

/// What the proxy is asked.
fn question(tunnel: &ForwardTunnel, (http2, secure): (bool, bool), body: Body) -> Result<Request<Body>, UpstreamError> {
    let bad = |e: http::Error| UpstreamError::new(Failure::Connect, format!("{}: {e}", tunnel.target));
    let authority = Authority::try_from(&*tunnel.target).map_err(|e| bad(e.into()))?;
    let method = if tunnel.post { Method::POST } else { Method::CONNECT };
    let uri = if !tunnel.post {
        Uri::from(authority)
    } else if http2 {
        let scheme = if secure { Scheme::HTTPS } else { Scheme::HTTP };
        Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build().map_err(bad)?
    } else {
        Uri::from(PathAndQuery::from_static("/"))
    };
    let mut request = Request::builder().method(method).uri(uri);
    request = if http2 { request.version(Version::HTTP_2) } else { request.header(header::HOST, &*tunnel.target) };
    request.body(body).map_err(bad)
}

/// What the client sends, as the body of a POST.
struct Upload {
    bytes: DuplexStream,
    /// Room for what comes: small pieces share it.
    spare: BytesMut,
    /// Its end is the end, and not because the connection was given up.
    whole: Arc<AtomicBool>,
}
impl HttpBody for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.spare.capacity() < PIECE / 16 {
            this.spare.reserve(PIECE);
        }
        // `read_buf` keeps no state between polls.
        Poll::Ready(match ready!(pin!(this.bytes.read_buf(&mut this.spare)).poll(cx)) {
            Ok(0) if this.whole.load(Relaxed) => None,
            Ok(0) | Err(_) => Some(Err(BodyError::Gone("given up"))),
            Ok(_) => Some(Ok(Frame::data(this.spare.split().freeze()))),
        })
    }
}

/// The two bodies of a POST.
struct Posted {
    upload: DuplexStream,
    whole: Arc<AtomicBool>,
    download: Incoming,
    /// What of the last frame is not yet read.
    left: Bytes,
}
impl AsyncRead for Posted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.left.is_empty() {
            match ready!(Pin::new(&mut self.download).poll_frame(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Ok(frame)) => self.left = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error))),
            }
        }
        take(&mut self.left, buf);
        Poll::Ready(Ok(()))
    }
}
impl AsyncWrite for Posted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.upload).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.upload).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.whole.store(true, Relaxed);
        Pin::new(&mut self.upload).poll_shutdown(cx)
    }
}

/// Reads what there is room for.
fn take(from: &mut Bytes, buf: &mut ReadBuf<'_>) {
    let some = from.len().min(buf.remaining());
    buf.put_slice(from.get(..some).unwrap_or_default());
    from.advance(some);
}

impl AsyncRead for Forwarded {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ahead.is_empty() {
            return Pin::new(&mut this.io).poll_read(cx, buf);
        }
        take(&mut this.ahead, buf);
        Poll::Ready(Ok(()))
    }
}
impl AsyncWrite for Forwarded {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let shut = ready!(Pin::new(&mut this.io).poll_shutdown(cx));
        this.is_shut = shut.is_ok();
        Poll::Ready(shut)
    }
    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
