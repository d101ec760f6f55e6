//! What is in force at each place that connections go to: a service, a workload, our own listeners.
//!
//! A connection finds its place once; what holds there is found anew when a version of the mesh is published, so that its
//! requests look nothing up. Places nobody is connected to are forgotten. Upstream: `app`, which tells of versions. Downstream:
//! `conn`.
use crate::facts::{Facts, Scope};
use arc_swap::ArcSwap;
use mesh_model::Snapshot;
use mesh_model::authz_l7::PolicyScope;
use mesh_model::gateway::ServiceKey;
use mesh_model::in_force::InForce;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::shard::Shards;
use mesh_model::telemetry::Place as Told;
use mesh_model::waypoint::Target;
use parking_lot::Mutex;
use std::sync::Arc;

/// Every place somebody is connected to.
#[derive(Debug)]
pub struct Places {
    gateway: GatewayKey,
    entries: ArcSwap<Shards<At, Arc<Place>>>,
    writing: Mutex<()>,
}
/// One of them.
#[derive(Debug)]
pub struct Place {
    at: At,
    now: ArcSwap<InForce>,
}
/// What was addressed, as far as rules are bound to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum At {
    /// A service, through us as its waypoint.
    Service(ServiceKey),
    /// A workload of a namespace, the same way.
    Workload(Arc<str>),
    /// A service, from another network. Its own policies are for its waypoint and its endpoints, who see what is asked.
    Crossing(ServiceKey),
    /// A listener of our own.
    Gateway,
}
impl At {
    fn of(facts: &Facts) -> Self {
        match &facts.scope {
            Scope::Mesh(Target::Service { service, .. }) => Self::Service(service.key.clone()),
            Scope::Mesh(Target::Workload { known, .. }) => Self::Workload(Arc::clone(&known.workload().namespace)),
            Scope::Network { service, .. } => Self::Crossing(service.key.clone()),
            Scope::Gateway { .. } => Self::Gateway,
        }
    }
    fn in_force(&self, snap: &Snapshot, gateway: &GatewayKey) -> InForce {
        let (service, namespace, waypoint) = match self {
            Self::Service(key) => (Some(key), Some(&*key.namespace), true),
            Self::Workload(namespace) => (None, Some(&**namespace), true),
            Self::Crossing(_) | Self::Gateway => (None, None, false),
        };
        let called = match self {
            Self::Service(key) | Self::Crossing(key) => snap.find_service(key),
            Self::Workload(_) | Self::Gateway => None,
        };
        let scope = PolicyScope { service, namespace, gateway: Some(gateway), waypoint };
        InForce::of(snap, &scope, &Told { service: called.map(|s| &**s), gateway, waypoint })
    }
}
impl Places {
    /// Of the process that serves this Gateway.
    pub fn new(gateway: GatewayKey) -> Self {
        Self { gateway, entries: ArcSwap::default(), writing: Mutex::default() }
    }
    /// Where a connection goes.
    pub(crate) fn of(&self, facts: &Facts, snap: &Snapshot) -> Arc<Place> {
        self.at(At::of(facts), snap)
    }
    fn at(&self, at: At, snap: &Snapshot) -> Arc<Place> {
        let find = || self.entries.load().get(&at).map(Arc::clone);
        find().unwrap_or_else(|| {
            let _writing = self.writing.lock();
            find().unwrap_or_else(|| {
                let now = ArcSwap::from_pointee(at.in_force(snap, &self.gateway));
                let place = Arc::new(Place { at: at.clone(), now });
                let mut next = Shards::clone(&self.entries.load());
                next.insert(at.clone(), Arc::clone(&place));
                self.entries.store(Arc::new(next));
                place
            })
        })
    }
    /// What is in force at a place by this version of the mesh. Between its publication and [`Self::collect`], which follows
    /// it at once, the first who asks finds out for all.
    pub(crate) fn in_force(&self, place: &Place, snap: &Snapshot) -> Arc<InForce> {
        let now = place.now.load();
        if now.version == snap.version() {
            return Arc::clone(&now);
        }
        let found = Arc::new(place.at.in_force(snap, &self.gateway));
        // Several may have found it meanwhile, of several versions: the newest stays.
        place.now.rcu(|now| Arc::clone(if now.version < found.version { &found } else { now }));
        found
    }
    /// Brings every place to this version, and forgets those without connections. Called after a publish, from the control
    /// thread; who connects to a new place meanwhile does not wait for the others to be found.
    pub fn collect(&self, snap: &Snapshot) {
        // Beside the table's own. Who finds it just now keeps a place that only its own requests bring to newer versions.
        let is_used = |place: &Arc<Place>| Arc::strong_count(place) > 1;
        for place in self.entries.load_full().values().filter(|place| is_used(place)) {
            self.in_force(place, snap);
        }
        let _writing = self.writing.lock();
        let all = self.entries.load_full();
        // All of them before the first is removed, which copies its shard: then those beside it would look used.
        let unused: Vec<&At> = all.iter().filter(|(_, place)| !is_used(place)).map(|(at, _)| at).collect();
        if unused.is_empty() {
            return;
        }
        let mut next = Shards::clone(&all);
        for at in unused {
            next.remove(at);
        }
        self.entries.store(Arc::new(next));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::change::Change;
    use mesh_model::l7::policy::{L7Action, L7Body, L7Policies, L7Policy, PolicyTarget};
    use mesh_model::policy::PolicyKey;
    use std::time::{Duration, Instant};

    fn facts() -> Facts {
        Facts {
            scope: Scope::Gateway { port: 80, listener: None, secure: false },
            client: ([127, 0, 0, 1], 1).into(),
            local: ([127, 0, 0, 1], 80).into(),
            identity: None,
            source: None,
            trace: None,
            sni: None,
            plain: None,
        }
    }
    fn deny(gateway: &GatewayKey) -> Change {
        let body = L7Body::Rules { action: L7Action::Deny, dry_run: false, rules: Vec::new() };
        let policy = L7Policy { key: PolicyKey::new("shop", "p"), body, origin: None };
        Change::L7Policies(PolicyTarget::Gateway(gateway.clone()), Arc::new(L7Policies::new(vec![Arc::new(policy)])))
    }

    #[test]
    fn a_place_follows_the_mesh_and_is_forgotten_with_its_last_connection() {
        let gateway = GatewayKey::new("shop", "edge");
        let places = Places::new(gateway.clone());
        let before = Snapshot::empty(mesh_model::snapshot::Viewpoint::default());
        let place = places.of(&facts(), &before);
        assert!(Arc::ptr_eq(&place, &places.of(&facts(), &before)), "one for all connections");
        assert!(places.in_force(&place, &before).policies.is_empty());

        let after = before.apply(&[deny(&gateway)]);
        places.collect(&after);
        let found = places.in_force(&place, &after);
        assert!(!found.policies.is_empty());
        assert!(Arc::ptr_eq(&found, &places.in_force(&place, &after)), "found once for a version");
        // Who is still at the version before is answered by it, and does not take the newer one from the others.
        assert!(places.in_force(&place, &before).policies.is_empty());
        assert!(Arc::ptr_eq(&found, &places.in_force(&place, &after)));

        // A request may be there before the control thread.
        let last = after.apply(&[Change::L7PoliciesGone(PolicyTarget::Gateway(gateway))]);
        assert!(places.in_force(&place, &last).policies.is_empty());
        drop(place);
        places.collect(&last);
        assert!(places.entries.load().is_empty());
    }

    #[test]
    fn all_places_nobody_is_connected_to_are_forgotten_at_once() {
        let places = Places::new(GatewayKey::new("shop", "edge"));
        let snap = Snapshot::empty(mesh_model::snapshot::Viewpoint::default());
        let connected: Vec<_> = (0..100).map(|n| places.at(At::Workload(format!("n{n}").into()), &snap)).collect();
        places.collect(&snap);
        assert_eq!(places.entries.load().len(), 100);
        let kept = connected.into_iter().nth(50);
        places.collect(&snap);
        assert_eq!(places.entries.load().len(), 1);
        assert!(kept.is_some_and(|kept| Arc::ptr_eq(&kept, &places.at(At::Workload("n50".into()), &snap))));
    }
    #[test]
    fn places_are_brought_up_to_date_while_others_are_written() {
        let gateway = GatewayKey::new("shop", "edge");
        let places = Places::new(gateway.clone());
        let before = Snapshot::empty(mesh_model::snapshot::Viewpoint::default());
        let after = before.apply(&[deny(&gateway)]);
        let place = places.of(&facts(), &before);
        std::thread::scope(|scope| {
            let writing = places.writing.lock();
            scope.spawn(|| places.collect(&after));
            let until = Instant::now() + Duration::from_secs(10);
            while place.now.load().version < after.version() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(place.now.load().version, after.version());
            drop(writing);
        });
    }
}
