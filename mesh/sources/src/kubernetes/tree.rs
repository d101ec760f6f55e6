//! Objects of the API server as the trees that the translator reads. They have no lines.

use std::borrow::Cow;

use serde_json::Value as Json;

use crate::yaml::{Entry, Node, Value};

/// The object as one tree, with `apiVersion` and `kind`, which items of a list lack. Who manages which field is left out.
pub fn of_object(object: Json, api_version: String, kind: &'static str) -> Node<'static> {
    let mut entries = vec![entry("apiVersion".into(), text(api_version)), entry("kind".into(), text(kind.to_owned()))];
    if let Json::Object(fields) = object {
        for (key, mut value) in fields {
            if key == "apiVersion" || key == "kind" {
                continue;
            }
            if key == "metadata"
                && let Some(metadata) = value.as_object_mut()
            {
                metadata.remove("managedFields");
            }
            entries.push(entry(key, node(value)));
        }
    }
    Node { line: 0, tag: None, value: Value::Map(entries) }
}

fn entry(key: String, node: Node<'static>) -> Entry<'static> {
    Entry { key: Cow::Owned(key), line: 0, node }
}
fn text(text: String) -> Node<'static> {
    Node { line: 0, tag: None, value: Value::Scalar { text: Cow::Owned(text), quoted: true } }
}

/// The parser of the answer has limited the depth.
fn node(json: Json) -> Node<'static> {
    let value = match json {
        Json::Null => Value::Null,
        Json::Bool(b) => Value::Scalar { text: Cow::Borrowed(if b { "true" } else { "false" }), quoted: false },
        Json::Number(n) => Value::Scalar { text: Cow::Owned(n.to_string()), quoted: false },
        Json::String(s) => return text(s),
        Json::Array(items) => Value::Seq(items.into_iter().map(node).collect()),
        Json::Object(map) => Value::Map(map.into_iter().map(|(key, value)| entry(key, node(value))).collect()),
    };
    Node { line: 0, tag: None, value }
}
