//! Rules of an HTTPRoute.

use std::sync::Arc;
use std::time::Duration;

use mesh_model::l7::route::{HttpMatch, PathMatch, RetryOn, RetryPolicy};
use mesh_model::l7::text::StringMatch;

use super::super::object::Reader;
use super::super::read::{self, Bad, Read};
use super::filter::{self, Filters, Place};
use super::reference::Owner;
use super::route::{self, PathKind, Rank, Written};
use super::session;
use crate::yaml::Node;

/// Reads one rule of an object.
pub(super) fn rule<'p>(r: &mut Reader<'_>, object: Owner<'_, 'p>, rule: &'p Node<'p>) -> Read<'p, Written> {
    read::only(rule, &["name", "matches", "filters", "backendRefs", "timeouts", "retry", "sessionPersistence"])?;
    let mut matches = Vec::new();
    for m in read::list(rule, "matches")? {
        matches.push(one_match(r, m)?);
    }
    if matches.is_empty() {
        matches.push(everything());
    }
    let prefixes_only = matches.iter().all(|(_, m)| matches!(m.path, Some(PathMatch::SegmentPrefix(_))));
    let filters = filter::read(r, object, rule, Place::HttpRule, prefixes_only)?;
    let backends = route::backends(r, object, rule, Some(Place::HttpBackend), prefixes_only)?;
    if let Some(at) = rule.get("backendRefs")
        && filters.redirect.is_some()
        && !backends.is_empty()
    {
        return Err(Bad::value(at, "a rule that redirects has no backends", "remove the backendRefs or the filter"));
    }
    let (timeout, retry) = limits(rule)?;
    let session = session::read(r, object.root, rule, &session::common_path(matches.iter().map(|(_, m)| m.path.as_ref())))?;
    Ok(Written { name: route::rule_name(r, rule)?, matches, filters, backends, timeout, retry, session })
}

fn everything() -> (Rank, Arc<HttpMatch>) {
    let path = Some(PathMatch::SegmentPrefix("/".into()));
    (Rank::new(PathKind::Prefix, 1, true, 0, 0), HttpMatch { path, ..HttpMatch::default() }.into())
}
/// The rule of a route that has none.
pub(super) fn default_rule() -> Written {
    let (matches, backends) = (vec![everything()], Vec::new());
    Written { name: None, matches, filters: Filters::default(), backends, timeout: None, retry: None, session: None }
}

const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

fn one_match<'p>(r: &mut Reader<'_>, m: &'p Node<'p>) -> Read<'p, (Rank, Arc<HttpMatch>)> {
    read::only(m, &["path", "headers", "queryParams", "method"])?;
    let (kind, length, path) = match read::map(m, "path")? {
        None => (PathKind::Prefix, 1, PathMatch::SegmentPrefix("/".into())),
        Some(p) => path(r, p)?,
    };
    let method = match m.get("method") {
        None => None,
        Some(n) => match read::scalar(n)? {
            t if METHODS.contains(&t) => Some(StringMatch::Exact(r.pool.text(t))),
            t => return Err(Bad::value(n, format!("`{t}` is not a method"), "write an HTTP method in capitals")),
        },
    };
    let headers = route::header_matches(r, m)?;
    let mut query: Vec<(Arc<str>, StringMatch)> = Vec::new();
    for q in read::list(m, "queryParams")? {
        let name = super::reference::name(q, "a query parameter has a name")?;
        let value = route::value_match(r, q)?;
        if query.iter().all(|(n, _)| **n != *name) {
            query.push((r.pool.text(name), value));
        }
    }
    let rank = Rank::new(kind, length, method.is_none(), headers.len(), query.len());
    Ok((rank, Arc::new(HttpMatch { path: Some(path), method, headers, query, ..HttpMatch::default() })))
}

/// A path match, its kind and the length that counts for the order.
fn path<'p>(r: &mut Reader<'_>, p: &'p Node<'p>) -> Read<'p, (PathKind, usize, PathMatch)> {
    read::only(p, &["type", "value"])?;
    let text = read::text(p, "value")?.unwrap_or("/");
    let at = p.get("value").unwrap_or(p);
    let kind = p.get("type").map(read::scalar).transpose()?.unwrap_or("PathPrefix");
    if kind == "RegularExpression" {
        let pattern = match p.get("value") {
            Some(n) => route::pattern(n)?,
            None => return Err(Bad::missing(p, "value", "a regular expression is needed")),
        };
        return Ok((PathKind::Regex, text.len(), PathMatch::Regex(pattern)));
    }
    if !matches!(kind, "Exact" | "PathPrefix") {
        let n = p.get("type").unwrap_or(p);
        return Err(Bad::value(
            n,
            format!("`{kind}` is not a type of path match"),
            "write Exact, PathPrefix or RegularExpression",
        ));
    }
    // What the API server refuses: paths that no normalised request has.
    let lower = text.to_ascii_lowercase();
    let wrong = !text.starts_with('/')
        || ["//", "/./", "/../", "%2f", "#", "?"].iter().any(|x| lower.contains(x))
        || text.ends_with("/.")
        || text.ends_with("/..")
        || !text.bytes().all(|b| b.is_ascii_graphic());
    if wrong {
        return Err(Bad::value(
            at,
            format!("`{text}` is not a path a request can have"),
            "write an absolute path such as `/api/v1`",
        ));
    }
    Ok(if kind == "Exact" {
        (PathKind::Exact, text.len(), PathMatch::Exact(r.pool.text(text)))
    } else {
        let text = text.strip_suffix('/').filter(|t| !t.is_empty()).unwrap_or(text);
        (PathKind::Prefix, text.len(), PathMatch::SegmentPrefix(r.pool.text(text)))
    })
}

/// Timeout of the request and its retries. Without retries the limit of one attempt is the limit of the request.
fn limits<'p>(rule: &'p Node<'p>) -> Read<'p, (Option<Duration>, Option<Arc<RetryPolicy>>)> {
    let set = |d: Duration| (d > Duration::ZERO).then_some(d);
    let (mut total, mut attempt) = (None, None);
    if let Some(t) = read::map(rule, "timeouts")? {
        read::only(t, &["request", "backendRequest"])?;
        total = t.get("request").map(route::duration).transpose()?.and_then(set);
        attempt = t.get("backendRequest").map(route::duration).transpose()?.and_then(set);
        if let (Some(all), Some(one), Some(at)) = (total, attempt, t.get("backendRequest"))
            && one > all
        {
            return Err(Bad::value(at, "backendRequest is longer than request", "make it at most as long"));
        }
    }
    let Some(retry) = read::map(rule, "retry")? else {
        return Ok((attempt.or(total), None));
    };
    read::only(retry, &["codes", "attempts", "backoff"])?;
    let mut policy = RetryPolicy { per_try: attempt, ..RetryPolicy::istio_default() };
    policy.on = RetryOn::CONNECT_FAILURE.with(RetryOn::REFUSED_STREAM).with(RetryOn::UNAVAILABLE).with(RetryOn::CANCELLED);
    for n in read::list(retry, "codes")? {
        let text = read::scalar(n)?;
        match text.parse::<u16>() {
            Ok(code) if (400..=599).contains(&code) => {
                if !policy.statuses.contains(&code) {
                    policy.statuses.push(code);
                }
            }
            _ => {
                let message = format!("`{text}` is not a status that can be retried (400 to 599)");
                return Err(Bad::value(n, message, "write a number from 400 to 599"));
            }
        }
    }
    if !policy.statuses.is_empty() {
        policy.on = policy.on.with(RetryOn::STATUS_CODES);
    }
    if let Some(attempts) = read::number::<u32>(retry, "attempts")? {
        policy.attempts = attempts;
    }
    if let Some(n) = retry.get("backoff") {
        let base = route::duration(n)?;
        if base.is_zero() {
            return Err(Bad::value(n, "a backoff of nothing", "write at least `1ms`, or leave it out"));
        }
        (policy.base_backoff, policy.max_backoff) = (base, base.saturating_mul(10));
    }
    Ok((total, Some(Arc::new(policy))))
}
