//! Listeners of a Gateway that face the outside, as written. A listener that cannot be understood is not listened on; its
//! neighbours are.

use std::sync::Arc;

use mesh_model::l7::gateway::ListenerProtocol;

use super::super::istio::{allowed_routes, host_name};
use super::super::object::{AllowedRoutes, Reader};
use super::super::read::{self, Bad, Read};
use super::backend_tls::{self, CaRef};
use super::reference::{self, GATEWAY_GROUP, kind_name};
use super::route::RouteKind;
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// `tls.options` key of the certificate's path.
const CERTIFICATE: &str = "culvert.dev/tls-certificate";
/// `tls.options` key of the key's path.
const KEY: &str = "culvert.dev/tls-key";
/// Istio's own option: other than SIMPLE, it asks clients for certificates.
const ISTIO_MODE: &str = "gateway.istio.io/tls-terminate-mode";

/// One listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeListener {
    /// Name.
    pub name: Arc<str>,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: ListenerProtocol,
    /// Host name, lower case.
    pub hostname: Option<Arc<str>>,
    /// TLS.
    pub tls: Option<EdgeTls>,
    /// Certificates of clients.
    pub clients: Option<EdgeClients>,
    /// Whose routes may attach.
    pub allowed: AllowedRoutes,
    /// Kinds that may attach.
    pub kinds: Vec<RouteKind>,
    /// Why it cannot be used.
    pub broken: Option<Arc<str>>,
    /// Its number in the object.
    pub number: usize,
    /// Where it is written.
    pub line: u32,
}
/// TLS of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EdgeTls {
    /// Not terminated.
    Passthrough,
    /// Terminated with these Secrets.
    Secrets(Vec<SecretRef>),
    /// Terminated with these files.
    Files {
        /// Chain.
        chain: Arc<str>,
        /// Key.
        key: Arc<str>,
    },
}
/// Where it is written who issues certificates of clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EdgeClients {
    /// Beside the listener's own certificate: `ca.crt` of its Secret, or of the Secret NAME-cacert (Istio's
    /// `tls-terminate-mode`).
    BesideCertificate {
        /// A client without one is refused.
        required: bool,
    },
    /// In objects of their own (`caCertificateRefs`).
    Refs {
        /// The objects, and the namespace where written.
        refs: Vec<(CaRef, Option<Arc<str>>)>,
        /// The list, as a path in the object.
        field: Arc<str>,
    },
}
/// Reference to a Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretRef {
    /// Namespace, if written.
    pub namespace: Option<Arc<str>>,
    /// Name.
    pub name: Arc<str>,
    /// Where it is written.
    pub line: u32,
}

/// Whether the mesh itself listens there: a waypoint or east-west gateway.
fn of_the_mesh(protocol: &str) -> bool {
    matches!(protocol, "HBONE" | "istio.io/PROXY")
}

/// The listeners of the Gateway `node` that face the outside.
pub fn read_all<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, spec: &'p Node<'p>) -> Read<'p, Vec<EdgeListener>> {
    let mut out = Vec::new();
    for (number, l) in read::list(spec, "listeners")?.iter().enumerate() {
        if of_the_mesh(read::text_or_empty(l, "protocol")?) {
            continue;
        }
        let port = read::port_at(l, "port")?;
        let mut listener = EdgeListener {
            name: r.pool.text(l.get("name").and_then(Node::text).unwrap_or_default()),
            port,
            protocol: ListenerProtocol::Tcp,
            hostname: None,
            tls: None,
            clients: None,
            allowed: AllowedRoutes::Nobody,
            kinds: Vec::new(),
            broken: None,
            number,
            line: l.line,
        };
        if let Err(bad) = one(r, node, l, &mut listener) {
            r.report(node, &bad, Severity::Error);
            listener.broken = Some(bad.message.into());
        }
        out.push(listener);
    }
    if !out.is_empty()
        && let Err(bad) = whole(r, node, spec, &mut out)
    {
        r.report(node, &bad, Severity::Error);
        let why: Arc<str> = bad.message.into();
        for l in &mut out {
            l.broken.get_or_insert_with(|| Arc::clone(&why));
        }
    }
    conflicts(r, &mut out);
    Ok(out)
}

/// The Gateway beside its listeners, and what it says for all of them.
fn whole<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, spec: &'p Node<'p>, all: &mut [EdgeListener]) -> Read<'p, ()> {
    read::only(node, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    read::only(
        spec,
        &[
            "gatewayClassName",
            "listeners",
            "addresses",
            "infrastructure",
            "allowedListeners",
            "backendTLS",
            "tls",
            "defaultScope",
        ],
    )?;
    let tls = read::map(spec, "tls")?;
    if let Some(tls) = tls {
        read::only(tls, &["frontend", "backend"])?;
        if let Some(frontend) = read::map(tls, "frontend")? {
            of_frontend(r, frontend, all)?;
        }
    }
    let unused = [
        (tls.and_then(|t| t.get("backend")), "a certificate of the gateway towards backends is not used"),
        (spec.get("backendTLS"), "a certificate of the gateway towards backends is not used"),
        (spec.get("allowedListeners"), "ListenerSets are not used"),
    ];
    for (at, message) in unused {
        if let Some(at) = at {
            let bad = Bad { code: "unsupported-field", ..Bad::value(at, message, "remove it") };
            r.report(node, &bad, Severity::Warning);
        }
    }
    if let Some(at) = spec.get("defaultScope")
        && read::scalar(at)? != "None"
    {
        return Err(Bad::value(at, "default gateways are not available here", "remove it"));
    }
    Ok(())
}

/// `spec.tls.frontend`: certificates of the clients of HTTPS listeners, by port or for all.
fn of_frontend<'p>(r: &mut Reader<'_>, frontend: &'p Node<'p>, all: &mut [EdgeListener]) -> Read<'p, ()> {
    read::only(frontend, &["default", "perPort"])?;
    let mut validation = |tls: Option<&'p Node<'p>>, field: &str| -> Read<'p, Option<EdgeClients>> {
        let Some(tls) = tls else { return Ok(None) };
        read::only(tls, &["validation"])?;
        let Some(v) = read::map(tls, "validation")? else { return Ok(None) };
        authorities(r, v, &format!("spec.tls.frontend.{field}.validation")).map(Some)
    };
    let default = validation(read::map(frontend, "default")?, "default")?;
    let mut of_ports = Vec::new();
    for (n, p) in read::list(frontend, "perPort")?.iter().enumerate() {
        read::only(p, &["port", "tls"])?;
        let port = read::port_at(p, "port")?;
        of_ports.push((port, validation(read::map(p, "tls")?, &format!("perPort[{n}].tls"))?));
    }
    for l in all.iter_mut().filter(|l| l.protocol == ListenerProtocol::Https) {
        let said = of_ports.iter().find(|(port, _)| *port == l.port).map_or(&default, |(_, said)| said);
        if said.is_some() && l.clients.is_some() {
            let message = format!("the listener {} says itself whose certificates its clients have", l.name);
            return Err(Bad::value(frontend, message, "say it in one place"));
        }
        if let Some(said) = said {
            l.clients = Some(said.clone());
        }
    }
    Ok(())
}

/// Authorities that certificates of clients come from.
fn authorities<'p>(r: &mut Reader<'_>, v: &'p Node<'p>, field: &str) -> Read<'p, EdgeClients> {
    read::only(v, &["caCertificateRefs", "mode"])?;
    if let Some(mode) = v.get("mode") {
        match read::scalar(mode)? {
            "AllowValidOnly" => {}
            t => {
                let message = format!("`{t}` is not available: a client without a valid certificate is refused");
                return Err(Bad::value(mode, message, "write AllowValidOnly or remove it"));
            }
        }
    }
    let mut refs = Vec::new();
    for c in read::list(v, "caCertificateRefs")? {
        let namespace = read::text(c, "namespace")?.filter(|t| !t.is_empty()).map(|t| r.pool.text(t));
        refs.push((backend_tls::ca_ref(r, c, &["group", "kind", "name", "namespace"])?, namespace));
    }
    if refs.is_empty() {
        return Err(Bad::missing(v, "caCertificateRefs", "who issues the certificates of clients is needed"));
    }
    Ok(EdgeClients::Refs { refs, field: format!("{field}.caCertificateRefs").into() })
}

fn one<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, l: &'p Node<'p>, out: &mut EdgeListener) -> Read<'p, ()> {
    read::only(l, &["name", "hostname", "port", "protocol", "tls", "allowedRoutes"])?;
    reference::name(l, "a listener has a name")?;
    let Some(protocol) = l.get("protocol") else { return Err(Bad::missing(l, "protocol", "a listener has a protocol")) };
    out.protocol = match read::scalar(protocol)? {
        "HTTP" => ListenerProtocol::Http,
        "HTTPS" => ListenerProtocol::Https,
        "TLS" => ListenerProtocol::Tls,
        "TCP" => ListenerProtocol::Tcp,
        t => {
            let message = format!("`{t}` is not a protocol that can be listened for");
            return Err(Bad::value(protocol, message, "write HTTP, HTTPS, TLS or TCP"));
        }
    };
    if let Some(h) = l.get("hostname").filter(|h| h.text() != Some("")) {
        if out.protocol == ListenerProtocol::Tcp {
            return Err(Bad::value(h, "a TCP listener has no host name", "remove it"));
        }
        out.hostname = Some(r.pool.text(&host_name(h, true)?));
    }
    let tls = read::map(l, "tls")?;
    match (out.protocol, tls) {
        (ListenerProtocol::Http | ListenerProtocol::Tcp, Some(at)) => {
            return Err(Bad::value(at, "a listener without TLS has no `tls`", "use HTTPS or TLS, or remove it"));
        }
        (ListenerProtocol::Http | ListenerProtocol::Tcp, None) => {}
        (_, None) => return Err(Bad::missing(l, "tls", "a listener with TLS says how it is terminated")),
        (protocol, Some(at)) => {
            out.tls = Some(tls_of(r, at, protocol)?);
            out.clients = clients_of(r, at, out)?;
        }
    }
    if let Some(allowed) = read::map(l, "allowedRoutes")? {
        read::only(allowed, &["namespaces", "kinds"])?;
        if let Some(ns) = read::map(allowed, "namespaces")? {
            read::only(ns, &["from", "selector"])?;
        }
    }
    let possible: &[RouteKind] = match (out.protocol, &out.tls) {
        (ListenerProtocol::Http | ListenerProtocol::Https, _) => &[RouteKind::Http, RouteKind::Grpc],
        (ListenerProtocol::Tls, Some(EdgeTls::Passthrough)) => &[RouteKind::Tls],
        (ListenerProtocol::Tls, _) => &[RouteKind::Tls, RouteKind::Tcp],
        (ListenerProtocol::Tcp, _) => &[RouteKind::Tcp],
    };
    out.kinds = kinds(r, node, l, possible)?;
    out.allowed = allowed_routes(r, node, l)?;
    Ok(())
}

/// `allowedRoutes.kinds`, as far as the protocol carries them; all of those when not written.
fn kinds<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, l: &'p Node<'p>, possible: &[RouteKind]) -> Read<'p, Vec<RouteKind>> {
    let Some(allowed) = read::map(l, "allowedRoutes")? else { return Ok(possible.to_vec()) };
    let list = read::list(allowed, "kinds")?;
    if list.is_empty() {
        return Ok(possible.to_vec());
    }
    let mut out = Vec::new();
    for k in list {
        read::only(k, &["group", "kind"])?;
        let group = read::text(k, "group")?.unwrap_or(GATEWAY_GROUP);
        let Some(kind) = read::text(k, "kind")? else { return Err(Bad::missing(k, "kind", "a kind is named")) };
        if let Some(kind) = possible.iter().find(|p| group == GATEWAY_GROUP && p.as_str() == kind) {
            out.push(*kind);
        } else {
            let message = format!("{} cannot attach to a listener of this protocol", kind_name(group, kind));
            let bad = Bad { code: "invalid-route-kind", ..Bad::value(k, message, "remove it") };
            r.report(node, &bad, Severity::Error);
        }
    }
    Ok(out)
}

fn tls_of<'p>(r: &mut Reader<'_>, tls: &'p Node<'p>, protocol: ListenerProtocol) -> Read<'p, EdgeTls> {
    read::only(tls, &["mode", "certificateRefs", "frontendValidation", "options"])?;
    let (mut chain, mut key) = (None, None);
    if let Some(options) = read::map(tls, "options")? {
        for e in read::entries(options)? {
            let value = read::scalar(&e.node)?;
            match &*e.key {
                CERTIFICATE => chain = Some(r.pool.text(value)),
                KEY => key = Some(r.pool.text(value)),
                // Of clients' certificates: `clients_of`.
                ISTIO_MODE if matches!(value, "SIMPLE" | "MUTUAL" | "OPTIONAL_MUTUAL") => {}
                ISTIO_MODE => {
                    let message = format!("`{value}` is not available for listeners with certificates of their own");
                    return Err(Bad::value(&e.node, message, "write SIMPLE, MUTUAL or OPTIONAL_MUTUAL"));
                }
                k => return Err(Bad::value(&e.node, format!("the option `{k}` is not known here"), "remove it")),
            }
        }
    }
    let refs = read::list(tls, "certificateRefs")?;
    match tls.get("mode").map(|n| read::scalar(n).map(|t| (n, t))).transpose()? {
        None | Some((_, "Terminate")) => {}
        Some((n, "Passthrough")) => {
            if protocol == ListenerProtocol::Https {
                return Err(Bad::value(n, "HTTPS is terminated; passing through is for TLS listeners", "use protocol TLS"));
            }
            return Ok(EdgeTls::Passthrough);
        }
        Some((n, t)) => return Err(Bad::value(n, format!("`{t}` is not a mode"), "write Terminate or Passthrough")),
    }
    match (chain, key, refs) {
        (Some(chain), Some(key), []) => Ok(EdgeTls::Files { chain, key }),
        (Some(_), Some(_), [first, ..]) => {
            Err(Bad::value(first, "certificates from Secrets and from files exclude each other", "keep one of them"))
        }
        (None, None, []) => {
            let message = "a certificate is needed to terminate TLS: certificateRefs, or files in options";
            Err(Bad::missing(tls, "certificateRefs", message))
        }
        (None, None, refs) => {
            let mut out = Vec::new();
            for c in refs {
                read::only(c, &["group", "kind", "namespace", "name"])?;
                let (group, kind) = (read::text_or_empty(c, "group")?, read::text(c, "kind")?.unwrap_or("Secret"));
                if (group, kind) != ("", "Secret") {
                    let message = format!("a certificate cannot come from a {}", kind_name(group, kind));
                    return Err(Bad::value(c, message, "name a Secret of type kubernetes.io/tls"));
                }
                out.push(SecretRef {
                    namespace: read::text(c, "namespace")?.filter(|t| !t.is_empty()).map(|t| r.pool.text(t)),
                    name: r.pool.text(reference::name(c, "a certificateRef has a name")?),
                    line: c.line,
                });
            }
            Ok(EdgeTls::Secrets(out))
        }
        _ => Err(Bad::value(
            tls.get("options").unwrap_or(tls),
            format!("`{CERTIFICATE}` and `{KEY}` are needed together"),
            "add the other one",
        )),
    }
}

/// What a listener says of its clients' certificates.
fn clients_of<'p>(r: &mut Reader<'_>, tls: &'p Node<'p>, l: &EdgeListener) -> Read<'p, Option<EdgeClients>> {
    let options = read::map(tls, "options")?;
    let mode = options.and_then(|o| o.get(ISTIO_MODE)).filter(|mode| mode.text() != Some("SIMPLE"));
    let validation = read::map(tls, "frontendValidation")?;
    let Some(at) = mode.or(validation) else { return Ok(None) };
    if mode.is_some() && validation.is_some() {
        return Err(Bad::value(at, "whose certificates clients have is said twice", "keep one of them"));
    }
    match (&l.tls, validation) {
        (Some(EdgeTls::Passthrough) | None, _) => {
            Err(Bad::value(at, "TLS that is passed through shows no certificates of clients", "remove it, or terminate TLS"))
        }
        (_, Some(v)) => authorities(r, v, &format!("spec.listeners[{}].tls.frontendValidation", l.number)).map(Some),
        (Some(EdgeTls::Files { .. }), None) => {
            let message = "where certificates come from files, who issues those of clients is to be named";
            Err(Bad::value(at, message, "use frontendValidation, or a Secret"))
        }
        (Some(EdgeTls::Secrets(_)), None) => Ok(Some(EdgeClients::BesideCertificate { required: at.text() == Some("MUTUAL") })),
    }
}

/// Listeners of one port must speak alike and differ in host name; the first ones keep the port.
fn conflicts(r: &mut Reader<'_>, all: &mut [EdgeListener]) {
    /// Whether two may share a port: HTTP by `Host`, HTTPS and TLS by SNI.
    fn family(p: ListenerProtocol) -> u8 {
        match p {
            ListenerProtocol::Http => 0,
            ListenerProtocol::Https | ListenerProtocol::Tls => 1,
            ListenerProtocol::Tcp => 2,
        }
    }
    for i in 1..all.len() {
        let (before, rest) = all.split_at_mut(i);
        let Some(l) = rest.first_mut().filter(|l| l.broken.is_none()) else { continue };
        let mut earlier = before.iter().filter(|b| b.broken.is_none());
        let why = earlier.find_map(|b| {
            if b.name == l.name {
                return Some(format!("the name `{}` is taken by another listener", l.name));
            }
            (b.port == l.port).then_some(())?;
            if family(b.protocol) != family(l.protocol) {
                Some(format!("port {} is taken by listener `{}`, which speaks another protocol", l.port, b.name))
            } else if b.hostname == l.hostname {
                Some(format!("port {} is taken by listener `{}` with the same host name", l.port, b.name))
            } else {
                None
            }
        });
        if let Some(why) = why {
            r.problems.push(crate::diagnostics::Problem {
                severity: Severity::Error,
                origin: mesh_model::Origin { place: Arc::clone(&r.place), line: l.line, object: Arc::clone(&r.object) },
                field: format!("spec.listeners[{}]", l.number).into(),
                message: why.as_str().into(),
                fix: "give it another port or host name".into(),
                code: Some("listener-conflict"),
            });
            l.broken = Some(why.into());
        }
    }
}
