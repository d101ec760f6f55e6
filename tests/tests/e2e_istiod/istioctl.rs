//! What `istioctl ztunnel-config` makes of an agent's dump, by its own code: nothing that is in it may be lost on the way.
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{AgentSpec, find_binary, workspace_dir};
use mesh_tests::mesh_dir::{MeshDir, yaml_files};
use mesh_tests::real_istiod::Istioctl;
use mesh_tests::suite::CannotRun;
use mesh_tests::topology::Plan;
use mesh_tests::{netns, skip};
use serde_json::Value;

/// Every mesh of this suite and the example's, as an agent knows them.
pub fn reads_every_mesh() -> anyhow::Result<()> {
    if let Some(why) = skip::netns_unavailable() {
        return Err(CannotRun(why).into());
    }
    find_binary().map_err(|error| CannotRun(format!("{error:#}")))?;
    let topology = Plan::default().node("node-1", "zone-1").build()?;
    let files = netns::scratch("istioctl")?;
    let (mut accounts, mut ports) = (0, 0);
    for mesh in ["tests/tests/e2e_istiod/meshes", "manifests/examples/zamaz"] {
        let dir = MeshDir::empty()?;
        for file in yaml_files(&workspace_dir().join(mesh))? {
            let name = file.file_name().and_then(|name| name.to_str()).context("a name")?;
            dir.put(name, &std::fs::read_to_string(&file)?)?;
        }
        // None of the pods are of its node: it only has to know of them.
        let agent = AgentSpec::new("elsewhere", dir.path(), Path::new(&files.path().join("ca")), files.path())
            .env("CULVERT_ENROL", "mesh")
            .env("CULVERT_REDIRECT", "none")
            .start(topology.node("node-1"))?;
        agent.wait_ready(Duration::from_secs(30)).with_context(|| agent.log_tail(20))?;
        let dump = agent.config_dump()?;
        let read = Istioctl::read(&dump)?;
        for (list, by) in [("workloads", "uid"), ("services", "hostname"), ("policies", "name")] {
            let (ours, theirs) = (sorted(&dump[list], by), sorted(read.list(list)?, by));
            ensure!(!ours.is_empty() && ours.len() == theirs.len(), "{list}: {} of {}", theirs.len(), ours.len());
            for (ours, theirs) in ours.iter().zip(&theirs) {
                if let Some((field, is)) = contradicted(theirs, ours, "") {
                    anyhow::bail!("{list}: `{field}` is {is} to istioctl: {ours}\n{theirs}");
                }
            }
        }
        let policies = read.list("policies")?.to_string();
        accounts += policies.matches("\"serviceAccount\"").count();
        ports += policies.matches("estinationPorts").count();
        ensure!(read.summary.contains("NAMESPACE POD NAME") && read.summary.contains("POLICY NAME"), "{}", read.summary);
    }
    ensure!(accounts > 0 && ports > 0, "the meshes lack what was to be read: {accounts} {ports}");
    Ok(())
}

/// Sorted by a name, and by all of it.
fn sorted<'a>(list: &'a Value, by: &str) -> Vec<&'a Value> {
    let mut all: Vec<&Value> = list.as_array().into_iter().flatten().collect();
    all.sort_by_key(|one| (one[by].to_string(), one["namespace"].to_string()));
    all
}

/// The first field that istioctl knows of and has another value for than the dump. What it leaves out is empty.
fn contradicted(theirs: &Value, ours: &Value, at: &str) -> Option<(String, String)> {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) => theirs.iter().find_map(|(key, value)| {
            let nothing = Value::Null;
            contradicted(value, ours.get(key).unwrap_or(&nothing), &format!("{at}.{key}"))
        }),
        (Value::Array(theirs), Value::Array(ours)) if theirs.len() == ours.len() => {
            theirs.iter().zip(ours).find_map(|(theirs, ours)| contradicted(theirs, ours, at))
        }
        (theirs, ours) if theirs == ours || (is_nothing(theirs) && is_nothing(ours)) => None,
        _ => Some((at.to_owned(), theirs.to_string())),
    }
}
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.values().all(is_nothing),
        _ => false,
    }
}
