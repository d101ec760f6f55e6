//! From the mesh to a cluster: which endpoints, with which priorities and shares.
use super::cluster::{Cluster, Placement, Source};
use super::host::{Host, Target};
use super::state::State;
use arc_swap::ArcSwap;
use mesh_model::Network;
use mesh_model::known::Known;
use mesh_model::l7::TrafficPolicy;
use mesh_model::l7::balance::locality;
use mesh_model::l7::destination::{Balance, Destination};
use mesh_model::l7::route::ClusterKey;
use mesh_model::labels::Labels;
use mesh_model::lb::{Endpoint, family_allowed};
use mesh_model::service::{AppProtocol, LbMode, Service};
use mesh_model::snapshot::{Backing, Viewpoint};
use mesh_model::workload::{Locality, Protocol, Workload};
use parking_lot::Mutex;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

/// What of ourselves counts when endpoints are ranked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Own {
    locality: Locality,
    labels: Labels,
    network: Network,
    cluster: Arc<str>,
    node: Arc<str>,
}
impl Own {
    /// By our own workload, where the mesh knows it; else by what the process was told.
    pub fn of(me: Option<&Arc<Workload>>, view: &Viewpoint) -> Self {
        let said = |own: fn(&Workload) -> &Arc<str>, told: &Arc<str>| {
            let own = me.map(|w| own(w)).filter(|text| !text.is_empty());
            Arc::clone(own.unwrap_or(told))
        };
        let place = me.map(|w| &w.locality).filter(|l| !l.region.is_empty());
        Self {
            locality: place.unwrap_or(&view.locality).clone(),
            labels: me.map(|w| w.labels.clone()).unwrap_or_default(),
            network: view.network.clone(),
            cluster: said(|w| &w.cluster, &view.cluster),
            node: said(|w| &w.node, &view.node),
        }
    }
    fn place(&self) -> locality::Place<'_> {
        let Self { locality, labels, network, cluster, node } = self;
        locality::Place { locality, labels, network: network.as_str(), cluster, node }
    }
}

/// The cluster of a service port.
pub(super) fn service(
    state: &Arc<State>,
    key: &ClusterKey,
    backing: &Arc<Backing>,
    service: &Arc<Service>,
    destination: Option<&Arc<Destination>>,
    plain: &Arc<TrafficPolicy>,
    own: &Own,
) -> Cluster {
    let subset = key.subset.as_deref();
    // A subset nobody declared would have no endpoints; `Upstreams::cluster` does not come here with one.
    let policy = match destination {
        Some(destination) => destination.policy(subset, key.port),
        None => subset.is_none().then_some(plain),
    };
    let wanted = subset.and_then(|name| destination?.subsets.get(name)).map(|s| &s.labels);
    let members = backing.endpoints().open_on(key.port).filter(|(_, e)| {
        policy.is_some() && e.workload().network == own.network && wanted.is_none_or(|labels| labels.select(&e.workload().labels))
    });
    let policy = policy.unwrap_or(plain);
    let rules = Rules::new(policy, service, &own.locality);
    let here = own.place();
    let (mut hosts, mut places) = (Vec::new(), Vec::new());
    for (rank, endpoint) in members {
        let Some((priority, share)) = rules.place(&here, u32::from(rank), endpoint) else { continue };
        let Some(target) = target(service, key.port, endpoint) else { continue };
        let key = key_of(&target);
        let state = state.host(endpoint.known().uid(), &target);
        let weight = endpoint.workload().capacity.max(1);
        hosts.push(Arc::new(Host { known: Arc::clone(endpoint.known()), target, weight, state }));
        places.push(Placement { priority, share, key });
    }
    let wildcard = hosts.iter().find(|h| h.target.name.as_deref().is_some_and(|name| name.starts_with("*."))).cloned();
    let source = Source::Service { backing: Arc::clone(backing), destination: destination.cloned(), own: own.clone() };
    Cluster {
        policy: Arc::clone(policy),
        service: Some(Arc::clone(service)),
        protocol: service.port(key.port).map_or(AppProtocol::Unknown, |p| p.protocol),
        hosts: hosts.into(),
        places: places.into(),
        shares: rules.shares.iter().map(|(_, weight)| *weight).collect(),
        plan: ArcSwap::default(),
        planning: Mutex::default(),
        passthrough: policy.balance == Balance::Passthrough || service.lb.mode == LbMode::Passthrough,
        wildcard,
        source,
        state: Arc::clone(state),
    }
}

/// The cluster of a workload addressed by itself.
pub(super) fn workload(state: &Arc<State>, known: &Arc<Known>, port: u16, plain: &Arc<TrafficPolicy>) -> Cluster {
    let w = known.workload();
    let hbone = w.protocol == Protocol::Hbone;
    let ip = w.ips.first().copied();
    let reachable = (ip.is_some() || w.hostname.is_some()) && !(hbone && known.expect().is_empty());
    let target = reachable.then(|| Target {
        addr: SocketAddr::new(ip.unwrap_or(UNKNOWN), port),
        name: if ip.is_none() { w.hostname.clone() } else { None },
        hbone,
        expect: Arc::clone(known.expect()),
    });
    let host = target.map(|target| {
        let state = state.host(known.uid(), &target);
        Arc::new(Host { known: Arc::clone(known), target, weight: 1, state })
    });
    let places = host.iter().map(|h| Placement { priority: 0, share: 0, key: key_of(&h.target) }).collect();
    Cluster {
        policy: Arc::clone(plain),
        service: None,
        protocol: AppProtocol::Unknown,
        hosts: host.into_iter().collect(),
        places,
        shares: Box::default(),
        plan: ArcSwap::default(),
        planning: Mutex::default(),
        passthrough: false,
        wildcard: None,
        source: Source::Workload(Arc::clone(known)),
        state: Arc::clone(state),
    }
}

const UNKNOWN: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

fn target(service: &Service, port: u16, endpoint: &Endpoint) -> Option<Target> {
    let w = endpoint.workload();
    let port = endpoint.target_port(service, port)?;
    let ip = w.ips.iter().copied().find(|ip| family_allowed(service.ip_families, *ip));
    let name = if ip.is_none() { Some(w.hostname.clone()?) } else { None };
    let hbone = w.protocol == Protocol::Hbone;
    Some(Target { addr: SocketAddr::new(ip.unwrap_or(UNKNOWN), port), name, hbone, expect: endpoint.expect(service) })
}

/// What consistent hashing places an endpoint by (Envoy: its address as text, or its host name).
fn key_of(target: &Target) -> Box<str> {
    match &target.name {
        Some(name) => format!("{name}:{}", target.addr.port()).into(),
        None => target.addr.to_string().into(),
    }
}

/// Whose word on localities counts: the DestinationRule's, else the service's, else (with outlier detection) the mesh's
/// default of failing over by distance.
struct Rules<'a> {
    policy: &'a TrafficPolicy,
    mode: Mode,
    shares: &'a [(Arc<str>, u32)],
}
enum Mode {
    Alike,
    Shares,
    Distance,
    Ranks,
}
impl<'a> Rules<'a> {
    fn new(policy: &'a TrafficPolicy, service: &Service, place: &Locality) -> Self {
        let rules = &policy.locality;
        let shares = locality::distribution(rules, place).unwrap_or_default();
        let said = !rules.failover.is_empty() || !rules.priority.is_empty() || !rules.distribute.is_empty();
        let mode = if rules.disabled {
            Mode::Alike
        } else if !shares.is_empty() {
            Mode::Shares
        } else if said && policy.outlier.is_some() && rules.distribute.is_empty() {
            Mode::Distance
        } else if said {
            // Failover without outlier detection does nothing, nor does a distribution that does not name our locality.
            Mode::Alike
        } else if service.lb.mode != LbMode::Any {
            Mode::Ranks
        } else if policy.outlier.is_some() {
            Mode::Distance
        } else {
            Mode::Alike
        };
        Self { policy, mode, shares }
    }
    /// Priority and share; none: it gets no traffic.
    fn place(&self, own: &locality::Place<'_>, rank: u32, endpoint: &Endpoint) -> Option<(u32, u32)> {
        Some(match self.mode {
            Mode::Alike => (0, 0),
            Mode::Shares => (0, locality::share_of(self.shares, &endpoint.workload().locality)?),
            Mode::Distance => (locality::failover_priority(&self.policy.locality, own, endpoint.workload()), 0),
            Mode::Ranks => (rank, 0),
        })
    }
}
