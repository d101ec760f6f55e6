//! What istiod told, resource by resource, and what follows from the next response. Pure: no clock, no I/O.
//!
//! Owns: names and versions (for resuming after a reconnect), what each name stands for (a removal says the name only), the
//! refused ones with their reasons, and which policies workloads name that never arrived. Refuses a resource alone; the
//! others of its response count. Upstream: the stream. Downstream: [`crate::publisher`], through changes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::policy::{Policy, PolicyKey, Scope};
use mesh_model::service::{Service, ServiceKey};
use mesh_model::wanted::Wanted;
use mesh_model::workload::{Locality, NetworkMode, Workload};
use mesh_model::{Change, Network, NetworkAddr, Origin};
use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use mesh_proto::istio::security::Authorization;
use mesh_proto::istio::workload::{Address, address};
use mesh_proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Message};

use super::convert::{self, Bad};
use crate::diagnostics::{Problem, Severity};
use crate::translate::Interner;

/// The types we subscribe to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Workloads and services.
    Address,
    /// L4 policies.
    Authorization,
}

impl Kind {
    /// In the order in which they are asked for.
    pub(super) const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The resource type on the wire.
    pub(super) fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
        }
    }

    pub(super) fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }
}

/// What a name stands for.
#[derive(Debug, Default)]
enum What {
    /// Refused, and nothing was good before.
    #[default]
    Nothing,
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(PolicyKey),
}

impl What {
    /// By what it can be asked for.
    fn wanted(&self) -> Vec<Wanted> {
        let at =
            |network: &Network, ip: &IpAddr| Wanted::Address(NetworkAddr { network: network.clone(), ip: ip.to_canonical() });
        match self {
            // One on the host's network is nobody's by its address.
            Self::Workload(w) if w.network_mode == NetworkMode::HostNetwork => vec![Wanted::Workload(Arc::clone(&w.uid))],
            Self::Workload(w) => {
                let addresses = w.ips.iter().map(|ip| at(&w.network, ip));
                addresses.chain([Wanted::Workload(Arc::clone(&w.uid))]).collect()
            }
            Self::Service(s) => {
                let addresses = s.vips.iter().map(|vip| at(&vip.network, &vip.ip));
                addresses.chain([Wanted::Service(s.key.clone())]).collect()
            }
            Self::Policy(_) | Self::Nothing => Vec::new(),
        }
    }

    /// The waypoints and gateways it refers to.
    fn gateways(&self) -> impl Iterator<Item = Wanted> {
        let (workload, service) = match self {
            Self::Workload(w) => (Some(w), None),
            Self::Service(s) => (None, Some(s)),
            Self::Policy(_) | Self::Nothing => (None, None),
        };
        let of_workload =
            workload.into_iter().flat_map(|w| w.waypoint.as_deref().into_iter().chain(w.network_gateway.as_deref()));
        let of_service = service.into_iter().flat_map(|s| s.waypoints.iter().map(|w| &w.waypoint));
        of_workload.chain(of_service).map(Wanted::from)
    }
}

/// Things said to be passed over, at most.
const MOST_PASSED_OVER: usize = 100;

/// One resource as it was last told.
#[derive(Debug, Default)]
struct Held {
    /// Empty for a refused one: no version of istiod's equals it, so after a reconnect it is told again or removed.
    version: Box<str>,
    what: What,
    /// It only stands in for what cannot be used.
    stand_in: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct State {
    held: BTreeMap<Kind, HashMap<Box<str>, Held>>,
    problems: BTreeMap<(Kind, Box<str>), Problem>,
    /// Policies by key: whether they are there, and how many workloads name them.
    policies: HashMap<PolicyKey, Named>,
    missing: HashSet<PolicyKey>,
    texts: Interner,
    /// The node we are on, and where it is: as its workloads say.
    node: Arc<str>,
    locality: Locality,
    /// Whether addresses are told on demand.
    on_demand: bool,
    /// What was said to be passed over.
    passed_over: HashSet<Box<str>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Named {
    there: bool,
    users: usize,
}

/// What follows from a response.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) changes: Vec<Change>,
    /// Names and reasons of what is refused; none means: acknowledge.
    pub(super) refused: Vec<(Box<str>, Bad)>,
    /// Resources and removals in the response.
    pub(super) count: usize,
    /// On demand: what it brought, what it took, and the names of what there is not.
    pub(super) present: Vec<Wanted>,
    pub(super) absent: Vec<Wanted>,
    pub(super) unknown: Vec<String>,
}

impl State {
    /// Nothing told, for an agent of this node.
    pub(super) fn new(node: Arc<str>, on_demand: bool) -> Self {
        Self { node, on_demand, ..Self::default() }
    }

    /// Takes one response in.
    pub(super) fn receive(&mut self, kind: Kind, response: DeltaDiscoveryResponse) -> Received {
        let count = response.resources.len() + response.removed_resources.len();
        let mut out = Received { count, ..Received::default() };
        out.changes.reserve(count);
        for name in response.removed_resources {
            let gone = self.remove(kind, &name, &mut out.changes);
            if self.on_demand {
                match gone {
                    Some(what) => out.absent.extend(what.wanted()),
                    None => out.unknown.push(name),
                }
            }
        }
        for resource in response.resources {
            let name: Box<str> = resource.name.as_str().into();
            let put = self.put(kind, resource, &mut out.changes);
            // Also what only stands in: who asked is to know that it refuses.
            if self.on_demand {
                let held = self.held.get(&kind).and_then(|held| held.get(&name));
                out.present.extend(held.map(|held| held.what.wanted()).unwrap_or_default());
            }
            match put {
                Ok(()) => {
                    self.problems.remove(&(kind, name));
                }
                Err(why) => {
                    self.problems.insert((kind, name.clone()), problem(kind, &name, &why));
                    out.refused.push((name, why));
                }
            }
        }
        self.texts.prune();
        out
    }

    /// Every name with the version it has here: what a new stream starts from.
    pub(super) fn versions(&self, kind: Kind) -> BTreeMap<String, String> {
        let held = self.held.get(&kind).into_iter().flatten();
        held.map(|(name, held)| (name.to_string(), held.version.to_string())).collect()
    }

    /// On demand: the waypoints and gateways that what is held refers to.
    pub(super) fn gateways(&self) -> HashSet<Wanted> {
        self.held.get(&Kind::Address).into_iter().flatten().flat_map(|(_, held)| held.what.gateways()).collect()
    }

    /// On demand: the services that are of use, by what they can be asked for, or that lead to what is (waypoints, gateways); with the
    /// versions of them and of their endpoints.
    pub(super) fn services_with(&self, is_used: impl Fn(&Wanted) -> bool) -> (Vec<String>, BTreeMap<String, String>) {
        let held = || self.held.get(&Kind::Address).into_iter().flatten();
        let used = held().filter(|(_, held)| held.what.wanted().iter().any(&is_used));
        let gateways: HashSet<Wanted> = used.flat_map(|(_, held)| held.what.gateways()).collect();
        let services: HashMap<&ServiceKey, &str> = held()
            .filter_map(|(name, held)| match &held.what {
                What::Service(s) if held.what.wanted().iter().any(|w| is_used(w) || gateways.contains(w)) => {
                    Some((&s.key, &**name))
                }
                _ => None,
            })
            .collect();
        let is_of = |what: &What| match what {
            What::Service(s) => services.contains_key(&s.key),
            What::Workload(w) => w.services.keys().any(|key| services.contains_key(key)),
            What::Policy(_) | What::Nothing => false,
        };
        let known = held().filter(|(_, held)| is_of(&held.what));
        let versions = known.map(|(name, held)| (name.to_string(), held.version.to_string())).collect();
        (services.into_values().map(str::to_owned).collect(), versions)
    }

    /// On demand: forgets every address that nobody asks for, that is of no service somebody asks for, and that is not on our own
    /// node. Gives the names of what went, and what follows.
    pub(super) fn forget(&mut self, is_asked_for: impl Fn(&Wanted) -> bool) -> (Vec<String>, Vec<Change>) {
        let asked = |what: &What| what.wanted().iter().any(&is_asked_for);
        let held = || self.held.get(&Kind::Address).into_iter().flatten();
        let services: HashSet<&ServiceKey> = held()
            .filter_map(|(_, held)| match &held.what {
                What::Service(s) if asked(&held.what) => Some(&s.key),
                _ => None,
            })
            .collect();
        let stays = |what: &What| match what {
            What::Workload(w) => *w.node == *self.node || w.services.keys().any(|key| services.contains(key)) || asked(what),
            What::Service(s) => services.contains(&s.key),
            What::Policy(_) | What::Nothing => false,
        };
        let gone: Vec<String> = held().filter(|(_, held)| !stays(&held.what)).map(|(name, _)| name.to_string()).collect();
        let mut changes = Vec::new();
        for name in &gone {
            self.remove(Kind::Address, name, &mut changes);
        }
        (gone, changes)
    }

    /// The refused resources.
    pub(super) fn problems(&self) -> Vec<Problem> {
        self.problems.values().cloned().collect()
    }

    /// Policies that workloads name and that are not there: their workloads refuse.
    pub(super) fn missing(&self) -> &HashSet<PolicyKey> {
        &self.missing
    }

    /// Whether a policy is there.
    pub(super) fn has_policy(&self, key: &PolicyKey) -> bool {
        self.policies.get(key).is_some_and(|named| named.there)
    }

    fn put(&mut self, kind: Kind, resource: Resource, changes: &mut Vec<Change>) -> Result<(), Bad> {
        let Resource { name, version, resource, .. } = resource;
        let any = resource.ok_or_else(|| self.keep(kind, &name, "it is empty"))?;
        if any.type_url != kind.url() {
            return Err(self.keep(kind, &name, &format!("it is a {:?}", any.type_url)));
        }
        let new = match kind {
            Kind::Address => match Address::decode(any.value.as_slice()).map_err(|e| e.to_string()) {
                Ok(Address { r#type: Some(told) }) => {
                    self.note(&name, &told);
                    let new = match &told {
                        address::Type::Workload(w) => {
                            convert::workload(w, &mut self.texts).map(|w| Change::Workload(Arc::new(w)))
                        }
                        address::Type::Service(s) => convert::service(s, &mut self.texts).map(|s| Change::Service(Arc::new(s))),
                    };
                    if let Err(why) = &new
                        && self.holds_nothing_good(kind, &name)
                    {
                        self.close(kind, &name, &told, why, changes);
                    }
                    new
                }
                Ok(Address { r#type: None }) => Err("it is neither a workload nor a service".into()),
                Err(why) => Err(why),
            },
            Kind::Authorization => {
                let Some(key) = convert::policy_key(&name) else {
                    return Err(self.keep(kind, &name, "its name is not namespace/name"));
                };
                match Authorization::decode(any.value.as_slice()) {
                    Ok(m) => {
                        let (policy, bad) = convert::policy(m, &key);
                        return self.put_policy(&name, &version, policy, bad, changes);
                    }
                    Err(e) => {
                        let stand_in = convert::unusable(key, Scope::Namespace, &e.to_string());
                        return self.put_policy(&name, &version, stand_in, Some(e.to_string()), changes);
                    }
                }
            }
        };
        match new {
            Ok(change) => {
                let what = match &change {
                    Change::Workload(w) => {
                        let said = *w.node == *self.node && !self.node.is_empty() && w.locality != Locality::default();
                        if said && w.locality != self.locality {
                            self.locality = w.locality.clone();
                            changes.push(Change::OwnLocality(w.locality.clone()));
                        }
                        What::Workload(Arc::clone(w))
                    }
                    Change::Service(s) => What::Service(Arc::clone(s)),
                    _ => What::Nothing,
                };
                self.hold(kind, &name, &version, what, changes);
                changes.push(change);
                Ok(())
            }
            Err(why) => Err(self.keep(kind, &name, &why)),
        }
    }

    fn put_policy(
        &mut self,
        name: &str,
        version: &str,
        mut policy: Policy,
        bad: Option<Bad>,
        changes: &mut Vec<Change>,
    ) -> Result<(), Bad> {
        let object = format!("AuthorizationPolicy {}", policy.key).into();
        policy.origin = Some(Arc::new(Origin { place: "istiod".into(), line: 0, object }));
        let version = if bad.is_some() { "" } else { version };
        self.hold(Kind::Authorization, name, version, What::Policy(policy.key.clone()), changes);
        changes.push(Change::Policy(Arc::new(policy)));
        bad.map_or(Ok(()), Err)
    }

    /// Puts in the place of what cannot be used, and never was, what refuses.
    fn close(&mut self, kind: Kind, name: &str, told: &address::Type, why: &str, changes: &mut Vec<Change>) {
        let (what, change) = match told {
            address::Type::Workload(w) => {
                let closed = Arc::new(convert::closed_workload(w, name, why, &mut self.texts));
                (What::Workload(Arc::clone(&closed)), Change::Workload(closed))
            }
            address::Type::Service(s) => {
                let Some(closed) = convert::closed(s, why, &mut self.texts).map(Arc::new) else { return };
                (What::Service(Arc::clone(&closed)), Change::Service(closed))
            }
        };
        self.hold(kind, name, "", what, changes);
        if let Some(held) = self.held.get_mut(&kind).and_then(|held| held.get_mut(name)) {
            held.stand_in = true;
        }
        changes.push(change);
    }
    /// Says once of each thing that has no meaning here that it is passed over, and where it was seen first.
    fn note(&mut self, name: &str, told: &address::Type) {
        for what in convert::passed_over(told) {
            if self.passed_over.len() < MOST_PASSED_OVER && self.passed_over.insert(what.as_str().into()) {
                tracing::warn!(what, first = name, "istiod says what is not known here: it is passed over");
            }
        }
    }
    fn holds_nothing_good(&self, kind: Kind, name: &str) -> bool {
        let held = self.held.get(&kind).and_then(|held| held.get(name));
        held.is_none_or(|held| held.stand_in || matches!(held.what, What::Nothing))
    }
    /// Refused: what was good before stays, and istiod is not told that we have the new one.
    fn keep(&mut self, kind: Kind, name: &str, why: &str) -> Bad {
        self.held.entry(kind).or_default().entry(name.into()).or_default().version = "".into();
        why.to_owned()
    }

    fn hold(&mut self, kind: Kind, name: &str, version: &str, what: What, changes: &mut Vec<Change>) {
        self.count(&what, true);
        let held = self.held.entry(kind).or_default().entry(name.into()).or_default();
        let same = match (&held.what, &what) {
            (What::Workload(a), What::Workload(b)) => a.uid == b.uid,
            (What::Service(a), What::Service(b)) => a.key == b.key,
            (What::Policy(a), What::Policy(b)) => a == b,
            _ => false,
        };
        let old = std::mem::replace(held, Held { version: version.into(), what, stand_in: false }).what;
        if !same {
            changes.extend(gone(&old));
        }
        self.uncount(&old, same);
    }

    /// Forgets a resource; gives what it was.
    fn remove(&mut self, kind: Kind, name: &str, changes: &mut Vec<Change>) -> Option<What> {
        self.problems.remove(&(kind, name.into()));
        let held = self.held.get_mut(&kind).and_then(|held| held.remove(name))?;
        changes.extend(gone(&held.what));
        self.uncount(&held.what, false);
        Some(held.what)
    }

    fn count(&mut self, what: &What, there: bool) {
        match what {
            What::Workload(w) => {
                for key in w.policies.iter() {
                    self.named(key, |named| named.users += 1);
                }
            }
            What::Policy(key) => self.named(key, |named| named.there = there),
            What::Service(_) | What::Nothing => {}
        }
    }

    /// Takes back what counted for `what`; `replaced`: by another of the same key, which has been counted.
    fn uncount(&mut self, what: &What, replaced: bool) {
        match what {
            What::Workload(w) => {
                for key in w.policies.iter() {
                    self.named(key, |named| named.users = named.users.saturating_sub(1));
                }
            }
            What::Policy(_) if !replaced => self.count(what, false),
            What::Policy(_) | What::Service(_) | What::Nothing => {}
        }
    }

    fn named(&mut self, key: &PolicyKey, change: impl FnOnce(&mut Named)) {
        let named = self.policies.entry(key.clone()).or_default();
        change(named);
        let Named { there, users } = *named;
        if there || users == 0 {
            self.missing.remove(key);
        } else {
            self.missing.insert(key.clone());
        }
        if !there && users == 0 {
            self.policies.remove(key);
        }
    }
}

fn gone(what: &What) -> Option<Change> {
    match what {
        What::Nothing => None,
        What::Workload(w) => Some(Change::WorkloadGone(Arc::clone(&w.uid))),
        What::Service(s) => Some(Change::ServiceGone(s.key.clone())),
        What::Policy(key) => Some(Change::PolicyGone(key.clone())),
    }
}

fn problem(kind: Kind, name: &str, why: &str) -> Problem {
    let what = match kind {
        Kind::Address => "Address",
        Kind::Authorization => "Authorization",
    };
    let effect = match kind {
        Kind::Address => "what was good before stays; where nothing was, calls to its addresses are refused",
        Kind::Authorization => "it denies in its scope until it can be read",
    };
    Problem {
        severity: Severity::Error,
        origin: Origin { place: "istiod".into(), line: 0, object: format!("{what} {name}").into() },
        field: "".into(),
        message: format!("{why}; {effect}").into(),
        fix: "".into(),
        code: Some("istiod"),
    }
}

#[cfg(test)]
mod tests;
