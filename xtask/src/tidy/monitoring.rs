//! Alerts and dashboards speak of metrics that some program tells: a metric that is renamed must not leave an alert that never fires.

use anyhow::Result;
use std::collections::BTreeSet;
use std::path::Path;

/// Where they are.
const FOLDER: &str = "manifests/monitoring";
/// Starts of the names our programs tell.
const STARTS: [&str; 5] = ["culvert_", "istio_", "envoy_cluster_", "workload_manager_", "process_"];
/// What Prometheus adds to the name of a histogram.
const PARTS: [&str; 3] = ["_bucket", "_sum", "_count"];

/// Every name that is told of in the folder and by nobody in `sources`.
pub fn check(root: &Path, sources: &[String]) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let mut files: Vec<_> = std::fs::read_dir(root.join(FOLDER))?.collect::<Result<_, _>>()?;
    files.sort_by_key(std::fs::DirEntry::file_name);
    for file in files {
        let text = std::fs::read_to_string(file.path())?;
        let unknown = named(&text).into_iter().filter(|name| !sources.iter().any(|source| tells(source, name)));
        faults.extend(unknown.map(|name| format!("{FOLDER}/{}: no program tells {name}", file.file_name().display())));
    }
    Ok(faults)
}

/// Names of metrics in a text.
fn named(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| STARTS.iter().any(|start| word.starts_with(start))).collect()
}

/// Whether `source` has the name as a text of its own.
fn tells(source: &str, name: &str) -> bool {
    let whole = PARTS.iter().find_map(|part| name.strip_suffix(part));
    [Some(name), whole].into_iter().flatten().any(|name| source.contains(&format!("\"{name}\"")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_looked_up() {
        let text = "expr: sum(rate(culvert_a_seconds_bucket{x=\"1\"}[5m])) / up > istio_b_total";
        assert_eq!(named(text).into_iter().collect::<Vec<_>>(), ["culvert_a_seconds_bucket", "istio_b_total"]);
        let source = r#"counter("istio_b_total"); histogram("culvert_a_seconds")"#;
        assert!(tells(source, "istio_b_total") && tells(source, "culvert_a_seconds_bucket"));
        assert!(!tells(source, "istio_b") && !tells(source, "culvert_c_total"));
    }
}
