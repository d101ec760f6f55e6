//! What Consul told, as a state machine without network: answers go in, changes of the model come out.
//!
//! Owns what is known and what cannot be known now. Everything becomes texts of a folder in memory, so that objects are read,
//! refused, kept and joined as those of any folder. Upstream: [`super::watch`]. Downstream: [`crate::files`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_model::snapshot::Viewpoint;
use mesh_model::{Change, Origin};
use serde_json::Value;

use super::catalog::{Catalog, Texts};
use super::client::Failure;
use super::instance::text;
use super::watch::{Told, Which};
use crate::diagnostics::{Problem, Severity};
use crate::files::Folder;
use crate::translate::Settings;

/// See the module.
#[derive(Debug)]
pub(super) struct State {
    folder: Folder,
    catalog: Catalog,
    /// What is followed.
    parts: Vec<Which>,
    /// Texts of keys.
    keys: BTreeSet<PathBuf>,
    pending: Texts,
    /// What was told once.
    known: BTreeSet<Which>,
    failures: BTreeMap<Which, Failure>,
    /// Services whose instances cannot be followed now.
    unfollowed: BTreeMap<Arc<str>, Failure>,
    new_failures: bool,
}

impl State {
    /// Nothing is known.
    pub fn new(view: Viewpoint, settings: &Settings, domain: &str, parts: Vec<Which>) -> Self {
        Self {
            catalog: Catalog::new(domain, &view.trust_domain.to_string(), &view.node),
            folder: Folder::in_memory(view, settings),
            parts,
            keys: BTreeSet::new(),
            pending: Texts::new(),
            known: BTreeSet::new(),
            failures: BTreeMap::new(),
            unfollowed: BTreeMap::new(),
            new_failures: false,
        }
    }

    /// Takes in what a watch told; whether the names of services may be others now.
    pub fn take(&mut self, told: Told) -> bool {
        let (which, outcome) = match told {
            Told::Whole(which, body) => (which, self.whole(which, &body).map_err(Failure::other)),
            Told::Failed(which, failure) => (which, Err(failure)),
            Told::Instances(service, body) => {
                match self.catalog.fill(&service, &body) {
                    Ok(()) => drop(self.unfollowed.remove(&service)),
                    Err(message) => self.unfollow(service, Failure::other(message)),
                }
                return false;
            }
            Told::InstancesFailed(service, failure) => {
                self.unfollow(service, failure);
                return false;
            }
        };
        match outcome {
            Ok(()) => {
                if which.closes() && !self.known.contains(&which) {
                    self.pending.push((stand_in(which), None));
                }
                self.known.insert(which);
                if self.failures.remove(&which).is_some() {
                    tracing::info!(what = which.as_str(), "followed again");
                }
            }
            Err(failure) => {
                if failure.refused && which.closes() && !self.known.contains(&which) {
                    self.pending.push((stand_in(which), Some(Err(failure.message.clone()))));
                }
                self.new_failures |= self.failures.insert(which, failure.clone()).as_ref() != Some(&failure);
            }
        }
        which == Which::Services
    }

    fn whole(&mut self, which: Which, body: &Value) -> Result<(), String> {
        match which {
            Which::Services => {
                self.catalog.name(body)?;
                let names: BTreeSet<&Arc<str>> = self.catalog.names().collect();
                self.unfollowed.retain(|name, _| names.contains(name));
                Ok(())
            }
            Which::Defaults => self.catalog.declare(body),
            Which::Keys => self.read_keys(body),
            Which::Intentions => self.catalog.intend(body),
        }
    }

    /// Keys and their values. Folders, and keys without a value, hold nothing.
    fn read_keys(&mut self, body: &Value) -> Result<(), String> {
        let none = Vec::new();
        let keys = if body.is_null() { &none } else { body.as_array().ok_or("the list of keys is no list")? };
        let mut now = BTreeSet::new();
        for key in keys {
            let (name, value) = (text(key, "Key"), text(key, "Value"));
            if name.is_empty() || value.is_empty() {
                continue;
            }
            let path = PathBuf::from(format!("consul key {name}"));
            let decoded = STANDARD.decode(value).map_err(|e| e.to_string());
            let mut text = decoded.and_then(|bytes| String::from_utf8(bytes).map_err(|_| "its value is no text".to_owned()));
            if !now.insert(path.clone()) {
                text = Err("another key differs from it by an empty part or a dot only".to_owned());
            }
            self.pending.push((path, Some(text)));
        }
        self.pending.extend(self.keys.difference(&now).map(|path| (path.clone(), None)));
        self.keys = now;
        Ok(())
    }

    fn unfollow(&mut self, service: Arc<str>, failure: Failure) {
        self.new_failures |= self.unfollowed.is_empty();
        self.unfollowed.insert(service, failure);
    }

    /// What is followed as a whole.
    pub fn parts(&self) -> &[Which] {
        &self.parts
    }
    /// All services.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.catalog.names()
    }
    /// How many services and instances are known.
    pub fn counts(&self) -> (usize, usize) {
        (self.catalog.names().count(), self.catalog.count())
    }
    /// Whether something is followed now; of instances: all.
    pub fn is_up(&self, which: Option<Which>) -> bool {
        match which {
            Some(which) => self.known.contains(&which) && !self.failures.contains_key(&which),
            None => self.unfollowed.is_empty(),
        }
    }
    /// Whether everything is known, or known not to be had.
    pub fn is_settled(&self) -> bool {
        let refused = |which: &Which| self.failures.get(which).is_some_and(|f| f.refused);
        let has = |which: &Which| self.known.contains(which) || (*which != Which::Services && refused(which));
        self.parts.iter().all(has) && self.catalog.is_whole()
    }
    /// Whether something failed since this was asked last.
    pub fn has_new_failures(&mut self) -> bool {
        std::mem::take(&mut self.new_failures)
    }
    /// What all that was taken in changes.
    pub fn flush(&mut self) -> Vec<Change> {
        let mut texts = self.catalog.take();
        texts.append(&mut self.pending);
        self.folder.put(texts)
    }

    /// What is wrong.
    pub fn problems(&self) -> Vec<Problem> {
        let failures = self.failures.iter().map(|(which, failure)| {
            let effect = match (self.known.contains(which), failure.refused && which.closes()) {
                (true, _) => "what was known of it stays in force",
                (false, true) => "it may refuse something, so everything is denied until it can be read",
                (false, false) => "nothing is known of it yet",
            };
            not_followed(which.as_str(), &format!("{}; {effect}", failure.message))
        });
        let instances = self.unfollowed.first_key_value().map(|(_, failure)| {
            not_followed("instances", &format!("{}; what was known of them stays in force", failure.message))
        });
        failures.chain(instances).chain(self.catalog.problems().cloned()).chain(self.folder.problems().iter().cloned()).collect()
    }
}

/// What denies in place of what cannot be read.
fn stand_in(which: Which) -> PathBuf {
    PathBuf::from(format!("consul {}", which.as_str()))
}

fn not_followed(what: &'static str, message: &str) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: Origin { place: "consul".into(), line: 0, object: what.into() },
        field: "".into(),
        message: format!("cannot be followed: {message}").into(),
        fix: "see that the Consul agent answers, and what our token may read".into(),
        code: Some("not-followed"),
    }
}
