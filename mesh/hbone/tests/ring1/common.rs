//! Pieces the suites share.
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_hbone::{ConnectRequest, HboneError, HboneStream, Incoming, Settings, Tunnel, serve, server::Served};
use mesh_model::HboneAuthority;
use mesh_runtime::drain::{self, Drain};
use tokio::io::DuplexStream;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub const BUDGET: Duration = Duration::from_secs(20);

pub fn authority() -> HboneAuthority {
    HboneAuthority::Addr(SocketAddr::from(([10, 0, 0, 1], 80)))
}

pub fn request() -> ConnectRequest {
    ConnectRequest::to(authority())
}

/// A served connection whose requests come out of a channel.
pub struct Server {
    pub incoming: mpsc::UnboundedReceiver<Incoming>,
    pub drain: Drain,
    pub served: JoinHandle<Result<Served, HboneError>>,
}

pub fn server(io: DuplexStream, settings: &Settings) -> Server {
    let (tx, incoming) = mpsc::unbounded_channel();
    let (drain, watch) = drain::channel();
    let handler = move |request: Incoming| {
        let tx = tx.clone();
        async move {
            let _ = tx.send(request);
        }
    };
    let served = tokio::spawn(serve(io, Arc::new(settings.clone()), handler, watch));
    Server { incoming, drain, served }
}

pub async fn tunnel(settings: &Settings) -> (Tunnel, Server) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let server = server(far, settings);
    let client = Tunnel::handshake(near, Arc::new(settings.clone()), || {}).await.unwrap();
    (client, server)
}

/// One open stream, both ends.
pub async fn open(client: &Tunnel, server: &mut Server) -> (HboneStream, HboneStream) {
    let request = request();
    let (opened, accepted) =
        tokio::join!(client.open(&request), async { server.incoming.recv().await.unwrap().accept([]).unwrap() });
    (opened.unwrap().0, accepted)
}

pub async fn recv(stream: &mut HboneStream) -> Option<Result<Bytes, mesh_hbone::StreamError>> {
    poll_fn(|cx| stream.poll_recv(cx)).await
}

/// Sends all of `data`, waiting for room.
pub async fn send(stream: &mut HboneStream, mut data: Bytes) {
    while !data.is_empty() {
        let room = poll_fn(|cx| stream.poll_capacity(cx, data.len())).await.unwrap();
        stream.send(data.split_to(room), false).unwrap();
    }
}

/// A TCP connection over loopback; small kernel buffers when asked for.
pub async fn tcp(buffers: Option<u32>) -> (TcpStream, TcpStream) {
    let socket = TcpSocket::new_v4().unwrap();
    if let Some(size) = buffers {
        socket.set_recv_buffer_size(size).unwrap();
    }
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let listener: TcpListener = socket.listen(8).unwrap();
    let client = TcpSocket::new_v4().unwrap();
    if let Some(size) = buffers {
        client.set_send_buffer_size(size).unwrap();
        client.set_recv_buffer_size(size).unwrap();
    }
    let (near, far) = tokio::join!(client.connect(listener.local_addr().unwrap()), listener.accept());
    let (near, (far, _)) = (near.unwrap(), far.unwrap());
    near.set_nodelay(true).unwrap();
    far.set_nodelay(true).unwrap();
    (near, far)
}
