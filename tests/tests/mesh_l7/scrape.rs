//! The pages of metrics and the alerts on them, as Prometheus itself reads them.
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use mesh_tests::skip;
use mesh_tests::suite::CannotRun;

use crate::mesh::{Mesh, WEB, curl};

/// Names that are not ours to choose: Istio's, Envoy's, those of Istio's agent.
const GIVEN: [&str; 3] = ["istio_", "envoy_", "workload_manager_"];

pub(crate) fn prometheus_takes_every_page(mesh: &mut Mesh) -> anyhow::Result<()> {
    if let Some(why) = skip::command_missing("promtool") {
        return Err(CannotRun(why).into());
    }
    // Of the kinds a request makes: answered, refused, to nobody.
    for path in ["/scraped", "/status/503"] {
        mesh.call(&[&format!("http://{WEB}{path}")])?;
    }
    curl(mesh.topology.host("outside"), &["-H", "host: nobody.example", &format!("http://{}/", mesh.pod("gw").v4)])?;
    for name in ["node-a", "node-b", "wp", "gw"] {
        let agent = mesh.proxy(name);
        let page = mesh_tests::http::get(&agent.place().netns, agent.stats_addr(), "/metrics")?.body;
        ensure!(page.contains("istio_build{"), "{name}: {page}");
        let file = mesh.logs.path().join(format!("{name}.prom"));
        fs::write(&file, &page)?;
        let output = Command::new("promtool").args(["check", "metrics"]).stdin(fs::File::open(&file)?).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        // 3: it can be read, and names break rules of style.
        let code = output.status.code().context("promtool was killed")?;
        let ours = said.lines().find(|line| !GIVEN.iter().any(|given| line.starts_with(given)));
        ensure!(code == 0 || (code == 3 && ours.is_none()), "{name}: promtool ends with {code}: {said}");
    }
    Ok(())
}

/// The alerts fire when they should and not before, by the cases beside them.
pub(crate) fn alerts_fire_as_they_should(_mesh: &mut Mesh) -> anyhow::Result<()> {
    if let Some(why) = skip::command_missing("promtool") {
        return Err(CannotRun(why).into());
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("manifests").join("monitoring");
    for args in [["check", "rules", "rules.yaml"], ["test", "rules", "rules.test.yaml"]] {
        let output = Command::new("promtool").args(args).current_dir(&folder).output()?;
        ensure!(
            output.status.success(),
            "{args:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
