//! Cookies, as Envoy reads and writes them.
use http::header::{COOKIE, HeaderMap};
use std::fmt::Write as _;
use std::time::Duration;

/// The first value of a cookie, without its quotes; an empty one counts as missing.
pub(super) fn find<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let pairs = headers.get_all(COOKIE).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';'));
    let value = pairs.filter_map(|pair| pair.trim_start().split_once('=')).find(|(key, _)| *key == name)?.1.trim_end();
    let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
    (!value.is_empty()).then_some(value)
}

/// A `Set-Cookie`; a lifetime of zero makes a session cookie. `attributes`: more of them, each after `; `.
pub(super) fn set(name: &str, value: &str, lifetime: Duration, path: Option<&str>, attributes: &str) -> String {
    let mut out = format!("{name}=\"{value}\"");
    if !lifetime.is_zero() {
        // Writing to a String does not fail, here and below.
        let _ = write!(out, "; Max-Age={}", lifetime.as_secs());
    }
    if let Some(path) = path.filter(|p| !p.is_empty()) {
        let _ = write!(out, "; Path={path}");
    }
    out.push_str(attributes);
    out.push_str("; HttpOnly");
    out
}
