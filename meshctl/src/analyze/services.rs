//! Services and ServiceEntries: ports without a protocol, names without an address, selectors without pods.
use super::Context;
use super::codes::{ADDRESSES_REQUIRED, CONFLICTING_PROTOCOLS, PORT_NAME};
use super::finding::{Findings, Level};
use crate::objects::{Raw, items};
use mesh_model::lb::EndpointSet;
use mesh_model::service::{AppProtocol, ServiceKey};
use mesh_sources::yaml::Node;
use std::collections::BTreeMap;

/// Names that say a protocol, alone or before a `-` (spec of Istio's protocol selection).
const PROTOCOLS: &[&str] =
    &["http", "http2", "https", "grpc", "grpc-web", "tcp", "tls", "udp", "mongo", "mysql", "redis", "hbone"];

/// A port of a ServiceEntry and its protocol.
type Declared<'o, 't> = (&'o Raw<'t>, &'o Node<'o>, String);

/// Checks services.
pub fn check(context: &Context<'_>, findings: &mut Findings) {
    for service in context.objects.of_kind("", "Service") {
        port_names(findings, service);
        endpoints(context, findings, service);
    }
    let mut protocols: BTreeMap<(String, String), Vec<Declared<'_, '_>>> = BTreeMap::new();
    for entry in context.objects.of_kind("networking.istio.io", "ServiceEntry") {
        let Some(spec) = entry.at(&["spec"]) else { continue };
        addresses(context, findings, entry, spec);
        for port in items(spec, "ports") {
            let number = port.get("number").and_then(Node::text).unwrap_or_default();
            let protocol = port.get("protocol").and_then(Node::text).unwrap_or_default().to_ascii_uppercase();
            for host in items(spec, "hosts").iter().filter_map(Node::text) {
                let at = (host.to_ascii_lowercase(), number.to_owned());
                protocols.entry(at).or_default().push((entry, port, protocol.clone()));
            }
        }
    }
    for ((host, number), all) in &protocols {
        let differ = all.iter().any(|(.., protocol)| Some(protocol) != all.first().map(|(.., first)| first));
        for (entry, port, protocol) in all.iter().filter(|_| differ) {
            let message = format!("port {number} of {host} is {protocol} here and something else in another ServiceEntry");
            findings.on((Level::Warning, CONFLICTING_PROTOCOLS), entry, (port, "spec.ports"), message, "make them agree");
        }
    }
}

fn port_names(findings: &mut Findings, service: &Raw<'_>) {
    let Some(spec) = service.at(&["spec"]) else { return };
    for (i, port) in items(spec, "ports").iter().enumerate() {
        let text = |key: &str| port.get(key).and_then(Node::text).unwrap_or_default();
        if !text("appProtocol").is_empty() || text("protocol").eq_ignore_ascii_case("UDP") {
            continue;
        }
        let name = text("name").to_ascii_lowercase();
        let says = |p: &&str| name == **p || name.strip_prefix(*p).is_some_and(|rest| rest.starts_with('-'));
        if !PROTOCOLS.iter().any(says) {
            let message =
                format!("from the name `{name}` of port {} no protocol follows: waypoints look at the first bytes", text("port"));
            let fix = "name it http-…, grpc-…, tcp-…, or write appProtocol";
            findings.on((Level::Note, PORT_NAME), service, (port, &format!("spec.ports[{i}]")), message, fix);
        }
    }
}

fn endpoints(context: &Context<'_>, findings: &mut Findings, service: &Raw<'_>) {
    let Some(selector) = service.at(&["spec", "selector"]) else { return };
    let hostname = format!("{}.{}.svc.{}", service.id, service.namespace, context.mesh.view().cluster_domain);
    let key = ServiceKey::new(&service.namespace, &hostname);
    if service.text(&["spec", "type"]) != "ExternalName" && context.mesh.endpoint_set(&key).is_none_or(EndpointSet::is_empty) {
        let message = "its selector selects no pod: calls to it are refused".to_owned();
        findings.on((Level::Warning, "no-endpoints"), service, (selector, "spec.selector"), message, "correct the labels");
    }
}

/// What is carried as bytes is told apart by its address alone.
fn addresses(context: &Context<'_>, findings: &mut Findings, entry: &Raw<'_>, spec: &Node<'_>) {
    if !items(spec, "addresses").is_empty() {
        return;
    }
    let hosts = items(spec, "hosts").iter().filter_map(Node::text);
    let without = |host: &str| {
        let key = ServiceKey::new(&entry.namespace, &host.to_ascii_lowercase());
        context.mesh.find_service(&key).is_some_and(|s| {
            s.vips.is_empty()
                && s.cidr_vips.is_empty()
                && s.ports.iter().any(|p| matches!(p.protocol, AppProtocol::Tcp | AppProtocol::Unknown))
        })
    };
    for host in hosts.filter(|h| without(h)) {
        let message = format!("{host} has ports that carry bytes and no address: connections to it cannot be told from others");
        findings.on((Level::Warning, ADDRESSES_REQUIRED), entry, (spec, "spec.addresses"), message, "give it addresses");
    }
}
