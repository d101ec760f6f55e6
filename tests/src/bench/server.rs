//! The load servers: one thread, many connections, no buffer per idle connection.
use std::net::SocketAddr;

use anyhow::Context;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::talk;
use super::wire::{CHUNK, Checker, HEADER, Mode, pattern};

/// What a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// The load protocol ([`Mode`]).
    Load,
    /// HTTP/1.1: `GET` without a body. `/bytes/N` is answered N bytes, anything else as [`talk::answer`] says.
    Http,
}

/// Serves for ever. Prints `ready ADDRESS` when it listens.
pub async fn serve(on: SocketAddr, spoken: Spoken) -> anyhow::Result<()> {
    let listener = listen(on)?;
    println!("ready {}", listener.local_addr()?);
    accept(listener, spoken).await
}

pub(super) fn listen(on: SocketAddr) -> anyhow::Result<TcpListener> {
    let socket = if on.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(on).with_context(|| format!("bind {on}"))?;
    Ok(socket.listen(4096)?)
}

async fn accept(listener: TcpListener, spoken: Spoken) -> anyhow::Result<()> {
    loop {
        let (stream, _peer) = listener.accept().await.context("accept")?;
        tokio::spawn(async move {
            // A client that goes away in the middle is its own business: it counts the errors.
            let _ended = match spoken {
                Spoken::Load => serve_one(stream).await,
                Spoken::Http => serve_http(stream).await,
            };
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

async fn serve_http(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut seen = Vec::new();
    loop {
        stream.readable().await?;
        match read_some(&stream, &mut seen) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        while let Some(end) = talk::end_of_head(&seen) {
            let target = talk::target(&seen).ok_or(std::io::ErrorKind::InvalidData)?;
            match target.strip_prefix("/bytes/").and_then(|n| n.split('?').next()?.parse().ok()) {
                None => stream.write_all(&talk::answer(target)).await?,
                Some(bytes) => {
                    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {bytes}\r\n\r\n");
                    stream.write_all(head.as_bytes()).await?;
                    send_pattern(&mut stream, bytes).await?;
                }
            }
            seen.drain(..end);
        }
        if seen.is_empty() {
            // Idle connections keep nothing.
            seen = Vec::new();
        }
    }
}

/// Reads what is there; the buffer is on this function's stack.
fn read_some(stream: &TcpStream, seen: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut buffer = [0; 16 * 1024];
    let read = stream.try_read(&mut buffer)?;
    seen.extend(&buffer[..read]);
    Ok(read)
}

async fn send_pattern(stream: &mut TcpStream, bytes: u64) -> std::io::Result<()> {
    let mut sent = 0;
    while sent < bytes {
        let next = pattern(sent, usize::try_from(bytes - sent).unwrap_or(CHUNK));
        sent += stream.write(next).await? as u64;
    }
    Ok(())
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
    send_pattern(stream, bytes).await?;
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
        spawn(Spoken::Load)
    }
    /// The same for HTTP.
    pub(in crate::bench) fn start_http() -> SocketAddr {
        spawn(Spoken::Http)
    }
    fn spawn(spoken: Spoken) -> SocketAddr {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, spoken));
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
