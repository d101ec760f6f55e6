//! Two snapshots as texts by object and field, and where they differ. Each object is taken apart by name, so that a new field
//! must be looked at here.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use mesh_model::policy::{Policy, PolicyBody};
use mesh_model::service::Service;
use mesh_model::snapshot::Snapshot;
use mesh_model::workload::Workload;

/// `kind name` → field → what it says.
pub type Objects = BTreeMap<String, BTreeMap<&'static str, String>>;

/// One field of one object, and what each side says; nothing where it has not got the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub object: String,
    pub field: &'static str,
    pub ours: Option<String>,
    pub istiod: Option<String>,
}

/// The field that stands for the whole object where one side does not have it.
pub const WHOLE: &str = "*";

fn text(value: &impl Debug) -> String {
    format!("{value:?}")
}

fn sorted(values: impl IntoIterator<Item = impl Debug>) -> String {
    let texts: BTreeSet<String> = values.into_iter().map(|value| text(&value)).collect();
    text(&texts)
}

fn workload(w: &Workload) -> BTreeMap<&'static str, String> {
    let Workload {
        uid: _,
        name,
        namespace,
        service_account,
        trust_domain,
        ips,
        hostname,
        network,
        protocol,
        network_mode,
        native_tunnel,
        node,
        cluster,
        locality,
        workload_name,
        workload_type,
        canonical_name,
        canonical_revision,
        health,
        capacity,
        services,
        policies,
        waypoint,
        waypoint_error,
        network_gateway,
        application_tunnel,
        // What istiod does not tell: files and labels.
        netns: _,
        labels: _,
        origin: _,
    } = w;
    [
        ("name", text(name)),
        ("namespace", text(namespace)),
        ("service_account", text(service_account)),
        ("trust_domain", text(trust_domain)),
        ("ips", text(ips)),
        ("hostname", text(hostname)),
        ("network", text(network)),
        ("protocol", text(protocol)),
        ("network_mode", text(network_mode)),
        ("native_tunnel", text(native_tunnel)),
        ("node", text(node)),
        ("cluster", text(cluster)),
        ("locality", text(locality)),
        ("workload_name", text(workload_name)),
        ("workload_type", text(workload_type)),
        ("canonical_name", text(canonical_name)),
        ("canonical_revision", text(canonical_revision)),
        ("health", text(health)),
        ("capacity", text(capacity)),
        ("services", sorted(services.iter())),
        // A set: named twice binds once.
        ("policies", sorted(policies.iter().map(ToString::to_string))),
        ("waypoint", text(waypoint)),
        ("waypoint_error", text(waypoint_error)),
        ("network_gateway", text(network_gateway)),
        ("application_tunnel", text(application_tunnel)),
    ]
    .into()
}

fn service(s: &Service) -> BTreeMap<&'static str, String> {
    let Service {
        key: _,
        name,
        vips,
        cidr_vips,
        ports,
        sans,
        waypoints,
        waypoint_error,
        ingress_use_waypoint,
        lb,
        ip_families,
        canonical,
        visibility,
        global,
        // Not istiod's word: a waypoint learns it from objects, beside what istiod tells.
        logical_dns: _,
        origin: _,
    } = s;
    [
        ("name", text(name)),
        ("vips", text(vips)),
        ("cidr_vips", text(cidr_vips)),
        ("ports", text(ports)),
        ("sans", text(sans)),
        ("waypoints", text(waypoints)),
        ("waypoint_error", text(waypoint_error)),
        ("ingress_use_waypoint", text(ingress_use_waypoint)),
        ("lb", text(lb)),
        ("ip_families", text(ip_families)),
        ("canonical", text(canonical)),
        ("visibility", text(visibility)),
        ("global", text(global)),
    ]
    .into()
}

fn policy(p: &Policy) -> BTreeMap<&'static str, String> {
    let Policy { key: _, scope, body, origin: _ } = p;
    let mut fields = BTreeMap::from([("scope", text(scope))]);
    match body {
        // The order of rules, clauses and matches means nothing.
        PolicyBody::Rules { action, dry_run, rules } => {
            let clauses = |rule: &mesh_model::policy::Rule| sorted(rule.clauses.iter().map(|c| sorted(&c.matches)));
            fields.extend([("action", text(action)), ("dry_run", text(dry_run)), ("rules", sorted(rules.iter().map(clauses)))]);
        }
        PolicyBody::Unusable { why } => drop(fields.insert("unusable", text(why))),
    }
    fields
}

/// All that the agent knows of the mesh.
pub fn objects(snapshot: &Snapshot) -> Objects {
    let workloads = snapshot.workloads().map(|w| (format!("workload {}", w.uid), workload(w)));
    let services = snapshot.services().map(|s| (format!("service {}", s.key), service(s)));
    let policies = snapshot.policies().map(|p| (format!("policy {}", p.key), policy(p)));
    let view = ("view".to_owned(), BTreeMap::from([("locality", text(&snapshot.view().locality))]));
    workloads.chain(services).chain(policies).chain([view]).collect()
}

/// Where they differ.
pub fn differences(ours: &Objects, istiod: &Objects) -> Vec<Found> {
    let names: BTreeSet<&String> = ours.keys().chain(istiod.keys()).collect();
    let mut found = Vec::new();
    for object in names {
        let mut tell = |field, ours: Option<String>, istiod| found.push(Found { object: object.clone(), field, ours, istiod });
        let (Some(a), Some(b)) = (ours.get(object), istiod.get(object)) else {
            tell(WHOLE, ours.get(object).map(text), istiod.get(object).map(text));
            continue;
        };
        let fields: BTreeSet<&&'static str> = a.keys().chain(b.keys()).collect();
        for field in fields.into_iter().filter(|field| a.get(**field) != b.get(**field)) {
            tell(field, a.get(field).cloned(), b.get(field).cloned());
        }
    }
    found
}
