//! What the pod's namespace needs besides programs: one routing rule and one route per family, and settings of interfaces.
//!
//! `eth_egress` turns a packet around with [`MARK_CAPTURE`]. Its destination is somewhere else, so the rule sends
//! marked packets to a table whose one route says "everything is local". Its source is the pod's own address, which IPv4
//! refuses on input unless `accept_local` is set (by netlink: `/proc/sys` is read-only in many containers). What others send
//! with that source is still refused, by the programs.
use std::io;

use ebpf_common::{MARK_CAPTURE, MARK_MASK};

use crate::{
    error::RedirectError,
    netlink::{
        NLM_F_CREATE_EXCLUSIVE, NLM_F_DUMP, Netlink, RTM_DELROUTE, RTM_DELRULE, RTM_GETLINK, RTM_NEWLINK, RTM_NEWROUTE,
        RTM_NEWRULE, RTM_SETLINK, Request, attributes, find_attribute, push_attribute, u16_at, u32_at,
    },
};

/// The table; its number is the mark, which nobody else has a reason to pick.
const TABLE: u32 = MARK_CAPTURE;
/// After the kernel's `local` table (0), before any rule of a network plugin.
const RULE_PRIORITY: u32 = 10;
/// `rtm_protocol` and `FRA_PROTOCOL` of what we make, from the range no daemon has registered.
const PROTOCOL: u8 = 0x53;

pub(crate) const LO_INDEX: u32 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_PPP: u16 = 512;
const ARPHRD_RAWIP: u16 = 519;
const ARPHRD_TUNNEL: u16 = 768;
const ARPHRD_TUNNEL6: u16 = 769;
const ARPHRD_LOOPBACK: u16 = 772;
const ARPHRD_SIT: u16 = 776;
const ARPHRD_IPGRE: u16 = 778;
const ARPHRD_IP6GRE: u16 = 823;
const ARPHRD_NONE: u16 = 0xfffe;

const IFLA_IFNAME: u16 = 3;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;

/// An interface as far as the redirection cares.
#[derive(Debug)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) up: bool,
    kind: u16,
}

impl Interface {
    /// `lo`.
    pub(crate) fn loopback() -> Self {
        Self { index: LO_INDEX, name: "lo".to_owned(), up: true, kind: ARPHRD_LOOPBACK }
    }

    /// Where the programs would not read the frames.
    pub(crate) fn unsupported(&self) -> RedirectError {
        RedirectError::UnsupportedInterface { name: self.name.clone(), kind: self.kind }
    }

    pub(crate) fn frames(&self) -> Frames {
        match self.kind {
            ARPHRD_ETHER | ARPHRD_LOOPBACK => Frames::Ethernet,
            // Those that the kernel knows to have no header (`dev_is_mac_header_xmit`). What does not begin with IP's is dropped.
            ARPHRD_NONE | ARPHRD_RAWIP | ARPHRD_PPP | ARPHRD_TUNNEL | ARPHRD_TUNNEL6 | ARPHRD_SIT | ARPHRD_IPGRE
            | ARPHRD_IP6GRE => Frames::Bare,
            _ => Frames::Unknown,
        }
    }
}

/// What an interface's packets begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frames {
    /// An Ethernet header.
    Ethernet,
    /// The header of IP: tun, `WireGuard`, tunnels of the kernel.
    Bare,
    /// Something else.
    Unknown,
}

/// Every interface of the namespace, `lo` included.
pub(crate) fn interfaces(netlink: &mut Netlink) -> Result<Vec<Interface>, RedirectError> {
    let links = netlink
        .ask(Request::new(RTM_GETLINK, NLM_F_DUMP, &ifinfomsg(0)))
        .map_err(|source| RedirectError::Netlink { what: "list the pod's interfaces", source })?;
    Ok(links
        .iter()
        .filter_map(|link| {
            let name = find_attribute(link.get(IFINFOMSG_LEN..)?, IFLA_IFNAME)?;
            Some(Interface {
                index: u32_at(link, 4)?,
                name: String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned(),
                up: u32_at(link, 8)? & IFF_UP != 0,
                kind: u16_at(link, 2)?,
            })
        })
        .collect())
}

/// A setting of an interface, by its number in the kernel.
#[derive(Clone, Copy, Debug)]
#[repr(u16)]
pub(crate) enum Setting {
    /// `accept_local`.
    AcceptLocal = 23,
    /// `src_valid_mark`: strict `rp_filter` looks a source up with the packet's mark.
    SourceByMark = 24,
}

/// What was made in a namespace, to be unmade.
#[derive(Debug)]
pub(crate) struct Plumbing {
    ipv6: bool,
    /// Settings that were turned on, of interfaces by their numbers, and what they were.
    settings: Vec<(u32, Setting, u32)>,
}

impl Plumbing {
    /// Makes rules and routes, and turns these settings on. What an agent that died left behind is taken over.
    pub(crate) fn install(netlink: &mut Netlink, on: &[(u32, Setting)]) -> Result<Self, RedirectError> {
        let read = |&(index, which): &(u32, Setting)| Ok((index, which, setting(netlink, index, which)?));
        let settings = on.iter().map(read).collect::<Result<_, RedirectError>>()?;
        let mut made = Self { ipv6: true, settings };
        let result = made.make(netlink);
        if result.is_err() {
            // The first error is the one worth telling; this is best effort.
            let _ = made.remove(netlink);
        }
        result.map(|()| made)
    }

    fn make(&mut self, netlink: &mut Netlink) -> Result<(), RedirectError> {
        let left_over = !create(netlink, rule(RTM_NEWRULE, NLM_F_CREATE_EXCLUSIVE, AF_INET), "add the IPv4 routing rule")?;
        if left_over {
            // The settings found are an agent's, not the pod's; this is the kernel's default.
            self.settings.iter_mut().for_each(|(.., value)| *value = 0);
        }
        create(netlink, route(RTM_NEWROUTE, NLM_F_CREATE_EXCLUSIVE, AF_INET), "add the IPv4 route")?;
        match netlink.ask(route(RTM_NEWROUTE, NLM_F_CREATE_EXCLUSIVE, AF_INET6)) {
            Err(e) if e.raw_os_error() != Some(libc::EEXIST) => {
                // IPv6 is off on lo (`disable_ipv6`) or in the kernel. Should it come back, captured packets find no
                // route and are dropped: nothing goes around the agent.
                tracing::debug!(error = %e, "no IPv6 route in the pod's namespace, capturing IPv4 only");
                self.ipv6 = false;
            }
            _ => {
                create(netlink, rule(RTM_NEWRULE, NLM_F_CREATE_EXCLUSIVE, AF_INET6), "add the IPv6 routing rule")?;
            }
        }
        self.settings.iter().try_for_each(|(index, which, _)| set(netlink, *index, *which, 1))
    }

    /// Unmakes everything, going on after an error; the first error is returned.
    pub(crate) fn remove(&self, netlink: &mut Netlink) -> Result<(), RedirectError> {
        let mut results = vec![
            delete(netlink, rule(RTM_DELRULE, 0, AF_INET), "remove the IPv4 routing rule"),
            delete(netlink, route(RTM_DELROUTE, 0, AF_INET), "remove the IPv4 route"),
        ];
        if self.ipv6 {
            results.push(delete(netlink, rule(RTM_DELRULE, 0, AF_INET6), "remove the IPv6 routing rule"));
            results.push(delete(netlink, route(RTM_DELROUTE, 0, AF_INET6), "remove the IPv6 route"));
        }
        results.extend(self.settings.iter().map(|(index, which, value)| set(netlink, *index, *which, *value)));
        results.into_iter().collect()
    }
}

/// Whether it was made now, rather than found.
fn create(netlink: &mut Netlink, request: Request, what: &'static str) -> Result<bool, RedirectError> {
    match netlink.ask(request) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(source) => Err(RedirectError::Netlink { what, source }),
    }
}

fn delete(netlink: &mut Netlink, request: Request, what: &'static str) -> Result<(), RedirectError> {
    match netlink.ask(request) {
        Ok(_) => Ok(()),
        // Gone is what was asked for.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
        Err(source) => Err(RedirectError::Netlink { what, source }),
    }
}

fn rule(kind: u16, flags: u16, family: u8) -> Request {
    const FR_ACT_TO_TBL: u8 = 1;
    const FRA_PRIORITY: u16 = 6;
    const FRA_FWMARK: u16 = 10;
    const FRA_TABLE: u16 = 15;
    const FRA_FWMASK: u16 = 16;
    const FRA_PROTOCOL: u16 = 21;
    // struct fib_rule_hdr: family, dst_len, src_len, tos, table, two reserved, action, flags (u32)
    let body = [family, 0, 0, 0, 0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
    Request::new(kind, flags, &body)
        .number(FRA_PRIORITY, RULE_PRIORITY)
        .number(FRA_FWMARK, MARK_CAPTURE)
        .number(FRA_FWMASK, MARK_MASK)
        .number(FRA_TABLE, TABLE)
        .attribute(FRA_PROTOCOL, &[PROTOCOL])
}

fn route(kind: u16, flags: u16, family: u8) -> Request {
    const RT_SCOPE_HOST: u8 = 254;
    const RTN_LOCAL: u8 = 2;
    const RTA_OIF: u16 = 4;
    const RTA_TABLE: u16 = 15;
    // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags (u32)
    let body = [family, 0, 0, 0, 0, PROTOCOL, RT_SCOPE_HOST, RTN_LOCAL, 0, 0, 0, 0];
    Request::new(kind, flags, &body).number(RTA_TABLE, TABLE).number(RTA_OIF, LO_INDEX)
}

const IFINFOMSG_LEN: usize = 16;

/// struct ifinfomsg: family, pad, type (u16), index (i32), flags (u32), change (u32)
fn ifinfomsg(index: u32) -> [u8; IFINFOMSG_LEN] {
    let mut body = [0; IFINFOMSG_LEN];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body
}

/// What a setting of an interface is.
fn setting(netlink: &mut Netlink, index: u32, which: Setting) -> Result<u32, RedirectError> {
    let error = |source| RedirectError::Netlink { what: "read the settings of an interface", source };
    let links = netlink.ask(Request::new(RTM_GETLINK, 0, &ifinfomsg(index))).map_err(error)?;
    let read = || {
        let of_link = links.first()?.get(IFINFOMSG_LEN..)?;
        let families = find_attribute(of_link, IFLA_AF_SPEC)?;
        let inet = find_attribute(families, u16::from(AF_INET))?;
        let (_, values) = attributes(inet).find(|(kind, _)| *kind == IFLA_INET_CONF)?;
        // An array of all settings; number n is at n - 1.
        u32_at(values, (which as usize - 1) * 4)
    };
    read().ok_or_else(|| error(io::ErrorKind::InvalidData.into()))
}

fn set(netlink: &mut Netlink, index: u32, which: Setting, value: u32) -> Result<(), RedirectError> {
    let mut settings = Vec::new();
    push_attribute(&mut settings, which as u16, &value.to_ne_bytes());
    let mut inet = Vec::new();
    push_attribute(&mut inet, IFLA_INET_CONF, &settings);
    let mut families = Vec::new();
    push_attribute(&mut families, u16::from(AF_INET), &inet);
    let request = Request::new(RTM_SETLINK, 0, &ifinfomsg(index)).attribute(IFLA_AF_SPEC, &families);
    match netlink.ask(request) {
        Ok(_) => Ok(()),
        // The interface went, and its settings with it.
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(source) => Err(RedirectError::Netlink { what: "change a setting of an interface", source }),
    }
}

/// Brings `lo` up; a new namespace starts with it down.
pub(crate) fn raise_lo(netlink: &mut Netlink) -> Result<(), RedirectError> {
    let mut body = ifinfomsg(LO_INDEX);
    body[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
    body[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
    match netlink.ask(Request::new(RTM_NEWLINK, 0, &body)) {
        Ok(_) => Ok(()),
        Err(source) => Err(RedirectError::Netlink { what: "bring lo up", source }),
    }
}
