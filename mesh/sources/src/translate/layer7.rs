//! The join of layer 7: which routes and which destination each service has, from every object that speaks of it.
//!
//! Owns the objects of layer 7 (VirtualService, DestinationRule, Gateway API routes, the Secrets and ConfigMaps they name),
//! what was made of them, and which result depends on which object, so that a change is followed by exactly the results
//! it touches. One [`RouteTable`] per service: VirtualServices first, then Gateway API rules. Readers are in
//! `virtual_service`, `destination_rule`, `gateway_api`; none of them looks at another object except through [`Join`],
//! which remembers what was asked for. Upstream: [`super::object`]. Downstream: `mesh_model::snapshot`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::defaults::MeshDefaults;
use mesh_model::l7::authorizer::Authorizers;
use mesh_model::l7::destination::Destination;
use mesh_model::l7::gateway::{GatewayKey, GatewayRoutes};
use mesh_model::l7::policy::L7Policy;
use mesh_model::l7::request_auth::RequestAuth;
use mesh_model::l7::route::{HttpMatch, HttpRoute, HttpRule, RouteTable};
use mesh_model::policy::PolicyKey;
use mesh_model::service::{Service, ServiceKey};
use mesh_model::telemetry::TelemetryRules;
use mesh_model::{Change, Origin};

use super::destination_rule::{self, DestinationRule, MeshTraffic};
use super::gateway_api::{self, GatewayApi, RouteId, Tables};
use super::object::{Body, Kind, ObjectId};
use super::pem::PemEntries;
use super::scopes::Global;
use super::targets::{self, Bindings, TargetedAuth};
use super::telemetry::{self, Exports, MeshConfig, Telemetry};
use super::traffic::Traffic;
use super::virtual_service::{self, VirtualService};
use super::{Dirty, HashMap, Name, Slot, Translator};
use crate::diagnostics::{Problem, Severity};

/// Something made here from several objects.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Output {
    /// What a Gateway API route says of a service. Before the routes of the service.
    OnService(ServiceKey, RouteId),
    /// The routes of a service.
    Routes(ServiceKey),
    /// How a service is reached.
    Destination(ServiceKey),
    /// The listeners of a Gateway, and with them all that attaches.
    Gateway(GatewayKey),
    /// Where a route stands on a Gateway. After the Gateway.
    Attached(GatewayKey, RouteId),
    /// Whether an object has any effect; makes problems only.
    Check(ObjectId),
}

/// What an output was made from, beside what is found by its own name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Need {
    /// The services of this host name.
    Host(Arc<str>),
    /// This object, there or not. Namespaces count too (their labels).
    Object(ObjectId),
    /// The ReferenceGrants of a namespace.
    Grants(Arc<str>),
    /// The DestinationRules of a service.
    Destination(ServiceKey),
}

/// What must be made again.
#[derive(Debug, Default)]
pub(super) struct Touched {
    outputs: BTreeSet<Output>,
    needs: BTreeSet<Need>,
    /// A Telemetry object, or MeshConfig.
    telemetry: bool,
    /// What MeshConfig says of all destinations.
    destinations: bool,
    /// What it says of whom objects are exported to.
    exports: bool,
    /// Hosts of VirtualServices and DestinationRules, wildcards included.
    routes_of: BTreeSet<Arc<str>>,
    destinations_of: BTreeSet<Arc<str>>,
    request_auths: BTreeSet<PolicyKey>,
}
impl Touched {
    /// One output.
    pub(super) fn output(&mut self, output: Output) {
        self.outputs.insert(output);
    }
    /// Every output that asked for this.
    pub(super) fn need(&mut self, need: Need) {
        self.needs.insert(need);
    }
}

/// The objects of layer 7.
#[derive(Debug, Default)]
pub(super) struct Objects {
    pub(super) virtual_services: BTreeMap<Name, Slot<VirtualService>>,
    /// VirtualServices by each of their hosts.
    by_host: HashMap<Arc<str>, BTreeSet<Name>>,
    pub(super) destination_rules: BTreeMap<Name, Slot<DestinationRule>>,
    /// Names of DestinationRules by namespace and host.
    rules_by_host: HashMap<Name, BTreeSet<Arc<str>>>,
    pub(super) secrets: BTreeMap<Name, Slot<PemEntries>>,
    pub(super) config_maps: BTreeMap<Name, Slot<PemEntries>>,
    pub(super) gateway_api: GatewayApi,
    request_auths: BTreeMap<PolicyKey, Arc<TargetedAuth>>,
    telemetry: BTreeMap<Name, Slot<Telemetry>>,
    mesh_config: Option<Slot<MeshConfig>>,
}

/// A Gateway in the making.
#[derive(Debug, Default)]
struct Edge {
    /// All but its routes; `None` when it does not face the outside.
    frame: Option<GatewayRoutes>,
    tables: Tables,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Layer7 {
    objects: Objects,
    touched: Touched,
    needs: HashMap<Output, Vec<Need>>,
    needed_by: HashMap<Need, BTreeSet<Output>>,
    routes_out: HashMap<ServiceKey, Arc<RouteTable>>,
    destinations_out: HashMap<ServiceKey, Arc<Destination>>,
    edges: HashMap<GatewayKey, Edge>,
    /// What Gateway API routes say of each service that has many of them.
    behind: HashMap<ServiceKey, Tables>,
    gateways_out: HashMap<GatewayKey, Arc<GatewayRoutes>>,
    policies: Bindings<L7Policy>,
    request_auths: Bindings<RequestAuth>,
    telemetry_out: TelemetryRules,
    /// Istio's root namespace.
    root: Arc<str>,
    traffic: Traffic,
    /// Of MeshConfig.
    authorizers: Arc<Authorizers>,
    defaults: Arc<MeshDefaults>,
}

impl Layer7 {
    /// Nothing yet.
    pub(super) fn new(root: Arc<str>) -> Self {
        Self {
            objects: Objects::default(),
            touched: Touched::default(),
            needs: HashMap::default(),
            needed_by: HashMap::default(),
            routes_out: HashMap::default(),
            destinations_out: HashMap::default(),
            edges: HashMap::default(),
            behind: HashMap::default(),
            gateways_out: HashMap::default(),
            policies: Bindings::default(),
            traffic: Traffic::default(),
            request_auths: Bindings::default(),
            telemetry_out: TelemetryRules::default(),
            authorizers: Arc::default(),
            defaults: Arc::default(),
            root,
        }
    }

    /// Takes an object in or forgets it.
    pub(super) fn set(&mut self, id: &ObjectId, new: Option<(Body, Arc<Origin>)>) {
        let (objects, touched) = (&mut self.objects, &mut self.touched);
        let name: Name = (Arc::clone(&id.namespace), Arc::clone(&id.name));
        match id.kind {
            Kind::VirtualService => {
                let new = match new {
                    Some((Body::VirtualService(v), origin)) => Some(Slot { obj: *v, origin }),
                    _ => None,
                };
                let old = objects.virtual_services.get(&name);
                if same_or_stand_in(old, new.as_ref(), |v| v.broken.is_some()) {
                    return;
                }
                let old_hosts = old.map(|s| s.obj.hosts.clone()).unwrap_or_default();
                let new_hosts = new.as_ref().map(|s| s.obj.hosts.clone()).unwrap_or_default();
                for host in &old_hosts {
                    forget(&mut objects.by_host, host, &name);
                }
                for host in &new_hosts {
                    objects.by_host.entry(Arc::clone(host)).or_default().insert(name.clone());
                }
                touched.routes_of.extend(old_hosts.into_iter().chain(new_hosts));
                touched.output(Output::Check(id.clone()));
                touched.need(Need::Object(id.clone()));
                put(&mut objects.virtual_services, name, new);
            }
            Kind::DestinationRule => {
                let new = match new {
                    Some((Body::DestinationRule(d), origin)) => Some(Slot { obj: *d, origin }),
                    _ => None,
                };
                let old = objects.destination_rules.get(&name);
                if same_or_stand_in(old, new.as_ref(), |d| d.broken.is_some()) {
                    return;
                }
                let old_host = old.map(|s| Arc::clone(&s.obj.host));
                let new_host = new.as_ref().map(|s| Arc::clone(&s.obj.host));
                if let Some(host) = &old_host {
                    forget(&mut objects.rules_by_host, &(Arc::clone(&name.0), Arc::clone(host)), &name.1);
                }
                if let Some(host) = &new_host {
                    let at = (Arc::clone(&name.0), Arc::clone(host));
                    objects.rules_by_host.entry(at).or_default().insert(Arc::clone(&name.1));
                }
                touched.destinations_of.extend(old_host.into_iter().chain(new_host));
                touched.output(Output::Check(id.clone()));
                put(&mut objects.destination_rules, name, new);
            }
            Kind::RequestAuthentication => {
                let key = PolicyKey { namespace: name.0, name: name.1 };
                match new {
                    Some((Body::RequestAuthentication(auth), _)) => objects.request_auths.insert(key.clone(), auth),
                    _ => objects.request_auths.remove(&key),
                };
                touched.request_auths.insert(key);
            }
            Kind::Telemetry => {
                let new = match new {
                    Some((Body::Telemetry(obj), origin)) => Some(Slot { obj: *obj, origin }),
                    _ => None,
                };
                if !same_or_stand_in(objects.telemetry.get(&name), new.as_ref(), |_| false) {
                    touched.telemetry = true;
                    put(&mut objects.telemetry, name, new);
                }
            }
            Kind::ConfigMap if *name.0 == *self.root && &*name.1 == telemetry::MESH_CONFIG => {
                let new = match new {
                    Some((Body::MeshConfig(obj), origin)) => Some(Slot { obj: *obj, origin }),
                    _ => None,
                };
                if !same_or_stand_in(objects.mesh_config.as_ref(), new.as_ref(), |_| false) {
                    let traffic =
                        |slot: &Option<Slot<MeshConfig>>| slot.as_ref().map(|s| s.obj.traffic.clone()).unwrap_or_default();
                    touched.telemetry = true;
                    let exports =
                        |slot: &Option<Slot<MeshConfig>>| slot.as_ref().map(|s| s.obj.exports.clone()).unwrap_or_default();
                    touched.destinations |= traffic(&objects.mesh_config) != traffic(&new);
                    touched.exports |= exports(&objects.mesh_config) != exports(&new);
                    objects.mesh_config = new;
                }
            }
            Kind::TrafficPolicy | Kind::EnvoyFilter => {
                let new = match new {
                    Some((Body::Traffic(t), origin)) => Some(Slot { obj: *t, origin }),
                    _ => None,
                };
                self.traffic.set(id, new);
            }
            Kind::Secret | Kind::ConfigMap => {
                let map = if id.kind == Kind::Secret { &mut objects.secrets } else { &mut objects.config_maps };
                let new = match new {
                    Some((Body::Pem(obj), origin)) => Some(Slot { obj, origin }),
                    _ => None,
                };
                if map.get(&name).map(|s| &s.obj) != new.as_ref().map(|s| &s.obj) {
                    touched.need(Need::Object(id.clone()));
                }
                put(map, name, new);
            }
            _ => {
                let new = match new {
                    Some((Body::GatewayApi(obj), origin)) => Some((*obj, origin)),
                    _ => None,
                };
                objects.gateway_api.set(id, new, touched);
            }
        }
    }

    /// A service is about to be looked at: it, its waypoint, or what it is made of may have changed.
    pub(super) fn touch_service(&mut self, key: &ServiceKey) {
        self.touched.output(Output::Routes(key.clone()));
        self.touched.output(Output::Destination(key.clone()));
        self.touched.need(Need::Host(Arc::clone(&key.hostname)));
        self.policies.touch_service(key);
        self.request_auths.touch_service(key);
        self.traffic.touch_service();
    }

    /// Makes again what was touched; hands out the difference, and the problems of each output.
    pub(super) fn flush(&mut self, t: &Translator, dirty: &Dirty, changes: &mut Vec<Change>) -> Vec<(ObjectId, Vec<Problem>)> {
        let of_telemetry = self.telemetry(changes);
        let auths = if dirty.all {
            self.objects.request_auths.keys().cloned().collect()
        } else {
            std::mem::take(&mut self.touched.request_auths)
        };
        let outputs = self.outputs(t, dirty);
        self.defaults(changes);
        let policies = if dirty.all { targets::all_policies(t) } else { dirty.policies.clone() };
        let asking = if self.authorizers(changes) { targets::all_policies(t) } else { policies.clone() };
        let mut all_problems = self.policies.flush(t, dirty, policies, |key| targets::policy(t, key), changes);
        let auth = |key: &PolicyKey| self.objects.request_auths.get(key).cloned();
        all_problems.extend(self.request_auths.flush(t, dirty, auths, auth, changes));
        all_problems.extend(of_telemetry);
        all_problems.extend(self.traffic.flush(t, dirty, changes));
        all_problems.extend(asking.iter().map(|key| targets::unasked(t, key, &self.authorizers)));
        let mut turned: BTreeSet<GatewayKey> = BTreeSet::new();
        for output in outputs {
            let mut join = Join::new(t, &self.objects);
            match &output {
                Output::OnService(key, route) => {
                    gateway_api::place_on_service(&mut join, key, route, self.behind.entry(key.clone()).or_default());
                }
                Output::Routes(key) => {
                    let mut tables = self.behind.remove(key).unwrap_or_default();
                    let new = join.routes(key, &mut tables).map(Arc::new);
                    if tables.are_many() {
                        self.behind.insert(key.clone(), tables);
                    }
                    replace(&mut self.routes_out, key, new, changes, |t| Change::Routes(key.clone(), t), Change::RoutesGone);
                }
                Output::Destination(key) => {
                    let new = join.destination(key).map(Arc::new);
                    replace(&mut self.destinations_out, key, new, changes, Change::Destination, Change::DestinationGone);
                }
                Output::Gateway(key) => {
                    self.edges.entry(key.clone()).or_default().frame = gateway_api::frame(&mut join, key);
                    turned.insert(key.clone());
                }
                Output::Attached(key, route) => {
                    let edge = self.edges.entry(key.clone()).or_default();
                    gateway_api::place(&mut join, key, route, &mut edge.tables);
                    turned.insert(key.clone());
                }
                Output::Check(id) => join.check(id),
            }
            let Join { needs, mut problems, .. } = join;
            // Rules made for several ports complain alike.
            problems.sort();
            problems.dedup();
            all_problems.push((output.problems_id(), problems));
            self.remember(output, needs);
        }
        for key in turned {
            self.gateway(key, changes);
        }
        all_problems
    }

    /// Hands out a Gateway something of which was made again.
    fn gateway(&mut self, key: GatewayKey, changes: &mut Vec<Change>) {
        let Some(Edge { frame, tables }) = self.edges.get_mut(&key) else { return };
        let Some(frame) = frame else {
            if self.gateways_out.remove(&key).is_some() {
                changes.push(Change::GatewayGone(key.clone()));
            }
            if tables.is_empty() {
                self.edges.remove(&key);
            }
            return;
        };
        if let Some(new) = gateway_api::fill(frame, tables, self.gateways_out.get(&key).map(|old| &**old)) {
            let new = Arc::new(new);
            changes.push(Change::Gateway(Arc::clone(&new)));
            self.gateways_out.insert(key, new);
        }
    }

    /// What MeshConfig says of services that are for other networks.
    pub(super) fn scopes(&self) -> Option<&Arc<[Global]>> {
        self.objects.mesh_config.as_ref()?.obj.scopes.as_ref()
    }

    /// Hands out the external authorizers, when they are others than before.
    fn authorizers(&mut self, changes: &mut Vec<Change>) -> bool {
        let now = self.objects.mesh_config.as_ref().map(|m| Arc::clone(&m.obj.authorizers)).unwrap_or_default();
        let others = self.authorizers != now;
        if others {
            changes.push(Change::Authorizers(Arc::clone(&now)));
            self.authorizers = now;
        }
        others
    }

    /// Hands out what counts for all requests, when it is otherwise than before.
    fn defaults(&mut self, changes: &mut Vec<Change>) {
        let now = self.objects.mesh_config.as_ref().map(|m| Arc::clone(&m.obj.defaults)).unwrap_or_default();
        if self.defaults != now {
            changes.push(Change::Defaults(Arc::clone(&now)));
            self.defaults = now;
        }
    }

    /// What is told about traffic, if something of it was touched. The objects are few: all are merged again.
    fn telemetry(&mut self, changes: &mut Vec<Change>) -> Option<(ObjectId, Vec<Problem>)> {
        if !std::mem::take(&mut self.touched.telemetry) {
            return None;
        }
        let objects = &self.objects;
        let (rules, problems) = telemetry::rules(&objects.telemetry, objects.mesh_config.as_ref(), &self.root);
        if self.telemetry_out != rules {
            self.telemetry_out = rules;
            changes.push(Change::Telemetry(Arc::new(self.telemetry_out.clone())));
        }
        Some((ObjectId { kind: Kind::Telemetry, namespace: Arc::clone(&self.root), name: "merged:all".into() }, problems))
    }

    /// A join of nothing in particular.
    #[cfg(test)]
    pub(super) fn join<'a>(&'a self, t: &'a Translator) -> Join<'a> {
        Join::new(t, &self.objects)
    }

    /// Everything to be made again, in a fixed order.
    fn outputs(&mut self, t: &Translator, dirty: &Dirty) -> BTreeSet<Output> {
        let mut outputs = self.marked(t, dirty);
        self.add_routes_of_services(&mut outputs);
        let gateways = outputs.iter().filter_map(|o| if let Output::Gateway(key) = o { Some(key) } else { None });
        let attached = |key: &GatewayKey| {
            let before = self.edges.get(key).into_iter().flat_map(|edge| edge.tables.routes());
            let now = self.objects.gateway_api.of_gateway(key);
            before.chain(now).map(|id| Output::Attached(key.clone(), id.clone())).collect::<Vec<_>>()
        };
        let attached: Vec<Output> = gateways.flat_map(attached).collect();
        outputs.extend(attached);
        outputs
    }
    /// With the routes of a service those that are on it, and with any of these its routes. One is enough where the others are
    /// kept.
    fn add_routes_of_services(&self, outputs: &mut BTreeSet<Output>) {
        let whole = |output: &Output| match output {
            Output::Routes(key) => Some(key.clone()),
            Output::OnService(key, _) if !self.behind.contains_key(key) => Some(key.clone()),
            _ => None,
        };
        let whole: BTreeSet<ServiceKey> = outputs.iter().filter_map(whole).collect();
        for key in whole {
            let before = self.behind.get(&key).into_iter().flat_map(Tables::routes);
            let all = before.chain(self.objects.gateway_api.of_service(&key));
            outputs.extend(all.map(|id| Output::OnService(key.clone(), id.clone())));
        }
        let of_route = |output: &Output| match output {
            Output::OnService(key, _) => Some(Output::Routes(key.clone())),
            _ => None,
        };
        let services: Vec<Output> = outputs.iter().filter_map(of_route).collect();
        outputs.extend(services);
    }
    fn marked(&mut self, t: &Translator, dirty: &Dirty) -> BTreeSet<Output> {
        let touched = std::mem::take(&mut self.touched);
        let mut outputs = touched.outputs;
        if dirty.all || touched.exports {
            for key in t.services_out.keys() {
                outputs.insert(Output::Routes(key.clone()));
                outputs.insert(Output::Destination(key.clone()));
            }
            outputs.extend(t.gateways.keys().map(gateway_output));
            // Those too that are gone by now.
            outputs.extend(self.edges.keys().cloned().map(Output::Gateway));
            // After the first time: what was looked at before may depend on anything.
            outputs.extend(self.needs.keys().cloned());
            return outputs;
        }
        let keys_of = |pattern: &Arc<str>| -> Vec<ServiceKey> {
            if pattern.starts_with('*') {
                t.services_out.keys().filter(|k| covers(pattern, &k.hostname)).cloned().collect()
            } else {
                let namespaces = t.hosts_out.get(pattern).into_iter().flatten();
                namespaces.map(|ns| ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(pattern) }).collect()
            }
        };
        if touched.destinations {
            outputs.extend(self.destinations_out.keys().cloned().map(Output::Destination));
        }
        outputs.extend(touched.routes_of.iter().flat_map(keys_of).map(Output::Routes));
        let mut needs = touched.needs;
        for key in touched.destinations_of.iter().flat_map(keys_of) {
            needs.insert(Need::Destination(key.clone()));
            outputs.insert(Output::Destination(key));
        }
        outputs.extend(dirty.gateways.iter().map(gateway_output));
        let namespaces = dirty
            .namespaces
            .iter()
            .map(|n| Need::Object(ObjectId { kind: Kind::Namespace, namespace: Arc::clone(&t.empty), name: Arc::clone(n) }));
        let entries = dirty.service_entries.iter().map(gateway_api::entry_need);
        for need in needs.into_iter().chain(namespaces).chain(entries) {
            outputs.extend(self.needed_by.get(&need).into_iter().flatten().cloned());
        }
        outputs
    }

    fn remember(&mut self, output: Output, needs: BTreeSet<Need>) {
        for need in self.needs.remove(&output).into_iter().flatten().filter(|n| !needs.contains(n)) {
            forget(&mut self.needed_by, &need, &output);
        }
        if needs.is_empty() {
            return;
        }
        for need in &needs {
            let set = self.needed_by.entry(need.clone()).or_default();
            if !set.contains(&output) {
                set.insert(output.clone());
            }
        }
        self.needs.insert(output, needs.into_iter().collect());
    }
}

fn gateway_output((namespace, name): &Name) -> Output {
    Output::Gateway(GatewayKey { namespace: Arc::clone(namespace), name: Arc::clone(name) })
}

impl Output {
    /// Under which name its problems are kept. Names with a colon belong to no object.
    fn problems_id(&self) -> ObjectId {
        let of = |kind, namespace: &Arc<str>, what: &str, name: &str| ObjectId {
            kind,
            namespace: Arc::clone(namespace),
            name: format!("{what}:{name}").into(),
        };
        match self {
            Self::OnService(service, (kind, namespace, name)) => {
                of(kind.of_object(), namespace, &format!("on service {service}"), name)
            }
            Self::Routes(k) => of(Kind::Service, &k.namespace, "routes", &k.hostname),
            Self::Destination(k) => of(Kind::Service, &k.namespace, "destination", &k.hostname),
            Self::Gateway(k) => of(Kind::Gateway, &k.namespace, "routes", &k.name),
            Self::Attached(gateway, (kind, namespace, name)) => of(kind.of_object(), namespace, &format!("on {gateway}"), name),
            Self::Check(id) => of(id.kind, &id.namespace, "check", &id.name),
        }
    }
}

/// Whether nothing is to be done: the objects are the same, or the new one only stands in for a good one that could not be
/// read any more.
pub(super) fn same_or_stand_in<T: PartialEq>(
    old: Option<&Slot<T>>,
    new: Option<&Slot<T>>,
    stand_in: impl Fn(&T) -> bool,
) -> bool {
    match (old, new) {
        (None, None) => true,
        (Some(old), Some(new)) => (old.obj == new.obj && old.origin == new.origin) || (stand_in(&new.obj) && !stand_in(&old.obj)),
        _ => false,
    }
}
pub(super) fn put<K: Ord, T>(map: &mut BTreeMap<K, Slot<T>>, key: K, new: Option<Slot<T>>) {
    match new {
        Some(slot) => map.insert(key, slot),
        None => map.remove(&key),
    };
}
pub(super) fn forget<K: std::hash::Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}
/// Puts what was made for `key` in its place and tells the difference.
pub(super) fn replace<K: std::hash::Hash + Eq + Clone, T: PartialEq>(
    out: &mut HashMap<K, Arc<T>>,
    key: &K,
    new: Option<Arc<T>>,
    changes: &mut Vec<Change>,
    changed: impl FnOnce(Arc<T>) -> Change,
    gone: impl FnOnce(K) -> Change,
) {
    match new {
        Some(new) if out.get(key) == Some(&new) => {}
        Some(new) => {
            out.insert(key.clone(), Arc::clone(&new));
            changes.push(changed(new));
        }
        None => {
            if out.remove(key).is_some() {
                changes.push(gone(key.clone()));
            }
        }
    }
}

/// Whether a host as written in an object (exact, `*.suffix` or `*`) speaks of the host name of a service.
pub(super) fn covers(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        // `*.x.y` is everything below `x.y`, and the wildcard service of the same name.
        Some(suffix) => host.ends_with(suffix),
        None => pattern == host,
    }
}
/// The patterns that cover a host, most specific first: itself, `*.b.c`, `*.c`, `*`.
pub(super) fn patterns(host: &str) -> impl Iterator<Item = String> {
    let below =
        host.char_indices().filter(|(_, c)| *c == '.').filter_map(|(at, _)| host.get(at..)).map(|rest| format!("*{rest}"));
    // A wildcard service is its own first pattern already.
    let own = host.to_owned();
    let wild = host.strip_prefix('*').map(str::to_owned);
    std::iter::once(own)
        .chain(below.filter(move |p| p.strip_prefix('*') != wild.as_deref()))
        .chain(std::iter::once("*".to_owned()))
}

/// The making of one output: what may be looked at, and the memory of what was.
pub(super) struct Join<'a> {
    pub(super) t: &'a Translator,
    pub(super) objects: &'a Objects,
    needs: BTreeSet<Need>,
    pub(super) problems: Vec<Problem>,
}
impl<'a> Join<'a> {
    fn new(t: &'a Translator, objects: &'a Objects) -> Self {
        Self { t, objects, needs: BTreeSet::new(), problems: Vec::new() }
    }
    /// Remembers that the output depends on something.
    pub(super) fn need(&mut self, need: Need) {
        self.needs.insert(need);
    }
    /// The service a host name means to an object of namespace `from`: its own namespace's, then the canonical one, then
    /// the first by namespace.
    pub(super) fn find_service(&mut self, host: &Arc<str>, from: &str) -> Option<&'a Arc<Service>> {
        self.need(Need::Host(Arc::clone(host)));
        let t = self.t;
        let all = || {
            let namespaces = t.hosts_out.get(host).into_iter().flatten();
            namespaces.filter_map(|ns| t.services_out.get(&ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(host) }))
        };
        all().find(|s| *s.key.namespace == *from).or_else(|| all().find(|s| s.canonical)).or_else(|| all().next())
    }
    /// What MeshConfig says of all destinations. Not remembered: they are all made again when it says something else.
    pub(super) fn mesh_traffic(&self) -> Option<&'a MeshTraffic> {
        self.objects.mesh_config.as_ref().map(|config| &config.obj.traffic)
    }
    /// Whom objects are exported to that do not say it. Not remembered: everything is made again when it says something else.
    pub(super) fn default_exports(&self) -> &'a Exports {
        static ALL: Exports = Exports { virtual_services: Vec::new(), destination_rules: Vec::new() };
        self.objects.mesh_config.as_ref().map_or(&ALL, |config| &config.obj.exports)
    }
    /// The PEM entries of a Secret.
    pub(super) fn find_secret(&mut self, namespace: &str, name: &str) -> Option<&'a PemEntries> {
        self.pem(Kind::Secret, &self.objects.secrets, namespace, name)
    }
    /// The PEM entries of a ConfigMap.
    pub(super) fn find_config_map(&mut self, namespace: &str, name: &str) -> Option<&'a PemEntries> {
        self.pem(Kind::ConfigMap, &self.objects.config_maps, namespace, name)
    }
    fn pem(
        &mut self,
        kind: Kind,
        of_kind: &'a BTreeMap<Name, Slot<PemEntries>>,
        namespace: &str,
        name: &str,
    ) -> Option<&'a PemEntries> {
        let at: Name = (namespace.into(), name.into());
        let found = of_kind.get(&at).map(|s| &s.obj);
        self.need(Need::Object(ObjectId { kind, namespace: at.0, name: at.1 }));
        found
    }
    /// The VirtualServices with a host that covers `host`, in no order.
    pub(super) fn virtual_services_of(&self, host: &str) -> Vec<(&'a Name, &'a Slot<VirtualService>)> {
        let objects = self.objects;
        let names: BTreeSet<&Name> = patterns(host).filter_map(|p| objects.by_host.get(p.as_str())).flatten().collect();
        names.into_iter().filter_map(|n| objects.virtual_services.get_key_value(n)).collect()
    }
    /// The DestinationRules of a namespace for exactly this host as written.
    pub(super) fn destination_rules_of(&self, namespace: &Arc<str>, pattern: &str) -> Vec<(&'a Name, &'a Slot<DestinationRule>)> {
        let objects = self.objects;
        let at: Name = (Arc::clone(namespace), pattern.into());
        let names = objects.rules_by_host.get(&at).into_iter().flatten();
        names.filter_map(|n| objects.destination_rules.get_key_value(&(Arc::clone(namespace), Arc::clone(n)))).collect()
    }
    /// Tells an operator something about an object.
    pub(super) fn complain(
        &mut self,
        severity: Severity,
        (origin, line): (&Origin, u32),
        field: &str,
        message: String,
        fix: &str,
        code: &'static str,
    ) {
        let mut origin = origin.clone();
        if line != 0 {
            origin.line = line;
        }
        let (field, message, fix) = (field.into(), message.into(), fix.into());
        self.problems.push(Problem { severity, origin, field, message, fix, code: Some(code) });
    }

    /// The routes of a service: VirtualServices, then the Gateway API.
    fn routes(&mut self, key: &ServiceKey, tables: &mut Tables) -> Option<RouteTable> {
        let service = self.t.services_out.get(key)?;
        let mut table = RouteTable::default();
        virtual_service::add(self, service, &mut table);
        gateway_api::add(self, service, tables, &mut table);
        if table.origins.is_empty() {
            return None;
        }
        add_untouched_ports(service, &mut table);
        Some(table.indexed())
    }
    /// What is said about reaching a service: DestinationRules, then where those say nothing BackendTLSPolicies and
    /// XBackendTrafficPolicies.
    fn destination(&mut self, key: &ServiceKey) -> Option<Destination> {
        let service = self.t.services_out.get(key)?;
        let tls = gateway_api::backend_tls(self, service);
        let traffic = gateway_api::backend_traffic(self, service);
        destination_rule::build(self, service, &tls, &traffic)
    }
    fn check(&mut self, id: &ObjectId) {
        let name: Name = (Arc::clone(&id.namespace), Arc::clone(&id.name));
        match id.kind {
            Kind::VirtualService => virtual_service::check(self, &name),
            Kind::DestinationRule => destination_rule::check(self, &name),
            _ => gateway_api::check(self, id),
        }
    }
}

/// A port that no rule can ever match is not routed at all: its requests go to the service itself, as without routes.
/// (A 404 is for requests of a port that has rules.)
fn add_untouched_ports(service: &Service, table: &mut RouteTable) {
    if table.http.is_empty() {
        return;
    }
    for port in &service.ports {
        if table.http.iter().all(|r| r.matches.port.is_some_and(|p| p != port.port)) {
            table.http.push(HttpRule {
                matches: HttpMatch { port: Some(port.port), ..HttpMatch::default() }.into(),
                route: Arc::new(HttpRoute::plain(&service.key, port.port)),
            });
        }
    }
}
