//! `cargo xtask deny`: licences, banned crates, duplicates and sources, judged by `deny.toml`.
//!
//! The file is cargo-deny's and that tool reads the same answers from it; it is run as well where it is installed. The
//! checks are repeated here because building cargo-deny costs more than the rest of CI. Advisories need its database and
//! are left to it.

use crate::licence;
use crate::metadata::{Metadata, strings};
use crate::shell;
use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// `cargo xtask deny`.
pub fn run(_args: &[String]) -> Result<()> {
    let root = shell::root();
    let rules = Rules::read(&std::fs::read_to_string(root.join("deny.toml")).context("deny.toml")?)?;
    let metadata = Metadata::load()?;
    let mut faults = rules.judge(&metadata);
    for lock in ["Cargo.lock", "ebpf/prog/Cargo.lock", "tests/fuzz/Cargo.lock"] {
        if let Ok(text) = std::fs::read_to_string(root.join(lock)) {
            faults.extend(rules.judge_lock(Path::new(lock), &text));
        }
    }
    for (name, versions) in duplicates(&metadata) {
        println!("note: {name} is built in {} versions: {}", versions.len(), versions.join(", "));
    }
    println!("{} crates from elsewhere judged", metadata.foreign().count());
    for fault in &faults {
        println!("deny: {fault}");
    }
    if !faults.is_empty() {
        bail!("{} against deny.toml", faults.len());
    }
    if shell::find_program("cargo-deny").is_some() {
        shell::run(shell::cargo().args(["deny", "check", "licenses", "bans", "sources"]))?;
    }
    Ok(())
}

struct Rules {
    licences: Vec<String>,
    exceptions: BTreeMap<String, Vec<String>>,
    banned: BTreeSet<String>,
    registries: Vec<String>,
}

impl Rules {
    fn read(text: &str) -> Result<Self> {
        let file: Value = basic_toml::from_str(text).context("deny.toml")?;
        let list = |value: &Value| strings(value).map(str::to_owned).collect::<Vec<_>>();
        let rules = Self {
            licences: list(&file["licenses"]["allow"]),
            exceptions: file["licenses"]["exceptions"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|entry| Some((entry["crate"].as_str()?.to_owned(), list(&entry["allow"]))))
                .collect(),
            banned: file["bans"]["deny"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|entry| entry["crate"].as_str().map(str::to_owned))
                .collect(),
            registries: list(&file["sources"]["allow-registry"]),
        };
        if rules.licences.is_empty() || rules.registries.is_empty() {
            bail!("deny.toml allows no licence or no registry: is it still cargo-deny's format?");
        }
        Ok(rules)
    }

    fn judge(&self, metadata: &Metadata) -> Vec<String> {
        let mut faults = Vec::new();
        for package in metadata.foreign() {
            let name = format!("{} {}", package.name, package.version);
            let mut allowed = self.licences.clone();
            allowed.extend(self.exceptions.get(&package.name).into_iter().flatten().cloned());
            match &package.licence {
                Some(expression) if licence::is_allowed(expression, &allowed) => {}
                Some(expression) => faults.push(format!("{name}: licence `{expression}` is not on the list")),
                None => faults.push(format!("{name}: says no licence")),
            }
            if self.banned.contains(&package.name) {
                faults.push(format!("{name}: banned"));
            }
            match &package.source {
                Some(source) if self.may_come_from(source) => {}
                source => {
                    let source = source.as_deref().unwrap_or("a path outside the workspace");
                    faults.push(format!("{name}: comes from {source}"));
                }
            }
        }
        faults
    }

    /// Every source a lock file names, whatever features or targets would use it.
    fn judge_lock(&self, file: &Path, text: &str) -> Vec<String> {
        text.lines()
            .filter_map(|line| line.strip_prefix("source = \"")?.strip_suffix('"'))
            .filter(|source| !self.may_come_from(source))
            .map(|source| format!("{}: source {source}", file.display()))
            .collect()
    }

    fn may_come_from(&self, source: &str) -> bool {
        source.strip_prefix("registry+").is_some_and(|registry| self.registries.iter().any(|allowed| allowed == registry))
    }
}

fn duplicates(metadata: &Metadata) -> BTreeMap<&str, Vec<&str>> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in metadata.foreign() {
        versions.entry(&package.name).or_default().push(&package.version);
    }
    versions.retain(|_, found| found.len() > 1);
    versions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Package;
    use std::path::PathBuf;

    const TOML: &str = r#"
[licenses]
allow = ["MIT"]
exceptions = [{ allow = ["Zlib"], crate = "odd" }]
[bans]
deny = [{ crate = "ring", reason = "one provider" }]
[sources]
allow-registry = ["https://example.org/index"]
"#;

    fn package(name: &str, licence: Option<&str>, source: Option<&str>) -> Package {
        Package {
            name: name.into(),
            version: "1.0.0".into(),
            licence: licence.map(str::to_owned),
            source: source.map(str::to_owned),
            folder: PathBuf::new(),
            dependencies: Vec::new(),
            features: Vec::new(),
            member: false,
        }
    }

    fn metadata(packages: Vec<Package>) -> Metadata {
        let packages: BTreeMap<String, Package> =
            packages.into_iter().enumerate().map(|(i, package)| (i.to_string(), package)).collect();
        Metadata { resolved: packages.keys().cloned().collect(), packages, target: PathBuf::new() }
    }

    #[test]
    fn faults_are_named() {
        let good = Some("registry+https://example.org/index");
        let faults = Rules::read(TOML).unwrap().judge(&metadata(vec![
            package("fine", Some("MIT"), good),
            package("odd", Some("Zlib"), good),
            package("other", Some("Zlib"), good),
            package("silent", None, good),
            package("ring", Some("MIT"), good),
            package("git", Some("MIT"), Some("git+https://example.org/repo")),
            package("path", Some("MIT"), None),
        ]));
        assert_eq!(
            faults,
            [
                "other 1.0.0: licence `Zlib` is not on the list",
                "silent 1.0.0: says no licence",
                "ring 1.0.0: banned",
                "git 1.0.0: comes from git+https://example.org/repo",
                "path 1.0.0: comes from a path outside the workspace",
            ]
        );
    }

    #[test]
    fn lock_files_are_held_to_the_same_sources() {
        let lock =
            "[[package]]\nsource = \"registry+https://example.org/index\"\nsource = \"registry+https://mirror.example.org/\"\n";
        let faults = Rules::read(TOML).unwrap().judge_lock(Path::new("Cargo.lock"), lock);
        assert_eq!(faults, ["Cargo.lock: source registry+https://mirror.example.org/"]);
    }

    #[test]
    fn an_empty_rule_file_is_an_error_not_a_pass() {
        assert!(Rules::read("").is_err());
    }

    #[test]
    fn duplicates_are_listed() {
        let two = metadata(vec![package("a", None, None), package("a", None, None), package("b", None, None)]);
        assert_eq!(duplicates(&two), BTreeMap::from([("a", vec!["1.0.0", "1.0.0"])]));
    }
}
