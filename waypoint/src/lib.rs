//! The layer 7 half of Culvert: takes tunnels from node agents, does HTTP, and carries each request on to the endpoint it
//! chose. The same program is the ingress and the egress gateway.
//!
//! Upstream: node agents (port 15008), or clients outside the mesh (gateway listeners). Downstream: the node agents of the
//! endpoints, or plain endpoints outside the mesh. What happens to one request is in [`exchange`], phase by phase.
#![forbid(unsafe_code)]

pub mod app;
pub mod body;
pub mod conn;
mod control;
mod crossing;
pub mod detect;
mod dump;
pub mod exchange;
pub mod facts;
pub mod http;
pub mod limits;
pub mod listen;
pub mod me;
mod opening;
mod phase;
pub mod places;
pub mod settings;
mod share;
pub mod stock;
pub mod tcp;
pub mod telemetry;
pub mod token;
pub mod tunnel;
mod upgrade;
pub mod upstream;

pub use settings::Settings;
