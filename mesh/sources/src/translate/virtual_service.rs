//! VirtualService.
use super::Name;
use super::layer7::Join;
use super::object::{ObjectId, Reader};
use super::read::Read;
use crate::yaml::Node;
use mesh_model::Origin;
use mesh_model::l7::route::RouteTable;
use mesh_model::service::Service;
use std::sync::Arc;

/// A VirtualService, compiled but for the services it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualService {
    /// Hosts.
    pub hosts: Vec<Arc<str>>,
    /// Why.
    pub broken: Option<Arc<str>>,
}
pub(super) fn read<'p>(
    _r: &mut Reader<'_>,
    _node: &'p Node<'p>,
    _id: &ObjectId,
    _origin: &Arc<Origin>,
) -> Read<'p, VirtualService> {
    Ok(VirtualService { hosts: Vec::new(), broken: None })
}
pub(super) fn add(_join: &mut Join<'_>, _service: &Arc<Service>, _table: &mut RouteTable) {}
pub(super) fn check(_join: &mut Join<'_>, _name: &Name) {}
