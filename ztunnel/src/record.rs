//! What is told about a connection: its access log line and its metric labels, from one set of facts.
//!
//! Owns the mapping of facts to Istio's words (node-agent §1.12, §1.13). Upstream: the three directions fill it in as
//! they learn. Downstream: `metrics` and the access log. Nothing here is on the path of a byte.
use crate::conns::Direction;
use crate::trace::Trace;
use mesh_model::metric_labels::{self, COMMON, Ends, NAMES, UNKNOWN};
use mesh_model::service::Service;
use mesh_model::workload::Workload;
use mesh_model::{Refusal, SpiffeId};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// The facts of one connection, as far as they are known.
#[derive(Debug)]
pub struct Record {
    /// Direction.
    pub direction: Direction,
    /// When it was accepted.
    pub started: Instant,
    /// Client address.
    pub src: SocketAddr,
    /// Where the connection went (outbound: what we dialled; inbound: what it arrived at).
    pub dst: SocketAddr,
    /// CONNECT authority, when tunnelled.
    pub hbone: Option<Box<str>>,
    /// Source workload.
    pub source: Option<Arc<Workload>>,
    /// Destination workload.
    pub destination: Option<Arc<Workload>>,
    /// Source identity, when proven over mTLS.
    pub source_id: Option<SpiffeId>,
    /// Destination identity, when proven over mTLS.
    pub destination_id: Option<SpiffeId>,
    /// Service it was addressed by.
    pub service: Option<Arc<Service>>,
    /// Why its declared waypoint cannot be used, when it was gone around.
    pub around: Option<Arc<str>>,
    /// Policies refused it, and it is of a process of the node.
    pub of_node: bool,
    /// Its span, if it is told of.
    pub trace: Option<Box<Trace>>,
}
impl Record {
    /// A record with only the addresses known.
    pub fn new(direction: Direction, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            direction,
            started: Instant::now(),
            src,
            dst,
            hbone: None,
            source: None,
            destination: None,
            source_id: None,
            destination_id: None,
            service: None,
            around: None,
            of_node: false,
            trace: None,
        }
    }
    /// Whether both ends proved who they are.
    pub fn mutual_tls(&self) -> bool {
        self.source_id.is_some() && self.destination_id.is_some()
    }
}

/// How a connection ended.
#[derive(Debug)]
pub enum Ending<'a> {
    /// It was carried to its end.
    Complete,
    /// It was refused, cut or failed.
    Failed(&'a Refusal),
}

/// Names of the labels of the `istio_tcp_*` families, in the order [`labels`] gives their values.
pub const LABELS: [&str; COMMON + 7] = metric_labels::with(
    NAMES,
    [
        "request_protocol",
        "response_flags",
        "connection_security_policy",
        "source_region",
        "source_zone",
        "destination_region",
        "destination_zone",
    ],
);

/// Label values of a record; unknown ones are `unknown`, as Istio's dashboards expect. Regions and zones are empty when
/// not known: Prometheus treats an empty label as absent.
pub fn labels<'a>(r: &'a Record, response_flags: &'a str) -> [&'a str; LABELS.len()] {
    let ends = Ends {
        reporter: r.direction.reporter(),
        source: r.source.as_ref(),
        source_id: r.source_id.as_ref(),
        destination: r.destination.as_ref(),
        destination_id: r.destination_id.as_ref(),
        service: r.service.as_ref(),
    };
    let locality = |w: Option<&'a Arc<Workload>>| w.map_or(("", ""), |w| (&*w.locality.region, &*w.locality.zone));
    let (s_region, s_zone) = locality(ends.source);
    let (d_region, d_zone) = locality(ends.destination);
    let security = if r.mutual_tls() { "mutual_tls" } else { UNKNOWN };
    metric_labels::with(ends.values(), ["tcp", response_flags, security, s_region, s_zone, d_region, d_zone])
}

/// Names of the fields of an access log line, in Istio's order, and ours.
pub const FIELDS: [&str; 21] = [
    "src.addr",
    "src.workload",
    "src.namespace",
    "src.identity",
    "src.cluster",
    "dst.addr",
    "dst.hbone_addr",
    "dst.service",
    "dst.workload",
    "dst.namespace",
    "dst.identity",
    "dst.cluster",
    "waypoint.bypassed",
    "trace_id",
    "span_id",
    "direction",
    "bytes_sent",
    "bytes_recv",
    "duration",
    "error",
    "reason",
];

/// Calls `field` with every known field of the access log line, in Istio's order; `quoted` tells texts from addresses
/// and numbers. `sent` and `received` are bytes as this pod's side sent and received them.
pub fn fields(r: &Record, sent: u64, received: u64, end: &Ending<'_>, mut field: impl FnMut(&'static str, Value<'_>)) {
    let workload = |w: Option<&Arc<Workload>>, keys: [&'static str; 2], f: &mut dyn FnMut(&'static str, Value<'_>)| {
        if let Some(w) = w {
            f(keys[0], Value::Text(&w.name));
            f(keys[1], Value::Text(&w.namespace));
        }
    };
    let cluster = |w: Option<&Arc<Workload>>, key: &'static str, f: &mut dyn FnMut(&'static str, Value<'_>)| {
        if let Some(w) = w.filter(|w| !w.cluster.is_empty()) {
            f(key, Value::Text(&w.cluster));
        }
    };
    let f: &mut dyn FnMut(&'static str, Value<'_>) = &mut field;
    f("src.addr", Value::Addr(r.src));
    workload(r.source.as_ref(), ["src.workload", "src.namespace"], f);
    if let Some(id) = &r.source_id {
        f("src.identity", Value::Text(id.as_str()));
    }
    cluster(r.source.as_ref(), "src.cluster", f);
    if r.of_node {
        f("src.node", Value::Bare("true"));
    }
    f("dst.addr", Value::Addr(r.dst));
    if let Some(h) = &r.hbone {
        f("dst.hbone_addr", Value::Bare(h));
    }
    if let Some(s) = &r.service {
        f("dst.service", Value::Text(&s.key.hostname));
    }
    workload(r.destination.as_ref(), ["dst.workload", "dst.namespace"], f);
    if let Some(id) = &r.destination_id {
        f("dst.identity", Value::Text(id.as_str()));
    }
    cluster(r.destination.as_ref(), "dst.cluster", f);
    if let Some(why) = &r.around {
        f("waypoint.bypassed", Value::Text(why));
    }
    if let Some(trace) = &r.trace {
        f("trace_id", Value::Text(&format!("{:032x}", trace.context.trace)));
        f("span_id", Value::Text(&format!("{:016x}", trace.context.span)));
    }
    f("direction", Value::Text(r.direction.as_str()));
    f("bytes_sent", Value::Number(sent));
    f("bytes_recv", Value::Number(received));
    let mut duration = String::with_capacity(12);
    // Writing to a String cannot fail.
    let _ = write!(duration, "{}ms", r.started.elapsed().as_millis());
    f("duration", Value::Text(&duration));
    if let Ending::Failed(why) = end {
        let text = why.to_string();
        f("error", Value::Text(&text));
        f("reason", Value::Text(why.reason.as_str()));
    }
}

/// A value of an access log field.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// Quoted text.
    Text(&'a str),
    /// Unquoted text (addresses with names).
    Bare(&'a str),
    /// Address, unquoted.
    Addr(SocketAddr),
    /// Number, unquoted.
    Number(u64),
}
