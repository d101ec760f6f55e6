//! Endpoint choice over sets precomputed at publish: a pick is two binary searches, whatever the size of the service,
//! and allocates nothing.
//!
//! Owns: the endpoints of one service, grouped by what can rank them, with cumulative weights in chunks, so that one
//! endpoint's change copies one chunk and the service's own change grades groups, not endpoints. Everything that can rule an
//! endpoint out for good (health, address, family, STRICT locality) is decided before a pick. Refuses: health observed by
//! traffic; nothing traffic mutates is here. Upstream: `snapshot`. Downstream: `plan`.
use crate::id::SpiffeId;
use crate::known::Known;
use crate::service::{HealthPolicy, IpFamilies, LbMode, LbScope, Service, ServicePort};
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
    /// Its capacity, beside it so that summing a chunk touches no workload.
    weight: u32,
}
impl Endpoint {
    fn new(known: Arc<Known>, ports: PortMap) -> Self {
        let weight = known.workload().capacity.max(1);
        Self { known, ports, weight }
    }
    /// The workload.
    pub fn workload(&self) -> &Arc<Workload> {
        self.known.workload()
    }
    /// The workload with its identity.
    pub fn known(&self) -> &Arc<Known> {
        &self.known
    }
    /// Identities a hop to it as a member of `service` expects: its own and the service's SANs. Not empty for an HBONE
    /// endpoint that was picked.
    pub fn expect(&self, service: &Service) -> Arc<[SpiffeId]> {
        self.known.expect_with(&service.sans)
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
/// The addresses of an answer of DNS that are an endpoint each: once each, of a family that we (`own`) can reach and that the
/// service is for.
pub fn addresses_of_name(answer: &[IpAddr], own: IpFamilies, service: IpFamilies) -> Vec<IpAddr> {
    let mut ips: Vec<IpAddr> = Vec::with_capacity(answer.len());
    for ip in answer.iter().map(IpAddr::to_canonical) {
        if family_allowed(own, ip) && family_allowed(service, ip) && !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    ips
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
///
/// Grouped by all that any service could rank them by, not by the rank this one gives them: a change of the service grades
/// a handful of groups anew and touches no endpoint, however many there are.
#[derive(Clone, Debug, Default)]
pub struct EndpointSet {
    /// Sorted by rank and kind; few (what kinds of places endpoints are in × distinct sets of declared ports).
    groups: Vec<Group>,
}
#[derive(Clone, Debug)]
struct Group {
    /// Given by the service to this kind; lower is preferred.
    rank: u8,
    traits: Traits,
    /// Service ports for which these endpoints name their own port, sorted.
    declared: Arc<[u16]>,
    /// Service ports these endpoints answer on, sorted. Follows from the service and the kind.
    open: Arc<[u16]>,
    bag: Bag,
}
impl Group {
    fn empty(service: Option<&Service>, rank: u8, traits: Traits, declared: &[u16]) -> Self {
        let open = open_ports(service, &traits, declared);
        Self { rank, traits, declared: declared.into(), open, bag: Bag::default() }
    }
    /// Whether a pick for a port (`None`: for any) may choose from it.
    fn is_choosable(&self, port: Option<u16>) -> bool {
        (self.rank < RANK_STRICT_MISS || self.rank == RANK_NO_GATEWAY) && port.is_none_or(|p| self.open.binary_search(&p).is_ok())
    }
    fn key(&self) -> (u8, &Traits, &[u16]) {
        (self.rank, &self.traits, &self.declared)
    }
}

impl EndpointSet {
    /// A set built from nothing but its members (no workload twice): what a change of our own place does.
    pub fn build(service: Option<&Service>, view: &Viewpoint, members: Vec<(Arc<Known>, PortMap)>) -> Self {
        let mut groups: Vec<(Group, Vec<Endpoint>)> = Vec::new();
        let mut declared = Vec::new();
        for (known, ports) in members {
            let traits = Traits::of(known.workload(), !known.expect().is_empty(), view);
            declare(&ports, &mut declared);
            let rank = rank(service, &traits);
            let at = match groups.binary_search_by(|(g, _)| g.key().cmp(&(rank, &traits, &declared))) {
                Ok(at) => at,
                Err(at) => {
                    groups.insert(at, (Group::empty(service, rank, traits, &declared), Vec::new()));
                    at
                }
            };
            if let Some((_, members)) = groups.get_mut(at) {
                members.push(Endpoint::new(known, ports));
            }
        }
        let fill = |(group, members)| Group { bag: Bag::of(members), ..group };
        Self { groups: groups.into_iter().map(fill).collect() }
    }
    /// Puts an endpoint in. The same workload must not be in already. Without a service the endpoint is staged:
    /// kept, never chosen.
    pub fn insert(&mut self, service: Option<&Service>, view: &Viewpoint, known: Arc<Known>, ports: PortMap) {
        let traits = Traits::of(known.workload(), !known.expect().is_empty(), view);
        let mut declared = Vec::new();
        declare(&ports, &mut declared);
        let rank = rank(service, &traits);
        let at = match self.groups.binary_search_by(|g| g.key().cmp(&(rank, &traits, &declared))) {
            Ok(at) => at,
            Err(at) => {
                self.groups.insert(at, Group::empty(service, rank, traits, &declared));
                at
            }
        };
        if let Some(g) = self.groups.get_mut(at) {
            g.bag.insert(Endpoint::new(known, ports));
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
    /// The service came, changed or went (`None`): what its endpoints are worth now. Costs nothing per endpoint.
    pub fn grade(&mut self, service: Option<&Service>) {
        for g in &mut self.groups {
            g.rank = rank(service, &g.traits);
            g.open = open_ports(service, &g.traits, &g.declared);
        }
        self.groups.sort_by(|a, b| a.key().cmp(&b.key()));
    }
    /// Whether nothing is in, not even unusable endpoints.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
    /// Chooses an endpoint that answers on `port` (`None`: on any) by a uniform draw: best rank first, then by weight.
    pub fn pick(&self, port: Option<u16>, draw: u64) -> Option<&Endpoint> {
        self.pick_of(draw, |g| g.is_choosable(port))
    }
    /// Those among which [`Self::pick`] draws.
    pub fn best(&self, port: Option<u16>) -> impl Iterator<Item = &Endpoint> {
        let best = self.groups.iter().find(|g| g.is_choosable(port)).map(|g| g.rank);
        let of_best = self.groups.iter().filter(move |g| Some(g.rank) == best && g.is_choosable(port));
        of_best.flat_map(|g| g.bag.iter())
    }
    /// The same among those on our own network.
    pub fn pick_here(&self, port: u16, draw: u64) -> Option<&Endpoint> {
        self.pick_of(draw, |g| g.traits.same_network && g.rank < RANK_STRICT_MISS && g.open.binary_search(&port).is_ok())
    }
    fn pick_of(&self, draw: u64, open: impl Fn(&Group) -> bool) -> Option<&Endpoint> {
        let open = |g: &&Group| open(g);
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
    /// Members that may be chosen for a service port, with their rank (lower is preferred). Those on other networks are left
    /// out unless there is a gateway to them.
    pub fn open_on(&self, port: u16) -> impl Iterator<Item = (u8, &Endpoint)> {
        let open = move |g: &&Group| g.rank < RANK_STRICT_MISS && g.open.binary_search(&port).is_ok();
        self.groups.iter().filter(open).flat_map(|g| g.bag.iter().map(|e| (g.rank, e)))
    }
    /// Of [`Self::open_on`] those on other networks. Costs nothing per endpoint of ours.
    pub fn open_beyond(&self, port: u16) -> impl Iterator<Item = &Endpoint> {
        let open = move |g: &&Group| !g.traits.same_network && g.rank < RANK_STRICT_MISS && g.open.binary_search(&port).is_ok();
        self.groups.iter().filter(open).flat_map(|g| g.bag.iter())
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

/// All of a workload and our own place that a service can rank an endpoint by. Two endpoints with the same traits have the
/// same rank in every service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Traits {
    same_region: bool,
    same_zone: bool,
    same_subzone: bool,
    same_node: bool,
    same_cluster: bool,
    same_network: bool,
    healthy: bool,
    v4: bool,
    v6: bool,
    named: bool,
    gateway: bool,
    tunnelled: bool,
    plain: bool,
    identified: bool,
}
impl Traits {
    fn of(w: &Workload, identified: bool, view: &Viewpoint) -> Self {
        Self {
            same_region: w.locality.region == view.locality.region,
            same_zone: w.locality.zone == view.locality.zone,
            same_subzone: w.locality.subzone == view.locality.subzone,
            // Two unknown nodes are not the same node.
            same_node: !view.node.is_empty() && w.node == view.node,
            same_cluster: w.cluster == view.cluster,
            same_network: w.network == view.network,
            healthy: w.health == Health::Healthy,
            v4: w.ips.iter().any(|ip| ip.to_canonical().is_ipv4()),
            v6: w.ips.iter().any(|ip| ip.to_canonical().is_ipv6()),
            named: w.hostname.is_some(),
            gateway: w.network_gateway.is_some(),
            tunnelled: w.application_tunnel.is_some(),
            plain: w.protocol == Protocol::Tcp,
            identified,
        }
    }
    fn same(&self, scope: LbScope) -> bool {
        match scope {
            LbScope::Region => self.same_region,
            LbScope::Zone => self.same_zone,
            LbScope::Subzone => self.same_subzone,
            LbScope::Node => self.same_node,
            LbScope::Cluster => self.same_cluster,
            LbScope::Network => self.same_network,
        }
    }
}
/// The service ports of a port map that name a port, sorted.
fn declare(ports: &[(u16, u16)], declared: &mut Vec<u16>) {
    declared.clear();
    declared.extend(ports.iter().filter(|(_, target)| *target != 0).map(|(port, _)| *port));
    declared.sort_unstable();
    declared.dedup();
}
/// The service ports endpoints of one kind answer on, sorted: where [`target_port`] has an answer.
fn open_ports(service: Option<&Service>, traits: &Traits, declared: &[u16]) -> Arc<[u16]> {
    let Some(service) = service else { return Arc::default() };
    let answers = |p: &&ServicePort| p.target != 0 || traits.tunnelled || declared.binary_search(&p.port).is_ok();
    let mut open: Vec<u16> = service.ports.iter().filter(answers).map(|p| p.port).collect();
    open.sort_unstable();
    open.dedup();
    open.into()
}
/// Rank of endpoints with these traits. Without a service they are staged.
fn rank(service: Option<&Service>, traits: &Traits) -> u8 {
    let Some(service) = service else { return RANK_UNUSABLE };
    let healthy = traits.healthy || service.lb.health == HealthPolicy::AllowAll;
    let remote = !traits.same_network;
    let family = match service.ip_families {
        IpFamilies::Automatic | IpFamilies::Dual => traits.v4 || traits.v6,
        IpFamilies::V4 => traits.v4,
        IpFamilies::V6 => traits.v6,
    };
    let provable = traits.plain || traits.identified || !service.sans.is_empty();
    if !healthy || !(remote || family || traits.named) || !(remote || provable) {
        RANK_UNUSABLE
    } else if remote && !traits.gateway {
        RANK_NO_GATEWAY
    } else {
        locality_rank(service, traits)
    }
}
/// Rank by the service's locality preferences; 0 is best.
fn locality_rank(service: &Service, traits: &Traits) -> u8 {
    let same = |scope: &LbScope| traits.same(*scope);
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
