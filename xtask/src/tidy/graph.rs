//! The walls between crates: who may depend on whom, and what some crates may never see.
//!
//! A new crate or a new edge fails here until it is added on purpose, with the reason in `ARCHITECTURE.md`.

use crate::metadata::{Kind, Package};
use std::collections::BTreeMap;

/// Per crate of ours: which others of ours it may use in a build. Suites (`dev`) may use anything below `mesh-tests`.
const EDGES: &[(&str, &[&str])] = &[
    // L0: nothing of ours.
    ("mesh-model", &[]),
    ("mesh-runtime", &[]),
    ("mesh-proto", &[]),
    ("ebpf-common", &[]),
    // L1
    ("mesh-sources", &["mesh-model", "mesh-proto", "mesh-runtime"]),
    ("mesh-identity", &["mesh-model", "mesh-proto", "mesh-runtime"]),
    ("mesh-tokens", &["mesh-model"]),
    ("mesh-hbone", &["mesh-model", "mesh-runtime"]),
    ("mesh-spans", &["mesh-model", "mesh-proto", "mesh-runtime"]),
    ("ebpf-loader", &["ebpf-common"]),
    // L2
    (
        "ztunnel",
        &[
            "mesh-model",
            "mesh-runtime",
            "mesh-proto",
            "mesh-sources",
            "mesh-identity",
            "mesh-hbone",
            "mesh-spans",
            "ebpf-common",
            "ebpf-loader",
        ],
    ),
    (
        "waypoint",
        &["mesh-model", "mesh-runtime", "mesh-proto", "mesh-sources", "mesh-identity", "mesh-tokens", "mesh-hbone", "mesh-spans"],
    ),
    // L3
    ("meshctl", &["mesh-model", "mesh-runtime", "mesh-sources", "mesh-tokens"]),
    (
        "mesh-tests",
        &[
            "mesh-model",
            "mesh-runtime",
            "mesh-proto",
            "mesh-sources",
            "mesh-identity",
            "mesh-hbone",
            "ebpf-common",
            "ebpf-loader",
        ],
    ),
    ("xtask", &[]),
];

/// The whole list of other people's crates the pure core may use: none does I/O, none has a clock.
const MODEL_MAY_USE: &[&str] =
    &["arc-swap", "cel", "chrono", "foldhash", "hashbrown", "http", "ipnet", "regex", "serde", "thiserror"];

/// Per crate of ours: other people's crates it must never see, and why.
const NEVER: &[(&str, &[&str], &str)] = &[
    (
        "mesh-hbone",
        &["rustls", "tokio-rustls", "rustls-pki-types", "rustls-webpki", "rcgen", "x509-parser"],
        "tunnels never see certificates",
    ),
    ("mesh-identity", &["h2", "hyper"], "identities never see tunnels"),
    ("ztunnel", &["kube", "k8s-openapi", "serde-saphyr"], "the agent reads the mesh from mesh-sources only"),
];

/// `anyhow` loses which side failed and why; only programs that print and stop may use it.
const MAY_USE_ANYHOW: &[&str] = &["ztunnel", "waypoint", "meshctl", "mesh-tests", "xtask"];

/// Every edge that the tables do not allow.
pub fn check(members: &BTreeMap<&str, &Package>) -> Vec<String> {
    let mut faults = Vec::new();
    for (&name, package) in members {
        let Some((_, allowed)) = EDGES.iter().find(|(known, _)| *known == name) else {
            faults.push(format!("crate {name} is not in the graph (xtask/src/tidy/graph.rs): add it on purpose"));
            continue;
        };
        for dependency in &package.dependencies {
            let other = dependency.name.as_str();
            let ours = members.contains_key(other) || EDGES.iter().any(|(known, _)| *known == other);
            let fault = if dependency.kind == Kind::Dev {
                (ours && matches!(other, "mesh-tests" | "xtask"))
                    .then_some("suites of a crate may not need the black-box harness")
            } else if ours {
                (!allowed.contains(&other)).then_some("this edge is not in the graph")
            } else {
                foreign_fault(name, other)
            };
            faults.extend(fault.map(|why| format!("{name} → {other}: {why}")));
        }
    }
    faults
}

fn foreign_fault(name: &str, other: &str) -> Option<&'static str> {
    if name == "mesh-model" && !MODEL_MAY_USE.contains(&other) {
        return Some("the model is pure: no I/O, no clock, no runtime");
    }
    if other == "anyhow" && !MAY_USE_ANYHOW.contains(&name) {
        return Some("libraries have typed errors");
    }
    NEVER.iter().find(|(known, banned, _)| *known == name && banned.contains(&other)).map(|(_, _, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Dependency;
    use std::path::PathBuf;

    fn package(name: &str, dependencies: &[(&str, Kind)]) -> Package {
        Package {
            name: name.into(),
            version: "0.1.0".into(),
            licence: None,
            source: None,
            folder: PathBuf::new(),
            dependencies: dependencies.iter().map(|(name, kind)| Dependency { name: (*name).into(), kind: *kind }).collect(),
            features: Vec::new(),
            member: true,
        }
    }

    fn faults(packages: &[Package]) -> Vec<String> {
        check(&packages.iter().map(|package| (package.name.as_str(), package)).collect())
    }

    #[test]
    fn the_graph_of_the_design_passes() {
        let fine = [
            package("mesh-model", &[("serde", Kind::Normal), ("proptest", Kind::Dev)]),
            package("mesh-runtime", &[("tokio", Kind::Normal)]),
            package("mesh-hbone", &[("mesh-model", Kind::Normal), ("h2", Kind::Normal), ("rcgen", Kind::Dev)]),
            package("ztunnel", &[("mesh-hbone", Kind::Normal), ("anyhow", Kind::Normal)]),
        ];
        assert_eq!(faults(&fine), Vec::<String>::new());
    }

    #[test]
    fn every_kind_of_wall_holds() {
        for (broken, expected) in [
            (
                package("mesh-model", &[("tokio", Kind::Normal)]),
                "mesh-model → tokio: the model is pure: no I/O, no clock, no runtime",
            ),
            (
                package("mesh-runtime", &[("mesh-model", Kind::Normal)]),
                "mesh-runtime → mesh-model: this edge is not in the graph",
            ),
            (package("mesh-hbone", &[("rustls", Kind::Normal)]), "mesh-hbone → rustls: tunnels never see certificates"),
            (package("mesh-identity", &[("anyhow", Kind::Build)]), "mesh-identity → anyhow: libraries have typed errors"),
            (
                package("ztunnel", &[("mesh-tests", Kind::Dev)]),
                "ztunnel → mesh-tests: suites of a crate may not need the black-box harness",
            ),
            (package("mesh-util", &[]), "crate mesh-util is not in the graph (xtask/src/tidy/graph.rs): add it on purpose"),
        ] {
            assert_eq!(faults(&[broken]), [expected]);
        }
    }
}
