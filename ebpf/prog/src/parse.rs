//! Reads a frame far enough to know what it may be: a plain TCP segment, something harmless, or something to drop.
//!
//! The frame's own bytes decide, not `skb->protocol`: a raw packet socket can set the latter to anything. What cannot be
//! read with certainty is never passed as harmless when it could be TCP or DNS.
use aya_ebpf::programs::TcContext;
use ebpf_common::{Config, Counter, DNS_PORT};

/// Length of an Ethernet header: where the IP header is on an interface of that kind.
pub const ETHERNET: usize = 14;
/// Where it is on one that has no header of its own (tun, WireGuard).
pub const BARE: usize = 0;
const IP4_LEN: usize = 20;
const IP6_LEN: usize = 40;
/// Ports to flags, and the window because it completes the word.
const TCP_READ: usize = 16;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

const ICMP: u8 = 1;
const IGMP: u8 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const NO_NEXT: u8 = 59;

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// A connection's addresses as the packet shows them, packed like the kernel's `bpf_sock_tuple`. Words, not bytes: half the
/// instructions for the verifier. Their bytes stay in network order.
#[derive(Clone, Copy)]
pub struct Tuple {
    pub words: [u32; 9],
    pub v6: bool,
}


impl Tuple {
    /// Bytes of [`Tuple::words`] that the kernel reads.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        if self.v6 { 36 } else { 12 }
    }

    #[inline(always)]
    fn ports(&self) -> u32 {
        u32::from_be(if self.v6 { self.words[8] } else { self.words[2] })
    }

    #[inline(always)]
    pub fn dport(&self) -> u16 {
        self.ports() as u16
    }

    #[inline(always)]
    pub fn sport(&self) -> u16 {
        (self.ports() >> 16) as u16
    }

    /// The source address as 128 bits, IPv4 mapped into IPv6.
    #[inline(always)]
    pub fn source(&self) -> [u32; 4] {
        let w = &self.words;
        if self.v6 { [w[0], w[1], w[2], w[3]] } else { [0, 0, 0xffffu32.to_be(), w[0]] }
    }

    /// Whether one end is a loopback address, in either form.
    #[inline(always)]
    fn touches_loopback(&self) -> bool {
        let w = &self.words;
        if self.v6 {
            loopback6(w[0], w[1], w[2], w[3]) || loopback6(w[4], w[5], w[6], w[7])
        } else {
            loopback4(w[0]) || loopback4(w[1])
        }
    }

    /// Whether it goes where it comes from. The kernel's IPv4 refuses such packets, but not where `accept_local` is set, as captured
    /// ones need it.
    #[inline(always)]
    fn to_itself(&self) -> bool {
        !self.v6 && self.words[0] == self.words[1]
    }
}

#[inline(always)]
fn loopback4(address: u32) -> bool {
    u32::from_be(address) >> 24 == 127
}

/// `::1`, or 127/8 mapped into IPv6.
#[inline(always)]
fn loopback6(a: u32, b: u32, c: u32, d: u32) -> bool {
    a | b == 0 && ((c == 0 && d == 1u32.to_be()) || (c == 0xffffu32.to_be() && loopback4(d)))
}

/// A TCP segment in its plain form: no IP options, no extension headers, not a fragment.
pub struct Segment {
    pub tuple: Tuple,
    flags: u8,
}

impl Segment {
    /// Whether a listener would open a connection for it.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN
    }

    /// Whether it is an acknowledgement without SYN or RST: the only other kind a listener may accept (SYN cookies).
    #[inline(always)]
    pub fn acknowledges(&self) -> bool {
        self.flags & (SYN | ACK | RST) == ACK
    }
}

/// What a frame may be.
pub enum Packet {
    Tcp(Segment),
    Udp(Tuple),
    /// UDP of which the ports are not known: behind extension headers, or a fragment.
    OddUdp,
    /// Nothing the programs have an opinion on, and what it counts as.
    Pass(Counter),
    Drop(Counter),
}

/// Classifies the frame, whose IP header is at `AT`: [`ETHERNET`] or [`BARE`].
#[inline(always)]
pub fn classify<const AT: usize>(ctx: &TcContext, config: &Config) -> Packet {
    // A tag the device strips or adds is not in the frame's bytes.
    // SAFETY: the kernel hands every classifier a valid `__sk_buff`; the verifier checks the access.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return refuse(config, Counter::RefusedFrame);
    }
    if AT == BARE {
        let Ok(version) = ctx.load::<u8>(0) else { return Packet::Drop(Counter::Malformed) };
        return match version >> 4 {
            4 => ipv4::<AT>(ctx, config),
            6 => ipv6::<AT>(ctx, config),
            _ => refuse(config, Counter::RefusedFrame),
        };
    }
    let Ok(ethertype) = ctx.load::<u16>(12) else { return Packet::Drop(Counter::Malformed) };
    match u16::from_be(ethertype) {
        ETH_P_IP => ipv4::<AT>(ctx, config),
        ETH_P_IPV6 => ipv6::<AT>(ctx, config),
        ETH_P_ARP => Packet::Pass(Counter::OtherPassed),
        _ => refuse(config, Counter::RefusedFrame),
    }
}

#[inline(always)]
fn refuse(config: &Config, why: Counter) -> Packet {
    if config.refuse_exotic() { Packet::Drop(why) } else { Packet::Pass(Counter::OtherPassed) }
}

#[inline(always)]
fn ipv4<const AT: usize>(ctx: &TcContext, config: &Config) -> Packet {
    let Ok(ip) = ctx.load::<[u32; IP4_LEN / 4]>(AT) else { return Packet::Drop(Counter::Malformed) };
    let version_and_length = u32::from_be(ip[0]) >> 24;
    // More-fragments and the offset; don't-fragment is no fragment.
    let fragment = u32::from_be(ip[1]) & 0x3fff;
    let protocol = (u32::from_be(ip[2]) >> 16) as u8;
    let plain = version_and_length == 0x45 && fragment == 0;
    match protocol {
        TCP if plain => {
            let Ok(tcp) = ctx.load::<[u32; TCP_READ / 4]>(AT + IP4_LEN) else { return Packet::Drop(Counter::Malformed) };
            segment(Tuple { words: [ip[3], ip[4], tcp[0], 0, 0, 0, 0, 0, 0], v6: false }, tcp[3])
        }
        TCP => Packet::Drop(Counter::OddTcp4),
        UDP if plain => {
            let Ok(ports) = ctx.load::<u32>(AT + IP4_LEN) else { return Packet::OddUdp };
            let tuple = Tuple { words: [ip[3], ip[4], ports, 0, 0, 0, 0, 0, 0], v6: false };
            if tuple.to_itself() { Packet::Drop(Counter::LoopbackOnWire) } else { Packet::Udp(tuple) }
        }
        UDP if fragment & 0x1fff == 0 && dns(ctx, AT + (version_and_length & 0x0f) as usize * 4) => {
            Packet::Drop(Counter::OddDns)
        }
        UDP => Packet::OddUdp,
        ICMP | IGMP => odd_other(plain),
        _ => refuse(config, Counter::RefusedProtocol),
    }
}

#[inline(always)]
fn ipv6<const AT: usize>(ctx: &TcContext, config: &Config) -> Packet {
    let Ok(ip) = ctx.load::<[u32; IP6_LEN / 4]>(AT) else { return Packet::Drop(Counter::Malformed) };
    match (u32::from_be(ip[1]) >> 8) as u8 {
        TCP => {
            let Ok(tcp) = ctx.load::<[u32; TCP_READ / 4]>(AT + IP6_LEN) else { return Packet::Drop(Counter::Malformed) };
            segment(Tuple { words: [ip[2], ip[3], ip[4], ip[5], ip[6], ip[7], ip[8], ip[9], tcp[0]], v6: true }, tcp[3])
        }
        UDP => {
            let Ok(ports) = ctx.load::<u32>(AT + IP6_LEN) else { return Packet::OddUdp };
            Packet::Udp(Tuple { words: [ip[2], ip[3], ip[4], ip[5], ip[6], ip[7], ip[8], ip[9], ports], v6: true })
        }
        ICMPV6 => odd_other(true),
        first => extended::<AT>(ctx, config, first),
    }
}

/// Follows the extension headers to what they carry.
#[inline(always)]
fn extended<const AT: usize>(ctx: &TcContext, config: &Config, first: u8) -> Packet {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    const MOBILITY: u8 = 135;
    const HIP: u8 = 139;
    const SHIM6: u8 = 140;

    let mut next = first;
    let mut at = AT + IP6_LEN;
    let mut later_fragment = false;
    let mut ended = false;
    for _ in 0..8 {
        let Ok(header) = (match next {
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY | HIP | SHIM6 => ctx.load::<[u8; 4]>(at),
            _ => {
                ended = true;
                break;
            }
        }) else {
            return Packet::Drop(Counter::Malformed);
        };
        at += match next {
            FRAGMENT => 8,
            AUTHENTICATION => (usize::from(header[1]) + 2) * 4,
            _ => (usize::from(header[1]) + 1) * 8,
        };
        let fragment = next == FRAGMENT;
        next = header[0];
        if fragment && u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 {
            // The rest of the chain is in the first fragment, which was judged whole (RFC 7112).
            later_fragment = true;
            ended = true;
            break;
        }
    }
    match next {
        _ if !ended => Packet::Drop(Counter::OddTcp6),
        TCP => Packet::Drop(Counter::OddTcp6),
        UDP if !later_fragment && dns(ctx, at) => Packet::Drop(Counter::OddDns),
        UDP => Packet::OddUdp,
        ICMPV6 | NO_NEXT => odd_other(false),
        _ if later_fragment => odd_other(false),
        _ => refuse(config, Counter::RefusedProtocol),
    }
}

#[inline(always)]
fn segment(tuple: Tuple, offset_flags_window: u32) -> Packet {
    if tuple.touches_loopback() || tuple.to_itself() {
        return Packet::Drop(Counter::LoopbackOnWire);
    }
    Packet::Tcp(Segment { tuple, flags: (u32::from_be(offset_flags_window) >> 16) as u8 })
}

/// Whether the UDP header at `at` is for the DNS port; a header that is not there cannot be.
#[inline(always)]
fn dns(ctx: &TcContext, at: usize) -> bool {
    matches!(ctx.load::<u16>(at + 2), Ok(port) if u16::from_be(port) == DNS_PORT)
}

#[inline(always)]
fn odd_other(plain: bool) -> Packet {
    Packet::Pass(if plain { Counter::OtherPassed } else { Counter::OddOther })
}
