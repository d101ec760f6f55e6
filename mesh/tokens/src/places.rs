//! Where in a request a token is.
use crate::Fault;
use http::header::{self, HeaderMap, HeaderValue};
use mesh_model::l7::request_auth::{TokenPlace, TokenRule};
use std::sync::Arc;

/// The token a request presents by these rules. Two that differ are refused: which of them the application would believe nobody can
/// say (Envoy takes the first that is valid).
///
/// # Errors
/// There are several.
pub fn presented<'p, 'r: 'p>(
    headers: &'p HeaderMap,
    query: &'p str,
    rules: impl Iterator<Item = &'r Arc<TokenRule>> + 'p,
) -> Result<Option<&'p str>, Fault> {
    let mut all = rules.flat_map(|rule| &rule.places).flat_map(|place| at(place, headers, query));
    let first = all.next();
    if all.any(|other| Some(other) != first) { Err(Fault::Several) } else { Ok(first) }
}
/// Whether a rule looks where the request has a token.
pub(crate) fn looks_there(rule: &TokenRule, headers: &HeaderMap, query: &str) -> bool {
    rule.places.iter().any(|place| at(place, headers, query).next().is_some())
}

/// The tokens at a place.
fn at<'p>(place: &'p TokenPlace, headers: &'p HeaderMap, query: &'p str) -> impl Iterator<Item = &'p str> {
    let (mut header, mut param, mut cookie) = (None, None, None);
    match place {
        TokenPlace::Header(name, prefix) => header = Some((name, prefix)),
        TokenPlace::Param(name) => param = Some(name),
        TokenPlace::Cookie(name) => cookie = Some(name),
    }
    let of_header =
        header.into_iter().flat_map(|(name, prefix)| headers.get_all(name).iter().filter_map(move |value| behind(value, prefix)));
    let of_param = param.into_iter().flat_map(move |name| query.split('&').filter_map(|pair| named(pair, name)));
    let of_cookie = cookie.into_iter().flat_map(|name| {
        let lines = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        lines.flat_map(|line| line.split(';')).filter_map(|pair| named(pair.trim(), name)).map(unquoted)
    });
    of_header.chain(of_param).chain(of_cookie)
}
/// What stands behind the prefix in a header's value.
pub fn behind<'v>(value: &'v HeaderValue, prefix: &str) -> Option<&'v str> {
    Some(value.to_str().ok()?.strip_prefix(prefix)?.trim())
}
/// A cookie's value may be in quotes (RFC 6265 §4.1.1).
fn unquoted(value: &str) -> &str {
    value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value)
}
/// The value of `name=value`; an empty one is a token like any other, and not a true one.
pub fn named<'v>(pair: &'v str, name: &str) -> Option<&'v str> {
    pair.strip_prefix(name)?.strip_prefix('=')
}

#[cfg(test)]
mod tests;
