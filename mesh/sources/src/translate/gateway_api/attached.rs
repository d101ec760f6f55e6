//! Policies that are attached to Services by `targetRefs`, and which of them speak of one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::service::ServiceKey;

use super::super::layer7::{Output, Touched, forget, put, same_or_stand_in};
use super::super::{HashMap, Name, Slot};
use super::backend_tls::{PolicyTarget, TlsPolicy};
use super::backend_traffic::TrafficRules;

/// A policy for Services of its namespace.
pub(super) trait Policy: PartialEq {
    /// The Services.
    fn targets(&self) -> &[PolicyTarget];
    /// Age.
    fn created(&self) -> &Arc<str>;
    /// Whether it only stands for one that could not be read.
    fn is_stand_in(&self) -> bool;
}
impl Policy for TlsPolicy {
    fn targets(&self) -> &[PolicyTarget] {
        &self.targets
    }
    fn created(&self) -> &Arc<str> {
        &self.created
    }
    fn is_stand_in(&self) -> bool {
        self.broken.is_some()
    }
}
impl Policy for TrafficRules {
    fn targets(&self) -> &[PolicyTarget] {
        &self.targets
    }
    fn created(&self) -> &Arc<str> {
        &self.created
    }
    fn is_stand_in(&self) -> bool {
        false
    }
}

/// The policies of one kind.
#[derive(Debug)]
pub(super) struct Attached<T> {
    all: BTreeMap<Name, Slot<T>>,
    by_target: HashMap<ServiceKey, BTreeSet<Name>>,
}
impl<T> Default for Attached<T> {
    fn default() -> Self {
        Self { all: BTreeMap::new(), by_target: HashMap::default() }
    }
}
impl<T: Policy> Attached<T> {
    pub(super) fn get(&self, name: &Name) -> Option<&Slot<T>> {
        self.all.get(name)
    }

    /// Takes a policy in or forgets it, and marks the services it touches.
    pub(super) fn set(&mut self, name: Name, new: Option<Slot<T>>, touched: &mut Touched) {
        let old = self.all.get(&name);
        if same_or_stand_in(old, new.as_ref(), T::is_stand_in) {
            return;
        }
        let targets = |slot: &Slot<T>| -> Vec<ServiceKey> {
            let key = |t: &PolicyTarget| ServiceKey { namespace: Arc::clone(&name.0), hostname: Arc::clone(&t.host) };
            slot.obj.targets().iter().map(key).collect()
        };
        let (before, after) = (old.map(targets).unwrap_or_default(), new.as_ref().map(targets).unwrap_or_default());
        for key in before {
            forget(&mut self.by_target, &key, &name);
            touched.output(Output::Destination(key));
        }
        for key in after {
            self.by_target.entry(key.clone()).or_default().insert(name.clone());
            touched.output(Output::Destination(key));
        }
        put(&mut self.all, name, new);
    }

    /// Those for a service, oldest first.
    pub(super) fn of(&self, key: &ServiceKey) -> Vec<(&Name, &Slot<T>)> {
        let names = self.by_target.get(key).into_iter().flatten();
        let mut found: Vec<(&Name, &Slot<T>)> = names.filter_map(|n| self.all.get_key_value(n)).collect();
        found.sort_by_key(|(name, slot)| (slot.obj.created().is_empty(), slot.obj.created(), *name));
        found
    }
}
