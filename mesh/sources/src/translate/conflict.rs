//! Policies of one name that say different things.
//!
//! Owns the answer to which of them counts: none. Taking the first would let a forgotten copy of an older, wider policy
//! switch off the stricter one. Until one is left, what they bind is closed as by a malformed policy. Upstream:
//! [`crate::files`], which sees all places a name is written in. Downstream: [`super::Translator`].

use std::sync::Arc;

use mesh_model::policy::{Policy, PolicyBody, PolicyKey, Scope};

use super::intern::Labels;
use super::object::{AuthorizationPolicy, Body, Mode, Object, PeerAuthentication};
use super::targets::{TargetedAuth, TargetedPolicy};

/// Whether this is a policy, whose copies must agree.
pub(crate) fn must_agree(o: &Object) -> bool {
    matches!(o.body, Body::AuthorizationPolicy(_) | Body::PeerAuthentication(_) | Body::RequestAuthentication(_))
}

/// Whether the policies, all of one name, differ in what the agent would do. Copies that enforce nothing (dry runs,
/// policies of waypoints) never do.
pub(crate) fn disagree(versions: &[&Object]) -> bool {
    let Some((first, others)) = versions.split_first() else { return false };
    versions.iter().any(|v| enforces(&v.body)) && others.iter().any(|o| !same(&first.body, &o.body))
}
fn enforces(body: &Body) -> bool {
    match body {
        Body::AuthorizationPolicy(a) => {
            a.policy.as_ref().is_some_and(|p| !matches!(p.body, PolicyBody::Rules { dry_run: true, .. }))
                || a.layer7.as_ref().is_some_and(|t| t.enforced())
        }
        _ => true,
    }
}
fn same(a: &Body, b: &Body) -> bool {
    match (a, b) {
        // But for where they were written.
        (Body::AuthorizationPolicy(a), Body::AuthorizationPolicy(b)) => {
            let content = |p: &AuthorizationPolicy| p.policy.as_ref().map(|p| (p.scope, p.body.clone()));
            let targeted = [a, b].map(|p| p.layer7.as_ref().map(|t| (&t.policy.body, t.bound_to())));
            a.selector == b.selector && content(a) == content(b) && targeted[0] == targeted[1]
        }
        (Body::RequestAuthentication(a), Body::RequestAuthentication(b)) => {
            a.policy.body == b.policy.body && a.bound_to() == b.bound_to()
        }
        _ => a == b,
    }
}

/// What stands for all of them: closed where they bind, or in their whole namespace when they do not agree on that.
pub(crate) fn closed(versions: &[&Object], why: &str, root_namespace: &str) -> Option<Object> {
    let (first, others) = versions.split_first()?;
    let selector_of = |o: &Object| match &o.body {
        Body::AuthorizationPolicy(a) => a.selector.clone(),
        Body::PeerAuthentication(p) => p.selector.clone(),
        _ => Labels::default(),
    };
    let key = PolicyKey { namespace: Arc::clone(&first.id.namespace), name: Arc::clone(&first.id.name) };
    let selector = Some(selector_of(first)).filter(|s| others.iter().all(|o| selector_of(o) == *s)).unwrap_or_default();
    let body = match &first.body {
        Body::PeerAuthentication(p) => Body::PeerAuthentication(PeerAuthentication {
            selector,
            mode: Mode::Strict,
            ports: Vec::new(),
            created: Arc::clone(&p.created),
            forced: true,
        }),
        Body::AuthorizationPolicy(_) => {
            let policies: Vec<&AuthorizationPolicy> =
                versions.iter().filter_map(|o| if let Body::AuthorizationPolicy(a) = &o.body { Some(a) } else { None }).collect();
            let scope = match (selector.is_empty(), *first.id.namespace == *root_namespace) {
                (false, _) => Scope::Selector,
                (true, true) => Scope::Global,
                (true, false) => Scope::Namespace,
            };
            let why: Arc<str> = why.into();
            let targeted = policies.iter().filter_map(|a| a.layer7.as_deref());
            let layer7 = TargetedPolicy::closing_all(&key, &why, &first.origin, targeted);
            let policy = Policy { key, scope, body: PolicyBody::Unusable { why }, origin: Some(Arc::clone(&first.origin)) };
            // When every copy is for waypoints there is nothing for the agent to close.
            let policy = policies.iter().any(|a| a.policy.is_some()).then(|| Arc::new(policy));
            let selector = if policy.is_some() { selector } else { Labels::default() };
            Body::AuthorizationPolicy(AuthorizationPolicy { policy, selector, layer7 })
        }
        Body::RequestAuthentication(_) => {
            let all =
                versions.iter().filter_map(|o| if let Body::RequestAuthentication(a) = &o.body { Some(&**a) } else { None });
            Body::RequestAuthentication(TargetedAuth::closing_all(&key, &why.into(), &first.origin, all)?)
        }
        _ => return None,
    };
    Some(Object { id: first.id.clone(), origin: Arc::clone(&first.origin), body })
}
