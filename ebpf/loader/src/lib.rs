//! Puts one pod's TCP traffic in front of the agent, and takes it away again.
//!
//! Owns the compiled programs (`obj/redirect.bpf.o`, rebuilt by `cargo xtask ebpf`), their maps and links, and the routing
//! rule, route and `lo` settings they need in the pod's network namespace. It refuses to attach to listeners that break the
//! contract below, because a mistake there shows up as a loop or a bypass. Upstream: the node agent's pod table. Downstream:
//! `ebpf-common` and the kernel. No process is spawned; the calling thread never changes its namespace.
//!
//! # What the agent must do
//! All its sockets for a pod are made *in the pod's network namespace* and carry `SO_MARK` = [`MARK_AGENT`] before they
//! bind, connect or listen. Without the mark the agent's own dials are captured again, for ever. Those that only talk to the pod's
//! application, the outbound listener and deliveries, carry [`MARK_LOCAL`] instead, which exempts nobody.
//!
//! * **Captured outbound and inbound listeners** (two sockets): `AF_INET6` with `IPV6_V6ONLY` off, `IPV6_TRANSPARENT`
//!   (one flag for both families), the mark, bound to `[::]` and any port (the port is never dialled), never `SO_REUSEPORT` (the kernel
//!   would pick within the group instead of taking our choice), a backlog of 1024 or more. An accepted socket inherits mark
//!   and transparency; its local address is the connection's original destination, its peer address the original source,
//!   IPv4 as `::ffff:a.b.c.d`. [`Redirect::attach`] checks all of this.
//! * **HBONE listener**: a marked listener of that kind, transparent or not. Connections to [`Config::hbone_port`] are its own
//!   wherever it is bound, so that no program of the pod can have them, or keep the port from it.
//! * **Dial out for the pod**: a marked socket, nothing else. The pod's routes apply.
//! * **Deliver to the application with the client's address**: a socket of the client's family with `IP_TRANSPARENT` (or
//!   `IPV6_TRANSPARENT`), the mark and `SO_REUSEADDR`, bound to the client's address and *a port chosen from
//!   [`DELIVERY_PORTS`]*, connected to the pod's address and port; on `EADDRINUSE` or `EADDRNOTAVAIL` choose another. No
//!   `SO_BINDTODEVICE`. Its answers are brought back by the programs because they find that socket. Port 0 is a trap: the
//!   application's socket for (client address, our port) must not be the agent's socket for (client address, client's port),
//!   and on one node the kernel walks both sequences alike, so that they do meet; the client's SYN then ends in a socket that
//!   does not answer it (counter `tuple_in_use`). `IP_LOCAL_PORT_RANGE` does not help, it cannot widen the namespace's range.
//! * **Before [`Redirect::detach`]** close the listeners and the captured connections: once detached, what the application still sends on
//!   them goes to the network as it is.
//! * **When the pod goes**, drop everything of it: any socket and the [`Redirect`] keep its namespace alive.
//!
//! * **Once the pod has no connections from before** (at once for a new pod; else when `outbound_existing` stands still), set
//!   [`Config::with_reset_existing`].
//!
//! # When the agent is gone
//! With [`PodSpec::pins`] the programs, their maps and their links are pinned. Without an agent there is no listener, so new
//! connections are dropped, in and out, until the next agent attaches, which takes the pins over; connections that the agent
//! carried end with it. Without pins the programs end with the process and the pod's traffic is direct; the rule, route and
//! settings stay, do nothing on their own, and are taken over.
//!
//! # Limits
//! * Interfaces that appear after [`Redirect::attach`] are not covered until it is called again, on pins, when [`watch_links`] tells of a
//!   change and [`Redirect::is_outdated`].
//! * Under strict `rp_filter` what an application sends from one interface's address out of another's interface is dropped.
//! * A process in the pod that may set packet marks (`CAP_NET_ADMIN`, `CAP_NET_RAW`) can pass for the agent, as in Istio.
//! * UDP is not captured, so neither is TCP in a tunnel inside UDP; [`Config::with_refuse_udp`] refuses both.
//! * Frames that a process with `CAP_NET_RAW` hands to the device itself (packet sockets with `PACKET_QDISC_BYPASS`, `AF_XDP`)
//!   meet no program.
//! * With `tcp_fwmark_accept` on in the pod, what the agent accepts does not carry its mark: leave
//!   [`Config::with_reset_existing`] off there.
//! * A pod that forwards for others (containers in the pod, a router) must name its interfaces: on a bridge of its own, what
//!   it would forward is taken for inbound and dropped.
//! * TCP to link-local IPv6 addresses times out: the agent's socket would need an interface to answer from them.
//! * Until connections from before the attachment are reset (see above), a segment of a captured connection whose agent side
//!   is gone counts as one of them and passes.
#![deny(unsafe_code)]

mod attach;
mod clsact;
mod early;
mod error;
mod listener;
pub mod netlink;
mod netns;
mod object;
mod pins;
mod places;
mod plumbing;
mod probe;
mod sweep;

use std::ops::RangeInclusive;

pub use attach::{CaptureRoutes, Listeners, PodSpec, Redirect};
pub use early::Unsettled;
pub use ebpf_common::{Config, Counter, HBONE_PORT, MARK_AGENT, MARK_CAPTURE, MARK_LOCAL, MARK_MASK, MAX_SOURCES, Tally};
pub use error::{ListenerFault, RedirectError, Unsupported};
pub use listener::NetnsCookie;
pub use netlink::watch_links;
pub use object::{Source, Traffic};
pub use pins::{Owner, PinRoot};
pub use probe::probe;

/// Ports to deliver from with a client's address: below what clients are given by default (32768 and up) and below node ports.
pub const DELIVERY_PORTS: RangeInclusive<u16> = 2048..=29999;
