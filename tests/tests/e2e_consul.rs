//! Ring 4: the same mesh, described by a real Consul. Skipped where it is not installed.
#[path = "mesh_consul/mesh.rs"]
mod mesh;

use std::process::ExitCode;

use mesh_tests::real_consul::{self, ConsulServer};
use mesh_tests::{skip, suite};

fn main() -> ExitCode {
    let start: mesh::Start = |place, dir| Ok(Box::new(ConsulServer::start(place, dir)?));
    let cannot = skip::netns_unavailable().or_else(real_consul::missing);
    suite::run("e2e_consul", cannot, || mesh::set_up(start), mesh::TESTS)
}
