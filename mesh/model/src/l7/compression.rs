//! Compression of responses: which, and how (Envoy's compressor filter, measured on 1.40).
//!
//! Departs from Envoy where its answer would be wrong: parts of a resource (206, `content-range`) and event streams are never
//! compressed, and codings are compared without regard to case (RFC 9110 §8.4.1).
use http::StatusCode;
use http::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue,
    TRANSFER_ENCODING, UPGRADE, VARY,
};
use std::sync::Arc;

/// A content coding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coding {
    /// `gzip`.
    Gzip,
    /// `br`.
    Brotli,
    /// `zstd`.
    Zstd,
}
impl Coding {
    /// As in `content-encoding`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Brotli => "br",
            Self::Zstd => "zstd",
        }
    }
    /// From its name in `content-encoding`, of any case.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Gzip, Self::Brotli, Self::Zstd].into_iter().find(|c| c.as_str().eq_ignore_ascii_case(name))
    }
}

/// What is compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compression {
    /// Codings, the preferred first.
    pub codings: Vec<Coding>,
    /// A response that says it is shorter is left alone. One that does not say is not.
    pub min_bytes: u64,
    /// Media types, lower case.
    pub types: Vec<Arc<str>>,
    /// Whether a strong `etag` forbids it; otherwise the tag is taken away, as it is not the one of what is sent.
    pub keep_etag: bool,
    /// Whether the upstream is not told what the client accepts, so that it leaves the work to us.
    pub hide_accept: bool,
}
impl Compression {
    /// Envoy's least size.
    pub const MIN_BYTES: u64 = 30;
    /// Envoy's media types.
    pub const TYPES: [&str; 18] = [
        "text/html",
        "text/plain",
        "text/css",
        "application/javascript",
        "application/x-javascript",
        "text/javascript",
        "text/x-javascript",
        "text/ecmascript",
        "text/js",
        "text/jscript",
        "text/x-js",
        "application/ecmascript",
        "application/x-json",
        "application/xml",
        "application/json",
        "image/svg+xml",
        "text/xml",
        "application/xhtml+xml",
    ];
    /// Types that are never compressed: a buffered event is a late one, and gRPC has its own way.
    pub fn never(media_type: &str) -> bool {
        media_type == "text/event-stream" || media_type.starts_with("application/grpc")
    }

    /// What the client prefers of what there is: by weight, then in our order. `None`: nothing, or it prefers it as it is.
    pub fn choose(&self, headers: &HeaderMap) -> Option<Coding> {
        let weights = Weights::read(headers);
        let mut best: Option<(u16, Coding)> = None;
        for coding in &self.codings {
            let weight = weights.of(coding.as_str());
            if weight > 0 && best.is_none_or(|(b, _)| weight > b) {
                best = Some((weight, *coding));
            }
        }
        best.filter(|(weight, _)| *weight >= weights.identity).map(|(_, coding)| coding)
    }

    /// Whether a response could be compressed, whatever this client accepts. If so it varies by what clients accept. `length` is
    /// the body's when no header says it.
    pub fn concerns(&self, status: StatusCode, headers: &HeaderMap, length: Option<u64>) -> bool {
        let media = headers.get(CONTENT_TYPE).map(media_type);
        // What says nothing of its type may be any of them.
        let listed = media.is_none_or(|media| self.types.iter().any(|t| t.as_bytes().eq_ignore_ascii_case(media)));
        let part = status == StatusCode::PARTIAL_CONTENT || headers.contains_key(CONTENT_RANGE);
        let said = headers.get(CONTENT_LENGTH).map(|v| v.to_str().ok().and_then(|t| t.parse::<u64>().ok()).unwrap_or(0));
        let short = said.or(length).is_some_and(|n| n < self.min_bytes);
        listed
            && !part
            && !short
            && !headers.contains_key(CONTENT_ENCODING)
            && !headers.contains_key(TRANSFER_ENCODING)
            && !headers.contains_key(UPGRADE)
            && !lists(headers, &CACHE_CONTROL, "no-transform")
            && !(self.keep_etag && headers.get(ETAG).is_some_and(strong))
    }
    /// Says of a response that it is compressed.
    pub fn mark(coding: Coding, headers: &mut HeaderMap) {
        headers.remove(CONTENT_LENGTH);
        headers.remove("accept-ranges");
        if headers.get(ETAG).is_some_and(strong) {
            headers.remove(ETAG);
        }
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding.as_str()));
    }
    /// Says of a response that clients who accept other codings get another one.
    pub fn vary(headers: &mut HeaderMap) {
        const NAME: &str = "Accept-Encoding";
        if lists(headers, &VARY, NAME) || lists(headers, &VARY, "*") {
            return;
        }
        let value = match headers.get(VARY).and_then(|v| v.to_str().ok()).filter(|v| !v.is_empty()) {
            Some(old) if headers.get_all(VARY).iter().nth(1).is_none() => HeaderValue::try_from(format!("{old}, {NAME}")).ok(),
            Some(_) => {
                headers.append(VARY, HeaderValue::from_static(NAME));
                return;
            }
            None => None,
        };
        headers.insert(VARY, value.unwrap_or(HeaderValue::from_static(NAME)));
    }
}

/// A media type without its parameters.
fn media_type(value: &HeaderValue) -> &[u8] {
    value.as_bytes().split(|b| *b == b';').next().unwrap_or_default().trim_ascii()
}
fn strong(etag: &HeaderValue) -> bool {
    !etag.as_bytes().get(..2).is_some_and(|p| p.eq_ignore_ascii_case(b"w/"))
}
/// Whether a list header has this element, of any case.
fn lists(headers: &HeaderMap, name: &http::HeaderName, element: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).any(|e| e.trim().eq_ignore_ascii_case(element))
}

/// `accept-encoding`, in thousandths.
struct Weights<'h> {
    headers: &'h HeaderMap,
    /// What is not listed, if `*` is.
    other: Option<u16>,
    identity: u16,
}
impl<'h> Weights<'h> {
    fn read(headers: &'h HeaderMap) -> Self {
        let mut out = Self { headers, other: None, identity: 0 };
        out.other = out.find("*");
        // What is sent as it is needs no mention; only one that weighs more than a coding wins against it.
        out.identity = out.find("identity").unwrap_or(0);
        out
    }
    fn of(&self, coding: &str) -> u16 {
        // `x-gzip` is the old name (RFC 9110 §8.4.1.3).
        let alias = if coding == "gzip" { self.find("x-gzip") } else { None };
        self.find(coding).or(alias).or(self.other).unwrap_or(0)
    }
    fn find(&self, coding: &str) -> Option<u16> {
        let values = self.headers.get_all(http::header::ACCEPT_ENCODING).iter().filter_map(|v| v.to_str().ok());
        values.flat_map(|v| v.split(',')).find_map(|element| {
            let mut parts = element.split(';').map(str::trim);
            parts.next().filter(|name| name.eq_ignore_ascii_case(coding))?;
            let q = parts.find_map(|p| p.strip_prefix("q=").or_else(|| p.strip_prefix("Q=")));
            Some(q.map_or(1000, weight))
        })
    }
}
/// A weight in thousandths; what is none counts as "not acceptable".
fn weight(text: &str) -> u16 {
    let text = text.trim();
    text.parse::<f32>().ok().filter(|q| (0.0..=1.0).contains(q)).map_or(0, |q| (q * 1000.0).round() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;

    fn headers(all: &[(&'static str, &'static str)]) -> HeaderMap {
        all.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }
    fn all() -> Compression {
        Compression {
            codings: vec![Coding::Zstd, Coding::Brotli, Coding::Gzip],
            min_bytes: 100,
            types: Compression::TYPES.iter().map(|t| (*t).into()).collect(),
            keep_etag: false,
            hide_accept: false,
        }
    }

    #[test]
    fn the_client_chooses() {
        for (accept, expect) in [
            ("gzip", Some("gzip")),
            ("GZIP", Some("gzip")),
            ("x-gzip", Some("gzip")),
            ("gzip, deflate, br", Some("br")),
            ("gzip, deflate, br, zstd", Some("zstd")),
            ("gzip;q=1.0, br;q=0.5", Some("gzip")),
            ("br ; q=0.5 , gzip;q=0.4", Some("br")),
            ("*", Some("zstd")),
            ("zstd;q=0, *", Some("br")),
            ("*;q=0, gzip", Some("gzip")),
            ("gzip;q=0", None),
            ("gzip;q=0.000", None),
            ("gzip;q=0.001", Some("gzip")),
            ("gzip;q=2", None),
            ("gzip;q=x", None),
            ("identity", None),
            ("gzip;q=0.5, identity", None),
            ("identity;q=0.5, gzip;q=0.2", None),
            ("identity;q=0.5, gzip;q=0.5", Some("gzip")),
            ("deflate", None),
            ("", None),
        ] {
            let got = all().choose(&headers(&[("accept-encoding", accept)]));
            assert_eq!(got.map(Coding::as_str), expect, "{accept}");
        }
        assert_eq!(all().choose(&HeaderMap::new()), None, "who says nothing gets it as it is");
        let only_gzip = Compression { codings: vec![Coding::Gzip], ..all() };
        assert_eq!(only_gzip.choose(&headers(&[("accept-encoding", "br, gzip;q=0.1")])), Some(Coding::Gzip));
    }
    #[test]
    fn what_may_be_compressed() {
        let json = ("content-type", "application/json");
        for (status, more, expect) in [
            (200, &[json][..], true),
            (404, &[json], true),
            (200, &[("content-type", "Text/HTML; charset=utf-8")], true),
            (200, &[("content-type", "image/png")], false),
            (200, &[("content-type", "text/event-stream")], false),
            (200, &[], true),
            (200, &[json, ("content-length", "100")], true),
            (200, &[json, ("content-length", "99")], false),
            (200, &[json, ("content-length", "x")], false),
            (200, &[json, ("content-encoding", "br")], false),
            (200, &[json, ("content-encoding", "identity")], false),
            (200, &[json, ("cache-control", "public, No-Transform")], false),
            (200, &[json, ("cache-control", "max-age=3")], true),
            (206, &[json], false),
            (200, &[json, ("content-range", "bytes 0-1/2")], false),
            (101, &[json, ("upgrade", "x")], false),
            (200, &[json, ("etag", "\"a\"")], true),
        ] {
            let status = StatusCode::from_u16(status).expect("a status");
            assert_eq!(all().concerns(status, &headers(more), None), expect, "{status} {more:?}");
        }
        assert!(!all().concerns(StatusCode::OK, &headers(&[json]), Some(99)), "made here");
        assert!(all().concerns(StatusCode::OK, &headers(&[json, ("content-length", "100")]), Some(0)), "HEAD");
        let careful = Compression { keep_etag: true, ..all() };
        assert!(!careful.concerns(StatusCode::OK, &headers(&[json, ("etag", "\"a\"")]), None));
        assert!(careful.concerns(StatusCode::OK, &headers(&[json, ("etag", "W/\"a\"")]), None));
    }
    #[test]
    fn what_a_compressed_response_says() {
        let mut strong = headers(&[("content-length", "500"), ("etag", "\"a\""), ("accept-ranges", "bytes")]);
        Compression::mark(Coding::Brotli, &mut strong);
        assert_eq!(strong, headers(&[("content-encoding", "br")]));
        let mut weak = headers(&[("etag", "W/\"a\"")]);
        Compression::mark(Coding::Gzip, &mut weak);
        assert_eq!(weak, headers(&[("etag", "W/\"a\""), ("content-encoding", "gzip")]));
    }
    #[test]
    fn vary_is_added_once() {
        for (before, after) in [
            (&[][..], &["Accept-Encoding"][..]),
            (&["origin"], &["origin, Accept-Encoding"]),
            (&["accept-encoding"], &["accept-encoding"]),
            (&["origin, Accept-encoding"], &["origin, Accept-encoding"]),
            (&["*"], &["*"]),
            (&["a", "b"], &["a", "b", "Accept-Encoding"]),
        ] {
            let mut map = HeaderMap::new();
            for value in before {
                map.append(VARY, HeaderValue::from_static(value));
            }
            Compression::vary(&mut map);
            let got: Vec<&str> = map.get_all(VARY).iter().map(|v| v.to_str().expect("ascii")).collect();
            assert_eq!(got, after);
        }
    }
}
