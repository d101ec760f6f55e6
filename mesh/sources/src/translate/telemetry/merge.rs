//! MeshConfig and Telemetry objects → what holds at each place (Istio's `model/telemetry.go`).
use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_model::telemetry::expression::Expression;
use mesh_model::telemetry::tracing::{Tag, Tracing};
use mesh_model::telemetry::{AccessLog, FamilyRules, Metric, MetricRules, Sides, Telemetry, TelemetryRules};

use super::mesh_config::{ENVOY, MeshConfig, Provider};
use super::{Mode, Named, Override, Telemetry as Object};
use crate::diagnostics::{Problem, Severity};
use crate::translate::{Name, Slot};

/// Share of the requests that are traced when nobody says: Istio's 1 %.
const SAMPLING: u64 = Tracing::SHARE / 100;

/// What all objects together say, and what is wrong with them together.
pub(in crate::translate) fn rules(
    objects: &BTreeMap<Name, Slot<Object>>,
    mesh: Option<&Slot<MeshConfig>>,
    root: &str,
) -> (TelemetryRules, Vec<Problem>) {
    let mut merge = Merge { mesh, problems: Vec::new() };
    let mut all: Vec<(&Name, &Slot<Object>)> = objects.iter().collect();
    // Istio's tie-break: the oldest counts; without a date, after those with one; then by name.
    all.sort_by_key(|(name, slot)| (slot.obj.created.is_empty(), &slot.obj.created, *name));
    let of_namespace =
        |ns: &str| all.iter().find(|(name, slot)| *name.0 == *ns && slot.obj.targets.is_none()).map(|(_, slot)| *slot);
    let everywhere = of_namespace(root);
    let mut rules = TelemetryRules::default();
    if everywhere.is_some() || mesh.is_some() {
        rules.mesh = Some(merge.sides(&[everywhere]));
    }
    for ((ns, _), slot) in &all {
        if slot.obj.targets.is_none() && **ns != *root && !rules.namespaces.contains_key(ns) {
            rules.namespaces.insert(Arc::clone(ns), merge.sides(&[everywhere, Some(slot)]));
        }
        for target in slot.obj.targets.iter().flatten() {
            if !rules.targets.contains_key(target) {
                let namespace = of_namespace(ns).filter(|_| **ns != *root);
                rules.targets.insert(target.clone(), merge.sides(&[everywhere, namespace, Some(slot)]));
            }
        }
    }
    let mut problems = merge.problems;
    problems.sort();
    problems.dedup();
    (rules, problems)
}

struct Merge<'a> {
    mesh: Option<&'a Slot<MeshConfig>>,
    problems: Vec<Problem>,
}
impl Merge<'_> {
    /// `levels`: the widest first.
    fn sides(&mut self, levels: &[Option<&Slot<Object>>]) -> Arc<Sides> {
        let levels: Vec<&Slot<Object>> = levels.iter().copied().flatten().collect();
        let mut side = |mode| {
            let (access, tracing) = (self.access(&levels, mode), self.tracing(&levels, mode));
            Arc::new(Telemetry { access, metrics: metrics(&levels, mode), tracing })
        };
        Arc::new(Sides { server: side(Mode::Server), client: side(Mode::Client) })
    }

    fn access(&mut self, levels: &[&Slot<Object>], mode: Mode) -> Option<Box<[AccessLog]>> {
        let of_mode = |slot: &Slot<Object>| slot.obj.access.iter().any(|e| e.mode.is_none_or(|m| m == mode));
        if !levels.iter().any(|slot| of_mode(slot)) {
            let mesh = &self.mesh?.obj;
            let own = Named { name: ENVOY.into(), line: 0 };
            let default = if mesh.default_access.is_empty() && mesh.access { vec![own] } else { mesh.default_access.clone() };
            return Some(default.iter().filter_map(|p| self.lines(p, None, None)).collect());
        }
        let mut names: Vec<Named> = self.mesh.map(|m| m.obj.default_access.clone()).unwrap_or_default();
        // By provider: whether it writes, and what about.
        let mut on: Vec<(Named, Option<Expression>, &Slot<Object>)> = Vec::new();
        for slot in levels {
            let mut replaced = false;
            for entry in slot.obj.access.iter().filter(|e| e.mode.is_none_or(|m| m == mode)) {
                if !entry.providers.is_empty() {
                    if !replaced {
                        // A closer level that names providers replaces those of the wider ones.
                        on.clear();
                    }
                    replaced = true;
                    names.clone_from(&entry.providers);
                }
                for name in &names {
                    on.retain(|(n, ..)| n.name != name.name);
                    if !entry.disabled {
                        on.push((name.clone(), entry.filter.clone(), slot));
                    }
                }
            }
        }
        Some(on.into_iter().filter_map(|(name, filter, slot)| self.lines(&name, filter, Some(slot))).collect())
    }

    fn lines(&mut self, provider: &Named, filter: Option<Expression>, by: Option<&Slot<Object>>) -> Option<AccessLog> {
        match self.mesh.and_then(|m| m.obj.providers.get(&provider.name)) {
            Some(Provider::Lines(format)) => Some(AccessLog { format: format.clone(), filter }),
            None if &*provider.name == ENVOY => Some(AccessLog { format: None, filter }),
            _ => {
                self.unknown("accessLogging", "envoyFileAccessLog", provider, by);
                None
            }
        }
    }

    fn tracing(&mut self, levels: &[&Slot<Object>], mode: Mode) -> Option<Tracing> {
        let mesh = &self.mesh?.obj;
        let defaults = &mesh.tracing;
        let entries = levels.iter().flat_map(|slot| slot.obj.tracing.iter().map(move |entry| (*slot, entry)));
        let entries: Vec<_> = entries.filter(|(_, e)| e.mode.is_none_or(|m| m == mode)).collect();
        // The closest level that says something, field by field.
        macro_rules! closest {
            ($field:ident) => {
                entries.iter().rev().find_map(|(_, entry)| entry.$field)
            };
        }
        if closest!(disabled) == Some(true) {
            return None;
        }
        // One tracer per proxy, as in Istio: the first that is named.
        let named = entries.iter().rev().find_map(|(slot, entry)| Some((Some(*slot), entry.providers.first()?)));
        let (by, provider) = named.or_else(|| Some((None, mesh.default_tracing.first()?)))?;
        let Some(Provider::Spans(collector, longest_path)) = mesh.providers.get(&provider.name) else {
            self.unknown("tracing", "opentelemetry", provider, by);
            return None;
        };
        let tags = entries.iter().rev().map(|(_, e)| &e.tags).find(|tags| !tags.is_empty()).unwrap_or(&defaults.tags);
        let pair = |(name, tag): (&Arc<str>, &Tag)| (Arc::clone(name), tag.clone());
        Some(Tracing {
            collector: Arc::clone(collector),
            sampling: closest!(sampling).or(defaults.sampling).unwrap_or(SAMPLING),
            by_request_id: closest!(by_request_id).unwrap_or(true),
            propagates: closest!(propagates).unwrap_or(true),
            istio_tags: closest!(istio_tags).or(defaults.istio_tags).unwrap_or(true),
            tags: tags.iter().map(pair).collect(),
            longest_path: longest_path.or(defaults.longest_path).unwrap_or(Tracing::LONGEST_PATH),
        })
    }

    fn unknown(&mut self, section: &str, kind: &str, provider: &Named, by: Option<&Slot<Object>>) {
        // Named by an object, or by MeshConfig's defaults.
        let Some(origin) = by.map(|slot| &slot.origin).or(self.mesh.map(|m| &m.origin)) else { return };
        let mut origin = (**origin).clone();
        if provider.line != 0 {
            origin.line = provider.line;
        }
        self.problems.push(Problem {
            severity: Severity::Error,
            origin,
            field: format!("spec.{section}[].providers").into(),
            message: format!("there is no usable provider `{}` of kind {kind}", provider.name).into(),
            fix: "define it in `extensionProviders` of MeshConfig (ConfigMap istio of the root namespace)".into(),
            code: Some("provider"),
        });
    }
}

fn metrics(levels: &[&Slot<Object>], mode: Mode) -> MetricRules {
    let mut tags: Vec<Expression> = Vec::new();
    let overrides: Vec<&Override> =
        levels.iter().flat_map(|s| &s.obj.metrics).filter(|o| o.mode.is_none_or(|m| m == mode)).collect();
    let families = Metric::ALL.map(|(metric, _)| {
        let mut disabled = false;
        let mut by_name: BTreeMap<&str, Option<usize>> = BTreeMap::new();
        for o in overrides.iter().filter(|o| o.metric.is_none_or(|m| m == metric)) {
            disabled = o.disabled.unwrap_or(disabled);
            for (name, value) in &o.tags {
                let at = value.as_ref().map(|value| {
                    tags.iter().position(|t| t == value).unwrap_or_else(|| {
                        tags.push(value.clone());
                        tags.len() - 1
                    })
                });
                by_name.insert(name, at);
            }
        }
        FamilyRules { disabled, tags: by_name.into_iter().map(|(name, at)| (name.into(), at)).collect() }
    });
    MetricRules { tags: tags.into(), families }
}
