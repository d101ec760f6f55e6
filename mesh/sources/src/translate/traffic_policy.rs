//! TrafficPolicy (`culvert.dev/v1alpha1`): what is done with every request and answer of a service or gateway beside routing.
//!
//! An object of ours for what the reference mesh wrote EnvoyFilters for: rate limits, headers of answers, caching, CORS,
//! compression, largest body. Strict: what is not understood refuses the object, and its targets refuse their requests until
//! it is corrected, unless it had been read before. Upstream: [`super::object`]. Downstream: [`super::traffic`].

use std::sync::Arc;

use http::{HeaderValue, Method, StatusCode};
use mesh_model::l7::compression::{Coding, Compression};
use mesh_model::l7::limit::{Counts, KeyPart, Limit, Point, Rate, Which};
use mesh_model::l7::treatment::{CacheRule, Treatment};

use super::authorization::{OBJECT, OBJECT_META, target};
use super::http_text::{edits, name, value};
use super::object::{ObjectId, Reader};
use super::read::{self, Bad, Read};
use super::request_policy::paths;
use super::targets::{Targets, WrittenTarget};
use super::virtual_service::cors;
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// What an object says about its targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficPolicy {
    /// What it is bound to.
    pub targets: Targets,
    /// What is done there.
    pub treatment: Treatment,
}

/// Fields of `spec`.
const SPEC: &[&str] = &["targetRefs", "rateLimits", "responseHeaders", "cacheControl", "cors", "compression", "buffer"];
/// Media types of one list, codings, limits: enough for anybody, and each costs a comparison per answer.
const MOST: usize = 100;

/// Reads a TrafficPolicy; one that cannot be used comes as a stand-in that refuses.
pub(super) fn read(r: &mut Reader<'_>, node: &Node<'_>, id: &ObjectId) -> TrafficPolicy {
    read_as(r, node, id, content)
}
/// Reads what `content` says about the targets of an object, or that it cannot be used there.
pub(super) fn read_as<'p>(
    r: &mut Reader<'_>,
    node: &'p Node<'p>,
    id: &ObjectId,
    content: impl FnOnce(&mut Reader<'_>, &'p Node<'p>, &ObjectId) -> Read<'p, Treatment>,
) -> TrafficPolicy {
    let targets = targets(node, &id.namespace);
    let mut bad = match targets.clone().and_then(|targets| Ok((targets, content(r, node, id)?))) {
        Ok((targets, treatment)) => return TrafficPolicy { targets: Targets::Named(targets), treatment },
        Err(bad) => bad,
    };
    let why = bad.why(node);
    bad.message
        .push_str("; until it is corrected, what it said before stays in force, or else its targets refuse their requests");
    r.report(node, &bad, Severity::Error);
    let everywhere = id.namespace == r.root_namespace;
    TrafficPolicy {
        targets: targets.map_or(Targets::Unknown { everywhere }, Targets::Named),
        treatment: Treatment { broken: Some(format!("{id} cannot be used: {why}").into()), ..Treatment::default() },
    }
}

/// `spec.targetRefs`; at least one.
pub(super) fn targets<'p>(node: &'p Node<'p>, namespace: &str) -> Read<'p, Vec<WrittenTarget>> {
    let Some(spec) = read::map(node, "spec")? else { return Err(Bad::missing(node, "spec", "it says what is done, and where")) };
    let refs = read::list(spec, "targetRefs")?;
    if refs.is_empty() {
        return Err(Bad::missing(spec, "targetRefs", "it is bound to Services, ServiceEntries or Gateways by `targetRefs`"));
    }
    refs.iter().enumerate().map(|(i, n)| target(n, namespace, format!("spec.targetRefs[{i}]").into())).collect()
}

fn content<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, Treatment> {
    read::only(node, OBJECT)?;
    read::only(node.get("metadata").unwrap_or(node), OBJECT_META)?;
    let spec = node.get("spec").unwrap_or(node);
    read::only(spec, SPEC)?;
    let mut out = Treatment::default();
    for n in bounded(spec, "rateLimits")? {
        let limit = limit(r, n, id)?;
        if out.limits.iter().any(|have| have.counts.name == limit.counts.name) {
            let at = n.get("name").unwrap_or(n);
            return Err(Bad::value(at, format!("there are two limits `{}`", limit.counts.name), "give each its own name"));
        }
        out.limits.push(Arc::new(limit));
    }
    if let Some(n) = read::map(spec, "responseHeaders")? {
        out.response.push(edits(r, node, n, false)?);
    }
    for n in bounded(spec, "cacheControl")? {
        out.cache.push(cache_rule(n)?);
    }
    out.cors = read::map(spec, "cors")?.map(cors).transpose()?.map(Arc::new);
    out.compression = read::map(spec, "compression")?.map(compression).transpose()?.map(Arc::new);
    if let Some(n) = read::map(spec, "buffer")? {
        read::only(n, &["maxRequestBytes"])?;
        out.max_request_bytes = Some(match read::number::<u32>(n, "maxRequestBytes")? {
            None | Some(0) => return Err(Bad::missing(n, "maxRequestBytes", "a buffer has a size, in bytes")),
            Some(bytes) => bytes.into(),
        });
    }
    if out == Treatment::default() {
        let message = "it names targets and says nothing about them";
        r.report(node, &Bad { code: "no-effect", ..Bad::value(spec, message, "add a section, or remove it") }, Severity::Warning);
    }
    Ok(out)
}
fn bounded<'p>(n: &'p Node<'p>, key: &str) -> Read<'p, &'p [Node<'p>]> {
    let list = read::list(n, key)?;
    match list.get(MOST) {
        Some(at) => Err(Bad::value(at, format!("more than {MOST} elements"), "use fewer")),
        None => Ok(list),
    }
}

fn limit<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, id: &ObjectId) -> Read<'p, Limit> {
    read::only(n, &["name", "match", "key", "tokenBucket", "phase", "rateLimitHeaders", "response"])?;
    let limit_name = match read::text_or_empty(n, "name")? {
        "" => return Err(Bad::missing(n, "name", "a limit has a name: its buckets are known by it")),
        text => r.pool.text(text),
    };
    let which = read::map(n, "match")?.map(which).transpose()?.unwrap_or_default();
    let key = bounded(n, "key")?.iter().map(key_part).collect::<Read<'p, Vec<_>>>()?;
    let Some(bucket) = read::map(n, "tokenBucket")? else {
        return Err(Bad::missing(n, "tokenBucket", "a limit has a bucket"));
    };
    read::only(bucket, &["maxTokens", "tokensPerFill", "fillInterval"])?;
    let rate = token_bucket(bucket, ["maxTokens", "tokensPerFill", "fillInterval"].map(|key| (key, bucket.get(key))))?;
    let claim = key.iter().position(|k| matches!(k, KeyPart::Claim(_))).and_then(|at| read::list(n, "key").ok()?.get(at));
    let by_address = key.iter().any(|k| matches!(k, KeyPart::SourceIp { .. }));
    let point = match read::text(n, "phase")? {
        Some("BeforeAuthentication") => {
            if let Some(at) = claim {
                let message = "claims are not known before authentication";
                return Err(Bad::value(at, message, "leave `phase` out, or write AfterAuthorization"));
            }
            Point::BeforeAuthentication
        }
        Some("AfterAuthorization") => Point::AfterAuthorization,
        Some(t) => {
            let at = n.get("phase").unwrap_or(n);
            return Err(Bad::value(at, format!("`{t}` is no phase"), "write BeforeAuthentication or AfterAuthorization"));
        }
        // Who has no right to call uses up a bucket of its own address only.
        None if by_address && claim.is_none() => Point::BeforeAuthentication,
        None => Point::AfterAuthorization,
    };
    let tells = n.get("rateLimitHeaders").is_none() || read::flag(n, "rateLimitHeaders")?;
    let (mut status, mut headers) = (StatusCode::TOO_MANY_REQUESTS, Vec::new());
    if let Some(answer) = read::map(n, "response")? {
        read::only(answer, &["status", "headers"])?;
        if let Some(at) = answer.get("status") {
            status = refusal_status(at)?;
        }
        if let Some(map) = read::map(answer, "headers")? {
            for e in read::entries(map)? {
                headers.push((name(&e.node, &e.key)?, header_value(&e.node)?));
            }
        }
    }
    let counts = Counts { policy: id.to_string().into(), name: limit_name, which, key, rate };
    Ok(Limit::new(counts, point, tells, status, headers))
}
/// A status that refuses.
pub(super) fn refusal_status<'p>(at: &'p Node<'p>) -> Read<'p, StatusCode> {
    let code = read::scalar(at)?.parse::<u16>().ok().filter(|c| (400..600).contains(c));
    code.and_then(|c| StatusCode::from_u16(c).ok()).ok_or_else(|| Bad::value(at, "a refusal has a status from 400 to 599", ""))
}
pub(super) fn header_value<'p>(n: &'p Node<'p>) -> Read<'p, HeaderValue> {
    HeaderValue::from_str(&value(n)?).map_err(|_| Bad::value(n, "not a header value: it has control characters", ""))
}

fn which<'p>(n: &'p Node<'p>) -> Read<'p, Which> {
    read::only(n, &["methods", "paths", "headers"])?;
    let mut out = Which::default();
    for m in bounded(n, "methods")? {
        let method = Method::from_bytes(read::scalar(m)?.as_bytes());
        out.methods.push(method.map_err(|_| Bad::value(m, "not a method", "write for example GET"))?);
    }
    if let Some(n) = n.get("paths") {
        out.paths = paths(n)?;
    }
    if let Some(map) = read::map(n, "headers")? {
        for e in read::entries(map)? {
            out.headers.push((name(&e.node, &e.key)?, read::scalar(&e.node)?.into()));
        }
    }
    Ok(out)
}

fn key_part<'p>(n: &'p Node<'p>) -> Read<'p, KeyPart> {
    read::only(n, &["sourceIP", "header", "path", "authority", "claim"])?;
    let [e] = read::entries(n)? else {
        return Err(Bad::value(n, "each element of `key` has one field", "write for example `- sourceIP: {}`"));
    };
    let empty = |part| match read::entries(&e.node)? {
        [] => Ok(part),
        [inner, ..] => Err(Bad::value(&inner.node, format!("`{}` has no fields", e.key), "write `{}`")),
    };
    match &*e.key {
        "sourceIP" => {
            read::only(&e.node, &["ipv4Prefix", "ipv6Prefix"])?;
            Ok(KeyPart::SourceIp { v4: bits(&e.node, "ipv4Prefix", 32, 32)?, v6: bits(&e.node, "ipv6Prefix", 64, 128)? })
        }
        "header" => Ok(KeyPart::Header(name(&e.node, read::scalar(&e.node)?)?)),
        "claim" => Ok(KeyPart::Claim(read::claim_path(&e.node)?.into_iter().map(Into::into).collect())),
        "path" => empty(KeyPart::Path),
        _ => empty(KeyPart::Authority),
    }
}
/// The length of a prefix below `key`.
pub(super) fn bits<'p>(n: &'p Node<'p>, key: &str, default: u8, most: u8) -> Read<'p, u8> {
    match read::number::<u8>(n, key)? {
        None => Ok(default),
        Some(bits) if bits <= most => Ok(bits),
        Some(_) => Err(Bad::value(n.get(key).unwrap_or(n), format!("a prefix has at most {most} bits"), "")),
    }
}
/// A token bucket: the fields for its size, what it gains, and how often.
pub(super) fn token_bucket<'p>(n: &'p Node<'p>, fields: [(&'static str, Option<&'p Node<'p>>); 3]) -> Read<'p, Rate> {
    let [(most, size), (_, per_fill), (interval, every)] = fields;
    let Some(size) = size else { return Err(Bad::missing(n, most, "a bucket has a size")) };
    let Some(every) = every else { return Err(Bad::missing(n, interval, "a bucket is filled every so often")) };
    let number = |n: &'p Node<'p>| {
        let number = read::scalar(n)?.parse::<u32>();
        number.map_err(|_| Bad::value(n, "expected a whole number", ""))
    };
    let interval = read::parse_duration(read::scalar(every)?)
        .ok_or_else(|| Bad::value(every, "expected a duration", "write for example `60s`"))?;
    // One is Envoy's default.
    let per_fill = per_fill.map(number).transpose()?.unwrap_or(1);
    Rate::new(number(size)?, per_fill, interval).map_err(|e| Bad::value(n, e.to_string(), "choose other numbers"))
}

fn cache_rule<'p>(n: &'p Node<'p>) -> Read<'p, CacheRule> {
    read::only(n, &["paths", "value"])?;
    let Some(at) = n.get("value") else { return Err(Bad::missing(n, "value", "for example `public, max-age=31536000`")) };
    Ok(CacheRule { paths: n.get("paths").map(paths).transpose()?.unwrap_or_default(), value: header_value(at)? })
}

fn compression<'p>(n: &'p Node<'p>) -> Read<'p, Compression> {
    read::only(n, &["codings", "minBytes", "contentTypes", "keepStrongETag", "hideAcceptEncoding"])?;
    let mut codings = Vec::new();
    for c in read::list(n, "codings")? {
        let text = read::scalar(c)?;
        let known = Coding::parse(text).filter(|c| !codings.contains(c));
        codings.push(known.ok_or_else(|| Bad::value(c, format!("`{text}` is no coding, or twice"), "write gzip, br or zstd"))?);
    }
    if codings.is_empty() {
        codings = vec![Coding::Zstd, Coding::Brotli, Coding::Gzip];
    }
    Ok(Compression {
        codings,
        min_bytes: read::number(n, "minBytes")?.unwrap_or(Compression::MIN_BYTES),
        types: content_types(n, "contentTypes")?,
        keep_etag: read::flag(n, "keepStrongETag")?,
        hide_accept: read::flag(n, "hideAcceptEncoding")?,
    })
}
/// Media types below `key`; Envoy's when there are none.
pub(super) fn content_types<'p>(n: &'p Node<'p>, key: &str) -> Read<'p, Vec<Arc<str>>> {
    let list = bounded(n, key)?;
    if list.is_empty() {
        return Ok(Compression::TYPES.iter().map(|t| (*t).into()).collect());
    }
    let media_type = |n: &'p Node<'p>| {
        let text = read::scalar(n)?.to_ascii_lowercase();
        let parts = text.split_once('/').filter(|(a, b)| !a.is_empty() && !b.is_empty() && !text.contains([';', '*', ' ']));
        if parts.is_none() {
            return Err(Bad::value(n, format!("`{text}` is no media type"), "write for example `application/json`"));
        }
        if Compression::never(&text) {
            return Err(Bad::value(n, format!("`{text}` is never compressed here: it would come late"), "remove it"));
        }
        Ok(text.into())
    };
    list.iter().map(media_type).collect()
}
