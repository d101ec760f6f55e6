//! Which route a request takes, by which conditions, and what the rules before it lacked.
//!
//! Upstream: `snapshot`, [`crate::l7::select`] and [`crate::l7::weights`], whose choices these are. Downstream:
//! [`crate::explain`].
use super::conditions::closest;
use super::report::{Destination, PassedOver, Place, Route};
use crate::l7::route::{
    Backend, BackendRef, ClusterKey, Forward, GrpcMatch, HttpAction, HttpMatch, HttpRoute, HttpRule, PathMatch, RequestFacts,
    RouteTable, TcpRoute,
};
use crate::l7::rules::Rules;
use crate::l7::select::matches;
use crate::l7::text::StringMatch;
use crate::lb::Endpoint;
use crate::snapshot::Snapshot;

/// Rules that are shown of those that were passed over.
const PASSED_OVER: usize = 4;

/// An HTTP route that was chosen.
pub(super) fn http(snap: &Snapshot, route: &HttpRoute, chosen: Option<(&Rules, &HttpRule)>, req: &RequestFacts<'_>) -> Route {
    let number = chosen.and_then(|(rules, rule)| rules.iter().position(|r| std::ptr::eq(r, rule)));
    let rule = chosen.map(|(_, rule)| rule);
    let (action, destinations) = match &route.action {
        HttpAction::Forward(forward) => (forwarded(snap, forward), destinations(snap, &forward.backends, forward.total_weight)),
        HttpAction::Redirect(r) => (format!("answered with a redirect, {}", r.status), Vec::new()),
        HttpAction::Respond(r) => (format!("answered with {}", r.status), Vec::new()),
    };
    Route {
        name: route.name.to_string(),
        rule: number,
        place: route.origin.as_deref().map(Place::of),
        conditions: rule.map(|r| parts(&r.matches).into_iter().map(|(_, words)| words).collect()).unwrap_or_default(),
        action,
        destinations,
        passed_over: chosen.zip(number).map(|((rules, _), n)| passed_over(rules.iter().take(n), req)).unwrap_or_default(),
    }
}
/// A route of a connection carried as bytes.
pub(super) fn bytes(snap: &Snapshot, route: &TcpRoute, table: Option<&RouteTable>) -> Route {
    Route {
        name: route.name.to_string(),
        rule: None,
        place: table.and_then(|t| t.origins.first()).map(|o| Place::of(o)),
        conditions: Vec::new(),
        action: "carried as bytes".into(),
        destinations: destinations(snap, &route.backends, route.total_weight),
        passed_over: Vec::new(),
    }
}

/// Rules that did not match, those that came closest, in their order.
pub(super) fn passed_over<'r>(rules: impl Iterator<Item = &'r HttpRule>, req: &RequestFacts<'_>) -> Vec<PassedOver> {
    let failed = |r: &HttpRule| -> Vec<String> {
        parts(&r.matches).into_iter().filter(|(part, _)| !matches(part, req)).map(|(_, words)| words).collect()
    };
    let mut near: Vec<(usize, Vec<String>, &HttpRule)> = rules.enumerate().map(|(at, r)| (at, failed(r), r)).collect();
    near.sort_by_key(|(_, failed, _)| failed.len());
    near.truncate(PASSED_OVER);
    near.sort_by_key(|(at, ..)| *at);
    let told = |(rule, failed, r): (usize, Vec<String>, &HttpRule)| PassedOver {
        rule,
        name: r.route.name.to_string(),
        failed,
        place: r.route.origin.as_deref().map(Place::of),
    };
    near.into_iter().map(told).collect()
}

fn forwarded(snap: &Snapshot, forward: &Forward) -> String {
    let mut all = vec!["forwarded".to_owned()];
    all.extend(forward.timeout.map(|t| format!("timeout {t:?}")));
    all.push(match forward.retries(&snap.defaults().retry).attempts {
        0 => "never tried again".into(),
        n => format!("up to {n} retries"),
    });
    all.extend(forward.rewrite.is_some().then(|| "rewritten".into()));
    all.extend((!forward.mirrors.is_empty()).then(|| "copied".into()));
    all.join(", ")
}

fn destinations(snap: &Snapshot, backends: &[Backend], total: u64) -> Vec<Destination> {
    backends.iter().map(|b| destination(snap, b, share(backends, b, total))).collect()
}
/// The share of a backend in hundredths of a percent, as `weights::choose` draws it: all for the only one.
pub(super) fn share(backends: &[Backend], backend: &Backend, total: u64) -> u64 {
    match (backends, total) {
        (_, 0) => 0,
        ([_], _) => 10_000,
        _ => u64::from(backend.weight) * 10_000 / total,
    }
}
fn destination(snap: &Snapshot, backend: &Backend, share: u64) -> Destination {
    let percent = format!("{}.{:02}", share / 100, share % 100);
    let percent = percent.trim_end_matches('0').trim_end_matches('.').to_owned();
    let (to, subset, endpoints, policies) = match &backend.to {
        BackendRef::Invalid { status, why } => (format!("nothing, answered {status}: {why}"), None, Vec::new(), Vec::new()),
        BackendRef::Service(key) => {
            let names = endpoints(snap, key).map(|e| format!("{}/{}", e.workload().namespace, e.workload().name)).collect();
            let origins = snap.find_destination(&key.service).map(|d| d.origins.iter().map(|o| Place::of(o)).collect());
            let to = format!("{}:{}", key.service.hostname, key.port);
            (to, key.subset.as_ref().map(ToString::to_string), names, origins.unwrap_or_default())
        }
    };
    Destination { to, subset, weight: backend.weight, percent, endpoints, policies }
}
/// The endpoints a cluster may choose: open on the port, on this network, of the subset. (Its balancing then chooses.)
pub(super) fn endpoints<'s>(snap: &'s Snapshot, key: &'s ClusterKey) -> impl Iterator<Item = &'s Endpoint> {
    let destination = snap.find_destination(&key.service);
    let labels = key.subset.as_ref().map(|name| destination.and_then(|d| d.subsets.get(name)).map(|s| &s.labels));
    let of_subset = move |e: &Endpoint| match labels {
        None => true,
        // A subset nobody declared has no endpoints.
        Some(labels) => labels.is_some_and(|l| l.select(&e.workload().labels)),
    };
    let all = snap.endpoint_set(&key.service).into_iter().flat_map(|set| set.open_on(key.port));
    all.map(|(_, e)| e).filter(move |e| e.workload().network == snap.view().network && of_subset(e))
}

/// The parts of a match, each a match of its own with its words.
fn parts(m: &HttpMatch) -> Vec<(HttpMatch, String)> {
    let mut out = Vec::new();
    let none = HttpMatch::default;
    if let Some(port) = m.port {
        out.push((HttpMatch { port: m.port, ..none() }, format!("port {port}")));
    }
    if let Some(x) = &m.method {
        out.push((HttpMatch { method: m.method.clone(), ..none() }, format!("method {}", string_match(x))));
    }
    if let Some(p) = &m.path {
        let words = format!("path {}{}", path(p), if m.ignore_case { " in any case" } else { "" });
        out.push((HttpMatch { path: m.path.clone(), ignore_case: m.ignore_case, ..none() }, words));
    }
    if let Some(x) = &m.scheme {
        out.push((HttpMatch { scheme: m.scheme.clone(), ..none() }, format!("scheme {}", string_match(x))));
    }
    if let Some(x) = &m.authority {
        out.push((HttpMatch { authority: m.authority.clone(), ..none() }, format!("authority {}", string_match(x))));
    }
    if let Some(g) = &m.grpc {
        out.push((HttpMatch { grpc: m.grpc.clone(), ..none() }, grpc(g)));
    }
    for (name, x) in &m.headers {
        let part = HttpMatch { headers: vec![(name.clone(), x.clone())], ..none() };
        out.push((part, format!("header {name} {}", string_match(x))));
    }
    for (name, x) in &m.without_headers {
        let part = HttpMatch { without_headers: vec![(name.clone(), x.clone())], ..none() };
        out.push((part, format!("no header {name} {}", string_match(x))));
    }
    for (name, x) in &m.query {
        let part = HttpMatch { query: vec![(name.clone(), x.clone())], ..none() };
        out.push((part, format!("query parameter {name} {}", string_match(x))));
    }
    for (path, x) in &m.claims {
        let part = HttpMatch { claims: vec![(path.clone(), x.clone())], ..none() };
        out.push((part, format!("claim {} {}", path.join("."), string_match(x))));
    }
    for (path, x) in &m.without_claims {
        let part = HttpMatch { without_claims: vec![(path.clone(), x.clone())], ..none() };
        out.push((part, format!("no claim {} {}", path.join("."), string_match(x))));
    }
    out
}
/// A text match in words.
pub(super) fn string_match(m: &StringMatch) -> String {
    match m {
        StringMatch::Exact(x) => x.to_string(),
        StringMatch::Prefix(x) => format!("{x}*"),
        StringMatch::Suffix(x) => format!("*{x}"),
        StringMatch::Regex(p) => format!("/{}/", p.source()),
        StringMatch::Present => "(any value)".into(),
    }
}
fn path(p: &PathMatch) -> String {
    match p {
        PathMatch::Exact(x) => x.to_string(),
        PathMatch::TextPrefix(x) => format!("{x}*"),
        PathMatch::SegmentPrefix(x) => format!("{x} and below"),
        PathMatch::Regex(p) => format!("/{}/", p.source()),
    }
}
fn grpc(g: &GrpcMatch) -> String {
    let of = |x: &Option<StringMatch>| x.as_ref().map_or_else(|| "any".into(), string_match);
    format!("gRPC service {}, method {}", of(&g.service), of(&g.method))
}

/// What the rule that comes closest lacks, for a request that no rule takes.
pub(super) fn why_none(rules: &Rules, req: &RequestFacts<'_>) -> Vec<String> {
    let near = passed_over(rules.iter(), req);
    closest(near.into_iter().map(|p| p.failed)).map(|(_, failed)| failed).unwrap_or_default()
}
