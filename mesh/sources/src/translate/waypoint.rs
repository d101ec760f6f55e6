//! Which waypoint stands in front of an object (waypoint §1.6), strictly: declared and not usable is an error of the
//! object that declared it; a direct path around the waypoint and its policies there is only where an agent is told so.

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_model::service::{ServiceKey, WeightedWaypoint};
use mesh_model::workload::{ApplicationTunnel, GatewayDestination, GatewayRef};

use super::object::{
    AllowedRoutes, Expression, ExpressionOp, Gateway, GatewayAddress, InboundBinding, Kind, LabelSelector, ObjectId, WaypointFor,
};
use super::{Dirty, Labels, Name, Slot, Translator, mark_space};
use crate::diagnostics::{Problem, Severity};

const HBONE_PORT: u16 = 15008;
const USE: &str = "istio.io/use-waypoint";
const USE_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
/// Whether gateways go through the waypoint too, of a Service or ServiceEntry before its Namespace.
const INGRESS: &str = "istio.io/ingress-use-waypoint";
const CANARY: &str = "istio.io/use-waypoint-canary";
const CANARY_NAMESPACE: &str = "istio.io/use-waypoint-canary-namespace";
/// Label of a pod that is an instance of a Gateway.
pub(super) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// What traffic is asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Traffic {
    Service,
    Workload,
}
/// A waypoint as declared by labels.
#[derive(Debug, PartialEq, Eq)]
enum Declared<'a> {
    Nothing,
    OptedOut,
    Waypoint { ns: &'a str, name: &'a str },
}
fn declared<'a>(labels: &'a Labels, own_ns: &'a str, name: &str, namespace: &str) -> Declared<'a> {
    match labels.get(name).map(|t| &**t) {
        None | Some("") => Declared::Nothing,
        Some("none") => Declared::OptedOut,
        Some(name) => Declared::Waypoint { ns: labels.get(namespace).map_or(own_ns, |n| n), name },
    }
}
/// The answer for one object.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// None is asked for, or none for this kind of traffic.
    Nothing,
    /// This one.
    Use(GatewayRef),
    /// One is asked for and cannot be used; whether the object itself asked.
    Unusable { why: String, own: bool },
}

/// A pod that is a waypoint, and how connections are handed to it.
pub(super) struct Instance {
    pub(super) tunnel: Option<ApplicationTunnel>,
}

/// On the root namespace: the network of the cluster. On a Gateway of the class `istio-remote`: the one it leads to.
pub(super) const NETWORK: &str = "topology.istio.io/network";

impl Translator {
    fn space_labels(&self, ns: &str) -> Option<&Labels> {
        self.spaces.get(ns)?.meta.as_ref().map(|m| &m.obj.labels)
    }
    /// The waypoint of an object with `labels` in `ns`.
    pub(super) fn find_waypoint(&self, labels: &Labels, ns: &str, traffic: Traffic) -> Found {
        let (asked, own) = match declared(labels, ns, USE, USE_NAMESPACE) {
            Declared::Nothing => {
                let Some(labels) = self.space_labels(ns) else { return Found::Nothing };
                (declared(labels, ns, USE, USE_NAMESPACE), false)
            }
            d => (d, true),
        };
        match asked {
            Declared::Nothing | Declared::OptedOut => Found::Nothing,
            Declared::Waypoint { ns: wns, name } => self.waypoint(wns, name, ns, traffic, own),
        }
    }
    /// Whether gateways are to go through the waypoint of a service with `labels` in `ns`, if it has one. Any value of its own
    /// label keeps it from its namespace's.
    pub(super) fn ingress_uses_waypoint(&self, labels: &Labels, ns: &str) -> bool {
        let said = labels.get(INGRESS).or_else(|| self.space_labels(ns)?.get(INGRESS));
        said.is_some_and(|value| value.eq_ignore_ascii_case("true"))
    }
    /// Namespace of the (primary) waypoint a service asks for, there or not.
    pub(super) fn waypoint_namespace(&self, key: &ServiceKey) -> Option<Arc<str>> {
        let of = |labels| match declared(labels, &key.namespace, USE, USE_NAMESPACE) {
            Declared::Nothing => None,
            Declared::OptedOut => Some(None),
            Declared::Waypoint { ns, .. } => Some(Some(Arc::from(ns))),
        };
        let own = self.service_labels(key).and_then(of);
        own.or_else(|| self.space_labels(&key.namespace).and_then(of)).flatten()
    }
    fn waypoint(&self, wns: &str, name: &str, client_ns: &str, traffic: Traffic, own: bool) -> Found {
        let unusable = |why: String| Found::Unusable { why, own };
        let Some(slot) = self.gateways.get(&(Arc::from(wns), Arc::from(name)) as &Name) else {
            return unusable(format!("the waypoint {wns}/{name} does not exist"));
        };
        let serves = self.serves(&slot.obj);
        let fits = match traffic {
            Traffic::Service => matches!(serves, WaypointFor::Service | WaypointFor::All),
            Traffic::Workload => matches!(serves, WaypointFor::Workload | WaypointFor::All),
        };
        if !fits {
            // A namespace label speaks of whatever traffic its waypoint serves; a label on the object itself of it.
            return if own {
                unusable(format!("the waypoint {wns}/{name} does not serve this kind of traffic (istio.io/waypoint-for)"))
            } else {
                Found::Nothing
            };
        }
        let Some(at) = self.gateway_ref(wns, &slot.obj) else {
            return unusable(format!("the waypoint {wns}/{name} is not ready: it has no status.addresses"));
        };
        if !self.allows(wns, &slot.obj, client_ns) {
            return unusable(format!("the waypoint {wns}/{name} does not allow namespace {client_ns} (allowedRoutes)"));
        }
        Found::Use(at)
    }
    fn serves(&self, gateway: &Gateway) -> WaypointFor {
        gateway
            .waypoint_for
            .or_else(|| self.classes.get(&gateway.class).and_then(|c| c.waypoint_for))
            .unwrap_or(WaypointFor::Service)
    }
    fn binding(&self, gateway: &Gateway) -> Option<InboundBinding> {
        gateway.binding.or_else(|| self.classes.get(&gateway.class).and_then(|c| c.binding))
    }
    fn gateway_ref(&self, ns: &str, gateway: &Gateway) -> Option<GatewayRef> {
        let destination = match gateway.address.as_ref()? {
            GatewayAddress::Hostname(host) => {
                let ns = self.spaces.get_key_value(ns).map_or_else(|| Arc::from(ns), |(k, _)| Arc::clone(k));
                GatewayDestination::Service(ServiceKey { namespace: ns, hostname: Arc::clone(host) })
            }
            GatewayAddress::Ip(ip) => GatewayDestination::Address(self.view.network.clone(), *ip),
        };
        Some(GatewayRef { destination, hbone_port: HBONE_PORT })
    }
    fn allows(&self, gateway_ns: &str, gateway: &Gateway, client_ns: &str) -> bool {
        let bound = self.binding(gateway).and_then(|b| match b.port {
            Some(port) => gateway.listeners.iter().find(|l| l.port == port),
            None if b.proxy => gateway.listeners.iter().find(|l| &*l.protocol == "istio.io/PROXY"),
            None => None,
        });
        let hbone = || gateway.listeners.iter().find(|l| &*l.protocol == "HBONE" && l.port == HBONE_PORT);
        self.admits(bound.or_else(hbone).map_or(&AllowedRoutes::Same, |l| &l.allowed), gateway_ns, client_ns)
    }
    /// Whether a listener of a Gateway in `gateway_ns` lets objects of `client_ns` attach.
    pub(super) fn admits(&self, allowed: &AllowedRoutes, gateway_ns: &str, client_ns: &str) -> bool {
        match allowed {
            AllowedRoutes::All => true,
            AllowedRoutes::Same => gateway_ns == client_ns,
            AllowedRoutes::Nobody => false,
            AllowedRoutes::Selector(selector) => self.selects_namespace(selector, client_ns),
        }
    }
    /// Whether a selector of namespaces selects this one.
    pub(super) fn selects_namespace(&self, selector: &LabelSelector, ns: &str) -> bool {
        let none = Labels::default();
        selects(selector, self.space_labels(ns).unwrap_or(&none), Some(ns))
    }
    /// Whether the pod is an instance of a waypoint, and how connections are handed to it.
    pub(super) fn instance(&self, labels: &Labels, ns: &Arc<str>) -> Option<Instance> {
        let name = labels.get(GATEWAY_NAME)?;
        let gateway = &self.gateways.get(&(Arc::clone(ns), Arc::clone(name)))?.obj;
        gateway.address.as_ref()?;
        let tunnel = self.binding(gateway).filter(|b| b.proxy).map(|b| ApplicationTunnel::Proxy(b.port));
        Some(Instance { tunnel })
    }

    /// The waypoints of a service, with the canary's share. Trouble with the canary alone leaves the primary.
    pub(super) fn service_waypoints(
        &self,
        labels: &Labels,
        canary_weight: Option<&Arc<str>>,
        ns: &str,
        trouble: &mut Vec<String>,
    ) -> (Vec<WeightedWaypoint>, Option<String>) {
        if matches!(
            labels.get("gateway.istio.io/managed").map(|t| &**t),
            Some("istio.io-mesh-controller" | "istio.io-eastwest-controller" | "istio.io-agentgateway-waypoint-controller")
        ) {
            return (Vec::new(), None);
        }
        let primary = match self.find_waypoint(labels, ns, Traffic::Service) {
            Found::Nothing => return (Vec::new(), None),
            Found::Unusable { why, .. } => return (Vec::new(), Some(why)),
            Found::Use(at) => at,
        };
        let alone = vec![WeightedWaypoint { waypoint: primary.clone(), weight: 100 }];
        // The canary counts only on the level that set the primary.
        let own = declared(labels, ns, USE, USE_NAMESPACE) != Declared::Nothing;
        let meta = self.spaces.get(ns).and_then(|s| s.meta.as_ref());
        let (level, weight) = if own {
            (Some(labels), canary_weight)
        } else {
            (meta.map(|m| &m.obj.labels), meta.and_then(|m| m.obj.canary_weight.as_ref()))
        };
        let Some(Declared::Waypoint { ns: cns, name }) = level.map(|l| declared(l, ns, CANARY, CANARY_NAMESPACE)) else {
            return (alone, None);
        };
        let weight = match weight.map_or(Ok(0), |t| t.parse::<u32>()) {
            Ok(w) if w <= 100 => w,
            _ => {
                trouble.push(
                    "istio.io/use-waypoint-canary-weight is not a number from 0 to 100; only the primary waypoint is used".into(),
                );
                return (alone, None);
            }
        };
        let canary = match self.waypoint(cns, name, ns, Traffic::Service, true) {
            Found::Use(at) => at,
            Found::Nothing => return (alone, None),
            Found::Unusable { why, .. } => {
                trouble.push(format!("canary: {why}; only the primary waypoint is used"));
                return (alone, None);
            }
        };
        if canary == primary {
            trouble.push("the canary waypoint is the primary one".into());
            return (alone, None);
        }
        // With no weight it is drawn by nobody, and still serves who came when it had some.
        (vec![WeightedWaypoint { waypoint: primary, weight: 100 - weight }, WeightedWaypoint { waypoint: canary, weight }], None)
    }

    /// Marks what names one of the dirty gateways.
    pub(super) fn spread_gateways(&self, dirty: &mut Dirty) {
        let gateways: BTreeSet<Name> = dirty.gateways.clone();
        let hit = |labels: &Labels, ns: &str| {
            [(USE, USE_NAMESPACE), (CANARY, CANARY_NAMESPACE)].into_iter().any(|(key, ns_key)| {
                matches!(declared(labels, ns, key, ns_key), Declared::Waypoint { ns, name }
                    if gateways.iter().any(|(n, g)| **n == *ns && **g == *name))
            })
        };
        for (ns, space) in &self.spaces {
            if space.meta.as_ref().is_some_and(|m| hit(&m.obj.labels, ns)) {
                mark_space(ns, space, dirty);
                continue;
            }
            let id = |n: &Arc<str>| (Arc::clone(ns), Arc::clone(n));
            let instance =
                |l: &Labels| l.get(GATEWAY_NAME).is_some_and(|name| gateways.iter().any(|(n, g)| n == ns && g == name));
            dirty
                .pods
                .extend(space.pods.iter().filter(|(_, p)| hit(&p.obj.labels, ns) || instance(&p.obj.labels)).map(|(n, _)| id(n)));
            dirty.entries.extend(space.entries.iter().filter(|(_, e)| hit(&e.obj.labels, ns)).map(|(n, _)| id(n)));
            dirty.hosts.extend(space.services.values().filter(|s| hit(&s.obj.labels, ns)).map(|s| Arc::clone(&s.key.hostname)));
            for (name, se) in &space.service_entries {
                if hit(&se.obj.labels, ns) {
                    dirty.hosts.extend(se.obj.hosts.iter().cloned());
                }
                if se.obj.endpoints.iter().any(|e| hit(&e.labels, ns)) {
                    dirty.service_entries.insert(id(name));
                }
            }
        }
    }

    /// Problems of namespaces whose waypoint cannot be used; told once per namespace, not once per pod.
    pub(super) fn check_namespaces(&mut self) {
        let mut found = Vec::new();
        for (ns, space) in &self.spaces {
            let id = ObjectId { kind: Kind::Namespace, namespace: "".into(), name: Arc::clone(ns) };
            let mut problems = Vec::new();
            if let Some(Slot { obj, origin }) = &space.meta
                && let Declared::Waypoint { ns: wns, name } = declared(&obj.labels, ns, USE, USE_NAMESPACE)
            {
                let usable = self.gateways.get(&(Arc::from(wns), Arc::from(name)) as &Name).map(|g| self.serves(&g.obj));
                let traffic = if usable == Some(WaypointFor::Workload) { Traffic::Workload } else { Traffic::Service };
                if let Found::Unusable { why, .. } = self.waypoint(wns, name, ns, traffic, false) {
                    problems.push(unusable(origin, &why));
                }
            }
            if let Some(Slot { obj, origin }) = space.meta.as_ref().filter(|_| *ns == self.view.root_namespace)
                && let Some(label) = obj.labels.get(NETWORK).filter(|label| ***label != *self.view.network.as_str())
            {
                problems.push(other_network(origin, label, self.view.network.as_str()));
            }
            found.push((id, problems));
        }
        for (id, problems) in found {
            self.note_problems(id, problems);
        }
    }
}

/// The complaint about a cluster that says it is on another network than the agent was told. The agent looks addresses
/// up in its own network; objects put into the label's network would never be found, and their traffic would leave as
/// plaintext. So the label is not followed.
fn other_network(origin: &mesh_model::Origin, label: &str, own: &str) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: origin.clone(),
        field: format!("metadata.labels[{NETWORK:?}]").into(),
        message: format!("the label says network `{label}`, this process was told `{own}`; objects without a network of their own are taken to be on `{own}`").into(),
        fix: format!("start it with NETWORK={label} or without, or correct the label").into(),
        code: Some("network"),
    }
}

/// The complaint about a declared waypoint that cannot be used.
pub(super) fn unusable(origin: &mesh_model::Origin, why: &str) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: origin.clone(),
        field: "metadata.labels[\"istio.io/use-waypoint\"]".into(),
        message: format!("{why}; agents refuse traffic to it unless CULVERT_ON_MISSING_WAYPOINT says otherwise").into(),
        fix: "create the waypoint or wait until it is ready, or set istio.io/use-waypoint: none".into(),
        code: Some("waypoint"),
    }
}

/// Whether a selector selects what has these labels: the namespace `ns`, or something else.
pub(super) fn selects(selector: &LabelSelector, have: &Labels, ns: Option<&str>) -> bool {
    selector.labels.select(have) && selector.expressions.iter().all(|e| expression(e, have, ns))
}
fn expression(e: &Expression, labels: &Labels, ns: Option<&str>) -> bool {
    // Every namespace carries its own name as a label in a cluster; in a folder it may not be written.
    let implied = ns.filter(|_| &*e.key == "kubernetes.io/metadata.name");
    let value = labels.get(&e.key).map(|v| &**v).or(implied);
    match e.op {
        ExpressionOp::In => value.is_some_and(|v| e.values.iter().any(|x| **x == *v)),
        ExpressionOp::NotIn => value.is_none_or(|v| e.values.iter().all(|x| **x != *v)),
        ExpressionOp::Exists => value.is_some(),
        ExpressionOp::DoesNotExist => value.is_none(),
    }
}
