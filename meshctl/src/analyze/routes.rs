//! VirtualServices and DestinationRules: routes nobody evaluates, rules nobody reaches, subsets without endpoints.
use super::Context;
use super::codes::{
    CLAIMS_WITHOUT_AUTHENTICATION, CONFLICTING_HOSTS, EMPTY_SUBSET, INEFFECTIVE_MATCH, INEFFECTIVE_POLICY, NO_VERIFICATION,
    NO_VERIFICATION_PORT, PORT_REQUIRED, UNREACHABLE_RULE,
};
use super::finding::{Findings, Level};
use crate::objects::{Raw, below, items};
use mesh_sources::yaml::{Node, Value};
use std::collections::BTreeMap;

const NETWORKING: &str = "networking.istio.io";

/// Checks routes and destinations.
pub fn check(context: &Context<'_>, findings: &mut Findings) {
    let mut by_host: BTreeMap<String, Vec<&Raw<'_>>> = BTreeMap::new();
    for vs in context.objects.of_kind(NETWORKING, "VirtualService") {
        rules(findings, vs);
        claims(context, findings, vs);
        ports(context, findings, vs);
        if for_mesh(vs) {
            for host in hosts(context, vs) {
                without_waypoint(context, findings, vs, &host);
                by_host.entry(host).or_default().push(vs);
            }
        }
    }
    for (host, all) in by_host.iter().filter(|(_, all)| all.len() > 1) {
        let names: Vec<String> = all.iter().map(|vs| format!("{}/{}", vs.namespace, vs.id)).collect();
        for vs in all {
            let message = format!("{} all route {host}: their order depends on their age", names.join(", "));
            let at = vs.at(&["spec", "hosts"]).unwrap_or(&vs.node);
            findings.on((Level::Warning, CONFLICTING_HOSTS), vs, (at, "spec.hosts"), message, "merge them into one");
        }
    }
    for rule in context.objects.of_kind(NETWORKING, "DestinationRule") {
        subsets(context, findings, rule);
        verification(findings, rule);
    }
}

/// Whether it is for calls inside the mesh (`mesh` is the default of `gateways`).
fn for_mesh(vs: &Raw<'_>) -> bool {
    let gateways = vs.at(&["spec"]).map(|s| items(s, "gateways")).unwrap_or_default();
    gateways.is_empty() || gateways.iter().any(|g| g.text() == Some("mesh"))
}
/// The hosts it routes, in full.
fn hosts(context: &Context<'_>, vs: &Raw<'_>) -> Vec<String> {
    let written = vs.at(&["spec"]).map(|s| items(s, "hosts")).unwrap_or_default();
    written.iter().filter_map(Node::text).map(|h| full(context, vs, h)).collect()
}
/// A host as a name of the mesh: only names without dots are completed.
fn full(context: &Context<'_>, object: &Raw<'_>, host: &str) -> String {
    if host.contains(['.', '*']) {
        return host.to_ascii_lowercase();
    }
    format!("{host}.{}.svc.{}", object.namespace, context.mesh.view().cluster_domain).to_ascii_lowercase()
}

fn without_waypoint(context: &Context<'_>, findings: &mut Findings, vs: &Raw<'_>, host: &str) {
    let Some(service) = context.mesh.find_service_by_host(host, &vs.namespace) else { return };
    if service.waypoints.is_empty() && service.waypoint_error.is_none() {
        let message = format!("no waypoint stands in front of {host}: nobody evaluates these routes");
        let at = vs.at(&["spec", "hosts"]).unwrap_or(&vs.node);
        let fix = "label the service or its namespace with istio.io/use-waypoint";
        findings.on((Level::Warning, INEFFECTIVE_POLICY), vs, (at, "spec.hosts"), message, fix);
    }
}

/// Rules behind one that takes everything, and matches that an earlier rule has.
fn rules(findings: &mut Findings, vs: &Raw<'_>) {
    let http = vs.at(&["spec"]).map(|s| items(s, "http")).unwrap_or_default();
    let mut seen: Vec<(usize, String)> = Vec::new();
    let mut all: Option<usize> = None;
    for (at, rule) in http.iter().enumerate() {
        let field = format!("spec.http[{at}]");
        if let Some(first) = all {
            let message = format!("rule {first} takes every request: this one is never reached");
            findings.on((Level::Warning, UNREACHABLE_RULE), vs, (rule, &field), message, "put it before, or remove one of them");
            continue;
        }
        let matches = items(rule, "match");
        let mut duplicates = 0;
        for (m, condition) in matches.iter().enumerate() {
            let text = content(condition);
            if let Some((first, _)) = seen.iter().find(|(_, t)| *t == text) {
                duplicates += 1;
                let message = format!("rule {first} has the same match: this one is never used");
                findings.on(
                    (Level::Note, INEFFECTIVE_MATCH),
                    vs,
                    (condition, &format!("{field}.match[{m}]")),
                    message,
                    "remove it",
                );
            }
            seen.push((at, text));
        }
        if !matches.is_empty() && duplicates == matches.len() {
            let message = "all its matches are those of earlier rules: it is never reached".to_owned();
            findings.on((Level::Warning, UNREACHABLE_RULE), vs, (rule, &field), message, "remove it, or correct its matches");
        }
        if matches.is_empty() || matches.iter().any(takes_all) {
            all = Some(at);
        }
    }
}
/// Whether a match takes every request: it says nothing, or only that the path begins with `/`.
fn takes_all(condition: &Node<'_>) -> bool {
    let Value::Map(entries) = &condition.value else { return false };
    entries.iter().all(|e| match &*e.key {
        "name" => true,
        "uri" => below(&e.node, &["prefix"]).and_then(Node::text) == Some("/"),
        _ => false,
    })
}
/// What a node says, without its lines.
fn content(node: &Node<'_>) -> String {
    match &node.value {
        Value::Null => "null".into(),
        Value::Scalar { text, .. } => format!("{text:?}"),
        Value::Seq(all) => format!("[{}]", all.iter().map(content).collect::<Vec<_>>().join(",")),
        Value::Map(entries) => {
            let named = entries.iter().filter(|e| e.key != "name");
            let mut all: Vec<String> = named.map(|e| format!("{:?}:{}", e.key, content(&e.node))).collect();
            all.sort();
            format!("{{{}}}", all.join(","))
        }
    }
}

/// Destinations that do not say which of several ports is meant.
fn ports(context: &Context<'_>, findings: &mut Findings, vs: &Raw<'_>) {
    let Some(spec) = vs.at(&["spec"]) else { return };
    for list in ["http", "tcp", "tls"] {
        for (r, rule) in items(spec, list).iter().enumerate() {
            for (d, route) in items(rule, "route").iter().enumerate() {
                let Some(to) = route.get("destination").filter(|to| below(to, &["port", "number"]).is_none()) else { continue };
                let host = full(context, vs, to.get("host").and_then(Node::text).unwrap_or_default());
                let Some(service) = context.mesh.find_service_by_host(&host, &vs.namespace) else { continue };
                if service.ports.len() > 1 {
                    let all: Vec<String> = service.ports.iter().map(|p| p.port.to_string()).collect();
                    let message = format!(
                        "{host} has the ports {}: which one is meant is not said, the one the client asked for is taken",
                        all.join(", ")
                    );
                    let field = format!("spec.{list}[{r}].route[{d}].destination");
                    findings.on((Level::Warning, PORT_REQUIRED), vs, (to, &field), message, "write port.number");
                }
            }
        }
    }
}

/// Routes by claims of a token that nobody verifies.
fn claims(context: &Context<'_>, findings: &mut Findings, vs: &Raw<'_>) {
    let verified = context.objects.of_kind("security.istio.io", "RequestAuthentication").next().is_some();
    if verified {
        return;
    }
    let http = vs.at(&["spec"]).map(|s| items(s, "http")).unwrap_or_default();
    for (at, rule) in http.iter().enumerate() {
        for (m, condition) in items(rule, "match").iter().enumerate() {
            for key in ["headers", "withoutHeaders"] {
                let Some(Value::Map(entries)) = condition.get(key).map(|n| &n.value) else { continue };
                for e in entries.iter().filter(|e| e.key.starts_with("@request.auth.claims")) {
                    let message = format!("{} is a claim, and no RequestAuthentication verifies tokens: it never matches", e.key);
                    let field = format!("spec.http[{at}].match[{m}].{key}");
                    let fix = "add a RequestAuthentication for the gateway or service";
                    findings.on((Level::Error, CLAIMS_WITHOUT_AUTHENTICATION), vs, (&e.node, &field), message, fix);
                }
            }
        }
    }
}

fn subsets(context: &Context<'_>, findings: &mut Findings, rule: &Raw<'_>) {
    let Some(spec) = rule.at(&["spec"]) else { return };
    let host = full(context, rule, rule.text(&["spec", "host"]));
    let Some(service) = context.mesh.find_service_by_host(&host, &rule.namespace) else { return };
    for (i, subset) in items(spec, "subsets").iter().enumerate() {
        let name = subset.get("name").and_then(Node::text).unwrap_or_default();
        let labels = crate::objects::texts(subset, "labels");
        let selected =
            |w: &mesh_model::workload::Workload| labels.iter().all(|(k, v)| w.labels.get(k).is_some_and(|have| **have == **v));
        if !context.mesh.endpoints(&service.key).any(|w| selected(w)) {
            let message = format!("no endpoint of {host} is in the subset {name}: requests to it are answered 503");
            let field = format!("spec.subsets[{i}]");
            findings.on((Level::Error, EMPTY_SUBSET), rule, (subset, &field), message, "correct the labels");
        }
    }
}

/// TLS towards the endpoints without a certificate authority of its own.
fn verification(findings: &mut Findings, rule: &Raw<'_>) {
    let Some(spec) = rule.at(&["spec"]) else { return };
    let mut policies: Vec<(String, &Node<'_>)> =
        spec.get("trafficPolicy").map(|p| ("spec.trafficPolicy".into(), p)).into_iter().collect();
    for (i, subset) in items(spec, "subsets").iter().enumerate() {
        policies.extend(subset.get("trafficPolicy").map(|p| (format!("spec.subsets[{i}].trafficPolicy"), p)));
    }
    for (path, policy) in policies {
        tls(findings, rule, policy, &path, NO_VERIFICATION);
        for (i, port) in items(policy, "portLevelSettings").iter().enumerate() {
            tls(findings, rule, port, &format!("{path}.portLevelSettings[{i}]"), NO_VERIFICATION_PORT);
        }
    }
}
fn tls(findings: &mut Findings, rule: &Raw<'_>, policy: &Node<'_>, path: &str, code: &str) {
    let Some(tls) = policy.get("tls") else { return };
    let mode = tls.get("mode").and_then(Node::text).unwrap_or_default();
    if !matches!(mode, "SIMPLE" | "MUTUAL") {
        return;
    }
    let field = format!("{path}.tls");
    if tls.get("insecureSkipVerify").and_then(Node::text) == Some("true") {
        let message = format!("mode {mode} with insecureSkipVerify: whoever answers is believed");
        findings.on((Level::Warning, code), rule, (tls, &field), message, "remove insecureSkipVerify and name caCertificates");
    } else if tls.get("caCertificates").is_none() && tls.get("credentialName").is_none() {
        let message =
            format!("mode {mode} without caCertificates: the roots of the system count here (older Istio verifies nothing)");
        findings.on((Level::Note, code), rule, (tls, &field), message, "name caCertificates");
    }
}
