//! Gateway API routes of services and gateways: the place where they enter the join of [`super::layer7`].

use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::l7::destination::UpstreamTls;
use mesh_model::l7::gateway::{GatewayKey, GatewayRoutes};
use mesh_model::l7::route::RouteTable;
use mesh_model::service::Service;

use super::layer7::{Join, Touched};
use super::object::{ObjectId, Reader};
use super::read::Read;
use crate::yaml::Node;

/// One object of the Gateway API, as read.
#[derive(Clone, Debug, PartialEq)]
pub enum GatewayApiObject {}

/// The objects of the Gateway API, and their indices.
#[derive(Debug, Default)]
pub(super) struct GatewayApi {}
impl GatewayApi {
    /// Takes an object in or forgets it, and marks what it touches. (Outputs that asked for the object by name, or for all
    /// of its kind and namespace, are marked by the caller.)
    pub(super) fn set(&mut self, _id: &ObjectId, _new: Option<(GatewayApiObject, Arc<Origin>)>, _touched: &mut Touched) {}
}

/// Reads an HTTPRoute, GRPCRoute, TCPRoute, TLSRoute, BackendTLSPolicy or ReferenceGrant.
pub(super) fn read<'p>(
    r: &mut Reader<'_>,
    node: &'p Node<'p>,
    _id: &ObjectId,
    _origin: &Arc<Origin>,
) -> Read<'p, Option<GatewayApiObject>> {
    r.note(node, "accepted; not used by this proxy yet");
    Ok(None)
}

/// Adds the rules of the routes attached to a service, in the order of the Gateway API, behind what is there.
pub(super) fn add(_join: &mut Join<'_>, _service: &Arc<Service>, _table: &mut RouteTable) {}

/// TLS towards a service, as a BackendTLSPolicy asks for it.
#[derive(Clone, Debug)]
pub(super) struct BackendTls {
    /// Port of the service; `None` for all.
    pub(super) port: Option<u16>,
    /// What to speak.
    pub(super) tls: Arc<UpstreamTls>,
    /// Where it was written.
    pub(super) origin: Arc<Origin>,
}
/// What BackendTLSPolicies say about a service; one per port at most, ports of their own first.
pub(super) fn backend_tls(_join: &mut Join<'_>, _service: &Arc<Service>) -> Vec<BackendTls> {
    Vec::new()
}

/// The listeners and routes of a Gateway that faces the outside; `None` for waypoints and unknown ones.
pub(super) fn gateway(_join: &mut Join<'_>, _key: &GatewayKey) -> Option<GatewayRoutes> {
    None
}
