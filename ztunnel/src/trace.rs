//! Who is told of connections as spans, and which span a connection is.
//!
//! Owns the settings and the identifiers. Upstream: the command line; the three directions. Downstream: `record`, `spans`.
use clap::Args;
use http::HeaderValue;
use mesh_model::telemetry::context::{Context, Incoming};
use mesh_model::telemetry::tracing::{Collector, Otlp};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// OTLP's limit for one batch.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Settings of spans.
#[derive(Args, Clone, Debug)]
pub struct TracingSettings {
    /// Collector that is told of connections in OTLP: `grpc://HOST:PORT`, or `http://HOST:PORT/PATH` for protobuf over HTTP. It is
    /// reached from the node, not through the mesh. Without it there are no spans.
    #[arg(long, env = "CULVERT_TRACING_COLLECTOR", value_name = "URL", value_parser = collector)]
    pub tracing_collector: Option<Arc<Collector>>,
    /// Percentage of the connections that are told of. In a tunnel the client decides.
    #[arg(long, env = "CULVERT_TRACING_SAMPLING", default_value = "1", value_name = "PERCENT", value_parser = percent)]
    pub tracing_sampling: f64,
}

fn collector(text: &str) -> Result<Arc<Collector>, String> {
    let uri: http::Uri = text.parse().map_err(|e| format!("no URL: {e}"))?;
    let over = match uri.scheme_str() {
        Some("grpc") => Otlp::Grpc,
        Some("http") => Otlp::Http(uri.path().into()),
        _ => return Err("neither grpc://HOST:PORT nor http://HOST:PORT/PATH".into()),
    };
    if over == Otlp::Grpc && uri.path().len() > 1 {
        return Err("a collector of gRPC has no path".into());
    }
    let host = uri
        .host()
        .filter(|host| !host.is_empty())
        .ok_or("no host")?
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_ascii_lowercase();
    Ok(Arc::new(Collector {
        host: host.into(),
        namespace: None,
        port: uri.port_u16().ok_or("no port")?,
        over,
        timeout: TIMEOUT,
        headers: Box::default(),
        resource: Box::default(),
    }))
}
fn percent(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=100.0).contains(&share) { Ok(share) } else { Err("not from 0 to 100".into()) }
}

/// The span of a connection that is told of.
#[derive(Debug)]
pub struct Trace {
    /// Which it is.
    pub context: Context,
    /// When the connection came.
    pub start: SystemTime,
}
impl Trace {
    /// The span of a connection that comes now.
    pub fn begin(under: Incoming) -> Self {
        let context = Context::under(under, (rand::random(), rand::random()), true);
        Self { context, start: SystemTime::now() }
    }
    /// `traceparent` of what the connection is carried in.
    pub fn header(&self) -> Option<HeaderValue> {
        self.context.parent_of_others().encode()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_named_by_its_transport() {
        let read = |url: &str| collector(url).map(|c| (c.host.to_string(), c.port, c.over.clone()));
        assert_eq!(read("grpc://otel.obs:4317"), Ok(("otel.obs".into(), 4317, Otlp::Grpc)));
        assert_eq!(read("http://[fd00::1]:4318/v1/traces"), Ok(("fd00::1".into(), 4318, Otlp::Http("/v1/traces".into()))));
        for wrong in ["otel:4317", "https://otel:4317", "grpc://otel", "grpc://otel:4317/v1", "grpc://:4317", ""] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        assert_eq!(percent("0.5"), Ok(0.5));
        assert!(["101", "-1", "NaN", "all"].iter().all(|wrong| percent(wrong).is_err()));
    }
}
