//! The load generator and the benchmarks of the node agent and of the waypoint.
//!
//! Owns: the load protocol ([`wire`]) and HTTP as load ([`talk`]), servers and clients ([`server`], [`client`]), a plain
//! relay to compare with ([`relay`]), what a run costs a process ([`process`]), the two-pod field on which agents are compared
//! ([`field`], `contract`), the row of pods in which waypoints are ([`row`]), the cases ([`case`]) and what is made of them
//! ([`report`], [`versus`]), and how their programs start ([`benchmark`]). Refuses: to know anything of an agent but its contract (flags, environment, files), so that another binary
//! with the same contract can be measured in the same run.
//! Upstream: the programs `loadgen`, `bench_l4` and `bench_l7`. Downstream: [`crate::netns`], [`crate::mesh_dir`], `/proc`.
pub mod benchmark;
pub mod case;
pub mod client;
mod contract;
pub mod field;
pub mod flags;
pub mod outcome;
pub mod parts;
pub mod process;
pub mod relay;
pub mod report;
pub mod row;
pub mod server;
pub mod talk;
pub mod versus;
pub mod wire;
