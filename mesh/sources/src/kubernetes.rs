//! The Kubernetes API as a source: every kind that a folder may hold, listed and watched, through the one translator.
//!
//! Owns the watches and what was last good of them. An object that cannot be read is refused alone, and what it said before
//! stays in force; so does what a watch told when it breaks, until it is whole again. A kind that may not be read (403) or
//! is not served (404) stops alone and is tried again; where it might have refused something and was never seen, everything
//! is denied until it is. Nothing is published before each kind has been listed once or is known to be stopped, so
//! an API server that does not answer leaves the process as it is: not ready at its start, with its last mesh later.
//! Upstream: the API server. Downstream: [`crate::translate`].

mod access;
mod client;
mod cluster;
mod daemon_set;
mod kinds;
mod metrics;
mod nodes;
mod tree;
mod watch;

use std::time::Duration;

use mesh_model::Change;
use mesh_model::snapshot::Viewpoint;
use tokio::sync::mpsc;

use crate::diagnostics::Diagnostics;
use crate::files::on_thread;
use crate::publisher::{ChangeSink, Relay};
use crate::translate::Settings;
use crate::{Source, SourceError};
pub use access::Access;
use client::Client;
use cluster::Cluster;
pub use daemon_set::DaemonSet;
pub use kinds::Reach;
pub use metrics::Watches;
pub use nodes::{Lookup, NodePod, NodePods, Served, follow as follow_node};

/// Events taken in before what they change is published.
const BATCH: usize = 10_000;
/// Events that wait to be taken in; then the watches wait.
const QUEUE: usize = 1024;
/// How often a source without events looks whether anybody still wants them.
const PULSE: Duration = Duration::from_secs(1);

/// How long to wait before the API server is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// After a first failure; doubles with each further one.
    pub least: Duration,
    /// At most.
    pub most: Duration,
    /// For a kind that is not served.
    pub missing: Duration,
}
impl Default for Retry {
    fn default() -> Self {
        Self { least: Duration::from_millis(800), most: Duration::from_secs(30), missing: Duration::from_secs(30) }
    }
}

/// What of a cluster is read, and how.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Where the API server is.
    pub access: Access,
    /// For whom.
    pub reach: Reach,
    /// Patience.
    pub retry: Retry,
    /// Where the state of the watches is told.
    pub watches: Watches,
}

/// A Kubernetes cluster as a source.
#[derive(Debug)]
pub struct KubernetesSource {
    /// What is read.
    pub scope: Scope,
    /// From where the mesh is seen.
    pub view: Viewpoint,
    /// Translation.
    pub settings: Settings,
    /// Where problems go.
    pub diagnostics: Diagnostics,
    /// A control plane that tells services, workloads and policies of layer 4 ([`Settings::told`]).
    pub told: Option<Relay>,
}

impl Source for KubernetesSource {
    fn name(&self) -> &'static str {
        "kubernetes"
    }
    async fn run(self, sink: ChangeSink) -> Result<(), SourceError> {
        let client = Client::new(&self.scope.access).map_err(SourceError::Access)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // A thread of its own: reading a large cluster must not stop the control thread.
        on_thread("mesh-kube", sink, move |sink| {
            runtime.block_on(self.follow(&client, sink));
        })
        .await
    }
}

impl KubernetesSource {
    async fn follow(mut self, client: &Client, sink: &mut ChangeSink) {
        let watches = kinds::watches(&self.scope.reach, &self.view.root_namespace, self.told.is_some());
        let (told, mut events) = mpsc::channel(QUEUE);
        let mut tasks = tokio::task::JoinSet::new();
        for (number, watch) in watches.iter().enumerate() {
            tasks.spawn(watch::follow(client.clone(), watch.clone(), number, told.clone(), self.scope.retry));
        }
        let mut cluster = Cluster::new(self.view, &self.settings, watches);
        let mut pulse = tokio::time::interval(PULSE);
        // Neither half of a mesh is handed over without the other.
        let mut waits_for_word = self.told.is_some();
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => cluster.take(event),
                    None => return,
                },
                changes = word(&mut self.told) => {
                    waits_for_word = false;
                    cluster.adopt(changes);
                }
                _ = pulse.tick() => {
                    if sink.is_closed() {
                        return;
                    }
                    continue;
                }
            }
            for _ in 0..BATCH {
                let Ok(event) = events.try_recv() else { break };
                cluster.take(event);
            }
            cluster.tell(&self.scope.watches);
            let first = !sink.has_told();
            if first && (waits_for_word || !cluster.is_settled()) {
                if cluster.has_new_failures() {
                    self.diagnostics.replace(cluster.problems());
                }
                continue;
            }
            let changes = cluster.flush();
            self.diagnostics.replace(cluster.problems());
            if (first || !changes.is_empty()) && sink.send(changes).await.is_err() {
                return;
            }
            if first {
                // Texts and trees of a large load are several times what stays.
                mesh_runtime::allocator::return_free_pages();
            }
        }
    }
}

/// What the control plane tells next; never, where there is none.
async fn word(told: &mut Option<Relay>) -> Vec<Change> {
    if let Some(relay) = told
        && let Some(changes) = relay.next().await
    {
        return changes;
    }
    // Its source ended, and has said so: what it told last stays.
    std::future::pending().await
}
