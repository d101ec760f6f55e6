//! A pod is held back until it is captured: a CNI plugin of ours, chained behind those that give the pod its network, asks this
//! node's agent to capture it, and lets the container runtime go on only then. Between "started" and "enrolled" is nothing.
//!
//! Owns what the two say to each other: one packet there with the pod's network namespace beside it, one back. Upstream: the
//! container runtime, which runs [`plugin`]. Downstream: [`desk`], where the agent answers; [`files`] is how the plugin gets
//! onto the node.
pub mod desk;
pub mod files;
pub mod plugin;

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the plugin's program, which is its `type` in a network configuration.
pub const PLUGIN: &str = "culvert-cni";

/// What the plugin finds of itself in the network configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// [`PLUGIN`].
    pub r#type: String,
    /// Where the agent of this node answers.
    pub socket: PathBuf,
    /// What a pod meets where it does not.
    pub unreachable: Unreachable,
    /// Namespaces nobody is asked about: their pods are never enrolled, and the agent's own pod is one of them.
    #[serde(rename = "excludeNamespaces")]
    pub exclude_namespaces: Vec<String>,
}

/// What becomes of a pod that starts while no agent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Unreachable {
    /// It does not start; the kubelet tries again.
    Refuse,
    /// It starts, and is direct until an agent enrols it.
    Allow,
}

/// What the plugin asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Whether the pod is captured as it should be, instead of to capture it.
    pub check: bool,
    /// The pod's Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The uid the kubelet knows it by, where the runtime tells.
    pub uid: Option<String>,
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Its traffic goes through the agent from now on.
    Captured,
    /// It is not in the mesh.
    NotEnrolled,
    /// It must not start now.
    Refused {
        /// Why.
        why: String,
        /// Whether time alone may mend it.
        later: bool,
    },
}

/// Where an agent of `node` answers.
pub fn path(run_dir: &Path, node: &str) -> PathBuf {
    run_dir.join(format!("{}.cni", if node.is_empty() { "node" } else { node }))
}
