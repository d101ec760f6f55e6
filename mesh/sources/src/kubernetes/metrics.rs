//! The state of the watches for whoever scrapes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_runtime::metrics::{MetricError, Registry};

const UP: &str = "culvert_kubernetes_watch_up";
const OBJECTS: &str = "culvert_kubernetes_objects";
const EVENTS: &str = "culvert_kubernetes_events_total";
const FAILURES: &str = "culvert_kubernetes_watch_failures_total";

/// What one watch did and has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Whether it is being followed.
    pub up: bool,
    /// Objects in force.
    pub objects: usize,
    /// Objects told, by what became of them.
    pub events: BTreeMap<&'static str, u64>,
    /// Failures by their sort.
    pub failures: BTreeMap<&'static str, u64>,
}

/// The counts of all watches. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Watches(Arc<Mutex<BTreeMap<String, Counts>>>);

impl Watches {
    pub(super) fn set(&self, watch: &str, counts: &Counts) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(watch) {
            Some(have) => have.clone_from(counts),
            None => drop(all.insert(watch.to_owned(), counts.clone())),
        }
    }

    /// Registers `culvert_kubernetes_*`: whether each resource is followed, how many objects are in force, what was told and
    /// what failed.
    ///
    /// # Errors
    /// The names are taken.
    pub fn expose(&self, registry: &Registry) -> Result<(), MetricError> {
        let watches = self.clone();
        registry.on_scrape(&[UP, OBJECTS, EVENTS, FAILURES], move |out| {
            let all = watches.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut samples = out.family(UP, "Whether a resource of the Kubernetes API is followed", "gauge");
            for (watch, counts) in &all {
                samples.put(&[("resource", watch)], u64::from(counts.up));
            }
            let mut samples = out.family(OBJECTS, "Objects of a resource that are in force", "gauge");
            for (watch, counts) in &all {
                samples.put(&[("resource", watch)], counts.objects as u64);
            }
            let mut samples = out.family(EVENTS, "Objects that the Kubernetes API told, by what became of them", "counter");
            for (watch, counts) in &all {
                for (event, count) in &counts.events {
                    samples.put(&[("resource", watch), ("event", event)], *count);
                }
            }
            let mut samples = out.family(FAILURES, "Failures to list or watch a resource", "counter");
            for (watch, counts) in &all {
                for (why, count) in &counts.failures {
                    samples.put(&[("resource", watch), ("reason", why)], *count);
                }
            }
        })
    }
}
