//! Endpoint choice over sets precomputed at publish: a pick is two binary searches, whatever the size of the service,
//! and allocates nothing.
//!
//! Owns: the endpoints of one service, grouped by (rank, ports they answer on) with cumulative weights in chunks, so
//! that one endpoint's change copies one chunk. Everything that can rule an endpoint out for good (health, address,
//! family, STRICT locality) is decided when it is put in. Refuses: health observed by traffic; nothing traffic mutates
//! is here. Upstream: `snapshot`. Downstream: `plan`.
use crate::id::SpiffeId;
use crate::known::Known;
use crate::service::{HealthPolicy, IpFamilies, LbMode, LbScope, Service};
use crate::view::Viewpoint;
use crate::workload::{Health, PortMap, Protocol, Workload};
use std::net::IpAddr;
use std::sync::Arc;

/// Endpoints of a chunk before it is split.
const CHUNK_MAX: usize = 64;

/// Ranks below this are usable; lower is preferred.
const RANK_STRICT_MISS: u8 = 250;
/// On another network and without a gateway: chosen only when nothing else is left, so that the refusal names the cause.
const RANK_NO_GATEWAY: u8 = 251;
/// Never chosen: unhealthy, no address the service allows, or no identity to expect.
const RANK_UNUSABLE: u8 = 255;

/// One workload behind one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    known: Arc<Known>,
    /// Service port → its own port, as the workload declares.
    ports: PortMap,
    /// Accepted identities when the service adds SANs to the workload's own.
    expect: Option<Arc<[SpiffeId]>>,
    /// Its capacity, beside it so that summing a chunk touches no workload.
    weight: u32,
}
impl Endpoint {
    /// The workload.
    pub fn workload(&self) -> &Arc<Workload> {
        self.known.workload()
    }
    /// The workload with its identity.
    pub fn known(&self) -> &Arc<Known> {
        &self.known
    }
    /// Identities a hop to it expects: its own and the service's SANs. Not empty for an HBONE endpoint that was picked.
    pub fn expect(&self) -> &Arc<[SpiffeId]> {
        self.expect.as_ref().unwrap_or_else(|| self.known.expect())
    }
    /// Its own port behind a service port: endpoint port map, then the service's target port, then (application tunnel)
    /// the service port itself.
    pub fn target_port(&self, service: &Service, port: u16) -> Option<u16> {
        target_port(self.workload(), &self.ports, service, port)
    }
    fn uid(&self) -> &str {
        self.known.uid()
    }
    fn weight(&self) -> u64 {
        u64::from(self.weight)
    }
}

/// Port resolution of node-agent §1.4. `None` when the service does not declare the port or nobody knows the target.
pub fn target_port(workload: &Workload, ports: &[(u16, u16)], service: &Service, port: u16) -> Option<u16> {
    let declared = service.port(port)?;
    if let Some((_, t)) = ports.iter().find(|(s, t)| *s == port && *t != 0) {
        return Some(*t);
    }
    match declared.target {
        0 => workload.application_tunnel.is_some().then_some(port),
        t => Some(t),
    }
}
/// Whether a service's clients may use an address.
pub fn family_allowed(families: IpFamilies, ip: IpAddr) -> bool {
    match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::V4 => ip.is_ipv4(),
        IpFamilies::V6 => ip.is_ipv6(),
    }
}
/// An independent draw for another decision of the same connection (splitmix64 finaliser).
pub fn redraw(draw: u64, decision: u64) -> u64 {
    let mut z = draw.wrapping_add(decision.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
/// A draw as a number below `total` (0 when `total` is 0), without modulo bias.
pub fn below(draw: u64, total: u64) -> u64 {
    ((u128::from(draw) * u128::from(total)) >> 64) as u64
}

/// The endpoints of one service.
#[derive(Clone, Debug, Default)]
pub struct EndpointSet {
    /// Sorted by key; few (ranks × distinct port sets).
    groups: Vec<Group>,
}
#[derive(Clone, Debug)]
struct Group {
    rank: u8,
    /// Service ports these endpoints answer on, sorted.
    ports: Arc<[u16]>,
    bag: Bag,
}

impl EndpointSet {
    /// A set built from nothing but its members (no workload twice): what regrouping after a change of the service does.
    pub fn build(service: Option<&Service>, view: &Viewpoint, members: Vec<(Arc<Known>, PortMap)>) -> Self {
        let mut groups: Vec<(u8, Arc<[u16]>, Vec<Endpoint>)> = Vec::new();
        let mut open = Vec::new();
        for (known, ports) in members {
            let (rank, endpoint) = admit(service, view, known, ports, &mut open);
            match groups.binary_search_by(|(r, p, _)| (*r, &**p).cmp(&(rank, &open))) {
                Ok(at) => {
                    if let Some((_, _, members)) = groups.get_mut(at) {
                        members.push(endpoint);
                    }
                }
                Err(at) => groups.insert(at, (rank, open.as_slice().into(), vec![endpoint])),
            }
        }
        let group = |(rank, ports, members)| Group { rank, ports, bag: Bag::of(members) };
        Self { groups: groups.into_iter().map(group).collect() }
    }
    /// Puts an endpoint in. The same workload must not be in already. Without a service the endpoint is staged:
    /// kept, never chosen.
    pub fn insert(&mut self, service: Option<&Service>, view: &Viewpoint, known: Arc<Known>, ports: PortMap) {
        let mut open = Vec::new();
        let (rank, endpoint) = admit(service, view, known, ports, &mut open);
        let at = match self.groups.binary_search_by(|g| (g.rank, &*g.ports).cmp(&(rank, &open))) {
            Ok(at) => at,
            Err(at) => {
                self.groups.insert(at, Group { rank, ports: open.into(), bag: Bag::default() });
                at
            }
        };
        if let Some(g) = self.groups.get_mut(at) {
            g.bag.insert(endpoint);
        }
    }
    /// Takes an endpoint out; whether it was in.
    pub fn remove(&mut self, uid: &str) -> bool {
        for (at, g) in self.groups.iter_mut().enumerate() {
            if g.bag.remove(uid) {
                if g.bag.chunks.is_empty() {
                    self.groups.remove(at);
                }
                return true;
            }
        }
        false
    }
    /// Whether nothing is in, not even unusable endpoints.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
    /// Chooses an endpoint that answers on `port` (`None`: on any) by a uniform draw: best rank first, then by weight.
    pub fn pick(&self, port: Option<u16>, draw: u64) -> Option<&Endpoint> {
        let open = |g: &&Group| {
            (g.rank < RANK_STRICT_MISS || g.rank == RANK_NO_GATEWAY) && port.is_none_or(|p| g.ports.binary_search(&p).is_ok())
        };
        // Groups are sorted by rank: the first open one has the best.
        let best = self.groups.iter().find(open)?.rank;
        let of_best = || self.groups.iter().filter(open).take_while(|g| g.rank == best);
        let mut at = below(draw, of_best().map(|g| g.bag.total).sum());
        for g in of_best() {
            if at < g.bag.total {
                return g.bag.at(at);
            }
            at -= g.bag.total;
        }
        None
    }
    /// Endpoints clients may be told about (DNS, admin): all but unhealthy and addressless ones, by workload uid in
    /// each group.
    pub fn usable(&self) -> impl Iterator<Item = &Endpoint> {
        self.groups.iter().filter(|g| g.rank != RANK_UNUSABLE).flat_map(|g| g.bag.iter())
    }
    /// Every member, usable or not.
    pub fn all(&self) -> impl Iterator<Item = &Endpoint> {
        self.groups.iter().flat_map(|g| g.bag.iter())
    }
    /// Its members as [`EndpointSet::build`] takes them.
    pub fn members(&self) -> Vec<(Arc<Known>, PortMap)> {
        self.all().map(|e| (Arc::clone(&e.known), Arc::clone(&e.ports))).collect()
    }
    /// Whether a workload is a member, usable or not.
    pub fn contains(&self, uid: &str) -> bool {
        self.groups.iter().any(|g| g.bag.find(uid).is_some())
    }
    /// Members with the rank they got (lower is preferred), for dumps and tools.
    pub fn ranked(&self) -> impl Iterator<Item = (u8, &Endpoint)> {
        self.groups.iter().flat_map(|g| g.bag.iter().map(|e| (g.rank, e)))
    }
}

/// The endpoint a workload becomes behind a service, with its rank; `open` becomes the service ports it answers on.
fn admit(service: Option<&Service>, view: &Viewpoint, known: Arc<Known>, ports: PortMap, open: &mut Vec<u16>) -> (u8, Endpoint) {
    open.clear();
    let weight = known.workload().capacity.max(1);
    let Some(service) = service else {
        return (RANK_UNUSABLE, Endpoint { known, ports, expect: None, weight });
    };
    open.extend(service.ports.iter().map(|p| p.port));
    open.retain(|p| target_port(known.workload(), &ports, service, *p).is_some());
    open.sort_unstable();
    open.dedup();
    let expect = (!service.sans.is_empty()).then(|| known.expect_with(&service.sans));
    let provable = !expect.as_ref().unwrap_or_else(|| known.expect()).is_empty();
    (rank(service, view, known.workload(), provable), Endpoint { known, ports, expect, weight })
}
/// Rank of an endpoint as seen from `view`.
fn rank(service: &Service, view: &Viewpoint, w: &Workload, identity_known: bool) -> u8 {
    let healthy = w.health == Health::Healthy || service.lb.health == HealthPolicy::AllowAll;
    let remote = w.network != view.network;
    let addressed = remote || w.ips.iter().any(|ip| family_allowed(service.ip_families, *ip)) || w.hostname.is_some();
    let provable = w.protocol == Protocol::Tcp || identity_known || remote;
    if !healthy || !addressed || !provable {
        RANK_UNUSABLE
    } else if remote && w.network_gateway.is_none() {
        RANK_NO_GATEWAY
    } else {
        locality_rank(service, view, w)
    }
}
/// Rank by the service's locality preferences; 0 is best.
fn locality_rank(service: &Service, view: &Viewpoint, w: &Workload) -> u8 {
    let same = |scope: &LbScope| match scope {
        LbScope::Region => w.locality.region == view.locality.region,
        LbScope::Zone => w.locality.zone == view.locality.zone,
        LbScope::Subzone => w.locality.subzone == view.locality.subzone,
        // Two unknown nodes are not the same node.
        LbScope::Node => !view.node.is_empty() && w.node == view.node,
        LbScope::Cluster => w.cluster == view.cluster,
        LbScope::Network => w.network == view.network,
    };
    let scopes = &service.lb.scopes;
    match service.lb.mode {
        LbMode::Any | LbMode::Passthrough => 0,
        LbMode::Failover => {
            let matched = scopes.iter().take_while(|s| same(s)).count();
            u8::try_from(scopes.len() - matched).unwrap_or(RANK_STRICT_MISS - 1).min(RANK_STRICT_MISS - 1)
        }
        LbMode::Strict => {
            // The network is preferred, never required (ztunnel#1980): the gateway makes other networks reachable.
            let required = scopes.iter().filter(|s| **s != LbScope::Network).all(&same);
            let preferred = scopes.iter().all(same);
            if required { u8::from(!preferred) } else { RANK_STRICT_MISS }
        }
    }
}

/// Weighted members in workload uid order, in chunks. Which member a number selects depends only on the members, not
/// on the order in which they came.
#[derive(Clone, Debug, Default)]
struct Bag {
    chunks: Vec<Arc<Chunk>>,
    /// Weight up to and including each chunk.
    ends: Vec<u64>,
    total: u64,
}
#[derive(Clone, Debug, Default)]
struct Chunk {
    members: Vec<Endpoint>,
    /// Weight up to and including each member.
    ends: Vec<u64>,
}
impl Chunk {
    fn of(members: Vec<Endpoint>) -> Self {
        let mut c = Self { members, ends: Vec::new() };
        c.sum();
        c
    }
    fn sum(&mut self) {
        let mut end = 0_u64;
        self.ends.clear();
        self.ends.extend(self.members.iter().map(|m| {
            end = end.saturating_add(m.weight());
            end
        }));
    }
    fn total(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }
}
impl Bag {
    fn of(mut members: Vec<Endpoint>) -> Self {
        members.sort_by(|a, b| a.uid().cmp(b.uid()));
        let mut bag = Self::default();
        let mut rest = members.into_iter().peekable();
        while rest.peek().is_some() {
            // Three quarters full, so that the next endpoints do not split every chunk.
            bag.chunks.push(Arc::new(Chunk::of(rest.by_ref().take(CHUNK_MAX / 4 * 3).collect())));
        }
        bag.sum();
        bag
    }
    /// The chunk a uid is or belongs in.
    fn chunk_of(&self, uid: &str) -> usize {
        self.chunks.partition_point(|c| c.members.first().is_some_and(|m| m.uid() <= uid)).saturating_sub(1)
    }
    fn find(&self, uid: &str) -> Option<&Endpoint> {
        let c = self.chunks.get(self.chunk_of(uid))?;
        let at = c.members.binary_search_by(|m| m.uid().cmp(uid)).ok()?;
        c.members.get(at)
    }
    fn insert(&mut self, e: Endpoint) {
        let at = self.chunk_of(e.uid());
        let Some(chunk) = self.chunks.get_mut(at) else {
            self.chunks.push(Arc::new(Chunk::of(vec![e])));
            self.sum();
            return;
        };
        let chunk = Arc::make_mut(chunk);
        match chunk.members.binary_search_by(|m| m.uid().cmp(e.uid())) {
            Ok(i) => {
                if let Some(m) = chunk.members.get_mut(i) {
                    *m = e;
                }
            }
            Err(i) => chunk.members.insert(i, e),
        }
        if chunk.members.len() > CHUNK_MAX {
            let upper = chunk.members.split_off(CHUNK_MAX / 2);
            chunk.sum();
            self.chunks.insert(at + 1, Arc::new(Chunk::of(upper)));
        } else {
            chunk.sum();
        }
        self.sum();
    }
    fn remove(&mut self, uid: &str) -> bool {
        if self.find(uid).is_none() {
            return false;
        }
        let at = self.chunk_of(uid);
        let Some(chunk) = self.chunks.get_mut(at) else { return false };
        let chunk = Arc::make_mut(chunk);
        chunk.members.retain(|m| m.uid() != uid);
        if chunk.members.is_empty() {
            self.chunks.remove(at);
        } else {
            chunk.sum();
        }
        self.sum();
        true
    }
    fn sum(&mut self) {
        let mut end = 0_u64;
        self.ends.clear();
        self.ends.extend(self.chunks.iter().map(|c| {
            end = end.saturating_add(c.total());
            end
        }));
        self.total = end;
    }
    /// The member that owns the `n`-th unit of weight.
    fn at(&self, n: u64) -> Option<&Endpoint> {
        let c = self.ends.partition_point(|end| *end <= n);
        let before = c.checked_sub(1).and_then(|i| self.ends.get(i)).copied().unwrap_or(0);
        let chunk = self.chunks.get(c)?;
        let i = chunk.ends.partition_point(|end| *end <= n - before);
        chunk.members.get(i)
    }
    fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.chunks.iter().flat_map(|c| c.members.iter())
    }
}

#[cfg(test)]
mod tests;
