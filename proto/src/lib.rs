//! The messages of other people's protocols, so that one crate knows their numbers: Istio's workload and authorization
//! discovery, its certificate API and its enrolment socket, Envoy's delta discovery that carries the first two, Envoy's
//! question to an external authorizer, SPIFFE's and SPIRE's certificates of a node, and OpenTelemetry's spans.
//!
//! Owns the wire and nothing else; what a message means is decided by who reads it. The modules are made from `defs/` by
//! `cargo xtask proto` and committed, so that a build needs no generator. Upstream: istiod, the CNI agent; authorizers and
//! collectors. Downstream: `mesh-sources`, `mesh-identity` and the waypoint.
#![forbid(unsafe_code)]

pub use prost::{DecodeError, Message};
pub use prost_types as well_known;

/// Istio.
#[rustfmt::skip]
pub mod istio {
    pub mod security;
    pub mod workload;
    /// The certificate API.
    pub mod v1 {
        pub mod auth;
    }
}
/// Envoy.
#[rustfmt::skip]
pub mod envoy {
    /// What all of Envoy's APIs share.
    pub mod config {
        /// Nodes.
        pub mod core {
            pub mod v3;
        }
    }
    /// Services.
    pub mod service {
        /// External authorization.
        pub mod auth {
            pub mod v3;
        }
        /// Discovery.
        pub mod discovery {
            pub mod v3;
        }
    }
}
/// SPIFFE and SPIRE.
#[rustfmt::skip]
pub mod spiffe {
    pub mod delegated;
    pub mod workload;
}
/// Google.
#[rustfmt::skip]
pub mod google {
    pub mod rpc;
}

/// OpenTelemetry.
#[rustfmt::skip]
pub mod opentelemetry {
    /// Its protocol, OTLP.
    pub mod proto {
        /// What all signals share.
        pub mod common {
            pub mod v1;
        }
        /// Who tells.
        pub mod resource {
            pub mod v1;
        }
        /// Spans.
        pub mod trace {
            pub mod v1;
        }
        /// Services.
        pub mod collector {
            /// Of spans.
            pub mod trace {
                pub mod v1;
            }
        }
    }
}

/// Resource type of workloads and services.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Resource type of L4 policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

#[cfg(test)]
mod tests;
