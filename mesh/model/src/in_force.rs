//! What one version of the mesh says about everything that goes to one place: found once, when the version is published, and
//! not for each request.
//!
//! Owns nothing but the look-ups. Upstream: `snapshot`. Downstream: the waypoint, which keeps one per service it is asked for.
use crate::authz_l7::{InScope, PolicyScope};
use crate::l7::RouteTable;
use crate::l7::request_auth::RequestAuths;
use crate::l7::treatment::Treatments;
use crate::snapshot::{Snapshot, Version};
use crate::telemetry::{Place, Telemetry};
use std::sync::Arc;

/// What is in force at one place.
#[derive(Clone, Debug)]
pub struct InForce {
    /// By this version of the mesh.
    pub version: Version,
    /// AuthorizationPolicies.
    pub policies: InScope,
    /// RequestAuthentications, the nearest first; their rules count together.
    pub auths: Box<[Arc<RequestAuths>]>,
    /// TrafficPolicies.
    pub treatments: Treatments,
    /// Routes of the service, where it has any.
    pub routes: Option<Arc<RouteTable>>,
    /// What is told of its traffic.
    pub told: Option<Arc<Telemetry>>,
}
impl InForce {
    /// What a version of the mesh says of `scope`; of its telemetry, of `place`.
    pub fn of(snap: &Snapshot, scope: &PolicyScope<'_>, place: &Place<'_>) -> Self {
        let treatments = scope.targets().into_iter().flatten().filter_map(|target| snap.find_treatment(target));
        let told = snap.telemetry().find(place).map(|sides| if place.waypoint { &sides.server } else { &sides.client });
        Self {
            version: snap.version(),
            policies: InScope::of(snap, scope),
            auths: scope.request_auths(snap).cloned().collect(),
            treatments: Treatments::new(treatments.cloned()),
            routes: scope.service.and_then(|key| snap.find_routes(key)).cloned(),
            told: told.cloned(),
        }
    }
}
