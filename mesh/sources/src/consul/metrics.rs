//! The state of the watches for whoever scrapes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_runtime::metrics::{MetricError, Registry};

use super::state::State;
use super::watch::Told;

const UP: &str = "culvert_consul_watch_up";
const SERVICES: &str = "culvert_consul_services";
const INSTANCES: &str = "culvert_consul_instances";
const ANSWERS: &str = "culvert_consul_answers_total";
/// What the questions about instances are called.
const HEALTH: &str = "instances";

#[derive(Debug, Default)]
struct Counts {
    up: BTreeMap<&'static str, bool>,
    services: usize,
    instances: usize,
    /// By what was asked and how it went.
    answers: BTreeMap<(&'static str, &'static str), u64>,
}

/// The counts of all watches. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Mutex<Counts>>);

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(super) fn count(&self, told: &Told) {
        let key = match told {
            Told::Whole(which, _) => (which.as_str(), "ok"),
            Told::Failed(which, failure) => (which.as_str(), if failure.refused { "refused" } else { "failed" }),
            Told::Instances(..) => (HEALTH, "ok"),
            Told::InstancesFailed(_, failure) => (HEALTH, if failure.refused { "refused" } else { "failed" }),
        };
        *self.lock().answers.entry(key).or_default() += 1;
    }
    pub(super) fn set(&self, state: &State) {
        let mut counts = self.lock();
        (counts.services, counts.instances) = state.counts();
        for which in state.parts() {
            counts.up.insert(which.as_str(), state.is_up(Some(*which)));
        }
        counts.up.insert(HEALTH, state.is_up(None));
    }

    /// Registers `culvert_consul_*`: what is followed, how many services and instances are known, and what was answered.
    ///
    /// # Errors
    /// The names are taken.
    pub fn expose(&self, registry: &Registry) -> Result<(), MetricError> {
        let metrics = self.clone();
        registry.on_scrape(&[UP, SERVICES, INSTANCES, ANSWERS], move |out| {
            let counts = metrics.lock();
            let mut samples = out.family(UP, "Whether a part of Consul is followed", "gauge");
            for (what, up) in &counts.up {
                samples.put(&[("what", what)], u64::from(*up));
            }
            out.family(SERVICES, "Services that Consul tells of", "gauge").put(&[], counts.services as u64);
            out.family(INSTANCES, "Instances of services that Consul tells of and that are understood", "gauge")
                .put(&[], counts.instances as u64);
            let mut samples = out.family(ANSWERS, "Answers of Consul that told something new, and failures", "counter");
            for ((what, result), count) in &counts.answers {
                samples.put(&[("what", what), ("result", result)], *count);
            }
        })
    }
}
