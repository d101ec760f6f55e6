//! Whether a connection is one of the processes of a network namespace, asked of the kernel (`sock_diag`).
//!
//! An address does not tell: what a node forwards for others may carry the node's own (masquerading). A socket does.
//! Numbers and layouts are from the kernel's `linux/sock_diag.h`, `linux/inet_diag.h` and `net/tcp_states.h`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use parking_lot::Mutex;

use super::netns::NetnsFd;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const HEADER_LEN: usize = 16;
/// `struct inet_diag_req_v2`, of which the last 48 are `struct inet_diag_sockid`.
const REQUEST_LEN: usize = 56;
const TCP_SYN_RECV: u8 = 3;
const TCP_LISTEN: u8 = 10;
const TCP_NEW_SYN_RECV: u8 = 12;

/// The TCP sockets of one network namespace.
#[derive(Debug)]
pub struct SocketTable {
    /// One question at a time; the kernel answers before `send` returns.
    netlink: Mutex<OwnedFd>,
}

impl SocketTable {
    /// Of this namespace.
    pub fn of(netns: &NetnsFd) -> io::Result<Self> {
        let open = || {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            Ok(socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkSockDiag)?)
        };
        Ok(Self { netlink: Mutex::new(netns.run_in(open)?) })
    }

    /// Whether a process of the namespace opened the connection from `local` to `remote`. Some microseconds of system calls.
    pub fn opened(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        let (local, remote) = (super::canonical(local), super::canonical(remote));
        let netlink = self.netlink.lock();
        send(netlink.as_raw_fd(), &request(local, remote), MsgFlags::empty())?;
        let mut answer = [0; 512];
        let received = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        // Whatever else the kernel had to say is not the answer to the next question.
        while recv(netlink.as_raw_fd(), &mut [0; 64], MsgFlags::empty()).is_ok_and(|more| more > 0) {}
        Ok(answer.get(..received).is_some_and(|answer| tells_of(answer, local, remote)))
    }
}

/// The ends of a socket as `struct inet_diag_sockid` begins with them.
fn ends(local: SocketAddr, remote: SocketAddr) -> [u8; 36] {
    let mut bytes = [0; 36];
    let (ports, addresses) = bytes.split_at_mut(4);
    let (sport, dport) = ports.split_at_mut(2);
    sport.copy_from_slice(&local.port().to_be_bytes());
    dport.copy_from_slice(&remote.port().to_be_bytes());
    let (source, destination) = addresses.split_at_mut(16);
    for (place, ip) in [(source, local.ip()), (destination, remote.ip())] {
        match ip {
            IpAddr::V4(v4) => place.iter_mut().zip(v4.octets()).for_each(|(to, from)| *to = from),
            IpAddr::V6(v6) => place.copy_from_slice(&v6.octets()),
        }
    }
    bytes
}

fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let family = if remote.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut bytes = Vec::with_capacity(HEADER_LEN + REQUEST_LEN);
    bytes.extend_from_slice(&((HEADER_LEN + REQUEST_LEN) as u32).to_ne_bytes());
    bytes.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]); // sequence and port id
    // Family, protocol, no extensions, padding; every state.
    bytes.extend_from_slice(&[family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend_from_slice(&u32::MAX.to_ne_bytes());
    bytes.extend_from_slice(&ends(local, remote));
    bytes.extend_from_slice(&0u32.to_ne_bytes()); // any interface
    bytes.extend_from_slice(&[0xff; 8]); // no cookie
    bytes
}

/// Whether the answer is a socket with these ends that dialled: where there is none, the kernel names a listener on its port.
fn tells_of(answer: &[u8], local: SocketAddr, remote: SocketAddr) -> bool {
    let told = answer.get(4..6).is_some_and(|kind| kind == SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    // `struct inet_diag_msg`: family, state, timer, retransmits, then the ends.
    let dialled = answer.get(HEADER_LEN + 1).is_some_and(|state| ![TCP_SYN_RECV, TCP_LISTEN, TCP_NEW_SYN_RECV].contains(state));
    let family = answer.get(HEADER_LEN).copied().map(i32::from);
    let found = answer.get(HEADER_LEN + 4..HEADER_LEN + 40);
    let same = match (family, remote) {
        // A socket for both families shows its IPv4 ends as IPv6.
        (Some(libc::AF_INET6), SocketAddr::V4(_)) => found == Some(&ends(mapped(local), mapped(remote))[..]),
        _ => found == Some(&ends(local, remote)[..]),
    };
    told && dialled && same
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_connection_is_its_openers() {
        let table = SocketTable::of(&NetnsFd::current().unwrap()).unwrap();
        for on in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let listener = TcpListener::bind(on).unwrap();
            let port = listener.local_addr().unwrap().port();
            let to = match on {
                "[::]:0" => SocketAddr::from(([127, 0, 0, 1], port)),
                _ => listener.local_addr().unwrap(),
            };
            let client = TcpStream::connect(to).unwrap();
            let from = client.local_addr().unwrap();
            assert!(table.opened(from, to).unwrap(), "{from} to {to}");
            let _accepted = listener.accept().unwrap();
            // Nobody has these ends; the listener has the port.
            assert!(
                !table.opened(to, from.ip().to_string().parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 1)).unwrap()).unwrap()
            );
            let other = SocketAddr::new(from.ip(), if from.port() == 4000 { 4001 } else { 4000 });
            assert!(!table.opened(other, to).unwrap());
        }
        // A socket for both families that dials IPv4.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let client = TcpStream::connect(mapped(to)).unwrap();
        assert!(table.opened(client.local_addr().unwrap(), to).unwrap());
    }

    #[test]
    fn nonsense_is_no_socket() {
        let (a, b) = ("10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap());
        assert!(!tells_of(&[], a, b));
        assert!(!tells_of(&[20; 30], a, b));
        assert!(!tells_of(&request(a, b), a, b), "a question is no answer");
    }
}
