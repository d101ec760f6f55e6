//! What the kernel knows about a socket: where it was going, how far away the peer is, how it ended.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use socket2::SockRef;

/// An IPv4 address in IPv6 clothes (`::ffff:10.0.0.1`, what a dual-stack listener reports) as the IPv4 address it is.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(_) => addr,
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(IpAddr::V4(v4), v6.port()),
            None => addr,
        },
    }
}

/// Where an accepted connection was going before it was redirected.
///
/// With REDIRECT the answer is in connection tracking (SO_ORIGINAL_DST); with TPROXY or `sk_assign` the socket's local
/// address *is* the original destination, so `local` is the answer whenever connection tracking has none.
pub fn original_dst(socket: &impl AsFd, local: SocketAddr) -> SocketAddr {
    let local = canonical(local);
    let socket = SockRef::from(socket);
    let tracked = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    tracked.ok().and_then(|addr| addr.as_socket()).map_or(local, canonical)
}

/// The user at the other side of a Unix socket. Not its process: that has the number 0 where it is in a namespace of processes that is not
/// ours, as another container or the node is.
///
/// # Errors
/// The socket is none.
pub fn peer_user(socket: &impl AsFd) -> io::Result<u32> {
    Ok(nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials)?.uid())
}

/// Whether an I/O error means that the peer (or the network) cut the connection rather than ending it: to be passed on
/// as a reset.
pub fn is_reset(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
    matches!(error.kind(), ConnectionReset | ConnectionAborted | BrokenPipe | TimedOut | HostUnreachable | NetworkUnreachable)
}

/// The part of TCP_INFO the proxies use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Its variation.
    pub rtt_var: Duration,
    /// Congestion window in bytes.
    pub cwnd: u64,
    /// Segments retransmitted over the life of the connection.
    pub retransmits: u32,
}

/// Reads TCP_INFO. One system call, a few hundred nanoseconds: for decisions made now and then, not per packet.
pub fn tcp_info(socket: &impl AsFd) -> io::Result<TcpInfo> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the duration of the borrow; `info` is writable for `len` bytes and the kernel
    // writes at most that many.
    let result = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the memory was zeroed and `tcp_info` consists of integers, for which every bit pattern is valid; an older
    // kernel that writes fewer bytes leaves zeros.
    let info = unsafe { info.assume_init() };
    Ok(TcpInfo {
        rtt: Duration::from_micros(info.tcpi_rtt.into()),
        rtt_var: Duration::from_micros(info.tcpi_rttvar.into()),
        cwnd: u64::from(info.tcpi_snd_cwnd) * u64::from(info.tcpi_snd_mss),
        retransmits: info.tcpi_total_retrans,
    })
}

/// Smoothed round-trip time of a connection.
pub fn rtt(socket: &impl AsFd) -> io::Result<Duration> {
    Ok(tcp_info(socket)?.rtt)
}
