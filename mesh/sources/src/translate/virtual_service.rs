//! VirtualService → routes (waypoint §3.1): reading. What joins it with services and delegates is in [`join`].
//!
//! Everything that can be compiled without other objects is compiled here, once: patterns, header names, weights. A field
//! that is not understood refuses the object; then its hosts, as far as they can be told, are closed by a stand-in, unless
//! the object had been read before. Departs from Istio where Istio passes over what it cannot do: matches by labels or
//! namespace of the client are dropped whole (Istio's waypoint drops the condition and matches everybody), variables in
//! header values are refused. Upstream: [`super::object`]. Downstream: [`super::layer7`].

mod join;

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_model::l7::headers::BothEdits;
use mesh_model::l7::retry::parse_retry_on;
use mesh_model::l7::route::{
    Abort, Cors, DirectResponse, Fault, Fraction, HttpMatch, PathMatch, PathRewrite, Redirect, RedirectPort, RetryOn,
    RetryPolicy, Rewrite,
};
use mesh_model::l7::text::{Pattern, StringMatch};

pub(super) use join::{add, check};

use super::authorization::OBJECT_META;
use super::http_text::{self, authority_ok, header_edits, resolve, string_match};
use super::istio::host_name;
use super::object::{ObjectId, Reader};
use super::read::{self, Bad, Read};
use super::{Name, pem};
use crate::diagnostics::Severity;
use crate::yaml::{Node, Value};

/// Largest body of a direct response.
const MAX_BODY: usize = 1 << 20;

/// A VirtualService, compiled but for the services it names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtualService {
    /// Hosts it is for, resolved: exact, `*.suffix` or `*`; none when it is a delegate or not for the mesh.
    pub hosts: Vec<Arc<str>>,
    /// It has no hosts: others delegate to it.
    delegate: bool,
    /// Age.
    created: Arc<str>,
    /// Whom it is exported to.
    exports: Vec<Arc<str>>,
    http: Vec<HttpEntry>,
    tls: Vec<L4Entry>,
    tcp: Vec<L4Entry>,
    /// It could not be read: its hosts are closed with this text.
    pub broken: Option<Arc<str>>,
}
/// One element of `http`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct HttpEntry {
    name: Arc<str>,
    line: u32,
    /// `None`: every request. Empty: none, as all its matches were dropped.
    matches: Option<Vec<NamedMatch>>,
    action: Action,
    rewrite: Option<Rewrite>,
    timeout: Option<Timeout>,
    retry: Option<Arc<RetryPolicy>>,
    fault: Option<Fault>,
    /// `mirror`, and `mirrors`.
    mirror: Option<MirrorTo>,
    mirrors: Vec<MirrorTo>,
    cors: Option<Arc<Cors>>,
    headers: Option<BothEdits>,
}
/// A timeout that was written; zero is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Timeout(Option<Duration>);
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct NamedMatch {
    name: Arc<str>,
    matches: HttpMatch,
}
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Route(Vec<Weighted>),
    Redirect(Redirect),
    Respond(DirectResponse),
    Delegate { to: Name, field: Box<str> },
}
/// A destination with its share.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Weighted {
    to: Dest,
    weight: u32,
    headers: BothEdits,
}
#[derive(Clone, Debug, PartialEq, Eq)]
struct MirrorTo {
    to: Dest,
    fraction: Fraction,
}
/// A destination as written, its host resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Dest {
    host: Arc<str>,
    subset: Option<Arc<str>>,
    port: Option<u16>,
    /// Where, for complaints.
    line: u32,
    field: Box<str>,
}
/// One element of `tls` or `tcp`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct L4Entry {
    /// Empty: everything (`tcp` only), unless all its matches were dropped.
    matches: Vec<L4Match>,
    route: Vec<Weighted>,
}
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct L4Match {
    sni: Vec<Arc<str>>,
    port: Option<u16>,
    destinations: Vec<IpNet>,
}

/// Reads a VirtualService. One that cannot be read, but whose hosts can be told, comes as a stand-in with `broken` set.
pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, VirtualService> {
    let mut bad = match content(r, node, &id.namespace) {
        Ok(vs) => return Ok(vs),
        Err(bad) => bad,
    };
    let Some((hosts, delegate)) = who(r, node, &id.namespace) else { return Err(bad) };
    let why = bad.why(node);
    bad.message
        .push_str("; until it is corrected, what it said before stays in force, or else requests to its hosts are refused");
    r.report(node, &bad, Severity::Error);
    let broken = Some(format!("{id} cannot be used: {why}").into());
    Ok(VirtualService { hosts, delegate, broken, ..VirtualService::default() })
}
/// Whom a VirtualService that cannot be read is about: the hosts that can be told, or that it is a delegate. `None` when
/// nothing can be told, or it is not for the mesh.
fn who(r: &mut Reader<'_>, node: &Node<'_>, namespace: &str) -> Option<(Vec<Arc<str>>, bool)> {
    let spec = node.get("spec")?;
    if let Some(Node { value: Value::Seq(list), .. }) = spec.get("gateways")
        && !list.is_empty()
        && list.iter().all(|g| g.text().is_some_and(|t| t != "mesh"))
    {
        return None;
    }
    match spec.get("hosts") {
        None => Some((Vec::new(), true)),
        Some(Node { value: Value::Seq(list), .. }) => {
            let hosts: Vec<Arc<str>> = list.iter().filter_map(|h| resolve(r, h, namespace, true).ok()).collect();
            (!hosts.is_empty()).then_some((hosts, false))
        }
        Some(_) => None,
    }
}

/// What is being read, and where.
struct Vs<'a, 'b, 'p> {
    r: &'a mut Reader<'b>,
    root: &'p Node<'p>,
    namespace: &'a Arc<str>,
}

fn content<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, namespace: &Arc<str>) -> Read<'p, VirtualService> {
    read::only(node, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    let meta = node.get("metadata").unwrap_or(node);
    read::only(meta, OBJECT_META)?;
    let Some(spec) = read::map(node, "spec")? else {
        return Err(Bad::missing(node, "spec", "a VirtualService has hosts and rules"));
    };
    read::only(spec, &["hosts", "gateways", "http", "tls", "tcp", "exportTo"])?;
    let mut vs = VirtualService {
        created: r.pool.text(read::text_or_empty(meta, "creationTimestamp")?),
        exports: http_text::exports(r, spec, namespace)?,
        ..VirtualService::default()
    };
    for h in read::list(spec, "hosts")? {
        let host = resolve(r, h, namespace, true)?;
        if !vs.hosts.contains(&host) {
            vs.hosts.push(host);
        }
    }
    vs.delegate = vs.hosts.is_empty();
    let gateways = read::list(spec, "gateways")?;
    if vs.delegate
        && let Some(g) = gateways.first()
    {
        return Err(Bad::value(
            g,
            "a VirtualService without hosts is a delegate and has no gateways",
            "add `hosts`, or remove this",
        ));
    }
    if !for_mesh(gateways)? {
        r.note(node, "accepted; its gateways do not include `mesh`, so it is not for waypoints");
        vs.hosts.clear();
        return Ok(vs);
    }
    let mut vs_reader = Vs { r, root: node, namespace };
    let http = read::list(spec, "http")?;
    for (i, n) in http.iter().enumerate() {
        let entry = vs_reader.http(n, i, vs.delegate)?;
        let all = entry.matches.is_none();
        vs.http.push(entry);
        if all && let Some(next) = http.get(i + 1) {
            vs_reader.warn(
                next,
                "the rule before has no `match`: no request gets here",
                "move it before that rule",
                "unreachable",
            );
            // They still must be well formed.
            for (i, n) in http.iter().enumerate().skip(i + 1) {
                vs_reader.http(n, i, vs.delegate)?;
            }
            break;
        }
    }
    for (i, n) in read::list(spec, "tls")?.iter().enumerate() {
        vs.tls.extend(vs_reader.l4(n, "tls", i)?);
    }
    for (i, n) in read::list(spec, "tcp")?.iter().enumerate() {
        vs.tcp.extend(vs_reader.l4(n, "tcp", i)?);
    }
    if vs.http.is_empty()
        && vs.tls.is_empty()
        && vs.tcp.is_empty()
        && ["http", "tls", "tcp"].iter().all(|k| spec.get(k).is_none())
    {
        return Err(Bad::missing(spec, "http", "a VirtualService has at least one rule in `http`, `tls` or `tcp`"));
    }
    if vs.delegate
        && let Some(n) = spec.get("tls").or(spec.get("tcp"))
    {
        return Err(Bad::value(n, "a delegate has `http` rules only", "add `hosts`, or remove this"));
    }
    Ok(vs)
}

/// Whether a list of gateways means traffic inside the mesh.
fn for_mesh<'p>(gateways: &'p [Node<'p>]) -> Read<'p, bool> {
    let mut mesh = gateways.is_empty();
    for g in gateways {
        mesh |= read::scalar(g)? == "mesh";
    }
    Ok(mesh)
}

const HTTP: &[&str] = &[
    "name",
    "match",
    "route",
    "redirect",
    "directResponse",
    "delegate",
    "rewrite",
    "timeout",
    "retries",
    "fault",
    "mirror",
    "mirrors",
    "mirrorPercent",
    "mirror_percent",
    "mirrorPercentage",
    "corsPolicy",
    "headers",
];

impl<'p> Vs<'_, '_, 'p> {
    fn warn(&mut self, at: &Node<'_>, message: &str, fix: &'static str, code: &'static str) {
        let bad = Bad { at, missing: None, message: message.into(), fix, code };
        self.r.report(self.root, &bad, Severity::Warning);
    }
    fn text(&mut self, node: &'p Node<'p>, key: &str) -> Read<'p, Arc<str>> {
        Ok(self.r.pool.text(read::text_or_empty(node, key)?))
    }

    fn http(&mut self, n: &'p Node<'p>, index: usize, delegate: bool) -> Read<'p, HttpEntry> {
        read::only(n, HTTP)?;
        let at = format!("spec.http[{index}]");
        Ok(HttpEntry {
            name: self.text(n, "name")?,
            line: n.line,
            matches: self.matches(n)?,
            action: self.action(n, &at, delegate)?,
            rewrite: read::map(n, "rewrite")?.map(rewrite).transpose()?,
            timeout: read::duration(n, "timeout")?.map(|t| Timeout(Some(t).filter(|t| !t.is_zero()))),
            retry: read::map(n, "retries")?.map(retries).transpose()?.map(Arc::new),
            fault: read::map(n, "fault")?.map(|f| self.fault(f)).transpose()?,
            mirror: self.mirror(n, &at)?,
            mirrors: self.mirrors(n, &at)?,
            cors: read::map(n, "corsPolicy")?.map(cors).transpose()?.map(Arc::new),
            headers: read::map(n, "headers")?.map(|h| header_edits(self.r, self.root, h)).transpose()?,
        })
    }

    fn action(&mut self, n: &'p Node<'p>, at: &str, delegate: bool) -> Read<'p, Action> {
        let written: Vec<&str> =
            ["route", "redirect", "directResponse", "delegate"].into_iter().filter(|k| n.get(k).is_some()).collect();
        let kind = match written.as_slice() {
            [one] => *one,
            [] => {
                return Err(Bad::missing(n, "route", "a rule has a `route`, a `redirect`, a `directResponse` or a `delegate`"));
            }
            [one, other, ..] => {
                let message = format!("`{one}` and `{other}` cannot both be written");
                return Err(Bad::value(n.get(other).unwrap_or(n), message, "keep one of them"));
            }
        };
        if kind != "route"
            && kind != "delegate"
            && let Some(rewrite) = n.get("rewrite")
        {
            return Err(Bad::value(rewrite, format!("`rewrite` cannot go with `{kind}`"), "remove it"));
        }
        let Some(node) = n.get(kind) else { return Err(Bad::missing(n, "route", "a rule has a `route`")) };
        Ok(match kind {
            "route" => {
                let routes = read::list(n, "route")?;
                if routes.is_empty() {
                    return Err(Bad::value(node, "a route has at least one destination", "add a destination"));
                }
                Action::Route(self.weighted(node, routes, &format!("{at}.route"), true)?)
            }
            "redirect" => Action::Redirect(redirect(node)?),
            "directResponse" => Action::Respond(respond(node)?),
            _ => {
                read::only(node, &["name", "namespace"])?;
                if delegate {
                    return Err(Bad::value(node, "a delegate cannot delegate further", "write the route itself"));
                }
                let name = self.text(node, "name")?;
                if name.is_empty() {
                    return Err(Bad::missing(node, "name", "the name of a VirtualService"));
                }
                let namespace = read::text(node, "namespace")?.filter(|t| !t.is_empty());
                let namespace = namespace.map_or_else(|| Arc::clone(self.namespace), |t| self.r.pool.text(t));
                Action::Delegate { to: (namespace, name), field: format!("{at}.delegate").into() }
            }
        })
    }

    /// The destinations of a route: those without weight are left out where there are several, and a single one needs none.
    fn weighted(&mut self, list: &'p Node<'p>, routes: &'p [Node<'p>], at: &str, http: bool) -> Read<'p, Vec<Weighted>> {
        let mut out = Vec::with_capacity(routes.len());
        let mut total = 0u32;
        for (i, n) in routes.iter().enumerate() {
            read::only(n, if http { &["destination", "weight", "headers"] } else { &["destination", "weight"] })?;
            let Some(to) = read::map(n, "destination")? else {
                return Err(Bad::missing(n, "destination", "where to"));
            };
            let to = self.dest(to, format!("{at}[{i}].destination"))?;
            let headers = read::map(n, "headers")?.map(|h| header_edits(self.r, self.root, h)).transpose()?;
            let headers = headers.unwrap_or_default();
            let weight = read::number::<u32>(n, "weight")?.unwrap_or(0);
            let weight = if routes.len() == 1 { 1 } else { weight };
            total = total.checked_add(weight).ok_or_else(|| {
                Bad::value(
                    n.get("weight").unwrap_or(n),
                    "the weights of the route sum to more than 4294967295",
                    "write smaller ones",
                )
            })?;
            if weight > 0 {
                out.push(Weighted { to, weight, headers });
            }
        }
        if total == 0 {
            return Err(Bad::value(
                list,
                "no destination has a weight: nothing could be sent anywhere",
                "write a `weight` for each destination",
            ));
        }
        Ok(out)
    }

    fn dest(&mut self, n: &'p Node<'p>, field: String) -> Read<'p, Dest> {
        read::only(n, &["host", "subset", "port"])?;
        let Some(host) = n.get("host") else { return Err(Bad::missing(n, "host", "the host of a service")) };
        let port = match read::map(n, "port")? {
            None => None,
            Some(p) => {
                read::only(p, &["number"])?;
                Some(read::port_at(p, "number")?)
            }
        };
        let subset = read::text(n, "subset")?.filter(|t| !t.is_empty()).map(|t| self.r.pool.text(t));
        Ok(Dest { host: resolve(self.r, host, self.namespace, false)?, subset, port, line: host.line, field: field.into() })
    }

    fn matches(&mut self, n: &'p Node<'p>) -> Read<'p, Option<Vec<NamedMatch>>> {
        let list = read::list(n, "match")?;
        if list.is_empty() {
            return Ok(None);
        }
        let mut out = Vec::with_capacity(list.len());
        for m in list {
            out.extend(self.one_match(m)?);
        }
        Ok(Some(out))
    }
    /// One match; `None` when it never can hold here.
    fn one_match(&mut self, n: &'p Node<'p>) -> Read<'p, Option<NamedMatch>> {
        read::only(
            n,
            &[
                "name",
                "uri",
                "scheme",
                "method",
                "authority",
                "headers",
                "withoutHeaders",
                "queryParams",
                "port",
                "ignoreUriCase",
                "sourceLabels",
                "sourceNamespace",
                "gateways",
                "statPrefix",
            ],
        )?;
        let condition = |key: &str| -> Read<'p, Option<StringMatch>> {
            let found = read::map(n, key)?.map(string_match).transpose()?;
            // Every request has these: that one is there says nothing.
            Ok(found.filter(|m| *m != StringMatch::Present))
        };
        let mut m = HttpMatch {
            path: condition("uri")?.map(|p| match p {
                StringMatch::Exact(t) => PathMatch::Exact(t),
                StringMatch::Prefix(t) => PathMatch::TextPrefix(t),
                StringMatch::Regex(p) => PathMatch::Regex(p),
                // Neither comes out of `condition`.
                StringMatch::Suffix(_) | StringMatch::Present => PathMatch::TextPrefix("".into()),
            }),
            ignore_case: read::flag(n, "ignoreUriCase")?,
            method: condition("method")?,
            scheme: condition("scheme")?,
            authority: condition("authority")?,
            port: n.get("port").map(read::port).transpose()?,
            ..HttpMatch::default()
        };
        if let Some(map) = read::map(n, "headers")? {
            for e in read::entries(map)? {
                header_condition(&mut m, &e.key, &e.node)?;
            }
        }
        if let Some(map) = read::map(n, "withoutHeaders")? {
            for e in read::entries(map)? {
                if e.key.starts_with('@') {
                    m.without_claims.push((claim(&e.key, &e.node)?, string_match(&e.node)?));
                    continue;
                }
                if e.key.starts_with(':') {
                    let message = format!("`{}` cannot be asked to be absent", e.key);
                    return Err(Bad::value(&e.node, message, "use headers' names here"));
                }
                m.without_headers.push((http_text::name(&e.node, &e.key)?, string_match(&e.node)?));
            }
        }
        if let Some(map) = read::map(n, "queryParams")? {
            for e in read::entries(map)? {
                m.query.push((self.r.pool.text(&e.key), string_match(&e.node)?));
            }
        }
        let name = self.text(n, "name")?;
        let source = read::map(n, "sourceLabels")?.filter(|l| read::entries(l).is_ok_and(|e| !e.is_empty()));
        if let Some(at) = source.or(n.get("sourceNamespace").filter(|t| t.text() != Some(""))) {
            self.warn(
                at,
                "a waypoint does not match by the client's labels or namespace; this match is left out",
                "match on a header, or use an AuthorizationPolicy",
                "source-match",
            );
            return Ok(None);
        }
        if !for_mesh(read::list(n, "gateways")?)? {
            return Ok(None);
        }
        Ok(Some(NamedMatch { name, matches: m }))
    }

    fn fault(&mut self, n: &'p Node<'p>) -> Read<'p, Fault> {
        read::only(n, &["delay", "abort"])?;
        let mut out = Fault { delay: None, abort: None };
        if let Some(d) = read::map(n, "delay")? {
            read::only(d, &["percentage", "percent", "fixedDelay"])?;
            let delay = read::duration(d, "fixedDelay")?;
            let Some(delay) = delay.filter(|t| !t.is_zero()) else {
                return Err(Bad::missing(d, "fixedDelay", "how long, more than nothing"));
            };
            let percentage = percentage(d, "percentage")?;
            let percent = percent(d, "percent")?;
            out.delay = Some((self.share(d, percentage.or(percent)), delay));
        }
        if let Some(a) = read::map(n, "abort")? {
            read::only(a, &["percentage", "httpStatus", "grpcStatus"])?;
            let how = match (a.get("httpStatus"), a.get("grpcStatus")) {
                (Some(s), None) => Abort::Http(status(s, 200)?),
                (None, Some(s)) => Abort::Grpc(grpc_status(s)?),
                (None, None) => return Err(Bad::missing(a, "httpStatus", "an abort has an `httpStatus` or a `grpcStatus`")),
                (Some(_), Some(s)) => {
                    return Err(Bad::value(s, "`httpStatus` and `grpcStatus` cannot both be written", "keep one"));
                }
            };
            let percentage = percentage(a, "percentage")?;
            out.abort = Some((self.share(a, percentage), how));
        }
        if out.delay.is_none() && out.abort.is_none() {
            return Err(Bad::value(n, "a fault has a `delay` or an `abort`", "add one, or remove `fault`"));
        }
        Ok(out)
    }
    /// A fault's share; without one nothing is hit, as in Istio.
    fn share(&mut self, at: &'p Node<'p>, fraction: Option<Fraction>) -> Fraction {
        fraction.unwrap_or_else(|| {
            self.warn(at, "without `percentage` no request is hit", "write `percentage: {value: 100}`", "percentage");
            Fraction { per_million: 0 }
        })
    }

    fn mirror(&mut self, n: &'p Node<'p>, at: &str) -> Read<'p, Option<MirrorTo>> {
        let (share, old) = (percentage(n, "mirrorPercentage")?, percent(n, "mirrorPercent")?.or(percent(n, "mirror_percent")?));
        let Some(to) = read::map(n, "mirror")? else { return Ok(None) };
        let to = self.dest(to, format!("{at}.mirror"))?;
        Ok(Some(MirrorTo { to, fraction: share.or(old).unwrap_or(Fraction::ALL) }))
    }
    fn mirrors(&mut self, n: &'p Node<'p>, at: &str) -> Read<'p, Vec<MirrorTo>> {
        let mut out = Vec::new();
        for (i, m) in read::list(n, "mirrors")?.iter().enumerate() {
            read::only(m, &["destination", "percentage"])?;
            let Some(to) = read::map(m, "destination")? else { return Err(Bad::missing(m, "destination", "where to")) };
            let to = self.dest(to, format!("{at}.mirrors[{i}].destination"))?;
            out.push(MirrorTo { to, fraction: percentage(m, "percentage")?.unwrap_or(Fraction::ALL) });
        }
        Ok(out)
    }

    /// An element of `tls` or `tcp`; `None` when all its matches were dropped.
    fn l4(&mut self, n: &'p Node<'p>, kind: &str, index: usize) -> Read<'p, Option<L4Entry>> {
        read::only(n, &["match", "route"])?;
        let tls = kind == "tls";
        let list = read::list(n, "match")?;
        if tls && list.is_empty() {
            return Err(Bad::missing(n, "match", "a TLS rule matches `sniHosts`"));
        }
        let mut matches = Vec::with_capacity(list.len());
        for m in list {
            matches.extend(self.l4_match(m, tls)?);
        }
        let routes = read::list(n, "route")?;
        if routes.is_empty() {
            return Err(Bad::missing(n, "route", "where to"));
        }
        let at = n.get("route").unwrap_or(n);
        let route = self.weighted(at, routes, &format!("spec.{kind}[{index}].route"), false)?;
        Ok((list.is_empty() || !matches.is_empty()).then_some(L4Entry { matches, route }))
    }
    fn l4_match(&mut self, n: &'p Node<'p>, tls: bool) -> Read<'p, Option<L4Match>> {
        let known = ["destinationSubnets", "port", "sourceLabels", "gateways", "sourceNamespace", "sourceSubnet", "sniHosts"];
        // `sniHosts` only in TLS rules, `sourceSubnet` only in TCP rules.
        let known: Vec<&str> = known.into_iter().filter(|k| if tls { *k != "sourceSubnet" } else { *k != "sniHosts" }).collect();
        read::only(n, &known)?;
        let mut m = L4Match { port: n.get("port").map(read::port).transpose()?, ..L4Match::default() };
        for h in read::list(n, "sniHosts")? {
            // A bare `*` is every name, as an entry of the Gateway API's.
            m.sni.push(if h.text() == Some("*") { "*".into() } else { self.r.pool.text(&host_name(h, true)?) });
        }
        if tls && m.sni.is_empty() {
            return Err(Bad::missing(n, "sniHosts", "a TLS rule matches at least one name"));
        }
        for d in read::list(n, "destinationSubnets")? {
            m.destinations.push(read::net(d)?);
        }
        let by_source = ["sourceLabels", "sourceNamespace", "sourceSubnet"].iter().find_map(|k| n.get(k));
        if let Some(at) = by_source.or(n.get("destinationSubnets").filter(|_| tls)) {
            self.warn(
                at,
                "a waypoint does not match by this; the match is left out",
                "match by port, or use an AuthorizationPolicy",
                "source-match",
            );
            return Ok(None);
        }
        Ok(for_mesh(read::list(n, "gateways")?)?.then_some(m))
    }
}

/// One entry of `headers`: a header, a pseudo header, or a claim of the verified token.
fn header_condition<'p>(m: &mut HttpMatch, key: &str, n: &'p Node<'p>) -> Read<'p, ()> {
    let what = string_match(n)?;
    if key.starts_with('@') {
        m.claims.push((claim(key, n)?, what));
        return Ok(());
    }
    let pseudo = match key {
        ":method" => Some(&mut m.method),
        ":authority" => Some(&mut m.authority),
        ":scheme" => Some(&mut m.scheme),
        _ if key.starts_with(':') => {
            return Err(Bad::value(
                n,
                format!("`{key}` cannot be matched as a header"),
                "use `uri`, `method`, `authority` or `scheme`",
            ));
        }
        _ => None,
    };
    match pseudo {
        Some(_) if what == StringMatch::Present => {}
        Some(slot) if slot.is_none() => *slot = Some(what),
        Some(_) => return Err(Bad::value(n, format!("`{key}` is matched twice"), "keep one of the two conditions")),
        None => m.headers.push((http_text::name(n, key)?, what)),
    }
    Ok(())
}
/// `@request.auth.claims.a.b`, or with `[a][b]`: the path into the claims of the verified token.
fn claim<'p>(key: &str, n: &'p Node<'p>) -> Read<'p, Vec<Arc<str>>> {
    key.strip_prefix("@request.auth.claims").and_then(claim_path).ok_or_else(|| {
        Bad::value(n, format!("`{key}` is not a claim"), "write `@request.auth.claims.name` or `@request.auth.claims[a][b]`")
    })
}
/// `.a.b` or `[a][b]`.
fn claim_path(text: &str) -> Option<Vec<Arc<str>>> {
    let parts: Vec<&str> = if let Some(rest) = text.strip_prefix('.') {
        rest.split('.').collect()
    } else {
        text.strip_prefix('[')?.strip_suffix(']')?.split("][").collect()
    };
    parts.iter().all(|p| !p.is_empty() && !p.contains(['[', ']'])).then(|| parts.into_iter().map(Arc::from).collect())
}

fn rewrite<'p>(n: &'p Node<'p>) -> Read<'p, Rewrite> {
    read::only(n, &["uri", "authority", "uriRegexRewrite"])?;
    let uri = read::text(n, "uri")?.filter(|t| !t.is_empty());
    let authority = authority(n)?;
    let path = match (uri, read::map(n, "uriRegexRewrite")?) {
        (Some(_), Some(regex)) => {
            return Err(Bad::value(regex, "`uri` and `uriRegexRewrite` cannot both be written", "keep one of them"));
        }
        (Some(uri), None) => Some(PathRewrite::TextPrefix(uri.into())),
        (None, Some(regex)) => {
            read::only(regex, &["match", "rewrite"])?;
            let Some(from) = regex.get("match") else { return Err(Bad::missing(regex, "match", "what to replace")) };
            let text = read::scalar(from)?;
            let pattern = Pattern::parse_search(text);
            let pattern = pattern.map_err(|e| Bad::value(from, e.to_string(), "correct the expression (RE2 syntax)"))?;
            let replacement = match regex.get("rewrite") {
                None => String::new(),
                Some(to) => replacement(to, pattern.regex().captures_len())?,
            };
            Some(PathRewrite::Regex { pattern, replacement: replacement.into() })
        }
        (None, None) => None,
    };
    if path.is_none() && authority.is_none() {
        return Err(Bad::value(n, "a rewrite has a `uri`, a `uriRegexRewrite` or an `authority`", "add one, or remove it"));
    }
    Ok(Rewrite { path, authority })
}
/// RE2's replacement (`\0` to `\9` are groups, `\\` a backslash) in the form of the `regex` crate.
fn replacement<'p>(n: &'p Node<'p>, groups: usize) -> Read<'p, String> {
    let text = read::scalar(n)?;
    let mut out = String::with_capacity(text.len() + 8);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '$' => out.push_str("$$"),
            '\\' => match chars.next() {
                Some('\\') => out.push('\\'),
                Some(d) if d.to_digit(10).is_some_and(|d| (d as usize) < groups) => {
                    out.push_str("${");
                    out.push(d);
                    out.push('}');
                }
                Some(d) if d.is_ascii_digit() => {
                    let message = format!("`\\{d}` is not a group of the pattern, which has {}", groups.saturating_sub(1));
                    return Err(Bad::value(n, message, "count the parentheses"));
                }
                _ => return Err(Bad::value(n, "a `\\` is followed by a digit or another `\\`", "write `\\\\` for a backslash")),
            },
            c => out.push(c),
        }
    }
    Ok(out)
}
fn authority<'p>(n: &'p Node<'p>) -> Read<'p, Option<Arc<str>>> {
    let Some(at) = n.get("authority") else { return Ok(None) };
    match read::scalar(at)? {
        "" => Ok(None),
        t if authority_ok(t) => Ok(Some(t.into())),
        t => Err(Bad::value(at, format!("`{t}` is not a host"), "write `host` or `host:port`")),
    }
}

fn redirect<'p>(n: &'p Node<'p>) -> Read<'p, Redirect> {
    /// How routes of the Gateway API say "only the matched prefix" inside Istio.
    const PREFIX: &str = "%PREFIX()%";
    read::only(n, &["uri", "authority", "port", "derivePort", "scheme", "redirectCode"])?;
    let status = match n.get("redirectCode") {
        None => 301,
        Some(at) => match read::scalar(at)? {
            "0" => 301,
            t => t.parse().ok().filter(|s| matches!(s, 301 | 302 | 303 | 307 | 308)).ok_or_else(|| {
                Bad::value(at, format!("`{t}` is not a status for redirects"), "write 301, 302, 303, 307 or 308")
            })?,
        },
    };
    let port = match (n.get("port"), n.get("derivePort")) {
        (Some(p), None) => RedirectPort::Number(read::port(p)?),
        (None, Some(d)) => match read::scalar(d)? {
            "FROM_PROTOCOL_DEFAULT" => RedirectPort::ProtocolDefault,
            "FROM_REQUEST_PORT" => RedirectPort::FromRequest,
            t => {
                return Err(Bad::value(
                    d,
                    format!("`{t}` is not understood"),
                    "write FROM_PROTOCOL_DEFAULT or FROM_REQUEST_PORT",
                ));
            }
        },
        (None, None) => RedirectPort::Unset,
        (Some(_), Some(d)) => return Err(Bad::value(d, "`port` and `derivePort` cannot both be written", "keep one of them")),
    };
    let path = match n.get("uri") {
        None => None,
        Some(at) => match (read::scalar(at)?, read::scalar(at)?.strip_prefix(PREFIX)) {
            ("", _) => None,
            (_, Some(prefix)) => Some(PathRewrite::TextPrefix(prefix.into())),
            (t, None) if t.starts_with('/') => Some(PathRewrite::Full(t.into())),
            (t, None) => return Err(Bad::value(at, format!("`{t}` is not a path"), "start it with `/`")),
        },
    };
    let scheme = match n.get("scheme") {
        None => None,
        Some(at) => match read::scalar(at)? {
            "" => None,
            t if t.parse::<http::uri::Scheme>().is_ok() => Some(t.to_ascii_lowercase().into()),
            t => return Err(Bad::value(at, format!("`{t}` is not a scheme"), "write `http` or `https`")),
        },
    };
    Ok(Redirect { status, scheme, authority: authority(n)?, port, path, strip_query: false })
}

fn respond<'p>(n: &'p Node<'p>) -> Read<'p, DirectResponse> {
    read::only(n, &["status", "body"])?;
    let Some(at) = n.get("status") else { return Err(Bad::missing(n, "status", "the status of the answer")) };
    let status = status(at, 200)?;
    let mut body: Vec<u8> = Vec::new();
    if let Some(b) = read::map(n, "body")? {
        read::only(b, &["string", "bytes"])?;
        match (b.get("string"), b.get("bytes")) {
            (Some(_), Some(at)) => return Err(Bad::value(at, "`string` and `bytes` cannot both be written", "keep one of them")),
            (Some(at), None) => read::scalar(at)?.as_bytes().clone_into(&mut body),
            (None, Some(at)) => {
                body = pem::base64(read::scalar(at)?).ok_or_else(|| Bad::value(at, "not base64", "use `string` for text"))?;
            }
            (None, None) => {}
        }
        if body.len() > MAX_BODY {
            return Err(Bad::value(
                b,
                format!("the body has {} bytes, more than {MAX_BODY}", body.len()),
                "serve it from a service",
            ));
        }
    }
    Ok(DirectResponse { status, body: body.into() })
}
/// An HTTP status from `least` to 599.
fn status<'p>(n: &'p Node<'p>, least: u16) -> Read<'p, u16> {
    let t = read::scalar(n)?;
    let status = t.parse().ok().filter(|s| (least..600).contains(s));
    status.ok_or_else(|| Bad::value(n, format!("`{t}` is not an HTTP status"), "write a number from 200 to 599"))
}
/// A gRPC status by name or number.
fn grpc_status<'p>(n: &'p Node<'p>) -> Read<'p, u16> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    let t = read::scalar(n)?;
    let found = NAMES.iter().position(|name| *name == t).or_else(|| t.parse().ok().filter(|s| *s < NAMES.len()));
    let found = found.and_then(|s| u16::try_from(s).ok());
    found.ok_or_else(|| Bad::value(n, format!("`{t}` is not a gRPC status"), "write a name such as UNAVAILABLE, or its number"))
}

/// `{value: 12.5}`.
fn percentage<'p>(n: &'p Node<'p>, key: &str) -> Read<'p, Option<Fraction>> {
    let Some(p) = read::map(n, key)? else { return Ok(None) };
    read::only(p, &["value"])?;
    let value = read::decimal(p, "value")?.unwrap_or(0.0);
    if !(0.0..=100.0).contains(&value) {
        return Err(Bad::value(
            p.get("value").unwrap_or(p),
            format!("`{value}` is not a percentage"),
            "write a number from 0 to 100",
        ));
    }
    Ok(Some(Fraction::percent(value)))
}
/// The older form: a whole number.
fn percent<'p>(n: &'p Node<'p>, key: &str) -> Read<'p, Option<Fraction>> {
    let value = read::number::<u32>(n, key)?;
    match value {
        Some(v) if v > 100 => {
            Err(Bad::value(n.get(key).unwrap_or(n), format!("`{v}` is not a percentage"), "write a number from 0 to 100"))
        }
        v => Ok(v.map(|v| Fraction::percent(f64::from(v)))),
    }
}

/// An `HTTPRetry`.
pub(super) fn retries<'p>(n: &'p Node<'p>) -> Read<'p, RetryPolicy> {
    read::only(n, &["attempts", "perTryTimeout", "retryOn", "retryRemoteLocalities", "retryIgnorePreviousHosts", "backoff"])?;
    let mut out = RetryPolicy::istio_default();
    // None and a negative number switch retries off, as in Istio.
    out.attempts = u32::try_from(read::number::<i32>(n, "attempts")?.unwrap_or(0)).unwrap_or(0);
    out.per_try = read::duration(n, "perTryTimeout")?.filter(|t| !t.is_zero());
    if let Some(at) = n.get("retryOn").filter(|n| n.text() != Some("")) {
        (out.on, out.statuses) = retry_on(at)?;
    }
    if let Some(base) = read::duration(n, "backoff")? {
        if base < Duration::from_millis(1) {
            return Err(Bad::value(n.get("backoff").unwrap_or(n), "a back-off is at least 1ms", "write for example `25ms`"));
        }
        out.base_backoff = base;
        out.max_backoff = base.saturating_mul(10);
    }
    out.other_localities = read::flag(n, "retryRemoteLocalities")?;
    out.other_hosts = n.get("retryIgnorePreviousHosts").is_none() || read::flag(n, "retryIgnorePreviousHosts")?;
    Ok(out)
}
fn retry_on<'p>(n: &'p Node<'p>) -> Read<'p, (RetryOn, Vec<u16>)> {
    let (on, mut statuses) = parse_retry_on(read::scalar(n)?).map_err(|word| {
        Bad::value(
            n,
            format!("`{word}` is not a reason to retry"),
            "write Envoy's words (`5xx`, `reset`, `connect-failure`, …) or statuses",
        )
    })?;
    statuses.sort_unstable();
    Ok((on, statuses))
}

/// A `corsPolicy`.
pub(super) fn cors<'p>(n: &'p Node<'p>) -> Read<'p, Cors> {
    read::only(
        n,
        &[
            "allowOrigin",
            "allowOrigins",
            "allowMethods",
            "allowHeaders",
            "exposeHeaders",
            "maxAge",
            "allowCredentials",
            "unmatchedPreflights",
        ],
    )?;
    let joined = |key: &str| -> Read<'p, Arc<str>> {
        let mut all = Vec::new();
        for n in read::list(n, key)? {
            let text = read::scalar(n)?;
            if http::HeaderValue::from_str(text).is_err() {
                return Err(Bad::value(n, "not a header value", ""));
            }
            all.push(text);
        }
        Ok(all.join(",").into())
    };
    let mut out = Cors {
        methods: joined("allowMethods")?,
        headers: joined("allowHeaders")?,
        expose: joined("exposeHeaders")?,
        max_age: read::duration(n, "maxAge")?.map(|d| d.as_secs()),
        credentials: read::flag(n, "allowCredentials")?,
        forward_unmatched: match n.get("unmatchedPreflights") {
            None => true,
            Some(at) => match read::scalar(at)? {
                "UNSPECIFIED" | "FORWARD" => true,
                "IGNORE" => false,
                t => return Err(Bad::value(at, format!("`{t}` is not understood"), "write FORWARD or IGNORE")),
            },
        },
        origins: Vec::new(),
    };
    for o in read::list(n, "allowOrigin")? {
        out.origins.push(StringMatch::Exact(read::scalar(o)?.into()));
    }
    for o in read::list(n, "allowOrigins")? {
        out.origins.push(string_match(o)?);
    }
    // The text `*` as a whole is every origin.
    for o in &mut out.origins {
        if matches!(o, StringMatch::Exact(t) if &**t == "*") {
            *o = StringMatch::Present;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
