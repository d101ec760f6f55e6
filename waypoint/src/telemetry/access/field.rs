//! The fields of the access log: what each operator of Envoy's means here.
use super::write::Value;
use crate::facts::Facts;
use crate::telemetry::{Record, TcpRecord};
use http::{HeaderValue, Version};
use mesh_model::service::Service;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A field, named after Envoy's operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// `%START_TIME%`.
    StartTime,
    /// `%REQ(:METHOD)%`.
    Method,
    /// `%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%`: as the client wrote it.
    Path,
    /// `%PROTOCOL%`.
    Protocol,
    /// `%RESPONSE_CODE%`, 0 without an answer.
    ResponseCode,
    /// `%RESPONSE_FLAGS%`.
    ResponseFlags,
    /// `%RESPONSE_CODE_DETAILS%`.
    ResponseCodeDetails,
    /// `%CONNECTION_TERMINATION_DETAILS%`.
    ConnectionTerminationDetails,
    /// `%UPSTREAM_TRANSPORT_FAILURE_REASON%`.
    UpstreamTransportFailureReason,
    /// `%BYTES_RECEIVED%`.
    BytesReceived,
    /// `%BYTES_SENT%`.
    BytesSent,
    /// `%DURATION%`, in milliseconds.
    Duration,
    /// `%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%`.
    UpstreamServiceTime,
    /// `%REQ(X-FORWARDED-FOR)%`.
    ForwardedFor,
    /// `%REQ(USER-AGENT)%`.
    UserAgent,
    /// `%REQ(X-REQUEST-ID)%`.
    RequestId,
    /// `%REQ(:AUTHORITY)%`.
    Authority,
    /// `%UPSTREAM_HOST%`.
    UpstreamHost,
    /// `%UPSTREAM_CLUSTER_RAW%`, as istiod names it.
    UpstreamCluster,
    /// `%UPSTREAM_LOCAL_ADDRESS%`.
    UpstreamLocalAddress,
    /// `%DOWNSTREAM_LOCAL_ADDRESS%`.
    DownstreamLocalAddress,
    /// `%DOWNSTREAM_REMOTE_ADDRESS%`.
    DownstreamRemoteAddress,
    /// `%REQUESTED_SERVER_NAME%`.
    RequestedServerName,
    /// `%ROUTE_NAME%`.
    RouteName,
    /// Our own word for a refusal.
    Reason,
    /// How dry-run policies would have refused it.
    DryRun,
    /// The AUDIT policy that matched.
    Audit,
}

/// What a line tells.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// Of the connection it came over.
    pub facts: &'a Facts,
    /// What happened.
    pub told: Told<'a>,
    /// How long it took.
    pub took: Duration,
}
/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Told<'a> {
    /// A request.
    Request(&'a Record),
    /// A connection carried as bytes.
    Connection {
        /// Its facts.
        record: &'a TcpRecord,
        /// Bytes from the client.
        received: u64,
        /// Bytes to the client.
        sent: u64,
    },
}

impl Field {
    pub(super) fn value<'a>(self, line: &Line<'a>) -> Value<'a> {
        let Line { facts, told, took } = *line;
        // What both kinds have.
        let (start, flags, cluster, host, reason, noted) = match told {
            Told::Request(r) => (r.start_time, r.flags, &r.cluster, &r.host, r.reason, &r.noted),
            Told::Connection { record: r, .. } => (r.start_time, r.flags, &r.cluster, &r.host, r.reason, &r.noted),
        };
        match self {
            Self::StartTime => Value::Time(start.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()),
            Self::ResponseFlags => Value::Flags(flags),
            Self::Duration => Value::Number(millis(took)),
            Self::UpstreamHost => host.as_ref().map_or(Value::Absent, |h| {
                // Envoy reaches endpoints of the mesh through a listener of its own that makes the tunnel.
                Value::Address(if h.is_hbone() { "envoy://connect_originate/" } else { "" }, h.addr())
            }),
            Self::UpstreamCluster => cluster.as_ref().map_or(Value::Absent, |c| {
                let here = c.service().is_some_and(|s| is_bound(facts, s));
                let protocol = if matches!(told, Told::Request(_)) { "http" } else { "tcp" };
                match c.service().filter(|_| here).and_then(|_| inbound(c.name(), protocol)) {
                    Some(named) => named,
                    None => Value::Text(c.name()),
                }
            }),
            // Of a plain connection it is not known here.
            Self::UpstreamLocalAddress => match host {
                Some(h) if h.is_hbone() => Value::Text("envoy://internal_client_address/"),
                _ => Value::Absent,
            },
            Self::DownstreamLocalAddress => Value::Address("", facts.local),
            Self::DownstreamRemoteAddress => Value::Address("", facts.client),
            Self::RequestedServerName => facts.sni.as_deref().map_or(Value::Absent, text),
            Self::DryRun => noted.dry_run.as_deref().map_or(Value::Absent, text),
            Self::Audit => noted.audit.as_deref().map_or(Value::Absent, text),
            Self::Reason => reason.map_or(Value::Absent, |r| Value::Text(r.as_str())),
            _ => match told {
                Told::Request(record) => self.of_request(record),
                Told::Connection { record, received, sent } => self.of_connection(record, received, sent),
            },
        }
    }

    fn of_request(self, r: &Record) -> Value<'_> {
        match self {
            Self::Method => Value::Text(r.method.as_str()),
            Self::Path => text(&r.path),
            Self::Protocol => match r.protocol {
                Version::HTTP_2 => Value::Text("HTTP/2"),
                Version::HTTP_10 => Value::Text("HTTP/1.0"),
                _ => Value::Text("HTTP/1.1"),
            },
            Self::ResponseCode => Value::Number(u64::from(r.status)),
            Self::ResponseCodeDetails => text(&r.details),
            Self::UpstreamTransportFailureReason => text(&r.transport_failure),
            Self::BytesReceived => Value::Number(r.received.bytes()),
            Self::BytesSent => Value::Number(r.sent),
            Self::UpstreamServiceTime => r.upstream_time.map_or(Value::Absent, |t| Value::Digits(millis(t))),
            Self::ForwardedFor => header(r.forwarded_for.as_ref()),
            Self::UserAgent => header(r.user_agent.as_ref()),
            Self::RequestId => header(r.request_id.as_ref()),
            Self::Authority => text(&r.authority),
            Self::RouteName => r.route.as_ref().map_or(Value::Absent, |route| text(&route.name)),
            // A request does not end its connection; the rest is told for both alike.
            _ => Value::Absent,
        }
    }

    fn of_connection(self, r: &TcpRecord, received: u64, sent: u64) -> Value<'_> {
        match self {
            Self::ResponseCode => Value::Number(0),
            Self::ConnectionTerminationDetails => text(&r.details),
            Self::BytesReceived => Value::Number(received),
            Self::BytesSent => Value::Number(sent),
            Self::RouteName => r.route.as_deref().map_or(Value::Absent, text),
            _ => Value::Absent,
        }
    }
}

/// Whether a service is bound to the waypoint the addressed one is bound to: to this one.
fn is_bound(facts: &Facts, service: &Arc<Service>) -> bool {
    facts.service().is_some_and(|s| Arc::ptr_eq(s, service) || s.key == service.key || s.waypoints == service.waypoints)
}

fn text(text: &str) -> Value<'_> {
    if text.is_empty() { Value::Absent } else { Value::Text(text) }
}
fn header(value: Option<&HeaderValue>) -> Value<'_> {
    value.map_or(Value::Absent, |v| Value::Bytes(v.as_bytes()))
}
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// istiod's name at a waypoint for the cluster we call `outbound|port|subset|host`:
/// `inbound-vip|port|protocol[/subset]|host`.
fn inbound<'a>(name: &'a str, protocol: &'static str) -> Option<Value<'a>> {
    let (port, rest) = name.strip_prefix("outbound|")?.split_once('|')?;
    let (subset, host) = rest.split_once('|')?;
    Some(Value::Inbound { port, protocol, subset, host })
}
