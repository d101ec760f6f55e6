//! What is told about traffic, as the Telemetry API and MeshConfig say: access logs, tags of metrics, traces. Merged and
//! compiled when published; looked up once per request.

pub mod context;
pub mod expression;
pub mod format;
pub mod tracing;

use crate::l7::gateway::GatewayKey;
use crate::service::Service;
use expression::Expression;
use format::{Format, Template};
use std::collections::HashMap;
use std::sync::Arc;
use tracing::{Collector, Tag, Tracing};

/// What is said for every place where something is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TelemetryRules {
    /// For all, by MeshConfig and the root namespace.
    pub mesh: Option<Arc<Sides>>,
    /// For what runs in a namespace.
    pub namespaces: HashMap<Arc<str>, Arc<Sides>>,
    /// For what a `targetRef` names.
    pub targets: HashMap<Target, Arc<Sides>>,
}
/// What a `targetRef` names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A Service or ServiceEntry, by the object's name. Where both have one name, both are meant.
    Service {
        /// Namespace.
        namespace: Arc<str>,
        /// Name.
        name: Arc<str>,
    },
    /// A Gateway.
    Gateway(GatewayKey),
    /// Every waypoint (GatewayClass `istio-waypoint`).
    Waypoints,
}
/// Where something is told.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The service that was addressed through the waypoint.
    pub service: Option<&'a Service>,
    /// The Gateway of this process.
    pub gateway: &'a GatewayKey,
    /// It came through a tunnel: this process acts as a waypoint.
    pub waypoint: bool,
}
impl TelemetryRules {
    /// What holds at a place: what is said of the service, else of the Gateway, of all waypoints, of the Gateway's namespace,
    /// of the mesh.
    pub fn find(&self, place: &Place<'_>) -> Option<&Arc<Sides>> {
        let said = |target: Option<Target>| target.and_then(|t| self.targets.get(&t));
        let of_target = || {
            let name = |s: &Service| Target::Service { namespace: Arc::clone(&s.key.namespace), name: Arc::clone(&s.name) };
            said(place.service.map(name))
                .or_else(|| said(Some(Target::Gateway(place.gateway.clone()))))
                .or_else(|| said(place.waypoint.then_some(Target::Waypoints)))
        };
        let found = if self.targets.is_empty() { None } else { of_target() };
        found.or_else(|| self.namespaces.get(&place.gateway.namespace)).or(self.mesh.as_ref())
    }
    /// Where spans go, anywhere.
    pub fn collectors(&self) -> impl Iterator<Item = &Arc<Collector>> {
        let all = self.mesh.iter().chain(self.namespaces.values()).chain(self.targets.values());
        all.flat_map(|sides| [&sides.server, &sides.client]).filter_map(|t| Some(&t.tracing.as_ref()?.collector))
    }
}

/// What holds at one place, by the part the proxy plays there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sides {
    /// For a waypoint (`SERVER`).
    pub server: Arc<Telemetry>,
    /// For a gateway at the mesh's edge (`CLIENT`).
    pub client: Arc<Telemetry>,
}

/// What is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Telemetry {
    /// Lines about each request and connection; `None` when nobody says, and the process decides.
    pub access: Option<Box<[AccessLog]>>,
    /// Changes of the standard metrics.
    pub metrics: MetricRules,
    /// Spans; `None`: requests are not traced, and what they say of a trace goes on as it is.
    pub tracing: Option<Tracing>,
}
impl Telemetry {
    /// Whether something is told of the response's headers. `sampled`: the request's span is.
    pub fn reads_response_headers(&self, sampled: bool) -> bool {
        let logs = self.access.iter().flatten();
        logs.clone().any(|log| log.format.as_ref().is_some_and(Format::reads_response_headers))
            || logs.filter_map(|log| log.filter.as_ref()).chain(&self.metrics.tags).any(Expression::reads_response_headers)
            || sampled && self.tags().any(Template::reads_response_headers)
    }
    /// Whether something is told of the response's trailers. `sampled`: the request's span is.
    pub fn reads_trailers(&self, sampled: bool) -> bool {
        self.access.iter().flatten().any(|log| log.format.as_ref().is_some_and(Format::reads_trailers))
            || sampled && self.tags().any(Template::reads_trailers)
    }
    /// Formats of the tags of spans.
    fn tags(&self) -> impl Iterator<Item = &Template> {
        self.tracing.iter().flat_map(|t| &t.tags).filter_map(|(_, tag)| match tag {
            Tag::Format(template) => Some(template),
            Tag::Literal(_) | Tag::Header(..) => None,
        })
    }
}

/// One access log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessLog {
    /// Its lines; `None`: Istio's default, in the shape of the process's own lines.
    pub format: Option<Format>,
    /// Which requests it is about; `None`: all.
    pub filter: Option<Expression>,
}

/// Istio's standard metrics, in the order of [`MetricRules::families`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the Telemetry API's names")]
pub enum Metric {
    RequestCount,
    RequestDuration,
    RequestSize,
    ResponseSize,
    GrpcRequestMessages,
    GrpcResponseMessages,
    TcpOpenedConnections,
    TcpClosedConnections,
    TcpSentBytes,
    TcpReceivedBytes,
}
impl Metric {
    /// All, with the Telemetry API's names.
    pub const ALL: [(Self, &'static str); 10] = [
        (Self::RequestCount, "REQUEST_COUNT"),
        (Self::RequestDuration, "REQUEST_DURATION"),
        (Self::RequestSize, "REQUEST_SIZE"),
        (Self::ResponseSize, "RESPONSE_SIZE"),
        (Self::GrpcRequestMessages, "GRPC_REQUEST_MESSAGES"),
        (Self::GrpcResponseMessages, "GRPC_RESPONSE_MESSAGES"),
        (Self::TcpOpenedConnections, "TCP_OPENED_CONNECTIONS"),
        (Self::TcpClosedConnections, "TCP_CLOSED_CONNECTIONS"),
        (Self::TcpSentBytes, "TCP_SENT_BYTES"),
        (Self::TcpReceivedBytes, "TCP_RECEIVED_BYTES"),
    ];
}

/// Changes of the standard metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetricRules {
    /// Values of tags, each worked out once per request whatever number of families has it.
    pub tags: Box<[Expression]>,
    /// Per [`Metric`].
    pub families: [FamilyRules; Metric::ALL.len()],
}
impl MetricRules {
    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.families.iter().all(|f| !f.disabled && f.tags.is_empty())
    }
    /// Changes of one metric.
    pub fn of(&self, metric: Metric) -> &FamilyRules {
        // One for each metric.
        &self.families[metric as usize]
    }
}
/// Changes of one metric.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FamilyRules {
    /// It is not counted.
    pub disabled: bool,
    /// By name of the label: an index of [`MetricRules::tags`], or `None` for a label that is left out.
    pub tags: Box<[(Box<str>, Option<usize>)]>,
}
