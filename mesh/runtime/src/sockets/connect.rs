//! Connecting: from any namespace, with any source address, in bounded time, without the port-search cliff.
//!
//! The cliff: `bind(source, 0)` makes the kernel look for a port that is free for *every* destination, and past some 14 000
//! connections in TIME_WAIT each search walks half the range under a lock (measured: 20–40 times the CPU). So the port
//! is left to `connect` (IP_BIND_ADDRESS_NO_PORT), which only needs the four-tuple to be free. Where even that search is slow or
//! finds nothing, random ports are tried with SO_REUSEADDR instead: a handful of system calls replace the walk (measured over a
//! veth past 14 000 connections in TIME_WAIT: 1.4 ms of CPU per connection without, 0.1 ms with).

use std::cell::Cell;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;

use super::netns::NetnsFd;
use super::options::StreamOptions;

/// How to connect.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Namespace the connection belongs to; `None` is the calling thread's.
    pub netns: Option<Arc<NetnsFd>>,
    /// SO_MARK.
    pub mark: Option<u32>,
    /// Source address, which need not be ours (IP_TRANSPARENT, else IP_FREEBIND). Equal to the destination: not bound,
    /// because the kernel then chooses the same address itself.
    pub source: Option<IpAddr>,
    /// Source ports to choose from, at random; `None` leaves the choice to the kernel. A range keeps clear of ports that
    /// other sockets of the same address use in ways the kernel's own choice does not know of.
    pub ports: Option<RangeInclusive<u16>>,
    /// TCP options of the new stream.
    pub stream: StreamOptions,
    /// Limit for the whole connect, all attempts together.
    pub timeout: Duration,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            netns: None,
            mark: None,
            source: None,
            ports: None,
            stream: StreamOptions::default(),
            timeout: Duration::from_secs(10),
        }
    }
}

/// Random ports tried for one connect. With two thirds of the range taken, all of them fail once in 170 000 connects.
const PORT_ATTEMPTS: u32 = 30;
/// A `connect` call that takes longer than this on the CPU was searching for a port: the call never waits for the peer.
const SLOW_SEARCH: Duration = Duration::from_micros(500);
/// How many connects of this thread use random ports after a slow search, before the kernel's choice is tried again.
const AFTER_SLOW_SEARCH: u32 = 1024;
/// Ports for an address of the namespace itself: Linux's default ephemeral range, where programs expect strangers.
const LOCAL_PORTS: RangeInclusive<u16> = 32768..=60999;
/// Ports for a borrowed source: nothing in the namespace can listen on an address it does not have, so the range is
/// wider. It is clear of the mesh's own ports (150xx).
const BORROWED_PORTS: RangeInclusive<u16> = 16384..=65535;

thread_local! {
    /// Connects left that pick their own port.
    static OWN_PORT: Cell<u32> = const { Cell::new(0) };
}

/// Connects to `addr`.
///
/// # Errors
/// `TimedOut` after `options.timeout`; `InvalidInput` when source and destination are of different families; else as the
/// kernel says.
pub async fn connect(addr: SocketAddr, options: &ConnectOptions) -> io::Result<TcpStream> {
    match tokio::time::timeout(options.timeout, attempts(addr, options)).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "connection timed out")),
    }
}

async fn attempts(addr: SocketAddr, options: &ConnectOptions) -> io::Result<TcpStream> {
    let source = options.source.filter(|source| *source != addr.ip());
    if source.is_some_and(|source| source.is_ipv4() != addr.is_ipv4()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "source and destination address families differ"));
    }
    let own_ports = OWN_PORT.get();
    let pending = if options.ports.is_some() {
        own_port(addr, source, options)?
    } else if own_ports > 0 {
        OWN_PORT.set(own_ports - 1);
        match own_port(addr, source, options) {
            // The search is slow, but it misses nothing.
            Err(error) if no_port(&error) => kernel_port(addr, source, options)?,
            result => result?,
        }
    } else {
        match kernel_port(addr, source, options) {
            // The kernel stays in its configured range; ours may be wider.
            Err(error) if no_port(&error) => own_port(addr, source, options)?,
            result => result?,
        }
    };
    established(pending, options).await
}

/// No free port, or none that is free for this destination. Known at once, before anything is sent.
fn no_port(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse)
}

/// The kernel chooses the port, at connect time.
fn kernel_port(addr: SocketAddr, source: Option<IpAddr>, options: &ConnectOptions) -> io::Result<Socket> {
    let socket = new_socket(addr, options)?;
    if let Some(source) = source {
        allow_foreign_source(&socket, source)?;
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    let before = Instant::now();
    let started = start(&socket, addr);
    if before.elapsed() > SLOW_SEARCH {
        OWN_PORT.set(AFTER_SLOW_SEARCH);
    }
    started?;
    Ok(socket)
}

/// A port of ours: bind is cheap because the port is given, and connect has nothing to search.
fn own_port(addr: SocketAddr, source: Option<IpAddr>, options: &ConnectOptions) -> io::Result<Socket> {
    let unspecified = if addr.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let usual = if source.is_some() { &BORROWED_PORTS } else { &LOCAL_PORTS };
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for port in random_ports(options.ports.as_ref().unwrap_or(usual)) {
        // A bound socket cannot be bound again, so each attempt is a new one.
        let socket = new_socket(addr, options)?;
        if let Some(source) = source {
            allow_foreign_source(&socket, source)?;
        }
        socket.set_reuse_address(true)?;
        let bound = socket.bind(&SocketAddr::new(source.unwrap_or(unspecified), port).into());
        match bound.and_then(|()| start(&socket, addr)) {
            Ok(()) => return Ok(socket),
            Err(error) if no_port(&error) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// A non-blocking socket of the right namespace with its mark. Only its creation happens in the namespace.
fn new_socket(addr: SocketAddr, options: &ConnectOptions) -> io::Result<Socket> {
    let create = || Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP));
    let socket = match &options.netns {
        Some(netns) => netns.run_in(create)?,
        None => create()?,
    };
    if let Some(mark) = options.mark {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

/// IP_TRANSPARENT lets the socket use any source; without the right to it, IP_FREEBIND is enough where routing already
/// brings the answers back.
fn allow_foreign_source(socket: &Socket, source: IpAddr) -> io::Result<()> {
    let transparent = if source.is_ipv4() { socket.set_ip_transparent_v4(true) } else { socket.set_ip_transparent_v6(true) };
    match transparent {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            if source.is_ipv4() {
                socket.set_freebind_v4(true)
            } else {
                socket.set_freebind_v6(true)
            }
        }
        result => result,
    }
}

/// Sends the SYN. `Ok` also while the handshake is under way.
fn start(socket: &Socket, addr: SocketAddr) -> io::Result<()> {
    match socket.connect(&addr.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        result => result,
    }
}

/// Waits for the handshake. TCP options are set while it runs, so that a port that was taken has not cost them.
async fn established(socket: Socket, options: &ConnectOptions) -> io::Result<TcpStream> {
    options.stream.apply(&socket)?;
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// Distinct enough, and not guessable from outside: `RandomState` is keyed by the operating system.
fn random_ports(ports: &RangeInclusive<u16>) -> impl Iterator<Item = u16> + use<> {
    let state = RandomState::new();
    let first = *ports.start();
    let width = u64::from(ports.end().saturating_sub(first)) + 1;
    (0..PORT_ATTEMPTS).map(move |attempt| {
        let mut hasher = state.build_hasher();
        hasher.write_u32(attempt);
        // The remainder is below `width`, which fits a port by construction.
        first + (hasher.finish() % width) as u16
    })
}

/// Makes this thread's next connects use random ports, as after a slow search.
#[cfg(test)]
pub(super) fn use_own_ports(connects: u32) {
    OWN_PORT.set(connects);
}
