//! What is told about a connection: its access log line and its metric labels, from one set of facts.
//!
//! Owns the mapping of facts to Istio's words (node-agent §1.12, §1.13). Upstream: the three directions fill it in as
//! they learn. Downstream: `metrics` and the access log. Nothing here is on the path of a byte.
use crate::conns::Direction;
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
pub const LABELS: [&str; 27] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];

const UNKNOWN: &str = "unknown";

fn or_unknown(s: &str) -> &str {
    if s.is_empty() { UNKNOWN } else { s }
}

/// Label values of a record; unknown ones are `unknown`, as Istio's dashboards expect. Regions and zones are empty when
/// not known: Prometheus treats an empty label as absent.
pub fn labels<'a>(r: &'a Record, response_flags: &'a str) -> [&'a str; LABELS.len()] {
    fn side<'a>(w: Option<&'a Arc<Workload>>, id: Option<&'a SpiffeId>) -> [&'a str; 8] {
        let of = |get: fn(&Workload) -> &str| w.map_or(UNKNOWN, |w| or_unknown(get(w)));
        [
            of(|w| &w.workload_name),
            of(|w| &w.canonical_name),
            of(|w| &w.canonical_revision),
            of(|w| &w.namespace),
            id.map_or(UNKNOWN, SpiffeId::as_str),
            of(|w| &w.canonical_name),
            of(|w| &w.canonical_revision),
            of(|w| &w.cluster),
        ]
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7] = side(r.source.as_ref(), r.source_id.as_ref());
    let [d0, d1, d2, d3, d4, d5, d6, d7] = side(r.destination.as_ref(), r.destination_id.as_ref());
    let svc = r.service.as_ref();
    let locality = |w: Option<&'a Arc<Workload>>| w.map_or(("", ""), |w| (&*w.locality.region, &*w.locality.zone));
    let (s_region, s_zone) = locality(r.source.as_ref());
    let (d_region, d_zone) = locality(r.destination.as_ref());
    [
        r.direction.reporter(),
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        svc.map_or(UNKNOWN, |s| &s.key.hostname),
        svc.map_or(UNKNOWN, |s| &s.key.namespace),
        svc.map_or(UNKNOWN, |s| &s.name),
        d0,
        d1,
        d2,
        d3,
        d4,
        d5,
        d6,
        d7,
        "tcp",
        response_flags,
        if r.mutual_tls() { "mutual_tls" } else { UNKNOWN },
        s_region,
        s_zone,
        d_region,
        d_zone,
    ]
}

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
