//! The node agent: captures the TCP traffic of enrolled pods and carries it over HBONE.
//!
//! Read [`outbound::serve_conn`] and [`inbound::serve_conn`] first: each is one direction, in the byte's order.
#![forbid(unsafe_code)]

pub mod accept;
mod access;
pub mod app;
mod carry;
pub mod check;
pub mod cni;
pub mod conns;
mod control;
mod deliver;
mod dial;
mod dialer;
pub mod dns;
mod dump;
pub mod enrolment;
pub mod environment;
mod gateways;
pub mod handover;
mod inbound;
pub mod metrics;
mod nft;
mod node;
pub mod outbound;
mod own;
mod passthrough;
pub mod pod;
pub mod pods;
pub mod ports;
mod prefilter;
mod proxy_protocol;
mod record;
mod report;
pub mod resolv;
pub mod settings;
mod sockets;
mod spans;
mod trace;
mod unix;
pub mod zds;

pub use settings::Settings;
