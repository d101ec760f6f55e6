//! A plain TCP relay without any encryption: one thread, large reads, nothing else. What it costs is the floor of one hop on
//! this machine, and the measure by which numbers of another machine can be compared.
use std::io;
use std::net::SocketAddr;

use anyhow::Context;
use tokio::io::AsyncWriteExt as _;
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::server;
use super::wire::CHUNK;

/// Small transfers use a buffer on the stack; a read that fills it asks for [`CHUNK`].
const SMALL: usize = 16 * 1024;

/// Relays every connection to `to`, for ever. Prints `ready ADDRESS` when it listens.
pub async fn relay(on: SocketAddr, to: SocketAddr) -> anyhow::Result<()> {
    let listener = server::listen(on)?;
    println!("ready {}", listener.local_addr()?);
    loop {
        let (inbound, _peer) = listener.accept().await.context("accept")?;
        tokio::spawn(async move {
            // How a connection ends is for its two ends to judge.
            let _ended = relay_one(inbound, to).await;
        });
    }
}

async fn relay_one(inbound: TcpStream, to: SocketAddr) -> io::Result<()> {
    let outbound = TcpStream::connect(to).await?;
    inbound.set_nodelay(true)?;
    outbound.set_nodelay(true)?;
    let (client_read, client_write) = inbound.into_split();
    let (server_read, server_write) = outbound.into_split();
    tokio::try_join!(copy(client_read, server_write), copy(server_read, client_write)).map(|((), ())| ())
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> io::Result<()> {
    let mut large = Vec::new();
    loop {
        if large.is_empty() {
            from.ready(Interest::READABLE).await?;
            match copy_small(&from, &to) {
                Ok(Copied::End) => return to.shutdown().await,
                Ok(Copied::Some { rest, full }) => {
                    to.write_all(&rest).await?;
                    if full {
                        large = vec![0; CHUNK];
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        } else {
            match from.read(&mut large).await? {
                0 => return to.shutdown().await,
                read => to.write_all(&large[..read]).await?,
            }
        }
    }
}

enum Copied {
    End,
    Some { rest: Vec<u8>, full: bool },
}

fn copy_small(from: &OwnedReadHalf, to: &OwnedWriteHalf) -> io::Result<Copied> {
    let mut buffer = [0; SMALL];
    let read = from.try_read(&mut buffer)?;
    if read == 0 {
        return Ok(Copied::End);
    }
    let written = match to.try_write(&buffer[..read]) {
        Ok(written) => written,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(error) => return Err(error),
    };
    Ok(Copied::Some { rest: buffer[written..read].to_vec(), full: read == SMALL })
}

#[cfg(test)]
mod tests {
    use super::super::client::{self, Direction};
    use super::super::talk::Talk;
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    #[tokio::test]
    async fn everything_passes_unchanged() {
        let to = server::tests::start();
        let listener = server::listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let relay = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((inbound, _peer)) = listener.accept().await {
                tokio::spawn(relay_one(inbound, to));
            }
        });
        for direction in [Direction::Up, Direction::Down] {
            let (outcome, _seconds) = client::stream(relay, 2, 5_000_000, direction).await;
            assert_eq!((outcome.errors, outcome.mismatches, outcome.bytes), (0, 0, 5_000_000), "{direction:?}");
        }
        let (outcome, _seconds) = client::ping(relay, 2, Duration::from_millis(30), u64::MAX, &Talk::Echo { size: 64 }).await;
        assert!(outcome.errors == 0 && outcome.mismatches == 0 && outcome.count > 0);
        let (outcome, _seconds) = client::churn(relay, 2, 20, &Talk::Echo { size: 64 }).await;
        assert_eq!((outcome.errors, outcome.count), (0, 20));
    }
}
