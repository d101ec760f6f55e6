//! The phases of one exchange, one file each, and what they share; `exchange::run` has their order.
pub(crate) mod admit;
pub(crate) mod attempt;
pub(crate) mod authenticate;
pub(crate) mod authorize;
pub(crate) mod buffer;
pub(crate) mod compress;
pub(crate) mod cors;
pub(crate) mod custom;
pub(crate) mod expose;
pub(crate) mod fault;
pub(crate) mod forward;
pub(crate) mod limit;
pub(crate) mod mirror;
pub(crate) mod replay;
pub(crate) mod respond;
pub(crate) mod rewrite;
pub(crate) mod route;
pub(crate) mod trace;
pub(crate) mod treat;

use crate::body::Body;
use crate::conn::Conn;
use crate::telemetry::Record;
use crate::upgrade::Switched;
use http::header::HeaderName;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Response, Uri};
use mesh_model::Snapshot;
use mesh_model::in_force::InForce;
use mesh_model::l7::compression::Coding;
use mesh_model::l7::limit::{Limit, Taken};
use mesh_model::l7::route::{Claims, Forward, HttpAction};
use mesh_model::l7::treatment::Treatments;
use mesh_model::l7::{Backend, HttpMatch, HttpRoute, RequestFacts};
use mesh_tokens::Verified;
use replay::Replay;
use std::str::FromStr;
use std::sync::Arc;
use tokio::time::Instant;

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
    /// What that version says of where it goes.
    pub rules: Arc<InForce>,
    /// The request's head.
    pub parts: Parts,
    /// The request's body, until `forward` takes it into `replay`.
    pub body: Body,
    /// The request's body for attempts and copies; `None` when it has none.
    pub(crate) replay: Option<Replay>,
    /// Normalised path, without the query.
    pub path: String,
    /// `https` or `http`: what the client says it used, else what it used here.
    pub scheme: &'static str,
    /// The authority as the client wrote it.
    pub authority: String,
    /// Base of all draws of this exchange (`mesh_model::lb::redraw` makes them independent).
    pub draw: u64,
    /// The route, once `route` chose it.
    pub route: Option<Arc<HttpRoute>>,
    /// What the chosen rule matched by, for rewrites of the part that matched.
    pub matched: Option<Arc<HttpMatch>>,
    /// Index of the backend within the route, once `route` drew it.
    pub backend: Option<usize>,
    /// The verified token.
    pub(crate) token: Option<Verified>,
    /// Headers CORS adds to the response.
    pub cors_headers: Option<HeaderMap>,
    /// External authorizers that were asked, and let it pass.
    pub(crate) asked: Vec<Arc<str>>,
    /// What they change of the response's headers.
    pub(crate) granted: Vec<custom::Edit>,
    /// What came of choosing a route before they changed the request.
    pub(crate) routed: Option<Result<(), route::Unrouted>>,
    /// The cookie by which the client will be known again, for what the endpoint answers.
    pub(crate) sticky: Option<HeaderValue>,
    /// What tells the client the endpoint its session stays with.
    pub(crate) session: Option<(HeaderName, HeaderValue)>,
    /// What TrafficPolicies say of it.
    pub treatments: Treatments,
    /// Of the limits that counted it the one nearest to its end, and what it had left.
    pub limited: Option<(Arc<Limit>, Taken)>,
    /// How the answer is compressed, if it can be.
    pub coding: Option<Coding>,
    /// What policies are asked again of a request that becomes something else.
    pub(crate) upgrade: Option<Box<authorize::Kept>>,
    /// Both sides of it, once the endpoint agreed.
    pub(crate) switched: Option<Switched>,
    /// It came as an extended CONNECT of HTTP/2.
    pub(crate) connects: bool,
    /// gRPC: refusals are answered as trailers-only responses.
    pub grpc: bool,
    /// What will be told about it.
    pub record: Record,
}
impl Exchange<'_> {
    /// The request as rules see it.
    pub(crate) fn facts(&self) -> RequestFacts<'_> {
        RequestFacts {
            method: &self.parts.method,
            scheme: self.scheme,
            authority: &self.authority,
            path: &self.path,
            query: self.parts.uri.query(),
            headers: &self.parts.headers,
            port: self.conn.port(),
            claims: self.token.as_ref().map(|t| t as &dyn Claims),
        }
    }
    /// Replaces the query of the request's target, here and in what will be told about it.
    pub(crate) fn set_query(&mut self, query: &str) -> Result<(), http::Error> {
        let path = self.parts.uri.path();
        let target = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        let target = PathAndQuery::try_from(target)?;
        self.record.path = target.as_str().into();
        let mut uri = self.parts.uri.clone().into_parts();
        uri.path_and_query = Some(target);
        self.parts.uri = Uri::from_parts(uri)?;
        Ok(())
    }
    /// The backend `route` chose.
    pub fn backend(&self) -> Option<&Backend> {
        let HttpAction::Forward(forward) = &self.route.as_ref()?.action else { return None };
        self.backend_of(forward)
    }
    /// The backend `route` chose, of its own route's action.
    pub(crate) fn backend_of<'f>(&self, forward: &'f Forward) -> Option<&'f Backend> {
        forward.backends.get(self.backend?)
    }
    /// When the last of the request's body came, if it has; `begun` where it has none.
    pub(crate) fn body_ended(&self, begun: Instant) -> Option<Instant> {
        self.replay.as_ref().map_or(Some(begun), Replay::ended_at)
    }
    /// Whether [`Self::read_body`] would give one.
    pub(crate) fn body_is_whole(&self) -> bool {
        self.replay.as_ref().is_none_or(Replay::is_whole)
    }
    /// Takes the request's body back from the attempt that had it: whether that can be, because all of it was kept.
    pub(crate) fn take_body_back(&self) -> bool {
        self.replay.as_ref().is_none_or(Replay::take_back)
    }
    /// The request's body from its beginning, for an attempt; `None` when it was sent already and not kept.
    pub(crate) fn read_body(&self) -> Option<Body> {
        self.replay.as_ref().map_or(Some(Body::Empty), Replay::reader)
    }
    /// The same, for a copy of the request.
    pub(crate) fn copy_body(&self) -> Option<Body> {
        self.replay.as_ref().map_or(Some(Body::Empty), Replay::copy)
    }
    /// What the chosen rule matched by.
    pub fn matched(&self) -> Option<&HttpMatch> {
        self.matched.as_deref()
    }
}

/// `grpc-status` of headers or trailers.
pub(crate) fn grpc_status<N: FromStr>(headers: &HeaderMap) -> Option<N> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// The HTTP status a gRPC status stands for (`google.rpc.Code`, as Envoy maps it).
pub(crate) fn http_of_grpc(status: u16) -> u16 {
    match status {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}
