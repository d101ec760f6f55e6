//! Path and authority as the upstream sees them.
use crate::phase::Exchange;
use crate::telemetry::ORIGINAL_PATH;
use http::header::{HeaderName, HeaderValue};
use mesh_model::l7::HttpMatch;
use mesh_model::l7::rewrite::path as rewrite_path;
use mesh_model::l7::route::{HttpAction, Rewrite};
use std::sync::Arc;

/// `x-envoy-original-host`.
const ORIGINAL_HOST: HeaderName = HeaderName::from_static("x-envoy-original-host");

/// Applies the rewrites of the route and then of the backend.
pub(crate) fn apply(ex: &mut Exchange<'_>) {
    let Some(route) = ex.route.clone() else { return };
    let HttpAction::Forward(forward) = &route.action else { return };
    let of_backend = ex.backend_of(forward).and_then(|b| b.rewrite.as_ref());
    // As it was routed by: normalised, and told even where the rewrite leaves it as it is.
    if [forward.rewrite.as_ref(), of_backend].into_iter().flatten().any(|rewrite| rewrite.path.is_some()) {
        let value = match ex.parts.uri.query() {
            Some(query) => HeaderValue::try_from(format!("{}?{query}", ex.path)),
            None => HeaderValue::from_str(&ex.path),
        };
        if let Ok(value) = value {
            ex.parts.headers.insert(ORIGINAL_PATH, value);
        }
    }
    if let Some(rewrite) = &forward.rewrite {
        one(ex, rewrite);
    }
    if let Some(rewrite) = of_backend {
        one(ex, rewrite);
    }
}

fn one(ex: &mut Exchange<'_>, rewrite: &Rewrite) {
    let none = HttpMatch::default();
    if let Some(path) = rewrite.path.as_ref().and_then(|r| rewrite_path(r, ex.matched().unwrap_or(&none), &ex.path)) {
        ex.path = path;
    }
    if let Some(authority) = &rewrite.authority {
        authority_to(ex, authority);
    }
}

/// Another authority, with the old one remembered for the upstream.
pub(crate) fn authority_to(ex: &mut Exchange<'_>, authority: &Arc<str>) {
    if *ex.authority == **authority {
        return;
    }
    if let Ok(value) = HeaderValue::try_from(&*ex.authority) {
        ex.parts.headers.insert(ORIGINAL_HOST, value);
    }
    ex.authority.clear();
    ex.authority.push_str(authority);
}
