//! A network namespace held by descriptor, and the short excursion into it.
//!
//! A socket belongs for ever to the namespace it was created in, so only its creation happens inside; the thread is back
//! before anything can suspend. A thread that cannot come back would run later connections in a stranger's network, so the
//! process aborts instead.

use std::cell::{Cell, OnceCell};
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::rc::Rc;

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// What makes two descriptors the same namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Device of the namespace file system.
    pub dev: u64,
    /// Inode: the number shown by `ls -l /proc/PID/ns/net`.
    pub inode: u64,
}

/// An open network namespace. The namespace lives at least as long as this.
#[derive(Debug)]
pub struct NetnsFd {
    fd: OwnedFd,
    id: NetnsId,
}

thread_local! {
    /// The namespace this thread belongs to, opened at its first excursion.
    static OWN: OnceCell<Rc<NetnsFd>> = const { OnceCell::new() };
    static AWAY: Cell<bool> = const { Cell::new(false) };
}

impl NetnsFd {
    /// Opens the namespace at `path` (`/proc/PID/ns/net`, `/var/run/netns/NAME`). Never waits, whatever is at that path: a
    /// FIFO opened for reading would otherwise block for a writer.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_fd(OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?.into())
    }

    /// Takes a descriptor that somebody sent. Refused with `InvalidInput` unless it is a namespace.
    ///
    /// That it is a *network* namespace is checked by the kernel when it is entered.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        if fstatfs(&fd)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace descriptor"));
        }
        let stat = fstat(&fd)?;
        Ok(Self { fd, id: NetnsId { dev: stat.st_dev, inode: stat.st_ino } })
    }

    /// The namespace the calling thread is in now.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Device and inode.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// The addresses of its interfaces, each once.
    ///
    /// # Errors
    /// As for [`NetnsFd::run_in`].
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        let of = |interface: InterfaceAddress| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        };
        let found: BTreeSet<IpAddr> = self.run_in(|| Ok(getifaddrs()?.filter_map(of).collect()))?;
        Ok(found.into_iter().collect())
    }

    /// Runs `f` with the calling thread inside this namespace, and comes back. No excursion when it is the thread's own.
    ///
    /// `f` must not block for long: nothing else runs on this thread meanwhile. Excursions do not nest.
    ///
    /// # Errors
    /// The namespace cannot be entered (CAP_SYS_ADMIN missing, not a network namespace), or the error of `f`.
    ///
    /// # Aborts
    /// The process, when the way back fails.
    pub fn run_in<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if AWAY.get() {
            return Err(io::Error::other("a network namespace excursion inside another one"));
        }
        let own = own()?;
        if own.id == self.id {
            return f();
        }
        setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
        AWAY.set(true);
        let _back = Back { own };
        f()
    }
}

impl AsFd for NetnsFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn own() -> io::Result<Rc<NetnsFd>> {
    OWN.with(|cell| {
        if let Some(own) = cell.get() {
            return Ok(Rc::clone(own));
        }
        let own = Rc::new(NetnsFd::current()?);
        Ok(Rc::clone(cell.get_or_init(|| own)))
    })
}

/// Goes back when dropped, also when the closure panics.
struct Back {
    own: Rc<NetnsFd>,
}

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.own.fd, CloneFlags::CLONE_NEWNET) {
            // No logger: nothing may run in this state, not even a log thread wake-up.
            eprintln!("fatal: cannot return to the own network namespace: {error}");
            std::process::abort();
        }
        AWAY.set(false);
    }
}
