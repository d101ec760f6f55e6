//! AuthorizationPolicy → [`Policy`] (waypoint §1.7), with the holes of the usual translation closed.
//!
//! Anything malformed or not known makes the policy unusable, and an unusable policy denies where it was meant to
//! apply. Well-formed rules about HTTP cannot be judged here: such a rule allows nothing, and denies as if its HTTP
//! part matched. Policies with `targetRefs` are not for the agent; [`super::request_policy`] reads the rest of them.
//! Upstream: [`super::object`]. Downstream: `mesh_model::authz`.

use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch, Values};

use super::intern::{Interner, Labels};
use super::object::{AuthorizationPolicy, ObjectId, Reader};
use super::read::{self, Bad, Read};
use super::request_policy;
use super::targets::{TargetKind, TargetedPolicy, WrittenTarget};
use crate::diagnostics::Severity;
use crate::yaml::{Node, Value};

/// Fields of `metadata` in the Kubernetes API.
pub(super) const OBJECT_META: &[&str] = &[
    "name",
    "namespace",
    "generateName",
    "labels",
    "annotations",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "finalizers",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];
/// Fields of the object itself.
pub(super) const OBJECT: &[&str] = &["apiVersion", "kind", "metadata", "spec", "status"];
/// Fields of a rule.
pub(super) const RULE: &[&str] = &["from", "to", "when"];
const UNUSABLE: &str = "until it is corrected, everything in its scope is denied";

pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId, origin: &Arc<Origin>) -> AuthorizationPolicy {
    let root = id.namespace == r.root_namespace;
    let meta = node.get("metadata").unwrap_or(node);
    let dry_run = match read::annotation(meta, "istio.io/dry-run") {
        Some("1" | "t" | "T" | "TRUE" | "true" | "True") => true,
        None | Some("0" | "f" | "F" | "FALSE" | "false" | "False") => false,
        Some(_) => {
            let at = meta.get("annotations").and_then(|a| a.get("istio.io/dry-run")).unwrap_or(meta);
            r.report(node, &Bad::value(at, "expected `true` or `false`; the policy is enforced", ""), Severity::Warning);
            false
        }
    };
    let not_for_agent = AuthorizationPolicy { policy: None, selector: Labels::default(), layer7: None };
    let key = PolicyKey { namespace: Arc::clone(&id.namespace), name: Arc::clone(&id.name) };
    // Whether it is for a waypoint, and whom it binds, come first: they decide what a mistake further down closes.
    let (selector, scope_error) = match read::map(node, "spec") {
        Ok(Some(spec)) => match selector(spec, r.pool) {
            Ok(labels) if has(spec, "selector") => (labels, None),
            Ok(labels) => match targets(spec, &id.namespace) {
                Ok(Some(_)) if !r.layer7 => return not_for_agent,
                Ok(Some(targets)) => {
                    let layer7 = request_policy::read(r, node, spec, &key, dry_run, origin, targets);
                    return AuthorizationPolicy { layer7, ..not_for_agent };
                }
                Ok(None) => (labels, None),
                Err(bad) => (labels, Some(bad)),
            },
            Err(bad) => (Labels::default(), Some(bad)),
        },
        Ok(None) => (Labels::default(), None),
        Err(bad) => (Labels::default(), Some(bad)),
    };
    let scope = match (selector.is_empty(), root) {
        (false, _) => Scope::Selector,
        (true, true) => Scope::Global,
        (true, false) => Scope::Namespace,
    };
    // What may name targets that cannot be told must close whatever they may have been.
    let names_targets = |spec| has(spec, "targetRef") || targets_written(spec).is_some() || read::only(spec, SPEC).is_err();
    let targets_unknown = scope_error.is_some() || node.get("spec").is_some_and(names_targets);
    let body = match scope_error {
        Some(bad) => Err(bad),
        None => body(r, node, dry_run, &id.namespace),
    };
    let body = match body {
        Ok(Some(body)) => body,
        Ok(None) => return not_for_agent,
        Err(mut bad) => {
            let why = refused(r, node, &mut bad, dry_run);
            if dry_run {
                return not_for_agent;
            }
            PolicyBody::Unusable { why }
        }
    };
    let policy = Policy { key, scope, body, origin: Some(Arc::clone(origin)) };
    let layer7 = if r.layer7 && targets_unknown { TargetedPolicy::closing(&policy, root) } else { None };
    AuthorizationPolicy { policy: Some(Arc::new(policy)), selector, layer7 }
}
/// Tells that a policy is refused, and gives the text it refuses with in turn.
pub(super) fn refused<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, bad: &mut Bad<'p>, dry_run: bool) -> Arc<str> {
    let why = bad.why(node);
    bad.message = format!("{}; {}", bad.message, if dry_run { "the policy is a dry run and is ignored" } else { UNUSABLE });
    r.report(node, bad, Severity::Error);
    why.into()
}

/// Whether `key` is written at all, even as null.
pub(super) fn has(node: &Node<'_>, key: &str) -> bool {
    matches!(&node.value, Value::Map(entries) if entries.iter().any(|e| e.key == key))
}
pub(super) fn raw<'p>(node: &'p Node<'p>, key: &str) -> Option<&'p Node<'p>> {
    match &node.value {
        Value::Map(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.node),
        _ => None,
    }
}

/// The labels of `spec.selector`; empty when there is none. A selector that is written but says nothing readable is an
/// error: taking it for "the whole namespace" would let an ALLOW reach further than its author can see.
pub(super) fn selector<'p>(spec: &'p Node<'p>, pool: &mut Interner) -> Read<'p, Labels> {
    let Some(selector) = raw(spec, "selector") else { return Ok(Labels::default()) };
    if selector.value == Value::Null {
        return Err(Bad::value(selector, "`selector` is written but empty", "remove it to bind the whole namespace"));
    }
    read::only(selector, &["matchLabels"])?;
    match raw(selector, "matchLabels") {
        None => Ok(Labels::default()),
        Some(n) if n.value == Value::Null => {
            Err(Bad::value(n, "`matchLabels` is written but empty", "remove the selector to bind the whole namespace"))
        }
        Some(n) => {
            for e in read::entries(n)? {
                if e.key.is_empty() || e.key.contains('*') {
                    return Err(Bad::value(&e.node, format!("`{}` is not a label", e.key), ""));
                }
                if read::scalar(&e.node)?.contains('*') {
                    return Err(Bad::value(&e.node, "a selector has no wildcards", "write the whole value"));
                }
            }
            read::labels(selector, "matchLabels", pool)
        }
    }
}

/// Fields of `spec`.
const SPEC: &[&str] = &["selector", "targetRef", "targetRefs", "rules", "action", "provider"];

/// `targetRefs`, unless it is an empty list, which is as good as not written.
fn targets_written<'p>(spec: &'p Node<'p>) -> Option<&'p Node<'p>> {
    raw(spec, "targetRefs").filter(|n| !matches!(&n.value, Value::Seq(s) if s.is_empty()))
}
/// The targets the policy names, if it does: waypoints enforce it then and the agent leaves it alone.
pub(super) fn targets<'p>(spec: &'p Node<'p>, namespace: &str) -> Read<'p, Option<Vec<WrittenTarget>>> {
    let (one, many) = (raw(spec, "targetRef"), targets_written(spec));
    if let (Some(n), Some(_)) = (one, many) {
        return Err(Bad::value(n, "`targetRef` and `targetRefs` cannot both be written", "keep `targetRefs`"));
    }
    let Some(written) = one.or(many) else { return Ok(None) };
    if written.value == Value::Null {
        return Err(Bad::value(
            written,
            "the target is written but empty",
            "name a target, or remove the field to bind the whole namespace",
        ));
    }
    if one.is_some() {
        return Ok(Some(vec![target(written, namespace, "spec.targetRef".into())?]));
    }
    let each = read::list(spec, "targetRefs")?.iter().enumerate();
    each.map(|(i, n)| target(n, namespace, format!("spec.targetRefs[{i}]").into())).collect::<Read<'p, _>>().map(Some)
}
/// One target. Kinds of later versions pass; of the known ones the group must be right, or nothing would be bound.
pub(super) fn target<'p>(n: &'p Node<'p>, namespace: &str, field: Box<str>) -> Read<'p, WrittenTarget> {
    read::only(n, &["group", "kind", "name", "namespace"])?;
    let needed = |key: &'static str, message: &'static str| match n.get(key) {
        None => Err(Bad::missing(n, key, message)),
        Some(at) => match read::scalar(at)? {
            "" => Err(Bad::value(at, message, "")),
            t => Ok(t),
        },
    };
    let kind = needed("kind", "a target has a kind")?;
    let name = needed("name", "a target has a name")?;
    let group = read::text(n, "group")?;
    let want = match kind {
        "Service" if matches!(group, None | Some("" | "core")) => None,
        "Service" => Some("\"\""),
        "ServiceEntry" => Some("networking.istio.io"),
        "Gateway" | "GatewayClass" => Some("gateway.networking.k8s.io"),
        _ if group.is_none() => return Err(Bad::missing(n, "group", format!("a target of kind {kind} has a group"))),
        _ => None,
    };
    if let Some(want) = want.filter(|w| group != Some(*w)) {
        let message = format!("the group of a {kind} is {want}");
        return Err(n.get("group").map_or_else(
            || Bad::missing(n, "group", message.clone()),
            |at| Bad::value(at, message.clone(), "correct the group"),
        ));
    }
    match n.get("namespace") {
        Some(at) if !matches!(read::scalar(at)?, ns if ns.is_empty() || ns == namespace) => {
            Err(Bad::value(at, "a target is in the policy's own namespace", "remove the field, or move the policy"))
        }
        _ => Ok(WrittenTarget { kind: TargetKind::of(kind), name: name.into(), field, line: n.line }),
    }
}

/// Refuses fields that nobody knows, down to those of `spec`: what they were meant to say would be left out.
pub(super) fn known_fields<'p>(node: &'p Node<'p>) -> Read<'p, ()> {
    read::only(node, OBJECT)?;
    if let Some(meta) = node.get("metadata") {
        read::only(meta, OBJECT_META)?;
    }
    raw(node, "spec").map_or(Ok(()), |spec| read::only(spec, SPEC))
}
fn body<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, dry_run: bool, namespace: &str) -> Read<'p, Option<PolicyBody>> {
    known_fields(node)?;
    let Some(spec) = read::map(node, "spec")? else {
        // No spec is the spec without rules: ALLOW nothing.
        return Ok(Some(PolicyBody::Rules { action: Action::Allow, dry_run, rules: Vec::new() }));
    };
    for key in ["targetRef", "targetRefs"] {
        if let Some(n) = spec.get(key)
            && !matches!(&n.value, Value::Seq(s) if s.is_empty())
        {
            return Err(Bad::value(n, format!("`{key}` and `selector` cannot be combined"), "keep one of them"));
        }
    }
    let action = match raw(spec, "action") {
        None => Action::Allow,
        Some(n) => match read::scalar(n)? {
            "ALLOW" => Action::Allow,
            "DENY" => Action::Deny,
            "AUDIT" => {
                let bad = Bad {
                    at: n,
                    missing: None,
                    message: "AUDIT has no effect in the node agent".into(),
                    fix: "use telemetry, or `istio.io/dry-run: \"true\"`",
                    code: "action",
                };
                r.report(node, &bad, Severity::Note);
                return Ok(None);
            }
            "CUSTOM" => {
                return Err(Bad {
                    at: n,
                    missing: None,
                    message: "the node agent cannot ask an external authorizer, and without targetRefs no waypoint does".into(),
                    fix: "bind the policy to a waypoint with targetRefs",
                    code: "action",
                });
            }
            t => return Err(Bad::value(n, format!("`{t}` is not an action"), "write ALLOW or DENY")),
        },
    };
    if let Some(n) = spec.get("provider") {
        return Err(Bad::value(n, "`provider` only goes with `action: CUSTOM`", "remove it"));
    }
    let mut rules = Vec::new();
    for rule in read::list(spec, "rules")? {
        let mut http: Option<&'p Node<'p>> = None;
        let translated = self::rule(r, rule, namespace, &mut http)?;
        if let Some(at) = http {
            let (message, fix) = match action {
                Action::Allow => (
                    "HTTP attributes cannot be judged by the node agent; this rule allows nothing",
                    "bind the policy to a waypoint with targetRefs, or allow by source and port",
                ),
                Action::Deny => (
                    "HTTP attributes cannot be judged by the node agent; this rule denies as if they matched",
                    "bind the policy to a waypoint with targetRefs",
                ),
            };
            r.report(node, &Bad { at, missing: None, message: message.into(), fix, code: "http-in-l4" }, Severity::Warning);
            if action == Action::Allow {
                // A rule that matches nothing, so that the ones behind it keep the numbers people count.
                rules.push(Rule { clauses: vec![Clause { matches: vec![Match::default()] }] });
                continue;
            }
        }
        rules.push(translated);
    }
    if rules.is_empty() && action == Action::Deny {
        let at = spec.get("rules").unwrap_or(spec);
        r.report(
            node,
            &Bad {
                at,
                missing: None,
                message: "a DENY policy without rules denies nothing".into(),
                fix: "add a rule; `- {}` matches everything",
                code: "no-rules",
            },
            Severity::Warning,
        );
    }
    Ok(Some(PolicyBody::Rules { action, dry_run, rules }))
}

/// One rule. `http` is set to the first attribute only a waypoint can judge; that attribute then counts as matching.
fn rule<'p>(r: &mut Reader<'_>, rule: &'p Node<'p>, namespace: &str, http: &mut Option<&'p Node<'p>>) -> Read<'p, Rule> {
    if rule.value == Value::Null {
        return Err(Bad::value(rule, "an empty rule", "write `- {}` for a rule that matches everything"));
    }
    read::only(rule, RULE)?;
    let mut clauses = Vec::new();
    for (list, inner) in [("to", "operation"), ("from", "source")] {
        let Some(n) = raw(rule, list) else { continue };
        let alternatives = read::list(rule, list)?;
        if alternatives.is_empty() {
            return Err(Bad::value(n, format!("`{list}` is written but empty"), "remove it, or list at least one element"));
        }
        let (mut matches, mut always) = (Vec::new(), false);
        for alternative in alternatives {
            read::only(alternative, &[inner])?;
            let Some(fields) = raw(alternative, inner) else {
                return Err(Bad::value(alternative, format!("an element of `{list}` has `{inner}`"), ""));
            };
            let mut m = Match::default();
            for e in read::entries(fields)? {
                let known = if list == "to" {
                    operation(&e.key, &e.node, &mut m)?
                } else {
                    source(r, &e.key, &e.node, &mut m, namespace)?
                };
                match known {
                    Known::Yes => {}
                    Known::Http => {
                        texts(&e.node)?;
                        http.get_or_insert(&e.node);
                    }
                    Known::No => {
                        read::only(fields, if list == "to" { OPERATION } else { SOURCE })?;
                        return Err(Bad::value(&e.node, format!("unknown field `{}`", e.key), ""));
                    }
                }
            }
            if read::entries(fields)?.is_empty() {
                return Err(Bad::value(fields, format!("`{inner}` is empty"), "name at least one attribute"));
            }
            // Only HTTP attributes: as "matching", this alternative is always true, and so is the clause.
            if m == Match::default() {
                always = true;
            } else {
                matches.push(m);
            }
        }
        if !always {
            matches.shrink_to_fit();
            clauses.push(Clause { matches });
        }
    }
    if let Some(n) = raw(rule, "when") {
        let conditions = read::list(rule, "when")?;
        if conditions.is_empty() {
            return Err(Bad::value(n, "`when` is written but empty", "remove it"));
        }
        for c in conditions {
            if let Some(m) = condition(r, c, namespace, http)? {
                clauses.push(Clause { matches: vec![m] });
            }
        }
    }
    Ok(Rule { clauses })
}

pub(super) enum Known {
    Yes,
    Http,
    No,
}
pub(super) const OPERATION: &[&str] = &["hosts", "notHosts", "ports", "notPorts", "methods", "notMethods", "paths", "notPaths"];
pub(super) const SOURCE: &[&str] = &[
    "principals",
    "notPrincipals",
    "requestPrincipals",
    "notRequestPrincipals",
    "namespaces",
    "notNamespaces",
    "ipBlocks",
    "notIpBlocks",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
    "serviceAccounts",
    "notServiceAccounts",
    "trustDomains",
    "notTrustDomains",
];

fn operation<'p>(key: &str, n: &'p Node<'p>, m: &mut Match) -> Read<'p, Known> {
    match key {
        "ports" => m.destination_ports.set_any(ports(n)?),
        "notPorts" => m.destination_ports.set_none(ports(n)?),
        "hosts" | "notHosts" | "methods" | "notMethods" | "paths" | "notPaths" => return Ok(Known::Http),
        _ => return Ok(Known::No),
    }
    Ok(Known::Yes)
}

pub(super) fn source<'p>(r: &mut Reader<'_>, key: &str, n: &'p Node<'p>, m: &mut Match, namespace: &str) -> Read<'p, Known> {
    match key {
        "principals" => m.principals.set_any(principals(r, n)?),
        "notPrincipals" => m.principals.set_none(principals(r, n)?),
        "namespaces" => m.namespaces.set_any(text_matches(r, n)?),
        "notNamespaces" => m.namespaces.set_none(text_matches(r, n)?),
        "ipBlocks" => m.source_ips.set_any(nets(n)?),
        "notIpBlocks" => m.source_ips.set_none(nets(n)?),
        "serviceAccounts" => m.service_accounts.set_any(accounts(r, n, namespace)?),
        "notServiceAccounts" => m.service_accounts.set_none(accounts(r, n, namespace)?),
        "trustDomains" => m.trust_domains.set_any(text_matches(r, n)?),
        "notTrustDomains" => m.trust_domains.set_none(text_matches(r, n)?),
        "requestPrincipals" | "notRequestPrincipals" | "remoteIpBlocks" | "notRemoteIpBlocks" => {
            return Ok(Known::Http);
        }
        _ => return Ok(Known::No),
    }
    Ok(Known::Yes)
}

/// One `when` as written.
pub(super) struct When<'p> {
    pub(super) key_node: &'p Node<'p>,
    pub(super) key: &'p str,
    any: Option<&'p Node<'p>>,
    none: Option<&'p Node<'p>>,
}
impl<'p> When<'p> {
    pub(super) fn read(c: &'p Node<'p>) -> Read<'p, Self> {
        read::only(c, &["key", "values", "notValues"])?;
        let Some(key_node) = c.get("key") else { return Err(Bad::missing(c, "key", "a condition has a key")) };
        let key = read::scalar(key_node)?;
        let (any, none) = (raw(c, "values"), raw(c, "notValues"));
        if any.is_none() && none.is_none() {
            return Err(Bad::missing(c, "values", "a condition has `values` or `notValues`"));
        }
        Ok(Self { key_node, key, any, none })
    }
    /// Its values, each list read by `f`.
    pub(super) fn values<T>(&self, mut f: impl FnMut(&'p Node<'p>) -> Read<'p, Vec<T>>) -> Read<'p, Values<T>> {
        let any = self.any.map(&mut f).transpose()?.unwrap_or_default();
        Ok(Values::new(any, self.none.map(&mut f).transpose()?.unwrap_or_default()))
    }
    /// The condition, when a connection alone decides it.
    pub(super) fn peer(&self, r: &mut Reader<'_>, namespace: &str) -> Read<'p, Option<Match>> {
        let mut m = Match::default();
        match self.key {
            "source.ip" => m.source_ips = self.values(nets)?,
            "source.namespace" => m.namespaces = self.values(|n| text_matches(r, n))?,
            "source.principal" => m.principals = self.values(|n| principals(r, n))?,
            "source.serviceAccount" => m.service_accounts = self.values(|n| accounts(r, n, namespace))?,
            "source.trustDomain" => m.trust_domains = self.values(|n| text_matches(r, n))?,
            "destination.ip" => m.destination_ips = self.values(nets)?,
            "destination.port" => m.destination_ports = self.values(ports)?,
            _ => return Ok(None),
        }
        Ok(Some(m))
    }
    pub(super) fn unknown(&self) -> Bad<'p> {
        Bad::value(
            self.key_node,
            format!("unknown condition `{}`", self.key),
            "known: source.ip, source.namespace, source.principal, source.serviceAccount, source.trustDomain, destination.ip, destination.port, request.*, remote.ip, connection.sni",
        )
    }
}
/// One `when`; `None` when only a waypoint can judge it.
fn condition<'p>(
    r: &mut Reader<'_>,
    c: &'p Node<'p>,
    namespace: &str,
    http: &mut Option<&'p Node<'p>>,
) -> Read<'p, Option<Match>> {
    let when = When::read(c)?;
    if let Some(m) = when.peer(r, namespace)? {
        return Ok(Some(m));
    }
    match when.key {
        "remote.ip" | "connection.sni" => {}
        k if k.starts_with("request.") || k.starts_with("experimental.") => {}
        _ => return Err(when.unknown()),
    }
    when.values(texts)?;
    http.get_or_insert(when.key_node);
    Ok(None)
}

/// The elements of a value list that is written. An empty one is refused: it would constrain nothing.
pub(super) fn texts<'p>(n: &'p Node<'p>) -> Read<'p, Vec<(&'p Node<'p>, &'p str)>> {
    let Value::Seq(items) = &n.value else {
        return Err(Bad::value(n, format!("expected a list, found {}", n.describe()), "write a list of values"));
    };
    if items.is_empty() {
        return Err(Bad::value(
            n,
            "the list is empty and would constrain nothing",
            "remove the field, or list at least one value",
        ));
    }
    items
        .iter()
        .map(|i| match read::scalar(i)? {
            "" => Err(Bad::value(i, "an empty text matches nothing meaningful", "write a value, or `*` for any non-empty one")),
            t => Ok((i, t)),
        })
        .collect()
}
pub(super) fn text_matches<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, Vec<TextMatch>> {
    texts(n)?.into_iter().map(|(at, t)| text_match(r, at, t)).collect()
}
pub(super) fn text_match<'p>(r: &mut Reader<'_>, at: &'p Node<'p>, t: &str) -> Read<'p, TextMatch> {
    let shared = |r: &mut Reader<'_>, m| match m {
        TextMatch::Exact(s) => TextMatch::Exact(r.pool.text(&s)),
        m => m,
    };
    let m = TextMatch::parse(t).ok_or_else(|| Bad::value(at, "empty", ""))?;
    match &m {
        TextMatch::Exact(s) | TextMatch::Prefix(s) | TextMatch::Suffix(s) if s.contains('*') => {
            Err(Bad::value(at, format!("`{t}`: a `*` may only stand at one end"), "write `x*`, `*x` or `*`"))
        }
        _ => Ok(shared(r, m)),
    }
}
/// Principals are compared without their scheme; one written with it is meant the same.
fn principals<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, Vec<TextMatch>> {
    texts(n)?
        .into_iter()
        .map(|(at, t)| match t.strip_prefix("spiffe://") {
            Some("") => Err(Bad::value(at, "no identity after the scheme", "")),
            Some(rest) => text_match(r, at, rest),
            None => text_match(r, at, t),
        })
        .collect()
}
fn accounts<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, namespace: &str) -> Read<'p, Vec<(Arc<str>, Arc<str>)>> {
    texts(n)?
        .into_iter()
        .map(|(at, t)| {
            let (ns, sa) = t.split_once('/').unwrap_or((namespace, t));
            if ns.is_empty() || sa.is_empty() || sa.contains('/') || t.contains('*') {
                return Err(Bad::value(
                    at,
                    format!("`{t}` is not a service account"),
                    "write `name` or `namespace/name`, without wildcards",
                ));
            }
            Ok((r.pool.text(ns), r.pool.text(sa)))
        })
        .collect()
}
pub(super) fn nets<'p>(n: &'p Node<'p>) -> Read<'p, Vec<ipnet::IpNet>> {
    texts(n)?.into_iter().map(|(at, _)| read::net(at)).collect()
}
pub(super) fn ports<'p>(n: &'p Node<'p>) -> Read<'p, Vec<u16>> {
    texts(n)?.into_iter().map(|(at, _)| read::port(at)).collect()
}
