//! A name server for the programs of one pod, at the address where the machine's resolver asks.
//!
//! Owns: a socket, its thread, an address on the pod's loopback. Refuses: anything but the questions for IPv4 and IPv6
//! addresses. What it says counts for a second.
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, thread};

use anyhow::Context as _;

use crate::netns;
use crate::topology::Place;

/// The server.
#[derive(Debug)]
pub struct Dns {
    stop: Arc<AtomicBool>,
}

impl Dns {
    /// Serves the programs of `place`; a name without addresses does not exist.
    pub fn start(place: &Place, addresses_of: impl Fn(&str) -> Option<Vec<IpAddr>> + Send + 'static) -> anyhow::Result<Self> {
        let file = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let named = file.lines().find_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok());
        let server = named.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        if !server.is_loopback() {
            let length = if server.is_ipv4() { 32 } else { 128 };
            netns::ip_batch(&place.netns, &[format!("addr replace {server}/{length} dev lo")])?;
        }
        let on = SocketAddr::new(server, 53);
        let socket = place.netns.enter(|| UdpSocket::bind(on)).with_context(|| format!("listen on {on} in {}", place.name))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&stop);
        thread::spawn(move || {
            let mut piece = [0; 512];
            while !ending.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut piece) else { continue };
                if let Some(answer) = answer(&piece[..length], &addresses_of) {
                    let _gone = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self { stop })
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The answer to a query of one question (RFC 1035 §4).
fn answer(query: &[u8], addresses_of: &dyn Fn(&str) -> Option<Vec<IpAddr>>) -> Option<Vec<u8>> {
    let (head, mut rest) = query.split_at_checked(12)?;
    let mut labels = Vec::new();
    loop {
        let (&length, after) = rest.split_first()?;
        let (label, after) = after.split_at_checked(usize::from(length))?;
        rest = after;
        if label.is_empty() {
            break;
        }
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
    }
    let question = query.get(12..query.len() - rest.len() + 4)?;
    let addresses = addresses_of(&labels.join("."));
    // An answer, recursion wanted and there; NXDOMAIN where there is no such name.
    let flags = if addresses.is_some() { [0x81, 0x80] } else { [0x81, 0x83] };
    let wanted = |ip: &IpAddr| rest.starts_with(if ip.is_ipv4() { &[0, 1] } else { &[0, 28] });
    let found: Vec<IpAddr> = addresses.into_iter().flatten().filter(wanted).collect();
    let counts = [0, 1, 0, u8::try_from(found.len()).ok()?, 0, 0, 0, 0];
    let mut out = [&head[..2], &flags, &counts, question].concat();
    for ip in found {
        let (kind, bytes) = match ip {
            IpAddr::V4(ip) => (1, ip.octets().to_vec()),
            IpAddr::V6(ip) => (28, ip.octets().to_vec()),
        };
        // The name of the question, the type, IN, one second, so many bytes.
        out.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 1, 0, u8::try_from(bytes.len()).ok()?]);
        out.extend(bytes);
    }
    Some(out)
}
