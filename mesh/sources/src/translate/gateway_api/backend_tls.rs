//! BackendTLSPolicy: TLS from the proxy to a Service.

use std::sync::Arc;

use super::super::istio::host_name;
use super::super::kube::{section, service_host};
use super::super::object::{ObjectId, Reader};
use super::super::read::{self, Bad, Read};
use super::reference::{self, kind_name};
use crate::diagnostics::Severity;
use crate::yaml::{Node, Value};

/// A BackendTLSPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsPolicy {
    /// The Services it is for.
    pub targets: Vec<PolicyTarget>,
    /// What it asks for.
    pub validation: Validation,
    /// Age.
    pub created: Arc<str>,
    /// Why it could not be understood; then nothing is trusted.
    pub broken: Option<Arc<str>>,
}
/// One `targetRefs` element that is a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyTarget {
    /// Name.
    pub name: Arc<str>,
    /// Its host name.
    pub host: Arc<str>,
    /// Port, by name.
    pub section: Option<Arc<str>>,
    /// Where it is written.
    pub line: u32,
}
/// What a peer must show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Validation {
    /// SNI, and the name to verify unless `sans` says otherwise.
    pub hostname: Arc<str>,
    /// Accepted names.
    pub sans: Vec<Arc<str>>,
    /// CA bundles; none: the system's.
    pub roots: Vec<CaRef>,
}
/// An object with a CA bundle, in the policy's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaRef {
    /// Kind.
    pub kind: CaKind,
    /// Name.
    pub name: Arc<str>,
    /// Where it is written.
    pub line: u32,
}
/// Kinds of objects with CA bundles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaKind {
    /// ConfigMap with `ca.crt`.
    ConfigMap,
    /// Secret with `ca.crt`.
    Secret,
    /// Something else: `group/Kind`.
    Other(Arc<str>),
}

/// Reads a policy. An error when not even its targets can be told.
pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, TlsPolicy> {
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    let (mut first, mut targets): (Option<Bad<'p>>, Vec<PolicyTarget>) = (None, Vec::new());
    for t in read::list(spec, "targetRefs")? {
        match target(r, t, id) {
            Ok(Ok(t)) => targets.push(t),
            Ok(Err(kind)) => {
                let message = format!("a BackendTLSPolicy cannot be for a {kind}; this target has no effect");
                let bad = Bad { code: "unsupported-target", ..Bad::value(t, message, "point it at a Service") };
                r.report(node, &bad, Severity::Error);
            }
            Err(bad) => {
                first.get_or_insert(bad);
            }
        }
    }
    if read::list(spec, "targetRefs")?.is_empty() {
        return Err(Bad::missing(spec, "targetRefs", "a BackendTLSPolicy names the Services it is for"));
    }
    if let Some(bad) = first.take_if(|_| targets.is_empty()) {
        return Err(bad);
    }
    let created = r.pool.text(read::text_or_empty(meta, "creationTimestamp")?);
    let mut policy = TlsPolicy { targets, validation: Validation::default(), created, broken: None };
    match first.map_or_else(|| rest(r, node, spec), Err) {
        Ok(validation) => policy.validation = validation,
        Err(bad) => {
            r.report(node, &bad, Severity::Error);
            let problem = bad.problem(node, &r.place, &r.object, Severity::Error);
            policy.broken = Some(format!("a BackendTLSPolicy could not be understood: {problem}").into());
        }
    }
    Ok(policy)
}

/// A target; the kind of one that is no Service.
pub(super) fn target<'p>(r: &mut Reader<'_>, t: &'p Node<'p>, id: &ObjectId) -> Read<'p, Result<PolicyTarget, String>> {
    read::only(t, &["group", "kind", "name", "sectionName"])?;
    let group = read::text_or_empty(t, "group")?;
    let Some(kind) = read::text(t, "kind")? else { return Err(Bad::missing(t, "kind", "a targetRef has a kind")) };
    let name = r.pool.text(reference::name(t, "a targetRef has a name")?);
    if (group, kind) != ("", "Service") {
        return Ok(Err(kind_name(group, kind)));
    }
    let host = r.pool.text(&service_host(&name, &id.namespace, &r.cluster_domain));
    let section = read::text(t, "sectionName")?.filter(|s| !s.is_empty()).map(|s| r.pool.text(s));
    Ok(Ok(PolicyTarget { name, host, section, line: t.line }))
}

fn rest<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, spec: &'p Node<'p>) -> Read<'p, Validation> {
    read::only(node, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    read::only(spec, &["targetRefs", "validation", "options"])?;
    if let Some(options) = read::map(spec, "options")?
        && let Some(e) = read::entries(options)?.first()
    {
        let message = format!("the option `{}` is not known here", e.key);
        return Err(Bad::value(&e.node, message, "remove it"));
    }
    let Some(v) = read::map(spec, "validation")? else {
        return Err(Bad::missing(spec, "validation", "a BackendTLSPolicy says what to verify"));
    };
    read::only(v, &["caCertificateRefs", "wellKnownCACertificates", "hostname", "subjectAltNames"])?;
    let Some(hostname) = v.get("hostname") else {
        return Err(Bad::missing(v, "hostname", "the name that is asked for and verified is needed"));
    };
    let hostname = r.pool.text(&host_name(hostname, false)?);
    let mut sans = Vec::new();
    for s in read::list(v, "subjectAltNames")? {
        sans.push(san(r, s)?);
    }
    let mut roots = Vec::new();
    for c in read::list(v, "caCertificateRefs")? {
        roots.push(ca_ref(r, c, &["group", "kind", "name"])?);
    }
    match (v.get("wellKnownCACertificates"), roots.is_empty()) {
        (None, false) => {}
        (None, true) => {
            let message = "whom to trust is needed: caCertificateRefs, or wellKnownCACertificates: System";
            return Err(Bad::missing(v, "caCertificateRefs", message));
        }
        (Some(at), false) => {
            let message = "caCertificateRefs and wellKnownCACertificates exclude each other";
            return Err(Bad::value(at, message, "keep one of them"));
        }
        (Some(at), true) => match read::scalar(at)? {
            "System" => {}
            t => return Err(Bad::value(at, format!("`{t}` is not a known set of CAs"), "write System")),
        },
    }
    Ok(Validation { hostname, sans, roots })
}

/// A reference to a CA bundle, of which these fields are known.
pub(super) fn ca_ref<'p>(r: &mut Reader<'_>, c: &'p Node<'p>, fields: &[&str]) -> Read<'p, CaRef> {
    read::only(c, fields)?;
    let Some(kind) = read::text(c, "kind")? else { return Err(Bad::missing(c, "kind", "a reference has a kind")) };
    let kind = match (read::text_or_empty(c, "group")?, kind) {
        ("", "ConfigMap") => CaKind::ConfigMap,
        ("", "Secret") => CaKind::Secret,
        (g, k) => CaKind::Other(r.pool.text(&kind_name(g, k))),
    };
    Ok(CaRef { kind, name: r.pool.text(reference::name(c, "a reference has a name")?), line: c.line })
}

fn san<'p>(r: &mut Reader<'_>, s: &'p Node<'p>) -> Read<'p, Arc<str>> {
    read::only(s, &["type", "hostname", "uri"])?;
    let Some(kind) = s.get("type") else { return Err(Bad::missing(s, "type", "a name has a type")) };
    let (field, other) = match read::scalar(kind)? {
        "Hostname" => ("hostname", "uri"),
        "URI" => ("uri", "hostname"),
        t => return Err(Bad::value(kind, format!("`{t}` is not a type of name"), "write Hostname or URI")),
    };
    if let Some(at) = s.get(other).filter(|n| n.value != Value::Null) {
        return Err(Bad::value(at, format!("`{other}` does not belong to this type"), "correct the type or remove it"));
    }
    let Some(at) = s.get(field) else {
        let message = format!("this name needs `{field}`");
        return Err(Bad { at: s, missing: None, message, fix: "add the field", code: "missing-field" });
    };
    if field == "hostname" {
        return Ok(r.pool.text(&host_name(at, true)?));
    }
    match read::scalar(at)? {
        t if t.contains("://") => Ok(r.pool.text(t)),
        t => Err(Bad::value(at, format!("`{t}` is not a URI"), "write for example spiffe://cluster.local/ns/a/sa/b")),
    }
}
