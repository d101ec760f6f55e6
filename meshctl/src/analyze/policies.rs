//! Security policies that bind nothing, name nobody, or ask for what is not seen where they are asked.
use super::Context;
use super::codes::{INEFFECTIVE_POLICY, INEFFECTIVE_SELECTOR, NO_WORKLOADS};
use super::finding::{Findings, Level};
use crate::objects::{Raw, below, items, texts};
use mesh_model::workload::{Protocol, Workload};
use mesh_sources::yaml::{Node, Value};
use std::collections::BTreeMap;
use std::sync::Arc;

const SECURITY: &str = "security.istio.io";
/// A source that names nobody.
const UNKNOWN_CALLER: &str = "unknown-caller";
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// Checks every policy.
pub fn check(context: &Context<'_>, findings: &mut Findings) {
    for kind in ["AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"] {
        for policy in context.objects.of_kind(SECURITY, kind) {
            selector(context, findings, policy);
        }
    }
    for policy in context.objects.of_kind(SECURITY, "AuthorizationPolicy") {
        for (r, rule) in policy.at(&["spec"]).map(|s| items(s, "rules")).unwrap_or_default().iter().enumerate() {
            for (s, from) in items(rule, "from").iter().enumerate() {
                let path = format!("spec.rules[{r}].from[{s}].source");
                if let Some(source) = from.get("source") {
                    callers(context, findings, policy, source, &path);
                }
            }
            for (o, to) in items(rule, "to").iter().enumerate() {
                let path = format!("spec.rules[{r}].to[{o}].operation");
                if let Some(operation) = to.get("operation") {
                    ports(context, findings, policy, operation, &path);
                }
            }
        }
    }
}

/// The workloads a policy may bind by its selector: in its namespace, or in all from the root namespace.
fn bound<'a>(context: &Context<'a>, policy: &Raw<'_>, labels: &BTreeMap<String, String>) -> Vec<&'a Arc<Workload>> {
    let everywhere = policy.namespace == *context.mesh.view().root_namespace;
    let selected = |w: &&Arc<Workload>| {
        (everywhere || *w.namespace == *policy.namespace)
            && labels.iter().all(|(k, v)| w.labels.get(k).is_some_and(|have| **have == **v))
    };
    context.mesh.workloads().filter(selected).collect()
}

fn selector(context: &Context<'_>, findings: &mut Findings, policy: &Raw<'_>) {
    let Some(at) = policy.at(&["spec", "selector", "matchLabels"]) else { return };
    let labels = policy.at(&["spec", "selector"]).map(|s| texts(s, "matchLabels")).unwrap_or_default();
    let workloads = bound(context, policy, &labels);
    let field = "spec.selector.matchLabels";
    let written: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let written = written.join(",");
    if workloads.is_empty() {
        let message = format!("no workload has the labels {written}: it binds nothing");
        findings.on((Level::Warning, NO_WORKLOADS), policy, (at, field), message, "correct the labels, or remove the object");
    } else if policy.kind != "PeerAuthentication" && workloads.iter().all(|w| w.labels.get(GATEWAY_NAME).is_some()) {
        let message = format!("{written} selects waypoints or gateways, and those are bound by targetRefs only");
        findings.on((Level::Warning, INEFFECTIVE_SELECTOR), policy, (at, field), message, "write targetRefs instead");
    } else if workloads.iter().all(|w| w.protocol == Protocol::Tcp) {
        let message = format!("none of the workloads with {written} is in the mesh: nothing asks the policy");
        findings.on((Level::Warning, INEFFECTIVE_POLICY), policy, (at, field), message, "enrol them (istio.io/dataplane-mode)");
    }
}

/// Who is named in a source.
fn callers(context: &Context<'_>, findings: &mut Findings, policy: &Raw<'_>, source: &Node<'_>, path: &str) {
    let view = context.mesh.view();
    // Who is excluded and not there is excluded all the same: only positive fields are looked at.
    for (i, n) in items(source, "principals").iter().enumerate() {
        let Some(text) = n.text().filter(|t| !t.contains('*')) else { continue };
        let field = format!("{path}.principals[{i}]");
        let parts: Vec<&str> = text.strip_prefix("spiffe://").unwrap_or(text).split('/').collect();
        let &[domain, "ns", ns, "sa", account] = parts.as_slice() else {
            let message = format!("`{text}` is no identity of a workload: it matches nobody");
            let fix = "write trust-domain/ns/namespace/sa/service-account";
            findings.on((Level::Warning, UNKNOWN_CALLER), policy, (n, &field), message, fix);
            continue;
        };
        if view.is_own_trust_domain(domain) {
            account_of(context, findings, policy, (n, &field), ns, account);
        } else {
            let own: Vec<&str> = view.own_trust_domains().collect();
            let own = own.join(", ");
            let message = format!("the trust domain {domain} is not ours ({own}): it matches no workload of this mesh");
            let fix = "correct it, or give the trust domain and its aliases to meshctl as the proxies have them";
            findings.on((Level::Warning, UNKNOWN_CALLER), policy, (n, &field), message, fix);
        }
    }
    for (i, n) in items(source, "serviceAccounts").iter().enumerate() {
        let Some(text) = n.text() else { continue };
        let (ns, account) = text.split_once('/').unwrap_or((&policy.namespace, text));
        account_of(context, findings, policy, (n, &format!("{path}.serviceAccounts[{i}]")), ns, account);
    }
    for (i, n) in items(source, "namespaces").iter().enumerate() {
        let Some(ns) = n.text().filter(|t| !t.contains('*')) else { continue };
        let known =
            context.mesh.workloads().any(|w| *w.namespace == *ns) || context.objects.of_kind("", "Namespace").any(|o| o.id == ns);
        if !known {
            let message = format!("there is no namespace {ns}: it matches nobody");
            let field = format!("{path}.namespaces[{i}]");
            findings.on((Level::Warning, UNKNOWN_CALLER), policy, (n, &field), message, "correct the name");
        }
    }
}
/// Complains about a service account nobody has.
fn account_of(context: &Context<'_>, findings: &mut Findings, policy: &Raw<'_>, at: (&Node<'_>, &str), ns: &str, account: &str) {
    let known = context.mesh.workloads().any(|w| *w.namespace == *ns && *w.service_account == *account)
        || context.objects.of_kind("", "ServiceAccount").any(|o| o.namespace == ns && o.id == account);
    if !known {
        let message =
            format!("no workload has the service account {ns}/{account}, and there is no such ServiceAccount: it matches nobody");
        findings.on((Level::Warning, UNKNOWN_CALLER), policy, at, message, "correct the name");
    }
}

/// A policy of layer 4 sees the endpoint's port; the service's is what people remember.
fn ports(context: &Context<'_>, findings: &mut Findings, policy: &Raw<'_>, operation: &Node<'_>, path: &str) {
    let spec = policy.at(&["spec"]);
    if spec.is_some_and(|s| s.get("targetRefs").is_some() || s.get("targetRef").is_some()) {
        return;
    }
    let labels = spec.and_then(|s| below(s, &["selector"])).map(|s| texts(s, "matchLabels")).unwrap_or_default();
    let workloads = bound(context, policy, &labels);
    let Some(Value::Seq(all)) = operation.get("ports").map(|n| &n.value) else { return };
    for (i, n) in all.iter().enumerate() {
        let Some(port) = n.text().and_then(|t| t.parse::<u16>().ok()) else { continue };
        let pairs =
            || workloads.iter().flat_map(|w| w.services.iter()).flat_map(|(key, ports)| ports.iter().map(move |p| (key, p)));
        if pairs().any(|(_, (_, target))| *target == port) {
            continue;
        }
        if let Some((service, (_, target))) = pairs().find(|(_, (of_service, _))| *of_service == port) {
            let message = format!(
                "{port} is the port of the service {}; where this policy is asked the connection goes to port {target}",
                service.hostname
            );
            let field = format!("{path}.ports[{i}]");
            findings.on((Level::Warning, "service-port"), policy, (n, &field), message, "write the port of the endpoints");
        }
    }
}
