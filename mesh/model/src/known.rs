//! A workload as the snapshot knows it: the object and what is derived from it once, at publish, instead of per
//! connection. Upstream: `snapshot`. Downstream: `lb`, `plan`.
use crate::id::SpiffeId;
use crate::workload::{Workload, WorkloadUid};
use std::sync::Arc;

/// A workload with its identity worked out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Beside the workload, for one hop less in ordered sets.
    uid: WorkloadUid,
    workload: Arc<Workload>,
    /// The one identity it must prove, or nothing when its parts do not make a SPIFFE id.
    expect: Arc<[SpiffeId]>,
}
impl Known {
    /// Derives what can be derived. A workload whose parts do not make a SPIFFE id is kept: it can be reached in plain,
    /// but no HBONE hop to it is ever planned.
    pub fn new(workload: Arc<Workload>) -> Self {
        let expect = workload.identity().map_or_else(|_| Arc::default(), |id| Arc::from([id]));
        Self::with_identity(workload, expect)
    }
    /// With an identity worked out before for the same trust domain, namespace and service account (shared text).
    pub(crate) fn with_identity(workload: Arc<Workload>, expect: Arc<[SpiffeId]>) -> Self {
        Self { uid: Arc::clone(&workload.uid), workload, expect }
    }
    /// Its unique id.
    pub fn uid(&self) -> &WorkloadUid {
        &self.uid
    }
    /// The object.
    pub fn workload(&self) -> &Arc<Workload> {
        &self.workload
    }
    /// Its identity.
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.expect.first()
    }
    /// Its identity as the set a hop expects; empty when it has none.
    pub fn expect(&self) -> &Arc<[SpiffeId]> {
        &self.expect
    }
    /// Its identity and `extra` (service SANs); shares the cached set when there is nothing extra.
    pub fn expect_with(&self, extra: &[SpiffeId]) -> Arc<[SpiffeId]> {
        if extra.is_empty() {
            return Arc::clone(&self.expect);
        }
        let mut all = self.expect.to_vec();
        for id in extra {
            if !all.contains(id) {
                all.push(id.clone());
            }
        }
        all.into()
    }
}
