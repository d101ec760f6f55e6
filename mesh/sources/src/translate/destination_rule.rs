//! DestinationRule.
use super::Name;
use super::gateway_api::BackendTls;
use super::layer7::Join;
use super::object::{ObjectId, Reader};
use super::read::Read;
use crate::yaml::Node;
use mesh_model::l7::destination::Destination;
use mesh_model::service::Service;
use std::sync::Arc;

/// A DestinationRule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationRule {
    /// Host.
    pub host: Arc<str>,
    /// Why.
    pub broken: Option<Arc<str>>,
}
pub(super) fn read<'p>(_r: &mut Reader<'_>, node: &'p Node<'p>, _id: &ObjectId) -> Read<'p, DestinationRule> {
    Err(super::read::Bad::value(node, "not translated yet", ""))
}
pub(super) fn build(_join: &mut Join<'_>, _service: &Arc<Service>, _tls: &[BackendTls]) -> Option<Destination> {
    None
}
pub(super) fn check(_join: &mut Join<'_>, _name: &Name) {}
