//! Changes: the only way knowledge enters the model.
use crate::policy::{Policy, PolicyKey};
use crate::service::{Service, ServiceKey};
use crate::workload::{Locality, Workload, WorkloadUid};
use std::fmt;
use std::sync::Arc;

/// Where an object came from, for operators.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// File path or source name (`istiod`).
    pub place: Arc<str>,
    /// Line of the object in that file, 1-based; 0 when it has no lines.
    pub line: u32,
    /// `Kind namespace/name`.
    pub object: Arc<str>,
}
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{} ({})", self.object, self.place)
        } else {
            write!(f, "{} ({}:{})", self.object, self.place, self.line)
        }
    }
}
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
