//! Listening sockets that accept without tying the new connection to a thread.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

use super::options::StreamOptions;
use super::query::{canonical, original_dst};

/// How to listen.
#[derive(Clone, Debug)]
pub struct ListenerOptions {
    /// Address and port; port 0 asks for any.
    pub addr: SocketAddr,
    /// IP_TRANSPARENT: accept for addresses that are not ours (TPROXY, `sk_assign`).
    pub transparent: bool,
    /// SO_MARK.
    pub mark: Option<u32>,
    /// Connections the kernel may queue; bounded by `net.core.somaxconn`.
    pub backlog: i32,
    /// SO_REUSEPORT: a second process may listen too. Off: two agents on one port is a mistake unless it is asked for.
    pub reuse_port: bool,
    /// IPV6_V6ONLY. Off: `[::]` takes IPv4 as well.
    pub v6only: bool,
    /// TCP options of the accepted connections. The kernel copies them from the listening socket, so they cost nothing per
    /// connection; [`RawAccepted::tune`] can still change one.
    pub stream: StreamOptions,
}

impl ListenerOptions {
    /// Defaults for `addr`: backlog 1024, the usual TCP options, nothing special.
    pub fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            transparent: false,
            mark: None,
            backlog: 1024,
            reuse_port: false,
            v6only: false,
            stream: StreamOptions::default(),
        }
    }

    /// Binds and listens in the calling thread's network namespace ([`super::NetnsFd::run_in`] for another one).
    ///
    /// # Errors
    /// As the kernel says; EPERM for `mark` and `transparent` without CAP_NET_ADMIN.
    pub fn bind(&self) -> io::Result<BoundListener> {
        let socket = Socket::new(Domain::for_address(self.addr), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
        prepare(&socket, self.addr, self.mark, self.reuse_port, self.v6only)?;
        // A restarted agent must not wait for the connections of the last one to leave TIME_WAIT.
        socket.set_reuse_address(true)?;
        if self.transparent {
            if self.addr.is_ipv6() {
                socket.set_ip_transparent_v6(true)?;
            } else {
                socket.set_ip_transparent_v4(true)?;
            }
        }
        self.stream.apply(&socket)?;
        socket.bind(&self.addr.into())?;
        socket.listen(self.backlog)?;
        Ok(BoundListener { socket })
    }
}

fn prepare(socket: &Socket, addr: SocketAddr, mark: Option<u32>, reuse_port: bool, v6only: bool) -> io::Result<()> {
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    if addr.is_ipv6() {
        socket.set_only_v6(v6only)?;
    }
    Ok(())
}

/// A non-blocking UDP socket bound in the calling thread's network namespace, for `tokio::net::UdpSocket::from_std`.
pub fn bind_udp(addr: SocketAddr, mark: Option<u32>, reuse_port: bool) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    prepare(&socket, addr, mark, reuse_port, false)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// A listening socket that no runtime knows yet. May be moved to the thread that will accept.
#[derive(Debug)]
pub struct BoundListener {
    socket: Socket,
}

impl BoundListener {
    /// Registers it with the current runtime; an error outside of one.
    pub fn into_listener(self) -> io::Result<Listener> {
        tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        // SAFETY: `Socket` owns its descriptor, always reports the same one and is never replaced inside the `AsyncFd`,
        // so the registration and the descriptor end together.
        let socket = unsafe { AsyncFd::register_with_interest(self.socket, Interest::READABLE)? };
        Ok(Listener { socket })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        local_addr(&self.socket)
    }

    /// A second descriptor of the same listening socket, so that two threads can accept from one queue.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()? })
    }
}

/// A listening socket received from another process; non-blocking, as it was bound.
impl From<OwnedFd> for BoundListener {
    fn from(fd: OwnedFd) -> Self {
        Self { socket: fd.into() }
    }
}

impl AsFd for BoundListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A listening socket on the thread that registered it.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<Socket>,
}

impl Listener {
    /// [`ListenerOptions::bind`] and [`BoundListener::into_listener`].
    pub fn bind(options: &ListenerOptions) -> io::Result<Self> {
        options.bind()?.into_listener()
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        local_addr(self.socket.get_ref())
    }

    /// The next connection and its peer. The connection is non-blocking and known to no runtime, so it can still be handed
    /// to another data thread. Cancel safe.
    ///
    /// Connections that died in the queue are skipped. When descriptors or memory run out it waits (50 ms, doubling to
    /// 1 s) and tries again: the backlog holds the clients meanwhile, and a spinning accept loop would finish the node.
    ///
    /// # Errors
    /// Only what will not go away by itself, such as a socket that does not listen.
    pub async fn accept(&self) -> io::Result<(RawAccepted, SocketAddr)> {
        let mut pause = FIRST_PAUSE;
        loop {
            // Neither a full backlog nor a queue of dead connections keeps the thread from the connections it has.
            tokio::task::coop::consume_budget().await;
            let mut ready = self.socket.readable().await?;
            let accepted = ready.try_io(|socket| socket.get_ref().accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC));
            let error = match accepted {
                Err(_would_block) => continue,
                Ok(Ok((socket, peer))) => match peer.as_socket() {
                    Some(peer) => return Ok((RawAccepted { socket }, canonical(peer))),
                    None => continue, // not an IP socket: cannot come out of an IP listener
                },
                Ok(Err(error)) => error,
            };
            match after(&error) {
                After::Next => {}
                After::Pause => {
                    drop(ready);
                    paused(&error);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                After::Fail => return Err(error),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

fn local_addr(socket: &Socket) -> io::Result<SocketAddr> {
    let addr = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok(canonical(addr))
}

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What a failed accept means for the loop.
#[derive(Debug, PartialEq, Eq)]
enum After {
    Next,
    Pause,
    Fail,
}

fn after(error: &io::Error) -> After {
    match error.raw_os_error() {
        // The listening socket itself is wrong.
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP | libc::EFAULT) | None => After::Fail,
        // The connection died in the queue, or a firewall took it: accept(2), "error handling".
        Some(
            libc::ECONNABORTED
            | libc::ECONNRESET
            | libc::EINTR
            | libc::EPERM
            | libc::EPROTO
            | libc::ENOPROTOOPT
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENONET
            | libc::ETIMEDOUT,
        ) => After::Next,
        // EMFILE, ENFILE, ENOBUFS, ENOMEM; and whatever else, because an error that stays must not spin.
        Some(_) => After::Pause,
    }
}

static PAUSES: AtomicU64 = AtomicU64::new(0);

/// How often an accept had to wait because descriptors or memory ran out, since the process started.
pub fn accept_pauses() -> u64 {
    PAUSES.load(Ordering::Relaxed)
}

fn paused(error: &io::Error) {
    /// Seconds between warnings.
    const QUIET: u64 = 10;
    static WARNED: AtomicU64 = AtomicU64::new(0);
    let total = PAUSES.fetch_add(1, Ordering::Relaxed) + 1;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let last = WARNED.load(Ordering::Relaxed);
    if now.saturating_sub(last) >= QUIET && WARNED.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        tracing::warn!(%error, total, "cannot accept connections, waiting; raise the limit of open files");
    }
}

/// An accepted connection that no runtime knows yet.
#[derive(Debug)]
pub struct RawAccepted {
    socket: Socket,
}

impl RawAccepted {
    /// Registers the connection with the current runtime.
    pub fn into_tcp(self) -> io::Result<TcpStream> {
        TcpStream::from_std(self.socket.into())
    }

    /// The address the client connected to, as far as the socket knows.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        local_addr(&self.socket)
    }

    /// Where the client wanted to go before redirection. See [`original_dst`].
    pub fn original_dst(&self) -> io::Result<SocketAddr> {
        Ok(original_dst(&self.socket, self.local_addr()?))
    }

    /// Sets TCP options.
    pub fn tune(&self, options: &StreamOptions) -> io::Result<()> {
        options.apply(&self.socket)
    }
}

impl AsFd for RawAccepted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_accept_are_sorted_by_what_helps() {
        let class = |code| after(&io::Error::from_raw_os_error(code));
        assert_eq!(class(libc::EMFILE), After::Pause);
        assert_eq!(class(libc::ENOBUFS), After::Pause);
        assert_eq!(class(libc::ECONNABORTED), After::Next);
        assert_eq!(class(libc::EPERM), After::Next);
        assert_eq!(class(libc::EINVAL), After::Fail);
        assert_eq!(class(libc::ENOSYS), After::Pause, "unknown errors do not spin");
    }
}
