//! The header fields of HBONE: `baggage`, `forwarded`, `traceparent`, `x-culvert-reason`.
//!
//! Owns their exact bytes (spec: Istio's ambient wire format; W3C Baggage and Trace Context; RFC 7239). All functions are
//! pure and bounded. What a peer sent is parsed leniently, because it only feeds telemetry: an entry that makes no sense is
//! skipped, never an error. It refuses to decide anything security relevant from them.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::net::SocketAddr;

use http::header::{HeaderName, HeaderValue};
use mesh_model::SpiffeId;
pub use mesh_model::telemetry::context::{TRACEPARENT, TraceParent};
use mesh_model::workload::Workload;

/// `baggage` (W3C Baggage).
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// `x-forwarded-network`: the network the inner tunnel of double HBONE came from.
pub const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");
/// `x-culvert-reason`: `<reason>: <detail>` on refusals, so that the client side can log why.
pub const CULVERT_REASON: HeaderName = HeaderName::from_static("x-culvert-reason");

/// Longest `baggage` read or written, in bytes (W3C Baggage §3.3.2 asks for at least 8192).
pub const MAX_BAGGAGE: usize = 8192;

/// The workload a baggage describes. Empty means unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage<'a> {
    /// `k8s.cluster.name`.
    pub cluster: Cow<'a, str>,
    /// `k8s.namespace.name`.
    pub namespace: Cow<'a, str>,
    /// What kind of object `workload` names; decides its key.
    pub kind: WorkloadKind,
    /// `k8s.<kind>.name`.
    pub workload: Cow<'a, str>,
    /// `service.name`: the canonical service.
    pub service: Cow<'a, str>,
    /// `service.version`: the canonical revision.
    pub version: Cow<'a, str>,
    /// `cloud.region`.
    pub region: Cow<'a, str>,
    /// `cloud.availability_zone`.
    pub zone: Cow<'a, str>,
}

/// Kind of a workload, as the `k8s.<kind>.name` key spells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkloadKind {
    /// `k8s.deployment.name`.
    #[default]
    Deployment,
    /// `k8s.cronjob.name`.
    CronJob,
    /// `k8s.pod.name`.
    Pod,
    /// `k8s.job.name`.
    Job,
}

impl WorkloadKind {
    fn of(word: &str) -> Self {
        let all = [Self::CronJob, Self::Pod, Self::Job];
        all.into_iter().find(|kind| kind.word() == word).unwrap_or_default()
    }
    /// As the model writes it.
    fn word(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
    fn key(self) -> &'static str {
        match self {
            Self::Deployment => "k8s.deployment.name",
            Self::CronJob => "k8s.cronjob.name",
            Self::Pod => "k8s.pod.name",
            Self::Job => "k8s.job.name",
        }
    }
}

impl Baggage<'_> {
    /// What describes a workload (spec/node-agent §1.5).
    pub fn of(w: &Workload) -> Baggage<'_> {
        Baggage {
            cluster: Cow::Borrowed(&w.cluster),
            namespace: Cow::Borrowed(&w.namespace),
            kind: WorkloadKind::of(&w.workload_type),
            workload: Cow::Borrowed(&w.workload_name),
            service: Cow::Borrowed(&w.canonical_name),
            version: Cow::Borrowed(&w.canonical_revision),
            region: Cow::Borrowed(&w.locality.region),
            zone: Cow::Borrowed(&w.locality.zone),
        }
    }

    /// The header value, or `None` when everything is empty. Entries that would pass [`MAX_BAGGAGE`] are left out.
    pub fn encode(&self) -> Option<HeaderValue> {
        let mut out = String::new();
        for (key, value) in [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (self.kind.key(), &self.workload),
            ("service.name", &self.service),
            ("service.version", &self.version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ] {
            let before = out.len();
            if value.is_empty() {
                continue;
            }
            if before > 0 {
                out.push(',');
            }
            out.push_str(key);
            out.push('=');
            percent_encode(value, &mut out);
            if out.len() > MAX_BAGGAGE {
                out.truncate(before);
            }
        }
        if out.is_empty() { None } else { HeaderValue::try_from(out).ok() }
    }
}

impl<'a> Baggage<'a> {
    /// Reads a baggage. Unknown keys, properties after `;`, malformed entries and what lies beyond [`MAX_BAGGAGE`] are
    /// skipped; the first occurrence of a key wins.
    pub fn parse(value: &'a [u8]) -> Self {
        let mut out = Self::default();
        let value = value.get(..value.len().min(MAX_BAGGAGE)).unwrap_or_default();
        for entry in value.split(|byte| *byte == b',') {
            let Ok(entry) = std::str::from_utf8(entry) else { continue };
            let pair = entry.split(';').next().unwrap_or_default();
            let Some((key, value)) = pair.split_once('=') else { continue };
            let Some(value) = percent_decode(value.trim()) else { continue };
            let (slot, kind) = match key.trim() {
                "k8s.cluster.name" => (&mut out.cluster, None),
                "k8s.namespace.name" => (&mut out.namespace, None),
                "k8s.deployment.name" => (&mut out.workload, Some(WorkloadKind::Deployment)),
                "k8s.cronjob.name" => (&mut out.workload, Some(WorkloadKind::CronJob)),
                "k8s.pod.name" => (&mut out.workload, Some(WorkloadKind::Pod)),
                "k8s.job.name" => (&mut out.workload, Some(WorkloadKind::Job)),
                "service.name" => (&mut out.service, None),
                "service.version" => (&mut out.version, None),
                "cloud.region" => (&mut out.region, None),
                "cloud.availability_zone" => (&mut out.zone, None),
                _ => continue,
            };
            if slot.is_empty() && !value.is_empty() {
                *slot = value;
                if let Some(kind) = kind {
                    out.kind = kind;
                }
            }
        }
        out
    }

    /// The workload it describes, for labels, of a peer that proved this identity: that says more than any header.
    pub fn workload(&self, id: &SpiffeId) -> Workload {
        let mut w = Workload::new("", &self.workload, id.namespace());
        w.service_account = id.service_account().into();
        w.workload_type = self.kind.word().into();
        w.cluster = (&*self.cluster).into();
        w.canonical_name = (&*self.service).into();
        w.canonical_revision = (&*self.version).into();
        w.locality.region = (&*self.region).into();
        w.locality.zone = (&*self.zone).into();
        w
    }

    /// The same baggage, owning its text.
    pub fn into_owned(self) -> Baggage<'static> {
        let own = |text: Cow<'a, str>| Cow::Owned(text.into_owned());
        Baggage {
            cluster: own(self.cluster),
            namespace: own(self.namespace),
            kind: self.kind,
            workload: own(self.workload),
            service: own(self.service),
            version: own(self.version),
            region: own(self.region),
            zone: own(self.zone),
        }
    }
}

const HEX: &[u8; 16] = b"0123456789ABCDEF";

fn hex_upper(nibble: u8) -> char {
    HEX.get(usize::from(nibble & 0xf)).copied().map_or('0', char::from)
}

/// W3C baggage-octet, less `%` which introduces an escape (Baggage §3.3.1.1.3).
fn is_baggage_octet(byte: u8) -> bool {
    matches!(byte, 0x21 | 0x23..=0x24 | 0x26..=0x2b | 0x2d..=0x3a | 0x3c..=0x5b | 0x5d..=0x7e)
}

fn percent_encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if is_baggage_octet(byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(hex_upper(byte >> 4));
            out.push(hex_upper(byte));
        }
    }
}

/// `None` for a broken escape or for bytes that are not UTF-8.
fn percent_decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = hex_value(bytes.next()?)?;
            let low = hex_value(bytes.next()?)?;
            out.push(high << 4 | low);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok().map(Cow::Owned)
}

fn hex_value(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// `forwarded: for="ip:port"[;host=name]` (RFC 7239; IPv6 in brackets). A `host` that is not plain token characters is
/// left out rather than quoted wrongly.
pub fn forwarded(client: SocketAddr, host: Option<&str>) -> Option<HeaderValue> {
    let mut out = String::with_capacity(80);
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    write!(out, "for=\"{client}\"").ok()?;
    if let Some(host) = host.filter(|host| is_host(host)) {
        out.push_str(";host=");
        out.push_str(host);
    }
    HeaderValue::try_from(out).ok()
}

fn is_host(host: &str) -> bool {
    !host.is_empty()
        && host.len() <= 260
        && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'*'))
}

/// What a `forwarded` header says about its first hop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarded<'a> {
    /// `for`, when it is an address with a port.
    pub client: Option<SocketAddr>,
    /// `host`.
    pub host: Option<&'a str>,
}

impl<'a> Forwarded<'a> {
    /// Reads the first element of the list; unknown parameters and nonsense are skipped.
    pub fn parse(value: &'a [u8]) -> Self {
        let mut out = Self::default();
        let value = value.get(..value.len().min(1024)).unwrap_or_default();
        let Ok(value) = std::str::from_utf8(value) else { return out };
        let first = value.split(',').next().unwrap_or_default();
        for pair in first.split(';') {
            let Some((key, value)) = pair.split_once('=') else { continue };
            let value = value.trim();
            let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
            if key.trim().eq_ignore_ascii_case("for") && out.client.is_none() {
                out.client = value.parse().ok();
            } else if key.trim().eq_ignore_ascii_case("host") && out.host.is_none() && !value.is_empty() {
                out.host = Some(value);
            }
        }
        out
    }
}

/// A new, unsampled `traceparent`, as Istio's agents send with every connection.
pub fn random_traceparent() -> Option<HeaderValue> {
    TraceParent { trace: rand::random::<u128>().max(1), parent: rand::random::<u64>().max(1), flags: 0 }.encode()
}

#[cfg(test)]
mod tests;
