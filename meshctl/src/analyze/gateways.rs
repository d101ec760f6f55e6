//! Waypoints nobody names, behind which nothing runs, or whom the endpoints do not let in; objects a controller says are not in force.
use super::Context;
use super::codes::NEGATIVE_CONDITION;
use super::finding::{Findings, Level};
use crate::objects::{Raw, items};
use mesh_model::authz::{Verdict, authorize};
use mesh_model::conn::InboundConn;
use mesh_model::gateway::{GatewayDestination, GatewayRef};
use mesh_model::inbound::is_instance;
use mesh_model::service::{Service, ServiceKey};
use mesh_model::workload::Protocol;
use mesh_sources::yaml::Node;
use std::net::SocketAddr;

/// Port of the waypoint's end; no rule can ask for it.
const CLIENT_PORT: u16 = 40_000;

const USE: [&str; 2] = ["istio.io/use-waypoint", "istio.io/use-waypoint-canary"];

/// Checks gateways.
pub fn check(context: &Context<'_>, findings: &mut Findings) {
    for gateway in context.objects.of_kind("gateway.networking.k8s.io", "Gateway") {
        if gateway.text(&["spec", "gatewayClassName"]) == "istio-waypoint" {
            unused(context, findings, gateway);
        }
    }
    for service in context.mesh.services().filter(|s| !s.waypoints.is_empty()) {
        if let Some(object) = object_of(context, service) {
            empty(context, findings, service, object);
            refused(context, findings, service, object);
        }
    }
    for object in context.objects.iter() {
        conditions(findings, object);
    }
}

fn unused(context: &Context<'_>, findings: &mut Findings, gateway: &Raw<'_>) {
    let names = |o: &Raw<'_>| {
        let of = |label: &str| {
            let ns = o.labels.get(&format!("{label}-namespace")).cloned();
            // A namespace's own label speaks of waypoints in it.
            let own = if o.kind == "Namespace" { o.id.clone() } else { o.namespace.clone() };
            o.labels.get(label).is_some_and(|name| *name == gateway.id) && ns.unwrap_or(own) == gateway.namespace
        };
        USE.iter().any(|label| of(label))
    };
    if !context.objects.iter().any(names) {
        let message = "no service, pod or namespace names this waypoint: nothing passes it".to_owned();
        let fix = "label what it is for with istio.io/use-waypoint";
        findings.on((Level::Note, "unused-waypoint"), gateway, (&gateway.node, ""), message, fix);
    }
}

/// The object a service was made from.
fn object_of<'o>(context: &Context<'o>, service: &Service) -> Option<&'o Raw<'o>> {
    let hostname = format!("{}.{}.svc.{}", service.name, service.key.namespace, context.mesh.view().cluster_domain);
    let kube = *service.key.hostname == *hostname;
    let (group, kind) = if kube { ("", "Service") } else { ("networking.istio.io", "ServiceEntry") };
    let mut of = context.objects.of_kind(group, kind);
    of.find(|o| o.namespace == *service.key.namespace && o.id == *service.name)
}
/// A service that is reached through a waypoint nobody runs.
fn empty(context: &Context<'_>, findings: &mut Findings, service: &Service, object: &Raw<'_>) {
    for waypoint in service.waypoints.iter().filter(|w| !runs(context, &w.waypoint)) {
        let name = match &waypoint.waypoint.destination {
            GatewayDestination::Service(ServiceKey { hostname, .. }) => hostname.to_string(),
            GatewayDestination::Address(_, ip) => ip.to_string(),
        };
        let message = format!("its waypoint {name} has no instance that is ready: calls to it are refused");
        let at = object.at(&["metadata", "labels"]).unwrap_or(&object.node);
        let fix = "run the waypoint (its pod carries gateway.networking.k8s.io/gateway-name)";
        findings.on((Level::Error, "empty-waypoint"), object, (at, "metadata.labels"), message, fix);
    }
}
/// Endpoints that do not let their own service's waypoint in: their policies name its clients, whom they never see.
fn refused(context: &Context<'_>, findings: &mut Findings, service: &Service, object: &Raw<'_>) {
    for me in context.mesh.workloads().filter(|w| service.waypoints.iter().any(|at| is_instance(context.mesh, w, &at.waypoint))) {
        let (Ok(identity), Some(ip)) = (me.identity(), me.ips.first()) else { continue };
        for port in &service.ports {
            let open = context.mesh.endpoint_set(&service.key).into_iter().flat_map(|set| set.open_on(port.port));
            for (_, endpoint) in open.filter(|(_, e)| e.workload().protocol == Protocol::Hbone) {
                let w = endpoint.workload();
                let (Some(to), Some(target)) = (w.ips.first(), endpoint.target_port(service, port.port)) else { continue };
                let client = SocketAddr::new(*ip, CLIENT_PORT).into();
                let conn = InboundConn { client, dst: SocketAddr::new(*to, target), identity: Some(&identity) };
                if let Verdict::Deny(why) = authorize(context.mesh, w, &conn).verdict {
                    let message = format!(
                        "its waypoint ({identity}) may not connect to port {target} of {}/{}: {}",
                        w.namespace,
                        w.name,
                        why.brief()
                    );
                    let at = object.at(&["metadata", "labels"]).unwrap_or(&object.node);
                    let fix = "allow the waypoint's identity there, and judge its clients by policies with targetRefs";
                    findings.on((Level::Error, "waypoint-refused"), object, (at, "metadata.labels"), message, fix);
                }
            }
        }
    }
}
fn runs(context: &Context<'_>, waypoint: &GatewayRef) -> bool {
    let backed = |key: &ServiceKey| context.mesh.endpoint_set(key).is_some_and(|set| set.usable().next().is_some());
    match &waypoint.destination {
        GatewayDestination::Service(key) => backed(key),
        GatewayDestination::Address(network, ip) => {
            let by_vip = context.mesh.find_service_by_vip(network, *ip, "").is_some_and(|s| backed(&s.key));
            by_vip || context.mesh.find_workload_by_ip(network, *ip).is_some()
        }
    }
}

/// `status.conditions` that are false; pods and nodes have conditions of other meanings.
fn conditions(findings: &mut Findings, object: &Raw<'_>) {
    if !matches!(object.group.as_str(), "gateway.networking.k8s.io" | "networking.istio.io" | "security.istio.io") {
        return;
    }
    let Some(status) = object.at(&["status"]) else { return };
    for (i, condition) in items(status, "conditions").iter().enumerate() {
        let text = |key: &str| condition.get(key).and_then(Node::text).unwrap_or_default();
        if text("status") == "False" {
            let message = format!("{} is false: {} {}", text("type"), text("reason"), text("message"));
            let field = format!("status.conditions[{i}]");
            findings.on((Level::Warning, NEGATIVE_CONDITION), object, (condition, &field), message.trim_end().into(), "");
        }
    }
}
