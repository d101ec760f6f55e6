//! `envoy.filters.http.lua`, if it only edits headers of the response, one by one, with constant text. It is read, not run.

use http::HeaderValue;
use mesh_model::l7::headers::HeaderEdits;

use super::super::http_text::name;
use super::super::read::{self, Bad, Read};
use super::{get, only, refused};
use crate::yaml::Node;

/// The edits of a script.
pub(super) fn read<'p>(n: &'p Node<'p>) -> Read<'p, HeaderEdits> {
    only(n, &["inline_code", "default_source_code"])?;
    let source = get(n, "default_source_code").and_then(|s| get(s, "inline_string")).or_else(|| get(n, "inline_code"));
    let Some(at) = source else { return Err(Bad::missing(n, "inline_code", "a script is written in the filter")) };
    let mut edits = HeaderEdits::default();
    let mut handle: Option<(&str, bool)> = None;
    for line in read::scalar(at)?.lines() {
        let line = line.split("--").next().unwrap_or_default().trim().trim_end_matches(';').trim_end();
        let function = line.strip_prefix("function ").and_then(|l| l.trim().strip_suffix(')')).and_then(|l| l.split_once('('));
        match (line, function, handle) {
            ("", ..) => {}
            ("end", _, Some(_)) => handle = None,
            (_, Some((function, argument)), None) if is_name(argument.trim()) => match function.trim() {
                "envoy_on_response" => handle = Some((argument.trim(), true)),
                "envoy_on_request" => handle = Some((argument.trim(), false)),
                _ => return Err(unknown(at, line)),
            },
            (_, None, Some((handle, true))) => edit(at, line, handle, &mut edits)?,
            _ => return Err(unknown(at, line)),
        }
    }
    if handle.is_some() {
        return Err(refused(at, "the script has no end", ""));
    }
    Ok(edits)
}
fn unknown<'p>(at: &'p Node<'p>, line: &str) -> Bad<'p> {
    let message = format!("scripts are not run, and `{line}` is not the edit of a response header");
    refused(at, message, "say it in a TrafficPolicy")
}
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// `handle:headers():add("name", "value")`, `replace`, or `remove("name")`.
fn edit<'p>(at: &'p Node<'p>, line: &str, handle: &str, edits: &mut HeaderEdits) -> Read<'p, ()> {
    let call = line.strip_prefix(handle).and_then(|l| l.strip_prefix(":headers():")).and_then(|l| l.strip_suffix(')'));
    let Some((method, arguments)) = call.and_then(|c| c.split_once('(')) else { return Err(unknown(at, line)) };
    let mut rest = arguments.trim();
    let mut texts = Vec::new();
    while !rest.is_empty() {
        let Some((text, more)) = literal(rest) else { return Err(unknown(at, line)) };
        texts.push(text);
        rest = match more.trim_start() {
            "" => "",
            more => match more.strip_prefix(',') {
                Some(more) if !more.trim().is_empty() => more.trim_start(),
                _ => return Err(unknown(at, line)),
            },
        };
    }
    let value =
        |text: &str| HeaderValue::from_str(text).map_err(|_| Bad::value(at, format!("`{text}` is not a header value"), ""));
    match (method.trim(), &texts[..]) {
        ("add", [key, text]) => edits.add.push((name(at, key)?, value(text)?)),
        ("replace", [key, text]) => edits.set.push((name(at, key)?, value(text)?)),
        ("remove", [key]) => edits.remove.push(name(at, key)?),
        _ => return Err(unknown(at, line)),
    }
    Ok(())
}
/// A quoted text without escapes at the beginning of `text`, and what follows.
fn literal(text: &str) -> Option<(&str, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let (literal, rest) = text.get(1..)?.split_once(quote)?;
    (!literal.contains('\\')).then_some((literal, rest))
}
