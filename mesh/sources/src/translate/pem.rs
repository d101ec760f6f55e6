//! Certificates, keys and CA bundles in Secrets and ConfigMaps.
//!
//! Only the entries TLS asks for are kept: what else a cluster holds in its Secrets is none of our business. Nothing here
//! is ever printed.

use std::sync::Arc;

use super::read::{self, Bad, Read};
use crate::yaml::Node;

/// Entries kept: those of `kubernetes.io/tls`, revocation lists, and the older names Istio reads.
const KEPT: &[&str] = &["tls.crt", "tls.key", "ca.crt", "cert", "key", "cacert", "ca.crl", "crl"];

/// The PEM entries of one object, by name.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PemEntries(Vec<(&'static str, Arc<str>)>);
impl std::fmt::Debug for PemEntries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}
impl PemEntries {
    /// One entry.
    pub(super) fn get(&self, name: &str) -> Option<&Arc<str>> {
        self.0.iter().find(|(have, _)| *have == name).map(|(_, text)| text)
    }
    /// Its revocation lists, by either name.
    pub(super) fn lists(&self) -> Option<&Arc<str>> {
        self.get("ca.crl").or_else(|| self.get("crl"))
    }
    fn put(&mut self, name: &str, text: &str) {
        if let Some(name) = KEPT.iter().copied().find(|k| *k == name) {
            self.0.retain(|(have, _)| *have != name);
            self.0.push((name, text.into()));
            self.0.sort_unstable_by_key(|(name, _)| *name);
        }
    }
}

/// A Secret: `data` in base64, `stringData` as it is, which wins.
pub(super) fn secret<'p>(node: &'p Node<'p>) -> Read<'p, PemEntries> {
    let mut out = PemEntries::default();
    if let Some(data) = read::map(node, "data")? {
        for e in read::entries(data)?.iter().filter(|e| KEPT.contains(&&*e.key)) {
            let bytes = base64(read::scalar(&e.node)?);
            let text = bytes.and_then(|b| String::from_utf8(b).ok());
            let text = text.ok_or_else(|| Bad::value(&e.node, "not PEM text in base64", "use `stringData` for plain text"))?;
            out.put(&e.key, &text);
        }
    }
    plain(node, "stringData", &mut out)?;
    Ok(out)
}
/// A ConfigMap: `data` as it is.
pub(super) fn config_map<'p>(node: &'p Node<'p>) -> Read<'p, PemEntries> {
    let mut out = PemEntries::default();
    plain(node, "data", &mut out)?;
    Ok(out)
}
fn plain<'p>(node: &'p Node<'p>, key: &str, out: &mut PemEntries) -> Read<'p, ()> {
    if let Some(data) = read::map(node, key)? {
        for e in read::entries(data)?.iter().filter(|e| KEPT.contains(&&*e.key)) {
            out.put(&e.key, read::scalar(&e.node)?);
        }
    }
    Ok(())
}

/// Base64 as the Kubernetes API writes it (RFC 4648 §4, padded), line breaks allowed.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held, mut padding) = (0u32, 0u8, 0u8);
    for b in text.bytes().filter(|b| !b.is_ascii_whitespace()) {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                padding += 1;
                if padding > 2 {
                    return None;
                }
                continue;
            }
            _ => return None,
        };
        if padding > 0 {
            return None;
        }
        bits = bits << 6 | u32::from(value);
        held += 1;
        if held == 4 {
            let [_, a, b, c] = bits.to_be_bytes();
            out.extend([a, b, c]);
            (bits, held) = (0, 0);
        }
    }
    match (held, padding) {
        (0, 0) => {}
        (2, 2) if bits.trailing_zeros() >= 4 => out.push((bits >> 4) as u8),
        (3, 1) if bits.trailing_zeros() >= 2 => out.extend_from_slice(&((bits >> 2) as u16).to_be_bytes()),
        _ => return None,
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_strict() {
        for (text, want) in [
            ("", Some("")),
            ("Zg==", Some("f")),
            ("Zm8=", Some("fo")),
            ("Zm9v", Some("foo")),
            ("Zm9v\nYmFy", Some("foobar")),
            ("Zm9", None),
            ("Zg=", None),
            ("Zh==", None),
            ("Zg==Zg==", None),
            ("Zm9v====", None),
            ("Zm-v", None),
            ("====", None),
        ] {
            assert_eq!(base64(text).as_deref(), want.map(str::as_bytes), "{text}");
        }
    }
}
