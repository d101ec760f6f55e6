//! RequestAuthentication → [`RequestAuth`] (waypoint §3.5).
//!
//! Anything malformed or not known makes it unusable, and an unusable one refuses what it is bound to: without it a DENY by
//! token, or a header the application trusts, would silently mean nothing. Upstream: [`super::object`]. Downstream:
//! [`super::targets`], which binds it, and the waypoint's `authenticate` phase.

use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderName;
use mesh_model::Origin;
use mesh_model::l7::request_auth::{AuthBody, ClaimsTo, Jwks, KeySource, RequestAuth, TokenPlace, TokenRule};
use mesh_model::policy::PolicyKey;

use super::authorization::{self, OBJECT, OBJECT_META};
use super::object::{ObjectId, Reader};
use super::read::{self, Bad, Read};
use super::targets::{TargetedAuth, Targets};
use crate::diagnostics::Severity;
use crate::yaml::{self, Node, Value};

/// Limit of one fetch of keys (Istio's default).
const TIMEOUT: Duration = Duration::from_secs(5);
/// Claims that are lists separated by spaces, whatever is written (Istio's).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];
/// Headers no claim may be put into: they frame the message, or carry the token.
const NO_OUTPUT: [&str; 7] = ["host", "content-length", "transfer-encoding", "connection", "upgrade", "authorization", "cookie"];
const UNUSABLE: &str = "until it is corrected, everything it is bound to is refused";

pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId, origin: &Arc<Origin>) -> Arc<TargetedAuth> {
    let everywhere = id.namespace == r.root_namespace;
    let key = PolicyKey { namespace: Arc::clone(&id.namespace), name: Arc::clone(&id.name) };
    // Whom it binds comes first: it decides what a mistake further down closes.
    let (targets, body) = match targets(r, node, id, everywhere) {
        Ok(targets) => (targets, body(r, node)),
        Err(bad) => (Targets::Unknown { everywhere }, Err(bad)),
    };
    let body = body.unwrap_or_else(|mut bad| {
        let why = bad.why(node);
        bad.message = format!("{}; {UNUSABLE}", bad.message);
        r.report(node, &bad, Severity::Error);
        AuthBody::Unusable { why: why.into() }
    });
    Arc::new(TargetedAuth { policy: Arc::new(RequestAuth { key, body, origin: Some(Arc::clone(origin)) }), targets })
}

fn targets<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId, everywhere: bool) -> Read<'p, Targets> {
    let Some(spec) = read::map(node, "spec")? else { return Ok(Targets::Gateways { everywhere }) };
    read::only(spec, &["selector", "targetRef", "targetRefs", "jwtRules"])?;
    let named = authorization::targets(spec, &id.namespace)?;
    let selector = authorization::selector(spec, r.pool)?;
    let written = authorization::raw(spec, "selector");
    match (named, written) {
        (Some(_), Some(n)) => Err(Bad::value(n, "`selector` and targets cannot be combined", "keep one of them")),
        (Some(targets), None) => Ok(Targets::Named(targets)),
        (None, Some(n)) if !selector.is_empty() => Ok(Targets::Selected { selector, everywhere, line: n.line }),
        (None, _) => Ok(Targets::Gateways { everywhere }),
    }
}

fn body<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, AuthBody> {
    read::only(node, OBJECT)?;
    if let Some(meta) = node.get("metadata") {
        read::only(meta, OBJECT_META)?;
    }
    let mut rules = Vec::new();
    if let Some(spec) = read::map(node, "spec")? {
        for n in read::list(spec, "jwtRules")? {
            rules.push(Arc::new(rule(r, n)?));
        }
    }
    if rules.is_empty() {
        let bad = Bad {
            at: node.get("spec").unwrap_or(node),
            missing: None,
            message: "without `jwtRules` no token is looked at".into(),
            fix: "add a rule, or remove the object",
            code: "no-rules",
        };
        r.report(node, &bad, Severity::Warning);
    }
    Ok(AuthBody::Rules(rules.into()))
}

const RULE: &[&str] = &[
    "issuer",
    "audiences",
    "jwksUri",
    "jwks",
    "fromHeaders",
    "fromParams",
    "fromCookies",
    "outputPayloadToHeader",
    "outputClaimToHeaders",
    "forwardOriginalToken",
    "timeout",
    "spaceDelimitedClaims",
];

fn rule<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, TokenRule> {
    read::only(n, RULE)?;
    let Some(issuer) = n.get("issuer") else { return Err(Bad::missing(n, "issuer", "a rule has an issuer")) };
    let issuer = r.pool.text(text(issuer)?);
    let timeout = read::duration(n, "timeout")?.unwrap_or(TIMEOUT);
    if timeout.is_zero() {
        return Err(Bad::value(n.get("timeout").unwrap_or(n), "no time at all to fetch keys", "write for example `5s`"));
    }
    let mut space_delimited: Vec<Arc<str>> = SPACE_DELIMITED.iter().map(|c| r.pool.text(c)).collect();
    space_delimited.extend(texts(r, n, "spaceDelimitedClaims")?);
    let payload_to = n.get("outputPayloadToHeader").filter(|n| n.text() != Some("")).map(output).transpose()?;
    Ok(TokenRule {
        keys: keys(r, n, &issuer, timeout)?,
        audiences: texts(r, n, "audiences")?.into(),
        places: places(r, n)?,
        payload_to,
        claims_to: claims_to(r, n)?,
        forward: read::flag(n, "forwardOriginalToken")?,
        space_delimited: space_delimited.into(),
        issuer,
    })
}

/// Where the keys come from.
fn keys<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, issuer: &Arc<str>, timeout: Duration) -> Read<'p, KeySource> {
    let written = |key| n.get(key).filter(|n| !matches!(n.text(), Some("")) && n.value != Value::Null);
    match (written("jwks"), written("jwksUri")) {
        (Some(at), Some(_)) => Err(Bad::value(at, "`jwks` and `jwksUri` cannot both be written", "keep one of them")),
        (Some(at), None) => {
            let jwks = read::scalar(at)?;
            usable(jwks).map_err(|why| Bad::value(at, why, "write a JWKS (RFC 7517): {\"keys\":[{\"kty\":…}]}"))?;
            Ok(KeySource::Inline(Jwks::new(jwks)))
        }
        (None, Some(at)) => {
            let uri = read::scalar(at)?;
            fetchable(uri).map_err(|why| Bad::value(at, why, "write a URL that begins with https:// or http://"))?;
            Ok(KeySource::Remote { uri: r.pool.text(uri), timeout })
        }
        (None, None) => {
            let at = n.get("issuer").unwrap_or(n);
            let fix = "write `jwksUri` or `jwks`";
            fetchable(issuer).map_err(|why| Bad::value(at, format!("{why}, so its keys cannot be discovered"), fix))?;
            Ok(KeySource::Discovered { issuer: Arc::clone(issuer), timeout })
        }
    }
}
/// Whether it is the shape of a JWKS. JSON is YAML too; the keys themselves are read by whoever verifies with them.
fn usable(jwks: &str) -> Result<(), String> {
    let not = |why: &str| format!("not a JWKS: {why}");
    let mut documents = yaml::documents(jwks);
    let document = documents.pop().filter(|_| documents.is_empty()).ok_or_else(|| not("empty, or several documents"))?;
    let tree = yaml::parse_whole(document).map_err(|e| not(&e.to_string()))?;
    match tree.get("keys").map(|k| &k.value) {
        Some(Value::Seq(keys)) if keys.is_empty() => Err(not("`keys` is empty")),
        Some(Value::Seq(keys)) if keys.iter().all(|k| k.get("kty").and_then(Node::text).is_some()) => Ok(()),
        Some(Value::Seq(_)) => Err(not("a key has no `kty`")),
        _ => Err(not("no list `keys` in it")),
    }
}
/// Whether it is a URL that can be fetched.
fn fetchable(url: &str) -> Result<(), String> {
    let uri: Option<http::Uri> = url.parse().ok();
    let good = uri.is_some_and(|u| {
        matches!(u.scheme_str(), Some("http" | "https")) && u.authority().is_some_and(|a| !a.as_str().contains('@'))
    });
    if good { Ok(()) } else { Err(format!("`{url}` is no URL of http or https")) }
}

/// Where tokens are looked for.
fn places<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, Box<[TokenPlace]>> {
    let mut places = Vec::new();
    for h in read::list(n, "fromHeaders")? {
        read::only(h, &["name", "prefix"])?;
        let Some(name) = h.get("name") else { return Err(Bad::missing(h, "name", "a header has a name")) };
        places.push(TokenPlace::Header(header(name)?, r.pool.text(read::text_or_empty(h, "prefix")?)));
    }
    places.extend(texts(r, n, "fromParams")?.into_iter().map(TokenPlace::Param));
    places.extend(texts(r, n, "fromCookies")?.into_iter().map(TokenPlace::Cookie));
    Ok(if places.is_empty() { TokenPlace::usual() } else { places.into() })
}
fn claims_to<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, ClaimsTo> {
    let mut outputs = Vec::new();
    for o in read::list(n, "outputClaimToHeaders")? {
        read::only(o, &["header", "claim"])?;
        let Some(name) = o.get("header") else { return Err(Bad::missing(o, "header", "an output has a header")) };
        let Some(claim) = o.get("claim") else { return Err(Bad::missing(o, "claim", "an output has a claim")) };
        let path = read::claim_path(claim)?.into_iter().map(|part| r.pool.text(part)).collect();
        outputs.push((output(name)?, path));
    }
    Ok(outputs.into())
}
fn output<'p>(n: &'p Node<'p>) -> Read<'p, HeaderName> {
    let name = header(n)?;
    if NO_OUTPUT.contains(&name.as_str()) {
        return Err(Bad::value(n, format!("`{name}` cannot be made from a token"), "choose a header of your own"));
    }
    Ok(name)
}
fn header<'p>(n: &'p Node<'p>) -> Read<'p, HeaderName> {
    let name = text(n)?;
    HeaderName::try_from(name).map_err(|_| Bad::value(n, format!("`{name}` is not a header name"), ""))
}
fn text<'p>(n: &'p Node<'p>) -> Read<'p, &'p str> {
    match read::scalar(n)? {
        "" => Err(Bad::value(n, "an empty text", "write a value, or remove the field")),
        text => Ok(text),
    }
}
fn texts<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, key: &str) -> Read<'p, Vec<Arc<str>>> {
    read::list(n, key)?.iter().map(|t| Ok(r.pool.text(text(t)?))).collect()
}
