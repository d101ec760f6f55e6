//! The older way onto the hooks of an interface: filters of a `clsact` queueing discipline.
//!
//! To take a place of the newer kind (tcx) has the kernel wait for all its readers, at 250 ticks a second some 13 ms each, with the lock
//! of all interfaces held; to add a filter does not. But filters come after every program of the newer kind, and who may
//! change the pod's network may delete them. So they serve a pod at once, and only until it has its lasting places.
//!
//! A discipline of somebody else's is left alone. Numbers are from `linux/pkt_sched.h`, `linux/pkt_cls.h` and `linux/rtnetlink.h`.
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use aya::programs::TcAttachType;

use crate::netlink::{
    NLM_F_CREATE_EXCLUSIVE, NLM_F_CREATE_OR_REPLACE, NLM_F_DUMP, Netlink, RTM_DELQDISC, RTM_DELTFILTER, RTM_GETQDISC,
    RTM_GETTFILTER, RTM_NEWQDISC, RTM_NEWTFILTER, Request, find_attribute, push_attribute, u32_at,
};

/// `TC_H_CLSACT`, as parent, and as the handle of what is there.
const PARENT: u32 = 0xffff_fff1;
const HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
/// First of all filters, for all protocols (`ETH_P_ALL`, in network order).
const INFO: u32 = (1 << 16) | (3u16.to_be() as u32);
/// Its number at its place.
const FILTER: u32 = 1;
/// What ours are told from others by.
const NAME: &[u8] = b"culvert\0";
const TCMSG_LEN: usize = 20;

/// Makes a discipline on every interface, or on none: where somebody has filters on one, or the kernel has none. Filters of ours are what
/// an agent left that was killed; they stay until they are replaced.
pub(crate) fn make(netlink: &mut Netlink, interfaces: &[u32]) -> bool {
    for (made, &interface) in interfaces.iter().enumerate() {
        let mut done = netlink.ask(discipline(RTM_NEWQDISC, NLM_F_CREATE_EXCLUSIVE, interface)).map(drop);
        if done.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EEXIST)) {
            done = match is_clsact(netlink, interface).and_then(|is| Ok((is, find(netlink, interface)?))) {
                Ok((true, Found { others: false, .. })) => Ok(()),
                Ok(_) => done,
                Err(error) => Err(error),
            };
        }
        if let Err(error) = done {
            tracing::debug!(%error, interface, "no filters here");
            unmake(netlink, interfaces.get(..made).unwrap_or_default());
            return false;
        }
    }
    true
}

/// Takes back what [`make`] made. What cannot be taken away does nothing.
pub(crate) fn unmake(netlink: &mut Netlink, interfaces: &[u32]) {
    for &interface in interfaces {
        if clear(netlink, interface).is_ok_and(|found| !found.others) {
            let _ = gone(netlink, discipline(RTM_DELQDISC, 0, interface));
        }
    }
}

/// Has the program see what passes the hook, from the next packet on, in the place of one of ours that is there.
pub(crate) fn add(netlink: &mut Netlink, interface: u32, hook: TcAttachType, program: BorrowedFd<'_>) -> io::Result<()> {
    const TCA_BPF_FD: u16 = 6;
    const TCA_BPF_FLAGS: u16 = 8;
    const ACT_DIRECT: u32 = 1;
    let mut options = Vec::new();
    push_attribute(&mut options, TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
    push_attribute(&mut options, TCA_BPF_NAME, NAME);
    push_attribute(&mut options, TCA_BPF_FLAGS, &ACT_DIRECT.to_ne_bytes());
    let parent = if matches!(hook, TcAttachType::Ingress) { INGRESS } else { EGRESS };
    netlink.ask(filter(RTM_NEWTFILTER, NLM_F_CREATE_OR_REPLACE, interface, parent).attribute(TCA_OPTIONS, &options)).map(drop)
}

/// Takes our filters away, and the discipline they are of unless it has others.
pub(crate) fn remove(netlink: &mut Netlink, interface: u32) -> io::Result<()> {
    match clear(netlink, interface)? {
        Found { ours, others: false } if !ours.is_empty() => gone(netlink, discipline(RTM_DELQDISC, 0, interface)),
        _ => Ok(()),
    }
}

/// What filters there are.
struct Found {
    /// At which hooks; first those that turn packets around.
    ours: Vec<u32>,
    others: bool,
}

/// Takes our filters away.
fn clear(netlink: &mut Netlink, interface: u32) -> io::Result<Found> {
    let found = find(netlink, interface)?;
    found.ours.iter().try_for_each(|parent| gone(netlink, filter(RTM_DELTFILTER, 0, interface, *parent)))?;
    Ok(found)
}

fn find(netlink: &mut Netlink, interface: u32) -> io::Result<Found> {
    let mut found = Found { ours: Vec::new(), others: false };
    for parent in [EGRESS, INGRESS] {
        let there = match netlink.ask(Request::new(RTM_GETTFILTER, NLM_F_DUMP, &tcmsg(interface, 0, parent, 0))) {
            Ok(there) => there,
            Err(e) if is_absent(&e) => Vec::new(),
            Err(e) => return Err(e),
        };
        // Of each priority there is an answer that names no filter.
        for one in there.iter().filter(|one| u32_at(one, 8).is_some_and(|handle| handle != 0)) {
            if is_ours(one) {
                found.ours.push(parent);
            } else {
                found.others = true;
            }
        }
    }
    Ok(found)
}

/// Has something taken away; what is not there need not be.
fn gone(netlink: &mut Netlink, request: Request) -> io::Result<()> {
    match netlink.ask(request) {
        Err(e) if !is_absent(&e) => Err(e),
        _ => Ok(()),
    }
}

/// No interface, nothing on it that has filters, no such filter; or a kernel that knows none.
fn is_absent(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENODEV | libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP))
}

/// Whether what is there in the place of one is one: `ingress`, which it also may be, has one hook only.
fn is_clsact(netlink: &mut Netlink, interface: u32) -> io::Result<bool> {
    let there = netlink.ask(Request::new(RTM_GETQDISC, NLM_F_DUMP, &tcmsg(interface, 0, 0, 0)))?;
    let kind = |one: &Vec<u8>| find_attribute(one.get(TCMSG_LEN..)?, TCA_KIND).map(|kind| kind == b"clsact\0");
    let here = |one: &&Vec<u8>| u32_at(one, 4) == Some(interface) && u32_at(one, 8) == Some(HANDLE);
    Ok(there.iter().filter(here).any(|one| kind(one) == Some(true)))
}

fn is_ours(answer: &[u8]) -> bool {
    let name = || find_attribute(find_attribute(answer.get(TCMSG_LEN..)?, TCA_OPTIONS)?, TCA_BPF_NAME);
    u32_at(answer, 8) == Some(FILTER) && name() == Some(NAME)
}

fn discipline(kind: u16, flags: u16, interface: u32) -> Request {
    Request::new(kind, flags, &tcmsg(interface, HANDLE, PARENT, 0)).attribute(TCA_KIND, b"clsact\0")
}

fn filter(kind: u16, flags: u16, interface: u32, parent: u32) -> Request {
    Request::new(kind, flags, &tcmsg(interface, FILTER, parent, INFO)).attribute(TCA_KIND, b"bpf\0")
}

/// struct tcmsg: family, three of padding, ifindex (i32), handle, parent, info (u32)
fn tcmsg(interface: u32, handle: u32, parent: u32, info: u32) -> [u8; TCMSG_LEN] {
    let mut body = [0; TCMSG_LEN];
    for (at, value) in [(4, interface), (8, handle), (12, parent), (16, info)] {
        body[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    body
}
