//! Reading fields of a [`Node`] with complaints that name line and path.
//!
//! A [`Bad`] only remembers the node; its path is found by walking the tree when, and only when, there is something
//! to complain about, so that reading the hundred thousand good objects costs nothing.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use mesh_model::Origin;

use super::intern::{Interner, Labels};
use crate::diagnostics::{Problem, Severity};
use crate::yaml::{Entry, Node, Value};

/// A field that cannot be used.
#[derive(Clone, Debug)]
pub struct Bad<'p> {
    /// The node at fault, or the one that lacks `missing`.
    pub at: &'p Node<'p>,
    /// Name of the field that is not there.
    pub missing: Option<&'static str>,
    /// What is wrong and what was expected.
    pub message: String,
    /// What to do.
    pub fix: &'static str,
    /// Stable word.
    pub code: &'static str,
}
/// Reading one field.
pub type Read<'p, T> = Result<T, Bad<'p>>;

impl<'p> Bad<'p> {
    /// A value that is not what was expected.
    pub fn value(at: &'p Node<'p>, message: impl Into<String>, fix: &'static str) -> Self {
        Self { at, missing: None, message: message.into(), fix, code: "bad-value" }
    }
    /// A field that must be there and is not.
    pub fn missing(at: &'p Node<'p>, field: &'static str, message: impl Into<String>) -> Self {
        Self { at, missing: Some(field), message: message.into(), fix: "add the field", code: "missing-field" }
    }
    /// It in one line, with its path and line, for what is refused because of it.
    pub fn why(&self, root: &Node<'_>) -> String {
        match path_of(root, self.at) {
            Some(path) if !path.is_empty() => format!("{path}: {} (line {})", self.message, self.at.line),
            _ => self.message.clone(),
        }
    }
    /// The operator's view of it.
    pub fn problem(&self, root: &Node<'_>, place: &Arc<str>, object: &Arc<str>, severity: Severity) -> Problem {
        let mut field = path_of(root, self.at).unwrap_or_default();
        if let Some(missing) = self.missing {
            if !field.is_empty() {
                field.push('.');
            }
            field.push_str(missing);
        }
        Problem {
            severity,
            origin: Origin { place: Arc::clone(place), line: self.at.line, object: Arc::clone(object) },
            field: field.into(),
            message: self.message.as_str().into(),
            fix: self.fix.into(),
            code: Some(self.code),
        }
    }
}

/// Path of `target` (by identity) below `root`.
pub fn path_of(root: &Node<'_>, target: &Node<'_>) -> Option<String> {
    fn walk(node: &Node<'_>, target: &Node<'_>, path: &mut String) -> bool {
        if std::ptr::eq(std::ptr::from_ref(node).cast::<()>(), std::ptr::from_ref(target).cast::<()>()) {
            return true;
        }
        let len = path.len();
        match &node.value {
            Value::Null | Value::Scalar { .. } => {}
            Value::Seq(items) => {
                for (i, item) in items.iter().enumerate() {
                    let _ = write!(path, "[{i}]");
                    if walk(item, target, path) {
                        return true;
                    }
                    path.truncate(len);
                }
            }
            Value::Map(entries) => {
                for e in entries {
                    if e.key.contains(['.', '/', ' ']) {
                        let _ = write!(path, "[{:?}]", e.key);
                    } else {
                        if !path.is_empty() {
                            path.push('.');
                        }
                        path.push_str(&e.key);
                    }
                    if walk(&e.node, target, path) {
                        return true;
                    }
                    path.truncate(len);
                }
            }
        }
        false
    }
    let mut path = String::new();
    walk(root, target, &mut path).then_some(path)
}

/// The entries of a mapping; none when the node is null.
pub fn entries<'p>(node: &'p Node<'p>) -> Read<'p, &'p [Entry<'p>]> {
    match &node.value {
        Value::Map(entries) => Ok(entries),
        Value::Null => Ok(&[]),
        _ => Err(Bad::value(node, format!("expected a mapping, found {}", node.describe()), "write `key: value` lines below it")),
    }
}
/// The mapping below `key`, if there is one.
pub fn map<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, Option<&'p Node<'p>>> {
    entries(node)?;
    match node.get(key) {
        None => Ok(None),
        Some(n) => entries(n).map(|_| Some(n)),
    }
}
/// The list below `key`; empty when absent.
pub fn list<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, &'p [Node<'p>]> {
    entries(node)?;
    match node.get(key) {
        None => Ok(&[]),
        Some(Node { value: Value::Seq(items), .. }) => Ok(items),
        Some(n) => Err(Bad::value(
            n,
            format!("expected a list, found {}", n.describe()),
            "write each element on its own line after `- `",
        )),
    }
}
/// A scalar's text.
pub fn scalar<'p>(node: &'p Node<'p>) -> Read<'p, &'p str> {
    node.text().ok_or_else(|| Bad::value(node, format!("expected text, found {}", node.describe()), "write a single value"))
}
/// The path of a claim: its name, or names with a `.` between them.
pub fn claim_path<'p>(n: &'p Node<'p>) -> Read<'p, Vec<&'p str>> {
    let path: Vec<&str> = scalar(n)?.split('.').collect();
    if path.iter().any(|part| part.is_empty()) {
        return Err(Bad::value(n, "a claim is a name, or names with a `.` between them", ""));
    }
    Ok(path)
}
/// The text below `key`; `None` when absent.
pub fn text<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, Option<&'p str>> {
    entries(node)?;
    node.get(key).map(scalar).transpose()
}
/// The text below `key`, `""` when absent.
pub fn text_or_empty<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, &'p str> {
    Ok(text(node, key)?.unwrap_or_default())
}
/// A flag below `key`; false when absent.
pub fn flag<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, bool> {
    match node.get(key) {
        None => Ok(false),
        Some(n) => match n.text() {
            Some("true" | "True" | "TRUE") => Ok(true),
            Some("false" | "False" | "FALSE") => Ok(false),
            _ => Err(Bad::value(n, "expected `true` or `false`", "")),
        },
    }
}
/// A number below `key`.
pub fn number<'p, T: std::str::FromStr>(node: &'p Node<'p>, key: &str) -> Read<'p, Option<T>> {
    match node.get(key) {
        None => Ok(None),
        Some(n) => {
            n.text().and_then(|t| t.parse().ok()).map(Some).ok_or_else(|| {
                Bad::value(n, format!("expected a whole number, found `{}`", n.text().unwrap_or(n.describe())), "")
            })
        }
    }
}
/// A port, 1 to 65535.
pub fn port<'p>(node: &'p Node<'p>) -> Read<'p, u16> {
    let t = scalar(node)?;
    t.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| t.parse::<u16>().ok())
        .flatten()
        .filter(|p| *p != 0)
        .ok_or_else(|| Bad::value(node, format!("`{t}` is not a port"), "write a number from 1 to 65535"))
}
/// The port below `key`.
pub fn port_at<'p>(node: &'p Node<'p>, key: &'static str) -> Read<'p, u16> {
    node.get(key).map_or_else(|| Err(Bad::missing(node, key, "a port is needed")), port)
}
/// An address.
pub fn ip<'p>(node: &'p Node<'p>) -> Read<'p, IpAddr> {
    let t = scalar(node)?;
    t.parse::<IpAddr>()
        .map(|a| a.to_canonical())
        .map_err(|_| Bad::value(node, format!("`{t}` is not an IP address"), "write an IPv4 or IPv6 address"))
}
/// An address or a CIDR range, host bits cleared, IPv4-mapped ranges as IPv4.
pub fn parse_net(t: &str) -> Option<IpNet> {
    if let Ok(a) = t.parse::<IpAddr>() {
        return Some(IpNet::from(a.to_canonical()));
    }
    let net = t.parse::<IpNet>().ok()?.trunc();
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.network().to_ipv4_mapped()
        && let Some(len) = v6.prefix_len().checked_sub(96)
    {
        return ipnet::Ipv4Net::new(v4, len).ok().map(IpNet::V4);
    }
    Some(net)
}
/// An address or CIDR range node.
pub fn net<'p>(node: &'p Node<'p>) -> Read<'p, IpNet> {
    let t = scalar(node)?;
    parse_net(t).ok_or_else(|| {
        Bad::value(
            node,
            format!("`{t}` is neither an IP address nor a CIDR range"),
            "write for example `10.0.0.0/8` or `10.1.2.3`",
        )
    })
}
/// Refuses fields that are not in `known`.
pub fn only<'p>(node: &'p Node<'p>, known: &[&str]) -> Read<'p, ()> {
    for e in entries(node)? {
        if !known.contains(&&*e.key) {
            let close = known.iter().find(|k| near(k, &e.key));
            let message = match close {
                Some(k) => format!("unknown field `{}`; did you mean `{k}`?", e.key),
                None => format!("unknown field `{}`; known here: {}", e.key, known.join(", ")),
            };
            return Err(Bad { at: &e.node, missing: None, message, fix: "correct or remove it", code: "unknown-field" });
        }
    }
    Ok(())
}
/// Whether two names differ by case, separators, or one edit.
fn near(a: &str, b: &str) -> bool {
    if a.eq_ignore_ascii_case(b) {
        return true;
    }
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.len().abs_diff(b.len()) > 1 {
        return false;
    }
    let front = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let back = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count();
    front + back + 1 >= a.len().max(b.len())
}
/// A duration in Go's syntax (`300ms`, `1.5s`, `1h30m`), as Istio and the Gateway API write them; never negative.
pub fn parse_duration(t: &str) -> Option<Duration> {
    if t == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = t;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, next) = tail.split_at(unit_len);
        let unit: u64 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && part.is_empty()) || part.contains('.') {
            return None;
        }
        let mut nanos = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()?.checked_mul(unit)? };
        // Digits of a fraction below a nanosecond say nothing.
        let mut scale = unit;
        for d in part.bytes() {
            scale /= 10;
            nanos = nanos.checked_add(u64::from(d - b'0') * scale)?;
        }
        total = total.checked_add(Duration::from_nanos(nanos))?;
        rest = next;
    }
    // Go's durations end at 2^63 nanoseconds.
    (!t.is_empty() && total.as_nanos() < 1 << 63).then_some(total)
}
/// The duration below `key`.
pub fn duration<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, Option<Duration>> {
    let Some(n) = node.get(key) else { return Ok(None) };
    let t = scalar(n)?;
    let bad = || Bad::value(n, format!("`{t}` is not a duration"), "write for example `10s`, `250ms` or `1m30s`");
    parse_duration(t).map(Some).ok_or_else(bad)
}
/// A number with a fraction below `key`, finite.
pub fn decimal<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, Option<f64>> {
    let Some(n) = node.get(key) else { return Ok(None) };
    let t = n.text().and_then(|t| t.parse::<f64>().ok()).filter(|v| v.is_finite());
    t.map(Some).ok_or_else(|| Bad::value(n, format!("expected a number, found `{}`", n.text().unwrap_or(n.describe())), ""))
}
/// A mapping of text to text below `key`, as labels. Null values count as empty text, as in the API server.
pub fn labels<'p>(node: &'p Node<'p>, key: &str, pool: &mut Interner) -> Read<'p, Labels> {
    let Some(n) = map(node, key)? else { return Ok(Labels::default()) };
    let mut pairs = Vec::new();
    for e in entries(n)? {
        let v = match &e.node.value {
            Value::Null => "",
            _ => scalar(&e.node)?,
        };
        pairs.push((pool.text(&e.key), pool.text(v)));
    }
    Ok(pool.labels(pairs))
}
/// The value of one annotation.
pub fn annotation<'p>(meta: &'p Node<'p>, name: &str) -> Option<&'p str> {
    meta.get("annotations")?.get(name)?.text()
}
