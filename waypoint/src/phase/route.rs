//! Which route: the table of the host, the first rule that matches, a backend by weight.
use crate::facts::Scope;
use crate::hosts::{self, Routes};
use crate::phase::respond;
use crate::phase::{Exchange, Flow};
use crate::telemetry::Flag;
use http::StatusCode;
use mesh_model::Snapshot;
use mesh_model::l7::route::{Dialect, HttpAction};
use mesh_model::l7::select::{Selected, select};
use mesh_model::l7::weights::choose as choose_backend;
use mesh_model::l7::{HttpRoute, RouteTable};
use mesh_model::lb::redraw;
use mesh_model::waypoint::Target;
use std::sync::Arc;

const DRAW_BACKEND: u64 = 11;

/// Chooses rule and backend, or answers 404 or 500.
pub(crate) fn choose(ex: &mut Exchange<'_>) -> Flow {
    let snap = Arc::clone(&ex.snap);
    let table = match routes(ex, &snap) {
        Routes::Table(table) => table,
        Routes::Plain => return plain(ex),
        Routes::NoHost => return not_found(ex),
    };
    let facts = ex.facts();
    let (route, rule) = match select(table, &facts) {
        Selected::Rule(rule, at) => (Arc::clone(&rule.route), Some((Arc::clone(table), at))),
        Selected::Default => return plain(ex),
        Selected::NotFound => return not_found(ex),
        Selected::Broken(why) => {
            ex.record.reason = Some(mesh_model::Reason::RouteUnusable);
            let text = format!("route_unusable: {why}");
            return Flow::Answer(respond::local(ex, StatusCode::INTERNAL_SERVER_ERROR, "", text));
        }
    };
    use_route(ex, route, rule)
}

/// The table for what was addressed.
fn routes<'s>(ex: &Exchange<'_>, snap: &'s Snapshot) -> Routes<'s> {
    match &ex.conn.scope {
        Scope::Mesh(Target::Service { service, .. }) => snap.find_routes(&service.key).map_or(Routes::Plain, Routes::Table),
        Scope::Mesh(Target::Workload { .. }) => Routes::Plain,
        Scope::Gateway { port, listener, secure } => {
            hosts::table(&ex.conn.shared.gateway, snap, *port, listener.as_deref(), *secure, &ex.authority)
        }
    }
}

/// No routes were written: what was addressed is meant.
fn plain(ex: &mut Exchange<'_>) -> Flow {
    match &ex.conn.plain {
        Some(route) => {
            let route = Arc::clone(route);
            use_route(ex, route, None)
        }
        None => not_found(ex),
    }
}

fn use_route(ex: &mut Exchange<'_>, route: Arc<HttpRoute>, rule: Option<(Arc<RouteTable>, usize)>) -> Flow {
    if let HttpAction::Forward(forward) = &route.action {
        let chosen = choose_backend(&forward.backends, forward.total_weight, redraw(ex.draw, DRAW_BACKEND));
        ex.backend = chosen.and_then(|b| forward.backends.iter().position(|x| std::ptr::eq(x, b)));
        if ex.backend.is_none() {
            ex.record.route = Some(Arc::clone(&route));
            let status = match route.dialect {
                Dialect::GatewayApi => StatusCode::INTERNAL_SERVER_ERROR,
                Dialect::Istio => StatusCode::SERVICE_UNAVAILABLE,
            };
            return Flow::Answer(respond::local(ex, status, "", "no_backend"));
        }
    }
    ex.record.route = Some(Arc::clone(&route));
    ex.rule = rule;
    ex.route = Some(route);
    Flow::Continue
}

fn not_found(ex: &mut Exchange<'_>) -> Flow {
    ex.record.flags.set(Flag::NoRouteFound);
    Flow::Answer(respond::local(ex, StatusCode::NOT_FOUND, "", "route_not_found"))
}
