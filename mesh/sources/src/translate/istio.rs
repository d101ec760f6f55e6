//! Reading Istio networking objects and Gateway API gateways, as far as the agent uses them.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::workload::Locality;

use super::gateway_api;
use super::kube::{annotation, app_protocol, canary_weight, distribution, redirected, section};
use super::object::{
    AllowedRoutes, Expression, ExpressionOp, Gateway, GatewayAddress, GatewayClass, InboundBinding, LabelSelector, Listener,
    Port, Reader, RemoteNetwork, Resolution, ServiceEntry, Target, WaypointFor, WorkloadEntry,
};
use super::read::{self, Bad, Read};
use super::waypoint::NETWORK;
use crate::diagnostics::{Problem, Severity};
use crate::yaml::Node;

/// Class of Gateways that stand for the gateway of another network.
const REMOTE_CLASS: &str = "istio-remote";

pub(super) fn service_entry<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, ServiceEntry> {
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    let mut hosts = Vec::new();
    for h in read::list(spec, "hosts")? {
        let host = host_name(h, true)?;
        hosts.push(r.pool.text(&host));
    }
    if hosts.is_empty() {
        return Err(Bad::missing(spec, "hosts", "a ServiceEntry names at least one host"));
    }
    let mut addresses = Vec::new();
    for a in read::list(spec, "addresses")? {
        addresses.push(read::net(a)?);
    }
    let mut auto = Vec::new();
    if read::text_or_empty(section(meta, "labels")?, "networking.istio.io/enable-autoallocate-ip")? != "false" {
        for a in read::list(section(node, "status")?, "addresses")? {
            if let Some(v) = a.get("value") {
                let host = read::text_or_empty(a, "host")?.to_ascii_lowercase();
                auto.push((r.pool.text(&host), read::ip(v)?));
            }
        }
    }
    let mut ports = Vec::new();
    for p in read::list(spec, "ports")? {
        let protocol = read::text_or_empty(p, "protocol")?;
        if protocol.eq_ignore_ascii_case("UDP") {
            continue;
        }
        let port = read::port_at(p, "number")?;
        let name = read::text_or_empty(p, "name")?;
        ports.push(Port {
            name: r.pool.text(name),
            port,
            target: Target::Number(p.get("targetPort").map_or(Ok(port), read::port)?),
            explicit_target: p.get("targetPort").is_some(),
            app: app_protocol(protocol, name, port),
        });
    }
    let resolution = match spec.get("resolution") {
        None => Resolution::None,
        Some(n) => match read::scalar(n)? {
            "NONE" => Resolution::None,
            "STATIC" => Resolution::Static,
            "DNS" => Resolution::Dns,
            "DNS_ROUND_ROBIN" => Resolution::DnsRoundRobin,
            "DYNAMIC_DNS" => Resolution::DynamicDns,
            t => {
                return Err(Bad::value(
                    n,
                    format!("`{t}` is not a resolution"),
                    "write NONE, STATIC, DNS, DNS_ROUND_ROBIN or DYNAMIC_DNS",
                ));
            }
        },
    };
    let mut endpoints = Vec::new();
    for e in read::list(spec, "endpoints")? {
        let labels = read::labels(e, "labels", r.pool)?;
        endpoints.push(workload_entry(r, e, labels)?);
    }
    let mut sans = Vec::new();
    for s in read::list(spec, "subjectAltNames")? {
        match read::scalar(s)?.parse() {
            Ok(id) => sans.push(id),
            Err(e) => {
                let e: mesh_model::id::IdError = e;
                let bad = Bad {
                    at: s,
                    missing: None,
                    message: format!("not a SPIFFE id, not accepted from endpoints: {e}"),
                    fix: "",
                    code: "san",
                };
                r.report(node, &bad, Severity::Warning);
            }
        }
    }
    let selector = match read::map(spec, "workloadSelector")? {
        None => None,
        Some(s) => Some(read::labels(s, "labels", r.pool)?),
    };
    Ok(ServiceEntry {
        labels: read::labels(meta, "labels", r.pool)?,
        hosts,
        addresses,
        auto,
        ports,
        resolution,
        endpoints,
        selector,
        sans,
        created: r.pool.text(read::text_or_empty(meta, "creationTimestamp")?),
        distribution: distribution(r, meta),
        canary_weight: canary_weight(r, meta),
        redirected: redirected(meta),
    })
}

/// A DNS name in lower case; `*.name` too where wildcards are allowed.
pub(super) fn host_name<'p>(n: &'p Node<'p>, wildcard: bool) -> Read<'p, String> {
    let t = read::scalar(n)?;
    let rest = if wildcard { t.strip_prefix("*.").unwrap_or(t) } else { t };
    let rest = rest.strip_suffix('.').unwrap_or(rest);
    let ok = !rest.is_empty()
        && t.len() <= 255
        && rest
            .split('.')
            .all(|l| !l.is_empty() && l.len() <= 63 && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
    if ok {
        Ok(t.strip_suffix('.').unwrap_or(t).to_ascii_lowercase())
    } else {
        Err(Bad::value(n, format!("`{t}` is not a host name"), "write a DNS name such as `api.example.com` or `*.example.com`"))
    }
}

pub(super) fn workload_entry_object<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, WorkloadEntry> {
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    let outer = read::labels(meta, "labels", r.pool)?;
    let inner = read::labels(spec, "labels", r.pool)?;
    // Both sets count; the spec's value wins where they differ.
    let merged = r.pool.labels(outer.iter().chain(inner.iter()).cloned().collect());
    let mut entry = workload_entry(r, spec, merged)?;
    entry.redirected = redirected(meta);
    entry.node = annotation(r, meta, "culvert.dev/node");
    entry.netns = annotation(r, meta, "culvert.dev/netns");
    if read::annotation(meta, "proxy.istio.io/health-checks-enabled") == Some("true") {
        // As in Istio, nothing is healthy before somebody says so.
        entry.healthy = false;
        for c in read::list(section(node, "status")?, "conditions")? {
            if read::text_or_empty(c, "type")? == "Healthy" {
                entry.healthy = read::text_or_empty(c, "status")? == "True";
            }
        }
    }
    Ok(entry)
}

fn workload_entry<'p>(r: &mut Reader<'_>, spec: &'p Node<'p>, labels: super::intern::Labels) -> Read<'p, WorkloadEntry> {
    let address = spec.get("address");
    let (ip, hostname) = match address {
        None => (None, String::new()),
        Some(n) => match read::scalar(n)? {
            t if t.starts_with("unix:") => {
                return Err(Bad::value(
                    n,
                    "unix sockets are not reachable through the mesh",
                    "write an IP address or a host name",
                ));
            }
            t => match t.parse::<IpAddr>() {
                Ok(ip) => (Some(ip.to_canonical()), String::new()),
                Err(_) => (None, host_name(n, false)?),
            },
        },
    };
    let mut ports = Vec::new();
    for e in read::entries(section(spec, "ports")?)? {
        ports.push((r.pool.text(&e.key), read::port(&e.node)?));
    }
    let mut locality = read::text_or_empty(spec, "locality")?.splitn(3, '/');
    let mut part = || r.pool.text(locality.next().unwrap_or_default());
    let locality = Locality { region: part(), zone: part(), subzone: part() };
    Ok(WorkloadEntry {
        labels,
        ip,
        hostname: r.pool.text(&hostname),
        ports,
        network: read::text(spec, "network")?.filter(|t| !t.is_empty()).map(|t| r.pool.text(t)),
        locality,
        weight: read::number(spec, "weight")?.unwrap_or(0),
        service_account: r.pool.text(read::text_or_empty(spec, "serviceAccount")?),
        redirected: false,
        healthy: true,
        node: None,
        netns: None,
    })
}

fn waypoint_for<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, meta: &'p Node<'p>) -> Read<'p, Option<WaypointFor>> {
    let Some(n) = section(meta, "labels")?.get("istio.io/waypoint-for") else { return Ok(None) };
    Ok(match read::scalar(n)? {
        "service" => Some(WaypointFor::Service),
        "workload" => Some(WaypointFor::Workload),
        "all" => Some(WaypointFor::All),
        "none" => Some(WaypointFor::None),
        t => {
            let bad = Bad::value(
                n,
                format!("`{t}` is not a kind of traffic; the waypoint serves none"),
                "write service, workload, all or none",
            );
            r.report(node, &bad, Severity::Error);
            Some(WaypointFor::None)
        }
    })
}

fn binding(r: &mut Reader<'_>, node: &Node<'_>, meta: &Node<'_>) -> Option<InboundBinding> {
    let text = read::annotation(meta, "ambient.istio.io/waypoint-inbound-binding")?;
    let (protocol, port) = text.split_once('/').map_or((text, None), |(p, n)| (p, Some(n)));
    let port_ok = port.map(|p| p.parse::<u16>().ok().filter(|p| *p != 0));
    if let ("PROXY" | "NONE", None | Some(Some(_))) = (protocol, port_ok) {
        return Some(InboundBinding { proxy: protocol == "PROXY", port: port_ok.flatten() });
    }
    r.problems.push(Problem {
        severity: Severity::Error,
        origin: Origin { place: Arc::clone(&r.place), line: node.line, object: Arc::clone(&r.object) },
        field: "metadata.annotations[\"ambient.istio.io/waypoint-inbound-binding\"]".into(),
        message: format!("`{text}` is not PROXY, NONE, PROXY/port or NONE/port").into(),
        fix: "".into(),
        code: Some("bad-value"),
    });
    None
}

pub(super) fn gateway_class<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, GatewayClass> {
    let meta = section(node, "metadata")?;
    Ok(GatewayClass { waypoint_for: waypoint_for(r, node, meta)?, binding: binding(r, node, meta) })
}

pub(super) fn gateway<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, Gateway> {
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    let (mut hostname, mut ips) = (None, Vec::new());
    // Where no control plane writes a status, the address that was asked for is the one: how Istio deploys gateways by hand.
    let given = read::list(section(node, "status")?, "addresses")?;
    let addresses = if given.is_empty() { read::list(spec, "addresses")? } else { given };
    for a in addresses {
        let Some(value) = a.get("value") else { continue };
        match read::text(a, "type")?.unwrap_or("IPAddress") {
            "Hostname" if hostname.is_none() => hostname = Some(r.pool.text(&host_name(value, false)?)),
            "IPAddress" => ips.push(read::ip(value)?),
            _ => {}
        }
    }
    let mut listeners = Vec::new();
    for l in read::list(spec, "listeners")? {
        listeners.push(Listener {
            port: read::port_at(l, "port")?,
            protocol: r.pool.text(read::text_or_empty(l, "protocol")?),
            allowed: allowed_routes(r, node, l)?,
        });
    }
    let edge = if r.layer7 { gateway_api::read_listeners(r, node, spec)? } else { Vec::new() };
    let class = r.pool.text(read::text_or_empty(spec, "gatewayClassName")?);
    Ok(Gateway {
        leads_to: if *class == *REMOTE_CLASS { remote_network(r, meta, &listeners, &ips)? } else { None },
        class,
        waypoint_for: waypoint_for(r, node, meta)?,
        binding: binding(r, node, meta),
        address: hostname.map(GatewayAddress::Hostname).or(ips.first().copied().map(GatewayAddress::Ip)),
        listeners,
        edge,
    })
}

/// The network behind a Gateway of the class `istio-remote`: named by its label, entered by its HBONE listener.
fn remote_network<'p>(
    r: &mut Reader<'_>,
    meta: &'p Node<'p>,
    listeners: &[Listener],
    ips: &[IpAddr],
) -> Read<'p, Option<RemoteNetwork>> {
    let labels = read::labels(meta, "labels", r.pool)?;
    let network = labels.get(NETWORK).filter(|network| !network.is_empty());
    let hbone = listeners.iter().find(|listener| &*listener.protocol == "HBONE");
    let (Some(network), Some(hbone)) = (network, hbone) else { return Ok(None) };
    let named = read::annotation(meta, "gateway.istio.io/service-account").filter(|name| !name.is_empty());
    let account = match named {
        Some(name) => name.to_owned(),
        None => format!("{}-{REMOTE_CLASS}", read::text_or_empty(meta, "name")?),
    };
    let (network, service_account) = (Arc::clone(network), r.pool.text(&account));
    Ok(Some(RemoteNetwork { network, port: hbone.port, service_account, ips: ips.to_vec() }))
}

pub(super) fn label_selector<'p>(r: &mut Reader<'_>, selector: &'p Node<'p>) -> Read<'p, LabelSelector> {
    let mut expressions = Vec::new();
    for e in read::list(selector, "matchExpressions")? {
        let op = e.get("operator");
        let op = match op.and_then(Node::text) {
            Some("In") => ExpressionOp::In,
            Some("NotIn") => ExpressionOp::NotIn,
            Some("Exists") => ExpressionOp::Exists,
            Some("DoesNotExist") => ExpressionOp::DoesNotExist,
            _ => return Err(Bad::value(op.unwrap_or(e), "not an operator", "write In, NotIn, Exists or DoesNotExist")),
        };
        let mut values = Vec::new();
        for v in read::list(e, "values")? {
            values.push(r.pool.text(read::scalar(v)?));
        }
        expressions.push(Expression { key: r.pool.text(read::text_or_empty(e, "key")?), op, values });
    }
    Ok(LabelSelector { labels: read::labels(selector, "matchLabels", r.pool)?, expressions })
}

pub(super) fn allowed_routes<'p>(r: &mut Reader<'_>, root: &'p Node<'p>, listener: &'p Node<'p>) -> Read<'p, AllowedRoutes> {
    let Some(ns) = read::map(section(listener, "allowedRoutes")?, "namespaces")? else { return Ok(AllowedRoutes::Same) };
    let Some(from) = ns.get("from") else { return Ok(AllowedRoutes::Same) };
    Ok(match read::scalar(from)? {
        "All" => AllowedRoutes::All,
        "Same" => AllowedRoutes::Same,
        "Selector" => {
            let Some(selector) = read::map(ns, "selector")? else { return Ok(AllowedRoutes::Nobody) };
            AllowedRoutes::Selector(label_selector(r, selector)?)
        }
        "None" => AllowedRoutes::Nobody,
        t => {
            let bad =
                Bad::value(from, format!("`{t}` is not understood; nobody may attach"), "write All, Same, Selector or None");
            r.report(root, &bad, Severity::Error);
            AllowedRoutes::Nobody
        }
    })
}
