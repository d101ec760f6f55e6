//! What a control plane told of services, workloads and policies of layer 4, joined with what only objects say.
//!
//! Its word is the mesh: of what objects say of the same, only labels (subsets are chosen by them; istiod does not tell them),
//! whether a service is for other networks, whether the addresses of its names are one endpoint, and the places where something was written are added, by the name both know a workload
//! by. Workloads of other clusters have no labels here. Upstream: [`super::Translator::adopt`]. Downstream: [`super::Translator::flush`].

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_model::service::{Service, ServiceKey};
use mesh_model::workload::{Workload, WorkloadUid};
use mesh_model::{Change, Origin};

use super::HashMap;
use super::intern::Labels;

/// What objects add to a workload.
#[derive(Debug, Clone, PartialEq)]
struct Own {
    labels: Labels,
    origin: Option<Arc<Origin>>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Told {
    services: HashMap<ServiceKey, Arc<Service>>,
    /// As handed out: with what objects add.
    workloads: HashMap<WorkloadUid, Arc<Workload>>,
    own: HashMap<WorkloadUid, Own>,
    /// To be handed out with the next flush.
    pending: Vec<Change>,
}

impl Told {
    /// Takes changes in; the services among them are added to `services`, because routes hang on them.
    pub(super) fn take(&mut self, changes: Vec<Change>, services: &mut BTreeSet<ServiceKey>) {
        for change in changes {
            match change {
                Change::Service(service) => {
                    services.insert(service.key.clone());
                    self.services.insert(service.key.clone(), service);
                }
                Change::ServiceGone(key) => {
                    self.services.remove(&key);
                    services.insert(key);
                }
                Change::Workload(workload) => self.put(workload),
                Change::WorkloadGone(uid) => {
                    self.workloads.remove(&uid);
                    self.pending.push(Change::WorkloadGone(uid));
                }
                other => self.pending.push(other),
            }
        }
    }

    /// The service of a key, if it was told.
    pub(super) fn service(&self, key: &ServiceKey, own: Option<&Service>) -> Option<Service> {
        let told = self.services.get(key)?;
        let (origin, global, logical_dns) = own.map(|own| (own.origin.clone(), own.global, own.logical_dns)).unwrap_or_default();
        Some(Service { origin, global, logical_dns, ..Service::clone(told) })
    }

    /// What to hand out when objects say `own`: everything that was told, with what they add; and what is theirs alone.
    pub(super) fn join(&mut self, own: Vec<Change>) -> Vec<Change> {
        let mut out = Vec::with_capacity(own.len() + self.pending.len());
        for change in own {
            match change {
                Change::Workload(w) => {
                    let new = Own { labels: w.labels.clone(), origin: w.origin.clone() };
                    self.own.insert(Arc::clone(&w.uid), new);
                    if let Some(told) = self.workloads.get(&w.uid).map(Arc::clone) {
                        self.put(told);
                    }
                }
                // As long as the control plane tells it, it keeps what was known of it.
                Change::WorkloadGone(uid) => drop(self.own.remove(&uid)),
                Change::Policy(_) | Change::PolicyGone(_) => {}
                other => out.push(other),
            }
        }
        out.append(&mut self.pending);
        out
    }

    /// Hands a workload out with what objects add.
    fn put(&mut self, mut workload: Arc<Workload>) {
        let before = self.workloads.get(&workload.uid);
        let own = self.own.get(&workload.uid).map(|own| (&own.labels, &own.origin));
        if let Some((labels, origin)) = own.or(before.map(|w| (&w.labels, &w.origin)))
            && (workload.labels != *labels || workload.origin != *origin)
        {
            let (labels, origin) = (labels.clone(), origin.clone());
            workload = Arc::new(Workload { labels, origin, ..Workload::clone(&workload) });
        }
        if before != Some(&workload) {
            self.workloads.insert(Arc::clone(&workload.uid), Arc::clone(&workload));
            self.pending.push(Change::Workload(workload));
        }
    }
}

#[cfg(test)]
mod tests;
