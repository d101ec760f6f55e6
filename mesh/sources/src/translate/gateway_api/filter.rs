//! Filters of HTTPRoute and GRPCRoute rules and of their backends, compiled as far as they do not name other objects.

use std::sync::Arc;

use http::header::{HeaderName, HeaderValue};
use mesh_model::l7::headers::{BothEdits, HeaderEdits};
use mesh_model::l7::route::{Cors, Fraction, PathRewrite, Redirect, RedirectPort, Rewrite};
use mesh_model::l7::text::{Pattern, StringMatch};

use super::super::object::Reader;
use super::super::read::{self, Bad, Read};
use super::reference::{self, Owner, Target};
use crate::diagnostics::Severity;
use crate::yaml::{Node, Value};

/// What the filters of a rule or a backend ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filters {
    /// Header edits.
    pub headers: BothEdits,
    /// Redirect instead of forwarding.
    pub redirect: Option<Redirect>,
    /// Rewrite.
    pub rewrite: Option<Rewrite>,
    /// Copies.
    pub mirrors: Vec<(Target, Fraction)>,
    /// CORS.
    pub cors: Option<Arc<Cors>>,
    /// A filter that is not available here; what it would have done or refused is not known, so the answer is 500.
    pub refused: Option<Arc<str>>,
}

/// Where filters stand; not all may stand everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On a rule of an HTTPRoute.
    HttpRule,
    /// On a backend of an HTTPRoute.
    HttpBackend,
    /// On a GRPCRoute or its backend.
    Grpc,
}

/// Names of filter types, with the field that holds their configuration.
const TYPES: &[(&str, &str)] = &[
    ("RequestHeaderModifier", "requestHeaderModifier"),
    ("ResponseHeaderModifier", "responseHeaderModifier"),
    ("RequestRedirect", "requestRedirect"),
    ("URLRewrite", "urlRewrite"),
    ("RequestMirror", "requestMirror"),
    ("CORS", "cors"),
    ("ExtensionRef", "extensionRef"),
    ("ExternalAuth", "externalAuth"),
];

/// Reads `filters` of `owner`.
pub(super) fn read<'p>(
    r: &mut Reader<'_>,
    object: Owner<'_, 'p>,
    owner: &'p Node<'p>,
    place: Place,
    prefixes_only: bool,
) -> Read<'p, Filters> {
    let mut out = Filters::default();
    let mut seen: Vec<&str> = Vec::new();
    for f in read::list(owner, "filters")? {
        read::only(
            f,
            &[
                "type",
                "requestHeaderModifier",
                "responseHeaderModifier",
                "requestRedirect",
                "urlRewrite",
                "requestMirror",
                "cors",
                "extensionRef",
                "externalAuth",
            ],
        )?;
        let Some(kind) = f.get("type") else { return Err(Bad::missing(f, "type", "a filter has a type")) };
        let name = read::scalar(kind)?;
        let Some((_, field)) = TYPES.iter().find(|(t, _)| *t == name) else {
            return Err(Bad::value(
                kind,
                format!("`{name}` is not a filter"),
                "write RequestHeaderModifier, ResponseHeaderModifier, RequestRedirect, URLRewrite, RequestMirror or CORS",
            ));
        };
        if let Some(e) = read::entries(f)?.iter().find(|e| e.key != "type" && e.key != *field && e.node.value != Value::Null) {
            return Err(Bad::value(
                &e.node,
                format!("`{}` does not belong to a filter of type {name}", e.key),
                "correct the type or remove the field",
            ));
        }
        let Some(body) = read::map(f, field)? else {
            return Err(Bad {
                at: f,
                missing: None,
                message: format!("a filter of type {name} needs `{field}`"),
                fix: "add the field",
                code: "missing-field",
            });
        };
        let once = !matches!(name, "RequestMirror" | "ExtensionRef" | "ExternalAuth");
        if once && seen.contains(&name) {
            return Err(Bad::value(kind, format!("{name} is written twice in one list of filters"), "keep one of them"));
        }
        seen.push(name);
        match name {
            "RequestHeaderModifier" => out.headers.request = edits(r, body, true)?,
            "ResponseHeaderModifier" => out.headers.response = edits(r, body, false)?,
            "RequestMirror" => out.mirrors.push(mirror(r, body, object.namespace)?),
            "RequestRedirect" if place == Place::HttpRule => out.redirect = Some(redirect(r, body, prefixes_only)?),
            "URLRewrite" if place != Place::Grpc => out.rewrite = Some(rewrite(r, body, prefixes_only)?),
            "CORS" if place == Place::HttpRule => out.cors = Some(Arc::new(cors(body)?)),
            _ => {
                let why = match name {
                    "ExtensionRef" | "ExternalAuth" => format!("the filter {name} is not available here"),
                    _ => format!("the filter {name} is not available at this place"),
                };
                let bad = Bad {
                    at: f,
                    missing: None,
                    message: format!("{why}; what would have passed it is answered 500"),
                    fix: "remove the filter",
                    code: "unsupported-filter",
                };
                r.report(object.root, &bad, Severity::Error);
                out.refused.get_or_insert_with(|| why.into());
            }
        }
    }
    if let (Some(_), Some(_)) = (&out.redirect, &out.rewrite) {
        let at = owner.get("filters").unwrap_or(owner);
        return Err(Bad::value(at, "RequestRedirect and URLRewrite exclude each other", "keep one of them"));
    }
    Ok(out)
}

fn header_name<'p>(n: &'p Node<'p>) -> Read<'p, HeaderName> {
    let t = read::scalar(n)?;
    HeaderName::from_bytes(t.as_bytes())
        .map_err(|_| Bad::value(n, format!("`{t}` is not a header name"), "write a name such as `x-version`"))
}
/// Name of a header in a match or an edit.
pub(super) fn named<'p>(entry: &'p Node<'p>) -> Read<'p, HeaderName> {
    entry.get("name").map_or_else(|| Err(Bad::missing(entry, "name", "a header has a name")), header_name)
}

fn edits<'p>(r: &mut Reader<'_>, body: &'p Node<'p>, request: bool) -> Read<'p, HeaderEdits> {
    read::only(body, &["set", "add", "remove"])?;
    let mut out = HeaderEdits::default();
    for (key, add) in [("set", false), ("add", true)] {
        for e in read::list(body, key)? {
            read::only(e, &["name", "value"])?;
            let name_at = e.get("name").unwrap_or(e);
            let text = reference::name(e, "a header has a name")?;
            let value_at = e.get("value").unwrap_or(e);
            let value = read::text_or_empty(e, "value")?;
            if text.eq_ignore_ascii_case("host") || text.eq_ignore_ascii_case(":authority") {
                if !request || add {
                    return Err(Bad::value(
                        name_at,
                        "the host can only be set, and only of requests",
                        "use `set`, or URLRewrite",
                    ));
                }
                out.authority.get_or_insert_with(|| r.pool.text(value));
                continue;
            }
            let name = header_name(name_at)?;
            let value = HeaderValue::from_str(value)
                .map_err(|_| Bad::value(value_at, "not a header value: it has control characters", "remove them"))?;
            let list = if add { &mut out.add } else { &mut out.set };
            // Of several entries of one name the first counts (Gateway API).
            if list.iter().all(|(n, _)| *n != name) {
                list.push((name, value));
            }
        }
    }
    for n in read::list(body, "remove")? {
        let name = header_name(n)?;
        if name == http::header::HOST {
            return Err(Bad::value(n, "a request without host is none", "remove the entry"));
        }
        if !out.remove.contains(&name) {
            out.remove.push(name);
        }
    }
    Ok(out)
}

fn mirror<'p>(r: &mut Reader<'_>, body: &'p Node<'p>, own: &Arc<str>) -> Read<'p, (Target, Fraction)> {
    read::only(body, &["backendRef", "percent", "fraction"])?;
    let Some(to) = read::map(body, "backendRef")? else {
        return Err(Bad::missing(body, "backendRef", "a mirror has a backendRef"));
    };
    read::only(to, &["group", "kind", "namespace", "name", "port"])?;
    let to = reference::target(r, to, own)?;
    let share = match (body.get("percent"), read::map(body, "fraction")?) {
        (Some(at), Some(_)) => return Err(Bad::value(at, "percent and fraction exclude each other", "keep one of them")),
        (None, None) => Fraction::ALL,
        (Some(at), None) => match read::number::<u32>(body, "percent")? {
            Some(p) if p <= 100 => Fraction::percent(f64::from(p)),
            _ => return Err(Bad::value(at, "a percentage is from 0 to 100", "")),
        },
        (None, Some(f)) => {
            read::only(f, &["numerator", "denominator"])?;
            let Some(n) = read::number::<u32>(f, "numerator")? else {
                return Err(Bad::missing(f, "numerator", "a fraction has a numerator"));
            };
            let d = read::number::<u32>(f, "denominator")?.unwrap_or(100);
            if d == 0 || n > d {
                return Err(Bad::value(f, "a fraction is from 0 to 1", "write a numerator not above the denominator"));
            }
            Fraction::percent(100.0 * f64::from(n) / f64::from(d))
        }
    };
    Ok((to, share))
}

/// A path modifier. `/x/` and `/x` replace a prefix alike; the root replaces it by nothing.
fn path<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, prefixes_only: bool) -> Read<'p, PathRewrite> {
    read::only(node, &["type", "replaceFullPath", "replacePrefixMatch"])?;
    let Some(kind) = node.get("type") else { return Err(Bad::missing(node, "type", "a path modifier has a type")) };
    let (field, other) = match read::scalar(kind)? {
        "ReplaceFullPath" => ("replaceFullPath", "replacePrefixMatch"),
        "ReplacePrefixMatch" => ("replacePrefixMatch", "replaceFullPath"),
        t => {
            let message = format!("`{t}` is not a path modifier");
            return Err(Bad::value(kind, message, "write ReplaceFullPath or ReplacePrefixMatch"));
        }
    };
    if let Some(at) = node.get(other) {
        return Err(Bad::value(at, format!("`{other}` does not belong to this type"), "correct the type or remove the field"));
    }
    let Some(at) = node.get(field) else {
        return Err(Bad {
            at: node,
            missing: None,
            message: format!("this path modifier needs `{field}`"),
            fix: "add the field",
            code: "missing-field",
        });
    };
    let text = read::scalar(at)?;
    let plain = text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#'));
    if !plain || !(text.is_empty() || text.starts_with('/')) {
        return Err(Bad::value(at, format!("`{text}` is not a path"), "write a path that begins with `/`, without query"));
    }
    if field == "replaceFullPath" {
        return Ok(PathRewrite::Full(r.pool.text(if text.is_empty() { "/" } else { text })));
    }
    if !prefixes_only {
        let fix = "match by PathPrefix in this rule, or use ReplaceFullPath";
        return Err(Bad::value(kind, "ReplacePrefixMatch needs matches of type PathPrefix", fix));
    }
    Ok(PathRewrite::SegmentPrefix(r.pool.text(text.strip_suffix('/').unwrap_or(text))))
}

/// A host name without wildcard, in lower case.
fn host<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, key: &str) -> Read<'p, Option<Arc<str>>> {
    node.get(key).map(|n| super::super::istio::host_name(n, false).map(|t| r.pool.text(&t))).transpose()
}

fn rewrite<'p>(r: &mut Reader<'_>, body: &'p Node<'p>, prefixes_only: bool) -> Read<'p, Rewrite> {
    read::only(body, &["hostname", "path"])?;
    Ok(Rewrite {
        path: read::map(body, "path")?.map(|n| path(r, n, prefixes_only)).transpose()?,
        authority: host(r, body, "hostname")?,
    })
}

fn redirect<'p>(r: &mut Reader<'_>, body: &'p Node<'p>, prefixes_only: bool) -> Read<'p, Redirect> {
    read::only(body, &["scheme", "hostname", "path", "port", "statusCode"])?;
    let scheme = match body.get("scheme") {
        None => None,
        Some(n) => match read::scalar(n)? {
            t @ ("http" | "https") => Some(r.pool.text(t)),
            t => return Err(Bad::value(n, format!("`{t}` is not a scheme to redirect to"), "write http or https")),
        },
    };
    let status = match body.get("statusCode") {
        None => 302,
        Some(n) => match read::scalar(n)? {
            "301" => 301,
            "302" => 302,
            "303" => 303,
            "307" => 307,
            "308" => 308,
            t => return Err(Bad::value(n, format!("`{t}` is not a redirect"), "write 301, 302, 303, 307 or 308")),
        },
    };
    let port = match body.get("port") {
        Some(n) => RedirectPort::Number(read::port(n)?),
        // Gateway API: the scheme's own port when the scheme is set, else the port of the request.
        None if scheme.is_some() => RedirectPort::ProtocolDefault,
        None => RedirectPort::FromRequest,
    };
    let path = read::map(body, "path")?.map(|n| path(r, n, prefixes_only)).transpose()?;
    Ok(Redirect { status, scheme, authority: host(r, body, "hostname")?, port, path, strip_query: false })
}

fn cors<'p>(body: &'p Node<'p>) -> Read<'p, Cors> {
    read::only(body, &["allowOrigins", "allowCredentials", "allowMethods", "allowHeaders", "exposeHeaders", "maxAge"])?;
    let mut origins = Vec::new();
    for n in read::list(body, "allowOrigins")? {
        origins.push(origin(n)?);
    }
    let joined = |key: &str| -> Read<'p, Arc<str>> {
        let mut all = Vec::new();
        for n in read::list(body, key)? {
            let t = read::scalar(n)?;
            if t != "*" && HeaderName::from_bytes(t.as_bytes()).is_err() {
                return Err(Bad::value(n, format!("`{t}` is not a name"), "write methods and headers by name, or `*`"));
            }
            all.push(t);
        }
        Ok(all.join(",").into())
    };
    // The API server's default.
    let max_age = read::number::<u64>(body, "maxAge")?.unwrap_or(5);
    Ok(Cors {
        origins,
        methods: joined("allowMethods")?,
        headers: joined("allowHeaders")?,
        expose: joined("exposeHeaders")?,
        max_age: (max_age > 0).then_some(max_age),
        credentials: read::flag(body, "allowCredentials")?,
        forward_unmatched: true,
    })
}
/// `*`, or `scheme://host[:port]` whose host may be or begin with `*`, which stands for one or more labels.
fn origin<'p>(n: &'p Node<'p>) -> Read<'p, StringMatch> {
    let t = read::scalar(n)?;
    if t == "*" {
        return Ok(StringMatch::Present);
    }
    let bad = || {
        Bad::value(n, format!("`{t}` is not an origin"), "write for example `https://app.example.com` or `https://*.example.com`")
    };
    let (scheme, rest) = t.split_once("://").ok_or_else(bad)?;
    let good = |s: &str| s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':' | b'[' | b']'));
    if scheme.is_empty()
        || rest.is_empty()
        || !scheme.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
    {
        return Err(bad());
    }
    match rest.strip_prefix('*') {
        None if good(rest) => Ok(StringMatch::Exact(t.to_ascii_lowercase().into())),
        Some(tail) if good(tail) && (tail.is_empty() || tail.starts_with(['.', ':'])) => {
            let escape =
                |s: &str| s.to_ascii_lowercase().replace('.', r"\.").replace('+', r"\+").replace('[', r"\[").replace(']', r"\]");
            let any = if tail.is_empty() { "[^/]+" } else { "[^/:]+" };
            let pattern = Pattern::parse(&format!("{}://{any}{}", escape(scheme), escape(tail))).map_err(|_| bad())?;
            Ok(StringMatch::Regex(pattern))
        }
        _ => Err(bad()),
    }
}
