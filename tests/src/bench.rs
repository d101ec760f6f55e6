//! The load generator and the benchmark of the node agent.
//!
//! Owns: the load protocol ([`wire`]), its server and clients ([`server`], [`client`]), a plain
//! relay to compare with ([`relay`]), what a run costs a process
//! ([`process`]), the two-pod field on which peers are compared ([`field`]), the cases ([`case`]) and what is made of them
//! ([`report`]). Refuses: to know anything of an agent but its contract (flags, environment, files), so that another binary
//! with the same contract can be measured in the same run.
//! Upstream: the programs `loadgen` and `bench_l4`. Downstream: [`crate::netns`], [`crate::mesh_dir`], `/proc`.
pub mod case;
pub mod client;
pub mod field;
pub mod flags;
pub mod outcome;
pub mod process;
pub mod relay;
pub mod report;
pub mod server;
pub mod wire;
