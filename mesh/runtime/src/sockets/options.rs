//! Options every TCP stream of the mesh gets, and the limits of the process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use super::netns::NetnsFd;

/// TCP keepalive. Defaults are the reference node agent's: 180 s, 180 s, 9.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe. Whole seconds.
    pub time: Duration,
    /// Time between probes. Whole seconds.
    pub interval: Duration,
    /// Unanswered probes before the connection is dead.
    pub retries: u32,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { time: Duration::from_mins(3), interval: Duration::from_mins(3), retries: 9 }
    }
}

/// What is set on an accepted or connected stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// `None` leaves keepalive off.
    pub keepalive: Option<Keepalive>,
    /// TCP_NODELAY.
    pub nodelay: bool,
    /// TCP_USER_TIMEOUT: how long written data may stay unacknowledged. `None` leaves the kernel's default.
    pub user_timeout: Option<Duration>,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { keepalive: Some(Keepalive::default()), nodelay: true, user_timeout: None }
    }
}

impl StreamOptions {
    /// Sets the options on a socket.
    pub fn apply(&self, socket: &impl AsFd) -> io::Result<()> {
        let socket = SockRef::from(socket);
        if self.nodelay {
            socket.set_tcp_nodelay(true)?;
        }
        if let Some(keepalive) = self.keepalive {
            let settings =
                TcpKeepalive::new().with_time(keepalive.time).with_interval(keepalive.interval).with_retries(keepalive.retries);
            socket.set_tcp_keepalive(&settings)?;
        }
        if self.user_timeout.is_some() {
            socket.set_tcp_user_timeout(self.user_timeout)?;
        }
        Ok(())
    }
}

/// A right that in-pod mode needs and the process does not have in fact, whatever its capability set says (seccomp, a user
/// namespace, a security module).
#[derive(Debug, thiserror::Error)]
pub enum MissingRight {
    /// Entering a network namespace, tried with the own one.
    #[error("cannot enter network namespaces (CAP_SYS_ADMIN): {0}")]
    Setns(#[source] io::Error),
    /// Marking packets.
    #[error("cannot mark packets (SO_MARK, CAP_NET_ADMIN): {0}")]
    Mark(#[source] io::Error),
    /// Using foreign addresses.
    #[error("cannot use foreign source addresses (IP_TRANSPARENT, CAP_NET_ADMIN or CAP_NET_RAW): {0}")]
    Transparent(#[source] io::Error),
}

/// Tries, once at start, what in-pod mode does for every connection.
pub fn probe_rights(mark: u32) -> Result<(), MissingRight> {
    let own = NetnsFd::current().map_err(MissingRight::Setns)?;
    setns(&own, CloneFlags::CLONE_NEWNET).map_err(|error| MissingRight::Setns(error.into()))?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None).map_err(MissingRight::Mark)?;
    socket.set_mark(mark).map_err(MissingRight::Mark)?;
    socket.set_ip_transparent_v4(true).map_err(MissingRight::Transparent)
}

/// Makes the coming close of `socket` an RST instead of a FIN (SO_LINGER with zero time), so that a reset of one side of
/// a relay stays a reset on the other. Data not yet sent is thrown away.
pub fn reset_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// Descriptors whose table is made at once: 512 KiB of the kernel's memory.
const ROOM: u64 = 1 << 16;

/// Raises the soft limit of open files to the hard limit, and makes room for many at once. Returns the limit in force.
///
/// Left alone, Linux doubles the table of descriptors whenever it is full (at 64, 128, 256...), and the thread that needs the
/// next one, a data thread in the middle of a request, waits for an RCU grace period: 10 to 30 ms, with all that it serves.
pub fn raise_nofile() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    // A table only grows. Where there is no room, it grows as it would have.
    if let Ok(highest) = i32::try_from(hard.min(ROOM).saturating_sub(1))
        && let Ok(any) = File::open("/dev/null")
        && let Ok(high) = fcntl(&any, FcntlArg::F_DUPFD_CLOEXEC(highest))
    {
        // SAFETY: the call above made this descriptor, and nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(high) });
    }
    Ok(hard)
}
