//! Changes: the only way knowledge enters the model.
pub use crate::origin::Origin;
use crate::policy::{Policy, PolicyKey};
use crate::service::{Service, ServiceKey};
use crate::workload::{Locality, Workload, WorkloadUid};
use std::sync::Arc;

/// One upsert or removal. A removal of something unknown is not an error.
#[derive(Clone, Debug)]
pub enum Change {
    /// A workload appeared or changed.
    Workload(Arc<Workload>),
    /// A workload went.
    WorkloadGone(WorkloadUid),
    /// A service appeared or changed.
    Service(Arc<Service>),
    /// A service went.
    ServiceGone(ServiceKey),
    /// A policy appeared or changed.
    Policy(Arc<Policy>),
    /// A policy went.
    PolicyGone(PolicyKey),
    /// The locality of our own node became known or changed (endpoint preferences are ranked from it).
    OwnLocality(Locality),
}
