//! Inbound authorization: verdicts by Istio's L4 RBAC truth table (node-agent §1.7), with every fail-open spot closed.
use crate::conn::InboundConn;
use crate::policy::PolicyKey;
use crate::reason::Refusal;
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// The answer. A denial is a verdict, not an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let through; by this policy, or by none when no ALLOW policy binds the workload.
    Allow(Option<PolicyKey>),
    /// Refused.
    Deny(Refusal),
}
/// A verdict with what dry-run policies would have done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The enforced answer.
    pub verdict: Verdict,
    /// Dry-run policies that matched, to be logged; empty (no allocation) almost always.
    pub dry_run: Vec<PolicyKey>,
}
/// Decides an inbound connection to `workload` by one version of the mesh.
pub fn authorize(_snap: &Snapshot, _workload: &Workload, _conn: &InboundConn<'_>) -> Decision {
    todo!()
}
