//! Asking the pod's name servers from inside the pod. What they answer is passed on byte for byte, so that record types we know
//! nothing of, signatures and flags arrive as they were sent.
use super::{CAPTURED, Transport, framed};
use crate::dialer::MARK;
use crate::pod::Pod;
use mesh_runtime::sockets::{ConnectOptions, bind_udp, connect};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout, timeout_at};

/// How long one server may take before the next is asked.
const ONE: Duration = Duration::from_secs(2);
/// How long all of them may take: what a resolver waits by itself.
const ALL: Duration = Duration::from_secs(5);
const HEADER: usize = 12;

/// What the first of `servers` that answers says.
pub async fn ask(pod: &Pod, servers: &[IpAddr], query: &[u8], transport: Transport) -> Result<Vec<u8>, String> {
    let deadline = Instant::now() + ALL;
    let mut why = "no name servers are known".to_owned();
    // Twice, as a datagram may be lost.
    for server in servers.iter().chain(servers) {
        let limit = deadline.min(Instant::now() + ONE);
        let to = SocketAddr::new(*server, CAPTURED);
        let attempt = async {
            match transport {
                Transport::Udp => by_udp(pod, to, query).await,
                Transport::Tcp => by_tcp(pod, to, query).await,
            }
        };
        match timeout_at(limit, attempt).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => why = format!("{server}: {error}"),
            Err(_) => why = format!("{server}: no answer in time"),
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(why)
}

/// Over a socket of its own, with a number of its own: who would answer in the server's place has both to guess.
async fn by_udp(pod: &Pod, to: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let mark = pod.netns.is_some().then_some(MARK);
    let bind = || bind_udp(SocketAddr::new(any, 0), mark, false);
    let socket = match &pod.netns {
        Some(netns) => netns.run_in(bind)?,
        None => bind()?,
    };
    let socket = UdpSocket::from_std(socket)?;
    socket.connect(to).await?;
    let ours = renumbered(query, rand::random());
    socket.send(&ours).await?;
    // The client said to the server what it takes, and the server keeps to it.
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        if answers(&ours, answer) {
            return Ok(renumbered(answer, id(query)));
        }
    }
}

async fn by_tcp(pod: &Pod, to: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let options = ConnectOptions {
        netns: pod.netns.clone(),
        mark: pod.netns.is_some().then_some(MARK),
        stream: pod.shared.settings.tcp.stream_options(),
        timeout: ONE,
        ..ConnectOptions::default()
    };
    let mut tcp = connect(to, &options).await?;
    tcp.write_all(&framed(query)).await?;
    let mut answer = vec![0; usize::from(tcp.read_u16().await?)];
    timeout(ONE, tcp.read_exact(&mut answer)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    if answers(query, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn id(message: &[u8]) -> [u8; 2] {
    message.first_chunk().copied().unwrap_or_default()
}

fn renumbered(message: &[u8], id: [u8; 2]) -> Vec<u8> {
    let mut copy = message.to_vec();
    if let Some(head) = copy.first_chunk_mut() {
        *head = id;
    }
    copy
}

/// Whether `answer` is one to `query`: its number, and the question again unless it only says what went wrong.
pub(super) fn answers(query: &[u8], answer: &[u8]) -> bool {
    let is_answer = answer.len() >= HEADER && answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
    if !is_answer || id(query) != id(answer) {
        return false;
    }
    if answer.get(4..6) == Some(&[0, 0]) {
        return answer.len() == HEADER;
    }
    let Some(end) = question_end(query) else { return false };
    match (query.get(HEADER..end), answer.get(HEADER..end)) {
        (Some(asked), Some(repeated)) => asked.eq_ignore_ascii_case(repeated),
        _ => false,
    }
}

/// Where the first question ends: labels, then type and class.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1 + length;
        match length {
            0 => return Some(at + 4),
            1..64 => {}
            // A pointer has nowhere to point yet.
            _ => return None,
        }
    }
}
