//! A cluster as a state machine without network: what the watches tell goes in, changes of the model come out.
//!
//! Owns which object is in force because of which watch. Upstream: [`super::watch`]. Downstream: [`crate::translate`].

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use mesh_model::snapshot::Viewpoint;
use mesh_model::{Change, Origin};
use serde_json::Value;

use super::client::{Failure, Why};
use super::kinds::Watch;
use super::metrics::{Counts, Watches};
use super::tree;
use super::watch::{Told, What};
use crate::diagnostics::{Problem, Severity};
use crate::translate::{ObjectId, Settings, Translator};

/// What one watch has told.
#[derive(Debug)]
struct Slot {
    watch: Watch,
    label: String,
    place: Arc<str>,
    /// In force because of it.
    held: HashSet<ObjectId>,
    /// What the list under way has named.
    seen: Option<HashSet<ObjectId>>,
    /// Whether a whole list was taken in once.
    listed: bool,
    /// Whether it may not be read, as far as was said.
    forbidden: bool,
    /// What is wrong now.
    failure: Option<Failure>,
    /// What denies because its objects are not known.
    closed: Option<ObjectId>,
    counts: Counts,
    untold: bool,
}

/// A cluster; see the module.
#[derive(Debug)]
pub struct Cluster {
    translator: Translator,
    slots: Vec<Slot>,
    problems: BTreeMap<ObjectId, Vec<Problem>>,
    new_failures: bool,
    /// What was told of kinds that may not be read.
    unread: Option<Arc<str>>,
    /// Whether a control plane tells the addresses.
    told: bool,
}

impl Cluster {
    /// A cluster of which nothing is known.
    pub fn new(view: Viewpoint, settings: &Settings, watches: Vec<Watch>) -> Self {
        let slots = watches.into_iter().map(|watch| Slot {
            label: watch.label(),
            place: format!("kubernetes {}", watch.label()).into(),
            watch,
            held: HashSet::new(),
            seen: None,
            listed: false,
            forbidden: false,
            failure: None,
            closed: None,
            counts: Counts::default(),
            untold: true,
        });
        Self {
            translator: Translator::new(view, settings),
            slots: slots.collect(),
            problems: BTreeMap::new(),
            new_failures: false,
            unread: None,
            told: settings.told,
        }
    }

    /// Takes in what a watch told.
    pub fn take(&mut self, told: Told) {
        let Some(slot) = self.slots.get_mut(told.watch) else { return };
        slot.untold = true;
        match told.what {
            What::Restarted => slot.seen = Some(HashSet::new()),
            What::Listed(object, version) => self.read(told.watch, *object, version, true),
            What::Complete => self.complete(told.watch),
            What::Followed => self.recover(told.watch),
            What::Changed(object, version) => self.read(told.watch, *object, version, false),
            What::Gone(object) => self.remove(told.watch, &object),
            What::Failed(failure) => self.fail(told.watch, failure),
        }
    }

    /// Takes in what a control plane tells.
    pub fn adopt(&mut self, changes: Vec<Change>) {
        self.translator.adopt(changes);
    }

    /// Whether every kind is known, or known not to be had.
    pub fn is_settled(&self) -> bool {
        self.slots
            .iter()
            .all(|slot| slot.listed || slot.failure.as_ref().is_some_and(|f| matches!(f.why, Why::Forbidden | Why::Missing)))
    }
    /// Whether every kind was listed once.
    pub fn is_whole(&self) -> bool {
        self.slots.iter().all(|slot| slot.listed)
    }
    /// Whether something failed since this was asked last.
    pub fn has_new_failures(&mut self) -> bool {
        std::mem::take(&mut self.new_failures)
    }
    /// What all that was taken in changes.
    pub fn flush(&mut self) -> Vec<Change> {
        let mut changes = self.translator.flush();
        let unread = self.unread();
        if unread != self.unread {
            changes.push(Change::Unread(unread.clone()));
            self.unread = unread;
        }
        changes
    }
    /// Why an address that is not known may be of the mesh.
    fn unread(&self) -> Option<Arc<str>> {
        let labels: Vec<&str> = self.slots.iter().filter(|slot| slot.is_unread() && !self.told).map(|s| &*s.label).collect();
        let why = || format!("it may be of the mesh, of which {} may not be read (403), and have a waypoint", labels.join(", "));
        (!labels.is_empty()).then(|| why().into())
    }
    /// What is wrong.
    pub fn problems(&self) -> Vec<Problem> {
        let watches = self.slots.iter().filter_map(Slot::problem);
        watches.chain(self.problems.values().flatten().cloned()).chain(self.translator.problems().cloned()).collect()
    }
    /// Tells the counts of the watches that did something.
    pub fn tell(&mut self, to: &Watches) {
        for slot in self.slots.iter_mut().filter(|slot| slot.untold) {
            slot.counts.objects = slot.held.len();
            slot.counts.up = slot.listed && slot.failure.is_none();
            to.set(&slot.label, &slot.counts);
            slot.untold = false;
        }
    }

    fn read(&mut self, watch: usize, object: Value, version: &str, listed: bool) {
        let Some(slot) = self.slots.get_mut(watch) else { return };
        let id = slot.id(&object);
        let node = tree::of_object(object, slot.watch.api_version(version), slot.watch.kind.as_str());
        let mut reader = self.translator.reader(Arc::clone(&slot.place));
        let read = reader.object(&node);
        let (problems, refused) = (std::mem::take(&mut reader.problems), !reader.refused.is_empty());
        drop(reader);
        let event = match (&read, refused) {
            (Some(_), _) => "applied",
            // What it said before stays in force.
            (None, true) => "refused",
            (None, false) => "ignored",
        };
        *slot.counts.events.entry(event).or_default() += 1;
        if listed && let Some(seen) = &mut slot.seen {
            seen.insert(id.clone());
            seen.extend(read.iter().map(|o| o.id.clone()));
        }
        match read {
            Some(object) => {
                slot.held.insert(object.id.clone());
                self.translator.upsert(object);
            }
            None if refused => {}
            None => {
                if slot.held.remove(&id) {
                    self.translator.remove(&id);
                }
            }
        }
        if problems.is_empty() {
            self.problems.remove(&id);
        } else {
            self.problems.insert(id, problems);
        }
    }

    fn remove(&mut self, watch: usize, object: &Value) {
        let Some(slot) = self.slots.get_mut(watch) else { return };
        let id = slot.id(object);
        *slot.counts.events.entry("deleted").or_default() += 1;
        self.problems.remove(&id);
        if slot.held.remove(&id) {
            self.translator.remove(&id);
        }
    }

    /// A list is whole: what it did not name is gone.
    fn complete(&mut self, watch: usize) {
        let Some(slot) = self.slots.get_mut(watch) else { return };
        let seen = slot.seen.take().unwrap_or_default();
        let gone: Vec<ObjectId> = slot.held.iter().filter(|id| !seen.contains(*id)).cloned().collect();
        for id in gone {
            *slot.counts.events.entry("deleted").or_default() += 1;
            slot.held.remove(&id);
            self.problems.remove(&id);
            self.translator.remove(&id);
        }
        // Refused ones that were never in force.
        let kind = slot.watch.kind;
        let namespace = slot.watch.namespace.as_deref();
        let of_slot = |id: &ObjectId| id.kind == kind && namespace.is_none_or(|ns| *id.namespace == *ns);
        self.problems.retain(|id, _| !of_slot(id) || seen.contains(id));
        slot.listed = true;
        slot.forbidden = false;
        if let Some(closed) = slot.closed.take() {
            self.translator.remove(&closed);
        }
        self.recover(watch);
    }

    /// The watch works again.
    fn recover(&mut self, watch: usize) {
        if let Some(slot) = self.slots.get_mut(watch)
            && slot.failure.take().is_some()
        {
            tracing::info!(resource = slot.label, "followed again");
        }
    }

    fn fail(&mut self, watch: usize, failure: Failure) {
        let Some(slot) = self.slots.get_mut(watch) else { return };
        *slot.counts.failures.entry(failure.why.as_str()).or_default() += 1;
        if failure.why == Why::Expired && slot.listed {
            // It is listed anew at once.
            return;
        }
        if failure.why == Why::Forbidden && slot.watch.closes() && !slot.listed && slot.closed.is_none() {
            let mut reader = self.translator.reader(Arc::clone(&slot.place));
            let stand_in = reader.unreadable(0, "", &failure.message);
            drop(reader);
            slot.closed = Some(stand_in.id.clone());
            self.translator.upsert(stand_in);
        }
        match failure.why {
            Why::Forbidden => slot.forbidden = true,
            // There are none.
            Why::Missing => slot.forbidden = false,
            // A server that does not answer says nothing of rights.
            Why::Unauthorized | Why::Expired | Why::Other => {}
        }
        if slot.failure.as_ref() != Some(&failure) {
            slot.failure = Some(failure);
            self.new_failures = true;
        }
    }
}

impl Slot {
    /// Whether it would tell of addresses, and may not be read.
    fn is_unread(&self) -> bool {
        self.watch.has_addresses() && !self.listed && self.forbidden
    }
    fn id(&self, object: &Value) -> ObjectId {
        let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default().into();
        ObjectId { kind: self.watch.kind, namespace: text("namespace"), name: text("name") }
    }

    fn problem(&self) -> Option<Problem> {
        let failure = self.failure.as_ref()?;
        let resource = if self.watch.group.is_empty() {
            self.watch.plural.to_owned()
        } else {
            format!("{}.{}", self.watch.plural, self.watch.group)
        };
        let effect = match (self.listed, self.closed.is_some()) {
            (true, _) => "what was known of it stays in force",
            (false, true) => "it may refuse something, so everything is denied until it can be read",
            _ if self.is_unread() => {
                "calls to addresses that nobody knows are refused until it can be read: they may have a waypoint"
            }
            (false, false) => "nothing of it is in force",
        };
        let (severity, code, fix) = match failure.why {
            Why::Forbidden => {
                (Severity::Error, "forbidden", "give this process's service account the verbs list and watch on it (manifests/)")
            }
            Why::Missing if self.listed => (Severity::Error, "not-served", "install its CRD again"),
            Why::Missing => (Severity::Note, "not-served", "install its CRD if you mean to use it"),
            Why::Unauthorized | Why::Expired | Why::Other => (Severity::Error, "not-followed", "see that the API server answers"),
        };
        Some(Problem {
            severity,
            origin: Origin { place: Arc::clone(&self.place), line: 0, object: resource.into() },
            field: "".into(),
            message: format!("cannot be followed: {}; {effect}", failure.message).into(),
            fix: fix.into(),
            code: Some(code),
        })
    }
}
