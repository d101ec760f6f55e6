//! The Gateway API: routes of services (GAMMA) and of Gateways that face the outside, BackendTLSPolicy, ReferenceGrant.
//!
//! Owns these objects and what attaches to what. Each is compiled when it is read, as if all it names were there and
//! permitted; the join looks at the references and replaces only what is not. Order of rules (spec of the Gateway API):
//! exact paths, then prefixes, then patterns; longer, with method, with more headers, with more query parameters first;
//! then older routes, then by name. Backends that are unknown, not permitted or not backends answer 500 for their share; a
//! route that could not be understood closes (500) the service or the listener's hosts it was for. Upstream:
//! [`super::object`]. Downstream: [`super::layer7`], which asks per service and per Gateway.

mod attached;
mod backend_tls;
mod backend_traffic;
mod compile;
mod filter;
mod grpc_route;
mod http_route;
mod l4_route;
mod listener;
mod reference;
mod route;
mod session;
mod tables;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::l7::destination::{KeyPair, RetryBudget, Roots, UpstreamTls};
use mesh_model::l7::gateway::{ClientCertificates, GatewayKey, GatewayRoutes, Listener, ListenerTls};
use mesh_model::l7::route::{BackendRef, ClusterKey, HttpMatch, HttpRoute, RouteTable, TcpRoute, TcpRule, TlsRule};
use mesh_model::l7::session::Session;
use mesh_model::service::{Service, ServiceKey};

use super::layer7::{Join, Need, Output, Touched, covers, forget, put, same_or_stand_in};
use super::object::{AllowedRoutes, Gateway, Kind, KubeService, ObjectId, Reader};
use super::pem::PemEntries;
use super::read::Read;
use super::{HashMap, Name, Slot, Translator};
use crate::diagnostics::Severity;
use crate::yaml::Node;

use attached::Attached;
use backend_tls::{CaKind, CaRef, PolicyTarget, TlsPolicy};
use backend_traffic::TrafficRules;
use compile::{invalid, settle_http, settle_l4};
pub use listener::{EdgeClients, EdgeListener, EdgeTls, SecretRef, read_all as read_listeners};
pub(super) use tables::Tables;

use reference::{GATEWAY_GROUP, ParentKind, ParentRef, ReferenceGrant, Target, TargetKind, kind_name};
use route::{Action, At, Rank, Route, RouteKind};
use tables::{Age, Part, Spot};

/// One object of the Gateway API, as read.
#[derive(Clone, Debug, PartialEq)]
pub enum GatewayApiObject {
    /// HTTPRoute, GRPCRoute, TCPRoute or TLSRoute.
    Route(Route),
    /// BackendTLSPolicy.
    BackendTls(TlsPolicy),
    /// XBackendTrafficPolicy.
    BackendTraffic(TrafficRules),
    /// ReferenceGrant.
    Grant(ReferenceGrant),
}
impl GatewayApiObject {
    /// Whether it only stands for an object that could not be read.
    pub fn is_stand_in(&self) -> bool {
        match self {
            Self::Route(r) => r.broken.is_some(),
            Self::BackendTls(p) => p.broken.is_some(),
            Self::BackendTraffic(_) | Self::Grant(_) => false,
        }
    }
}

/// What routes are indexed by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Parent {
    Service(ServiceKey),
    /// A ServiceEntry by name; its hosts are its own business.
    Entry(Name),
    Gateway(GatewayKey),
}
/// A route of any kind, as the index names it.
pub(super) type RouteId = (RouteKind, Arc<str>, Arc<str>);

/// The objects of the Gateway API, and their indices.
#[derive(Debug, Default)]
pub(super) struct GatewayApi {
    routes: BTreeMap<RouteId, Slot<Route>>,
    by_parent: HashMap<Parent, BTreeSet<RouteId>>,
    tls: Attached<TlsPolicy>,
    traffic: Attached<TrafficRules>,
    grants: BTreeMap<Name, ReferenceGrant>,
}

/// Reads an HTTPRoute, GRPCRoute, TCPRoute, TLSRoute, BackendTLSPolicy, XBackendTrafficPolicy or ReferenceGrant.
pub(super) fn read<'p>(
    r: &mut Reader<'_>,
    node: &'p Node<'p>,
    id: &ObjectId,
    origin: &Arc<Origin>,
) -> Read<'p, Option<GatewayApiObject>> {
    Ok(match id.kind {
        Kind::BackendTlsPolicy => Some(GatewayApiObject::BackendTls(backend_tls::read(r, node, id)?)),
        Kind::BackendTrafficPolicy => Some(GatewayApiObject::BackendTraffic(backend_traffic::read(r, node, id)?)),
        Kind::ReferenceGrant => Some(GatewayApiObject::Grant(reference::grant(r, node)?)),
        kind => match route_kind(kind) {
            Some(kind) => Some(GatewayApiObject::Route(route::read(r, node, kind, id, origin)?)),
            None => None,
        },
    })
}
fn route_kind(kind: Kind) -> Option<RouteKind> {
    match kind {
        Kind::HttpRoute => Some(RouteKind::Http),
        Kind::GrpcRoute => Some(RouteKind::Grpc),
        Kind::TcpRoute => Some(RouteKind::Tcp),
        Kind::TlsRoute => Some(RouteKind::Tls),
        _ => None,
    }
}

/// What a parentRef of a route in `ns` attaches to; Services and ServiceEntries only in its own namespace.
fn parent_of(p: &ParentRef, ns: &str) -> Option<Parent> {
    let namespace = Arc::clone(&p.namespace);
    match &p.kind {
        ParentKind::Gateway => Some(Parent::Gateway(GatewayKey { namespace, name: Arc::clone(&p.name) })),
        ParentKind::Service(host) if *namespace == *ns => {
            Some(Parent::Service(ServiceKey { namespace, hostname: Arc::clone(host) }))
        }
        ParentKind::ServiceEntry if *namespace == *ns => Some(Parent::Entry((namespace, Arc::clone(&p.name)))),
        _ => None,
    }
}
/// A ServiceEntry and whatever attaches to it.
pub(super) fn entry_need((namespace, name): &Name) -> Need {
    Need::Object(ObjectId { kind: Kind::ServiceEntry, namespace: Arc::clone(namespace), name: Arc::clone(name) })
}

impl GatewayApi {
    /// Takes an object in or forgets it, and marks what it touches. What stands in for an object that cannot be read does
    /// not replace a good one.
    pub(super) fn set(&mut self, id: &ObjectId, new: Option<(GatewayApiObject, Arc<Origin>)>, touched: &mut Touched) {
        let name: Name = (Arc::clone(&id.namespace), Arc::clone(&id.name));
        match id.kind {
            Kind::BackendTlsPolicy => {
                let new = match new {
                    Some((GatewayApiObject::BackendTls(obj), origin)) => Some(Slot { obj, origin }),
                    _ => None,
                };
                self.tls.set(name, new, touched);
            }
            Kind::BackendTrafficPolicy => {
                let new = match new {
                    Some((GatewayApiObject::BackendTraffic(obj), origin)) => Some(Slot { obj, origin }),
                    _ => None,
                };
                self.traffic.set(name, new, touched);
            }
            Kind::ReferenceGrant => {
                touched.need(Need::Grants(Arc::clone(&name.0)));
                match new {
                    Some((GatewayApiObject::Grant(grant), _)) => self.grants.insert(name, grant),
                    _ => self.grants.remove(&name),
                };
                return;
            }
            kind => {
                let Some(kind) = route_kind(kind) else { return };
                let new = match new {
                    Some((GatewayApiObject::Route(obj), origin)) => Some(Slot { obj, origin }),
                    _ => None,
                };
                self.set_route((kind, name.0, name.1), new, touched);
            }
        }
        touched.output(Output::Check(id.clone()));
    }

    fn set_route(&mut self, id: RouteId, new: Option<Slot<Route>>, touched: &mut Touched) {
        let old = self.routes.get(&id);
        if same_or_stand_in(old, new.as_ref(), |r| r.broken.is_some()) {
            return;
        }
        let parents =
            |slot: &Slot<Route>| -> Vec<Parent> { slot.obj.parents.iter().filter_map(|p| parent_of(p, &id.1)).collect() };
        let (before, after) = (old.map(parents).unwrap_or_default(), new.as_ref().map(parents).unwrap_or_default());
        for p in &before {
            forget(&mut self.by_parent, p, &id);
        }
        for p in before.iter().chain(&after) {
            match p {
                Parent::Service(key) => touched.output(Output::OnService(key.clone(), id.clone())),
                Parent::Gateway(key) => touched.output(Output::Attached(key.clone(), id.clone())),
                // Of its hosts only it itself knows.
                Parent::Entry(name) => touched.need(entry_need(name)),
            }
        }
        for p in after {
            self.by_parent.entry(p).or_default().insert(id.clone());
        }
        put(&mut self.routes, id, new);
    }

    /// The routes that name a Gateway.
    pub(super) fn of_gateway(&self, key: &GatewayKey) -> impl Iterator<Item = &RouteId> {
        self.by_parent.get(&Parent::Gateway(key.clone())).into_iter().flatten()
    }
    /// The routes that name a Kubernetes Service.
    pub(super) fn of_service(&self, key: &ServiceKey) -> impl Iterator<Item = &RouteId> {
        self.by_parent.get(&Parent::Service(key.clone())).into_iter().flatten()
    }
}

/// The Kubernetes Service behind a service; `None` when a ServiceEntry stands for it.
fn kube_service<'t>(t: &'t Translator, key: &ServiceKey) -> Option<&'t KubeService> {
    t.kube_service(&key.hostname).filter(|s| s.key.namespace == key.namespace).map(|s| &s.obj)
}

/// Adds the rules of the routes attached to a service, in the order of the Gateway API, behind what is there. `tables`: of those
/// that name it as a Kubernetes Service ([`place_on_service`]).
pub(super) fn add(join: &mut Join<'_>, service: &Arc<Service>, tables: &mut Tables, table: &mut RouteTable) {
    let mut of_entry = Tables::default();
    let tables = if kube_service(join.t, &service.key).is_some() {
        tables
    } else {
        let entry = (Arc::clone(&service.key.namespace), Arc::clone(&service.name));
        join.need(entry_need(&entry));
        let (parent, api) = (Parent::Entry(entry), &join.objects.gateway_api);
        for id in api.by_parent.get(&parent).into_iter().flatten() {
            put_on(join, service, &parent, id, &mut of_entry);
        }
        &mut of_entry
    };
    let Some(own) = tables.only() else { return };
    table.origins.extend(own.origins.iter().cloned());
    if table.broken.is_none() {
        table.broken.clone_from(&own.broken);
    }
    if table.http.is_empty() {
        // A large table stays shared with the version before, but for what changed.
        table.http = own.http.clone();
    } else {
        table.http.extend(own.http.iter().cloned());
    }
    let mut tls = own.tls.clone();
    // Stable: equally specific rules stay in the order of their routes.
    tls.sort_by_cached_key(|rule| rule.sni.first().map(host_order));
    table.tls.append(&mut tls);
    table.tcp.extend(own.tcp.iter().cloned());
}
/// Puts one route, as it is now, on a Kubernetes Service.
pub(super) fn place_on_service(join: &mut Join<'_>, key: &ServiceKey, id: &RouteId, tables: &mut Tables) {
    match join.t.services_out.get(key) {
        Some(service) if kube_service(join.t, key).is_some() => put_on(join, service, &Parent::Service(key.clone()), id, tables),
        _ => tables.remove(id),
    }
}
fn put_on(join: &mut Join<'_>, service: &Arc<Service>, parent: &Parent, id: &RouteId, tables: &mut Tables) {
    let Some(route) = join.objects.gateway_api.routes.get(id) else { return tables.remove(id) };
    let refs: Vec<&ParentRef> = route.obj.parents.iter().filter(|p| parent_of(p, &id.1).as_ref() == Some(parent)).collect();
    if refs.is_empty() {
        return tables.remove(id);
    }
    let part = on_service(join, service, &refs, id, route);
    tables.put(id, age_of(id, route), BTreeMap::from([((0, host_order(&service.key.hostname)), part)]));
}
/// What a route says to a service.
fn on_service(join: &mut Join<'_>, service: &Arc<Service>, refs: &[&ParentRef], id: &RouteId, route: &Slot<Route>) -> Part {
    let (mut http, mut tls, mut tcp) = (Vec::new(), Vec::new(), Vec::new());
    let (origin, broken) = (Arc::clone(&route.origin), route.obj.broken.clone());
    if broken.is_some() {
        return Part { http: http.into(), tls, tcp, origin, broken };
    }
    let kube = kube_service(join.t, &service.key);
    let settled = settle(join, id, route);
    for p in refs {
        // Told by the check of the route.
        let Ok(port) = scope(p, kube, service) else { continue };
        for (rank, matches, action) in &*settled.http {
            let matches = match port {
                None => Arc::clone(matches),
                Some(_) => Arc::new(HttpMatch { port, ..HttpMatch::clone(matches) }),
            };
            http.push((*rank, matches, Arc::clone(action)));
        }
        if id.0 == RouteKind::Tls {
            let own = std::slice::from_ref(&service.key.hostname);
            let sni = if route.obj.hostnames.is_empty() { own } else { &route.obj.hostnames };
            let rule = |host: &Arc<str>, to: &Arc<TcpRoute>| TlsRule { sni: vec![Arc::clone(host)], port, route: Arc::clone(to) };
            tls.extend(sni.iter().flat_map(|host| settled.l4.iter().map(move |to| rule(host, to))));
        } else {
            tcp.extend(settled.l4.iter().map(|to| TcpRule { port, destinations: Vec::new(), route: Arc::clone(to) }));
        }
    }
    Part { http: http.into(), tls, tcp, origin, broken }
}

/// A parentRef names a port its service does not have.
struct NoSuchPort;
/// The port a parentRef is limited to, as a port of the service; `None` for all of them.
fn scope(p: &ParentRef, kube: Option<&KubeService>, service: &Service) -> Result<Option<u16>, NoSuchPort> {
    let by_number = p.port.map(|port| service.port(port).map(|p| p.port).ok_or(NoSuchPort)).transpose()?;
    let named = |section: &Arc<str>| {
        // The names of a ServiceEntry's ports do not reach the model; nobody attaches to them by name.
        kube.and_then(|s| s.ports.iter().find(|p| p.name == *section)).map(|p| p.port).ok_or(NoSuchPort)
    };
    let by_name = p.section.as_ref().map(named).transpose()?;
    match (by_number, by_name) {
        (Some(a), Some(b)) if a != b => Err(NoSuchPort),
        (a, b) => Ok(a.or(b)),
    }
}

/// The rules of a route with their references looked up.
struct Settled {
    http: Arc<[HttpEntry]>,
    l4: Vec<Arc<TcpRoute>>,
}
/// An HTTP rule on its way into a table.
type HttpEntry = (Rank, Arc<HttpMatch>, Arc<HttpRoute>);

/// The rules of a route with their references looked up; complains about those that cannot be used.
fn settle(join: &mut Join<'_>, id: &RouteId, slot: &Slot<Route>) -> Settled {
    let (mut http, mut l4) = (Vec::new(), Vec::new());
    for (i, rule) in slot.obj.rules.iter().enumerate() {
        let mut other = Vec::new();
        for (at, target) in &rule.targets {
            match resolve(join, id, target) {
                Ok(None) => {}
                Ok(Some(to)) => other.push((*at, to)),
                Err((why, code)) => {
                    let (field, effect) = match at {
                        At::Backend(_) => ("backendRefs", "its share is answered 500"),
                        At::Mirror(_) | At::BackendMirror(..) => ("filters", "nothing is copied there"),
                    };
                    let effect = if matches!(rule.action, Action::L4(_)) { "its share is refused" } else { effect };
                    join.complain(
                        Severity::Error,
                        (&slot.origin, target.line),
                        &format!("spec.rules[{i}].{field}"),
                        format!("{why}; {effect}"),
                        if code == "ref-not-permitted" { "write a ReferenceGrant there" } else { "correct the reference" },
                        code,
                    );
                    other.push((*at, invalid(why)));
                }
            }
        }
        match &rule.action {
            Action::Http(route) => {
                let route = settle_http(route, other);
                http.extend(rule.matches.iter().map(|(rank, matches)| (*rank, Arc::clone(matches), Arc::clone(&route))));
            }
            Action::L4(route) => l4.push(settle_l4(route, other)),
        }
    }
    Settled { http: http.into(), l4 }
}
/// Whether a reference is as assumed (`None`), another service, or unusable (why, and the code of the complaint).
fn resolve(join: &mut Join<'_>, (kind, own, _): &RouteId, to: &Target) -> Result<Option<BackendRef>, (String, &'static str)> {
    let ns = to.namespace.as_ref().unwrap_or(own);
    let found = match &to.kind {
        TargetKind::Other(kind) => return Err((format!("a {kind} takes no requests (InvalidKind)"), "invalid-kind")),
        TargetKind::Service => {
            if ns != own && !granted(join, &kind_name(GATEWAY_GROUP, kind.as_str()), own, "Service", ns, &to.name) {
                let why = format!("Service {ns}/{} is not open to a {} of {own} (RefNotPermitted)", to.name, kind.as_str());
                return Err((why, "ref-not-permitted"));
            }
            join.need(Need::Host(Arc::clone(&to.key.hostname)));
            join.t.services_out.get(&to.key)
        }
        TargetKind::Hostname => join.find_service(&to.name, own),
    };
    let port = to.port.unwrap_or(0);
    let missing = |what: std::fmt::Arguments<'_>| {
        let name = match to.kind {
            TargetKind::Hostname => format!("host {}", to.name),
            _ => format!("Service {ns}/{}", to.name),
        };
        (format!("{name} {what} (BackendNotFound)"), "backend-not-found")
    };
    let Some(service) = found else { return Err(missing(format_args!("does not exist"))) };
    if service.port(port).is_none() {
        return Err(missing(format_args!("has no TCP port {port}")));
    }
    let moved = service.key != to.key;
    Ok(moved.then(|| BackendRef::Service(ClusterKey { service: service.key.clone(), port, subset: None })))
}

/// Whether a ReferenceGrant in `ns` lets objects of `kind` in `own` point at `name`.
fn granted(join: &mut Join<'_>, kind: &str, own: &str, to: &str, ns: &Arc<str>, name: &str) -> bool {
    join.need(Need::Grants(Arc::clone(ns)));
    let from: Name = (Arc::clone(ns), "".into());
    let grants = join.objects.gateway_api.grants.range(from..).take_while(|((n, _), _)| n == ns);
    grants.into_iter().any(|(_, g)| g.allows(kind, own, to, name))
}

/// Complains about parents and targets that are not there. (What Gateways say to routes is told with the Gateway.)
pub(super) fn check(join: &mut Join<'_>, id: &ObjectId) {
    let api = &join.objects.gateway_api;
    if let Some(kind) = route_kind(id.kind) {
        let Some(slot) = api.routes.get(&(kind, Arc::clone(&id.namespace), Arc::clone(&id.name))) else { return };
        for (i, p) in slot.obj.parents.iter().enumerate() {
            if let Some((severity, message, fix)) = check_parent(join, &id.namespace, p) {
                let field = format!("spec.parentRefs[{i}]");
                join.complain(severity, (&slot.origin, p.line), &field, message, fix, "parent");
            }
        }
        return;
    }
    let name: Name = (Arc::clone(&id.namespace), Arc::clone(&id.name));
    if let Some(slot) = api.tls.get(&name).filter(|_| id.kind == Kind::BackendTlsPolicy) {
        check_targets(join, id, &slot.origin, &slot.obj.targets);
    } else if let Some(slot) = api.traffic.get(&name).filter(|_| id.kind == Kind::BackendTrafficPolicy) {
        check_targets(join, id, &slot.origin, &slot.obj.targets);
    }
}
fn check_targets(join: &mut Join<'_>, id: &ObjectId, origin: &Arc<Origin>, targets: &[PolicyTarget]) {
    for (i, target) in targets.iter().enumerate() {
        join.need(Need::Host(Arc::clone(&target.host)));
        let key = ServiceKey { namespace: Arc::clone(&id.namespace), hostname: Arc::clone(&target.host) };
        let known = |s: &KubeService| target.section.as_ref().is_none_or(|x| s.ports.iter().any(|p| p.name == *x));
        let message = match kube_service(join.t, &key) {
            None => format!("Service {}/{} does not exist", id.namespace, target.name),
            Some(s) if !known(s) => format!("Service {}/{} has no TCP port of this name", id.namespace, target.name),
            Some(_) => continue,
        };
        let field = format!("spec.targetRefs[{i}]");
        let message = format!("{message}; the policy has no effect there");
        join.complain(Severity::Warning, (origin, target.line), &field, message, "correct the reference", "target");
    }
}

fn check_parent(join: &mut Join<'_>, own: &Arc<str>, p: &ParentRef) -> Option<(Severity, String, &'static str)> {
    let ns = &p.namespace;
    let hosts: Vec<Arc<str>> = match &p.kind {
        ParentKind::Gateway => return None,
        ParentKind::Other(kind) => {
            return Some((
                Severity::Warning,
                format!("nothing attaches to a {kind} here"),
                "attach to a Gateway, Service or ServiceEntry",
            ));
        }
        _ if ns != own => {
            let message = format!(
                "routes of {own} for clients of a service of {ns} are not supported in ambient meshes; this has no effect"
            );
            return Some((Severity::Error, message, "move the route to the namespace of the service"));
        }
        ParentKind::Service(host) => vec![Arc::clone(host)],
        ParentKind::ServiceEntry => {
            join.need(entry_need(&(Arc::clone(ns), Arc::clone(&p.name))));
            let entry = join.t.spaces.get(ns).and_then(|s| s.service_entries.get(&p.name));
            entry.map(|e| e.obj.hosts.clone()).unwrap_or_default()
        }
    };
    let mut found = None;
    for host in hosts {
        join.need(Need::Host(Arc::clone(&host)));
        let key = ServiceKey { namespace: Arc::clone(ns), hostname: host };
        let kube = kube_service(join.t, &key);
        let is_kube = matches!(p.kind, ParentKind::Service(_));
        if let Some(s) = join.t.services_out.get(&key).filter(|s| kube.is_some() == is_kube && (is_kube || s.name == p.name)) {
            if scope(p, kube, s).is_ok() {
                return None;
            }
            found = Some(key);
        }
    }
    let message = match found {
        Some(key) => format!("{} has no TCP port of this number or name; the route has no effect there", key.hostname),
        None => format!("the parent {ns}/{} does not exist; the route has no effect there", p.name),
    };
    Some((Severity::Warning, message, "correct the reference"))
}

/// TLS towards a service, as a BackendTLSPolicy asks for it.
#[derive(Clone, Debug)]
pub(super) struct BackendTls {
    /// Port of the service; `None` for all.
    pub(super) port: Option<u16>,
    /// What to speak.
    pub(super) tls: Arc<UpstreamTls>,
    /// Where it was written.
    pub(super) origin: Arc<Origin>,
}
/// What BackendTLSPolicies say about a service; one per port at most, ports of their own first.
pub(super) fn backend_tls(join: &mut Join<'_>, service: &Arc<Service>) -> Vec<BackendTls> {
    let api = &join.objects.gateway_api;
    let Some(kube) = kube_service(join.t, &service.key) else { return Vec::new() };
    let mut out: Vec<BackendTls> = Vec::new();
    for ((ns, _), slot) in api.tls.of(&service.key) {
        let mine = slot.obj.targets.iter().filter(|t| t.host == service.key.hostname);
        for target in mine {
            let port = match &target.section {
                None => None,
                Some(section) => match kube.ports.iter().find(|p| p.name == *section) {
                    Some(p) => Some(p.port),
                    // Told by the check of the policy.
                    None => continue,
                },
            };
            if let Some(first) = out.iter().find(|b| b.port == port) {
                let message = format!("an older policy speaks of the same: {}; this one has no effect there", first.origin);
                let fix = "remove one of them";
                join.complain(Severity::Warning, (&slot.origin, target.line), "spec.targetRefs", message, fix, "conflict");
                continue;
            }
            let tls = Arc::new(upstream_tls(join, ns, slot));
            out.push(BackendTls { port, tls, origin: Arc::clone(&slot.origin) });
        }
    }
    out.sort_by_key(|b| (b.port.is_none(), b.port));
    out
}
/// What XBackendTrafficPolicies say about a service: the oldest that speaks of a thing counts.
#[derive(Clone, Debug, Default)]
pub(super) struct BackendTraffic {
    /// Retry budget.
    pub(super) budget: Option<RetryBudget>,
    /// Sessions.
    pub(super) session: Option<Arc<Session>>,
    /// Where it was written.
    pub(super) origins: Vec<Arc<Origin>>,
}
/// What XBackendTrafficPolicies say about a service.
pub(super) fn backend_traffic(join: &mut Join<'_>, service: &Arc<Service>) -> BackendTraffic {
    let mut out = BackendTraffic::default();
    let api = &join.objects.gateway_api;
    if kube_service(join.t, &service.key).is_none() {
        return out;
    }
    for (_, slot) in api.traffic.of(&service.key) {
        let TrafficRules { budget, session, targets, .. } = &slot.obj;
        let is_late = (out.budget.is_some() && budget.is_some()) || (out.session.is_some() && session.is_some());
        if let (true, Some(first)) = (is_late, out.origins.first()) {
            let line = targets.iter().find(|t| t.host == service.key.hostname).map_or(0, |t| t.line);
            let message = format!("an older policy speaks of the same: {first}; there it counts");
            let fix = "remove one of them";
            join.complain(Severity::Warning, (&slot.origin, line), "spec.targetRefs", message, fix, "conflict");
        }
        out.budget = out.budget.or(*budget);
        out.session = out.session.or_else(|| session.clone());
        out.origins.push(Arc::clone(&slot.origin));
    }
    out
}

fn upstream_tls(join: &mut Join<'_>, ns: &Arc<str>, slot: &Slot<TlsPolicy>) -> UpstreamTls {
    let v = &slot.obj.validation;
    let mut roots = Roots::System;
    let mut pem = String::new();
    for (i, ca) in v.roots.iter().enumerate() {
        let found = match &ca.kind {
            CaKind::ConfigMap => join.find_config_map(ns, &ca.name).and_then(|e| e.get("ca.crt")).ok_or("ConfigMap"),
            CaKind::Secret => join.find_secret(ns, &ca.name).and_then(|e| e.get("ca.crt")).ok_or("Secret"),
            CaKind::Other(kind) => Err(&**kind),
        };
        let why = match found {
            Ok(text) if text.contains(CERTIFICATE_LINE) => {
                pem.push_str(text.trim_end());
                pem.push('\n');
                continue;
            }
            Ok(_) => format!("`ca.crt` of {ns}/{} holds no certificate", ca.name),
            Err(kind @ ("ConfigMap" | "Secret")) => format!("there is no {kind} {ns}/{} with `ca.crt`", ca.name),
            Err(kind) => format!("a CA bundle cannot come from a {kind}"),
        };
        let field = format!("spec.validation.caCertificateRefs[{i}]");
        let message = format!("{why}; nobody is trusted, connections to the service fail");
        join.complain(Severity::Error, (&slot.origin, ca.line), &field, message, "create or correct it", "ca");
        if !matches!(roots, Roots::Missing(_)) {
            roots = Roots::Missing(why.into());
        }
    }
    if !pem.is_empty() && !matches!(roots, Roots::Missing(_)) {
        roots = Roots::Pem(pem.into());
    }
    if let Some(why) = &slot.obj.broken {
        roots = Roots::Missing(Arc::clone(why));
    }
    UpstreamTls {
        sni: (!v.hostname.is_empty()).then(|| Arc::clone(&v.hostname)),
        sans: v.sans.clone(),
        roots,
        crl: None,
        client: None,
        skip_verify: false,
        alpn: Vec::new(),
    }
}

const CERTIFICATE_LINE: &str = "-----BEGIN CERTIFICATE-----";

/// Host names of a listener in the order of [`mesh_model::hosts::order`].
type HostOrder = (u8, Reverse<usize>, Arc<str>);
fn host_order(host: &Arc<str>) -> HostOrder {
    let (class, length, _) = mesh_model::hosts::order(host);
    (class, length, Arc::clone(host))
}
/// What a listener's host name and a route's have in common: the narrower one, if one covers the other.
fn intersection(listener: &Arc<str>, route: &Arc<str>) -> Option<Arc<str>> {
    if covers(listener, route) { Some(Arc::clone(route)) } else { covers(route, listener).then(|| Arc::clone(listener)) }
}

/// A Gateway that faces the outside, without the hosts of its routes ([`Tables`]); `None` for waypoints and unknown ones.
pub(super) fn frame(join: &mut Join<'_>, key: &GatewayKey) -> Option<GatewayRoutes> {
    let slot = edge_of(join, key)?;
    let mut listeners = Vec::new();
    for l in &slot.obj.edge {
        let (tls, clients, broken) = match &l.broken {
            Some(why) => (None, None, Some(Arc::clone(why))),
            None => match (terminate(join, key, &slot.origin, l), clients(join, key, &slot.origin, l)) {
                (Ok(tls), Ok(clients)) => (tls, clients, None),
                (Err(why), _) | (_, Err(why)) => (None, None, Some(why.into())),
            },
        };
        listeners.push(Listener {
            name: Arc::clone(&l.name),
            port: l.port,
            protocol: l.protocol,
            hostname: l.hostname.clone(),
            tls,
            clients,
            hosts: Vec::new(),
            broken,
        });
    }
    Some(GatewayRoutes { key: key.clone(), listeners, origin: Some(Arc::clone(&slot.origin)) })
}
fn edge_of<'a>(join: &Join<'a>, key: &GatewayKey) -> Option<&'a Slot<Gateway>> {
    let slot = join.t.gateways.get(&(Arc::clone(&key.namespace), Arc::clone(&key.name)) as &Name);
    slot.filter(|s| !s.obj.edge.is_empty())
}

/// A Gateway with the hosts of its routes, unless it is `old` to the last table.
pub(super) fn fill(frame: &GatewayRoutes, tables: &mut Tables, old: Option<&GatewayRoutes>) -> Option<GatewayRoutes> {
    let mut new = frame.clone();
    for (l, hosts) in new.listeners.iter_mut().zip(tables.of_listeners(frame.listeners.len())) {
        l.hosts = hosts;
    }
    let hosts = |a: &Listener, b: &Listener| {
        a.hosts.len() == b.hosts.len() && a.hosts.iter().zip(&b.hosts).all(|(a, b)| a.0 == b.0 && Arc::ptr_eq(&a.1, &b.1))
    };
    let listener = |(a, b): (&Listener, &Listener)| {
        (&a.name, a.port, a.protocol, &a.hostname) == (&b.name, b.port, b.protocol, &b.hostname)
            && (&a.tls, &a.clients, &a.broken) == (&b.tls, &b.clients, &b.broken)
            && hosts(a, b)
    };
    let same = old.is_some_and(|old| {
        old.origin == new.origin
            && old.listeners.len() == new.listeners.len()
            && old.listeners.iter().zip(&new.listeners).all(listener)
    });
    (!same).then_some(new)
}

/// Puts one route, as it is now, on the hosts of a Gateway.
pub(super) fn place(join: &mut Join<'_>, key: &GatewayKey, id: &RouteId, tables: &mut Tables) {
    let Some(route) = join.objects.gateway_api.routes.get(id) else { return tables.remove(id) };
    if let Some(slot) = edge_of(join, key) {
        let parts = attach(join, key, &slot.obj.edge, id, route);
        return tables.put(id, age_of(id, route), parts);
    }
    tables.remove(id);
    let why = if join.t.gateways.contains_key(&(Arc::clone(&key.namespace), Arc::clone(&key.name)) as &Name) {
        format!("the Gateway {key} is a waypoint; routes attach to the Service or ServiceEntry behind it")
    } else {
        format!("the Gateway {key} does not exist")
    };
    for (i, p) in parent_refs(id, route, key) {
        let field = format!("spec.parentRefs[{i}]");
        join.complain(Severity::Warning, (&route.origin, p.line), &field, why.clone(), "correct the reference", "parent");
    }
}
fn age_of((kind, namespace, name): &RouteId, route: &Slot<Route>) -> Age {
    let created = Arc::clone(&route.obj.created);
    Age { undated: created.is_empty(), created, namespace: Arc::clone(namespace), name: Arc::clone(name), kind: *kind }
}
/// The parentRefs of a route that name a Gateway, with their numbers.
fn parent_refs<'a>(id: &RouteId, slot: &'a Slot<Route>, key: &GatewayKey) -> impl Iterator<Item = (usize, &'a ParentRef)> {
    let (own, parent) = (Arc::clone(&id.1), Some(Parent::Gateway(key.clone())));
    slot.obj.parents.iter().enumerate().filter(move |(_, p)| parent_of(p, &own) == parent)
}

/// What a route says to the hosts of the listeners it may attach to; says why where there is none.
fn attach(
    join: &mut Join<'_>,
    key: &GatewayKey,
    edge: &[EdgeListener],
    id: &RouteId,
    route: &Slot<Route>,
) -> BTreeMap<Spot, Part> {
    let any: Arc<str> = "*".into();
    let mut parts: BTreeMap<Spot, Part> = BTreeMap::new();
    let mut settled: Option<Settled> = None;
    for (i, p) in parent_refs(id, route, key) {
        // How far it got with any listener.
        let mut got = 0;
        for (n, l) in edge.iter().enumerate() {
            if p.port.is_some_and(|port| port != l.port) || p.section.as_ref().is_some_and(|s| *s != l.name) {
                continue;
            }
            got = got.max(1);
            if l.broken.is_some() {
                // Told with the listener.
                got = 5;
                continue;
            }
            if !l.kinds.contains(&id.0) {
                continue;
            }
            got = got.max(2);
            if matches!(l.allowed, AllowedRoutes::Selector { .. }) {
                let (kind, namespace, name) = (Kind::Namespace, Arc::clone(&join.t.empty), Arc::clone(&id.1));
                join.need(Need::Object(ObjectId { kind, namespace, name }));
            }
            if !join.t.admits(&l.allowed, &key.namespace, &id.1) {
                continue;
            }
            got = got.max(3);
            let listener = l.hostname.as_ref().unwrap_or(&any);
            let own = std::slice::from_ref(&any);
            let named = if route.obj.hostnames.is_empty() || id.0 == RouteKind::Tcp { own } else { &route.obj.hostnames };
            for host in named.iter().filter_map(|h| intersection(listener, h)) {
                got = 5;
                let spot = (n, host_order(&host));
                // Of a route that asks for nothing there is nothing to answer but 404. Several parentRefs may lead to one host.
                if route.obj.rules.is_empty() && route.obj.broken.is_none() || parts.contains_key(&spot) {
                    continue;
                }
                let Settled { http, l4 } = settled.get_or_insert_with(|| settle(join, id, route));
                let mut part = Part {
                    http: Arc::clone(http),
                    tls: Vec::new(),
                    tcp: Vec::new(),
                    origin: Arc::clone(&route.origin),
                    broken: route.obj.broken.clone(),
                };
                if id.0 == RouteKind::Tls && *host != *"*" {
                    let sni = [Arc::clone(&host)];
                    part.tls.extend(l4.iter().map(|to| TlsRule { sni: sni.to_vec(), port: None, route: Arc::clone(to) }));
                } else {
                    let rule = |to| TcpRule { port: None, destinations: Vec::new(), route: Arc::clone(to) };
                    part.tcp.extend(l4.iter().map(rule));
                }
                parts.insert(spot, part);
            }
        }
        let why = match got {
            0 => format!("the Gateway {key} has no listener of this name or port (NoMatchingParent)"),
            1 => format!("no such listener of {key} takes a {} (NotAllowedByListeners)", id.0.as_str()),
            2 => format!("no such listener of {key} lets namespace {} attach (NotAllowedByListeners)", id.1),
            3 => format!("no host name of the route fits such a listener of {key} (NoMatchingListenerHostname)"),
            _ => continue,
        };
        let field = format!("spec.parentRefs[{i}]");
        let message = format!("{why}; the route has no effect there");
        join.complain(Severity::Error, (&route.origin, p.line), &field, message, "correct the route or the listener", "parent");
    }
    parts
}

/// The certificates of a listener; why it cannot terminate TLS when one is missing.
fn terminate(join: &mut Join<'_>, key: &GatewayKey, origin: &Origin, l: &EdgeListener) -> Result<Option<ListenerTls>, String> {
    let refs = match &l.tls {
        None => return Ok(None),
        Some(EdgeTls::Passthrough) => return Ok(Some(ListenerTls::Passthrough)),
        Some(EdgeTls::Files { chain, key }) => {
            return Ok(Some(ListenerTls::Files { chain: Arc::clone(chain), key: Arc::clone(key) }));
        }
        Some(EdgeTls::Secrets(refs)) => refs,
    };
    let (mut pairs, mut broken) = (Vec::new(), None);
    for (i, secret) in refs.iter().enumerate() {
        match key_pair(join, key, secret) {
            Ok(pair) => pairs.push(pair),
            Err((why, code)) => {
                let field = format!("spec.listeners[{}].tls.certificateRefs[{i}]", l.number);
                let message = format!("{why}; port {} is not listened on", l.port);
                let fix =
                    if code == "ref-not-permitted" { "write a ReferenceGrant there" } else { "create or correct the Secret" };
                join.complain(Severity::Error, (origin, secret.line), &field, message, fix, code);
                broken.get_or_insert(why);
            }
        }
    }
    match broken {
        None => Ok(Some(ListenerTls::Terminate(pairs))),
        Some(why) => Err(why),
    }
}
/// Who issues the certificates of a listener's clients; why it cannot be listened on when that is missing.
fn clients(
    join: &mut Join<'_>,
    key: &GatewayKey,
    origin: &Origin,
    l: &EdgeListener,
) -> Result<Option<Arc<ClientCertificates>>, String> {
    let (mut roots, mut lists) = (String::new(), String::new());
    let mut take = |entries: &PemEntries, root: &Arc<str>| {
        roots.push_str(root.trim_end());
        roots.push('\n');
        if let Some(crl) = entries.lists() {
            lists.push_str(crl.trim_end());
            lists.push('\n');
        }
    };
    let own = &key.namespace;
    let (found, required, at) = match (&l.clients, &l.tls) {
        (None, _) => return Ok(None),
        (Some(EdgeClients::BesideCertificate { required }), Some(EdgeTls::Secrets(secrets))) => {
            let found = secrets.iter().try_for_each(|secret| {
                let ns = secret.namespace.as_ref().unwrap_or(own);
                let (entries, root) = beside(join, own, ns, &secret.name)?;
                take(entries, root);
                Ok::<(), String>(())
            });
            (found, *required, (format!("spec.listeners[{}].tls.options", l.number), l.line))
        }
        (Some(EdgeClients::Refs { refs, field }), _) => {
            let mut at = (field.to_string(), l.line);
            let found = refs.iter().enumerate().try_for_each(|(i, (ca, namespace))| {
                at = (format!("{field}[{i}]"), ca.line);
                let (entries, root) = authority(join, own, namespace.as_ref().unwrap_or(own), ca)?;
                take(entries, root);
                Ok::<(), String>(())
            });
            (found, true, at)
        }
        (Some(EdgeClients::BesideCertificate { .. }), _) => {
            (Err("the listener has no Secret with authorities".to_owned()), true, (String::from("spec.listeners"), l.line))
        }
    };
    match found {
        Ok(()) => {
            let crl = (!lists.is_empty()).then(|| lists.into());
            Ok(Some(Arc::new(ClientCertificates { roots: roots.into(), crl, required })))
        }
        Err(why) => {
            let message = format!("{why}; port {} is not listened on", l.port);
            join.complain(Severity::Error, (origin, at.1), &at.0, message, "create, correct or permit it", "ca");
            Err(why)
        }
    }
}
/// The authorities of the Secret of a certificate, or of the one beside it, as Istio names it.
fn beside<'a>(
    join: &mut Join<'a>,
    own: &Arc<str>,
    ns: &Arc<str>,
    name: &Arc<str>,
) -> Result<(&'a PemEntries, &'a Arc<str>), String> {
    let other = format!("{name}-cacert");
    for name in [&**name, &other] {
        let open = ns == own || granted(join, &kind_name(GATEWAY_GROUP, "Gateway"), own, "Secret", ns, name);
        let entries = join.find_secret(ns, name).filter(|_| open);
        if let Some(found) = entries.and_then(|entries| Some((entries, root_of(entries)?))) {
            return Ok(found);
        }
    }
    Err(format!("neither Secret {ns}/{name} nor {ns}/{other} has a certificate in `ca.crt` that clients' come from"))
}
/// The authorities of an object that is named.
fn authority<'a>(
    join: &mut Join<'a>,
    own: &Arc<str>,
    ns: &Arc<str>,
    ca: &CaRef,
) -> Result<(&'a PemEntries, &'a Arc<str>), String> {
    let kind = match &ca.kind {
        CaKind::ConfigMap => "ConfigMap",
        CaKind::Secret => "Secret",
        CaKind::Other(kind) => return Err(format!("a CA bundle cannot come from a {kind}")),
    };
    let name = &ca.name;
    if ns != own && !granted(join, &kind_name(GATEWAY_GROUP, "Gateway"), own, kind, ns, name) {
        return Err(format!("{kind} {ns}/{name} is not open to Gateways of {own} (RefNotPermitted)"));
    }
    let entries = if ca.kind == CaKind::ConfigMap { join.find_config_map(ns, name) } else { join.find_secret(ns, name) };
    let entries = entries.ok_or_else(|| format!("{kind} {ns}/{name} does not exist"))?;
    let root = root_of(entries).ok_or_else(|| format!("{kind} {ns}/{name} has no certificate in `ca.crt`"))?;
    Ok((entries, root))
}
fn root_of(entries: &PemEntries) -> Option<&Arc<str>> {
    entries.get("ca.crt").or_else(|| entries.get("cacert")).filter(|text| text.contains(CERTIFICATE_LINE))
}
fn key_pair(join: &mut Join<'_>, gateway: &GatewayKey, secret: &SecretRef) -> Result<KeyPair, (String, &'static str)> {
    let (own, name) = (&gateway.namespace, &secret.name);
    let ns = secret.namespace.as_ref().unwrap_or(own);
    if ns != own && !granted(join, &kind_name(GATEWAY_GROUP, "Gateway"), own, "Secret", ns, name) {
        return Err((format!("Secret {ns}/{name} is not open to Gateways of {own} (RefNotPermitted)"), "ref-not-permitted"));
    }
    let Some(entries) = join.find_secret(ns, name) else {
        return Err((format!("Secret {ns}/{name} does not exist"), "certificate"));
    };
    let chain = entries.get("tls.crt").or_else(|| entries.get("cert")).filter(|t| t.contains(CERTIFICATE_LINE));
    let key = entries.get("tls.key").or_else(|| entries.get("key")).filter(|t| t.contains("PRIVATE KEY-----"));
    match (chain, key) {
        (Some(chain), Some(key)) => Ok(KeyPair { chain: Arc::clone(chain), key: Arc::clone(key) }),
        (None, _) => Err((format!("Secret {ns}/{name} has no certificate in `tls.crt`"), "certificate")),
        (_, None) => Err((format!("Secret {ns}/{name} has no private key in `tls.key`"), "certificate")),
    }
}

#[cfg(test)]
mod tests;
