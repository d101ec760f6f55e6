//! Waypoints as endpoints: who goes through them (a gateway, where that is wanted) balances over their instances, and what is
//! said of the service's own endpoints is theirs to keep.
use super::super::host::{self, Lead, Target};
use super::Listed;
use super::beyond::network_of;
use mesh_model::plan::{Front, FrontInstance};
use mesh_model::service::Service;
use mesh_model::{HboneAuthority, Network};
use std::sync::Arc;

/// The instances of a service's waypoint.
pub(super) fn listed(service: &Service, port: u16, front: &Front, own: &Network) -> Vec<Listed> {
    let here = Arc::new(Lead::Waypoint(front.authority.clone()));
    let instance = |i: &FrontInstance| {
        let lead = i.beyond.as_ref().map(|expect| {
            let authority = HboneAuthority::Name { host: Arc::clone(&service.key.hostname), port };
            let (expect, from) = (Arc::clone(expect), network_of(own));
            Arc::new(Lead::Network(host::Beyond { authority, expect, from, by_waypoint: true }))
        });
        let lead = Some(lead.unwrap_or_else(|| Arc::clone(&here)));
        let target = Target { addr: i.at.dial, name: None, hbone: true, expect: Arc::clone(&i.at.expect), lead };
        Listed { known: Arc::clone(&i.known), target, weight: i.weight, priority: 0, share: 0, named: None }
    };
    front.instances.iter().map(instance).collect()
}
