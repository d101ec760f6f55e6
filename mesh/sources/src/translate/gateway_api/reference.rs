//! References of routes: up to what they attach to, down to what they send to, and who may point across namespaces.

use std::sync::Arc;

use mesh_model::service::ServiceKey;

use super::super::kube::{section, service_host};
use super::super::object::Reader;
use super::super::read::{self, Bad, Read};
use crate::yaml::Node;

pub(super) const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
const ISTIO_GROUP: &str = "networking.istio.io";

/// The object that is being read.
#[derive(Clone, Copy)]
pub(super) struct Owner<'a, 'p> {
    /// All of it, for complaints.
    pub(super) root: &'p Node<'p>,
    /// Its namespace.
    pub(super) namespace: &'a Arc<str>,
}

/// What a route attaches to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// Kind.
    pub kind: ParentKind,
    /// Namespace; the route's own where none is written.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Listener (Gateway) or port (Service) by name.
    pub section: Option<Arc<str>>,
    /// Listener or port by number.
    pub port: Option<u16>,
    /// Where it is written.
    pub line: u32,
}
/// Kinds of parents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParentKind {
    /// A Gateway.
    Gateway,
    /// A Service: mesh traffic to this host name.
    Service(Arc<str>),
    /// A ServiceEntry: mesh traffic to its hosts.
    ServiceEntry,
    /// Something of another controller: `group/Kind`.
    Other(Arc<str>),
}

/// What a backend, a mirror or a policy points at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Kind.
    pub kind: TargetKind,
    /// Namespace, if written.
    pub namespace: Option<Arc<str>>,
    /// Name.
    pub name: Arc<str>,
    /// Port.
    pub port: Option<u16>,
    /// The service it is if all is well: a Service by its host name, a Hostname in the route's namespace.
    pub key: ServiceKey,
    /// Where it is written.
    pub line: u32,
}
/// Kinds of targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// A Service by name.
    Service,
    /// Istio's `networking.istio.io/Hostname`: any host name the mesh knows.
    Hostname,
    /// Not something that takes requests: `group/Kind`.
    Other(Arc<str>),
}

/// `group/Kind`, or `Kind` of the core group.
pub(super) fn kind_name(group: &str, kind: &str) -> String {
    if group.is_empty() { kind.to_owned() } else { format!("{group}/{kind}") }
}

/// A name that is not empty.
pub(super) fn name<'p>(node: &'p Node<'p>, what: &'static str) -> Read<'p, &'p str> {
    match read::text(node, "name")? {
        Some(t) if !t.is_empty() => Ok(t),
        _ => Err(Bad::missing(node, "name", what)),
    }
}
fn optional<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, key: &str) -> Read<'p, Option<Arc<str>>> {
    Ok(read::text(node, key)?.filter(|t| !t.is_empty()).map(|t| r.pool.text(t)))
}

/// One element of `parentRefs`.
pub(super) fn parent<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, own: &Arc<str>) -> Read<'p, ParentRef> {
    read::only(node, &["group", "kind", "namespace", "name", "sectionName", "port"])?;
    // An empty group is the core group here, an absent one the Gateway API's.
    let group = read::text(node, "group")?.unwrap_or(GATEWAY_GROUP);
    let kind = read::text(node, "kind")?.unwrap_or("Gateway");
    let name = r.pool.text(name(node, "a parentRef names its parent")?);
    let namespace = optional(r, node, "namespace")?.unwrap_or_else(|| Arc::clone(own));
    let kind = match (group, kind) {
        (GATEWAY_GROUP, "Gateway") => ParentKind::Gateway,
        ("", "Service") => {
            let host = service_host(&name, &namespace, &r.cluster_domain);
            ParentKind::Service(r.pool.text(&host))
        }
        (ISTIO_GROUP, "ServiceEntry") => ParentKind::ServiceEntry,
        (g, k) => ParentKind::Other(r.pool.text(&kind_name(g, k))),
    };
    Ok(ParentRef {
        kind,
        namespace,
        name,
        section: optional(r, node, "sectionName")?,
        port: node.get("port").map(read::port).transpose()?,
        line: node.line,
    })
}

/// The reference in a backendRef; the caller has checked which other fields may be there.
pub(super) fn target<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, own: &Arc<str>) -> Read<'p, Target> {
    let group = read::text_or_empty(node, "group")?;
    let kind = read::text(node, "kind")?.unwrap_or("Service");
    let kind = match (group, kind) {
        ("", "Service") => TargetKind::Service,
        (ISTIO_GROUP, "Hostname") => TargetKind::Hostname,
        (g, k) => TargetKind::Other(r.pool.text(&kind_name(g, k))),
    };
    let name = name(node, "a backendRef names its backend")?;
    // Host names are compared in lower case.
    let name = if kind == TargetKind::Hostname { r.pool.text(&name.to_ascii_lowercase()) } else { r.pool.text(name) };
    let port = node.get("port").map(read::port).transpose()?;
    if port.is_none() && !matches!(kind, TargetKind::Other(_)) {
        return Err(Bad::missing(node, "port", "a backendRef to a Service names its port"));
    }
    let namespace = optional(r, node, "namespace")?;
    if let (TargetKind::Hostname, Some(at)) = (&kind, node.get("namespace")) {
        return Err(Bad::value(at, "a backendRef of kind Hostname has no namespace", "remove it"));
    }
    let home = namespace.as_ref().unwrap_or(own);
    let hostname = match kind {
        TargetKind::Service => r.pool.text(&service_host(&name, home, &r.cluster_domain)),
        TargetKind::Hostname | TargetKind::Other(_) => Arc::clone(&name),
    };
    let key = ServiceKey { namespace: Arc::clone(home), hostname };
    Ok(Target { kind, namespace, name, port, key, line: node.line })
}

/// A ReferenceGrant: who may point at what in its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReferenceGrant {
    /// Kind (`group/Kind`) and namespace of the objects that point.
    pub from: Vec<(Arc<str>, Arc<str>)>,
    /// Kind and, if only one, name of what they may point at.
    pub to: Vec<(Arc<str>, Option<Arc<str>>)>,
}
impl ReferenceGrant {
    /// Whether an object of `from` in `namespace` may point at `name` of kind `to`.
    pub fn allows(&self, from: &str, namespace: &str, to: &str, name: &str) -> bool {
        self.from.iter().any(|(kind, ns)| **kind == *from && **ns == *namespace)
            && self.to.iter().any(|(kind, only)| **kind == *to && only.as_ref().is_none_or(|n| **n == *name))
    }
}

pub(super) fn grant<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, ReferenceGrant> {
    read::only(node, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    let spec = section(node, "spec")?;
    read::only(spec, &["from", "to"])?;
    let kind_of = |r: &mut Reader<'_>, n: &'p Node<'p>| -> Read<'p, Arc<str>> {
        let Some(kind) = read::text(n, "kind")? else {
            return Err(Bad::missing(n, "kind", "a ReferenceGrant says which kind it is about"));
        };
        Ok(r.pool.text(&kind_name(read::text_or_empty(n, "group")?, kind)))
    };
    let mut from = Vec::new();
    for f in read::list(spec, "from")? {
        read::only(f, &["group", "kind", "namespace"])?;
        let Some(ns) = read::text(f, "namespace")?.filter(|t| !t.is_empty()) else {
            return Err(Bad::missing(f, "namespace", "a ReferenceGrant says from which namespace"));
        };
        from.push((kind_of(r, f)?, r.pool.text(ns)));
    }
    let mut to = Vec::new();
    for t in read::list(spec, "to")? {
        read::only(t, &["group", "kind", "name"])?;
        to.push((kind_of(r, t)?, optional(r, t, "name")?));
    }
    Ok(ReferenceGrant { from, to })
}
