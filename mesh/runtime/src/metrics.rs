//! Counters of the process and their text exposition (`/metrics`, `/stats/prometheus`).
//!
//! Two kinds live side by side. What is registered once (build info, queue depths) uses the `prometheus` crate. Series per
//! workload use [`Family`]: a label set is looked up once per connection, its handle is one atomic add afterwards, and series
//! nobody holds any more expire, because a node sees an endless stream of pods. Owns no metric itself but those of the process;
//! names and labels belong to the crates that count.

mod exposition;
mod family;
mod process;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, VARY};
use http::{HeaderValue, Method, StatusCode};
use parking_lot::Mutex;
use prometheus::TextEncoder;
use prometheus::core::Collector;

pub use exposition::{Samples, Scrape};
pub use family::{Counter, Family, Gauge, Histogram, Series, connect_times};
pub use process::resident_bytes;

use crate::admin::{HttpServer, Request, Response, respond, text};
use exposition::{Computed, Expose};

/// What a full family could not take.
const LOST: &str = "culvert_metrics_series_lost_total";
/// Content type of the text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of the process. Cheap to clone.
#[derive(Clone, Default)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    plain: prometheus::Registry,
    families: Mutex<Families>,
}

#[derive(Default)]
struct Families {
    names: BTreeSet<String>,
    exposed: Vec<Arc<dyn Expose>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("families", &self.inner.families.lock().names).finish_non_exhaustive()
    }
}

/// A metric that cannot be registered.
#[derive(Debug, thiserror::Error)]
pub enum MetricError {
    /// Not `[a-zA-Z_:][a-zA-Z0-9_:]*`.
    #[error("metric {0:?}: not a valid metric or label name")]
    BadName(String),
    /// The name is taken.
    #[error("metric {0:?} is registered twice")]
    Duplicate(String),
    /// The `prometheus` crate refuses it.
    #[error(transparent)]
    Refused(#[from] prometheus::Error),
}

impl Registry {
    /// No metrics yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a metric of the `prometheus` crate; keep a clone of it to count.
    pub fn register<C: Collector + Clone + 'static>(&self, metric: C) -> Result<C, MetricError> {
        let mut families = self.inner.families.lock();
        for desc in metric.desc() {
            if families.names.contains(&desc.fq_name) {
                return Err(MetricError::Duplicate(desc.fq_name.clone()));
            }
        }
        self.inner.plain.register(Box::new(metric.clone()))?;
        families.names.extend(metric.desc().into_iter().map(|desc| desc.fq_name.clone()));
        Ok(metric)
    }

    /// Registers a family.
    pub fn family<S: Series>(&self, family: Family<S>) -> Result<Family<S>, MetricError> {
        if let Some(bad) = exposition::bad_name(family.name(), family.label_names()) {
            return Err(MetricError::BadName(bad.to_owned()));
        }
        let mut families = self.inner.families.lock();
        if !families.names.insert(family.name().to_owned()) {
            return Err(MetricError::Duplicate(family.name().to_owned()));
        }
        families.exposed.push(family.exposed());
        Ok(family)
    }

    /// Registers metrics that `write` computes at each scrape, on the scraping thread. `names`: all families it may write,
    /// none of which may exist yet.
    pub fn on_scrape<F>(&self, names: &[&str], write: F) -> Result<(), MetricError>
    where
        F: Fn(&mut Scrape<'_>) + Send + Sync + 'static,
    {
        let mut families = self.inner.families.lock();
        for name in names {
            if exposition::bad_name(name, &[]).is_some() {
                return Err(MetricError::BadName((*name).to_owned()));
            }
            if families.names.contains(*name) {
                return Err(MetricError::Duplicate((*name).to_owned()));
            }
        }
        families.names.extend(names.iter().map(|name| (*name).to_owned()));
        families.exposed.push(Arc::new(Computed(write)));
        Ok(())
    }

    /// Registers the metrics of the process itself: open and maximal descriptors, resident memory, CPU time.
    pub fn process(&self) -> Result<(), MetricError> {
        let mut families = self.inner.families.lock();
        for name in process::NAMES {
            if !families.names.insert((*name).to_owned()) {
                return Err(MetricError::Duplicate((*name).to_owned()));
            }
        }
        families.exposed.push(Arc::new(process::Process));
        Ok(())
    }

    /// Registers `istio_build{component,tag} 1`, by which dashboards find the version.
    pub fn build_info(&self, component: &str, tag: &str) -> Result<(), MetricError> {
        let family = self.family(Family::<Gauge>::new("istio_build", "Istio component build info", &["component", "tag"]))?;
        family.pin(&[component, tag]).set(1);
        Ok(())
    }

    /// The text exposition of everything. Runs on the scraping thread; families are read under their own locks.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail, so the only error is a metric that contradicts itself; the rest still shows.
        if let Err(error) = TextEncoder::new().encode_utf8(&self.inner.plain.gather(), &mut out) {
            tracing::warn!(%error, "a metric cannot be encoded");
        }
        let exposed = self.inner.families.lock().exposed.clone();
        let mut lost = 0;
        for family in exposed {
            family.expose(&mut out);
            lost += family.lost();
        }
        if lost == 0 {
            return out;
        }
        let mut scrape = Scrape::new(&mut out);
        scrape.family(LOST, "Counts in series that were not made because their family is full", "counter").put(&[], lost);
        out
    }

    /// Drops series of all families that nobody holds and nobody asked for since `older_than`. Call it now and then
    /// (half of `older_than` is a good period): idleness is measured between calls. Returns how many were dropped.
    pub fn sweep(&self, older_than: std::time::Duration) -> usize {
        let exposed = self.inner.families.lock().exposed.clone();
        exposed.iter().map(|family| family.sweep(older_than)).sum()
    }

    /// The answer to a scrape: gzip when the client takes it.
    pub fn answer(&self, request: &Request) -> Response {
        let body = self.encode();
        if !accepts_gzip(request) {
            return respond(StatusCode::OK, TEXT_FORMAT, body.into());
        }
        match gzip(body.as_bytes()) {
            Ok(packed) => {
                let mut response = respond(StatusCode::OK, TEXT_FORMAT, packed);
                response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                response.headers_mut().insert(VARY, HeaderValue::from_static("accept-encoding"));
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot compress: {error}\n")),
        }
    }

    /// Adds `GET /metrics` and `GET /stats/prometheus` to a server.
    #[must_use]
    pub fn route(&self, server: HttpServer) -> HttpServer {
        ["/metrics", "/stats/prometheus"].into_iter().fold(server, |server, path| {
            let registry = self.clone();
            server.route(Method::GET, path, move |request| registry.answer(&request))
        })
    }
}

fn accepts_gzip(request: &Request) -> bool {
    request.headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').any(|coding| {
            let mut parts = coding.split(';').map(str::trim);
            let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("gzip") || name == "*");
            // `q=0` means "not this one" (RFC 9110 §12.5.3).
            named
                && !parts
                    .any(|parameter| parameter.strip_prefix("q=").and_then(|q| q.parse::<f32>().ok()).is_some_and(|q| q <= 0.0))
        })
    })
}

fn gzip(body: &[u8]) -> std::io::Result<Bytes> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 8), Compression::fast());
    encoder.write_all(body)?;
    Ok(encoder.finish()?.into())
}

#[cfg(test)]
mod tests;
