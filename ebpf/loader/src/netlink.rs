//! As much of rtnetlink as the redirection needs: one request, one answer, in the calling thread's network namespace.
//!
//! Numbers are from the kernel's `linux/netlink.h`, `linux/rtnetlink.h`, `linux/fib_rules.h`, `linux/if_link.h` and `linux/pkt_sched.h`. Answers
//! are read with bounds checks throughout: a short or odd one is an error, never a panic.
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket};

use crate::{error::RedirectError, netns::within};

pub(crate) const RTM_NEWLINK: u16 = 16;
pub(crate) const RTM_GETLINK: u16 = 18;
pub(crate) const RTM_SETLINK: u16 = 19;
pub(crate) const RTM_NEWROUTE: u16 = 24;
pub(crate) const RTM_DELROUTE: u16 = 25;
pub(crate) const RTM_NEWRULE: u16 = 32;
pub(crate) const RTM_DELRULE: u16 = 33;
pub(crate) const RTM_NEWQDISC: u16 = 36;
pub(crate) const RTM_DELQDISC: u16 = 37;
pub(crate) const RTM_GETQDISC: u16 = 38;
pub(crate) const RTM_NEWTFILTER: u16 = 44;
pub(crate) const RTM_DELTFILTER: u16 = 45;
pub(crate) const RTM_GETTFILTER: u16 = 46;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE_EXCLUSIVE: u16 = 0x600;
pub(crate) const NLM_F_CREATE_OR_REPLACE: u16 = 0x500;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_LEN: usize = 16;
const ATTRIBUTE_HEADER_LEN: usize = 4;
/// The type's low bits; the others say "nested" and "network order".
const ATTRIBUTE_TYPE: u16 = 0x3fff;

/// A request being built.
pub(crate) struct Request {
    bytes: Vec<u8>,
    dump: bool,
}

impl Request {
    /// Starts a request with the fixed `body` that its type demands.
    pub(crate) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // length, set when sent
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // sequence, set when sent
        bytes.extend_from_slice(&0u32.to_ne_bytes()); // port id: the kernel fills it in
        bytes.extend_from_slice(body);
        Self { bytes, dump: flags & NLM_F_DUMP == NLM_F_DUMP }
    }

    /// Appends an attribute.
    pub(crate) fn attribute(mut self, kind: u16, payload: &[u8]) -> Self {
        push_attribute(&mut self.bytes, kind, payload);
        self
    }

    /// Appends a number attribute.
    pub(crate) fn number(self, kind: u16, value: u32) -> Self {
        self.attribute(kind, &value.to_ne_bytes())
    }
}

/// Appends one attribute to `bytes`, padded to four.
pub(crate) fn push_attribute(bytes: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    // Payloads here are a few numbers; the cast cannot lose anything.
    bytes.extend_from_slice(&((ATTRIBUTE_HEADER_LEN + payload.len()) as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The attributes in `bytes`, as far as they are well formed.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & ATTRIBUTE_TYPE;
        let payload = bytes.get(ATTRIBUTE_HEADER_LEN..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The payload of the first attribute of this type.
pub fn find_attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(k, payload)| (k == kind).then_some(payload))
}

/// The number at a byte offset.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// The number at a byte offset.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// A non-blocking socket that gets a message whenever an interface of the namespace comes, goes or changes.
pub fn watch_links(netns: BorrowedFd<'_>) -> Result<OwnedFd, RedirectError> {
    const RTMGRP_LINK: u32 = 1;
    let open = || -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_LINK))?;
        Ok(socket)
    };
    within(netns, || open().map_err(|source| RedirectError::Netlink { what: "watch the pod's interfaces", source }))
}

/// A route socket of the namespace it was opened in.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request and returns the bodies of the answers, without their headers; an error answer is the error.
    pub(crate) fn ask(&mut self, request: Request) -> io::Result<Vec<Vec<u8>>> {
        let Request { mut bytes, dump } = request;
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?.to_ne_bytes();
        // `Request::new` wrote the header, so both ranges exist; written with `get_mut` all the same.
        for (range, value) in [(0..4, length), (8..12, self.sequence.to_ne_bytes())] {
            bytes.get_mut(range).ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(&value);
        }
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;

        let mut answers = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        // Every answer ends with an acknowledgement, an error or the end of a dump. A pod has few interfaces: a hundred
        // buffers of them mean that something is wrong.
        for _ in 0..100 {
            let received = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC)?;
            let mut rest = buffer.get(..received).ok_or(io::ErrorKind::InvalidData)?;
            while !rest.is_empty() {
                let length = u32_at(rest, 0).ok_or(io::ErrorKind::InvalidData)? as usize;
                let kind = u16_at(rest, 4).ok_or(io::ErrorKind::InvalidData)?;
                let sequence = u32_at(rest, 8).ok_or(io::ErrorKind::InvalidData)?;
                let body = rest.get(HEADER_LEN..length).ok_or(io::ErrorKind::InvalidData)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    NLMSG_ERROR => {
                        let code = u32_at(body, 0).ok_or(io::ErrorKind::InvalidData)?.cast_signed();
                        if code != 0 {
                            return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                        }
                        if !dump {
                            return Ok(answers);
                        }
                    }
                    NLMSG_DONE => return Ok(answers),
                    _ => answers.push(body.to_vec()),
                }
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_as_written() {
        let mut bytes = Vec::new();
        push_attribute(&mut bytes, 3, b"eth0\0");
        push_attribute(&mut bytes, 0x8000 | 0x1a, &7u32.to_ne_bytes());
        assert_eq!(bytes.len(), 12 + 8);
        let read: Vec<_> = attributes(&bytes).collect();
        assert_eq!(read, [(3, &b"eth0\0"[..]), (0x1a, &7u32.to_ne_bytes()[..])]);
        assert_eq!(find_attribute(&bytes, 26), Some(&7u32.to_ne_bytes()[..]));
        assert_eq!(find_attribute(&bytes, 4), None);
    }

    #[test]
    fn broken_attributes_end_the_list_without_a_panic() {
        let mut whole = Vec::new();
        push_attribute(&mut whole, 1, &[1, 2, 3]);
        push_attribute(&mut whole, 2, &[4]);
        for cut in 0..whole.len() {
            assert!(attributes(&whole[..cut]).count() <= 2);
        }
        for length in [0u16, 1, 3, 9, u16::MAX] {
            let mut bytes = whole.clone();
            bytes[..2].copy_from_slice(&length.to_ne_bytes());
            assert!(attributes(&bytes).count() <= 2, "length {length}");
        }
    }

    #[test]
    fn the_kernel_answers_and_refuses() {
        let mut netlink = Netlink::open().expect("anyone may open a route socket");
        let links = netlink.ask(Request::new(RTM_GETLINK, NLM_F_DUMP, &[0; 16])).expect("and list links");
        assert!(links.iter().any(|link| u32_at(link, 4) == Some(1)), "lo is there");
        let mut nobody = [0; 16];
        nobody[4..8].copy_from_slice(&0x7fff_0000u32.to_ne_bytes());
        let error = netlink.ask(Request::new(RTM_GETLINK, 0, &nobody)).expect_err("no such link");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
