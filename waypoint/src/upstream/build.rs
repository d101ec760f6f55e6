//! From the mesh to a cluster: which endpoints, with which priorities and shares.
mod beyond;
mod front;

use super::cluster::{Cluster, Placement, Source};
use super::host::{Host, Target};
use super::names::Named;
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
use mesh_model::plan::{Beyond, Front};
use mesh_model::service::{AppProtocol, IpFamilies, LbMode, Service};
use mesh_model::snapshot::{Backing, Viewpoint};
use mesh_model::workload::{Locality, Protocol, Workload};
use parking_lot::Mutex;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What of ourselves counts when endpoints are ranked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Own {
    locality: Locality,
    labels: Labels,
    network: Network,
    cluster: Arc<str>,
    node: Arc<str>,
    families: IpFamilies,
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
            families: me.map(|w| IpFamilies::of(&w.ips)).unwrap_or_default(),
        }
    }
    /// An address of the family we have, the first of both.
    pub fn family(&self) -> IpAddr {
        match self.families {
            IpFamilies::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            IpFamilies::V4 | IpFamilies::Dual | IpFamilies::Automatic => UNKNOWN,
        }
    }
    fn place(&self) -> locality::Place<'_> {
        let Self { locality, labels, network, cluster, node, families: _ } = self;
        locality::Place { locality, labels, network: network.as_str(), cluster, node }
    }
}

/// What of the mesh a service's cluster is built from.
#[derive(Clone, Debug)]
pub(super) struct Basis {
    pub backing: Arc<Backing>,
    pub destination: Option<Arc<Destination>>,
    /// Where nothing is said of the service.
    pub plain: Arc<TrafficPolicy>,
    pub own: Own,
    /// To its endpoints on other networks.
    pub ways: Vec<Beyond>,
    /// To its waypoint, in place of its endpoints.
    pub front: Option<Arc<Front>>,
}
impl Basis {
    /// Whether both are the same objects of the mesh.
    pub fn is_same(&self, other: &Self) -> bool {
        let same = match (&self.destination, &other.destination) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        let ways = self.ways == other.ways && self.front == other.front;
        same && self.plain == other.plain && Arc::ptr_eq(&self.backing, &other.backing) && self.own == other.own && ways
    }
}

/// An endpoint as the mesh lists it: one host, or, where `named` knows its addresses, one for each.
#[derive(Debug)]
pub(super) struct Listed {
    pub known: Arc<Known>,
    pub target: Target,
    pub weight: u32,
    pub priority: u32,
    pub share: u32,
    pub named: Option<Named>,
}
/// The hosts of endpoints, with what they were before where they are reached as before. An endpoint whose name has no answer yet is
/// its name, looked up by whoever dials.
pub(super) fn hosts(state: &State, listed: &[Listed]) -> (Vec<Arc<Host>>, Vec<Placement>) {
    let (mut hosts, mut places) = (Vec::with_capacity(listed.len()), Vec::with_capacity(listed.len()));
    for endpoint in listed {
        let mut put = |target: Target| {
            let state = state.host(endpoint.known.uid(), &target);
            places.push(Placement { priority: endpoint.priority, share: endpoint.share, key: key_of(&target, &endpoint.known) });
            hosts.push(Arc::new(Host { known: Arc::clone(&endpoint.known), target, weight: endpoint.weight, state }));
        };
        match endpoint.named.as_ref().and_then(Named::addresses) {
            None => put(endpoint.target.clone()),
            Some(ips) => {
                let port = endpoint.target.addr.port();
                for ip in ips {
                    put(Target { addr: SocketAddr::new(ip, port), name: None, ..endpoint.target.clone() });
                }
            }
        }
    }
    (hosts, places)
}

/// The cluster of a service port.
pub(super) fn service(state: &Arc<State>, key: &ClusterKey, service: &Arc<Service>, basis: Basis) -> (Cluster, Vec<Listed>) {
    if let Some(front) = &basis.front {
        let listed = front::listed(service, key.port, front, &basis.own.network);
        let protocol = service.port(key.port).map_or(AppProtocol::Unknown, |p| p.protocol);
        let (policy, of) = (Arc::clone(&basis.plain), Some(Arc::clone(service)));
        return (Cluster { protocol, ..cluster(state, policy, of, Source::Service(basis)) }, listed);
    }
    let Basis { backing, destination, plain, own, ways, front: _ } = &basis;
    let destination = destination.as_ref();
    let subset = key.subset.as_deref();
    // A subset nobody declared would have no endpoints; `Upstreams::cluster` does not come here with one.
    let policy = match destination {
        Some(destination) => destination.policy(subset, key.port),
        None => subset.is_none().then_some(plain),
    };
    let wanted = subset.and_then(|name| destination?.subsets.get(name)).map(|s| &s.labels);
    let members = backing
        .endpoints()
        .open_on(key.port)
        .filter(|(_, e)| policy.is_some() && wanted.is_none_or(|labels| labels.select(&e.workload().labels)));
    let policy = policy.unwrap_or(plain);
    let rules = Rules::new(policy, service, &own.locality);
    let here = own.place();
    let mut listed = Vec::new();
    let mut far = beyond::Far::new(service, key.port, ways, &own.network);
    for (rank, endpoint) in members {
        let Some((priority, share)) = rules.place(&here, u32::from(rank), endpoint) else { continue };
        if endpoint.workload().network != own.network {
            far.add(endpoint, priority, share);
            continue;
        }
        let Some(target) = target(service, key.port, endpoint) else { continue };
        let name = target.name.as_ref().filter(|name| !service.logical_dns && !is_wildcard(name));
        let named = name.map(|name| state.reach.names.follow(name, state, own.families, service.ip_families));
        let (known, weight) = (Arc::clone(endpoint.known()), far.weigh(endpoint.workload()));
        listed.push(Listed { known, target, weight, priority, share, named });
    }
    listed.extend(far.listed());
    let protocol = service.port(key.port).map_or(AppProtocol::Unknown, |p| p.protocol);
    let shares = rules.shares.iter().map(|(_, weight)| *weight).collect();
    let passthrough = policy.balance == Balance::Passthrough || service.lb.mode == LbMode::Passthrough;
    let (policy, service) = (Arc::clone(policy), Some(Arc::clone(service)));
    (Cluster { protocol, shares, passthrough, ..cluster(state, policy, service, Source::Service(basis)) }, listed)
}

/// A cluster about whose endpoints nothing is said.
fn cluster(state: &Arc<State>, policy: Arc<TrafficPolicy>, service: Option<Arc<Service>>, source: Source) -> Cluster {
    Cluster {
        policy,
        service,
        protocol: AppProtocol::Unknown,
        listed: Box::default(),
        members: ArcSwap::default(),
        shares: Box::default(),
        planning: Mutex::default(),
        outdated: AtomicBool::new(false),
        passthrough: false,
        wildcard: None,
        source,
        state: Arc::clone(state),
    }
}

/// Whether a name stands for whatever host of it the client names.
pub(super) fn is_wildcard(name: &str) -> bool {
    name.starts_with("*.")
}

/// The cluster of a workload addressed by itself.
pub(super) fn workload(state: &Arc<State>, known: &Arc<Known>, port: u16, plain: &Arc<TrafficPolicy>) -> (Cluster, Vec<Listed>) {
    let w = known.workload();
    let hbone = w.protocol == Protocol::Hbone;
    let ip = w.ips.first().copied();
    let reachable = (ip.is_some() || w.hostname.is_some()) && !(hbone && known.expect().is_empty());
    let target = reachable.then(|| Target {
        addr: SocketAddr::new(ip.unwrap_or(UNKNOWN), port),
        name: if ip.is_none() { w.hostname.clone() } else { None },
        hbone,
        expect: Arc::clone(known.expect()),
        lead: None,
    });
    let listed = |target| Listed { known: Arc::clone(known), target, weight: 1, priority: 0, share: 0, named: None };
    let cluster = cluster(state, Arc::clone(plain), None, Source::Workload(Arc::clone(known)));
    (cluster, target.map(listed).into_iter().collect())
}

const UNKNOWN: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

fn target(service: &Service, port: u16, endpoint: &Endpoint) -> Option<Target> {
    let w = endpoint.workload();
    let port = endpoint.target_port(service, port)?;
    let ip = w.ips.iter().copied().find(|ip| family_allowed(service.ip_families, *ip));
    let name = if ip.is_none() { Some(w.hostname.clone()?) } else { None };
    let hbone = w.protocol == Protocol::Hbone;
    let addr = SocketAddr::new(ip.unwrap_or(UNKNOWN), port);
    Some(Target { addr, name, hbone, expect: endpoint.expect(service), lead: None })
}

/// What consistent hashing places an endpoint by (Envoy: its address as text, or its host name). One gateway leads to several.
fn key_of(target: &Target, known: &Known) -> Box<str> {
    match &target.name {
        Some(name) => format!("{name}:{}", target.addr.port()).into(),
        None if target.lead.is_some() => format!("{} {}", target.addr, known.uid()).into(),
        None => target.addr.to_string().into(),
    }
}

/// Whose word on localities counts: the DestinationRule's, else the service's, else MeshConfig's, else (with outlier detection) the
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
        let mode = if rules.mesh_wide && service.lb.mode != LbMode::Any {
            Mode::Ranks
        } else if rules.disabled {
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
