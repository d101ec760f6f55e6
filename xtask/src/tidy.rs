//! `cargo xtask tidy`: the rules of the house that no compiler checks.
//!
//! Owns the walls between crates (`graph`), the absence of cycles between modules (`modules`), what each source file must
//! have or must not (`source`), that alerts speak of metrics there are (`monitoring`) and tables of coverage of tests there are
//! (`coverage`), and what must not be committed anywhere (`words`). Sizes are reported, not enforced.

mod coverage;
mod graph;
mod modules;
mod monitoring;
mod rust;
mod source;
mod words;

use crate::metadata::Metadata;
use crate::shell;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// `cargo xtask tidy`.
pub fn run(_args: &[String]) -> Result<()> {
    let root = shell::root();
    let metadata = Metadata::load()?;
    let members = metadata.members();
    let mut faults = graph::check(&members);
    let (mut sizes, mut texts, mut all) = (source::Sizes::default(), Vec::new(), Vec::new());
    for package in members.values() {
        let folder = package.folder.join("src");
        for file in rust_files(&folder) {
            let text = std::fs::read_to_string(&file)?;
            let name = relative(&root, &file);
            faults.extend(source::check(&package.name, &name, &text));
            sizes.add(&name, &text);
            texts.push(text);
        }
        let files: Vec<modules::File> = rust_files(&folder)
            .into_iter()
            .filter_map(|file| {
                let inside = file.strip_prefix(&folder).ok()?.to_owned();
                Some(modules::File { shown: relative(&root, &file), inside, text: std::fs::read_to_string(&file).ok()? })
            })
            .collect();
        for file in [folder.clone(), package.folder.join("tests")].iter().flat_map(|folder| rust_files(folder)) {
            let text = std::fs::read_to_string(&file)?;
            all.push((file, text));
        }
        faults.extend(modules::cycles(&files).into_iter().map(|cycle| format!("{}: {cycle}", package.name)));
    }
    faults.extend(monitoring::check(&root, &texts)?);
    faults.extend(coverage::check(&root, all.iter().map(|(file, text)| (file.as_path(), text.as_str())))?);
    faults.extend(words::check(&root)?);
    sizes.report();
    for fault in &faults {
        println!("tidy: {fault}");
    }
    if !faults.is_empty() {
        bail!("{} against the rules of the house", faults.len());
    }
    println!("{} crates in order", members.len());
    Ok(())
}

/// Every Rust file below a folder, sorted; none if the folder is not there.
pub fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn relative(root: &Path, file: &Path) -> String {
    file.strip_prefix(root).unwrap_or(file).display().to_string()
}

/// True for files that hold nothing but tests, by the layout of the house: `tests.rs`, or below a folder `tests`.
fn is_test_file(inside: &Path) -> bool {
    inside.file_stem().is_some_and(|stem| stem == "tests") || inside.components().any(|part| part.as_os_str() == "tests")
}
