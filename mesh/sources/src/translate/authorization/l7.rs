//! AuthorizationPolicy with `targetRefs` → [`L7Policy`] (waypoint §3.4).
//!
//! Anything malformed or not known makes the policy unusable, and an unusable policy denies what it is bound to.

use std::sync::Arc;

use http::header::HeaderName;
use mesh_model::Origin;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::l7::policy::{L7Action, L7Body, L7Condition, L7Operation, L7Policy, L7Rule, L7Source, L7Target, PathPattern};
use mesh_model::policy::{PolicyKey, TextMatch, Values};

use super::super::object::{ObjectId, Reader};
use super::super::read::{self, Bad, Read};
use super::{Known, OPERATION, RULE, SOURCE, UNUSABLE, condition, nets, ports, raw, source, text_matches, texts};
use crate::diagnostics::Severity;
use crate::yaml::{Node, Value};

/// The class whose gateways are waypoints.
const CLASS: &str = "istio-waypoint";

/// Reads a policy whose targets were found well formed.
pub(super) fn read<'p>(
    r: &mut Reader<'_>,
    node: &'p Node<'p>,
    spec: &'p Node<'p>,
    id: &ObjectId,
    origin: &Arc<Origin>,
    dry_run: bool,
) -> Option<Arc<L7Policy>> {
    let targets = targets(r, node, spec, &id.namespace);
    let body = match body(r, node, spec, dry_run, &id.namespace) {
        Ok(body) => body,
        Err(mut bad) => {
            let why = match read::path_of(node, bad.at) {
                Some(path) if !path.is_empty() => format!("{path}: {} (line {})", bad.message, bad.at.line),
                _ => bad.message.clone(),
            };
            let then = if dry_run { "the policy is a dry run and is ignored" } else { UNUSABLE };
            bad.message = format!("{}; {then}", bad.message);
            r.report(node, &bad, Severity::Error);
            if dry_run {
                return None;
            }
            L7Body::Unusable { why: why.into() }
        }
    };
    if targets.is_empty() {
        return None;
    }
    let key = PolicyKey { namespace: Arc::clone(&id.namespace), name: Arc::clone(&id.name) };
    Some(Arc::new(L7Policy { key, targets, body, origin: Some(Arc::clone(origin)) }))
}

fn targets<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, spec: &'p Node<'p>, namespace: &Arc<str>) -> Vec<L7Target> {
    let many = match raw(spec, "targetRefs").map(|n| &n.value) {
        Some(Value::Seq(items)) => items.as_slice(),
        _ => &[],
    };
    let mut out = Vec::new();
    for n in raw(spec, "targetRef").into_iter().chain(many) {
        let field = |key: &str| n.get(key).and_then(Node::text).unwrap_or_default();
        let (kind, name) = (field("kind"), r.pool.text(field("name")));
        let namespace = Arc::clone(namespace);
        match kind {
            "Service" | "ServiceEntry" => out.push(L7Target::Service { namespace, name }),
            "Gateway" => out.push(L7Target::Gateway(GatewayKey { namespace, name })),
            "GatewayClass" if *namespace == *r.root_namespace && &*name == CLASS => out.push(L7Target::Waypoints),
            _ => {
                let (message, fix) = if kind == "GatewayClass" {
                    (
                        "a GatewayClass binds waypoints only from the root namespace and by the name istio-waypoint; this target binds nothing".to_owned(),
                        "move the policy to the root namespace, or name a Gateway or Service",
                    )
                } else {
                    (
                        format!("a target of kind {kind} binds nothing here"),
                        "name a Service, ServiceEntry, Gateway or GatewayClass",
                    )
                };
                r.report(node, &Bad { at: n, missing: None, message, fix, code: "target" }, Severity::Error);
            }
        }
    }
    out
}

fn body<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, spec: &'p Node<'p>, dry_run: bool, namespace: &str) -> Read<'p, L7Body> {
    let action = match raw(spec, "action").and_then(Node::text) {
        None | Some("ALLOW") => L7Action::Allow,
        Some("DENY") => L7Action::Deny,
        Some("AUDIT") => L7Action::Audit,
        Some(_) => {
            let at = raw(spec, "action").unwrap_or(spec);
            let bad = Bad {
                at,
                missing: None,
                message: "no external authorizer can be asked yet; what this policy matches is denied".into(),
                fix: "use ALLOW or DENY",
                code: "action",
            };
            r.report(node, &bad, Severity::Error);
            L7Action::Custom
        }
    };
    let mut rules = Vec::new();
    for n in read::list(spec, "rules")? {
        rules.push(rule(r, n, namespace)?);
    }
    Ok(L7Body::Rules { action, dry_run, rules })
}

fn rule<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, namespace: &str) -> Read<'p, L7Rule> {
    if n.value == Value::Null {
        return Err(Bad::value(n, "an empty rule", "write `- {}` for a rule that matches everything"));
    }
    read::only(n, RULE)?;
    let mut out = L7Rule::default();
    for fields in alternatives(n, "from", "source")? {
        let mut s = L7Source::default();
        for e in read::entries(fields)? {
            match &*e.key {
                "requestPrincipals" => s.request_principals.set_any(text_matches(r, &e.node)?),
                "notRequestPrincipals" => s.request_principals.set_none(text_matches(r, &e.node)?),
                "remoteIpBlocks" => s.remote_ips.set_any(nets(&e.node)?),
                "notRemoteIpBlocks" => s.remote_ips.set_none(nets(&e.node)?),
                key => {
                    if !matches!(source(r, key, &e.node, &mut s.peer, namespace)?, Known::Yes) {
                        read::only(fields, SOURCE)?;
                        return Err(Bad::value(&e.node, format!("unknown field `{key}`"), ""));
                    }
                }
            }
        }
        out.from.push(s);
    }
    for fields in alternatives(n, "to", "operation")? {
        let mut o = L7Operation::default();
        for e in read::entries(fields)? {
            match &*e.key {
                "ports" => o.ports.set_any(ports(&e.node)?),
                "notPorts" => o.ports.set_none(ports(&e.node)?),
                "methods" => o.methods.set_any(text_matches(r, &e.node)?),
                "notMethods" => o.methods.set_none(text_matches(r, &e.node)?),
                "hosts" => o.hosts.set_any(text_matches(r, &e.node)?),
                "notHosts" => o.hosts.set_none(text_matches(r, &e.node)?),
                "paths" => o.paths.set_any(paths(&e.node)?),
                "notPaths" => o.paths.set_none(paths(&e.node)?),
                key => {
                    read::only(fields, OPERATION)?;
                    return Err(Bad::value(&e.node, format!("unknown field `{key}`"), ""));
                }
            }
        }
        out.to.push(o);
    }
    if let Some(when) = raw(n, "when") {
        let conditions = read::list(n, "when")?;
        if conditions.is_empty() {
            return Err(Bad::value(when, "`when` is written but empty", "remove it"));
        }
        for c in conditions {
            out.when.push(when_of(r, c, namespace)?);
        }
    }
    Ok(out)
}

/// The alternatives of `from` or `to`, each with at least one field.
fn alternatives<'p>(rule: &'p Node<'p>, list: &'static str, inner: &'static str) -> Read<'p, Vec<&'p Node<'p>>> {
    let Some(n) = raw(rule, list) else { return Ok(Vec::new()) };
    let items = read::list(rule, list)?;
    if items.is_empty() {
        return Err(Bad::value(n, format!("`{list}` is written but empty"), "remove it, or list at least one element"));
    }
    let one = |item: &'p Node<'p>| {
        read::only(item, &[inner])?;
        let fields = raw(item, inner).ok_or_else(|| Bad::value(item, format!("an element of `{list}` has `{inner}`"), ""))?;
        if read::entries(fields)?.is_empty() {
            return Err(Bad::value(fields, format!("`{inner}` is empty"), "name at least one attribute"));
        }
        Ok(fields)
    };
    items.iter().map(one).collect()
}

fn paths<'p>(n: &'p Node<'p>) -> Read<'p, Vec<PathPattern>> {
    let one = |(at, t): (&'p Node<'p>, &'p str)| match PathPattern::parse(t) {
        Some(PathPattern::Text(TextMatch::Exact(s) | TextMatch::Prefix(s) | TextMatch::Suffix(s))) if s.contains('*') => Err(
            Bad::value(at, format!("`{t}`: a `*` may only stand at one end"), "write `x*`, `*x`, `*`, or a template with {*}"),
        ),
        Some(p) => Ok(p),
        None => Err(Bad::value(
            at,
            format!("`{t}` is not a path template"),
            "use whole segments {*} and at most one {**}, without `*`",
        )),
    };
    texts(n)?.into_iter().map(one).collect()
}

fn when_of<'p>(r: &mut Reader<'_>, c: &'p Node<'p>, namespace: &str) -> Read<'p, L7Condition> {
    let mut http = None;
    // Checks the shape of every condition, and reads those about the peer.
    if let Some(m) = condition(r, c, namespace, &mut http)? {
        return Ok(L7Condition::Peer(m));
    }
    let key_node = c.get("key").unwrap_or(c);
    let key = read::scalar(key_node)?;
    let both = |r: &mut Reader<'_>| -> Read<'p, Values<TextMatch>> {
        let any = raw(c, "values").map(|n| text_matches(r, n)).transpose()?.unwrap_or_default();
        Ok(Values::new(any, raw(c, "notValues").map(|n| text_matches(r, n)).transpose()?.unwrap_or_default()))
    };
    Ok(match key {
        "remote.ip" => {
            let any = raw(c, "values").map(nets).transpose()?.unwrap_or_default();
            L7Condition::RemoteIp(Values::new(any, raw(c, "notValues").map(nets).transpose()?.unwrap_or_default()))
        }
        "connection.sni" => L7Condition::Sni(both(r)?),
        k if k.starts_with("request.auth.") => L7Condition::Token(r.pool.text(k), both(r)?),
        k => {
            let name = k.strip_prefix("request.headers[").and_then(|rest| rest.strip_suffix(']'));
            let name = name.ok_or_else(|| {
                Bad::value(
                    key_node,
                    format!("unknown condition `{k}`"),
                    "known: request.headers[name], request.auth.*, source.*, destination.*, remote.ip, connection.sni",
                )
            })?;
            let name = HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| Bad::value(key_node, format!("`{name}` is not a header name"), "correct it"))?;
            L7Condition::Header(name, both(r)?)
        }
    })
}
