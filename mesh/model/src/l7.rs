//! Layer 7: what a waypoint or gateway does with one HTTP request or one TCP connection. Pure, like everything here.
//!
//! Two halves. *What to do* comes from routes ([`route`]: VirtualService and Gateway API, one compiled form with their
//! different matching rules kept apart); *how to reach it* from destinations ([`destination`]: DestinationRule and
//! BackendTLSPolicy). Everything is compiled when it is translated: no regular expression is built, no weight is summed and
//! no header name is parsed while a request waits. Upstream: `mesh-sources`. Downstream: the waypoint's phases.

pub mod authorizer;
pub mod balance;
pub mod breaker;
pub mod compression;
mod cookie;
pub mod cors;
pub mod deadline;
pub mod destination;
pub mod failure;
pub mod fault;
pub mod gateway;
pub mod hash;
pub mod head;
pub mod headers;
pub mod index;
pub mod limit;
pub mod mirror;
pub mod outlier;
pub mod path;
pub mod policy;
pub mod request_auth;
pub mod retry;
pub mod rewrite;
pub mod route;
pub mod rules;
pub mod select;
pub mod session;
pub mod text;
pub mod treatment;
pub mod weights;

pub use destination::{Destination, TrafficPolicy};
pub use gateway::GatewayRoutes;
pub use route::{Backend, HttpMatch, HttpRoute, HttpRule, RequestFacts, RouteTable, TcpFacts};
pub use text::{Pattern, StringMatch};
pub use treatment::Treatment;
