//! The `tracing` sections of Telemetry objects and of MeshConfig's `defaultConfig`, and `opentelemetry` providers.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use mesh_model::telemetry::format::Template;
use mesh_model::telemetry::tracing::{Collector, Otlp, Tag, Tracing};

use super::mesh_config::environment;
use super::{Named, OfMode, mode, providers};
use crate::translate::object::Reader;
use crate::translate::read::{self, Bad, Read};
use crate::yaml::Node;

/// OTLP's limit for one request where the provider has none.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An element of `tracing`; `None` where not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TracingEntry {
    pub mode: OfMode,
    pub providers: Vec<Named>,
    pub disabled: Option<bool>,
    /// Of [`Tracing::SHARE`].
    pub sampling: Option<u64>,
    pub by_request_id: Option<bool>,
    pub propagates: Option<bool>,
    pub istio_tags: Option<bool>,
    pub tags: BTreeMap<Arc<str>, Tag>,
}

/// Reads an element of `tracing`.
pub(super) fn entry<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, TracingEntry> {
    read::only(
        n,
        &[
            "match",
            "providers",
            "randomSamplingPercentage",
            "disableSpanReporting",
            "customTags",
            "useRequestIdForTraceSampling",
            "enableIstioTags",
            "disableContextPropagation",
        ],
    )?;
    let (mode, _) = mode(n, &["mode"])?;
    let flag = |key: &'static str| n.get(key).is_some().then(|| read::flag(n, key)).transpose();
    let sampling = match read::decimal(n, "randomSamplingPercentage")? {
        None => None,
        Some(share) if (0.0..=100.0).contains(&share) => Some(of_share(share)),
        Some(_) => {
            let at = n.get("randomSamplingPercentage").unwrap_or(n);
            return Err(Bad::value(at, "a percentage is 0 to 100", "write for example 1.0"));
        }
    };
    Ok(TracingEntry {
        mode,
        providers: providers(r, n)?,
        disabled: flag("disableSpanReporting")?,
        sampling,
        by_request_id: flag("useRequestIdForTraceSampling")?,
        propagates: flag("disableContextPropagation")?.map(|disabled| !disabled),
        istio_tags: flag("enableIstioTags")?,
        tags: custom_tags(r, n)?,
    })
}
/// Hundredths of a percent.
fn of_share(percent: f64) -> u64 {
    (percent * (Tracing::SHARE / 100) as f64).round() as u64
}

/// What `defaultConfig.tracing` says for where no Telemetry does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Defaults {
    /// Of [`Tracing::SHARE`].
    pub sampling: Option<u64>,
    pub istio_tags: Option<bool>,
    pub longest_path: Option<usize>,
    pub tags: BTreeMap<Arc<str>, Tag>,
}
impl Defaults {
    /// Reads `defaultConfig.tracing`.
    pub fn read<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, Self> {
        read::only(n, &["sampling", "customTags", "maxPathTagLength", "enableIstioTags"])?;
        // istiod: 0 is as good as not written, and more than all of it is 1 %.
        let sampling = read::decimal(n, "sampling")?.filter(|share| *share > 0.0);
        Ok(Self {
            sampling: sampling.map(|share| of_share(if share > 100.0 { 1.0 } else { share })),
            istio_tags: n.get("enableIstioTags").is_some().then(|| read::flag(n, "enableIstioTags")).transpose()?,
            longest_path: read::number(n, "maxPathTagLength")?.filter(|most| *most > 0),
            tags: custom_tags(r, n)?,
        })
    }
}

/// The tags of `customTags`.
fn custom_tags<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, BTreeMap<Arc<str>, Tag>> {
    let mut tags = BTreeMap::new();
    if let Some(all) = read::map(n, "customTags")? {
        for e in read::entries(all)? {
            tags.insert(r.pool.text(&e.key), tag(r, &e.node)?);
        }
    }
    Ok(tags)
}

fn tag<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, Tag> {
    read::only(n, &["literal", "environment", "header", "formatter"])?;
    if read::entries(n)?.len() != 1 {
        let message = "a tag is one of a literal, an environment variable, a header and a formatter";
        return Err(Bad::value(n, message, "write one of them"));
    }
    if let Some(literal) = read::map(n, "literal")? {
        read::only(literal, &["value"])?;
        return Ok(Tag::Literal(r.pool.text(read::text_or_empty(literal, "value")?)));
    }
    if let Some(variable) = read::map(n, "environment")? {
        read::only(variable, &["name", "defaultValue"])?;
        let value = environment(named(variable)?).or(read::text(variable, "defaultValue")?.map(str::to_owned));
        return Ok(Tag::Literal(value.unwrap_or_default().into()));
    }
    if let Some(header) = read::map(n, "header")? {
        read::only(header, &["name", "defaultValue"])?;
        return Ok(Tag::Header(header_name(header)?, read::text(header, "defaultValue")?.map(Arc::from)));
    }
    let formatter = read::map(n, "formatter")?.unwrap_or(n);
    read::only(formatter, &["value"])?;
    let at = formatter.get("value").ok_or_else(|| Bad::missing(formatter, "value", "a formatter has a value"))?;
    let template = Template::parse(read::scalar(at)?, &environment);
    template.map(Tag::Format).map_err(|e| Bad::value(at, e.0, "correct the format (Envoy's operators)"))
}

fn named<'p>(n: &'p Node<'p>) -> Read<'p, &'p str> {
    read::text(n, "name")?.filter(|name| !name.is_empty()).ok_or_else(|| Bad::missing(n, "name", "a name is needed"))
}
fn header_name<'p>(n: &'p Node<'p>) -> Read<'p, HeaderName> {
    let name = named(n)?;
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| {
        Bad::value(n.get("name").unwrap_or(n), format!("`{name}` is no name of a header"), "write for example `x-user-id`")
    })
}

/// An `opentelemetry` provider, and its `maxTagLength`.
pub(super) fn provider<'p>(n: &'p Node<'p>) -> Read<'p, (Collector, Option<usize>)> {
    read::only(n, &["service", "port", "maxTagLength", "http", "grpc", "resourceDetectors"])?;
    let service = read::text(n, "service")?.ok_or_else(|| Bad::missing(n, "service", "a collector has a service"))?;
    let (namespace, host) = service.split_once('/').map_or((None, service), |(namespace, host)| (Some(namespace), host));
    if host.is_empty() {
        let at = n.get("service").unwrap_or(n);
        return Err(Bad::value(at, "no host", "write `host` or `namespace/host`"));
    }
    let (over, settings, headers) = match (read::map(n, "http")?, read::map(n, "grpc")?) {
        (Some(_), Some(grpc)) => return Err(Bad::value(grpc, "either `http` or `grpc`", "remove one")),
        (Some(http), None) => {
            read::only(http, &["path", "timeout", "headers"])?;
            (Otlp::Http(path(http)?), Some(http), "headers")
        }
        (None, grpc) => {
            grpc.map_or(Ok(()), |grpc| read::only(grpc, &["timeout", "initialMetadata"]))?;
            (Otlp::Grpc, grpc, "initialMetadata")
        }
    };
    let timeout = settings.map_or(Ok(None), |s| read::duration(s, "timeout"))?.filter(|t| !t.is_zero());
    let collector = Collector {
        host: host.to_ascii_lowercase().into(),
        namespace: namespace.map(Into::into),
        port: read::port_at(n, "port")?,
        over,
        timeout: timeout.unwrap_or(TIMEOUT),
        headers: settings.map_or_else(|| Ok(Box::default()), |s| metadata(read::list(s, headers)?))?,
        resource: resource(n)?,
    };
    Ok((collector, read::number(n, "maxTagLength")?.filter(|most| *most > 0)))
}
fn path<'p>(http: &'p Node<'p>) -> Read<'p, Arc<str>> {
    let path = read::text_or_empty(http, "path")?;
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    if path.parse::<http::uri::PathAndQuery>().is_err() {
        return Err(Bad::value(http.get("path").unwrap_or(http), format!("`{path}` is no path"), "write for example /v1/traces"));
    }
    Ok(path.into())
}
fn metadata<'p>(all: &'p [Node<'p>]) -> Read<'p, Box<[(HeaderName, HeaderValue)]>> {
    let one = |n: &'p Node<'p>| {
        read::only(n, &["name", "value", "envName"])?;
        let value = match (read::text(n, "value")?, read::text(n, "envName")?) {
            (Some(value), None) => value.to_owned(),
            (None, Some(name)) => environment(name).unwrap_or_default(),
            _ => return Err(Bad::value(n, "a header has a `value` or an `envName`", "write one of them")),
        };
        let value = HeaderValue::try_from(value).map_err(|_| Bad::value(n, "no value of a header", "correct it"))?;
        Ok((header_name(n)?, value))
    };
    all.iter().map(one).collect()
}
type Attributes = Box<[(Arc<str>, Arc<str>)]>;
/// `OTEL_RESOURCE_ATTRIBUTES` (`key=value,…`), where the provider asks for it.
fn resource<'p>(n: &'p Node<'p>) -> Read<'p, Attributes> {
    let Some(detectors) = read::map(n, "resourceDetectors")? else { return Ok(Box::default()) };
    read::only(detectors, &["environment"])?;
    if detectors.get("environment").is_none() {
        return Ok(Box::default());
    }
    let all = environment("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let pairs = all.split(',').filter_map(|pair| pair.split_once('='));
    Ok(pairs.map(|(key, value)| (key.trim().into(), value.trim().into())).collect())
}
