//! The request's span: which trace it is part of, what it is called, and what the endpoint is told of it.
//!
//! As Envoy without spans of its own for attempts: all of them carry the one span, and every request has one, told of or not.
use crate::facts::Scope;
use crate::phase::Exchange;
use crate::telemetry::Operation;
use foldhash::fast::FixedState;
use hashbrown::HashMap;
use http::Request;
use http::header::{HeaderMap, HeaderName};
use mesh_model::l7::{HttpMatch, HttpRoute};
use mesh_model::lb::redraw;
pub(crate) use mesh_model::telemetry::context::Context as Span;
use mesh_model::telemetry::context::TraceParent;
use mesh_model::telemetry::tracing::{FORCE_TRACE, operation};
use std::cell::RefCell;
use std::sync::Arc;

const DRAW_SAMPLE: u64 = 13;
/// `x-envoy-decorator-operation`: what a waypoint calls the span, for the client's own proxy.
const OPERATION: HeaderName = HeaderName::from_static("x-envoy-decorator-operation");

/// Begins the span, and decides whether it is told of.
pub(crate) fn begin(ex: &mut Exchange<'_>) {
    let Some(tracing) = ex.record.tracing() else { return };
    if matches!(ex.conn.scope, Scope::Gateway { .. }) {
        // Not for those outside to ask.
        ex.parts.headers.remove(FORCE_TRACE);
    }
    let draw = redraw(ex.draw, DRAW_SAMPLE);
    ex.record.trace = Some(tracing.begin(&mut ex.parts.headers, ex.conn.trace, (rand::random(), rand::random()), draw));
}

/// Names the span, once the route is known.
pub(crate) fn name(ex: &mut Exchange<'_>) {
    if ex.record.trace.is_some()
        && let Some(route) = &ex.record.route
    {
        ex.record.operation = Some(NAMES.with_borrow_mut(|names| names.get(route, ex.matched.as_ref(), ex.conn.port())));
    }
}

thread_local! {
    static NAMES: RefCell<Names> = RefCell::default();
}
/// The most names a thread remembers.
const MOST: usize = 1024;
/// Names of spans that were made lately. Routes and matches count by their address: an entry holds on to them.
#[derive(Default)]
struct Names(HashMap<(usize, usize, u16), Name, FixedState>);
struct Name {
    _of: (Arc<HttpRoute>, Option<Arc<HttpMatch>>),
    operation: Operation,
}
impl Names {
    fn get(&mut self, route: &Arc<HttpRoute>, matched: Option<&Arc<HttpMatch>>, port: u16) -> Operation {
        let key = (Arc::as_ptr(route).addr(), matched.map_or(0, |m| Arc::as_ptr(m).addr()), port);
        if self.0.len() >= MOST && !self.0.contains_key(&key) {
            self.0.clear();
        }
        let name = self.0.entry(key).or_insert_with(|| Name {
            _of: (Arc::clone(route), matched.cloned()),
            operation: operation(route, matched.map(|m| &**m), port).into(),
        });
        name.operation.clone()
    }
}

/// The span that a connection made for the request is part of, where it is told of.
pub(crate) fn of_connection(ex: &Exchange<'_>) -> Option<TraceParent> {
    match ex.record.trace {
        Some(trace) => (trace.sampled && propagates(ex)).then(|| trace.parent_of_others()),
        None => ex.conn.trace,
    }
}

/// Tells whoever the request goes to.
pub(crate) fn forward(ex: &mut Exchange<'_>) {
    if let Some(trace) = ex.record.trace
        && propagates(ex)
    {
        trace.inject(&mut ex.parts.headers);
    }
}
/// The same for a copy: it has a span of its own, which nobody is told of (Istio).
pub(crate) fn forward_copy(ex: &Exchange<'_>, headers: &mut HeaderMap) {
    if let Some(trace) = ex.record.trace
        && propagates(ex)
    {
        trace.silent_child(rand::random()).inject(headers);
    }
}
/// The span of a call made for the request, where it is traced.
pub(crate) fn of_call(ex: &Exchange<'_>) -> Option<Span> {
    ex.record.trace.map(|trace| trace.child(rand::random()))
}
/// Tells whoever is called.
pub(crate) fn forward_call<B>(ex: &Exchange<'_>, mut call: Request<B>, span: Option<Span>) -> Request<B> {
    if let Some(span) = span.filter(|_| propagates(ex)) {
        span.inject(call.headers_mut());
    }
    call
}
fn propagates(ex: &Exchange<'_>) -> bool {
    ex.record.tracing().is_some_and(|t| t.propagates)
}

/// Tells the client's proxy what the span is called.
pub(crate) fn answer(ex: &Exchange<'_>, headers: &mut HeaderMap) {
    if matches!(ex.conn.scope, Scope::Mesh(_))
        && let Some(value) = ex.record.operation.as_ref().and_then(|operation| operation.header.as_ref())
    {
        headers.insert(OPERATION, value.clone());
    }
}
