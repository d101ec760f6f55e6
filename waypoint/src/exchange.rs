//! One HTTP request and its response, from the head that arrived to the head that goes back. **Read [`run`] first**: it is
//! the whole order of things, one line a phase.
//!
//! Owns the order. Refuses nothing itself: a phase that has the answer gives it as [`Flow::Answer`]. Upstream: `http`.
//! Downstream: the phases, `upstream`, `telemetry`.
use crate::body::Body;
use crate::conn::Conn;
use crate::phase::{
    Exchange, Flow, admit, attempt, authenticate, authorize, buffer, compress, cors, custom, expose, fault, forward, limit,
    mirror, respond, rewrite, route, trace, treat,
};
use crate::telemetry::Flag;
use ::http::{Request, Response};
use hyper::body::Incoming;
use mesh_model::l7::limit::Point;
use std::sync::Arc;

/// The phases of one request, in the order of Envoy's waypoint chain (spec/waypoint §2.1).
pub async fn run(conn: &Arc<Conn>, request: Request<Incoming>) -> Response<Body> {
    let mut unanswered = expose::Unanswered::new(admit::begin(conn, request));
    let Some(ex) = unanswered.get() else { return Response::default() };
    let answer = phases(ex).await;
    let mut answer = respond::finish(ex, answer);
    limit::tell(ex, answer.headers_mut()); // x-ratelimit-*
    treat::dress(ex, &mut answer); //         headers of TrafficPolicies, cache-control
    trace::answer(ex, answer.headers_mut());
    let answer = compress::apply(ex, answer);
    match unanswered.take() {
        Some(ex) => expose::tell(ex, answer),
        None => answer,
    }
}

/// A request whose stream is reset for its head, before the first phase: told, as Envoy tells it, and not answered.
pub fn reset(conn: &Arc<Conn>, request: Request<Incoming>, details: &'static str) {
    expose::tell_unanswered(admit::begin(conn, request), Flag::DownstreamProtocolError, details);
}

async fn phases(ex: &mut Exchange<'_>) -> Response<Body> {
    macro_rules! phase {
        ($flow:expr) => {
            if let Flow::Answer(answer) = $flow {
                return answer;
            }
        };
    }
    phase!(admit::check(ex)); //       host, path, hop-by-hop headers, request id, forwarded-for
    trace::begin(ex); //               which trace it is part of
    phase!(treat::find(ex)); //        what TrafficPolicies say
    phase!(limit::check(ex, Point::BeforeAuthentication)); // rate limits that count everybody
    compress::prepare(ex); //          what the client accepts
    phase!(custom::check(ex).await); // external authorizers, who see the token
    phase!(authenticate::check(ex).await); // token, claims into headers
    let routed = route::choose(ex); // routes of the host → rule → backend by weight
    trace::name(ex); //                what its span is called
    phase!(authorize::check(ex)); //   policies of what was addressed
    phase!(route::check(ex, routed)); // no route: told to those alone who may ask
    phase!(fault::inject(ex).await); // delay, abort
    phase!(cors::apply(ex)); //        preflight answered, headers for the response remembered
    phase!(limit::check(ex, Point::AfterAuthorization)); // rate limits that count who may call
    phase!(respond::direct(ex)); //    redirect, direct response
    phase!(buffer::fill(ex).await); // the body, up to its largest size
    forward::prepare(ex); //           header edits, attempt and timeout headers
    rewrite::apply(ex); //             path, authority
    trace::forward(ex); //             its span, for the endpoint
    mirror::copy(ex).await; //         shadows, fire and forget
    attempt::run(ex).await //          limits → endpoint → send → retry
}
