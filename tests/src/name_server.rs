//! A name server outside the mesh, and questions asked by hand. It knows three names of `outside.test`: `host` (an address of each
//! family), `large` (a hundred addresses, so that a datagram does not hold them) and `text` (a TXT record); everything else there does
//! not exist, and what is elsewhere it does not answer at all.
//!
//! Owns its sockets and a count of who asked. Speaks DNS (RFC 1035) with nobody's help, so that it says what the product did, not
//! what a library makes of it.
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::topology::Place;

/// Type of IPv4 addresses.
pub const A: u16 = 1;
/// Type of aliases.
pub const CNAME: u16 = 5;
/// Type of texts.
pub const TXT: u16 = 16;
/// Type of IPv6 addresses.
pub const AAAA: u16 = 28;

/// The server. Gone with its value.
#[derive(Debug)]
pub struct NameServer {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<(IpAddr, String)>>>,
}

impl NameServer {
    /// Answers on port 53 of `place`, over UDP and TCP.
    pub fn start(place: &Place) -> anyhow::Result<Self> {
        let (stop, asked) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<_>>>::default());
        let udp = place.netns.enter(|| UdpSocket::bind((std::net::Ipv6Addr::UNSPECIFIED, 53)))?;
        udp.set_read_timeout(Some(Duration::from_millis(100)))?;
        let tcp = place.listen(53)?;
        tcp.set_nonblocking(true)?;
        let (ended, seen) = (Arc::clone(&stop), Arc::clone(&asked));
        std::thread::spawn(move || {
            let mut query = [0; 4096];
            while !ended.load(Ordering::Relaxed) {
                if let Ok((length, from)) = udp.recv_from(&mut query)
                    && let Some(answer) = answer(&query[..length], from, &seen)
                {
                    let cut = if answer.len() > 512 { truncated(&query[..length]) } else { answer };
                    let _gone = udp.send_to(&cut, from);
                }
            }
        });
        let (ended, seen) = (Arc::clone(&stop), Arc::clone(&asked));
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                match tcp.accept() {
                    Ok((mut stream, from)) => {
                        let _gone = (|| -> std::io::Result<()> {
                            stream.set_nonblocking(false)?;
                            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
                            let query = read_framed(&mut stream)?;
                            answer(&query, from, &seen).map_or(Ok(()), |answer| write_framed(&mut stream, &answer))
                        })();
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        });
        Ok(Self { stop, asked })
    }

    /// Who asked for what so far.
    pub fn asked(&self) -> Vec<(IpAddr, String)> {
        self.asked.lock().map(|asked| asked.clone()).unwrap_or_default()
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn answer(query: &[u8], from: SocketAddr, seen: &Mutex<Vec<(IpAddr, String)>>) -> Option<Vec<u8>> {
    let (name, kind, end) = question(query)?;
    if let Ok(mut seen) = seen.lock() {
        seen.push((crate::program::unmapped(from).ip(), name.clone()));
    }
    let v4 = |n: u8| (A, vec![203, 0, 113, n]);
    let records: Vec<(u16, Vec<u8>)> = match (&*name, kind) {
        ("host.outside.test", A) => vec![v4(7)],
        ("host.outside.test", AAAA) => vec![(AAAA, [&[0x20, 0x01, 0x0d, 0xb8][..], &[0; 11], &[7]].concat())],
        ("large.outside.test", A) => (0..100).map(v4).collect(),
        ("text.outside.test", TXT) => vec![(TXT, b"\x05hello".to_vec())],
        ("host.outside.test" | "large.outside.test" | "text.outside.test", _) => Vec::new(),
        (name, _) if [".outside.test", ".cluster.local", ".corp.test"].iter().any(|end| name.ends_with(end)) => {
            return Some([&query[..2], &[0x85, 0x83, 0, 1, 0, 0, 0, 0, 0, 0], &query[12..end]].concat());
        }
        _ => return None,
    };
    let mut message = [&query[..2], &[0x85, 0x80, 0, 1, 0, records.len() as u8, 0, 0, 0, 0], &query[12..end]].concat();
    for (kind, data) in records {
        message.extend([0xc0, 12]);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1, 0, 0, 0, 9, 0, data.len() as u8]);
        message.extend(data);
    }
    Some(message)
}

fn truncated(query: &[u8]) -> Vec<u8> {
    let end = question(query).map_or(12, |(_, _, end)| end);
    [&query[..2], &[0x87, 0x80, 0, 1, 0, 0, 0, 0, 0, 0], &query[12..end]].concat()
}

/// Name, type and end of the question.
fn question(message: &[u8]) -> Option<(String, u16, usize)> {
    let (name, at) = name_at(message, 12)?;
    let kind = message.get(at..at + 2)?;
    Some((name.to_ascii_lowercase(), u16::from_be_bytes([kind[0], kind[1]]), at + 4))
}

/// A name, which may point back, and where what follows it begins.
fn name_at(message: &[u8], mut at: usize) -> Option<(String, usize)> {
    let (mut labels, mut end) = (Vec::new(), None);
    for _ in 0..128 {
        let length = usize::from(*message.get(at)?);
        if length >= 0xc0 {
            end = end.or(Some(at + 2));
            at = (length & 0x3f) << 8 | usize::from(*message.get(at + 1)?);
            continue;
        }
        if length == 0 {
            return Some((labels.join("."), end.unwrap_or(at + 1)));
        }
        labels.push(String::from_utf8_lossy(message.get(at + 1..at + 1 + length)?).into_owned());
        at += 1 + length;
    }
    None
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// RCODE: 0 is fine, 1 FORMERR, 2 SERVFAIL, 3 no such name.
    pub code: u8,
    /// Whether the answer did not fit.
    pub truncated: bool,
    /// Name, type, and the address or name or bytes, as text.
    pub answers: Vec<(String, u16, String)>,
}

impl Reply {
    /// The addresses in it.
    pub fn addresses(&self) -> Vec<&str> {
        self.answers.iter().filter(|(_, kind, _)| [A, AAAA].contains(kind)).map(|(_, _, data)| &**data).collect()
    }
}

/// A query as bytes.
pub fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut message = vec![0x4d, 0x2a, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message
}

/// Asks over UDP, from inside `place`.
pub fn ask(place: &Place, server: SocketAddr, name: &str, kind: u16) -> anyhow::Result<Reply> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = place.netns.enter(|| UdpSocket::bind((any, 0)))?;
    // Longer than an agent takes, on a machine that has little time for it.
    socket.set_read_timeout(Some(Duration::from_secs(30)))?;
    // Connected: an answer from anywhere else is none.
    socket.connect(server)?;
    socket.send(&query(name, kind))?;
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).with_context(|| format!("no answer about {name}"))?;
    read_reply(&buffer[..length])
}

/// Asks over TCP.
pub fn ask_tcp(place: &Place, server: SocketAddr, name: &str, kind: u16) -> anyhow::Result<Reply> {
    let mut stream = place.netns.connect(server, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(8)))?;
    write_framed(&mut stream, &query(name, kind))?;
    read_reply(&read_framed(&mut stream)?)
}

fn read_framed(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_framed(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    stream.write_all(&[&(message.len() as u16).to_be_bytes(), message].concat())
}

fn read_reply(message: &[u8]) -> anyhow::Result<Reply> {
    ensure!(message.len() >= 12 && message[..2] == [0x4d, 0x2a] && message[2] & 0x80 != 0, "no answer: {message:02x?}");
    let count = u16::from_be_bytes([message[6], message[7]]);
    let mut answers = Vec::new();
    let mut at = if message[5] == 0 { 12 } else { question(message).context("no question in the answer")?.2 };
    for _ in 0..count {
        let (name, fixed) = name_at(message, at).context("a record's name")?;
        let head = message.get(fixed..fixed + 10).context("a record's head")?;
        let (kind, length) = (u16::from_be_bytes([head[0], head[1]]), usize::from(u16::from_be_bytes([head[8], head[9]])));
        let data = message.get(fixed + 10..fixed + 10 + length).context("a record's data")?;
        let text = match kind {
            A => Ipv4Addr::from(<[u8; 4]>::try_from(data)?).to_string(),
            AAAA => std::net::Ipv6Addr::from(<[u8; 16]>::try_from(data)?).to_string(),
            CNAME => name_at(message, fixed + 10).context("an alias")?.0,
            _ => String::from_utf8_lossy(data).into_owned(),
        };
        answers.push((name, kind, text));
        at = fixed + 10 + length;
    }
    Ok(Reply { code: message[3] & 0x0f, truncated: message[2] & 2 != 0, answers })
}
