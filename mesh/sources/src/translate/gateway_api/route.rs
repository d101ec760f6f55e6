//! What HTTPRoute, GRPCRoute, TCPRoute and TLSRoute have in common: parents, host names, rules with weighted backends.
//!
//! A route whose rules cannot be understood still says whom it was for: it is read as broken, and what it attaches to is
//! closed instead of being served without it.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use mesh_model::Origin;
use mesh_model::l7::route::{HttpMatch, HttpRoute, RetryPolicy, TcpRoute};
use mesh_model::l7::text::{Pattern, StringMatch};

use super::super::istio::host_name;
use super::super::kube::section;
use super::super::object::{Kind, ObjectId, Reader};
use super::super::read::{self, Bad, Read};
use super::compile::Compile;
use super::filter::{self, Filters, Place};
use super::reference::{self, Owner, ParentRef, Target};
use super::{grpc_route, http_route, l4_route, session};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// The four kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    /// HTTPRoute.
    Http,
    /// GRPCRoute.
    Grpc,
    /// TCPRoute.
    Tcp,
    /// TLSRoute.
    Tls,
}
impl RouteKind {
    /// As in `kind:`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "HTTPRoute",
            Self::Grpc => "GRPCRoute",
            Self::Tcp => "TCPRoute",
            Self::Tls => "TLSRoute",
        }
    }
    /// The kind of its objects.
    pub(in super::super) fn of_object(self) -> Kind {
        match self {
            Self::Http => Kind::HttpRoute,
            Self::Grpc => Kind::GrpcRoute,
            Self::Tcp => Kind::TcpRoute,
            Self::Tls => Kind::TlsRoute,
        }
    }
}

/// A route of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What it attaches to.
    pub parents: Vec<ParentRef>,
    /// Host names, lower case; empty for all. SNI names of a TLSRoute.
    pub hostnames: Vec<Arc<str>>,
    /// Age.
    pub created: Arc<str>,
    /// Rules in written order.
    pub rules: Vec<Rule>,
    /// Why it could not be understood; then there are no rules.
    pub broken: Option<Arc<str>>,
}
/// One rule, compiled as if everything it names were there and permitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// When it applies; one at least for HTTP and gRPC, none for TCP and TLS.
    pub matches: Vec<(Rank, Arc<HttpMatch>)>,
    /// What happens then.
    pub action: Action,
    /// What it names, and where that is in the action.
    pub targets: Vec<(At, Target)>,
}
/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// HTTP and gRPC.
    Http(Arc<HttpRoute>),
    /// TCP and TLS.
    L4(Arc<TcpRoute>),
}
/// Place of a reference in an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Backend of this number.
    Backend(usize),
    /// Mirror of the rule.
    Mirror(usize),
    /// Mirror of a backend.
    BackendMirror(usize, usize),
}

/// A rule as written, before it is compiled.
pub(super) struct Written {
    pub(super) name: Option<Arc<str>>,
    pub(super) matches: Vec<(Rank, Arc<HttpMatch>)>,
    pub(super) filters: Filters,
    /// Those of weight 0 too.
    pub(super) backends: Vec<WrittenBackend>,
    pub(super) timeout: Option<Duration>,
    pub(super) retry: Option<Arc<RetryPolicy>>,
    pub(super) session: Option<session::Asked>,
}
/// A backend as written.
pub(super) struct WrittenBackend {
    pub(super) to: Target,
    pub(super) weight: u32,
    pub(super) filters: Filters,
}

/// How specific a match is; the least comes first. Between equals the older route, then names, then written order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    path: PathKind,
    length: Reverse<usize>,
    any_method: bool,
    headers: Reverse<usize>,
    query: Reverse<usize>,
}
/// Kinds of path matches, most specific first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PathKind {
    Exact,
    Prefix,
    Regex,
    /// A GRPCRoute that takes every method.
    Any,
}
impl Rank {
    pub(super) fn new(path: PathKind, length: usize, any_method: bool, headers: usize, query: usize) -> Self {
        Self { path, length: Reverse(length), any_method, headers: Reverse(headers), query: Reverse(query) }
    }
}

/// Reads a route. An error when not even its parents can be told.
pub(super) fn read<'p>(
    r: &mut Reader<'_>,
    node: &'p Node<'p>,
    kind: RouteKind,
    id: &ObjectId,
    origin: &Arc<Origin>,
) -> Read<'p, Route> {
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    let mut first: Option<Bad<'p>> = None;
    let mut parents = Vec::new();
    for p in read::list(spec, "parentRefs")? {
        match reference::parent(r, p, &id.namespace) {
            Ok(p) => parents.push(p),
            Err(bad) => {
                first.get_or_insert(bad);
            }
        }
    }
    if parents.is_empty() {
        return Err(first.unwrap_or_else(|| Bad::missing(spec, "parentRefs", "a route attaches to a Gateway or a Service")));
    }
    let hosts = read::list(spec, "hostnames").unwrap_or_else(|bad| {
        first.get_or_insert(bad);
        &[]
    });
    let mut hostnames = Vec::new();
    for h in hosts {
        match host_name(h, true) {
            Ok(h) => hostnames.push(r.pool.text(&h)),
            Err(bad) => {
                first.get_or_insert(bad);
            }
        }
    }
    hostnames.sort();
    hostnames.dedup();
    let created = r.pool.text(read::text_or_empty(meta, "creationTimestamp")?);
    let mut route = Route { parents, hostnames, created, rules: Vec::new(), broken: None };
    match first.map_or_else(|| rules(r, Owner { root: node, namespace: &id.namespace }, spec, kind), Err) {
        Ok(rules) => {
            let compile = Compile { kind, id, origin };
            route.rules = rules.into_iter().enumerate().map(|(i, rule)| compile.rule(i, rule)).collect();
        }
        Err(bad) => {
            r.report(node, &bad, Severity::Error);
            let problem = bad.problem(node, &r.place, &r.object, Severity::Error);
            route.broken = Some(format!("a route could not be understood: {problem}").into());
        }
    }
    Ok(route)
}

fn rules<'p>(r: &mut Reader<'_>, object: Owner<'_, 'p>, spec: &'p Node<'p>, kind: RouteKind) -> Read<'p, Vec<Written>> {
    read::only(object.root, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    if kind == RouteKind::Tcp {
        read::only(spec, &["parentRefs", "rules", "useDefaultGateways"])?;
    } else {
        read::only(spec, &["parentRefs", "hostnames", "rules", "useDefaultGateways"])?;
    }
    if let Some(n) = spec.get("useDefaultGateways")
        && read::scalar(n)? != "None"
    {
        return Err(Bad::value(n, "default gateways are not available here", "name the Gateways in parentRefs"));
    }
    let mut out = Vec::new();
    for rule in read::list(spec, "rules")? {
        out.push(match kind {
            RouteKind::Http => http_route::rule(r, object, rule)?,
            RouteKind::Grpc => grpc_route::rule(r, object, rule)?,
            RouteKind::Tcp | RouteKind::Tls => l4_route::rule(r, object, rule)?,
        });
    }
    if out.is_empty() {
        match kind {
            // The API server's default: one rule for everything, without backends.
            RouteKind::Http => out.push(http_route::default_rule()),
            RouteKind::Grpc => {}
            RouteKind::Tcp | RouteKind::Tls => return Err(Bad::missing(spec, "rules", "this route needs a rule")),
        }
    }
    Ok(out)
}

/// A rule's `name`.
pub(super) fn rule_name<'p>(r: &mut Reader<'_>, rule: &'p Node<'p>) -> Read<'p, Option<Arc<str>>> {
    Ok(read::text(rule, "name")?.filter(|t| !t.is_empty()).map(|t| r.pool.text(t)))
}

/// `backendRefs`, with filters where `place` allows any.
pub(super) fn backends<'p>(
    r: &mut Reader<'_>,
    object: Owner<'_, 'p>,
    rule: &'p Node<'p>,
    place: Option<Place>,
    prefixes_only: bool,
) -> Read<'p, Vec<WrittenBackend>> {
    let mut out = Vec::new();
    for b in read::list(rule, "backendRefs")? {
        let filters = if let Some(place) = place {
            read::only(b, &["group", "kind", "namespace", "name", "port", "weight", "filters"])?;
            filter::read(r, object, b, place, prefixes_only)?
        } else {
            read::only(b, &["group", "kind", "namespace", "name", "port", "weight"])?;
            Filters::default()
        };
        let weight = match read::number::<u32>(b, "weight")? {
            None => 1,
            Some(w) if w <= 1_000_000 => w,
            Some(w) => {
                return Err(Bad::value(b.get("weight").unwrap_or(b), format!("{w} is too large a weight"), "write 0 to 1000000"));
            }
        };
        out.push(WrittenBackend { to: reference::target(r, b, object.namespace)?, weight, filters });
    }
    Ok(out)
}

/// Header matches: exact or by regular expression; of several of one name the first counts.
pub(super) fn header_matches<'p>(
    r: &mut Reader<'_>,
    owner: &'p Node<'p>,
) -> Read<'p, Vec<(http::header::HeaderName, StringMatch)>> {
    let mut out: Vec<(http::header::HeaderName, StringMatch)> = Vec::new();
    for h in read::list(owner, "headers")? {
        let name = filter::named(h)?;
        let m = value_match(r, h)?;
        if out.iter().all(|(n, _)| *n != name) {
            out.push((name, m));
        }
    }
    Ok(out)
}
/// `{type, name, value}` of a header or query match.
pub(super) fn value_match<'p>(r: &mut Reader<'_>, m: &'p Node<'p>) -> Read<'p, StringMatch> {
    read::only(m, &["type", "name", "value"])?;
    let Some(value) = m.get("value") else { return Err(Bad::missing(m, "value", "a match has a value")) };
    typed(r, m.get("type"), value)
}
/// A value by its match type: `Exact` (the default) or `RegularExpression`.
pub(super) fn typed<'p>(r: &mut Reader<'_>, kind: Option<&'p Node<'p>>, value: &'p Node<'p>) -> Read<'p, StringMatch> {
    match kind.map(|n| read::scalar(n).map(|t| (n, t))).transpose()? {
        None | Some((_, "Exact")) => Ok(StringMatch::Exact(r.pool.text(read::scalar(value)?))),
        Some((_, "RegularExpression")) => Ok(StringMatch::Regex(pattern(value)?)),
        Some((n, t)) => Err(Bad::value(n, format!("`{t}` is not a type of match"), "write Exact or RegularExpression")),
    }
}
/// A regular expression.
pub(super) fn pattern<'p>(n: &'p Node<'p>) -> Read<'p, Pattern> {
    Pattern::parse(read::scalar(n)?).map_err(|e| Bad::value(n, e.to_string(), "correct the expression"))
}

/// A duration as the Gateway API writes it (GEP-2257): one to four of `<number><h|m|s|ms>`, such as `1m30s`.
pub(super) fn duration<'p>(n: &'p Node<'p>) -> Read<'p, Duration> {
    let t = read::scalar(n)?;
    let bad = || Bad::value(n, format!("`{t}` is not a duration"), "write for example `10s`, `500ms` or `1m30s`");
    let (mut rest, mut parts, mut total) = (t, 0, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at_checked(digits).ok_or_else(bad)?;
        let number: u64 = Some(number).filter(|n| n.len() <= 5).and_then(|n| n.parse().ok()).ok_or_else(bad)?;
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at_checked(letters).ok_or_else(bad)?;
        let unit = match unit {
            "h" => 3_600_000,
            "m" => 60_000,
            "s" => 1000,
            "ms" => 1,
            _ => return Err(bad()),
        };
        total += Duration::from_millis(number * unit);
        rest = tail;
        parts += 1;
    }
    if (1..=4).contains(&parts) { Ok(total) } else { Err(bad()) }
}
