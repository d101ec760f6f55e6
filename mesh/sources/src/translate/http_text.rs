//! Text of layer 7 in Istio's objects: matches, header edits, hosts, visibility.

use std::sync::Arc;

use http::header::{HeaderName, HeaderValue};
use mesh_model::l7::headers::{BothEdits, HeaderEdits};
use mesh_model::l7::text::{Pattern, StringMatch};

use super::istio::host_name;
use super::kube::service_host;
use super::object::Reader;
use super::read::{self, Bad, Read};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// Istio's StringMatch: one of `exact`, `prefix`, `regex`; empty, or the pattern `*`: anything that is there.
pub(super) fn string_match<'p>(n: &'p Node<'p>) -> Read<'p, StringMatch> {
    read::only(n, &["exact", "prefix", "regex"])?;
    let mut found = read::entries(n)?.iter().filter(|e| e.node.value != crate::yaml::Value::Null);
    let Some(e) = found.next() else { return Ok(StringMatch::Present) };
    if found.next().is_some() {
        return Err(Bad::value(n, "only one of `exact`, `prefix` and `regex` can be written", "keep one"));
    }
    let text = read::scalar(&e.node)?;
    Ok(match &*e.key {
        _ if text.is_empty() => StringMatch::Present,
        "exact" => StringMatch::Exact(text.into()),
        "prefix" => StringMatch::Prefix(text.into()),
        _ if text == "*" => StringMatch::Present,
        _ => StringMatch::Regex(pattern(&e.node, text)?),
    })
}
/// A pattern for the whole text.
pub(super) fn pattern<'p>(n: &'p Node<'p>, text: &str) -> Read<'p, Pattern> {
    Pattern::parse(text).map_err(|e| Bad::value(n, e.to_string(), "correct the expression (RE2 syntax)"))
}

/// A host as Istio resolves it: a name without dots is a service of the object's own namespace.
pub(super) fn resolve<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, namespace: &str, wildcard: bool) -> Read<'p, Arc<str>> {
    if wildcard && n.text() == Some("*") {
        return Ok(r.pool.text("*"));
    }
    let host = host_name(n, wildcard)?;
    if host.contains('.') {
        return Ok(r.pool.text(&host));
    }
    let full = service_host(&host, namespace, &r.cluster_domain);
    Ok(r.pool.text(&full))
}

/// Whom an object is exported to; empty: whomever MeshConfig says, or else everybody.
pub(super) fn exports<'p>(r: &mut Reader<'_>, spec: &'p Node<'p>, namespace: &str) -> Read<'p, Vec<Arc<str>>> {
    let mut out = Vec::new();
    for n in read::list(spec, "exportTo")? {
        out.push(match read::scalar(n)? {
            "." => r.pool.text(namespace),
            "" => return Err(Bad::value(n, "expected `.`, `*` or a namespace", "")),
            t => r.pool.text(t),
        });
    }
    Ok(out)
}
/// Whether an object of namespace `own` with these exports is seen in a namespace. `default`: what MeshConfig says.
pub(super) fn exported(exports: &[Arc<str>], own: &str, default: &[Arc<str>], namespace: &str) -> bool {
    let exports = if exports.is_empty() { default } else { exports };
    let to = |e: &str| e == "*" || e == namespace || (e == "." && own == namespace);
    exports.is_empty() || exports.iter().any(|e| to(e))
}

/// `headers` of a route or of one of its destinations; `root` is the object.
pub(super) fn header_edits<'p>(r: &mut Reader<'_>, root: &Node<'_>, n: &'p Node<'p>) -> Read<'p, BothEdits> {
    read::only(n, &["request", "response"])?;
    let mut out = BothEdits::default();
    if let Some(n) = read::map(n, "request")? {
        out.request = edits(r, root, n, true)?;
    }
    if let Some(n) = read::map(n, "response")? {
        out.response = edits(r, root, n, false)?;
    }
    Ok(out)
}
/// Edits of one direction; `root` is the object.
pub(super) fn edits<'p>(r: &mut Reader<'_>, root: &Node<'_>, n: &'p Node<'p>, request: bool) -> Read<'p, HeaderEdits> {
    read::only(n, &["set", "add", "remove"])?;
    let mut out = HeaderEdits::default();
    for (key, list) in [("set", &mut out.set), ("add", &mut out.add)] {
        let Some(map) = read::map(n, key)? else { continue };
        for e in read::entries(map)? {
            if key == "set" && request && is_authority(&e.key) {
                let text = value(&e.node)?;
                if !authority_ok(&text) {
                    return Err(Bad::value(&e.node, format!("`{text}` is not a host"), "write `host` or `host:port`"));
                }
                out.authority = Some(text.into());
                continue;
            }
            if untouchable(&e.key) {
                ignored(r, root, &e.node, &e.key);
                continue;
            }
            let name = name(&e.node, &e.key)?;
            let text = value(&e.node)?;
            let value = HeaderValue::from_str(&text);
            let value = value.map_err(|_| Bad::value(&e.node, "not a header value: it has control characters", ""))?;
            list.push((name, value));
        }
    }
    for item in read::list(n, "remove")? {
        let key = read::scalar(item)?;
        // Envoy's own headers are not the configuration's to take away.
        if untouchable(key) || key.to_ascii_lowercase().starts_with("x-envoy-") {
            ignored(r, root, item, key);
            continue;
        }
        out.remove.push(name(item, key)?);
    }
    Ok(out)
}
/// Pseudo headers are no headers, and what frames a message is not an edit's to change.
fn untouchable(key: &str) -> bool {
    key.starts_with(':')
        || ["host", "content-length", "transfer-encoding", "connection"].iter().any(|k| key.eq_ignore_ascii_case(k))
}
fn is_authority(key: &str) -> bool {
    key.eq_ignore_ascii_case("host") || key.eq_ignore_ascii_case(":authority")
}
fn ignored(r: &mut Reader<'_>, root: &Node<'_>, at: &Node<'_>, key: &str) {
    let message = format!("`{key}` cannot be edited here; this edit is left out");
    let bad = Bad { at, missing: None, message, fix: "remove it", code: "header" };
    r.report(root, &bad, Severity::Warning);
}
/// A header name.
pub(super) fn name<'p>(at: &'p Node<'p>, key: &str) -> Read<'p, HeaderName> {
    HeaderName::from_bytes(key.as_bytes()).map_err(|_| Bad::value(at, format!("`{key}` is not a header name"), "correct it"))
}
/// A header value without variables: `%%` is a percent sign, and what Envoy would fill in is refused rather than sent as it
/// is written.
pub(super) fn value<'p>(n: &'p Node<'p>) -> Read<'p, String> {
    let text = read::scalar(n)?;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((head, tail)) = rest.split_once('%') {
        let Some(tail) = tail.strip_prefix('%') else {
            return Err(Bad::value(
                n,
                "variables such as `%REQ(name)%` are not filled in",
                "write the value itself, or `%%` for a percent sign",
            ));
        };
        out.push_str(head);
        out.push('%');
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}
/// Whether a text can stand as `:authority`.
pub(super) fn authority_ok(text: &str) -> bool {
    text.parse::<http::uri::Authority>().is_ok_and(|a| !a.as_str().contains('@'))
}
