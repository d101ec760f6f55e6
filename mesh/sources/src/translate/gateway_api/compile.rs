//! Rules as written → the model's routes.

use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::l7::route::{
    Backend, BackendRef, ClusterKey, Dialect, DirectResponse, Forward, HttpAction, HttpRoute, Mirror, TcpRoute,
};

use super::super::object::ObjectId;
use super::filter::Filters;
use super::reference::Target;
use super::route::{Action, At, RouteKind, Rule, Written};

/// What the rules of one object have in common.
pub(super) struct Compile<'a> {
    pub(super) kind: RouteKind,
    pub(super) id: &'a ObjectId,
    pub(super) origin: &'a Arc<Origin>,
}

/// The answer of the Gateway API where nothing can be forwarded.
pub(super) fn invalid(why: impl Into<Arc<str>>) -> BackendRef {
    BackendRef::Invalid { status: 500, why: why.into() }
}

impl Compile<'_> {
    /// The `i`-th rule.
    pub(super) fn rule(&self, i: usize, rule: Written) -> Rule {
        let name = rule.name.unwrap_or_else(|| format!("{}.{}.{i}", self.id.namespace, self.id.name).into());
        let mut targets = Vec::new();
        let mut backends = Vec::new();
        for b in rule.backends.into_iter().filter(|b| b.weight > 0) {
            let n = backends.len();
            let to = if let Some(why) = b.filters.refused {
                invalid(why)
            } else {
                let to = assumed(&b.to);
                targets.push((At::Backend(n), b.to));
                to
            };
            let mirrors = copies(b.filters.mirrors, &mut targets, |m| At::BackendMirror(n, m));
            backends.push(Backend { to, weight: b.weight, headers: b.filters.headers, rewrite: b.filters.rewrite, mirrors });
        }
        // At most a few hundred weights of at most a million: no overflow.
        let total_weight = backends.iter().map(|b| u64::from(b.weight)).sum();
        if matches!(self.kind, RouteKind::Tcp | RouteKind::Tls) {
            return Rule {
                matches: rule.matches,
                action: Action::L4(Arc::new(TcpRoute { name, backends, total_weight })),
                targets,
            };
        }
        let Filters { headers, redirect, rewrite, mirrors, cors, refused } = rule.filters;
        let action = match redirect {
            Some(redirect) if refused.is_none() => HttpAction::Redirect(redirect),
            _ if refused.is_some() || total_weight == 0 => {
                HttpAction::Respond(DirectResponse { status: 500, body: Arc::default() })
            }
            _ => HttpAction::Forward(Forward {
                mirrors: copies(mirrors, &mut targets, At::Mirror),
                backends,
                total_weight,
                rewrite,
                timeout: rule.timeout,
                retry: rule.retry,
                session: rule.session.map(|s| s.session(&format!("{}/{name}", self.kind.as_str()))),
            }),
        };
        if !matches!(action, HttpAction::Forward(_)) {
            targets.clear();
        }
        let route = HttpRoute {
            name,
            origin: Some(Arc::clone(self.origin)),
            action,
            headers,
            cors,
            fault: None,
            dialect: Dialect::GatewayApi,
        };
        Rule { matches: rule.matches, action: Action::Http(Arc::new(route)), targets }
    }
}

/// The backend if all is well with it; the join looks.
fn assumed(to: &Target) -> BackendRef {
    BackendRef::Service(ClusterKey { service: to.key.clone(), port: to.port.unwrap_or(0), subset: None })
}
fn copies(
    mirrors: Vec<(Target, mesh_model::l7::route::Fraction)>,
    targets: &mut Vec<(At, Target)>,
    at: impl Fn(usize) -> At,
) -> Vec<Mirror> {
    let mut out = Vec::new();
    for (to, fraction) in mirrors.into_iter().filter(|(_, f)| f.per_million > 0) {
        let mirror = Mirror { to: assumed(&to), fraction };
        targets.push((at(out.len()), to));
        out.push(mirror);
    }
    out
}

/// The reference at a place of an action.
fn reference(route: &mut HttpRoute, at: At) -> Option<&mut BackendRef> {
    let HttpAction::Forward(forward) = &mut route.action else { return None };
    match at {
        At::Backend(i) => forward.backends.get_mut(i).map(|b| &mut b.to),
        At::Mirror(i) => forward.mirrors.get_mut(i).map(|m| &mut m.to),
        At::BackendMirror(i, m) => forward.backends.get_mut(i)?.mirrors.get_mut(m).map(|m| &mut m.to),
    }
}

/// The action with the references that are not as assumed. Copies to nowhere are left out.
pub(super) fn settle_http(route: &Arc<HttpRoute>, other: Vec<(At, BackendRef)>) -> Arc<HttpRoute> {
    if other.is_empty() {
        return Arc::clone(route);
    }
    let mut route = HttpRoute::clone(route);
    for (at, to) in other {
        if let Some(here) = reference(&mut route, at) {
            *here = to;
        }
    }
    if let HttpAction::Forward(forward) = &mut route.action {
        let usable = |m: &Mirror| matches!(m.to, BackendRef::Service(_));
        forward.mirrors.retain(usable);
        for b in &mut forward.backends {
            b.mirrors.retain(usable);
        }
    }
    Arc::new(route)
}
/// The same for TCP and TLS.
pub(super) fn settle_l4(route: &Arc<TcpRoute>, other: Vec<(At, BackendRef)>) -> Arc<TcpRoute> {
    if other.is_empty() {
        return Arc::clone(route);
    }
    let mut route = TcpRoute::clone(route);
    for (at, to) in other {
        if let At::Backend(i) = at
            && let Some(b) = route.backends.get_mut(i)
        {
            b.to = to;
        }
    }
    Arc::new(route)
}
