//! Kubernetes, Istio and Gateway API objects → changes of the model (waypoint §1.2 to §1.8).
//!
//! Owns the join: which services a pod backs, which policies bind it, which waypoint stands in front of it. Objects go
//! in one by one ([`Translator::upsert`], [`Translator::remove`]); [`Translator::flush`] recomputes what they touch
//! and hands out the difference. The outcome depends only on the set of objects held, never on the order they came
//! in. Departs from Istio where Istio fails open: a declared waypoint that is missing or refuses the object is an
//! error of that object, malformed policies deny, `trustDomains` is enforced.
//! Pure: no clock, no I/O. Upstream: [`crate::files`], [`crate::kubernetes`]. Downstream: [`crate::publisher`].

mod authorization;
mod authorizers;
mod build;
pub(crate) mod conflict;
mod destination_rule;
mod envoy_filter;
mod gateway_api;
mod http_text;
mod intern;
mod istio;
mod kube;
mod layer7;
mod networks;
mod object;
mod peer;
mod pem;
pub(crate) mod read;
mod request_auth;
mod request_policy;
mod scopes;
mod selector;
mod take;
mod targets;
mod telemetry;
mod told;
mod traffic;
mod traffic_policy;
mod virtual_service;
mod waypoint;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::policy::{Policy, PolicyKey};
use mesh_model::service::{Service, ServiceKey};
use mesh_model::snapshot::Viewpoint;
use mesh_model::workload::{GatewayRef, Locality, Workload};
use mesh_model::{Change, Origin};

pub use intern::{Interner, Labels};
pub use object::{Body, Kind, Object, ObjectId, Reader};
pub use peer::STATIC_STRICT;
pub(crate) use peer::at_most;
pub(crate) use telemetry::MESH_CONFIG;

use crate::diagnostics::Problem;
use layer7::{Layer7, replace};
use object::{
    AuthorizationPolicy, EndpointSlice, Gateway, GatewayClass, KubeService, Mode, Namespace, PeerAuthentication, Pod,
    ServiceEntry, WorkloadEntry,
};
use selector::SelectorIndex;
use told::Told;

type HashMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
type HashSet<K> = std::collections::HashSet<K, foldhash::fast::RandomState>;

/// Settings of the translation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Namespaces whose pods are never enrolled by label. The root namespace always is one of them.
    pub excluded_namespaces: Vec<String>,
    /// Whether routes, destinations and gateways are translated too: for waypoints and gateways. Without, their kinds are
    /// accepted and ignored, and cost nothing.
    pub layer7: bool,
    /// Whether a control plane tells the services, workloads and policies of layer 4 ([`Translator::adopt`]): of the objects
    /// counts the rest, and what it does not tell (labels, and where something was written).
    pub told: bool,
    /// Whether pods that have no address yet are workloads too.
    pub unaddressed: bool,
}
impl Default for Settings {
    fn default() -> Self {
        Self { excluded_namespaces: vec!["kube-system".into()], layer7: false, told: false, unaddressed: false }
    }
}

/// An object and where it came from.
#[derive(Debug)]
struct Slot<T> {
    obj: T,
    origin: Arc<Origin>,
}
#[derive(Debug)]
struct PodSlot {
    obj: Pod,
    origin: Arc<Origin>,
    out: Option<Arc<Workload>>,
}
#[derive(Debug)]
struct ServiceSlot {
    obj: KubeService,
    origin: Arc<Origin>,
    key: ServiceKey,
}
/// An object that becomes several workloads.
#[derive(Debug)]
struct ManySlot<T> {
    obj: T,
    origin: Arc<Origin>,
    out: Vec<Arc<Workload>>,
}
#[derive(Debug)]
struct PeerSlot {
    obj: PeerAuthentication,
    origin: Arc<Origin>,
    key: PolicyKey,
}

/// All objects of one namespace.
#[derive(Debug, Default)]
struct Space {
    meta: Option<Slot<Namespace>>,
    /// Boxed: tree nodes are a third empty, and there are many pods.
    pods: BTreeMap<Arc<str>, Box<PodSlot>>,
    services: BTreeMap<Arc<str>, ServiceSlot>,
    slices: BTreeMap<Arc<str>, ManySlot<EndpointSlice>>,
    entries: BTreeMap<Arc<str>, ManySlot<WorkloadEntry>>,
    service_entries: BTreeMap<Arc<str>, ManySlot<ServiceEntry>>,
    policies: BTreeMap<Arc<str>, Slot<AuthorizationPolicy>>,
    peers: BTreeMap<Arc<str>, PeerSlot>,
    unreadable: BTreeMap<Arc<str>, Arc<Policy>>,
    by_service_selector: SelectorIndex,
    by_entry_selector: SelectorIndex,
    by_policy_selector: SelectorIndex,
    /// Slices by their service.
    service_slices: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Slices of services without selector, by the pods they point at.
    pod_slices: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
}

type Name = (Arc<str>, Arc<str>);

/// What must be looked at again.
#[derive(Debug, Default)]
struct Dirty {
    all: bool,
    namespaces: BTreeSet<Arc<str>>,
    pods: BTreeSet<Name>,
    slices: BTreeSet<Name>,
    entries: BTreeSet<Name>,
    service_entries: BTreeSet<Name>,
    hosts: BTreeSet<Arc<str>>,
    /// Everything with labels this selector selects; in one namespace, or in all.
    selected: Vec<(Option<Arc<str>>, Labels)>,
    nodes: BTreeSet<Arc<str>>,
    gateways: BTreeSet<Name>,
    policies: BTreeSet<PolicyKey>,
    peers: bool,
    /// Workloads of objects that went.
    gone: Vec<Change>,
    /// Services a control plane told.
    told: BTreeSet<ServiceKey>,
}

/// The translator; see the module.
#[derive(Debug)]
pub struct Translator {
    view: Viewpoint,
    /// Whether we were told our network, which then no label changes.
    has_network: bool,
    excluded: HashSet<Arc<str>>,
    unaddressed: bool,
    pool: Interner,
    spaces: BTreeMap<Arc<str>, Space>,
    nodes: HashMap<Arc<str>, Locality>,
    classes: BTreeMap<Arc<str>, GatewayClass>,
    gateways: BTreeMap<Name, Slot<Gateway>>,
    /// Gateways of other networks, by network.
    networks: BTreeMap<Arc<str>, GatewayRef>,
    /// Who ends the tunnels to them, by uid.
    networks_out: BTreeMap<Arc<str>, Arc<Workload>>,
    /// Those networks that have several gateways, each a service of them.
    network_services_out: BTreeMap<ServiceKey, Arc<Service>>,
    /// Which services are for other networks, where MeshConfig says so.
    scopes: Option<Arc<[scopes::Global]>>,
    /// ServiceEntries by host.
    host_entries: HashMap<Arc<str>, BTreeSet<Name>>,
    services_out: HashMap<ServiceKey, Arc<Service>>,
    /// Namespaces in which a host was handed out.
    hosts_out: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    policies_out: HashMap<PolicyKey, Arc<Policy>>,
    peers_out: BTreeMap<PolicyKey, Arc<Policy>>,
    own_locality: Locality,
    strict_key: PolicyKey,
    default_account: Arc<str>,
    latest: Arc<str>,
    empty: Arc<str>,
    pod_type: Arc<str>,
    dirty: Dirty,
    problems: BTreeMap<ObjectId, Vec<Problem>>,
    /// Those of some object are not as they were.
    complained: bool,
    /// Everything about routes and destinations; `None` where nobody asks for it.
    layer7: Option<Box<Layer7>>,
    /// What a control plane told, where one does.
    told: Option<Box<Told>>,
}

impl Translator {
    /// An empty translator for one viewpoint.
    pub fn new(view: Viewpoint, settings: &Settings) -> Self {
        let mut excluded: HashSet<Arc<str>> = settings.excluded_namespaces.iter().map(|n| n.as_str().into()).collect();
        excluded.insert(Arc::clone(&view.root_namespace));
        Self {
            strict_key: PolicyKey::new(&view.root_namespace, STATIC_STRICT),
            own_locality: view.locality.clone(),
            has_network: !view.network.as_str().is_empty(),
            excluded,
            unaddressed: settings.unaddressed,
            pool: Interner::default(),
            spaces: BTreeMap::new(),
            nodes: HashMap::default(),
            classes: BTreeMap::new(),
            gateways: BTreeMap::new(),
            networks: BTreeMap::new(),
            networks_out: BTreeMap::new(),
            network_services_out: BTreeMap::new(),
            scopes: None,
            host_entries: HashMap::default(),
            services_out: HashMap::default(),
            hosts_out: HashMap::default(),
            policies_out: HashMap::default(),
            peers_out: BTreeMap::new(),
            default_account: "default".into(),
            latest: "latest".into(),
            empty: "".into(),
            pod_type: "pod".into(),
            // The first flush looks at everything once instead of marking each object.
            dirty: Dirty { all: true, ..Dirty::default() },
            problems: BTreeMap::new(),
            complained: false,
            layer7: settings.layer7.then(|| Box::new(Layer7::new(Arc::clone(&view.root_namespace)))),
            told: settings.told.then(Box::default),
            view,
        }
    }

    /// A reader that shares this translator's text.
    pub fn reader(&mut self, place: Arc<str>) -> Reader<'_> {
        let root = Arc::clone(&self.view.root_namespace);
        let domain = Arc::clone(&self.view.cluster_domain);
        Reader::new(&mut self.pool, place, root, domain, self.layer7.is_some())
    }

    /// Problems between objects (a missing waypoint, a shadowed ServiceEntry) as of the last flush.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten()
    }
    /// Whether they are others than when this was last asked.
    pub fn has_new_problems(&mut self) -> bool {
        std::mem::take(&mut self.complained)
    }

    /// Takes an object in, or replaces the one of the same id. What stands in for an object that could not be read
    /// ([`Object::is_stand_in`]) does not replace a good one: that stays in force until it is corrected or removed.
    pub fn upsert(&mut self, object: Object) {
        self.set(&object.id, Some((object.body, object.origin)));
    }

    /// Forgets an object; unknown ones are no error.
    pub fn remove(&mut self, id: &ObjectId) {
        self.set(id, None);
        self.complained |= self.problems.remove(id).is_some();
    }

    /// Takes in what a control plane tells. Only with [`Settings::told`]; its word then replaces what the objects say.
    pub fn adopt(&mut self, changes: Vec<Change>) {
        if let Some(told) = &mut self.told {
            told.take(changes, &mut self.dirty.told);
        }
    }

    /// The changes since the last flush. Nothing is lost when it is called rarely, nothing repeated when often.
    pub fn flush(&mut self) -> Vec<Change> {
        let mut dirty = std::mem::take(&mut self.dirty);
        let mut pool = std::mem::take(&mut self.pool);
        let mut changes = std::mem::take(&mut dirty.gone);
        self.follow_network(&mut dirty, &mut changes);
        self.flush_networks(&mut dirty, &mut changes);
        self.flush_scopes(&mut dirty);
        self.spread(&mut dirty);
        self.flush_policies(&dirty, &mut changes);
        self.flush_services(&dirty, &mut changes);
        self.flush_workloads(&dirty, &mut pool, &mut changes);
        if let Some(told) = &mut self.told {
            changes = told.join(changes);
        }
        self.flush_layer7(&dirty, &mut changes);
        if dirty.all || !dirty.gateways.is_empty() || !dirty.namespaces.is_empty() {
            self.check_namespaces();
        }
        let own = self.nodes.get(&self.view.node).filter(|_| !self.view.node.is_empty());
        let own = own.cloned().unwrap_or_else(|| self.view.locality.clone());
        if own != self.own_locality && self.told.is_none() {
            self.own_locality = own.clone();
            changes.push(Change::OwnLocality(own));
        }
        self.spaces.retain(|_, s| !s.is_empty());
        pool.prune();
        self.pool = pool;
        changes
    }

    /// Turns marks on selectors, nodes and gateways into marks on objects.
    fn spread(&self, dirty: &mut Dirty) {
        if dirty.all {
            return;
        }
        for ns in std::mem::take(&mut dirty.namespaces) {
            if let Some(space) = self.spaces.get(&ns) {
                mark_space(&ns, space, dirty);
            }
            dirty.namespaces.insert(ns);
        }
        if !dirty.nodes.is_empty() {
            for (ns, space) in &self.spaces {
                let pods = space.pods.iter().filter(|(_, p)| dirty.nodes.contains(&p.obj.node));
                dirty.pods.extend(pods.map(|(n, _)| (Arc::clone(ns), Arc::clone(n))));
            }
        }
        let selected = std::mem::take(&mut dirty.selected);
        if !selected.is_empty() {
            for (ns, space) in &self.spaces {
                let (mut index, mut everything, mut any) = (SelectorIndex::default(), false, false);
                for (i, (_, s)) in selected.iter().enumerate().filter(|(_, (n, _))| n.as_ref().is_none_or(|n| n == ns)) {
                    any = true;
                    everything |= s.is_empty();
                    index.insert(&i.to_string().into(), s);
                }
                if !any {
                    continue;
                }
                let hit = |l: &Labels| everything || !index.selecting(l).is_empty();
                let id = |n: &Arc<str>| (Arc::clone(ns), Arc::clone(n));
                dirty.pods.extend(space.pods.iter().filter(|(_, p)| hit(&p.obj.labels)).map(|(n, _)| id(n)));
                dirty.entries.extend(space.entries.iter().filter(|(_, e)| hit(&e.obj.labels)).map(|(n, _)| id(n)));
                dirty
                    .service_entries
                    .extend(space.service_entries.iter().filter(|(_, e)| hit(&e.obj.labels)).map(|(n, _)| id(n)));
            }
        }
        if !dirty.gateways.is_empty() {
            self.spread_gateways(dirty);
        }
    }

    fn flush_policies(&mut self, dirty: &Dirty, changes: &mut Vec<Change>) {
        let keys: Vec<PolicyKey> = if dirty.all {
            let here = self.spaces.iter().flat_map(|(ns, s)| {
                s.policies.keys().chain(s.unreadable.keys()).map(|n| PolicyKey { namespace: Arc::clone(ns), name: Arc::clone(n) })
            });
            let all: BTreeSet<PolicyKey> =
                here.chain(self.policies_out.keys().cloned()).chain(dirty.policies.iter().cloned()).collect();
            all.into_iter().collect()
        } else {
            dirty.policies.iter().cloned().collect()
        };
        for key in keys {
            let space = self.spaces.get(&key.namespace);
            let new = space.and_then(|s| {
                s.unreadable.get(&key.name).or_else(|| s.policies.get(&key.name).and_then(|p| p.obj.policy.as_ref()))
            });
            replace(&mut self.policies_out, &key, new.cloned(), changes, Change::Policy, Change::PolicyGone);
        }
        if dirty.peers || dirty.all {
            let want = self.peer_policies();
            for (key, p) in &want {
                if self.peers_out.get(key) != Some(p) {
                    changes.push(Change::Policy(Arc::clone(p)));
                }
            }
            for key in self.peers_out.keys().filter(|k| !want.contains_key(*k)) {
                changes.push(Change::PolicyGone(key.clone()));
            }
            self.peers_out = want;
        }
    }

    /// The policies all PeerAuthentications together ask for.
    fn peer_policies(&self) -> BTreeMap<PolicyKey, Arc<Policy>> {
        let mut want = BTreeMap::new();
        for (ns, space) in &self.spaces {
            for slot in space.peers.values() {
                want.entry(self.strict_key.clone()).or_insert_with(|| peer::static_strict(&self.view.root_namespace));
                if *ns == self.view.root_namespace || slot.obj.selector.is_empty() {
                    continue;
                }
                let effect = peer::effect(&slot.obj, self.inherited_mode(ns));
                if let Some(p) = peer::converted(slot.key.clone(), &effect, &slot.origin) {
                    want.insert(slot.key.clone(), p);
                }
            }
        }
        want
    }

    /// Mode of a namespace's workloads that no selector covers.
    fn inherited_mode(&self, ns: &str) -> Mode {
        let level = |ns: &str| {
            let peers = self.spaces.get(ns).into_iter().flat_map(|s| s.peers.iter());
            oldest(peers.filter(|(_, p)| p.obj.selector.is_empty())).map_or(Mode::Unset, |p| p.obj.mode)
        };
        match level(ns) {
            Mode::Unset => match level(&self.view.root_namespace) {
                Mode::Unset => Mode::Permissive,
                m => m,
            },
            m => m,
        }
    }

    /// The PeerAuthentication policy that binds a workload.
    fn peer_policy(&self, ns: &str, labels: &Labels) -> Option<PolicyKey> {
        if self.peers_out.is_empty() {
            return None;
        }
        let root = &self.view.root_namespace;
        let here = || self.spaces.get(ns).into_iter().flat_map(|s| s.peers.iter());
        let in_root = self.spaces.get(root).into_iter().flat_map(|s| s.peers.iter());
        // The empty selector selects all, so this covers whole namespaces and the mesh too.
        if here().chain(in_root).any(|(_, p)| p.obj.forced && p.obj.selector.select(labels)) {
            return Some(self.strict_key.clone());
        }
        let own = if ns == &**root {
            None
        } else {
            oldest(here().filter(|(_, p)| !p.obj.selector.is_empty() && p.obj.selector.select(labels)))
        };
        let inherited = self.inherited_mode(ns);
        let effect = match own {
            Some(p) => peer::effect(&p.obj, inherited),
            None if inherited == Mode::Strict => peer::Effect::Strict,
            None => peer::Effect::Nothing,
        };
        match effect {
            peer::Effect::Nothing => None,
            peer::Effect::Strict => Some(self.strict_key.clone()),
            peer::Effect::StrictExcept(_) | peer::Effect::StrictOn(_) => own.map(|p| p.key.clone()),
        }
    }

    fn flush_services(&mut self, dirty: &Dirty, changes: &mut Vec<Change>) {
        let keys: BTreeSet<ServiceKey> = if dirty.all {
            let mut keys: BTreeSet<ServiceKey> = self.services_out.keys().cloned().collect();
            for space in self.spaces.values() {
                keys.extend(space.services.values().map(|s| s.key.clone()));
            }
            for (host, ids) in &self.host_entries {
                keys.extend(ids.iter().map(|(ns, _)| ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(host) }));
            }
            keys.extend(dirty.told.iter().cloned());
            keys
        } else {
            let mut keys = dirty.told.clone();
            for host in &dirty.hosts {
                let mut add = |ns: &Arc<str>| {
                    keys.insert(ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(host) });
                };
                self.host_entries.get(host).into_iter().flatten().for_each(|(ns, _)| add(ns));
                if let Some((ns, _)) = self.kube_name(host)
                    && let Some((ns, _)) = self.spaces.get_key_value(ns)
                {
                    add(ns);
                }
                self.hosts_out.get(host).into_iter().flatten().for_each(add);
            }
            keys
        };
        for key in keys {
            let (own, id, problems) = self.build_service(&key);
            self.note_problems(id, problems);
            let new = if let Some(told) = &self.told { told.service(&key, own.as_ref()) } else { own };
            if let Some(layer7) = &mut self.layer7 {
                layer7.touch_service(&key);
            }
            match new {
                Some(s) => {
                    if self.services_out.get(&key).is_none_or(|old| **old != s) {
                        let s = Arc::new(s);
                        changes.push(Change::Service(Arc::clone(&s)));
                        self.hosts_out.entry(Arc::clone(&key.hostname)).or_default().insert(Arc::clone(&key.namespace));
                        self.services_out.insert(key, s);
                    }
                }
                None => {
                    if self.services_out.remove(&key).is_some() {
                        if let Some(set) = self.hosts_out.get_mut(&key.hostname) {
                            set.remove(&key.namespace);
                            if set.is_empty() {
                                self.hosts_out.remove(&key.hostname);
                            }
                        }
                        changes.push(Change::ServiceGone(key));
                    }
                }
            }
        }
    }

    fn flush_workloads(&mut self, dirty: &Dirty, pool: &mut Interner, changes: &mut Vec<Change>) {
        let names: Vec<Arc<str>> = self.spaces.keys().cloned().collect();
        for ns in names {
            let pick = |set: &BTreeSet<Name>, all: Vec<Arc<str>>| -> Vec<Arc<str>> {
                if dirty.all {
                    all
                } else {
                    let from: Name = (Arc::clone(&ns), Arc::from(""));
                    set.range(from..).take_while(|(n, _)| *n == ns).map(|(_, n)| Arc::clone(n)).collect()
                }
            };
            let Some(space) = self.spaces.get(&ns) else { continue };
            let all = dirty.all;
            let pods = pick(&dirty.pods, if all { space.pods.keys().cloned().collect() } else { Vec::new() });
            let slices = pick(&dirty.slices, if all { space.slices.keys().cloned().collect() } else { Vec::new() });
            let entries = pick(&dirty.entries, if all { space.entries.keys().cloned().collect() } else { Vec::new() });
            let ses =
                pick(&dirty.service_entries, if all { space.service_entries.keys().cloned().collect() } else { Vec::new() });
            for name in pods {
                let Some(slot) = self.spaces.get(&ns).and_then(|s| s.pods.get(&name)) else { continue };
                let (new, problems) = self.build_pod(&ns, &name, slot, pool);
                let unchanged = slot.out.as_deref() == new.as_ref();
                self.note_problems(ObjectId { kind: Kind::Pod, namespace: Arc::clone(&ns), name: Arc::clone(&name) }, problems);
                if unchanged {
                    continue;
                }
                let Some(slot) = self.spaces.get_mut(&ns).and_then(|s| s.pods.get_mut(&name)) else { continue };
                let new = new.map(Arc::new);
                match (&slot.out, &new) {
                    (_, Some(w)) => changes.push(Change::Workload(Arc::clone(w))),
                    (Some(old), None) => changes.push(Change::WorkloadGone(Arc::clone(&old.uid))),
                    (None, None) => {}
                }
                slot.out = new;
            }
            for name in slices {
                let Some(slot) = self.spaces.get(&ns).and_then(|s| s.slices.get(&name)) else { continue };
                let new = self.build_slice(&ns, &name, slot, pool);
                if let Some(slot) = self.spaces.get_mut(&ns).and_then(|s| s.slices.get_mut(&name)) {
                    replace_out(&mut slot.out, new, changes);
                }
            }
            for name in entries {
                let Some(slot) = self.spaces.get(&ns).and_then(|s| s.entries.get(&name)) else { continue };
                let (new, problems) = self.build_entry(&ns, &name, slot, pool);
                self.note_problems(
                    ObjectId { kind: Kind::WorkloadEntry, namespace: Arc::clone(&ns), name: Arc::clone(&name) },
                    problems,
                );
                if let Some(slot) = self.spaces.get_mut(&ns).and_then(|s| s.entries.get_mut(&name)) {
                    replace_out(&mut slot.out, new.into_iter().collect(), changes);
                }
            }
            for name in ses {
                let Some(slot) = self.spaces.get(&ns).and_then(|s| s.service_entries.get(&name)) else { continue };
                let (new, problems) = self.build_endpoints(&ns, &name, slot, pool);
                self.note_problems(
                    ObjectId { kind: Kind::ServiceEntry, namespace: Arc::clone(&ns), name: Arc::clone(&name) },
                    problems,
                );
                if let Some(slot) = self.spaces.get_mut(&ns).and_then(|s| s.service_entries.get_mut(&name)) {
                    replace_out(&mut slot.out, new, changes);
                }
            }
        }
    }

    /// Routes and destinations; after the services, which they name.
    fn flush_layer7(&mut self, dirty: &Dirty, changes: &mut Vec<Change>) {
        let Some(mut layer7) = self.layer7.take() else { return };
        for (id, problems) in layer7.flush(self, dirty, changes) {
            self.note_problems(id, problems);
        }
        self.layer7 = Some(layer7);
    }

    fn note_problems(&mut self, id: ObjectId, problems: Vec<Problem>) {
        if problems.is_empty() {
            self.complained |= self.problems.remove(&id).is_some();
        } else {
            self.complained |= self.problems.get(&id) != Some(&problems);
            self.problems.insert(id, problems);
        }
    }
}

/// Istio's tie-break: the oldest wins; without a date, after those with one; then by name.
fn oldest<'a>(peers: impl Iterator<Item = (&'a Arc<str>, &'a PeerSlot)>) -> Option<&'a PeerSlot> {
    peers.min_by_key(|(name, p)| (p.obj.created.is_empty(), Arc::clone(&p.obj.created), Arc::clone(name))).map(|(_, p)| p)
}

/// Replaces the workloads of one object and tells the difference.
fn replace_out(out: &mut Vec<Arc<Workload>>, new: Vec<Workload>, changes: &mut Vec<Change>) {
    let mut old: HashMap<Arc<str>, Arc<Workload>> = out.drain(..).map(|w| (Arc::clone(&w.uid), w)).collect();
    for w in new {
        match old.remove(&w.uid) {
            Some(have) if *have == w => out.push(have),
            _ => {
                let w = Arc::new(w);
                changes.push(Change::Workload(Arc::clone(&w)));
                out.push(w);
            }
        }
    }
    let mut left: Vec<Arc<str>> = old.into_keys().collect();
    left.sort();
    changes.extend(left.into_iter().map(Change::WorkloadGone));
}

fn mark_space(ns: &Arc<str>, space: &Space, dirty: &mut Dirty) {
    let id = |n: &Arc<str>| (Arc::clone(ns), Arc::clone(n));
    dirty.pods.extend(space.pods.keys().map(id));
    dirty.entries.extend(space.entries.keys().map(id));
    dirty.service_entries.extend(space.service_entries.keys().map(id));
    dirty.hosts.extend(space.services.values().map(|s| Arc::clone(&s.key.hostname)));
    dirty.hosts.extend(space.service_entries.values().flat_map(|s| s.obj.hosts.iter().cloned()));
}

impl Space {
    fn is_empty(&self) -> bool {
        self.meta.is_none()
            && self.pods.is_empty()
            && self.services.is_empty()
            && self.slices.is_empty()
            && self.entries.is_empty()
            && self.service_entries.is_empty()
            && self.policies.is_empty()
            && self.peers.is_empty()
            && self.unreadable.is_empty()
    }
}

/// Reads and translates any bytes, for fuzzing: whatever they are, this returns.
pub fn fuzz_yaml(bytes: &[u8]) -> (Vec<Change>, Vec<Problem>) {
    let text = String::from_utf8_lossy(bytes);
    let mut t = Translator::new(Viewpoint::default(), &Settings { layer7: true, ..Settings::default() });
    let (mut ids, mut problems) = (Vec::new(), Vec::new());
    for doc in crate::yaml::documents(&text) {
        let mut r = t.reader("fuzz".into());
        let Ok(root) = crate::yaml::parse_whole(doc) else { continue };
        let mut objects = Vec::new();
        if Reader::is_list(&root) {
            if let Some(crate::yaml::Node { value: crate::yaml::Value::Seq(items), .. }) = root.get("items") {
                objects.extend(items.iter().filter_map(|i| r.object(i)));
            }
        } else {
            objects.extend(r.object(&root));
        }
        problems.append(&mut r.problems);
        for o in objects {
            ids.push(o.id.clone());
            t.upsert(o);
        }
    }
    let mut changes = t.flush();
    for id in ids {
        t.remove(&id);
    }
    changes.extend(t.flush());
    problems.extend(t.problems().cloned());
    (changes, problems)
}

#[cfg(test)]
mod tests;
