//! Spans of connections (OpenTelemetry): which are told of, under whose span, and what is said of them.
//!
//! A share of the connections that applications open is drawn; of those that arrive in a tunnel the client decides, whose span is
//! the parent (`traceparent` of the CONNECT). A connection that is not drawn costs one random number and holds nothing. Collectors
//! are reached from the node, as the agent has no identity in the mesh. Upstream: the three directions and `report`.
//! Downstream: `mesh-spans`.
use crate::conns::Direction;
use crate::record::{Ending, Record};
use crate::settings::Settings;
use crate::trace::Trace;
use mesh_hbone::headers::TraceParent;
use mesh_model::telemetry::context::Incoming;
use mesh_model::telemetry::tracing::Collector;
use mesh_runtime::metrics::{MetricError, Registry};
use mesh_runtime::resolve::{self, Resolver};
use mesh_runtime::sockets::{ConnectOptions, connect};
use mesh_runtime::threads::Worker;
use mesh_spans::tags::{Process, SpanKind, Tags, bare};
use mesh_spans::{Connecting, Duplex, Span, Spans, Way};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Tells of connections.
#[derive(Debug)]
pub struct Tracing {
    spans: Spans,
    collector: Arc<Collector>,
    /// From 0 to 1.
    share: f64,
    process: Process,
}
impl Tracing {
    /// By these settings, if they name a collector. Batches are sent from `worker`.
    pub fn start(settings: &Settings, worker: &Worker, registry: &Registry) -> Result<Option<Self>, MetricError> {
        let Some(collector) = settings.tracing.tracing_collector.clone() else { return Ok(None) };
        let process = process(settings);
        let way = FromNode { worker: worker.clone(), resolver: Resolver::default() };
        let spans = Spans::new(registry, Arc::new(way), process.service_name(None))?;
        Ok(Some(Self { spans, collector, share: settings.tracing.tracing_sampling / 100.0, process }))
    }
    /// The span of a connection that nobody else has decided about.
    pub fn draw(&self) -> Option<Box<Trace>> {
        (rand::random::<f64>() < self.share).then(|| Box::new(Trace::begin(Incoming::default())))
    }
    /// The span of a connection whose client says this of its own.
    pub fn under(&self, parent: Option<TraceParent>) -> Option<Box<Trace>> {
        match parent {
            None => self.draw(),
            Some(parent) => parent.is_sampled().then(|| Box::new(Trace::begin(parent.into()))),
        }
    }
    /// The connection is over: `bytes` it sent and received, as its access log has them.
    pub fn tell(&self, record: &Record, trace: &Trace, bytes: (u64, u64), end: &Ending<'_>) {
        self.spans.send(&self.collector, span(record, trace, bytes, end, &self.process));
    }
    /// Sends what is queued, for at most so long.
    pub async fn close(&self, limit: Duration) {
        self.spans.close(limit).await;
    }
}
/// What spans say of this process: Istio's names for a ztunnel.
fn process(s: &Settings) -> Process {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let ns = variable("POD_NAMESPACE").unwrap_or_else(|| s.root_namespace.clone());
    let (ip, pod) = (variable("INSTANCE_IP").unwrap_or_default(), variable("POD_NAME").unwrap_or_else(|| s.node.clone()));
    Process {
        node_id: format!("ztunnel~{ip}~{pod}.{ns}~{ns}.svc.{}", s.cluster_domain),
        namespace: ns,
        service_account: "ztunnel".into(),
        cluster: s.cluster_id.clone(),
        mesh: s.trust_domain.clone(),
    }
}

/// A connection as a span.
fn span(record: &Record, trace: &Trace, (sent, received): (u64, u64), end: &Ending<'_>, process: &Process) -> Span {
    let outbound = record.direction == Direction::Outbound;
    let service = record.service.as_ref().map(|s| &*s.key.hostname);
    let mut tags = Tags::with_capacity(48);
    tags.put("component", "proxy");
    tags.put("node_id", process.node_id.as_str());
    tags.put("istio.cluster_id", process.cluster.as_str());
    tags.put("istio.mesh_id", process.mesh.as_str());
    tags.put("reporter", record.direction.reporter());
    tags.put("network.transport", "tcp");
    for (end, addr) in [("source", record.src), ("destination", record.dst)] {
        tags.put(&format!("{end}.address"), addr.ip().to_canonical().to_string());
        tags.put(&format!("{end}.port"), addr.port().to_string());
    }
    tags.put_some("hbone.authority", record.hbone.as_deref().unwrap_or_default());
    tags.put_some("istio.destination_service", service.unwrap_or_default());
    tags.workload("istio.source_", record.source.as_deref());
    tags.workload("istio.destination_", record.destination.as_deref());
    for (key, id) in [("istio.source_principal", &record.source_id), ("istio.destination_principal", &record.destination_id)] {
        tags.put_some(key, id.as_ref().map_or("", |id| id.as_str()));
    }
    tags.put("connection_security_policy", if record.mutual_tls() { "mutual_tls" } else { "none" });
    tags.put_some("waypoint.bypassed", record.around.as_deref().unwrap_or_default());
    tags.put("bytes_sent", sent.to_string());
    tags.put("bytes_recv", received.to_string());
    let failed = match end {
        Ending::Complete => None,
        Ending::Failed(why) => {
            tags.put("error", "true");
            tags.put("error.type", why.reason.as_str());
            Some(why.to_string())
        }
    };
    Span {
        // Envoy's words for a connection without a route, as a waypoint has them.
        name: match service {
            Some(service) if outbound => format!("egress {service}"),
            _ if outbound => "egress".to_owned(),
            _ => "ingress".to_owned(),
        },
        kind: if outbound { SpanKind::Client } else { SpanKind::Server }.into(),
        attributes: tags.into_attributes(),
        ..bare(&trace.context, trace.start, record.started.elapsed(), failed)
    }
}

/// Collectors as the node reaches them.
#[derive(Debug)]
struct FromNode {
    worker: Worker,
    resolver: Resolver,
}
impl Way for FromNode {
    fn worker(&self) -> &Worker {
        &self.worker
    }
    fn connect<'a>(&'a self, to: &'a Collector) -> Connecting<'a> {
        Box::pin(async move {
            let ips = self.resolver.lookup(&to.host).await?;
            let ip = resolve::choose(&ips, IpAddr::V4(Ipv4Addr::UNSPECIFIED), rand::random()).ok_or("no addresses")?;
            let tcp = connect(SocketAddr::new(ip, to.port), &ConnectOptions::default()).await.map_err(|e| e.to_string())?;
            Ok(Box::new(tcp) as Box<dyn Duplex>)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_of_a_tunnel_decides_and_a_draw_decides_the_rest() {
        let threads = mesh_runtime::threads::DataThreads::start(1).unwrap();
        let of = |percent: &str| {
            let settings =
                crate::settings::tests::parse(&["--tracing-collector", "grpc://127.0.0.1:4317", "--tracing-sampling", percent]);
            Tracing::start(&settings.unwrap(), threads.pick(None), &Registry::new()).unwrap().unwrap()
        };
        let (none, all, tenth) = (of("0"), of("100"), of("10"));
        assert!(none.draw().is_none() && all.draw().is_some_and(|trace| trace.context.parent.is_none()));
        // 1000 of 10 000 with a deviation of 30.
        let drawn = (0..10_000).filter(|_| tenth.under(None).is_some()).count();
        assert!((800..1200).contains(&drawn), "{drawn}");
        let said = |flags| Some(TraceParent { trace: 7, parent: 9, flags });
        assert!(all.under(said(0)).is_none(), "its client is not told of");
        let trace = none.under(said(1)).unwrap();
        assert_eq!((trace.context.trace, trace.context.parent), (7, Some(9)));
        let header = TraceParent::parse(trace.header().unwrap().as_bytes()).unwrap();
        assert_eq!((header.trace, header.parent, header.flags), (7, trace.context.span, 1));
        let silent = Tracing::start(&crate::settings::tests::parse(&[]).unwrap(), threads.pick(None), &Registry::new());
        assert!(silent.unwrap().is_none());
    }
}
