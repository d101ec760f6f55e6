//! One immutable version of all mesh knowledge, and the builder that makes the next one from changes.
//!
//! Owns: every lookup table. All tables are copy-on-write, so versions share what did not change and the last holder of
//! a version frees what only it held. Every table's content depends only on the set of objects, never on the order in
//! which they came (ties are broken by key), which is what makes "apply ≡ rebuild" true. Upstream: `change`.
//! Downstream: `plan`, `inbound`, `authz`, and the proxies' DNS, admin and redirection.
use crate::addr::{Network, NetworkAddr};
use crate::change::Change;
use crate::defaults::MeshDefaults;
use crate::id::{SpiffeId, TrustDomain};
use crate::known::Known;
use crate::l7::authorizer::{Authorizer, Authorizers};
use crate::l7::destination::Destination;
use crate::l7::gateway::{GatewayKey, GatewayRoutes};
use crate::l7::policy::{L7Policies, PolicyTarget, TargetRef};
use crate::l7::request_auth::RequestAuths;
use crate::l7::route::RouteTable;
use crate::l7::treatment::Treatment;
use crate::lb::{Endpoint, EndpointSet};
use crate::policy::{Policy, PolicyKey};
use crate::policy_index::PolicyIndex;
use crate::service::{Service, ServiceKey, Visibility};
use crate::shard::{Keep, Shards};
use crate::telemetry::TelemetryRules;
pub use crate::view::{MissingWaypoint, Viewpoint};
use crate::workload::{NetworkMode, PortMap, Protocol, Workload, WorkloadUid};
use hashbrown::Equivalent;
use ipnet::IpNet;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

/// Version of a snapshot: increases by one with each publish.
pub type Version = u64;

/// One version of the mesh. Cheap to clone by `Arc`; never changes.
#[derive(Clone, Debug)]
pub struct Snapshot {
    version: Version,
    view: Arc<Viewpoint>,
    workloads: Shards<WorkloadUid, Arc<Known>>,
    /// Candidates per address, best first.
    by_ip: Shards<NetworkAddr, Candidates<Known>>,
    local: Shards<WorkloadUid, Arc<Known>>,
    services: Shards<ServiceKey, Arc<Backing>>,
    /// Services per host name, sorted by key.
    by_host: Shards<Arc<str>, Candidates<Service>>,
    /// Services per virtual address, sorted by key.
    by_vip: Shards<NetworkAddr, Candidates<Service>>,
    /// Services per virtual range, sorted by key.
    by_cidr: Shards<(Network, IpNet), Candidates<Service>>,
    /// Prefix lengths in use in `by_cidr`, with their number of ranges; IPv4 first. Longest match walks these only.
    cidr_lengths: Arc<BTreeMap<(bool, Reverse<u8>), usize>>,
    /// Identities in use, by what they are made of.
    identities: Shards<Account, SharedIdentity>,
    policies: PolicyIndex,
    /// Routes of services that have any.
    routes: Shards<ServiceKey, Arc<RouteTable>>,
    /// How services are reached, where something is said about it.
    destinations: Shards<ServiceKey, Arc<Destination>>,
    /// Gateways that face the outside.
    gateways: Shards<GatewayKey, Arc<GatewayRoutes>>,
    /// Layer 7 policies by what they are bound to.
    l7_policies: Shards<PolicyTarget, Arc<L7Policies>>,
    /// RequestAuthentications by what they are bound to.
    request_auths: Shards<PolicyTarget, Arc<RequestAuths>>,
    telemetry: Arc<TelemetryRules>,
    /// What is done with every request of a target.
    treatments: Shards<PolicyTarget, Arc<Treatment>>,
    /// External authorizers by name.
    authorizers: Arc<Authorizers>,
    defaults: Arc<MeshDefaults>,
    unread: Option<Arc<str>>,
}
/// Trust domain, namespace, service account.
type Account = (TrustDomain, Arc<str>, Arc<str>);
/// The identity of one service account (empty when its parts do not make one) and how many workloads have it.
#[derive(Clone, Debug, Default)]
struct SharedIdentity {
    expect: Arc<[SpiffeId]>,
    users: usize,
}
fn account_of(w: &Workload) -> Account {
    (w.trust_domain.clone(), Arc::clone(&w.namespace), Arc::clone(&w.service_account))
}

/// A service and the workloads behind it; exists as soon as one of the two does.
#[derive(Clone, Debug, Default)]
pub struct Backing {
    service: Option<Arc<Service>>,
    endpoints: EndpointSet,
}
impl Backing {
    /// The service, once it has arrived.
    pub fn service(&self) -> Option<&Arc<Service>> {
        self.service.as_ref()
    }
    /// Its endpoints.
    pub fn endpoints(&self) -> &EndpointSet {
        &self.endpoints
    }
}

/// A few shared objects under one key, kept sorted. Almost always one, which then costs no allocation to copy.
#[derive(Debug, Default)]
enum Candidates<T> {
    #[default]
    None,
    One(Arc<T>),
    Many(Arc<[Arc<T>]>),
}
impl<T> Clone for Candidates<T> {
    fn clone(&self) -> Self {
        match self {
            Self::None => Self::None,
            Self::One(c) => Self::One(Arc::clone(c)),
            Self::Many(c) => Self::Many(Arc::clone(c)),
        }
    }
}
impl<T> Candidates<T> {
    fn all(&self) -> &[Arc<T>] {
        match self {
            Self::None => &[],
            Self::One(c) => std::slice::from_ref(c),
            Self::Many(c) => c,
        }
    }
    fn set(&mut self, mut all: Vec<Arc<T>>) -> Keep {
        *self = match (all.len(), all.pop()) {
            (_, None) => Self::None,
            (1, Some(only)) => Self::One(only),
            (_, Some(last)) => {
                all.push(last);
                Self::Many(all.into())
            }
        };
        if matches!(self, Self::None) { Keep::No } else { Keep::Yes }
    }
    fn put<O: Ord>(&mut self, item: &Arc<T>, order: impl Fn(&T) -> O) -> Keep {
        let mut all = self.all().to_vec();
        let at = all.partition_point(|c| order(c) < order(item));
        all.insert(at, Arc::clone(item));
        self.set(all)
    }
    fn take(&mut self, is: impl Fn(&T) -> bool) -> Keep {
        let all = self.all().iter().filter(|c| !is(c)).cloned().collect();
        self.set(all)
    }
}

/// A borrowed [`NetworkAddr`]: lookups on the data path make no key.
struct AddrRef<'a>(&'a Network, IpAddr);
impl Hash for AddrRef<'_> {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.0.hash(h);
        self.1.hash(h);
    }
}
impl Equivalent<NetworkAddr> for AddrRef<'_> {
    fn equivalent(&self, k: &NetworkAddr) -> bool {
        *self.0 == k.network && self.1 == k.ip
    }
}
/// A borrowed `(Network, IpNet)`.
struct RangeRef<'a>(&'a Network, IpNet);
impl Hash for RangeRef<'_> {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.0.hash(h);
        self.1.hash(h);
    }
}
impl Equivalent<(Network, IpNet)> for RangeRef<'_> {
    fn equivalent(&self, k: &(Network, IpNet)) -> bool {
        *self.0 == k.0 && self.1 == k.1
    }
}

/// Which of several workloads with one address is meant: HBONE pods, pods, other HBONE, the rest; then by uid.
fn ip_order(k: &Known) -> (u8, WorkloadUid) {
    let w = k.workload();
    let rank = match (w.uid.contains("//Pod/"), w.protocol) {
        (true, Protocol::Hbone) => 0,
        (true, Protocol::Tcp) => 1,
        (false, Protocol::Hbone) => 2,
        (false, Protocol::Tcp) => 3,
    };
    (rank, Arc::clone(&w.uid))
}
fn service_order(s: &Service) -> ServiceKey {
    s.key.clone()
}
fn visible(s: &Service, client_namespace: &str) -> bool {
    s.visibility == Visibility::Public || &*s.key.namespace == client_namespace
}
/// The client's own namespace, then canonical, then the preferred namespace, then the first by key, among visible ones.
fn choose<'a>(of: &'a Candidates<Service>, client_namespace: &str, preferred: &str) -> Option<&'a Arc<Service>> {
    let seen = || of.all().iter().filter(|s| visible(s, client_namespace));
    let of = |namespace: &str| seen().find(|s| &*s.key.namespace == namespace);
    of(client_namespace).or_else(|| seen().find(|s| s.canonical)).or_else(|| of(preferred)).or_else(|| seen().next())
}

impl Snapshot {
    /// An empty mesh, version 0.
    pub fn empty(view: Viewpoint) -> Self {
        Self {
            version: 0,
            view: Arc::new(view),
            workloads: Shards::default(),
            by_ip: Shards::default(),
            local: Shards::default(),
            services: Shards::default(),
            by_host: Shards::default(),
            by_vip: Shards::default(),
            by_cidr: Shards::default(),
            cidr_lengths: Arc::default(),
            identities: Shards::default(),
            policies: PolicyIndex::default(),
            routes: Shards::default(),
            destinations: Shards::default(),
            gateways: Shards::default(),
            l7_policies: Shards::default(),
            request_auths: Shards::default(),
            telemetry: Arc::default(),
            treatments: Shards::default(),
            authorizers: Arc::default(),
            defaults: Arc::default(),
            unread: None,
        }
    }
    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }
    /// From where it is seen.
    pub fn view(&self) -> &Viewpoint {
        &self.view
    }
    /// The next version: `changes` applied in order. `self` stays as it is; untouched shards are shared.
    /// Applying any sequence of changes equals rebuilding from the final set.
    #[must_use]
    pub fn apply(&self, changes: &[Change]) -> Snapshot {
        let mut next = self.clone();
        next.version += 1;
        for change in changes {
            match change {
                Change::Workload(w) => next.put_workload(w),
                Change::WorkloadGone(uid) => next.take_workload(uid),
                Change::Service(s) => next.put_service(s),
                Change::ServiceGone(key) => next.take_service(key),
                Change::Policy(p) => next.policies.put(p),
                Change::PolicyGone(key) => next.policies.take(key),
                Change::Routes(key, table) => {
                    let table = if table.is_indexed() { Arc::clone(table) } else { Arc::new(RouteTable::clone(table).indexed()) };
                    next.routes.insert(key.clone(), table);
                }
                Change::RoutesGone(key) => {
                    next.routes.remove(key);
                }
                Change::Destination(d) => {
                    next.destinations.insert(d.key.clone(), Arc::clone(d));
                }
                Change::DestinationGone(key) => {
                    next.destinations.remove(key);
                }
                Change::Gateway(g) => {
                    let g = if g.is_indexed() { Arc::clone(g) } else { Arc::new(GatewayRoutes::clone(g).indexed()) };
                    next.gateways.insert(g.key.clone(), g);
                }
                Change::Telemetry(rules) => next.telemetry = Arc::clone(rules),
                Change::GatewayGone(key) => {
                    next.gateways.remove(key);
                }
                Change::L7Policies(target, policies) => {
                    next.l7_policies.insert(target.clone(), Arc::clone(policies));
                }
                Change::L7PoliciesGone(target) => {
                    next.l7_policies.remove(target);
                }
                Change::RequestAuths(target, auths) => {
                    next.request_auths.insert(target.clone(), Arc::clone(auths));
                }
                Change::RequestAuthsGone(target) => {
                    next.request_auths.remove(target);
                }
                Change::Treatment(target, treatment) => {
                    next.treatments.insert(target.clone(), Arc::clone(treatment));
                }
                Change::TreatmentGone(target) => {
                    next.treatments.remove(target);
                }
                Change::Authorizers(all) => next.authorizers = Arc::clone(all),
                Change::Defaults(new) => next.defaults = Arc::clone(new),
                Change::Unread(why) => next.unread.clone_from(why),
                Change::OwnLocality(l) => {
                    if next.view.locality != *l {
                        Arc::make_mut(&mut next.view).locality = l.clone();
                        next.regroup_all();
                    }
                }
                Change::OwnNetwork(n) => {
                    if next.view.network != *n {
                        Arc::make_mut(&mut next.view).network = n.clone();
                        next.regroup_all();
                    }
                }
            }
        }
        next
    }

    fn put_workload(&mut self, w: &Arc<Workload>) {
        if let Some(old) = self.workloads.get(&*w.uid) {
            if old.workload() == w {
                return;
            }
            self.take_workload(&w.uid);
        }
        let known = Arc::new(Known::with_identity(Arc::clone(w), self.share_identity(w)));
        self.workloads.insert(Arc::clone(&w.uid), Arc::clone(&known));
        for addr in indexed_addrs(w) {
            // An address listed twice is one address.
            self.by_ip.edit(&addr, |c| {
                c.take(|k| k.workload().uid == w.uid);
                c.put(&known, ip_order)
            });
        }
        if self.is_local(w) {
            self.local.insert(Arc::clone(&w.uid), Arc::clone(&known));
            self.policies.bind(w);
        }
        for (key, ports) in w.services.iter() {
            self.put_endpoint(key, &known, ports);
        }
    }
    fn take_workload(&mut self, uid: &str) {
        let Some(known) = self.workloads.remove(uid) else { return };
        let w = known.workload();
        self.unshare_identity(w);
        for addr in indexed_addrs(w) {
            self.by_ip.edit(&addr, |c| c.take(|k| &*k.workload().uid == uid));
        }
        if self.local.remove(uid).is_some() {
            self.policies.unbind(w);
        }
        for key in w.services.keys() {
            if let Some(backing) = self.services.get_mut(key) {
                let backing = Arc::make_mut(backing);
                backing.endpoints.remove(uid);
                if backing.service.is_none() && backing.endpoints.is_empty() {
                    self.services.remove(key);
                }
            }
        }
    }
    /// The identity of a workload, one text for all workloads of a service account.
    fn share_identity(&mut self, w: &Workload) -> Arc<[SpiffeId]> {
        let key = account_of(w);
        if let Some(shared) = self.identities.get_mut(&key) {
            shared.users += 1;
            return Arc::clone(&shared.expect);
        }
        let expect: Arc<[SpiffeId]> = w.identity().map_or_else(|_| Arc::default(), |id| Arc::from([id]));
        self.identities.insert(key, SharedIdentity { expect: Arc::clone(&expect), users: 1 });
        expect
    }
    fn unshare_identity(&mut self, w: &Workload) {
        self.identities.edit(&account_of(w), |shared| {
            shared.users = shared.users.saturating_sub(1);
            if shared.users == 0 { Keep::No } else { Keep::Yes }
        });
    }
    fn is_local(&self, w: &Workload) -> bool {
        !w.node.is_empty() && w.node == self.view.node
    }
    fn put_endpoint(&mut self, key: &ServiceKey, known: &Arc<Known>, ports: &PortMap) {
        if self.services.get(key).is_none() {
            self.services.insert(key.clone(), Arc::default());
        }
        if let Some(backing) = self.services.get_mut(key) {
            let Backing { service, endpoints } = Arc::make_mut(backing);
            endpoints.insert(service.as_deref(), &self.view, Arc::clone(known), Arc::clone(ports));
        }
    }

    fn put_service(&mut self, s: &Arc<Service>) {
        let old = self.services.get(&s.key).and_then(|b| b.service.clone());
        if old.as_ref() == Some(s) {
            return;
        }
        if let Some(old) = &old {
            self.unlist_service(old);
        }
        self.by_host.edit(&s.key.hostname, |c| c.put(s, service_order));
        for vip in distinct(s.vips.iter().map(canonical_addr)) {
            self.by_vip.edit(&vip, |c| c.put(s, service_order));
        }
        for (network, net) in distinct(s.cidr_vips.iter().map(|(n, c)| (n.clone(), c.trunc()))) {
            self.by_cidr.edit(&(network, net), |c| c.put(s, service_order));
            *Arc::make_mut(&mut self.cidr_lengths).entry(length_key(net)).or_default() += 1;
        }
        if self.services.get(&s.key).is_none() {
            self.services.insert(s.key.clone(), Arc::default());
        }
        if let Some(backing) = self.services.get_mut(&s.key) {
            let backing = Arc::make_mut(backing);
            backing.service = Some(Arc::clone(s));
            if old.is_none_or(|old| grades_differently(&old, s)) {
                backing.endpoints.grade(Some(s));
            }
        }
    }
    fn take_service(&mut self, key: &ServiceKey) {
        let Some(old) = self.services.get(key).and_then(|b| b.service.clone()) else { return };
        self.unlist_service(&old);
        if let Some(backing) = self.services.get_mut(key) {
            let backing = Arc::make_mut(backing);
            backing.service = None;
            if backing.endpoints.is_empty() {
                self.services.remove(key);
            } else {
                backing.endpoints.grade(None);
            }
        }
    }
    /// Takes a service out of the name and address tables.
    fn unlist_service(&mut self, s: &Service) {
        self.by_host.edit(&s.key.hostname, |c| c.take(|o| o.key == s.key));
        for vip in distinct(s.vips.iter().map(canonical_addr)) {
            self.by_vip.edit(&vip, |c| c.take(|o| o.key == s.key));
        }
        for (network, net) in distinct(s.cidr_vips.iter().map(|(n, c)| (n.clone(), c.trunc()))) {
            self.by_cidr.edit(&(network, net), |c| c.take(|o| o.key == s.key));
            let lengths = Arc::make_mut(&mut self.cidr_lengths);
            if let Some(n) = lengths.get_mut(&length_key(net)) {
                *n -= 1;
                if *n == 0 {
                    lengths.remove(&length_key(net));
                }
            }
        }
    }
    /// Ranks every endpoint anew: our own place changed. Rare, and the only change whose cost is the whole mesh.
    fn regroup_all(&mut self) {
        let keys: Vec<ServiceKey> = self.services.iter().map(|(k, _)| k.clone()).collect();
        for key in keys {
            if let Some(b) = self.services.get_mut(&key) {
                Arc::make_mut(b).regroup(&self.view);
            }
        }
    }

    /// Workload by id.
    pub fn find_workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.find_known(uid).map(|k| k.workload())
    }
    /// Workload by id, with its identity.
    pub fn find_known(&self, uid: &str) -> Option<&Arc<Known>> {
        self.workloads.get(uid)
    }
    /// Workload by address (host-network ones are never found; conflicts ranked as node-agent §1.4).
    pub fn find_workload_by_ip(&self, network: &Network, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.find_known_by_ip(network, ip).map(|k| k.workload())
    }
    /// Workload by address, with its identity.
    pub fn find_known_by_ip(&self, network: &Network, ip: IpAddr) -> Option<&Arc<Known>> {
        self.by_ip.get(&AddrRef(network, ip.to_canonical()))?.all().first()
    }
    /// Whether a workload or a service has this very address, whoever may see it.
    pub fn has_address(&self, at: &NetworkAddr) -> bool {
        self.by_ip.get(at).is_some() || self.by_vip.get(at).is_some()
    }
    /// Service by key.
    pub fn find_service(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.services.get(key)?.service.as_ref()
    }
    /// A service with its endpoints. The same `Arc` in two versions means that neither changed between them, which is how
    /// what was derived from them is kept.
    pub fn find_backing(&self, key: &ServiceKey) -> Option<&Arc<Backing>> {
        self.services.get(key)
    }
    /// Service by VIP (exact, then CIDR) as a client in `client_namespace` sees it. Among ranges the client's own
    /// namespace wins, then the longest prefix, then canonical (node-agent §1.4).
    pub fn find_service_by_vip(&self, network: &Network, ip: IpAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        if let Some(s) = self.by_vip.get(&AddrRef(network, ip)).and_then(|c| choose(c, client_namespace, "")) {
            return Some(s);
        }
        let mut best = None;
        for (v6, Reverse(len)) in self.cidr_lengths.keys() {
            if *v6 != ip.is_ipv6() {
                continue;
            }
            let Ok(net) = IpNet::new(ip, *len) else { continue };
            let found = self.by_cidr.get(&RangeRef(network, net.trunc())).and_then(|c| choose(c, client_namespace, ""));
            match found {
                Some(s) if &*s.key.namespace == client_namespace => return Some(s),
                Some(s) if best.is_none() => best = Some(s),
                _ => {}
            }
        }
        best
    }
    /// Service by host name as a client in `client_namespace` sees it.
    pub fn find_service_by_host(&self, hostname: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        choose(self.by_host.get(hostname)?, client_namespace, &self.view.preferred_namespace)
    }
    /// Policy by key.
    pub fn find_policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.policies.find(key)
    }
    /// The policies by scope and by the identities they name, for `authz`.
    pub fn policy_index(&self) -> &PolicyIndex {
        &self.policies
    }
    /// All workloads, in no order (admin and reconcilers, never the data path).
    pub fn workloads(&self) -> Box<dyn Iterator<Item = &Arc<Workload>> + '_> {
        Box::new(self.workloads.values().map(|k| k.workload()))
    }
    /// All services, in no order.
    pub fn services(&self) -> Box<dyn Iterator<Item = &Arc<Service>> + '_> {
        Box::new(self.services.values().filter_map(|b| b.service.as_ref()))
    }
    /// All policies, in no order.
    pub fn policies(&self) -> Box<dyn Iterator<Item = &Arc<Policy>> + '_> {
        Box::new(self.policies.iter())
    }
    /// Workloads on our own node (`view().node`), kept indexed.
    pub fn local_workloads(&self) -> Box<dyn Iterator<Item = &Arc<Workload>> + '_> {
        Box::new(self.local.values().map(|k| k.workload()))
    }
    /// Endpoints of a service that clients may be told about (not unhealthy ones unless the service publishes them;
    /// workload uid order not defined), for admin and DNS. Empty for an unknown service.
    pub fn endpoints(&self, service: &ServiceKey) -> Box<dyn Iterator<Item = &Arc<Workload>> + '_> {
        match self.services.get(service) {
            Some(b) => Box::new(b.endpoints.usable().map(Endpoint::workload)),
            None => Box::new(std::iter::empty()),
        }
    }
    /// The routes of a service, if it has any of its own.
    pub fn find_routes(&self, service: &ServiceKey) -> Option<&Arc<RouteTable>> {
        self.routes.get(service)
    }
    /// What is said about reaching a service.
    pub fn find_destination(&self, service: &ServiceKey) -> Option<&Arc<Destination>> {
        self.destinations.get(service)
    }
    /// A gateway.
    pub fn find_gateway(&self, key: &GatewayKey) -> Option<&Arc<GatewayRoutes>> {
        self.gateways.get(key)
    }
    /// What is told about traffic.
    pub fn telemetry(&self) -> &TelemetryRules {
        &self.telemetry
    }
    /// All routes, in no order (admin, never the data path).
    pub fn routes(&self) -> impl Iterator<Item = (&ServiceKey, &Arc<RouteTable>)> {
        self.routes.iter()
    }
    /// All destinations, in no order.
    pub fn destinations(&self) -> impl Iterator<Item = &Arc<Destination>> {
        self.destinations.values()
    }
    /// All gateways, in no order.
    pub fn gateways(&self) -> impl Iterator<Item = &Arc<GatewayRoutes>> {
        self.gateways.values()
    }
    /// The layer 7 policies bound to a target.
    pub fn find_l7_policies(&self, target: TargetRef<'_>) -> Option<&Arc<L7Policies>> {
        self.l7_policies.get(&target)
    }
    /// The external authorizer of a name, or why it cannot be asked; `None`: nobody knows it.
    pub fn find_authorizer(&self, name: &str) -> Option<&Result<Arc<Authorizer>, Arc<str>>> {
        self.authorizers.get(name)
    }
    /// What the mesh's configuration says for all requests.
    pub fn defaults(&self) -> &MeshDefaults {
        &self.defaults
    }
    /// Why what nobody knows may be of the mesh all the same; `None`: it is not.
    pub fn unread(&self) -> Option<&Arc<str>> {
        self.unread.as_ref()
    }
    /// Whether any layer 7 policy is bound to anything.
    pub fn has_l7_policies(&self) -> bool {
        !self.l7_policies.is_empty()
    }
    /// All layer 7 policies by target, in no order (admin, never the data path).
    pub fn l7_policies(&self) -> impl Iterator<Item = (&PolicyTarget, &Arc<L7Policies>)> {
        self.l7_policies.iter()
    }
    /// The RequestAuthentications bound to a target.
    pub fn find_request_auths(&self, target: TargetRef<'_>) -> Option<&Arc<RequestAuths>> {
        self.request_auths.get(&target)
    }
    /// All RequestAuthentications by target, in no order (after a publish and admin, never the data path).
    pub fn request_auths(&self) -> impl Iterator<Item = (&PolicyTarget, &Arc<RequestAuths>)> {
        self.request_auths.iter()
    }
    /// Whether any RequestAuthentication is bound to anything.
    pub fn has_request_auths(&self) -> bool {
        !self.request_auths.is_empty()
    }
    /// What is done with every request of a target.
    pub fn find_treatment(&self, target: TargetRef<'_>) -> Option<&Arc<Treatment>> {
        self.treatments.get(&target)
    }
    /// All of it by target, in no order (admin, never the data path).
    pub fn treatments(&self) -> impl Iterator<Item = (&PolicyTarget, &Arc<Treatment>)> {
        self.treatments.iter()
    }
    /// Whether anything is said about any target.
    pub fn has_treatments(&self) -> bool {
        !self.treatments.is_empty()
    }
    /// The endpoint set of a service, also of one that has not arrived yet (its endpoints are staged).
    pub fn endpoint_set(&self, service: &ServiceKey) -> Option<&EndpointSet> {
        self.services.get(service).map(|b| &b.endpoints)
    }

    /// All tables as text, independent of the history that led to them: two snapshots of the same objects give the same
    /// dump. For tests and support archives; costs the whole mesh.
    pub fn canonical_dump(&self) -> String {
        let mut lines: Vec<String> = Vec::new();
        for (uid, k) in &self.workloads {
            lines.push(format!("workload {uid} {:?} {:?}", k.workload(), k.identity()));
        }
        for (addr, c) in &self.by_ip {
            let uids: Vec<&str> = c.all().iter().map(|k| &*k.workload().uid).collect();
            lines.push(format!("ip {addr} {uids:?}"));
        }
        lines.extend(self.local.iter().map(|(uid, k)| format!("local {uid} {:?}", k.workload())));
        for (key, b) in &self.services {
            let mut line = format!("service {key} {:?}", b.service);
            for (rank, e) in b.endpoints.ranked() {
                let _ = write!(line, " [{rank} {} {:?} {:?}]", e.workload().uid, e.workload().capacity, e.known().expect());
            }
            lines.push(line);
        }
        for (host, c) in &self.by_host {
            lines.push(format!("host {host} {:?}", c.all()));
        }
        for (addr, c) in &self.by_vip {
            lines.push(format!("vip {addr} {:?}", c.all()));
        }
        for ((network, net), c) in &self.by_cidr {
            lines.push(format!("range {}/{net} {:?}", network.0, c.all()));
        }
        lines.extend(self.identities.iter().map(|(_, i)| format!("identity {:?} of {}", i.expect, i.users)));
        lines.push(format!("lengths {:?}", self.cidr_lengths));
        lines.extend(self.routes.iter().map(|(key, table)| format!("routes {key} {table:?}")));
        lines.extend(self.destinations.values().map(|d| format!("destination {d:?}")));
        lines.extend(self.gateways.values().map(|g| format!("gateway {g:?}")));
        lines.extend(self.request_auths.iter().map(|(target, a)| format!("request authentication of {target} {a:?}")));
        lines.extend(self.l7_policies.iter().map(|(target, p)| format!("layer 7 policies of {target} {p:?}")));
        // The maps of the rules have no order; their entries do once they are lines.
        lines.push(format!("telemetry {:?}", self.telemetry.mesh));
        lines.extend(self.telemetry.namespaces.iter().map(|(ns, sides)| format!("telemetry of {ns} {sides:?}")));
        lines.extend(self.telemetry.targets.iter().map(|(target, sides)| format!("telemetry of {target:?} {sides:?}")));
        lines.extend(self.treatments.iter().map(|(target, t)| format!("treatment of {target} {t:?}")));
        lines.push(format!("authorizers {:?}", self.authorizers));
        lines.push(format!("defaults {:?}", self.defaults));
        self.policies.dump(&mut lines);
        lines.sort_unstable();
        lines.join("\n")
    }
}
impl Backing {
    fn regroup(&mut self, view: &Viewpoint) {
        let members = self.endpoints.members();
        self.endpoints = EndpointSet::build(self.service.as_deref(), view, members);
    }
}

/// Whether a change of the service changes what its endpoints are worth.
fn grades_differently(old: &Service, new: &Service) -> bool {
    old.ports != new.ports || old.lb != new.lb || old.ip_families != new.ip_families || old.sans != new.sans
}
/// The addresses a workload is found by.
fn indexed_addrs(w: &Workload) -> impl Iterator<Item = NetworkAddr> {
    let own = w.network_mode == NetworkMode::Standard;
    w.ips.iter().filter(move |_| own).map(|ip| NetworkAddr { network: w.network.clone(), ip: ip.to_canonical() })
}
fn canonical_addr(a: &NetworkAddr) -> NetworkAddr {
    NetworkAddr { network: a.network.clone(), ip: a.ip.to_canonical() }
}
fn length_key(net: IpNet) -> (bool, Reverse<u8>) {
    (matches!(net, IpNet::V6(_)), Reverse(net.prefix_len()))
}
/// Without repetitions; the lists are short.
fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut out: Vec<T> = Vec::new();
    for item in items {
        if !out.contains(&item) {
            out.push(item);
        }
    }
    out
}

#[cfg(test)]
mod tests;
