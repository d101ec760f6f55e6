//! A gRPC server made of HTTP/2 frames and nothing of the product: what it answers, and when it falls silent or hangs up, is
//! the test's to say.
//!
//! Owns: a listener (TCP, with or without TLS, or a Unix socket), a thread with a runtime. Refuses: compression.
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, bail};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use mesh_proto::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// One call of a client.
#[derive(Debug)]
pub struct Call {
    /// `/service/Method`.
    pub path: String,
    /// What came with it.
    pub headers: HeaderMap,
    body: RecvStream,
    buffer: BytesMut,
    respond: SendResponse<Bytes>,
    send: Option<h2::SendStream<Bytes>>,
}

impl Call {
    fn new(request: Request<RecvStream>, respond: SendResponse<Bytes>) -> Self {
        let (head, body) = request.into_parts();
        let path = head.uri.path().to_owned();
        Self { path, headers: head.headers, body, buffer: BytesMut::new(), respond, send: None }
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The next message; nothing when the client has ended its side. May be cancelled without loss.
    pub async fn message<M: Message + Default>(&mut self) -> anyhow::Result<Option<M>> {
        loop {
            if let Some(mut length) = self.buffer.get(1..5) {
                let length = usize::try_from(length.get_u32())?;
                if self.buffer.len() >= 5 + length {
                    let compressed = self.buffer.get_u8() != 0;
                    self.buffer.advance(4);
                    anyhow::ensure!(!compressed, "a compressed message");
                    return Ok(Some(M::decode(self.buffer.split_to(length))?));
                }
            }
            match self.body.data().await {
                None if self.buffer.is_empty() => return Ok(None),
                None => bail!("the stream ended inside a message"),
                Some(data) => {
                    let data = data?;
                    self.body.flow_control().release_capacity(data.len())?;
                    self.buffer.extend_from_slice(&data);
                }
            }
        }
    }

    /// Sends a message.
    pub fn send(&mut self, message: &impl Message) -> anyhow::Result<()> {
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.encoded_len())?);
        message.encode(&mut frame)?;
        self.stream()?.send_data(frame.freeze(), false)?;
        Ok(())
    }

    /// Resolves when the client is gone; for calls whose client has said all it has to say.
    pub async fn gone(&mut self) {
        let reset = std::future::poll_fn(|cx| match self.stream() {
            Ok(stream) => stream.poll_reset(cx).map(drop),
            Err(_) => std::task::Poll::Ready(()),
        });
        reset.await;
    }

    /// Ends the call with a status.
    pub fn end(mut self, code: u8, message: &str) -> anyhow::Result<()> {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from(u16::from(code)));
        trailers.insert("grpc-message", HeaderValue::from_str(message)?);
        self.stream()?.send_trailers(trailers)?;
        Ok(())
    }

    fn stream(&mut self) -> anyhow::Result<&mut h2::SendStream<Bytes>> {
        if self.send.is_none() {
            let mut head = Response::new(());
            head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
            self.send = Some(self.respond.send_response(head, false)?);
        }
        self.send.as_mut().context("opened above")
    }
}

/// Where a server listens.
#[derive(Debug)]
pub enum Door {
    /// TCP.
    Tcp(std::net::TcpListener),
    /// TLS over TCP.
    Tls(std::net::TcpListener, Arc<rustls::ServerConfig>),
    /// A Unix socket.
    Unix(StdUnixListener),
}

/// A server; ends when dropped.
#[derive(Debug)]
pub struct Rpc {
    stop: watch::Sender<bool>,
    kick: watch::Sender<u64>,
    closed: Arc<AtomicBool>,
    /// Where it listens; nothing for a Unix socket.
    pub addr: Option<SocketAddr>,
}

impl Rpc {
    /// Starts one; every call is handed to `serve`.
    pub fn start<S, F>(door: Door, serve: S) -> anyhow::Result<Self>
    where
        S: Fn(Call) -> F + Send + Sync + 'static,
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let addr = match &door {
            Door::Tcp(listener) | Door::Tls(listener, _) => {
                listener.set_nonblocking(true)?;
                Some(listener.local_addr()?)
            }
            Door::Unix(listener) => {
                listener.set_nonblocking(true)?;
                None
            }
        };
        let (stop, stopped) = watch::channel(false);
        let (kick, kicked) = watch::channel(0);
        let closed = Arc::new(AtomicBool::new(false));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let away = Arc::clone(&closed);
        thread::spawn(move || {
            let ended = runtime.block_on(listen(door, Arc::new(serve), stopped, kicked, away));
            if let Err(error) = ended {
                eprintln!("a test's gRPC server ended: {error:#}");
            }
        });
        Ok(Self { stop, kick, closed, addr })
    }

    /// Cuts every connection there is.
    pub fn kick(&self) {
        self.kick.send_modify(|generation| *generation += 1);
    }

    /// From now on new connections are closed at once, or served again.
    pub fn away(&self, away: bool) {
        self.closed.store(away, Ordering::SeqCst);
        if away {
            self.kick();
        }
    }
}

impl Drop for Rpc {
    fn drop(&mut self) {
        let _gone_already = self.stop.send(true);
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

enum Listening {
    Tcp(TcpListener, Option<TlsAcceptor>),
    Unix(UnixListener),
}

impl Listening {
    async fn accept(&self) -> io::Result<(Box<dyn Io>, Option<TlsAcceptor>)> {
        match self {
            Self::Tcp(listener, tls) => Ok((Box::new(listener.accept().await?.0), tls.clone())),
            Self::Unix(listener) => Ok((Box::new(listener.accept().await?.0), None)),
        }
    }
}

async fn listen<S, F>(
    door: Door,
    serve: Arc<S>,
    mut stopped: watch::Receiver<bool>,
    kicked: watch::Receiver<u64>,
    away: Arc<AtomicBool>,
) -> anyhow::Result<()>
where
    S: Fn(Call) -> F + Send + Sync + 'static,
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let listening = match door {
        Door::Tcp(listener) => Listening::Tcp(TcpListener::from_std(listener)?, None),
        Door::Tls(listener, config) => Listening::Tcp(TcpListener::from_std(listener)?, Some(TlsAcceptor::from(config))),
        Door::Unix(listener) => Listening::Unix(UnixListener::from_std(listener)?),
    };
    loop {
        let accepted = tokio::select! {
            accepted = listening.accept() => accepted?,
            _ = stopped.changed() => return Ok(()),
        };
        // First from when on kicks count, then whether this one is let in: whoever comes while the server goes away is cut.
        let (serve, mut kicked) = (Arc::clone(&serve), kicked.clone());
        kicked.mark_unchanged();
        if away.load(Ordering::SeqCst) {
            continue;
        }
        tokio::spawn(async move {
            tokio::select! {
                _client_went = connection(accepted, serve) => {}
                _ = kicked.changed() => {}
            }
        });
    }
}

async fn connection<S, F>((stream, tls): (Box<dyn Io>, Option<TlsAcceptor>), serve: Arc<S>) -> anyhow::Result<()>
where
    S: Fn(Call) -> F + Send + Sync + 'static,
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let stream: Box<dyn Io> = match tls {
        Some(tls) => Box::new(tls.accept(stream).await?),
        None => stream,
    };
    let mut connection = h2::server::Builder::new().initial_window_size(1 << 20).handshake(stream).await?;
    // Calls end with their connection.
    let mut calls = tokio::task::JoinSet::new();
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        calls.spawn(serve(Call::new(request, respond)));
    }
    Ok(())
}
