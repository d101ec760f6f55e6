//! Sockets in other people's network namespaces: listeners, connections with a borrowed source address, what the kernel
//! knows about them.
//!
//! Owns every system call the proxies make on sockets, and the only `unsafe` of the crate (TCP_INFO, reactor registration). It decides
//! nothing about traffic. Upstream: settings (marks, keepalive), the pods' namespaces. Downstream: capture, dial, deliver.

mod capability;
mod connect;
mod doorbell;
mod listen;
mod netns;
mod options;
mod owner;
mod query;
#[cfg(test)]
mod tests;

pub use capability::{Capability, MissingCapabilities, check_capabilities, missing_capabilities};
pub use connect::{ConnectOptions, connect};
pub use doorbell::Doorbell;
pub use listen::{BoundListener, Listener, ListenerOptions, RawAccepted, accept_pauses, bind_udp};
pub use netns::{NetnsFd, NetnsId};
pub use options::{Keepalive, MissingRight, StreamOptions, probe_rights, raise_nofile, reset_on_close};
pub use owner::SocketTable;
pub use query::{TcpInfo, canonical, is_reset, original_dst, peer_user, rtt, tcp_info};
