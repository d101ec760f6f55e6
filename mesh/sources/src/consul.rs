//! Consul as a source: services and their instances from the catalog, everything else as objects under keys, and intentions.
//!
//! Owns the blocking queries and what was last good of them. A service becomes a ServiceEntry and each of its instances a
//! WorkloadEntry, as a folder may hold them; what Consul has no words for (policies, routes, gateways) is written as the same YAML
//! below a prefix of the key-value store. So there is one translator, and one set of rules for what is refused. While Consul
//! is away, or answers what cannot be read, the last mesh stays; at start nothing is published before everything was told.
//! Keys and intentions that may not be read deny everything: they may refuse something. Namespaces, partitions and peers of Consul are refused.
//! Upstream: a Consul agent. Downstream: [`crate::files`].

mod catalog;
mod client;
mod flags;
mod instance;
mod intentions;
mod metrics;
mod state;
#[cfg(test)]
mod tests;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::snapshot::Viewpoint;
use tokio::sync::mpsc;

use crate::diagnostics::Diagnostics;
use crate::dial::{Server, Text};
use crate::files::on_thread;
use crate::publisher::ChangeSink;
use crate::translate;
use crate::{Source, SourceError};
use client::Client;
pub use flags::{Flags, IntentionMode};
pub use metrics::Metrics;
use state::State;
use watch::{Questions, Turns, Which};

/// Answers taken in before what they change is published.
const BATCH: usize = 1000;
/// Answers that wait to be taken in; then the watches wait.
const QUEUE: usize = 64;
/// How often a source without answers looks whether anybody still wants them.
const PULSE: Duration = Duration::from_secs(1);

/// Where a Consul agent is, and who we are to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// `http://host:port` or `https://host:port`; without a scheme `http`.
    pub url: String,
    /// A file with our token, read for every request.
    pub token_file: Option<PathBuf>,
    /// Our token.
    pub token: Option<Secret>,
    /// PEM file of whom to believe that it is Consul; needed for `https`.
    pub roots: Option<PathBuf>,
    /// PEM files of our certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// A text that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Access {
    /// Of an agent that needs no proof.
    pub fn at(url: impl Into<String>) -> Self {
        Self { url: url.into(), token_file: None, token: None, roots: None, certificate: None }
    }
    /// What is wrong with it, as far as that shows without asking anybody.
    ///
    /// # Errors
    /// An address that is none, or `https` without roots.
    pub fn check(&self) -> Result<(), String> {
        let server = self.server()?;
        if server.tls && server.roots.is_none() {
            return Err("whom to believe that it is Consul? name its roots in CONSUL_CACERT".into());
        }
        server.tls_name().map(drop)
    }
    fn server(&self) -> Result<Server, String> {
        let url = if self.url.contains("://") { self.url.clone() } else { format!("http://{}", self.url) };
        let file = |path: &PathBuf| Text::File(path.clone());
        Ok(Server {
            roots: self.roots.as_ref().map(file),
            token: match (&self.token_file, &self.token) {
                (Some(path), _) => Some(file(path)),
                (None, token) => token.as_ref().map(|token| Text::Here(token.0.clone())),
            },
            certificate: self.certificate.as_ref().map(|(chain, key)| (file(chain), file(key))),
            ..Server::at(&url)?
        })
    }
}

/// How long to wait before Consul is asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// After a first failure; doubles with each further one.
    pub least: Duration,
    /// At most.
    pub most: Duration,
}
impl Default for Retry {
    fn default() -> Self {
        Self { least: Duration::from_millis(800), most: Duration::from_secs(30) }
    }
}

/// What of Consul is read, and how.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Where it is.
    pub access: Access,
    /// Keys below this hold objects, such as `culvert/`.
    pub prefix: String,
    /// Domain of Consul's DNS: `consul`.
    pub domain: String,
    /// Which datacenter, if not the agent's own.
    pub datacenter: Option<String>,
    /// Whether intentions count.
    pub intentions: bool,
    /// Patience.
    pub retry: Retry,
    /// Where the state of the watches is told.
    pub metrics: Metrics,
}

/// Consul as a source.
#[derive(Debug)]
pub struct ConsulSource {
    /// What is read.
    pub scope: Scope,
    /// From where the mesh is seen.
    pub view: Viewpoint,
    /// Translation.
    pub settings: translate::Settings,
    /// Where problems go.
    pub diagnostics: Diagnostics,
}

impl Source for ConsulSource {
    fn name(&self) -> &'static str {
        "consul"
    }
    async fn run(self, sink: ChangeSink) -> Result<(), SourceError> {
        let client = Client::new(&self.scope.access).map_err(SourceError::Consul)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // A thread of its own: reading a large catalog must not stop the control thread.
        on_thread("mesh-consul", sink, move |sink| runtime.block_on(self.follow(&client, sink))).await
    }
}

impl ConsulSource {
    async fn follow(self, client: &Client, sink: &mut ChangeSink) {
        let Scope { prefix, domain, datacenter, intentions, retry, metrics, .. } = self.scope;
        let questions = Questions { prefix, datacenter, retry };
        let (told, mut answers) = mpsc::channel(QUEUE);
        let mut tasks = tokio::task::JoinSet::new();
        let parts = Which::all(intentions);
        for which in parts.iter().copied() {
            tasks.spawn(watch::follow(client.another(), questions.clone(), which, told.clone()));
        }
        let turns = Arc::new(Turns::new());
        watch::follow_services(client, &questions, &turns, &told, &mut tasks);
        let mut state = State::new(self.view, &self.settings, &domain, parts);
        let mut pulse = tokio::time::interval(PULSE);
        loop {
            let answer = tokio::select! {
                answer = answers.recv() => answer,
                _ = pulse.tick() => {
                    if sink.is_closed() {
                        return;
                    }
                    continue;
                }
            };
            let Some(answer) = answer else { return };
            metrics.count(&answer);
            let mut renamed = state.take(answer);
            for _ in 0..BATCH {
                let Ok(answer) = answers.try_recv() else { break };
                metrics.count(&answer);
                renamed |= state.take(answer);
            }
            if renamed {
                turns.set(state.names());
            }
            metrics.set(&state);
            let first = !sink.has_told();
            if first && !state.is_settled() {
                if state.has_new_failures() {
                    self.diagnostics.replace(state.problems());
                }
                continue;
            }
            let changes = state.flush();
            self.diagnostics.replace(state.problems());
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
