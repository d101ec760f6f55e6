//! Ring 3: a mesh described by a stand-in of Consul.
#[path = "mesh_consul/mesh.rs"]
mod mesh;

use std::process::ExitCode;

use mesh_tests::consul::Consul;
use mesh_tests::{skip, suite};

fn main() -> ExitCode {
    let start: mesh::Start = |place, _| Ok(Box::new(Consul::serve(place.netns.listen(place.at(mesh::HTTP))?)?));
    suite::run("mesh_consul", skip::netns_unavailable(), || mesh::set_up(start), mesh::TESTS)
}
