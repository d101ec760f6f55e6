//! Which treatment each target has: the TrafficPolicies and EnvoyFilters bound to it, joined.
//!
//! Limits of all of them count, edits of headers follow one another by name of the object, the smallest buffer holds. Where only
//! one can be (CORS, compression) the first by name is it and the others are told. There are few of these objects, so all are
//! joined again whenever one of them, or something they may be bound to, was touched. Upstream: [`super::traffic_policy`],
//! [`super::envoy_filter`]. Downstream: `mesh_model::l7::treatment`.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::l7::policy::PolicyTarget;
use mesh_model::l7::treatment::Treatment;
use mesh_model::policy::PolicyKey;
use mesh_model::{Change, Origin};

use super::layer7::{put, same_or_stand_in};
use super::object::ObjectId;
use super::targets::{Bound, Targets, never_applies, resolve};
use super::traffic_policy::TrafficPolicy;
use super::{Dirty, HashMap, Slot, Translator};
use crate::diagnostics::{Problem, Severity};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    objects: BTreeMap<ObjectId, Slot<TrafficPolicy>>,
    touched: bool,
    out: HashMap<PolicyTarget, Arc<Treatment>>,
}
impl Traffic {
    /// Takes an object in or forgets it.
    pub(super) fn set(&mut self, id: &ObjectId, new: Option<Slot<TrafficPolicy>>) {
        if !same_or_stand_in(self.objects.get(id), new.as_ref(), |p| p.treatment.broken.is_some()) {
            put(&mut self.objects, id.clone(), new);
            self.touched = true;
        }
    }
    /// A service was looked at: it may have come, gone, or got a waypoint.
    pub(super) fn touch_service(&mut self) {
        self.touched = true;
    }

    /// Joins again if anything was touched; hands out the difference, and the problems of each object.
    pub(super) fn flush(&mut self, t: &Translator, dirty: &Dirty, changes: &mut Vec<Change>) -> Vec<(ObjectId, Vec<Problem>)> {
        let touched = std::mem::take(&mut self.touched) || dirty.all;
        if !touched && dirty.gateways.is_empty() && dirty.service_entries.is_empty() {
            return Vec::new();
        }
        let (mut made, mut problems) = (BTreeMap::<PolicyTarget, Treatment>::new(), Vec::new());
        for (id, slot) in &self.objects {
            let mut found = Vec::new();
            for target in bound(t, id, slot, &mut found) {
                join(made.entry(target.clone()).or_default(), &slot.obj.treatment, |what| {
                    found.push(shadowed(&slot.origin, &target, what));
                });
            }
            problems.push((id.clone(), found));
        }
        let gone: Vec<PolicyTarget> = self.out.keys().filter(|target| !made.contains_key(target)).cloned().collect();
        for target in gone {
            self.out.remove(&target);
            changes.push(Change::TreatmentGone(target));
        }
        for (target, new) in made {
            if self.out.get(&target).is_none_or(|old| **old != new) {
                let new = Arc::new(new);
                self.out.insert(target.clone(), Arc::clone(&new));
                changes.push(Change::Treatment(target, new));
            }
        }
        problems
    }
}

/// What an object is bound to now.
fn bound(
    t: &Translator,
    id: &ObjectId,
    slot: &Slot<TrafficPolicy>,
    problems: &mut Vec<Problem>,
) -> impl Iterator<Item = PolicyTarget> + use<> {
    let mut bound = Bound::default();
    match &slot.obj.targets {
        // None of these objects names no target, or selects pods.
        Targets::Gateways { everywhere: true }
        | Targets::Unknown { everywhere: true }
        | Targets::Selected { everywhere: true, .. } => {
            _ = bound.targets.insert(PolicyTarget::Mesh);
        }
        Targets::Gateways { everywhere: false }
        | Targets::Unknown { everywhere: false }
        | Targets::Selected { everywhere: false, .. } => {
            _ = bound.targets.insert(PolicyTarget::Namespace(Arc::clone(&id.namespace)));
        }
        Targets::Named(targets) => {
            let key = PolicyKey { namespace: Arc::clone(&id.namespace), name: Arc::clone(&id.name) };
            for target in targets {
                let mut complain =
                    |message: String, fix: &'static str| problems.push(never_applies(&slot.origin, target, &message, fix));
                resolve(t, &key, target, &mut bound, &mut complain);
            }
        }
    }
    bound.targets.into_iter()
}

/// Adds one object to what is said about a target; `taken` is called with what somebody else says already.
fn join(into: &mut Treatment, of: &Treatment, mut taken: impl FnMut(&'static str)) {
    if into.broken.is_none() {
        into.broken.clone_from(&of.broken);
    }
    into.limits.extend(of.limits.iter().cloned());
    into.max_request_bytes = into.max_request_bytes.into_iter().chain(of.max_request_bytes).min();
    into.response.extend(of.response.iter().cloned());
    into.cache.extend(of.cache.iter().cloned());
    one(&mut into.cors, of.cors.as_ref(), || taken("CORS"));
    one(&mut into.compression, of.compression.as_ref(), || taken("compression"));
}
fn one<T>(into: &mut Option<Arc<T>>, of: Option<&Arc<T>>, taken: impl FnOnce()) {
    match (into.is_some(), of) {
        (_, None) => {}
        (true, Some(_)) => taken(),
        (false, Some(of)) => *into = Some(Arc::clone(of)),
    }
}
fn shadowed(origin: &Origin, target: &PolicyTarget, what: &str) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: origin.clone(),
        field: "spec".into(),
        message: format!("another object says what {target} does about {what}; this one's is left out").into(),
        fix: "say it in one of them".into(),
        code: Some("shadowed"),
    }
}
