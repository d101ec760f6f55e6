//! XBackendTrafficPolicy: how much is tried again at a Service, and how sessions stay with its endpoints.

use std::sync::Arc;
use std::time::Duration;

use mesh_model::l7::destination::RetryBudget;
use mesh_model::l7::session::Session;

use super::super::kube::section;
use super::super::object::{ObjectId, Reader};
use super::super::read::{self, Bad, Read};
use super::backend_tls::{self, PolicyTarget};
use super::{route, session};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// An XBackendTrafficPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficRules {
    /// The Services it is for.
    pub(super) targets: Vec<PolicyTarget>,
    /// Age.
    pub(super) created: Arc<str>,
    /// `retryConstraint`.
    pub(super) budget: Option<RetryBudget>,
    /// `sessionPersistence`.
    pub(super) session: Option<Arc<Session>>,
}

/// Reads a policy.
pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, TrafficRules> {
    read::only(node, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    read::only(spec, &["targetRefs", "retryConstraint", "sessionPersistence"])?;
    let mut targets = Vec::new();
    for t in read::list(spec, "targetRefs")? {
        read::only(t, &["group", "kind", "name"])?;
        match backend_tls::target(r, t, id)? {
            Ok(target) => targets.push(target),
            Err(kind) => {
                let message = format!("an XBackendTrafficPolicy cannot be for a {kind} here; this target has no effect");
                let bad = Bad { code: "unsupported-target", ..Bad::value(t, message, "point it at a Service") };
                r.report(node, &bad, Severity::Error);
            }
        }
    }
    if read::list(spec, "targetRefs")?.is_empty() {
        return Err(Bad::missing(spec, "targetRefs", "an XBackendTrafficPolicy names the Services it is for"));
    }
    let budget = read::map(spec, "retryConstraint")?.map(|c| budget(r, node, c)).transpose()?;
    let session = session::read(r, node, spec, "/")?.map(|s| s.session(&id.to_string()));
    Ok(TrafficRules { targets, created: r.pool.text(read::text_or_empty(meta, "creationTimestamp")?), budget, session })
}

/// A retry constraint as Istio translates it: a share of the requests of an interval, and a number that may always be under way. The
/// API counts that over an interval too.
fn budget<'p>(r: &mut Reader<'_>, root: &'p Node<'p>, constraint: &'p Node<'p>) -> Read<'p, RetryBudget> {
    read::only(constraint, &["budget", "minRetryRate"])?;
    let (mut percent, mut least, mut interval) = (20, 10, Duration::from_secs(10));
    for (key, number) in [("budget", "percent"), ("minRetryRate", "count")] {
        let Some(part) = read::map(constraint, key)? else { continue };
        read::only(part, &[number, "interval"])?;
        if let Some(at) = part.get("interval").filter(|_| key == "budget") {
            interval = route::duration(at)?;
        } else if let Some(at) = part.get("interval") {
            route::duration(at)?;
            let message = "so many retries may be under way, whenever they began; this field has no effect".into();
            let bad = Bad { at, missing: None, message, fix: "leave it out", code: "no-effect" };
            r.report(root, &bad, Severity::Warning);
        }
        let Some(n) = read::number::<u32>(part, number)? else { continue };
        let most = if number == "percent" { 100 } else { 1_000_000 };
        if n > most {
            let at = part.get(number).unwrap_or(part);
            return Err(Bad::value(at, format!("{n} is too large"), "write a smaller number"));
        }
        if number == "percent" { percent = n } else { least = n }
    }
    Ok(RetryBudget {
        interval: Some(interval).filter(|d| !d.is_zero()),
        percent_hundredths: percent * 100,
        min_concurrency: least,
    })
}
