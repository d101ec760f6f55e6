//! Options every TCP stream of the mesh gets, and the limits of the process.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{SockRef, TcpKeepalive};

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
        Self { time: Duration::from_secs(180), interval: Duration::from_secs(180), retries: 9 }
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
            let settings = TcpKeepalive::new()
                .with_time(keepalive.time)
                .with_interval(keepalive.interval)
                .with_retries(keepalive.retries);
            socket.set_tcp_keepalive(&settings)?;
        }
        if self.user_timeout.is_some() {
            socket.set_tcp_user_timeout(self.user_timeout)?;
        }
        Ok(())
    }
}

/// Makes the coming close of `socket` an RST instead of a FIN (SO_LINGER with zero time), so that a reset of one side of
/// a relay stays a reset on the other. Data not yet sent is thrown away.
pub fn reset_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// Raises the soft limit of open files to the hard limit. Returns the limit in force.
pub fn raise_nofile() -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}
