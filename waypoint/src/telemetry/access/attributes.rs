//! What expressions see of a request or a connection: Envoy's attributes.
use super::Told;
use super::field::protocol;
use super::line::Line;
use mesh_model::SpiffeId;
use mesh_model::telemetry::expression::{Attribute, Attributes};
use mesh_model::workload::Workload;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

impl Attributes for Line<'_> {
    fn find(&self, name: &str) -> Option<Attribute<'_>> {
        let (root, rest) = name.split_once('.')?;
        match root {
            "request" => request(self, rest),
            "response" => response(self, rest),
            "connection" => connection(self, rest),
            "source" => socket(self.facts.client, rest),
            "destination" => socket(self.facts.local, rest),
            "upstream" => match rest {
                "request_attempt_count" => Some(number(self.request()?.attempts)),
                "transport_failure_reason" => text(&self.request()?.transport_failure),
                _ => socket(self.host()?.addr(), rest),
            },
            "downstream_peer" => peer(self.facts.source.as_ref(), self.facts.identity.as_ref().map(SpiffeId::as_str), rest),
            "upstream_peer" => {
                let host = self.host()?;
                peer(Some(host.workload()), host.identity().map(SpiffeId::as_str), rest)
            }
            _ => None,
        }
    }
}

fn text(text: &str) -> Option<Attribute<'_>> {
    (!text.is_empty()).then(|| Attribute::Text(text.into()))
}
fn number<'a>(n: impl Into<i64>) -> Attribute<'a> {
    Attribute::Int(n.into())
}
fn size<'a>(bytes: u64) -> Option<Attribute<'a>> {
    i64::try_from(bytes).ok().map(Attribute::Int)
}
fn socket<'a>(addr: SocketAddr, part: &str) -> Option<Attribute<'a>> {
    match part {
        "address" => Some(Attribute::Text(SocketAddr::new(addr.ip().to_canonical(), addr.port()).to_string().into())),
        "port" => Some(number(addr.port())),
        _ => None,
    }
}

fn request<'a>(line: &Line<'a>, part: &str) -> Option<Attribute<'a>> {
    match part {
        "duration" => return Some(Attribute::Duration(line.took)),
        "time" => return Some(Attribute::Time(line.start().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())),
        "size" => return size(line.bytes().0),
        _ => {}
    }
    let r = line.request()?;
    let header = |name: &str| text(r.headers.get(name)?.to_str().ok()?);
    // As it went on: Envoy asks when all is over, of what a rewrite left.
    let path = r.rewritten.as_deref().unwrap_or(&r.path);
    match part {
        "headers" => Some(Attribute::Headers(&r.headers)),
        "host" => text(&r.authority),
        "id" => header("x-request-id"),
        "method" => text(r.method.as_str()),
        "path" => text(path),
        "protocol" => text(protocol(r)),
        "query" => Some(Attribute::Text(path.split_once('?').map_or("", |(_, query)| query).into())),
        "referer" => header("referer"),
        "scheme" => text(line.facts.scheme()),
        "url_path" => text(path.split('?').next()?),
        "useragent" => header("user-agent"),
        _ => None,
    }
}

fn response<'a>(line: &Line<'a>, part: &str) -> Option<Attribute<'a>> {
    if part == "size" {
        return size(line.bytes().1);
    }
    let flags = match line.told {
        Told::Request(r) => r.flags,
        Told::Connection { record: r, .. } => r.flags,
    };
    if part == "flags" {
        return Some(number(flags.bits()));
    }
    let r = line.request()?;
    match part {
        "code" if r.status != 0 => Some(number(r.status)),
        "code_details" => text(&r.details),
        "grpc_status" => r.grpc_status().map(number),
        "headers" => r.response_headers.as_ref().map(Attribute::Headers),
        _ => None,
    }
}

fn connection<'a>(line: &Line<'a>, part: &str) -> Option<Attribute<'a>> {
    let facts = line.facts;
    match part {
        "mtls" => Some(Attribute::Bool(facts.identity.is_some())),
        "requested_server_name" => Some(Attribute::Text(facts.sni.as_deref().unwrap_or_default().into())),
        "termination_details" => match line.told {
            Told::Connection { record, .. } => text(&record.details),
            Told::Request(_) => None,
        },
        "uri_san_local_certificate" => facts.identity.as_ref().and_then(|_| text(line.own.as_str())),
        "uri_san_peer_certificate" => text(facts.identity.as_ref()?.as_str()),
        _ => None,
    }
}

fn peer<'a>(workload: Option<&'a Arc<Workload>>, identity: Option<&'a str>, part: &str) -> Option<Attribute<'a>> {
    if part == "identity" {
        return text(identity?);
    }
    let w = workload?;
    text(match part {
        "app" | "service" => &w.canonical_name,
        "cluster" => &w.cluster,
        "name" => &w.name,
        "namespace" => &w.namespace,
        "version" => &w.canonical_revision,
        "workload" => &w.workload_name,
        _ => return None,
    })
}
