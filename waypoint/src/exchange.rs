//! One HTTP request and its response, from the head that arrived to the head that goes back. **Read [`run`] first**: it is
//! the whole order of things, one line a phase.
//!
//! Owns the order. Refuses nothing itself: a phase that has the answer gives it as [`Flow::Answer`]. Upstream: `http`.
//! Downstream: the phases, `upstream`, `telemetry`.
use crate::body::Body;
use crate::conn::Conn;
use crate::phase::replay::Replay;
use crate::phase::{admit, attempt, cors, expose, fault, forward, mirror, respond, rewrite, route};
use crate::telemetry::Record;
use ::http::request::Parts;
use ::http::{Request, Response};
use hyper::body::Incoming;
use mesh_model::Snapshot;
use mesh_model::l7::route::HttpAction;
use mesh_model::l7::{Backend, HttpMatch, HttpRoute, RouteTable};
use std::sync::Arc;

/// Whether the next phase runs.
pub enum Flow {
    /// Yes.
    Continue,
    /// No: this is the answer.
    Answer(Response<Body>),
}

/// What the phases know of one exchange.
pub struct Exchange<'c> {
    /// The connection it came over.
    pub conn: &'c Arc<Conn>,
    /// The version of the mesh that decides it, all of it (I1).
    pub snap: Arc<Snapshot>,
    /// The request's head.
    pub parts: Parts,
    /// The request's body, until `forward` takes it into `replay`.
    pub body: Body,
    /// The request's body for attempts and copies; `None` when it has none.
    pub(crate) replay: Option<Replay>,
    /// Normalised path, without the query.
    pub path: String,
    /// The authority as the client wrote it.
    pub authority: String,
    /// Base of all draws of this exchange (`mesh_model::lb::redraw` makes them independent).
    pub draw: u64,
    /// The route, once `route` chose it.
    pub route: Option<Arc<HttpRoute>>,
    /// The table and the number of the rule in it, for rewrites of the part that matched.
    pub rule: Option<(Arc<RouteTable>, usize)>,
    /// Index of the backend within the route, once `route` drew it.
    pub backend: Option<usize>,
    /// Headers CORS adds to the response.
    pub cors_headers: Option<::http::HeaderMap>,
    /// gRPC: refusals are answered as trailers-only responses.
    pub grpc: bool,
    /// What will be told about it.
    pub record: Record,
}
impl Exchange<'_> {
    /// The backend `route` chose.
    pub fn backend(&self) -> Option<&Backend> {
        let HttpAction::Forward(forward) = &self.route.as_ref()?.action else { return None };
        forward.backends.get(self.backend?)
    }
    /// The request's body from its beginning; `None` when it was sent already and not kept.
    pub(crate) fn read_body(&self) -> Option<Body> {
        self.replay.as_ref().map_or(Some(Body::Empty), Replay::reader)
    }
    /// What the chosen rule matched by.
    pub fn matched(&self) -> Option<&HttpMatch> {
        let (table, at) = self.rule.as_ref()?;
        table.http.get(*at).map(|r| &r.matches)
    }
}

/// The phases of one request, in the order of Envoy's waypoint chain (spec/waypoint §2.1).
pub async fn run(conn: &Arc<Conn>, request: Request<Incoming>) -> Response<Body> {
    let mut ex = admit::begin(conn, request);
    let answer = phases(&mut ex).await;
    let answer = respond::finish(&mut ex, answer);
    expose::tell(ex, answer)
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
    phase!(route::choose(ex)); //      routes of the host → rule → backend by weight
    phase!(fault::inject(ex).await); // delay, abort
    phase!(cors::apply(ex)); //        preflight answered, headers for the response remembered
    phase!(respond::direct(ex)); //    redirect, direct response
    phase!(forward::prepare(ex)); //   header edits, attempt and timeout headers
    phase!(rewrite::apply(ex)); //     path, authority
    mirror::copy(ex); //               shadows, fire and forget
    attempt::run(ex).await //          limits → endpoint → send → retry
}
