//! VirtualServices → the routes of one service: which apply, delegates, and what their destinations are.
//!
//! A VirtualService applies to a service it names when it is in the service's own namespace or in the namespace of the
//! service's waypoint (the primary one, where there is a canary), as at Istio's waypoint. Istio takes the first such object
//! alone; here all of them count, oldest first, then by name. `exportTo` only decides who may delegate to it.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::l7::headers::{BothEdits, HeaderEdits};
use mesh_model::l7::route::{
    Backend, BackendRef, ClusterKey, Dialect, Forward, HttpAction, HttpMatch, HttpRoute, HttpRule, Mirror, PathMatch,
    RetryPolicy, RouteTable, TcpRoute, TcpRule, TlsRule,
};
use mesh_model::l7::rules::Rules;
use mesh_model::l7::text::StringMatch;
use mesh_model::service::Service;

use super::super::destination_rule;
use super::super::http_text::exported;
use super::super::layer7::{Join, Need};
use super::super::object::{Kind, ObjectId};
use super::super::{Name, Slot};
use super::{Action, Dest, HttpEntry, L4Entry, MirrorTo, NamedMatch, Timeout, VirtualService, Weighted};
use crate::diagnostics::Severity;

/// HTTP rules a service may have. Delegates multiply the matches of two objects, and rules without port those of one by
/// the ports of the service; an API server would hold neither text, but a folder may.
const MAX_RULES: usize = 100_000;
/// Envoy's answer to a cluster that is not there.
const NO_CLUSTER: u16 = 503;

/// Adds the rules of every VirtualService that applies to a service.
pub(in super::super) fn add(join: &mut Join<'_>, service: &Arc<Service>, table: &mut RouteTable) {
    let mut found = join.virtual_services_of(&service.key.hostname);
    let waypoint = if found.is_empty() { None } else { join.t.waypoint_namespace(&service.key) };
    found.retain(|((ns, _), _)| *ns == service.key.namespace || Some(ns) == waypoint.as_ref());
    found.sort_by_key(|((ns, name), vs)| (vs.obj.created.is_empty(), &vs.obj.created, name, ns));
    let mut covered_by: Option<&Arc<Origin>> = None;
    for (id, slot) in found {
        table.origins.push(Arc::clone(&slot.origin));
        if let Some(why) = &slot.obj.broken {
            table.broken.get_or_insert_with(|| Arc::clone(why));
            continue;
        }
        let mut made = Making { join: &mut *join, service, id, slot, seen: BTreeMap::new() };
        if let Some(other) = covered_by.filter(|_| !slot.obj.http.is_empty()) {
            let message =
                format!("{} matches every request to {} already: no request gets here", other.object, service.key.hostname);
            made.complain("spec.http", 0, message, "remove one of them, or add a `match`", "unreachable");
        } else {
            let before = table.broken.is_some();
            if made.http(table) {
                covered_by = Some(&slot.origin);
            }
            if table.broken.is_some() && !before {
                return;
            }
        }
        made.tls(table);
        made.tcp(table);
    }
}

/// Complains about hosts that are no services, or not this object's to route.
pub(in super::super) fn check(join: &mut Join<'_>, name: &Name) {
    let Some(slot) = join.objects.virtual_services.get(name) else { return };
    for host in slot.obj.hosts.iter().filter(|h| !h.starts_with('*')) {
        join.need(Need::Host(Arc::clone(host)));
        let namespaces: Vec<Arc<str>> = join.t.hosts_out.get(host).into_iter().flatten().cloned().collect();
        let applies = namespaces.iter().any(|ns| {
            *ns == name.0 || {
                let key = mesh_model::service::ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(host) };
                join.t.waypoint_namespace(&key).is_some_and(|w| w == name.0)
            }
        });
        if applies {
            continue;
        }
        let (message, fix) = if namespaces.is_empty() {
            (format!("no service of the mesh has the host {host}"), hint(join, host))
        } else {
            (
                format!(
                    "{host} is a service of {}, and neither it nor its waypoint is in namespace {}",
                    namespaces.join(", "),
                    name.0
                ),
                "move the VirtualService to the namespace of the service or of its waypoint".to_owned(),
            )
        };
        join.complain(Severity::Warning, (&slot.origin, 0), "spec.hosts", message, &fix, "no-service");
    }
}
/// What may have been meant by a host that is not there.
fn hint(join: &mut Join<'_>, host: &str) -> String {
    let full = format!("{host}.svc.{}", join.t.view.cluster_domain);
    if join.t.hosts_out.contains_key(full.as_str()) {
        return format!("write {full}: only names without dots are completed");
    }
    "correct the host, or add the Service or ServiceEntry".into()
}

/// Host, subset and port of a destination.
type Asked = (Arc<str>, Option<Arc<str>>, Option<u16>);
/// The rules of one VirtualService, or of one that it delegates to, for one service.
struct Making<'j, 'a, 's> {
    join: &'j mut Join<'a>,
    service: &'s Arc<Service>,
    id: &'a Name,
    slot: &'a Slot<VirtualService>,
    /// What destinations were found to be, by host, subset and port.
    seen: BTreeMap<Asked, BackendRef>,
}
impl<'a> Making<'_, 'a, '_> {
    fn complain(&mut self, field: &str, line: u32, message: String, fix: &str, code: &'static str) {
        self.join.complain(Severity::Warning, (&self.slot.origin, line), field, message, fix, code);
    }

    /// Adds the HTTP rules; whether the last of them matches everything.
    fn http(&mut self, table: &mut RouteTable) -> bool {
        let slot = self.slot;
        for entry in &slot.obj.http {
            let Action::Delegate { to, field } = &entry.action else {
                if self.entry(entry, table) {
                    return true;
                }
                continue;
            };
            match self.delegate(to) {
                Ok(delegate) => {
                    let (id, slot) = delegate;
                    // From here on complaints are about the delegate, and its short names are of its own namespace.
                    let mut inner = Making { join: &mut *self.join, service: self.service, id, slot, seen: BTreeMap::new() };
                    let mut all = false;
                    for leaf in &slot.obj.http {
                        if let Some(merged) = merge(entry, leaf) {
                            all = inner.entry(&merged, table);
                            if all {
                                break;
                            }
                        }
                    }
                    table.origins.push(Arc::clone(&slot.origin));
                    if all {
                        return true;
                    }
                }
                Err((status, why)) => {
                    self.complain(
                        field,
                        entry.line,
                        why.clone(),
                        "create the VirtualService, or correct the reference",
                        "delegate",
                    );
                    // Istio leaves the rule out, which would hand its requests to the next one.
                    let gone = refusing(entry, self.origin(entry), status, why.into());
                    if self.rules(entry, |_| Some(Arc::clone(&gone)), false, table) {
                        return true;
                    }
                }
            }
        }
        false
    }
    /// The VirtualService a rule delegates to, or how its requests are answered.
    fn delegate(&mut self, to: &Name) -> Result<(&'a Name, &'a Slot<VirtualService>), (u16, String)> {
        let named = format!("{}/{}", to.0, to.1);
        self.join.need(Need::Object(ObjectId {
            kind: Kind::VirtualService,
            namespace: Arc::clone(&to.0),
            name: Arc::clone(&to.1),
        }));
        let Some((id, slot)) = self.join.objects.virtual_services.get_key_value(to) else {
            return Err((NO_CLUSTER, format!("the delegate {named} does not exist; requests that match are answered 503")));
        };
        if let Some(why) = &slot.obj.broken {
            return Err((500, format!("the delegate {named} cannot be used: {why}")));
        }
        if !slot.obj.delegate {
            return Err((
                NO_CLUSTER,
                format!("{named} has hosts of its own and is no delegate; requests that match are answered 503"),
            ));
        }
        let default = &self.join.default_exports().virtual_services;
        if !exported(&slot.obj.exports, &to.0, default, &self.id.0) {
            return Err((
                NO_CLUSTER,
                format!("the delegate {named} is not exported to namespace {}; requests that match are answered 503", self.id.0),
            ));
        }
        Ok((id, slot))
    }

    /// Adds the rules of one entry; whether one of them matches everything.
    fn entry(&mut self, entry: &HttpEntry, table: &mut RouteTable) -> bool {
        let by_port = self.needs_port(entry);
        let mut made: BTreeMap<Option<u16>, Arc<HttpRoute>> = BTreeMap::new();
        for port in self.ports(entry, by_port) {
            let route = Arc::new(self.route(entry, port));
            made.insert(port, route);
        }
        let of = |port: Option<u16>| made.get(&port).cloned();
        self.rules(entry, of, by_port, table)
    }
    /// The ports a route of this entry is made for: `None` when they are all alike.
    fn ports(&self, entry: &HttpEntry, by_port: bool) -> Vec<Option<u16>> {
        if !by_port {
            return vec![None];
        }
        let mut ports: Vec<Option<u16>> = self.service.ports.iter().map(|p| Some(p.port)).collect();
        ports.extend(entry.matches.iter().flatten().filter_map(|m| m.matches.port).map(Some));
        ports.sort_unstable();
        ports.dedup();
        ports
    }
    /// Whether a destination without port means the port the client addressed, so that there is a route per port.
    fn needs_port(&mut self, entry: &HttpEntry) -> bool {
        if self.service.ports.len() == 1 {
            return false;
        }
        let mirrors = entry.mirror.iter().chain(&entry.mirrors).map(|m| &m.to);
        let routes = match &entry.action {
            Action::Route(r) => r.as_slice(),
            _ => &[],
        };
        let hosts: Vec<Arc<str>> =
            routes.iter().map(|w| &w.to).chain(mirrors).filter(|d| d.port.is_none()).map(|d| Arc::clone(&d.host)).collect();
        hosts.iter().any(|h| self.join.find_service(h, &self.id.0).is_some_and(|s| s.ports.len() != 1))
    }
    /// One rule per match (and port, where routes differ by it); whether one of them matches everything.
    fn rules(
        &mut self,
        entry: &HttpEntry,
        route: impl Fn(Option<u16>) -> Option<Arc<HttpRoute>>,
        by_port: bool,
        table: &mut RouteTable,
    ) -> bool {
        let everything = [NamedMatch::default()];
        let mut all = false;
        for m in entry.matches.as_deref().unwrap_or(&everything) {
            // The condition on the port, and the port the route is made for.
            let ports: Vec<Option<u16>> = match m.matches.port {
                Some(p) => vec![Some(p)],
                None if by_port => self.service.ports.iter().map(|p| Some(p.port)).collect(),
                None => vec![None],
            };
            for port in ports {
                if table.http.len() >= MAX_RULES {
                    return self.too_many(table);
                }
                let Some(mut route) = route(port.filter(|_| by_port)) else { continue };
                if !m.name.is_empty() {
                    let name = format!("{}.{}", route.name, m.name).into();
                    Arc::make_mut(&mut route).name = name;
                }
                table.http.push(HttpRule { matches: HttpMatch { port, ..m.matches.clone() }.into(), route });
            }
            if m.matches == HttpMatch::default() {
                // Nothing after it is ever reached.
                all = true;
                break;
            }
        }
        all
    }
    /// Closes the host: which of the rules were meant to count cannot be known.
    fn too_many(&mut self, table: &mut RouteTable) -> bool {
        let why = format!("{} makes more than {MAX_RULES} rules for {}", self.slot.origin.object, self.service.key);
        let message = format!("{why}; requests to it are refused");
        self.join.complain(
            Severity::Error,
            (&self.slot.origin, 0),
            "spec.http",
            message,
            "write fewer matches",
            "too-many-rules",
        );
        table.http = Rules::default();
        table.broken.get_or_insert_with(|| why.into());
        true
    }
    fn origin(&self, entry: &HttpEntry) -> Arc<Origin> {
        Arc::new(Origin { line: entry.line, ..(*self.slot.origin).clone() })
    }

    /// The route of an entry for requests to one port.
    fn route(&mut self, entry: &HttpEntry, port: Option<u16>) -> HttpRoute {
        let mut headers = entry.headers.clone().unwrap_or_default();
        let action = match &entry.action {
            Action::Redirect(r) => HttpAction::Redirect(r.clone()),
            Action::Respond(r) => HttpAction::Respond(r.clone()),
            // Merged before; a delegate has none.
            Action::Delegate { .. } => unusable(500, "not merged".into()),
            Action::Route(routes) => {
                if entry.rewrite.as_ref().is_some_and(|r| r.authority.is_some()) {
                    headers.request.authority = None;
                }
                let single = routes.len() == 1;
                let backends: Vec<Backend> = routes
                    .iter()
                    .map(|w| Backend {
                        weight: w.weight,
                        headers: if single { BothEdits::default() } else { w.headers.clone() },
                        ..Backend::to(self.backend(&w.to, port))
                    })
                    .collect();
                // The edits of a single destination come after the route's, those of several before: Istio puts the former
                // into the route, and Envoy applies the more specific first.
                if let (true, Some(only)) = (single, routes.first()) {
                    let rewritten = entry.rewrite.as_ref().is_some_and(|r| r.authority.is_some());
                    headers = both(headers, &only.headers, rewritten);
                }
                let mirrors = entry
                    .mirror
                    .iter()
                    .chain(&entry.mirrors)
                    .filter(|m| m.fraction.per_million > 0)
                    .map(|MirrorTo { to, fraction }| Mirror { to: self.backend(to, port), fraction: *fraction })
                    .collect();
                HttpAction::Forward(Forward {
                    total_weight: backends.iter().map(|b| u64::from(b.weight)).sum(),
                    backends,
                    rewrite: entry.rewrite.clone(),
                    timeout: entry.timeout.and_then(|Timeout(t)| t),
                    retry: entry.retry.clone(),
                    mirrors,
                    session: None,
                })
            }
        };
        HttpRoute {
            name: Arc::clone(&entry.name),
            origin: Some(self.origin(entry)),
            action,
            headers,
            cors: entry.cors.clone(),
            fault: entry.fault.clone(),
            dialect: Dialect::Istio,
        }
    }

    /// What a destination is: its own port, the only one of its service, or the one the client addressed.
    fn backend(&mut self, to: &Dest, addressed: Option<u16>) -> BackendRef {
        let at = (Arc::clone(&to.host), to.subset.clone(), to.port.or(addressed));
        if let Some(found) = self.seen.get(&at) {
            return found.clone();
        }
        let found = self.find_backend(to, addressed);
        self.seen.insert(at, found.clone());
        found
    }
    fn find_backend(&mut self, to: &Dest, addressed: Option<u16>) -> BackendRef {
        let (host_field, line) = (format!("{}.host", to.field), to.line);
        let invalid = |why: String| BackendRef::Invalid { status: NO_CLUSTER, why: why.into() };
        let Some(service) = self.join.find_service(&to.host, &self.id.0) else {
            let why = format!("no service of the mesh has the host {}", to.host);
            let fix = hint(self.join, &to.host);
            self.complain(
                &host_field,
                line,
                format!("{why}; its share of requests is answered {NO_CLUSTER}"),
                &fix,
                "no-service",
            );
            return invalid(why);
        };
        let only = match service.ports.as_slice() {
            [one] => Some(one.port),
            _ => None,
        };
        // Where the service of the route has one port, that is the one addressed.
        let addressed = addressed.or(match self.service.ports.as_slice() {
            [one] => Some(one.port),
            _ => None,
        });
        let port = to.port.or(only).or(addressed);
        let Some(port) = port.filter(|p| service.port(*p).is_some()) else {
            let why = match port {
                Some(p) => format!("{} has no port {p}", to.host),
                None => format!("{} has no port", to.host),
            };
            let field = format!("{}.port", to.field);
            self.complain(
                &field,
                line,
                format!("{why}; its share of requests is answered {NO_CLUSTER}"),
                "write `port.number`",
                "no-port",
            );
            return invalid(why);
        };
        if let Some(subset) = &to.subset
            && !destination_rule::has_subset(self.join, service, subset)
        {
            let message = format!("no DestinationRule for {} has the subset {subset}: requests to it are answered 503", to.host);
            self.complain(&format!("{}.subset", to.field), line, message, "add the subset, or correct its name", "no-subset");
        }
        BackendRef::Service(ClusterKey { service: service.key.clone(), port, subset: to.subset.clone() })
    }

    fn tls(&mut self, table: &mut RouteTable) {
        let slot = self.slot;
        for entry in &slot.obj.tls {
            let by_port = self.l4_needs_port(entry);
            for m in &entry.matches {
                for port in self.l4_ports(m.port, by_port) {
                    let route = self.l4_route(&entry.route, port);
                    table.tls.push(TlsRule { sni: m.sni.clone(), port, route });
                }
            }
        }
    }
    fn tcp(&mut self, table: &mut RouteTable) {
        let slot = self.slot;
        for entry in &slot.obj.tcp {
            let by_port = self.l4_needs_port(entry);
            let everything = [super::L4Match::default()];
            let matches = if entry.matches.is_empty() { &everything[..] } else { &entry.matches };
            for m in matches {
                for port in self.l4_ports(m.port, by_port) {
                    let route = self.l4_route(&entry.route, port);
                    table.tcp.push(TcpRule { port, destinations: m.destinations.clone(), route });
                }
            }
        }
    }
    fn l4_needs_port(&mut self, entry: &L4Entry) -> bool {
        self.service.ports.len() != 1
            && entry.route.iter().any(|w| {
                w.to.port.is_none() && self.join.find_service(&w.to.host, &self.id.0).is_some_and(|s| s.ports.len() != 1)
            })
    }
    fn l4_ports(&self, written: Option<u16>, by_port: bool) -> Vec<Option<u16>> {
        match written {
            Some(p) => vec![Some(p)],
            None if by_port => self.service.ports.iter().map(|p| Some(p.port)).collect(),
            None => vec![None],
        }
    }
    fn l4_route(&mut self, routes: &[Weighted], port: Option<u16>) -> Arc<TcpRoute> {
        let backends: Vec<Backend> =
            routes.iter().map(|w| Backend { weight: w.weight, ..Backend::to(self.backend(&w.to, port)) }).collect();
        let total_weight = backends.iter().map(|b| u64::from(b.weight)).sum();
        Arc::new(TcpRoute { name: format!("{}/{}", self.id.0, self.id.1).into(), backends, total_weight })
    }
}

/// A route that answers `status`, for what cannot be followed.
fn refusing(entry: &HttpEntry, origin: Arc<Origin>, status: u16, why: Arc<str>) -> Arc<HttpRoute> {
    Arc::new(HttpRoute {
        name: Arc::clone(&entry.name),
        origin: Some(origin),
        action: unusable(status, why),
        headers: BothEdits::default(),
        cors: None,
        fault: None,
        dialect: Dialect::Istio,
    })
}
fn unusable(status: u16, why: Arc<str>) -> HttpAction {
    let forward = Forward::to(BackendRef::Invalid { status, why });
    HttpAction::Forward(Forward { retry: Some(Arc::new(RetryPolicy::none())), ..forward })
}

/// The edits of a route, then those of its only destination, as one list. A rewritten authority is nobody's to change.
fn both(route: BothEdits, destination: &BothEdits, rewritten: bool) -> BothEdits {
    fn one(mut a: HeaderEdits, b: &HeaderEdits) -> HeaderEdits {
        a.remove.extend(b.remove.iter().cloned());
        // What is set later takes away what was added before.
        a.add.retain(|(name, _)| b.set.iter().all(|(set, _)| set != name));
        a.set.extend(b.set.iter().cloned());
        a.add.extend(b.add.iter().cloned());
        a.authority = a.authority.or_else(|| b.authority.clone());
        a
    }
    let mut out =
        BothEdits { request: one(route.request, &destination.request), response: one(route.response, &destination.response) };
    if rewritten {
        out.request.authority = None;
    }
    out
}

/// A delegate's rule within the rule that delegates: both matches hold, and the delegate's own settings win. `None` when
/// they contradict each other.
fn merge(root: &HttpEntry, leaf: &HttpEntry) -> Option<HttpEntry> {
    let matches = match (&root.matches, &leaf.matches) {
        (None, leaf) => leaf.clone(),
        (root, None) => root.clone(),
        (Some(root), Some(leaf)) => {
            let mut out = Vec::new();
            for l in leaf {
                let before = out.len();
                // One more than are taken, so that it is told.
                out.extend(root.iter().filter_map(|r| both_matches(r, l)).take(MAX_RULES + 1 - before.min(MAX_RULES)));
                // As in Istio, each match of the delegate must lie within one of the root's, or its rule does not count.
                if out.len() == before {
                    return None;
                }
            }
            if out.is_empty() {
                return None;
            }
            Some(out)
        }
    };
    Some(HttpEntry {
        name: joined(&root.name, &leaf.name, '-'),
        line: leaf.line,
        matches,
        action: leaf.action.clone(),
        rewrite: leaf.rewrite.clone().or_else(|| root.rewrite.clone()),
        timeout: leaf.timeout.or(root.timeout),
        retry: leaf.retry.clone().or_else(|| root.retry.clone()),
        fault: leaf.fault.clone().or_else(|| root.fault.clone()),
        mirror: leaf.mirror.clone().or_else(|| root.mirror.clone()),
        mirrors: if leaf.mirrors.is_empty() { root.mirrors.clone() } else { leaf.mirrors.clone() },
        cors: leaf.cors.clone().or_else(|| root.cors.clone()),
        headers: leaf.headers.clone().or_else(|| root.headers.clone()),
    })
}
fn joined(root: &Arc<str>, leaf: &Arc<str>, by: char) -> Arc<str> {
    match (root.is_empty(), leaf.is_empty()) {
        (_, true) => Arc::clone(root),
        (true, false) => Arc::clone(leaf),
        (false, false) => format!("{root}{by}{leaf}").into(),
    }
}
/// What both matches say; `None` when the delegate's reaches outside the root's.
fn both_matches(root: &NamedMatch, leaf: &NamedMatch) -> Option<NamedMatch> {
    let (a, b) = (&root.matches, &leaf.matches);
    if a.ignore_case != b.ignore_case || a.port.is_some_and(|p| b.port.is_some_and(|q| p != q)) {
        return None;
    }
    let path = match (&a.path, &b.path) {
        (Some(root), Some(leaf)) if !path_within(root, leaf) => return None,
        (root, leaf) => leaf.as_ref().or(root.as_ref()).cloned(),
    };
    let pick = |root: &Option<StringMatch>, leaf: &Option<StringMatch>| match (root, leaf) {
        (Some(r), Some(l)) if !within(r, l) => Err(()),
        (r, l) => Ok(l.as_ref().or(r.as_ref()).cloned()),
    };
    Some(NamedMatch {
        name: joined(&root.name, &leaf.name, '-'),
        matches: HttpMatch {
            path,
            ignore_case: a.ignore_case,
            method: pick(&a.method, &b.method).ok()?,
            scheme: pick(&a.scheme, &b.scheme).ok()?,
            authority: pick(&a.authority, &b.authority).ok()?,
            headers: both_named(&a.headers, &b.headers)?,
            // Absences only add up.
            without_headers: a.without_headers.iter().chain(&b.without_headers).cloned().collect(),
            query: both_named(&a.query, &b.query)?,
            without_claims: a.without_claims.iter().chain(&b.without_claims).cloned().collect(),
            claims: both_named(&a.claims, &b.claims)?,
            port: b.port.or(a.port),
            grpc: None,
        },
    })
}
/// Conditions by name: the leaf's within the root's where both speak of one.
fn both_named<K: PartialEq + Clone>(root: &[(K, StringMatch)], leaf: &[(K, StringMatch)]) -> Option<Vec<(K, StringMatch)>> {
    let mut out = Vec::with_capacity(root.len() + leaf.len());
    for (name, r) in root {
        match leaf.iter().find(|(n, _)| n == name) {
            Some((_, l)) if !within(r, l) => return None,
            Some(_) => {}
            None => out.push((name.clone(), r.clone())),
        }
    }
    out.extend(leaf.iter().cloned());
    Some(out)
}
/// Whether all that `leaf` matches, `root` matches too, as far as Istio tells: patterns never do.
fn within(root: &StringMatch, leaf: &StringMatch) -> bool {
    match (root, leaf) {
        (StringMatch::Present, _) => true,
        (StringMatch::Exact(r), StringMatch::Exact(l)) => r == l,
        (StringMatch::Prefix(r), StringMatch::Exact(l) | StringMatch::Prefix(l)) => l.starts_with(&**r),
        _ => false,
    }
}
fn path_within(root: &PathMatch, leaf: &PathMatch) -> bool {
    match (root, leaf) {
        (PathMatch::Exact(r), PathMatch::Exact(l)) => r == l,
        (PathMatch::TextPrefix(r), PathMatch::Exact(l) | PathMatch::TextPrefix(l)) => l.starts_with(&**r),
        _ => false,
    }
}
