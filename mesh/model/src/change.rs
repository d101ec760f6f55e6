//! Changes: the only way knowledge enters the model.
use crate::addr::Network;
use crate::defaults::MeshDefaults;
use crate::l7::authorizer::Authorizers;
use crate::l7::destination::Destination;
use crate::l7::gateway::{GatewayKey, GatewayRoutes};
use crate::l7::policy::{L7Policies, PolicyTarget};
use crate::l7::request_auth::RequestAuths;
use crate::l7::route::RouteTable;
use crate::l7::treatment::Treatment;
pub use crate::origin::Origin;
use crate::policy::{Policy, PolicyKey};
use crate::service::{Service, ServiceKey};
use crate::telemetry::TelemetryRules;
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
    /// The routes of a service appeared or changed.
    Routes(ServiceKey, Arc<RouteTable>),
    /// A service has no routes of its own any more.
    RoutesGone(ServiceKey),
    /// What is said about reaching a service appeared or changed.
    Destination(Arc<Destination>),
    /// Nothing is said about reaching a service any more.
    DestinationGone(ServiceKey),
    /// A gateway's listeners or their routes appeared or changed.
    Gateway(Arc<GatewayRoutes>),
    /// A gateway went.
    GatewayGone(GatewayKey),
    /// The layer 7 policies of a target appeared or changed.
    L7Policies(PolicyTarget, Arc<L7Policies>),
    /// No layer 7 policy is bound to a target any more.
    L7PoliciesGone(PolicyTarget),
    /// The RequestAuthentications of a target appeared or changed.
    RequestAuths(PolicyTarget, Arc<RequestAuths>),
    /// No RequestAuthentication is bound to a target any more.
    RequestAuthsGone(PolicyTarget),
    /// What is told about traffic changed.
    Telemetry(Arc<TelemetryRules>),
    /// What is done with every request of a target appeared or changed.
    Treatment(PolicyTarget, Arc<Treatment>),
    /// Nothing is said about a target any more.
    TreatmentGone(PolicyTarget),
    /// All external authorizers, in place of those before.
    Authorizers(Arc<Authorizers>),
    /// What the mesh's configuration says for all requests, in place of what it said before.
    Defaults(Arc<MeshDefaults>),
    /// The locality of our own node became known or changed (endpoint preferences are ranked from it).
    OwnLocality(Locality),
    /// Our own network became known or changed: addresses are looked up in it.
    OwnNetwork(Network),
    /// Why what nobody knows may be of the mesh all the same: something that would tell of it may not be read. `None`: nothing is.
    Unread(Option<Arc<str>>),
}
