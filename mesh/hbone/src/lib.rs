//! CONNECT over HTTP/2: client, server, pool, headers and the relay. Never sees a certificate.
//!
//! Takes streams that were authenticated elsewhere (or plain ones in tests) and turns them into tunnels whose streams carry
//! TCP connections. Upstream: the proxies' `outbound` and `inbound` shells. Downstream: `mesh-runtime` for drain and the
//! memory budget, `mesh-model` for identities, authorities and reasons.
//!
//! Everything of one tunnel (its driver, its streams, the relays on them) is meant to live on one data thread: the types
//! are `Send`, so moving them is safe, but every wake-up across threads costs more than the work it causes.
#![forbid(unsafe_code)]

pub mod client;
pub mod error;
pub mod headers;
pub mod pool;
pub mod relay;
pub mod server;
pub mod settings;
pub mod stream;
mod tunnel;

pub use client::{ConnectRequest, ResponseHead, Tunnel};
pub use error::HboneError;
pub use pool::{Dialer, Nested, Pool, PoolKey};
pub use relay::{RelayEnd, relay, relay_tcp};
pub use server::{Incoming, serve};
pub use settings::Settings;
pub use stream::{HboneIo, HboneStream, StreamError};
