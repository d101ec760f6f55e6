//! Other networks: which there are, by which gateways each is reached, and who those gateways are.
//!
//! A Gateway of the class `istio-remote` says all three, as in Istio: its label names the network, its addresses and HBONE listener
//! are where, and its service account is who. What is behind it are WorkloadEntries and endpoints of ServiceEntries with
//! `network`. Everybody else is of the own network: `NETWORK`, or the label of the root namespace. Labels of pods and nodes do not
//! count, as they do not for istiod (they are of Istio's sidecars).
//! Several gateways of one network, and several addresses of one, are endpoints of a service that nobody else sees, so that they are
//! drawn like any (Istio takes the first).
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::Change;
use mesh_model::addr::Network;
use mesh_model::plan::HBONE_PORT;
use mesh_model::service::{AppProtocol, Service, ServiceKey, ServicePort, Visibility};
use mesh_model::workload::{GatewayDestination, GatewayRef, Workload};

use super::object::{Gateway, GatewayAddress, RemoteNetwork};
use super::waypoint::NETWORK;
use super::{Dirty, Labels, Name, Translator};

impl Translator {
    /// Where nobody told us our network, it is what the label of the root namespace says, as for istiod. Where that changes, all
    /// addresses are of another network.
    pub(super) fn follow_network(&mut self, dirty: &mut Dirty, changes: &mut Vec<Change>) {
        let root = &self.view.root_namespace;
        if self.has_network || !(dirty.all || dirty.namespaces.contains(root)) {
            return;
        }
        let meta = self.spaces.get(root).and_then(|space| space.meta.as_ref());
        let label = meta.and_then(|slot| slot.obj.labels.get(NETWORK)).map_or_else(Network::default, |n| Network(Arc::clone(n)));
        if label != self.view.network {
            self.view.network = label.clone();
            dirty.all = true;
            changes.push(Change::OwnNetwork(label));
        }
    }

    /// Looks at the gateways anew where one changed, and marks what is reached through them.
    pub(super) fn flush_networks(&mut self, dirty: &mut Dirty, changes: &mut Vec<Change>) {
        if !dirty.all && dirty.gateways.is_empty() {
            return;
        }
        let mut ways: BTreeMap<Arc<str>, Vec<(GatewayRef, Workload)>> = BTreeMap::new();
        for (key, slot) in &self.gateways {
            let Some(to) = &slot.obj.leads_to else { continue };
            ways.entry(Arc::clone(&to.network)).or_default().extend(self.remote_gateway(key, &slot.obj, to));
        }
        let (mut networks, mut services, mut want) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (network, mut ways) in ways {
            // One that is known by name alone is no endpoint beside others.
            if ways.iter().any(|(_, who)| !who.ips.is_empty()) {
                ways.retain(|(_, who)| !who.ips.is_empty());
            }
            let Some((first, _)) = ways.first() else { continue };
            let mut at = first.clone();
            if ways.len() > 1 {
                let service = Arc::new(gateways_of(&network));
                let key = service.key.clone();
                for (way, who) in &mut ways {
                    who.services.insert(key.clone(), [(HBONE_PORT, way.hbone_port)].into());
                }
                at = GatewayRef { destination: GatewayDestination::Service(key.clone()), hbone_port: HBONE_PORT };
                services.insert(key, service);
            }
            networks.insert(network, at);
            want.extend(ways.into_iter().map(|(_, who)| (Arc::clone(&who.uid), Arc::new(who))));
        }
        let new = services.iter().filter(|(key, _)| !self.network_services_out.contains_key(*key));
        changes.extend(new.map(|(_, service)| Change::Service(Arc::clone(service))));
        let gone = self.network_services_out.keys().filter(|key| !services.contains_key(*key));
        changes.extend(gone.map(|key| Change::ServiceGone(key.clone())));
        let changed = |(uid, who): &(&Arc<str>, &Arc<Workload>)| self.networks_out.get(*uid) != Some(who);
        changes.extend(want.iter().filter(changed).map(|(_, who)| Change::Workload(Arc::clone(who))));
        let gone = self.networks_out.keys().filter(|uid| !want.contains_key(*uid));
        changes.extend(gone.map(|uid| Change::WorkloadGone(Arc::clone(uid))));
        let of_either = self.networks.keys().chain(networks.keys());
        let moved: BTreeSet<Arc<str>> = of_either.filter(|n| self.networks.get(*n) != networks.get(*n)).cloned().collect();
        (self.networks, self.networks_out, self.network_services_out) = (networks, want, services);
        if !dirty.all && !moved.is_empty() {
            self.spread_networks(&moved, dirty);
        }
    }

    /// Where the gateway of another network is, at each of its addresses, and the workload that it is to whoever connects to it.
    fn remote_gateway(&self, (namespace, _): &Name, gateway: &Gateway, to: &RemoteNetwork) -> Vec<(GatewayRef, Workload)> {
        let network = Network(Arc::clone(&to.network));
        let who = |at: &str| {
            // As istiod names it.
            let uid: Arc<str> = format!("NetworkGateway/{}/{at}/{}", to.network, to.port).into();
            let mut who = self.base(uid.to_string(), &uid, namespace, &Labels::default(), &uid);
            (who.service_account, who.network) = (Arc::clone(&to.service_account), network.clone());
            who
        };
        let way = |destination| GatewayRef { destination, hbone_port: to.port };
        if let (Some(GatewayAddress::Hostname(host)), []) = (&gateway.address, &*to.ips) {
            let key = ServiceKey { namespace: Arc::clone(namespace), hostname: Arc::clone(host) };
            let who = Workload { hostname: Some(Arc::clone(host)), ..who(host) };
            return vec![(way(GatewayDestination::Service(key)), who)];
        }
        let at = |ip: &IpAddr| {
            let who = Workload { ips: vec![*ip], ..who(&ip.to_string()) };
            (way(GatewayDestination::Address(network.clone(), *ip)), who)
        };
        to.ips.iter().map(at).collect()
    }

    fn spread_networks(&self, moved: &BTreeSet<Arc<str>>, dirty: &mut Dirty) {
        let hit = |network: &Option<Arc<str>>| network.as_ref().is_some_and(|network| moved.contains(network));
        for (namespace, space) in &self.spaces {
            let id = |name: &Arc<str>| (Arc::clone(namespace), Arc::clone(name));
            dirty.entries.extend(space.entries.iter().filter(|(_, e)| hit(&e.obj.network)).map(|(name, _)| id(name)));
            let through = space.service_entries.iter().filter(|(_, se)| se.obj.endpoints.iter().any(|e| hit(&e.network)));
            dirty.service_entries.extend(through.map(|(name, _)| id(name)));
        }
    }
}

/// The gateways of one network as a service: of no namespace, so that no client sees it.
fn gateways_of(network: &str) -> Service {
    let mut service = Service::new(network, "", &format!("NetworkGateway/{network}"));
    service.ports = vec![ServicePort { port: HBONE_PORT, target: 0, protocol: AppProtocol::Tcp }];
    service.visibility = Visibility::Namespace;
    service
}

#[cfg(test)]
pub(super) mod tests;
