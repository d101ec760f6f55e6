//! What a service or gateway does with every request and answer beside routing: TrafficPolicies (and the EnvoyFilters that say
//! the same), compiled and joined per target.
//!
//! A policy that could not be understood is a value that refuses what it binds, as everywhere. Upstream: `mesh-sources`.
//! Downstream: the waypoint's phases `limit`, `buffer`, `cors`, `dress`, `compress`.
use crate::l7::compression::Compression;
use crate::l7::headers::HeaderEdits;
use crate::l7::limit::Limit;
use crate::l7::policy::PathPattern;
use crate::l7::route::Cors;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use std::sync::Arc;

/// Everything said about one target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Treatment {
    /// One of its policies could not be understood, and which, and why: everything is refused.
    pub broken: Option<Arc<str>>,
    /// Limits; each must let a request through.
    pub limits: Vec<Arc<Limit>>,
    /// Largest request body in bytes. Bodies are taken in whole before anything goes upstream.
    pub max_request_bytes: Option<u64>,
    /// CORS of routes that say nothing of it.
    pub cors: Option<Arc<Cors>>,
    /// Edits of every answer's headers, also of those made here.
    pub response: Vec<HeaderEdits>,
    /// `cache-control` of answers that have none: the first that matches.
    pub cache: Vec<CacheRule>,
    /// Compression.
    pub compression: Option<Arc<Compression>>,
}
/// How long answers may be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheRule {
    /// Paths: any of them; none: all.
    pub paths: Vec<PathPattern>,
    /// `cache-control`.
    pub value: HeaderValue,
}

/// What concerns one request: of its service, of its gateway or waypoint, of all waypoints, of policies whose targets could not
/// be read; the most specific first.
#[derive(Clone, Debug, Default)]
pub struct Treatments(Arc<[Arc<Treatment>]>);
impl Treatments {
    /// In the order of [`crate::authz_l7::PolicyScope::targets`].
    pub fn new(all: impl IntoIterator<Item = Arc<Treatment>>) -> Self {
        Self(all.into_iter().collect())
    }
    /// The most specific first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<Treatment>> {
        self.0.iter()
    }
    /// Why everything is refused, if it is.
    pub fn broken(&self) -> Option<&Arc<str>> {
        self.iter().find_map(|t| t.broken.as_ref())
    }
    /// The most specific.
    pub fn cors(&self) -> Option<&Arc<Cors>> {
        self.iter().find_map(|t| t.cors.as_ref())
    }
    /// The most specific.
    pub fn compression(&self) -> Option<&Arc<Compression>> {
        self.iter().find_map(|t| t.compression.as_ref())
    }
    /// The smallest: whoever said so meant it.
    pub fn max_request_bytes(&self) -> Option<u64> {
        self.iter().filter_map(|t| t.max_request_bytes).min()
    }
    /// Edits the headers of an answer: `cache-control` first, then from the least specific to the most.
    pub fn dress(&self, method: &Method, path: &str, status: StatusCode, headers: &mut HeaderMap) {
        if let Some(value) = self.cache_control(method, path, status, headers) {
            headers.insert(header::CACHE_CONTROL, value.clone());
        }
        for edits in self.iter().rev().flat_map(|t| &t.response) {
            edits.apply(headers);
        }
    }
    /// For answers to GET and HEAD that caches may keep by themselves (200, 203, 301, 304, 308) and that do not speak for
    /// themselves: neither `cache-control` nor a cookie of somebody's own.
    fn cache_control(&self, method: &Method, path: &str, status: StatusCode, headers: &HeaderMap) -> Option<&HeaderValue> {
        let fits = matches!(*method, Method::GET | Method::HEAD)
            && matches!(status.as_u16(), 200 | 203 | 301 | 304 | 308)
            && !headers.contains_key(header::CACHE_CONTROL)
            && !headers.contains_key(header::SET_COOKIE);
        let mut rules = self.iter().flat_map(|t| &t.cache).filter(|_| fits);
        rules.find(|r| r.paths.is_empty() || r.paths.iter().any(|p| p.matches(path))).map(|r| &r.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;

    fn set(name: &'static str, value: &'static str) -> HeaderEdits {
        let set = vec![(HeaderName::from_static(name), HeaderValue::from_static(value))];
        HeaderEdits { set, ..HeaderEdits::default() }
    }
    fn rule(path: &str, value: &'static str) -> CacheRule {
        CacheRule { paths: vec![PathPattern::parse(path).expect("a path")], value: HeaderValue::from_static(value) }
    }
    fn only(all: [Treatment; 2]) -> Treatments {
        Treatments::new(all.map(Arc::new))
    }

    #[test]
    fn the_most_specific_speaks_last_and_decides_alone() {
        let service = Treatment {
            response: vec![set("x-frame-options", "SAMEORIGIN")],
            max_request_bytes: Some(100),
            ..Treatment::default()
        };
        let gateway = Treatment {
            response: vec![set("x-frame-options", "DENY"), set("x-a", "1")],
            max_request_bytes: Some(10),
            cors: Some(Arc::default()),
            ..Treatment::default()
        };
        let all = only([service, gateway]);
        let mut headers = HeaderMap::new();
        all.dress(&Method::GET, "/", StatusCode::FORBIDDEN, &mut headers);
        assert_eq!(headers["x-frame-options"], "SAMEORIGIN");
        assert_eq!(headers["x-a"], "1");
        assert_eq!(all.max_request_bytes(), Some(10));
        assert!(all.cors().is_some() && all.broken().is_none());
    }
    #[test]
    fn answers_are_kept_only_when_they_say_nothing_themselves() {
        let cache = vec![rule("/static/*", "max-age=31536000"), rule("*", "no-cache")];
        let all = only([Treatment { cache, ..Treatment::default() }, Treatment::default()]);
        for (method, path, status, more, expect) in [
            (Method::GET, "/static/a.js", 200, &[][..], Some("max-age=31536000")),
            (Method::HEAD, "/static/a.js", 304, &[], Some("max-age=31536000")),
            (Method::GET, "/", 200, &[], Some("no-cache")),
            (Method::POST, "/static/a.js", 200, &[], None),
            (Method::GET, "/static/a.js", 404, &[], None),
            (Method::GET, "/static/a.js", 206, &[], None),
            (Method::GET, "/static/a.js", 200, &[("cache-control", "private")], Some("private")),
            (Method::GET, "/static/a.js", 200, &[("set-cookie", "a=b")], None),
        ] {
            let mut headers: HeaderMap =
                more.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect();
            all.dress(&method, path, StatusCode::from_u16(status).expect("a status"), &mut headers);
            let got = headers.get(header::CACHE_CONTROL).map(|v| v.to_str().expect("ascii"));
            assert_eq!(got, expect, "{method} {path} {status} {more:?}");
        }
    }
}
