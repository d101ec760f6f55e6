//! Telemetry objects and MeshConfig (ConfigMap `istio` of the root namespace) → what is told about traffic (waypoint §3.6).
//!
//! Levels are merged as in Istio: MeshConfig, the root namespace, a namespace, what a `targetRef` names. Closer levels
//! override field by field; of several objects at one level the oldest counts. Expressions and formats are compiled here:
//! what cannot be refuses its object, by file, line and field, and what the object said before stays in force.
//! Upstream: [`super::object`]. Downstream: `mesh_model::telemetry`.

mod merge;
mod mesh_config;
mod tracing;

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::l7::gateway::GatewayKey;
use mesh_model::telemetry::expression::{Expression, JQ_FIX};
use mesh_model::telemetry::{Metric, Target};

pub(super) use merge::rules;
pub(super) use mesh_config::Exports;
pub use mesh_config::MeshConfig;
pub(crate) use mesh_config::NAME as MESH_CONFIG;
pub(super) use mesh_config::read as read_mesh_config;
use tracing::TracingEntry;

use super::authorization;
use super::object::{ObjectId, Reader};
use super::read::{self, Bad, Read};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// A Telemetry object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Telemetry {
    /// Age.
    created: Arc<str>,
    /// What it is bound to; `None`: its namespace.
    targets: Option<Vec<Target>>,
    access: Vec<AccessEntry>,
    metrics: Vec<Override>,
    tracing: Vec<TracingEntry>,
}
/// Part of a proxy an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Client,
    Server,
}
/// The parts named by `match.mode`; `None`: both.
type OfMode = Option<Mode>;
/// A provider by name, and where it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    name: Arc<str>,
    line: u32,
}
/// An element of `accessLogging`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct AccessEntry {
    mode: OfMode,
    providers: Vec<Named>,
    disabled: bool,
    filter: Option<Expression>,
}
/// An element of `metrics[].overrides`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Override {
    mode: OfMode,
    /// `None`: all.
    metric: Option<Metric>,
    disabled: Option<bool>,
    /// `None`: removed.
    tags: BTreeMap<Arc<str>, Option<Expression>>,
}

/// Reads a Telemetry object.
pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, Telemetry> {
    let meta = node.get("metadata");
    let created = meta.map_or(Ok(""), |m| read::text_or_empty(m, "creationTimestamp"))?;
    let mut out = Telemetry { created: r.pool.text(created), ..Telemetry::default() };
    let Some(spec) = read::map(node, "spec")? else { return Ok(out) };
    read::only(spec, &["selector", "targetRef", "targetRefs", "tracing", "metrics", "accessLogging"])?;
    out.targets = targets(r, node, spec, id)?;
    for n in read::list(spec, "accessLogging")? {
        out.access.push(access(r, n)?);
    }
    for n in read::list(spec, "metrics")? {
        metrics(r, n, &mut out.metrics)?;
    }
    for n in read::list(spec, "tracing")? {
        out.tracing.push(tracing::entry(r, n)?);
    }
    Ok(out)
}

fn targets<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, spec: &'p Node<'p>, id: &ObjectId) -> Read<'p, Option<Vec<Target>>> {
    if let Some(selector) = spec.get("selector") {
        let bad = Bad::value(
            selector,
            "a selector chooses pods, never waypoints or gateways; this object has no effect here",
            "name a Gateway or a Service in `targetRefs`",
        );
        r.report(node, &bad, Severity::Warning);
        return Ok(Some(Vec::new()));
    }
    let mut out = Vec::new();
    let mut written = false;
    for n in spec.get("targetRef").into_iter().chain(read::list(spec, "targetRefs")?) {
        authorization::target(n, &id.namespace, "".into())?;
        written = true;
        let (kind, name) = (read::text_or_empty(n, "kind")?, r.pool.text(read::text_or_empty(n, "name")?));
        let namespace = Arc::clone(&id.namespace);
        out.push(match kind {
            "Service" | "ServiceEntry" => Target::Service { namespace, name },
            "Gateway" => Target::Gateway(GatewayKey { namespace, name }),
            "GatewayClass" if *namespace == *r.root_namespace && &*name == "istio-waypoint" => Target::Waypoints,
            _ => {
                let message = format!("a target {kind} {name} binds nothing here");
                return Err(Bad::value(n, message, "name a Service, ServiceEntry or Gateway"));
            }
        });
    }
    Ok(written.then_some(out))
}

fn mode<'p>(n: &'p Node<'p>, known: &[&str]) -> Read<'p, (OfMode, Option<&'p Node<'p>>)> {
    let Some(found) = read::map(n, "match")? else { return Ok((None, None)) };
    read::only(found, known)?;
    let mode = match read::text(found, "mode")? {
        None | Some("CLIENT_AND_SERVER" | "UNDEFINED") => None,
        Some("CLIENT") => Some(Mode::Client),
        Some("SERVER") => Some(Mode::Server),
        Some(_) => {
            let at = found.get("mode").unwrap_or(found);
            return Err(Bad::value(at, "not a mode", "write CLIENT, SERVER or CLIENT_AND_SERVER"));
        }
    };
    Ok((mode, Some(found)))
}

fn providers<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, Vec<Named>> {
    let mut out = Vec::new();
    for p in read::list(n, "providers")? {
        read::only(p, &["name"])?;
        let name = read::text(p, "name")?.ok_or_else(|| Bad::missing(p, "name", "a provider has a name"))?;
        out.push(Named { name: r.pool.text(name), line: p.line });
    }
    Ok(out)
}

fn access<'p>(r: &mut Reader<'_>, n: &'p Node<'p>) -> Read<'p, AccessEntry> {
    read::only(n, &["match", "providers", "disabled", "filter"])?;
    let filter = match read::map(n, "filter")? {
        None => None,
        Some(filter) => {
            read::only(filter, &["expression"])?;
            filter.get("expression").map(expression).transpose()?
        }
    };
    let (mode, _) = mode(n, &["mode"])?;
    Ok(AccessEntry { mode, providers: providers(r, n)?, disabled: read::flag(n, "disabled")?, filter })
}

fn metrics<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, out: &mut Vec<Override>) -> Read<'p, ()> {
    // Counters are always up to date here, so that an interval of reporting has nothing to do.
    read::only(n, &["providers", "overrides", "reportingInterval"])?;
    for p in read::list(n, "providers")? {
        if read::text_or_empty(p, "name")? != "prometheus" {
            return Err(Bad::value(p, "metrics go to Prometheus only", "name `prometheus`, or no provider"));
        }
    }
    for o in read::list(n, "overrides")? {
        read::only(o, &["match", "disabled", "tagOverrides"])?;
        let (mode, found) = mode(o, &["mode", "metric", "customMetric"])?;
        let metric = found.map_or(Ok(None), metric)?;
        let disabled = o.get("disabled").is_some().then(|| read::flag(o, "disabled")).transpose()?;
        let mut tags = BTreeMap::new();
        if let Some(all) = read::map(o, "tagOverrides")? {
            for e in read::entries(all)? {
                tags.insert(r.pool.text(&e.key), tag_override(&e.key, &e.node)?);
            }
        }
        out.push(Override { mode, metric, disabled, tags });
    }
    Ok(())
}

fn metric<'p>(found: &'p Node<'p>) -> Read<'p, Option<Metric>> {
    if let Some(custom) = found.get("customMetric") {
        return Err(Bad::value(custom, "there are the standard metrics only", "use `metric`"));
    }
    let Some(at) = found.get("metric") else { return Ok(None) };
    let name = read::scalar(at)?;
    if name == "ALL_METRICS" {
        return Ok(None);
    }
    let found = Metric::ALL.iter().find(|(_, n)| *n == name).map(|(metric, _)| Some(*metric));
    found.ok_or_else(|| {
        Bad::value(at, format!("`{name}` is no standard metric"), "write for example REQUEST_COUNT or ALL_METRICS")
    })
}

fn tag_override<'p>(name: &str, n: &'p Node<'p>) -> Read<'p, Option<Expression>> {
    read::only(n, &["operation", "value"])?;
    let label = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.starts_with("__")
        && name != "le";
    if !label {
        return Err(Bad::value(n, format!("`{name}` is no name of a Prometheus label"), "use letters, digits and `_`"));
    }
    match read::text(n, "operation")? {
        Some("REMOVE") => Ok(None),
        None | Some("UPSERT") => {
            let value = n.get("value").ok_or_else(|| Bad::missing(n, "value", "a tag needs a value, an expression in CEL"))?;
            expression(value).map(Some)
        }
        Some(_) => Err(Bad::value(n.get("operation").unwrap_or(n), "not an operation", "write UPSERT or REMOVE")),
    }
}

/// A CEL expression.
fn expression<'p>(n: &'p Node<'p>) -> Read<'p, Expression> {
    Expression::parse(read::scalar(n)?).map_err(|error| Bad {
        at: n,
        missing: None,
        fix: if error.jq { JQ_FIX } else { "correct the expression (CEL, over Envoy's attributes)" },
        message: error.message,
        code: "expression",
    })
}

#[cfg(test)]
mod tests;
