//! Other networks: which there are, by which gateway each is reached, and who that gateway is.
//!
//! A Gateway of the class `istio-remote` says all three, as in Istio: its label names the network, its address and HBONE listener
//! are where, and its service account is who. What is behind it are WorkloadEntries and endpoints of ServiceEntries with
//! `network`. Pods are always of the own network: labels that say otherwise would make them unknown, and traffic to them plain.
//! Of several gateways of one network the first by name counts.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::Change;
use mesh_model::addr::Network;
use mesh_model::service::ServiceKey;
use mesh_model::workload::{GatewayDestination, GatewayRef, Workload};

use super::object::{Gateway, GatewayAddress, RemoteNetwork};
use super::{Dirty, Labels, Name, Translator};

impl Translator {
    /// Looks at the gateways anew where one changed, and marks what is reached through them.
    pub(super) fn flush_networks(&mut self, dirty: &mut Dirty, changes: &mut Vec<Change>) {
        if !dirty.all && dirty.gateways.is_empty() {
            return;
        }
        let (mut networks, mut want) = (BTreeMap::new(), BTreeMap::new());
        for (key, slot) in &self.gateways {
            if let Some((to, at, who)) = self.remote_gateway(key, &slot.obj) {
                want.insert(Arc::clone(&who.uid), Arc::new(who));
                networks.entry(Arc::clone(&to.network)).or_insert(at);
            }
        }
        let changed = |(uid, who): &(&Arc<str>, &Arc<Workload>)| self.networks_out.get(*uid) != Some(who);
        changes.extend(want.iter().filter(changed).map(|(_, who)| Change::Workload(Arc::clone(who))));
        let gone = self.networks_out.keys().filter(|uid| !want.contains_key(*uid));
        changes.extend(gone.map(|uid| Change::WorkloadGone(Arc::clone(uid))));
        let of_either = self.networks.keys().chain(networks.keys());
        let moved: BTreeSet<Arc<str>> = of_either.filter(|n| self.networks.get(*n) != networks.get(*n)).cloned().collect();
        (self.networks, self.networks_out) = (networks, want);
        if !dirty.all && !moved.is_empty() {
            self.spread_networks(&moved, dirty);
        }
    }

    /// Where the gateway of another network is, and the workload that it is to whoever connects to it.
    fn remote_gateway<'g>(
        &self,
        (namespace, _): &Name,
        gateway: &'g Gateway,
    ) -> Option<(&'g RemoteNetwork, GatewayRef, Workload)> {
        let (to, address) = (gateway.leads_to.as_ref()?, gateway.address.as_ref()?);
        let network = Network(Arc::clone(&to.network));
        let at = match address {
            GatewayAddress::Ip(ip) => ip.to_string(),
            GatewayAddress::Hostname(host) => host.to_string(),
        };
        // As istiod names it.
        let uid: Arc<str> = format!("NetworkGateway/{}/{at}/{}", to.network, to.port).into();
        let mut who = self.base(uid.to_string(), &uid, namespace, &Labels::default(), &uid);
        who.service_account = Arc::clone(&to.service_account);
        who.network = network.clone();
        let destination = match address {
            GatewayAddress::Ip(ip) => {
                who.ips = vec![*ip];
                GatewayDestination::Address(network, *ip)
            }
            GatewayAddress::Hostname(host) => {
                who.hostname = Some(Arc::clone(host));
                GatewayDestination::Service(ServiceKey { namespace: Arc::clone(namespace), hostname: Arc::clone(host) })
            }
        };
        Some((to, GatewayRef { destination, hbone_port: to.port }, who))
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

#[cfg(test)]
pub(super) mod tests;
