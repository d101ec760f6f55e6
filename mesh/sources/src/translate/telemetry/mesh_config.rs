//! The parts of MeshConfig that speak of telemetry, of external authorizers, of all requests and destinations, and of services for
//! other networks: ConfigMap `istio` of the root namespace, entry `mesh`.
//!
//! The rest is for the control plane. A section that is wrong is left out and reported; the others count.
use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::defaults::MeshDefaults;
use mesh_model::l7::authorizer::Authorizers;
use mesh_model::l7::path::PathNormalization;
use mesh_model::l7::route::RetryPolicy;
use mesh_model::telemetry::format::{Format, Json, Object, Template};
use mesh_model::telemetry::tracing::Collector;

use super::Named;
use super::tracing::{self, Defaults};
use crate::diagnostics::Severity;
use crate::translate::destination_rule::MeshTraffic;
use crate::translate::object::Reader;
use crate::translate::read::{self, Bad, Read};
use crate::translate::scopes::{self, Global};
use crate::translate::{authorizers, virtual_service};
use crate::yaml::{self, Document, Node, Value};

/// Name of the ConfigMap.
pub(crate) const NAME: &str = "istio";
/// Name of the provider `accessLogFile` and its kin describe.
pub(super) const ENVOY: &str = "envoy";
/// The only file lines go to: ours are written by one thread, to one place.
const STDOUT: &str = "/dev/stdout";

/// What MeshConfig says of telemetry, of whom CUSTOM policies ask, of all requests, and of services for other networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MeshConfig {
    /// `accessLogFile` names standard output.
    pub(super) access: bool,
    pub(super) providers: BTreeMap<Arc<str>, Provider>,
    /// `defaultProviders`.
    pub(super) default_access: Vec<Named>,
    pub(super) default_tracing: Vec<Named>,
    /// `defaultConfig.tracing`.
    pub(super) tracing: Defaults,
    /// `extensionProviders` that are asked whether a request may pass.
    pub(in crate::translate) authorizers: Arc<Authorizers>,
    /// What requests follow where no object says otherwise.
    pub(in crate::translate) defaults: Arc<MeshDefaults>,
    /// How destinations are reached where no DestinationRule says otherwise.
    pub(in crate::translate) traffic: MeshTraffic,
    /// Whom objects are exported to that do not say it.
    pub(in crate::translate) exports: Exports,
    /// `serviceScopeConfigs`, where it is there.
    pub(in crate::translate) scopes: Option<Arc<[Global]>>,
}
/// Whom objects are exported to that do not say it: namespaces, `.` for their own, `*` for all; nothing: all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::translate) struct Exports {
    /// `defaultVirtualServiceExportTo`.
    pub(in crate::translate) virtual_services: Vec<Arc<str>>,
    /// `defaultDestinationRuleExportTo`.
    pub(in crate::translate) destination_rules: Vec<Arc<str>>,
}
/// One of `extensionProviders`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Provider {
    /// Lines on standard output, of this format; `None`: Istio's, in the shape of the process's lines.
    Lines(Option<Format>),
    /// Spans, to this collector, with paths of at most so many bytes.
    Spans(Arc<Collector>, Option<usize>),
    /// Of a kind that is not here, or refused.
    Unusable,
}

/// What the process's environment says.
pub(super) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Reads the ConfigMap.
pub(in crate::translate) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, MeshConfig> {
    let mut out = MeshConfig::default();
    let Some(text) = node.get("data").and_then(|d| d.get("mesh")) else { return Ok(out) };
    let document = Document { text: read::scalar(text)?, line: text.line };
    let mesh =
        yaml::parse_whole(document).map_err(|e| Bad::value(text, format!("not YAML: {e}"), "correct the text below `mesh`"))?;
    let mut section = |read: Read<'_, ()>| {
        if let Err(bad) = read {
            r.report(&mesh, &bad, Severity::Error);
        }
    };
    let mut collect = MeshConfig::default();
    section(access(&mesh, &mut collect));
    section(defaults(&mesh, &mut collect));
    if let Some(tracing) = mesh.get("defaultConfig").and_then(|c| c.get("tracing")) {
        match Defaults::read(r, tracing) {
            Ok(tracing) => collect.tracing = tracing,
            Err(bad) => r.report(&mesh, &bad, Severity::Error),
        }
    }
    let mut section = |read: Read<'_, ()>| {
        if let Err(bad) = read {
            r.report(&mesh, &bad, Severity::Error);
        }
    };
    for p in read::list(&mesh, "extensionProviders").unwrap_or_default() {
        section(provider(p, &mut collect));
    }
    let mut defaults = MeshDefaults::default();
    section(paths(&mesh, &mut defaults));
    section(retry(&mesh, &mut defaults));
    section(exports(&mesh, "defaultVirtualServiceExportTo", &mut collect.exports.virtual_services));
    section(exports(&mesh, "defaultDestinationRuleExportTo", &mut collect.exports.destination_rules));
    collect.traffic = MeshTraffic::read(r, &mesh);
    defaults.traffic = Arc::new(collect.traffic.policy());
    collect.defaults = Arc::new(defaults);
    collect.authorizers = Arc::new(authorizers::read(r, &mesh));
    collect.scopes = scopes::read(r, &mesh);
    out = collect;
    Ok(out)
}

fn access<'p>(mesh: &'p Node<'p>, out: &mut MeshConfig) -> Read<'p, ()> {
    out.access = match read::text_or_empty(mesh, "accessLogFile")? {
        "" => false,
        STDOUT => true,
        _ => return Err(other_file(mesh.get("accessLogFile").unwrap_or(mesh))),
    };
    let json = match read::text(mesh, "accessLogEncoding")? {
        None | Some("") => None,
        Some("TEXT") => Some(false),
        Some("JSON") => Some(true),
        Some(_) => {
            let at = mesh.get("accessLogEncoding").unwrap_or(mesh);
            return Err(Bad::value(at, "not an encoding", "write TEXT or JSON"));
        }
    };
    // Held by what is read next, so that lines are written in Istio's own format where the written one is wrong.
    out.providers
        .insert(ENVOY.into(), Provider::Lines(json.map(|json| if json { Format::istio_json() } else { Format::istio_text() })));
    let Some(at) = mesh.get("accessLogFormat").filter(|n| n.text() != Some("")) else { return Ok(()) };
    let text = read::scalar(at)?;
    let format = if json == Some(true) {
        let document = Document { text, line: at.line };
        let labels = yaml::parse_whole(document).map_err(|e| Bad::value(at, format!("not JSON: {e}"), "write a JSON object"))?;
        object(&labels, false).map(Format::Json).map_err(|bad| Bad::value(at, bad.message, bad.fix))?
    } else {
        text_format(at)?
    };
    out.providers.insert(ENVOY.into(), Provider::Lines(Some(format)));
    Ok(())
}

fn exports<'p>(mesh: &'p Node<'p>, key: &str, out: &mut Vec<Arc<str>>) -> Read<'p, ()> {
    let mut all = Vec::new();
    for n in read::list(mesh, key)? {
        match read::scalar(n)? {
            "" => return Err(Bad::value(n, "expected `.`, `*` or a namespace", "write `.` for an object's own namespace")),
            t => all.push(t.into()),
        }
    }
    *out = all;
    Ok(())
}

fn defaults<'p>(mesh: &'p Node<'p>, out: &mut MeshConfig) -> Read<'p, ()> {
    let Some(defaults) = read::map(mesh, "defaultProviders")? else { return Ok(()) };
    let names = |key: &str| -> Read<'p, Vec<Named>> {
        read::list(defaults, key)?.iter().map(|n| Ok(Named { name: read::scalar(n)?.into(), line: n.line })).collect()
    };
    out.default_access = names("accessLogging")?;
    out.default_tracing = names("tracing")?;
    Ok(())
}

/// What cannot be read counts as the most that can be done: whatever a policy names, no other way to write it gets past.
fn paths<'p>(mesh: &'p Node<'p>, out: &mut MeshDefaults) -> Read<'p, ()> {
    let Some(paths) = mesh.get("pathNormalization") else { return Ok(()) };
    out.path_normalization = PathNormalization::DecodeAndMergeSlashes;
    read::only(paths, &["normalization"])?;
    out.path_normalization = match read::text(paths, "normalization")? {
        None | Some("DEFAULT" | "BASE") => PathNormalization::Base,
        Some("NONE") => PathNormalization::None,
        Some("MERGE_SLASHES") => PathNormalization::MergeSlashes,
        Some("DECODE_AND_MERGE_SLASHES") => PathNormalization::DecodeAndMergeSlashes,
        Some(_) => {
            let at = paths.get("normalization").unwrap_or(paths);
            let fix = "write NONE, BASE, MERGE_SLASHES or DECODE_AND_MERGE_SLASHES; until then it is the last of them";
            return Err(Bad::value(at, "not a normalization", fix));
        }
    };
    Ok(())
}

/// What cannot be read means none: whatever it would have allowed, a request sent twice may be an order placed twice.
fn retry<'p>(mesh: &'p Node<'p>, out: &mut MeshDefaults) -> Read<'p, ()> {
    let Some(policy) = mesh.get("defaultHttpRetryPolicy") else { return Ok(()) };
    out.retry = Arc::new(RetryPolicy::none());
    out.retry = Arc::new(virtual_service::retries(policy)?);
    Ok(())
}

fn provider<'p>(p: &'p Node<'p>, out: &mut MeshConfig) -> Read<'p, ()> {
    let name: Arc<str> = read::text(p, "name")?.ok_or_else(|| Bad::missing(p, "name", "a provider has a name"))?.into();
    // Until it is read: whoever names it is told.
    out.providers.insert(Arc::clone(&name), Provider::Unusable);
    let read = if let Some(file) = read::map(p, "envoyFileAccessLog")? {
        Provider::Lines(file_format(file)?)
    } else if let Some(otel) = read::map(p, "opentelemetry")? {
        let (collector, longest_path) = tracing::provider(otel)?;
        Provider::Spans(Arc::new(collector), longest_path)
    } else {
        Provider::Unusable
    };
    out.providers.insert(name, read);
    Ok(())
}

fn file_format<'p>(file: &'p Node<'p>) -> Read<'p, Option<Format>> {
    if let Some(path) = file.get("path").filter(|p| p.text() != Some(STDOUT)) {
        return Err(other_file(path));
    }
    let omit_empty = read::flag(file, "omitEmptyValues")?;
    let Some(format) = read::map(file, "logFormat")? else { return Ok(None) };
    read::only(format, &["text", "labels"])?;
    match (format.get("text"), format.get("labels")) {
        (Some(text), None) => text_format(text).map(Some),
        (None, Some(labels)) => object(labels, omit_empty).map(Format::Json).map(Some),
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(Bad::value(format, "either `text` or `labels`", "remove one")),
    }
}
fn other_file<'p>(at: &'p Node<'p>) -> Bad<'p> {
    Bad::value(at, "lines go to standard output only", "write /dev/stdout")
}
fn text_format<'p>(at: &'p Node<'p>) -> Read<'p, Format> {
    Format::text(read::scalar(at)?, &environment).map_err(|e| Bad::value(at, e.0, "correct the format (Envoy's operators)"))
}

/// A JSON format: an object of strings with operators, of numbers, and of objects.
fn object<'p>(labels: &'p Node<'p>, omit_empty: bool) -> Read<'p, Object> {
    let mut entries = Vec::new();
    for e in read::entries(labels)? {
        let value = match &e.node.value {
            Value::Map(_) => Json::Object(object(&e.node, omit_empty)?),
            Value::Scalar { text, quoted: false } if is_bare(text) => Json::Verbatim((&**text).into()),
            Value::Scalar { text, .. } => Json::parse(text, omit_empty, &environment)
                .map_err(|error| Bad::value(&e.node, format!("{}: {error}", e.key), "correct the format (Envoy's operators)"))?,
            Value::Null => Json::Text(Template(Box::default())),
            Value::Seq(_) => return Err(Bad::value(&e.node, format!("{}: a list has no place in a line", e.key), "write text")),
        };
        entries.push(((&*e.key).into(), value));
    }
    Ok(Object { entries: entries.into() })
}
/// Whether JSON has it without quotes.
fn is_bare(text: &str) -> bool {
    matches!(text, "true" | "false")
        || text.strip_prefix('-').unwrap_or(text).starts_with(|c: char| c.is_ascii_digit())
            && text.parse::<f64>().is_ok_and(f64::is_finite)
            && !text
                .strip_prefix('-')
                .unwrap_or(text)
                .strip_prefix('0')
                .is_some_and(|t| t.starts_with(|c: char| c.is_ascii_digit()))
            && !text.ends_with('.')
}
