//! The objects of a folder as they are written, for checks that look at more than the mesh keeps.
//!
//! Refuses to complain: what cannot be parsed has been told by the readers. Upstream: the same walk and parser. Downstream:
//! `analyze`, and `why` for the lines of rules.
use anyhow::{Context, Result};
use mesh_sources::files::{MAX_FILE, list};
use mesh_sources::yaml::{self, Node, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// A file.
pub struct Text {
    path: String,
    text: String,
}
/// Reads every file of a folder. Files that cannot be read, or are too large, have been told by the readers.
pub fn read(root: &Path) -> Result<Vec<Text>> {
    let found = list(root).with_context(|| format!("cannot list {}", root.display()))?;
    let small = |path: &Path| std::fs::metadata(path).is_ok_and(|m| m.len() <= MAX_FILE);
    let readable = found.files.into_iter().filter(|f| small(&f.path));
    Ok(readable
        .filter_map(|f| Some(Text { text: std::fs::read_to_string(&f.path).ok()?, path: f.path.display().to_string() }))
        .collect())
}

/// One object.
pub struct Raw<'t> {
    /// File.
    pub file: &'t str,
    /// `kind`.
    pub kind: String,
    /// API group; empty for the core.
    pub group: String,
    /// Namespace; `default` where none is written, as for the API server.
    pub namespace: String,
    /// `metadata.name`.
    pub id: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// All of it.
    pub node: Node<'t>,
}
impl Raw<'_> {
    /// `Kind namespace/name`.
    pub fn name(&self) -> String {
        if matches!(self.kind.as_str(), "Namespace" | "Node" | "GatewayClass") {
            return format!("{} {}", self.kind, self.id);
        }
        format!("{} {}/{}", self.kind, self.namespace, self.id)
    }
    /// A node below, by keys.
    pub fn at(&self, path: &[&str]) -> Option<&Node<'_>> {
        below(&self.node, path)
    }
    /// A text below, by keys.
    pub fn text(&self, path: &[&str]) -> &str {
        self.at(path).and_then(Node::text).unwrap_or_default()
    }
}
/// A node below another, by keys.
pub fn below<'n, 't>(node: &'n Node<'t>, path: &[&str]) -> Option<&'n Node<'t>> {
    path.iter().try_fold(node, |n, key| n.get(key))
}
/// The elements of a list below `key`; none when there is no such list.
pub fn items<'n, 't>(node: &'n Node<'t>, key: &str) -> &'n [Node<'t>] {
    match node.get(key).map(|n| &n.value) {
        Some(Value::Seq(items)) => items,
        _ => &[],
    }
}
/// The entries of a mapping below `key` as texts.
pub fn texts(node: &Node<'_>, key: &str) -> BTreeMap<String, String> {
    match node.get(key).map(|n| &n.value) {
        Some(Value::Map(entries)) => {
            entries.iter().filter_map(|e| Some((e.key.to_string(), e.node.text()?.to_owned()))).collect()
        }
        _ => BTreeMap::new(),
    }
}

/// All objects of a folder.
pub struct Objects<'t>(Vec<Raw<'t>>);
impl<'t> Objects<'t> {
    /// The objects of these files.
    pub fn of(files: &'t [Text]) -> Self {
        let mut out = Vec::new();
        for file in files {
            for document in yaml::documents(&file.text) {
                let Ok(root) = yaml::parse_whole(document) else { continue };
                add(root, &file.path, &mut out);
            }
        }
        Self(out)
    }
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Raw<'t>> {
        self.0.iter()
    }
    /// Those of a kind and group.
    pub fn of_kind(&self, group: &str, kind: &str) -> impl Iterator<Item = &Raw<'t>> {
        self.0.iter().filter(move |o| o.kind == kind && o.group == group)
    }
}
fn add<'t>(node: Node<'t>, file: &'t str, out: &mut Vec<Raw<'t>>) {
    let text = |path: &[&str]| below(&node, path).and_then(Node::text).unwrap_or_default().to_owned();
    let kind = text(&["kind"]);
    if kind == "List" || kind.ends_with("List") && node.get("items").is_some() {
        if let Value::Map(entries) = node.value {
            for item in entries.into_iter().filter(|e| e.key == "items") {
                if let Value::Seq(items) = item.node.value {
                    for item in items {
                        add(item, file, out);
                    }
                }
            }
        }
        return;
    }
    let group = text(&["apiVersion"]).split_once('/').map(|(group, _)| group.to_owned()).unwrap_or_default();
    let namespace = Some(text(&["metadata", "namespace"])).filter(|ns| !ns.is_empty()).unwrap_or_else(|| "default".into());
    let labels = node.get("metadata").map(|m| texts(m, "labels")).unwrap_or_default();
    let id = text(&["metadata", "name"]);
    out.push(Raw { file, kind, group, namespace, id, labels, node });
}
