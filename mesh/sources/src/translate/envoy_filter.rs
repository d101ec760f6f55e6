//! EnvoyFilter, as far as it says what a TrafficPolicy can say (waypoint §3.9).
//!
//! Understood are the filters meshes patch in most: `local_ratelimit`, additions of response headers (`header_mutation`, a
//! `lua` that does nothing else, `response_headers_to_add`), `cors`, `compressor`, and `buffer`; bound by `targetRefs`, to all of
//! what they name. The rest is refused, as a whole and with its reason: a patch that is not understood cannot be half done, and what
//! it is bound to is refused until it is corrected or removed.
//! Upstream: [`super::object`]. Downstream: [`super::traffic`].

mod limit;
mod lua;

use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use mesh_model::l7::StringMatch;
use mesh_model::l7::compression::{Coding, Compression};
use mesh_model::l7::headers::HeaderEdits;
use mesh_model::l7::limit::Point;
use mesh_model::l7::route::Cors;
use mesh_model::l7::treatment::Treatment;

use super::authorization::{OBJECT, OBJECT_META};
use super::http_text::{name, pattern};
use super::object::{ObjectId, Reader};
use super::read::{self, Bad, Read};
use super::traffic_policy::{self, TrafficPolicy, content_types, header_value};
use crate::diagnostics::Severity;
use crate::yaml::Node;

const INSTEAD: &str = "say it in a TrafficPolicy, or in the route";
const ROUTER: &str = "envoy.filters.http.router";
const EXTENSION: &str = "envoy.extensions.filters.http.";

/// Reads an EnvoyFilter.
pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, TrafficPolicy> {
    let spec = node.get("spec").unwrap_or(node);
    if spec.get("targetRefs").is_none() {
        // It binds nothing here, so that there is nothing to refuse.
        let at = spec.get("workloadSelector").unwrap_or(spec);
        let message = "no waypoint or gateway is selected by labels; this filter is for sidecars";
        return Err(refused(at, message, "bind it with `targetRefs`"));
    }
    // What was to be done at its targets and is not may have been what protected them.
    Ok(traffic_policy::read_as(r, node, id, content))
}
fn content<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, Treatment> {
    read::only(node, OBJECT)?;
    read::only(node.get("metadata").unwrap_or(node), OBJECT_META)?;
    let spec = node.get("spec").unwrap_or(node);
    read::only(spec, &["targetRefs", "configPatches", "priority"])?;
    let mut filter = Filter { r, root: node, id, out: Treatment::default() };
    for (n, patch) in read::list(spec, "configPatches")?.iter().enumerate() {
        filter.patch(n, patch)?;
    }
    Ok(filter.out)
}
/// What is not done here.
fn refused<'p>(at: &'p Node<'p>, message: impl Into<String>, fix: &'static str) -> Bad<'p> {
    Bad { code: "envoy-filter", ..Bad::value(at, message, fix) }
}

/// A field of a protobuf message, whose names may be written in snake case or camel case.
fn get<'p>(n: &'p Node<'p>, field: &str) -> Option<&'p Node<'p>> {
    let found = read::entries(n).ok()?.iter().find(|e| snake(&e.key) == field);
    found.map(|e| &e.node).filter(|n| n.value != crate::yaml::Value::Null)
}
fn snake(key: &str) -> String {
    let mut out = String::with_capacity(key.len() + 4);
    for c in key.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
/// Refuses fields that are not in `known`.
fn only<'p>(n: &'p Node<'p>, known: &[&str]) -> Read<'p, ()> {
    match read::entries(n)?.iter().find(|e| e.key != "@type" && !known.contains(&snake(&e.key).as_str())) {
        Some(e) => Err(refused(&e.node, format!("`{}` is not done here", e.key), INSTEAD)),
        None => Ok(()),
    }
}
fn list<'p>(n: &'p Node<'p>, field: &str) -> Read<'p, &'p [Node<'p>]> {
    match read::entries(n)?.iter().find(|e| snake(&e.key) == field) {
        Some(e) => read::list(n, &e.key),
        None => Ok(&[]),
    }
}
fn text<'p>(n: &'p Node<'p>, field: &str) -> Read<'p, Option<&'p str>> {
    get(n, field).map(read::scalar).transpose()
}
/// A flag, also as `BoolValue`.
fn flag<'p>(n: &'p Node<'p>, field: &str) -> Read<'p, Option<bool>> {
    let Some(at) = get(n, field) else { return Ok(None) };
    match at.text().or_else(|| get(at, "value").and_then(Node::text)) {
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        _ => Err(Bad::value(at, "expected `true` or `false`", "")),
    }
}
/// A whole number.
fn number<'p>(at: &'p Node<'p>) -> Read<'p, u32> {
    read::scalar(at)?.parse().map_err(|_| Bad::value(at, "expected a whole number", ""))
}
/// Type and content of a `typed_config`, which may be wrapped in a `TypedStruct`.
fn typed<'p>(n: &'p Node<'p>) -> Read<'p, (&'p str, &'p Node<'p>)> {
    let (mut url, mut content) = (n.get("@type").map(read::scalar).transpose()?.unwrap_or_default(), n);
    if url.ends_with(".TypedStruct") {
        only(n, &["type_url", "value"])?;
        url = text(n, "type_url")?.unwrap_or_default();
        content = get(n, "value").unwrap_or(n);
    }
    Ok((url.rsplit('/').next().unwrap_or(url), content))
}
/// Whether a `RuntimeFractionalPercent` is 100 %.
fn always<'p>(n: &'p Node<'p>) -> Read<'p, bool> {
    only(n, &["default_value", "runtime_key"])?;
    let Some(value) = get(n, "default_value") else { return Ok(false) };
    only(value, &["numerator", "denominator"])?;
    let of = match text(value, "denominator")? {
        None | Some("HUNDRED") => 100,
        Some("TEN_THOUSAND") => 10_000,
        Some("MILLION") => 1_000_000,
        Some(_) => return Ok(false),
    };
    Ok(get(value, "numerator").map(number).transpose()? == Some(of))
}

/// One EnvoyFilter that is being read.
struct Filter<'a, 'b, 'p> {
    r: &'a mut Reader<'b>,
    root: &'p Node<'p>,
    id: &'a ObjectId,
    out: Treatment,
}
impl<'p> Filter<'_, '_, 'p> {
    fn patch(&mut self, n: usize, patch: &'p Node<'p>) -> Read<'p, ()> {
        read::only(patch, &["applyTo", "match", "patch"])?;
        let Some(body) = read::map(patch, "patch")? else { return Err(Bad::missing(patch, "patch", "what is to be done")) };
        read::only(body, &["operation", "value"])?;
        let operation = read::text_or_empty(body, "operation")?;
        let Some(value) = read::map(body, "value")? else {
            return Err(refused(body, format!("{operation} of something that is not written here is not done"), INSTEAD));
        };
        match (read::text_or_empty(patch, "applyTo")?, operation) {
            ("HTTP_FILTER", "INSERT_BEFORE" | "INSERT_FIRST" | "INSERT_AFTER") => {
                let point = filter_place(patch, operation)?;
                self.http_filter(n, value, point)
            }
            ("VIRTUAL_HOST" | "HTTP_ROUTE" | "ROUTE_CONFIGURATION", "MERGE") => {
                route_place(patch)?;
                self.route(value)
            }
            (what, how) => Err(refused(patch, format!("{how} of {what} is not done here"), INSTEAD)),
        }
    }

    fn http_filter(&mut self, n: usize, value: &'p Node<'p>, point: Option<Point>) -> Read<'p, ()> {
        read::only(value, &["name", "typed_config", "typedConfig"])?;
        let filter = read::text_or_empty(value, "name")?;
        let Some(config) = get(value, "typed_config") else {
            return Err(refused(value, format!("the filter `{filter}` has no typed_config"), INSTEAD));
        };
        let (kind, config) = typed(config)?;
        match kind.strip_prefix(EXTENSION).unwrap_or(kind) {
            "local_ratelimit.v3.LocalRateLimit" => {
                let Some(point) = point else {
                    return Err(refused(
                        value,
                        "its place among the filters is not told apart here",
                        "insert it first, or before the router",
                    ));
                };
                self.out.limits.extend(limit::read(self.r, config, self.id, n, point)?.into_iter().map(Arc::new));
                Ok(())
            }
            "compressor.v3.Compressor" => self.compressor(config),
            "header_mutation.v3.HeaderMutation" => self.header_mutation(config),
            "lua.v3.Lua" => {
                self.out.response.push(lua::read(config)?);
                Ok(())
            }
            // The filter itself says nothing; the policy is in the route.
            "cors.v3.Cors" => only(config, &[]),
            "buffer.v3.Buffer" => {
                only(config, &["max_request_bytes"])?;
                let Some(at) = get(config, "max_request_bytes") else {
                    return Err(Bad::missing(config, "max_request_bytes", "a buffer has a size"));
                };
                let bytes = u64::from(number(at)?);
                self.out.max_request_bytes = Some(self.out.max_request_bytes.map_or(bytes, |have| have.min(bytes)));
                Ok(())
            }
            other => Err(refused(value, format!("the filter `{filter}` ({other}) is not done here"), INSTEAD)),
        }
    }

    fn route(&mut self, value: &'p Node<'p>) -> Read<'p, ()> {
        only(value, &["typed_per_filter_config", "response_headers_to_add", "response_headers_to_remove"])?;
        let mut edits = HeaderEdits::default();
        for n in list(value, "response_headers_to_add")? {
            header_option(n, &mut edits)?;
        }
        for n in list(value, "response_headers_to_remove")? {
            edits.remove.push(name(n, read::scalar(n)?)?);
        }
        if !edits.is_empty() {
            self.out.response.push(edits);
        }
        let Some(per_filter) = get(value, "typed_per_filter_config") else { return Ok(()) };
        for e in read::entries(per_filter)? {
            let (kind, config) = typed(&e.node)?;
            match kind.strip_prefix(EXTENSION).unwrap_or(kind) {
                "cors.v3.CorsPolicy" if self.out.cors.is_none() => self.out.cors = Some(Arc::new(cors(config)?)),
                "cors.v3.CorsPolicy" => return Err(refused(&e.node, "a second CORS policy", "keep one")),
                other => return Err(refused(&e.node, format!("{other} of a route is not done here"), INSTEAD)),
            }
        }
        Ok(())
    }

    fn header_mutation(&mut self, config: &'p Node<'p>) -> Read<'p, ()> {
        only(config, &["mutations"])?;
        let Some(mutations) = get(config, "mutations") else { return Ok(()) };
        only(mutations, &["response_mutations"])?;
        let mut edits = HeaderEdits::default();
        for n in list(mutations, "response_mutations")? {
            only(n, &["append", "remove"])?;
            if let Some(at) = get(n, "remove") {
                edits.remove.push(name(at, read::scalar(at)?)?);
            }
            if let Some(at) = get(n, "append") {
                header_option(at, &mut edits)?;
            }
        }
        self.out.response.push(edits);
        Ok(())
    }

    fn compressor(&mut self, config: &'p Node<'p>) -> Read<'p, ()> {
        only(config, &["compressor_library", "response_direction_config", "choose_first"])?;
        let Some(library) = get(config, "compressor_library").and_then(|l| get(l, "typed_config")) else {
            return Err(Bad::missing(config, "compressor_library", "a compressor has a library"));
        };
        let (kind, parameters) = typed(library)?;
        let coding = match kind.strip_prefix("envoy.extensions.compression.").unwrap_or(kind) {
            "gzip.compressor.v3.Gzip" => Coding::Gzip,
            "brotli.compressor.v3.Brotli" => Coding::Brotli,
            "zstd.compressor.v3.Zstd" => Coding::Zstd,
            other => return Err(refused(library, format!("the library {other} is not known"), "use gzip, brotli or zstd")),
        };
        if read::entries(parameters)?.iter().any(|e| e.key != "@type") {
            let message = "levels and windows of the library are chosen here, these are not used";
            self.r.report(self.root, &refused(library, message, "remove them"), Severity::Note);
        }
        let mut made = Compression {
            codings: vec![coding],
            min_bytes: Compression::MIN_BYTES,
            types: Compression::TYPES.iter().map(|t| (*t).into()).collect(),
            keep_etag: false,
            hide_accept: false,
        };
        if let Some(direction) = get(config, "response_direction_config") {
            direction_config(direction, &mut made)?;
        }
        if let Some(have) = &mut self.out.compression {
            // Several libraries are one compression with several codings, as long as they do the same otherwise.
            made.codings = have.codings.iter().copied().chain(made.codings).collect();
            if made.codings.len() != have.codings.len() + 1
                || made != (Compression { codings: made.codings.clone(), ..(**have).clone() })
            {
                return Err(refused(config, "compressors of one target differ in more than their library", "let them agree"));
            }
        }
        self.out.compression = Some(Arc::new(made));
        Ok(())
    }
}

/// Where a filter is inserted, if that is one of the places told apart here.
fn filter_place<'p>(patch: &'p Node<'p>, operation: &str) -> Read<'p, Option<Point>> {
    let Some(listener) = place(patch, "listener")? else { return Ok(Some(Point::BeforeAuthentication)) };
    read::only(listener, &["filterChain"])?;
    let Some(filter) = listener.get("filterChain") else { return Ok(Some(Point::BeforeAuthentication)) };
    read::only(filter, &["filter"])?;
    let Some(filter) = filter.get("filter") else { return Ok(Some(Point::BeforeAuthentication)) };
    read::only(filter, &["name", "subFilter"])?;
    if let Some(at) = filter.get("name")
        && !matches!(at.text(), Some("envoy.filters.network.http_connection_manager" | "envoy.http_connection_manager"))
    {
        return Err(refused(
            at,
            "HTTP filters are in the connection manager",
            "name envoy.filters.network.http_connection_manager",
        ));
    }
    let before = filter.get("subFilter").map(|s| read::text_or_empty(s, "name")).transpose()?;
    Ok(match (operation, before) {
        // Inserted "before" nothing in particular is first of all.
        ("INSERT_FIRST", _) | ("INSERT_BEFORE", None) => Some(Point::BeforeAuthentication),
        ("INSERT_BEFORE", Some(ROUTER)) => Some(Point::AfterAuthorization),
        _ => None,
    })
}
/// A route patch must be for all routes.
fn route_place<'p>(patch: &'p Node<'p>) -> Read<'p, ()> {
    let Some(routes) = place(patch, "routeConfiguration")? else { return Ok(()) };
    read::only(routes, &["vhost"])?;
    let Some(vhost) = routes.get("vhost") else { return Ok(()) };
    read::only(vhost, &["route"])?;
    let Some(route) = vhost.get("route") else { return Ok(()) };
    read::only(route, &["action"])?;
    match route.get("action") {
        Some(at) if at.text() != Some("ANY") => Err(refused(at, "kinds of routes are not told apart here", "write ANY")),
        _ => Ok(()),
    }
}
/// What a patch is for; traffic that leaves is not seen here.
fn place<'p>(patch: &'p Node<'p>, kind: &str) -> Read<'p, Option<&'p Node<'p>>> {
    let Some(n) = read::map(patch, "match")? else { return Ok(None) };
    read::only(n, &["context", kind])?;
    match n.get("context").map(|at| (at, at.text())) {
        None | Some((_, Some("ANY" | "SIDECAR_INBOUND" | "GATEWAY"))) => read::map(n, kind),
        Some((at, _)) => Err(refused(at, "this is not what a waypoint or gateway does", "write SIDECAR_INBOUND or GATEWAY")),
    }
}

/// A `HeaderValueOption`.
fn header_option<'p>(n: &'p Node<'p>, edits: &mut HeaderEdits) -> Read<'p, ()> {
    let (add, header) = header_of(n)?;
    if add {
        edits.add.push(header);
    } else {
        edits.set.push(header);
    }
    Ok(())
}
/// Name and value of a `HeaderValueOption`, and whether it is added beside what is there.
fn header_of<'p>(n: &'p Node<'p>) -> Read<'p, (bool, (HeaderName, HeaderValue))> {
    only(n, &["header", "append", "append_action"])?;
    let Some(header) = get(n, "header") else { return Err(Bad::missing(n, "header", "a header has a name and a value")) };
    only(header, &["key", "value"])?;
    let (Some(key), Some(value)) = (get(header, "key"), get(header, "value")) else {
        return Err(Bad::missing(header, "key", "a header has `key` and `value`"));
    };
    let add = match text(n, "append_action")? {
        None => flag(n, "append")?.unwrap_or(true),
        Some("APPEND_IF_EXISTS_OR_ADD") => true,
        Some("OVERWRITE_IF_EXISTS_OR_ADD") => false,
        Some(other) => {
            return Err(refused(
                n,
                format!("{other} is not done here"),
                "use OVERWRITE_IF_EXISTS_OR_ADD or APPEND_IF_EXISTS_OR_ADD",
            ));
        }
    };
    Ok((add, (name(key, read::scalar(key)?)?, header_value(value)?)))
}

fn direction_config<'p>(n: &'p Node<'p>, made: &mut Compression) -> Read<'p, ()> {
    only(n, &["common_config", "disable_on_etag_header", "remove_accept_encoding_header"])?;
    made.keep_etag = flag(n, "disable_on_etag_header")?.unwrap_or(false);
    made.hide_accept = flag(n, "remove_accept_encoding_header")?.unwrap_or(false);
    let Some(common) = get(n, "common_config") else { return Ok(()) };
    only(common, &["enabled", "min_content_length", "content_type"])?;
    if let Some(at) = get(common, "enabled") {
        only(at, &["default_value", "runtime_key"])?;
        if flag(at, "default_value")? != Some(true) {
            return Err(refused(at, "a compressor that is not enabled does nothing", "enable it, or remove it"));
        }
    }
    if let Some(at) = get(common, "min_content_length") {
        made.min_bytes = number(at)?.into();
    }
    if let Some(e) = read::entries(common)?.iter().find(|e| snake(&e.key) == "content_type") {
        made.types = content_types(common, &e.key)?;
    }
    Ok(())
}

fn cors<'p>(n: &'p Node<'p>) -> Read<'p, Cors> {
    only(
        n,
        &[
            "allow_origin_string_match",
            "allow_methods",
            "allow_headers",
            "expose_headers",
            "max_age",
            "allow_credentials",
            "filter_enabled",
            "forward_not_matching_preflights",
        ],
    )?;
    if let Some(at) = get(n, "filter_enabled")
        && !always(at)?
    {
        return Err(refused(at, "a CORS policy is in force for all requests or for none", "write 100 %, or remove it"));
    }
    let of = |field| -> Read<'p, Arc<str>> {
        let Some(at) = get(n, field) else { return Ok("".into()) };
        header_value(at)?;
        Ok(read::scalar(at)?.into())
    };
    let mut out = Cors {
        origins: Vec::new(),
        methods: of("allow_methods")?,
        headers: of("allow_headers")?,
        expose: of("expose_headers")?,
        max_age: get(n, "max_age").map(number).transpose()?.map(u64::from),
        credentials: flag(n, "allow_credentials")?.unwrap_or(false),
        forward_unmatched: flag(n, "forward_not_matching_preflights")?.unwrap_or(true),
    };
    for origin in list(n, "allow_origin_string_match")? {
        only(origin, &["exact", "prefix", "suffix", "safe_regex"])?;
        let [e] = read::entries(origin)? else { return Err(Bad::value(origin, "one of exact, prefix, suffix, safe_regex", "")) };
        let plain = || Ok::<_, Bad<'p>>(read::scalar(&e.node)?.into());
        out.origins.push(match snake(&e.key).as_str() {
            "exact" => StringMatch::Exact(plain()?),
            "prefix" => StringMatch::Prefix(plain()?),
            "suffix" => StringMatch::Suffix(plain()?),
            _ => {
                only(&e.node, &["regex", "google_re2"])?;
                StringMatch::Regex(pattern(&e.node, text(&e.node, "regex")?.unwrap_or_default())?)
            }
        });
    }
    Ok(out)
}
