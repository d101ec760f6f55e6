//! The folder of YAML that agents in folder mode obey. Owns a temporary directory, atomic replacement of its files (an agent
//! never sees half a file), and guards that put things back when a test ends.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tempfile::TempDir;

/// A mesh folder that can be changed while agents watch it.
#[derive(Debug)]
pub struct MeshDir {
    root: TempDir,
}

impl MeshDir {
    /// An empty folder.
    pub fn empty() -> anyhow::Result<Self> {
        Ok(Self { root: crate::netns::scratch("mesh")? })
    }

    /// A copy of the YAML files of `from` (one level), each passed through `patch`.
    pub fn copy_of(from: &Path, patch: impl Fn(&str) -> String) -> anyhow::Result<Self> {
        let dir = Self::empty()?;
        for path in yaml_files(from)? {
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let name = path.file_name().context("a file has a name")?;
            dir.put(&name.to_string_lossy(), &patch(&text))?;
        }
        Ok(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.root.path()
    }

    /// Keeps the folder on disk after this value is gone; returns where.
    pub fn keep(self) -> PathBuf {
        self.root.keep()
    }

    /// Writes or replaces one file, in one step as seen by a watcher.
    pub fn put(&self, name: &str, yaml: &str) -> anyhow::Result<()> {
        let hidden = self.root.path().join(format!(".{name}.new"));
        fs::write(&hidden, yaml)?;
        fs::rename(&hidden, self.root.path().join(name))?;
        Ok(())
    }

    /// Removes one file (no matter whether it was there).
    pub fn remove(&self, name: &str) {
        let _gone_already = fs::remove_file(self.root.path().join(name));
    }

    /// Writes a file that goes away when the guard does.
    pub fn put_for_now(&self, name: &str, yaml: &str) -> anyhow::Result<ForNow<'_>> {
        self.put(name, yaml)?;
        Ok(ForNow { dir: self, name: name.to_owned() })
    }
}

/// See [`MeshDir::put_for_now`].
#[derive(Debug)]
pub struct ForNow<'a> {
    dir: &'a MeshDir,
    name: String,
}
impl Drop for ForNow<'_> {
    fn drop(&mut self) {
        self.dir.remove(&self.name);
    }
}

/// The YAML files of a folder, sorted by name.
pub fn yaml_files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("read {}", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml"))
        .collect();
    files.sort();
    Ok(files)
}

/// Every object of every YAML file of a folder, as JSON values.
pub fn read_objects(dir: &Path) -> anyhow::Result<Vec<serde_json::Value>> {
    let mut objects = Vec::new();
    for path in yaml_files(dir)? {
        let text = fs::read_to_string(&path)?;
        let documents: Vec<serde_json::Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("parse {}", path.display()))?;
        objects.extend(documents.into_iter().filter(serde_json::Value::is_object));
    }
    Ok(objects)
}
