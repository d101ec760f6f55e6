//! What the admin server shows.
use crate::conn::Shared;
use mesh_sources::Diagnostics;
use serde_json::{Value, json};

/// Version of this build.
pub(crate) fn version() -> Value {
    json!({ "name": "waypoint", "version": env!("CARGO_PKG_VERSION") })
}

/// `/config_dump`: what this process knows and what it refused.
pub(crate) fn config(shared: &Shared, diagnostics: &Diagnostics) -> Value {
    let snap = shared.mesh.load_full();
    let routes: Vec<Value> =
        snap.routes().map(|(key, table)| json!({ "service": key.to_string(), "routes": format!("{table:?}") })).collect();
    json!({
        "version": snap.version(),
        "identity": shared.identity.as_str(),
        "services": snap.services().count(),
        "workloads": snap.workloads().count(),
        "routes": routes,
        "problems": diagnostics.list().iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}
