//! A destination as one version of the mesh has it: its policy, its endpoints, and the tables a pick looks things up in.
use super::build::{Basis, Listed};
use super::error::{Failure, UpstreamError};
use super::host::{Host, HostState, Target};
use super::state::{RequestGuard, RetryGuard, State, note};
use arc_swap::ArcSwap;
use mesh_model::Refusal;
use mesh_model::known::Known;
use mesh_model::l7::TrafficPolicy;
use mesh_model::l7::balance::{Chance, Entry, Plan, is_held_back, warmup_factor};
use mesh_model::l7::destination::Balance;
use mesh_model::l7::outlier::Seen;
use mesh_model::l7::retry::left_out;
use mesh_model::l7::select::host_matches;
use mesh_model::service::{AppProtocol, Service};
use mesh_model::workload::Workload;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst, fence};
use std::sync::{Arc, OnceLock};

/// A destination.
#[derive(Debug)]
pub struct Cluster {
    pub(super) policy: Arc<TrafficPolicy>,
    pub(super) service: Option<Arc<Service>>,
    pub(super) protocol: AppProtocol,
    /// What the mesh lists, where names are among it whose addresses are endpoints; else nothing.
    pub(super) listed: Box<[Listed]>,
    /// Made when the cluster is installed, and whenever the health of an endpoint or the addresses of a name change.
    pub(super) members: ArcSwap<Members>,
    /// Weights of localities.
    pub(super) shares: Box<[u32]>,
    pub(super) planning: Mutex<()>,
    /// Health changed since its table was begun.
    pub(super) outdated: AtomicBool,
    /// Endpoints are what the client addressed.
    pub(super) passthrough: bool,
    /// Endpoints are the hosts of this wildcard that clients name, as this one but for its name.
    pub(super) wildcard: Option<Arc<Host>>,
    pub(super) source: Source,
    pub(super) state: Arc<State>,
}
/// The endpoints, and how one is found among them.
#[derive(Debug, Default)]
pub(super) struct Members {
    pub hosts: Arc<[Arc<Host>]>,
    /// Per endpoint: priority, share, and what hashing places it by.
    pub places: Arc<[Placement]>,
    plan: Plan,
    /// For passthrough: which of them are at an address.
    at: HashMap<IpAddr, Vec<usize>>,
    /// By their names in sessions; made when the first session is asked for, and then with the others.
    named: OnceLock<HashMap<u64, usize>>,
}
impl Members {
    /// The endpoint of a session.
    fn of_session(&self, name: u64) -> Option<&Arc<Host>> {
        self.hosts.get(*self.named.get_or_init(|| self.name_all()).get(&name)?)
    }
    fn name_all(&self) -> HashMap<u64, usize> {
        self.hosts.iter().enumerate().map(|(at, host)| (host.session_name(), at)).collect()
    }
    /// The endpoint at an address; none at its port: one that is there at another port.
    fn find(&self, to: SocketAddr) -> Option<&Arc<Host>> {
        let mut there = self.at.get(&to.ip())?.iter().filter_map(|at| self.hosts.get(*at));
        let first = there.clone().next();
        there.find(|host| host.target.addr == to).or(first)
    }
}
/// Where an endpoint stands in the tables.
#[derive(Debug)]
pub(super) struct Placement {
    pub priority: u32,
    pub share: u32,
    pub key: Box<str>,
}
/// What a cluster was built from, to see whether it still stands.
#[derive(Debug)]
pub(super) enum Source {
    Service(Basis),
    Workload(Arc<Known>),
}
impl Source {
    /// Why endpoints on other networks are not among them, if there are such.
    fn closed(&self) -> String {
        let Self::Service(basis) = self else { return String::new() };
        basis.ways.iter().find_map(|way| way.entrances.as_ref().err()).map(Refusal::brief).unwrap_or_default()
    }
}

/// What a pick goes by.
#[derive(Clone, Copy, Debug)]
pub struct PickContext<'a> {
    /// A uniform draw.
    pub draw: u64,
    /// Hash of the request, for consistent hashing.
    pub hash: Option<u64>,
    /// The endpoint its session stays with ([`mesh_model::l7::session::endpoint`]), if that is there and healthy.
    pub session: Option<u64>,
    /// Endpoints to keep away from if others are there.
    pub tried: &'a [Arc<Host>],
    /// Endpoints of attempts before, whose priorities the pick keeps away from as [`left_out`] says.
    pub before: &'a [Arc<Host>],
    /// What the client addressed, for passthrough.
    pub dst: Option<SocketAddr>,
    /// The host the client names (of the request, or in TLS), for wildcards.
    pub name: Option<&'a str>,
}

/// What a client asked for where nobody lists the endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Asked {
    /// An address.
    Addr(SocketAddr),
    /// A host, and the port it is reached on.
    Name(Box<str>, u16),
}

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// The endpoint answered with this status.
    Status(u16),
    /// It answered a gRPC call, with a status that stands for this one of HTTP.
    Grpc(u16),
    /// It did not.
    Failed(Failure),
    /// A connection of bytes to it was made.
    Connected,
}

impl Cluster {
    /// Istio's name: `outbound|port|subset|host`.
    pub fn name(&self) -> &str {
        &self.state.name
    }
    /// How it is reached.
    pub fn policy(&self) -> &Arc<TrafficPolicy> {
        &self.policy
    }
    /// The service; none for a workload addressed by itself.
    pub fn service(&self) -> Option<&Arc<Service>> {
        self.service.as_ref()
    }
    /// What its port is declared to carry.
    pub fn app_protocol(&self) -> AppProtocol {
        self.protocol
    }
    /// Its endpoints, ejected ones included.
    pub fn hosts(&self) -> Arc<[Arc<Host>]> {
        Arc::clone(&self.members.load().hosts)
    }

    /// Chooses an endpoint.
    ///
    /// # Errors
    /// `NoHealthy`: there is none to choose.
    pub fn pick(&self, ctx: &PickContext<'_>) -> Result<Arc<Host>, UpstreamError> {
        if let Some(wildcard) = &self.wildcard {
            return self.named(wildcard, ctx.name);
        }
        if self.passthrough {
            return self.pass(ctx.dst);
        }
        let members = self.members.load();
        if let Some(name) = ctx.session {
            self.state.sessions.store(true, Relaxed);
            if let Some(host) = members.of_session(name).filter(|host| !host.is_ejected()) {
                return Ok(Arc::clone(host));
            }
        }
        let Members { hosts, places, plan, .. } = &**members;
        let turn = if plan.takes_turns() { self.state.next_turn() } else { 0 };
        let chance = Chance { draw: ctx.draw, hash: ctx.hash, turn };
        let tried = |host: &Arc<Host>| ctx.tried.iter().any(|t| t.is_same(host));
        // A host that just failed has nothing to do: that is not a reason to prefer it.
        let load_of = |h: &Arc<Host>| u64::from(if tried(h) { u32::MAX } else { h.active() });
        let load = |at: usize| hosts.get(at).map_or(0, load_of);
        let avoid = |at: usize, draw: u64| {
            let Some(host) = hosts.get(at) else { return false };
            let cold = self.policy.warmup.is_some_and(|w| is_held_back(warmup_factor(&w, host.state.joined.elapsed()), draw));
            cold || tried(host)
        };
        let priority = |host: &Host| hosts.iter().zip(&**places).find(|(h, _)| h.is_same(host)).map(|(_, place)| place.priority);
        let before: Vec<u32> = ctx.before.iter().filter_map(|host| priority(host)).collect();
        let left_out = left_out(&before, |priorities| plan.is_some_left(priorities));
        let at = plan.pick_avoiding(chance, load, || self.state.next_turn(), avoid, left_out);
        at.and_then(|at| hosts.get(at)).cloned().ok_or_else(|| UpstreamError::new(Failure::NoHealthy, self.source.closed()))
    }

    /// The endpoint at the address the client asked for: a known one, else that address in plain.
    fn pass(&self, dst: Option<SocketAddr>) -> Result<Arc<Host>, UpstreamError> {
        let Some(to) = dst else {
            return Err(UpstreamError::new(Failure::NoHealthy, "no original destination"));
        };
        let members = self.members.load();
        let known = members.find(to);
        if let Some(host) = known.filter(|h| h.target.addr == to) {
            return Ok(Arc::clone(host));
        }
        Ok(self.state.passed(Asked::Addr(to), || {
            let (known, target) = if let Some(host) = known {
                (Arc::clone(&host.known), Target { addr: to, ..host.target.clone() })
            } else {
                let mut stranger = Workload::new(&to.to_string(), "", "");
                stranger.ips = vec![to.ip()];
                let target = Target { addr: to, name: None, hbone: false, expect: Arc::default(), lead: None };
                (Arc::new(Known::new(Arc::new(stranger))), target)
            };
            Arc::new(Host { known, target, weight: 1, state: HostState::new(self.state.reach.threads()) })
        }))
    }

    /// The host the client names, if the wildcard is for it.
    fn named(&self, wildcard: &Arc<Host>, name: Option<&str>) -> Result<Arc<Host>, UpstreamError> {
        let pattern = wildcard.target.name.as_deref().unwrap_or_default();
        let Some(name) = name.filter(|name| host_matches(pattern, name)) else {
            return Err(UpstreamError::new(Failure::NoHealthy, format!("the client names no host of {pattern}")));
        };
        let name = name.to_ascii_lowercase();
        let asked = Asked::Name(name.as_str().into(), wildcard.target.addr.port());
        Ok(self.state.passed(asked, || {
            let target = Target { name: Some(name.into()), ..wildcard.target.clone() };
            let state = HostState::new(self.state.reach.threads());
            Arc::new(Host { known: Arc::clone(&wildcard.known), target, weight: 1, state })
        }))
    }

    /// Admits a request, to be held until its response is over.
    ///
    /// # Errors
    /// `Overflow`: as many are under way as the policy allows.
    pub fn admit(&self) -> Result<RequestGuard, UpstreamError> {
        self.state.admit(&self.policy)
    }

    /// Admits a retry, to be held while it is under way.
    pub fn admit_retry(&self) -> Option<RetryGuard> {
        self.state.admit_retry(&self.policy)
    }

    /// Tells what came of an attempt, for outlier detection. Takes no lock unless an endpoint is to be ejected.
    pub fn report(&self, host: &Arc<Host>, result: Observed) {
        let seen = match result {
            Observed::Status(status) => Some(Seen::Status(status)),
            Observed::Grpc(status) => Some(Seen::Grpc(status)),
            Observed::Failed(failure) => failure.seen(),
            Observed::Connected => Some(Seen::Connected),
        };
        let Some(seen) = seen else { return };
        if !matches!(seen, Seen::Status(..500) | Seen::Grpc(..500) | Seen::Connected) {
            note(&host.state.failures);
        }
        let Some(policy) = &self.policy.outlier else { return };
        if let Some(cause) = host.state.monitor.note(policy, seen) {
            self.state.eject(&host.state, policy, cause);
        }
    }

    pub(super) fn was_built_from(&self, now: &Basis) -> bool {
        matches!(&self.source, Source::Service(basis) if basis.is_same(now))
    }
    pub(super) fn is_of_workload(&self, known: &Arc<Known>) -> bool {
        matches!(&self.source, Source::Workload(k) if Arc::ptr_eq(k, known))
    }

    /// Makes the tables anew for the health of now. Large tables are made on another thread.
    pub(super) fn replan(self: &Arc<Self>) {
        if matches!(self.policy.balance, Balance::Hash { .. })
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let cluster = Arc::clone(self);
            runtime.spawn_blocking(move || cluster.plan_anew());
            return;
        }
        self.plan_anew();
    }
    /// As [`Self::replan`], on this thread; by whoever makes a table already, if somebody does: nobody waits.
    pub(super) fn plan_anew(&self) {
        self.outdated.store(true, Relaxed);
        // Against the one in `catch_up`: either the lock is seen free here, or this is seen there.
        fence(SeqCst);
        self.catch_up();
    }
    /// Makes the tables anew until they are of the newest health.
    pub(super) fn catch_up(&self) {
        while self.outdated.load(Relaxed) {
            let Some(planning) = self.planning.try_lock() else { return };
            if self.outdated.swap(false, SeqCst) {
                let now = self.members.load();
                self.put(Arc::clone(&now.hosts), Arc::clone(&now.places));
            }
            drop(planning);
            fence(SeqCst);
        }
    }
    /// Makes these its endpoints.
    pub(super) fn adopt(&self, hosts: Vec<Arc<Host>>, places: Vec<Placement>) {
        let planning = self.planning.lock();
        self.put(hosts.into(), places.into());
        drop(planning);
        fence(SeqCst);
        self.catch_up();
    }
    fn put(&self, hosts: Arc<[Arc<Host>]>, places: Arc<[Placement]>) {
        let plan = self.plan_of(&hosts, &places);
        let mut at: HashMap<IpAddr, Vec<usize>> = HashMap::new();
        let own = |host: &Host| self.passthrough && host.target.name.is_none() && host.target.lead.is_none();
        for (n, host) in hosts.iter().enumerate().filter(|(_, host)| own(host)) {
            at.entry(host.target.addr.ip()).or_default().push(n);
        }
        let members = Members { hosts, places, plan, at, named: OnceLock::new() };
        if self.state.sessions.load(Relaxed) {
            members.named.get_or_init(|| members.name_all());
        }
        self.members.store(Arc::new(members));
    }
    fn plan_of(&self, hosts: &[Arc<Host>], places: &[Placement]) -> Plan {
        let entries: Vec<Entry<'_>> = hosts
            .iter()
            .zip(places)
            .map(|(h, p)| Entry { weight: h.weight, priority: p.priority, share: p.share, healthy: !h.is_ejected(), key: &p.key })
            .collect();
        let panic = self.policy.outlier.as_ref().map_or(0, |o| o.min_health_percent);
        Plan::new(&self.policy.balance, &entries, &self.shares, panic)
    }
}
