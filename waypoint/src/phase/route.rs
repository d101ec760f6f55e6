//! Which route: the table of the host, the first rule that matches, a backend by weight.
use crate::facts::Scope;
use crate::phase::respond;
use crate::phase::{Exchange, Flow};
use crate::telemetry::Flag;
use http::StatusCode;
use mesh_model::hosts::{self, Routes, host_of};
use mesh_model::in_force::InForce;
use mesh_model::l7::route::{Dialect, Forward, HttpAction};
use mesh_model::l7::select::{Selected, host_matches, select};
use mesh_model::l7::session;
use mesh_model::l7::weights::choose as choose_backend;
use mesh_model::l7::{HttpMatch, HttpRoute};
use mesh_model::lb::redraw;
use mesh_model::waypoint::Target;
use mesh_model::{Reason, Snapshot};
use std::borrow::Cow;
use std::sync::Arc;

const DRAW_BACKEND: u64 = 11;

/// Why there is no backend for a request.
pub(crate) enum Unrouted {
    /// No rule matches.
    NotFound,
    /// The rules of the host cannot be used.
    Broken(Arc<str>),
    /// The rule that matches leads nowhere.
    NoBackend(Dialect),
}

/// Chooses rule and backend, unless that was done before external authorizers changed the request. A token, verified since,
/// has it done again (as in Envoy): rules may ask for its claims.
pub(crate) fn choose(ex: &mut Exchange<'_>) -> Result<(), Unrouted> {
    if let Some(routed) = ex.routed.take().filter(|_| ex.token.is_none()) {
        return routed;
    }
    let (snap, rules) = (Arc::clone(&ex.snap), Arc::clone(&ex.rules));
    let table = match routes(ex, &snap, &rules) {
        Routes::Table(table) => table,
        Routes::Plain => return plain(ex),
        Routes::NoHost => return Err(Unrouted::NotFound),
    };
    let facts = ex.facts();
    let (route, matched) = match select(table, &facts) {
        Selected::Rule(rule) => (Arc::clone(&rule.route), Some(Arc::clone(&rule.matches))),
        Selected::Default => return plain(ex),
        Selected::NotFound => return Err(Unrouted::NotFound),
        Selected::Broken(why) => return Err(Unrouted::Broken(Arc::clone(why))),
    };
    use_route(ex, route, matched)
}

/// Answers 404, 500 or 503 where there is no backend.
pub(crate) fn check(ex: &mut Exchange<'_>, routed: Result<(), Unrouted>) -> Flow {
    let (status, details) = match routed {
        Ok(()) => return Flow::Continue,
        Err(Unrouted::NotFound) => {
            ex.record.flags.set(Flag::NoRouteFound);
            (StatusCode::NOT_FOUND, "route_not_found".into())
        }
        Err(Unrouted::Broken(why)) => {
            ex.record.reason = Some(Reason::RouteUnusable);
            ex.record.flags.set(Flag::NoRouteFound);
            // As to a cluster that is not there.
            (StatusCode::SERVICE_UNAVAILABLE, Cow::Owned(format!("route_unusable: {why}")))
        }
        Err(Unrouted::NoBackend(Dialect::GatewayApi)) => (StatusCode::INTERNAL_SERVER_ERROR, "no_backend".into()),
        Err(Unrouted::NoBackend(Dialect::Istio)) => (StatusCode::SERVICE_UNAVAILABLE, "no_backend".into()),
    };
    Flow::Answer(respond::local(ex, status, "", details))
}

/// The table for what was addressed.
fn routes<'s>(ex: &Exchange<'_>, snap: &'s Snapshot, rules: &'s InForce) -> Routes<'s> {
    match &ex.conn.scope {
        // A wildcard is for its own hosts: a name of the client's choice leads nowhere else.
        Scope::Mesh(Target::Service { service, .. })
            if service.key.hostname.starts_with("*.") && !host_matches(&service.key.hostname, host_of(&ex.authority)) =>
        {
            Routes::NoHost
        }
        Scope::Mesh(Target::Service { .. }) => rules.routes.as_ref().map_or(Routes::Plain, Routes::Table),
        Scope::Mesh(Target::Workload { .. }) => Routes::Plain,
        // Never HTTP.
        Scope::Network { .. } => Routes::NoHost,
        Scope::Gateway { port, listener, secure } => {
            hosts::table(&ex.conn.shared.gateway, snap, *port, listener.as_deref(), *secure, &ex.authority)
        }
    }
}

/// No routes were written: what was addressed is meant.
fn plain(ex: &mut Exchange<'_>) -> Result<(), Unrouted> {
    match &ex.conn.plain {
        Some(route) => {
            let route = Arc::clone(route);
            use_route(ex, route, None)
        }
        None => Err(Unrouted::NotFound),
    }
}

fn use_route(ex: &mut Exchange<'_>, route: Arc<HttpRoute>, matched: Option<Arc<HttpMatch>>) -> Result<(), Unrouted> {
    ex.record.route = Some(Arc::clone(&route));
    if let HttpAction::Forward(forward) = &route.action {
        ex.backend = of_session(ex, forward).or_else(|| {
            let chosen = choose_backend(&forward.backends, forward.total_weight, redraw(ex.draw, DRAW_BACKEND));
            chosen.and_then(|b| forward.backends.iter().position(|x| std::ptr::eq(x, b)))
        });
        if ex.backend.is_none() {
            return Err(Unrouted::NoBackend(route.dialect));
        }
    }
    ex.matched = matched;
    ex.route = Some(route);
    Ok(())
}

/// The backend that a session stays with, whatever the weights are.
fn of_session(ex: &Exchange<'_>, forward: &Forward) -> Option<usize> {
    let session = forward.session.as_ref().filter(|_| forward.backends.len() > 1)?;
    session::kept(session.asked(&ex.parts.headers, ex.record.begun())?, &forward.backends)
}
