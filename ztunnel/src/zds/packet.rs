//! Messages as packets of a `SOCK_SEQPACKET` socket, with descriptors beside them.
use mesh_proto::Message;
use mesh_proto::istio::workload::zds::{Ack, WorkloadResponse, workload_response};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, recvmsg, send, socket_with,
};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// Longest request. istio/ztunnel reads 1024 bytes.
const LONGEST: usize = 4096;
/// Longest text of an answer, in bytes: the other side has a buffer too.
const LONGEST_WHY: usize = 512;
/// How long one look at the socket may take; between looks the thread sees whether it is still wanted.
const LOOK: Duration = Duration::from_secs(1);

/// What came.
pub enum Heard<M> {
    /// Nothing yet.
    Nothing,
    /// The end of the connection.
    Closed,
    /// What is not a message, and why.
    Garbage(String),
    /// A message and the descriptors beside it.
    Message(M, Vec<OwnedFd>),
}

/// A connection.
pub struct Packets(OwnedFd);

impl Packets {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::over(socket)
    }

    /// Over a connected socket.
    pub fn over(socket: OwnedFd) -> io::Result<Self> {
        set_socket_timeout(&socket, Timeout::Recv, Some(LOOK))?;
        set_socket_timeout(&socket, Timeout::Send, Some(Duration::from_secs(5)))?;
        Ok(Self(socket))
    }

    /// Sends one message.
    pub fn send(&self, message: &impl Message) -> io::Result<()> {
        send(&self.0, &message.encode_to_vec(), SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Answers a request: with nothing, or with what is wrong.
    pub fn acknowledge(&self, why: &str) -> io::Result<()> {
        let end = why.floor_char_boundary(LONGEST_WHY);
        let error = why.get(..end).unwrap_or_default().to_owned();
        if !error.is_empty() {
            tracing::warn!(error, "refused to the CNI agent");
        }
        self.send(&WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) })
    }

    /// The next message, if one comes within a second.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn receive<M: Message + Default>(&self) -> io::Result<Heard<M>> {
        let mut body = [0; LONGEST];
        // One more than any request has, so that too many are seen as that.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let came = match recvmsg(&self.0, &mut [IoSliceMut::new(&mut body)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(came) => came,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Heard::Nothing),
            Err(error) => return Err(error.into()),
        };
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received);
            }
        }
        if came.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Ok(Heard::Garbage("a request that is too long, or with too many descriptors".into()));
        }
        if came.bytes == 0 && fds.is_empty() {
            return Ok(Heard::Closed);
        }
        match M::decode(body.get(..came.bytes).unwrap_or_default()) {
            Ok(message) => Ok(Heard::Message(message, fds)),
            Err(error) => Ok(Heard::Garbage(format!("a request that cannot be read: {error}"))),
        }
    }
}
