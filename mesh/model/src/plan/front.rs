//! The waypoint in front of a service, as a gateway reaches it (label `istio.io/ingress-use-waypoint`): every instance, where an
//! agent draws one for a connection, and what is asked for there.
//!
//! Refuses what cannot be reached so: who declares that gateways go through the waypoint does not have them go around it.
use super::beyond::{entrance, entrances, instances, nobody_to_expect};
use super::{Entrance, GatewayName};
use crate::addr::HboneAuthority;
use crate::gateway::GatewayRef;
use crate::id::SpiffeId;
use crate::known::Known;
use crate::reason::{Reason, Refusal};
use crate::service::Service;
use crate::snapshot::Snapshot;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// The way to a port of a service through its waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Front {
    /// What an instance is asked for: the service's address, as agents ask, else its name.
    pub authority: HboneAuthority,
    /// Instances of its waypoints; never empty.
    pub instances: Vec<Instance>,
}
/// One instance of a waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The workload.
    pub known: Arc<Known>,
    /// Where the tunnel goes: to itself, or to the gateway of its network.
    pub at: Entrance,
    /// Set where that is a gateway, which is asked for the service by name: who may end the inner tunnel.
    pub beyond: Option<Arc<[SpiffeId]>>,
    /// Its share, beside the others.
    pub weight: u32,
}

/// The way of a gateway in `namespace` to `port` of a service through its waypoint; `None`: it goes to the endpoints itself.
/// `own`: the family of addresses that is preferred.
///
/// # Errors
/// `NoWaypoint`, `NoGateway`: through it is the only way, and it cannot be used.
pub fn way_by_waypoint(
    snap: &Snapshot,
    service: &Service,
    port: u16,
    own: IpAddr,
    namespace: &str,
) -> Option<Result<Front, Refusal>> {
    service.is_fronted().then(|| front(snap, service, port, own, namespace))
}

fn front(snap: &Snapshot, service: &Service, port: u16, own: IpAddr, namespace: &str) -> Result<Front, Refusal> {
    let refuse = |why: &dyn std::fmt::Display| Refusal::new(Reason::NoWaypoint, format!("{}: {why}", service.key));
    if let Some(why) = &service.waypoint_error {
        return Err(refuse(why));
    }
    let authority = asked_for(snap, service, port, own, namespace);
    let authority =
        authority.ok_or_else(|| refuse(&format!("neither its addresses nor its name mean it in namespace {namespace}")))?;
    let (mut found, mut why_not) = (Vec::new(), None);
    for declared in service.waypoints.iter().filter(|declared| declared.weight > 0) {
        match of_waypoint(snap, service, &declared.waypoint, own) {
            Ok(instances) => found.push((declared.weight, instances)),
            Err(why) => why_not = why_not.or(Some(why)),
        }
    }
    if found.is_empty() {
        return Err(why_not.unwrap_or_else(|| refuse(&"the weights of its waypoints sum to zero")));
    }
    Ok(Front { authority, instances: weigh(found) })
}

/// What means `service` to whom a client of `namespace` asks for it.
fn asked_for(snap: &Snapshot, service: &Service, port: u16, own: IpAddr, namespace: &str) -> Option<HboneAuthority> {
    let network = &snap.view().network;
    let is_it = |found: Option<&Arc<Service>>| found.is_some_and(|found| found.key == service.key);
    let on_network = || service.vips.iter().filter(|vip| vip.network == *network).map(|vip| vip.ip.to_canonical());
    let vips = || on_network().filter(|ip| is_it(snap.find_service_by_vip(network, *ip, namespace)));
    if let Some(ip) = vips().find(|ip| ip.is_ipv4() == own.is_ipv4()).or_else(|| vips().next()) {
        return Some(HboneAuthority::Addr(SocketAddr::new(ip, port)));
    }
    let host = &service.key.hostname;
    is_it(snap.find_service_by_host(host, namespace)).then(|| HboneAuthority::Name { host: Arc::clone(host), port })
}

/// The instances of one waypoint that can be reached, weighed by their capacity.
fn of_waypoint(snap: &Snapshot, service: &Service, waypoint: &GatewayRef, own: IpAddr) -> Result<Vec<Instance>, Refusal> {
    let (mut usable, mut why_not): (Vec<Instance>, _) = (Vec::new(), None);
    for at in &instances(snap, waypoint) {
        let w = at.known.workload();
        let (entrances, beyond) = if w.network == snap.view().network {
            (entrance(Reason::NoWaypoint, waypoint, at, own).map(|at| vec![at]), None)
        } else {
            let sans = at.service.map_or(&[][..], |s| &s.sans);
            let entrances = match w.network_gateway.as_deref() {
                _ if sans.is_empty() => Err(nobody_to_expect(service, &w.network)),
                None => {
                    let network = w.network.as_str();
                    Err(Refusal::new(Reason::NoGateway, format!("network {network:?} of {} has no gateway", w.uid)))
                }
                Some(gateway) => entrances(snap, gateway, own),
            };
            (entrances, Some(Arc::from(sans)))
        };
        match entrances {
            Ok(entrances) => {
                let ways = u32::try_from(entrances.len()).unwrap_or(u32::MAX).max(1);
                let weight = w.capacity.max(1).div_ceil(ways);
                for at_gateway in entrances {
                    if let Some(same) = usable.iter_mut().find(|i| i.at == at_gateway && i.beyond == beyond) {
                        same.weight = same.weight.saturating_add(weight);
                        continue;
                    }
                    usable.push(Instance { known: Arc::clone(at.known), at: at_gateway, beyond: beyond.clone(), weight });
                }
            }
            Err(why) => why_not = why_not.or(Some(why)),
        }
    }
    if usable.is_empty() {
        let none = || Refusal::new(Reason::NoWaypoint, format!("no healthy endpoint of {}", GatewayName(waypoint)));
        return Err(why_not.unwrap_or_else(none));
    }
    Ok(usable)
}

/// All instances, those of each waypoint with its share together.
fn weigh(mut waypoints: Vec<(u32, Vec<Instance>)>) -> Vec<Instance> {
    let together = |instances: &[Instance]| instances.iter().fold(0u64, |sum, i| sum + u64::from(i.weight));
    if let [(_, _), _, ..] = &waypoints[..] {
        // Parts in 10 000 of the whole: exact enough for weights in percent.
        for (share, instances) in &mut waypoints {
            let all = together(instances).max(1);
            for i in instances {
                let weight = (u64::from(*share) * u64::from(i.weight) * 10_000).div_ceil(all);
                i.weight = weight.try_into().unwrap_or(u32::MAX);
            }
        }
    }
    waypoints.into_iter().flat_map(|(_, instances)| instances).collect()
}

#[cfg(test)]
mod tests;
