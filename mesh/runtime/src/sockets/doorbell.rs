//! A descriptor that is read only to learn that something happened.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A non-blocking socket whose messages say no more than that they came.
#[derive(Debug)]
pub struct Doorbell {
    socket: AsyncFd<OwnedFd>,
}

impl Doorbell {
    /// Registers `socket` with the current runtime; an error outside of one.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        // SAFETY: an `OwnedFd` always reports the same descriptor and is never replaced inside the `AsyncFd`, so the
        // registration and the descriptor end together.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self { socket })
    }

    /// Waits until something came, and takes all that came. Messages that the kernel had to drop count. Cancel safe.
    ///
    /// # Errors
    /// The runtime is ending.
    pub async fn rung(&self) -> io::Result<()> {
        let mut ready = self.socket.readable().await?;
        // What is in a message does not matter, so it may be cut off.
        while matches!(recv(self.socket.as_raw_fd(), &mut [0; 64], MsgFlags::empty()), Ok(1..) | Err(Errno::ENOBUFS)) {}
        ready.clear_ready();
        Ok(())
    }
}
