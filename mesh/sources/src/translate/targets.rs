//! Which layer 7 policies bind which service, gateway, or all waypoints: AuthorizationPolicies and RequestAuthentications alike.
//!
//! Owns the resolution of `targetRefs` (a Service by its name, a ServiceEntry by its hosts, a Gateway, GatewayClass
//! `istio-waypoint` from the root namespace), one list of policies per target, and the complaint about a policy that can
//! never apply: its target is not there, or is a service that no waypoint stands in front of. A policy of which not even the
//! targets could be read binds its whole namespace, and refuses there. Upstream: [`super::authorization`],
//! [`super::request_policy`], [`super::request_auth`]. Downstream: `mesh_model` through the changes of [`Targetable`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_model::l7::authorizer::Authorizers;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::l7::policy::{L7Action, L7Body, L7Policies, L7Policy, PolicyTarget};
use mesh_model::l7::request_auth::{AuthBody, RequestAuth, RequestAuths};
use mesh_model::policy::{Policy, PolicyBody, PolicyKey, Scope};
use mesh_model::service::ServiceKey;
use mesh_model::{Change, Origin};

use super::layer7::{forget, replace};
use super::object::{Kind, ObjectId};
use super::waypoint::GATEWAY_NAME;
use super::{Dirty, HashMap, Labels, Name, Translator};
use crate::diagnostics::{Problem, Severity};

/// The GatewayClass of waypoints, the only one a policy may name (upstream has it hardcoded too).
const WAYPOINT_CLASS: &str = "istio-waypoint";

/// What targets bind.
pub trait Targetable: Sized + PartialEq {
    /// Its kind of object.
    const KIND: Kind;
    /// All of one target.
    type All: PartialEq;
    /// Where it came from.
    fn origin(&self) -> Option<&Origin>;
    /// What refuses in its place.
    fn unusable(key: PolicyKey, why: Arc<str>, origin: Option<Arc<Origin>>) -> Self;
    /// All of one target from each.
    fn group(all: Vec<Arc<Self>>) -> Self::All;
    /// What was bound to a target has changed.
    fn changed(target: PolicyTarget, all: Arc<Self::All>) -> Change;
    /// Nothing is bound to a target any more.
    fn gone(target: PolicyTarget) -> Change;
}
impl Targetable for L7Policy {
    const KIND: Kind = Kind::AuthorizationPolicy;
    type All = L7Policies;
    fn origin(&self) -> Option<&Origin> {
        self.origin.as_deref()
    }
    fn unusable(key: PolicyKey, why: Arc<str>, origin: Option<Arc<Origin>>) -> Self {
        Self { key, body: L7Body::Unusable { why }, origin }
    }
    fn group(all: Vec<Arc<Self>>) -> L7Policies {
        L7Policies::new(all)
    }
    fn changed(target: PolicyTarget, all: Arc<L7Policies>) -> Change {
        Change::L7Policies(target, all)
    }
    fn gone(target: PolicyTarget) -> Change {
        Change::L7PoliciesGone(target)
    }
}
impl Targetable for RequestAuth {
    const KIND: Kind = Kind::RequestAuthentication;
    type All = RequestAuths;
    fn origin(&self) -> Option<&Origin> {
        self.origin.as_deref()
    }
    fn unusable(key: PolicyKey, why: Arc<str>, origin: Option<Arc<Origin>>) -> Self {
        Self { key, body: AuthBody::Unusable { why }, origin }
    }
    fn group(all: Vec<Arc<Self>>) -> RequestAuths {
        RequestAuths::new(all)
    }
    fn changed(target: PolicyTarget, all: Arc<RequestAuths>) -> Change {
        Change::RequestAuths(target, all)
    }
    fn gone(target: PolicyTarget) -> Change {
        Change::RequestAuthsGone(target)
    }
}

/// A layer 7 policy and what it is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targeted<P> {
    /// The policy.
    pub policy: Arc<P>,
    /// What it is bound to.
    pub targets: Targets,
}
/// An AuthorizationPolicy and what it is bound to.
pub type TargetedPolicy = Targeted<L7Policy>;
/// A RequestAuthentication and what it is bound to.
pub type TargetedAuth = Targeted<RequestAuth>;
/// What a policy is bound to, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// These.
    Named(Vec<WrittenTarget>),
    /// It names none and is for gateways: those of its namespace, or all when that is the root namespace.
    Gateways {
        /// All of them.
        everywhere: bool,
    },
    /// Pods, of its namespace or of all: those of gateways are bound, as in Istio. Other pods judge no such policy, and
    /// waypoints are not selected (upstream leaves both out in silence): what is reached of them through a waypoint is refused.
    Selected {
        /// Their labels.
        selector: Labels,
        /// Of all namespaces.
        everywhere: bool,
        /// Where it is written.
        line: u32,
    },
    /// It cannot be told: everything in its namespace, or everywhere when that is the root namespace.
    Unknown {
        /// Everywhere.
        everywhere: bool,
    },
}
/// One element of `targetRefs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenTarget {
    /// Kind.
    pub kind: TargetKind,
    /// Name.
    pub name: Arc<str>,
    /// Path of the element.
    pub field: Box<str>,
    /// Its line.
    pub line: u32,
}
/// Kinds of targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// core Service.
    Service,
    /// networking.istio.io ServiceEntry.
    ServiceEntry,
    /// Gateway API Gateway.
    Gateway,
    /// Gateway API GatewayClass.
    GatewayClass,
    /// One that is not known here.
    Other(Arc<str>),
}
impl TargetKind {
    pub(super) fn of(kind: &str) -> Self {
        match kind {
            "Service" => Self::Service,
            "ServiceEntry" => Self::ServiceEntry,
            "Gateway" => Self::Gateway,
            "GatewayClass" => Self::GatewayClass,
            other => Self::Other(other.into()),
        }
    }
}
impl<P: Targetable> Targeted<P> {
    /// Refuses in place of several versions of one policy, wherever any of them was bound; `None` when none was.
    pub(super) fn closing_all<'a>(
        key: &PolicyKey,
        why: &Arc<str>,
        origin: &Arc<Origin>,
        versions: impl Iterator<Item = &'a Self>,
    ) -> Option<Arc<Self>>
    where
        P: 'a,
    {
        let (mut named, mut unknown, mut any) = (Vec::new(), None, false);
        for version in versions {
            any = true;
            match &version.targets {
                Targets::Named(targets) => named.extend(targets.iter().cloned()),
                // What names no target in one version may have others in the next.
                Targets::Unknown { everywhere } | Targets::Gateways { everywhere } | Targets::Selected { everywhere, .. } => {
                    unknown = Some(*everywhere);
                }
            }
        }
        let targets = unknown.map_or(Targets::Named(named), |everywhere| Targets::Unknown { everywhere });
        let policy = P::unusable(key.clone(), Arc::clone(why), Some(Arc::clone(origin)));
        any.then(|| Arc::new(Self { policy: Arc::new(policy), targets }))
    }
    /// What it is bound to, but for where it was written.
    pub(super) fn bound_to(&self) -> (Vec<(&TargetKind, &str)>, Option<bool>, Option<bool>) {
        match &self.targets {
            Targets::Named(all) => (all.iter().map(|t| (&t.kind, &*t.name)).collect(), None, None),
            Targets::Gateways { everywhere } => (Vec::new(), Some(*everywhere), None),
            Targets::Unknown { everywhere } | Targets::Selected { everywhere, .. } => (Vec::new(), None, Some(*everywhere)),
        }
    }
}
impl TargetedPolicy {
    /// Refuses in place of a policy whose targets cannot be told; `None` when the policy can be used.
    pub(super) fn closing(policy: &Policy, everywhere: bool) -> Option<Arc<Self>> {
        let PolicyBody::Unusable { why } = &policy.body else { return None };
        let policy = L7Policy::unusable(policy.key.clone(), Arc::clone(why), policy.origin.clone());
        Some(Arc::new(Self { policy: Arc::new(policy), targets: Targets::Unknown { everywhere } }))
    }
    /// Whether it does more than tell.
    pub(super) fn enforced(&self) -> bool {
        !matches!(self.policy.body, L7Body::Rules { dry_run: true, .. })
    }
}

/// What one policy was bound to last.
#[derive(Debug, Default)]
pub(super) struct Bound {
    pub(super) targets: BTreeSet<PolicyTarget>,
    /// ServiceEntries it names.
    entries: BTreeSet<Name>,
    /// Services that are refused in its place.
    refused: BTreeSet<PolicyTarget>,
    /// It selects pods.
    selects: bool,
}
/// All bindings of one kind of policy.
#[derive(Debug)]
pub(super) struct Bindings<P: Targetable> {
    bound: BTreeMap<PolicyKey, Bound>,
    by_target: HashMap<PolicyTarget, BTreeMap<PolicyKey, Arc<P>>>,
    by_entry: HashMap<Name, BTreeSet<PolicyKey>>,
    out: HashMap<PolicyTarget, Arc<P::All>>,
    /// Services that were looked at since the last flush: they may have come, gone, or got a waypoint.
    services: BTreeSet<ServiceKey>,
}
impl<P: Targetable> Default for Bindings<P> {
    fn default() -> Self {
        Self {
            bound: BTreeMap::new(),
            by_target: HashMap::default(),
            by_entry: HashMap::default(),
            out: HashMap::default(),
            services: BTreeSet::new(),
        }
    }
}
impl<P: Targetable> Bindings<P> {
    /// A service was looked at.
    pub(super) fn touch_service(&mut self, key: &ServiceKey) {
        self.services.insert(key.clone());
    }

    /// Binds again the policies `changed` (or, with everything dirty, there are) and those whose targets changed; hands out the
    /// difference, and the problems of each policy. `find` knows the policy of a name, as it is now.
    pub(super) fn flush(
        &mut self,
        t: &Translator,
        dirty: &Dirty,
        changed: BTreeSet<PolicyKey>,
        find: impl Fn(&PolicyKey) -> Option<Arc<Targeted<P>>>,
        changes: &mut Vec<Change>,
    ) -> Vec<(ObjectId, Vec<Problem>)> {
        let mut touched = BTreeSet::new();
        let mut problems = Vec::new();
        for key in self.policies(dirty, changed) {
            let mut found = Vec::new();
            self.bind(t, &key, find(&key), &mut touched, &mut found);
            let id =
                ObjectId { kind: P::KIND, namespace: Arc::clone(&key.namespace), name: format!("targets:{}", key.name).into() };
            problems.push((id, found));
        }
        for target in touched {
            let all = self.by_target.get(&target).map(|all| Arc::new(P::group(all.values().cloned().collect())));
            replace(&mut self.out, &target, all, changes, |new| P::changed(target.clone(), new), P::gone);
        }
        problems
    }

    /// The policies to be bound, or checked, again.
    fn policies(&mut self, dirty: &Dirty, mut keys: BTreeSet<PolicyKey>) -> BTreeSet<PolicyKey> {
        let services = std::mem::take(&mut self.services);
        if dirty.all {
            keys.extend(self.bound.keys().cloned());
            return keys;
        }
        if self.bound.is_empty() {
            return keys;
        }
        // Pods, gateways, services: any of them may have come or gone, or have other labels.
        let pods = !(dirty.pods.is_empty() && dirty.entries.is_empty() && dirty.slices.is_empty());
        let moved = pods || !services.is_empty() || !dirty.gateways.is_empty();
        let gateways = dirty.gateways.iter().map(gateway_target);
        for target in services.into_iter().map(PolicyTarget::Service).chain(gateways) {
            keys.extend(self.by_target.get(&target).into_iter().flat_map(|all| all.keys().cloned()));
        }
        if moved {
            keys.extend(self.bound.iter().filter(|(_, bound)| bound.selects).map(|(key, _)| key.clone()));
        }
        for entry in &dirty.service_entries {
            keys.extend(self.by_entry.get(entry).into_iter().flatten().cloned());
        }
        keys
    }

    fn bind(
        &mut self,
        t: &Translator,
        key: &PolicyKey,
        now: Option<Arc<Targeted<P>>>,
        touched: &mut BTreeSet<PolicyTarget>,
        problems: &mut Vec<Problem>,
    ) {
        let mut bound = Bound::default();
        match now.as_deref().map(|p| (&p.targets, &p.policy)) {
            None => {}
            Some((Targets::Unknown { everywhere: true }, _)) => {
                bound.targets.insert(PolicyTarget::Mesh);
            }
            Some((Targets::Unknown { everywhere: false }, _)) => {
                bound.targets.insert(PolicyTarget::Namespace(Arc::clone(&key.namespace)));
            }
            Some((Targets::Gateways { everywhere: true }, _)) => {
                bound.targets.insert(PolicyTarget::Gateways);
            }
            Some((Targets::Gateways { everywhere: false }, _)) => {
                bound.targets.insert(PolicyTarget::GatewaysOf(Arc::clone(&key.namespace)));
            }
            Some((Targets::Selected { selector, everywhere, line }, policy)) => {
                bound.selects = true;
                let within = Some(&key.namespace).filter(|_| !everywhere);
                let told = select(t, within, selector, &mut bound);
                problems.extend(policy.origin().zip(told).map(|(origin, message)| selects_pods(origin, *line, message)));
            }
            Some((Targets::Named(targets), policy)) => {
                for target in targets {
                    let mut complain = |message: String, fix: &'static str| {
                        problems.extend(policy.origin().map(|origin| never_applies(origin, target, &message, fix)));
                    };
                    resolve(t, key, target, &mut bound, &mut complain);
                }
            }
        }
        let old = self.bound.remove(key).unwrap_or_default();
        for target in old.targets.difference(&bound.targets) {
            if let Some(all) = self.by_target.get_mut(target) {
                all.remove(key);
                if all.is_empty() {
                    self.by_target.remove(target);
                }
            }
            touched.insert(target.clone());
        }
        for entry in old.entries.difference(&bound.entries) {
            forget(&mut self.by_entry, entry, key);
        }
        for entry in bound.entries.difference(&old.entries) {
            self.by_entry.entry(entry.clone()).or_default().insert(key.clone());
        }
        if let Some(policy) = now.map(|p| Arc::clone(&p.policy)) {
            let refusing = || {
                let why = "it selects pods, and pods are not asked for tokens".into();
                Arc::new(P::unusable(key.clone(), why, policy.origin().cloned().map(Arc::new)))
            };
            for target in &bound.targets {
                let policy = if bound.refused.contains(target) { refusing() } else { Arc::clone(&policy) };
                let all = self.by_target.entry(target.clone()).or_default();
                if all.get(key) != Some(&policy) {
                    all.insert(key.clone(), policy);
                    touched.insert(target.clone());
                }
            }
            self.bound.insert(key.clone(), bound);
        }
    }
}

/// The AuthorizationPolicies there are.
pub(super) fn all_policies(t: &Translator) -> BTreeSet<PolicyKey> {
    let of_space = |(ns, space): (&Arc<str>, &super::Space)| {
        let names = space.policies.keys().chain(space.unreadable.keys());
        names.map(|n| PolicyKey { namespace: Arc::clone(ns), name: Arc::clone(n) }).collect::<Vec<_>>()
    };
    t.spaces.iter().flat_map(of_space).collect()
}
/// The AuthorizationPolicy of a name, if waypoints or gateways are to enforce one. What stands for a document that could not
/// be read may have been a policy with targets.
pub(super) fn policy(t: &Translator, key: &PolicyKey) -> Option<Arc<TargetedPolicy>> {
    let space = t.spaces.get(&key.namespace)?;
    if let Some(unreadable) = space.unreadable.get(&key.name) {
        return TargetedPolicy::closing(unreadable, unreadable.scope == Scope::Global);
    }
    space.policies.get(&key.name)?.obj.layer7.clone()
}

/// Adds what a selector means to `bound`; what there is to tell, if not all it selects are pods of gateways.
fn select(t: &Translator, within: Option<&Arc<str>>, selector: &Labels, bound: &mut Bound) -> Option<&'static str> {
    let spaces = t.spaces.iter().filter(|(ns, _)| within.is_none_or(|within| within == *ns));
    let workloads = spaces.flat_map(|(_, space)| {
        let many = space.entries.values().map(|e| &e.out).chain(space.slices.values().map(|s| &s.out));
        space.pods.values().filter_map(|pod| pod.out.as_ref()).chain(many.flatten())
    });
    let mut others = false;
    for workload in workloads.filter(|w| selector.select(&w.labels)) {
        if let Some(name) = workload.labels.get(GATEWAY_NAME) {
            let gateway: Name = (Arc::clone(&workload.namespace), Arc::clone(name));
            if t.gateways.get(&gateway).is_some_and(|g| *g.obj.class != *WAYPOINT_CLASS) {
                bound.targets.insert(gateway_target(&gateway));
                continue;
            }
        }
        others = true;
        let behind = workload.services.iter().filter_map(|(key, _)| t.services_out.get(key));
        bound.refused.extend(behind.filter(|s| !s.waypoints.is_empty()).map(|s| PolicyTarget::Service(s.key.clone())));
    }
    bound.targets.extend(bound.refused.iter().cloned());
    match (bound.refused.is_empty(), others || bound.targets.is_empty()) {
        (false, _) => Some("pods are not asked for tokens: what is reached of those it selects through a waypoint is refused"),
        (true, true) => Some("pods are not asked for tokens, waypoints and gateways are: selected like this it can never apply"),
        (true, false) => None,
    }
}
fn selects_pods(origin: &Origin, line: u32, message: &str) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: Origin { line, ..origin.clone() },
        field: "spec.selector".into(),
        message: message.into(),
        fix: "bind it with targetRefs to a Service, ServiceEntry or Gateway".into(),
        code: Some("no-effect"),
    }
}
/// Adds what one target means to `bound`; `complain` is called with message and fix when it never takes effect.
pub(super) fn resolve(
    t: &Translator,
    key: &PolicyKey,
    target: &WrittenTarget,
    bound: &mut Bound,
    complain: &mut impl FnMut(String, &'static str),
) {
    let (ns, name) = (&key.namespace, &target.name);
    match &target.kind {
        TargetKind::Service => {
            let hostname = format!("{name}.{ns}.svc.{}", t.view.cluster_domain).into();
            let service = ServiceKey { namespace: Arc::clone(ns), hostname };
            match t.services_out.get(&service) {
                None => complain(format!("the service {ns}/{name} does not exist"), "correct the name, or create the service"),
                Some(s) if s.waypoints.is_empty() => {
                    complain(format!("no waypoint stands in front of the service {ns}/{name}"), USE_A_WAYPOINT);
                }
                Some(_) => {}
            }
            bound.targets.insert(PolicyTarget::Service(service));
        }
        TargetKind::ServiceEntry => {
            let entry: Name = (Arc::clone(ns), Arc::clone(name));
            match t.spaces.get(ns).and_then(|s| s.service_entries.get(name)) {
                None => {
                    let message = format!("the ServiceEntry {ns}/{name} does not exist");
                    complain(message, "correct the name, or create the ServiceEntry");
                }
                Some(slot) => {
                    for host in &slot.obj.hosts {
                        let service = ServiceKey { namespace: Arc::clone(ns), hostname: Arc::clone(host) };
                        if t.services_out.get(&service).is_none_or(|s| s.waypoints.is_empty()) {
                            complain(
                                format!("no waypoint stands in front of {host} of the ServiceEntry {ns}/{name}"),
                                USE_A_WAYPOINT,
                            );
                        }
                        bound.targets.insert(PolicyTarget::Service(service));
                    }
                }
            }
            bound.entries.insert(entry);
        }
        TargetKind::Gateway => {
            let gateway: Name = (Arc::clone(ns), Arc::clone(name));
            if !t.gateways.contains_key(&gateway) {
                complain(format!("the Gateway {ns}/{name} does not exist"), "correct the name, or create the Gateway");
            }
            bound.targets.insert(gateway_target(&gateway));
        }
        TargetKind::GatewayClass if **name != *WAYPOINT_CLASS => {
            complain(format!("policies are not bound to GatewayClass {name}"), "name GatewayClass istio-waypoint, or a Gateway");
        }
        TargetKind::GatewayClass if **ns != *t.view.root_namespace => {
            let message = format!("only a policy of the root namespace {} binds all waypoints", t.view.root_namespace);
            complain(message, "move the policy to the root namespace, or name a Gateway");
        }
        TargetKind::GatewayClass => {
            bound.targets.insert(PolicyTarget::Waypoints);
        }
        TargetKind::Other(kind) => {
            complain(
                format!("targets of kind {kind} are not known here"),
                "name a Service, ServiceEntry, Gateway or GatewayClass",
            );
        }
    }
}
/// Tells of a CUSTOM policy that nobody can be asked for.
pub(super) fn unasked(t: &Translator, key: &PolicyKey, authorizers: &Authorizers) -> (ObjectId, Vec<Problem>) {
    let name = format!("authorizer:{}", key.name).into();
    let id = ObjectId { kind: Kind::AuthorizationPolicy, namespace: Arc::clone(&key.namespace), name };
    let policy = policy(t, key).map(|p| Arc::clone(&p.policy));
    let problem = policy.and_then(|policy| {
        let L7Body::Rules { action: L7Action::Custom { provider }, .. } = &policy.body else { return None };
        let why = match authorizers.get(provider) {
            Some(Ok(_)) => return None,
            Some(Err(_)) => "cannot be asked",
            None => "is not in MeshConfig",
        };
        Some(Problem {
            severity: Severity::Error,
            origin: Origin::clone(policy.origin.as_deref()?),
            field: "spec.provider.name".into(),
            message: format!("the external authorizer `{provider}` {why}; what this policy matches is refused").into(),
            fix: "name an extensionProvider with envoyExtAuthzHttp or envoyExtAuthzGrpc of ConfigMap istio in the root namespace"
                .into(),
            code: Some("no-authorizer"),
        })
    });
    (id, problem.into_iter().collect())
}
const USE_A_WAYPOINT: &str =
    "label the service or its namespace with istio.io/use-waypoint, or bind the policy to its pods with a selector";

fn gateway_target((namespace, name): &Name) -> PolicyTarget {
    PolicyTarget::Gateway(GatewayKey { namespace: Arc::clone(namespace), name: Arc::clone(name) })
}
pub(super) fn never_applies(origin: &Origin, target: &WrittenTarget, message: &str, fix: &str) -> Problem {
    let mut origin = origin.clone();
    origin.line = target.line;
    Problem {
        severity: Severity::Error,
        origin,
        field: target.field.clone(),
        message: format!("{message}: through this target the policy can never apply").into(),
        fix: fix.into(),
        code: Some("no-effect"),
    }
}
