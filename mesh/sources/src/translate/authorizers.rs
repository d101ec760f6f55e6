//! External authorizers: `extensionProviders` of MeshConfig (ConfigMap `istio` of the root namespace, entry `mesh`).
//!
//! The rest of MeshConfig is read in [`super::telemetry`]. An authorizer that is malformed is a value that
//! says so: policies that name it refuse. Upstream: [`super::telemetry`]. Downstream: `mesh_model::l7::authorizer`.

use std::sync::Arc;
use std::time::Duration;

use http::header::{HeaderName, HeaderValue};
use mesh_model::l7::authorizer::{Authorizer, Authorizers, BodyLimit, HttpCheck, Protocol};
use mesh_model::policy::TextMatch;

use super::object::Reader;
use super::read::{self, Bad, Read};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// Istio's default.
const TIMEOUT: Duration = Duration::from_mins(10);
/// Fields of both kinds.
const GRPC: &[&str] =
    &["service", "port", "timeout", "failOpen", "statusOnError", "includeRequestBodyInCheck", "clearRouteCache"];
const HTTP: &[&str] = &[
    "pathPrefix",
    "includeHeadersInCheck",
    "includeRequestHeadersInCheck",
    "includeAdditionalHeadersInCheck",
    "headersToUpstreamOnAllow",
    "headersToDownstreamOnDeny",
    "headersToDownstreamOnAllow",
];

/// Reads them. What is wrong is reported here.
pub(super) fn read(r: &mut Reader<'_>, mesh: &Node<'_>) -> Authorizers {
    let mut out = Authorizers::new();
    let refuse = |r: &mut Reader<'_>, bad: &Bad<'_>| {
        r.report(mesh, bad, Severity::Error);
        bad.why(mesh).into()
    };
    let providers = match read::list(mesh, "extensionProviders") {
        Ok(providers) => providers,
        Err(bad) => {
            let _: Arc<str> = refuse(r, &bad);
            return out;
        }
    };
    for p in providers {
        let Some(name) = p.get("name").and_then(Node::text).filter(|n| !n.is_empty()) else { continue };
        let read = match (p.get("envoyExtAuthzHttp"), p.get("envoyExtAuthzGrpc")) {
            (Some(n), None) => http(n).map(Arc::new),
            (None, Some(n)) => grpc(n).map(Arc::new),
            // Other providers are for telemetry.
            (None, None) => continue,
            (Some(n), Some(_)) => Err(Bad::value(n, "a provider is one thing", "keep one of the two")),
        };
        let read = match read {
            _ if out.contains_key(name) => {
                Err(refuse(r, &Bad::value(p, format!("there are two providers `{name}`"), "keep one of them")))
            }
            Ok(authorizer) => Ok(authorizer),
            Err(bad) => Err(refuse(r, &bad)),
        };
        out.insert(name.into(), read);
    }
    out
}

fn http<'p>(n: &'p Node<'p>) -> Read<'p, Authorizer> {
    let known: Vec<&str> = GRPC.iter().chain(HTTP).copied().collect();
    read::only(n, &known)?;
    let mut asked_with = patterns(n, "includeRequestHeadersInCheck")?;
    asked_with.extend(patterns(n, "includeHeadersInCheck")?);
    let refused = patterns(n, "headersToDownstreamOnDeny")?;
    let check = HttpCheck {
        path_prefix: read::text_or_empty(n, "pathPrefix")?.trim_end_matches('/').into(),
        asked_with,
        always: always(n)?,
        to_upstream: patterns(n, "headersToUpstreamOnAllow")?,
        to_client: patterns(n, "headersToDownstreamOnAllow")?,
        to_refused: (!refused.is_empty()).then_some(refused),
    };
    authorizer(n, Protocol::Http(check))
}
fn grpc<'p>(n: &'p Node<'p>) -> Read<'p, Authorizer> {
    read::only(n, GRPC)?;
    authorizer(n, Protocol::Grpc)
}

fn authorizer<'p>(n: &'p Node<'p>, speaks: Protocol) -> Read<'p, Authorizer> {
    let service = read::text(n, "service")?.filter(|s| !s.is_empty());
    let service = service.ok_or_else(|| Bad::missing(n, "service", "an authorizer has a service"))?;
    let (namespace, host) = match service.split_once('/') {
        Some((ns, host)) => (Some(ns.into()), host),
        None => (None, service),
    };
    let status = read::text(n, "statusOnError")?.filter(|s| !s.is_empty());
    let status = status.map(|s| s.parse().ok().filter(|s| (200..600).contains(s)));
    let status = match status {
        None => 403,
        Some(Some(status)) => status,
        Some(None) => {
            let at = n.get("statusOnError").unwrap_or(n);
            return Err(Bad::value(at, "not an HTTP status", "write a number from 200 to 599"));
        }
    };
    let timeout = read::duration(n, "timeout")?.filter(|t| !t.is_zero()).unwrap_or(TIMEOUT);
    Ok(Authorizer {
        namespace,
        host: host.into(),
        port: read::port_at(n, "port")?,
        timeout,
        fail_open: read::flag(n, "failOpen")?,
        status_on_error: status,
        body: body(n)?,
        clear_route_cache: read::flag(n, "clearRouteCache")?,
        speaks,
    })
}

/// Names of headers, with `*` at one end.
fn patterns<'p>(n: &'p Node<'p>, key: &str) -> Read<'p, Vec<TextMatch>> {
    let one = |at: &'p Node<'p>| match TextMatch::parse(&read::scalar(at)?.to_ascii_lowercase()) {
        None => Err(Bad::value(at, "an empty name names no header", "remove it")),
        Some(TextMatch::Exact(t) | TextMatch::Prefix(t) | TextMatch::Suffix(t)) if t.contains('*') => {
            Err(Bad::value(at, "a `*` may only stand at one end", "write `x*`, `*x` or `*`"))
        }
        Some(m) => Ok(m),
    };
    read::list(n, key)?.iter().map(one).collect()
}
fn always<'p>(n: &'p Node<'p>) -> Read<'p, Vec<(HeaderName, HeaderValue)>> {
    let Some(map) = read::map(n, "includeAdditionalHeadersInCheck")? else { return Ok(Vec::new()) };
    let mut out = Vec::new();
    for e in read::entries(map)? {
        let name = HeaderName::try_from(&*e.key).map_err(|_| Bad::value(&e.node, "not the name of a header", "correct it"))?;
        let value = HeaderValue::try_from(read::scalar(&e.node)?);
        out.push((name, value.map_err(|_| Bad::value(&e.node, "not the value of a header", "correct it"))?));
    }
    Ok(out)
}
fn body<'p>(n: &'p Node<'p>) -> Read<'p, Option<BodyLimit>> {
    let Some(body) = read::map(n, "includeRequestBodyInCheck")? else { return Ok(None) };
    read::only(body, &["maxRequestBytes", "allowPartialMessage", "packAsBytes"])?;
    let most = read::number(body, "maxRequestBytes")?.filter(|n| *n > 0);
    let most = most.ok_or_else(|| Bad::missing(body, "maxRequestBytes", "how much of the body is shown has a limit"))?;
    Ok(Some(BodyLimit { most, partial: read::flag(body, "allowPartialMessage")?, as_bytes: read::flag(body, "packAsBytes")? }))
}
