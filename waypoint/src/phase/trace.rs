//! The request's span: which trace it is part of, what it is called, and what the endpoint is told of it.
//!
//! As Envoy without spans of its own for attempts: all of them carry the one span, and every request has one, told of or not.
use crate::facts::Scope;
use crate::phase::Exchange;
use http::Request;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use mesh_model::lb::redraw;
pub(crate) use mesh_model::telemetry::context::Context as Span;
use mesh_model::telemetry::tracing::{FORCE_TRACE, operation};

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
    ex.record.trace = Some(tracing.begin(&mut ex.parts.headers, (rand::random(), rand::random()), draw));
}

/// Names the span, once the route is known.
pub(crate) fn name(ex: &mut Exchange<'_>) {
    if ex.record.trace.is_some()
        && let Some(route) = &ex.record.route
    {
        ex.record.operation = Some(operation(route, ex.matched(), ex.conn.port()).into());
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
        && let Some(Ok(value)) = ex.record.operation.as_deref().map(HeaderValue::from_str)
    {
        headers.insert(OPERATION, value);
    }
}
