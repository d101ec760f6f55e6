//! The load server: one thread, many connections, no buffer per idle connection.
use std::net::SocketAddr;

use anyhow::Context;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::wire::{CHUNK, Checker, HEADER, Mode, pattern};

/// Serves for ever. Prints `ready ADDRESS` when it listens.
pub async fn serve(on: SocketAddr) -> anyhow::Result<()> {
    let listener = listen(on)?;
    println!("ready {}", listener.local_addr()?);
    accept(listener).await
}

pub(super) fn listen(on: SocketAddr) -> anyhow::Result<TcpListener> {
    let socket = if on.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(on).with_context(|| format!("bind {on}"))?;
    Ok(socket.listen(4096)?)
}

async fn accept(listener: TcpListener) -> anyhow::Result<()> {
    loop {
        let (stream, _peer) = listener.accept().await.context("accept")?;
        tokio::spawn(async move {
            // A client that goes away in the middle is its own business: it counts the errors.
            let _ended = serve_one(stream).await;
        });
    }
}

async fn serve_one(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await?;
    match Mode::read(header) {
        Some(Mode::Echo) => echo(&mut stream).await,
        Some(Mode::Sink) => sink(&mut stream).await,
        Some(Mode::Source(bytes)) => source(&mut stream, bytes).await,
        None => Ok(()),
    }
}

async fn echo(stream: &mut TcpStream) -> std::io::Result<()> {
    loop {
        stream.readable().await?;
        // The buffer is on this function's stack, not in the connection's task: ten thousand idle ones cost nothing.
        match echo_once(stream) {
            Ok(Echoed::End) => return Ok(()),
            Ok(Echoed::All) => {}
            Ok(Echoed::Rest(rest)) => stream.write_all(&rest).await?,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

enum Echoed {
    End,
    All,
    Rest(Vec<u8>),
}

fn echo_once(stream: &TcpStream) -> std::io::Result<Echoed> {
    let mut buffer = [0; 16 * 1024];
    let read = stream.try_read(&mut buffer)?;
    if read == 0 {
        return Ok(Echoed::End);
    }
    let written = match stream.try_write(&buffer[..read]) {
        Ok(written) => written,
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
        Err(error) => return Err(error),
    };
    Ok(if written == read { Echoed::All } else { Echoed::Rest(buffer[written..read].to_vec()) })
}

async fn sink(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut checker = Checker::default();
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            stream.write_all(&checker.receipt().to_bytes()).await?;
            return stream.shutdown().await;
        }
        checker.take(&buffer[..read]);
    }
}

async fn source(stream: &mut TcpStream, bytes: u64) -> std::io::Result<()> {
    let mut sent = 0;
    while sent < bytes {
        let next = pattern(sent, usize::try_from(bytes - sent).unwrap_or(CHUNK));
        sent += stream.write(next).await? as u64;
    }
    stream.shutdown().await?;
    // The client closes after it has read everything; closing first could cut what is still under way.
    let mut rest = [0; 64];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    /// A server on a free port of the loopback, for the tests of the clients.
    pub(in crate::bench) fn start() -> SocketAddr {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener));
        address
    }

    #[tokio::test]
    async fn another_protocol_is_hung_up_on() {
        let mut stream = TcpStream::connect(start()).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        // Closed or reset: the rest of the request was not read.
        let _ended = stream.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
    }
}
