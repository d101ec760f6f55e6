//! Black-box suites and the harness that builds topologies: real network namespaces, the real agent binary driven only
//! through its public contract (flags, environment, files, HTTP), and plain programs in the pods.
//!
//! Owns: what it takes to build and take down a small cluster on one machine ([`topology`]), to run agents in it
//! ([`agent`]), to run programs in its pods ([`program`]), to give them a mesh to obey ([`mesh_dir`]), to look at the
//! bytes on a link ([`capture`]), and to report honestly what could not run here ([`skip`], [`suite`]).
//! Refuses: any knowledge of the product's insides; nothing here links against a product crate but for the
//! messages of other people's protocols (`proto`).
//! Upstream: the suites in `tests/tests`, the demo and the benchmarks. Downstream: the `ip` command and the kernel.
#![forbid(unsafe_code)]

pub mod agent;
pub mod bench;
pub mod capture;
pub mod chart;
pub mod cni;
pub mod confine;
pub mod consul;
pub mod container;
pub mod dev_ca;
pub mod dns;
pub mod envoy;
pub mod grpc;
pub mod hbone;
pub mod http;
pub mod http1;
pub mod issuer;
pub mod istiod;
pub mod kube_api;
pub mod load;
pub mod mesh_dir;
pub mod meshctl;
pub mod name_server;
pub mod netns;
pub mod otlp;
pub mod program;
pub mod raw;
pub mod real_consul;
pub mod real_istiod;
pub mod real_kubernetes;
pub mod real_node;
pub mod real_spire;
mod revocation;
pub mod rpc;
pub mod rude;
pub mod skip;
pub mod spire;
pub mod suite;
pub mod tls;
pub mod topology;
pub mod wait;
pub mod web;
