//! Checks that a listener keeps the contract in the crate's documentation, before any traffic depends on it.
use std::{
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd},
};

use ebpf_common::MARK_MASK;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::error::ListenerFault;

/// Identifies a network namespace for as long as the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetnsCookie(u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl NetnsCookie {
    /// What captured packets carry beside the mark that all pods' have.
    pub(crate) fn token(self) -> u16 {
        self.0 as u16
    }

    /// The calling thread's namespace.
    pub(crate) fn current() -> io::Result<Self> {
        use std::os::fd::AsFd;
        let probe = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Self::of(probe.as_fd())
    }

    fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        const SO_NETNS_COOKIE: libc::c_int = 71;
        get(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE).map(Self)
    }
}

/// What a listener answers from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Addresses {
    /// The pod's own addresses.
    Own,
    /// Any address.
    Foreign,
}

/// Checks one listener against the contract and the pod's namespace; it may have one of these marks.
pub(crate) fn check(
    listener: BorrowedFd<'_>,
    marks: &[u32],
    addresses: Addresses,
    netns: NetnsCookie,
) -> Result<(), ListenerFault> {
    let number = |level, option| get::<libc::c_int>(listener, level, option).map_err(ListenerFault::Unreadable);
    let require = |kept, fault| if kept { Ok(()) } else { Err(fault) };

    let tcp6 = number(libc::SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_INET6
        && number(libc::SOL_SOCKET, libc::SO_PROTOCOL)? == libc::IPPROTO_TCP;
    require(tcp6, ListenerFault::NotTcp6)?;
    require(number(libc::SOL_IPV6, libc::IPV6_V6ONLY)? == 0, ListenerFault::V6Only)?;
    require(number(libc::SOL_SOCKET, libc::SO_ACCEPTCONN)? == 1, ListenerFault::NotListening)?;
    require(number(libc::SOL_SOCKET, libc::SO_REUSEPORT)? == 0, ListenerFault::ReusePort)?;
    let mark = number(libc::SOL_SOCKET, libc::SO_MARK)?.cast_unsigned();
    require(marks.contains(&(mark & MARK_MASK)), ListenerFault::Unmarked)?;
    // One bit in the kernel for both families.
    let transparent = addresses == Addresses::Own || number(libc::SOL_IPV6, libc::IPV6_TRANSPARENT)? == 1;
    require(transparent, ListenerFault::NotTransparent)?;
    let cookie = NetnsCookie::of(listener).map_err(ListenerFault::Unreadable)?;
    require(cookie == netns, ListenerFault::ForeignNamespace)
}

/// Reads a socket option that is a plain integer of exactly this size.
#[expect(unsafe_code, reason = "nix has no SO_NETNS_COOKIE, SO_DOMAIN or readable IPV6_TRANSPARENT")]
fn get<T: Copy + Default>(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int) -> io::Result<T> {
    let mut value = T::default();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is writable for `length` bytes and every bit pattern of an integer is valid.
    let result = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if length as usize != size_of::<T>() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(value)
}
