//! What cargo knows about the workspace, cut down to what the checks ask for.

use crate::shell;
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// One edge as a manifest declares it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Dependency {
    pub name: String,
    pub kind: Kind,
}

/// When a dependency is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Normal,
    Build,
    Dev,
}

/// One package, ours or not.
#[derive(Debug, Clone)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub licence: Option<String>,
    /// Where it comes from; none for a path.
    pub source: Option<String>,
    pub folder: PathBuf,
    pub dependencies: Vec<Dependency>,
    pub features: Vec<String>,
    pub member: bool,
}

/// The answer of `cargo metadata`.
#[derive(Debug)]
pub struct Metadata {
    pub packages: BTreeMap<String, Package>,
    /// Packages that end up in some build of the workspace for Linux, by id.
    pub resolved: BTreeSet<String>,
    pub target: PathBuf,
}

impl Metadata {
    /// Asks cargo, with every feature on, so that optional parts are judged too.
    pub fn load() -> Result<Self> {
        const TARGET: &str = "x86_64-unknown-linux-gnu";
        let metadata = shell::output(shell::cargo().args(["metadata", "--format-version=1", "--all-features", "--quiet"]))?;
        // `metadata` also resolves what only a weak feature (`dep?/feature`) names; `tree` shows what is really built.
        let tree =
            ["tree", "--workspace", "--all-features", "--edges=normal,build,dev", "--prefix=none", "--format={p}", "--quiet"];
        let tree = shell::output(shell::cargo().args(tree).args(["--target", TARGET]))?;
        Self::parse(&serde_json::from_str(&metadata)?, &tree).context("cargo metadata")
    }

    fn parse(value: &Value, tree: &str) -> Result<Self> {
        let members: BTreeSet<&str> = strings(&value["workspace_members"]).collect();
        let packages: BTreeMap<String, Package> = list(&value["packages"])
            .map(|package| {
                let id = text(package, "id")?;
                let manifest = PathBuf::from(text(package, "manifest_path")?);
                Ok((
                    id.to_owned(),
                    Package {
                        name: text(package, "name")?.to_owned(),
                        version: text(package, "version")?.to_owned(),
                        licence: package["license"].as_str().map(str::to_owned),
                        source: package["source"].as_str().map(str::to_owned),
                        folder: manifest.parent().context("manifest without a folder")?.to_owned(),
                        dependencies: list(&package["dependencies"]).map(dependency).collect::<Result<_>>()?,
                        features: package["features"].as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default(),
                        member: members.contains(id),
                    },
                ))
            })
            .collect::<Result<_>>()?;
        let built: BTreeSet<(&str, &str)> = tree.lines().filter_map(built_package).collect();
        let resolved = packages
            .iter()
            .filter(|(_, package)| built.contains(&(package.name.as_str(), package.version.as_str())))
            .map(|(id, _)| id.clone())
            .collect();
        Ok(Self { packages, resolved, target: PathBuf::from(text(value, "target_directory")?) })
    }

    /// The crates of the workspace, by name.
    pub fn members(&self) -> BTreeMap<&str, &Package> {
        self.packages.values().filter(|package| package.member).map(|package| (package.name.as_str(), package)).collect()
    }

    /// Other people's crates that we build.
    pub fn foreign(&self) -> impl Iterator<Item = &Package> {
        self.resolved.iter().filter_map(|id| self.packages.get(id)).filter(|package| !package.member)
    }
}

/// `serde v1.0.228 (*)` → `("serde", "1.0.228")`.
fn built_package(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split_whitespace();
    Some((words.next()?, words.next()?.strip_prefix('v')?))
}

fn dependency(value: &Value) -> Result<Dependency> {
    let kind = match value["kind"].as_str() {
        Some("dev") => Kind::Dev,
        Some("build") => Kind::Build,
        _ => Kind::Normal,
    };
    Ok(Dependency { name: text(value, "name")?.to_owned(), kind })
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("no `{key}`"))
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The strings of a JSON array.
pub fn strings(value: &Value) -> impl Iterator<Item = &str> {
    list(value).filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_and_foreign_crates_are_told_apart() {
        let package = |id: &str, name: &str| {
            serde_json::json!({"id": id, "name": name, "version": "1.0.0", "license": "MIT", "source": null,
                "manifest_path": format!("/r/{name}/Cargo.toml"), "features": {"f": []},
                "dependencies": [{"name": "serde", "kind": null}, {"name": "tempfile", "kind": "dev"}]})
        };
        let value = serde_json::json!({
            "packages": [package("a#1", "a"), package("b#1", "b"), package("unused#1", "unused")],
            "workspace_members": ["a#1"], "target_directory": "/t",
        });
        let metadata = Metadata::parse(&value, "a v1.0.0 (/r/a)\nb v1.0.0 (proc-macro) (*)\n\n").unwrap();
        assert_eq!(metadata.members().keys().copied().collect::<Vec<_>>(), ["a"]);
        assert_eq!(metadata.foreign().map(|package| package.name.as_str()).collect::<Vec<_>>(), ["b"]);
        let a = metadata.members()["a"];
        assert_eq!(a.dependencies[1], Dependency { name: "tempfile".into(), kind: Kind::Dev });
        assert_eq!(a.features, ["f"]);
    }
}
