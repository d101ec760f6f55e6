//! The catalog as texts that a folder may hold: a ServiceEntry for each service, a WorkloadEntry for each instance.
//!
//! Owns the joins: which instances are one workload, which services it belongs to, which port and address a service has. Pure:
//! answers of Consul go in, texts that changed come out. Upstream: [`super::watch`]. Downstream: [`crate::files`], so that
//! everything is read by the one translator.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_model::Origin;
use serde_json::{Map, Value, json};

use super::instance::{self, Fault, Instance, text};
use super::intentions::{Account, Intentions};
use crate::diagnostics::{Problem, Severity};

/// Texts by their names; `None` for one that is none any more.
pub(super) type Texts = Vec<(PathBuf, Option<Result<String, String>>)>;
/// Node and address.
type Place = (Arc<str>, Arc<str>);

/// Begins the labels that tie instances to their services.
const MEMBER: &str = "consul.culvert.dev";
/// The account of a workload whose services name different ones: nobody's.
const NOBODY: &str = "culvert-conflict";
/// The tag of a gateway's instances.
const GATEWAY: &str = "gateway.networking.k8s.io/gateway-name";
/// Where services that Consul gives no address have theirs: class E, as Istio's and Consul's own, but for the parts that those use.
const ADDRESSES: (u32, u32) = (0xf400_0000, 0x03ff_ffff);

/// A service.
#[derive(Debug, Default)]
struct Entry {
    instances: Vec<Instance>,
    faults: Vec<Fault>,
    /// Whether its instances have been told.
    known: bool,
}

/// The catalog; see the module.
#[derive(Debug)]
pub(super) struct Catalog {
    /// `consul`.
    domain: String,
    services: BTreeMap<Arc<str>, Entry>,
    /// Protocols that service-defaults declare.
    protocols: BTreeMap<String, String>,
    /// Services that have instances at a place.
    places: BTreeMap<Place, BTreeSet<Arc<str>>>,
    /// Which hosts would have an allocated address: the first has it.
    wanted: BTreeMap<Ipv4Addr, BTreeSet<(String, Arc<str>)>>,
    /// What of it a service wants.
    wants: BTreeMap<Arc<str>, Vec<(Ipv4Addr, String)>>,
    intentions: Intentions,
    trust_domain: String,
    stale_intentions: bool,
    /// The node this process is on: where it is says how far others are.
    own_node: String,
    /// Services that went.
    gone: Vec<Arc<str>>,
    stale_services: BTreeSet<Arc<str>>,
    stale_places: BTreeSet<Place>,
    /// By text.
    problems: BTreeMap<PathBuf, Vec<Problem>>,
}

impl Catalog {
    /// A catalog of which nothing is known. `domain`: of Consul's DNS.
    pub fn new(domain: &str, trust_domain: &str, own_node: &str) -> Self {
        Self {
            domain: domain.to_owned(),
            services: BTreeMap::new(),
            protocols: BTreeMap::new(),
            places: BTreeMap::new(),
            wanted: BTreeMap::new(),
            wants: BTreeMap::new(),
            intentions: Intentions::default(),
            trust_domain: trust_domain.to_owned(),
            stale_intentions: false,
            own_node: own_node.to_owned(),
            gone: Vec::new(),
            stale_services: BTreeSet::new(),
            stale_places: BTreeSet::new(),
            problems: BTreeMap::new(),
        }
    }

    /// Takes in the names of all services (`/v1/catalog/services`).
    pub fn name(&mut self, answer: &Value) -> Result<(), String> {
        let names = answer.as_object().ok_or("the list of services is no object")?;
        let gone: Vec<Arc<str>> = self.services.keys().filter(|name| !names.contains_key(&***name)).cloned().collect();
        for name in gone {
            self.replace(&name, Entry::default());
            self.services.remove(&name);
            self.gone.push(name);
        }
        for name in names.keys() {
            if !self.services.contains_key(name.as_str()) {
                self.services.insert(name.as_str().into(), Entry::default());
            }
        }
        Ok(())
    }
    /// All services.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.services.keys()
    }
    /// Whether the instances of every service have been told.
    pub fn is_whole(&self) -> bool {
        self.services.values().all(|entry| entry.known)
    }
    /// How many instances there are.
    pub fn count(&self) -> usize {
        self.services.values().map(|entry| entry.instances.len()).sum()
    }

    /// Takes in the instances of one service (`/v1/health/service/NAME`). Of one that is refused, what it was before stays.
    pub fn fill(&mut self, service: &str, answer: &Value) -> Result<(), String> {
        let elements = answer.as_array().ok_or("the list of instances is no list")?;
        let Some((name, old)) = self.services.get_key_value(service) else { return Ok(()) };
        let name = Arc::clone(name);
        let mut entry = Entry { known: true, ..Entry::default() };
        if !is_label(service) {
            let message = "neither DNS nor the mesh can reach a service of this name".to_owned();
            let fix = "name it with lower-case letters, digits and `-`";
            entry.faults.push(Fault { instance: String::new(), field: "Service.Service".into(), message, fix, fatal: true });
            self.replace(&name, entry);
            return Ok(());
        }
        for element in elements {
            match instance::read(service, element, &mut entry.faults) {
                Ok(instance) => entry.instances.extend(instance),
                Err(fault) => {
                    let (id, node) = (text(&element["Service"], "ID"), text(&element["Node"], "Node"));
                    entry.instances.extend(old.instances.iter().find(|i| *i.id == *id && *i.node == *node).cloned());
                    entry.faults.push(fault);
                }
            }
        }
        entry.instances.sort_by(|a, b| (&a.node, &a.id).cmp(&(&b.node, &b.id)));
        self.replace(&name, entry);
        Ok(())
    }

    /// Takes in the declared protocols (`/v1/config/service-defaults`).
    pub fn declare(&mut self, answer: &Value) -> Result<(), String> {
        let entries = answer.as_array().ok_or("the list of service-defaults is no list")?;
        let protocol = |entry: &Value| (text(entry, "Name").to_owned(), text(entry, "Protocol").to_owned());
        let new: BTreeMap<String, String> = entries.iter().map(protocol).collect();
        for name in self.services.keys() {
            if new.get(&**name) != self.protocols.get(&**name) {
                self.stale_services.insert(Arc::clone(name));
            }
        }
        self.protocols = new;
        Ok(())
    }

    /// Takes in who may call whom.
    pub fn intend(&mut self, answer: &Value) -> Result<(), String> {
        self.intentions = Intentions::read(answer)?;
        self.stale_intentions = true;
        Ok(())
    }

    fn replace(&mut self, name: &Arc<str>, new: Entry) {
        let Some(entry) = self.services.get_mut(name) else { return };
        let old = std::mem::replace(entry, new);
        if old.known && old.instances == entry.instances && old.faults == entry.faults {
            return;
        }
        let place = |i: &Instance| (Arc::clone(&i.node), Arc::clone(&i.address));
        for at in old.instances.iter().map(place) {
            if let Some(there) = self.places.get_mut(&at) {
                there.remove(name);
                if there.is_empty() {
                    self.places.remove(&at);
                }
            }
            self.stale_places.insert(at);
        }
        for at in entry.instances.iter().map(place) {
            self.places.entry(at.clone()).or_default().insert(Arc::clone(name));
            self.stale_places.insert(at);
        }
        self.stale_intentions |= who(&old.instances) != who(&entry.instances);
        self.stale_services.insert(Arc::clone(name));
    }

    /// What changed since this was asked last.
    pub fn take(&mut self) -> Texts {
        let mut out = Texts::new();
        while let Some(name) = self.stale_services.pop_first() {
            let path = PathBuf::from(format!("consul service {name}"));
            self.want(&name);
            let mut problems = Vec::new();
            let text = self.service_text(&name, &mut problems);
            self.note(&path, problems);
            out.push((path, (!text.is_empty()).then_some(Ok(text))));
        }
        let stale = std::mem::take(&mut self.stale_places);
        if stale.iter().any(|(node, _)| **node == *self.own_node) {
            out.push((PathBuf::from("consul node"), self.own_node_text().map(Ok)));
        }
        for place in stale {
            let path = PathBuf::from(format!("consul workload {} {}", place.0, place.1));
            let mut problems = Vec::new();
            let text = self.place_text(&place, &mut problems);
            self.note(&path, problems);
            out.push((path, (!text.is_empty()).then_some(Ok(text))));
        }
        out.extend(self.gone.drain(..).map(|name| (PathBuf::from(format!("consul intentions {name}")), None)));
        if std::mem::take(&mut self.stale_intentions) {
            let texts = self.services.keys().map(|name| {
                let text = self.intentions_text(name);
                (PathBuf::from(format!("consul intentions {name}")), (!text.is_empty()).then_some(Ok(text)))
            });
            out.extend(texts);
        }
        out
    }
    /// The node of this process, where an instance on it says where that is.
    fn own_node_text(&self) -> Option<String> {
        let from: Place = (self.own_node.as_str().into(), "".into());
        let (_, services) = self.places.range(from..).next().filter(|((node, _), _)| **node == *self.own_node)?;
        let instances = &self.services.get(services.first()?)?.instances;
        let locality = &instances.iter().find(|i| *i.node == *self.own_node)?.locality;
        let mut parts = locality.splitn(3, '/');
        let mut part = || parts.next().unwrap_or_default();
        let labels = json!({
            "topology.kubernetes.io/region": part(), "topology.kubernetes.io/zone": part(), "topology.istio.io/subzone": part(),
        });
        let metadata = json!({ "name": self.own_node, "labels": labels });
        Some(json!({ "apiVersion": "v1", "kind": "Node", "metadata": metadata }).to_string())
    }
    fn note(&mut self, path: &Path, problems: Vec<Problem>) {
        if problems.is_empty() {
            self.problems.remove(path);
        } else {
            self.problems.insert(path.to_path_buf(), problems);
        }
    }
    /// What is wrong with registrations.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.values().flatten().chain(self.intentions.problems())
    }

    /// What intentions deny of a service: at its workloads, and, where it has a waypoint, there.
    fn intentions_text(&self, name: &Arc<str>) -> String {
        let mut out = String::new();
        let instances = self.services.get(name).map(|entry| entry.instances.as_slice()).unwrap_or_default();
        if self.intentions.is_open() {
            return out;
        }
        let namespaces: BTreeSet<&Arc<str>> = instances.iter().map(|i| &i.namespace).collect();
        let accounts = |source: &str| match self.services.get(source).filter(|entry| !entry.instances.is_empty()) {
            Some(entry) => entry.instances.iter().map(|i| (Arc::clone(&i.namespace), Arc::clone(&i.account))).collect(),
            // Not there yet: whoever registers it without a word about it has this one.
            None => BTreeSet::from([("default".into(), source.into())]),
        };
        for namespace in namespaces {
            let here: Vec<&Instance> = instances.iter().filter(|i| i.namespace == *namespace).collect();
            let (labels, _) = common_labels(&here);
            let waypoint = labels.get("istio.io/use-waypoint").filter(|name| *name != "none");
            let through = waypoint.map(|gateway| {
                let at = labels.get("istio.io/use-waypoint-namespace").map_or(&**namespace, String::as_str);
                self.gateways(at, gateway)
            });
            let metadata = |name: String| json!({ "name": name, "namespace": &**namespace });
            let policy = |metadata: Value, bound: (&str, Value), rule: Value| {
                let mut spec = json!({ "action": "DENY", "rules": [rule] });
                spec[bound.0] = bound.1;
                json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec })
            };
            let rule = |through| self.intentions.rule(name, &self.trust_domain, accounts, through);
            if let Some(rule) = rule(through.clone().unwrap_or_default()) {
                let selector = json!({ "matchLabels": { member(name): "true" } });
                push(&mut out, &policy(metadata(format!("intentions.{name}.consul")), ("selector", selector), rule));
            }
            if through.is_some()
                && let Some(rule) = rule(BTreeSet::new())
            {
                let target =
                    json!([{ "group": "networking.istio.io", "kind": "ServiceEntry", "name": self.hosts(name).first() }]);
                push(&mut out, &policy(metadata(format!("intentions.{name}.waypoint.consul")), ("targetRefs", target), rule));
            }
        }
        out
    }
    /// Accounts of the instances of a gateway.
    fn gateways(&self, namespace: &str, gateway: &str) -> BTreeSet<Account> {
        let all = self.services.values().flat_map(|entry| &entry.instances);
        let is_it = |i: &&Instance| *i.namespace == *namespace && i.labels.get(GATEWAY).is_some_and(|name| name == gateway);
        all.filter(is_it).map(|i| (Arc::clone(&i.namespace), Arc::clone(&i.account))).collect()
    }

    /// Hosts of a service: `NAME.service.consul`, and with each datacenter.
    fn hosts(&self, name: &str) -> Vec<String> {
        let instances = self.services.get(name).map(|e| e.instances.as_slice()).unwrap_or_default();
        let centers: BTreeSet<&str> = instances.iter().map(|i| &*i.datacenter).filter(|dc| is_label(dc)).collect();
        let of_center = centers.into_iter().map(|dc| format!("{name}.service.{dc}.{}", self.domain));
        std::iter::once(format!("{name}.service.{}", self.domain)).chain(of_center).collect()
    }

    /// Brings the claims to addresses in line with a service; who else claims them is looked at again.
    fn want(&mut self, name: &Arc<str>) {
        let has_any = self.services.get(name).is_some_and(|e| !e.instances.is_empty());
        let hosts = if has_any { self.hosts(name) } else { Vec::new() };
        let new: Vec<(Ipv4Addr, String)> = hosts.into_iter().map(|host| (address_of(&host), host)).collect();
        let old = self.wants.remove(name).unwrap_or_default();
        for (ip, host) in old.iter().filter(|want| !new.contains(want)) {
            if let Some(claims) = self.wanted.get_mut(ip) {
                claims.remove(&(host.clone(), Arc::clone(name)));
                self.stale_services.extend(claims.iter().map(|(_, other)| Arc::clone(other)));
                if claims.is_empty() {
                    self.wanted.remove(ip);
                }
            }
        }
        for (ip, host) in new.iter().filter(|want| !old.contains(want)) {
            let claims = self.wanted.entry(*ip).or_default();
            self.stale_services.extend(claims.iter().map(|(_, other)| Arc::clone(other)));
            claims.insert((host.clone(), Arc::clone(name)));
        }
        if !new.is_empty() {
            self.wants.insert(Arc::clone(name), new);
        }
    }

    /// The ServiceEntries of a service, one for each namespace its instances are in.
    fn service_text(&self, name: &Arc<str>, problems: &mut Vec<Problem>) -> String {
        let Some(entry) = self.services.get(name) else { return String::new() };
        let place: Arc<str> = format!("consul service {name}").into();
        let problem = |object: &str, field: &str, message: String, fix: &str, severity| Problem {
            severity,
            origin: Origin { place: Arc::clone(&place), line: 0, object: object.into() },
            field: field.into(),
            message: message.into(),
            fix: fix.into(),
            code: Some("consul"),
        };
        for fault in &entry.faults {
            let (severity, object) =
                if fault.fatal { (Severity::Error, &*fault.instance) } else { (Severity::Warning, &*fault.instance) };
            let message = match (fault.fatal, fault.instance.is_empty()) {
                (true, false) => format!("{}; the instance is refused, what it was before stays", fault.message),
                _ => fault.message.clone(),
            };
            problems.push(problem(object, &fault.field, message, fault.fix, severity));
        }
        let namespaces: BTreeSet<&Arc<str>> = entry.instances.iter().map(|i| &i.namespace).collect();
        if namespaces.len() > 1 {
            let all: Vec<&str> = namespaces.iter().map(|ns| &***ns).collect();
            let message = format!("its instances are in several namespaces ({}), so it is several services", all.join(", "));
            let fix = "register all instances with one culvert-namespace";
            problems.push(problem(name, "Service.Meta[\"culvert-namespace\"]", message, fix, Severity::Warning));
        }
        let mut out = String::new();
        for namespace in namespaces {
            let here: Vec<&Instance> = entry.instances.iter().filter(|i| i.namespace == *namespace).collect();
            let (labels, unclear) = common_labels(&here);
            for key in unclear {
                let message = format!("instances say different things by the tag `{key}`, so nothing of it can be used");
                problems.push(problem(name, "Service.Tags", message, "register all instances with the same", Severity::Error));
            }
            let hosts = self.hosts(name);
            let vip = here.iter().find_map(|i| i.vip);
            let mut addresses = Vec::new();
            for (at, host) in hosts.iter().enumerate() {
                let own = address_of(host);
                let is_first = self.wanted.get(&own).and_then(BTreeSet::first).is_none_or(|(first, _)| first == host);
                match vip.filter(|_| at == 0) {
                    Some(ip) => addresses.push(json!({ "value": ip, "host": host })),
                    None if is_first => addresses.push(json!({ "value": own, "host": host })),
                    None => {
                        let message = format!("{host} has no address: {own} is another service's");
                        let fix = "give the service one by culvert-address";
                        problems.push(problem(name, "Service.Meta[\"culvert-address\"]", message, fix, Severity::Warning));
                    }
                }
            }
            let location = if here.iter().any(|i| i.ambient) { "MESH_INTERNAL" } else { "MESH_EXTERNAL" };
            let protocol = protocol(self.protocols.get(&**name).map_or("", String::as_str));
            let ports: Vec<Value> = ports(&here)
                .into_iter()
                .map(|port| json!({ "number": port, "name": port_name(port, name), "protocol": protocol }))
                .collect();
            push(
                &mut out,
                &json!({
                    "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
                    "metadata": { "name": hosts.first(), "namespace": &**namespace, "labels": labels },
                    "spec": {
                        "hosts": hosts, "location": location, "resolution": "STATIC", "ports": ports,
                        "workloadSelector": { "labels": { member(name): "true" } },
                    },
                    "status": { "addresses": addresses },
                }),
            );
        }
        out
    }

    /// The workloads at a place. Where a member of the mesh is, all that is there is one workload with one identity: it is one
    /// network namespace. Elsewhere, as on the address of a node, each instance is for itself.
    fn place_text(&self, place: &Place, problems: &mut Vec<Problem>) -> String {
        let here: Vec<(&Arc<str>, &Instance)> = self
            .places
            .get(place)
            .into_iter()
            .flatten()
            .filter_map(|name| Some((name, self.services.get(name)?)))
            .flat_map(|(name, entry)| entry.instances.iter().map(move |i| (name, i)))
            .filter(|(_, i)| i.node == place.0 && i.address == place.1)
            .collect();
        let mut out = String::new();
        let Some(lead) = here.iter().find(|(_, i)| i.ambient) else {
            for one in &here {
                push(&mut out, &self.workload(one.1, &one.1.account, std::slice::from_ref(one)));
            }
            return out;
        };
        let differs =
            |(_, i): &&(&Arc<str>, &Instance)| i.ambient && (&i.namespace, &i.account) != (&lead.1.namespace, &lead.1.account);
        let other = here.iter().find(differs);
        if let Some((name, other)) = other {
            problems.push(Problem {
                severity: Severity::Error,
                origin: Origin {
                    place: format!("consul workload {} {}", place.0, place.1).into(),
                    line: 0,
                    object: format!("services {} and {name}", lead.0).into(),
                },
                field: "Service.Meta[\"culvert-service-account\"]".into(),
                message: format!(
                    "what is at one address has one identity, and these say {}/{} and {}/{}; until they agree it is nobody's",
                    lead.1.namespace, lead.1.account, other.namespace, other.account
                )
                .into(),
                fix: "register them with the same culvert-namespace and culvert-service-account".into(),
                code: Some("consul"),
            });
        }
        let account = if other.is_some() { NOBODY } else { &lead.1.account };
        push(&mut out, &self.workload(lead.1, account, &here));
        out
    }

    /// One workload, of the instances it is.
    fn workload(&self, lead: &Instance, account: &str, instances: &[(&Arc<str>, &Instance)]) -> Value {
        let healthy = instances.iter().any(|(_, i)| i.healthy);
        let (mut labels, mut serves) = (Map::new(), Map::new());
        for (name, instance) in instances {
            // What of it is well serves; what is not does not pull the rest down.
            if instance.healthy || !healthy {
                labels.insert(member(name), "true".into());
                let all = self.services.get(*name).into_iter().flat_map(|entry| &entry.instances);
                let of_service: Vec<&Instance> = all.filter(|i| i.namespace == instance.namespace).collect();
                for port in ports(&of_service) {
                    let own = if instance.port == 0 { port } else { instance.port };
                    serves.insert(port_name(port, name), own.into());
                }
            }
            for (key, value) in &instance.labels {
                labels.entry(key.clone()).or_insert_with(|| value.clone().into());
            }
        }
        if let Some((name, _)) = instances.iter().find(|(_, i)| std::ptr::eq(*i, lead)) {
            labels.entry("service.istio.io/canonical-name").or_insert_with(|| name.to_string().into());
        }
        let mut annotations = Map::new();
        annotations.insert("proxy.istio.io/health-checks-enabled".into(), "true".into());
        annotations.insert("culvert.dev/node".into(), (*lead.node).into());
        if let Some(netns) = instances.iter().find_map(|(_, i)| i.netns.as_ref()) {
            annotations.insert("culvert.dev/netns".into(), (**netns).into());
        }
        if lead.ambient {
            annotations.insert("ambient.istio.io/redirection".into(), "enabled".into());
        }
        json!({
            "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
            "metadata": {
                "name": workload_name(&lead.id, &lead.node), "namespace": &*lead.namespace,
                "labels": labels, "annotations": annotations,
            },
            "spec": {
                "address": &*lead.address, "ports": serves, "locality": lead.locality, "weight": lead.weight,
                "serviceAccount": account,
            },
            "status": { "conditions": [{ "type": "Healthy", "status": if healthy { "True" } else { "False" } }] },
        })
    }
}

fn push(out: &mut String, object: &Value) {
    out.push_str("---\n");
    out.push_str(&object.to_string());
    out.push('\n');
}

/// The label by which a workload belongs to a service.
pub(super) fn member(service: &str) -> String {
    format!("{MEMBER}/{service}")
}
/// No other service's port has this name, and no protocol is read out of it.
fn port_name(port: u16, service: &str) -> String {
    format!("p{port}-{service}")
}
/// Ports of a service: what its instances say, else those they listen on.
fn ports(instances: &[&Instance]) -> BTreeSet<u16> {
    let said: BTreeSet<u16> = instances.iter().filter_map(|i| i.service_port).collect();
    if said.is_empty() { instances.iter().map(|i| i.port).filter(|port| *port != 0).collect() } else { said }
}
/// Consul's word for a protocol in Istio's. What is not declared is seen.
fn protocol(consul: &str) -> &'static str {
    match consul {
        "http" => "HTTP",
        "http2" => "HTTP2",
        "grpc" => "GRPC",
        _ => "",
    }
}

/// Namespace, account, and the labels that say who is a gateway or behind one.
type Who<'i> = (&'i Arc<str>, &'i Arc<str>, Vec<(&'i String, &'i String)>);
/// What intentions depend on.
fn who(instances: &[Instance]) -> BTreeSet<Who<'_>> {
    let matters = |(key, _): &(&String, &String)| key.starts_with("istio.io/") || *key == GATEWAY;
    instances.iter().map(|i| (&i.namespace, &i.account, i.labels.iter().filter(matters).collect())).collect()
}
/// Labels of a service: what its instances say that have the label, as long as they agree. Of the keys of Istio that are
/// unclear a value stays that nothing has, so that what depends on them refuses.
fn common_labels(instances: &[&Instance]) -> (BTreeMap<String, String>, Vec<String>) {
    let mut values: BTreeMap<&String, BTreeSet<&String>> = BTreeMap::new();
    for (key, value) in instances.iter().flat_map(|i| &i.labels) {
        values.entry(key).or_default().insert(value);
    }
    let (mut labels, mut unclear) = (BTreeMap::new(), Vec::new());
    for (key, values) in values {
        let mut each = values.into_iter();
        match (each.next(), each.next()) {
            (Some(value), None) => drop(labels.insert(key.clone(), value.clone())),
            (Some(_), Some(_)) if key.starts_with("istio.io/") => {
                labels.insert(key.clone(), "unclear".into());
                unclear.push(key.clone());
            }
            _ => {}
        }
    }
    (labels, unclear)
}

/// A name of Kubernetes for an instance, and nobody else's: ids may be any text.
fn workload_name(id: &str, node: &str) -> String {
    let plain = format!("{id}.{node}");
    if plain.len() <= 200 && plain.split('.').all(is_label) {
        return plain;
    }
    let good = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = plain.chars().take(100).map(good).collect();
    format!("x{}-{:016x}", text.trim_matches('-'), fnv(&format!("{id}\0{node}")))
}
/// One part of a DNS name.
fn is_label(text: &str) -> bool {
    instance::is_name(text) && !text.contains('.')
}
/// The address of a host that has no other: the same in every process.
fn address_of(host: &str) -> Ipv4Addr {
    let hash = fnv(host);
    let (from, mask) = ADDRESSES;
    Ipv4Addr::from(from | ((hash ^ (hash >> 32)) as u32 & mask))
}
/// FNV-1a: no library's hash is promised to stay as it is, and processes of different versions must agree.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
