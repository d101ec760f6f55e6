//! Sockets with options the standard library does not set.
use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

pub fn set(socket: &impl AsRawFd, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), value.len() as u32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn set_number(socket: &impl AsRawFd, level: i32, option: i32, value: i32) -> io::Result<()> {
    set(socket, level, option, &value.to_ne_bytes())
}

pub fn socket(v6: bool, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: plain numbers; the result is checked before it becomes an owner.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A `sockaddr` in bytes.
pub fn sockaddr(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    match address {
        SocketAddr::V4(a) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(a.port().to_be_bytes());
            bytes.extend(a.ip().octets());
            bytes.extend([0; 8]);
        }
        SocketAddr::V6(a) => {
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(a.port().to_be_bytes());
            bytes.extend(0u32.to_ne_bytes());
            bytes.extend(a.ip().octets());
            bytes.extend(a.scope_id().to_ne_bytes());
        }
    }
    bytes
}

pub fn bind(socket: &impl AsRawFd, address: SocketAddr) -> io::Result<()> {
    let bytes = sockaddr(address);
    // SAFETY: the pointer and length describe `bytes`, which has the layout of its family.
    match unsafe { libc::bind(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as u32) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Connects; a send timeout, where set, is the limit.
pub fn connect(socket: OwnedFd, address: SocketAddr) -> io::Result<TcpStream> {
    let bytes = sockaddr(address);
    // SAFETY: as in `bind`.
    match unsafe { libc::connect(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len() as u32) } {
        0 => Ok(socket.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub fn limit(socket: &impl AsRawFd, after: Duration) -> io::Result<()> {
    let time = libc::timeval { tv_sec: after.as_secs() as i64, tv_usec: i64::from(after.subsec_micros()) };
    for option in [libc::SO_SNDTIMEO, libc::SO_RCVTIMEO] {
        // SAFETY: `time` is a `timeval`, which the option takes.
        let result = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const time).cast(), size_of_val(&time) as u32)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// How a captured listener is made, with room to make it wrong.
#[derive(Clone, Copy)]
pub struct ListenerKind {
    pub mark: i32,
    pub transparent: bool,
    pub reuse_port: bool,
    pub v6_only: bool,
}

pub const GOOD: ListenerKind = ListenerKind { mark: 0x539, transparent: true, reuse_port: false, v6_only: false };

/// That of what the pod dials, which only talks to the application.
pub const TO_APPLICATION: ListenerKind = ListenerKind { mark: 0x53b, ..GOOD };

pub fn listen(kind: ListenerKind, port: u16) -> io::Result<TcpListener> {
    let socket = socket(true, libc::SOCK_STREAM, 0)?;
    set_number(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    set_number(&socket, libc::SOL_IPV6, libc::IPV6_V6ONLY, i32::from(kind.v6_only))?;
    set_number(&socket, libc::SOL_SOCKET, libc::SO_MARK, kind.mark)?;
    set_number(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, i32::from(kind.reuse_port))?;
    if kind.transparent {
        set_number(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?;
    }
    bind(&socket, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))?;
    // SAFETY: plain numbers.
    match unsafe { libc::listen(socket.as_raw_fd(), 1024) } {
        0 => Ok(socket.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The agent's dial on behalf of the pod.
pub fn dial_marked(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = socket(to.is_ipv6(), libc::SOCK_STREAM, 0)?;
    set_number(&socket, libc::SOL_SOCKET, libc::SO_MARK, 0x539)?;
    connect(socket, to)
}

/// The agent's delivery to the application with the client's address, from a port that is not a client's own.
pub fn dial_as(client: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let ports = ebpf_loader::DELIVERY_PORTS;
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for _ in 0..100 {
        let port = ports.start() + NEXT.fetch_add(1, Ordering::Relaxed) % (ports.end() - ports.start());
        result = dial_from(SocketAddr::new(client, port), to);
        match &result {
            Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) => {}
            _ => break,
        }
    }
    result
}

fn dial_from(from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = socket(to.is_ipv6(), libc::SOCK_STREAM, 0)?;
    set_number(&socket, libc::SOL_SOCKET, libc::SO_MARK, 0x53b)?;
    set_number(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    let (level, option) =
        if to.is_ipv6() { (libc::SOL_IPV6, libc::IPV6_TRANSPARENT) } else { (libc::SOL_IP, libc::IP_TRANSPARENT) };
    set_number(&socket, level, option, 1)?;
    bind(&socket, from)?;
    connect(socket, to)
}

/// An address as IPv4 where it is one.
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
