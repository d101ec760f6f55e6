//! The contract between the kernel programs (`ebpf/prog`) and the agent (`ebpf/loader`), written once.
//!
//! Owns the names, numbers and layouts both sides must agree on: maps, program names, listener slots, packet marks,
//! counters and the per-pod [`Config`]. It has no code that runs on either side beyond accessors, no dependencies and no
//! `unsafe`. A layout that changes after maps are pinned needs a new map name: a pinned map of the same size would be
//! accepted silently.
#![no_std]
#![forbid(unsafe_code)]

/// Names of the maps in the object.
pub mod map {
    /// `SOCKMAP`, indexed by [`super::Slot`]: the agent's listening sockets of this pod.
    pub const SOCKS: &str = "SOCKS";
    /// `ARRAY` with one [`super::Config`].
    pub const CONFIG: &str = "CONFIG";
    /// `PERCPU_ARRAY` of [`super::Tally`], indexed by [`super::Counter`].
    pub const TRAFFIC: &str = "TRAFFIC";
    /// `LRU_HASH` of [`super::SteerKey`] to [`super::Steer`]; written and read by the programs only.
    pub const STEER: &str = "STEER";
    /// `LPM_TRIE` of sources, as [`super::source_bits`] and prefix lengths of 128, to [`super::DENIED`] or [`super::ASK`].
    pub const SOURCES: &str = "SOURCES";
}

/// Names of the programs in the object.
pub mod program {
    /// tc egress of every Ethernet interface of the pod.
    pub const ETH_EGRESS: &str = "eth_egress";
    /// tc ingress of every Ethernet interface of the pod.
    pub const ETH_INGRESS: &str = "eth_ingress";
    /// tc egress of the pod's interfaces whose packets have no header before IP's.
    pub const IP_EGRESS: &str = "ip_egress";
    /// tc ingress of those.
    pub const IP_INGRESS: &str = "ip_ingress";
    /// tc egress of the pod's interfaces of other kinds: drops everything.
    pub const CLOSED_EGRESS: &str = "closed_egress";
    /// tc ingress of those.
    pub const CLOSED_INGRESS: &str = "closed_ingress";
    /// Keeps a tc hook of an interface while the others are made ready: every packet passes.
    pub const IDLE: &str = "idle";
    /// `sk_lookup` of the pod's network namespace.
    pub const STEER_LOOKUP: &str = "steer_lookup";
}

/// Mark of every socket of the agent: its packets are never captured. Istio uses the same number.
pub const MARK_AGENT: u32 = 0x539;
/// Mark of a packet that `eth_egress` turned around; the pod's routing rule delivers it locally.
pub const MARK_CAPTURE: u32 = 0x53a;
/// Mark of those of the agent's sockets that talk to the pod's application: where the kernel copies it to the application's answers
/// (`tcp_fwmark_accept`, `fwmark_reflect`) they are captured all the same.
pub const MARK_LOCAL: u32 = 0x53b;
/// The bits of a mark that are ours; the others belong to whoever set them.
pub const MARK_MASK: u32 = 0xfff;

/// Where HBONE is accepted unless the configuration says otherwise.
pub const HBONE_PORT: u16 = 15008;
/// Classic DNS.
pub const DNS_PORT: u16 = 53;

/// Index of a listener in [`map::SOCKS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Slot {
    /// Accepts what the pod dials.
    Out = 0,
    /// Accepts what others dial at the pod, except HBONE.
    In = 1,
    /// Accepts HBONE.
    Hbone = 2,
}

/// Entries of [`map::SOCKS`].
pub const SLOTS: u32 = 4;

/// Most entries of [`map::SOURCES`]; what does not fit is left to the agent.
pub const MAX_SOURCES: u32 = 4096;
/// Value of [`map::SOURCES`]: no connection from there is let in, whatever else is known of it.
pub const DENIED: u32 = 1;
/// Value of [`map::SOURCES`]: the agent decides, though a shorter prefix is denied.
pub const ASK: u32 = 0;

/// A source address as a key of [`map::SOURCES`]: its bytes, an IPv4 address mapped into IPv6.
#[must_use]
pub const fn source_bits(address: core::net::IpAddr) -> [u8; 16] {
    match address {
        core::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        core::net::IpAddr::V6(v6) => v6.octets(),
    }
}

/// What the programs of one pod do; may be replaced while they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    flags: u32,
    hbone_port: u16,
    token: u16,
}

const _: () = assert!(size_of::<Config>() == 8 && align_of::<Config>() == 4);

const FAIL_OPEN: u32 = 1;
const REFUSE_EXOTIC: u32 = 1 << 1;
const CAPTURE_DNS: u32 = 1 << 2;
const RESET_EXISTING: u32 = 1 << 3;
const REFUSE_UDP: u32 = 1 << 4;

impl Config {
    /// The defaults: no listener means drop, exotic traffic is refused, older connections live on, DNS is left alone.
    pub const DEFAULT: Self = Self { flags: REFUSE_EXOTIC, hbone_port: HBONE_PORT, token: 0 };

    const fn with(mut self, flag: u32, on: bool) -> Self {
        if on {
            self.flags |= flag;
        } else {
            self.flags &= !flag;
        }
        self
    }

    /// Whether a new connection goes around the agent while its listener is missing, instead of being dropped.
    #[must_use]
    pub const fn with_fail_open(self, on: bool) -> Self {
        self.with(FAIL_OPEN, on)
    }

    /// Whether frames and protocols that could carry a connection past the agent are refused: every frame that is not
    /// IPv4, IPv6 or ARP (so VLAN, MPLS), every IP protocol that is not TCP, UDP, ICMP or IGMP (so SCTP, IP-in-IP, GRE, ESP, AH).
    #[must_use]
    pub const fn with_refuse_exotic(self, on: bool) -> Self {
        self.with(REFUSE_EXOTIC, on)
    }

    /// Whether the pod's DNS over UDP is captured before it reaches an interface (by rules of nftables): with
    /// [`Config::with_refuse_udp`], what of it is seen there all the same is then UDP like any other.
    #[must_use]
    pub const fn with_capture_dns(self, on: bool) -> Self {
        self.with(CAPTURE_DNS, on)
    }

    /// Whether UDP is refused in both directions, but that of the agent's own sockets and, unless it is captured, DNS.
    #[must_use]
    pub const fn with_refuse_udp(self, on: bool) -> Self {
        self.with(REFUSE_UDP, on)
    }

    /// Whether outgoing segments of connections the agent does not own are given to the agent's listener, which resets
    /// them. Off by default, so that connections older than the enrolment live until they end. Turn it on as soon as there
    /// are none (at once for a pod that has just been created): only then can nothing of a captured connection reach the
    /// network after the agent's side of it is gone.
    #[must_use]
    pub const fn with_reset_existing(self, on: bool) -> Self {
        self.with(RESET_EXISTING, on)
    }

    /// The port whose incoming connections are HBONE's, wherever its listener is bound.
    #[must_use]
    pub const fn with_hbone_port(mut self, port: u16) -> Self {
        self.hbone_port = port;
        self
    }

    /// What captured packets carry beside [`MARK_CAPTURE`], so that no packet is taken for one by chance.
    #[must_use]
    pub const fn with_token(mut self, token: u16) -> Self {
        self.token = token;
        self
    }

    /// The whole mark of a captured packet.
    pub const fn capture_mark(&self) -> u32 {
        MARK_CAPTURE | (self.token as u32) << 12
    }

    /// See [`Config::with_fail_open`].
    pub const fn fail_open(&self) -> bool {
        self.flags & FAIL_OPEN != 0
    }

    /// See [`Config::with_refuse_exotic`].
    pub const fn refuse_exotic(&self) -> bool {
        self.flags & REFUSE_EXOTIC != 0
    }

    /// See [`Config::with_capture_dns`].
    pub const fn capture_dns(&self) -> bool {
        self.flags & CAPTURE_DNS != 0
    }

    /// See [`Config::with_refuse_udp`].
    pub const fn refuse_udp(&self) -> bool {
        self.flags & REFUSE_UDP != 0
    }

    /// See [`Config::with_reset_existing`].
    pub const fn reset_existing(&self) -> bool {
        self.flags & RESET_EXISTING != 0
    }

    /// See [`Config::with_hbone_port`].
    pub const fn hbone_port(&self) -> u16 {
        self.hbone_port
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A connection as its opener's packets show it: source address, destination address, source port, destination port, packed
/// as the kernel's `bpf_sock_tuple`. Bytes are in network order, so words are not numbers; IPv4 uses the first three words,
/// the rest are zero.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct SteerKey {
    /// The packed tuple.
    pub tuple: [u32; 9],
    /// 4 or 6.
    pub version: u32,
}

const _: () = assert!(size_of::<SteerKey>() == 40 && align_of::<SteerKey>() == 4);

/// Which listener a connection attempt belongs to, for the moment between tc and the socket lookup.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Steer {
    /// Kernel monotonic time after which the entry means nothing, nanoseconds.
    pub until: u64,
    /// A [`Slot`].
    pub slot: u32,
    /// Always zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Steer>() == 16 && align_of::<Steer>() == 8);

/// What is counted of one [`Counter`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Tally {
    /// Packets. Bulk traffic may arrive as super-packets that count once.
    pub packets: u64,
    /// Their bytes, link-layer headers included.
    pub bytes: u64,
}

const _: () = assert!(size_of::<Tally>() == 16 && align_of::<Tally>() == 8);

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What the programs count, packets and bytes. Of each packet on an interface of the pod something is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Counter {
            $($(#[$doc])* $variant,)*
        }

        impl Counter {
            /// Every counter, in map order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The counter's stable name, for metrics and tests.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

counters! {
    /// Egress: sent by the agent itself.
    AgentEgress = "agent_egress",
    /// Egress: a connection attempt handed to the agent.
    OutboundCaptured = "outbound_captured",
    /// Egress: a later segment of a connection the agent owns.
    OutboundOwned = "outbound_owned",
    /// Egress: a segment of a connection the agent does not own, older than the enrolment; passed.
    OutboundExisting = "outbound_existing",
    /// Egress: the same, handed to the agent's listener because the configuration says so.
    OutboundExistingReset = "outbound_existing_reset",
    /// Egress: a connection attempt dropped because the agent does not listen.
    OutboundNoListener = "outbound_no_listener",
    /// Egress: a connection attempt passed around the absent agent (`fail_open`).
    OutboundFailOpen = "outbound_fail_open",
    /// Ingress: a connection attempt that was turned around, assigned to the outbound listener.
    OutboundAssigned = "outbound_assigned",
    /// Ingress: a connection attempt assigned to the inbound listener.
    InboundAssigned = "inbound_assigned",
    /// Ingress: a connection attempt to the HBONE port, assigned to its listener.
    InboundHbone = "inbound_hbone",
    /// Ingress: a connection attempt dropped because the agent does not listen.
    InboundNoListener = "inbound_no_listener",
    /// Ingress: a connection attempt passed around the absent agent (`fail_open`).
    InboundFailOpen = "inbound_fail_open",
    /// Ingress: a segment of no known connection, given to the inbound listener, or that of HBONE, to answer.
    InboundStray = "inbound_stray",
    /// Ingress: a later segment to the HBONE port, left to its socket or, without one and without an agent, to the kernel's reset.
    InboundTunnel = "inbound_tunnel",
    /// Ingress: another later segment, left to the socket of its connection: one that was captured, the agent's own, or one
    /// older than the enrolment.
    InboundKnown = "inbound_known",
    /// A connection attempt for an address and port pair that already has a socket, left to the kernel to resolve.
    TupleInUse = "tuple_in_use",
    /// The socket lookup found the listener for such an attempt (the old socket was in TIME_WAIT).
    TupleReused = "tuple_reused",
    /// A connection attempt dropped because the kernel refused to assign it.
    AssignFailed = "assign_failed",
    /// Dropped: TCP over IPv4 with options or in fragments.
    OddTcp4 = "odd_tcp4",
    /// Dropped: TCP over IPv6 behind extension headers or in fragments, or behind more headers than can be followed.
    OddTcp6 = "odd_tcp6",
    /// Dropped: DNS over UDP with IPv4 options, IPv6 extension headers or in fragments.
    OddDns = "odd_dns",
    /// Passed: another protocol in such a form.
    OddOther = "odd_other",
    /// Passed: what is neither TCP nor UDP, so ARP and ICMP, and whatever else the configuration does not refuse.
    OtherPassed = "other_passed",
    /// Dropped: a packet too short for its own headers.
    Malformed = "malformed",
    /// Dropped: an IP protocol that could carry a connection past the agent.
    RefusedProtocol = "refused_protocol",
    /// Dropped: a frame that is not IPv4, IPv6 or ARP, or has a VLAN tag.
    RefusedFrame = "refused_frame",
    /// Dropped: what has no place on a real interface: TCP from or to a loopback address, TCP and UDP over IPv4 from the very address
    /// it goes to, a delivery of the agent's.
    LoopbackOnWire = "loopback_on_wire",
    /// Passed: DNS over UDP that nobody captured.
    DnsPassed = "dns_passed",
    /// Passed: other UDP, in both directions.
    UdpPassed = "udp_passed",
    /// Dropped: UDP, because the configuration says so.
    RefusedUdp = "refused_udp",
    /// Dropped: a connection attempt from a source that policy denies outright.
    DeniedSource = "denied_source",
}

/// Entries of [`map::TRAFFIC`], with room to grow without a new layout.
pub const COUNTERS: u32 = 64;

const _: () = assert!(Counter::ALL.len() <= COUNTERS as usize);
