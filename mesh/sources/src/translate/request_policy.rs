//! The rules of an AuthorizationPolicy with `targetRefs`: everything a waypoint or gateway can judge (waypoint §3.4).
//!
//! As strict as [`super::authorization`], whose readers of sources, ports and addresses it shares: what is malformed, or not
//! known, makes the policy unusable, and then it refuses what it binds. Upstream: [`super::authorization`]. Downstream:
//! [`super::targets`], which binds the policy, and `mesh_model::authz_l7`.

use std::sync::Arc;

use mesh_model::Origin;
use mesh_model::l7::StringMatch;
use mesh_model::l7::policy::{
    Condition, HeaderKey, L7Action, L7Body, L7Policy, L7Rule, L7Source, Operation, PathPattern, TemplateError,
};
use mesh_model::policy::{PolicyKey, TextMatch, Values};

use super::authorization::{self, Known, OPERATION, RULE, SOURCE, When, nets, ports, raw, text_match, text_matches, texts};
use super::object::Reader;
use super::read::{self, Bad, Read};
use super::targets::{TargetedPolicy, Targets, WrittenTarget};
use crate::diagnostics::Severity;
use crate::yaml::{Node, Value};

/// Reads the rules of a policy that names `targets`; `None` for a dry run that cannot be read.
pub(super) fn read<'p>(
    r: &mut Reader<'_>,
    node: &'p Node<'p>,
    spec: &'p Node<'p>,
    key: &PolicyKey,
    dry_run: bool,
    origin: &Arc<Origin>,
    targets: Vec<WrittenTarget>,
) -> Option<Arc<TargetedPolicy>> {
    let body = match body(r, node, spec, dry_run, &key.namespace) {
        Ok(body) => body,
        Err(mut bad) => {
            let why = authorization::refused(r, node, &mut bad, dry_run);
            if dry_run {
                return None;
            }
            L7Body::Unusable { why }
        }
    };
    let policy = L7Policy { key: key.clone(), body, origin: Some(Arc::clone(origin)) };
    Some(Arc::new(TargetedPolicy { policy: Arc::new(policy), targets: Targets::Named(targets) }))
}

fn body<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, spec: &'p Node<'p>, dry_run: bool, namespace: &str) -> Read<'p, L7Body> {
    authorization::known_fields(node)?;
    let provider = raw(spec, "provider");
    let action = match raw(spec, "action") {
        None => L7Action::Allow,
        Some(n) => match read::scalar(n)? {
            "ALLOW" => L7Action::Allow,
            "DENY" => L7Action::Deny,
            "AUDIT" => L7Action::Audit,
            "CUSTOM" => L7Action::Custom { provider: asked(r, provider)? },
            t => return Err(Bad::value(n, format!("`{t}` is not an action"), "write ALLOW, DENY, AUDIT or CUSTOM")),
        },
    };
    if let Some(n) = provider.filter(|_| !matches!(action, L7Action::Custom { .. })) {
        return Err(Bad::value(n, "`provider` only goes with `action: CUSTOM`", "remove it"));
    }
    let mut rules = Vec::new();
    for n in read::list(spec, "rules")? {
        rules.push(rule(r, n, namespace)?);
    }
    if rules.is_empty() && action != L7Action::Allow {
        let bad = Bad {
            at: spec.get("rules").unwrap_or(spec),
            missing: None,
            message: "a policy of this action without rules does nothing".into(),
            fix: "add a rule; `- {}` matches everything",
            code: "no-rules",
        };
        r.report(node, &bad, Severity::Warning);
    }
    Ok(L7Body::Rules { action, dry_run, rules })
}
/// Whom a CUSTOM policy asks.
fn asked<'p>(r: &mut Reader<'_>, provider: Option<&'p Node<'p>>) -> Read<'p, Arc<str>> {
    let Some(provider) = provider else { return Ok(r.pool.text("")) };
    read::only(provider, &["name"])?;
    Ok(r.pool.text(read::text_or_empty(provider, "name")?))
}

fn rule<'p>(r: &mut Reader<'_>, rule: &'p Node<'p>, namespace: &str) -> Read<'p, L7Rule> {
    if rule.value == Value::Null {
        return Err(Bad::value(rule, "an empty rule", "write `- {}` for a rule that matches everything"));
    }
    read::only(rule, RULE)?;
    let from = alternatives(rule, "from", "source", SOURCE, |key, n, s: &mut L7Source| source(r, key, n, s, namespace))?;
    let to = alternatives(rule, "to", "operation", OPERATION, |key, n, o: &mut Operation| operation(r, key, n, o))?;
    let mut when = Vec::new();
    if let Some(n) = raw(rule, "when") {
        let conditions = read::list(rule, "when")?;
        if conditions.is_empty() {
            return Err(Bad::value(n, "`when` is written but empty", "remove it"));
        }
        for c in conditions {
            when.push(condition(r, c, namespace)?);
        }
    }
    Ok(L7Rule::new(from, to, when))
}

/// The elements of `from` or `to`; none when it is not written. `field` reads one field and says whether it knew it.
fn alternatives<'p, T: Default>(
    rule: &'p Node<'p>,
    list: &'static str,
    inner: &'static str,
    known: &[&str],
    mut field: impl FnMut(&str, &'p Node<'p>, &mut T) -> Read<'p, bool>,
) -> Read<'p, Vec<T>> {
    let Some(n) = raw(rule, list) else { return Ok(Vec::new()) };
    let elements = read::list(rule, list)?;
    if elements.is_empty() {
        return Err(Bad::value(n, format!("`{list}` is written but empty"), "remove it, or list at least one element"));
    }
    let mut out = Vec::with_capacity(elements.len());
    for element in elements {
        read::only(element, &[inner])?;
        let Some(fields) = raw(element, inner) else {
            return Err(Bad::value(element, format!("an element of `{list}` has `{inner}`"), ""));
        };
        let mut made = T::default();
        for e in read::entries(fields)? {
            if !field(&e.key, &e.node, &mut made)? {
                read::only(fields, known)?;
                return Err(Bad::value(&e.node, format!("unknown field `{}`", e.key), ""));
            }
        }
        if read::entries(fields)?.is_empty() {
            return Err(Bad::value(fields, format!("`{inner}` is empty"), "name at least one attribute"));
        }
        out.push(made);
    }
    Ok(out)
}

fn source<'p>(r: &mut Reader<'_>, key: &str, n: &'p Node<'p>, s: &mut L7Source, namespace: &str) -> Read<'p, bool> {
    match authorization::source(r, key, n, &mut s.peer, namespace)? {
        Known::Yes => return Ok(true),
        Known::No => return Ok(false),
        Known::Http => {}
    }
    match key {
        "remoteIpBlocks" => s.remote_ips.set_any(nets(n)?),
        "notRemoteIpBlocks" => s.remote_ips.set_none(nets(n)?),
        "requestPrincipals" => s.request_principals.set_any(request_principals(r, n)?),
        "notRequestPrincipals" => s.request_principals.set_none(request_principals(r, n)?),
        _ => return Ok(false),
    }
    Ok(true)
}
fn operation<'p>(r: &mut Reader<'_>, key: &str, n: &'p Node<'p>, o: &mut Operation) -> Read<'p, bool> {
    match key {
        "ports" => o.ports.set_any(ports(n)?),
        "notPorts" => o.ports.set_none(ports(n)?),
        "hosts" => o.hosts.set_any(text_matches(r, n)?),
        "notHosts" => o.hosts.set_none(text_matches(r, n)?),
        "methods" => o.methods.set_any(text_matches(r, n)?),
        "notMethods" => o.methods.set_none(text_matches(r, n)?),
        "paths" => o.paths.set_any(paths(n)?),
        "notPaths" => o.paths.set_none(paths(n)?),
        _ => return Ok(false),
    }
    Ok(true)
}
fn condition<'p>(r: &mut Reader<'_>, c: &'p Node<'p>, namespace: &str) -> Read<'p, Condition> {
    let when = When::read(c)?;
    if let Some(m) = when.peer(r, namespace)? {
        return Ok(Condition::Peer(m));
    }
    let claim = |r: &mut Reader<'_>, path: Vec<&str>| {
        let values = when.values(|n| Ok(text_matches(r, n)?.into_iter().map(string_match).collect()))?;
        Ok(Condition::Claim(path.into_iter().map(|p| r.pool.text(p)).collect(), values))
    };
    match when.key {
        "remote.ip" => Ok(Condition::RemoteIp(when.values(nets)?)),
        "connection.sni" => Ok(Condition::Sni(text_values(r, &when)?)),
        "request.auth.principal" => Ok(Condition::RequestPrincipal(when.values(|n| request_principals(r, n))?)),
        "request.auth.audiences" => claim(r, vec!["aud"]),
        "request.auth.presenter" => claim(r, vec!["azp"]),
        key => {
            if let Some(name) = key.strip_prefix("request.headers").map(bracketed) {
                let header = match name.as_deref() {
                    Some([name]) => HeaderKey::parse(name),
                    _ => None,
                };
                let header = header.ok_or_else(|| {
                    let message = format!("`{key}` names no header that can be asked for");
                    Bad::value(when.key_node, message, "write `request.headers[name]`; for the path there is `paths`")
                })?;
                return Ok(Condition::Header(header, text_values(r, &when)?));
            }
            if let Some(path) = key.strip_prefix("request.auth.claims").map(bracketed) {
                let path = path.ok_or_else(|| {
                    let message = format!("`{key}` names no claim");
                    Bad::value(when.key_node, message, "write `request.auth.claims[a]`, or `request.auth.claims[a][b]`")
                })?;
                return claim(r, path);
            }
            Err(when.unknown())
        }
    }
}
/// The names of `[a][b]`; `None` when it is anything else.
fn bracketed(text: &str) -> Option<Vec<&str>> {
    let mut names = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, more) = rest.strip_prefix('[')?.split_once(']')?;
        if name.is_empty() {
            return None;
        }
        names.push(name);
        rest = more;
    }
    (!names.is_empty()).then_some(names)
}
fn text_values<'p>(r: &mut Reader<'_>, when: &When<'p>) -> Read<'p, Values<TextMatch>> {
    when.values(|n| text_matches(r, n))
}
fn string_match(text: TextMatch) -> StringMatch {
    match text {
        TextMatch::Exact(t) => StringMatch::Exact(t),
        TextMatch::Prefix(t) => StringMatch::Prefix(t),
        TextMatch::Suffix(t) => StringMatch::Suffix(t),
        TextMatch::Presence => StringMatch::Present,
    }
}
fn request_principals<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, Vec<TextMatch>> {
    texts(n)?
        .into_iter()
        .map(|(at, t)| match text_match(r, at, t)? {
            TextMatch::Exact(t) if !t.contains('/') => {
                Err(Bad::value(at, format!("`{t}` is no request principal and would never match"), "write `issuer/subject`"))
            }
            m => Ok(m),
        })
        .collect()
}
/// Paths as policies have them: whole, with `*` at one end, or templates.
pub(super) fn paths<'p>(n: &'p Node<'p>) -> Read<'p, Vec<PathPattern>> {
    texts(n)?
        .into_iter()
        .map(|(at, t)| {
            let pattern = PathPattern::parse(t).map_err(|e| {
                let fix = match e {
                    TemplateError::Star | TemplateError::Mixed | TemplateError::Empty => "write `/x*`, `*/x`, `*` or `/x/{*}`",
                    _ => "write for example `/users/{*}/orders` or `/files/{**}`",
                };
                Bad::value(at, format!("`{t}`: {e}"), fix)
            })?;
            match &pattern {
                PathPattern::Text(TextMatch::Exact(p) | TextMatch::Prefix(p)) if !p.starts_with('/') => {
                    Err(Bad::value(at, format!("`{t}` would never match: a path begins with `/`"), "write the `/`"))
                }
                PathPattern::Text(TextMatch::Exact(p)) if p.contains(['?', '#']) => Err(Bad::value(
                    at,
                    format!("`{t}` would never match: paths are compared without their query"),
                    "remove the query",
                )),
                _ => Ok(pattern),
            }
        })
        .collect()
}
