//! Traces: which requests are told of as spans, with which tags, and where the spans go. Compiled when published.
//!
//! Whether a request is told of is decided as Envoy does it (`mutateTracingRequestHeader`): the sender's decision counts; where
//! there is none, the id of the request, which every proxy it passes reads alike.

use super::context::{Context, Incoming, TraceParent};
use super::format::Template;
use crate::l7::route::{BackendRef, HttpAction, HttpMatch, HttpRoute, PathMatch};
use crate::lb::below;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CLIENT_TRACE_ID: HeaderName = HeaderName::from_static("x-client-trace-id");
/// `x-envoy-force-trace`: somebody in the mesh wants this request told of.
pub const FORCE_TRACE: HeaderName = HeaderName::from_static("x-envoy-force-trace");

/// How the requests of one place are traced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracing {
    /// Where spans go.
    pub collector: Arc<Collector>,
    /// Share of the requests nobody decided about, of [`Tracing::SHARE`].
    pub sampling: u64,
    /// The share is taken by `x-request-id`; else by chance.
    pub by_request_id: bool,
    /// Whoever the request goes to is told of its span.
    pub propagates: bool,
    /// Tags that describe the proxy itself.
    pub istio_tags: bool,
    /// Tags by name.
    pub tags: Box<[(Arc<str>, Tag)]>,
    /// Most bytes of the path in `http.url`.
    pub longest_path: usize,
}
/// A tag of a span. One that comes out empty is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tag {
    /// This text; also the value of an environment variable.
    Literal(Arc<str>),
    /// The value of a header of the request, or this text.
    Header(HeaderName, Option<Arc<str>>),
    /// Envoy's format language.
    Format(Template),
}
/// Where spans go, in OTLP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Collector {
    /// Host name of its service.
    pub host: Arc<str>,
    /// Namespace whose view of the mesh decides what the host means; `None`: the proxy's own.
    pub namespace: Option<Arc<str>>,
    /// Port of the service.
    pub port: u16,
    /// How.
    pub over: Otlp,
    /// Limit for one batch.
    pub timeout: Duration,
    /// Sent with each batch.
    pub headers: Box<[(HeaderName, HeaderValue)]>,
    /// What the process is, beside its name: attributes of the resource.
    pub resource: Box<[(Arc<str>, Arc<str>)]>,
}
/// A transport of OTLP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Otlp {
    /// gRPC.
    Grpc,
    /// Protobuf over HTTP/1.1, to this path.
    Http(Arc<str>),
}

impl Tracing {
    /// The whole of [`Self::sampling`]: Envoy's precision, a hundredth of a percent.
    pub const SHARE: u64 = 10_000;
    /// Envoy's longest path in a tag.
    pub const LONGEST_PATH: usize = 256;

    /// The span of a request that arrives. Marks `x-request-id` where it says whether the request is told of. `carrier`: the
    /// span of the connection it came in, under which it is where it says nothing itself; `fresh`: random ids of a trace and a
    /// span; `draw`: a random number.
    pub fn begin(&self, headers: &mut HeaderMap, carrier: Option<TraceParent>, fresh: (u128, u64), draw: u64) -> Context {
        let said = Incoming::read(headers);
        let incoming = match carrier {
            Some(carrier) if said.ids.is_none() && said.sampled.is_none() => carrier.into(),
            _ => said,
        };
        let ours = self.decide(headers, draw);
        Context::under(incoming, fresh, incoming.sampled.unwrap_or(ours))
    }

    fn decide(&self, headers: &mut HeaderMap, draw: u64) -> bool {
        if !self.by_request_id {
            return below(draw, Self::SHARE) < self.sampling;
        }
        let Some(id) = headers.get(REQUEST_ID).map(HeaderValue::as_bytes) else { return false };
        // Envoy: an id that does not begin like a UUID is never told of.
        let head = id.get(..8).filter(|h| h.iter().all(u8::is_ascii_hexdigit)).and_then(|h| std::str::from_utf8(h).ok());
        let Some(number) = head.and_then(|h| u64::from_str_radix(h, 16).ok()) else { return false };
        // The version of a UUID, in whose place the decision stands: 4 where there is none.
        let is_uuid = id.len() == 36;
        if is_uuid && matches!(id.get(MARK), Some(b'9' | b'a' | b'b')) {
            return true;
        }
        let mark = if headers.contains_key(CLIENT_TRACE_ID) {
            b'b'
        } else if headers.contains_key(FORCE_TRACE) {
            b'a'
        } else if number % Self::SHARE < self.sampling {
            b'9'
        } else {
            return false;
        };
        let mut marked = id.to_vec();
        if let (true, Some(place)) = (is_uuid, marked.get_mut(MARK)) {
            *place = mark;
            if let Ok(value) = HeaderValue::from_bytes(&marked) {
                headers.insert(REQUEST_ID, value);
            }
        }
        true
    }
}
/// Where in `x-request-id` the decision stands.
const MARK: usize = 14;

/// What a span of a route is called, in Istio's words: `host:port/path*`, or the object's name where there are several hosts.
/// `port`: the one the client addressed.
pub fn operation(route: &HttpRoute, matches: Option<&HttpMatch>, port: u16) -> String {
    let mut name = String::with_capacity(64);
    let only = match &route.action {
        HttpAction::Forward(forward) => match &forward.backends[..] {
            [only] => Some(&only.to),
            _ => None,
        },
        HttpAction::Redirect(_) | HttpAction::Respond(_) => None,
    };
    // Writing to a String does not fail.
    let _ = match only {
        Some(BackendRef::Service(key)) => write!(name, "{}:{}", key.service.hostname, key.port),
        _ => write!(name, "{}:{port}", object(route)),
    };
    match matches.and_then(|m| m.path.as_ref()) {
        Some(PathMatch::Exact(path)) => name.push_str(path),
        Some(PathMatch::TextPrefix(prefix)) => {
            name.push_str(prefix);
            name.push('*');
        }
        Some(PathMatch::Regex(pattern)) => name.push_str(pattern.source()),
        Some(PathMatch::SegmentPrefix(_)) | None => name.push_str("/*"),
    }
    name
}
/// Name of the object a route is from.
fn object(route: &HttpRoute) -> &str {
    let object = route.origin.as_ref().and_then(|origin| origin.object.rsplit_once('/'));
    object.map_or(&*route.name, |(_, name)| name)
}

#[cfg(test)]
mod tests;
