//! The fields of the access log: what each operator of Envoy's means here.
use super::line::{Line, Told};
use super::write::Value;
use crate::facts::Facts;
use crate::telemetry::Record;
use http::{HeaderMap, Version};
use mesh_model::SpiffeId;
use mesh_model::service::Service;
use mesh_model::telemetry::format::{Address, GrpcStatus, HeaderRef, Name, Of};
use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// gRPC's statuses, by number (gRPC, "Status codes").
const GRPC: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

/// What an operator stands for in a line.
pub(super) fn value<'a>(of: &'a Of, line: &Line<'a>) -> Value<'a> {
    let facts = line.facts;
    match of {
        Of::StartTime(format) => Value::Time(format, line.start().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()),
        Of::ResponseFlags => Value::Flags(match line.told {
            Told::Request(r) => r.flags,
            Told::Connection { record: r, .. } => r.flags,
        }),
        Of::Duration => Value::Number(millis(line.took)),
        Of::BytesReceived => Value::Number(line.bytes().0),
        Of::BytesSent => Value::Number(line.bytes().1),
        Of::UpstreamHost => line.host().map_or(Value::Absent, |h| {
            // Envoy reaches endpoints of the mesh through a listener of its own that makes the tunnel.
            Value::Address(if h.is_hbone() { "envoy://connect_originate/" } else { "" }, h.addr())
        }),
        Of::UpstreamRemoteAddress(part) => line.host().map_or(Value::Absent, |h| address(*part, h.addr())),
        Of::UpstreamCluster => cluster(line),
        // Of a plain connection it is not known here.
        Of::UpstreamLocalAddress => match line.host() {
            Some(h) if h.is_hbone() => Value::Text("envoy://internal_client_address/"),
            _ => Value::Absent,
        },
        Of::UpstreamPeerUriSan => line.host().and_then(|h| h.identity()).map_or(Value::Absent, id),
        Of::DownstreamLocalAddress(part) => address(*part, facts.local),
        Of::DownstreamRemoteAddress(part) => address(*part, facts.client),
        Of::DownstreamPeerUriSan => facts.identity.as_ref().map_or(Value::Absent, id),
        Of::DownstreamLocalUriSan => facts.identity.as_ref().map_or(Value::Absent, |_| id(line.own)),
        Of::RequestedServerName => facts.sni.as_deref().map_or(Value::Absent, text),
        Of::Reason => line.reason().map_or(Value::Absent, |r| Value::Text(r.as_str())),
        Of::DryRun => line.noted().dry_run.as_ref().map_or(Value::Absent, made),
        Of::Audit => line.noted().audit.as_ref().map_or(Value::Absent, made),
        Of::Cel(expression) => expression.text(line).map_or(Value::Absent, |t| Value::Owned(t.into())),
        _ => match line.told {
            Told::Request(record) => of_request(of, line, record),
            Told::Connection { record, .. } => match of {
                Of::ResponseCode => Value::Number(0),
                Of::ConnectionTerminationDetails => text(&record.details),
                Of::RouteName => record.route.as_deref().map_or(Value::Absent, text),
                _ => Value::Absent,
            },
        },
    }
}

/// Put into words for this line.
fn made<'a>(what: &impl ToString) -> Value<'a> {
    Value::Owned(what.to_string().into())
}
/// A request does not end its connection: it has no `CONNECTION_TERMINATION_DETAILS`.
fn of_request<'a>(of: &'a Of, line: &Line<'a>, r: &'a Record) -> Value<'a> {
    match of {
        Of::Request(header) => request_header(header, line, r),
        Of::RequestWithoutQuery(header) => match request_header(header, line, r) {
            Value::Text(text) => Value::Text(text.split('?').next().unwrap_or_default()),
            Value::Bytes(bytes) => Value::Bytes(bytes.split(|b| *b == b'?').next().unwrap_or_default()),
            other => other,
        },
        Of::Response(header) => either(header, |name| match name {
            Name::Status => Value::Number(u64::from(r.status)),
            Name::Header(name) => from(r.response_headers.as_ref(), name),
            _ => Value::Absent,
        }),
        Of::Trailer(header) => either(header, |name| match name {
            Name::Header(name) => from(r.trailers.as_ref(), name),
            _ => Value::Absent,
        }),
        Of::UpstreamServiceTime => r.upstream_time.map_or(Value::Absent, |t| Value::Digits(millis(t))),
        Of::Protocol => Value::Text(protocol(r)),
        Of::ResponseCode => Value::Number(u64::from(r.status)),
        Of::ResponseCodeDetails => text(&r.details),
        // One word, so that lines of text can be taken apart.
        Of::UpstreamTransportFailureReason if r.transport_failure.contains(' ') => {
            Value::Owned(r.transport_failure.replace(' ', "_").into())
        }
        Of::UpstreamTransportFailureReason => text(&r.transport_failure),
        Of::UpstreamRequestAttemptCount => Value::Number(u64::from(r.attempts)),
        Of::RouteName => r.route.as_ref().map_or(Value::Absent, |route| text(&route.name)),
        Of::TraceId => r.trace.map_or(Value::Absent, |t| Value::Owned(format!("{:032x}", t.trace).into())),
        Of::SpanId => r.trace.map_or(Value::Absent, |t| Value::Owned(format!("{:016x}", t.span).into())),
        Of::GrpcStatus(shape) => r.grpc_status().map_or(Value::Absent, |status| match (shape, GRPC.get(usize::from(status))) {
            (GrpcStatus::Camel, Some((camel, _))) => Value::Text(camel),
            (GrpcStatus::Snake, Some((_, snake))) => Value::Text(snake),
            _ => Value::Number(u64::from(status)),
        }),
        _ => Value::Absent,
    }
}

/// The protocol of a request, in Envoy's words.
pub(super) fn protocol(r: &Record) -> &'static str {
    match r.protocol {
        Version::HTTP_2 => "HTTP/2",
        Version::HTTP_10 => "HTTP/1.0",
        _ => "HTTP/1.1",
    }
}

fn request_header<'a>(header: &'a HeaderRef, line: &Line<'a>, r: &'a Record) -> Value<'a> {
    either(header, |name| match name {
        Name::Method => Value::Text(r.method.as_str()),
        Name::Path => text(r.rewritten.as_deref().unwrap_or(&r.path)),
        Name::Authority => text(&r.authority),
        Name::Scheme => Value::Text(line.facts.scheme()),
        Name::Status => Value::Absent,
        Name::Header(name) => from(Some(&r.headers), name),
    })
}
fn either<'a>(header: &'a HeaderRef, value: impl Fn(&'a Name) -> Value<'a>) -> Value<'a> {
    match (value(&header.name), &header.or) {
        (Value::Absent, Some(or)) => value(or),
        (found, _) => found,
    }
}
/// A header's value; several of one name are joined with `,`. (Envoy tells the first, and joins those it keeps as one.)
fn from<'a>(headers: Option<&'a HeaderMap>, name: &http::HeaderName) -> Value<'a> {
    let mut all = headers.map(|h| h.get_all(name).iter()).into_iter().flatten();
    match (all.next(), all.next()) {
        (None, _) => Value::Absent,
        (Some(one), None) => Value::Bytes(one.as_bytes()),
        (Some(one), Some(two)) => {
            let mut joined = one.as_bytes().to_vec();
            for next in std::iter::once(two).chain(all) {
                joined.push(b',');
                joined.extend_from_slice(next.as_bytes());
            }
            Value::Owned(Cow::Owned(String::from_utf8_lossy(&joined).into_owned()))
        }
    }
}

fn cluster<'a>(line: &Line<'a>) -> Value<'a> {
    let Some(cluster) = line.cluster() else { return Value::Absent };
    let here = cluster.service().is_some_and(|s| is_bound(line.facts, s));
    let protocol = if line.request().is_some() { "http" } else { "tcp" };
    let named = here.then(|| inbound(cluster.name(), protocol)).flatten();
    named.unwrap_or(Value::Text(cluster.name()))
}
/// Whether a service is bound to the waypoint the addressed one is bound to: to this one.
fn is_bound(facts: &Facts, service: &Arc<Service>) -> bool {
    facts.service().is_some_and(|s| Arc::ptr_eq(s, service) || s.key == service.key || s.waypoints == service.waypoints)
}
/// istiod's name at a waypoint for the cluster we call `outbound|port|subset|host`:
/// `inbound-vip|port|protocol[/subset]|host`.
fn inbound<'a>(name: &'a str, protocol: &'static str) -> Option<Value<'a>> {
    let (port, rest) = name.strip_prefix("outbound|")?.split_once('|')?;
    let (subset, host) = rest.split_once('|')?;
    Some(Value::Inbound { port, protocol, subset, host })
}

fn text(text: &str) -> Value<'_> {
    if text.is_empty() { Value::Absent } else { Value::Text(text) }
}
fn id(id: &SpiffeId) -> Value<'_> {
    Value::Text(id.as_str())
}
fn address<'a>(part: Address, addr: SocketAddr) -> Value<'a> {
    match part {
        Address::Whole => Value::Address("", addr),
        Address::Ip => Value::Owned(addr.ip().to_canonical().to_string().into()),
        Address::Port => Value::Number(addr.port().into()),
    }
}
/// Whole milliseconds.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
