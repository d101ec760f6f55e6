//! Objects going in: each takes the place of the one of its id, and marks what has to be looked at again.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::policy::PolicyKey;
use mesh_model::service::ServiceKey;
use mesh_model::workload::Locality;
use mesh_model::{Change, Origin};

use super::object::{
    AuthorizationPolicy, EndpointSlice, Gateway, GatewayClass, KubeService, Namespace, PeerAuthentication, Pod, ServiceEntry,
    WorkloadEntry,
};
use super::{
    Body, Dirty, Kind, Labels, ManySlot, Name, ObjectId, PeerSlot, PodSlot, ServiceSlot, Slot, Space, Translator, kube, peer,
};

/// An object as it is from now on; `None`: it is gone.
type New<T> = Option<(T, Arc<Origin>)>;

/// The body, if it is of this kind.
macro_rules! body {
    ($new:expr, $kind:ident) => {
        match $new {
            Some((Body::$kind(obj), origin)) => Some((obj, origin)),
            _ => None,
        }
    };
}

impl Translator {
    pub(super) fn set(&mut self, id: &ObjectId, new: New<Body>) {
        let at: Name = (Arc::clone(&id.namespace), Arc::clone(&id.name));
        match id.kind {
            Kind::Namespace => self.set_namespace(at.1, body!(new, Namespace)),
            Kind::Node => self.set_node(at.1, body!(new, Node)),
            Kind::GatewayClass => self.set_class(at.1, body!(new, GatewayClass)),
            Kind::Gateway => self.set_gateway(at, body!(new, Gateway)),
            Kind::Pod => self.set_pod(at, body!(new, Pod)),
            Kind::WorkloadEntry => self.set_entry(at, body!(new, WorkloadEntry)),
            Kind::ServiceEntry => self.set_service_entry(at, body!(new, ServiceEntry)),
            Kind::Service => self.set_service(at, body!(new, Service)),
            Kind::EndpointSlice => self.set_slice(at, body!(new, EndpointSlice)),
            Kind::AuthorizationPolicy => self.set_policy(at, body!(new, AuthorizationPolicy)),
            Kind::PeerAuthentication => self.set_peer(at, body!(new, PeerAuthentication)),
            Kind::Unreadable => {
                let space = self.spaces.entry(Arc::clone(&at.0)).or_default();
                match body!(new, Unreadable) {
                    Some((policy, _)) => space.unreadable.insert(Arc::clone(&at.1), policy),
                    None => space.unreadable.remove(&at.1),
                };
                self.dirty.policies.insert(PolicyKey { namespace: at.0, name: at.1 });
            }
            Kind::VirtualService
            | Kind::DestinationRule
            | Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TcpRoute
            | Kind::TlsRoute
            | Kind::BackendTlsPolicy
            | Kind::BackendTrafficPolicy
            | Kind::ReferenceGrant
            | Kind::TrafficPolicy
            | Kind::EnvoyFilter
            | Kind::Secret
            | Kind::ConfigMap
            | Kind::RequestAuthentication
            | Kind::Telemetry => {
                if let Some(layer7) = &mut self.layer7 {
                    layer7.set(id, new);
                }
            }
        }
    }

    fn set_namespace(&mut self, name: Arc<str>, new: New<Namespace>) {
        let space = self.spaces.entry(Arc::clone(&name)).or_default();
        let old = std::mem::replace(&mut space.meta, new.map(|(obj, origin)| Slot { obj, origin }));
        if old.as_ref().map(|s| &s.obj) != space.meta.as_ref().map(|s| &s.obj) {
            self.dirty.namespaces.insert(name);
        }
    }

    fn set_node(&mut self, name: Arc<str>, new: New<Locality>) {
        let old = match new {
            Some((locality, _)) => self.nodes.insert(Arc::clone(&name), locality),
            None => self.nodes.remove(&name),
        };
        if old.as_ref() != self.nodes.get(&name) {
            self.dirty.nodes.insert(name);
        }
    }

    fn set_class(&mut self, name: Arc<str>, new: New<GatewayClass>) {
        let old = match new {
            Some((class, _)) => self.classes.insert(Arc::clone(&name), class),
            None => self.classes.remove(&name),
        };
        if old.as_ref() != self.classes.get(&name) {
            let of_class = self.gateways.iter().filter(|(_, g)| g.obj.class == name).map(|(k, _)| k.clone());
            self.dirty.gateways.extend(of_class);
        }
    }

    fn set_gateway(&mut self, at: Name, new: New<Box<Gateway>>) {
        let old = match new {
            Some((obj, origin)) => self.gateways.insert(at.clone(), Slot { obj: *obj, origin }),
            None => self.gateways.remove(&at),
        };
        if old.as_ref().map(|g| &g.obj) != self.gateways.get(&at).map(|g| &g.obj) {
            self.dirty.gateways.insert(at);
        }
    }

    fn set_pod(&mut self, at: Name, new: New<Pod>) {
        let space = self.spaces.entry(Arc::clone(&at.0)).or_default();
        let Some((obj, origin)) = new else {
            if let Some(w) = space.pods.remove(&at.1).and_then(|s| s.out) {
                self.dirty.gone.push(Change::WorkloadGone(Arc::clone(&w.uid)));
                // What selected it selects one less.
                self.dirty.pods.insert(at);
            }
            return;
        };
        match space.pods.get_mut(&at.1) {
            Some(slot) if slot.obj == obj && slot.origin == origin => return,
            Some(slot) => (slot.obj, slot.origin) = (obj, origin),
            None => {
                space.pods.insert(Arc::clone(&at.1), Box::new(PodSlot { obj, origin, out: None }));
            }
        }
        if !self.dirty.all {
            self.dirty.pods.insert(at);
        }
    }

    fn set_entry(&mut self, at: Name, new: New<Box<WorkloadEntry>>) {
        let space = self.spaces.entry(Arc::clone(&at.0)).or_default();
        if replace_many(&mut space.entries, &at.1, new.map(|(obj, origin)| (*obj, origin)), &mut self.dirty.gone) {
            self.dirty.entries.insert(at);
        }
    }

    fn set_policy(&mut self, (ns, name): Name, new: New<AuthorizationPolicy>) {
        let space = self.spaces.entry(Arc::clone(&ns)).or_default();
        let selector_of = |p: &AuthorizationPolicy| p.policy.is_some().then(|| p.selector.clone()).filter(|s| !s.is_empty());
        let before = space.policies.remove(&name).and_then(|s| selector_of(&s.obj));
        let after = new.as_ref().and_then(|(obj, _)| selector_of(obj));
        space.by_policy_selector.remove(&name);
        if let Some(selector) = &after {
            space.by_policy_selector.insert(&name, selector);
        }
        if let Some((obj, origin)) = new {
            space.policies.insert(Arc::clone(&name), Slot { obj, origin });
        }
        if before != after {
            let reach = (ns != self.view.root_namespace).then(|| Arc::clone(&ns));
            self.dirty.selected.extend(before.into_iter().chain(after).map(|s| (reach.clone(), s)));
        }
        self.dirty.policies.insert(PolicyKey { namespace: ns, name });
    }

    fn set_peer(&mut self, (ns, name): Name, new: New<PeerAuthentication>) {
        let space = self.spaces.entry(Arc::clone(&ns)).or_default();
        let old = space.peers.remove(&name).map(|s| s.obj);
        if let Some((obj, origin)) = new {
            let key = peer::converted_key(&ns, &name);
            space.peers.insert(Arc::clone(&name), PeerSlot { obj, origin, key });
        }
        let new = space.peers.get(&name).map(|s| &s.obj);
        self.dirty.peers = true;
        if old.as_ref() != new {
            let reach = (ns != self.view.root_namespace).then_some(ns);
            let selectors = [old.as_ref(), new].into_iter().flatten().map(|p| p.selector.clone());
            self.dirty.selected.extend(selectors.map(|s| (reach.clone(), s)));
        }
    }

    fn set_service_entry(&mut self, id: Name, new: New<Box<ServiceEntry>>) {
        let (ns, name) = id.clone();
        let new = new.map(|(obj, origin)| (*obj, origin));
        let space = self.spaces.entry(Arc::clone(&ns)).or_default();
        let old = space.service_entries.get(&name).map(|s| (s.obj.hosts.clone(), s.obj.selector.clone()));
        let fresh = new.as_ref().map(|(o, _)| (o.hosts.clone(), o.selector.clone()));
        if !replace_many(&mut space.service_entries, &name, new, &mut self.dirty.gone) {
            return;
        }
        space.by_entry_selector.remove(&name);
        if let Some((_, Some(selector))) = &fresh {
            space.by_entry_selector.insert(&name, selector);
        }
        for host in old.iter().flat_map(|(h, _)| h) {
            if let Some(set) = self.host_entries.get_mut(host) {
                set.remove(&id);
                if set.is_empty() {
                    self.host_entries.remove(host);
                }
            }
        }
        for host in fresh.iter().flat_map(|(h, _)| h) {
            self.host_entries.entry(Arc::clone(host)).or_default().insert(id.clone());
        }
        for (hosts, selector) in old.into_iter().chain(fresh) {
            if let Some(s) = selector.filter(|s| !s.is_empty()) {
                self.dirty.selected.push((Some(Arc::clone(&ns)), s));
            }
            for host in hosts {
                self.touch_host(host);
            }
        }
        self.dirty.service_entries.insert(id);
    }

    /// A host's owner may have changed: its service, and the endpoints of every ServiceEntry that names it.
    fn touch_host(&mut self, host: Arc<str>) {
        if self.dirty.all {
            return;
        }
        for id in self.host_entries.get(&host).into_iter().flatten() {
            self.dirty.service_entries.insert(id.clone());
            if let Some(s) = self.spaces.get(&id.0).and_then(|s| s.service_entries.get(&id.1))
                && let Some(selector) = s.obj.selector.clone().filter(|s| !s.is_empty())
            {
                self.dirty.selected.push((Some(Arc::clone(&id.0)), selector));
            }
        }
        self.dirty.hosts.insert(host);
    }

    fn set_service(&mut self, id: Name, new: New<Box<KubeService>>) {
        let new = new.map(|(obj, origin)| (*obj, origin));
        let (ns, name) = id;
        let host = self.pool.text(&kube::service_host(&name, &ns, &self.view.cluster_domain));
        let space = self.spaces.entry(Arc::clone(&ns)).or_default();
        let old = space.services.get(&name);
        if old.map(|s| (&s.obj, &s.origin)) == new.as_ref().map(|(o, r)| (o, r)) {
            return;
        }
        let slices: Vec<Arc<str>> = space.service_slices.get(&name).into_iter().flatten().cloned().collect();
        for slice in &slices {
            space.unindex_slice(slice, &mut self.dirty, &ns);
        }
        let old = space.services.remove(&name);
        space.by_service_selector.remove(&name);
        let mut selectors: Vec<Labels> = old.iter().map(|s| s.obj.selector.clone()).collect();
        if let Some((obj, origin)) = new {
            let key = ServiceKey { namespace: Arc::clone(&ns), hostname: Arc::clone(&host) };
            if !obj.external_name {
                space.by_service_selector.insert(&name, &obj.selector);
            }
            selectors.push(obj.selector.clone());
            space.services.insert(Arc::clone(&name), ServiceSlot { obj, origin, key });
        }
        for slice in &slices {
            space.index_slice(slice, &mut self.dirty, &ns);
            self.dirty.slices.insert((Arc::clone(&ns), Arc::clone(slice)));
        }
        let selectors = selectors.into_iter().filter(|s| !s.is_empty());
        self.dirty.selected.extend(selectors.map(|s| (Some(Arc::clone(&ns)), s)));
        self.dirty.hosts.insert(Arc::clone(&host));
        self.touch_host(host);
    }

    fn set_slice(&mut self, id: Name, new: New<EndpointSlice>) {
        let (ns, name) = id.clone();
        let space = self.spaces.entry(Arc::clone(&ns)).or_default();
        space.unindex_slice(&name, &mut self.dirty, &ns);
        if let Some(old) = space.slices.get(&name)
            && let Some(set) = space.service_slices.get_mut(&old.obj.service)
        {
            set.remove(&name);
            if set.is_empty() {
                let service = Arc::clone(&old.obj.service);
                space.service_slices.remove(&service);
            }
        }
        if replace_many(&mut space.slices, &name, new, &mut self.dirty.gone) {
            self.dirty.slices.insert(id);
        }
        if let Some(s) = space.slices.get(&name) {
            space.service_slices.entry(Arc::clone(&s.obj.service)).or_default().insert(Arc::clone(&name));
        }
        space.index_slice(&name, &mut self.dirty, &ns);
    }
}

impl Space {
    /// Whether a slice's pods count: only those of a service without selector do.
    fn slice_counts(&self, slice: &EndpointSlice) -> bool {
        self.services.get(&slice.service).is_some_and(|s| s.obj.selector.is_empty() && !s.obj.external_name)
    }
    fn index_slice(&mut self, name: &Arc<str>, dirty: &mut Dirty, ns: &Arc<str>) {
        let Some(slot) = self.slices.get(name) else { return };
        if !self.slice_counts(&slot.obj) {
            return;
        }
        for (pod, _) in &slot.obj.pods {
            self.pod_slices.entry(Arc::clone(pod)).or_default().insert(Arc::clone(name));
            dirty.pods.insert((Arc::clone(ns), Arc::clone(pod)));
        }
    }
    fn unindex_slice(&mut self, name: &Arc<str>, dirty: &mut Dirty, ns: &Arc<str>) {
        let Some(slot) = self.slices.get(name) else { return };
        for (pod, _) in &slot.obj.pods {
            if let Some(set) = self.pod_slices.get_mut(pod)
                && set.remove(name)
            {
                if set.is_empty() {
                    self.pod_slices.remove(pod);
                }
                dirty.pods.insert((Arc::clone(ns), Arc::clone(pod)));
            }
        }
    }
}

/// Puts `new` in the place of the object `name`; whether anything changed. Workloads of a removed object go.
fn replace_many<T: PartialEq>(
    map: &mut BTreeMap<Arc<str>, ManySlot<T>>,
    name: &Arc<str>,
    new: New<T>,
    gone: &mut Vec<Change>,
) -> bool {
    match (map.get_mut(name), new) {
        (Some(slot), Some((obj, origin))) => {
            if slot.obj == obj && slot.origin == origin {
                return false;
            }
            (slot.obj, slot.origin) = (obj, origin);
            true
        }
        (None, Some((obj, origin))) => {
            map.insert(Arc::clone(name), ManySlot { obj, origin, out: Vec::new() });
            true
        }
        (Some(_), None) => {
            let out = map.remove(name).map(|s| s.out).unwrap_or_default();
            gone.extend(out.into_iter().map(|w| Change::WorkloadGone(Arc::clone(&w.uid))));
            true
        }
        (None, None) => false,
    }
}
