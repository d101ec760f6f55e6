//! Which services are for other networks too (Istio's `matchServiceScope`): `serviceScopeConfigs` of MeshConfig, or, where it says
//! nothing of them, the label for which Istio's charts write one.
//!
//! Upstream: [`super::telemetry`], which reads MeshConfig. Downstream: services; what is not for others is refused by the gateway.
use std::sync::Arc;

use super::istio::label_selector;
use super::object::{LabelSelector, Reader};
use super::read::{self, Bad, Read};
use super::waypoint::selects;
use super::{Dirty, Labels, Translator, mark_space};
use crate::diagnostics::Severity;
use crate::yaml::Node;

const GLOBAL: &str = "istio.io/global";

/// One of `serviceScopeConfigs` that says `GLOBAL`. Those that say `LOCAL` change nothing, in Istio neither.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Global {
    namespaces: LabelSelector,
    services: LabelSelector,
}

/// Reads them; `None` where MeshConfig has no such section. One that is wrong makes nothing global, and is reported.
pub(super) fn read(r: &mut Reader<'_>, mesh: &Node<'_>) -> Option<Arc<[Global]>> {
    mesh.get("serviceScopeConfigs")?;
    let list = read::list(mesh, "serviceScopeConfigs").unwrap_or_else(|bad| {
        r.report(mesh, &bad, Severity::Error);
        &[]
    });
    let mut all = Vec::new();
    for node in list {
        match one(r, node) {
            Ok(global) => all.extend(global),
            Err(bad) => r.report(mesh, &bad, Severity::Error),
        }
    }
    Some(all.into())
}

fn one<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, Option<Global>> {
    read::only(node, &["namespaceSelector", "servicesSelector", "scope"])?;
    let mut selector = |key| -> Read<'p, LabelSelector> {
        let Some(node) = read::map(node, key)? else { return Ok(LabelSelector::default()) };
        read::only(node, &["matchLabels", "matchExpressions"])?;
        label_selector(r, node)
    };
    let (namespaces, services) = (selector("namespaceSelector")?, selector("servicesSelector")?);
    match read::text(node, "scope")? {
        Some("GLOBAL") => Ok(Some(Global { namespaces, services })),
        None | Some("LOCAL") => Ok(None),
        Some(_) => Err(Bad::value(node.get("scope").unwrap_or(node), "not a scope", "write GLOBAL or LOCAL")),
    }
}

impl Translator {
    /// Whether a service is for other networks too.
    pub(super) fn is_global(&self, namespace: &str, labels: &Labels) -> bool {
        match &self.scopes {
            None => labels.get(GLOBAL).is_some_and(|value| &**value == "true"),
            Some(all) => {
                all.iter().any(|one| selects(&one.services, labels, None) && self.selects_namespace(&one.namespaces, namespace))
            }
        }
    }

    /// Looks at every service anew where MeshConfig says something else of them.
    pub(super) fn flush_scopes(&mut self, dirty: &mut Dirty) {
        let now = self.layer7.as_ref().and_then(|layer7| layer7.scopes());
        if now == self.scopes.as_ref() {
            return;
        }
        self.scopes = now.cloned();
        for (namespace, space) in &self.spaces {
            mark_space(namespace, space, dirty);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{State, ns, objects, view};
    use super::super::{Settings, Translator};

    fn mesh(body: &str) -> String {
        let body = body.replace('\n', "\n    ");
        format!(
            "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    {body}\n"
        )
    }
    fn service(namespace: &str, name: &str, labels: &str) -> String {
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}, spec: {{clusterIP: None, ports: [{{port: 80}}]}}}}\n"
        )
    }

    #[test]
    fn mesh_config_says_which_services_are_for_other_networks() {
        let mut t = Translator::new(view(), &Settings { layer7: true, ..Settings::default() });
        let mut state = State::default();
        let mut globals = |text: &str| {
            let (all, problems) = objects(&mut t, text);
            for object in all {
                t.upsert(object);
            }
            state.apply(t.flush());
            let mut out: Vec<String> = state.services.values().filter(|s| s.global).map(|s| s.key.to_string()).collect();
            out.sort();
            (out, problems.len())
        };
        let of = |names: &[&str]| names.iter().map(|n| format!("{n}.svc.cluster.local")).collect::<Vec<_>>();
        let services = ns("a", "tier: shared")
            + &ns("b", "")
            + &service("a", "x", "")
            + &service("a", "y", "istio.io/global: 'true'")
            + &service("b", "z", "istio.io/global: 'true'")
            + &service("b", "w", "app: w");
        // Without a word in MeshConfig the label alone counts.
        assert_eq!(globals(&services), (of(&["a/y.a", "b/z.b"]), 0));
        assert_eq!(globals(&mesh("rootNamespace: istio-system")), (of(&["a/y.a", "b/z.b"]), 0));
        // As Istio's charts write it.
        let charts = "serviceScopeConfigs:\n- servicesSelector:\n    matchExpressions:\n    - {key: istio.io/global, operator: In, values: ['true']}\n  scope: GLOBAL";
        assert_eq!(globals(&mesh(charts)), (of(&["a/y.a", "b/z.b"]), 0));
        // One suffices; both of its selectors must select; what says LOCAL takes nothing back.
        let several = "serviceScopeConfigs:\n- {namespaceSelector: {matchLabels: {tier: shared}}, scope: GLOBAL}\n- {servicesSelector: {matchLabels: {app: w}}, namespaceSelector: {matchLabels: {tier: shared}}, scope: GLOBAL}\n- {scope: LOCAL}";
        assert_eq!(globals(&mesh(several)), (of(&["a/x.a", "a/y.a"]), 0));
        assert_eq!(globals(&ns("b", "tier: shared")), (of(&["a/x.a", "a/y.a", "b/w.b", "b/z.b"]), 0));
        assert_eq!(globals(&mesh("serviceScopeConfigs: []")), (vec![], 0));
        // What is wrong opens nothing.
        for wrong in [
            "{namespacesSelector: {}, scope: GLOBAL}",
            "{servicesSelector: {matchExpressions: [{key: a, operator: Is}]}, scope: GLOBAL}",
            "{scope: ALL}",
        ] {
            assert_eq!(globals(&mesh(&format!("serviceScopeConfigs:\n- {wrong}"))), (vec![], 1), "{wrong}");
        }
        assert_eq!(globals(&mesh("serviceScopeConfigs: all")), (vec![], 1));
    }
}
