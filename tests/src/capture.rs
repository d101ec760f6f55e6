//! Looks at the bytes on a link: a packet socket in a namespace, TCP streams put together by sequence number, and a reader
//! of TLS record headers. Owns what the demo and the suites claim about "bytes on the wire"; refuses to claim without
//! having captured. Downstream: `AF_PACKET`.
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use nix::sys::socket::{self, LinkAddr};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// `ETH_P_ALL` in network byte order, as packet sockets take it.
const ETH_P_ALL: i32 = 0x0003_u16.to_be() as i32;

/// One captured TCP segment.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Sender.
    pub src: SocketAddr,
    /// Receiver.
    pub dst: SocketAddr,
    /// Sequence number of the first payload byte.
    pub seq: u32,
    /// Payload.
    pub payload: Vec<u8>,
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Captured>,
}

/// What was captured.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    /// Frames of every kind.
    pub frames: usize,
    /// Bytes of every frame.
    pub bytes: usize,
    /// TCP segments with payload.
    pub segments: Vec<Segment>,
    /// Whole frames that are not TCP (for plaintext searches).
    pub others: Vec<Vec<u8>>,
}

impl Capture {
    /// Starts capturing on `interface` inside `ns`.
    pub fn start(ns: &Netns, interface: &str) -> anyhow::Result<Self> {
        let socket = ns.enter(|| -> anyhow::Result<Socket> {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ETH_P_ALL))).context("packet socket")?;
            let link = nix::ifaddrs::getifaddrs()?
                .filter(|entry| entry.interface_name == interface)
                .find_map(|entry| entry.address.and_then(|address| address.as_link_addr().copied()))
                .with_context(|| format!("no interface {interface}"))?;
            bind_to(&socket, &link)?;
            socket.set_recv_buffer_size(16 << 20)?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            Ok(socket)
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = std::thread::Builder::new().name("capture".into()).spawn(move || record(&socket, &seen))?;
        Ok(Self { stop, thread })
    }

    /// Stops and returns what was seen.
    pub fn finish(self) -> Captured {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_default()
    }
}

fn bind_to(socket: &Socket, link: &LinkAddr) -> anyhow::Result<()> {
    socket::bind(socket.as_raw_fd(), link).context("bind the packet socket to its interface")
}

fn record(mut socket: &Socket, stop: &AtomicBool) -> Captured {
    let mut captured = Captured::default();
    let mut buffer = vec![0; 256 << 10];
    let mut after_stop = 0;
    loop {
        let read = socket.read(&mut buffer);
        if stop.load(Ordering::Acquire) {
            // What is queued still counts, but a busy link must not keep us for ever.
            after_stop += 1;
            if after_stop > 200_000 {
                return captured;
            }
        }
        match read {
            Ok(n) => {
                let frame = &buffer[..n];
                captured.frames += 1;
                captured.bytes += n;
                match parse_tcp(frame) {
                    Some(segment) if segment.payload.is_empty() => {}
                    Some(segment) => captured.segments.push(segment),
                    None => captured.others.push(frame.to_vec()),
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                if stop.load(Ordering::Acquire) {
                    return captured;
                }
            }
            Err(_) => return captured,
        }
    }
}

/// Ethernet → IPv4 or IPv6 (without extension headers) → TCP.
fn parse_tcp(frame: &[u8]) -> Option<Segment> {
    let packet = frame.get(14..)?;
    let (src, dst, tcp): (IpAddr, IpAddr, &[u8]) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            if *packet.get(9)? != 6 {
                return None;
            }
            let src: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let dst: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            // Segmentation offload can leave the total length at 0 for very large packets.
            let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
            (Ipv4Addr::from(src).into(), Ipv4Addr::from(dst).into(), packet.get(header..end)?)
        }
        [0x86, 0xdd] => {
            let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            if *packet.get(6)? != 6 {
                return None;
            }
            let src: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let dst: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
            (Ipv6Addr::from(src).into(), Ipv6Addr::from(dst).into(), packet.get(40..end)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    Some(Segment {
        src: SocketAddr::new(src, port(0)?),
        dst: SocketAddr::new(dst, port(2)?),
        seq: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        payload: tcp.get(header..)?.to_vec(),
    })
}

/// What a byte stream holds, read as TLS records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlsReading {
    /// Whole records with a valid header.
    pub records: usize,
    /// Of these, application data (encrypted).
    pub encrypted: usize,
    /// Bytes that are not in a valid record.
    pub stray: usize,
}

/// Reads a stream as TLS records: type 20–23, version 3.1 or 3.3, length within 2^14 + 256. A last record that is cut off by
/// the end of the capture counts as neither.
pub fn read_tls(stream: &[u8]) -> TlsReading {
    let mut reading = TlsReading::default();
    let mut rest = stream;
    while let [kind, major, minor, high, low, after @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let valid = (20..=23).contains(kind) && *major == 3 && matches!(minor, 1 | 3) && length <= (1 << 14) + 256;
        if !valid {
            reading.stray += rest.len();
            return reading;
        }
        let Some(next) = after.get(length..) else { return reading };
        reading.records += 1;
        reading.encrypted += usize::from(*kind == 23);
        rest = next;
    }
    reading
}

impl Captured {
    /// Every TCP direction as one stream of bytes, by sender and receiver. Retransmitted bytes are taken once.
    pub fn streams(&self) -> BTreeMap<(SocketAddr, SocketAddr), Vec<u8>> {
        let mut parts: BTreeMap<(SocketAddr, SocketAddr), Vec<&Segment>> = BTreeMap::new();
        for segment in &self.segments {
            parts.entry((segment.src, segment.dst)).or_default().push(segment);
        }
        parts
            .into_iter()
            .map(|(key, mut segments)| {
                // Order by distance from the first captured segment, so that a wrapping sequence number does no harm.
                let first = segments.first().map_or(0, |segment| segment.seq);
                segments.sort_by_key(|segment| segment.seq.wrapping_sub(first) as i32);
                let mut stream: Vec<u8> = Vec::new();
                let mut next = segments.first().map_or(0, |segment| segment.seq);
                for segment in segments {
                    let repeated = next.wrapping_sub(segment.seq) as i32;
                    if repeated <= 0 {
                        stream.extend_from_slice(&segment.payload);
                    } else if let Some(new) = segment.payload.get(repeated as usize..) {
                        stream.extend_from_slice(new);
                    } else {
                        continue;
                    }
                    next = segment.seq.wrapping_add(segment.payload.len() as u32);
                }
                (key, stream)
            })
            .collect()
    }

    /// Whether `needle` occurs anywhere: in a TCP stream (also across segments) or in another frame.
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.streams().values().any(|stream| holds(stream, needle)) || self.others.iter().any(|frame| holds(frame, needle))
    }

    /// Whether `needle` occurs in a TCP stream to or from `port`.
    pub fn contains_on_port(&self, port: u16, needle: &[u8]) -> bool {
        self.streams().iter().any(|((src, dst), stream)| (src.port() == port || dst.port() == port) && holds(stream, needle))
    }

    /// All streams to and from `port`, read as TLS and added up; with the number of segments.
    pub fn tls_on_port(&self, port: u16) -> (usize, TlsReading) {
        let on_port = |src: &SocketAddr, dst: &SocketAddr| src.port() == port || dst.port() == port;
        let segments = self.segments.iter().filter(|segment| on_port(&segment.src, &segment.dst)).count();
        let mut sum = TlsReading::default();
        for ((src, dst), stream) in &self.streams() {
            if on_port(src, dst) {
                let one = read_tls(stream);
                sum.records += one.records;
                sum.encrypted += one.encrypted;
                sum.stray += one.stray;
            }
        }
        (segments, sum)
    }
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len().max(1)).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(seq: u32, payload: &[u8]) -> Segment {
        Segment { src: ([10, 0, 0, 1], 1).into(), dst: ([10, 0, 0, 2], 15008).into(), seq, payload: payload.to_vec() }
    }

    #[test]
    fn streams_are_put_together_across_wrap_disorder_and_retransmission() {
        let captured = Captured {
            segments: vec![segment(u32::MAX - 1, b"abc"), segment(4, b"fg"), segment(1, b"cde"), segment(u32::MAX - 1, b"abc")],
            ..Captured::default()
        };
        let streams = captured.streams();
        assert_eq!(streams.values().next().map(Vec::as_slice), Some(b"abccdefg".as_slice()));
        assert!(captured.contains(b"cdefg") && !captured.contains(b"xyz"));
    }

    #[test]
    fn tls_records_are_told_from_plain_text() {
        let mut stream = vec![22, 3, 1, 0, 2, 9, 9, 23, 3, 3, 0, 1, 7];
        assert_eq!(read_tls(&stream), TlsReading { records: 2, encrypted: 1, stray: 0 });
        stream.extend_from_slice(b"GET / HTTP/1.1");
        assert_eq!(read_tls(&stream).stray, 14);
    }
}
