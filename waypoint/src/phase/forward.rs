//! What the upstream is told beside what the client said: header edits of backend and route. And the body is made
//! repeatable where something may read it twice.
use crate::body::Body;
use crate::phase::Exchange;
use crate::phase::replay::Replay;
use crate::phase::rewrite;
use mesh_model::l7::route::HttpAction;
use std::sync::Arc;

/// Edits the request's headers: the backend's first, then the route's (Envoy: most specific first).
pub(crate) fn prepare(ex: &mut Exchange<'_>) {
    let Some(route) = ex.route.clone() else { return };
    let HttpAction::Forward(forward) = &route.action else { return };
    let backend = ex.backend_of(forward);
    for edits in backend.iter().map(|b| &b.headers.request).chain([&route.headers.request]) {
        if edits.is_empty() {
            continue;
        }
        edits.apply(&mut ex.parts.headers);
        if let Some(authority) = &edits.authority {
            rewrite::authority_to(ex, authority);
        }
    }
    let mirrored = !forward.mirrors.is_empty() || backend.is_some_and(|b| !b.mirrors.is_empty());
    ex.replay = match std::mem::take(&mut ex.body) {
        Body::Empty => None,
        body => {
            let keep = if forward.retries(&ex.snap.defaults().retry).attempts > 0 || mirrored {
                ex.conn.shared.settings.retry_buffer
            } else {
                0
            };
            Some(Replay::new(body, keep, Arc::clone(&ex.record.received)))
        }
    };
}
